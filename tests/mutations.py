#!/usr/bin/env python3
"""Ask whether the tests would notice: `python3 tests/mutations.py [--only PATTERN] [--tests FOLDER]`, by hand.

Each of `MUTATIONS` (tests/mutations.txt) is a small fault that somebody could put into the runtime. Each is put into a copy of
the project, one at a time, and the test files of its section run there until the first failure. A fault that nothing notices is
`MISSED`, and the exit code then 1. `--only` picks by a regular expression on section, fault and files; `--tests` takes the test
files from another checkout, to compare two suites.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence

import run

CASES = Path(__file__).with_name("mutations.txt")
LIMIT_SECONDS = 900.0  # a fault may make tests hang, each of them up to its own limit
COPIED = ("ais_runtime_min.py", "Dockerfile", "README.md", "setup.cfg", "pyproject.toml", "LICENSE")


class Mutation(NamedTuple):
    """A fault: where `old`, which the runtime has once, is replaced by `new`, one of `files` must have a failing test."""

    section: str
    fault: str
    files: List[str]
    old: str
    new: str


def main(argv: Sequence[str]) -> int:
    """Try the mutations and print a line for each; return 1 if one is missed or cannot be tried."""
    parser = argparse.ArgumentParser(prog="tests/mutations.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="only those whose section, fault or files match")
    parser.add_argument("--tests", type=Path, default=run.ROOT / "tests", metavar="FOLDER", help="another suite's tests")
    arguments = parser.parse_args(argv)
    source = (run.ROOT / "ais_runtime_min.py").read_text(encoding="utf-8")
    environments = run.make_environments()
    misses = tries = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        for name in COPIED:
            shutil.copy(run.ROOT / name, folder)
        shutil.copytree(run.ROOT / "docs", Path(folder, "docs"))
        shutil.copytree(arguments.tests, Path(folder, "tests"), ignore=shutil.ignore_patterns("__pycache__"))
        Path(folder, ".venv").symlink_to(run.ROOT / ".venv")  # for the interpreters of other versions
        for mutation in read_cases(CASES.read_text(encoding="utf-8")):
            line = "%s: %s (%s)" % (mutation.section, mutation.fault, " ".join(mutation.files))
            if re.search(arguments.only, line):
                verdict = tried(mutation, source, Path(folder), environments)
                tries += 1
                misses += not verdict.startswith("caught")
                print("%s: %s" % (line, verdict), flush=True)
    print("mutations: %d tried, %d missed" % (tries, misses))
    return 1 if misses else 0 if tries else os.EX_USAGE


def read_cases(text: str) -> Iterator[Mutation]:
    """Read the file of mutations: see its first lines."""
    for case in re.split(r"(?m)^== ", text)[1:]:
        title, files, rest = case.split("\n", 2)
        section, _, fault = title.partition(". ")
        old, new = rest.split("\n----\n")
        yield Mutation(section, fault, files.split(), old, new[:-1])


def tried(mutation: Mutation, source: str, folder: Path, environments: Path) -> str:
    """Put a fault into the copy, run the tests, and say what came of it."""
    if source.count(mutation.old) != 1:
        return "UNKNOWN, the runtime has its text %d times" % source.count(mutation.old)
    mutated = source.replace(mutation.old, mutation.new)
    try:
        compile(mutated, "ais_runtime_min.py", "exec")
    except SyntaxError as error:  # any test would fail
        return "UNKNOWN, its text is no Python: %s" % error
    (folder / "ais_runtime_min.py").write_text(mutated, encoding="utf-8")
    files = ["tests/test_%s.py" % name for name in mutation.files]
    begun = time.monotonic()
    for options in (["-n", run.PROCESSES, "-m", "(%s) and not alone" % run.NOT_SLOW], ["-m", "(%s) and alone" % run.NOT_SLOW]):
        command = [str(run.python_of(environments / "test")), "-m", "pytest", "-x", *options,
                   "-p", "no:cacheprovider", "--tb=no", *files]
        try:
            done = subprocess.run(command, cwd=str(folder), env=run.test_variables(environments), timeout=LIMIT_SECONDS,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  universal_newlines=True)
        except subprocess.TimeoutExpired:
            return "caught, the tests hang"
        failed = re.search(r"(?m)^(?:FAILED|ERROR) (?:tests/)?(\S+::\S+)", done.stdout)
        if failed:
            return "caught in %.0f s by %s" % (time.monotonic() - begun, failed[1])
        if done.returncode not in (0, run.NO_TESTS):
            return "BROKEN: %s" % done.stdout[-300:]
    return "MISSED in %.0f s" % (time.monotonic() - begun)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
