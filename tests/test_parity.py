"""The same requests to the SDK's own servers and to the runtime, with the same class: the same answers, or a named defect.

Each test sends its request to all pairs of servers, and a failure names those that it found.

`SAME` holds what must not differ. `DIFFERENCES` holds what differs because the SDK's server is wrong by the contract: each
entry is asserted on both sides, so that it fails on the day that the SDK mends it.
"""
import contextlib
import http.client
import json
import sys
from pathlib import Path
from typing import Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union
from urllib.parse import quote, unquote

import pytest

from harness import Response, Runtime, SDKServer, Server, make_payload
from standin import BASE_PATH, Behaviour, Recorded, StandInTarget
from test_reading import CHUNK, WHOLE, make_chunked, make_object

SOURCE = '''
from aistore.sdk.errors import InvalidPipelineError
from aistore.sdk.etl.webserver.{module} import {base}

class Many({base}):
    def get_mime_type(self):
        return "text/x-same"
    def fail(self, etl_args):
        if etl_args == "fail":
            raise ValueError("validation failed")
        if etl_args == "missing":
            raise FileNotFoundError(2, "no such file", "model.bin")
        if etl_args == "pipeline":
            raise InvalidPipelineError("no such pipeline")

class Buffered(Many):
    def transform(self, data, path, etl_args):
        self.fail(etl_args)
        if etl_args in ("nothing", "none"):
            return b"" if etl_args == "nothing" else None
        return "/".join((path, etl_args, "")).encode() + data

class Streaming(Many):
    def transform_stream(self, reader, path, etl_args):
        self.fail(etl_args)
        if etl_args == "nothing":
            return
        yield "/".join((path, etl_args, "")).encode()
        if etl_args == "later":
            raise ValueError("validation failed")
        yield from iter(lambda: reader.read(65536), b"")
'''
BASES = {"threaded": ("HTTPMultiThreadedServer", "http_multi_threaded_server"),
         "fastapi": ("FastAPIServer", "fastapi_server"), "flask": ("FlaskServer", "flask_server")}
IS_OLD_SDK = sys.version_info < (3, 10)  # 1.24, the last one for Python 3.9; else 2.0
UNAME = "/ais%2F@%23%2Fbck%2F"
LARGE = b"0123456789abcdef" * 65536


class Pair(NamedTuple):
    """The SDK's own server and the runtime, which serve the same class and have the same target."""

    kind: str
    mode: str
    upstream: SDKServer
    ours: Runtime

    @property
    def name(self) -> str:
        """The base, and how its class transforms."""
        return "%s %s" % (self.kind, self.mode)

    def result(self, raw_path: str, etl_args: str, content: bytes) -> bytes:
        """Return what the class makes of an object; the threaded base gives it the path as it came."""
        path = raw_path if self.kind == "threaded" else unquote(raw_path)[1:]
        return ("%s/%s/" % (path, etl_args)).encode() + content


Pairs = List[Pair]


class Files(NamedTuple):
    """Queries that name files: an object's, one that is missing, and one outside of AIStore's layout."""

    object: str
    missing: str
    private: str
    environ: str


def behave(head: Recorded) -> Behaviour:
    """Have the target fail for objects that are called for it."""
    behaviours = {
        "/302": Behaviour(status=302, headers=(("Location", BASE_PATH + UNAME + "obj"),)),
        "/206": Behaviour(status=206, body=b"a part"),
        "/short": Behaviour(status=200, body=b"short", declared=100),
        **{target: Behaviour(status=int(target[1:])) for target in REFUSED},
    }
    return behaviours.get(head.path[len(BASE_PATH):], Behaviour())


@pytest.fixture(scope="module")
def shared_target() -> Iterator[StandInTarget]:
    """One stand-in for all tests of this file."""
    target = StandInTarget()
    target.default = behave
    for name in ("obj", "a%20b", "a;v=1", "a%3Bv%3D1", "a", "a+b", "a%2Bb", "100%25", "%E2%82%AC", "a@b"):
        target.objects[UNAME + name] = b"content of " + name.encode()
    target.objects[UNAME + "large"] = LARGE
    target.objects[UNAME + "empty"] = b""
    target.objects["/docs"] = b"content of docs"
    yield target
    target.close()
    assert target.complaints == []


def start_pair(kind: str, mode: str, target: StandInTarget, stack: contextlib.ExitStack) -> Pair:
    """Start both servers for a class; the stack ends them."""
    base, module = BASES[kind]
    source, name = SOURCE.format(base=base, module=module), mode.capitalize()
    env = {"AIS_TARGET_URL": target.url}
    upstream = stack.enter_context(SDKServer(source, name, kind, 1, env))
    upstream.expect_traceback = True
    env = {**env, "ETL_CLASS_PAYLOAD": make_payload(source, name), "NUM_WORKERS": "1"}
    return Pair(kind, mode, upstream, stack.enter_context(Runtime(env=env, expect_traceback=True)))


@pytest.fixture(scope="module")
def pairs(shared_target: StandInTarget) -> Iterator[Pairs]:
    """Each base, with a class that transforms whole objects and with one that transforms in pieces."""
    with contextlib.ExitStack() as stack:
        yield [start_pair(kind, mode, shared_target, stack)
               for kind in BASES for mode in ("buffered", "streaming")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files for all tests of this module."""
    mountpath = tmp_path_factory.mktemp("mountpath")
    stored = make_object(mountpath, name="dir/a b+c%20d;v=1", content=b"content of the file")
    (mountpath / "private").write_bytes(b"private")
    return Files(fqn(stored), fqn(str(stored) + "x"), fqn(mountpath / "private"), fqn("/proc/self/environ"))


def fqn(path: Union[str, Path]) -> str:
    """Make the parameter that names a file, escaped as a target does it."""
    return "etl_fqn=" + quote(quote(str(path), safe="$&+=:@"), safe="")


class Seen(NamedTuple):
    """What a client sees: a status, or the name of an exception; and a body if that is a success."""

    status: Union[int, str]
    body: bytes = b""


def look(server: Server, case: "Case", files: Files) -> Seen:
    """Send a case's request to a server."""
    target = case.target.format(**files._asdict())
    try:
        response = server.request(case.method, target, case.body)
    except (http.client.HTTPException, ConnectionError) as error:
        # how a server that hangs up shows, by its end or by a reset, depends on who was faster
        return Seen("RemoteDisconnected" if isinstance(error, ConnectionError) else type(error).__name__)
    return Seen(response.status, response.body if response.status < 300 else b"")


class Case(NamedTuple):
    """A request. The target may name the queries of `Files` in braces; a list is a body in chunks."""

    method: str
    target: str
    body: Union[bytes, List[bytes], None] = None


REFUSED = ["/404", "/403", "/500", "/503"]
PUSHED = [
    "obj?etl_args=x", "obj?etl_args=+a%2Bb+c%20%20", "obj?etl_args=%7B%22a%22%3A+%5B1%2C2%5D%7D",
    "obj", "obj?uuid=1&etl_args=x&y=2", "obj?etl_args=%C3%BC%E2%82%AC", "obj?etl_args=", "obj?etl_args",
    "obj?etl_args=a%26b%3Dc%3Fd%23e", "obj?etl_args=nothing", "a%20b", "a+b", "a%2Bb", "100%25",
    "a%2520b", "%E2%82%AC", "a%3Fb%23c", "a@b:c,d=e&f", "q?x=1", "a%2Fb/c", "../obj", "%FF", "dir/",
]
PULLED = [
    "obj?{object}", "obj?etl_args=x&{object}", "obj?{missing}", "obj?latest-ver=true",
    "obj?etl_fqn=", "obj?etl_args=x&uuid=1", "obj", "obj?etl_args=+x", "a%20b", "100%25", "%E2%82%AC",
    "a@b", "large", "empty", "missing",
]
SAME = [
    *(Case("PUT", "/bck/" + target, b"content") for target in PUSHED),
    *(Case("GET", UNAME + target) for target in PULLED),
    *(Case("GET", target) for target in ("/health", "/", *REFUSED)),
    Case("PUT", "/bck/obj", b""), Case("PUT", "/bck/obj"), Case("PUT", "/bck/obj", LARGE),
    Case("PUT", "http://pod:8000/bck/obj", b"content"), Case("PUT", "/bck/obj?{object}"),
    Case("PUT", "/bck/obj?{object}&etl_args=x", b"not this"), Case("PUT", "/bck/obj?{missing}"),
]


def look_at_both(pair: Pair, case: Case, files: Files) -> Tuple[Seen, Seen]:
    """Send a case's request to ours and to the SDK's server."""
    return look(pair.ours, case, files), look(pair.upstream, case, files)


@pytest.mark.parametrize("case", SAME, ids=["%s %.50s" % case[:2] for case in SAME])
def test_answers_are_those_of_the_sdks_servers(pairs: Pairs, files: Files, case: Case) -> None:
    seen = {pair.name: look_at_both(pair, case, files) for pair in pairs}
    if IS_OLD_SDK and case.target in (*REFUSED, UNAME + "missing"):
        for name in ("flask buffered", "flask streaming"):  # they answer 502
            assert seen.pop(name)[0] == seen["fastapi buffered"][0]
    assert {name: both for name, both in seen.items() if both[0] != both[1]} == {}


@pytest.mark.parametrize("chunks", [[b"a", b"bc"], [LARGE], []], ids=["pieces", "large", "empty"])
def test_a_chunked_body_is_read_as_by_fastapi_and_flask_and_the_threaded_server_cannot(
        pairs: Pairs, files: Files, chunks: List[bytes]) -> None:
    for pair in pairs:
        ours, upstream = look_at_both(pair, Case("PUT", "/bck/obj", chunks), files)
        whole = Seen(200, pair.result("/bck/obj", "", b"".join(chunks)))
        assert ours == whole, pair.name
        if pair.kind != "threaded":
            assert upstream == whole, pair.name
        elif IS_OLD_SDK:
            assert upstream == Seen(200, pair.result("/bck/obj", "", b""))  # the object is lost
        else:
            assert upstream.status in (501, "ConnectionResetError", "RemoteDisconnected")


# == Differences ==

ANY = b"any body"
Where = Mapping[str, Seen]


class Difference(NamedTuple):
    """A request that the SDK's servers answer wrongly, what they answer, and what the contract says.

    `upstream` has a key "kind", "kind mode", "mode" or "" for any; a server that it does not tell of is right.
    A body may hold `{path}`, the path as the class gets it.
    """

    defect: str
    case: Case
    upstream: Where
    ours: Where


DIFFERENCES = [
    Difference("a file outside of AIStore's layout is read for whoever asks", Case("PUT", "/bck/obj?{private}"),
               {"": Seen(200, b"{path}//private")}, {"": Seen(403)}),
    Difference("the container's secrets are read for whoever asks", Case("GET", "/bck/obj?{environ}"),
               {"": Seen(200, ANY)}, {"": Seen(403)}),
    Difference("the latest version is not asked for where there is a file", Case("GET", UNAME + "obj?latest-ver=true&{object}"),
               {"": Seen(200, b"{path}//content of the file")}, {"": Seen(200, b"{path}//content of obj")}),
    Difference("a question mark in a pushed name hides the path, and the object is read as empty",
               Case("PUT", "/bck/q?x=1?{object}"),
               {"": Seen(200, b"{cut path}//")}, {"": Seen(200, b"{path}//content of the file")}),
    Difference("a name with a semicolon loses what follows it", Case("PUT", "/bck/a;v=1", b"content"),
               {"threaded": Seen(200, b"/bck/a//content")}, {"": Seen(200, b"{path}//content")}),
    Difference("another object than the one that was asked for is read", Case("GET", UNAME + "a;v=1"),
               {"threaded": Seen(200, UNAME.encode() + b"a//content of a"),
                "": Seen(200, b"{path}//content of a%3Bv%3D1")}, {"": Seen(200, b"{path}//content of a;v=1")}),
    Difference("the path is unquoted and quoted again", Case("GET", UNAME + "a+b"),
               {"fastapi": Seen(200, b"{path}//content of a%2Bb"), "flask": Seen(200, b"{path}//content of a%2Bb")},
               {"": Seen(200, b"{path}//content of a+b")}),
    Difference("a file that user code misses is told as a missing object, which a job skips in silence",
               Case("PUT", "/bck/obj?etl_args=missing", b"content"),
               {"buffered": Seen(404), "threaded streaming": Seen(200, ANY), "flask streaming": Seen("RemoteDisconnected"),
                "fastapi streaming": Seen(500)},
               {"": Seen(500)}),
    Difference("a stream that fails at once is answered 200 with an error page, or not at all",
               Case("PUT", "/bck/obj?etl_args=fail", b"content"),
               {"threaded streaming": Seen(200, ANY)}, {"": Seen(500)}),
    Difference("an error page is written into an object that fails half-way", Case("PUT", "/bck/obj?etl_args=later", b"content"),
               {"threaded streaming": Seen(200, ANY)}, {"streaming": Seen("IncompleteRead"), "buffered": Seen(200, ANY)}),
    Difference("an error page is written into an object that the target cuts short", Case("GET", "/short"),
               {"threaded streaming": Seen(200, ANY)}, {"streaming": Seen("IncompleteRead"), "buffered": Seen(502)}),
    Difference("an error of a pipeline that a stream raises has no status", Case("PUT", "/bck/obj?etl_args=pipeline", b"content"),
               {"threaded streaming": Seen(200, ANY), "fastapi streaming": Seen(500), "flask streaming": Seen(500)},
               {"": Seen(400)}),
    Difference("a part of an object is taken for the object", Case("GET", "/206"),
               {"threaded buffered": Seen(206, ANY), "": Seen(200, b"{path}//a part")}, {"": Seen(502)}),
    Difference("a redirect takes the secret elsewhere", Case("GET", "/302"),
               {"fastapi buffered": Seen(302), "": Seen(200, b"{path}//content of obj")}, {"": Seen(502)}),
    Difference("a result that is none is taken for an empty object", Case("PUT", "/bck/obj?etl_args=none", b"content"),
               {"flask buffered": Seen(200)}, {"buffered": Seen(500), "streaming": Seen(200, ANY)}),
    Difference("a download cannot be asked for", Case("POST", "/download?object_to=x", b""),
               {"threaded": Seen(501), "": Seen(405)}, {"": Seen(400)}),
    Difference("an unknown method is not told which ones there are", Case("DELETE", "/bck/obj"),
               {"threaded": Seen(501)}, {"": Seen(405)}),
    Difference("the health of the pod is transformed as an object", Case("PUT", "/health", b"content"),
               {"": Seen(200, b"{path}//content")}, {"": Seen(405)}),
    Difference("an object without a name is transformed", Case("PUT", "/", b"content"),
               {"threaded": Seen(200, b"{path}//content"), "fastapi": Seen(200, b"{path}//content")}, {"": Seen(404)}),
    Difference("an object is hidden by the documentation of the framework", Case("GET", "/docs"),
               {"fastapi": Seen(200, ANY)}, {"": Seen(200, b"{path}//content of docs")}),
]


def expected(where: Where, pair: Pair, case: Case) -> Optional[Seen]:
    """Pick what is told of a server, the most special first, and put the paths into its body."""
    keys = (pair.name, pair.kind, pair.mode, "")
    told = next((where[key] for key in keys if key in where), None)
    cut = case.target.partition("?")[0]
    raw = case.target.rpartition("?{")[0] if case.method == "PUT" and "?{" in case.target else cut
    for name, path in ((b"{path}//", raw), (b"{cut path}//", cut)):
        told = told and Seen(told.status, told.body.replace(name, pair.result(path, "", b"")))
    return told


def agrees(actual: Seen, wanted: Seen) -> bool:
    """Tell whether what was seen is what was expected."""
    return actual.status == wanted.status and (wanted.body == ANY or actual.body == wanted.body)


# How an SDK's server cuts an answer depends on whether its head has left before the failure.
CUTS = ("IncompleteRead", "RemoteDisconnected")


def agrees_or_is_cut(actual: Seen, wanted: Seen) -> bool:
    """Tell the same of an SDK's server, whose cut answer may show in either way."""
    return agrees(actual, wanted) or (wanted.status in CUTS and actual.status in CUTS)


@pytest.mark.parametrize(
    "difference", DIFFERENCES, ids=["%s %.40s" % each.case[:2] for each in DIFFERENCES])
def test_the_runtime_is_right_where_the_sdk_is_wrong(
        pairs: Pairs, files: Files, difference: Difference) -> None:
    for pair in pairs:
        right = expected(difference.ours, pair, difference.case)
        assert right
        wrong = expected(difference.upstream, pair, difference.case) or right
        ours, upstream = look_at_both(pair, difference.case, files)
        assert agrees(ours, right), (pair.name, difference.defect, ours, right)
        assert agrees_or_is_cut(upstream, wrong), (pair.name, difference.defect, upstream, wrong)


def ask_both(pair: Pair, target: str) -> List[Response]:
    """Return the whole answers of ours and of the SDK's server to a PUT."""
    return [server.request("PUT", target, b"content") for server in (pair.ours, pair.upstream)]


def test_errors_are_told_in_the_form_that_aistore_documents_which_is_fastapis(pairs: Pairs) -> None:
    for pair in pairs:
        ours, upstream = ask_both(pair, "/bck/obj?etl_args=fail")
        assert json.loads(ours.body) == {"detail": "Processing error: validation failed"}, pair.name
        if pair.mode == "buffered":
            is_same = (upstream.status, upstream.body) == (ours.status, ours.body)
            assert is_same is (pair.kind == "fastapi"), (pair.name, upstream)


def test_an_object_in_chunks_is_read_whole_and_upstream_takes_its_first_chunk_for_it(
        pairs: Pairs, tmp_path: Path, shared_target: StandInTarget) -> None:
    shared_target.objects[UNAME + "chunked"] = WHOLE
    try:
        stored = make_chunked(tmp_path, name="chunked")
    except (OSError, AttributeError):
        pytest.skip("no attributes of users on this file system")
    for pair in pairs:
        ours, upstream = ask_both(pair, "/bck/chunked?" + fqn(stored))
        assert ours.body == pair.result("/bck/chunked", "", WHOLE), pair.name
        assert upstream.body == pair.result("/bck/chunked", "", CHUNK), pair.name
