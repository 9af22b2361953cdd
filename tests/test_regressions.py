"""Defects that once were there: one test for each, so that none comes back.

Most classes of these tests tell by `etl_args` what they are to do; `pid` has them answer the id of their worker.
"""
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest

import test_reading
from ais_runtime_min import ConnectionPool, Hop, NodeRequest, Settings
from conftest import StartRuntime, StartTarget
from harness import Response, Runtime, make_payload
from standin import BASE_PATH, At, Behaviour, StandInTarget
from test_answers import peak_of_workers
from test_reading import CHUNK, WHOLE, attribute, download_target, fqn_query, make_chunked

SOURCE = '''
import os
import signal
import time

from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Echo(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(path + "\\n")
        return str(os.getpid()).encode() if etl_args == "pid" else data

class Streaming(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        yield from iter(lambda: reader.read(65536), b"")

class Alarmed(FlaskServer):
    def transform(self, data, path, etl_args):
        if etl_args == "alarm":
            rung = []
            signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            time.sleep(1)
            assert rung
        return str(os.getpid()).encode()

class AwkwardDetail(Exception):
    class Awkward:
        def __str__(self):
            raise RuntimeError("has no text")
    detail = Awkward()

class FailingDetail(Exception):
    @property
    def detail(self):
        raise RuntimeError("has no detail")

class Fails:
    def transform(self, data, path, etl_args):
        raise {"awkward": AwkwardDetail, "failing": FailingDetail, "": ValueError}[etl_args]("odd")

class FailsThreaded(Fails, HTTPMultiThreadedServer):
    pass

class FailsFlask(Fails, FlaskServer):
    pass

CAUSES = {
    "refused": ConnectionRefusedError(111, "refused"), "reset": ConnectionResetError(104, "reset"),
}

class CannotPut(Echo):
    def client_put(self, url, data, headers, timeout=None):
        try:  # as requests and urllib3 do
            try:
                raise CAUSES[url.rpartition("/")[2]]
            except OSError as error:
                raise OSError("new connection") from error
        except OSError as error:
            raise OSError(error)

class FailsOnce(Alarmed):
    def __init__(self):
        super().__init__()
        if os.path.exists(os.environ["CALLS"]):
            os.unlink(os.environ["CALLS"])
            raise OSError("not this time")
'''


mountpath = test_reading.mountpath  # the fixture


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """The file in which `Echo` notes its calls, and which has `FailsOnce` fail."""
    return tmp_path / "calls"


@pytest.fixture
def start(start_runtime: StartRuntime, calls: Path) -> StartRuntime:
    """A function that starts a class of `SOURCE`, in one worker."""
    def start_class(name: str, fails: bool = False, **env: str) -> Runtime:
        variables = {"NUM_WORKERS": "1", "CALLS": str(calls), **env}
        return start_runtime(make_payload(SOURCE, name), variables, expect_traceback=fails)

    return start_class


@pytest.fixture
def hop(start_target: StartTarget) -> StandInTarget:
    """The next stage, or a server of the outside world."""
    return start_target()


def detail_of(response: Response) -> str:
    """Return what a JSON error tells."""
    assert response.headers["content-type"] == "application/json"
    return str(json.loads(response.body)["detail"])


def pid_of(runtime: Runtime) -> int:
    """Ask for the worker's id."""
    response = runtime.request("PUT", "/bck/obj?etl_args=pid", b"", timeout=60)
    assert response.status == 200, response.body
    return int(response.body)


# == Reading ==


def test_a_class_that_streams_gets_an_object_in_chunks_whole_though_etl_direct_fqn_is_on(
        start: StartRuntime, target: StandInTarget, mountpath: Path, tmp_path: Path) -> None:
    target.objects["/ais%2F@%23%2Fbck%2Fdir%2Fobj"] = WHOLE
    runtime = start("Streaming", ETL_DIRECT_FQN="true", TMPDIR=str(tmp_path))
    response = runtime.request("PUT", "/bck/dir/obj" + fqn_query(make_chunked(mountpath)))
    assert (response.status, response.body) == (200, WHOLE)
    assert [request.method for request in target.requests] == ["GET"]
    assert list(tmp_path.glob("etl-*")) == []


def test_a_first_chunk_whose_path_tells_no_name_is_500_and_not_a_missing_object(
        start: StartRuntime, mountpath: Path) -> None:
    path = mountpath / "file"
    path.write_bytes(CHUNK)
    os.setxattr(str(path), "user.ais.lom", attribute(len(WHOLE)))
    runtime = start("Echo", ETL_FQN_ROOTS=str(mountpath))
    response = runtime.request("PUT", "/bck/obj" + fqn_query(path))
    assert response.status == 500
    assert "chunks" in detail_of(response)


def test_a_refusal_of_the_target_is_told_whole_though_it_comes_in_two_packets(start: StartRuntime, target: StandInTarget) -> None:
    target.default = Behaviour(status=507, body=b"out of space", stall=At.IN_ANSWER_BODY, stall_seconds=0.3, after_bytes=4)
    response = start("Echo").request("GET", "/bck/obj")
    assert response.status == 507
    assert "out of space" in detail_of(response)


def test_downloads_leave_no_descriptor_open_and_an_unknown_status_is_passed_on_as_json(
        start: StartRuntime, hop: StandInTarget) -> None:
    runtime = start("Echo")
    folder = Path("/proc/%d/fd" % pid_of(runtime))
    before = len(list(folder.iterdir())) if folder.exists() else 99
    for status in [200, 302, 404, 520] * 10:
        hop.script.append(Behaviour(status=status, body=b"x", framing="close"))
        response = runtime.request("POST", download_target(hop.root + "/x"), b"")
    assert response.status == 520
    assert "520" in detail_of(response)
    deadline = time.monotonic() + 20
    while folder.exists() and len(list(folder.iterdir())) > before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# == Transforming ==


def test_an_alarm_of_the_class_does_not_end_its_worker(start: StartRuntime) -> None:
    runtime = start("Alarmed")
    first = pid_of(runtime)
    response = runtime.request("PUT", "/bck/obj?etl_args=alarm", b"", timeout=60)
    assert (response.status, int(response.body)) == (200, first)
    time.sleep(0.5)  # a worker that was told to drain would be gone
    assert [pid_of(runtime) for _ in range(3)] == [first] * 3
    assert "starting another" not in runtime.log()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["FailsThreaded", "FailsFlask"])
def test_an_object_whose_transform_failed_does_not_stay_in_memory(start: StartRuntime, name: str) -> None:
    runtime = start(name, fails=True)
    for _ in range(12):
        assert runtime.request("PUT", "/bck/obj", bytes(16 << 20), timeout=60).status == 500
    assert peak_of_workers(runtime) < 130 << 20  # one object takes about 60 MiB


def test_an_exception_whose_detail_cannot_be_read_is_500_all_the_same(start: StartRuntime) -> None:
    runtime = start("FailsThreaded", fails=True)
    for kind in ("awkward", "failing"):
        response = runtime.request("PUT", "/bck/obj?etl_args=" + kind, b"")
        assert (kind, response.status) == (kind, 500)
        assert detail_of(response)


# == Delivering ==


def test_a_download_goes_along_its_pipeline_and_a_malformed_one_is_400_before_anything_is_done(
        start: StartRuntime, hop: StandInTarget, start_target: StartTarget, calls: Path) -> None:
    outside, runtime = start_target(), start("Echo")
    outside.default = Behaviour(status=200, body=b"content")
    hop.default = Behaviour(status=200, body=b"done")
    download = download_target(outside.root + "/x")
    response = runtime.request("POST", download, b"", {"Ais-Node-Url": "http://a:1,,http://b:2"})
    assert (response.status, outside.requests, calls.exists()) == (400, [], False)
    response = runtime.request("POST", download, b"", {"Ais-Node-Url": hop.root})
    assert (response.status, response.body) == (200, b"done")
    request, = hop.requests
    assert (request.method, request.path, request.body) == ("PUT", "/bck/a%20b", b"content")


def test_a_refused_connection_is_found_however_deep_its_error_is_wrapped(start: StartRuntime) -> None:
    runtime = start("CannotPut", AIS_DIRECT_PUT_RETRIES="1")
    for cause in ("refused", "reset"):
        headers = {"Ais-Node-Url": "http://127.0.0.1:9/" + cause}
        assert runtime.request("PUT", "/bck/obj", b"", headers).status == 502
        runtime.wait_for_line("^(?!.*trying again).*the next hop was lost")  # comes last
        assert ("trying again" in runtime.log()) == (cause == "reset"), cause
        runtime.lines.clear()


def test_idle_connections_may_be_swept_while_all_threads_take_and_keep_some(target: StandInTarget) -> None:
    target.objects["/obj"] = b"content"
    pool, until = ConnectionPool(Settings()), time.monotonic() + 1.5
    interval = sys.getswitchinterval()

    def get() -> None:
        with pool.open(NodeRequest("GET", Hop.of(target.url), BASE_PATH + "/obj")) as answer:
            assert (answer.status, answer.readall()) == (200, b"content")

    def repeat(action: Callable[[], object]) -> None:
        while time.monotonic() < until:
            action()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(24) as threads:
            list(threads.map(repeat, [pool.close_idle] * 4 + [get] * 20))  # raises what they raise
    finally:
        sys.setswitchinterval(interval)
    assert len(target.requests) > 20


# == Workers ==


def test_a_replacement_that_cannot_be_made_once_does_not_end_the_pod(start: StartRuntime, calls: Path) -> None:
    runtime = start("FailsOnce", fails=True)
    first = pid_of(runtime)
    calls.write_text("fail")
    os.kill(first, signal.SIGKILL)
    runtime.wait_for_line("not this time.*starting another")
    assert pid_of(runtime) != first
    assert runtime.process.poll() is None
    assert not calls.exists()
