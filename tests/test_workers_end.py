"""What a class leaves behind when its worker ends: threads, functions to be called, and processes of every kind."""
import os
import signal
import time
from pathlib import Path
from typing import Callable, List

import pytest

from ais_runtime_min import Exit
from harness import Runtime, children_of, interpreter, make_payload, run_to_end

SOON_SECONDS = 3.0  # far from the grace period, and what a busy machine may take
SOURCE = '''
import atexit, concurrent.futures, multiprocessing, os, signal, subprocess, sys, threading, time
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

class Vain(Parent, HTTPMultiThreadedServer):
    part = WhenLoaded(complains)
    def __init__(self):
        super().__init__()
        print("started", *self.pids, flush=True)
        raise ValueError("no model here")
'''

CHILDREN = ["pool", "spawned_pool", "multiprocessing_pool", "process", "daemon", "deaf_process", "manager", "program",
            "deaf_program", "program_of_its_own_session", "grandchild"]
StartRuntime = Callable[..., Runtime]


def start(start_runtime: StartRuntime, kind: str, name: str = "Threaded", workers: int = 2) -> Runtime:
    """Start a class that starts what is asked for in each worker."""
    python = interpreter("sdk" if name.endswith("App") else "slim")
    env = {"KIND": kind, "NUM_WORKERS": str(workers), "STOPPING": "/nonexistent"}
    return start_runtime(make_payload(SOURCE, name), env, python=python)


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
    assert len([line for line in runtime.lines if "goes on, and is not waited for" in line]) == 2


def test_what_an_executor_of_threads_has_begun_is_finished(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    python = interpreter("slim")
    env = {"KIND": "task", "NUM_WORKERS": "2", "STOPPING": str(tmp_path / "stopping")}
    runtime = start_runtime(make_payload(SOURCE, "Threaded"), env, python=python)
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


@pytest.mark.parametrize("kind", ["pool", "deaf_process", "deaf_program", "grandchild"])
def test_processes_do_not_outlive_the_supervisor(start_runtime: StartRuntime, kind: str) -> None:
    runtime = start(start_runtime, kind, workers=1)
    pids = started_by(runtime)
    os.kill(runtime.pid, signal.SIGKILL)
    wait_for_end(pids)


def test_a_process_that_is_deaf_ends_with_the_pod_when_its_worker_was_killed(start_runtime: StartRuntime) -> None:
    runtime = start(start_runtime, "deaf_program", workers=1)
    pids = started_by(runtime)
    worker, = children_of(runtime.pid)
    os.kill(worker, signal.SIGKILL)
    runtime.wait_for_line("starting another")
    assert runtime.terminate() == Exit.OK
    wait_for_end(pids)


def test_a_class_that_cannot_be_constructed_leaves_nothing_behind() -> None:
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": make_payload(SOURCE, "Vain"), "KIND": "process", "NUM_WORKERS": "1",
                           "AIS_TARGET_URL": "http://127.0.0.1:9/v1"}, timeout=20)
    assert done.code == Exit.SOFTWARE and "no model here" in done.last_line
    assert done.lines[-1] == done.last_line and "taken apart" not in done.lines
    wait_for_end([int(line.split()[1]) for line in done.lines if line.startswith("started ")])
