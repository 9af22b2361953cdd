"""Stage 4, delivering: an output to its final target or to the next stage, and what becomes of it when that one fails.

`target` is the pod's own target, where objects are read from; `hop` is whom the outputs go to, another target or a stage.
The classes of these tests change every byte and no length, so that an output is never taken for its object.
"""
import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import re
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Union
from urllib.parse import parse_qsl, quote, urlsplit

import pytest

from conftest import StartTarget
from harness import (QUICK_NUMBERS, Body, Environ, Numbers, Response, Runtime, children_of,
                     make_payload)
from standin import BASE_PATH, At, Behaviour, Certificates, Recorded, StandInTarget

SOURCE = '''
import os

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

FLIPPED = bytes(range(255, -1, -1))


class Noting(HTTPMultiThreadedServer):
    """Notes every call in a file."""

    def note(self, path):
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(path + "\\n")


class Buffered(Noting):
    def transform(self, data, path, etl_args):
        self.note(path)
        return data.translate(FLIPPED)

    def get_mime_type(self):
        return "text/x-own"


class Streaming(Noting):
    """Fails after its first piece, or after its last one, where etl_args say so."""

    def transform_stream(self, reader, path, etl_args):
        self.note(path)
        for piece in iter(lambda: reader.read(65536), b""):
            yield piece.translate(FLIPPED)
            if etl_args == "fail half-way":
                raise ValueError("no more of it")
        if etl_args == "fail at the end":
            raise ValueError("no more of it")


class Put:
    """Carries deliveries by the class's own client_put."""

    def client_put(self, url, data, headers, timeout=None):
        return super().client_put(url, data, {**headers, "X-Own": "mine"}, timeout)


class PutBuffered(Put, Buffered):
    pass


class PutStreaming(Put, Streaming):
    pass


class Judge:
    """Decides the answer by the class's own handle_direct_put_response."""

    def handle_direct_put_response(self, resp, data, data_length=-1):
        status, body, length = super().handle_direct_put_response(resp, data, data_length)
        return (418, b"judged " + body, 0) if resp.status_code == 507 else (status, body, length)


class JudgeBuffered(Judge, Buffered):
    pass


class JudgeStreaming(Judge, Streaming):
    pass
'''
CLASSES = {"buffered": "Buffered", "streaming": "Streaming", "failing": "Streaming", "put-failing": "PutStreaming",
           "put-buffered": "PutBuffered", "put-streaming": "PutStreaming",
           "judge-buffered": "JudgeBuffered", "judge-streaming": "JudgeStreaming"}
FLIPPED = bytes(range(255, -1, -1))
TOKEN = "t0ken-of-the-cluster"
SECRETS = ("s3cr3t", TOKEN)
UNAME = "/ais%2F@%23%2Fbck%2Fdir%2Fobj"
FINAL = "/ais%2F@%23%2Fdst%2Fobj"
MIB = 1 << 20
SIZES = [0, 1, 65535, 65536, 65537, 3 * MIB + 1]
MORE_THAN_BUFFERS = 16 * MIB  # the buffers of two sockets hold less
SOURCES = ["length", "chunked", "fqn", "get", "get fqn"]
RETRY = ("Ais-Etl-Retry-Reason", "direct-put-transient")
RETRY_LINE = "trying again"
DELAY_SECONDS = 0.02  # before a retry
NUMBERS = {**QUICK_NUMBERS, "RETRY_DELAY_LIMIT_SECONDS": DELAY_SECONDS}


class Pod:
    """A runtime with one worker, the stand-ins around it, and the file in which its class notes its calls."""

    def __init__(
        self, kind: str, target: StandInTarget, folder: Path, env: Optional[Environ] = None,
        numbers: Numbers = NUMBERS,
    ) -> None:
        self.kind = kind
        self.target = target
        self.folder = Path(tempfile.mkdtemp(dir=str(folder)), "@ais", "bck", "%ob")
        self.folder.mkdir(parents=True)
        self._calls = self.folder / "calls"
        variables: Dict[str, Optional[str]] = {
            "ETL_CLASS_PAYLOAD": make_payload(SOURCE, CLASSES[kind]), "AIS_TARGET_URL": target.url, "NUM_WORKERS": "1",
            "AIS_AUTHN_TOKEN": TOKEN, "CALLS": str(self._calls), **(env or {}),
        }
        self.runtime = Runtime(
            env=variables, expect_traceback="failing" in kind, numbers=numbers)

    @property
    def is_streaming(self) -> bool:
        """Whether its class transforms in pieces."""
        return "streaming" in self.kind or "failing" in self.kind

    def ask(
        self, target: str, pipeline: Union[str, bytes], body: Optional[Body] = None,
        method: str = "PUT",
    ) -> Response:
        """Send a request whose output goes along a pipeline; no answer may hold a secret."""
        field = pipeline if isinstance(pipeline, str) else pipeline.decode("latin-1")
        response = self.runtime.request(method, target, body, {"Ais-Node-Url": field})
        check_answer(response)
        return response

    def send(self, source: str, content: bytes, pipeline: str, args: str = "") -> Response:
        """Have an object transformed and delivered, whichever way the runtime gets it."""
        queries = ["etl_args=" + quote(args, safe="")] if args else []
        if "fqn" in source:
            (self.folder / "obj").write_bytes(content)
            queries.append("etl_fqn=" + quote(quote(str(self.folder / "obj")), safe=""))
        self.target.objects[UNAME] = b"not this" if "fqn" in source else content
        method, path = ("GET", UNAME) if source.startswith("get") else ("PUT", "/bck/dir/obj")
        bodies: Dict[str, Body] = {"length": content, "chunked": pieces_of(content, 50000)}
        return self.ask(path + "?" * bool(queries) + "&".join(queries), pipeline, bodies.get(source), method)

    def calls(self) -> int:
        """Return how often the class was called so far."""
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0

    def retries(self, expected: int = 0) -> int:
        """Return how many retries the log tells of, once it tells of as many as are expected."""
        deadline = time.monotonic() + 10
        while self.runtime.log().count(RETRY_LINE) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.runtime.log().count(RETRY_LINE)

    def forget(self) -> None:
        """Begin a test: no calls, no lines; those of the one before may hold no secret and no traceback."""
        if self._calls.exists():
            self._calls.unlink()
        log = self.runtime.log()
        self.runtime.lines.clear()
        assert not [secret for secret in SECRETS if secret in log]
        assert self.runtime.expect_traceback or "Traceback" not in log, log


def check_answer(response: Response) -> None:
    """Fail if an answer tells a secret."""
    text = str(response.headers) + response.body.decode("latin-1")
    assert not [secret for secret in SECRETS if secret in text]


def detail(response: Response) -> str:
    """Return the reason of an answer that the runtime made itself."""
    assert response.headers["content-type"] == "application/json"
    return str(json.loads(response.body)["detail"])


def pieces_of(content: bytes, size: int) -> List[bytes]:
    """Cut a body into pieces."""
    return [content[start:start + size] for start in range(0, len(content), size)]


def flip(content: bytes) -> bytes:
    """Do what the classes do."""
    return content.translate(FLIPPED)


def flipped_by_stage(content: bytes) -> bytes:
    """Be a stage that puts what it gets between < and >."""
    return b"<" + content + b">"


class Turns:
    """Behaviours for one request after the other, the last one for all that follow; notes when their heads came."""

    def __init__(self, *plans: Behaviour) -> None:
        self.plans = plans
        self.times: List[float] = []

    def __call__(self, head: Recorded) -> Behaviour:
        self.times.append(time.monotonic())
        return self.plans[min(len(self.times), len(self.plans)) - 1]

    @property
    def delays(self) -> List[float]:
        """Return the times between two requests."""
        return [after - before for before, after in zip(self.times, self.times[1:])]


def wipe(stand_in: StandInTarget) -> None:
    """Make a stand-in forget what it got and what it was told."""
    stand_in.objects.clear()
    stand_in.requests.clear()
    stand_in.stored.clear()
    stand_in.script.clear()
    stand_in.default = Behaviour()


def check_token(*stand_ins: StandInTarget) -> None:
    """Fail if a stand-in was asked by a pod, and did not see the token."""
    tokens = {request.headers.get("authorization")
              for stand_in in stand_ins for request in stand_in.requests}
    assert tokens <= {"Bearer " + TOKEN}


@contextlib.contextmanager
def case(pod: Pod, hop: StandInTarget, *name: object) -> Iterator[None]:
    """One of many cases of a test: nothing is noted yet, and a failure names the case."""
    wipe(pod.target)
    wipe(hop)
    pod.forget()
    try:
        yield
        check_token(pod.target, hop)
    except Exception as error:
        text = "in the case of %r, where the log is:\n%s" % (name, pod.runtime.log())
        raise AssertionError(text) from error


@pytest.fixture(scope="module")
def shared_target() -> Iterator[StandInTarget]:
    """The pods' own target, for all tests of this file; its records are wiped before each test."""
    target = StandInTarget()
    yield target
    target.close()
    assert target.complaints == []


@pytest.fixture
def target(shared_target: StandInTarget) -> StandInTarget:
    """The pods' own target, which has nothing and got nothing."""
    wipe(shared_target)
    return shared_target


@pytest.fixture
def hop(target: StandInTarget, start_target: StartTarget) -> Iterator[StandInTarget]:
    """Another target, or the next stage, to which no pod has a connection yet."""
    stand_in = start_target()
    yield stand_in
    check_token(target, stand_in)


Pods = Callable[..., Pod]


@pytest.fixture(scope="module")
def pods(
    shared_target: StandInTarget, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pods]:
    """A function that starts a pod, or returns the one that it started before for the same arguments."""
    folder = tmp_path_factory.mktemp("pods")
    with contextlib.ExitStack() as ends:

        @functools.lru_cache(maxsize=None)
        def start(kind: str, retries: int) -> Pod:
            env = {"AIS_DIRECT_PUT_RETRIES": str(retries)}
            pod = Pod(kind, shared_target, folder, env)
            ends.push(pod.runtime)
            ends.callback(pod.forget)  # checks its log, before its end
            return pod

        def pod_of(kind: str, retries: int = 1) -> Pod:
            pod = start(kind, retries)
            pod.forget()
            return pod

        yield pod_of


StartPod = Callable[..., Pod]


@pytest.fixture
def start_pod(tmp_path: Path) -> Iterator[StartPod]:
    """A function that starts a pod of its own for a test, whose target it is given."""
    with contextlib.ExitStack() as pods:

        def start(
            kind: str, target: StandInTarget, numbers: Numbers = NUMBERS, **env: Optional[str]
        ) -> Pod:
            pod = Pod(kind, target, tmp_path, env, numbers)
            pods.push(pod.runtime)
            return pod

        yield start


@pytest.fixture(params=["buffered", "streaming"])
def pod(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """Each kind of pod in turn, with one retry."""
    return pods(request.param)


@pytest.fixture(params=["buffered", "put-buffered"])
def each_way(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """A pod for each way to a hop: ours, and the class's own client_put, which adds a header."""
    return pods(request.param)


@pytest.fixture(params=["buffered", "streaming", "put-buffered", "put-streaming"])
def any_pod(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """Each kind of pod in turn, for each way to a hop."""
    return pods(request.param)


def final(hop: StandInTarget, path: str = FINAL + "?uuid=abc&owt=3") -> str:
    """Name an object at its final target, as in a pipeline."""
    return "http://127.0.0.1:%d%s" % (hop.port, path)


def entry_of(hop: StandInTarget, kind: str) -> str:
    """Name a hop as a final target or as a stage."""
    return final(hop) if kind == "final" else hop.root


# == The final target ==


@pytest.mark.parametrize("source", SOURCES)
def test_an_object_of_any_size_is_delivered_whole_to_its_final_target(
    any_pod: Pod, hop: StandInTarget, source: str
) -> None:
    for size in SIZES:
        with case(any_pod, hop, size):
            content = os.urandom(size)
            response = any_pod.send(source, content, final(hop))
            assert (response.status, response.body) == (204, b"")
            assert response.headers["ais-direct-put-length"] == str(size)
            assert hop.stored == {FINAL: flip(content)}
            request, = hop.requests
            assert request.complete
            framing = {name: value for name, value in request.headers.items()
                       if name in ("content-length", "transfer-encoding")}
            is_chunked = any_pod.is_streaming
            assert framing == (
                {"transfer-encoding": "chunked"} if is_chunked else {"content-length": str(size)})
            by_class = any_pod.kind.startswith("put")
            assert request.headers.get("x-own") == ("mine" if by_class else None)


def test_the_path_and_the_query_of_a_final_target_go_out_byte_for_byte_behind_the_secret_path(
    each_way: Pod, hop: StandInTarget
) -> None:
    for path in [
        FINAL + "?uuid=abc&owt=3", FINAL, "/ais%2F@%23%2Fdst%2Fa%20b%2Bc;v=1", "/a//b",
        "/x?y=%2F&z=a+b&empty=&none", "/a%2fb%2Fc", "/a%252Fb", "/%FF%FE", "/a:b@c!$&'()*+=~",
        "/ais%2F@%23%2Fdst%2F%C3%BCn%C3%AF?x=%C3%BC", "/dir/?x=1", "/..%2F..%2Fx", "/a?b?c",
    ]:
        with case(each_way, hop, path):
            assert each_way.send("length", b"content", final(hop, path)).status == 204
            request, = hop.requests
            assert (request.method, request.target) == ("PUT", BASE_PATH + path)
            assert request.headers["host"] == "127.0.0.1:%d" % hop.port
            assert "ais-node-url" not in request.headers


def test_arguments_go_along_percent_encoded_and_replace_any_there(
    pods: Pods, hop: StandInTarget
) -> None:
    pod = pods("buffered")
    queries = ["", "?uuid=a%2Fb&owt=3", "?etl_args=old&uuid=a%2Fb&etl_args=older",
               "?etl_argsx=1&xetl_args=2"]
    entries = [*(final(hop, FINAL + query) for query in queries), hop.root]
    for entry, args in itertools.product(
        entries,
        ["1", "a b", "a+b", "a&etl_args=c", "50%", "%20", "{\"a\": [1, 2]}", "ünï€", "/?#;"],
    ):
        with case(pod, hop, entry, args):
            hop.default = Behaviour(status=204)
            assert pod.send("length", b"content", entry, args).status == 204
            sent = urlsplit(hop.requests[0].target).query.split("&")
            own, = [item for item in sent if item.startswith("etl_args=")]
            others = [item for item in urlsplit(entry).query.split("&")
                      if item and not item.startswith("etl_args=")]
            assert [item for item in sent if item != own] == others
            assert parse_qsl(own) == [("etl_args", args)]
            assert "+" not in own


@pytest.mark.parametrize("behaviour", [
    Behaviour(status=200), Behaviour(status=204), Behaviour(status=200, framing="chunked"),
    Behaviour(status=200, framing="close"), Behaviour(interim=(100,)), Behaviour(interim=(102, 103)),
    Behaviour(stall=At.AFTER_BODY, stall_seconds=0.1),
], ids=["200", "204", "chunked", "close", "100", "102", "slow"])
def test_an_empty_answer_of_the_final_target_means_delivered(
    any_pod: Pod, hop: StandInTarget, behaviour: Behaviour
) -> None:
    for size in (0, 5, 2 * MIB):
        with case(any_pod, hop, size):
            hop.default = behaviour
            content = os.urandom(size)
            response = any_pod.send("length", content, final(hop))
            assert response.status == 204
            assert response.headers.get("ais-direct-put-length") == str(size)
            request, = hop.requests
            assert (request.body == flip(content), request.complete) == (True, True)


def test_content_in_the_answer_of_a_final_target_means_that_it_is_none(
    each_way: Pod, hop: StandInTarget
) -> None:
    for framing in ("length", "chunked", "close"):
        with case(each_way, hop, framing):
            hop.default = Behaviour(status=200, body=b"<html>hello</html>", framing=framing)
            assert each_way.send("length", b"content", final(hop)).status == 502


def test_the_target_that_is_read_from_may_be_the_one_that_is_put_to(pod: Pod, target: StandInTarget) -> None:
    content = os.urandom(3 * MIB)
    assert pod.send("get", content, final(target)).status == 204
    assert target.stored == {FINAL: flip(content)}
    assert {request.headers["authorization"] for request in target.requests} == {"Bearer " + TOKEN}


# == The next stage ==


def test_a_stage_gets_the_path_of_the_object_decoded_and_quoted_again(
    each_way: Pod, hop: StandInTarget
) -> None:
    for path, expected in [
        ("/bck/obj", "/bck/obj"), ("/bck/dir/obj.tar", "/bck/dir/obj.tar"),
        ("/bck/a%20b", "/bck/a%20b"), ("/bck/100%25", "/bck/100%25"), ("/bck/a+b", "/bck/a%2Bb"),
        ("/bck/a%2Bb", "/bck/a%2Bb"), ("/bck/a%23b", "/bck/a%23b"), ("/bck/a%3Fb", "/bck/a%3Fb"),
        ("/bck/a%252Fb", "/bck/a%252Fb"), ("/bck/a@b", "/bck/a@b"),
        ("/bck/a;v=1", "/bck/a%3Bv%3D1"), ("/bck/a:b&c", "/bck/a%3Ab%26c"),
        ("/bck/~_-.", "/bck/~_-."), ("/bck/%c3%bc", "/bck/%C3%BC"),
        ("/bck/ü€".encode().decode("latin-1"), "/bck/%C3%BC%E2%82%AC"),
        ("/bck/%FF%FEx", "/bck/%FF%FEx"), ("/bck/\xff", "/bck/%FF"), ("/bck/%00", "/bck/%00"),
        ("/bck/a%0Ab", "/bck/a%0Ab"), ("/bck/a//b", "/bck/a//b"),
        ("/bck/q?x=1?etl_args=1", "/bck/q%3Fx%3D1"), (UNAME, "/ais/@%23/bck/dir/obj"),
    ]:
        for entry in (hop.root, hop.root + "/"):
            with case(each_way, hop, path, entry):
                hop.default = Behaviour(status=200, body=flipped_by_stage)
                response = each_way.ask(path, entry, b"content")
                assert (response.status, response.body) == (200, b"<" + flip(b"content") + b">")
                assert [(request.method, request.path) for request in hop.requests] == [
                    ("PUT", expected)]


@pytest.mark.parametrize("source", ["get", "get fqn"])
def test_a_stage_gets_the_path_of_an_object_that_was_asked_for(pod: Pod, hop: StandInTarget, source: str) -> None:
    hop.default = Behaviour(status=200, body=flipped_by_stage)
    assert pod.send(source, b"content", hop.root).body == b"<" + flip(b"content") + b">"
    assert hop.requests[0].path == "/ais/@%23/bck/dir/obj"


def test_the_rest_of_the_pipeline_goes_along(each_way: Pod, hop: StandInTarget) -> None:
    for entry, comma, rest in itertools.product((final(hop), hop.root), (",", ", ", " ,\t"), [
        "http://10.0.0.7:8000", "http://10.0.0.7:8000/ais%2F@%23%2Fdst%2Fobj?uuid=a&owt=1",
        "http://a:8000,http://b:8000/, http://c:51081/ais%2F@%23%2Fdst%2Fobj?uuid=a&owt=1",
    ]):
        with case(each_way, hop, entry, comma, rest):
            hop.default = Behaviour(status=204)
            assert each_way.send("length", b"content", entry + comma + rest).status == 204
            assert hop.requests[0].headers["ais-node-url"] == rest


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_the_content_that_a_stage_answers_is_passed_back_with_its_type_also_where_it_is_empty(
    any_pod: Pod, hop: StandInTarget, framing: str
) -> None:
    for size in SIZES:
        with case(any_pod, hop, size):
            content = os.urandom(size)
            headers = (("Content-Type", "image/x-stage"),)
            hop.default = Behaviour(status=200, body=content, framing=framing, headers=headers)
            response = any_pod.send("length", b"content", hop.root)
            assert (response.status, response.body == content) == (200, True)
            assert response.headers["content-type"] == "image/x-stage"
            assert "ais-direct-put-length" not in response.headers
            if not size:  # an empty answer with a length would be the news of a delivery
                assert response.headers["transfer-encoding"] == "chunked"
                assert "content-length" not in response.headers


def test_the_news_of_a_delivery_further_on_is_passed_back(each_way: Pod, hop: StandInTarget) -> None:
    for length in ("0", "1", "12345678901"):
        with case(each_way, hop, length):
            hop.default = Behaviour(status=204, headers=(("Ais-Direct-Put-Length", length),))
            response = each_way.send("length", b"content", hop.root)
            assert (response.status, response.body) == (204, b"")
            assert response.headers.get("ais-direct-put-length", "0") == length


# == Statuses ==


@pytest.mark.parametrize("kind", ["final", "stage"])
def test_an_error_of_a_hop_is_passed_back_and_what_would_be_misunderstood_is_502(
    any_pod: Pod, hop: StandInTarget, kind: str
) -> None:
    headers = (("Content-Type", "text/x-why"), ("Location", "/elsewhere"))
    errors = (400, 401, 403, 409, 416, 429, 499, 500, 501, 502, 503, 507, 599)
    others = (201, 202, 203, 205, 206, 226, 300, 301, 302, 303, 304, 307, 308, 404)
    for status in (*errors, *others):
        with case(any_pod, hop, status):
            body = b"no, because" if status != 205 else b""
            hop.default = Behaviour(status=status, body=body, headers=headers)
            response = any_pod.send("length", b"content", entry_of(hop, kind))
            if status in errors:
                assert (response.status, response.body) == (status, b"no, because")
                assert response.headers["content-type"] == "text/x-why"
            else:
                assert response.status == 502
                assert str(status) in detail(response)
            assert (len(hop.requests), any_pod.retries()) == (1, 0)


def test_the_body_of_an_error_is_passed_back_whole_however_it_comes(
    pod: Pod, hop: StandInTarget
) -> None:
    why = b"no, because " * 2500
    for kind, framing, first in [
        ("final", "length", 1), ("final", "chunked", 1), ("stage", "chunked", 20000),
        ("stage", "close", 1),
    ]:
        with case(pod, hop, kind, framing, first):
            hop.default = Behaviour(status=500, body=why, framing=framing, after_bytes=first,
                                    stall=At.IN_ANSWER_BODY, stall_seconds=0.1)
            response = pod.send("length", b"content", entry_of(hop, kind))
            assert (response.status, len(response.body)) == (500, len(why))
            assert response.body == why


def test_an_interim_answer_does_not_stop_a_body_that_is_still_going_out(
    any_pod: Pod, hop: StandInTarget
) -> None:
    hop.default = Behaviour(interim=(102,), stall=At.BEFORE_BODY, stall_seconds=0.3)
    content = os.urandom(MORE_THAN_BUFFERS)
    assert any_pod.send("length", content, final(hop)).status == 204
    assert hop.stored == {FINAL: flip(content)}


def test_an_error_of_a_hop_that_quotes_a_secret_is_passed_back_without_it(
    each_way: Pod, hop: StandInTarget
) -> None:
    body = b"PUT %s/obj?x by %s failed" % (BASE_PATH.encode(), TOKEN.encode())
    for status, kind in itertools.product((400, 404, 500, 301), ("final", "stage")):
        with case(each_way, hop, status, kind):
            hop.default = Behaviour(status=status, body=body)
            response = each_way.send("length", b"content", entry_of(hop, kind))
            assert b"failed" in response.body
            assert not [secret for secret in SECRETS if secret in each_way.runtime.log()]


def test_a_malformed_pipeline_is_a_bad_request_before_anything_is_done(pods: Pods, hop: StandInTarget) -> None:
    pod = pods("buffered")
    for pipeline in [
        ",", ",,", "http://127.0.0.1:9,,http://127.0.0.1:9", "http://127.0.0.1:9,",
        ",http://127.0.0.1:9", "http://127.0.0.1:9, ,", "http://", "http:///x", "http://:80",
        "http://:80/x", "https://", "ftp://127.0.0.1:9", "ftp://127.0.0.1:9/x",
        "file:///etc/passwd", "nonsense", "127.0.0.1:9", "//127.0.0.1:9", "/x", "http:/x",
        "http://127.0.0.1:port", "http://127.0.0.1:99999", "http://[::1", "http://[::1/x",
        "http://127.0.0.1:port/x", "http://127.0.0.1:-1", "http://a b:1",
        "http://127.0.0.1:9\\@x:1/",
    ]:
        with case(pod, hop, pipeline):
            response = pod.send("get", b"content", pipeline)
            assert response.status == 400
            assert detail(response)
            assert (pod.retries(), pod.calls(), pod.target.requests) == (0, 0, [])


# == Retries ==


LOST = [
    ("final", Behaviour(cut=At.BEFORE_BODY)), ("final", Behaviour(cut=At.IN_BODY, reset=True)),
    ("final", Behaviour(cut=At.AFTER_BODY)), ("final", Behaviour(cut=At.AFTER_BODY, reset=True)),
    ("final", Behaviour(cut=At.IN_ANSWER_HEAD)), ("final", Behaviour(cut=At.IN_ANSWER_HEAD, reset=True)),
    ("final", Behaviour(cut=At.IN_ANSWER_BODY, framing="chunked")),
    ("stage", Behaviour(cut=At.BEFORE_BODY, reset=True)), ("stage", Behaviour(cut=At.IN_BODY)),
    ("stage", Behaviour(status=200, body=b"cut" * 99, cut=At.IN_ANSWER_BODY, reset=True)),
    ("stage", Behaviour(status=200, body=b"cut", declared=99)), ("stage", Behaviour(status=204, cut=At.IN_ANSWER_HEAD)),
    ("stage", Behaviour(status=503, headers=(RETRY,), body=b"lost it")),
]
LOST_IDS = ["%s-%s-%s" % (kind, plan.cut.name if plan.cut else plan.status, "reset" if plan.reset else "polite")
            for kind, plan in LOST]
each_loss = pytest.mark.parametrize("kind, loss", LOST, ids=LOST_IDS)


@each_loss
def test_a_hop_that_is_lost_or_wants_it_so_gets_the_object_again(
    pods: Pods, target: StandInTarget, start_target: StartTarget, kind: str, loss: Behaviour
) -> None:
    for pod_kind, source in [
        ("buffered", "length"), ("buffered", "fqn"), ("streaming", "fqn"), ("streaming", "get"),
        ("streaming", "get fqn"), ("put-buffered", "chunked"), ("put-streaming", "fqn"),
    ]:
        pod, hop = pods(pod_kind), start_target()
        with case(pod, hop, pod_kind, source):
            good = Behaviour() if kind == "final" else Behaviour(status=200, body=flipped_by_stage)
            hop.default = turns = Turns(loss, good)
            content = os.urandom(300000)
            response = pod.send(source, content, entry_of(hop, kind))
            if kind == "final":
                assert (response.status, response.headers["ais-direct-put-length"]) == (204, "300000")
                assert hop.stored[FINAL] == flip(content)
            else:
                assert (response.status, response.body) == (200, b"<" + flip(content) + b">")
            assert (len(turns.times), pod.retries(1)) == (2, 1)
            assert turns.delays[0] >= DELAY_SECONDS
            assert pod.calls() == (2 if pod.is_streaming else 1)
            assert len(target.requests) == (2 if source == "get" else 0)


@each_loss
def test_a_body_that_cannot_be_read_again_makes_the_sender_send_it_again(
    pods: Pods, start_target: StartTarget, kind: str, loss: Behaviour
) -> None:
    for pod_kind, source in itertools.product(("streaming", "put-streaming"), ("length", "chunked")):
        pod, hop = pods(pod_kind), start_target()
        with case(pod, hop, pod_kind, source):
            hop.default = turns = Turns(loss, Behaviour())
            response = pod.send(source, os.urandom(300000), entry_of(hop, kind))
            assert response.status == 503
            assert response.headers.get("ais-etl-retry-reason") == "direct-put-transient"
            assert (len(turns.times), pod.retries(), pod.calls()) == (1, 0, 1)


@each_loss
@pytest.mark.parametrize("retries", [0, 1])
def test_a_hop_that_is_lost_too_often_is_502(
    pods: Pods, start_target: StartTarget, kind: str, loss: Behaviour, retries: int
) -> None:
    for pod_kind in ("buffered", "streaming", "put-buffered"):
        pod, hop = pods(pod_kind, retries), start_target()
        with case(pod, hop, pod_kind):
            hop.default = loss
            response = pod.send("fqn", b"content" * 9999, entry_of(hop, kind))
            assert response.status == 502
            assert "ais-etl-retry-reason" not in response.headers
            assert (len(hop.requests), pod.retries(retries)) == (1 + retries, retries)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_the_delays_grow_and_a_hop_that_is_always_lost_is_502_within_eight_seconds(
    start_pod: StartPod, target: StandInTarget, hop: StandInTarget, kind: str
) -> None:
    hop.default = turns = Turns(Behaviour(cut=At.IN_BODY))
    pod = start_pod(kind, target, numbers=None, AIS_DIRECT_PUT_RETRIES=None)
    response = pod.send("fqn", os.urandom(300000), final(hop))
    assert time.monotonic() - turns.times[0] < 10
    assert response.status == 502
    assert len(turns.times) == 4
    assert [delay > least for delay, least in zip(turns.delays, (0.9, 1.9, 3.9))] == [True] * 3
    assert hop.stored == {}


def test_a_hop_that_nobody_listens_at_is_502_without_a_retry(
    any_pod: Pod, hop: StandInTarget
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:%d" % nobody.getsockname()[1]
        for source, path in itertools.product(("length", "fqn"), ("", FINAL)):
            with case(any_pod, hop, source, path):
                response = any_pod.send(source, b"content", url + path)
                assert (response.status, any_pod.retries()) == (502, 0)
                assert "ais-etl-retry-reason" not in response.headers


# == Outputs and objects that fail half-way ==


@pytest.mark.parametrize("pod_kind", ["failing", "put-failing"])
@pytest.mark.parametrize("kind", ["final", "stage"])
def test_a_stream_that_fails_is_500_and_the_hop_never_sees_a_whole_object(
    pods: Pods, hop: StandInTarget, pod_kind: str, kind: str
) -> None:
    pod = pods(pod_kind)
    for size, source, args in itertools.product(
        (100, 3 * MIB), ("length", "chunked", "fqn", "get"), ("fail half-way", "fail at the end"),
    ):
        with case(pod, hop, size, source, args):
            hop.default = Behaviour(status=200, body=flipped_by_stage if kind == "stage" else b"")
            response = pod.send(source, os.urandom(size), entry_of(hop, kind), args)
            assert response.status == 500
            assert "no more of it" in detail(response)
            assert [request.complete for request in hop.wait_for_requests(1)] == [False]
            assert (hop.stored, pod.calls(), pod.retries()) == ({}, 1, 0)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_request_that_is_cut_short_delivers_no_whole_object(
    any_pod: Pod, hop: StandInTarget, framing: str
) -> None:
    for size, kind in itertools.product((100, 65536, 2 * MIB), ("final", "stage")):
        field = b"Content-Length: %d" % (size + 1) if framing == "length" else b"Transfer-Encoding: chunked"
        body = os.urandom(size)
        head = b"PUT /bck/obj HTTP/1.1\r\nHost: x\r\nAis-Node-Url: %s\r\n%s\r\n\r\n" % (entry_of(hop, kind).encode(), field)
        with case(any_pod, hop, size, kind), any_pod.runtime.connect() as connection:
            connection.sendall(head + (body if framing == "length" else b"%x\r\n%s\r\n" % (size, body)))
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as answer:
                status = answer.readline()
            assert status[9:10] in (b"", b"4", b"5")
            if any_pod.is_streaming:
                hop.wait_for_requests(1)
            assert [request for request in hop.requests if request.complete] == []
            assert hop.stored == {}


def test_an_object_that_the_target_cuts_short_is_not_delivered(
    any_pod: Pod, target: StandInTarget, hop: StandInTarget
) -> None:
    for framing in ("length", "chunked"):
        with case(any_pod, hop, framing):
            target.default = Behaviour(status=200, body=bytes(MIB), framing=framing,
                                       cut=At.IN_ANSWER_BODY, after_bytes=300000)
            assert any_pod.ask(UNAME, final(hop), method="GET").status >= 500
            assert [request for request in hop.requests if request.complete] == []


# == The pool ==


def statuses_in_a_row(pod: Pod, pipeline: str, content: bytes, count: int) -> List[int]:
    """Send an object again and again over one connection, so that one thread answers; return the statuses."""
    head = b"PUT /bck/obj HTTP/1.1\r\nHost: x\r\nAis-Node-Url: %s\r\nContent-Length: %d\r\n%s\r\n"
    requests = [head % (pipeline.encode(), len(content), field) + content
                for field in [*[b""] * (count - 1), b"Connection: close\r\n"]]
    received = pod.runtime.raw(b"".join(requests), quiet=10.0)
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", received)]


@pytest.mark.parametrize("kind, answer", [
    ("final", Behaviour()), ("final", Behaviour(status=200, framing="chunked")),
    ("stage", Behaviour(status=200, body=b"content")),
    ("stage", Behaviour(status=200, body=bytes(100000))), ("stage", Behaviour(status=200, body=b"content", framing="chunked")),
    ("stage", Behaviour(status=204)),
], ids=["final", "final-chunked", "stage", "stage-large", "stage-chunked", "stage-204"])
def test_a_connection_to_a_hop_is_used_again(
    pods: Pods, start_target: StartTarget, kind: str, answer: Behaviour
) -> None:
    pod = pods("buffered")
    status = 204 if kind == "final" or answer.status == 204 else 200
    for size in (0, 5, 100000):
        hop = start_target()
        with case(pod, hop, size):
            hop.default = answer
            statuses = statuses_in_a_row(pod, entry_of(hop, kind), bytes(size), 10)
            assert statuses == [status] * 10
            assert hop.connections == 1
            assert [len(request.body) for request in hop.requests] == [size] * 10


def test_a_connection_that_is_idle_for_long_is_closed(start_pod: StartPod, target: StandInTarget) -> None:
    numbers = {**NUMBERS, "HOP_IDLE_SECONDS": 0.3, "SWEEP_SECONDS": 0.1}
    pod = start_pod("buffered", target, numbers=numbers)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as sender:
        stage = "http://127.0.0.1:%d" % listener.getsockname()[1]
        asked = sender.submit(pod.send, "length", b"content", stage)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(20)
            request = b""
            while not request.endswith(flip(b"content")):
                request += connection.recv(MIB)
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            assert asked.result().status == 204
            assert connection.recv(1) == b""


BREAKS = [  # what the hop does with the first two requests, and the connections that they come by
    ([Behaviour(cut=At.AFTER_ANSWER)], [1, 2]),
    ([Behaviour(cut=At.AFTER_ANSWER, reset=True)], [1, 2]),
    ([Behaviour(status=200, framing="close")], [1, 2]),
    *[([Behaviour(), Behaviour(cut=cut, reset=reset)], [1, 1, 2])
      for cut in (At.BEFORE_BODY, At.IN_BODY, At.AFTER_BODY) for reset in (False, True)],
    *[([Behaviour(), Behaviour(cut=cut, reset=reset, framing="chunked")], [1, 1])
      for cut in (At.IN_ANSWER_HEAD, At.IN_ANSWER_BODY) for reset in (False, True)],
]


def test_a_used_connection_that_breaks_is_dialed_anew_but_not_where_the_answer_had_begun(
    pods: Pods, start_target: StartTarget
) -> None:
    pod = pods("buffered", 0)
    for (plans, connections), size in itertools.product(BREAKS, (5, 300000)):
        hop = start_target()
        with case(pod, hop, plans, size):
            hop.default = Turns(*plans, Behaviour())
            content = os.urandom(size)
            statuses = statuses_in_a_row(pod, final(hop), content, 2)
            assert statuses == [204, 204 if connections[-1] == 2 else 502]
            assert [request.connection for request in hop.requests] == connections
            assert (pod.retries(), pod.calls()) == (0, 2)
            whole = [request.body == flip(content) for request in hop.requests if request.complete]
            assert len(whole) >= 2 and all(whole)


def test_a_body_that_cannot_be_sent_twice_takes_a_new_connection(pods: Pods, hop: StandInTarget) -> None:
    content = os.urandom(1000)
    assert statuses_in_a_row(pods("streaming"), final(hop), content, 5) == [204] * 5
    assert len({request.connection for request in hop.requests}) == 5
    assert [request.body for request in hop.requests] == [flip(content)] * 5


# == Early errors ==


def test_a_target_that_answers_before_it_has_the_object_has_not_got_it(pod: Pod, hop: StandInTarget) -> None:
    hop.default = Behaviour(status=200, early=True, stall=At.BEFORE_BODY, stall_seconds=0.3)
    response = pod.send("fqn", os.urandom(MORE_THAN_BUFFERS), final(hop))
    assert (response.status, "before it had" in detail(response)) == (502, True)


@pytest.mark.parametrize("refusal", [
    Behaviour(status=507, body=b"out of space", early=True, read_on=False),
    Behaviour(status=507, body=b"out of space", early=True, framing="close", cut=At.BEFORE_BODY),
], ids=["deaf", "closing"])
def test_an_error_of_a_hop_that_reads_no_further_is_passed_back(
    any_pod: Pod, hop: StandInTarget, refusal: Behaviour
) -> None:
    for source, kind in [("length", "final"), ("chunked", "final"), ("fqn", "final"), ("fqn", "stage")]:
        with case(any_pod, hop, source, kind):
            hop.default = refusal
            response = any_pod.send(source, bytes(MORE_THAN_BUFFERS), entry_of(hop, kind))
            assert (response.status, response.body) == (507, b"out of space")
            assert (any_pod.retries(), any_pod.calls()) == (0, 1)


def test_an_error_of_a_hop_that_resets_the_connection_behind_it_is_passed_back(any_pod: Pod, hop: StandInTarget) -> None:
    hop.default = Behaviour(status=507, body=b"out of space", early=True, cut=At.BEFORE_BODY, reset=True)
    answers = [any_pod.send("fqn", bytes(4 * MIB), final(hop)) for _ in range(10)]
    assert [(answer.status, answer.body) for answer in answers] == [(507, b"out of space")] * 10


# == TLS ==


@pytest.fixture(scope="module", params=["buffered", "streaming", "put-buffered", "put-streaming"])
def tls_pod(
    request: pytest.FixtureRequest, certificates: Certificates,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pod]:
    """Each kind of pod in turn, in a cluster whose targets speak TLS and want a certificate."""
    target = StandInTarget(certificates.server_context(verify_client=True))
    pod = Pod(request.param, target, tmp_path_factory.mktemp("pods"), {
        "AIS_CLIENT_CA": str(certificates.ca), "AIS_CRT": str(certificates.client),
        "AIS_CRT_KEY": str(certificates.client_key),
    })
    with pod.runtime:
        yield pod
    target.close()
    assert target.complaints == []


@pytest.mark.parametrize("source", ["length", "get"])
def test_objects_are_delivered_by_tls_to_a_target_of_the_clusters_authority(
    tls_pod: Pod, start_target: StartTarget, certificates: Certificates, source: str
) -> None:
    other = start_target(certificates.server_context(verify_client=True))
    for size in (0, 65537, 20 * MIB):
        with case(tls_pod, other, size):
            content = os.urandom(size)
            response = tls_pod.send(source, content, final(other))
            assert response.status == 204
            assert response.headers["ais-direct-put-length"] == str(size)
            assert other.stored[FINAL] == flip(content)


def test_a_stage_speaks_its_own_scheme_where_the_target_speaks_tls(
    tls_pod: Pod, start_target: StartTarget, certificates: Certificates
) -> None:
    for stage in (start_target(), start_target(certificates.server_context())):
        with case(tls_pod, stage, stage.root):
            stage.default = Behaviour(status=200, body=flipped_by_stage)
            response = tls_pod.send("length", b"content", stage.root)
            assert response.body == b"<" + flip(b"content") + b">"


def test_an_early_error_is_passed_back_over_tls(tls_pod: Pod) -> None:
    with case(tls_pod, tls_pod.target):
        tls_pod.target.default = Behaviour(
            status=507, body=b"out of space", early=True, read_on=False)
        response = tls_pod.send("fqn", bytes(MORE_THAN_BUFFERS), final(tls_pod.target))
        assert (response.status, response.body) == (507, b"out of space")


@pytest.mark.parametrize("kind", ["buffered", "put-buffered"])
@pytest.mark.parametrize("skips, status", [("false", 502), ("true", 204)])
def test_a_target_of_an_unknown_authority_is_502_without_a_retry_unless_that_does_not_matter(
    start_pod: StartPod, start_target: StartTarget, certificates: Certificates, kind: str,
    skips: str, status: int,
) -> None:
    target = start_target(certificates.server_context())
    pod = start_pod(kind, target, AIS_SKIP_VERIFY_CRT=skips)
    for source in ("length", "fqn"):
        assert pod.send(source, b"content", final(target)).status == status
    assert (len(target.requests), pod.retries()) == (2 if status == 204 else 0, 0)


def test_a_target_that_wants_a_certificate_which_is_not_there_is_502(
    start_pod: StartPod, start_target: StartTarget, certificates: Certificates
) -> None:
    target = start_target(certificates.server_context(verify_client=True))
    pod = start_pod("buffered", target, AIS_CLIENT_CA=str(certificates.ca))
    for source in ("length", "fqn"):
        assert pod.send(source, b"content", final(target)).status == 502
    assert target.requests == []


# == Both directions at once ==


def seeded(count: int) -> Iterator[bytes]:
    """Yield so many different pieces of 1 MiB, the same ones each time."""
    piece = random.Random(1).getrandbits(8 * MIB).to_bytes(MIB, "little")
    for number in range(count):
        yield number.to_bytes(8, "big") + piece[8:]


def both_ways(runtime: Runtime, pipeline: str, count: int) -> int:
    """Send pieces and read the answer meanwhile; return how many came back right, by the time the answer ended."""
    with runtime.connect(60.0) as connection:
        head = "PUT /bck/obj HTTP/1.1\r\nHost: x\r\nAis-Node-Url: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % pipeline

        def send() -> None:
            connection.sendall(head.encode())
            for piece in seeded(count):
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            connection.sendall(b"0\r\n\r\n")

        sender = threading.Thread(target=send, name="sender", daemon=True)
        sender.start()
        answer = http.client.HTTPResponse(connection)
        with answer:
            answer.begin()
            assert answer.status == 200
            right = sum(answer.read(MIB) == piece for piece in seeded(count))
            assert answer.read() == b""
        sender.join(60)
        assert not sender.is_alive()
    return right


def peak_kib(runtime: Runtime) -> int:
    """Return the most memory that any worker of a runtime has had."""
    statuses = [Path("/proc/%d/status" % child).read_text() for child in children_of(runtime.pid)]
    return max(int(line.split()[1]) for status in statuses for line in status.splitlines() if line.startswith("VmHWM"))


def test_a_large_object_passes_two_streams_in_both_directions_at_once_in_little_memory(
    pods: Pods
) -> None:
    first, second = pods("streaming").runtime, pods("streaming", 0).runtime
    assert both_ways(first, second.url, 1) == 1
    before = [peak_kib(first), peak_kib(second)]
    assert both_ways(first, second.url, 128) == 128
    growth = [after - was for was, after in zip(before, [peak_kib(first), peak_kib(second)])]
    assert max(growth) < 48 << 10


def test_a_stage_may_answer_all_before_it_reads(any_pod: Pod, hop: StandInTarget) -> None:
    content, answer = os.urandom(MORE_THAN_BUFFERS), os.urandom(MORE_THAN_BUFFERS)
    hop.default = Behaviour(status=200, body=answer, framing="chunked", early=True)
    response = any_pod.send("fqn", content, hop.root)
    assert (response.status, response.body == answer) == (200, True)


def test_a_stream_that_fails_behind_the_first_piece_of_the_answer_cuts_the_answer(pods: Pods, hop: StandInTarget) -> None:
    hop.default = Behaviour(status=200, body=b"early", framing="chunked", early=True)
    pod = pods("failing")
    with contextlib.suppress(http.client.IncompleteRead, http.client.RemoteDisconnected):
        assert pod.send("fqn", bytes(MORE_THAN_BUFFERS), hop.root, "fail at the end").status >= 500
    assert [request for request in hop.wait_for_requests(1) if request.complete] == []


# == A class that judges ==


@pytest.mark.parametrize("kind", ["judge-buffered", "judge-streaming"])
def test_a_class_may_judge_the_answer_of_a_hop_itself_but_a_404_and_secrets_never_come_from_us(
    pods: Pods, hop: StandInTarget, kind: str
) -> None:
    pod = pods(kind)
    for behaviour, status, body in [
        (Behaviour(), 204, b""), (Behaviour(status=500, body=b"why"), 500, b"why"),
        (Behaviour(status=507, body=b"out of space"), 418, b"judged out of space"),
        (Behaviour(status=404, body=b"gone"), 502, b"gone"),
    ]:
        with case(pod, hop, behaviour):
            hop.default = behaviour
            response = pod.send("length", b"content", final(hop))
            assert (response.status, response.body) == (status, body)
            length = response.headers.get("ais-direct-put-length")
            assert length == ("7" if status == 204 else None)
    hop.default = Behaviour(status=500, body=b"cannot put " + BASE_PATH.encode())
    assert pod.send("length", b"content", final(hop)).body.startswith(b"cannot put ")


# == Many objects, and a hop that loses some ==


class Unsteady:
    """Drops some of its connections, by a seeded choice."""

    def __init__(self, share: float) -> None:
        self._random = random.Random(20)
        self._lock = threading.Lock()
        self._share = share
        self.dropped = 0

    def __call__(self, head: Recorded) -> Behaviour:
        with self._lock:
            if self._random.random() >= self._share:
                return Behaviour()
            self.dropped += 1
            cut = self._random.choice([At.BEFORE_BODY, At.IN_BODY, At.AFTER_BODY, At.IN_ANSWER_HEAD])
            return Behaviour(cut=cut, reset=self._random.random() < 0.5)


def content_of(name: str) -> bytes:
    """Make an object that its name tells, of up to 80 KiB."""
    chosen = random.Random(name)
    return (name.encode() + b"|") * (1 + chosen.randrange(80 * 1024) // (len(name) + 1))


def deliver_at_last(pod: Pod, hop: StandInTarget, name: str) -> List[int]:
    """Send an object until it is told as delivered, ten times at most; return the statuses."""
    statuses: List[int] = []
    while len(statuses) < 10 and statuses[-1:] != [204]:
        response = pod.ask("/bck/" + name, final(hop, "/dst%2F" + name), content_of(name))
        statuses.append(response.status)
    return statuses


def test_every_object_that_was_told_as_delivered_is_stored_whole_though_the_hop_loses_connections(
    pods: Pods, hop: StandInTarget
) -> None:
    hop.default = unsteady = Unsteady(0.1)
    names = ["%05d" % number for number in range(1500)]
    both = itertools.cycle([pods("buffered"), pods("streaming")])
    with ThreadPoolExecutor(32) as senders:
        statuses = list(senders.map(deliver_at_last, both, itertools.repeat(hop), names))
    assert [each for each in statuses if set(each[:-1]) - {502, 503} or each[-1] != 204] == []
    wrong = [name for name in names if hop.stored.get("/dst%2F" + name) != flip(content_of(name))]
    assert (wrong, unsteady.dropped > 100) == ([], True)
