"""Stage 4, delivering: an output to its final target or to the next stage, and what becomes of it when that one fails.

`target` is the pod's own target, where objects are read from; `hop` is whom the outputs go to, another target or a stage.
The classes of these tests change every byte and no length, so that an output is never taken for its object.
"""
import contextlib
import http.client
import io
import json
import os
import random
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
from urllib.parse import parse_qsl, quote, urlsplit

import pytest

from conftest import StartTarget
from harness import Body, Environ, Response, Runtime, children_of, make_payload
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
SIZES = [0, 1, 65535, 65536, 65537, MIB + 1, 20 * MIB]
SOURCES = ["length", "chunked", "fqn", "get", "get fqn"]
RETRY = ("Ais-Etl-Retry-Reason", "direct-put-transient")
RETRY_LINE = "trying again"
AT_ONCE_SECONDS = 5.0  # the machine may be busy; the default retries wait for 7 s


class Pod:
    """A runtime with one worker, the stand-ins around it, and the file in which its class notes its calls."""

    def __init__(self, kind: str, target: StandInTarget, folder: Path, env: Optional[Environ] = None) -> None:
        self.kind = kind
        self.target = target
        self.folder = Path(tempfile.mkdtemp(dir=str(folder)), "@ais", "bck", "%ob")
        self.folder.mkdir(parents=True)
        self._calls = self.folder / "calls"
        variables: Dict[str, Optional[str]] = {
            "ETL_CLASS_PAYLOAD": make_payload(SOURCE, CLASSES[kind]), "AIS_TARGET_URL": target.url, "NUM_WORKERS": "1",
            "AIS_AUTHN_TOKEN": TOKEN, "CALLS": str(self._calls), **(env or {}),
        }
        self.runtime = Runtime(env=variables, expect_traceback="failing" in kind)

    @property
    def is_streaming(self) -> bool:
        """Whether its class transforms in pieces."""
        return "streaming" in self.kind or "failing" in self.kind

    def ask(self, target: str, pipeline: Union[str, bytes], body: Optional[Body] = None, method: str = "PUT",
            timeout: float = 60.0) -> Response:
        """Send a request whose output goes along a pipeline; no answer may hold a secret."""
        field = pipeline if isinstance(pipeline, str) else pipeline.decode("latin-1")
        response = self.runtime.request(method, target, body, {"Ais-Node-Url": field}, timeout)
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

    def retries(self) -> int:
        """Return how many retries the log tells of."""
        return self.runtime.log().count(RETRY_LINE)

    def forget(self) -> None:
        """Begin a test: no calls, no lines."""
        if self._calls.exists():
            self._calls.unlink()
        assert not [secret for secret in SECRETS if secret in self.runtime.log()]
        self.runtime.lines.clear()


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
    stand_in.idle_seconds = None


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
    shared_target.objects.clear()
    shared_target.requests.clear()
    shared_target.stored.clear()
    shared_target.default = Behaviour()
    return shared_target


@pytest.fixture
def hop(target: StandInTarget, start_target: StartTarget) -> Iterator[StandInTarget]:
    """Another target, or the next stage, to which no pod has a connection yet; whoever is asked by a pod sees the token."""
    stand_in = start_target()
    yield stand_in
    asked = target.requests + stand_in.requests
    assert {request.headers.get("authorization") for request in asked} <= {"Bearer " + TOKEN}


Pods = Callable[..., Pod]


@pytest.fixture(scope="module")
def started(shared_target: StandInTarget, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """A function that starts a pod, or returns the one that it started before for the same arguments."""
    pods: Dict[Tuple[str, str], Pod] = {}
    folder = tmp_path_factory.mktemp("pods")

    def pod(kind: str, **env: str) -> Pod:
        key = kind, json.dumps(env, sort_keys=True)
        if key not in pods:
            pods[key] = Pod(kind, shared_target, folder, env)
        pods[key].forget()
        return pods[key]

    yield pod
    with contextlib.ExitStack() as ends:
        for each in pods.values():
            ends.push(each.runtime)
            assert not [secret for secret in SECRETS if secret in each.runtime.log()]


@pytest.fixture
def pods(started: Pods, target: StandInTarget) -> Pods:
    """The function of `started`, with a target that remembers nothing."""
    return started


@pytest.fixture(params=["buffered", "streaming"])
def pod(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """Each kind of pod in turn, with one retry."""
    return pods(request.param, AIS_DIRECT_PUT_RETRIES="1")


@pytest.fixture(params=["buffered", "streaming", "put-buffered", "put-streaming"])
def any_pod(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """Each kind of pod in turn, with one retry, also with deliveries by the class's own client_put, which adds a header."""
    return pods(request.param, AIS_DIRECT_PUT_RETRIES="1")


def final(hop: StandInTarget, path: str = FINAL + "?uuid=abc&owt=3", scheme: str = "http") -> str:
    """Name an object at its final target, as in a pipeline."""
    return "%s://127.0.0.1:%d%s" % (scheme, hop.port, path)


def entry_of(hop: StandInTarget, kind: str) -> str:
    """Name a hop as a final target or as a stage."""
    return final(hop) if kind == "final" else hop.root


# == The final target ==


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", SOURCES)
def test_an_object_of_any_size_is_delivered_whole_to_its_final_target(
    pod: Pod, hop: StandInTarget, source: str, size: int
) -> None:
    content = os.urandom(size)
    response = pod.send(source, content, final(hop))
    assert (response.status, response.body, response.headers["ais-direct-put-length"]) == (204, b"", str(size))
    assert hop.stored == {FINAL: flip(content)}
    assert [request.complete for request in hop.requests] == [True]


@pytest.mark.parametrize("size", [0, 1, 100000])
def test_an_output_in_memory_goes_out_with_its_length_and_a_stream_in_chunks(
    any_pod: Pod, hop: StandInTarget, size: int
) -> None:
    assert any_pod.send("length", bytes(size), final(hop)).status == 204
    framing = {name: value for name, value in hop.requests[0].headers.items()
               if name in ("content-length", "transfer-encoding")}
    assert framing == ({"transfer-encoding": "chunked"} if any_pod.is_streaming else {"content-length": str(size)})


@pytest.mark.parametrize("path", [
    FINAL + "?uuid=abc&owt=3", FINAL, "/ais%2F@%23%2Fdst%2Fa%20b%2Bc;v=1", "/x?y=%2F&z=a+b&empty=&none", "/a//b", "/a%2fb%2Fc",
    "/a%252Fb", "/ais%2F@%23%2Fdst%2F%C3%BCn%C3%AF?x=%C3%BC", "/%FF%FE", "/a:b@c!$&'()*+=~", "/dir/?x=1", "/..%2F..%2Fx",
    "/a?b?c",
])
def test_the_path_and_the_query_of_a_final_target_go_out_byte_for_byte_behind_the_secret_path(
    any_pod: Pod, hop: StandInTarget, path: str
) -> None:
    assert any_pod.send("length", b"content", final(hop, path)).status == 204
    assert [(request.method, request.target) for request in hop.requests] == [("PUT", BASE_PATH + path)]
    assert hop.requests[0].headers["host"] == "127.0.0.1:%d" % hop.port
    assert "ais-node-url" not in hop.requests[0].headers


@pytest.mark.parametrize("args", ["1", "a b", "a+b", "a&etl_args=c", "50%", "%20", "{\"a\": [1, 2]}", "ünï€", "/?#;"])
@pytest.mark.parametrize("query", [
    "", "?uuid=a%2Fb&owt=3", "?etl_args=old&uuid=a%2Fb&etl_args=older", "?etl_argsx=1&xetl_args=2",
])
def test_arguments_go_along_percent_encoded_and_replace_any_there(
    pod: Pod, hop: StandInTarget, query: str, args: str
) -> None:
    assert pod.send("length", b"content", final(hop, FINAL + query), args).status == 204
    sent = urlsplit(hop.requests[0].target).query
    own = [item for item in sent.split("&") if item.startswith("etl_args=")]
    others = [item for item in query[1:].split("&") if item and not item.startswith("etl_args=")]
    assert [item for item in sent.split("&") if not item.startswith("etl_args=")] == others
    assert parse_qsl(own[0]) == [("etl_args", args)] and len(own) == 1
    assert "+" not in own[0]


@pytest.mark.parametrize("behaviour", [
    Behaviour(status=200), Behaviour(status=204), Behaviour(status=200, framing="chunked"),
    Behaviour(status=200, framing="close"), Behaviour(interim=(100,)), Behaviour(interim=(102, 103)),
    Behaviour(stall=At.AFTER_BODY, stall_seconds=0.5),
], ids=["200", "204", "chunked", "close", "100", "102", "slow"])
@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [0, 5, 2 * MIB])
def test_an_empty_answer_of_the_final_target_means_delivered(
    any_pod: Pod, hop: StandInTarget, behaviour: Behaviour, size: int
) -> None:
    hop.default = behaviour
    content = os.urandom(size)
    response = any_pod.send("length", content, final(hop))
    assert (response.status, response.headers.get("ais-direct-put-length")) == (204, str(size))
    assert [(request.body, request.complete) for request in hop.requests] == [(flip(content), True)]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_content_in_the_answer_of_a_final_target_means_that_it_is_none(
    any_pod: Pod, hop: StandInTarget, framing: str
) -> None:
    hop.default = Behaviour(status=200, body=b"<html>hello</html>", framing=framing)
    assert any_pod.send("length", b"content", final(hop)).status == 502


def test_the_target_that_is_read_from_may_be_the_one_that_is_put_to(pod: Pod, target: StandInTarget) -> None:
    content = os.urandom(3 * MIB)
    assert pod.send("get", content, final(target)).status == 204
    assert target.stored == {FINAL: flip(content)}
    assert {request.headers["authorization"] for request in target.requests} == {"Bearer " + TOKEN}


# == The next stage ==


@pytest.mark.parametrize("path, expected", [
    ("/bck/obj", "/bck/obj"), ("/bck/dir/obj.tar", "/bck/dir/obj.tar"), ("/bck/a%20b", "/bck/a%20b"),
    ("/bck/100%25", "/bck/100%25"),
    ("/bck/a+b", "/bck/a%2Bb"), ("/bck/a%2Bb", "/bck/a%2Bb"), ("/bck/a%23b", "/bck/a%23b"), ("/bck/a%3Fb", "/bck/a%3Fb"),
    ("/bck/a%252Fb", "/bck/a%252Fb"),
    ("/bck/a@b", "/bck/a@b"), ("/bck/a;v=1", "/bck/a%3Bv%3D1"), ("/bck/a:b&c", "/bck/a%3Ab%26c"),
    ("/bck/~_-.", "/bck/~_-."), ("/bck/ü€".encode().decode("latin-1"), "/bck/%C3%BC%E2%82%AC"), ("/bck/%c3%bc", "/bck/%C3%BC"),
    ("/bck/%FF%FEx", "/bck/%FF%FEx"), ("/bck/\xff", "/bck/%FF"), ("/bck/%00", "/bck/%00"), ("/bck/a%0Ab", "/bck/a%0Ab"),
    ("/bck/a//b", "/bck/a//b"), ("/bck/q?x=1?etl_args=1", "/bck/q%3Fx%3D1"), (UNAME, "/ais/@%23/bck/dir/obj"),
])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_stage_gets_the_path_of_the_object_decoded_and_quoted_again(
    any_pod: Pod, hop: StandInTarget, slash: str, path: str, expected: str
) -> None:
    hop.default = Behaviour(status=200, body=flipped_by_stage)
    response = any_pod.ask(path, hop.root + slash, b"content")
    assert (response.status, response.body) == (200, b"<" + flip(b"content") + b">")
    assert [(request.method, request.path) for request in hop.requests] == [("PUT", expected)]


@pytest.mark.parametrize("source", ["get", "get fqn"])
def test_a_stage_gets_the_path_of_an_object_that_was_asked_for(pod: Pod, hop: StandInTarget, source: str) -> None:
    hop.default = Behaviour(status=200, body=flipped_by_stage)
    assert pod.send(source, b"content", hop.root).body == b"<" + flip(b"content") + b">"
    assert hop.requests[0].path == "/ais/@%23/bck/dir/obj"


@pytest.mark.parametrize("args", ["1", "a b+c&d=%/ünï"])
def test_a_stage_gets_the_arguments(pod: Pod, hop: StandInTarget, args: str) -> None:
    hop.default = Behaviour(status=204)
    assert pod.send("length", b"content", hop.root, args).status == 204
    query = hop.requests[0].target.partition("?")[2]
    assert (parse_qsl(query), "+" in query) == ([("etl_args", args)], False)


@pytest.mark.parametrize("rest", [
    "http://10.0.0.7:8000", "http://10.0.0.7:8000/ais%2F@%23%2Fdst%2Fobj?uuid=a&owt=1",
    "http://a:8000,http://b:8000/, http://c:51081/ais%2F@%23%2Fdst%2Fobj?uuid=a&owt=1",
])
@pytest.mark.parametrize("comma", [",", ", ", " ,\t"])
def test_the_rest_of_the_pipeline_goes_along(any_pod: Pod, hop: StandInTarget, comma: str, rest: str) -> None:
    hop.default = Behaviour(status=204, headers=(("Ais-Direct-Put-Length", "7"),))
    assert any_pod.send("length", b"content", hop.root + comma + rest).status == 204
    assert hop.requests[0].headers["ais-node-url"] == rest


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, MIB + 1, 20 * MIB])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_the_content_that_a_stage_answers_is_passed_back_with_its_type(
    pod: Pod, hop: StandInTarget, framing: str, size: int
) -> None:
    content = os.urandom(size)
    hop.default = Behaviour(status=200, body=content, framing=framing, headers=(("Content-Type", "image/x-stage"),))
    response = pod.send("length", b"content", hop.root)
    assert (response.status, response.headers["content-type"]) == (200, "image/x-stage")
    assert response.body == content
    assert "ais-direct-put-length" not in response.headers


@pytest.mark.parametrize("size", [0, 5, 100000])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_content_of_a_stage_is_passed_back_by_a_class_that_puts_itself(
    pods: Pods, hop: StandInTarget, framing: str, size: int
) -> None:
    content = os.urandom(size)
    hop.default = Behaviour(status=200, body=content, framing=framing, headers=(("Content-Type", "image/x-stage"),))
    response = pods("put-buffered", AIS_DIRECT_PUT_RETRIES="1").send("length", b"content", hop.root)
    assert (response.status, response.body) == (200, content)
    assert response.headers["content-type"] == "image/x-stage"


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_an_empty_result_of_a_stage_is_passed_back_in_chunks_and_is_no_news_of_a_delivery(
    any_pod: Pod, hop: StandInTarget, framing: str
) -> None:
    hop.default = Behaviour(status=200, framing=framing)
    response = any_pod.send("length", b"content", hop.root)
    assert (response.status, response.body) == (200, b"")
    assert response.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in response.headers


@pytest.mark.parametrize("length", ["0", "1", "12345678901"])
def test_the_news_of_a_delivery_further_on_is_passed_back(any_pod: Pod, hop: StandInTarget, length: str) -> None:
    hop.default = Behaviour(status=204, headers=(("Ais-Direct-Put-Length", length),))
    response = any_pod.send("length", b"content", hop.root)
    assert (response.status, response.body) == (204, b"")
    assert response.headers.get("ais-direct-put-length", "0") == length


# == Statuses ==


@pytest.mark.parametrize("status", [400, 401, 403, 409, 416, 429, 499, 500, 501, 502, 503, 507, 599])
@pytest.mark.parametrize("kind", ["final", "stage"])
def test_an_error_of_a_hop_is_passed_back_with_its_body(any_pod: Pod, hop: StandInTarget, kind: str, status: int) -> None:
    hop.default = Behaviour(status=status, body=b"no, because", headers=(("Content-Type", "text/x-why"),))
    response = any_pod.send("length", b"content", entry_of(hop, kind))
    assert (response.status, response.body, response.headers["content-type"]) == (status, b"no, because", "text/x-why")
    assert (len(hop.requests), any_pod.retries()) == (1, 0)


@pytest.mark.parametrize("framing, first", [("length", 1), ("chunked", 1), ("chunked", 20000), ("close", 1)])
@pytest.mark.parametrize("kind", ["final", "stage"])
def test_the_body_of_an_error_is_passed_back_whole_however_it_comes(
    pod: Pod, hop: StandInTarget, kind: str, framing: str, first: int
) -> None:
    why = b"no, because " * 2500
    hop.default = Behaviour(status=500, body=why, framing=framing, after_bytes=first,
                            stall=At.IN_ANSWER_BODY, stall_seconds=0.2)
    response = pod.send("length", b"content", entry_of(hop, kind))
    assert (response.status, len(response.body)) == (500, len(why))
    assert response.body == why


@pytest.mark.parametrize("status", [201, 202, 203, 205, 206, 226, 300, 301, 302, 303, 304, 307, 308, 404])
@pytest.mark.parametrize("kind", ["final", "stage"])
def test_a_status_that_would_be_misunderstood_is_502(any_pod: Pod, hop: StandInTarget, kind: str, status: int) -> None:
    hop.default = Behaviour(status=status, body=b"so" if status != 205 else b"", headers=(("Location", "/elsewhere"),))
    response = any_pod.send("length", b"content", entry_of(hop, kind))
    assert response.status == 502
    assert str(status) in detail(response)
    assert (len(hop.requests), any_pod.retries()) == (1, 0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [5, 3 * MIB])
def test_interim_answers_of_a_stage_are_skipped(any_pod: Pod, hop: StandInTarget, size: int) -> None:
    hop.default = Behaviour(status=200, body=flipped_by_stage, interim=(100, 103))
    content = os.urandom(size)
    assert any_pod.send("length", content, hop.root).body == b"<" + flip(content) + b">"


@pytest.mark.parametrize("kind", ["final", "stage"])
@pytest.mark.parametrize("status", [400, 404, 500, 301])
def test_an_error_of_a_hop_that_quotes_a_secret_is_passed_back_without_it(
    any_pod: Pod, hop: StandInTarget, status: int, kind: str
) -> None:
    hop.default = Behaviour(status=status, body=b"PUT %s/obj?x by %s failed" % (BASE_PATH.encode(), TOKEN.encode()))
    response = any_pod.send("length", b"content", entry_of(hop, kind))
    assert b"failed" in response.body
    assert not [secret for secret in SECRETS if secret in any_pod.runtime.log()]


@pytest.mark.parametrize("kind, source", [
    ("buffered", "length"), ("buffered", "chunked"), ("buffered", "fqn"), ("buffered", "get"), ("streaming", "fqn"),
    ("streaming", "get"), ("streaming", "get fqn"), ("put-buffered", "length"), ("put-streaming", "fqn"),
])
def test_a_stage_that_wants_the_object_again_gets_it_where_that_can_be_had(
    pods: Pods, hop: StandInTarget, kind: str, source: str
) -> None:
    pod = pods(kind, AIS_DIRECT_PUT_RETRIES="1")
    hop.default = turns = Turns(Behaviour(status=503, headers=(RETRY,)), Behaviour(status=200, body=flipped_by_stage))
    response = pod.send(source, b"content", hop.root)
    assert (response.status, response.body) == (200, b"<" + flip(b"content") + b">")
    assert (len(turns.times), pod.retries()) == (2, 1)
    assert turns.delays[0] > 0.9


def test_a_stage_that_wants_the_object_again_and_again_is_502(pod: Pod, hop: StandInTarget) -> None:
    hop.default = Behaviour(status=503, headers=(RETRY,), body=b"lost it")
    response = pod.send("fqn", b"content", hop.root)
    assert (response.status, len(hop.requests)) == (502, 2)
    assert "ais-etl-retry-reason" not in response.headers


@pytest.mark.parametrize("kind", ["streaming", "put-streaming"])
@pytest.mark.parametrize("source", ["length", "chunked"])
def test_a_stage_that_wants_an_object_again_which_cannot_be_had_makes_the_sender_send_it_again(
    pods: Pods, hop: StandInTarget, source: str, kind: str
) -> None:
    hop.default = Behaviour(status=503, headers=(RETRY,), body=b"lost it")
    response = pods(kind, AIS_DIRECT_PUT_RETRIES="1").send(source, os.urandom(100000), hop.root)
    assert (response.status, response.headers.get("ais-etl-retry-reason")) == (503, "direct-put-transient")
    assert len(hop.requests) == 1


@pytest.mark.parametrize("pipeline", [
    ",", ",,", "http://127.0.0.1:9,,http://127.0.0.1:9", "http://127.0.0.1:9,", ",http://127.0.0.1:9", "http://127.0.0.1:9, ,",
    "http://", "http:///x", "http://:80", "http://:80/x", "https://", "ftp://127.0.0.1:9", "ftp://127.0.0.1:9/x",
    "file:///etc/passwd", "nonsense", "127.0.0.1:9", "//127.0.0.1:9", "/x", "http:/x",
    "http://127.0.0.1:port", "http://127.0.0.1:99999", "http://[::1", "http://[::1/x",
    "http://127.0.0.1:port/x", "http://127.0.0.1:-1", "http://a b:1", "http://127.0.0.1:9\\@x:1/",
])
def test_a_malformed_pipeline_is_a_bad_request(pod: Pod, pipeline: str) -> None:
    response = pod.send("length", b"content", pipeline)
    assert response.status == 400
    assert detail(response)
    assert pod.retries() == 0


# == Retries ==


LOST = [
    ("final", Behaviour(cut=At.BEFORE_BODY)), ("final", Behaviour(cut=At.IN_BODY, reset=True)),
    ("final", Behaviour(cut=At.AFTER_BODY)), ("final", Behaviour(cut=At.AFTER_BODY, reset=True)),
    ("final", Behaviour(cut=At.IN_ANSWER_HEAD)), ("final", Behaviour(cut=At.IN_ANSWER_HEAD, reset=True)),
    ("final", Behaviour(cut=At.IN_ANSWER_BODY, framing="chunked")),
    ("stage", Behaviour(cut=At.BEFORE_BODY, reset=True)), ("stage", Behaviour(cut=At.IN_BODY)),
    ("stage", Behaviour(status=200, body=b"cut" * 99, cut=At.IN_ANSWER_BODY, reset=True)),
    ("stage", Behaviour(status=200, body=b"cut", declared=99)), ("stage", Behaviour(status=204, cut=At.IN_ANSWER_HEAD)),
]
LOST_IDS = ["%s-%s-%s" % (kind, plan.cut.name if plan.cut else "declared", "reset" if plan.reset else "polite")
            for kind, plan in LOST]
each_loss = pytest.mark.parametrize("kind, loss", LOST, ids=LOST_IDS)


@each_loss
@pytest.mark.parametrize("pod_kind, source", [("buffered", "length"), ("streaming", "fqn"), ("streaming", "get")])
def test_a_hop_that_is_lost_gets_the_object_again(
    pods: Pods, target: StandInTarget, hop: StandInTarget, pod_kind: str, source: str, kind: str, loss: Behaviour
) -> None:
    pod = pods(pod_kind, AIS_DIRECT_PUT_RETRIES="1")
    good = Behaviour() if kind == "final" else Behaviour(status=200, body=flipped_by_stage)
    hop.default = turns = Turns(loss, good)
    content = os.urandom(300000)
    response = pod.send(source, content, entry_of(hop, kind))
    if kind == "final":
        assert (response.status, response.headers["ais-direct-put-length"]) == (204, "300000")
        assert hop.stored[FINAL] == flip(content)
    else:
        assert (response.status, response.body) == (200, b"<" + flip(content) + b">")
    assert (len(turns.times), pod.retries()) == (2, 1)
    assert turns.delays[0] > 0.9
    assert pod.calls() == (2 if pod.is_streaming else 1)
    assert len(target.requests) == (2 if source == "get" else 0)


@each_loss
@pytest.mark.parametrize("pod_kind", ["streaming", "put-streaming"])
def test_a_body_that_cannot_be_read_again_makes_the_sender_send_it_again(
    pods: Pods, hop: StandInTarget, kind: str, loss: Behaviour, pod_kind: str
) -> None:
    pod = pods(pod_kind, AIS_DIRECT_PUT_RETRIES="1")
    hop.default = turns = Turns(loss, Behaviour())
    response = pod.send("length", os.urandom(300000), entry_of(hop, kind))
    assert (response.status, response.headers.get("ais-etl-retry-reason")) == (503, "direct-put-transient")
    assert (len(turns.times), pod.retries(), pod.calls()) == (1, 0, 1)


@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_the_delays_grow_and_a_hop_that_is_always_lost_is_502_within_eight_seconds(
    pods: Pods, hop: StandInTarget, kind: str
) -> None:
    hop.default = turns = Turns(Behaviour(cut=At.IN_BODY))
    response = pods(kind).send("fqn", os.urandom(300000), final(hop))
    assert time.monotonic() - turns.times[0] < 10
    assert response.status == 502
    assert len(turns.times) == 4
    assert [delay > least for delay, least in zip(turns.delays, (0.9, 1.9, 3.9))] == [True] * 3
    assert hop.stored == {}


@each_loss
def test_without_retries_a_lost_hop_is_502_at_once(pod: Pod, pods: Pods, hop: StandInTarget, kind: str, loss: Behaviour) -> None:
    hop.default = loss
    start = time.monotonic()
    impatient = pods(pod.kind, AIS_DIRECT_PUT_RETRIES="0")
    assert impatient.send("fqn", b"content" * 9999, entry_of(hop, kind)).status == 502
    assert time.monotonic() - start < AT_ONCE_SECONDS
    assert (len(hop.requests), impatient.retries()) == (1, 0)


@pytest.mark.parametrize("pod_kind", ["buffered", "streaming", "put-buffered", "put-streaming"])
@pytest.mark.parametrize("source", ["length", "fqn"])
@pytest.mark.parametrize("path", ["", FINAL])
def test_a_hop_that_nobody_listens_at_is_502_at_once(pods: Pods, pod_kind: str, source: str, path: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        start = time.monotonic()
        response = pods(pod_kind).send(source, b"content", "http://127.0.0.1:%d%s" % (nobody.getsockname()[1], path))
    assert response.status == 502
    assert time.monotonic() - start < AT_ONCE_SECONDS
    assert "ais-etl-retry-reason" not in response.headers


# == Outputs and objects that fail half-way ==


@pytest.mark.parametrize("args", ["fail half-way", "fail at the end"])
@pytest.mark.parametrize("source", ["length", "chunked", "fqn", "get"])
@pytest.mark.parametrize("pod_kind", ["failing", "put-failing"])
@pytest.mark.parametrize("size", [100, 5 * MIB])
def test_a_stream_that_fails_is_500_and_the_hop_never_sees_a_whole_object(
    pods: Pods, hop: StandInTarget, pod_kind: str, size: int, source: str, args: str
) -> None:
    pod = pods(pod_kind)
    response = pod.send(source, os.urandom(size), final(hop), args)
    assert response.status == 500
    assert "no more of it" in detail(response)
    assert [request.complete for request in hop.wait_for_requests(1)] == [False]
    assert (hop.stored, pod.calls(), pod.retries()) == ({}, 1, 0)


@pytest.mark.parametrize("size", [100, 5 * MIB])
def test_a_stream_that_fails_on_its_way_to_a_stage_is_500(pods: Pods, hop: StandInTarget, size: int) -> None:
    hop.default = Behaviour(status=200, body=flipped_by_stage)
    response = pods("failing").send("fqn", os.urandom(size), hop.root, "fail at the end")
    assert response.status == 500
    assert [request.complete for request in hop.wait_for_requests(1)] == [False]


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [100, 65536, 2 * MIB])
@pytest.mark.parametrize("kind", ["final", "stage"])
def test_a_request_that_is_cut_short_delivers_no_whole_object(
    any_pod: Pod, hop: StandInTarget, kind: str, size: int, framing: str
) -> None:
    field = b"Content-Length: %d" % (size + 1) if framing == "length" else b"Transfer-Encoding: chunked"
    body = os.urandom(size)
    head = b"PUT /bck/obj HTTP/1.1\r\nHost: x\r\nAis-Node-Url: %s\r\n%s\r\n\r\n" % (entry_of(hop, kind).encode(), field)
    with any_pod.runtime.connect() as connection:
        connection.sendall(head + (body if framing == "length" else b"%x\r\n%s\r\n" % (size, body)))
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            status = answer.readline()
    assert status[9:10] in (b"", b"4", b"5")
    if any_pod.is_streaming:
        hop.wait_for_requests(1)
    assert [request for request in hop.requests if request.complete] == []
    assert hop.stored == {}


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_object_that_the_target_cuts_short_is_not_delivered(
    any_pod: Pod, target: StandInTarget, hop: StandInTarget, framing: str
) -> None:
    target.default = Behaviour(status=200, body=bytes(MIB), framing=framing, cut=At.IN_ANSWER_BODY, after_bytes=300000)
    assert any_pod.ask(UNAME, final(hop), method="GET").status >= 500
    assert [request for request in hop.requests if request.complete] == []


# == The pool ==


def put_bytes(pipeline: str, content: bytes) -> bytes:
    """Make a PUT as it goes out."""
    return b"PUT /bck/obj HTTP/1.1\r\nHost: x\r\nAis-Node-Url: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        pipeline.encode(), len(content), content)


def pipelined(pod: Pod, *requests: bytes, timeout: float = 30.0) -> List[int]:
    """Send requests over one connection, so that one thread answers them all; return the statuses."""
    with pod.runtime.connect(timeout) as connection:
        connection.sendall(b"".join(requests))
        statuses = []
        with connection.makefile("rb") as stream:
            for _ in requests:
                answer = http.client.HTTPResponse(_Unclosed(stream))  # type: ignore[arg-type]
                answer.begin()
                answer.read()
                statuses.append(answer.status)
    return statuses


class _Unclosed:
    """What `HTTPResponse` takes for a socket; the stream stays open for the next answer."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, *_: str) -> "_Unclosed":
        return self

    def readline(self, limit: int = -1) -> bytes:
        return self._stream.readline(limit)

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)

    def readinto(self, buffer: bytearray) -> int:
        return self._stream.readinto(buffer)

    def close(self) -> None:
        """Leave the connection to its owner."""

    def flush(self) -> None:
        """There is nothing to flush."""


@pytest.mark.parametrize("size", [0, 5, 100000])
@pytest.mark.parametrize("kind, answer", [
    ("final", Behaviour()), ("final", Behaviour(status=200, framing="chunked")),
    ("stage", Behaviour(status=200, body=b"content")),
    ("stage", Behaviour(status=200, body=bytes(100000))), ("stage", Behaviour(status=200, body=b"content", framing="chunked")),
    ("stage", Behaviour(status=204)),
], ids=["final", "final-chunked", "stage", "stage-large", "stage-chunked", "stage-204"])
def test_a_connection_to_a_hop_is_used_again(pods: Pods, hop: StandInTarget, kind: str, answer: Behaviour, size: int) -> None:
    hop.default = answer
    before = hop.connections
    statuses = pipelined(pods("buffered"), *[put_bytes(entry_of(hop, kind), bytes(size))] * 10)
    assert statuses == [204 if kind == "final" or answer.status == 204 else 200] * 10
    assert hop.connections - before <= 1
    assert [len(request.body) for request in hop.requests] == [size] * 10


@pytest.mark.parametrize("ending", [
    Behaviour(cut=At.AFTER_ANSWER), Behaviour(cut=At.AFTER_ANSWER, reset=True), Behaviour(status=200, framing="close"),
], ids=["polite", "reset", "told"])
@pytest.mark.parametrize("size", [5, 100000])
def test_a_kept_connection_that_the_hop_closes_does_no_harm(pods: Pods, hop: StandInTarget, ending: Behaviour, size: int) -> None:
    pod = pods("buffered", AIS_DIRECT_PUT_RETRIES="0")
    hop.default = turns = Turns(ending, Behaviour())
    content = os.urandom(size)
    assert pipelined(pod, *[put_bytes(final(hop), content)] * 2) == [204, 204]
    assert [(request.body, request.complete) for request in hop.requests] == [(flip(content), True)] * 2
    assert turns.delays[0] < AT_ONCE_SECONDS


def test_a_connection_that_the_hop_closes_while_it_is_idle_does_no_harm(pod: Pod, hop: StandInTarget) -> None:
    hop.idle_seconds = 0.2
    for _ in range(3):
        assert pod.send("length", b"content", final(hop)).status == 204
        time.sleep(0.5)
    assert [request.complete for request in hop.requests] == [True] * 3
    assert pod.retries() == 0


@pytest.mark.parametrize("cut", [At.BEFORE_BODY, At.IN_BODY, At.AFTER_BODY], ids=lambda cut: cut.name)
@pytest.mark.parametrize("reset", [False, True], ids=["polite", "reset"])
@pytest.mark.parametrize("size", [5, 300000])
def test_a_used_connection_that_breaks_before_an_answer_is_dialed_anew_and_not_counted(
    pods: Pods, hop: StandInTarget, size: int, reset: bool, cut: At
) -> None:
    pod = pods("buffered", AIS_DIRECT_PUT_RETRIES="0")
    hop.default = turns = Turns(Behaviour(), Behaviour(cut=cut, reset=reset), Behaviour())
    content = os.urandom(size)
    assert pipelined(pod, *[put_bytes(final(hop), content)] * 2) == [204, 204]
    assert len(turns.times) == 3
    assert turns.delays[1] < AT_ONCE_SECONDS
    assert (hop.stored, pod.retries(), pod.calls()) == ({FINAL: flip(content)}, 0, 2)
    connections = [request.connection for request in hop.requests]
    assert connections[0] == connections[1] != connections[2]


@pytest.mark.parametrize("loss", [
    Behaviour(cut=At.IN_ANSWER_HEAD), Behaviour(cut=At.IN_ANSWER_HEAD, reset=True),
    Behaviour(cut=At.IN_ANSWER_BODY, framing="chunked"), Behaviour(cut=At.IN_ANSWER_BODY, framing="chunked", reset=True),
], ids=["head", "head-reset", "body", "body-reset"])
def test_a_used_connection_that_breaks_in_its_answer_is_never_dialed_anew_unless_as_a_retry(
    pods: Pods, hop: StandInTarget, loss: Behaviour
) -> None:
    pod = pods("buffered", AIS_DIRECT_PUT_RETRIES="0")
    hop.default = turns = Turns(Behaviour(), loss, Behaviour())
    assert pipelined(pod, *[put_bytes(final(hop), b"content")] * 2) == [204, 502]
    assert len(turns.times) == 2


def test_a_body_that_cannot_be_sent_twice_takes_a_new_connection(pods: Pods, hop: StandInTarget) -> None:
    content = os.urandom(1000)
    assert pipelined(pods("streaming"), *[put_bytes(final(hop), content)] * 5) == [204] * 5
    assert len({request.connection for request in hop.requests}) == 5
    assert [request.body for request in hop.requests] == [flip(content)] * 5


# == Early errors ==


@pytest.mark.parametrize("kind", ["final", "stage"])
@pytest.mark.parametrize("source", ["length", "chunked", "fqn"])
@pytest.mark.parametrize("refusal", [
    Behaviour(status=507, body=b"out of space", early=True, read_on=False),
    Behaviour(status=507, body=b"out of space", early=True, framing="close", cut=At.BEFORE_BODY),
], ids=["deaf", "closing"])
def test_an_error_of_a_hop_that_reads_no_further_is_passed_back(
    any_pod: Pod, hop: StandInTarget, refusal: Behaviour, source: str, kind: str
) -> None:
    hop.default = refusal
    start = time.monotonic()
    response = any_pod.send(source, bytes(64 * MIB), entry_of(hop, kind))
    assert (response.status, response.body) == (507, b"out of space")
    assert time.monotonic() - start < 20
    assert (any_pod.retries(), any_pod.calls()) == (0, 1)


def test_an_error_of_a_hop_that_resets_the_connection_behind_it_is_passed_back(any_pod: Pod, hop: StandInTarget) -> None:
    hop.default = Behaviour(status=507, body=b"out of space", early=True, cut=At.BEFORE_BODY, reset=True)
    answers = [any_pod.send("fqn", bytes(4 * MIB), final(hop)) for _ in range(10)]
    assert [(answer.status, answer.body) for answer in answers] == [(507, b"out of space")] * 10


# == TLS ==


TLSPod = Callable[..., Pod]


@pytest.fixture
def start_pod(start_target: StartTarget, tmp_path: Path) -> Iterator[TLSPod]:
    """A function that starts a pod of its own for a test, whose target it is given."""
    with contextlib.ExitStack() as pods:

        def start(kind: str, target: StandInTarget, **env: str) -> Pod:
            pod = Pod(kind, target, tmp_path, {"AIS_DIRECT_PUT_RETRIES": "1", **env})
            pods.push(pod.runtime)
            return pod

        yield start


@pytest.mark.parametrize("kind", ["buffered", "streaming", "put-buffered", "put-streaming"])
@pytest.mark.parametrize("source", ["length", "get"])
def test_objects_are_delivered_by_tls_to_a_target_of_the_clusters_authority(
    start_pod: TLSPod, start_target: StartTarget, certificates: Certificates, kind: str, source: str
) -> None:
    target, other = start_target(certificates.server_context()), start_target(certificates.server_context())
    pod = start_pod(kind, target, AIS_CLIENT_CA=str(certificates.ca))
    for size in (0, 65537, 20 * MIB):
        content = os.urandom(size)
        response = pod.send(source, content, final(other))
        assert (response.status, response.headers["ais-direct-put-length"]) == (204, str(size))
        assert other.stored.pop(FINAL) == flip(content)
    assert {request.headers["authorization"] for request in target.requests + other.requests} == {"Bearer " + TOKEN}


@pytest.mark.parametrize("kind", ["buffered", "streaming", "put-buffered"])
def test_a_target_of_an_unknown_authority_is_502_at_once(
    start_pod: TLSPod, start_target: StartTarget, certificates: Certificates, kind: str
) -> None:
    target = start_target(certificates.server_context())
    pod = start_pod(kind, target, AIS_DIRECT_PUT_RETRIES="3")
    for source in ("length", "fqn"):
        start = time.monotonic()
        assert pod.send(source, b"content", final(target)).status == 502
        assert time.monotonic() - start < AT_ONCE_SECONDS
    assert (target.requests, pod.retries()) == ([], 0)


@pytest.mark.parametrize("name", ["AIS_SKIP_VERIFY_CRT", "AIS_SKIP_VERIFY"])
def test_a_target_is_not_verified_where_that_is_not_wanted(
    start_pod: TLSPod, start_target: StartTarget, certificates: Certificates, name: str
) -> None:
    target = start_target(certificates.server_context())
    assert start_pod("buffered", target, **{name: "true"}).send("length", b"content", final(target)).status == 204
    assert target.stored == {FINAL: flip(b"content")}


@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_a_target_that_wants_a_certificate_gets_it(
    start_pod: TLSPod, start_target: StartTarget, certificates: Certificates, kind: str
) -> None:
    target = start_target(certificates.server_context(verify_client=True))
    pod = start_pod(kind, target, AIS_CLIENT_CA=str(certificates.ca), AIS_CRT=str(certificates.client),
                    AIS_CRT_KEY=str(certificates.client_key))
    content = os.urandom(3 * MIB)
    assert pod.send("length", content, final(target)).status == 204
    assert target.stored == {FINAL: flip(content)}


@pytest.mark.parametrize("source", ["length", "fqn"])
def test_a_target_that_wants_a_certificate_which_is_not_there_is_502(
    start_pod: TLSPod, start_target: StartTarget, certificates: Certificates, source: str
) -> None:
    target = start_target(certificates.server_context(verify_client=True))
    pod = start_pod("buffered", target, AIS_CLIENT_CA=str(certificates.ca))
    assert pod.send(source, b"content", final(target)).status == 502
    assert target.requests == []


@pytest.mark.parametrize("kind", ["buffered", "streaming", "put-streaming"])
def test_a_stage_speaks_its_own_scheme_where_the_target_speaks_tls(
    start_pod: TLSPod, start_target: StartTarget, certificates: Certificates, kind: str
) -> None:
    target, private = start_target(certificates.server_context()), start_target(certificates.server_context())
    plain = start_target()
    pod = start_pod(kind, target, AIS_CLIENT_CA=str(certificates.ca))
    for stage in (plain, private):
        stage.default = Behaviour(status=200, body=flipped_by_stage)
        assert pod.send("length", b"content", stage.root).body == b"<" + flip(b"content") + b">"
        assert stage.requests[0].headers["authorization"] == "Bearer " + TOKEN


@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_an_early_error_is_passed_back_over_tls(
    start_pod: TLSPod, start_target: StartTarget, certificates: Certificates, kind: str
) -> None:
    target = start_target(certificates.server_context())
    target.default = Behaviour(status=507, body=b"out of space", early=True, read_on=False)
    response = start_pod(kind, target, AIS_CLIENT_CA=str(certificates.ca)).send("fqn", bytes(64 * MIB), final(target))
    assert (response.status, response.body) == (507, b"out of space")


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
    pods: Pods, start_pod: TLSPod, target: StandInTarget
) -> None:
    first, second = pods("streaming").runtime, start_pod("streaming", target).runtime
    assert both_ways(first, second.url, 1) == 1
    before = [peak_kib(first), peak_kib(second)]
    assert both_ways(first, second.url, 256) == 256
    growth = [after - was for was, after in zip(before, [peak_kib(first), peak_kib(second)])]
    assert max(growth) < 64 << 10


def test_a_stage_may_answer_all_before_it_reads(any_pod: Pod, hop: StandInTarget) -> None:
    content, answer = os.urandom(64 * MIB), os.urandom(64 * MIB)
    hop.default = Behaviour(status=200, body=answer, framing="chunked", early=True)
    response = any_pod.send("fqn", content, hop.root)
    assert (response.status, response.body == answer) == (200, True)


def test_a_stream_that_fails_behind_the_first_piece_of_the_answer_cuts_the_answer(pods: Pods, hop: StandInTarget) -> None:
    hop.default = Behaviour(status=200, body=b"early", framing="chunked", early=True)
    pod = pods("failing")
    with contextlib.suppress(http.client.IncompleteRead, http.client.RemoteDisconnected):
        assert pod.send("fqn", bytes(30 * MIB), hop.root, "fail at the end").status >= 500
    assert [request for request in hop.wait_for_requests(1) if request.complete] == []


# == Methods of the class ==


@pytest.mark.parametrize("kind", ["put-buffered", "put-streaming"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [0, 1, 65537, 5 * MIB])
def test_a_class_may_put_itself(pods: Pods, hop: StandInTarget, kind: str, source: str, size: int) -> None:
    content = os.urandom(size)
    response = pods(kind, AIS_DIRECT_PUT_RETRIES="1").send(source, content, final(hop) + ",http://x:1")
    assert (response.status, response.headers.get("ais-direct-put-length")) == (204, str(size))
    assert hop.stored == {FINAL: flip(content)}
    assert (hop.requests[0].headers["x-own"], hop.requests[0].headers["ais-node-url"]) == ("mine", "http://x:1")


@pytest.mark.parametrize("kind, source", [("put-buffered", "length"), ("put-streaming", "fqn"), ("put-streaming", "get")])
@pytest.mark.parametrize("cut", [At.IN_BODY, At.IN_ANSWER_HEAD], ids=lambda cut: cut.name)
def test_what_a_class_puts_itself_is_put_again_where_the_hop_is_lost(
    pods: Pods, hop: StandInTarget, kind: str, source: str, cut: At
) -> None:
    pod = pods(kind, AIS_DIRECT_PUT_RETRIES="1")
    hop.default = turns = Turns(Behaviour(cut=cut), Behaviour())
    content = os.urandom(300000)
    assert pod.send(source, content, final(hop)).status == 204
    assert (len(turns.times), hop.stored) == (2, {FINAL: flip(content)})


@pytest.mark.parametrize("kind", ["judge-buffered", "judge-streaming"])
def test_a_class_may_judge_the_answer_of_a_hop_itself(pods: Pods, hop: StandInTarget, kind: str) -> None:
    hop.default = Turns(Behaviour(), Behaviour(status=507, body=b"out of space"), Behaviour(status=500, body=b"why"))
    pod = pods(kind)
    answers = [pod.send("length", b"content", final(hop)) for _ in range(3)]
    assert [(answer.status, answer.body) for answer in answers] == [(204, b""), (418, b"judged out of space"), (500, b"why")]
    assert answers[0].headers["ais-direct-put-length"] == "7"


# == Many objects, and a hop that loses some ==


class Tally(NamedTuple):
    """What came of one object."""

    name: str
    statuses: Tuple[int, ...]  # the last one is 204, unless it was never delivered


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


def deliver_at_last(pods: Sequence[Pod], hop: StandInTarget, name: str) -> Tally:
    """Send an object until it is told as delivered, ten times at most."""
    pod = pods[int(name) % len(pods)]
    statuses: List[int] = []
    while len(statuses) < 10 and statuses[-1:] != [204]:
        response = pod.ask("/bck/" + name, final(hop, "/dst%2F" + name), content_of(name))
        statuses.append(response.status)
    return Tally(name, tuple(statuses))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_object_that_was_told_as_delivered_is_stored_whole_though_the_hop_loses_connections(
    pods: Pods, hop: StandInTarget
) -> None:
    hop.default = unsteady = Unsteady(0.05)
    both = [pods(kind, AIS_DIRECT_PUT_RETRIES="1") for kind in ("buffered", "streaming")]
    with ThreadPoolExecutor(32) as senders:
        tallies = list(senders.map(lambda number: deliver_at_last(both, hop, "%05d" % number), range(5000)))
    assert [tally for tally in tallies if set(tally.statuses[:-1]) - {502, 503} or tally.statuses[-1] != 204] == []
    assert [tally for tally in tallies if hop.stored.get("/dst%2F" + tally.name) != flip(content_of(tally.name))] == []
    assert unsteady.dropped > 100
