"""WebSocket on the built-in server: AIStore's protocol of objects, their order, and failures.

A test of what quick objects and those that take long do to each other starts a worker of its own,
since a worker remembers for a while how long objects took.
"""
import asyncio
import contextlib
import json
import os
import random
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterator, List
from urllib.parse import quote

import pytest
from websockets.asyncio.client import connect

from echo import ECHO, ECHO_ON_MAIN, HEAD, STREAM, served
from harness import QUICK_NUMBERS, Runtime, make_payload
from peer import BINARY, PING, PONG, TEXT, Frame, Peer, frame, object_frames
from standin import At, Behaviour, StandInTarget

StartRuntime = Callable[..., Runtime]
MIB = 1 << 20
FINAL = "/ais%2F@%23%2Fdst%2Fobj?uuid=x&owt=0"
LOM_OF_A_GIB = (  # AIStore's attribute of a file
    b"\x01\x01" + bytes(8) + b"\x00\x03" + (1 << 30).to_bytes(8, "big"))

TELLER = HEAD + '''
class Teller(%s):
    def transform(self, data, path, etl_args):
        is_main = threading.current_thread() is threading.main_thread()
        return "%%s|%%s|%%s|%%s" %% (data, path, etl_args, "main" if is_main else "another")
'''
BUSY = HEAD + '''
class Busy(HTTPMultiThreadedServer):
    """Tells how many objects were being transformed at once, at most, so far."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.now = self.most = 0

    def transform(self, data, path, etl_args):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(float(etl_args))
        with self.lock:
            self.now -= 1
        return b"%s %d" % (data, self.most)
'''


@pytest.fixture(scope="module")
def echo() -> Iterator[Runtime]:
    """A worker whose class returns objects as they are."""
    with served(ECHO) as server:
        yield server


@pytest.fixture(scope="module")
def on_main() -> Iterator[Runtime]:
    """A worker whose class does so on the main thread alone."""
    with served(ECHO_ON_MAIN) as server:
        yield server


@pytest.fixture(scope="module")
def streamer() -> Iterator[Runtime]:
    """A worker whose class streams objects in capital letters."""
    with served(STREAM, "Streamer") as server:
        yield server


def numbered(count: int, **control: str) -> List[bytes]:
    """Make objects that have their numbers for bytes."""
    return [object_frames(b"%d" % number, path="o", **control) for number in range(count)]


def numbers(count: int) -> List[bytes]:
    """Return what comes back for them."""
    return [b"%d" % number for number in range(count)]


def results(peer: Peer, count: int) -> List[bytes]:
    """Return the next results."""
    return [peer.result() for _ in range(count)]


# == Objects ==


def test_the_real_client_gets_thousands_of_objects_each_way_in_their_order(
    start_runtime: StartRuntime
) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "2"})
    connections, objects = 32, 3000
    samples = [os.urandom(size) for size in (0, 1, 100, 125, 126, 1000, 5000, 65535, 70000)]

    async def talk(number: int) -> int:
        wanted = [b"%d %d " % (number, each) + samples[(number + each) % len(samples)]
                  for each in range(number, objects, connections)]
        async with connect(server.url.replace("http", "ws") + "/ws", max_size=None) as websocket:
            async def send() -> None:
                for each in wanted:
                    await websocket.send(json.dumps({"path": "o"}).encode())
                    await websocket.send(each)

            sending = asyncio.ensure_future(send())
            for each in wanted:
                assert await websocket.recv() == each
            await sending
        return len(wanted)

    async def talk_all() -> List[int]:
        return await asyncio.gather(*(talk(number) for number in range(connections)))

    assert sum(asyncio.run(talk_all())) == objects


@pytest.mark.parametrize("base, thread", [
    ("HTTPMultiThreadedServer", "another"), ("FastAPIServer", "main"), ("FlaskServer", "main")])
def test_a_transform_gets_what_the_control_message_says_for_every_base(
    start_runtime: StartRuntime, base: str, thread: str
) -> None:
    server = start_runtime(make_payload(TELLER % base, "Teller"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(object_frames(b"x", path="dir/a%20b c", etl_args=" a=1&b "), object_frames(b""))
        assert peer.result().decode() == "b'x'|dir/a%20b c|a=1&b|" + thread
        assert peer.result().decode() == "b''|||" + thread


def object_file(folder: Path, content: bytes) -> Path:
    """Put an object where AIStore would have it."""
    file = folder / "@ais" / "bck" / "%ob" / "a dir" / "obj?+%41"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def test_an_object_is_read_by_its_path(echo: Runtime, tmp_path: Path) -> None:
    with Peer(echo) as peer:
        for size in (0, 1000, 3 * MIB):
            content = os.urandom(size)
            fqn = quote(str(object_file(tmp_path, content)), safe="")
            peer.send(object_frames(None, path="a dir/obj", fqn=fqn) * 3)
            assert results(peer, 3) == [content] * 3


def test_a_class_that_wants_paths_gets_them(start_runtime: StartRuntime, tmp_path: Path) -> None:
    env = {"NUM_WORKERS": "1", "ETL_DIRECT_FQN": "true"}
    file = object_file(tmp_path, b"content")
    with Peer(start_runtime(make_payload(ECHO, "Echo"), env)) as peer:
        peer.send(object_frames(None, path="o", fqn=quote(str(file), safe="")),
                  object_frames(b"content", path="o"))
        assert results(peer, 2) == [str(file).encode(), b"content"]


def test_a_stream_is_collected(streamer: Runtime) -> None:
    for size in (0, 999, 300_000):
        with Peer(streamer) as peer:
            peer.send(object_frames(b"a" * size, path="o"))
            assert peer.result() == b"A" * size
            peer.send(object_frames(b"a" * size, path="o", etl_args="fail"))
            assert peer.break_reason() == (1011, "Processing error: half-way")


# == Order ==


def test_slow_objects_of_a_connection_are_transformed_at_once_and_answered_in_order(
    start_runtime: StartRuntime
) -> None:
    env = {"NUM_WORKERS": "1", "NUM_THREADS": "8"}
    server = start_runtime(make_payload(BUSY, "Busy"), env)
    dice = random.Random(5)
    with Peer(server) as peer:
        for number in range(100):
            delay = "%f" % (0.005 + 0.02 * dice.random())
            peer.send(object_frames(b"%d" % number, path="o", etl_args=delay))
        replies = [reply.split() for reply in results(peer, 100)]
        assert [number for number, _ in replies] == numbers(100)
        assert 2 <= int(replies[-1][1]) <= 8
        peer.send(object_frames(b"slow", path="o", etl_args="0.5"), frame(PING, b"meanwhile"))
        assert [each.opcode for each in peer.objects(2)] == [PONG, BINARY]


@pytest.mark.parametrize("source", [ECHO, ECHO_ON_MAIN], ids=["another thread", "main thread"])
@pytest.mark.parametrize("before", [0, 3, 300])
def test_an_object_that_takes_long_holds_up_neither_replies_before_it_nor_what_is_behind_it(
    start_runtime: StartRuntime, tmp_path: Path, source: str, before: int
) -> None:
    server = start_runtime(make_payload(source, "Echo"), {"NUM_WORKERS": "1"})
    gate = tmp_path / "gate"
    with Peer(server) as peer, Peer(server) as other:
        for are_quick in (True, False):  # later objects are transformed in any order
            peer.send(*numbered(before))
            if not are_quick:
                assert results(peer, before) == numbers(before)
            peer.send(object_frames(b"held up", path="o", etl_args="wait %s" % gate),
                      object_frames(b"behind", path="o"))
            if are_quick:
                assert results(peer, before) == numbers(before)
            peer.send(frame(PING, b"still there?"))
            assert peer.receive() == Frame(PONG, b"still there?")
            other.send(frame(PING, b"you?"), object_frames(b"", path="o", etl_args="fill 5"))
            assert other.receive() == Frame(PONG, b"you?")
            peer.send(object_frames(bytes(12 * MIB), path="o"), *numbered(20))
            gate.touch()
            assert results(peer, 3) == [b"held up", b"behind", bytes(12 * MIB)]
            assert results(peer, 20) == numbers(20)
            assert other.result() == bytes(5)
            gate.unlink()


def hold_up(peer: Peer, gate: Path) -> None:
    """Have an object hold up a connection until the gate is there, and see that it is read on."""
    peer.send(object_frames(b"held up", path="o", etl_args="wait %s" % gate), frame(PING, b"?"))
    assert peer.receive() == Frame(PONG, b"?")


def test_a_head_that_has_begun_to_come_when_an_object_ends_is_read_whole(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    frames = object_frames(b"behind" * 100, path="o")
    with contextlib.ExitStack() as stack:
        peers = {cut: stack.enter_context(Peer(server)) for cut in (1, 2, 3, 7)}
        for cut, peer in peers.items():
            hold_up(peer, tmp_path / "gate")
            peer.send(frames[:cut])
        time.sleep(0.1)  # so that they are read before the objects end; else the test shows nothing
        (tmp_path / "gate").touch()
        assert [peer.result() for peer in peers.values()] == [b"held up"] * len(peers)
        time.sleep(0.1)  # likewise, so that the rest is waited for as for any other object
        for cut, peer in peers.items():
            peer.send(frames[cut:])
            assert peer.result() == b"behind" * 100, "cut behind %d bytes" % cut


def test_results_that_are_small_make_room_for_more_objects_behind_one_that_takes_long(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with Peer(start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})) as peer:
        hold_up(peer, gate)
        peer.send(object_frames(bytes(20 * MIB), path="o", etl_args="checksum"),
                  object_frames(b"behind", path="o"), frame(PING, b"goes on?"))
        assert peer.receive() == Frame(PONG, b"goes on?")
        gate.touch()
        assert [each[:8] for each in results(peer, 3)] == [b"held up", b"20971520", b"behind"]


def test_objects_take_room_in_memory_only_until_they_are_transformed(
    start_runtime: StartRuntime
) -> None:
    limits = {**QUICK_NUMBERS, "WAITING_LIMIT_BYTES": MIB}
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"}, numbers=limits)
    with Peer(server, 10) as peer, Peer(server, 10) as other:
        for size in [300_000, 2 * MIB] * 5:
            for each in (peer, other):
                each.send(object_frames(bytes(size), path="o"))
                assert each.result() == bytes(size)


def test_clients_that_do_not_read_hold_up_no_other(start_runtime: StartRuntime) -> None:
    env = {"NUM_WORKERS": "1", "NUM_THREADS": "2"}
    server = start_runtime(make_payload(ECHO, "Echo"), env)
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer(server))
        # from this object on others are handed over
        peer.send(object_frames(b"", path="o", etl_args="sleep 0.2"))
        assert peer.result() == b""
        for _ in range(40):
            silent = stack.enter_context(Peer(server))
            silent.send(object_frames(b"", path="o", etl_args="fill %d" % (4 * MIB)))
            assert select.select([silent.socket], [], [], 30)[0], "a result has not begun to come"
        peer.send(object_frames(b"hello", path="o"))
        assert peer.result() == b"hello"


def test_a_client_may_send_all_before_it_reads(echo: Runtime) -> None:
    with Peer(echo) as peer:
        peer.send(*numbered(2000))
        peer.socket.shutdown(socket.SHUT_WR)
        assert [each.payload for each in peer.rest()] == numbers(2000)


def test_objects_of_all_sizes_for_the_main_thread_are_answered_in_order(
    on_main: Runtime, target: StandInTarget
) -> None:
    sizes = [0, 10, 1000, 16 << 10, (16 << 10) + 1, MIB, 100_000] * 10
    objects = [bytes([number]) * size for number, size in enumerate(sizes)]
    with Peer(on_main) as peer, ThreadPoolExecutor(1) as sender:
        sending = sender.submit(peer.send, *(object_frames(each, path="o") for each in objects))
        assert all(peer.result() == each for each in objects)
        sending.result()
        peer.send(*numbered(50, etl_args="sleep 0.01"), *numbered(20, pipeline=target.root + FINAL),
                  *numbered(50))
        answers = [each.payload for each in peer.objects(120)]
        assert answers[:50] == answers[70:] == numbers(50)
        assert answers[50:70] == [b"%d" % len(each) for each in numbers(20)]


def test_objects_by_path_and_by_message_for_the_main_thread_are_answered_in_order(
    on_main: Runtime, tmp_path: Path
) -> None:
    small, large = (object_file(tmp_path / str(size), os.urandom(size)) for size in (1000, MIB))
    by_path, by_large_path, by_no_path = (
        object_frames(None, path="o", fqn=quote(str(file), safe=""))
        for file in (small, large, small.with_name("none")))
    with Peer(on_main) as peer:
        for _ in range(2):
            peer.send(*numbered(10), by_path * 10, by_large_path, object_frames(b"last", path="o"))
            assert results(peer, 10) == numbers(10)
            assert results(peer, 12) == [small.read_bytes()] * 10 + [large.read_bytes(), b"last"]
        peer.send(by_path, by_no_path)
        assert peer.result() == small.read_bytes()
        assert peer.break_reason() == (1011, "the object's file is not there")


def test_a_target_that_is_silent_keeps_no_connection_from_the_main_thread(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    chunk = object_file(tmp_path, b"the first chunk")
    try:
        os.setxattr(str(chunk), "user.ais.lom", LOM_OF_A_GIB)
    except (OSError, AttributeError):
        pytest.skip("the file system here has no attributes of users")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d/v1/etl/x" % silent.getsockname()[1]
        env = {"NUM_WORKERS": "1", "AIS_TARGET_URL": url}
        server = start_runtime(make_payload(ECHO_ON_MAIN, "Echo"), env)
        with Peer(server) as waiting, Peer(server) as other:
            waiting.send(object_frames(None, path="o", fqn=quote(str(chunk), safe="")))
            assert select.select([silent], [], [], 30)[0]  # it is asked for the whole object
            other.send(object_frames(b"hello", path="o"))
            assert other.result() == b"hello"
            assert server.request("PUT", "/bucket/object", b"plain").body == b"plain"


def test_the_main_thread_answers_what_came_before_half_an_object(on_main: Runtime) -> None:
    with Peer(on_main) as peer:
        half = object_frames(b"the rest comes later", path="o")
        for end in range(1, len(half)):
            peer.send(*numbered(2), half[:end])
            assert results(peer, 2) == numbers(2)
            peer.send(half[end:])
            assert peer.result() == b"the rest comes later"


# == Deliveries ==


def test_a_direct_put_is_told_by_its_length(echo: Runtime, target: StandInTarget) -> None:
    with Peer(echo) as peer:
        for content in (b"content", b"", b"x" * MIB):
            peer.send(object_frames(content, path="obj", pipeline=target.root + FINAL))
            assert peer.receive() == Frame(TEXT, b"%d" % len(content))
            assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == content


def test_what_a_stage_passes_back_is_the_result(
    echo: Runtime, streamer: Runtime, target: StandInTarget
) -> None:
    through = "%s,%s" % (streamer.url, target.root + FINAL)
    with Peer(echo) as peer:
        for content in (b"content", b"", b"y" * MIB):
            peer.send(object_frames(content, path="dir/a b", pipeline=streamer.url))
            assert peer.result() == content.upper()
            peer.send(object_frames(content, path="dir/a b", pipeline=through))
            got = peer.receive()
            assert got and got.opcode == TEXT
            assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == content.upper()


def test_a_stage_is_asked_for_the_object_by_its_name(echo: Runtime, target: StandInTarget) -> None:
    target.default = Behaviour(status=200, body=b"staged")
    pipeline = target.root + ", http://t2:51081/obj"
    with Peer(echo) as peer:
        peer.send(object_frames(b"x", path="dir/a b%20c", etl_args="sleep 0", pipeline=pipeline))
        assert peer.result() == b"staged"
    request, = target.wait_for_requests(1)
    assert request.target == "/dir/a%20b%2520c?etl_args=sleep%200"
    assert request.headers["ais-node-url"] == "http://t2:51081/obj"


def test_a_delivery_that_is_lost_is_tried_again(streamer: Runtime, target: StandInTarget) -> None:
    target.script.extend([Behaviour(cut=At.AFTER_BODY)] * 2)
    with Peer(streamer) as peer:
        peer.send(object_frames(b"abc", path="obj", pipeline=target.root + FINAL))
        assert peer.receive() == Frame(TEXT, b"3")
    assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == b"ABC"


# == Failures ==


def test_an_object_that_fails_inline_breaks_its_connection_with_the_reason(echo: Runtime) -> None:
    with Peer(echo) as other, Peer(echo) as peer:
        peer.send(object_frames(b"x", path="bad/o", etl_args="fail validation failed"))
        assert peer.break_reason() == (1011, "Processing error: validation failed")
        echo.wait_for_line("ERROR - bad/o: Processing error: validation failed")
        other.send(object_frames(b"others live", path="o"))
        assert other.result() == b"others live"


@pytest.mark.parametrize("source", [ECHO, ECHO_ON_MAIN], ids=["another thread", "main thread"])
@pytest.mark.parametrize("etl_args", ["", "sleep 0.02"], ids=["quick", "slow"])
def test_objects_behind_a_failed_one_are_not_answered(
    start_runtime: StartRuntime, source: str, etl_args: str
) -> None:
    env = {"NUM_WORKERS": "1"}
    server = start_runtime(make_payload(source, "Echo"), env, expect_traceback=True)
    with Peer(server) as peer:
        others = numbered(20, etl_args=etl_args)
        peer.send(*others, object_frames(b"", path="o", etl_args="fail on purpose"), *others)
        assert results(peer, 20) == numbers(20)
        assert peer.break_reason() == (1011, "Processing error: on purpose")


def test_an_object_bound_for_another_target_is_reported_and_the_connection_lives(
    echo: Runtime, target: StandInTarget
) -> None:
    with Peer(echo) as peer:
        peer.send(object_frames(b"x", path="bound/o", etl_args="fail of age",
                                pipeline=target.root + FINAL), object_frames(b"good", path="o"))
        assert json.loads(peer.result()) == {"detail": "Processing error: of age"}
        assert peer.result() == b"good"
        echo.wait_for_line("ERROR - bound/o: Processing error: of age")
    assert not target.requests


@pytest.mark.parametrize("control, reason", [
    ({"pipeline": "http://127.0.0.1:9"}, "the next hop was lost: "),
    ({"pipeline": "http://t/x,,http://t/y,"},
     "the pipeline cannot be used: the pipeline has an empty entry"),
    ({"pipeline": "ftp://t"}, "the pipeline cannot be used: "),
    ({"fqn": "/no/@ais/bck/%25ob/where"}, "the object's file is not there"),
    ({"fqn": "%2Fetc%2Fpasswd"}, "the path is not one of an object"),
])
def test_an_object_that_cannot_be_read_or_passed_on_breaks_its_connection(
    echo: Runtime, control: Dict[str, str], reason: str
) -> None:
    with Peer(echo) as peer:
        peer.send(object_frames(None if "fqn" in control else b"x", path="lost", **control))
        code, told = peer.break_reason()
        assert code == 1011 and told.startswith(reason)
        echo.wait_for_line("ERROR - lost: " + reason)


def test_a_refusal_of_the_final_target_is_reported_with_its_text(
    echo: Runtime, target: StandInTarget
) -> None:
    told = b"out of space, see http://127.0.0.1/v1/etl/_object/test-etl/s3cr3t"
    target.default = Behaviour(status=507, body=told)
    with Peer(echo) as peer:
        peer.send(object_frames(b"x", path="some/o", pipeline=target.root + FINAL))
        assert json.loads(peer.result()) == {"detail": "out of space, see http://127.0.0.1***"}
        echo.wait_for_line("ERROR - some/o: out of space")
        target.default = Behaviour()
        peer.send(object_frames(b"x", path="o", pipeline=target.root + FINAL))
        assert peer.receive() == Frame(TEXT, b"1")


def test_a_stage_that_fails_half_way_through_its_answer_fails_the_object(
    echo: Runtime, target: StandInTarget
) -> None:
    target.default = Behaviour(status=200, body=b"z" * MIB, framing="chunked",
                               cut=At.IN_ANSWER_BODY, after_bytes=MIB // 2)
    with Peer(echo) as peer:
        peer.send(object_frames(b"x", path="half", pipeline=target.root))
        code, reason = peer.break_reason()
        assert code == 1011 and "ended early" in reason
        echo.wait_for_line("ERROR - half: ")


def test_a_reason_is_cut_to_whole_characters_and_holds_no_secret(echo: Runtime) -> None:
    with Peer(echo) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="fail " + "\u00e9" * 100))
        code, reason = peer.break_reason()
        assert reason == "Processing error: " + "\u00e9" * 52  # 122 bytes; there is room for 123
    with Peer(echo) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="quote_target"))
        assert "s3cr3t" not in peer.break_reason()[1]
    assert "s3cr3t" not in echo.log()


def test_failures_may_be_answered_as_if_they_were_deliveries(
    start_runtime: StartRuntime, target: StandInTarget
) -> None:
    env = {"NUM_WORKERS": "1", "ETL_WS_FAILURE": "empty"}
    server = start_runtime(make_payload(ECHO, "Echo"), env, expect_traceback=True)
    with Peer(server) as peer:
        final = target.root + FINAL
        peer.send(object_frames(b"x", path="bad", etl_args="fail it"),
                  object_frames(b"x", path="bad", etl_args="fail it", pipeline=final),
                  object_frames(b"good", path="o"))
        empty, reported, good = peer.objects(3)
        assert (empty, good) == (Frame(TEXT, b"0"), Frame(BINARY, b"good"))
        assert reported.opcode == BINARY
        assert json.loads(reported.payload) == {"detail": "Processing error: it"}
        server.wait_for_line("ERROR - bad: Processing error: it")
