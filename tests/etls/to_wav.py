"""Convert audio files of any format to WAV, by ffmpeg, from the object's file and not from memory.

Try it, where ffmpeg is installed:

    python3 ais_runtime_min.py serve tests/etls/to_wav.py --target . &
    curl 'http://127.0.0.1:8000/song.mp3?etl_args=16000' > song.wav

In a cluster:

    python3 ais_runtime_min.py pack tests/etls/to_wav.py --os-packages ffmpeg --arg-type fqn --spec
"""
import subprocess
from typing import Union

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class ToWAV(HTTPMultiThreadedServer):
    """With ETL_DIRECT_FQN=true an object comes as the path of its file, or else as bytes."""

    def transform(self, data: Union[bytes, str], path: str, etl_args: str) -> bytes:
        """Return the sound as WAV, mono, with `etl_args` samples per second, or 44,100."""
        is_file = isinstance(data, str)
        command = ["ffmpeg", "-v", "error", "-i", data if is_file else "pipe:0", "-ac", "1",
                   "-ar", str(int(etl_args or 44_100)), "-f", "wav", "pipe:1"]
        done = subprocess.run(command, input=None if is_file else data, capture_output=True)
        if done.returncode:
            raise ValueError("ffmpeg: %s" % done.stderr.decode(errors="replace").strip())
        return done.stdout

    def get_mime_type(self) -> str:
        """Return the content type of the results."""
        return "audio/wav"
