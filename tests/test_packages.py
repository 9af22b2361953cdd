"""What a class needs is installed by the tools of the image, for real where they are there, and not where it is there already."""
import base64
import contextlib
import functools
import http.server
import itertools
import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import pytest
from packaging.specifiers import InvalidSpecifier, SpecifierSet

import ais_runtime_min
from ais_runtime_min import (Exit, PackageError, TargetFolder, Tool, hide_credentials, install_os_packages,
                             install_python_packages, is_installed, last_words, satisfies, split_requirements)
from harness import RUNTIME, Environ, Finished, Runtime, Server, exact_environment, interpreter, make_payload, run_to_end
from standin import Certificates

StartRuntime = Callable[..., Runtime]
NO_PAYLOAD = base64.b64encode(b"no pickle").decode()  # packages come first, so a start that gets this far has installed them
SECRET = "s3cr3t"
UNPRIVILEGED = 65532
SECONDS = 60.0  # for what is to happen soon, on a machine that does other things as well
LARGE = 4 << 20

# == Splitting ==

REQUIREMENTS = [
    ("", []),
    (" ", []),
    (",", []),
    (" , ,", []),
    ("numpy", ["numpy"]),
    ("numpy,pillow", ["numpy", "pillow"]),
    (" numpy , pillow ,", ["numpy", "pillow"]),
    ("numpy\n,pillow\t", ["numpy", "pillow"]),
    ("numpy==1.26.4,pillow", ["numpy==1.26.4", "pillow"]),
    ("numpy>=1.20,<2", ["numpy>=1.20,<2"]),
    ("numpy>=1.20, <2,pillow", ["numpy>=1.20, <2", "pillow"]),
    ("numpy>=1.20,!=1.21.*,<2,pillow~=10.0,scipy", ["numpy>=1.20,!=1.21.*,<2", "pillow~=10.0", "scipy"]),
    ("numpy (>=1.20,<2),pillow", ["numpy (>=1.20,<2)", "pillow"]),
    ("a===1.0,==1.0", ["a===1.0,==1.0"]),
    ("requests[socks,security]", ["requests[socks,security]"]),
    ("requests[socks,security]>=2,<3,pillow", ["requests[socks,security]>=2,<3", "pillow"]),
    ("a; python_version < '3.12',b", ["a; python_version < '3.12'", "b"]),
    ("a; platform_machine in 'x86_64,aarch64',b", ["a; platform_machine in 'x86_64,aarch64'", "b"]),
    ('a; platform_machine in "x,y",b', ['a; platform_machine in "x,y"', "b"]),
    ("a; (os_name == 'posix' or extra == 'x,y') and python_version > '3',b",
     ["a; (os_name == 'posix' or extra == 'x,y') and python_version > '3'", "b"]),
    ("a @ https://host/a.whl,b", ["a @ https://host/a.whl", "b"]),
    ("git+https://host/a.git@v1#egg=a,b", ["git+https://host/a.git@v1#egg=a", "b"]),
    ("https://host/a-1.0-py3-none-any.whl", ["https://host/a-1.0-py3-none-any.whl"]),
    ("-r requirements.txt,b", ["-r requirements.txt", "b"]),
    ('numpy>=1,<2,pandas[perf,aws]==2.*; python_version<"3.12",pkg @ https://host/a,b.whl',
     ["numpy>=1,<2", 'pandas[perf,aws]==2.*; python_version<"3.12"', "pkg @ https://host/a,b.whl"]),
    ("pkg @ https://host/a,b/c-1.0.tar.gz#sha256=0,d", ["pkg @ https://host/a,b/c-1.0.tar.gz#sha256=0", "d"]),
    ("pkg @ https://host/it's.whl,b", ["pkg @ https://host/it's.whl", "b"]),
    ("a @ git+https://host/a.git@v1,b @ git+ssh://git@host/b.git,c>=1",
     ["a @ git+https://host/a.git@v1", "b @ git+ssh://git@host/b.git", "c>=1"]),
    ("https://host/a.whl,https://host/b.whl,c[d]", ["https://host/a.whl", "https://host/b.whl", "c[d]"]),
    ("./a.whl,/wheels/b.whl,c.whl", ["./a.whl", "/wheels/b.whl", "c.whl"]),
    ("a @ https://host/a.whl ; python_version > '3',b", ["a @ https://host/a.whl ; python_version > '3'", "b"]),
    ("a @ https://host/a.whl,--pre", ["a @ https://host/a.whl", "--pre"]),
]


@pytest.mark.parametrize("text, requirements", REQUIREMENTS, ids=[text or "empty" for text, _ in REQUIREMENTS])
def test_requirements_are_split_at_the_commas_between_them(text: str, requirements: List[str]) -> None:
    assert split_requirements(text) == requirements


@pytest.mark.parametrize("text", [
    "--index-url https://host", "numpy,-r file.txt", "numpy, --pre", "-e .", "numpy --index-url=https://host",
    "numpy>=1 -c constraints.txt",
])
def test_an_option_among_the_requirements_is_refused(text: str) -> None:
    with pytest.raises(PackageError, match="^PACKAGES has '.*-.*': options are not allowed"):
        install_python_packages(text)


def test_a_line_break_within_a_requirement_is_refused() -> None:
    with pytest.raises(PackageError, match="PACKAGES has .* separated by commas, not by line breaks"):
        install_python_packages("numpy\npillow")


def test_a_refusal_names_what_wants_the_package_and_hides_passwords() -> None:
    with pytest.raises(PackageError, match="^Shop needs Flask has 'a --index-url=https://...@host': options") as caught:
        install_python_packages("a --index-url=https://user:%s@host" % SECRET, why="Shop needs Flask")
    assert SECRET not in str(caught.value)


# == What is there already ==

INSTALLED = [
    ("pytest", True),
    ("PyTest", True),
    ("pytest_timeout", True),
    ("pytest.-_timeout", True),
    ("no-such-distribution", False),
    ("pytest>=1", True),
    ("pytest >= 1, < 1000", True),
    ("pytest>=1000", False),
    ("pytest==1", False),
    ("pytest[extra]", False),
    ("pytest; python_version > '3'", False),
    ("pytest @ file:///pytest", False),
    ("pytest>=1rc1", False),
    ("pytest>=1+local", False),
    ("pytest>=1!1", False),
    ("pytest>=1 <1000", False),
    ("pytest===1", False),
    ("pytest>=1.*", False),
    ("../pytest", False),
    ("", False),
    ("-e .", False),
]


@pytest.mark.parametrize("requirement, installed", INSTALLED, ids=[text or "empty" for text, _ in INSTALLED])
def test_a_name_and_plain_versions_can_be_known_to_be_installed(requirement: str, installed: bool) -> None:
    assert is_installed(requirement) is installed


OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "~=")
VERSIONS = ("0", "0.0", "1", "1.0", "1.0.0", "01.2", "1.1", "1.2", "1.10", "1.10.1", "2", "2.0.1", "20240131.1")


@pytest.mark.parametrize("operator", OPERATORS)
def test_versions_of_numbers_are_compared_as_packaging_does(operator: str) -> None:
    for installed, wanted, star in itertools.product(VERSIONS, VERSIONS, (False, True)):
        text = operator + wanted + (".*" if star else "")
        try:
            expected = SpecifierSet(text).contains(installed)
        except InvalidSpecifier:
            expected = False
        assert satisfies(installed, operator, wanted, star) is expected, "%s of %s" % (text, installed)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules and distributions are looked for in first."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:Implicit None:DeprecationWarning")
@pytest.mark.parametrize("version, bare, plain", [
    ("1.5", True, True), ("1.5rc1", True, False), ("1.5+cu121", True, False), ("1!1.5", True, False), ("dev", True, False),
    (None, False, False),
])
def test_an_installed_version_that_is_not_plain_is_for_pip_to_judge(
    site: Path, version: Optional[str], bare: bool, plain: bool
) -> None:
    info = site / "Half_Made-1.5.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: Half.Made\n" + "Version: %s\n" % version * bool(version))
    assert is_installed("half-made") is bare
    assert is_installed("half-made>=1") is plain


@pytest.mark.parametrize("folder", ["a.b_c-1.5.dist-info", "A_B_c-1.5.dist-info"])
@pytest.mark.parametrize("name", ["a.b_c", "A-b-C", "a__b.-c"])
def test_a_name_is_known_in_whatever_way_it_is_written(site: Path, folder: str, name: str) -> None:
    site.joinpath(folder).mkdir()
    site.joinpath(folder, "METADATA").write_text("Metadata-Version: 2.1\nName: a.b_c\nVersion: 1.5\n")
    if sys.version_info < (3, 10) and folder.startswith("a.") and name != "a.b_c":
        pytest.skip("Python 3.9 finds a folder with a dot only by the name as it is written, so pip is asked")
    assert is_installed(name + ">=1")


@pytest.mark.filterwarnings("ignore:Implicit None:DeprecationWarning")
def test_a_distribution_without_metadata_is_not_installed(site: Path) -> None:
    site.joinpath("half_made-1.5.dist-info").mkdir()
    assert not is_installed("half-made")


@pytest.mark.parametrize("text", ["", " ", ",", "pytest", "pytest>=1, PyTest_Timeout,"])
def test_nothing_is_run_where_nothing_is_missing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/no/such/folder")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    install_python_packages(text)


@pytest.mark.parametrize("text", ["", " ", ", ,"])
def test_no_tool_is_run_for_no_os_packages(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    install_os_packages(text)


# == Names of OS packages ==


@pytest.mark.parametrize("text", [
    "--repository=https://host", "ffmpeg,-U", "ffmpeg file", "ffmpeg;reboot", "/etc/passwd", "!ffmpeg", "ffmpeg-", "./x.deb",
    "ffm\u00e9g", "lib.*", "ffmpeg\nfile",
])
def test_what_is_no_name_of_a_package_is_refused(text: str) -> None:
    with pytest.raises(PackageError, match="^OS_PACKAGES has "):
        install_os_packages(text)


@pytest.mark.parametrize("text", [
    "ffmpeg", "g++", "libstdc++6", "lib32z1:i386", "python3.12-dev", "file=5.46-r2", "file=1:5.44-3", "file>5", "file~5.4",
    "hello@edge", "so:libz.so.1", "cmd:bash",
])
def test_names_of_both_tools_are_taken(text: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="neither apk nor apt-get"):
        install_os_packages(text, {"PATH": str(tmp_path)})


# == A tool at work ==


def shell(script: str, packages: Sequence[str] = ("thing",)) -> Tool:
    """Make a tool of a shell script."""
    return Tool("PACKAGES", packages, ["sh", "-c", script], os.environ)


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and is not reaped yet does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE, universal_newlines=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def wait_until_gone(*pids: int) -> None:
    """Wait for the end of processes that something else ends."""
    deadline = time.monotonic() + SECONDS
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "still there: %s" % [pid for pid in pids if is_running(pid)]
        time.sleep(0.02)


def wait_for_file(file: Path) -> str:
    """Return what is in a file once it is there."""
    deadline = time.monotonic() + SECONDS
    while not file.exists():
        assert time.monotonic() < deadline, "%s never came" % file
        time.sleep(0.02)
    return file.read_text()


def test_a_tool_returns_its_lines() -> None:
    assert shell("echo one; echo two >&2; printf three").run() == ["one", "two", "three"]


def test_a_tool_that_fails_is_told_with_all_that_helps(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PackageError) as caught:
        shell("echo fetching; echo 'ERROR: no thing'; echo 'see the manual'; exit 3", ["thing>=1", "other"]).run()
    assert str(caught.value) == "PACKAGES: sh failed with exit code 3 for thing>=1 other: ERROR: no thing"
    assert "sh failed:\nfetching\nERROR: no thing\nsee the manual" in caplog.text


def test_a_tool_that_is_killed_is_told_with_the_signal() -> None:
    with pytest.raises(PackageError, match="PACKAGES: sh was ended by signal 9 for thing: it printed nothing"):
        shell("kill -9 $$").run()


def test_a_tool_that_cannot_be_run_is_told() -> None:
    with pytest.raises(PackageError, match="^PACKAGES: /no/such/tool cannot be run: No such file"):
        Tool("PACKAGES", ["thing"], ["/no/such/tool"], os.environ).run()


def test_many_packages_are_named_in_part() -> None:
    with pytest.raises(PackageError) as caught:
        shell("exit 1", ["package-%d" % number for number in range(1000)]).run()
    assert "package-0 package-1 " in str(caught.value) and "package-999" not in str(caught.value)
    assert len(str(caught.value)) < 400


WORDS = [
    (["ERROR: unable to select packages:", "  nonesuch (no such package):", "    required by: world[nonesuch]"],
     "ERROR: unable to select packages: nonesuch (no such package): required by: world[nonesuch]"),
    (["E: Failed to fetch http://host/x.deb  404", "E: Unable to fetch some archives, maybe run apt-get update"],
     "Failed to fetch http://host/x.deb  404; Unable to fetch some archives, maybe run apt-get update"),
    (["error: subprocess-exited-with-error", "error: no compiler", "note: this is no fault of pip"], "error: no compiler"),
    (["error: it ends so:"], "error: it ends so:"),
    (["WARNING: Retrying after connection broken by 'X'", "ERROR: No matching distribution found for six"],
     "ERROR: No matching distribution found for six; the package index cannot be reached"),
    (["WARNING: Retrying after connection broken by 'X'", "ERROR: no compiler"], "ERROR: no compiler"),
    (["something", "else"], "else"),
    ([], "it printed nothing"),
]


@pytest.mark.parametrize("lines, words", WORDS)
def test_the_words_that_tell_what_went_wrong_are_picked(lines: List[str], words: str) -> None:
    assert last_words(lines) == words


def test_a_tool_that_does_not_end_is_ended(tmp_path: Path) -> None:
    tool = shell('echo $$ > "%s/pid"; echo stuck; exec sleep 600' % tmp_path)
    tool.limit_seconds = 3.0
    with pytest.raises(PackageError, match="^PACKAGES: sh did not end within 3 s for thing; it last said: "):
        tool.run()
    if (tmp_path / "pid").exists():  # a busy machine may not have come so far
        assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_tool_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ais_runtime_min, "TOOL_STOP_SECONDS", 0.3)
    script = """trap "" TERM; sleep 600 & echo "$$ $!" > '%s/pids'; while :; do sleep 1; done""" % tmp_path
    tool = shell(script)
    tool.limit_seconds = 3.0
    with pytest.raises(PackageError, match="did not end within"):
        tool.run()
    if (tmp_path / "pids").exists():
        wait_until_gone(*map(int, (tmp_path / "pids").read_text().split()))


def test_what_a_tool_leaves_behind_with_its_output_is_not_waited_for_and_is_ended() -> None:
    pid, = shell("sleep 600 & echo $!; exit 0").run()
    wait_until_gone(int(pid))


def test_a_tool_that_closes_its_output_is_waited_for(tmp_path: Path) -> None:
    assert shell('exec >&- 2>&-; sleep 0.3; echo done > "%s/done"' % tmp_path).run() == []
    assert (tmp_path / "done").exists()


def test_of_a_tools_output_only_the_last_lines_are_kept_and_of_each_its_beginning() -> None:
    code = "import sys\nfor n in range(100000): print('line', n)\nsys.stdout.write('long ' + 'x ' * %d + '\\nend')" % LARGE
    lines = Tool("PACKAGES", ["thing"], [sys.executable, "-c", code], os.environ).run()
    assert lines[-1] == "end" and lines[-2].startswith("long x") and lines[-3] == "line 99999"
    assert len(lines) <= ais_runtime_min.TOOL_LINES_LIMIT
    assert max(map(len, lines)) <= ais_runtime_min.TOOL_LINE_LIMIT_BYTES + 2


CREDENTIALS = [
    "https://user:%s@host/simple", "Looking in 'https://%s@host/', http://a:%s@[::1]:80/", "git+https://u:%s@h@host/a.git@v1",
    "https://user:a/%s@host/", "https://user:%%40%s@host:8080/",
]


@pytest.mark.parametrize("text", CREDENTIALS)
def test_user_and_password_of_a_url_are_hidden(text: str) -> None:
    shown = hide_credentials(text.replace("%s", SECRET).replace("%%", "%"))
    assert SECRET not in shown and "***@" in shown


@pytest.mark.parametrize("text", [
    "https://host/simple", "https://host:8080/a.git@v1", "git+ssh://host/a.git@v1", "mail@example.org", "a @ https://host/x.whl",
])
def test_what_is_no_credential_is_shown(text: str) -> None:
    assert hide_credentials(text) == text


def test_no_credential_that_a_tool_quotes_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cut = "x" * (ais_runtime_min.TOOL_LINE_LIMIT_BYTES - 20)
    script = "echo 'see https://user:{0}@host/'; echo '{1} https://user:{0}@host/'; echo 'ERROR: https://user:{0}@host/'; exit 1"
    with pytest.raises(PackageError) as caught:
        shell(script.format(SECRET, cut), ["a @ https://user:%s@host/a.whl" % SECRET]).run()
    assert SECRET[:3] not in caplog.text + str(caught.value)
    assert "ERROR: https://***@host/" in str(caught.value)


class Watcher(logging.Handler):
    """Makes a file when a line is logged that has some words."""

    def __init__(self, words: str, file: Path) -> None:
        super().__init__()
        self.words = words
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one line."""
        if self.words in record.getMessage():
            self.file.touch()


def test_while_a_tool_runs_the_log_says_so_and_what_it_last_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    watcher = Watcher(" s: fetching it", tmp_path / "told")
    tool = shell('echo fetching it; while [ ! -e "%s" ]; do sleep 0.02; done' % watcher.file)
    tool.progress_seconds, tool.limit_seconds = 0.05, SECONDS
    ais_runtime_min.logger.addHandler(watcher)
    try:
        tool.run()
    finally:
        ais_runtime_min.logger.removeHandler(watcher)
    assert re.search(r"sh has been running for \d+ s: fetching it", caplog.text)


# == Signals ==


@contextlib.contextmanager
def starting_pod(env: Environ) -> Iterator[Server]:
    """Start a pod that is not to get as far as serving."""
    python = interpreter("slim")
    with Server([python, str(RUNTIME)], exact_environment(python, {"ETL_CLASS_PAYLOAD": NO_PAYLOAD, **env})) as pod:
        yield pod


def make_tool(folder: Path, name: str, script: str) -> str:
    """Make a stand-in for a tool, which notes its arguments and what it finds around it; return the PATH that finds it."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    note = 'echo "%s $*" >> "%s/calls"; env > "%s/variables"; cat > "%s/stdin"' % (name, folder, folder, folder)
    file.write_text("#!/bin/sh\n%s\n%s\n" % (note, script))
    file.chmod(0o755)
    return "%s:/usr/bin:/bin" % folder


STUBBORN = 'case "$1" in info) exit 1;; esac\n' """trap 'touch "{0}/told"' TERM
(trap "" TERM; exec sleep 600) & echo "$$ $!" > "{0}/new"; mv "{0}/new" "{0}/pids"; while :; do sleep 0.1; done"""


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_ends_a_tool_that_does_not_care(tmp_path: Path, signals: int) -> None:
    path = make_tool(tmp_path / "tools", "apk", STUBBORN.format(tmp_path))
    with starting_pod({"OS_PACKAGES": "ffmpeg", "PATH": path}) as pod:
        pids = [int(word) for word in wait_for_file(tmp_path / "pids").split()]
        pod.process.send_signal(signal.SIGTERM)
        wait_for_file(tmp_path / "told")
        if signals > 1:
            pod.process.send_signal(signal.SIGTERM)
        assert pod.wait(SECONDS) == Exit.OK
        wait_until_gone(*pids)
        assert "ais_runtime_min: " not in pod.log()


# == apk and apt-get, by stand-ins ==


class Calls(NamedTuple):
    """What stand-ins have noted: their command lines, and the variables and the standard input of the last."""

    lines: List[str]
    variables: Dict[str, str]
    stdin: str


def calls_of(folder: Path) -> Calls:
    """Read what stand-ins in a folder have noted."""
    variables = dict(line.split("=", 1) for line in (folder / "variables").read_text().splitlines() if "=" in line)
    return Calls((folder / "calls").read_text().splitlines(), variables, (folder / "stdin").read_text())


def make_apt(folder: Path, script: str, installed: Mapping[str, str] = {}) -> str:
    """Make stand-ins for apt-get and dpkg-query, which knows some packages by version; no apk is found beside them."""
    known = "".join("%s) echo 'installed %s'; exit 0;;" % item for item in installed.items())
    make_tool(folder, "dpkg-query", 'case "$3" in %s half) echo "config-files 1.0"; exit 0;; esac; exit 1' % known)
    return make_tool(folder, "apt-get", script)


def test_apk_is_called_once_for_what_is_missing(tmp_path: Path) -> None:
    path = make_tool(tmp_path, "apk", 'case "$1$3" in infobusybox) exit 0;; info*) exit 1;; esac')
    install_os_packages("ffmpeg, busybox,file=5.46-r2", {"PATH": path})
    calls = calls_of(tmp_path)
    assert [line for line in calls.lines if " info " not in line] == ["apk add --no-cache ffmpeg file=5.46-r2"]
    assert calls.stdin == ""


def test_where_there_is_no_apk_apt_get_refreshes_its_lists_and_installs(tmp_path: Path) -> None:
    path = make_apt(tmp_path, "exit 0", {"curl": "8.0"})
    install_os_packages("ffmpeg,curl,half,file=1:5.44-3", {"PATH": path})
    calls = calls_of(tmp_path)
    update, install = [line.split() for line in calls.lines if line.startswith("apt-get ")]
    assert update[:2] == ["apt-get", "update"]
    assert install[:2] == ["apt-get", "install"] and install[-3:] == ["ffmpeg", "half", "file=1:5.44-3"]
    assert {"-y", "--no-install-recommends"} <= set(install)
    assert calls.variables["DEBIAN_FRONTEND"] == "noninteractive"
    assert calls.stdin == ""


@pytest.mark.parametrize("text, is_run", [("curl", False), ("curl=8.0", False), ("curl=8.0-1", True), ("half", True)])
def test_apt_get_is_run_only_for_what_is_not_there_in_that_version(tmp_path: Path, text: str, is_run: bool) -> None:
    install_os_packages(text, {"PATH": make_apt(tmp_path, "exit 0", {"curl": "8.0"})})
    assert any(line.startswith("apt-get ") for line in calls_of(tmp_path).lines) is is_run


def test_a_list_that_apt_get_cannot_refresh_is_told_though_it_calls_that_a_success(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = '[ "$1" = update ] && echo "W: Failed to fetch http://host/InRelease  Connection refused"; exit 0'
    install_os_packages("ffmpeg", {"PATH": make_apt(tmp_path, script)})
    assert "apt-get update: W: Failed to fetch http://host/InRelease" in caplog.text


def test_a_failing_apt_get_is_told(tmp_path: Path) -> None:
    script = '[ "$1" = update ] && exit 0; echo Reading; echo "E: Unable to locate package nonesuch" >&2; exit 100'
    done = start_in_vain({"OS_PACKAGES": "nonesuch", "PACKAGES": "x", "PATH": make_apt(tmp_path, script)})
    assert done.code == Exit.UNAVAILABLE
    expected = "OS_PACKAGES: apt-get failed with exit code 100 for nonesuch: Unable to locate package nonesuch"
    assert done.last_line.startswith("ais_runtime_min: " + expected)
    assert "Reading" in done.lines and not any("installing Python" in line for line in done.lines)


def test_a_failing_apt_get_update_ends_it(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="OS_PACKAGES: apt-get failed with exit code 100 for ffmpeg: no lists"):
        install_os_packages("ffmpeg", {"PATH": make_apt(tmp_path, 'echo "E: no lists"; exit 100')})
    assert not any(" install " in line for line in calls_of(tmp_path).lines)


def test_an_image_without_both_tools_is_told(tmp_path: Path) -> None:
    done = start_in_vain({"OS_PACKAGES": "ffmpeg,file", "PATH": str(tmp_path)})
    assert done.code == Exit.UNAVAILABLE
    assert done.last_line == (
        "ais_runtime_min: OS_PACKAGES: cannot install ffmpeg file: this image has neither apk nor apt-get")


def test_without_root_a_package_that_is_there_needs_none_and_another_is_told(open_folder: Path) -> None:
    python = unprivileged(open_folder, interpreter("slim"))
    open_folder.chmod(0o1777)  # the stand-in notes its calls there
    apk = make_tool(open_folder, "apk", 'case "$1$3" in infobusybox) exit 0;; esac; echo "ERROR: no root"; exit 9')
    done = start_in_vain({"OS_PACKAGES": "busybox", "PATH": apk}, python)
    assert done.code == Exit.DATA, done.lines
    done = start_in_vain({"OS_PACKAGES": "busybox,ffmpeg", "PATH": apk}, python)
    assert done.code == Exit.UNAVAILABLE
    assert re.search(r"apk failed with exit code 9 for ffmpeg: ERROR: no root; apk needs root, and this pod runs as user \d+$",
                     done.last_line)


# == apt-get for real ==


@functools.lru_cache(maxsize=None)
def apt_variables(folder: Path) -> Dict[str, str]:
    """Give apt-get lists of its own, and let it wait for others that install; skip the test where it cannot work."""
    if os.geteuid() or not shutil.which("apt-get") or shutil.which("apk"):
        pytest.skip("apt-get for real needs root on Debian")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    config = folder / "apt.conf"
    config.write_text('Dir::State::lists "%s/lists";\nDir::Cache "%s/cache";\nDPkg::Lock::Timeout "120";\n'
                      'APT::Sandbox::User "root";\nAcquire::Retries "1";\nAcquire::http::Timeout "20";\n' % (folder, folder))
    variables = {**os.environ, "APT_CONFIG": str(config)}
    done = subprocess.run(["apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any"], env=variables, timeout=150,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        pytest.skip("apt-get reaches no archive: %s" % done.stdout[-200:])
    return variables


@pytest.fixture
def apt(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, str]:
    """The variables by which apt-get works here."""
    return apt_variables(tmp_path_factory.getbasetemp() / "apt")


@pytest.mark.slow
def test_apt_get_installs_a_package_for_real(apt: Dict[str, str]) -> None:
    if shutil.which("hello"):
        pytest.skip("the package is there already")
    try:
        install_os_packages("hello", apt)
        assert subprocess.check_output(["hello"], universal_newlines=True) == "Hello, world!\n"
        install_os_packages("hello", {**apt, "APT_CONFIG": "/no/such/file"})  # it is not asked again
    finally:
        subprocess.run(["dpkg", "--purge", "hello"], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no-such-package-here", "lib.no.such.package", "lib.sl"])
def test_apt_get_finds_no_package_of_a_wrong_name_for_real(apt: Dict[str, str], name: str) -> None:
    with pytest.raises(PackageError, match="OS_PACKAGES: apt-get failed with exit code 100 for %s: Unable to locate" % name):
        install_os_packages(name, apt)


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


def purelib_of(python: str) -> str:
    """Ask an interpreter where pip installs."""
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.check_output([python, "-c", ask], universal_newlines=True).strip()


def make_environment(folder: Path, slim_python: str) -> str:
    """Make an environment that has cloudpickle and pip, and keeps for itself what is installed; return its interpreter."""
    subprocess.run([slim_python, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = str(folder / "bin" / "python")
    Path(purelib_of(python), "lent.pth").write_text(purelib_of(slim_python) + "\n")
    return python


@pytest.fixture
def own_python(tmp_path: Path, slim_python: str) -> str:
    """An interpreter that has cloudpickle and pip, and an environment of its own."""
    return make_environment(tmp_path / "environment", slim_python)


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


def start_in_vain(env: Environ, python: Optional[str] = None) -> Finished:
    """Start a pod that gives up at its payload at the latest; no secret may show."""
    index = {"PIP_NO_INDEX": None if python else "1"}  # only an environment of its own may take what an index has
    done = run_to_end(env={"ETL_CLASS_PAYLOAD": NO_PAYLOAD, **index, **env}, python=python, timeout=3 * SECONDS)
    log = "\n".join(done.lines)
    print(log)  # pytest shows it where the test fails
    assert "Traceback" not in log and SECRET not in log
    assert done.last_line.startswith("ais_runtime_min: ")
    return done


def test_wheels_of_a_folder_are_installed_without_an_index(own_python: str, wheels: Path) -> None:
    done = start_in_vain({"PACKAGES": "Etl.Probe<2,etl_user[probing]", **offline(wheels)}, own_python)
    assert done.code == Exit.DATA
    assert (installed_in(own_python, "etl-probe"), installed_in(own_python, "etl-user")) == ("1.0", "1.0")
    assert sum("installing Python packages: Etl.Probe<2 etl_user[probing]" in line for line in done.lines) == 1
    assert not any("root" in line for line in done.lines), "pip warns of the root user"


def test_what_is_there_in_a_version_that_will_do_costs_no_pip(own_python: str, wheels: Path, tmp_path: Path) -> None:
    assert start_in_vain({"PACKAGES": "etl_probe==1.*", **offline(wheels)}, own_python).code == Exit.DATA
    empty = {**offline(tmp_path / "nothing"), "PIP_NO_SUCH": "1"}
    done = start_in_vain({"PACKAGES": "etl-probe>=1,<2,ETL.probe~=1.0", **empty}, own_python)
    assert done.code == Exit.DATA and not any("installing" in line for line in done.lines)
    assert start_in_vain({"PACKAGES": "etl-probe>=2", **offline(wheels)}, own_python).code == Exit.DATA
    assert installed_in(own_python, "etl-probe") == "2.0"


def test_a_requirement_that_pip_must_judge_and_finds_is_no_failure(own_python: str, wheels: Path) -> None:
    text = "etl-user[probing]; python_version >= '3',etl-probe>=1rc1"
    for _ in range(2):
        assert start_in_vain({"PACKAGES": text, **offline(wheels)}, own_python).code == Exit.DATA
    assert installed_in(own_python, "etl-probe") == "1.0"


def test_requirements_that_exclude_each_other_are_told(own_python: str, wheels: Path) -> None:
    done = start_in_vain({"PACKAGES": "etl-user[probing],etl_probe>=2", **offline(wheels)}, own_python)
    assert done.code == Exit.UNAVAILABLE
    assert "PACKAGES: pip failed with exit code 1 for etl-user[probing] etl_probe>=2: ERROR: " in done.last_line
    assert any("conflict" in line for line in done.lines)


def test_a_python_without_pip_is_told_and_none_is_needed_for_what_is_there(tmp_path: Path, slim_python: str) -> None:
    subprocess.run([slim_python, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True, timeout=60)
    python = str(tmp_path / "bare" / "bin" / "python")
    done = start_in_vain({"PACKAGES": "six>=1"}, python)
    assert done.code == Exit.UNAVAILABLE
    assert "PACKAGES: cannot install six>=1: this Python has no pip" in done.last_line
    with zipfile.ZipFile(make_wheel(tmp_path)) as wheel:
        wheel.extractall(purelib_of(python))
    assert "pip" not in start_in_vain({"PACKAGES": "etl-probe>=1"}, python).last_line


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


def test_pip_is_told_of_an_index_with_a_password(own_python: str, wheels: Path) -> None:
    with Index(wheels) as index:
        env = {"PACKAGES": "etl_probe==1.0", "PIP_INDEX_URL": index.url, "PIP_CONFIG_FILE": os.devnull}
        assert start_in_vain(env, own_python).code == Exit.DATA
        assert "user:" + SECRET in index.users
    assert installed_in(own_python, "etl_probe") == "1.0"


def test_pip_is_told_of_a_further_index_of_its_certificate_and_of_a_cache(
    own_python: str, wheels: Path, tmp_path: Path, certificates: Certificates
) -> None:
    env = {"PACKAGES": "etl_probe", "PIP_CONFIG_FILE": os.devnull, "PIP_CACHE_DIR": str(tmp_path / "cache"), "PIP_RETRIES": "1"}
    (tmp_path / "nothing").mkdir()
    with Index(tmp_path / "nothing") as empty, Index(wheels, certificates.server_context()) as index:
        env.update({"PIP_INDEX_URL": empty.url, "PIP_EXTRA_INDEX_URL": index.url})
        assert start_in_vain(env, own_python).code == Exit.UNAVAILABLE, "it has no reason to trust the certificate"
        assert start_in_vain({**env, "PIP_CERT": str(certificates.ca)}, own_python).code == Exit.DATA
    assert installed_in(own_python, "etl_probe") == "2.0"
    assert any(file.is_file() for file in (tmp_path / "cache").rglob("*"))


def test_an_index_that_cannot_be_reached_is_told_without_its_password(own_python: str) -> None:
    index = "http://user:%s@127.0.0.1:9/simple" % SECRET
    env = {"PACKAGES": "six,x @ http://user:%s@127.0.0.1:9/x-1.0.zip" % SECRET, "PIP_INDEX_URL": index, "PIP_RETRIES": "1"}
    for text, reason in (("six", "; the package index cannot be reached"), (str(env["PACKAGES"]), "Connection refused'))")):
        done = start_in_vain({**env, "PACKAGES": text, "PIP_CONFIG_FILE": os.devnull}, own_python)
        assert done.code == Exit.UNAVAILABLE
        assert "PACKAGES: pip failed with exit code 1 for six" in done.last_line
        assert reason in done.last_line


# == The real index ==


def network_variables() -> Dict[str, str]:
    """Return the variables by which this machine reaches the network, pip's among them."""
    wanted = re.compile(r"PIP_(?!FIND_LINKS|NO_INDEX|TARGET|USER)|SSL_CERT_|REQUESTS_CA_BUNDLE$|.*_proxy$", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if wanted.match(name)}


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Optional[str]]:
    """The variables by which pip reaches the real index; the test is skipped where it does not."""
    variables = {**network_variables(), "PIP_NO_INDEX": None}  # see exact_environment
    python = interpreter("slim")
    folder = str(tmp_path_factory.mktemp("index"))
    command = [python, "-m", "pip", "download", "--no-deps", "--retries=1", "--dest", folder, "six"]
    done = subprocess.run(command, env=exact_environment(python, variables), timeout=150, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        pytest.skip("pip reaches no index: %s" % done.stdout[-200:])
    return variables


@pytest.mark.parametrize("text, expected", [
    ("six", {"six": r"1\.\d+.*"}),
    ("six>=1.10,<1.15,!=1.14.*", {"six": r"1\.13\.0"}),
    ("python-dotenv[cli]>=0.19,<2", {"python-dotenv": r"[01]\..*", "click": r"\d.*"}),
])
def test_pip_installs_from_the_real_index(
    index: Dict[str, Optional[str]], own_python: str, text: str, expected: Dict[str, str],
) -> None:
    assert start_in_vain({"PACKAGES": text, **index}, own_python).code == Exit.DATA
    for name, version in expected.items():
        assert re.fullmatch(version, installed_in(own_python, name))


@pytest.mark.parametrize("text", ["ais-runtime-min-no-such-package", "six==1.0.7777"])
def test_what_the_real_index_does_not_have_is_told(index: Dict[str, Optional[str]], own_python: str, text: str) -> None:
    done = start_in_vain({"PACKAGES": text, **index}, own_python)
    assert done.code == Exit.UNAVAILABLE
    assert done.last_line.endswith(
        "PACKAGES: pip failed with exit code 1 for %s: ERROR: No matching distribution found for %s" % (text, text))


# == Where site-packages cannot be written ==

USING = '''
import os
import subprocess
import sys
import threading
import time
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Using(HTTPMultiThreadedServer):
    def transform(self, data, path, etl_args):
        import etl_probe
        code = "import etl_probe; print(etl_probe.__file__)"
        child = subprocess.check_output([sys.executable, "-c", code], universal_newlines=True).strip()
        command = subprocess.check_output(["etl_probe"], universal_newlines=True).strip()
        return "\\n".join([etl_probe.__file__, child, command, str(os.getuid())])
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


@pytest.fixture
def read_only_python(open_folder: Path, slim_python: str) -> Iterator[str]:
    """An interpreter of a user who cannot write its site-packages."""
    python = make_environment(open_folder / "environment", slim_python)
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


@pytest.mark.parametrize("name", ["Using", "UsingAndPulsing"])
@pytest.mark.parametrize("home", [None, "/"])
def test_where_site_packages_cannot_be_written_workers_find_packages_in_a_folder_of_their_own(
    start_runtime: StartRuntime, read_only_python: str, wheels: Path, spare: Path, name: str, home: Optional[str]
) -> None:
    env = {"PACKAGES": "etl_probe<2", "NUM_WORKERS": "2", "TMPDIR": str(spare), "HOME": home, **offline(wheels),
           "PIP_NO_CACHE_DIR": None, "PYTHONDONTWRITEBYTECODE": "1"}
    runtime = start_runtime(make_payload(PULSING, name), env, python=read_only_python)
    module, childs, command, user = runtime.request("PUT", "/bucket/object", b"").body.decode().split("\n")
    assert Path(module).parent.parent == spare and childs == module
    assert command == "1.0"
    assert int(user) == (os.geteuid() or UNPRIVILEGED)
    assert not any("WARNING" in line for line in runtime.lines)
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
    env = exact_environment(read_only_python, {**offline(wheels), "TMPDIR": str(spare)})
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


def test_the_folder_stands_between_the_standard_library_and_site_packages() -> None:
    folder = TargetFolder()
    path = ["/code", "/usr/lib/python3", "/usr/lib/python3/site-packages", "/opt/site-packages"]
    assert folder.search_path(path) == path and folder.variables({}) == {}
    folder.path = "/tmp/packages"
    assert folder.search_path(path) == [*path[:2], "/tmp/packages", *path[2:]]
    assert folder.search_path(folder.search_path(path)) == folder.search_path(path)
    assert folder.search_path(["/code"]) == ["/code", "/tmp/packages"]
    variables = folder.variables({"PYTHONPATH": "/mine", "PATH": "/bin"})
    assert variables == {"PYTHONPATH": "/mine:/tmp/packages", "PATH": "/bin:/tmp/packages/bin"}
    assert folder.variables(variables) == {}


def test_install_puts_no_packages_where_they_are_lost(read_only_python: str, wheels: Path, spare: Path) -> None:
    env = {"PACKAGES": "etl_probe", "TMPDIR": str(spare), **offline(wheels)}
    done = run_to_end(["install"], env, python=read_only_python)
    assert done.code == Exit.UNAVAILABLE and "run install as root" in done.last_line
    assert list(spare.iterdir()) == []


@pytest.mark.parametrize("name", ["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN"])
def test_pip_installs_where_packages_can_be_imported_whatever_its_variables_say(
    own_python: str, wheels: Path, tmp_path: Path, name: str
) -> None:
    done = start_in_vain({"PACKAGES": "etl_probe", **offline(wheels), name: str(tmp_path / "elsewhere")}, own_python)
    assert done.code == Exit.DATA
    assert installed_in(own_python, "etl-probe") == "2.0"
