"""Stage 4, delivering inline: what a client reads, byte for byte, when all goes well and when it does not."""
import hashlib
import http.client
import io
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import pytest

from harness import Environ, Response, Runtime, children_of, make_payload
from standin import Behaviour, StandInTarget

BUFFERED = '''
import os
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


class Threaded(Many, HTTPMultiThreadedServer):
    pass


class Fast(Many, FastAPIServer):
    pass


class Flask(Many, FlaskServer):
    pass


class Forging(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return data

    def get_mime_type(self):
        return "text/plain\\r\\nX-Forged: yes"
'''
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


class Threaded(Many, HTTPMultiThreadedServer):
    pass


class Fast(Many, FastAPIServer):
    pass


class Flask(Many, FlaskServer):
    pass
'''
ODD = '''
import os

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class OddText(str):
    __hash__ = None

    def __str__(self):
        return self


class Liar(bytes):
    def __len__(self):
        return int(os.environ["LENGTH"])


class Odd:
    def get_mime_type(self):
        kinds = {"plain": "text/plain", "odd": OddText("text/x-odd"), "none": None, "number": 5, "bytes": b"text/plain"}
        return kinds[os.environ["MIME_TYPE"]]


class Whole(Odd, HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return Liar(data)


class Pieces(Odd, HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        yield Liar(reader.read(3))
        yield Liar(reader.read())
'''
BASES = {"threaded": "Threaded", "fastapi": "Fast", "flask": "Flask"}
TOKEN = "t0ken-of-the-cluster"
SECRETS = ("s3cr3t", TOKEN)
StartPod = Callable[..., Runtime]


@pytest.fixture(scope="module")
def shared_target() -> Iterator[StandInTarget]:
    """One stand-in for all tests of this file."""
    target = StandInTarget()
    target.objects["/large"] = os.urandom(1 << 20) * 64
    yield target
    target.close()
    assert target.complaints == []


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which a stream notes that it was closed."""
    return tmp_path_factory.mktemp("markers") / "marker"


@pytest.fixture(scope="module")
def pods(shared_target: StandInTarget, marker: Path) -> Iterator[StartPod]:
    """A function that starts the runtime for a class, or returns the one that it started before for the same class.

    Tracebacks of users' code are in their logs, but no secret.
    """
    started: Dict[Tuple[str, str], Runtime] = {}

    def pod(source: str, name: str, env: Optional[Environ] = None) -> Runtime:
        key = source + str(env), name
        if key not in started:
            variables = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "AIS_TARGET_URL": shared_target.url, "NUM_WORKERS": "1",
                         "AIS_AUTHN_TOKEN": TOKEN, "MARKER": str(marker), **(env or {})}
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
def buffered(pods: StartPod, base: str) -> Runtime:
    """A pod whose class transforms whole objects."""
    return pods(BUFFERED, BASES[base])


@pytest.fixture
def streaming(pods: StartPod, base: str) -> Runtime:
    """A pod whose class transforms in pieces."""
    return pods(STREAMING, BASES[base])


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


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65535, 65536, 65537, 1 << 20])
def test_a_result_in_one_piece_has_a_length(buffered: Runtime, size: int) -> None:
    content = os.urandom(size)
    response = put(buffered, "echo", content)
    assert (response.status, response.body) == (200, content)
    assert (response.headers["content-length"], response.headers.get("transfer-encoding")) == (str(size), None)
    assert response.headers["content-type"] == "text/x-many"


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65535, 65536, 65537, 1 << 20])
def test_a_result_in_many_pieces_is_chunked(streaming: Runtime, size: int) -> None:
    content = os.urandom(size)
    response = put(streaming, "echo", content)
    assert (response.status, response.body) == (200, content)
    assert (response.headers.get("content-length"), response.headers["transfer-encoding"]) == (None, "chunked")
    assert response.headers["content-type"] == "text/x-many"


@pytest.mark.parametrize("mode, what, body", [
    (BUFFERED, "echo", b""), (STREAMING, "echo", b""), (STREAMING, "nothing", b"abc"),
])
def test_an_empty_result_is_chunked_since_a_stage_takes_a_length_of_zero_for_a_delivery(
    pods: StartPod, base: str, mode: str, what: str, body: bytes
) -> None:
    pod = pods(mode, BASES[base])
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


@pytest.mark.parametrize("what, expected", [("bytearray", b"abc"), ("memoryview", b"bc"), ("str", "fünf €".encode())])
def test_a_result_may_be_any_bytes_like_object_or_text(buffered: Runtime, what: str, expected: bytes) -> None:
    assert put(buffered, what).body == expected


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
])
def test_a_client_of_http_1_0_gets_no_chunks_and_the_connection_ends(
    pods: StartPod, base: str, mode: str, what: str, body: bytes, expected: bytes
) -> None:
    answer = ask_http_1_0(pods(mode, BASES[base]), what, body)
    assert (answer.status, answer.body) == (b"200", expected)
    assert (answer.fields.get(b"transfer-encoding"), answer.fields[b"connection"]) == (None, b"close")
    assert mode == STREAMING or answer.fields[b"content-length"] == b"%d" % len(expected)


def test_a_stream_that_fails_resets_the_connection_of_a_client_of_http_1_0(streaming: Runtime) -> None:
    with pytest.raises(ConnectionResetError):
        ask_http_1_0(streaming, "raise_later")


def test_a_mime_type_cannot_break_out_of_its_line(pods: StartPod) -> None:
    response = put(pods(BUFFERED, "Forging"), "")
    assert (response.status, response.body, response.headers.get("x-forged")) == (200, b"abc", None)


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
@pytest.mark.parametrize("length", ["0", "2", "1000"])
def test_a_result_is_sent_whole_whatever_it_says_of_its_length(pods: StartPod, name: str, length: str) -> None:
    response = put(pods(ODD, name, {"MIME_TYPE": "plain", "LENGTH": length}), "", b"0123456789")
    assert (response.status, response.body) == (200, b"0123456789")


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
def test_a_mime_type_of_an_odd_class_is_sent_as_plain_text(pods: StartPod, name: str) -> None:
    response = put(pods(ODD, name, {"MIME_TYPE": "odd", "LENGTH": "3"}), "")
    assert (response.status, response.body, response.headers["content-type"]) == (200, b"abc", "text/x-odd")


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
@pytest.mark.parametrize("kind", ["none", "number", "bytes"])
def test_a_mime_type_that_is_no_text_is_an_error_that_tells_the_reason(pods: StartPod, kind: str, name: str) -> None:
    response = put(pods(ODD, name, {"MIME_TYPE": kind, "LENGTH": "3"}), "")
    assert response.status == 500
    assert re.search(r"get_mime_type\(\) returned", json.loads(response.body)["detail"]), response.body


# == Paths ==


@pytest.mark.parametrize("raw, decoded", [
    ("/bck/obj", "bck/obj"), ("/bck/a%20b", "bck/a b"), ("/bck/100%25", "bck/100%"), ("/bck/a%2520b", "bck/a%20b"),
    ("/bck/a+b", "bck/a+b"), ("/bck/a%2Bb", "bck/a+b"), ("/bck/a%23b", "bck/a#b"), ("/bck/a#b", "bck/a#b"),
    ("/bck/a;v=1", "bck/a;v=1"),
    ("/bck/a%3Fb", "bck/a?b"), ("/bck/a?b=c", "bck/a?b=c"), ("/bck/a@b", "bck/a@b"), ("/bck/%E2%82%AC", "bck/€"),
    ("/bck/../obj", "bck/../obj"), ("/bck/./obj", "bck/./obj"), ("/bck//obj", "bck//obj"), ("/bck/obj/", "bck/obj/"),
    ("//bck/obj", "/bck/obj"),
    ("/ais%2F@%23%2Fbck%2Fobj", "ais/@#/bck/obj"), ("/bck/a&b=c", "bck/a&b=c"), ("/bck/~'()*!$,:", "bck/~'()*!$,:"),
])
@pytest.mark.parametrize("mode", [BUFFERED, STREAMING], ids=["buffered", "streaming"])
def test_the_path_is_raw_for_the_threaded_base_and_decoded_for_the_others(
    pods: StartPod, base: str, mode: str, raw: str, decoded: str
) -> None:
    response = pods(mode, BASES[base]).request("PUT", raw + "?etl_args=path", b"abc")
    assert response.body.decode() == (raw if base == "threaded" else decoded)


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
])
def test_an_exception_of_a_transform_is_json_that_tells_its_reason(
    buffered: Runtime, what: str, status: int, detail: Optional[str]
) -> None:
    before = len(buffered.lines)
    response = put(buffered, what)
    assert (response.status, response.headers["content-type"]) == (status, "application/json")
    assert response.headers["content-length"] == str(len(response.body))
    told = json.loads(response.body)
    assert list(told) == ["detail"] and told["detail"].startswith("Processing error: ")
    assert detail is None or told["detail"] == detail
    assert response.headers.get("ais-etl-retry-reason") == ("direct-put-transient" if what == "bail" else None)
    assert response.headers.get("x-forged") is None
    assert put(buffered, "echo").body == b"abc"
    assert not [line for line in buffered.lines[before:] if "ais_runtime_min.py" in line]  # its frames are of no use to users


def test_a_reason_that_no_encoding_has_is_answered_and_logged_all_the_same() -> None:
    env = {"ETL_CLASS_PAYLOAD": make_payload(BUFFERED, "Threaded"), "NUM_WORKERS": "1"}
    with Runtime(env=env, expect_traceback=True) as pod:
        response = put(pod, "surrogate")
        assert (response.status, json.loads(response.body)) == (500, {"detail": "Processing error: an odd \ud800 reason"})
        pod.wait_for_line("ERROR - /bck/obj: an odd .* reason", timeout=5)
        assert "Logging error" not in pod.log()


@pytest.mark.parametrize("what", ["raise_at_the_call", "raise_first", "raise_after_empty_pieces", "number_first", "none"])
def test_a_stream_that_fails_before_its_first_piece_is_an_error_with_a_status(streaming: Runtime, what: str) -> None:
    response = put(streaming, what)
    assert (response.status, response.headers["content-type"]) == (500, "application/json")
    detail = json.loads(response.body)["detail"]
    expected = {"number_first": "'int'", "none": "NoneType"}.get(what, "validation failed")
    assert detail.startswith("Processing error: ") and expected in detail


@pytest.mark.parametrize("what, reason", [
    ("raise_later", "validation failed"), ("number_later", "'int'"), ("exit_later", "3"), ("secret_later", "cannot read"),
    ("missing_later", "/no/such/model.bin"),
])
def test_a_stream_that_fails_later_is_cut_without_its_last_chunk_and_logged(
    streaming: Runtime, what: str, reason: str
) -> None:
    with pytest.raises(http.client.IncompleteRead):
        streaming.request("PUT", "/bck/%s?etl_args=%s" % (what, what), b"abc")
    streaming.wait_for_line("ERROR - /bck/%s: .*%s" % (what, reason), timeout=5)
    data = exchange(streaming, request_bytes(what))
    assert data.startswith(b"HTTP/1.1 200 ")
    assert not data.endswith(b"0\r\n\r\n") and b"detail" not in data and data.count(b"HTTP/1.1") == 1


SHORT = {
    "length": b"Content-Length: 100\r\n\r\nabc",
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "within a chunk": b"Transfer-Encoding: chunked\r\n\r\n64\r\nabc",
    "within the last chunk": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
}


@pytest.mark.parametrize("what", [
    "swallow", "swallow_late", "no_read", "first_byte", "close", "echo", "nothing", "list", "digest",
])
@pytest.mark.parametrize("framing", list(SHORT))
def test_no_answer_to_a_body_that_was_cut_short_looks_whole_whatever_the_class_makes_of_it(
    streaming: Runtime, what: str, framing: str
) -> None:
    data = exchange(streaming, b"PUT /bck/obj?etl_args=%s HTTP/1.1\r\nHost: pod\r\n" % what.encode() + SHORT[framing])
    assert not (data.startswith(b"HTTP/1.1 2") and data.endswith(b"0\r\n\r\n"))


@pytest.mark.parametrize("what", ["swallow", "swallow_late", "no_read", "first_byte", "echo"])
def test_no_answer_to_an_object_that_the_target_cut_short_looks_whole_if_it_was_read_to_the_cut(
    streaming: Runtime, shared_target: StandInTarget, what: str
) -> None:
    shared_target.script.append(Behaviour(status=200, body=b"abc", declared=100))
    data = exchange(streaming, b"GET /obj?etl_args=%s HTTP/1.1\r\nHost: pod\r\n\r\n" % what.encode())
    is_whole = data.startswith(b"HTTP/1.1 2") and data.endswith(b"0\r\n\r\n")
    assert not is_whole or what in ("no_read", "first_byte")


def test_an_object_that_the_target_cut_short_is_a_line_of_the_log_and_no_traceback(
    streaming: Runtime, shared_target: StandInTarget
) -> None:
    shared_target.script.append(Behaviour(status=200, body=b"abc", declared=100))
    before = len(streaming.lines)
    exchange(streaming, b"GET /cut-obj?etl_args=swallow_late HTTP/1.1\r\nHost: pod\r\n\r\n")
    streaming.wait_for_line("ERROR - /cut-obj: .*ended 97 bytes early", timeout=5)
    time.sleep(0.05)
    assert not [line for line in streaming.lines[before:] if "Traceback" in line]


# == Connections ==


@pytest.mark.parametrize("what, expected", [("first_byte", b"x"), ("no_read", b"unread"), ("close", b"x"), ("list", b"abc")])
@pytest.mark.parametrize("size", [100, 100000, 1 << 22])
def test_what_a_stream_does_not_read_is_drained_and_the_connection_serves_on(
    streaming: Runtime, what: str, expected: bytes, size: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", streaming.port, timeout=20)
    for encode_chunked in (False, True, False):
        body = iter([b"x" * size]) if encode_chunked else b"x" * size
        connection.request("PUT", "/bck/obj?etl_args=" + what, body, encode_chunked=encode_chunked,
                           headers={"Transfer-Encoding": "chunked"} if encode_chunked else {})
        response = connection.getresponse()
        assert (response.status, response.read(), response.getheader("Connection")) == (200, expected, None)
    assert connection.sock is not None
    connection.close()


def test_a_connection_serves_one_request_after_the_other(buffered: Runtime) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", buffered.port, timeout=20)
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


class KeptOpen(io.BufferedReader):
    """A file that one answer's end does not close for the next one."""

    def close(self) -> None:
        """Stay open."""


class ReplayedSocket:
    """Bytes that came, for http.client to read as one connection."""

    def __init__(self, data: bytes) -> None:
        self.file = KeptOpen(io.BytesIO(data))

    def makefile(self, mode: str) -> KeptOpen:
        """Return the one file of all answers."""
        return self.file


def split_answers(data: bytes) -> List[Tuple[int, bytes]]:
    """Parse answers that follow each other on a connection."""
    stream = ReplayedSocket(data)
    answers = []
    while stream.file.peek(1):
        response = http.client.HTTPResponse(stream)  # type: ignore[arg-type]
        response.begin()
        answers.append((response.status, response.read()))
    return answers


@pytest.mark.parametrize("piece", [1, 2, 3, 64, 1 << 20])
def test_requests_that_come_in_one_packet_or_in_crumbs_are_answered_in_order(pods: StartPod, piece: int) -> None:
    for mode in (BUFFERED, STREAMING):
        pod = pods(mode, "Threaded")
        chunked = b"PUT /bck/obj HTTP/1.1\r\nHost: pod\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nfou\r\n1\r\nr\r\n0\r\n\r\n"
        data = (request_bytes("echo", b"one") + b"GET /health HTTP/1.1\r\nHost: pod\r\n\r\n" + b"\r\n"
                + request_bytes("path", b"three") + chunked + b"GET / HTTP/1.1\r\nHost: pod\r\n\r\n" + request_bytes("echo",
                b"six", "1.1", "Connection: close"))
        answers = split_answers(pod.raw([data[start:start + piece] for start in range(0, len(data), piece)]))
        assert [status for status, _ in answers] == [200, 200, 200, 200, 404, 200]
        assert [body for _, body in answers][:4] == [b"one", b"Running", b"/bck/obj", b"four"]
        assert answers[-1][1] == b"six"


def test_a_stream_is_closed_when_its_client_goes_away(streaming: Runtime, base: str, marker: Path) -> None:
    for way in ("close", "reset"):
        with streaming.connect() as connection:
            connection.sendall(b"PUT /bck/%s-%s?etl_args=endless HTTP/1.1\r\nHost: pod\r\n\r\n" % (base.encode(), way.encode()))
            assert len(connection.recv(1 << 16)) > 0
            if way == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wanted = "bck/%s-%s" % (base, way)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not (marker.exists() and wanted in marker.read_text()):
            time.sleep(0.01)
        assert wanted in marker.read_text()


# == Size ==

LARGE_BYTES = 64 << 20


@pytest.mark.parametrize("mode", [BUFFERED, STREAMING], ids=["buffered", "streaming"])
@pytest.mark.parametrize("way", ["length", "chunks", "target"])
def test_large_objects_go_both_ways(pods: StartPod, shared_target: StandInTarget, mode: str, way: str) -> None:
    pod = pods(mode, "Threaded")
    content = shared_target.objects["/large"]
    assert len(content) == LARGE_BYTES
    if way == "target":
        status, digest = exchange_at_once(pod, b"GET /large HTTP/1.1\r\nHost: pod\r\n\r\n", ())
    elif way == "length":
        head = b"PUT /bck/obj HTTP/1.1\r\nHost: pod\r\nContent-Length: %d\r\n\r\n" % len(content)
        status, digest = exchange_at_once(pod, head, (content,))
    else:
        head = b"PUT /bck/obj HTTP/1.1\r\nHost: pod\r\nTransfer-Encoding: chunked\r\n\r\n"
        pieces = (content[start:start + (1 << 20)] for start in range(0, len(content), 1 << 20))
        status, digest = exchange_at_once(pod, head, chunked(pieces))
    assert (status, digest) == (200, hashlib.sha256(content).hexdigest())


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


GIBIBYTE_PIECES = 1024
GROWTH_LIMIT_BYTES = 32 << 20


def peak_of_workers(pod: Runtime) -> int:
    """Return the most memory that the workers ever had, in bytes, all together."""
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/%d/status" % worker).read_text()) for worker in children_of(pod.pid)]
    assert peaks and all(peaks)
    return sum(int(peak[1]) << 10 for peak in peaks if peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_stream_of_a_gibibyte_takes_constant_memory(pods: StartPod, framing: str) -> None:
    pod = pods(STREAMING, "Threaded", {"FOR_MEMORY": "1"})
    piece = os.urandom(1 << 20)
    assert put(pod, "echo", piece).body == piece
    before = peak_of_workers(pod)
    field = b"Transfer-Encoding: chunked" if framing == "chunks" else b"Content-Length: %d" % (GIBIBYTE_PIECES << 20)
    pieces = (piece for _ in range(GIBIBYTE_PIECES))
    status, digest = exchange_at_once(pod, b"PUT /bck/obj HTTP/1.1\r\nHost: pod\r\n%s\r\n\r\n" % field,
                                      chunked(pieces) if framing == "chunks" else pieces)
    expected = hashlib.sha256()
    for _ in range(GIBIBYTE_PIECES):
        expected.update(piece)
    assert (status, digest) == (200, expected.hexdigest())
    assert peak_of_workers(pod) - before < GROWTH_LIMIT_BYTES
