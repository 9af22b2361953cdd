"""Run the runtime with other numbers: `TEST_NUMBERS='{"FORSAKEN_SECONDS": 1.0}' python3 tests/quick.py [arguments]`.

The runtime's time limits are for a cluster, and a test that waits for each of them would take an hour. Here its file runs as
always, as `__main__`, but for the constants of its section 1 that are named in the environment. (It also starts sooner than as
a script, since the bytecode is kept.)
"""
import json
import os
import sys
from importlib.machinery import SourceFileLoader
from typing import Any, Dict

# Without pathlib: on some Pythons that loads modules which the runtime loads late.
FOLDER = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
NUMBERS: Dict[str, float] = json.loads(os.environ.get("TEST_NUMBERS", "{}"))


class Definitions(Dict[str, Any]):
    """What the names of the file's own level are stored into: this module, with our numbers."""

    def __setitem__(self, name: str, value: Any) -> None:
        globals()[name] = NUMBERS.pop(name, value)
        assert not (name == "main" and NUMBERS), "the runtime has no %s" % ", ".join(NUMBERS)

    def __delitem__(self, name: str) -> None:
        del globals()[name]


if __name__ == "__main__":
    sys.path[0] = FOLDER  # as where the file itself is run
    path = os.path.join(FOLDER, "ais_runtime_min.py")
    code: Any = SourceFileLoader("ais_runtime_min", path).get_code("ais_runtime_min")
    exec(code, globals(), Definitions())
