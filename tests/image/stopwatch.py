"""Runs in a container, for measure.py: how long servers take from the start of a process to the first healthy answer.

    python stopwatch.py '{"name": [["command", ...], {"VARIABLE": "value"}]}' ROUNDS

Prints the median of each in seconds, as JSON. No bytecode is written: a pod's container is a new one at each start.
"""
import base64
import http.client
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Dict, List, Mapping

UPPER = """\
import os
from aistore.sdk.etl.webserver.{module} import {base}

class Upper({base}):
    def transform(self, data, path, etl_args):
        return data.upper()

{tail}
"""
THREADED = "server = Upper()\nserver.port = int(os.environ['PORT'])\nserver.start()"
ASGI = "app = Upper().app"
ASGI_START = """\
import os
os.chdir("/tmp")
os.execvp("uvicorn", ["uvicorn", "served:app", "--workers", "4", "--port", os.environ["PORT"]])
"""


def main() -> None:
    """Measure, in turns, so that what else the machine does falls on all."""
    starts, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", AIS_TARGET_URL="http://127.0.0.1:9/")
    prepare()
    found: Dict[str, List[float]] = {name: [] for name in starts}
    for number in range(rounds):
        for name, (command, environ) in starts.items():
            found[name].append(seconds(command, environ, 18000 + number))
    print(json.dumps({name: statistics.median(times) for name, times in found.items()}))


def prepare() -> None:
    """Make what is served: a payload for the runtime, or files for the SDK's own servers."""
    if not os.path.isdir("/code"):
        threaded = UPPER.format(module="http_multi_threaded_server", base="HTTPMultiThreadedServer", tail=THREADED)
        write("/tmp/threaded.py", threaded)
        write("/tmp/served.py", UPPER.format(module="fastapi_server", base="FastAPIServer", tail=ASGI))
        write("/tmp/asgi.py", ASGI_START)
        return
    sys.path.insert(0, "/code")
    base = importlib.import_module("ais_runtime_min").HTTPMultiThreadedServer
    upper = type("Upper", (base,), {"transform": lambda self, data, path, etl_args: data.upper()})
    os.environ["ETL_CLASS_PAYLOAD"] = base64.b64encode(importlib.import_module("cloudpickle").dumps(upper)).decode()


def write(path: str, text: str) -> None:
    """Write a file."""
    with open(path, "w") as file:
        file.write(text)


def seconds(command: List[str], environ: Mapping[str, str], port: int) -> float:
    """Start a process, wait until it is healthy, or has ended if it is no server, and end it."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **environ, "PORT": str(port)}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    if command[1] == "-c":
        process.wait()
        return time.perf_counter() - began
    while not is_healthy(port):
        assert process.poll() is None, command
        time.sleep(0.002)
    elapsed = time.perf_counter() - began
    process.terminate()
    process.wait()
    return elapsed


def is_healthy(port: int) -> bool:
    """Ask once."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


if __name__ == "__main__":
    main()
