#!/usr/bin/env python3
"""Measure classes with large imports beside the default runtime: `python3 tests/bench/heavy.py [--only PATTERN]`.

For each such class: the time from exec to the first healthy answer, and the memory of the whole pod, each with 4 workers. The
default runtime's part is played by a script that takes its steps (runtime/python/bootstrap.py of NVIDIA/ais-etl): load the
payload and construct the class, then become uvicorn, each of whose workers loads the payload and constructs the class again. The
Python that runs this file is the one that is measured. Both run on one environment of their own, made by pip with some GB of
packages, or on the interpreter that `--python` names, which has `aistore[etl]` and the packages. The table replaces the one
before it in `results.md`, unless only some are measured.
"""
import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

HERE = Path(__file__).resolve().parent
if str(HERE) in sys.path:
    sys.path.remove(str(HERE))
sys.path.insert(0, str(HERE.parent))

import run  # noqa: E402  tests/run.py
from bench import servers  # noqa: E402

PACKAGES = ("aistore[etl]==2.0.0", "cloudpickle", "keras", "numpy", "opencv-python-headless", "pandas", "pillow", "pyarrow",
            "pydantic", "tensorflow-cpu", "torch", "torchvision")
CLASSES = {  # name: the modules that it imports, and an expression of each request with these
    "numpy and OpenCV": ("numpy, cv2", "cv2.blur(numpy.ones((9, 9)), (3, 3))"),
    "pandas and pyarrow": ("pandas, pyarrow, pyarrow.parquet", "pyarrow.Table.from_pandas(pandas.DataFrame({'a': [1]}))"),
    "Pillow": ("PIL.Image", "PIL.Image.new('L', (9, 9)).resize((3, 3))"),
    "pydantic": ("pydantic", "pydantic.TypeAdapter(int).validate_python('1')"),
    "torchvision": ("torch, torchvision", "torchvision.transforms.Resize(3)(torch.ones((1, 9, 9)))"),
    "Keras on TensorFlow": ("keras", "keras.layers.Dense(2)(keras.ops.ones((1, 3)))"),
}
SOURCE = """\
import {modules}
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer


class Bench(FastAPIServer):
    def transform(self, data, path, etl_args):
        {expression}
        return data.upper()
"""
# Both files of the default runtime's part; the second is what uvicorn's workers import.
BOOTSTRAP = """\
import os, sys
import aistore.sdk.etl.webserver.flask_server, aistore.sdk.etl.webserver.http_multi_threaded_server
import served
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""
SERVED = """\
import base64, os
import cloudpickle
import aistore.sdk.etl.webserver.fastapi_server
fastapi_app = cloudpickle.loads(base64.b64decode(os.environ["ETL_CLASS_PAYLOAD"]))().app
"""
WORKERS = 4
METHOD = """\
Made by `python3 tests/bench/heavy.py`: a `FastAPIServer` class with these imports, 4 workers, the time from exec to the first
healthy answer and the memory of all processes, at rest once each has transformed something. The default runtime's steps: it loads
the payload and constructs the class once, then becomes uvicorn, whose workers do so each. Rounds: {rounds}, of which the median
counts; Python {python}."""


class Cost(NamedTuple):
    """What a pod takes to start."""

    seconds: float
    mib: float


def main(argv: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    parser = argparse.ArgumentParser(prog="tests/bench/heavy.py", description="Measure classes with large imports.")
    parser.add_argument("--only", default="", metavar="PATTERN", help="measure only these, and write nothing")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    parser.add_argument("--python", help="an interpreter that has all packages")
    arguments = parser.parse_args(argv)
    environments = run.make_environments(["bench"])
    if not (environments / "bench").samefile(sys.prefix):
        python = str(run.python_of(environments / "bench"))
        os.execv(python, [python, str(Path(__file__).resolve()), *argv])
    from bench import report

    python = arguments.python or make_environment(environments / "heavy")
    costs: Dict[str, Tuple[Cost, Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="heavy-") as folder:
        for name in filter(re.compile(arguments.only).search, CLASSES):
            costs[name] = measure(name, python, Path(folder), arguments.rounds)
    asked = [python, "-c", "import platform; print(platform.python_version())"]
    version = subprocess.check_output(asked, universal_newlines=True).strip()
    text = METHOD.format(rounds=arguments.rounds, python=version) + "\n\n" + table(costs)
    print(text)
    if not arguments.only:
        results = HERE / "results.md"
        before = results.read_text(encoding="utf-8").partition(report.HEAVY)[0]
        results.write_text(before + report.HEAVY + "\n" + text + "\n", encoding="utf-8")
    return 0


def make_environment(folder: Path) -> str:
    """Make the environment, once, and return its interpreter."""
    python = folder / "bin" / "python"
    if not (folder / "is-made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / "is-made").touch()
    return str(python)


def measure(name: str, python: str, folder: Path, rounds: int) -> Tuple[Cost, Cost]:
    """Return what a class costs with this runtime and with the default one; they take turns."""
    runs: Dict[str, List[Cost]] = {"ours": [], "default": []}
    for number in range(rounds + 1):  # the first fills caches
        for peer, costs in runs.items():
            costs.append(cost(peer, name, python, folder))
            print("%s, round %d: %s %.2f s, %.0f MiB" % (name, number, peer, *costs[-1]), flush=True)
    medians = [Cost(*map(statistics.median, zip(*costs[1:]))) for costs in runs.values()]
    return medians[0], medians[1]


def cost(peer: str, name: str, python: str, folder: Path) -> Cost:
    """Start a pod, have each worker transform something, and look at its memory."""
    import time

    from bench.footprint import own_size
    from bench.throughput import processes, settle

    command, env, place, port = prepare(peer, name, python, folder)
    began = time.perf_counter()
    with servers.Server(peer, command, env, place, port) as server:
        server.wait_until_healthy()
        seconds = time.perf_counter() - began
        settle(server)
        for _ in range(20 * WORKERS):
            subprocess.run(["curl", "-sSf", "-o", os.devnull, "-T", __file__, server.url("/bck/obj")], check=True)
        settle(server)
        return Cost(seconds, own_size(processes(server)) / (1 << 20))


def prepare(peer: str, name: str, python: str, folder: Path) -> Tuple[List[str], Dict[str, str], Path, int]:
    """Write what a pod is started from; return how."""
    modules, expression = CLASSES[name]
    source = SOURCE.format(modules=modules, expression=expression)
    place, port = folder / re.sub(r"\W", "-", "%s %s" % (peer, name)), servers.free_port()
    env = {"PATH": "%s:%s" % (Path(python).parent, os.environ["PATH"]), "PYTHONUNBUFFERED": "1", "PORT": str(port),
           "AIS_TARGET_URL": "http://127.0.0.1:9" + servers.ETL_PATH, "NUM_WORKERS": str(WORKERS), "KERAS_BACKEND": "tensorflow"}
    place.mkdir(exist_ok=True)
    if not (place / "payload").exists():
        (place / "pickled.py").write_text(source + servers.TAILS["payload"])
        said = subprocess.run([python, "pickled.py"], env=env, cwd=str(place), stdout=subprocess.PIPE, check=True)
        (place / "payload").write_bytes(said.stdout.split()[-1])
        shutil.copy(servers.ROOT / "ais_runtime_min.py", place)
        (place / "bootstrap.py").write_text(BOOTSTRAP)
        (place / "served.py").write_text(SERVED)
        subprocess.run([python, "-m", "compileall", "-q", "."], cwd=str(place), check=True)
    env["ETL_CLASS_PAYLOAD"] = (place / "payload").read_text()
    if peer == "ours":
        return [python, *servers.COMMANDS["ours"].split()[1:]], env, place, port
    words = servers.COMMANDS["fastapi"].format(port=port, workers=WORKERS).split()
    return [python, "bootstrap.py", *words], env, place, port


def table(costs: Dict[str, Tuple[Cost, Cost]]) -> str:
    """Return the table."""
    from bench.report import table as markdown

    rows = [[name, "%.2f" % ours.seconds, "%.2f" % peers.seconds, "%.2f" % (ours.seconds / peers.seconds),
             "%.0f" % ours.mib, "%.0f" % peers.mib, "%.2f" % (ours.mib / peers.mib)] for name, (ours, peers) in costs.items()]
    return markdown(["imports", "start, s", "default", "ratio", "memory, MiB", "default", "ratio"], rows)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
