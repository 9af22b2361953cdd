"""What pip and the tools of the image are asked for, and how they are run.

Stand-ins take their places, and note how they are called.
"""
import base64
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, List, Optional

import pytest

from ais_runtime_min import (TOOL_OUTPUT_BYTES, Exit, PackageError, install_os_packages,
                             install_python_packages, terminate)
from harness import (QUICK_NUMBERS, Environ, Finished, Numbers, Server, interpreter, run_to_end,
                     started)

# packages come first, so a start that gets this far has installed them
NO_PAYLOAD = base64.b64encode(b"no pickle").decode()
SECRET = "s3cr3t"
SECONDS = 60.0  # for what is to happen soon, on a machine that does other things as well
NOTE = """#!/bin/sh
IFS="$(printf '\\t')"; printf '%s\\n' "{name}	$*" >> "{folder}/calls"; unset IFS
env > "{folder}/variables"; cat > "{folder}/stdin"
"""
UNKNOWN = '[ "$1" = info ] && exit 1\n'  # how apk's stand-ins begin that have no package yet


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

    def make_apt(self, script: str) -> None:
        """Make apt-get and dpkg-query, which knows curl 8.0 and half a package; make no apk."""
        self.make("dpkg-query", '''case "$3" in
            curl) echo 'installed 8.0';; half) echo 'config-files 1.0';; *) exit 1;; esac''')
        self.make("apt-get", script)

    def commands(self) -> List[List[str]]:
        """Return all commands but those that ask whether a package is there, and forget them."""
        calls = self.folder / "calls"
        commands = [line.split("\t") for line in calls.read_text().splitlines()]
        calls.write_text("")
        return [command for command in commands
                if command[0] in ("apk", "apt-get", "python") and command[1] != "info"]

    def assert_surroundings(self, *variables: str) -> None:
        """Check variables and standard input of the last command."""
        assert (self.folder / "stdin").read_text() == ""
        assert set(variables) <= set((self.folder / "variables").read_text().splitlines())


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Stand-ins that PATH finds first, here and in what the test starts."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", "%s:/usr/bin:/bin" % folder)
    monkeypatch.delenv("DEBIAN_FRONTEND", raising=False)
    return Tools(folder)


def start_in_vain(
    env: Environ, python: Optional[str] = None, numbers: Numbers = QUICK_NUMBERS
) -> Finished:
    """Start a pod that gives up at its payload at the latest; no secret may show."""
    # only an environment of its own may take what an index has
    index = {"PIP_NO_INDEX": None if python else "1"}
    variables = {"ETL_CLASS_PAYLOAD": NO_PAYLOAD, **index, **env}
    done = run_to_end(env=variables, python=python, timeout=3 * SECONDS, numbers=numbers)
    log = "\n".join(done.lines)
    print(log)  # pytest shows it where the test fails
    assert "Traceback" not in log and SECRET not in log
    assert done.last_line.startswith("ais_runtime_min: ")
    return done


def refusal_of(text: str) -> str:
    """Return why OS packages cannot be installed."""
    with pytest.raises(PackageError) as caught:
        install_os_packages(text)
    return str(caught.value)


# == Starting and ending ==


def test_a_signal_while_a_tool_is_being_started_ends_it(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tools.folder / "pid"
    tools.make("apk", UNKNOWN + 'echo $$ > "%s.new"; mv "%s.new" "%s"; sleep 600' % (
        file, file, file))

    class Signalled(subprocess.Popen):  # type: ignore[type-arg]
        """A process whose maker gets a signal before it knows of the process."""

        def __init__(self, command: List[str], **options: object) -> None:
            super().__init__(command, **options)  # type: ignore[call-overload]
            if "add" in command:
                deadline = time.monotonic() + SECONDS
                while not file.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(SystemExit):
            install_os_packages("hello")
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


# == What pip is asked for ==

REQUIREMENTS = [
    ("numpy,pytest", ["numpy", "pytest"]),  # together they resolve, the one that is there too
    (" numpy , pillow ,", ["numpy", "pillow"]),
    ("numpy\n,pillow\t", ["numpy", "pillow"]),
    ("numpy>=1.20, <2,pillow", ["numpy>=1.20, <2", "pillow"]),
    ("numpy>=1,!=1.2.*,<2,pillow~=10.0,scipy", ["numpy>=1,!=1.2.*,<2", "pillow~=10.0", "scipy"]),
    ("numpy (>=1.20,<2),pillow", ["numpy (>=1.20,<2)", "pillow"]),
    ("a===1.0,==1.0", ["a===1.0,==1.0"]),
    ("requests[socks,security]>=2,<3,pillow", ["requests[socks,security]>=2,<3", "pillow"]),
    ("a; os_name in 'x86_64,aarch64',b", ["a; os_name in 'x86_64,aarch64'", "b"]),
    ('a; os_name in "x,y",b', ['a; os_name in "x,y"', "b"]),
    ("a; (os_name == 'x' or extra == 'x,y') and python_version > '3',b",
     ["a; (os_name == 'x' or extra == 'x,y') and python_version > '3'", "b"]),
    ("pkg @ https://host/a/c-1.0.tar.gz#sha256=0,d",
     ["pkg @ https://host/a/c-1.0.tar.gz#sha256=0", "d"]),
    ("pkg @ https://host/it's.whl,b", ["pkg @ https://host/it's.whl", "b"]),
    ("a @ git+https://host/a.git@v1,b @ git+ssh://git@host/b.git,c>=1",
     ["a @ git+https://host/a.git@v1", "b @ git+ssh://git@host/b.git", "c>=1"]),
    ("a[b],c[d,e] ,f ~= 1.0 , >= 1.0.1", ["a[b]", "c[d,e]", "f ~= 1.0 , >= 1.0.1"]),
    ("https://host/a.whl,git+https://host/a.git@v1#egg=a,c[d]",
     ["https://host/a.whl", "git+https://host/a.git@v1#egg=a", "c[d]"]),
    ("./a.whl,/wheels/b.whl,c.whl", ["./a.whl", "/wheels/b.whl", "c.whl"]),
    ("a @ https://host/a.whl ; python_version > '3',b",
     ["a @ https://host/a.whl ; python_version > '3'", "b"]),
]


def test_requirements_are_split_at_the_commas_between_them(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", tools.make("python", "exit 0"))
    wrong = []
    for text, requirements in REQUIREMENTS:
        with pytest.raises(PackageError, match="pip succeeded, but .* cannot be found"):
            install_python_packages(text)
        command, = tools.commands()
        assert command[:4] == ["python", "-m", "pip", "install"]
        options = max(index for index, word in enumerate(command) if word.startswith("-"))
        if command[options + 1:] != requirements:
            wrong.append((text, command[options + 1:]))
    assert wrong == []
    tools.assert_surroundings("PIP_USER=0")


def test_options_among_the_requirements_are_refused() -> None:
    for text, refused in [
        ("-e .", "-e ."), ("-r/etc/passwd", "-r/etc/passwd"), ("numpy,-r file.txt", "-r file.txt"),
        ("numpy --index-url=https://host", "numpy --index-url=https://host"),
        ("-r file.txt,b", "-r file.txt"), ("a @ https://host/a.whl,--pre", "--pre"),
    ]:
        message = "^PACKAGES has '%s': options are not allowed" % re.escape(refused)
        with pytest.raises(PackageError, match=message):
            install_python_packages(text)


def test_a_refusal_names_what_wants_the_package_and_hides_user_and_password_of_its_urls() -> None:
    for text, shown in [
        ("https://user:s3cr3t@host/simple", "https://***@host/simple"),
        ("'https://s3cr3t@host/'", "'https://***@host/'"),
        ("http://a:s3cr3t@[::1]:80/", "http://***@[::1]:80/"),
        ("git+https://u:s3cr3t@h@host/a.git@v1", "git+https://***@host/a.git@v1"),
        ("https://user:a/s3cr3t@host/", "https://***@host/"),
        ("https://host:8080/a.git@v1", "https://host:8080/a.git@v1"),
        ("mail@example.org", "mail@example.org"),
    ]:
        with pytest.raises(PackageError) as caught:
            install_python_packages("-i " + text, "Shop needs Flask")
        assert str(caught.value).startswith("Shop needs Flask has ")
        assert "-i %s" % shown in str(caught.value) and SECRET not in str(caught.value)


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
    ("", True), (", ,", True),
    ("some-thing", True), ("SOME_.-thing", True), ("candidate", True),
    ("a.b_c>=1", True), ("D.e-F>=1", True),
    ("some-thing >= 1, < 1000", True), ("some-thing>=1, pytest,", True),
    ("some-thing,no-such-thing", False), ("no-such-thing,some-thing", False),
    ("some-thing>=1000", False), ("some-thing===1", False),
    ("some-thing>=1!1", False), ("some-thing>=1,<1.2", False), ("some-thing[extra]", False),
    ("some-thing @ file:///some-thing", False),
    ("some-thing>=1 <1000", False), ("../some-thing", False),
    ("candidate>=1.5", False), ("local>=1.6", False),
    ("local==1.5+cpu", False), ("epoch<2", False), ("odd>=1", False),
    ("without-version", False), ("without-metadata", False),
    ("some-thing~=1.4,!=1.4.*", True), ("some-thing==1.5.0", True), ("some-thing==1.*", True),
    ("candidate>=1", True), ("local==1.5", True), ("local==1.5+cu121", True), ("epoch>=1!1.0", True),
    ("some-thing; sys_platform ~= 'linux'", False), ("no-such-thing; python_version ~= 'abc'", False),
    ("some-thing; python_version >= '3'", True), ("no-such-thing; python_version < '3'", True),
    ("no-such-thing; python_version >= '3'", False), ("some-thing; extra == 'a'", True),
]


@pytest.mark.filterwarnings("ignore:Implicit None:DeprecationWarning")
def test_pip_is_run_unless_what_is_there_will_do_for_sure(site: Site) -> None:
    for name, version in [
        ("some-thing", "1.5"), ("candidate", "1.5rc1"), ("local", "1.5+cu121"),
        ("epoch", "1!1.5"), ("odd", "dev"), ("without-version", ""),
    ]:
        site.add(name, version)
    site.add("a.b_c", "1.5", "a.b_c-1.5.dist-info")
    site.add("d.e_f", "1.5", "D_E_f-1.5.dist-info")
    site.folder.joinpath("without_metadata-1.5.dist-info").mkdir()
    assert [(text, there) for text, there in INSTALLED if site.has(text) is not there] == []


# == OS packages, by stand-ins ==


def test_what_is_no_name_of_an_os_package_is_refused() -> None:
    for text in [
        "--repository=https://host", "ffmpeg,-U", "ffmpeg file", "ffmpeg;reboot", "/etc/passwd",
        "!ffmpeg", "ffmpeg-", "./x.deb", "ffm\u00e9g", "lib.*", "ffmpeg\nfile",
    ]:
        assert refusal_of(text).startswith("OS_PACKAGES has ")


def test_apk_is_called_once_for_what_is_missing(tools: Tools) -> None:
    tools.make("apk", 'case "$1$3" in infobusybox) exit 0;; info*) exit 1;; esac')
    install_os_packages(" ffmpeg, busybox,file=5.46-r2 ,")
    assert tools.commands() == [["apk", "add", "--no-cache", "ffmpeg", "file=5.46-r2"]]
    for text in ("busybox", "", ", ,"):
        install_os_packages(text)
    assert tools.commands() == []
    for text in [
        "g++", "libstdc++6", "lib32z1:i386", "python3.12-dev", "file=1:5.44-3", "file>5",
        "file~5.4", "hello@edge", "so:libz.so.1", "cmd:bash",
    ]:
        install_os_packages(text)
        assert tools.commands() == [["apk", "add", "--no-cache", text]]


def test_where_there_is_no_apk_apt_get_refreshes_its_lists_and_installs(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "W: Failed to fetch http://host/InRelease  Connection refused"
    tools.make_apt('[ "$1" = update ] && echo "%s"; exit 0' % warning)
    install_os_packages("ffmpeg,curl,half,file=1:5.44-3")
    # it calls that a success
    assert "apt-get update: " + warning in caplog.text
    tools.assert_surroundings("DEBIAN_FRONTEND=noninteractive")
    update, install = tools.commands()
    assert update[:2] == ["apt-get", "update"] and install[:2] == ["apt-get", "install"]
    assert install[-3:] == ["ffmpeg", "half", "file=1:5.44-3"]
    assert {"-y", "--no-install-recommends"} <= set(install)
    for text, is_run in [("curl", 0), ("curl=8.0", 0), ("curl=8.0-1", 1), ("half", 1)]:
        install_os_packages(text)
        assert len(tools.commands()) == 2 * is_run, text


def test_a_failing_apt_get_or_none_is_told_and_ends_it(tools: Tools, tmp_path: Path) -> None:
    script = 'echo Reading; echo "E: Unable to locate package nonesuch" >&2; exit 100'
    tools.make_apt('[ "$1" = update ] && exit 0; ' + script)
    reasons = {
        "%s:/usr/bin:/bin" % tools.folder: "OS_PACKAGES: apt-get failed with exit code 100 for "
                                           "nonesuch: Unable to locate package nonesuch",
        str(tmp_path): "OS_PACKAGES: cannot install nonesuch: this image has neither apk nor apt",
    }
    for path, reason in reasons.items():
        done = start_in_vain({"OS_PACKAGES": "nonesuch", "PACKAGES": "x", "PATH": path})
        assert done.code == Exit.UNAVAILABLE
        assert done.last_line.startswith("ais_runtime_min: " + reason)
        assert not any("installing Python" in line for line in done.lines)
    tools.commands()
    tools.make_apt('echo "E: no lists"; exit 100')
    assert "apt-get failed with exit code 100 for ffmpeg: no lists" in refusal_of("ffmpeg")
    assert [command[1] for command in tools.commands()] == ["update"]


# == A tool at work ==


def test_a_tool_that_is_killed_or_cannot_be_run_is_told_and_many_packages_are_named_in_part(
    tools: Tools
) -> None:
    apk = tools.make("apk", UNKNOWN + "kill -9 $$")
    reason = "OS_PACKAGES: apk was ended by signal 9 for thing>1 other: it printed no reason"
    assert refusal_of("thing>1,other") == reason
    words = refusal_of(",".join("package-%d" % number for number in range(40)))
    assert "package-0 package-1 " in words and "package-39" not in words and len(words) < 400
    Path(apk).write_text("#!/no/such/shell\n")
    assert refusal_of("thing").startswith("OS_PACKAGES: apk cannot be run: No such file")


BROKEN = "WARNING: Retrying after connection broken by 'X'"
WORDS = [
    (["ERROR: unable to select packages:", "  none (no such package):", "    required by: world"],
     "ERROR: unable to select packages: none (no such package): required by: world"),
    (["E: Failed to fetch http://host/x.deb  404", "E: Unable to fetch some archives"],
     "Failed to fetch http://host/x.deb  404; Unable to fetch some archives"),
    (["error: subprocess-exited-with-error", "error: no compiler", "note: no fault of pip"],
     "error: no compiler"),
    (["error: it ends so:"], "error: it ends so:"),
    ([BROKEN, "ERROR: No matching distribution found for six"],
     "ERROR: No matching distribution found for six; the package index cannot be reached"),
    ([BROKEN, "ERROR: no compiler"], "ERROR: no compiler"),
    (["something", "else"], "else"),
    ([], "it printed no reason"),
]


def test_the_words_that_tell_what_went_wrong_are_picked_and_all_is_logged(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    tools.make("apk", UNKNOWN + 'cat "%s/lines" >&2; exit 3' % tools.folder)
    for lines, words in WORDS:
        (tools.folder / "lines").write_text("".join(line + "\n" for line in lines))
        reason = "OS_PACKAGES: apk failed with exit code 3 for thing: "
        assert refusal_of("thing") == reason + words
        assert "\n".join(lines) in caplog.text


def test_of_what_a_tool_prints_only_the_last_whole_lines_are_kept(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    long_line = "printf 'ERROR: '; head -c %d /dev/zero | tr '\\0' x; echo" % (4 << 20)
    tools.make("apk", UNKNOWN + "%s; seq 50000; printf 'ERROR: no line break'; exit 1" % long_line)
    assert refusal_of("thing").endswith(": ERROR: no line break")
    assert "\n49999\n50000\n" in caplog.text
    tools.make("apk", UNKNOWN + "seq 10; %s; exit 1" % long_line)
    assert refusal_of("thing").endswith(": it printed no reason")
    assert len(caplog.text) < 40_000


def test_no_credential_that_a_tool_quotes_is_shown(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    url = "https://user:%s@host/" % SECRET
    rest = ["see " + url, "ERROR: " + url]
    for offset in range(len(url)):  # of the first byte that is kept, in the first URL
        filler = "x" * (TOOL_OUTPUT_BYTES - len("\n".join(["", "", *rest, ""])) - offset)
        lines = [url, filler, *rest]
        tools.make("apk", UNKNOWN + "".join("echo '%s'; " % line for line in lines) + "exit 1")
        assert refusal_of("thing").endswith("ERROR: https://***@host/")
    assert SECRET[:3] not in caplog.text and "see https://***@host/" in caplog.text


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def have_ended(pids: str) -> bool:
    """Tell whether processes have ended; one that is not reaped yet has."""
    command = ["ps", "-o", "stat=", "-p", ",".join(pids.split())]
    states = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True).stdout.split()
    return all(state[0] == "Z" for state in states)


def test_a_tool_that_closes_its_output_is_waited_for_and_what_it_leaves_behind_is_ended(
    tools: Tools, tmp_path: Path
) -> None:
    tools.make("apk", UNKNOWN + 'exec >&- 2>&-; sleep 0.3; echo done > "%s/done"' % tmp_path)
    install_os_packages("thing")
    assert (tmp_path / "done").exists()
    tools.make("apk", UNKNOWN + 'sleep 600 & echo $! > "%s/pid"; exit 0' % tmp_path)
    install_os_packages("thing")
    wait_until(lambda: have_ended((tmp_path / "pid").read_text()))


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
    reason = "OS_PACKAGES: apk did not end within 3 s for ffmpeg: fetching it"
    assert done.last_line.startswith("ais_runtime_min: " + reason)
    assert re.search(r"apk has been running for \d+ s: fetching it\n", "\n".join(done.lines))
    assert (tmp_path / "told").exists(), "it was not asked to end"
    wait_until(lambda: have_ended((tmp_path / "pids").read_text()))


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
        wait_until((tmp_path / "pids").exists)
        pod.process.send_signal(signal.SIGTERM)
        wait_until((tmp_path / "told").exists)
        if signals > 1:
            pod.process.send_signal(signal.SIGTERM)
        assert pod.wait(SECONDS) == Exit.OK
        wait_until(lambda: have_ended((tmp_path / "pids").read_text()))
        assert "ais_runtime_min: " not in pod.log()
