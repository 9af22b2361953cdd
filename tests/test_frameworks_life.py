"""Classes with an application of FastAPI or Flask: who serves them, and how they start and end."""
import configparser
import contextlib
import http.client
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Callable, Optional

import pytest

from ais_runtime_min import FRAMEWORKS, Exit
from applications import (CLASSES, body_of, object_in_work, open_websocket, payload_of, start,
                          wait_until)
from harness import (QUICK_NUMBERS, ROOT, RUNTIME, Environ, Finished, Runtime, Server, exact_environment,
                     interpreter, run_to_end)

from peer import BINARY, Peer, frame, handshake, object_frames

StartRuntime = Callable[..., Runtime]
both = pytest.mark.parametrize("kind", ["fastapi", "flask"])
LARGE = bytes(20 << 20)  # what no buffer on the way takes


def start_in_vain(
    name: str, python: Optional[str] = None, env: Optional[Environ] = None
) -> Finished:
    """Start a class that cannot be served."""
    variables = {"ETL_CLASS_PAYLOAD": payload_of(name), "NUM_WORKERS": "1", **(env or {})}
    done = run_to_end(env=variables, python=python, timeout=60)
    traces = "\n".join(done.lines).count("Traceback (most")  # of a failure one, whatever has failed
    assert traces == (name in ("StartsInVain", "LivesInVain", "ConstructsInVain"))
    return done


# == Life ==


@both
def test_after_sigterm_what_has_begun_is_answered_and_idle_connections_do_not_delay_the_end(
    start_runtime: StartRuntime, tmp_path: Path, kind: str
) -> None:
    runtime, gate = start(start_runtime, CLASSES[kind], {"NUM_WORKERS": "2"}), tmp_path / "gate"
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.connect())  # says nothing
        for _ in range(4):
            connection = http.client.HTTPConnection("127.0.0.1", runtime.port)
            stack.callback(connection.close)
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b"Running"
        stack.enter_context(open_websocket(runtime))
        answer = stack.enter_context(object_in_work(runtime, gate))
        runtime.process.terminate()
        runtime.wait_for_line("stopping")
        begin = time.monotonic()
        gate.touch()
        assert answer.result().body == b"HELLO bucket/object"
        assert runtime.wait() == Exit.OK
        assert time.monotonic() - begin < 15  # uvicorn would wait for 23 s


@both
def test_after_sigterm_objects_that_came_over_websocket_are_answered(
    start_runtime: StartRuntime, tmp_path: Path, kind: str
) -> None:
    runtime, gate = start(start_runtime, CLASSES[kind]), tmp_path / "gate"
    with open_websocket(runtime) as client:
        for number in range(100):  # more than are taken at once
            args = str(gate) if number == 0 else ""
            client.send(json.dumps({"path": "n%d" % number, "etl_args": args}).encode())
            client.send(b"hello")
        wait_until(Path(str(gate) + ".begun").exists, "an object is transformed")
        runtime.process.terminate()
        runtime.wait_for_line("stopping")
        wait_until(lambda: refuses_connections(runtime), "nobody else is let in")
        gate.touch()
        assert list(client) == [b"HELLO n%d" % number for number in range(100)]
    assert client.protocol.close_rcvd and client.protocol.close_rcvd.code == 1001
    assert runtime.wait() == Exit.OK


@pytest.mark.parametrize("kind", ["fastapi changes", "flask"])
def test_clients_over_websocket_that_do_not_read_or_have_gone_do_not_hold_up_the_end(
    start_runtime: StartRuntime, kind: str
) -> None:
    runtime = start(start_runtime, CLASSES[kind])
    with runtime.connect() as stalled:
        stalled.sendall(handshake())
        stalled.sendall(object_frames(bytes(20 << 20), path="large"))
        with Peer(runtime) as gone:
            gone.send(*[object_frames(b"hello", path="n%d" % number) for number in range(30)])
            gone.send(frame(BINARY, b"[]"))
        time.sleep(0.5)
        assert runtime.terminate() == Exit.OK
    assert "is killed" not in runtime.log()
    assert ("shut down" in runtime.lines) == (kind == "fastapi changes")


@both
@pytest.mark.parametrize("way", ["http", "websocket"])
def test_a_result_that_nobody_reads_is_cut(
    start_runtime: StartRuntime, kind: str, way: str
) -> None:
    numbers = {**QUICK_NUMBERS, "RESULT_UNREAD_SECONDS": 1.0}
    runtime = start_runtime(
        payload_of(CLASSES[kind]), {"NUM_WORKERS": "1"}, python=interpreter("sdk"), numbers=numbers)
    with runtime.connect() as client:
        if way == "http":
            client.sendall(b"PUT /bucket/object HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(LARGE))
            client.sendall(LARGE)
        else:
            client.sendall(handshake())
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 101 ")
            client.sendall(object_frames(LARGE))
        time.sleep(4.0)
        with contextlib.suppress(ConnectionResetError):
            assert sum(map(len, iter(lambda: client.recv(1 << 20), b""))) < len(LARGE)


@both
def test_a_transform_that_goes_on_when_the_time_is_over_is_not_waited_for(
    start_runtime: StartRuntime, tmp_path: Path, kind: str
) -> None:
    numbers = {**QUICK_NUMBERS, "WORKER_GRACE_SECONDS": 1.0, "GRACE_SECONDS": 20.0}
    runtime = start_runtime(
        payload_of(CLASSES[kind]), {"NUM_WORKERS": "1"}, python=interpreter("sdk"), numbers=numbers)
    with pytest.raises((http.client.HTTPException, OSError)):
        with object_in_work(runtime, tmp_path / "gate") as answer:
            assert runtime.terminate() == Exit.OK
            answer.result()
    assert "is killed" not in runtime.log() and "Traceback" not in runtime.log()


def refuses_connections(runtime: Runtime) -> bool:
    """Tell whether a pod lets nobody in."""
    try:
        runtime.connect().close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it came just when the listener closed
        pass
    return False


def test_sigterm_ends_a_start_up_that_takes_long(start_runtime: StartRuntime, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    payload = payload_of("StartsSlowly")
    python = interpreter("sdk")
    variables = {"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "2", "GATE": str(gate), "PORT": "0",
                 "AIS_TARGET_URL": "http://127.0.0.1:9/v1"}
    with Server([python, str(RUNTIME)], exact_environment(python, variables)) as server:
        wait_until(Path(str(gate) + ".begun").exists, "its start-up has begun")
        begin = time.monotonic()
        assert server.terminate() == Exit.OK
        assert time.monotonic() - begin < 5


@both
def test_a_worker_that_is_killed_is_replaced(start_runtime: StartRuntime, kind: str) -> None:
    runtime = start(start_runtime, CLASSES[kind])
    first = body_of(runtime, "/pid")
    os.kill(first, signal.SIGKILL)

    def is_replaced() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(body_of(runtime, "/pid") != first)
        return False

    wait_until(is_replaced, "another worker answers")
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    if kind == "fastapi":
        assert body_of(runtime, "/version")["events"] == ["started on uvicorn"]
    assert runtime.terminate() == Exit.OK
    shut_down = [line for line in runtime.lines if line.startswith("shut down")]
    assert shut_down == (["shut down on uvicorn"] if kind == "fastapi" else [])


def test_an_alarm_of_the_class_does_not_end_its_worker(start_runtime: StartRuntime) -> None:
    runtime = start(start_runtime, "Alarmed")
    worker = body_of(runtime, "/pid")
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    time.sleep(1.0)  # a worker without requests would have ended by now
    assert body_of(runtime, "/pid") == worker


@pytest.mark.parametrize("name", ["FreshFast", "FreshFlask"])
def test_a_class_that_leaves_threads_when_it_is_loaded_is_served_by_fresh_processes(
    start_runtime: StartRuntime, name: str
) -> None:
    runtime = start(start_runtime, name, {"NUM_WORKERS": "2"})
    assert body_of(runtime, "/made") == "in the hook"
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    if name == "FreshFast":
        assert "left" in body_of(runtime, "/threads")  # a fork would have lost it
    assert runtime.terminate() == Exit.OK


# == Who is served by what ==


@pytest.mark.parametrize("name, status, loaded", [("Loaded", 200, b""), ("Imports", 418, None)])
def test_a_class_that_asks_for_no_framework_or_merely_imports_one_gets_none(
    start_runtime: StartRuntime, name: str, status: int, loaded: Optional[bytes]
) -> None:
    runtime = start(start_runtime, name, expect_traceback=True)
    response = runtime.request("PUT", "/bucket/object", b"")
    assert response.status == status and loaded in (response.body, None)


@pytest.mark.parametrize("name, what", [
    ("StartsInVain", "StartsInVain's start-up"), ("LivesInVain", "LivesInVain's start-up"),
    ("ConstructsInVain", "ConstructsInVain()")])
def test_a_class_that_fails_to_start_ends_the_pod_with_its_reason(
    sdk_python: str, name: str, what: str
) -> None:
    done = start_in_vain(name, sdk_python)
    assert done.code == Exit.SOFTWARE
    assert done.last_line == "ais_runtime_min: %s failed: ValueError: no model here" % what


def test_a_shutdown_that_fails_is_told(start_runtime: StartRuntime) -> None:
    runtime = start(start_runtime, "EndsInVain", expect_traceback=True)
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    assert runtime.terminate() == Exit.OK
    assert "EndsInVain's shutdown: no way out\nTraceback" in runtime.log()


# == Packages that are missing ==


@pytest.mark.parametrize("name, packages", [
    ("UsesApp", "fastapi>=0.110 and uvicorn[standard]>=0.29"),
    ("StartsUp", "flask>=3.0"),
    ("Imports", "fastapi>=0.110"), ("ImportsFirst", "flask>=3.0"),
])
def test_without_an_index_the_packages_are_named_and_how_to_bake_them_in(
    name: str, packages: str
) -> None:
    done = start_in_vain(name)
    assert done.code == Exit.UNAVAILABLE
    assert "the class needs %s, which this image does not have" % packages in done.last_line
    assert "--build-arg EXTRAS=%s" % packages.partition(">")[0] in done.last_line


def test_the_packages_that_are_installed_are_the_extras_of_the_project() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for name, modules in FRAMEWORKS.items():
        extras = config["options.extras_require"][name].split()
        assert sorted(set(modules.values())) == sorted(extras)


def test_sigterm_ends_an_installation_that_was_found_necessary_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d/simple" % silent.getsockname()[1]
        payload = payload_of("UsesApp")
        variables = {"PIP_NO_INDEX": None, "PIP_INDEX_URL": url, "ETL_CLASS_PAYLOAD": payload}
        python = interpreter("slim")
        with Server([python, str(RUNTIME)], exact_environment(python, variables)) as server:
            server.wait_for_line("installing Python packages: fastapi")
            assert server.terminate() == Exit.OK
