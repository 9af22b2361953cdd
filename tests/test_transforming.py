"""Stage 3, transforming: the memory of bodies that wait, and where and how many transforms run.

Most tests ask a worker that believes its machine to be tiny. The memory that a worker takes is read
from /proc, on Linux alone.
"""
import contextlib
import json
import os
import re
import socket
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest

from ais_runtime_min import READ_BYTES, Pace, memory_limit
from applications import wait_until
from conftest import StartRuntime
from echo import HEAD
from harness import QUICK_NUMBERS, Response, Runtime, Server, make_payload

MIB = 1 << 20
MACHINE_BYTES = 8 * MIB  # of the machine that the worker believes in
LITTLE = bytes(100000)  # more than is read at once, and a tenth of the room for bodies that wait
MOST = bytes(700000)  # of that room, which is a MiB
CHUNKED = b"Transfer-Encoding: chunked"

GATED = HEAD + '''
class Gated(HTTPMultiThreadedServer):
    """Says which object it was given, once the file exists that the arguments name.

    Files with ".1", ".2" … behind that name tell how many run; /pid, /most and /order say who
    answers, how many ran at once, and which objects were begun in which order.
    """

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.paths = []

    def transform(self, data, path, etl_args):
        if isinstance(self, FastAPIServer):
            assert threading.current_thread() is threading.main_thread()
        told = {"pid": os.getpid(), "most": self.most, "order": " ".join(self.paths)}
        if path.strip("/") in told:
            return str(told[path.strip("/")])
        with self.lock:
            self.paths.append(path)
            self.running += 1
            self.most = max(self.most, self.running)
            if etl_args.startswith("/"):
                open("%s.%d" % (etl_args, self.running), "w").close()
        while etl_args.startswith("/") and not os.path.exists(etl_args):
            time.sleep(0.01)
        with self.lock:
            self.running -= 1
        if etl_args == "fail":
            raise ValueError("as it was told")
        return "%s %d %d" % (path, len(data), zlib.adler32(data))
'''
ON_MAIN = GATED.replace("Gated(HTTPMultiThreadedServer)", "OnMain(FastAPIServer)")
STREAMING = HEAD + '''
class Streaming(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        yield reader.read(5)
'''
TINY_MACHINE = '''
import os
real = os.sysconf
pages = %d // real("SC_PAGE_SIZE")
os.sysconf = lambda name: pages if name == "SC_PHYS_PAGES" else real(name)
''' % MACHINE_BYTES


def answer_to(path: str, body: bytes) -> Response:
    """Return what the class says of an object, without the headers."""
    return Response(200, {}, b"%b %d %d" % (path.encode(), len(body), zlib.adler32(body)))


def send(server: Server, path: str, body: Any, gate: object = "") -> Response:
    """Send an object, in chunks where it is a list; return the answer without its headers."""
    query = "?etl_args=%s" % gate if gate else ""
    return server.request("PUT", path + query, body)._replace(headers={})


# == Room for bodies that wait ==


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A worker with two slots on a machine of 8 MiB, with room of a MiB for bodies that wait."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "sitecustomize.py").write_text(TINY_MACHINE)
    env = {
        "ETL_CLASS_PAYLOAD": make_payload(GATED, "Gated"), "NUM_WORKERS": "1", "NUM_THREADS": "2",
        "PYTHONPATH": str(folder), "ETL_FQN_ROOTS": str(tmp_path_factory.getbasetemp()),
    }
    numbers = {**QUICK_NUMBERS, "WAITING_LIMIT_BYTES": MIB}
    with Runtime(env=env, expect_traceback=True, numbers=numbers) as runtime:  # the class fails
        yield runtime


def begin_body(server: Server, framing: bytes) -> socket.socket:
    """Begin a request, and wait until the worker reads its body: it says "100 Continue" then."""
    client = server.connect(timeout=10)
    client.sendall(b"PUT /b/o HTTP/1.1\r\nHost: x\r\n%b\r\nExpect: 100-continue\r\n\r\n" % framing)
    assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return client


def in_a_chunk(data: bytes = b"") -> bytes:
    """Frame data as a chunk; without any it is the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def read_to_mark(client: socket.socket, mark: bytes) -> bytes:
    """Read an answer up to these bytes."""
    answer = b""
    while mark not in answer:
        received = client.recv(READ_BYTES)
        assert received, "the connection ended after %r" % answer
        answer += received
    return answer


@contextlib.contextmanager
def somebody_first(server: Server) -> Iterator[None]:
    """Have a client that sends a little and pauses, since the first one may take any memory."""
    with begin_body(server, CHUNKED) as first:
        first.sendall(in_a_chunk(LITTLE))
        yield
        first.sendall(in_a_chunk())
        read_to_mark(first, b" %d " % len(LITTLE))


def assert_room_is_free(server: Server) -> None:
    """Check that a second client has as much room as ever, and the first one as much as it wants."""
    with somebody_first(server):
        assert send(server, "/b/o", MOST).status == 200
    assert send(server, "/b/o", bytes(3 * MIB)).status == 200


def test_who_came_first_never_waits_however_much_the_others_have(tiny: Runtime) -> None:
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(begin_body(tiny, CHUNKED)) for _ in range(3)]
        for other in others:
            other.sendall(in_a_chunk(bytes(400000)))  # and no third one has room
        time.sleep(0.2)  # they are read
        first.sendall(in_a_chunk(bytes(3 * MIB)) + in_a_chunk())
        read_to_mark(first, b" %d " % (3 * MIB))
        for other in others:
            other.sendall(in_a_chunk())
            read_to_mark(other, b" 400000 ")


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_body_that_waits_goes_on_when_another_one_ends(tiny: Runtime, is_cut: bool) -> None:
    with ThreadPoolExecutor(1) as pool, somebody_first(tiny), begin_body(tiny, CHUNKED) as other:
        other.sendall(in_a_chunk(MOST))
        time.sleep(0.2)  # it is read
        waiting = pool.submit(send, tiny, "/b/o", MOST)
        time.sleep(0.2)
        other.sendall(b"" if is_cut else in_a_chunk())
        other.shutdown(socket.SHUT_WR)
        assert waiting.result() == answer_to("/b/o", MOST)


def test_who_announces_a_lot_and_sends_a_little_holds_little(tiny: Runtime) -> None:
    with somebody_first(tiny), begin_body(tiny, b"Content-Length: %d" % len(MOST)) as slow:
        slow.sendall(LITTLE)
        time.sleep(0.2)  # it is read
        assert send(tiny, "/b/o", MOST) == answer_to("/b/o", MOST)


def test_bodies_that_are_cut_short_give_their_room_back(tiny: Runtime) -> None:
    bodies = [(b"Content-Length: 1000000", MOST), (CHUNKED, in_a_chunk(MOST))]
    for framing, data in bodies * 3:
        with begin_body(tiny, framing) as client:
            client.sendall(data)
    assert_room_is_free(tiny)


def test_an_object_whose_transform_fails_gives_back_its_room_and_its_slot(tiny: Runtime) -> None:
    for body in [MOST, b"small"] * 3:  # more than there are slots
        answer = send(tiny, "/b/o", body, "fail")
        assert answer.status == 500 and b"as it was told" in answer.body
    assert_room_is_free(tiny)


def test_an_object_gives_its_room_back_when_its_transform_begins(tiny: Runtime, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(1) as pool, somebody_first(tiny):
        running = pool.submit(send, tiny, "/b/o", MOST, gate)
        wait_until(Path("%s.1" % gate).exists, "the transform begins")
        assert send(tiny, "/b/o", MOST) == answer_to("/b/o", MOST)
        assert not running.done()
        gate.touch()
        assert running.result() == answer_to("/b/o", MOST)


# == Objects that no memory holds ==


def test_an_object_that_the_memory_cannot_hold_is_413(tiny: Runtime) -> None:
    size = MACHINE_BYTES + 1
    for expect, body in ((b"Expect: 100-continue\r\n", b""), (b"", bytes(500000))):
        head = b"PUT /b/o HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n" % (expect, size)
        answer = tiny.raw([head, body], quiet=0.3)
        assert answer.startswith(b"HTTP/1.1 413 ") and answer.count(b"HTTP/1.1 ") == 1, answer
        detail = json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
        assert detail.endswith("more bytes than the container's memory, %d" % MACHINE_BYTES)


def test_a_file_that_the_memory_cannot_hold_is_413(tiny: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "object"
    for size, status in ((1 << 42, 413), (MACHINE_BYTES + 1, 413), (MACHINE_BYTES, 200)):
        with open(path, "wb") as sparse:
            sparse.truncate(size)
        response = tiny.request("PUT", "/bck/obj?etl_fqn=%s" % path)
        assert response.status == status and b"%d" % MACHINE_BYTES in response.body
    assert_room_is_free(tiny)


def test_an_object_of_unknown_size_is_413_when_it_is_more_than_the_memory_can_hold(tiny: Runtime) -> None:
    body = bytes(MACHINE_BYTES)
    for sent in (body, [body]):
        assert send(tiny, "/b/o", sent) == answer_to("/b/o", body)
    response = tiny.request("PUT", "/b/o", [body, bytes(4 * MIB)])
    assert response.status == 413 and b"memory, %d" % MACHINE_BYTES in response.body
    assert_room_is_free(tiny)


def test_a_streaming_class_takes_an_object_of_any_size() -> None:
    env = {"ETL_CLASS_PAYLOAD": make_payload(STREAMING, "Streaming"), "NUM_WORKERS": "1"}
    with Runtime(env=env) as server, begin_body(server, b"Content-Length: %d" % 10 ** 15) as client:
        client.sendall(b"hello" + bytes(READ_BYTES))
        assert read_to_mark(client, b"5\r\nhello\r\n").startswith(b"HTTP/1.1 200 ")


def test_the_memory_is_the_lowest_limit_of_the_control_groups_or_the_machines(tmp_path: Path) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cases = [
        (None, None, machine), ("134217728\n", None, 128 * MIB), ("134217728", None, 128 * MIB),
        ("0\n", None, 0), (None, "134217728\n", 128 * MIB), ("1000", "2000", 1000),
        ("2000", "1000", 1000), ("max\n", "1000", 1000), ("max\n", None, machine),
        ("", None, machine), ("many\n", None, machine),
        (None, "9223372036854771712\n", machine),  # what version 1 says where there is no limit
    ]
    found = []
    for number, (second, first, _) in enumerate(cases):
        root = tmp_path / str(number)
        for name, text in (("memory.max", second), ("memory/memory.limit_in_bytes", first)):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                (root / name).write_text(text)
        found.append(memory_limit(str(root)))
    assert found == [limit for _, _, limit in cases]
    assert memory_limit(str(tmp_path / "nothing")) == machine


# == A worker's memory ==

OBJECT_BYTES = 16 * MIB
ROOM_BYTES = 16 * MIB
CLIENTS = 8  # their objects are 128 MiB, much more than may be in memory
MARGIN_BYTES = 16 * MIB  # threads, buffers, and what an allocator holds back


def memory_of(pid: int, field: str = "VmRSS") -> int:
    """Return how many bytes of memory a process has, or ("VmHWM") has ever had."""
    match = re.search(r"(?m)^%s:\s+(\d+) kB$" % field, Path("/proc/%d/status" % pid).read_text())
    assert match
    return int(match[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.alone
@pytest.mark.parametrize("is_chunked, beside", [
    (False, 2),  # the object that is transformed, and that of whoever came first
    (True, 3),  # and the pieces of one that is being put together
], ids=["sized", "chunked"])
def test_bodies_that_wait_for_their_transforms_take_bounded_memory_and_all_come_right(
    start_runtime: StartRuntime, tmp_path: Path, is_chunked: bool, beside: int
) -> None:
    env = {"NUM_WORKERS": "1", "NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    numbers = {**QUICK_NUMBERS, "WAITING_LIMIT_BYTES": ROOM_BYTES}
    server = start_runtime(make_payload(GATED, "Gated"), env, numbers=numbers)
    rest = [bytes(range(256)) * 4096] * 15
    pieces = [[b"%0*d" % (MIB, number), *rest] for number in range(CLIENTS)]  # 16 MiB each
    bodies = [each if is_chunked else b"".join(each) for each in pieces]
    for _ in range(40):  # were they to give back more than they took, there would be no bound
        assert send(server, "/b/o", MOST).status == 200
    worker, gate = int(server.request("PUT", "/pid").body), tmp_path / "gate"
    before = memory_of(worker)
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(send, server, "/b/o", body, gate) for body in bodies]
        try:
            wait_until(lambda: memory_of(worker) - before > ROOM_BYTES + MIB, "the room is taken")
            for _ in range(5):
                assert server.request("GET", "/health", timeout=5).body == b"Running"
                time.sleep(0.05)
            most = memory_of(worker, "VmHWM") - before
        finally:
            gate.touch()
        expected = [answer_to("/b/o", b"".join(each)) for each in pieces]
        assert [answer.result() for answer in answers] == expected
    assert most < ROOM_BYTES + beside * OBJECT_BYTES + MARGIN_BYTES, "more waits than may"
    wait_until(lambda: memory_of(worker) - before < MARGIN_BYTES, "the memory is free again")
    assert server.request("PUT", "/most").body == b"1"


# == How many transforms run at once, and where ==


def test_as_many_transforms_as_there_are_slots_run_at_once_whatever_the_objects_size(
    tiny: Runtime, tmp_path: Path
) -> None:
    gate, sizes = tmp_path / "gate", [0, 10, READ_BYTES, READ_BYTES + 1, 400000, 2 * MIB] * 2
    with ThreadPoolExecutor(len(sizes)) as clients:
        answers = [clients.submit(send, tiny, "/b/o", bytes(size), gate) for size in sizes]
        wait_until(Path("%s.2" % gate).exists, "two transforms run")
        time.sleep(0.3)  # a third one would begin
        gate.touch()
    assert [answer.result() for answer in answers] == [answer_to("/b/o", bytes(size)) for size in sizes]
    assert tiny.request("PUT", "/most").body == b"2"


def test_calls_for_the_main_thread_are_made_in_the_order_of_asking_each_with_its_own_outcome(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    env = {"NUM_WORKERS": "1"}
    server = start_runtime(make_payload(ON_MAIN, "OnMain"), env, expect_traceback=True)
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(9) as clients:
        answers = []
        for number in range(9):  # the first one has all others wait
            arguments = gate if number == 0 else "fail" if number in (3, 4) else ""
            answers.append(clients.submit(send, server, "/%d" % number, b"hello", arguments))
            time.sleep(0.1)
        gate.touch()
        results = [answer.result() for answer in answers]
    for number, result in enumerate(results):
        begins = b"as it was told" if number in (3, 4) else b"%d 5 " % number
        assert begins in result.body and result.status == (500 if number in (3, 4) else 200)
    order = server.request("PUT", "/order").body.decode().split()
    assert sorted(order) == list("012345678")
    places = [order.index(number) for number in "012678"]
    assert max(places[:3]) < min(places[3:]), order  # neighbours may change places


def test_calls_are_handed_over_once_nearly_all_are_slow_until_some_are_tried_again() -> None:
    pace, now = Pace(), 1000.0
    for seconds in [0.002, 0.0001] * 500 + [0.0001] * 100:  # as where processors are busy
        pace.note(seconds, now)
        assert pace.is_quick(now)
    for least, most in ((6, 40), (2, 5)):  # when it is tried again, some are enough
        slow = 0
        while pace.is_quick(now):
            pace.note(0.002, now)
            slow += 1
        assert least <= slow <= most
        assert not pace.is_quick(now + 0.19)
        now += 0.21
        assert pace.is_quick(now)
    for seconds in [0.002] + [0.0001] * 100 + [0.002] * 5:  # quick ones let a few slow ones pass
        pace.note(seconds, now)
        assert pace.is_quick(now)
    # One call that is very slow is enough.
    pace = Pace()
    pace.note(1.5, 1000.0)
    assert not pace.is_quick(1149.0) and pace.is_quick(1151.0)
