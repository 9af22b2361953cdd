"""Classes that the real SDK pickled load and serve in an interpreter that has cloudpickle alone.

One payload holds many small cases where they are alike: `etl_args` names the method that answers. What differs by the base
class, or by buffered and streaming, is tried with all of them.
"""
import concurrent.futures
import hashlib
import http.client
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Tuple
from urllib.parse import quote

import pytest

from ais_runtime_min import Exit
from harness import UNUSED_TARGET, Response, Runtime, Server, interpreter, make_payload, run_to_end
from standin import BASE_PATH, Behaviour, StandInTarget

StartRuntime = Callable[..., Runtime]
OBJECT = "/bck/dir/obj%20x"
UNAME = "/ais%2F@%23%2Fbck%2Fdir%2Fobj%20x"
TOKEN = "t0ken-of-the-cluster"
MODULE_OF = {
    "HTTPMultiThreadedServer": "http_multi_threaded_server", "FastAPIServer": "fastapi_server", "FlaskServer": "flask_server",
}
BASES = tuple(MODULE_OF)


class Kind(NamedTuple):
    """A base class, and whether the class on top of it streams."""

    base: str
    streams: bool

    def __str__(self) -> str:
        return "%s-%s" % (self.base, "streaming" if self.streams else "buffered")

    @property
    def is_raw(self) -> bool:
        """Whether the class gets the raw path of the request."""
        return self.base == "HTTPMultiThreadedServer"


KINDS = [Kind(base, streams) for base in BASES for streams in (False, True)]

# What follows a source that defines `Answers`, whose `run(name, data, path)` does the work; {base} and {module} are replaced.
TAIL = '''
from aistore.sdk.etl.webserver.{module} import {base}


class Buffered(Answers, {base}):
    def transform(self, data, path, etl_args):
        return self.run(etl_args, data, path)


class Streaming(Answers, {base}):
    def transform_stream(self, reader, path, etl_args):
        result = self.run(etl_args, reader.read(), path)
        for start in range(0, len(result), 3):
            yield result[start:start + 3]
'''


def payload_of(kind: Kind, source: str) -> str:
    """Pickle a source's `Answers` on top of a base."""
    tail = TAIL.replace("{module}", MODULE_OF[kind.base]).replace("{base}", kind.base)
    return make_payload(source + tail, "Streaming" if kind.streams else "Buffered")


def simple(base: str, methods: str, before: str = "") -> str:
    """Pickle a class `Simple` of a base with some methods."""
    head = "%s\nfrom aistore.sdk.etl.webserver.%s import %s\n\n\nclass Simple(%s):\n" % (before, MODULE_OF[base], base, base)
    return make_payload(head + methods, "Simple")


def put(server: Server, etl_args: str = "", body: bytes = b"object", path: str = OBJECT) -> Response:
    """Transform one object as hpush does."""
    return server.request("PUT", "%s?etl_args=%s" % (path, quote(etl_args, safe="")), body)


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

GALLERY = '''
import abc
import asyncio
import collections
import dataclasses
import enum
import functools
import json
import logging
import re
import typing
from typing import BinaryIO, Callable, ClassVar, Iterator, NamedTuple, Optional, Union

import aistore.sdk.const as names
from aistore.sdk.const import HEADER_NODE_URL, STATUS_OK
from aistore.sdk.errors import ETLDirectPutTransientError, InvalidPipelineError
from aistore.sdk.etl.webserver.base_etl_server import CountingIterator, ETLServer

LIMIT = 3
WORD = re.compile(r"(?P<first>[a-z])[a-z]*")
TABLE = {"object": ["a", "b"], "nested": {"key": (1, 2)}}
SEEN = []
COUNTS = collections.Counter()
module_logger = logging.getLogger(__name__)
add_seven = lambda number: number + 7


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"

    @property
    def shout(self) -> str:
        return self.value.upper()


class Flags(enum.IntFlag):
    ONE = 1
    TWO = 2


class Point(NamedTuple):
    x: int
    y: int = 5

    def total(self) -> int:
        return self.x + self.y


@dataclasses.dataclass(frozen=True, order=True)
class Box:
    width: int
    parts: list = dataclasses.field(default_factory=list, compare=False)
    unit: ClassVar[str] = "mm"

    def label(self) -> str:
        return "%d %s" % (self.width, self.unit)


class Custom(ValueError):
    """An exception of the user's own."""

    def __init__(self, code: int) -> None:
        super().__init__("code %d" % code)
        self.code = code


def helper(data: bytes) -> bytes:
    return second_helper(data)[:LIMIT]


def second_helper(data: bytes) -> bytes:
    return data[::-1]


def factorial(number: int) -> int:
    return number * factorial(number - 1) if number else 1


def make_adder(amount: int) -> Callable[[int], int]:
    total = amount

    def add(number: int) -> int:
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
def decorated(text: str, *, mark: str = "!") -> str:
    return text + mark


async def later(value: str) -> str:
    await asyncio.sleep(0.001)
    return value


async def gathered() -> str:
    return "+".join(await asyncio.gather(later("a"), later("b")))


async def counted():
    for number in range(3):
        await asyncio.sleep(0)
        yield number


async def collected() -> str:
    return "".join([str(number) async for number in counted()])


def pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 2):
        yield data[start:start + 2]


class Positive:
    """A descriptor."""

    def __set_name__(self, owner, name):
        self.name = "_" + name

    def __get__(self, instance, owner):
        return getattr(instance, self.name, 1)

    def __set__(self, instance, value):
        setattr(instance, self.name, abs(value))


class Registered(abc.ABC):
    known = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.known.append(cls.__name__)

    @abc.abstractmethod
    def greet(self) -> str:
        """Say hello."""


class Base(Registered):
    LEVEL = 1

    def greet(self) -> str:
        return "base"


class Middle(Base):
    LEVEL = 2

    def greet(self) -> str:
        return super().greet() + "-middle"


class Shouts:
    def greet(self) -> str:
        return super().greet().upper()


class Answers(Shouts, Middle):
    size: ClassVar[int] = 10
    items = ["x"]
    distance = Positive()

    class Inner:
        class Deeper:
            value = "deep"

        def name(self) -> str:
            return type(self).__name__

    def __init__(self):
        super().__init__()
        self.state = {"made": True}
        self.distance = -4
        self.maybe: Optional[ETLServer] = None
        self.at_construction = [self.host, self.port]

    def run(self, name: str, data: bytes, path: str) -> bytes:
        if name == "path":
            return path.encode()
        result = getattr(self, "show_" + name)(data)
        return result if isinstance(result, bytes) else str(result).encode()

    def show_state(self, data):
        return self.state["made"]

    def show_arguments(self, data):
        return json.dumps(self.at_construction)

    def show_helper(self, data):
        return helper(data)

    def show_recursion(self, data):
        return factorial(5)

    def show_closure(self, data):
        add = make_adder(1)
        return "%d %d" % (add(2), add(3))

    def show_bound_closure(self, data):
        return adder(1) > 100

    def show_levels(self, data):
        return "%s %d" % (self.greet(), self.LEVEL)

    def show_registry(self, data):
        return sorted({"Base", "Middle", "Answers"} & set(Registered.known))

    def show_constant(self, data):
        return LIMIT

    def show_regex(self, data):
        return WORD.match(data.decode()).group("first")

    def show_table(self, data):
        return TABLE[data.decode()] + [TABLE["nested"]["key"][1]]

    def show_changed_global(self, data):
        SEEN.append(data)
        COUNTS[data] += 1
        return len(SEEN) == COUNTS[data] > 0

    def show_lambda(self, data):
        return add_seven(1) + (lambda number: number * 2)(3)

    def show_nested_class(self, data):
        return self.Inner().name() + " " + Answers.Inner.Deeper.value

    def show_local_class(self, data):
        class Local(Point):
            pass
        return Local(1).total()

    def show_dataclass(self, data):
        box = dataclasses.replace(Box(3), width=4)
        return "%s %s %s %s" % (box.label(), Box(1) < Box(2), box == Box(4, [1]), dataclasses.asdict(box))

    def show_enum(self, data):
        return "%s %s %s" % (Colour("red") is Colour.RED, Colour.BLUE.shout, Flags.ONE | Flags.TWO == 3)

    def show_named_tuple(self, data):
        return "%d %s" % (Point(2).total(), Point(1)._replace(y=2))

    def show_class_attribute(self, data):
        return "%d %s" % (self.size, self.items)

    @property
    def half(self) -> float:
        return self.size / 2

    def show_property(self, data):
        return self.half

    @staticmethod
    def static(number: int) -> int:
        return number + 1

    @classmethod
    def made_by(cls) -> bool:
        return cls.size == 10

    def show_static_method(self, data):
        return self.static(1)

    def show_class_method(self, data):
        return self.made_by()

    def show_descriptor(self, data):
        return self.distance

    def show_generator(self, data):
        return b"-".join(pieces(data))

    def show_async(self, data):
        return asyncio.run(gathered()) + asyncio.run(collected())

    def show_decorator(self, data):
        return decorated("a", mark="?") + decorated.__name__

    def show_custom_error(self, data):
        try:
            raise Custom(4)
        except Custom as error:
            return "%s %d" % (error, error.code)

    def annotated(
        self, reader: BinaryIO, server: Optional[ETLServer], counted: CountingIterator, error: InvalidPipelineError
    ) -> Union[Iterator[bytes], ETLDirectPutTransientError]:
        return iter(())

    def show_annotations(self, data):
        hints = typing.get_type_hints(self.annotated)
        return "%s %s" % (hints["counted"] is CountingIterator, isinstance(self, ETLServer))

    def show_sdk_constants(self, data):
        from aistore.sdk.const import QPARAM_ETL_ARGS
        return "%s %d %s %d" % (HEADER_NODE_URL, STATUS_OK, QPARAM_ETL_ARGS, names.STATUS_NO_CONTENT)

    def show_sdk_bool(self, data):
        from aistore.sdk.utils import parse_bool
        return [parse_bool(text) for text in ("Yes", "0", "", None, "ON")]

    def show_counting_iterator(self, data):
        counter = CountingIterator(pieces(data))
        return "%s %d" % (b"".join(counter).decode(), counter.bytes_sent)

    def show_local_import(self, data):
        import zlib
        from html import escape
        return escape("<%d>" % zlib.crc32(b""))

    def show_isinstance(self, data):
        from aistore.sdk.etl.webserver import base_etl_server, serialize_class
        return isinstance(self, base_etl_server.ETLServer) and callable(serialize_class)

    def show_logs(self, data):
        self.logger.info("told by %s", "self.logger")
        module_logger.info("told by the module's logger")
        logging.getLogger("of.my.own").info("told by another logger")
        print("told by print")
        return b"told"
'''

SHOWN = {  # by the name of the method, what it answers of the object b"object"
    "state": b"True", "helper": b"tce", "recursion": b"120", "closure": b"3 6",
    "bound_closure": b"True", "arguments": b'["0.0.0.0", 8000]', "levels": b"BASE-MIDDLE 2",
    "registry": b"['Answers', 'Base', 'Middle']", "constant": b"3", "regex": b"o",
    "table": b"['a', 'b', 2]", "changed_global": b"True", "lambda": b"14",
    "nested_class": b"Inner deep", "local_class": b"6", "enum": b"True BLUE True",
    "dataclass": b"4 mm True True {'width': 4, 'parts': []}", "named_tuple": b"7 Point(x=1, y=2)",
    "class_attribute": b"10 ['x']", "property": b"5.0",
    "static_method": b"2", "class_method": b"True", "descriptor": b"4", "generator": b"ob-je-ct",
    "async": b"a+b012", "decorator": b"a?a?decorated", "custom_error": b"code 4 4",
    "annotations": b"True True", "sdk_constants": b"Ais-Node-Url 200 etl_args 204",
    "sdk_bool": b"[True, False, False, False, True]", "counting_iterator": b"object 6",
    "local_import": b"&lt;0&gt;", "isinstance": b"True",
}


class Gallery(NamedTuple):
    """A runtime that serves the gallery, and its target."""

    kind: Kind
    runtime: Runtime
    target: StandInTarget


@pytest.fixture(scope="module", params=KINDS, ids=str)
def gallery(request: pytest.FixtureRequest) -> Iterator[Gallery]:
    """The gallery on top of one of the bases."""
    kind: Kind = request.param
    target = StandInTarget()
    environ = {"ETL_CLASS_PAYLOAD": payload_of(kind, GALLERY), "NUM_WORKERS": "1", "AIS_TARGET_URL": target.url}
    with Runtime(env=environ) as runtime:
        yield Gallery(kind, runtime, target)
    target.close()
    assert target.complaints == []


def statuses_and_bodies(server: Server, names: Iterable[str]) -> Dict[str, Tuple[int, bytes]]:
    """Return the answers to the names of methods."""
    responses = {name: put(server, name) for name in names}
    return {name: (response.status, response.body) for name, response in responses.items()}


def test_a_payload_may_be_made_of_all_that_python_has(gallery: Gallery) -> None:
    expected = {name: (200, text) for name, text in SHOWN.items()}
    assert statuses_and_bodies(gallery.runtime, SHOWN) == expected


def test_an_object_is_read_from_the_target_and_its_path_given_as_the_base_class_does(gallery: Gallery) -> None:
    gallery.target.objects[UNAME] = b"abc"
    assert gallery.runtime.request("GET", UNAME + "?etl_args=helper").body == b"cba"
    expected = UNAME if gallery.kind.is_raw else "ais/@#/bck/dir/obj x"
    assert gallery.runtime.request("GET", UNAME + "?etl_args=path").body == expected.encode()


def test_an_empty_object_is_transformed_too(gallery: Gallery) -> None:
    assert put(gallery.runtime, "generator", b"")[::2] == (200, b"")


def test_what_a_class_logs_and_prints_is_in_the_log(gallery: Gallery) -> None:
    assert put(gallery.runtime, "logs").body == b"told"
    name = "Streaming" if gallery.kind.streams else "Buffered"
    gallery.runtime.wait_for_line(r"^\d{4}-\d\d-\d\d \S+ - %s - INFO - told by self\.logger$" % name, 5)
    gallery.runtime.wait_for_line(r" - __main__ - INFO - told by the module's logger$", 5)
    gallery.runtime.wait_for_line(r" - of\.my\.own - INFO - told by another logger$", 5)
    gallery.runtime.wait_for_line("^told by print$", 5)
    assert gallery.runtime.log().count("told by self.logger") == 1, "a record is logged once"


# == How it is called ==


@pytest.mark.parametrize("base, method", [
    ("FastAPIServer", "transform(self, blob, where, how, /): return blob"),
    ("FlaskServer", "transform_stream(self, source, where, how, /): yield source.read()"),
])
def test_arguments_are_positional_so_that_parameters_may_have_any_names(
    start_runtime: StartRuntime, base: str, method: str
) -> None:
    runtime = start_runtime(simple(base, "    def %s\n" % method), {"NUM_WORKERS": "1"})
    assert put(runtime, "x")[::2] == (200, b"object")


def test_transform_wins_where_both_are_overridden(start_runtime: StartRuntime) -> None:
    runtime = start_runtime(simple("FlaskServer", """
    def transform(self, data, path, etl_args):
        return b"buffered %s" % str(self.use_streaming).encode()

    def transform_stream(self, reader, path, etl_args):
        yield b"streamed"

    def get_mime_type(self):
        return "text/x-own; charset=utf-8"
"""), {"NUM_WORKERS": "1"})
    response = put(runtime)
    assert (response.status, response.body) == (200, b"buffered False")
    assert response.headers["content-type"] == "text/x-own; charset=utf-8"


def test_the_constructor_takes_a_host_and_a_port_but_the_runtime_decides_where_it_listens(start_runtime: StartRuntime) -> None:
    runtime = start_runtime(simple("HTTPMultiThreadedServer", """
    def __init__(self):
        super().__init__(host="127.0.0.9", port=9)

    def transform(self, data, path, etl_args):
        return "%s %d" % (self.host, self.port)
"""), {"NUM_WORKERS": "1"})
    assert put(runtime).body == b"127.0.0.9 9"


# == Attributes and methods ==

INSPECTOR = r"""
import io
import json


class Answers:
    def run(self, name, data, path):
        return json.dumps(getattr(self, "tell_" + name)(data)).encode()

    def tell_attributes(self, data):
        names = ("host_target", "direct_put", "direct_fqn", "direct_put_retries", "token", "use_streaming")
        return {name: getattr(self, name) for name in names}

    def tell_logger(self, data):
        import logging
        return [self.logger.name, self.logger.level, logging.getLogger().level]

    def tell_session(self, data):
        try:
            return type(self.session).__module__
        except Exception as error:
            return [type(error).__name__, str(error)]

    def tell_own_session(self, data):
        self.session = "my own"
        return self.session

    def tell_sanitized(self, data):
        return [self.sanitize_fqn(text) for text in ("%2Fmnt%2Fa%20b", "mnt/a", "/mnt/../../etc/x", "//a//b/", "a%2Bb+c", "")]

    def tell_closed(self, data):
        class Failing:
            def __init__(self, error):
                self.error = error

            def close(self):
                raise self.error

        reader = io.BytesIO(b"x")
        results = [self.close_reader(reader), reader.closed, type(self).close_reader(None), self.close_reader(object())]
        for error in (OSError("x"), ValueError("x"), RuntimeError("x"), AttributeError("x")):
            try:
                results.append(self.close_reader(Failing(error)))
            except Exception as failure:
                results.append(repr(failure))
        return results

    def tell_iterated(self, data):
        whole, left = io.BytesIO(b"x"), io.BytesIO(b"x")
        pieces = list(type(self).iter_and_close(iter([b"a", b"b"]), whole))
        iterator = self.iter_and_close(iter([b"a", b"b"]), left)
        next(iterator)
        before = left.closed
        iterator.close()
        return [len(pieces), whole.closed, before, left.closed]

    def tell_length_headers(self, data):
        return [type(self).make_direct_put_headers(0), self.make_direct_put_headers(5)]

    def tell_put(self, data):
        response = self.client_put(self.host_target + "/some%2Fobj?uuid=1&x=%20", data, headers={"X-Own": "yes"})
        status, body, length = self.handle_direct_put_response(response, data)
        _, _, other_length = self.handle_direct_put_response(response, data, data_length=77)
        return [int(status), body.decode(), length, other_length, response.status_code, response.content.decode(),
                response.headers.get("X-Answer")]

    def tell_put_with_timeout(self, data):
        return self.client_put(self.host_target + "/obj", data, {}, timeout=5).status_code

    def tell_refused_put(self, data):
        return self.client_put("http://127.0.0.1:9/x", data, {}).status_code
"""


@pytest.fixture(scope="module", params=[Kind("HTTPMultiThreadedServer", False), Kind("FastAPIServer", True)], ids=str)
def inspector(request: pytest.FixtureRequest) -> Iterator[Gallery]:
    """A class that tells what it sees of itself, with all settings away from their defaults."""
    kind: Kind = request.param
    target = StandInTarget()
    environ = {
        "ETL_CLASS_PAYLOAD": payload_of(kind, INSPECTOR), "NUM_WORKERS": "1", "AIS_TARGET_URL": target.url,
        "direct_put": "true", "ETL_DIRECT_FQN": "TRUE", "AIS_DIRECT_PUT_RETRIES": "7", "AIS_AUTHN_TOKEN": TOKEN,
    }
    with Runtime(env=environ) as runtime:
        yield Gallery(kind, runtime, target)
    target.close()
    assert target.complaints == []


def told(server: Server, name: str) -> Any:
    """Return what an inspector tells."""
    response = put(server, name)
    assert response.status == 200, response
    return json.loads(response.body)


def test_attributes_say_what_the_environment_asks_for(inspector: Gallery) -> None:
    assert told(inspector.runtime, "attributes") == {
        "host_target": inspector.target.url, "direct_put": True, "direct_fqn": True, "direct_put_retries": 7, "token": TOKEN,
        "use_streaming": inspector.kind.streams,
    }


@pytest.fixture(scope="module")
def modest() -> Iterator[Runtime]:
    """The same class with no settings but the target, which refuses connections."""
    payload = payload_of(Kind("FlaskServer", False), INSPECTOR)
    with Runtime(env={"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "1"}, expect_traceback=True) as runtime:
        yield runtime


def test_attributes_have_the_defaults_of_the_sdk(modest: Runtime) -> None:
    assert told(modest, "attributes") == {
        "host_target": UNUSED_TARGET, "direct_put": False, "direct_fqn": False,
        "direct_put_retries": 3, "token": None, "use_streaming": False,
    }


def test_the_logger_has_the_name_of_the_class_and_the_level_info(inspector: Gallery) -> None:
    name = "Streaming" if inspector.kind.streams else "Buffered"
    assert told(inspector.runtime, "logger") == [name, 20, 20]


def test_a_session_without_requests_is_an_import_error_that_names_the_remedy(inspector: Gallery) -> None:
    kind, text = told(inspector.runtime, "session")
    assert kind in ("ImportError", "ModuleNotFoundError")
    assert "requests" in text and "PACKAGES" in text


def test_a_class_may_set_a_session_of_its_own(modest: Runtime) -> None:
    assert told(modest, "own_session") == "my own"


def test_an_override_of_build_session_makes_the_session(start_runtime: StartRuntime) -> None:
    runtime = start_runtime(simple("HTTPMultiThreadedServer", """
    def _build_session(self):
        return ["built", self.token]

    def transform(self, data, path, etl_args):
        assert self.session is self.session
        return repr(self.session)
"""), {"NUM_WORKERS": "1", "AIS_AUTHN_TOKEN": "abc"})
    assert put(runtime).body == b"['built', 'abc']"


def test_small_methods_do_what_those_of_the_sdk_do(inspector: Gallery) -> None:
    expected = {
        "sanitized": ["/mnt/a b", "/mnt/a", "/etc/x", "/a/b", "/a+b+c", "/"],
        "closed": [None, True, None, None, None, None, None, None],
        "iterated": [2, True, False, True],
        "length_headers": [{}, {"Ais-Direct-Put-Length": "5"}],
    }
    assert {name: told(inspector.runtime, name) for name in expected} == expected


# The target's behaviour: what handle_direct_put_response makes of it, (status, body, length) and the length for another length.
PUT_ANSWERS: List[Tuple[str, Behaviour, Tuple[int, str, int], int]] = [
    ("an empty 200", Behaviour(status=200), (204, "", 6), 77),
    ("an empty chunked 200", Behaviour(status=200, framing="chunked"), (204, "", 6), 77),
    ("a 200 with content", Behaviour(status=200, body=b"from a stage"), (200, "from a stage", 0), 0),
    ("a 204", Behaviour(status=204), (204, "", 0), 0),
    ("a 204 with a length", Behaviour(status=204, headers=(("Ais-Direct-Put-Length", "12"),)), (204, "", 12), 12),
    ("a 204 with a length in lower case", Behaviour(status=204, headers=(("ais-direct-put-length", "3"),)), (204, "", 3), 3),
    ("a 400", Behaviour(status=400, body=b"bad secret"), (400, "bad secret", 0), 0),
    ("a 507", Behaviour(status=507, body=b"no space"), (507, "no space", 0), 0),
]


def test_client_put_and_its_answer(inspector: Gallery) -> None:
    for case, behaviour, expected, other_length in PUT_ANSWERS:
        inspector.target.requests.clear()
        inspector.target.script.append(behaviour)
        answer = told(inspector.runtime, "put")
        assert (case, *answer[:4]) == (case, *expected, other_length)
        body = behaviour.body.decode() if isinstance(behaviour.body, bytes) else ""
        assert (case, *answer[4:6]) == (case, behaviour.status, body)
        sent, = inspector.target.requests
        assert (sent.method, sent.target) == ("PUT", BASE_PATH + "/some%2Fobj?uuid=1&x=%20")
        assert (case, sent.body, sent.headers["x-own"]) == (case, b"object", "yes")
        assert sent.headers["authorization"] == "Bearer " + TOKEN
    assert told(inspector.runtime, "put_with_timeout") == 200


def test_a_put_of_the_class_s_own_to_a_node_that_refuses_is_an_error_of_the_transform(
    modest: Runtime,
) -> None:
    response = put(modest, "refused_put")
    assert response.status == 500
    assert "refused" in detail(response)


def test_data_is_the_local_path_where_the_class_wants_it(start_runtime: StartRuntime, tmp_path: Path) -> None:
    (tmp_path / "an object").write_bytes(b"content")
    runtime = start_runtime(simple("HTTPMultiThreadedServer", """
    def transform(self, data, path, etl_args):
        return "%s %s" % (type(data).__name__, data if isinstance(data, str) else data.decode())
"""), {"NUM_WORKERS": "1", "ETL_DIRECT_FQN": "true", "ETL_FQN_ROOTS": str(tmp_path)})
    fqn = str(tmp_path / "an object").replace(" ", "%2520")
    assert runtime.request("PUT", "/bck/obj?etl_fqn=" + fqn, b"").body == b"str %s/an object" % str(tmp_path).encode()
    assert runtime.request("PUT", "/bck/obj", b"inline").body == b"bytes inline"


# == Results ==

RESULTS_SOURCE = """
import array


async def later():
    return b"x"


NAMES = {"array": array.array, "later": later}
"""
GOOD_RESULTS = {  # expressions, and what the client gets
    "b'ab'": b"ab", "b''": b"", "bytearray(b'ab')": b"ab", "memoryview(b'xaby')[1:3]": b"ab",
    "memoryview(b'a-b-')[::2]": b"ab", "array('H', [0x4141, 0x4242])": b"AABB",
    "'a\\u00e9\\u20ac'": b"a\xc3\xa9\xe2\x82\xac", "''": b"",
}
BAD_RESULTS = {  # and the type that the error names
    "None": "NoneType", "7": "int", "True": "bool", "1.5": "float", "[b'a']": "list",
    "(b'a',)": "tuple", "{'a': 1}": "dict", "int": "type", "later()": "coroutine",
}
PIECES = {
    "[b'', '', b'a', bytearray(), memoryview(b'b'), '\\u00e9', array('B', [65])]": b"ab\xc3\xa9A",
    "[]": b"", "[b'', b'']": b"",
}


@pytest.fixture(scope="module", params=BASES)
def results(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A class whose `transform` returns the value of its argument."""
    method = "    def transform(self, data, path, code):\n        return eval(code, NAMES)\n"
    payload = simple(str(request.param), method, RESULTS_SOURCE)
    with Runtime(env={"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "1"}, expect_traceback=True) as runtime:
        yield runtime


@pytest.fixture(scope="module", params=BASES)
def stream_results(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A class whose `transform_stream` returns the value of its argument."""
    method = "    def transform_stream(self, _, path, code):\n        return eval(code, NAMES)\n"
    payload = simple(str(request.param), method, RESULTS_SOURCE)
    with Runtime(env={"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "1"}, expect_traceback=True) as runtime:
        yield runtime


def test_a_result_may_be_text_or_any_bytes(results: Runtime) -> None:
    expected = {name: (200, body) for name, body in GOOD_RESULTS.items()}
    assert statuses_and_bodies(results, GOOD_RESULTS) == expected


def test_any_other_result_is_an_error_that_names_its_type(results: Runtime) -> None:
    for name, type_name in BAD_RESULTS.items():
        response = put(results, name)
        assert (name, response.status) == (name, 500)
        assert type_name in detail(response)


def test_empty_pieces_of_a_stream_are_skipped(stream_results: Runtime) -> None:
    expected = {form % pieces: (200, body) for form in ("%s", "(piece for piece in %s)")
                for pieces, body in PIECES.items()}
    assert statuses_and_bodies(stream_results, expected) == expected


def test_a_bad_first_piece_is_an_error_that_names_its_type(stream_results: Runtime) -> None:
    response = put(stream_results, "[None]")
    assert response.status == 500
    assert "NoneType" in detail(response)


def test_a_bad_later_piece_cuts_the_answer(stream_results: Runtime) -> None:
    with pytest.raises((http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionResetError)):
        put(stream_results, "[b'good', 7]")
    stream_results.wait_for_line("int", 5)


# == Exceptions of the class ==

FAULTS = r"""
import http.client
import os
import socket

from aistore.sdk.errors import ETLDirectPutTransientError, InvalidPipelineError
from aistore.sdk.etl.webserver.utils import parse_etl_pipeline


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


NAMES = {
    "http": http, "socket": socket, "Transient": ETLDirectPutTransientError,
    "PipelineError": InvalidPipelineError, "OwnPipelineError": OwnPipelineError,
    "HTTPException": HTTPException, "HasStatus": HasStatus, "Mute": Mute, "endless": endless,
    "parse_etl_pipeline": parse_etl_pipeline,
}


class Answers:
    def run(self, code, data, path):
        exec(code, NAMES)
        return str(os.getpid()).encode()
"""

FAULT_ANSWERS = [  # the code, the status, and what the detail holds
    (r"""raise ValueError('say "x" \\ \u00e9\nline')""", 500, 'say "x" \\ \u00e9\nline'),
    ("raise ValueError", 500, "ValueError"),
    ("raise ValueError('outer') from KeyError('inner')", 500, "outer"),
    ("open('/no/such/file')", 500, "/no/such/file"),
    ("raise FileNotFoundError(2, 'No such file or directory', '/x')", 500, "No such file"),
    ("raise PermissionError('denied')", 500, "denied"), ("raise TimeoutError('slow')", 500, "slow"),
    ("raise socket.timeout('slow')", 500, "slow"),
    ("raise ConnectionResetError(104, 'reset')", 500, "reset"),
    ("raise BrokenPipeError(32, 'a pipe')", 500, "a pipe"),
    ("raise http.client.IncompleteRead(b'x', 5)", 500, ""),
    ("raise EOFError('ran out')", 500, "ran out"), ("raise StopIteration('x')", 500, ""),
    ("raise MemoryError('much')", 500, "much"), ("raise KeyError('k')", 500, "k"),
    ("raise SystemExit(3)", 500, "3"), ("raise SystemExit", 500, "SystemExit"),
    ("raise KeyboardInterrupt('x')", 500, ""),
    ("raise GeneratorExit('x')", 500, ""), ("endless()", 500, "recursion"),
    ("raise NotImplementedError('later')", 500, "later"),
    ("raise PipelineError('bad pipeline')", 400, "bad pipeline"),
    ("raise OwnPipelineError('bad own pipeline')", 400, "bad own pipeline"),
    ("parse_etl_pipeline('http://a,,http://b')", 400, ""),
    ("raise Transient('http://t2/obj', OSError('lost'))", 502, "lost"),
    ("raise Transient('http://t2', OSError('lost'), bail_without_local_retry=True)", 503, "lost"),
    ("raise Transient('http://t2/obj', OSError('lost'), True)", 503, "lost"),
    ("raise HTTPException('a namesake')", 500, ""),
    ("raise HasStatus('own status')", 500, "own status"),
    ("raise Mute", 500, ""), ("import requests", 500, "add requests to PACKAGES"),
    ("from aistore.sdk.client import Client", 500, "add aistore to PACKAGES"),
    ("from aistore.sdk import Client", 500, "add aistore to PACKAGES"),
]
FAULT_KINDS = [Kind("HTTPMultiThreadedServer", False), Kind("FastAPIServer", False), Kind("FlaskServer", True)]


@pytest.fixture(scope="module", params=FAULT_KINDS, ids=str)
def faults(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A class that fails as its argument says."""
    payload = payload_of(request.param, FAULTS)
    with Runtime(env={"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "1"}, expect_traceback=True) as runtime:
        yield runtime


def test_the_text_of_an_exception_is_the_detail_of_the_answer(faults: Runtime) -> None:
    response = put(faults, "raise ValueError('validation failed')")
    assert response.status == 500
    assert json.loads(response.body) == {"detail": "Processing error: validation failed"}
    assert response.headers["content-type"] == "application/json"
    faults.wait_for_line("ERROR.*%s.*validation failed" % OBJECT, 5)


def test_an_exception_of_the_class_is_answered_and_the_worker_lives_on(faults: Runtime) -> None:
    worker = put(faults).body
    wrong = []
    for code, status, words in FAULT_ANSWERS:
        response = put(faults, code)
        text, reason = detail(response), response.headers.get("ais-etl-retry-reason")
        expected = (status, "direct-put-transient" if status == 503 else None)
        is_told = text.startswith("Processing error: ") and words in text
        if (response.status, reason) != expected or not is_told:
            wrong.append((code, response))
        assert (code, put(faults).body) == (code, worker)
    assert wrong == []


def test_the_traceback_of_an_exception_is_logged_without_the_frames_of_the_runtime(
    faults: Runtime,
) -> None:
    assert put(faults, "open('/no/such/file')").status == 500
    faults.wait_for_line("^FileNotFoundError: ", 5)
    assert "user_script.py" in faults.log()
    assert "ais_runtime_min.py" not in faults.log()


FRAMEWORK_FAULTS = """
class Answers:
    def run(self, code, data, path):
        import fastapi, starlette.exceptions, werkzeug.exceptions, flask

        class Own(fastapi.HTTPException):
            pass

        exec(code)
"""


@pytest.fixture(
    scope="module", params=[Kind("FlaskServer", False), Kind("FastAPIServer", True)], ids=str)
def framework_faults(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A class that raises exceptions of the frameworks, where these are installed."""
    environ = {"ETL_CLASS_PAYLOAD": payload_of(request.param, FRAMEWORK_FAULTS), "NUM_WORKERS": "1"}
    with Runtime(env=environ, python=interpreter("sdk"), expect_traceback=True) as runtime:
        yield runtime


def test_http_exceptions_of_the_frameworks_give_their_status(framework_faults: Runtime) -> None:
    for code, status, words in [
        ("raise fastapi.HTTPException(418, 'fastapi text')", 418, "fastapi text"),
        ("raise fastapi.HTTPException(status_code=404, detail='gone')", 404, "gone"),
        ("raise fastapi.HTTPException(422, {'reason': 'dict text'})", 422, "dict text"),
        ("raise fastapi.HTTPException(429)", 429, ""),
        ("raise Own(451, 'own text')", 451, "own text"),
        ("raise starlette.exceptions.HTTPException(503, 'starlette text')", 503, "starlette text"),
        ("flask.abort(409, 'abort text')", 409, "abort text"),
        ("raise werkzeug.exceptions.NotFound('werkzeug text')", 404, "werkzeug text"),
        ("raise werkzeug.exceptions.HTTPException('bare text')", 500, "bare text"),
    ]:
        response = put(framework_faults, code)
        assert (code, response.status) == (code, status)
        assert words in detail(response)
        assert "ais-etl-retry-reason" not in response.headers


# == Secrets ==

TELLTALE = r"""
import os


class Answers:
    def run(self, name, data, path):
        import urllib.parse
        text = {
            "token": self.token, "url": self.host_target, "path": urllib.parse.urlsplit(self.host_target).path,
            "header": "Authorization: Bearer " + self.token, "object": self.host_target + "/ais%2F@%23%2Fbck",
            "environment": str(dict(os.environ)), "error": repr(OSError(self.token)),
        }[name]
        self.logger.warning("logged %s: %s", name, text)
        try:
            raise RuntimeError("inner " + text)
        except RuntimeError as error:
            raise ValueError("cannot use %s, " % name + text) from error
"""


@pytest.fixture(scope="module", params=[Kind("HTTPMultiThreadedServer", False), Kind("FastAPIServer", True)], ids=str)
def telltale(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A class whose errors quote what is secret."""
    payload = payload_of(request.param, TELLTALE)
    with Runtime(env={"ETL_CLASS_PAYLOAD": payload, "AIS_AUTHN_TOKEN": TOKEN}, expect_traceback=True) as runtime:
        yield runtime


def test_secrets_that_an_exception_quotes_are_told_to_nobody(telltale: Runtime) -> None:
    for name in ("token", "url", "path", "header", "object", "environment", "error"):
        response = put(telltale, name)
        assert response.status == 500
        assert "cannot use %s" % name in detail(response)
        telltale.wait_for_line("^ValueError: cannot use " + name, 5)
        telltale.wait_for_line("^RuntimeError: inner ", 5)
        telltale.wait_for_line("logged " + name, 5)
        for secret in (TOKEN, "s3cr3t", BASE_PATH):
            assert secret not in str(response)
            assert secret not in telltale.log(), name


# == How the payload comes ==

BULKY = """
import hashlib

BLOB = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(12_000))
"""
BULKY_METHODS = """
    def transform(self, data, path, etl_args):
        return hashlib.sha256(BLOB).hexdigest()
"""
BLOB = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(12_000))


@pytest.mark.parametrize("line_break, way", [
    ("\r\n", "pieces"), (" ", "pieces"), ("\n", "file"), (" \n\t ", "file")])
def test_a_large_payload_comes_in_pieces_or_a_file_and_white_space_in_it_does_not_count(
    start_runtime: StartRuntime, tmp_path: Path, line_break: str, way: str
) -> None:
    payload = simple("HTTPMultiThreadedServer", BULKY_METHODS, BULKY)
    assert len(payload) > 500_000
    lines = [payload[start:start + 76] for start in range(0, len(payload), 76)]
    text = line_break.join(["", *lines, ""])
    if way == "file":
        (tmp_path / "payload").write_bytes(text.encode())
        environ = {"ETL_CLASS_PAYLOAD_FILE": str(tmp_path / "payload")}
    else:  # Linux caps one string of an environment at 128 KiB
        pieces = [text[start:start + 40_001] for start in range(0, len(text), 40_001)]
        environ = {"ETL_CLASS_PAYLOAD_%d" % number: piece for number, piece in enumerate(pieces, 1)}
        environ["ETL_CLASS_PAYLOAD"] = environ.pop("ETL_CLASS_PAYLOAD_1")
    response = put(start_runtime(env={**environ, "NUM_WORKERS": "1"}))
    assert response.body.decode() == hashlib.sha256(BLOB).hexdigest()


def test_what_serialize_class_of_the_runtime_makes_is_served_too(start_runtime: StartRuntime) -> None:
    import subprocess

    source = """
from aistore.sdk.etl.webserver import serialize_class
from aistore.sdk.etl.webserver.flask_server import FlaskServer

class Own(FlaskServer):
    def transform(self, data, path, etl_args):
        return data[::-1]

print(serialize_class(Own))
"""
    command = [interpreter("slim"), "-c", "import ais_runtime_min; ais_runtime_min.install_sdk_names()\n" + source]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=str(Path(__file__).parent.parent), check=True, timeout=60)
    assert put(start_runtime(done.stdout.decode().strip(), {"NUM_WORKERS": "1"})).body == b"tcejbo"


# == What the payload refers to is missing ==


@pytest.mark.parametrize("imports, use, package", [
    ("import requests", "requests.get", "requests"),
    ("from aistore.sdk import Client", "Client", "aistore"),
    ("from aistore.sdk.utils import get_digest", "get_digest", "aistore"),
])
def test_a_payload_that_needs_what_is_not_here_says_what_to_add(
    imports: str, use: str, package: str
) -> None:
    methods = "    def transform(self, data, path, etl_args):\n        return %s\n" % use
    finished = run_to_end(env={"ETL_CLASS_PAYLOAD": simple("HTTPMultiThreadedServer", methods, imports)})
    assert finished.code == Exit.UNAVAILABLE
    assert "add %s to PACKAGES" % package in finished.last_line


# == With the SDK's client installed ==

CLIENT = r"""
import json

from aistore.sdk import Client
from aistore.sdk.errors import AISError, InvalidPipelineError


class Answers:
    def __init__(self):
        super().__init__()
        scheme, _, host = self.host_target.partition("://")
        self.client = Client(scheme + "://" + host.partition("/")[0])

    def run(self, name, data, path):
        return json.dumps(getattr(self, "tell_" + name)(data)).encode()

    def tell_get(self, data):
        return self.client.bucket("bck").object("side").get_reader().read_all().decode()

    def tell_missing(self, data):
        try:
            self.client.bucket("bck").object("missing").get_reader().read_all()
        except AISError as error:
            return [type(error).__module__, error.status_code]

    def tell_origins(self, data):
        import sys
        import aistore.sdk.client
        import aistore.sdk.etl.webserver.fastapi_server as ours
        names = [name for name in ("fastapi", "flask", "httpx", "uvicorn") if name in sys.modules]
        return [names, ours.FastAPIServer.__module__, Client.__module__, type(self).__mro__[2].__name__]

    def tell_session(self, data):
        response = self.session.put(self.host_target + "/obj", data=data)
        return [type(self.session).__module__, response.status_code]

    def tell_pipeline(self, data):
        raise InvalidPipelineError("bad pipeline")
"""


@pytest.fixture(scope="module")
def client() -> Iterator[Gallery]:
    """A class that uses the SDK's `Client`, where `aistore` is installed without its extras."""
    kind, target = Kind("FastAPIServer", False), StandInTarget()
    environ = {
        "ETL_CLASS_PAYLOAD": payload_of(kind, CLIENT), "NUM_WORKERS": "1",
        "AIS_TARGET_URL": target.url, "AIS_AUTHN_TOKEN": TOKEN,
    }
    with Runtime(env=environ, python=interpreter("sdkcore"), expect_traceback=True) as runtime:
        yield Gallery(kind, runtime, target)
    target.close()
    assert target.complaints == []


def test_a_class_makes_requests_through_the_client_of_the_sdk(client: Gallery) -> None:
    client.target.requests.clear()
    client.target.script.append(Behaviour(status=200, body=b"the side object"))
    assert told(client.runtime, "get") == "the side object"
    assert client.target.requests[0].path == "/v1/objects/bck/side"


def test_errors_of_the_client_are_those_of_the_sdk(client: Gallery) -> None:
    body = b'{"status": 404, "message": "no such object"}'
    client.target.script.append(Behaviour(status=404, body=body, headers=(("Content-Type", "application/json"),)))
    assert told(client.runtime, "missing") == ["aistore.sdk.errors", 404]


def test_the_web_server_modules_come_from_the_runtime_also_beside_the_sdk(client: Gallery) -> None:
    frameworks, base_module, client_module, base = told(client.runtime, "origins")
    assert frameworks == []
    assert not base_module.startswith("aistore.")
    assert client_module == "aistore.sdk.client"
    assert base == client.kind.base


def test_a_session_is_that_of_requests_and_carries_the_token(client: Gallery) -> None:
    client.target.requests.clear()
    assert told(client.runtime, "session") == ["requests.sessions", 200]
    assert client.target.requests[0].headers["authorization"] == "Bearer " + TOKEN


def test_pipeline_errors_of_the_real_sdk_are_a_400(client: Gallery) -> None:
    response = put(client.runtime, "pipeline")
    assert (response.status, detail(response)) == (400, "Processing error: bad pipeline")


def test_what_works_without_the_sdk_works_beside_it() -> None:
    payload = payload_of(Kind("FlaskServer", True), GALLERY)
    environ = {"ETL_CLASS_PAYLOAD": payload, "NUM_WORKERS": "1"}
    expected = {name: (200, text) for name, text in SHOWN.items()}
    del expected["sdk_bool"]  # SDK 1.24 has no parse_bool
    with Runtime(env=environ, python=interpreter("sdkcore")) as runtime:
        assert statuses_and_bodies(runtime, expected) == expected


# == Threads and workers ==

CROWD = 8  # clients at once

PEAKS = r"""
import json
import os
import signal
import sqlite3
import threading
import time


class Peak:
    "How many are inside at once."

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = self.most = 0

    def __enter__(self):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
"""

STATEFUL = """
    def __init__(self):
        super().__init__()
        self.peak = Peak()
        self.maker = threading.get_ident()
        self.made_on_main = threading.current_thread() is threading.main_thread()
        self.meeting = threading.Barrier(2)
        self.pid = os.getpid()
        self.database = sqlite3.connect(":memory:")
        self.database.execute("create table seen (name text)")

    def count(self, path):
        self.database.execute("insert into seen values (?)", (path,))
        return self.database.execute("select count(*) from seen").fetchone()[0]

    def nap(self, path):
        with self.peak:
            time.sleep(0.02)
        return self.peak.most

    def threads(self, path):
        main = threading.current_thread() is threading.main_thread()
        return [main, self.made_on_main, threading.get_ident() == self.maker]

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
"""


def answers(server: Server, name: str, count: int = CROWD) -> List[Any]:
    """Ask so many clients' questions at once."""
    responses = at_once(count, lambda number: put(server, name, path="/bck/%d" % number))
    assert [response.status for response in responses] == [200] * count, responses
    return [json.loads(response.body) for response in responses]


@pytest.fixture(scope="module", params=["FastAPIServer", "FlaskServer"])
def single(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """A framework's class with state that belongs to one thread."""
    environ = {"ETL_CLASS_PAYLOAD": simple(request.param, STATEFUL, PEAKS), "NUM_WORKERS": "1"}
    with Runtime(env=environ) as runtime:
        yield runtime


def test_a_database_made_in_the_constructor_works_under_many_clients(single: Runtime) -> None:
    assert sorted(answers(single, "count")) == list(range(1, CROWD + 1))


def test_transforms_of_framework_classes_run_one_at_a_time(single: Runtime) -> None:
    assert answers(single, "nap") == [1] * CROWD


def test_transforms_of_framework_classes_run_on_the_main_thread_that_made_the_instance(single: Runtime) -> None:
    assert answers(single, "threads") == [[True, True, True]] * CROWD


def test_an_alarm_interrupts_the_transform_that_set_it(single: Runtime) -> None:
    assert answers(single, "alarm", 1) == ["took too long"]
    assert answers(single, "nap", 1) == [1]


@pytest.mark.parametrize("base", ["FastAPIServer", "FlaskServer"])
def test_framework_classes_run_on_pool_threads_where_the_user_sets_num_threads(start_runtime: StartRuntime, base: str) -> None:
    runtime = start_runtime(simple(base, STATEFUL, PEAKS), {"NUM_WORKERS": "1", "NUM_THREADS": "2"})
    assert answers(runtime, "meet", 2) == ["met"] * 2
    assert max(answers(runtime, "nap")) == 2


def test_transforms_of_the_threaded_server_run_at_once(start_runtime: StartRuntime) -> None:
    runtime = start_runtime(simple("HTTPMultiThreadedServer", STATEFUL, PEAKS), {"NUM_WORKERS": "1"})
    assert answers(runtime, "meet", 2) == ["met"] * 2
    assert max(answers(runtime, "nap")) > 1


def test_num_threads_caps_the_transforms_that_run_at_once(start_runtime: StartRuntime) -> None:
    payload = simple("HTTPMultiThreadedServer", STATEFUL, PEAKS)
    runtime = start_runtime(payload, {"NUM_WORKERS": "1", "NUM_THREADS": "1"})
    assert answers(runtime, "nap") == [1] * CROWD


@pytest.mark.parametrize("base", ["FastAPIServer", "HTTPMultiThreadedServer"])
def test_streams_of_one_worker_run_at_once(start_runtime: StartRuntime, base: str) -> None:
    runtime = start_runtime(simple(base, """
    def __init__(self):
        super().__init__()
        self.meeting = threading.Barrier(2)

    def transform_stream(self, reader, path, etl_args):
        self.meeting.wait(10)
        yield reader.read()
""", PEAKS), {"NUM_WORKERS": "1", "NUM_THREADS": "1"})
    assert [response.body for response in at_once(2, lambda number: put(runtime))] == [b"object"] * 2


def test_each_worker_has_an_instance_of_its_own(start_runtime: StartRuntime) -> None:
    payload = simple("FastAPIServer", STATEFUL, PEAKS)
    runtime = start_runtime(payload, {"NUM_WORKERS": "3", "NUM_THREADS": "1"})
    seen: List[Tuple[int, int]] = []
    deadline = time.monotonic() + 10
    while len({worker for _, worker in seen}) < 3 and time.monotonic() < deadline:
        seen += [(made, worker) for made, worker in answers(runtime, "pids", 12)]
    assert len({worker for _, worker in seen}) == 3
    assert all(made == worker != runtime.pid for made, worker in seen)
