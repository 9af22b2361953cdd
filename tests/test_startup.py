"""Payloads of the real SDK are served, and each mistake at the start has its exit code and one clear last line."""
import base64
import functools
import json
import pickle
import re
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple
from urllib.parse import quote

import pytest

from ais_runtime_min import Exit
from harness import (ROOT, RUNTIME, Environ, Finished, Runtime, Server, exact_environment,
                     interpreter, make_payload, run_to_end, started)

StartRuntime = Callable[..., Runtime]
SECRET_TARGET = "http://127.0.0.1:9/v1/etl/_object/startup-test/T0pS3cr3t"
TOKEN = "t0ken-of-the-cluster"
FAILED = "Failed to deserialize ETL class"
QUICK_SECONDS = 5.0  # a start that is stopped must not wait for what it loads

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

class Grandchild(Threaded):
    def transform(self, data, path, etl_args):
        return super().transform(data, path, etl_args)

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

class HandlesRequests(Threaded):
    class RequestHandler(HTTPMultiThreadedServer.RequestHandler):
        def do_PUT(self):
            self.send_error(500)

class HandlesFastAPI(FastAPI):
    async def _handle_request_buffered(self, path, request, is_get):
        return None

class UnpicklesForever:
    def __reduce__(self):
        return exec, ("import time; print('unpickling', flush=True)\\nfor _ in range(600): time.sleep(0.1)",)

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
for cls in (Threaded, FastAPI, Flask):
    payloads[cls.__name__] = serialize_class(cls)
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
    ("Grandchild", "HTTPMultiThreadedServer"),
])
def test_a_payload_of_the_real_sdk_is_served(
    start_runtime: StartRuntime, payloads: Dict[str, str], name: str, base: str
) -> None:
    runtime = start_runtime(payloads[name], {"NUM_WORKERS": "2"})
    response = runtime.request("PUT", "/bucket/object", b"hello")
    assert (response.status, response.body) == (200, b"HELLO!")
    runtime.wait_for_line(r"serving %s \(%s\) on http://\S+:\d+ with 2 workers" % (name, base), timeout=5)
    assert runtime.terminate() == Exit.OK


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


@pytest.mark.parametrize("content", [b"", bytes(range(256))], ids=["empty", "no text"])
def test_a_payload_file_without_a_payload_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "payload").write_bytes(content)
    done = start_in_vain(None, {"ETL_CLASS_PAYLOAD_FILE": str(tmp_path / "payload")})
    assert done.code == Exit.DATA
    assert FAILED in done.last_line
    assert "base64" in done.last_line or not content
    assert_no_traceback(done)


# == The payload ==

LOAD = """
import json, sys
import ais_runtime_min as runtime

def outcome(payload):
    try:
        return 0, runtime.load_etl_class(runtime.Settings(payload=payload)).__name__
    except runtime.StartupError as error:
        return error.exit, str(error)

print(json.dumps(list(map(outcome, json.load(sys.stdin)))))
"""


def load(payloads: Sequence[str]) -> List[Tuple[str, int, str]]:
    """Load payloads, one after the other; return with each its exit code, and the reason."""
    done = subprocess.run(
        [interpreter("slim"), "-c", LOAD], env={"PYTHONPATH": str(ROOT)}, check=True, timeout=60,
        input=json.dumps(payloads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        universal_newlines=True)
    assert "Traceback" not in done.stdout
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return [(payload, *outcome) for payload, outcome in zip(payloads, outcomes)]


def encoded(value: object) -> str:
    """Pickle and encode a value that is no class."""
    return base64.b64encode(pickle.dumps(value)).decode()


NO_PAYLOADS = [
    "not base64 at all!", "{{ payload }}", "$PAYLOAD", "gAWV\u00e9", "====", "gAWV=gAWV", "<payload>", "gA",
    base64.b64encode(b"this is no pickle").decode(), base64.b64encode(bytes(range(256))).decode(),
    base64.b64encode(b"\x80\x05.").decode(), base64.b64encode(b"\x80\xff").decode(), base64.b64encode(b"").decode() + "AAAA",
    encoded(42), encoded(None), encoded("text"), encoded(int), encoded(len),
]


def test_what_is_no_pickled_etl_class_is_told_and_not_quoted() -> None:
    for payload, code, reason in load(NO_PAYLOADS):
        assert code == Exit.DATA and reason.startswith(FAILED), (payload, reason)
        assert payload not in reason


def test_a_payload_that_was_cut_is_told(payloads: Dict[str, str]) -> None:
    text = payloads["Threaded"]
    sizes = [int(len(text) * left) // 4 * 4 + odd for left in (0.1, 0.5, 0.9) for odd in range(4)]
    for payload, code, reason in load([text[:size] for size in sizes]):
        assert code == Exit.DATA and reason.startswith(FAILED), (len(payload), reason)
        assert re.search("cut|truncated|base64|ran out|end", reason.lower()), (len(payload), reason)


UNUSABLE = {  # the exit code, and what the reason says
    "an instance": (Exit.DATA, ["no class", "dict"]),
    "a function": (Exit.DATA, ["no class", "function"]),
    "NotAnETL": (Exit.DATA, ["NotAnETL", "not a subclass of ETLServer"]),
    "WithoutTransform": (Exit.DATA, ["WithoutTransform", "transform()", "transform_stream()"]),
    "ByReference": (Exit.DATA, ["by reference", "'users_module'", "register_pickle_by_value"]),
    "NeedsHelper": (Exit.UNAVAILABLE, ["'users_helper'", "register_pickle_by_value"]),
    "NeedsYaml": (Exit.UNAVAILABLE, ["'yaml'", "add PyYAML to PACKAGES"]),
    "NeedsHttpx": (Exit.UNAVAILABLE, ["'httpx'", "add httpx to PACKAGES"]),
    "NeedsMsgspec": (Exit.UNAVAILABLE, ["'msgspec'", "add msgspec to PACKAGES"]),
    "NeedsPillow": (Exit.UNAVAILABLE, ["'PIL'", "add Pillow to PACKAGES"]),
}


def test_a_payload_that_cannot_be_served_is_told_with_what_to_do(payloads: Dict[str, str]) -> None:
    outcomes = load([payloads[name] for name in UNUSABLE])
    for (name, (expected, words)), (_, code, reason) in zip(UNUSABLE.items(), outcomes):
        assert code == expected and reason.startswith(FAILED), (name, reason)
        assert [word for word in words if word not in reason] == [], (name, reason)


@pytest.mark.parametrize("payload, code", [
    ("{{ payload }}", Exit.DATA), (encoded(42), Exit.DATA), ("a function", Exit.DATA),
    ("NeedsYaml", Exit.UNAVAILABLE),
])
def test_a_pod_whose_class_cannot_be_loaded_ends_with_the_reason_and_without_a_traceback(
    payloads: Dict[str, str], payload: str, code: Exit
) -> None:
    done = start_in_vain(payloads.get(payload, payload))
    assert done.code == code and FAILED in done.last_line
    assert payload not in "\n".join(done.lines) or payload in payloads
    assert_no_traceback(done)


def test_an_error_of_the_users_own_while_unpickling_is_told(payloads: Dict[str, str]) -> None:
    done = start_in_vain(payloads["FailsToLoad"])
    assert done.code == Exit.DATA
    assert FAILED in done.last_line and "ValueError: invalid literal for int()" in done.last_line


def test_without_cloudpickle_it_says_so(payloads: Dict[str, str], tmp_path: Path) -> None:
    command = [interpreter("slim"), "-m", "venv", "--without-pip", str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    done = start_in_vain(payloads["Threaded"], python=str(tmp_path / "bin" / "python"))
    assert done.code == Exit.UNAVAILABLE
    assert "cloudpickle is not installed" in done.last_line
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


HONOURED = {  # what a class may override, since its framework then serves it
    "FastAPIServer": ["_setup_app", "startup_event", "shutdown_event", "_handle_request"],
    "FlaskServer": ["_register_routes", "_health", "_handle_request"],
}


@pytest.mark.parametrize("base", ["HTTPMultiThreadedServer", "FastAPIServer", "FlaskServer"])
def test_every_internal_of_the_sdks_servers_that_a_class_overrides_is_told(payloads: Dict[str, str], base: str) -> None:
    done = start_in_vain(payloads["overrides of " + base])
    assert done.code == Exit.SOFTWARE
    told = re.search(r"Overrides overrides ([\w, ]+), which", done.last_line)
    known = [*told[1].split(", "), *HONOURED.get(base, [])] if told else []
    assert sorted(known) == payloads["names of " + base].split(" ")
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


def end_with_termination_log(file: Path, env: Environ) -> Finished:
    """Run the runtime with another path for the termination log."""
    python = interpreter("slim")
    variables: Environ = {"NUM_WORKERS": "1", "AIS_TARGET_URL": SECRET_TARGET, "AIS_AUTHN_TOKEN": TOKEN, **env}
    done = subprocess.run(
        [python, "-c", WITH_TERMINATION_LOG, str(ROOT), str(file)],
        env=exact_environment(python, variables), timeout=30,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    lines = done.stdout.splitlines()
    return Finished(done.returncode, lines, lines[-1])


def test_the_reason_goes_to_the_termination_log_too_in_short_and_without_secrets(
    payloads: Dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "termination-log"
    file.touch()
    long, secret = payloads["RaisesAtLength"], payloads["RaisesSecrets"]
    for payload, workers, code, reason in [
        (None, "1", Exit.CONFIG, "ETL_CLASS_PAYLOAD is not set"),
        (long, "x" * 5000, Exit.CONFIG, "NUM_WORKERS='xxx"),
        (long, "1", Exit.SOFTWARE, "RaisesAtLength() failed: ValueError: long long"),
        (secret, "1", Exit.SOFTWARE, "RaisesSecrets() failed: ValueError: cannot read"),
    ]:
        env = {"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": workers}
        done = end_with_termination_log(file, env)
        text = file.read_text()
        assert done.code == code and done.last_line.startswith("ais_runtime_min: " + reason)
        assert text.startswith(reason) and file.stat().st_size <= 2048
        assert "T0pS3cr3t" not in text and TOKEN not in text


def test_no_termination_log_is_made_where_there_is_none(tmp_path: Path) -> None:
    assert end_with_termination_log(tmp_path / "termination-log", {}).code == Exit.CONFIG
    assert not (tmp_path / "termination-log").exists()


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
    assert re.fullmatch(r"Point\(x: ('typing.Any'|Any)\)", do(runtime, "copy"))
    assert do(runtime, "list").split() == ["inspect", "shutil"]


# == Signals ==


def test_sigterm_while_the_class_is_unpickled_ends_it_at_once(payloads: Dict[str, str]) -> None:
    env = {"ETL_CLASS_PAYLOAD": payloads["SlowToLoad"]}
    with Server(*started(interpreter("slim"), [], env, None)) as pod:
        pod.wait_for_line("unpickling")
        began = time.monotonic()
        assert pod.terminate() == Exit.OK
        assert time.monotonic() - began < QUICK_SECONDS
        assert "ais_runtime_min: " not in pod.log()
