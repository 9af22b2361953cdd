"""Many clients at once, workers that are killed, a pod that is told to stop, and a long run.

All load comes from one asyncio client in this process; every answer names its object, so that a
cut, mixed or repeated one is noticed. The long run is deselected unless asked for, by
`tests/run.py -m soak -n 0 -s tests/test_load.py`; the variable SOAK_SECONDS shortens it.
"""
import asyncio
import contextlib
import http.client
import os
import random
import re
import signal
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, List, NamedTuple, Optional, Set, Tuple

import pytest

from conftest import StartRuntime
from echo import ECHO
from harness import QUICK_NUMBERS, Numbers, Runtime, children_of, make_payload
from standin import StandInTarget

PROBE_SECONDS = 5.0  # a kubelet waits no longer
FEW_THREADS = {**QUICK_NUMBERS, "THREAD_LIMIT": 32}
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SOURCE = ECHO + '''
class ManyFiles:
    """Has connections get large numbers, as where there are a thousand."""

    def __init__(self):
        super().__init__()
        self.files = []
        try:
            self.files += (open(os.devnull) for _ in range(1100))
        except OSError:
            self.files = []

class Subject(ManyFiles, Echo):
    """Says which object it was given, unless the arguments tell that it returns something else."""

    def transform(self, data, path, etl_args):
        if etl_args == "echo":
            return data
        result = super().transform(data, path, etl_args)
        return "%s %08x" % (path, zlib.crc32(data)) if result is data else result

    def pid(self, seconds, data, path):
        time.sleep(float(seconds))
        return b"%d" % os.getpid()

    def note(self, seconds, data, path):
        """Write down when an object is begun and done."""
        sys.stdout.write("begun %s\\n" % path)
        time.sleep(float(seconds))
        sys.stdout.write("done %s\\n" % path)
        return data

class Streamer(ManyFiles, HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        for piece in iter(lambda: reader.read(100000), b""):
            yield piece
            if etl_args == "fail":
                raise ValueError("as it was told")
'''


# == The client ==


class NoAnswer(Exception):
    """The connection was refused, or ended before an answer: AIStore sends the object again."""


class CutShort(Exception):
    """The connection ended in the middle of an answer: AIStore takes the object for failed."""


class Answer(NamedTuple):
    """An answer that came whole."""

    status: int
    body: bytes


class Connection:
    """A client's connection: opened when it is first needed, kept, opened anew after a failure or an answer that ends it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: Optional[Tuple[asyncio.StreamReader, asyncio.StreamWriter]] = None

    async def open(self) -> Tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the streams, of a new connection if there is none."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        return self._streams

    def close(self, resets: bool = False) -> None:
        """Close the connection, by a reset if so wanted."""
        if self._streams is not None:
            writer = self._streams[1]
            if resets:
                with contextlib.suppress(OSError):  # the server may have closed it just now
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()
            writer.close()
            self._streams = None

    async def send(self, pieces: Iterable[bytes], pause: float = 0.0) -> None:
        """Send pieces with pauses between them; a peer that has stopped reading may have answered."""
        _, writer = await self.open()
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)

    async def exchange(self, *pieces: bytes, pause: float = 0.0) -> Answer:
        """Send one request and read its answer."""
        try:
            await self.send(pieces, pause)
        except OSError as error:
            raise NoAnswer(repr(error)) from error
        return await self.read_answer()

    async def read_answer(self) -> Answer:
        """Read one answer."""
        reader, _ = await self.open()
        head = b""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head[len("HTTP/1.1 "):][:3])
            body = b"" if status == 204 else await read_body(reader, head)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            if head or getattr(error, "partial", b""):
                raise CutShort(repr(error)) from error
            raise NoAnswer(repr(error)) from error
        except BaseException:
            self.close()
            raise
        if b"\r\nconnection: close\r\n" in head:
            self.close()
        return Answer(status, body)


async def read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """Read a body to the end that its head promises."""
    length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head)
    if length:
        return await reader.readexactly(int(length[1]))
    assert b"\r\ntransfer-encoding: chunked\r\n" in head
    body, size = bytearray(), -1
    while size:
        size = int(await reader.readuntil(b"\r\n"), 16)
        body += (await reader.readexactly(size + 2))[:-2]
    return bytes(body)


def put(path: str, body: bytes = b"", arguments: str = "", fields: str = "") -> bytes:
    """Make a PUT request of one object."""
    query = "?etl_args=" + arguments.replace(" ", "%20") if arguments else ""
    return b"PUT %b%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n%b" % (
        path.encode(), query.encode(), len(body), fields.encode(), body)


def named(path: str, body: bytes = b"") -> Answer:
    """Return the right answer of the class: it names the object."""
    return Answer(200, ("%s %08x" % (path, zlib.crc32(body))).encode())


async def ask_once(port: int, request: bytes) -> Answer:
    """Ask on a connection of its own; TimeoutError if the answer is not there before a kubelet gives up."""
    connection = Connection(port)
    try:
        return await asyncio.wait_for(connection.exchange(request), PROBE_SECONDS)
    finally:
        connection.close()


@pytest.fixture
def start(start_runtime: StartRuntime) -> Callable[..., Runtime]:
    """A function that serves the class of these tests by so many workers, with further variables."""

    def start_subject(workers: int, numbers: Numbers = QUICK_NUMBERS, **env: str) -> Runtime:
        variables = {"NUM_WORKERS": str(workers), **env}
        return start_runtime(make_payload(SOURCE, "Subject"), variables, numbers=numbers)

    return start_subject


# == A crowd ==


async def drip(port: int, number: int) -> None:
    """Send a request slowly: every second one its head, the others their body."""
    path, body = "/b/slow-%d" % number, b"%020d" % number
    request = put(path, body)
    begin = request.index(b"Host:") if number % 2 else request.index(body)
    end = begin + 20  # so all take about as long
    slowly = [request[at:at + 1] for at in range(begin, end)]
    connection = Connection(port)
    answer = await connection.exchange(request[:begin], *slowly, request[end:], pause=0.1)
    connection.close()
    assert answer == named(path, body)


async def work_until(port: int, name: str, end: asyncio.Event) -> None:
    """Be a busy client until the end."""
    connection, number = Connection(port), 0
    while not end.is_set() or not number:
        path, body, number = "/b/%s-%d" % (name, number), name.encode() * 200, number + 1
        assert await connection.exchange(put(path, body, "sleep 0.01")) == named(path, body)
        await asyncio.sleep(0.05)  # this client has one processor at most
    connection.close()


async def probe_until(port: int, end: asyncio.Event) -> None:
    """Send probes as a kubelet does, but more of them."""
    while not end.is_set():
        assert await ask_once(port, HEALTH) == (200, b"Running")
        await asyncio.sleep(0.2)


async def be_a_crowd(port: int) -> None:
    """Have idle, slow and busy clients at once, and probes."""
    idle = [Connection(port) for _ in range(160)]
    await asyncio.gather(*(each.open() for each in idle[::2]))  # they have never asked for anything
    asked = await asyncio.gather(*(each.exchange(put("/b/idle")) for each in idle[1::2]))
    assert set(asked) == {named("/b/idle")}
    end = asyncio.Event()
    others = [asyncio.ensure_future(work_until(port, "busy-%d" % number, end)) for number in range(8)]
    others.append(asyncio.ensure_future(probe_until(port, end)))
    await asyncio.gather(*(drip(port, number) for number in range(30)))
    end.set()
    await asyncio.gather(*others)
    again = await asyncio.gather(*(each.exchange(put("/b/again")) for each in idle))
    assert set(again) == {named("/b/again")}
    for connection in idle:
        connection.close()


def test_more_idle_clients_than_threads_and_many_slow_ones_hold_up_nobody(start: Callable[..., Runtime]) -> None:
    asyncio.run(be_a_crowd(start(2, FEW_THREADS).port))


# == Full ==

SMALL_REQUESTS = [
    (HEALTH, 200), (b"PUT / HTTP/1.1\r\nHost: x\r\n\r\n", 404), (b"DELETE /b/o HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    (b"POST /download HTTP/1.1\r\nHost: x\r\n\r\n", 400), (b"not HTTP\r\n\r\n", 400),
]


def health(fields: bytes, body: bytes = b"") -> bytes:
    """Make a probe with further header fields."""
    return HEALTH[:-2] + fields + b"\r\n\r\n" + body


PROBES = [
    HEALTH, b"\r\n" + HEALTH, b"\r\n\r\n\r\n" + HEALTH, HEALTH + put("/b/o"),
    health(b"Content-Length: 2", b"no"),
]
NOT_PROBES = [  # though some look like one
    b"\r", b"\r\n\r\n", b"\r\n" + put("/b/o", b"x"), HEALTH[:-1], health(b"Content-Length: 9"),
    health(b"Content-Length: 2", b"n"), health(b"Transfer-Encoding: chunked"),
]


async def probe_while_all_is_busy(port: int, gate: Path) -> None:
    """Have more requests wait than there are slots or threads, and send probes meanwhile."""
    paths = ["/b/waiting-%d" % number for number in range(40)]
    waiting = [Connection(port) for _ in paths]
    others: List[Connection] = []
    for connection, path in zip(waiting, paths):
        await connection.send([put(path, b"x", "wait %s" % gate)])
    try:
        for other in [b"", *NOT_PROBES]:
            for request in [put("/b/o"), *[other] * 12]:  # more than a reserve has
                others.append(Connection(port))
                await others[-1].send([request])
            await asyncio.sleep(0.2)  # all that can be taken up is
            for request, status in [*((probe, 200) for probe in PROBES), *SMALL_REQUESTS]:
                answer = await ask_once(port, request)
                assert answer.status == status, "%r behind %r: %r" % (request, other, answer)
    finally:
        gate.touch()
    answers = await asyncio.gather(*(connection.read_answer() for connection in waiting))
    assert answers == [named(path, b"x") for path in paths]
    for connection in waiting + others:
        connection.close()


@pytest.mark.parametrize("numbers", [QUICK_NUMBERS, FEW_THREADS], ids=["slots", "threads"])
def test_probes_and_errors_are_answered_while_more_requests_wait_than_there_are(
    start: Callable[..., Runtime], tmp_path: Path, numbers: Numbers
) -> None:
    server = start(1, numbers, NUM_THREADS="2")
    asyncio.run(probe_while_all_is_busy(server.port, tmp_path / "gate"))
    assert "starting another" not in server.log()


# == Spread ==


async def count_pids(port: int) -> Counter[int]:
    """Keep 60 connections busy for a moment; count the answers of each worker."""
    count: Counter[int] = Counter()
    end = time.monotonic() + 0.3

    async def work() -> None:
        connection = Connection(port)
        while time.monotonic() < end:
            count[int((await connection.exchange(put("/b/o", b"x" * 1000, "pid 0.002"))).body)] += 1
        connection.close()

    await asyncio.gather(*(work() for _ in range(60)))
    return count


@pytest.mark.alone
def test_work_spreads_over_all_workers(start: Callable[..., Runtime]) -> None:
    server = start(3)
    shares = []
    for _ in range(5):  # each time by new connections
        count = asyncio.run(count_pids(server.port))
        shares.append(min(count.values()) / sum(count.values()) if len(count) == 3 else 0.0)
    assert sorted(shares)[2] > 0.24, "the shares of the least busy of three workers: %s" % shares


@pytest.mark.alone
def test_the_first_connections_of_a_pod_spread_over_all_workers(
        start: Callable[..., Runtime]) -> None:
    least = []
    for _ in range(5):
        server, pids = start(2, LOG_LEVEL="DEBUG"), Counter[str]()
        server.wait_for_line("all workers are ready")  # the pod opens with the first one
        with contextlib.ExitStack() as stack:
            for _ in range(16):  # one after the other, and all stay open
                client = stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)))
                client.request("PUT", "/b/o?etl_args=pid+0", b"x")
                pids[client.getresponse().read().decode()] += 1
        least.append(min(pids.values()) if len(pids) == 2 else 0)
    assert sorted(least)[1] >= 4, "connections of the worker that has least, of 16: %s" % least


# == Killed ==


async def send_as_aistore(connection: Connection, path: str, body: bytes) -> str:
    """Send an object, again while there is no answer; say whether it is "right", "wrong" or told as "failed"."""
    for attempt in range(11):
        try:
            answer = await connection.exchange(put(path, body, "sleep 0.005"))
        except NoAnswer:
            await asyncio.sleep(0.05 * (attempt + 1))
        except CutShort:
            return "failed"
        else:
            return "right" if answer == named(path, body) else "failed" if answer.status >= 500 else "wrong"
    return "failed"


async def send_while_workers_are_killed(server: Runtime, seconds: float) -> Counter[str]:
    """Have 16 clients send objects, and kill a worker every 200 ms once each of these has answered something."""
    outcomes: Counter[str] = Counter()
    end = asyncio.Event()

    async def work(client: int) -> None:
        connection = Connection(server.port)
        number = 0
        while not end.is_set():
            path, number = "/b/object-%d-%d" % (client, number), number + 1
            outcomes[await send_as_aistore(connection, path, path.encode() * 5000)] += 1
            await asyncio.sleep(0.01)
        connection.close()

    while len(await count_pids(server.port)) < 4:
        pass
    clients = [asyncio.ensure_future(work(client)) for client in range(16)]
    chance, until = random.Random(1), time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(0.2)
        with contextlib.suppress(ProcessLookupError, IndexError):  # none is there, or not reaped yet
            os.kill(chance.choice(children_of(server.pid)), signal.SIGKILL)
    end.set()
    await asyncio.gather(*clients)
    return outcomes


@ON_LINUX
@pytest.mark.parametrize("seconds, numbers", [
    (3.0, QUICK_NUMBERS), pytest.param(30.0, None, marks=pytest.mark.slow),
], ids=["for 3 s", "for 30 s"])
def test_no_object_comes_out_wrong_while_workers_are_killed(
    start: Callable[..., Runtime], seconds: float, numbers: Numbers
) -> None:
    server = start(4, numbers)
    outcomes = asyncio.run(send_while_workers_are_killed(server, seconds))
    assert server.process.poll() is None, "the pod has ended: %s" % server.lines[-1]
    assert not outcomes["wrong"] and outcomes["right"] > 20 * outcomes["failed"], outcomes
    assert server.request("PUT", "/b/o", b"hello").body == named("/b/o", b"hello").body
    assert server.terminate() == 0


# == Stopped ==


async def work_until_refused(port: int, name: str, answered: Set[str]) -> None:
    """Be a busy client until the pod lets nobody in; collect the objects that were answered right."""
    connection = Connection(port)
    for number in range(100000):
        path = "/b/%s-%d" % (name, number)
        try:
            answer = await connection.exchange(put(path, b"hello", "note 0.05"))
        except (NoAnswer, CutShort):  # what was never read may be lost
            with contextlib.suppress(OSError):
                await connection.open()
                continue
            return
        if answer == named(path, b"hello"):
            answered.add(path)


async def stop_under_load(server: Runtime) -> Set[str]:
    """Send SIGTERM to a pod that has busy clients; return the objects that were answered right."""
    answered: Set[str] = set()
    clients = [asyncio.ensure_future(work_until_refused(server.port, "busy-%d" % number, answered)) for number in range(24)]
    await asyncio.sleep(1.0)
    server.process.terminate()
    await asyncio.gather(*clients)
    return answered


def test_what_a_worker_has_begun_is_answered_when_the_pod_is_stopped_under_load(start: Callable[..., Runtime]) -> None:
    server = start(2)
    answered = asyncio.run(stop_under_load(server))
    assert server.wait(25) == 0
    begun, done = (set(re.findall(r"(?m)^%s (\S+)$" % word, server.log())) for word in ("begun", "done"))
    assert len(begun) > 24 and begun == done
    assert begun - answered == set()


# == Nothing piles up ==


class Footprint(NamedTuple):
    """What the processes of pods hold."""

    memory_kib: int
    files: int
    threads: int


def footprint_of(*servers: Runtime) -> Footprint:
    """Add up the proportional memory, open files and threads of servers and their workers."""
    each = []
    for pid in [pid for server in servers for pid in [server.pid, *children_of(server.pid)]]:
        folder = Path("/proc/%d" % pid)
        memory = re.search(r"(?m)^Pss: +(\d+)", (folder / "smaps_rollup").read_text())
        assert memory
        each.append((int(memory[1]), len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))))
    return Footprint(*map(sum, zip(*each)))


GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # else glibc keeps what threads have freed


def deliver_to(target: StandInTarget) -> str:
    """Return the field that has a result delivered to a target."""
    return "Ais-Node-Url: %s/ais%%2F@%%23%%2Fdst%%2Fobj\r\n" % target.root


async def deliver_streams(port: int, target: StandInTarget) -> None:
    """Have streams delivered one after the other, on one connection."""
    connection, request = Connection(port), put("/b/o", b"hello", fields=deliver_to(target))
    for _ in range(60):
        assert (await connection.exchange(request)).status == 204
    connection.close()


@ON_LINUX
def test_streams_delivered_one_after_the_other_need_few_connections(start_runtime: StartRuntime, target: StandInTarget) -> None:
    server = start_runtime(make_payload(SOURCE, "Streamer"), {"NUM_WORKERS": "1"})
    before = footprint_of(server)
    asyncio.run(deliver_streams(server.port, target))
    assert footprint_of(server).files <= before.files + 10


async def go_away_unanswered(port: int, times: int) -> None:
    """Reset connections whose answer has begun and is too large to have been sent."""
    for _ in range(times):
        connection = Connection(port)
        await connection.send([put("/b/o", bytes(8 << 20), "echo")])
        reader, _ = await connection.open()
        await reader.readuntil(b"\r\n\r\n")
        connection.close(resets=True)


@ON_LINUX
@pytest.mark.alone
def test_answers_whose_clients_go_away_do_not_stay_in_memory(start: Callable[..., Runtime]) -> None:
    server = start(1, **GIVE_BACK)
    asyncio.run(go_away_unanswered(server.port, 2))
    before = footprint_of(server)
    asyncio.run(go_away_unanswered(server.port, 10))
    deadline = time.monotonic() + 5
    while footprint_of(server).memory_kib > before.memory_kib + (30 << 10):
        assert time.monotonic() < deadline, "%s, and before %s" % (footprint_of(server), before)
        time.sleep(0.05)


# == The long run ==

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
KILL_SECONDS = 15.0  # between two deaths of workers
SETTLE_SECONDS = 27.0  # connections to other nodes are closed when they have been idle for 20 s, looked at every 5 s
CLIENTS = 16
OBJECT_PATH = "/ais%2F@%23%2Fbck%2Fobj"


class Exchange(NamedTuple):
    """A request and its answer; a content of None may be any, a status of 0 is no whole answer."""

    kind: str
    streams: bool
    request: bytes
    status: int
    content: Optional[bytes]


def exchanges_of(body: bytes, target: StandInTarget, file: Path) -> Iterable[Exchange]:
    """Make exchanges of all kinds."""
    sized, path, fields = put("/b/o", body), str(file), deliver_to(target)
    chunks = [b"%x\r\n%b\r\n" % (len(body[at:at + 50000]), body[at:at + 50000]) for at in range(0, len(body), 50000)]
    chunked = b"".join([sized[:sized.index(b"Content")], b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"])
    yield Exchange("echoed", False, put("/b/o", body, "echo"), 200, body)
    yield Exchange("chunked", False, chunked, *named("/b/o", body))
    yield Exchange("by name", False, put("/b/o?etl_fqn=" + path), *named("/b/o", file.read_bytes()))
    yield Exchange("pulled", False, put(OBJECT_PATH).replace(b"PUT", b"GET", 1),
                   *named(OBJECT_PATH, target.objects[OBJECT_PATH]))
    yield Exchange("failing", False, put("/b/o", body, "fail"), 500, None)
    yield Exchange("delivered", False, put("/b/o", body, "echo", fields), 204, b"")
    yield Exchange("streamed", True, sized, 200, body)
    yield Exchange("streamed in chunks", True, chunked, 200, body)
    yield Exchange("failing stream", True, put("/b/o", body, "fail"), 0 if body else 200, b"")
    yield Exchange("stream delivered", True, put("/b/o", body, fields=fields), 204, b"")
    for request, status in [*SMALL_REQUESTS, (put("/b/o?etl_fqn=/nowhere/@ais/b/%25ob/o"), 403)]:
        yield Exchange("small", False, request, status, None)


async def load(servers: List[Runtime], exchanges: List[Exchange], target: StandInTarget, seconds: float) -> Counter[str]:
    """Have all clients at work for so long, in random order; leave no connection behind, and return what was done.

    A worker is killed now and then: what it had in work may fail, and all others must go on.
    """
    counts: Counter[str] = Counter()
    chance, end = random.Random(1), time.monotonic() + seconds
    killed_at = 0.0

    async def kill() -> None:
        nonlocal killed_at
        while time.monotonic() < end - KILL_SECONDS:
            await asyncio.sleep(KILL_SECONDS)
            killed_at = time.monotonic()
            os.kill(chance.choice(children_of(chance.choice(servers).pid)), signal.SIGKILL)
            counts["killed"] += 1

    async def work() -> None:
        connections = [Connection(server.port) for server in servers]
        while time.monotonic() < end:
            kind, streams, request, status, content = chance.choice(exchanges)
            connection = connections[streams]
            goes_away = chance.choice(["", "", "", "", "in the request", "unanswered", "at once"])
            counts["%s %s" % (kind, goes_away)] += 1
            if goes_away:
                size = {"in the request": chance.randrange(len(request)), "at once": 0}.get(goes_away, len(request))
                await connection.send([request[:size]])
                await asyncio.sleep(chance.random() * 0.05)
                connection.close(chance.random() < 0.5)
                continue
            try:
                answer = await connection.exchange(request)
                assert answer.status == status and content in (None, answer.body), kind
            except (CutShort, NoAnswer):  # a reset can take the begun answer away
                assert status == 0 or time.monotonic() - killed_at < KILL_SECONDS / 2, kind
                connection.close()
            target.requests.clear()  # the stand-in keeps all that it gets
            await asyncio.sleep(chance.random() * 0.05)
        for connection in connections:
            connection.close()

    await asyncio.gather(kill(), *(work() for _ in range(CLIENTS)))
    return counts


@ON_LINUX
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 2 * SETTLE_SECONDS + 120)
def test_a_long_run_leaves_nothing_behind(start_runtime: StartRuntime, target: StandInTarget, tmp_path: Path) -> None:
    file = tmp_path / "object"
    file.write_bytes(b"from a file " * 10000)
    target.objects[OBJECT_PATH] = b"from the target " * 10000
    bodies = map(os.urandom, (0, 1, 1000, 70000, 1 << 20, 4 << 20))
    exchanges = [exchange for body in bodies for exchange in exchanges_of(body, target, file)]
    env = {"ETL_FQN_ROOTS": str(tmp_path), "NUM_WORKERS": "2", **GIVE_BACK}
    servers = [start_runtime(make_payload(SOURCE, name), env, expect_traceback=True, numbers=None)  # the class fails
               for name in ("Subject", "Streamer")]
    found = []
    first_seconds = min(60.0, SOAK_SECONDS / 4)
    for seconds in (first_seconds, SOAK_SECONDS - first_seconds):
        print(asyncio.run(load(servers, exchanges, target, seconds)))
        time.sleep(SETTLE_SECONDS)
        found.append(footprint_of(*servers))
    first, last = found
    print("after the first part: %s\nat the end: %s" % (first, last))
    assert [len(children_of(server.pid)) for server in servers] == [2, 2]
    assert last.memory_kib <= 1.1 * first.memory_kib + (8 << 10)
    assert last.files <= first.files + 8
    assert last.threads <= first.threads + CLIENTS
    assert [server.terminate() for server in servers] == [0, 0]
