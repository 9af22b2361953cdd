"""A WebSocket client that can send anything (RFC 6455, section 5): it shares no code with the runtime, whose judge it is."""
import base64
import hashlib
import json
import os
from types import TracebackType
from typing import Iterator, List, NamedTuple, Optional, Tuple, Type

from harness import Server

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


class Frame(NamedTuple):
    """A frame that came; `is_last` is its FIN bit."""

    opcode: int
    payload: bytes
    is_last: bool = True


def frame(opcode: int, payload: bytes = b"", is_last: bool = True, reserved: int = 0, mask: Optional[bytes] = b"") -> bytes:
    """Make a client's frame; a mask of b"" is a random one, None leaves it out."""
    first = bytes([opcode | reserved << 4 | (0x80 if is_last else 0)])
    bit = 0 if mask is None else 0x80
    size = len(payload)
    if size < 126:
        head = first + bytes([bit | size])
    elif size < 1 << 16:
        head = first + bytes([bit | 126]) + size.to_bytes(2, "big")
    else:
        head = first + bytes([bit | 127]) + size.to_bytes(8, "big")
    if mask is None:
        return head + payload
    mask = mask or os.urandom(4)
    pad = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")


def object_frames(data: Optional[bytes], **control: str) -> bytes:
    """Make the messages of an object as a target sends them; without data its control message must name a file."""
    first = frame(BINARY, json.dumps(control).encode())
    return first if data is None else first + frame(BINARY, data)


def handshake(**fields: str) -> bytes:
    """Make a good handshake; fields are added, or taken out where they are empty; `_` in a name is `-`."""
    known = {"Host": "x", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
             "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    known.update({name.replace("_", "-"): value for name, value in fields.items()})
    lines = ["%s: %s\r\n" % field for field in known.items() if field[1]]
    return ("GET /ws HTTP/1.1\r\n%s\r\n" % "".join(lines)).encode()


class Peer:
    """One open connection to `/ws`; a context manager that closes it without a word, as a target does."""

    def __init__(self, server: Server, timeout: float = 30.0) -> None:
        self.socket = server.connect(timeout)
        key = base64.b64encode(os.urandom(16))
        self.socket.sendall(handshake(Sec_WebSocket_Key=key.decode()))
        self._ahead = b""
        head = self._read_head()
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        assert head.startswith(b"HTTP/1.1 101 ") and b"\r\nSec-WebSocket-Accept: %s\r\n" % accept in head, head

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        """Send frames, or any bytes."""
        self.socket.sendall(b"".join(frames))

    def receive(self) -> Optional[Frame]:
        """Return the next frame; None at the end of the connection, which must not come within one."""
        head = self._take(2)
        if not head:
            return None
        assert not head[0] & 0x70 and not head[1] & 0x80, "reserved bits or a mask: %r" % head
        size = head[1]
        if size > 125:
            least = 126 if size == 126 else 1 << 16
            size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
            assert size >= least, "%d takes fewer bytes" % size
        payload = self._take(size)
        assert len(payload) == size, "the connection ends within a frame"
        return Frame(head[0] & 15, payload, head[0] > 127)

    def objects(self, count: int) -> List[Frame]:
        """Return the next frames, as many as there must be."""
        frames = [self.receive() for _ in range(count)]
        assert None not in frames, frames
        return [each for each in frames if each]

    def result(self) -> bytes:
        """Return the next frame's payload, which must be a result."""
        got = self.receive()
        assert got and (got.opcode, got.is_last) == (BINARY, True), got
        return got.payload

    def rest(self) -> List[Frame]:
        """Return all frames that come until the connection ends."""
        return list(self._frames())

    def break_reason(self) -> Tuple[int, str]:
        """Return code and reason of a break: an empty first fragment, a close frame, the end of the connection."""
        first, last = self.rest()
        assert first == Frame(BINARY, b"", False), first
        assert last.opcode == CLOSE
        return int.from_bytes(last.payload[:2], "big"), last.payload[2:].decode()

    def _frames(self) -> Iterator[Frame]:
        while True:
            got = self.receive()
            if got is None:
                return
            yield got

    def _read_head(self) -> bytes:
        while b"\r\n\r\n" not in self._ahead:
            piece = self.socket.recv(1 << 16)
            assert piece, self._ahead
            self._ahead += piece
        head, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        return head + b"\r\n"

    def _take(self, count: int) -> bytes:
        """Return so many bytes, or fewer at the end of the connection."""
        pieces = [self._ahead[:count]]
        self._ahead = self._ahead[count:]
        missing = count - len(pieces[0])
        while missing:
            piece = self.socket.recv(min(missing, 1 << 20))
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)
