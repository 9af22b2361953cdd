"""What is measured, of whom, and what must come out: data alone, nothing here runs anything."""
from typing import Dict, NamedTuple, Optional, Tuple

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
CLASSES_UPPER_BYTES = 64 * KIB  # smaller objects are upper-cased, larger ones returned as they are

PEERS: Dict[str, str] = {
    "ours": "ours",
    "ours-fastapi": "ours, FastAPI class",
    "fastapi": "SDK FastAPI",
    "threaded": "SDK threaded",
    "flask": "SDK Flask",
    "ours-script": "ours, as a script",
    "before": "before",
    "before-fastapi": "before, FastAPI class",
    "before-script": "before, as a script",
    "imports": "bare imports",
}
BEFORE = {"ours": "before", "ours-fastapi": "before-fastapi", "ours-script": "before-script"}  # the same of another file
SERVERS = ("ours", "ours-fastapi", "fastapi", "threaded", "flask")
UNITS = {"start": "ms", "memory": "MiB", "growth": "MiB"}  # of the kinds that send no load; the others count requests per second


class Scenario(NamedTuple):
    """One thing to measure; `name` is what `--only` looks at, and `size` is that of one object, in bytes."""

    name: str
    title: str
    kind: str
    size: int
    connections: int
    peers: Tuple[str, ...]
    workers: Optional[int] = None  # of each server; None: as many as the command line says

    @property
    def unit(self) -> str:
        """What its figures count."""
        return UNITS.get(self.kind, "requests/s")

    @property
    def is_load(self) -> bool:
        """Whether it is measured by load."""
        return self.kind not in UNITS

    def beside_before(self) -> "Scenario":
        """Return the scenario with another version of the runtime as a peer, which runs right after ours."""
        return self._replace(peers=tuple(name for peer in self.peers for name in (peer, BEFORE.get(peer)) if name))

    @property
    def is_websocket(self) -> bool:
        """Whether it goes over WebSocket, which wrk does not speak."""
        return self.kind in ("ws", "ws-fqn")

    @property
    def streams(self) -> bool:
        """Whether it wants the class with `transform_stream`."""
        return self.kind in ("stream", "growth")


class Bar(NamedTuple):
    """What a figure must reach: a multiple of the peer's, or without a peer a value of its own."""

    scenario: str
    ours: str
    at_least: bool
    limit: float
    peer: Optional[str]


def _load(kind: str, what: str, size: int, connections: int, peers: Tuple[str, ...] = SERVERS) -> Scenario:
    label, short = ("1 MiB", "1m") if size == MIB else ("1 KiB", "1k")
    many = "%d connection%s" % (connections, "s" if connections > 1 else "")
    return Scenario("%s-%s-%d" % (kind, short, connections), "%s %s, %s" % (what, label, many), kind, size, connections, peers)


def _by_default_workers(scenario: Scenario) -> Scenario:
    """Return a scenario with the default of NUM_WORKERS, also on machines with fewer cores."""
    return scenario._replace(name=scenario.name + "-w4", title=scenario.title + ", 4 workers", workers=DEFAULT_WORKERS,
                             peers=("ours", "ours-fastapi", "fastapi"))


DEFAULT_WORKERS = 4
DELIVERING = ("ours", "fastapi", "threaded")
SCENARIOS = (
    *(_load("put", "PUT", KIB, connections) for connections in (1, 16, 128)),
    *(_load("put", "PUT", MIB, connections) for connections in (1, 8, 16, 128)),
    *(_load("fqn", "by FQN", KIB, connections) for connections in (1, 16, 128)),
    *(_load("fqn", "by FQN", MIB, connections) for connections in (1, 16, 128)),
    *(_by_default_workers(_load(kind, what, KIB, 16)) for kind, what in (("put", "PUT"), ("fqn", "by FQN"))),
    _load("direct", "direct put", KIB, 16, DELIVERING),
    _load("direct", "direct put", MIB, 16, DELIVERING),
    _load("stream", "streamed", MIB, 16, ("ours", "fastapi")),  # the threaded server's end with their connection, see METHOD
    *(_load("ws", "WebSocket, in the message,", size, 8, ("ours", "ours-fastapi", "fastapi")) for size in (KIB, MIB)),
    *(_load("ws-fqn", "WebSocket, by FQN,", size, 8, ("ours", "ours-fastapi", "fastapi")) for size in (KIB, MIB)),
    Scenario("start", "exec to the first healthy answer, 4 workers", "start", 0, 0,
             ("ours", "ours-fastapi", "ours-script", "fastapi", "threaded", "imports")),
    Scenario("memory", "memory (PSS) when idle, 4 workers", "memory", 0, 0,
             ("ours", "ours-script", "fastapi", "threaded")),
    Scenario("stream-memory", "growth of memory over a streamed GiB", "growth", GIB, 1, ("ours", "fastapi")),
)

BARS = (
    Bar("put-1k-16", "ours", True, 3, "fastapi"),
    Bar("put-1k-16", "ours", True, 15, "threaded"),
    Bar("put-1k-16", "ours-fastapi", True, 2.5, "fastapi"),
    Bar("fqn-1k-16", "ours", True, 3.5, "fastapi"),
    Bar("fqn-1k-16", "ours-fastapi", True, 2.5, "fastapi"),
    Bar("fqn-1k-16-w4", "ours", True, 3.5, "fastapi"),
    Bar("fqn-1k-16-w4", "ours-fastapi", True, 2.5, "fastapi"),
    Bar("put-1m-8", "ours", True, 1.7, "fastapi"),
    Bar("direct-1k-16", "ours", True, 5, "fastapi"),
    Bar("direct-1m-16", "ours", True, 2, "fastapi"),
    Bar("ws-1k-8", "ours", True, 2.5, "fastapi"),
    Bar("ws-1m-8", "ours", True, 1, "fastapi"),
    Bar("ws-fqn-1k-8", "ours", True, 4, "fastapi"),
    Bar("ws-fqn-1m-8", "ours", True, 1.5, "fastapi"),
    Bar("start", "ours", False, 0.22, "threaded"),
    Bar("start", "ours", False, 0.06, "fastapi"),
    Bar("start", "ours-script", False, 1.9, "ours"),
    Bar("start", "ours-fastapi", False, 0.06, "fastapi"),
    Bar("memory", "ours", False, 0.12, "fastapi"),
    Bar("memory", "ours", False, 0.5, "threaded"),
    Bar("memory", "ours-script", False, 0.14, "fastapi"),
    Bar("stream-memory", "ours", False, 32, None),
)
