"""Payloads of the real SDK are served, and each mistake at the start has its exit code and one clear last line."""
import base64
import functools
import itertools
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence
from urllib.parse import quote

import pytest

from ais_runtime_min import HOOKS, Exit
from harness import ROOT, RUNTIME, Environ, Finished, Runtime, Server, exact_environment, interpreter, make_payload, run_to_end

StartRuntime = Callable[..., Runtime]
SECRET_TARGET = "http://127.0.0.1:9/v1/etl/_object/startup-test/T0pS3cr3t"
TOKEN = "t0ken-of-the-cluster"
FAILED = "Failed to deserialize ETL class"
QUICK_SECONDS = 5.0  # a start that is stopped must not wait for what it started

# Every class of these tests, as a user's script has them; one run of the SDK pickles all.
SCRIPT = '''
import sys, time
import httpx, msgspec, yaml
import PIL.Image
import users_helper
from users_module import ByReference
from aistore.sdk.etl.webserver.base_etl_server import ETLServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer

SUFFIX = b"!"

def shout(data):
    return data.upper() + SUFFIX

class Threaded(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return shout(data)

class FastAPI(FastAPIServer):
    def transform(self, data, *_args):
        return shout(data)

class Flask(FlaskServer):
    def __init__(self):
        super().__init__(port=8000)
        self.shout = lambda data: shout(data)
    def transform(self, data, path, etl_args):
        return self.shout(data)

class Streaming(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        yield from (piece.upper() for piece in iter(lambda: reader.read(3), b""))
        yield SUFFIX

class Grandchild(Threaded):
    def transform(self, data, path, etl_args):
        return super().transform(data, path, etl_args)

class Large(Threaded):
    TABLE = bytes(range(256)) * 1200

class Installed(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        import etl_probe
        return etl_probe.ANSWER

class NotAnETL:
    def transform(self, data, path, etl_args):
        return data

class WithoutTransform(HTTPMultiThreadedServer):
    pass

class WithoutStart(ETLServer):
    def transform(self, data, path, etl_args):
        return data

class NeedsYaml(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return yaml.safe_load(data)

class NeedsHttpx(FastAPIServer):
    def transform(self, data, path, etl_args):
        return httpx.get(data).content

class NeedsMsgspec(FlaskServer):
    def transform(self, data, path, etl_args):
        return msgspec.json.encode(data)

class NeedsPillow(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return PIL.Image.open(data)

class NeedsHelper(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return users_helper.help(data)

class Raises(HTTPMultiThreadedServer):
    def __init__(self):
        super().__init__()
        self.load_model()
    def load_model(self):
        raise ValueError("no model here")
    def transform(self, data, path, etl_args):
        return data

class RaisesSecrets(Raises):
    def load_model(self):
        raise ValueError("cannot read %s/model with token %s" % (self.host_target, self.token))

class RaisesLines(Raises):
    def load_model(self):
        raise ValueError("first\\n\\n  second\\nthird")

class RaisesAtLength(Raises):
    def load_model(self):
        raise ValueError("long " * 5000 + "end")

class RaisesUnicode(Raises):
    def load_model(self):
        raise ValueError("no mod\\u00e8le \\U0001f600 \\udcff")

class ImportsAtConstruction(Raises):
    def load_model(self):
        import yaml

class Exits(Raises):
    def load_model(self):
        sys.exit(0)

class Hangs(Raises):
    def load_model(self):
        print("constructing", flush=True)
        time.sleep(60)

class NoSuper(HTTPMultiThreadedServer):
    def __init__(self):
        self.model = 1
    def transform(self, data, path, etl_args):
        return data

class WantsArguments(HTTPMultiThreadedServer):
    def __init__(self, model):
        super().__init__()
    def transform(self, data, path, etl_args):
        return data

class FastAPIRoutes(FastAPIServer):
    def __init__(self):
        super().__init__()
        self.app.add_api_route("/version", lambda: "1")
    def transform(self, data, path, etl_args):
        return data

class FlaskRoutes(FlaskServer):
    def __init__(self):
        super().__init__()
        self.app.add_url_rule("/version", view_func=lambda: "1")
    def transform(self, data, path, etl_args):
        return data

class HandlesRequests(Threaded):
    class RequestHandler(HTTPMultiThreadedServer.RequestHandler):
        def do_PUT(self):
            self.send_error(500)

class HandlesFastAPI(FastAPI):
    async def _handle_request_buffered(self, path, request, is_get):
        return None

class StartsUp(FastAPI):
    async def startup_event(self):
        self.model = 1

class RegistersRoutes(Flask):
    def _register_routes(self):
        pass

class UnpicklesForever:
    def __reduce__(self):
        return exec, ("import time; print('unpickling', flush=True); time.sleep(60)",)

class UnpicklesWithError:
    def __reduce__(self):
        return int, ("no number",)

class SlowToLoad(Threaded):
    MODEL = UnpicklesForever()

class FailsToLoad(Threaded):
    MODEL = UnpicklesWithError()
'''
DUMP = '''
import base64, cloudpickle, inspect, json
from aistore.sdk.etl.webserver import serialize_class
OWN = {"start", "transform", "transform_stream", "get_mime_type"}

def overriding(base):
    """Make a class that overrides all of the SDK's own names."""
    return type("Overrides", (base,), {"transform": Threaded.transform, **{name: lambda self: None for name in own_names(base)}})

def own_names(base):
    return sorted(name for name in vars(base) if not name.startswith(("__", "_abc_")) and name not in OWN)

payloads = {name: base64.b64encode(cloudpickle.dumps(value)).decode() for name, value in list(globals().items())
            if isinstance(value, type) and (value.__module__ == "__main__" or name == "ByReference")}
payloads.update({name: serialize_class(globals()[name]) for name in ("Threaded", "FastAPI", "Flask", "Streaming", "Large")})
payloads["an instance"] = base64.b64encode(cloudpickle.dumps({"not": "a class"})).decode()
payloads["a function"] = base64.b64encode(cloudpickle.dumps(shout)).decode()
for base in (HTTPMultiThreadedServer, FastAPIServer, FlaskServer):
    payloads["overrides of " + base.__name__] = serialize_class(overriding(base))
    payloads["names of " + base.__name__] = " ".join(own_names(base))
print(json.dumps(payloads))
'''


def run_script(python: str, source: str) -> Dict[str, str]:
    """Run a user's script that has two modules of its own beside it; return the JSON that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "users_helper.py").write_text("def help(data):\n    return data\n")
        base = "from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer\n"
        method = "    def transform(self, data, path, etl_args):\n        return data\n"
        Path(folder, "users_module.py").write_text(base + "class ByReference(HTTPMultiThreadedServer):\n" + method)
        script = Path(folder, "users_script.py")
        script.write_text(source)
        done = subprocess.run([python, str(script)], stdout=subprocess.PIPE, universal_newlines=True, timeout=120, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="session")
def payloads(sdk_python: str) -> Dict[str, str]:
    """The payload of each class of the script, by its name."""
    return run_script(sdk_python, SCRIPT + DUMP)


def start_in_vain(
    payload: Optional[str], env: Optional[Environ] = None, python: Optional[str] = None, timeout: float = 30.0
) -> Finished:
    """Start a pod of one worker that is to give up, and check what holds of all that do: one reason, no secret."""
    variables = {"ETL_CLASS_PAYLOAD": payload, "AIS_TARGET_URL": SECRET_TARGET, "AIS_AUTHN_TOKEN": TOKEN, "NUM_WORKERS": "1"}
    done = run_to_end(env={**variables, **(env or {})}, python=python, timeout=timeout)
    log = "\n".join(done.lines)
    assert done.last_line.startswith("ais_runtime_min: "), log
    assert len([line for line in done.lines if line.startswith("ais_runtime_min: ")]) == 1, log
    for secret in ("T0pS3cr3t", TOKEN):
        assert secret not in log
    return done


def assert_no_traceback(done: Finished) -> None:
    """Check that the log has no traceback, nor frames of one."""
    log = "\n".join(done.lines)
    assert "Traceback" not in log and '  File "' not in log, log


# == What is served ==


@pytest.mark.parametrize("name, base", [
    ("Threaded", "HTTPMultiThreadedServer"), ("FastAPI", "FastAPIServer"), ("Flask", "FlaskServer"),
    ("Streaming", "HTTPMultiThreadedServer"), ("Grandchild", "HTTPMultiThreadedServer"),
])
def test_a_payload_of_the_real_sdk_is_served(
    start_runtime: StartRuntime, payloads: Dict[str, str], name: str, base: str
) -> None:
    runtime = start_runtime(payloads[name], {"NUM_WORKERS": "2"})
    response = runtime.request("PUT", "/bucket/object", b"hello")
    assert (response.status, response.body) == (200, b"HELLO!")
    runtime.wait_for_line(r"serving %s \(%s\) on http://\S+:\d+ with 2 workers" % (name, base), timeout=5)
    assert runtime.terminate() == Exit.OK


def test_a_payload_in_pieces_is_served(start_runtime: StartRuntime, payloads: Dict[str, str]) -> None:
    text = payloads["Large"]
    size = 100 << 10
    assert len(text) > 3 * size
    pieces = {"ETL_CLASS_PAYLOAD_%d" % (start // size + 1): text[start:start + size] for start in range(size, len(text), size)}
    runtime = start_runtime(text[:size], {**pieces, "NUM_WORKERS": "1"})
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO!"


def test_a_payload_in_a_file_is_served(start_runtime: StartRuntime, payloads: Dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "payload.txt"
    file.write_text("\n".join(payloads["Large"][start:start + 76] for start in range(0, len(payloads["Large"]), 76)) + "\n")
    runtime = start_runtime(None, {"ETL_CLASS_PAYLOAD_FILE": str(file), "NUM_WORKERS": "1"})
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO!"


def test_white_space_in_a_payload_does_not_count(start_runtime: StartRuntime, payloads: Dict[str, str]) -> None:
    text = payloads["Threaded"]
    runtime = start_runtime(" %s\r\n\t%s \n" % (text[:50], text[50:]), {"NUM_WORKERS": "1"})
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO!"


# == Variables ==


def test_without_a_payload_it_says_so() -> None:
    done = start_in_vain(None)
    assert (done.code, done.last_line) == (Exit.CONFIG, "ais_runtime_min: ETL_CLASS_PAYLOAD is not set")
    assert_no_traceback(done)


def test_all_bad_variables_are_told_in_the_last_line(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["Threaded"], {
        "NUM_WORKERS": "many", "PORT": "70000", "AIS_TARGET_URL": "tcp://host/T0pS3cr3t", "AIS_CLIENT_CA": "/no/such/ca.pem"})
    assert done.code == Exit.CONFIG
    for word in ("NUM_WORKERS='many'", "PORT='70000'", "AIS_TARGET_URL", "AIS_CLIENT_CA='/no/such/ca.pem'"):
        assert word in done.last_line
    assert_no_traceback(done)


def test_everything_that_is_missing_is_told_at_once() -> None:
    done = start_in_vain(None, {"AIS_TARGET_URL": None, "PORT": "x"})
    assert done.code == Exit.CONFIG
    for word in ("ETL_CLASS_PAYLOAD is not set", "AIS_TARGET_URL is not set", "PORT='x'"):
        assert word in done.last_line
    assert_no_traceback(done)


@pytest.mark.parametrize("name", ["AIS_CLIENT_CA", "AIS_CRT"])
def test_a_certificate_file_without_a_certificate_is_told_by_its_variable(
    payloads: Dict[str, str], tmp_path: Path, name: str
) -> None:
    file = tmp_path / "certificate.pem"
    file.write_text("no certificate")
    done = start_in_vain(payloads["Threaded"], {name: str(file)})
    assert done.code == Exit.CONFIG
    assert name in done.last_line
    assert_no_traceback(done)


def test_a_payload_file_that_is_not_text_is_no_payload(tmp_path: Path) -> None:
    file = tmp_path / "payload"
    file.write_bytes(bytes(range(256)))
    done = start_in_vain(None, {"ETL_CLASS_PAYLOAD_FILE": str(file)})
    assert done.code == Exit.DATA
    assert FAILED in done.last_line and "base64" in done.last_line
    assert_no_traceback(done)


def test_an_empty_payload_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "payload").touch()
    done = start_in_vain(None, {"ETL_CLASS_PAYLOAD_FILE": str(tmp_path / "payload")})
    assert done.code == Exit.DATA
    assert FAILED in done.last_line
    assert_no_traceback(done)


# == The payload's text ==


def encoded(value: object) -> str:
    """Pickle and encode a value that is no class."""
    return base64.b64encode(pickle.dumps(value)).decode()


@pytest.mark.parametrize("payload", [
    "not base64 at all!", "{{ payload }}", "$PAYLOAD", "gAWV\u00e9", "====", "gAWV=gAWV", "<payload>", "gA",
    base64.b64encode(b"this is no pickle").decode(), base64.b64encode(bytes(range(256))).decode(),
    base64.b64encode(b"\x80\x05.").decode(), base64.b64encode(b"\x80\xff").decode(), base64.b64encode(b"").decode() + "AAAA",
    encoded(42), encoded(None), encoded("text"), encoded(int), encoded(len),
])
def test_what_is_no_pickled_etl_class_is_told_without_a_traceback(payload: str) -> None:
    done = start_in_vain(payload)
    assert done.code == Exit.DATA
    assert FAILED in done.last_line
    assert payload not in "\n".join(done.lines)
    assert_no_traceback(done)


@pytest.mark.parametrize("left", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_a_payload_that_was_cut_is_told(payloads: Dict[str, str], left: float, odd: int) -> None:
    text = payloads["Threaded"]
    done = start_in_vain(text[:int(len(text) * left) // 4 * 4 + odd])
    assert done.code == Exit.DATA
    assert FAILED in done.last_line
    assert re.search("cut|truncated|base64|ran out|end", done.last_line.lower())
    assert_no_traceback(done)


@pytest.mark.parametrize("name, words", [
    ("an instance", ["no class", "dict"]),
    ("a function", ["no class", "function"]),
    ("NotAnETL", ["NotAnETL", "not a subclass of ETLServer"]),
    ("WithoutTransform", ["WithoutTransform", "transform()", "transform_stream()"]),
    ("ByReference", ["by reference", "'users_module'", "register_pickle_by_value"]),
])
def test_a_payload_that_cannot_be_served_is_told_with_its_reason(
    payloads: Dict[str, str], name: str, words: Sequence[str]
) -> None:
    done = start_in_vain(payloads[name])
    assert done.code == Exit.DATA
    for word in (FAILED, *words):
        assert word in done.last_line
    assert_no_traceback(done)


@pytest.mark.parametrize("name, module, package", [
    ("NeedsYaml", "yaml", "PyYAML"), ("NeedsHttpx", "httpx", "httpx"), ("NeedsMsgspec", "msgspec", "msgspec"),
    ("NeedsPillow", "PIL", "Pillow"),
])
def test_a_missing_package_is_told_by_its_name_on_pypi(
    payloads: Dict[str, str], name: str, module: str, package: str
) -> None:
    done = start_in_vain(payloads[name])
    assert done.code == Exit.UNAVAILABLE
    assert FAILED in done.last_line
    assert module in done.last_line
    assert re.search(r"add %s to PACKAGES" % package, done.last_line)
    assert_no_traceback(done)


def test_a_missing_module_of_the_users_own_is_told_with_what_to_do(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["NeedsHelper"])
    assert done.code == Exit.UNAVAILABLE
    assert "'users_helper'" in done.last_line and "register_pickle_by_value" in done.last_line
    assert_no_traceback(done)


def test_an_error_of_the_users_own_while_unpickling_is_told(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["FailsToLoad"])
    assert done.code == Exit.DATA
    assert FAILED in done.last_line and "ValueError: invalid literal for int()" in done.last_line


def test_without_cloudpickle_it_says_so(payloads: Dict[str, str], bare_python: str) -> None:
    done = start_in_vain(payloads["Threaded"], python=bare_python)
    assert done.code == Exit.UNAVAILABLE
    assert "cloudpickle is not installed" in done.last_line
    assert_no_traceback(done)


# == Payloads of another Python ==

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
PAIRS = list(itertools.permutations(VERSIONS, 2))
OWN_PAIRS = [pair for pair in PAIRS if "%d.%d" % sys.version_info[:2] in pair]  # tests/run.py --all makes them all
FOREIGN_SCRIPT = '''
import base64, cloudpickle, json
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Constant(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return b"constant"

class Simple(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return data.upper()

class Rich(HTTPMultiThreadedServer):
    """Has what differs between the versions: loops, closures, context managers, handlers, generators."""
    def __init__(self):
        super().__init__()
        self.table = {key: [value for value in range(key)] for key in range(3)}
    def transform_stream(self, reader, path, etl_args):
        with reader:
            for piece in iter(lambda: reader.read(2), b""):
                try:
                    yield b"%d %r" % (len(piece), piece) if piece and path else piece[::-1]
                except (ValueError, KeyError) as error:
                    raise RuntimeError(f"{error!r:>10}") from error

print(json.dumps({cls.__name__: base64.b64encode(cloudpickle.dumps(cls)).decode() for cls in (Constant, Simple, Rich)}))
'''


def other_interpreter(version: str, group: str) -> str:
    """Return the interpreter of another version's environment, or skip the test."""
    python = ROOT / ".venv" / version / group / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no environment of Python %s: tests/run.py --all makes them" % version)
    return str(python)


@functools.lru_cache(maxsize=None)
def foreign_payloads(version: str) -> Dict[str, str]:
    """Return the payloads that another version of Python makes."""
    return run_script(other_interpreter(version, "sdk"), FOREIGN_SCRIPT)


@pytest.mark.parametrize("pickled_by, loaded_by", OWN_PAIRS, ids=["%s-in-%s" % pair for pair in OWN_PAIRS])
def test_a_trivial_payload_of_another_python_is_told_or_does_the_same(pickled_by: str, loaded_by: str) -> None:
    python = other_interpreter(loaded_by, "slim")
    env: Environ = {"ETL_CLASS_PAYLOAD": foreign_payloads(pickled_by)["Constant"], "NUM_WORKERS": "1"}
    with Server([python, str(RUNTIME)], exact_environment(python, env)) as pod:  # its few bytes may be the same in both
        outcome = pod.wait_for_line(r"serving .* on http://\S*:(\d+)|another Python than this (\S+),")
        if outcome[2]:
            assert (outcome[2], pod.wait()) == (loaded_by, Exit.DATA)
        else:
            pod.port = int(outcome[1])
            assert pod.request("PUT", "/bucket/object", b"").body == b"constant"


@pytest.mark.parametrize("pickled_by, loaded_by, name", [
    *((*pair, "Simple") for pair in PAIRS), *((*pair, "Rich") for pair in OWN_PAIRS),
])
def test_a_payload_of_another_python_is_told(pickled_by: str, loaded_by: str, name: str) -> None:
    python = other_interpreter(loaded_by, "slim")
    try:
        done = start_in_vain(foreign_payloads(pickled_by)[name], python=python, timeout=5)
    except subprocess.TimeoutExpired as expired:
        pytest.fail("the class of another Python is served: %r" % expired.stdout)
    assert done.code == Exit.DATA
    assert FAILED in done.last_line
    assert re.search(r"another Python than this %s\b" % re.escape(loaded_by), done.last_line)
    assert_no_traceback(done)


# == The constructor ==


def users_traceback(done: Finished) -> List[str]:
    """Return the log up to its last line, where there must be one traceback and none of its frames the runtime's."""
    log = "\n".join(done.lines)
    assert log.count("Traceback (most recent call last)") == 1, log
    assert RUNTIME.name not in re.sub(r"^ais_runtime_min: .*|- ais_runtime_min -", "", log, flags=re.MULTILINE), log
    return done.lines[:-1]


def test_a_constructor_that_raises_is_told_with_the_users_traceback(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["Raises"])
    assert (done.code, done.last_line) == (Exit.SOFTWARE, "ais_runtime_min: Raises() failed: ValueError: no model here")
    log = "\n".join(users_traceback(done))
    assert re.search(r'File ".*users_script\.py", line \d+, in __init__', log)
    assert re.search(r'File ".*users_script\.py", line \d+, in load_model', log)
    assert "ValueError: no model here" in log


def test_the_reason_stays_the_last_line_when_many_workers_fail(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["Raises"], {"NUM_WORKERS": "8"})
    assert (done.code, done.last_line) == (Exit.SOFTWARE, "ais_runtime_min: Raises() failed: ValueError: no model here")


def test_a_constructor_cannot_tell_secrets(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["RaisesSecrets"])
    assert done.code == Exit.SOFTWARE
    assert "RaisesSecrets() failed: ValueError: cannot read http://127.0.0.1:9***/model with token ***" in done.last_line


def test_a_reason_of_many_lines_is_told_in_one(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["RaisesLines"])
    assert done.last_line == "ais_runtime_min: RaisesLines() failed: ValueError: first second third"


def test_a_long_reason_is_cut_and_not_lost(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["RaisesAtLength"])
    assert done.code == Exit.SOFTWARE
    assert done.last_line.startswith("ais_runtime_min: RaisesAtLength() failed: ValueError: long long long")


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "utf-8:strict"}])
def test_a_reason_of_any_characters_is_told(payloads: Dict[str, str], env: Environ) -> None:
    done = start_in_vain(payloads["RaisesUnicode"], env, timeout=8)
    assert done.code == Exit.SOFTWARE
    assert done.last_line.startswith("ais_runtime_min: RaisesUnicode() failed: ValueError: no mod")


def test_a_constructor_that_imports_a_missing_package_is_told_by_its_name_on_pypi(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["ImportsAtConstruction"])
    assert done.code in (Exit.UNAVAILABLE, Exit.SOFTWARE)
    assert "No module named 'yaml'" in done.last_line and "PyYAML" in done.last_line
    assert "in load_model" in "\n".join(users_traceback(done))


def test_a_constructor_that_exits_does_not_end_the_pod_as_if_all_were_well(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["Exits"])
    assert (done.code, done.last_line) == (Exit.SOFTWARE, "ais_runtime_min: Exits() failed: SystemExit: 0")


@pytest.mark.parametrize("name, words", [
    ("NoSuper", ["NoSuper.__init__() does not call super().__init__()"]),
    ("WantsArguments", ["WantsArguments", "missing 1 required positional argument: 'model'"]),
    ("WithoutStart", ["WithoutStart", "abstract", "start"]),
    ("HandlesRequests", ["HandlesRequests overrides RequestHandler"]),
    ("HandlesFastAPI", ["HandlesFastAPI overrides _handle_request_buffered"]),
])
def test_a_class_that_asks_for_what_is_not_there_is_told_without_a_traceback(
    payloads: Dict[str, str], name: str, words: Sequence[str]
) -> None:
    done = start_in_vain(payloads[name])
    assert done.code == Exit.SOFTWARE
    for word in words:
        assert word in done.last_line
    assert_no_traceback(done)


@pytest.mark.parametrize("base", ["HTTPMultiThreadedServer", "FastAPIServer", "FlaskServer"])
def test_every_internal_of_the_sdks_servers_that_a_class_overrides_is_told(payloads: Dict[str, str], base: str) -> None:
    done = start_in_vain(payloads["overrides of " + base])
    assert done.code == Exit.SOFTWARE
    told = re.search(r"Overrides overrides ([\w, ]+), which", done.last_line)
    hooks = {name for cls, names in HOOKS.items() if cls.__name__ == base for name in names}
    assert told and sorted(told[1].split(", ")) == [name for name in payloads["names of " + base].split(" ") if name not in hooks]
    assert_no_traceback(done)


# == The port ==


@pytest.mark.parametrize("family, address", [
    (socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::"),
])
def test_a_port_that_is_taken_is_told(payloads: Dict[str, str], family: socket.AddressFamily, address: str) -> None:
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.create_server((address, 0), family=family) as listener:
        port = listener.getsockname()[1]
        done = start_in_vain(payloads["Threaded"], {"PORT": str(port)})
    assert done.code == Exit.SYSTEM
    assert "port %d" % port in done.last_line and "in use" in done.last_line
    assert_no_traceback(done)


# == /dev/termination-log ==

WITH_TERMINATION_LOG = (
    "import sys; sys.path.insert(0, sys.argv[1]); import ais_runtime_min; ais_runtime_min.TERMINATION_LOG = sys.argv[2]; "
    "sys.exit(ais_runtime_min.main([]))")


def end_with_termination_log(file: Path, env: Environ) -> int:
    """Run the runtime with another path for the termination log and return its exit code."""
    python = interpreter("slim")
    command = [python, "-c", WITH_TERMINATION_LOG, str(ROOT), str(file)]
    variables: Environ = {"NUM_WORKERS": "1", "AIS_TARGET_URL": SECRET_TARGET, "AIS_AUTHN_TOKEN": TOKEN, **env}
    return subprocess.run(command, env=exact_environment(python, variables), timeout=30).returncode


def test_the_reason_goes_to_the_termination_log_too(tmp_path: Path) -> None:
    file = tmp_path / "termination-log"
    file.touch()
    assert end_with_termination_log(file, {}) == Exit.CONFIG
    assert file.read_text() == "ETL_CLASS_PAYLOAD is not set"


def test_the_termination_log_is_short_and_without_secrets(payloads: Dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "termination-log"
    file.touch()
    assert end_with_termination_log(file, {"ETL_CLASS_PAYLOAD": payloads["RaisesAtLength"]}) == Exit.SOFTWARE
    assert file.read_text().startswith("RaisesAtLength() failed: ValueError: long long")
    assert file.stat().st_size <= 2048
    assert end_with_termination_log(file, {"ETL_CLASS_PAYLOAD": payloads["RaisesSecrets"]}) == Exit.SOFTWARE
    text = file.read_text()
    assert text.startswith("RaisesSecrets() failed: ValueError: cannot read")
    assert "T0pS3cr3t" not in text and TOKEN not in text


def test_no_termination_log_is_made_where_there_is_none(tmp_path: Path) -> None:
    assert end_with_termination_log(tmp_path / "termination-log", {}) == Exit.CONFIG
    assert not (tmp_path / "termination-log").exists()


# == Packages ==

PROBE = "etl_probe"


def make_wheel(folder: Path, version: str = "1.0") -> Path:
    """Make the smallest wheel: one module and its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "%s-%s.dist-info" % (PROBE, version)
    files = {
        PROBE + ".py": 'ANSWER = b"installed"\n',
        info + "/METADATA": "Metadata-Version: 2.1\nName: %s\nVersion: %s\n" % (PROBE, version),
        info + "/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join("%s,,\n" % name for name in [*files, info + "/RECORD"])
    wheel = folder / ("%s-%s-py3-none-any.whl" % (PROBE, version))
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, info + "/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def make_environment(folder: Path, lends: Iterable[str] = ()) -> str:
    """Make an environment without any package and return its interpreter; it may borrow what others have."""
    subprocess.run([interpreter("slim"), "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = str(folder / "bin" / "python")
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.check_output([python, "-c", ask], universal_newlines=True).strip()
    lent = [subprocess.check_output([other, "-c", ask], universal_newlines=True) for other in lends]
    Path(own, "lent.pth").write_text("".join(lent))
    return python


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has nothing installed."""
    return make_environment(tmp_path_factory.mktemp("bare") / "environment")


@pytest.fixture
def own_python(tmp_path: Path, slim_python: str) -> str:
    """An interpreter that has cloudpickle and pip, and keeps for itself what is installed."""
    return make_environment(tmp_path / "environment", [slim_python])


def make_apk(folder: Path, script: str) -> Environ:
    """Make a stand-in for apk that has no package and records its arguments, one a line; return the PATH that finds it."""
    folder.mkdir(exist_ok=True)
    file = folder / "apk"
    file.write_text('#!/bin/sh\n[ "$1" = info ] && exit 1\nprintf "%%s\\n" "$@" >> "%s/arguments"\n%s\n' % (folder, script))
    file.chmod(0o755)
    return {"PATH": "%s:%s" % (folder, os.environ.get("PATH", os.defpath))}


def without_network(wheels: Path) -> Environ:
    """Return the variables that have pip take wheels from a folder and from nowhere else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1",
            "PIP_ROOT_USER_ACTION": "ignore"}


def test_a_package_is_installed_before_the_class_is_loaded(
    start_runtime: StartRuntime, payloads: Dict[str, str], own_python: str, tmp_path: Path
) -> None:
    make_wheel(tmp_path / "wheels")
    env = {"PACKAGES": "etl-probe>=1,<2,cloudpickle", "NUM_WORKERS": "1", **without_network(tmp_path / "wheels")}
    runtime = start_runtime(payloads["Installed"], env, python=own_python)
    assert runtime.request("PUT", "/bucket/object", b"").body == b"installed"


def test_os_packages_are_installed_before_python_packages(
    start_runtime: StartRuntime, payloads: Dict[str, str], own_python: str, tmp_path: Path
) -> None:
    wheel = make_wheel(tmp_path / "built")
    (tmp_path / "wheels").mkdir()  # pip finds nothing here before apk has run
    env = {**make_apk(tmp_path / "tools", 'cp "%s" "%s"' % (wheel, tmp_path / "wheels")),
           "OS_PACKAGES": " ffmpeg, file=5.46-r2 ,", "PACKAGES": "etl_probe", "NUM_WORKERS": "1",
           **without_network(tmp_path / "wheels")}
    runtime = start_runtime(payloads["Installed"], env, python=own_python)
    assert runtime.request("PUT", "/bucket/object", b"").body == b"installed"
    arguments = (tmp_path / "tools" / "arguments").read_text().split("\n")
    assert arguments[0] == "add" and "--no-cache" in arguments
    assert arguments[-3:] == ["ffmpeg", "file=5.46-r2", ""]


def test_a_missing_apk_is_told(payloads: Dict[str, str], tmp_path: Path) -> None:
    done = start_in_vain(payloads["Threaded"], {"OS_PACKAGES": "ffmpeg", "PATH": str(tmp_path)})
    assert done.code == Exit.UNAVAILABLE
    assert "OS_PACKAGES" in done.last_line and "apk" in done.last_line
    assert_no_traceback(done)


def test_a_failing_apk_is_told_with_its_last_words(payloads: Dict[str, str], tmp_path: Path) -> None:
    script = 'echo "fetching"; echo "ERROR: unable to select packages:" >&2; echo "  nonesuch (no such package):" >&2; exit 3'
    done = start_in_vain(payloads["Threaded"], {"OS_PACKAGES": "nonesuch", "PACKAGES": "x", **make_apk(tmp_path, script)})
    assert done.code == Exit.UNAVAILABLE
    for word in ("OS_PACKAGES", "apk", "exit code 3", "unable to select packages"):
        assert word in done.last_line
    assert any("nonesuch (no such package)" in line for line in done.lines)
    assert_no_traceback(done)


def test_a_failing_apk_that_says_nothing_is_told(payloads: Dict[str, str], tmp_path: Path) -> None:
    done = start_in_vain(payloads["Threaded"], {"OS_PACKAGES": "nonesuch", **make_apk(tmp_path, "exit 99")})
    assert done.code == Exit.UNAVAILABLE
    assert "OS_PACKAGES" in done.last_line and "exit code 99" in done.last_line
    assert_no_traceback(done)


def test_a_failing_pip_is_told_with_its_reason(payloads: Dict[str, str], tmp_path: Path) -> None:
    done = start_in_vain(payloads["Threaded"], {"PACKAGES": "no-such-package-here", **without_network(tmp_path)})
    assert done.code == Exit.UNAVAILABLE
    for word in ("PACKAGES", "pip", "No matching distribution found for no-such-package-here"):
        assert word in done.last_line
    assert_no_traceback(done)


def test_a_missing_pip_is_told(payloads: Dict[str, str], bare_python: str, tmp_path: Path) -> None:
    done = start_in_vain(payloads["Threaded"], {"PACKAGES": "pillow", **without_network(tmp_path)}, python=bare_python)
    assert done.code == Exit.UNAVAILABLE
    assert "PACKAGES" in done.last_line and "No module named pip" in done.last_line
    assert_no_traceback(done)


@pytest.mark.parametrize("name, text", [
    ("PACKAGES", "pillow,--index-url=https://host/"), ("PACKAGES", "-r/etc/passwd"),
    ("OS_PACKAGES", "--repository=https://host/"),
])
def test_an_option_among_the_packages_is_refused_before_anything_is_installed(
    payloads: Dict[str, str], tmp_path: Path, name: str, text: str
) -> None:
    done = start_in_vain(payloads["Threaded"], {name: text, **make_apk(tmp_path, "exit 0"), **without_network(tmp_path)})
    assert done.code in (Exit.UNAVAILABLE, Exit.CONFIG)
    assert name in done.last_line and text.split(",")[-1] in done.last_line
    assert not (tmp_path / "arguments").exists()
    assert_no_traceback(done)


# == Modules that are loaded when they are needed, TLS first of all ==

CURIOUS = '''
import http.client, sys, threading
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Curious(HTTPMultiThreadedServer):
    """Does what the arguments tell."""

    def __init__(self):
        super().__init__()
        self.barrier = threading.Barrier(8)

    def transform(self, data, path, etl_args):
        return getattr(self, etl_args)().encode()

    def list(self):
        late = ("html", "inspect", "ipaddress", "mimetypes", "shutil", "ssl", "uuid")
        return " ".join(name for name in late if name in sys.modules)

    def copy(self):
        import dataclasses, http.server, shutil, cloudpickle, pickle, importlib
        kept = http.server.shutil  # by the library, from before this class was loaded
        assert kept.copyfileobj is shutil.copyfileobj and kept is not shutil
        assert pickle.loads(cloudpickle.dumps(shutil)) is importlib.reload(shutil) is shutil
        return dataclasses.make_dataclass("Point", ["x"]).__doc__

    def look(self):
        return "loaded" if "_ssl" in sys.modules else "not loaded"

    def use(self):
        self.barrier.wait(30)
        context = http.client.ssl.create_default_context()
        import ssl as now
        connection = http.client.HTTPSConnection("127.0.0.1", 9, context=context)
        assert type(context) is now.SSLContext is http.client.ssl.SSLContext is sys.modules["ssl"].SSLContext
        return "%s %s" % (context.verify_mode == now.CERT_REQUIRED, now.__name__)

    def turn_off(self):
        ssl = http.client.ssl
        ssl._create_default_https_context = ssl._create_unverified_context
        import ssl as now
        return str(now._create_default_https_context is now._create_unverified_context
                   is http.client.ssl._create_default_https_context)

    def ask_for_nothing(self):
        try:
            return str(http.client.ssl.nothing_of_that_name)
        except AttributeError as error:
            return str(error)
'''


def do(runtime: Runtime, what: str) -> str:
    """Have the class do something."""
    return runtime.request("PUT", "/bucket/object?etl_args=" + quote(what), b"x").body.decode()


@pytest.fixture
def start_curious(start_runtime: StartRuntime) -> StartRuntime:
    """A function that starts one worker of the class."""
    return lambda **env: start_runtime(make_payload(CURIOUS, "Curious"), {"NUM_WORKERS": "1", **env})


def test_tls_is_loaded_by_many_threads_at_once(start_curious: StartRuntime) -> None:
    runtime = start_curious()
    assert do(runtime, "look") == "not loaded"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(functools.partial(do, runtime), ["use"] * 8)) == {"True ssl"}
    assert do(runtime, "look") == "loaded"


@pytest.mark.parametrize("what, answer", [
    ("turn_off", "True"), ("ask_for_nothing", "module 'ssl' has no attribute 'nothing_of_that_name'"),
])
def test_what_a_class_sets_or_asks_of_tls_is_that_of_the_module_itself(
    start_curious: StartRuntime, what: str, answer: str
) -> None:
    assert do(start_curious(), what) == answer


def test_workers_share_tls_where_the_target_speaks_it(start_curious: StartRuntime) -> None:
    assert do(start_curious(AIS_TARGET_URL="https" + SECRET_TARGET[4:]), "look") == "loaded"


def test_what_few_classes_need_is_loaded_by_none_that_do_not(start_curious: StartRuntime) -> None:
    runtime = start_curious()
    assert do(runtime, "list") == ""
    assert do(runtime, "copy") == "Point(x: 'typing.Any')"
    assert do(runtime, "list").split() == ["inspect", "shutil"]


# == Signals ==


def start_pod(payload: str, env: Environ) -> Server:
    """Start a pod that is not to get as far as serving."""
    python = interpreter("slim")
    variables: Environ = {"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "2", **env}
    return Server([python, str(RUNTIME)], exact_environment(python, variables))


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and is not reaped yet does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE, universal_newlines=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def wait_until_gone(pids: Iterable[int]) -> List[int]:
    """Return those of some processes that still run after a while."""
    deadline = time.monotonic() + QUICK_SECONDS
    left = list(pids)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [pid for pid in left if is_running(pid)]
    return left


def test_sigterm_while_apk_runs_ends_both(payloads: Dict[str, str], tmp_path: Path) -> None:
    script = 'sleep 60 &\necho "$$ $!" > "%s/new"; mv "%s/new" "%s/pids"; wait' % (tmp_path, tmp_path, tmp_path)
    pids: List[int] = []
    with start_pod(payloads["Threaded"], {"OS_PACKAGES": "ffmpeg", **make_apk(tmp_path, script)}) as pod:
        deadline = time.monotonic() + 10
        while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
        began = time.monotonic()
        assert pod.terminate() == Exit.OK
        assert time.monotonic() - began < QUICK_SECONDS
        assert wait_until_gone(pids) == []


@pytest.mark.parametrize("name, line", [("SlowToLoad", "unpickling"), ("Hangs", "constructing")])
def test_sigterm_while_the_users_code_starts_ends_it_at_once(payloads: Dict[str, str], name: str, line: str) -> None:
    with start_pod(payloads[name], {}) as pod:
        pod.wait_for_line(line)
        began = time.monotonic()
        assert pod.terminate() == Exit.OK
        assert time.monotonic() - began < QUICK_SECONDS
        assert "ais_runtime_min: " not in pod.log()
