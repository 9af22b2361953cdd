"""What users trip over: names, logs, packages and mistakes, and what the runtime says to them."""
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Callable, List

import cloudpickle
import pytest

import ais_runtime_min
from ais_runtime_min import Exit
from harness import (RUNTIME, Runtime, Server, exact_environment, interpreter,
                     make_payload, run_to_end)
from peer import Peer, object_frames
from standin import Behaviour, StandInTarget
from test_cli import ALONE, IMPORT, UPPER, assert_told, bare_python, end  # noqa: F401
from test_packages import SECRET

StartRuntime = Callable[..., Runtime]
BASES = ("HTTPMultiThreadedServer", "FastAPIServer", "FlaskServer")
BASE = '''
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer

class Simple(%s):
'''
TRANSFORM = '''
    def transform(self, data, path, etl_args):
        %s
        return data.upper()
'''


def simple(code: str = "", more: str = "", base: str = BASES[0], before: str = "") -> str:
    """Make the payload of a class: code of its transform, and what else its body has."""
    return make_payload(before + BASE % base + more + TRANSFORM % code, "Simple")


def told(runtime: Server, etl_args: str = "") -> str:
    """Return the failure of an object."""
    answer = runtime.request("PUT", "/b/o?etl_args=" + etl_args, b"hello")
    assert answer.status >= 400
    return str(json.loads(answer.body)["detail"])


# == Payloads ==


@pytest.fixture(scope="module")
def old_cloudpickle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cloudpickle that has not what came with version 3."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(Path(cloudpickle.__file__).parent, folder / "cloudpickle")
    file = folder / "cloudpickle" / "cloudpickle.py"
    file.write_text(file.read_text().replace("_class_setstate", "_set_state_of_class"))
    return folder


def test_a_payload_of_a_newer_cloudpickle_is_told_with_the_remedy(old_cloudpickle: Path) -> None:
    env = {"ETL_CLASS_PAYLOAD": simple(), "PYTHONPATH": str(old_cloudpickle)}
    assert_told(run_to_end(env=env), Exit.UNAVAILABLE, "ETL_CLASS_PAYLOAD", "_class_setstate",
                "add cloudpickle to PACKAGES, in the version that")


def test_the_least_cloudpickle_that_is_asked_for_is_one_that_works() -> None:
    assert "    cloudpickle>=3,<4\n" in (RUNTIME.parent / "setup.cfg").read_text()
    assert '"cloudpickle>=3,<4"' in (RUNTIME.parent / "README.md").read_text()


@pytest.mark.parametrize("payload, words", [
    ("not base64!", ["is not base64", "make it anew"]), ("gAWV", ["is no whole pickle"]),
    ("gASVEAAAAAAAAABoZS4=", ["is no whole pickle", "make it anew"]),  # a memo that is not there
    ("gASMA2ludJQu", ["is no class but 'str'", "derive it from HTTPMultiThreadedServer"]),
])
def test_a_payload_that_is_none_is_told_with_its_variable_and_what_to_do(
    payload: str, words: List[str]
) -> None:
    assert_told(run_to_end(env={"ETL_CLASS_PAYLOAD": payload}), Exit.DATA, "ETL_CLASS_PAYLOAD", *words)


# == Names ==


def names_of_ours() -> List[str]:
    """List the attributes of this runtime's bases."""
    bases = [getattr(ais_runtime_min, name) for name in BASES]
    return sorted({name for base in bases for name in dir(base) if not name.startswith("__")})


NAMES_OF_SDK = """
import json
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
print(json.dumps(sorted({
    name for base in (HTTPMultiThreadedServer, FastAPIServer, FlaskServer) for name in dir(base)})))
"""


def test_a_class_may_use_all_names_that_the_sdk_does_not() -> None:
    python = interpreter("sdk")
    output = subprocess.check_output(
        [python, "-c", NAMES_OF_SDK], env=exact_environment(python, {}), timeout=60)
    # the SDK makes these two in its constructors
    assert set(names_of_ours()) - set(json.loads(output)) == {"app", "session"}


def test_a_class_may_be_called_as_the_base_of_another_framework(start_runtime: StartRuntime) -> None:
    source = """
from aistore.sdk.etl.webserver.flask_server import FlaskServer as Base

class FastAPIServer(Base):
    def _register_routes(self):
        self.app.add_url_rule("/own", view_func=lambda: "own")
""" + TRANSFORM % ""
    runtime = start_runtime(make_payload(source, "FastAPIServer"), python=interpreter("sdk"))
    assert runtime.request("GET", "/own").body == b"own"
    assert runtime.request("PUT", "/b/o", b"hello").body == b"HELLO"


def test_a_copy_of_an_instance_has_a_session_of_its_own(start_runtime: StartRuntime) -> None:
    code = ("self.session = 'one'; other = copy.copy(self); other.session = 'two'; "
            "return self.session + other.session")
    runtime = start_runtime(simple(code, before="import copy\n"))
    assert runtime.request("PUT", "/b/o", b"").body == b"onetwo"


@pytest.mark.parametrize("base", BASES)
def test_attributes_of_a_class_do_not_meet_the_runtimes(
    start_runtime: StartRuntime, base: str
) -> None:
    names = ("_streams", "etl_app", "etl_answer", "etl_framework", "made_app", "one_at_a_time",
             "_session", "_make_app", "_require_framework", "state", "_state")
    attributes = "".join("    %s = property(lambda self: 1 / 0)\n" % name for name in names)
    runtime = start_runtime(simple(more=attributes, base=base))
    assert runtime.request("PUT", "/b/o", b"hello").body == b"HELLO"


@pytest.mark.parametrize("code, base, words", [
    ("    async def transform(self, data, path, etl_args):\n        return data\n", BASES[0],
     "has a transform() that is async"),
    ("    async def transform_stream(self, reader, path, etl_args):\n        yield b'x'\n", BASES[1],
     "has a transform_stream() that is async"),
    ("    def transform(self, data, path, etl_args):\n        yield data\n", BASES[2],
     "has a transform() that is async, or yields"),
    ("    async def client_put(self, url, data, headers, timeout=None):\n        pass\n"
     "    def transform(self, data, path, etl_args):\n        return data\n", BASES[0],
     "has a client_put() that is async"),
])
def test_a_class_with_methods_that_nobody_awaits_is_refused(code: str, base: str, words: str) -> None:
    payload = make_payload(BASE % base + code, "Simple")
    assert_told(run_to_end(env={"ETL_CLASS_PAYLOAD": payload}), Exit.SOFTWARE, words)


def test_a_method_that_is_wrapped_into_a_plain_one_is_served(start_runtime: StartRuntime) -> None:
    source = """
import asyncio, functools

def plain(method):
    @functools.wraps(method)
    def wrapper(*args):
        return asyncio.run(method(*args))
    return wrapper
""" + BASE % BASES[0] + """
    @plain
    async def transform(self, data, path, etl_args):
        return data.upper()
"""
    runtime = start_runtime(make_payload(source, "Simple"))
    assert runtime.request("PUT", "/b/o", b"hello").body == b"HELLO"


def test_a_coroutine_that_only_a_call_shows_is_told(start_runtime: StartRuntime) -> None:
    more = "    async def later(self):\n        pass\n"
    runtime = start_runtime(simple("return self.later()", more), expect_traceback=True)
    assert told(runtime) == "Processing error: transform() returned 'coroutine', not bytes"


# == The log ==


def test_lines_that_a_class_prints_come_at_once(start_runtime: StartRuntime) -> None:
    code = "print('printed'); os.kill(os.getpid(), 9)"
    runtime = start_runtime(simple(code, before="import os\n"), {"PYTHONUNBUFFERED": None})
    with pytest.raises(OSError):
        runtime.request("PUT", "/b/o", b"")
    runtime.wait_for_line("^printed$", 5)


@pytest.mark.parametrize("what", [
    "logging.config.dictConfig({'version': 1})", "logging.disable(logging.CRITICAL)",
    "logging.getLogger().handlers.clear()", "logging.getLogger().setLevel(60)",
    "logging.basicConfig(force=True, level=60, handlers=[logging.NullHandler()])",
    "[each.setLevel(60) for each in (*logging.root.manager.loggerDict.values(),)"
    " if isinstance(each, logging.Logger)]",
    "logging.shutdown()",
])
def test_failures_are_logged_whatever_a_class_does_to_logging(
    start_runtime: StartRuntime, what: str
) -> None:
    more = "    def __init__(self):\n        super().__init__()\n        %s\n" % what
    payload = simple("raise ValueError('no more of it')", more, before="import logging.config\n")
    runtime = start_runtime(payload, expect_traceback=True)
    told(runtime)
    runtime.wait_for_line("ais_runtime_min - ERROR - /b/o: no more of it", 5)


@pytest.mark.parametrize("what", ["logging.config.dictConfig({'version': 1})", "logging.disable(50)"])
@pytest.mark.parametrize("base", BASES[1:])
def test_failures_of_an_application_are_logged_whatever_a_class_does_to_logging(
    start_runtime: StartRuntime, base: str, what: str
) -> None:
    route = "add_api_route" if base == BASES[1] else "add_url_rule"
    more = ("    def __init__(self):\n        super().__init__()\n        def bad():\n"
            "            raise ValueError('no more of it')\n        self.app.%s('/bad', None or bad)\n"
            "        %s\n") % (route, what)
    if base == BASES[2]:
        more = more.replace("None or bad", "view_func=bad")
    payload = simple(more=more, base=base, before="import logging.config\n")
    runtime = start_runtime(payload, python=interpreter("sdk"), expect_traceback=True)
    assert runtime.request("GET", "/bad").status == 500
    runtime.wait_for_line("ERROR - /bad: no more of it", 5)
    runtime.wait_for_line("^ValueError: no more of it", 5)
    assert runtime.log().count("Traceback") == 1


@pytest.mark.parametrize("level, shown", [("DEBUG", "DIWE"), ("INFO", "IWE")])
def test_log_level_is_that_of_the_classs_own_logger(
    start_runtime: StartRuntime, level: str, shown: str
) -> None:
    code = "; ".join("self.logger.%s('told')" % name for name in ("debug", "info", "warning", "error"))
    runtime = start_runtime(simple(code), {"LOG_LEVEL": level, "NUM_WORKERS": "1", "PORT": "0"})
    assert runtime.request("PUT", "/b/o", b"").status == 200
    runtime.wait_for_line("Simple - ERROR - told", 5)
    found = [line.split(" - ")[2][0] for line in runtime.lines if line.endswith("Simple - told") or (
        " - Simple - " in line)]
    assert "".join(found) == shown


def test_a_text_of_several_lines_is_one_line_of_the_log(start_runtime: StartRuntime) -> None:
    code = r"raise ValueError('one\n2026-11-27 - forged - ERROR - two\r\n\u2028three')"
    runtime = start_runtime(simple(code), expect_traceback=True)
    told(runtime)
    runtime.wait_for_line("ERROR - /b/o: one 2026-11-27 - forged - ERROR - two three$", 5)


def test_at_debug_each_request_has_a_line(
    start_runtime: StartRuntime
) -> None:
    env = {"LOG_LEVEL": "DEBUG", "NUM_WORKERS": "1"}
    for base in BASES:
        app = "" if base == BASES[0] else "    def __init__(self):\n        super().__init__()\n        self.app\n"
        runtime = start_runtime(simple(more=app, base=base), env, python=interpreter("sdk"))
        runtime.request("PUT", "/b/o?etl_args=x", b"hello")
        runtime.request("GET", "/health")
        runtime.request("POST", "/nonsense")
        with Peer(runtime) as peer:
            peer.send(object_frames(b"hello", path="b/of websocket"))
            assert peer.result() == b"HELLO"
        for line in ("PUT /b/o: 200, 5 bytes", "GET /health: 200, 7 bytes", "POST /nonsense: 4",
                     "/ws b/of websocket: 200, 5 bytes"):
            runtime.wait_for_line(r" - DEBUG - %s.* in \d+\.\d ms$" % re.escape(line), 5)


@pytest.mark.parametrize("error, text", [
    ("KeyError('b')", "KeyError: 'b'"), ("ValueError(5)", "ValueError: 5"), ("ValueError()", "ValueError"),
    ("ValueError('no more of it')", "no more of it"), ("IndexError('?')", "IndexError: ?"),
])
def test_the_type_of_a_failure_is_told_where_its_text_alone_says_nothing(
    start_runtime: StartRuntime, error: str, text: str
) -> None:
    runtime = start_runtime(simple("raise " + error), expect_traceback=True)
    assert told(runtime) == "Processing error: " + text
    runtime.wait_for_line("ERROR - /b/o: %s$" % re.escape(text), 5)


def test_a_failed_next_stage_is_told_with_who_answered_what(
    start_runtime: StartRuntime, target: StandInTarget
) -> None:
    target.default = Behaviour(status=500, body=b"no")
    runtime, stage = start_runtime(simple()), target.root
    with Peer(runtime) as peer:
        peer.send(object_frames(b"hello", path="b/o", pipeline=stage))
        hop = re.sub("^http://", "", stage)
        assert peer.break_reason() == (1011, "the next hop, %s, answered 500: no" % hop)
    answer = runtime.request("PUT", "/b/o", b"hello", {"Ais-Node-Url": stage})
    assert (answer.status, answer.body) == (500, b"no")
    runtime.wait_for_line("ERROR - /b/o: the next hop, %s, answered 500: no$" % hop, 5)


def test_a_pod_that_is_stopped_as_its_last_worker_becomes_ready_ends_well() -> None:
    more = ("    def __init__(self):\n        super().__init__()\n"
            "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "        os.kill(os.getppid(), signal.SIGTERM)\n        time.sleep(0.3)\n")
    payload = simple(more=more, before="import os, signal, time\n")
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "1"})
    assert done.code == Exit.OK and "Traceback" not in "\n".join(done.lines)


def test_a_worker_that_cannot_come_up_keeps_no_other_from_serving(tmp_path: Path) -> None:
    more = ("    def __init__(self):\n        super().__init__()\n"
            "        try:\n            os.mkdir(%r)\n"
            "        except FileExistsError:\n            time.sleep(60)\n") % str(tmp_path / "first")
    env = {"ETL_CLASS_PAYLOAD": simple(more=more, before="import os, time\n"), "NUM_WORKERS": "2"}
    with Runtime(env=env) as runtime:
        assert runtime.request("PUT", "/b/o", b"hello", timeout=5).body == b"HELLO"


def test_a_pod_that_is_stopped_before_all_of_it_is_ready_ends_at_once(tmp_path: Path) -> None:
    more = ("    def __init__(self):\n        super().__init__()\n"
            "        try:\n            os.mkdir(%r)\n"
            "        except FileExistsError:\n            time.sleep(60)\n") % str(tmp_path / "first")
    env = {"ETL_CLASS_PAYLOAD": simple(more=more, before="import os, time\n"), "NUM_WORKERS": "2"}
    python = interpreter("slim")
    with Server([python, str(RUNTIME)], exact_environment(python, env)) as server:
        while not (tmp_path / "first").exists():
            time.sleep(0.01)
        time.sleep(0.5)
        began = time.monotonic()
        assert server.terminate() == Exit.OK
        assert time.monotonic() - began < 3 and "is killed" not in server.log()


# == Packages and frameworks ==


def test_a_package_that_is_missing_is_told_wherever_an_import_fails(
    start_runtime: StartRuntime
) -> None:
    construct = "    def __init__(self):\n        super().__init__()\n        import %s\n"
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": simple(more=construct % "yaml")})
    assert_told(done, Exit.UNAVAILABLE, "No module named 'yaml': add PyYAML to PACKAGES")
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": simple(more=construct % "msgspec")})
    assert_told(done, Exit.UNAVAILABLE, "No module named 'msgspec': add msgspec to PACKAGES")
    for of_python in ("json.nonesuch", "json as j; from itertools import izip"):
        done = run_to_end(env={"ETL_CLASS_PAYLOAD": simple(more=construct % of_python)})
        assert done.code == Exit.SOFTWARE and "Simple() failed" in done.last_line
        assert "PACKAGES" not in done.last_line
    runtime = start_runtime(simple("import msgspec"), expect_traceback=True)
    assert "No module named 'msgspec': add msgspec to PACKAGES, if it has that name" in told(runtime)


HTTP_EXCEPTION = {
    "module": ("from fastapi import HTTPException\n", "raise HTTPException(404, 'of no use')"),
    "starlette": ("from starlette.exceptions import HTTPException\n",
                  "raise HTTPException(404, 'of no use')"),
    "function": ("", "from fastapi import HTTPException; raise HTTPException(404, detail='of no use')"),
}


@pytest.mark.parametrize("how", HTTP_EXCEPTION)
@pytest.mark.parametrize("base", BASES)
def test_http_exceptions_are_one_line_of_the_log(
    start_runtime: StartRuntime, base: str, how: str
) -> None:
    before, code = HTTP_EXCEPTION[how]
    payload = simple(code, before=before, base=base)
    runtime = start_runtime(payload, python=interpreter("sdk"))  # expects no traceback
    answer = runtime.request("PUT", "/b/o", b"")
    assert (answer.status, json.loads(answer.body)) == (404, {"detail": "Processing error: of no use"})
    runtime.wait_for_line("WARNING - /b/o: 404: of no use$", 5)
    assert "installing" not in runtime.log()


@pytest.mark.parametrize("before, code", [
    HTTP_EXCEPTION["module"], HTTP_EXCEPTION["starlette"], HTTP_EXCEPTION["function"],
    ("import fastapi\n", "raise fastapi.HTTPException(404)"),
    ("", "import fastapi; raise fastapi.HTTPException(404)"),
    ("from fastapi.responses import Response\n", "Response()"),
])
def test_whatever_a_class_takes_of_fastapi_is_installed(before: str, code: str) -> None:
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": simple(code, before=before)})
    assert_told(done, Exit.UNAVAILABLE, "fastapi", "pip")  # there is no index


def test_an_attribute_that_is_called_as_a_framework_needs_none(start_runtime: StartRuntime) -> None:
    code = "import json; return json.dumps([self.flask.fastapi]).encode()"
    more = "\n    class flask:\n        fastapi = 1\n"
    runtime = start_runtime(simple(code, more=more))
    assert runtime.request("PUT", "/b/o", b"").body == b"[1]"
    assert "installing" not in runtime.log()


def test_exceptions_of_ones_own_that_are_called_as_the_sdks_are_no_others(
    start_runtime: StartRuntime
) -> None:
    before = ("class ETLDirectPutTransientError(Exception):\n    pass\n"
              "class InvalidPipelineError(Exception):\n    pass\n")
    for name in ("ETLDirectPutTransientError", "InvalidPipelineError"):
        payload = simple("raise %s('of my own')" % name, before=before)
        runtime = start_runtime(payload, expect_traceback=True)
        answer = runtime.request("PUT", "/b/o", b"")
        assert (answer.status, b"of my own" in answer.body) == (500, True), answer


def test_an_http_exception_of_500_has_its_traceback(start_runtime: StartRuntime) -> None:
    before, code = HTTP_EXCEPTION["module"]
    payload = simple(code.replace("404", "503"), before=before)
    runtime = start_runtime(payload, python=interpreter("sdk"), expect_traceback=True)
    assert runtime.request("PUT", "/b/o", b"").status == 503
    runtime.wait_for_line("^Traceback", 5)


# == Settings ==


def test_what_a_thread_of_the_class_raises_is_logged_without_secrets(
    start_runtime: StartRuntime, target: StandInTarget
) -> None:
    code = ("threading.Thread(target=sys.exit).start(); warnings.warn('see ' + self.host_target); "
            "threading.Thread(target=lambda: 1 / 0 if self.token else int(self.host_target)).start()")
    runtime = start_runtime(simple(code, before="import sys, threading, warnings\n"), expect_traceback=True)
    runtime.request("PUT", "/b/o", b"")
    runtime.wait_for_line(r"WARNING - .*UserWarning: see .*\*\*\*", 5)
    runtime.wait_for_line(r"ERROR - a thread: invalid literal .*\*\*\*", 5)
    assert target.url.rpartition("/")[2] not in runtime.log() and "SystemExit" not in runtime.log()


@pytest.mark.parametrize("url", ["http://user:%s@host:8000/x", "https://%s@host/", "http://user:%s@[::1]/"])
def test_a_target_with_a_password_is_refused_and_it_is_not_shown(url: str) -> None:
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": simple(), "AIS_TARGET_URL": url % SECRET})
    assert_told(done, Exit.CONFIG, "AIS_TARGET_URL", "without user and password")
    assert SECRET not in "\n".join(done.lines)


def test_a_key_in_the_place_of_its_file_is_not_shown() -> None:
    key = "-----BEGIN PRIVATE KEY-----\n%s\n-----END PRIVATE KEY-----\n" % SECRET
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": simple(), "AIS_CRT_KEY": key, "AIS_CRT": key})
    assert_told(done, Exit.CONFIG, "AIS_CRT_KEY must be a file")
    assert SECRET not in "\n".join(done.lines)


def test_what_came_encoded_is_not_given_to_the_class(
    start_runtime: StartRuntime, target: StandInTarget
) -> None:
    target.default = Behaviour(200, (("Content-Encoding", "gzip"),), b"hello")
    runtime = start_runtime(simple())
    answers = [runtime.request("GET", "/b/o", timeout=10), runtime.request(
        "POST", "/download?original_url=%s/x&object_to=b%%2Fo" % target.root, timeout=10)]
    for answer in answers:
        assert answer.status == 502 and "Content-Encoding 'gzip'" in json.loads(answer.body)["detail"]
    target.default = Behaviour(200, (("Content-Encoding", "Identity"),), b"hello")
    assert runtime.request("GET", "/b/o").body == b"HELLO"


# == A laptop ==


def serve_file(folder: Path, source: str, name: str = "mine.py") -> Path:
    """Write a class into a file."""
    folder.joinpath(name).write_text(source)
    return folder / name


@pytest.mark.parametrize("source, words, unwanted", [
    (IMPORT + "import msgspec\n" + UPPER, "No module named 'msgspec': pip install msgspec", "PACKAGES"),
    (IMPORT + "from aistore import Client\n" + UPPER, "'Client' from 'aistore'.*pip install aistore", "image"),
    (IMPORT + "from aistore.sdk import Client\n" + UPPER, "pip install aistore", "PACKAGES"),
    (IMPORT + "from fastapi import Request\n" + UPPER, "pip install .?fastapi", "docker"),
    (IMPORT + "from fastapi import HTTPException\n" + UPPER, "pip install .?fastapi", "docker"),
    (IMPORT + "class Upper(HTTPMultiThreadedServer):\n    pass\n", "mine.py: Upper cannot be served",
     "deserialize"),
    (IMPORT + UPPER + "    def __init__(self):\n        super().__init__()\n        import msgspec\n",
     "pip install msgspec", "PACKAGES"),
    (IMPORT + UPPER + "    def __init__(self):\n        super().__init__()\n        self.session\n",
     "pip install requests", "PACKAGES"),
])
def test_serve_speaks_of_pip_and_not_of_images(
    bare_python: str, tmp_path: Path, source: str, words: str, unwanted: str  # noqa: F811
) -> None:
    done = run_to_end(["serve", str(serve_file(tmp_path, source)), "--port", "0"], ALONE, python=bare_python)
    assert done.code != 0 and re.search(words, done.last_line), done
    assert unwanted not in done.last_line


def test_the_target_of_serve_is_there_for_the_class(
    start_runtime: StartRuntime, bare_python: str, tmp_path: Path  # noqa: F811
) -> None:
    source = "import os\n" + IMPORT + UPPER.replace("data.upper()", "os.environ['AIS_TARGET_URL'].encode()")
    words = ["serve", str(serve_file(tmp_path, source)), "--port", "0", "--target", str(tmp_path)]
    runtime = start_runtime(None, ALONE, words, bare_python)
    assert runtime.request("PUT", "/b/o", b"").body == b"file://%s" % str(tmp_path).encode()


OWN_PROCESS = IMPORT.replace("\n", " as Base\n") + '''
class Mine(Base):
    def transform(self, data, path, etl_args):
        return data.upper()
'''


def test_a_class_that_starts_itself_reads_port_and_says_where_it_serves(tmp_path: Path) -> None:
    file = serve_file(tmp_path, "import ais_runtime_min\nais_runtime_min.install_sdk_names()\n"
                      + OWN_PROCESS + "Mine().start()\n")
    python = interpreter("slim")
    env = exact_environment(python, {"PORT": "0", "PYTHONPATH": str(RUNTIME.parent)})
    with Server([python, str(file)], env) as server:
        server.port = int(server.wait_for_line(r"INFO - serving on http://\S+:(\d+)$")[1])
        assert server.port != 8000
        assert server.request("PUT", "/b/o", b"hello").body == b"HELLO"
