"""The benchmarks run, and fail where they should; what they measure is no matter here."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest

import run
from bench.load import LoadFailure, Request, run_wrk
from bench.scenarios import BARS, SCENARIOS
from conftest import StartTarget
from harness import RUNTIME
from standin import Behaviour

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not on PATH")
ENVIRONMENT = run.ROOT / ".venv" / ("%d.%d" % sys.version_info[:2]) / "bench"
needs_environment = pytest.mark.skipif(not run.is_made(ENVIRONMENT), reason="tests/bench/run.py has not made its environment")


def run_bench(*arguments: str, path: Optional[str] = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(Path(__file__).resolve().parent / "bench" / "run.py"), *arguments]
    env = dict(os.environ, PATH=os.environ["PATH"] if path is None else path)
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=120)


def test_every_scenario_is_listed() -> None:
    done = run_bench("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [scenario.name for scenario in SCENARIOS]


def test_every_bar_compares_what_its_scenario_measures() -> None:
    peers = {scenario.name: scenario.peers for scenario in SCENARIOS}
    for bar in BARS:
        assert bar.ours in peers[bar.scenario]
        assert bar.peer is None or bar.peer in peers[bar.scenario]


def test_without_wrk_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    done = run_bench(path=str(tmp_path))
    assert done.returncode == os.EX_UNAVAILABLE
    assert "apt install wrk" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_file_to_be_measured_against_must_be_there(tmp_path: Path) -> None:
    done = run_bench("--against", str(tmp_path / "nothing.py"))
    assert done.returncode == os.EX_USAGE and "nothing.py" in done.stderr


@needs_wrk
def test_a_load_that_meets_errors_has_no_figure(start_target: StartTarget) -> None:
    target = start_target()
    target.default = Behaviour(status=500)
    with pytest.raises(LoadFailure, match="status errors"):
        run_wrk(Request(target.url + "/obj", None, ()), connections=2, seconds=1)


@needs_wrk
@needs_environment
@pytest.mark.slow
def test_a_quick_run_writes_its_results(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(RUNTIME.read_text() + "\n# another version\n")
    done = run_bench("--quick", "--only", "^stream-1m", "--workers", "1", "--output", str(tmp_path), "--against", str(other))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "results.json").read_text())["figures"]["stream-1m-16"]
    assert list(figures) == ["ours", "before", "fastapi"] and all(figure["value"] > 0 for figure in figures.values())
    row = re.search(r"\| streamed 1 MiB, 16 connections, requests/s +\| ours \| .* \| +([0-9.]+) \(", done.stdout)
    assert row and 0.1 < float(row[1]) < 10
    assert "streamed 1 MiB" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.svg").read_text().startswith("<?xml")
