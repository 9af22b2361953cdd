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
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple
from urllib.parse import quote

import pytest

from applications import wait_until
from echo import HEAD
from harness import (QUICK_NUMBERS, SERVING, Environ, Numbers, Response, Runtime, Server,
                     children_of, interpreter, make_payload, run_to_end, started)

StartPod = Callable[..., Runtime]
SOON_SECONDS = 10.0  # less than any limit of the runtime
DEATHS = 10  # in a row, without an answer, that end a pod
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

OBEDIENT = HEAD + '''
import multiprocessing, resource, signal

class Loader:
    """Knows which process has loaded the class that it is an attribute of."""

    def __init__(self):
        self.pid = os.getpid()

    def __reduce__(self):
        return type(self), ()

class Obedient(HTTPMultiThreadedServer):
    """Does what the arguments tell, and when it is constructed what the environment tells."""

    loader = Loader()

    def __init__(self):
        super().__init__()
        if os.path.exists(os.environ.get("DOOM", "")):
            os._exit(3)
        if "LIFE_SECONDS" in os.environ:  # its thread is no daemon
            threading.Timer(float(os.environ["LIFE_SECONDS"]), os._exit, (3,)).start()
        if "TOGETHER" in os.environ:  # all four workers fail at once
            open(os.path.join(os.environ["TOGETHER"], str(os.getpid())), "w").close()
            while len(os.listdir(os.environ["TOGETHER"])) < 4:
                time.sleep(0.001)
        if "REASON" in os.environ:
            raise ValueError(os.environ["REASON"])
        if "GATE" in os.environ:
            print("constructing", flush=True)
            self.wait(os.environ["GATE"])

    def transform(self, data, path, etl_args):
        word, _, rest = etl_args.partition(" ")
        return getattr(self, word)(rest) if word else data

    def wait(self, file):
        print("waiting", flush=True)
        while not os.path.exists(file):
            time.sleep(0.01)
        is_main = threading.current_thread() is threading.main_thread()
        assert is_main or not isinstance(self, FastAPIServer)
        return b"waited"

    def take_signal(self, seconds):
        """Have this thread take a signal to the process, after a while."""
        time.sleep(float(seconds))
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return b"taken"

    def loaded(self, seconds):
        time.sleep(float(seconds))
        return "%d %d" % (os.getpid(), self.loader.pid)

    def fork(self, _):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(10)
        return "%s %d" % (child.exitcode, os.getpid())

    def die_unless(self, survivor):
        if os.getpid() != int(survivor):
            os.kill(os.getpid(), 9)
        return b"survived"

    def limit(self, _):
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
        except (FileNotFoundError, ProcessLookupError):  # the second if it goes between open and read
            return "gone"
'''
ON_MAIN_THREAD = OBEDIENT.replace("Obedient(HTTPMultiThreadedServer)", "OnMainThread(FastAPIServer)")
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
STARTING = HEAD + '''
class Prepared(HTTPMultiThreadedServer):
    def start(self):
        self.prefix = b"prepared "
        super().start()

    def transform(self, data, path, etl_args):
        return self.prefix + data

class SelfMade(Prepared):
    def start(self):
        import http.server

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"self-made")

        http.server.HTTPServer(("127.0.0.1", self.port), Handler).serve_forever()
'''


SOURCES = {"Obedient": OBEDIENT, "OnMainThread": ON_MAIN_THREAD, "Pulsing": PULSING, "Prepared": STARTING, "SelfMade": STARTING}


def payload_of(name: str) -> str:
    """Return the payload of one of these classes."""
    return make_payload(SOURCES[name], name)


def start_unready(name: str, env: Optional[Dict[str, str]] = None, before: Sequence[str] = ()) -> Server:
    """Start two workers on a port that nobody has, without waiting until they serve; `before` is put before the command."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    variables = {"ETL_CLASS_PAYLOAD": payload_of(name), "PORT": str(port), "NUM_WORKERS": "2", **(env or {})}
    command, environ = started(interpreter("slim"), [], variables)
    server = Server([*before, *command], environ)
    server.port = port
    return server


@pytest.fixture
def start(start_runtime: Callable[..., Runtime]) -> StartPod:
    """A function that starts so many workers, for tests that end them."""

    def start_pod(
        workers: int = 2, name: str = "Obedient", numbers: Numbers = QUICK_NUMBERS, **env: Optional[str]
    ) -> Runtime:
        return start_runtime(payload_of(name), {"NUM_WORKERS": str(workers), **env}, numbers=numbers)

    return start_pod


@pytest.fixture(scope="module")
def pod() -> Iterator[Server]:
    """Three workers whose class does what it is told, for tests that leave it so."""
    before = ["/bin/sh", "-c", 'ulimit -S -n 256 && exec "$@"', "sh"]
    with start_unready("Obedient", {"NUM_WORKERS": "3"}, before) as server:
        server.wait_for_line(SERVING)
        yield server


def obey(server: Server, command: str) -> Response:
    """Have the class do something; the command is its arguments."""
    return server.request("PUT", "/bucket/object?etl_args=" + command.replace(" ", "%20"), b"hello")


def ask_many(server: Server, command: str) -> Set[bytes]:
    """Have the class do something many times at once; return its answers."""
    with ThreadPoolExecutor(24) as clients:
        return {answer.body for answer in clients.map(lambda _: obey(server, command), range(24))}


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


def any_worker(server: Server) -> int:
    """Return the process id of a worker that answers."""
    return int(obey(server, "loaded 0").body.split()[0])


def any_alive(pids: Iterable[int]) -> bool:
    """Tell whether any thread of these processes runs: those of a zombie may, and keep its sockets open."""
    for file in (file for pid in pids for file in Path("/proc/%d/task" % pid).glob("*/stat")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if file.read_text().rpartition(")")[2].split()[0] != "Z":
                return True
    return False


def is_refused(port: int) -> bool:
    """Tell whether a connection is refused: one that hangs, or gets no answer, is not."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it came just when the listener closed
        pass
    return False


def kill_and_wait(server: Server, victim: int, count: int, number: int = signal.SIGKILL) -> str:
    """Kill a worker, and wait until it is replaced, so that there are `count`; return what the log says."""
    os.kill(victim, number)
    line = server.wait_for_line(r"worker %d .*%s.* in 0\.1 s" % (victim, signal.Signals(number).name), SOON_SECONDS)
    wait_until(lambda: len(set(children_of(server.pid)) - {victim}) == count, "%d workers" % count)
    return line.string


@contextlib.contextmanager
def in_flight(server: Server, gate: Path, requests: int = 1) -> Iterator["List[Future[Response]]"]:
    """Have requests under way until the end of the block, where such a file is made."""
    before = server.log().count("waiting")
    with ThreadPoolExecutor(requests) as clients, contextlib.ExitStack() as stack:
        stack.callback(gate.touch)
        answers = [clients.submit(obey, server, "wait %s" % gate) for _ in range(requests)]
        wait_until(lambda: server.log().count("waiting") == before + requests, "the transforms have begun")
        yield answers


# == Stopping ==


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_connections_do_not_delay_the_end(start: StartPod, number: int) -> None:
    server = start()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(40)]
        for connection in idle[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        begun = time.monotonic()
        os.kill(server.pid, number)
        assert server.wait() == 0
        assert time.monotonic() - begun < 1  # no other test runs
    assert is_refused(server.port)


@ON_LINUX
@pytest.mark.parametrize("name, workers, requests, send", [
    ("Obedient", 8, 16, lambda pid: os.kill(pid, signal.SIGTERM)),
    ("Obedient", 2, 1, lambda pid: os.killpg(pid, signal.SIGINT)),  # as a terminal does
    ("OnMainThread", 2, 1, lambda pid: os.kill(pid, signal.SIGTERM)),
    ("Pulsing", 2, 1, lambda pid: os.kill(pid, signal.SIGTERM)),
], ids=["threads", "key press", "main thread", "not forked"])
def test_what_is_in_flight_is_answered_before_the_end(
    start: StartPod, tmp_path: Path, name: str, workers: int, requests: int, send: Callable[[int], None]
) -> None:
    server = start(workers, name, LIFE_SECONDS="600")  # whose thread does not delay the end
    pids = wait_for_loaders(server, workers)
    with in_flight(server, tmp_path / "gate", requests) as answers:
        send(server.pid)
        wait_until(lambda: is_refused(server.port), "nobody listens any more")
        assert not any(answer.done() for answer in answers)
    for status, headers, body in (answer.result() for answer in answers):
        assert (status, body, headers.get("connection")) == (200, b"waited", "close")
    assert server.wait(SOON_SECONDS) == 0
    assert not any_alive(pids)


@ON_LINUX
def test_a_worker_hears_of_a_signal_that_another_than_its_main_thread_has_taken(start: StartPod) -> None:
    # Any thread of a process may take a signal; where the main one then sleeps on, its handler is not called.
    server = start()
    workers = children_of(server.pid)
    with server.connect() as connection:  # which stays open: its end would wake the worker
        connection.sendall(b"PUT /b/o?etl_args=take_signal%201.5 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).endswith(b"taken")
        wait_until(lambda: not all(any_alive([pid]) for pid in workers), "one of them has ended")


@pytest.mark.parametrize("name", ["Obedient", "OnMainThread"])
def test_a_worker_whose_main_thread_never_comes_back_ends_by_itself(
        start: StartPod, tmp_path: Path, name: str) -> None:
    server = start(1, name, {**QUICK_NUMBERS, "WORKER_GRACE_SECONDS": 1.0})
    with server.connect() as client:
        file = quote(str(tmp_path / "never"), safe="")
        client.sendall(b"PUT /b/o?etl_args=wait%%20%b HTTP/1.1\r\nHost: x\r\n\r\n" % file.encode())
        server.wait_for_line("waiting")
        server.process.terminate()
        assert server.wait(SOON_SECONDS) == 0
    assert not any("is killed" in line for line in server.lines)


def test_clients_whom_the_system_has_let_in_are_answered(start: StartPod) -> None:
    server = start(1)
    worker, = children_of(server.pid)
    os.kill(worker, signal.SIGSTOP)
    with server.connect() as client:
        client.sendall(b"PUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
        server.process.terminate()
        time.sleep(0.3)  # the signal waits for the worker
        os.kill(worker, signal.SIGCONT)
        answer = b"".join(iter(lambda: client.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello")
    assert server.wait() == 0


def test_a_request_that_a_worker_has_begun_to_read_is_answered(start: StartPod) -> None:
    server = start()
    request = b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    with contextlib.ExitStack() as stack:
        connections = []
        for end in (b"HT", b"\r\n\r\n", b"hel"):
            begun = request[:request.index(end) + len(end)]
            connections.append((stack.enter_context(server.connect()), begun))
            connections[-1][0].sendall(begun)
        time.sleep(0.2)
        server.process.terminate()
        time.sleep(0.3)
        for connection, begun in connections:
            connection.sendall(request[len(begun):])
            answer = b"".join(iter(lambda: connection.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.1 200 "), "begun: %r" % begun
            assert answer.endswith(b"hello"), "begun: %r" % begun
    assert server.wait() == 0


def test_a_second_signal_ends_all_at_once(start: StartPod, tmp_path: Path) -> None:
    server = start()
    with in_flight(server, tmp_path / "gate") as answers:
        server.process.terminate()
        wait_until(lambda: is_refused(server.port), "nobody listens any more")
        assert server.process.poll() is None
        time.sleep(0.4)  # two that come together are one, sent to a process and to its group
        server.terminate(SOON_SECONDS)
        assert isinstance(answers[0].exception(SOON_SECONDS), (OSError, http.client.HTTPException))


@ON_LINUX
@pytest.mark.parametrize("limit", ["WORKER_GRACE_SECONDS", "GRACE_SECONDS"])
def test_what_outlives_the_grace_period_is_ended(start: StartPod, tmp_path: Path, limit: str) -> None:
    server = start(numbers={**QUICK_NUMBERS, limit: 1.0})
    workers = children_of(server.pid)
    with in_flight(server, tmp_path / "gate"):
        assert server.terminate(SOON_SECONDS) == 0
        assert not any_alive(workers)
    assert ("is killed with what it has in flight" in server.log()) is (limit == "GRACE_SECONDS")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pod_that_is_starting_stops_at_once(number: int) -> None:
    with start_unready("Obedient", {"GATE": "/nowhere"}) as server:
        server.wait_for_line("constructing", SOON_SECONDS)
        time.sleep(0.1)
        os.kill(server.pid, number)
        code = server.wait(SOON_SECONDS)
        assert code in ((0,) if number == signal.SIGTERM else (0, 128 + number))


@pytest.mark.parametrize("name", ["Obedient", "Pulsing"], ids=["forked", "not forked"])
def test_a_signal_is_never_lost_whenever_it_comes(name: str) -> None:
    for delay in (0.0, 0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.35, 0.45):
        with start_unready(name) as server:
            time.sleep(delay)
            workers = children_of(server.pid)
            # Before the first line of ours, the interpreter alone decides.
            assert server.terminate(SOON_SECONDS) in (0, -signal.SIGTERM), "after %.2f s" % delay
            assert not any_alive(workers), "after %.2f s" % delay


# == Dying ==


@ON_LINUX
def test_workers_that_die_now_and_then_are_replaced_and_the_log_says_why(pod: Server) -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGSEGV):
        victim = any_worker(pod)
        line = kill_and_wait(pod, victim, 3, number)
        assert ("out of memory" in line) is (number == signal.SIGKILL)
        workers = wait_for_loaders(pod, 3)
        assert victim not in workers
    check_sockets(pod, workers)  # the last one was forked while all others were open


@pytest.mark.parametrize("env", [{"DOOM": "/"}, {"LIFE_SECONDS": "0.3"}], ids=["at once", "soon"])
def test_workers_that_always_die_end_the_pod_in_the_end(env: Environ) -> None:
    env = {"ETL_CLASS_PAYLOAD": payload_of("Obedient"), "NUM_WORKERS": "8", **env}
    run = run_to_end(env=env)
    assert run.code == os.EX_SOFTWARE
    assert "exit code 3" in run.last_line


@ON_LINUX
@pytest.mark.parametrize("numbers, delays", [
    (QUICK_NUMBERS, ["0.1", "0.2", "0.4", "0.5", "0.5"]),
    pytest.param(None, ["0.1", "0.2", "0.4", "0.8", "1.6", "3.2", "5.0", "5.0"], marks=pytest.mark.slow),
    # 2 to the power of 1,100 is no float.
    pytest.param({**QUICK_NUMBERS, "RESPAWN_DELAY_LIMIT_SECONDS": 0.0}, ["0.0"] * 1100, marks=pytest.mark.slow),
], ids=["quick", "real", "very many"])
def test_the_delay_of_a_replacement_doubles_up_to_a_limit(
    start: StartPod, tmp_path: Path, numbers: Numbers, delays: List[str]
) -> None:
    server = start(numbers=numbers, DOOM=str(tmp_path / "doom"))
    survivor = any_worker(server)
    (tmp_path / "doom").touch()  # those that replace the other one die at once
    for worker in set(children_of(server.pid)) - {survivor}:
        os.kill(worker, signal.SIGKILL)
    while server.log().count("starting another") < len(delays):
        assert server.process.poll() is None
        time.sleep(0.05)
    assert re.findall(r"starting another in (\S+) s", server.log())[:len(delays)] == delays
    assert obey(server, "").body == b"hello"


@ON_LINUX
def test_idle_workers_that_are_killed_do_not_end_a_pod_that_never_got_a_request(start: StartPod) -> None:
    server = start(DEATHS + 2, LOG_LEVEL="DEBUG")
    server.wait_for_line("all workers are ready")
    workers = children_of(server.pid)
    assert len(workers) == DEATHS + 2
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    for worker in workers:
        server.wait_for_line("worker %d .*SIGKILL.*starting another" % worker, SOON_SECONDS)
    assert server.process.poll() is None
    assert obey(server, "").body == b"hello"


@ON_LINUX
@pytest.mark.parametrize("name", ["Obedient", "Pulsing"], ids=["forked", "not forked"])
def test_workers_do_not_outlive_their_supervisor(start: StartPod, tmp_path: Path, name: str) -> None:
    server = start(2, name)
    workers = children_of(server.pid)
    assert len(workers) == 2
    with in_flight(server, tmp_path / "gate"):
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not any_alive(workers), "the workers are gone")
    assert is_refused(server.port)


# == Objects that kill ==


def send_killers(server: Server, survivor: int, objects: int) -> Set[str]:
    """Send objects that kill every worker but one; tell who has answered them."""
    def send(_: int) -> str:
        try:
            return obey(server, "die_unless %d" % survivor).body.decode()
        except (OSError, http.client.HTTPException):
            return "nobody"

    with ThreadPoolExecutor(objects) as clients:
        return set(clients.map(send, range(objects)))


def test_objects_that_kill_their_workers_do_not_end_a_pod_that_answers_others(start: StartPod) -> None:
    server = start(16)
    survivor = any_worker(server)  # the others have never answered
    deadline = time.monotonic() + 20
    while server.log().count("SIGKILL") < DEATHS + 2:
        assert time.monotonic() < deadline, "only few workers got such an object"
        assert send_killers(server, survivor, 8) <= {"survived", "nobody"}
    assert server.process.poll() is None
    for _ in range(20):
        assert obey(server, "").body == b"hello"
    assert server.terminate() == 0


def test_a_class_that_dies_of_every_object_ends_the_pod(start: StartPod) -> None:
    server = start(DEATHS)
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
        return [], {"ETL_CLASS_PAYLOAD": payload_of("Pulsing"), "NUM_WORKERS": "2"}
    file = folder / "changing.py"
    file.write_text(CHANGING)
    name = "%s:Pulsing" % os.path.relpath(str(file))
    return ["serve", name, "--workers", "2", "--port", "0"], {"AIS_TARGET_URL": None, "PORT": None}


@ON_LINUX
@pytest.mark.parametrize("kind", ["pod", "serve"])
def test_a_class_that_leaves_a_thread_when_it_is_loaded_is_loaded_by_each_worker(
    start_runtime: Callable[..., Runtime], tmp_path: Path, kind: str
) -> None:
    args, env = pulsing_command(kind, tmp_path)
    server = start_runtime(None, env, args)
    victim = 0
    for is_replaced in (False, True):
        if is_replaced:
            victim = children_of(server.pid)[0]
            kill_and_wait(server, victim, 2)
        loaders = wait_for_loaders(server, 2)
        assert victim not in loaders
        assert loaders == {pid: pid for pid in children_of(server.pid)}
        assert ask_many(server, "pulse 0.2") == {b"beats"}
        check_sockets(server, loaders)
    assert obey(server, "").body == b"hello"
    assert server.log().count("serving ") == 1


YIELDING = OBEDIENT + '''
class Resting(Loader):
    """Has a thread that ends before a fork, as those of libraries for numbers do."""

    def __init__(self):
        super().__init__()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.is_over.wait, daemon=True)
        self.thread.start()
        os.register_at_fork(before=self.rest)

    def rest(self):
        self.is_over.set()
        self.thread.join()

class Yielding(Obedient):
    loader = Resting()
'''
STUBBORN = PULSING + '''
class Stuck(Pulse):
    """Leaves a thread, and forks that never come to their ends."""

    def __init__(self):
        super().__init__()
        os.register_at_fork(after_in_child=lambda: time.sleep(60))

class Stubborn(Pulsing):
    loader = Stuck()
'''


SIGNALLING = PULSING + '''
class Signal(Pulse):
    """Has a stop come while the process is forked, at the moment when an exception would be lost."""

    def __init__(self):
        super().__init__()
        if "ETL_CLASS_PAYLOAD" in os.environ:
            os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))

class Signalling(Pulsing):
    loader = Signal()
'''


@ON_LINUX
def test_a_signal_during_the_trial_fork_is_not_lost() -> None:
    run = run_to_end((), {"ETL_CLASS_PAYLOAD": make_payload(SIGNALLING, "Signalling")})
    assert run.code == 0 and not any("serving" in line for line in run.lines), run


HABITS = {  # of classes that leave a thread: what they do when they are loaded in a pod
    "has a timer": "signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)",
    "ignores its children": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "cannot live in a fork": "os.register_at_fork(before=self.rest, after_in_child=lambda: "
                             "os.abort() if os.environ.get('PORT') else None)",
}


@ON_LINUX
@pytest.mark.parametrize("habit", HABITS)
def test_a_class_is_served_whatever_it_did_when_it_was_loaded(start_runtime: Callable[..., Runtime], habit: str) -> None:
    base = "YIELDING" if "rest" in HABITS[habit] else "PULSING"
    source = {"YIELDING": YIELDING, "PULSING": PULSING}[base] + """
class Strange(%s):
    def __init__(self):
        super().__init__()
        if "ETL_CLASS_PAYLOAD" in os.environ:
            %s

class Strangers(Obedient):
    loader = Strange()
""" % ({"YIELDING": "Resting", "PULSING": "Pulse"}[base], HABITS[habit])
    server = start_runtime(make_payload(source, "Strangers"), {"NUM_WORKERS": "2"})
    assert obey(server, "").body == b"hello"


@ON_LINUX
def test_a_class_whose_threads_end_before_a_fork_is_loaded_once(start_runtime: Callable[..., Runtime]) -> None:
    server = start_runtime(make_payload(YIELDING, "Yielding"), {"NUM_WORKERS": "2", "PYTHONWARNINGS": "error"})
    assert wait_for_loaders(server, 2) == dict.fromkeys(children_of(server.pid), server.pid)
    assert "Warning" not in server.log()


@ON_LINUX
def test_a_trial_fork_that_does_not_end_is_ended(start_runtime: Callable[..., Runtime]) -> None:
    numbers = {**QUICK_NUMBERS, "TRIAL_FORK_SECONDS": 0.5}
    server = start_runtime(make_payload(STUBBORN, "Stubborn"), {"NUM_WORKERS": "2"}, numbers=numbers)
    loaders = wait_for_loaders(server, 2)
    assert loaders == {pid: pid for pid in children_of(server.pid)}


@pytest.mark.parametrize("name", ["Obedient", "Pulsing"], ids=["forked", "not forked"])
def test_workers_that_fail_alike_are_told_of_once(name: str, tmp_path: Path) -> None:
    run = run_to_end((), {"ETL_CLASS_PAYLOAD": payload_of(name), "NUM_WORKERS": "4", "REASON": "no model",
                          "TOGETHER": str(tmp_path)})
    log = "\n".join(run.lines)
    assert (run.code, log.count("Traceback"), log.count("no model")) == (os.EX_SOFTWARE, 1, 3), log


@pytest.mark.parametrize("name", ["Obedient", "Pulsing"], ids=["forked", "not forked"])
def test_a_class_may_read_the_command_line_which_has_no_arguments(
        start_runtime: Callable[..., Runtime], tmp_path: Path, name: str) -> None:
    file = tmp_path / "parsing.py"
    source = OBEDIENT if name == "Obedient" else PULSING
    file.write_text(source + "import argparse\n\nclass Parsing(%s):\n    def __init__(self):\n"
                    "        super().__init__()\n        argparse.ArgumentParser().parse_args()\n" % name)
    args = ["serve", "%s:Parsing" % file, "--workers", "2", "--port", "0"]
    server = start_runtime(None, {"AIS_TARGET_URL": None, "PORT": None}, args)
    assert obey(server, "").body == b"hello"


DRAWING = OBEDIENT + '''
class Importer:
    def __reduce__(self):
        return __import__, ("numpy.random",)  # when the class is loaded, before workers are forked

class Drawing(HTTPMultiThreadedServer):
    numpy = Importer()

    def transform(self, data, path, etl_args):
        return b"%d %a" % (os.getpid(), self.numpy.random.draw())
'''


@ON_LINUX
def test_workers_draw_random_numbers_of_their_own(start_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    # numpy's generator is not among those that the standard library sees to; this is its whole interface here
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("")
    (tmp_path / "numpy" / "random.py").write_text(
        "state = 0\n\ndef seed(number):\n    global state\n    state = number\n\ndef draw():\n    return state\n")
    server = start_runtime(make_payload(DRAWING, "Drawing"), {"NUM_WORKERS": "3", "PYTHONPATH": str(tmp_path)})
    drawn: Dict[bytes, bytes] = {}
    while len(drawn) < 3:
        pid, _, number = server.request("PUT", "/b/o", b"x").body.partition(b" ")
        drawn[pid] = number
    assert len(set(drawn.values())) == 3 and b"0" not in drawn.values()


@pytest.mark.parametrize("kind", ["pod", "serve"])
def test_a_constructor_that_fails_after_that_ends_the_pod_with_its_reason(kind: str, tmp_path: Path) -> None:
    args, env = pulsing_command(kind, tmp_path)
    run = run_to_end(args, {**env, "REASON": "the model is broken"})
    assert run.code == os.EX_SOFTWARE
    assert "Pulsing" in run.last_line and "ValueError: the model is broken" in run.last_line
    assert not any("ais_runtime_min.py" in line for line in run.lines), "the runtime's own frames are in the traceback"


# == Sharing and inheriting ==


@ON_LINUX
def test_all_workers_share_the_work_and_a_class_that_is_loaded_once(pod: Server) -> None:
    assert wait_for_loaders(pod, 3) == dict.fromkeys(children_of(pod.pid), pod.pid)


def sockets_of(pid: int) -> Set[str]:
    """Return the sockets that a process has."""
    found = set()
    for entry in Path("/proc/%d/fd" % pid).iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(str(entry)))
    return {name for name in found if name.startswith("socket:")}


def check_sockets(server: Server, workers: Iterable[int]) -> None:
    """Check that no worker has an end of the supervisor's that takes reports."""
    pids = list(workers)
    for pid in pids:
        assert len(sockets_of(server.pid) - sockets_of(pid)) == len(pids)


def test_the_file_limit_is_raised(pod: Server) -> None:
    soft, hard = obey(pod, "limit").body.split()
    assert soft == hard != b"256"


@ON_LINUX
def test_a_process_that_a_class_forks_takes_its_own_signals(pod: Server) -> None:
    workers = children_of(pod.pid)
    for _ in range(20):
        code, worker = obey(pod, "fork").body.split()
        assert code == b"-15" and int(worker) in workers
    assert children_of(pod.pid) == workers


def test_what_a_worker_printed_is_not_lost_at_the_end(start: StartPod) -> None:
    server = start(1, PYTHONUNBUFFERED=None)
    obey(server, "say 43")
    assert server.terminate() == 0
    assert {"said 43", "complained of 43"} <= set(server.lines)


@ON_LINUX
def test_orphans_are_reaped_by_pid_1() -> None:
    before = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() or not shutil.which("unshare") or subprocess.run([*before, "true"]).returncode:
        pytest.skip("needs root and unshare, to be PID 1 of a namespace")
    with start_unready("Obedient", before=before) as server:
        server.wait_for_line(SERVING)
        orphans = [obey(server, "orphan 1").body.decode() for _ in range(5)]
        assert obey(server, "state " + orphans[-1]).body in (b"S of 1", b"R of 1")  # it may not sleep yet
        wait_until(lambda: {obey(server, "state " + pid).body for pid in orphans} == {b"gone"}, "no zombies are left")
        assert "was ended" not in server.log() and "exit code" not in server.log(), "an orphan was taken for a worker"


# == Starting ==


def test_connections_are_refused_until_transforms_can_be_served(tmp_path: Path) -> None:
    with start_unready("Obedient", {"GATE": str(tmp_path / "gate")}) as server:
        server.wait_for_line("constructing")
        for _ in range(5):
            assert is_refused(server.port)
            time.sleep(0.1)
        (tmp_path / "gate").touch()
        wait_until(lambda: not is_refused(server.port), "somebody listens")
        assert obey(server, "").body == b"hello"
        server.wait_for_line(SERVING)


@pytest.mark.parametrize("name, health", [("Prepared", b"Running"), ("SelfMade", b"self-made")])
def test_a_start_of_the_class_that_calls_ours_or_serves_by_itself_is_honoured(name: str, health: bytes) -> None:
    with start_unready(name) as server:
        wait_until(lambda: not is_refused(server.port), "somebody listens")
        assert server.request("GET", "/health").body == health
        if name == "Prepared":
            assert obey(server, "").body == b"prepared hello"
        assert server.terminate(SOON_SECONDS) == 0
