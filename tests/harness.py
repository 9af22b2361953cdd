"""Real processes for the tests: the runtime, the SDK's own servers, and payloads pickled by the real SDK.

`Server` is a child process that speaks HTTP, with ways to talk to it byte for byte; `Runtime` and `SDKServer` are its kinds.
The interpreters come from `tests/run.py`, by environment variables; a test that lacks one is skipped.
"""
import atexit
import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Pattern, Sequence, Tuple, Type, TypeVar, Union

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ROOT / "ais_runtime_min.py"
QUICK = ROOT / "tests" / "quick.py"
QUICK_NUMBERS = {  # a tenth of the runtime's own or so, for what a test would wait for
    "DRAIN_SECONDS": 1.0,
    "FORSAKEN_SECONDS": 1.0,
    "RESPAWN_DELAY_LIMIT_SECONDS": 0.5,
    "RETRY_DELAY_LIMIT_SECONDS": 0.1,
    "SWEEP_SECONDS": 0.5,
    "TOOL_PROGRESS_SECONDS": 0.5,
    "WEBSOCKET_DRAIN_SECONDS": 1.5,
}
START_SECONDS = 30.0
SERVING = re.compile(r"serving .* on https?://\S*:(\d+)")
UNUSED_TARGET = "http://127.0.0.1:9/v1/etl/_object/test-etl/s3cr3t"

Body = Union[bytes, Iterable[bytes]]
Environ = Mapping[str, Optional[str]]  # None leaves a variable out
Numbers = Optional[Mapping[str, float]]  # constants of the runtime, see tests/quick.py; None runs its file itself
AnyServer = TypeVar("AnyServer", bound="Server")


class Response(NamedTuple):
    """An answer that came whole; the names of its headers are in lower case, repeated ones joined by ", "."""

    status: int
    headers: Dict[str, str]
    body: bytes


class Finished(NamedTuple):
    """A run that has ended; `last_line` is the one an operator sees."""

    code: int
    lines: List[str]
    last_line: str


# == Interpreters and payloads ==


def interpreter(group: str) -> str:
    """Return the interpreter of an environment of tests/run.py ("sdk", "slim", "sdkcore"), or skip the test."""
    variable = "TEST_%s_PYTHON" % group.upper()
    python = os.environ.get(variable, "")
    if not os.access(python, os.X_OK):
        pytest.skip("%s names no interpreter (%r): run the tests by tests/run.py" % (variable, python))
    return python


@functools.lru_cache(maxsize=None)
def make_payload(source: str, name: str, python: Optional[str] = None) -> str:
    """Return what the real SDK's `serialize_class` makes of class `name`, defined by `source` in a script of a user.

    `python` is another interpreter that has the SDK, for payloads of another Python version. Payloads are kept beside the
    environment of the interpreter, and made anew when that changes.
    """
    python = python or interpreter("sdk")
    environment = Path(python).parents[1]
    made_from = (environment / "made-from").read_text()
    how = (ROOT / "tests" / "pickler.py").read_text()
    key = hashlib.sha256("\0".join([made_from, how, name, source]).encode()).hexdigest()
    kept = environment.parent / "payloads" / key
    if not kept.exists():
        payload = _pickler(python).pickle(source, name)
        kept.parent.mkdir(exist_ok=True)
        new = kept.with_name("%s.%d" % (key, os.getpid()))
        new.write_text(payload)
        new.replace(kept)
    return kept.read_text()


class _Pickler:
    """A process that has the SDK loaded, and pickles one class after the other."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(ROOT / "tests" / "pickler.py")], env=exact_environment(python, {}), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, encoding="utf-8")
        atexit.register(self._process.kill)

    def pickle(self, source: str, name: str) -> str:
        """Return the payload of a class."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"source": source, "name": name}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "what pickles has ended: %s" % self._process.poll()
        done = json.loads(line)
        assert done["code"] == 0, "cannot pickle %s:\n%s" % (name, done["output"])
        return str(done["output"].splitlines()[-1])


@functools.lru_cache(maxsize=None)
def _pickler(python: str) -> _Pickler:
    return _Pickler(python)


def exact_environment(python: str, given: Environ) -> Dict[str, str]:
    """Return what the image and AIStore set, and the given variables: nothing of the developer's but PATH leaks in.

    pip has no index, unless a test gives `PIP_NO_INDEX=None`: the environments are shared, and nothing may be installed there.
    """
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    defaults: Environ = {"PATH": path, "PYTHONUNBUFFERED": "1", "PORT": "0", "AIS_TARGET_URL": UNUSED_TARGET, "PIP_NO_INDEX": "1"}
    return {name: value for name, value in {**defaults, **given}.items() if value is not None}


def started(
    python: str, args: Sequence[str], env: Environ, numbers: Numbers = QUICK_NUMBERS
) -> Tuple[List[str], Dict[str, str]]:
    """Return the command and the variables that start the runtime: the first two arguments of a `Server`."""
    variables = exact_environment(python, env)
    if numbers is None:
        return [python, str(RUNTIME), *args], variables
    return [python, str(QUICK), *args], {**variables, "TEST_NUMBERS": json.dumps(dict(numbers))}


def run_to_end(
    args: Sequence[str] = (), env: Optional[Environ] = None, timeout: float = 30.0, python: Optional[str] = None,
    numbers: Numbers = QUICK_NUMBERS,
) -> Finished:
    """Run the runtime where it is to stop by itself, as start-up errors make it."""
    command, variables = started(python or interpreter("slim"), args, env or {}, numbers)
    done = subprocess.run(
        command, env=variables, timeout=timeout,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )
    lines = done.stdout.splitlines()
    return Finished(done.returncode, lines, lines[-1] if lines else "")


# == Servers ==


class Server:
    """A child process that serves HTTP on 127.0.0.1, in a session of its own; a context manager that kills all of it.

    At the end the log must not hold a traceback, unless `expect_traceback` is set, by argument or later.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], expect_traceback: bool = False) -> None:
        self.expect_traceback = expect_traceback
        self.port = 0
        self.lines: List[str] = []
        self._read = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="replace", start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, name="log of %d" % self.pid, daemon=True)
        self._reader.start()

    def __enter__(self: AnyServer) -> AnyServer:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        self.kill()
        print(self.log())  # pytest shows it where the test fails
        if error is None and not self.expect_traceback:
            assert "Traceback" not in self.log(), "the server logged a traceback:\n%s" % self.log()

    @property
    def pid(self) -> int:
        """The process id; its process group has the same."""
        return self.process.pid

    @property
    def url(self) -> str:
        """The URL of the server, without a path."""
        return "http://127.0.0.1:%d" % self.port

    # -- its log --

    def log(self) -> str:
        """Return what came so far on stdout and stderr."""
        return "\n".join(list(self.lines))

    def wait_for_line(self, pattern: Union[str, Pattern[str]], timeout: float = START_SECONDS) -> "re.Match[str]":
        """Return the first match of a line, of those that came already too; fail where the process ends without it."""
        with self._read:
            self._read.wait_for(lambda: self._ended or self._find_line(pattern), timeout)
            found = self._find_line(pattern)
            state = "ended" if self._ended else "pauses"
        assert found, "no line matches %r, and the log %s:\n%s" % (pattern, state, self.log())
        return found

    def _find_line(self, pattern: Union[str, Pattern[str]]) -> "Optional[re.Match[str]]":
        matches = (re.search(pattern, line) for line in self.lines)
        return next((match for match in matches if match), None)

    def _read_log(self) -> None:
        assert self.process.stdout
        with self.process.stdout as stream:
            for line in stream:
                with self._read:
                    self.lines.append(line.rstrip("\n"))
                    self._read.notify_all()
        with self._read:
            self._ended = True
            self._read.notify_all()

    # -- its end --

    def terminate(self, timeout: float = START_SECONDS) -> int:
        """Send SIGTERM to the first process and return its exit code."""
        self.process.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float = START_SECONDS) -> int:
        """Return the exit code, and leave the log whole."""
        code = self.process.wait(timeout)
        self._reader.join(1)  # a child that lives on keeps the log open
        return code

    def kill(self) -> None:
        """Kill whatever is left of the process group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all ended before
        self.process.wait()
        self._reader.join(5)

    # -- talking to it --

    def connect(self, timeout: float = 30.0) -> socket.socket:
        """Open a connection for a test that wants the socket itself."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each piece leaves at once, as a packet
        return connection

    def request(
        self, method: str, target: Union[str, bytes], body: Optional[Body] = None,
        headers: Optional[Mapping[str, str]] = None, timeout: float = 30.0,
    ) -> Response:
        """Send one request on a new connection; the target goes out byte for byte, a body that is not bytes in chunks.

        `http.client.IncompleteRead` tells of an answer that was cut, `RemoteDisconnected` of none.
        """
        with self.connect(timeout) as connection:
            try:
                for piece in _request_pieces(method, target, body, dict(headers or {})):
                    connection.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                pass  # an early answer may be there all the same
            response = http.client.HTTPResponse(connection, method=method)
            with response:
                response.begin()
                names = dict.fromkeys(name.lower() for name in response.headers)
                fields = {name: ", ".join(response.headers.get_all(name, [])) for name in names}
                return Response(response.status, fields, response.read())

    def raw(self, data: Body, pause: float = 0.0, first: float = 10.0, quiet: float = 0.5) -> bytes:
        """Send bytes as they are, in the given pieces, and return all that comes back until the peer closes.

        It stops waiting after `first` seconds without any byte, or `quiet` seconds without another one.
        """
        with self.connect() as connection:
            try:
                for piece in [data] if isinstance(data, bytes) else data:
                    connection.sendall(piece)
                    time.sleep(pause)
            except (BrokenPipeError, ConnectionResetError):
                pass  # what it said before is the answer
            return _read_until_quiet(connection, first, quiet)


def _request_pieces(method: str, target: Union[str, bytes], body: Optional[Body], headers: Dict[str, str]) -> Iterator[bytes]:
    """Make a request as it goes out; headers that are given take the place of those of the same name."""
    fields = {"Host": "127.0.0.1"}
    if isinstance(body, bytes):
        fields["Content-Length"] = str(len(body))
    elif body is not None:
        fields["Transfer-Encoding"] = "chunked"
    given = {name.lower() for name in headers}
    fields = {**{name: value for name, value in fields.items() if name.lower() not in given}, **headers}
    raw_target = target if isinstance(target, bytes) else target.encode("latin-1")
    lines = "".join("%s: %s\r\n" % field for field in fields.items()).encode("latin-1")
    yield b"%s %s HTTP/1.1\r\n%s\r\n" % (method.encode(), raw_target, lines)
    yield from [body] if isinstance(body, bytes) else _chunks(body)


def _chunks(pieces: Optional[Iterable[bytes]]) -> Iterator[bytes]:
    if pieces is not None:
        yield from (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece)
        yield b"0\r\n\r\n"


def _read_until_quiet(connection: socket.socket, first: float, quiet: float) -> bytes:
    received = bytearray()
    connection.settimeout(first)
    try:
        for piece in iter(lambda: connection.recv(1 << 16), b""):
            received += piece
            connection.settimeout(quiet)
    except (socket.timeout, ConnectionResetError):
        pass
    return bytes(received)


class Runtime(Server):
    """The runtime under test, ready to serve.

    Its time limits are those of `QUICK_NUMBERS`, or of `numbers`; None starts its own file, as it is, as an image does.
    """

    def __init__(
        self, args: Sequence[str] = (), env: Optional[Environ] = None,
        python: Optional[str] = None, expect_traceback: bool = False, numbers: Numbers = QUICK_NUMBERS,
        start_seconds: float = START_SECONDS,
    ) -> None:
        super().__init__(*started(python or interpreter("slim"), args, env or {}, numbers), expect_traceback)
        try:
            self.port = int(self.wait_for_line(SERVING, start_seconds)[1])
        except BaseException:
            self.kill()
            raise


SDK_TAILS = {  # what follows the user's source, so that its class is served in the SDK's own way
    "threaded": "\n\nserver = {name}()\nserver.port = {port}\nserver.start()\n",
    "fastapi": "\n\nserver = {name}()\napp = server.app\n",
    "flask": "\n\nserver = {name}()\napp = server.app\n",
}
SDK_COMMANDS = {
    "threaded": "served.py",
    "fastapi": "-m uvicorn served:app --host 127.0.0.1 --port {port} --workers {workers}",
    "flask": "-m gunicorn served:app --bind 127.0.0.1:{port} --workers {workers}",
}


class SDKServer(Server):
    """The SDK's own server for a class, for comparison, or as a neighbour in a pipeline.

    `kind` is "threaded" (HTTPMultiThreadedServer), "fastapi" (by uvicorn) or "flask" (by gunicorn).
    """

    def __init__(self, source: str, name: str, kind: str, workers: int = 1, env: Optional[Environ] = None) -> None:
        python = interpreter("sdk")
        port = _free_port()
        self._folder = tempfile.TemporaryDirectory()
        script = Path(self._folder.name, "served.py")
        script.write_text(source + SDK_TAILS[kind].format(name=name, port=port))
        words = SDK_COMMANDS[kind].format(port=port, workers=workers).split(" ")
        options = [str(script) if word == "served.py" else word for word in words]
        environment = exact_environment(python, {"PYTHONPATH": self._folder.name, **(env or {})})
        super().__init__([python, *options], environment)
        self.port = port
        try:
            self._wait_until_healthy()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Kill whatever is left of the process group and remove its files."""
        super().kill()
        self._folder.cleanup()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.request("GET", "/health", timeout=5).status == 200:
                    return
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
        raise AssertionError("the SDK's server does not start:\n%s" % self.log())


def children_of(pid: int) -> List[int]:
    """List the processes whose parent this one is."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(file.parent.name))
    return sorted(found)


def _free_port() -> int:
    """Return a port that nobody has now; the SDK's servers cannot tell which one they got."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
