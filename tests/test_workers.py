"""The processes of a pod: how they start, share the work, die, are replaced, and stop.

Classes run in real workers; what a process has and who its children are is read from /proc, on Linux alone.
"""
import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterator, List, Optional, Set, Tuple

import pytest

from ais_runtime_min import (DEATHS_LIMIT, RESPAWN_DELAY_LIMIT_SECONDS, WORKER_OPTION, HTTPMultiThreadedServer, Settings,
                             Supervisor, Worker)
from harness import (RUNTIME, SERVING, Response, Runtime, Server, children_of, exact_environment, interpreter, make_payload,
                     run_to_end)

StartRuntime = Callable[..., Runtime]
AT_ONCE_SECONDS = 1.0  # what waits for nothing ends within
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

HEAD = '''
import os, sys, threading, time
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
'''
OBEDIENT = HEAD + '''
class Obedient(HTTPMultiThreadedServer):
    """Does what the arguments tell."""

    def transform(self, data, path, etl_args):
        word, _, number = etl_args.partition(" ")
        return getattr(self, word)(number) if word else data

    def sleep(self, seconds):
        time.sleep(float(seconds))
        return b"slept"

    def pid(self, seconds):
        time.sleep(float(seconds or 0))
        return b"%d" % os.getpid()

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
        time.sleep(1)
        return b"slept"
'''
SLOW_TO_START = HEAD + '''
class SlowToStart(HTTPMultiThreadedServer):
    def __init__(self):
        super().__init__()
        print("constructing", flush=True)
        time.sleep(float(os.environ["START_SECONDS"]))

    def transform(self, data, path, etl_args):
        return data
'''
UNLUCKY = HEAD + '''
class Unlucky(HTTPMultiThreadedServer):
    def __init__(self):
        super().__init__()
        raise ValueError("the model is broken")

    def transform(self, data, path, etl_args):
        return data
'''
FRAIL = HEAD + '''
class Frail(HTTPMultiThreadedServer):
    def __init__(self):
        super().__init__()
        seconds = float(os.environ["LIFE_SECONDS"])
        if not seconds:
            os._exit(3)
        threading.Timer(seconds, os._exit, (3,)).start()

    def transform(self, data, path, etl_args):
        return data
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
SLOW_TO_LOAD = HEAD + '''
class Call:
    """Unpickled, it is what a call returns."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]

def pause():
    print("unpickling", flush=True)
    time.sleep(float(os.environ.get("START_SECONDS", 0)))

class SlowToLoad(HTTPMultiThreadedServer):
    nothing = Call(pause)

    def transform(self, data, path, etl_args):
        return data
'''
PULSING = OBEDIENT + '''
class Pulse:
    """Counts in a thread that runs wherever this was made or unpickled, and that a fork would stop."""

    def __init__(self):
        self.beats = 0
        threading.Thread(target=self.beat, daemon=True).start()

    def __reduce__(self):
        return Pulse, ()

    def beat(self):
        while True:
            self.beats += 1
            time.sleep(0.01)

class Pulsing(Obedient):
    heart = Pulse()

    def __init__(self):
        super().__init__()
        if "REASON" in os.environ:
            raise ValueError(os.environ["REASON"])

    def pulse(self, seconds):
        before = self.heart.beats
        time.sleep(float(seconds))
        return b"beats" if self.heart.beats > before else b"stands still"
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


def pids_of(server: Server, requests: int = 24) -> Set[int]:
    """Ask many times at once which worker answers."""
    with ThreadPoolExecutor(requests) as clients:
        return {int(answer.body) for answer in clients.map(lambda _: obey(server, "pid 0.05"), range(requests))}


def wait_for_workers(server: Server, count: int) -> Set[int]:
    """Ask until so many workers have answered, and return their ids."""
    found: Set[int] = set()
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        found |= pids_of(server)
    assert len(found) == count
    return found


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


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something is true; fail if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within %.1f s: %s" % (seconds, what)
        time.sleep(0.02)


def free_port() -> int:
    """Return a port that nobody has now, for a server that is to be watched while it starts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_refused(port: int) -> bool:
    """Tell whether a connection is refused: one that hangs, or gets no answer, is not."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except ConnectionRefusedError:
        return True
    return False


def start_unready(source: str, name: str, port: int, env: Optional[Dict[str, str]] = None) -> Server:
    """Start the runtime without waiting until it serves."""
    python = interpreter("slim")
    variables = {"ETL_CLASS_PAYLOAD": make_payload(source, name), "PORT": str(port), "NUM_WORKERS": "2", **(env or {})}
    server = Server([python, str(RUNTIME)], exact_environment(python, variables))
    server.port = port
    return server


@pytest.fixture
def obedient(start_runtime: StartRuntime) -> Runtime:
    """Two workers whose class does what it is told."""
    return start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "2"})


@contextlib.contextmanager
def in_flight(server: Server, path: str) -> Iterator[List[Response]]:
    """Have a request under way; at the end of the block its answer is in the list."""
    answers: List[Response] = []
    client = threading.Thread(target=lambda: answers.append(server.request("PUT", path, b"hello")))
    client.start()
    time.sleep(0.3)  # the transform has begun
    yield answers
    client.join()


# == Stopping ==


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


def test_a_key_press_that_all_processes_get_ends_them_in_order(obedient: Runtime) -> None:
    with in_flight(obedient, "/bucket/object?etl_args=sleep%201") as answers:
        os.killpg(obedient.pid, signal.SIGINT)
        assert obedient.wait() == 0
    assert [answer.body for answer in answers] == [b"slept"]


@pytest.mark.parametrize("name", ["Obedient", "OnMainThread"])
def test_what_is_in_flight_is_answered_before_the_end(start_runtime: StartRuntime, name: str) -> None:
    server = start_runtime(make_payload(ON_MAIN_THREAD, name), {"NUM_WORKERS": "2"})
    with in_flight(server, "/bucket/object?etl_args=sleep%201") as answers:
        server.process.terminate()
        wait_until(lambda: is_refused(server.port), 0.5, "nobody listens any more")
        assert answers == []
        assert server.wait() == 0
    assert [(answer.status, answer.body) for answer in answers] == [(200, b"slept")]
    assert answers[0].headers.get("connection") == "close"


@pytest.mark.parametrize("time_of_many", range(6))
def test_no_worker_misses_the_signal(start_runtime: StartRuntime, time_of_many: int) -> None:
    # Any thread of a process may take a signal; where the main one then sleeps on, its handler is not called.
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "2"})
    with in_flight(server, "/bucket/object?etl_args=sleep%200.5"):
        server.process.terminate()
        wait_until(lambda: is_refused(server.port), 1.0, "nobody listens any more")
    assert server.wait(2) == 0


@pytest.mark.parametrize("begun", [
    b"PUT /bucket/object HT", b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
    b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhel",
])
def test_a_request_that_a_worker_has_begun_to_read_is_answered(obedient: Runtime, begun: bytes) -> None:
    request = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    with obedient.connect() as connection:
        connection.sendall(begun)
        time.sleep(0.2)
        obedient.process.terminate()
        time.sleep(0.3)
        connection.sendall(request[len(begun):])
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello")
    assert obedient.wait() == 0


def test_a_second_signal_ends_all_at_once(obedient: Runtime) -> None:
    with obedient.connect() as connection:
        connection.sendall(b"PUT /b/o?etl_args=sleep%2020 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.3)
        obedient.process.terminate()
        time.sleep(0.3)
        assert obedient.process.poll() is None
        begun = time.monotonic()
        obedient.terminate(5)
        assert time.monotonic() - begun < AT_ONCE_SECONDS


@pytest.mark.parametrize("source, name, doing", [
    (SLOW_TO_LOAD, "SlowToLoad", "unpickling"), (SLOW_TO_START, "SlowToStart", "constructing"),
], ids=["unpickling", "constructing"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pod_that_is_starting_stops_at_once(source: str, name: str, doing: str, number: int) -> None:
    with start_unready(source, name, free_port(), {"START_SECONDS": "30"}) as server:
        server.wait_for_line(doing, 10)
        time.sleep(0.1)
        begun = time.monotonic()
        os.kill(server.pid, number)
        assert server.wait(10) in ((0,) if number == signal.SIGTERM else (0, 128 + number))
        assert time.monotonic() - begun < AT_ONCE_SECONDS


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25])
def test_a_signal_is_never_lost_whenever_it_comes(delay: float) -> None:
    with start_unready(OBEDIENT, "Obedient", free_port()) as server:
        time.sleep(delay)
        code = server.terminate(5)
        assert code in (0, -signal.SIGTERM)  # before the first line of ours, the interpreter alone decides


# == Dying ==


@ON_LINUX
def test_a_worker_that_is_killed_is_replaced_and_the_log_says_why(obedient: Runtime) -> None:
    victim = children_of(obedient.pid)[0]
    os.kill(victim, signal.SIGKILL)
    line = obedient.wait_for_line(r"worker %d .*SIGKILL" % victim, 5).string
    assert "out of memory" in line
    for _ in range(10):
        assert obey(obedient, "pid").status == 200
    wait_until(lambda: len(children_of(obedient.pid)) == 2, 5, "two workers")
    assert victim not in wait_for_workers(obedient, 2)


@ON_LINUX
def test_a_worker_that_dies_now_and_then_does_not_end_the_pod(obedient: Runtime) -> None:
    for _ in range(3):
        victim = int(obey(obedient, "pid").body)
        os.kill(victim, signal.SIGSEGV)
        obedient.wait_for_line(r"worker %d .*SIGSEGV" % victim, 5)
        wait_until(lambda: len(children_of(obedient.pid)) == 2, 5, "two workers")
        assert obey(obedient, "pid").status == 200
    assert obedient.terminate() == 0


def test_a_constructor_that_fails_ends_the_pod_with_its_reason() -> None:
    run = run_to_end(env={"ETL_CLASS_PAYLOAD": make_payload(UNLUCKY, "Unlucky")})
    assert run.code == os.EX_SOFTWARE
    assert "Unlucky" in run.last_line and "ValueError: the model is broken" in run.last_line
    assert any("user_script.py" in line for line in run.lines), "the user's traceback is missing"
    assert not any("ais_runtime_min.py" in line for line in run.lines), "the runtime's own frames are in the traceback"


@pytest.mark.parametrize("seconds", ["0", "0.05", "0.3"])
def test_workers_that_always_die_end_the_pod_in_the_end(seconds: str) -> None:
    env = {"ETL_CLASS_PAYLOAD": make_payload(FRAIL, "Frail"), "NUM_WORKERS": "8", "LIFE_SECONDS": seconds}
    try:
        run = run_to_end(env=env, timeout=15)
    except subprocess.TimeoutExpired:
        pytest.fail("workers die and are replaced for ever")
    assert run.code != 0
    assert "exit code 3" in run.last_line


def test_the_delay_of_a_replacement_has_a_limit_however_many_have_died() -> None:
    launch: Any = None  # nothing is started
    supervisor = Supervisor(Settings(), HTTPMultiThreadedServer, launch)
    supervisor._workers[0] = Worker(0, -1, 0)
    supervisor._workers[0].has_answered = True  # so the pod is not given up
    for _ in range(1200):
        supervisor._start_later("a worker has died")
    delays = [due - time.monotonic() for due in supervisor._due]
    assert len(delays) == 1200 and max(delays) <= RESPAWN_DELAY_LIMIT_SECONDS
    assert delays[-1] > RESPAWN_DELAY_LIMIT_SECONDS - AT_ONCE_SECONDS


@ON_LINUX
def test_idle_workers_that_are_killed_do_not_end_a_pod_that_never_got_a_request(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": str(DEATHS_LIMIT + 2)})
    workers = children_of(server.pid)
    assert len(workers) == DEATHS_LIMIT + 2
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    for worker in workers:
        server.wait_for_line("worker %d .*SIGKILL.*starting another" % worker, 5)
    assert server.process.poll() is None
    assert obey(server, "").body == b"hello"


def check_that_none_outlives_its_supervisor(server: Runtime, workers: Collection[int]) -> None:
    """Kill the supervisor while a worker is at work: all of them must end, and the port be free."""
    with server.connect() as connection:
        connection.sendall(b"PUT /b/o?etl_args=sleep%2020 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)), 2, "the workers are gone")
    assert is_refused(server.port)


@ON_LINUX
def test_workers_do_not_outlive_their_supervisor(obedient: Runtime) -> None:
    workers = children_of(obedient.pid)
    assert len(workers) == 2
    check_that_none_outlives_its_supervisor(obedient, workers)


# == Objects that kill ==


def send_killer(server: Server, survivor: int) -> str:
    """Send an object that kills every worker but one; say who has answered it."""
    try:
        return obey(server, "die %d" % survivor).body.decode()
    except (OSError, http.client.HTTPException):
        return "nobody"


def test_objects_that_kill_their_workers_do_not_end_a_pod_that_answers_others(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "16"})
    survivor = int(obey(server, "pid").body)  # the others have never answered
    deadline = time.monotonic() + 10
    while server.log().count("SIGKILL") < DEATHS_LIMIT + 2:
        assert time.monotonic() < deadline, "only few workers got such an object"
        with ThreadPoolExecutor(8) as clients:
            answers = set(clients.map(lambda _: send_killer(server, survivor), range(8)))
            assert answers <= {"survived", "nobody"}
    assert server.process.poll() is None
    for _ in range(20):
        assert obey(server, "").body == b"hello"
    assert server.terminate() == 0


def test_a_class_that_dies_of_every_object_ends_the_pod(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": str(DEATHS_LIMIT)})
    deadline = time.monotonic() + 20
    answers = set()
    with ThreadPoolExecutor(4) as clients:
        while server.process.poll() is None:
            assert time.monotonic() < deadline, "workers die and are replaced for ever"
            answers |= set(clients.map(lambda _: send_killer(server, 0), range(4)))
    assert answers == {"nobody"}
    assert server.wait() == os.EX_SOFTWARE
    assert "SIGKILL" in server.lines[-1] and "%dth in a row" % DEATHS_LIMIT in server.lines[-1]


# == Started afresh ==


def arguments_of(pid: int) -> List[str]:
    """Return the command line of a process."""
    return Path("/proc/%d/cmdline" % pid).read_text().split("\0")


def parent_of(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[1])


def pulsing_command(kind: str, folder: Path) -> Tuple[List[str], Dict[str, Optional[str]]]:
    """Make arguments and variables by which two workers serve the class that leaves a thread when it is loaded."""
    if kind == "pod":
        return [], {"ETL_CLASS_PAYLOAD": make_payload(PULSING, "Pulsing"), "NUM_WORKERS": "2"}
    file = folder / "pulsing.py"
    file.write_text(PULSING)
    return ["serve", "%s:Pulsing" % file, "--workers", "2", "--port", "0"], {"AIS_TARGET_URL": None, "PORT": None}


@pytest.fixture(params=["pod", "serve"])
def pulsing(request: pytest.FixtureRequest, start_runtime: StartRuntime, tmp_path: Path) -> Runtime:
    """Two workers of a class that leaves a thread when it is loaded: in a pod, and from a file."""
    args, env = pulsing_command(request.param, tmp_path)
    return start_runtime(None, env, args)


@ON_LINUX
def test_a_class_that_leaves_a_thread_when_it_is_loaded_is_not_forked(pulsing: Runtime) -> None:
    workers = wait_for_workers(pulsing, 2)
    assert sorted(workers) == children_of(pulsing.pid)
    for worker in workers:
        assert WORKER_OPTION in arguments_of(worker) and parent_of(worker) == pulsing.pid
    with ThreadPoolExecutor(12) as clients:
        assert {answer.body for answer in clients.map(lambda _: obey(pulsing, "pulse 0.2"), range(12))} == {b"beats"}
    assert obey(pulsing, "").body == b"hello"
    assert pulsing.log().count("serving ") == 1


@ON_LINUX
@pytest.mark.parametrize("line", [
    "import pathlib; sys.path.insert(0, pathlib.Path('lib'))", "os.chdir('/')", "os.environ['LOG_LEVEL'] = 'trace'",
])
def test_what_a_class_changes_when_it_is_loaded_is_in_no_fresh_workers_way(
    start_runtime: StartRuntime, tmp_path: Path, line: str
) -> None:
    file = tmp_path / "changing.py"
    file.write_text(PULSING + line + "\n")
    args = ["serve", "%s:Pulsing" % os.path.relpath(str(file)), "--port", "0"]
    server = start_runtime(None, {"AIS_TARGET_URL": None, "PORT": None}, args)
    assert obey(server, "pulse 0.1").body == b"beats"
    worker, = children_of(server.pid)
    assert WORKER_OPTION in arguments_of(worker)


@ON_LINUX
def test_a_class_that_leaves_no_thread_is_forked(obedient: Runtime) -> None:
    command = arguments_of(obedient.pid)
    assert [arguments_of(worker) for worker in wait_for_workers(obedient, 2)] == [command, command]


@ON_LINUX
def test_a_worker_that_was_started_afresh_is_replaced_when_it_is_killed(pulsing: Runtime) -> None:
    before = wait_for_workers(pulsing, 2)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    pulsing.wait_for_line(r"worker %d .*SIGKILL" % victim, 5)
    wait_until(lambda: len(children_of(pulsing.pid)) == 2, 5, "two workers")
    after = wait_for_workers(pulsing, 2)
    assert victim not in after and len(after - before) == 1
    assert all(WORKER_OPTION in arguments_of(worker) for worker in after)


@ON_LINUX
def test_workers_that_were_started_afresh_have_a_pipe_of_their_own_each(pulsing: Runtime) -> None:
    pipes = [set(pipes_of(pid).values()) for pid in wait_for_workers(pulsing, 2)]
    assert [len(names) for names in pipes] == [2, 2], pipes
    assert len(pipes[0] & pipes[1]) == 1, "all have one pipe, which tells that the supervisor lives: %s" % pipes


@ON_LINUX
def test_workers_that_were_started_afresh_finish_what_is_in_flight_and_end(pulsing: Runtime) -> None:
    workers = wait_for_workers(pulsing, 2)
    with in_flight(pulsing, "/bucket/object?etl_args=sleep%201") as answers:
        begun = time.monotonic()
        assert pulsing.terminate() == 0
        assert time.monotonic() - begun < 1 + AT_ONCE_SECONDS
    assert [answer.body for answer in answers] == [b"slept"]
    assert not any(map(is_alive, workers))


@ON_LINUX
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2])
def test_a_worker_that_is_being_started_afresh_is_stopped_at_once(delay: float) -> None:
    with start_unready(PULSING, "Pulsing", free_port()) as server:
        wait_until(lambda: children_of(server.pid), 10, "a worker is started")
        time.sleep(delay)
        workers = children_of(server.pid)
        begun = time.monotonic()
        assert server.terminate(5) == 0
        assert time.monotonic() - begun < AT_ONCE_SECONDS
        assert not any(map(is_alive, workers))


@ON_LINUX
def test_workers_that_were_started_afresh_do_not_outlive_their_supervisor(pulsing: Runtime) -> None:
    check_that_none_outlives_its_supervisor(pulsing, wait_for_workers(pulsing, 2))


@pytest.mark.parametrize("kind", ["pod", "serve"])
def test_a_constructor_that_fails_in_a_worker_started_afresh_ends_the_pod_with_its_reason(kind: str, tmp_path: Path) -> None:
    args, env = pulsing_command(kind, tmp_path)
    run = run_to_end(args, {**env, "REASON": "the model is broken"})
    assert run.code == os.EX_SOFTWARE
    assert "Pulsing" in run.last_line and "ValueError: the model is broken" in run.last_line
    assert not any("ais_runtime_min.py" in line for line in run.lines), "the runtime's own frames are in the traceback"


# == Sharing and inheriting ==


def test_all_workers_share_the_work(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "3"})
    assert server.pid not in wait_for_workers(server, 3)


def pipes_of(pid: int) -> Dict[int, str]:
    """Return the pipes that a process has, by descriptor, the standard ones apart."""
    found = {}
    for entry in Path("/proc/%d/fd" % pid).iterdir():
        with contextlib.suppress(OSError):
            found[int(entry.name)] = os.readlink(str(entry))
    return {number: name for number, name in found.items() if number > 2 and name.startswith("pipe:")}


@ON_LINUX
def test_no_worker_has_a_pipe_of_another_one(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "3"})
    first = children_of(server.pid)[0]
    os.kill(first, signal.SIGKILL)  # the one that replaces it is forked while all other pipes are open
    wait_until(lambda: len(set(children_of(server.pid)) - {first}) == 3, 5, "three workers")
    wait_for_workers(server, 3)
    workers = children_of(server.pid)
    pipes = {pid: set(pipes_of(pid).values()) for pid in workers}
    everyones = set.intersection(*pipes.values())
    own = [name for names in pipes.values() for name in names - everyones]
    assert len(own) == len(set(own)) == len(workers), "each has one pipe of its own: %s" % pipes


@ON_LINUX
def test_workers_keep_no_end_of_the_pipes_by_which_signals_wake_the_supervisor(obedient: Runtime) -> None:
    pids_of(obedient)
    shared = [set(pipes_of(pid).values()) for pid in children_of(obedient.pid)]
    assert len(set.intersection(*shared)) == 1, "all have one pipe, which tells that the supervisor lives: %s" % shared


def test_the_file_limit_is_raised() -> None:
    python = interpreter("slim")
    env = exact_environment(python, {"ETL_CLASS_PAYLOAD": make_payload(OBEDIENT, "Obedient"), "NUM_WORKERS": "1"})
    command = ["/bin/sh", "-c", 'ulimit -S -n 256 && exec "$@"', "sh", python, str(RUNTIME)]
    with Server(command, env) as server:
        server.port = int(server.wait_for_line(SERVING)[1])
        soft, hard = obey(server, "limit").body.split()
        assert soft == hard != b"256"


def test_what_a_worker_prints_is_in_the_log(obedient: Runtime) -> None:
    obey(obedient, "say 42")
    obedient.wait_for_line("^said 42$", 5)
    obedient.wait_for_line("^complained of 42$", 5)


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
    python = interpreter("slim")
    env = exact_environment(python, {"ETL_CLASS_PAYLOAD": make_payload(OBEDIENT, "Obedient"), "NUM_WORKERS": "2"})
    with Server(["unshare", "--pid", "--fork", "--mount-proc", python, str(RUNTIME)], env) as server:
        server.port = int(server.wait_for_line(SERVING)[1])
        orphans = [obey(server, "orphan 1").body.decode() for _ in range(5)]
        assert obey(server, "state " + orphans[-1]).body in (b"S of 1", b"R of 1")  # it may not sleep yet
        wait_until(lambda: {obey(server, "state " + pid).body for pid in orphans} == {b"gone"}, 20, "no zombies are left")
        assert "was ended" not in server.log() and "exit code" not in server.log(), "an orphan was taken for a worker"


# == Starting ==


def test_connections_are_refused_until_transforms_can_be_served() -> None:
    port = free_port()
    with start_unready(SLOW_TO_START, "SlowToStart", port, {"START_SECONDS": "1"}) as server:
        server.wait_for_line("constructing")
        refusals = 0
        while is_refused(port):
            refusals += 1
            time.sleep(0.05)
        assert refusals >= 10
        assert server.request("PUT", "/bucket/object", b"hello", timeout=3).body == b"hello"
        server.wait_for_line(SERVING)


def test_threads_of_a_constructor_run_and_do_not_delay_the_end(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(BUSY, "Busy"), {"NUM_WORKERS": "2"})
    time.sleep(0.2)
    assert int(server.request("PUT", "/bucket/object").body) > 3
    begun = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - begun < AT_ONCE_SECONDS


def test_a_start_of_the_class_that_calls_ours_is_honoured() -> None:
    port = free_port()
    with start_unready(PREPARED, "Prepared", port) as server:
        server.wait_for_line(SERVING)
        assert server.request("PUT", "/bucket/object", b"object").body == b"prepared object"
        assert server.request("GET", "/health").body == b"Running"
        with in_flight(server, "/bucket/object") as answers:
            assert server.terminate(5) == 0
        assert [answer.status for answer in answers] == [200]


def test_a_start_of_the_class_that_serves_by_itself_is_honoured() -> None:
    port = free_port()
    with start_unready(SELF_MADE, "SelfMade", port) as server:
        wait_until(lambda: not is_refused(port), 10, "somebody listens")
        assert server.request("GET", "/health").body == b"self-made"
        begun = time.monotonic()
        assert server.terminate(5) == 0
        assert time.monotonic() - begun < AT_ONCE_SECONDS


@ON_LINUX
def test_a_process_that_a_class_forks_takes_its_own_signals(start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(OBEDIENT, "Obedient"), {"NUM_WORKERS": "1"})
    worker, = children_of(server.pid)
    for _ in range(20):
        assert server.request("PUT", "/bck/o?etl_args=fork", b"").body == b"-15 %d" % worker
    assert server.terminate() == 0
