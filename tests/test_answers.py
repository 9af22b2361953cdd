"""Stage 4, delivering inline: what a client reads, byte for byte, when all goes well and when it does not."""
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
from typing import Callable, Dict, Iterable, Iterator, NamedTuple, Optional, Sequence, Tuple

import pytest

from harness import Environ, Response, Runtime, children_of, make_payload
from standin import Behaviour, StandInTarget

CLASSES = '''

class Threaded(Many, HTTPMultiThreadedServer):
    pass


class Fast(Many, FastAPIServer):
    pass


class Flask(Many, FlaskServer):
    pass
'''
BUFFERED = '''
import sys

from aistore.sdk.errors import ETLDirectPutTransientError, InvalidPipelineError
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class Many:
    """What it does is told by `etl_args`."""

    def get_mime_type(self):
        return "text/x-many"

    def transform(self, data, path, etl_args):
        return getattr(self, "do_" + (etl_args or "echo"))(data, path)

    def do_echo(self, data, path):
        return data

    def do_path(self, data, path):
        return path

    def do_bytearray(self, data, path):
        return bytearray(data)

    def do_memoryview(self, data, path):
        return memoryview(data)[1:]

    def do_str(self, data, path):
        return "f\\u00fcnf \\u20ac"

    def do_none(self, data, path):
        return None

    def do_number(self, data, path):
        return 7

    def do_list(self, data, path):
        return [b"x"]

    def do_value_error(self, data, path):
        raise ValueError("validation failed")

    def do_nothing_to_say(self, data, path):
        raise KeyboardInterrupt

    def do_exit(self, data, path):
        sys.exit(3)

    def do_missing_file(self, data, path):
        return open("/no/such/model.bin", "rb").read()

    def do_pipeline(self, data, path):
        raise InvalidPipelineError("no such pipeline")

    def do_transient(self, data, path):
        raise ETLDirectPutTransientError("http://hop", OSError("gone"))

    def do_bail(self, data, path):
        raise ETLDirectPutTransientError("http://hop", OSError("gone"), True)

    def do_secret(self, data, path):
        raise ValueError("cannot read %s/x with %s" % (self.host_target, self.token))

    def do_lines(self, data, path):
        raise ValueError("two\\r\\nX-Forged: lines \\u20ac")

    def do_surrogate(self, data, path):
        raise ValueError("an odd \\ud800 reason")
''' + CLASSES
STREAMING = '''
import hashlib
import os

from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

PIECE = 1 << 16


class Many:
    def get_mime_type(self):
        return "text/x-many"

    def transform_stream(self, reader, path, etl_args):
        if etl_args == "raise_at_the_call":
            raise ValueError("validation failed")
        return getattr(self, "do_" + (etl_args or "echo"))(reader, path)

    def do_echo(self, reader, path):
        yield from iter(lambda: reader.read(PIECE), b"")

    def do_path(self, reader, path):
        yield path

    def do_nothing(self, reader, path):
        return iter(())

    def do_list(self, reader, path):
        return [b"ab", b"", b"c"]

    def do_empty_pieces(self, reader, path):
        yield b""
        yield b"ab"
        yield b""
        yield b"c"
        yield b""

    def do_kinds(self, reader, path):
        yield bytearray(b"a")
        yield memoryview(b"xbx")[1:2]
        yield "\\u20ac"

    def do_number_first(self, reader, path):
        yield 7

    def do_number_later(self, reader, path):
        yield b"whole pieces, "
        yield 7

    def do_none(self, reader, path):
        return None

    def do_raise_first(self, reader, path):
        raise ValueError("validation failed")
        yield b""

    def do_raise_after_empty_pieces(self, reader, path):
        yield b""
        raise ValueError("validation failed")

    def do_raise_later(self, reader, path):
        yield b"x" * 100000
        raise ValueError("validation failed")

    def do_missing_later(self, reader, path):
        yield b"x"
        open("/no/such/model.bin")

    def do_exit_later(self, reader, path):
        yield b"x"
        raise SystemExit(3)

    def do_secret_later(self, reader, path):
        yield b"x"
        raise ValueError("cannot read %s/x with %s" % (self.host_target, self.token))

    def do_swallow(self, reader, path):
        data = b""
        try:
            while True:
                piece = reader.read1(1000)
                if not piece:
                    break
                data += piece
        except Exception:
            pass
        yield b"whole"

    def do_swallow_late(self, reader, path):
        yield b"begin"
        try:
            reader.read()
        except Exception:
            pass
        yield b"whole"

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
        while True:
            count = reader.readinto(buffer)
            if not count:
                break
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
            with open(os.environ["MARKER"], "a") as marker:
                marker.write(path + "\\n")

    def do_digest(self, reader, path):
        digest = hashlib.sha256()
        for piece in iter(lambda: reader.read(PIECE), b""):
            digest.update(piece)
        yield digest.hexdigest()
''' + CLASSES
ODD = '''
import os

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class OddText(str):
    __hash__ = None

    def __str__(self):
        return self


def lying(data, length):
    class Liar(bytes):
        def __len__(self):
            return int(length)

    return Liar(data)


class Odd:
    def get_mime_type(self):
        kinds = {
            "forged": "text/plain\\r\\nX-Forged: yes", "odd": OddText("text/x-odd"), "none": None,
            "number": 5, "bytes": b"text/plain",
        }
        with open(os.environ["MIME_TYPE"]) as kind:
            return kinds[kind.read()]


class Whole(Odd, HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return lying(data, etl_args)


class Pieces(Odd, HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        yield lying(reader.read(3), etl_args)
        yield lying(reader.read(), etl_args)
'''
BASES = {"threaded": "Threaded", "fastapi": "Fast", "flask": "Flask"}
TOKEN = "t0ken-of-the-cluster"
SECRETS = ("s3cr3t", TOKEN)
SIZES = (1, 65535, 65536, 65537, 1 << 20)
LARGE_BYTES = 32 << 20
STREAMED_PIECES = 256  # of 1 MiB
GROWTH_LIMIT_BYTES = 32 << 20
StartPod = Callable[..., Runtime]


@pytest.fixture(scope="module")
def shared_target() -> Iterator[StandInTarget]:
    """One stand-in for all tests of this file."""
    target = StandInTarget()
    target.objects["/large"] = os.urandom(LARGE_BYTES)
    yield target
    target.close()
    assert target.complaints == []


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which a stream notes that it was closed."""
    return tmp_path_factory.mktemp("markers") / "marker"


@pytest.fixture(scope="module")
def mime_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that tells the odd classes which kind of MIME type to have."""
    return tmp_path_factory.mktemp("kinds") / "mime-type"


@pytest.fixture(scope="module")
def pods(shared_target: StandInTarget, marker: Path, mime_type: Path) -> Iterator[StartPod]:
    """A function that starts the runtime for a class, or returns the one that it started before for the same class.

    Tracebacks of users' code are in their logs, but no secret.
    """
    started: Dict[Tuple[str, str], Runtime] = {}

    def pod(source: str, name: str, env: Optional[Environ] = None) -> Runtime:
        key = source + str(env), name
        if key not in started:
            variables = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "AIS_TARGET_URL": shared_target.url, "NUM_WORKERS": "1",
                         "AIS_AUTHN_TOKEN": TOKEN, "MARKER": str(marker),
                         "MIME_TYPE": str(mime_type), **(env or {})}
            started[key] = Runtime(env=variables, expect_traceback=True)
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


def put(pod: Runtime, what: str, body: object = b"abc", **headers: str) -> Response:
    """Have a pod do something to an object."""
    response = pod.request("PUT", "/bck/obj?etl_args=" + what, body, headers)  # type: ignore[arg-type]
    assert not [secret for secret in SECRETS if secret in str(response)]
    return response


def everything_from(connection: socket.socket) -> bytes:
    """Read until the peer closes."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def exchange(pod: Runtime, data: bytes) -> bytes:
    """Send bytes, end our side, and read until the peer closes."""
    with pod.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return everything_from(connection)


def request_bytes(what: str, body: bytes = b"abc", version: str = "1.1", *fields: str) -> bytes:
    """Make a PUT."""
    lines = ["PUT /bck/obj?etl_args=%s HTTP/%s" % (what, version), "Host: pod", "Content-Length: %d" % len(body), *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


# == Framing ==


@pytest.mark.parametrize("mode", [BUFFERED, STREAMING], ids=["buffered", "streaming"])
def test_a_result_in_one_piece_has_a_length_and_one_in_many_is_chunked(
    pods: StartPod, base: str, mode: str
) -> None:
    for size in SIZES:
        content = os.urandom(size)
        response = put(pods(mode, BASES[base]), "echo", content)
        framing = [response.headers.get(name) for name in ("content-length", "transfer-encoding")]
        assert framing == ([None, "chunked"] if mode == STREAMING else [str(size), None])
        assert (response.status, response.headers["content-type"]) == (200, "text/x-many")
        assert response.body == content


@pytest.mark.parametrize("mode, what, body", [
    (BUFFERED, "echo", b""), (STREAMING, "echo", b""), (STREAMING, "nothing", b"abc"),
], ids=["buffered", "streaming", "nothing"])
def test_an_empty_result_is_chunked_since_a_stage_takes_a_length_of_zero_for_a_delivery(
    pods: StartPod, mode: str, what: str, body: bytes
) -> None:
    pod = pods(mode, "Threaded")
    response = put(pod, what, body)
    assert (response.status, response.body, response.headers["content-type"]) == (200, b"", "text/x-many")
    assert (response.headers.get("content-length"), response.headers["transfer-encoding"]) == (None, "chunked")
    assert exchange(pod, request_bytes(what, body)).endswith(b"\r\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("what, expected", [
    ("empty_pieces", b"abc"), ("list", b"abc"), ("kinds", "ab€".encode()), ("lines", b"[a][b]"), ("readinto", b"a\nb"),
])
def test_pieces_may_be_of_any_kind_and_empty_ones_do_not_end_the_result(
    streaming: Runtime, what: str, expected: bytes
) -> None:
    assert put(streaming, what, b"a\nb").body == expected


def test_the_reader_is_a_binary_file_that_ends_with_the_object(streaming: Runtime) -> None:
    assert put(streaming, "peek").body == b"abc"
    assert put(streaming, "peek", [b"a", b"b", b"c"]).body == b"abc"


def test_a_result_may_be_any_bytes_like_object_or_text(pods: StartPod, base: str) -> None:
    pod = pods(BUFFERED, BASES[base])
    results = {what: put(pod, what).body for what in ("bytearray", "memoryview", "str")}
    assert results == {"bytearray": b"abc", "memoryview": b"bc", "str": "fünf €".encode()}


class HTTP10(NamedTuple):
    """An answer to a client that speaks HTTP/1.0."""

    status: bytes
    fields: Dict[bytes, bytes]
    body: bytes


def ask_http_1_0(pod: Runtime, what: str, body: bytes = b"abc") -> HTTP10:
    """Send a request as such a client does, and read until the pod closes."""
    with pod.connect() as connection:
        connection.sendall(request_bytes(what, body, "1.0"))
        head, _, content = everything_from(connection).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in lines[1:])
    return HTTP10(lines[0].split(b" ")[1], fields, content)


@pytest.mark.parametrize("mode, what, body, expected", [
    (BUFFERED, "echo", b"abc", b"abc"), (BUFFERED, "echo", b"", b""),
    (STREAMING, "echo", b"abc", b"abc"), (STREAMING, "echo", b"", b""), (STREAMING, "empty_pieces", b"", b"abc"),
], ids=["buffered", "buffered empty", "streaming", "streaming empty", "empty pieces"])
def test_a_client_of_http_1_0_gets_no_chunks_and_the_connection_ends(
    pods: StartPod, mode: str, what: str, body: bytes, expected: bytes
) -> None:
    answer = ask_http_1_0(pods(mode, "Threaded"), what, body)
    assert (answer.status, answer.body) == (b"200", expected)
    assert (answer.fields.get(b"transfer-encoding"), answer.fields[b"connection"]) == (None, b"close")
    assert mode == STREAMING or answer.fields[b"content-length"] == b"%d" % len(expected)


def test_a_stream_that_fails_resets_the_connection_of_a_client_of_http_1_0(streaming: Runtime) -> None:
    with pytest.raises(ConnectionResetError):
        ask_http_1_0(streaming, "raise_later")


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
def test_a_mime_type_of_an_odd_class_is_sent_as_plain_text_and_cannot_break_out_of_its_line(
    pods: StartPod, mime_type: Path, name: str
) -> None:
    for kind, expected in (("odd", "text/x-odd"), ("forged", "text/plain??X-Forged: yes")):
        mime_type.write_text(kind)
        response = put(pods(ODD, name), "3")
        assert (response.status, response.body) == (200, b"abc")
        assert response.headers["content-type"] == expected
        assert "x-forged" not in response.headers


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
def test_a_result_is_sent_whole_whatever_it_says_of_its_length(
    pods: StartPod, mime_type: Path, name: str
) -> None:
    mime_type.write_text("odd")
    for length in ("0", "2", "1000"):
        response = put(pods(ODD, name), length, b"0123456789")
        assert (length, response.status, response.body) == (length, 200, b"0123456789")


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
def test_a_mime_type_that_is_no_text_is_an_error_that_tells_the_reason(
    pods: StartPod, mime_type: Path, name: str
) -> None:
    for kind in ("none", "number", "bytes"):
        mime_type.write_text(kind)
        response = put(pods(ODD, name), "3")
        assert (kind, response.status) == (kind, 500)
        assert "get_mime_type() returned" in json.loads(response.body)["detail"]


# == Paths ==


@pytest.mark.parametrize("mode", [BUFFERED, STREAMING], ids=["buffered", "streaming"])
def test_the_path_is_raw_for_the_threaded_base_and_decoded_for_the_others(
    pods: StartPod, base: str, mode: str
) -> None:
    decoded_of = {
        "/bck/obj": "bck/obj", "/bck/a%20b": "bck/a b", "/bck/100%25": "bck/100%",
        "/bck/a%2520b": "bck/a%20b", "/bck/a+b": "bck/a+b", "/bck/a%2Bb": "bck/a+b",
        "/bck/a%23b": "bck/a#b", "/bck/a#b": "bck/a#b", "/bck/a;v=1": "bck/a;v=1",
        "/bck/a%3Fb": "bck/a?b", "/bck/a?b=c": "bck/a?b=c", "/bck/a@b": "bck/a@b",
        "/bck/%E2%82%AC": "bck/€", "/bck/../obj": "bck/../obj", "/bck/./obj": "bck/./obj",
        "/bck//obj": "bck//obj", "/bck/obj/": "bck/obj/", "//bck/obj": "/bck/obj",
        "/ais%2F@%23%2Fbck%2Fobj": "ais/@#/bck/obj", "/bck/a&b=c": "bck/a&b=c",
        "/bck/~'()*!$,:": "bck/~'()*!$,:",
    }
    pod, got = pods(mode, BASES[base]), {}
    for raw in decoded_of:
        got[raw] = pod.request("PUT", raw + "?etl_args=path", b"abc").body.decode()
    assert got == (dict(zip(decoded_of, decoded_of)) if base == "threaded" else decoded_of)


# == Errors ==


@pytest.mark.parametrize("what, status, detail", [
    ("value_error", 500, "Processing error: validation failed"),
    ("nothing_to_say", 500, "Processing error: KeyboardInterrupt"),
    ("exit", 500, "Processing error: 3"),
    ("missing_file", 500, "Processing error: [Errno 2] No such file or directory: '/no/such/model.bin'"),
    ("pipeline", 400, "Processing error: no such pipeline"),
    ("transient", 502, "Processing error: direct put to 'http://hop' failed: OSError: gone"),
    ("bail", 503, "Processing error: direct put to 'http://hop' failed: OSError: gone"),
    ("none", 500, "Processing error: transform() returned 'NoneType', not bytes"),
    ("number", 500, "Processing error: transform() returned 'int', not bytes"),
    ("list", 500, "Processing error: transform() returned 'list', not bytes"),
    ("secret", 500, None), ("lines", 500, None), ("no_such_method", 500, None),
    ("surrogate", 500, "Processing error: an odd \ud800 reason"),
])
def test_an_exception_of_a_transform_is_json_that_tells_its_reason(
    pods: StartPod, what: str, status: int, detail: Optional[str]
) -> None:
    for base, name in BASES.items():
        pod = pods(BUFFERED, name)
        before = len(pod.lines)
        response = put(pod, what)
        media = response.headers["content-type"]
        assert (base, response.status, media) == (base, status, "application/json")
        assert response.headers["content-length"] == str(len(response.body))
        told = json.loads(response.body)
        assert list(told) == ["detail"] and told["detail"].startswith("Processing error: ")
        assert detail is None or told["detail"] == detail
        retry_reason = "direct-put-transient" if what == "bail" else None
        assert response.headers.get("ais-etl-retry-reason") == retry_reason
        assert response.headers.get("x-forged") is None
        assert put(pod, "echo").body == b"abc"
        logged = pod.lines[before:]
        for unwanted in ("ais_runtime_min.py", "Logging error"):  # our frames do not help users
            assert not [line for line in logged if unwanted in line]


def test_the_reason_of_an_exception_is_logged_with_the_object_also_if_no_encoding_has_it(
    pods: StartPod
) -> None:
    pod = pods(BUFFERED, "Threaded")
    for what, reason in (("value_error", "validation failed"), ("surrogate", "an odd .* reason")):
        assert pod.request("PUT", "/bck/%s?etl_args=%s" % (what, what), b"abc").status == 500
        pod.wait_for_line("ERROR - /bck/%s: %s" % (what, reason), timeout=10)


@pytest.mark.parametrize("what, reason", [
    ("raise_at_the_call", "validation failed"), ("raise_first", "validation failed"),
    ("raise_after_empty_pieces", "validation failed"),
    ("number_first", "'int'"), ("none", "NoneType"),
])
def test_a_stream_that_fails_before_its_first_piece_is_an_error_with_a_status(
    pods: StartPod, what: str, reason: str
) -> None:
    for base, name in BASES.items():
        response = put(pods(STREAMING, name), what)
        media = response.headers["content-type"]
        assert (base, response.status, media) == (base, 500, "application/json")
        detail = json.loads(response.body)["detail"]
        assert detail.startswith("Processing error: ") and reason in detail


@pytest.mark.parametrize("what, reason", [
    ("raise_later", "validation failed"), ("number_later", "'int'"), ("exit_later", "3"), ("secret_later", "cannot read"),
    ("missing_later", "/no/such/model.bin"),
])
def test_a_stream_that_fails_later_is_cut_without_its_last_chunk_and_logged(
    pods: StartPod, what: str, reason: str
) -> None:
    for name in BASES.values():
        pod = pods(STREAMING, name)
        with pytest.raises(http.client.IncompleteRead):
            pod.request("PUT", "/bck/%s?etl_args=%s" % (what, what), b"abc")
        pod.wait_for_line("ERROR - /?bck/%s: .*%s" % (what, reason), timeout=10)
        data = exchange(pod, request_bytes(what))
        assert data.startswith(b"HTTP/1.1 200 ") and not data.endswith(b"0\r\n\r\n")
        assert b"detail" not in data and data.count(b"HTTP/1.1") == 1


SHORT = {
    "length": b"Content-Length: 100\r\n\r\nabc",
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "within a chunk": b"Transfer-Encoding: chunked\r\n\r\n64\r\nabc",
    "within the last chunk": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
}


def looks_whole(answer: bytes) -> bool:
    """Tell whether a client would take the answer for a result."""
    return answer.startswith(b"HTTP/1.1 2") and answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("what", [
    "swallow", "swallow_late", "no_read", "first_byte", "close", "echo", "nothing", "list", "digest",
])
def test_no_answer_to_a_body_that_was_cut_short_looks_whole_whatever_the_class_makes_of_it(
    pods: StartPod, what: str
) -> None:
    head = b"PUT /bck/obj?etl_args=%s HTTP/1.1\r\nHost: pod\r\n" % what.encode()
    answers = {(base, framing): exchange(pods(STREAMING, name), head + body)
               for base, name in BASES.items() for framing, body in SHORT.items()}
    assert [case for case, answer in answers.items() if looks_whole(answer)] == []


@pytest.mark.parametrize("what", ["swallow", "swallow_late", "no_read", "first_byte", "echo"])
def test_no_answer_to_an_object_that_the_target_cut_short_looks_whole_if_it_was_read_to_the_cut(
    streaming: Runtime, shared_target: StandInTarget, what: str
) -> None:
    shared_target.script.append(Behaviour(status=200, body=b"abc", declared=100))
    head = b"GET /obj?etl_args=%s HTTP/1.1\r\nHost: pod\r\n\r\n" % what.encode()
    answer = exchange(streaming, head)
    assert not looks_whole(answer) or what in ("no_read", "first_byte")


def test_an_object_that_the_target_cut_short_is_a_line_of_the_log_and_no_traceback(
    streaming: Runtime, shared_target: StandInTarget
) -> None:
    shared_target.script.append(Behaviour(status=200, body=b"abc", declared=100))
    before = len(streaming.lines)
    exchange(streaming, b"GET /cut-obj?etl_args=swallow_late HTTP/1.1\r\nHost: pod\r\n\r\n")
    streaming.wait_for_line("ERROR - /cut-obj: .*ended 97 bytes early", timeout=10)
    time.sleep(0.05)
    assert not [line for line in streaming.lines[before:] if "Traceback" in line]


# == Connections ==


@pytest.mark.parametrize("what, expected", [("first_byte", b"x"), ("no_read", b"unread"), ("close", b"x"), ("list", b"abc")])
def test_what_a_stream_does_not_read_is_drained_and_the_connection_serves_on(
    streaming: Runtime, what: str, expected: bytes
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", streaming.port, timeout=20)
    connection.connect()
    first = connection.sock
    for size in (100, 100000, 1 << 22):
        for encode_chunked in (False, True, False):
            body = iter([b"x" * size]) if encode_chunked else b"x" * size
            fields = {"Transfer-Encoding": "chunked"} if encode_chunked else {}
            connection.request("PUT", "/bck/obj?etl_args=" + what, body, fields,
                               encode_chunked=encode_chunked)
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, expected)
            assert response.getheader("Connection") is None
    assert connection.sock is first
    connection.close()


def test_a_connection_serves_one_request_after_the_other(pods: StartPod, base: str) -> None:
    pod = pods(BUFFERED, BASES[base])
    connection = http.client.HTTPConnection("127.0.0.1", pod.port, timeout=20)
    connection.connect()
    sock = connection.sock
    for number in range(20):
        what, status = ("echo", 200) if number % 2 else ("value_error", 500)
        connection.request("PUT", "/bck/obj?etl_args=" + what, b"%d" % number)
        response = connection.getresponse()
        assert (response.status, response.read() != b"") == (status, True)
        time.sleep(0.05 if number % 5 == 0 else 0)  # longer than a thread waits, so that the connection is parked
    assert connection.sock is sock
    connection.close()


def test_a_stream_is_closed_when_its_client_goes_away(
    pods: StartPod, base: str, marker: Path
) -> None:
    for way in ("close", "reset"):
        path = "/bck/%s-%s" % (base, way)
        with pods(STREAMING, BASES[base]).connect() as connection:
            line = "PUT %s?etl_args=endless HTTP/1.1\r\n" % path
            connection.sendall(line.encode() + b"Host: pod\r\n\r\n")
            assert len(connection.recv(1 << 16)) > 0
            if way == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        deadline = time.monotonic() + 20
        while not (marker.exists() and path.strip("/") in marker.read_text()):
            assert time.monotonic() < deadline, "no stream was closed after a %s" % way
            time.sleep(0.01)


# == Size ==


@pytest.mark.parametrize("mode", [BUFFERED, STREAMING], ids=["buffered", "streaming"])
@pytest.mark.parametrize("way", ["length", "chunks", "target"])
def test_large_objects_go_both_ways(pods: StartPod, shared_target: StandInTarget, mode: str, way: str) -> None:
    content = shared_target.objects["/large"]
    pieces = [content[start:start + (1 << 20)] for start in range(0, len(content), 1 << 20)]
    pod = pods(mode, "Threaded")
    if way == "target":
        got = exchange_at_once(pod, b"GET /large HTTP/1.1\r\nHost: pod\r\n\r\n", ())
    else:
        got = put_at_once(pod, way, pieces)
    assert got == (200, hashlib.sha256(content).hexdigest())


def put_at_once(pod: Runtime, framing: str, pieces: Sequence[bytes]) -> Tuple[int, str]:
    """Put an object while its answer is read; return the status and the digest of the body."""
    is_chunked = framing == "chunks"
    length = b"Content-Length: %d" % sum(map(len, pieces))
    field = b"Transfer-Encoding: chunked" if is_chunked else length
    head = b"PUT /bck/obj HTTP/1.1\r\nHost: pod\r\n%b\r\n\r\n" % field
    return exchange_at_once(pod, head, chunked(pieces) if is_chunked else pieces)


def chunked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Frame pieces as chunks."""
    for piece in pieces:
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def exchange_at_once(pod: Runtime, head: bytes, pieces: Iterable[bytes]) -> Tuple[int, str]:
    """Send a request on a thread while its answer is read; return the status and the digest of the body."""
    with pod.connect(60) as connection:
        def send() -> None:
            connection.sendall(head)
            for piece in pieces:
                connection.sendall(piece)

        sender = threading.Thread(target=send)
        sender.start()
        response = http.client.HTTPResponse(connection)
        with response:
            response.begin()
            digest = hashlib.sha256()
            for piece in iter(lambda: response.read(1 << 20), b""):
                digest.update(piece)
        sender.join()
        return response.status, digest.hexdigest()


def peak_of_workers(pod: Runtime) -> int:
    """Return the most memory that the workers ever had, in bytes, all together."""
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/%d/status" % worker).read_text()) for worker in children_of(pod.pid)]
    assert peaks and all(peaks)
    return sum(int(peak[1]) << 10 for peak in peaks if peak)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_stream_of_256_mib_takes_constant_memory(pods: StartPod, framing: str) -> None:
    pod = pods(STREAMING, "Threaded", {"FOR_MEMORY": "1"})
    piece = os.urandom(1 << 20)
    assert put(pod, "echo", piece).body == piece
    before = peak_of_workers(pod)
    expected = hashlib.sha256(piece * STREAMED_PIECES).hexdigest()
    assert put_at_once(pod, framing, STREAMED_PIECES * [piece]) == (200, expected)
    assert peak_of_workers(pod) - before < GROWTH_LIMIT_BYTES
