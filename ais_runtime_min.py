#!/usr/bin/env python3
"""Serve a pickled ETL class to NVIDIA AIStore: the whole runtime in one file.

Each AIStore *target*, a storage node, starts a pod of its own for each ETL. The pod finds the
user's class in its environment: `ETL_CLASS_PAYLOAD` is a cloudpickle of the class, in base64. This
file installs the packages that the class needs, unpickles the class without the AIStore SDK, and
transforms the objects that the target sends. It needs the standard library and, for payloads,
`cloudpickle`; Python 3.9 or newer; Linux, or macOS to try a class on a laptop.

    python3 ais_runtime_min.py                       serve what the environment describes
    python3 ais_runtime_min.py serve FILE[:CLASS]    serve a class from a file, to try it
    python3 ais_runtime_min.py pack FILE[:CLASS]     make a payload of a class from a file
    python3 ais_runtime_min.py install               install the packages while an image is built

The map. A request passes four stages, sections 9 to 12, which hand plain values to each other. No
section uses a name that a later section defines, except in the `start()` method of a class.

    1. Names and limits
    2. Errors
    3. Settings
    4. Packages
    5. HTTP messages
    6. Other nodes
    7. The ETL class contract
    8. Loading the class
    9. Stage 1, understanding
    10. Stage 2, reading
    11. Stage 3, transforming
    12. Stage 4, delivering
    13. One request
    14. HTTP: one connection
    15. WebSocket: one connection
    16. Server
    17. Frameworks
    18. Workers
    19. Entry

The life of the process: read the settings, install packages, unpickle the class, bind the port,
fork the workers. Each worker makes an instance of the class and answers requests. The supervisor
replaces workers that die. On SIGTERM the workers answer every request that they have begun to
read, and then all processes end. If the start fails, the last line of the log gives the reason.

The life of a request: the bytes of a connection become an `ETLRequest`; a `Source` is opened for
the object that the request names; the class transforms the object; the output becomes an `Answer`.
Every failure on the way becomes an answer in one place, `answer_for`.

The runtime does not authenticate its callers: the cluster's network has to keep strangers out. It
does not speak HTTP/2 or terminate TLS.
"""
from __future__ import annotations

import gc
import importlib
import sys
import threading
import types

if __name__ == "__main__":
    # a class that imports this file by its name must get this module, with the same ETLServer
    sys.modules["ais_runtime_min"] = sys.modules["__main__"]
    # Imported modules stay: a search for garbage among them would take a sixth of the start-up
    # time. The supervisor enables the collector again before it forks workers.
    gc.disable()

    class LateModule(types.ModuleType):
        """A stand-in for a module that is loaded when an attribute is first read or set.

        Modules that have imported the stand-in keep it. The user's class imports the module itself,
        since `leave_late_modules` has removed the stand-ins by then.
        """

        _lock = threading.Lock()

        def __getattr__(self, name: str) -> object:
            return getattr(self._load(), name)

        def __setattr__(self, name: str, value: object) -> None:
            setattr(self._load(), name, value)

        def _load(self) -> types.ModuleType:
            with self._lock:  # else a slow thread could remove the module that a fast one loads
                if sys.modules.get(self.__name__) is self:
                    del sys.modules[self.__name__]
            return importlib.import_module(self.__name__)

    # The standard library and cloudpickle import these modules, but few pods use them. Loading them
    # would take a fifth of the start-up time and of the memory.
    late_modules: Dict[str, types.ModuleType] = {
        name: LateModule(name)
        for name in ("ssl", "inspect", "shutil", "html", "mimetypes", "ipaddress", "uuid")
        if name not in sys.modules}
    sys.modules.update(late_modules)
else:
    late_modules = {}

import codecs
import collections
import contextlib
import email.utils
import enum
import errno
import functools
import http.client
import http.server
import importlib.machinery
import io
import itertools
import json
import logging
import mmap
import operator
import os
import pickle
import queue
import re
import resource
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import time
import weakref
from abc import ABC, abstractmethod
from http import HTTPStatus
from typing import (
    TYPE_CHECKING, Any, BinaryIO, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List,
    Mapping, MutableMapping, NamedTuple, NoReturn, Optional, Sequence, Set, Tuple, Type, TypeVar,
    Union, cast)
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit, urlunsplit

if TYPE_CHECKING:
    import argparse
    import subprocess

__version__ = "0.2.0"

# == 1. Names and limits ==
# The names of the wire contract with AIStore (ext/etl and ais/tgtetl.go in its sources), and every
# number with its unit and its reason. The *leader* is the thread of a worker that waits for all of
# its connections; a *hop* is the next stage of a pipeline, or the target that takes the result.

HEADER_NODE_URL = "Ais-Node-Url"  # in a request: the pipeline, the hops that its result passes
HEADER_DIRECT_PUT_LENGTH = "Ais-Direct-Put-Length"  # in an answer: the bytes delivered to a hop
HEADER_RETRY_REASON = "Ais-Etl-Retry-Reason"  # in a 503: why to send the object once more
RETRY_REASON_TRANSIENT = "direct-put-transient"
QPARAM_FQN = "etl_fqn"  # the path of the object's file
QPARAM_ARGS = "etl_args"  # the user's argument for the transform
QPARAM_LATEST = "latest-ver"  # whether to ask the target for the object, and not read its file
QPARAM_ORIGINAL_URL = "original_url"  # of /download: the URL to fetch
QPARAM_OBJECT_TO = "object_to"  # of /download: the object's path
DEFAULT_MIME_TYPE = "application/octet-stream"
FRESH_START = "AIS_RUNTIME_FRESH_START"  # the state that `Start.over` leaves to the next program

HEAD_LIMIT_BYTES = 64 << 10  # more than AIStore's own server takes; room for many stages' URLs
HEAD_LIMIT_FIELDS = 100  # as in http.client; real requests have fewer than ten
READ_BYTES = 64 << 10  # of one receive: a small object usually comes together with its head
WRITE_BYTES = 1 << 20  # of one send: TLS fails on pieces of several GiB
CHUNK_LINE_LIMIT_BYTES = 4 << 10  # of a chunk's size and its extensions, which nobody sends
ERROR_TEXT_LIMIT_BYTES = 64 << 10  # of another node's error text, which AIStore cuts far earlier
WAITING_LIMIT_BYTES = 256 << 20  # of all bodies in a worker's memory that wait for a transform
UNMASK_BYTES = 16 << 10  # longest WebSocket message that the leader reads, unmasked as one integer
AHEAD_LIMIT_BYTES = 16 << 20  # of objects of a WebSocket connection that are read ahead
BATCH_LIMIT_PARTS = 512  # buffers of one sendmsg(), which takes at most 1024

HEAD_TIMEOUT_SECONDS = 30.0  # for a request's head, from its first byte
BODY_PAUSE_SECONDS = 300.0  # between two pieces of a body: the stage before may be computing
RESULT_UNREAD_SECONDS = 60.0  # until a result that the client does not read is cut
IDLE_SECONDS = 600.0  # until a connection without requests is closed
SWEEP_SECONDS = 5.0  # between two searches for connections that have timed out
DRAIN_LOOK_SECONDS = 0.2  # the same while the pod stops
DRAIN_SECONDS = 5.0  # for a client to stop sending after an early error, and read the answer
CONNECT_SECONDS = 5.0  # to connect to another node, which is near
HOP_SILENCE_SECONDS = 300.0  # until a silent node is given up: it may be computing
HOP_IDLE_SECONDS = 20.0  # to keep an idle connection to a node: AIStore closes it after 30 s
RETRY_DELAY_LIMIT_SECONDS = 30.0  # between two attempts at a delivery: 1, 2, 4 … up to this
FORSAKEN_SECONDS = 10.0  # until the pod ends after failures have closed all WebSocket connections
WEBSOCKET_DRAIN_SECONDS = 15.0  # for WebSocket clients that go on sending while the pod stops
GRACE_SECONDS = 25.0  # from SIGTERM to the pod's end: a node drain leaves 30 s
WORKER_GRACE_SECONDS = 23.0  # of these, for the requests of a worker; its exit hooks have the rest
LEAVE_SECONDS = 2.0  # for a process without requests to end
CHILDREN_SECONDS = 0.3  # for a class's child processes to end on SIGTERM, when its worker ends
TRIAL_FORK_SECONDS = 5.0  # for the child of a trial fork, which ends at once if forking is safe
TOOL_SECONDS = 1800.0  # for an installer: building a large wheel takes minutes, not half an hour
TOOL_STOP_SECONDS = 5.0  # for an installer to end on SIGTERM
TOOL_PROGRESS_SECONDS = 5.0  # between two log lines which say that an installer still runs
TOOL_OUTPUT_BYTES = 16 << 10  # of the end of an installer's output: its errors are there

BACKLOG = 1024  # connections that may wait for accept(): AIStore opens hundreds at once
THREAD_LIMIT = 1024  # of a worker: connections that it reads or answers at the same time
WEBSOCKET_LIMIT = 512  # WebSocket connections of a worker: half of the threads are left to HTTP
QUICK_SECONDS = 0.0005  # the leader itself calls a class that is faster: a handover costs more
TURN_SECONDS = 0.05  # in which the leader calls the class for one connection, while others wait
LEAD_SECONDS = 0.01  # until a leader that is held up loses the lead to its deputy
CROWD_LIMIT = 64  # connections accepted in a row, or idle ones closed to make room
RESPAWN_DELAY_LIMIT_SECONDS = 5.0  # before a dead worker is replaced; the delay doubles up to this
DEATHS_LIMIT = 10  # workers that die in a row, none having answered a request; then the pod ends
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # shortages that pass
TERMINATION_LOG = "/dev/termination-log"

# outside the root logger's tree: neither the class's setup nor logging.disable() can silence it
logger = logging.Manager(cast(Any, logging.root)).getLogger("ais_runtime_min")


class Exit(enum.IntEnum):
    """Exit codes of the pod, as in sysexits(3); `kubectl describe pod` shows them."""

    OK = 0
    USAGE = os.EX_USAGE  # 64: the command line
    DATA = os.EX_DATAERR  # 65: the payload is not a class that can be served
    UNAVAILABLE = os.EX_UNAVAILABLE  # 69: a package is missing or cannot be installed
    SOFTWARE = os.EX_SOFTWARE  # 70: the user's code failed, or workers keep dying
    SYSTEM = os.EX_OSERR  # 71: the port is taken, a file cannot be read
    OUTPUT = os.EX_IOERR  # 74: the result of a command cannot be written
    CONFIG = os.EX_CONFIG  # 78: an environment variable cannot be used, or is missing


# == 2. Errors ==
# What each failure means to the client (a status) and to the operator (an exit code). An error is
# raised where it is found and caught once: RequestError in `answer_for`, StartupError in `main`.


class RequestError(Exception):
    """A request that ends in an error answer; its text is the answer's `detail`."""

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    headers: Mapping[str, str] = {}

    def __init__(self, detail: str, status: Optional[int] = None,
                 headers: Optional[Mapping[str, str]] = None) -> None:
        super().__init__(detail)
        self.status = status or self.status
        self.headers = headers or self.headers


class BadRequest(RequestError):
    """The request, or the pipeline that it names, is malformed."""

    status = HTTPStatus.BAD_REQUEST


class UnframedRequest(BadRequest):
    """The request's end is unknown: an answer is sent, and the connection is closed."""


class ShortBody(BadRequest):
    """The body ended early, stalled or is malformed; it never counts as a whole one."""


class Forbidden(RequestError):
    """No object of AIStore can have this path, whether or not a file is there."""

    status = HTTPStatus.FORBIDDEN


class NotFound(RequestError):
    """The source object does not exist; to AIStore, a 404 means nothing else."""

    status = HTTPStatus.NOT_FOUND


class ObjectTooLarge(RequestError):
    """The class wants the whole object, and the container has no memory for it."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class BadGateway(RequestError):
    """Another node cannot be reached, or its answer is against the protocol."""

    status = HTTPStatus.BAD_GATEWAY


class HopLost(BadGateway):
    """The next hop was lost before its answer was whole, or wants the object again: try again."""


class NodeBodyLost(BadGateway):
    """Another node's answer ended early, stalled or is malformed."""


class Outcome(NamedTuple):
    """The result of a call: a value or an error."""

    value: Any = None
    error: Optional[BaseException] = None


class Terminated(SystemExit):
    """A signal to stop came before there were workers to stop."""


def attempt(function: Callable[..., Any], *args: Any) -> Outcome:
    """Call a function that may raise anything, and return its value or its error.

    Users' code is called this way, and a SystemExit that it raises must not end a thread. Only
    `Terminated` passes: a signal to stop that comes while users' code is being loaded is meant for
    the runtime.
    """
    try:
        return Outcome(function(*args))
    except Terminated:
        raise
    except BaseException as error:  # the only place that catches everything
        return Outcome(error=error)


def describe(error: BaseException) -> str:
    """Return an exception's text, or its type if it has none or its `str` fails."""
    return str(attempt(str, error).value or "") or type(error).__name__


class StartupError(Exception):
    """The pod cannot serve; the error's text becomes the last line of the log.

    `story` is the traceback of the user's code. The supervisor logs it once, before that line.
    """

    exit = Exit.SOFTWARE
    story = ""


class ConfigError(StartupError):
    """Some environment variables cannot be used; the text names all of them."""

    exit = Exit.CONFIG


class PayloadError(StartupError):
    """The payload is not a class that this runtime can serve."""

    exit = Exit.DATA


class PackageError(StartupError):
    """A package is missing or cannot be installed."""

    exit = Exit.UNAVAILABLE


class FrameworkNeeded(PackageError):
    """The class turns out to need a framework, which is installed before a new start.

    `serves` is true if the framework must serve the class, and false if the class merely imports
    the framework.
    """

    def __init__(self, framework: str, serves: bool) -> None:
        super().__init__(
            f"the class must need {framework} when it is constructed: use self.app in __init__"
            if serves else f"the class imports {framework}")
        self.framework = framework
        self.serves = serves


class ClassError(StartupError):
    """The class cannot be constructed, or needs what this runtime does not have."""


class PortError(StartupError):
    """The port cannot be listened on."""

    exit = Exit.SYSTEM


class UsageError(StartupError):
    """The command line is wrong, or names something that does not exist."""

    exit = Exit.USAGE


class InvalidPipelineError(ValueError):
    """The SDK's error for a malformed pipeline, answered 400; classes may raise it."""

    __module__ = "aistore.sdk.errors"  # `user_status` knows the exception by this name


class ETLDirectPutTransientError(Exception):
    """The SDK's error for a direct put that may succeed later; classes may raise it.

    The answer is 502, or 503 with `Ais-Etl-Retry-Reason` if `bail_without_local_retry` is true.
    """

    __module__ = "aistore.sdk.errors"

    def __init__(self, url: str, cause: Exception, bail_without_local_retry: bool = False) -> None:
        self.url = url
        self.cause = cause
        self.bail_without_local_retry = bail_without_local_retry
        super().__init__(f"direct put to {url!r} failed: {type(cause).__name__}: {cause}")


# == 3. Settings ==
# The environment becomes one frozen value, read once. An empty variable counts as unset.


def parse_bool(text: Optional[str]) -> bool:
    """Return whether a text means true to the SDK; an unknown word means false."""
    return str(text or "").strip().lower() in ("1", "t", "true", "y", "yes", "on")


def whole_number(lowest: int, highest: int, text: str) -> int:
    """Parse a whole number from `lowest` to `highest`."""
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text) or not lowest <= int(text) <= highest:
        raise ValueError(f"a whole number from {lowest} to {highest}")
    return int(text)


def word_of(words: Sequence[str], text: str) -> str:
    """Parse one of some words, in upper or lower case."""
    for word in words:
        if word.lower() == text.strip().lower():
            return word
    raise ValueError("one of " + ", ".join(words))


def existing_file(text: str) -> str:
    """Parse the path of a file that can be read."""
    if not os.path.isfile(text) or not os.access(text, os.R_OK):
        raise ValueError("a file that can be read")
    return text


def folders(text: str) -> Tuple[str, ...]:
    """Parse a colon-separated list of absolute folders, and resolve symlinks."""
    paths = [path for path in text.split(":") if path]
    if not paths or not all(map(os.path.isabs, paths)):
        raise ValueError("absolute folders, separated by colons")
    return tuple(os.path.realpath(path) for path in paths)


def target_url(text: str) -> str:
    """Parse a target's base URL; drop the slashes at its end, but not that of `file:///`."""
    try:
        url = urlsplit(text)
        if url.scheme == "file":
            is_usable = not url.netloc and os.path.isdir(unquote(url.path))
        else:
            has_host = bool(url.hostname) and url.port != 0 and "@" not in url.netloc
            is_usable = has_host and url.scheme in ("http", "https")
    except ValueError:  # the port or the IPv6 address is malformed
        is_usable = False
    # the pattern is visible ASCII without "#" and "?": a path is appended to the URL
    if not is_usable or not re.fullmatch("[!-\"$->@-~]+", text):
        raise ValueError("http://host[:port]/path, https://… or file:///folder, of a folder that "
                         "is there, without user and password")
    return text if text == "file:///" else text.rstrip("/")


class Variable(NamedTuple):
    """An environment variable, the field of `Settings` that it fills, and its parser.

    The parser's ValueError says which values are allowed.
    """

    name: str
    field: str
    parse: Callable[[str], Any]
    secret: bool = False  # whether error texts must hide the value


# Of two variables for one field, the later one wins.
VARIABLES = (
    Variable("ETL_CLASS_PAYLOAD", "payload", str, secret=True),
    Variable("ETL_CLASS_PAYLOAD_FILE", "payload_file", existing_file),
    Variable("PACKAGES", "packages", str),
    Variable("OS_PACKAGES", "os_packages", str),
    Variable("NUM_WORKERS", "workers", functools.partial(whole_number, 1, 256)),
    Variable("NUM_THREADS", "threads", functools.partial(whole_number, 1, 1024)),
    Variable("AIS_TARGET_URL", "target", target_url, secret=True),
    Variable("direct_put", "direct_put", parse_bool),
    Variable("DIRECT_PUT", "direct_put", parse_bool),
    Variable("ETL_DIRECT_FQN", "direct_fqn", parse_bool),
    Variable("AIS_DIRECT_PUT_RETRIES", "direct_put_retries",
             functools.partial(whole_number, 0, 100)),
    Variable("AIS_SKIP_VERIFY", "skip_verify", parse_bool),
    Variable("AIS_SKIP_VERIFY_CRT", "skip_verify", parse_bool),
    Variable("AIS_CLIENT_CA", "client_ca", existing_file),
    Variable("AIS_CRT", "client_cert", existing_file),
    Variable("AIS_CRT_KEY", "client_key", existing_file),
    Variable("AIS_AUTHN_TOKEN", "token", str, secret=True),
    Variable("PORT", "port", functools.partial(whole_number, 0, 65535)),
    Variable("LOG_LEVEL", "log_level", functools.partial(
        word_of, ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))),
    Variable("ETL_FQN_ROOTS", "fqn_roots", folders),
    Variable("ETL_WS_FAILURE", "ws_failure", functools.partial(word_of, ("break", "empty"))),
)


def join_payload(environ: Mapping[str, str], values: Dict[str, Any]) -> List[str]:
    """Join the pieces of the payload into `values`; return complaints about them.

    A large payload comes in pieces, since Linux takes at most 128 KiB in one variable.
    """
    further = [name for name, text in environ.items()
               if text and re.fullmatch("ETL_CLASS_PAYLOAD_[0-9]+", name)]
    names = [f"ETL_CLASS_PAYLOAD_{number}" for number in range(2, 2 + len(further))]
    names.insert(0, "ETL_CLASS_PAYLOAD")
    values["payload"] = "".join(environ.get(name, "") for name in names)
    if values["payload"] and values.get("payload_file"):
        return ["ETL_CLASS_PAYLOAD and ETL_CLASS_PAYLOAD_FILE are both set"]
    missing = [name for name in names if further and not environ.get(name)]
    last = max(further, key=lambda name: int(name.rpartition("_")[2]), default="")
    return [f"{', '.join(missing)} is not set, but {last} is"] if missing else []


class Settings(NamedTuple):
    """The settings, from the environment or the command line; never changed."""

    payload: str = ""
    payload_file: str = ""
    packages: str = ""
    os_packages: str = ""
    workers: int = 4  # as AIStore documents for NUM_WORKERS
    threads: Optional[int] = None  # None: the environment does not say
    target: str = ""
    direct_put: bool = False
    direct_fqn: bool = False
    direct_put_retries: int = 3
    skip_verify: bool = False
    client_ca: str = ""
    client_cert: str = ""
    client_key: str = ""
    token: str = ""
    port: int = 8000
    log_level: str = "INFO"
    fqn_roots: Optional[Tuple[str, ...]] = None  # None: files of AIStore's layout may be read
    ws_failure: str = "break"
    # No variable sets the fields below.
    server: str = ""  # the framework that serves the class, "" for the built-in server
    host: str = ""  # the address to listen on, "" for all interfaces

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ,
                 required: Sequence[str] = ()) -> Settings:
        """Read all variables; raise one ConfigError for all bad and missing ones."""
        values: Dict[str, Any] = {}
        complaints = []
        for variable in VARIABLES:
            text = environ.get(variable.name, "")
            try:
                if text:
                    values[variable.field] = variable.parse(text)
            except ValueError as error:
                # a text of several lines may be a private key, given instead of its file's path
                shown = "" if variable.secret or "\n" in text else f"={text!r}"
                complaints.append(f"{variable.name}{shown} must be {error}")
        complaints += join_payload(environ, values)
        complaints += [f"{name} is not set" for name in required if not environ.get(name)]
        if values.get("client_key") and not values.get("client_cert"):
            complaints.append("AIS_CRT_KEY is set without AIS_CRT")
        if complaints:
            raise ConfigError("; ".join(complaints))
        return cls(**values)

    @property
    def is_pod(self) -> bool:
        """Whether the environment has a payload; otherwise a class's file is served."""
        return bool(self.payload or self.payload_file)

    def redact(self, text: str) -> str:
        """Replace the token and the target's secret path, which users' errors may quote."""
        path = "" if self.target.startswith("file:") else urlsplit(self.target).path
        name = path.rpartition("/")[2]
        secrets = {self.token, path, unquote(path), name, unquote(name)}
        for secret in sorted(secrets, key=len, reverse=True):  # a longer one may contain others
            if len(secret) > 3:  # a shorter one would be found in harmless words
                text = text.replace(secret, "***")
        return text


LINE_BREAK = re.compile(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*")
WITH_LINES = {"has_lines": True}  # `extra` of a log record whose message has several lines


class RedactingFormatter(logging.Formatter):
    """Format log records and their tracebacks without the secrets of the settings.

    The message of a record becomes one line, unless the record `has_lines`. The traceback, if there
    is one, follows in lines of its own.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__("%(asctime)s - %(name)s - %(levelname)s - %(message)s")
        self._settings = settings

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return self._settings.redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the library's name
        """Format a record without its traceback."""
        text = super().formatMessage(record)
        return text if getattr(record, "has_lines", False) else LINE_BREAK.sub(" ", text)

    def formatException(self, ei: Any) -> str:  # noqa: N802, the library's name
        """Format a traceback; if that fails, as without free descriptors, its exception."""
        text = attempt(super().formatException, ei).value
        return text if isinstance(text, str) else f"{type(ei[1]).__name__}: {describe(ei[1])}"


def stdout_handler(settings: Settings) -> logging.Handler:
    """Return a handler that writes log records to stdout, without secrets."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(RedactingFormatter(settings))
    return handler


def configure_logging(settings: Settings) -> None:
    """Send all log records to stdout, users' too, since a pod's log is one stream."""
    handler = stdout_handler(settings)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logger.setLevel(settings.log_level)
    logger.handlers, logger.propagate = [handler], False


# == 4. Packages ==
# Installs what the class needs with the tools of the image: apk or apt-get, then pip. Runs in the
# supervisor before it loads the class; pip runs again if the class turns out to need a framework.


def hide_credentials(text: str) -> str:
    """Return a text without the users and passwords in its URLs."""
    # The first alternative ends at a slash. The second allows for a bare slash in a password, but
    # takes up to five digits before a slash for a port.
    return re.sub(r"://(?:[^/\s]*|[^/:\s]*:(?![0-9]{1,5}/)[^@\s]*)@", "://***@", text)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; return False if no process is left in it."""
    try:
        os.killpg(group, number)
    except OSError:
        return False
    return True


def end_all(send: Callable[[int], bool], seconds: float) -> None:
    """Send SIGTERM to processes, wait up to `seconds` for their end, send SIGKILL.

    `send(number)` sends a signal to all of the processes and returns whether any is left; the
    signal 0 only asks.
    """
    deadline, number = time.monotonic() + seconds, int(signal.SIGTERM)
    try:
        while send(number) and time.monotonic() < deadline:
            time.sleep(0.01)
            number = 0
    finally:  # also if a further signal to this process raises an exception in the wait
        send(signal.SIGKILL)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_signals_deferred() -> Iterator[None]:
    """Delay signals to stop until the end of a block.

    Their handler raises an exception. Python ignores exceptions in the hooks of a fork, and a child
    that is being started would be forgotten.
    """
    came: List[int] = []
    before = {number: signal.signal(number, lambda each, _: came.append(each))
              for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def start_in_group(stack: contextlib.ExitStack, stop_seconds: float, command: Sequence[str],
                   **options: Any) -> subprocess.Popen[bytes]:
    """Start a child in a process group of its own, which ends when `stack` is closed.

    What is left of the group then gets `stop_seconds` before SIGKILL. `options` are those of Popen.
    """
    import subprocess

    def send(number: int) -> bool:
        signal_group(process.pid, number)
        return process.poll() is None

    with stop_signals_deferred():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        stack.callback(end_all, send, stop_seconds)
    return process


def last_lines(output: int) -> List[str]:
    """Return the last whole lines of an installer's output file, without credentials."""
    start = max(0, os.fstat(output).st_size - TOOL_OUTPUT_BYTES)
    lines = os.pread(output, TOOL_OUTPUT_BYTES, start).decode("utf-8", "replace").splitlines()
    if start:
        del lines[0]  # it may begin within a URL, where no password can be recognized
    return [hide_credentials(line.rstrip()) for line in lines if line.strip()]


def last_words(lines: Sequence[str]) -> str:
    """Return the errors in an installer's last lines or, without any, the last line."""
    text = "\n".join(map(str.strip, lines))
    errors = re.findall("(?m)^E: (.*)", text)  # all of apt-get's
    if not errors:
        # the last error of apk or pip; if its line ends in a colon, the next line belongs to it
        errors = re.findall(r"(?im)^error\b(?!.*subprocess-exited).*(?:(?<=:)\n.*)*", text)[-1:]
    words = "; ".join(errors).replace("\n", " ") or text.rpartition("\n")[2]
    if "No matching distribution" in words and "connection broken by" in text:
        words += "; the package index cannot be reached"  # pip treats it as an empty index
    return words or "it printed no reason"


def run_tool(why: str, packages: Sequence[str], command: Sequence[str],
             environ: Mapping[str, str]) -> List[str]:
    """Run an installer to its end and return its last lines; log that it still runs.

    Raise PackageError, whose text begins with `why`, if the tool cannot be run, fails or takes too
    long. Whatever is left of the tool's process group is ended when the tool has ended, or when a
    signal ends this process. The output goes to a temporary file and not to a pipe, which a process
    that the tool leaves behind could keep open.
    """
    import subprocess
    import tempfile

    name = "pip" if command[0] == sys.executable else command[0]
    with contextlib.ExitStack() as stack:
        try:
            output = stack.enter_context(tempfile.TemporaryFile()).fileno()
            process = start_in_group(stack, TOOL_STOP_SECONDS, command, env=environ,
                                     stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise PackageError(f"{why}: {name} cannot be run: {error.strerror}") from None
        began = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TOOL_PROGRESS_SECONDS)
            seconds = time.monotonic() - began
            if process.returncode is not None or seconds >= TOOL_SECONDS:
                break
            last = "".join(f": {line.strip()}" for line in last_lines(output)[-1:])
            logger.info("%s has been running for %.0f s%s", name, seconds, last)
        code, lines = process.returncode, last_lines(output)
    if code == 0:
        return lines
    logger.error("%s failed:\n%s", name, "\n".join(lines), extra=WITH_LINES)
    how = f"did not end within {TOOL_SECONDS:.0f} s"
    if code is not None:
        how = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
    listed = hide_credentials(" ".join(packages))
    if len(listed) > 200:
        listed = listed[:200].rpartition(" ")[0] + " …"
    raise PackageError(f"{why}: {name} {how} for {listed}: {last_words(lines)}")


def has_os_package(tool: str, name: str, environ: Mapping[str, str]) -> bool:
    """Return whether a package is installed, in the version that `name` asks for."""
    import subprocess

    # apk answers by its exit code alone, dpkg-query by its output
    command, wanted = ["apk", "info", "--installed", name], ""
    if tool == "apt-get":
        package, _, version = name.partition("=")
        command = ["dpkg-query", "-W", "-f=${db:Status-Status} ${Version}\n", package]
        wanted = "(?m)^installed " + (re.escape(version) or ".*") + "$"
    try:
        said = subprocess.check_output(
            command, env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            errors="replace", timeout=60)  # it only reads a file
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(re.search(wanted, said))


def install_os_packages(text: str, environ: Mapping[str, str] = os.environ) -> None:
    """Install the missing packages of a comma-separated list.

    Raise PackageError if the image has neither apk nor apt-get, or if the tool fails. Neither is
    run, and root is not needed, if no package is missing.
    """
    import shutil

    names = list(filter(None, map(str.strip, text.split(","))))
    for name in names:
        # apt-get removes a package if a "-" follows its name
        if not re.fullmatch(r"[A-Za-z0-9][\w.+:@~<>=-]*(?<!-)", name, re.ASCII):
            raise PackageError(f"OS_PACKAGES has {name!r}, which is no package name")
    if not names:
        return
    path = environ.get("PATH")
    tool = next((each for each in ("apk", "apt-get") if shutil.which(each, path=path)), "")
    if not tool:
        raise PackageError(f"OS_PACKAGES: cannot install {' '.join(names)}: "
                           f"this image has neither apk nor apt-get")
    missing = [name for name in names if not has_os_package(tool, name, environ)]
    if not missing:
        return
    logger.info("installing OS packages with %s: %s", tool, " ".join(missing))
    commands = [["apk", "add", "--no-cache", *missing]]
    if tool == "apt-get":
        environ = {**environ, "DEBIAN_FRONTEND": "noninteractive"}
        # without Pattern-Only an unknown name with a dot is a regular expression, which may match
        # hundreds of packages
        commands = [["apt-get", "update", "-q"], [
            "apt-get", "install", "-q", "-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0",
            "-o", "APT::Cmd::Pattern-Only=true", *missing]]
    for command in commands:
        for line in run_tool("OS_PACKAGES", missing, command, environ):
            if re.match("[EW]: ", line):  # apt-get succeeds even if it could not fetch a list
                logger.warning("%s %s: %s", *command[:2], line)


def parse_requirement(text: str) -> Any:
    """Return a requirement as pip parses it, or None if pip cannot parse it.

    Paths and bare URLs are not requirements, although pip installs them. Without pip, the result is
    always None.
    """
    try:
        parser = importlib.import_module("pip._vendor.packaging.requirements")
        return parser.Requirement(text)
    except (ImportError, ValueError):
        return None


def requirements_of(text: str, why: str) -> List[str]:
    """Split comma-separated requirements (PEP 508).

    Raise PackageError, whose text begins with `why`, if a requirement contains an option of pip.
    """
    # a comma is part of a requirement in brackets, in quotes, and before a further version
    parts = re.findall(
        r"""(?:\[[^]]*\]|\([^)]*\)|"[^"]*"|'[^']*'|,\s*[<>=!~]|[^,])+""", text)
    requirements = [part.strip() for part in parts if part.strip()]
    for requirement in requirements:
        if re.search(r"(^|\s)-", requirement):
            raise PackageError(f"{why} has {hide_credentials(requirement)!r}: "
                               f"options are not allowed, only requirements")
    return requirements


def installed_version(name: str) -> Optional[str]:
    """Return the version of an installed distribution, or None."""
    import importlib.metadata

    # Python 3.9 knows only some of the equivalent spellings of a name (PEP 503)
    for spelling in (name, re.sub(r"[-_.]+", "-", name)):
        # incomplete metadata can cause any exception
        version = attempt(importlib.metadata.version, spelling).value
        if isinstance(version, str):
            return version
    return None


def is_met(requirement: str) -> Optional[bool]:
    """Return whether this Python meets a requirement, or None if only pip can tell."""
    wanted = parse_requirement(requirement)
    if wanted is None:
        return True if installed_version(requirement) else None  # a bare name, if pip is missing
    try:
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            return True  # the requirement is for other Pythons or systems
        version = installed_version(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            return False
    except ValueError:  # a version or marker that cannot be compared
        return None
    # only pip can tell from which URL a distribution came, and what its extras need
    return None if wanted.url or wanted.extras else True


def lacking(requirements: Iterable[str]) -> List[str]:
    """Return the requirements that are certainly not met."""
    return [each for each in requirements if is_met(each) is False]


class TargetFolder:
    """The temporary folder for pip if it cannot, or must not, fill site-packages.

    pip must not if another package manager owns them (PEP 668). The folder is made when pip first
    needs it. The process that owns the folder removes it when the process ends.
    """

    path = ""  # "" while there is no folder
    may_be_made = True  # False in the command `install`, since its end removes the folder
    requirements: Sequence[str] = ()  # of all runs of pip: each run resolves all of them

    def take_over(self, path: str, requirements: Sequence[str]) -> None:
        """Own a folder, and remember the requirements that pip has installed there."""
        import shutil

        self.path, self.requirements = path, requirements
        # forked workers drop this finalizer
        weakref.finalize(self, shutil.rmtree, path, True)


target_folder = TargetFolder()


def pip_target(requirements: Sequence[str], why: str) -> Tuple[str, List[str]]:
    """Return the folder that pip is to fill, and the arguments for pip.

    Raise PackageError, whose text begins with `why`, if there is no folder to fill.
    """
    import sysconfig
    import tempfile

    paths = sysconfig.get_paths()
    mark = os.path.join(paths["stdlib"], "EXTERNALLY-MANAGED")  # PEP 668; not for environments
    is_of_system = sys.prefix == sys.base_prefix and os.path.exists(mark)
    if not is_of_system and all(
            os.access(paths[name], os.W_OK) for name in ("purelib", "platlib", "scripts")):
        return paths["purelib"], list(requirements)
    if not target_folder.may_be_made:
        raise PackageError(
            f"{why}: {paths['purelib']} cannot be written, or belongs to the system; run install "
            f"as root, in a Python or environment of its own")
    if not target_folder.path:
        try:
            target_folder.take_over(tempfile.mkdtemp(prefix="ais-packages-"), ())
        except OSError:
            raise PackageError(
                f"{why}: neither {paths['purelib']} nor any folder for temporary files can be "
                f"written; install it into the image, or give the pod a writable /tmp") from None
    target_folder.requirements = [*target_folder.requirements, *requirements]
    return target_folder.path, [
        "--upgrade", "--target", target_folder.path, *target_folder.requirements]


def use_packages_of(folder: str, environ: MutableMapping[str, str]) -> None:
    """Let this process and its children import what pip has put into a folder."""
    import site

    if folder not in sys.path:  # searched after the standard library, and before site-packages
        sites = [path.endswith(("/site-packages", "/dist-packages")) for path in sys.path]
        sys.path.insert([*sites, True].index(True), folder)
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), folder)))
        environ["PATH"] = f"{environ.get('PATH', os.defpath)}{os.pathsep}{folder}/bin"
    site.addsitedir(folder)  # reads the folder's .pth files, as Python does when it starts
    importlib.invalidate_caches()


def install_python_packages(text: str, why: str = "PACKAGES",
                            environ: MutableMapping[str, str] = os.environ) -> None:
    """Install comma-separated requirements by one run of pip, unless all are met.

    The installed packages can be imported at once. pip's own environment variables apply, except
    for those that make pip install elsewhere. Raise PackageError, whose text begins with `why`, if
    pip fails, or if a requirement is not met afterwards.
    """
    requirements = requirements_of(text, why)
    if all(map(is_met, requirements)):
        return
    folder, arguments = pip_target(requirements, why)
    logger.info("installing Python packages: %s", hide_credentials(" ".join(requirements)))
    # what is installed elsewhere cannot be imported; pip ignores an empty variable
    elsewhere = dict.fromkeys(("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN"), "")
    variables = {**environ, **elsewhere, "PIP_USER": "0", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
               "--progress-bar=off", *arguments]
    run_tool(why, requirements, command, variables)
    use_packages_of(folder, environ)
    lost = hide_credentials(" ".join(lacking(requirements)))
    if lost:
        raise PackageError(f"{why}: pip succeeded, but {lost} cannot be found here: see where its "
                           f"configuration (pip config list) has it install")


def pip_command(requirements: Iterable[str]) -> str:
    """Return the command that installs requirements, for a message to the user."""
    import shlex

    return hide_credentials(f"pip install {shlex.join(requirements)}")


# == 5. HTTP messages ==
# What requests and answers have in common: header fields, and bodies that know whether they are
# whole. The caller owns the connection from which the bytes come. The grammar is that of RFC 9110,
# 5.6, and of RFC 9112; a message that violates it is refused, never repaired.

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rf"({TOKEN.decode()}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~\x80-\xff]*)?")
FIELD_LINE = re.compile(rb"%b:[\t -~\x80-\xff]*\r\n" % TOKEN)
FIELD_LINES = re.compile(f"(?:{FIELD_LINE.pattern.decode()})*")
FIELD = re.compile(r"([^:\r]+):([^\r]*)\r\n")
HOST = re.compile(r"[0-9A-Za-z._~%!$&'()*+,;=:\[\]-]*")
HOST_NAME = re.compile(r"[^.]{1,63}(?:\.[^.]{1,63})*\.?")  # Python's resolver takes no others
# fields that frame a message, tell whom it is for, or ask for a "100 Continue": a second field of
# the same name would be ambiguous
SINGLE = frozenset(("content-length", "transfer-encoding", "host", "expect"))


class Fields(Dict[str, str]):
    """Header fields by name, in upper or lower case; the keys are in lower case."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a field."""
        return super().get(name.lower(), default)


@functools.lru_cache(maxsize=32)
def parse_fields(text: str) -> Mapping[str, str]:
    """Parse header lines that end in CRLF; return the values by lower-case name.

    The values of a repeated field are joined by commas; a field in `SINGLE` must not be repeated.
    Raise UnframedRequest if a line is malformed. All lines are matched at once, which is several
    times faster than line by line. Results are cached, since clients send the same fields again and
    again; so no caller may change a result.
    """
    if not FIELD_LINES.fullmatch(text):
        raise UnframedRequest("a header field is malformed")
    fields: Dict[str, str] = {}
    for name, value in FIELD.findall(text):
        name, value = name.lower(), value.strip(" \t")
        if name in fields:
            if name in SINGLE:
                raise UnframedRequest(f"the header field {name} is repeated")
            value = f"{fields[name]}, {value}"
        fields[name] = value
    return fields


class ConnectionInput:
    """Buffered input from a connection, from which heads and bodies are read.

    The input does not own the connection. Reads wait as long as the socket's time-outs allow. The
    time-outs of a client's socket are set in the kernel, so that a read is one system call, and
    raise BlockingIOError; those of a node's socket are Python's and raise socket.timeout.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._start = 0  # where the unread bytes of the buffer begin
        self.ahead = 0  # the number of unread bytes
        # sends "100 Continue" before the first wait for a body
        self.invite: Optional[Callable[[], None]] = None

    def fill(self, flags: int = 0) -> bool:
        """Receive once more; return False at the end of the connection."""
        data = self._connection.recv(READ_BYTES, flags)
        self._buffer = self._buffer[self._start:] + data if self.ahead else data
        self._start = 0
        self.ahead = len(self._buffer)
        return bool(data)

    def need(self, count: int) -> bool:
        """Receive until `count` bytes are buffered; return False if the connection ends."""
        while self.ahead < count:
            if not self.fill():
                return False
        return True

    def find(self, mark: bytes, limit: int) -> int:
        """Return the offset of `mark` in the first `limit` buffered bytes, or -1."""
        found = self._buffer.find(mark, self._start, self._start + limit)
        return found - self._start if found >= 0 else -1

    def peek(self, count: int) -> bytes:
        """Return up to `count` buffered bytes, and leave them in the buffer."""
        return self._buffer[self._start:self._start + count]

    def take(self, count: int) -> bytes:
        """Remove up to `count` bytes from the buffer and return them."""
        data = self._buffer[self._start:self._start + count]
        self._start += len(data)
        self.ahead -= len(data)
        if not self.ahead:
            self._buffer, self._start = b"", 0
        return data

    def readinto(self, buffer: Any, flags: int = 0) -> int:
        """Read some bytes, buffered or new ones; return 0 at the connection's end."""
        if not self.ahead:
            self.send_invitation()
            return self._connection.recv_into(buffer, 0, flags)
        data = self.take(len(buffer))
        buffer[:len(data)] = data
        return len(data)

    def send_invitation(self) -> None:
        """Tell a client that waits for it to send its body (RFC 9110, 10.1.1)."""
        if self.invite is not None:
            invite, self.invite = self.invite, None
            invite()


def set_timeout(connection: socket.socket, option: int, seconds: float) -> None:
    """Set a time-out in the kernel: the option SO_RCVTIMEO or SO_SNDTIMEO.

    Python's own time-outs cost a further system call for each receive and each send.
    """
    # a struct timeval
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, option, value)


def send_some(connection: socket.socket, parts: Sequence[Any], flags: int = 0) -> Sequence[Any]:
    """Send parts by one system call; return the parts that the kernel did not take."""
    batch = parts[:BATCH_LIMIT_PARTS]
    sent = connection.sendmsg(batch, (), flags)
    if sent == sum(map(len, batch)):
        return parts[BATCH_LIMIT_PARTS:]
    views = [memoryview(part) for part in batch]
    while sent >= len(views[0]):
        sent -= len(views.pop(0))
    views[0] = views[0][sent:]
    return [*views, *parts[BATCH_LIMIT_PARTS:]]


def send_parts(connection: socket.socket, parts: Sequence[Any]) -> None:
    """Send all parts; raise BlockingIOError if the client reads nothing for too long."""
    while parts:
        parts = send_some(connection, parts)


# the name of a body in messages, and the error to raise if the body is cut short or malformed
BodyKind = Tuple[str, Type[RequestError]]
OF_REQUEST: BodyKind = ("the request's body", ShortBody)
OF_NODE: BodyKind = ("another node's answer", NodeBodyLost)


def read_to_end(raw: io.RawIOBase, size: Optional[int]) -> bytes:
    """Read a raw file to its end, without a second copy in memory; do not close it.

    The file has `size` bytes, or an unknown number if `size` is None. At least one read is made,
    since the first read of an empty body may raise an error.
    """
    if not size:
        data, block = io.BytesIO(), memoryview(bytearray(READ_BYTES))
        for count in iter(lambda: raw.readinto(block), 0):
            data.write(block[:count])
        return data.getvalue()
    buffered = io.BufferedReader(raw, READ_BYTES)
    try:
        return buffered.read(size)
    finally:
        buffered.detach()


class BodyStream(io.RawIOBase):
    """A message's body: a raw file whose `read` raises if the body is cut short.

    Subclasses implement `receive`.
    """

    size: Optional[int] = None  # bytes of the whole body; None if unknown before its end
    failure: Optional[RequestError] = None  # the error that a read has raised
    count = 0  # bytes read so far

    def receive(self, buffer: Any) -> int:
        """Read some bytes, 0 at the end; raise a RequestError if the body is cut short."""
        raise NotImplementedError

    def raise_failure(self) -> None:
        """Raise the error of an earlier read, if there is one.

        Users' code may have caught that error and taken a cut body for a whole one.
        """
        if self.failure is not None:
            raise self.failure

    finish = raise_failure  # called after the transform

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes, 0 at the end; after an error, every further read raises it."""
        self.raise_failure()
        if not len(buffer):
            return 0  # which says nothing of the body
        try:
            count = self.receive(buffer)
            self.count += count
            return count
        except RequestError as error:
            self.failure = error
            raise

    def readall(self) -> bytes:
        """Read to the end."""
        return read_to_end(self, self.size)


class MessageBody(BodyStream):
    """A body that comes over a connection; any thread may read it, one at a time."""

    def __init__(self, source: ConnectionInput, kind: BodyKind = OF_REQUEST) -> None:
        super().__init__()
        self._source = source
        self._kind = kind
        self.is_at_end = False

    def finish(self) -> None:
        """Read to the end, to notice a lost client even if the class has read less."""
        while self.read(READ_BYTES):
            pass

    def _call(self, read: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the input; turn its errors into those of a body cut short."""
        try:
            return read(*args)
        except (BlockingIOError, socket.timeout):
            raise self._cut("paused for too long") from None
        except OSError as error:
            raise self._cut(f"broke off: {error}") from None

    def _cut(self, how: str) -> RequestError:
        name, error = self._kind
        return error(f"{name} {how}")


class BoundedReader(MessageBody):
    """A body with a `Content-Length`; a message without a body has a body of 0 bytes."""

    # MSG_WAITALL if nobody waits for the first bytes of the body: that saves system calls
    receive_flags = 0

    def __init__(self, source: ConnectionInput, size: int, kind: BodyKind = OF_REQUEST) -> None:
        super().__init__(source, kind)
        self.size = size
        self._left = size  # bytes of the body, or of the current chunk, that are still to be read
        self.is_at_end = not size

    def receive(self, buffer: Any) -> int:
        """Read some of the bytes that are left."""
        if not self._left:
            return 0
        view = memoryview(buffer)[:self._left]
        count: int = self._call(self._source.readinto, view, self.receive_flags)
        if not count:
            raise self._cut("ended early" if self.size is None
                            else f"ended {self._left} bytes early")
        self._left -= count
        self.is_at_end = self._left == 0 and self.size is not None
        return count

    def readall(self) -> bytes:
        """Read the rest; take a small body, which came with its head, in one piece."""
        if self._source.ahead < self._left or self._left != self.size:
            return super().readall()
        data = self._source.take(self._left)
        self.count, self._left, self.is_at_end = len(data), 0, True
        return data


class ChunkedReader(BoundedReader):
    """A body in chunks of known size (RFC 9112, 7.1); only the last chunk makes it whole."""

    SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n\0]*)?\r\n")

    def __init__(self, source: ConnectionInput, kind: BodyKind = OF_REQUEST) -> None:
        super().__init__(source, 0, kind)
        self.size, self.is_at_end = None, False

    def receive(self, buffer: Any) -> int:
        """Read some bytes of a chunk."""
        if not self._left and not self.is_at_end:
            self._begin_chunk()
        return super().receive(buffer)

    def _begin_chunk(self) -> None:
        """Read a chunk's end and the next chunk's size; after the last, skip the trailers."""
        if self.count and self._readline() != b"\r\n":
            raise self._cut("is malformed: a chunk is longer than it said")
        match = self.SIZE_LINE.fullmatch(self._readline())
        if match is None:
            raise self._cut("is malformed: the size of a chunk")
        self._left = int(match[1], 16)
        if not self._left:
            for number, line in enumerate(iter(self._readline, b"\r\n")):
                if number >= HEAD_LIMIT_FIELDS or not FIELD_LINE.fullmatch(line):
                    raise self._cut("is malformed: its trailer fields")
            self.is_at_end = True

    def _readline(self) -> bytes:
        while True:
            end = self._source.find(b"\n", CHUNK_LINE_LIMIT_BYTES)
            if end >= 0:
                return self._source.take(end + 1)
            if self._source.ahead >= CHUNK_LINE_LIMIT_BYTES:
                raise self._cut("is malformed: a line is too long")
            self._source.send_invitation()
            if not self._call(self._source.fill):
                raise self._cut("ended early")


class ClosingReader(MessageBody):
    """A body that ends with its connection, so that no cut can be noticed."""

    def receive(self, buffer: Any) -> int:
        """Read some bytes."""
        count: int = self._call(self._source.readinto, buffer)
        self.is_at_end = not count
        return count


# == 6. Other nodes ==
# Requests to the pod's target, to other targets and to the next stage, and their answers. Runs on
# any thread of a worker; does not know ETLRequest.


def parse_etl_pipeline(pipeline_header: str) -> Tuple[str, str]:
    """Split a pipeline into its first URL and the rest.

    Both are "" if there is no pipeline. Raise InvalidPipelineError if an entry is empty.
    """
    first, comma, rest = map(str.strip, (pipeline_header or "").partition(","))
    if comma and not all(map(str.strip, pipeline_header.split(","))):
        # a class that uses the installed SDK catches the SDK's own error
        module = sys.modules.get("aistore.sdk.errors")
        error = getattr(module, "InvalidPipelineError", InvalidPipelineError)
        raise error("the pipeline has an empty entry")
    return first, rest


def is_final(url: str) -> bool:
    """Return whether a pipeline's entry is a final target: a stage's URL has no path."""
    return urlsplit(url).path not in ("", "/")


def compose_etl_direct_put_url(direct_put_url: str, host_target: str, obj_path: str,
                               etl_args: str = "") -> str:
    """Return the URL for the PUT of a result, which goes to an entry of the pipeline.

    The URL of a final target has the scheme of `host_target`, and its secret path before the path
    of the entry. The next stage is a pod: its URL has the scheme of the entry, and the object's
    path, which is given decoded.
    """
    entry, host = urlsplit(direct_put_url), urlsplit(host_target)
    query = entry.query
    if etl_args:
        others = [item for item in query.split("&")
                  if item and item.partition("=")[0] != QPARAM_ARGS]
        query = "&".join([*others, f"{QPARAM_ARGS}={quote(etl_args, safe='')}"])
    if is_final(direct_put_url):
        return urlunsplit((host.scheme, entry.netloc, host.path + entry.path, query, ""))
    path = quote("/" + obj_path.lstrip("/"), safe="/@", errors="surrogateescape")
    return urlunsplit((entry.scheme, entry.netloc, path, query, ""))


class Hop(NamedTuple):
    """The address of a node, by which connections are pooled."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Hop:
        """Return the node of a URL; raise ValueError if it is not a plain http(s) URL."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_web = parts.scheme in ("http", "https") and HOST.fullmatch(parts.netloc)
        if not is_web or not HOST_NAME.fullmatch(host):
            raise ValueError(f"{hide_credentials(url)!r} is not an http(s) URL without a password")
        return cls(parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80))


def percent_encode(text: str) -> str:
    """Percent-encode all characters but visible ASCII; leave escapes as they are.

    A character below U+0100 stands for one byte, as in raw paths; any other is encoded as UTF-8.
    """
    text = re.sub("[^\0-\xff]", lambda match: quote(match[0]), text)
    return re.sub("[^!-~]", lambda match: quote(match[0], encoding="latin-1"), text)


def path_of(url: str) -> str:
    """Return a URL's path and query, as a request line has them."""
    return percent_encode(urlunsplit(("", "", *urlsplit(url)[2:4], ""))) or "/"


class NodeRequest(NamedTuple):
    """A request to another node; an iterator as body is sent in chunks, then closed."""

    method: str
    hop: Hop
    path: str  # with the query; sent as it is
    headers: Mapping[str, str] = {}
    body: Union[bytes, Iterator[bytes], None] = None
    connect_seconds: float = CONNECT_SECONDS
    # how long the node may neither take nor send anything
    silence_seconds: float = HOP_SILENCE_SECONDS

    @property
    def is_repeatable(self) -> bool:
        """Whether the body can be sent a second time."""
        return self.body is None or isinstance(self.body, bytes)

    def encode(self, token: str) -> Iterator[Union[bytes, memoryview]]:
        """Yield the bytes to send; a small body comes with the head, for one packet."""
        host = f"[{self.hop.host}]" if ":" in self.hop.host else self.hop.host
        fields = {"Host": f"{host}:{self.hop.port}", "Accept-Encoding": "identity", **self.headers}
        if token:
            fields["Authorization"] = f"Bearer {token}"
        if isinstance(self.body, bytes):
            fields["Content-Length"] = str(len(self.body))
        elif self.body is not None:
            fields["Transfer-Encoding"] = "chunked"
        lines = [f"{name}: {value}" for name, value in fields.items()]
        lines = [f"{self.method} {self.path} HTTP/1.1", *lines, "", ""]
        head = "\r\n".join(lines).encode("latin-1")
        if self.is_repeatable:
            body = cast(bytes, self.body or b"")
            yield head + body[:READ_BYTES]
            if len(body) > READ_BYTES:  # an idle connection would keep an empty rest, and the body
                yield memoryview(body)[READ_BYTES:]
        else:
            with contextlib.closing(cast(Any, self.body)) as pieces:
                yield head
                for piece in filter(None, pieces):  # an empty chunk would end the body
                    yield b"%x\r\n%b\r\n" % (len(piece), piece)
                yield b"0\r\n\r\n"


class NodeAnswer(NamedTuple):
    """A node's whole answer, in place of a `requests.Response`, as classes use it."""

    status_code: int
    headers: Mapping[str, str]
    content: bytes
    url: str
    is_early: bool = False  # whether it came before the whole request was sent


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Make the TLS context for AIStore's nodes.

    Raise ConfigError if a file of the settings cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=settings.client_ca or None)
        if settings.client_cert:
            context.load_cert_chain(settings.client_cert, settings.client_key or None)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"AIS_CLIENT_CA, AIS_CRT or AIS_CRT_KEY cannot be used: {error}") from None
    if settings.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def parse_answer(data: bytes) -> Tuple[int, Fields]:
    """Return the status and the fields of a node's answer.

    `data` is the head, whose lines end in CRLF. Raise ConnectionError if it is malformed.
    """
    line, _, rest = data.partition(b"\r\n")
    match = STATUS_LINE.fullmatch(line)
    try:
        fields = Fields(parse_fields(rest.decode("latin-1")))
    except UnframedRequest as error:
        raise ConnectionError(f"its answer is malformed: {error}") from None
    is_framed = (fields.get("Transfer-Encoding", "chunked").lower() == "chunked"
                 and re.fullmatch("[0-9]{1,18}", fields.get("Content-Length", "0")))
    if match is None or not is_framed:
        raise ConnectionError("its answer is malformed")
    if match[1] == b"0":  # RFC 9112, 9.3: connections of HTTP/1.0 end by default
        fields.setdefault("connection", "close")
    return int(match[2]), fields


def body_of_answer(status: int, fields: Fields, source: ConnectionInput) -> MessageBody:
    """Return the reader of an answer's body (RFC 9112, 6.3)."""
    if status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        return BoundedReader(source, 0, OF_NODE)
    if "Transfer-Encoding" in fields:
        return ChunkedReader(source, OF_NODE)
    if "Content-Length" in fields:
        return BoundedReader(source, int(fields["Content-Length"]), OF_NODE)
    return ClosingReader(source, OF_NODE)


def is_ready(connection: socket.socket, events: int, timeout_seconds: float = 0.0) -> bool:
    """Wait until a socket is ready for events of select.poll, or has ended.

    Return False after the time-out; by default, at once.
    """
    poller = select.poll()
    poller.register(connection, events)
    return bool(poller.poll(1000 * timeout_seconds))


class NodeConnection(ConnectionInput):
    """A connection to a node, which serves one request at a time.

    The rest of a request's body is sent while the answer is being read. A node may answer before it
    has taken the whole body: a stage that streams does, and so does a node that refuses the object
    and stops reading. If the whole body were sent before anything is read, both sides would block
    as soon as the buffers between them are full.

    The constructor raises OSError if the node cannot be reached, the methods if it is lost.
    """

    def __init__(self, request: NodeRequest, tls: Optional[ssl.SSLContext]) -> None:
        hop = self.hop = request.hop
        connection: socket.socket = socket.create_connection(
            (hop.host, hop.port), request.connect_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        # the errors of a socket that may not wait, but would have to
        self._not_ready: Tuple[Type[OSError], ...] = (BlockingIOError,)
        if tls is not None:
            # If the handshake fails, this closes the socket. An end without TLS's closing alert is
            # an error: the connection may have been cut.
            connection = tls.wrap_socket(
                connection, server_hostname=hop.host, suppress_ragged_eofs=False)
            self._not_ready += (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        super().__init__(connection)
        self.idle_since = 0.0
        self._silence_seconds = 0.0
        self._pieces: Any = (b"" for _ in ())  # of the request, those that are still to be taken
        self._rest = memoryview(b"")  # the rest of the piece that is being sent
        # whether something is left to send, and the node takes it; then the socket does not wait
        self._is_sending = False
        self.is_sent = False  # whether the whole request has been sent
        self.has_answered = False  # whether the first byte of an answer has come

    def is_usable(self) -> bool:
        """Return whether an idle connection can serve a request: not old, not ended."""
        is_fresh = time.monotonic() - self.idle_since < HOP_IDLE_SECONDS
        return is_fresh and not is_ready(self._connection, select.POLLIN)

    def begin(self, request: NodeRequest, token: str) -> None:
        """Send a request's head, with a small body; take over the rest of the body."""
        self._silence_seconds = request.silence_seconds
        self._pieces = request.encode(token)
        self._rest = memoryview(next(self._pieces))
        self.is_sent = self.has_answered = False
        self._set_sending(True)
        self._send_some()

    def fill(self, flags: int = 0) -> bool:
        """Receive once more, and send until something comes; return False at the end."""
        while self._is_sending:
            with contextlib.suppress(*self._not_ready):
                return super().fill()
            self._send_some()
        return super().fill(flags)

    def readinto(self, buffer: Any, flags: int = 0) -> int:
        """Read some bytes, 0 at the end of the connection."""
        if self._is_sending and not self.ahead and not self.fill():
            return 0
        return super().readinto(buffer, flags)

    def _send_some(self) -> None:
        """Send as much as the node takes now, or wait until it takes or sends something."""
        try:
            sent = self._connection.send(self._rest[:WRITE_BYTES])
        except self._not_ready:
            events = select.POLLIN | select.POLLOUT
            if not is_ready(self._connection, events, self._silence_seconds):
                raise TimeoutError(f"took nothing for {self._silence_seconds:.0f} s") from None
        except ConnectionError:  # the node has hung up, but it may have answered before
            self._set_sending(False)
        else:
            self._rest = self._rest[sent:] or memoryview(next(self._pieces, b""))
            self.is_sent = not self._rest
            if self.is_sent:
                self._set_sending(False)

    def read_head(self) -> Tuple[int, Fields]:
        """Return the answer's status and fields; raise ConnectionError if they are not whole."""
        while True:
            end = self.find(b"\r\n\r\n", HEAD_LIMIT_BYTES)
            if end >= 0:
                status, fields = parse_answer(self.take(end + 4)[:-2])
                if status >= 200:  # a 1xx, as "100 Continue", comes before the answer
                    return status, fields
            elif self.ahead >= HEAD_LIMIT_BYTES:
                raise ConnectionError("the head of its answer is too long")
            elif not self.fill():
                raise ConnectionError("it ended the connection")
            self.has_answered = True

    def run_out(self) -> None:
        """Take the rest of the body without sending it, so that its failure is raised."""
        self._set_sending(False)
        collections.deque(self._pieces, 0)

    def stop(self) -> None:
        """Send no more of the request's body, and close the body."""
        self._set_sending(False)
        self._pieces.close()

    def close(self) -> None:
        """Close the connection and the body; no node takes a body without its end for whole."""
        try:
            self.stop()
        finally:
            self._connection.close()

    def _set_sending(self, is_sending: bool) -> None:
        self._is_sending = is_sending
        self._connection.settimeout(0 if is_sending else self._silence_seconds)


class NodeBody(BodyStream):
    """Another node's answer, of which the body is to be read.

    The caller of `ConnectionPool.open` closes it. If its connection can serve another request then,
    `release` gets the connection; otherwise the connection is closed.
    """

    def __init__(self, connection: NodeConnection, status: int, headers: Fields,
                 release: Callable[[NodeConnection], None]) -> None:
        super().__init__()
        self.status = status
        self.headers = headers
        self.is_early = not connection.is_sent  # whether it came before the request was sent whole
        self._connection = connection
        self._body = body_of_answer(status, headers, connection)
        self._release = release
        self.size = self._body.size
        self.can_be_checked = not isinstance(self._body, ClosingReader)  # whether a cut is noticed

    def receive(self, buffer: Any) -> int:
        """Read some bytes; raise NodeBodyLost if the answer is cut short.

        At the end of the answer, the rest of the request's body is taken without being sent. If
        that fails, so does the exchange, even if the node wanted no more of the body.
        """
        count = self._body.readinto(buffer)
        if self._body.is_at_end:
            self._connection.run_out()
        return count

    def read_text(self) -> bytes:
        """Read a text, up to a limit; if it is the text of an error, it may be cut short."""
        text = b""
        try:
            while piece := self.read(ERROR_TEXT_LIMIT_BYTES - len(text)):
                text += piece
        except NodeBodyLost:
            if self.status < 400:
                raise
        return text

    def close(self) -> None:
        """Release the connection if both bodies have come to their ends; else close it."""
        if self.closed:
            return
        super().close()
        connection = self._connection
        if self._body.is_at_end and connection.is_sent and not connection.ahead:
            connection.idle_since = time.monotonic()
            self._release(connection)
        else:
            connection.close()


class ConnectionPool:
    """Connections to other nodes, kept by hop while they are idle; for any thread.

    The worker owns the pool. A connection belongs to one request until the answer has been read to
    its end; then the pool keeps it for `HOP_IDLE_SECONDS`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # made when first needed: loading the certificate authorities takes a while
        self._tls: Optional[ssl.SSLContext] = None
        self._lock = threading.Lock()
        self._idle: Dict[Hop, List[NodeConnection]] = collections.defaultdict(list)

    def open(self, request: NodeRequest) -> NodeBody:
        """Send a request; return the answer with its body unread. The caller closes it.

        A node may close an idle connection while the request is on its way. If an idle connection
        ends before the first byte of an answer, the request is therefore sent once more, on a new
        connection; if its body can be sent only once, no idle connection is used. Raise OSError if
        the node cannot be reached or is lost.
        """
        idle = self._take_idle(request.hop) if request.is_repeatable else None
        if idle is not None:
            try:
                return self._exchange(idle, request)
            except ConnectionError:
                if idle.has_answered:
                    raise
        is_tls = request.hop.scheme == "https"
        if is_tls and self._tls is None:
            self._tls = tls_context(self._settings)
        return self._exchange(NodeConnection(request, self._tls if is_tls else None), request)

    def _take_idle(self, hop: Hop) -> Optional[NodeConnection]:
        """Take the connection that was used last, if usable; close those that are not."""
        while True:
            with self._lock:
                idle = self._idle.get(hop)
                connection = idle.pop() if idle else None
            if connection is None or connection.is_usable():
                return connection
            connection.close()

    def _exchange(self, connection: NodeConnection, request: NodeRequest) -> NodeBody:
        """Send a request and read the answer's head; close the connection if that fails."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(connection.close)
            connection.begin(request, self._settings.token)
            status, fields = connection.read_head()
            if status >= 300:  # the node does not want the rest of the request
                connection.stop()
            on_failure.pop_all()
        # a request that cannot be repeated opens a new connection: kept ones would pile up
        can_stay = request.is_repeatable and "close" not in fields.get("Connection", "").lower()
        release = self._keep if can_stay else NodeConnection.close
        return NodeBody(connection, status, fields, release)

    def _keep(self, connection: NodeConnection) -> None:
        with self._lock:
            self._idle[connection.hop].append(connection)

    def close_idle(self) -> None:
        """Close the connections that have been idle for too long, or that the node has ended."""
        with self._lock:  # or a request would open a connection while one is looked at here
            idle, self._idle = self._idle, collections.defaultdict(list)
            for connection in itertools.chain(*idle.values()):
                if connection.is_usable():
                    self._idle[connection.hop].append(connection)
                else:
                    connection.close()


# == 7. The ETL class contract ==
# The classes that users subclass: the SDK's, with their names, attributes and methods, but without
# its servers (aistore/sdk/etl/webserver of SDK 1.24 and 2.0). Each worker makes an instance after
# the fork.

# A worker's report to the supervisor is a line: one of these bytes, and a text for some of them.
REPORT_READY = b"R"  # the worker can serve
REPORT_BEGUN = b"B"  # its first request has begun
REPORT_ANSWERED = b"A"  # its first request is answered
REPORT_OPENED = b"O"  # a WebSocket connection is open
REPORT_CLOSED = b"C"  # a WebSocket connection is closed
REPORT_BROKEN = b"X"  # a failed object has closed a WebSocket connection; text: the reason
REPORT_FAILED = b"F"  # the start has failed; text: the reason in JSON, from `report_failure`


# The frameworks that a class may need, their modules, and the requirements for these, which are
# those of setup.cfg's extras. A class imports the first module; the others serve its application.
FRAMEWORKS: Mapping[str, Mapping[str, str]] = {
    "fastapi": {"fastapi": "fastapi>=0.110", "uvicorn": "uvicorn[standard]>=0.29",
                "websockets": "uvicorn[standard]>=0.29"},
    "flask": {"flask": "flask>=3.0"},
}


def modules_of(framework: str, serves: bool) -> List[Tuple[str, str]]:
    """Return modules and requirements: the class's, and if the framework `serves`, the others."""
    return list(FRAMEWORKS[framework].items())[:None if serves else 1]


class Share:
    """One worker's number of connections, in memory that all workers of a pod share.

    The kernel wakes all workers for a new connection, and the one that is already running is the
    quickest to accept it. So a worker with more connections than another waits for a moment.
    """

    def __init__(self, counts: memoryview, slot: int) -> None:
        self._counts = counts
        self._slot = slot
        self.leave()

    @classmethod
    def allot(cls, workers: int) -> List[Share]:
        """Make the shares of workers that are still to be forked."""
        counts = memoryview(mmap.mmap(-1, 4 * workers)).cast("I")
        return [cls(counts, slot) for slot in range(workers)]

    def publish(self, connections: int) -> None:
        """Tell the other workers how many connections this one has."""
        self._counts[self._slot] = connections

    def leave(self) -> None:
        """Tell the other workers that this one is absent: it has more connections than any."""
        self.publish(0xFFFFFFFF)

    @property
    def excess(self) -> int:
        """The number of connections beyond those of the worker with the fewest."""
        return self._counts[self._slot] - min(self._counts)


class Current:
    """The state of this process, set before an instance of an ETL class is made.

    The constructors of ETL classes have the SDK's parameters, so they find the rest here.
    """

    settings: Optional[Settings] = None
    pool: Optional[ConnectionPool] = None
    listener: Optional[socket.socket] = None  # in a worker: the socket that all workers share
    reports: Optional[int] = None  # in a worker: the socket to the supervisor; in a trial, a file
    share: Optional[Share] = None  # in a worker: its number of connections, for the others to see
    # whether a file is being imported for its class; instances that the file makes are not served
    is_loading = False
    began = 0.0  # when this program began, in seconds since the system's start
    output = -1  # a copy of the log's descriptor, which the class cannot close; -1 without a log
    last_line = ""  # the last line of the log, with the reason of a failed start


def report(message: bytes) -> None:
    """Send a line to the supervisor, if there is one; cut a long line."""
    if Current.reports is not None:
        with contextlib.suppress(BrokenPipeError):  # without a supervisor, this worker ends soon
            # the socket takes a line this short as a whole, so lines of several threads do not mix
            os.write(Current.reports, message[:2000] + b"\n")


def how_to_get(package: str) -> str:
    """Return how the user gets a package: in a pod by PACKAGES, on a laptop by pip."""
    is_laptop = Current.settings is not None and not Current.settings.is_pod
    return pip_command([package]) if is_laptop else f"add {package} to PACKAGES"


def framework_of(cls: type) -> str:
    """Return the framework of an ETL class's base, or "" if it has none."""
    if issubclass(cls, FastAPIServer):
        return "fastapi"
    return "flask" if issubclass(cls, FlaskServer) else ""


# Keys in the `vars` of an instance, which cannot be attributes of the class: the framework's
# application, and the function that answers requests for objects.
APP, ANSWER = "ais_runtime_min.app", "ais_runtime_min.answer"


def require_framework(server: Any) -> None:
    """Raise FrameworkNeeded in a worker whose class is not served by its framework."""
    is_served = Current.reports is not None and not Current.is_loading
    if is_served and not (Current.settings or Settings()).server:
        raise FrameworkNeeded(framework_of(type(server)), serves=True)


def app_of(server: Any) -> Any:
    """Return an instance's application, which is made and prepared at the first use."""
    kept, name = vars(server), framework_of(type(server))
    if kept.get(APP) is None:
        require_framework(server)
        framework = importlib.import_module(name)
        if name == "fastapi":
            kept[APP] = framework.FastAPI()  # before the hook, which uses `self.app`
            server._setup_app()
        else:
            kept[APP] = framework.Flask(__name__)
            server._register_routes()
    return kept[APP]


class ETLServer(ABC):
    """The base of every ETL class.

    Methods to override:  transform(data, path, etl_args), or transform_stream(reader, path,
                          etl_args); get_mime_type(); start(), _build_session(), client_put(),
                          handle_direct_put_response()
    Methods for callers:  start(); sanitize_fqn, close_reader, iter_and_close,
                          make_direct_put_headers
    Attributes:           host_target, direct_put, direct_fqn, direct_put_retries, token, session,
                          logger, use_streaming
    """

    def __init__(self) -> None:
        settings = Current.settings or Settings.from_env(required=("AIS_TARGET_URL",))
        Current.settings = settings
        self.host_target = settings.target
        self.direct_put = settings.direct_put
        self.direct_fqn = settings.direct_fqn
        self.direct_put_retries = settings.direct_put_retries
        self.token: Optional[str] = settings.token or None
        # this has no effect where logging is configured already, as in a pod
        logging.basicConfig(level=settings.log_level, handlers=[stdout_handler(settings)])
        self.logger = logging.getLogger(type(self).__name__)
        self.logger.setLevel(settings.log_level)
        self.use_streaming = streams(type(self))

    @functools.cached_property
    def session(self) -> Any:
        """A `requests.Session` for the class's own requests, made when first needed."""
        return self._build_session()

    def _build_session(self) -> Any:
        """Make the session, with the certificates and the token of the settings."""
        settings = Current.settings or Settings()
        try:
            import requests
        except ImportError:
            raise ImportError(f"self.session needs the package requests: "
                              f"{how_to_get('requests')}") from None
        session = requests.Session()
        session.verify = False if settings.skip_verify else settings.client_ca or True
        if settings.client_cert:
            session.cert = (settings.client_cert, settings.client_key or settings.client_cert)
        if settings.token:
            session.headers["Authorization"] = f"Bearer {settings.token}"
        return session

    def transform(self, data: Union[bytes, str], path: str, etl_args: str) -> bytes:
        """Return the transformed object; `data` is its bytes, or its path by `ETL_DIRECT_FQN`."""
        raise NotImplementedError("override transform() or transform_stream()")

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        """Yield the transformed object in pieces; the reader ends where the object ends."""
        raise NotImplementedError("override transform() or transform_stream()")

    def get_mime_type(self) -> str:
        """Return the `Content-Type` of results."""
        return DEFAULT_MIME_TYPE

    @abstractmethod
    def start(self) -> None:
        """Serve until SIGTERM."""

    def client_put(self, url: str, data: bytes, headers: Dict[str, str],
                   timeout: Optional[float] = None) -> Any:
        """Put bytes to another node, and return its whole answer.

        `data` is an iterator of bytes where a class streams. `timeout` is in seconds: for
        connecting, and for each silence of the node. Raises OSError if the node is lost. If a class
        overrides this method, the override delivers all its outputs.
        """
        if Current.pool is None:
            Current.pool = ConnectionPool(Current.settings or Settings())
        body = bytes(data) if isinstance(data, (bytearray, memoryview)) else data
        request = NodeRequest(
            "PUT", Hop.of(url), path_of(url), headers, body, timeout or CONNECT_SECONDS,
            timeout or HOP_SILENCE_SECONDS)
        with Current.pool.open(request) as answer:
            return NodeAnswer(answer.status, answer.headers, answer.readall(), url,
                              answer.is_early)

    def handle_direct_put_response(self, resp: Any, data: bytes,
                                   data_length: int = -1) -> Tuple[int, bytes, int]:
        """Return the status and body for the client, and the number of delivered bytes."""
        if resp.status_code == HTTPStatus.NO_CONTENT:
            return HTTPStatus.NO_CONTENT, b"", int(resp.headers.get(HEADER_DIRECT_PUT_LENGTH, "0"))
        if resp.status_code == HTTPStatus.OK and not resp.content:
            return HTTPStatus.NO_CONTENT, b"", data_length if data_length >= 0 else len(data)
        return resp.status_code, resp.content, 0

    def sanitize_fqn(self, fqn: str) -> str:
        """Return the path that a query parameter holds: unquoted, absolute, without `..`."""
        return os.path.normpath("/" + os.fsdecode(unquote_to_bytes(fqn)).lstrip("/"))

    @staticmethod
    def close_reader(reader: Any) -> None:
        """Close the reader; ignore all errors, also that it cannot be closed."""
        attempt(lambda: reader.close())

    @staticmethod
    def iter_and_close(output_iter: Iterator[bytes], reader: Any) -> Iterator[bytes]:
        """Yield all items of an iterator, then close the reader that they come from."""
        try:
            yield from output_iter
        finally:
            ETLServer.close_reader(reader)

    @staticmethod
    def make_direct_put_headers(direct_put_length: int) -> Dict[str, str]:
        """Return the header that tells how many bytes were delivered; none for 0."""
        return {HEADER_DIRECT_PUT_LENGTH: str(direct_put_length)} if direct_put_length else {}


def streams(cls: Type[ETLServer]) -> bool:
    """Return whether a class overrides transform_stream() but not transform().

    Raise TypeError if the class overrides neither.
    """
    if cls.transform is not ETLServer.transform:
        return False
    if cls.transform_stream is not ETLServer.transform_stream:
        return True
    raise TypeError(f"{cls.__name__} must override either transform() or transform_stream()")


class ListeningServer(ETLServer):
    """The common part of the SDK's three bases: an address, and `start`.

    Port 8000, the SDK's default, stands for the variable `PORT`. A class that passes another port
    gets that port.
    """

    def __init__(self, host: str = "0.0.0.0", port: int = 8000) -> None:
        super().__init__()
        settings = Current.settings or Settings()
        self.host = host
        self.port = settings.port if port == 8000 else port
        if settings.server and settings.server == framework_of(type(self)):
            app_of(self)

    def start(self) -> None:
        """Serve until SIGTERM."""
        serve_instance(self)


class HTTPMultiThreadedServer(ListeningServer):
    """The base of classes that many threads may call at once.

    `path` is the path of the request as it came, not decoded.
    """

    # the SDK's name, for payloads that refer to it; overriding it is refused
    RequestHandler = http.server.BaseHTTPRequestHandler


class LateApp:
    """A stand-in for an instance's application, which is made when an attribute is read.

    Files that were written for the SDK end with `server = Mine()` and `app = server.app`. The
    command `serve` serves an instance of its own, and so needs no framework for these lines.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        return getattr(app_of(self._server), name)


class FrameworkServer(ListeningServer):
    """The base of FastAPIServer and FlaskServer; few classes need the framework.

    Transforms run one at a time, on the main thread, unless `NUM_THREADS` is more than 1. The
    framework serves a class that overrides a hook, or that uses `self.app` in its constructor. This
    use raises FrameworkNeeded; the pod then starts again with the framework.
    """

    @property
    def app(self) -> Any:
        """The framework's application, made at the first use."""
        if vars(self).get(APP) is None and Current.is_loading:
            return LateApp(self)
        return app_of(self)

    @app.setter
    def app(self, app: Any) -> None:
        """Use an application that the class has made."""
        require_framework(self)
        vars(self)[APP] = app


class FastAPIServer(FrameworkServer):
    """The SDK's FastAPI base; `path` is decoded and has no slash at its beginning.

    Hooks: _setup_app(), called when the application is made; startup_event() and shutdown_event();
    _handle_request(), which answers requests for objects. If a class overrides a hook, uvicorn
    serves its application.
    """

    def _setup_app(self) -> None:
        """Prepare the application; routes for objects are added after the class's own."""
        self.app.state.etl_server = self
        self.app.router.on_startup.append(self.startup_event)
        self.app.router.on_shutdown.append(self.shutdown_event)

    async def startup_event(self) -> None:
        """Do nothing: a hook, called before the first request."""

    async def shutdown_event(self) -> None:
        """Do nothing: a hook, called after the last request."""

    async def _handle_request(self, path: str, request: Any, is_get: bool) -> Any:
        """Answer a request for an object with a Starlette response."""
        return await vars(self)[ANSWER](path, request)


class FlaskServer(FrameworkServer):
    """The SDK's Flask base; `path` is decoded and has no slash at its beginning.

    Hooks: _register_routes(), called when the application is made; _health(); _handle_request(),
    which answers requests for objects. If a class overrides a hook, its application is served.
    """

    def _register_routes(self) -> None:
        """Do nothing: the routes for objects are added when the application is served."""

    def _health(self) -> Any:
        """Answer a health probe."""
        import flask

        return flask.Response(b"Running", content_type="text/plain")

    def _handle_request(self, path: str) -> Any:
        """Answer Flask's current request, which is for an object, with a Flask response."""
        return vars(self)[ANSWER](path)


class CountingIterator:
    """An iterator over pieces, whose lengths add up in `bytes_sent` as they pass."""

    def __init__(self, inner: Iterator[bytes]) -> None:
        self._inner = inner
        self.bytes_sent = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._inner:
            self.bytes_sent += len(piece)
            yield piece


class ThreadedHTTPServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """The SDK's server, for payloads that refer to it; this runtime does not use it."""

    def __init__(self, server_address: Tuple[str, int], handler_class: Any,
                 etl_server: ETLServer) -> None:
        super().__init__(server_address, handler_class)
        self.etl_server = etl_server


# == 8. Loading the class ==
# Turns the payload's text into a class that can be served. A pickle refers to modules of the SDK,
# which the image does not have; an import finder makes these modules from the names of this file.

FAILED = "Failed to deserialize ETL class: ETL_CLASS_PAYLOAD"  # AIStore's tests expect this text
MAKE_ANEW = "make it anew, by the SDK's init_class() or serialize_class()"
CONSTANTS = {  # those of aistore.sdk.const that the SDK's own servers use
    "HEADER_NODE_URL": HEADER_NODE_URL, "HEADER_DIRECT_PUT_LENGTH": HEADER_DIRECT_PUT_LENGTH,
    "HEADER_ETL_RETRY_REASON": HEADER_RETRY_REASON,
    "ETL_RETRY_REASON_DIRECT_PUT_TRANSIENT": RETRY_REASON_TRANSIENT,
    "HEADER_CONTENT_LENGTH": "Content-Length", "HEADER_CONTENT_TYPE": "Content-Type",
    "HEADER_TRANSFER_ENCODING": "Transfer-Encoding", "HEADER_AUTHORIZATION": "Authorization",
    "QPARAM_ETL_NAME": "etl_name", "QPARAM_ETL_ARGS": QPARAM_ARGS, "QPARAM_ETL_FQN": QPARAM_FQN,
    "QPARAM_ETL_PIPELINE": "etl_pipeline",
    "ETL_WS_PIPELINE": "pipeline", "ETL_WS_FQN": "fqn", "ETL_WS_PATH": "path",
    "STATUS_OK": 200, "STATUS_NO_CONTENT": 204, "STATUS_INTERNAL_SERVER_ERROR": 500,
    "STATUS_BAD_GATEWAY": 502, "STATUS_SERVICE_UNAVAILABLE": 503,
    "AIS_AUTHN_TOKEN": "AIS_AUTHN_TOKEN", "AIS_DIRECT_PUT_RETRIES": "AIS_DIRECT_PUT_RETRIES",
    "AIS_DIRECT_PUT_CHUNK_SIZE": "AIS_DIRECT_PUT_CHUNK_SIZE",
    "UTF_ENCODING": "utf-8", "MIB": 1 << 20,
}

# Import name: PyPI name, as it goes into PACKAGES, where that is certain; for other names, error
# texts express doubt. The first ones are in the default image, which installs aistore[etl].
PYPI_NAMES = {
    "requests": "requests", "httpx": "httpx", "pydantic": "pydantic", "xxhash": "xxhash",
    "yaml": "PyYAML", "fastapi": "fastapi", "starlette": "fastapi", "flask": "flask",
    "werkzeug": "flask", "aistore": "aistore", "cloudpickle": "cloudpickle",
    "PIL": "Pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn",
    "skimage": "scikit-image", "bs4": "beautifulsoup4", "dateutil": "python-dateutil",
    "Crypto": "pycryptodome", "google": "protobuf", "distutils": "setuptools",
    "pkg_resources": "setuptools"}

# Members of the SDK's servers that this runtime does not use: an override would have no effect.
DELIVERY_INTERNALS = (
    "_direct_put", "_direct_put_stream", "_direct_put_stream_with_retry", "_direct_put_with_retry",
    "_get_fqn_content", "_get_stream_reader", "_handle_request_buffered",
    "_handle_request_streaming")
INTERNALS: Dict[Type[ETLServer], Tuple[str, ...]] = {
    HTTPMultiThreadedServer: ("RequestHandler",),
    FastAPIServer: DELIVERY_INTERNALS + (
        "_build_response", "_get_network_content", "_handle_ws_message", "_iter_chunks",
        "_open_sync_get_stream"),
    FlaskServer: DELIVERY_INTERNALS + ("_handle_get", "_handle_put"),
}
# Methods that are called only if the framework serves the class: a class that overrides one gets
# the framework.
HOOKS: Dict[Type[ETLServer], Tuple[str, ...]] = {
    FastAPIServer: ("_setup_app", "startup_event", "shutdown_event", "_handle_request"),
    FlaskServer: ("_register_routes", "_health", "_handle_request"),
}


def decode_payload(settings: Settings) -> bytes:
    """Return the pickle in the payload; raise PayloadError if the payload is not base64."""
    import base64

    text = settings.payload
    if settings.payload_file:
        with open(settings.payload_file, encoding="utf-8", errors="replace") as file:
            text = file.read()
    try:
        # editors and YAML add white space
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise PayloadError(f"{FAILED} is not base64, or was cut: {error}; {MAKE_ANEW}") from None


def serialize_class(cls: Type[ETLServer], encoding: str = "utf-8") -> str:
    """Return the payload of a class, as the SDK's function of the same name does."""
    import base64

    import cloudpickle

    if not isinstance(cls, type) or not issubclass(cls, ETLServer):
        raise TypeError(f"{cls!r} is not a subclass of ETLServer")
    return base64.b64encode(cloudpickle.dumps(cls)).decode(encoding)


def is_here(package: str) -> bool:
    """Return whether a package is installed.

    A folder named `aistore` that has no `__init__.py` does not count.
    """
    spec = importlib.machinery.PathFinder.find_spec(package)
    return spec is not None and (package != "aistore" or spec.origin is not None)


WEBSERVER = "aistore.sdk.etl.webserver"
# the modules of the SDK that payloads can refer to, and the names in each
SDK_MODULES: Dict[str, Dict[str, Any]] = {
    "aistore": {}, "aistore.sdk": {},
    "aistore.sdk.const": CONSTANTS,
    "aistore.sdk.errors": {"InvalidPipelineError": InvalidPipelineError,
                           "ETLDirectPutTransientError": ETLDirectPutTransientError},
    "aistore.sdk.utils": {"parse_bool": parse_bool},
    "aistore.sdk.etl": {"serialize_class": serialize_class},
    WEBSERVER: {"serialize_class": serialize_class},
    WEBSERVER + ".base_etl_server": {
        "ETLServer": ETLServer, "CountingIterator": CountingIterator,
        "RETRY_BACKOFF_BASE": 2.0, "RETRY_BACKOFF_MAX": 30.0,
        "SYNC_DIRECT_PUT_TRANSIENT_ERRORS": (ConnectionError, http.client.HTTPException)},
    WEBSERVER + ".http_multi_threaded_server": {
        "HTTPMultiThreadedServer": HTTPMultiThreadedServer,
        "ThreadedHTTPServer": ThreadedHTTPServer},
    WEBSERVER + ".fastapi_server": {"FastAPIServer": FastAPIServer},
    WEBSERVER + ".flask_server": {"FlaskServer": FlaskServer},
    WEBSERVER + ".utils": {
        "serialize_class": serialize_class, "parse_etl_pipeline": parse_etl_pipeline,
        "compose_etl_direct_put_url": compose_etl_direct_put_url},
}


class SDKNames:
    """An import finder and loader that provides the SDK's modules.

    The web-server modules always come from this file: the SDK's own need requests, FastAPI, httpx
    and Flask. The other modules come from the SDK if it is installed.
    """

    def find_spec(self, name: str, path: Any = None,
                  target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        """Return the spec of a module that this file provides, or None."""
        if name in SDK_MODULES and (name.startswith(WEBSERVER) or not is_here("aistore")):
            return importlib.machinery.ModuleSpec(name, cast(Any, self), is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Return None, so that the import system makes an ordinary module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill a module with its names; looking up any other name tells how to get the SDK."""
        def missing(name: str) -> NoReturn:
            raise AttributeError(f"{module.__name__}.{name} is not here: {how_to_get('aistore')}")

        vars(module).update(SDK_MODULES[module.__name__], __getattr__=missing)


def install_sdk_names() -> None:
    """Put the finder before all others, unless it is there already."""
    if not any(isinstance(finder, SDKNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, cast(Any, SDKNames()))


def leave_late_modules() -> None:
    """Remove the stand-ins of late modules: from now on an import loads the module itself."""
    for name, stand_in in late_modules.items():
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
    late_modules.clear()


def is_foreign_wordcode(code: types.CodeType) -> bool:
    """Return whether Python 3.9 compiled code for this 3.10, or the other way round.

    The line table tells them apart. In 3.10 its ranges cover the bytecode to the end (PEP 626), and
    a range is empty only as one of several steps to a line that is far away. In 3.9 the ranges
    reach the end only if the last code is unreachable, and then one of them is empty.
    """
    is_310 = sys.version_info >= (3, 10)
    table: bytes = getattr(code, "co_linetable" if is_310 else "co_lnotab")
    sizes, steps = table[::2], table[1::2]
    has_gap = any(not size and step not in (127, 129) for size, step in zip(sizes, steps))
    return (sum(sizes) == len(code.co_code) and not has_gap) != is_310


def is_foreign_adaptive_code(code_bytes: bytes) -> bool:
    """Return whether another Python compiled this bytecode; this Python is 3.11 or later.

    Bytecode of this Python consists of known instructions, each followed by its own number of empty
    cache entries, and has at least one RESUME.
    """
    import opcode

    # a private table: a list by number up to 3.12, a mapping by name from 3.13 on
    entries: Any = getattr(opcode, "_inline_cache_entries")
    offset, resumed = 0, False
    while offset < len(code_bytes):
        number = code_bytes[offset]
        name = opcode.opname[number]
        # no compiler emits these
        if name.startswith(("<", "CACHE", "ENTER_EXECUTOR", "INSTRUMENTED_")):
            return True
        resumed = resumed or name == "RESUME"
        caches = entries.get(name, 0) if isinstance(entries, Mapping) else entries[number]
        end = offset + 2 + 2 * caches
        if code_bytes[offset + 2:end] != bytes(2 * caches):
            return True
        offset = end
    return not resumed


def checked_code(*args: Any) -> types.CodeType:
    """Make a code object; raise PayloadError if another Python compiled it.

    From 3.11 on the bytes are checked before the code object is made: to make a code object of
    foreign bytes, or to read its bytes back, can crash the interpreter or write beyond their end.
    A later Python may lack the tables that the check uses, or may have changed them, so that even
    the code of this function looks foreign. Then all code passes.
    """
    is_foreign = False
    if sys.version_info >= (3, 11):
        with contextlib.suppress(AttributeError, LookupError, TypeError):
            own = checked_code.__code__.co_code
            is_foreign = is_foreign_adaptive_code(args[6]) and not is_foreign_adaptive_code(own)
    try:
        code = None if is_foreign else types.CodeType(*args)
    except (TypeError, ValueError):  # code of 3.8 to 3.10 has 16 arguments, of later versions 18
        code = None
    if code is None or (sys.version_info < (3, 11) and is_foreign_wordcode(code)):
        version = ".".join(map(str, sys.version_info[:2]))
        raise PayloadError(
            f"{FAILED} was pickled by another Python than this {version}, whose bytecode differs: "
            f"use the image of the Python that pickled it")
    return code


def package_of(error: Optional[BaseException]) -> str:
    """Return the name of the package whose absence made an import fail, or ""."""
    name = str(error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    of_python = getattr(sys, "stdlib_module_names", sys.builtin_module_names)  # from 3.10 on
    return "" if not name or name in of_python or is_here(name) else name


def raise_framework_needed(error: Optional[BaseException]) -> None:
    """Raise FrameworkNeeded if an import failed because a framework is missing."""
    framework = PYPI_NAMES.get(package_of(error), "")
    if framework in FRAMEWORKS:
        raise FrameworkNeeded(framework, serves=False) from None


class PayloadUnpickler(pickle.Unpickler):
    """Unpickle a class; raise PayloadError before code of another Python runs.

    A pickle does not tell which Python made it. Code of another minor version may load without an
    error, and then crash the interpreter or compute nonsense. So the unpickler checks each code
    object when it makes it.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return a global of a module; `_make_code` replaces the type of code objects."""
        try:
            found = super().find_class(module, name)
        except AttributeError:
            package = module.partition(".")[0]
            if package not in ("aistore", "cloudpickle"):
                raise
            raise PackageError(
                f"{FAILED} needs {module}.{name}, which this image does not have: add {package} "
                f"to PACKAGES, in the version that was there when the class was pickled") from None
        # in a pickle, the type of code objects is a call: _builtin_type("CodeType")
        if (module, name) == ("cloudpickle.cloudpickle", "_builtin_type"):
            return lambda kind: self._make_code if kind == "CodeType" else found(kind)
        return found

    def _make_code(self, *args: Any) -> types.CodeType:
        """Make a code object; raise FrameworkNeeded if it imports a missing framework."""
        code = checked_code(*args)
        # the names of modules, and of attributes, which may be called so too
        if any(PYPI_NAMES.get(name.partition(".")[0]) in FRAMEWORKS for name in code.co_names):
            import dis

            for each in dis.get_instructions(code):
                if each.opname == "IMPORT_NAME":
                    raise_framework_needed(ImportError(name=each.argval))
        return code


def describe_of_user(error: BaseException, has_type: bool = False) -> str:
    """Describe an exception of the user's code, and tell how to get a package that is missing.

    The description has the exception's type if `has_type`, or if the text alone says too little.
    """
    kind, name, text = type(error).__name__, package_of(error), describe(error)
    # the text of a KeyError is only the key
    says_much = re.search(r"[^\W\d_]{2}", text) and not isinstance(error, KeyError)
    if text != kind and (has_type or not says_much):
        text = f"{kind}: {text}"
    if not name:
        return text
    doubt = "" if name in PYPI_NAMES else ", if it has that name on PyPI and is not your own"
    return f"{text}: {how_to_get(PYPI_NAMES.get(name, name))}{doubt}"


def overridden(cls: Type[ETLServer], table: Mapping[Type[ETLServer], Sequence[str]]) -> List[str]:
    """Return the names that a class overrides, of those that a table lists for its bases."""
    return [name for base, names in table.items() if issubclass(cls, base) for name in names
            if getattr(cls, name, None) is not getattr(base, name, None)]


def server_for(cls: Type[ETLServer]) -> str:
    """Return the framework that must serve a class because it overrides a hook, or "".

    A constructor that uses `self.app` needs the framework as well: this shows when it runs.
    """
    return framework_of(cls) if overridden(cls, HOOKS) else ""


def checked_class(cls: Any, failed: str = FAILED) -> Type[ETLServer]:
    """Return a class if it can be served and all its overrides have an effect.

    Raises PayloadError, whose text begins with `failed`, if it is no ETL class with a transform,
    and ClassError for other mistakes. The supervisor calls this before it forks workers, so that a
    mistake is reported once.
    """
    if not isinstance(cls, type) or not issubclass(cls, ETLServer):
        what = cls.__name__ if isinstance(cls, type) else f"no class but {type(cls).__name__!r}"
        raise PayloadError(f"{failed} is {what}, and not a subclass of ETLServer: derive it from "
                           f"HTTPMultiThreadedServer, FastAPIServer or FlaskServer of "
                           f"aistore.sdk.etl.webserver")
    try:
        streams(cls)
    except TypeError as error:
        raise PayloadError(f"{failed} cannot be served: {error}") from None
    ignored = overridden(cls, INTERNALS)
    if ignored:
        raise ClassError(
            f"{cls.__name__} overrides {', '.join(ignored)}, which the SDK's own server calls and "
            f"this runtime does not: override transform or transform_stream only")
    for name in ("transform", "transform_stream", "get_mime_type", "start", "sanitize_fqn",
                 "client_put", "handle_direct_put_response"):
        flags = getattr(getattr(getattr(cls, name), "__code__", None), "co_flags", 0)
        # CO_COROUTINE or CO_ASYNC_GENERATOR, as in inspect, or CO_GENERATOR
        if flags & (0x280 if name == "transform_stream" else 0x2A0):
            raise ClassError(f"{cls.__name__} has a {name}() that is async, or yields: it must be "
                             f"a plain function")
    return cls


def user_exc_info(error: BaseException) -> Any:
    """Return an exception's `exc_info` for a log record, or None.

    The traceback begins behind this file's frames; None if there are no others.
    """
    entry = error.__traceback__
    this_file = user_exc_info.__code__.co_filename  # __file__ can be the path of the bytecode
    while entry is not None and entry.tb_frame.f_code.co_filename == this_file:
        entry = entry.tb_next
    return (type(error), error, entry) if entry else None


def log_user_error(what: str, error: BaseException) -> None:
    """Log an exception of the user's code, with that code's part of the traceback."""
    logger.error("%s: %s", what, describe_of_user(error), exc_info=user_exc_info(error))


def with_story(failure: StartupError, what: str, error: BaseException) -> StartupError:
    """Attach to a failure the traceback of the user's exception that caused it."""
    told = (what, " ".join(describe_of_user(error).split()))
    record = logging.LogRecord(
        logger.name, logging.ERROR, "", 0, "%s: %s", told, user_exc_info(error))
    failure.story = logging.Formatter().format(record)
    return failure


def load_etl_class(settings: Settings,
                   unpickler: Type[PayloadUnpickler] = PayloadUnpickler) -> Type[ETLServer]:
    """Return the class of the payload; raise a StartupError that says what to do.

    Unpickling runs the payload as code. The payload comes from whoever may start pods, and is
    trusted as the image is.
    """
    pickled = decode_payload(settings)
    install_sdk_names()
    # before late modules are left: cloudpickle imports some of them and may never use them. If this
    # import fails, unpickling raises the same error.
    attempt(importlib.import_module, "cloudpickle")
    leave_late_modules()
    cls, error = attempt(unpickler(io.BytesIO(pickled)).load)
    if isinstance(error, StartupError):
        raise error
    raise_framework_needed(error)
    if isinstance(error, ModuleNotFoundError):
        # the pickle of a class by value calls functions of cloudpickle
        if b"cloudpickle" not in pickled:
            raise PayloadError(
                f"{FAILED} was pickled by reference to the module {error.name!r}, which is not "
                f"here: call cloudpickle.register_pickle_by_value(module) before, or define it in "
                f"__main__")
        own = "" if package_of(error) in PYPI_NAMES else (
            "; if it is a module of your own, call cloudpickle.register_pickle_by_value(module) "
            "before pickling")
        raise PackageError(
            f"{FAILED} needs the module {error.name!r}: {describe_of_user(error)}{own}")
    if error is not None:
        text = describe_of_user(error, has_type=True)
        if isinstance(error, (pickle.UnpicklingError, EOFError)):
            raise PayloadError(f"{FAILED} is no whole pickle: {text}; {MAKE_ANEW}")
        raise with_story(PayloadError(f"{FAILED} cannot be loaded: {text}"), "unpickling", error)
    return checked_class(cls)


# == 9. Stage 1, understanding ==
# Turns a request's method, raw target and pipeline header, or the JSON of a WebSocket message, into
# a frozen value; no I/O.

QUERIES_OF_ETL = tuple(f"?{name}=" for name in (QPARAM_FQN, QPARAM_ARGS, QPARAM_LATEST))
# the paths that name no object, and their methods
PATH_METHODS = {"/health": ("GET",), "/ws": ("GET",), "/download": ("POST",)}


def split_target(method: str, target: str) -> Tuple[str, str]:
    """Split a request target into path and query, both raw.

    AIStore writes the bucket and the object's name unescaped into the URL of a PUT, so the name may
    have question marks. The query of a PUT begins at the last question mark that one of AIStore's
    parameters follows; any other query begins at the first question mark. An absolute target (RFC
    9112, 3.2.2) loses its scheme and host.
    """
    if not target.startswith("/"):
        target = re.sub(r"^https?://[^/?#]*", "", target, flags=re.IGNORECASE)
    if "?" not in target:
        return target, ""
    ours = max(map(target.rfind, QUERIES_OF_ETL)) if method == "PUT" else -1
    mark = ours if ours >= 0 else target.find("?")
    return target[:mark], target[mark + 1:]


def decode_escapes(text: str, errors: str = "replace") -> str:
    """Decode the percent-escapes of a raw path, or of a query whose `+` are replaced."""
    if "%" not in text and text.isascii():
        return text
    return unquote_to_bytes(text.encode("latin-1")).decode("utf-8", errors)


def split_query(query: str) -> Tuple[Dict[str, str], str]:
    """Return a query's parameters, decoded, and the raw rest that is sent to the target.

    Of a repeated parameter the first value counts.
    """
    parameters: Dict[str, str] = {}
    rest = []
    for item in query.split("&") if query else ():
        name, _, value = item.replace("+", " ").partition("=")
        name = decode_escapes(name)
        parameters.setdefault(name, decode_escapes(value))
        if name not in (QPARAM_FQN, QPARAM_ARGS):
            rest.append(item)
    return parameters, "&".join(rest)


class ETLRequest(NamedTuple):
    """One request of AIStore. A raw text is not decoded: it has one character per byte."""

    method: str
    raw_path: str
    query: str = ""  # raw; part of the URL if the object is read from the target
    fqn: str = ""  # the escapes of the query are decoded, those of the path are not
    etl_args: str = ""  # decoded
    latest: bool = False
    pipeline: str = ""  # the Ais-Node-Url header: where the result goes
    original_url: str = ""  # decoded; the URL that a download fetches
    # decoded; the path of the object that a download makes, or that came over WebSocket
    object_to: str = ""

    @classmethod
    def parse(cls, method: str, target: str, pipeline: str = "") -> ETLRequest:
        """Parse a request; raise NotFound, BadRequest or a 405 if it has no meaning."""
        raw_path, query = split_target(method, target)
        if not raw_path.startswith("/") or not raw_path.strip("/"):
            raise NotFound(f"no object is named by {target!r}")
        methods = PATH_METHODS.get(raw_path, ("GET", "PUT"))
        if method not in methods:
            raise RequestError(f"{method} is not allowed for {raw_path}",
                               HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": ", ".join(methods)})
        parameters, rest = split_query(query)
        fqn = parameters.get(QPARAM_FQN, "").strip()
        etl_args = parameters.get(QPARAM_ARGS, "").strip()
        latest = QPARAM_LATEST in parameters and parse_bool(parameters[QPARAM_LATEST])
        request = cls(method, raw_path, rest, fqn, etl_args, latest, pipeline.strip())
        if raw_path != "/download":
            return request
        original_url, object_to = map(parameters.get, (QPARAM_ORIGINAL_URL, QPARAM_OBJECT_TO))
        if not original_url or not object_to:
            raise BadRequest(
                f"/download needs the parameters {QPARAM_ORIGINAL_URL} and {QPARAM_OBJECT_TO}")
        return request._replace(fqn="", original_url=original_url, object_to=object_to)

    @classmethod
    def from_message(cls, message: Any) -> ETLRequest:
        """Parse the control message of a WebSocket object, a value decoded from JSON.

        Raises BadRequest if it is no control message.
        """
        texts: List[Any] = []
        if isinstance(message, dict):
            texts = [message.get(name, "") for name in ("path", "fqn", "etl_args", "pipeline")]
        if set(map(type, texts)) != {str}:
            raise BadRequest("it must be a JSON object whose values are texts")
        path, fqn, etl_args, pipeline = texts
        return cls("PUT", "/ws", fqn=fqn, etl_args=etl_args.strip(), pipeline=pipeline.strip(),
                   object_to=path)

    @property
    def is_message(self) -> bool:
        """Whether the object came over WebSocket; its output is sent back whole."""
        return self.raw_path == "/ws"

    def decoded_path(self, errors: str = "replace") -> str:
        """Return the decoded path without its first slash; `errors` is as in `bytes.decode`."""
        if self.object_to or self.is_message:
            return self.object_to
        return decode_escapes(self.raw_path, errors)[1:]

    @property
    def name(self) -> str:
        """The object's name in log lines."""
        return self.object_to or self.raw_path


# == 10. Stage 2, reading ==
# Opens the object that a request names, as a source of bytes. Runs on the thread that serves the
# connection. Whoever opens a source closes it.


class ObjectFile(io.FileIO):
    """An object's open file; `size` is the number of bytes that it had when it was opened."""

    _is_cut = False

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__(descriptor)
        self.size = size

    def close(self) -> None:
        """Close the file and note whether it is cut; a class may close it before `finish`."""
        if not self.closed:
            self._is_cut = os.fstat(self.fileno()).st_size < self.size
        super().close()

    def finish(self) -> None:
        """Close the file; raise OSError if it has become shorter: what was read may be cut."""
        self.close()
        if self._is_cut:
            raise OSError(errno.EIO, f"the object's file ends before its {self.size} bytes")


class SpoolFile(ObjectFile):
    """A temporary file whose path a class gets; `close` removes the file."""

    def __init__(self) -> None:
        import tempfile

        descriptor, self.path = tempfile.mkstemp(prefix="etl-")
        super().__init__(descriptor, 0)  # of size 0, so that it never counts as cut

    def close(self) -> None:
        """Close and remove the file."""
        if not self.closed:
            super().close()
            with contextlib.suppress(FileNotFoundError):  # the class may have moved it away
                os.unlink(self.path)


class ReceivedObject(io.BytesIO):
    """An object in memory: a small file, or a body that was read and waits for its transform.

    Until the transform begins, the object may take memory in a Room. `release` gives this
    memory back; it may be called twice.
    """

    def __init__(self, data: bytes = b"", release: Optional[Callable[[], object]] = None) -> None:
        super().__init__(data)
        self.size = len(data)
        self._release = release  # None if the object is too small to be counted

    def readall(self) -> bytes:
        """Return the whole object, without a copy."""
        return self.getvalue()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that gives the memory back, then calls `function`."""
        def call(*args: Any) -> Any:
            if self._release is not None:
                self._release()
            return function(*args)

        return call

    def close(self) -> None:
        """Give the memory back even if no transform has begun."""
        super().close()
        if self._release is not None:
            self._release()


RequestBody = Union[MessageBody, ReceivedObject]
ObjectStream = Union[BodyStream, ObjectFile, ReceivedObject]


class Source(NamedTuple):
    """An opened object. Whoever opened it closes `stream`; that also removes a temporary file."""

    stream: ObjectStream
    path: str = ""  # the local path that the class gets instead of bytes, by ETL_DIRECT_FQN; or ""

    def finish(self) -> None:
        """Raise an error if the object was not whole, even if the class has caught that error."""
        if isinstance(self.stream, (BodyStream, ObjectFile)):
            self.stream.finish()


# folders whose files may be read; None if the paths of AIStore's layout may be read
Roots = Optional[Tuple[str, ...]]

# …/@provider/[namespace/]bucket/%ob/object
OBJECT_PATH = re.compile(r"(?s).*?/@([a-z0-9]+)/(?:([@#][^/]*)/)?([^/@#%][^/]*)/%ob/(.+)")


def is_object_path(path: str, roots: Roots) -> bool:
    """Tell whether a resolved path has AIStore's layout, or lies under `roots` if they are set."""
    if roots is None:
        return OBJECT_PATH.fullmatch(path) is not None
    return any(path.startswith(root.rstrip("/") + "/") for root in roots)


def require_object_path(path: str, roots: Roots) -> None:
    """Raise Forbidden unless a resolved path may be read."""
    if not is_object_path(path, roots):
        raise Forbidden("the path is not one of an object")


def open_object_path(path: str, roots: Roots) -> int:
    """Open an object's file and return its descriptor.

    Raises NotFound if the object's file is not there, and Forbidden for a file that is not an
    object's: others than the target can reach the pod's port, and the container holds secrets. If
    the path does not look like an object's, its links are resolved before the file is opened, since
    opening a device can do harm. The caller checks the resolved path of the open file, since the
    path may have been changed meanwhile.
    """
    try:
        if "/.." in path or not is_object_path(path, roots):
            require_object_path(os.path.realpath(path), roots)
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        # a 404 must not tell which other files there are
        require_object_path(os.path.realpath(path), roots)
        raise NotFound("the object's file is not there") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        is_our_fault = getattr(error, "errno", None) in (*OUT_OF_RESOURCES, errno.EIO)
        kind = RequestError if is_our_fault else Forbidden
        raise kind(f"the object's file cannot be read: {error}") from None


OBJECT_SIZE_XATTR = re.compile(
    rb"(?s)^[\x01\x02].{9}(?:.*?\xe3\x2f\xbd)?\x00\x03(.{8})(?:\xe3\x2f\xbd|\Z)")


def is_whole(descriptor: int, size: int) -> bool:
    """Tell whether a file is a whole object, and not the first chunk of an object in chunks.

    AIStore keeps the object's size in an attribute of the file (core/lom_xattr.go): after a
    preamble of ten bytes come records of a two-byte key and a value, separated by three fixed
    bytes. Key 3 is the size. If the attribute is missing or has another layout, the file counts as
    whole.
    """
    try:
        attribute = os.getxattr(descriptor, "user.ais.lom")
    except (OSError, AttributeError):  # AttributeError: not on Linux
        return True
    match = OBJECT_SIZE_XATTR.match(attribute)
    return match is None or int.from_bytes(match[1], "big") == size


def read_whole(read: Callable[[int], bytes], size: int) -> bytes:
    """Read `size` bytes of a file, mostly by one call; raise OSError if there are fewer.

    If a file system fails half-way, a call returns the bytes before the failure, and the next call
    raises the error.
    """
    data = read(size)
    while len(data) < size:
        more = read(size - len(data))
        if not more:
            raise OSError(errno.EIO, f"the object's file ends after {len(data)} of {size} bytes")
        data += more
    return data


def open_object_file(path: str, roots: Roots) -> Union[ObjectFile, ReceivedObject, None]:
    """Open an object by its path; return None if the file is only the object's first chunk.

    A small object is read into memory, and its file closed.
    """
    descriptor = open_object_path(path, roots)
    is_kept = False
    try:
        try:
            resolved_path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # no /proc: macOS
            resolved_path = os.path.realpath(path)
        require_object_path(resolved_path, roots)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Forbidden("the path is not one of a regular file")
        if not is_whole(descriptor, status.st_size):
            return None
        if status.st_size <= READ_BYTES:
            read = functools.partial(os.read, descriptor)
            return ReceivedObject(read_whole(read, status.st_size))
        is_kept = True
        return ObjectFile(descriptor, status.st_size)
    finally:
        if not is_kept:
            os.close(descriptor)


def uname_of(path: str) -> bytes:
    """Return an object's unique name, `provider/@uuid#namespace/bucket/object`, from its path."""
    match = OBJECT_PATH.fullmatch(path)
    if match is None:
        raise RequestError("the object is stored in chunks, and its path does not tell its name")
    provider, namespace, bucket, name = match.groups("")
    if not namespace.startswith("@"):
        namespace = "@" + (namespace or "#")
    return os.fsencode(f"{provider}/{namespace}/{bucket}/{name}")


def require_identity(body: NodeBody, what: str) -> NodeBody:
    """Return another node's answer; raise BadGateway if it has an encoding: none was asked for."""
    coding = body.headers.get("Content-Encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        body.close()
        raise BadGateway(f"{what} came with the Content-Encoding {coding!r}")
    return body


def spool(stream: ObjectStream) -> Source:
    """Copy an object to a temporary file, for a class that wants a path; close the object."""
    import shutil

    with stream, contextlib.ExitStack() as on_failure:
        file = on_failure.enter_context(SpoolFile())
        # a buffered file, since a raw one may write less than it is given
        with open(file.fileno(), "wb", closefd=False) as output:
            shutil.copyfileobj(stream, output, WRITE_BYTES)
        file.seek(0)
        on_failure.pop_all()
    return Source(file, file.path)


class Sources:
    """Open the object of a request: a file, the request's body, the target's copy, or a download.

    Shared by all threads of a worker. `locate` is the class's own `sanitize_fqn`. The target sends
    a path whenever the object has a file: this saves sending the bytes through a socket. The path
    does not tell whether the file is the whole object: `is_whole` finds out.
    """

    def __init__(self, settings: Settings, pool: ConnectionPool,
                 locate: Callable[[str], str]) -> None:
        self._settings = settings
        self._pool = pool
        # for downloads: no token, no certificate, and the system's authorities
        self._outside = ConnectionPool(Settings())
        self._locate = locate

    def open(self, request: ETLRequest, body: RequestBody) -> Source:
        """Open the object; the caller closes it.

        Raises NotFound, Forbidden, or an error with the target's status if the object cannot be
        opened.
        """
        if request.original_url:
            return Source(self._download(request.original_url))
        wants_path = bool(request.fqn) and self._settings.direct_fqn
        if request.fqn and not (request.latest and request.method == "GET"):
            path = self._locate(request.fqn)
            file = open_object_file(path, self._settings.fqn_roots)
            if file is not None:
                return Source(file, path if wants_path else "")
            stream = self._fetch("/" + quote(uname_of(path), safe="@"), "")
        elif request.method == "GET":
            stream = self._fetch(request.raw_path, request.query)
        else:
            return Source(body)
        return spool(stream) if wants_path else Source(stream)

    def load(self, request: ETLRequest) -> Optional[bytes]:
        """Read an object of up to 1 MiB by its path, or return None.

        None stands for a larger object, for an object in chunks, which has no whole file, and for a
        class that gets the path and reads the file itself.
        """
        if self._settings.direct_fqn:
            return None
        file = open_object_file(self._locate(request.fqn), self._settings.fqn_roots)
        if file is None:
            return None
        with file:
            return read_whole(file.read, file.size) if file.size <= WRITE_BYTES else None

    def close_idle(self) -> None:
        """Close connections to nodes and to the outside world that were idle for too long."""
        self._pool.close_idle()
        self._outside.close_idle()

    def _fetch(self, raw_path: str, query: str) -> ObjectStream:
        """Read an object from the target, or from the folder of `--target`."""
        target = self._settings.target
        if not target:
            raise NotFound(
                "there is no target to read objects from: serve with --target, or PUT the object")
        url = urlsplit(target)
        if url.scheme == "file":
            # the path names /bucket/object, or is the object's unique name
            name = os.fsdecode(unquote_to_bytes(raw_path.encode("latin-1"))).lstrip("/")
            name = re.sub("^[a-z0-9]+/@[^/]*#[^/]*/", "", name)
            path = os.path.join(unquote(url.path), name)
            file = open_object_file(path, self._settings.fqn_roots)
            if file is None:
                raise RequestError("the object is stored in chunks, which only a target can join")
            return file
        path = percent_encode(url.path + raw_path + ("?" + query if query else ""))
        try:
            stream = self._pool.open(NodeRequest("GET", Hop.of(target), path))
        except OSError as error:
            raise BadGateway(f"the target cannot be reached: {describe(error)}") from None
        # an answer that only the end of its connection ends may be cut: it is not used
        if stream.status == HTTPStatus.OK and stream.can_be_checked:
            return require_identity(stream, "the target's object")
        with stream:
            text = stream.read_text().decode("utf-8", "replace").strip()
        if stream.status == HTTPStatus.NOT_FOUND:
            raise NotFound("the target does not have the object")
        raise RequestError(f"the target answered {stream.status}: {text}".rstrip(": "),
                           stream.status if stream.status >= 400 else HTTPStatus.BAD_GATEWAY)

    def _download(self, url: str) -> NodeBody:
        """Fetch a URL of the outside world, over connections without the cluster's secrets."""
        try:
            Hop.of(url)
        except ValueError as error:
            raise BadRequest(f"the download is impossible: {error}") from None
        # The URL is decoded text, whose characters are escaped as UTF-8. A Location has one
        # character per byte, and `path_of` escapes it as such.
        url = re.sub("[^!-~]", lambda match: quote(match[0]), url)
        location = ""
        agent = {"User-Agent": f"ais-runtime-min/{__version__}"}  # some servers want one
        for _ in range(6):  # more than five redirects are probably a loop
            try:
                url = urljoin(url, location)
                stream = self._outside.open(NodeRequest("GET", Hop.of(url), path_of(url), agent))
            except (OSError, ValueError) as error:
                raise BadGateway(f"the download failed: {describe(error)}") from None
            if stream.status == HTTPStatus.OK:
                return require_identity(stream, "the download")
            location = stream.headers.get("Location", "")
            stream.close()
            if not 300 <= stream.status < 400 or not location:
                status = stream.status if stream.status >= 400 else HTTPStatus.BAD_GATEWAY
                raise RequestError(f"the download was answered {stream.status}", status)
        raise BadGateway("the download was redirected too often")


# == 11. Stage 3, transforming ==
# Calls the class: on which thread, how many calls at once, and with how much memory for the objects
# that wait. A slot covers the class's code alone, never reading an object or delivering a result.

T = TypeVar("T")


class ThreadSlots:
    """Make each call on the thread that asks for it, at most `limit` calls at once."""

    def __init__(self, limit: int) -> None:
        # used as a semaphore: it is written in C, and costs a tenth of threading's
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(limit):
            self._free.put(slot)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call the function once a slot is free; the caller gets its exception."""
        slot = self._free.get()
        try:
            return function(*args)
        finally:
            self._free.put(slot)


class MainThread:
    """Make calls on the main thread, the one that made this object, one by one, in their order.

    Other threads append to `calls` and wake the main thread by `wake`; its loop makes the calls.
    """

    def __init__(self) -> None:
        self._ident = threading.get_ident()
        self.calls: Deque[Callable[[], None]] = collections.deque()
        self.wake: Callable[[], object] = lambda: None
        self._lock = threading.Lock()  # held while a call is appended

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Have the main thread call the function, and wait; the caller gets its exception."""
        if threading.get_ident() == self._ident:
            return function(*args)
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        with self._lock:  # or two threads could both see two calls, and neither would wake
            self.calls.append(lambda: outcomes.put(attempt(function, *args)))
            is_first = len(self.calls) == 1  # otherwise the thread is awake or about to wake
        if is_first:
            self.wake()
        value, error = outcomes.get()
        try:
            if error is not None:
                raise error
            return cast(T, value)
        finally:
            # The error's traceback refers to this frame, and the frame to the error. This cycle
            # would keep the user's object in memory.
            del error

    def make_call(self) -> None:
        """Make the oldest call; for the main thread only."""
        self.calls.popleft()()


Slots = Union[ThreadSlots, MainThread]


class Pace:
    """Predict from the last calls of the class whether the next call is quick.

    Handing a call to another thread costs as much as a quick call takes, so the leader (section 16)
    makes quick calls itself. It hands calls over after a call that took more than a hundred times
    `QUICK_SECONDS`, or when more than three in four of about the last sixteen calls were slow, for
    a hundred times as long as the last call took. Times are those of time.monotonic().
    """

    def __init__(self) -> None:
        self._slow = 0.0  # how many of about the last sixteen calls were slow
        self._hands_over_until = 0.0

    def is_quick(self, now: float) -> bool:
        """Return whether the leader may make the next call itself."""
        return now >= self._hands_over_until

    def note(self, seconds: float, now: float) -> None:
        """Record how long a call took; `now` is when the call ended."""
        self._slow += (seconds >= QUICK_SECONDS) - self._slow / 16
        if self._slow > 12 or seconds > 100 * QUICK_SECONDS:
            self.hand_over(seconds, now)

    def hand_over(self, seconds: float, now: float) -> None:
        """Have calls handed over for a while, since a call took so long.

        After that, four slow calls in a row are enough to hand calls over again.
        """
        self._slow = 11.0
        self._hands_over_until = now + 100 * seconds


def memory_limit(root: str = "/sys/fs/cgroup") -> int:
    """Return how many bytes of memory the container may use."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # version 2 of control groups, and version 1
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            with open(os.path.join(root, name), "rb", buffering=0) as file:
                limit = min(limit, int(file.read()))
    return limit


class Room:
    """Limit the memory of the bodies that wait for their transforms.

    Together they take up to `WAITING_LIMIT_BYTES`. The body that came first never waits for room,
    so at least one body always makes progress.
    """

    def __init__(self) -> None:
        self._memory = memory_limit()
        self._total = 0
        self._taken: Dict[object, int] = {}  # bytes by body, in the order in which bodies came
        self._change = threading.Condition()

    def take(self, body: object, count: int) -> None:
        """Wait until there is room for `count` more bytes of a body, then take the room.

        Raises ObjectTooLarge if the body is larger than the container's memory.
        """
        with self._change:
            taken = self._taken.setdefault(body, 0)
            # a body is read in steps, and the last step may reach beyond the body's end
            self.check(taken + count - WRITE_BYTES)
            self._change.wait_for(lambda: self._total + count <= WAITING_LIMIT_BYTES
                                  or body is next(iter(self._taken)))
            self._total += count
            self._taken[body] += count

    def check(self, size: int) -> None:
        """Raise ObjectTooLarge if the container's memory cannot hold so many bytes."""
        if size > self._memory:
            raise ObjectTooLarge(
                f"the object has more bytes than the container's memory, {self._memory}")

    def leave(self, body: object) -> None:
        """Give back all the room of a body; may be called more than once."""
        with self._change:
            self._total -= self._taken.pop(body, 0)
            self._change.notify_all()


class WaitingBody(io.RawIOBase):
    """Read a body into memory, in steps that wait for room; the stream stays open.

    A client may announce a large body and send little of it. So each step takes room for as many
    bytes as have come so far, but at least for `READ_BYTES` and at most for `WRITE_BYTES`.
    """

    def __init__(self, room: Room, stream: ObjectStream) -> None:
        super().__init__()
        self._room = room
        self._stream = stream
        self._count = 0
        self._spare = 0  # bytes for which room was taken, and which have not come yet

    def load(self) -> ReceivedObject:
        """Read to the end; the object keeps its room until its transform begins or it is closed."""
        stream, release = self._stream, functools.partial(self._room.leave, self)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(release)
            if isinstance(stream, ObjectFile):
                self._room.take(self, stream.size)  # at once, since its bytes are all there
                read: Callable[[int], bytes] = functools.partial(read_to_end, stream)
                if stream.size <= WRITE_BYTES:  # one call, since each may let another thread run
                    read = stream.read
                data = read_whole(read, stream.size)
            else:
                if isinstance(stream, BoundedReader):
                    stream.receive_flags = socket.MSG_WAITALL
                data = read_to_end(self, stream.size)
            received = ReceivedObject(data, release)
            on_failure.pop_all()
        return received

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes into a buffer, 0 at the end."""
        step = min(len(buffer), max(READ_BYTES, min(self._count, WRITE_BYTES)))
        if step > self._spare:
            self._room.take(self, step - self._spare)
            self._spare = step
        count = self._stream.readinto(memoryview(buffer)[:step]) or 0
        self._count += count
        self._spare -= count
        return count


def as_bytes(output: Any, what: str) -> bytes:
    """Return the class's output as bytes; raise TypeError if its type cannot be converted."""
    if type(output) is bytes:
        return output
    if isinstance(output, str):
        return output.encode("utf-8")
    try:
        return bytes(memoryview(output))
    except TypeError:
        raise TypeError(f"{what} {type(output).__name__!r}, not bytes") from None


class Transforms:
    """Call the class with the arguments that it expects, and convert its output to bytes.

    Arguments are passed by position, since users name their parameters freely.
    """

    def __init__(self, server: ETLServer, slots: Slots) -> None:
        self._server = server
        self._slots = slots
        self._gets_decoded_path = isinstance(server, FrameworkServer)
        self._room = Room()

    @property
    def mime_type(self) -> str:
        """The `Content-Type` of results."""
        value = self._server.get_mime_type()
        if not isinstance(value, str):
            raise TypeError(f"get_mime_type() returned {type(value).__name__!r}, not str")
        return str.__str__(value)  # a plain str, whatever a subclass overrides

    def run(self, request: ETLRequest, source: Source) -> bytes:
        """Read the whole object, wait for a slot, and transform it."""
        stream, transform = source.stream, self._server.transform
        args = (self._path(request), request.etl_args)
        if source.path or (stream.size is not None and stream.size <= READ_BYTES):
            output = self._slots.run(transform, source.path or stream.readall(), *args)
        else:
            if not isinstance(stream, ReceivedObject):
                self._room.check(stream.size or 0)
                stream = WaitingBody(self._room, stream).load()
            with stream:
                output = self._slots.run(stream.before(transform), stream.getvalue(), *args)
        return as_bytes(output, "transform() returned")

    def stream(self, request: ETLRequest, source: Source) -> Iterator[bytes]:
        """Transform an object in pieces; raise at the end if the object was not whole.

        A stream takes no slot, since the class reads the object while it transforms it.
        """
        reader = io.BufferedReader(cast(io.RawIOBase, source.stream), READ_BYTES)
        output = self._server.transform_stream(reader, self._path(request), request.etl_args)
        try:
            for piece in output:
                data = as_bytes(piece, "transform_stream() yielded")
                if data:
                    yield data
            source.finish()
        finally:
            self._server.close_reader(output)

    def _path(self, request: ETLRequest) -> str:
        """Return the object's path in the form that the SDK's base class gives (SDK 2.0)."""
        if self._gets_decoded_path or request.raw_path in ("/ws", "/download"):
            return request.decoded_path()
        return request.raw_path


# == 12. Stage 4, delivering ==
# Turns an output into an answer: the output itself, or the news that another node has taken it.
# Runs on the thread that has transformed the object.


# statuses whose answers have no content (RFC 9110, 6.4.1)
BODILESS = (HTTPStatus.SWITCHING_PROTOCOLS, HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


class Answer(NamedTuple):
    """An answer to a client.

    A body of pieces is sent in chunks. If the pieces end in an error, the connection is cut before
    the last chunk, so that the client does not take the body for whole.
    """

    status: int
    body: Union[bytes, Iterator[bytes]] = b""
    headers: Tuple[Tuple[str, str], ...] = ()
    size: Optional[int] = None  # of the body in bytes, where an application has declared it
    origin: str = ""  # the node that has refused the output, if one has

    @property
    def is_open(self) -> bool:
        """Whether the body ends by a last chunk, as a body of pieces and an empty result do.

        If the stage before this one is written in Go, it takes a 200 with a Content-Length of 0 for
        the news of a delivery.
        """
        is_empty = not self.body and self.status == HTTPStatus.OK
        return self.size is None and (not isinstance(self.body, bytes) or is_empty)

    def framing(self, is_chunked: bool) -> List[Tuple[str, str]]:
        """Return the header field that frames the body, if there is one."""
        if is_chunked:
            return [("Transfer-Encoding", "chunked")]
        is_measured = self.size is None and isinstance(self.body, bytes)
        size = len(cast(bytes, self.body)) if is_measured else self.size
        return [] if size is None or self.status in BODILESS else [("Content-Length", str(size))]

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        """Close a body of pieces, which releases what it holds."""
        if not isinstance(self.body, bytes):
            cast(Any, self.body).close()


def error_answer(status: int, detail: str, headers: Mapping[str, str]) -> Answer:
    """Make the answer of a failure, in the form that AIStore's documentation shows."""
    text = json.dumps({"detail": detail}, separators=(",", ":")).encode()
    return Answer(status, text, (("Content-Type", "application/json"), *headers.items()))


class AnswerCut(OSError):
    """An answer has failed half-way, and the failure is logged; the connection must end."""


class OutputFailed(Exception):
    """The class's stream failed while its pieces were being sent; `error` is its exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def guarded(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces of a stream; raise its failures as OutputFailed, then close it.

    So the sender of the pieces can tell a failure of the stream from a failure of the connection.
    """
    with contextlib.closing(cast(Any, pieces)):
        while True:
            piece, error = attempt(next, pieces, None)
            if error is not None:
                raise error if isinstance(error, OutputFailed) else OutputFailed(error)
            if piece is None:
                return
            yield piece


def chain_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the first piece, which has been taken already, and the rest; then close the rest."""
    try:
        if first:
            yield first
        yield from rest
    finally:
        cast(Any, rest).close()


def relay(body: NodeBody) -> Iterator[bytes]:
    """Yield the content of another node's answer as it comes, then close the answer."""
    with body:
        yield from iter(lambda: body.read(READ_BYTES) or b"", b"")


def is_refusal(error: Optional[BaseException]) -> bool:
    """Tell whether an error means that nobody listens.

    A class's `client_put` may use `requests`, which raises errors of its own from such an error.
    """
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__context__
    return error is not None


class Destination(NamedTuple):
    """The next hop of a request's pipeline."""

    url: str
    hop: Hop
    is_final: bool  # whether it is the object at its target, and not another stage
    headers: Mapping[str, str]  # the rest of the pipeline


def content_type(headers: Mapping[str, str]) -> Tuple[Tuple[str, str], ...]:
    """Return the header field that passes on the `Content-Type` of another node's answer."""
    return (("Content-Type", headers.get("Content-Type") or DEFAULT_MIME_TYPE),)


class Deliveries:
    """Put outputs to the next hop, and turn its answers into ours.

    AIStore acts on our status alone: 200 means content, 204 a delivery, and 404 that the source
    does not exist, which AIStore skips in silence. So a hop's status is not passed on if it would
    mean something else as ours.
    """

    def __init__(self, settings: Settings, server: ETLServer, pool: ConnectionPool) -> None:
        self._settings = settings
        self._server = server
        self._pool = pool
        # whether the class overrides how an answer is judged, and how an output is put
        self._judges = (type(server).handle_direct_put_response
                        is not ETLServer.handle_direct_put_response)
        self._by_class = self._judges or type(server).client_put is not ETLServer.client_put

    def destination(self, request: ETLRequest) -> Destination:
        """Return the next hop of the pipeline; raise BadRequest if there can be none."""
        try:
            entry, rest = parse_etl_pipeline(request.pipeline)
            Hop.of(entry)
            path = request.decoded_path("surrogateescape")
            url = compose_etl_direct_put_url(entry, self._settings.target, path, request.etl_args)
            headers = {HEADER_NODE_URL: rest} if rest else {}
            return Destination(url, Hop.of(url), is_final(entry), headers)
        except ValueError as error:  # also InvalidPipelineError, this file's and the SDK's
            raise BadRequest(f"the pipeline cannot be used: {error}") from None

    def deliver(self, to: Destination, output: Union[bytes, Iterator[bytes]],
                connect_seconds: float) -> Answer:
        """Put an output to the next hop.

        Raises HopLost if the answer does not come whole, and BadGateway if nobody listens.
        """
        whole = output if isinstance(output, bytes) else None
        counted = CountingIterator(cast(Any, output))
        body = iter(counted) if whole is None else whole
        try:
            answer = self._put(to, body, connect_seconds)
            if isinstance(answer, Answer):
                return answer
            if to.is_final and answer.status_code < 300 and getattr(answer, "is_early", False):
                raise BadGateway("the target answered before it had the object")
            size = counted.bytes_sent if whole is None else len(whole)
            if not self._judges:
                return self._judge(to, answer, size)
            return self._judge_by_class(answer, whole or b"", size)
        except (OSError, http.client.HTTPException, NodeBodyLost) as error:
            kind = BadGateway if is_refusal(error) else HopLost
            raise kind(f"the next hop was lost: {describe(error)}") from None

    def _put(self, to: Destination, output: Any, connect_seconds: float) -> Any:
        """Put an output, by the class's method if it has one; return the hop's whole answer.

        If the answer is a stage's large content, return our answer, which passes it on.
        """
        if self._by_class:
            return self._server.client_put(to.url, output, dict(to.headers))
        body = self._pool.open(NodeRequest(
            "PUT", to.hop, path_of(to.url), to.headers, output, connect_seconds))
        is_content = body.status == HTTPStatus.OK and not to.is_final
        # a small answer is read to its end before ours begins: a status can tell if that fails
        if is_content and (body.size is None or body.size > 64 << 10):
            pieces = relay(body)
            first = next(pieces, b"")
            return Answer(HTTPStatus.OK, chain_first(first, pieces), content_type(body.headers))
        with body:
            content = body.readall() if is_content else body.read_text()
        return NodeAnswer(body.status, body.headers, content, to.url, body.is_early)

    def _judge(self, to: Destination, answer: Any, size: int) -> Answer:
        """Decide what a whole answer means: a delivery, content (also empty), or a refusal."""
        status, headers = answer.status_code, answer.headers
        if to.is_final and status in (HTTPStatus.OK, HTTPStatus.NO_CONTENT) and not answer.content:
            return Answer(HTTPStatus.NO_CONTENT, b"", ((HEADER_DIRECT_PUT_LENGTH, str(size)),))
        if not to.is_final and status == HTTPStatus.NO_CONTENT:
            length = headers.get(HEADER_DIRECT_PUT_LENGTH, "0")
            return Answer(status, b"", ((HEADER_DIRECT_PUT_LENGTH, length),))
        if not to.is_final and status == HTTPStatus.OK:
            return Answer(status, answer.content, content_type(headers))
        data = answer.content[:ERROR_TEXT_LIMIT_BYTES]
        text = self._settings.redact(data.decode("utf-8", "replace"))
        if status == HTTPStatus.SERVICE_UNAVAILABLE and headers.get(HEADER_RETRY_REASON):
            raise HopLost(f"the next stage wants the object again: {text}")
        # from us, a 404 would mean that the source is not there, and a 3xx or 2xx that all is well
        if status < 400 or status == HTTPStatus.NOT_FOUND:
            raise BadGateway(f"the next hop answered {status}: {text}".rstrip(": "))
        origin = urlsplit(to.url).netloc
        return Answer(status, text.encode(), content_type(headers), origin=origin)

    def _judge_by_class(self, answer: Any, data: bytes, size: int) -> Answer:
        """Have the class decide what an answer means; hide secrets, and a 404 as `_judge` does."""
        status, content, length = self._server.handle_direct_put_response(answer, data, size)
        status = int(status)
        content = as_bytes(content or b"", "the answer is")
        if status >= 400:
            content = self._settings.redact(content.decode("utf-8", "replace")).encode()
        if status == HTTPStatus.NOT_FOUND:
            status = HTTPStatus.BAD_GATEWAY
        headers = self._server.make_direct_put_headers(length)
        return Answer(status, content, tuple(headers.items()))


# == 13. One request ==
# Runs the stages one after another, and is the only place that maps failures to answers. HTTP and
# WebSocket connections call `Service.answer`.


# keyed by the exception's name, since its module is imported only if the class needs it
STATUS_OF_USER_ERROR: Mapping[str, Callable[[Any], int]] = {
    "starlette.exceptions.HTTPException": lambda error: int(error.status_code),
    "werkzeug.exceptions.HTTPException": lambda error: int(
        error.code or getattr(error.response, "status_code", 500)),
    "aistore.sdk.errors.InvalidPipelineError": lambda error: HTTPStatus.BAD_REQUEST,
    "aistore.sdk.errors.ETLDirectPutTransientError": lambda error: (
        503 if error.bail_without_local_retry else 502),
}


def user_status(error: BaseException) -> int:
    """Return the status that a user's exception stands for: 500 for all but a few known kinds."""
    for base in type(error).__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in STATUS_OF_USER_ERROR:
            status = STATUS_OF_USER_ERROR[name](error)
            return status if 400 <= status <= 599 else HTTPStatus.INTERNAL_SERVER_ERROR
    return HTTPStatus.INTERNAL_SERVER_ERROR


def forget_traceback(error: BaseException) -> None:
    """Drop the frames that an error came through, which would keep whole objects in memory."""
    for each in (error, getattr(error, "error", None), error.__context__, error.__cause__):
        if isinstance(each, BaseException):
            each.__traceback__ = None


class Service:
    """Answer requests; shared by all threads of a worker.

    `answer` never raises. An answer in pieces holds the object's source, and perhaps a connection
    to a hop, until it has been sent or closed.
    """

    def __init__(self, settings: Settings, server: ETLServer, pool: ConnectionPool,
                 slots: Slots) -> None:
        self.settings = settings
        self._sources = Sources(settings, pool, server.sanitize_fqn)
        self.close_idle = self._sources.close_idle  # connections to other nodes
        self._transforms = Transforms(server, slots)
        # messages have a Room of their own: a message may wait for an object that is being read
        self.message_room = Room()
        self._deliveries = Deliveries(settings, server, pool)
        self.is_streaming = server.use_streaming  # whether objects are transformed in pieces
        self._delays = [min(2.0 ** retry, RETRY_DELAY_LIMIT_SECONDS)
                        for retry in range(server.direct_put_retries)]
        self._has_begun = self._has_answered = False

    def load(self, request: ETLRequest) -> Optional[Tuple[ETLRequest, ReceivedObject]]:
        """Read an object by its path; return request and object as if it had come in the body.

        Returns None if `Sources.load` does, or if the object cannot be read: `answer` tells why.
        """
        data = attempt(self._sources.load, request).value
        if data is None:
            return None
        return request._replace(method="PUT", fqn=""), ReceivedObject(data)

    def answer_message(self, request: ETLRequest, body: ReceivedObject) -> Tuple[Answer, bytes]:
        """Answer an object that came over WebSocket; return the answer and its whole body."""
        with self.answer(request, body) as answer:
            if isinstance(answer.body, bytes):
                return answer, answer.body
            content, error = attempt(b"".join, answer.body)
        if error is None:
            return answer, content
        answer = self.answer_failure(request, error)
        return answer, cast(bytes, answer.body)

    def answer(self, request: ETLRequest, body: RequestBody) -> Answer:
        """Answer one request, whatever happens; the caller sends the answer and closes it."""
        if not self._has_begun:
            # before the flag is set: another thread that sees the flag calls the class, which may
            # end the worker, and the supervisor must know by then that a request has begun
            report(REPORT_BEGUN)
            self._has_begun = True
        answer, error = attempt(self._answer, request, body)
        if not self._has_answered:
            report(REPORT_ANSWERED)
            self._has_answered = True
        return cast(Answer, answer) if error is None else self.answer_failure(request, error)

    def answer_failure(self, request: ETLRequest, error: BaseException) -> Answer:
        """Return the answer for a request that has failed."""
        answer, second_error = attempt(self.answer_for, request, error)
        forget_traceback(error)
        if second_error is not None:  # a user's exception whose attributes raise
            return error_answer(HTTPStatus.INTERNAL_SERVER_ERROR,
                                f"Processing error: {type(error).__name__}", {})
        return cast(Answer, answer)

    def _answer(self, request: ETLRequest, body: RequestBody) -> Answer:
        """Read the object, transform it, and deliver the output or answer with it."""
        if request.pipeline:
            answer = self._deliver(request, body)
            if answer.origin and not request.is_message:
                text = cast(bytes, answer.body)[:1000].decode("utf-8", "replace")
                logger.error("%s: the next hop, %s, answered %d: %s",
                             request.name, answer.origin, answer.status, text)
            return answer
        fields = (("Content-Type", self._transforms.mime_type),)
        output = self._output(request, body)
        if isinstance(output, bytes):
            return Answer(HTTPStatus.OK, output, fields)
        # before the first piece is sent, a failure can still be told by a status
        first = next(output, b"")
        return Answer(HTTPStatus.OK, chain_first(first, output), fields)

    def _output(self, request: ETLRequest, body: RequestBody) -> Union[bytes, Iterator[bytes]]:
        """Read and transform an object: in pieces if the class streams, but a message whole."""
        if self.is_streaming:
            pieces = self._pieces(request, body)
            return b"".join(pieces) if request.is_message else guarded(pieces)
        source = self._sources.open(request, body)
        with source.stream:
            return self._transforms.run(request, source)

    def _pieces(self, request: ETLRequest, body: RequestBody) -> Iterator[bytes]:
        """Read and transform an object in pieces; the source stays open while they are taken."""
        source = self._sources.open(request, body)
        with source.stream:
            yield from self._transforms.stream(request, source)

    def _deliver(self, request: ETLRequest, body: RequestBody) -> Answer:
        """Deliver the output; try again if the hop is lost.

        A stream cannot be made again from an object that came in the body: the client is told to
        send the object again. The delays and the time for connecting again are limited together,
        since AIStore waits for the answer.
        """
        destination = self._deliveries.destination(request)
        output = self._output(request, body)
        is_whole = isinstance(output, bytes)
        # a file or another node has the object; otherwise it came in the body
        can_repeat = is_whole or bool(request.fqn) or request.method != "PUT"
        connect_seconds, delays, deadline = CONNECT_SECONDS, self._delays, 0.0
        while True:
            try:
                return self._deliveries.deliver(destination, output, connect_seconds)
            except HopLost as error:
                if not can_repeat:
                    raise RequestError(str(error), HTTPStatus.SERVICE_UNAVAILABLE,
                                       {HEADER_RETRY_REASON: RETRY_REASON_TRANSIENT}) from None
                now = time.monotonic()
                # All retries have 1 s together for connecting. The default, three retries, then
                # ends within 8 s (1 + 2 + 4 + 1); AIStore's limit for an object may be 10 s.
                deadline = deadline or now + sum(delays) + 1.0
                if not delays or now + delays[0] > deadline:
                    raise
                delay, *delays = delays
                logger.warning("%s: %s; trying again in %.0f s", request.name, error, delay)
                time.sleep(delay)
                connect_seconds = 1.0 / len(self._delays)
                output = output if is_whole else self._output(request, body)

    def answer_for(self, request: ETLRequest, error: BaseException) -> Answer:
        """Map a failure to the client's answer, and log it for the operator."""
        if isinstance(error, OutputFailed):
            error = error.error
        if isinstance(error, RequestError):
            level = logging.INFO if isinstance(error, NotFound) else logging.ERROR
            logger.log(level, "%s: %s", request.name, error)
            return error_answer(error.status, self.settings.redact(str(error)), error.headers)
        status, headers = user_status(error), {}
        reason = str(getattr(error, "detail", "") or getattr(error, "description", "")
                     or describe_of_user(error))
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:  # raised on purpose: no traceback is logged
            logger.warning("%s: %d: %s", request.name, status, reason)
        else:
            log_user_error(request.name, error)
        if (status == HTTPStatus.SERVICE_UNAVAILABLE
                and getattr(error, "bail_without_local_retry", False)):
            headers = {HEADER_RETRY_REASON: RETRY_REASON_TRANSIENT}
        return error_answer(status, self.settings.redact(f"Processing error: {reason}"), headers)


# == 14. HTTP: one connection ==
# Turns the bytes of a connection into requests for `Service.answer`, and answers into bytes (RFC
# 9110, RFC 9112). One thread at a time serves a connection: the leader of the server, which must
# not wait, or a thread of the server's pool.


@functools.lru_cache(maxsize=32)
def options_of(value: str) -> FrozenSet[str]:
    """Return the options that a field's value lists, in lower case."""
    return frozenset(option.strip().lower() for option in value.split(","))


class Head(NamedTuple):
    """The head of a request, parsed; field names are in lower case."""

    method: str
    target: str
    is_http_1_0: bool
    fields: Mapping[str, str]

    @property
    def wants_close(self) -> bool:
        """Whether this is the last request of its connection (RFC 9112, 9.3)."""
        return self.is_http_1_0 or "close" in options_of(self.fields.get("connection", ""))


def parse_head(data: bytes) -> Head:
    """Parse the lines of a head; raise UnframedRequest unless they are well-formed HTTP/1."""
    line, _, rest = data.decode("latin-1").partition("\r\n")
    if rest.count("\n") > HEAD_LIMIT_FIELDS:
        raise UnframedRequest(f"more than {HEAD_LIMIT_FIELDS} header fields", 431)
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise UnframedRequest("the request line is malformed")
    method, target, major, minor = match.groups()
    if major != "1":
        raise UnframedRequest(f"HTTP/{major}.{minor} is not spoken here", 505)
    fields = parse_fields(rest)
    if "host" not in fields and minor != "0":
        raise UnframedRequest("the Host field is missing")
    if not HOST.fullmatch(fields.get("host", "")):
        raise UnframedRequest("the Host field is malformed")
    return Head(method, target, minor == "0", fields)


def body_of(head: Head, source: ConnectionInput) -> MessageBody:
    """Return a request's body (RFC 9112, 6.3); raise UnframedRequest if its end is ambiguous."""
    coding, length = head.fields.get("transfer-encoding"), head.fields.get("content-length")
    if coding is None:
        if length is None:
            return BoundedReader(source, 0)
        if not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise UnframedRequest("the Content-Length is malformed")
        return BoundedReader(source, int(length))
    if length is not None or head.is_http_1_0:
        raise UnframedRequest(
            "a Transfer-Encoding cannot come with a Content-Length, nor in HTTP/1.0")
    if coding.lower() != "chunked":
        raise UnframedRequest(f"the Transfer-Encoding {coding!r} is not known here", 501)
    return ChunkedReader(source)


# a method, or a part of one, then lines that end in CRLF; a lone CR may begin an empty line, which
# is skipped; other bytes may be TLS
HEAD_BEGINNING = re.compile(rb"\r|%b(?: [^\n]*(?:(?<=\r)\n[^\n]*)*)?" % TOKEN)


def check_partial_head(source: ConnectionInput) -> None:
    """Raise UnframedRequest if the buffered bytes cannot become a head, or are too long for one."""
    if source.ahead >= HEAD_LIMIT_BYTES:
        raise UnframedRequest("the head is too long", 431)
    if not HEAD_BEGINNING.fullmatch(source.peek(HEAD_LIMIT_BYTES)):
        raise UnframedRequest("this is not HTTP, or a line of the head does not end in CRLF")


# seconds since the epoch in the form of RFC 9110, 5.6.7, in any locale; made once in a second
http_date = functools.lru_cache(maxsize=1)(functools.partial(email.utils.formatdate, usegmt=True))
UNPRINTABLE = re.compile(r"[^\t -~\x80-\xff]")


@functools.lru_cache(maxsize=1024)
def field_line(name: str, value: str) -> str:
    """Return the line of a header field; a value of the user's code cannot break out of it."""
    return UNPRINTABLE.sub("?", f"{name}: {value}") + "\r\n"


def answer_head(status: int, fields: Iterable[Tuple[str, str]]) -> bytes:
    """Return the head of an answer, whose status the user's code may have made up."""
    reason = http.client.responses.get(status, "Unknown")
    date = http_date(int(time.time()))
    lines = "".join(itertools.starmap(field_line, fields))
    return f"HTTP/1.1 {int(status)} {reason}\r\nDate: {date}\r\n{lines}\r\n".encode("latin-1")


def peer_of(connection: socket.socket) -> Any:
    """Return the address of a client, which may be gone."""
    try:
        return connection.getpeername()
    except OSError:
        return "", 0


def log_request(method: str, path: str, status: int, size: int, began: float) -> None:
    """Log an answer at DEBUG; `began` is when answering began, by time.monotonic()."""
    milliseconds = 1000 * (time.monotonic() - began)
    logger.debug("%s %s: %d, %d bytes in %.1f ms", method, path, status, size, milliseconds)


def log_cut(name: str, error: BaseException) -> None:
    """Log why an answer was cut half-way."""
    error = getattr(error, "error", error)
    if isinstance(error, RequestError):
        logger.error("%s: the answer was cut: %s", name, error)
    else:
        log_user_error(f"{name}: the answer was cut", error)


WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
WEBSOCKET_KEY = re.compile("[+/0-9A-Za-z]{21}[AQgw]==")  # sixteen bytes in base64


def upgrade_answer(fields: Mapping[str, str]) -> Answer:
    """Return the answer to a handshake (RFC 6455, 4.2); raise RequestError to refuse it."""
    import binascii
    import hashlib

    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
    if not ("websocket" in options_of(fields.get("upgrade", ""))
            and "upgrade" in options_of(fields.get("connection", ""))
            and fields.get("sec-websocket-version") == "13"):
        raise RequestError("/ws is for WebSocket alone, version 13", HTTPStatus.UPGRADE_REQUIRED,
                           {"Sec-WebSocket-Version": "13", **upgrade})
    key = fields.get("sec-websocket-key", "")
    if not WEBSOCKET_KEY.fullmatch(key):
        raise BadRequest("the Sec-WebSocket-Key is malformed")
    digest = hashlib.sha1(key.encode() + WEBSOCKET_GUID, usedforsecurity=False).digest()
    accept = binascii.b2a_base64(digest, newline=False).decode()
    return Answer(HTTPStatus.SWITCHING_PROTOCOLS, b"",
                  (*upgrade.items(), ("Sec-WebSocket-Accept", accept)))


class Next(enum.Enum):
    """What a connection wants next: all that the server has to know of a protocol."""

    READ = enum.auto()  # to be served by the leader when it is readable
    THREAD = enum.auto()  # to be served by a thread of the pool, which may wait
    PAUSE = enum.auto()  # not to be served before it calls `settle` itself
    UPGRADE = enum.auto()  # to become a WebSocket connection
    LINGER = enum.auto()  # to be closed when its client stops sending
    CLOSE = enum.auto()  # to be closed at once
    NOTHING = enum.auto()  # nothing: another thread serves it already


class Connection:
    """One connection, served by one thread at a time.

    Methods to override:  attend, work, expire; dismiss, let_go, pause and close where the defaults
                          do not fit

    `attend` serves what has come and never waits; `work` serves and may wait. Both return what the
    connection wants next. An exception ends the connection. Times are those of time.monotonic().
    """

    is_over = False  # whether the next sweep must end it, even if nothing more comes
    # whether an answer that is not chunked is incomplete: the connection must then end by a reset,
    # since the client could take the answer for whole
    is_cut = False
    _serving = "connection"  # the name of the object that is being answered

    def __init__(self, connection: socket.socket, server: Any, source: ConnectionInput) -> None:
        self.socket = connection
        # The Server of section 16. Subclasses use its service, application, settle, submit,
        # sweep_soon, may_upgrade, is_crowded, is_draining and is_late. For each call of the class
        # within `attend` they add one to its `turn`.
        self.server = server
        self.input = source
        self.since = time.monotonic()  # when it became idle, or its first buffered byte came
        self._calls_until = 0.0  # until when the thread that calls `attend` may call the class

    def attend(self, now: float, may_call: bool) -> Next:
        """Serve what has come without waiting; call the class only if `may_call`."""
        raise NotImplementedError

    def work(self) -> Next:
        """Serve what has come; wait where that is necessary."""
        raise NotImplementedError

    def expire(self, now: float) -> Next:
        """End the connection if it is over or its client is too slow; else return READ."""
        raise NotImplementedError

    def dismiss(self) -> bool:
        """Return whether the connection may be closed: nothing has come that is not answered."""
        return not (self.input.ahead or is_ready(self.socket, select.POLLIN))

    def let_go(self) -> bool:
        """Call the class no more in this turn.

        Returns whether another thread can go on with the connection now.
        """
        self._calls_until = 0.0
        return False

    def pause(self) -> bool:
        """Return whether the connection still has to pause."""
        return False

    def fail(self, error: BaseException) -> Next:
        """Log an error that ended `attend` or `work`; return how the connection ends."""
        if isinstance(error, OSError):  # the client has gone, or has stopped reading
            logger.debug("%s: %s", self._serving, error)
        else:
            log_cut(self._serving, error)
        forget_traceback(error)
        return Next.CLOSE

    def close(self) -> None:
        """Release what the connection holds; the server closes the socket."""

    def receive(self) -> bool:
        """Receive what has come, without waiting; return False at the connection's end."""
        try:
            return self.input.fill(socket.MSG_DONTWAIT)
        except BlockingIOError:  # the selector may report a socket that has nothing to read
            return True


class LingeringConnection(Connection):
    """A connection whose last answer has been sent while its client may still send.

    To close it at once would reset it, and the client might lose the answer. So the connection
    reads and discards what comes, for `DRAIN_SECONDS`. While the pod stops, `dismiss` does not wait
    for the client to close its end: AIStore never closes a connection that has failed.
    """

    def __init__(self, connection: socket.socket, server: Any, source: ConnectionInput) -> None:
        super().__init__(connection, server, source)
        source.take(source.ahead)
        self._deadline = self.since + DRAIN_SECONDS
        with contextlib.suppress(OSError):  # `attend` finds out that the client is gone
            connection.shutdown(socket.SHUT_WR)

    def attend(self, now: float, may_call: bool) -> Next:
        """Read and discard what has come."""
        is_open = self.receive()
        self.input.take(self.input.ahead)
        return Next.READ if is_open else Next.CLOSE

    def expire(self, now: float) -> Next:
        """Close the connection if the client goes on sending for too long."""
        return Next.CLOSE if now > self._deadline else Next.READ


HEALTHY = Answer(HTTPStatus.OK, b"Running", (("Content-Type", "text/plain"),))


class HTTPRequest(NamedTuple):
    """A request whose head has come.

    `asked` is the object that the request asks for, or the answer if that is known already, or a
    call of the class's WSGI application.
    """

    head: Head
    body: MessageBody
    asked: Union[ETLRequest, Answer, Callable[[MessageBody], Answer]]


class HTTPConnection(Connection):
    """A connection of HTTP/1.1 or 1.0.

    It does not use the parser of `BaseHTTPRequestHandler`, which accepts requests whose end two
    readers could see in different places.
    """

    def __init__(self, connection: socket.socket, server: Any) -> None:
        super().__init__(connection, server, ConnectionInput(connection))
        self._may_wait = False  # whether a thread of the pool serves it, and not the leader
        self._todo: Optional[HTTPRequest] = None  # a request that is not yet answered
        self._unsent: Sequence[Any] = ()  # parts that the leader could not send without waiting
        self._wish = Next.READ  # what the connection wants once all is sent
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        set_timeout(connection, socket.SO_SNDTIMEO, RESULT_UNREAD_SECONDS)
        set_timeout(connection, socket.SO_RCVTIMEO, BODY_PAUSE_SECONDS)

    def attend(self, now: float, may_call: bool) -> Next:
        """Answer the requests that have come, up to the first that must wait for something."""
        if not self.input.ahead:
            self.since = now
        if not self.receive():
            return Next.CLOSE
        self._may_wait, self._calls_until = False, now + TURN_SECONDS if may_call else 0.0
        return self._serve_all()

    def work(self) -> Next:
        """Send the rest of an answer, then answer the requests that have come."""
        self._may_wait = True
        unsent, self._unsent = self._unsent, ()
        send_parts(self.socket, unsent)
        return self._serve_all()

    def expire(self, now: float) -> Next:
        """When time is over, close an idle connection, or answer 408 to an incomplete head."""
        if now - self.since <= (HEAD_TIMEOUT_SECONDS if self.input.ahead else IDLE_SECONDS):
            return Next.READ
        if not self.input.ahead:
            return Next.CLOSE
        error = UnframedRequest(f"the head took more than {HEAD_TIMEOUT_SECONDS:.0f} s", 408)
        self._may_wait, self._todo = False, self._refused(error)
        return self._serve_all()

    def _serve_all(self) -> Next:
        """Answer the requests that have come, one by one; the leader stops before it must wait."""
        while self._wish is Next.READ and not self._unsent:
            request = self._todo or (self._next_request() if self.input.ahead else None)
            if request is None:
                break
            self._todo = request
            if self._may_wait:
                self._respond(request)
            elif not self._respond_at_once(request):
                return Next.THREAD
            self._todo = None
        return Next.THREAD if self._unsent else self._wish

    # -- reading --

    def _next_request(self) -> Optional[HTTPRequest]:
        """Take the next request from the buffer; return None if its head is not complete."""
        source = self.input
        # an empty line before a request is skipped (RFC 9112, 2.2)
        while source.find(b"\r\n", 2) == 0:
            source.take(2)
        try:
            end = source.find(b"\r\n\r\n", HEAD_LIMIT_BYTES)
            if end < 0:
                if source.ahead:
                    check_partial_head(source)
                return None
            head = parse_head(source.take(end + 4)[:-2])
            body = body_of(head, source)
        except UnframedRequest as error:
            return self._refused(error)
        # the client may wait for "100 Continue" before it sends the body (RFC 9110, 10.1.1)
        expects = head.fields.get("expect", "").lower() == "100-continue" and not head.is_http_1_0
        source.invite = None
        if expects and not source.ahead:
            source.invite = functools.partial(self._send, b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            return HTTPRequest(head, body, self._understand(head, body))
        except RequestError as error:
            return HTTPRequest(head, body, error_answer(error.status, str(error), error.headers))

    def _refused(self, error: UnframedRequest) -> HTTPRequest:
        """Return a stand-in for a request that cannot be framed, and log the error."""
        logger.warning("request of %s: %s", peer_of(self.socket), error)
        answer = error_answer(error.status, str(error), error.headers)
        # a body that is never at its end: nobody can tell where the next request begins
        body = BoundedReader(self.input, 1)
        return HTTPRequest(Head("unknown", "request", False, {}), body, answer)

    def _understand(self, head: Head, body: MessageBody) -> Any:
        """Return what a request asks for, or its answer if that needs no call of the class."""
        if self.server.application is not None:
            asked = self.server.application.asked(head, self.socket)
            if asked is not None:
                return asked
        request = ETLRequest.parse(head.method, head.target, head.fields.get("ais-node-url", ""))
        if request.raw_path == "/health":
            return HEALTHY
        if request.raw_path != "/ws":
            return request
        if body.size != 0 or head.wants_close:
            raise BadRequest("a handshake is of HTTP/1.1, has no body, and keeps its connection")
        answer = upgrade_answer(head.fields)
        if not self.server.may_upgrade():
            raise RequestError("there are too many WebSocket connections",
                               HTTPStatus.SERVICE_UNAVAILABLE)
        return answer

    # -- answering --

    def _respond_at_once(self, request: HTTPRequest) -> bool:
        """Answer a request on the leader; return False if that would have to wait."""
        asked, size = request.asked, request.body.size
        if isinstance(asked, Answer):
            self._respond(request)
            return True
        is_small = size is not None and size <= min(READ_BYTES, self.input.ahead)
        may_call = is_small and time.monotonic() <= self._calls_until
        # the leader does not wait for another node: not for a pipeline's hop, nor for the target
        if not may_call or not isinstance(asked, ETLRequest) or asked.pipeline or asked.latest:
            return False
        loaded = None
        if asked.fqn:
            loaded = self.server.service.load(asked)
            if loaded is None:
                return False
        elif asked.method != "PUT":
            return False
        self._respond(request, loaded)
        self.server.turn += 1
        return True

    def _respond(self, request: HTTPRequest,
                 loaded: Optional[Tuple[ETLRequest, ReceivedObject]] = None) -> None:
        """Answer one request; `loaded` is the object if it has been read already.

        If the body was not read to its end, the answer is an early error, and the connection ends:
        the rest may be a whole object, and a client that expects "100 Continue" may or may not
        send it (RFC 9110, 10.1.1).
        """
        (head, body, asked), began = request, time.monotonic()
        if isinstance(asked, ETLRequest):
            self._serving = asked.name
            answer = self.server.service.answer(*(loaded or (asked, body)))
        else:
            self._serving = head.target.partition("?")[0]
            answer = asked if isinstance(asked, Answer) else asked(body)
        is_upgrade = answer.status == HTTPStatus.SWITCHING_PROTOCOLS
        with answer:
            keeps = not head.wants_close and (is_upgrade or not self.server.is_draining)
            if isinstance(answer.body, bytes):  # pieces read the body to its end, or are cut
                keeps = keeps and body.is_at_end
            size = self._write(answer, head, keeps)
        if logger.isEnabledFor(logging.DEBUG):
            log_request(head.method, self._serving, answer.status, size, began)
        if is_upgrade:
            self._wish = Next.UPGRADE
        elif not body.is_at_end:  # an application may have left some of the body
            self._wish = Next.LINGER
        elif not keeps:
            self._wish = Next.CLOSE

    def _write(self, answer: Answer, head: Head, keeps: bool) -> int:
        """Send an answer; return the number of bytes in its body.

        If a body in pieces fails, the client sees that the last chunk is missing, or a reset.
        """
        is_chunked = answer.is_open and not head.is_http_1_0
        fields = [*answer.headers, *answer.framing(is_chunked)]
        if not keeps:
            fields.append(("Connection", "close"))
        text, last = answer_head(answer.status, fields), b"0\r\n\r\n" if is_chunked else b""
        size = 0
        if head.method == "HEAD":
            self._send(text)
        elif isinstance(answer.body, bytes):
            size = len(answer.body)
            self._send(text, last or answer.body)
        else:
            self.input.send_invitation()  # "100 Continue" cannot come within the answer
            self.is_cut = not is_chunked
            for piece in answer.body:
                size += len(piece)
                chunk = (b"%x\r\n" % len(piece), piece, b"\r\n") if is_chunked else (piece,)
                self._send(text, *chunk)
                text = b""
            self._send(text, last)
            self.is_cut = False
        return size

    def _send(self, *parts: bytes) -> None:
        """Send parts; the leader sends only what the client takes without waiting."""
        if self._may_wait:
            return send_parts(self.socket, parts)
        try:
            self._unsent = send_some(self.socket, parts, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._unsent = parts


# == 15. WebSocket: one connection ==
# WebSocket frames on the server's side, without extensions (RFC 6455); AIStore's protocol, which
# makes objects of messages (ext/etl/websocket_comm.go); and the connection that joins the two.

OPCODES = (0, 1, 2, 8, 9, 10)
OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG = OPCODES
FRAME_HEAD_LIMIT_BYTES = 14  # two bytes, eight of the length, four of the mask
# The two 7-bit lengths that announce a longer length field. For each: the offset at which that
# field ends, and the least value that is valid in it.
EXTENDED_SIZES = {126: (4, 126), 127: (10, 1 << 16)}
CONTROL_LIMIT_BYTES = 125  # of a control frame's payload
CLOSE_GOING_AWAY, CLOSE_PROTOCOL, CLOSE_NO_CODE = 1001, 1002, 1005
CLOSE_BAD_TEXT, CLOSE_TOO_BIG, CLOSE_FAILED = 1007, 1009, 1011
# IANA's registered codes that an endpoint may send; applications may also use 3000 to 4999
CLOSE_CODES = frozenset((1000, 1001, 1002, 1003, *range(1007, 1015)))


class CloseConnection(RequestError):
    """The connection must be closed; `status` is the code of the close frame to send.

    The text tells how the client has violated the protocol. It is empty if the client has sent a
    close frame, whose code is then sent back.
    """

    status = CLOSE_PROTOCOL


def frame_head(opcode: int, size: int, is_last: bool = True) -> bytes:
    """Return the head of a server's frame, which must not be masked (RFC 6455, 5.1, 5.2)."""
    first = opcode | (0x80 if is_last else 0)
    if size < 126:
        return bytes((first, size))
    if size < 1 << 16:
        return struct.pack("!BBH", first, 126, size)
    return struct.pack("!BBQ", first, 127, size)


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame; with CLOSE_NO_CODE and no reason it has no payload."""
    payload = b"" if code == CLOSE_NO_CODE else struct.pack("!H", code)
    text = reason.encode("utf-8", "replace")[:CONTROL_LIMIT_BYTES - 2]
    payload += text.decode("utf-8", "ignore").encode()  # whole characters alone
    return frame_head(OP_CLOSE, len(payload)) + payload


def parse_close(payload: bytes) -> int:
    """Return the code in a close frame's payload (RFC 6455, 5.5.1 and 7.4).

    Returns CLOSE_NO_CODE if there is no payload. Raises CloseConnection if it is malformed.
    """
    if not payload:
        return CLOSE_NO_CODE
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (code in CLOSE_CODES or 3000 <= code <= 4999):
        raise CloseConnection("the code of a close frame is malformed")
    try:
        payload[2:].decode("utf-8")
    except UnicodeDecodeError:
        raise CloseConnection("the reason of a close frame is no UTF-8", CLOSE_BAD_TEXT) from None
    return code


class Frame(NamedTuple):
    """The head of a frame from a client."""

    is_last: bool
    opcode: int
    size: int  # bytes of the payload
    mask: bytes
    head_size: int  # bytes


def parse_frame(head: bytes) -> Optional[Frame]:
    """Parse the head of a client's frame; return None if the head is incomplete.

    Raises CloseConnection as soon as the bytes show a frame that no client may send (RFC 6455, 5.2
    and 5.5).
    """
    if len(head) < 2:
        return None
    opcode, size = head[0] & 0x0F, head[1] & 0x7F
    if head[0] & 0x70:
        raise CloseConnection("a reserved bit is set, and no extension was agreed on")
    if opcode not in OPCODES:
        raise CloseConnection(f"the opcode {opcode} is reserved")
    if not head[1] & 0x80:
        raise CloseConnection("a client's frame has no mask")
    if opcode >= OP_CLOSE and not (head[0] & 0x80 and size <= CONTROL_LIMIT_BYTES):
        raise CloseConnection("a control frame is too long or fragmented")
    start, least = EXTENDED_SIZES.get(size, (2, 0))
    if len(head) < start + 4:
        return None
    size = int.from_bytes(head[2:start], "big") if least else size
    # a length takes as few bytes as possible, and the highest bit of a 64-bit length is 0
    if not least <= size < 1 << 63:
        raise CloseConnection("the length of a frame is malformed")
    return Frame(head[0] >= 0x80, opcode, size, head[start:start + 4], start + 4)


def unmasked(data: Any, mask: bytes) -> bytes:
    """Return data without its mask (RFC 6455, 5.3), by one XOR of two large numbers."""
    size = len(data)
    pad = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")


def unmask_by_numbers(data: memoryview, mask: bytes) -> None:
    """Remove the mask from data in place, by arithmetic."""
    data[:] = unmasked(data, mask)


def unmasking_by_openssl() -> Callable[[memoryview, bytes], None]:
    """Return a function that removes masks in place by a routine of OpenSSL.

    The routine is nine times as fast as arithmetic. It implements output feedback, a mode of block
    ciphers (NIST SP 800-38A, 6.4): a block is encrypted again and again, and the data is XORed with
    the results. If the "cipher" returns its input, the data is XORed with the same block over and
    over. With a mask repeated four times as the block, that is the masking of RFC 6455. The OpenSSL
    is the one that hashlib is linked to. Raises an exception if it cannot be used in this way.
    """
    import _hashlib
    import ctypes

    # declared in openssl/modes.h
    encrypt = ctypes.CDLL(_hashlib.__file__).CRYPTO_ofb128_encrypt
    address = ctypes.c_void_p
    encrypt.argtypes = [address, address, ctypes.c_size_t, address, address, address, address]
    encrypt.restype = None
    # OpenSSL calls the cipher with the block, the place of the output, which is the block again,
    # and the key. The key is NULL here, which memmove takes for a count of 0: it copies nothing.
    identity = ctypes.cast(ctypes.memmove, address)

    def unmask_by_openssl(data: memoryview, mask: bytes) -> None:
        start = ctypes.byref(ctypes.c_char.from_buffer(data))
        block, used = ctypes.create_string_buffer(mask * 4, 16), ctypes.byref(ctypes.c_int(0))
        encrypt(start, start, len(data), None, block, used, identity)

    trial = bytearray(range(37))
    unmask_by_openssl(memoryview(trial), b"mask")
    if trial != unmasked(bytes(range(37)), b"mask"):
        raise NotImplementedError("OpenSSL's output feedback gives another result")
    return unmask_by_openssl


@functools.lru_cache(maxsize=None)
def fastest_unmasking() -> Callable[[memoryview, bytes], None]:
    """Return the fastest function that removes masks in place and works in this process."""
    try:
        return unmasking_by_openssl()
    except (ImportError, AttributeError, OSError, TypeError, ValueError, RuntimeError) as error:
        logger.debug("large WebSocket messages are unmasked by numbers: %s", describe(error))
        return unmask_by_numbers


class MessageStream(BodyStream):
    """The payload of one message, joined from all its fragments (RFC 6455, 5.4).

    `frame` is the head of the first fragment, already taken from `source`. The opcode and the
    payload of a control frame between fragments are passed to `control`. `check` is called with
    the number of bytes that the client has announced so far; it raises ObjectTooLarge if that is
    too much.
    """

    def __init__(self, source: ConnectionInput, frame: Frame,
                 control: Callable[[int, bytes], None], check: Callable[[int], None]) -> None:
        super().__init__()
        self._source = source
        self._control = control
        self._check = check
        self._decoder = codecs.getincrementaldecoder("utf-8")() if frame.opcode == OP_TEXT else None
        self.size = frame.size if frame.is_last else None
        self._begin_fragment(frame)

    def _begin_fragment(self, frame: Frame) -> None:
        self._is_last, self._left, self._mask = frame.is_last, frame.size, frame.mask
        self._check(self.count + frame.size)

    def receive(self, buffer: Any) -> int:
        """Read some bytes of the payload, 0 at its end."""
        while not self._left:
            if self._is_last:
                return 0
            self._read_head()
        view = memoryview(buffer)[:self._left]
        # MSG_WAITALL saves system calls; but a text is checked as its bytes come
        count = self._source.readinto(view, 0 if self._decoder else socket.MSG_WAITALL)
        if not count:
            raise ShortBody("a message ended early")
        unmask = fastest_unmasking() if count > UNMASK_BYTES else unmask_by_numbers
        unmask(view[:count], self._mask)
        # rotate the mask, so that its first byte belongs to the next byte of the payload
        used = count % 4
        self._mask = self._mask[used:] + self._mask[:used]
        self._left -= count
        self._check_text(view[:count])
        return count

    def _read_head(self) -> None:
        """Read the head of the next fragment, or a whole control frame that precedes it."""
        source = self._source
        while (frame := parse_frame(source.peek(FRAME_HEAD_LIMIT_BYTES))) is None:
            if not source.fill():
                raise ShortBody("a message ended early")
        source.take(frame.head_size)
        if frame.opcode >= OP_CLOSE:
            if not source.need(frame.size):
                raise ShortBody("a control frame ended early")
            self._control(frame.opcode, unmasked(source.take(frame.size), frame.mask))
        elif frame.opcode != OP_CONTINUATION:
            raise CloseConnection("a message begins within another")
        else:
            self._begin_fragment(frame)
            # an empty last fragment ends the text, perhaps in the middle of a character
            self._check_text(b"")

    def _check_text(self, data: Any) -> None:
        """Raise CloseConnection if a text is not UTF-8, without waiting for the text's end."""
        if self._decoder is not None:
            try:
                self._decoder.decode(bytes(data), self._is_last and not self._left)
            except UnicodeDecodeError:
                raise CloseConnection("a text is no UTF-8", CLOSE_BAD_TEXT) from None


class Reply(NamedTuple):
    """The reply for an object: its result, the number of bytes delivered, or a failure."""

    opcode: int  # OP_BINARY, OP_TEXT; OP_CLOSE for a failure that closes the connection
    data: bytes  # with OP_CLOSE, the reason of the failure


class PendingObject:
    """An object that has come and whose reply has not been sent."""

    def __init__(self, request: ETLRequest, body: ReceivedObject) -> None:
        self.request = request
        self.body = body
        self.reply: Optional[Reply] = None


class ObjectExchange:
    """AIStore's protocol on one connection: messages become objects, and objects replies.

    An object comes as a control message in JSON and, unless that has an `fqn`, a second message
    with the object's bytes. The object is *pending* until its reply is sent.

    One thread at a time passes messages to `take`. That thread answers an object itself if it may
    call the class and no other object is pending. If the call takes long, `let_go` allows another
    thread to pass the messages behind the object. All other objects are answered on other threads,
    by `submit(function, argument)`.

    `send(replies, waits)` is called in the order of the objects, on any thread but never on two at
    once. `waits` tells whether `send` may wait for the client. `send` must not raise. `told()` is
    called after each object that `answer` has answered.

    The protocol has no message for a failure. So the reply for a failed object depends on how a
    target (AIStore 5.0) understands the reply:

    * For an object that is bound for another target, the reply is a binary message. The target
      takes that for the failure of this object.
    * For any other object, the connection must be closed, which fails the object. All objects
      behind it are lost. With ETL_WS_FAILURE=empty the reply is the text of a delivery of 0 bytes
      instead: the object is empty or missing, and the job goes on.
    """

    def __init__(self, service: Service, send: Callable[[Sequence[Reply], bool], None],
                 submit: Callable[[Callable[[Any], None], Any], None],
                 told: Callable[[], object]) -> None:
        self._service = service
        self._send = send
        self._submit = submit
        self._told = told
        self._awaited: Optional[ETLRequest] = None  # the object whose bytes come next
        self.pending: Deque[PendingObject] = collections.deque()
        self._is_inline = False  # whether the thread of `take` answers the only pending object
        self._is_sending = False
        self._lock = threading.Lock()  # of the three above

    @property
    def is_between_objects(self) -> bool:
        """Whether the next message begins an object."""
        return self._awaited is None

    @property
    def is_full(self) -> bool:
        """Whether so much is pending that no further message should be taken."""
        with self._lock:
            sizes = [len(each.reply.data) if each.reply else each.body.size
                     for each in self.pending]
        # 16 transforms run at once, so 64 objects are enough to keep them busy
        return len(sizes) >= 64 or sum(sizes) >= AHEAD_LIMIT_BYTES

    @property
    def next_name(self) -> str:
        """The name, for log lines, of the object that the next message belongs to."""
        return "a control message" if self._awaited is None else self._awaited.name

    def take(self, message: Union[bytes, ReceivedObject], may_call: bool) -> bool:
        """Take a message; if it completes an object, have the object answered.

        Returns False if `let_go` was called meanwhile: another thread passes messages now.
        """
        taken = self.pair(message)
        if taken is None:
            return True
        request = taken.request
        if may_call and len(self.pending) == 1 and not request.pipeline:
            loaded = self._service.load(request) if request.fqn else (request, taken.body)
            if loaded is not None:
                taken.request, taken.body = loaded
                return self._answer_inline(taken)
        self._hand_over(taken)
        return True

    def pair(self, message: Union[bytes, ReceivedObject]) -> Optional[PendingObject]:
        """Take a message; return the object that it completes, for `answer`, or None.

        Raises BadRequest for a malformed control message. No message behind it can be understood,
        since it is unknown whether the next one begins an object.
        """
        request, self._awaited = self._awaited, None
        if request is None:
            if isinstance(message, ReceivedObject):
                with message:
                    message = message.getvalue()
            try:
                value = json.loads(message)
            except (ValueError, RecursionError):
                value = None
            request = ETLRequest.from_message(value)
            if not request.fqn:
                self._awaited = request
                return None
            message = b""
        body = ReceivedObject(message) if isinstance(message, bytes) else message
        taken = PendingObject(request, body)
        with self._lock:
            self.pending.append(taken)
        return taken

    def let_go(self) -> bool:
        """Let another thread call `take`; return False if `take` is not answering an object."""
        with self._lock:
            was_inline, self._is_inline = self._is_inline, False
        return was_inline

    def _answer_inline(self, taken: PendingObject) -> bool:
        """Answer the only pending object; return False if `let_go` was called meanwhile."""
        self._is_inline = True
        reply = self._reply_to(taken)
        with self._lock:
            is_inline, self._is_inline = self._is_inline, False
            if is_inline:
                self.pending.popleft()
        if is_inline:
            self._send([reply], False)
        else:  # another thread sends the reply, as this one must not wait for the client
            taken.reply = reply
            self._hand_over(taken)
        return is_inline

    def _hand_over(self, taken: PendingObject) -> None:
        """Have another thread answer an object, or this thread if the system has no other."""
        try:
            self._submit(self.answer, taken)
        except (RuntimeError, MemoryError):
            self.answer(taken)

    def answer(self, taken: PendingObject) -> None:
        """Answer an object; send all replies that no unanswered object precedes.

        If another thread is sending, that thread sends these replies as well.
        """
        # `_answer_inline` may have made the reply
        taken.reply = taken.reply or self._reply_to(taken)
        while True:
            with self._lock:
                ready = list(itertools.takewhile(lambda each: each.reply, self.pending))
                if self._is_sending or not ready:
                    break
                self._is_sending = True
            self._send([cast(Reply, each.reply) for each in ready], True)
            with self._lock:
                self._is_sending = False
                for _ in ready:
                    self.pending.popleft()
        self._told()

    def _reply_to(self, taken: PendingObject) -> Reply:
        """Return the reply for an object, even if there is too little memory for an answer."""
        reply, error = attempt(self._answer, taken.request, taken.body)
        return reply if error is None else Reply(OP_CLOSE, type(error).__name__.encode())

    def _answer(self, request: ETLRequest, body: ReceivedObject) -> Reply:
        began = time.monotonic()
        with body:
            answer, content = self._service.answer_message(request, body)
        if logger.isEnabledFor(logging.DEBUG):
            log_request("/ws", request.name, answer.status, len(content), began)
        if answer.status == HTTPStatus.NO_CONTENT:
            return Reply(OP_TEXT, dict(answer.headers).get(HEADER_DIRECT_PUT_LENGTH, "0").encode())
        if answer.status < 300:
            return Reply(OP_BINARY, content)
        return self._failure(request, answer, content)

    def _failure(self, request: ETLRequest, answer: Answer, content: bytes) -> Reply:
        """Log a failure and return its reply, by the rules in the docstring of the class."""
        try:
            detail = json.loads(content)["detail"]
        except (ValueError, LookupError, TypeError, RecursionError):
            detail = None
        text = detail if isinstance(detail, str) else content.decode("utf-8", "replace")
        reason = self._service.settings.redact(" ".join(text.split()))
        if answer.origin:
            reason = f"the next hop, {answer.origin}, answered {answer.status}: {reason}"
        with contextlib.suppress(ValueError):  # the last entry of the pipeline may be no URL
            if is_final(request.pipeline.rpartition(",")[2].strip()):
                logger.error("%s: %s; reported to the target", request.name, reason)
                body = error_answer(HTTPStatus.INTERNAL_SERVER_ERROR, reason, {}).body
                return Reply(OP_BINARY, cast(bytes, body))
        if self._service.settings.ws_failure == "empty":
            logger.error("%s: %s; answered as if it were delivered", request.name, reason)
            return Reply(OP_TEXT, b"0")
        logger.error("%s: %s; its WebSocket connection is closed", request.name, reason)
        return Reply(OP_CLOSE, reason.encode("utf-8", "replace"))


class WebSocketConnection(Connection):
    """A connection that speaks AIStore's protocol over WebSocket.

    A small message is taken when it has come, by the thread that serves the connection. A large
    message is read by a thread of the pool, which may wait. A text is taken for its bytes: AIStore
    sends none, and nothing else could be meant. Replies that are made in one turn are sent
    together.

    The connection ends if the client closes it or, as AIStore does, just goes away; after an object
    has failed; or when the pod stops. The objects that have come before are answered first.
    """

    def __init__(self, connection: socket.socket, server: Any, source: ConnectionInput) -> None:
        super().__init__(connection, server, source)
        # a client may be silent for any time, so TCP must find out that it has vanished
        with contextlib.suppress(OSError):  # raised by macOS if the client is gone
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
        self._objects = ObjectExchange(server.service, self._reply, server.submit, self._go_on)
        # the frames that end the connection; once they are set, nothing more is read
        self._ending: Optional[Sequence[bytes]] = None
        self._is_paused = False
        self._queue: List[bytes] = []  # parts of frames that are to be sent
        self._size = 0  # about how many bytes of results the queue has
        self._lock = threading.Lock()  # of the three above, except that `_reply` adds to `_size`
        self._sending = threading.Lock()  # held while something is sent
        report(REPORT_OPENED)

    def attend(self, now: float, may_call: bool) -> Next:
        """Take the messages that have come, up to a large one."""
        self.since, self._calls_until = now, now + TURN_SECONDS if may_call else 0.0
        if self.receive() and not self.server.is_late:
            return self._take_messages(socket.MSG_DONTWAIT)
        if self._is_within_object:
            return self.fail(ShortBody("an object ended early"))
        # the client has gone, or the server itself has stopped reading
        return self._end([close_frame(CLOSE_GOING_AWAY)] if self.server.is_draining else [])

    def work(self) -> Next:
        """Send what is queued, then take messages, large ones too, or end."""
        self._calls_until = 0.0
        if self._ending and not self.is_over:
            self._put(self._ending)
        self._flush()
        return self._take_messages() if self._ending is None else Next.LINGER

    def dismiss(self) -> bool:
        """Send a close frame and return True, unless an object has begun to come or is pending."""
        if self._is_within_object or self._objects.pending or not super().dismiss():
            return False
        self._put([close_frame(CLOSE_GOING_AWAY)])
        self._flush(socket.MSG_DONTWAIT)
        return True

    def expire(self, now: float) -> Next:
        """End the connection if it is over, or the client has paused too long within an object."""
        if self.is_over:
            return self._end()
        if self._is_within_object and now - self.since > BODY_PAUSE_SECONDS:
            return self.fail(ShortBody("an object paused for too long"))
        return Next.READ

    def fail(self, error: BaseException) -> Next:
        """End the connection for an error; the objects that have come are answered first.

        If the error fails an object, a close frame alone would leave the target waiting for that
        object: see `_breaking_frames`.
        """
        if self._ending is not None:  # the end itself has failed
            return super().fail(error)
        if isinstance(error, CloseConnection):
            if str(error):
                logger.warning("a WebSocket connection is closed: %s", error)
            return self._end([close_frame(error.status, str(error))])
        if isinstance(error, (ShortBody, OSError)):
            if not self.server.is_late:
                logger.debug("a WebSocket connection broke off: %s", error)
                return self._end()
            # the server has stopped reading, so the client is not to blame
            error = RequestError("the pod is stopping")
        reason = self.server.service.settings.redact(describe(error))
        logger.error("%s: %s; its WebSocket connection is closed", self._objects.next_name, reason,
                     exc_info=None if isinstance(error, RequestError) else error)
        forget_traceback(error)
        code = CLOSE_TOO_BIG if isinstance(error, ObjectTooLarge) else CLOSE_FAILED
        return self._end(self._breaking_frames(code, reason))

    def let_go(self) -> bool:
        """Let another thread take messages if this one is held up by a call of the class."""
        super().let_go()
        return self._objects.let_go()

    def pause(self) -> bool:
        """Pause until replies are sent; return False if there is no need for that any more."""
        with self._lock:
            self._is_paused = self._must_pause
            return self._is_paused

    def close(self) -> None:
        """Tell the supervisor that the connection is closed."""
        report(REPORT_CLOSED)

    @property
    def _is_within_object(self) -> bool:
        """Whether the client has sent a part of an object or of a frame, and not the rest."""
        return bool(self.input.ahead) or not self._objects.is_between_objects

    @property
    def _must_pause(self) -> bool:
        """Whether replies must be sent before the connection takes messages again, or ends."""
        return bool(self._objects.pending) and (
            self._ending is not None or self._objects.is_full or self.server.is_crowded())

    def _end(self, ending: Sequence[bytes] = ()) -> Next:
        """Read nothing more; have `work` send the last frames once no object is pending."""
        self._ending = ending
        return Next.PAUSE

    # -- taking messages --

    def _take_messages(self, flags: int = 0) -> Next:
        """Take the messages that have come; with MSG_DONTWAIT, up to a large one."""
        while not (self.is_over or self._must_pause):
            message = self._next_message(flags)
            if message is None:
                return Next.READ if self._flush(flags) else Next.THREAD
            if isinstance(message, Frame):
                return Next.THREAD if flags else self._take_large(message)
            if not self._objects.take(message, time.monotonic() < self._calls_until):
                return Next.NOTHING
            if self._size >= WRITE_BYTES and not self._flush(flags):
                return Next.THREAD
        self._flush(flags)  # replies must not wait for what is pending
        return self._end() if self.is_over else Next.PAUSE

    def _next_message(self, flags: int) -> Union[bytes, Frame, None]:
        """Take the next small message, or return the head of a large one, or None.

        A small message is one binary frame of at most `UNMASK_BYTES`. Every other message counts as
        large, and its head stays in the buffer. None means that neither has come. Control frames on
        the way are answered.
        """
        source = self.input
        while source.ahead:
            frame = parse_frame(source.peek(FRAME_HEAD_LIMIT_BYTES))
            if frame is None:
                break
            if not frame.is_last or frame.opcode < OP_BINARY or frame.size > UNMASK_BYTES:
                return frame
            end = frame.head_size + frame.size
            if source.ahead < end:
                break
            payload = unmasked(source.take(end)[frame.head_size:], frame.mask)
            if frame.opcode == OP_BINARY:
                return payload
            self._take_control(frame.opcode, payload, flags)
        return None

    def _take_large(self, frame: Frame) -> Next:
        """Read a large message, let other threads take those behind it, and answer its object.

        Until its transform begins, the message has a share of `message_room`, which bounds the
        memory of all connections together.
        """
        self._flush()
        if frame.opcode == OP_CONTINUATION:
            raise CloseConnection("there is no message to be continued")
        self.input.take(frame.head_size)
        room = self.server.service.message_room
        control = functools.partial(self._take_control, flags=socket.MSG_DONTWAIT)
        stream = MessageStream(self.input, frame, control, room.check)
        taken = self._objects.pair(WaitingBody(room, stream).load())
        if taken is None:
            return Next.THREAD
        # from `settle` on, another thread may serve the connection
        wish = Next.THREAD if self.input.ahead else Next.READ
        self.server.settle(self, Next.PAUSE if self._must_pause else wish)
        self._objects.answer(taken)
        return Next.NOTHING

    def _take_control(self, opcode: int, payload: bytes, flags: int = 0) -> None:
        """Answer a ping by a pong; raise CloseConnection for a close frame.

        With MSG_DONTWAIT, pongs may stay queued. Since no more is received until they are sent,
        they take little memory. A client's own pong needs no answer.
        """
        if opcode == OP_CLOSE:
            raise CloseConnection("", parse_close(payload))
        if opcode == OP_PING:
            self._put([frame_head(OP_PONG, len(payload)), payload])
            self._flush(flags)

    # -- sending --

    def _reply(self, replies: Sequence[Reply], waits: bool) -> None:
        """Queue replies and, if this thread may wait, send them."""
        parts: List[bytes] = []
        for reply in replies:
            if self.is_over:  # the client has gone, or a failed object ends the connection
                break
            if reply.opcode == OP_CLOSE:
                parts += self._breaking_frames(CLOSE_FAILED, reply.data.decode("utf-8"))
                self.is_over = True
            else:
                parts += (frame_head(reply.opcode, len(reply.data)), reply.data)
                self._size += len(reply.data)
        self._put(parts)
        if waits:
            self._flush()
        else:  # the leader has called the class, and counts its calls
            self.server.turn += 1

    def _breaking_frames(self, code: int, reason: str) -> Sequence[bytes]:
        """Return the frames that fail an object: half a message and a close frame.

        Also tells the supervisor the reason.
        """
        report(REPORT_BROKEN + " ".join(reason.split()).encode("utf-8", "replace"))
        return [frame_head(OP_BINARY, 0, is_last=False), close_frame(code, reason)]

    def _go_on(self) -> None:
        """Go on after a pause, or end, now that an object has been answered."""
        with self._lock:
            goes_on = self._is_paused and not self._must_pause
            if goes_on:
                self._is_paused = False
        if goes_on:
            self.server.settle(self, Next.THREAD)
        elif self.is_over:
            self.server.sweep_soon()

    def _put(self, parts: Sequence[bytes]) -> None:
        """Queue whole frames."""
        with self._lock:
            self._queue += parts

    def _flush(self, flags: int = 0) -> bool:
        """Send what is queued; with MSG_DONTWAIT, return False if something is left."""
        if not self._queue or not self._sending.acquire(blocking=not flags):
            return not self._queue
        rest: Sequence[Any] = ()
        try:
            while self._queue:
                with self._lock:
                    rest, self._queue, self._size = self._queue, [], 0
                while rest:
                    rest = send_some(self.socket, rest, flags)
        except OSError as error:
            # without MSG_DONTWAIT, BlockingIOError means that the client has not read for too long
            if not flags or not isinstance(error, BlockingIOError):
                logger.debug("a WebSocket connection broke off: %s", error)
                self.is_over, rest = True, ()
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads
        finally:
            with self._lock:
                self._queue[:0] = rest
            self._sending.release()
        return not self._queue


# == 16. Server ==
# A listening socket, its connections of both protocols, and a pool of threads. One thread leads: it
# selects over all connections, and itself serves whatever is quick. The pool serves what must wait.


class ThreadPool:
    """Threads that are started as needed, up to a limit, and kept until the process ends.

    A job is a function and its argument. The function must not raise.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: queue.SimpleQueue[Tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._is_short = False  # whether the last thread could not be started
        self.busy = 0  # jobs that run or wait

    def submit(self, function: Callable[[Any], None], argument: Any) -> None:
        """Take a job; raise RuntimeError or MemoryError if there is no thread to do it."""
        with self._lock:
            if self._threads < min(self.busy + 1, self._limit):
                self._start_thread()
            self.busy += 1
            self._jobs.put((function, argument))

    def _start_thread(self) -> None:
        """Start another thread; if that fails, raise only if there is no thread at all."""
        try:
            threading.Thread(target=self._serve, name="etl", daemon=True).start()
            self._threads, self._is_short = self._threads + 1, False
        except (RuntimeError, MemoryError) as error:
            if not self._is_short:  # the log tells of each shortage once
                logger.error("%d threads serve connections, and another cannot be started: %s",
                             self._threads, error)
            self._is_short = True
            if not self._threads:
                raise

    def _serve(self) -> None:
        while True:
            error = attempt(*self._jobs.get()).error
            if error is not None:
                logger.error("a thread failed", exc_info=error)
            del error  # its traceback may hold large objects, and the next job may be far
            with self._lock:
                self.busy -= 1


class Waker:
    """A pair of sockets; a byte in it wakes the thread that selects on `readable`.

    Other threads wake it by `wake`, and signals do after `wake_on`. The interpreter runs signal
    handlers on the main thread alone, which may be computing or waiting for a lock. So `wake_on`
    has the interpreter also write a signal's number to a socket, and the selecting thread reads it.
    """

    def __init__(self) -> None:
        self.readable, self._writable = socket.socketpair()
        self.readable.setblocking(False)
        self._writable.setblocking(False)
        self.signals: FrozenSet[int] = frozenset()  # the signals that `take` looks for
        self._forking = threading.local()  # `mask`: signals that were blocked before a fork

    def wake(self) -> None:
        """Wake the thread."""
        with contextlib.suppress(BlockingIOError):  # the socket is full of earlier wake-ups
            self._writable.send(b"\0")

    def wake_on(self, signals: Iterable[int], handle: Callable[[], None]) -> None:
        """Have signals wake the thread and call `handle`. Call this on the main thread."""
        self.signals = frozenset(signals)
        signal.set_wakeup_fd(self._writable.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda *_: handle())
        os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork,
                            after_in_child=self._leave)

    # A process that the class forks inherits the handlers and the socket, so a signal to that child
    # would stop this process. Therefore signals are blocked during a fork, until the child has
    # default handlers and no longer writes to the socket.

    def _before_fork(self) -> None:
        # two calls: if a handler of the class raises within the second, the old mask is stored
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _leave(self) -> None:
        # in the child
        signal.set_wakeup_fd(-1)
        for number in self.signals:
            signal.signal(number, signal.SIG_DFL)
        self._after_fork()

    def take(self) -> bool:
        """Take the wake-ups; return whether one of `signals` is among them."""
        try:
            numbers = self.readable.recv(READ_BYTES)
        except BlockingIOError:  # a former leader has taken them
            return False
        return bool(self.signals.intersection(numbers))  # the class may handle others


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serve the connections of a listening socket; idle ones hold no thread.

    The thread of `serve_forever` leads: it selects over the listener and all connections, and
    serves them by `attend`. A connection that must wait goes to a thread of the pool, which serves
    it by `work` and then registers it with the selector again. A call of the class may turn out to
    be slow. So another thread, the deputy, watches the leader. If a turn makes no progress for
    `LEAD_SECONDS`, the deputy leads, without calling the class, until the leader is back.

    If the class must be called on the main thread, that thread leads, and also makes the calls that
    other threads ask for. In a *turn* the leader serves one connection or makes one such call. A
    *term* is the time in which one thread leads; a thread whose term is over begins no turn.
    """

    def __init__(self, listener: socket.socket, service: Service,
                 main_thread: Optional[MainThread] = None) -> None:
        socketserver.BaseServer.__init__(self, listener.getsockname()[:2], cast(Any, None))
        self.socket = listener  # `server_close` closes it
        self.service = service
        self.application: Any = None  # a WSGIApplication, if the class has one
        self.is_draining = False  # whether the pod is stopping: only begun requests are answered
        self.is_late = False  # whether clients that still send are no longer waited for
        self.connections: Set[Connection] = set()
        self.ready: Callable[[], object] = lambda: None  # called before the first request
        # ends the process if the main thread is still held up at the end
        self.leave: Callable[[], object] = lambda: None
        self._main = main_thread or MainThread()  # the thread that calls `serve_forever`
        self._pace = Pace()
        self._pool = ThreadPool(THREAD_LIMIT)
        self.submit = self._pool.submit
        self._share = Current.share or Share.allot(1)[0]
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._patience = SWEEP_SECONDS  # the time between two sweeps
        self._next_sweep = 0.0
        self._drain_began = 0.0
        self._is_busy = threading.Event()  # set while the leader is not selecting
        self._has_ended = False  # whether `serve_forever` has returned
        # guards the selector and the four below
        self._lock = threading.RLock()
        self._term = 0  # counts the changes of the leader
        self._is_in_turn = False
        self._current: Optional[Connection] = None  # the connection that the leader serves
        self.turn = 0  # counts turns, and also the calls of the class within them

    # -- the lead --

    def serve_forever(self, poll_interval: float = SWEEP_SECONDS) -> None:
        """Lead the server until `drain`, then until all begun requests are answered."""
        self._publish()  # a worker that seems absent would leave its first connection to others
        self._selector.register(self._waker.readable, selectors.EVENT_READ)
        self.ready()
        self.socket.setblocking(False)
        self._selector.register(self.socket, selectors.EVENT_READ)
        self._main.wake = self._waker.wake
        with contextlib.suppress(RuntimeError):  # without a deputy, slow calls hold others up
            threading.Thread(target=self._watch, name="deputy", daemon=True).start()
        while not self._is_done:
            self._lead(self._take_lead())
            while self._main.calls:  # the deputy leads meanwhile
                self._main.make_call()
        self._has_ended = True

    @property
    def _is_done(self) -> bool:
        """Whether the server has drained, or the time for that is over."""
        if not self._drain_began:
            return False
        has_drained = self.socket.fileno() < 0 and not self.connections
        return has_drained or time.monotonic() > self._drain_began + WORKER_GRACE_SECONDS

    def _take_lead(self) -> int:
        """Make the calling thread the leader; return its term.

        If the former leader is serving a connection, that thread keeps the connection, and the
        selector forgets it.
        """
        with self._lock:
            if self._current is not None:
                self._selector.unregister(self._current.socket)
            self._is_in_turn, self._current = False, None
            self._term += 1
            term = self._term
        self._waker.wake()  # a deputy that leads notices that its term is over
        return term

    def _watch(self) -> None:
        """Be the deputy, on a thread of its own: lead whenever the leader is held up."""
        while True:
            self._is_busy.wait()
            turn = self.turn
            time.sleep(LEAD_SECONDS)
            with self._lock:
                if not self._is_in_turn or self.turn != turn:
                    continue
                held = self._current
                term = self._take_lead()
                self._pace.hand_over(LEAD_SECONDS, time.monotonic())
                goes_on = held is not None and held.let_go()  # the lock keeps its turn from ending
            if goes_on:
                self.settle(cast(Connection, held), Next.THREAD)
            error = attempt(self._lead, term, True).error
            if error is not None:
                logger.error("the deputy leader failed", exc_info=error)
            if self._is_done:
                time.sleep(10 * LEAD_SECONDS)  # the leader may be about to return
                if not self._has_ended:
                    self.leave()

    def _lead(self, term: int, is_deputy: bool = False) -> None:
        """Serve what is readable until the term is over or the server is done.

        The deputy does not call the class, since nobody watches the deputy.
        """
        calls = () if is_deputy else self._main.calls
        # `_watch` waits for the leader's event; nobody waits for one of the deputy
        is_busy = threading.Event() if is_deputy else self._is_busy
        while self._term == term:
            is_busy.clear()
            events = self._selector.select(0 if calls else self._patience)
            is_busy.set()
            looks_around = time.monotonic() >= self._next_sweep
            for key, _ in events:
                if key.data is None:  # the listener or the waker
                    looks_around = True
                elif not self._serve(key.data, term, not is_deputy):
                    return
            if calls and not self._take_turn(None, term, self._main.make_call):
                return
            if looks_around:
                self._look_around(events, term)
                if self._is_done:
                    return

    def _serve(self, connection: Connection, term: int, may_call: bool) -> bool:
        """Serve a readable connection and note the pace; return False if the lead is lost."""
        began, turn = time.monotonic(), self.turn + 1
        may_call = may_call and not self.service.is_streaming and self._pace.is_quick(began)
        has_lead = self._take_turn(connection, term, connection.attend, began, may_call)
        # `_take_turn` adds 1 to `self.turn`, and each call of the class adds 1 more
        calls = self.turn - turn
        if may_call and has_lead and calls:
            now = time.monotonic()
            self._pace.note((now - began) / calls, now)
        return has_lead

    def _take_turn(self, connection: Optional[Connection], term: int, serve: Callable[..., Any],
                   *args: Any) -> bool:
        """Take a turn: call `serve`, for a registered connection or for none.

        Returns False if the lead is lost. If it was lost before, nothing is called. If it is lost
        meanwhile, the new leader has unregistered the connection, and this thread settles it.
        """
        with self._lock:
            if self._term != term:
                return False
            self.turn += 1
            self._current, self._is_in_turn = connection, True
        wish = serve(*args) if connection is None else self._wish_after(connection, serve, *args)
        with self._lock:
            has_lead = self._term == term
            if has_lead:
                self._is_in_turn, self._current = False, None
                if connection is not None and wish is not Next.READ:
                    self._selector.unregister(connection.socket)
        if connection is not None and (wish is not Next.READ or not has_lead):
            self.settle(connection, wish)
        return has_lead

    def _wish_after(self, connection: Connection, serve: Callable[..., Next], *args: Any) -> Next:
        """Serve a connection; return what it wants next, or how it ends if that fails."""
        try:
            wish = serve(*args)
        except Exception as error:
            wish = connection.fail(error)
        if wish is Next.READ and self.is_draining and connection.dismiss():
            return Next.CLOSE
        return wish

    # -- connections --

    def settle(self, connection: Connection, wish: Next) -> None:
        """Do what a connection wants next; it must not be registered with the selector."""
        if wish is Next.READ:
            connection.since = time.monotonic()
            with self._lock:
                self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            # a sweep does not see a connection that ends while it is not registered
            if connection.is_over:
                self.sweep_soon()
        elif wish is Next.THREAD or (wish is Next.PAUSE and not connection.pause()):
            try:
                self.process_request(connection, None)
            except (RuntimeError, MemoryError):  # there is no thread; the client may try again
                self._close(connection)
        elif wish in (Next.UPGRADE, Next.LINGER):
            # the supervisor must hear of a WebSocket connection's end before the client sees it
            connection.close()
            kind = WebSocketConnection if wish is Next.UPGRADE else LingeringConnection
            successor = kind(connection.socket, self, connection.input)
            self.connections.add(successor)
            self.connections.discard(connection)
            self.settle(successor, Next.THREAD if successor.input.ahead else Next.READ)
        elif wish is Next.CLOSE:
            self._close(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread of the pool serve a connection."""
        self.submit(self._work, request)

    def _work(self, connection: Connection) -> None:
        self.settle(connection, self._wish_after(connection, connection.work))

    def _close(self, connection: Connection) -> None:
        """Close a connection, by a reset if a cut answer could be taken for a whole one."""
        connection.close()
        self.connections.discard(connection)
        self._publish()
        if connection.is_cut:
            # with SO_LINGER set to 0 seconds, close() resets the connection
            at_once = struct.pack("ii", True, 0)
            with contextlib.suppress(OSError):  # the client may be gone
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        close = self.close_request if connection.is_cut else self.shutdown_request
        close(connection.socket)

    def _publish(self) -> None:
        """Tell the other workers how many connections this one has."""
        if not self._drain_began:
            self._share.publish(len(self.connections))

    def sweep_soon(self) -> None:
        """Have the leader look at once for connections that are over."""
        self._next_sweep = 0.0
        self._waker.wake()

    def may_upgrade(self) -> bool:
        """Return whether one more connection may become a WebSocket connection."""
        return not self.is_draining and len(self._websockets()) < WEBSOCKET_LIMIT

    def is_crowded(self) -> bool:
        """Return whether more than half of the threads are busy.

        Then a WebSocket connection has only one object answered at a time.
        """
        return self._pool.busy > THREAD_LIMIT // 2

    # -- the leader's other duties --

    def _look_around(self, events: Sequence[Tuple[selectors.SelectorKey, int]], term: int) -> None:
        """Handle wake-ups, signals to stop, new connections, and those whose time is over."""
        ready = [key.fileobj for key, _ in events if key.data is None]
        with self._lock:
            if self._term != term:  # the events are for the thread that leads now
                return
            if self._waker.readable in ready and self._waker.take():
                self.is_draining = True
            begins_to_drain = self.is_draining and not self._drain_began
            if begins_to_drain:
                self._drain_began = time.monotonic()
        if begins_to_drain:
            self._begin_drain(term)
        elif self.socket in ready:
            # 8 connections more than another worker has, if both may be busy
            self._accept_some(8 if len(events) > CROWD_LIMIT // 2 else 0, term)
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + self._patience
            self._sweep(now, term)

    def _sweep(self, now: float, term: int) -> None:
        """End connections whose time is over and, during a drain, those that are idle."""
        late = self._drain_began + WEBSOCKET_DRAIN_SECONDS
        self.is_late = self._drain_began > 0 and now > late
        for connection in self._websockets() if self.is_late else ():
            # a thread that waits for the client then reads the end of the input
            with contextlib.suppress(OSError):  # the client may be gone
                connection.socket.shutdown(socket.SHUT_RD)
        for connection in self._registered():
            if not self._take_turn(connection, term, connection.expire, now):
                self._next_sweep = 0.0  # the thread that leads now sweeps instead
                return
        self.service.close_idle()

    def _websockets(self) -> List[Connection]:
        return [each for each in list(self.connections) if isinstance(each, WebSocketConnection)]

    def _registered(self) -> List[Connection]:
        with self._lock:
            return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _accept_some(self, excess: int, term: int) -> None:
        """Accept waiting connections, of which other workers should have their share.

        Accepts at least one, and stops when this worker has more than `excess` connections beyond
        another worker, or after `CROWD_LIMIT`.
        """
        if self._share.excess > excess:
            time.sleep(0.001)  # another worker may be faster then
        for _ in range(CROWD_LIMIT):
            if not self._accept(term) or self._share.excess > excess:
                return

    def _accept(self, term: int) -> bool:
        """Accept a connection; return False if none waits or none can be accepted."""
        try:
            accepted, _ = self.socket.accept()
        except OSError as error:
            # another worker was faster, or another thread leads now and has closed the listener
            if error.errno not in (errno.EAGAIN, errno.EBADF):
                logger.error("a connection could not be accepted: %s", error)
            if error.errno in OUT_OF_RESOURCES:  # otherwise the client has gone already
                self._make_room(term)
            return False
        try:
            connection = HTTPConnection(accepted, self)
        except OSError:  # raised by macOS if the client has gone at once
            accepted.close()
            return True
        self.connections.add(connection)
        self._publish()
        self.settle(connection, Next.READ)
        return True

    def _make_room(self, term: int) -> None:
        """Close up to a quarter of the idle HTTP connections, those that are idle longest.

        If none is idle, wait a moment, since the listener stays readable.
        """
        idle = [connection for connection in self._registered()
                if isinstance(connection, HTTPConnection) and connection.dismiss()]
        idle.sort(key=lambda connection: connection.since)
        for connection in idle[:min(CROWD_LIMIT, len(idle) // 4 + 1)]:
            # a request may have come meanwhile
            self._take_turn(connection, term, lambda each=connection: (
                Next.CLOSE if each.dismiss() else Next.READ))
        if not idle:
            time.sleep(0.05)

    # -- the end --

    def drain_on(self, signals: Iterable[int]) -> None:
        """Have signals drain the server. Call this on the main thread."""
        self._waker.wake_on(signals, self.drain)

    def drain(self) -> None:
        """Stop accepting, answer the requests that have begun to come, close idle connections.

        Returns at once. Any thread may call this, also within a signal handler.
        """
        self.is_draining = True
        self._waker.wake()

    def _begin_drain(self, term: int) -> None:
        """Accept the connections that the kernel has let in, then close the listener."""
        self._patience, self._next_sweep = DRAIN_LOOK_SECONDS, 0.0
        self._share.leave()
        for _ in range(BACKLOG):
            if not self._accept(term):
                break
        with self._lock:
            self._selector.unregister(self.socket)
        self.server_close()
        # if another thread leads by now, it may be selecting with the old patience
        self._waker.wake()


# == 17. Frameworks ==
# Classes with an application of their own: uvicorn serves one of FastAPI, the built-in server one
# of Flask. All other classes need nothing of this section, and no framework is imported for them.


class PieceBody(MessageBody):
    """The body of a request that another server, or an application, receives.

    `take` waits for the next piece of the body and returns it, or b"" at the end. `length` is the
    value of Content-Length, if there is one.
    """

    def __init__(self, take: Callable[[], bytes], length: Optional[str]) -> None:
        super().__init__(cast(ConnectionInput, None))
        self.size = int(length) if length else None
        self._take = take
        self._piece = memoryview(b"")  # what is unread of the current piece

    def receive(self, buffer: Any) -> int:
        """Read some bytes of the current piece, or of the next one."""
        if not self._piece:
            piece, error = attempt(self._take)
            if error is not None:
                raise self._cut(f"broke off: {describe(error)}")
            if not piece and self.size not in (None, self.count):
                raise self._cut(f"ended after {self.count} of {self.size} bytes")
            self._piece = memoryview(piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count


def request_of_app(method: str, path: str, raw_path: str, query: str,
                   pipeline: str) -> ETLRequest:
    """Parse a request for the object at `path`, which the class may have changed.

    `raw_path` is the path as the client sent it, which is used if it still means `path`.
    """
    if decode_escapes(raw_path)[1:] != path:
        raw_path = "/" + quote(path)
    return ETLRequest.parse(method, f"{raw_path}?{query}" if query else raw_path, pipeline)


def failure_of_user(what: str, error: BaseException) -> StartupError:
    """Return the StartupError for an exception of the user's code, with its traceback."""
    if isinstance(error, StartupError):
        return error
    kind = PackageError if package_of(error) else ClassError
    failure = kind(f"{what} failed: {describe_of_user(error, has_type=True)}")
    return with_story(failure, what, error)


def prepare_framework(name: str, serves: bool, may_install: bool) -> None:
    """Import a framework, and first install it if it is missing and `may_install`.

    With `serves`, this includes the modules that serve its applications. Runs before workers are
    forked, so that they share the memory of these modules. Raises StartupError.
    """
    wanted = modules_of(name, serves)
    missing = sorted({requirement for module, requirement in wanted if not is_here(module)})
    if missing and not may_install:
        raise PackageError(f"the class needs {name}: {pip_command(missing)}")
    if missing:
        try:
            install_python_packages(",".join(missing), why=name)
        except PackageError as error:
            raise PackageError(
                f"the class needs {' and '.join(missing)}, which this image does not have and pip "
                f"cannot install: bake it in with docker build --build-arg EXTRAS={name}, or let "
                f"PACKAGES or pip's own variables name a source that can be reached; "
                f"{error}") from None
    for module, _ in wanted:
        problem = attempt(importlib.import_module, module).error
        if problem is not None:
            raise failure_of_user(f"the import of {module}", problem)


# -- FastAPI, by uvicorn --


def body_of_starlette(request: Any) -> PieceBody:
    """Return the body of a request; the thread of the event loop must not read it.

    At the end of a body of which the application has taken a part, a read raises, since the object
    would be cut.
    """
    import asyncio

    loop, pieces, count = asyncio.get_running_loop(), request.stream(), 0
    came = request.scope.get("etl.request")  # None in a server that the class has started itself

    async def next_piece() -> bytes:
        async for piece in pieces:
            return cast(bytes, piece)
        return b""

    def take() -> bytes:
        nonlocal count  # not the body's own: a cycle would keep whole objects in memory
        piece = asyncio.run_coroutine_threadsafe(next_piece(), loop).result(BODY_PAUSE_SECONDS)
        count += len(piece)
        if not piece and came is not None and count < came.count:
            raise OSError("the application has taken some of it")
        return piece

    return PieceBody(take, request.headers.get("content-length"))


@functools.lru_cache(maxsize=1)
def piece_response_class() -> Any:
    """Define the class of responses in pieces, once; Starlette must be installed."""
    from starlette.responses import StreamingResponse

    class PieceResponse(StreamingResponse):  # type: ignore[misc]
        """A response in pieces, which are closed if the client leaves.

        Starlette's own would also receive messages of the request, in order to notice that. But
        the class may read the request while it answers.
        """

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await self.stream_response(send)
            finally:
                await self.body_iterator.aclose()
            if self.background is not None:
                await self.background()

    return PieceResponse


def starlette_response(answer: Answer, threads: Any, name: str) -> Any:
    """Return the Starlette response for an answer; the pieces of its body are made on `threads`."""
    import asyncio

    from starlette.responses import Response

    async def pieces() -> Any:
        body = answer.body or iter(())  # an empty result is sent in chunks: see Answer.is_open
        take = functools.partial(
            asyncio.get_running_loop().run_in_executor, threads, attempt, next, body, b"")
        try:
            piece, error = await take()
            while piece:
                yield piece
                piece, error = await take()
            if error is not None:
                log_cut(name, error)
                raise AnswerCut
        finally:
            threads.submit(attempt, answer.__exit__)

    fields = {field: UNPRINTABLE.sub("?", value) for field, value in answer.headers}
    if isinstance(answer.body, bytes) and not answer.is_open:
        return Response(answer.body, answer.status, fields)
    return piece_response_class()(pieces(), answer.status, fields)


async def answer_starlette(service: Service, threads: Any, path: str, request: Any) -> Any:
    """Answer a Starlette request for an object by a Starlette response.

    Runs on the event loop; `threads` are an executor on which everything runs that waits.
    """
    import asyncio

    loop, scope, fields = asyncio.get_running_loop(), request.scope, request.headers
    raw_path, query = scope.get("raw_path", b""), scope["query_string"]
    try:
        parsed = request_of_app(
            request.method, path, raw_path.decode("latin-1"), query.decode("latin-1"),
            ", ".join(fields.getlist(HEADER_NODE_URL)))
        if parsed.is_message:  # a request for /ws that is no handshake: this raises the 426
            upgrade_answer({})
    except RequestError as error:
        answer = error_answer(error.status, str(error), error.headers)
    else:
        body = body_of_starlette(request)
        answer = await loop.run_in_executor(threads, service.answer, parsed, body)
    return starlette_response(answer, threads, scope["path"])


class ASGIWebSocket:
    """One connection that speaks AIStore's protocol through uvicorn.

    uvicorn's loop takes messages; threads of a pool answer their objects.
    """

    def __init__(self, service: Service, pool: ThreadPool, receive: Any, send: Any) -> None:
        import asyncio

        self._service = service
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._has_answered = asyncio.Event()
        told = functools.partial(attempt, self._loop.call_soon_threadsafe, self._has_answered.set)
        self._objects = ObjectExchange(service, self._reply, pool.submit, told)
        self._last_came = 0.0  # when the last message came, by time.monotonic()
        self._is_over = False

    async def serve(self, connections: Set[ASGIWebSocket]) -> None:
        """Accept the connection, take messages until it ends; it is in `connections` meanwhile."""
        await self._receive()  # "websocket.connect"
        await self._send({"type": "websocket.accept"})
        report(REPORT_OPENED)
        connections.add(self)
        try:
            while (message := await self._receive())["type"] == "websocket.receive":
                self._last_came = time.monotonic()
                if not self._is_over:
                    await self._take(message.get("bytes") or (message.get("text") or "").encode())
        finally:
            connections.remove(self)
            self._is_over = True
            report(REPORT_CLOSED)

    @property
    def is_idle(self) -> bool:
        """Whether all messages are answered, and none has come for a moment."""
        is_done = self._objects.is_between_objects and not self._objects.pending
        seconds = time.monotonic() - self._last_came
        return is_done and not self._is_over and seconds > DRAIN_LOOK_SECONDS

    async def close(self) -> None:
        """Close the connection; may wait for long if the client does not read."""
        self._is_over = True
        await self._send({"type": "websocket.close", "code": CLOSE_GOING_AWAY})

    def fail(self, reason: str) -> None:
        """End the connection in a way that a target takes for the failure of an object.

        ASGI cannot send half a message, so the frames go directly to uvicorn's transport.
        """
        if self._is_over:
            return
        self._is_over = True
        report(REPORT_BROKEN + " ".join(reason.split()).encode("utf-8", "replace"))
        transport = self._send.__self__.transport
        if not transport.is_closing():
            beginning = frame_head(OP_BINARY, 0, is_last=False)
            transport.write(beginning + close_frame(CLOSE_FAILED, reason))
            # if the connection closed at once, a client that still sends might lose these frames
            self._loop.call_later(DRAIN_SECONDS, transport.close)

    async def _take(self, data: bytes) -> None:
        """Take one message; return once another one may be taken."""
        refusal = ""
        try:
            # False: the loop's thread must not call the class
            self._objects.take(ReceivedObject(data), False)
        except BadRequest as error:
            refusal = self._service.settings.redact(str(error))
        # before a refusal ends the connection, the objects that have come are answered
        while self._objects.pending and (refusal or self._objects.is_full):
            self._has_answered.clear()
            await self._has_answered.wait()
        if refusal:
            name = self._objects.next_name
            logger.error("%s: %s; its WebSocket connection is closed", name, refusal)
            self.fail(refusal)

    def _reply(self, replies: Sequence[Reply], waits: bool) -> None:
        """Send replies and wait until they are sent; runs on a thread of the pool."""
        import asyncio

        sending = self._send_replies(replies)
        # this fails if the client has gone, or if the loop has ended
        attempt(lambda: asyncio.run_coroutine_threadsafe(sending, self._loop).result())
        sending.close()

    async def _send_replies(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            if reply.opcode == OP_CLOSE:
                self.fail(reply.data.decode("utf-8"))
            elif reply.opcode == OP_TEXT and not self._is_over:
                await self._send({"type": "websocket.send", "text": reply.data.decode()})
            elif not self._is_over:
                await self._send({"type": "websocket.send", "bytes": reply.data})


def marking_failures(app: Any) -> Any:
    """Wrap an ASGI application so that an answer is marked if it fails after its beginning.

    The wrapper stands below each middleware of the class, since Starlette's BaseHTTPMiddleware
    completes an answer even if the application below has failed. ASGIRequest sends no more of a
    marked answer.
    """
    async def marked_app(scope: Any, receive: Any, send: Any) -> None:
        is_half = False

        async def send_on(message: Any) -> None:
            nonlocal is_half
            is_half = True
            await send(message)

        try:
            await app(scope, receive, send_on)
            is_half = False
        finally:
            if is_half and "etl.request" in scope:
                scope["etl.request"].has_failed = True

    return marked_app


def add_fastapi_routes(server: FastAPIServer, service: Service) -> None:
    """Add routes for objects and `/health` behind the application's own routes."""
    from concurrent.futures import ThreadPoolExecutor

    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def answer(request: Any) -> Any:
        path, is_get = request.path_params["path"], request.method == "GET"
        return await server._handle_request(path, request, is_get)

    threads = ThreadPoolExecutor(THREAD_LIMIT, "etl")
    vars(server)[ANSWER] = functools.partial(answer_starlette, service, threads)
    route = functools.partial(Route, include_in_schema=False)
    health = route("/health", PlainTextResponse("Running"), methods=["GET"])
    # ETLRequest.parse knows the methods of each path
    objects = route("/{path:path}", answer, methods=["GET", "PUT", "POST"])
    # Starlette's pattern matches no line feed, which an object's name may have
    objects.path_regex = re.compile(r"(?s)/(?P<path>.*)\Z")
    server.app.router.routes.extend([health, objects])
    layers = [(each, Middleware(marking_failures)) for each in server.app.user_middleware]
    server.app.user_middleware[:] = itertools.chain(*layers)


class ASGIRequest:
    """The messages of one request, between uvicorn and the application."""

    def __init__(self, scope: Any, cycle: Any) -> None:
        scope["etl.request"] = self
        self.cycle = cycle  # uvicorn's RequestResponseCycle
        self.count = 0  # bytes of the body that were received
        self.status = self.size = 0  # of the answer: its status, and bytes that were sent
        self.has_failed = False  # whether the answer has begun and will not become whole

    async def receive(self) -> Any:
        """Receive the next message and count the bytes of the body."""
        message = await self.cycle.receive()
        self.count += len(message.get("body", b""))
        return message

    async def send(self, message: Any) -> None:
        """Send a message; raise AnswerCut if the client has left or the answer is marked."""
        self.status = message.get("status", self.status)
        self.size += len(message.get("body", b""))
        if not self.has_failed:
            await self.cycle.send(message)
        if self.has_failed or self.cycle.disconnected:
            raise AnswerCut


def has_body(fields: Mapping[bytes, bytes]) -> bool:
    """Tell from a request's header fields whether it has a body."""
    return b"transfer-encoding" in fields or fields.get(b"content-length", b"0") != b"0"


async def error_of(call: Any) -> Optional[BaseException]:
    """Await a coroutine that runs users' code; return the exception that it raises, or None."""
    try:
        await call
    except BaseException as error:
        return error
    return None


def protocol_on(base: Any) -> Any:
    """Derive a class from uvicorn's HTTP protocol, `base`, that corrects two of its rules."""
    class Protocol(base):  # type: ignore[misc]
        """A connection with two rules of our own.

        A request that has a body does not upgrade it. A client that has closed its own side after a
        whole request is still answered.
        """

        def _should_upgrade(self) -> bool:
            return bool(super()._should_upgrade()) and not has_body(dict(self.headers))

        def eof_received(self) -> Optional[bool]:
            """Return True, which keeps the connection open, if a whole request is unanswered."""
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                return cast(Optional[bool], super().eof_received())
            self.cycle.keep_alive = False
            return True

    return Protocol


class UvicornServer:
    """Serve a class's application by uvicorn, whose loop runs on a thread of its own.

    The thread of `serve_forever` makes the calls of the class that the main thread must make. The
    server itself is the application that uvicorn knows: it answers `/health` and `/ws`, and has the
    class's application answer the rest. uvicorn bounds the size of a WebSocket message, but neither
    the memory of all messages together nor the time for the head of a request.
    """

    def __init__(self, listener: socket.socket, server: FastAPIServer, service: Service,
                 main_thread: MainThread) -> None:
        import uvicorn

        self.ready: Callable[[], object] = lambda: None  # called before the first request
        # ends a process that has not begun to serve, or whose main thread is held up at the end
        self.leave: Callable[[], object] = lambda: None
        self._name = type(server).__name__
        self._listener = listener
        self._waker = Waker()
        self._main = main_thread
        self._bell = threading.Semaphore(0)  # released when calls come, and at uvicorn's end
        main_thread.wake = self._bell.release
        self._has_begun = False  # whether the application has started up
        self._outcome: Optional[Outcome] = None  # of uvicorn, once it has ended
        self._has_made_calls = threading.Event()  # set once the last call has been made
        self._failure: Optional[BaseException] = None  # of the application's start-up or shutdown
        self._service = service
        self._pool = ThreadPool(THREAD_LIMIT)  # for objects over WebSocket
        self._websockets: Set[ASGIWebSocket] = set()
        add_fastapi_routes(server, service)
        self._app = server.app
        self._config = uvicorn.Config(
            self, lifespan="on", proxy_headers=False, server_header=False, access_log=False,
            # at INFO, uvicorn would log that it starts and stops
            log_config=None, log_level=max(logger.level, logging.WARNING),
            backlog=BACKLOG, timeout_keep_alive=int(IDLE_SECONDS),
            h11_max_incomplete_event_size=HEAD_LIMIT_BYTES, ws_per_message_deflate=False,
            ws_max_size=memory_limit(), ws_max_queue=1, ws_ping_interval=None,
            ws_ping_timeout=None)
        self._config.load()
        self._config.http_protocol_class = protocol_on(self._config.http_protocol_class)
        self._uvicorn = uvicorn.Server(self._config)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; connections inherit it
            milliseconds = int(RESULT_UNREAD_SECONDS * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def serve_forever(self) -> None:
        """Serve until a signal of `drain_on`, then finish the requests that have begun.

        Raises StartupError if the application's start-up or shutdown fails.
        """
        threading.Thread(target=self._run, name="uvicorn", daemon=True).start()
        while self._outcome is None or self._main.calls:
            self._bell.acquire()
            while self._main.calls:
                self._main.make_call()
        self._has_made_calls.set()
        failure = self._failure or self._outcome.error
        if failure is not None:
            what = "shutdown" if self._has_begun else "start-up"
            raise failure_of_user(f"{self._name}'s {what}", failure)

    def drain_on(self, signals: Iterable[int]) -> None:
        """Have signals drain the server. Call this on the main thread."""
        self._waker.wake_on(signals, self._handle_signal)

    def _handle_signal(self) -> None:
        """End the process if it is still starting up, which may take long; else see `_drain`."""
        if not self._has_begun:
            self.leave()

    def _run(self) -> None:
        """Run uvicorn to its end; runs on a thread of its own."""
        self._outcome = attempt(self._uvicorn.run, [self._listener])
        self._bell.release()
        # a call of the class may hold up the main thread
        if self._has_begun and not self._has_made_calls.wait(10 * LEAD_SECONDS):
            self.leave()

    def _begin(self) -> None:
        """Begin to serve; runs on uvicorn's loop, once the application has started up."""
        import asyncio

        self._draining = asyncio.ensure_future(self._drain())  # kept, or it might be collected
        self.ready()
        self._has_begun = True

    async def _drain(self) -> None:
        """Wait for a signal, then stop accepting and finish what has begun.

        WebSocket connections are closed once their objects are answered; when time is up, the
        objects of the rest fail.
        """
        import asyncio

        # uvicorn opens its listeners after the application's start-up, so after `_begin`
        while not (self._uvicorn.started and self._waker.take()):
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        began = time.monotonic()
        for server in self._uvicorn.servers:
            server.close()
        while self._websockets and time.monotonic() < began + WEBSOCKET_DRAIN_SECONDS:
            idle = [each.close() for each in self._websockets if each.is_idle]
            asyncio.gather(*idle, return_exceptions=True)  # not awaited: a client may not read
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        for connection in self._websockets:
            connection.fail("the pod is stopping")
        seconds = began + WORKER_GRACE_SECONDS - time.monotonic()
        self._config.timeout_graceful_shutdown = max(1, int(seconds))
        self._uvicorn.should_exit = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, one WebSocket connection, or the application's lifespan."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, send.__self__)
        elif scope["path"] != "/ws":
            await self._app(scope, receive, send)
        elif len(self._websockets) >= WEBSOCKET_LIMIT:
            await send({"type": "websocket.close"})
        else:
            connection = ASGIWebSocket(self._service, self._pool, receive, send)
            await connection.serve(self._websockets)

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application's start-up and shutdown; keep a failure for `serve_forever`."""
        async def send_on(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._begin()
            await send({"type": message["type"]})  # a failure's text would be logged twice

        self._failure = await error_of(self._app(scope, receive, send_on))
        if self._failure is not None:
            raise self._failure

    async def _serve(self, scope: Any, cycle: Any) -> None:
        """Answer one request; uvicorn cuts the connection if an answer is not complete after it."""
        import asyncio

        request, began = ASGIRequest(scope, cycle), time.monotonic()
        error = await error_of(self._app_for(scope)(scope, request.receive, request.send))
        log_request(scope["method"], scope["path"], request.status, request.size, began)
        # uvloop raises RuntimeError for a connection that is closed
        is_of_client = isinstance(error, (OSError, RuntimeError)) and (
            cycle.disconnected or cycle.transport.is_closing())
        if isinstance(error, asyncio.CancelledError):
            logger.error("%s: the answer was cut: the pod is stopping", scope["path"])
            cycle.transport.abort()
            await asyncio.sleep(0)  # lets uvicorn notice
        elif error is not None and not (isinstance(error, AnswerCut) or is_of_client):
            log_user_error(scope["path"], error)

    def _app_for(self, scope: Any) -> Any:
        """Return what answers a request: the class's application, or a response of ours.

        Ours answer health probes, and refuse requests whose body uvicorn would misread.
        """
        from starlette.responses import PlainTextResponse

        fields, closing = dict(scope["headers"]), {"connection": "close"}
        coding = fields.get(b"transfer-encoding", b"").lower()
        if (scope["path"], scope["method"]) == ("/health", "GET"):
            return PlainTextResponse("Running")
        if coding and (coding != b"chunked" or scope["http_version"] == "1.0"):
            return PlainTextResponse("the Transfer-Encoding is not supported", 501, closing)
        offers = b"upgrade" in fields and b"upgrade" in fields.get(b"connection", b"").lower()
        if offers and has_body(fields):
            return PlainTextResponse("an upgrade cannot come with a body", 400, closing)
        return self._app


# -- Flask, by WSGI --


class WSGIResponse:
    """The response of a WSGI application to one request (PEP 3333)."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._environ = environ
        self.status = 0
        self.fields: List[Tuple[str, str]] = []
        self.size: Optional[int] = None  # the value of Content-Length, if the application sets it
        self._written: List[bytes] = []  # through `write`, and not yielded yet
        self._count = 0  # bytes that were yielded

    @property
    def has_body(self) -> bool:
        """Whether the client expects a body."""
        return self._environ["REQUEST_METHOD"] != "HEAD" and self.status not in BODILESS

    def start(self, status: str, fields: Sequence[Tuple[str, str]], exc_info: Any = None) -> Any:
        """Be the application's `start_response`; return its `write`."""
        if exc_info and self._count:
            raise exc_info[1].with_traceback(exc_info[2])
        if (self.status and not exc_info) or not "200" <= status[:3] <= "599":
            raise AssertionError(f"start_response({status!r}) comes again, or with a bad status")
        self.status, self.fields = int(status[:3]), list(fields)
        lengths = [int(value) for name, value in fields if name.lower() == "content-length"]
        self.size = lengths[0] if lengths else None
        return self._written.append

    def pieces(self, application: Any, body: MessageBody) -> Iterator[bytes]:
        """Call the application and yield its output; raise if output or body is not whole."""
        output = application(self._environ, self.start)
        try:
            # the empty piece at the end stands for what `write` has taken since the last piece
            for piece in itertools.chain(output, (b"",)):
                written, self._written[:] = [*self._written, piece], []
                data = b"".join(as_bytes(each, "the application yielded") for each in written)
                if not self.status:
                    raise AssertionError("the application has not called start_response()")
                self._count += len(data)
                self._check_size(self.size is not None and self._count > self.size)
                if data:
                    yield data
            # the application may have caught the error of a body that was cut
            if self.status < 400:
                body.raise_failure()
            self._check_size(self.size not in (None, self._count))
        finally:
            error = attempt(getattr(output, "close", lambda: None)).error
            if error is not None:  # too late for another answer
                log_user_error(self._environ["RAW_URI"], error)

    def _check_size(self, is_wrong: bool) -> None:
        if is_wrong and self.has_body:
            raise ValueError(
                f"the answer has {self._count} bytes, and its Content-Length is {self.size}")


# Header fields that the server sets; an application's values are dropped.
SERVER_FIELDS = frozenset((
    "connection", "content-length", "date", "keep-alive", "te", "trailer", "transfer-encoding",
    "upgrade"))


class WSGIApplication:
    """Answer requests of the built-in server by a class's WSGI application.

    The server itself answers `/ws`, and health probes unless the class overrides `_health`.
    """

    def __init__(self, server: FlaskServer, service: Service) -> None:
        self._server = server
        self._service = service

    def asked(self, head: Head,
              connection: socket.socket) -> Optional[Callable[[MessageBody], Answer]]:
        """Return a function that answers a request, given its body; None if the server answers."""
        path, query = split_target(head.method, head.target)
        is_health = (head.method, path) == ("GET", "/health")
        is_ours = is_health and type(self._server)._health is FlaskServer._health
        if is_ours or path == "/ws" or not path.startswith("/"):
            return None
        request = ETLRequest(head.method, path, query)
        return functools.partial(self._answer, request, head, connection)

    def _answer(self, request: ETLRequest, head: Head, connection: socket.socket,
                body: MessageBody) -> Answer:
        answer, error = attempt(lambda: self._ask(self._environ(request, head, connection), body))
        return answer if error is None else self._service.answer_failure(request, error)

    def _environ(self, request: ETLRequest, head: Head,
                 connection: socket.socket) -> Dict[str, Any]:
        """Return the environ of a request (PEP 3333), without its body."""
        host, port = connection.getsockname()[:2]
        peer = peer_of(connection)
        # a name with "_" is left out, since it would become the same key as one with "-"
        fields = {"HTTP_" + name.upper().replace("-", "_"): value
                  for name, value in head.fields.items() if "_" not in name}
        for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            if f"HTTP_{name}" in fields:
                fields[name] = fields.pop(f"HTTP_{name}")
        path = unquote_to_bytes(request.raw_path.encode("latin-1")).decode("latin-1")
        return {
            **fields, "REQUEST_METHOD": head.method, "SCRIPT_NAME": "", "PATH_INFO": path,
            "QUERY_STRING": request.query, "RAW_URI": head.target, "REQUEST_URI": head.target,
            "SERVER_NAME": host, "SERVER_PORT": str(port),
            "SERVER_PROTOCOL": "HTTP/1.0" if head.is_http_1_0 else "HTTP/1.1",
            "REMOTE_ADDR": peer[0], "REMOTE_PORT": str(peer[1]), "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr, "wsgi.multithread": True,
            "wsgi.multiprocess": self._service.settings.workers > 1, "wsgi.run_once": False,
            "wsgi.input_terminated": True}

    def _ask(self, environ: Dict[str, Any], body: MessageBody) -> Answer:
        """Call the application up to its first piece; until then, a status can tell a failure."""
        environ["wsgi.input"] = io.BufferedReader(cast(Any, body), READ_BYTES)
        environ["etl.input"] = environ["wsgi.input"]
        response = WSGIResponse(environ)
        pieces: Any = guarded(response.pieces(self._server.app, body))
        first = next(pieces, b"")
        output = chain_first(first, pieces) if first else b""
        if not response.has_body:
            output = b""
            pieces.close()
        elif response.size == len(first):  # no piece follows, but the application must end
            output = first + b"".join(pieces)
        fields = tuple((str(name), str(value)) for name, value in response.fields
                       if name.lower() not in SERVER_FIELDS)
        return Answer(response.status, output, fields, response.size)


def body_of_flask(request: Any) -> RequestBody:
    """Return the body of an object's request, even if a hook of the class has read it whole.

    Raises RequestError if the application has read a part of the body: the object would be cut.
    """
    ours = request.environ.get("etl.input")
    if ours is request.environ["wsgi.input"]:  # else another server or middleware has made it
        body = cast(MessageBody, ours.raw)
        if body.count:
            data = getattr(request, "_cached_data", b"")
            if len(data) != body.count or not body.is_at_end:
                raise RequestError("the application has read the object and not kept all of it")
            return ReceivedObject(data)
        if request.max_content_length is None:
            return body
    stream = request._get_stream_for_parsing()  # a hook may have read it whole, by get_data()
    return PieceBody(lambda: stream.read(READ_BYTES), request.environ.get("CONTENT_LENGTH"))


def answer_flask(service: Service, path: str) -> Any:
    """Answer the current request of Flask, which is for an object, on the calling thread."""
    import flask

    environ = flask.request.environ
    method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
    raw_path, _ = split_target(method, environ.get("RAW_URI", ""))
    try:
        pipeline = environ.get("HTTP_AIS_NODE_URL", "")
        request = request_of_app(method, path, raw_path, query, pipeline)
        answer = service.answer(request, body_of_flask(flask.request))
    except RequestError as error:
        answer = error_answer(error.status, str(error), error.headers)
    fields = [(field, UNPRINTABLE.sub("?", value)) for field, value in answer.headers]
    body: Any = (answer.body or iter(())) if answer.is_open else answer.body
    return flask.Response(body, answer.status, fields)


def add_flask_routes(server: FlaskServer, service: Service) -> None:
    """Add routes for objects and `/health`; the application's own rules win."""
    import flask
    from werkzeug.routing import BaseConverter

    class AnyName(BaseConverter):  # type: ignore[misc]
        """Match any object's name, which may have slashes and line feeds anywhere."""

        # the weight puts the rule behind all rules of the application
        regex, part_isolating, weight = "(?s:.+)", False, 1000

    app = server.app
    if type(app).log_exception is flask.Flask.log_exception:
        app.log_exception = lambda *args: log_user_error(flask.request.path, args[-1][1])
    vars(server)[ANSWER] = functools.partial(answer_flask, service)
    # a body that is cut raises RequestError, which is no failure of the application
    app.register_error_handler(RequestError, lambda error: (str(error), error.status))
    if "etl_object" in app.view_functions:
        return
    app.url_map.converters["etl_name"] = AnyName
    app.add_url_rule("/health", "etl_health", lambda: server._health(), methods=["GET"])
    # ETLRequest.parse knows the methods of each path
    app.add_url_rule("/<etl_name:path>", "etl_object", lambda path: server._handle_request(path),
                     methods=["GET", "PUT", "POST"])


# == 18. Workers ==
# Processes: workers construct the class and serve it; the supervisor forks the workers, watches
# them, replaces those that die, and stops them.


# -- how a process ends --


def flush_output() -> None:
    """Flush stdout and stderr, before this process forks, executes a program or exits at once.

    After a fork, both processes would write what was buffered; the other two would lose it.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()


def exit_now(code: int) -> NoReturn:
    """End this process at once; write the reason of a failed start last, if there is one."""
    attempt(flush_output)
    if Current.last_line:  # not through sys.stdout, which the class may have closed
        with contextlib.suppress(OSError):
            os.write(Current.output, f"{Current.last_line}\n".encode("utf-8", "replace"))
    os._exit(code)


def descendants() -> List[int]:
    """Return the ids of the processes that this program has started, directly or indirectly.

    They are read from /proc; where there is none, the list is empty. In a worker, every member of
    its process group counts, so that orphans are found. Two kinds of processes are left out: those
    older than this program, which a shell started before it executed this program in its own place;
    and the resource tracker of multiprocessing, which cleans up after all others.
    """
    own = os.getpid()
    group = own if os.getpgrp() == own and Current.reports is not None else 0
    ticks = os.sysconf("SC_CLK_TCK")  # per second
    table: Dict[int, Tuple[int, int, float]] = {}  # by process id: parent, group, start in seconds
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            table[int(name)] = int(fields[1]), int(fields[2]), int(fields[19]) / ticks
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", 0)
    found: Set[int] = set()
    more = {own}
    while more:
        found |= more
        more = {pid for pid, (parent, of_group, began) in table.items() if began >= Current.began
                and (parent in found or (group and of_group == group))} - found
        more.discard(getattr(tracker, "_pid", 0))
    return sorted(found - {own})


def end_children() -> None:
    """End the processes that the class has started."""
    pids: Set[int] = set()

    def send(number: int) -> bool:
        # keep the ids between calls: after a parent has ended, its child may not be found again
        pids.update(descendants() if number else ())
        # reap the children that have ended: the signal below would still reach a zombie
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        for pid in tuple(pids):
            try:
                os.kill(pid, number)
            except OSError:
                pids.discard(pid)
        return bool(pids)

    end_all(send, CHILDREN_SECONDS)


def finish_threads() -> None:
    """Have executors finish their tasks; wait up to 0.2 s for other threads."""
    # concurrent.futures registers its functions here, and not with atexit
    for hook in reversed(getattr(threading, "_threading_atexits", ())):
        attempt(hook)
    deadline = time.monotonic() + 0.2
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("the class's thread %s still runs and is not waited for",
                               thread.name)


def start_timer(seconds: float, function: Callable[..., Any], *args: Any) -> None:
    """Call a function on a thread after some seconds; do nothing if no thread can be started."""
    timer = threading.Timer(seconds, function, args)
    timer.daemon = True
    with contextlib.suppress(RuntimeError, MemoryError):
        timer.start()


def leave(code: int, seconds: float) -> NoReturn:
    """End this process as Python does: wait for threads, call `atexit` functions, end children.

    After `seconds` the process ends at once. Child processes, and threads other than those of
    executors, have less time. A thread other than the main one calls this function only if the main
    thread is held up; then no thread is waited for. Unlike Python, this function does not tear down
    modules: libraries that complain then would write many lines after the reason of a failed start.
    """
    import atexit

    start_timer(seconds, exit_now, code)
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        attempt(finish_threads)
    util = sys.modules.get("multiprocessing.util")
    end_multiprocessing = getattr(util, "_exit_function", lambda: None)
    atexit.unregister(end_multiprocessing)  # it waits for children, so it is called last, below
    attempt(atexit._run_exitfuncs)
    # for children that do not end by themselves
    start_timer(CHILDREN_SECONDS, attempt, end_children)
    attempt(end_multiprocessing)
    attempt(end_children)
    exit_now(code)


def drop_inherited_cleanup() -> None:
    """Make a forked worker forget the clean-up that the supervisor does.

    When the class's module was loaded, it may have made temporary folders or multiprocessing
    processes; pip may have filled a folder. All workers share these, so a worker that ends must
    leave them alone.
    """
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        finalizer.atexit = False
    for name, attribute in (("util", "_finalizer_registry"), ("process", "_children")):
        getattr(sys.modules.get(f"multiprocessing.{name}"), attribute, set()).clear()


def end_with_supervisor() -> None:
    """End this worker and its children when the supervisor ends.

    The supervisor never writes to the socket that its reports come from: the read returns when the
    supervisor ends, which closes the socket. A thread of each worker runs this.
    """
    with contextlib.suppress(ConnectionResetError):  # the supervisor has not read all reports
        os.read(cast(int, Current.reports), 1)
    attempt(end_children)
    os._exit(Exit.SOFTWARE)


# -- serving an instance --


def bind(host: str, port: int) -> socket.socket:
    """Return a TCP socket that is bound and does not listen yet.

    An empty host stands for all interfaces: of IPv6 and IPv4, or of IPv4 if that is all there is.
    """
    takes_both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host or takes_both else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
    try:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(host))
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortError(f"port {port} of {host or 'all interfaces'} cannot be listened on: "
                        f"{error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL by which clients reach a listening socket."""
    host, port = listener.getsockname()[:2]
    host = "0.0.0.0" if host == "::" else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_service(server: ETLServer, settings: Settings, slots: Slots) -> Service:
    """Return the Service of an instance; all instances share one pool of connections to nodes."""
    Current.pool = Current.pool or ConnectionPool(settings)
    return Service(settings, server, Current.pool, slots)


def make_front(listener: socket.socket, server: ETLServer,
               settings: Settings) -> Union[UvicornServer, Server]:
    """Return the server that serves an instance on a listening socket.

    Call this function on the thread that made the instance. Methods of framework classes are called
    on that thread alone, unless NUM_THREADS is greater than 1.
    """
    has_app = vars(server).get(APP) is not None
    by_uvicorn = has_app and isinstance(server, FastAPIServer)
    is_one = isinstance(server, FrameworkServer) and settings.threads in (None, 1)
    main_thread = MainThread() if is_one or by_uvicorn else None
    slots = (main_thread if main_thread and is_one
             else ThreadSlots(settings.threads or 16))  # they share the GIL, but may wait for I/O
    service = make_service(server, settings, slots)
    if main_thread and by_uvicorn:
        return UvicornServer(listener, cast(FastAPIServer, server), service, main_thread)
    front = Server(listener, service, main_thread)
    if has_app:
        add_flask_routes(cast(FlaskServer, server), service)
        front.application = WSGIApplication(cast(FlaskServer, server), service)
    return front


def add_routes(server: ETLServer, settings: Settings) -> None:
    """Add the routes for objects to the application of a class that starts its own server."""
    has_app = vars(server).get(APP) is not None
    if has_app and vars(server).get(ANSWER) is None:
        add = add_fastapi_routes if isinstance(server, FastAPIServer) else add_flask_routes
        add(cast(Any, server), make_service(server, settings, ThreadSlots(settings.threads or 1)))


def serve_instance(server: ListeningServer) -> None:
    """Serve an instance until SIGTERM, on the calling thread; raise StartupError on failure.

    A worker serves on the supervisor's socket. Any other process binds a socket of its own.
    """
    def begin() -> None:
        # until now the system refuses connections, so a readiness probe fails and does not wait
        try:
            listener.listen(BACKLOG)
        except OSError as error:
            port = listener.getsockname()[1]
            raise PortError(f"port {port} cannot be listened on: {error.strerror}") from None
        if Current.reports is None:
            logger.info("serving on %s", url_of(listener))
        report(REPORT_READY)

    settings = Current.settings or Settings()
    if Current.is_loading:
        raise ClassError("the file starts a server when it is imported: put that below "
                         "if __name__ == '__main__'")
    listener = Current.listener or bind(server.host, server.port)
    front = make_front(listener, server, settings)
    front.ready = begin
    if threading.current_thread() is threading.main_thread():
        front.drain_on(STOP_SIGNALS if Current.reports is None else (signal.SIGTERM,))
    if Current.reports is not None:
        front.leave = functools.partial(leave, Exit.OK, LEAVE_SECONDS)
    error = attempt(front.serve_forever).error
    if isinstance(error, StartupError):
        raise error
    if error is not None:
        logger.error("the server failed", exc_info=error)
        raise StartupError(f"the server failed: {describe(error)}")


def reseed() -> None:
    """Give this worker random numbers of its own.

    After the fork, the generators of all workers have the same state. The standard library reseeds
    its own generator after a fork; these libraries do not.
    """
    seed = int.from_bytes(os.urandom(4), "big")
    for name, function in (("numpy.random", "seed"), ("torch", "manual_seed"),
                           ("tensorflow", "random.set_seed")):
        if name in sys.modules:
            found = attempt(operator.attrgetter(function), sys.modules[name])
            attempt(found.value, seed)


def report_failure(error: BaseException) -> int:
    """Tell the supervisor why this worker ends; return the exit code."""
    code = error.exit if isinstance(error, StartupError) else Exit.SYSTEM
    redact = (Current.settings or Settings()).redact
    # redact before the cut: half of a secret would not be recognized
    reason, story = redact(describe(error))[:2000], redact(getattr(error, "story", ""))[:20_000]
    told = code, reason, story, getattr(error, "framework", ""), getattr(error, "serves", False)
    line = REPORT_FAILED + json.dumps(told).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        while line:  # a signal may end a long write half-way
            line = line[os.write(cast(int, Current.reports), line):]
    return code


def reported_failure(text: str) -> StartupError:
    """Return the failure that a worker has told by `report_failure`."""
    code, reason, story, framework, serves = json.loads(text)
    failure = FrameworkNeeded(framework, serves) if framework else StartupError(reason)
    failure.exit, failure.story = Exit(code), story
    return failure


def call_user(what: str, function: Callable[[], T]) -> T:
    """Call the user's code during start-up; raise StartupError if it fails."""
    value, error = attempt(function)
    if error is not None:
        raise failure_of_user(what, error)
    return cast(T, value)


def construct(etl_class: Type[ETLServer]) -> Any:
    """Return an instance of the class; raise a StartupError if its constructor fails."""
    name = etl_class.__name__
    server = call_user(f"{name}()", etl_class)
    if not hasattr(server, "use_streaming"):
        raise ClassError(f"{name}.__init__() does not call super().__init__()")
    return server


def run_worker(load: Callable[[], Type[ETLServer]]) -> None:
    """Construct the class and serve it until SIGTERM; raise StartupError if that fails.

    `load` returns the class, and loads it if the supervisor has not.
    """
    threading.Thread(target=end_with_supervisor, name="life", daemon=True).start()
    etl_class = load()
    reseed()
    server, settings = construct(etl_class), Current.settings or Settings()
    if Current.listener is None:
        add_routes(server, settings)
    elif getattr(server, "port", settings.port) != settings.port:
        logger.warning("%s asks for port %d, but PORT decides: %d", etl_class.__name__,
                       server.port, settings.port)
    call_user(f"{etl_class.__name__}.start()", server.start)


# -- whether a process can be forked --


def trial_fork_ends() -> bool:
    """Fork a child that ends at once; return False if the child fails or does not end in time."""
    import warnings

    deadline = time.monotonic() + TRIAL_FORK_SECONDS
    with contextlib.suppress(OSError):  # as ChildProcessError, if the class ignores SIGCHLD
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forks in a process with threads
            pid = os.fork()
        if pid == 0:
            os._exit(0)
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status == 0
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return False


def has_threads() -> bool:
    """Return whether this process has other threads; on Linux, also those unknown to Python."""
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) > 1 if os.path.isdir(tasks) else threading.active_count() > 1


def may_be_forked() -> bool:
    """Return whether this process can be forked now that the class is loaded.

    A forked child has only the thread that forked. If another thread held a lock at that moment,
    the lock stays held in the child forever. Numerical libraries therefore end their threads before
    a fork, and start them again when needed. A trial fork shows whether all threads are like that.
    """
    if not has_threads():
        return True
    if not sys.platform.startswith("linux"):  # a thread may be using a system library
        return False
    with stop_signals_deferred():
        return trial_fork_ends() and not has_threads()


# -- the supervisor --


class Served(NamedTuple):
    """What the supervisor knows about the class that its workers serve."""

    name: str
    server: str  # the framework that must serve it; "" if only its constructor can tell
    has_own_start: bool  # it overrides `start`, and so serves by itself, in one process


def how_it_ended(code: int) -> str:
    """Put the exit code of a process into words; a negative code is that of a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
    return f"was ended by {name}" + (" (probably out of memory)" if name == "SIGKILL" else "")


class Worker:
    """The supervisor's record of one worker process."""

    def __init__(self, pid: int, reports: socket.socket, slot: int) -> None:
        self.pid = pid
        self.reports = reports  # the supervisor's end of the connection for its reports
        self.slot = slot  # the lowest number that no other worker has
        self.told: Set[bytes] = set()  # the kinds of reports that have come
        self.websockets = 0  # connections that are open
        self.failure: Optional[StartupError] = None
        self.rest = b""  # the beginning of a report whose end has not come yet

    @property
    def is_idle(self) -> bool:
        """Whether the worker serves and has never had a request."""
        return REPORT_READY in self.told and REPORT_BEGUN not in self.told


class Supervisor:
    """Keep `NUM_WORKERS` processes serving a class until SIGTERM or SIGINT.

    The supervisor owns the listening socket, forks the workers, and replaces those that die. If a
    worker cannot construct the class at the start, the pod ends with the reason. As PID 1 of a
    container, the supervisor also reaps the orphans of the user's subprocesses.

    It has one thread, which waits in one place, the selector: for reports of the workers and for
    signals, whose handlers only count. A dead worker is replaced after a delay that doubles with
    each death in a row. The death of a worker that had answered a request begins a new row. After
    DEATHS_LIMIT deaths in a row the pod ends, unless a living worker has answered a request.
    Workers notice the supervisor's own death by the end of the connection for their reports.
    """

    def __init__(self, settings: Settings, served: Served, load: Callable[[], Type[ETLServer]],
                 announce: Callable[[str], None]) -> None:
        self._settings = settings
        self._served = served
        self._load = load
        self._announce = announce  # called with the URL once a worker is ready
        self._count = 1 if served.has_own_start else settings.workers
        self._listener: Optional[socket.socket] = None
        self._workers: Dict[int, Worker] = {}  # by process id
        self._due = [0.0] * self._count  # when to start each worker that is missing
        self._deaths = 0  # in a row
        self._has_begun = False  # whether all workers were ready at the same time
        self._deadline = 0.0  # for the workers to end, once they are told to stop; 0.0 before
        self._failure: Optional[StartupError] = None  # why the pod ends
        self._breakage = ""  # the last failure that has closed a WebSocket connection
        self._forsaken_at = 0.0  # when the pod ends because of that failure; 0.0 if it goes on
        self._stops = 0  # signals to stop, so far
        self._last_stop = 0.0  # when the last of them came
        self._shares = Share.allot(self._count)
        self._is_announced = False
        self._waker = Waker()
        self._selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Serve; return the exit code, or raise the StartupError that ends the pod."""
        if not self._served.has_own_start:
            self._listener = bind(self._settings.host, self._settings.port)
            self._settings = self._settings._replace(port=self._listener.getsockname()[1])
        Current.settings = self._settings
        self._take_signals()
        while self._workers or self._due:
            self._start_due()
            moments = [*self._due, *filter(None, (self._deadline, self._forsaken_at))]
            seconds = max(0.0, min(moments) - time.monotonic()) if moments else None
            for key, _ in self._selector.select(seconds):
                if key.data is None:
                    self._waker.take()
                else:
                    self._read_reports(key.data)
            self._reap()
            self._look_at_websockets()
            self._stop_in_time()
        self._close()
        # a pod that is told to stop needs no framework any more: that is no failure
        if not self._failure or (self._stops and isinstance(self._failure, FrameworkNeeded)):
            return Exit.OK
        raise self._failure

    def _take_signals(self) -> None:
        """Have signals wake the selector; the handlers only count."""
        def count() -> None:
            now = time.monotonic()
            if now - self._last_stop > 0.3:  # else the signal came to the process and its group
                self._stops += 1
                self._last_stop = now

        self._handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._waker.wake_on(STOP_SIGNALS, count)
        self._selector.register(self._waker.readable, selectors.EVENT_READ, None)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # any handler has it wake the selector

    def _close(self) -> None:
        """Release everything for a supervisor that may follow."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._waker.signals = frozenset()  # its hooks for forks stay, and now do nothing
        self._selector.close()

    # -- starting --

    def _start_due(self) -> None:
        """Start the workers whose time has come."""
        now = time.monotonic()
        while self._due and min(self._due) <= now:
            self._due.remove(min(self._due))
            self._start_worker()

    def _start_worker(self) -> None:
        slot = min(set(range(self._count)) - {worker.slot for worker in self._workers.values()})
        ends: List[socket.socket] = []
        try:
            ends += socket.socketpair()
            ends[1].setblocking(True)  # whatever socket.setdefaulttimeout() the class has called
            flush_output()
            pid = os.fork()  # no signal reaches our handlers in the child: see Waker
            if not pid:
                self._become_worker(slot, *ends)
        except OSError as error:  # memory, processes or files are used up, perhaps for a moment
            for end in ends:
                end.close()
            return self._start_later(f"a worker cannot be started: {error.strerror}")
        reports, reporter = ends
        reporter.close()
        reports.setblocking(False)
        self._workers[pid] = Worker(pid, reports, slot)
        self._selector.register(reports, selectors.EVENT_READ, self._workers[pid])

    def _become_worker(self, slot: int, reports: socket.socket,
                       reporter: socket.socket) -> NoReturn:
        """Release what belongs to the supervisor, serve, and end; runs in the forked child."""
        code: int = Exit.SOFTWARE
        try:
            if not os.isatty(0):  # else a debugger in the worker could not read the terminal
                os.setpgid(0, 0)  # by this group the supervisor ends what the class starts
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # a terminal sends Ctrl-C to all processes, but the supervisor alone decides
            signal.signal(signal.SIGINT, lambda *_: None)
            self._waker.signals = frozenset()  # its hooks for forks stay, and now do nothing
            self._selector.close()
            for end in (reports, *[worker.reports for worker in self._workers.values()]):
                end.close()
            if Current.output >= 0:
                os.close(Current.output)  # the supervisor writes the last line
            drop_inherited_cleanup()
            Current.reports, Current.listener = reporter.fileno(), self._listener
            Current.share = self._shares[slot]
            error = attempt(run_worker, self._load).error
            code = Exit.OK if error is None else report_failure(error)
        finally:
            leave(code, GRACE_SECONDS if code == Exit.OK else LEAVE_SECONDS)

    # -- watching --

    def _read_reports(self, worker: Worker) -> None:
        """Read the reports of a worker that have come."""
        with contextlib.suppress(BlockingIOError):
            while text := worker.reports.recv(READ_BYTES):
                *lines, worker.rest = (worker.rest + text).split(b"\n")
                for line in lines:
                    self._take_report(worker, line[:1], line[1:].decode("utf-8", "replace"))
            if worker.reports in self._selector.get_map():  # their end would stay readable
                self._selector.unregister(worker.reports)

    def _take_report(self, worker: Worker, kind: bytes, text: str) -> None:
        worker.told.add(kind)
        if kind == REPORT_OPENED:
            worker.websockets += 1
        elif kind == REPORT_CLOSED:
            worker.websockets -= 1
            self._forsaken_at = 0.0  # the wait for another connection begins anew
        elif kind == REPORT_BROKEN:
            self._breakage = text
        elif kind == REPORT_READY and not self._deadline:
            self._note_ready()
        elif kind == REPORT_FAILED:
            worker.failure = reported_failure(text)

    def _note_ready(self) -> None:
        """Announce the URL once a worker is ready; note when all of them are."""
        if not self._is_announced:
            self._is_announced = True
            listener = self._listener
            self._announce(
                url_of(listener) if listener else f"http://0.0.0.0:{self._settings.port}")
        ready = [worker for worker in self._workers.values() if REPORT_READY in worker.told]
        if len(ready) == self._count:
            self._has_begun = True
            logger.debug("all workers are ready")

    def _reap(self) -> None:
        """Reap every child that has ended, adopted ones too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            worker = self._workers.pop(pid, None)
            if worker is not None:
                self._lose(worker, os.waitstatus_to_exitcode(status))

    def _lose(self, worker: Worker, code: int) -> None:
        """Replace a worker that has ended, or end the pod if the pod's start has failed."""
        self._read_reports(worker)
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.reports)
        worker.reports.close()
        self._shares[worker.slot].leave()
        signal_group(worker.pid, signal.SIGTERM)  # what its class has started
        why = f"worker {worker.pid} {worker.failure or how_it_ended(code)}"
        if worker.websockets:
            self._breakage = why
        if worker.failure is not None and not (self._has_begun or self._deadline):
            return self._fail(worker.failure)
        if worker.failure is not None and self._failure is None:
            logger.error(worker.failure.story or str(worker.failure), extra=WITH_LINES)
        if self._deadline:
            return
        if REPORT_ANSWERED in worker.told:
            self._deaths = 0
        self._start_later(why, code == -signal.SIGKILL and worker.is_idle)

    def _start_later(self, why: str, was_idle: bool = False) -> None:
        """Start a worker after the delay that the deaths in a row demand, or end the pod."""
        self._deaths += 1
        if was_idle:  # neither the class nor an object killed the worker: no reason to give up
            self._deaths = min(self._deaths, DEATHS_LIMIT - 1)
        if self._served.has_own_start:  # the pod is this one process
            return self._fail(StartupError(why))
        for worker in self._workers.values():
            self._read_reports(worker)  # its first answer may have come since the last look
        has_answered = any(REPORT_ANSWERED in worker.told for worker in self._workers.values())
        if self._deaths >= DEATHS_LIMIT and not has_answered:
            return self._fail(StartupError(
                f"{why}, the {self._deaths}th in a row that never answered a request"))
        delay = min(0.05 * 2 ** min(self._deaths, 10), RESPAWN_DELAY_LIMIT_SECONDS)
        logger.error("%s; starting another in %.1f s", why, delay)
        self._due.append(time.monotonic() + delay)

    def _look_at_websockets(self) -> None:
        """End a pod that has lost a WebSocket connection by a failure, and has none for a while.

        The pod gets `FORSAKEN_SECONDS`, and again as many whenever a connection opens and closes.
        A target never opens a lost connection again: the objects that it would send over that
        connection wait forever, and only the end of the pod tells the target of the failure.
        """
        is_any_open = any(worker.websockets for worker in self._workers.values())
        if is_any_open or not self._breakage or self._deadline or not self._settings.is_pod:
            self._forsaken_at = 0.0
        elif not self._forsaken_at:
            self._forsaken_at = time.monotonic() + FORSAKEN_SECONDS
        elif time.monotonic() >= self._forsaken_at:
            self._fail(StartupError(
                f"{self._breakage} (no WebSocket connection is left, "
                f"and AIStore opens none again)"))

    # -- stopping --

    def _fail(self, failure: StartupError) -> None:
        self._failure = failure
        self._stop()

    def _stop_in_time(self) -> None:
        """Stop on the first signal; kill the workers on the second, or after the grace period."""
        if self._stops and not self._deadline:
            logger.info("stopping")
            self._stop()
        if self._deadline and (self._stops > 1 or time.monotonic() >= self._deadline):
            for pid in self._workers:
                logger.error("worker %d is killed with what it has in flight", pid)
                os.kill(pid, signal.SIGKILL)
            # kill again on a further signal, or if a worker is still there after this time
            self._stops = 1
            self._deadline = time.monotonic() + TOOL_STOP_SECONDS

    def _stop(self) -> None:
        """Refuse connections, and tell the workers to finish the requests that they have begun."""
        self._deadline = time.monotonic() + GRACE_SECONDS
        self._due.clear()
        if self._listener is not None:
            self._listener.close()
        for pid in self._workers:
            os.kill(pid, signal.SIGTERM)


# == 19. Entry ==
# The command line. Without arguments it serves what a pod's environment describes; on a laptop,
# `serve` serves a class from a file, and `pack` makes a payload or a spec of the file; `install`
# installs packages while an image is built.


def prepare(settings: Settings, may_install: bool) -> None:
    """Configure the log, check certificates and install packages, before the user's code runs."""
    def log_failure(told: Any) -> None:
        if told.exc_type is not SystemExit:
            log_user_error("a thread", told.exc_value)

    configure_logging(settings)
    logging.captureWarnings(True)  # warnings may hold secrets, which the log hides
    threading.excepthook = log_failure
    if settings.client_ca or settings.client_cert:
        tls_context(settings)  # raises StartupError for files that are unusable
    if settings.target.startswith("https:"):
        # this loads the module before the fork, so that workers share it
        logger.debug("TLS is provided by %s", ssl.OPENSSL_VERSION)
    if may_install:
        install_os_packages(settings.os_packages)
        install_python_packages(settings.packages)


def current_folder() -> str:
    """Return the current folder, or "" if it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


class Start(NamedTuple):
    """How this process was started, recorded before the class can change any of that."""

    command: List[str]
    environ: Mapping[str, str]
    folder: str

    def over(self, served: Served) -> NoReturn:
        """Execute this program again, in this process: the class's threads forbid forks.

        The new supervisor does not load the class. It forks workers that load it, each for itself.
        Raise StartupError if the program cannot be executed.
        """
        # No signal to stop may be lost. This thread blocks these signals until the new program has
        # handlers. If another thread takes such a signal, the signal's number goes into a pipe,
        # which the new program inherits.
        signals, writer = os.pipe()
        for end in (signals, writer):
            os.set_blocking(end, False)
            os.set_inheritable(end, True)
        signal.set_wakeup_fd(writer)
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            # exec keeps the class's timers, whose signals would end the new program
            signal.setitimer(timer, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        folder = target_folder
        known = json.dumps([served, folder.path, folder.requirements, signals, writer,
                            Current.began])
        flush_output()
        try:
            if current_folder() != self.folder:
                os.chdir(self.folder)
            os.execve(self.command[0], self.command, {**self.environ, FRESH_START: known})
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            raise StartupError("the class has started threads, so the program must start over, "
                               f"and cannot: {error}") from None


def take_fresh_start(known: str, environ: MutableMapping[str, str]) -> Served:
    """Read what `Start.over` has left for this program, and use its folder of packages."""
    served, folder, requirements, signals, writer, Current.began = json.loads(known)
    if folder:
        target_folder.take_over(folder, requirements)
        use_packages_of(folder, environ)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    with contextlib.suppress(BlockingIOError):  # no signal has come
        for number in set(STOP_SIGNALS).intersection(os.read(signals, READ_BYTES)):
            signal.raise_signal(number)
    os.close(signals)
    os.close(writer)
    return Served(*served)


class Job(NamedTuple):
    """How to load a class, how to serve it, and how to announce that it is served."""

    settings: Settings
    may_install: bool
    load: Callable[[], Type[ETLServer]]
    announce: Callable[[str, str], None]  # called with the class's name and the URL

    def run(self, start: Start, served: Optional[Served]) -> int:
        """Serve until SIGTERM, and return the exit code.

        Begin again if the class turns out to need a framework. `served` is given in a program that
        has started over: its packages are installed, and its workers load the class.
        """
        prepare(self.settings, served is None and self.may_install)
        if not self.may_install:
            missing = lacking(requirements_of(self.settings.packages, "PACKAGES"))
            if missing:
                raise PackageError(f"PACKAGES: {pip_command(missing)}")
        job, needs = self, set()
        while True:
            try:
                return job._serve(start, served)
            except FrameworkNeeded as need:
                if (need.framework, need.serves) in needs:  # it was there, to no avail
                    raise
                needs.add((need.framework, need.serves))
                prepare_framework(need.framework, need.serves, self.may_install)
                if need.serves:
                    job = job._replace(settings=job.settings._replace(server=need.framework))

    def _serve(self, start: Start, served: Optional[Served]) -> int:
        """Load the class, unless the workers load it, and serve it."""
        load = functools.lru_cache(maxsize=None)(self.load)  # once, for all workers forked later
        is_loaded_here = served is None
        if served is None:
            etl_class = load()
            has_own_start = getattr(etl_class, "start") is not ListeningServer.start
            served = Served(etl_class.__name__, server_for(etl_class), has_own_start)
        server = self.settings.server or served.server
        if server in FRAMEWORKS:
            prepare_framework(server, serves=True, may_install=self.may_install)
        if is_loaded_here and not may_be_forked():
            start.over(served)
        # Collect garbage from now on, but not among the objects that exist already: a collection
        # writes to all that it examines, and processes share what none of them writes to.
        gc.freeze()
        gc.enable()
        return Supervisor(self.settings._replace(server=server), served, load,
                          functools.partial(self.announce, served.name)).run()


def pod_job(environ: Mapping[str, str]) -> Job:
    """Return the job that a pod's environment describes."""
    file = "ETL_CLASS_PAYLOAD_FILE"
    payload = file if environ.get(file) else "ETL_CLASS_PAYLOAD"
    settings = Settings.from_env(environ, (payload, "AIS_TARGET_URL"))
    announce = functools.partial(logger.info, "serving %s on %s")
    return Job(settings, True, functools.partial(load_etl_class, settings), announce)


def pick_class(module: types.ModuleType, wanted: str) -> Type[ETLServer]:
    """Return the class to serve from a file's module: the one named `wanted`, or the only one."""
    names = vars(module)
    if not wanted:
        found = {value: name for name, value in names.items() if isinstance(value, type)
                 and issubclass(value, ETLServer) and value.__module__ == module.__name__}
        if len(found) != 1:
            choice = ", ".join(sorted(found.values())) or "none"
            raise UsageError(f"{module.__file__} must define one ETL class, or the argument must "
                             f"be FILE:CLASS; the file defines {choice}")
        wanted, = found.values()
    if wanted not in names:
        raise UsageError(f"{module.__file__} has no {wanted}")
    return checked_class(names[wanted], f"{module.__file__}: {wanted}")


def split_file(text: str) -> Tuple[str, str]:
    """Split FILE[:CLASS] into the path of a file that exists, and the name of a class or ""."""
    path, wanted = text, ""
    if ":" in text and not os.path.exists(text):
        path, _, wanted = text.rpartition(":")
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path!r}")
    return path, wanted


def class_from_file(text: str) -> Type[ETLServer]:
    """Import the file of FILE[:CLASS] and return the class; raise StartupError if that fails."""
    import importlib.util

    path, wanted = split_file(text)
    install_sdk_names()
    leave_late_modules()
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    name = os.path.splitext(os.path.basename(path))[0]
    name = name if name not in sys.modules else f"etl_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    Current.is_loading = True
    _, error = attempt(spec.loader.exec_module, module)
    Current.is_loading = False
    raise_framework_needed(error)
    if error is not None:
        reason = f"{path} cannot be imported: {describe_of_user(error, has_type=True)}"
        raise with_story((PackageError if package_of(error) else ClassError)(reason), path, error)
    return pick_class(module, wanted)


def serve_job(arguments: argparse.Namespace, environ: MutableMapping[str, str]) -> Job:
    """Return the job of the command `serve`, whose options replace some variables."""
    if arguments.target:
        environ["AIS_TARGET_URL"] = arguments.target  # classes may read it, too
    settings = Settings.from_env(environ)
    url = urlsplit(settings.target)
    folder = unquote(url.path) if url.scheme == "file" else ""
    settings = settings._replace(
        payload="", payload_file="",
        host=arguments.host, port=arguments.port, workers=arguments.workers,
        threads=arguments.threads or settings.threads,
        fqn_roots=(os.path.realpath(folder),) if folder else ())

    def announce(name: str, url: str) -> None:
        print(f"serving {name} from {arguments.file} on {url}",
              f"  echo hello | curl -sS -T - {url}/bucket/object",
              f"  curl -sS {url}/health", sep="\n", flush=True)

    return Job(settings, False, functools.partial(class_from_file, arguments.file), announce)


def give_up(error: StartupError) -> int:
    """Log why the pod cannot serve; return the exit code.

    AIStore shows the last line of the log to the user, so the reason is written at the very end,
    by `exit_now`. Kubernetes shows the termination log.
    """
    if error.story:
        logger.error(error.story, extra=WITH_LINES)
    reason = " ".join((Current.settings or Settings()).redact(str(error)).split())
    Current.last_line = f"ais_runtime_min: {reason}"
    # "r+b" makes no file where there is none
    with contextlib.suppress(OSError), open(TERMINATION_LOG, "r+b") as file:
        file.write(reason.encode("utf-8", "replace")[:2048])  # the kubelet keeps no more
        file.truncate()
    return error.exit


# -- pack: a class in a file becomes a payload, a spec, or the variables of a container --
# `pack` imports the file and pickles the class. Before it prints anything, a new process, which
# runs `prove`, loads and constructs the class. That process is to `pack` what a worker is to the
# supervisor: it reports a failure, or the framework that it needs.

VARIABLE_LIMIT_BYTES = 128 << 10  # of "NAME=text" and a zero byte: Linux, MAX_ARG_STRLEN
ENV_FILE_LIMIT_BYTES = 64 << 10  # of a line: docker reads no longer lines
SPEC_LIMIT_BYTES = 1 << 20  # of a whole spec: AIStore's command line, maxSpecSize
TIME = "([1-9][0-9]{0,5}(ms|s|m|h))+"  # most of what Go's time.ParseDuration takes
SPEC_RULES = {  # option: its default, what AIStore and Kubernetes accept, and the same in words
    "name": ("", "[a-z][a-z0-9-]{4,30}[a-z0-9]",
             "6 to 32 of a-z, 0-9 and -, from a letter to a letter or digit"),
    "image": ("ais-runtime-min:{}.{}".format(*sys.version_info), r"[\w./:@-]+", "an image's name"),
    "comm": ("hpush", "hpush|hpull|ws", "hpush, hpull or ws"),
    "init-timeout": ("5m", TIME, "a time like 45s, 5m or 1h30m"),
    "obj-timeout": ("45s", TIME, "a time like 45s, 5m or 1h30m"),
}
# what the environment of a container has besides the pod's variables
CONTAINER_VARIABLES = (
    "(?i)PATH|HOME|LANG|LC_.*|TZ|TMPDIR|(DY)?LD_LIBRARY_PATH|SSL_CERT_.*|(https?|no)_proxy")


def use_names_of_pods() -> None:
    """Give the classes and functions of this file the module names under which pods find them.

    Pickles refer to them by these names. They are the SDK's names where the SDK has the same
    class or function, so that a pod of AIStore's default runtime can load the payload, too.
    """
    homes = {value: module for module, names in SDK_MODULES.items()
             for name, value in names.items() if callable(value) and value is getattr(
                 attempt(importlib.import_module, module).value, name, None)}
    for value in list(globals().values()):
        if isinstance(value, (type, types.FunctionType)) and value.__module__ == __name__:
            value.__module__ = homes.get(value, "ais_runtime_min")


def pickle_from_file(text: str) -> Tuple[Type[ETLServer], str]:
    """Return the class of FILE[:CLASS] and its payload; raise StartupError if there is none.

    A pod does not have the modules that lie beside the file, so these are pickled with the class,
    by value. So are their functions with a cache (`functools.lru_cache`); the cache becomes empty.
    """
    if not is_here("cloudpickle"):
        raise PackageError(f"pack needs cloudpickle: {pip_command(['cloudpickle>=3,<4'])}")
    import copyreg

    import cloudpickle

    def reduce_cache(cache: Any) -> Any:
        if cache.__module__ not in cloudpickle.list_registry_pickle_by_value():
            return cache.__qualname__
        return functools.lru_cache(**cache.cache_parameters()), (cache.__wrapped__,)

    before, path = set(sys.modules), list(sys.path)
    try:
        etl_class = class_from_file(text)
    except FrameworkNeeded as need:  # raise the error with the command that installs the framework
        prepare_framework(need.framework, serves=False, may_install=False)
        raise
    sys.path[:] = path  # a module beside the file may be named as one of the standard library
    use_names_of_pods()
    folder = os.path.join(os.path.dirname(os.path.realpath(split_file(text)[0])), "")
    for module in [sys.modules[name] for name in set(sys.modules) - before]:
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ()), "/"]
        place = os.path.realpath(next(filter(None, places)))
        # an environment with Python and its packages may lie there, too
        if place.startswith(folder) and not re.search(
                r"/(python3\.\d+t?|site-packages|dist-packages)/", place[len(folder) - 1:]):
            cloudpickle.register_pickle_by_value(module)
    copyreg.pickle(type(functools.lru_cache(len)), reduce_cache)
    payload, error = attempt(serialize_class, etl_class)
    if error is not None:
        raise ClassError(f"{etl_class.__name__} cannot be pickled: {describe(error)}; what cannot "
                         f"be pickled must be made in __init__, not at the top of a file")
    return etl_class, payload


def lend_packages(requirements: Iterable[str], folder: str) -> None:
    """Link the installed packages of requirements, and of their dependencies, into a folder."""
    import importlib.metadata

    waiting, done = [*itertools.product(requirements, [""])], set()
    while waiting:
        text, extra = waiting.pop()
        # without pip, only the name is read: markers and extras count as absent
        wanted = parse_requirement(text) or types.SimpleNamespace(
            name=re.split(r"[^\w.-]", text)[0], marker=None, extras=())
        found = attempt(importlib.metadata.distribution, wanted.name).value
        is_for_us = not wanted.marker or wanted.marker.evaluate({"extra": extra})
        if found is None or not is_for_us or (text, extra) in done:
            continue
        done.add((text, extra))
        waiting += itertools.product(found.requires or (), ("", *wanted.extras))
        # a distribution without a RECORD lists no files
        names = found.read_text("top_level.txt") or found.metadata["Name"]
        tops = {str(path).partition("/")[0] for path in found.files or names.split()}
        for top in tops - {"..", "__pycache__"}:
            with contextlib.suppress(FileExistsError):
                os.symlink(os.path.abspath(found.locate_file(top)), os.path.join(folder, top))


class ImportNotes(PayloadUnpickler):
    """Unpickle a class, and note what its functions import when they run."""

    notes: Set[Tuple[str, str]] = set()  # names of functions and of modules

    def _make_code(self, *args: Any) -> types.CodeType:
        import dis

        code = super()._make_code(*args)
        self.notes.update((code.co_name, str(each.argval)) for each in dis.get_instructions(code)
                          if each.opname == "IMPORT_NAME")
        return code


def prove(site: str, reports: int, server: str, environ: Mapping[str, str]) -> int:
    """Load and construct the class of a payload as a pod does; return the exit code.

    `try_payload` runs this in a process of its own, which reports like a worker. `site` is the
    folder with the pod's packages, `server` the framework that serves the class, or "".
    """
    import importlib.util

    Current.reports = reports
    sys.path[0] = site  # and not the folder of this file, where the class's may lie
    try:
        settings = Settings.from_env(environ)._replace(server=server)
        prepare(settings, may_install=False)
        if server:
            prepare_framework(server, serves=True, may_install=False)
        Current.settings = settings
        construct(load_etl_class(settings, ImportNotes))
    except StartupError as error:
        return report_failure(error)
    for function, name in sorted(ImportNotes.notes):
        is_ours = name in ("__main__", "ais_runtime_min")
        is_found = is_ours or attempt(importlib.util.find_spec, name).value
        if not is_found or (SDK_MODULES.get(name) == {} and not is_here("aistore")):
            top = name.partition(".")[0]
            remedy = f"pass --packages {PYPI_NAMES.get(top, top)}, or " if top else ""
            logger.warning("%s() imports %s, which a pod does not have: %simport a module of your "
                           "own at the top of the file, to have it pickled", function, name or ".",
                           remedy)
    report(REPORT_READY)
    return Exit.OK


def try_payload(payload: str, requirements: Sequence[str], server: str,
                environ: Mapping[str, str]) -> Optional[StartupError]:
    """Run `prove` in a new process that can import no more than a pod can; return its failure.

    It imports the standard library, this file, and what `requirements` bring, which must be
    installed here. Its folder is empty. The processes that the class has started end with it.
    """
    import tempfile

    missing = lacking(dict.fromkeys(requirements))
    if missing:
        raise PackageError(f"to try the class, pack needs here what a pod installs: "
                           f"{pip_command(missing)}")
    with contextlib.ExitStack() as stack:
        site, empty = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        # a file, since nobody reads while the trial writes
        reports = stack.enter_context(tempfile.TemporaryFile())
        lend_packages(requirements, site)
        path = os.path.join(site, "payload")
        with open(path, "w", encoding="ascii") as file:
            file.write(payload)
        # -S leaves out the packages that are installed here
        command = [sys.executable, "-S", __file__, "prove", site, str(reports.fileno()), server]
        # a pod always has AIS_TARGET_URL; nothing answers at this one
        env = {**environ, "ETL_CLASS_PAYLOAD_FILE": path, "AIS_TARGET_URL": "http://127.0.0.1:9"}
        process = start_in_group(stack, CHILDREN_SECONDS, command, cwd=empty, env=env, stdout=2,
                                 pass_fds=[reports.fileno()])
        process.wait()
        reports.seek(0)
        for line in reports.read().splitlines():
            if line == REPORT_READY:
                return None
            if line.startswith(REPORT_FAILED):
                return reported_failure(line[1:].decode())
    return ClassError(f"the process that loads and constructs the class "
                      f"{how_it_ended(process.returncode)}")


def prove_payload(payload: str, etl_class: Type[ETLServer], environ: Mapping[str, str]) -> None:
    """Try the payload; raise the StartupError with which a pod would end.

    As in a pod, the class gets the framework that it turns out to need, and is tried again.
    """
    hooks, needs = overridden(etl_class, HOOKS), set()
    packages = requirements_of(environ.get("PACKAGES", ""), "PACKAGES")
    requirements, server = ["cloudpickle", *packages], ""
    failure = (FrameworkNeeded(server_for(etl_class), serves=True) if hooks
               else try_payload(payload, requirements, server, environ))
    while isinstance(failure, FrameworkNeeded) and str(failure) not in needs:
        needs.add(str(failure))
        name, why = failure.framework, f"imports {failure.framework}"
        if failure.serves:
            server, why = name, f"overrides {', '.join(hooks)}" if hooks else "uses self.app"
        logger.info("the class %s: a pod installs %s when it starts, unless the image has it",
                    why, name)
        requirements += [text for _, text in modules_of(name, failure.serves)]
        failure = try_payload(payload, requirements, server, environ)
    if failure is not None:
        failure.args = (f"a pod would not start: {failure}",)
        raise failure


def check_options(arguments: argparse.Namespace) -> None:
    """Raise UsageError for options of the spec without --spec, and for packages without names."""
    defaults = {**{option: rule[0] for option, rule in SPEC_RULES.items()}, "direct-put": True}
    for option, default in defaults.items():
        if not arguments.spec and getattr(arguments, option.replace("-", "_")) != default:
            raise UsageError(f"--{option} is for --spec only")
    for requirement in requirements_of(arguments.packages or "", "PACKAGES"):
        if re.match(r"[./~]|[\w+]+://", requirement):
            raise UsageError(f"--packages {hide_credentials(requirement)}: pack needs the name of "
                             f"the package, as in NAME @ URL")


def variables_of(arguments: argparse.Namespace) -> Dict[str, str]:
    """Return the variables of the pod, without the payload; raise UsageError for bad ones."""
    options = {"PACKAGES": arguments.packages, "OS_PACKAGES": arguments.os_packages,
               "ETL_DIRECT_FQN": "true" if arguments.arg_type == "fqn" else ""}
    variables = {name: text for name, text in options.items() if text}
    set_by_others = "|".join([*options, "ETL_CLASS_PAYLOAD.*", "AIS_TARGET_URL", "PORT"])
    for text in arguments.env:
        name, _, value = text.partition("=")
        # surrogates stand for bytes of the command line that are not UTF-8
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*=[^\ud800-\udfff]*", text):
            raise UsageError(f"--env {text!r} must be NAME=VALUE")
        if re.fullmatch(set_by_others, name):
            raise UsageError(f"--env {name}: pack, one of its options, or AIStore sets it")
        variables[name] = value
    return variables


def spec_of(arguments: argparse.Namespace, class_name: str, variables: Mapping[str, str]) -> str:
    """Return a spec for `ais etl init -f` (AIStore, ext/etl/api.go)."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "-", class_name).lower().strip("-")
    arguments.name = arguments.name or (words if len(words) > 5 else f"{words}-etl")
    for option, (_, pattern, what) in SPEC_RULES.items():
        given = getattr(arguments, option.replace("-", "_"))
        if not re.fullmatch(pattern, given, re.ASCII):
            raise UsageError(f"--{option} must be {what}, and not {given!r}")
    if arguments.comm == "ws" and not arguments.direct_put:
        raise UsageError("--comm ws needs direct put")
    lines = [f'name: "{arguments.name}"', "runtime:", f'  image: "{arguments.image}"', "  env:"]
    for name, text in variables.items():
        # Kubernetes replaces "$$" by "$", and "$(NAME)" by the value of a variable
        entry = json.dumps({"name": name, "value": text.replace("$", "$$")}, ensure_ascii=False)
        lines.append(f"    - {entry}")
    lines += [f"communication: {arguments.comm}://", f"init_timeout: {arguments.init_timeout}",
              f"obj_timeout: {arguments.obj_timeout}",
              f"support_direct_put: {str(arguments.direct_put).lower()}", ""]
    # JSON is YAML, apart from characters that YAML refuses
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda found: f"\\u{ord(found[0]):04x}",
                  "\n".join(lines))


def env_file_of(variables: Mapping[str, str]) -> str:
    """Return the text of a file for `docker run --env-file`, in which nothing can be quoted."""
    lines = [f"{name}={value}\n" for name, value in variables.items()]
    if any("\n" in line[:-1] or len(line.encode()) > ENV_FILE_LIMIT_BYTES for line in lines):
        raise UsageError("an --env-file takes variables of one line, of up to 64 KiB")
    return "".join(lines)


def text_of(arguments: argparse.Namespace, class_name: str, payload: str,
            variables: Mapping[str, str]) -> str:
    """Return the text that the options ask for: the payload, a spec or an --env-file."""
    limit = ENV_FILE_LIMIT_BYTES if arguments.env_file else VARIABLE_LIMIT_BYTES
    size = limit - len("ETL_CLASS_PAYLOAD_99=") - 1  # 1 for the end of the line or variable
    pieces = {f"ETL_CLASS_PAYLOAD{f'_{number}' if number > 1 else ''}": payload[start:start + size]
              for number, start in enumerate(range(0, len(payload), size), 1)}
    if arguments.spec:
        text = spec_of(arguments, class_name, {**pieces, **variables})
    elif arguments.env_file:
        variables = {**pieces, "AIS_TARGET_URL": "http://localhost:51080", **variables}
        text = env_file_of(variables)
    else:
        if variables:
            logger.info("the pod needs %s besides", ", ".join(variables))
        return f"{payload}\n"
    if len(text.encode()) >= SPEC_LIMIT_BYTES:
        raise PayloadError(f"{class_name} is too large for a pod's variables: put its payload, "
                           f"printed alone, into the image, and set ETL_CLASS_PAYLOAD_FILE")
    return text


def pack(arguments: argparse.Namespace, environ: Mapping[str, str], stdout: int) -> int:
    """Write the payload of a file's class, or a spec with it, if a pod can start with it.

    Return the exit code. `stdout` is a copy of descriptor 1, for the result alone.
    """
    def end(number: int, _: Any) -> NoReturn:
        raise Terminated(128 + number)  # as shells tell of the signal

    os.dup2(2, 1)  # what the class and its packages print must not be in the result
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, end)
    Current.settings = Settings()
    configure_logging(Current.settings)
    late = [*late_modules]
    leave_late_modules()
    for module in (*late, "csv", "subprocess", "tempfile", "importlib.metadata", "importlib.util"):
        # before the class: a module beside the file may have one of these names
        importlib.import_module(module)
    check_options(arguments)
    variables, output = variables_of(arguments), arguments.output or stdout
    if os.path.exists(output) and os.path.samefile(output, split_file(arguments.file)[0]):
        raise UsageError(f"{output} is the class's own file")
    etl_class, payload = pickle_from_file(arguments.file)
    text = text_of(arguments, etl_class.__name__, payload, variables)
    files_of_image = {each.name for each in VARIABLES if each.parse is existing_file}
    prove_payload(payload, etl_class, {
        **{name: value for name, value in environ.items()
           if re.fullmatch(CONTAINER_VARIABLES, name)},
        **{name: value for name, value in variables.items() if name not in files_of_image}})
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        failure = StartupError(
            f"{arguments.output or 'stdout'} cannot be written: {describe(error)}")
        failure.exit = Exit.OUTPUT
        raise failure from None
    logger.info("packed %s for images of Python %d.%d: %d bytes", etl_class.__name__,
                *sys.version_info[:2], len(payload))
    return Exit.OK


def add_pack(commands: Any) -> None:
    """Add the command `pack` to the command line."""
    import argparse

    text = "print the payload of a class in a file, or all that starts an ETL with it"
    pack = commands.add_parser("pack", help=text, description=f"{text[0].upper()}{text[1:]}.")
    pack.add_argument("file", metavar="FILE[:CLASS]",
                      help="a Python file, and the class if it defines several")
    forms = pack.add_mutually_exclusive_group()
    forms.add_argument("--spec", action="store_true", help="print a spec for ais etl init -f")
    forms.add_argument("--env-file", action="store_true",
                       help="print a file for docker run --env-file")
    pack.add_argument("-o", "--output", metavar="FILE", help="write to a file, not to stdout")
    pack.add_argument("--packages", metavar="LIST", help="PACKAGES: from PyPI, with commas")
    pack.add_argument("--os-packages", metavar="LIST", help="OS_PACKAGES: of Alpine, with commas")
    pack.add_argument("--arg-type", choices=("fqn",),
                      help="fqn: transform gets the path of the object's file")
    pack.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                      help="a further variable; may be repeated")
    spec = pack.add_argument_group("of the spec")
    for option, (default, _, what) in SPEC_RULES.items():
        spec.add_argument(f"--{option}", default=default,
                          help=f"{what} (default: {default or 'made of the name of the class'})")
    spec.add_argument("--direct-put", action=argparse.BooleanOptionalAction, default=True,
                      help="deliver results straight to their nodes")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the command line; raise UsageError if one is bad."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """A parser that does not print its errors and exit, but raises them."""

        def error(self, message: str) -> NoReturn:
            """Raise UsageError."""
            raise UsageError(f"{message}; --help has the options")

    parser = Parser(
        prog="ais_runtime_min", description="Serve an ETL class to AIStore. Without arguments the "
        "environment describes what to serve: README.md has the variables.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "install what OS_PACKAGES and PACKAGES name, while an image is built"
    commands.add_parser("install", help=text, description=f"{text[0].upper()}{text[1:]}.")
    text = "serve a class from a file, to try it"
    serve = commands.add_parser("serve", help=text, description=f"{text[0].upper()}{text[1:]}.")
    serve.add_argument("file", metavar="FILE[:CLASS]",
                       help="a Python file, and the class if it defines several")
    serve.add_argument("--target", metavar="DIR|URL",
                       help="a folder that stands in for a target, or a target's URL")
    serve.add_argument("--host", default="127.0.0.1",
                       help="the address to listen on (default: %(default)s)")
    serve.add_argument("--port", default="8000",
                       help="the port, 0 for any (default: %(default)s)")
    serve.add_argument("--workers", default="1",
                       help="worker processes (default: %(default)s)")
    serve.add_argument("--threads", help="transforms at once in one worker")
    add_pack(commands)
    arguments = parser.parse_args(argv)
    if os.path.isdir(getattr(arguments, "target", None) or ""):
        arguments.target = "file://" + quote(os.fsencode(os.path.abspath(arguments.target)))
    for variable in VARIABLES:  # an option is parsed as the variable for the same field
        given = getattr(arguments, variable.field, None)
        try:
            setattr(arguments, variable.field, None if given is None else variable.parse(given))
        except ValueError as error:
            raise UsageError(f"--{variable.field} must be {error}") from None
    return arguments


def terminate(number: int, _: Any) -> NoReturn:
    """Handle a signal to stop during the start.

    The exception ends an installer that is running, on its way up to `run`.
    """
    raise Terminated(Exit.OK if number == signal.SIGTERM else 128 + number)


def own_command(arguments: Sequence[str]) -> List[str]:
    """Return the command that starts this program again, with the interpreter's options."""
    if hasattr(sys, "orig_argv"):  # Python 3.10 and later
        return [sys.executable, *sys.orig_argv[1:]]
    import subprocess

    options = getattr(subprocess, "_args_from_interpreter_flags")()  # as multiprocessing does
    return [sys.executable, *options, os.path.abspath(__file__), *arguments]


def run_command(arguments: List[str], environ: MutableMapping[str, str]) -> int:
    """Run the command that the arguments name; without arguments, serve as a pod."""
    known = environ.pop(FRESH_START, "")
    command = arguments[0] if arguments else ""
    start = Start(own_command(arguments), dict(environ), current_folder())
    served = take_fresh_start(known, environ) if known else None
    del sys.argv[1:]  # a class may read its own command line, which has no arguments
    # the background thread of pyarrow's allocator would not end before a fork
    environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    if command == "prove" and len(arguments) == 4:  # internal: `try_payload` runs it
        return prove(arguments[1], int(arguments[2]), arguments[3], environ)
    if command == "pack":
        stdout, Current.output = Current.output, 2  # the result alone goes to stdout
        return pack(parse_arguments(arguments), environ, stdout)
    parsed = parse_arguments(arguments) if arguments else None
    if parsed and parsed.command == "install":
        Current.settings = Settings.from_env(environ)
        target_folder.may_be_made = False  # it would be removed before the image is complete
        prepare(Current.settings, True)
        return Exit.OK
    job = serve_job(parsed, environ) if parsed else pod_job(environ)
    Current.settings = job.settings
    return job.run(start, served)


def main(argv: Optional[Sequence[str]] = None,
         environ: MutableMapping[str, str] = os.environ) -> int:
    """Run the command line; return the exit code."""
    # CRI-O starts pods with a soft limit of 1024 open files
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS's kernel takes less than the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if sys.platform.startswith("linux"):
        Current.began = time.clock_gettime(time.CLOCK_BOOTTIME)
    with contextlib.suppress(OSError):  # the program was started without a stdout
        Current.output = os.dup(1)
    for number in STOP_SIGNALS:
        signal.signal(number, terminate)  # until the supervisor handles them
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # no character may make a line fail, and no line waits in a buffer
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return run_command(list(sys.argv[1:] if argv is None else argv), environ)
    except StartupError as error:
        return give_up(error)


def run() -> NoReturn:
    """Run the program and end the process with its exit code."""
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else Exit.OK
    leave(code, LEAVE_SECONDS)


if __name__ == "__main__":
    run()
