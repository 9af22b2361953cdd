"""Stage 2, reading: an object by its path, from the target, from the request's body, or from the outside world.

Each class of these tests notes its calls in a file, so that a test can tell that it was never called.
"""
import contextlib
import http.client
import io
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union
from urllib.parse import quote, unquote

import pytest

from harness import ROOT, Environ, Response, Runtime, make_payload
from peer import Peer, object_frames
from standin import BASE_PATH, At, Behaviour, Certificates, Recorded, StandInTarget

SOURCE = '''
import os

from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer


class Noting(HTTPMultiThreadedServer):
    """Notes every call, and puts what it got between < and >; of a path it got, tells it before."""

    def note(self, path):
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(path + "\\n")


class Buffered(Noting):
    def transform(self, data, path, etl_args):
        self.note(path)
        told = b""
        if isinstance(data, str):
            with open(data, "rb") as file:
                told, data = data.encode() + b"\\n", file.read()
        return told + b"<" + data + b">"


class Streaming(Noting):
    def transform_stream(self, reader, path, etl_args):
        self.note(path)
        yield b"<" + reader.read() + b">"


class Shortening(Noting):
    """Has the object's file, whose path is in etl_args, become shorter while it reads."""

    def transform_stream(self, reader, path, etl_args):
        first = reader.read(1)
        os.truncate(etl_args, 100_000)
        yield first + reader.read()


class Closing(Shortening):
    def transform_stream(self, reader, path, etl_args):
        with reader:
            yield from super().transform_stream(reader, path, etl_args)
'''
CLASSES = {"buffered": "Buffered", "streaming": "Streaming", "direct": "Buffered",
           "shortening": "Shortening", "closing": "Closing"}
TOKEN = "t0ken-of-the-cluster"
SECRETS = ("s3cr3t", TOKEN)
CHUNK = b"the first chunk"
WHOLE = b"the first chunk, and the second one"
UNAME = "/ais%2F@%23%2Fbck%2Fobj"
SIZES = [0, 1, 65535, 65536, 65537, 1 << 20]  # 64 KiB is what is read at once


class Pod:
    """A runtime with one worker, its target, and the file in which its class notes its calls."""

    def __init__(self, kind: str, target: StandInTarget, folder: Path, env: Optional[Environ] = None) -> None:
        self.kind = kind
        self.target = target
        self._calls = Path(tempfile.mkdtemp(dir=str(folder)), "calls")
        variables: Dict[str, Optional[str]] = {
            "ETL_CLASS_PAYLOAD": make_payload(SOURCE, CLASSES[kind]), "AIS_TARGET_URL": target.url, "NUM_WORKERS": "1",
            "ETL_DIRECT_FQN": str(kind == "direct"), "AIS_AUTHN_TOKEN": TOKEN, "CALLS": str(self._calls), **(env or {}),
        }
        self.runtime = Runtime(env=variables)

    def ask(self, method: str, target: str, body: Union[bytes, Sequence[bytes], None] = None,
            headers: Optional[Mapping[str, str]] = None, timeout: float = 30.0) -> Response:
        """Send a request; no answer may hold a secret, and every error is JSON."""
        response = self.runtime.request(method, target, body, headers, timeout)
        check_answer(response, "%s %s" % (method, target))
        return response

    def read(self, path: Union[str, Path], method: str = "PUT", **others: str) -> Response:
        """Ask for an object by its path."""
        return self.ask(method, "/bck/obj" + fqn_query(path, **others))

    def calls(self) -> List[str]:
        """Return the paths of the calls so far."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def forget(self) -> None:
        """Begin a test: no calls, and a target without objects and faults."""
        if self._calls.exists():
            self._calls.unlink()
        self.target.objects.clear()
        self.target.requests.clear()
        self.target.script.clear()
        self.target.default = Behaviour()
        self.target.idle_seconds = None


Pods = Callable[..., Pod]


def check_answer(response: Response, asked: str) -> None:
    """Fail if an answer tells a secret, or an error is not JSON with a `detail`."""
    text = str(response.headers) + response.body.decode("latin-1")
    assert not [secret for secret in SECRETS if secret in text], asked
    if response.status >= 400:
        assert response.headers["content-type"] == "application/json", asked
        assert json.loads(response.body)["detail"], asked


@pytest.fixture(scope="module")
def shared_target() -> Iterator[StandInTarget]:
    """One stand-in for all tests of this file; its records are wiped before each test."""
    target = StandInTarget()
    yield target
    target.close()
    assert target.complaints == []


@pytest.fixture(scope="module")
def pods(shared_target: StandInTarget, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """A function that starts a pod, or returns the one that it started before for the same arguments."""
    started: Dict[Tuple[str, str], Pod] = {}
    folder = tmp_path_factory.mktemp("pods")

    def pod(kind: str, **env: str) -> Pod:
        key = kind, json.dumps(env, sort_keys=True)
        if key not in started:
            started[key] = Pod(kind, shared_target, folder, env)
        started[key].forget()
        return started[key]

    yield pod
    for each in started.values():
        each.runtime.__exit__(None, None, None)
        assert not [secret for secret in SECRETS if secret in each.runtime.log()]


@pytest.fixture(params=["buffered", "streaming", "direct"])
def pod(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """Each kind of pod in turn: the class gets bytes, or a reader, or (ETL_DIRECT_FQN) a path."""
    return pods(request.param)


@pytest.fixture
def buffered(pods: Pods) -> Pod:
    """The pod whose class gets bytes."""
    return pods("buffered")


# == Objects by path ==


def fqn_query(path: Union[str, Path], **others: str) -> str:
    """Make a query as a target does: the path is escaped as a path, then as a parameter."""
    values = {"etl_fqn": quote(str(path), safe="$&+=:@"), **others}
    return "?" + "&".join("%s=%s" % (name, quote(value, safe="")) for name, value in sorted(values.items()))


def make_object(mountpath: Path, bucket: str = "@ais/bck", name: str = "dir/obj", content: bytes = b"content") -> Path:
    """Store an object as AIStore does."""
    path = mountpath / bucket / "%ob" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def wrapped(pod: Pod, path: Path, content: bytes) -> bytes:
    """Return what a pod's class makes of an object that lies at a path."""
    return (b"%s\n" % str(path).encode() if pod.kind == "direct" else b"") + b"<" + content + b">"


OBJECTS = [  # bucket and name
    ("@ais/bck", "dir/obj"), ("@ais/bck", "obj"), ("@ais/#ns/bck", "obj"), ("@ais/@uuid#ns/bck", "obj"), ("@aws/bck", "a/b/c"),
    ("@ais/bck", "a b+c%20d;v=1"), ("@ais/bck", "a?b#c&d=e"), ("@ais/bck", "ünï€"), ("@ais/bck", "line\nfeed"),
    ("@ht/b-1.2", "~"),
]


def test_an_object_is_read_by_its_path_and_nothing_is_asked_of_the_target(
    pod: Pod, tmp_path: Path
) -> None:
    for bucket, name in OBJECTS:
        path = make_object(tmp_path, bucket, name)
        expected = (200, wrapped(pod, path, b"content"))
        for method, body in (("PUT", b"not this"), ("GET", None)):
            response = pod.ask(method, "/bck/obj" + fqn_query(path), body)
            assert (response.status, response.body) == expected, (method, path)
    assert pod.target.requests == []


def test_an_object_of_any_size_is_read_by_its_path(pod: Pod, tmp_path: Path) -> None:
    for size in SIZES:
        content = os.urandom(size)
        path = make_object(tmp_path, content=content)
        is_same = pod.read(path).body == wrapped(pod, path, content)
        assert is_same, "%d bytes" % size


def test_an_object_whose_file_is_missing_is_404(pod: Pod, tmp_path: Path) -> None:
    folder = make_object(tmp_path).parent.parent
    (folder / "link").symlink_to(folder / "no object, but where one might be")
    for name in ("missing", "dir/missing", "dir/obj/below", "no/dir/here", "link"):
        for method in ("PUT", "GET"):
            assert pod.read(folder / name, method).status == 404, (method, name)
    assert pod.calls() == []


def build_forbidden(mountpath: Path, kind: str) -> str:
    """Make a path that must not be read; `private` lies outside of the layout."""
    private = mountpath / "private"
    private.write_bytes(b"private")
    folder = make_object(mountpath).parent
    path = folder / kind
    if kind == "link out":
        path.symlink_to(private)
    elif kind == "link to a folder":
        path.symlink_to(mountpath)
        return str(path / "private")
    elif kind == "dangling link out":
        path.symlink_to(mountpath / "nothing")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(str(path))
    elif kind == "socket":
        os.mknod(str(path), stat.S_IFSOCK | 0o600)
    elif kind == "dots":
        return str(folder) + "/../../../../private"
    elif kind == "zero byte":
        return str(folder / "obj") + "\0"
    return str(path)


KINDS = ["link out", "link to a folder", "dangling link out", "link to itself", "link to a device",
         "folder", "fifo", "socket", "zero byte", "dots"]
OUTSIDE = [
    "/etc/passwd", "/etc/nothing", "/proc/self/environ", "/proc/1/environ", "/proc/self/fd/0", "/dev/zero", "/dev/null", "/", ".",
    "etc/passwd", "../../../etc/passwd", "/@ais/bck/%ob", "/@ais/bck/%ob/", "/@ais/bck/%ob/../../../etc/passwd",
    "/@ais/%ob/x", "/ais/bck/%ob/x", "/@ais/bck/ob/x", "/@ais/bck/%wk/x", "/@ais/bck/%ob/\0",
]


def test_what_is_no_object_is_forbidden(pod: Pod, tmp_path: Path) -> None:
    escaped_once_too_often = quote(str(tmp_path)) + "/@ais/bck/%25ob/dir/obj"
    paths = [*OUTSIDE, escaped_once_too_often, *(build_forbidden(tmp_path, kind) for kind in KINDS)]
    for method in ("PUT", "GET"):
        statuses = {path: pod.read(path, method).status for path in paths}
        assert statuses == dict.fromkeys(paths, 403), method
    assert (pod.calls(), pod.target.requests) == ([], [])


def test_a_link_to_an_object_may_be_read_and_a_mountpath_may_be_a_link(
    pod: Pod, tmp_path: Path
) -> None:
    path = make_object(tmp_path / "real")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "mountpath").symlink_to(tmp_path / "real")
    for link in (tmp_path / "link", tmp_path / "mountpath/@ais/bck/%ob/dir/obj"):
        assert pod.read(link).body == wrapped(pod, link, b"content")


def test_a_refusal_does_not_tell_whether_there_is_a_file(buffered: Pod) -> None:
    answers = {buffered.read(path).body for path in ("/etc/passwd", "/etc/nothing", "/etc")}
    assert len(answers) == 1


UNDER_ROOTS = {
    "one/file": 200, "two/file": 200, "one/missing": 404, "two/../one/file": 200, "onefile": 403,
    "out/file": 403, "one": 403, "one/link out": 403, "out/link in": 200, "one/../out/file": 403,
    "out/@ais/bck/%ob/dir/obj": 403, "one/fifo": 403, "one/folder": 403, "/dev/zero": 403,
    "/dev/tty": 403,
}


def test_roots_that_are_set_take_the_place_of_the_layout(
    pods: Pods, tmp_path: Path
) -> None:
    for name in ("one/file", "two/file", "onefile", "out/file", "one/folder/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    (tmp_path / "one/link out").symlink_to(tmp_path / "out/file")
    (tmp_path / "out/link in").symlink_to(tmp_path / "one/file")
    os.mkfifo(str(tmp_path / "one/fifo"))
    make_object(tmp_path / "out")
    pod = pods("buffered", ETL_FQN_ROOTS="%s:%s/:/dev" % (tmp_path / "one", tmp_path / "two"))
    asked = {path: pod.read(tmp_path / path).status for path in UNDER_ROOTS}
    assert asked == UNDER_ROOTS
    assert len(pod.calls()) == list(UNDER_ROOTS.values()).count(200)


# == Objects in chunks ==

MARK = b"\xe3\x2f\xbd"
PREAMBLE = b"\x01\x01" + b"\x12\x34\x56\x78\x9a\xbc\xde\xf0"


def attribute(size: int, preamble: bytes = PREAMBLE, before: int = 1, after: int = 1) -> bytes:
    """Make AIStore's attribute: a preamble, and records of which the size is one."""
    other = struct.pack(">H", 1) + b"xxhash2", struct.pack(">H", 2) + b"1b3ff9e2d1b2c3a4"
    records = [*other[:before], struct.pack(">HQ", 3, size), *[struct.pack(">H", 5) + b"metadata"][:after]]
    return preamble + MARK.join(records)


@pytest.fixture(scope="module")
def attribute_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose files can have attributes."""
    with tempfile.TemporaryDirectory(dir=str(ROOT), prefix=".attributes-") as other:
        for folder in (tmp_path_factory.mktemp("mountpath"), Path(other)):
            try:
                os.setxattr(str(folder), "user.ais.lom", b"x")
            except (OSError, AttributeError):
                continue
            yield folder
            return
        pytest.skip("no file system here has attributes of users")


@pytest.fixture
def mountpath(attribute_folder: Path) -> Path:
    """A fresh mountpath whose files can have attributes."""
    return Path(tempfile.mkdtemp(dir=str(attribute_folder)))


def make_chunked(mountpath: Path, bucket: str = "@ais/bck", name: str = "dir/obj") -> Path:
    """Store the first chunk of an object whose attribute tells the size of the whole."""
    path = make_object(mountpath, bucket, name, CHUNK)
    os.setxattr(str(path), "user.ais.lom", attribute(len(WHOLE)))
    return path


def escaped_segment(uname: str) -> str:
    """Escape a uname as one segment of a path."""
    return "/" + quote(uname, safe="@")


CHUNKED_OBJECTS = [  # bucket, name, and the uname
    ("@ais/bck", "dir/obj", "ais/@#/bck/dir/obj"),
    ("@ais/#ns/bck", "dir/obj", "ais/@#ns/bck/dir/obj"),
    ("@ais/@uuid#ns/bck", "dir/obj", "ais/@uuid#ns/bck/dir/obj"),
    ("@ais/@uuid#/bck", "obj", "ais/@uuid#/bck/obj"),
    ("@aws/bck-1.2", "obj", "aws/@#/bck-1.2/obj"),
    ("@ais/bck", "a b+c%20d;v=1?e#f&g", "ais/@#/bck/a b+c%20d;v=1?e#f&g"),
    ("@ais/bck", "ünï€", "ais/@#/bck/ünï€"),
    ("@ais/bck", "x/@ais/other/%ob/y", "ais/@#/bck/x/@ais/other/%ob/y"),
    ("@ais/bck", "line\nfeed", "ais/@#/bck/line\nfeed"),
]


def test_an_object_in_chunks_is_read_whole_from_the_target(pod: Pod, mountpath: Path) -> None:
    for bucket, name, uname in CHUNKED_OBJECTS:
        path = make_chunked(mountpath, bucket, name)
        for method, framing in (("PUT", "length"), ("GET", "chunked")):
            pod.target.default = Behaviour(status=200, body=WHOLE, framing=framing)
            response = pod.read(path, method, etl_args="x")
            assert response.status == 200, (method, path)
            assert response.body.rpartition(b"\n")[2] == b"<" + WHOLE + b">", (method, path)
            asked = pod.target.requests.pop()
            assert (asked.method, asked.target) == ("GET", BASE_PATH + escaped_segment(uname))
            assert asked.headers["authorization"] == "Bearer " + TOKEN
    assert pod.target.requests == []


def test_a_class_that_wants_a_path_gets_one_of_the_whole_object_for_the_time_of_its_call(
    pods: Pods, mountpath: Path
) -> None:
    pod, path = pods("direct"), make_chunked(mountpath)
    pod.target.objects["/ais%2F@%23%2Fbck%2Fdir%2Fobj"] = WHOLE
    told, _, content = pod.ask("PUT", "/bck/dir/obj" + fqn_query(path)).body.partition(b"\n")
    assert content == b"<" + WHOLE + b">"
    assert os.path.isabs(told) and told != str(path).encode()
    assert not os.path.exists(told)


FAILED_FETCHES = [
    (Behaviour(status=404), 404), (Behaviour(status=403), 403), (Behaviour(status=500), 500), (Behaviour(status=503), 503),
    (Behaviour(status=302, headers=(("Location", "/"),)), 502), (Behaviour(cut=At.BEFORE_BODY), 502),
    (Behaviour(status=200, body=WHOLE, cut=At.IN_ANSWER_BODY, after_bytes=3), 502),
    (Behaviour(status=200, body=WHOLE, cut=At.IN_ANSWER_BODY, after_bytes=3, framing="chunked"), 502),
]


def test_an_object_in_chunks_that_cannot_be_fetched_fails_and_is_never_its_first_chunk(
    pod: Pod, mountpath: Path
) -> None:
    path = make_chunked(mountpath)
    for behaviour, status in FAILED_FETCHES:
        pod.target.default = behaviour
        for method in ("PUT", "GET"):
            response = pod.read(path, method)
            assert (response.status, CHUNK in response.body) == (status, False), (method, behaviour)
    assert pod.kind == "streaming" or pod.calls() == []


SIZE_OF_CHUNK = len(CHUNK)
ATTRIBUTES = [  # the attribute, and whether it says that the file is the whole object
    (attribute(SIZE_OF_CHUNK), True),
    (attribute(SIZE_OF_CHUNK + 1), False),
    (attribute(SIZE_OF_CHUNK - 1), False),
    (attribute(0), False),
    (attribute(1 << 40), False),
    (attribute(1 << 63), False),
    (attribute(99, before=0), False),
    (attribute(99, after=0), False),
    (attribute(99, before=0, after=0), False),
    (attribute(99, before=2), False),
    (attribute(99, preamble=b"\x02" + PREAMBLE[1:]), False),
    (attribute(99, preamble=b"\x01\x00" + b"\n" * 8), False),
    (attribute(99, preamble=b"\x01\x01" + MARK + b"\x00\x03abc"), False),
    (attribute(SIZE_OF_CHUNK, preamble=b"\x01\x01" + MARK + b"\x00\x03abc"), True),
    (attribute(int.from_bytes(b"\n" * 8, "big"), after=0), False),
    (attribute(99) + MARK, False),
    (PREAMBLE + MARK.join([b"\x00\x01ab\x00\x03" + b"\x00" * 7 + b"c", struct.pack(">HQ", 3, SIZE_OF_CHUNK)]), True),
    # as AIStore 5.0 wrote it for an object of three parts of 1 MiB
    (bytes.fromhex("02011234567890abcdef") + b"\x00\x00xxhash2" + MARK + b"\x00\x01" + bytes.fromhex("4e3a5bb1c6d2e8f0")
     + MARK + b"\x00\x021" + MARK + bytes.fromhex("00030000000000300000") + MARK + b"\x00\x06x", False),
    # attributes of another layout say nothing
    (b"", True),
    (b"\x01", True),
    (PREAMBLE, True),
    (PREAMBLE + MARK, True),
    (attribute(99, preamble=b"\x00" + PREAMBLE[1:]), True),
    (attribute(99, preamble=b"\x03" + PREAMBLE[1:]), True),
    (PREAMBLE + struct.pack(">HI", 3, 99), True),
    (PREAMBLE + struct.pack(">HQ", 3, 99) + b"\n", True),
    (PREAMBLE + struct.pack(">HQ", 3, 99) + b"ab", True),
    (PREAMBLE + struct.pack(">HQ", 3, 99)[:-1], True),
    (PREAMBLE + struct.pack(">HQ", 4, 99), True),
    (PREAMBLE + struct.pack(">HQ", 0x300, 99), True),
    (PREAMBLE + (MARK + b"\x00").join([b"\x00\x01ab", struct.pack(">HQ", 3, 99)]), True),
    (b"\xff" * 100, True),
    (b"\x01" * 100, True),
]


def test_the_size_is_found_in_the_attribute_wherever_it_stands_and_nowhere_else(
    buffered: Pod, mountpath: Path
) -> None:
    buffered.target.default = Behaviour(status=200, body=WHOLE)
    path = make_object(mountpath, content=CHUNK)
    os.setxattr(str(path), "user.other", attribute(99))
    got = {"without": buffered.read(path).body}
    for value, _ in ATTRIBUTES:
        os.setxattr(str(path), "user.ais.lom", value)
        got[value.hex()] = buffered.read(path).body
    expected = {value.hex(): b"<%s>" % (CHUNK if whole else WHOLE) for value, whole in ATTRIBUTES}
    assert got == {"without": b"<%s>" % CHUNK, **expected}
    assert len(buffered.target.requests) == [whole for _, whole in ATTRIBUTES].count(False)


# == Objects from the target ==


def pull(connection: http.client.HTTPConnection, target: str = UNAME) -> Tuple[int, bytes]:
    """Send a pull on a connection and read the whole answer."""
    connection.request("GET", target)
    response = connection.getresponse()
    return response.status, response.read()


RAW_PATHS = [
    UNAME, "/ais%2f@%23%2fbck%2fobj", "/ais%2F%40%23%2Fbck%2Fobj", "/ais/@%23/bck/obj", "/x%20y", "/x+y", "/x%2By", "/x%252Fy",
    "/x;v=1", "/x%3Fy", "/x%3B", "/%E2%82%AC", "/%ff", "/x//y/../z/./", "/!$&'()*+,;=:@~-._", "/x%00y", "/100%", "/%zz",
    "/|^`{}\"<>\\",
]


def test_the_path_of_a_pull_goes_to_the_target_byte_for_byte(buffered: Pod) -> None:
    for raw in RAW_PATHS:
        buffered.target.objects[raw] = b"content"
        response = buffered.ask("GET", raw)
        assert (response.status, response.body) == (200, b"<content>"), raw
    asked = [request.target for request in buffered.target.requests]
    assert (asked, buffered.calls()) == ([BASE_PATH + raw for raw in RAW_PATHS], RAW_PATHS)


def test_bytes_that_no_url_may_have_are_escaped_on_their_way_to_the_target(buffered: Pod) -> None:
    raw = "/ü€".encode().decode("latin-1")
    buffered.target.default = Behaviour(status=200, body=b"content")
    assert buffered.ask("GET", raw).status == 200
    asked, = buffered.target.requests
    assert unquote(asked.path) in (BASE_PATH + "/ü€", BASE_PATH + raw)
    assert asked.target.isascii()


FORWARDED = {  # the query of a pull, and what of it goes to the target
    "": "", "?": "", "?a=1": "?a=1", "?etl_args=x": "", "?etl_args=x&b=2&a=1": "?b=2&a=1",
    "?z=%2B+%20%C3%BC&etl_args=y&archpath=a%2Fb": "?z=%2B+%20%C3%BC&archpath=a%2Fb",
    "?etl_fqn=&uuid=x": "?uuid=x", "?latest-ver=true&a": "?latest-ver=true&a",
    "?a=1&a=2": "?a=1&a=2", "?a=b?c/d:e@f": "?a=b?c/d:e@f",
}


def test_parameters_that_are_not_for_us_go_to_the_target_as_they_came(buffered: Pod) -> None:
    buffered.target.default = Behaviour(status=200, body=b"content")
    for query, forwarded in FORWARDED.items():
        assert buffered.ask("GET", UNAME + query).status == 200
        assert buffered.target.requests[-1].target == BASE_PATH + UNAME + forwarded


def test_the_latest_version_is_read_from_the_target_though_there_is_a_file(pod: Pod, tmp_path: Path) -> None:
    path = make_object(tmp_path, content=b"old")
    pod.target.default = Behaviour(status=200, body=b"new")
    response = pod.ask("GET", UNAME + fqn_query(path, **{"latest-ver": "true", "uuid": "1"}))
    assert (response.status, response.body.rpartition(b"\n")[2]) == (200, b"<new>")
    assert [asked.target for asked in pod.target.requests] == [BASE_PATH + UNAME + "?latest-ver=true&uuid=1"]
    if pod.kind == "direct":
        told = response.body.partition(b"\n")[0]
        assert told not in (b"", str(path).encode()) and not os.path.exists(told)


def test_a_pushed_object_that_has_a_path_is_the_file_and_never_the_empty_body(pod: Pod, tmp_path: Path) -> None:
    path = make_object(tmp_path, content=b"content")
    response = pod.ask("PUT", "/bck/obj" + fqn_query(path, **{"latest-ver": "true"}), b"")
    assert (response.status, response.body.rpartition(b"\n")[2]) == (200, b"<content>")


def test_what_a_redirected_client_asks_for_by_headers_is_not_asked_of_the_target(buffered: Pod) -> None:
    buffered.target.objects[UNAME] = b"content"
    headers = {"Range": "bytes=0-1", "If-Range": '"x"', "Accept-Encoding": "gzip", "Authorization": "Bearer client",
               "Cookie": "c=1",
               "If-None-Match": "*", "X-Mine": "x", "User-Agent": "theirs"}
    response = buffered.ask("GET", UNAME, headers=headers)
    assert (response.status, response.body) == (200, b"<content>")
    asked, = buffered.target.requests
    assert asked.headers["authorization"] == "Bearer " + TOKEN
    assert asked.headers.get("accept-encoding", "identity") == "identity"
    assert not {"range", "if-range", "cookie", "if-none-match", "x-mine"} & set(asked.headers)
    assert asked.headers["host"] == "127.0.0.1:%d" % buffered.target.port
    assert asked.body == b"" and "transfer-encoding" not in asked.headers


STATUSES = {  # the target's, and ours
    404: 404, 403: 403, 401: 401, 400: 400, 429: 429, 500: 500, 502: 502, 503: 503, 507: 507,
    201: 502, 204: 502, 206: 502, 301: 502, 302: 502, 304: 502, 307: 502,
}


def test_the_status_of_the_target_is_passed_on_and_no_other_success_than_200_is_one(
    pod: Pod
) -> None:
    pod.target.objects["/elsewhere"] = b"content"
    complaint = b"GET %s%s: it is not so" % (pod.target.url.encode(), UNAME.encode())
    got = {}
    for status in STATUSES:
        headers = (("Location", BASE_PATH + "/elsewhere"),) if status in (301, 302, 307) else ()
        pod.target.default = Behaviour(status=status, body=complaint, headers=headers)
        got[status] = pod.ask("GET", UNAME).status
    assert got == STATUSES
    assert (pod.calls(), len(pod.target.requests)) == ([], len(STATUSES))


def test_a_target_that_cannot_be_reached_or_is_of_an_unknown_authority_is_502(
    pods: Pods, start_target: Callable[..., StandInTarget], certificates: Certificates
) -> None:
    gone, unknown = start_target(), start_target(certificates.server_context())
    gone.close()
    for target in (gone, unknown):
        pod = pods("buffered", AIS_TARGET_URL=target.url)
        assert pod.ask("GET", UNAME).status == 502, target.url
        assert (pod.calls(), target.requests) == ([], []), target.url


BODY = b"0123456789" * 20000


CUT_ANSWERS = [
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=0),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=1),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=100000),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=len(BODY) - 1),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=1, framing="chunked"),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=100000, framing="chunked"),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=len(BODY), framing="chunked"),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=100000, reset=True),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=100000, reset=True, framing="chunked"),
    Behaviour(status=200, body=BODY, declared=len(BODY) + 1),
    Behaviour(status=200, body=b"", declared=1),
    Behaviour(cut=At.BEFORE_BODY), Behaviour(cut=At.AFTER_BODY, reset=True),
    Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_HEAD), Behaviour(status=404, body=BODY, cut=At.IN_ANSWER_HEAD),
]


def describe(behaviour: Behaviour) -> str:
    """Name a behaviour where a test fails."""
    told = (behaviour.status, behaviour.framing, behaviour.cut, behaviour.after_bytes)
    return "-".join(map(str, told)) + "-reset" * behaviour.reset


def test_an_answer_of_the_target_that_ends_early_is_502_and_no_object(pod: Pod) -> None:
    for behaviour in CUT_ANSWERS:
        pod.target.default = behaviour
        assert pod.ask("GET", "/" + describe(behaviour)).status == 502, describe(behaviour)
    assert pod.kind == "streaming" or pod.calls() == []


class OddServer:
    """A server that reads a request's head and answers with given bytes, whatever they are, then closes."""

    def __init__(self) -> None:
        self.answer = b""
        self.later = b""  # what follows a moment after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d%s" % (self._listener.getsockname()[1], BASE_PATH)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError), accepted, accepted.makefile("rb") as stream:
            while stream.readline().strip():
                pass
            later = self.later
            accepted.sendall(self.answer)
            if later:
                time.sleep(0.3)
                accepted.sendall(later)
            accepted.shutdown(socket.SHUT_WR)
            stream.read()

    def close(self) -> None:
        """Serve no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def odd_server() -> Iterator[OddServer]:
    """One such server for all its tests."""
    server = OddServer()
    yield server
    server.close()


ODD_ANSWERS = [
    b"", b"garbage", b"garbage\r\n\r\n", b"SSH-2.0-OpenSSH_9.0\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1\r\n\r\n",
    b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: x\r\n", b"HTTP/1.1 404 Not Found\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\ncontent", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\ncontent",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\ncontent",
]


@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_an_answer_that_is_malformed_or_whose_head_is_cut_is_502_and_no_object(
    pods: Pods, odd_server: OddServer, kind: str
) -> None:
    pod = pods(kind, AIS_TARGET_URL=odd_server.url)
    for odd_server.answer in ODD_ANSWERS:
        assert pod.ask("GET", UNAME).status == 502, odd_server.answer
    assert kind == "streaming" or pod.calls() == []


@pytest.mark.parametrize("malformed", [
    b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
])
def test_what_follows_a_malformed_answer_is_never_taken_for_the_next_one(
    pods: Pods, odd_server: OddServer, malformed: bytes
) -> None:
    pod = pods("buffered", AIS_TARGET_URL=odd_server.url)
    odd_server.answer = b"HTTP/1.1 200 OK\r\n" + malformed
    odd_server.later = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    connection = http.client.HTTPConnection("127.0.0.1", pod.runtime.port, timeout=15)
    with contextlib.closing(connection):
        first = pull(connection)[0]
        odd_server.answer, odd_server.later = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood", b""
        assert (first, pull(connection)) == (502, (200, b"<good>"))


def test_an_object_of_any_size_comes_from_the_target_in_any_framing(pod: Pod) -> None:
    for size in SIZES:
        content = os.urandom(size)
        for framing in ("length", "chunked"):
            pod.target.default = Behaviour(status=200, body=content, framing=framing)
            is_same = pod.ask("GET", UNAME).body == b"<" + content + b">"
            assert is_same, (size, framing)


@pytest.fixture
def client(buffered: Pod) -> Iterator[http.client.HTTPConnection]:
    """A connection to the pod whose class gets bytes; one thread of the pod serves it while it is busy."""
    connection = http.client.HTTPConnection("127.0.0.1", buffered.runtime.port, timeout=15)
    yield connection
    connection.close()


def test_requests_to_the_target_share_connections(
    buffered: Pod, client: http.client.HTTPConnection
) -> None:
    for behaviour in (
        Behaviour(status=200, body=b"content"), Behaviour(status=200, body=BODY, framing="chunked"),
        Behaviour(status=200, body=b""), Behaviour(status=200, body=BODY),
        Behaviour(status=404, body=b"no"), Behaviour(status=500),
    ):
        buffered.target.default = behaviour
        before = buffered.target.connections
        assert {pull(client)[0] for _ in range(20)} == {behaviour.status}
        count = buffered.target.connections - before  # each thread of the pod keeps its own
        assert count < 10, describe(behaviour)


def test_a_kept_connection_that_breaks_before_its_answer_is_tried_once_more_and_a_new_one_is_502(
    buffered: Pod, client: http.client.HTTPConnection
) -> None:
    target = buffered.target
    target.default = good = Behaviour(status=200, body=b"content")
    for at in (At.BEFORE_BODY, At.AFTER_BODY, At.AFTER_ANSWER):
        for reset in (False, True):
            for _ in range(10):  # as a rule once, but another thread of the pod may have none kept
                pull(client)
                known = target.connections
                target.requests.clear()
                target.script.append(replace(good, cut=at, reset=reset))
                answers = [pull(client), pull(client)]
                if target.requests[0].connection <= known:
                    break
            assert answers == [(200, b"<content>")] * 2, (at, reset)
    target.requests.clear()
    target.script.extend([Behaviour(cut=At.AFTER_BODY)] * 3)
    assert pull(client)[0] == 502
    assert len(target.requests) <= 2


# == Objects in the body ==


def framed(content: bytes, chunk: int) -> bytes:
    """Make what follows a request's first header fields: a length, or chunks of a size."""
    if not chunk:
        return b"Content-Length: %d\r\n\r\n" % len(content) + content
    pieces = [content[start:start + chunk] for start in range(0, len(content), chunk)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


HEAD = b"PUT /bck/obj HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n"


def read_answer(data: bytes) -> Tuple[int, bytes]:
    """Parse what came back into its status and its body, which must be whole."""

    class Replayed:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(data)

    response = http.client.HTTPResponse(Replayed())  # type: ignore[arg-type]
    response.begin()
    return response.status, response.read()


def test_a_body_of_any_size_comes_whole(pod: Pod) -> None:
    framings = [(size, chunk) for size in SIZES for chunk in (0, 65536)]
    for size, chunk in [*framings, (65537, 63), (65537, 4096), (1 << 20, 1 << 20)]:
        content = os.urandom(size)
        answer = pod.runtime.raw(HEAD + framed(content, chunk))
        is_same = read_answer(answer) == (200, b"<" + content + b">")
        assert is_same, "%d bytes, in chunks of %d" % (size, chunk)


def test_a_request_may_come_in_pieces_of_any_size(pod: Pod) -> None:
    for chunk in (0, 5):
        request = HEAD + framed(b"x" * 64, chunk)
        for size in (1, 2, 3, 64):
            pieces = [request[start:start + size] for start in range(0, len(request), size)]
            answer = read_answer(pod.runtime.raw(pieces))
            assert answer == (200, b"<" + b"x" * 64 + b">"), (chunk, size)


EMPTY = [
    b"\r\n", b"Content-Length: 0\r\n\r\n", b"Content-Length: 000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"transfer-encoding: Chunked\r\n\r\n000\r\n\r\n", b"Expect: 100-continue\r\n\r\n",
    b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n",
]


def test_an_empty_body_is_an_empty_object_and_no_body_is_one_too(pod: Pod) -> None:
    answers = {tail: read_answer(pod.runtime.raw(HEAD + tail)) for tail in EMPTY}
    assert answers == dict.fromkeys(EMPTY, (200, b"<>"))


def receive_head(connection: socket.socket) -> bytes:
    """Read to the end of a head."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)
        assert piece, "the connection ended within a head: %r" % data
        data += piece
    return data


def everything_from(connection: socket.socket) -> bytes:
    """Read until the peer closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_client_that_expects_to_be_asked_is_asked_for_its_body(pod: Pod) -> None:
    for chunk in (0, 2):
        field, _, body = framed(b"content", chunk).partition(b"\r\n\r\n")
        with pod.runtime.connect() as connection:
            connection.sendall(HEAD + b"Expect: 100-Continue\r\n" + field + b"\r\n\r\n")
            assert receive_head(connection) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert read_answer(everything_from(connection)) == (200, b"<content>")


def test_a_client_that_expects_to_be_asked_is_not_asked_for_a_body_that_nobody_wants(
    buffered: Pod
) -> None:
    fields = b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\n"
    for path, status in (("/etc/passwd", 403), ("/mp/@ais/bck/%ob/no", 404)):
        head = HEAD.replace(b"/bck/obj", b"/bck/obj" + fqn_query(path).encode())
        with buffered.runtime.connect() as connection:
            connection.sendall(head + fields)
            assert receive_head(connection).startswith(b"HTTP/1.1 %d " % status)


LENGTH_HEAD = HEAD + b"Content-Length: 6\r\n\r\n"
CHUNKED_HEAD = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CUTS = {  # name: a request up to where it is cut
    "in the request line": HEAD[:9], "in the head": HEAD, "in a field": HEAD + b"Content-Len",
    "before the empty line": LENGTH_HEAD[:-2],
    "before the body": LENGTH_HEAD, "within the body": LENGTH_HEAD + b"abc", "before the last byte": LENGTH_HEAD + b"abcde",
    "before the first chunk": CHUNKED_HEAD, "within a size": CHUNKED_HEAD + b"6", "after a size": CHUNKED_HEAD + b"6\r",
    "before a chunk": CHUNKED_HEAD + b"6\r\n", "within a chunk": CHUNKED_HEAD + b"6\r\nabc",
    "at a chunk's end": CHUNKED_HEAD + b"6\r\nabcdef", "within a chunk's end": CHUNKED_HEAD + b"6\r\nabcdef\r",
    "before the last chunk": CHUNKED_HEAD + b"6\r\nabcdef\r\n", "within the last chunk": CHUNKED_HEAD + b"6\r\nabcdef\r\n0",
    "after the last chunk": CHUNKED_HEAD + b"6\r\nabcdef\r\n0\r\n",
    "within the last line": CHUNKED_HEAD + b"6\r\nabcdef\r\n0\r\n\r",
    "within a trailer": CHUNKED_HEAD + b"6\r\nabcdef\r\n0\r\nTrai",
    "after a trailer": CHUNKED_HEAD + b"6\r\nabcdef\r\n0\r\nA: b\r\n",
    **{"all but %d of %d bytes, in chunks of %d" % (left, size, chunk):
       (HEAD + framed(b"x" * size, chunk))[:-left]
       for size in (65536, 300000) for chunk in (0, 1000) for left in (1, 5, size // 2)},
}


def test_a_request_that_is_cut_short_is_no_object(pod: Pod) -> None:
    for cut, request in CUTS.items():
        with pod.runtime.connect() as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = everything_from(connection)
        assert answer == b"" or read_answer(answer)[0] == 400, cut
    assert pod.kind == "streaming" or pod.calls() == []


@pytest.mark.parametrize("resets", [False, True])
def test_a_request_whose_client_goes_away_is_no_object(buffered: Pod, resets: bool) -> None:
    for cut, request in CUTS.items():
        with buffered.runtime.connect() as connection:
            connection.sendall(request.replace(b"/bck/obj", b"/" + quote(cut).encode()))
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.2)  # there is no answer to wait for
    assert buffered.ask("PUT", "/marker", b"").status == 200
    assert buffered.calls() == ["/marker"]


# == Objects from the outside world ==


@pytest.fixture
def outside(start_target: Callable[..., StandInTarget]) -> StandInTarget:
    """A server of the outside world."""
    server = start_target()
    server.default = Behaviour(status=200, body=b"content")
    return server


def download_target(url: str, name: str = "bck/a b", **others: str) -> str:
    """Make the target of a download request."""
    values = {"original_url": url, "object_to": name, **others}
    return "/download?" + "&".join("%s=%s" % (key, quote(value, safe="")) for key, value in values.items())


def redirecting(head: Recorded) -> Behaviour:
    """Redirect `/3` to `/2` and so on; `/0` is there."""
    left = int(head.path.strip("/"))
    if not left:
        return Behaviour(status=200, body=b"content")
    return Behaviour(status=302, headers=(("Location", "/%d" % (left - 1)),), framing="close")


def test_a_download_is_fetched_and_transformed_under_the_name_it_shall_have(pod: Pod, outside: StandInTarget) -> None:
    response = pod.ask("POST", download_target(outside.root + "/file%20x?y=%2F&z=1"), b"")
    assert (response.status, response.body) == (200, b"<content>")
    assert pod.calls() == ["bck/a b"]
    fetched, = outside.requests
    assert (fetched.method, fetched.target) == ("GET", "/file%20x?y=%2F&z=1")
    assert pod.target.requests == []


def test_a_download_of_any_size_comes_whole(buffered: Pod, outside: StandInTarget) -> None:
    for size in SIZES:
        content = os.urandom(size)
        for framing in ("length", "chunked", "close"):
            outside.default = Behaviour(status=200, body=content, framing=framing)
            response = buffered.ask("POST", download_target(outside.root + "/x"))
            is_same = response.body == b"<" + content + b">"
            assert is_same, (size, framing)


def test_the_outside_world_learns_no_secret_of_the_cluster(buffered: Pod, outside: StandInTarget) -> None:
    headers = {"Authorization": "Bearer of the client", "Cookie": "c=1", "Range": "bytes=0-1"}
    assert buffered.ask("POST", download_target(outside.root + "/x"), b"", headers).status == 200
    fetched, = outside.requests
    assert not {"authorization", "cookie", "range", "ais-node-url"} & set(fetched.headers)
    assert not [secret for secret in SECRETS if secret in str(fetched)]


def test_a_download_is_a_post_that_has_its_parameters(buffered: Pod) -> None:
    url = "?original_url=http%3A%2F%2F127.0.0.1%3A9%2F"
    for query in ("", url, "?object_to=bck%2Fobj", "?etl_args=x"):
        assert buffered.ask("POST", "/download" + query, b"").status == 400, query
    for method in ("GET", "PUT"):
        response = buffered.ask(method, download_target("http://127.0.0.1:9/"))
        assert (response.status, response.headers["allow"]) == (405, "POST"), method
    assert buffered.calls() == []


def test_the_status_of_the_outside_world_is_passed_on(
    buffered: Pod, outside: StandInTarget
) -> None:
    for status, expected in ((404, 404), (403, 403), (500, 500), (503, 503), (304, 502)):
        outside.default = Behaviour(status=status, body=b"no")
        assert buffered.ask("POST", download_target(outside.root + "/x")).status == expected, status
    assert buffered.calls() == []


NO_HTTP_SERVERS = [
    "ftp://127.0.0.1:9/x", "file:///etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "data:,content", "unix:/x",
    "http:///x", "nonsense",
    "//127.0.0.1/x", "http://127.0.0.1:9/x", "http://127.0.0.1:x/", "http://[::1/x", "http://127.0.0.1:9/a b",
    "http://127.0.0.1:9/\r\nX: y",
]


def test_a_download_from_what_is_no_http_server_is_refused(buffered: Pod) -> None:
    for url in NO_HTTP_SERVERS:
        response = buffered.ask("POST", download_target(url))
        assert (response.status in (400, 502), b"root:" in response.body) == (True, False), url
    assert buffered.calls() == []


def test_a_download_follows_few_redirects_to_http_servers_only(
    buffered: Pod, outside: StandInTarget
) -> None:
    outside.default = redirecting
    for count, status in ((1, 200), (5, 200), (6, 502), (9, 502)):
        url = "%s/%d" % (outside.root, count)
        assert buffered.ask("POST", download_target(url)).status == status, url
    for location in ("file:///etc/passwd", "ftp://127.0.0.1:9/x", "gopher://127.0.0.1/", "/loop"):
        outside.default = Behaviour(status=302, headers=(("Location", location),), framing="close")
        response = buffered.ask("POST", download_target(outside.root + "/loop"))
        assert (response.status, b"root:" in response.body) == (502, False), location
    assert len(buffered.calls()) == 2


def test_a_download_that_ends_early_is_502_and_no_object(pod: Pod, outside: StandInTarget) -> None:
    cut = Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=1000)
    for outside.default in (
        cut, replace(cut, framing="chunked"), replace(cut, cut=At.IN_ANSWER_HEAD),
        Behaviour(cut=At.AFTER_BODY),
    ):
        response = pod.ask("POST", download_target(outside.root + "/x"))
        assert response.status == 502, describe(outside.default)
    assert pod.calls() == [] or pod.kind == "streaming"


def test_a_download_by_tls_wants_a_known_authority_and_the_clusters_own_is_none(
    pods: Pods, start_target: Callable[..., StandInTarget], certificates: Certificates
) -> None:
    outside = start_target(certificates.server_context())
    pod = pods("buffered", AIS_CLIENT_CA=str(certificates.ca), AIS_SKIP_VERIFY_CRT="true")
    assert pod.ask("POST", download_target(outside.root + "/x")).status == 502
    assert outside.requests == []


def test_a_download_by_tls_shows_no_certificate_of_the_cluster(
    pods: Pods, start_target: Callable[..., StandInTarget], certificates: Certificates
) -> None:
    pod = pods("buffered", SSL_CERT_FILE=str(certificates.ca), AIS_CRT=str(certificates.client),
               AIS_CRT_KEY=str(certificates.client_key), AIS_CLIENT_CA=str(certificates.ca))
    for verify_client, status in ((False, 200), (True, 502)):
        outside = start_target(certificates.server_context(verify_client))
        outside.default = Behaviour(status=200, body=b"content")
        assert pod.ask("POST", download_target(outside.root + "/x")).status == status, verify_client


def test_the_target_may_speak_tls_and_sees_the_certificate_of_the_cluster(
    pods: Pods, start_target: Callable[..., StandInTarget], certificates: Certificates
) -> None:
    target = start_target(certificates.server_context(verify_client=True))
    target.objects[UNAME] = b"content"
    pod = pods("buffered", AIS_TARGET_URL=target.url, AIS_CRT=str(certificates.client),
               AIS_CRT_KEY=str(certificates.client_key), AIS_CLIENT_CA=str(certificates.ca))
    assert pod.ask("GET", UNAME).body == b"<content>"
    assert target.requests[0].headers["authorization"] == "Bearer " + TOKEN


# == A file that fails or changes ==

FAILING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* An object's name says what becomes of reading it: slow, or short or bad at byte 20,000. */
ssize_t read(int fd, void *data, size_t size)
{
    static ssize_t (*real)(int, void *, size_t);
    char link[64], path[4096];
    ssize_t length;
    off_t at;

    if (!real)
        real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (!strstr(path, "/%ob/"))
        return real(fd, data, size);
    if (strstr(path, "/%ob/slow"))
        return real(fd, data, size > 1000 ? 1000 : size);
    at = lseek(fd, 0, SEEK_CUR);
    if (at >= 20000 && strstr(path, "/%ob/short"))
        return 0;
    if (at >= 20000) {
        errno = EIO;
        return -1;
    }
    return real(fd, data, at + size > 20000 ? 20000 - at : size);
}
"""


@pytest.fixture(scope="module")
def failing_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes objects' files slow, or fail at byte 20,000."""
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, and Linux")
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.c").write_text(FAILING)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "failing.so", "failing.c", "-ldl"], cwd=str(folder), check=True)
    return folder / "failing.so"


@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_a_file_that_cannot_be_read_to_its_end_is_never_taken_for_whole(
        target: StandInTarget, tmp_path: Path, failing_library: Path, kind: str) -> None:
    pod = Pod(kind, target, tmp_path, {"LD_PRELOAD": str(failing_library)})
    with pod.runtime as runtime:
        runtime.expect_traceback = True
        for size in (20_000, 20_001, 32 << 10, 256 << 10, 1 << 20, 3 << 20):
            for how in ("bad", "short", "slow"):
                content = os.urandom(size)
                path = make_object(tmp_path, name="%s-%d" % (how, size), content=content)
                response = pod.read(path)
                if how == "slow" or size == 20_000:
                    assert response.body == wrapped(pod, path, content), path.name
                elif how == "bad" or kind == "buffered" or size < 64 << 10:
                    reason = b"Input/output error" if how == "bad" else b"ends after 20000 of"
                    assert (response.status, reason in response.body) == (500, True), path.name


@pytest.mark.parametrize("kind", ["shortening", "closing"])
def test_a_file_that_becomes_shorter_while_a_stream_reads_it_is_never_taken_for_whole(
    target: StandInTarget, tmp_path: Path, kind: str
) -> None:
    pod = Pod(kind, target, tmp_path)
    path = make_object(tmp_path)
    reason = "the object's file ends before its 300000 bytes"

    def query_of_long_file() -> str:
        path.write_bytes(bytes(300_000))
        return fqn_query(path, etl_args=str(path))

    with pod.runtime as runtime:
        runtime.expect_traceback = True
        with pytest.raises(http.client.IncompleteRead):
            pod.ask("PUT", "/bck/obj" + query_of_long_file())
        runtime.wait_for_line("ERROR.*/bck/obj.*" + reason)
        hop = {"Ais-Node-Url": target.root + UNAME}
        response = pod.ask("PUT", "/bck/obj" + query_of_long_file(), headers=hop)
        assert (response.status, reason.encode() in response.body) == (500, True)
        assert [request.complete for request in target.wait_for_requests(1)] == [False]
        with Peer(runtime) as peer:
            query_of_long_file()
            peer.send(object_frames(None, fqn=quote(str(path)), etl_args=str(path), path="obj"))
            code, told = peer.break_reason()
            assert code == 1011 and reason in told
