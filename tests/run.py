#!/usr/bin/env python3
"""Make the test environments and run the tests: `python3 tests/run.py [--all] [pytest arguments]`.

The Python that runs this file is the one that is tested. Four environments are made for it under `.venv/<X.Y>/`:

    test      pytest and the checks; the tests themselves run here
    sdk       the real `aistore[etl]`, which pickles the classes and serves them for comparison
    slim      cloudpickle alone, as in the image: the runtime under test runs here
    sdkcore   cloudpickle and `aistore` without its extras

They are kept until the requirement files or the Python change. `--all` does it for every Python 3.9 to 3.13 that it finds on
PATH or among pyenv's versions, the slow tests for the oldest and the newest alone. A fifth environment, `bench`, is made only for
the benchmarks, tests/bench/run.py.
"""
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests" / "requirements"
GROUPS = ("test", "sdk", "slim", "sdkcore")
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
UV = "uv==0.13.9"
STAMP = "made-from"  # written last, so an environment without it is half made
INSTALL_SECONDS = 900  # the SDK's packages are about 40 MB


class EnvironmentFailure(Exception):
    """An environment could not be made; the text says which and why, in one line."""


def main(argv: Sequence[str]) -> int:
    """Run pytest here or, with `--all`, under every Python; return the exit code."""
    arguments = [argument for argument in argv if argument != "--all"]
    if len(arguments) < len(argv):
        return run_everywhere(arguments)
    try:
        environments = make_environments()
    except EnvironmentFailure as failure:
        print("tests/run.py: %s" % failure, file=sys.stderr)
        return os.EX_UNAVAILABLE
    command = [str(python_of(environments / "test")), "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=str(ROOT), env=test_variables(environments)).returncode


def test_variables(environments: Path) -> Dict[str, str]:
    """Return this process's variables and those that tell the tests where the other interpreters are."""
    others = {"TEST_%s_PYTHON" % group.upper(): str(python_of(environments / group)) for group in GROUPS if group != "test"}
    return {**os.environ, **others}


def python_of(environment: Path) -> Path:
    """Return the interpreter of an environment."""
    return environment / "bin" / "python"


# == Environments ==


def make_environments(further: Sequence[str] = ()) -> Path:
    """Make what is missing or outdated for this Python, the four and `further` ones, and return the folder of all."""
    folder = ROOT / ".venv" / ("%d.%d" % sys.version_info[:2])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits for the first one to make them
        for group in (*GROUPS, *further):  # "test" comes first: it holds the installer of all
            if not is_made(folder / group):
                print("tests/run.py: making %s" % (folder / group).relative_to(ROOT), flush=True)
                make_environment(folder / group, folder / "test")
    return folder


def is_made(environment: Path) -> bool:
    """Tell whether an environment is whole and made from the present requirement files."""
    stamp = environment / STAMP
    return stamp.is_file() and stamp.read_text() == fingerprint(environment.name) and python_of(environment).exists()


def fingerprint(group: str) -> str:
    """Return a digest of what an environment is made from: this Python, and its requirements or those of all four."""
    digest = hashlib.sha256((sys.version + sys.base_prefix + UV).encode())
    for name in sorted(GROUPS) if group in GROUPS else [group]:
        digest.update((REQUIREMENTS / (name + ".txt")).read_bytes())
    return digest.hexdigest()


def make_environment(environment: Path, installer: Path) -> None:
    """Make one environment from nothing; `installer` is the environment that has pip and uv."""
    shutil.rmtree(environment, ignore_errors=True)
    call([sys.executable, "-m", "venv", str(environment)], environment.name)
    if environment == installer:
        install_uv(installer)
    requirements = str(REQUIREMENTS / (environment.name + ".txt"))
    call([*install_command(installer, environment), "-r", requirements], environment.name)
    (environment / STAMP).write_text(fingerprint(environment.name))


def install_uv(installer: Path) -> None:
    """Install uv, or say that pip is used in its place."""
    try:
        call([str(python_of(installer)), "-m", "pip", "install", "--quiet", UV], installer.name)
    except EnvironmentFailure as failure:
        print("tests/run.py: no uv, so pip installs, more slowly (%s)" % failure, flush=True)


def install_command(installer: Path, environment: Path) -> List[str]:
    """Return the command that installs into an environment, but for what it installs."""
    uv = installer / "bin" / "uv"
    if uv.exists():
        return [str(uv), "pip", "install", "--quiet", "--python", str(python_of(environment))]
    return [str(python_of(environment)), "-m", "pip", "install", "--quiet"]


def call(command: List[str], group: str) -> None:
    """Run a command that is to make an environment; its last line is the reason of a failure."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=INSTALL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFailure("cannot make the environment %r: %s" % (group, error)) from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reason = lines[-1] if lines else "exit code %d" % done.returncode
        raise EnvironmentFailure("cannot make the environment %r: %s" % (group, reason))


# == All Pythons ==


def run_everywhere(arguments: List[str]) -> int:
    """Run this file under each Python that is there; return non-zero if one failed or none was found.

    Tests that are slow mostly wait, on any Python alike: without arguments they run on the oldest and the newest alone.
    """
    results: Dict[str, str] = {}
    for version in VERSIONS:
        interpreter = find_python(version)
        if interpreter is None:
            results[version] = "missing"
            continue
        print("tests/run.py: Python %s, %s" % (version, interpreter), flush=True)
        chosen = arguments or ([] if version in (VERSIONS[0], VERSIONS[-1]) else ["-m", "not soak and not slow"])
        code = subprocess.run([interpreter, str(Path(__file__).resolve()), *chosen]).returncode
        results[version] = "passed" if code == 0 else "failed (exit code %d)" % code
    for version, result in results.items():
        print("tests/run.py: Python %-4s %s" % (version, result))
    outcomes = set(results.values()) - {"missing"}
    return 0 if outcomes == {"passed"} else 1


def find_python(version: str) -> Optional[str]:
    """Return a working interpreter of this version, the one that runs this file before any other."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [sys.executable, shutil.which("python" + version)]
    candidates += [str(python) for python in sorted(pyenv.glob("versions/%s.*/bin/python" % version))]
    return next((python for python in candidates if python and version_of(python) == version), None)


def version_of(interpreter: str) -> str:
    """Return an interpreter's "X.Y", or "" if it does not run: pyenv leaves launchers for versions that are switched off."""
    command = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
