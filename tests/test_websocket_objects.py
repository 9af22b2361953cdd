"""WebSocket on the built-in server: AIStore's protocol of objects, their order, and failures.

A test of what quick objects and those that take long do to each other starts a worker of its own,
since a worker remembers for a while how long objects took.
"""
import asyncio
import contextlib
import json
import os
import random
import re
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterator, List
from urllib.parse import quote, urlsplit

import pytest
from websockets.asyncio.client import connect

from echo import ECHO, ECHO_ON_MAIN, HEAD, STREAM, served
from harness import QUICK_NUMBERS, Runtime, make_payload
from peer import BINARY, PING, PONG, TEXT, Frame, Peer, frame, object_frames
from standin import Behaviour, StandInTarget

StartRuntime = Callable[..., Runtime]
MIB = 1 << 20
FINAL = "/ais%2F@%23%2Fdst%2Fobj?uuid=x&owt=0"

TELLER = HEAD + '''
class Teller(%s):
    def transform(self, data, path, etl_args):
        is_main = threading.current_thread() is threading.main_thread()
        return "%%s|%%s|%%s|%%s" %% (data, path, etl_args, "main" if is_main else "another")
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
    samples = [os.urandom(size) for size in (0, 1, 100, 125, 126, 1000, 5000, 65535, 70000)]

    async def talk(number: int) -> None:
        wanted = [b"%d %d " % (number, each) + samples[(number + each) % len(samples)]
                  for each in range(100)]
        async with connect(server.url.replace("http", "ws") + "/ws", max_size=None) as websocket:
            async def send() -> None:
                for each in wanted:
                    await websocket.send(json.dumps({"path": "o"}).encode())
                    await websocket.send(each)

            sending = asyncio.ensure_future(send())
            assert [await websocket.recv() for _ in wanted] == wanted
            await sending

    async def talk_all() -> None:
        await asyncio.gather(*map(talk, range(30)))

    asyncio.run(talk_all())


@pytest.mark.parametrize("base", ["HTTPMultiThreadedServer", "FastAPIServer", "FlaskServer"])
def test_a_transform_gets_what_the_control_message_says_for_every_base(
    start_runtime: StartRuntime, base: str
) -> None:
    server = start_runtime(make_payload(TELLER % base, "Teller"), {"NUM_WORKERS": "1"})
    with Peer(server) as peer:
        peer.send(object_frames(b"x", path="dir/a%20b c", etl_args=" a=1&b "), object_frames(b""))
        for expected in ("b'x'|dir/a%20b c|a=1&b|", "b''|||"):
            told, bar, thread = peer.result().decode().rpartition("|")
            assert told + bar == expected
            assert thread == "main" or base == "HTTPMultiThreadedServer"


def object_file(folder: Path, content: bytes) -> Path:
    """Put an object where AIStore would have it."""
    file = folder / "@ais" / "bck" / "%ob" / "a dir" / "obj?+%41"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def by_path(file: Path) -> bytes:
    """Make the message of an object that is to be read from its file."""
    return object_frames(None, path="o", fqn=quote(str(file), safe=""))


def test_an_object_is_read_by_its_path_unless_the_class_wants_that(
    echo: Runtime, start_runtime: StartRuntime, tmp_path: Path
) -> None:
    with Peer(echo) as peer:
        for size in (0, 1000, 3 * MIB):
            content = os.urandom(size)
            file = object_file(tmp_path, content)
            peer.send(by_path(file) * 3)
            assert results(peer, 3) == [content] * 3
    env = {"NUM_WORKERS": "1", "ETL_DIRECT_FQN": "true"}
    with Peer(start_runtime(make_payload(ECHO, "Echo"), env)) as peer:
        peer.send(by_path(file), object_frames(b"content", path="o"))
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
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1", "NUM_THREADS": "8"})
    dice = random.Random(5)
    with Peer(server) as peer:
        for number in numbers(100):
            delay = "sleep %f" % (0.005 + 0.02 * dice.random())
            peer.send(object_frames(number, path="o", etl_args=delay))
        assert results(peer, 100) == numbers(100)
        # none of these ends unless the last one is transformed meanwhile
        for number, word in zip(numbers(8), ["wait"] * 7 + ["touch"]):
            gate = str(tmp_path / "gate")
            peer.send(object_frames(number, path="o", etl_args="%s %s" % (word, gate)))
        assert results(peer, 8) == numbers(8)
        peer.send(object_frames(b"slow", path="o", etl_args="sleep 0.5"), frame(PING, b"meanwhile"))
        assert [each.opcode for each in peer.objects(2)] == [PONG, BINARY]


@pytest.mark.parametrize("source", [ECHO, ECHO_ON_MAIN], ids=["another thread", "main thread"])
@pytest.mark.parametrize("before", [0, 300])
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
            other.send(frame(PING, b"you?"), object_frames(b"too", path="o"))
            assert other.receive() == Frame(PONG, b"you?")
            peer.send(object_frames(bytes(12 * MIB), path="o"), *numbered(20))
            gate.touch()
            assert results(peer, 3) == [b"held up", b"behind", bytes(12 * MIB)]
            assert results(peer, 20) == numbers(20)
            assert other.result() == b"too"
            gate.unlink()


def test_what_comes_behind_an_object_that_takes_long_is_read_whole_and_finds_room(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    gate = tmp_path / "gate"
    frames = object_frames(b"behind" * 100, path="o")
    with contextlib.ExitStack() as stack:
        peers = {cut: stack.enter_context(Peer(server)) for cut in (1, 2, 3, 7)}
        last = stack.enter_context(Peer(server))
        for peer in (*peers.values(), last):
            peer.send(object_frames(b"first", path="o", etl_args="wait %s" % gate), frame(PING))
            assert peer.receive() == Frame(PONG, b"")
        for cut, peer in peers.items():
            peer.send(frames[:cut])
        # the result of a large object that is small makes room for another one
        last.send(object_frames(bytes(20 * MIB), path="o", etl_args="checksum"), *numbered(1),
                  frame(PING))
        assert last.receive() == Frame(PONG, b"")
        time.sleep(0.1)  # so that heads are read before the objects end
        gate.touch()
        assert [peer.result() for peer in peers.values()] == [b"first"] * len(peers)
        assert [each[:8] for each in results(last, 3)] == [b"first", b"20971520", b"0"]
        time.sleep(0.1)  # likewise, so that the rest is waited for as for any other object
        for cut, peer in peers.items():
            peer.send(frames[cut:])
            assert peer.result() == b"behind" * 100, "cut behind %d bytes" % cut


def test_a_large_object_holds_up_neither_the_reply_before_it_nor_what_is_behind_it(
        start_runtime: StartRuntime) -> None:
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"})
    large = bytes(20_000)
    with Peer(server, timeout=10) as peer:
        begun = object_frames(large, path="o")
        peer.send(object_frames(large, path="o"), begun[:-5000])
        assert peer.result() == large  # although the next one is not here as a whole
        peer.send(begun[-5000:])
        assert peer.result() == large
        peer.send(object_frames(large, path="o", etl_args="sleep 3"))
        time.sleep(0.2)
        peer.send(frame(PING, b"?"))
        assert peer.receive() == Frame(PONG, b"?")
        assert peer.result() == large


def test_no_more_objects_are_read_than_may_wait_to_be_answered(start_runtime: StartRuntime) -> None:
    limits = {**QUICK_NUMBERS, "AHEAD_LIMIT_BYTES": MIB}
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1"}, numbers=limits)
    with Peer(server, timeout=2) as peer:
        peer.send(object_frames(b"x", path="o", etl_args="sleep 0.1"))
        assert peer.result() == b"x"  # from now on objects are handed over
        one = object_frames(bytes(100_000), path="o", etl_args="sleep 5")
        with pytest.raises(socket.timeout):  # the system takes some ten MB, and the pod one
            peer.send(one * 400)


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
    server = start_runtime(make_payload(ECHO, "Echo"), {"NUM_WORKERS": "1", "NUM_THREADS": "2"})
    with contextlib.ExitStack() as stack:
        peer, *silent = [stack.enter_context(Peer(server)) for _ in range(41)]
        # from this object on others are handed over
        peer.send(object_frames(b"", path="o", etl_args="sleep 0.2"))
        assert peer.result() == b""
        for each in silent:
            each.send(object_frames(b"", path="o", etl_args="fill %d" % (4 * MIB)))
            assert select.select([each.socket], [], [], 30)[0], "a result has not begun to come"
        peer.send(object_frames(b"hello", path="o"))
        assert peer.result() == b"hello"


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
        peer.send(*numbered(2000))
        peer.socket.shutdown(socket.SHUT_WR)
        assert [each.payload for each in peer.rest()] == numbers(2000)


def test_objects_by_path_and_by_message_for_the_main_thread_are_answered_in_order(
    on_main: Runtime, tmp_path: Path
) -> None:
    small, large = (object_file(tmp_path / str(size), os.urandom(size)) for size in (1000, MIB))
    with Peer(on_main) as peer:
        for _ in range(2):
            peer.send(*numbered(10), by_path(small) * 10, by_path(large), *numbered(1))
            assert results(peer, 10) == numbers(10)
            assert results(peer, 12) == [small.read_bytes()] * 10 + [large.read_bytes(), b"0"]
        peer.send(by_path(small), by_path(small.with_name("none")))
        assert peer.result() == small.read_bytes()
        assert peer.break_reason() == (1011, "the object's file is not there")


def test_a_target_that_is_silent_keeps_no_connection_from_the_main_thread(
    start_runtime: StartRuntime, tmp_path: Path
) -> None:
    chunk = object_file(tmp_path, b"the first chunk")
    lom_of_a_gib = b"\x01\x01" + bytes(8) + b"\x00\x03" + (1 << 30).to_bytes(8, "big")
    try:  # AIStore's attribute of a file
        os.setxattr(str(chunk), "user.ais.lom", lom_of_a_gib)
    except (OSError, AttributeError):
        pytest.skip("the file system here has no attributes of users")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d/v1/etl/x" % silent.getsockname()[1]
        env = {"NUM_WORKERS": "1", "AIS_TARGET_URL": url}
        server = start_runtime(make_payload(ECHO_ON_MAIN, "Echo"), env)
        with Peer(server) as waiting, Peer(server) as other:
            waiting.send(by_path(chunk))
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


def test_a_direct_put_is_told_by_its_length_and_what_a_stage_passes_back_is_the_result(
    echo: Runtime, streamer: Runtime, target: StandInTarget
) -> None:
    final = target.root + FINAL
    with Peer(echo) as peer:
        for content in (b"content", b"", b"y" * MIB):
            length = Frame(TEXT, b"%d" % len(content))
            peer.send(object_frames(content, path="dir/a b", pipeline=final))
            assert peer.receive() == length
            assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == content
            peer.send(object_frames(content, path="dir/a b", pipeline=streamer.url))
            assert peer.result() == content.upper()
            through = "%s,%s" % (streamer.url, final)
            peer.send(object_frames(content, path="dir/a b", pipeline=through))
            assert peer.receive() == length
            assert target.stored["/ais%2F@%23%2Fdst%2Fobj"] == content.upper()


# == Failures ==


@pytest.mark.parametrize("source", [ECHO, ECHO_ON_MAIN], ids=["another thread", "main thread"])
@pytest.mark.parametrize("etl_args", ["", "sleep 0.02"], ids=["quick", "slow"])
def test_an_object_that_fails_breaks_its_connection_with_the_reason_and_none_behind_it_is_answered(
    start_runtime: StartRuntime, source: str, etl_args: str
) -> None:
    env = {"NUM_WORKERS": "1"}
    server = start_runtime(make_payload(source, "Echo"), env, expect_traceback=True)
    with Peer(server) as peer, Peer(server) as other:
        objects = numbered(20, etl_args=etl_args)
        peer.send(*objects, object_frames(b"", path="bad/o", etl_args="fail on purpose"), *objects)
        assert results(peer, 20) == numbers(20)
        assert peer.break_reason() == (1011, "Processing error: on purpose")
        server.wait_for_line("ERROR - bad/o: Processing error: on purpose")
        other.send(object_frames(b"others live", path="o"))
        assert other.result() == b"others live"


def test_a_failure_of_an_object_bound_for_another_target_is_reported_and_the_connection_lives(
    echo: Runtime, target: StandInTarget
) -> None:
    told = b"out of space, see http://127.0.0.1/v1/etl/_object/test-etl/s3cr3t"
    target.default = Behaviour(status=507, body=told)
    final = target.root + FINAL
    with Peer(echo) as peer:
        for args, detail in [("fail of age", "Processing error: of age"),
                             ("", "the next hop, %s, answered 507: out of space, see http://127.0.0.1***"
                              % urlsplit(target.root).netloc)]:
            assert not target.requests
            peer.send(object_frames(b"x", path="bound", etl_args=args, pipeline=final),
                      *numbered(1))
            assert json.loads(peer.result()) == {"detail": detail}
            assert peer.result() == b"0"
            echo.wait_for_line("ERROR - bound: " + re.escape(detail))


@pytest.mark.parametrize("control, reason", [
    ({"pipeline": "http://127.0.0.1:9"}, "the next hop was lost: "),
    ({"pipeline": "http://t/x,,http://t/y,"},
     "the pipeline cannot be used: the pipeline has an empty entry"),
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


def test_a_reason_is_cut_to_whole_characters_and_holds_no_secret(echo: Runtime) -> None:
    for args, expected in [  # 122 bytes; there is room for 123
        ("fail " + "\u00e9" * 100, "Processing error: " + "\u00e9" * 52),
        ("quote_target", "Processing error: cannot reach http://127.0.0.1:9***"),
    ]:
        with Peer(echo) as peer:
            peer.send(object_frames(b"x", path="o", etl_args=args))
            assert peer.break_reason() == (1011, expected)
    assert "s3cr3t" not in echo.log()


def test_failures_may_be_answered_as_if_they_were_deliveries(
    start_runtime: StartRuntime, target: StandInTarget
) -> None:
    env = {"NUM_WORKERS": "1", "ETL_WS_FAILURE": "empty"}
    server = start_runtime(make_payload(ECHO, "Echo"), env, expect_traceback=True)
    with Peer(server) as peer:
        for control in ({}, {"pipeline": target.root + FINAL}):
            peer.send(object_frames(b"x", path="bad", etl_args="fail it", **control))
        peer.send(*numbered(1))
        empty, reported, good = peer.objects(3)
        assert (empty, good) == (Frame(TEXT, b"0"), Frame(BINARY, b"0"))
        assert reported.opcode == BINARY
        assert json.loads(reported.payload) == {"detail": "Processing error: it"}
        server.wait_for_line("ERROR - bad: Processing error: it")
