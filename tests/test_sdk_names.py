"""The names of the SDK as user code meets them in an interpreter that does not have it, compared with the real ones.

A table is run as a whole in one child process per interpreter; the tests look at its outcomes.
"""
import functools
import json
import subprocess
import sys
from typing import Any, Dict, Sequence, Tuple
from urllib.parse import quote

import pytest

from ais_runtime_min import INTERNALS
from harness import RUNTIME, interpreter

WEBSERVER = "aistore.sdk.etl.webserver"
OLD_SDK = sys.version_info < (3, 10)  # the last SDK for Python 3.9 is 1.24
ADDED_AFTER_OLD_SDK = {"HEADER_TRANSFER_ENCODING"}

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

NAMES = {
    "aistore.sdk.etl": "serialize_class", WEBSERVER: "serialize_class",
    WEBSERVER + ".utils": "serialize_class compose_etl_direct_put_url parse_etl_pipeline",
    WEBSERVER + ".base_etl_server":
        "ETLServer CountingIterator RETRY_BACKOFF_BASE RETRY_BACKOFF_MAX "
        "SYNC_DIRECT_PUT_TRANSIENT_ERRORS",
    WEBSERVER + ".http_multi_threaded_server": "HTTPMultiThreadedServer ThreadedHTTPServer",
    WEBSERVER + ".fastapi_server": "FastAPIServer", WEBSERVER + ".flask_server": "FlaskServer",
    "aistore.sdk.errors": "InvalidPipelineError ETLDirectPutTransientError",
    "aistore.sdk.const": "HEADER_NODE_URL",
    **({} if OLD_SDK else {"aistore.sdk.utils": "parse_bool"}),
}
FORMS = (
    "from {module} import {name} as found", "import {module}\nfound = {module}.{name}",
    "from {parent} import {last} as module\nfound = module.{name}",
)
SAY_NAME = """
plain = isinstance(found, (int, float, str))
result = found if plain else getattr(found, "__name__", type(found).__name__)
"""
IMPORTS = tuple(
    form.format(module=module, name=name, parent=module.rpartition(".")[0],
                last=module.rpartition(".")[2]) + SAY_NAME
    for form in FORMS for module, names in NAMES.items() for name in names.split())


def test_the_names_that_payloads_use_are_importable_in_all_ways() -> None:
    outcomes = {snippet: (of_runtime(snippet), of_sdk(snippet)) for snippet in IMPORTS}
    wrong = {snippet: both for snippet, both in outcomes.items() if both[0] != both[1] or both[0][0]}
    assert wrong == {}


CONSTANTS = """
import importlib
import aistore.sdk.const as const
constants = {name: value for name, value in vars(const).items() if name.isupper()}
modules = ["base_etl_server", "fastapi_server", "flask_server", "http_multi_threaded_server", "utils"]
used = set().union(*(vars(importlib.import_module("aistore.sdk.etl.webserver." + name)) for name in modules))
words = ("ETL_WS_", "ETL_RETRY_", "QPARAM_ETL_", "HEADER_ETL_")
result = [constants, sorted(name for name in constants if name in used or name.startswith(words))]
"""


def test_every_constant_has_the_value_of_the_sdk_and_those_that_its_servers_use_are_there() -> None:
    (ours, _), (theirs, used) = results_of(CONSTANTS)
    assert set(ours) - set(theirs) <= (ADDED_AFTER_OLD_SDK if OLD_SDK else set())
    common = set(ours) & set(theirs)
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}
    assert [name for name in used if name not in ours] == []


METHODS = """
from aistore.sdk.etl.webserver.base_etl_server import ETLServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
result = {cls.__name__: sorted(name for name in dir(cls) if not name.startswith("__") and not name.startswith("_abc"))
          for cls in (ETLServer, HTTPMultiThreadedServer, FastAPIServer, FlaskServer)}
"""


def test_every_name_of_the_sdk_s_classes_is_there_or_known_as_an_internal() -> None:
    ours, theirs = results_of(METHODS)
    internals = {cls.__name__: names for cls, names in INTERNALS.items()}
    for cls, names in theirs.items():
        assert set(names) - set(ours[cls]) <= set(internals.get(cls, ())), cls


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
    "          error.bail_without_local_retry, E.__mro__[1].__name__,\n"
    "          E(url='u', cause=KeyError('k'),"
    " bail_without_local_retry=True).bail_without_local_retry]",
    "from aistore.sdk.etl.webserver.base_etl_server import CountingIterator as C\n"
    "counter = C(iter([b'ab', b'', b'c']))\nresult = [counter.bytes_sent, len(list(counter)), counter.bytes_sent]",
    "from aistore.sdk.etl.webserver.base_etl_server import SYNC_DIRECT_PUT_TRANSIENT_ERRORS as errors\n"
    "try:\n    raise OSError('x')\nexcept errors:\n    result = 'caught'\nexcept OSError:\n    result = 'not transient'",
    "from aistore.sdk.etl.webserver import serialize_class\nserialize_class(int)",
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
    "import http.server\n"
    "from aistore.sdk.etl.webserver.http_multi_threaded_server import ThreadedHTTPServer as S\n"
    "with S(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler, 'mine') as server:\n"
    "    result = server.etl_server",
)
if not OLD_SDK:
    BEHAVIOURS += (
        "from aistore.sdk.utils import parse_bool\n"
        "texts = None, '', 'TRUE', ' yes ', 'y', 'on', '0', 'off', '2', 'truthy', ' '\n"
        "result = [parse_bool(text) for text in texts]",)

# entry, AIS_TARGET_URL, object's path, etl_args; test_delivery.py has what the SDK does wrong
HOST = "http://10.0.0.5:51081/v1/etl/_object/my-etl/s3cr3t"
TARGET = "http://t2:51081/ais%2F@%23%2Fdst%2Fobj"
STAGE = "http://pod2:8000"
URLS = [
    (TARGET, HOST, "bck/obj", ""), (TARGET + "?uuid=x1&owt=5", HOST, "bck/obj", "a1"),
    (TARGET + "?uuid=x1&etl_args=old&owt=5", HOST, "bck/obj", "new"),
    (TARGET + "?uuid=x1&etl_args=old", HOST, "bck/obj", ""),
    (TARGET + "?uuid=x1", HOST.replace("http:", "https:"), "bck/obj", ""),
    (TARGET.replace("http:", "https:"), HOST, "bck/obj", ""),
    (TARGET + "?x=a%2Fb&y=", HOST, "bck/obj", "a1"),
    (STAGE, HOST, "/bck/obj", ""), (STAGE, HOST, "ais/@#/bck/obj x", ""),
    (STAGE, HOST, "bck/a?b=1&c;100%+\u00e9\u20ac", ""), (STAGE, HOST, "bck/a%2Fb", ""),
    (STAGE + "?x=1", HOST, "bck/obj", "a1"), ("http://[::1]:8000", HOST, "bck/obj", ""),
    ("http://t2:51081/a//b", HOST, "bck/obj", ""),
]
if OLD_SDK:  # its function has no parameter etl_args, and does not quote the path
    URLS = [row for row in URLS if not row[3] and row[2] == quote(row[2], safe="/")]
COMPOSE = "from aistore.sdk.etl.webserver.utils import compose_etl_direct_put_url as compose\nresult = compose(*%r)"
COMPOSED = tuple(COMPOSE % (row[:3] if OLD_SDK else row,) for row in URLS)
PARSE = "from aistore.sdk.etl.webserver.utils import parse_etl_pipeline as parse\nresult = parse(%r)"
PARSED = tuple(PARSE % header for header in (
    None, "", " ", " http://a ", "http://a,http://b,http://c/x?y=1", "http://a , http://b , http://c",
    ",", "http://a,", ",http://a", "http://a, ,http://b", "\thttp://a\t"))
ALL_OF_SDK = (CONSTANTS, METHODS, SIGNATURES, *IMPORTS, *BEHAVIOURS, *COMPOSED, *PARSED)


@pytest.mark.parametrize(
    "snippets", [BEHAVIOURS, COMPOSED, PARSED], ids=["names", "urls", "pipelines"])
def test_the_names_urls_and_pipelines_do_what_those_of_the_sdk_do(snippets: Sequence[str]) -> None:
    differing = []
    for snippet in snippets:
        (our_kind, ours), (their_kind, theirs) = of_runtime(snippet), of_sdk(snippet)
        if our_kind != their_kind or (not our_kind and ours != theirs):
            differing.append((snippet, our_kind, ours, their_kind, theirs))
    assert differing == []


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

MISSING = {  # the package that the error tells to add
    **dict.fromkeys((
        "from aistore.sdk import Client", "from aistore import Client", "import aistore.client",
        "from aistore.pytorch import AISDataset", "from aistore.sdk.errors import AISError",
        "from aistore.sdk.const import NO_SUCH_NAME", "from aistore.sdk import enums",
        "import aistore.sdk.etl.webserver.fastapi_streaming", "import aistore.sdk.obj.object",
        "__import__('aistore.sdk.job')",
        "import importlib\nimportlib.import_module('aistore.sdk.bucket')",
    ), "aistore"),
    "import requests": "requests", "from httpx import anything": "httpx", "import yaml": "PyYAML",
    "import pydantic": "pydantic", "import xxhash.part.other": "xxhash", "import flask": "flask",
    "import importlib\nimportlib.import_module('fastapi.responses')": "fastapi",
    "from fastapi import Request": "fastapi", "import fastapi.exceptions as e\ne.WebSocketException":
    "fastapi",
}


TELL = """
import ais_runtime_min
try:
    exec(%r, {})
except (ImportError, AttributeError) as error:
    result = ais_runtime_min.describe_of_user(error)
"""


def test_what_only_the_default_image_has_is_an_import_error_that_is_told_with_the_remedy() -> None:
    told = run_snippets("slim", tuple(TELL % snippet for snippet in MISSING))
    for snippet, package in MISSING.items():
        kind, text = told[TELL % snippet]
        assert not kind and text.endswith(": add %s to PACKAGES" % package), (snippet, kind, text)


QUIET: Dict[str, Any] = {
    "import importlib.util\nresult = importlib.util.find_spec('yaml')": None,
    "import importlib.util\nresult = importlib.util.find_spec('aistore.sdk.client')": None,
    "import importlib.util as util\nresult = util.find_spec('aistore.sdk.const').name":
        "aistore.sdk.const",
    "import pkgutil, aistore\nresult = list(pkgutil.iter_modules(aistore.__path__))": [],
    "try:\n    from aistore.sdk import Client\nexcept ImportError:\n    result = 'none'": "none",
    "import aistore.sdk\nresult = getattr(aistore.sdk, 'Client', 'none')": "none",
    "import sys, inspect\nresult = [name for name, module in sorted(sys.modules.items())\n"
    "          if name.startswith('aistore')\n"
    "          and not inspect.getmembers(module)]": [],
    "names = {}\nexec('from aistore.sdk.const import *', names)\nresult = names['STATUS_OK']": 200,
    "import inspect\nfrom aistore.sdk.etl.webserver.flask_server import FlaskServer\n"
    "result = inspect.getmodule(FlaskServer) is not None": True,
    "import pickle, sys, aistore.sdk.const\n"
    "class Kept:\n    __module__ = None\n    def __reduce__(self):\n        return 'kept_object'\n"
    "sys.modules['sys'].kept_object = kept = Kept()\n"
    "result = pickle.loads(pickle.dumps(kept)) is kept": True,
    "import cloudpickle, pickle, aistore.sdk.const as const\n"
    "result = pickle.loads(cloudpickle.dumps(const)) is const": True,
    "import pickle, aistore.sdk.errors as errors\n"
    "error = pickle.loads(pickle.dumps(errors.InvalidPipelineError('a')))\n"
    "result = [type(error) is errors.InvalidPipelineError, str(error)]": [True, "a"],
    "import ais_runtime_min, sys\n"
    "before = len(sys.meta_path)\nais_runtime_min.install_sdk_names()\n"
    "result = len(sys.meta_path) - before": 0,
    "import doctest, unittest.mock, warnings, aistore.sdk\nwith warnings.catch_warnings():\n"
    "    warnings.simplefilter('error')\n    result = doctest.testmod(aistore.sdk).failed": 0,
    "import importlib, aistore.sdk.const as const\nresult = importlib.reload(const).STATUS_OK": 200,
    "import aistore_of_my_own": "ModuleNotFoundError: No module named 'aistore_of_my_own'",
}


def results_with(group: str, snippets: Dict[str, Any]) -> Dict[str, Any]:
    """Return what snippets bind to `result` or raise, in the form of their table."""
    outcomes = run_snippets(group, tuple(snippets))
    return {snippet: "%s: %s" % (kind, result) if kind else result
            for snippet, (kind, result) in outcomes.items()}


def test_code_that_only_looks_meets_ordinary_modules() -> None:
    assert results_with("slim", QUIET) == QUIET


# == Beside the real SDK ==

BESIDE: Dict[str, Any] = {
    """
import importlib
modules = ["aistore", "aistore.sdk", "aistore.sdk.client", "aistore.sdk.const", "aistore.sdk.errors", "aistore.sdk.utils",
           "aistore.sdk.etl", "aistore.sdk.etl.etl_const", "aistore.sdk.etl.etl", "aistore.sdk.bucket"]
webserver = ["aistore.sdk.etl.webserver"] + ["aistore.sdk.etl.webserver." + name for name in (
    "utils", "base_etl_server", "http_multi_threaded_server", "fastapi_server", "flask_server")]
result = [[name for name in modules if not getattr(importlib.import_module(name), "__file__", None)],
          [name for name in webserver if getattr(importlib.import_module(name), "__file__", None)]]
""": [[], []],
    "from aistore.sdk.etl.webserver.utils import parse_etl_pipeline\n"
    "from aistore.sdk.errors import InvalidPipelineError as Error\n"
    "try:\n    parse_etl_pipeline('http://a,,x')\nexcept Error:\n    result = 'caught'": "caught",
    "try:\n    from aistore.sdk import NoSuchName\nexcept ImportError as error:\n"
    "    result = str(error).partition(' (')[0]":
        "cannot import name 'NoSuchName' from 'aistore.sdk'",
    "import aistore.no_such": "ModuleNotFoundError: No module named 'aistore.no_such'",
}


def test_beside_the_real_sdk_all_but_the_web_server_modules_are_its_own() -> None:
    assert results_with("sdkcore", BESIDE) == BESIDE
