"""The processes of a pod: how they start, share the work, die, are replaced, and stop.

Classes run in real workers; what a process has and who its children are is read from /proc, on Linux alone.
"""
import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import pytest

from harness import (QUICK_NUMBERS, SERVING, Environ, Numbers, Response, Runtime, Server,
                     children_of, interpreter, make_payload, run_to_end, started)

StartRuntime = Callable[..., Runtime]
AT_ONCE_SECONDS = 1.0  # what waits for nothing ends within, where no other test runs
SOON_SECONDS = 10.0  # and where others do: less than any limit of the runtime
DEATHS = 10  # in a row, without an answer, that end a pod
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

HEAD = '''
import os, signal, sys, threading, time
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
'''
OBEDIENT = HEAD + '''
class Loader:
    """Knows which process has loaded the class that it is an attribute of."""

    def __init__(self):
        self.pid = os.getpid()

    def __reduce__(self):
        return type(self), ()

class Obedient(HTTPMultiThreadedServer):
    """Does what the arguments tell."""

    def transform(self, data, path, etl_args):
        word, _, number = etl_args.partition(" ")
        return getattr(self, word)(number) if word else data

    loader = Loader()

    def wait(self, file):
        print("waiting", flush=True)
        while not os.path.exists(file):
            time.sleep(0.01)
        return b"waited"

    def pid(self, seconds):
        time.sleep(float(seconds or 0))
        return b"%d" % os.getpid()

    def take_signal(self, seconds):
        """Have this thread take a signal to the process, after a while."""
        time.sleep(float(seconds))
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return b"taken"

    def loaded(self, seconds):
        time.sleep(float(seconds))
        return "%d %d" % (os.getpid(), self.loader.pid)

    def fork(self, _):
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(10)
        return "%s %d" % (child.exitcode, os.getpid())

    def die(self, survivor):
        """Be an object that kills every worker but one, which says that it is the one."""
        if os.getpid() != int(survivor):
            os.kill(os.getpid(), 9)
        return b"survived"

    def limit(self, _):
        import resource
        return "%d %d" % resource.getrlimit(resource.RLIMIT_NOFILE)

    def say(self, number):
        print("said", number)
        print("complained of", number, file=sys.stderr)
        return b""

    def orphan(self, seconds):
        """Start a process whose parent ends at once, and return its id."""
        readable, writable = os.pipe()
        child = os.fork()
        if not child:
            if not os.fork():
                os.write(writable, b"%d" % os.getpid())
                time.sleep(float(seconds))
            os._exit(0)
        os.waitpid(child, 0)
        return os.read(readable, 20)

    def state(self, pid):
        try:
            with open("/proc/%s/stat" % pid) as file:
                return "%s of %s" % tuple(file.read().rpartition(")")[2].split()[:2])
        except FileNotFoundError:
            return "gone"
'''
ON_MAIN_THREAD = OBEDIENT + '''
class OnMainThread(FastAPIServer):
    def transform(self, data, path, etl_args):
        assert threading.current_thread() is threading.main_thread()
        return Obedient.wait(self, etl_args.partition(" ")[2])
'''
SLOW_TO_START = HEAD + '''
class SlowToStart(HTTPMultiThreadedServer):
    def __init__(self):
        super().__init__()
        print("constructing", flush=True)
        while not os.path.exists(os.environ["GATE"]):
            time.sleep(0.01)

    def transform(self, data, path, etl_args):
        return data
'''
FRAIL = OBEDIENT + '''
class Frail(Obedient):
    """Dies after some seconds; once there is such a file, at once."""

    def __init__(self):
        super().__init__()
        if os.path.exists(os.environ.get("DOOM", "")):
            os._exit(3)
        if "LIFE_SECONDS" in os.environ:
            threading.Timer(float(os.environ["LIFE_SECONDS"]), os._exit, (3,)).start()
'''
BUSY = HEAD + '''
class Busy(HTTPMultiThreadedServer):
    """Has a thread that is no daemon and never ends."""

    def __init__(self):
        super().__init__()
        self.beats = 0
        threading.Thread(target=self.beat).start()

    def beat(self):
        while True:
            self.beats += 1
            time.sleep(0.01)

    def transform(self, data, path, etl_args):
        return b"%d" % self.beats
'''
PULSING = OBEDIENT + '''
class Pulse(Loader):
    """Counts in a thread that runs wherever this was made or unpickled, and that a fork would stop."""

    def __init__(self):
        super().__init__()
        self.beats = 0
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self):
        while True:
            self.beats += 1
            time.sleep(0.01)

class Pulsing(Obedient):
    loader = Pulse()

    def __init__(self):
        super().__init__()
        if "REASON" in os.environ:
            raise ValueError(os.environ["REASON"])

    def pulse(self, seconds):
        before = self.loader.beats
        time.sleep(float(seconds))
        return b"beats" if self.loader.beats > before else b"stands still"
'''
CHANGING = PULSING + '''
import pathlib
sys.path.insert(0, pathlib.Path("lib"))
os.chdir("/")
os.environ["LOG_LEVEL"] = "trace"
'''
PREPARED = HEAD + '''
class Prepared(HTTPMultiThreadedServer):
    def start(self):
        self.prefix = b"prepared "
        super().start()

    def transform(self, data, path, etl_args):
        return self.prefix + data
'''
SELF_MADE = HEAD + '''
class SelfMade(HTTPMultiThreadedServer):
    def start(self):
        import http.server

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", "9")
                self.end_headers()
                self.wfile.write(b"self-made")

        http.server.HTTPServer(("127.0.0.1", self.port), Handler).serve_forever()

    def transform(self, data, path, etl_args):
        return data
'''


# == Helpers ==


def obey(server: Server, command: str) -> Response:
    """Have the class do something; the command is its arguments."""
    return server.request("PUT", "/bucket/object?etl_args=" + command.replace(" ", "%20"), b"hello")


def ask_many(server: Server, command: str, requests: int = 24) -> Set[bytes]:
    """Have the class do something many times at once; return its answers."""
    with ThreadPoolExecutor(requests) as clients:
        answers = clients.map(lambda _: obey(server, command), range(requests))
        return {answer.body for answer in answers}


def wait_for_loaders(server: Server, count: int) -> Dict[int, int]:
    """Ask until so many workers have answered; return which process has loaded each one's class."""
    found: Dict[int, int] = {}
    deadline = time.monotonic() + SOON_SECONDS
    while len(found) < count and time.monotonic() < deadline:
        for answer in ask_many(server, "loaded 0.05"):
            pid, loader = map(int, answer.split())
            found[pid] = loader
    assert len(found) == count
    return found


def wait_for_workers(server: Server, count: int) -> Set[int]:
    """Ask until so many workers have answered, and return their ids."""
    return set(wait_for_loaders(server, count))


def is_alive(pid: int) -> bool:
    """Tell whether a process runs. A zombie does not, but its other threads may, and these keep its sockets open."""
    with contextlib.suppress(OSError):
        return any(state_of(thread) != "Z" for thread in Path("/proc/%d/task" % pid).iterdir())
    return False


def state_of(thread: Path) -> str:
    """Return the state letter of a thread by its folder in /proc: a zombie's for one that has ended meanwhile."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def wait_until(condition: Callable[[], object], what: str, seconds: float = SOON_SECONDS) -> None:
    """Wait until something is true; fail if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within %.1f s: %s" % (seconds, what)
        time.sleep(0.02)


def is_refused(port: int) -> bool:
    """Tell whether a connection is refused: one that hangs, or gets no answer, is not."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except ConnectionRefusedError:
        return True
    return False


def start_unready(
    source: str, name: str, env: Optional[Dict[str, str]] = None, before: Sequence[str] = ()
) -> Server:
    """Start two workers on a port that nobody has, without waiting until they serve.

    `before` stands before the command.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    variables = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "PORT": str(port), "NUM_WORKERS": "2", **(env or {})}
    command, environ = started(interpreter("slim"), [], variables)
    server = Server([*before, *command], environ)
    server.port = port
    return server


@pytest.fixture(scope="module")
def pod() -> Iterator[Server]:
    """Three workers whose class does what it is told, for tests that leave it so."""
    before = ["/bin/sh", "-c", 'ulimit -S -n 256 && exec "$@"', "sh"]
    with start_unready(OBEDIENT, "Obedient", {"NUM_WORKERS": "3"}, before) as server:
        server.wait_for_line(SERVING)
        yield server


@pytest.fixture
def obedient(start_runtime: StartRuntime) -> Runtime:
    """Two workers whose class does what it is told, for tests that end them."""
    return start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "2"})


@contextlib.contextmanager
def in_flight(server: Server, gate: Path, requests: int = 1) -> Iterator["List[Future[Response]]"]:
    """Have requests under way until the end of the block, where such a file is made."""
    before = server.log().count("waiting")
    with ThreadPoolExecutor(requests) as clients, contextlib.ExitStack() as stack:
        stack.callback(gate.touch)
        answers = [clients.submit(obey, server, "wait %s" % gate) for _ in range(requests)]
        after = before + requests
        wait_until(lambda: server.log().count("waiting") == after, "the transforms have begun")
        yield answers


# == Stopping ==


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_connections_do_not_delay_the_end(obedient: Runtime, number: int) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(obedient.connect()) for _ in range(40)]
        for connection in idle[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        begun = time.monotonic()
        os.kill(obedient.pid, number)
        assert obedient.wait() == 0
        assert time.monotonic() - begun < AT_ONCE_SECONDS
    assert is_refused(obedient.port)


@ON_LINUX
@pytest.mark.parametrize("source, name, send", [
    (OBEDIENT, "Obedient", lambda pid: os.kill(pid, signal.SIGTERM)),
    (OBEDIENT, "Obedient", lambda pid: os.killpg(pid, signal.SIGINT)),  # as a terminal does
    (ON_MAIN_THREAD, "OnMainThread", lambda pid: os.kill(pid, signal.SIGTERM)),
    (PULSING, "Pulsing", lambda pid: os.kill(pid, signal.SIGTERM)),
], ids=["threads", "key press", "main thread", "not forked"])
def test_what_is_in_flight_is_answered_before_the_end(
    start_runtime: StartRuntime, tmp_path: Path, source: str, name: str, send: Callable[[int], None]
) -> None:
    server = start_runtime(make_payload(source, name), {"NUM_WORKERS": "2"})
    workers = children_of(server.pid)
    with in_flight(server, tmp_path / "gate") as answers:
        send(server.pid)
        wait_until(lambda: is_refused(server.port), "nobody listens any more")
        assert not answers[0].done()
    status, headers, body = answers[0].result()
    assert (status, body, headers.get("connection")) == (200, b"waited", "close")
    assert server.wait(SOON_SECONDS) == 0
    assert not any(map(is_alive, workers))


@ON_LINUX
def test_no_worker_of_many_misses_the_signal(start_runtime: StartRuntime, tmp_path: Path) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "8"})
    workers = wait_for_workers(server, 8)
    with in_flight(server, tmp_path / "gate", 16):
        server.process.terminate()
        wait_until(lambda: is_refused(server.port), "nobody listens any more")
    assert server.wait(SOON_SECONDS) == 0
    assert not any(map(is_alive, workers))


@ON_LINUX
def test_a_worker_hears_of_a_signal_that_another_than_its_main_thread_has_taken(
    obedient: Runtime
) -> None:
    # Any thread of a process may take a signal; where the main one then sleeps on, its handler is not called.
    workers = children_of(obedient.pid)
    with obedient.connect() as connection:  # which stays open: its end would wake the worker
        connection.sendall(b"PUT /b/o?etl_args=take_signal%201.5 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).endswith(b"taken")
        wait_until(lambda: not all(map(is_alive, workers)), "one of them has ended")


def test_a_request_that_a_worker_has_begun_to_read_is_answered(obedient: Runtime) -> None:
    request = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    with contextlib.ExitStack() as stack:
        connections = []
        for end in (b"HT", b"\r\n\r\n", b"hel"):
            begun = request[:request.index(end) + len(end)]
            connections.append((stack.enter_context(obedient.connect()), begun))
            connections[-1][0].sendall(begun)
        time.sleep(0.2)
        obedient.process.terminate()
        time.sleep(0.3)
        for connection, begun in connections:
            connection.sendall(request[len(begun):])
            answer = b"".join(iter(lambda: connection.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.1 200 "), "begun: %r" % begun
            assert answer.endswith(b"hello"), "begun: %r" % begun
    assert obedient.wait() == 0


def test_a_second_signal_ends_all_at_once(obedient: Runtime, tmp_path: Path) -> None:
    with in_flight(obedient, tmp_path / "gate") as answers:
        obedient.process.terminate()
        wait_until(lambda: is_refused(obedient.port), "nobody listens any more")
        assert obedient.process.poll() is None
        obedient.terminate(SOON_SECONDS)
        assert isinstance(answers[0].exception(SOON_SECONDS), (OSError, http.client.HTTPException))


@ON_LINUX
@pytest.mark.parametrize("limit", ["WORKER_GRACE_SECONDS", "GRACE_SECONDS"])
def test_what_outlives_the_grace_period_is_ended(
    start_runtime: StartRuntime, tmp_path: Path, limit: str
) -> None:
    payload, numbers = make_payload(OBEDIENT, "Obedient"), {**QUICK_NUMBERS, limit: 1.0}
    server = start_runtime(payload, {"NUM_WORKERS": "2"}, numbers=numbers)
    workers = children_of(server.pid)
    with in_flight(server, tmp_path / "gate"):
        assert server.terminate(SOON_SECONDS) == 0
        assert not any(map(is_alive, workers))
    assert ("is killed with what it has in flight" in server.log()) is (limit == "GRACE_SECONDS")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pod_that_is_starting_stops_at_once(number: int) -> None:
    with start_unready(SLOW_TO_START, "SlowToStart", {"GATE": "/nowhere"}) as server:
        server.wait_for_line("constructing", SOON_SECONDS)
        time.sleep(0.1)
        os.kill(server.pid, number)
        code = server.wait(SOON_SECONDS)
        assert code in ((0,) if number == signal.SIGTERM else (0, 128 + number))


def test_a_signal_is_never_lost_whenever_it_comes() -> None:
    for delay in (0.0, 0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25):
        with start_unready(OBEDIENT, "Obedient") as server:
            time.sleep(delay)
            code = server.terminate(SOON_SECONDS)
            # Before the first line of ours, the interpreter alone decides.
            assert code in (0, -signal.SIGTERM), "after %.2f s" % delay


# == Dying ==


@ON_LINUX
def test_workers_that_die_now_and_then_are_replaced_and_the_log_says_why(pod: Server) -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGSEGV):
        victim = int(obey(pod, "pid").body)
        os.kill(victim, number)
        pattern = r"worker %d .*%s.* in 0\.1 s" % (victim, number.name)
        line = pod.wait_for_line(pattern, SOON_SECONDS).string
        assert ("out of memory" in line) is (number == signal.SIGKILL)
        wait_until(lambda: len(set(children_of(pod.pid)) - {victim}) == 3, "three workers")
        assert victim not in wait_for_workers(pod, 3)


@pytest.mark.parametrize("seconds", ["0", "0.3"])
def test_workers_that_always_die_end_the_pod_in_the_end(seconds: str) -> None:
    env = {"ETL_CLASS_PAYLOAD": make_payload(FRAIL, "Frail"), "NUM_WORKERS": "8"}
    env.update({"DOOM": "/"} if seconds == "0" else {"LIFE_SECONDS": seconds})
    try:
        run = run_to_end(env=env, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.fail("workers die and are replaced for ever")
    assert run.code == os.EX_SOFTWARE
    assert "exit code 3" in run.last_line


def wait_for_deaths(server: Server, count: int, seconds: float) -> None:
    """Wait until so many workers have died and are to be replaced."""
    deaths = "%d workers have died" % count
    wait_until(lambda: server.log().count("starting another") >= count, deaths, seconds)


def doom(server: Server, file: Path) -> None:
    """Have one of two workers live and answer, and each that replaces the other die at once."""
    survivor = int(obey(server, "pid").body)
    file.touch()
    for worker in children_of(server.pid):
        if worker != survivor:
            os.kill(worker, signal.SIGKILL)


@ON_LINUX
@pytest.mark.parametrize("numbers, delays", [
    (QUICK_NUMBERS, ["0.1", "0.2", "0.4", "0.5", "0.5"]),
    pytest.param(
        None, ["0.1", "0.2", "0.4", "0.8", "1.6", "3.2", "5.0", "5.0"], marks=pytest.mark.slow),
], ids=["quick", "real"])
def test_the_delay_of_a_replacement_doubles_up_to_a_limit(
    start_runtime: StartRuntime, tmp_path: Path, numbers: Numbers, delays: List[str]
) -> None:
    env = {"NUM_WORKERS": "2", "DOOM": str(tmp_path / "doom")}
    server = start_runtime(make_payload(FRAIL, "Frail"), env, numbers=numbers)
    doom(server, tmp_path / "doom")
    wait_for_deaths(server, len(delays), 40)
    assert re.findall(r"starting another in (\S+) s", server.log())[:len(delays)] == delays
    assert obey(server, "").body == b"hello"


@ON_LINUX
@pytest.mark.slow
def test_the_delay_of_a_replacement_can_be_told_however_many_have_died(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    env = {"NUM_WORKERS": "2", "DOOM": str(tmp_path / "doom")}
    numbers = {**QUICK_NUMBERS, "RESPAWN_DELAY_LIMIT_SECONDS": 0.0}
    server = start_runtime(make_payload(FRAIL, "Frail"), env, numbers=numbers)
    doom(server, tmp_path / "doom")
    wait_for_deaths(server, 1100, 120)  # 2 to that power is no float
    assert obey(server, "").body == b"hello"


@ON_LINUX
def test_idle_workers_that_are_killed_do_not_end_a_pod_that_never_got_a_request(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": str(DEATHS + 2)})
    workers = children_of(server.pid)
    assert len(workers) == DEATHS + 2
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    for worker in workers:
        server.wait_for_line("worker %d .*SIGKILL.*starting another" % worker, SOON_SECONDS)
    assert server.process.poll() is None
    assert obey(server, "").body == b"hello"


@ON_LINUX
@pytest.mark.parametrize("source, name", [(OBEDIENT, "Obedient"), (PULSING, "Pulsing")],
                         ids=["forked", "not forked"])
def test_workers_do_not_outlive_their_supervisor(
    start_runtime: StartRuntime, tmp_path: Path, source: str, name: str
) -> None:
    server = start_runtime(make_payload(source, name), {"NUM_WORKERS": "2"})
    workers = children_of(server.pid)
    assert len(workers) == 2
    with in_flight(server, tmp_path / "gate"):
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)), "the workers are gone")
    assert is_refused(server.port)


# == Objects that kill ==


def send_killers(server: Server, survivor: int, objects: int) -> Set[str]:
    """Send objects that kill every worker but one; tell who has answered them."""
    def send(_: int) -> str:
        try:
            return obey(server, "die %d" % survivor).body.decode()
        except (OSError, http.client.HTTPException):
            return "nobody"

    with ThreadPoolExecutor(objects) as clients:
        return set(clients.map(send, range(objects)))


def test_objects_that_kill_their_workers_do_not_end_a_pod_that_answers_others(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "16"})
    survivor = int(obey(server, "pid").body)  # the others have never answered
    deadline = time.monotonic() + 20
    while server.log().count("SIGKILL") < DEATHS + 2:
        assert time.monotonic() < deadline, "only few workers got such an object"
        assert send_killers(server, survivor, 8) <= {"survived", "nobody"}
    assert server.process.poll() is None
    for _ in range(20):
        assert obey(server, "").body == b"hello"
    assert server.terminate() == 0


def test_a_class_that_dies_of_every_object_ends_the_pod(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": str(DEATHS)})
    deadline = time.monotonic() + 20
    while server.process.poll() is None:
        assert time.monotonic() < deadline, "workers die and are replaced for ever"
        assert send_killers(server, 0, 4) == {"nobody"}
    assert server.wait() == os.EX_SOFTWARE
    assert "SIGKILL" in server.lines[-1] and "%dth in a row" % DEATHS in server.lines[-1]


# == Threads before the fork ==


def pulsing_command(kind: str, folder: Path) -> Tuple[List[str], Environ]:
    """Make arguments and variables for two workers of a class that leaves a thread when loaded.

    In a pod, or from a file, which also changes what must be in no worker's way.
    """
    if kind == "pod":
        return [], {"ETL_CLASS_PAYLOAD": make_payload(PULSING, "Pulsing"), "NUM_WORKERS": "2"}
    file = folder / "changing.py"
    file.write_text(CHANGING)
    name = "%s:Pulsing" % os.path.relpath(str(file))
    return ["serve", name, "--workers", "2", "--port", "0"], {"AIS_TARGET_URL": None, "PORT": None}


@ON_LINUX
@pytest.mark.parametrize("kind", ["pod", "serve"])
def test_a_class_that_leaves_a_thread_when_it_is_loaded_is_loaded_by_each_worker(
    start_runtime: StartRuntime, tmp_path: Path, kind: str
) -> None:
    args, env = pulsing_command(kind, tmp_path)
    server = start_runtime(None, env, args)
    for is_replaced in (False, True):
        loaders = wait_for_loaders(server, 2)
        assert loaders == {pid: pid for pid in children_of(server.pid)}
        workers = set(loaders)
        assert ask_many(server, "pulse 0.2") == {b"beats"}
        check_pipes(workers)
        if not is_replaced:
            victim = min(workers)
            os.kill(victim, signal.SIGKILL)
            server.wait_for_line(r"worker %d .*SIGKILL" % victim, SOON_SECONDS)
            wait_until(lambda: len(set(children_of(server.pid)) - {victim}) == 2, "two workers")
    assert victim not in workers
    assert obey(server, "").body == b"hello"
    assert server.log().count("serving ") == 1


@ON_LINUX
def test_a_class_that_leaves_no_thread_is_loaded_once_and_shared(pod: Server) -> None:
    assert set(wait_for_loaders(pod, 3).values()) == {pod.pid}


@ON_LINUX
def test_a_worker_that_is_being_started_is_stopped_at_once_though_it_is_not_forked() -> None:
    for delay in (0.0, 0.05, 0.1, 0.2):
        with start_unready(PULSING, "Pulsing") as server:
            wait_until(lambda: children_of(server.pid), "a worker is started")
            time.sleep(delay)
            workers = children_of(server.pid)
            assert server.terminate(SOON_SECONDS) == 0, "after %.2f s" % delay
            assert not any(map(is_alive, workers)), "after %.2f s" % delay


@pytest.mark.parametrize("kind", ["pod", "serve"])
def test_a_constructor_that_fails_after_that_ends_the_pod_with_its_reason(
    kind: str, tmp_path: Path
) -> None:
    args, env = pulsing_command(kind, tmp_path)
    run = run_to_end(args, {**env, "REASON": "the model is broken"})
    assert run.code == os.EX_SOFTWARE
    assert "Pulsing" in run.last_line and "ValueError: the model is broken" in run.last_line
    assert not any("ais_runtime_min.py" in line for line in run.lines), "the runtime's own frames are in the traceback"


# == Sharing and inheriting ==


@ON_LINUX
def test_all_workers_share_the_work(pod: Server) -> None:
    assert sorted(wait_for_workers(pod, 3)) == children_of(pod.pid)


def pipes_of(pid: int) -> Set[str]:
    """Return the pipes that a process has, the standard ones apart."""
    found = set()
    for entry in Path("/proc/%d/fd" % pid).iterdir():
        with contextlib.suppress(OSError):
            if int(entry.name) > 2:
                found.add(os.readlink(str(entry)))
    return {name for name in found if name.startswith("pipe:")}


def check_pipes(workers: Set[int]) -> None:
    """Check that each worker has a pipe of its own, and all have the one to the supervisor."""
    pipes = {pid: pipes_of(pid) for pid in workers}
    everyones = set.intersection(*pipes.values())
    own = [name for names in pipes.values() for name in names - everyones]
    assert len(own) == len(set(own)) == len(workers), "each has one pipe of its own: %s" % pipes
    assert len(everyones) == 1, "no end of what wakes the supervisor: %s" % pipes


@ON_LINUX
def test_no_worker_has_a_pipe_of_another_one_or_of_the_supervisor(pod: Server) -> None:
    first = children_of(pod.pid)[0]
    # The worker that replaces it is forked while all other pipes are open.
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(set(children_of(pod.pid)) - {first}) == 3, "three workers")
    check_pipes(wait_for_workers(pod, 3))


def test_the_file_limit_is_raised(pod: Server) -> None:
    soft, hard = obey(pod, "limit").body.split()
    assert soft == hard != b"256"


def test_what_a_worker_prints_is_in_the_log(pod: Server) -> None:
    obey(pod, "say 42")
    pod.wait_for_line("^said 42$", SOON_SECONDS)
    pod.wait_for_line("^complained of 42$", SOON_SECONDS)


@ON_LINUX
def test_a_process_that_a_class_forks_takes_its_own_signals(pod: Server) -> None:
    workers = children_of(pod.pid)
    for _ in range(20):
        code, worker = obey(pod, "fork").body.split()
        assert code == b"-15" and int(worker) in workers
    assert children_of(pod.pid) == workers


def test_what_a_worker_printed_is_not_lost_at_the_end(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "1", "PYTHONUNBUFFERED": None})
    obey(server, "say 43")
    assert server.terminate() == 0
    assert "said 43" in server.lines


def can_unshare() -> bool:
    """Tell whether a process can be made PID 1 of its own."""
    if os.geteuid() or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], stderr=subprocess.DEVNULL).returncode == 0


@ON_LINUX
def test_orphans_are_reaped_by_pid_1() -> None:
    if not can_unshare():
        pytest.skip("needs root and unshare, to be PID 1 of a namespace")
    before = ["unshare", "--pid", "--fork", "--mount-proc"]
    with start_unready(OBEDIENT, "Obedient", before=before) as server:
        server.wait_for_line(SERVING)
        orphans = [obey(server, "orphan 1").body.decode() for _ in range(5)]
        assert obey(server, "state " + orphans[-1]).body in (b"S of 1", b"R of 1")  # it may not sleep yet
        wait_until(lambda: {obey(server, "state " + pid).body for pid in orphans} == {b"gone"},
                   "no zombies are left")
        assert "was ended" not in server.log() and "exit code" not in server.log(), "an orphan was taken for a worker"


# == Starting ==


def test_connections_are_refused_until_transforms_can_be_served(tmp_path: Path) -> None:
    with start_unready(SLOW_TO_START, "SlowToStart", {"GATE": str(tmp_path / "gate")}) as server:
        server.wait_for_line("constructing")
        for _ in range(5):
            assert is_refused(server.port)
            time.sleep(0.1)
        (tmp_path / "gate").touch()
        wait_until(lambda: not is_refused(server.port), "somebody listens")
        assert server.request("PUT", "/bucket/object", b"hello").body == b"hello"
        server.wait_for_line(SERVING)


def test_threads_of_a_constructor_run_and_do_not_delay_the_end(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(BUSY, "Busy"), {"NUM_WORKERS": "2"})
    wait_until(lambda: int(server.request("PUT", "/bucket/object").body) > 3, "it beats")
    assert server.terminate(SOON_SECONDS) == 0


def test_a_start_of_the_class_that_calls_ours_is_honoured() -> None:
    with start_unready(PREPARED, "Prepared") as server:
        server.wait_for_line(SERVING)
        assert server.request("PUT", "/bucket/object", b"object").body == b"prepared object"
        assert server.request("GET", "/health").body == b"Running"
        assert server.terminate(SOON_SECONDS) == 0


def test_a_start_of_the_class_that_serves_by_itself_is_honoured() -> None:
    with start_unready(SELF_MADE, "SelfMade") as server:
        wait_until(lambda: not is_refused(server.port), "somebody listens")
        assert server.request("GET", "/health").body == b"self-made"
        assert server.terminate(SOON_SECONDS) == 0
