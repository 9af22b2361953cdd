"""`serve` lets a user try a class on a laptop, with a Python that has nothing installed, and says what it does."""
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Sequence
from urllib.parse import quote

import pytest

import ais_runtime_min
from ais_runtime_min import WORKER_OPTION, Exit
from harness import RUNTIME, Environ, Finished, Runtime, Server, interpreter, run_to_end, started

StartServe = Callable[..., Runtime]
UPPER = "class Upper(HTTPMultiThreadedServer):\n    def transform(self, data, path, etl_args):\n        return data.upper()\n"
IMPORT = "from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer\n"
EXAMPLES = {  # file: its class, and what `echo hello` becomes
    "upper.py": ("Upper", b"HELLO\n"),
    "line_count.py": ("LineCount", b"1"),
    "hash_with_args.py": ("HashWithArgs", b'"5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"'),
    "gunzip_stream.py": ("GunzipStream", b'{"detail":'),  # it is no gzip, and the answer says so
    "thumbnail.py": ("Thumbnail", b"No module named 'PIL'"),  # which is not installed, and the answer says so
}


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
        return start_runtime(None, {"AIS_TARGET_URL": None, "PORT": None, **(env or {})}, words, bare_python)

    return start


@pytest.fixture(scope="module")
def upper(bare_python: str, etls: Path) -> Iterator[Runtime]:
    """`serve` with upper.py and nothing else, for tests that leave it as it is."""
    env = {"AIS_TARGET_URL": None, "PORT": None}
    with Runtime(["serve", str(etls / "upper.py"), "--port", "0"], env, bare_python) as runtime:
        yield runtime


def serve_in_vain(python: str, *args: object, env: Optional[Environ] = None) -> Finished:
    """Run a command line that is to end at once, by itself and without a traceback."""
    variables = {"AIS_TARGET_URL": None, **(env or {})}
    done = run_to_end([str(arg) for arg in args], variables, python=python)
    assert "Traceback" not in "\n".join(done.lines), "\n".join(done.lines)
    return done


def assert_told(done: Finished, codes: Sequence[int], words: Sequence[str]) -> None:
    """Check that a command line ended with one of these codes and a last line of these words."""
    assert done.last_line.startswith("ais_runtime_min: "), done
    assert done.code in codes and [word for word in words if word not in done.last_line] == [], done


def curl_lines(runtime: Server) -> List[str]:
    """Return the two commands that the user is told to try."""
    runtime.wait_for_line(r"curl.*(/health|'$)")
    return [line for line in runtime.lines if "curl " in line]


def run_line(line: str) -> bytes:
    """Run a line as a user does, in a shell."""
    if not shutil.which("curl"):
        pytest.skip("this machine has no curl")
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stderr) == (0, b""), line
    return done.stdout


# == The examples ==


@pytest.mark.parametrize("file", EXAMPLES)
def test_an_example_is_served_with_nothing_installed_and_the_printed_lines_work(
    serve: StartServe, etls: Path, file: str
) -> None:
    name, expected = EXAMPLES[file]
    runtime = serve(etls / file)
    runtime.expect_traceback = name in ("GunzipStream", "Thumbnail")
    runtime.wait_for_line(r"^serving %s from %s on http://127\.0\.0\.1:%d$" % (name, re.escape(str(etls / file)), runtime.port))
    put, health = curl_lines(runtime)
    assert expected in run_line(put)
    assert run_line(health) == b"Running"


def test_every_example_of_the_folder_is_tried(etls: Path) -> None:
    assert {path.name for path in etls.glob("*.py")} == set(EXAMPLES)


def test_the_streaming_example_unpacks(serve: StartServe, etls: Path) -> None:
    packed = gzip.compress(b"hello" * 100000) + gzip.compress(b"!")
    assert serve(etls / "gunzip_stream.py").request("PUT", "/bucket/object", packed).body == b"hello" * 100000 + b"!"


def test_an_argument_of_the_request_reaches_the_example(serve: StartServe, etls: Path) -> None:
    response = serve(etls / "hash_with_args.py").request("PUT", "/bucket/object?etl_args=md5", b"hello")
    assert json.loads(response.body) == {"algorithm": "md5", "digest": "5d41402abc4b2a76b9719d911017c592"}
    assert response.headers["content-type"] == "application/json"


def test_packages_that_the_environment_names_are_installed(
    start_runtime: Callable[..., Runtime], slim_python: str, bare_python: str, tmp_path: Path
) -> None:
    own = tmp_path / "environment"
    shutil.copytree(str(Path(bare_python).parent.parent), str(own), symlinks=True)
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    lent, site = (subprocess.check_output([python, "-c", ask], universal_newlines=True).strip()
                  for python in (slim_python, str(own / "bin" / "python")))
    Path(site, "lent.pth").write_text(lent + "\n")
    info = "serve_probe-1.0.dist-info/"
    with zipfile.ZipFile(tmp_path / "serve_probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("serve_probe.py", 'ANSWER = b"installed"\n')
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: serve_probe\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    file = tmp_path / "probe.py"
    file.write_text("import serve_probe\n" + IMPORT + UPPER.replace("data.upper()", "serve_probe.ANSWER"))
    env = {"PACKAGES": "serve_probe", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull,
           "AIS_TARGET_URL": None, "PORT": None}
    runtime = start_runtime(None, env, ["serve", str(file), "--port", "0"], str(own / "bin" / "python"))
    assert runtime.request("PUT", "/bucket/object", b"").body == b"installed"


# == Picking the class ==


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """A file that defines two ETL classes."""
    file = tmp_path / "two_classes.py"
    file.write_text(IMPORT + UPPER + UPPER.replace("Upper", "Lower").replace("upper", "lower") + "VALUE = 1\nclass Other: pass\n")
    return file


def test_a_file_of_two_classes_is_served_by_the_named_one(serve: StartServe, two_classes: Path) -> None:
    assert serve("%s:Lower" % two_classes).request("PUT", "/bucket/object", b"Hello").body == b"hello"


IMPORTED_UPPER = "from neighbour import Upper\nclass Mine(Upper):\n    pass\n"
JSON = "__import__('json').dumps(data.decode().upper())"
LOUDER = """
class Louder(Upper):
    def transform(self, *args):
        return super().transform(*args) + b"!"
"""


@pytest.mark.parametrize("name, source, expected", [
    ("family.py", IMPORT + UPPER + LOUDER, b"HELLO!"),  # the class is served, not its base
    ("mine.py", IMPORTED_UPPER, b"HELLO"),
    ("json.py", IMPORT + UPPER.replace("data.upper()", JSON), b'"HELLO"'),  # beside Python's
    ("mine.py", "from ais_runtime_min import HTTPMultiThreadedServer\n" + UPPER, b"HELLO"),
], ids=["a base", "a neighbour", "a module's name", "the runtime"])
def test_a_file_may_have_a_base_a_neighbour_a_modules_name_and_import_the_runtime(
    serve: StartServe, tmp_path: Path, name: str, source: str, expected: bytes
) -> None:
    (tmp_path / "neighbour.py").write_text(IMPORT + UPPER)
    (tmp_path / name).write_text(source)
    assert serve(tmp_path / name).request("PUT", "/bucket/object", b"hello").body == expected


@pytest.mark.parametrize("wanted, words", [
    ("", ["Lower", "Upper"]), (":Nonesuch", ["Nonesuch"]), (":Other", ["Other"]), (":VALUE", ["int"]), (":", ["Lower", "Upper"]),
])
def test_a_class_that_cannot_be_picked_is_told(
    bare_python: str, two_classes: Path, wanted: str, words: Sequence[str]
) -> None:
    done = serve_in_vain(bare_python, "serve", str(two_classes) + wanted)
    assert_told(done, (Exit.USAGE, Exit.DATA), words)


@pytest.mark.parametrize("source, words", [
    ("", ["none"]), (IMPORT, ["none"]), ("class NotAnETL:\n    pass\n", ["none"]),
    (IMPORT + "class Idle(HTTPMultiThreadedServer):\n    pass\n", ["Idle", "transform()", "transform_stream()"]),
])
def test_a_file_without_a_class_to_serve_is_told(bare_python: str, tmp_path: Path, source: str, words: Sequence[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    assert_told(serve_in_vain(bare_python, "serve", file), (Exit.USAGE, Exit.DATA), words)


@pytest.mark.parametrize("source, code, words", [
    ("1 / 0\n", Exit.SOFTWARE, ["ZeroDivisionError: division by zero"]),
    ("class:\n", Exit.SOFTWARE, ["SyntaxError: invalid syntax"]),
    ("raise SystemExit(0)\n", Exit.SOFTWARE, ["SystemExit"]),
    ("import no_such_module\n", Exit.UNAVAILABLE, ["no_such_module"]),
    ("import yaml\n", Exit.UNAVAILABLE, ["yaml", "PyYAML"]),
    ("import PIL.Image\n", Exit.UNAVAILABLE, ["PIL", "Pillow"]),
    ("from aistore.sdk import Client\n", Exit.UNAVAILABLE, ["Client", "aistore"]),
    ("from aistore.sdk.bucket import Bucket\n", Exit.UNAVAILABLE, ["aistore.sdk.bucket", "aistore"]),
])
def test_a_file_that_cannot_be_imported_is_told(
    bare_python: str, tmp_path: Path, source: str, code: Exit, words: Sequence[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("\n" + source + IMPORT + UPPER)
    done = run_to_end(["serve", str(file)], {"AIS_TARGET_URL": None}, python=bare_python)
    assert_told(done, [code], words)
    assert RUNTIME.name not in "\n".join(line for line in done.lines if line.startswith('  File "'))


# == The command line ==


def test_a_file_that_is_not_there_or_no_python_is_told(bare_python: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("notes")
    for text in (str(tmp_path / "nonesuch.py"), "%s:Upper" % (tmp_path / "nonesuch.py"), str(tmp_path)):
        done = serve_in_vain(bare_python, "serve", text)
        assert done.code == Exit.USAGE
        assert done.last_line == "ais_runtime_min: there is no file %r" % text.replace(":Upper", "")
    done = serve_in_vain(bare_python, "serve", notes)
    assert_told(done, [Exit.USAGE], ["notes.txt is no Python file"])


@pytest.mark.parametrize("args, words", [
    ("--port=http", ["--port", "http"]), ("--port=-1", ["--port", "-1"]),
    ("--port=65536", ["--port", "65536"]), ("--workers=0", ["--workers", "0"]),
    ("--workers=many", ["--workers", "many"]), ("--threads=0", ["--threads", "0"]),
    ("--threads=1.5", ["--threads", "1.5"]), ("--nonesuch", ["--nonesuch"]),
    ("--target no/such/folder", ["a folder"]), ("--target ftp://host/", ["file:///folder"]),
    ("--target file:///no/such/folder", ["file:///folder"]),
])
def test_an_option_that_cannot_be_used_is_told(
    bare_python: str, etls: Path, args: str, words: Sequence[str]
) -> None:
    done = serve_in_vain(bare_python, "serve", etls / "upper.py", *args.split(" "))
    assert_told(done, [Exit.CONFIG if "://" in args else Exit.USAGE], words)


@pytest.mark.parametrize("line", [
    "nonesuch", "serve", "--nonesuch", "health 8000", "install numpy", "health --", "-- install",
    "health install",
])
def test_a_command_line_that_is_not_understood_is_told(bare_python: str, line: str) -> None:
    assert_told(serve_in_vain(bare_python, *line.split(" ")), [Exit.USAGE], [])


@pytest.mark.parametrize("words", [[], ["x"], ["[]"], ["{}"], ["5", "serve"]], ids=" ".join)
def test_the_option_of_workers_is_not_for_users(bare_python: str, words: Sequence[str]) -> None:
    done = serve_in_vain(bare_python, WORKER_OPTION, *words)
    assert (done.code, len(done.lines)) == (Exit.USAGE, 1), done
    assert WORKER_OPTION in done.last_line


def test_a_port_that_is_taken_is_told(bare_python: str, etls: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = serve_in_vain(bare_python, "serve", etls / "upper.py", "--port", port)
    assert_told(done, [Exit.SYSTEM], ["port %d of 127.0.0.1" % port, "in use"])


def test_the_version_is_told(bare_python: str) -> None:
    assert serve_in_vain(bare_python, "--version") == (Exit.OK, [ais_runtime_min.__version__], ais_runtime_min.__version__)


@pytest.mark.parametrize("args, words", [
    (["--help"], ["usage: ais_runtime_min", "serve", "health", "install", "--version"]),
    (["health", "--help"], ["health", "PORT", "exit code 0"]),
    (["install", "--help"], ["install", "OS_PACKAGES", "PACKAGES"]),
    (["serve", "--help"], ["FILE[:CLASS]", "--target", "--host", "--port", "--workers", "--threads", "127.0.0.1", "8000"]),
])
def test_help_tells_the_options_and_their_defaults(bare_python: str, args: Sequence[str], words: Sequence[str]) -> None:
    done = serve_in_vain(bare_python, *args)
    assert done.code == Exit.OK
    for word in words:
        assert word in "\n".join(done.lines)


# == The commands of images ==


def test_the_health_command_tells_a_pod_that_serves(upper: Runtime, bare_python: str) -> None:
    done = serve_in_vain(bare_python, "health", env={"PORT": str(upper.port)})
    assert done == (Exit.OK, ["Running"], "Running")


@pytest.mark.parametrize("answers", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 503 not yet\r\nContent-Length: 7\r\n\r\nnot yet"])
def test_the_health_command_tells_a_pod_that_does_not_serve(bare_python: str, answers: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer_once, args=(listener, answers))
        server.start()
        done = serve_in_vain(bare_python, "health", env={"PORT": str(listener.getsockname()[1])})
        server.join()
    assert (done.code, len(done.lines)) == (Exit.UNHEALTHY, 1)


def answer_once(listener: socket.socket, answer: bytes) -> None:
    """Answer one connection, whatever it asks."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


@pytest.mark.parametrize("port", ["0", "x", "70000", "9"])
def test_the_health_command_tells_a_port_where_nobody_listens(bare_python: str, port: str) -> None:
    done = serve_in_vain(bare_python, "health", env={"PORT": port, "NUM_WORKERS": "x"})
    assert (done.code, len(done.lines)) == (Exit.UNHEALTHY, 1)
    assert done.last_line.startswith("ais_runtime_min: port %s does not answer: " % port)


def test_the_health_command_imports_nothing_more(bare_python: str) -> None:
    imported = "import sys; sys.path.insert(0, %r); import ais_runtime_min as r; before = set(sys.modules); %s; " \
        "print(*sorted(set(sys.modules) - before))"
    health = imported % (str(RUNTIME.parent), "r.main(['health'], {'PORT': '9'})")
    done = subprocess.run([bare_python, "-B", "-c", health], stdout=subprocess.PIPE, universal_newlines=True, timeout=30)
    of_the_host_name = {"encodings.idna", "stringprep", "unicodedata"}
    assert set(done.stdout.splitlines()[1].split()) <= of_the_host_name


def test_the_install_command_installs_and_ends(slim_python: str) -> None:
    done = serve_in_vain(slim_python, "install", env={"PACKAGES": "cloudpickle"})
    assert done == (Exit.OK, [], "")  # it is there


@pytest.mark.parametrize("env, code, words", [
    ({"PACKAGES": "--upgrade"}, Exit.UNAVAILABLE, ["PACKAGES", "--upgrade"]),
    ({"OS_PACKAGES": "-x"}, Exit.UNAVAILABLE, ["OS_PACKAGES", "-x"]),
    ({"NUM_WORKERS": "x"}, Exit.CONFIG, ["NUM_WORKERS"]),
])
def test_what_cannot_be_installed_is_told(slim_python: str, env: Environ, code: Exit, words: Sequence[str]) -> None:
    assert_told(serve_in_vain(slim_python, "install", env=env), [code], words)


# == Where it listens ==


def test_only_this_machine_can_connect(upper: Runtime) -> None:
    assert upper.request("GET", "/health").status == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", upper.port), timeout=5)  # any address but 127.0.0.1
    if socket.has_ipv6:
        with pytest.raises(OSError):
            socket.create_connection(("::1", upper.port), timeout=5)


def test_the_host_option_opens_it_to_others(serve: StartServe, etls: Path) -> None:
    runtime = serve(etls / "upper.py", "--host", "127.0.0.2")
    runtime.wait_for_line(r"on http://127\.0\.0\.2:%d" % runtime.port)
    with socket.create_connection(("127.0.0.2", runtime.port), timeout=5):
        pass


# == A folder that stands in for a target ==


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of objects, beside a file that is none of them."""
    tmp_path = tmp_path_factory.mktemp("target")
    objects = tmp_path / "my objects"
    (objects / "bucket" / "dir").mkdir(parents=True)
    (objects / "bucket" / "dir" / "object").write_bytes(b"below")
    (objects / "bucket" / "a b;v=1'%?.txt").write_bytes(b"strange")
    (objects / "bucket" / "inside").symlink_to("dir/object")
    (objects / "bucket" / "outside").symlink_to(tmp_path / "secret")
    (objects / "bucket" / "up").symlink_to(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "my objects too").mkdir()
    (tmp_path / "my objects too" / "secret").write_bytes(b"secret")
    return objects


@pytest.fixture(scope="module")
def with_folder(bare_python: str, etls: Path, folder: Path) -> Iterator[Runtime]:
    """`serve` with the folder as its target."""
    words = ["serve", str(etls / "upper.py"), "--port", "0", "--target", str(folder)]
    with Runtime(words, {"AIS_TARGET_URL": None, "PORT": None}, bare_python) as runtime:
        yield runtime


FOUND = {  # by their paths
    "/bucket/dir/object": b"BELOW",
    "/bucket%2Fdir%2Fobject": b"BELOW",
    "/ais%2F@%23%2Fbucket%2Fdir%2Fobject": b"BELOW",
    "/ais%2f%40%23%2fbucket%2fdir%2fobject": b"BELOW",
    "/s3%2F@%23%2Fbucket%2Fdir%2Fobject": b"BELOW",
    "/ais%2F@uuid%23space%2Fbucket%2Fdir%2Fobject": b"BELOW",
    "/bucket/inside": b"BELOW",
    "/bucket/a%20b%3Bv%3D1%27%25%3F.txt": b"STRANGE",
}
NOT_FOUND = {
    "/bucket/dir/nonesuch": 404,
    "/nonesuch/object": 404,
    "/bucket/dir/object/below": 404,
    "/bucket/dir": 403,
    "/bucket/outside": 403,
    "/bucket/up/secret": 403,
    "/../secret": 403,
    "/bucket/../../secret": 403,
    "/%2E%2E/secret": 403,
    "/..%2Fsecret": 403,
    "/../my%20objects%20too/secret": 403,
    "/ais%2F@%23%2F..%2Fsecret": 403,
    "//etc/hostname": 404,
    "/%2Fetc%2Fhostname": 404,
    "/ais%2F@%23%2F%2Fetc%2Fhostname": 403,
    "/bucket/dir/object%00": 403,
}


def test_objects_are_read_under_the_folder_and_nowhere_else(with_folder: Runtime) -> None:
    assert {path: with_folder.request("GET", path).body for path in FOUND} == FOUND
    answers = {path: with_folder.request("GET", path) for path in NOT_FOUND}
    assert {path: answer.status for path, answer in answers.items()} == NOT_FOUND
    for path, answer in answers.items():
        assert "detail" in json.loads(answer.body)
        assert b"secret" not in answer.body.lower().replace(path.lower().encode(), b"")


def test_what_is_outside_of_the_folder_is_not_told_from_what_is_not_there(
    with_folder: Runtime
) -> None:
    for way in ("/..%2f", "/bucket%2f..%2f..%2f", "/bucket/up/", "/nonesuch/../../",
                "/bucket/dir/..%2f..%2f..%2f"):
        there, missing = (with_folder.request("GET", way + name) for name in ("secret", "nothing"))
        assert there.status == missing.status == 403, way
        assert json.loads(there.body) == json.loads(missing.body), way


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_path_is_read_under_the_folder_and_nowhere_else(with_folder: Runtime, folder: Path, method: str) -> None:
    def status_of(path: object) -> int:
        return with_folder.request(method, "/bucket/object?etl_fqn=" + quote(quote(str(path)), safe="")).status

    object_path = quote(quote(str(folder / "bucket/dir/object")), safe="")
    assert with_folder.request(method, "/b/o?etl_fqn=" + object_path).body == b"BELOW"
    forbidden: Sequence[object] = (
        "/etc/hostname", "/proc/self/environ", folder.parent / "secret", "%s/../secret" % folder, folder / "bucket/outside",
        folder / "bucket/up/secret", "%s too/secret" % folder, folder / "bucket/dir", folder)
    assert {str(path): status_of(path) for path in forbidden} == {str(path): 403 for path in forbidden}


def test_without_a_folder_no_path_is_read(upper: Runtime, tmp_path: Path) -> None:
    like_an_object = tmp_path / "@ais/bck/%ob/obj"
    like_an_object.parent.mkdir(parents=True)
    like_an_object.write_bytes(b"content")
    for path in ("/etc/hostname", "/proc/self/environ", quote(str(like_an_object))):
        response = upper.request("GET", "/bucket/object?etl_fqn=" + quote(path, safe=""))
        assert response.status == 403, path
    missing = upper.request("GET", "/bucket/object")
    assert missing.status == 404 and b"--target" in missing.body


def test_the_second_printed_line_reads_a_file_of_the_folder(with_folder: Runtime) -> None:
    put, get = curl_lines(with_folder)
    assert run_line(put) == b"HELLO\n"
    assert run_line(get) == b"STRANGE"


def test_without_a_file_in_the_folder_the_printed_lines_work_too(serve: StartServe, etls: Path, tmp_path: Path) -> None:
    put, health = curl_lines(serve(etls / "upper.py", "--target", tmp_path))
    assert (run_line(put), run_line(health)) == (b"HELLO\n", b"Running")


@pytest.mark.parametrize("end", ["", "/"])
def test_the_environment_may_name_the_folder(
    serve: StartServe, etls: Path, folder: Path, end: str
) -> None:
    url = "file://%s%s" % (quote(str(folder)), end)
    runtime = serve(etls / "upper.py", env={"AIS_TARGET_URL": url})
    assert runtime.request("GET", "/bucket/dir/object").body == b"BELOW"
    assert runtime.request("GET", "/../secret").status == 403


def test_the_option_wins_over_the_environment_and_may_be_relative(
    bare_python: str, etls: Path, folder: Path, tmp_path: Path
) -> None:
    relative = os.path.relpath(str(folder))
    words = ["serve", str(etls / "upper.py"), "--port", "0", "--target", relative]
    env = {"AIS_TARGET_URL": "file://" + quote(str(tmp_path))}
    with Runtime(words, env, bare_python) as runtime:
        assert runtime.request("GET", "/bucket/dir/object").body == b"BELOW"


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
    file.write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n" + IMPORT + UPPER)
    words = ["serve", str(file), "--port", "0"]
    with Server(*started(bare_python, words, {"AIS_TARGET_URL": None})) as runtime:
        runtime.wait_for_line("importing")
        os.killpg(runtime.pid, number)
        assert runtime.wait(15) in codes
