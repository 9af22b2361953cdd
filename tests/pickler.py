"""Pickle classes by the real SDK, one after the other: run by `harness.make_payload` on an interpreter that has `aistore[etl]`.

A line of input is JSON, `{"source": …, "name": …}`; so is the line of output, `{"code": …, "output": …}`: the last line of
`output` is the payload if `code`, the status of wait(2), is 0. Importing the SDK takes a second, so this process does it once
and forks for each class, whose script then runs as a user's would: as `__main__`, in an empty folder.
"""
import json
import os
import sys
import tempfile
import traceback
import types
from typing import Any, Dict

TAIL = "\n\nfrom aistore.sdk.etl.webserver import serialize_class as _serialize\nprint(_serialize(%s))\n"
SDK = "aistore.sdk.etl.webserver"


def main() -> None:
    """Answer each line of standard input."""
    for name in ("", ".fastapi_server", ".flask_server", ".http_multi_threaded_server"):
        __import__(SDK + name)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(pickled(wanted["source"], wanted["name"])), flush=True)


def pickled(source: str, name: str) -> Dict[str, Any]:
    """Run a script in a child process and return its wait status and what it printed."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        os._exit(run_script(source, name))
    os.close(write_end)
    with open(read_end, encoding="utf-8") as output:
        text = output.read()
    return {"code": os.waitpid(child, 0)[1], "output": text}


def run_script(source: str, name: str) -> int:
    """Be the user's script, which pickles its class at the end."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "user_script.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(source)  # for what asks for the source of its functions
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        module.__file__, sys.path[0], sys.argv[:] = path, folder, [path]
        try:
            exec(compile(source + TAIL % name, path, "exec"), vars(module))
            return 0
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


if __name__ == "__main__":
    main()
