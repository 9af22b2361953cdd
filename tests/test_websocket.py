"""WebSocket on the built-in server: frames, masks, handshakes, and messages of any size (RFC 6455).

Cases of single frames are in tests/frames/; everything is played to a running server over real
sockets. What AIStore makes of messages is in test_websocket_objects.py, how connections end in
test_websocket_connections.py.
"""
import contextlib
import os
import random
import re
import select
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

from ais_runtime_min import memory_limit
from echo import ECHO, served
from harness import Runtime, Server, children_of, make_payload
from peer import BINARY, CLOSE, PING, PONG, TEXT, Peer, frame, handshake, object_frames

StartRuntime = Callable[..., Runtime]
MIB = 1 << 20
SMALL_BYTES = 16 << 10  # of messages whose masks are undone without C


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    """A server whose class returns objects as they are."""
    with served(ECHO) as server:
        yield server


# == Cases of frames ==


OPCODES = {"continuation": 0, "text": TEXT, "binary": BINARY, "close": CLOSE, "ping": PING, "pong": PONG}
LINE = re.compile(r"(?P<name>[a-z]+[0-9]*)(?P<more>\+)?(?:/(?P<reserved>[0-7]))?(?P<bare>~)?(?P<exact>:)?(?: (?P<text>.*))?")


class Case(NamedTuple):
    """What a client sends, frame by frame, and what it must get."""

    name: str
    sends: List[bytes]
    answers: List[Tuple[int, bytes, bool]]  # of a close frame the code alone


def parts(line: str) -> Tuple["re.Match[str]", bytes]:
    """Take a frame's line apart, and read its payload."""
    match = LINE.fullmatch(line)
    assert match, line
    text = re.sub(r"\\\{([0-9]+) x ([^}]*)\}", lambda found: found[2] * int(found[1]), match["text"] or "")
    payload = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), text.encode("latin-1"))
    if match["name"] != "close" or match["exact"] or not payload:
        return match, payload
    code, _, reason = payload.partition(b" ")
    return match, int(code).to_bytes(2, "big") + reason


def read_frame(line: str) -> bytes:
    """Make what a line of a case sends."""
    if line == "control":
        return frame(BINARY, b'{"path": "o"}')
    match, payload = parts(line)
    if match["name"] == "raw":
        return payload
    opcode = int(match["name"][2:]) if match["name"].startswith("op") else OPCODES[match["name"]]
    return frame(opcode, payload, not match["more"], int(match["reserved"] or 0), None if match["bare"] else b"")


def cases() -> Iterator[Case]:
    """Read all files of cases."""
    for file in sorted(Path(__file__).resolve().with_name("frames").glob("*.frames")):
        for text in re.split("^== ", file.read_text(encoding="ascii"), flags=re.MULTILINE)[1:]:
            name, *lines = text.rstrip("\n").split("\n")
            middle = lines.index("answers:")
            must_come = [(OPCODES[match["name"]], payload, not match["more"])
                         for match, payload in map(parts, lines[middle + 1:])]
            yield Case(name, [read_frame(line) for line in lines[:middle]], must_come)


def ways_of(case: Case) -> Iterator[Tuple[str, List[bytes]]]:
    """Yield the ways of cutting what a case sends, the whole first."""
    data = b"".join(case.sends)
    dice = random.Random(case.name)
    cuts = sorted({0, len(data), *(dice.randrange(len(data) + 1) for _ in range(20))})
    yield "one piece", [data]
    yield "frames", case.sends
    if len(data) <= 2000:
        yield "bytes", [data[at:at + 1] for at in range(len(data))]
    yield "random pieces", [data[begin:end] for begin, end in zip(cuts, cuts[1:])]


def play(server: Server, pieces: List[bytes]) -> List[Any]:
    """Return the frames that come back for what is sent, and an error that ends them.

    Of a close frame only the code counts.
    """
    received: List[Any] = []
    try:
        with Peer(server, 10) as peer:
            # the server may have closed the connection before the last piece
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    peer.send(piece)
            for opcode, payload, is_last in iter(peer.receive, None):
                received.append((opcode, payload[:2] if opcode == CLOSE else payload, is_last))
    except (OSError, AssertionError) as error:
        received.append(error)
    return received


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name[:40])
def test_frames_are_answered_as_they_must_be(echo: Server, case: Case) -> None:
    last, answers = [], case.answers
    if not answers or answers[-1][0] != CLOSE:
        last, answers = [frame(CLOSE, b"\x03\xe8")], [*answers, (CLOSE, b"\x03\xe8", True)]
    for way, pieces in ways_of(case):
        assert play(echo, [*pieces, *last]) == answers, "%s, sent in %s" % (case.name, way)


# == Masks ==


ANYTHING = """
class Anything:
    __getattr__ = __call__ = lambda self, *args: self

__getattr__ = lambda name: Anything()
"""


@pytest.mark.parametrize("ctypes", [
    None, "raise ImportError('no libffi')", "CDLL = lambda name: None", ANYTHING,
], ids=["as it is", "missing", "without OpenSSL", "with an OpenSSL that does nothing"])
def test_masks_of_messages_of_any_size_are_undone_whatever_ctypes_there_is(
    start_runtime: StartRuntime, tmp_path: Path, ctypes: Optional[str]
) -> None:
    env = {"NUM_WORKERS": "1", "PYTHONPATH": str(tmp_path), "LOG_LEVEL": "DEBUG"}
    if ctypes is not None:
        (tmp_path / "ctypes.py").write_text(ctypes)
    server = start_runtime(make_payload(ECHO, "Echo"), env)
    dice = random.Random(3)
    boundaries = [SMALL_BYTES + more for more in range(-1, 9)]
    objects = [os.urandom(size) for size in (0, 1, 2, 3, 4, 5, *boundaries, 3 * MIB + 1)]
    ask = frame(BINARY, b'{"path": "o", "etl_args": "has ctypes"}')
    small = frame(BINARY, bytes(SMALL_BYTES)), frame(BINARY, bytes(SMALL_BYTES), False) + frame(0)
    with Peer(server) as peer:
        for each in small:  # only a message that is not small loads what undoes masks in C
            peer.send(ask, each)
            assert peer.result() == b"False"
        for each in objects:
            peer.send(object_frames(each, path="o"))
            assert peer.result() == each, "%d bytes" % len(each)
        fragments = b"".join(frame(0, each, is_last=False) for each in objects)
        data = object_frames(None, path="o") + frame(BINARY, is_last=False) + fragments + frame(0)
        cuts = [0, *sorted(dice.randrange(len(data)) for _ in range(50)), len(data)]
        for begin, end in zip(cuts, cuts[1:]):
            peer.send(data[begin:end])
        assert peer.result() == b"".join(objects)
        if ctypes is None:
            peer.send(ask, small[0])
            assert peer.result() == b"True"
        else:
            server.wait_for_line("large WebSocket messages are unmasked by numbers: ")


# == The handshake ==


REFUSED: List[Tuple[Dict[str, str], int, bytes]] = [
    ({"Upgrade": ""}, 426, b"upgrade: websocket"),
    ({"Upgrade": "h2c"}, 426, b"upgrade: websocket"),
    ({"Connection": ""}, 426, b"upgrade: websocket"),
    ({"Connection": "keep-alive"}, 426, b"upgrade: websocket"),
    ({"Connection": "Upgrade, close"}, 400, b""),
    ({"Sec_WebSocket_Version": ""}, 426, b"sec-websocket-version: 13"),
    ({"Sec_WebSocket_Version": "13, 8"}, 426, b"sec-websocket-version: 13"),
    ({"Sec_WebSocket_Key": ""}, 400, b""),
    ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400, b""),
    ({"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ="}, 400, b""),
    ({"Sec_WebSocket_Key": "!GhlIHNhbXBsZSBub25jZQ=="}, 400, b""),
    ({"Content_Length": "3"}, 400, b""),
    ({"Transfer_Encoding": "chunked"}, 400, b""),
]


def test_a_handshake_may_say_more_than_it_must_and_the_answer_is_that_of_the_rfc(
    echo: Server
) -> None:
    for fields in (
        {}, {"Upgrade": "WebSocket"}, {"Upgrade": "h2c, websocket"},
        {"Connection": "keep-alive, UPGRADE"}, {"Sec_WebSocket_Protocol": "chat"},
        {"Sec_WebSocket_Extensions": "permessage-deflate"},
    ):
        head = echo.raw(handshake(**fields), quiet=0.05)
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n"), (fields, head)
        lines = head.lower().split(b"\r\n")
        assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in lines
        assert b"upgrade: websocket" in lines and b"connection: upgrade" in lines
        unwanted = (b"content-length", b"sec-websocket-extensions", b"sec-websocket-protocol")
        assert not any(line.startswith(unwanted) for line in lines), fields


def test_what_is_no_handshake_is_refused(echo: Server) -> None:
    wrong = []
    for fields, status, field in REFUSED:
        body = {"Transfer_Encoding": b"0\r\n\r\n", "Content_Length": b"abc"}.get(*fields, b"")
        answer = echo.raw(handshake(**fields) + body, quiet=0.05)
        if not answer.startswith(b"HTTP/1.1 %d " % status) or field not in answer.lower():
            wrong.append((fields, answer))
    assert not wrong
    assert echo.raw(handshake().replace(b"GET", b"PUT"), quiet=0.05).startswith(b"HTTP/1.1 405 ")
    assert echo.raw(handshake().replace(b"HTTP/1.1", b"HTTP/1.0")).startswith(b"HTTP/1.1 400 ")
    assert echo.request("GET", "/ws").status == 426


def test_requests_before_a_handshake_are_answered_and_frames_right_behind_it_too(
    echo: Server
) -> None:
    before = b"PUT /bck/o HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    frames = object_frames(b"framed", path="o") + frame(CLOSE, b"\x03\xe8")
    answer = echo.raw(before + before + handshake() + frames, quiet=10)
    first, second, third = answer.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200 ") and second.startswith(b"200 ") and third.startswith(b"101 ")
    assert third.endswith(b"\r\n\r\n\x82\x06framed\x88\x02\x03\xe8")


# == Sizes ==


def peak_mib(pid: int) -> int:
    """Return the most memory that a process has had so far."""
    found = re.search(r"VmHWM:\s+([0-9]+) kB", Path("/proc/%d/status" % pid).read_text())
    assert found
    return int(found[1]) >> 10


def begin_object(size: int, fragments: int = 1, **control: str) -> bytes:
    """Make what announces an object of so many bytes: its only fragment, or the second of two.

    The mask is of zeros.
    """
    begin = object_frames(None, path="large", **control)
    opcode = 0x80 | BINARY
    if fragments > 1:
        begin += frame(BINARY, b"begin", is_last=False)
        opcode, size = 0x80, size - 5
    return begin + bytes([opcode, 0xFF]) + size.to_bytes(8, "big") + bytes(4)


@pytest.mark.parametrize("fragments, allowed_mib", [(1, 256), (8192, 288)])
def test_a_large_object_comes_whole_and_takes_no_more_than_its_size(
    start_runtime: StartRuntime, fragments: int, allowed_mib: int
) -> None:  # where the size is not known before, memory grows by an eighth
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    worker, = children_of(server.pid)
    before = peak_mib(worker)
    block, count = os.urandom(32 << 10), 8192
    checksum = 0
    for _ in range(count):
        checksum = zlib.crc32(block, checksum)
    with Peer(server) as peer:
        if fragments == 1:
            peer.send(begin_object(count * len(block), etl_args="checksum"))
        else:
            control = object_frames(None, path="o", etl_args="checksum")
            peer.send(control, frame(BINARY, is_last=False))
        for _ in range(count):
            peer.send(block if fragments == 1 else frame(0, block, is_last=False, mask=b"mask"))
        if fragments > 1:
            peer.send(frame(0))
        assert peer.result() == b"%d %08x" % (count * len(block), checksum)
    assert peak_mib(worker) - before < allowed_mib + 16


def test_sixteen_gibibytes_may_be_announced_and_take_no_memory_before_they_come(
    start_runtime: StartRuntime
) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    size = min(16 << 30, memory_limit())  # a smaller machine could never hold them
    worker, = children_of(server.pid)
    before = peak_mib(worker)
    with Peer(server) as whole, Peer(server) as fragmented, Peer(server) as small:
        whole.send(begin_object(size), bytes(MIB))
        fragmented.send(begin_object(size, 2), bytes(MIB))
        for _ in range(20):
            small.send(object_frames(b"x" * 100_000, path="small"))
            assert small.result() == b"x" * 100_000
        assert not select.select([whole.socket, fragmented.socket], [], [], 0.3)[0], "it is refused"
    assert peak_mib(worker) - before < 32


def test_more_than_the_memory_of_the_container_is_refused_when_it_is_announced(
    echo: Server
) -> None:
    size = memory_limit() + 1
    for fragments in (1, 2):
        with Peer(echo) as peer:
            peer.send(begin_object(size, fragments))
            code, reason = peer.break_reason()
        assert code == 1009
        assert "more bytes than the container's memory, %d" % memory_limit() in reason
