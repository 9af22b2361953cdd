#!/usr/bin/env python3
"""Make the test environments and run the tests: `python3 tests/run.py [--all] [--slow] [pytest arguments]`.

The Python that runs this file is the one that is tested. Four environments are made for it under `.venv/<X.Y>/`:

    test      pytest and the checks; the tests themselves run here
    sdk       the real `aistore[etl]`, which pickles the classes and serves them for comparison
    slim      cloudpickle alone, as in the image: the runtime under test runs here
    sdkcore   cloudpickle and `aistore` without its extras

They are kept until the requirement files or the Python change. A fifth environment, `bench`, is made only for the benchmarks,
tests/bench/run.py.

Tests run four at a time, since most of them wait; those that measure time or memory, marked `alone`, run one by one after them.
`--slow` adds those that take long and those that build images; `-m` chooses by marks, and `-n 0` runs all one by one, as in
pytest. `--all` does it for every Python 3.9 to 3.15 that it finds on PATH, among pyenv's versions, or can fetch
(tests/pythons.py): all tests for the oldest and the newest, for those between what depends on the version. With `--slow` the
oldest and the newest run the slow ones as well, and the Python of the image's stand-in those of the image.
"""
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import pythons

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests" / "requirements"
GROUPS = ("test", "sdk", "slim", "sdkcore")
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
IMAGE_VERSION = "3.13"  # of tests/image/alpine.py
OF_VERSION = [  # what depends on the Python, for the versions between the oldest and the newest
    "tests/test_%s.py" % name for name in ("answers", "cli", "layout", "payloads", "sdk_names", "startup", "versions", "workers")]
PROCESSES = "4"  # of tests at the same time, on two cores: most of them wait
NOT_SLOW = "not slow and not image and not soak"
ALL_BUT_SOAK = "not soak"
NO_TESTS = 5  # the exit code of pytest that has found none
STAMP = "made-from"  # written last, so an environment without it is half made
INSTALL_SECONDS = 900  # the SDK's packages are about 40 MB


class EnvironmentFailure(Exception):
    """An environment could not be made; the text says which and why, in one line."""


def main(argv: Sequence[str]) -> int:
    """Run pytest here or, with `--all`, under every Python; return the exit code."""
    arguments = [argument for argument in argv if argument not in ("--all", "--slow")]
    if "--all" in argv:
        return run_everywhere(arguments, "--slow" in argv)
    try:
        environments = make_environments()
    except EnvironmentFailure as failure:
        print("tests/run.py: %s" % failure, file=sys.stderr)
        return os.EX_UNAVAILABLE
    return run_tests(environments, *split_marks(arguments, ALL_BUT_SOAK if "--slow" in argv else NOT_SLOW))


def split_marks(arguments: Sequence[str], marks: str) -> Tuple[List[str], str]:
    """Take pytest's option `-m` out of its arguments; without one, `marks` chooses the tests."""
    rest: List[str] = []
    following = iter(arguments)
    for argument in following:
        if argument == "-m":
            marks = next(following, marks)
        elif argument.startswith("-m"):
            marks = argument[2:].lstrip("=")
        else:
            rest.append(argument)
    return rest, marks or "soak or not soak"


def run_tests(environments: Path, arguments: List[str], marks: str) -> int:
    """Run the tests of these marks, first those that may run beside others; return the exit code of both runs."""
    command = [str(python_of(environments / "test")), "-m", "pytest"]
    runs = [["-n", PROCESSES, "--dist", "loadfile", *arguments, "-m", "(%s) and not alone" % marks],
            [*arguments, "-n", "0", "-m", "(%s) and alone" % marks]]
    codes = [subprocess.run([*command, *options], cwd=str(ROOT), env=test_variables(environments)).returncode
             for options in runs]
    return next((code for code in codes if code not in (0, NO_TESTS)), min(codes))


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
        for group in (*GROUPS, *further):
            if not is_made(folder / group):
                print("tests/run.py: making %s" % (folder / group).relative_to(ROOT), flush=True)
                make_environment(folder / group)
    return folder


def is_made(environment: Path) -> bool:
    """Tell whether an environment is whole and made from the present requirement files."""
    stamp = environment / STAMP
    return stamp.is_file() and stamp.read_text() == fingerprint(environment.name) and python_of(environment).exists()


def fingerprint(group: str) -> str:
    """Return a digest of what an environment is made from: this Python, and its requirements or those of all four."""
    digest = hashlib.sha256((sys.version + sys.base_prefix).encode())
    for name in sorted(GROUPS) if group in GROUPS else [group]:
        digest.update((REQUIREMENTS / (name + ".txt")).read_bytes())
    return digest.hexdigest()


def make_environment(environment: Path) -> None:
    """Make one environment from nothing."""
    shutil.rmtree(environment, ignore_errors=True)
    call([sys.executable, "-m", "venv", *([] if has_pip() else ["--without-pip"]), str(environment)], environment.name)
    command = install_command(environment)
    if not has_pip():
        call([*command, "pip"], environment.name)
    call([*command, "-r", str(REQUIREMENTS / (environment.name + ".txt"))], environment.name)
    (environment / STAMP).write_text(fingerprint(environment.name))


def has_pip() -> bool:
    """Tell whether this Python puts pip into the environments that it makes: Debian's wants python3-venv for that."""
    return importlib.util.find_spec("ensurepip") is not None


def install_command(environment: Path) -> List[str]:
    """Return the command that installs into an environment, but for what it installs; uv is a tenth of pip's time."""
    if not has_pip() and not pythons.has_tools():
        raise EnvironmentFailure("this Python makes no environments with pip: run these tests by another one first")
    try:
        return [str(pythons.tool("uv")), "pip", "install", "--quiet", "--python", str(python_of(environment))]
    except pythons.Missing as reason:
        print("tests/run.py: no uv, so pip installs, more slowly (%s)" % reason, flush=True)
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


def run_everywhere(arguments: List[str], slow: bool) -> int:
    """Run this file under each Python that is there; return non-zero if one failed or none was found."""
    results: Dict[str, str] = {}
    interpreters: Dict[str, str] = {}
    for version in VERSIONS:
        try:
            interpreters[version] = find_python(version)
        except pythons.Missing as reason:
            results[version] = "missing: %s" % reason
    ends = (min(interpreters, key=VERSIONS.index, default=""), max(interpreters, key=VERSIONS.index, default=""))
    for version, interpreter in interpreters.items():
        print("tests/run.py: Python %s, %s" % (version, interpreter), flush=True)
        begun, code = time.monotonic(), 0
        for chosen in [[*arguments, *["--slow"] * slow]] if arguments else choices(version, version in ends, slow):
            code = code or subprocess.run([interpreter, str(Path(__file__).resolve()), *chosen]).returncode
        results[version] = "%s in %.0f s" % ("failed (exit code %d)" % code if code else "passed", time.monotonic() - begun)
    for version, result in results.items():
        print("tests/run.py: Python %-4s %s" % (version, result))
    outcomes = {result.split()[0] for result in results.values()} - {"missing:"}
    return 0 if outcomes == {"passed"} else 1


def choices(version: str, is_end: bool, slow: bool) -> List[List[str]]:
    """Return the arguments of this file's runs for one of all Pythons; the oldest and the newest are the ends."""
    runs = [["-m", "not soak and not image"] if slow else []] if is_end else [OF_VERSION]
    return [*runs, ["-m", "image"]] if slow and version == IMAGE_VERSION else runs


def find_python(version: str) -> str:
    """Return a working interpreter of this version, the one that runs this file before any other."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [sys.executable, shutil.which("python" + version)]
    candidates += [str(python) for python in sorted(pyenv.glob("versions/%s.*/bin/python" % version))]
    found = next((python for python in candidates if python and version_of(python) == version), None)
    return found or pythons.fetched_python(version)


def version_of(interpreter: str) -> str:
    """Return an interpreter's "X.Y", or "" if it does not run: pyenv leaves launchers for versions that are switched off."""
    command = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
