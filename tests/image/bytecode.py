"""Compile what a pod imports, and nothing else: a step of the Dockerfile.

    python -X no_debug_ranges tests/image/bytecode.py RUNTIME

The official image has no bytecode of the library, and a pod that is not root can write none. Which modules a pod imports the
interpreter itself tells: below PYTHONPYCACHEPREFIX it writes the bytecode of each one, in whichever process of the pod and
however late it is imported. So a real pod is run for a moment. It loads a pickled class, transforms what it is sent and what
it reads from its target, delivers to another stage, uses TLS and the like, logs an error, is sent a large object over
WebSocket, and stops. The build ends where it does any of that wrong.

The bytecode is left beside the sources. It is the common one, of no optimization, with two differences: it is valid whatever
time a builder gives to the sources (PEP 552), and that of the library and of the runtime is without docstrings, which are a
fifth of it. (Other packages keep theirs: the library is known to work without.)
"""
import ast
import base64
import http.client
import importlib
import marshal
import os
import re
import socket
import subprocess
import sys
import tempfile
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from pathlib import Path
from typing import IO, Any, Iterator, List, Mapping, Optional, Tuple

import cloudpickle

SECONDS = 60.0  # for any one thing that the pod does, on a machine that builds
UNCHECKED_HASH = (1).to_bytes(4, "little")  # the flags of bytecode that holds for its source without a look at it
SERVING = re.compile(r"serving .* on http://\S+:([0-9]+)$")
OF_THE_BUILD = ("PYTHONDONTWRITEBYTECODE", "OS_PACKAGES", "PACKAGES")  # what the pod must not have
EXTRAS = [name for name in os.environ.get("EXTRAS", "").split(",") if name]
HANDSHAKE = (b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
BASES = {"": "HTTPMultiThreadedServer", "fastapi": "FastAPIServer", "flask": "FlaskServer"}  # by the extra that they are for

# What the runtime leaves to the classes that want it. (Few want html, whose table of entities is large.)
LATE = ("ssl", "inspect", "shutil", "mimetypes", "ipaddress", "uuid")

Answer = Tuple[int, bytes]


def main(runtime: Path) -> None:
    """Try a pod, and one for each extra; compile what they import, and the runtime."""
    with tempfile.TemporaryDirectory() as folder:
        cache, target = Path(folder, "cache"), Path(folder, "target")
        (target / "bucket").mkdir(parents=True)
        (target / "bucket" / "object").write_bytes(b"an object")
        variables = {name: value for name, value in os.environ.items() if name not in OF_THE_BUILD}
        if os.environ.get("PACKAGES"):  # a pod that has packages looks for them, here without asking pip
            variables["PACKAGES"] = "cloudpickle"
        variables.update(PYTHONPYCACHEPREFIX=str(cache), PORT="0", NUM_WORKERS="1", AIS_TARGET_URL=target.as_uri(),
                         ETL_FQN_ROOTS=str(target))
        for extra in ("", *EXTRAS):
            try_pod([sys.executable, str(runtime)],
                    {**variables, "ETL_CLASS_PAYLOAD": payload(runtime, BASES[extra], bool(extra))})
        for source in (runtime, *sources(cache)):
            compile_module(source)


# == The pod ==


def payload(runtime: Path, base_name: str, has_app: bool) -> str:
    """Return a class as the SDK pickles it, by value; an empty object makes it fail.

    One that has an application, which it uses when it is constructed, is served by its framework.
    """
    sys.path.insert(0, str(runtime.parent))
    base: Any = getattr(importlib.import_module("ais_runtime_min"), base_name)

    class Trial(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            if has_app:
                self.app

        def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
            if not data:
                raise ValueError("an empty object")
            if etl_args == "late":
                return repr([importlib.import_module(name).__file__ for name in LATE]).encode()
            return data.upper()

    return base64.b64encode(cloudpickle.dumps(Trial)).decode()


def try_pod(command: List[str], variables: Mapping[str, str]) -> None:
    """Start a pod, have it do what pods do, and end it."""
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, universal_newlines=True) as pod:
        try:
            assert pod.stdout
            port = port_of(pod.stdout)
            check("an object", ask(port, "PUT", b"an object"), (200, b"AN OBJECT"))
            check("an object of the target", ask(port, "GET"), (200, b"AN OBJECT"))
            hop = {"Ais-Node-Url": "http://localhost:%d" % port}  # itself, as in a pipeline of two stages
            check("a delivery", ask(port, "PUT", b"an object", hop), (200, b"AN OBJECT"))
            check("a class that wants more", ask(port, "PUT", b"an object", arguments="?etl_args=late")[0], 200)
            check("an error", ask(port, "PUT", b"")[0], 500)
            check("WebSocket", ask_websocket(port, b"an object" * 10_000), b"AN OBJECT" * 10_000)
            pod.terminate()
            check("its end", pod.wait(SECONDS), 0)
        finally:
            pod.kill()


def port_of(log: IO[str]) -> int:
    """Read a pod's log until it serves, and return its port."""
    lines = []
    for line in log:
        lines.append(line)
        found = SERVING.search(line)
        if found:
            return int(found[1])
    raise SystemExit("the pod did not start:\n" + "".join(lines))


def ask(
    port: int, method: str, body: Optional[bytes] = None, headers: Mapping[str, str] = {}, arguments: str = ""
) -> Answer:
    """Send the pod one request for the one object."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request(method, "/bucket/object" + arguments, body, dict(headers))
    answer = connection.getresponse()
    return answer.status, answer.read()


def ask_websocket(port: int, data: bytes) -> bytes:
    """Send the pod an object of over 64 KiB by WebSocket, masked by zeros; return as much of its result."""
    frames = (b'\x82\x8d%b{"path": "o"}' % bytes(4), b"\x82\xff%b%b" % (len(data).to_bytes(8, "big"), bytes(4)), data)
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection, connection.makefile("rb") as answers:
        connection.sendall(HANDSHAKE)
        while answers.readline().strip():
            pass
        connection.sendall(b"".join(frames))
        return answers.read(10 + len(data))[10:]


def check(what: str, found: object, expected: object) -> None:
    """End the build where the pod does not do what it is for."""
    if found != expected:
        raise SystemExit("the pod failed at %s: %r, not %r" % (what, found, expected))


# == The bytecode ==


def sources(cache: Path) -> Iterator[Path]:
    """Tell of which source files there is bytecode below a cache: `/usr/lib/m.cpython-313.pyc` is of `/usr/lib/m.py`."""
    for file in sorted(cache.rglob("*.pyc")):
        yield Path("/", file.relative_to(cache).parent, file.name.partition(".")[0] + ".py")


def compile_module(source: Path) -> None:
    """Write a module's bytecode where the interpreter looks for it."""
    text = source.read_bytes()
    tree = ast.parse(text)
    if "site-packages" not in source.parts:
        drop_docstrings(tree)
    code = compile(tree, str(source), "exec", dont_inherit=True, optimize=0)
    file = Path(cache_from_source(str(source)))
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(MAGIC_NUMBER + UNCHECKED_HASH + source_hash(text) + marshal.dumps(code))


def drop_docstrings(tree: ast.AST) -> None:
    """Take the docstrings out of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.copy_location(ast.Pass(), node.body[0])]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
