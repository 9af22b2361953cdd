"""WebSocket on the built-in server: the frames of RFC 6455, AIStore's protocol of objects, failures, and the pod's end.

Cases of single frames are in tests/frames/; everything is played to a running server over real sockets.
"""
import asyncio
import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple
from urllib.parse import quote

import pytest
from websockets.asyncio.client import connect
from websockets.sync.client import connect as connect_sync

from ais_runtime_min import (DRAIN_SECONDS, FORSAKEN_SECONDS, UNMASK_BYTES, WEBSOCKET_LIMIT, Unmasking, memory_limit, unmask,
                             unmask_by_numbers, unmasking_by_openssl)
from harness import Runtime, Server, children_of, make_payload
from peer import BINARY, CLOSE, PING, PONG, TEXT, Frame, Peer, frame, handshake, object_frames
from standin import At, Behaviour, StandInTarget

StartRuntime = Callable[..., Runtime]
FRAMES = Path(__file__).resolve().parent / "frames"
MIB = 1 << 20
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

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

    def sleep(self, seconds, data, path):
        time.sleep(float(seconds))
        return data

    def wait(self, path, data, _):
        while not os.path.exists(path):
            time.sleep(0.01)
        return data

    def fill(self, size, data, path):
        return bytes(int(size))

    def die(self, _, data, path):
        os._exit(3)

    def fail(self, text, data, path):
        raise ValueError(text)

    def has(self, module, data, path):
        return str(module in sys.modules)

    def quote_target(self, _, data, path):
        raise ValueError("cannot reach " + self.host_target)

    def tell(self, _, data, path):
        return "%s %s %d" % (type(data).__name__, path, os.getpid())

    def checksum(self, _, data, path):
        return "%d %08x %d" % (len(data), zlib.crc32(data), os.getpid())
'''
BASES = '''
class %(base)sTeller(%(base)s):
    def transform(self, data, path, etl_args):
        where = "main" if threading.current_thread() is threading.main_thread() else "another"
        return "%%s|%%s|%%s" %% (path, etl_args, where)
'''
STREAM = HEAD + '''
class Streamer(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        for piece in iter(lambda: reader.read(1000), b""):
            yield piece.upper()
        if etl_args == "fail":
            raise ValueError("half-way")
'''
BUSY = HEAD + '''
class Busy(HTTPMultiThreadedServer):
    """Tells how many objects were being transformed at once, at most, so far."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.now = self.most = 0

    def transform(self, data, path, etl_args):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(float(etl_args))
        with self.lock:
            self.now -= 1
        return b"%s %d" % (data, self.most)
'''


# == Cases of frames ==


OPCODES = {"continuation": 0, "text": TEXT, "binary": BINARY, "close": CLOSE, "ping": PING, "pong": PONG}
LINE = re.compile(r"(?P<name>[a-z]+[0-9]*)(?P<more>\+)?(?:/(?P<reserved>[0-7]))?(?P<bare>~)?(?P<exact>:)?(?: (?P<text>.*))?")


class Case(NamedTuple):
    """What a client sends, frame by frame, and what it must get."""

    name: str
    sends: List[bytes]
    answers: List[Tuple[int, bytes, bool]]  # of a close frame the code alone


def unescape(text: str) -> bytes:
    """Read a payload."""
    text = re.sub(r"\\\{([0-9]+) x ([^}]*)\}", lambda match: match[2] * int(match[1]), text)
    return re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode("latin-1"))


def payload_of(match: "re.Match[str]") -> bytes:
    """Read the payload of a frame's line."""
    payload = unescape(match["text"] or "")
    if match["name"] != "close" or match["exact"] or not payload:
        return payload
    code, _, reason = payload.partition(b" ")
    return int(code).to_bytes(2, "big") + reason


def read_frame(line: str) -> bytes:
    """Make what a line of a case sends."""
    if line == "control":
        return frame(BINARY, b'{"path": "o"}')
    match = LINE.fullmatch(line)
    assert match, line
    if match["name"] == "raw":
        return unescape(match["text"])
    opcode = int(match["name"][2:]) if match["name"].startswith("op") else OPCODES[match["name"]]
    return frame(opcode, payload_of(match), not match["more"], int(match["reserved"] or 0), None if match["bare"] else b"")


def read_answer(line: str) -> Tuple[int, bytes, bool]:
    """Read what must come back."""
    match = LINE.fullmatch(line)
    assert match, line
    return OPCODES[match["name"]], payload_of(match), not match["more"]


def cases() -> Iterator[Case]:
    """Read all files of cases."""
    for file in sorted(FRAMES.glob("*.frames")):
        for text in re.split("^== ", file.read_text(encoding="ascii"), flags=re.MULTILINE)[1:]:
            name, *lines = text.rstrip("\n").split("\n")
            middle = lines.index("answers:")
            yield Case(name, [read_frame(line) for line in lines[:middle]], [read_answer(line) for line in lines[middle + 1:]])


CASES = list(cases())


def pieces_of(case: Case, how: str) -> List[bytes]:
    """Cut what a case sends."""
    data = b"".join(case.sends)
    if how == "frames":
        return case.sends
    if how == "bytes" and len(data) <= 2000:
        return [data[at:at + 1] for at in range(len(data))]
    if how == "whole":
        return [data]
    dice = random.Random(case.name)
    cuts = sorted({0, len(data), *(dice.randrange(len(data) + 1) for _ in range(20))})
    return [data[begin:end] for begin, end in zip(cuts, cuts[1:])]


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    """A server whose class returns objects as they are, for the tests that leave it as it was."""
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(ECHO, "Echo"), "NUM_WORKERS": "1"}) as server:
        with Peer(server):  # so that failures leave one connection, and the pod lives
            yield server


@pytest.mark.parametrize("how", ["whole", "frames", "bytes", "pieces"])
@pytest.mark.parametrize("case", CASES, ids=[case.name[:40] for case in CASES])
def test_frames_are_answered_as_they_must_be(echo: Server, case: Case, how: str) -> None:
    with Peer(echo) as peer:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server may have closed before the end
            for piece in pieces_of(case, how):
                peer.send(piece)
            if not case.answers or case.answers[-1][0] != CLOSE:
                peer.send(frame(CLOSE, b"\x03\xe8"))
        got = [(each.opcode, each.payload[:2] if each.opcode == CLOSE else each.payload, each.is_last) for each in peer.rest()]
    closing = [] if case.answers and case.answers[-1][0] == CLOSE else [(CLOSE, b"\x03\xe8", True)]
    assert got == [*((opcode, payload[:2] if opcode == CLOSE else payload, last) for opcode, payload, last in case.answers),
                   *closing]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, UNMASK_BYTES - 1, UNMASK_BYTES, UNMASK_BYTES + 1, 3 * UNMASK_BYTES + 7])
def test_a_mask_is_undone_whatever_the_size_of_the_pieces(size: int) -> None:
    data, mask = os.urandom(size), os.urandom(4)
    expected = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    for cut in {0, 1, size // 3, size}:
        buffer = memoryview(bytearray(data))
        rest = unmask(buffer[:cut], mask)
        unmask(buffer[cut:], rest)
        assert bytes(buffer) == expected


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, UNMASK_BYTES + 5, MIB - 1])
@pytest.mark.parametrize("make", [unmasking_by_openssl, lambda: unmask_by_numbers], ids=["openssl", "numbers"])
def test_a_mask_is_undone_in_its_place_wherever_that_begins(make: Callable[[], Unmasking], size: int) -> None:
    data, mask = os.urandom(size), os.urandom(4)
    expected = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    for start in range(9):
        buffer = bytearray(start) + data + b"after"
        make()(memoryview(buffer)[start:start + size], mask)
        assert buffer == bytes(start) + expected + b"after"


def test_only_a_message_that_is_not_small_loads_what_undoes_masks_in_c(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        for size, is_loaded in ((UNMASK_BYTES, b"False"), (UNMASK_BYTES + 1, b"True")):
            peer.send(object_frames(bytes(size), path="o", etl_args="has ctypes"))
            assert peer.result() == is_loaded


@pytest.mark.parametrize("source", ["raise ImportError('no libffi')", "", "CDLL = lambda name: None"])
def test_large_messages_are_unmasked_without_ctypes_too(start_runtime: StartRuntime, tmp_path: Path, source: str) -> None:
    (tmp_path / "ctypes.py").write_text(source)
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1", "PYTHONPATH": str(tmp_path), "LOG_LEVEL": "DEBUG"})
    objects = [os.urandom(size) for size in (UNMASK_BYTES + 1, MIB, 3 * MIB + 1)]
    with Peer(server) as peer:
        for each in objects:
            peer.send(object_frames(each, path="o"))
            assert peer.result() == each
    server.wait_for_line("large WebSocket messages are unmasked by numbers: ")


# == The handshake ==


def test_the_answer_to_a_handshake_is_that_of_the_rfc(echo: Server) -> None:
    head = echo.raw(handshake(), quiet=0.2)
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    lines = head.lower().split(b"\r\n")
    assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in lines
    assert b"upgrade: websocket" in lines and b"connection: upgrade" in lines
    assert not any(line.startswith((b"content-length", b"sec-websocket-extensions", b"sec-websocket-protocol")) for line in lines)


@pytest.mark.parametrize("fields", [
    {"Upgrade": "WebSocket"}, {"Connection": "keep-alive, UPGRADE"}, {"Upgrade": "h2c, websocket"},
    {"Sec_WebSocket_Extensions": "permessage-deflate"}, {"Sec_WebSocket_Protocol": "chat"}, {"Origin": "http://x"},
])
def test_a_handshake_may_say_more_than_it_must(echo: Server, fields: Dict[str, str]) -> None:
    assert echo.raw(handshake(**fields), quiet=0.2).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("fields, status, field", [
    ({"Upgrade": ""}, 426, b"upgrade: websocket"),
    ({"Upgrade": "h2c"}, 426, b"upgrade: websocket"),
    ({"Connection": ""}, 426, b"upgrade: websocket"),
    ({"Connection": "keep-alive"}, 426, b"upgrade: websocket"),
    ({"Connection": "Upgrade, close"}, 400, b""),
    ({"Sec_WebSocket_Version": ""}, 426, b"sec-websocket-version: 13"),
    ({"Sec_WebSocket_Version": "8"}, 426, b"sec-websocket-version: 13"),
    ({"Sec_WebSocket_Version": "13, 8"}, 426, b"sec-websocket-version: 13"),
    ({"Sec_WebSocket_Key": ""}, 400, b""),
    ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400, b""),
    ({"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ="}, 400, b""),
    ({"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==="}, 400, b""),
    ({"Sec_WebSocket_Key": "!GhlIHNhbXBsZSBub25jZQ=="}, 400, b""),
    ({"Content_Length": "3"}, 400, b""),
    ({"Transfer_Encoding": "chunked"}, 400, b""),
])
def test_what_is_no_handshake_is_refused(echo: Server, fields: Dict[str, str], status: int, field: bytes) -> None:
    body = b"0\r\n\r\n" if "Transfer_Encoding" in fields else b"abc" if "Content_Length" in fields else b""
    answer = echo.raw(handshake(**fields) + body)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert field in answer.lower()


def test_a_handshake_is_a_get_of_http_1_1(echo: Server) -> None:
    assert echo.raw(handshake().replace(b"GET", b"PUT")).startswith(b"HTTP/1.1 405 ")
    assert echo.raw(handshake().replace(b"HTTP/1.1", b"HTTP/1.0")).startswith(b"HTTP/1.1 400 ")
    assert echo.request("GET", "/ws").status == 426


def test_requests_before_a_handshake_are_answered_and_frames_right_behind_it_too(echo: Server) -> None:
    before = b"PUT /bck/o HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    answer = echo.raw(before + before + handshake() + object_frames(b"framed", path="o"))
    first, second, third = answer.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200 ") and second.startswith(b"200 ") and third.startswith(b"101 ")
    assert third.endswith(b"\r\n\r\n\x82\x06framed")


def test_open_connections_leave_threads_to_requests() -> None:
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(ECHO, "Echo"), "NUM_WORKERS": "1"}) as server:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(Peer(server)) for _ in range(WEBSOCKET_LIMIT)]
            assert server.raw(handshake()).startswith(b"HTTP/1.1 503 ")
            assert server.request("GET", "/health").body == b"Running"
            assert server.request("PUT", "/bck/o", b"hello").body == b"hello"
            for peer in (peers[0], peers[-1]):
                peer.send(object_frames(b"still here", path="o"))
                assert peer.result() == b"still here"


# == Objects ==


def test_the_real_client_gets_ten_thousand_objects_each_way_in_their_order(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "2"})
    connections, objects = 64, 10_000
    dice = random.Random(7)
    samples = [dice.randbytes(size) if hasattr(dice, "randbytes") else os.urandom(size)
               for size in (0, 1, 100, 125, 126, 1000, 5000, 65535, 70000)]

    async def talk(number: int) -> int:
        wanted = [b"%d %d " % (number, each) + samples[(number + each) % len(samples)]
                  for each in range(number, objects, connections)]
        async with connect(server.url.replace("http", "ws") + "/ws", max_size=None) as websocket:
            async def send() -> None:
                for each in wanted:
                    await websocket.send(json.dumps({"path": "o"}).encode())
                    await websocket.send(each)

            sending = asyncio.ensure_future(send())
            for each in wanted:
                assert await websocket.recv() == each
            await sending
        return len(wanted)

    async def talk_all() -> List[int]:
        return await asyncio.gather(*(talk(number) for number in range(connections)))

    assert sum(asyncio.run(talk_all())) == objects


def peak_mib(pid: int) -> int:
    """Return the most memory that a process has had so far."""
    found = re.search(r"VmHWM:\s+([0-9]+) kB", Path("/proc/%d/status" % pid).read_text())
    assert found
    return int(found[1]) >> 10


@ON_LINUX
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fragments", [1, 10_000])
def test_a_gibibyte_comes_whole_and_takes_no_more_than_its_size(start_runtime: StartRuntime, fragments: int) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    block = os.urandom(1 << 14)
    size, piece = 1 << 30, (1 << 30) // fragments
    import zlib
    checksum = 0
    for _ in range(size // len(block)):
        checksum = zlib.crc32(block, checksum)
    data = block * (size // len(block))
    with connect_sync(server.url.replace("http", "ws") + "/ws", max_size=None, compression=None) as websocket:
        websocket.send(json.dumps({"path": "o", "etl_args": "checksum"}).encode())
        if fragments == 1:
            websocket.send(data)
        else:
            websocket.send(data[at:at + piece] for at in range(0, size, piece))
        length, crc, pid = bytes(websocket.recv()).split()
    assert (int(length), int(crc, 16)) == (size, checksum)
    assert peak_mib(int(pid)) < (1024 if fragments == 1 else 1152) + 100  # a size that is not known takes an eighth more


def announcement(opcode: int, size: int, is_last: bool = True) -> bytes:
    """Make the head of a frame that is to have so many bytes; its mask is of zeros."""
    return bytes([opcode | (0x80 if is_last else 0), 0xFF]) + size.to_bytes(8, "big") + bytes(4)


@ON_LINUX
@pytest.mark.parametrize("fragments", [1, 2])
def test_sixteen_gibibytes_may_be_announced_and_take_no_memory_before_they_come(
    start_runtime: StartRuntime, fragments: int
) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    size = min(16 << 30, memory_limit())  # a smaller machine could never hold them
    worker = children_of(server.pid)[0]
    before = peak_mib(worker)
    with Peer(server) as large, Peer(server) as small:
        large.send(frame(BINARY, b'{"path": "large"}'))
        if fragments == 1:
            large.send(announcement(BINARY, size), bytes(MIB))
        else:
            large.send(frame(BINARY, b"begin", is_last=False), announcement(0, size - 5), bytes(MIB))
        for _ in range(20):
            small.send(object_frames(b"x" * 100_000, path="small"))
            assert small.result() == b"x" * 100_000
        assert not select.select([large.socket], [], [], 0.5)[0], "it is refused"
    assert peak_mib(worker) - before < 32


@ON_LINUX
@pytest.mark.parametrize("fragments", [1, 2])
def test_more_than_the_memory_of_the_container_is_refused_when_it_is_announced(failing: Runtime, fragments: int) -> None:
    size = memory_limit() + 1
    with Peer(failing) as peer:
        peer.send(frame(BINARY, b'{"path": "huge"}'))
        if fragments == 1:
            peer.send(announcement(BINARY, size))
        else:
            peer.send(frame(BINARY, b"begin", is_last=False), announcement(0, size - 5))
        code, reason = peer.break_reason()
    assert code == 1009
    assert "%d bytes" % size in reason and "memory" in reason


def test_the_real_client_may_ping_between_fragments(echo: Server) -> None:
    with connect_sync(echo.url.replace("http", "ws") + "/ws") as websocket:
        def fragments() -> Iterator[bytes]:
            for number in range(5):
                yield b"%d" % number
                websocket.ping()

        websocket.send(b'{"path": "o"}')
        websocket.send(fragments())
        assert websocket.recv() == b"01234"
        assert websocket.ping().wait(10)


@pytest.mark.parametrize("base, path, thread", [
    ("HTTPMultiThreadedServer", "dir/a%20b c", "another"), ("FastAPIServer", "dir/a%20b c", "main"),
    ("FlaskServer", "dir/a%20b c", "main")])
def test_the_path_is_what_the_control_message_says_for_every_base(
        start_runtime: StartRuntime, base: str, path: str, thread: str) -> None:
    server = start_runtime(make_payload(HEAD + BASES % {"base": base}, base + "Teller"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(object_frames(b"", path=path, etl_args=" a=1&b "))
        assert peer.result().decode() == "%s|a=1&b|%s" % (path, thread)
        peer.send(object_frames(b""))
        assert peer.result().decode() == "||" + thread


def object_file(folder: Path, content: bytes) -> Path:
    """Put an object where AIStore would have it."""
    file = folder / "@ais" / "bck" / "%ob" / "a dir" / "obj?+%41"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("size", [0, 1000, 3 * MIB])
def test_an_object_is_read_by_its_path(echo: Server, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    with Peer(echo) as peer:
        peer.send(object_frames(None, path="a dir/obj", fqn=quote(str(object_file(tmp_path, content)), safe="")) * 3)
        assert [peer.result() for _ in range(3)] == [content] * 3


def test_a_class_that_wants_paths_gets_them(start_runtime: StartRuntime, tmp_path: Path) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1", "ETL_DIRECT_FQN": "true"})
    file = object_file(tmp_path, b"content")
    with Peer(server) as peer:
        peer.send(object_frames(None, path="o", fqn=quote(str(file), safe="")), object_frames(b"content", path="o"))
        assert [peer.result() for _ in range(2)] == [str(file).encode(), b"content"]


@pytest.mark.parametrize("size", [0, 999, 300_000])
def test_a_stream_is_collected(start_runtime: StartRuntime, size: int) -> None:
    server = start_runtime(make_payload(STREAM, "Streamer"), {"NUM_WORKERS": "1"}, expect_traceback=True)
    with Peer(server) as peer:
        peer.send(object_frames(b"a" * size, path="o"))
        assert peer.result() == b"A" * size
        peer.send(object_frames(b"a" * size, path="o", etl_args="fail"))
        assert peer.break_reason() == (1011, "Processing error: half-way")


def test_slow_objects_of_a_connection_are_transformed_at_once_and_answered_in_order(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(BUSY, "Busy"), {"NUM_WORKERS": "1", "NUM_THREADS": "8"})
    delays = [0.02 + 0.04 * random.Random(5).random() for _ in range(200)]
    with Peer(server) as peer:
        for number, delay in enumerate(delays):
            peer.send(object_frames(b"%d" % number, path="o", etl_args="%f" % delay))
        results = [peer.result().split() for _ in delays]
        assert [int(number) for number, _ in results] == list(range(len(delays)))
        assert 2 <= int(results[-1][1]) <= 8
        peer.send(object_frames(b"slow", path="o", etl_args="0.5"), frame(PING, b"meanwhile"))
        assert [each.opcode for each in peer.objects(2)] == [PONG, BINARY]


@pytest.mark.parametrize("base", ["HTTPMultiThreadedServer", "FastAPIServer"])
@pytest.mark.parametrize("before", [0, 3, 300])
def test_an_object_that_takes_long_holds_up_neither_replies_before_it_nor_what_is_sent_behind_it(
        start_runtime: StartRuntime, tmp_path: Path, base: str, before: int) -> None:
    source = ECHO.replace("Echo(HTTPMultiThreadedServer)", "Echo(%s)" % base)
    server = start_runtime(make_payload(source, "Echo"), {"NUM_WORKERS": "1"})
    gate = tmp_path / "gate"
    with Peer(server) as peer, Peer(server) as other:
        quick = [object_frames(b"%d" % number, path="o") for number in range(before)]
        results = [b"%d" % number for number in range(before)]
        for is_first in (True, False, False):  # later objects are handed over from the first, and may be transformed in any order
            peer.send(*quick)
            received = [] if is_first else [peer.result() for _ in results]
            peer.send(object_frames(b"held up", path="o", etl_args="wait %s" % gate), object_frames(b"behind", path="o"))
            assert (received or [peer.result() for _ in results]) == results
            peer.send(frame(PING, b"still there?"))
            assert peer.receive() == Frame(PONG, b"still there?")
            other.send(frame(PING, b"you too?"), object_frames(b"", path="o", etl_args="fill 5"))
            assert other.receive() == Frame(PONG, b"you too?")
            few = [b"%d" % number for number in range(20)]
            peer.send(object_frames(bytes(12 * MIB), path="o"), *(object_frames(each, path="o") for each in few))
            gate.touch()
            assert [peer.result() for _ in range(2)] == [b"held up", b"behind"]
            assert peer.result() == bytes(12 * MIB)
            assert [peer.result() for _ in few] == few
            assert other.result() == bytes(5)
            gate.unlink()
            time.sleep(1.1)  # longer than objects are handed over after that


def hold_up(peer: Peer, gate: Path) -> None:
    """Have an object hold up a connection until the gate is there, and another thread read on."""
    peer.send(object_frames(b"held up", path="o", etl_args="wait %s" % gate), frame(PING, b"still there?"))
    assert peer.receive() == Frame(PONG, b"still there?")


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_head_that_has_begun_to_come_when_an_object_ends_is_read_whole(
        start_runtime: StartRuntime, tmp_path: Path, cut: int) -> None:
    gate = tmp_path / "gate"
    with Peer(start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})) as peer:
        hold_up(peer, gate)
        frames = object_frames(b"behind" * 100, path="o")
        peer.send(frames[:cut])
        time.sleep(0.05)  # so that it is read before the object ends; else the test passes for nothing
        gate.touch()
        assert peer.result() == b"held up"
        time.sleep(0.05)  # likewise, so that the thread of the connection has its reading back
        peer.send(frames[cut:])
        assert peer.result() == b"behind" * 100


def test_results_that_are_small_make_room_for_more_objects_behind_one_that_takes_long(
        start_runtime: StartRuntime, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Peer(start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})) as peer:
        hold_up(peer, gate)
        peer.send(object_frames(bytes(20 * MIB), path="o", etl_args="checksum"), object_frames(b"behind", path="o"),
                  frame(PING, b"goes on?"))
        assert peer.receive() == Frame(PONG, b"goes on?")
        gate.touch()
        assert [peer.result()[:8] for _ in range(3)] == [b"held up", b"20971520", b"behind"]


def test_clients_that_do_not_read_hold_up_no_other(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Peer(server))
        reader.send(object_frames(b"", path="o", etl_args="sleep 1"))  # from now on objects are handed over
        assert reader.result() == b""
        for _ in range(80):
            silent = stack.enter_context(Peer(server))
            silent.send(object_frames(b"", path="o", etl_args="fill %d" % (4 * MIB)))
            assert select.select([silent.socket], [], [], 30)[0], "a result has not begun to come"
        reader.send(object_frames(b"hello", path="o"))
        assert reader.result() == b"hello"


def test_a_client_may_send_all_before_it_reads(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(*(object_frames(b"%d" % number, path="o") for number in range(2000)))
        peer.socket.shutdown(socket.SHUT_WR)
        assert [each.payload for each in peer.rest()] == [b"%d" % number for number in range(2000)]


# == Objects for the main thread, which takes several at a time ==

FINAL = "/ais%2F@%23%2Fdst%2Fobj?uuid=x&owt=0"
LOM_OF_A_GIB = b"\x01\x01" + bytes(8) + b"\x00\x03" + (1 << 30).to_bytes(8, "big")  # AIStore's attribute of a file
ECHO_ON_MAIN = ECHO.replace("Echo(HTTPMultiThreadedServer)", "Echo(FastAPIServer)")


@pytest.fixture
def on_main(start_runtime: StartRuntime) -> Runtime:
    """One worker whose class is called on the main thread alone."""
    return start_runtime(make_payload(ECHO_ON_MAIN, "Echo"), {"NUM_WORKERS": "1"}, expect_traceback=True)


def test_objects_of_all_sizes_for_the_main_thread_are_answered_in_order(on_main: Runtime, target: StandInTarget) -> None:
    sizes = [0, 10, 1000, UNMASK_BYTES, UNMASK_BYTES + 1, MIB, 100000] * 30
    objects = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
    with Peer(on_main) as peer, ThreadPoolExecutor(1) as sender:
        sending = sender.submit(peer.send, *(object_frames(each, path="o") for each in objects))
        assert all(peer.result() == each for each in objects)
        sending.result()
        peer.send(*(object_frames(b"%d" % number, path="o", etl_args="sleep 0.01") for number in range(50)),
                  *(object_frames(b"%d" % number, path="o", pipeline=target.root + FINAL) for number in range(20)),
                  *(object_frames(b"%d" % number, path="o") for number in range(50)))
        answers = [each.payload for each in peer.objects(120)]
        assert answers[:50] == answers[70:] == [b"%d" % number for number in range(50)]
        assert answers[50:70] == [b"%d" % len(str(number)) for number in range(20)]


def test_objects_by_path_and_by_message_for_the_main_thread_are_answered_in_order(on_main: Runtime, tmp_path: Path) -> None:
    small, large = (object_file(tmp_path / str(size), os.urandom(size)) for size in (1000, MIB))
    small_path, large_path, none_path = (quote(str(path), safe="") for path in (small, large, small.with_name("none")))
    with Peer(on_main) as peer:
        for _ in range(5):
            peer.send(*[object_frames(b"%d" % number, path="o") for number in range(10)],
                      *[object_frames(None, path="o", fqn=small_path)] * 10,
                      object_frames(None, path="o", fqn=large_path), object_frames(b"last", path="o"))
            assert [peer.result() for _ in range(10)] == [b"%d" % number for number in range(10)]
            assert [peer.result() for _ in range(12)] == [small.read_bytes()] * 10 + [large.read_bytes(), b"last"]
        peer.send(object_frames(None, path="o", fqn=small_path), object_frames(None, path="o", fqn=none_path))
        assert peer.result() == small.read_bytes()
        assert peer.break_reason() == (1011, "the object's file is not there")


def test_a_target_that_is_silent_keeps_no_connection_from_the_main_thread(start_runtime: StartRuntime, tmp_path: Path) -> None:
    chunk = object_file(tmp_path, b"the first chunk")
    try:
        os.setxattr(str(chunk), "user.ais.lom", LOM_OF_A_GIB)
    except (OSError, AttributeError):
        pytest.skip("the file system here has no attributes of users")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d/v1/etl/x" % silent.getsockname()[1]
        server = start_runtime(make_payload(ECHO_ON_MAIN, "Echo"), {"NUM_WORKERS": "1", "AIS_TARGET_URL": url})
        with Peer(server) as waiting, Peer(server) as other:
            waiting.send(object_frames(None, path="o", fqn=quote(str(chunk), safe="")))
            assert select.select([silent], [], [], 30)[0]  # it is asked for the whole object
            other.send(object_frames(b"hello", path="o"))
            assert other.result() == b"hello"
            assert server.request("PUT", "/bucket/object", b"plain").body == b"plain"


def test_the_main_thread_answers_what_came_before_half_an_object(on_main: Runtime) -> None:
    with Peer(on_main) as peer:
        half = object_frames(b"the rest comes later", path="o")
        for end in range(1, len(half)):
            peer.send(object_frames(b"first", path="o"), object_frames(b"second", path="o"), half[:end])
            assert [peer.result(), peer.result()] == [b"first", b"second"]
            peer.send(half[end:])
            assert peer.result() == b"the rest comes later"


def test_objects_behind_one_that_fails_on_the_main_thread_are_not_answered(on_main: Runtime) -> None:
    with Peer(on_main) as peer:
        good = [object_frames(b"%d" % number, path="o") for number in range(20)]
        peer.send(*good, object_frames(b"", path="o", etl_args="fail on purpose"), *good)
        assert [peer.result() for _ in good] == [b"%d" % number for number in range(20)]
        assert peer.break_reason() == (1011, "Processing error: on purpose")


# == Deliveries ==


def test_a_direct_put_is_told_by_its_length(start_runtime: StartRuntime, target: StandInTarget) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        for content in (b"content", b"", b"x" * MIB):
            peer.send(object_frames(content, path="obj", pipeline=target.root + FINAL))
            assert peer.receive() == Frame(TEXT, b"%d" % len(content))
            assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == content


@pytest.mark.parametrize("content", [b"content", b"", b"y" * MIB])
def test_what_a_stage_passes_back_is_the_result(
        start_runtime: StartRuntime, target: StandInTarget, content: bytes) -> None:
    stage = start_runtime(make_payload(STREAM, "Streamer"), {"NUM_WORKERS": "1"})
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(object_frames(content, path="dir/a b", pipeline=stage.url))
        assert peer.result() == content.upper()
        peer.send(object_frames(content, path="dir/a b", pipeline="%s,%s" % (stage.url, target.root + FINAL)))
        got = peer.receive()
        assert got and got.opcode == TEXT
        assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == content.upper()


def test_a_stage_is_asked_for_the_object_by_its_name(start_runtime: StartRuntime, target: StandInTarget) -> None:
    target.default = Behaviour(status=200, body=b"staged")
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(object_frames(b"x", path="dir/a b%20c", etl_args="sleep 0", pipeline=target.root + ", http://t2:51081/obj"))
        assert peer.result() == b"staged"
    (request,) = target.wait_for_requests(1)
    assert request.target == "/dir/a%20b%2520c?etl_args=sleep%200"
    assert request.headers["ais-node-url"] == "http://t2:51081/obj"


def test_a_delivery_that_is_lost_is_tried_again(start_runtime: StartRuntime, target: StandInTarget) -> None:
    target.script.append(Behaviour(cut=At.AFTER_BODY))
    target.script.append(Behaviour(cut=At.AFTER_BODY))
    server = start_runtime(make_payload(STREAM, "Streamer"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(object_frames(b"abc", path="obj", pipeline=target.root + FINAL))
        assert peer.receive() == Frame(TEXT, b"3")
    assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == b"ABC"


# == Failures ==


ELSEWHERE = "http://127.0.0.1:9" + FINAL


@pytest.fixture
def failing(start_runtime: StartRuntime) -> Runtime:
    """A server whose failures leave tracebacks."""
    return start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"}, expect_traceback=True)


def test_an_object_that_fails_inline_breaks_its_connection_with_the_reason(failing: Runtime) -> None:
    with Peer(failing) as other, Peer(failing) as peer:
        peer.send(object_frames(b"good", path="o"), object_frames(b"x", path="bad/o", etl_args="fail validation failed"),
                  object_frames(b"lost", path="o"))
        assert peer.result() == b"good"
        assert peer.break_reason() == (1011, "Processing error: validation failed")
        failing.wait_for_line("ERROR - bad/o: Processing error: validation failed")
        other.send(object_frames(b"others live", path="o"))
        assert other.result() == b"others live"


def test_an_object_bound_for_another_target_is_reported_and_the_connection_lives(
        failing: Runtime, target: StandInTarget) -> None:
    with Peer(failing) as peer:
        peer.send(object_frames(b"x", path="bad/o", etl_args="fail of age", pipeline=target.root + FINAL),
                  object_frames(b"good", path="o"))
        assert json.loads(peer.result()) == {"detail": "Processing error: of age"}
        assert peer.result() == b"good"
        failing.wait_for_line("ERROR - bad/o: Processing error: of age")
    assert not target.requests


@pytest.mark.parametrize("pipeline, reason", [
    ("http://127.0.0.1:9", "the next hop was lost: "),
    ("http://t/x,,http://t/y,", "the pipeline cannot be used: the pipeline has an empty entry"),
    ("ftp://t", "the pipeline cannot be used: "),
])
def test_a_failure_on_the_way_to_a_stage_breaks_the_connection(failing: Runtime, pipeline: str, reason: str) -> None:
    with Peer(failing) as peer:
        peer.send(object_frames(b"x", path="o", pipeline=pipeline))
        code, told = peer.break_reason()
        assert code == 1011 and told.startswith(reason)


def test_a_refusal_of_the_final_target_is_reported_with_its_text(failing: Runtime, target: StandInTarget) -> None:
    target.default = Behaviour(status=507, body=b"out of space, see http://127.0.0.1/v1/etl/_object/test-etl/s3cr3t")
    with Peer(failing) as peer:
        peer.send(object_frames(b"x", path="some/o", pipeline=target.root + FINAL))
        assert json.loads(peer.result()) == {"detail": "out of space, see http://127.0.0.1***"}
        failing.wait_for_line("ERROR - some/o: out of space")
        target.default = Behaviour()
        peer.send(object_frames(b"x", path="o", pipeline=target.root + FINAL))
        assert peer.receive() == Frame(TEXT, b"1")


def test_a_stage_that_fails_half_way_through_its_answer_fails_the_object(failing: Runtime, target: StandInTarget) -> None:
    target.default = Behaviour(status=200, body=b"z" * MIB, framing="chunked", cut=At.IN_ANSWER_BODY, after_bytes=MIB // 2)
    with Peer(failing) as peer:
        peer.send(object_frames(b"x", path="o", pipeline=target.root))
        code, reason = peer.break_reason()
        assert code == 1011 and "ended early" in reason
        failing.wait_for_line("ERROR - o: ")


@pytest.mark.parametrize("fqn, reason", [
    ("/no/@ais/bck/%25ob/where", "the object's file is not there"), ("/etc/passwd", "the path is not one of an object")])
def test_a_file_that_cannot_be_read_fails_the_object(failing: Runtime, fqn: str, reason: str) -> None:
    with Peer(failing) as peer:
        peer.send(object_frames(None, path="gone", fqn=quote(fqn, safe="") if "passwd" in fqn else fqn))
        assert peer.break_reason() == (1011, reason)
        failing.wait_for_line("ERROR - gone: " + reason)


def test_a_reason_is_cut_to_whole_characters_and_holds_no_secret(failing: Runtime) -> None:
    with Peer(failing) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="fail " + "\u20ac" * 100))
        code, reason = peer.break_reason()
        assert reason == "Processing error: " + "\u20ac" * 35
    with Peer(failing) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="quote_target"))
        assert "s3cr3t" not in peer.break_reason()[1]
    assert "s3cr3t" not in failing.log()


def test_failures_may_be_answered_as_if_they_were_deliveries(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1", "ETL_WS_FAILURE": "empty"}, expect_traceback=True)
    with Peer(server) as peer:
        peer.send(object_frames(b"x", path="bad", etl_args="fail it"),
                  object_frames(b"x", path="bad", etl_args="fail it", pipeline=ELSEWHERE), object_frames(b"good", path="o"))
        empty, reported, good = peer.objects(3)
        assert (empty, good) == (Frame(TEXT, b"0"), Frame(BINARY, b"good"))
        assert (reported.opcode, json.loads(reported.payload)) == (BINARY, {"detail": "Processing error: it"})
        server.wait_for_line("ERROR - bad: Processing error: it")


def test_slow_objects_behind_a_failed_one_are_not_answered(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"}, expect_traceback=True)
    with Peer(server) as peer:
        slow = object_frames(b"slow", path="o", etl_args="sleep 0.02")
        peer.send(slow * 20, object_frames(b"x", path="o", etl_args="fail it"), slow * 20)
        assert [peer.result() for _ in range(20)] == [b"slow"] * 20
        assert peer.break_reason() == (1011, "Processing error: it")


# == The end of the pod ==


@pytest.mark.slow
def test_a_pod_whose_connections_were_closed_by_failures_ends_with_the_last_reason(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "2"}, expect_traceback=True)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(server)) for _ in range(8)]
        for number, peer in enumerate(peers[:-1]):
            peer.send(object_frames(b"x", path="o", etl_args="fail number %d" % number))
            assert peer.break_reason()[0] == 1011
        time.sleep(FORSAKEN_SECONDS + 2)  # one connection is left, so nothing may happen all this time
        peers[-1].send(object_frames(b"alive", path="o"))
        assert peers[-1].result() == b"alive"
        peers[-1].socket.close()
        assert server.wait(FORSAKEN_SECONDS + 20) == os.EX_SOFTWARE
    assert re.match("ais_runtime_min: Processing error: number 6 ", server.lines[-1])


@ON_LINUX
@pytest.mark.slow
def test_a_worker_that_dies_right_after_a_failure_takes_no_reason_with_it(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"}, expect_traceback=True)
    worker, = children_of(server.pid)
    with Peer(server) as peer:
        os.kill(server.pid, signal.SIGSTOP)  # so that it sees the failure and the death at once
        peer.send(object_frames(b"x", path="o", etl_args="fail for good"))
        assert peer.break_reason()[0] == 1011
    os.kill(worker, signal.SIGKILL)
    os.kill(server.pid, signal.SIGCONT)
    assert server.wait(FORSAKEN_SECONDS + 20) == os.EX_SOFTWARE
    assert re.match("ais_runtime_min: Processing error: for good ", server.lines[-1])


@pytest.mark.slow
def test_a_worker_takes_its_connections_with_it(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "2"})
    with Peer(server) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="die"))
        assert peer.rest() == []
        assert server.wait(FORSAKEN_SECONDS + 20) == os.EX_SOFTWARE
    assert re.search(r"worker \d+ ended with exit code 3", server.lines[-1])


@pytest.mark.slow
def test_a_connection_in_time_lets_the_pod_live(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "2"}, expect_traceback=True)
    with Peer(server) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="fail it"))
        assert peer.break_reason()[0] == 1011
    with Peer(server) as peer:
        time.sleep(FORSAKEN_SECONDS + 2)
        peer.send(object_frames(b"alive", path="o"))
        assert peer.result() == b"alive"
        assert server.terminate() == 0


def test_a_drain_answers_what_was_sent_and_closes_idle_connections_at_once(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as idle, Peer(server) as busy, Peer(server) as halfway:
        busy.send(*(object_frames(b"%d" % number, path="o", etl_args="sleep 0.1") for number in range(20)))
        assert busy.result() == b"0"
        content = object_frames(b"in two pieces", path="o")
        halfway.send(content[:-3])
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert idle.rest() == [Frame(CLOSE, b"\x03\xe9")]
        assert [each.payload for each in busy.rest()] == [*(b"%d" % number for number in range(1, 20)), b"\x03\xe9"]
        halfway.send(content[-3:])
        assert [each.payload for each in halfway.rest()] == [b"in two pieces", b"\x03\xe9"]
        assert server.wait() == 0
        assert time.monotonic() - began < 20


def test_a_client_that_keeps_a_broken_connection_open_does_not_delay_the_end(failing: Runtime) -> None:
    with Peer(failing) as inline, Peer(failing) as handed_over:
        inline.send(object_frames(b"x", path="o", etl_args="fail it"))
        assert inline.break_reason()[0] == 1011
        handed_over.send(object_frames(b"x", path="o", etl_args="sleep 1.1"), object_frames(b"x", path="o", etl_args="fail it"))
        assert handed_over.result() == b"x"
        assert handed_over.break_reason()[0] == 1011
        began = time.monotonic()
        assert failing.terminate() == 0
        assert time.monotonic() - began < DRAIN_SECONDS - 1


@pytest.mark.slow
def test_one_object_that_takes_long_does_not_slow_down_quick_ones_of_other_connections(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as slow, Peer(server) as quick:
        slow.send(object_frames(b"slow", path="o", etl_args="sleep 10"))
        for _ in range(200):
            quick.send(object_frames(b"x", path="o") * 10)
            assert [quick.result() for _ in range(10)] == [b"x"] * 10
        assert not select.select([slow.socket], [], [], 0)[0], "they took as long as the slow one"
        assert slow.result() == b"slow"


@pytest.mark.slow
def test_a_client_that_never_stops_sending_is_told_that_the_pod_stops(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        ended = threading.Event()

        def send() -> None:
            with contextlib.suppress(OSError):
                while not ended.is_set():
                    peer.send(object_frames(b"x" * 1000, path="o", etl_args="sleep 0.05") * 10)  # more than can be answered

        sender = threading.Thread(target=send)
        sender.start()
        assert peer.result() == b"x" * 1000
        server.process.send_signal(signal.SIGTERM)
        *results, first, last = peer.rest()
        ended.set()
        sender.join()
    assert {each.payload for each in results} == {b"x" * 1000}
    assert (first, last) == (Frame(BINARY, b"", False), Frame(CLOSE, b"\x03\xf3the pod is stopping"))
    assert server.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 34], ids=["bytes", "head"])
def test_a_client_that_pauses_within_an_object_is_told_that_the_pod_stops(start_runtime: StartRuntime, cut: int) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(object_frames(b"whole", path="o"), object_frames(bytes(30), path="half")[:-cut])
        assert peer.result() == b"whole"
        server.process.send_signal(signal.SIGTERM)
        assert peer.rest() == [Frame(BINARY, b"", False), Frame(CLOSE, b"\x03\xf3the pod is stopping")]
    assert server.wait() == 0
    server.wait_for_line("ERROR - half: the pod is stopping; its WebSocket connection is closed")


def test_a_client_that_just_goes_away_leaves_no_line(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    before = len(server.lines)
    for data in (b"", object_frames(b"x", path="o")[:7], object_frames(b"x" * 100_000, path="o")[:50_000]):
        with Peer(server) as peer:
            peer.send(data)
        with Peer(server) as peer:
            peer.send(data)
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with Peer(server) as peer:
        peer.send(object_frames(b"x", path="o"))
        assert peer.result() == b"x"
    assert server.terminate() == 0
    assert [line for line in server.lines[before:] if "stopping" not in line] == []


def test_garbage_on_one_connection_harms_no_other(echo: Server) -> None:
    dice = random.Random(11)
    errors: List[Any] = []

    def work() -> None:
        try:
            with Peer(echo) as peer:
                for number in range(300):
                    peer.send(object_frames(b"%d" % number, path="o"))
                    assert peer.result() == b"%d" % number
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(100):
        with Peer(echo) as peer, contextlib.suppress(OSError):
            peer.send(bytes(dice.randrange(256) for _ in range(dice.randrange(1, 300))))
            if dice.random() < 0.5:
                peer.socket.shutdown(socket.SHUT_WR)
                codes = [each.payload[:2] for each in peer.rest() if each.opcode == CLOSE]
                assert all(code in (b"\x03\xea", b"\x03\xef", b"\x03\xf1", b"\x03\xf3") for code in codes), codes
    thread.join(60)
    assert not errors and not thread.is_alive()


def test_a_result_that_nobody_reads_does_not_hold_up_others(echo: Server) -> None:
    with Peer(echo) as lazy, Peer(echo) as peer:
        lazy.socket.setblocking(False)
        frames = memoryview(object_frames(b"x" * MIB, path="o"))
        sent = 0
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                while sent < len(frames):
                    sent += lazy.socket.send(frames[sent:])
                sent = 0
        peer.send(object_frames(b"served", path="o"))
        assert peer.result() == b"served"
