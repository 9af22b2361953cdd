"""The lead of a server: what must hold when it changes hands, also at the worst moment.

Each of the first tests is for a race that a prototype of this core has met.
"""
import contextlib
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator, List
from urllib.parse import quote

import pytest

from ais_runtime_min import (
    Connection, ConnectionInput, ConnectionPool, HTTPConnection, HTTPMultiThreadedServer, Next,
    Server, Service, Settings, ThreadSlots, WebSocketConnection)
from harness import QUICK_NUMBERS, UNUSED_TARGET, Runtime, children_of, make_payload
from peer import PING, Peer, frame, handshake, object_frames

StartRuntime = Callable[..., Runtime]
BASE = "from aistore.sdk.etl.webserver.{module} import {base}\n"
NAP = BASE + """
import threading, time

class Nap({base}):
    \"\"\"Sleeps for as many seconds as etl_args say, and tells the thread.\"\"\"

    def transform(self, data, path, etl_args):
        time.sleep(float(etl_args or 0))
        is_main = threading.current_thread() is threading.main_thread()
        return b"main" if is_main else b"another"
"""
BASES = {"HTTPMultiThreadedServer": "http_multi_threaded_server", "FastAPIServer": "fastapi_server"}
THREADED = NAP.format(module=BASES["HTTPMultiThreadedServer"], base="HTTPMultiThreadedServer")


def payload_of(base: str) -> str:
    """Pickle the class with this base."""
    return make_payload(NAP.format(module=BASES[base], base=base), "Nap")


class Upper(HTTPMultiThreadedServer):
    """The class of the servers in this process."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return data.upper()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server which nobody leads yet."""
    monkeypatch.setenv("AIS_TARGET_URL", UNUSED_TARGET)
    settings = Settings()
    service = Service(settings, Upper(), ConnectionPool(settings), ThreadSlots(2))
    with Server(socket.create_server(("127.0.0.1", 0)), service) as made:
        yield made


@pytest.fixture
def pair() -> Iterator[List[socket.socket]]:
    """A client's socket and ours."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname()[:2], 5)
        ours, _ = listener.accept()
    with client, ours:
        yield [client, ours]


class Scripted(Connection):
    """A connection that does what a test wants."""

    def __init__(self, ours: socket.socket, server: Server) -> None:
        super().__init__(ours, server, ConnectionInput(ours))
        self.attended: List[bool] = []
        self.worked = threading.Event()
        self.wish = Next.READ
        self.on_work: Callable[[], None] = lambda: None

    def attend(self, now: float, may_call: bool) -> Next:
        self.attended.append(may_call)
        return self.wish

    def work(self) -> Next:
        self.on_work()
        self.worked.set()
        return Next.PAUSE

    def dismiss(self) -> bool:
        return True

    def expire(self, now: float) -> Next:
        return Next.READ

    def pause(self) -> bool:
        return True


# == Races ==


def test_who_has_lost_the_lead_begins_no_turn(server: Server, pair: List[socket.socket]) -> None:
    connection = Scripted(pair[1], server)
    server.settle(connection, Next.READ)
    lost, held = server._take_lead(), server._take_lead()
    assert not server._serve(connection, lost, False)
    assert connection.attended == []
    assert server._serve(connection, held, False)
    assert connection.attended == [False]


def test_a_connection_is_not_registered_any_more_when_a_thread_goes_on_with_it(
    server: Server, pair: List[socket.socket]
) -> None:
    connection, registered = Scripted(pair[1], server), []
    connection.wish = Next.THREAD
    connection.on_work = lambda: registered.extend(server._registered())
    server.settle(connection, Next.READ)
    assert server._serve(connection, server._take_lead(), False)
    assert connection.worked.wait(5)
    assert registered == []


def test_a_connection_whose_leader_lost_the_lead_is_registered_by_it(
    server: Server, pair: List[socket.socket]
) -> None:
    class Losing(Scripted):
        def attend(self, now: float, may_call: bool) -> Next:
            server._take_lead()
            assert server._registered() == []
            return Next.READ

    connection = Losing(pair[1], server)
    server.settle(connection, Next.READ)
    assert not server._serve(connection, server._take_lead(), False)
    assert server._registered() == [connection]


@pytest.mark.parametrize("base", BASES)
def test_many_quick_objects_of_one_turn_are_not_taken_for_a_slow_one(
    start_runtime: StartRuntime, base: str
) -> None:
    numbers = {**QUICK_NUMBERS, "QUICK_SECONDS": 0.02, "LEAD_SECONDS": 0.2, "TURN_SECONDS": 10.0}
    runtime = start_runtime(payload_of(base), {"NUM_WORKERS": "1"}, numbers=numbers)
    with Peer(runtime) as peer:  # a single call of 2 s would count as slow by itself
        for count in (500, 5):
            peer.send(object_frames(b"x", path="o", etl_args="0.005") * count)
            assert [peer.result() for _ in range(count)] == [b"main"] * count


def test_objects_by_path_are_handed_over_while_calls_are_slow(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    file = tmp_path / "object"
    file.write_bytes(b"x")
    env = {"NUM_WORKERS": "1", "ETL_FQN_ROOTS": str(tmp_path)}
    numbers = {**QUICK_NUMBERS, "QUICK_SECONDS": 0.1, "LEAD_SECONDS": 0.2}
    runtime = start_runtime(make_payload(THREADED, "Nap"), env, numbers=numbers)
    with Peer(runtime) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="0.5"))
        assert peer.result() == b"main"
        peer.send(object_frames(None, path="o", fqn=quote(str(file), safe="")) * 20)
        assert [peer.result() for _ in range(20)] == [b"another"] * 20


@pytest.mark.parametrize("kind", [HTTPConnection, WebSocketConnection])
def test_a_connection_that_is_readable_no_more_goes_on(
    server: Server, pair: List[socket.socket], kind: Callable[..., Connection]
) -> None:
    ours = pair[1]
    arguments = () if kind is HTTPConnection else (ConnectionInput(ours),)
    connection = kind(ours, server, *arguments)
    assert connection.attend(time.monotonic(), True) is Next.READ


def test_a_connection_whose_request_has_just_come_is_not_dismissed(
    server: Server, pair: List[socket.socket]
) -> None:
    client, ours = pair
    connection = HTTPConnection(ours, server)
    assert connection.dismiss()
    client.sendall(b"G")
    assert not connection.dismiss()


def test_a_reply_to_a_client_that_is_gone_harms_no_thread(start_runtime: StartRuntime) -> None:
    numbers = {**QUICK_NUMBERS, "THREAD_LIMIT": 4}
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"}, numbers=numbers)
    for _ in range(8):
        with Peer(runtime) as peer:
            peer.send(object_frames(b"x", path="o", etl_args="0.1") * 4)
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert runtime.request("PUT", "/b/o?etl_args=0.1", b"x").body in (b"main", b"another")


def test_a_wake_up_that_another_thread_has_taken_is_none(server: Server) -> None:
    server._waker.signals = frozenset((1,))
    server._waker._writable.send(b"\x01")
    assert server._waker.take()
    assert not server._waker.take()


def test_a_drain_begins_once_though_two_threads_see_it(server: Server) -> None:
    server.socket.setblocking(False)
    server._selector.register(server.socket, 1)
    waker = server._selector.register(server._waker.readable, 1)
    server.drain()
    term = server._take_lead()
    server._look_around([(waker, 1)], term)
    began = server._drain_began
    server._look_around([(waker, 1)], term)
    assert began and server._drain_began == began


def test_a_connection_ends_when_an_object_fails_on_another_thread(
    start_runtime: StartRuntime
) -> None:
    runtime = start_runtime(
        make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"}, numbers=QUICK_NUMBERS,
        expect_traceback=True)
    with Peer(runtime, 10) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="0.1"))
        assert peer.result() in (b"main", b"another")  # the next ones are handed over
        peer.send(object_frames(b"x", path="o", etl_args="not a number"))
        assert peer.break_reason()[0] == 1011


def test_pongs_for_a_client_that_reads_nothing_take_bounded_memory(
    server: Server, pair: List[socket.socket]
) -> None:
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = WebSocketConnection(pair[1], server, ConnectionInput(pair[1]))
    wishes = []
    while Next.THREAD not in wishes:  # a thread then waits until the client reads
        assert len(wishes) < 100
        pair[0].sendall(frame(PING, bytes(125)) * 500)
        wishes.append(connection.attend(time.monotonic(), True))
    assert 0 < len(connection._queue) <= 2 * 500


def test_a_leader_that_has_just_lost_the_lead_to_a_drain_accepts_nobody(
    server: Server, pair: List[socket.socket]
) -> None:
    server.server_close()
    assert not server._accept(server._take_lead())


# == A leader that is held up ==


def test_a_signal_is_heard_while_the_main_thread_computes(start_runtime: StartRuntime) -> None:
    source = NAP.format(module=BASES["FastAPIServer"], base="FastAPIServer")  # whose calls are the main thread's
    source = source.replace("time.sleep(", "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 1 + int(4e6) * int(")
    runtime = start_runtime(make_payload(source.replace("or 0))", "or 0)))"), "Nap"), {"NUM_WORKERS": "1"})
    with ThreadPoolExecutor(1) as clients, runtime.connect(1) as idle:
        slow = clients.submit(runtime.request, "PUT", "/b/slow?etl_args=2", b"x")
        time.sleep(0.5)
        runtime.process.terminate()
        assert idle.recv(1) == b"" and not slow.done()
        assert slow.result().body == b"main"
    assert runtime.wait() == 0


@pytest.mark.alone
@pytest.mark.parametrize("base", BASES)
def test_while_a_call_holds_the_leader_up_another_thread_leads(
    start_runtime: StartRuntime, base: str
) -> None:
    runtime = start_runtime(payload_of(base), {"NUM_WORKERS": "1"})
    with ThreadPoolExecutor(1) as clients, Peer(runtime) as peer:
        for _ in range(2):
            slow = clients.submit(runtime.request, "PUT", "/b/slow?etl_args=1", b"x")
            time.sleep(0.1)
            peer.send(object_frames(b"x", path="o", etl_args="1"), b"\x89\x80mask")
            assert runtime.request("GET", "/health").body == b"Running"
            assert runtime.request("PUT", "/").status == 404
            assert not slow.done()
            assert peer.receive() is not None and peer.result() in (b"main", b"another")
            assert slow.result().status == 200


def test_the_thread_that_made_the_instance_leads_again_when_it_is_free(
    start_runtime: StartRuntime
) -> None:
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"})
    assert runtime.request("PUT", "/b/o?etl_args=0.05", b"x").status == 200  # holds it up
    deadline = time.monotonic() + 20
    while runtime.request("PUT", "/b/o", b"x").body != b"main":
        assert time.monotonic() < deadline, "calls are handed over for ever"
        time.sleep(0.1)


def test_a_call_for_the_main_thread_is_made_though_the_lead_has_just_changed(
    start_runtime: StartRuntime
) -> None:
    numbers = {**QUICK_NUMBERS, "SWEEP_SECONDS": 30.0}  # then nothing but a wake-up helps
    runtime = start_runtime(payload_of("FastAPIServer"), {"NUM_WORKERS": "1"}, numbers=numbers)
    head = b"PUT /b/o?etl_args=%b HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n"
    with runtime.connect(10) as slow, runtime.connect(10) as quick:
        for _ in range(60):
            for connection, seconds in ((slow, b"0.03"), (quick, b"0")):
                connection.sendall(head % seconds)
            time.sleep(0.01)  # threads wait for both bodies
            slow.sendall(b"x")
            assert slow.recv(1000).endswith(b"main")
            time.sleep(0.005)
            quick.sendall(b"x")
            assert quick.recv(1000).endswith(b"main")


def test_the_main_thread_waits_for_no_client_that_does_not_read(
    start_runtime: StartRuntime
) -> None:
    payload = make_payload(NAP.format(module="fastapi_server", base="FastAPIServer").replace(
        "return b", "return bytes(32 << 20) if path == 'large' else b"), "Nap")
    runtime = start_runtime(payload, {"NUM_WORKERS": "1"})
    with Peer(runtime) as peer:
        peer.send(object_frames(b"x", path="large", etl_args="0.05"))
        time.sleep(0.3)
        assert runtime.request("PUT", "/b/o", b"x", timeout=20).body == b"main"


@pytest.mark.alone
def test_many_calls_of_one_client_hold_up_no_other_client(start_runtime: StartRuntime) -> None:
    numbers = {**QUICK_NUMBERS, "QUICK_SECONDS": 0.1}  # all of them are quick
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"}, numbers=numbers)
    request = b"PUT /b/o?etl_args=0.004 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    with runtime.connect() as client, Peer(runtime) as peer:
        client.sendall(request * 800)
        peer.send(object_frames(b"x", path="o", etl_args="0.004") * 800)
        begun = time.monotonic()
        assert runtime.request("GET", "/health", timeout=20).body == b"Running"
        assert time.monotonic() - begun < 2  # it was all of 6 s


@pytest.mark.alone
def test_results_of_one_turn_take_bounded_memory(start_runtime: StartRuntime) -> None:
    payload = make_payload(THREADED.replace("return b", "return b'x' * 300_000; return b"), "Nap")
    numbers = {**QUICK_NUMBERS, "TURN_SECONDS": 5.0, "LEAD_SECONDS": 5.0, "QUICK_SECONDS": 0.1}
    runtime = start_runtime(payload, {"NUM_WORKERS": "1"}, numbers=numbers)
    worker, = children_of(runtime.pid)
    with Peer(runtime) as peer:
        before = most_memory_of(worker)
        peer.send(object_frames(b"", path="o") * 2000)  # 600 MB of results, which nobody reads
        time.sleep(1)
        assert most_memory_of(worker) - before < 64 << 20
        for _ in range(2000):  # and the client, which is slow, gets all of them
            assert peer.result() == b"x" * 300_000


def most_memory_of(pid: int) -> int:
    """Return how many bytes of memory a process has ever had."""
    status = Path("/proc/%d/status" % pid).read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.alone
def test_a_result_leaves_though_the_objects_behind_it_are_too_many_to_read_on(
    start_runtime: StartRuntime
) -> None:
    # the first takes all the time there is for calls of one turn: those behind it are handed over
    numbers = {**QUICK_NUMBERS, "QUICK_SECONDS": 0.5, "LEAD_SECONDS": 1.0, "TURN_SECONDS": 0.01}
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"}, numbers=numbers)
    with Peer(runtime) as peer:
        first = object_frames(b"x", path="o", etl_args="0.1")
        peer.send(first + object_frames(b"x", path="o", etl_args="3") * 70)
        begun = time.monotonic()
        assert peer.result() in (b"main", b"another") and time.monotonic() - begun < 2


def test_a_client_that_keeps_sending_a_little_after_an_error_is_let_go(
    start_runtime: StartRuntime
) -> None:
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"})
    with runtime.connect() as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(b"nonsense\r\n\r\n")
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            client.sendall(b"x")
            time.sleep(0.05)
        raise AssertionError("it still may send")


def test_only_the_request_that_expects_it_is_told_to_continue(start_runtime: StartRuntime) -> None:
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"})
    head = b"PUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n"
    first, second = head % (0, b"Expect: 100-continue\r\n"), head % (5, b"")
    answers = runtime.raw([first, second, b"hello"], pause=0.2)
    assert answers.count(b"HTTP/1.1 200 ") == 2 and b" 100 " not in answers


def test_a_connection_on_which_all_is_answered_ends_well_however_late(
    start_runtime: StartRuntime
) -> None:
    numbers = {**QUICK_NUMBERS, "WEBSOCKET_DRAIN_SECONDS": 0.5}
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"}, numbers=numbers)
    with Peer(runtime) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="1.5"))
        time.sleep(0.2)
        runtime.process.terminate()
        assert peer.result() in (b"main", b"another")
        last, = peer.rest()
        assert last.payload == (1001).to_bytes(2, "big")
    assert runtime.wait() == 0


# == What cannot begin a request ==


@pytest.mark.parametrize("data", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x80\x2e\x01", b"\x00",
    b"SSH-2.0-OpenSSH_9.2\r\n", b"(GET", b"GE\x00"], ids=repr)
def test_bytes_that_cannot_begin_a_request_are_refused_at_once(
    start_runtime: StartRuntime, data: bytes
) -> None:
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"})
    begun = time.monotonic()
    answer = runtime.raw(data, first=10, quiet=10)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"this is not HTTP" in answer
    assert time.monotonic() - begun < 8


def test_half_a_head_is_refused_when_its_time_is_over(start_runtime: StartRuntime) -> None:
    numbers = {**QUICK_NUMBERS, "HEAD_TIMEOUT_SECONDS": 0.5}
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"}, numbers=numbers)
    answer = runtime.raw(b"PUT /b/o HTTP/1.1\r\nHo", first=10, quiet=5)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_method_that_comes_byte_by_byte_is_waited_for(start_runtime: StartRuntime) -> None:
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"})
    request = b"\r\nPUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
    answer = runtime.raw([request[at:at + 1] for at in range(len(request))], pause=0.001)
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_handshake_in_one_packet_with_what_follows_is_served(start_runtime: StartRuntime) -> None:
    runtime = start_runtime(make_payload(THREADED, "Nap"), {"NUM_WORKERS": "1"})
    with contextlib.closing(runtime.connect()) as connection:
        connection.sendall(handshake() + object_frames(b"x", path="o") * 3)
        received = b""
        while received.count(b"main") + received.count(b"another") < 3:
            piece = connection.recv(1 << 16)
            assert piece, received
            received += piece
        assert received.startswith(b"HTTP/1.1 101 ")
