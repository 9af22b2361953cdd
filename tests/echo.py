"""ETL classes that the WebSocket tests serve: an object's arguments tell what happens to it."""
import contextlib
from typing import Iterator

from harness import Runtime, make_payload
from peer import Peer

HEAD = '''
import os, sys, threading, time, zlib
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
'''
ECHO = HEAD + '''
class Echo(HTTPMultiThreadedServer):
    """Returns objects as they are; what the arguments tell happens before."""

    def transform(self, data, path, etl_args):
        word, _, rest = etl_args.partition(" ")
        return getattr(self, word)(rest, data, path) if word else data

    def touch(self, path, data, _):
        open(path, "w").close()
        return data

    def sleep(self, seconds, data, path):
        time.sleep(float(seconds))
        return data

    def wait(self, path, data, _):
        while not os.path.exists(path):
            time.sleep(0.01)
        return data

    def fill(self, size, data, path):
        return bytes(int(size))

    def fail(self, text, data, path):
        raise ValueError(text)

    def has(self, module, data, path):
        return str(module in sys.modules)

    def quote_target(self, _, data, path):
        raise ValueError("cannot reach " + self.host_target)

    def checksum(self, _, data, path):
        return "%d %08x" % (len(data), zlib.crc32(data))
'''
ECHO_ON_MAIN = ECHO.replace("Echo(HTTPMultiThreadedServer)", "Echo(FastAPIServer)")
STREAM = HEAD + '''
class Streamer(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        for piece in iter(lambda: reader.read(1000), b""):
            yield piece.upper()
        if etl_args == "fail":
            raise ValueError("half-way")
'''


@contextlib.contextmanager
def served(source: str, name: str = "Echo") -> Iterator[Runtime]:
    """Serve a class for a whole module, whose tests may have objects fail.

    One connection stays open, since the pod ends when failures have closed all.
    """
    env = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "NUM_WORKERS": "1"}
    with Runtime(env=env, expect_traceback=True) as server, Peer(server):
        yield server
