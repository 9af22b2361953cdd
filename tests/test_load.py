"""Many clients at once, workers that are killed, a pod that is told to stop, and a long run.

All load comes from one asyncio client in this process; every answer names its object, so that a
cut, mixed or repeated one is noticed. The long run is deselected unless asked for, by
`tests/run.py -m soak tests/test_load.py -s`; the variable SOAK_SECONDS shortens it.
"""
import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import struct
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import (
    Awaitable, Callable, Dict, Iterable, List, NamedTuple, Optional, Set, Tuple, TypeVar)

import pytest

from conftest import StartRuntime
from harness import QUICK_NUMBERS, Numbers, Runtime, children_of, make_payload
from standin import StandInTarget

T = TypeVar("T")
PROBE_SECONDS = 5.0  # a kubelet waits no longer
FEW_THREADS = {**QUICK_NUMBERS, "THREAD_LIMIT": 32}
AT_ONCE = 100  # connections that are opened at the same time
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MANY_FILES = '''
    def __init__(self):
        super().__init__()
        self.files = []
        try:  # so that those of connections have large numbers, as where there are a thousand
            self.files += (open(os.devnull) for _ in range(1100))
        except OSError:
            self.files = []
'''
SUBJECT = '''
import hashlib, os, time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Subject(HTTPMultiThreadedServer):
    """Does what the arguments tell, and says by default which object it was given."""

    def transform(self, data, path, etl_args):
        word, _, rest = etl_args.partition(" ")
        return getattr(self, word or "name")(data, path, rest)

    def name(self, data, path, _):
        return "%s %s" % (path, hashlib.sha256(data).hexdigest())

    def sleep(self, data, path, seconds):
        time.sleep(float(seconds))
        return self.name(data, path, "")

    def wait(self, data, path, file):
        while not os.path.exists(file):
            time.sleep(0.02)
        return self.name(data, path, "")

    def pid(self, data, path, seconds):
        time.sleep(float(seconds))
        return b"%d" % os.getpid()

    def note(self, data, path, file):
        """Write down when an object is begun and done."""
        with open(file, "a", buffering=1) as notes:
            print("begun", path, file=notes)
            time.sleep(0.05)
            print("done", path, file=notes)
        return self.name(data, path, "")

    def echo(self, data, path, _):
        return data

    def fail(self, data, path, _):
        raise ValueError("as it was told")
''' + MANY_FILES
STREAMER = '''
import os
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Streamer(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        for piece in iter(lambda: reader.read(100000), b""):
            yield piece
            if etl_args == "fail":
                raise ValueError("as it was told")
''' + MANY_FILES


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
        """Read one answer, whatever announces it (100 Continue) apart."""
        reader, _ = await self.open()
        head = b""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            status, fields = parse_head(head)
            body = b"" if status in (100, 204) else await read_body(reader, fields)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            if head or getattr(error, "partial", b""):
                raise CutShort(repr(error)) from error
            raise NoAnswer(repr(error)) from error
        except BaseException:
            self.close()
            raise
        if fields.get("connection") == "close":
            self.close()
        return Answer(status, body)


def parse_head(head: bytes) -> Tuple[int, Dict[str, str]]:
    """Return the status and the fields, names and values in lower case."""
    line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    pairs = (text.lower().partition(":") for text in lines)
    return int(line.split(" ")[1]), {name: value.strip() for name, _, value in pairs}


async def read_body(reader: asyncio.StreamReader, fields: Dict[str, str]) -> bytes:
    """Read a body to the end that its head promises."""
    if fields.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(fields["content-length"]))
    body = bytearray()
    size = -1
    while size:
        size = int(await reader.readuntil(b"\r\n"), 16)
        body += (await reader.readexactly(size + 2))[:-2]
    return bytes(body)


def put(path: str, body: bytes = b"", arguments: str = "", fields: str = "") -> bytes:
    """Make a PUT request of one object."""
    query = "?etl_args=" + arguments.replace(" ", "%20") if arguments else ""
    return b"PUT %b%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n%b" % (
        path.encode(), query.encode(), len(body), fields.encode(), body)


def put_chunked(path: str, body: bytes, arguments: str = "") -> bytes:
    """Make a PUT request whose body goes out in chunks."""
    head = put(path, b"", arguments).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    pieces = [body[start:start + 50000] for start in range(0, len(body), 50000)]
    return b"".join([head, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"])


def named(path: str, body: bytes = b"") -> Answer:
    """Return the right answer of the class: it names the object."""
    return Answer(200, ("%s %s" % (path, hashlib.sha256(body).hexdigest())).encode())


async def in_turns(calls: Iterable[Callable[[], Awaitable[T]]]) -> List[T]:
    """Make calls, a bounded number of them at the same time, and return their results in order."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with turn:
            return await call()

    return list(await asyncio.gather(*map(one, calls)))


async def ask_once(port: int, request: bytes) -> Answer:
    """Ask on a connection of its own; TimeoutError if the answer is not there before a kubelet gives up."""
    connection = Connection(port)
    try:
        return await asyncio.wait_for(connection.exchange(request), PROBE_SECONDS)
    finally:
        connection.close()


async def probe_until(port: int, end: asyncio.Event) -> List[float]:
    """Send probes as a kubelet does, but more of them, until the end; return how long each took."""
    seconds: List[float] = []
    while not end.is_set():
        begun = time.monotonic()
        assert await ask_once(port, HEALTH) == (200, b"Running")
        seconds.append(time.monotonic() - begun)
        await asyncio.sleep(0.2)
    return seconds


@pytest.fixture
def start(start_runtime: StartRuntime) -> Callable[..., Runtime]:
    """A function that serves the class of these tests by so many workers, with further variables."""

    def start_subject(workers: int, numbers: Numbers = QUICK_NUMBERS, **env: str) -> Runtime:
        variables = {"NUM_WORKERS": str(workers), **env}
        return start_runtime(make_payload(SUBJECT, "Subject"), variables, numbers=numbers)

    return start_subject


# == A crowd ==


async def drip(port: int, number: int) -> bool:
    """Send a request slowly: every second one its head, the others their body. Tell whether it was answered right."""
    path, body = "/b/slow-%d" % number, b"%020d" % number
    request = put(path, body)
    begin = request.index(b"Host:") if number % 2 else request.index(body)
    end = begin + 20  # so all take about as long
    slowly = [request[at:at + 1] for at in range(begin, end)]
    connection = Connection(port)
    answer = await connection.exchange(request[:begin], *slowly, request[end:], pause=0.1)
    connection.close()
    return answer == named(path, body)


async def work_until(port: int, name: str, end: asyncio.Event) -> Counter[bool]:
    """Be a busy client; count the answers that are right and those that are not."""
    count: Counter[bool] = Counter()
    connection = Connection(port)
    while not end.is_set():
        path, body = "/b/%s-%d" % (name, sum(count.values())), name.encode() * 200
        answer = await connection.exchange(put(path, body, "sleep 0.01"))
        count[answer == named(path, body)] += 1
        await asyncio.sleep(0.05)  # this client has one processor at most
    connection.close()
    return count


async def be_a_crowd(port: int, idle_count: int, slow_count: int, busy_count: int) -> None:
    """Have idle, slow and busy clients at once, and probes."""
    idle = [Connection(port) for _ in range(idle_count)]
    await in_turns(each.open for each in idle[::2])  # half of them have never asked for anything
    asked = await in_turns(partial(each.exchange, put("/b/idle")) for each in idle[1::2])
    assert set(asked) == {named("/b/idle")}
    end = asyncio.Event()
    busy = [asyncio.ensure_future(work_until(port, "busy-%d" % number, end)) for number in range(busy_count)]
    probes = asyncio.ensure_future(probe_until(port, end))
    slow = await asyncio.gather(*(drip(port, number) for number in range(slow_count)))
    end.set()
    counts = sum(await asyncio.gather(*busy), Counter[bool]())
    seconds = await probes
    print("%d answers to busy clients; %d probes, the slowest took %.2f s" % (counts[True], len(seconds), max(seconds)))
    assert slow == [True] * slow_count
    assert not counts[False] and counts[True] >= busy_count
    again = await in_turns(partial(each.exchange, put("/b/again")) for each in idle)
    assert set(again) == {named("/b/again")}
    for connection in idle:
        connection.close()


def test_more_idle_clients_than_threads_and_many_slow_ones_hold_up_nobody(
    start: Callable[..., Runtime]
) -> None:
    server = start(2, FEW_THREADS)
    asyncio.run(be_a_crowd(server.port, 160, 30, 8))


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


async def count_pids(port: int, clients: int, seconds: float) -> Counter[int]:
    """Keep connections busy for some seconds; count the answers of each worker."""
    count: Counter[int] = Counter()
    end = time.monotonic() + seconds

    async def work() -> None:
        connection = Connection(port)
        while time.monotonic() < end:
            count[int((await connection.exchange(put("/b/o", b"x" * 1000, "pid 0.002"))).body)] += 1
        connection.close()

    await asyncio.gather(*(work() for _ in range(clients)))
    return count


@pytest.mark.alone
def test_work_spreads_over_all_workers(start: Callable[..., Runtime]) -> None:
    server = start(3)
    shares = []
    for _ in range(5):  # each time by new connections
        count = asyncio.run(count_pids(server.port, 60, 0.3))
        shares.append(min(count.values()) / sum(count.values()) if len(count) == 3 else 0.0)
    assert sorted(shares)[2] > 0.24, "the shares of the least busy of three workers: %s" % shares


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


async def kill_workers(server: Runtime, seed: int, seconds: float) -> int:
    """Kill a worker every 200 ms; return how many."""
    chance, killed = random.Random(seed), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await asyncio.sleep(0.2)
        victims = children_of(server.pid)
        if victims:
            with contextlib.suppress(ProcessLookupError):  # the one before is not reaped yet
                os.kill(chance.choice(victims), signal.SIGKILL)
                killed += 1
    return killed


async def wait_for_all_workers(server: Runtime) -> None:
    """Send requests on new connections until every worker has answered one."""
    seen: Set[int] = set()
    while not seen.issuperset(children_of(server.pid)):
        answers = await in_turns(partial(ask_once, server.port, put("/b/o", b"", "pid 0.02")) for _ in range(32))
        seen |= {int(answer.body) for answer in answers}


async def send_while_workers_are_killed(server: Runtime, seed: int, seconds: float) -> Counter[str]:
    """Have 16 clients send objects, and kill workers once each of these has answered something."""
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

    await wait_for_all_workers(server)
    clients = [asyncio.ensure_future(work(client)) for client in range(16)]
    killed = await kill_workers(server, seed, seconds)
    end.set()
    await asyncio.gather(*clients)
    print("%d workers killed: %s" % (killed, dict(outcomes)))
    return outcomes


@ON_LINUX
@pytest.mark.parametrize("seconds, numbers", [
    (3.0, QUICK_NUMBERS), pytest.param(30.0, None, marks=pytest.mark.slow),
], ids=["for 3 s", "for 30 s"])
def test_no_object_comes_out_wrong_while_workers_are_killed(
    start: Callable[..., Runtime], seconds: float, numbers: Numbers
) -> None:
    server = start(4, numbers)
    outcomes = asyncio.run(send_while_workers_are_killed(server, 1, seconds))
    assert server.process.poll() is None, "the pod has ended: %s" % server.lines[-1]
    assert not outcomes["wrong"]
    assert outcomes["right"] > 20 * outcomes["failed"]
    assert server.request("PUT", "/b/o", b"hello").body == named("/b/o", b"hello").body
    assert server.terminate() == 0


# == Stopped ==


async def work_until_refused(port: int, name: str, notes: Path, answered: Set[str]) -> None:
    """Be a busy client until the pod lets nobody in; collect the objects that were answered right."""
    connection = Connection(port)
    for number in range(100000):
        path = "/b/%s-%d" % (name, number)
        try:
            answer = await connection.exchange(put(path, b"hello", "note %s" % notes))
        except (NoAnswer, CutShort):  # what was never read may be lost
            with contextlib.suppress(OSError):
                await connection.open()
                continue
            return
        if answer == named(path, b"hello"):
            answered.add(path)


async def send_slowly(port: int, number: int, is_invited: asyncio.Semaphore) -> bool:
    """Send a body in 1.5 s, once its worker has begun to read it: it says "100 Continue" then."""
    path, body = "/b/slow-%d" % number, b"%015d" % number
    connection = Connection(port)
    request = put(path, body, fields="Expect: 100-continue\r\n")
    assert (await connection.exchange(request[:-len(body)])).status == 100
    is_invited.release()
    answer = await connection.exchange(*(body[at:at + 1] for at in range(15)), pause=0.1)
    connection.close()
    return answer == named(path, body)


async def stop_under_load(server: Runtime, notes: Path) -> Set[str]:
    """Send SIGTERM to a pod that has busy and slow clients; return the objects that were answered right."""
    answered: Set[str] = set()
    invited = asyncio.Semaphore(0)
    busy = [work_until_refused(server.port, "busy-%d" % client, notes, answered)
            for client in range(24)]
    slow = [send_slowly(server.port, number, invited) for number in range(16)]
    load = asyncio.gather(*busy), asyncio.gather(*slow)
    for _ in slow:
        await invited.acquire()
    await asyncio.sleep(0.5)
    server.process.terminate()
    await load[0]
    assert await load[1] == [True] * len(slow)
    return answered


def test_what_a_worker_has_begun_is_answered_when_the_pod_is_stopped_under_load(
    start: Callable[..., Runtime], tmp_path: Path
) -> None:
    server = start(2)
    answered = asyncio.run(stop_under_load(server, tmp_path / "notes"))
    assert server.wait(25) == 0
    notes = (tmp_path / "notes").read_text().splitlines()
    begun, done = ({line.split(" ")[1] for line in notes if line.startswith(word)} for word in ("begun", "done"))
    print("%d requests were begun" % len(begun))
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
        memory = next(line for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        each.append((int(memory.split()[1]), len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))))
    return Footprint(*map(sum, zip(*each)))


GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # else glibc keeps what threads have freed


async def send_in_a_row(port: int, request: bytes, count: int) -> Counter[int]:
    """Send a request many times on one connection; count the statuses."""
    connection = Connection(port)
    statuses = Counter([(await connection.exchange(request)).status for _ in range(count)])
    connection.close()
    return statuses


@ON_LINUX
def test_streams_delivered_one_after_the_other_need_few_connections(start_runtime: StartRuntime, target: StandInTarget) -> None:
    server = start_runtime(make_payload(STREAMER, "Streamer"), {"NUM_WORKERS": "1"})
    request = put("/b/o", b"hello", fields="Ais-Node-Url: %s/ais%%2F@%%23%%2Fdst%%2Fobj\r\n" % target.root)
    before = footprint_of(server)
    assert asyncio.run(send_in_a_row(server.port, request, 60)) == {204: 60}
    assert footprint_of(server).files <= before.files + 10


async def go_away_unanswered(port: int, times: int) -> None:
    """Reset connections whose answer has begun and is too large to have been sent."""
    request = put("/b/o", bytes(8 << 20), "echo")
    for _ in range(times):
        connection = Connection(port)
        await connection.send([request])
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
SETTLE_SECONDS = 27.0  # connections to other nodes are closed when they have been idle for 20 s, looked at every 5 s
CLIENTS = 16
OBJECT_PATH = "/ais%2F@%23%2Fbck%2Fobj"
SIZES = (0, 1, 1000, 70000, 1 << 20, 4 << 20)


class Soak:
    """All kinds of requests in random order; each method sends one and checks its answer, and those of KINDS are picked."""

    KINDS = (
        "sized", "sized", "sized", "chunked", "by_name", "by_name", "pulled", "small", "refused", "failing", "streamed",
        "streamed", "stream_fails", "direct", "direct", "direct_stream", "aborted", "aborted", "unread", "empty",
    )

    def __init__(self, buffered: Runtime, streaming: Runtime, target: StandInTarget, file: Path) -> None:
        self.servers = [buffered, streaming]
        self.counts: Counter[str] = Counter()
        self._target = target
        self._file = file
        self._chance = random.Random(1)
        self._bodies = [self._chance.getrandbits(8 * size + 8).to_bytes(size + 1, "big")[:size] for size in SIZES]
        self._deliver = "Ais-Node-Url: %s/ais%%2F@%%23%%2Fdst%%2Fobj\r\n" % target.root

    async def run(self, seconds: float) -> None:
        """Have all clients at work for so long, and leave no connection behind."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._work(end) for _ in range(CLIENTS)))

    async def _work(self, end: float) -> None:
        buffered, streaming = (Connection(server.port) for server in self.servers)
        while time.monotonic() < end:
            kind = self._chance.choice(self.KINDS)
            await getattr(self, kind)(streaming if "stream" in kind else buffered, self._chance.choice(self._bodies))
            self.counts[kind] += 1
            self._target.requests.clear()  # the stand-in keeps all that it gets
            await asyncio.sleep(self._chance.random() * 0.05)
        buffered.close()
        streaming.close()

    async def sized(self, connection: Connection, body: bytes) -> None:
        """Have an object of some size transformed into one of the same size."""
        assert await connection.exchange(put("/b/o", body, "echo")) == (200, body)

    async def chunked(self, connection: Connection, body: bytes) -> None:
        """Send an object of unknown size."""
        assert await connection.exchange(put_chunked("/b/o", body)) == named("/b/o", body)

    async def by_name(self, connection: Connection, _: bytes) -> None:
        """Have a file read."""
        request = put("/b/o?etl_fqn=%s" % self._file)
        assert await connection.exchange(request) == named("/b/o", self._file.read_bytes())

    async def pulled(self, connection: Connection, _: bytes) -> None:
        """Have an object read from the target."""
        request = put(OBJECT_PATH).replace(b"PUT", b"GET", 1)
        assert await connection.exchange(request) == named(OBJECT_PATH, self._target.objects[OBJECT_PATH])

    async def small(self, connection: Connection, _: bytes) -> None:
        """Send a probe."""
        assert await connection.exchange(HEALTH) == (200, b"Running")

    async def refused(self, connection: Connection, _: bytes) -> None:
        """Ask for what there is not."""
        request, status = self._chance.choice([*SMALL_REQUESTS, (put("/b/o?etl_fqn=/nowhere/@ais/b/%25ob/o"), 403)])
        assert (await connection.exchange(request)).status == status

    async def failing(self, connection: Connection, body: bytes) -> None:
        """Have the class fail."""
        assert (await connection.exchange(put("/b/o", body, "fail"))).status == 500

    async def streamed(self, connection: Connection, body: bytes) -> None:
        """Have an object streamed, of known or unknown size."""
        make = self._chance.choice([put, put_chunked])
        assert await connection.exchange(make("/b/o", body)) == (200, body)

    async def stream_fails(self, connection: Connection, body: bytes) -> None:
        """Have a stream fail: behind its first piece, if it has one. A reset can take the begun answer away."""
        with contextlib.suppress(CutShort, NoAnswer):
            assert await connection.exchange(put("/b/o", body, "fail")) == (200, b"")
            assert not body

    async def direct(self, connection: Connection, body: bytes) -> None:
        """Have a result delivered to the target."""
        assert await connection.exchange(put("/b/o", body, "echo", self._deliver)) == (204, b"")

    async def direct_stream(self, connection: Connection, body: bytes) -> None:
        """Have a stream delivered to the target."""
        assert await connection.exchange(put("/b/o", body, fields=self._deliver)) == (204, b"")

    async def aborted(self, connection: Connection, body: bytes) -> None:
        """Go away in the middle of a request."""
        request = put("/b/o", body)
        await connection.send([request[:self._chance.randrange(len(request))]])
        connection.close(self._chance.random() < 0.5)

    async def unread(self, connection: Connection, body: bytes) -> None:
        """Go away without reading the answer, or all of it."""
        await connection.send([put("/b/o", body, "echo")])
        await asyncio.sleep(self._chance.random() * 0.05)
        connection.close(self._chance.random() < 0.5)

    async def empty(self, connection: Connection, _: bytes) -> None:
        """Connect, say nothing, and go."""
        connection.close()
        await connection.open()
        connection.close(self._chance.random() < 0.5)


async def soak(load: Soak, seconds: float) -> Tuple[Footprint, Footprint]:
    """Return what the pods hold after the first minute, or a quarter of a short run, and at the end."""
    found = []
    first = min(60.0, seconds / 4)
    for part in (first, seconds - first):
        await load.run(part)
        await asyncio.sleep(SETTLE_SECONDS)
        found.append(footprint_of(*load.servers))
    return found[0], found[1]


@ON_LINUX
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 2 * SETTLE_SECONDS + 120)
def test_a_long_run_leaves_nothing_behind(start_runtime: StartRuntime, target: StandInTarget, tmp_path: Path) -> None:
    file = tmp_path / "object"
    file.write_bytes(b"from a file " * 10000)
    target.objects[OBJECT_PATH] = b"from the target " * 10000
    env = {"ETL_FQN_ROOTS": str(tmp_path), "NUM_WORKERS": "2", **GIVE_BACK}
    payloads = [make_payload(SUBJECT, "Subject"), make_payload(STREAMER, "Streamer")]
    servers = [start_runtime(payload, env, expect_traceback=True, numbers=None)  # the class fails
               for payload in payloads]
    workers = [children_of(server.pid) for server in servers]
    load = Soak(servers[0], servers[1], target, file)
    first, last = asyncio.run(soak(load, SOAK_SECONDS))
    print("%d requests in %.0f s: %s" % (sum(load.counts.values()), SOAK_SECONDS, dict(load.counts)))
    print("after the first minute: %s\nat the end: %s" % (first, last))
    assert [children_of(server.pid) for server in servers] == workers
    assert last.memory_kib <= 1.1 * first.memory_kib + (8 << 10)
    assert last.files <= first.files + 8
    assert last.threads <= first.threads + CLIENTS
    assert [server.terminate() for server in servers] == [0, 0]
