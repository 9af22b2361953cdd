"""A running server and its connections: kept, idle, slow, many at once, broken off, over both protocols."""
import contextlib
import functools
import http.client
import itertools
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, List, Set

import pytest

from echo import ECHO
from harness import (QUICK_NUMBERS, SERVING, Numbers, Runtime, Server, interpreter, make_payload,
                     started)

PROBE_SECONDS = 5.0  # a kubelet waits no longer
TRIAL_SECONDS = 1.2  # after which a leader that was held up is tried again
LARGE_BYTES = 8 << 20  # more than the buffers of a connection hold
VERY_LARGE_BYTES = 16 << 20  # more than they ever hold
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST
PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HELLO = b"Content-Length: 5\r\n\r\nhello"
HELLO_IN_CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
WHOLE_ANSWER = b"\r\n\r\nhello"

DOER = ECHO + '''
class Doer(Echo):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.barrier = threading.Barrier(8)

    def transform(self, data, path, etl_args):
        if isinstance(self, FastAPIServer):
            assert threading.current_thread() is threading.main_thread()
        self.calls += 1
        return super().transform(data, path, etl_args)

    def count(self, _, data, path):
        return b"%d" % self.calls

    def limit_stack(self, size, data, path):
        threading.stack_size(int(size))
        return data

    def meet(self, _, data, path):
        """Wait for all others who do."""
        self.barrier.wait(30)
        return data

    def spin(self, seconds, data, path):
        """Compute, so that other threads get the processor now and then only."""
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            pass
        return data
'''
BASES = {"threads": "HTTPMultiThreadedServer", "main": "FastAPIServer"}


@contextlib.contextmanager
def serve(kind: str, numbers: Numbers = QUICK_NUMBERS, **env: str) -> Iterator[Runtime]:
    """Start one worker whose class is called by "threads", or on the "main" one alone."""
    payload = make_payload(DOER.replace("Echo(HTTPMultiThreadedServer)", "Echo(%s)" % BASES[kind]), "Doer")
    with Runtime(env={"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "1", **env}, numbers=numbers) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One worker whose class is called by threads."""
    # Nobody waits for the drain who is not slow.
    with serve("threads", {**QUICK_NUMBERS, "DRAIN_SECONDS": 5.0}) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def alone() -> Iterator[Runtime]:
    """One worker whose class is called on the main thread alone."""
    with serve("main") as runtime:
        yield runtime


@pytest.fixture(params=["server", "alone"])
def either(request: pytest.FixtureRequest) -> Server:
    """Each of the two."""
    found: Server = request.getfixturevalue(request.param)
    return found


def assert_healthy(server: Server) -> None:
    """Check that a probe is answered in time."""
    response = server.request("GET", "/health", timeout=PROBE_SECONDS)
    assert (response.status, response.body) == (200, b"Running")


@pytest.fixture(autouse=True)
def lives_on(server: Server) -> Iterator[None]:
    """Whatever a test does, the server answers afterwards."""
    yield
    assert_healthy(server)


def path_of(arguments: object) -> str:
    """Return the path of an object with arguments."""
    return "/b/o?etl_args=" + str(arguments).replace(" ", "%20")


def put(arguments: object = "", content: bytes = HELLO) -> bytes:
    """Make a request to PUT an object."""
    return b"PUT %b HTTP/1.1\r\nHost: x\r\n%b" % (path_of(arguments).encode(), content)


def read_to_mark(connection: socket.socket, mark: bytes) -> bytes:
    """Read until these bytes have come."""
    received, start = bytearray(), 0  # where to look for the mark
    while received.find(mark, start) < 0:
        start = max(0, len(received) - len(mark))
        data = connection.recv(1 << 20)
        assert data, "the connection ended behind %r" % received[-1000:]
        received += data
    return bytes(received)


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the other end closes the connection or resets it."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        for piece in iter(lambda: connection.recv(1 << 20), b""):
            data += piece
    return bytes(data)


def read_answers(connection: socket.socket, count: int = 1) -> bytes:
    """Read so many answers that return a "hello", and nothing behind them."""
    data = b""
    while data.count(WHOLE_ANSWER) < count:
        data += read_to_mark(connection, b"hello")
    assert data.endswith(WHOLE_ANSWER) and data.count(b"HTTP/1.1 200 ") == count
    return data


def be_quick(connection: socket.socket, times: int = 50) -> None:
    """Have quick requests served, so that the leader comes to serve them itself."""
    for _ in range(times):
        connection.sendall(put())
        read_answers(connection)


@contextlib.contextmanager
def waiting(server: Server, gate: Path, bodies: List[bytes]) -> Iterator[None]:
    """Have requests under way until the end of the block, which are to be answered then."""
    with ThreadPoolExecutor(len(bodies)) as clients, contextlib.ExitStack() as stack:
        stack.callback(gate.touch)
        path = path_of("wait %s" % gate)
        answers = [clients.submit(server.request, "PUT", path, body) for body in bodies]
        time.sleep(0.3)
        yield
    assert [answer.result().body for answer in answers] == bodies


# == Kept connections ==


@pytest.mark.parametrize("family, address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_connection_to_either_loopback_may_be_idle_before_any_request(
    server: Server, family: int, address: str
) -> None:
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError:
        pytest.skip("this machine has no %s" % address)
    with socket.create_connection((address, server.port), 10) as connection:
        for pause in (0.2, 0.0, 0.1, 0.8):
            time.sleep(pause)
            be_quick(connection, 5)


def test_a_row_of_requests_of_all_kinds_on_one_connection_is_answered(either: Server) -> None:
    whole = put()
    kinds = whole + put("", HELLO_IN_CHUNKS) + put("sleep 0.02") + whole  # who sleeps loses the lead
    with either.connect(timeout=40) as client:
        for pause in (0.0, TRIAL_SECONDS):
            time.sleep(pause)
            be_quick(client)
            client.sendall(kinds * 5 + whole[:30])
            read_answers(client, 20)
            client.sendall(whole[30:] + whole)
            read_answers(client, 2)


# == No threads ==


def try_to_put(server: Server, arguments: str, body: bytes) -> bytes:
    """Put an object and return the result; b"none" if the connection ends without one."""
    try:
        return server.request("PUT", path_of(arguments), body).body
    except (OSError, http.client.HTTPException):
        return b"none"


def test_where_the_system_has_no_thread_left_no_answer_is_wrong_and_no_worker_ends() -> None:
    bodies = [b"%d" % number for number in range(20)]
    with serve("threads") as server, ThreadPoolExecutor(10) as clients:
        try_put = functools.partial(try_to_put, server, "sleep 0.05")
        # This is the first request, so that no thread is there for others.
        server.request("PUT", path_of("limit_stack %d" % (1 << 46)))
        for body, answer in zip(bodies, clients.map(try_put, bodies)):
            assert answer in (body, b"none")
        server.wait_for_line("cannot be started", PROBE_SECONDS)
        deadline = time.monotonic() + PROBE_SECONDS
        while try_to_put(server, "limit_stack 0", b"set") != b"set":
            assert time.monotonic() < deadline, "nobody is served any more"
            time.sleep(0.05)
        assert list(clients.map(try_put, bodies)) == bodies
        assert "starting another" not in server.log()


# == Few files ==

FILES = 64  # a pod cannot raise its hard limit


@pytest.fixture(scope="module")
def few_files() -> Iterator[Server]:
    """One worker that may have few files open."""
    env = {"ETL_CLASS_PAYLOAD": make_payload(DOER, "Doer"), "NUM_WORKERS": "1"}
    command, variables = started(interpreter("slim"), [], env)
    before = ["/bin/sh", "-c", 'ulimit -n %d && exec "$@"' % FILES, "sh"]
    with Server([*before, *command], variables) as server:
        server.port = int(server.wait_for_line(SERVING)[1])
        yield server
        assert "starting another" not in server.log(), "its worker is gone"


def lacks_files(server: Server, first_line: int) -> bool:
    """Tell whether a connection could not be accepted, by a line from the given one on."""
    return any("could not be accepted" in line for line in server.lines[first_line:])


def is_open(connection: socket.socket) -> bool:
    """Tell whether the other end has not closed a connection on which nothing is to come."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("greeting", [b"", PROBE], ids=["silent", "kept"])
def test_new_clients_are_served_where_idle_ones_have_taken_all_files(few_files: Server, greeting: bytes) -> None:
    first_line = len(few_files.lines)
    with contextlib.ExitStack() as stack:
        idle = []
        for _ in range(2 * FILES):
            idle.append(stack.enter_context(few_files.connect()))
            if greeting:
                idle[-1].sendall(greeting)
                read_to_mark(idle[-1], b"Running")
        for number in range(FILES):
            body = b"%d" % number
            assert few_files.request("PUT", "/b/o", body, timeout=PROBE_SECONDS).body == body
        states = [is_open(connection) for connection in idle]
    assert states[:FILES // 2] == [False] * (FILES // 2), "those that were idle for the longest time are closed"
    assert states[-FILES // 8:] == [True] * (FILES // 8), "and no more of them than is needed"
    assert lacks_files(few_files, first_line)


def test_clients_that_wait_or_keep_asking_are_not_closed_where_files_run_out(
    few_files: Server, tmp_path: Path
) -> None:
    first_line, done = len(few_files.lines), threading.Event()
    answered: Set[socket.socket] = set()

    def ask(client: socket.socket) -> None:
        while not done.is_set():
            client.sendall(put())
            read_answers(client)
            answered.add(client)

    with waiting(few_files, tmp_path / "gate", [b"x"] * 8), contextlib.ExitStack() as stack:
        active = [stack.enter_context(few_files.connect(timeout=10)) for _ in range(10)]
        with ThreadPoolExecutor(len(active)) as clients:
            asking = [clients.submit(ask, client) for client in active]
            try:
                while not lacks_files(few_files, first_line):
                    stack.enter_context(few_files.connect(timeout=PROBE_SECONDS))
                    answered.clear()
                    while len(answered) < len(active) and not any(each.done() for each in asking):
                        time.sleep(0.001)  # a client that its own thread starves is idle too
                assert_healthy(few_files)
            finally:
                done.set()
            for future in asking:
                assert future.exception() is None


@contextlib.contextmanager
def paused(server: Server) -> Iterator[None]:
    """Stop all processes meanwhile, so that what comes is there at once when they go on."""
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        time.sleep(0.02)  # it takes a moment, in which they would see some of it
        yield
    finally:
        os.killpg(server.pid, signal.SIGCONT)


def is_answered(connection: socket.socket) -> bool:
    """Tell whether a probe is answered, or the connection closed."""
    try:
        return connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    except ConnectionResetError:
        return False


def test_idle_clients_that_send_again_just_when_files_run_out_cost_no_request_that_is_under_way(
    few_files: Server, tmp_path: Path
) -> None:
    first_line = len(few_files.lines)
    with waiting(few_files, tmp_path / "gate", [b"hello"]), contextlib.ExitStack() as stack:
        connect = functools.partial(few_files.connect, PROBE_SECONDS)
        kept = [stack.enter_context(connect()) for _ in range(FILES // 2)]
        while not lacks_files(few_files, first_line):
            assert len(kept) < 2 * FILES, "there is no lack of files"
            # One round more than fits finds a new client before those that were idle.
            with paused(few_files):
                kept.append(stack.enter_context(connect()))
                for connection in kept:
                    connection.sendall(PROBE)
            kept = [connection for connection in kept if is_answered(connection)]
            time.sleep(0.06)  # no thread waits for more from them
    assert_healthy(few_files)


# == Slow and early ==


def test_a_body_is_invited_and_the_connection_kept_unless_the_request_is_refused(server: Server) -> None:
    with server.connect(timeout=5) as connection:
        for content in (HELLO, HELLO_IN_CHUNKS):
            head, _, body = put("", content).replace(b"Host", b"Expect: 100-continue\r\nHost").partition(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
            assert read_to_mark(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert read_to_mark(connection, b"hello").startswith(b"HTTP/1.1 200 ")
    for line, status in ((b"PUT /", 404), (b"DELETE /b/o", 405)):
        head = line + b" HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        received = server.raw(head, first=5, quiet=0.5)
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert received.count(b"HTTP/1.1 ") == 1, "a final answer is the last word: %r" % received


def test_an_early_error_reaches_a_client_that_still_sends(server: Server) -> None:
    large = bytes(LARGE_BYTES)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (LARGE_BYTES, large)
    framings = {b"Content-Length: %d" % LARGE_BYTES: large, b"Transfer-Encoding: chunked": chunks}
    refused = [
        (b"PUT / HTTP/1.1", 404), (b"POST /b/o HTTP/1.1", 405), (b"DELETE /health HTTP/1.1", 405),
        (b"POST /download HTTP/1.1", 400),
        (b"PUT /b/o?etl_fqn=/nowhere/@ais/bucket/%25ob/object HTTP/1.1", 404),
        (b"PUT /b/o HTTP/1.1\r\nContent-Length: 9\r\nTransfer-Encoding: chunked", 400),
    ]
    for (line, status), (framing, body) in itertools.product(refused, framings.items()):
        with server.connect() as connection:
            connection.sendall(b"%b\r\nHost: x\r\n%b\r\n\r\n" % (line, framing))
            connection.sendall(body)  # it is read, though it is not wanted
            head, _, text = read_to_end(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), (line, framing)
        assert json.loads(text)["detail"], (line, framing)


def test_clients_that_keep_the_server_waiting_for_too_long_are_let_go() -> None:
    limits = ("HEAD_TIMEOUT_SECONDS", "BODY_PAUSE_SECONDS", "RESULT_UNREAD_SECONDS", "IDLE_SECONDS")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve("threads", {**QUICK_NUMBERS, **dict.fromkeys(limits, 1.0)}))
        clients = [stack.enter_context(server.connect()) for _ in range(5)]
        idle, kept, half_head, half_body, unread = clients
        idle.sendall(PROBE)
        half_head.sendall(put()[:20])
        half_body.sendall(put()[:-1])
        unread.sendall(put("fill %d" % VERY_LARGE_BYTES))
        for _ in range(10):
            be_quick(kept, 1)
            time.sleep(0.25)  # 2.5 s in all: it is never idle for as long as the limit
        assert read_to_end(idle).endswith(b"Running"), "an idle connection is closed"
        assert read_to_end(half_head).startswith(b"HTTP/1.1 408 ")
        assert not read_to_end(half_body).startswith(b"HTTP/1.1 200 ")
        assert len(read_to_end(unread)) < VERY_LARGE_BYTES, "a result that nobody reads is cut"


@pytest.mark.slow
def test_a_head_has_thirty_seconds_to_come_but_not_many_more() -> None:
    with serve("threads", None) as server, server.connect(timeout=75) as client:
        begun = time.monotonic()
        client.sendall(put()[:20])
        assert read_to_end(client).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begun > 25


# == Broken off ==


def go_away(server: Server, data: bytes, pause: float, resets: bool) -> None:
    """Send data and end the connection after a pause, politely or by a reset."""
    with server.connect() as connection:
        connection.sendall(data)
        time.sleep(pause)
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def test_a_client_that_goes_away_before_its_request_is_whole_is_not_served(server: Server) -> None:
    calls, lines = int(server.request("PUT", path_of("count")).body), len(server.lines)
    ways = list(itertools.product((0.0, 0.1), (False, True)))
    for data, way in itertools.product((b"", PROBE), ways):
        go_away(server, data, *way)
    time.sleep(0.3)
    assert server.lines[lines:] == [], "it is in the log"
    for data, way in itertools.product((put()[:-1], put("", HELLO_IN_CHUNKS)[:-5]), ways):
        go_away(server, data, *way)
    time.sleep(0.3)
    assert int(server.request("PUT", path_of("count")).body) == calls + 1


def test_a_client_that_goes_away_before_its_answer_is_whole_does_no_harm(
    server: Server, tmp_path: Path
) -> None:
    for resets in (False, True):
        gate = tmp_path / str(resets)
        go_away(server, put("wait %s" % gate), 0.1, resets)
        gate.touch()
        go_away(server, put("fill %d" % VERY_LARGE_BYTES), 0.1, resets)
    assert server.request("PUT", "/b/o", b"hello").body == b"hello"


# == The lead ==


def test_requests_that_wait_for_each_other_are_served_at_once_and_quick_ones_meanwhile(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect(timeout=40)) for _ in range(8)]
        for pause in (0.0, TRIAL_SECONDS):
            be_quick(clients[0])
            time.sleep(pause)
            for client in clients[1:]:
                client.sendall(put("meet"))
            be_quick(clients[0])  # while all others wait for it
            assert_healthy(server)
            clients[0].sendall(put("meet"))
            for client in clients:
                read_answers(client)


def test_a_request_that_holds_the_interpreter_lock_does_not_hold_up_a_probe(server: Server) -> None:
    with server.connect(timeout=40) as client:
        be_quick(client)
        client.sendall(put("spin 0.5"))
        assert_healthy(server)
        read_answers(client)


def test_new_clients_do_not_wait_for_those_that_are_always_busy(server: Server) -> None:
    busy = put("spin 0.0003")  # about as long as a request may take that the leader serves itself
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as prober:
        clients = [stack.enter_context(server.connect(timeout=40)) for _ in range(200)]
        probe = prober.submit(assert_healthy, server)
        for client in clients:
            client.sendall(busy)
        unanswered, deadline = set(clients), time.monotonic() + PROBE_SECONDS
        while unanswered:
            assert time.monotonic() < deadline, "%d clients are not answered" % len(unanswered)
            # Who has an answer asks again at once.
            for client in select.select(clients, [], [], 1)[0]:
                client.recv(65536)
                client.sendall(busy)
                unanswered.discard(client)
        probe.result()


def test_an_answer_that_is_too_large_to_be_sent_at_once_is_whole(either: Server) -> None:
    with either.connect(timeout=40) as client:
        for _ in range(2):
            be_quick(client)
            client.sendall(put("fill %d" % VERY_LARGE_BYTES) + put())
            head, _, body = read_to_mark(client, WHOLE_ANSWER).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ") and body.startswith(bytes(VERY_LARGE_BYTES) + b"HTTP/1.1 200 ")


# == The main thread ==


def test_a_slow_object_on_the_main_thread_holds_up_no_probe_and_no_large_body(
    alone: Runtime, tmp_path: Path
) -> None:
    large = os.urandom(LARGE_BYTES)
    with alone.connect(timeout=40) as client, ThreadPoolExecutor(4) as pool:
        for name in ("first", "second"):
            be_quick(client)
            with waiting(alone, tmp_path / name, [b"hello"]):
                others = [pool.submit(alone.request, "PUT", "/b/o", large) for _ in range(4)]
                for _ in range(3):
                    assert_healthy(alone)
            assert all(other.result().body == large for other in others)


def test_small_and_large_bodies_take_turns_on_the_main_thread(alone: Runtime) -> None:
    large, done, counts = os.urandom(LARGE_BYTES), threading.Event(), [0] * 8

    def ask(place: int) -> None:
        while not done.is_set():
            if place % 2:
                assert alone.request("PUT", "/b/o", large).body == large
            else:
                with alone.connect(timeout=40) as client:
                    be_quick(client)
            counts[place] += 1

    with ThreadPoolExecutor(len(counts)) as pool:
        asking = [pool.submit(ask, place) for place in range(len(counts))]
        deadline = time.monotonic() + 30
        while min(counts) < 5 and time.monotonic() < deadline:
            assert_healthy(alone)
            time.sleep(0.05)
        done.set()
        for each in asking:
            each.result()
    assert min(counts) >= 5


def test_a_client_that_does_not_read_keeps_nobody_from_the_main_thread(alone: Runtime) -> None:
    with alone.connect(timeout=PROBE_SECONDS) as client, contextlib.ExitStack() as stack:
        be_quick(client)
        for _ in range(3):
            silent = stack.enter_context(alone.connect())
            silent.sendall(put("fill %d" % VERY_LARGE_BYTES))
            assert select.select([silent], [], [], PROBE_SECONDS)[0]  # its answer has begun
            be_quick(client)


def test_another_node_that_is_silent_keeps_nobody_from_the_main_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as stack:
        url = "http://127.0.0.1:%d" % silent.getsockname()[1]
        runtime = stack.enter_context(serve("main", AIS_TARGET_URL=url + "/v1/etl/x"))
        client = stack.enter_context(runtime.connect(timeout=PROBE_SECONDS))
        for line in ("GET /bucket/object?etl_fqn=/x&latest-ver=true",
                     "GET /bucket/object?etl_fqn=", "GET /bucket/etl_fqn",
                     "POST /download?original_url=%s/x&object_to=etl_fqn" % url):
            be_quick(client)
            other = stack.enter_context(runtime.connect())
            other.sendall(b"%b HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % line.encode())
            assert select.select([silent], [], [], PROBE_SECONDS)[0], "not asked by %s" % line
            stack.enter_context(silent.accept()[0])
            be_quick(client)


@pytest.mark.parametrize("kind, arguments", [("threads", "spin 0.1"), ("main", ""), ("main", "sleep 0.1")])
def test_what_has_come_is_answered_though_the_server_drains(kind: str, arguments: str) -> None:
    with serve(kind) as runtime, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(runtime.connect(timeout=40)) for _ in range(8)]
        be_quick(clients[0])
        for client in clients:
            client.sendall(put(arguments))
        time.sleep(0.2)  # now all have come
        os.kill(runtime.pid, signal.SIGTERM)
        for client in clients:
            read_answers(client)
        assert runtime.wait(10) == 0


def test_an_idle_main_thread_that_leads_hears_of_the_end() -> None:
    with serve("main") as runtime, runtime.connect(timeout=40) as client:
        be_quick(client)
        time.sleep(1.5)  # now nobody watches it
        be_quick(client, 1)
        assert runtime.terminate(5) == 0
