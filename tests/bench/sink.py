"""The node that direct puts go to: reads each body whole, answers 200 at once, and counts. A program of its own.

`python sink.py PORT PATH` takes PUTs to `PATH` and anything below; any other is answered 404. `GET /count` tells
"objects bytes" so far, `GET /last` returns the last body. uvloop and httptools make it several times faster than those who
deliver to it, so that it does not set the pace.
"""
import asyncio
import sys
from typing import List, Sequence, cast

import httptools
import uvloop


class Count:
    """What has arrived whole, on all connections."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.objects = 0
        self.bytes = 0
        self.last: List[bytes] = []  # the pieces of the last body, not joined until somebody asks


class SinkProtocol(asyncio.Protocol):
    """One connection; the methods without underscores are called by the loop and by the parser."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._pieces: List[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its name

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is no HTTP ends the connection by the exception."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """Forget the last request of this connection."""
        self._url, self._pieces = b"", []

    def on_url(self, url: bytes) -> None:
        """Take the target, which may come in pieces."""
        self._url += url

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """Count the object, and answer."""
        if self._parser.get_method() == b"GET":
            self._answer(b"200 OK", self._tell())
        elif self._url.startswith(self._count.path):
            self._count.objects += 1
            self._count.bytes += sum(map(len, self._pieces))
            self._count.last = self._pieces
            self._answer(b"200 OK", b"")
        else:
            self._answer(b"404 Not Found", b"nobody delivers to " + self._url)

    def _tell(self) -> bytes:
        if self._url == b"/last":
            return b"".join(self._count.last)
        return b"%d %d" % (self._count.objects, self._count.bytes)

    def _answer(self, status: bytes, body: bytes) -> None:
        self._transport.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))


async def serve(port: int, path: bytes) -> None:
    """Serve until the process is ended."""
    count = Count(path)
    server = await asyncio.get_running_loop().create_server(lambda: SinkProtocol(count), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main(argv: Sequence[str]) -> None:
    """Serve on the port and the path that the arguments say."""
    uvloop.install()
    asyncio.run(serve(int(argv[0]), argv[1].encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
