"""Requests per second: each peer in turn, round by round, after it has shown that it answers with the right bytes."""
import contextlib
import http.client
import statistics
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Type
from urllib.parse import quote

import psutil

from bench.load import Load, LoadFailure, Request, WebSocketRequest, run_websocket, run_wrk
from bench.scenarios import Scenario
from bench.servers import Peers, Place, Server, ServerFailure, expected_result

LETTERS = b"the quick brown fox jumps over the lazy dog 0123456789 "  # upper-casing changes it
OBJECT_TARGET = "/bck/obj"
DESTINATION = "/ais%2F@%23%2Fdst%2Fobj?uuid=x&owt=0"
PAUSE_SECONDS = 0.2  # for what the last run left in flight
SETTLE_SECONDS = 0.5  # between two looks at a server that is to be at rest
SETTLE_LIMIT_SECONDS = 30.0
REST_SHARE = 0.04  # of a processor: what uvicorn's and gunicorn's supervisors take when nothing happens


class Figure(NamedTuple):
    """A median over the rounds, and the rounds; a latency only where there was load. `note` says why there is no value."""

    value: Optional[float]
    runs: List[float]
    p50_ms: Optional[float] = None
    p99_ms: Optional[float] = None
    note: str = ""


Figures = Dict[str, Dict[str, Figure]]  # by scenario and peer


class Effort(NamedTuple):
    """How long to measure."""

    seconds: int
    rounds: int
    workers: int
    warm_up: bool


def say(text: str, *values: object) -> None:
    """Tell the user of progress; results go to stdout, this does not."""
    print(text % values, file=sys.stderr, flush=True)


def processes(server: Server) -> List[psutil.Process]:
    """Return the server's first process and all below it."""
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def settle(server: Server) -> None:
    """Return when the server is at rest: some are healthy with their first worker, while the others still start."""
    spent = _processor_seconds(server)
    for _ in range(int(SETTLE_LIMIT_SECONDS / SETTLE_SECONDS)):
        time.sleep(SETTLE_SECONDS)
        before, spent = spent, _processor_seconds(server)
        if spent - before < REST_SHARE * SETTLE_SECONDS:
            return


def _processor_seconds(server: Server) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes(server))


class Fleet:
    """The servers of one class, started when first asked for; between their turns they idle."""

    def __init__(self, peers: Peers, workers: int) -> None:
        self._peers = peers
        self._workers = workers
        self._kind = (workers, False)
        self._servers: Dict[str, Server] = {}

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill all of them."""
        while self._servers:
            self._servers.popitem()[1].kill()

    def get(self, peer: str, scenario: Scenario) -> Server:
        """Return the peer's server; those of another kind are stopped, to have their memory back."""
        kind = (scenario.workers or self._workers, scenario.streams)
        if kind != self._kind:
            self.stop()
            self._kind = kind
        if peer not in self._servers:
            say("  starting %s", peer)
            self._servers[peer] = self._peers.start(peer, *kind)
            settle(self._servers[peer])
        return self._servers[peer]


# == One request of a scenario ==


class Exchange:
    """What a scenario sends and what must come back; owns the files with its objects."""

    def __init__(self, scenario: Scenario, place: Place, sink: Server) -> None:
        self._scenario = scenario
        self._sink = sink
        self._folder = place.folder
        self.object = (LETTERS * (scenario.size // len(LETTERS) + 1))[:scenario.size]
        self._file = self._write(place.folder)

    def _write(self, folder: Path) -> Path:
        """Put the object where AIStore would have it: only such files are read by path."""
        path = folder / "mp1" / "@ais" / "bck" / "%ob" / ("obj-%d" % self._scenario.size)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.object)
        return path

    def request(self, server: Server) -> Request:
        """Return the request for a server."""
        if self._scenario.kind == "fqn":  # path-escaped, then query-encoded, as the target does
            return Request(server.url(OBJECT_TARGET + "?etl_fqn=" + quote(quote(str(self._file), safe=""), safe="")), None, ())
        headers = ["Ais-Node-Url: " + self._sink.url(DESTINATION)] if self._scenario.kind == "direct" else []
        return Request(server.url(OBJECT_TARGET), self._file, headers)

    def load(self, server: Server, seconds: int) -> Load:
        """Send the request over and over; LoadFailure for a single error."""
        if not self._scenario.is_websocket:
            return run_wrk(self.request(server), self._scenario.connections, seconds)
        control, body = {"path": OBJECT_TARGET[1:]}, self._file
        if self._scenario.kind == "ws-fqn":
            control, body = {**control, "fqn": quote(str(self._file), safe="")}, None
        request = WebSocketRequest(server.port, control, body, expected_result(self.object, streaming=False))
        return run_websocket(request, self._scenario.connections, seconds, self._folder)

    def check(self, server: Server) -> None:
        """Send the request once; raise ServerFailure unless the result is right to the byte."""
        if self._scenario.is_websocket:
            return  # every result of the load is compared
        request = self.request(server)
        expected = expected_result(self.object, self._scenario.streams)
        headers = dict(header.split(": ", 1) for header in request.headers)
        target = request.url.split(str(server.port), 1)[1]
        status, result = fetch(server, "PUT", target, self.object if request.body else b"", headers)
        if self._scenario.kind == "direct":
            status, result = (200 if status == 204 else status), fetch(self._sink, "GET", "/last")[1]
        if (status, result) != (200, expected):
            raise ServerFailure("%s answers %s with %d bytes, which is wrong: %r | %s" % (
                server.name, self._scenario.name, len(result), result[:80], server.last_words()))


def fetch(
    server: Server, method: str, target: str, body: bytes = b"", headers: Optional[Dict[str, str]] = None
) -> Tuple[int, bytes]:
    """Send one request and return status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, target, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()


def delivered(sink: Server) -> Tuple[int, int]:
    """Return how many objects and bytes the sink has, once nothing more comes."""
    counts = [fetch(sink, "GET", "/count")[1]]
    while len(counts) < 2 or counts[-1] != counts[-2]:
        time.sleep(PAUSE_SECONDS)
        counts.append(fetch(sink, "GET", "/count")[1])
    objects, size = counts[-1].split()
    return int(objects), int(size)


# == Runs ==


def measure(
    scenarios: Iterable[Scenario], peers: Peers, place: Place, sink: Server, effort: Effort
) -> Iterator[Tuple[str, Dict[str, Figure]]]:
    """Yield the figures of each scenario as they are there."""
    with Fleet(peers, effort.workers) as fleet:
        for scenario in scenarios:
            say("%s: %s", scenario.name, scenario.title)
            exchange = Exchange(scenario, place, sink)
            servers = [fleet.get(peer, scenario) for peer in scenario.peers]
            yield scenario.name, _measure_one(scenario, exchange, servers, sink, effort)


def _measure_one(
    scenario: Scenario, exchange: Exchange, servers: List[Server], sink: Server, effort: Effort
) -> Dict[str, Figure]:
    for server in servers:
        exchange.check(server)
        if effort.warm_up:
            with contextlib.suppress(LoadFailure):  # which the first round meets again
                exchange.load(server, 1)
    loads: Dict[str, List[Load]] = {server.name: [] for server in servers}
    notes: Dict[str, str] = {}
    for number in range(effort.rounds):
        for server in servers:
            try:
                loads[server.name].append(_run_once(scenario, exchange, server, sink, effort.seconds))
            except LoadFailure as failure:
                notes[server.name] = str(failure)
        say("  round %d: %s", number + 1, "  ".join(_last(name, loads[name], notes) for name in loads))
    return {name: figure_of(runs, notes.get(name, "")) for name, runs in loads.items()}


def _last(name: str, runs: List[Load], notes: Dict[str, str]) -> str:
    return "%s %s" % (name, notes.get(name) or "%.0f" % runs[-1].per_second)


def figure_of(runs: List[Load], note: str) -> Figure:
    """Return the median of the rounds; a round with errors takes the figure away."""
    if note:
        return Figure(None, [run.per_second for run in runs], note=note)
    middle = sorted(runs, key=lambda run: run.per_second)[len(runs) // 2]
    value = statistics.median(run.per_second for run in runs)
    return Figure(value, [run.per_second for run in runs], middle.p50_ms, middle.p99_ms)


def _run_once(scenario: Scenario, exchange: Exchange, server: Server, sink: Server, seconds: int) -> Load:
    """Run the load once, and check that all that was answered has come whole: to wrk, or to the sink."""
    direct = scenario.kind == "direct"
    before = delivered(sink) if direct else (0, 0)
    load = exchange.load(server, seconds)
    if direct:
        after = delivered(sink)
        _check_delivery(after[0] - before[0], after[1] - before[1], load, scenario)
    elif load.received_bytes < load.requests * scenario.size:
        raise LoadFailure("%d answers have only %d bytes" % (load.requests, load.received_bytes))
    time.sleep(PAUSE_SECONDS)
    return load


def _check_delivery(objects: int, size: int, load: Load, scenario: Scenario) -> None:
    """wrk ends amid requests, one for each connection, which may be delivered without being counted."""
    if size != objects * scenario.size or not load.requests <= objects <= load.requests + scenario.connections:
        raise LoadFailure("wrk counts %d deliveries, the sink %d objects in %d bytes" % (load.requests, objects, size))
