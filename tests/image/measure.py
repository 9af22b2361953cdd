#!/usr/bin/env python3
"""Measure the image: what it takes, and how soon it answers, beside its base and beside what the default runtime installs.

    .venv/3.13/test/bin/python tests/image/measure.py      (as root; python3.13 tests/run.py makes that interpreter)

All figures are of one run, on one base: the stand-in of alpine.py. Two tables in Markdown are printed.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from alpine import IMAGE, make_base  # noqa: E402
from containers import Engine, Layer, missing_programs  # noqa: E402

ROUNDS = 15
PEER = "FROM %s\nRUN pip install --no-cache-dir 'aistore[etl]'\n" % IMAGE
STARTS = {
    "`python -c pass`": (["python", "-c", "pass"], {}),
    "the image": (["python", "/code/bootstrap.py"], {}),
    "its source, with the library's bytecode": (["python", "/code/ais_runtime_min.py"], {}),
    "its source, without any bytecode": (["python", "/code/ais_runtime_min.py"], {"PYTHONPYCACHEPREFIX": "/nowhere"}),
}
PEER_STARTS = {  # the default runtime's ways, with the class at hand and nothing to unpickle
    "the SDK's `HTTPMultiThreadedServer`, one process": (["python", "/tmp/threaded.py"], {}),
    "the SDK's `FastAPIServer`, by uvicorn": (["python", "/tmp/asgi.py"], {}),
}
STOPWATCH = (ROOT / "tests" / "image" / "stopwatch.py").read_text()


def main() -> int:
    """Build, measure, print."""
    missing = list(missing_programs())
    if missing:
        print("measure.py: not installed: %s" % ", ".join(missing), file=sys.stderr)
        return 1
    with Engine() as engine, tempfile.TemporaryDirectory() as folder:
        make_base(engine, ROOT / ".venv" / "downloads", Path(folder, "base"))
        Path(folder, "Dockerfile").write_text(PEER)
        engine.build(Path(folder), "peer")
        engine.build(ROOT, "default")
        engine.build(ROOT, "flat", "--target", "flat")
        print_sizes({name: engine.layers(image) for name, image in (
            ("base", IMAGE), ("peer", "localhost/peer"), ("default", "localhost/default"), ("flat", "localhost/flat"))})
        print("\n| start, 4 workers | ms |\n|---|---:|")
        print_starts(engine, "localhost/default", STARTS)
        print_starts(engine, "localhost/peer", PEER_STARTS)
    return 0


def print_sizes(layers: Dict[str, List[Layer]]) -> None:
    """Print what each image takes: what it adds to the base, or the whole."""
    base = len(layers["base"])
    rows = {
        "`pip install --no-cache-dir \"aistore[etl]\"` adds to the base": layers["peer"][base:],
        "the image adds to the base": layers["default"][base:],
        "the base": layers["base"],
        "the image": layers["default"],
        "the image, target `flat`": layers["flat"],
    }
    print("| | MB | MB gzipped |\n|---|---:|---:|")
    for what, taken in rows.items():
        print("| %s | %.2f | %.2f |" % (what, sum(layer.plain for layer in taken) / 1e6,
                                        sum(layer.gzipped for layer in taken) / 1e6))


def print_starts(engine: Engine, image: str, starts: Mapping[str, Tuple[List[str], Dict[str, str]]]) -> None:
    """Print how long it takes from the start of a process to the first healthy answer, within one container."""
    done = subprocess.run(
        engine.podman_command("run", "--rm", "--no-healthcheck", "--network", "none", "--entrypoint", "python",
                              image, "-c", STOPWATCH, json.dumps(starts), str(ROUNDS)),
        env=engine.environ, stdout=subprocess.PIPE, universal_newlines=True, check=True)
    for what, seconds in json.loads(done.stdout).items():
        print("| %s | %.0f |" % (what, seconds * 1000))


if __name__ == "__main__":
    raise SystemExit(main())
