"""Real pip and apt-get install what a class needs, also where the pod is not root."""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.utils import formatdate
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

import pytest

from ais_runtime_min import Exit, PackageError, install_os_packages
from harness import (RUNTIME, Environ, Runtime, exact_environment, interpreter, make_payload,
                     run_to_end)
from standin import Behaviour, Certificates, Recorded, StandInTarget
from test_packages import SECRET, start_in_vain

StartRuntime = Callable[..., Runtime]
UNPRIVILEGED = 65532
INDEX_VARIABLES = re.compile(r"PIP_(?!FIND_LINKS|NO_INDEX|TARGET|USER)|SSL_CERT_|"
                             r"REQUESTS_CA_BUNDLE$|.*_proxy$|HOME$", re.IGNORECASE)


@pytest.mark.slow
def test_apt_get_installs_a_package_for_real_and_finds_none_of_a_wrong_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() or not shutil.which("apt-get") or shutil.which("apk"):
        pytest.skip("apt-get for real needs root on Debian")
    if shutil.which("hello"):
        pytest.skip("the package is there already")
    for name in ("lists/partial", "cache/archives/partial"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "apt.conf").write_text("""
        Dir::State::lists "%s/lists"; Dir::Cache "%s/cache"; DPkg::Lock::Timeout "120";
        APT::Sandbox::User "root"; Acquire::Retries "1"; Acquire::http::Timeout "20";
        """ % (tmp_path, tmp_path))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    update = ["apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any"]
    if subprocess.run(update, timeout=150).returncode:
        pytest.skip("apt-get reaches no archive")
    for name in ("no-such-package-here", "lib.no.such.package", "lib.sl"):
        reason = "OS_PACKAGES: apt-get failed with exit code 100 for %s: Unable to locate" % name
        with pytest.raises(PackageError, match=reason):
            install_os_packages(name)
    try:
        install_os_packages("hello")
        assert subprocess.check_output(["hello"], universal_newlines=True) == "Hello, world!\n"
        monkeypatch.setenv("APT_CONFIG", "/no/such/file")
        install_os_packages("hello")  # it is not asked again
    finally:
        subprocess.run(["dpkg", "--purge", "hello"], stdout=subprocess.DEVNULL, check=True)


# == pip ==


def make_wheel(folder: Path, name: str, version: str, metadata: str = "") -> None:
    """Make the smallest wheel: one module, one command and its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "%s-%s.dist-info/" % (name, version)
    files = {
        name + ".py": 'VERSION = "%s"\ndef main():\n    print(VERSION)\n' % version,
        info + "METADATA": "Name: %s\nVersion: %s\nMetadata-Version: 2.1\n%s" % (
            name, version, metadata),
        info + "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        info + "entry_points.txt": "[console_scripts]\n%s = %s:main\n" % (name, name),
    }
    files[info + "RECORD"] = "".join("%s,,\n" % file for file in [*files, info + "RECORD"])
    with zipfile.ZipFile(folder / ("%s-%s-py3-none-any.whl" % (name, version)), "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)


def make_environment(folder: Path, has_pip: bool = True) -> str:
    """Make an environment and return its interpreter, which may find pip and cloudpickle."""
    command = [interpreter("slim"), "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True, timeout=60)
    if has_pip:
        ask = [interpreter("slim"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site_packages, = folder.glob("lib/python*/site-packages")
        (site_packages / "lent.pth").write_bytes(subprocess.check_output(ask))
    return str(folder / "bin" / "python")


def index_variables() -> Dict[str, str]:
    """Return the variables by which this machine reaches the network, pip's among them."""
    return {name: value for name, value in os.environ.items() if INDEX_VARIABLES.match(name)}


@pytest.fixture
def own_python(tmp_path: Path) -> str:
    """An interpreter that has cloudpickle and pip, and an environment of its own."""
    return make_environment(tmp_path / "environment")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder where every user can look, and may write `spare`; pytest's are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        Path(folder, "spare").mkdir()
        Path(folder, "spare").chmod(0o1777)
        yield Path(folder)


@pytest.fixture
def spare(open_folder: Path) -> Path:
    """A folder for temporary files that everybody may write."""
    return open_folder / "spare"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a small wheel, one that depends on it by an extra, and a later version."""
    make_wheel(tmp_path / "wheels", "etl_probe", "1.0")
    make_wheel(tmp_path / "wheels", "etl_probe", "2.0")
    extra = 'Provides-Extra: probing\nRequires-Dist: etl_probe<2; extra == "probing"\n'
    make_wheel(tmp_path / "wheels", "etl_user", "1.0", extra)
    return tmp_path / "wheels"


def offline(wheels: Path) -> Dict[str, str]:
    """Return the variables that have pip take wheels from a folder and from nowhere else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_CACHE_DIR": "1"}


def simple_index(wheels: Path) -> Callable[[Recorded], Behaviour]:
    """Return what answers as a package index that has the wheels of a folder (PEP 503)."""
    def answer(head: Recorded) -> Behaviour:
        name = head.path.split("/")[2]
        if head.path.startswith("/files/"):
            body, kind = (wheels / name).read_bytes(), "application/zip"
        else:
            links = ['<a href="/files/{0}">{0}</a>'.format(file.name) for file in wheels.iterdir()]
            body, kind = "".join(links).encode(), "text/html"
        headers = (("Content-Type", kind), ("Cache-Control", "max-age=600"),
                   ("Date", formatdate(usegmt=True)))
        return Behaviour(status=200, headers=headers, body=body)

    return answer


def installed_in(python: str, name: str) -> str:
    """Ask a fresh interpreter for the version of a distribution; "" where it is not there."""
    code = "import importlib.metadata as m; print(m.version(%r))" % name
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
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
    # These exclude each other.
    env = {"PACKAGES": "etl-user[probing],etl_probe>=2", **offline(wheels)}
    done = start_in_vain(env, own_python)
    assert done.code == Exit.UNAVAILABLE
    reason = "pip failed with exit code 1 for etl-user[probing] etl_probe>=2: ERROR: "
    assert reason in done.last_line


@pytest.mark.parametrize("how", ["variable", "configuration"])
def test_packages_can_be_imported_though_pip_is_told_to_install_for_the_user(
    own_python: str, wheels: Path, tmp_path: Path, how: str
) -> None:
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n")
    means = {"PIP_USER": "1"} if how == "variable" else {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    env = {"PACKAGES": "etl_probe<2", **offline(wheels), "HOME": str(tmp_path), **means}
    done = start_in_vain(env, own_python)
    assert done.code == Exit.DATA and installed_in(own_python, "etl-probe") == "1.0"


def test_an_older_version_is_not_taken_for_what_pip_has_not_installed(
    own_python: str, wheels: Path, tmp_path: Path
) -> None:
    done = start_in_vain({"PACKAGES": "etl_probe<2", **offline(wheels)}, own_python)
    assert done.code == Exit.DATA
    (tmp_path / "pip.conf").write_text("[global]\ndry-run = true\n")
    env = {"PACKAGES": "etl_probe>=2", **offline(wheels), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    done = start_in_vain(env, own_python)
    assert done.code == Exit.UNAVAILABLE and "cannot be found here" in done.last_line


@pytest.mark.parametrize("name", ["target", "prefix", "root", "dry-run"])
def test_what_pip_installs_elsewhere_or_not_at_all_is_told_at_the_start(
    own_python: str, wheels: Path, tmp_path: Path, name: str
) -> None:
    value = "true" if name == "dry-run" else str(tmp_path / "elsewhere")
    (tmp_path / "pip.conf").write_text("[global]\n%s = %s\n" % (name, value))
    env = {"PACKAGES": "etl_probe<2", **offline(wheels), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    done = start_in_vain(env, own_python)
    assert done.code == Exit.UNAVAILABLE
    assert "pip succeeded, but etl_probe<2 cannot be found here" in done.last_line


def test_a_python_without_pip_is_told(tmp_path: Path) -> None:
    done = start_in_vain({"PACKAGES": "six>=1"}, make_environment(tmp_path / "bare", has_pip=False))
    assert done.code == Exit.UNAVAILABLE
    assert "PACKAGES: pip failed with exit code 1 for six>=1: " in done.last_line
    assert done.last_line.endswith("No module named pip")
    # what is there needs none
    site_packages, = (tmp_path / "bare").glob("lib/python*/site-packages")
    for name in ("some-thing", "other"):
        info = site_packages / ("%s-1.5.dist-info" % name.replace("-", "_"))
        info.mkdir()
        info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: %s\nVersion: 1.5\n" % name)
    done = start_in_vain({"PACKAGES": "Some_Thing,other"}, str(tmp_path / "bare" / "bin" / "python"))
    assert done.code == Exit.DATA


def test_pip_is_told_of_indexes_with_passwords_of_a_certificate_and_of_a_cache(
    own_python: str, wheels: Path, tmp_path: Path, certificates: Certificates,
    start_target: Callable[..., StandInTarget]
) -> None:
    empty, index = start_target(), start_target(certificates.server_context())
    index.default = simple_index(wheels)
    urls = [each.root.replace("127.0.0.1", "user:%s@localhost" % SECRET) + "/simple"
            for each in (empty, index)]
    env = {"PACKAGES": "etl_probe", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0",
           "PIP_CACHE_DIR": str(tmp_path / "cache"), "PIP_INDEX_URL": urls[0],
           "PIP_EXTRA_INDEX_URL": urls[1]}
    done = start_in_vain(env, own_python)
    assert done.code == Exit.UNAVAILABLE, "it has no reason to trust the certificate"
    done = start_in_vain({**env, "PIP_CERT": str(certificates.ca)}, own_python)
    assert done.code == Exit.DATA and installed_in(own_python, "etl_probe") == "2.0"
    user = "Basic " + base64.b64encode(b"user:" + SECRET.encode()).decode()
    for each in (empty, index):
        assert user in [request.headers.get("authorization") for request in each.requests]
    assert any(file.is_file() for file in (tmp_path / "cache").rglob("*"))


def test_an_index_that_cannot_be_reached_is_told_without_its_password(own_python: str) -> None:
    env = {"PIP_INDEX_URL": "http://user:%s@127.0.0.1:9/simple" % SECRET,
           "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
    for text, reason in [
        ("six", "; the package index cannot be reached"),
        ("six,x @ http://user:s3cr3t@127.0.0.1:9/x.zip", "Connection refused|connection-failed"),
    ]:
        done = start_in_vain({"PACKAGES": text, **env}, own_python)
        assert done.code == Exit.UNAVAILABLE
        assert "PACKAGES: pip failed with exit code 1 for six" in done.last_line
        assert re.search(reason, done.last_line)


def test_pip_installs_from_the_real_index_and_what_it_does_not_have_is_told(
    own_python: str
) -> None:
    env = {**index_variables(), "PIP_RETRIES": "1"}
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
import json, os, subprocess, sys, sysconfig, threading, time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Using(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        import etl_probe
        ask = [sys.executable, "-c", "import etl_probe; print(etl_probe.__file__)"]
        child, command = (subprocess.check_output(each, universal_newlines=True).strip()
                          for each in (ask, ["etl_probe"]))
        module = etl_probe.__file__
        library, purelib = map(sysconfig.get_path, ("stdlib", "purelib"))
        places = [sys.path.index(each) for each in (library, os.path.dirname(module), purelib)]
        modules = os.environ.get("PYTHONPATH", "").split(":")
        return json.dumps([module, child, command, os.getuid(), places, modules]).encode()

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
    runtime = start_runtime(make_payload(USING, "Using"), env, python=own_python)
    assert json.loads(runtime.request("PUT", "/bucket/object", b"").body)[2] == "2.0"


def unprivileged(folder: Path, python: str) -> str:
    """Make a launcher of an interpreter for a user who may read this environment, but not write.

    Root becomes such a user; everybody else is one once the folder is read-only.
    """
    if os.geteuid():
        return python
    setpriv = shutil.which("setpriv")
    user, read = "%d --clear-groups" % UNPRIVILEGED, "+dac_read_search"
    options = "--reuid=%d --regid=%s --bounding-set=-all,%s --inh-caps=%s --ambient-caps=%s"
    command = [str(setpriv), *(options % (UNPRIVILEGED, user, read, read, read)).split(), python]
    if setpriv is None or subprocess.run([*command, "-c", ""]).returncode:
        pytest.skip("root cannot become another user here: no setpriv, or no capabilities")
    launcher = folder / "unprivileged-python"
    launcher.write_text('#!/bin/sh\nexec %s "$@"\n' % " ".join(command))
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
    assert done.last_line.endswith("apk failed with exit code 9 for ffmpeg: ERROR: no root")


@pytest.fixture
def read_only_python(open_folder: Path) -> Iterator[str]:
    """An interpreter of a user who cannot write its site-packages."""
    python = make_environment(open_folder / "environment")
    folder, = open_folder.glob("environment/lib/python*/site-packages")
    folder.chmod(0o555)
    yield unprivileged(open_folder, python)
    folder.chmod(0o755)


HOMELESS = pytest.mark.xfail(
    sys.version_info >= (3, 15), reason="its pip fails where a user has no home directory at all")


@pytest.mark.parametrize("name, home", [
    pytest.param("Using", None, marks=HOMELESS), ("UsingAndPulsing", "/"),
])
def test_where_site_packages_cannot_be_written_workers_find_packages_in_a_folder_of_their_own(
    start_runtime: StartRuntime, read_only_python: str, wheels: Path, spare: Path, name: str,
    home: Optional[str]
) -> None:
    env = {"PACKAGES": "etl_probe<2", "NUM_WORKERS": "2", "TMPDIR": str(spare), "HOME": home,
           **offline(wheels), "PIP_NO_CACHE_DIR": None, "PYTHONDONTWRITEBYTECODE": "1",
           "PYTHONPATH": "/mine"}
    runtime = start_runtime(make_payload(USING, name), env, python=read_only_python)
    answer = runtime.request("PUT", "/bucket/object", b"").body
    module, childs_module, command, user, places, modules = json.loads(answer)
    assert Path(module).parent.parent == spare and childs_module == module
    assert command == "1.0"
    assert places == sorted(places), "not between standard library and site-packages"
    assert modules == ["/mine", str(Path(module).parent)]
    assert user == (os.geteuid() or UNPRIVILEGED)
    assert not any(" - WARNING - " in line for line in runtime.lines)
    assert runtime.terminate() == Exit.OK
    assert list(spare.iterdir()) == [], "the folder is still there"


def output_of(python: str, code: str, env: Environ) -> str:
    """Run code that has a function `install` for requirements, and return what it prints."""
    head = ("import json, sys; sys.path.insert(0, %r)\nimport ais_runtime_min as runtime\n"
            "install = runtime.install_python_packages\n" % str(RUNTIME.parent))
    return subprocess.check_output([python, "-c", head + code], env=exact_environment(python, env),
                                   universal_newlines=True)


def test_no_folder_that_can_be_written_is_told(read_only_python: str, wheels: Path) -> None:
    said = output_of(read_only_python, """
import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc']
try: install('etl_probe')
except runtime.PackageError as error: print(error)""", offline(wheels))
    assert re.fullmatch(
        "PACKAGES: neither .*site-packages nor any folder for temporary "
        "files can be written; install it into the image, or give the pod a writable /tmp\n", said)


def test_a_second_run_of_pip_keeps_to_what_the_first_one_was_asked_for(
    read_only_python: str, wheels: Path, spare: Path
) -> None:
    said = output_of(read_only_python, """
install('etl_probe==1.0')
install('etl_user[probing]', 'Using needs etl_user')
import etl_probe, etl_user
print(json.dumps([sys.path, etl_probe.__file__, etl_user.__file__, etl_probe.VERSION]))
""", {**offline(wheels), "TMPDIR": str(spare), "HOME": "/"})
    path, probe, user, version = json.loads(said)
    assert Path(probe).parent == Path(user).parent and version == "1.0"
    assert path.count(str(Path(probe).parent)) == 1


def test_packages_of_the_systems_own_python_are_left_alone(wheels: Path, spare: Path) -> None:
    python = "/usr/bin/python3"
    probe = ("import os, sys, sysconfig, pip; assert sys.version_info >= (3, 9); "
             "assert os.path.exists(sysconfig.get_path('stdlib') + '/EXTERNALLY-MANAGED')")
    if not os.path.exists(python) or subprocess.run([python, "-c", probe]).returncode:
        pytest.skip("this system has no Python with pip that it manages itself")
    env = {**offline(wheels), "TMPDIR": str(spare), "PYTHONDONTWRITEBYTECODE": "1"}
    code = "install('etl_probe'); import etl_probe; print(etl_probe.__file__)"
    module = output_of(python, code, env)
    assert Path(module).parent.parent == spare and list(spare.iterdir()) == []


def test_install_puts_no_packages_where_they_are_lost(
    read_only_python: str, wheels: Path, spare: Path
) -> None:
    env = {"PACKAGES": "etl_probe", "TMPDIR": str(spare), **offline(wheels)}
    done = run_to_end(["install"], env, python=read_only_python)
    assert done.code == Exit.UNAVAILABLE and "run install as root" in done.last_line
    assert list(spare.iterdir()) == []
