"""What a class leaves behind when its worker ends: threads, functions to be called, and processes of every kind."""
import fcntl
import http.client
import os
import re
import signal
import subprocess
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, List

import pytest

from ais_runtime_min import Exit
from harness import (RUNTIME, Runtime, Server, children_of, exact_environment, interpreter,
                     make_payload, run_to_end)

SOON_SECONDS = 3.0  # far from the grace period, and what a busy machine may take
SOURCE = '''
import atexit, concurrent.futures, multiprocessing, multiprocessing.shared_memory, os, signal, subprocess, sys, threading, time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
DEAF = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(1, flush=True); time.sleep(60)"]
SHELL = ["sh", "-c", "sleep 60 & echo $!; wait"]

def forget_the_signal(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(60)

class Parent:
    """Starts what the environment says, and tells the processes."""

    def __init__(self):
        super().__init__()
        self.fork = multiprocessing.get_context("fork")
        self.pids = getattr(self, os.environ["KIND"])()
        atexit.register(self.say, "functions are called")

    def say(self, text):
        print(text, flush=True)

    def pool(self):
        self.executor = concurrent.futures.ProcessPoolExecutor(2, mp_context=self.fork)
        return sorted({self.executor.submit(os.getpid).result() for _ in range(20)})

    def spawned_pool(self):
        self.executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        return [self.executor.submit(os.getpid).result()]

    def multiprocessing_pool(self):
        self.executor = self.fork.Pool(2)
        return sorted(set(self.executor.starmap(os.getpid, [()] * 20)))

    def process(self):
        child = self.fork.Process(target=time.sleep, args=(60,))
        child.start()
        return [child.pid]

    def daemon(self):
        child = self.fork.Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        return [child.pid]

    def deaf_process(self):
        ready = self.fork.Event()
        child = self.fork.Process(target=forget_the_signal, args=(ready,))
        child.start()
        ready.wait()
        return [child.pid]

    def manager(self):
        self.manager = self.fork.Manager()
        self.shared = self.manager.dict(a=1)
        return [self.manager._process.pid]

    def program(self):
        return [subprocess.Popen(SLEEP).pid]

    def deaf_program(self):
        child = subprocess.Popen(DEAF, stdout=subprocess.PIPE)
        child.stdout.readline()
        return [child.pid]

    def program_of_its_own_session(self):
        return [subprocess.Popen(SLEEP, start_new_session=True).pid]

    def grandchild(self):
        child = subprocess.Popen(SHELL, stdout=subprocess.PIPE)
        return [child.pid, int(child.stdout.readline())]

    def deaf_grandchild(self):
        child = subprocess.Popen(["sh", "-c", 'trap "" TERM; (trap "" TERM; exec sleep 60) & echo $!; wait'],
                                 stdout=subprocess.PIPE)
        return [child.pid, int(child.stdout.readline())]

    def thread(self):
        threading.Thread(target=time.sleep, args=(60,)).start()
        return []

    def task(self):
        """What an executor has begun is finished, as in any program."""
        self.threads = concurrent.futures.ThreadPoolExecutor(1)
        self.threads.submit(self.finish)
        return []

    def finish(self):
        while threading.main_thread().is_alive() and not os.path.exists(os.environ["STOPPING"]):
            time.sleep(0.01)
        time.sleep(0.5)
        self.say("the task is finished")

    def shared_memory(self):
        self.memory = multiprocessing.shared_memory.SharedMemory("etl-%d" % os.getpid(), create=True, size=100)
        return self.pool()

    def nothing(self):
        return []

    def transform(self, data, path, etl_args):
        if etl_args == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if etl_args == "fail":
            raise ValueError("no good")
        return " ".join(map(str, self.pids)).encode()

class Threaded(Parent, HTTPMultiThreadedServer):
    pass

class Fast(Parent, FastAPIServer):
    pass

class FastApp(Parent, FastAPIServer):
    async def startup_event(self):
        pass

class FlaskApp(Parent, FlaskServer):
    def _register_routes(self):
        pass

class WhenLoaded:
    def __init__(self, code):
        self.code = code
    def __reduce__(self):
        return exec, (self.code,)

complains = """
import json
class Complaining:  # where the interpreter takes modules apart, as libraries do
    def __del__(self, said=print):
        said("taken apart", flush=True)
json.complaining = Complaining()
"""

class Slow(Parent, HTTPMultiThreadedServer):
    def __init__(self):
        super().__init__()
        print("started", *self.pids, flush=True)
        time.sleep(60)

class Hanging(HTTPMultiThreadedServer):
    """Cannot be constructed, and leaves something that would go on."""
    def __init__(self):
        super().__init__()
        getattr(self, os.environ["KIND"])()
        raise ValueError("no model here")
    def task(self):
        concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 60)
    def queue(self):
        multiprocessing.Queue().put(bytes(1000000))
    def function(self):
        atexit.register(time.sleep, 60)
    def closing(self):
        atexit.register(sys.stdout.close)
    def talkative(self):
        atexit.register(print, "bye bye")
    def transform(self, data, path, etl_args):
        return data

class Vain(Parent, HTTPMultiThreadedServer):
    part = WhenLoaded(complains)
    def __init__(self):
        super().__init__()
        print("started", *self.pids, flush=True)
        raise ValueError("no model here")
'''

CHILDREN = ["pool", "spawned_pool", "multiprocessing_pool", "process", "daemon", "deaf_process", "manager", "program",
            "deaf_program", "program_of_its_own_session", "grandchild", "deaf_grandchild"]
StartRuntime = Callable[..., Runtime]


def start(start_runtime: StartRuntime, kind: str, name: str = "Threaded", workers: int = 2) -> Runtime:
    """Start a class that starts what is asked for in each worker."""
    python = interpreter("sdk" if name.endswith("App") else "slim")
    env = {"KIND": kind, "NUM_WORKERS": str(workers), "STOPPING": "/nonexistent", "LOG_LEVEL": "DEBUG"}
    runtime = start_runtime(make_payload(SOURCE, name), env, python=python)
    runtime.wait_for_line("all workers are ready")
    return runtime


def started_by(runtime: Runtime) -> List[int]:
    """Return the ids of what one worker has started, and that still runs."""
    pids = [int(pid) for pid in runtime.request("PUT", "/bucket/object", b"").body.split()]
    assert pids and all(map(is_alive, pids))
    return pids


def is_alive(pid: int) -> bool:
    """Tell whether a process runs, and is no zombie."""
    try:
        return Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(pids: List[int]) -> None:
    """Wait until processes have ended."""
    deadline = time.monotonic() + SOON_SECONDS
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "they still run: %s" % [pid for pid in pids if is_alive(pid)]
        time.sleep(0.01)


def end(runtime: Runtime) -> None:
    """End a pod that has nothing to do; check how it does."""
    begin = time.monotonic()
    assert runtime.terminate() == Exit.OK
    assert time.monotonic() - begin < SOON_SECONDS
    assert "is killed" not in runtime.log()
    assert runtime.log().count("functions are called") == 2  # in each worker


@pytest.mark.parametrize("kind", CHILDREN)
def test_an_idle_pod_ends_at_once_and_takes_along_what_its_class_has_started(
    start_runtime: StartRuntime, kind: str
) -> None:
    runtime = start(start_runtime, kind)
    pids = started_by(runtime)
    end(runtime)
    wait_for_end(pids)


@pytest.mark.parametrize("name", ["Fast", "FastApp", "FlaskApp"])
def test_classes_of_every_base_end_alike(start_runtime: StartRuntime, name: str) -> None:
    runtime = start(start_runtime, "pool", name)
    pids = started_by(runtime)
    end(runtime)
    wait_for_end(pids)


def test_a_thread_that_never_ends_is_not_waited_for(start_runtime: StartRuntime) -> None:
    runtime = start(start_runtime, "thread")
    end(runtime)
    assert len([line for line in runtime.lines if "still runs and is not waited for" in line]) == 2


def test_what_an_executor_of_threads_has_begun_is_finished(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    python = interpreter("slim")
    env = {"KIND": "task", "NUM_WORKERS": "2", "STOPPING": str(tmp_path / "stopping"), "LOG_LEVEL": "DEBUG"}
    runtime = start_runtime(make_payload(SOURCE, "Threaded"), env, python=python)
    runtime.wait_for_line("all workers are ready")
    runtime.process.terminate()
    runtime.wait_for_line("stopping")
    (tmp_path / "stopping").touch()
    assert runtime.wait() == Exit.OK
    assert runtime.log().count("the task is finished") == 2


@pytest.mark.parametrize("kind", ["pool", "process", "program", "grandchild"])
def test_a_worker_that_is_killed_takes_its_processes_along(start_runtime: StartRuntime, kind: str) -> None:
    runtime = start(start_runtime, kind, workers=1)
    pids = started_by(runtime)
    worker, = children_of(runtime.pid)
    os.kill(worker, signal.SIGKILL)
    wait_for_end(pids)
    runtime.wait_for_line("starting another")


@pytest.mark.parametrize("kind", ["pool", "deaf_process", "deaf_program", "grandchild", "deaf_grandchild"])
def test_processes_do_not_outlive_the_supervisor(start_runtime: StartRuntime, kind: str) -> None:
    runtime = start(start_runtime, kind, workers=1)
    pids = started_by(runtime)
    os.kill(runtime.pid, signal.SIGKILL)
    wait_for_end(pids)


def test_a_class_that_cannot_be_constructed_leaves_nothing_behind() -> None:
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": make_payload(SOURCE, "Vain"), "KIND": "process", "NUM_WORKERS": "1",
                           "AIS_TARGET_URL": "http://127.0.0.1:9/v1"}, timeout=20)
    assert done.code == Exit.SOFTWARE and "no model here" in done.last_line
    assert done.lines[-1] == done.last_line and "taken apart" not in done.lines
    wait_for_end([int(line.split()[1]) for line in done.lines if line.startswith("started ")])


def test_processes_of_a_constructor_that_takes_long_do_not_outlive_the_supervisor(tmp_path: Path) -> None:
    python = interpreter("slim")
    env = {"ETL_CLASS_PAYLOAD": make_payload(SOURCE, "Slow"), "KIND": "deaf_grandchild", "NUM_WORKERS": "1", "PORT": "0",
           "AIS_TARGET_URL": "http://127.0.0.1:9/v1"}
    with Server([python, str(RUNTIME)], exact_environment(python, env)) as server:
        server.wait_for_line("started ")
        pids = [int(word) for line in server.lines if line.startswith("started ") for word in line.split()[1:]]
        assert len(pids) == 2 and all(map(is_alive, pids))
        os.kill(server.pid, signal.SIGKILL)
        wait_for_end(pids)


@pytest.mark.parametrize("kind", ["task", "queue", "function", "talkative", "closing"])
def test_a_failed_start_ends_with_its_reason_whatever_the_class_has_left(kind: str) -> None:
    begin = time.monotonic()
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": make_payload(SOURCE, "Hanging"), "KIND": kind, "NUM_WORKERS": "2",
                           "AIS_TARGET_URL": "http://127.0.0.1:9/v1"}, timeout=30)
    assert time.monotonic() - begin < 15
    assert done.code == Exit.SOFTWARE
    assert done.lines[-1] == "ais_runtime_min: Hanging() failed: ValueError: no model here"


LOADING = """
import atexit, concurrent.futures, multiprocessing, os, tempfile, threading, time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
{0}
class Mine(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        if etl_args:
            open(etl_args + ".begun", "w").close()
            while not os.path.exists(etl_args):
                time.sleep(0.01)
        return {1}
"""


def serve(start_runtime: StartRuntime, file: Path, workers: int = 2) -> Runtime:
    """Serve a file."""
    words = ["serve", str(file), "--port", "0", "--workers", str(workers)]
    return start_runtime(None, {"AIS_TARGET_URL": None, "PORT": None}, words, interpreter("slim"))


@pytest.mark.parametrize("shared, answer", [
    ("TMP = tempfile.TemporaryDirectory()", "os.path.isdir(TMP.name)"),
    ("HELPER = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,), daemon=True)\n"
     "HELPER.start()", "os.path.exists('/proc/%d/exe' % HELPER.pid)")], ids=["folder", "process"])
def test_a_worker_that_ends_leaves_what_all_workers_share(
    start_runtime: StartRuntime, tmp_path: Path, shared: str, answer: str
) -> None:
    file, gate = tmp_path / "mine.py", tmp_path / "gate"
    file.write_text(LOADING.format(shared, "b'%%d' %% (%s)" % answer))
    runtime = serve(start_runtime, file)
    with ThreadPoolExecutor() as clients:
        future = clients.submit(runtime.request, "PUT", "/b/o?etl_args=%s" % gate, b"")
        deadline = time.monotonic() + SOON_SECONDS
        while not Path(str(gate) + ".begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        runtime.process.terminate()
        runtime.wait_for_line("stopping")
        while len(children_of(runtime.pid)) > 1 + ("HELPER" in shared):  # the idle worker goes first
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        gate.touch()
        assert future.result().body == b"1"
    assert runtime.wait() == Exit.OK


@pytest.mark.parametrize("left", [
    "concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 60)",
    "threading.Thread(target=time.sleep, args=(60,)).start()", "atexit.register(print, 'bye bye')"])
def test_a_file_that_fails_ends_with_its_reason_whatever_it_has_left(tmp_path: Path, left: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(LOADING.format(left + "\nraise ValueError('no model here')", "b''"))
    done = run_to_end(["serve", str(file)], {"AIS_TARGET_URL": None}, timeout=30)
    assert done.code == Exit.SOFTWARE and done.lines[-1].endswith("ValueError: no model here")
    assert done.lines[-1].startswith("ais_runtime_min: ")


def test_processes_of_the_shell_that_was_before_are_left_alone(tmp_path: Path) -> None:
    python = interpreter("slim")
    (tmp_path / "mine.py").write_text(LOADING.format("", "b''"))
    script = 'sleep 60 & echo $! > "%s/pid"; exec "%s" "%s" serve "%s/mine.py" --port 0' % (
        tmp_path, python, RUNTIME, tmp_path)
    with Server(["bash", "-c", script], exact_environment(python, {})) as server:
        server.wait_for_line("serving Mine")
        pid = int((tmp_path / "pid").read_text())
        try:
            assert server.terminate() == Exit.OK and is_alive(pid)
        finally:
            os.kill(pid, signal.SIGKILL)


def test_the_last_line_reaches_a_reader_that_the_shell_has_started(tmp_path: Path) -> None:
    python = interpreter("slim")
    script = 'exec "%s" "%s" serve /nonesuch.py > >(sleep 0.5; cat > "%s/log")' % (python, RUNTIME, tmp_path)
    done = subprocess.run(["bash", "-c", script], env=exact_environment(python, {}), timeout=30)
    deadline = time.monotonic() + SOON_SECONDS
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert done.returncode == Exit.USAGE and "there is no file" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("command", ["| true", "> /dev/full", ">&-"])
def test_an_output_that_cannot_be_written_changes_no_exit_code(command: str) -> None:
    python = interpreter("slim")
    script = 'set -o pipefail; "%s" "%s" serve /nonesuch.py %s' % (python, RUNTIME, command)
    done = subprocess.run(["bash", "-c", script], env=exact_environment(python, {}), timeout=30,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == Exit.USAGE and "Traceback" not in done.stderr


def test_two_signals_that_come_together_are_one(start_runtime: StartRuntime, tmp_path: Path) -> None:
    file, gate = tmp_path / "mine.py", tmp_path / "gate"
    file.write_text(LOADING.format("", "data"))
    runtime = serve(start_runtime, file)
    with ThreadPoolExecutor() as clients:
        future = clients.submit(runtime.request, "PUT", "/b/o?etl_args=%s" % gate, b"hello")
        while not Path(str(gate) + ".begun").exists():
            time.sleep(0.01)
        runtime.process.terminate()
        runtime.wait_for_line("stopping")
        runtime.process.terminate()
        time.sleep(0.2)
        gate.touch()
        assert future.result().body == b"hello"
    assert runtime.wait() == Exit.OK


def test_shared_memory_is_cleaned_up_when_the_supervisor_is_killed(start_runtime: StartRuntime) -> None:
    runtime = start(start_runtime, "shared_memory", workers=1)
    worker, = children_of(runtime.pid)
    memory = Path("/dev/shm/etl-%d" % worker)
    assert memory.exists()
    os.kill(runtime.pid, signal.SIGKILL)
    deadline = time.monotonic() + SOON_SECONDS
    while memory.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


STARTING = """
import subprocess
def start():
    command = ["sh", "-c", '(trap "" TERM; exec sleep 60) & echo $!; wait']
    return subprocess.Popen(command, stdout=subprocess.PIPE).stdout.readline()
"""


def test_a_debugger_can_read_from_the_terminal_and_processes_end_all_the_same(tmp_path: Path) -> None:
    python = interpreter("slim")
    (tmp_path / "mine.py").write_text(LOADING.format(STARTING, "start() + input('say: ').encode()"))
    parent, child = os.openpty()
    command = [python, str(RUNTIME), "serve", str(tmp_path / "mine.py"), "--port", "0"]
    with subprocess.Popen(
        command, env=exact_environment(python, {}), stdin=child, stdout=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None, universal_newlines=True,
    ) as process, ThreadPoolExecutor() as clients:
        try:
            assert process.stdout
            port = int(re.findall(r":(\d+)$", process.stdout.readline().strip())[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("PUT", "/b/o", b"")
            answer = clients.submit(connection.getresponse)
            time.sleep(0.3)
            os.write(parent, b"something\n")
            pid, said = answer.result().read().splitlines()
            assert said == b"something" and is_alive(int(pid))
            process.terminate()
            process.wait(10)
            wait_for_end([int(pid)])
        finally:
            process.terminate()
            process.wait(10)
            os.close(parent)
            os.close(child)
