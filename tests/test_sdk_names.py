"""The names of the SDK as user code meets them in an interpreter that does not have it, compared with the real ones.

A table is run as a whole in one child process per interpreter; the tests look at its outcomes.
"""
import functools
import json
import subprocess
import sys
from typing import Any, Dict, List, Sequence, Tuple
from urllib.parse import quote

import pytest

from harness import RUNTIME, interpreter

WEBSERVER = "aistore.sdk.etl.webserver"
OLD_SDK = sys.version_info < (3, 10)  # the last SDK for Python 3.9 is 1.24
ADDED_AFTER_OLD_SDK = {"HEADER_TRANSFER_ENCODING", "STATUS_LOCKED", "AIS_SKIP_VERIFY_CRT"}

# Runs each snippet in a namespace of its own, and prints what it bound to `result`, or how it failed.
EVALUATE = '''
import json
import sys

outcomes = []
for snippet in json.load(sys.stdin):
    names = {"__name__": "user_code"}
    try:
        exec(snippet, names)
        outcomes.append(["", names.get("result")])
    except BaseException as error:
        outcomes.append([type(error).__name__, str(error)])
json.dump(outcomes, sys.stdout, default=repr)
'''
RUNTIME_NAMES = "import ais_runtime_min\nais_runtime_min.install_sdk_names()\n"

Outcome = Tuple[str, Any]  # the name of an exception and its text, or "" and the result


@functools.lru_cache(maxsize=None)
def run_snippets(group: str, snippets: Tuple[str, ...]) -> Dict[str, Outcome]:
    """Run snippets in a child with the interpreter of a group; all but "sdk" have the runtime's names."""
    code = EVALUATE if group == "sdk" else RUNTIME_NAMES + EVALUATE
    done = subprocess.run(
        [interpreter(group), "-c", code], input=json.dumps(snippets), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=120, cwd=str(RUNTIME.parent), env={"AIS_TARGET_URL": "http://127.0.0.1:9/v1/x"},
    )
    assert done.returncode == 0, done.stderr
    return {snippet: (kind, result) for snippet, (kind, result) in zip(snippets, json.loads(done.stdout))}


def of_sdk(snippet: str) -> Outcome:
    """Return what the real SDK makes of a snippet of ALL_OF_SDK, which all share a slow child."""
    return run_snippets("sdk", ALL_OF_SDK)[snippet]


def of_runtime(snippet: str) -> Outcome:
    """Return what the runtime makes of the same snippet."""
    return run_snippets("slim", ALL_OF_SDK)[snippet]


def results_of(snippet: str) -> Tuple[Any, Any]:
    """Return what a snippet bound to `result`, by the runtime and by the SDK."""
    (our_kind, ours), (their_kind, theirs) = of_runtime(snippet), of_sdk(snippet)
    assert (our_kind, their_kind) == ("", ""), (ours, theirs)
    return ours, theirs


# == What is there ==

NAMES = [
    ("aistore.sdk.etl", "serialize_class"), (WEBSERVER, "serialize_class"), (WEBSERVER + ".utils", "serialize_class"),
    (WEBSERVER + ".utils", "compose_etl_direct_put_url"), (WEBSERVER + ".utils", "parse_etl_pipeline"),
    (WEBSERVER + ".base_etl_server", "ETLServer"), (WEBSERVER + ".base_etl_server", "CountingIterator"),
    (WEBSERVER + ".base_etl_server", "RETRY_BACKOFF_BASE"), (WEBSERVER + ".base_etl_server", "RETRY_BACKOFF_MAX"),
    (WEBSERVER + ".base_etl_server", "SYNC_DIRECT_PUT_TRANSIENT_ERRORS"),
    (WEBSERVER + ".http_multi_threaded_server", "HTTPMultiThreadedServer"),
    (WEBSERVER + ".http_multi_threaded_server", "ThreadedHTTPServer"), (WEBSERVER + ".fastapi_server", "FastAPIServer"),
    (WEBSERVER + ".flask_server", "FlaskServer"), ("aistore.sdk.errors", "InvalidPipelineError"),
    ("aistore.sdk.errors", "ETLDirectPutTransientError"), ("aistore.sdk.utils", "parse_bool"),
    ("aistore.sdk.const", "HEADER_NODE_URL"),
]
FORMS = (
    "from {module} import {name} as found", "import {module}\nfound = {module}.{name}",
    "import importlib\nfound = getattr(importlib.import_module('{module}'), '{name}')",
    "from {parent} import {last} as module\nfound = module.{name}",
)
SAY_NAME = """
plain = isinstance(found, (int, float, str))
result = found if plain else getattr(found, "__name__", type(found).__name__)
"""


def import_snippet(form: str, module: str, name: str) -> str:
    """Write a snippet that gets a name in one of the ways there are."""
    parent, _, last = module.rpartition(".")
    return form.format(module=module, name=name, parent=parent, last=last) + SAY_NAME


IMPORTS = tuple(import_snippet(form, module, name) for form in FORMS for module, name in NAMES)


@pytest.mark.parametrize("module, name", NAMES, ids=[".".join(pair)[12:] for pair in NAMES])
def test_the_names_that_payloads_use_are_importable_in_all_ways(module: str, name: str) -> None:
    for snippet in (import_snippet(form, module, name) for form in FORMS):
        if OLD_SDK and name == "parse_bool":
            assert of_runtime(snippet) == ("", "parse_bool")
        else:
            assert of_runtime(snippet) == of_sdk(snippet), snippet
            assert of_runtime(snippet)[0] == ""


CONSTANTS = """
import aistore.sdk.const as const
result = {name: value for name, value in vars(const).items() if name.isupper()}
"""
USED_CONSTANTS = """
import importlib
import aistore.sdk.const as const
modules = ["base_etl_server", "fastapi_server", "flask_server", "http_multi_threaded_server", "utils"]
used = set().union(*(vars(importlib.import_module("aistore.sdk.etl.webserver." + name)) for name in modules))
words = ("ETL_WS_", "ETL_RETRY_", "QPARAM_ETL_", "HEADER_ETL_")
result = sorted(name for name in vars(const) if name.isupper() and (name in used or name.startswith(words)))
"""


def test_every_constant_has_the_value_of_the_sdk_and_those_that_its_servers_use_are_there() -> None:
    ours, theirs = results_of(CONSTANTS)
    missing = ADDED_AFTER_OLD_SDK if OLD_SDK else set()
    assert ours
    assert {name for name in ours if name not in theirs} <= missing, "the SDK has no such names"
    common = [name for name in ours if name in theirs]
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}
    assert [name for name in results_of(USED_CONSTANTS)[1] if name not in ours] == []


METHODS = """
import inspect
from aistore.sdk.etl.webserver.base_etl_server import ETLServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
result = {cls.__name__: sorted(name for name in dir(cls) if not name.startswith("__") and not name.startswith("_abc"))
          for cls in (ETLServer, HTTPMultiThreadedServer, FastAPIServer, FlaskServer)}
"""
INTERNALS = """
import ais_runtime_min
result = {cls.__name__: sorted(names) for cls, names in ais_runtime_min.INTERNALS.items()}
"""


def test_every_name_of_the_sdk_s_classes_is_there_or_known_as_an_internal() -> None:
    ours, theirs = results_of(METHODS)
    _, internals = run_snippets("slim", (INTERNALS,))[INTERNALS]
    for cls, names in theirs.items():
        known = set(ours[cls]) | set(internals.get(cls, ()))
        assert [name for name in names if name not in known] == [], cls


SIGNATURES = """
import inspect
from aistore.sdk.etl.webserver import base_etl_server, fastapi_server, flask_server, http_multi_threaded_server, utils
from aistore.sdk import errors
base = base_etl_server.ETLServer
functions = {
    "client_put": base.client_put, "handle_direct_put_response": base.handle_direct_put_response,
    "sanitize_fqn": base.sanitize_fqn, "close_reader": base.close_reader, "iter_and_close": base.iter_and_close,
    "make_direct_put_headers": base.make_direct_put_headers, "transform": base.transform,
    "transform_stream": base.transform_stream, "threaded": http_multi_threaded_server.HTTPMultiThreadedServer,
    "fastapi": fastapi_server.FastAPIServer, "flask": flask_server.FlaskServer,
    "transient": errors.ETLDirectPutTransientError, "compose": utils.compose_etl_direct_put_url,
    "parse": utils.parse_etl_pipeline, "serialize": utils.serialize_class, "counting": base_etl_server.CountingIterator,
}
result = {
    name: [(parameter.name, parameter.kind.name, repr(parameter.default))
           for parameter in inspect.signature(function).parameters.values()]
    for name, function in functions.items()
}
result["static"] = [type(vars(base)[name]).__name__ for name in ("close_reader", "iter_and_close", "make_direct_put_headers")]
result["abstract"] = sorted(base.__abstractmethods__)
"""


def test_parameters_have_the_names_and_defaults_of_the_sdk() -> None:
    ours, theirs = results_of(SIGNATURES)
    differing = {name: (ours[name], theirs[name]) for name in theirs if ours[name] != theirs[name]}
    if OLD_SDK:
        assert differing.pop("compose")[0][-1][0] == "etl_args"
    assert differing == {}


# == What these names do ==

BEHAVIOURS = (
    "from aistore.sdk.errors import InvalidPipelineError as E\nresult = [E.__mro__[1].__name__, str(E('a'))]",
    "from aistore.sdk.errors import ETLDirectPutTransientError as E\n"
    "error = E('http://t2/x', OSError('lost'))\n"
    "result = ['http://t2/x' in str(error), 'lost' in str(error), error.url, repr(error.cause),\n"
    "          error.bail_without_local_retry, E.__mro__[1].__name__]",
    "from aistore.sdk.errors import ETLDirectPutTransientError as E\n"
    "result = E(url='u', cause=KeyError('k'), bail_without_local_retry=True).bail_without_local_retry",
    "from aistore.sdk.etl.webserver.base_etl_server import CountingIterator as C\n"
    "counter = C(iter([b'ab', b'', b'c']))\nresult = [counter.bytes_sent, len(list(counter)), counter.bytes_sent]",
    "from aistore.sdk.etl.webserver.base_etl_server import SYNC_DIRECT_PUT_TRANSIENT_ERRORS as errors\n"
    "try:\n    raise OSError('x')\nexcept errors:\n    result = 'caught'\nexcept OSError:\n    result = 'not transient'",
    "from aistore.sdk.etl.webserver import serialize_class\nserialize_class(int)",
    "from aistore.sdk.etl.webserver import serialize_class\nserialize_class('Name')",
    "from aistore.sdk.etl.webserver.base_etl_server import ETLServer\nETLServer()",
    "from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer\nFastAPIServer()",
    "from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer as Base\n"
    "class Empty(Base):\n    pass\nEmpty()",
    "from aistore.sdk.etl.webserver.base_etl_server import ETLServer\n"
    "class NoStart(ETLServer):\n    def transform(self, data, path, etl_args):\n        return data\nNoStart()",
    "from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer as Base\n"
    "class Simple(Base):\n    def transform(self, data, path, etl_args):\n        return data\n"
    "server = Simple(port=9)\nresult = [server.host, server.port, server.get_mime_type(), server.use_streaming]",
    "from aistore.sdk.etl.webserver.base_etl_server import ETLServer\n"
    "result = [ETLServer.make_direct_put_headers(0), ETLServer.make_direct_put_headers(3)]",
    "import socketserver, http.server\n"
    "from aistore.sdk.etl.webserver.http_multi_threaded_server import ThreadedHTTPServer as S\n"
    "result = [issubclass(S, http.server.HTTPServer), issubclass(S, socketserver.ThreadingMixIn)]",
)


BOOLEANS = [
    (None, False), ("", False), ("1", True), ("t", True), ("T", True), ("true", True), ("TRUE", True), (" yes ", True),
    ("y", True), ("on", True), ("0", False), ("no", False), ("off", False), ("2", False), ("truthy", False), (" ", False),
]


BOOLEANS_SNIPPET = (
    "from aistore.sdk.utils import parse_bool\n"
    "result = [parse_bool(text) for text in %r]" % [text for text, _ in BOOLEANS])


def test_parse_bool_reads_texts_as_the_sdk_does() -> None:
    expected = ("", [value for _, value in BOOLEANS])
    assert of_runtime(BOOLEANS_SNIPPET) == expected
    if not OLD_SDK:
        assert of_sdk(BOOLEANS_SNIPPET) == expected


def test_serialize_class_makes_a_payload_that_the_same_interpreter_loads() -> None:
    snippet = """
import base64, pickle
from aistore.sdk.etl import serialize_class
from aistore.sdk.etl.webserver.flask_server import FlaskServer
class Own(FlaskServer):
    def transform(self, data, path, etl_args):
        return data[::-1]
Own.__module__ = "__main__"
again = pickle.loads(base64.b64decode(serialize_class(Own)))
result = [again.__name__, again().transform(b"abc", "", "").decode(), again.__mro__[1] is FlaskServer]
"""
    assert run_snippets("slim", (snippet,)) == {snippet: ("", ["Own", "cba", True])}


# == What is not there ==

OTHER_NAMES = (
    "import aistore.sdk.client", "from aistore.sdk.client import Client", "from aistore.sdk import Client",
    "from aistore import Client", "import aistore.client", "import aistore.pytorch", "from aistore.pytorch import AISDataset",
    "from aistore.sdk.etl import ETLConfig", "import aistore.sdk.etl.etl_const", "from aistore.sdk.errors import AISError",
    "from aistore.sdk.const import NO_SUCH_NAME", "from aistore.sdk.utils import get_digest", "from aistore.sdk import enums",
    "from aistore.sdk.etl.webserver.utils import _ResponseRawReader", "import aistore.sdk.etl.webserver.fastapi_streaming",
    "from aistore.sdk.etl.webserver.base_etl_server import NO_SUCH_NAME",
    "import importlib\nimportlib.import_module('aistore.sdk.bucket')", "__import__('aistore.sdk.job')",
    "import aistore.sdk.obj.object",
)
PACKAGES = [
    ("requests", "requests"), ("httpx", "httpx"), ("pydantic", "pydantic"), ("xxhash", "xxhash"), ("yaml", "PyYAML"),
    ("fastapi", "fastapi"), ("flask", "flask"),
]
PACKAGE_FORMS = (
    "import {0}", "from {0} import anything", "import {0}.part.other", "import importlib\nimportlib.import_module('{0}')",
)
MISSING_PACKAGES = tuple(form.format(name) for form in PACKAGE_FORMS for name, _ in PACKAGES)


def test_any_other_name_of_the_sdk_is_an_import_error_that_names_the_remedy() -> None:
    for snippet, (kind, text) in run_snippets("slim", OTHER_NAMES).items():
        assert (snippet, kind in ("ImportError", "ModuleNotFoundError")) == (snippet, True), text
        assert "default image" in text and "add aistore to PACKAGES" in text, (snippet, text)


@pytest.mark.parametrize("module, package", PACKAGES, ids=[module for module, _ in PACKAGES])
def test_a_package_of_the_default_image_is_an_import_error_that_names_the_remedy(
    module: str, package: str
) -> None:
    for form in PACKAGE_FORMS:
        kind, text = run_snippets("slim", MISSING_PACKAGES)[form.format(module)]
        assert (form, kind) == (form, "ModuleNotFoundError")
        assert "default image" in text and "add %s to PACKAGES" % package in text, (form, text)


QUIET: List[Tuple[str, Any]] = [
    ("import importlib.util\nresult = importlib.util.find_spec('requests')", None),
    ("import importlib.util\nresult = importlib.util.find_spec('yaml')", None),
    ("import importlib.util\nresult = importlib.util.find_spec('aistore.sdk.client')", None),
    ("import importlib.util\nresult = importlib.util.find_spec('aistore.sdk.const').name", "aistore.sdk.const"),
    ("import importlib.util\nresult = importlib.util.find_spec('no_such_module')", None),
    ("import pkgutil\nresult = pkgutil.find_loader('requests') if hasattr(pkgutil, 'find_loader') else None", None),
    ("import pkgutil, aistore\nresult = list(pkgutil.iter_modules(aistore.__path__))", []),
    ("import pkgutil\nresult = 'aistore' in [module.name for module in pkgutil.iter_modules()]", False),
    ("try:\n    import requests\nexcept ImportError:\n    result = 'optional'", "optional"),
    ("try:\n    from aistore.sdk import Client\nexcept ImportError:\n    result = 'optional'", "optional"),
    ("import aistore.sdk\nresult = hasattr(aistore.sdk, 'Client')", False),
    ("import aistore.sdk\nresult = getattr(aistore.sdk, 'Client', 'none')", "none"),
    ("import aistore.sdk.const as const\nresult = hasattr(const, '__wrapped__')", False),
    ("import aistore\nresult = hasattr(aistore, '__file__')", False),
    ("import inspect, aistore.sdk.const as const\nresult = 'STATUS_OK' in dict(inspect.getmembers(const))", True),
    ("import inspect, aistore.sdk.etl.webserver.utils as utils\n"
     "result = 'parse_etl_pipeline' in dict(inspect.getmembers(utils, inspect.isfunction))", True),
    ("import inspect, aistore.sdk.errors as errors\nresult = inspect.unwrap(errors) is errors", True),
    ("import sys, inspect\nresult = [name for name, module in sorted(sys.modules.items()) if name.startswith('aistore')\n"
     "          and not inspect.getmembers(module)]", []),
    ("import aistore.sdk.const\nresult = 'aistore.sdk.const' in repr(aistore.sdk.const)", True),
    ("import aistore.sdk.const as const\nresult = 'STATUS_OK' in dir(const)", True),
    ("names = {}\nexec('from aistore.sdk.const import *', names)\nresult = names['STATUS_OK']", 200),
    ("import inspect\nfrom aistore.sdk.etl.webserver.flask_server import FlaskServer\n"
     "result = inspect.getmodule(FlaskServer) is not None", True),
    ("import pickle, json, aistore.sdk.const, aistore.sdk.utils\n"
     "result = pickle.loads(pickle.dumps(json.dumps)) is json.dumps", True),
    ("import pickle, aistore.sdk.const\n"
     "def function():\n    pass\n"
     "function.__module__ = None\n"
     "function.__qualname__ = function.__name__ = 'no_such_function'\n"
     "try:\n    result = pickle.whichmodule(function, 'no_such_function')\n"
     "except pickle.PicklingError:\n    result = '__main__'  # since 3.15\n", "__main__"),
    ("import pickle, sys, aistore.sdk.const\n"
     "class Kept:\n    __module__ = None\n    def __reduce__(self):\n        return 'kept_object'\n"
     "sys.modules['sys'].kept_object = kept = Kept()\n"
     "result = pickle.loads(pickle.dumps(kept)) is kept", True),
    ("import cloudpickle, pickle, aistore.sdk.const as const\n"
     "result = pickle.loads(cloudpickle.dumps(lambda: const.STATUS_OK))()", 200),
    ("import cloudpickle, pickle, aistore.sdk.const as const\nresult = pickle.loads(cloudpickle.dumps(const)) is const", True),
    ("import copyreg, pickle, aistore.sdk.errors as errors\n"
     "error = pickle.loads(pickle.dumps(errors.InvalidPipelineError('a')))\n"
     "result = [type(error) is errors.InvalidPipelineError, str(error)]", [True, "a"]),
    ("import typing\nfrom aistore.sdk.etl.webserver.base_etl_server import ETLServer\n"
     "result = sorted(typing.get_type_hints(ETLServer.sanitize_fqn))", ["fqn", "return"]),
    ("import ais_runtime_min, sys\nbefore = len(sys.meta_path)\nais_runtime_min.install_sdk_names()\n"
     "result = len(sys.meta_path) - before", 0),
    ("import doctest, unittest.mock, warnings, aistore.sdk\nwith warnings.catch_warnings():\n    warnings.simplefilter('error')\n"
     "result = doctest.testmod(aistore.sdk).failed", 0),
    ("import importlib, aistore.sdk.const as const\nresult = importlib.reload(const).STATUS_OK", 200),
    ("import aistore_of_my_own", ["ModuleNotFoundError", "No module named 'aistore_of_my_own'"]),
    ("import no_such_module", ["ModuleNotFoundError", "No module named 'no_such_module'"]),
]
QUIET_SNIPPETS = tuple(snippet for snippet, _ in QUIET)


@pytest.mark.parametrize("snippet, expected", QUIET, ids=[str(number) for number in range(len(QUIET))])
def test_code_that_only_looks_meets_ordinary_modules(snippet: str, expected: Any) -> None:
    kind, result = run_snippets("slim", QUIET_SNIPPETS)[snippet]
    assert ([kind, result] if kind else result) == expected


# == Beside the real SDK ==

CORE_ORIGINS = """
import importlib, inspect
modules = ["aistore", "aistore.sdk", "aistore.sdk.client", "aistore.sdk.const", "aistore.sdk.errors", "aistore.sdk.utils",
           "aistore.sdk.etl", "aistore.sdk.etl.etl_const", "aistore.sdk.etl.etl", "aistore.sdk.bucket"]
webserver = ["aistore.sdk.etl.webserver"] + ["aistore.sdk.etl.webserver." + name for name in (
    "utils", "base_etl_server", "http_multi_threaded_server", "fastapi_server", "flask_server")]
result = [[name for name in modules if not getattr(importlib.import_module(name), "__file__", None)],
          [name for name in webserver if getattr(importlib.import_module(name), "__file__", None)]]
"""
CORE_CASES: List[Tuple[str, Any]] = [
    (CORE_ORIGINS, [[], []]),
    ("from aistore.sdk import Client, Bucket\nfrom aistore.sdk.errors import AISError\nresult = Client.__module__",
     "aistore.sdk.client"),
    ("from aistore.sdk import Client\nresult = type(Client('http://127.0.0.1:9').bucket('b').object('o')).__module__",
     "aistore.sdk.obj.object"),
    ("import aistore.sdk.errors as errors\nresult = [errors.InvalidPipelineError.__module__, "
     "errors.ETLDirectPutTransientError.__module__]", ["aistore.sdk.errors"] * 2),
    ("import aistore.sdk.const as const\nresult = const.DEFAULT_CHUNK_SIZE", 32 << 10),
    ("from aistore.sdk.etl import serialize_class\nfrom aistore.sdk.etl.webserver.utils import serialize_class as ours\n"
     "result = ours is serialize_class", True),
    ("from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer\nimport ais_runtime_min\n"
     "result = FastAPIServer is ais_runtime_min.FastAPIServer", True),
    ("from aistore.sdk.etl.webserver.utils import parse_etl_pipeline\nfrom aistore.sdk.errors import InvalidPipelineError\n"
     "try:\n    parse_etl_pipeline('http://a,,http://b')\nexcept InvalidPipelineError:\n    result = 'caught'", "caught"),
    ("import aistore.sdk, sys\nresult = [name for name in ('fastapi', 'flask', 'httpx', 'uvicorn') if name in sys.modules]", []),
    ("import requests\nresult = requests.__name__", "requests"),
    ("import importlib.util\nresult = importlib.util.find_spec('fastapi')", None),
    ("from aistore.sdk import NoSuchName", ["ImportError", "cannot import name 'NoSuchName' from 'aistore.sdk'"]),
    ("import aistore.no_such", ["ModuleNotFoundError", "No module named 'aistore.no_such'"]),
]
CORE_SNIPPETS = tuple(snippet for snippet, _ in CORE_CASES)


@pytest.mark.parametrize("snippet, expected", CORE_CASES, ids=[str(number) for number in range(len(CORE_CASES))])
def test_beside_the_real_sdk_all_but_the_web_server_modules_are_its_own(snippet: str, expected: Any) -> None:
    kind, result = run_snippets("sdkcore", CORE_SNIPPETS)[snippet]
    if kind:
        assert [kind, result[: len(expected[1])]] == expected
    else:
        assert result == expected


def test_frameworks_that_are_missing_beside_the_sdk_are_named_with_the_remedy() -> None:
    snippets = ("import fastapi", "import flask")
    for snippet, (kind, text) in run_snippets("sdkcore", snippets).items():
        assert kind == "ModuleNotFoundError"
        assert "add %s to PACKAGES" % snippet.split()[1] in text


# == Pipelines ==

HOST = "http://10.0.0.5:51081/v1/etl/_object/my-etl/s3cr3t"
TLS_HOST = HOST.replace("http:", "https:")
TARGET = "http://t2:51081/ais%2F@%23%2Fdst%2Fobj"
STAGE = "http://pod2:8000"
SAME_URLS = [  # entry, AIS_TARGET_URL, object's path, etl_args: as the SDK composes them
    (TARGET + "?uuid=x1&owt=5", HOST, "bck/obj", ""), (TARGET, HOST, "bck/obj", ""),
    (TARGET + "?uuid=x1&owt=5", HOST, "bck/obj", "a1"), (TARGET + "?uuid=x1&etl_args=old&owt=5", HOST, "bck/obj", "new"),
    (TARGET + "?uuid=x1&etl_args=old", HOST, "bck/obj", ""), (TARGET, HOST, "bck/obj", "a1"),
    (TARGET + "?uuid=x1", TLS_HOST, "bck/obj", ""), (TARGET.replace("http:", "https:"), HOST, "bck/obj", ""),
    (TARGET + "?x=a%2Fb&y=", HOST, "bck/obj", "a1"), (STAGE, HOST, "bck/obj", ""), (STAGE, HOST, "bck/dir/obj x", ""),
    (STAGE, HOST, "/bck/obj", ""), (STAGE, HOST, "ais/@#/bck/obj", ""), (STAGE, HOST, "bck/a?b=1&c", ""),
    (STAGE, HOST, "bck/100%", ""), (STAGE, HOST, "bck/a;v=1", ""), (STAGE, HOST, "bck/\u00e9\u20ac", ""),
    (STAGE, HOST, "bck/a+b", "a1"), (STAGE, HOST, "bck/a%2Fb", ""), (STAGE + "?x=1", HOST, "bck/obj", "a1"),
    ("http://[::1]:8000", HOST, "bck/obj", ""), ("http://t2:51081/a//b", HOST, "bck/obj", ""),
]
OWN_URLS = [  # where the SDK's are wrong
    ("a stage keeps its own scheme", (STAGE, TLS_HOST, "bck/obj", ""), STAGE + "/bck/obj"),
    ("and an https stage too", ("https://pod2:8000", HOST, "bck/obj", ""), "https://pod2:8000/bck/obj"),
    ("a space is %20", (STAGE, HOST, "bck/obj", "a b"), STAGE + "/bck/obj?etl_args=a%20b"),
    ("nothing passes as it is", (STAGE, HOST, "b/o", "x=1&y/\u00e9+"), STAGE + "/b/o?etl_args=x%3D1%26y%2F%C3%A9%2B"),
    ("the rest of the query is kept raw", (TARGET + "?u=a%20b&flag", HOST, "b/o", "n"),
     HOST + "/ais%2F@%23%2Fdst%2Fobj?u=a%20b&flag&etl_args=n"),
    ("a semicolon is part of the path", (TARGET + ";v=1", HOST, "b/o", ""), HOST + "/ais%2F@%23%2Fdst%2Fobj;v=1"),
]
if OLD_SDK:  # its function has no parameter etl_args, and does not quote the path
    SAME_URLS = [row for row in SAME_URLS if not row[3] and row[2] == quote(row[2], safe="/")]
COMPOSE = "from aistore.sdk.etl.webserver.utils import compose_etl_direct_put_url as compose\nresult = compose(*%r)"
URL_SNIPPETS = tuple(COMPOSE % (row[:3] if OLD_SDK else row,) for row in SAME_URLS)


def test_direct_put_urls_are_right_where_those_of_the_sdk_are_not() -> None:
    outcomes = run_snippets("slim", tuple(COMPOSE % (row,) for _, row, _ in OWN_URLS))
    for why, row, expected in OWN_URLS:
        url = expected.replace("http://10.0.0.5:51081", "http://t2:51081")
        assert (why, *outcomes[COMPOSE % (row,)]) == (why, "", url)


PIPELINES = [
    "", " ", "http://a", " http://a ", "http://a,http://b", "http://a,http://b,http://c/x?y=1", "http://a, http://b",
    "http://a , http://b , http://c", ",", "http://a,", ",http://a", "http://a,,http://b", "http://a, ,http://b", "\thttp://a\t",
]
PARSE = "from aistore.sdk.etl.webserver.utils import parse_etl_pipeline as parse\nresult = parse(%r)"
PIPELINE_SNIPPETS = tuple(PARSE % (header,) for header in PIPELINES)


@pytest.mark.parametrize(
    "snippets", [BEHAVIOURS, URL_SNIPPETS, PIPELINE_SNIPPETS], ids=["names", "urls", "pipelines"])
def test_the_names_urls_and_pipelines_do_what_those_of_the_sdk_do(snippets: Sequence[str]) -> None:
    differing = []
    for snippet in snippets:
        (our_kind, ours), (their_kind, theirs) = of_runtime(snippet), of_sdk(snippet)
        if our_kind != their_kind or (not our_kind and ours != theirs):
            differing.append((snippet, our_kind, ours, their_kind, theirs))
    assert differing == []


ALL_OF_SDK = (
    CONSTANTS, USED_CONSTANTS, METHODS, SIGNATURES, BOOLEANS_SNIPPET,
    *IMPORTS, *BEHAVIOURS, *URL_SNIPPETS, *PIPELINE_SNIPPETS)
