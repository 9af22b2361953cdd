"""Payloads of the real SDK are served; a mistake at the start has its exit code and one clear line."""
import base64
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest

from ais_runtime_min import Exit
from harness import (QUICK_NUMBERS, ROOT, RUNTIME, Environ, Finished, Runtime, Server, interpreter,
                     make_payload, run_to_end, started)

StartRuntime = Callable[..., Runtime]
SECRET_TARGET = "http://127.0.0.1:9/v1/etl/_object/startup-test/T0pS3cr3t"
TOKEN = "t0ken-of-the-cluster"
FAILED = "Failed to deserialize ETL class"

# Every class of these tests, as a user's script has them; one run of the SDK pickles all.
SCRIPT = '''
import base64, json, os, cloudpickle
import httpx, msgspec, yaml
import PIL.Image
import users_helper
from users_module import ByReference
from aistore.sdk.etl.webserver import serialize_class
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
    transform = Threaded.transform

class Flask(FlaskServer):
    transform = Threaded.transform

class NotAnETL:
    transform = Threaded.transform

class WithoutTransform(HTTPMultiThreadedServer):
    pass

class WithoutStart(ETLServer):
    transform = Threaded.transform

def needing(use):
    return type("Needing", (HTTPMultiThreadedServer,), {"transform": use})

NeedsYaml = needing(lambda self, data, path, etl_args: yaml.safe_load(data))
NeedsHttpx = needing(lambda self, data, path, etl_args: httpx.get(data).content)
NeedsMsgspec = needing(lambda self, data, path, etl_args: msgspec.json.encode(data))
NeedsPillow = needing(lambda self, data, path, etl_args: PIL.Image.open(data))
NeedsHelper = needing(lambda self, data, path, etl_args: users_helper.help(data))

class Model(Threaded):
    def __init__(self):
        super().__init__()
        self.load_model()
    def load_model(self):
        exec(os.environ["MODEL"])

class NoSuper(Threaded):
    def __init__(self):
        self.model = 1

class WantsArguments(Threaded):
    def __init__(self, model):
        super().__init__()

class Executes:
    def __reduce__(self):
        return exec, ("import os; exec(os.environ['UNPICKLING'])",)

class Unpickles(Threaded):
    MODEL = Executes()

class UnpicklesModel(Model):
    MODEL = Executes()

def own_names(base):
    public = {"start", "transform", "transform_stream", "get_mime_type"}
    return sorted(name for name in set(vars(base)) - public if not name.startswith(("__", "_abc_")))

def encoded(value):
    return base64.b64encode(cloudpickle.dumps(value)).decode()

payloads = {name: encoded(value) for name, value in list(globals().items()) if isinstance(value, type)}
payloads.update({cls.__name__: serialize_class(cls) for cls in (Threaded, FastAPI, Flask)})
payloads["an instance"] = encoded({"not": "a class"})
payloads["a function"] = encoded(shout)
for base in (HTTPMultiThreadedServer, FastAPIServer, FlaskServer):
    names = own_names(base)
    overridden = {"transform": Threaded.transform, **{name: lambda self: None for name in names}}
    payloads["overrides of " + base.__name__] = serialize_class(type("Overrides", (base,), overridden))
    payloads["names of " + base.__name__] = " ".join(names)
print(json.dumps(payloads))
'''


@pytest.fixture(scope="session")
def payloads(sdk_python: str) -> Dict[str, str]:
    """The payload of each class of the script, by its name; two modules lie beside the script."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "users_helper.py").write_text("def help(data):\n    return data\n")
        Path(folder, "users_module.py").write_text(
            "from aistore.sdk.etl.webserver.flask_server import FlaskServer\n"
            "class ByReference(FlaskServer):\n    pass\n")
        script = Path(folder, "users_script.py")
        script.write_text(SCRIPT)
        output = subprocess.check_output([sdk_python, str(script)], encoding="utf-8", timeout=120)
    made: Dict[str, str] = json.loads(output.splitlines()[-1])
    return made


def start_in_vain(payload: Optional[str], env: Optional[Environ] = None, **options: Any) -> Finished:
    """Start a pod of one worker that is to give up, for one reason and without telling a secret."""
    done = run_to_end(env={
        "ETL_CLASS_PAYLOAD": payload, "AIS_TARGET_URL": SECRET_TARGET, "AIS_AUTHN_TOKEN": TOKEN,
        "NUM_WORKERS": "1", **(env or {})}, **options)
    log = "\n".join(done.lines)
    assert [line for line in done.lines if line.startswith("ais_runtime_min: ")] == [done.last_line], log
    assert [secret for secret in ("T0pS3cr3t", TOKEN) if secret in log] == []
    return done


def assert_told(done: Finished, code: int, *words: str) -> None:
    """Check the exit code, the words of the last line, and that the log has no traceback."""
    log = "\n".join(done.lines)
    assert done.code == code and not [word for word in words if word not in done.last_line], log
    assert "Traceback" not in log and '  File "' not in log, log


# == What is served ==


@pytest.mark.parametrize("name", ["Threaded", "FastAPI", "Flask"])
def test_a_payload_of_the_real_sdk_is_served(
    start_runtime: StartRuntime, payloads: Dict[str, str], name: str
) -> None:
    runtime = start_runtime(payloads[name], {"NUM_WORKERS": "2"})
    response = runtime.request("PUT", "/bucket/object", b"hello")
    assert (response.status, response.body) == (200, b"HELLO!")
    runtime.wait_for_line(r"serving %s on http://\S+:\d+$" % name, timeout=5)
    assert runtime.terminate() == Exit.OK


# == Variables ==

def test_bad_variables_are_told_all_in_the_last_line(payloads: Dict[str, str], tmp_path: Path) -> None:
    empty, no_text = tmp_path / "empty", tmp_path / "no text"
    empty.touch()
    no_text.write_bytes(bytes(range(256)))
    bad = {"NUM_WORKERS": "many", "PORT": "70000", "AIS_TARGET_URL": "tcp://T0pS3cr3t", "AIS_CRT": "/no"}
    for payload, env, code, words in (
        (None, {}, os.EX_CONFIG, ["ais_runtime_min: ETL_CLASS_PAYLOAD is not set"]),
        (payloads["Threaded"], bad, os.EX_CONFIG, ["='many'", "PORT='70000'", "TARGET_URL", "CRT='/no'"]),
        (payloads["Threaded"], {"AIS_CLIENT_CA": str(no_text)}, os.EX_CONFIG, ["AIS_CLIENT_CA"]),
        (payloads["Threaded"], {"AIS_CRT": str(no_text)}, os.EX_CONFIG, ["AIS_CRT"]),
        (None, {"ETL_CLASS_PAYLOAD_FILE": str(empty)}, os.EX_DATAERR, [FAILED]),
        (None, {"ETL_CLASS_PAYLOAD_FILE": str(no_text)}, os.EX_DATAERR, [FAILED, "base64"]),
    ):
        assert_told(start_in_vain(payload, env), code, *words)


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
    output = subprocess.check_output(
        [interpreter("slim"), "-c", LOAD], env={"PYTHONPATH": str(ROOT)}, timeout=60,
        input=json.dumps(payloads), stderr=subprocess.STDOUT, universal_newlines=True)
    assert "Traceback" not in output
    outcomes = json.loads(output.splitlines()[-1])
    return [(payload, *outcome) for payload, outcome in zip(payloads, outcomes)]


NO_PAYLOADS = [
    "not base64 at all!", "{{ payload }}", "$PAYLOAD", "gAWV\u00e9", "====", "gAWV=gAWV", "gA", "AAAA",
    *(base64.b64encode(data).decode() for data in (
        b"this is no pickle", bytes(range(256)), b"\x80\x05.", b"\x80\xff",
        *map(pickle.dumps, (42, None, "text", int, len)))),
]


def test_what_is_no_pickled_class_or_was_cut_is_told_and_not_quoted(payloads: Dict[str, str]) -> None:
    text = payloads["Threaded"]
    cut = [text[:len(text) * left // 40 * 4 + odd] for left in (1, 5, 9) for odd in range(4)]
    for payload, code, reason in load(NO_PAYLOADS + cut):
        assert code == Exit.DATA and reason.startswith(FAILED), (payload, reason)
        assert payload not in reason
        assert payload not in cut or re.search("cut|truncated|base64|ran out|end", reason.lower()), reason


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


def test_a_pod_whose_class_cannot_be_loaded_ends_with_the_reason(
    payloads: Dict[str, str], tmp_path: Path
) -> None:
    assert_told(start_in_vain(payloads["a function"]), Exit.DATA, FAILED)
    assert_told(start_in_vain(payloads["NeedsYaml"]), Exit.UNAVAILABLE, FAILED)
    done = start_in_vain("{{ payload }}")
    assert_told(done, Exit.DATA, FAILED)
    assert "{{ payload }}" not in "\n".join(done.lines)
    done = start_in_vain(payloads["Unpickles"], {"UNPICKLING": "int('no number')"})
    assert done.code == Exit.DATA
    assert FAILED in done.last_line and "ValueError: invalid literal for int()" in done.last_line
    subprocess.run([interpreter("slim"), "-m", "venv", "--without-pip", str(tmp_path)], check=True, timeout=60)
    done = start_in_vain(payloads["Threaded"], python=str(tmp_path / "bin" / "python"))
    assert_told(done, Exit.UNAVAILABLE, "add cloudpickle to PACKAGES")


# == The constructor ==

RAISES = 'raise ValueError("%s")'


@pytest.mark.parametrize("model, reason, env", [
    (RAISES % "no model here", "ValueError: no model here$", {}),
    (RAISES % "no model here", "ValueError: no model here$", {"NUM_WORKERS": "8"}),
    (RAISES % r"first\n\n  second\nthird", "ValueError: first second third$", {}),
    (RAISES % r"no mod\u00e8le \U0001f600 \udcff", "ValueError: no mod", {"LC_ALL": "C"}),
    (RAISES % r"no mod\u00e8le \udcff", "ValueError: no mod", {"PYTHONIOENCODING": "utf-8:strict"}),
    ("raise SystemExit(0)", "SystemExit: 0$", {}),
    ("raise ValueError('cannot read %s with %s' % (self.host_target, self.token))",
     r"ValueError: cannot read http://127\.0\.0\.1:9\*\*\* with \*\*\*", {}),
    ("import yaml", "ModuleNotFoundError: No module named 'yaml'.*PyYAML", {}),
])
def test_a_constructor_that_raises_is_told_with_the_users_traceback(
    payloads: Dict[str, str], model: str, reason: str, env: Environ
) -> None:
    done = start_in_vain(payloads["Model"], {"MODEL": model, **env})
    log = "\n".join(done.lines)
    assert done.code == (Exit.UNAVAILABLE if model == "import yaml" else Exit.SOFTWARE), log
    assert re.match(r"ais_runtime_min: Model\(\) failed: " + reason, done.last_line), log
    assert log.count("Traceback (most recent call last)") == 1, log
    assert re.search(r'File ".*users_script\.py", line \d+, in __init__', log)
    assert re.search(r'File ".*users_script\.py", line \d+, in load_model', log)
    assert RUNTIME.name not in re.sub(r"(?m)^ais_runtime_min: .*|- ais_runtime_min -", "", log), log


def test_a_long_reason_is_told_whatever_time_out_the_class_gives_to_sockets(
    payloads: Dict[str, str]
) -> None:
    done = start_in_vain(payloads["UnpicklesModel"], {
        "UNPICKLING": "import socket; socket.setdefaulttimeout(5)",
        "MODEL": RAISES % (r"\u00e9" * 9000)})
    assert done.code == Exit.SOFTWARE
    assert re.match("ais_runtime_min: UnpicklesModel\\(\\) failed: ValueError: \u00e9{1000,2000}$", done.last_line)


@pytest.mark.parametrize("name, words", [
    ("NoSuper", ["NoSuper.__init__() does not call super().__init__()"]),
    ("WantsArguments", ["WantsArguments", "missing 1 required positional argument: 'model'"]),
    ("WithoutStart", ["WithoutStart", "abstract", "start"]),
])
def test_a_class_that_asks_for_what_is_not_there_is_told_without_a_traceback(
    payloads: Dict[str, str], name: str, words: Sequence[str]
) -> None:
    assert_told(start_in_vain(payloads[name]), Exit.SOFTWARE, *words)


HONOURED = {  # what a class may override, since its framework then serves it
    "FastAPIServer": ["_setup_app", "startup_event", "shutdown_event", "_handle_request"],
    "FlaskServer": ["_register_routes", "_health", "_handle_request"],
}


@pytest.mark.parametrize("base", ["HTTPMultiThreadedServer", "FastAPIServer", "FlaskServer"])
def test_every_internal_of_the_sdks_servers_that_a_class_overrides_is_told(
    payloads: Dict[str, str], base: str
) -> None:
    done = start_in_vain(payloads["overrides of " + base])
    assert_told(done, Exit.SOFTWARE)
    told = re.search(r"Overrides overrides ([\w, ]+), which", done.last_line)
    known = [*told[1].split(", "), *HONOURED.get(base, [])] if told else []
    assert sorted(known) == payloads["names of " + base].split(" ")


# == The port ==


@pytest.mark.parametrize("family, address", [
    (socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::"),
])
def test_a_port_that_is_taken_is_told(
    payloads: Dict[str, str], family: socket.AddressFamily, address: str
) -> None:
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.create_server((address, 0), family=family) as listener:
        port = listener.getsockname()[1]
        done = start_in_vain(payloads["Threaded"], {"PORT": str(port)})
    assert_told(done, Exit.SYSTEM, "port %d" % port, "in use")


def test_a_port_that_is_taken_while_the_class_is_constructed_is_told(
    payloads: Dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    takes = "import socket; self.taken = socket.create_server(('', %d), family=%s, dualstack_ipv6=%s)"
    both = socket.has_dualstack_ipv6()
    model = takes % (port, "socket.AF_INET6" if both else "socket.AF_INET", both)
    done = start_in_vain(payloads["Model"], {"MODEL": model, "PORT": str(port)})
    assert_told(done, Exit.SYSTEM, "port %d cannot be listened on: " % port, "in use")


# == /dev/termination-log ==


def test_the_reason_goes_to_the_termination_log_too_in_short_and_without_secrets(
    payloads: Dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "termination-log"
    numbers: Dict[str, Any] = {**QUICK_NUMBERS, "TERMINATION_LOG": str(file)}
    assert start_in_vain(None, numbers=numbers).code == Exit.CONFIG
    assert not file.exists(), "it is made where there is none"
    file.touch()
    secrets = "raise ValueError('long ' * 5000 if os.environ['LONG'] else self.host_target + self.token)"
    unpickling = "raise ValueError(os.environ['AIS_TARGET_URL'])"
    for name, env, code, reason in [
        ("Model", {"NUM_WORKERS": "x" * 5000}, Exit.CONFIG, "NUM_WORKERS='xxx"),
        ("Model", {"LONG": "yes"}, Exit.SOFTWARE, "Model() failed: ValueError: long long"),
        ("Model", {"LONG": ""}, Exit.SOFTWARE,
         "Model() failed: ValueError: http://127.0.0.1:9***"),
        ("Unpickles", {"UNPICKLING": unpickling}, Exit.DATA,
         "Failed to deserialize ETL class: ETL_CLASS_PAYLOAD cannot be loaded: ValueError: http://"),
    ]:
        done = start_in_vain(payloads[name], {"MODEL": secrets, **env}, numbers=numbers)
        text = file.read_text()
        assert done.code == code and done.last_line.startswith("ais_runtime_min: " + reason)
        assert text.startswith(reason) and file.stat().st_size <= 2048
        assert "T0pS3cr3t" not in text and TOKEN not in text


# == Modules that are loaded when they are needed, TLS first of all ==

CURIOUS = '''
import threading
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Curious(HTTPMultiThreadedServer):
    """Runs the code that comes, and returns what it leaves as `result`."""

    def __init__(self):
        super().__init__()
        self.barrier = threading.Barrier(8)

    def transform(self, data, path, etl_args):
        names = {"barrier": self.barrier}
        exec(data, names)
        return str(names["result"])
'''
IS_LOADED = "import sys; result = '_ssl' in sys.modules"
USE = """
import http.client, sys
barrier.wait(30)
context = http.client.ssl.create_default_context()
import ssl as now
http.client.HTTPSConnection("127.0.0.1", 9, context=context)
assert type(context) is now.SSLContext is http.client.ssl.SSLContext is sys.modules["ssl"].SSLContext
result = context.verify_mode == now.CERT_REQUIRED and now.__name__
"""
TURN_OFF = """
import http.client
ssl = http.client.ssl
ssl._create_default_https_context = ssl._create_unverified_context
import ssl as now
result = (now._create_default_https_context is now._create_unverified_context
          is http.client.ssl._create_default_https_context)
"""
ASK_FOR_NOTHING = """
import http.client
try:
    http.client.ssl.nothing_of_that_name
except AttributeError as error:
    result = error
"""
LIST = """
import sys
late = ("html", "inspect", "ipaddress", "mimetypes", "shutil", "ssl", "uuid")
result = [name for name in late if name in sys.modules]
"""
COPY = """
import dataclasses, http.server, shutil, cloudpickle, pickle, importlib
kept = http.server.shutil  # by the library, from before this class was loaded
assert kept.copyfileobj is shutil.copyfileobj and kept is not shutil
assert pickle.loads(cloudpickle.dumps(shutil)) is importlib.reload(shutil) is shutil
result = dataclasses.make_dataclass("Point", ["x"]).__doc__
"""


def do(runtime: Runtime, code: str) -> str:
    """Have the class run some code."""
    return runtime.request("PUT", "/bucket/object", code.encode()).body.decode()


@pytest.fixture
def start_curious(start_runtime: StartRuntime) -> StartRuntime:
    """A function that starts one worker of the class."""
    return lambda **env: start_runtime(make_payload(CURIOUS, "Curious"), {"NUM_WORKERS": "1", **env})


def test_tls_is_loaded_by_threads_or_first_where_the_target_speaks_it(start_curious: StartRuntime) -> None:
    runtime = start_curious()
    assert do(runtime, IS_LOADED) == "False"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: do(runtime, USE), range(8))) == {"ssl"}
    assert do(runtime, IS_LOADED) == "True"
    shared = start_curious(AIS_TARGET_URL="https" + SECRET_TARGET[4:])
    assert do(shared, IS_LOADED) == "True"


def test_what_a_class_sets_or_asks_of_tls_is_that_of_the_module(start_curious: StartRuntime) -> None:
    assert do(start_curious(), TURN_OFF) == "True"
    assert do(start_curious(), ASK_FOR_NOTHING) == "module 'ssl' has no attribute 'nothing_of_that_name'"


def test_what_few_classes_need_is_loaded_by_none_that_do_not(start_curious: StartRuntime) -> None:
    always = ["inspect"] if sys.version_info[:2] == (3, 14) else []  # its dataclasses load it at once
    runtime = start_curious()
    assert do(runtime, LIST) == str(always)
    assert re.fullmatch(r"Point\(x: ('typing.Any'|Any)\)", do(runtime, COPY))
    assert do(runtime, LIST) == "['inspect', 'shutil']"


# == Signals ==


def test_sigterm_while_the_class_is_unpickled_ends_it_at_once(payloads: Dict[str, str]) -> None:
    slowly = "import time; print('unpickling', flush=True)\nfor _ in range(600): time.sleep(0.1)"
    env = {"ETL_CLASS_PAYLOAD": payloads["Unpickles"], "UNPICKLING": slowly}
    with Server(*started(interpreter("slim"), [], env, None)) as pod:
        pod.wait_for_line("unpickling")
        began = time.monotonic()
        assert pod.terminate() == Exit.OK
        assert time.monotonic() - began < 5.0
        assert "ais_runtime_min: " not in pod.log()
