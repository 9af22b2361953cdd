"""Stage 3, transforming: the memory of bodies that wait for their transforms, and how many transforms run at once.

The memory of a worker is read from /proc, on Linux alone.
"""
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, TypeVar, Union

import pytest

from ais_runtime_min import (READ_BYTES, WAITING_LIMIT_BYTES, WRITE_BYTES, BoundedReader, ChunkedReader, ConnectionInput,
                             MainThreadSlots, Pace, RequestError, Room, ShortBody, LoadedObject, ThreadSlots, WaitingBody,
                             memory_limit)
from harness import Response, Runtime, Server, make_payload

T = TypeVar("T")
StartRuntime = Callable[..., Runtime]
MIB = 1 << 20
OBJECT_BYTES = 64 * MIB
CLIENTS = 10  # their objects are 640 MiB, much more than may be in memory
MARGIN_BYTES = 32 * MIB  # threads, buffers, and what an allocator holds back
MORE_THAN_ANY_MEMORY = 10 ** 15
PROBE_SECONDS = 5.0  # a kubelet waits no longer
SOON_SECONDS = 10.0  # what is to happen does so within
MOMENT_SECONDS = 0.1  # what is not to happen would have done so by then
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

GATED = '''
import os, threading, time, zlib
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Gated(HTTPMultiThreadedServer):
    """Says which object it was given, once a file is there; /pid and /most say who answers, and how many ran at once."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.running = self.most = 0

    def transform(self, data, path, etl_args):
        if path in ("/pid", "/most"):
            return b"%d" % (os.getpid() if path == "/pid" else self.most)
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        while etl_args and not os.path.exists(etl_args):
            time.sleep(0.01)
        with self.lock:
            self.running -= 1
        return "%s %d %d" % (path, len(data), zlib.adler32(data))
'''
STREAMING = '''
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Streaming(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        yield reader.read(5)
'''


def wait_until(condition: Callable[[], object], what: str, seconds: float = SOON_SECONDS) -> None:
    """Wait until something is true; fail if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within %.1f s: %s" % (seconds, what)
        time.sleep(0.01)


def begin(function: Callable[..., T], *args: Any) -> "Future[T]":
    """Call what may have to wait, in a thread that need not end: a failed test must not wait for it."""
    future: "Future[T]" = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def is_waiting(future: "Future[None]") -> bool:
    """Tell whether a call has not returned after a moment."""
    time.sleep(MOMENT_SECONDS)
    return not future.done()


# == Room ==


def test_the_first_body_never_waits_however_large_it_is() -> None:
    room = Room(10)
    room.enter("first")
    for _ in range(5):
        begin(room.take, "first", 7).result(SOON_SECONDS)


def test_the_first_body_never_waits_however_much_the_others_have() -> None:
    room = Room(10)
    for body in ("first", "second"):
        room.enter(body)
    room.take("second", 10)
    begin(room.take, "first", 100).result(SOON_SECONDS)


def test_a_later_body_has_what_room_there_is() -> None:
    room = Room(10)
    for body, count in (("first", 4), ("second", 5), ("third", 1)):
        room.enter(body)
        begin(room.take, body, count).result(SOON_SECONDS)


@pytest.mark.parametrize("make_room", [
    lambda room: room.give_back("first", 3), lambda room: room.leave("first"), lambda room: room.leave("second"),
], ids=["the first gives some back", "the first leaves", "another one leaves"])
def test_a_later_body_waits_until_there_is_room(make_room: Callable[[Room], None]) -> None:
    room = Room(10)
    for body, count in (("first", 4), ("second", 4), ("third", 0)):
        room.enter(body)
        room.take(body, count)
    taking = begin(room.take, "third", 5)
    assert is_waiting(taking)
    make_room(room)
    taking.result(SOON_SECONDS)


def test_too_little_room_given_back_leaves_a_body_waiting() -> None:
    room = Room(10)
    for body, count in (("first", 10), ("second", 0)):
        room.enter(body)
        room.take(body, count)
    taking = begin(room.take, "second", 5)
    room.give_back("first", 4)
    assert is_waiting(taking)
    room.give_back("first", 1)
    taking.result(SOON_SECONDS)


def test_whoever_is_first_once_another_has_left_waits_no_more() -> None:
    room = Room(10)
    for body, count in (("first", 1), ("second", 5), ("third", 4)):
        room.enter(body)
        room.take(body, count)
    taking = begin(room.take, "second", 1000)
    assert is_waiting(taking)
    room.leave("first")
    taking.result(SOON_SECONDS)


def test_a_body_may_leave_twice() -> None:
    room = Room(10)
    room.enter("first")
    room.take("first", 10)
    for _ in range(2):
        room.leave("first")
    assert_empty(room)


def assert_empty(room: Room, limit: int = 10) -> None:
    """Check that there is room again for as much as ever, and no more, for who is not the first."""
    for body in ("first", "second"):
        room.enter(body)
    begin(room.take, "second", limit).result(SOON_SECONDS)
    taking = begin(room.take, "second", 1)
    assert is_waiting(taking)
    room.leave("first")
    taking.result(SOON_SECONDS)
    room.leave("second")


# == Bodies that wait ==


@pytest.mark.parametrize("size", [0, 1, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, WRITE_BYTES, 3 * WRITE_BYTES + 1])
def test_a_body_of_any_size_is_read_whole_and_leaves_nothing_behind(size: int) -> None:
    room, content = Room(10), os.urandom(size)
    with WaitingBody(room, LoadedObject(content)) as body:
        assert begin(body.readall).result(SOON_SECONDS) == content
    assert_empty(room)


def test_bodies_that_are_each_larger_than_the_room_are_all_read() -> None:
    room, contents = Room(MIB), [os.urandom(3 * MIB + number) for number in range(8)]

    def read(content: bytes) -> bool:
        with WaitingBody(room, LoadedObject(content)) as body:
            return body.readall() == content

    assert [reading.result(SOON_SECONDS) for reading in [begin(read, content) for content in contents]] == [True] * len(contents)
    assert_empty(room, MIB)


@pytest.fixture
def pair() -> Iterator[List[socket.socket]]:
    """Two ends of a connection: the client's, and ours."""
    client, ours = socket.socketpair()
    with client, ours:
        yield [client, ours]


def test_who_announces_a_lot_and_sends_a_little_holds_little(pair: List[socket.socket]) -> None:
    client, ours = pair
    room = Room(MIB)
    first = WaitingBody(room, BoundedReader(ConnectionInput(ours), 1 << 40))
    for _ in range(2 * MIB // READ_BYTES):
        client.sendall(b"x")
        assert begin(first.readinto, bytearray(MIB)).result(SOON_SECONDS) == 1
    reading = begin(first.readinto, bytearray(MIB))
    with WaitingBody(room, LoadedObject(bytes(MIB - 2 * READ_BYTES))) as second:
        done = begin(second.readall)
        assert len(done.result(SOON_SECONDS)) == MIB - 2 * READ_BYTES
    client.sendall(b"x")
    assert reading.result(SOON_SECONDS) == 1
    first.close()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_cut_short_gives_its_room_back(pair: List[socket.socket], is_chunked: bool) -> None:
    client, ours = pair
    source, room = ConnectionInput(ours), Room(10)
    client.sendall(b"64\r\nhello")
    client.close()
    stream = ChunkedReader(source) if is_chunked else BoundedReader(source, 1000)
    with WaitingBody(room, stream) as body, pytest.raises(ShortBody):
        body.readall()
    assert_empty(room)


def test_a_body_of_unknown_size_that_the_memory_cannot_hold_is_413_and_gives_its_room_back(pair: List[socket.socket]) -> None:
    client, ours = pair
    room = Room(10, 2 * WRITE_BYTES)
    sending = begin(client.sendall, b"".join([b"%x\r\n%b\r\n" % (WRITE_BYTES, bytes(WRITE_BYTES))] * 4))
    with WaitingBody(room, ChunkedReader(ConnectionInput(ours))) as body, pytest.raises(RequestError) as caught:
        begin(body.readall).result(SOON_SECONDS)
    assert caught.value.status == 413
    assert str(2 * WRITE_BYTES) in str(caught.value) and "memory" in str(caught.value)
    assert_empty(room)
    ours.close()
    with contextlib.suppress(OSError):
        sending.result(SOON_SECONDS)


def test_a_body_of_unknown_size_that_the_memory_can_hold_is_read(pair: List[socket.socket]) -> None:
    client, ours = pair
    room = Room(10, 2 * WRITE_BYTES)
    begin(client.sendall, b"".join([b"%x\r\n%b\r\n" % (WRITE_BYTES, bytes(WRITE_BYTES))] * 2) + b"0\r\n\r\n")
    with WaitingBody(room, ChunkedReader(ConnectionInput(ours))) as body:
        assert begin(body.readall).result(SOON_SECONDS) == bytes(2 * WRITE_BYTES)


def test_the_room_is_given_back_before_the_transform_and_the_stream_stays_open() -> None:
    room, stream = Room(10), LoadedObject(b"0123456789")

    def transform(data: bytes, path: str) -> str:
        assert_empty(room)
        return data.decode() + path

    with WaitingBody(room, stream) as body:
        assert body.before(transform)(body.readall(), "/bck/obj") == "0123456789/bck/obj"
    assert not stream.closed


# == The container's memory ==


def machine_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize("text, limit", [
    ("134217728\n", 128 * MIB), ("134217728", 128 * MIB), ("0\n", 0), ("max\n", None), ("", None), ("many\n", None),
    ("9223372036854771712\n", None),  # what version 1 says where there is no limit
])
def test_the_memory_is_what_the_control_group_allows(tmp_path: Path, name: str, text: str, limit: Optional[int]) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    assert memory_limit(str(tmp_path)) == (machine_bytes() if limit is None else limit)


def test_the_memory_is_the_machines_without_a_control_group(tmp_path: Path) -> None:
    assert memory_limit(str(tmp_path)) == memory_limit(str(tmp_path / "nothing")) == machine_bytes()


@pytest.mark.parametrize("first, second, limit", [("max", "1000", 1000), ("1000", "2000", 1000), ("2000", "1000", 1000)])
def test_of_two_control_groups_the_lower_limit_counts(tmp_path: Path, first: str, second: str, limit: int) -> None:
    (tmp_path / "memory.max").write_text(first)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(second)
    assert memory_limit(str(tmp_path)) == limit


# == A worker's memory ==


class Sent(NamedTuple):
    """An object that a client sends, in pieces that all clients share."""

    path: str
    pieces: List[bytes]

    def body(self, is_chunked: bool) -> Iterable[bytes]:
        """Return it as it goes out, in chunks of a megabyte if it is to."""
        if not is_chunked:
            return self.pieces
        return [part for piece in self.pieces for part in (b"%x\r\n" % len(piece), piece, b"\r\n")] + [b"0\r\n\r\n"]

    def answer(self) -> bytes:
        """Return what the class says of it."""
        checksum = 1
        for piece in self.pieces:
            checksum = zlib.adler32(piece, checksum)
        return b"%b %d %d" % (self.path.encode(), sum(map(len, self.pieces)), checksum)


def make_objects() -> List[Sent]:
    """Make objects that differ in their first piece."""
    rest = [os.urandom(MIB)] * (OBJECT_BYTES // MIB - 1)
    return [Sent("/bck/%d" % number, [b"%0*d" % (MIB, number), *rest]) for number in range(CLIENTS)]


def send(server: Server, sent: Sent, gate: Path, is_chunked: bool) -> Response:
    """Send an object whose transform waits for a file, however long its sender has to wait."""
    headers = {"Transfer-Encoding": "chunked"} if is_chunked else {"Content-Length": str(OBJECT_BYTES)}
    with server.connect(timeout=60) as connection:
        head = "".join("%s: %s\r\n" % field for field in headers.items())
        line = "PUT %s?etl_args=%s HTTP/1.1\r\n" % (sent.path, gate)
        connection.sendall((line + "Host: x\r\nConnection: close\r\n%s\r\n" % head).encode())
        for piece in sent.body(is_chunked):
            connection.sendall(piece)
        answer = b"".join(iter(lambda: connection.recv(READ_BYTES), b""))
    head_of_answer, _, body = answer.partition(b"\r\n\r\n")
    return Response(int(head_of_answer.split(b" ")[1]), {}, body)


def memory_of(pid: int, field: str = "VmRSS") -> int:
    """Return how many bytes of memory a process has, or ("VmHWM") has ever had."""
    match = re.search(r"(?m)^%s:\s+(\d+) kB$" % field, Path("/proc/%d/status" % pid).read_text())
    assert match
    return int(match[1]) * 1024


def serve_gated(start_runtime: StartRuntime, threads: int) -> Runtime:
    """Serve the class by one worker, whose allocator gives freed memory back at once, as the image's does."""
    env = {"NUM_WORKERS": "1", "NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    return start_runtime(make_payload(GATED, "Gated"), env)


@ON_LINUX
@pytest.mark.parametrize("is_chunked, beside", [
    (False, 2),  # the object that is transformed, and that of whoever came first
    (True, 3),  # and the pieces of one that is being put together
], ids=["sized", "chunked"])
def test_bodies_that_wait_for_their_transforms_take_bounded_memory_and_all_come_right(
    start_runtime: StartRuntime, tmp_path: Path, is_chunked: bool, beside: int
) -> None:
    server = serve_gated(start_runtime, 1)
    worker, gate, objects = int(server.request("PUT", "/pid").body), tmp_path / "gate", make_objects()
    before = memory_of(worker)
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(send, server, each, gate, is_chunked) for each in objects]
        try:
            wait_until(lambda: memory_of(worker) - before > WAITING_LIMIT_BYTES, "as much is read as may wait")
            for _ in range(10):
                assert server.request("GET", "/health", timeout=PROBE_SECONDS).body == b"Running"
                time.sleep(0.05)
            most = memory_of(worker, "VmHWM") - before
        finally:
            gate.touch()
        assert [answer.result() for answer in answers] == [Response(200, {}, each.answer()) for each in objects]
    assert most < WAITING_LIMIT_BYTES + beside * OBJECT_BYTES + MARGIN_BYTES
    assert memory_of(worker) - before < MARGIN_BYTES, "what is done does not stay in memory"
    assert server.request("PUT", "/most").body == b"1"


@ON_LINUX
def test_a_client_that_goes_away_while_its_body_waits_gives_its_room_back(start_runtime: StartRuntime, tmp_path: Path) -> None:
    server = serve_gated(start_runtime, 1)
    worker, gate = int(server.request("PUT", "/pid").body), tmp_path / "gate"
    before = memory_of(worker)
    with contextlib.ExitStack() as stack:
        for _ in range(8):  # together they have as much as may wait, and all of them have some left to say
            connection = stack.enter_context(server.connect())
            connection.sendall(b"PUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % OBJECT_BYTES)
            connection.sendall(bytes(WAITING_LIMIT_BYTES // 8 - 2 * WRITE_BYTES))
        wait_until(lambda: memory_of(worker) - before > WAITING_LIMIT_BYTES - 32 * MIB, "the bodies are read")
    wait_until(lambda: memory_of(worker) - before < MARGIN_BYTES, "the memory is free again")
    gate.touch()
    for each in make_objects()[:2]:
        assert send(server, each, gate, False).body == each.answer()


def test_no_more_transforms_than_there_are_slots_run_at_once_whatever_the_objects_size(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    server = serve_gated(start_runtime, 2)
    sizes = [0, 10, READ_BYTES, READ_BYTES + 1, MIB, 2 * MIB] * 2
    path = "/bck/obj?etl_args=%s" % (tmp_path / "gate")
    with ThreadPoolExecutor(len(sizes)) as clients:
        answers = [clients.submit(server.request, "PUT", path, bytes(size)) for size in sizes]
        time.sleep(0.5)  # all that may run do
        (tmp_path / "gate").touch()
        assert [int(answer.result().body.split()[1]) for answer in answers] == sizes
    assert server.request("PUT", "/most").body == b"2"


# == Objects that no memory holds ==


@pytest.fixture(scope="module")
def gated() -> Iterator[Runtime]:
    """A worker whose class gets whole objects."""
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(GATED, "Gated"), "NUM_WORKERS": "1"}) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def streaming() -> Iterator[Runtime]:
    """A worker whose class gets objects in pieces."""
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(STREAMING, "Streaming"), "NUM_WORKERS": "1"}) as runtime:
        yield runtime


def huge(fields: bytes = b"") -> bytes:
    """Make the head of a request whose object is too large."""
    return b"PUT /bck/obj HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n" % (fields, MORE_THAN_ANY_MEMORY)


def assert_too_large(answer: bytes) -> None:
    """Check that this is one answer, which says that there is no memory for an object, and of which size."""
    assert answer.startswith(b"HTTP/1.1 413 ") and answer.count(b"HTTP/1.1 ") == 1, answer
    detail = json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
    assert str(MORE_THAN_ANY_MEMORY) in detail and "memory" in detail
    assert re.search(r"\b%d\b" % memory_limit(), detail)


def test_an_object_that_the_containers_memory_cannot_hold_is_413(gated: Runtime) -> None:
    assert_too_large(gated.raw([huge(), b"hello" * 100000], first=5, quiet=0.3))
    assert gated.request("PUT", "/bck/obj", b"hello").status == 200


def test_a_client_that_asks_first_is_told_413_and_not_to_send_its_object(gated: Runtime) -> None:
    assert_too_large(gated.raw(huge(b"Expect: 100-continue\r\n"), first=5, quiet=0.3))


def test_an_object_that_the_memory_cannot_hold_is_413_also_where_it_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "object"
    with open(file, "wb") as sparse:
        sparse.truncate(1 << 42)
    env = {"ETL_CLASS_PAYLOAD": make_payload(GATED, "Gated"), "NUM_WORKERS": "1", "ETL_FQN_ROOTS": str(tmp_path)}
    with Runtime(env=env) as runtime:
        response = runtime.request("PUT", "/bck/obj?etl_fqn=%s" % file, timeout=5)
    assert response.status == 413 and str(1 << 42) in json.loads(response.body)["detail"]


def test_a_streaming_class_takes_an_object_of_any_size(streaming: Runtime) -> None:
    with streaming.connect(timeout=5) as connection:
        connection.sendall(huge(b"Expect: 100-continue\r\n"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"hello" + bytes(READ_BYTES))
        answer = b""
        while not answer.endswith(b"5\r\nhello\r\n"):
            piece = connection.recv(1000)
            assert piece, answer
            answer += piece
        assert answer.startswith(b"HTTP/1.1 200 ")


# == Slots ==


Slots = Union[ThreadSlots, MainThreadSlots]


@contextlib.contextmanager
def working(slots: MainThreadSlots) -> Iterator[int]:
    """Have a thread do the work of the main one; its id is told."""
    thread = threading.Thread(target=slots.work, daemon=True)
    thread.start()
    assert thread.ident
    yield thread.ident
    slots.end()
    thread.join(SOON_SECONDS)
    assert not thread.is_alive()


@pytest.mark.parametrize("make_slots", [partial(ThreadSlots, 1), MainThreadSlots], ids=["threads", "main thread"])
def test_a_call_that_fails_gives_its_slot_back_and_its_error_to_the_caller(make_slots: Callable[[], Slots]) -> None:
    slots = make_slots()
    with working(slots) if isinstance(slots, MainThreadSlots) else contextlib.nullcontext():
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                begin(slots.run, divmod, 1, 0).result(SOON_SECONDS)
            assert begin(slots.run, divmod, 7, 2).result(SOON_SECONDS) == (3, 1)


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_calls_as_there_are_slots_run_at_once(limit: int) -> None:
    slots, lock, running, counts = ThreadSlots(limit), threading.Lock(), [0], set()

    def call() -> None:
        with lock:
            running[0] += 1
            counts.add(running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    for call_begun in [begin(slots.run, call) for _ in range(20)]:
        call_begun.result(SOON_SECONDS)
    assert max(counts) == limit


def test_calls_for_the_main_thread_run_there_in_the_order_of_asking() -> None:
    slots, calls = MainThreadSlots(), []

    def call(number: int) -> int:
        calls.append(number)
        time.sleep(0.05)
        return threading.get_ident()

    with working(slots) as main:
        futures = []
        for number in range(8):
            futures.append(begin(slots.run, call, number))
            time.sleep(0.01)
        assert {future.result(SOON_SECONDS) for future in futures} == {main}
    assert calls == list(range(8))


def test_calls_are_handed_over_once_nearly_all_are_slow_until_some_are_tried_again() -> None:
    pace, now = Pace(0.001), 1000.0
    for seconds in [0.005, 0.0005] * 500 + [0.0005] * 50:  # as where other processes take the processor
        pace.note(seconds, now)
        assert pace.is_quick(now)
    slow = 0
    while pace.is_quick(now):
        pace.note(0.01, now)
        slow += 1
    assert 5 < slow < 20
    assert not pace.is_quick(now + 0.99) and pace.is_quick(now + 1.01)
    now += 1.01
    for _ in range(2):  # still slow
        pace.note(0.01, now)
    assert not pace.is_quick(now + 0.99)
    now += 1.01
    for seconds in [0.005, 0.005] + [0.0005] * 100 + [0.01] * 5:  # no more
        pace.note(seconds, now)
        assert pace.is_quick(now)


def test_a_very_slow_call_is_enough_to_hand_over() -> None:
    pace = Pace(0.001)
    pace.note(1.5, 1000.0)
    assert not pace.is_quick(1149.0)
    assert pace.is_quick(1151.0)
