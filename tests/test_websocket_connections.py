"""WebSocket on the built-in server: many connections, a pod that stops, a pod that is forsaken."""
import contextlib
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest

from echo import ECHO
from harness import QUICK_NUMBERS, Numbers, Runtime, children_of, make_payload
from peer import BINARY, CLOSE, Frame, Peer, frame, handshake, object_frames

StartRuntime = Callable[..., Runtime]
MIB = 1 << 20
FORSAKEN_SECONDS = QUICK_NUMBERS["FORSAKEN_SECONDS"]
STOPPING = [Frame(BINARY, b"", False), Frame(CLOSE, b"\x03\xf3the pod is stopping")]


@pytest.fixture
def start_echo(start_runtime: StartRuntime) -> StartRuntime:
    """A function that starts a server of that class, whose objects may fail."""
    def start(workers: int = 1, numbers: Numbers = QUICK_NUMBERS) -> Runtime:
        env, payload = {"NUM_WORKERS": str(workers)}, make_payload(ECHO, "Echo")
        return start_runtime(payload, env, expect_traceback=True, numbers=numbers)

    return start


def answers(peer: Peer) -> bool:
    """Send an object, and tell whether it comes back."""
    peer.send(object_frames(b"still here", path="o"))
    return peer.result() == b"still here"


def fail(peer: Peer, reason: str) -> None:
    """Have an object fail, which breaks the connection."""
    peer.send(object_frames(b"x", path="o", etl_args="fail " + reason))
    assert peer.break_reason() == (1011, "Processing error: " + reason)


# == Beside each other ==


def test_open_connections_leave_threads_to_requests(start_echo: StartRuntime) -> None:
    server = start_echo(numbers={**QUICK_NUMBERS, "THREAD_LIMIT": 24, "WEBSOCKET_LIMIT": 12})
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(40):
            connection = stack.enter_context(server.connect())
            connection.sendall(handshake())
            head = connection.recv(1 << 16)
            assert head.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 503 ")), head
            opened += [connection] if b" 101 " in head else []
        assert server.request("GET", "/health").body == b"Running"
        assert server.request("PUT", "/bck/o", b"hello").body == b"hello"
        for connection in (opened[0], opened[11]):
            connection.sendall(object_frames(b"still here", path="o"))
            assert connection.recv(1 << 16) == b"\x82\x0astill here"


def test_neither_an_object_that_takes_long_nor_results_that_nobody_reads_hold_up_quick_ones(
    start_echo: StartRuntime, tmp_path: Path
) -> None:
    server = start_echo()
    gate = tmp_path / "gate"
    with Peer(server) as slow, Peer(server) as lazy, Peer(server) as quick:
        lazy.socket.setblocking(False)
        frames = memoryview(object_frames(b"x" * MIB, path="o") * 64)
        with contextlib.suppress(BlockingIOError):
            while frames:
                frames = frames[lazy.socket.send(frames):]
        assert answers(quick)
        slow.send(object_frames(b"slow", path="o", etl_args="wait %s" % gate))
        began = time.monotonic()
        for _ in range(100):
            quick.send(object_frames(b"x", path="o") * 10)
            assert [quick.result() for _ in range(10)] == [b"x"] * 10
        assert time.monotonic() - began < 10, "each waits for the slow one"
        gate.touch()
        assert slow.result() == b"slow"


def test_a_client_that_just_goes_away_leaves_no_line_and_the_pod_lives(
    start_echo: StartRuntime
) -> None:
    server = start_echo()
    before = len(server.lines)
    for size in (0, 7, 50_000):
        for is_reset in (False, True):
            with Peer(server) as peer:
                peer.send(object_frames(b"x" * 100_000, path="o")[:size])
                linger = b"\1\0\0\0\0\0\0\0" if is_reset else bytes(8)
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    time.sleep(FORSAKEN_SECONDS + 0.5)
    with Peer(server) as peer:
        assert answers(peer)
    assert server.terminate() == 0
    assert [line for line in server.lines[before:] if "stopping" not in line] == []


# == A forsaken pod ==


def test_a_pod_whose_connections_were_closed_by_failures_ends_with_the_last_reason(
    start_echo: StartRuntime
) -> None:
    server = start_echo(workers=2)
    with contextlib.ExitStack() as stack:
        *others, last = [stack.enter_context(Peer(server)) for _ in range(8)]
        for number, peer in enumerate(others):
            fail(peer, "number %d" % number)
        time.sleep(FORSAKEN_SECONDS + 1)  # one connection is left, so nothing may happen
        assert answers(last)
    with Peer(server) as in_time:  # none was left for a moment
        time.sleep(FORSAKEN_SECONDS + 1)
        assert answers(in_time)
    assert server.wait() == os.EX_SOFTWARE
    assert re.match("ais_runtime_min: Processing error: number 6 ", server.lines[-1])


@pytest.mark.slow
def test_a_forsaken_pod_waits_ten_seconds_for_connections(start_echo: StartRuntime) -> None:
    server = start_echo(numbers=None)
    with Peer(server) as peer:
        fail(peer, "at all")
    began = time.monotonic()
    assert server.wait() == os.EX_SOFTWARE
    assert 9 < time.monotonic() - began < 20


def test_a_worker_that_dies_right_after_a_failure_takes_no_reason_with_it(
    start_echo: StartRuntime
) -> None:
    server = start_echo()
    worker, = children_of(server.pid)
    with Peer(server) as peer:
        os.kill(server.pid, signal.SIGSTOP)  # so that it sees the failure and the death at once
        fail(peer, "for good")
    os.kill(worker, signal.SIGKILL)
    os.kill(server.pid, signal.SIGCONT)
    assert server.wait() == os.EX_SOFTWARE
    assert re.match("ais_runtime_min: Processing error: for good ", server.lines[-1])


# == A pod that stops ==


def test_a_drain_answers_what_was_sent_and_closes_idle_connections_at_once(
    start_echo: StartRuntime
) -> None:
    server = start_echo(numbers={**QUICK_NUMBERS, "WEBSOCKET_DRAIN_SECONDS": 20.0})
    going_away = Frame(CLOSE, b"\x03\xe9")
    with Peer(server) as idle, Peer(server) as busy, Peer(server) as halfway:
        for number in range(100):
            if number == 80:  # more than are read ahead
                assert busy.result() == b"0"
            busy.send(object_frames(b"%d" % number, path="o", etl_args="sleep 0.05"))
        content = object_frames(b"in two pieces", path="o")
        halfway.send(content[:-3])
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert idle.rest() == [going_away]
        *rest, last = busy.rest()
        assert [each.payload for each in rest] == [b"%d" % number for number in range(1, 100)]
        assert last == going_away
        halfway.send(content[-3:])
        assert halfway.rest() == [Frame(BINARY, b"in two pieces"), going_away]
        assert server.wait() == 0
        assert time.monotonic() - began < 15


def test_a_client_that_keeps_a_broken_connection_open_does_not_delay_the_end(
    start_echo: StartRuntime
) -> None:
    server = start_echo(
        numbers={**QUICK_NUMBERS, "DRAIN_SECONDS": 20.0, "WEBSOCKET_DRAIN_SECONDS": 20.0})
    with Peer(server) as inline, Peer(server) as handed_over:
        fail(inline, "it")
        handed_over.send(object_frames(b"x", path="o", etl_args="sleep 0.2"))
        assert handed_over.result() == b"x"
        fail(handed_over, "it")
        began = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - began < 8  # AIStore waits for two seconds


def test_a_client_that_never_stops_sending_is_told_that_the_pod_stops(
    start_echo: StartRuntime
) -> None:
    server = start_echo()
    with Peer(server) as peer, ThreadPoolExecutor(1) as sender:
        def send_on() -> None:
            with contextlib.suppress(OSError):
                while True:  # more than can be answered
                    peer.send(object_frames(b"x" * 1000, path="o", etl_args="sleep 0.05") * 10)

        sender.submit(send_on)
        assert peer.result() == b"x" * 1000
        server.process.send_signal(signal.SIGTERM)
        *results, first, last = peer.rest()
        assert {each.payload for each in results} == {b"x" * 1000}
        assert [first, last] == STOPPING
        assert server.wait() == 0
        with contextlib.suppress(OSError):
            peer.socket.shutdown(socket.SHUT_RDWR)  # wakes the sender


@pytest.mark.parametrize("numbers, seconds", [
    (QUICK_NUMBERS, 1), pytest.param(None, 14, marks=pytest.mark.slow),
], ids=["soon", "after 15 seconds"])
def test_a_client_that_pauses_within_an_object_is_told_that_the_pod_stops(
    start_echo: StartRuntime, numbers: Numbers, seconds: float
) -> None:
    server = start_echo(numbers=numbers)
    with Peer(server) as in_bytes, Peer(server) as behind_control:
        control = frame(BINARY, b'{"path": "half"}')
        for peer, begun in (in_bytes, frame(BINARY, bytes(30))[:-1]), (behind_control, b""):
            assert answers(peer)
            peer.send(control, begun)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert in_bytes.rest() == behind_control.rest() == STOPPING
        assert time.monotonic() - began > seconds
    assert server.wait() == 0
    said = "ERROR - half: the pod is stopping; its WebSocket connection is closed"
    assert sum(said in line for line in server.lines) == 2
