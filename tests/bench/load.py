"""Load by wrk: one request over and over on so many connections, and only figures without a single error."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Sequence

SCRIPT = Path(__file__).with_name("load.lua")
WEBSOCKET_LOAD = Path(__file__).with_name("wsload.py")
MISSING = "wrk is not on PATH: install it (`apt install wrk`, `brew install wrk`)"
ANSWER_SECONDS = 60  # wrk counts a slower answer as an error
ERRORS = ("connect", "read", "write", "status", "timeout")


class LoadFailure(Exception):
    """The load met errors, so it has no figure; the text says which."""


class Load(NamedTuple):
    """What one run of wrk has measured."""

    requests: int
    received_bytes: int
    per_second: float
    p50_ms: float
    p99_ms: float


class Request(NamedTuple):
    """What is sent; without a body file the body is empty."""

    url: str
    body: Optional[Path]
    headers: Sequence[str]


def wrk_is_missing() -> bool:
    """Tell whether there is no load generator."""
    return shutil.which("wrk") is None


def wrk_version() -> str:
    """Return the first words of `wrk -v`, which also exits with 1."""
    done = subprocess.run(["wrk", "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    return " ".join(done.stdout.split()[:2])


def run_wrk(request: Request, connections: int, seconds: int) -> Load:
    """Send the request for so many seconds; raise LoadFailure for a single error, since a wrong figure is worse than none.

    One thread of wrk keeps up with every server here, and leaves the other cores to them.
    """
    command = ["wrk", "-t1", "-c%d" % connections, "-d%ds" % seconds, "--timeout", "%ds" % ANSWER_SECONDS, "--latency"]
    command += ["-s", str(SCRIPT), request.url, "--", str(request.body or ""), *request.headers]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
                          timeout=seconds + ANSWER_SECONDS)
    fields = _fields_of(done.stdout)
    per_second = fields["requests"] / (fields["duration"] / 1e6)
    errors = ["%d %s" % (fields[name], name) for name in ERRORS if fields[name]]
    if errors or not fields["requests"]:
        text = "%s errors in %d requests, %.0f per second"
        raise LoadFailure(text % (", ".join(errors) or "no", fields["requests"], per_second))
    return Load(fields["requests"], fields["bytes"], per_second, fields["p50"] / 1e3, fields["p99"] / 1e3)


class WebSocketRequest(NamedTuple):
    """What is sent over WebSocket, over and over: a control message, an object unless it is read by path; and the result."""

    port: int
    control: Dict[str, str]
    body: Optional[Path]
    result: bytes


def run_websocket(request: WebSocketRequest, connections: int, seconds: int, folder: Path) -> Load:
    """Send objects over WebSocket for so many seconds, without waiting for results; raise LoadFailure for a single error."""
    expected = folder / "expected"
    expected.write_bytes(request.result)
    command = [sys.executable, str(WEBSOCKET_LOAD), str(request.port), str(connections), str(seconds),
               json.dumps(request.control), str(request.body or ""), str(expected)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
                          timeout=seconds + ANSWER_SECONDS)
    if done.returncode:
        raise LoadFailure("the load over WebSocket failed: %s" % " ".join(done.stdout.split())[-200:])
    fields = json.loads(done.stdout)
    return Load(fields["objects"], fields["objects"] * len(request.result), fields["objects"] / fields["seconds"],
                fields["p50_ms"], fields["p99_ms"])


def _fields_of(output: str) -> Dict[str, int]:
    line = re.search(r"^RESULT (.*)$", output, re.MULTILINE)
    if line is None:
        raise LoadFailure("wrk failed: %s" % " ".join(output.split())[-200:])
    return {name: int(value) for name, value in re.findall(r"(\w+)=(-?\d+)", line[1])}
