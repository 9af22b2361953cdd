"""The servers side by side: ours as its image starts it, and the SDK's as their documentation starts them.

Each is a child process in a session of its own, on 127.0.0.1, killed with all its children when its context ends.
"""
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

from bench.scenarios import BEFORE, CLASSES_UPPER_BYTES

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 60.0
POLL_SECONDS = 0.002
ETL_PATH = "/v1/etl/_object/bench/s3cr3t"  # what AIS_TARGET_URL has for a path, which direct puts must repeat

HEADER = "from aistore.sdk.etl.webserver.{module} import {base}\n\n\nclass Bench({base}):\n"
BUFFERED = """\
    def transform(self, data, path, etl_args):
        return data.upper() if len(data) < {limit} else data
"""
STREAMED = """\
    def transform_stream(self, reader, path, etl_args):
        piece = reader.read(65536)
        while piece:
            yield piece
            piece = reader.read(65536)
"""
BASES = {
    "ours": ("http_multi_threaded_server", "HTTPMultiThreadedServer"),
    "ours-script": ("http_multi_threaded_server", "HTTPMultiThreadedServer"),
    "ours-fastapi": ("fastapi_server", "FastAPIServer"),
    "fastapi": ("fastapi_server", "FastAPIServer"),
    "threaded": ("http_multi_threaded_server", "HTTPMultiThreadedServer"),
    "flask": ("flask_server", "FlaskServer"),
}
OURS = {**{peer: peer for peer in BEFORE}, **{before: peer for peer, before in BEFORE.items()}}  # how they are started
TAILS = {  # what the SDK's README has after the class
    "fastapi": "\n\nfastapi_server = Bench(port={port})\nfastapi_app = fastapi_server.app\n",
    "flask": "\n\nflask_server = Bench(port={port})\nflask_app = flask_server.app\n",
    "threaded": "\n\nif __name__ == \"__main__\":\n    Bench(port={port}).start()\n",
    "payload": "\n\nfrom aistore.sdk.etl.webserver import serialize_class\nprint(serialize_class(Bench))\n",
}
COMMANDS = {  # those of the README of the SDK, with the options of the default runtime, which are the faster ones
    "fastapi": "uvicorn served:fastapi_app --host 127.0.0.1 --port {port} --workers {workers} --log-level info "
               "--ws-max-size 17179869184 --ws-ping-interval 0 --ws-ping-timeout 86400 --no-access-log",
    "flask": "gunicorn served:flask_app --bind 127.0.0.1:{port} --workers {workers} --log-level info",
    "threaded": "python served.py",
    "ours": "python -m ais_runtime_min",  # which takes the bytecode that is cached beside the file
    "ours-script": "python ais_runtime_min.py",
}


class ServerFailure(Exception):
    """A server did not start or does not answer what it must; the text has its last words."""


class Place(NamedTuple):
    """Where the measuring happens: the folder of the environments, and a temporary one that is empty at first.

    `before` is another version of the runtime, which is measured beside it.
    """

    environments: Path
    folder: Path
    before: Optional[Path] = None


def class_source(peer: str, streaming: bool) -> str:
    """Return the source of the class that every server serves, deriving from the base that is the peer's."""
    module, base = BASES[peer]
    body = STREAMED if streaming else BUFFERED.format(limit=CLASSES_UPPER_BYTES)
    return HEADER.format(module=module, base=base) + body


def expected_result(body: bytes, streaming: bool) -> bytes:
    """Return what the class makes of a body."""
    return body.upper() if len(body) < CLASSES_UPPER_BYTES and not streaming else body


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# == A child process ==


class Server:
    """A child process that serves HTTP; a context manager that kills all of it."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], folder: Path, port: int) -> None:
        self.name = name
        self.port = port
        self._log = folder / "log"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(list(command), cwd=str(folder), env=dict(env), stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill whatever is left of the session's process group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all ended before
        self.process.wait()

    def url(self, target: str) -> str:
        """Return the URL of a request target."""
        return "http://127.0.0.1:%d%s" % (self.port, target)

    def wait_until_healthy(self, target: str = "/health") -> None:
        """Return with the first answer of 200, a few milliseconds late at most; raise where it does not come."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._answers(target):
                return
            if self.process.poll() is not None:
                break
            time.sleep(POLL_SECONDS)
        raise ServerFailure("%s does not start: %s" % (self.name, self.last_words()))

    def _answers(self, target: str) -> bool:
        head = "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n" % target
        try:
            with socket.create_connection(("127.0.0.1", self.port), START_SECONDS) as connection:
                connection.sendall(head.encode())
                return b" 200 " in connection.recv(4096).split(b"\r\n")[0]
        except OSError:
            return False

    def last_words(self) -> str:
        """Return the end of the log, in one line."""
        lines = self._log.read_text(errors="replace").split("\n")
        return " | ".join(line.strip() for line in lines[-10:] if line.strip())


# == The peers ==


class Peers:
    """Prepares folders and payloads once, and starts any of the peers from them."""

    def __init__(self, place: Place, target_url: str) -> None:
        self._environments = place.environments
        self._folder = place.folder
        self._before = place.before
        self._target_url = target_url
        self._payloads: Dict[Tuple[str, bool], str] = {}

    def python(self, group: str) -> str:
        """Return the interpreter of an environment."""
        return str(self._environments / group / "bin" / "python")

    def launch(self, peer: str, workers: int, streaming: bool = False) -> Server:
        """Start a peer, and return at once."""
        prepared = self.prepare(peer, workers, streaming)
        return Server(peer, *prepared)

    def start(self, peer: str, workers: int, streaming: bool = False) -> Server:
        """Start a peer, and return it once it is healthy."""
        server = self.launch(peer, workers, streaming)
        try:
            server.wait_until_healthy()
        except BaseException:
            server.kill()
            raise
        return server

    def prepare(self, peer: str, workers: int, streaming: bool) -> Tuple[List[str], Dict[str, str], Path, int]:
        """Do all that is not the server's own work: its folder, files and payload; return what starts it."""
        folder = self._folder / ("%s-%s" % (peer, "stream" if streaming else "bytes"))
        port, ours = free_port(), OURS.get(peer)
        env = self._variables("slim" if ours else "sdk", port, workers)
        if ours:
            env["ETL_CLASS_PAYLOAD"] = self._payload(ours, streaming)
            self._copy_runtime(folder, ROOT / "ais_runtime_min.py" if peer == ours else self._before, ours != "ours-script")
        else:
            folder.mkdir(exist_ok=True)
            (folder / "served.py").write_text(class_source(peer, streaming) + TAILS[peer].format(port=port))
        command = COMMANDS.get(ours or peer, COMMANDS["ours"])
        program, *options = command.format(port=port, workers=workers).split()
        program = str(self._environments / ("slim" if ours else "sdk") / "bin" / program)
        return [program, *options], env, folder, port

    def _variables(self, group: str, port: int, workers: int) -> Dict[str, str]:
        """Return what the image and AIStore set: nothing of the user's but PATH leaks in."""
        path = os.pathsep.join([str(self._environments / group / "bin"), os.environ.get("PATH", os.defpath)])
        return {"PATH": path, "PYTHONUNBUFFERED": "1", "AIS_TARGET_URL": self._target_url,
                "NUM_WORKERS": str(workers), "PORT": str(port)}

    def _copy_runtime(self, folder: Path, runtime: Optional[Path], with_bytecode: bool) -> None:
        """Copy a runtime to a folder of its own, once, and compile it there, as the image does."""
        if folder.exists():
            return
        assert runtime, "there is no other version to be measured"
        folder.mkdir()
        shutil.copy(runtime, folder / "ais_runtime_min.py")
        if with_bytecode:
            subprocess.run([self.python("slim"), "-m", "compileall", "-q", str(folder)], check=True)

    def _payload(self, peer: str, streaming: bool) -> str:
        """Return what the SDK's `serialize_class` makes of the class."""
        base = "ours-fastapi" if peer == "ours-fastapi" else "ours"
        if (base, streaming) not in self._payloads:
            script = self._folder / "pickled.py"  # run as a script, so that the class is pickled by value
            script.write_text(class_source(base, streaming) + TAILS["payload"])
            done = subprocess.run([self.python("sdk"), str(script)], stdout=subprocess.PIPE, universal_newlines=True, check=True)
            self._payloads[base, streaming] = done.stdout.split()[-1]
        return self._payloads[base, streaming]


# == Where direct puts go ==


def start_sink(place: Place) -> Server:
    """Start the node that direct puts go to; its count is at /count, the last body at /last."""
    folder = place.folder / "sink"
    folder.mkdir()
    port = free_port()
    python = str(place.environments / "sdk" / "bin" / "python")  # where uvloop and httptools are
    command = [python, str(Path(__file__).with_name("sink.py")), str(port), ETL_PATH]
    sink = Server("sink", command, {"PATH": os.environ.get("PATH", os.defpath)}, folder, port)
    try:
        sink.wait_until_healthy("/count")
    except BaseException:
        sink.kill()
        raise
    return sink
