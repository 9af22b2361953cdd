"""Classes with an application of FastAPI or Flask: found out, installed, and served by uvicorn and gunicorn.

The classes are pickled by the real SDK. Most are served in the SDK's environment, where the frameworks are installed.
"""
import configparser
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

from ais_runtime_min import FRAMEWORKS, Exit
from harness import (ROOT, RUNTIME, Environ, Finished, Runtime, Server, children_of, exact_environment, interpreter,
                     make_payload, run_to_end)
from peer import handshake
from standin import BASE_PATH, StandInTarget

StartRuntime = Callable[..., Runtime]
SOON_SECONDS = 20.0
PIECE_BYTES = 1 << 16

IMPORTS = '''
import asyncio, contextlib, os, sqlite3, sys, threading, time
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
'''
SHARED = IMPORTS + '''
import fastapi, fastapi.responses, flask, werkzeug.exceptions

class Refused(Exception):
    pass

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)

def Teapot(code, text):
    return werkzeug.exceptions.ImATeapot(text)

class Work:
    """What the classes of both frameworks do with an object."""

    def transform(self, data, path, etl_args):
        if path == "bucket/where":
            return b"main" if threading.current_thread() is threading.main_thread() else b"another"
        if path == "bucket/teapot":
            kind = fastapi.HTTPException if isinstance(self, FastAPIServer) else Teapot
            raise kind(418, "short and stout")
        if etl_args:
            open(etl_args + ".begun", "w").close()
            wait_for(etl_args)
        return data.upper() + b" " + path.encode()

class Pieces:
    """The same as a stream."""

    def transform_stream(self, reader, path, etl_args):
        for piece in iter(lambda: reader.read(65536), b""):
            yield piece.upper()
            if etl_args == "fail":
                raise ValueError("no more of it")
'''
FAST = SHARED + '''
router = fastapi.APIRouter(prefix="/routed")

@router.get("/hello/{name}")
async def hello(name: str, times: int = 1):
    return {"hello": [name] * times}

def dependency(request: fastapi.Request):
    if request.headers.get("x-key") != "sesame":
        raise fastapi.HTTPException(403, "no key")
    return "a key"

class Fast(Work, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.events = []
        self.database = None
        self.app.include_router(router)
        self.app.add_api_route("/version", self.version)
        self.app.add_api_route("/guarded", self.guarded)
        self.app.add_api_route("/refused", self.refused)
        self.app.add_api_route("/pid", lambda: os.getpid())
        self.app.add_api_websocket_route("/echo", self.echo)
        self.app.add_exception_handler(Refused, self.on_refused)
        self.app.middleware("http")(self.marking)

    async def version(self):
        return {"version": await self.helper(), "events": self.events}

    async def helper(self):
        await asyncio.sleep(0)
        return "1.0"

    async def guarded(self, key=fastapi.Depends(dependency)):
        return {"key": key}

    async def refused(self):
        raise Refused("as it pleases")

    async def echo(self, websocket: fastapi.WebSocket):
        await websocket.accept()
        await websocket.send_text("echo of " + await websocket.receive_text())
        await websocket.close()

    async def on_refused(self, request, error):
        return fastapi.responses.JSONResponse({"refused": str(error)}, 409)

    async def marking(self, request, call_next):
        response = await call_next(request)
        response.headers["x-marked"] = request.url.path
        return response

    async def startup_event(self):
        self.database = sqlite3.connect(":memory:")  # of this thread alone
        self.events.append("started on " + threading.current_thread().name)

    async def shutdown_event(self):
        print("shut down on " + threading.current_thread().name, flush=True)

    def transform(self, data, path, etl_args):
        self.database.execute("select 1")
        if path == "bucket/async":
            return asyncio.run(self.helper())
        return super().transform(data, path, etl_args)

class FastStream(Pieces, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app.middleware("http")(self.marking)

    async def marking(self, request, call_next):
        return await call_next(request)
'''
FLASK = SHARED + '''
blueprint = flask.Blueprint("mine", "mine", url_prefix="/routed")

@blueprint.route("/hello/<name>")
def hello(name):
    return {"hello": [name]}

class Flasky(Work, FlaskServer):
    def __init__(self):
        super().__init__()
        self.database = sqlite3.connect(":memory:")  # of this thread alone
        self.app.register_blueprint(blueprint)
        self.app.add_url_rule("/version", view_func=lambda: {"version": "1.0"}, endpoint="version")
        self.app.add_url_rule("/refused", view_func=self.refused)
        self.app.add_url_rule("/pid", view_func=lambda: str(os.getpid()), endpoint="pid")
        self.app.before_request(self.guard)
        self.app.after_request(self.mark)
        self.app.register_error_handler(Refused, lambda error: ({"refused": str(error)}, 409))

    def guard(self):
        flask.g.path = flask.request.path
        if flask.request.path == "/guarded":
            return {"guarded": True}, 403

    def mark(self, response):
        response.headers["x-marked"] = flask.g.path
        return response

    def refused(self):
        raise Refused("as it pleases")

    def transform(self, data, path, etl_args):
        self.database.execute("select 1")
        return super().transform(data, path, etl_args)

class FlaskStream(Pieces, FlaskServer):
    def __init__(self):
        super().__init__()
        self.app.add_url_rule("/version", view_func=lambda: "1.0", endpoint="version")
'''
CLASSES = {"fastapi": (FAST, "Fast"), "flask": (FLASK, "Flasky"),
           "fastapi stream": (FAST, "FastStream"), "flask stream": (FLASK, "FlaskStream")}
BY = {"fastapi": "FastAPIServer, by uvicorn", "flask": "FlaskServer, by gunicorn"}
both = pytest.mark.parametrize("kind", ["fastapi", "flask"])


@pytest.fixture
def start(start_runtime: StartRuntime, sdk_python: str) -> StartRuntime:
    """A function that starts a class of this file where the frameworks are installed."""

    def run(kind: str, env: Optional[Environ] = None, expect_traceback: bool = False) -> Runtime:
        payload = make_payload(*CLASSES[kind])
        return start_runtime(payload, {"NUM_WORKERS": "1", **(env or {})}, python=sdk_python, expect_traceback=expect_traceback)

    return run


def start_in_vain(source: str, name: str, python: Optional[str] = None, env: Optional[Environ] = None) -> Finished:
    """Start a class that cannot be served."""
    variables = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "NUM_WORKERS": "1", **(env or {})}
    return run_to_end(env=variables, python=python, timeout=60)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + SOON_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within %.0f s: %s" % (SOON_SECONDS, what)
        time.sleep(0.01)


def body_of(runtime: Runtime, target: str) -> Any:
    """GET a route of the application, which answers JSON."""
    return json.loads(runtime.request("GET", target).body)


# == An application's own ==


@both
def test_who_serves_a_class_is_told(start: StartRuntime, kind: str) -> None:
    runtime = start(kind, {"NUM_WORKERS": "2"})
    runtime.wait_for_line(r"serving \w+ \(%s\) on http://\S+ with 2 workers" % BY[kind])


@both
def test_objects_and_health_probes_are_answered_as_for_any_class(start: StartRuntime, kind: str) -> None:
    runtime = start(kind)
    response = runtime.request("PUT", "/bucket/an%20object", b"hello")
    assert (response.status, response.body) == (200, b"HELLO bucket/an object")
    assert response.headers["content-type"] == "application/octet-stream"
    assert runtime.request("GET", "/health").body == b"Running"
    assert runtime.request("PUT", "/health", b"").status == 405
    assert runtime.request("DELETE", "/bucket/object").status == 405
    assert runtime.request("PUT", "/bucket/object?etl_fqn=%2Fetc%2Fpasswd", b"").status == 403


@both
def test_objects_are_read_from_the_target_with_the_raw_path(start: StartRuntime, target: StandInTarget, kind: str) -> None:
    target.objects["/ais%2F@%23%2Fbucket%2Fobj%20ect"] = b"hello"
    response = start(kind).request("GET", "/ais%2F@%23%2Fbucket%2Fobj%20ect?uuid=1")
    assert (response.status, response.body) == (200, b"HELLO ais/@#/bucket/obj ect")
    assert target.requests[-1].target == BASE_PATH + "/ais%2F@%23%2Fbucket%2Fobj%20ect?uuid=1"


@both
def test_routes_and_routers_come_before_objects(start: StartRuntime, kind: str) -> None:
    runtime = start(kind)
    assert body_of(runtime, "/version")["version"] == "1.0"
    assert body_of(runtime, "/routed/hello/you") == {"hello": ["you"]}
    assert runtime.request("PUT", "/version", b"hello").body == b"HELLO version"  # of another method: an object


@both
def test_middleware_and_hooks_see_objects_too(start: StartRuntime, kind: str) -> None:
    runtime = start(kind)
    for path in ("/version", "/bucket/object"):
        assert runtime.request("PUT", path, b"hello").headers["x-marked"] == path


@both
def test_dependencies_hooks_and_exception_handlers_work(start: StartRuntime, kind: str) -> None:
    runtime = start(kind)
    assert runtime.request("GET", "/guarded").status == 403
    response = runtime.request("GET", "/refused")
    assert (response.status, json.loads(response.body)) == (409, {"refused": "as it pleases"})
    if kind == "fastapi":
        assert runtime.request("GET", "/guarded", headers={"X-Key": "sesame"}).status == 200


@both
def test_an_http_exception_of_transform_gives_its_status(start: StartRuntime, kind: str) -> None:
    runtime = start(kind, expect_traceback=True)
    response = runtime.request("PUT", "/bucket/teapot", b"hello")
    assert (response.status, json.loads(response.body)) == (418, {"detail": "Processing error: short and stout"})


def test_start_up_and_shutdown_run_on_the_thread_of_transform(start: StartRuntime) -> None:
    runtime = start("fastapi")
    assert body_of(runtime, "/version")["events"] == ["started on MainThread"]
    assert runtime.request("PUT", "/bucket/where", b"").body == b"main"  # and its database is of that thread
    assert runtime.terminate() == Exit.OK
    runtime.wait_for_line("shut down on MainThread")


def test_a_transform_may_run_a_loop_of_its_own(start: StartRuntime) -> None:
    runtime = start("fastapi")
    for _ in range(3):
        assert runtime.request("PUT", "/bucket/async", b"").body == b"1.0"
        assert body_of(runtime, "/version")["version"] == "1.0"


def test_a_flask_class_transforms_on_the_thread_that_made_it(start: StartRuntime) -> None:
    assert start("flask").request("PUT", "/bucket/where", b"").body == b"main"


VARIANTS = FAST + '''
@contextlib.asynccontextmanager
async def lifespan(app):
    print("lifespan begins", flush=True)
    yield {"made": "in the lifespan"}
    print("lifespan ends", flush=True)

async def made(request: fastapi.Request):
    return request.state.made

class OwnApp(Work, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app = fastapi.FastAPI(lifespan=lifespan)
        self.app.add_api_route("/made", made)

class Prepares(Work, FastAPIServer):
    def _setup_app(self):
        super()._setup_app()
        self.app.add_api_route("/made", lambda: "in the hook")

class Wraps(Work, FastAPIServer):
    async def _handle_request(self, path, request, is_get):
        body = await request.body()
        response = await super()._handle_request(path, request, is_get)
        response.headers["x-wrapped"] = "%s %s %d" % (path, is_get, len(body))
        return response

class RegistersRoutes(Work, FlaskServer):
    def _register_routes(self):
        super()._register_routes()
        self.app.add_url_rule("/made", view_func=lambda: '"in the hook"')

class WrapsFlask(Work, FlaskServer):
    def _handle_request(self, path):
        body = flask.request.get_data()
        response = super()._handle_request(path)
        response.headers["x-wrapped"] = "%s %s %d" % (path, flask.request.method == "GET", len(body))
        return response

class OwnHealth(Work, FlaskServer):
    def _health(self):
        return flask.Response("as well as can be")

class Plain(Work, FastAPIServer):
    pass

class PlainFlask(Work, FlaskServer):
    pass

class Threaded(Work, HTTPMultiThreadedServer):
    pass

class StartsInVain(Work, FastAPIServer):
    async def startup_event(self):
        raise ValueError("no model here")

class ConstructsInVain(Work, FlaskServer):
    def __init__(self):
        super().__init__()
        self.app.config["X"] = 1
        raise ValueError("no model here")

class StartsFast(Work, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app.add_api_route("/made", lambda: "for its start")
    def start(self):
        import uvicorn
        uvicorn.run(self.app, host="127.0.0.1", port=self.port)

class StartsFlask(Work, FlaskServer):
    def start(self):
        self.app.add_url_rule("/made", view_func=lambda: '"for its start"')
        self.host = "127.0.0.1"
        super().start()

class UsesAppLate(FastAPIServer):
    def transform(self, data, path, etl_args):
        return repr(self.app)
'''


@pytest.fixture
def start_variant(start_runtime: StartRuntime, sdk_python: str) -> StartRuntime:
    """A function that starts one of the smaller classes where the frameworks are installed."""

    def run(name: str, env: Optional[Environ] = None, expect_traceback: bool = False) -> Runtime:
        return start_runtime(make_payload(VARIANTS, name), {"NUM_WORKERS": "1", **(env or {})}, python=sdk_python,
                             expect_traceback=expect_traceback)

    return run


def test_an_application_of_the_class_s_own_making_is_served(start_variant: StartRuntime) -> None:
    runtime = start_variant("OwnApp")
    assert body_of(runtime, "/made") == "in the lifespan"
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    assert runtime.terminate() == Exit.OK
    assert [line for line in runtime.lines if line.startswith("lifespan")] == ["lifespan begins", "lifespan ends"]


@pytest.mark.parametrize("name", ["Prepares", "RegistersRoutes"])
def test_a_hook_that_prepares_the_application_is_called(start_variant: StartRuntime, name: str) -> None:
    runtime = start_variant(name)
    assert body_of(runtime, "/made") == "in the hook"
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"


@pytest.mark.parametrize("name", ["Wraps", "WrapsFlask"])
def test_a_class_may_wrap_the_handling_of_objects_and_read_their_bodies(start_variant: StartRuntime, name: str) -> None:
    response = start_variant(name).request("PUT", "/bucket/object", iter([b"hel", b"lo"]))
    assert (response.status, response.body) == (200, b"HELLO bucket/object")
    assert response.headers["x-wrapped"] == "bucket/object False 5"


def test_a_flask_class_may_answer_health_probes_itself(start_variant: StartRuntime) -> None:
    assert start_variant("OwnHealth").request("GET", "/health").body == b"as well as can be"


@contextlib.contextmanager
def served_by_its_own(python: str, name: str, expect_traceback: bool = False) -> Iterator[Server]:
    """Start a class that starts a server of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    variables = {"ETL_CLASS_PAYLOAD": make_payload(VARIANTS, name), "PORT": str(port)}
    with Server([python, str(RUNTIME)], exact_environment(python, variables), expect_traceback) as server:
        server.port = port

        def is_healthy() -> bool:
            with contextlib.suppress(OSError):
                return server.request("GET", "/health").body == b"Running"
            return False

        wait_until(is_healthy, "its server answers")
        yield server


@pytest.mark.parametrize("name", ["StartsFast", "StartsFlask"])
def test_a_class_may_start_a_server_of_its_own(sdk_python: str, name: str) -> None:
    with served_by_its_own(sdk_python, name) as server:
        assert server.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
        assert json.loads(server.request("GET", "/made").body) == "for its start"


@pytest.mark.parametrize("last, reason", [
    ([b'{"path": "bucket/teapot"}', b"hello"], "Processing error: short and stout"), ([b"{no JSON"], "it must be a JSON object")])
def test_a_server_of_its_own_takes_objects_over_websocket_and_tells_a_failure_by_a_close(
        sdk_python: str, last: List[bytes], reason: str) -> None:
    with served_by_its_own(sdk_python, "StartsFast", expect_traceback=True) as server, open_websocket(server) as client:
        for number in range(200):
            client.send(json.dumps({"path": "object%d" % number}).encode())
            client.send(b"hello" * number)
        for message in last:
            client.send(message)
        assert [client.recv() for _ in range(200)] == [b"HELLO" * number + b" object%d" % number for number in range(200)]
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv()
    assert closed.value.rcvd and closed.value.rcvd.code == 1011 and reason in closed.value.rcvd.reason


# == Bodies ==


@pytest.mark.parametrize("kind", ["fastapi", "flask", "fastapi stream", "flask stream"])
def test_bodies_of_all_sizes_come_whole_in_chunks_or_not(start: StartRuntime, kind: str) -> None:
    runtime = start(kind)
    suffix = b"" if "stream" in kind else b" bucket/object"
    for size in (0, 1, PIECE_BYTES - 1, PIECE_BYTES + 1, 5 << 20):
        data = os.urandom(size // 2 + 1).hex().encode()[:size]
        pieces = [data[start:start + 100000] for start in range(0, size, 100000)]
        for body in (data, iter(pieces)):
            response = runtime.request("PUT", "/bucket/object", body)
            assert response.status == 200
            assert response.body == data.upper() + suffix
            assert ("transfer-encoding" in response.headers) == (not response.body or "stream" in kind)


@both
def test_a_stream_that_fails_is_cut(start: StartRuntime, kind: str) -> None:
    runtime = start(kind + " stream", expect_traceback=True)
    with pytest.raises(http.client.IncompleteRead) as cut:
        runtime.request("PUT", "/bucket/object?etl_args=fail", b"hello")
    assert cut.value.partial == b"HELLO"
    runtime.wait_for_line("/bucket/object: the answer was cut: no more of it")


SHORT_BODIES = {
    "length": b"Content-Length: 100\r\n\r\nhello", "chunks": b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "chunk": b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
}


@pytest.mark.parametrize("kind", ["fastapi", "flask", "fastapi stream", "flask stream"])
def test_a_body_that_ends_early_is_never_taken_for_a_whole_one(start: StartRuntime, kind: str) -> None:
    runtime = start(kind)
    for number, framing in enumerate(SHORT_BODIES):
        with runtime.connect() as connection:
            connection.sendall(b"PUT /bucket/short%d HTTP/1.1\r\nHost: pod\r\n" % number + SHORT_BODIES[framing])
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        if answer.startswith(b"HTTP/1.1 200"):  # of a stream: it has begun before the body broke off
            assert "stream" in kind and not answer.endswith(b"0\r\n\r\n")
        else:
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
        runtime.wait_for_line("/bucket/short%d: .*the request's body (broke off|ended)" % number)


@pytest.mark.parametrize("kind", ["fastapi", "flask", "fastapi stream", "flask stream"])
def test_results_go_straight_to_their_target(start: StartRuntime, target: StandInTarget, kind: str) -> None:
    hop = "http://127.0.0.1:%d/ais%%2F@%%23%%2Fdst%%2Fobj?uuid=1" % target.port
    response = start(kind).request("PUT", "/bucket/object", iter([b"hello"] * 3), {"Ais-Node-Url": hop})
    delivered = [request for request in target.requests if request.method == "PUT"]
    expected = b"HELLO" * 3 + (b"" if "stream" in kind else b" bucket/object")
    assert [request.body for request in delivered] == [expected]
    assert (response.status, response.body) == (204, b"")
    assert response.headers["ais-direct-put-length"] == str(len(expected))


# == Life ==


@both
def test_health_is_answered_while_objects_are_transformed(start: StartRuntime, tmp_path: Path, kind: str) -> None:
    runtime, gate = start(kind), tmp_path / "gate"
    with ThreadPoolExecutor() as clients:
        waiting = [clients.submit(runtime.request, "PUT", "/bucket/object?etl_args=%s" % gate, b"hello") for _ in range(3)]
        wait_until(Path(str(gate) + ".begun").exists, "an object is transformed")
        assert runtime.request("GET", "/health", timeout=SOON_SECONDS).body == b"Running"
        gate.touch()
        assert {future.result().body for future in waiting} == {b"HELLO bucket/object"}


@both
def test_what_has_begun_is_answered_after_sigterm(start: StartRuntime, tmp_path: Path, kind: str) -> None:
    runtime, gate = start(kind), tmp_path / "gate"
    idle = runtime.connect()
    with idle, ThreadPoolExecutor() as clients:
        waiting = clients.submit(runtime.request, "PUT", "/bucket/object?etl_args=%s" % gate, b"hello")
        wait_until(Path(str(gate) + ".begun").exists, "an object is transformed")
        runtime.process.terminate()
        runtime.wait_for_line("stopping")
        gate.touch()
        assert waiting.result().body == b"HELLO bucket/object"
        assert runtime.wait() == Exit.OK


@both
def test_idle_connections_do_not_delay_the_end(start: StartRuntime, kind: str) -> None:
    runtime = start(kind, {"NUM_WORKERS": "2"})
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = http.client.HTTPConnection("127.0.0.1", runtime.port)
            stack.callback(connection.close)
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b"Running"
        begin = time.monotonic()
        assert runtime.terminate() == Exit.OK
        assert time.monotonic() - begin < 15  # gunicorn and uvicorn would wait for 23 s


@both
def test_a_worker_that_is_killed_is_replaced(start: StartRuntime, kind: str) -> None:
    runtime = start(kind)
    first = int(runtime.request("GET", "/pid").body)
    os.kill(first, signal.SIGKILL)

    def is_replaced() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return int(runtime.request("GET", "/pid").body) != first
        return False

    wait_until(is_replaced, "another worker answers")
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    assert runtime.terminate() == Exit.OK


def test_the_end_of_gunicorn_is_that_of_the_pod(start: StartRuntime) -> None:
    runtime = start("flask")
    worker = int(runtime.request("GET", "/pid").body)
    arbiter = int(Path("/proc/%d/stat" % worker).read_text().rpartition(")")[2].split()[1])
    assert arbiter != runtime.pid
    os.kill(arbiter, signal.SIGKILL)
    assert runtime.wait() == Exit.SOFTWARE
    assert "SIGKILL" in runtime.lines[-1]


@both
def test_transforms_run_on_many_threads_where_the_user_says_so(start_variant: StartRuntime, kind: str) -> None:
    runtime = start_variant({"fastapi": "Prepares", "flask": "RegistersRoutes"}[kind], {"NUM_THREADS": "4"})
    assert runtime.request("PUT", "/bucket/where", b"").body == b"another"


LEAVES_THREADS = VARIANTS + '''
class Starter:
    def __reduce__(self):
        return exec, ("import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",)

class FreshFast(Prepares):
    STARTER = Starter()

class FreshFlask(RegistersRoutes):
    STARTER = Starter()
'''


@pytest.mark.parametrize("name", ["FreshFast", "FreshFlask"])
def test_a_class_that_leaves_threads_when_it_is_loaded_is_served_by_fresh_processes(
    start_runtime: StartRuntime, sdk_python: str, name: str
) -> None:
    runtime = start_runtime(make_payload(LEAVES_THREADS, name), {"NUM_WORKERS": "2"}, python=sdk_python)
    children = children_of(runtime.pid)
    assert children and all(b"--worker" in Path("/proc/%d/cmdline" % child).read_bytes() for child in children)
    assert body_of(runtime, "/made") == "in the hook"
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    assert runtime.terminate() == Exit.OK


def test_an_object_that_no_memory_holds_is_refused_before_it_comes(start: StartRuntime) -> None:
    with start("fastapi").connect() as client:
        client.sendall(b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (1 << 50))
        assert client.recv(PIECE_BYTES).startswith(b"HTTP/1.1 413 ")


BEGINS_SLOWLY = VARIANTS + '''
class Delay:
    def __reduce__(self):
        return exec, ("import functools, os, time; os.register_at_fork(after_in_child=functools.partial(time.sleep, 1.5))",)

class SlowToFork(RegistersRoutes):
    DELAY = Delay()
'''


def test_a_worker_that_has_just_been_forked_hears_of_the_end(start_runtime: StartRuntime, sdk_python: str) -> None:
    runtime = start_runtime(make_payload(BEGINS_SLOWLY, "SlowToFork"), {"NUM_WORKERS": "2"}, python=sdk_python)
    begin = time.monotonic()
    assert runtime.request("GET", "/health").body == b"Running"
    arbiter, = children_of(runtime.pid)
    wait_until(lambda: len(children_of(arbiter)) == 2, "two workers run")
    assert runtime.terminate() == Exit.OK
    assert time.monotonic() - begin < 15  # gunicorn asks once and would wait for 23 s


def test_sigterm_ends_an_installation_that_was_found_necessary_late(start_runtime: StartRuntime) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d/simple" % silent.getsockname()[1]
        variables = {"PIP_NO_INDEX": None, "PIP_INDEX_URL": url, "ETL_CLASS_PAYLOAD": make_payload(LOADED, "UsesApp")}
        python = interpreter("slim")
        with Server([python, str(RUNTIME)], exact_environment(python, variables)) as server:
            server.wait_for_line("installing Python packages: fastapi")
            assert server.terminate() == Exit.OK


# == WebSocket ==


def open_websocket(runtime: Server, path: str = "/ws") -> ClientConnection:
    """Open a WebSocket connection."""
    return connect("ws://127.0.0.1:%d%s" % (runtime.port, path), compression=None)


def test_objects_come_over_websocket_under_uvicorn(start: StartRuntime) -> None:
    runtime = start("fastapi")
    with open_websocket(runtime) as client:
        for number in range(50):
            client.send(json.dumps({"path": "object%d" % number}).encode())
            client.send(b"hello")
        assert [client.recv() for _ in range(50)] == [b"HELLO object%d" % number for number in range(50)]
        assert runtime.terminate() == Exit.OK


def test_a_failure_over_websocket_under_uvicorn_is_told_as_a_target_understands_it(start: StartRuntime) -> None:
    runtime = start("fastapi", expect_traceback=True)
    with open_websocket(runtime) as client:
        client.send(json.dumps({"path": "bucket/teapot"}).encode())
        client.send(b"hello")
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv()
    assert closed.value.rcvd and closed.value.rcvd.code == 1011
    assert closed.value.rcvd.reason == "Processing error: short and stout"
    assert closed.value.sent and closed.value.sent.code == 1002  # since the close frame came within a message


def test_a_connection_whose_handshake_is_refused_serves_no_more_requests(start: StartRuntime) -> None:
    refused = handshake(Sec_WebSocket_Version="8")
    answer = start("fastapi").raw([refused, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"])  # which is the application's
    assert answer.startswith(b"HTTP/1.1 426 ") and b"\r\nConnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_a_class_s_own_websocket_routes_work(start: StartRuntime) -> None:
    with open_websocket(start("fastapi"), "/echo") as client:
        client.send("hello")
        assert client.recv() == "echo of hello"


def test_ws_is_for_websocket_alone_and_gunicorn_has_none(start: StartRuntime) -> None:
    assert start("fastapi").request("GET", "/ws").status == 426
    assert start("flask").request("GET", "/ws").status == 501


# == Who is served by what ==

LOADED = IMPORTS + '''
class Loaded(FastAPIServer):
    def transform(self, data, path, etl_args):
        names = ("fastapi", "starlette", "uvicorn", "flask", "werkzeug", "asyncio")
        return " ".join(name for name in names if name in sys.modules)

class Imports(FlaskServer):
    def transform(self, data, path, etl_args):
        import fastapi
        raise fastapi.HTTPException(418, "short and stout")

class ImportsFirst(FlaskServer):
    def __init__(self):
        super().__init__()
        import flask
    def transform(self, data, path, etl_args):
        return data

class UsesApp(FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app.add_api_route("/version", lambda: "1.0")
    def transform(self, data, path, etl_args):
        return data.upper()

class UsesFlask(FlaskServer):
    def __init__(self):
        super().__init__()
        self.app.add_url_rule("/version", view_func=lambda: '"1.0"')
    def transform(self, data, path, etl_args):
        return data.upper()

class StartsUp(FlaskServer):
    def _register_routes(self):
        pass
    def transform(self, data, path, etl_args):
        return data
'''


def test_a_class_that_asks_for_no_framework_gets_none(start_runtime: StartRuntime, sdk_python: str) -> None:
    runtime = start_runtime(make_payload(LOADED, "Loaded"), {"NUM_WORKERS": "1"}, python=sdk_python)
    assert runtime.request("PUT", "/bucket/object", b"").body == b""
    runtime.wait_for_line(r"serving Loaded \(FastAPIServer\) on")


def test_a_class_that_merely_imports_a_framework_is_served_natively(start_runtime: StartRuntime, sdk_python: str) -> None:
    runtime = start_runtime(make_payload(LOADED, "Imports"), {"NUM_WORKERS": "1"}, python=sdk_python, expect_traceback=True)
    assert runtime.request("PUT", "/bucket/object", b"").status == 418
    runtime.wait_for_line(r"serving Imports \(FlaskServer\) on")


@pytest.mark.parametrize("name, server", [("Plain", "fastapi"), ("PlainFlask", "flask")])
def test_a_user_may_insist_on_a_framework(start_variant: StartRuntime, name: str, server: str) -> None:
    runtime = start_variant(name, {"ETL_SERVER": server})
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    runtime.wait_for_line(r"serving %s \(%s\) on" % (name, BY[server]))


@pytest.mark.parametrize("name, server, words", [
    ("Threaded", "fastapi", ["ETL_SERVER=fastapi", "Threaded", "HTTPMultiThreadedServer"]),
    ("Plain", "flask", ["ETL_SERVER=flask", "Plain", "FastAPIServer"]),
    ("Prepares", "native", ["Prepares overrides _setup_app", "ETL_SERVER=native"]),
    ("RegistersRoutes", "native", ["RegistersRoutes overrides _register_routes", "ETL_SERVER=native"]),
    ("Fast", "native", ["Fast overrides startup_event, shutdown_event", "ETL_SERVER=native"]),
    ("OwnApp", "native", ["OwnApp uses self.app", "ETL_SERVER=native"]),
])
def test_a_server_that_cannot_serve_the_class_is_refused(sdk_python: str, name: str, server: str, words: List[str]) -> None:
    done = start_in_vain(VARIANTS, name, sdk_python, {"ETL_SERVER": server})
    assert done.code == Exit.SOFTWARE
    for word in words:
        assert word in done.last_line
    assert "Traceback" not in "\n".join(done.lines)


def test_an_application_that_is_first_used_by_transform_is_refused_there(start_variant: StartRuntime) -> None:
    runtime = start_variant("UsesAppLate", expect_traceback=True)
    response = runtime.request("PUT", "/bucket/object", b"")
    assert response.status == 500 and b"ETL_SERVER=fastapi" in response.body
    assert b"FastAPI object" in start_variant("UsesAppLate", {"ETL_SERVER": "fastapi"}).request("PUT", "/b/o", b"").body


@pytest.mark.parametrize("name, what", [("StartsInVain", "StartsInVain's start-up"), ("ConstructsInVain", "ConstructsInVain()")])
def test_a_class_that_fails_to_start_ends_the_pod_with_its_reason(sdk_python: str, name: str, what: str) -> None:
    done = start_in_vain(VARIANTS, name, sdk_python)
    assert done.code == Exit.SOFTWARE
    assert done.last_line == "ais_runtime_min: %s failed: ValueError: no model here" % what


# == Packages ==


@pytest.mark.parametrize("name, packages", [
    ("UsesApp", "fastapi>=0.110 and uvicorn[standard]>=0.29"), ("StartsUp", "flask>=3.0 and gunicorn>=22.0"),
    ("Imports", "fastapi>=0.110"), ("ImportsFirst", "flask>=3.0"),
])
def test_without_an_index_the_packages_are_named_and_how_to_bake_them_in(name: str, packages: str) -> None:
    done = start_in_vain(LOADED, name)
    assert done.code == Exit.UNAVAILABLE
    assert "the class needs %s, which this image does not have" % packages in done.last_line
    assert "--build-arg EXTRAS=%s" % packages.partition(">")[0] in done.last_line
    assert "Traceback" not in "\n".join(done.lines)


def test_the_packages_that_are_installed_are_the_extras_of_the_project() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for name, framework in FRAMEWORKS.items():
        extras = config["options.extras_require"][name].split()
        assert sorted(set(framework.modules.values())) == sorted(extras)


@pytest.fixture
def index(tmp_path: Path) -> Environ:
    """The variables that let pip reach its index; skip where it cannot."""
    variables: Dict[str, Optional[str]] = {
        name: value for name, value in os.environ.items()
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name.startswith("SSL_") or name == "HOME"}
    variables["PIP_NO_INDEX"] = None
    command = [interpreter("slim"), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path / "index"), "flask"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=170)
    if done.returncode:
        pytest.skip("pip reaches no index")
    return variables


@pytest.fixture
def own_python(tmp_path: Path) -> str:
    """An interpreter of this test's own, that has pip and cloudpickle."""
    folder = tmp_path / "environment"
    subprocess.run([interpreter("slim"), "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = str(folder / "bin" / "python")
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own, lent = (subprocess.check_output([each, "-c", ask], universal_newlines=True) for each in (python, interpreter("slim")))
    Path(own.strip(), "lent.pth").write_text(lent)
    return python


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name, route, base", [
    ("UsesApp", "/version", "FastAPIServer, by uvicorn"), ("UsesFlask", "/version", "FlaskServer, by gunicorn"),
    ("Imports", "", "FlaskServer")])
def test_what_a_class_needs_is_installed_and_then_it_is_served(
    target: StandInTarget, index: Environ, own_python: str, name: str, route: str, base: str
) -> None:
    payload = make_payload(LOADED, name)
    env = {**index, "ETL_CLASS_PAYLOAD": payload, "AIS_TARGET_URL": target.url, "NUM_WORKERS": "2"}
    with Runtime(env=env, python=own_python, expect_traceback=True, start_seconds=300) as runtime:
        runtime.wait_for_line(r"installing Python packages: (fastapi|flask)")
        runtime.wait_for_line(r"serving %s \(%s\) on \S+ with 2 workers" % (name, base))
        if route:
            assert body_of(runtime, route) == "1.0"
            assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO"
        if name == "UsesApp":
            with open_websocket(runtime) as client:
                client.send(b'{"path": "o"}')
                client.send(b"hello")
                assert client.recv() == b"HELLO"
        if name == "Imports":
            assert runtime.request("PUT", "/bucket/object", b"hello").status == 418
        assert runtime.terminate() == Exit.OK


@pytest.mark.slow
@pytest.mark.timeout(400)
@both
def test_all_of_an_application_works_where_its_packages_were_just_installed(
    target: StandInTarget, index: Environ, own_python: str, kind: str
) -> None:
    env = {**index, "ETL_CLASS_PAYLOAD": make_payload(*CLASSES[kind]), "AIS_TARGET_URL": target.url, "NUM_WORKERS": "1"}
    with Runtime(env=env, python=own_python, expect_traceback=True, start_seconds=300) as runtime:
        runtime.wait_for_line("installing Python packages: %s" % kind)
        runtime.wait_for_line(r"serving \w+ \(%s\)" % BY[kind])
        for test in (test_objects_and_health_probes_are_answered_as_for_any_class, test_routes_and_routers_come_before_objects,
                     test_middleware_and_hooks_see_objects_too, test_dependencies_hooks_and_exception_handlers_work,
                     test_an_http_exception_of_transform_gives_its_status):
            test(lambda *_, **__: runtime, kind)
        if kind == "fastapi":
            test_a_transform_may_run_a_loop_of_its_own(lambda *_: runtime)
            test_a_class_s_own_websocket_routes_work(lambda *_: runtime)
        assert runtime.terminate() == Exit.OK
