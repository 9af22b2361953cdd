"""Fixtures: interpreters, running servers, and stand-ins for the target, each of them ended with its test."""
import contextlib
import ssl
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

import pytest

from harness import QUICK_NUMBERS, Environ, Numbers, Runtime, interpreter
from standin import Certificates, StandInTarget

StartRuntime = Callable[..., Runtime]
StartTarget = Callable[..., StandInTarget]


@pytest.fixture(scope="session")
def slim_python() -> str:
    """The interpreter that has cloudpickle alone, as in the image."""
    return interpreter("slim")


@pytest.fixture(scope="session")
def sdk_python() -> str:
    """The interpreter that has the real `aistore[etl]`."""
    return interpreter("sdk")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of a test authority, made once for all tests."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def start_target() -> Iterator[StartTarget]:
    """A function that starts stand-ins; at the end none of them may have got what is not HTTP."""
    targets = []

    def start(tls: Optional[ssl.SSLContext] = None) -> StandInTarget:
        targets.append(StandInTarget(tls))
        return targets[-1]

    yield start
    for target in targets:
        target.close()
    assert [complaint for target in targets for complaint in target.complaints] == []


@pytest.fixture(scope="module")
def shared_target() -> Iterator[StandInTarget]:
    """One stand-in for all tests of a file; nobody may send it what is not HTTP."""
    target = StandInTarget()
    yield target
    target.close()
    assert target.complaints == []


@pytest.fixture
def target(start_target: StartTarget) -> StandInTarget:
    """A stand-in for the pod's target."""
    return start_target()


@pytest.fixture
def servers() -> Iterator[contextlib.ExitStack]:
    """Servers that a test enters here are killed when it ends, and checked for tracebacks."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def start_runtime(servers: contextlib.ExitStack, target: StandInTarget) -> StartRuntime:
    """A function that starts the runtime with a payload; `target` is its target, unless `env` names another one."""

    def start(
        payload: Optional[str] = None, env: Optional[Environ] = None, args: Sequence[str] = (),
        python: Optional[str] = None, expect_traceback: bool = False, numbers: Numbers = QUICK_NUMBERS,
    ) -> Runtime:
        variables = {"AIS_TARGET_URL": target.url, "ETL_CLASS_PAYLOAD": payload, **(env or {})}
        return servers.enter_context(Runtime(args, variables, python, expect_traceback, numbers))

    return start


@pytest.fixture(scope="session")
def etls() -> Path:
    """The folder of the example classes."""
    return Path(__file__).resolve().parent / "etls"
