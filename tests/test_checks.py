"""The linters as tests: what they say of the runtime is nothing."""
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Sequence

import pytest

import pythons

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [
    ["flake8", "ais_runtime_min.py", "tests"], ["mypy", "ais_runtime_min.py"]])
def test_a_linter_finds_nothing(command: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout


def test_the_project_can_be_installed_and_its_script_runs(tmp_path: Path) -> None:
    folder = tmp_path / "installed"
    try:
        uv = pythons.tool("uv")
    except pythons.Missing as reason:
        pytest.skip(str(reason))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ais_runtime_min.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([str(uv), "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), str(source)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout
    shown = subprocess.run([str(folder / "bin" / "ais-runtime-min"), "--version"], stdout=subprocess.PIPE,
                           universal_newlines=True)
    assert shown.returncode == 0 and shown.stdout.strip()
