"""The stand-in does what it is told: a judge that errs would let the runtime err."""
import contextlib
import http.client
import socket
import ssl
import threading
import time
from typing import Callable, Optional

import pytest

from standin import BASE_PATH, At, Behaviour, Certificates, StandInTarget

StartTarget = Callable[..., StandInTarget]
OBJECT = "/ais%2F@%23%2Fbck%2Fobj"
PUT = b"PUT %s%s?uuid=1 HTTP/1.1\r\nHost: x\r\n" % (BASE_PATH.encode(), OBJECT.encode())
WHOLE_PUT = PUT + b"Content-Length: 6\r\n\r\nabcdef"
GET = PUT.replace(b"PUT", b"GET") + b"\r\n"
HEAD_FOR_THREE_BYTES = b"HTTP/1.1 200 Stand-in\r\nContent-Length: 3\r\n\r\n"


def dial(target: StandInTarget, context: Optional[ssl.SSLContext] = None) -> socket.socket:
    """Connect to a stand-in."""
    plain = socket.create_connection(("127.0.0.1", target.port), timeout=10)
    return context.wrap_socket(plain, server_hostname="127.0.0.1") if context else plain


def everything_from(connection: socket.socket) -> bytes:
    """Read until the peer closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def exchange(target: StandInTarget, data: bytes) -> bytes:
    """Send bytes and read until the peer closes, which it does once we have sent all."""
    with dial(target) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return everything_from(connection)


def answer(target: StandInTarget, data: bytes) -> http.client.HTTPResponse:
    """Send a request and read the head of its answer; the connection stays open."""
    with dial(target) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response


# == A good target ==


def test_serves_objects_by_their_raw_path_and_nothing_else(target: StandInTarget) -> None:
    target.objects[OBJECT] = b"content"
    assert answer(target, GET).read() == b"content"
    assert answer(target, GET.replace(b"%2F", b"%2f")).status == 404
    assert answer(target, GET.replace(b"s3cr3t", b"guess")).status == 404


@pytest.mark.parametrize("body, cut_body", [
    (b"Content-Length: 6\r\n\r\nabcdef", b"Content-Length: 6\r\n\r\nabc"),
    (b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n4\r\ncdef\r\n0\r\n\r\n",
     b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"),
])
def test_stores_a_body_that_comes_in_pieces_and_records_one_that_is_cut_short_as_such(
    target: StandInTarget, body: bytes, cut_body: bytes
) -> None:
    with dial(target) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size in (1, 2, 3, 64, 1000):
            for start in range(0, len(PUT + body), size):
                connection.sendall((PUT + body)[start:start + size])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert (target.stored.popitem(), target.stored) == ((OBJECT, b"abcdef"), {}), size
            recorded = target.requests.pop()
            assert (recorded.method, recorded.complete) == ("PUT", True)
            assert recorded.target == BASE_PATH + OBJECT + "?uuid=1"
    assert exchange(target, PUT + cut_body) == b""
    recorded, = target.wait_for_requests(1)
    assert (recorded.body, recorded.complete, target.stored) == (b"abc", False, {})


def test_keeps_connections_alive_and_counts_them(target: StandInTarget) -> None:
    assert exchange(target, WHOLE_PUT + GET).count(b"HTTP/1.1 ") == 2
    exchange(target, GET)
    assert target.connections == 2
    assert [request.connection for request in target.requests] == [1, 1, 2]


def test_complains_of_what_is_not_http() -> None:
    target = StandInTarget()
    for nonsense in (
        b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\n\r\n", PUT + b" folded: x\r\n\r\n",
        PUT + b"Content-Length: +6\r\n\r\nabcdef", PUT + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
        PUT + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        PUT + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
    ):
        exchange(target, nonsense)
        assert target.complaints.pop(), nonsense
    target.close()
    assert target.complaints == []


# == Answers on demand ==


def test_answers_what_it_is_told_or_a_function_chooses(target: StandInTarget) -> None:
    for framing in ("length", "chunked", "close"):
        target.script.append(Behaviour(503, (("Ais-Etl-Retry-Reason", "x"),), b"later", framing))
        told = answer(target, WHOLE_PUT)
        assert (told.status, told.headers["Ais-Etl-Retry-Reason"], told.read()) == (503, "x", b"later")
        assert answer(target, WHOLE_PUT).status == 200, "the script is used up"
    target.default = lambda head: Behaviour(201 if head.method == "PUT" else 204, body=bytes.upper)
    assert answer(target, WHOLE_PUT).read() == b"ABCDEF"
    assert answer(target, GET).status == 204
    target.default = Behaviour(200, body=b"abc", declared=5)
    with pytest.raises(http.client.IncompleteRead):
        answer(target, GET).read()


def test_an_early_answer_comes_before_the_body_which_may_stay_unread(target: StandInTarget) -> None:
    target.script.extend([Behaviour(507, early=True), Behaviour(507, early=True, read_on=False)])
    with dial(target) as connection:
        connection.sendall(WHOLE_PUT[:-6])
        assert connection.recv(1000).startswith(b"HTTP/1.1 507 ")
        connection.sendall(b"abcdef")
        assert target.wait_for_requests(1)[0].complete
        connection.sendall(PUT + b"Content-Length: 100000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 507 ")
        connection.settimeout(0.2)
        with pytest.raises(socket.timeout):
            connection.sendall(bytes(100_000_000))
    assert not target.wait_for_requests(2)[1].complete


# == Faults ==


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("point", list(At))
def test_cuts_the_connection_at_each_point(target: StandInTarget, point: At, reset: bool) -> None:
    target.default = Behaviour(200, body=b"xyz", cut=point, reset=reset, after_bytes=2)
    received, was_reset = b"", False
    with dial(target) as connection:
        connection.sendall(WHOLE_PUT)
        try:
            for piece in iter(lambda: connection.recv(1), b""):
                received += piece
        except ConnectionResetError:
            was_reset = True
    head = HEAD_FOR_THREE_BYTES
    ends = {At.IN_ANSWER_HEAD: head[:len(head) // 2], At.IN_ANSWER_BODY: head + b"xy", At.AFTER_ANSWER: head + b"xyz"}
    sent = ends.get(point, b"")
    assert was_reset is reset
    assert sent.startswith(received) if reset else received == sent
    assert target.wait_for_requests(1)[0].complete is (point not in (At.BEFORE_BODY, At.IN_BODY))


def test_stalls_at_each_point_behind_what_is_sent_before_it_and_goes_on(target: StandInTarget) -> None:
    for point in At:
        target.default = Behaviour(200, body=b"xyz", stall=point, stall_seconds=0.1, after_bytes=2)
        start = time.monotonic()
        assert exchange(target, WHOLE_PUT).endswith(b"xyz"), point
        assert time.monotonic() - start >= 0.1, point
    target.default = Behaviour(200, body=b"xyz", stall=At.IN_ANSWER_BODY, stall_seconds=60, after_bytes=2)
    with dial(target) as connection, connection.makefile("rb") as stream:
        connection.sendall(WHOLE_PUT)
        assert stream.read(len(HEAD_FOR_THREE_BYTES) + 2) == HEAD_FOR_THREE_BYTES + b"xy"
        connection.settimeout(0.3)
        with pytest.raises(socket.timeout):
            stream.read(1)


def test_refuses_new_connections_keeps_the_open_ones_and_closes_idle_ones(target: StandInTarget) -> None:
    with dial(target) as connection:
        connection.sendall(GET)
        assert connection.recv(1000)
        target.refuse()
        with pytest.raises(ConnectionRefusedError):
            dial(target)
        target.idle_seconds = 0.2
        connection.sendall(GET)
        assert everything_from(connection).startswith(b"HTTP/1.1 404 ")


def test_leaves_no_thread_whatever_it_is_doing() -> None:
    before = set(threading.enumerate())
    target = StandInTarget()
    target.script.append(Behaviour(stall=At.AFTER_BODY, stall_seconds=60))
    with dial(target) as stalled, dial(target) as idle, dial(target) as in_body:
        stalled.sendall(WHOLE_PUT)
        target.wait_for_requests(1)
        in_body.sendall(WHOLE_PUT[:-1])
        idle.sendall(GET)
        idle.recv(1000)
        start = time.monotonic()
        target.close()
    assert time.monotonic() - start < 2
    assert set(threading.enumerate()) <= before


def test_speaks_tls_and_may_ask_for_a_client_certificate(
    start_target: StartTarget, certificates: Certificates
) -> None:
    context = ssl.create_default_context(cafile=str(certificates.ca))
    open_to_all, strict = (start_target(certificates.server_context(verify)) for verify in (False, True))
    assert open_to_all.url.startswith("https://127.0.0.1:")
    # TLS 1.3 tells a client of its rejection when it reads, some versions by an end of file.
    with contextlib.suppress(OSError), dial(strict, context) as connection:
        connection.sendall(GET)
        assert connection.recv(1000) == b""
    assert strict.requests == []
    context.load_cert_chain(certificates.client, certificates.client_key)
    for target in (open_to_all, strict):
        with dial(target, context) as connection:
            connection.sendall(GET)
            assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
