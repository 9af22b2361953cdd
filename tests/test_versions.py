"""Bytecode that another Python compiled is refused before it runs, and this Python's own never is.

Every Python from 3.9 to 3.15 that has environments is tried with the payloads of every other one.
"""
import json
import subprocess
import sys
from typing import Any, List

import pytest

from ais_runtime_min import Exit
from harness import ROOT, RUNTIME, exact_environment, interpreter, make_payload, run_to_end
from run import VERSIONS, python_of

RUNNING = "%d.%d" % sys.version_info[:2]
REFUSAL = (
    "Failed to deserialize ETL class: ETL_CLASS_PAYLOAD was pickled by another Python than this %s, whose "
    "bytecode differs: use the image of the Python that pickled it")

# A class for each kind of code, all of it in the class itself: each must be refused by itself.
SOURCE = '''
import asyncio, contextlib, os
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer as Base

class Constant(Base):
    def transform(self, data, path, etl_args):
        return b"constant"

class Plain(Base):
    def transform(self, data, path, etl_args):
        return data.upper()

class Unreached(Base):
    def transform(self, data, path, etl_args):
        return data.lower()
        return data.upper()

class Specialised(Base):
    "Its bytecode was replaced by the interpreter, since it ran often before it was pickled."

    def transform(self, data, path, etl_args):
        total = 0
        for number in data:
            total += number * 2 if number > 50 else -number
        return str(total)

for _ in range(5000):
    Specialised.transform(None, b"abc", "", "")

class Closures(Base):
    def transform(self, data, path, etl_args):
        count = 0
        def add(amount, *others, factor=1, **named):
            nonlocal count
            count += (amount + sum(others)) * factor
            return lambda: [count, len(named), len(data)]
        return str(add(1, 2, factor=3, x=4)())

class Generators(Base):
    def transform(self, data, path, etl_args):
        def pairs():
            received = yield "begun"
            while received:
                received = yield received * 2
            return "returned"
        def outer():
            yield (yield from pairs())
        steps = outer()
        return " ".join([next(steps), steps.send("x"), steps.send(""), *(part for part in "ab")])

class Coroutines(Base):
    def transform(self, data, path, etl_args):
        async def numbers():
            for number in range(3):
                await asyncio.sleep(0)
                yield number
        async def run():
            async with contextlib.AsyncExitStack():
                return [number async for number in numbers() if number]
        return str(asyncio.run(run()))

class Handlers(Base):
    def transform(self, data, path, etl_args):
        seen = []
        for error in (ValueError("v"), KeyError("k"), None):
            try:
                try:
                    if error:
                        raise error
                except ValueError as caught:
                    raise RuntimeError("from") from caught
                else:
                    seen.append("else")
                finally:
                    seen.append("finally")
            except (RuntimeError, KeyError) as caught:
                seen.append(type(caught.__cause__ or caught).__name__)
        return " ".join(seen)

class Scopes(Base):
    def transform(self, data, path, etl_args):
        class Inner(dict):
            size: int = 3
            def __init__(self, **named):
                super().__init__(**named)
                del self["b"]
        import os.path as where
        return str([Inner(a=1, b=2), Inner.size, __class__.__name__, where is os.path])

class Large(Base):
    def transform(self, data, path, etl_args):
        numbers = {}
        while len(numbers) < 600:
LINES
        return str(sum(numbers.values()))
'''.replace("LINES", "\n".join(
    "            if data or numbers.get('k{0}'):\n"
    "                numbers['k{0}'] = 1{0:03}".format(number) for number in range(600)))
RESULTS = {  # of the classes, by their names, for the object b"ab cd"
    "Constant": "constant", "Plain": "AB CD", "Unreached": "ab cd", "Specialised": "756", "Closures": "[9, 1, 5]",
    "Generators": "begun xx returned a b", "Coroutines": "[1, 2]",
    "Handlers": "finally ValueError finally KeyError else finally",
    "Scopes": "[{'a': 1}, 3, 'Scopes', True]",
    "Large": str(sum(range(1000, 1600))),
}


def interpreter_of(version: str, group: str) -> str:
    """Return the interpreter of an environment of any Python, or skip the test."""
    if version == RUNNING:
        return interpreter(group)
    if not is_here(version, group):
        pytest.skip("there is no environment of Python %s: tests/run.py --all makes them" % version)
    return str(python_of(ROOT / ".venv" / version / group))


def is_here(version: str, group: str) -> bool:
    """Tell whether an environment has been made."""
    return (ROOT / ".venv" / version / group / "made-from").is_file()


def run_child(python: str, script: str, given: Any = None) -> List[Any]:
    """Run a script that imports the runtime; return the lines of JSON that it prints.

    With its debugging allocator Python aborts where memory was written that nobody had asked for.
    """
    variables = {"PYTHONPATH": str(RUNTIME.parent), "PYTHONMALLOC": "debug"}
    done = subprocess.run(
        [python, "-X", "faulthandler", "-c", script], env=exact_environment(python, variables),
        input=json.dumps(given),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "%s\nended after %s" % (done.stderr, lines[-1:])
    return [json.loads(line) for line in lines]


# == Payloads of another Python ==

LOAD = """
import json, sys
import ais_runtime_min as runtime

def outcome(payload):
    try:
        cls = runtime.load_etl_class(runtime.Settings(payload=payload))
    except runtime.PayloadError as error:
        return str(error)
    result = cls().transform(b"ab cd", "", "")
    return result if isinstance(result, str) else result.decode()

for version, name, payload in json.load(sys.stdin):
    print(json.dumps([version, name, outcome(payload)]), flush=True)
"""


@pytest.mark.parametrize("loaded_by", VERSIONS)
def test_classes_of_every_other_python_are_refused_and_its_own_work(loaded_by: str) -> None:
    python = interpreter_of(loaded_by, "slim")
    payloads = [(version, name, make_payload(SOURCE, name, interpreter_of(version, "sdk")))
                for version in VERSIONS if is_here(version, "sdk") for name in RESULTS]
    wrong = []
    for version, name, outcome in run_child(python, LOAD, payloads):
        allowed = [RESULTS[name] if version == loaded_by else REFUSAL % loaded_by]
        if name == "Constant":  # three instructions, which may be the same in both
            allowed.append(RESULTS[name])
        if outcome not in allowed:
            wrong.append((version, name, outcome))
    assert wrong == []


@pytest.mark.parametrize("pickled_by", [version for version in VERSIONS if version != RUNNING])
def test_a_start_with_a_class_of_another_python_ends_with_the_reason(pickled_by: str) -> None:
    payload = make_payload(SOURCE, "Plain", interpreter_of(pickled_by, "sdk"))
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": payload})
    assert (done.code, done.last_line) == (Exit.DATA, "ais_runtime_min: " + REFUSAL % RUNNING)
    assert "Traceback" not in "\n".join(done.lines)


# == No code of this Python is refused ==

NEWEST_SYNTAX = {  # what the standard library of the version that brings it hardly uses
    "3.10": "def f(x):\n    match x:\n        case {'a': [int(b), *_]} | {'c': b} if b:\n"
            "            return b\n        case (1 | 2) as y:\n            return y\n",
    "3.11": "try:\n    g()\nexcept* (OSError, ValueError) as e:\n    raise\nfinally:\n    h()\n",
    "3.12": "type A[T] = list[T]\nclass B[T: int]:\n    def f[*S](self, *s: *S) -> T:\n"
            "        return f'{f'{s!r:>{9}}'}'\n",
    "3.13": "class A[T = int]:\n    pass\n",
    "3.14": "def f(x, y):\n    try:\n        return t'{x!r} {y:>{x}}'\n    except A, B:\n"
            "        return __annotations__\n",
    "3.15": "lazy import json\nlazy from os import path\ndef f(x):\n    return [*y for y in x]\n",
}
LOAD_LIBRARY = """
import json, sys, sysconfig, warnings
from pathlib import Path
import ais_runtime_min as runtime

warnings.simplefilter("ignore")  # of the syntax of some files
runtime.install_sdk_names()
FOLDER = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "lib2to3"}

class Holder(runtime.HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return data

def is_refused(text):
    Holder.code = compile(text, "<text>", "exec", dont_inherit=True)
    try:
        runtime.load_etl_class(runtime.Settings(payload=runtime.serialize_class(Holder)))
    except runtime.PayloadError as error:
        return str(error)

files = [file for file in FOLDER.rglob("*.py")
         if not LEFT_OUT.intersection(file.relative_to(FOLDER).parts)]
texts = {str(file): file.read_bytes() for file in files if file.exists()}
texts.update({version: text for version, text in json.load(sys.stdin).items()
              if tuple(map(int, version.split("."))) <= sys.version_info})
for name, text in texts.items():
    print(json.dumps([name, is_refused(text)]))
"""


def test_no_code_of_the_standard_library_is_taken_for_foreign(slim_python: str) -> None:
    outcomes = run_child(slim_python, LOAD_LIBRARY, NEWEST_SYNTAX)
    assert [(name, error) for name, error in outcomes if error] == []
    assert len(outcomes) > 400


# == What the check looks at ==

# Changes the bytecode inside a payload, and then the tables of instructions that this Python has.
CHECK = """
import base64, json, opcode
import ais_runtime_min as runtime

runtime.install_sdk_names()

class Plain(runtime.HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return data.upper()

CODE = Plain.transform.__code__.co_code
PICKLED = base64.b64decode(runtime.serialize_class(Plain))
assert PICKLED.count(CODE) == 1
RESUME, NOP = opcode.opmap["RESUME"], opcode.opmap["NOP"]
START = CODE.index(bytes((RESUME, 0)))
CACHED = next(offset for offset in range(START, len(CODE), 2) if not CODE[offset])
ENTRIES = opcode._inline_cache_entries
unknown = next(number for number, name in enumerate(opcode.opname) if name.startswith("<"))
OTHERS = {
    "as it is": CODE,
    "without RESUME": CODE[:START] + bytes((NOP, 0)) + CODE[START + 2:],
    "an unknown instruction": CODE[:START] + bytes((unknown, 0)) + CODE[START + 2:],
    "a needless entry": CODE[:START] + bytes((0, 0)) + CODE[START + 2:],
    "an instruction for an entry": CODE[:CACHED] + bytes((NOP, 0)) + CODE[CACHED + 2:],
    "an argument for an entry": CODE[:CACHED] + bytes((0, 1)) + CODE[CACHED + 2:],
    "ends before its entries": CODE[:-2] + bytes((opcode.opmap["LOAD_GLOBAL"], 0)),
}

def is_loaded(code):
    payload = base64.b64encode(PICKLED.replace(CODE, code)).decode()
    try:
        return runtime.load_etl_class(runtime.Settings(payload=payload)) is not None
    except runtime.PayloadError as error:
        return str(error)

print(json.dumps({name: is_loaded(code) for name, code in OTHERS.items()}))
NAMES = opcode.opname
TABLES = [None, {}, [], [1] * 256, [0] * 256, dict.fromkeys(opcode.opmap, 1)]
STRANGE = [(entries, NAMES) for entries in TABLES]
STRANGE += [(ENTRIES, ["<%d>" % number for number in range(256)]), (ENTRIES, NAMES[:9])]
results = []
for entries, names in [*STRANGE, (ENTRIES, NAMES)]:
    opcode._inline_cache_entries, opcode.opname = entries, names
    results.append(is_loaded(OTHERS["without RESUME"]))
del opcode._inline_cache_entries
print(json.dumps([*results, is_loaded(OTHERS["without RESUME"])]))
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.9 and 3.10 are told by their line tables")
def test_bytes_that_no_compiler_makes_are_refused_unless_there_is_no_telling(slim_python: str) -> None:
    by_code, by_table = run_child(slim_python, CHECK)
    assert by_code.pop("as it is") is True
    assert by_code == dict.fromkeys(by_code, REFUSAL % RUNNING)
    assert by_table == [True] * 8 + [REFUSAL % RUNNING, True]
