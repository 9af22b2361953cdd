"""Classes for test_frameworks.py and test_frameworks_life.py, most with their own application.

They are pickled by the real SDK, each with only what it uses of this source: a class that imports
no framework does not need one.
"""
import contextlib
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from websockets.sync.client import ClientConnection, connect

from harness import Environ, Response, Runtime, Server, interpreter, make_payload

SOON_SECONDS = 20.0
CLASSES = {"fastapi": "Fast", "flask": "Flasky",
           "fastapi stream": "FastStream", "flask stream": "FlaskStream",
           "fastapi plain": "Prepares", "flask plain": "RegistersRoutes",
           "fastapi changes": "Changes"}
SOURCE = '''
import asyncio, contextlib, os, signal, sqlite3, sys, threading, time
import fastapi, fastapi.responses, flask, starlette.background, werkzeug.exceptions
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Refused(Exception):
    pass

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
            while not os.path.exists(etl_args):
                time.sleep(0.01)
        return data.upper() + b" " + path.encode()

class Pieces:
    """The same as a stream; `bucket/open` tells how many streams are open."""
    open_streams = 0
    def transform_stream(self, reader, path, etl_args):
        self.open_streams += 1
        try:
            if path == "bucket/open":
                yield b"%d" % self.open_streams
            for piece in iter(lambda: reader.read(65536), b""):
                yield piece.upper()
                if etl_args == "fail":
                    raise ValueError("no more of it")
        finally:
            self.open_streams -= 1

# -- FastAPI --

router = fastapi.APIRouter(prefix="/routed")

@router.get("/hello/{name}")
async def hello(name: str):
    return {"hello": name}

def dependency(request: fastapi.Request):
    if request.headers.get("x-key") != "sesame":
        raise fastapi.HTTPException(403, "no key")

class Fast(Work, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.database = sqlite3.connect(":memory:")  # of this thread alone
        self.events = []
        self.app.include_router(router)
        self.app.add_api_route("/version", self.version)
        self.app.add_api_route("/guarded", lambda: 1, dependencies=[fastapi.Depends(dependency)])
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
        self.events.append("started on " + threading.current_thread().name)
    async def shutdown_event(self):
        print("shut down on " + threading.current_thread().name, flush=True)
    async def _handle_request(self, path, request, is_get):
        if path != "bucket/wrapped":
            return await super()._handle_request(path, request, is_get)
        body = await request.body()
        response = await super()._handle_request(path, request, is_get)
        response.headers["x-wrapped"] = "%s %s %d" % (path, is_get, len(body))
        return response
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

@contextlib.asynccontextmanager
async def lifespan(app):
    print("lifespan begins", flush=True)
    yield {"made": "in the lifespan"}
    print("lifespan ends", flush=True)

async def made(request: fastapi.Request):
    return request.state.made

class Copying:
    """Middleware of the kind that gives the application a scope of its own."""
    def __init__(self, app):
        self.app = app
    async def __call__(self, scope, receive, send):
        await self.app(dict(scope), receive, send)

class Changes(Work, FastAPIServer):
    """Middleware and a hook that read bodies and change paths; streams that fail or leave work behind."""
    def __init__(self):
        super().__init__()
        for _ in range(4):  # each passes on what fails some turns of the loop later
            self.app.middleware("http")(self.look)
        self.app.add_middleware(Copying)
        self.app.add_api_route("/bad", self.bad)
        self.app.add_api_route("/late", self.late)
        self.app.add_api_route("/worse", self.worse)
        self.app.add_api_route("/large", self.large)
    async def look(self, request, call_next):
        how = request.headers.get("x-look")
        if how == "kept":
            await request.body()
        elif how == "lost":
            async for piece in request.stream():
                pass
        elif how == "first":
            async for piece in request.stream():
                break
        response = await call_next(request)
        if how == "spoils":
            response.body_iterator = self.spoiled(response.body_iterator)
        return response
    async def spoiled(self, pieces):
        async for piece in pieces:
            yield piece
            raise RuntimeError("no more of it")
    async def bad(self):
        async def pieces():
            yield "abc"
            raise RuntimeError("no more of it")
        return fastapi.responses.StreamingResponse(pieces())
    async def worse(self):
        raise RuntimeError("no more of it")
    async def large(self):
        async def pieces():
            for _ in range(48):
                yield bytes(1 << 16)
        return fastapi.responses.StreamingResponse(
            pieces(), background=starlette.background.BackgroundTask(asyncio.sleep, 0.4))
    async def late(self, gate: str):
        async def wait():
            while not os.path.exists(gate):
                await asyncio.sleep(0.01)
        async def pieces():
            yield "abc"
        return fastapi.responses.StreamingResponse(pieces(), background=starlette.background.BackgroundTask(wait))
    async def _handle_request(self, path, request, is_get):
        return await super()._handle_request(path.replace("alias/", "bucket/"), request, is_get)
    async def shutdown_event(self):
        print("shut down", flush=True)

class OwnApp(Work, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app = fastapi.FastAPI(lifespan=lifespan)
        self.app.add_api_route("/made", made)

class Prepares(Work, FastAPIServer):
    def _setup_app(self):
        super()._setup_app()
        self.app.add_api_route("/made", lambda: "in the hook")
        self.app.add_api_route("/threads", lambda: [each.name for each in threading.enumerate()])

class UsesAppLate(FastAPIServer):
    def transform(self, data, path, etl_args):
        return repr(self.app)

class UsesApp(FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app.add_api_route("/made", lambda: "for its start")
    def transform(self, data, path, etl_args):
        return data.upper()

class StartsFast(Work, UsesApp):
    def start(self):
        import uvicorn
        uvicorn.run(self.app, host="127.0.0.1", port=self.port)

class StartsInVain(Work, FastAPIServer):
    async def startup_event(self):
        raise ValueError("no model here")

class EndsInVain(Work, FastAPIServer):
    async def shutdown_event(self):
        raise ValueError("no way out")

class LivesInVain(Work, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app = fastapi.FastAPI(lifespan=self.lives)
    @contextlib.asynccontextmanager
    async def lives(self, app):
        raise ValueError("no model here")
        yield

class StartsSlowly(Work, FastAPIServer):
    async def startup_event(self):
        open(os.environ["GATE"] + ".begun", "w").close()
        await asyncio.sleep(60)

class Alarmed(Work, FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app.add_api_route("/pid", lambda: os.getpid())
        signal.signal(signal.SIGALRM, lambda *_: None)
    def transform(self, data, path, etl_args):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.1)
        return super().transform(data, path, etl_args)

class Threaded(Work, HTTPMultiThreadedServer):
    pass

# -- Flask --

blueprint = flask.Blueprint("mine", "mine", url_prefix="/routed")

@blueprint.route("/hello/<name>")
def hello_of_flask(name):
    return {"hello": name}

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
    def _handle_request(self, path):
        if path != "bucket/wrapped":
            return super()._handle_request(path)
        is_get, body = flask.request.method == "GET", flask.request.get_data()
        response = super()._handle_request(path)
        response.headers["x-wrapped"] = "%s %s %d" % (path, is_get, len(body))
        return response
    def transform(self, data, path, etl_args):
        self.database.execute("select 1")
        return super().transform(data, path, etl_args)

class FlaskStream(Pieces, FlaskServer):
    def __init__(self):
        super().__init__()
        self.app.add_url_rule("/version", view_func=lambda: "1.0", endpoint="version")

class RegistersRoutes(Work, FlaskServer):
    def _register_routes(self):
        super()._register_routes()
        self.app.add_url_rule("/made", view_func=lambda: '"in the hook"')
    def _health(self):
        return flask.Response("as well as can be")

class UsesFlask(FlaskServer):
    def __init__(self):
        super().__init__()
        self.app.add_url_rule("/made", view_func=lambda: '"for its start"')
    def transform(self, data, path, etl_args):
        return data.upper()

class StartsFlask(Work, UsesFlask):
    def start(self):
        self.host = "127.0.0.1"
        super().start()

class ConstructsInVain(UsesFlask):
    def __init__(self):
        super().__init__()
        raise ValueError("no model here")

# -- Classes that leave something behind where they are loaded --

class WhenLoaded:
    def __init__(self, code):
        self.code = code
    def __reduce__(self):
        return exec, (self.code,)

left = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), name="left", daemon=True).start()
"""
class FreshFast(Prepares):
    LEFT = WhenLoaded(left)

class FreshFlask(RegistersRoutes):
    LEFT = WhenLoaded(left)

# -- Classes that are loaded without a framework --

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

class StartsUp(FlaskServer):
    def _register_routes(self):
        pass
    def transform(self, data, path, etl_args):
        return data
'''


def payload_of(name: str) -> str:
    """Return the payload of a class of this source."""
    return make_payload(SOURCE, name)


def start(
    start_runtime: Callable[..., Runtime], name: str, env: Optional[Environ] = None,
    expect_traceback: bool = False
) -> Runtime:
    """Start a class where the frameworks are installed, by the fixture of that name."""
    env = {"NUM_WORKERS": "1", **(env or {})}
    return start_runtime(
        payload_of(name), env, python=interpreter("sdk"), expect_traceback=expect_traceback)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + SOON_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within %.0f s: %s" % (SOON_SECONDS, what)
        time.sleep(0.01)


def body_of(server: Server, target: str) -> Any:
    """GET a route of the application, which answers JSON."""
    return json.loads(server.request("GET", target).body)


def open_websocket(server: Server, path: str = "/ws") -> ClientConnection:
    """Open a WebSocket connection."""
    return connect("ws://127.0.0.1:%d%s" % (server.port, path), compression=None)


@contextlib.contextmanager
def object_in_work(server: Server, gate: Path) -> "Iterator[Future[Response]]":
    """Have an object transformed until the gate is there, as it is at the end; yield its answer."""
    with ThreadPoolExecutor() as clients:
        where = "/bucket/object?etl_args=%s" % gate
        answer = clients.submit(server.request, "PUT", where, b"hello")
        try:
            wait_until(Path(str(gate) + ".begun").exists, "an object is transformed")
            yield answer
        finally:
            gate.touch()
