"""A Flask class's application on the built-in server: PEP 3333, and what Flask expects of a server.

The class's own applications are plain WSGI ones too, which `wsgiref.validate` watches.
"""
import ast
import contextlib
import http.client
import json
import socket
from typing import Callable, Iterator, List

import pytest

from applications import open_websocket, wait_until
from harness import Runtime, interpreter, make_payload
from peer import Peer, object_frames
from standin import StandInTarget

SOURCE = '''
import io, os, sys, threading, time
from wsgiref.validate import validator
import flask
from aistore.sdk.etl.webserver.flask_server import FlaskServer

def echo(environ, start_response):
    """Read the body as the path says, in each way that PEP 3333 has."""
    body, how = environ["wsgi.input"], environ["PATH_INFO"].rpartition("/")[2]
    if how == "read":
        pieces = list(iter(lambda: body.read(1000), b""))
        assert {len(piece) for piece in pieces[:-1]} <= {1000}
    elif how == "line":
        pieces = list(iter(body.readline, b""))
    elif how == "lines":
        pieces = body.readlines()
    else:
        pieces = list(body)
    print("said by", how, file=environ["wsgi.errors"])
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Pieces", str(len(pieces)))])
    return [b"".join(pieces)]

def describe(environ, start_response):
    known = {name: value for name, value in sorted(environ.items()) if isinstance(value, (str, bool))}
    text = repr(known).encode("latin-1")
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
    return [text]

class Output:
    """An iterable whose `close` is seen."""
    def __init__(self, pieces):
        self.pieces = iter(pieces)
    def __iter__(self):
        return self
    def __next__(self):
        piece = next(self.pieces)
        if isinstance(piece, Exception):
            raise piece
        return piece
    def close(self):
        print("output is shut", flush=True)

def outputs(environ, start_response):
    """Answer in pieces, with what the path says."""
    how = environ["PATH_INFO"].rpartition("/")[2]
    fields = [("Content-Type", "text/plain")]
    if how in ("exact", "short", "long", "none"):
        fields.append(("Content-Length", {"exact": "9", "short": "10", "long": "8", "none": "9"}[how]))
    status = {"nothing": "204 No Content", "same": "304 Not Modified"}.get(how, "200 OK")
    if how in ("nothing", "same"):
        del fields[0]
    write = start_response(status, fields)
    if how == "write":
        write(b"one")
        write(b"two")
        return Output([b"six"])
    if how == "before":
        return Output([ValueError("nothing yet")])
    if how == "after":
        return Output([b"one", ValueError("no more")])
    if how == "disk":
        return Output([b"one", OSError("no disk")])
    if how == "endless":
        return Output(iter(lambda: bytes(1 << 16), b""))
    return Output([] if how in ("nothing", "same", "none", "empty") else [b"one", b"", b"two", b"six"])

def misuse(environ, start_response):
    how = environ["PATH_INFO"].rpartition("/")[2]
    fields = [("Content-Type", "text/plain")]
    if how == "late":  # the application begins when its output is first asked for
        start_response("200 OK", fields)
        yield b"late"
    elif how == "replaced":
        start_response("200 OK", fields)
        try:
            raise ValueError("no good")
        except ValueError:
            start_response("503 Later", [*fields, ("X-Second", "1")], sys.exc_info())
        yield b"instead"
    elif how == "replaced-too-late":
        start_response("200 OK", fields)
        yield b"begun"
        try:
            raise ValueError("no good")
        except ValueError:
            start_response("503 Later", fields, sys.exc_info())
    elif how == "twice":
        start_response("200 OK", fields)
        start_response("200 OK", fields)
        yield b"twice"
    elif how == "informational":
        start_response("100 Continue", fields)
        yield b""
    elif how == "text":
        start_response("200 OK", fields)
        yield 7
    elif how == "hops":
        start_response("200 OK", [("Connection", "close"), ("Transfer-Encoding", "gzip"), ("Date", "never"),
                                  ("X-Broken", "a\\r\\nX-Second: b"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
        yield b"hops"
    else:
        yield b"unsaid"

class Decoding(io.RawIOBase):
    """What middleware puts into the place of a body."""
    def __init__(self, inner):
        self.inner = inner
    def readable(self):
        return True
    def readinto(self, buffer):
        data = bytes.fromhex(self.inner.read(2 * len(buffer)).decode())
        buffer[:len(data)] = data
        return len(data)

class Limited(FlaskServer):
    """Has a limit for bodies."""
    def __init__(self):
        super().__init__()
        self.app.config["MAX_CONTENT_LENGTH"] = 10
    def transform(self, data, path, etl_args):
        return data.upper()

class Wsgi(FlaskServer):
    """Plain applications beside Flask's own."""

    def __init__(self):
        super().__init__()
        self.flask_app = self.app.wsgi_app
        self.app.wsgi_app = self.choose
        self.app.add_url_rule("/form", view_func=self.form, methods=["POST"])
        self.app.add_url_rule("/data", view_func=self.data, methods=["POST"])
        self.app.add_url_rule("/stream", view_func=self.stream, methods=["POST"])
        self.app.add_url_rule("/unread", view_func=lambda: "unread", methods=["POST"])
        self.app.add_url_rule("/unread-pieces", view_func=self.unread_pieces, methods=["POST"])
        self.app.add_url_rule("/pieces", view_func=lambda: iter(["a", "b" * 100000]), endpoint="pieces")
        self.app.add_url_rule("/file", view_func=self.file)
        self.app.add_url_rule("/raises", view_func=lambda: 1 // 0, endpoint="raises")
        self.app.add_url_rule("/gone", view_func=lambda: flask.abort(410, "gone for good"), endpoint="gone")
        self.app.add_url_rule("/swallows", view_func=self.swallows, methods=["POST"])
        self.app.add_url_rule("/early", view_func=self.early, methods=["POST"])
        self.app.before_request(self.look)
        self.app.teardown_request(lambda error: print("torn down", flush=True))

    def look(self):
        """Read of the body what a field asks for, as extensions do."""
        how = flask.request.headers.get("x-look")
        if how == "form":
            flask.request.form
        elif how == "kept":
            flask.request.get_data()
        elif how == "lost":
            flask.request.get_data(cache=False)
        elif how == "byte":
            flask.request.stream.read(1)
        elif how == "least":
            flask.request.max_content_length = 10
            flask.request.get_data()

    def early(self):
        def pieces():
            yield b"begin "
            yield flask.request.stream.read()
        return flask.Response(flask.stream_with_context(pieces()), headers={"Content-Length": "11"})

    def _handle_request(self, path):
        return super()._handle_request(path.replace("alias/", "bucket/"))

    def choose(self, environ, start_response):
        how = environ.get("HTTP_X_DECODE")
        if how == "lazy":
            environ["wsgi.input"] = Decoding(environ["wsgi.input"])
        elif how == "eager":
            environ["wsgi.input"] = io.BytesIO(bytes.fromhex(environ["wsgi.input"].read().decode()))
        elif how == "short":
            environ["wsgi.input"] = io.BytesIO(b"hel")
        if how:
            environ["CONTENT_LENGTH"] = str(int(environ["CONTENT_LENGTH"]) // 2)
        if environ["PATH_INFO"].startswith("/v1/"):
            environ["PATH_INFO"] = environ["PATH_INFO"][3:]
        kind = environ["PATH_INFO"].split("/")[1]
        plain = {"echo": validator(echo), "describe": validator(describe), "outputs": validator(outputs),
                 "misuse": misuse}.get(kind, self.flask_app)
        return plain(environ, start_response)

    def form(self):
        request = flask.request
        files = {name: [file.filename, len(file.read())] for name, file in request.files.items()}
        return {"form": request.form.to_dict(), "files": files, "args": request.args.to_dict()}

    def data(self):
        return flask.request.get_data()

    def stream(self):
        pieces = iter(lambda: flask.request.stream.read(50000), b"")
        return flask.Response(flask.stream_with_context(piece.upper() for piece in pieces))

    def unread_pieces(self):
        return iter(["un", "read"])

    def file(self):
        return flask.send_file(io.BytesIO(b"0123456789" * 20000), mimetype="text/plain", download_name="x.txt",
                               conditional=True, etag="abc")

    def swallows(self):
        try:
            flask.request.get_data()
        except Exception as error:
            return "never mind"
        return "fine"

    def transform(self, data, path, etl_args):
        if etl_args == "fail":
            raise ValueError("bad object")
        return data.upper() + repr(path).encode()

class Fallback(FlaskServer):
    """An application that has the routes of other people's servers."""
    def __init__(self):
        super().__init__()
        self.app.add_url_rule("/<path:anything>", view_func=self.mine, methods=["GET"])
    def mine(self, anything):
        return "mine: " + anything
    def transform(self, data, path, etl_args):
        return data.upper()
'''


@pytest.fixture(scope="module")
def pod(shared_target: StandInTarget) -> Iterator[Runtime]:
    """One pod for all tests of this file, whose requests find routes of each kind."""
    env = {"ETL_CLASS_PAYLOAD": make_payload(SOURCE, "Wsgi"), "NUM_WORKERS": "1",
           "AIS_TARGET_URL": shared_target.url}
    with Runtime(env=env, python=interpreter("sdk"), expect_traceback=True) as pod:
        yield pod


# == PEP 3333 ==


@pytest.mark.parametrize("how", ["read", "line", "lines", "iterated"])
def test_the_body_can_be_read_in_every_way(pod: Runtime, how: str) -> None:
    lines = [b"x" * size + b"\n" for size in (0, 1, 70000, 3)] + [b"rest"]
    pieces = len(lines) if how != "read" else len(b"".join(lines)) // 1000 + 1
    for body in (b"".join(lines), iter(lines)):
        response = pod.request("PUT", "/echo/" + how, body)
        assert (response.status, response.body) == (200, b"".join(lines))
        assert response.headers["x-pieces"] == str(pieces)
    assert pod.request("POST", "/echo/" + how).body == b""


def test_the_environment_describes_the_request(pod: Runtime) -> None:
    with pod.connect() as client:
        port = client.getsockname()[1]
        client.sendall(
            b"POST /describe/%C3%A4%2Fb%0Ac//d?x=%20&y HTTP/1.1\r\nHost: pod:1\r\nCookie: a=1\r\n"
            b"Content-Type: text/x\r\nContent-Length: 2\r\nX-Mine: \xe4\r\nX_Mine: spoofed\r\n"
            b"Connection: close\r\n\r\nab")
        answer = client.makefile("rb").read().partition(b"\r\n\r\n")[2].decode("latin-1")
    seen = ast.literal_eval(answer)
    expected = {
        "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/describe/\xc3\xa4/b\nc//d",
        "QUERY_STRING": "x=%20&y", "CONTENT_TYPE": "text/x", "CONTENT_LENGTH": "2",
        "HTTP_HOST": "pod:1", "HTTP_COOKIE": "a=1", "HTTP_X_MINE": "\xe4",
        "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_PORT": str(pod.port), "wsgi.url_scheme": "http",
        "REMOTE_PORT": str(port), "wsgi.multithread": True, "wsgi.multiprocess": False,
        "wsgi.run_once": False, "wsgi.input_terminated": True,
        "RAW_URI": "/describe/%C3%A4%2Fb%0Ac//d?x=%20&y"}
    assert {name: seen.get(name) for name in expected} == expected
    assert not {"HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"}.intersection(seen)
    assert seen["REMOTE_ADDR"].endswith("127.0.0.1") and seen["SERVER_NAME"]


@pytest.mark.parametrize("how, status, length, body", [
    ("exact", 200, "9", b"onetwosix"), ("pieces", 200, None, b"onetwosix"),
    ("write", 200, None, b"onetwosix"), ("empty", 200, None, b""), ("nothing", 204, None, b""),
    ("same", 304, None, b"")])
def test_output_comes_as_the_application_frames_it_and_is_closed(
    pod: Runtime, how: str, status: int, length: str, body: bytes
) -> None:
    closed = pod.log().count("output is shut")
    response = pod.request("GET", "/outputs/" + how)
    assert (response.status, response.body) == (status, body)
    assert response.headers.get("content-length") == length
    assert ("transfer-encoding" in response.headers) == (length is None and status == 200)
    assert pod.request("HEAD", "/outputs/" + how).body == b""
    wait_until(lambda: pod.log().count("output is shut") >= closed + 2, "both outputs are closed")


def test_head_tells_the_length_and_sends_no_body(pod: Runtime) -> None:
    with pod.connect() as client:
        request = b"HEAD /outputs/%b HTTP/1.1\r\nHost: x\r\n%b\r\n"
        client.sendall(request % (b"exact", b"") + request % (b"pieces", b"Connection: close\r\n"))
        first, second, rest = client.makefile("rb").read().split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ") and b"\r\nContent-Length: 9\r\n" in first + b"\r\n"
    assert second.startswith(b"HTTP/1.1 200 ") and rest == b""


@pytest.mark.parametrize("how, reason", [
    ("short", "the answer has 9 bytes, and its Content-Length is 10"),
    ("long", "the answer has 9 bytes, and its Content-Length is 8"),
    ("after", "no more"), ("disk", "no disk")])
def test_an_answer_that_is_not_whole_is_cut_and_closed(
    pod: Runtime, how: str, reason: str
) -> None:
    closed = pod.log().count("output is shut")
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        pod.request("GET", "/outputs/" + how)
    pod.wait_for_line("/outputs/%s: the answer was cut: %s" % (how, reason))
    wait_until(lambda: pod.log().count("output is shut") > closed, "the output is closed")


@pytest.mark.parametrize("how, detail", [
    ("/outputs/before", "nothing yet"), ("/outputs/none", "the answer has 0 bytes"),
    ("/misuse/twice", "start_response"), ("/misuse/unsaid", "has not called start_response"),
    ("/misuse/informational", "100 Continue"), ("/misuse/text", "the application yielded 'int'")])
def test_what_fails_before_the_first_byte_is_told_by_a_status(
    pod: Runtime, how: str, detail: str
) -> None:
    response = pod.request("GET", how)
    assert response.status == 500 and detail in json.loads(response.body)["detail"]


def test_start_response_may_come_late_and_be_replaced_before_the_first_byte(pod: Runtime) -> None:
    assert pod.request("GET", "/misuse/late").body == b"late"
    response = pod.request("GET", "/misuse/replaced")
    assert (response.status, response.body) == (503, b"instead")
    assert response.headers["x-second"] == "1"
    with pytest.raises(http.client.IncompleteRead) as cut:
        pod.request("GET", "/misuse/replaced-too-late")
    assert cut.value.partial == b"begun"


def test_fields_of_the_connection_are_the_server_s_and_no_value_leaves_its_line(
    pod: Runtime
) -> None:
    response = pod.request("GET", "/misuse/hops")
    assert (response.status, response.body) == (200, b"hops")
    assert "connection" not in response.headers and "," in response.headers["date"]
    assert response.headers["transfer-encoding"] == "chunked"
    assert response.headers["x-broken"] == "a??X-Second: b" and "x-second" not in response.headers
    assert response.headers["set-cookie"] == "a=1, b=2"


def test_an_output_without_end_is_closed_when_its_reader_leaves(pod: Runtime) -> None:
    closed = pod.log().count("output is shut")
    with pod.connect() as client:
        client.sendall(b"GET /outputs/endless HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1 << 16)
    wait_until(lambda: pod.log().count("output is shut") > closed, "the output is closed")


# == Flask ==


def test_forms_files_and_arguments_arrive(pod: Runtime) -> None:
    fields = {"Content-Type": "application/x-www-form-urlencoded"}
    response = pod.request("POST", "/form?q=1", b"a=1&b=%C3%A4", fields)
    assert json.loads(response.body) == {"form": {"a": "1", "b": "\xe4"}, "files": {}, "args": {"q": "1"}}
    parts = (b'--xx\r\nContent-Disposition: form-data; name="n"\r\n\r\nv\r\n--xx\r\n'
             b'Content-Disposition: form-data; name="f"; filename="f.bin"\r\n\r\n'
             + bytes(300000) + b"\r\n--xx--\r\n")
    for body in (parts, iter([parts[:10], parts[10:]])):
        response = pod.request("POST", "/form", body, {"Content-Type": "multipart/form-data; boundary=xx"})
        seen = json.loads(response.body)
        assert (seen["form"], seen["files"]) == ({"n": "v"}, {"f": ["f.bin", 300000]})


def test_bodies_are_read_whole_and_streamed_in_both_directions(pod: Runtime) -> None:
    for size in (0, 1, 65536, 3 << 20):
        for body in (b"z" * size, iter([b"z" * (size - size // 2), b"z" * (size // 2)])):
            assert pod.request("POST", "/data", body).body == b"z" * size
        response = pod.request("POST", "/stream", b"z" * size)
        assert response.body == b"Z" * size and "transfer-encoding" in response.headers


@pytest.mark.parametrize("path", [b"/unread", b"/unread-pieces"])
def test_what_is_left_of_a_body_is_never_taken_for_the_next_request(pod: Runtime, path: bytes) -> None:
    hidden = b"GET /pieces HTTP/1.1\r\nHost: x\r\n\r\n"
    for count in (1, 3000):
        with pod.connect() as client, contextlib.suppress(ConnectionResetError):
            client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (
                path, len(hidden) * count) + hidden * count)
            client.shutdown(socket.SHUT_WR)
            answer = client.makefile("rb").read()
            assert answer.count(b"HTTP/1.1 ") == 1
            assert answer.endswith(b"unread") or answer.endswith(b"un\r\n4\r\nread\r\n0\r\n\r\n")


def test_an_invitation_comes_before_an_answer_that_reads_the_body(pod: Runtime) -> None:
    with pod.connect() as client:
        client.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
                       b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
        answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.sendall(b"hello")
        answer += client.makefile("rb").read()
    assert answer.count(b"100 Continue") == 1 and answer.endswith(b"\r\n\r\nbegin hello")


def test_send_file_and_its_ranges_work(pod: Runtime) -> None:
    response = pod.request("GET", "/file")
    assert (response.status, response.body) == (200, b"0123456789" * 20000)
    assert response.headers["content-length"] == "200000"
    assert pod.request("GET", "/file", headers={"If-None-Match": '"abc"'}).status == 304
    response = pod.request("GET", "/file", headers={"Range": "bytes=5-14"})
    assert (response.status, response.body) == (206, b"5678901234")
    assert response.headers["content-range"] == "bytes 5-14/200000"


def test_errors_are_flask_s_own(pod: Runtime) -> None:
    assert pod.request("GET", "/raises").status == 500
    pod.wait_for_line("ZeroDivisionError")
    response = pod.request("GET", "/gone")
    assert response.status == 410 and b"gone for good" in response.body
    response = pod.request("OPTIONS", "/form")
    assert response.status == 200 and "POST" in response.headers["allow"]
    torn = pod.log().count("torn down")
    assert pod.request("GET", "/pieces").body == b"a" + b"b" * 100000
    wait_until(lambda: pod.log().count("torn down") > torn, "the request is torn down")


@pytest.mark.parametrize("path", ["/data", "/stream", "/swallows", "/form", "/echo/read"])
@pytest.mark.parametrize("framing", [
    b"Content-Length: 100\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"])
def test_a_cut_body_is_told_whatever_the_application_makes_of_it(
    pod: Runtime, path: str, framing: bytes
) -> None:
    with pod.connect() as client:
        client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\n"
                       b"Content-Type: application/x-www-form-urlencoded\r\n" % path.encode() + framing)
        client.shutdown(socket.SHUT_WR)
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ") or (path == "/stream" and not answer.endswith(b"0\r\n\r\n"))


def test_a_client_that_waits_to_be_invited_is(pod: Runtime) -> None:
    with pod.connect() as client:
        client.sendall(b"POST /data HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hello")
        assert client.recv(1000).endswith(b"hello")


def test_a_cut_body_is_told_in_one_line_without_a_traceback(pod: Runtime) -> None:
    for path in (b"/data", b"/bucket/cut"):
        lines = len(pod.lines)
        with pod.connect() as client:
            client.sendall(b"PUT %b HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhello" % path
                           if path != b"/data" else
                           b"POST /data HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhello")
            client.shutdown(socket.SHUT_WR)
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 400 ")
        assert pod.request("GET", "/pieces").status == 200
        new = [line for line in pod.lines[lines:] if line.strip() and line != "torn down"]
        told = " - ERROR - %s: " % path.decode()  # a line of another request may come late
        assert len([line for line in new if told in line]) == (path != b"/data")
        assert not [line for line in new if "Traceback" in line]


# == Objects ==


@pytest.mark.parametrize("how, status", [
    ("kept", 200), ("form", 500), ("lost", 500), ("byte", 500), ("least", 500)])
def test_an_object_that_the_application_has_read_in_part_is_not_transformed(
    pod: Runtime, how: str, status: int
) -> None:
    data = b"a=1&b=2&c=hello world, how are you"
    fields = {"X-Look": how, "Content-Type": "application/x-www-form-urlencoded"}
    for body in (data, iter([data[:9], data[9:]])):
        response = pod.request("PUT", "/bucket/object", body, fields)
        if response.status == 200:
            assert response.body.startswith(data.upper()) and status == 200
        else:
            assert response.status in (status, 413)


@pytest.mark.parametrize("how", ["lazy", "eager"])
def test_an_object_is_what_middleware_makes_of_it(pod: Runtime, how: str) -> None:
    response = pod.request("PUT", "/bucket/object", b"hello".hex().encode(), {"X-Decode": how})
    assert (response.status, response.body) == (200, b"HELLO'bucket/object'")


def test_an_object_of_which_middleware_leaves_a_part_is_not_transformed(pod: Runtime) -> None:
    response = pod.request("PUT", "/bucket/object", b"hello".hex().encode(), {"X-Decode": "short"})
    assert response.status == 400 and b"ended after 3 of 5 bytes" in response.body


def test_the_application_s_limit_of_bodies_holds_for_objects(
    start_runtime: Callable[..., Runtime]
) -> None:
    runtime = start_runtime(make_payload(SOURCE, "Limited"), {"NUM_WORKERS": "1"}, python=interpreter("sdk"))
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO"
    assert runtime.request("PUT", "/bucket/object", iter([b"hel", b"lo"])).body == b"HELLO"
    assert runtime.request("PUT", "/bucket/object", b"hello world").status == 413
    assert runtime.request("PUT", "/bucket/object", iter([b"hello ", b"world"])).status in (400, 413)


def test_a_path_that_the_class_or_its_middleware_changes_is_that_of_the_object(pod: Runtime) -> None:
    for path in ("/alias/an%20object", "/v1/bucket/an%20object", "/v1/alias/an%20object"):
        response = pod.request("PUT", path, b"hello")
        assert (response.status, response.body) == (200, b"HELLO'bucket/an object'")


def test_routes_of_the_class_s_own_win_however_general_they_are(
    start_runtime: Callable[..., Runtime]
) -> None:
    runtime = start_runtime(make_payload(SOURCE, "Fallback"), {"NUM_WORKERS": "1"}, python=interpreter("sdk"))
    assert runtime.request("GET", "/any/thing").body == b"mine: any/thing"
    assert runtime.request("PUT", "/any/thing", b"hello").body == b"HELLO"


def test_objects_come_over_websocket_too(start_runtime: Callable[..., Runtime]) -> None:
    payload = make_payload(SOURCE, "Wsgi")
    pod = start_runtime(payload, {"NUM_WORKERS": "1"}, python=interpreter("sdk"), expect_traceback=True)
    with Peer(pod) as peer:
        peer.send(*(object_frames(b"hello", path="n%d" % number) for number in range(100)))
        expected: List[bytes] = [b"HELLO" + repr("n%d" % number).encode() for number in range(100)]
        assert [peer.result() for _ in range(100)] == expected
        peer.send(object_frames(b"hello", path="x", etl_args="fail"))
        assert peer.break_reason() == (1011, "Processing error: bad object")
    with open_websocket(pod) as client:
        client.send(b'{"path": "again"}')
        client.send(b"hello")
        assert client.recv() == b"HELLO'again'"
