"""Real pip and apt-get install what a class needs, also where the pod is not root."""
import base64
import functools
import http.server
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence

import pytest

from ais_runtime_min import Exit, PackageError, install_os_packages
from harness import RUNTIME, Runtime, exact_environment, interpreter, make_payload, run_to_end
from standin import Certificates
from test_packages import SECRET, start_in_vain

StartRuntime = Callable[..., Runtime]
UNPRIVILEGED = 65532

# == apt-get for real ==


@functools.lru_cache(maxsize=None)
def apt_config(folder: Path) -> str:
    """Give apt-get lists of its own and let it wait for others, or skip the test."""
    if os.geteuid() or not shutil.which("apt-get") or shutil.which("apk"):
        pytest.skip("apt-get for real needs root on Debian")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    config = folder / "apt.conf"
    config.write_text('Dir::State::lists "%s/lists";\nDir::Cache "%s/cache";\nDPkg::Lock::Timeout "120";\n'
                      'APT::Sandbox::User "root";\nAcquire::Retries "1";\nAcquire::http::Timeout "20";\n' % (folder, folder))
    done = subprocess.run(["apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any"],
                          env={**os.environ, "APT_CONFIG": str(config)}, timeout=150,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        pytest.skip("apt-get reaches no archive: %s" % done.stdout[-200:])
    return str(config)


@pytest.fixture
def apt(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have apt-get work here."""
    monkeypatch.setenv("APT_CONFIG", apt_config(tmp_path_factory.getbasetemp() / "apt"))


@pytest.mark.slow
@pytest.mark.usefixtures("apt")
def test_apt_get_installs_a_package_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("hello"):
        pytest.skip("the package is there already")
    try:
        install_os_packages("hello")
        assert subprocess.check_output(["hello"], universal_newlines=True) == "Hello, world!\n"
        monkeypatch.setenv("APT_CONFIG", "/no/such/file")
        install_os_packages("hello")  # it is not asked again
    finally:
        subprocess.run(["dpkg", "--purge", "hello"], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no-such-package-here", "lib.no.such.package", "lib.sl"])
@pytest.mark.usefixtures("apt")
def test_apt_get_finds_no_package_of_a_wrong_name_for_real(name: str) -> None:
    with pytest.raises(PackageError, match="OS_PACKAGES: apt-get failed with exit code 100 for %s: Unable to locate" % name):
        install_os_packages(name)


# == pip ==


def make_wheel(folder: Path, name: str = "etl_probe", version: str = "1.0", metadata: str = "") -> Path:
    """Make the smallest wheel: one module, one command and its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "%s-%s.dist-info" % (name, version)
    files = {
        name + ".py": 'VERSION = "%s"\ndef main():\n    print(VERSION)\n' % version,
        info + "/METADATA": "Metadata-Version: 2.1\nName: %s\nVersion: %s\n%s" % (name, version, metadata),
        info + "/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        info + "/entry_points.txt": "[console_scripts]\n%s = %s:main\n" % (name, name),
    }
    record = "".join("%s,,\n" % file for file in [*files, info + "/RECORD"])
    wheel = folder / ("%s-%s-py3-none-any.whl" % (name, version))
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in {**files, info + "/RECORD": record}.items():
            archive.writestr(file, text)
    return wheel


@functools.lru_cache(maxsize=None)
def purelib_of(python: str) -> str:
    """Ask an interpreter where pip installs."""
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.check_output([python, "-c", ask], universal_newlines=True).strip()


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory, slim_python: str) -> Path:
    """An environment without packages, to be copied."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    subprocess.run([slim_python, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return folder


def make_environment(bare_environment: Path, folder: Path, slim_python: str) -> str:
    """Make an environment that has cloudpickle and pip, and keeps for itself what is installed; return its interpreter."""
    shutil.copytree(bare_environment, folder, symlinks=True)
    site_packages, = folder.glob("lib/python*/site-packages")
    (site_packages / "lent.pth").write_text(purelib_of(slim_python) + "\n")
    return str(folder / "bin" / "python")


@pytest.fixture
def own_python(tmp_path: Path, bare_environment: Path, slim_python: str) -> str:
    """An interpreter that has cloudpickle and pip, and an environment of its own."""
    return make_environment(bare_environment, tmp_path / "environment", slim_python)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder where every user can look; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a small wheel, one that depends on it by an extra, and a later version."""
    make_wheel(tmp_path / "wheels", version="1.0")
    make_wheel(tmp_path / "wheels", version="2.0")
    extra = 'Provides-Extra: probing\nRequires-Dist: etl_probe<2; extra == "probing"\n'
    make_wheel(tmp_path / "wheels", "etl_user", metadata=extra)
    return tmp_path / "wheels"


def offline(wheels: Path) -> Dict[str, str]:
    """Return the variables that have pip take wheels from a folder and from nowhere else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}


def installed_in(python: str, name: str) -> str:
    """Ask a fresh interpreter for the version of a distribution; "" where it is not there."""
    code = "import importlib.metadata as m; print(m.version(%r))" % name
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    return done.stdout.strip()


def test_wheels_of_a_folder_are_installed_once_and_pip_is_not_run_for_what_is_there(
    own_python: str, wheels: Path, tmp_path: Path
) -> None:
    def start(text: str, found: Path = wheels, **env: str) -> List[str]:
        done = start_in_vain({"PACKAGES": text, **offline(found), **env}, own_python)
        assert done.code == Exit.DATA
        return [line for line in done.lines if "installing Python packages: " in line]

    def installed() -> List[str]:
        return [installed_in(own_python, name) for name in ("etl-probe", "etl-user")]

    # Whatever its variables say, pip installs where packages can be imported.
    names = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN")
    elsewhere = {name: str(tmp_path / "elsewhere") for name in names}
    line, = start("Etl.Probe<2,etl_user[probing]", **elsewhere)
    assert line.endswith("installing Python packages: Etl.Probe<2 etl_user[probing]")
    assert installed() == ["1.0", "1.0"] and not (tmp_path / "elsewhere").exists()
    assert start("etl-probe>=1,<2,ETL.probe~=1.0", tmp_path / "nothing") == []
    # What pip must judge, and finds there, is no failure.
    start("etl-user[probing]; python_version >= '3',etl-probe>=1rc1")
    assert installed() == ["1.0", "1.0"]
    start("etl-probe>=2")
    assert installed() == ["2.0", "1.0"]


def test_requirements_that_exclude_each_other_are_told(own_python: str, wheels: Path) -> None:
    done = start_in_vain({"PACKAGES": "etl-user[probing],etl_probe>=2", **offline(wheels)}, own_python)
    assert done.code == Exit.UNAVAILABLE
    assert "PACKAGES: pip failed with exit code 1 for etl-user[probing] etl_probe>=2: ERROR: " in done.last_line
    assert any("conflict" in line for line in done.lines)


def test_a_python_without_pip_is_told(bare_environment: Path) -> None:
    done = start_in_vain({"PACKAGES": "six>=1"}, str(bare_environment / "bin" / "python"))
    assert done.code == Exit.UNAVAILABLE
    assert "PACKAGES: cannot install six>=1: this Python has no pip" in done.last_line
    assert "No module named pip" in done.last_line


# == pip's own variables ==


class Index:
    """A package index on 127.0.0.1, with or without TLS; it notes the user whom each request names."""

    def __init__(self, wheels: Path, tls: Optional[ssl.SSLContext] = None) -> None:
        self.users: List[str] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Answers with a page of links, or a wheel."""

            def do_GET(self) -> None:
                """Answer one request."""
                authorization = self.headers.get("Authorization", "")
                index.users.append(base64.b64decode(authorization.partition(" ")[2]).decode())
                if self.path.startswith("/simple/"):
                    project = self.path.split("/")[2].replace("-", "_")
                    names = [file.name for file in wheels.iterdir() if file.name.startswith(project)]
                    body = "".join('<a href="/files/%s">%s</a>' % (name, name) for name in names).encode()
                else:
                    body = wheels.joinpath(self.path.rpartition("/")[2]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if self.path.startswith("/simple/") else "application/zip")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "max-age=600")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if tls is not None else "http"
        self.url = "%s://user:%s@localhost:%d/simple" % (scheme, SECRET, self._server.server_address[1])

    def __enter__(self) -> "Index":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_pip_is_told_of_indexes_with_passwords_of_a_certificate_and_of_a_cache(
    own_python: str, wheels: Path, tmp_path: Path, certificates: Certificates
) -> None:
    env = {"PACKAGES": "etl_probe", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0",
           "PIP_CACHE_DIR": str(tmp_path / "cache")}
    (tmp_path / "nothing").mkdir()
    with Index(tmp_path / "nothing") as empty, Index(wheels, certificates.server_context()) as index:
        env.update({"PIP_INDEX_URL": empty.url, "PIP_EXTRA_INDEX_URL": index.url})
        assert start_in_vain(env, own_python).code == Exit.UNAVAILABLE, "it has no reason to trust the certificate"
        assert start_in_vain({**env, "PIP_CERT": str(certificates.ca)}, own_python).code == Exit.DATA
        assert "user:" + SECRET in empty.users and "user:" + SECRET in index.users
    assert installed_in(own_python, "etl_probe") == "2.0"
    assert any(file.is_file() for file in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("text, reasons", [
    ("six", ["; the package index cannot be reached"]),
    ("six,x @ http://user:s3cr3t@127.0.0.1:9/x-1.0.zip", ["Connection refused", "connection-failed"]),
], ids=["index", "URL"])
def test_an_index_that_cannot_be_reached_is_told_without_its_password(
    own_python: str, text: str, reasons: Sequence[str]
) -> None:
    env = {"PACKAGES": text, "PIP_INDEX_URL": "http://user:%s@127.0.0.1:9/simple" % SECRET,
           "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
    done = start_in_vain(env, own_python)
    assert done.code == Exit.UNAVAILABLE
    assert "PACKAGES: pip failed with exit code 1 for six" in done.last_line
    assert any(reason in done.last_line for reason in reasons)


# == The real index ==


def network_variables() -> Dict[str, str]:
    """Return the variables by which this machine reaches the network, pip's among them."""
    wanted = re.compile(r"PIP_(?!FIND_LINKS|NO_INDEX|TARGET|USER)|SSL_CERT_|REQUESTS_CA_BUNDLE$|.*_proxy$", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if wanted.match(name)}


def test_pip_installs_from_the_real_index_and_what_it_does_not_have_is_told(
    own_python: str
) -> None:
    env = {**network_variables(), "PIP_RETRIES": "1"}
    packages = "six>=1.10,<1.15,!=1.14.*,python-dotenv[cli]>=0.19,<2"
    done = start_in_vain({"PACKAGES": packages, **env}, own_python)
    if "the package index cannot be reached" in done.last_line:
        pytest.skip(done.last_line)
    assert done.code == Exit.DATA
    assert installed_in(own_python, "six") == "1.13.0" and installed_in(own_python, "click")
    assert re.fullmatch(r"[01]\..*", installed_in(own_python, "python-dotenv"))
    done = start_in_vain({"PACKAGES": "six==1.0.7777", **env}, own_python)
    assert done.code == Exit.UNAVAILABLE
    assert done.last_line.endswith("PACKAGES: pip failed with exit code 1 for six==1.0.7777: "
                                   "ERROR: No matching distribution found for six==1.0.7777")


# == Before the class is loaded, and where site-packages cannot be written ==

USING = '''
import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Using(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        import etl_probe
        code = "import etl_probe; print(etl_probe.__file__)"
        child = subprocess.check_output([sys.executable, "-c", code], universal_newlines=True).strip()
        command = subprocess.check_output(["etl_probe"], universal_newlines=True).strip()
        module = etl_probe.__file__
        folders = [sysconfig.get_path("stdlib"), os.path.dirname(module), sysconfig.get_path("purelib")]
        places = [sys.path.index(folder) for folder in folders]
        modules = os.environ.get("PYTHONPATH", "").split(":")
        return json.dumps([module, child, command, os.getuid(), places, modules]).encode()
'''
PULSING = USING + '''
class Pulse:
    def __init__(self):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

    def __reduce__(self):
        return Pulse, ()

class UsingAndPulsing(Using):
    heart = Pulse()
'''


def make_apk(folder: Path, script: str) -> str:
    """Make a stand-in for apk of a shell script; return the PATH that finds it."""
    (folder / "apk").write_text("#!/bin/sh\n%s\n" % script)
    (folder / "apk").chmod(0o755)
    return "%s:/usr/bin:/bin" % folder


def test_os_packages_then_python_packages_are_installed_before_the_class_is_loaded(
    start_runtime: StartRuntime, own_python: str, wheels: Path, tmp_path: Path
) -> None:
    kept = wheels.rename(tmp_path / "kept")
    wheels.mkdir()  # pip finds nothing here before apk has run
    path = make_apk(tmp_path, '[ "$1" = info ] && exit 1; cp "%s"/*.whl "%s"' % (kept, wheels))
    env = {"OS_PACKAGES": "ffmpeg", "PACKAGES": "etl_probe,cloudpickle", "NUM_WORKERS": "1",
           "PATH": "%s:%s" % (Path(own_python).parent, path), **offline(wheels)}
    runtime = start_runtime(make_payload(PULSING, "Using"), env, python=own_python)
    assert json.loads(runtime.request("PUT", "/bucket/object", b"").body)[2] == "2.0"


def unprivileged(folder: Path, python: str) -> str:
    """Make a launcher of an interpreter for a user who may write nothing of this environment, but read it.

    Root becomes such a user, who may read what root can; everybody else is one once the folder is read-only.
    """
    if os.geteuid():
        return python
    setpriv = shutil.which("setpriv")
    command = [str(setpriv), "--reuid=%d" % UNPRIVILEGED, "--regid=%d" % UNPRIVILEGED, "--clear-groups", "--bounding-set=-all,"
               "+dac_read_search", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    if setpriv is None or subprocess.run([*command, python, "-c", ""], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("root cannot become another user here: no setpriv, or no capabilities")
    launcher = folder / "unprivileged-python"
    launcher.write_text('#!/bin/sh\nexec %s "%s" "$@"\n' % (" ".join(command), python))
    launcher.chmod(0o755)
    return str(launcher)


def test_without_root_an_os_package_that_is_there_needs_none_and_another_is_told(
    open_folder: Path
) -> None:
    python = unprivileged(open_folder, interpreter("slim"))
    script = 'case "$1$3" in infobusybox) exit 0;; esac; echo "ERROR: no root"; exit 9'
    path = make_apk(open_folder, script)
    done = start_in_vain({"OS_PACKAGES": "busybox", "PATH": path}, python)
    assert done.code == Exit.DATA, done.lines
    done = start_in_vain({"OS_PACKAGES": "busybox,ffmpeg", "PATH": path}, python)
    assert done.code == Exit.UNAVAILABLE
    assert re.search(r"apk failed with exit code 9 for ffmpeg: ERROR: no root; apk needs root, and this pod runs as user \d+$",
                     done.last_line)


@pytest.fixture
def read_only_python(open_folder: Path, bare_environment: Path, slim_python: str) -> Iterator[str]:
    """An interpreter of a user who cannot write its site-packages."""
    python = make_environment(bare_environment, open_folder / "environment", slim_python)
    folder = Path(purelib_of(python))
    folder.chmod(0o555)
    yield unprivileged(open_folder, python)
    folder.chmod(0o755)


@pytest.fixture
def spare(open_folder: Path) -> Path:
    """A folder for temporary files that everybody may write."""
    folder = open_folder / "spare"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


HOMELESS = pytest.mark.xfail(
    sys.version_info >= (3, 15), reason="its pip fails where a user has no home directory at all")


@pytest.mark.parametrize("name, home", [
    pytest.param("Using", None, marks=HOMELESS), ("UsingAndPulsing", "/"),
])
def test_where_site_packages_cannot_be_written_workers_find_packages_in_a_folder_of_their_own(
    start_runtime: StartRuntime, read_only_python: str, wheels: Path, spare: Path, name: str, home: Optional[str]
) -> None:
    env = {"PACKAGES": "etl_probe<2", "NUM_WORKERS": "2", "TMPDIR": str(spare), "HOME": home, **offline(wheels),
           "PIP_NO_CACHE_DIR": None, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "/mine"}
    runtime = start_runtime(make_payload(PULSING, name), env, python=read_only_python)
    answer = runtime.request("PUT", "/bucket/object", b"").body
    module, childs_module, command, user, places, modules = json.loads(answer)
    assert Path(module).parent.parent == spare and childs_module == module
    assert command == "1.0"
    assert places == sorted(places), "it does not stand between standard library and site-packages"
    assert modules == ["/mine", str(Path(module).parent)]
    assert user == (os.geteuid() or UNPRIVILEGED)
    assert not any(" - WARNING - " in line for line in runtime.lines)
    assert runtime.terminate() == Exit.OK
    assert list(spare.iterdir()) == [], "the folder is still there"


def test_no_folder_that_can_be_written_is_told(read_only_python: str, wheels: Path, tmp_path: Path) -> None:
    code = ("import sys, tempfile; sys.path.insert(0, %r); tempfile._candidate_tempdir_list = lambda: ['/proc']\n"
            "import ais_runtime_min as runtime\n"
            "try: runtime.install_python_packages('etl_probe')\n"
            "except runtime.PackageError as error: print(error)") % str(RUNTIME.parent)
    env = exact_environment(read_only_python, offline(wheels))
    said = subprocess.check_output([read_only_python, "-c", code], env=env, universal_newlines=True)
    assert re.fullmatch("PACKAGES: cannot install etl_probe: neither .*site-packages nor any folder for temporary files can be "
                        "written; install it into the image, or give the pod a writable /tmp\n", said)


def test_a_second_run_of_pip_keeps_to_what_the_first_one_was_asked_for(
    read_only_python: str, wheels: Path, spare: Path
) -> None:
    code = ("import sys, json; sys.path.insert(0, %r); import ais_runtime_min as runtime\n"
            "runtime.install_python_packages('etl_probe==1.0')\n"
            "runtime.install_python_packages('etl_user[probing]', 'Using needs etl_user')\n"
            "import etl_probe, etl_user\n"
            "print(json.dumps([sys.path, etl_probe.__file__, etl_user.__file__, etl_probe.VERSION]))") % str(RUNTIME.parent)
    env = exact_environment(
        read_only_python, {**offline(wheels), "TMPDIR": str(spare), "HOME": "/"})
    path, probe, user, version = json.loads(subprocess.check_output([read_only_python, "-c", code], env=env))
    assert Path(probe).parent == Path(user).parent and version == "1.0"
    assert path.count(str(Path(probe).parent)) == 1


def test_packages_of_the_systems_own_python_are_left_alone(wheels: Path, spare: Path) -> None:
    python = "/usr/bin/python3"
    probe = ("import os, sys, sysconfig, pip; assert sys.version_info >= (3, 9); "
             "assert os.path.exists(os.path.join(sysconfig.get_path('stdlib'), 'EXTERNALLY-MANAGED'))")
    if not os.path.exists(python) or subprocess.run([python, "-c", probe], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this system has no Python with pip that it manages itself")
    code = ("import sys; sys.path.insert(0, %r); import ais_runtime_min\n"
            "ais_runtime_min.install_python_packages('etl_probe')\n"
            "import etl_probe; print(etl_probe.__file__)") % str(RUNTIME.parent)
    env = exact_environment(python, {**offline(wheels), "TMPDIR": str(spare), "PYTHONDONTWRITEBYTECODE": "1"})
    module = Path(subprocess.check_output([python, "-c", code], env=env, universal_newlines=True).strip())
    assert module.parent.parent == spare and list(spare.iterdir()) == []


def test_install_puts_no_packages_where_they_are_lost(read_only_python: str, wheels: Path, spare: Path) -> None:
    env = {"PACKAGES": "etl_probe", "TMPDIR": str(spare), **offline(wheels)}
    done = run_to_end(["install"], env, python=read_only_python)
    assert done.code == Exit.UNAVAILABLE and "run install as root" in done.last_line
    assert list(spare.iterdir()) == []
