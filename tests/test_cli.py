"""`serve` lets a user try a class on a laptop with nothing installed, and says what it does."""
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Sequence
from urllib.parse import quote

import pytest

import ais_runtime_min
from ais_runtime_min import Exit
from harness import RUNTIME, Environ, Finished, Runtime, Server, interpreter, run_to_end, started

ETLS = Path(__file__).resolve().parent / "etls"
StartServe = Callable[..., Runtime]
ALONE: Environ = {"AIS_TARGET_URL": None, "PORT": None}
IMPORT = "from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer\n"
UPPER = """
class Upper(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return data.upper()
"""


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has nothing installed."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    subprocess.run([interpreter("slim"), "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return str(folder / "bin" / "python")


@pytest.fixture
def serve(start_runtime: Callable[..., Runtime], bare_python: str) -> StartServe:
    """A function that starts `serve` with some arguments, on any port and without a target."""

    def start(*args: object, env: Optional[Environ] = None) -> Runtime:
        words = ["serve", *map(str, args), "--port", "0"]
        return start_runtime(None, {**ALONE, **(env or {})}, words, bare_python)

    return start


@pytest.fixture(scope="module")
def upper(bare_python: str, etls: Path) -> Iterator[Runtime]:
    """`serve` with upper.py and nothing else, for tests that leave it as it is."""
    with Runtime(["serve", str(etls / "upper.py"), "--port", "0"], ALONE, bare_python) as runtime:
        yield runtime


def end(python: str, *args: object, env: Optional[Environ] = None) -> Finished:
    """Run a command line that is to end at once, by itself and without a traceback."""
    done = run_to_end(list(map(str, args)), {"AIS_TARGET_URL": None, **(env or {})}, python=python)
    assert "Traceback" not in "\n".join(done.lines), "\n".join(done.lines)
    return done


def assert_told(done: Finished, code: int, *words: str) -> None:
    """Check that a command line ended with this code and a last line of these words."""
    assert done.code == code and done.last_line.startswith("ais_runtime_min: "), done
    assert [word for word in words if word not in done.last_line] == [], done


def curl_lines(runtime: Server) -> List[str]:
    """Return the two commands that the user is told to try."""
    runtime.wait_for_line(r"curl.*/health")
    return [line for line in runtime.lines if "curl " in line]


def run_line(line: str) -> bytes:
    """Run a line as a user does, in a shell."""
    if not shutil.which("curl"):
        pytest.skip("this machine has no curl")
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stderr) == (0, b""), line
    return done.stdout


# == The examples, those of tests/etls that need no packages ==

PACKED = gzip.compress(b"hello" * 100000) + gzip.compress(b"!")
EXAMPLES = {  # file: its class, what `echo hello` becomes, and a query, an object and its result
    "upper.py": ("Upper", b"HELLO\n", "", b"a", b"A"),
    "line_count.py": ("LineCount", b"1", "", b"a\nb\n", b"2"),
    "hash_with_args.py": (
        "HashWithArgs", b'"5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"',
        "?etl_args=md5", b"hello", b'"digest": "5d41402abc4b2a76b9719d911017c592"'),
    # no gzip, and a package that is not installed: the answers say so
    "gunzip_stream.py": ("GunzipStream", b'{"detail":', "", PACKED, b"hello" * 100000 + b"!"),
    "thumbnail.py": ("Thumbnail", b"No module named 'PIL'", "", b"", b"No module named 'PIL'"),
}


@pytest.mark.parametrize("file", list(EXAMPLES))
def test_an_example_is_served_with_nothing_installed_and_the_printed_lines_work(
    serve: StartServe, etls: Path, file: str
) -> None:
    name, expected, query, data, result = EXAMPLES[file]
    runtime = serve(etls / file)
    runtime.expect_traceback = name in ("GunzipStream", "Thumbnail")
    where = name, re.escape(str(etls / file)), runtime.port
    runtime.wait_for_line(r"^serving %s from %s on http://127\.0\.0\.1:%d$" % where)
    put, health = curl_lines(runtime)
    assert expected in run_line(put)
    assert run_line(health) == b"Running"
    assert result in runtime.request("PUT", "/bucket/object" + query, data).body


# == Picking the class ==

LOUDER = """
class Louder(Upper):
    def transform(self, *args):
        return super().transform(*args) + b"!"
"""
LOWER = UPPER.replace("Upper", "Lower").replace("upper", "lower")
TWO = IMPORT + UPPER + LOWER + "VALUE = 1\nclass Other: pass\n"
JSON = IMPORT + UPPER.replace("data.upper()", "__import__('json').dumps(data.decode().upper())")


@pytest.mark.parametrize("file, source, expected", [
    ("two.py:Lower", TWO, b"hello"),
    ("family.py:Louder", IMPORT + UPPER + LOUDER, b"HELLO!"),
    ("mine.py", "from neighbour import Upper\nclass Mine(Upper):\n    pass\n", b"HELLO"),
    ("json.py", JSON, b'"HELLO"'),  # beside Python's
    ("mine.py", "from ais_runtime_min import HTTPMultiThreadedServer\n" + UPPER, b"HELLO"),
], ids=["two classes", "a base", "a neighbour", "a module's name", "the runtime"])
def test_a_file_may_have_more_than_the_class(
    serve: StartServe, tmp_path: Path, file: str, source: str, expected: bytes
) -> None:
    (tmp_path / "neighbour.py").write_text(IMPORT + UPPER)
    (tmp_path / file.partition(":")[0]).write_text(source)
    assert serve(tmp_path / file).request("PUT", "/bucket/object", b"Hello").body == expected


IDLE = "class Idle(HTTPMultiThreadedServer):\n    pass\n"


@pytest.mark.parametrize("source, wanted, code, words", [
    (TWO, "", Exit.USAGE, ["Lower", "Upper"]), (TWO, ":", Exit.USAGE, ["Lower", "Upper"]),
    (TWO, ":Nonesuch", Exit.USAGE, ["Nonesuch"]), (TWO, ":Other", Exit.DATA, ["Other"]),
    (TWO, ":VALUE", Exit.DATA, ["int"]), ("", "", Exit.USAGE, ["none"]), (IMPORT, "", Exit.USAGE, ["none"]),
    ("class NotAnETL:\n    pass\n", "", Exit.USAGE, ["none"]),
    (IMPORT + IDLE, "", Exit.DATA, ["Idle", "transform()", "transform_stream()"]),
    ("\n1 / 0\n", "", Exit.SOFTWARE, ["ZeroDivisionError: division by zero"]),
    ("class:\n", "", Exit.SOFTWARE, ["SyntaxError: invalid syntax"]),
    ("raise SystemExit(0)\n", "", Exit.SOFTWARE, ["SystemExit"]),
    ("import no_such_module\n", "", Exit.UNAVAILABLE, ["no_such_module"]),
    ("import PIL.Image\n", "", Exit.UNAVAILABLE, ["PIL", "Pillow"]),
    ("from aistore.sdk import Client\n", "", Exit.UNAVAILABLE, ["Client", "aistore"]),
    ("from aistore.sdk.bucket import Bucket\n", "", Exit.UNAVAILABLE, ["aistore.sdk.bucket", "aistore"]),
])
def test_a_file_without_a_class_to_serve_is_told(
    bare_python: str, tmp_path: Path, source: str, wanted: str, code: Exit, words: Sequence[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    done = run_to_end(["serve", str(file) + wanted], {"AIS_TARGET_URL": None}, python=bare_python)
    assert_told(done, code, *words)
    assert code in (Exit.SOFTWARE, Exit.UNAVAILABLE) or "Traceback" not in "\n".join(done.lines)
    assert RUNTIME.name not in "\n".join(line for line in done.lines if line.startswith('  File "'))


# == The command line ==


@pytest.mark.parametrize("line, words", [
    ("serve nonesuch.py", ["there is no file 'nonesuch.py'"]), ("serve /", ["there is no file '/'"]),
    ("serve nonesuch.py:Upper", ["there is no file 'nonesuch.py'"]),
    ("serve /etc/hostname", ["hostname is no Python file"]),
    ("serve UPPER --port=http", ["--port", "65535"]), ("serve UPPER --port=-1", ["--port", "65535"]),
    ("serve UPPER --port=65536", ["--port", "65535"]), ("serve UPPER --workers=0", ["--workers", "256"]),
    ("serve UPPER --workers=many", ["--workers", "256"]), ("serve UPPER --threads=0", ["--threads", "1024"]),
    ("serve UPPER --threads=1.5", ["--threads", "1024"]), ("serve UPPER --nonesuch", ["--nonesuch"]),
    ("serve UPPER --target no/such/folder", ["--target", "a folder"]),
    ("serve UPPER --target ftp://host/", ["--target", "file:///folder"]),
    ("serve UPPER --target file:///no/such/folder", ["--target", "file:///folder"]),
    ("serve UPPER --target http://user:s3cret@host/", ["--target", "without user and password"]),
    ("serve UPPER --target ", ["--target"]),
    ("nonesuch", []), ("serve", []), ("--nonesuch", []), ("install numpy", []),
    ("health", []),
])
def test_a_command_line_that_cannot_be_used_is_told(
    bare_python: str, etls: Path, line: str, words: Sequence[str]
) -> None:
    done = end(bare_python, *line.replace("UPPER", str(etls / "upper.py")).split(" "))
    assert_told(done, Exit.USAGE, *words)


@pytest.mark.parametrize("line, words", [
    ("--version", [ais_runtime_min.__version__]),
    ("--help", ["usage: ais_runtime_min", "serve", "install", "--version"]),
    ("install --help", ["install", "OS_PACKAGES", "PACKAGES"]),
    ("serve --help", ["FILE[:CLASS]", "--target", "--host", "--port", "--workers", "--threads",
                      "127.0.0.1", "8000"]),
])
def test_help_tells_the_options_and_their_defaults(bare_python: str, line: str, words: List[str]) -> None:
    done = end(bare_python, *line.split(" "))
    assert (done.code, [word for word in words if word not in "\n".join(done.lines)]) == (Exit.OK, [])


# == The commands of images ==


@pytest.mark.parametrize("env, code, words", [
    ({"PACKAGES": "cloudpickle"}, Exit.OK, []),  # it is there
    ({"PACKAGES": "--upgrade"}, Exit.UNAVAILABLE, ["PACKAGES", "--upgrade"]),
    ({"OS_PACKAGES": "-x"}, Exit.UNAVAILABLE, ["OS_PACKAGES", "-x"]),
    ({"NUM_WORKERS": "x"}, Exit.CONFIG, ["NUM_WORKERS"]),
])
def test_the_install_command_installs_and_ends(
    slim_python: str, env: Environ, code: Exit, words: Sequence[str]
) -> None:
    done = end(slim_python, "install", env=env)
    assert (done.code, [word for word in words if word not in done.last_line]) == (code, [])
    assert code or done.lines == []


def test_serve_installs_nothing_and_tells_which_packages_are_missing(slim_python: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(IMPORT + UPPER)
    done = end(slim_python, "serve", tmp_path / "mine.py", env={"PACKAGES": "--upgrade"})
    assert_told(done, Exit.UNAVAILABLE, "PACKAGES")
    done = end(slim_python, "serve", tmp_path / "mine.py", env={"PACKAGES": "etl_probe"})
    assert_told(done, Exit.UNAVAILABLE, "PACKAGES", "pip install etl_probe")
    assert not any("installing" in line for line in done.lines)


AS_THE_SDK_HAS_IT = """
from aistore.sdk.etl.webserver.{name}_server import {base}
{before}
class Upper({base}):
    def transform(self, data, path, etl_args):
        return data.upper() + b" " + path.encode()

{name}_server = Upper(port=8000)
{name}_app = {name}_server.app
"""
LEAVE_A_THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
USE_IT = "assert {name}_app.debug is {name}_server.app.debug is False\n"
both = pytest.mark.parametrize("name, base", [("fastapi", "FastAPIServer"), ("flask", "FlaskServer")])


@both
@pytest.mark.parametrize("before", ["", LEAVE_A_THREAD], ids=["forked", "not forked"])
@pytest.mark.parametrize("group", ["bare", "sdk"])
def test_a_file_that_ends_as_the_sdk_prescribes_is_served_as_it_is(
    start_runtime: Callable[..., Runtime], bare_python: str, tmp_path: Path, name: str, base: str,
    before: str, group: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(AS_THE_SDK_HAS_IT.format(name=name, base=base, before=before))
    python = bare_python if group == "bare" else interpreter(group)
    runtime = start_runtime(None, ALONE, ["serve", str(file), "--port", "0", "--workers", "2"], python)
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    assert not any("installing" in line or "framework" in line for line in runtime.lines)


@both
def test_an_application_that_a_file_uses_when_it_is_loaded_is_made_then(
    start_runtime: Callable[..., Runtime], bare_python: str, tmp_path: Path, name: str, base: str
) -> None:
    file = tmp_path / "mine.py"
    text = AS_THE_SDK_HAS_IT + USE_IT
    file.write_text(text.format(name=name, base=base, before=""))
    runtime = start_runtime(None, ALONE, ["serve", str(file), "--port", "0"], interpreter("sdk"))
    assert runtime.request("PUT", "/bucket/object", b"hello").body == b"HELLO bucket/object"
    done = end(bare_python, "serve", file)
    assert_told(done, Exit.UNAVAILABLE, "the class needs %s: pip install '%s>=" % (name, name))


@pytest.mark.parametrize("name, base, hook, packages", [
    ("fastapi", "FastAPIServer", "async def startup_event(self): pass", "'fastapi>=0.110' 'uvicorn[standard]>=0.29'"),
    ("flask", "FlaskServer", "def _register_routes(self): pass", "'flask>=3.0'"),
    ("fastapi", "FastAPIServer", "x = property(lambda self: self.app)\n    def __init__(self):\n"
     "        super().__init__()\n        self.x", "'fastapi>=0.110' 'uvicorn[standard]>=0.29'")])
def test_a_framework_that_the_class_needs_is_told_and_not_installed(
    bare_python: str, tmp_path: Path, name: str, base: str, hook: str, packages: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "from aistore.sdk.etl.webserver.%s_server import %s\nclass Mine(%s):\n    %s\n"
        "    def transform(self, data, path, etl_args):\n        return data\n" % (name, base, base, hook))
    done = end(bare_python, "serve", tmp_path / "mine.py")
    assert_told(done, Exit.UNAVAILABLE, "the class needs %s: pip install %s" % (name, packages))
    assert not any("installing" in line for line in done.lines)


# == Where it listens ==


def test_only_this_machine_can_connect_unless_a_host_is_given(
    serve: StartServe, upper: Runtime, bare_python: str, etls: Path
) -> None:
    assert upper.request("GET", "/health").status == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", upper.port), timeout=5)  # any address but 127.0.0.1
    if socket.has_ipv6:
        with pytest.raises(OSError):
            socket.create_connection(("::1", upper.port), timeout=5)
    runtime = serve(etls / "upper.py", "--host", "127.0.0.2")
    runtime.wait_for_line(r"on http://127\.0\.0\.2:%d" % runtime.port)
    socket.create_connection(("127.0.0.2", runtime.port), timeout=5).close()
    done = end(bare_python, "serve", etls / "upper.py", "--port", upper.port)
    assert_told(done, Exit.SYSTEM, "port %d of 127.0.0.1" % upper.port, "in use")


# == A folder that stands in for a target ==


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of objects, beside a file that is none of them."""
    objects = tmp_path_factory.mktemp("target") / "my objects"
    bucket, outside = objects / "bucket", objects.parent
    (bucket / "dir").mkdir(parents=True)
    (bucket / "dir" / "object").write_bytes(b"below")
    (bucket / "a b;v=1'%?.txt").write_bytes(b"strange")
    for name, end in (("inside", "dir/object"), ("outside", outside / "secret"), ("up", outside)):
        (bucket / name).symlink_to(end)
    (outside / "my objects too").mkdir()
    for file in (outside / "secret", outside / "my objects too" / "secret"):
        file.write_bytes(b"secret")
    return objects


@pytest.fixture(scope="module")
def with_folder(bare_python: str, etls: Path, folder: Path) -> Iterator[Runtime]:
    """`serve` with the folder as its target."""
    words = ["serve", str(etls / "upper.py"), "--port", "0", "--target", str(folder)]
    with Runtime(words, ALONE, bare_python) as runtime:
        yield runtime


FOUND = {  # by their paths
    "/bucket/dir/object": b"BELOW", "/bucket%2Fdir%2Fobject": b"BELOW", "/bucket/inside": b"BELOW",
    "/ais%2f%40%23%2fbucket%2fdir%2fobject": b"BELOW",
    "/s3%2F@%23%2Fbucket%2Fdir%2Fobject": b"BELOW",
    "/ais%2F@uuid%23space%2Fbucket%2Fdir%2Fobject": b"BELOW",
    "/bucket/a%20b%3Bv%3D1%27%25%3F.txt": b"STRANGE",
}
NOT_FOUND = {
    "/bucket/dir/nonesuch": 404, "/nonesuch/object": 404, "/bucket/dir/object/below": 404,
    "/bucket/dir": 403, "/bucket/outside": 403, "/bucket/up/secret": 403, "/bucket/../../secret": 403,
    "/%2E%2E%2Fsecret": 403, "/../my%20objects%20too/secret": 403, "/ais%2F@%23%2F..%2Fsecret": 403,
    "//etc/hostname": 404, "/%2Fetc%2Fhostname": 404, "/ais%2F@%23%2F%2Fetc%2Fhostname": 403,
    "/bucket/dir/object%00": 403,
}


def test_objects_are_read_under_the_folder_and_nowhere_else(with_folder: Runtime) -> None:
    assert {path: with_folder.request("GET", path).body for path in FOUND} == FOUND
    answers = {path: with_folder.request("GET", path) for path in NOT_FOUND}
    assert {path: answer.status for path, answer in answers.items()} == NOT_FOUND
    for path, answer in answers.items():
        assert "detail" in json.loads(answer.body)
        assert b"secret" not in answer.body.lower().replace(path.lower().encode(), b"")
    # what is outside of the folder is not told from what is not there
    for way in ("/..%2f", "/bucket%2f..%2f..%2f", "/bucket/up/", "/nonesuch/../../", "/../"):
        there, missing = (with_folder.request("GET", way + name) for name in ("secret", "nothing"))
        assert there.status == missing.status == 403, way
        assert json.loads(there.body) == json.loads(missing.body), way


def test_a_path_is_read_under_the_folder_and_nowhere_else(
    with_folder: Runtime, upper: Runtime, folder: Path, tmp_path: Path
) -> None:
    def ask(runtime: Runtime, method: str, path: object) -> bytes:
        answer = runtime.request(method, "/bucket/object?etl_fqn=" + quote(quote(str(path)), safe=""))
        return answer.body if answer.status == 200 else b"%d" % answer.status

    like_an_object = tmp_path / "@ais/bck/%ob/obj"
    like_an_object.parent.mkdir(parents=True)
    like_an_object.write_bytes(b"content")
    forbidden: Sequence[object] = (
        "/etc/hostname", "/proc/self/environ", folder.parent / "secret", "%s/../secret" % folder,
        "%s too/secret" % folder, folder / "bucket/outside", folder / "bucket/up/secret",
        folder / "bucket/dir", folder, like_an_object)
    for method in ("GET", "PUT"):
        assert ask(with_folder, method, folder / "bucket/dir/object") == b"BELOW"
        for runtime in (with_folder, upper):
            got = {path: ask(runtime, method, path) for path in forbidden}
            assert got == dict.fromkeys(forbidden, b"403")
    missing = upper.request("GET", "/bucket/object")
    assert missing.status == 404 and b"--target" in missing.body


def test_the_environment_may_name_the_folder_unless_an_option_does(
    serve: StartServe, etls: Path, folder: Path, tmp_path: Path
) -> None:
    named = serve(etls / "upper.py", env={"AIS_TARGET_URL": "file://%s/" % quote(str(folder))})
    env = {"AIS_TARGET_URL": "file://" + quote(str(tmp_path))}
    for runtime in (named, serve(etls / "upper.py", "--target", os.path.relpath(str(folder)), env=env)):
        assert runtime.request("GET", "/bucket/dir/object").body == b"BELOW"
        assert runtime.request("GET", "/../secret").status == 403


# == Its end ==


@pytest.mark.parametrize("number, send, workers", [
    (signal.SIGINT, os.killpg, 3),  # as a terminal does
    (signal.SIGINT, os.kill, 1), (signal.SIGTERM, os.killpg, 1), (signal.SIGTERM, os.kill, 3),
])
def test_a_signal_ends_it_well(
    serve: StartServe, etls: Path, number: int, send: Callable[[int, int], None], workers: int
) -> None:
    runtime = serve(etls / "upper.py", "--workers", workers)
    with runtime.connect() as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
        send(runtime.pid, number)
        assert runtime.wait(15) == Exit.OK
    assert "ais_runtime_min: " not in runtime.log()


@pytest.mark.parametrize("number, codes", [(signal.SIGINT, (Exit.OK, 128 + signal.SIGINT)), (signal.SIGTERM, (Exit.OK,))])
def test_a_signal_while_the_file_is_imported_ends_it_without_a_traceback(
    bare_python: str, tmp_path: Path, number: int, codes: Sequence[int]
) -> None:
    file = tmp_path / "slow.py"
    file.write_text("import time\nprint('importing', flush=True)\nfor _ in range(600):\n    time.sleep(0.1)\n" + IMPORT + UPPER)
    words = ["serve", str(file), "--port", "0"]
    with Server(*started(bare_python, words, {"AIS_TARGET_URL": None})) as runtime:
        runtime.wait_for_line("importing")
        os.killpg(runtime.pid, number)
        assert runtime.wait(15) in codes
