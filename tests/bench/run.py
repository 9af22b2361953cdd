#!/usr/bin/env python3
"""Measure the runtime beside the SDK's own servers: `python3 tests/bench/run.py [options]`, see `--help`.

The Python that runs this file is the one that is measured. It makes the environments of tests/run.py for it and one more, with
matplotlib and psutil, and runs itself there. `wrk` must be on PATH. The exit code is 1 if a bar is missed or a figure of ours
is missing, 69 if something that it needs is not there, 70 if a server does not start or answers with wrong bytes.
"""
import argparse
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, List, Optional, Sequence

HERE = Path(__file__).resolve().parent
if str(HERE) in sys.path:
    sys.path.remove(str(HERE))  # else `run` would be this file
sys.path.insert(0, str(HERE.parent))

import run  # noqa: E402  tests/run.py
from bench import load, scenarios, servers  # noqa: E402

if TYPE_CHECKING:
    from bench import throughput

ENVIRONMENT = "bench"


def main(argv: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    arguments = parse(argv)
    chosen = [scenario.beside_before() if arguments.against else scenario
              for scenario in scenarios.SCENARIOS if re.search(arguments.only, scenario.name)]
    if not chosen:
        return complain("no scenario matches %r: --list names them" % arguments.only, os.EX_USAGE)
    if arguments.list:
        print("\n".join("%-14s %s (%s)" % (scenario.name, scenario.title, scenario.unit) for scenario in chosen))
        return 0
    if arguments.against and not arguments.against.is_file():
        return complain("--against wants a file, and %s is none" % arguments.against, os.EX_USAGE)
    if load.wrk_is_missing():
        return complain(load.MISSING, os.EX_UNAVAILABLE)
    try:
        environments = run.make_environments([ENVIRONMENT])
    except run.EnvironmentFailure as failure:
        return complain(str(failure), os.EX_UNAVAILABLE)
    go_to(environments / ENVIRONMENT, argv)
    return measure(chosen, environments, arguments)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="tests/bench/run.py", description="Measure the runtime beside the SDK's own servers.")
    parser.add_argument("--seconds", type=int, default=2, help="of load for each figure and round (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of each server under load (default: one per core)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="measure only scenarios whose name matches this "
                        "expression; then nothing is written unless --output says where")
    parser.add_argument("--list", action="store_true", help="name the scenarios, and measure nothing")
    parser.add_argument("--against", type=Path, metavar="FILE", help="another version of the runtime, measured beside it in the "
                        "same rounds; then nothing is written unless --output says where")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for results.json, .md and .svg (default: tests/bench)")
    parser.add_argument("--quick", action="store_true", help="one round of one second, to try the program")
    return parser.parse_args(argv)


def complain(reason: str, code: int) -> int:
    """Say in one line why nothing comes of it."""
    print("tests/bench/run.py: %s" % reason, file=sys.stderr)
    return code


def go_to(environment: Path, argv: Sequence[str]) -> None:
    """Become the same program on the interpreter of the environment, unless it is that already."""
    if not environment.samefile(sys.prefix):
        python = str(run.python_of(environment))
        sys.stdout.flush()
        os.execv(python, [python, str(Path(__file__).resolve()), *argv])


def measure(chosen: List[scenarios.Scenario], environments: Path, arguments: argparse.Namespace) -> int:
    """Measure, tell and write; from here on we are in the environment that has psutil and matplotlib."""
    from bench import plot, report, throughput

    signal.signal(signal.SIGTERM, stop)
    quick = arguments.quick
    effort = throughput.Effort(1 if quick else arguments.seconds, 1 if quick else arguments.rounds, arguments.workers, not quick)
    around = report.circumstances(str(run.python_of(environments / "sdk")), effort)
    if around.busy_percent > 10:
        throughput.say("the processors are %.0f %% busy already: these figures will be worth little", around.busy_percent)
    try:
        figures = all_figures(chosen, environments, effort, arguments.against)
    except servers.ServerFailure as failure:
        return complain(str(failure), os.EX_SOFTWARE)
    is_part = bool(arguments.against or arguments.only)
    output = arguments.output or (None if is_part else HERE)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        report.write(output, figures, around)
        plot.draw(figures, output / "results.svg", "%(CPU)s, %(cores)s cores; " % around.machine + around.date)
    print(report.tables(figures))
    return exit_code(figures)


def all_figures(
    chosen: List[scenarios.Scenario], environments: Path, effort: "throughput.Effort", against: Optional[Path]
) -> "throughput.Figures":
    """Measure the scenarios with load first, then those that want the machine for themselves."""
    from bench import footprint, throughput

    figures: throughput.Figures = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = servers.Place(environments, Path(folder).resolve(), against)
        with servers.start_sink(place) as sink:
            peers = servers.Peers(place, sink.url(servers.ETL_PATH))
            loads = [scenario for scenario in chosen if scenario.is_load]
            figures.update(throughput.measure(loads, peers, place, sink, effort))
            for scenario in chosen:
                if not scenario.is_load:
                    figures[scenario.name] = footprint.measure(scenario, peers, footprint.rounds_of(scenario, effort))
    return figures


def exit_code(figures: "throughput.Figures") -> int:
    """Return 1 where a bar is missed, or one of our own figures is missing."""
    from bench import report

    missed = not all(verdict.reached for verdict in report.judge(figures))
    broken = any(peer.startswith("ours") and figure.value is None
                 for measured in figures.values() for peer, figure in measured.items())
    return 1 if missed or broken else 0


def stop(number: int, frame: Optional[FrameType]) -> None:
    """End on SIGTERM as on Ctrl-C, so that all servers are killed on the way out."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(complain("stopped", 130)) from None
