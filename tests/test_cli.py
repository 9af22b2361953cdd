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
from typing import Callable, Dict, List, Optional, Sequence
from urllib.parse import quote

import pytest

import ais_runtime_min
from ais_runtime_min import WORKER_OPTION, Exit
from harness import RUNTIME, Environ, Finished, Runtime, Server, exact_environment, interpreter, run_to_end

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


def serve_in_vain(python: str, *args: object, timeout: float = 15.0) -> Finished:
    """Run a command line that is to fail at once."""
    return run_to_end([str(arg) for arg in args], {"AIS_TARGET_URL": None}, timeout, python)


def curl_lines(runtime: Server) -> List[str]:
    """Return the two commands that the user is told to try."""
    runtime.wait_for_line(r"curl.*(/health|'$)", timeout=5)
    return [line for line in runtime.lines if "curl " in line]


def run_line(line: str) -> bytes:
    """Run a line as a user does, in a shell."""
    if not shutil.which("curl"):
        pytest.skip("this machine has no curl")
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stderr) == (0, b""), line
    return done.stdout


def assert_no_traceback(done: Finished) -> None:
    """Check that the user is not shown the runtime's insides."""
    assert "Traceback" not in "\n".join(done.lines), "\n".join(done.lines)


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


@pytest.mark.parametrize("file", EXAMPLES)
def test_every_example_of_the_folder_is_tried(etls: Path, file: str) -> None:
    assert {path.name for path in etls.glob("*.py")} == set(EXAMPLES)
    assert (etls / file).exists()


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


def test_of_a_class_and_its_base_the_class_is_served(serve: StartServe, tmp_path: Path) -> None:
    file = tmp_path / "family.py"
    derived = "class Louder(Upper):\n    def transform(self, data, path, etl_args):\n"
    file.write_text(IMPORT + UPPER + derived + "        return super().transform(data, path, etl_args) + b'!'\n")
    assert serve(file).request("PUT", "/bucket/object", b"hello").body == b"HELLO!"


def test_a_file_may_import_its_neighbours(serve: StartServe, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text(IMPORT + UPPER)
    (tmp_path / "mine.py").write_text("from neighbour import Upper\nclass Mine(Upper):\n    pass\n")
    assert serve(tmp_path / "mine.py").request("PUT", "/bucket/object", b"hello").body == b"HELLO"


def test_a_file_may_be_named_like_a_module_of_python(serve: StartServe, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(IMPORT + UPPER)
    assert serve(tmp_path / "json.py").request("PUT", "/bucket/object", b"hello").body == b"HELLO"


def test_a_file_may_import_the_runtime_by_its_own_name(serve: StartServe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from ais_runtime_min import HTTPMultiThreadedServer\n" + UPPER)
    assert serve(tmp_path / "mine.py").request("PUT", "/bucket/object", b"hello").body == b"HELLO"


@pytest.mark.parametrize("wanted, words", [
    ("", ["Lower", "Upper"]), (":Nonesuch", ["Nonesuch"]), (":Other", ["Other"]), (":VALUE", ["int"]), (":", ["Lower", "Upper"]),
])
def test_a_class_that_cannot_be_picked_is_told(
    bare_python: str, two_classes: Path, wanted: str, words: Sequence[str]
) -> None:
    done = serve_in_vain(bare_python, "serve", str(two_classes) + wanted, "--port", "0")
    assert done.code in (Exit.USAGE, Exit.DATA)
    assert done.last_line.startswith("ais_runtime_min: ")
    for word in words:
        assert word in done.last_line
    assert_no_traceback(done)


@pytest.mark.parametrize("source, words", [
    ("", ["none"]), (IMPORT, ["none"]), ("class NotAnETL:\n    pass\n", ["none"]),
    (IMPORT + "class Idle(HTTPMultiThreadedServer):\n    pass\n", ["Idle", "transform()", "transform_stream()"]),
])
def test_a_file_without_a_class_to_serve_is_told(bare_python: str, tmp_path: Path, source: str, words: Sequence[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    done = serve_in_vain(bare_python, "serve", file, "--port", "0")
    assert done.code in (Exit.USAGE, Exit.DATA)
    for word in words:
        assert word in done.last_line
    assert_no_traceback(done)


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
    done = serve_in_vain(bare_python, "serve", file, "--port", "0")
    assert done.last_line.startswith("ais_runtime_min: ")
    for word in words:
        assert word in done.last_line
    assert RUNTIME.name not in "\n".join(line for line in done.lines if line.startswith('  File "'))
    assert done.code == code


# == The command line ==


def test_a_file_that_is_not_there_is_told(bare_python: str, tmp_path: Path) -> None:
    for text in (str(tmp_path / "nonesuch.py"), "%s:Upper" % (tmp_path / "nonesuch.py"), str(tmp_path)):
        done = serve_in_vain(bare_python, "serve", text, "--port", "0")
        assert done.code == Exit.USAGE
        assert done.last_line == "ais_runtime_min: there is no file %r" % text.replace(":Upper", "")
        assert_no_traceback(done)


def test_a_file_that_is_no_python_is_told(bare_python: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    done = serve_in_vain(bare_python, "serve", tmp_path / "notes.txt", "--port", "0")
    assert done.code == Exit.USAGE
    assert "notes.txt is no Python file" in done.last_line
    assert_no_traceback(done)


@pytest.mark.parametrize("option, value", [
    ("--port", "http"), ("--port", "-1"), ("--port", "65536"), ("--port", "99999999999"), ("--workers", "0"), ("--workers", "-1"),
    ("--workers", "many"), ("--threads", "0"), ("--threads", "-1"), ("--threads", "1.5"),
])
def test_a_number_that_cannot_be_used_is_told(bare_python: str, etls: Path, option: str, value: str) -> None:
    done = serve_in_vain(bare_python, "serve", etls / "upper.py", "--port", "0", "%s=%s" % (option, value), timeout=5)
    assert done.code == Exit.USAGE
    assert option in done.last_line and value in done.last_line
    assert_no_traceback(done)


@pytest.mark.parametrize("args", [
    ["nonesuch"], ["serve"], ["--nonesuch"], ["serve", "x.py", "--nonesuch"], ["health", "8000"], ["install", "numpy"],
    ["health", "--"], ["--", "install"], ["health", "install"],
])
def test_a_command_line_that_is_not_understood_is_told(bare_python: str, args: Sequence[str]) -> None:
    done = serve_in_vain(bare_python, *args)
    assert done.code == Exit.USAGE
    assert_no_traceback(done)


@pytest.mark.parametrize("words", [[], ["x"], ["[]"], ["{}"], ["5", "serve"]], ids=" ".join)
def test_the_option_of_workers_is_not_for_users(bare_python: str, words: Sequence[str]) -> None:
    done = serve_in_vain(bare_python, WORKER_OPTION, *words)
    assert (done.code, len(done.lines)) == (Exit.USAGE, 1), done
    assert WORKER_OPTION in done.last_line


@pytest.mark.parametrize("target", ["no/such/folder", "ftp://host/", "file:///no/such/folder"])
def test_a_target_that_cannot_be_used_is_told(bare_python: str, etls: Path, target: str) -> None:
    done = serve_in_vain(bare_python, "serve", etls / "upper.py", "--port", "0", "--target", target)
    assert done.code in (Exit.USAGE, Exit.CONFIG)
    assert "a folder" in done.last_line or "file:///folder" in done.last_line
    assert_no_traceback(done)


def test_a_port_that_is_taken_is_told(bare_python: str, etls: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = serve_in_vain(bare_python, "serve", etls / "upper.py", "--port", port)
    assert done.code == Exit.SYSTEM
    assert "port %d of 127.0.0.1" % port in done.last_line and "in use" in done.last_line
    assert_no_traceback(done)


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


def test_the_health_command_tells_a_pod_that_serves(serve: StartServe, etls: Path, bare_python: str) -> None:
    runtime = serve(etls / "upper.py")
    done = run_to_end(["health"], {"PORT": str(runtime.port), "AIS_TARGET_URL": None}, python=bare_python)
    assert done == (Exit.OK, ["Running"], "Running")


@pytest.mark.parametrize("answers", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 503 not yet\r\nContent-Length: 7\r\n\r\nnot yet"])
def test_the_health_command_tells_a_pod_that_does_not_serve(bare_python: str, answers: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer_once, args=(listener, answers))
        server.start()
        done = run_to_end(["health"], {"PORT": str(listener.getsockname()[1]), "AIS_TARGET_URL": None}, python=bare_python)
        server.join()
    assert (done.code, len(done.lines)) == (Exit.UNHEALTHY, 1)
    assert_no_traceback(done)


def answer_once(listener: socket.socket, answer: bytes) -> None:
    """Answer one connection, whatever it asks."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


@pytest.mark.parametrize("port", ["0", "x", "70000", "9"])
def test_the_health_command_tells_a_port_where_nobody_listens(bare_python: str, port: str) -> None:
    done = run_to_end(["health"], {"PORT": port, "AIS_TARGET_URL": None, "NUM_WORKERS": "x"}, python=bare_python)
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
    done = run_to_end(["install"], {"PACKAGES": "cloudpickle", "AIS_TARGET_URL": None}, python=slim_python)
    assert done == (Exit.OK, [], "")  # it is there


@pytest.mark.parametrize("env, code, words", [
    ({"PACKAGES": "--upgrade"}, Exit.UNAVAILABLE, ["PACKAGES", "--upgrade"]),
    ({"OS_PACKAGES": "-x"}, Exit.UNAVAILABLE, ["OS_PACKAGES", "-x"]),
    ({"NUM_WORKERS": "x"}, Exit.CONFIG, ["NUM_WORKERS"]),
])
def test_what_cannot_be_installed_is_told(slim_python: str, env: Environ, code: Exit, words: Sequence[str]) -> None:
    done = run_to_end(["install"], {**env, "AIS_TARGET_URL": None}, python=slim_python)
    assert done.code == code and done.last_line.startswith("ais_runtime_min: ")
    for word in words:
        assert word in done.last_line
    assert_no_traceback(done)


# == Where it listens ==


def test_only_this_machine_can_connect(serve: StartServe, etls: Path) -> None:
    runtime = serve(etls / "upper.py")
    assert runtime.request("GET", "/health").status == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", runtime.port), timeout=5)  # every address but 127.0.0.1 itself
    if socket.has_ipv6:
        with pytest.raises(OSError):
            socket.create_connection(("::1", runtime.port), timeout=5)


def test_the_host_option_opens_it_to_others(serve: StartServe, etls: Path) -> None:
    runtime = serve(etls / "upper.py", "--host", "127.0.0.2")
    runtime.wait_for_line(r"on http://127\.0\.0\.2:%d" % runtime.port)
    with socket.create_connection(("127.0.0.2", runtime.port), timeout=5):
        pass


# == A folder that stands in for a target ==


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of objects, beside a file that is none of them."""
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


@pytest.fixture
def with_folder(serve: StartServe, etls: Path, folder: Path) -> Runtime:
    """`serve` with the folder as its target."""
    return serve(etls / "upper.py", "--target", folder)


@pytest.mark.parametrize("path, status, body", [
    ("/bucket/dir/object", 200, b"BELOW"),
    ("/bucket%2Fdir%2Fobject", 200, b"BELOW"),
    ("/ais%2F@%23%2Fbucket%2Fdir%2Fobject", 200, b"BELOW"),
    ("/ais%2f%40%23%2fbucket%2fdir%2fobject", 200, b"BELOW"),
    ("/s3%2F@%23%2Fbucket%2Fdir%2Fobject", 200, b"BELOW"),
    ("/ais%2F@uuid%23space%2Fbucket%2Fdir%2Fobject", 200, b"BELOW"),
    ("/bucket/inside", 200, b"BELOW"),
    ("/bucket/a%20b%3Bv%3D1%27%25%3F.txt", 200, b"STRANGE"),
    ("/bucket/dir/nonesuch", 404, None),
    ("/nonesuch/object", 404, None),
    ("/bucket/dir/object/below", 404, None),
    ("/bucket/dir", 403, None),
    ("/bucket/outside", 403, None),
    ("/bucket/up/secret", 403, None),
    ("/../secret", 403, None),
    ("/bucket/../../secret", 403, None),
    ("/%2E%2E/secret", 403, None),
    ("/..%2Fsecret", 403, None),
    ("/../my%20objects%20too/secret", 403, None),
    ("/ais%2F@%23%2F..%2Fsecret", 403, None),
    ("//etc/hostname", 404, None),
    ("/%2Fetc%2Fhostname", 404, None),
    ("/ais%2F@%23%2F%2Fetc%2Fhostname", 403, None),
    ("/bucket/dir/object%00", 403, None),
])
def test_objects_are_read_under_the_folder_and_nowhere_else(
    with_folder: Runtime, path: str, status: int, body: Optional[bytes]
) -> None:
    response = with_folder.request("GET", path)
    assert response.status == status
    if body is None:
        assert "detail" in json.loads(response.body)
        assert b"secret" not in response.body.lower().replace(path.lower().encode(), b"")
    else:
        assert response.body == body


@pytest.mark.parametrize("way", [
    "/..%2f", "/bucket%2f..%2f..%2f", "/bucket/up/", "/nonesuch/../../", "/bucket/dir/..%2f..%2f..%2f",
])
def test_what_is_outside_of_the_folder_is_not_told_from_what_is_not_there(with_folder: Runtime, way: str) -> None:
    there, missing = (with_folder.request("GET", way + name) for name in ("secret", "nothing"))
    assert there.status == missing.status == 403
    assert json.loads(there.body) == json.loads(missing.body)


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


@pytest.mark.parametrize("path", ["/etc/hostname", "/proc/self/environ"])
def test_without_a_folder_no_path_is_read(serve: StartServe, etls: Path, path: str) -> None:
    runtime = serve(etls / "upper.py")
    assert runtime.request("GET", "/bucket/object?etl_fqn=" + quote(path, safe="")).status == 403
    missing = runtime.request("GET", "/bucket/object")
    assert missing.status == 404 and b"--target" in missing.body


def test_the_second_printed_line_reads_a_file_of_the_folder(with_folder: Runtime) -> None:
    put, get = curl_lines(with_folder)
    assert run_line(put) == b"HELLO\n"
    assert run_line(get) == b"STRANGE"


def test_without_a_file_in_the_folder_the_printed_lines_work_too(serve: StartServe, etls: Path, tmp_path: Path) -> None:
    put, health = curl_lines(serve(etls / "upper.py", "--target", tmp_path))
    assert (run_line(put), run_line(health)) == (b"HELLO\n", b"Running")


@pytest.mark.parametrize("as_url", [lambda path: "file://" + quote(str(path)), lambda path: "file://%s/" % quote(str(path))])
def test_the_environment_may_name_the_folder(
    serve: StartServe, etls: Path, folder: Path, as_url: Callable[[Path], str]
) -> None:
    runtime = serve(etls / "upper.py", env={"AIS_TARGET_URL": as_url(folder)})
    assert runtime.request("GET", "/bucket/dir/object").body == b"BELOW"
    assert runtime.request("GET", "/../secret").status == 403


def test_the_option_wins_over_the_environment(serve: StartServe, etls: Path, folder: Path, tmp_path: Path) -> None:
    runtime = serve(etls / "upper.py", "--target", folder, env={"AIS_TARGET_URL": "file://" + quote(str(tmp_path))})
    assert runtime.request("GET", "/bucket/dir/object").body == b"BELOW"


def test_a_relative_folder_is_taken_from_where_the_command_runs(bare_python: str, etls: Path, folder: Path) -> None:
    relative = os.path.relpath(str(folder))
    command = [bare_python, str(RUNTIME), "serve", str(etls / "upper.py"), "--target", relative, "--port", "0"]
    with Server(command, exact_environment(bare_python, {"AIS_TARGET_URL": None})) as runtime:
        runtime.port = int(runtime.wait_for_line(r"serving .* on http://\S*:(\d+)")[1])
        assert runtime.request("GET", "/bucket/dir/object").body == b"BELOW"


# == Its end ==


def send_to_process(server: Server, number: int) -> None:
    """Send a signal to the first process alone."""
    os.kill(server.pid, number)


def send_to_group(server: Server, number: int) -> None:
    """Send a signal to all processes, as a terminal does."""
    os.killpg(server.pid, number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [send_to_process, send_to_group])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_signal_ends_it_well(
    serve: StartServe, etls: Path, send: Callable[[Server, int], None], number: int, workers: int
) -> None:
    runtime = serve(etls / "upper.py", "--workers", workers)
    with runtime.connect() as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
        send(runtime, number)
        assert runtime.wait(5) == Exit.OK
    assert "ais_runtime_min: " not in runtime.log()


@pytest.mark.parametrize("number, codes", [(signal.SIGINT, (Exit.OK, 128 + signal.SIGINT)), (signal.SIGTERM, (Exit.OK,))])
def test_a_signal_while_the_file_is_imported_ends_it_without_a_traceback(
    bare_python: str, tmp_path: Path, number: int, codes: Sequence[int]
) -> None:
    file = tmp_path / "slow.py"
    file.write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n" + IMPORT + UPPER)
    env: Dict[str, str] = exact_environment(bare_python, {"AIS_TARGET_URL": None})
    with Server([bare_python, str(RUNTIME), "serve", str(file), "--port", "0"], env) as runtime:
        runtime.wait_for_line("importing")
        send_to_group(runtime, number)
        assert runtime.wait(5) in codes
