"""A running server and its connections: kept, idle, slow, many at once, broken off, over both protocols."""
import contextlib
import http.client
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, List, Optional

import pytest

from ais_runtime_min import LINGER_SECONDS, ThreadPool
from harness import RUNTIME, SERVING, Body, Runtime, Server, exact_environment, interpreter, make_payload

SLOTS = 2
PROBE_SECONDS = 5.0  # a kubelet waits no longer
AT_ONCE_SECONDS = 0.5  # what needs no transform is answered within
LARGE_BYTES = 8 << 20  # more than the buffers of a connection hold
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST

SLEEPER = '''
import threading, time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Sleeper(HTTPMultiThreadedServer):
    """Sleeps for as many seconds as the arguments tell, then gives the object back; /count gives the number of calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.running = self.most = 0
        self.lock = threading.Lock()

    def transform(self, data, path, etl_args):
        if path in ("/count", "/most"):
            return b"%d" % (self.calls if path == "/count" else self.most)
        with self.lock:
            self.calls += 1
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(float(etl_args or 0))
        with self.lock:
            self.running -= 1
        return data
'''


def assert_healthy_at_once(server: Server) -> None:
    """Check that a probe does not wait."""
    begun = time.monotonic()
    response = server.request("GET", "/health", timeout=5)
    assert (response.status, response.body) == (200, b"Running")
    assert time.monotonic() - begun < AT_ONCE_SECONDS


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One worker with few slots for transforms, so that they can all be busy."""
    env = {"ETL_CLASS_PAYLOAD": make_payload(SLEEPER, "Sleeper"), "NUM_WORKERS": "1", "NUM_THREADS": str(SLOTS)}
    with Runtime(env=env) as runtime:
        yield runtime


@pytest.fixture(autouse=True)
def lives_on(server: Server) -> Iterator[None]:
    """Whatever a test does, the server answers afterwards."""
    yield
    assert_healthy_at_once(server)


@contextlib.contextmanager
def keeping(server: Server) -> Iterator[http.client.HTTPConnection]:
    """Make a client that reuses its connection, and fails where that is not possible."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
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


def count_of_calls(server: Server) -> int:
    """Ask how often the class was called for an object."""
    return int(server.request("PUT", "/count").body)


# == Kept connections ==


def test_a_connection_serves_many_requests(server: Server) -> None:
    with keeping(server) as connection:
        for number in range(20):
            body = b"%d" % number * number * 1000
            assert exchange(connection, body) == body


def test_a_connection_that_was_idle_is_good_for_more(server: Server) -> None:
    with keeping(server) as connection:
        for pause in (0, 1.0, 0.1, 1.0, 0):
            time.sleep(pause)
            assert exchange(connection, b"hello") == b"hello"


def test_a_connection_may_be_idle_before_its_first_request(server: Server) -> None:
    with keeping(server) as connection:
        time.sleep(0.5)
        assert exchange(connection, b"hello") == b"hello"


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


@pytest.mark.parametrize("body", [bytes(range(256)) * (LARGE_BYTES // 256), [b"x" * 70000, b"y" * LARGE_BYTES, b"z"]],
                         ids=["whole", "chunked"])  # the name of a test is in the environment, which must be small
def test_a_large_object_comes_whole_and_goes_whole(server: Server, body: Body) -> None:
    response = server.request("PUT", "/bucket/object", body)
    assert response.status == 200
    assert response.body == (body if isinstance(body, bytes) else b"".join(body))


# == Many connections ==


def test_two_hundred_idle_connections_are_in_nobodys_way(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(200)]
        for connection in idle[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        for connection in idle[::2]:
            assert read_to_mark(connection, b"Running").startswith(b"HTTP/1.1 200 ")
        assert_healthy_at_once(server)
        time.sleep(0.2)  # all are parked by now
        assert_healthy_at_once(server)
        for connection in idle:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_to_mark(connection, b"Running").startswith(b"HTTP/1.1 200 ")


def test_requests_beyond_the_slots_wait_their_turn_and_probes_do_not(server: Server) -> None:
    bodies = [b"%d" % number for number in range(6 * SLOTS)]
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = [clients.submit(server.request, "PUT", "/bucket/object?etl_args=0.2", body) for body in bodies]
        time.sleep(0.1)
        for _ in range(5):
            assert_healthy_at_once(server)
            assert server.request("DELETE", "/bucket/object").status == 405
            time.sleep(0.1)
        assert [answer.result().body for answer in answers] == bodies
    assert 1 <= int(server.request("PUT", "/most").body) <= SLOTS


def test_a_storm_of_new_connections_is_answered(server: Server) -> None:
    bodies = [b"%d" % number for number in range(400)]
    with ThreadPoolExecutor(40) as clients:
        answers = list(clients.map(lambda body: server.request("PUT", "/bucket/object", body), bodies))
    assert [answer.body for answer in answers] == bodies


def test_clients_that_say_half_a_head_hold_up_nobody(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(server.connect()).sendall(b"PUT /bucket/object HTTP/1.1\r\nHo")
        for _ in range(5):
            assert server.request("PUT", "/bucket/object", b"hello").body == b"hello"
            assert_healthy_at_once(server)


def test_clients_that_send_half_a_body_take_no_slot(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(10 * SLOTS):
            stack.enter_context(server.connect()).sendall(b"PUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhello")
        for _ in range(5):
            assert server.request("PUT", "/bucket/object", b"hello", timeout=5).body == b"hello"


# == Few files ==

FILES = 128  # a pod cannot raise its hard limit
VERY_FEW_FILES = 40


@contextlib.contextmanager
def with_files(limit: int) -> Iterator[Server]:
    """Start one worker that may have so many files open."""
    python = interpreter("slim")
    env = {"ETL_CLASS_PAYLOAD": make_payload(SLEEPER, "Sleeper"), "NUM_WORKERS": "1"}
    command = ["/bin/sh", "-c", 'ulimit -n %d && exec "$@"' % limit, "sh", python, str(RUNTIME)]
    with Server(command, exact_environment(python, env)) as server:
        server.port = int(server.wait_for_line(SERVING)[1])
        yield server


@pytest.fixture
def few_files() -> Iterator[Server]:
    """One worker that may have few files open."""
    with with_files(FILES) as server:
        yield server


def is_open(connection: socket.socket) -> bool:
    """Tell whether the other end has not closed a connection on which nothing is to come."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("greeting", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["silent", "kept"])
def test_new_clients_are_served_where_idle_ones_have_taken_all_files(few_files: Server, greeting: bytes) -> None:
    with contextlib.ExitStack() as stack:
        idle = []
        for _ in range(2 * FILES):
            idle.append(stack.enter_context(few_files.connect()))
            if greeting:
                idle[-1].sendall(greeting)
                assert read_to_mark(idle[-1], b"Running").startswith(b"HTTP/1.1 200 ")
        for number in range(FILES):
            begun = time.monotonic()
            assert few_files.request("PUT", "/bucket/object", b"%d" % number, timeout=PROBE_SECONDS).body == b"%d" % number
            assert time.monotonic() - begun < PROBE_SECONDS
        states = [is_open(connection) for connection in idle]
    assert states[:FILES // 2] == [False] * (FILES // 2), "those that were idle for the longest time are closed"
    assert states[-FILES // 8:] == [True] * (FILES // 8), "and no more of them than is needed"
    few_files.wait_for_line("could not be accepted", 1)


def test_a_connection_with_a_request_under_way_is_not_closed_for_want_of_files(few_files: Server) -> None:
    with ThreadPoolExecutor(8) as clients, contextlib.ExitStack() as stack:
        answers = [clients.submit(few_files.request, "PUT", "/bucket/object?etl_args=2", b"%d" % number) for number in range(8)]
        time.sleep(0.3)
        for _ in range(2 * FILES):
            stack.enter_context(few_files.connect())
        assert few_files.request("GET", "/health", timeout=PROBE_SECONDS).body == b"Running"
        assert [answer.result().body for answer in answers] == [b"%d" % number for number in range(8)]


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


def test_idle_clients_that_send_again_just_when_files_run_out_cost_no_request_that_is_under_way() -> None:
    probe = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with with_files(VERY_FEW_FILES) as server, ThreadPoolExecutor(1) as client, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(server.connect(timeout=PROBE_SECONDS)) for _ in range(VERY_FEW_FILES // 2)]
        answer = client.submit(server.request, "PUT", "/bucket/object?etl_args=2", b"hello")
        time.sleep(0.1)
        while "could not be accepted" not in server.log():
            assert len(kept) < 2 * VERY_FEW_FILES, "there is no lack of files"
            with paused(server):  # one round more than fits finds a new client before those that were idle
                kept.append(stack.enter_context(server.connect(timeout=PROBE_SECONDS)))
                for connection in kept:
                    connection.sendall(probe)
            kept = [connection for connection in kept if is_answered(connection)]
            time.sleep(3 * LINGER_SECONDS)  # no thread waits for more from them
        assert answer.result().body == b"hello", "its worker is gone"
        assert server.request("GET", "/health", timeout=PROBE_SECONDS).body == b"Running"
        assert "starting another" not in server.log()


# == Slow and early ==


@pytest.mark.parametrize("pause", [0.01, 0.1])
def test_a_slow_head_and_a_slow_body_are_waited_for(server: Server, pause: float) -> None:
    request = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nhello!"
    answer = server.raw([request[start:start + 6] for start in range(0, len(request), 6)], pause, quiet=0.2)
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


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("method, path, status", [
    ("PUT", "/", 404), ("POST", "/bucket/object", 405), ("DELETE", "/health", 405), ("POST", "/download", 400),
    ("PUT", "/bucket/object?etl_fqn=/nowhere/@ais/bucket/%25ob/object", 404),
])
def test_an_early_error_reaches_a_client_that_still_sends(
    server: Server, method: str, path: str, status: int, is_chunked: bool
) -> None:
    body: Body = [bytes(1 << 20)] * 8 if is_chunked else bytes(LARGE_BYTES)
    response = server.request(method, path, body)
    assert response.status == status
    assert json.loads(response.body)["detail"]


def test_a_refused_framing_reaches_a_client_that_still_sends(server: Server) -> None:
    headers = {"Content-Length": str(LARGE_BYTES), "Transfer-Encoding": "chunked"}
    response = server.request("PUT", "/bucket/object", bytes(LARGE_BYTES), headers)
    assert response.status == 400
    assert json.loads(response.body)["detail"]


# == Broken off ==


def test_an_empty_connection_leaves_no_line_in_the_log(server: Server) -> None:
    lines = len(server.lines)
    for _ in range(5):
        server.connect().close()
    with server.connect():
        time.sleep(0.1)
    time.sleep(0.2)
    assert server.lines[lines:] == []


def test_a_connection_that_is_reset_leaves_no_line_in_the_log(server: Server) -> None:
    lines = len(server.lines)
    for request in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        for pause in (0.0, 0.1):
            with server.connect() as connection:
                connection.sendall(request)
                time.sleep(pause)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    time.sleep(0.2)
    assert server.lines[lines:] == []


@pytest.mark.parametrize("sent", [b"Content-Length: 10\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"])
@pytest.mark.parametrize("resets", [False, True])
def test_a_body_whose_client_goes_away_is_not_transformed(server: Server, sent: bytes, resets: bool) -> None:
    calls = count_of_calls(server)
    for pause in (0.0, 0.1):
        with server.connect() as connection:
            connection.sendall(b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\n" + sent)
            time.sleep(pause)
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    time.sleep(0.2)
    assert count_of_calls(server) == calls


@pytest.mark.parametrize("resets", [False, True])
def test_a_client_that_goes_away_during_the_transform_does_no_harm(server: Server, resets: bool) -> None:
    with server.connect() as connection:
        connection.sendall(b"PUT /bucket/object?etl_args=0.3 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
        time.sleep(0.1)
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    time.sleep(0.4)
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


def local_address(family: int, address: str) -> Optional[str]:
    """Return the address if this machine has it."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return None
    return address


@pytest.mark.parametrize("family, address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_both_loopbacks_are_listened_on(server: Server, family: int, address: str) -> None:
    if not local_address(family, address):
        pytest.skip("this machine has no %s" % address)
    with contextlib.closing(http.client.HTTPConnection(address, server.port, timeout=5)) as connection:
        assert exchange(connection, b"hello") == b"hello"
        assert exchange(connection, b"world") == b"world"


def test_connections_in_many_threads_do_not_mix_their_answers(server: Server) -> None:
    failures: List[str] = []

    def talk(name: bytes) -> None:
        with keeping(server) as connection:
            for number in range(30):
                body = b"%b %d " % (name, number) * (1 + 50 * (number % 7))
                if exchange(connection, body) != body:
                    failures.append(body.decode())

    threads = [threading.Thread(target=talk, args=(b"%d" % number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


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
        return bytes(32 << 20) if etl_args == "large" else data
'''
MEETING_SIZE = 8
VERY_LARGE_BYTES = 32 << 20  # more than the buffers of a connection ever hold
PUT_HELLO = b"PUT /bucket/object%s HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
PUT_HELLO_CHUNKED = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
WHOLE_ANSWER = b"\r\n\r\nhello"


@pytest.fixture(scope="module")
def meeting() -> Iterator[Server]:
    """One worker whose class is quick but for some objects."""
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(MEETING, "Meeting"), "NUM_WORKERS": "1"}) as runtime:
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


def test_requests_that_wait_for_each_other_are_served_at_the_same_time(meeting: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(meeting.connect(timeout=40)) for _ in range(MEETING_SIZE)]
        for _ in range(3):
            for client in clients:
                be_quick(client)
            time.sleep(1.2)  # in which a leader that was held up is tried again
            for client in clients:
                client.sendall(PUT_HELLO % b"?etl_args=meet")
            for client in clients:
                read_answers(client, 1)


def test_quick_requests_behind_one_that_waits_are_answered_meanwhile(meeting: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(meeting.connect(timeout=40)) for _ in range(MEETING_SIZE)]
        be_quick(clients[0])
        time.sleep(1.2)
        for client in clients[1:]:
            client.sendall(PUT_HELLO % b"?etl_args=meet")
        be_quick(clients[0])  # while all others wait for it
        assert meeting.request("GET", "/health", timeout=PROBE_SECONDS).body == b"Running"
        clients[0].sendall(PUT_HELLO % b"?etl_args=meet")
        for client in clients:
            read_answers(client, 1)


def test_a_request_that_holds_the_interpreter_lock_does_not_hold_up_a_probe(meeting: Server) -> None:
    with meeting.connect(timeout=40) as client:
        be_quick(client)
        client.sendall(PUT_HELLO % b"?etl_args=spin")
        assert meeting.request("GET", "/health", timeout=PROBE_SECONDS).body == b"Running"
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
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(MEETING, "Meeting"), "NUM_WORKERS": "1"}) as runtime:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(runtime.connect(timeout=40)) for _ in range(MEETING_SIZE)]
            be_quick(clients[0])
            for client in clients[:-1]:
                client.sendall(PUT_HELLO % b"?etl_args=meet")
            be_quick(clients[-1])
            clients[-1].sendall(PUT_HELLO % b"?etl_args=meet")
            for client in clients:
                read_answers(client, 1)
            clients[0].sendall(PUT_HELLO % b"?etl_args=spin")
            be_quick(clients[1], 1)  # by now the other is being served, or has been
            os.kill(runtime.pid, signal.SIGTERM)
            read_answers(clients[0], 1)
        assert runtime.wait() == 0


ALONE = '''
import threading, time
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer

class Alone(FastAPIServer):
    """Sees to it that it is called on the main thread, one object at a time; arguments: seconds to sleep, or "large"."""

    is_busy = False

    def transform(self, data, path, etl_args):
        assert threading.current_thread() is threading.main_thread() and not self.is_busy
        self.is_busy = True
        time.sleep(float(etl_args or 0) if etl_args != "large" else 0)
        self.is_busy = False
        return bytes(32 << 20) if etl_args == "large" else data
'''


@pytest.fixture
def alone() -> Iterator[Runtime]:
    """One worker whose class is called on the main thread alone."""
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(ALONE, "Alone"), "NUM_WORKERS": "1"}) as runtime:
        yield runtime


def test_the_main_thread_serves_requests_of_all_kinds_in_order(alone: Runtime) -> None:
    slow = PUT_HELLO % b"?etl_args=0.02"  # which loses the lead
    with alone.connect(timeout=40) as client:
        for _ in range(3):
            be_quick(client)
            client.sendall((PUT_HELLO % b"" + PUT_HELLO_CHUNKED + slow) * 5)
            read_answers(client, 15)
            time.sleep(1.2)  # the main thread leads again


def test_a_slow_object_on_the_main_thread_holds_up_no_probe_and_no_large_body(alone: Runtime) -> None:
    large = os.urandom(LARGE_BYTES)
    with alone.connect(timeout=40) as client, ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            be_quick(client)
            client.sendall(PUT_HELLO % b"?etl_args=3")
            others = [pool.submit(alone.request, "PUT", "/bucket/object", large) for _ in range(8)]
            assert alone.request("GET", "/health", timeout=PROBE_SECONDS).body == b"Running"
            assert not select.select([client], [], [], 0)[0]  # the probe was not behind the object
            read_answers(client, 1)
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
            assert alone.request("GET", "/health", timeout=PROBE_SECONDS).body == b"Running"
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
        for _ in range(3):
            be_quick(client)
            client.sendall(PUT_HELLO % b"?etl_args=large" + PUT_HELLO % b"")
            data = bytearray()
            while not data.endswith(WHOLE_ANSWER):
                received = client.recv(1 << 20)
                assert received, "the connection ended after %d bytes" % len(data)
                data += received
            head, _, body = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ") and body.startswith(bytes(VERY_LARGE_BYTES) + b"HTTP/1.1 200 ")


@pytest.mark.parametrize("request_line", [
    b"GET /bucket/object?etl_fqn=/x&latest-ver=true", b"GET /bucket/object?etl_fqn=", b"GET /bucket/etl_fqn",
    b"POST /download?original_url=%b/x&object_to=etl_fqn"])
def test_another_node_that_is_silent_keeps_nobody_from_the_main_thread(request_line: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d" % silent.getsockname()[1]
        env = {"ETL_CLASS_PAYLOAD": make_payload(ALONE, "Alone"), "NUM_WORKERS": "1", "AIS_TARGET_URL": url + "/v1/etl/x"}
        with Runtime(env=env) as runtime, runtime.connect(timeout=PROBE_SECONDS) as client, runtime.connect() as other:
            be_quick(client)
            line = request_line.replace(b"%b", url.encode())
            other.sendall(line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert select.select([silent], [], [], PROBE_SECONDS)[0]  # it is asked
            be_quick(client)


@pytest.mark.parametrize("seconds", [b"0", b"0.5"])
def test_what_the_main_thread_has_begun_is_answered_though_the_server_drains(alone: Runtime, seconds: bytes) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(alone.connect(timeout=40)) for _ in range(8)]
        be_quick(clients[0])
        for client in clients:
            client.sendall(PUT_HELLO % (b"?etl_args=" + seconds))
        time.sleep(0.2)  # now all have come
        begin = time.monotonic()
        os.kill(alone.pid, signal.SIGTERM)
        for client in clients:
            read_answers(client, 1)
        assert alone.wait() == 0
        assert time.monotonic() - begin < 10


def test_an_idle_main_thread_that_leads_hears_of_the_end(alone: Runtime) -> None:
    with alone.connect(timeout=40) as client:
        be_quick(client)
        time.sleep(1.5)  # now nobody watches it
        be_quick(client, 1)
        begin = time.monotonic()
        assert alone.terminate() == 0
        assert time.monotonic() - begin < 5


def test_new_clients_do_not_wait_for_those_that_are_always_busy() -> None:
    busy = PUT_HELLO % b"?etl_args=burn"  # about as long as a request may take that the leader serves itself
    with Runtime(env={"ETL_CLASS_PAYLOAD": make_payload(MEETING, "Meeting"), "NUM_WORKERS": "1"}) as runtime:
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as prober:
            clients = [stack.enter_context(runtime.connect(timeout=40)) for _ in range(200)]
            probe = prober.submit(runtime.request, "GET", "/health", timeout=PROBE_SECONDS)
            for client in clients:
                client.sendall(busy)
            waiting, deadline = set(clients), time.monotonic() + PROBE_SECONDS
            while waiting:
                assert time.monotonic() < deadline, "%d clients are not answered" % len(waiting)
                for client in select.select(clients, [], [], 1)[0]:  # who has an answer asks again at once
                    client.recv(65536)
                    client.sendall(busy)
                    waiting.discard(client)
            assert probe.result().body == b"Running"


def test_clients_that_keep_asking_are_not_closed_where_files_run_out() -> None:
    answers = []

    def ask(client: socket.socket) -> None:
        while not done.is_set():
            client.sendall(PUT_HELLO % b"")
            answers.append(read_answers(client, 1))

    done = threading.Event()
    with with_files(VERY_FEW_FILES) as server, contextlib.ExitStack() as stack:
        active = [stack.enter_context(server.connect(timeout=10)) for _ in range(VERY_FEW_FILES // 4)]
        with ThreadPoolExecutor(len(active)) as clients:
            asking = [clients.submit(ask, client) for client in active]
            try:
                while "could not be accepted" not in server.log():
                    stack.enter_context(server.connect(timeout=PROBE_SECONDS))
                    count = len(answers)
                    while len(answers) < count + len(active) and not any(future.done() for future in asking):
                        time.sleep(0.001)
            finally:
                done.set()
            for future in asking:
                assert future.exception() is None


def test_a_pool_that_never_had_a_thread_is_not_exhausted_but_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = ThreadPool(8, print)
    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            pool.submit()
        assert not pool.is_exhausted
    monkeypatch.undo()
    pool.start_spare()
    monkeypatch.setattr(threading.Thread, "start", fail)
    pool.submit()  # for which there is a thread already
    pool.wait_until_quiet(time.monotonic() + PROBE_SECONDS)
    assert not pool.busy
