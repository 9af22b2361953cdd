"""The runtime behind a real AIStore: each scenario of scenarios.py is a test.

    AISNODE=/path/to/aisnode python3 tests/run.py --slow tests/aistore      (as root)

`AISNODE` is AIStore's own binary: `CGO_ENABLED=0 go build -tags etl -o "$AISNODE" ./cmd/aisnode` in a clone of NVIDIA/aistore.
One cluster serves all tests; a scenario that does not end takes its cluster with it, and the next one gets a new one.
"""
import ast
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from harness import RUNTIME, interpreter
from libraries import install_libraries

HERE = Path(__file__).resolve().parent
SCENARIO_SECONDS = 170.0  # the cluster's start included
TOOLS = ("unshare", "mount", "ip", "openssl")


def scenario_names() -> List[str]:
    """Return the names of the scenarios: the functions whose one argument is a `World`. This interpreter lacks the SDK."""
    functions = [node for node in ast.parse((HERE / "scenarios.py").read_text()).body if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if [arg.arg for arg in function.args.args] == ["world"]]


class Session:
    """A cluster with the process that runs scenarios beside it; started when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._libraries = install_libraries(folder)
        self._process: "Optional[subprocess.Popen[str]]" = None
        self._count = 0

    def run(self, scenario: str) -> Dict[str, Any]:
        """Run a scenario and return its report."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process and self._process.stdin and self._process.stdout
        self._process.stdin.write(scenario + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], SCENARIO_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            pytest.fail("%s\n%s" % ("no report" if ready else "no end after %d s" % SCENARIO_SECONDS, self._outputs()))
        report: Dict[str, Any] = json.loads(line)
        return report

    def stop(self) -> None:
        """End the cluster and all that runs in it."""
        if self._process:
            self._process.terminate()
            self._process.communicate(timeout=100)
            self._process = None

    def _start(self) -> None:
        self._count += 1
        self._state = self.folder / ("cluster-%d" % self._count)
        self._state.mkdir()
        pythons = {"ais-runtime-min": interpreter("slim"), "frameworks-of-ais-runtime-min": interpreter("sdk"),
                   "aistorage/runtime_python": interpreter("slim"), "libraries-of-ais-runtime-min": self._libraries.python}
        path = os.pathsep.join([str(self._libraries.bin), os.environ.get("PATH", os.defpath)])
        images = {
            name: {"command": [python, str(RUNTIME)], "env": {"NUM_WORKERS": "2", "PYTHONUNBUFFERED": "1", "PATH": path}}
            for name, python in pythons.items()}
        command = [sys.executable, "cluster.py", str(self._state), interpreter("sdk"), "scenarios.py"]
        with open(self._state / "scenarios.out", "wb") as out:
            self._process = subprocess.Popen(
                command, cwd=str(HERE), env={
                    **os.environ, "KUBE_IMAGES": json.dumps(images), "RUNTIME": str(RUNTIME),
                    "LIBRARIES": json.dumps(self._libraries._asdict(), default=str)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, universal_newlines=True,
            )

    def _outputs(self) -> str:
        """Return the last lines of everything that runs there: the scenarios, the nodes, and the pods."""
        files = [*sorted(self._state.glob("*.out")), *sorted(self._state.glob("kube/*.log"), key=os.path.getmtime)[-4:]]
        texts = (file.read_text(errors="replace").splitlines()[-30:] for file in files)
        return "\n".join("== %s ==\n%s" % (file.name, "\n".join(text)) for file, text in zip(files, texts))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """A cluster for all tests."""
    if not os.access(os.environ.get("AISNODE", ""), os.X_OK):
        pytest.skip("AISNODE names no binary of AIStore (%r)" % os.environ.get("AISNODE", ""))
    if os.geteuid() != 0:
        pytest.skip("only root can make the cluster's namespace")
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        pytest.skip("this machine lacks %s" % ", ".join(missing))
    with tempfile.TemporaryDirectory(prefix="aistore-") as folder:
        running = Session(Path(folder))
        try:
            yield running
        finally:
            running.stop()


@pytest.mark.slow
@pytest.mark.timeout(SCENARIO_SECONDS + 110)
@pytest.mark.parametrize("scenario", scenario_names())
def test_a_scenario(session: Session, scenario: str) -> None:
    report = session.run(scenario)
    print("\n".join(report["notes"]))
    for pod, log in report["logs"].items():
        print("== %s ==\n%s" % (pod, "\n".join(log)))
    if report["error"]:
        pytest.fail("%s\nevents of the pods:\n%s" % (report["error"], "\n".join(map(str, report["events"]))), pytrace=False)
