"""What came out, in three forms: a table for the terminal, `results.md`, and `results.json`."""
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence

from bench.load import wrk_version
from bench.scenarios import BARS, BEFORE, PEERS, SCENARIOS, Bar, Scenario
from bench.throughput import Effort, Figure, Figures

PACKAGES = ("aistore", "uvicorn", "uvloop", "httptools", "fastapi", "flask", "gunicorn", "cloudpickle")
RATIOS = {"fastapi": "ours / FastAPI", "threaded": "ours / threaded"}
VERSIONS_SCRIPT = "import importlib.metadata, sys; print(*map(importlib.metadata.version, sys.argv[1:]))"
METHOD = """\
Made by `python3 tests/bench/run.py`. All servers run on the machine that also makes the load, on one Python, and take turns
round by round; a figure is the median of its rounds. The load is `wrk` with one thread. Objects below 64 KiB are upper-cased,
larger ones returned as they are; streams are passed on in pieces of 64 KiB. Before its turn each server has shown that its
result is right to the byte, and a run with a single error has no figure. Over WebSocket the load is `wsload.py`, which sends
as a target does, with up to 256 objects or 4 MiB on their way in each connection, and compares every byte of every result.

* *ours* serves a class deriving from `HTTPMultiThreadedServer`, *ours, FastAPI class* one deriving from `FastAPIServer`, on an
  interpreter with cloudpickle alone.
* *SDK FastAPI* is `FastAPIServer` under `uvicorn[standard]` with the options of the default runtime, *SDK Flask* is
  `FlaskServer` under gunicorn, both with as many workers as ours; *SDK threaded* is `HTTPMultiThreadedServer`, one process.
  They are started as the SDK's documentation says. A streamed answer of the threaded server has neither a length nor chunks and
  ends with its connection, which wrk takes for an error, so it is not measured."""
START_METHOD = """\
* Start is the time from exec to the first 200 of `/health`. *ours* is `python -m ais_runtime_min` from cached bytecode, as the
  image runs it; *bare imports* is `python -c "import http.server, cloudpickle"` to its end. *SDK FastAPI* is uvicorn alone:
  what the default runtime does before, importing the SDK a first time and unpickling the class, is not counted.
* Memory is the proportional set size of all processes of an idle server, as it is where no other Python runs beside them."""


HEAVY = "\n## Classes with large imports\n"  # what follows there is heavy.py's


class Verdict(NamedTuple):
    """A bar and what was measured; `value` is the ratio to the peer, or the figure itself, or None where one is missing."""

    bar: Bar
    value: Optional[float]

    @property
    def reached(self) -> bool:
        """Whether the bar is reached; without figures it is not."""
        return self.value is not None and (self.value >= self.bar.limit if self.bar.at_least else self.value <= self.bar.limit)

    @property
    def word(self) -> str:
        """How tables say it."""
        return "reached" if self.reached else "missed"

    def wanted(self) -> str:
        """Say the bar in words."""
        amount = "%s %g" % ("at least" if self.bar.at_least else "at most", self.bar.limit)
        return "%s × %s" % (amount, PEERS[self.bar.peer]) if self.bar.peer else "%s %s" % (amount, scenario_of(self.bar).unit)


def scenario_of(bar: Bar) -> Scenario:
    """Return the scenario of a bar."""
    return next(scenario for scenario in SCENARIOS if scenario.name == bar.scenario)


def judge(figures: Figures) -> List[Verdict]:
    """Hold what was measured to the bars; those of scenarios that were left out are left out."""
    return [Verdict(bar, _measured(figures[bar.scenario], bar)) for bar in BARS if bar.scenario in figures]


def _measured(figures: Dict[str, Figure], bar: Bar) -> Optional[float]:
    return ratio(figures, bar.ours, bar.peer) if bar.peer else figures[bar.ours].value


def ratio(figures: Dict[str, Figure], ours: str, peer: str) -> Optional[float]:
    """Return ours as a multiple of the peer's, or None where one is missing."""
    first, second = figures[ours].value, figures[peer].value if peer in figures else None
    return first / second if first is not None and second else None


# == The machine ==


def busy_percent() -> float:
    """Return how busy the processors are without us, over one second: figures of a busy machine are worth little."""
    before = _processor_times()
    time.sleep(1)
    spent = [after - earlier for earlier, after in zip(before, _processor_times())]
    return 100.0 * (1 - (spent[3] + spent[4]) / sum(spent))  # idle, and waiting for disks


def _processor_times() -> List[int]:
    return [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]


def machine() -> Dict[str, str]:
    """Return what the figures depend on beside the programs."""
    processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {"CPU": processor[0] if processor else platform.machine(), "cores": str(os.cpu_count()),
            "memory": "%.1f GiB" % memory, "kernel": "%s %s" % (platform.system(), platform.release())}


def versions(sdk_python: str) -> Dict[str, str]:
    """Return the versions of all that takes part."""
    command = [sdk_python, "-c", VERSIONS_SCRIPT, *PACKAGES]
    done = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True, check=True)
    return {"Python": platform.python_version(), **dict(zip(PACKAGES, done.stdout.split())), "wrk": wrk_version().split()[-1]}


class Circumstances(NamedTuple):
    """What belongs to figures, and is no figure."""

    date: str
    machine: Dict[str, str]
    versions: Dict[str, str]
    effort: Effort
    busy_percent: float


def circumstances(sdk_python: str, effort: Effort) -> Circumstances:
    """Look at the machine before anything is measured."""
    today = datetime.date.today().isoformat()
    return Circumstances(today, machine(), versions(sdk_python), effort, round(busy_percent(), 1))


# == Tables ==


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with columns of even width, which is readable in a terminal too."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [[line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])] for line in lines]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join("| %s |" % " | ".join(line) for line in [padded[0], rule, *padded[1:]])


def number(value: Optional[float], absent: str = "") -> str:
    """Write a figure with three digits that mean something."""
    if value is None:
        return absent
    return "{:,.0f}".format(value) if abs(value) >= 100 else "%.3g" % value


def _columns(scenarios: Sequence[Scenario]) -> List[str]:
    return [peer for peer in PEERS if any(peer in scenario.peers for scenario in scenarios)]


def _cell(figures: Dict[str, Figure], peer: str) -> str:
    return number(figures[peer].value, "errors") if peer in figures else ""


def load_table(figures: Figures, scenarios: Sequence[Scenario]) -> str:
    """Return requests per second of everybody, and ours as a multiple of two."""
    peers = _columns(scenarios)
    rows = []
    for scenario in scenarios:
        measured = figures[scenario.name]
        ratios = ["%.2f" % value if value else "" for value in (ratio(measured, "ours", peer) for peer in RATIOS)]
        rows.append([scenario.title, *(_cell(measured, peer) for peer in peers), *ratios])
    return table(["requests per second", *(PEERS[peer] for peer in peers), *RATIOS.values()], rows)


def latency_table(figures: Figures, scenarios: Sequence[Scenario]) -> str:
    """Return the median and the 99th percentile of the time to a whole answer."""
    peers = _columns(scenarios)
    rows = [[scenario.title, *(_latency(figures[scenario.name].get(peer)) for peer in peers)] for scenario in scenarios]
    return table(["p50 / p99, ms", *(PEERS[peer] for peer in peers)], rows)


def _latency(figure: Optional[Figure]) -> str:
    return "%s / %s" % (number(figure.p50_ms), number(figure.p99_ms)) if figure and figure.p50_ms is not None else ""


def footprint_table(figures: Figures, scenarios: Sequence[Scenario]) -> str:
    """Return what needs no load."""
    peers = _columns(scenarios)
    rows = [["%s, %s" % (scenario.title, scenario.unit), *(_cell(figures[scenario.name], peer) for peer in peers)]
            for scenario in scenarios]
    return table(["", *(PEERS[peer] for peer in peers)], rows)


def change_table(figures: Figures) -> str:
    """Return what has become of each figure since the other version: the median of the rounds' ratios, and their range."""
    rows = []
    for scenario in SCENARIOS:
        for peer, before in BEFORE.items():
            measured = figures.get(scenario.name, {})
            if before in measured:
                ratios = [now / then for now, then in zip(measured[peer].runs, measured[before].runs) if then]
                whole = ratios and measured[peer].value is not None and measured[before].value is not None
                change = "%.2f (%.2f to %.2f)" % (statistics.median(ratios), min(ratios), max(ratios)) if whole else "no figure"
                rows.append(["%s, %s" % (scenario.title, scenario.unit), PEERS[peer], _cell(measured, before),
                             _cell(measured, peer), change])
    return table(["against the other version", "", "before", "now", "now / before"], rows)


def bars_table(verdicts: Sequence[Verdict]) -> str:
    """Return the bars, and whether they are reached."""
    rows = [[scenario_of(verdict.bar).title, PEERS[verdict.bar.ours], verdict.wanted(), number(verdict.value, "no figure"),
             verdict.word] for verdict in verdicts]
    return table(["bar", "of", "wanted", "measured", ""], rows)


def failures(figures: Figures) -> List[str]:
    """Say which figures are missing, and why."""
    return ["%s, %s: %s" % (scenario, PEERS[peer], figure.note)
            for scenario, measured in figures.items() for peer, figure in measured.items() if figure.value is None]


def tables(figures: Figures) -> str:
    """Return all tables, for the terminal and for `results.md`."""
    measured = [scenario for scenario in SCENARIOS if scenario.name in figures]
    load = [scenario for scenario in measured if scenario.is_load]
    rest = [scenario for scenario in measured if not scenario.is_load]
    parts = [load_table(figures, load), latency_table(figures, load)] if load else []
    parts += [footprint_table(figures, rest)] if rest else []
    parts += [change_table(figures)] if any(set(BEFORE.values()) & set(by_peer) for by_peer in figures.values()) else []
    parts += [bars_table(judge(figures))] if judge(figures) else []
    missing = "\n".join("* No figure for " + failure for failure in failures(figures))
    return "\n\n".join(part for part in (*parts, missing) if part)


# == Files ==


def write(folder: Path, figures: Figures, around: Circumstances) -> None:
    """Write `results.json` and `results.md`."""
    (folder / "results.json").write_text(json.dumps(_as_data(figures, around), indent=1, ensure_ascii=False) + "\n")
    results = folder / "results.md"
    _, heading, of_heavy = (results.read_text(encoding="utf-8") if results.exists() else "").partition(HEAVY)
    results.write_text(_as_markdown(figures, around) + heading + of_heavy, encoding="utf-8")


def _as_data(figures: Figures, around: Circumstances) -> Dict[str, object]:
    bars = [{**verdict.bar._asdict(), "measured": verdict.value, "reached": verdict.reached} for verdict in judge(figures)]
    units = {scenario.name: scenario.unit for scenario in SCENARIOS if scenario.name in figures}
    measured = {name: {peer: figure._asdict() for peer, figure in by_peer.items()} for name, by_peer in figures.items()}
    return {**around._asdict(), "effort": around.effort._asdict(), "units": units, "figures": measured, "bars": bars}


def _as_markdown(figures: Figures, around: Circumstances) -> str:
    facts = ["%s %s" % pair for pair in around.versions.items()]
    effort = around.effort
    where = "%s; %s cores, %s of memory, %s" % tuple(around.machine.values())
    parts = [
        "# Benchmarks", METHOD + "\n" + START_METHOD, "![Requests per second](results.svg)", tables(figures),
        "* %s\n* %s\n* %s\n* %d rounds of %d s, %d workers (4 for start and memory); processors %.0f %% busy before the run" % (
            around.date, where, ", ".join(facts), effort.rounds, effort.seconds, effort.workers, around.busy_percent),
    ]
    return "\n\n".join(parts) + "\n"
