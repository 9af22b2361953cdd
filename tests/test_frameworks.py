"""An application of FastAPI or Flask as its clients see it: objects beside the class's own routes.

One pod of each kind answers most of the tests. How such a class starts and ends is tested in
test_frameworks_life.py.
"""
import contextlib
import functools
import http.client
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator, List, Set
from urllib.parse import unquote, urlencode

import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection

from ais_runtime_min import Exit
from applications import (CLASSES, SOON_SECONDS, body_of, object_in_work, open_websocket,
                          payload_of, start, wait_until)
from harness import RUNTIME, Environ, Runtime, Server, exact_environment, interpreter
from peer import handshake
from standin import BASE_PATH, StandInTarget
from test_installing import index_variables, make_environment

StartRuntime = Callable[..., Runtime]
StartPod = Callable[[str], Runtime]
PIECE_BYTES = 1 << 16
EXPECTED_FAILURES = ("short and stout", "no more of it", "the answer was cut")

INSTALLED = (pytest.mark.slow, pytest.mark.timeout(400))
both = pytest.mark.parametrize("kind", [
    "fastapi", "flask", pytest.param("fastapi, just installed", marks=INSTALLED),
    pytest.param("flask, just installed", marks=INSTALLED)])
all_kinds = pytest.mark.parametrize(
    "kind", ["fastapi", "flask", "fastapi stream", "flask stream"])
fastapi_alone = pytest.mark.parametrize(
    "kind", ["fastapi", pytest.param("fastapi, just installed", marks=INSTALLED)])


@pytest.fixture(scope="module")
def start_pod(
    shared_target: StandInTarget, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartPod]:
    """A function that returns the pod of a kind, one for all tests of this file."""
    pods: List[Runtime] = []
    with contextlib.ExitStack() as stack:

        @functools.lru_cache(maxsize=None)
        def start_kind(kind: str) -> Runtime:
            kind, _, is_new = kind.partition(", ")
            env = {"ETL_CLASS_PAYLOAD": payload_of(CLASSES[kind]), "NUM_WORKERS": "1",
                   "AIS_TARGET_URL": shared_target.url, **(variables_of_index() if is_new else {})}
            folder = tmp_path_factory.mktemp("new")
            python = make_environment(folder) if is_new else interpreter("sdk")
            pods.append(stack.enter_context(
                Runtime(env=env, python=python, expect_traceback=True, start_seconds=300)))
            if is_new:
                pods[-1].wait_for_line("installing Python packages: %s" % kind)
            return pods[-1]

        yield start_kind
    log = "\n".join(pod.log() for pod in pods)
    raised = re.findall(r"(?m)^Traceback.*\n(?: .*\n)*(.*)$", log)
    assert [error for error in raised if not error.endswith(EXPECTED_FAILURES)] == []


@pytest.fixture
def pod(start_pod: StartPod, kind: str) -> Runtime:
    """The pod of a kind."""
    return start_pod(kind)


def transformed(kind: str, data: bytes) -> bytes:
    """Return what a class makes of `bucket/object`."""
    return data.upper() + (b"" if "stream" in kind else b" bucket/object")


# == An application's own ==


@both
def test_objects_and_health_probes_are_answered_as_for_any_class(
    pod: Runtime, shared_target: StandInTarget
) -> None:
    response = pod.request("PUT", "/bucket/an%20object", b"hello")
    assert (response.status, response.body) == (200, b"HELLO bucket/an object")
    assert response.headers["content-type"] == "application/octet-stream"
    assert pod.request("GET", "/health").body == b"Running"
    assert pod.request("PUT", "/health", b"").status == 405
    assert pod.request("DELETE", "/bucket/object").status == 405
    assert pod.request("PUT", "/bucket/object?etl_fqn=%2Fetc%2Fpasswd", b"").status == 403
    path = "/ais%2F@%23%2Fbucket%2Fobj%20ect"
    shared_target.objects[path] = b"hello"
    response = pod.request("GET", path + "?uuid=1")
    assert (response.status, response.body) == (200, b"HELLO ais/@#/bucket/obj ect")
    assert shared_target.requests[-1].target == BASE_PATH + path + "?uuid=1"
    query = urlencode({"original_url": shared_target.url + "/over/there", "object_to": "bucket/got"})
    shared_target.objects["/over/there"] = b"hello"
    response = pod.request("POST", "/download?" + query)
    assert (response.status, response.body) == (200, b"HELLO bucket/got")
    assert pod.request("POST", "/bucket/object", b"hello").status == 405
    response = pod.request("PUT", "/bucket/teapot", b"hello")
    failure = {"detail": "Processing error: short and stout"}
    assert (response.status, json.loads(response.body)) == (418, failure)
    # on the thread that made the instance
    assert pod.request("PUT", "/bucket/where", b"").body == b"main"


@both
def test_routes_middleware_dependencies_hooks_and_exception_handlers_work(
    pod: Runtime, kind: str
) -> None:
    assert body_of(pod, "/version")["version"] == "1.0"
    assert body_of(pod, "/routed/hello/you") == {"hello": "you"}
    # by another method than the route's it is an object
    assert pod.request("PUT", "/version", b"hello").body == b"HELLO version"
    for path in ("/version", "/bucket/object"):
        assert pod.request("PUT", path, b"hello").headers["x-marked"] == path
    assert pod.request("GET", "/guarded").status == 403
    if kind.startswith("fastapi"):
        assert pod.request("GET", "/guarded", headers={"X-Key": "sesame"}).status == 200
    response = pod.request("GET", "/refused")
    assert (response.status, json.loads(response.body)) == (409, {"refused": "as it pleases"})


@both
def test_a_class_may_wrap_the_handling_of_objects_and_read_their_bodies(pod: Runtime) -> None:
    response = pod.request("PUT", "/bucket/wrapped", iter([b"hel", b"lo"]))
    assert (response.status, response.body) == (200, b"HELLO bucket/wrapped")
    assert response.headers["x-wrapped"] == "bucket/wrapped False 5"


@pytest.mark.parametrize("kind", ["fastapi plain", "flask plain"])
@pytest.mark.parametrize("name", [
    "line%0Afeed", "%0A", "a//b", "/leading", "trailing/", "..", "a/../b", "%2F", "%252F", "%C3%A4",
    "%FF", "a%3Fb", "a%23b", "a;b", "a+b", "a:b", "%20", "very/" * 50 + "deep", "health", "static/x",
    "docs", "{a}"])
def test_no_name_of_an_object_is_answered_by_the_framework(
    pod: Runtime, shared_target: StandInTarget, name: str
) -> None:
    response = pod.request("PUT", "/bucket/" + name, b"hello")
    assert response.status == 200
    assert response.body == b"HELLO bucket/" + unquote(name).encode()
    path = "/ais%2F@%23%2Fbucket%2F" + name.replace("/", "%2F")
    shared_target.objects[path] = b"hello"
    response = pod.request("GET", path)
    assert response.status == 200
    assert response.body == b"HELLO ais/@#/bucket/" + unquote(name).encode()


@pytest.mark.parametrize("kind", ["fastapi plain", "flask plain"])
def test_a_question_mark_in_a_name_is_not_taken_for_a_query(pod: Runtime) -> None:
    response = pod.request("PUT", "/bucket/a?b?etl_args=", b"hello")
    assert (response.status, response.body) == (200, b"HELLO bucket/a?b")


@fastapi_alone
def test_a_transform_may_run_a_loop_of_its_own(pod: Runtime) -> None:
    for _ in range(3):
        assert pod.request("PUT", "/bucket/async", b"").body == b"1.0"
        assert body_of(pod, "/version")["version"] == "1.0"


@both
def test_health_is_answered_while_objects_are_transformed(pod: Runtime, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as clients, object_in_work(pod, tmp_path / "gate") as first:
        waiting = [clients.submit(pod.request, "PUT", "/bucket/object", b"hello") for _ in range(2)]
        assert pod.request("GET", "/health", timeout=SOON_SECONDS).body == b"Running"
        assert not first.done()
    assert {future.result().body for future in (first, *waiting)} == {b"HELLO bucket/object"}


# == Bodies ==


@all_kinds
def test_bodies_of_all_sizes_come_whole_in_chunks_or_not(pod: Runtime, kind: str) -> None:
    for size in (0, 1, PIECE_BYTES - 1, PIECE_BYTES + 1, 5 << 20):
        data = os.urandom(size // 2 + 1).hex().encode()[:size]
        pieces = [data[start:start + 100000] for start in range(0, size, 100000)]
        for body in (data, iter(pieces)):
            response = pod.request("PUT", "/bucket/object", body)
            assert response.status == 200
            assert response.body == transformed(kind, data)
            assert ("transfer-encoding" in response.headers) == (not response.body or "stream" in kind)


@pytest.mark.parametrize("kind", ["fastapi stream", "flask stream"])
def test_a_stream_that_fails_is_cut(pod: Runtime) -> None:
    with pytest.raises(http.client.IncompleteRead) as cut:
        pod.request("PUT", "/bucket/object?etl_args=fail", b"hello")
    assert cut.value.partial == b"HELLO"
    pod.wait_for_line("/bucket/object: the answer was cut: no more of it")


@all_kinds
def test_a_body_that_ends_early_is_never_taken_for_a_whole_one(pod: Runtime, kind: str) -> None:
    short = {
        "length": b"Content-Length: 100\r\n\r\nhello",
        "chunks": b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "chunk": b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
    }
    for name, framing in short.items():
        with pod.connect() as connection:
            head = b"PUT /bucket/%b HTTP/1.1\r\nHost: pod\r\n" % name.encode()
            connection.sendall(head + framing)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        if answer.startswith(b"HTTP/1.1 200"):  # of a stream: it has begun before the body broke off
            assert "stream" in kind and not answer.endswith(b"0\r\n\r\n"), name
        else:
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400"), name
        pod.wait_for_line("/bucket/%s: .*the request's body (broke off|ended)" % name)


@both
@pytest.mark.parametrize("framing", [
    b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"])
@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.2"])
def test_a_body_behind_an_offer_of_another_protocol_is_read_or_the_request_refused(
    pod: Runtime, framing: bytes, offer: bytes
) -> None:
    answer = pod.raw([
        b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: %b\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n" % offer + framing])
    if answer.startswith(b"HTTP/1.1 200 "):
        assert b"HELLO bucket/object" in answer
    else:
        assert re.match(rb"HTTP/1.1 4\d\d ", answer)


@pytest.mark.parametrize("kind", ["fastapi changes"])
@pytest.mark.parametrize("how, statuses", [
    ("kept", {200}), ("lost", {400}), ("first", {200, 400})])
def test_an_object_that_middleware_has_read_in_part_is_not_transformed(
    pod: Runtime, how: str, statuses: Set[int]
) -> None:
    for framing, pieces in [
        (b"Content-Length: 10", [b"hello", b"world"]),
        (b"Transfer-Encoding: chunked", [b"5\r\nhello\r\n", b"5\r\nworld\r\n0\r\n\r\n"]),
    ]:
        head = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nX-Look: %b\r\nConnection: close\r\n"
        with pod.connect() as client:
            client.sendall(head % how.encode() + framing + b"\r\n\r\n" + pieces[0])
            time.sleep(0.1)  # they arrive apart
            client.sendall(pieces[1])
            answer = client.makefile("rb").read()
        status = int(answer[9:12])
        assert status in statuses
        assert (status == 200) == (b"HELLOWORLD bucket/object" in answer)


@pytest.mark.parametrize("kind", ["fastapi changes"])
def test_a_path_that_the_class_changes_is_that_of_the_object(pod: Runtime) -> None:
    response = pod.request("PUT", "/alias/an%20object", b"hello")
    assert (response.status, response.body) == (200, b"HELLO bucket/an object")


@pytest.mark.parametrize("kind", ["fastapi changes"])
def test_a_stream_of_the_class_s_own_that_fails_is_cut_behind_middleware_too(pod: Runtime) -> None:
    with pytest.raises(http.client.IncompleteRead) as cut:
        pod.request("GET", "/bad")
    assert cut.value.partial == b"abc"


@pytest.mark.parametrize("kind", ["fastapi changes"])
def test_a_stream_that_fails_in_middleware_is_cut_behind_other_middleware(pod: Runtime) -> None:
    with pytest.raises(http.client.IncompleteRead) as cut:
        pod.request("GET", "/late?gate=/", headers={"X-Look": "spoils"})
    assert cut.value.partial == b"abc"


@pytest.mark.parametrize("kind", ["fastapi changes"])
def test_a_route_that_fails_behind_middleware_is_answered(pod: Runtime) -> None:
    assert pod.request("GET", "/worse").status == 500


@pytest.mark.parametrize("kind", ["fastapi changes"])
def test_a_stream_that_is_read_slowly_is_whole_though_the_application_ends_meanwhile(
    pod: Runtime
) -> None:
    with pod.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.0)
        answer = http.client.HTTPResponse(client, method="GET")
        answer.begin()
        assert len(answer.read()) == 48 << 16
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.makefile("rb").read().endswith(b"Running")


@fastapi_alone
def test_a_word_of_an_upgrade_without_an_offer_is_ignored(pod: Runtime) -> None:
    response = pod.request("PUT", "/bucket/object", b"hello", {"Connection": "upgrade"})
    assert (response.status, response.body) == (200, b"HELLO bucket/object")


@pytest.mark.parametrize("kind", ["fastapi changes"])
def test_the_end_of_a_stream_does_not_wait_for_what_is_left_to_do(
    pod: Runtime, tmp_path: Path
) -> None:
    try:
        assert pod.request("GET", "/late?gate=%s" % (tmp_path / "gate")).body == b"abc"
    finally:
        (tmp_path / "gate").touch()


@fastapi_alone
@pytest.mark.parametrize("head", [
    b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n",
    b"PUT /bucket/object HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"])
def test_an_encoding_that_is_not_undone_is_refused(pod: Runtime, head: bytes) -> None:
    answer = pod.raw([head + b"\r\n5\r\nhello\r\n0\r\n\r\n"])
    assert re.match(rb"HTTP/1.1 (501|400) ", answer)


@both
def test_an_offer_of_another_protocol_without_a_body_is_ignored(
    pod: Runtime, shared_target: StandInTarget
) -> None:
    path = "/ais%2F@%23%2Fbucket%2Foffered"
    shared_target.objects[path] = b"hello"
    answer = pod.raw([
        b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n" % path.encode()])
    assert answer.startswith(b"HTTP/1.1 200 ") and b"HELLO ais/@#/bucket/offered" in answer


@all_kinds
def test_a_client_that_sends_nothing_more_gets_its_answer(
    pod: Runtime, kind: str, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(pod.connect()) for _ in range(2)]
        # the answer takes longer than the client's end to arrive
        late = object_in_work(pod, tmp_path / "gate") if "stream" not in kind else contextlib.nullcontext()
        with late:
            for client, framing in zip(clients, (
                    b"Content-Length: 5\r\n\r\nhello",
                    b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")):
                client.sendall(b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\n" + framing)
                client.shutdown(socket.SHUT_WR)
            time.sleep(0.2)
        for client in clients:
            answer = client.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 200 ") and transformed(kind, b"hello") in answer


@all_kinds
def test_a_client_that_leaves_while_an_answer_is_sent_harms_nobody(pod: Runtime, kind: str) -> None:
    sent = 100000 if "stream" in kind else 8000000
    for _ in range(20):
        with pod.connect() as client:
            client.sendall(b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n")
            client.sendall(bytes(sent))
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
    assert pod.request("PUT", "/bucket/object", b"hello").body == transformed(kind, b"hello")
    if "stream" in kind:  # closed at once, and not when garbage is collected
        time.sleep(0.5)
        assert pod.request("PUT", "/bucket/open", b"").body == b"1"


@both
def test_an_object_that_no_memory_holds_is_refused_before_it_comes(pod: Runtime) -> None:
    with pod.connect() as client:
        client.sendall(b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (1 << 50))
        assert client.recv(PIECE_BYTES).startswith(b"HTTP/1.1 413 ")


@all_kinds
def test_results_go_straight_to_their_target(
    pod: Runtime, kind: str, shared_target: StandInTarget
) -> None:
    shared_target.requests.clear()
    hop = shared_target.root + "/ais%2F@%23%2Fdst%2Fobj?uuid=1"
    response = pod.request("PUT", "/bucket/object", iter([b"hello"] * 3), {"Ais-Node-Url": hop})
    expected = transformed(kind, b"hello" * 3)
    assert [(request.method, request.body) for request in shared_target.requests] == [("PUT", expected)]
    assert (response.status, response.body) == (204, b"")
    assert response.headers["ais-direct-put-length"] == str(len(expected))


# == WebSocket ==


def send_objects(client: ClientConnection, count: int, *further: bytes) -> None:
    """Send objects, and further messages; check what comes back for the objects."""
    for number in range(count):
        client.send(json.dumps({"path": "object%d" % number}).encode())
        client.send(b"hello" * number)
    for message in further:
        client.send(message)
    expected = [b"HELLO" * number + b" object%d" % number for number in range(count)]
    assert [client.recv() for _ in range(count)] == expected


@both
def test_objects_come_over_websocket_and_a_failure_is_told_as_a_target_understands_it(
    pod: Runtime
) -> None:
    with open_websocket(pod) as client:
        send_objects(client, 50, b'{"path": "bucket/teapot"}', b"hello")
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv()
    assert closed.value.rcvd and closed.value.rcvd.code == 1011
    assert closed.value.rcvd.reason == "Processing error: short and stout"
    # since the close frame came within a message
    assert closed.value.sent and closed.value.sent.code == 1002


@fastapi_alone
def test_a_connection_whose_handshake_is_refused_serves_no_more_requests(pod: Runtime) -> None:
    of_application = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = pod.raw([handshake(Sec_WebSocket_Version="8"), of_application])
    assert re.match(rb"HTTP/1.1 4(00|26) ", answer) and b"\r\nConnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1") == 1


@fastapi_alone
def test_a_class_s_own_websocket_routes_work(pod: Runtime) -> None:
    with open_websocket(pod, "/echo") as client:
        client.send("hello")
        assert list(client) == ["echo of hello"]  # to the end, which the class makes


@both
def test_ws_is_for_websocket_alone(pod: Runtime) -> None:
    assert pod.request("GET", "/ws").status == 426


# == Applications of other kinds ==


def test_an_application_of_the_class_s_own_making_is_served(start_runtime: StartRuntime) -> None:
    runtime = start(start_runtime, "OwnApp")
    assert body_of(runtime, "/made") == "in the lifespan"
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    assert runtime.terminate() == Exit.OK
    said = [line for line in runtime.lines if line.startswith("lifespan")]
    assert said == ["lifespan begins", "lifespan ends"]


@pytest.mark.parametrize("name, health", [
    ("Prepares", b"Running"), ("RegistersRoutes", b"as well as can be")])
def test_hooks_are_called_and_transforms_run_on_many_threads_where_the_user_says_so(
    start_runtime: StartRuntime, name: str, health: bytes
) -> None:
    runtime = start(start_runtime, name, {"NUM_THREADS": "4"})
    assert body_of(runtime, "/made") == "in the hook"
    assert runtime.request("GET", "/health").body == health
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    assert runtime.request("PUT", "/bucket/where", b"").body == b"another"


def test_an_application_that_is_first_used_by_transform_is_refused_there(
    start_runtime: StartRuntime
) -> None:
    runtime = start(start_runtime, "UsesAppLate", expect_traceback=True)
    response = runtime.request("PUT", "/bucket/object", b"")
    assert response.status == 500 and b"use self.app in __init__" in response.body


@pytest.mark.parametrize("name", ["StartsFlask", "StartsFast"])
def test_a_class_may_start_a_server_of_its_own(
    sdk_python: str, name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    variables = exact_environment(
        sdk_python, {"ETL_CLASS_PAYLOAD": payload_of(name), "PORT": str(port)})
    with Server([sdk_python, str(RUNTIME)], variables, expect_traceback=True) as server:
        server.port = port

        def is_healthy() -> bool:
            with contextlib.suppress(OSError):
                return server.request("GET", "/health").body == b"Running"
            return False

        wait_until(is_healthy, "its server answers")
        assert server.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
        assert body_of(server, "/made") == "for its start"
        if name == "StartsFast":  # half a message, which tells a failure, cannot be sent there
            with pytest.raises(InvalidStatus):
                open_websocket(server)


# == Packages that are installed ==


@functools.lru_cache(maxsize=None)
def variables_of_index() -> Environ:
    """Return the variables that let pip reach its index; skip where it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        command = [interpreter("slim"), "-m", "pip", "download", "--no-deps", "-d", folder, "flask"]
        if subprocess.run(command, timeout=170).returncode:
            pytest.skip("pip reaches no index")
    return {**index_variables(), "PIP_NO_INDEX": None}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name, status, body", [
    ("UsesFlask", 200, b"HELLO"),
    pytest.param("Imports", 418, b"short and stout", marks=pytest.mark.slow)])
def test_what_a_class_needs_is_installed_and_then_it_is_served(
    tmp_path: Path, name: str, status: int, body: bytes
) -> None:
    env = {**variables_of_index(), "ETL_CLASS_PAYLOAD": payload_of(name), "NUM_WORKERS": "2"}
    python = make_environment(tmp_path)
    with Runtime(env=env, python=python, expect_traceback=True, start_seconds=300) as runtime:
        runtime.wait_for_line(r"installing Python packages: (fastapi|flask)")
        response = runtime.request("PUT", "/bucket/object", b"hello")
        assert response.status == status and body in response.body
        assert runtime.terminate() == Exit.OK
