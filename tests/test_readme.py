"""README.md and docs/reference.md tell the truth: their examples run, their links lead somewhere.

The examples that build or run images are tested in tests/image, those for a cluster also behind a real
AIStore, tests/aistore.
"""
import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest

import ais_runtime_min
from documents import (DOCUMENTS, README, REFERENCE, example, examples_of, headings_of, links_of,
                       read_document)
from harness import ROOT, Runtime, Server, exact_environment, interpreter, make_payload
from standin import Certificates, StandInTarget
from test_installing import installed_in, make_environment, make_wheel, simple_index
from test_packages import start_in_vain

StartRuntime = Callable[..., Runtime]

THREADED = ("from aistore.sdk.etl.webserver.http_multi_threaded_server "
            "import HTTPMultiThreadedServer\n")
FASTAPI = "from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer\n"


# == The documents ==


def examples_in_tests() -> Iterator[Tuple[str, str, int]]:
    """Yield the document, heading and number of each call of `example` in the tests."""
    names = {"README": README, "REFERENCE": REFERENCE}
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "example":
                document = names.get(getattr(node.args[0], "id", ""))
                if document:  # hypothesis has decorators of the same name
                    heading, *number = [ast.literal_eval(argument) for argument in node.args[1:]]
                    yield document, heading, number[0] if number else 0


@pytest.mark.parametrize("document", [README, REFERENCE])
def test_every_example_is_run_by_a_test(document: str) -> None:
    tested = {(heading, number) for name, heading, number in examples_in_tests() if name == document}
    assert tested == set(examples_of(document))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for link in links_of(document):
        path, _, heading = link.partition("#")
        linked = (ROOT / document).parent.joinpath(path) if path else ROOT / document
        assert linked.exists(), link
        if heading:
            assert heading in headings_of(str(linked.resolve().relative_to(ROOT))), link


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(read_document(README).splitlines()) <= 250


def variables_of_tables(document: str) -> Set[str]:
    """Return the variables in the first columns of a document's tables."""
    cells = re.findall(r"(?m)^\| (`[^|]*)", read_document(document))
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    return {name for name in names
            if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name == "direct_put"}


def test_the_reference_lists_the_variables_that_the_runtime_reads_and_no_others() -> None:
    variables = {variable.name for variable in ais_runtime_min.VARIABLES}
    assert variables_of_tables(REFERENCE) == variables | {"ETL_CLASS_PAYLOAD_2"}
    assert variables_of_tables(README) < variables


def told_of_starts(document: str) -> List[str]:
    """Return the messages of the table of what ends a start."""
    table = re.search(r"(?m)^\| it says .*\n\|[-|:]+\n((?:\|.*\n)+)", read_document(document))
    assert table
    return re.findall(r"(?m)^\| (.*?) \|", table[1])


def test_the_readme_tells_of_failures_in_the_words_of_the_reference() -> None:
    in_reference = " ".join(told_of_starts(REFERENCE))
    for told in told_of_starts(README):
        words = told.strip("`").split(" …")[0].strip("… ")
        assert words in in_reference, told


# == Try it ==


def test_the_first_command_says_what_the_readme_shows_and_its_curl_lines_work() -> None:
    command = shlex.split(example(README, "Try it").text)
    shown = example(README, "Try it", 1).text
    assert command[0] == "python3"
    python = interpreter("slim")
    variables = exact_environment(python, {"AIS_TARGET_URL": None, "PORT": None})
    with Server([python, str(ROOT / command[1]), *command[2:-1], str(ROOT / command[-1]),
                 "--port", "0"], variables) as server:
        server.port = int(server.wait_for_line(r"serving .*:(\d+)$")[1])
        server.wait_for_line(r"curl .*/health$")
        said = "\n".join(server.lines).replace(str(ROOT) + "/", "")
        assert said.replace(":%d" % server.port, ":8000") == shown.strip("\n")
        if not shutil.which("curl"):
            pytest.skip("this machine has no curl")
        answers = [subprocess.check_output(line, shell=True, timeout=30)
                   for line in server.lines if "curl " in line]
    assert answers == [b"HELLO\n", b"Running"]


# == Use it in a cluster ==


def request_of_script(script: str, tmp_path: Path) -> Dict[str, Any]:
    """Run a script with the real SDK; return the body of the request that it sends to AIStore."""
    file = tmp_path / "script.py"
    python = interpreter("sdk")
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        cluster.settimeout(30)
        host = "127.0.0.1:%d" % cluster.getsockname()[1]
        assert "my-cluster:51080" in script
        file.write_text(script.replace("my-cluster:51080", host), encoding="utf-8")
        with subprocess.Popen([python, str(file)], env=exact_environment(python, {})) as process:
            try:
                connection, _ = cluster.accept()
                with connection:
                    connection.settimeout(10)
                    head, body = read_request(connection)
                    assert head.startswith(b"PUT /v1/etl ")
                    sent: Dict[str, Any] = json.loads(body)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nid")
                    assert process.wait(30) == 0
            finally:
                process.kill()
    return sent


def read_request(connection: socket.socket) -> Tuple[bytes, bytes]:
    """Read one request with a length; return its head and its body."""
    data = b""
    while True:
        data += connection.recv(1 << 20)
        head, mark, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if mark and len(body) >= (int(length[1]) if length else 0):
            return head, body


def test_the_examples_init_class_does_what_the_sdks_own_does_but_for_the_image(
    tmp_path: Path
) -> None:
    script = example(README, "Use it in a cluster", 1).text
    ours = request_of_script(script, tmp_path)
    calls = re.findall(r"(?m)^@init_class\(etl, (.*)\)  # before: @etl.init_class\(\.\.\.\)$", script)
    assert len(calls) == 1
    any_python = ("import sys, aistore.sdk.etl.etl as module\n"
                  "module.ETL_SUPPORTED_PYTHON_VERSIONS = ['%d.%d' % sys.version_info[:2]]\n")
    theirs = request_of_script(any_python + re.sub(
        r"(?m)^@init_class\(.*$", "@etl.init_class(%s)" % calls[0], script), tmp_path)
    runtimes = [ours.pop("runtime"), theirs.pop("runtime")]
    assert ours == theirs and ours["support_direct_put"] is True
    variables = [{each["name"]: each["value"] for each in runtime["env"]} for runtime in runtimes]
    assert all(each.pop("ETL_CLASS_PAYLOAD") for each in variables)
    assert variables[0].pop("OS_PACKAGES") == ""  # which counts as unset
    assert variables[0] == variables[1] == {"PACKAGES": "numpy>=2", "NUM_WORKERS": "2"}
    image = re.search(r'(?m)^IMAGE = "(.*)"$', script)
    assert image and runtimes[0]["image"] == image[1]


def test_the_commands_for_the_image_are_those_of_the_python_example() -> None:
    build, push = map(shlex.split, example(README, "Use it in a cluster").text.splitlines())
    assert build[:3] == ["docker", "build", "-t"] and push[:2] == ["docker", "push"]
    assert build[3] == push[2] and 'IMAGE = "%s"' % push[2] in read_document(README)
    assert example(REFERENCE, "The image").text.split() == build


def as_json(text: str) -> Dict[str, Any]:
    """Parse YAML by the parser that the SDK brings along."""
    script = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"
    done = subprocess.run([interpreter("sdk"), "-c", script], input=text.encode(),
                          stdout=subprocess.PIPE, check=True, timeout=60)
    parsed: Dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_the_spec_is_what_the_sdk_sends_for_its_values(tmp_path: Path) -> None:
    spec = as_json(example(REFERENCE, "A spec for AIStore's command line").text)
    runtime = spec["runtime"]
    script = """
from aistore.sdk import Client
etl = Client("http://my-cluster:51080").etl(%r)
etl.init(%r, comm_type=%r, init_timeout=%r, obj_timeout=%r, direct_put=%r, ETL_CLASS_PAYLOAD=%r)
""" % (spec["name"], runtime["image"], str(spec["communication"])[:-3], spec["init_timeout"],
       spec["obj_timeout"], spec["support_direct_put"], runtime["env"][0]["value"])
    sent = request_of_script(script, tmp_path)
    assert sent == spec


# == The class ==


def test_the_streaming_example_streams(start_runtime: StartRuntime) -> None:
    source = THREADED + example(README, "Large objects").text
    runtime = start_runtime(make_payload(source, "Upper"))
    body = b"hello " * 500_000
    assert runtime.request("PUT", "/b/o", body).body == body.upper()
    assert "chunked" in runtime.request("PUT", "/b/o", b"x").headers["transfer-encoding"]


def test_the_fastapi_example_serves_its_route_and_its_objects(start_runtime: StartRuntime) -> None:
    source = FASTAPI + example(README, "FastAPI and Flask").text
    runtime = start_runtime(make_payload(source, "Shout"), python=interpreter("sdk"))
    assert runtime.request("PUT", "/b/o", b"hello").body == b"HELLO!"
    assert json.loads(runtime.request("GET", "/version").body) == {"version": 1}


# == Packages ==


@pytest.fixture
def own_python(tmp_path: Path) -> str:
    """An interpreter that has cloudpickle and pip, and an environment of its own."""
    return make_environment(tmp_path / "environment")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with one small wheel."""
    make_wheel(tmp_path / "wheels", "etl_probe", "1.0")
    return tmp_path / "wheels"


def install(example: str, changes: Dict[str, str], python: str) -> str:
    """Install a package with the variables of an example; return the version that is there then."""
    for text, value in changes.items():
        assert text in example
        example = example.replace(text, value)
    variables = dict(line.split("=", 1) for line in example.split())
    more = {"PACKAGES": "etl_probe", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    start_in_vain({**more, **variables}, python)
    return installed_in(python, "etl_probe")


def test_the_variables_for_an_index_of_ones_own(
    start_target: Callable[..., StandInTarget], certificates: Certificates, wheels: Path,
    own_python: str,
) -> None:
    index = start_target(certificates.server_context())
    index.default = simple_index(wheels)
    text = example(REFERENCE, "Packages").text
    changes = {"pypi.example.com": index.root.partition("://")[2].replace("127.0.0.1", "localhost"),
               "/etc/ssl/company.pem": str(certificates.ca)}
    assert install(text, changes, own_python) == "1.0"
    assert "authorization" in index.requests[-1].headers


def test_the_variables_for_a_folder_of_wheels(wheels: Path, own_python: str) -> None:
    text = example(REFERENCE, "Packages", 1).text
    assert install(text, {"/wheels": str(wheels)}, own_python) == "1.0"


# == Security ==


def test_the_network_policy_admits_targets_and_the_pods_of_etls() -> None:
    policy = as_json(example(README, "Security").text)
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    etl = {"matchLabels": {"app.kubernetes.io/name": "etl"}}
    target = {"matchLabels": {"app.kubernetes.io/component": "target"}}
    assert policy["spec"] == {
        "podSelector": etl, "policyTypes": ["Ingress"],
        "ingress": [{"ports": [{"port": 8000}],
                     "from": [{"podSelector": target}, {"podSelector": etl}]}],
    }


# == The project ==


def test_the_command_for_the_tests_is_the_one_that_ci_calls() -> None:
    command = example(README, "The project").text.strip()
    assert command == "python3 tests/run.py"
    assert "exec %s --all --slow" % command in (ROOT / ".ci" / "run").read_text()
