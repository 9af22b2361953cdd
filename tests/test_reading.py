"""Stage 2, reading: an object by its path, from the target, the request's body, or from outside.

Each class of these tests notes its calls in a file, so that a test can tell that it was never called.
"""
import contextlib
import http.client
import json
import os
import shutil
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, List, Mapping, Optional, Tuple, Union
from urllib.parse import quote, unquote

import pytest

from harness import ROOT, Body, Environ, Response, Runtime, make_payload
from peer import Peer, object_frames
from standin import BASE_PATH, RESET, At, Behaviour, Certificates, Recorded, StandInTarget

SOURCE = '''
import os
import resource
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


class Moving(Noting):
    def transform(self, data, path, etl_args):
        os.replace(data, data + ".moved")
        with open(data + ".moved", "rb") as file:
            return file.read()


class Streaming(Noting):
    def transform_stream(self, reader, path, etl_args):
        self.note(path)
        yield b"<" + reader.read() + b">"


class Limited(Buffered):
    """Runs in a process that can write files of 1,500,000 bytes at most, as if the disk were full."""

    def __init__(self):
        super().__init__()
        infinity = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, infinity))


class Shortening(HTTPMultiThreadedServer):
    """Has the object's file, whose path is in etl_args, become shorter while it reads."""

    def transform_stream(self, reader, path, etl_args):
        first = reader.read(1)
        os.truncate(etl_args, 100_000)
        yield first + reader.read()
        if "closed" in etl_args:
            reader.close()
'''
TOKEN = "t0ken-of-the-cluster"
SECRETS = ("s3cr3t", TOKEN)
CHUNK = b"the first chunk"
WHOLE = b"the first chunk, and the second one"
UNAME = "/ais%2F@%23%2Fbck%2Fobj"
CONTENT = Behaviour(status=200, body=b"content")


class Pod:
    """A runtime with one worker, its target, and the file in which its class notes its calls."""

    def __init__(
        self, kind: str, target: StandInTarget, folder: Path, env: Optional[Environ] = None
    ) -> None:
        self.kind = kind
        self.target = target
        self._calls = Path(tempfile.mkdtemp(dir=str(folder)), "calls")
        payload = make_payload(SOURCE, "Buffered" if kind == "direct" else kind.capitalize())
        self.runtime = Runtime(env={
            "ETL_CLASS_PAYLOAD": payload, "AIS_TARGET_URL": target.url, "NUM_WORKERS": "1",
            "ETL_DIRECT_FQN": str(kind == "direct"), "AIS_AUTHN_TOKEN": TOKEN,
            "CALLS": str(self._calls), **(env or {})})

    def ask(
        self, method: str, target: str, body: Optional[Body] = None,
        headers: Optional[Mapping[str, str]] = None,
    ) -> Response:
        """Send a request; no answer may hold a secret, and every error is JSON."""
        response = self.runtime.request(method, target, body, headers)
        text = str(response.headers) + response.body.decode("latin-1")
        assert not [secret for secret in SECRETS if secret in text], (method, target)
        if response.status >= 400:
            assert response.headers["content-type"] == "application/json", (method, target)
            assert json.loads(response.body)["detail"], (method, target)
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
        for kept in (self.target.objects, self.target.requests, self.target.script):
            kept.clear()
        self.target.default = Behaviour()

    def connect(self) -> ContextManager[http.client.HTTPConnection]:
        """Return a connection for many requests; one thread serves it while it is busy."""
        port = self.runtime.port
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=15))


Pods = Callable[..., Pod]
StartTarget = Callable[..., StandInTarget]


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """A function that starts a pod, or returns the one that it started before for the same arguments."""
    started: Dict[Tuple[str, str], Pod] = {}
    folder, target = tmp_path_factory.mktemp("pods"), StandInTarget()
    with contextlib.ExitStack() as stack:
        stack.callback(target.close)

        def pod(kind: str, **env: str) -> Pod:
            key = kind, json.dumps(env, sort_keys=True)
            if key not in started:
                started[key] = Pod(kind, target, folder, env)
                stack.enter_context(started[key].runtime)
            started[key].forget()
            return started[key]

        yield pod
    assert target.complaints == []
    logs = "".join(each.runtime.log() for each in started.values())
    assert not [secret for secret in SECRETS if secret in logs]


@pytest.fixture(params=["buffered", "streaming", "direct"])
def pod(request: pytest.FixtureRequest, pods: Pods) -> Pod:
    """Each kind of pod in turn: the class gets bytes, or a reader, or (ETL_DIRECT_FQN) a path."""
    return pods(request.param)


@pytest.fixture
def buffered(pods: Pods) -> Pod:
    """The pod whose class gets bytes."""
    return pods("buffered")


@pytest.fixture
def outside(start_target: StartTarget) -> StandInTarget:
    """A server of the outside world."""
    server = start_target()
    server.default = CONTENT
    return server


def download_target(url: str, name: str = "bck/a b") -> str:
    """Make the target of a download request."""
    return "/download?original_url=%s&object_to=%s" % (quote(url, safe=""), quote(name, safe=""))


def test_an_object_of_any_size_comes_whole_from_wherever_it_is_read(
    pod: Pod, outside: StandInTarget, tmp_path: Path
) -> None:
    for size in (0, 1, 65535, 65536, 65537, 1 << 20):  # 64 KiB is what is read at once
        content = os.urandom(size)
        path = make_object(tmp_path, content=content)
        is_same = pod.read(path).body == wrapped(pod, path, content)
        assert is_same, size
        answers = {"body": pod.ask("PUT", "/bck/obj", content)}
        for chunk in (4095, 65536, 1 << 20):
            pieces = [content[start:start + chunk] for start in range(0, size, chunk)]
            answers["chunks of %d" % chunk] = pod.ask("PUT", "/bck/obj", pieces)
        for framing in ("length", "chunked", "close"):
            pod.target.default = outside.default = Behaviour(200, body=content, framing=framing)
            answers["download, " + framing] = pod.ask("POST", download_target(outside.root + "/x"))
            if framing != "close":  # a target never does it, and a cut answer would look whole
                answers["target, " + framing] = pod.ask("GET", UNAME)
        wrong = [source for source, answer in answers.items() if answer.body != b"<%s>" % content]
        assert wrong == [], size


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
    ("@ais/bck", "dir/obj"), ("@ais/#ns/bck", "obj"), ("@ais/@uuid#ns/bck", "obj"),
    ("@aws/bck", "a/b/c"), ("@ht/b-1.2", "~"), ("@ais/bck", "a b+c%20d;v=1"),
    ("@ais/bck", "a?b#c&d=e"), ("@ais/bck", "ünï€"), ("@ais/bck", "line\nfeed"),
]


def test_an_object_is_read_by_its_path_without_the_target(pod: Pod, tmp_path: Path) -> None:
    paths = [make_object(tmp_path, bucket, name) for bucket, name in OBJECTS]
    link, mountpath = tmp_path / "link", tmp_path / "mountpath"
    link.symlink_to(paths[0])
    mountpath.symlink_to(tmp_path)
    for path in (*paths, link, mountpath / "@ais/bck/%ob/dir/obj"):
        for method, body in (("PUT", b"not this"), ("GET", None)):
            response = pod.ask(method, "/bck/obj" + fqn_query(path), body)
            assert (response.status, response.body) == (200, wrapped(pod, path, b"content")), (method, path)
    assert pod.target.requests == []


OUTSIDE = [
    "/etc/passwd", "/etc/nothing", "/proc/self/environ", "/proc/self/fd/0", "/dev/zero", "/", ".",
    "etc/passwd", "../../../etc/passwd", "/@ais/bck/%ob", "/@ais/bck/%ob/../../../etc/passwd",
    "/@ais/%ob/x", "/ais/bck/%ob/x", "/@ais/bck/ob/x", "/@ais/bck/%wk/x", "/@ais/bck/%ob/\0",
]


def test_what_is_no_object_is_forbidden_and_a_missing_one_is_404(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "private").write_bytes(b"private")
    folder = make_object(tmp_path).parent
    links = {"to a file": "private", "to a folder": "", "to nothing": "nothing", "to a device": "/dev/zero",
             "to itself": folder / "to itself", "to no object": folder / "missing"}
    for name, end in links.items():
        (folder / name).symlink_to(tmp_path / end)
    (folder / "folder").mkdir()
    os.mkfifo(str(folder / "fifo"))
    os.mknod(str(folder / "socket"), stat.S_IFSOCK | 0o600)
    names = ("to a file", "to a folder/private", "to nothing", "to itself", "to a device",
             "folder", "fifo", "socket", "obj\0", "../../../../private")
    escaped_once_too_often = quote(str(tmp_path)) + "/@ais/bck/%25ob/dir/obj"
    forbidden = [*OUTSIDE, escaped_once_too_often, *("%s/%s" % (folder, name) for name in names)]
    missing = [str(folder / name) for name in ("missing", "obj/below", "no/dir", "to no object")]
    expected = {**dict.fromkeys(forbidden, 403), **dict.fromkeys(missing, 404)}
    for method in ("PUT", "GET"):
        answers = {path: pod.read(path, method) for path in expected}
        assert {path: answer.status for path, answer in answers.items()} == expected, method
        assert answers["/etc/passwd"].body == answers["/etc/nothing"].body, "it tells of a file"
    assert (pod.calls(), pod.target.requests) == ([], [])


UNDER_ROOTS = {
    "one/file": 200, "two/file": 200, "one/missing": 404, "two/../one/file": 200, "onefile": 403,
    "out/file": 403, "one": 403, "one/link out": 403, "out/link in": 200, "one/../out/file": 403,
    "out/@ais/bck/%ob/dir/obj": 403, "one/fifo": 403, "one/folder": 403, "/dev/zero": 403,
    "/dev/tty": 403,
}


def test_roots_that_are_set_take_the_place_of_the_layout(pods: Pods, tmp_path: Path) -> None:
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


@pytest.fixture
def mountpath(tmp_path: Path) -> Iterator[Path]:
    """A mountpath whose files can have attributes; those of /tmp have none on some systems."""
    with tempfile.TemporaryDirectory(dir=str(ROOT), prefix=".attributes-") as other:
        for folder in (tmp_path, Path(other)):
            with contextlib.suppress(OSError, AttributeError):
                os.setxattr(str(folder), "user.ais.lom", b"x")
                break
        else:
            pytest.skip("no file system here has attributes of users")
        yield folder


def make_chunked(mountpath: Path, bucket: str = "@ais/bck", name: str = "dir/obj") -> Path:
    """Store the first chunk of an object whose attribute tells the size of the whole."""
    path = make_object(mountpath, bucket, name, CHUNK)
    os.setxattr(str(path), "user.ais.lom", attribute(len(WHOLE)))
    return path


def content_without_path(pod: Pod, path: Path, answer: Response) -> bytes:
    """Return an answer without the path that the class got, which is no longer there."""
    told, _, content = answer.body.rpartition(b"\n")
    if pod.kind == "direct":
        assert os.path.isabs(told) and told != str(path).encode()
        assert not os.path.exists(told)
    return content


CHUNKED_OBJECTS = [  # bucket, name, and the uname
    ("@ais/bck", "dir/obj", "ais/@#/bck/dir/obj"),
    ("@ais/#ns/bck", "dir/obj", "ais/@#ns/bck/dir/obj"),
    ("@ais/@uuid#ns/bck", "dir/obj", "ais/@uuid#ns/bck/dir/obj"),
    ("@ais/@uuid#/bck", "obj", "ais/@uuid#/bck/obj"),
    ("@aws/bck-1.2", "obj", "aws/@#/bck-1.2/obj"),
    ("@ais/bck", "a b+c%20d;v=1?e#f&g/ünï€", "ais/@#/bck/a b+c%20d;v=1?e#f&g/ünï€"),
    ("@ais/bck", "x/@ais/other/%ob/y", "ais/@#/bck/x/@ais/other/%ob/y"),
]


def test_an_object_in_chunks_is_read_whole_from_the_target(pod: Pod, mountpath: Path) -> None:
    for bucket, name, uname in CHUNKED_OBJECTS:
        path = make_chunked(mountpath, bucket, name)
        for method, framing in (("PUT", "length"), ("GET", "chunked")):
            pod.target.default = Behaviour(status=200, body=WHOLE, framing=framing)
            answer = pod.read(path, method, etl_args="x")
            assert answer.status == 200, (method, path)
            assert content_without_path(pod, path, answer) == b"<" + WHOLE + b">", (method, path)
            asked = pod.target.requests.pop()
            assert (asked.method, asked.target) == ("GET", BASE_PATH + "/" + quote(uname, safe="@"))
            assert asked.headers["authorization"] == "Bearer " + TOKEN
    assert pod.target.requests == []


def test_an_object_in_chunks_that_cannot_be_fetched_fails_and_is_never_its_first_chunk(
    pod: Pod, mountpath: Path
) -> None:
    path = make_chunked(mountpath)
    cut = Behaviour(status=200, body=WHOLE, cut=At.IN_ANSWER_BODY, after_bytes=3)
    for behaviour, status in (
        (Behaviour(status=404), 404), (Behaviour(status=403), 403), (Behaviour(status=503), 503),
        (Behaviour(status=302, headers=(("Location", "/"),)), 502), (Behaviour(cut=At.BEFORE_BODY), 502),
        (cut, 502), (replace(cut, framing="chunked"), 502),
    ):
        pod.target.default = behaviour
        for method in ("PUT", "GET"):
            response = pod.read(path, method)
            assert (response.status, CHUNK in response.body) == (status, False), (method, behaviour)
    assert pod.kind == "streaming" or pod.calls() == []


def test_a_class_may_move_the_temporary_file_of_an_object_in_chunks(
    target: StandInTarget, mountpath: Path, tmp_path: Path
) -> None:
    pod = Pod("moving", target, tmp_path, {"ETL_DIRECT_FQN": "true", "TMPDIR": str(tmp_path)})
    path, target.default = make_chunked(mountpath), Behaviour(status=200, body=WHOLE)
    with pod.runtime:
        assert (pod.read(path).status, pod.read(path).body) == (200, WHOLE)
    assert {each.suffix for each in tmp_path.glob("etl-*")} == {".moved"}


def test_an_object_for_which_the_disk_has_no_room_is_never_cut(
    target: StandInTarget, mountpath: Path, tmp_path: Path
) -> None:
    pod = Pod("limited", target, tmp_path, {"ETL_DIRECT_FQN": "true", "TMPDIR": str(tmp_path)})
    path, target.default = make_chunked(mountpath), Behaviour(status=200, body=bytes(1_500_010))
    with pod.runtime as runtime:
        runtime.expect_traceback = True
        response = pod.read(path)
        assert (response.status, b"File too large" in response.body) == (500, True)
        assert (pod.calls(), list(tmp_path.glob("etl-*"))) == ([], [])


OF_CHUNK = len(CHUNK)
SAYING_PART = [  # attributes that say that the file is not the whole object
    attribute(OF_CHUNK + 1), attribute(OF_CHUNK - 1), attribute(0), attribute(1 << 63),
    attribute(99, before=0), attribute(99, after=0), attribute(99, before=0, after=0),
    attribute(99, before=2), attribute(99) + MARK, attribute(99, b"\x02" + PREAMBLE[1:]),
    attribute(99, b"\x01\x00" + b"\n" * 8), attribute(99, b"\x01\x01" + MARK + b"\x00\x03abc"),
    attribute(int.from_bytes(b"\n" * 8, "big"), after=0),
    MARK.join([  # as AIStore 5.0 wrote it for an object of three parts of 1 MiB
        bytes.fromhex("02011234567890abcdef") + b"\x00\x00xxhash2", bytes.fromhex("00014e3a5bb1c6d2e8f0"),
        b"\x00\x021", bytes.fromhex("00030000000000300000"), b"\x00\x06x"]),
]
SAYING_WHOLE = [
    attribute(OF_CHUNK), attribute(OF_CHUNK, b"\x01\x01" + MARK + b"\x00\x03abc"),
    PREAMBLE + b"\x00\x01ab\x00\x03" + b"\x00" * 7 + b"c" + MARK + struct.pack(">HQ", 3, OF_CHUNK),
    # attributes of another layout say nothing
    b"", b"\x01", PREAMBLE, PREAMBLE + MARK, b"\xff" * 100, b"\x01" * 100,
    attribute(99, b"\x00" + PREAMBLE[1:]), attribute(99, b"\x03" + PREAMBLE[1:]),
    PREAMBLE + struct.pack(">HI", 3, 99), PREAMBLE + struct.pack(">HQ", 3, 99) + b"\n",
    PREAMBLE + struct.pack(">HQ", 3, 99)[:-1], PREAMBLE + struct.pack(">HQ", 4, 99),
    PREAMBLE + struct.pack(">HQ", 0x300, 99),
    PREAMBLE + b"\x00\x01ab" + MARK + b"\x00" + struct.pack(">HQ", 3, 99),
]


def test_the_size_is_found_in_the_attribute_wherever_it_stands_and_nowhere_else(
    buffered: Pod, mountpath: Path
) -> None:
    buffered.target.default = Behaviour(status=200, body=WHOLE)
    path = make_object(mountpath, content=CHUNK)
    os.setxattr(str(path), "user.other", attribute(99))
    assert buffered.read(path).body == b"<%s>" % CHUNK
    for values, content in ((SAYING_PART, WHOLE), (SAYING_WHOLE, CHUNK)):
        for value in values:
            os.setxattr(str(path), "user.ais.lom", value)
            assert buffered.read(path).body == b"<%s>" % content, value.hex()
    assert len(buffered.target.requests) == len(SAYING_PART)


# == Objects from the target ==


def pull(connection: http.client.HTTPConnection, target: str = UNAME) -> Tuple[int, bytes]:
    """Send a pull on a connection and read the whole answer."""
    connection.request("GET", target)
    response = connection.getresponse()
    return response.status, response.read()


RAW_PATHS = [
    UNAME, "/ais%2f@%23%2fbck%2fobj", "/ais%2F%40%23%2Fbck%2Fobj", "/ais/@%23/bck/obj", "/x+y%20z",
    "/x%2By", "/x%252Fy", "/x;v=1", "/x%3Fy%3B", "/%E2%82%AC", "/%ff", "/x//y/../z/./",
    "/!$&'()*+,;=:@~-._", "/x%00y", "/100%", "/%zz", "/|^`{}\"<>\\",
]
FORWARDED = {  # a query, and what of it goes to the target
    "?": "", "?etl_args=x&b=2&a=1": "?b=2&a=1", "?etl_fqn=&u=x": "?u=x", "?a=1&a=2": "?a=1&a=2",
    "?z=%2B+%20%C3%BC&etl_args=y&a=b?c/d:e@f": "?z=%2B+%20%C3%BC&a=b?c/d:e@f",
}


def test_the_path_of_a_pull_and_parameters_of_others_go_to_the_target_byte_for_byte(
    buffered: Pod
) -> None:
    buffered.target.default = CONTENT
    expected = {raw: raw for raw in RAW_PATHS}
    expected.update({UNAME + query: UNAME + rest for query, rest in FORWARDED.items()})
    for asked, passed_on in expected.items():
        response = buffered.ask("GET", asked)
        assert (response.status, response.body) == (200, b"<content>"), asked
        assert buffered.target.requests[-1].target == BASE_PATH + passed_on
    assert len(buffered.target.requests) == len(expected)
    assert buffered.calls()[:len(RAW_PATHS)] == RAW_PATHS
    raw = "/ü€".encode().decode("latin-1")  # which no URL may have
    assert buffered.ask("GET", raw).status == 200
    sent = buffered.target.requests[-1]
    assert sent.target.isascii() and unquote(sent.path) in (BASE_PATH + "/ü€", BASE_PATH + raw)


def test_the_latest_version_is_read_from_the_target_though_there_is_a_file_unless_it_is_pushed(
    pod: Pod, tmp_path: Path
) -> None:
    path = make_object(tmp_path, content=b"old")
    pod.target.default = Behaviour(status=200, body=b"new")
    answer = pod.ask("GET", UNAME + fqn_query(path, **{"latest-ver": "true", "uuid": "1"}))
    assert (answer.status, content_without_path(pod, path, answer)) == (200, b"<new>")
    pushed = pod.ask("PUT", "/bck/obj" + fqn_query(path, **{"latest-ver": "true"}), b"")
    assert (pushed.status, pushed.body) == (200, wrapped(pod, path, b"old"))
    assert [asked.target for asked in pod.target.requests] == [BASE_PATH + UNAME + "?latest-ver=true&uuid=1"]


def test_what_a_redirected_client_asks_for_by_headers_is_not_asked_of_the_target(buffered: Pod) -> None:
    buffered.target.objects[UNAME] = b"content"
    headers = {"Range": "bytes=0-1", "If-Range": '"x"', "Accept-Encoding": "gzip", "Cookie": "c=1",
               "Authorization": "Bearer client", "If-None-Match": "*", "X-Mine": "x"}
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
    201: 502, 204: 502, 206: 502, 302: 502, 304: 502, 307: 502,
}


def test_the_status_of_the_target_is_passed_on_and_no_success_but_200_is_one(pod: Pod) -> None:
    pod.target.objects["/elsewhere"] = b"content"
    complaint = b"GET %s%s: it is not so" % (pod.target.url.encode(), UNAME.encode())
    got = {}
    for status in STATUSES:
        headers = (("Location", BASE_PATH + "/elsewhere"),) if status in (302, 307) else ()
        pod.target.default = Behaviour(status=status, body=complaint, headers=headers)
        got[status] = pod.ask("GET", UNAME).status
    assert got == STATUSES
    assert (pod.calls(), len(pod.target.requests)) == ([], len(STATUSES))


def test_a_target_that_cannot_be_reached_or_is_of_an_unknown_authority_is_502(
    pods: Pods, start_target: StartTarget, certificates: Certificates
) -> None:
    gone, unknown = start_target(), start_target(certificates.server_context())
    gone.close()
    for target in (gone, unknown):
        pod = pods("buffered", AIS_TARGET_URL=target.url)
        assert pod.ask("GET", UNAME).status == 502, target.url
        assert (pod.calls(), target.requests) == ([], []), target.url


BODY = b"0123456789" * 20000
CUT = Behaviour(status=200, body=BODY, cut=At.IN_ANSWER_BODY, after_bytes=100000)
CUT_ANSWERS = [
    CUT, replace(CUT, reset=True), replace(CUT, after_bytes=0), replace(CUT, framing="chunked"),
    replace(CUT, framing="chunked", reset=True), replace(CUT, after_bytes=len(BODY) - 1),
    replace(CUT, framing="chunked", after_bytes=len(BODY)),
    replace(CUT, cut=At.IN_ANSWER_HEAD), replace(CUT, status=404, cut=At.IN_ANSWER_HEAD),
    Behaviour(status=200, body=BODY, declared=len(BODY) + 1), Behaviour(status=200, declared=1),
    Behaviour(cut=At.BEFORE_BODY), Behaviour(cut=At.AFTER_BODY, reset=True),
]


def test_an_answer_of_the_target_or_of_the_outside_world_that_ends_early_is_502_and_no_object(
    pod: Pod, outside: StandInTarget
) -> None:
    for behaviour in CUT_ANSWERS:
        pod.target.default = outside.default = behaviour
        for method, asked in (("GET", UNAME), ("POST", download_target(outside.root + "/x"))):
            assert pod.ask(method, asked).status == 502, (method, replace(behaviour, body=b""))
    assert pod.kind == "streaming" or pod.calls() == []


class OddServer(socketserver.ThreadingTCPServer):
    """A server that reads a request's head, answers with given pieces of any kind, and closes."""

    daemon_threads = True
    pieces: Tuple[bytes, ...] = ()  # a moment is between them


class OddAnswer(socketserver.StreamRequestHandler):
    """One of its connections."""

    def handle(self) -> None:
        """Answer, and wait for the peer to close."""
        assert isinstance(self.server, OddServer)
        with contextlib.suppress(OSError):
            while self.rfile.readline().strip():
                pass
            for number, piece in enumerate(self.server.pieces):
                time.sleep(0.3 * number)
                self.wfile.write(piece)
            self.connection.shutdown(socket.SHUT_WR)
            self.rfile.read()


@pytest.fixture(scope="module")
def odd_server() -> Iterator[OddServer]:
    """One such server for all its tests."""
    with OddServer(("127.0.0.1", 0), OddAnswer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ODD_ANSWERS = [
    b"", b"garbage", b"garbage\r\n\r\n", b"SSH-2.0-OpenSSH_9.0\r\n", b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1\r\n\r\n", OK, OK[:-2], OK + b"Content-Type: x\r\n", b"HTTP/1.1 404 Not Found\r\n",
    OK + b"Content-Length: x\r\n\r\ncontent", OK + b"Content-Length: -1\r\n\r\ncontent",
    CHUNKED, CHUNKED + b"xyz\r\n", CHUNKED + b"3\r\nabc\r\n",
    OK + b"Transfer-Encoding: gzip\r\n\r\ncontent",
]


@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_a_malformed_answer_is_502_and_what_follows_it_is_never_taken_for_the_next_one(
    pods: Pods, odd_server: OddServer, kind: str
) -> None:
    url = "http://127.0.0.1:%d%s" % (odd_server.server_address[1], BASE_PATH)
    pod = pods(kind, AIS_TARGET_URL=url)
    for answer in ODD_ANSWERS:
        odd_server.pieces = (answer,)
        assert pod.ask("GET", UNAME).status == 502, answer
    assert kind == "streaming" or pod.calls() == []
    for chunks in (b"xyz\r\n", b"3\r\nabcdef\r\n0\r\n\r\n"):
        odd_server.pieces = (CHUNKED + chunks, OK + b"Content-Length: 6\r\n\r\nforged")
        with pod.connect() as connection:
            first = pull(connection)[0]
            odd_server.pieces = (OK + b"Content-Length: 4\r\n\r\ngood",)
            assert (first, pull(connection)) == (502, (200, b"<good>")), chunks


def test_requests_to_the_target_share_connections_and_one_that_breaks_before_its_answer_is_tried_again(
    buffered: Pod
) -> None:
    target = buffered.target
    for behaviour in (
        Behaviour(status=200, body=BODY), Behaviour(status=404, body=b"no"), Behaviour(status=500),
        replace(CONTENT, framing="chunked"), CONTENT,
    ):
        target.default, before = behaviour, target.connections
        with buffered.connect() as client:
            assert {pull(client)[0] for _ in range(20)} == {behaviour.status}
        assert target.connections - before < 10, behaviour.status  # each thread keeps its own
    cuts = [replace(CONTENT, cut=at, reset=reset)
            for at in (At.BEFORE_BODY, At.AFTER_BODY, At.AFTER_ANSWER) for reset in (False, True)]
    with buffered.connect() as client:
        for cut in cuts:
            for _ in range(10):  # as a rule once, but another thread of the pod may have none kept
                pull(client)
                known = target.connections
                target.requests.clear()
                target.script.append(cut)
                answers = [pull(client), pull(client)]
                if target.requests[0].connection <= known:
                    break
            assert answers == [(200, b"<content>")] * 2, cut
        target.requests.clear()
        target.script.extend([Behaviour(cut=At.AFTER_BODY)] * 3)
        assert pull(client)[0] == 502
    assert len(target.requests) <= 2


# == Objects in the body ==

HEAD = b"PUT /bck/obj HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n"
LENGTH_HEAD = HEAD + b"Content-Length: 7\r\n\r\n"
CHUNKED_HEAD = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


CUT_REQUESTS = [
    HEAD[:9], HEAD, LENGTH_HEAD[:-2], LENGTH_HEAD, LENGTH_HEAD + b"conten", CHUNKED_HEAD,
    CHUNKED_HEAD + b"7\r", CHUNKED_HEAD + b"7\r\ncont", CHUNKED_HEAD + b"7\r\ncontent\r\n",
    CHUNKED_HEAD + b"7\r\ncontent\r\n0\r\n", CHUNKED_HEAD + b"7\r\ncontent\r\n0\r\nTrai",
    HEAD + b"Content-Length: 99999\r\n\r\n" + bytes(99_998), CHUNKED_HEAD + b"fffff\r\n" + bytes(300_000),
]


def test_a_request_whose_client_goes_away_is_no_object(buffered: Pod) -> None:
    for number, request in enumerate(CUT_REQUESTS):
        for resets in (False, True):
            with buffered.runtime.connect() as connection:
                connection.sendall(request.replace(b"/bck/obj", b"/%d-%d" % (number, resets)))
                if resets:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    time.sleep(0.2)  # there is no answer to wait for
    assert buffered.ask("PUT", "/marker", b"").status == 200
    assert buffered.calls() == ["/marker"]


# == Objects from the outside world ==


def test_a_download_gets_the_name_it_shall_have_and_the_outside_world_learns_no_secret(
    pod: Pod, outside: StandInTarget
) -> None:
    headers = {"Authorization": "Bearer of the client", "Cookie": "c=1", "Range": "bytes=0-1"}
    response = pod.ask("POST", download_target(outside.root + "/file%20x?y=%2F&z=1"), b"", headers)
    assert (response.status, response.body, pod.calls()) == (200, b"<content>", ["bck/a b"])
    fetched, = outside.requests
    assert (fetched.method, fetched.target) == ("GET", "/file%20x?y=%2F&z=1")
    assert not {"authorization", "cookie", "range", "ais-node-url"} & set(fetched.headers)
    assert not [secret for secret in SECRETS if secret in str(fetched)]
    assert pod.target.requests == []


def test_letters_in_the_url_of_a_download_are_sent_as_utf_8(
    buffered: Pod, outside: StandInTarget
) -> None:
    for url, sent in (("/ü€%20", "/%C3%BC%E2%82%AC%20"), ("/x?é=\xff", "/x?%C3%A9=%C3%BF")):
        assert buffered.ask("POST", download_target(outside.root + url)).status == 200
        assert outside.requests.pop().target == sent


NO_HTTP_URLS = [
    "ftp://127.0.0.1:9/x", "FILE:///etc/passwd", "/etc/passwd", "data:,content", "unix:/x",
    "http:///x", "nonsense", "//127.0.0.1/x", "http://127.0.0.1:x/", "http://[::1/x",
    "http://user:s3cret@127.0.0.1:9/x",
]
NO_HTTP_SERVERS = [
    "http://127.0.0.1:9/x", "http://127.0.0.1:9/a b", "http://127.0.0.1:9/\r\nX: y",
]


def test_a_download_of_what_is_not_there_fails(buffered: Pod, outside: StandInTarget) -> None:
    for status, expected in ((404, 404), (403, 403), (500, 500), (503, 503), (304, 502)):
        outside.default = Behaviour(status=status, body=b"no")
        assert buffered.ask("POST", download_target(outside.root + "/x")).status == expected, status
    for url in NO_HTTP_URLS + NO_HTTP_SERVERS:
        response = buffered.ask("POST", download_target(url))
        status = 400 if url in NO_HTTP_URLS else 502
        assert (response.status, b"root:" in response.body) == (status, False), url
    refused = buffered.ask("PUT", download_target(outside.root + "/x"))
    assert (refused.status, refused.headers["allow"], buffered.calls()) == (405, "POST", [])


def redirecting(head: Recorded) -> Behaviour:
    """Redirect `/3` to `/2` and so on; `/0` is there."""
    left = int(head.path.strip("/"))
    to_next = Behaviour(status=302, headers=(("Location", "/%d" % (left - 1)),), framing="close")
    return to_next if left else CONTENT


def test_a_download_follows_few_redirects_to_http_servers_only(
    buffered: Pod, outside: StandInTarget
) -> None:
    outside.default = redirecting
    for count, status in ((1, 200), (5, 200), (6, 502), (9, 502)):
        url = "%s/%d" % (outside.root, count)
        assert buffered.ask("POST", download_target(url)).status == status, url
    for location in ("file:///etc/passwd", "ftp://127.0.0.1:9/x", "gopher://127.0.0.1/", "/loop", "http://[::1/x"):
        outside.default = Behaviour(status=302, headers=(("Location", location),), framing="close")
        response = buffered.ask("POST", download_target(outside.root + "/loop"))
        assert (response.status, b"root:" in response.body) == (502, False), location
    assert len(buffered.calls()) == 2


def test_a_download_by_tls_wants_a_known_authority_and_shows_no_certificate_of_the_cluster(
    pods: Pods, start_target: StartTarget, certificates: Certificates
) -> None:
    ca, client, key = map(str, (certificates.ca, certificates.client, certificates.client_key))
    of_cluster = {"AIS_CLIENT_CA": ca, "AIS_CRT": client, "AIS_CRT_KEY": key}
    for env, verify_client, status in (
        ({"AIS_CLIENT_CA": ca, "AIS_SKIP_VERIFY_CRT": "true"}, False, 502),
        ({**of_cluster, "SSL_CERT_FILE": ca}, False, 200),
        ({**of_cluster, "SSL_CERT_FILE": ca}, True, 502),
    ):
        outside = start_target(certificates.server_context(verify_client))
        outside.default = CONTENT
        answer = pods("buffered", **env).ask("POST", download_target(outside.root + "/x"))
        assert (answer.status, len(outside.requests)) == (status, int(status == 200)), env
    target = start_target(certificates.server_context(verify_client=True))
    target.objects[UNAME] = b"content"
    assert pods("buffered", AIS_TARGET_URL=target.url, **of_cluster).ask("GET", UNAME).body == b"<content>"
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
    ssize_t (*real)(int, void *, size_t) = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    char link[64], path[4096];
    ssize_t length;
    off_t at = lseek(fd, 0, SEEK_CUR);

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (!strstr(path, "/%ob/"))
        return real(fd, data, size);
    if (strstr(path, "/%ob/slow"))
        return real(fd, data, size > 1000 ? 1000 : size);
    errno = EIO;
    if (at >= 20000)
        return strstr(path, "/%ob/short") ? 0 : -1;
    return real(fd, data, at + size > 20000 ? 20000 - at : size);
}
"""


@pytest.mark.parametrize("kind", ["buffered", "streaming"])
def test_a_file_that_cannot_be_read_to_its_end_is_never_taken_for_whole(
    target: StandInTarget, tmp_path: Path, kind: str
) -> None:
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, and Linux")
    (tmp_path / "failing.c").write_text(FAILING)
    library = tmp_path / "failing.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "failing.c"), "-ldl"]
    subprocess.run(command, check=True)
    pod = Pod(kind, target, tmp_path, {"LD_PRELOAD": str(library)})
    with pod.runtime as runtime:
        runtime.expect_traceback = True
        for size in (20_000, 20_001, 32 << 10, 256 << 10, 3 << 20):
            for how in ("bad", "short", "slow"):
                content = os.urandom(size)
                path = make_object(tmp_path, name="%s-%d" % (how, size), content=content)
                response = pod.read(path)
                if how == "slow" or size == 20_000:
                    assert response.body == wrapped(pod, path, content), path.name
                elif how == "bad" or kind == "buffered" or size < 64 << 10:
                    reason = b"Input/output error" if how == "bad" else b"ends after 20000 of"
                    assert (response.status, reason in response.body) == (500, True), path.name


def test_a_file_that_becomes_shorter_while_a_stream_reads_it_is_never_taken_for_whole(
    target: StandInTarget, tmp_path: Path
) -> None:
    pod = Pod("shortening", target, tmp_path)
    reason = "the object's file ends before its 300000 bytes"
    with pod.runtime as runtime:
        runtime.expect_traceback = True
        for name in ("open", "closed"):
            path = make_object(tmp_path, name=name, content=bytes(300_000))
            asked = "/bck/%s%s" % (name, fqn_query(path, etl_args=str(path)))
            with pytest.raises(http.client.IncompleteRead):
                pod.ask("PUT", asked)
            runtime.wait_for_line("ERROR.*/bck/%s.*%s" % (name, reason))
            path.write_bytes(bytes(300_000))
            response = pod.ask("PUT", asked, headers={"Ais-Node-Url": target.root + UNAME})
            assert (response.status, reason.encode() in response.body) == (500, True)
            assert not target.wait_for_requests(1)[-1].complete
            path.write_bytes(bytes(300_000))
            with Peer(runtime) as peer:
                peer.send(object_frames(None, fqn=quote(str(path)), etl_args=str(path), path="obj"))
                code, told = peer.break_reason()
                assert code == 1011 and reason in told
            target.requests.clear()
