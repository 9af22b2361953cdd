"""`pack` makes the payload of a class in a file, or all that starts an ETL with it.

What it prints is given to the runtime, and to the real SDK, as a pod gets it.
"""
import base64
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import pytest

from ais_runtime_min import Exit
from documents import REFERENCE, read_document
from harness import RUNTIME, UNUSED_TARGET, Runtime, exact_environment, interpreter
from test_installing import make_environment, make_wheel, offline
from test_readme import as_json, request_of_script

StartRuntime = Callable[..., Runtime]
ETLS = Path(__file__).resolve().parent / "etls"
FROM_SDK = "from aistore.sdk.etl.webserver.%s import %s as Base\n"
BASES = {
    "threaded": FROM_SDK % ("http_multi_threaded_server", "HTTPMultiThreadedServer"),
    "fastapi": FROM_SDK % ("fastapi_server", "FastAPIServer"),
    "flask": FROM_SDK % ("flask_server", "FlaskServer"),
    "of this file": "from ais_runtime_min import HTTPMultiThreadedServer as Base\n",
}
UPPER = """
class Upper(Base):
    def transform(self, data, path, etl_args):
        return data.upper()
"""
THREADED = BASES["threaded"]


class Packed(NamedTuple):
    """What became of a command line."""

    code: int
    out: str
    lines: List[str]  # of stderr

    @property
    def reason(self) -> str:
        """The last line of stderr, where the command fails."""
        assert self.code, self
        assert self.out == "" and "Traceback" not in self.lines[-1]
        return self.lines[-1]


def pack(
    *arguments: object, python: Optional[str] = None, env: Optional[Dict[str, str]] = None,
    command: Sequence[str] = (str(RUNTIME),),
) -> Packed:
    """Run `pack` in an interpreter that has cloudpickle alone, or in another one."""
    python = python or interpreter("slim")
    variables = exact_environment(python, {"AIS_TARGET_URL": None, "PORT": None, **(env or {})})
    done = subprocess.run([python, *command, "pack", *map(str, arguments)], env=variables,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=120)
    return Packed(done.returncode, done.stdout, done.stderr.splitlines())


def payload_of(file: Path, *arguments: object, python: Optional[str] = None) -> str:
    """Return the payload of a class that can be packed."""
    packed = pack(file, *arguments, python=python)
    assert packed.code == 0, packed
    return packed.out


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a file of a user's."""

    def write_file(text: str, name: str = "mine.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write_file


# == What is packed ==


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("group", ["slim", "sdk"])
def test_a_payload_is_served_here_and_found_by_the_sdk(
    base: str, group: str, write: Callable[..., Path], start_runtime: StartRuntime
) -> None:
    payload = payload_of(write(BASES[base] + UPPER), python=interpreter(group))
    assert start_runtime(payload.strip()).request("PUT", "/b/o", b"hello").body == b"HELLO"
    script = """
import base64, sys, cloudpickle
from aistore.sdk.etl.webserver.base_etl_server import ETLServer
cls = cloudpickle.loads(base64.b64decode(sys.stdin.read()))
assert issubclass(cls, ETLServer) and cls.__module__ != "ais_runtime_min", cls.__mro__
print(cls.transform(None, b"hello", "b/o", ""))
"""
    done = subprocess.run([interpreter("sdk"), "-c", script], input=payload, check=True,
                          stdout=subprocess.PIPE, universal_newlines=True)
    assert done.stdout == "b'HELLO'\n"


@pytest.mark.parametrize("command", [["-m", "ais_runtime_min"], ["-c", "import ais_runtime_min; ais_runtime_min.run()"]])
def test_it_does_not_matter_how_the_runtime_is_started(
    command: List[str], write: Callable[..., Path]
) -> None:
    file = write(BASES["of this file"] + UPPER)
    packed = pack(file, command=command, env={"PYTHONPATH": str(RUNTIME.parent)})
    assert packed.code == 0 and "--packages" not in str(packed.lines)
    assert b"ais_runtime_min" not in base64.b64decode(packed.out)


def test_modules_beside_the_file_are_pickled_with_the_class(
    write: Callable[..., Path], start_runtime: StartRuntime
) -> None:
    write("import functools\nfrom tools.inner import END\n"
          "def shout(data):\n    return functools.reduce(bytes.__add__, [data.upper(), END])\n",
          "helper.py")
    write("class Kept:\n    from . import inner\n", "tools/__init__.py")
    write("END = b'!'\ndef end():\n    return END\n", "tools/inner.py")
    file = write(THREADED + """
import helper
import tools

class Mine(Base):
    def transform(self, data, path, etl_args):
        return helper.shout(data) + tools.Kept.inner.end()
""")
    payload = payload_of(file)
    assert start_runtime(payload.strip()).request("PUT", "/b/o", b"a").body == b"A!!"


def test_caches_and_folders_without_init_are_pickled_too(
    write: Callable[..., Path], start_runtime: StartRuntime
) -> None:
    write("END = b'!'\n", "spaces/inner.py")
    file = write(THREADED + """
import functools
import spaces.inner

@functools.lru_cache(maxsize=3)
def shout(data):
    return shout(data[:3]) + data[3:].upper() if len(data) > 3 else data.upper()

class Mine(Base):
    @functools.lru_cache(maxsize=None)
    def end(self):
        return spaces.inner.END

    def transform(self, data, path, etl_args):
        return shout(data) + self.end() + b"%d" % shout.cache_parameters()["maxsize"]
""")
    payload = payload_of(file)
    assert start_runtime(payload.strip()).request("PUT", "/b/o", b"abcdef").body == b"ABCDEF!3"


@pytest.mark.parametrize("name", ["random", "inspect", "subprocess", "tempfile", "csv"])
def test_modules_may_have_the_names_of_the_librarys(
    write: Callable[..., Path], name: str
) -> None:
    write("x = 1\n", name + ".py")
    assert pack(write(THREADED + UPPER)).code == 0
    assert pack(write("import %s\n" % name + THREADED + UPPER)).code == 0


def test_what_a_file_prints_and_makes_at_its_end_is_not_in_the_payload(
    write: Callable[..., Path], start_runtime: StartRuntime
) -> None:
    file = write("print('loading')\n" + BASES["fastapi"] + UPPER + "server = Upper(port=8000)\n"
                 "app = server.app\n")
    packed = pack(file)
    assert packed.out.count("\n") == 1 and "loading" in packed.lines
    assert start_runtime(packed.out.strip()).request("PUT", "/b/o", b"a").body == b"A"


def test_one_class_of_several_is_chosen(write: Callable[..., Path]) -> None:
    file = write(THREADED + UPPER + UPPER.replace("Upper", "Other"))
    assert "FILE:CLASS" in pack(file).reason
    assert pack("%s:Other" % file, "--spec").out.startswith('name: "other-etl"\n')


def test_the_output_goes_to_a_file(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write(THREADED + UPPER)
    packed = pack(file, "-o", tmp_path / "payload")
    assert (packed.code, packed.out) == (0, "")
    assert b"Upper" in base64.b64decode((tmp_path / "payload").read_text(), validate=False)


# == What a pod would lack ==


def test_a_package_has_to_be_named_and_is_tried_as_it_is_here(
    write: Callable[..., Path], tmp_path: Path, start_runtime: StartRuntime
) -> None:
    python = make_environment(tmp_path / "environment")
    make_wheel(tmp_path / "wheels", "etl_probe", "1.0")
    make_wheel(tmp_path / "wheels", "etl_user", "1.0", "Requires-Dist: etl_probe<2\n")
    subprocess.run([python, "-m", "pip", "install", "-q", "etl_user"], check=True, timeout=120,
                   env=exact_environment(python, offline(tmp_path / "wheels")))
    file = write(THREADED + """
import etl_user, etl_probe

class Mine(Base):
    def transform(self, data, path, etl_args):
        return (etl_user.VERSION + etl_probe.VERSION).encode()
""")
    packed = pack(file, python=python)
    assert packed.code == Exit.UNAVAILABLE and "add etl_user to PACKAGES" in packed.reason
    packed = pack(file, "--packages", "etl_user>=2", python=python)
    assert packed.code == Exit.UNAVAILABLE and "pip install 'etl_user>=2'" in packed.reason
    packed = pack(file, "--packages", "etl_user>=1", "--env-file", python=python)
    assert packed.code == 0 and "PACKAGES=etl_user>=1" in packed.out.splitlines()
    variables = dict(line.split("=", 1) for line in packed.out.splitlines())
    python = make_environment(tmp_path / "pod")
    runtime = start_runtime(variables["ETL_CLASS_PAYLOAD"], python=python, env={
        "PACKAGES": variables["PACKAGES"], **offline(tmp_path / "wheels")})
    assert runtime.request("PUT", "/b/o", b"").body == b"1.01.0"


def test_a_module_of_ones_own_that_lies_elsewhere_is_told(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    elsewhere = write("def f():\n    return b''\n", "elsewhere/elsewhere_mine.py")
    (tmp_path / "here").mkdir()
    file = write(THREADED + "import sys; sys.path.append(%r)\nimport elsewhere_mine\n"
                 % str(elsewhere.parent) + UPPER.replace("data.upper()", "elsewhere_mine.f()"),
                 "here/mine.py")
    packed = pack(file)
    assert packed.code == Exit.UNAVAILABLE and "'elsewhere_mine'" in packed.reason
    assert "register_pickle_by_value" in packed.reason


def test_imports_within_functions_are_told_but_may_be_meant(write: Callable[..., Path]) -> None:
    write("", "lazy_mine.py")
    packed = pack(write(THREADED + """
class Mine(Base):
    def transform(self, data, path, etl_args):
        import json, os.path, lazy_mine, PIL.Image
        from xml.etree import ElementTree
        from aistore.sdk.const import HEADER_NODE_URL
        from aistore.sdk import Client
        from fastapi import Request
        from . import sibling
        return data
"""), python=interpreter("sdk"))
    assert packed.code == 0 and packed.out
    told = [line.partition("WARNING - transform() imports ")[2] for line in packed.lines
            if "WARNING" in line]
    assert [line.split(",")[0] for line in told] == [".", "PIL.Image", "aistore.sdk", "lazy_mine"]
    assert "--packages Pillow" in told[1] and "--packages aistore" in told[2]
    assert "top of the file" in told[3]


def test_a_framework_that_is_needed_is_told_with_the_reason(write: Callable[..., Path]) -> None:
    hook = write(BASES["fastapi"] + UPPER + "    async def startup_event(self):\n        pass\n")
    used = write(BASES["flask"] + UPPER + "    def __init__(self):\n        super().__init__()\n"
                 "        self.app.url_map\n", "used.py")
    packed = pack(hook, python=interpreter("sdk"))
    assert packed.code == 0
    assert "overrides startup_event: a pod installs fastapi" in "\n".join(packed.lines)
    packed = pack(used, python=interpreter("sdk"))
    assert packed.code == 0
    assert "uses self.app: a pod installs flask" in "\n".join(packed.lines)
    packed = pack(hook)
    assert packed.code == Exit.UNAVAILABLE and "pip install 'fastapi" in packed.reason


def test_a_long_function_imports_what_a_short_one_does(write: Callable[..., Path]) -> None:
    lines = "".join("        a%d = self.b%d\n" % (number, number) for number in range(400))
    packed = pack(write(THREADED + "class Mine(Base):\n    def transform(self, data, path, args):\n"
                        + lines + "        import json, PIL\n        return data\n"))
    told = [line for line in packed.lines if "transform() imports" in line]
    assert len(told) == 1 and "imports PIL, which a pod does not have" in told[0]


FAILURES = {
    "constructor": ("    def __init__(self):\n        {}['b']\n", Exit.SOFTWARE, "KeyError: 'b'"),
    "end": ("    def __init__(self):\n        import os\n        os._exit(0)\n",
            Exit.SOFTWARE, "with exit code 0"),
    "crash": ("    def __init__(self):\n        import os, signal\n"
              "        os.kill(os.getpid(), signal.SIGSEGV)\n", Exit.SOFTWARE, "by SIGSEGV"),
    "async": ("    async def transform(self, *args):\n        pass\n", Exit.SOFTWARE, "async"),
    "internal": ("    RequestHandler = None\n", Exit.SOFTWARE, "RequestHandler"),
    "state": ("    LOCAL = __import__('threading').local()\n", Exit.SOFTWARE, "made in __init__"),
    "start": ("Upper().start()\n", Exit.SOFTWARE, "__main__"),
    "folder": ("    def __init__(self):\n        open('mine.py')\n", Exit.SOFTWARE, "mine.py"),
}


@pytest.mark.parametrize("kind", list(FAILURES))
def test_a_class_that_would_not_start_is_told_and_nothing_is_printed(
    kind: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    lines, code, words = FAILURES[kind]
    packed = pack(write(THREADED + UPPER + lines), "-o", tmp_path / "payload")
    assert packed.code == code and words in packed.reason
    assert not (tmp_path / "payload").exists()
    if kind == "constructor":
        assert any("mine.py" in line for line in packed.lines)  # of the traceback


def test_what_is_no_class_or_no_file_is_told(write: Callable[..., Path], tmp_path: Path) -> None:
    assert pack(tmp_path / "none.py").code == Exit.USAGE
    assert pack(write("x = 1\n")).code == Exit.USAGE
    assert pack(write("import nonesuch\n")).code == Exit.UNAVAILABLE
    assert pack(write("1 / 0\n")).code == Exit.SOFTWARE
    without = make_environment(tmp_path / "environment", has_pip=False)
    packed = pack(write(THREADED + UPPER), python=without)
    assert packed.code == Exit.UNAVAILABLE and "pip install 'cloudpickle" in packed.reason


# == How it ends ==


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_trial_and_all_that_it_has_started(
    number: int, write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(THREADED + UPPER + """
    def __init__(self):
        import os, subprocess
        child = subprocess.Popen(["sleep", "600"])
        with open(os.environ["PIDS"], "w") as file:
            file.write("%d %d\\n" % (os.getpid(), child.pid))
        child.wait()
""")
    pids = tmp_path / "pids"
    python = interpreter("slim")
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [python, str(RUNTIME), "pack", str(file), "--env", "PIDS=%s" % pids],
        env=exact_environment(python, {"TMPDIR": str(tmp_path / "temporary")}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, b"")
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_process_that_the_class_leaves_behind_does_not_hold_it_up(
    write: Callable[..., Path]
) -> None:
    file = write(THREADED + UPPER + """
    def __init__(self):
        super().__init__()
        __import__("subprocess").Popen(["sleep", "100"], start_new_session=True)
""")
    packed = pack(file)  # which has a time-out
    assert packed.code == 0 and packed.out


def test_a_class_that_crashes_leaves_no_process_behind(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(THREADED + UPPER + """
    def __init__(self):
        import os, signal, subprocess
        child = subprocess.Popen(["sleep", "600"])
        with open(os.environ["PID"], "w") as file:
            file.write(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
""")
    packed = pack(file, "--env", "PID=%s" % (tmp_path / "pid"))
    assert packed.code == Exit.SOFTWARE and "SIGKILL" in packed.reason
    deadline = time.monotonic() + 10  # an orphan is reaped by another process
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.02)


@pytest.mark.parametrize("where", ["/dev/full", "", "/nonexistent/x"])
def test_a_result_that_cannot_be_written_is_told(
    where: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    if where == "/dev/full" and not os.path.exists(where):
        pytest.skip("this system has no /dev/full")
    packed = pack(write(THREADED + UPPER), "-o", where or tmp_path)
    assert packed.code == Exit.OUTPUT and "cannot be written" in packed.reason
    assert "Traceback" not in "\n".join(packed.lines)


def test_the_class_is_not_overwritten(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write(THREADED + UPPER)
    assert pack(file, "-o", file).code == Exit.USAGE
    assert file.read_text() == THREADED + UPPER


# == Specs ==


def test_a_spec_is_what_the_sdk_sends_for_the_same_class(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(BASES["threaded"] + UPPER)
    image = "registry.example.com/ais-runtime-min:3"
    packed = pack(file, "--spec", "--name", "upper-case", "--image", image, "--comm", "ws",
                  "--arg-type", "fqn", "--init-timeout", "2m", "--obj-timeout", "1h",
                  "--os-packages", "ffmpeg", "--env", "KEY=a: \"b\"\n\x7f\u2028\U0001f600",
                  "--env", "E=", "--env", "true=$(A)$$")
    spec = as_json(packed.out)
    for each in spec["runtime"]["env"]:  # as Kubernetes does
        each["value"] = each["value"].replace("$$", "$")
    payload = spec["runtime"]["env"][0]["value"]
    sent = request_of_script("""
from aistore.sdk import Client
etl = Client("http://my-cluster:51080").etl("upper-case")
etl.init(%r, comm_type="ws", init_timeout="2m", obj_timeout="1h", direct_put=True,
         ETL_CLASS_PAYLOAD=%r, OS_PACKAGES="ffmpeg", E="", ETL_DIRECT_FQN="true",
         KEY='a: "b"\\n\\x7f\\u2028\\U0001f600', true="$(A)$$")
""" % (image, payload), tmp_path)
    assert spec.pop("communication") == "ws://"
    sent.pop("communication")
    for each in (spec, sent):
        each["runtime"]["env"].sort(key=json.dumps)
    assert spec == sent


def test_a_spec_has_defaults_for_all_that_is_not_asked_for(write: Callable[..., Path]) -> None:
    python = interpreter("slim")
    version = subprocess.check_output(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True).strip()
    spec = as_json(pack(write(THREADED + UPPER.replace("Upper", "MyUpper2Case")), "--spec").out)
    spec["runtime"].pop("env")
    assert spec == {
        "name": "my-upper2-case", "runtime": {"image": "ais-runtime-min:" + version},
        "communication": "hpush://", "init_timeout": "5m", "obj_timeout": "45s",
        "support_direct_put": True,
    }


WRONG = {
    "name": ["--spec", "--name", "Upper"], "end": ["--spec", "--name", "upper-"],
    "image": ["--spec", "--image", ""], "no time": ["--spec", "--obj-timeout", "0s"],
    "port": ["--spec", "--env", "PORT=9000"], "no text": ["--env", "A=\udcff"], "short": ["--spec", "--name", "upper"],
    "comm": ["--spec", "--comm", "tcp"], "direct put": ["--spec", "--comm", "ws", "--no-direct-put"],
    "time": ["--spec", "--init-timeout", "soon"], "variable": ["--env", "A"],
    "name of one": ["--env", "1=2"], "own": ["--env", "PACKAGES=six"],
    "payload": ["--env", "ETL_CLASS_PAYLOAD_2=x"], "target": ["--spec", "--env", "AIS_TARGET_URL=x"],
    "both": ["--spec", "--env-file"], "target of a container": ["--env-file", "--env", "AIS_TARGET_URL=x"],
    "lines": ["--env-file", "--env", "A=b\nc"], "options": ["--packages", "-r file"],
    "for the spec": ["--no-direct-put"], "image alone": ["--image", "other"],
    "lines of packages": ["--env-file", "--packages", 'six\nX=1; python_version < "3"'],
    "long line": ["--env-file", "--env", "A=" + "x" * (64 << 10)], "no name": ["--packages", "https://host/six.whl"],
    "unknown": ["--etl"], "arg type": ["--arg-type", "url"], "number": ["--env", "NUM_WORKERS=x"],
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_what_aistore_would_refuse_is_refused_at_once(
    kind: str, write: Callable[..., Path]
) -> None:
    packed = pack(write(THREADED + UPPER), *WRONG[kind])
    codes = {"number": Exit.CONFIG, "options": Exit.UNAVAILABLE}
    assert packed.code == codes.get(kind, Exit.USAGE) and packed.reason


# == Variables ==


@pytest.mark.parametrize("form", ["--spec", "--env-file"])
def test_a_large_payload_comes_in_pieces(
    form: str, write: Callable[..., Path], start_runtime: StartRuntime
) -> None:
    text = "".join(map(str, range(100_000)))
    file = write(THREADED + "TEXT = '%s'\n" % text + UPPER.replace("data.upper()", "TEXT"))
    packed = pack(file, form)
    assert packed.code == 0, packed.lines
    if form == "--spec":
        env = {each["name"]: each["value"] for each in as_json(packed.out)["runtime"]["env"]}
        limit = 128 << 10
    else:
        env = dict(line.split("=", 1) for line in packed.out.splitlines())
        limit = 64 << 10
    assert len(env) >= 3 and max(len("%s=%s" % item) + 1 for item in env.items()) <= limit
    runtime = start_runtime(env.pop("ETL_CLASS_PAYLOAD"), env={**env, "AIS_TARGET_URL": UNUSED_TARGET})
    assert runtime.request("PUT", "/b/o", b"").body == text.encode()


def test_a_payload_that_no_pod_takes_is_told(write: Callable[..., Path]) -> None:
    file = write(THREADED + "import os\nDATA = os.urandom(800_000)\n"
                 + UPPER.replace("data.upper()", "DATA"))
    packed = pack(file, "--spec")
    assert packed.code == Exit.DATA and "ETL_CLASS_PAYLOAD_FILE" in packed.reason
    assert len(base64.b64decode(payload_of(file))) > 800_000


def test_an_env_file_starts_the_runtime_as_it_is(write: Callable[..., Path]) -> None:
    packed = pack(write(THREADED + UPPER), "--env-file", "--env", "NUM_WORKERS=1", "--env", "A=b=c")
    env: Dict[str, Optional[str]] = dict(line.split("=", 1) for line in packed.out.splitlines())
    assert (env["NUM_WORKERS"], env["A"]) == ("1", "b=c")
    with Runtime(env={**env, "PORT": "0"}) as runtime:
        assert runtime.request("PUT", "/b/o", b"hello").body == b"HELLO"


def test_the_variables_of_the_trial_are_those_of_the_pod(write: Callable[..., Path]) -> None:
    file = write(THREADED + """
import os

class Mine(Base):
    def __init__(self):
        super().__init__()
        assert os.environ["GIVEN"] == "x" and "OF_SHELL" not in os.environ
        assert self.direct_fqn and os.listdir() == []

    def transform(self, data, path, etl_args):
        return data
""")
    given = ["--env", "GIVEN=x", "--arg-type", "fqn"]
    assert pack(file, *given, env={"OF_SHELL": "yes"}).code == 0
    assert pack(file).code == Exit.SOFTWARE


def test_the_reference_lists_the_options_of_pack() -> None:
    described = read_document(REFERENCE)
    help_text = subprocess.check_output([interpreter("slim"), str(RUNTIME), "pack", "--help"], text=True)
    options = {word.strip(",") for word in help_text.split() if word.startswith("--")}
    options = {option.strip("[]") for option in options}
    assert [option for option in options - {"--help"} if "`%s" % option not in described] == []
