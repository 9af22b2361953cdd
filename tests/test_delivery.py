"""Stage 4, delivering: an output to its final target or to the next stage, and what becomes of it when that one fails.

`target` is the pod's own target, where objects are read from; `hop` is whom the outputs go to, another target or a stage.
The classes of these tests change every byte and no length, so that an output is never taken for its object.
"""
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import socket
import struct
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional
from urllib.parse import parse_qsl, quote, urlsplit

import pytest

from ais_runtime_min import ConnectionPool, Hop, NodeConnection, NodeRequest, Settings
from conftest import StartTarget
from harness import QUICK_NUMBERS, Body, Environ, Numbers, Response, Runtime, make_payload
from standin import BASE_PATH, At, Behaviour, Certificates, Recorded, StandInTarget
from test_answers import peak_of_workers, put_at_once

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
    """Carries deliveries by the class's own client_put, and adds empty pieces to a stream."""
    def client_put(self, url, data, headers, timeout=None):
        if not isinstance(data, bytes):
            data = (part for piece in data for part in (b"", piece))
        return super().client_put(url, data, {**headers, "X-Own": "mine"}, timeout)

class PutBuffered(Put, Buffered):
    pass

class PutStreaming(Put, Streaming):
    pass

class Judge:
    """Decides the answer by the class's own handle_direct_put_response."""
    def handle_direct_put_response(self, resp, data, data_length=-1):
        status, body, length = super().handle_direct_put_response(resp, data, data_length)
        if resp.status_code == 507:
            return 418, "judged " + body.decode(), 0
        return status, body or None, length

class JudgeBuffered(Judge, Buffered):
    pass

class JudgeStreaming(Judge, Streaming):
    pass
'''
CLASSES = {"buffered": "Buffered", "streaming": "Streaming", "failing": "Streaming", "put-failing": "PutStreaming",
           "put-buffered": "PutBuffered", "put-streaming": "PutStreaming",
           "judge-buffered": "JudgeBuffered", "judge-streaming": "JudgeStreaming"}
KINDS = ["buffered", "streaming", "put-buffered", "put-streaming"]
FLIPPED = bytes(range(255, -1, -1))
TOKEN = "t0ken-of-the-cluster"
SECRETS = ("s3cr3t", TOKEN)
UNAME = "/ais%2F@%23%2Fbck%2Fdir%2Fobj"
FINAL = "/ais%2F@%23%2Fdst%2Fobj"
MIB = 1 << 20
SIZES = [0, 1, 65535, 65536, 65537, 3 * MIB + 1]
MORE_THAN_BUFFERS = 16 * MIB  # the buffers of two sockets hold less
RETRY = ("Ais-Etl-Retry-Reason", "direct-put-transient")
DELAY_SECONDS = 0.02  # before a retry
NUMBERS = {**QUICK_NUMBERS, "RETRY_DELAY_LIMIT_SECONDS": DELAY_SECONDS}


class Pod:
    """A runtime with one worker, the stand-ins around it, and the file in which its class notes its calls."""

    def __init__(
        self, kind: str, target: StandInTarget, folder: Path, env: Environ,
        numbers: Numbers = NUMBERS,
    ) -> None:
        self.kind = kind
        self.target = target
        self.is_streaming = "streaming" in kind or "failing" in kind
        self.folder = Path(tempfile.mkdtemp(dir=str(folder)), "@ais", "bck", "%ob")
        self.folder.mkdir(parents=True)
        self._calls = self.folder / "calls"
        variables: Dict[str, Optional[str]] = {
            "ETL_CLASS_PAYLOAD": make_payload(SOURCE, CLASSES[kind]), "AIS_TARGET_URL": target.url,
            "NUM_WORKERS": "1", "AIS_AUTHN_TOKEN": TOKEN, "CALLS": str(self._calls), **env,
        }
        self.runtime = Runtime(env=variables, expect_traceback="failing" in kind, numbers=numbers)

    def ask(
        self, target: str, pipeline: str, body: Optional[Body] = None, method: str = "PUT"
    ) -> Response:
        """Send a request whose output goes along a pipeline; no answer may hold a secret."""
        response = self.runtime.request(method, target, body, {"Ais-Node-Url": pipeline})
        assert not [secret for secret in SECRETS if secret in str(response)]
        return response

    def send(self, source: str, content: bytes, pipeline: str, args: str = "") -> Response:
        """Have an object transformed and delivered, whichever way the runtime gets it."""
        queries = ["etl_args=" + quote(args, safe="")] if args else []
        if "fqn" in source:
            (self.folder / "obj").write_bytes(content)
            queries.append("etl_fqn=" + quote(quote(str(self.folder / "obj")), safe=""))
        self.target.objects[UNAME] = b"not this" if "fqn" in source else content
        method, path = ("GET", UNAME) if source.startswith("get") else ("PUT", "/bck/dir/obj")
        pieces = [content[start:start + 50000] for start in range(0, len(content), 50000)]
        bodies: Dict[str, Body] = {"length": content, "chunked": pieces}
        return self.ask(path + "?" * bool(queries) + "&".join(queries), pipeline, bodies.get(source), method)

    def calls(self) -> int:
        """Return how often the class was called so far."""
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0

    def retries(self, expected: int = 0) -> int:
        """Return how many retries the log tells of, once it tells of as many as are expected."""
        deadline = time.monotonic() + 10
        while self.runtime.log().count("trying again") < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.runtime.log().count("trying again")

    def forget(self) -> None:
        """Begin a test: no calls, no lines; those of the one before may hold no secret and no traceback."""
        if self._calls.exists():
            self._calls.unlink()
        log = self.runtime.log()
        self.runtime.lines.clear()
        assert not [secret for secret in SECRETS if secret in log]
        assert self.runtime.expect_traceback or "Traceback" not in log, log


def detail(response: Response) -> str:
    """Return the reason of an answer that the runtime made itself."""
    assert response.headers["content-type"] == "application/json"
    return str(json.loads(response.body)["detail"])


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


def wipe(*stand_ins: StandInTarget) -> None:
    """Make stand-ins forget what they were told and got, all of which must show the token."""
    for stand_in in stand_ins:
        tokens = {request.headers.get("authorization") for request in stand_in.requests}
        assert tokens <= {"Bearer " + TOKEN}
        stand_in.objects.clear()
        stand_in.requests.clear()
        stand_in.stored.clear()
        stand_in.default = Behaviour()


@contextlib.contextmanager
def case(pod: Pod, hop: StandInTarget, *name: object) -> Iterator[None]:
    """One of many cases of a test: nothing is noted yet, and a failure names the case."""
    pod.forget()
    try:
        yield
        wipe(pod.target, hop)
    except Exception as error:
        text = "in the case of %r, where the log is:\n%s" % (name, pod.runtime.log())
        raise AssertionError(text) from error


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
    wipe(stand_in)


Pods = Callable[..., Pod]


@pytest.fixture(scope="module")
def pods(shared_target: StandInTarget, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """A function that starts a pod, with one retry, or returns the one that it started before."""
    folder = tmp_path_factory.mktemp("pods")
    started: Dict[str, Pod] = {}
    with contextlib.ExitStack() as ends:

        def start(kind: str, numbers: Numbers = NUMBERS, **env: Optional[str]) -> Pod:
            key = repr((kind, numbers, env))
            if key not in started:
                env = {"AIS_DIRECT_PUT_RETRIES": "1", **env}
                started[key] = pod = Pod(kind, shared_target, folder, env, numbers)
                ends.push(pod.runtime)
                ends.callback(pod.forget)  # checks its log, before its end
            started[key].forget()
            return started[key]

        yield start


@pytest.fixture(params=KINDS)
def pod(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """Each kind of pod in turn, for each way to a hop: ours, and the class's own client_put."""
    return pods(request.param)


@pytest.fixture(params=["buffered", "put-buffered"])
def each_way(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """A pod for each way to a hop, where it does not matter whether it streams."""
    return pods(request.param)


def final(hop: StandInTarget, path: str = FINAL + "?uuid=abc&owt=3") -> str:
    """Name an object at its final target, as in a pipeline."""
    return "http://127.0.0.1:%d%s" % (hop.port, path)


def entry_of(hop: StandInTarget, kind: str) -> str:
    """Name a hop as a final target or as a stage."""
    return final(hop) if kind == "final" else hop.root


# == The final target ==


@pytest.mark.parametrize("source", ["length", "chunked", "fqn", "get", "get fqn"])
def test_an_object_of_any_size_is_delivered_whole_to_its_final_target(
        pod: Pod, hop: StandInTarget, source: str) -> None:
    for size in SIZES:
        with case(pod, hop, size):
            content = os.urandom(size)
            response = pod.send(source, content, final(hop))
            assert (response.status, response.body) == (204, b"")
            assert response.headers["ais-direct-put-length"] == str(size)
            assert hop.stored == {FINAL: flip(content)}
            request, = hop.requests
            assert request.complete
            names = ("content-length", "transfer-encoding", "x-own")
            own = "mine" if pod.kind.startswith("put") else None
            framing = (None, "chunked") if pod.is_streaming else (str(size), None)
            assert tuple(map(request.headers.get, names)) == (*framing, own)


def test_the_path_and_the_query_of_a_final_target_go_out_byte_for_byte_behind_the_secret_path(
        each_way: Pod, hop: StandInTarget) -> None:
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
        pods: Pods, hop: StandInTarget) -> None:
    pod = pods("buffered")
    queries = ["", "?uuid=a%2Fb&owt=3", "?etl_args=old&uuid=a%2Fb&etl_args=older",
               "?etl_argsx=1&xetl_args=2"]
    entries = [*(final(hop, FINAL + query) for query in queries), hop.root]
    texts = ["1", "a b", "a+b", "a&etl_args=c", "50%", "%20", "{\"a\": [1, 2]}", "ünï€", "/?#;"]
    for entry, args in itertools.product(entries, texts):
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


ANSWERS = [
    *(Behaviour(status=status) for status in (200, 204)),
    Behaviour(interim=(100,)), Behaviour(interim=(102, 103)),
    *(Behaviour(status=200, framing=framing, body=body)
      for framing in ("length", "chunked", "close") for body in (b"", b"<html>hello</html>")),
    Behaviour(stall=At.AFTER_BODY, stall_seconds=0.1),
]


def test_an_empty_answer_of_the_final_target_means_delivered_and_content_that_it_is_none(
        pod: Pod, hop: StandInTarget) -> None:
    for hop_answer, size in itertools.product(ANSWERS, (0, 5, 2 * MIB)):
        with case(pod, hop, hop_answer, size):
            hop.default = hop_answer
            content = os.urandom(size)
            response = pod.send("length", content, final(hop))
            assert response.status == (502 if hop_answer.body else 204)
            length = response.headers.get("ais-direct-put-length")
            assert length == (None if hop_answer.body else str(size))
            request, = hop.requests
            assert (request.body == flip(content), request.complete) == (True, True)


def test_the_target_that_is_read_from_may_be_the_one_that_is_put_to(
        pod: Pod, target: StandInTarget) -> None:
    content = os.urandom(3 * MIB)
    assert pod.send("get", content, final(target)).status == 204
    assert target.stored == {FINAL: flip(content)}
    assert {request.headers["authorization"] for request in target.requests} == {"Bearer " + TOKEN}


# == The next stage ==


def test_a_stage_gets_the_path_of_the_object_decoded_and_quoted_again(
        each_way: Pod, hop: StandInTarget) -> None:
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
                request, = hop.requests
                assert (request.method, request.path) == ("PUT", expected)


def test_a_stage_gets_the_path_of_an_object_that_is_pulled(pod: Pod, hop: StandInTarget) -> None:
    for source in ("get", "get fqn"):
        with case(pod, hop, source):
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


def test_what_a_stage_answers_is_passed_back_content_with_its_type_and_the_news_of_a_delivery(
        pod: Pod, hop: StandInTarget) -> None:
    for framing, size in itertools.product(("length", "chunked", "close"), SIZES):
        with case(pod, hop, framing, size):
            content = os.urandom(size)
            headers = (("Content-Type", "image/x-stage"),)
            hop.default = Behaviour(status=200, body=content, framing=framing, headers=headers)
            response = pod.send("length", b"content", hop.root)
            assert (response.status, response.body == content) == (200, True)
            assert response.headers["content-type"] == "image/x-stage"
            assert "ais-direct-put-length" not in response.headers
            if not size:  # an empty answer with a length would be the news of a delivery
                assert response.headers["transfer-encoding"] == "chunked"
                assert "content-length" not in response.headers
    for length in ("0", "1", "12345678901"):
        with case(pod, hop, length):
            hop.default = Behaviour(status=204, headers=(("Ais-Direct-Put-Length", length),))
            response = pod.send("length", b"content", hop.root)
            assert (response.status, response.body) == (204, b"")
            assert response.headers.get("ais-direct-put-length", "0") == length


# == Statuses ==


def test_an_error_of_a_hop_is_passed_back_without_secrets_and_what_would_be_misunderstood_is_502(
        pod: Pod, hop: StandInTarget) -> None:
    headers = (("Content-Type", "text/x-why"), ("Location", "/elsewhere"))
    errors = (400, 401, 403, 409, 416, 429, 499, 500, 501, 502, 503, 507, 599)
    others = (201, 202, 203, 205, 206, 226, 300, 301, 302, 303, 304, 307, 308, 404)
    why = b"no, because %s and %s" % (BASE_PATH.encode(), TOKEN.encode())
    for status, kind in itertools.product((*errors, *others), ("final", "stage")):
        with case(pod, hop, status, kind):
            body = why if status != 205 else b""
            hop.default = Behaviour(status=status, body=body, headers=headers)
            response = pod.send("length", b"content", entry_of(hop, kind))
            if status in errors:
                assert (response.status, response.body) == (status, b"no, because *** and ***")
                assert response.headers["content-type"] == "text/x-why"
            else:
                assert response.status == 502
                assert str(status) in detail(response)
            assert (len(hop.requests), pod.retries()) == (1, 0)


def test_an_error_is_passed_back_whole_however_it_comes(pod: Pod, hop: StandInTarget) -> None:
    why = b"no, because " * 2500
    for kind, framing, first in [
            ("final", "length", 1), ("final", "chunked", 1), ("stage", "chunked", 20000),
            ("stage", "close", 1)]:
        with case(pod, hop, kind, framing, first):
            hop.default = Behaviour(status=500, body=why, framing=framing, after_bytes=first,
                                    stall=At.IN_ANSWER_BODY, stall_seconds=0.1)
            response = pod.send("length", b"content", entry_of(hop, kind))
            assert (response.status, response.body == why) == (500, True)


def test_an_interim_answer_does_not_stop_a_body_that_is_still_going_out(
        pod: Pod, hop: StandInTarget) -> None:
    hop.default = Behaviour(interim=(102,), stall=At.BEFORE_BODY, stall_seconds=0.3)
    content = os.urandom(MORE_THAN_BUFFERS)
    assert pod.send("length", content, final(hop)).status == 204
    assert hop.stored == {FINAL: flip(content)}


def test_a_malformed_pipeline_is_a_bad_request_before_anything_is_done(
        pods: Pods, hop: StandInTarget) -> None:
    pod = pods("buffered")
    for pipeline in [
        ",", ",,", "http://127.0.0.1:9,,http://127.0.0.1:9", "http://127.0.0.1:9,",
        ",http://127.0.0.1:9", "http://127.0.0.1:9, ,", "http://", "http:///x", "http://:80",
        "http://:80/x", "https://", "ftp://127.0.0.1:9/x", "file:///etc/passwd", "nonsense",
        "127.0.0.1:9", "//127.0.0.1:9", "/x", "http:/x", "http://127.0.0.1:port",
        "http://127.0.0.1:99999", "http://[::1", "http://[::1/x", "http://127.0.0.1:port/x",
        "http://127.0.0.1:-1", "http://a b:1", "http://127.0.0.1:9\\@x:1/",
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
each_loss = pytest.mark.parametrize("number", range(len(LOST)))


@each_loss
def test_a_hop_that_is_lost_or_wants_it_so_gets_the_object_again(
        pods: Pods, target: StandInTarget, start_target: StartTarget, number: int) -> None:
    kind, loss = LOST[number]
    for pod_kind, source in [
        ("buffered", "length"), ("buffered", "fqn"), ("streaming", "fqn"), ("streaming", "get"),
        ("streaming", "get fqn"), ("put-buffered", "chunked"), ("put-streaming", "fqn"),
    ]:
        pod, hop = pods(pod_kind), start_target()
        with case(pod, hop, loss, pod_kind, source):
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
        pods: Pods, start_target: StartTarget, number: int) -> None:
    kind, loss = LOST[number]
    for pod_kind, source in itertools.product(("streaming", "put-streaming"), ("length", "chunked")):
        pod, hop = pods(pod_kind), start_target()
        with case(pod, hop, loss, pod_kind, source):
            hop.default = turns = Turns(loss, Behaviour())
            response = pod.send(source, os.urandom(300000), entry_of(hop, kind))
            assert response.status == 503
            assert response.headers.get("ais-etl-retry-reason") == "direct-put-transient"
            assert (len(turns.times), pod.retries(), pod.calls()) == (1, 0, 1)


@each_loss
def test_a_hop_that_is_lost_too_often_is_502(
        pods: Pods, start_target: StartTarget, number: int) -> None:
    kind, loss = LOST[number]
    for pod_kind, retries in itertools.product(("buffered", "streaming", "put-buffered"), (0, 1)):
        pod, hop = pods(pod_kind, AIS_DIRECT_PUT_RETRIES=str(retries)), start_target()
        with case(pod, hop, loss, pod_kind, retries):
            hop.default = loss
            response = pod.send("fqn", b"content" * 9999, entry_of(hop, kind))
            assert response.status == 502
            assert "ais-etl-retry-reason" not in response.headers
            assert (len(hop.requests), pod.retries(retries)) == (1 + retries, retries)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_the_delays_grow_and_a_hop_that_is_always_lost_is_502_within_eight_seconds(
        pods: Pods, hop: StandInTarget, kind: str) -> None:
    hop.default = turns = Turns(Behaviour(cut=At.IN_BODY))
    pod = pods(kind, numbers=None, AIS_DIRECT_PUT_RETRIES=None)
    response = pod.send("fqn", os.urandom(300000), final(hop))
    assert time.monotonic() - turns.times[0] < 10
    assert (response.status, len(turns.times), hop.stored) == (502, 4, {})
    assert [delay > least for delay, least in zip(turns.delays, (0.9, 1.9, 3.9))] == [True] * 3


def test_a_hop_that_nobody_listens_at_is_502_without_a_retry(pod: Pod, hop: StandInTarget) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:%d" % nobody.getsockname()[1]
        for source, path in itertools.product(("length", "fqn"), ("", FINAL)):
            with case(pod, hop, source, path):
                response = pod.send(source, b"content", url + path)
                assert (response.status, pod.retries()) == (502, 0)
                assert "ais-etl-retry-reason" not in response.headers


# == Outputs and objects that fail half-way ==


@pytest.mark.parametrize("pod_kind", ["failing", "put-failing"])
def test_a_stream_that_fails_is_500_and_the_hop_never_sees_a_whole_object(
        pods: Pods, hop: StandInTarget, pod_kind: str) -> None:
    pod = pods(pod_kind)
    for kind, size, source, args in itertools.product(
            ("final", "stage"), (100, 3 * MIB), ("length", "chunked", "fqn", "get"),
            ("fail half-way", "fail at the end")):
        with case(pod, hop, kind, size, source, args):
            hop.default = Behaviour(status=200, body=flipped_by_stage if kind == "stage" else b"")
            response = pod.send(source, os.urandom(size), entry_of(hop, kind), args)
            assert response.status == 500
            assert "no more of it" in detail(response)
            assert [request.complete for request in hop.wait_for_requests(1)] == [False]
            assert (hop.stored, pod.calls(), pod.retries()) == ({}, 1, 0)


def test_a_request_that_is_cut_short_delivers_no_whole_object(pod: Pod, hop: StandInTarget) -> None:
    for framing, size, kind in itertools.product(
            ("length", "chunked"), (100, 65536, 2 * MIB), ("final", "stage")):
        length, chunked = "Content-Length: %d" % (size + 1), "Transfer-Encoding: chunked"
        fields = ["Host: x", "Ais-Node-Url: " + entry_of(hop, kind),
                  length if framing == "length" else chunked]
        head = "\r\n".join(["PUT /bck/obj HTTP/1.1", *fields, "", ""])
        body = os.urandom(size)
        with case(pod, hop, framing, size, kind), pod.runtime.connect() as connection:
            connection.sendall(head.encode())
            connection.sendall(body if framing == "length" else b"%x\r\n%s\r\n" % (size, body))
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as answer:
                assert answer.readline()[9:10] in (b"", b"4", b"5")
            if pod.is_streaming:
                hop.wait_for_requests(1)
            assert [request for request in hop.requests if request.complete] == []
            assert hop.stored == {}


def test_an_object_that_the_target_cuts_short_is_not_delivered(
        pod: Pod, target: StandInTarget, hop: StandInTarget) -> None:
    for framing in ("length", "chunked"):
        with case(pod, hop, framing):
            target.default = Behaviour(status=200, body=bytes(MIB), framing=framing,
                                       cut=At.IN_ANSWER_BODY, after_bytes=300000)
            assert pod.ask(UNAME, final(hop), method="GET").status >= 500
            assert [request for request in hop.requests if request.complete] == []


# == The pool ==


def statuses_in_a_row(pod: Pod, pipeline: str, content: bytes, count: int) -> List[int]:
    """Send an object again and again over one connection, so that one thread answers; return the statuses."""
    head = b"PUT /bck/obj HTTP/1.1\r\nHost: x\r\nAis-Node-Url: %s\r\nContent-Length: %d\r\n%s\r\n"
    requests = [head % (pipeline.encode(), len(content), field) + content
                for field in [*[b""] * (count - 1), b"Connection: close\r\n"]]
    received = pod.runtime.raw(b"".join(requests), quiet=10.0)
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", received)]


def test_a_connection_to_a_hop_is_used_again(pods: Pods, start_target: StartTarget) -> None:
    pod = pods("buffered")
    for (kind, answer), size in itertools.product([
        ("final", Behaviour()), ("final", Behaviour(status=200, framing="chunked")),
        ("stage", Behaviour(status=200, body=b"content")), ("stage", Behaviour(status=204)),
        ("stage", Behaviour(status=200, body=bytes(100000))),
        ("stage", Behaviour(status=200, body=b"content", framing="chunked")),
    ], (0, 5, 100000)):
        hop = start_target()
        with case(pod, hop, kind, answer, size):
            hop.default = answer
            status = 204 if kind == "final" or answer.status == 204 else 200
            assert statuses_in_a_row(pod, entry_of(hop, kind), bytes(size), 10) == [status] * 10
            assert hop.connections == 1
            assert [len(request.body) for request in hop.requests] == [size] * 10


def test_a_connection_is_used_again_while_idle_ones_are_looked_at(start_target: StartTarget) -> None:
    hop = start_target()
    hop.default = Behaviour(status=200, body=b"content")
    pool = ConnectionPool(Settings())
    request = NodeRequest("GET", Hop.of(hop.root), "/object")
    is_over = threading.Event()

    def sweep() -> None:
        while not is_over.is_set():
            pool.close_idle()

    with ThreadPoolExecutor(1) as sweeper:
        sweeping = sweeper.submit(sweep)
        try:
            for _ in range(300):
                with pool.open(request) as answer:
                    assert answer.readall() == b"content"
                time.sleep(0.001)  # in which the other thread looks at it many times
        finally:
            is_over.set()
        sweeping.result()
    assert hop.connections == 1


def test_a_connection_that_is_idle_for_long_is_closed(pods: Pods) -> None:
    pod = pods("buffered", numbers={**NUMBERS, "HOP_IDLE_SECONDS": 0.3, "SWEEP_SECONDS": 0.1})
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
        pods: Pods, start_target: StartTarget) -> None:
    pod = pods("buffered", AIS_DIRECT_PUT_RETRIES="0")
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


# == Early answers, and both directions at once ==


def test_a_target_that_answers_before_it_has_the_object_has_not_got_it(
        pods: Pods, hop: StandInTarget) -> None:
    for kind in ("buffered", "streaming", "put-buffered"):
        hop.default = Behaviour(status=200, early=True, stall=At.BEFORE_BODY, stall_seconds=0.3)
        response = pods(kind).send("fqn", os.urandom(MORE_THAN_BUFFERS), final(hop))
        assert (response.status, "before it had" in detail(response)) == (502, True)


@pytest.mark.parametrize("refusal", [
    Behaviour(status=507, body=b"out of space", early=True, read_on=False),
    Behaviour(status=507, body=b"out of space", early=True, framing="close", cut=At.BEFORE_BODY),
    Behaviour(status=507, body=b"out of space", early=True, cut=At.BEFORE_BODY, reset=True),
], ids=["deaf", "closing", "resetting"])
def test_an_error_of_a_hop_that_reads_no_further_is_passed_back(
        pod: Pod, hop: StandInTarget, refusal: Behaviour) -> None:
    ways = [("length", "final"), ("chunked", "final"), ("fqn", "stage"), ("fqn", "final")]
    ways += [("fqn", "final")] * (6 if refusal.reset else 0)
    for source, kind in ways:
        with case(pod, hop, source, kind):
            hop.default = refusal
            response = pod.send(source, bytes(MORE_THAN_BUFFERS), entry_of(hop, kind))
            assert (response.status, response.body) == (507, b"out of space")
            assert (pod.retries(), pod.calls()) == (0, 1)


def test_a_large_object_passes_two_streams_both_ways_at_once_in_little_memory(pods: Pods) -> None:
    first = pods("streaming").runtime
    second = pods("streaming", AIS_DIRECT_PUT_RETRIES="0").runtime
    before: List[int] = []
    for count in (1, 128):  # the first one to warm up
        pieces = [number.to_bytes(4, "big") * (MIB // 4) for number in range(count)]
        digest = hashlib.sha256(b"".join(pieces)).hexdigest()
        assert put_at_once(first, pieces, pipeline=second.url) == (200, digest)
        before = before or [peak_of_workers(first), peak_of_workers(second)]
    growth = [after - was for was, after in zip(before, map(peak_of_workers, (first, second)))]
    assert max(growth) < 48 * MIB


def test_a_stage_may_answer_all_before_it_reads(pod: Pod, hop: StandInTarget) -> None:
    content, answer = os.urandom(MORE_THAN_BUFFERS), os.urandom(MORE_THAN_BUFFERS)
    hop.default = Behaviour(status=200, body=answer, framing="chunked", early=True)
    response = pod.send("fqn", content, hop.root)
    assert (response.status, response.body == answer) == (200, True)


@pytest.mark.parametrize("body, framing", [(b"early", "chunked"), (b"early", "length"), (b"", "length")])
def test_a_stream_that_fails_behind_the_first_piece_of_the_answer_cuts_the_answer(
        pods: Pods, hop: StandInTarget, body: bytes, framing: str) -> None:
    hop.default = Behaviour(status=200, body=body, framing=framing, early=True)
    pod = pods("failing")
    with contextlib.suppress(http.client.IncompleteRead, http.client.RemoteDisconnected):
        assert pod.send("fqn", bytes(MORE_THAN_BUFFERS), hop.root, "fail at the end").status >= 500
    assert [request for request in hop.wait_for_requests(1) if request.complete] == []


def test_of_a_stream_to_a_hop_that_has_hung_up_nothing_more_is_made() -> None:
    made: List[int] = []
    pieces = (made.append(number) or b"piece" for number in range(9))  # type: ignore[func-returns-value]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hop = Hop("http", *listener.getsockname())
        request = NodeRequest("PUT", hop, "/", body=pieces, silence_seconds=5.0)
        connection = NodeConnection(request, None)
        theirs, _ = listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()  # by a reset
        connection.begin(request, "")
        assert (connection.fill(), connection.is_sent, made) == (False, False, [])
        connection.run_out()  # had it answered, the rest would be looked at
        assert made == list(range(9))
        connection.close()


# == TLS ==


@pytest.mark.parametrize("kind", KINDS)
def test_objects_go_by_tls_to_targets_of_the_clusters_authority_and_to_stages_by_their_own_scheme(
        start_target: StartTarget, certificates: Certificates, tmp_path: Path, kind: str) -> None:
    own, other = (start_target(certificates.server_context(verify_client=True)) for _ in range(2))
    pod = Pod(kind, own, tmp_path, {
        "AIS_CLIENT_CA": str(certificates.ca), "AIS_CRT": str(certificates.client),
        "AIS_CRT_KEY": str(certificates.client_key)})
    with pod.runtime:
        for source, size in itertools.product(("length", "get"), (0, 65537, 20 * MIB)):
            with case(pod, other, source, size):
                content = os.urandom(size)
                response = pod.send(source, content, final(other))
                assert response.status == 204
                assert response.headers["ais-direct-put-length"] == str(size)
                assert other.stored[FINAL] == flip(content)
        for stage in (start_target(), start_target(certificates.server_context())):
            with case(pod, stage, stage.root):
                stage.default = Behaviour(status=200, body=flipped_by_stage)
                response = pod.send("length", b"content", stage.root)
                assert response.body == b"<" + flip(b"content") + b">"
        with case(pod, own, "early"):
            own.default = Behaviour(status=507, body=b"out of space", early=True, read_on=False)
            response = pod.send("fqn", bytes(MORE_THAN_BUFFERS), final(own))
            assert (response.status, response.body) == (507, b"out of space")
        pod.forget()


@pytest.mark.parametrize("kind", ["buffered", "put-buffered"])
def test_a_target_of_an_unknown_authority_or_that_misses_a_certificate_is_502(
        pods: Pods, start_target: StartTarget, certificates: Certificates, kind: str) -> None:
    unknown: Dict[str, str] = {}
    for env, wants, status in [
        (unknown, False, 502), ({"AIS_SKIP_VERIFY_CRT": "true"}, False, 204),
        ({"AIS_CLIENT_CA": str(certificates.ca)}, True, 502),
    ]:
        target = start_target(certificates.server_context(verify_client=wants))
        pod = pods(kind, AIS_TARGET_URL=target.url, **env)
        for source in ("length", "fqn"):
            assert pod.send(source, b"content", final(target)).status == status
        assert (env, len(target.requests)) == (env, 2 if status == 204 else 0)


# == A class that judges ==


@pytest.mark.parametrize("kind", ["judge-buffered", "judge-streaming"])
def test_a_class_may_judge_the_answer_of_a_hop_itself_but_a_404_and_secrets_never_come_from_us(
        pods: Pods, hop: StandInTarget, kind: str) -> None:
    pod = pods(kind)
    for hop_answer, status, body in [
        (Behaviour(), 204, b""),
        (Behaviour(status=500, body=b"cannot put " + BASE_PATH.encode()), 500, b"cannot put ***"),
        (Behaviour(status=507, body=b"out of space"), 418, b"judged out of space"),
        (Behaviour(status=404, body=b"gone"), 502, b"gone"),
    ]:
        with case(pod, hop, hop_answer):
            hop.default = hop_answer
            response = pod.send("length", b"content", final(hop))
            assert (response.status, response.body) == (status, body)
            length = response.headers.get("ais-direct-put-length")
            assert length == ("7" if status == 204 else None)


# == Many objects, and a hop that loses some ==


def test_every_object_that_was_told_as_delivered_is_stored_whole_though_the_hop_loses_connections(
        pods: Pods, hop: StandInTarget) -> None:
    chance = random.Random(20)
    dropped: List[Recorded] = []

    def is_unsteady(head: Recorded) -> Behaviour:
        if chance.random() >= 0.1:
            return Behaviour()
        dropped.append(head)
        cut = chance.choice([At.BEFORE_BODY, At.IN_BODY, At.AFTER_BODY, At.IN_ANSWER_HEAD])
        return Behaviour(cut=cut, reset=chance.random() < 0.5)

    def content_of(name: str) -> bytes:
        return (name.encode() + b"|") * random.Random(name).randrange(1, 14000)

    def deliver_at_last(pod: Pod, name: str) -> List[int]:
        statuses: List[int] = []
        while len(statuses) < 10 and statuses[-1:] != [204]:
            response = pod.ask("/bck/" + name, final(hop, "/dst%2F" + name), content_of(name))
            statuses.append(response.status)
        return statuses

    hop.default = is_unsteady
    names = ["%05d" % number for number in range(1500)]
    both = itertools.cycle([pods("buffered"), pods("streaming")])
    with ThreadPoolExecutor(32) as senders:
        statuses = list(senders.map(deliver_at_last, both, names))
    assert [each for each in statuses if set(each[:-1]) - {502, 503} or each[-1] != 204] == []
    wrong = [name for name in names if hop.stored.get("/dst%2F" + name) != flip(content_of(name))]
    assert (wrong, len(dropped) > 100) == ([], True)
