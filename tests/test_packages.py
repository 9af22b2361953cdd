"""What PACKAGES holds is cut into requirements as pip reads them, and what is here already is not installed again."""
from typing import List

import pytest

from ais_runtime_min import PackageError, install_os_packages, install_python_packages, is_installed, split_requirements

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
]

INSTALLED = [
    ("pytest", True),
    ("PyTest", True),
    ("pytest_timeout", True),
    ("no-such-distribution", False),
    ("pytest>=1", False),
    ("pytest==1", False),
    ("pytest[extra]", False),
    ("pytest; python_version > '3'", False),
    ("pytest @ file:///pytest", False),
    ("../pytest", False),
    ("", False),
    ("-e .", False),
]


@pytest.mark.parametrize("text, requirements", REQUIREMENTS, ids=[text or "empty" for text, _ in REQUIREMENTS])
def test_requirements_are_split_at_the_commas_between_them(text: str, requirements: List[str]) -> None:
    assert split_requirements(text) == requirements


@pytest.mark.parametrize("requirement, installed", INSTALLED, ids=[text or "empty" for text, _ in INSTALLED])
def test_only_a_bare_name_can_be_known_to_be_installed(requirement: str, installed: bool) -> None:
    assert is_installed(requirement) is installed


@pytest.mark.parametrize("text", ["--index-url https://host", "numpy,-r file.txt", "numpy, --pre", "-e ."])
def test_an_option_among_the_requirements_is_refused(text: str) -> None:
    with pytest.raises(PackageError, match="^PACKAGES has '-.*: options are not allowed"):
        install_python_packages(text)


@pytest.mark.parametrize("text", [
    "--repository=https://host", "ffmpeg,-U", "ffmpeg file", "ffmpeg;reboot", "/etc/passwd", "!ffmpeg",
])
def test_what_is_no_name_of_an_alpine_package_is_refused(text: str) -> None:
    with pytest.raises(PackageError, match="^OS_PACKAGES has "):
        install_os_packages(text)


@pytest.mark.parametrize("text", ["", " ", ",", "pytest", "pytest, PyTest_Timeout,"])
def test_nothing_is_run_where_nothing_is_missing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/no/such/folder")
    install_python_packages(text)


@pytest.mark.parametrize("text", ["", " ", ", ,"])
def test_no_tool_is_run_for_no_os_packages(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    install_os_packages(text)
