"""Classes that the real SDK pickled load and serve in an interpreter that has cloudpickle alone."""
import concurrent.futures
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Tuple
from urllib.parse import quote

import pytest

from ais_runtime_min import Exit
from harness import UNUSED_TARGET, Response, Runtime, Server, interpreter, make_payload, run_to_end
from standin import BASE_PATH, Behaviour, StandInTarget

StartRuntime = Callable[..., Runtime]
TOKEN = "t0ken-of-the-cluster"
MODULE_OF = {
    "HTTPMultiThreadedServer": "http_multi_threaded_server", "FastAPIServer": "fastapi_server", "FlaskServer": "flask_server",
}


class Kind(NamedTuple):
    """A base class, and whether the class on top of it streams."""

    base: str
    streams: bool

    def __str__(self) -> str:
        return "%s-%s" % (self.base, self.name)

    @property
    def name(self) -> str:
        """The name of that class."""
        return "Streaming" if self.streams else "Buffered"


THREADED = Kind("HTTPMultiThreadedServer", False)
FAST, FAST_STREAM = Kind("FastAPIServer", False), Kind("FastAPIServer", True)
FLASK, FLASK_STREAM = Kind("FlaskServer", False), Kind("FlaskServer", True)

# Follows a source that defines `Answers`: `etl_args` names the method that answers, in JSON.
TAIL = '''
import json

class Buffered(Answers, Base):
    def transform(self, data, path, etl_args):
        return json.dumps(getattr(self, etl_args)(data))

class Streaming(Answers, Base):
    def transform_stream(self, reader, path, etl_args):
        yield json.dumps(getattr(self, etl_args)(reader.read()))
'''


def simple(base: str, source: str, name: str = "Simple") -> str:
    """Pickle a class of a source, which may call the base class `Base`."""
    head = "from aistore.sdk.etl.webserver.%s import %s as Base\n" % (MODULE_OF[base], base)
    return make_payload(head + source, name)


def payload_of(kind: Kind, source: str) -> str:
    """Pickle a source's `Answers` on top of a base."""
    return simple(kind.base, source + TAIL, kind.name)


@pytest.fixture
def serve(start_runtime: StartRuntime) -> StartRuntime:
    """A function that starts a pod of one worker for a payload, with further variables."""

    def start(payload: Optional[str], python: Optional[str] = None, fails: bool = False,
              **env: Optional[str]) -> Runtime:
        variables = {"NUM_WORKERS": "1", **env}
        return start_runtime(payload, variables, python=python, expect_traceback=fails)

    return start


def put(server: Server, etl_args: str = "", path: str = "/bck/dir/obj%20x") -> Response:
    """Transform one object as hpush does."""
    return server.request("PUT", "%s?etl_args=%s" % (path, quote(etl_args, safe="")), b"object")


def told(server: Server, name: str) -> Any:
    """Return what a method of `Answers` tells."""
    response = put(server, name)
    assert response.status == 200, response
    return json.loads(response.body)


def detail(response: Response) -> str:
    """Return the text of an error answer."""
    assert response.headers["content-type"].startswith("application/json"), response
    answer = json.loads(response.body)
    assert list(answer) == ["detail"], response
    return str(answer["detail"])


def at_once(count: int, call: Callable[[int], Response]) -> List[Response]:
    """Make calls from as many threads, and return their answers."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


# == What a class may be made of ==

# All kinds of bytecode are in test_versions.py: here is what pickles refer to, and make anew.
GALLERY = '''
import abc, collections, dataclasses, enum, functools, re, typing
from typing import NamedTuple, Optional

import aistore.sdk.const as names
from aistore.sdk.const import HEADER_NODE_URL
from aistore.sdk.errors import InvalidPipelineError
from aistore.sdk.etl.webserver.base_etl_server import ETLServer

WORD = re.compile(r"(?P<first>[a-z])[a-z]*")
SEEN = []
COUNTS = collections.Counter()

class Colour(enum.Enum):
    RED = "red"

    @property
    def shout(self):
        return self.value.upper()

class Flags(enum.IntFlag):
    ONE = 1
    TWO = 2

class Point(NamedTuple):
    x: int
    y: int = 5

    def total(self):
        return self.x + self.y

@dataclasses.dataclass(frozen=True, order=True)
class Box:
    width: int
    parts: list = dataclasses.field(default_factory=list, compare=False)

def helper(data):
    return second_helper(data)[:3]

def second_helper(data):
    return data[::-1]

def make_adder(total):
    def add(number):
        nonlocal total
        total += number
        return total
    return add

adder = make_adder(100)

def twice(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 2
    return wrapper

@twice
def decorated(text, *, mark="!"):
    return text + mark

class Registered(abc.ABC):
    known = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.known.append(cls.__name__)

    @abc.abstractmethod
    def greet(self):
        """Say hello."""

class Greets(Registered):
    def greet(self):
        return "base"

class Shouts:
    def greet(self):
        return super().greet().upper()

class Answers(Shouts, Greets):
    class Inner:
        class Deeper:
            value = "deep"

    def functions(self, data):
        return [helper(data).decode(), adder(1) > 100, decorated("a", mark="?"), decorated.__name__]

    def inheritance(self, data):
        known = sorted({"Greets", "Answers"} & set(Registered.known))
        return [self.greet(), known, Answers.Inner.Deeper.value]

    def regex(self, data):
        return WORD.match(data.decode()).group("first")

    def changed_globals(self, data):
        SEEN.append(data)
        COUNTS[data] += 1
        return len(SEEN) == COUNTS[data] > 0

    def dataclass(self, data):
        box = dataclasses.replace(Box(3), width=4)
        return [Box(1) < Box(2), box == Box(4, [1]), dataclasses.asdict(box)]

    def enums(self, data):
        return [Colour("red") is Colour.RED, Colour.RED.shout, Flags.ONE | Flags.TWO == 3]

    def named_tuple(self, data):
        return [Point(2).total(), repr(Point(1)._replace(y=2))]

    def annotated(self, server: Optional[ETLServer]) -> InvalidPipelineError:
        """Refer to names of the SDK by annotations alone."""

    def annotations(self, data):
        return typing.get_type_hints(self.annotated)["return"] is InvalidPipelineError

    def names_of_the_sdk(self, data):
        from aistore.sdk.const import QPARAM_ETL_ARGS
        from aistore.sdk.etl.webserver import base_etl_server
        ours = isinstance(self, ETLServer) and base_etl_server.ETLServer is ETLServer
        return [HEADER_NODE_URL, QPARAM_ETL_ARGS, names.STATUS_NO_CONTENT, ours]
'''


@pytest.mark.parametrize("kind, group", [
    (THREADED, "slim"), (FAST_STREAM, "slim"), (FLASK_STREAM, "sdkcore")], ids=str)
def test_a_payload_may_be_made_of_all_that_python_has(
    serve: StartRuntime, kind: Kind, group: str
) -> None:
    pod = serve(payload_of(kind, GALLERY), interpreter(group))
    expected = {
        "functions": ["tce", True, "a?a?", "decorated"],
        "inheritance": ["BASE", ["Answers", "Greets"], "deep"],
        "regex": "o", "changed_globals": True,
        "dataclass": [True, True, {"width": 4, "parts": []}], "enums": [True, "RED", True],
        "named_tuple": [7, "Point(x=1, y=2)"], "annotations": True,
        "names_of_the_sdk": ["Ais-Node-Url", "etl_args", 204, True],
    }
    assert {name: told(pod, name) for name in expected} == expected


LOGGING = '''
import logging

module_logger = logging.getLogger(__name__)

class Answers:
    def tell(self, data):
        self.logger.info("told by %s", "self.logger")
        module_logger.info("told by the module's logger")
        print("told by print")
        return [self.logger.name, self.logger.level, logging.getLogger().level]
'''


def test_what_a_class_logs_and_prints_is_in_the_log(serve: StartRuntime) -> None:
    pod = serve(payload_of(THREADED, LOGGING))
    assert told(pod, "tell") == ["Buffered", 20, 20]
    pod.wait_for_line(r"^\d{4}-\d\d-\d\d \S+ - Buffered - INFO - told by self\.logger$", 5)
    pod.wait_for_line(r" - __main__ - INFO - told by the module's logger$", 5)
    pod.wait_for_line("^told by print$", 5)
    assert pod.log().count("told by self.logger") == 1, "a record is logged once"


def test_transform_wins_over_transform_stream_and_the_address_of_the_constructor_does_not_count(
    serve: StartRuntime,
) -> None:
    pod = serve(simple("FlaskServer", """
class Simple(Base):
    def __init__(self):
        super().__init__(host="127.0.0.9", port=9)

    def transform(self, data, path, etl_args):
        return "%s %d %s" % (self.host, self.port, self.use_streaming)

    def transform_stream(self, reader, path, etl_args):
        yield b"streamed"
"""))
    assert put(pod).body == b"127.0.0.9 9 False"


# == Attributes and methods ==

INSPECTOR = r"""
import io

class Failing:
    def close(self):
        raise RuntimeError("cannot be closed")

class Answers:
    def attributes(self, data):
        names = ("host_target", "direct_put", "direct_fqn", "direct_put_retries", "token", "use_streaming")
        return {name: getattr(self, name) for name in names}

    def session_without_requests(self, data):
        try:
            return repr(self.session)
        except ImportError as error:
            return str(error)

    def own_session(self, data):
        self.session = "my own"
        return self.session

    def sanitized(self, data):
        return [self.sanitize_fqn(text) for text in ("%2Fmnt%2Fa%20b", "mnt/a", "/mnt/../../etc/x", "//a//b/", "a%2Bb+c", "")]

    def closed(self, data):
        reader = io.BytesIO(b"x")
        results = [self.close_reader(reader), type(self).close_reader(None)]
        return [*results, self.close_reader(Failing()), reader.closed]

    def iterated(self, data):
        whole, left = io.BytesIO(b"x"), io.BytesIO(b"x")
        pieces = list(type(self).iter_and_close(iter([b"a", b"b"]), whole))
        iterator = self.iter_and_close(iter([b"a", b"b"]), left)
        next(iterator)
        before = left.closed
        iterator.close()
        return [len(pieces), whole.closed, before, left.closed]

    def put(self, data):
        url = self.host_target + "/some%2Fobj?uuid=1&x=%20"
        response = self.client_put(url, data, {"X-Own": "yes"}, timeout=5)
        status, body, length = self.handle_direct_put_response(response, data)
        _, _, other_length = self.handle_direct_put_response(response, data, data_length=77)
        content = response.content.decode()
        return [int(status), body.decode(), length, other_length, response.status_code, content]

    def refused_put(self, data):
        return self.client_put("http://127.0.0.1:9/x", data, headers={}).status_code
"""
# what the target answers, and what is made of it: status, body, length, and that of a stream
PUT_ANSWERS: List[Tuple[Behaviour, List[Any]]] = [
    (Behaviour(status=200), [204, "", 6, 77]),
    (Behaviour(status=200, framing="chunked"), [204, "", 6, 77]),
    (Behaviour(status=200, body=b"from a stage"), [200, "from a stage", 0, 0]),
    (Behaviour(status=204), [204, "", 0, 0]),
    (Behaviour(status=204, headers=(("ais-direct-put-length", "12"),)), [204, "", 12, 12]),
    (Behaviour(status=507, body=b"no space"), [507, "no space", 0, 0]),
]


@pytest.mark.parametrize("kind", [THREADED, FAST_STREAM], ids=str)
def test_attributes_and_methods_are_those_of_the_sdk(
    serve: StartRuntime, target: StandInTarget, kind: Kind
) -> None:
    pod = serve(payload_of(kind, INSPECTOR), direct_put="true", ETL_DIRECT_FQN="TRUE",
                AIS_DIRECT_PUT_RETRIES="7", AIS_AUTHN_TOKEN=TOKEN)
    assert told(pod, "attributes") == {
        "host_target": target.url, "direct_put": True, "direct_fqn": True,
        "direct_put_retries": 7, "token": TOKEN, "use_streaming": kind.streams,
    }
    assert "add requests to PACKAGES" in told(pod, "session_without_requests")
    assert told(pod, "sanitized") == ["/mnt/a b", "/mnt/a", "/etc/x", "/a/b", "/a+b+c", "/"]
    assert told(pod, "closed") == [None, None, None, True]
    assert told(pod, "iterated") == [2, True, False, True]
    for behaviour, expected in PUT_ANSWERS:
        target.requests.clear()
        target.script.append(behaviour)
        body = behaviour.body.decode() if isinstance(behaviour.body, bytes) else ""
        assert told(pod, "put") == [*expected, behaviour.status, body], behaviour
        sent, = target.requests
        assert (sent.method, sent.target) == ("PUT", BASE_PATH + "/some%2Fobj?uuid=1&x=%20")
        assert (sent.body, sent.headers["x-own"]) == (b"object", "yes")
        assert sent.headers["authorization"] == "Bearer " + TOKEN


def test_without_settings_attributes_have_the_defaults_of_the_sdk(serve: StartRuntime) -> None:
    pod = serve(payload_of(FLASK, INSPECTOR), fails=True, AIS_TARGET_URL=UNUSED_TARGET)
    assert told(pod, "attributes") == {
        "host_target": UNUSED_TARGET, "direct_put": False, "direct_fqn": False,
        "direct_put_retries": 3, "token": None, "use_streaming": False,
    }
    assert told(pod, "own_session") == "my own"
    refused = put(pod, "refused_put")
    assert (refused.status, "refused" in detail(refused)) == (500, True)


def test_an_override_of_build_session_makes_the_session(serve: StartRuntime) -> None:
    pod = serve(simple("HTTPMultiThreadedServer", """
class Simple(Base):
    def _build_session(self):
        return ["built", self.token]

    def transform(self, data, path, etl_args):
        assert self.session is self.session
        return repr(self.session)
"""), AIS_AUTHN_TOKEN="abc")
    assert put(pod).body == b"['built', 'abc']"


# == Results and exceptions ==

# The other results, and those that are errors, are in test_answers.py.
RESULTS = """
import array

NAMES = {"array": array.array}

class Whole(Base):
    def transform(self, blob, where, code):
        return eval(code, NAMES)

class Pieces(Base):
    def transform_stream(self, source, where, code):
        return [eval(code, NAMES)]
"""


@pytest.mark.parametrize("name", ["Whole", "Pieces"])
def test_results_may_be_any_buffers_and_parameters_have_any_names(
    serve: StartRuntime, name: str
) -> None:
    pod = serve(simple("FlaskServer", RESULTS, name), fails=True)
    for code, expected in [
        ("array('H', [0x4141, 0x4242])", b"AABB"), ("memoryview(b'xaby')[1:3]", b"ab"),
        ("memoryview(b'a-b-')[::2]", b"ab"), ("bytearray()", b""),
    ]:
        response = put(pod, code)
        assert (response.status, response.body) == (200, expected), code


FAULTS = r"""
import os

from aistore.sdk.errors import InvalidPipelineError

class OwnPipelineError(InvalidPipelineError):
    pass

class HTTPException(Exception):
    "Has the name of a framework's exception, and nothing to do with it."
    status_code = 404
    code = 404
    detail = "not here"

class HasStatus(OSError):
    status = 404
    status_code = 404
    headers = {}

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def endless():
    return endless()

OWN = (OwnPipelineError, HTTPException, HasStatus, Mute, endless)
NAMES = {each.__name__: each for each in OWN}

class Buffered(Base):
    def transform(self, data, path, code):
        exec(code, NAMES)
        return str(os.getpid())

class Streaming(Base):
    def transform_stream(self, reader, path, code):
        exec(code, NAMES)
        yield str(os.getpid())
"""
FAULT_ANSWERS = [  # the code, the status, and what the detail holds
    (r"""raise ValueError('say "x" \\ \u00e9\nline')""", 500, 'say "x" \\ \u00e9\nline'),
    ("raise ValueError", 500, "ValueError"),
    ("raise ValueError('outer') from KeyError('inner')", 500, "outer"),
    ("open('/no/such/file')", 500, "/no/such/file"),
    ("raise PermissionError('denied')", 500, "denied"),
    ("import socket; raise socket.timeout('slow')", 500, "slow"),
    ("raise ConnectionResetError(104, 'reset')", 500, "reset"),
    ("raise BrokenPipeError(32, 'a pipe')", 500, "a pipe"),
    ("import http.client; raise http.client.IncompleteRead(b'x', 5)", 500, ""),
    ("raise EOFError('ran out')", 500, "ran out"),
    ("raise StopIteration('x')", 500, ""), ("raise GeneratorExit('x')", 500, ""),
    ("raise MemoryError('much')", 500, "much"), ("endless()", 500, "recursion"),
    ("raise OwnPipelineError('bad own pipeline')", 400, "bad own pipeline"),
    ("from aistore.sdk.etl.webserver import utils; utils.parse_etl_pipeline('http://a,,x')", 400, ""),
    ("from aistore.sdk.errors import ETLDirectPutTransientError as Error\n"
     "raise Error('http://t2', OSError('lost'), bail_without_local_retry=True)", 503, "lost"),
    ("raise HTTPException('a namesake')", 500, ""),
    ("raise HasStatus('own status')", 500, "own status"),
    ("raise Mute", 500, ""), ("import requests", 500, "add requests to PACKAGES"),
    ("from aistore.sdk import Client", 500, "add aistore to PACKAGES"),
]


@pytest.mark.parametrize("kind", [THREADED, FAST, FLASK_STREAM], ids=str)
def test_an_exception_of_the_class_is_answered_and_the_worker_lives_on(
    serve: StartRuntime, kind: Kind
) -> None:
    pod = serve(simple(kind.base, FAULTS, kind.name), fails=True)
    worker = put(pod, "pass").body
    wrong = []
    for code, status, words in FAULT_ANSWERS:
        response = put(pod, code)
        text, reason = detail(response), response.headers.get("ais-etl-retry-reason")
        expected = (status, "direct-put-transient" if status == 503 else None)
        is_told = text.startswith("Processing error: ") and words in text
        if (response.status, reason) != expected or not is_told:
            wrong.append((code, response))
        assert (code, put(pod, "pass").body) == (code, worker)
    assert wrong == []
    pod.wait_for_line("^FileNotFoundError: ", 5)
    pod.wait_for_line("No module named 'requests': add requests to PACKAGES", 5)
    assert "user_script.py" in pod.log() and "ais_runtime_min.py" not in pod.log()


def test_an_attribute_of_the_sdk_that_is_not_here_is_told_with_the_remedy(
    serve: StartRuntime
) -> None:
    pod = serve(simple(THREADED.base, FAULTS, THREADED.name), fails=True)
    response = put(pod, "import aistore.sdk; aistore.sdk.Client()")
    assert response.status == 500
    assert "aistore.sdk.Client is not here: add aistore to PACKAGES" in detail(response)


FRAMEWORK_FAULTS = """
def run(code):
    import fastapi, starlette.exceptions, werkzeug.exceptions, flask

    class Own(fastapi.HTTPException):
        pass

    exec(code)

class Buffered(Base):
    def transform(self, data, path, code):
        run(code)

class Streaming(Base):
    def transform_stream(self, reader, path, code):
        yield run(code)
"""


@pytest.mark.parametrize("kind", [FLASK, FAST_STREAM], ids=str)
def test_http_exceptions_of_the_frameworks_give_their_status(
    serve: StartRuntime, kind: Kind
) -> None:
    pod = serve(simple(kind.base, FRAMEWORK_FAULTS, kind.name), interpreter("sdk"), fails=True)
    for code, status, words in [
        ("raise fastapi.HTTPException(422, {'reason': 'dict text'})", 422, "dict text"),
        ("raise fastapi.HTTPException(429)", 429, ""),
        ("raise Own(451, 'own text')", 451, "own text"),
        ("raise starlette.exceptions.HTTPException(503, 'starlette text')", 503, "starlette text"),
        ("flask.abort(409, 'abort text')", 409, "abort text"),
        ("raise werkzeug.exceptions.NotFound('werkzeug text')", 404, "werkzeug text"),
        ("raise werkzeug.exceptions.HTTPException('bare text')", 500, "bare text"),
    ]:
        response = put(pod, code)
        assert (code, response.status) == (code, status)
        assert words in detail(response)
        assert "ais-etl-retry-reason" not in response.headers


TELLTALE = r"""
import os, urllib.parse

class Answers:
    def fail(self, data):
        text = " ".join([
            "Authorization: Bearer " + self.token, self.host_target + "/ais%2F@%23%2Fbck",
            urllib.parse.urlsplit(self.host_target).path, str(dict(os.environ)),
            repr(OSError(self.token))])
        self.logger.warning("logged: %s", text)
        try:
            raise RuntimeError("inner " + text)
        except RuntimeError as error:
            raise ValueError("outer " + text) from error
"""


@pytest.mark.parametrize("kind", [THREADED, FAST_STREAM], ids=str)
def test_secrets_that_an_exception_quotes_are_told_to_nobody(
    serve: StartRuntime, kind: Kind
) -> None:
    pod = serve(payload_of(kind, TELLTALE), fails=True, AIS_AUTHN_TOKEN=TOKEN)
    response = put(pod, "fail")
    assert (response.status, "outer" in detail(response)) == (500, True)
    for line in ("^ValueError: outer ", "^RuntimeError: inner ", "logged: Authorization"):
        pod.wait_for_line(line, 5)
    for secret in (TOKEN, "s3cr3t", BASE_PATH):
        assert secret not in str(response) and secret not in pod.log()


# == How the payload comes ==

BULKY = """
import hashlib

BLOB = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(12_000))

class Simple(Base):
    def transform(self, data, path, etl_args):
        return hashlib.sha256(BLOB).hexdigest()
"""


@pytest.mark.parametrize("line_break, way", [("\r\n", "pieces"), (" \n\t ", "file")])
def test_a_large_payload_comes_in_pieces_or_a_file_and_white_space_in_it_does_not_count(
    serve: StartRuntime, tmp_path: Path, line_break: str, way: str
) -> None:
    payload = simple("HTTPMultiThreadedServer", BULKY)
    assert len(payload) > 500_000
    lines = [payload[start:start + 76] for start in range(0, len(payload), 76)]
    text = line_break.join(["", *lines, ""])
    if way == "file":
        (tmp_path / "payload").write_bytes(text.encode())
        pod = serve(None, ETL_CLASS_PAYLOAD_FILE=str(tmp_path / "payload"))
    else:  # Linux caps one string of an environment at 128 KiB
        first, *others = [text[start:start + 40_001] for start in range(0, len(text), 40_001)]
        pod = serve(first, **{"ETL_CLASS_PAYLOAD_%d" % number: piece
                              for number, piece in enumerate(others, 2)})
    blob = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(12_000))
    assert put(pod).body.decode() == hashlib.sha256(blob).hexdigest()


@pytest.mark.parametrize("missing", ["sdk import Client", "sdk.utils import get_digest"])
def test_a_payload_that_needs_more_of_the_sdk_says_what_to_add(missing: str) -> None:
    source = ("from aistore.%s as needed\n\nclass Simple(Base):\n"
              "    def transform(self, data, path, etl_args):\n")
    payload = simple("HTTPMultiThreadedServer", source % missing + "        return needed\n")
    finished = run_to_end(env={"ETL_CLASS_PAYLOAD": payload})
    assert finished.code == Exit.UNAVAILABLE
    assert "add aistore to PACKAGES" in finished.last_line


# == With the SDK's client installed ==

CLIENT = r"""
from aistore.sdk import Client
from aistore.sdk.errors import AISError, InvalidPipelineError

class Answers:
    def __init__(self):
        super().__init__()
        scheme, _, host = self.host_target.partition("://")
        self.bucket = Client(scheme + "://" + host.partition("/")[0]).bucket("bck")

    def get(self, data):
        return self.bucket.object("side").get_reader().read_all().decode()

    def missing(self, data):
        try:
            self.bucket.object("missing").get_reader().read_all()
        except AISError as error:
            return [type(error).__module__, error.status_code]

    def origins(self, data):
        import sys
        import aistore.sdk.etl.webserver.fastapi_server as ours
        names = [name for name in ("fastapi", "flask", "httpx", "uvicorn") if name in sys.modules]
        is_of_sdk = ours.FastAPIServer.__module__.startswith("aistore.")
        return [names, is_of_sdk, type(self).__mro__[2].__name__]

    def use_session(self, data):
        response = self.session.put(self.host_target + "/obj", data=data)
        return [type(self.session).__module__, response.status_code]

    def pipeline(self, data):
        raise InvalidPipelineError("bad pipeline")
"""


def test_a_class_may_use_the_sdk_that_is_installed_without_its_extras(
    serve: StartRuntime, target: StandInTarget
) -> None:
    pod = serve(payload_of(FAST, CLIENT), interpreter("sdkcore"), fails=True, AIS_AUTHN_TOKEN=TOKEN)
    target.script.append(Behaviour(status=200, body=b"the side object"))
    assert told(pod, "get") == "the side object"
    assert target.requests[0].path == "/v1/objects/bck/side"
    body = b'{"status": 404, "message": "no such object"}'
    headers = (("Content-Type", "application/json"),)
    target.script.append(Behaviour(status=404, body=body, headers=headers))
    assert told(pod, "missing") == ["aistore.sdk.errors", 404]
    assert told(pod, "origins") == [[], False, "FastAPIServer"]
    assert told(pod, "use_session") == ["requests.sessions", 200]
    assert target.requests[-1].headers["authorization"] == "Bearer " + TOKEN
    response = put(pod, "pipeline")
    assert (response.status, detail(response)) == (400, "Processing error: bad pipeline")


# == Threads and workers ==

CROWD = 8  # clients at once
STATEFUL = """
import json, os, signal, sqlite3, threading, time

class Simple(Base):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.inside = self.most = 0
        self.meeting = threading.Barrier(2)
        self.pid = os.getpid()
        self.database = sqlite3.connect(":memory:")  # of this thread alone
        self.database.execute("create table seen (name text)")

    def count(self, path):
        self.database.execute("insert into seen values (?)", (path,))
        return self.database.execute("select count(*) from seen").fetchone()[0]

    def nap(self, path):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.02)
        with self.lock:
            self.inside -= 1
        return self.most

    def alarm(self, path):
        def ring(*_):
            raise TimeoutError("took too long")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            time.sleep(20)
        except TimeoutError as error:
            return str(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def meet(self, path):
        self.meeting.wait(10)
        return "met"

    def pids(self, path):
        time.sleep(0.02)
        return [self.pid, os.getpid()]

    def transform(self, data, path, etl_args):
        return json.dumps(getattr(self, etl_args)(path))

class Streaming(Base):
    def __init__(self):
        super().__init__()
        self.meeting = threading.Barrier(2)

    def transform_stream(self, reader, path, etl_args):
        self.meeting.wait(10)
        yield reader.read()
"""


def answers(server: Server, name: str, count: int = CROWD) -> List[Any]:
    """Ask so many clients' questions at once."""
    responses = at_once(count, lambda number: put(server, name, "/bck/%d" % number))
    assert [response.status for response in responses] == [200] * count, responses
    return [json.loads(response.body) for response in responses]


@pytest.mark.parametrize("base", ["FastAPIServer", "FlaskServer"])
def test_framework_classes_transform_one_at_a_time_on_the_main_thread_that_made_them(
    serve: StartRuntime, base: str
) -> None:
    pod = serve(simple(base, STATEFUL))
    assert sorted(answers(pod, "count")) == list(range(1, CROWD + 1))
    assert answers(pod, "alarm", 1) == ["took too long"]
    assert answers(pod, "nap") == [1] * CROWD


@pytest.mark.parametrize("base, threads, least, most", [
    ("FastAPIServer", "2", 2, 2), ("FlaskServer", "2", 2, 2),
    ("HTTPMultiThreadedServer", None, 2, CROWD), ("HTTPMultiThreadedServer", "1", 1, 1),
])
def test_as_many_transforms_run_at_once_as_there_are_threads(
    serve: StartRuntime, base: str, threads: Optional[str], least: int, most: int
) -> None:
    pod = serve(simple(base, STATEFUL), NUM_THREADS=threads)
    if least > 1:
        assert answers(pod, "meet", 2) == ["met"] * 2
    assert least <= max(answers(pod, "nap")) <= most


@pytest.mark.parametrize("base", ["FastAPIServer", "HTTPMultiThreadedServer"])
def test_streams_of_one_worker_run_at_once(serve: StartRuntime, base: str) -> None:
    pod = serve(simple(base, STATEFUL, "Streaming"), NUM_THREADS="1")
    assert [response.body for response in at_once(2, lambda number: put(pod))] == [b"object"] * 2


def test_each_worker_has_an_instance_of_its_own(serve: StartRuntime) -> None:
    pod = serve(simple("FastAPIServer", STATEFUL), NUM_WORKERS="3", NUM_THREADS="1")
    seen: List[Tuple[int, int]] = []
    deadline = time.monotonic() + 10
    while len({worker for _, worker in seen}) < 3 and time.monotonic() < deadline:
        seen += [(made, worker) for made, worker in answers(pod, "pids", 12)]
    assert len({worker for _, worker in seen}) == 3
    assert all(made == worker != pod.pid for made, worker in seen)
