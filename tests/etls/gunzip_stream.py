"""Unpack gzip objects of any size in constant memory.

Try it:

    python3 ais_runtime_min.py serve tests/etls/gunzip_stream.py &
    echo hello | gzip | curl --data-binary @- -X PUT http://127.0.0.1:8000/bucket/greeting.gz    # hello
"""
import zlib
from typing import BinaryIO, Iterator

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class GunzipStream(HTTPMultiThreadedServer):
    """Transforms piece by piece: a piece is sent on before the next one is read."""

    PIECE_BYTES = 1 << 16

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        """Yield the unpacked object; `cat a.gz b.gz` is one gzip file too, so a member's end may not be the object's."""
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        packed = reader.read(self.PIECE_BYTES)
        while packed:
            if unpacker.eof:
                unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            yield unpacker.decompress(packed, self.PIECE_BYTES)
            packed = unpacker.unconsumed_tail or unpacker.unused_data or reader.read(self.PIECE_BYTES)
        if not unpacker.eof:
            raise ValueError("the gzip data end too early")
