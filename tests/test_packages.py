"""What pip and the tools of the image are asked for, and how they are run.

Stand-ins take their places, and note how they are called.
"""
import base64
import itertools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional

import pytest
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from ais_runtime_min import Exit, PackageError, install_os_packages, install_python_packages
from harness import (QUICK_NUMBERS, Environ, Finished, Numbers, Server, interpreter, run_to_end,
                     started)

NO_PAYLOAD = base64.b64encode(b"no pickle").decode()  # packages come first, so a start that gets this far has installed them
SECRET = "s3cr3t"
SECONDS = 60.0  # for what is to happen soon, on a machine that does other things as well
LARGE = 4 << 20
NOTE = """#!/bin/sh
IFS="$(printf '\\t')"; printf '%s\\n' "{name}	$*" >> "{folder}/calls"; unset IFS
env > "{folder}/variables"; cat > "{folder}/stdin"
"""
UNKNOWN = '[ "$1" = info ] && exit 1\n'  # how apk's stand-ins begin that have no package yet


class Call(NamedTuple):
    """How a stand-in was called: its name and arguments, its variables, its standard input."""

    command: List[str]
    variables: Dict[str, str]
    stdin: str


class Tools:
    """A folder of stand-ins for tools, shell scripts that note how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, name: str, script: str) -> str:
        """Make a tool, or replace it; return its path."""
        file = self.folder / name
        file.write_text(NOTE.format(name=name, folder=self.folder) + script + "\n")
        file.chmod(0o755)
        return str(file)

    def make_apt(self, script: str, installed: Mapping[str, str] = {}) -> None:
        """Make apt-get and dpkg-query, which knows some packages by version; make no apk."""
        known = "".join("%s) echo 'installed %s'; exit 0;;" % item for item in installed.items())
        known += "half) echo 'config-files 1.0'; exit 0;;"
        self.make("dpkg-query", 'case "$3" in %s esac; exit 1' % known)
        self.make("apt-get", script)

    def commands(self) -> List[List[str]]:
        """Return all commands but those that ask whether a package is there, and forget them."""
        calls = self.folder / "calls"
        commands = [line.split("\t") for line in calls.read_text().splitlines()]
        calls.write_text("")
        return [command for command in commands
                if command[0] in ("apk", "apt-get", "python") and command[1] != "info"]

    def last_call(self) -> Call:
        """Return the last of these commands, with all around it."""
        lines = (self.folder / "variables").read_text().splitlines()
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        return Call(self.commands()[-1], variables, (self.folder / "stdin").read_text())


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Stand-ins that PATH finds first, here and in what the test starts."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", "%s:/usr/bin:/bin" % folder)
    monkeypatch.delenv("DEBIAN_FRONTEND", raising=False)
    monkeypatch.delenv("PIP_ROOT_USER_ACTION", raising=False)
    return Tools(folder)


def start_in_vain(
    env: Environ, python: Optional[str] = None, numbers: Numbers = QUICK_NUMBERS
) -> Finished:
    """Start a pod that gives up at its payload at the latest; no secret may show."""
    index = {"PIP_NO_INDEX": None if python else "1"}  # only an environment of its own may take what an index has
    variables = {"ETL_CLASS_PAYLOAD": NO_PAYLOAD, **index, **env}
    done = run_to_end(env=variables, python=python, timeout=3 * SECONDS, numbers=numbers)
    log = "\n".join(done.lines)
    print(log)  # pytest shows it where the test fails
    assert "Traceback" not in log and SECRET not in log
    assert done.last_line.startswith("ais_runtime_min: ")
    return done


def refusal_of(text: str) -> str:
    """Return why OS packages cannot be installed, but for what a user who is not root is told."""
    with pytest.raises(PackageError) as caught:
        install_os_packages(text)
    return str(caught.value).partition("; apk needs root")[0]


# == What pip is asked for ==

REQUIREMENTS = [
    ("numpy", ["numpy"]),
    ("numpy,pytest", ["numpy", "pytest"]),  # together they resolve, the one that is there too
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
    ('numpy>=1,<2,pandas[perf,aws]==2.*; python_version<"3.12",pkg @ https://host/a,b.whl',
     ["numpy>=1,<2", 'pandas[perf,aws]==2.*; python_version<"3.12"', "pkg @ https://host/a,b.whl"]),
    ("pkg @ https://host/a,b/c-1.0.tar.gz#sha256=0,d", ["pkg @ https://host/a,b/c-1.0.tar.gz#sha256=0", "d"]),
    ("pkg @ https://host/it's.whl,b", ["pkg @ https://host/it's.whl", "b"]),
    ("a @ git+https://host/a.git@v1,b @ git+ssh://git@host/b.git,c>=1",
     ["a @ git+https://host/a.git@v1", "b @ git+ssh://git@host/b.git", "c>=1"]),
    ("https://host/a.whl,https://host/b.whl,c[d]", ["https://host/a.whl", "https://host/b.whl", "c[d]"]),
    ("./a.whl,/wheels/b.whl,c.whl", ["./a.whl", "/wheels/b.whl", "c.whl"]),
    ("a @ https://host/a.whl ; python_version > '3',b", ["a @ https://host/a.whl ; python_version > '3'", "b"]),
]


def test_requirements_are_split_at_the_commas_between_them(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", tools.make("python", "exit 0"))
    wrong = []
    for text, requirements in REQUIREMENTS:
        install_python_packages(text)
        command, = tools.commands()
        assert command[:4] == ["python", "-m", "pip", "install"]
        options = max(index for index, word in enumerate(command) if word.startswith("-"))
        if command[options + 1:] != requirements:
            wrong.append((text, command[options + 1:]))
    assert wrong == []
    install_python_packages("no-such-distribution")
    call = tools.last_call()
    assert call.stdin == "" and call.variables["PIP_ROOT_USER_ACTION"] == "ignore"


def test_options_and_line_breaks_among_the_requirements_are_refused() -> None:
    for text, refused in [
        ("--index-url https://host", ""), ("-e .", ""), ("-r/etc/passwd", ""),
        ("numpy --index-url=https://host", ""), ("numpy>=1 -c constraints.txt", ""),
        ("numpy,-r file.txt", "-r file.txt"), ("-r file.txt,b", "-r file.txt"),
        ("numpy, --pre", "--pre"), ("a @ https://host/a.whl,--pre", "--pre"),
    ]:
        message = "^PACKAGES has '%s': options are not allowed" % re.escape(refused or text)
        with pytest.raises(PackageError, match=message):
            install_python_packages(text)
    with pytest.raises(PackageError, match="^PACKAGES has .* by commas, not by line breaks"):
        install_python_packages("numpy\npillow")


def test_a_refusal_names_what_wants_the_package_and_hides_user_and_password_of_its_urls() -> None:
    for text in [
        "https://user:s3cr3t@host/simple", "'https://s3cr3t@host/'", "http://a:s3cr3t@[::1]:80/",
        "git+https://u:s3cr3t@h@host/a.git@v1", "https://user:a/s3cr3t@host/",
        "https://user:%40s3cr3t@host:8080/",
    ]:
        with pytest.raises(PackageError, match="^Shop needs Flask has .*: options are") as caught:
            install_python_packages("-i " + text, "Shop needs Flask")
        assert SECRET not in str(caught.value) and "***@" in str(caught.value), text
    for text in [
        "https://host/simple", "https://host:8080/a.git@v1", "git+ssh://host/a.git@v1",
        "mail@example.org",
    ]:
        with pytest.raises(PackageError, match="has '-i %s': options" % re.escape(text)):
            install_python_packages("-i " + text)


# == What is there already ==


class Site:
    """A folder that distributions are looked for in first, and a Python that runs no pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, version: str, folder: str = "") -> None:
        """Add a distribution; its metadata are incomplete where it has no version."""
        usual = "%s-%s.dist-info" % (name.replace("-", "_"), version or "1.5")
        info = self.folder / (folder or usual)
        info.mkdir(parents=True)
        stated = "Version: %s\n" % version if version else ""
        info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: %s\n%s" % (name, stated))

    def has(self, text: str) -> bool:
        """Tell whether requirements are taken for installed: pip is not run for them."""
        try:
            install_python_packages(text)
        except PackageError as error:
            assert "/no/such/python" in str(error) or "pip cannot be run" in str(error), str(error)
            return False
        return True


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A folder for distributions, in front of all others."""
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    return Site(tmp_path / "site-packages")


INSTALLED = [
    ("", True), (" ", True), (", ,", True),
    ("some-thing", True), ("Some.Thing", True), ("SOME_.-thing", True), ("candidate", True),
    ("some-thing>=1", True), ("some-thing >= 1, < 1000", True), ("some-thing>=1, pytest,", True),
    ("no-such-thing", False), ("some-thing,no-such-thing", False),
    ("no-such-thing,some-thing", False),
    ("some-thing>=1000", False), ("some-thing==1", False), ("some-thing===1", False),
    ("some-thing>=1!1", False), ("some-thing>=1,<1.2", False), ("some-thing[extra]", False),
    ("some-thing @ file:///some-thing", False),
    ("some-thing>=1 <1000", False), ("some-thing>=1.*", False), ("../some-thing", False),
    ("candidate>=1.5", False), ("candidate==1.5", False), ("local>=1.6", False),
    ("local==1.5+cpu", False), ("epoch<2", False), ("odd>=1", False),
    ("without-version", False), ("without-metadata", False),
]


@pytest.mark.filterwarnings("ignore:Implicit None:DeprecationWarning")
def test_pip_is_run_unless_what_is_there_will_do_for_sure(site: Site) -> None:
    for name, version in [
        ("some-thing", "1.5"), ("candidate", "1.5rc1"), ("local", "1.5+cu121"),
        ("epoch", "1!1.5"), ("odd", "dev"), ("without-version", ""),
    ]:
        site.add(name, version)
    site.folder.joinpath("without_metadata-1.5.dist-info").mkdir()
    assert [(text, there) for text, there in INSTALLED if site.has(text) is not there] == []


def test_a_name_is_known_in_whatever_way_it_is_written(site: Site) -> None:
    for word, folder in [("a.b_c", "a.b_c-1.5.dist-info"), ("d.e_f", "D_E_f-1.5.dist-info")]:
        site.add(word, "1.5", folder)
        for name in (word, word.title().replace(".", "-"), word.replace(".", "_.-")):
            # Python 3.9 finds a folder with a dot by the name as it is written, else pip is asked.
            is_known = sys.version_info >= (3, 10) or not folder.startswith("a.") or name == word
            assert site.has(name + ">=1") is is_known, (folder, name)


VERSIONS = ("0", "0.0", "1", "1.0", "01.2", "1.2", "1.10", "1.10.1", "20240131.1")


def test_versions_of_numbers_are_compared_as_packaging_does(site: Site) -> None:
    names = ["version-%s" % letter for letter in "abcdefghi"]
    for name, installed in zip(names, VERSIONS):
        site.add(name, installed)
    operators = ("==", "!=", "<", "<=", ">", ">=", "~=")
    wrong = []
    for operator, wanted, star in itertools.product(operators, VERSIONS, ("", ".*")):
        specifier = operator + wanted + star
        try:
            known = [SpecifierSet(specifier).contains(installed) for installed in VERSIONS]
        except InvalidSpecifier:  # which is for pip to tell
            known = [False] * len(VERSIONS)
        for name, installed, expected in zip(names, VERSIONS, known):
            if site.has(name + specifier) is not expected:
                wrong.append("%s of %s" % (specifier, installed))
    assert wrong == []


# == OS packages, by stand-ins ==


def test_what_is_no_name_of_an_os_package_is_refused() -> None:
    for text in [
        "--repository=https://host", "ffmpeg,-U", "ffmpeg file", "ffmpeg;reboot", "/etc/passwd",
        "!ffmpeg", "ffmpeg-", "./x.deb", "ffm\u00e9g", "lib.*", "ffmpeg\nfile",
    ]:
        assert refusal_of(text).startswith("OS_PACKAGES has ")


def test_names_of_both_tools_are_taken_and_none_costs_no_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for text in [
        "ffmpeg", "g++", "libstdc++6", "lib32z1:i386", "python3.12-dev", "file=5.46-r2",
        "file=1:5.44-3", "file>5", "file~5.4", "hello@edge", "so:libz.so.1", "cmd:bash",
    ]:
        assert refusal_of(text).startswith("OS_PACKAGES: cannot install %s: this image has " % text)
    for text in ["", " ", ", ,"]:
        install_os_packages(text)


def test_apk_is_called_once_for_what_is_missing(tools: Tools) -> None:
    tools.make("apk", 'case "$1$3" in infobusybox) exit 0;; info*) exit 1;; esac')
    install_os_packages(" ffmpeg, busybox,file=5.46-r2 ,")
    assert tools.commands() == [["apk", "add", "--no-cache", "ffmpeg", "file=5.46-r2"]]
    install_os_packages("busybox")
    assert tools.commands() == []


def test_where_there_is_no_apk_apt_get_refreshes_its_lists_and_installs(tools: Tools) -> None:
    tools.make_apt("exit 0", {"curl": "8.0"})
    install_os_packages("ffmpeg,curl,half,file=1:5.44-3")
    call = tools.last_call()
    assert call.command[:2] == ["apt-get", "install"]
    assert call.command[-3:] == ["ffmpeg", "half", "file=1:5.44-3"]
    assert {"-y", "--no-install-recommends"} <= set(call.command)
    assert call.variables["DEBIAN_FRONTEND"] == "noninteractive" and call.stdin == ""
    for text, is_run in [("curl", 0), ("curl=8.0", 0), ("curl=8.0-1", 1), ("half", 1)]:
        install_os_packages(text)
        commands = [command[1] for command in tools.commands()]
        assert commands == (["update", "install"] if is_run else []), text


def test_a_list_that_apt_get_cannot_refresh_is_told_though_it_calls_that_a_success(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "W: Failed to fetch http://host/InRelease  Connection refused"
    tools.make_apt('[ "$1" = update ] && echo "%s"; exit 0' % warning)
    install_os_packages("ffmpeg")
    assert "apt-get update: " + warning in caplog.text


def test_a_failing_apt_get_is_told_and_ends_it(tools: Tools) -> None:
    script = 'echo Reading; echo "E: Unable to locate package nonesuch" >&2; exit 100'
    tools.make_apt('[ "$1" = update ] && exit 0; ' + script)
    done = start_in_vain({"OS_PACKAGES": "nonesuch", "PACKAGES": "x"})
    assert done.code == Exit.UNAVAILABLE
    expected = "OS_PACKAGES: apt-get failed with exit code 100 for nonesuch: Unable to locate package nonesuch"
    assert done.last_line.startswith("ais_runtime_min: " + expected)
    assert "Reading" in done.lines and not any("installing Python" in line for line in done.lines)
    tools.commands()
    tools.make_apt('echo "E: no lists"; exit 100')
    assert "apt-get failed with exit code 100 for ffmpeg: no lists" in refusal_of("ffmpeg")
    assert [command[1] for command in tools.commands()] == ["update"]


def test_an_image_without_both_tools_is_told(tmp_path: Path) -> None:
    done = start_in_vain({"OS_PACKAGES": "ffmpeg,file", "PATH": str(tmp_path)})
    assert done.code == Exit.UNAVAILABLE
    assert done.last_line == (
        "ais_runtime_min: OS_PACKAGES: cannot install ffmpeg file: this image has neither apk nor apt-get")


# == A tool at work ==


def test_a_tool_that_fails_is_told_with_all_that_helps(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    script = "echo fetching; echo 'ERROR: no thing'; echo 'see the manual' >&2; exit 3"
    tools.make("apk", UNKNOWN + script)
    reason = "OS_PACKAGES: apk failed with exit code 3 for thing>1 other: ERROR: no thing"
    assert refusal_of("thing>1,other") == reason
    assert "apk failed:\nfetching\nERROR: no thing\nsee the manual" in caplog.text


def test_a_tool_that_is_killed_or_cannot_be_run_is_told(tools: Tools) -> None:
    apk = tools.make("apk", UNKNOWN + "kill -9 $$")
    reason = "OS_PACKAGES: apk was ended by signal 9 for thing: it printed nothing"
    assert refusal_of("thing") == reason
    Path(apk).write_text("#!/no/such/shell\n")
    assert refusal_of("thing").startswith("OS_PACKAGES: apk cannot be run: No such file")


def test_many_packages_are_named_in_part(tools: Tools) -> None:
    tools.make("apk", "exit 1")
    words = refusal_of(",".join("package-%d" % number for number in range(40)))
    assert "package-0 package-1 " in words and "package-39" not in words and len(words) < 400


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


def test_the_words_that_tell_what_went_wrong_are_picked(tools: Tools) -> None:
    tools.make("apk", UNKNOWN + 'cat "%s/lines"; exit 1' % tools.folder)
    for lines, words in WORDS:
        (tools.folder / "lines").write_text("".join(line + "\n" for line in lines))
        assert refusal_of("thing") == "OS_PACKAGES: apk failed with exit code 1 for thing: " + words


def test_of_what_a_tool_prints_only_the_end_is_kept_and_of_each_line_its_beginning(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    long_line = "printf 'ERROR: '; head -c %d /dev/zero | tr '\\0' x; echo" % LARGE
    tools.make("apk", UNKNOWN + "%s; seq 50000; printf 'ERROR: no line break'; exit 1" % long_line)
    assert refusal_of("thing").endswith(": ERROR: no line break")
    assert "\n49999\n50000\n" in caplog.text and len(caplog.text) < 100_000
    caplog.clear()
    tools.make("apk", UNKNOWN + "seq 10; %s; exit 1" % long_line)
    assert len(refusal_of("thing")) < 5_000 and len(caplog.text) < 100_000


def test_no_credential_that_a_tool_quotes_is_shown(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    url = "https://user:%s@host/" % SECRET
    for size in (1970, 1980, 1990):  # of a line, whose end is not kept
        lines = ["see " + url, "x" * size + " " + url, "ERROR: " + url]
        tools.make("apk", UNKNOWN + "".join("echo '%s'; " % line for line in lines) + "exit 1")
        assert refusal_of("thing").endswith("ERROR: https://***@host/")
    assert SECRET[:3] not in caplog.text and "see https://***@host/" in caplog.text


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


def test_what_a_tool_leaves_behind_with_its_output_is_not_waited_for_and_is_ended(
    tools: Tools, tmp_path: Path
) -> None:
    tools.make("apk", UNKNOWN + 'sleep 600 & echo $! > "%s/pid"; exit 0' % tmp_path)
    install_os_packages("thing")
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_tool_that_closes_its_output_is_waited_for(tools: Tools, tmp_path: Path) -> None:
    tools.make("apk", UNKNOWN + 'exec >&- 2>&-; sleep 0.3; echo done > "%s/done"' % tmp_path)
    install_os_packages("thing")
    assert (tmp_path / "done").exists()


STUBBORN = UNKNOWN + """trap 'touch "{0}/told"' TERM; echo fetching it
(trap "" TERM; exec sleep 600) & echo "$$ $!" > "{0}/new"; mv "{0}/new" "{0}/pids"; while :; do sleep 0.1; done"""


def test_a_tool_that_does_not_end_is_told_while_it_runs_and_then_ended_with_its_children(
    tools: Tools, tmp_path: Path
) -> None:
    tools.make("apk", STUBBORN.format(tmp_path))
    began = time.monotonic()
    limits = {"TOOL_SECONDS": 3.0, "TOOL_STOP_SECONDS": 0.5, "TOOL_PROGRESS_SECONDS": 0.2}
    done = start_in_vain({"OS_PACKAGES": "ffmpeg"}, numbers={**QUICK_NUMBERS, **limits})
    assert done.code == Exit.UNAVAILABLE and time.monotonic() - began < 25
    reason = "OS_PACKAGES: apk did not end within 3 s for ffmpeg; it last said: fetching it"
    assert done.last_line.startswith("ais_runtime_min: " + reason)
    assert re.search(r"apk has been running for \d+ s: fetching it\n", "\n".join(done.lines))
    assert (tmp_path / "told").exists(), "it was not asked to end"
    wait_until_gone(*map(int, (tmp_path / "pids").read_text().split()))


@pytest.mark.parametrize("numbers, signals", [
    ({**QUICK_NUMBERS, "TOOL_STOP_SECONDS": 0.5}, 1),
    ({**QUICK_NUMBERS, "TOOL_STOP_SECONDS": 600.0}, 2),
    pytest.param(None, 1, marks=pytest.mark.slow),
], ids=["once", "twice", "once, in real time"])
def test_sigterm_ends_a_tool_that_does_not_care(
    tools: Tools, tmp_path: Path, numbers: Numbers, signals: int
) -> None:
    tools.make("apk", STUBBORN.format(tmp_path))
    env = {"ETL_CLASS_PAYLOAD": NO_PAYLOAD, "OS_PACKAGES": "ffmpeg"}
    with Server(*started(interpreter("slim"), [], env, numbers)) as pod:
        pids = [int(word) for word in wait_for_file(tmp_path / "pids").split()]
        pod.process.send_signal(signal.SIGTERM)
        wait_for_file(tmp_path / "told")
        if signals > 1:
            pod.process.send_signal(signal.SIGTERM)
        assert pod.wait(SECONDS) == Exit.OK
        wait_until_gone(*pids)
        assert "ais_runtime_min: " not in pod.log()
