"""The image, built, booted and probed for real: on real Alpine with its apk, by buildah, podman and runc.

    python3.13 tests/run.py -m image      (as root, with the packages that .ci/run installs)

The base is the stand-in of alpine.py, of the one Python that it is for. Payloads are pickled by the real SDK.
"""
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence

import pytest

import ais_runtime_min
from ais_runtime_min import Exit
from alpine import IMAGE, PYTHON, hadolint, make_base
from containers import Container, Engine, Layer, free_port, missing_programs
from documents import README, REFERENCE, example
from harness import ROOT, UNUSED_TARGET, make_payload

CACHE = ROOT / ".venv" / "downloads"
DOCKERFILE = ROOT / "Dockerfile"
TARGETS = ("default", "flat")
LIMIT_BYTES = 3_000_000  # what the image may add to its base
LIMIT_GZIPPED_BYTES = 1_000_000
ROOTLESS = ("--user", "65532", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")

BASE = "from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer\n"
UPPER = BASE + """
class Upper(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return data.upper()
"""
RUN = BASE + """
class Run(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        import subprocess
        return subprocess.check_output(data.split(), stderr=subprocess.STDOUT)
"""
THREADED = BASE + """
class Started:  # unpickling it starts a thread, as importing a library for numbers does
    def __reduce__(self):
        return eval, ("__import__('threading').Thread(target=__import__('time').sleep, args=(600,), daemon=True).start()",)

STARTED = Started()

class Afresh(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        return data.upper() + (b"" if STARTED is None else b"?")
"""
MANIFEST = {
    "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "upper"},
    "spec": {"hostNetwork": True, "restartPolicy": "Never", "containers": [
        {"name": "server", "image": "", "command": ["python", "bootstrap.py"], "env": []}]},
}


def reasons_to_skip() -> Iterator[str]:
    """Say what these tests lack here."""
    if "%d.%d" % sys.version_info[:2] != PYTHON:
        yield "the base image is of Python %s, and so must the payloads be" % PYTHON
    if sys.platform != "linux" or platform.machine() != "x86_64":
        yield "the base image is for Linux on x86-64"
    elif os.geteuid() != 0:
        yield "building and running containers needs root here"
    yield from ("%s is not installed" % program for program in missing_programs())


REASONS = list(reasons_to_skip())
pytestmark = [pytest.mark.image, pytest.mark.timeout(900),
              pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS) or "nothing is missing")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A store with the base image in it."""
    with Engine() as engine:
        make_base(engine, CACHE, tmp_path_factory.mktemp("base") / "context")
        yield engine


@pytest.fixture(scope="module")
def images(engine: Engine) -> Dict[str, str]:
    """The image, by target; the default one has no name."""
    engine.build(ROOT, "ais-runtime-min:default")
    engine.build(ROOT, "ais-runtime-min:flat", "--target", "flat")
    return {target: "localhost/ais-runtime-min:" + target for target in TARGETS}


@pytest.fixture(scope="module")
def layers(engine: Engine, images: Dict[str, str]) -> Dict[str, List[Layer]]:
    """The layers of the image's targets, and of its base."""
    base = engine.layers(IMAGE, lambda number: False)
    default = engine.layers(images["default"], lambda number: number >= len(base))
    return {"base": base, "default": default, "flat": engine.layers(images["flat"], lambda number: False)}


@pytest.fixture
def boot(engine: Engine) -> Iterator[Callable[..., Container]]:
    """A function that starts a pod's container; all of them are removed with the test."""
    started: List[Container] = []

    def start(image: str, payload: str, *options: str, **env: str) -> Container:
        variables = {"ETL_CLASS_PAYLOAD": payload, "AIS_TARGET_URL": UNUSED_TARGET, "PORT": "0", "NUM_WORKERS": "2", **env}
        started.append(Container(engine, image, variables, ["--no-healthcheck", *options]))
        return started[-1]

    yield start
    for container in started:
        container.__exit__(None, None, None)


def upper() -> str:
    """Return a payload that changes bytes to upper case."""
    return make_payload(UPPER, "Upper")


def answer(container: Container, body: bytes = b"an object") -> bytes:
    """Return what the pod makes of an object."""
    response = container.wait_until_serving().request("PUT", "/bucket/object", body)
    assert response.status == 200, response.body
    return response.body


# == Pods ==


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [(), ROOTLESS], ids=["root", "rootless"])
def test_a_pickled_class_answers(
    images: Dict[str, str], boot: Callable[..., Container], target: str, options: Sequence[str]
) -> None:
    assert answer(boot(images[target], upper(), *options)) == b"AN OBJECT"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name, source", [("Upper", UPPER), ("Afresh", THREADED)])
def test_nothing_is_compiled_for_a_start_and_an_answer(
    images: Dict[str, str], boot: Callable[..., Container], target: str, name: str, source: str
) -> None:
    container = boot(images[target], make_payload(source, name), *ROOTLESS, PYTHONVERBOSE="1", NUM_WORKERS="1")
    assert answer(container) == b"AN OBJECT"
    loaded = [line for line in list(container.lines) if line.startswith("# code object from ")]
    compiled = [line for line in loaded if not line.endswith(".pyc'")]
    assert len(loaded) > 50 and compiled == []


def test_fresh_workers_and_the_command_of_specs_run_the_bytecode(
    engine: Engine, images: Dict[str, str], boot: Callable[..., Container]
) -> None:
    container = boot(images["default"], make_payload(THREADED, "Afresh"), *ROOTLESS)
    assert answer(container) == b"AN OBJECT"
    commands = container.execute("sh", "-c", "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f; echo; done").stdout
    assert len(re.findall("^/usr/local/bin/python[0-9.]* /code/bootstrap.py $", commands, re.MULTILINE)) == 3, commands
    same = container.execute("sh", "-c", "test bootstrap.py -ef __pycache__/*.pyc && head -c 2 bootstrap.py | od -An -tu2")
    assert same.returncode == 0 and int(same.stdout) == int.from_bytes(_magic(), "little")


def _magic() -> bytes:
    from importlib.util import MAGIC_NUMBER

    return MAGIC_NUMBER[:2]  # the tests run on the image's Python


def test_the_first_process_is_the_runtime_and_stops_within_a_second(
    engine: Engine, images: Dict[str, str], boot: Callable[..., Container]
) -> None:
    codes = []
    for _ in range(3):  # the machine may be busy with other things
        container = boot(images["default"], upper()).wait_until_serving()
        assert container.execute("cat", "/proc/1/cmdline").stdout == "python\0/code/bootstrap.py\0"
        with container.connect() as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert engine.podman("stop", "--time", "1", container.name).returncode == 0
        codes.append(container.exit_code())
        if codes[-1] == Exit.OK:
            return
    pytest.fail("killed after a second: exit codes %s" % codes)


def test_the_health_check_tells_a_pod_that_serves_from_one_that_does_not(engine: Engine, images: Dict[str, str]) -> None:
    env = {"ETL_CLASS_PAYLOAD": upper(), "AIS_TARGET_URL": UNUSED_TARGET, "PORT": str(free_port())}
    with Container(engine, images["default"], env, ROOTLESS) as container:
        container.wait_until_serving()
        done = engine.podman("healthcheck", "run", container.name)
        assert done.returncode == 0, done.stdout
        container.execute("sh", "-c", "kill -STOP $(pgrep -P 1)")  # its only worker
        assert engine.podman("healthcheck", "run", container.name).returncode == 1
        container.execute("sh", "-c", "kill -CONT $(pgrep -P 1)")


def test_a_pod_manifest_is_played(engine: Engine, images: Dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    manifest = json.loads(json.dumps(MANIFEST))
    server = manifest["spec"]["containers"][0]
    server["image"] = images["default"]
    variables = {"ETL_CLASS_PAYLOAD": upper(), "AIS_TARGET_URL": UNUSED_TARGET, "PORT": str(port)}
    server["env"] = [{"name": name, "value": value} for name, value in variables.items()]
    file = tmp_path / "pod.yaml"  # JSON is YAML
    file.write_text(json.dumps(manifest))
    played = engine.podman("play", "kube", str(file))
    assert played.returncode == 0, played.stdout
    try:
        follower = Container.follow(engine, "upper-server")
        with follower:
            assert answer(follower) == b"AN OBJECT"
            assert follower.port == port
    finally:
        done = engine.podman("play", "kube", "--down", str(file))
    assert done.returncode == 0, done.stdout


# == Packages ==


def test_os_packages_are_installed_by_apk_at_the_start(images: Dict[str, str], boot: Callable[..., Container]) -> None:
    container = boot(images["default"], make_payload(RUN, "Run"), OS_PACKAGES="hello-apk")
    assert answer(container, b"hello-apk") == b"hello from apk\n"


def test_an_os_package_that_is_not_there_is_told(images: Dict[str, str], boot: Callable[..., Container]) -> None:
    container = boot(images["default"], upper(), OS_PACKAGES="hello-apk,no-such-package")
    assert container.wait(60) == Exit.UNAVAILABLE
    assert container.lines[-1].startswith("ais_runtime_min: OS_PACKAGES: ")
    assert "apk" in container.lines[-1] and "no-such-package" in container.log()


def test_packages_and_frameworks_are_baked_in_by_build_arguments(
    engine: Engine, boot: Callable[..., Container]
) -> None:
    engine.build(ROOT, "ais-runtime-min:baked", "--build-arg", "EXTRAS=fastapi", "--build-arg", "PACKAGES=xxhash>=3,<4,six",
                 "--build-arg", "OS_PACKAGES=hello-apk")
    source = RUN.replace("        import subprocess\n", "        import fastapi, six, subprocess, uvicorn, xxhash\n")
    container = boot("localhost/ais-runtime-min:baked", make_payload(source, "Run"), *ROOTLESS, PACKAGES="six", EXTRAS="x")
    assert answer(container, b"hello-apk") == b"hello from apk\n"
    assert "installing" not in container.log()
    contents = engine.layers("localhost/ais-runtime-min:baked", lambda number: False)[-1].files
    of_pip = re.compile(r".*/site-packages/pip/(?!(_vendor/(packaging/)?)?__pycache__/)")  # but for its parser
    strange = [name for name in contents if name.startswith(("root/", "tmp/", "var/cache/")) or of_pip.match(name)]
    assert strange == []


def test_an_extra_that_is_not_there_ends_the_build(engine: Engine) -> None:
    with pytest.raises(AssertionError, match="setup.cfg has no extra 'nonesuch', but fastapi, flask"):
        engine.build(ROOT, "ais-runtime-min:nonesuch", "--build-arg", "EXTRAS=nonesuch")


# == Vendoring ==


def vendor(engine: Engine, folder: Path, name: str, lines: str) -> str:
    """Build an image by the README's lines for another image, and further ones; return its name."""
    first, _, rest = example(README, "Copy the file into your own image").text.partition("\n")
    assert first.startswith("FROM python:")
    (folder / "Dockerfile").write_text("FROM %s\n%s%s" % (IMAGE, rest, lines))
    (folder / "ais_runtime_min.py").write_bytes((ROOT / "ais_runtime_min.py").read_bytes())
    engine.build(folder, name)
    return "localhost/" + name


def test_the_lines_of_the_readme_add_the_runtime_to_another_image(
    engine: Engine, boot: Callable[..., Container], tmp_path: Path
) -> None:
    container = boot(vendor(engine, tmp_path, "vendored", ""), upper(), *ROOTLESS)
    assert answer(container) == b"AN OBJECT"
    assert "ais_runtime_min.cpython-" in container.execute("ls", "/code/__pycache__").stdout


def test_the_lines_of_the_reference_add_packages_and_a_health_check(
    engine: Engine, boot: Callable[..., Container], tmp_path: Path
) -> None:
    lines = example(REFERENCE, "The image", 2).text
    for stated, small in {"numpy>=2": "six", "libgomp": "hello-apk"}.items():
        assert stated in lines
        lines = lines.replace(stated, small)
    image = vendor(engine, tmp_path, "filled", lines)
    described = json.loads(engine.podman("image", "inspect", image).stdout)[0]
    assert "/health" in str(described["Healthcheck"])
    source = RUN.replace("        import subprocess\n", "        import six, subprocess\n")
    container = boot(image, make_payload(source, "Run"), *ROOTLESS)
    assert answer(container, b"hello-apk") == b"hello from apk\n"


def test_the_commands_of_the_documents_build_the_image_and_try_a_class_in_it(engine: Engine) -> None:
    build = shlex.split(example(README, "Use it in a cluster").text.splitlines()[0])
    name = build[3]
    assert build == ["docker", "build", "-t", name, *build[4:-1], "."]
    engine.build(ROOT, name, *build[4:-1])
    run = shlex.split(example(REFERENCE, "The image", 1).text.replace("$PWD", str(ROOT)))
    assert run[:2] == ["docker", "run"] and run[4:7] == ["-p", "8000:8000", name]
    port = free_port()  # the tests' containers are on the host's network
    container = Container(engine, name, {}, run[2:4], [*run[7:], "--port", str(port)])
    with container:
        container.wait_until_serving()
        assert container.request("PUT", "/bucket/object", b"hello").body == b"HELLO"


# == What is in it ==


def test_the_default_target_adds_one_small_layer_to_its_base(layers: Dict[str, List[Layer]]) -> None:
    added = layers["default"][len(layers["base"]):]
    assert [layer.digest for layer in layers["default"][:len(layers["base"])]] == [layer.digest for layer in layers["base"]]
    assert len(added) == 1
    assert added[0].plain <= LIMIT_BYTES and 0 < added[0].gzipped <= LIMIT_GZIPPED_BYTES, added[0][1:3]
    folders = {name.rpartition("/")[0] for name in added[0].files}
    strange = [folder for folder in folders if not re.match(r"code\b|usr/local/lib/python", folder)]
    assert strange == []


def test_the_flat_target_is_one_layer_without_what_no_pod_needs(layers: Dict[str, List[Layer]]) -> None:
    assert len(layers["flat"]) == 1
    files = layers["flat"][0].files
    unwanted = re.compile(r"/(idlelib|tkinter|turtledemo|ensurepip|lib2to3|pydoc_data|test)/|/turtle\.py$|/_tkinter\.")
    assert [name for name in files if unwanted.search("/" + name)] == []
    assert any("/site-packages/pip/" in name for name in files)
    assert layers["flat"][0].plain < sum(layer.plain for layer in layers["default"])


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_says_what_it_is_and_how_it_is_run(engine: Engine, images: Dict[str, str], target: str) -> None:
    config = engine.inspect(images[target])
    labels = config["Labels"]
    assert isinstance(labels, dict)
    assert labels["org.opencontainers.image.version"] == ais_runtime_min.__version__
    assert labels["org.opencontainers.image.title"] == "ais-runtime-min"
    assert config["WorkingDir"] == "/code"
    assert config["Entrypoint"] == ["python", "/code/bootstrap.py"]
    assert not config.get("Cmd")
    assert list(config["ExposedPorts"]) == ["8000/tcp"]  # type: ignore[call-overload]
    assert {"PYTHONUNBUFFERED=1", "LANG=C.UTF-8"} <= set(config["Env"])  # type: ignore[call-overload]


@pytest.mark.parametrize("target", TARGETS)
def test_pip_is_there(engine: Engine, images: Dict[str, str], target: str) -> None:
    done = engine.podman("run", "--rm", "--network", "none", "--entrypoint", "pip", images[target], "list")
    assert done.returncode == 0 and "cloudpickle" in done.stdout, done.stdout


def test_hadolint_finds_nothing() -> None:
    done = hadolint(CACHE, [str(DOCKERFILE)])
    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_of_the_tests_containers_stays_behind(tmp_path: Path) -> None:
    with Engine() as engine:
        folder = Path(engine.environ["TMPDIR"])
        (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
        engine.build(tmp_path, "empty")
    assert not folder.exists()
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    assert "podman" not in subprocess.check_output(["ls", "/sys/class/net"], universal_newlines=True)
