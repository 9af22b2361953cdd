"""Stage 4, delivering inline: what a client reads, byte for byte, when all goes well and when it does not."""
import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, Optional, Tuple

import pytest

from harness import Response, Runtime, children_of, make_payload
from standin import Behaviour, StandInTarget

HEAD = '''
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

PIECE = 1 << 16

class Many:
    """What it does is told by `etl_args`."""
    def get_mime_type(self):
        return "text/x-many"
'''
CLASSES = '''
class Threaded(Many, HTTPMultiThreadedServer):
    pass

class Fast(Many, FastAPIServer):
    pass

class Flask(Many, FlaskServer):
    pass
'''
BUFFERED = HEAD + '''
    RESULTS = {"bytearray": bytearray(b"abc"), "str": "f\\u00fcnf \\u20ac", "no_text": "",
               "none": None, "number": 7, "bool": True, "list": [b"x"]}
    def transform(self, data, path, etl_args):
        if etl_args in self.RESULTS:
            return self.RESULTS[etl_args]
        return getattr(self, "do_" + (etl_args or "echo"))(data)
    def do_echo(self, data):
        return data
    def do_value_error(self, data):
        raise ValueError("validation failed")
    def do_secret(self, data):
        raise ValueError("cannot read %s/x with %s" % (self.host_target, self.token))
    def do_lines(self, data):
        raise ValueError("two\\r\\nX-Forged: lines \\u20ac")
    def do_surrogate(self, data):
        raise ValueError("an odd \\ud800 reason")
    def do_nothing_to_say(self, data):
        raise KeyboardInterrupt
    def do_exit(self, data):
        raise SystemExit(3)
    def do_transient(self, data):
        from aistore.sdk.errors import ETLDirectPutTransientError
        raise ETLDirectPutTransientError("http://hop", OSError("gone"))
''' + CLASSES
STREAMING = HEAD + '''
    RESULTS = {"nothing": iter(()), "list": [b"ab", b"", b"c"], "none": None, "number_first": [7],
               "number_later": [b"whole", 7],
               "kinds": [b"", "", bytearray(b"a"), b"b", "\\u20ac", b""]}
    def transform_stream(self, reader, path, etl_args):
        if etl_args == "raise_at_the_call":
            raise ValueError("validation failed")
        if etl_args in self.RESULTS:
            return self.RESULTS[etl_args]
        return getattr(self, "do_" + (etl_args or "echo"))(reader, path)
    def do_echo(self, reader, path):
        yield from iter(lambda: reader.read(PIECE), b"")
    def do_raise_first(self, reader, path):
        raise ValueError("validation failed")
        yield b""
    def do_raise_after_empty_pieces(self, reader, path):
        yield b""
        raise ValueError("validation failed")
    def do_raise_later(self, reader, path):
        yield b"x" * 100000
        raise ValueError("validation failed")
    def do_exit_later(self, reader, path):
        yield b"x"
        raise SystemExit(3)
    def do_secret_later(self, reader, path):
        yield b"x"
        raise ValueError("cannot read %s/x with %s" % (self.host_target, self.token))
    def do_swallow(self, reader, path):
        try:
            while reader.read1(1000):
                pass
        except Exception:
            pass
        yield b"whole"
    def do_swallow_late(self, reader, path):
        yield b"begin"
        yield from self.do_swallow(reader, path)
    def do_first_byte(self, reader, path):
        yield reader.read(1)
    def do_no_read(self, reader, path):
        yield b"unread"
    def do_close(self, reader, path):
        data = reader.read(1)
        reader.close()
        yield data
    def do_lines(self, reader, path):
        for line in reader:
            yield b"[%s]" % line.strip()
    def do_readinto(self, reader, path):
        buffer = bytearray(1000)
        for count in iter(lambda: reader.readinto(buffer), 0):
            yield bytes(buffer[:count])
    def do_peek(self, reader, path):
        assert reader.readable() and not reader.writable() and not reader.closed
        assert reader.peek(1)[:1] == b"a"
        yield reader.read(3)
        assert (reader.read(), reader.read(), reader.read(1)) == (b"", b"", b"")
    def do_endless(self, reader, path):
        try:
            while True:
                yield b"x" * PIECE
        finally:
            print("the stream of %s was closed" % path, flush=True)
''' + CLASSES
ODD = '''
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class OddText(str):
    __hash__ = None
    def __str__(self):
        return self

KINDS = [OddText("text/x-odd"), OddText("text/x-odd"), OddText("text/x-odd"),
         "text/plain\\r\\nX-Forged: yes", None, 5, b"text/plain"]

def lie(data, length):
    class Liar(bytes):
        def __len__(self):
            return int(length)
    return Liar(data)

class Odd(HTTPMultiThreadedServer):
    """Each result has another MIME type, and claims a length that `etl_args` tell."""
    def get_mime_type(self):
        return KINDS.pop(0)

class Whole(Odd):
    def transform(self, data, path, etl_args):
        return lie(data, etl_args)

class Pieces(Odd):
    def transform_stream(self, reader, path, etl_args):
        yield lie(reader.read(3), etl_args)
        yield lie(reader.read(), etl_args)
'''
BASES = {"threaded": "Threaded", "fastapi": "Fast", "flask": "Flask"}
TOKEN = "t0ken-of-the-cluster"
SECRETS = ("s3cr3t", TOKEN)
StartPod = Callable[..., Runtime]
both_modes = pytest.mark.parametrize("mode", [BUFFERED, STREAMING], ids=["buffered", "streaming"])


@pytest.fixture(scope="module")
def pods(shared_target: StandInTarget) -> Iterator[StartPod]:
    """A function that starts the runtime for a class, or returns the one that it started before.

    Tracebacks of users' code are in their logs, but no secret.
    """
    started: Dict[Tuple[str, str, bool], Runtime] = {}

    def pod(source: str, name: str, is_fresh: bool = False) -> Runtime:
        key = source, name, is_fresh
        if key not in started:
            env = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "NUM_WORKERS": "1",
                   "AIS_TARGET_URL": shared_target.url, "AIS_AUTHN_TOKEN": TOKEN}
            started[key] = Runtime(env=env, expect_traceback=True)
        return started[key]

    yield pod
    for each in started.values():
        each.__exit__(None, None, None)
        assert not [secret for secret in SECRETS if secret in each.log()]


@pytest.fixture(params=list(BASES))
def base(request: pytest.FixtureRequest) -> str:
    """Each of the SDK's bases in turn."""
    return str(request.param)


@pytest.fixture
def streaming(pods: StartPod) -> Runtime:
    """A pod whose class transforms in pieces, on a thread like all of them."""
    return pods(STREAMING, "Threaded")


def put(pod: Runtime, what: str, body: object = b"abc") -> Response:
    """Have a pod do something to an object."""
    response = pod.request("PUT", "/bck/obj?etl_args=" + what, body)  # type: ignore[arg-type]
    assert not [secret for secret in SECRETS if secret in str(response)]
    return response


def exchange(pod: Runtime, data: bytes) -> bytes:
    """Send bytes, end our side, and read until the peer closes."""
    with pod.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def exchange_put(pod: Runtime, what: str, body: bytes = b"abc", version: str = "1.1") -> bytes:
    """Send a PUT and return all that comes back, as bytes."""
    head = "PUT /bck/obj?etl_args=%s HTTP/%s\r\nHost: pod\r\nContent-Length: %d\r\n\r\n"
    return exchange(pod, (head % (what, version, len(body))).encode() + body)


@contextlib.contextmanager
def keeping(pod: Runtime) -> Iterator[http.client.HTTPConnection]:
    """A connection that must still be open at the end."""
    connection = http.client.HTTPConnection("127.0.0.1", pod.port, timeout=20)
    with contextlib.closing(connection):
        connection.connect()
        first = connection.sock
        yield connection
        assert connection.sock is first


# == Framing ==


@both_modes
def test_a_result_in_one_piece_has_a_length_and_one_in_many_is_chunked(
        pods: StartPod, base: str, mode: str) -> None:
    for size in (1, 65535, 65536, 65537, 1 << 20):
        content = os.urandom(size)
        response = put(pods(mode, BASES[base]), "echo", content)
        framing = [response.headers.get(name) for name in ("content-length", "transfer-encoding")]
        assert framing == ([None, "chunked"] if mode == STREAMING else [str(size), None])
        assert (response.status, response.headers["content-type"]) == (200, "text/x-many")
        assert response.body == content


def test_an_empty_result_is_chunked_since_a_stage_takes_a_length_of_zero_for_a_delivery(
        pods: StartPod) -> None:
    for mode, what, body in (
            (BUFFERED, "echo", b""), (STREAMING, "echo", b""), (STREAMING, "nothing", b"abc")):
        pod = pods(mode, "Threaded")
        response = put(pod, what, body)
        assert (response.status, response.body) == (200, b"")
        assert response.headers["content-type"] == "text/x-many"
        assert response.headers["transfer-encoding"] == "chunked"
        assert "content-length" not in response.headers
        assert exchange_put(pod, what, body).endswith(b"\r\n\r\n0\r\n\r\n")


def test_a_result_may_be_text_and_empty_pieces_do_not_end_it(pods: StartPod, base: str) -> None:
    whole = {"bytearray": b"abc", "str": "fünf €".encode(), "no_text": b""}
    pieces = {"kinds": "ab€".encode(), "list": b"abc"}
    for mode, expected in ((BUFFERED, whole), (STREAMING, pieces)):
        assert {what: put(pods(mode, BASES[base]), what).body for what in expected} == expected


def test_the_reader_is_a_binary_file_that_ends_with_the_object(streaming: Runtime) -> None:
    for body in (b"a\nb", [b"a", b"\n", b"b"]):
        results = {what: put(streaming, what, body).body for what in ("peek", "lines", "readinto")}
        assert results == {"peek": b"a\nb", "lines": b"[a][b]", "readinto": b"a\nb"}


def test_a_client_of_http_1_0_gets_no_chunks_and_the_connection_ends(pods: StartPod) -> None:
    for mode, what, body, expected in [
        (BUFFERED, "echo", b"abc", b"abc"), (BUFFERED, "echo", b"", b""),
        (STREAMING, "echo", b"", b""), (STREAMING, "echo", b"abc", b"abc"),
        (STREAMING, "list", b"", b"abc"),
    ]:
        answer = exchange_put(pods(mode, "Threaded"), what, body, "1.0")
        head, _, content = answer.lower().partition(b"\r\n\r\n")
        assert (head.split(b" ")[1], content) == (b"200", expected)
        assert b"\r\nconnection: close" in head and b"\r\ntransfer-encoding" not in head
        assert mode == STREAMING or b"\r\ncontent-length: %d" % len(expected) in head


def test_a_stream_that_fails_resets_the_connection_of_a_client_of_http_1_0(
        streaming: Runtime) -> None:
    with pytest.raises(OSError, match="reset|not connected"):
        exchange_put(streaming, "raise_later", version="1.0")


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
def test_a_result_is_sent_whole_and_as_plain_text_whatever_an_odd_class_says_of_it(
        pods: StartPod, name: str) -> None:
    pod = pods(ODD, name)
    for length, media in (("0", "text/x-odd"), ("2", "text/x-odd"), ("1000", "text/x-odd"),
                          ("10", "text/plain??X-Forged: yes")):
        response = put(pod, length, b"0123456789")
        assert (length, response.status, response.body) == (length, 200, b"0123456789")
        assert response.headers["content-type"] == media
        assert "x-forged" not in response.headers
    for kind in ("none", "number", "bytes"):
        response = put(pod, "3")
        assert (kind, response.status) == (kind, 500)
        assert "get_mime_type() returned" in json.loads(response.body)["detail"]


# == Errors ==


def test_an_exception_of_a_transform_is_json_and_the_connection_serves_on(
        pods: StartPod, base: str) -> None:
    pod = pods(BUFFERED, BASES[base])
    details = {
        "value_error": "validation failed", "surrogate": "an odd \ud800 reason",
        "secret": "cannot read http://", "lines": "two\r\nX-Forged: lines €",
        "no_such_method": "", "nothing_to_say": "KeyboardInterrupt", "exit": "SystemExit: 3",
        "transient": "direct put to 'http://hop' failed",
        "none": "transform() returned 'NoneType', not bytes",
        "number": "transform() returned 'int', not bytes", "bool": "transform() returned 'bool'",
        "list": "transform() returned 'list', not bytes",
    }
    with keeping(pod) as connection:
        for what, detail in details.items():
            target = "/bck/%s?etl_args=" % what
            connection.request("PUT", target + what, b"abc")
            with connection.getresponse() as response:
                body, headers = response.read(), response.headers
            assert (what, response.status) == (what, 502 if what == "transient" else 500)
            assert headers["Content-Type"] == "application/json"
            assert headers["Content-Length"] == str(len(body))
            assert headers["X-Forged"] is None
            assert not [secret for secret in SECRETS if secret in body.decode()]
            told = json.loads(body)
            assert list(told) == ["detail"]
            assert told["detail"].startswith("Processing error: " + detail)
            pod.wait_for_line("ERROR - /?bck/%s: " % what, timeout=10)
            time.sleep(0.05)  # longer than a thread waits, so that the connection is parked
            connection.request("PUT", target, b"abc")
            with connection.getresponse() as response:
                assert response.read() == b"abc"
    for unwanted in ("ais_runtime_min.py", "Logging error"):  # our frames do not help users
        assert unwanted not in pod.log()


@pytest.mark.parametrize("what", [
    "raise_at_the_call", "raise_first", "raise_after_empty_pieces", "number_first", "none"])
def test_a_stream_that_fails_before_its_first_piece_is_an_error_with_a_status(
        pods: StartPod, what: str) -> None:
    for base, name in BASES.items():
        response = put(pods(STREAMING, name), what)
        assert (base, response.status) == (base, 500)
        assert response.headers["content-type"] == "application/json"
        reason = {"number_first": "'int'", "none": "NoneType"}.get(what, "validation failed")
        assert reason in json.loads(response.body)["detail"]


@pytest.mark.parametrize("what, reason", [
    ("raise_later", "validation failed"), ("exit_later", "3"), ("secret_later", "cannot read"),
    ("number_later", "'int'")])
def test_a_stream_that_fails_later_is_cut_without_its_last_chunk_and_logged(
        pods: StartPod, what: str, reason: str) -> None:
    for name in BASES.values():
        pod = pods(STREAMING, name)
        data = exchange_put(pod, what)
        pod.wait_for_line("ERROR - /?bck/obj: .*%s" % reason, timeout=10)
        assert data.startswith(b"HTTP/1.1 200 ") and not data.endswith(b"0\r\n\r\n")
        assert b"detail" not in data and data.count(b"HTTP/1.1") == 1


SHORT = [
    b"Content-Length: 100\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n64\r\nabc",
    b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
]


def looks_whole(answer: bytes) -> bool:
    """Tell whether a client would take the answer for a result."""
    return answer.startswith(b"HTTP/1.1 2") and answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("what", [
    "swallow", "swallow_late", "no_read", "first_byte", "close", "echo", "nothing", "list"])
def test_no_answer_to_a_body_that_was_cut_short_looks_whole_whatever_the_class_makes_of_it(
        pods: StartPod, what: str) -> None:
    head = b"PUT /bck/obj?etl_args=%s HTTP/1.1\r\nHost: pod\r\n" % what.encode()
    answers = {(base, body): exchange(pods(STREAMING, name), head + body)
               for base, name in BASES.items() for body in SHORT}
    assert [case for case, answer in answers.items() if looks_whole(answer)] == []


def test_no_answer_to_an_object_that_the_target_cut_short_looks_whole_if_it_was_read_to_the_cut(
        streaming: Runtime, shared_target: StandInTarget) -> None:
    before = len(streaming.lines)
    for what in ("swallow", "swallow_late", "no_read", "first_byte", "echo"):
        shared_target.script.append(Behaviour(status=200, body=b"abc", declared=100))
        head = "GET /cut-%s?etl_args=%s HTTP/1.1\r\nHost: pod\r\n\r\n" % (what, what)
        answer = exchange(streaming, head.encode())
        assert not looks_whole(answer) or what in ("no_read", "first_byte"), what
    for what in ("swallow", "swallow_late", "echo"):
        streaming.wait_for_line("ERROR - /cut-%s: .*ended 97 bytes early" % what, timeout=10)
    time.sleep(0.05)
    assert not [line for line in streaming.lines[before:] if "Traceback" in line]


# == Connections ==


@pytest.mark.parametrize("what, expected", [
    ("first_byte", b"x"), ("no_read", b"unread"), ("close", b"x"), ("list", b"abc")])
def test_what_a_stream_does_not_read_is_drained_and_the_connection_serves_on(
        streaming: Runtime, what: str, expected: bytes) -> None:
    with keeping(streaming) as connection:
        for size in (100, 100000, 1 << 22):
            for body in (b"x" * size, iter([b"x" * size]), b"x" * size):
                connection.request("PUT", "/bck/obj?etl_args=" + what, body, encode_chunked=True)
                response = connection.getresponse()
                assert (response.status, response.read()) == (200, expected)
                assert response.getheader("Connection") is None


def test_a_stream_is_closed_when_its_client_goes_away(pods: StartPod, base: str) -> None:
    pod = pods(STREAMING, BASES[base])
    for way in ("close", "reset"):
        with pod.connect() as connection:
            line = "PUT /bck/%s?etl_args=endless HTTP/1.1\r\nHost: pod\r\n\r\n" % way
            connection.sendall(line.encode())
            assert len(connection.recv(1 << 16)) > 0
            if way == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        pod.wait_for_line("the stream of /?bck/%s was closed" % way, timeout=20)


# == Size ==


def put_at_once(
    pod: Runtime, pieces: Iterable[bytes], is_chunked: bool = True, pipeline: Optional[str] = None,
) -> Tuple[int, str]:
    """Put an object while its answer is read; return the status and the digest of the body."""
    pieces = list(pieces)
    length = "Content-Length: %d" % sum(map(len, pieces))
    fields = ["Host: pod", "Transfer-Encoding: chunked" if is_chunked else length,
              *(["Ais-Node-Url: " + pipeline] if pipeline else [])]
    with pod.connect(60) as connection:
        def send() -> None:
            connection.sendall("\r\n".join(["PUT /bck/obj HTTP/1.1", *fields, "", ""]).encode())
            for piece in pieces:
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
            connection.sendall(b"0\r\n\r\n" if is_chunked else b"")

        sender = threading.Thread(target=send)
        sender.start()
        digest = hashlib.sha256()
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            for piece in iter(lambda: response.read(1 << 20), b""):
                digest.update(piece)
        sender.join()
        return response.status, digest.hexdigest()


def peak_of_workers(pod: Runtime) -> int:
    """Return the most memory that the workers ever had, in bytes, all together."""
    statuses = [Path("/proc/%d/status" % worker).read_text() for worker in children_of(pod.pid)]
    peaks = [re.findall(r"VmHWM:\s+(\d+) kB", status) for status in statuses]
    assert peaks and all(peaks)
    return sum(int(peak[0]) << 10 for peak in peaks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_stream_of_256_mib_takes_constant_memory(pods: StartPod, is_chunked: bool) -> None:
    pod = pods(STREAMING, "Threaded", is_fresh=True)
    piece = os.urandom(1 << 20)
    assert put(pod, "echo", piece).body == piece
    before = peak_of_workers(pod)
    expected = hashlib.sha256(piece * 256).hexdigest()
    assert put_at_once(pod, 256 * [piece], is_chunked) == (200, expected)
    assert peak_of_workers(pod) - before < 32 << 20


@both_modes
def test_large_objects_go_both_ways(
        pods: StartPod, shared_target: StandInTarget, mode: str) -> None:
    pieces = [os.urandom(1 << 20) for _ in range(32)]
    shared_target.objects["/large"] = content = b"".join(pieces)
    pod, digest = pods(mode, "Threaded"), hashlib.sha256(content).hexdigest()
    assert pod.request("GET", "/large").body == content
    for is_chunked in (False, True):
        assert put_at_once(pod, pieces, is_chunked) == (200, digest)
