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
from typing import Iterator, List

import pytest

from harness import (QUICK_NUMBERS, SERVING, Numbers, Runtime, Server, interpreter, make_payload,
                     started)

SLOTS = 2
PROBE_SECONDS = 5.0  # a kubelet waits no longer
LARGE_BYTES = 8 << 20  # more than the buffers of a connection hold
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST
PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

SLEEPER = '''
import os, threading, time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Sleeper(HTTPMultiThreadedServer):
    """Waits for a file or for seconds, as the arguments tell, then gives the object back."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.running = self.most = 0
        self.lock = threading.Lock()

    def transform(self, data, path, etl_args):
        if path in ("/count", "/most"):
            return b"%d" % (self.calls if path == "/count" else self.most)
        if path == "/stack":
            threading.stack_size(int(etl_args))
            return data
        with self.lock:
            self.calls += 1
            self.running += 1
            self.most = max(self.most, self.running)
        if etl_args.startswith("/"):
            while not os.path.exists(etl_args):
                time.sleep(0.01)
        else:
            time.sleep(float(etl_args or 0))
        with self.lock:
            self.running -= 1
        return data
'''


@contextlib.contextmanager
def serve(
    source: str, name: str, numbers: Numbers = QUICK_NUMBERS, **env: str
) -> Iterator[Runtime]:
    """Start one worker that serves a class."""
    variables = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "NUM_WORKERS": "1", **env}
    with Runtime(env=variables, numbers=numbers) as runtime:
        yield runtime


def assert_healthy(server: Server) -> None:
    """Check that a probe is answered in time."""
    response = server.request("GET", "/health", timeout=PROBE_SECONDS)
    assert (response.status, response.body) == (200, b"Running")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One worker with few slots for transforms, so that they can all be busy."""
    numbers = {**QUICK_NUMBERS, "DRAIN_SECONDS": 5.0}  # nobody waits for it who is not slow
    with serve(SLEEPER, "Sleeper", numbers, NUM_THREADS=str(SLOTS)) as runtime:
        yield runtime


@pytest.fixture(autouse=True)
def lives_on(server: Server) -> Iterator[None]:
    """Whatever a test does, the server answers afterwards."""
    yield
    assert_healthy(server)


@contextlib.contextmanager
def keeping(server: Server, address: str = "127.0.0.1") -> Iterator[http.client.HTTPConnection]:
    """Make a client that reuses its connection, and fails where that is not possible."""
    connection = http.client.HTTPConnection(address, server.port, timeout=10)
    connection.connect()
    connection.auto_open = 0  # a connection that the server closed is not replaced in silence
    with contextlib.closing(connection):
        yield connection


def exchange(connection: http.client.HTTPConnection, body: bytes) -> bytes:
    """Put an object on a kept connection and return the result."""
    connection.request("PUT", "/bucket/object", body)
    with connection.getresponse() as response:
        assert response.status == 200
        return response.read()


def read_to_mark(connection: socket.socket, mark: bytes) -> bytes:
    """Read until these bytes have come."""
    received = b""
    while mark not in received:
        data = connection.recv(1 << 16)
        assert data, "the connection ended behind %r" % received
        received += data
    return received


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the other end closes the connection or resets it."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        for piece in iter(lambda: connection.recv(1 << 20), b""):
            data += piece
    return bytes(data)


def count_of_calls(server: Server) -> int:
    """Ask how often the class was called for an object."""
    return int(server.request("PUT", "/count").body)


@contextlib.contextmanager
def waiting(server: Server, gate: Path, bodies: List[bytes]) -> Iterator[None]:
    """Have requests under way until the end of the block, which are to be answered then."""
    with ThreadPoolExecutor(len(bodies)) as clients, contextlib.ExitStack() as stack:
        stack.callback(gate.touch)
        path = "/bucket/object?etl_args=%s" % gate
        answers = [clients.submit(server.request, "PUT", path, body) for body in bodies]
        time.sleep(0.3)
        yield
    assert [answer.result().body for answer in answers] == bodies


# == Kept connections ==


def test_a_connection_serves_many_requests_and_may_be_idle_before_any_of_them(
    server: Server
) -> None:
    with keeping(server) as connection:
        for number, pause in enumerate([0.2, 0.0, 0.1, 0.8] + [0.0] * 20):
            time.sleep(pause)
            body = b"%d" % number * number * 1000
            assert exchange(connection, body) == body


def test_errors_do_not_end_a_connection(server: Server) -> None:
    with keeping(server) as connection:
        requests = (("DELETE", "/b/o", 405), ("PUT", "/", 404), ("POST", "/download", 400), ("GET", "/health", 200))
        for method, path, status in requests:
            connection.request(method, path, b"body")
            with connection.getresponse() as response:
                assert response.status == status
                response.read()


def test_http_1_0_is_kept_where_it_asks_and_never_gets_chunks(server: Server) -> None:
    with server.connect() as connection:
        for body in (b"hello", b""):
            connection.sendall(b"PUT /b/o HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            head, _, rest = read_to_mark(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
            while len(rest) < len(body):
                rest += connection.recv(100)
            assert rest == body
            assert b"\r\nConnection: keep-alive" in head and b"Transfer-Encoding" not in head
            assert b"\r\nContent-Length: %d" % len(body) in head
            time.sleep(0.1)


def test_a_large_object_comes_whole_and_goes_whole(server: Server) -> None:
    pieces = [b"x" * 70000, bytes(range(256)) * (LARGE_BYTES // 256), b"z"]
    for body in (pieces[1], pieces):
        response = server.request("PUT", "/bucket/object", body)
        assert response.status == 200
        assert response.body == (body if isinstance(body, bytes) else b"".join(body))


# == Many connections ==


def test_two_hundred_idle_connections_are_in_nobodys_way(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(200)]
        for connection in idle[::2]:
            connection.sendall(PROBE)
        for connection in idle[::2]:
            assert read_to_mark(connection, b"Running").startswith(b"HTTP/1.1 200 ")
        assert_healthy(server)
        time.sleep(0.2)  # all are parked by now
        assert_healthy(server)
        for connection in idle:
            connection.sendall(PROBE)
            assert read_to_mark(connection, b"Running").startswith(b"HTTP/1.1 200 ")


def test_requests_beyond_the_slots_wait_their_turn_and_probes_do_not(
    server: Server, tmp_path: Path
) -> None:
    with waiting(server, tmp_path / "gate", [b"%d" % number for number in range(6 * SLOTS)]):
        for _ in range(5):
            assert_healthy(server)
            assert server.request("DELETE", "/bucket/object", timeout=PROBE_SECONDS).status == 405
    assert int(server.request("PUT", "/most").body) == SLOTS


def test_a_storm_of_new_connections_is_answered(server: Server) -> None:
    bodies = [b"%d" % number for number in range(400)]
    with ThreadPoolExecutor(40) as clients:
        answers = list(clients.map(lambda body: server.request("PUT", "/bucket/object", body), bodies))
    assert [answer.body for answer in answers] == bodies


def test_clients_that_say_half_a_head_or_send_half_a_body_hold_up_nobody(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(50):
            half = b"Ho" if number % 2 else b"Host: x\r\nContent-Length: 10\r\n\r\nhello"
            stack.enter_context(server.connect()).sendall(b"PUT /b/o HTTP/1.1\r\n" + half)
        for _ in range(5):
            assert server.request("PUT", "/bucket/object", b"hello", timeout=5).body == b"hello"
            assert_healthy(server)


def test_connections_in_many_threads_do_not_mix_their_answers(server: Server) -> None:
    def talk(name: bytes) -> List[bytes]:
        bodies = [b"%b %d " % (name, number) * (1 + 50 * (number % 7)) for number in range(30)]
        with keeping(server) as connection:
            return [body for body in bodies if exchange(connection, body) != body]

    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(talk, [b"%d" % number for number in range(16)])) == [[]] * 16


def try_to_put(server: Server, path: str, body: bytes = b"") -> bytes:
    """Put an object and return the result; b"none" if the connection ends without one."""
    try:
        return server.request("PUT", path, body).body
    except (OSError, http.client.HTTPException):
        return b"none"


def test_where_the_system_has_no_thread_left_no_answer_is_wrong_and_no_worker_ends() -> None:
    bodies = [b"%d" % number for number in range(20)]
    with serve(SLEEPER, "Sleeper") as server, ThreadPoolExecutor(10) as clients:
        put = functools.partial(try_to_put, server, "/bucket/object?etl_args=0.05")
        # This is the first request, so that no thread is there for others.
        server.request("PUT", "/stack?etl_args=%d" % (1 << 46))
        for body, answer in zip(bodies, clients.map(put, bodies)):
            assert answer in (body, b"none")
        server.wait_for_line("cannot be started", PROBE_SECONDS)
        deadline = time.monotonic() + PROBE_SECONDS
        while try_to_put(server, "/stack?etl_args=0", b"set") != b"set":
            assert time.monotonic() < deadline, "nobody is served any more"
            time.sleep(0.05)
        assert list(clients.map(put, bodies)) == bodies
        assert "starting another" not in server.log()


# == Few files ==

FILES = 64  # a pod cannot raise its hard limit


@pytest.fixture(scope="module")
def few_files() -> Iterator[Server]:
    """One worker that may have few files open."""
    env = {"ETL_CLASS_PAYLOAD": make_payload(SLEEPER, "Sleeper"), "NUM_WORKERS": "1"}
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
                assert read_to_mark(idle[-1], b"Running").startswith(b"HTTP/1.1 200 ")
        for number in range(FILES):
            assert few_files.request("PUT", "/bucket/object", b"%d" % number, timeout=PROBE_SECONDS).body == b"%d" % number
        states = [is_open(connection) for connection in idle]
    assert states[:FILES // 2] == [False] * (FILES // 2), "those that were idle for the longest time are closed"
    assert states[-FILES // 8:] == [True] * (FILES // 8), "and no more of them than is needed"
    assert lacks_files(few_files, first_line)


def test_a_connection_with_a_request_under_way_is_not_closed_for_want_of_files(
    few_files: Server, tmp_path: Path
) -> None:
    first_line, bodies = len(few_files.lines), [b"%d" % number for number in range(8)]
    with waiting(few_files, tmp_path / "gate", bodies), contextlib.ExitStack() as stack:
        for _ in range(2 * FILES):
            stack.enter_context(few_files.connect())
        assert_healthy(few_files)
        assert lacks_files(few_files, first_line)


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


def test_a_slow_head_and_a_slow_body_are_waited_for(server: Server) -> None:
    request = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nhello!"
    pieces = [request[start:start + 6] for start in range(0, len(request), 6)]
    answer = server.raw(pieces, 0.05, quiet=0.2)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\nhello!")


def test_a_body_is_invited_and_the_connection_kept(server: Server) -> None:
    with server.connect(timeout=5) as connection:
        for framing, body in ((b"Content-Length: 5", b"hello"), (b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n")):
            connection.sendall(b"PUT /b/o HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n%b\r\n\r\n" % framing)
            assert read_to_mark(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert read_to_mark(connection, b"hello").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("line, status", [("PUT /", 404), ("DELETE /bucket/object", 405)])
def test_a_body_that_would_be_refused_is_not_invited(server: Server, line: str, status: int) -> None:
    head = "%s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n" % line
    received = server.raw(head.encode(), first=5, quiet=0.5)
    assert received.startswith(b"HTTP/1.1 %d " % status)
    assert received.count(b"HTTP/1.1 ") == 1, "a final answer is the last word: %r" % received


@pytest.mark.parametrize("line, status", [
    (b"PUT / HTTP/1.1", 404), (b"POST /bucket/object HTTP/1.1", 405),
    (b"DELETE /health HTTP/1.1", 405), (b"POST /download HTTP/1.1", 400),
    (b"PUT /bucket/object?etl_fqn=/nowhere/@ais/bucket/%25ob/object HTTP/1.1", 404),
    (b"PUT /bucket/object HTTP/1.1\r\nContent-Length: 9\r\nTransfer-Encoding: chunked", 400),
])
def test_an_early_error_reaches_a_client_that_still_sends(
    server: Server, line: bytes, status: int
) -> None:
    large = bytes(LARGE_BYTES)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (LARGE_BYTES, large)
    framings = {b"Content-Length: %d" % LARGE_BYTES: large, b"Transfer-Encoding: chunked": chunks}
    for framing, body in framings.items():
        with server.connect() as connection:
            connection.sendall(b"%b\r\nHost: x\r\n%b\r\n\r\n" % (line, framing))
            connection.sendall(body)  # it is read, though it is not wanted
            head, _, text = read_to_end(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), framing
        assert json.loads(text)["detail"], framing


def test_clients_that_keep_the_server_waiting_for_too_long_are_let_go() -> None:
    limits = ("HEAD_TIMEOUT_SECONDS", "BODY_PAUSE_SECONDS", "RESULT_UNREAD_SECONDS", "IDLE_SECONDS")
    with contextlib.ExitStack() as stack:
        numbers = {**QUICK_NUMBERS, **dict.fromkeys(limits, 1.0)}
        server = stack.enter_context(serve(MEETING, "Meeting", numbers))
        clients = [stack.enter_context(server.connect()) for _ in range(5)]
        idle, kept, half_head, half_body, unread = clients
        idle.sendall(PROBE)
        half_head.sendall(b"PUT /bucket/object HTTP/1.1\r\nHo")
        half_body.sendall(b"PUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhello")
        unread.sendall(PUT_HELLO % b"?etl_args=large")
        for _ in range(10):
            be_quick(kept, 1)
            time.sleep(0.25)  # 2.5 s in all: it is never idle for as long as the limit
        assert read_to_end(idle).endswith(b"Running"), "an idle connection is closed"
        assert read_to_end(half_head).startswith(b"HTTP/1.1 408 ")
        assert not read_to_end(half_body).startswith(b"HTTP/1.1 200 ")
        assert len(read_to_end(unread)) < VERY_LARGE_BYTES, "a result that nobody reads is cut"


@pytest.mark.slow
def test_a_head_has_thirty_seconds_to_come_but_not_many_more() -> None:
    with serve(SLEEPER, "Sleeper", None) as server, server.connect(timeout=75) as client:
        begun = time.monotonic()
        client.sendall(b"PUT /bucket/object HTTP/1.1\r\nHo")
        assert read_to_end(client).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begun > 25


# == Broken off ==


def test_a_connection_without_a_request_that_ends_leaves_no_line_in_the_log(server: Server) -> None:
    lines = len(server.lines)
    for request, pause, resets in itertools.product((b"", PROBE), (0.0, 0.1), (False, True)):
        with server.connect() as connection:
            connection.sendall(request)
            time.sleep(pause)
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    time.sleep(0.3)
    assert server.lines[lines:] == []


def test_a_body_whose_client_goes_away_is_not_transformed(server: Server) -> None:
    calls = count_of_calls(server)
    halves = (b"Content-Length: 10\r\n\r\nhello",
              b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    for half, pause, resets in itertools.product(halves, (0.0, 0.1), (False, True)):
        with server.connect() as connection:
            connection.sendall(b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\n" + half)
            time.sleep(pause)
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    time.sleep(0.3)
    assert count_of_calls(server) == calls


def test_a_client_that_goes_away_during_the_transform_does_no_harm(
    server: Server, tmp_path: Path
) -> None:
    for resets in (False, True):
        gate = tmp_path / str(resets)
        with server.connect() as connection:
            connection.sendall(PUT_HELLO % b"?etl_args=%b" % str(gate).encode())
            time.sleep(0.1)
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        gate.touch()
        assert server.request("PUT", "/bucket/object", b"hello").body == b"hello"


def test_a_client_that_goes_away_during_the_answer_does_no_harm(server: Server) -> None:
    for _ in range(3):
        with server.connect() as connection:
            connection.sendall(b"PUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LARGE_BYTES)
            connection.sendall(bytes(LARGE_BYTES))
            connection.recv(1000)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    assert server.request("PUT", "/bucket/object", b"hello").body == b"hello"


# == Both protocols ==


@pytest.mark.parametrize("family, address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_both_loopbacks_are_listened_on(server: Server, family: int, address: str) -> None:
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError:
        pytest.skip("this machine has no %s" % address)
    with keeping(server, address) as connection:
        assert exchange(connection, b"hello") == b"hello"
        assert exchange(connection, b"world") == b"world"


# == The lead ==

MEETING = '''
import threading, time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Meeting(HTTPMultiThreadedServer):
    """Is quick, unless the arguments say: meet (wait for all who do), spin or burn (compute, long or briefly), large."""

    def __init__(self):
        super().__init__()
        self.barrier = threading.Barrier(8)

    def transform(self, data, path, etl_args):
        if etl_args == "meet":
            self.barrier.wait(30)
        if etl_args in ("spin", "burn"):
            end = time.monotonic() + (0.5 if etl_args == "spin" else 0.0003)
            while time.monotonic() < end:
                pass
        return bytes(16 << 20) if etl_args == "large" else data
'''
MEETING_SIZE = 8
VERY_LARGE_BYTES = 16 << 20  # more than the buffers of a connection ever hold
TRIAL_SECONDS = 1.2  # after which a leader that was held up is tried again
PUT_HELLO = b"PUT /bucket/object%s HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
PUT_HELLO_CHUNKED = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
WHOLE_ANSWER = b"\r\n\r\nhello"


@pytest.fixture(scope="module")
def meeting() -> Iterator[Server]:
    """One worker whose class is quick but for some objects."""
    with serve(MEETING, "Meeting") as runtime:
        yield runtime


def read_answers(connection: socket.socket, count: int) -> bytes:
    """Read so many answers to PUT_HELLO, and nothing behind them."""
    data = b""
    while data.count(WHOLE_ANSWER) < count:
        received = connection.recv(65536)
        assert received, "the connection ended after %r" % data
        data += received
    assert data.endswith(WHOLE_ANSWER) and data.count(b"HTTP/1.1 200 ") == count
    return data


def be_quick(connection: socket.socket, times: int = 50) -> None:
    """Have quick requests served, so that the leader comes to serve them itself."""
    for _ in range(times):
        connection.sendall(PUT_HELLO % b"")
        read_answers(connection, 1)


def test_requests_that_wait_for_each_other_are_served_at_once_and_quick_ones_meanwhile(
    meeting: Server
) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(meeting.connect(timeout=40)) for _ in range(MEETING_SIZE)]
        for pause in (0.0, TRIAL_SECONDS):
            be_quick(clients[0])
            time.sleep(pause)
            for client in clients[1:]:
                client.sendall(PUT_HELLO % b"?etl_args=meet")
            be_quick(clients[0])  # while all others wait for it
            assert_healthy(meeting)
            clients[0].sendall(PUT_HELLO % b"?etl_args=meet")
            for client in clients:
                read_answers(client, 1)


def test_a_request_that_holds_the_interpreter_lock_does_not_hold_up_a_probe(meeting: Server) -> None:
    with meeting.connect(timeout=40) as client:
        be_quick(client)
        client.sendall(PUT_HELLO % b"?etl_args=spin")
        assert_healthy(meeting)
        read_answers(client, 1)


def test_a_row_of_requests_of_all_kinds_on_one_connection_is_answered_in_order(meeting: Server) -> None:
    whole = PUT_HELLO % b""
    with meeting.connect(timeout=40) as client:
        be_quick(client)
        client.sendall((whole + PUT_HELLO_CHUNKED) * 20 + whole[:30])
        read_answers(client, 40)
        client.sendall(whole[30:] + whole)
        read_answers(client, 2)


def test_a_request_that_lost_the_lead_is_answered_though_the_server_drains() -> None:
    with serve(MEETING, "Meeting") as runtime:
        with runtime.connect(timeout=40) as client, runtime.connect(timeout=40) as other:
            be_quick(client)
            client.sendall(PUT_HELLO % b"?etl_args=spin")
            be_quick(other, 1)  # by now the first is being served, or has been
            os.kill(runtime.pid, signal.SIGTERM)
            read_answers(client, 1)
        assert runtime.wait() == 0


ALONE = '''
import os, threading, time
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer

class Alone(FastAPIServer):
    """Checks that it is called on the main thread alone; arguments: seconds, a file, or "large"."""

    is_busy = False

    def transform(self, data, path, etl_args):
        assert threading.current_thread() is threading.main_thread() and not self.is_busy
        self.is_busy = True
        if etl_args.startswith("/"):
            while not os.path.exists(etl_args):
                time.sleep(0.01)
        elif etl_args != "large":
            time.sleep(float(etl_args or 0))
        self.is_busy = False
        return bytes(16 << 20) if etl_args == "large" else data
'''


@pytest.fixture(scope="module")
def alone() -> Iterator[Runtime]:
    """One worker whose class is called on the main thread alone."""
    with serve(ALONE, "Alone") as runtime:
        yield runtime


def test_the_main_thread_serves_requests_of_all_kinds_in_order(alone: Runtime) -> None:
    slow = PUT_HELLO % b"?etl_args=0.02"  # which loses the lead
    with alone.connect(timeout=40) as client:
        for pause in (0.0, TRIAL_SECONDS):
            time.sleep(pause)
            be_quick(client)
            client.sendall((PUT_HELLO % b"" + PUT_HELLO_CHUNKED + slow) * 5)
            read_answers(client, 15)


def test_a_slow_object_on_the_main_thread_holds_up_no_probe_and_no_large_body(
    alone: Runtime, tmp_path: Path
) -> None:
    large = os.urandom(LARGE_BYTES)
    with alone.connect(timeout=40) as client, ThreadPoolExecutor(4) as pool:
        for name in ("first", "second"):
            be_quick(client)
            with waiting(alone, tmp_path / name, [b"hello"]):
                put = functools.partial(alone.request, "PUT", "/bucket/object", large)
                others = [pool.submit(put) for _ in range(4)]
                for _ in range(3):
                    assert_healthy(alone)
            assert all(other.result().body == large for other in others)


def test_small_and_large_bodies_take_turns_on_the_main_thread(alone: Runtime) -> None:
    large, done, counts = os.urandom(LARGE_BYTES), threading.Event(), [0] * 8

    def ask(place: int) -> None:
        while not done.is_set():
            if place % 2:
                assert alone.request("PUT", "/bucket/object", large).body == large
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
    with alone.connect(timeout=40) as client, contextlib.ExitStack() as stack:
        be_quick(client)
        for _ in range(3):
            silent = stack.enter_context(alone.connect())
            silent.sendall(PUT_HELLO % b"?etl_args=large")
            assert select.select([silent], [], [], PROBE_SECONDS)[0]  # its answer has begun
            client.settimeout(PROBE_SECONDS)
            be_quick(client)


@pytest.mark.parametrize("where", ["alone", "meeting"])
def test_an_answer_that_is_too_large_to_be_sent_at_once_is_whole(request: pytest.FixtureRequest, where: str) -> None:
    server: Runtime = request.getfixturevalue(where)
    with server.connect(timeout=40) as client:
        for _ in range(2):
            be_quick(client)
            client.sendall(PUT_HELLO % b"?etl_args=large" + PUT_HELLO % b"")
            data = bytearray()
            while not data.endswith(WHOLE_ANSWER):
                received = client.recv(1 << 20)
                assert received, "the connection ended after %d bytes" % len(data)
                data += received
            head, _, body = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ") and body.startswith(bytes(VERY_LARGE_BYTES) + b"HTTP/1.1 200 ")


def test_another_node_that_is_silent_keeps_nobody_from_the_main_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as stack:
        url = "http://127.0.0.1:%d" % silent.getsockname()[1]
        runtime = stack.enter_context(serve(ALONE, "Alone", AIS_TARGET_URL=url + "/v1/etl/x"))
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


@pytest.mark.parametrize("seconds", [b"0", b"0.1"])
def test_what_the_main_thread_has_begun_is_answered_though_the_server_drains(
    seconds: bytes
) -> None:
    with serve(ALONE, "Alone") as runtime, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(runtime.connect(timeout=40)) for _ in range(8)]
        be_quick(clients[0])
        for client in clients:
            client.sendall(PUT_HELLO % (b"?etl_args=" + seconds))
        time.sleep(0.2)  # now all have come
        os.kill(runtime.pid, signal.SIGTERM)
        for client in clients:
            read_answers(client, 1)
        assert runtime.wait(10) == 0


def test_an_idle_main_thread_that_leads_hears_of_the_end() -> None:
    with serve(ALONE, "Alone") as runtime, runtime.connect(timeout=40) as client:
        be_quick(client)
        time.sleep(1.5)  # now nobody watches it
        be_quick(client, 1)
        assert runtime.terminate(5) == 0


def test_new_clients_do_not_wait_for_those_that_are_always_busy(meeting: Server) -> None:
    busy = PUT_HELLO % b"?etl_args=burn"  # about as long as a request may take that the leader serves itself
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as prober:
        clients = [stack.enter_context(meeting.connect(timeout=40)) for _ in range(200)]
        probe = prober.submit(assert_healthy, meeting)
        for client in clients:
            client.sendall(busy)
        waiting, deadline = set(clients), time.monotonic() + PROBE_SECONDS
        while waiting:
            assert time.monotonic() < deadline, "%d clients are not answered" % len(waiting)
            # Who has an answer asks again at once.
            for client in select.select(clients, [], [], 1)[0]:
                client.recv(65536)
                client.sendall(busy)
                waiting.discard(client)
        probe.result()


def test_clients_that_keep_asking_are_not_closed_where_files_run_out(few_files: Server) -> None:
    first_line, answers, done = len(few_files.lines), [], threading.Event()

    def ask(client: socket.socket) -> None:
        while not done.is_set():
            client.sendall(PUT_HELLO % b"")
            answers.append(read_answers(client, 1))

    with contextlib.ExitStack() as stack:
        active = [stack.enter_context(few_files.connect(timeout=10)) for _ in range(10)]
        with ThreadPoolExecutor(len(active)) as clients:
            asking = [clients.submit(ask, client) for client in active]
            try:
                while not lacks_files(few_files, first_line):
                    stack.enter_context(few_files.connect(timeout=PROBE_SECONDS))
                    count = len(answers)
                    while len(answers) < count + len(active) and not any(future.done() for future in asking):
                        time.sleep(0.001)
            finally:
                done.set()
            for future in asking:
                assert future.exception() is None
