#!/usr/bin/env python3
"""Serve a pickled ETL class to NVIDIA AIStore: the whole runtime in one file.

An AIStore *target*, a storage node, starts one pod beside itself for each ETL. The pod finds the
user's class in its environment: `ETL_CLASS_PAYLOAD` is the base64 of a cloudpickle. This file
installs the packages that the class needs, unpickles the class without the AIStore SDK, and
transforms the objects that the target sends. It needs the standard library and, for payloads,
`cloudpickle`; Python 3.9 or newer; Linux, or macOS for trying a class on a laptop.

    python3 ais_runtime_min.py                       serve what the environment describes
    python3 ais_runtime_min.py serve FILE[:CLASS]    serve a class from a file, for trying it
    python3 ais_runtime_min.py install               install the packages, while an image is built

The map. A request passes four stages, sections 9 to 12, which hand each other plain values. No
section uses a name of a later one, except for `main` and the `start()` of a class.

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
fork the workers. Each worker constructs the class and answers requests. The supervisor replaces
workers that die. On SIGTERM the workers answer every request that they have begun to read, then
all processes end. If the start fails, the last line of the log tells the reason.

The life of a request: bytes of a connection become an `ETLRequest`, which opens a `Source`; the
class transforms its bytes; the output becomes an `Answer`. Every failure on the way becomes an
answer in one place, `answer_for`.

The runtime does not authenticate its callers (the cluster's network does), speak HTTP/2, or
terminate TLS.
"""
from __future__ import annotations

import gc
import importlib
import sys
import threading
import types

if __name__ == "__main__":
    # A class that imports this file by its name must get the same ETLServer.
    sys.modules["ais_runtime_min"] = sys.modules["__main__"]
    # What is imported now stays: looking for garbage would take a sixth of the start.
    gc.disable()

    class LateModule(types.ModuleType):
        """Stand in for a module, and load it when one of its attributes is read or set.

        Modules that imported the stand-in keep it; it forwards every attribute. The class imports
        the module itself: `leave_late_modules` has removed the stand-ins by then.
        """

        _lock = threading.Lock()

        def __getattr__(self, name: str) -> object:
            return getattr(self._load(), name)

        def __setattr__(self, name: str, value: object) -> None:
            setattr(self._load(), name, value)

        def _load(self) -> types.ModuleType:
            with self._lock:  # or a slower thread would remove what a faster one has loaded
                if sys.modules.get(self.__name__) is self:
                    del sys.modules[self.__name__]
            return importlib.import_module(self.__name__)

    # The library and cloudpickle import these modules, but few pods use them. Loading them would
    # take a fifth of the start and of the memory.
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

__version__ = "0.1.0"

# == 1. Names and limits ==
# The names of the wire contract with AIStore (ext/etl and ais/tgtetl.go in its sources), and every
# number with its unit and its reason.

HEADER_NODE_URL = "Ais-Node-Url"  # of a request: the hops that its result goes to
HEADER_DIRECT_PUT_LENGTH = "Ais-Direct-Put-Length"  # of an answer: the bytes delivered to a hop
HEADER_RETRY_REASON = "Ais-Etl-Retry-Reason"  # of a 503: the client is to send the object again
RETRY_REASON_TRANSIENT = "direct-put-transient"
QPARAM_FQN = "etl_fqn"  # the path of the object's file
QPARAM_ARGS = "etl_args"  # the user's argument for the transform
QPARAM_LATEST = "latest-ver"  # whether to read the object from the target and not from its file
QPARAM_ORIGINAL_URL = "original_url"  # of /download: the URL to fetch
QPARAM_OBJECT_TO = "object_to"  # of /download: the object's path
# for /download: some servers refuse requests without a User-Agent
AGENT = {"User-Agent": f"ais-runtime-min/{__version__}"}
DEFAULT_MIME_TYPE = "application/octet-stream"
FRESH_START = "AIS_RUNTIME_FRESH_START"  # set by a process that starts over, for its next program

HEAD_LIMIT_BYTES = 64 << 10  # more than AIStore's own server takes for a pipeline of many stages
HEAD_LIMIT_FIELDS = 100  # as in http.client; real requests have fewer than ten
READ_BYTES = 64 << 10  # of one receive: a small object mostly comes together with its head
WRITE_BYTES = 1 << 20  # of one send: TLS fails on pieces of several GiB
DRAIN_LIMIT_BYTES = 1 << 20  # read on after an error; beyond this, closing is cheaper
LINGER_LIMIT_BYTES = 64 << 20  # read before closing, so that a client still sending gets the answer
CHUNK_LINE_LIMIT_BYTES = 4 << 10  # a chunk's size and its extensions, which nobody sends
ERROR_TEXT_LIMIT_BYTES = 64 << 10  # of another node's error; AIStore cuts its text far earlier
# a stage's smaller answer is read to its end before ours begins, so that a failure has a status
SMALL_ANSWER_BYTES = 64 << 10
WAITING_LIMIT_BYTES = 256 << 20  # of all bodies in a worker's memory that wait for a transform
UNMASK_BYTES = 16 << 10  # longest WebSocket message that the leader reads; unmasked as one number
AHEAD_LIMIT_MESSAGES = 64  # unanswered objects of a WebSocket connection; transforms have 16 slots
AHEAD_LIMIT_BYTES = 16 << 20  # of these objects and their results; one object is always read
BATCH_LIMIT_PARTS = 512  # buffers of one sendmsg(), which takes 1024

HEAD_TIMEOUT_SECONDS = 30.0  # for a request's head, from its first byte
BODY_PAUSE_SECONDS = 300.0  # between two pieces of a body: the stage before may be computing
RESULT_UNREAD_SECONDS = 60.0  # until a result that the client does not read is cut
IDLE_SECONDS = 600.0  # until a connection without requests is closed
SWEEP_SECONDS = 5.0  # between two searches for connections that have timed out
DRAIN_LOOK_SECONDS = 0.2  # the same while the pod stops
DRAIN_SECONDS = 5.0  # for a client to stop sending after an error
CONNECT_SECONDS = 5.0  # to connect to another node, which is near
HOP_SILENCE_SECONDS = 300.0  # until a silent node is given up: it may be computing
HOP_IDLE_SECONDS = 20.0  # to keep an idle connection to a node: AIStore closes it after 30 s
RETRY_DELAY_LIMIT_SECONDS = 30.0  # between two attempts at a delivery: 1, 2, 4 … up to this
# to connect, for all retries of a delivery together. The default three retries then end within
# 8 s of the first failure; AIStore's own limit for an object may be 10 s.
RETRY_CONNECT_SECONDS = 1.0
FORSAKEN_SECONDS = 10.0  # until the pod ends after failures have closed all WebSocket connections
WEBSOCKET_DRAIN_SECONDS = 15.0  # for WebSocket clients that go on sending while the pod stops
GRACE_SECONDS = 25.0  # from SIGTERM to the pod's end: a node drain leaves 30 s
WORKER_GRACE_SECONDS = 23.0  # of these, for the requests of a worker; its exit hooks have the rest
LEAVE_SECONDS = 2.0  # for a process without requests to end
REPEAT_SECONDS = 0.3  # signals to stop within this time are one, for a process and its group
CHILDREN_SECONDS = 0.3  # for a class's child processes to end on SIGTERM, when its worker ends
THREADS_SECONDS = 0.2  # for a class's threads to end with its worker; executors' have longer
TRIAL_FORK_SECONDS = 5.0  # for the child of a trial fork, which ends at once if forking is safe
TOOL_SECONDS = 1800.0  # for an installer: building a large wheel takes minutes, not half an hour
TOOL_STOP_SECONDS = 5.0  # for an installer to end on SIGTERM
TOOL_PROGRESS_SECONDS = 5.0  # between two log lines that an installer still runs
TOOL_QUERY_SECONDS = 60.0  # for an installer to tell whether a package is there: it reads a file
TOOL_LINES_LIMIT = 40  # last lines of an installer's output that are kept: errors are among them
TOOL_OUTPUT_BYTES = 128 << 10  # end of an installer's output, where these lines are looked for
TOOL_LINE_LIMIT_BYTES = 2000  # of one of these lines

BACKLOG = 1024  # connections that may wait for accept(): AIStore opens hundreds at once
THREAD_LIMIT = 1024  # of a worker: connections that it reads or answers at the same time
WEBSOCKET_LIMIT = 512  # WebSocket connections of a worker: half of the threads are left to HTTP
QUICK_SECONDS = 0.0005  # the leader makes shorter calls of the class: handing over costs more
TURN_SECONDS = 0.05  # of calls of the class for one connection, while others wait for the leader
LEAD_SECONDS = 0.01  # until a leader that is held up loses the lead to its deputy
YIELD_SECONDS = 0.001  # for another worker with fewer connections to accept the next one
CROWD_LIMIT = 64  # connections accepted in a row, or idle ones closed to make room
EXCESS_LIMIT = 8  # connections that a busy worker may have beyond another, which may be as busy
DEFAULT_WORKERS = 4  # as AIStore documents for NUM_WORKERS
DEFAULT_THREADS = 16  # transforms at once in a worker: they share the GIL, but may wait for disks
RESPAWN_DELAY_LIMIT_SECONDS = 5.0  # before a dead worker is replaced; the delay doubles up to this
DEATHS_LIMIT = 10  # workers that die in a row and answered nothing: the pod is hopeless
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # temporary
DOWNLOAD_REDIRECTS_LIMIT = 5  # more is a loop
TERMINATION_LOG = "/dev/termination-log"
TERMINATION_LOG_LIMIT_BYTES = 2048  # the kubelet keeps no more

# outside the root logger's tree: neither the class's setup nor logging.disable() can silence it
logger = logging.Manager(cast(Any, logging.root)).getLogger("ais_runtime_min")


class Exit(enum.IntEnum):
    """Exit codes of the pod, as in sysexits(3); `kubectl describe pod` shows them."""

    OK = 0
    USAGE = os.EX_USAGE  # 64: the command line
    DATA = os.EX_DATAERR  # 65: the payload is no class that can be served
    UNAVAILABLE = os.EX_UNAVAILABLE  # 69: a package is missing or cannot be installed
    SOFTWARE = os.EX_SOFTWARE  # 70: the user's code failed, or workers keep dying
    SYSTEM = os.EX_OSERR  # 71: the port is taken, a file cannot be read
    CONFIG = os.EX_CONFIG  # 78: an environment variable


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
    """Where the request ends is unknown: it is answered, and the connection closed."""


class ShortBody(BadRequest):
    """A body ended early, stalled or is malformed; it is never taken for whole."""


class Forbidden(RequestError):
    """No object of AIStore has this path, whether a file is there or not."""

    status = HTTPStatus.FORBIDDEN


class NotFound(RequestError):
    """The source object is not there; a 404 means nothing else to AIStore."""

    status = HTTPStatus.NOT_FOUND


class ObjectTooLarge(RequestError):
    """The class wants the whole object, and the container has no memory for it."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class BadGateway(RequestError):
    """Another node cannot be reached, or its answer is against the protocol."""

    status = HTTPStatus.BAD_GATEWAY


class HopLost(BadGateway):
    """The next hop was lost before it had answered.

    The delivery may be tried again, unless `hopeless` says that no attempt can succeed.
    """

    def __init__(self, detail: str, hopeless: bool = False) -> None:
        super().__init__(detail)
        self.hopeless = hopeless


class NodeBodyLost(BadGateway):
    """Another node's answer ended early."""


class Outcome(NamedTuple):
    """The result of a call: a value or an error."""

    value: Any = None
    error: Optional[BaseException] = None


class Terminated(SystemExit):
    """A signal to stop came before there were workers to stop."""


def attempt(function: Callable[..., Any], *args: Any) -> Outcome:
    """Call a function that may raise anything, and return its value or its error.

    Users' code runs in it, and a SystemExit of that code must not end a thread. Only `Terminated`
    passes: a signal that comes while users' code is loaded is for the runtime. The caller decides
    what an error means, and drops none without saying so.
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

    `story` is logged before that line, once, by the supervisor: the traceback of the user's code.
    """

    exit = Exit.SOFTWARE
    story = ""


class ConfigError(StartupError):
    """Some environment variables cannot be used; the text names all of them."""

    exit = Exit.CONFIG


class PayloadError(StartupError):
    """The payload is no class that this runtime can serve."""

    exit = Exit.DATA


class PackageError(StartupError):
    """A package is missing or cannot be installed."""

    exit = Exit.UNAVAILABLE


class FrameworkNeeded(PackageError):
    """The class turns out to need a framework: install it and start once more.

    `serves` tells whether the framework must serve the class, or the class merely imports it.
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
    """The command line is wrong, or names what is not there."""

    exit = Exit.USAGE


class InvalidPipelineError(ValueError):
    """The SDK's error for a malformed pipeline, answered 400; classes may raise it."""


class ETLDirectPutTransientError(Exception):
    """The SDK's error for a direct put that may succeed later; classes may raise it.

    The answer is 502, or 503 with `Ais-Etl-Retry-Reason` if `bail_without_local_retry` is true.
    """

    def __init__(self, url: str, cause: Exception, bail_without_local_retry: bool = False) -> None:
        self.url = url
        self.cause = cause
        self.bail_without_local_retry = bail_without_local_retry
        super().__init__(f"direct put to {url!r} failed: {type(cause).__name__}: {cause}")


# == 3. Settings ==
# The environment becomes one frozen value, read once. An empty variable counts as unset.


def parse_bool(text: Optional[str]) -> bool:
    """Return whether a text means true to the SDK; any unknown word is false."""
    return str(text or "").strip().lower() in ("1", "t", "true", "y", "yes", "on")


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `lowest` to `highest`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"a whole number from {lowest} to {highest}")
        return int(text)

    return parse


def word_of(*words: str) -> Callable[[str], str]:
    """Return a parser of one of `words`, in upper or lower case."""

    def parse(text: str) -> str:
        for word in words:
            if word.lower() == text.strip().lower():
                return word
        raise ValueError("one of " + ", ".join(words))

    return parse


def existing_file(text: str) -> str:
    """Parse the path of a file that can be read."""
    if not os.path.isfile(text) or not os.access(text, os.R_OK):
        raise ValueError("a file that can be read")
    return text


def folders(text: str) -> Tuple[str, ...]:
    """Parse absolute folders with colons between them; symlinks are resolved."""
    paths = [path for path in text.split(":") if path]
    if not paths or not all(map(os.path.isabs, paths)):
        raise ValueError("absolute folders, separated by colons")
    return tuple(os.path.realpath(path) for path in paths)


def target_url(text: str) -> str:
    """Parse a target's base URL; return it without a slash at its end."""
    try:
        url = urlsplit(text)
        if url.scheme == "file":
            is_usable = not url.netloc and os.path.isdir(unquote(url.path))
        else:
            has_host = bool(url.hostname) and url.port != 0 and "@" not in url.netloc
            is_usable = has_host and url.scheme in ("http", "https")
    except ValueError:  # the port or the IPv6 address is malformed
        is_usable = False
    if not is_usable or not re.fullmatch("[!-\"$->@-~]+", text):  # no query, no fragment
        raise ValueError("http://host[:port]/path, https://… or file:///folder, of a folder that "
                         "is there, without user and password")
    return text if url.path == "/" else text.rstrip("/")


class Variable(NamedTuple):
    """An environment variable, the field of `Settings` it fills, and its parser.

    The parser's ValueError says which values are allowed.
    """

    name: str
    field: str
    parse: Callable[[str], Any]
    secret: bool = False  # whether error texts must not show the value


# Of two variables for one field, the later one wins.
VARIABLES = (
    Variable("ETL_CLASS_PAYLOAD", "payload", str, secret=True),
    Variable("ETL_CLASS_PAYLOAD_FILE", "payload_file", existing_file),
    Variable("PACKAGES", "packages", str),
    Variable("OS_PACKAGES", "os_packages", str),
    Variable("NUM_WORKERS", "workers", whole_number(1, 256)),
    Variable("NUM_THREADS", "threads", whole_number(1, 1024)),
    Variable("AIS_TARGET_URL", "target", target_url, secret=True),
    Variable("direct_put", "direct_put", parse_bool),
    Variable("DIRECT_PUT", "direct_put", parse_bool),
    Variable("ETL_DIRECT_FQN", "direct_fqn", parse_bool),
    Variable("AIS_DIRECT_PUT_RETRIES", "direct_put_retries", whole_number(0, 100)),
    Variable("AIS_SKIP_VERIFY", "skip_verify", parse_bool),
    Variable("AIS_SKIP_VERIFY_CRT", "skip_verify", parse_bool),
    Variable("AIS_CLIENT_CA", "client_ca", existing_file),
    Variable("AIS_CRT", "client_cert", existing_file),
    Variable("AIS_CRT_KEY", "client_key", existing_file),
    Variable("AIS_AUTHN_TOKEN", "token", str, secret=True),
    Variable("PORT", "port", whole_number(0, 65535)),
    Variable("LOG_LEVEL", "log_level", word_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")),
    Variable("ETL_FQN_ROOTS", "fqn_roots", folders),
    Variable("ETL_WS_FAILURE", "ws_failure", word_of("break", "empty")),
)


def join_payload(environ: Mapping[str, str], values: Dict[str, Any]) -> List[str]:
    """Join the pieces of the payload in `values`; return complaints about them."""
    further = {name for name, text in environ.items()
               if text and re.fullmatch("ETL_CLASS_PAYLOAD_[0-9]+", name)}
    names = [f"ETL_CLASS_PAYLOAD_{number}" for number in range(2, 2 + len(further))]
    missing, surplus = sorted({*names} - further), sorted(further - {*names})
    complaints = [f"{one} is not set, but {other} is" for one, other in zip(missing, surplus)]
    if further and not values.get("payload"):
        complaints.append("ETL_CLASS_PAYLOAD is not set, but a further piece of it is")
    if values.get("payload") and values.get("payload_file"):
        complaints.append("ETL_CLASS_PAYLOAD and ETL_CLASS_PAYLOAD_FILE are both set")
    values["payload"] = values.get("payload", "") + "".join(environ.get(name, "") for name in names)
    return complaints


class Settings(NamedTuple):
    """What the environment asks for; made by `from_env`, never changed."""

    payload: str = ""
    payload_file: str = ""
    packages: str = ""
    os_packages: str = ""
    workers: int = DEFAULT_WORKERS
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
                # a text with lines may be a private key, given in place of its file
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
        """Whether the environment has the class; else somebody tries one from a file."""
        return bool(self.payload or self.payload_file)

    def redact(self, text: str) -> str:
        """Replace the token and the target's secret path; users' errors may quote them."""
        path = "" if self.target.startswith("file:") else urlsplit(self.target).path
        name = path.rpartition("/")[2]
        secrets = {self.token, path, unquote(path), name, unquote(name)}
        for secret in sorted(secrets, key=len, reverse=True):  # a longer one may contain others
            if len(secret) > 3:
                text = text.replace(secret, "***")
        return text


LINE_BREAK = re.compile(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*")
WITH_LINES = {"has_lines": True}  # `extra` of a log record whose message has several lines


class RedactingFormatter(logging.Formatter):
    """Format log records, tracebacks too, without the secrets of the settings.

    The message of a record becomes one line, unless the record `has_lines`. A traceback follows it.
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
        """Format a traceback, or only its exception if no file can be opened for it."""
        text = attempt(super().formatException, ei).value
        return text if isinstance(text, str) else f"{type(ei[1]).__name__}: {describe(ei[1])}"


def stdout_handler(settings: Settings) -> logging.Handler:
    """Return a handler that writes log records to stdout, without secrets."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(RedactingFormatter(settings))
    return handler


def configure_logging(settings: Settings) -> None:
    """Send all log records to stdout, users' too: the pod's log is one stream."""
    handler = stdout_handler(settings)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logger.setLevel(settings.log_level)
    logger.handlers, logger.propagate = [handler], False


# == 4. Packages ==
# What the class needs, by the tools of the image: apk or apt-get, then pip. Runs in the supervisor,
# before the class is loaded; pip runs once more for a class that then needs a framework.

CREDENTIALS = re.compile(r"://(?:[^/\s]*|[^/:\s]*:(?![0-9]{1,5}/)[^@\s]*)@")


def hide_credentials(text: str) -> str:
    """Hide user and password in the URLs of a text, also where a password has a bare slash."""
    return CREDENTIALS.sub("://***@", text)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; return False where no process is left in it."""
    return attempt(os.killpg, group, number).error is None


def group_has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a child and all of its process group are gone."""
    if process.poll() is None:
        return False
    with contextlib.suppress(ChildProcessError):
        # orphans among them, which PID 1 has adopted
        while os.waitpid(-process.pid, os.WNOHANG)[0]:
            pass
    return not signal_group(process.pid, 0)


def end_all(send: Callable[[int], bool], seconds: float) -> None:
    """End processes by SIGTERM, and by SIGKILL what is left after a while.

    `send` sends a signal to all of them, 0 for none, and tells whether any is there.
    """
    deadline = time.monotonic() + seconds
    try:
        is_left = send(signal.SIGTERM)
        while is_left and time.monotonic() < deadline:
            time.sleep(0.01)
            is_left = send(0)
    finally:  # also when a second signal to us ends the wait
        send(signal.SIGKILL)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a child and all of its process group, whose leader it is."""
    end_all(lambda number: not group_has_ended(process) and signal_group(process.pid, number),
            TOOL_STOP_SECONDS)
    attempt(process.wait, TOOL_STOP_SECONDS)


def last_error(lines: Sequence[str]) -> str:
    """Return the last line of an error, with those that a colon at its end announces; or ""."""
    error = re.compile(r"error\b(?!.*subprocess-exited)", re.IGNORECASE)
    errors = [index for index, line in enumerate(lines) if error.match(line)]
    end = errors[-1] + 1 if errors else 0
    while 0 < end < len(lines) and lines[end - 1].endswith(":"):
        end += 1
    return " ".join(lines[errors[-1]:end] if errors else [])


def last_words(lines: Sequence[str]) -> str:
    """Pick from a tool's output what went wrong: its last error, all of apt-get's, or its end."""
    said = [line.strip() for line in lines]
    words = "; ".join(line[3:] for line in said if line.startswith("E: ")) or last_error(said)
    if "No matching distribution" in words and any("connection broken by" in line for line in said):
        words += "; the package index cannot be reached"  # which pip takes for one without it
    return words or (said or ["it printed nothing"])[-1]


class Tool:
    """An installer: it is run to its end, and while it runs the log says so.

    It has a session of its own, so that it and all that it starts can be ended together: when its
    time is over, and when a signal ends us, whose exception passes through `run`. What it prints
    goes into a temporary file, which it can neither fill nor keep open to hold us up.
    """

    def __init__(self, why: str, packages: Sequence[str], command: Sequence[str],
                 environ: Mapping[str, str]) -> None:
        self._name = command[2] if "-m" in command[1:2] else command[0]
        self._why = f"{why}: {self._name}"
        listed = hide_credentials(" ".join(packages))
        is_short = len(listed) <= 200
        self._packages = listed if is_short else listed[:200].rpartition(" ")[0] + " …"
        self._command = command
        self._environ = environ

    def run(self) -> List[str]:
        """Return its last lines; PackageError if it cannot be run, takes too long, or fails."""
        import subprocess
        import tempfile

        with contextlib.ExitStack() as stack:
            try:
                file = attempt(tempfile.TemporaryFile).value  # None where none can be written
                file = file or os.fdopen(os.memfd_create("output"), "w+b")
                self._output = stack.enter_context(file)
                process = subprocess.Popen(
                    self._command, env=dict(self._environ), stdin=subprocess.DEVNULL,
                    stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True)
            except OSError as error:
                raise PackageError(f"{self._why} cannot be run: {error.strerror}") from None
            stack.callback(stop_group, process)
            self._wait(process)
            if process.returncode:
                raise self._failure(process.returncode)
            return self.lines()

    def lines(self) -> List[str]:
        """Return the last lines of what it has printed, without credentials."""
        output = self._output.fileno()
        start = max(0, os.fstat(output).st_size - TOOL_OUTPUT_BYTES)
        *lines, last = re.split(b"[\r\n]+", os.pread(output, TOOL_OUTPUT_BYTES, start))
        whole = [line for line in (*lines[bool(start):], last) if line.strip()]
        return [self._shown(line) for line in whole[-TOOL_LINES_LIMIT:]]

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for its end, and tell meanwhile that it runs."""
        began = time.monotonic()
        while attempt(process.wait, TOOL_PROGRESS_SECONDS).error is not None:
            seconds, last = time.monotonic() - began, "".join(self.lines()[-1:]).strip()
            if seconds >= TOOL_SECONDS:
                self._log_lines("did not end in time")
                raise PackageError(
                    f"{self._why} did not end within {TOOL_SECONDS:.0f} s for {self._packages}; "
                    f"it last said: {last or 'nothing'}")
            logger.info("%s has been running for %.0f s%s", self._name, seconds,
                        last and f": {last}")

    def _shown(self, line: bytes) -> str:
        text = line[:TOOL_LINE_LIMIT_BYTES].decode("utf-8", "replace").rstrip()
        if len(line) > TOOL_LINE_LIMIT_BYTES:
            # it may end in half a URL, whose password could not be told from the rest
            text = text.rpartition(" ")[0] + " …"
        return hide_credentials(text)

    def _failure(self, code: int) -> PackageError:
        self._log_lines("failed")
        how = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        return PackageError(f"{self._why} {how} for {self._packages}: {last_words(self.lines())}")

    def _log_lines(self, what: str) -> None:
        said = "\n".join(self.lines()) or "(it printed nothing)"
        logger.error("%s %s:\n%s", self._name, what, said, extra=WITH_LINES)


APT_INSTALL = (
    "apt-get", "install", "-q", "-y", "--no-install-recommends",
    # else an unknown name with a dot is a regular expression, which finds hundreds
    "-o", "APT::Cmd::Pattern-Only=true",
    # else it asks, and ends
    "-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
    "-o", "Dpkg::Use-Pty=0")


def has_os_package(tool: str, name: str, environ: Mapping[str, str]) -> bool:
    """Tell whether a package is installed, in the version that is asked for."""
    import subprocess

    package, _, version = name.partition("=")
    ask = {"apk": ["apk", "info", "--installed", name],
           "apt-get": ["dpkg-query", "-W", "-f=${db:Status-Status} ${Version}\n", package]}
    said = attempt(lambda: subprocess.check_output(
        ask[tool], env=dict(environ), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        timeout=TOOL_QUERY_SECONDS)).value  # None where it failed
    wanted = ".*" if tool == "apk" else "(?m)^installed " + (re.escape(version) or ".*") + "$"
    return said is not None and bool(re.search(wanted, said.decode("utf-8", "replace")))


def run_os_tool(tool: str, names: Sequence[str], environ: Mapping[str, str]) -> None:
    """Install packages by apk, or by apt-get, whose lists an image comes without."""
    commands: List[Sequence[str]] = [["apk", "add", "--no-cache", *names]]
    if tool == "apt-get":
        commands = [["apt-get", "update", "-q"], [*APT_INSTALL, *names]]
        environ = {**environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in commands:
        for line in Tool("OS_PACKAGES", names, command, environ).run():
            if re.match("[EW]: ", line):  # a list is missing: apt-get takes that for a success
                logger.warning("%s %s: %s", *command[:2], line)


def install_os_packages(text: str, environ: Mapping[str, str] = os.environ) -> None:
    """Install what is missing of comma-separated packages, by apk where there is one, or apt-get.

    PackageError if neither is there, or it fails. An image that has all of them needs no root.
    """
    import shutil

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:  # apt-get would remove "name-"
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
    try:
        run_os_tool(tool, missing, environ)
    except PackageError as error:
        if not os.geteuid():
            raise
        raise PackageError(
            f"{error}; {tool} needs root, and this pod runs as user {os.geteuid()}") from None


@functools.lru_cache(maxsize=None)
def parse_requirement(text: str) -> Any:
    """Read a requirement as pip does; None for what is none, as a path or a URL alone.

    Where neither pip nor `packaging` is there, nothing but a name can be read.
    """
    for package in ("pip._vendor.packaging", "packaging"):
        parser = attempt(importlib.import_module, f"{package}.requirements").value
        if parser is not None:
            return attempt(parser.Requirement, text).value
    if not re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", text, re.ASCII):
        return None
    any_version = types.SimpleNamespace(contains=lambda version, _: True)
    return types.SimpleNamespace(name=text, url="", extras=(), marker=None, specifier=any_version)


def is_requirement(text: str) -> bool:
    """Tell whether a text is a requirement, a path or a URL, which pip takes too, or an option."""
    text = text.strip()
    return bool(re.match(r"-|[./~]|[\w+]+://", text) or parse_requirement(text))


def requirements_of(text: str, why: str) -> List[str]:
    """Split comma-separated requirements (PEP 508); PackageError for what is none, and for options.

    A comma may also be part of one: between two versions, in brackets or quotes, in a URL.
    """
    found: List[str] = []
    for part in filter(str.strip, text.split(",")):
        last = found[-1] if found else ""
        goes_on = part.lstrip()[0] in "<>=!~" or ("://" in last and not is_requirement(part))
        if last and (goes_on or not is_requirement(last)):
            found[-1] += "," + part
        else:
            found.append(part)
    requirements = [each.strip() for each in found]
    for requirement in requirements:
        shown = f"{why} has {hide_credentials(requirement)!r}"
        if re.search(r"(^|\s)-", requirement):
            raise PackageError(f"{shown}: options are not allowed, only requirements")
        if re.search(r"[\r\n]", requirement):
            raise PackageError(f"{shown}: requirements are parted by commas, not by line breaks")
    return requirements


def installed_version(name: str) -> Optional[str]:
    """Return a distribution's version, however its name is spelled (PEP 503).

    None if it is not there, or in part.
    """
    import importlib.metadata

    # Python 3.9 knows no more than that "_" is "-"
    spellings = (name, re.sub(r"[-_.]+", "-", name))
    # a broken one may raise anything
    found = [attempt(importlib.metadata.version, spelling).value for spelling in spellings]
    return next((version for version in found if isinstance(version, str)), None)


def is_lacking(wanted: Any) -> bool:
    """Tell whether a requirement that was read is for this Python, and not met by what is here."""
    if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
        return False
    version = installed_version(wanted.name)
    return version is None or not wanted.specifier.contains(version, True)


def is_installed(requirement: str) -> bool:
    """Tell whether what a requirement asks for is here for sure; anything more is for pip."""
    wanted = parse_requirement(requirement)
    is_plain = wanted is not None and not wanted.url and not wanted.extras
    return is_plain and attempt(is_lacking, wanted).value is False


def lacking(requirements: Iterable[str]) -> List[str]:
    """List the requirements that are not met for sure."""
    return [each for each in requirements
            if attempt(is_lacking, parse_requirement(each)).value is True]


class TargetFolder:
    """Where pip installs what site-packages cannot take, for this process and its children.

    There is none before `take_over`; it is removed when the process that owns it ends.
    """

    def __init__(self) -> None:
        self.path = ""
        self.may_be_made = True  # not by the command `install`, with whose process it would go
        self.requirements: List[str] = []  # of all pip runs, since each resolves them anew

    def take_over(self, path: str, requirements: Iterable[str] = ()) -> None:
        """Be the owner of a folder, which has these already."""
        import shutil

        self.path, self.requirements = path, list(requirements)
        weakref.finalize(self, shutil.rmtree, path, True)  # forked workers forget it

    def use(self, environ: MutableMapping[str, str]) -> None:
        """Have it searched before site-packages, but after the standard library."""
        if self.path not in sys.path:
            names = list(map(os.path.basename, sys.path))
            places = [names.index(name) for name in ("site-packages", "dist-packages")
                      if name in names]
            sys.path.insert(min(places, default=len(names)), self.path)
        modules = list(filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)))
        if self.path not in modules:
            environ["PYTHONPATH"] = os.pathsep.join([*modules, self.path])
            commands = (environ.get("PATH", os.defpath), os.path.join(self.path, "bin"))
            environ["PATH"] = os.pathsep.join(commands)


target_folder = TargetFolder()


def pip_target(requirements: Sequence[str]) -> Tuple[str, List[str]]:
    """Return the folder that pip is to fill, and the arguments that make it do so."""
    import sysconfig
    import tempfile

    paths = sysconfig.get_paths()
    mark = os.path.join(paths["stdlib"], "EXTERNALLY-MANAGED")
    is_of_system = sys.prefix == sys.base_prefix and os.path.exists(mark)
    if not is_of_system and all(
            os.access(paths[name], os.W_OK) for name in ("purelib", "platlib", "scripts")):
        return paths["purelib"], list(requirements)
    if not target_folder.may_be_made:
        raise PackageError(f"{paths['purelib']} cannot be written, or belongs to the system; run "
                           f"install as root, in a Python or environment of its own")
    if not target_folder.path:
        path, error = attempt(tempfile.mkdtemp, "", "ais-packages-")
        if error is not None:
            raise PackageError(
                f"neither {paths['purelib']} nor any folder for temporary files can be written; "
                f"install it into the image, or give the pod a writable /tmp")
        target_folder.take_over(path)
    known = target_folder.requirements
    known += [requirement for requirement in requirements if requirement not in known]
    return target_folder.path, ["--upgrade", "--target", target_folder.path, *known]


def use_packages_of(folder: str, environ: MutableMapping[str, str]) -> None:
    """Have packages found that pip has put into a folder, by this process and its children."""
    import site

    if folder == target_folder.path:
        target_folder.use(environ)
    site.addsitedir(folder)  # reads its .pth files, as a start of Python does
    importlib.invalidate_caches()


def install_python_packages(text: str, why: str = "PACKAGES",
                            environ: MutableMapping[str, str] = os.environ) -> None:
    """Install what is missing of comma-separated requirements, by one run of pip.

    `why` begins the PackageError of a failure. pip's own variables reach it; what it installs can
    be imported at once.
    """
    import importlib.util

    requirements = requirements_of(text, why)
    if all(map(is_installed, requirements)):
        return
    shown = hide_credentials(" ".join(requirements))
    try:
        if importlib.util.find_spec("pip") is None:
            raise PackageError("this Python has no pip (No module named pip); take an image that "
                               "has it, or install the packages into the image")
        folder, arguments = pip_target(requirements)
    except PackageError as error:
        raise PackageError(f"{why}: cannot install {shown}: {error}") from None
    logger.info("installing Python packages: %s", shown)
    variables = {
        "PIP_ROOT_USER_ACTION": "ignore", **environ, "PYTHONUNBUFFERED": "1", "PIP_USER": "0"}
    for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN"):
        variables.pop(name, None)  # what went elsewhere could not be imported
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
               "--progress-bar=off", *arguments]
    Tool(why, requirements, command, variables).run()
    use_packages_of(folder, environ)
    lost = hide_credentials(" ".join(lacking(requirements)))
    if lost:
        raise PackageError(
            f"{why}: pip was content, but {lost} cannot be found here: its configuration (pip "
            f"config list) has it install elsewhere or not at all, by target, prefix, root or "
            f"dry-run")


def pip_command(requirements: Iterable[str]) -> str:
    """Return the command that installs requirements."""
    import shlex

    return hide_credentials(f"pip install {shlex.join(requirements)}")


# == 5. HTTP messages ==
# What requests and answers have in common: header fields, and bodies that know whether they are
# whole. The caller owns the connection that bytes come from. The grammar is that of RFC 9110, 5.6
# and RFC 9112; nothing that violates it is repaired.

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rf"({TOKEN.decode()}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~\x80-\xff]*)?")
FIELD_LINE = re.compile(rb"%b:[\t -~\x80-\xff]*\r\n" % TOKEN)
FIELD_LINES = re.compile(f"(?:{FIELD_LINE.pattern.decode()})*")
FIELD = re.compile(r"([^:\r]+):([^\r]*)\r\n")
HOST = re.compile(r"[0-9A-Za-z._~%!$&'()*+,;=:\[\]-]*")
HOST_NAME = re.compile(r"[^.]{1,63}(?:\.[^.]{1,63})*\.?")  # the resolver cannot encode other names
# fields that frame a message, or tell whom it is for: two of them would be ambiguous
SINGLE = frozenset(("content-length", "transfer-encoding", "host", "expect"))


class Fields(Dict[str, str]):
    """Header fields by name; upper and lower case are the same."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a field."""
        return super().get(name.lower(), default)


@functools.lru_cache(maxsize=32)
def parse_fields(text: str) -> Mapping[str, str]:
    """Parse header fields, lines with CRLF; return their values by lower-case name.

    Values of a repeated field are joined by commas; a field in `SINGLE` must not be repeated. All
    fields are matched at once, which is several times faster than line by line. Results are cached,
    since clients send the same fields again and again.
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

    The input does not own the connection. Time-outs are those of the socket. A client's are set in
    the kernel, so that a read is one system call, and raise BlockingIOError; a node's are Python's
    and raise socket.timeout.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._start = 0  # where the unread bytes of the buffer begin
        self.ahead = 0  # how many they are
        # sends "100 Continue" before the first wait for a body
        self.invite: Optional[Callable[[], None]] = None

    def fill(self, flags: int = 0) -> bool:
        """Receive once more; return False at the end of the connection."""
        return self._add(self._connection.recv(READ_BYTES, flags))

    def _add(self, data: bytes) -> bool:
        self._buffer = self._buffer[self._start:] + data if self.ahead else data
        self._start = 0
        self.ahead = len(self._buffer)
        return bool(data)

    def need(self, count: int) -> bool:
        """Receive until `count` bytes are buffered; return False if they do not come."""
        while self.ahead < count:
            if not self.fill():
                return False
        return True

    def find(self, mark: bytes, limit: int) -> int:
        """Return the offset of `mark` in the first `limit` buffered bytes, or -1."""
        found = self._buffer.find(mark, self._start, self._start + limit)
        return found - self._start if found >= 0 else -1

    def peek(self, count: int) -> bytes:
        """Return up to `count` buffered bytes and leave them in the buffer."""
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
        """Read some bytes, buffered or received; return 0 at the connection's end."""
        if not self.ahead:
            self.send_invitation()
            return self._connection.recv_into(buffer, 0, flags)
        data = self.take(len(buffer))
        buffer[:len(data)] = data
        return len(data)

    def send_invitation(self) -> None:
        """Tell the client to send its body, if it waits for that (RFC 9110, 10.1.1)."""
        if self.invite is not None:
            invite, self.invite = self.invite, None
            invite()


def set_timeout(connection: socket.socket, option: int, seconds: float) -> None:
    """Set a time-out of the kernel, SO_RCVTIMEO or SO_SNDTIMEO.

    Python's own time-outs cost a system call for each receive and each send.
    """
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, option, value)


def send_some(connection: socket.socket, parts: Sequence[Any], flags: int = 0) -> Sequence[Any]:
    """Send parts in one system call; return what the kernel did not take."""
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
    """Send all parts; raise BlockingIOError if nobody reads them for too long."""
    while parts:
        parts = send_some(connection, parts)


# the name of a body, and the error to raise if it is cut short or malformed
BodyKind = Tuple[str, Type[RequestError]]
OF_REQUEST: BodyKind = ("the request's body", ShortBody)
OF_NODE: BodyKind = ("another node's answer", NodeBodyLost)


def read_to_end(raw: io.RawIOBase, size: Optional[int]) -> bytes:
    """Read a raw file to its end without a second copy in memory; do not close it."""
    if size is None:
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

    size: Optional[int] = None  # bytes of the whole body; None if only its end tells
    failure: Optional[RequestError] = None  # raised by a read
    count = 0  # bytes read

    def receive(self, buffer: Any) -> int:
        """Read some bytes, 0 at the end; raise RequestError if the body is cut short."""
        raise NotImplementedError

    def finish(self) -> None:
        """Raise a RequestError unless the body is whole, whatever has read it."""
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise the error of an earlier read.

        Users' code may have caught it and taken a cut body for a whole one.
        """
        if self.failure is not None:
            raise self.failure

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes, 0 at the end. After a failure, every read raises it again."""
        self.raise_failure()
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
    """A body that comes over a connection; any one thread may read it."""

    def __init__(self, source: ConnectionInput, kind: BodyKind = OF_REQUEST) -> None:
        super().__init__()
        self._source = source
        self._kind = kind
        self.is_at_end = False

    def finish(self) -> None:
        """Read to the end: a lost client must be noticed, whatever the class has read."""
        while self.failure is None and self.read(READ_BYTES):
            pass
        super().finish()

    def drain(self, limit: int, deadline: float) -> None:
        """Read the rest and drop it, up to `limit` bytes and a time of time.monotonic()."""
        while not (self.is_at_end or self.failure or limit <= 0 or time.monotonic() >= deadline):
            limit -= len(self.read(READ_BYTES) or b"")

    def _call(self, read: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the input; its errors mean that the body is cut short."""
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
    """A body with a `Content-Length`; a message without a body has one of 0 bytes."""

    # MSG_WAITALL saves system calls if nobody waits for the first bytes of a body
    receive_flags = 0

    def __init__(self, source: ConnectionInput, size: int, kind: BodyKind = OF_REQUEST) -> None:
        super().__init__(source, kind)
        self.size = size
        self._left = size
        self.is_at_end = not size

    def receive(self, buffer: Any) -> int:
        """Read some of the bytes that are left."""
        if not self._left:
            return 0
        view = memoryview(buffer)[:self._left]
        count: int = self._call(self._source.readinto, view, self.receive_flags)
        if not count:
            raise self._cut(f"ended {self._left} bytes early")
        self._left -= count
        self.is_at_end = not self._left
        return count

    def readall(self) -> bytes:
        """Read what is left; take a small body, which came with its head, in one piece."""
        if self._source.ahead < self._left or self._left != self.size:
            return super().readall()
        data = self._source.take(self._left)
        self.count, self._left, self.is_at_end = len(data), 0, True
        return data


class ChunkedReader(MessageBody):
    """A body in chunks (RFC 9112, 7.1); only the last chunk makes it whole."""

    SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n\0]*)?\r\n")

    def __init__(self, source: ConnectionInput, kind: BodyKind = OF_REQUEST) -> None:
        super().__init__(source, kind)
        self._left = 0  # bytes of the chunk
        self._is_first = True

    def receive(self, buffer: Any) -> int:
        """Read some bytes of a chunk."""
        if not self._left and not self.is_at_end:
            self._begin_chunk()
        if self.is_at_end:
            return 0
        count: int = self._call(self._source.readinto, memoryview(buffer)[:self._left])
        if not count:
            raise self._cut("ended early")
        self._left -= count
        return count

    def _begin_chunk(self) -> None:
        """Read the end of one chunk and the size of the next, or the trailers."""
        if not self._is_first and self._readline() != b"\r\n":
            raise self._cut("is malformed: a chunk is longer than it said")
        self._is_first = False
        match = self.SIZE_LINE.fullmatch(self._readline())
        if match is None:
            raise self._cut("is malformed: the size of a chunk")
        self._left = int(match[1], 16)
        if not self._left:
            self._skip_trailers()
            self.is_at_end = True

    def _skip_trailers(self) -> None:
        """Read trailer fields up to the empty line; they mean nothing to us."""
        for _ in range(HEAD_LIMIT_FIELDS):
            line = self._readline()
            if line == b"\r\n":
                return
            if not FIELD_LINE.fullmatch(line):
                raise self._cut("is malformed: a trailer field")
        raise self._cut("is malformed: it has too many trailer fields")

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
    """A body that ends with its connection, so that a cut cannot be noticed."""

    def receive(self, buffer: Any) -> int:
        """Read some bytes."""
        count: int = self._call(self._source.readinto, buffer)
        self.is_at_end = not count
        return count


# == 6. Other nodes ==
# Connections to the target, and bodies that come from there. Any thread of a worker; it knows no
# ETLRequest.


def parse_etl_pipeline(pipeline_header: str) -> Tuple[str, str]:
    """Split a pipeline into its first URL and the header for the rest; InvalidPipelineError for an empty entry."""
    if not pipeline_header or not pipeline_header.strip():
        return "", ""
    if not all(url.strip() for url in pipeline_header.split(",")):
        # the real SDK's, if it is there and a class uses it
        sdk_errors = sys.modules.get("aistore.sdk.errors")
        raise getattr(sdk_errors, "InvalidPipelineError", InvalidPipelineError)("the pipeline has an empty entry")
    first, _, rest = pipeline_header.partition(",")
    return first.strip(), rest.strip()


def is_final(url: str) -> bool:
    """Tell an entry that is an object at its target, which has a path, from the next stage, which has none."""
    return urlsplit(url).path not in ("", "/")


def compose_etl_direct_put_url(direct_put_url: str, host_target: str, obj_path: str, etl_args: str = "") -> str:
    """Make the URL that a result is put to, from the pipeline's entry and the object's decoded path.

    An entry with a path is the object at its final target, which wants the secret path of
    `host_target` before it and speaks that one's scheme. One without is the next stage, a pod: it
    gets the object's path, by its own scheme.
    """
    entry, host = urlsplit(direct_put_url), urlsplit(host_target)
    query = entry.query
    if etl_args:
        others = [item for item in query.split("&") if item and item.partition("=")[0] != QPARAM_ARGS]
        query = "&".join([*others, f"{QPARAM_ARGS}={quote(etl_args, safe='')}"])
    if is_final(direct_put_url):
        return urlunsplit((host.scheme, entry.netloc, host.path + entry.path, query, ""))
    path = quote("/" + obj_path.lstrip("/"), safe="/@", errors="surrogateescape")
    return urlunsplit((entry.scheme, entry.netloc, path, query, ""))


class Hop(NamedTuple):
    """A node, as far as a connection cares."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Hop:
        """Take the node from a URL; ValueError where there is none."""
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and HOST.fullmatch(parts.netloc)
        if not is_web or not HOST_NAME.fullmatch(parts.hostname or ""):
            raise ValueError(f"{hide_credentials(url)!r} is no http(s) URL without a password")
        return cls(parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


def escape_stray(text: str) -> str:
    """Escape what must not stand in a request line, and nothing else: the rest goes out byte for byte."""
    def escape(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in match[0].encode("latin-1" if match[0] < "\u0100" else "utf-8"))

    return re.sub("[^!-~]", escape, text)


def path_of(url: str) -> str:
    """Take path and query from a URL, as they go into a request line."""
    return escape_stray(urlunsplit(("", "", *urlsplit(url)[2:4], ""))) or "/"


class NodeRequest(NamedTuple):
    """What to send to another node. `path` goes out byte for byte; a body of pieces in chunks, and is closed then."""

    method: str
    hop: Hop
    path: str
    headers: Mapping[str, str] = {}
    body: Union[bytes, Iterator[bytes], None] = None
    connect_seconds: float = CONNECT_SECONDS
    silence_seconds: float = HOP_SILENCE_SECONDS

    @property
    def is_repeatable(self) -> bool:
        """Whether the body can be sent a second time."""
        return self.body is None or isinstance(self.body, bytes)

    def head(self, token: str) -> bytes:
        """Write the request line and the header fields, and a small body behind them: one packet for small objects."""
        host = f"[{self.hop.host}]" if ":" in self.hop.host else self.hop.host
        fields = {"Host": f"{host}:{self.hop.port}", "Accept-Encoding": "identity", **self.headers}
        if token:
            fields["Authorization"] = f"Bearer {token}"
        if isinstance(self.body, bytes):
            fields["Content-Length"] = str(len(self.body))
        elif self.body is not None:
            fields["Transfer-Encoding"] = "chunked"
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self._small_body

    @property
    def _small_body(self) -> bytes:
        return self.body if isinstance(self.body, bytes) and len(self.body) <= READ_BYTES else b""

    def pieces(self) -> Iterator[Union[bytes, memoryview]]:
        """Cut the body into writes, less a small one: as it is if it has a length, else in chunks (RFC 9112, 7.1)."""
        if isinstance(self.body, bytes):
            if not self._small_body:
                yield self.body
        elif self.body is not None:
            with contextlib.closing(cast(Any, self.body)) as pieces:
                for piece in pieces:
                    yield b"%x\r\n%b\r\n" % (len(piece), piece)
                yield b"0\r\n\r\n"


class NodeAnswer(NamedTuple):
    """What another node answered, whole; has the attributes of a `requests.Response` that classes look at."""

    status_code: int
    headers: Mapping[str, str]
    content: bytes
    url: str


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Make the TLS side of connections to AIStore's nodes; ConfigError where a certificate is none."""
    try:
        context = ssl.create_default_context(cafile=settings.client_ca or None)
        if settings.client_cert:
            context.load_cert_chain(settings.client_cert, settings.client_key or None)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"AIS_CLIENT_CA, AIS_CRT or AIS_CRT_KEY cannot be used: {error}") from None
    if settings.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class AnswerHead(NamedTuple):
    """The head of another node's answer."""

    status: int
    fields: Fields
    keeps_alive: bool

    @classmethod
    def parse(cls, data: bytes) -> AnswerHead:
        """Parse a head, its lines each with CRLF; ConnectionError where it is none."""
        line, _, rest = data.partition(b"\r\n")
        match = STATUS_LINE.fullmatch(line)
        try:
            fields = Fields(parse_fields(rest.decode("latin-1")))
        except UnframedRequest as error:
            raise ConnectionError(f"its answer cannot be understood: {error}") from None
        if match is None or fields.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise ConnectionError("its answer cannot be understood")
        connection = fields.get("Connection", "keep-alive" if match[1] == b"1" else "close").lower()
        return cls(int(match[2]), fields, "close" not in connection)


class NothingAnswered(ConnectionError):
    """The node ended the connection before any byte of an answer."""


def is_ready(connection: socket.socket, events: int, timeout_seconds: float = 0.0) -> bool:
    """Tell whether a socket is ready for any of some events of select.poll, or gets so in time; its end counts."""
    poller = select.poll()
    poller.register(connection, events)
    return bool(poller.poll(1000 * timeout_seconds))


class NodeInput(ConnectionInput):
    """What a node sends; while it is waited for, what is left of the request's body goes out.

    A node may answer before it has taken all: a stage that streams, or one that refuses and reads
    no further. If all was sent before anything is read, both sides would block once the buffers
    between them are full. `silence_seconds` is how long the node may take and send nothing.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.silence_seconds = 0.0
        self.is_sent = True  # whether all of the request's body is gone
        self._is_sending = False  # whether something of it is left, and the node takes it
        self._pieces: Iterator[Any] = itertools.chain()
        self._rest = memoryview(b"")  # of the piece that is on its way
        self._is_tls = isinstance(connection, ssl.SSLSocket)
        # what a socket says that does not block
        self._not_now: Tuple[Type[OSError], ...] = (BlockingIOError,)
        if self._is_tls:
            self._not_now += (ssl.SSLWantReadError, ssl.SSLWantWriteError)

    def begin(self, head: bytes, pieces: Iterator[Any]) -> None:
        """Send the head of a request, and take over the pieces of its body."""
        self._connection.settimeout(self.silence_seconds)
        self._pieces, self._rest = pieces, memoryview(b"")
        self.is_sent, self._is_sending = False, True
        self._send(lambda: self._connection.sendall(head))
        self._next_piece()

    def fill(self, flags: int = 0) -> bool:
        """Receive once more, and send until that comes; False at the end of the connection."""
        if not self._is_sending:
            return super().fill(flags)
        self._connection.settimeout(0)
        try:
            while self._is_sending:
                came = self._receive_now()
                if came is not None:
                    return came
                self._send_some()
        finally:
            self._connection.settimeout(self.silence_seconds)
        return super().fill(flags)

    def _receive_now(self) -> Optional[bool]:
        """Receive what is here, False at the end of the connection; None where nothing is."""
        if not (self._is_tls or is_ready(self._connection, select.POLLIN)):
            return None
        try:
            return super().fill()
        except self._not_now:  # what was readable may be TLS's own
            return None

    def readinto(self, buffer: Any, flags: int = 0) -> int:
        """Read some bytes, 0 at the end of the connection."""
        if self._is_sending and not self.ahead and not self.fill():
            return 0
        return super().readinto(buffer, flags)

    def _send_some(self) -> None:
        """Send what the node takes, or wait until it takes or sends something."""
        try:
            sent = self._send(lambda: self._connection.send(self._rest[:WRITE_BYTES]))
            self._rest = self._rest[sent:]
            self._next_piece()
        except self._not_now:
            events = select.POLLIN | select.POLLOUT
            if not is_ready(self._connection, events, self.silence_seconds):
                raise TimeoutError(f"took nothing for {self.silence_seconds:.0f} s") from None

    def _send(self, send: Callable[[], Optional[int]]) -> int:
        """Send something; a node that has hung up may have answered before, and takes no more."""
        try:
            return send() or 0
        except ConnectionError:
            self._is_sending = False
            return 0

    def _next_piece(self) -> None:
        """Take the next piece of the body once one is gone."""
        while self._is_sending and not self._rest:
            piece = next(self._pieces, None)
            self.is_sent = piece is None
            self._is_sending = not self.is_sent
            self._rest = memoryview(piece or b"")

    def run_out(self) -> None:
        """Take what is left of the body and send none of it, to see that it would come right."""
        self._is_sending = False
        collections.deque(self._pieces, 0)

    def stop(self) -> None:
        """Take nothing more of the body, and let go of it."""
        self._is_sending = False
        getattr(self._pieces, "close", lambda: None)()  # there are none yet if it failed early


class NodeConnection:
    """One connection to a node: connected when made, owned by one request at a time.

    OSError where the node cannot be reached.
    """

    def __init__(self, request: NodeRequest, tls: Optional[ssl.SSLContext]) -> None:
        hop = self.hop = request.hop
        self.idle_since = 0.0
        self.socket: socket.socket = socket.create_connection(
            (hop.host, hop.port), request.connect_seconds)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.socket.close)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            if tls is not None:
                self.socket = tls.wrap_socket(
                    self.socket, server_hostname=hop.host, suppress_ragged_eofs=False)
            on_failure.pop_all()
        self.input = NodeInput(self.socket)

    def is_usable(self) -> bool:
        """Tell whether it may be used again: neither idle for long, nor ended by the node."""
        is_fresh = time.monotonic() - self.idle_since < HOP_IDLE_SECONDS
        return is_fresh and not is_ready(self.socket, select.POLLIN)

    def begin(self, request: NodeRequest, token: str) -> None:
        """Send a request's head, and a small body with it."""
        self.input.silence_seconds = request.silence_seconds
        self.input.begin(request.head(token), request.pieces())

    def read_head(self) -> AnswerHead:
        """Read the answer's head; NothingAnswered where the connection ends before any of it."""
        while True:
            end = self.input.find(b"\r\n\r\n", HEAD_LIMIT_BYTES)
            if end < 0:
                if self.input.ahead >= HEAD_LIMIT_BYTES:
                    raise ConnectionError("its answer has too long a head")
                self._read_more()
                continue
            head = AnswerHead.parse(self.input.take(end + 4)[:-2])
            if head.status >= 200:  # others come before the answer, as "100 Continue"
                return head

    def _read_more(self) -> None:
        has_begun = self.input.ahead > 0
        try:
            goes_on = self.input.fill()
        except ConnectionError as error:
            raise error if has_begun else NothingAnswered(str(error)) from None
        if not goes_on:
            cut = ConnectionError("its answer was cut short")
            raise cut if has_begun else NothingAnswered("it ended the connection")

    def body(self, head: AnswerHead) -> MessageBody:
        """Tell how an answer's body ends (RFC 9112, 6.3)."""
        if head.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
            return BoundedReader(self.input, 0, OF_NODE)
        if "Transfer-Encoding" in head.fields:
            return ChunkedReader(self.input, OF_NODE)
        length = head.fields.get("Content-Length")
        if length is None:
            return ClosingReader(self.input, OF_NODE)
        if not re.fullmatch("[0-9]{1,18}", length):
            raise ConnectionError("its answer has no usable length")
        return BoundedReader(self.input, int(length), OF_NODE)

    def close(self) -> None:
        """Close it, and let go of the body: without its last chunk no node takes it for whole."""
        self.input.stop()
        self.socket.close()


class NodeBody(BodyStream):
    """Another node's answer, its body unread.

    `close` gives the connection back, or closes it where bytes are left.
    """

    def __init__(self, head: AnswerHead, body: MessageBody, source: NodeInput,
                 release: Callable[[], None]) -> None:
        super().__init__()
        self.status = head.status
        self.headers = head.fields
        self.size = body.size
        self.is_early = not source.is_sent
        self.can_be_checked = not isinstance(body, ClosingReader)
        self._body = body
        self._source = source
        self._release = release

    def receive(self, buffer: Any) -> int:
        """Read some bytes; NodeBodyLost where the answer ends before its time.

        At its end, what is left of the request's own body is run to its end, whose failure is that
        of the exchange.
        """
        count = self._body.receive(buffer)
        if not count:
            self._source.run_out()
        return count

    def readall(self) -> bytes:
        """Read to the end, also of a body of a known size, of which the end is not read."""
        data = super().readall()
        self._source.run_out()
        return data

    def close(self) -> None:
        """Let go of the connection, and of a body that is still being sent."""
        if not self.closed:
            super().close()
            self._release()


def read_text(body: NodeBody) -> bytes:
    """Read an answer that is not content, up to a limit; of an error, what there is: a cut text is better than none."""
    text = b""
    while len(text) < ERROR_TEXT_LIMIT_BYTES:
        piece, error = attempt(body.read, ERROR_TEXT_LIMIT_BYTES - len(text))
        if error is not None and body.status < 400:
            raise error
        if not piece:
            break
        text += piece
    return text


class ConnectionPool:
    """Connections to other nodes, kept alive per hop, for any thread.

    Owned by the worker. A connection belongs to one request until that request's answer is read to
    its end; then it stays here for `HOP_IDLE_SECONDS`.
    """

    def __init__(self, settings: Settings) -> None:
        self._token = settings.token
        self._settings = settings
        # made when first needed: reading the authorities takes a while
        self._tls: Optional[ssl.SSLContext] = None
        self._lock = threading.Lock()
        self._idle: Dict[Hop, List[NodeConnection]] = {}

    def open(self, request: NodeRequest) -> NodeBody:
        """Send a request; return the answer, its body unread. The caller closes it.

        A kept connection may have been closed by the node while the request was on its way: if it
        breaks before any byte of an answer, the request goes out once more on a new one, unless its
        body can be sent only once. OSError tells that the node was lost.
        """
        kept = self._take_kept(request.hop) if request.is_repeatable else None
        if kept is not None:
            try:
                return self._exchange(kept, request)
            except NothingAnswered:
                logger.debug("a kept connection to %s was closed; dialing anew", request.hop.host)
        return self._exchange(NodeConnection(request, self._tls_for(request.hop)), request)

    def _take_kept(self, hop: Hop) -> Optional[NodeConnection]:
        """Take the idle connection that was used last, if it is still good; close those that are not."""
        while True:
            with self._lock:
                kept = self._idle.get(hop)
                if not kept:
                    return None
                connection = kept.pop()
            if connection.is_usable():
                return connection
            connection.close()

    def _tls_for(self, hop: Hop) -> Optional[ssl.SSLContext]:
        if hop.scheme == "https" and self._tls is None:
            self._tls = tls_context(self._settings)
        return self._tls if hop.scheme == "https" else None

    def _exchange(self, connection: NodeConnection, request: NodeRequest) -> NodeBody:
        """Send on one connection and read the answer's head; close it if that fails."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(connection.close)
            connection.begin(request, self._token)
            head = connection.read_head()
            body = connection.body(head)
            on_failure.pop_all()
        answer = NodeBody(
            head, body, connection.input, lambda: self._release(connection, is_good and body.is_at_end))
        # others go out on new connections, and would pile up
        is_good = not answer.is_early and head.keeps_alive and request.is_repeatable
        if head.status >= 300:  # it wants no more
            connection.input.stop()
        return answer

    def _release(self, connection: NodeConnection, is_good: bool) -> None:
        """Keep a connection whose answer was read to its end, close any other."""
        if not is_good or connection.input.ahead:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        with self._lock:
            self._idle.setdefault(connection.hop, []).append(connection)

    def close_idle(self) -> None:
        """Close the connections that have been idle for too long."""
        oldest = time.monotonic() - HOP_IDLE_SECONDS
        with self._lock:
            everything, self._idle = self._idle, {}
            for hop, kept in everything.items():
                good = [connection for connection in kept if connection.idle_since >= oldest]
                if good:
                    self._idle[hop] = good
        for connection in itertools.chain(*everything.values()):
            if connection.idle_since < oldest:
                connection.close()


# == 7. The ETL class contract ==
# What users subclass: the SDK's names, attributes and methods (aistore/sdk/etl/webserver of SDK
# 1.24 and 2.0), without its servers. An instance is made in a worker, after the fork, and lives as
# long as that.


REPORT_READY = b"R"
REPORT_BEGUN = b"B"  # to serve a request, for the first time
REPORT_ANSWERED = b"A"  # for the first time
REPORT_STORY = b"S"  # a line of the traceback that belongs to a failed start, which follows
REPORT_OPENED = b"O"  # a WebSocket connection
REPORT_CLOSED = b"C"  # a WebSocket connection
REPORT_BROKEN = b"X"  # a failed object has closed a WebSocket connection; the reason follows
REPORT_FAILED = b"F"  # an exit code, a space and the reason follow
# a framework's name, a space, and 1 where it is to serve the class or 0 where it is imported
REPORT_NEEDS = b"N"


class Framework(NamedTuple):
    """A framework that a class may need: modules, and the requirements that bring them.

    The first module is imported by classes, the others serve them. The bounds are those of
    setup.cfg's extras.
    """

    server: str  # "": this runtime's own
    modules: Mapping[str, str]


FRAMEWORKS: Mapping[str, Framework] = {
    "fastapi": Framework("uvicorn", {
        "fastapi": "fastapi>=0.110", "uvicorn": "uvicorn[standard]>=0.29",
        "websockets": "uvicorn[standard]>=0.29"}),
    "flask": Framework("", {"flask": "flask>=3.0"}),
}


FRAMEWORK_OF: Dict[type, str] = {}  # of each base class that has an application: a key of these


def framework_of(cls: type) -> str:
    """Name the framework of an ETL class, "" where it has none."""
    return next((FRAMEWORK_OF[base] for base in cls.__mro__ if base in FRAMEWORK_OF), "")


class Share:
    """One worker's share of the connections, in memory that all workers of a pod see.

    The kernel wakes all workers for a connection, and the quickest would get most of them: the one
    that is awake. So a worker that has more than another gives the others a moment. One that is
    gone counts as having more than anybody.
    """

    ABSENT = 0xFFFFFFFF
    COUNT_BYTES = 4

    def __init__(self, counts: memoryview, slot: int) -> None:
        self._counts = counts
        self._slot = slot
        self.leave()

    @classmethod
    def allot(cls, workers: int) -> List[Share]:
        """Make the shares of workers that are not there yet; forked ones have the same memory."""
        counts = memoryview(mmap.mmap(-1, cls.COUNT_BYTES * workers)).cast("I")
        return [cls(counts, slot) for slot in range(workers)]

    def publish(self, connections: int) -> None:
        """Tell the other workers how many connections this one has."""
        self._counts[self._slot] = connections

    def leave(self) -> None:
        """Tell the other workers that this one is not there."""
        self.publish(self.ABSENT)

    @property
    def excess(self) -> int:
        """How many connections this worker has more than the one that has least."""
        return self._counts[self._slot] - min(self._counts)


class Current:
    """What this process runs with: one value for all instances, filled by `main` before these."""

    settings: Optional[Settings] = None
    pool: Optional[ConnectionPool] = None
    listener: Optional[socket.socket] = None  # the workers' shared socket, in a worker
    reports: Optional[int] = None  # the pipe to the supervisor, in a worker
    gate: Optional[int] = None  # a pipe that ends once the worker may serve, in a worker
    share: Optional[Share] = None  # of the connections, in a worker
    # whether a file is imported for its class: instances that it makes are not served
    is_loading = False
    began = 0.0  # when this program did, in seconds since the system's start
    output = 1  # the descriptor of the log
    last_line = ""  # of the log, the reason of a failed start


def report(message: bytes) -> None:
    """Tell the supervisor, if there is one; a message is shorter than what a pipe takes at once."""
    if Current.reports is not None:
        with contextlib.suppress(BrokenPipeError):  # it is gone, and this worker is about to be
            os.write(Current.reports, message[:2000] + b"\n")


def how_to_get(package: str) -> str:
    """Tell how to get a package: in a pod, or on a laptop."""
    is_laptop = Current.settings is not None and not Current.settings.is_pod
    return pip_command([package]) if is_laptop else f"add {package} to PACKAGES"


# What the runtime keeps with an instance, in its `vars`, apart from the names that a class may use:
# its session, the framework's application, and what answers that one's requests for objects
SESSION, APP, ANSWER = "ais_runtime_min.session", "ais_runtime_min.app", "ais_runtime_min.answer"


def require_framework(server: Any) -> None:
    """See to it that the framework serves a class; outside the runtime, the class does."""
    is_served = Current.reports is not None and not Current.is_loading
    if is_served and not (Current.settings or Settings()).server:
        raise FrameworkNeeded(framework_of(type(server)), serves=True)


def app_of(server: Any) -> Any:
    """Return the application of an instance; where there is none, make it and have it prepared."""
    kept, name = vars(server), framework_of(type(server))
    if kept.get(APP) is None:
        require_framework(server)
        framework = importlib.import_module(name)
        if name == "fastapi":
            kept[APP] = framework.FastAPI()
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
        logging.basicConfig(level=settings.log_level, handlers=[stdout_handler(settings)])
        self.logger = logging.getLogger(type(self).__name__)
        self.logger.setLevel(settings.log_level)
        self.use_streaming = streams(type(self))

    @property
    def session(self) -> Any:
        """A `requests.Session` for the class's own use, made when it is first touched."""
        if vars(self).get(SESSION) is None:
            vars(self)[SESSION] = self._build_session()
        return vars(self)[SESSION]

    @session.setter
    def session(self, session: Any) -> None:
        """Take a session of the class's own making."""
        vars(self)[SESSION] = session

    def _build_session(self) -> Any:
        """Make the session, with certificates and token; ImportError without `requests`."""
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
        """Transform a whole object: its bytes, or its local path where `ETL_DIRECT_FQN` is on."""
        raise NotImplementedError("override transform() or transform_stream()")

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        """Transform an object in pieces, in constant memory; the reader ends where it does."""
        raise NotImplementedError("override transform() or transform_stream()")

    def get_mime_type(self) -> str:
        """Name the `Content-Type` of results."""
        return DEFAULT_MIME_TYPE

    @abstractmethod
    def start(self) -> None:
        """Serve, until SIGTERM."""

    def client_put(self, url: str, data: bytes, headers: Dict[str, str],
                   timeout: Optional[float] = None) -> Any:
        """Put bytes to another node; an override carries every delivery of this class."""
        if Current.pool is None:
            Current.pool = ConnectionPool(Current.settings or Settings())
        body = bytes(data) if isinstance(data, (bytearray, memoryview)) else data
        request = NodeRequest(
            "PUT", Hop.of(url), path_of(url), headers, body, timeout or CONNECT_SECONDS,
            timeout or HOP_SILENCE_SECONDS)
        with Current.pool.open(request) as answer:
            return NodeAnswer(answer.status, answer.headers, answer.readall(), url)

    def handle_direct_put_response(self, resp: Any, data: bytes,
                                   data_length: int = -1) -> Tuple[int, bytes, int]:
        """Read a hop's answer: (status to pass on, body to pass on, bytes that were delivered)."""
        if resp.status_code == HTTPStatus.NO_CONTENT:
            return HTTPStatus.NO_CONTENT, b"", int(resp.headers.get(HEADER_DIRECT_PUT_LENGTH, "0"))
        if resp.status_code == HTTPStatus.OK and not resp.content:
            return HTTPStatus.NO_CONTENT, b"", data_length if data_length >= 0 else len(data)
        return resp.status_code, resp.content, 0

    def sanitize_fqn(self, fqn: str) -> str:
        """Decode a path from a query and make it absolute, without `..`."""
        return os.path.normpath("/" + os.fsdecode(unquote_to_bytes(fqn)).lstrip("/"))

    @staticmethod
    def close_reader(reader: Any) -> None:
        """Close a reader; one that cannot be closed, or fails to, is let be."""
        attempt(lambda: reader.close())

    @staticmethod
    def iter_and_close(output_iter: Iterator[bytes], reader: Any) -> Iterator[bytes]:
        """Yield all of an iterator, then close the reader it read from."""
        try:
            yield from output_iter
        finally:
            ETLServer.close_reader(reader)

    @staticmethod
    def make_direct_put_headers(direct_put_length: int) -> Dict[str, str]:
        """Make the header that tells how many bytes were delivered, none for 0."""
        return {HEADER_DIRECT_PUT_LENGTH: str(direct_put_length)} if direct_put_length else {}


def streams(cls: Type[ETLServer]) -> bool:
    """Tell whether a class streams: `transform` wins; TypeError where it has neither."""
    if cls.transform is not ETLServer.transform:
        return False
    if cls.transform_stream is not ETLServer.transform_stream:
        return True
    raise TypeError(f"{cls.__name__} must override either transform() or transform_stream()")


class ListeningServer(ETLServer):
    """What the SDK's three bases have in common: an address, and `start`.

    PORT decides where the class does not ask for another port than the SDK's, 8000.
    """

    def __init__(self, host: str = "0.0.0.0", port: int = 8000) -> None:
        super().__init__()
        self.host = host
        self.port = (Current.settings or Settings()).port if port == 8000 else port

    def start(self) -> None:
        """Serve until SIGTERM: on the workers' socket, or outside the runtime on one of its own."""
        serve_instance(self)


class HTTPMultiThreadedServer(ListeningServer):
    """The base of classes that many threads may call at once; `path` is the raw request path."""

    class RequestHandler(http.server.BaseHTTPRequestHandler):
        """A name of the SDK's that payloads may refer to; a class that overrides it is refused."""


class LateApp:
    """The application of an instance that is not served, made when something of it is used.

    Files for the SDK end with such lines, for uvicorn or gunicorn: `server = Mine()` and `app =
    server.app`.
    """

    def __init__(self, server: Any) -> None:
        vars(self)["_made"] = functools.partial(app_of, server)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made(), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._made(), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._made()(*args, **kwargs)


class FrameworkServer(ListeningServer):
    """The base of FastAPIServer and FlaskServer: one transform at a time, on the main thread.

    Their classes are served without any framework, unless they use `self.app` or override a hook.
    Then the start is made once more with the framework installed, and the app is there from the
    construction on, as the SDK has it.
    """

    def __init__(self, host: str = "0.0.0.0", port: int = 8000) -> None:
        super().__init__(host, port)
        if Current.settings and Current.settings.server == framework_of(type(self)):
            app_of(self)

    @property
    def app(self) -> Any:
        """The framework's application; FrameworkNeeded where the class is served without one."""
        if vars(self).get(APP) is None and Current.is_loading:
            return LateApp(self)
        return app_of(self)

    @app.setter
    def app(self, app: Any) -> None:
        """Take an application of the class's own making."""
        require_framework(self)
        vars(self)[APP] = app


class FastAPIServer(FrameworkServer):
    """The SDK's FastAPI base; `path` is decoded and without its first slash.

    Hooks: _setup_app(), called when the app is made; startup_event() and shutdown_event();
    _handle_request(), which answers requests for objects. A class that overrides one is served by
    uvicorn.
    """

    def _setup_app(self) -> None:
        """Prepare the app. Routes of objects come later: the class's own are found first."""
        self.app.state.etl_server = self
        self.app.router.on_startup.append(self.startup_event)
        self.app.router.on_shutdown.append(self.shutdown_event)

    async def startup_event(self) -> None:
        """Do nothing: a hook, called before the first request."""

    async def shutdown_event(self) -> None:
        """Do nothing: a hook, called after the last request."""

    async def _handle_request(self, path: str, request: Any, is_get: bool) -> Any:
        """Answer a request for an object by a response of Starlette's."""
        return await vars(self)[ANSWER](path, request)


FRAMEWORK_OF[FastAPIServer] = "fastapi"


class FlaskServer(FrameworkServer):
    """The SDK's Flask base; `path` is decoded and without its first slash.

    Hooks: _register_routes(), called when the app is made; _health(); _handle_request(), which
    answers requests for objects. A class that overrides one has its app served, by WSGI.
    """

    def _register_routes(self) -> None:
        """Do nothing: the routes of objects come later, when the app is served."""

    def _health(self) -> Any:
        """Answer a health probe."""
        import flask

        return flask.Response(b"Running", content_type="text/plain")

    def _handle_request(self, path: str) -> Any:
        """Answer the current request, for an object, by a response of Flask's."""
        return vars(self)[ANSWER](path)


FRAMEWORK_OF[FlaskServer] = "flask"


class CountingIterator:
    """Pieces of bytes, counted as they pass; the count is in `bytes_sent`."""

    def __init__(self, inner: Iterator[bytes]) -> None:
        self._inner = inner
        self.bytes_sent = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._inner:
            self.bytes_sent += len(piece)
            yield piece


class ThreadedHTTPServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A name of the SDK's that payloads may refer to; this runtime serves by another."""

    def __init__(self, server_address: Tuple[str, int], handler_class: Any,
                 etl_server: ETLServer) -> None:
        super().__init__(server_address, handler_class)
        self.etl_server = etl_server


# == 8. Loading the class ==
# From the payload's text to a class that can be served. A pickle names the SDK's modules; the slim
# image has none of them, so an import finder answers for them with what this file has.

FAILED = "Failed to deserialize ETL class: ETL_CLASS_PAYLOAD"  # AIStore's own tests look for this

MAKE_ANEW = "make it anew, by the SDK's init_class() or serialize_class()"
CONSTANTS = {  # of aistore.sdk.const: what ETL classes can have use for
    "HEADER_NODE_URL": HEADER_NODE_URL, "HEADER_DIRECT_PUT_LENGTH": HEADER_DIRECT_PUT_LENGTH,
    "HEADER_ETL_RETRY_REASON": HEADER_RETRY_REASON, "ETL_RETRY_REASON_DIRECT_PUT_TRANSIENT":
    RETRY_REASON_TRANSIENT, "HEADER_PREFIX": "Ais-", "HEADER_CONTENT_LENGTH": "Content-Length",
    "HEADER_CONTENT_TYPE": "Content-Type", "HEADER_TRANSFER_ENCODING": "Transfer-Encoding",
    "HEADER_AUTHORIZATION": "Authorization", "HEADER_RANGE": "Range", "HEADER_ACCEPT": "Accept",
    "HEADER_USER_AGENT": "User-Agent", "QPARAM_ETL_NAME": "etl_name", "QPARAM_ETL_ARGS":
    QPARAM_ARGS, "QPARAM_ETL_FQN": QPARAM_FQN, "QPARAM_ETL_PIPELINE": "etl_pipeline",
    "QPARAM_LATEST": QPARAM_LATEST, "QPARAM_OBJ_TO": QPARAM_OBJECT_TO, "QPARAM_UUID": "uuid",
    "ETL_WS_PIPELINE": "pipeline", "ETL_WS_FQN": "fqn", "ETL_WS_PATH": "path", "STATUS_OK": 200,
    "STATUS_ACCEPTED": 202, "STATUS_NO_CONTENT": 204, "STATUS_PARTIAL_CONTENT": 206,
    "STATUS_REDIRECT_PERM": 301, "STATUS_REDIRECT_TMP": 307, "STATUS_BAD_REQUEST": 400,
    "STATUS_UNAUTHORIZED": 401, "STATUS_FORBIDDEN": 403, "STATUS_LOCKED": 423,
    "STATUS_INTERNAL_SERVER_ERROR": 500, "STATUS_BAD_GATEWAY": 502, "STATUS_SERVICE_UNAVAILABLE":
    503, "AIS_AUTHN_TOKEN": "AIS_AUTHN_TOKEN", "AIS_CLIENT_CA": "AIS_CLIENT_CA", "AIS_CLIENT_CRT":
    "AIS_CRT", "AIS_CLIENT_KEY": "AIS_CRT_KEY", "AIS_SKIP_VERIFY": "AIS_SKIP_VERIFY",
    "AIS_SKIP_VERIFY_CRT": "AIS_SKIP_VERIFY_CRT", "AIS_DIRECT_PUT_RETRIES":
    "AIS_DIRECT_PUT_RETRIES", "AIS_DIRECT_PUT_CHUNK_SIZE": "AIS_DIRECT_PUT_CHUNK_SIZE",
    "UTF_ENCODING": "utf-8", "HTTP": "http://", "HTTPS": "https://", "KIB": 1 << 10, "MIB": 1 << 20,
}

# Import name: the PyPI name to put into PACKAGES. The first line came to the default image with
# aistore[etl].
DEFAULT_IMAGE = {
    "requests": "requests", "httpx": "httpx", "pydantic": "pydantic", "xxhash": "xxhash",
    "yaml": "PyYAML", "fastapi": "fastapi", "starlette": "fastapi", "flask": "flask",
    "werkzeug": "flask"}
PYPI_NAMES = {
    **DEFAULT_IMAGE, "PIL": "Pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn",
    "skimage": "scikit-image", "bs4": "beautifulsoup4", "dateutil": "python-dateutil",
    "Crypto": "pycryptodome", "google": "protobuf", "aistore": "aistore",
    "distutils": "setuptools", "pkg_resources": "setuptools"}
# Base: names of the SDK's own servers that this runtime does not call, so that overriding one would
# do nothing.
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
# Base: names that are called where the framework serves the class, so that overriding one says that
# it shall.
HOOKS: Dict[Type[ETLServer], Tuple[str, ...]] = {
    FastAPIServer: ("_setup_app", "startup_event", "shutdown_event", "_handle_request"),
    FlaskServer: ("_register_routes", "_health", "_handle_request"),
}


def decode_payload(settings: Settings) -> bytes:
    """Join and decode the payload's text, less the white space that editors and YAML leave."""
    import binascii

    text = settings.payload
    if settings.payload_file:
        with open(settings.payload_file, encoding="utf-8", errors="replace") as file:
            text = file.read()
    text = re.sub(r"[ \t\r\n]+", "", text)
    is_alphabet = re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text)
    pickled, error = attempt(binascii.a2b_base64, text)
    if not is_alphabet or error is not None:
        raise PayloadError(f"{FAILED} is not base64, or was cut: {error or 'other characters'}; "
                           f"{MAKE_ANEW}")
    return cast(bytes, pickled)


def serialize_class(cls: Type[ETLServer], encoding: str = "utf-8") -> str:
    """Pickle a class into the text of a payload, as the SDK's function of this name does."""
    import base64

    import cloudpickle

    if not isinstance(cls, type) or not issubclass(cls, ETLServer):
        raise TypeError(f"{cls!r} is not a subclass of ETLServer")
    return base64.b64encode(cloudpickle.dumps(cls)).decode(encoding)


class HTTPException(Exception):
    """Starlette's, which is all that many classes take of FastAPI, where that is not installed."""

    __module__ = "starlette.exceptions"  # by which its status is found

    def __init__(self, status_code: int, detail: Any = None,
                 headers: Optional[Mapping[str, str]] = None) -> None:
        self.status_code = status_code
        self.detail = http.client.responses.get(status_code) if detail is None else detail
        self.headers = headers

    def __str__(self) -> str:
        return f"{self.status_code}: {self.detail}"


# where payloads find it
OF_HTTP_EXCEPTION = ("fastapi", "fastapi.exceptions", "starlette.exceptions")


def is_here(package: str) -> bool:
    """Tell whether a package is installed; a folder that is called as the SDK is does not count."""
    spec = importlib.machinery.PathFinder.find_spec(package)
    return spec is not None and (package != "aistore" or spec.origin is not None)


class LacksName(AttributeError):
    """A module of the SDK that this file stands in for has no such name here."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"{module}.{name} is not here")


def sdk_modules() -> Dict[str, Mapping[str, Any]]:
    """List the SDK's modules that a payload may refer to, and what they hold here."""
    transient = {"RETRY_BACKOFF_BASE": 2.0, "RETRY_BACKOFF_MAX": 30.0,
                 "SYNC_DIRECT_PUT_TRANSIENT_ERRORS": (ConnectionError, http.client.HTTPException)}
    webserver = "aistore.sdk.etl.webserver"
    return {
        "aistore": {}, "aistore.sdk": {},
        "aistore.sdk.const": CONSTANTS,
        "aistore.sdk.errors": {"InvalidPipelineError": InvalidPipelineError,
                               "ETLDirectPutTransientError": ETLDirectPutTransientError},
        "aistore.sdk.utils": {"parse_bool": parse_bool},
        "aistore.sdk.etl": {"serialize_class": serialize_class},
        webserver: {"serialize_class": serialize_class},
        webserver + ".base_etl_server": {
            "ETLServer": ETLServer, "CountingIterator": CountingIterator, **transient},
        webserver + ".http_multi_threaded_server": {
            "HTTPMultiThreadedServer": HTTPMultiThreadedServer,
            "ThreadedHTTPServer": ThreadedHTTPServer},
        webserver + ".fastapi_server": {"FastAPIServer": FastAPIServer},
        webserver + ".flask_server": {"FlaskServer": FlaskServer},
        webserver + ".utils": {
            "serialize_class": serialize_class, "parse_etl_pipeline": parse_etl_pipeline,
            "compose_etl_direct_put_url": compose_etl_direct_put_url},
    }


class SDKNames:
    """An import finder and loader that answers for the SDK's modules with the names of this file.

    The web-server modules are always ours: the SDK's own need requests, FastAPI, httpx and Flask.
    The others are ours only while the real SDK is not installed.
    """

    def find_spec(self, name: str, path: Any = None,
                  target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        """Answer for `aistore` and what is below it."""
        if name.partition(".")[0] != "aistore" or name not in sdk_modules():
            return None
        if name.startswith("aistore.sdk.etl.webserver") or not is_here("aistore"):
            return importlib.machinery.ModuleSpec(name, cast(Any, self), is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Let the import system make a plain module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill a module with our names; any other is LacksName."""
        vars(module).update(sdk_modules()[module.__name__])

        def missing(name: str) -> NoReturn:
            raise LacksName(module.__name__, name)

        vars(module)["__getattr__"] = missing


def stands_in(module: str) -> bool:
    """Tell whether a module that is imported is one that this file stands in for."""
    return isinstance(getattr(sys.modules.get(module), "__loader__", None), SDKNames)


def install_sdk_names() -> None:
    """Put the finder in place, once."""
    if not any(isinstance(finder, SDKNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, cast(Any, SDKNames()))


def leave_late_modules() -> None:
    """Let imports find modules themselves from now on, and no stand-ins."""
    for name, stand_in in late_modules.items():
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
    late_modules.clear()


class ForeignBytecode(Exception):
    """Code that another minor version of Python compiled; running it could crash this one."""


def is_foreign_wordcode(code: types.CodeType) -> bool:
    """Tell 3.9 and 3.10 apart: 3.10's line table covers the bytecode to its end (PEP 626).

    Behind code that is never reached 3.9's ends there too, but has an empty range, which 3.10's has
    only on the way to a far line.
    """
    has_ranges = sys.version_info >= (3, 10)
    table: bytes = getattr(code, "co_linetable" if has_ranges else "co_lnotab")
    is_empty = any(not size and step not in (127, 129) for size, step in zip(table[::2], table[1::2]))
    return (sum(table[::2]) == len(code.co_code) and not is_empty) != has_ranges


def is_foreign_adaptive_code(code_bytes: bytes) -> bool:
    """Walk bytecode of 3.11 or later: instructions and their cache entries must be known here."""
    import opcode

    # private; by number until 3.12, by name from 3.13
    entries: Any = getattr(opcode, "_inline_cache_entries")
    caches, resumed = 0, False
    for offset in range(0, len(code_bytes), 2):
        number = code_bytes[offset]
        name = opcode.opname[number]
        if caches:
            if number or code_bytes[offset + 1]:
                return True
            caches -= 1
            continue
        # nothing that a compiler makes
        if name.startswith(("<", "CACHE", "ENTER_EXECUTOR", "INSTRUMENTED_")):
            return True
        resumed = resumed or name == "RESUME"
        caches = entries.get(name, 0) if isinstance(entries, Mapping) else entries[number]
    return not resumed or bool(caches)


def checked_code(*args: Any) -> types.CodeType:
    """Make a code object; ForeignBytecode where this interpreter cannot have compiled it.

    A later Python may have other tables than those that are looked at. Where they are missing, or
    this file's own code does not pass, nothing can be judged, and all passes. From 3.11 on the
    bytes are judged before there is a code object: making one of foreign bytes, or reading them
    back, may write beyond their end or crash.
    """
    if sys.version_info >= (3, 11):
        try:
            is_foreign = (is_foreign_adaptive_code(args[6])
                          and not is_foreign_adaptive_code(checked_code.__code__.co_code))
        except (AttributeError, LookupError, TypeError):
            is_foreign = False
        if is_foreign:
            raise ForeignBytecode
    try:
        code = types.CodeType(*args)
    except (TypeError, ValueError):  # 3.8 to 3.10 have 16 values, 3.11 and later 18
        raise ForeignBytecode from None
    if sys.version_info < (3, 11) and is_foreign_wordcode(code):
        raise ForeignBytecode
    return code


def package_of(error: BaseException) -> str:
    """Return the package that an import has failed for, "" where none is missing."""
    if isinstance(error, LacksName):
        return "aistore"
    name = str(error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    is_of_python = (name in sys.builtin_module_names
                    or name in getattr(sys, "stdlib_module_names", ()))
    return "" if not name or is_of_python or is_here(name) else name


def other_cloudpickle(name: str) -> PackageError:
    """Explain that the cloudpickle here lacks a name that the one that made the payload had."""
    here = installed_version("cloudpickle") or ""
    if re.match("[012][.]", here):
        return PackageError(
            f"{FAILED} was made by cloudpickle 3 or newer, and this image has {here}, which has no "
            f"{name}: add cloudpickle>=3 to PACKAGES, and nothing that wants an older one")
    return PackageError(f"{FAILED} was made by another cloudpickle than this image's, {here}, "
                        f"which has no {name}; {MAKE_ANEW}")


class PayloadUnpickler(pickle.Unpickler):
    """Unpickle a class, refusing another Python's bytecode before any of it runs.

    A pickle does not say which Python made it. Code of another minor version may load without
    complaint and then crash the interpreter, or compute nonsense, so each code object is looked at
    as it is made.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Look up a global, with our own maker in the place of code objects' type."""
        package = module.partition(".")[0]
        if name == "HTTPException" and module in OF_HTTP_EXCEPTION and not is_here(package):
            return HTTPException
        try:
            found = super().find_class(module, name)
        except AttributeError as error:
            if module == "__main__":
                raise PayloadError(
                    f"{FAILED} refers to {name!r} of the script by name, not by value: a function "
                    f"that functools.lru_cache wraps, for one, must be made by the class "
                    f"itself") from None
            if package == "cloudpickle":
                raise other_cloudpickle(name) from None
            raise LacksName(module, name) if stands_in(module) else error from None
        if (module, name) == ("cloudpickle.cloudpickle", "_builtin_type"):
            return lambda kind: self._make_code if kind == "CodeType" else found(kind)
        return found

    def _make_code(self, *args: Any) -> types.CodeType:
        """Make a code object; FrameworkNeeded where it imports a framework that is not here."""
        import opcode

        code = checked_code(*args)
        imports = code.co_code[::2].count(opcode.opmap["IMPORT_NAME"])
        for module in code.co_names if imports else ():
            package = module.partition(".")[0]
            framework = DEFAULT_IMAGE.get(package, "")
            if framework in FRAMEWORKS and not is_here(package):
                takes_one = imports == 1 and ("HTTPException",) in code.co_consts
                if module not in OF_HTTP_EXCEPTION or not takes_one:
                    raise FrameworkNeeded(framework, serves=False)
                names = [__name__ if name == module else name for name in code.co_names]
                code = code.replace(co_names=tuple(names))
        return code


def raise_framework_needed(error: Optional[BaseException]) -> None:
    """Raise FrameworkNeeded where an import failed because a framework is not here."""
    framework = DEFAULT_IMAGE.get(package_of(error), "") if error is not None else ""
    if framework in FRAMEWORKS:
        raise FrameworkNeeded(framework, serves=False) from None


def describe_of_user(error: BaseException, has_type: bool = False) -> str:
    """Describe an exception of user code; of a package that is missing tell how to get it.

    The type of the exception is told where its text alone says nothing, or if it is to be there.
    """
    kind, name, text = type(error).__name__, package_of(error), describe(error)
    tells = re.search(r"[^\W\d_]{2}", text) and not isinstance(error, KeyError)
    if text != kind and (has_type or not tells):
        text = f"{kind}: {text}"
    if not name:
        return text
    doubt = "" if name in PYPI_NAMES else ", if it has that name on PyPI and is not your own"
    return f"{text}: {how_to_get(PYPI_NAMES.get(name, name))}{doubt}"


def missing_module(error: BaseException, pickled: bytes) -> StartupError:
    """Explain a module that the pickle refers to and that is not here: a package, or the user's."""
    import pickletools

    by_reference = {"PROTO", "FRAME", "SHORT_BINUNICODE", "BINUNICODE", "MEMOIZE", "GLOBAL",
                    "STACK_GLOBAL", "STOP"}
    if package_of(error) == "cloudpickle":
        return PackageError(
            "cloudpickle is not installed, and payloads need it: pip install cloudpickle")
    if isinstance(error, LacksName):
        return PackageError(f"{FAILED} needs more than this image has: {describe_of_user(error)}")
    name = getattr(error, "name", "")
    if all(operation[0].name in by_reference for operation in pickletools.genops(pickled)):
        return PayloadError(
            f"{FAILED} was pickled by reference to the module {name!r}, which is not here: call "
            f"cloudpickle.register_pickle_by_value(module) before, or define it in __main__")
    return PackageError(
        f"{FAILED} needs the module {name!r}: {describe_of_user(error)}; if it is a module of your "
        f"own, call cloudpickle.register_pickle_by_value(module) before pickling")


def overridden(cls: Type[ETLServer], table: Mapping[Type[ETLServer], Sequence[str]]) -> List[str]:
    """List the names of a table that a class has in the place of its base's."""
    return [name for base, names in table.items() if issubclass(cls, base) for name in names
            if getattr(cls, name, None) is not getattr(base, name, None)]


def server_for(cls: Type[ETLServer]) -> str:
    """Tell which framework is to serve a class; "" where its construction will tell."""
    return framework_of(cls) if overridden(cls, HOOKS) else ""


CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR = 0x20, 0x80, 0x200  # flags of code, as in inspect


def refusal(cls: Type[ETLServer]) -> str:
    """Tell why a class cannot be served as it is, "" where it can."""
    ignored = overridden(cls, INTERNALS)
    if ignored:
        return (f"overrides {', '.join(ignored)}, which the SDK's own server calls and this "
                f"runtime does not: override transform or transform_stream only")
    for name in ("transform", "transform_stream", "get_mime_type", "start", "sanitize_fqn",
                 "client_put", "handle_direct_put_response"):
        flags = getattr(getattr(getattr(cls, name), "__code__", None), "co_flags", 0)
        if flags & (CO_COROUTINE | CO_ASYNC_GENERATOR):
            return f"has a {name}() that is async: it must be a plain function"
        if flags & CO_GENERATOR and name != "transform_stream":
            return f"has a {name}() that yields, as only transform_stream() may"
    return ""


def checked_class(cls: Any, failed: str = FAILED) -> Type[ETLServer]:
    """Refuse what cannot be served, or has an override that would do nothing.

    Called in the supervisor, before any worker is forked, so that the mistake is told once.
    PayloadError, which begins with `failed`, or ClassError.
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
    reason = refusal(cls)
    if reason:
        raise ClassError(f"{cls.__name__} {reason}")
    return cls


def user_traceback(error: BaseException) -> Optional[types.TracebackType]:
    """Return an exception's traceback less the frames of this file; None if it has no other."""
    kept, entry = [], error.__traceback__
    while entry is not None:
        # __file__ may be its bytecode
        if entry.tb_frame.f_code.co_filename != user_traceback.__code__.co_filename:
            kept.append(entry)
        entry = entry.tb_next
    result = None
    for entry in reversed(kept):
        result = types.TracebackType(result, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return result


def users_info(error: BaseException) -> Any:
    """Return the `exc_info` of a log record: the part of a traceback that is the user's."""
    frames = user_traceback(error)
    return (type(error), error, frames) if frames else None


def log_user_error(what: str, error: BaseException) -> None:
    """Log an exception of user code, with the part of its traceback that is the user's."""
    logger.error("%s: %s", what, describe_of_user(error), exc_info=users_info(error))


def with_story(failure: StartupError, what: str, error: BaseException) -> StartupError:
    """Give a failure the traceback of the user's exception that is its reason."""
    told = (what, " ".join(describe_of_user(error).split()))
    record = logging.LogRecord(
        logger.name, logging.ERROR, "", 0, "%s: %s", told, users_info(error))
    failure.story = logging.Formatter().format(record)
    return failure


def load_etl_class(settings: Settings) -> Type[ETLServer]:
    """Decode, unpickle and check the class of the payload; StartupError tells what to do.

    The payload comes from whoever may start pods, and is run as code: it is trusted as the image
    is.
    """
    pickled = decode_payload(settings)
    install_sdk_names()
    attempt(importlib.import_module, "cloudpickle")  # where it is missing, unpickling says so
    leave_late_modules()
    cls, error = attempt(PayloadUnpickler(io.BytesIO(pickled)).load)
    if isinstance(error, ForeignBytecode):
        version = ".".join(map(str, sys.version_info[:2]))
        raise PayloadError(
            f"{FAILED} was pickled by another Python than this {version}, whose bytecode differs: "
            f"use the image of the Python that pickled it")
    if isinstance(error, StartupError):
        raise error
    raise_framework_needed(error)
    if isinstance(error, (ModuleNotFoundError, LacksName)):
        raise missing_module(error, pickled)
    if error is not None:
        import pickletools

        text = describe_of_user(error, has_type=True)
        is_broken = attempt(collections.deque, pickletools.genops(pickled), 0).error is not None
        if is_broken or isinstance(error, (pickle.UnpicklingError, EOFError)):
            raise PayloadError(f"{FAILED} is no whole pickle: {text}; {MAKE_ANEW}")
        raise with_story(PayloadError(f"{FAILED} cannot be loaded: {text}"), "unpickling", error)
    return checked_class(cls)


# == 9. Stage 1, understanding ==
# The method, the raw request target and one header to a frozen value. No I/O, no socket in sight.

QUERIES_OF_ETL = tuple(f"?{name}=" for name in (QPARAM_FQN, QPARAM_ARGS, QPARAM_LATEST))
PATH_METHODS = {"/health": ("GET",), "/ws": ("GET",), "/download": ("POST",)}
OBJECT_METHODS = ("GET", "PUT")


def split_target(method: str, target: str) -> Tuple[str, str]:
    """Split a request target into path and query, both raw.

    AIStore writes bucket and object into a PUT's URL as they are, question marks too: there the
    query begins at the last one that is followed by a parameter of ours. An absolute target (RFC
    9112, 3.2.2) loses scheme and host.
    """
    if not target.startswith("/"):
        target = re.sub(r"^https?://[^/?#]*", "", target, flags=re.IGNORECASE)
    if "?" not in target:
        return target, ""
    ours = max(map(target.rfind, QUERIES_OF_ETL)) if method == "PUT" else -1
    mark = ours if ours >= 0 else target.find("?")
    return target[:mark], target[mark + 1:]


def decode_escapes(text: str, errors: str = "replace") -> str:
    """Decode the escapes of a raw path, or of a query that has no `+`."""
    if "%" not in text and text.isascii():
        return text
    return unquote_to_bytes(text.encode("latin-1")).decode("utf-8", errors)


FOLDER_LIMIT = 1024  # characters of what is kept decoded
# objects of a bucket have their path in common
decode_folder = functools.lru_cache(maxsize=256)(decode_escapes)


def decode_query(text: str) -> str:
    """Decode a name or a value of a query; what is no UTF-8 is replaced."""
    text = text.replace("+", " ")
    folder, slash, name = text.rpartition("%2F")
    if slash and len(folder) < FOLDER_LIMIT:
        return decode_folder(folder) + "/" + decode_escapes(name)
    return decode_escapes(text)


def split_query(query: str) -> Tuple[Dict[str, str], str]:
    """Split a query into our parameters, decoded, and the raw text of what goes along to the target."""
    known: Dict[str, str] = {}
    rest = []
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        name, value = decode_query(name), decode_query(value)
        known.setdefault(name, value)
        if name not in (QPARAM_FQN, QPARAM_ARGS):
            rest.append(item)
    return known, "&".join(rest)


class ETLRequest(NamedTuple):
    """One request as AIStore means it. Texts are as they came, one character a byte, unless they are called decoded."""

    method: str
    raw_path: str
    query: str = ""  # what is not for us, and goes along to the target
    fqn: str = ""  # path-escaped, the query's escapes decoded
    etl_args: str = ""  # decoded
    latest: bool = False
    pipeline: str = ""  # the Ais-Node-Url header: where the result goes
    original_url: str = ""  # decoded; what a download fetches
    # decoded; the object a download becomes, or what a WebSocket message calls it
    object_to: str = ""

    @classmethod
    def parse(cls, method: str, target: str, pipeline: str = "") -> ETLRequest:
        """Understand a request; NotFound, BadRequest, or a 405 where it means nothing."""
        raw_path, query = split_target(method, target)
        if not raw_path.startswith("/") or not raw_path.strip("/"):
            raise NotFound(f"no object is named by {target!r}")
        methods = PATH_METHODS.get(raw_path, OBJECT_METHODS)
        if method not in methods:
            raise RequestError(f"{method} is not allowed for {raw_path}", HTTPStatus.METHOD_NOT_ALLOWED,
                               {"Allow": ", ".join(methods)})
        known, rest = split_query(query)
        request = cls(method, raw_path, rest, known.get(QPARAM_FQN, "").strip(), known.get(QPARAM_ARGS, "").strip(),
                      QPARAM_LATEST in known and parse_bool(known[QPARAM_LATEST]), pipeline.strip())
        if raw_path != "/download":
            return request
        if not (known.get(QPARAM_ORIGINAL_URL) and known.get(QPARAM_OBJECT_TO)):
            raise BadRequest(f"/download needs the parameters {QPARAM_ORIGINAL_URL} and {QPARAM_OBJECT_TO}")
        return request._replace(fqn="", original_url=known[QPARAM_ORIGINAL_URL], object_to=known[QPARAM_OBJECT_TO])

    @classmethod
    def from_message(cls, message: Any) -> ETLRequest:
        """Understand the control message of an object that comes over WebSocket, decoded from JSON; BadRequest."""
        names = ("path", "fqn", "etl_args", "pipeline")
        texts: List[Any] = [message.get(name, "") for name in names] if isinstance(message, dict) else []
        if set(map(type, texts)) != {str}:
            raise BadRequest("it must be a JSON object whose values are texts")
        path, fqn, etl_args, pipeline = texts
        return cls("PUT", "/ws", fqn=fqn, etl_args=etl_args.strip(), pipeline=pipeline.strip(), object_to=path)

    @property
    def is_message(self) -> bool:
        """Whether the object comes over WebSocket, and is answered whole."""
        return self.raw_path == "/ws"

    @property
    def path(self) -> str:
        """The decoded path, without the first slash."""
        if self.object_to or self.is_message:
            return self.object_to
        return decode_escapes(self.raw_path)[1:]

    @property
    def decoded_path(self) -> str:
        """The decoded path with its first slash, from which every byte of the raw one can be made again."""
        if self.object_to or self.is_message:
            return "/" + self.object_to.lstrip("/")
        return decode_escapes(self.raw_path, "surrogateescape")

    @property
    def name(self) -> str:
        """What log lines call the object."""
        return self.object_to or self.raw_path

    @property
    def is_replayable(self) -> bool:
        """Whether the object can be read a second time: it is a file, or another node has it."""
        return bool(self.fqn) or self.method != "PUT"


# == 10. Stage 2, reading ==
# A request to a byte source. Runs on the thread that serves the connection; the source belongs to
# whoever opened it.


class ObjectFile(io.FileIO):
    """An object's file, opened; `size` is what the file had then, in bytes."""

    def __init__(self, descriptor: int, size: int, mode: str = "r") -> None:
        super().__init__(descriptor, mode)
        self.size = size
        self._is_cut = False

    def close(self) -> None:
        """Close it, which a class may do before `finish` is called."""
        if not self.closed:
            self._look_at_size()
        super().close()

    def finish(self) -> None:
        """Raise OSError if the file has become shorter, since what was read may have ended early."""
        if not self.closed:
            self._look_at_size()
        if self._is_cut:
            raise OSError(errno.EIO, f"the object's file ends before its {self.size} bytes")

    def _look_at_size(self) -> None:
        self._is_cut = self._is_cut or os.fstat(self.fileno()).st_size < self.size


class LoadedObject(io.BytesIO):
    """An object that is in memory already, as that of a small file, which is read as soon as it is opened."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = len(data)

    def readall(self) -> bytes:
        """Return all of it, without a copy."""
        return self.getvalue()


class SpoolFile(ObjectFile):
    """A temporary file that is removed when it is closed; classes get its path."""

    def __init__(self) -> None:
        import tempfile

        descriptor, self.path = tempfile.mkstemp(prefix="etl-")
        super().__init__(descriptor, 0, "r+")

    def close(self) -> None:
        """Close and remove it."""
        if not self.closed:
            super().close()
            with contextlib.suppress(FileNotFoundError):  # a class may have moved it away
                os.unlink(self.path)


class ReceivedObject(LoadedObject):
    """An object that came whole over WebSocket, and the room that it takes in memory until its transform begins."""

    def __init__(self, data: bytes = b"", leave: Optional[Callable[[], None]] = None) -> None:
        super().__init__(data)
        self._leave = leave

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that gives the room back and then calls another."""
        def call(*args: Any) -> Any:
            if self._leave is not None:
                self._leave()
            return function(*args)

        return call

    def close(self) -> None:
        """Give the room back, if it still has any."""
        super().close()
        if self._leave is not None:
            self._leave()


ObjectStream = Union[BodyStream, ObjectFile, LoadedObject]


class Source(NamedTuple):
    """An opened object. Whoever opened it closes `stream`, which also removes a temporary file."""

    stream: ObjectStream
    path: str = ""  # the local path that the class gets for data, where ETL_DIRECT_FQN is on

    def finish(self) -> None:
        """Raise if the object was not read whole and right, whatever the class made of it."""
        if isinstance(self.stream, (BodyStream, ObjectFile)):
            self.stream.finish()


OBJECT_PATH = re.compile(r"(?s).*?/@([a-z0-9]+)/(?:([@#][^/]*)/)?([^/@#%][^/]*)/%ob/(.+)")


def is_object_path(path: str, roots: Optional[Tuple[str, ...]]) -> bool:
    """Tell whether a resolved path may be read."""
    if roots is None:
        return OBJECT_PATH.fullmatch(path) is not None
    return any(path.startswith(root.rstrip("/") + "/") for root in roots)


def resolved_path(descriptor: int, path: str) -> str:
    """Return the path of an open file, symlinks resolved; where /proc tells it, of what is open and no other."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # no /proc: macOS
        return os.path.realpath(path)


def require_object_path(path: str, roots: Optional[Tuple[str, ...]]) -> None:
    """Raise Forbidden unless a resolved path may be read."""
    if not is_object_path(path, roots):
        raise Forbidden("the path is not one of an object")


def open_object_path(path: str, roots: Optional[Tuple[str, ...]]) -> int:
    """Open an object's file: its descriptor, NotFound, or Forbidden for what is not AIStore's to show.

    The pod's port can be reached by others than its target, and the container holds secrets: only a
    file may be read that lies in AIStore's layout, or under `roots`, once symlinks are resolved. It
    is the open file that is asked where it lies, since a path can come to lead elsewhere between a
    look at it and its use.
    """
    looks_right = "/.." not in path and is_object_path(path, roots)
    try:
        if not looks_right:
            require_object_path(os.path.realpath(path), roots)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        # what is not there elsewhere must not be told
        require_object_path(os.path.realpath(path), roots)
        raise NotFound("the object's file is not there") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        is_ours = getattr(error, "errno", None) in (*OUT_OF_RESOURCES, errno.EIO)
        raise (RequestError if is_ours else Forbidden)(f"the object's file cannot be read: {error}") from None
    opened = resolved_path(descriptor, path)
    try:
        if not looks_right or opened != path:
            require_object_path(opened, roots)
        return descriptor
    except Forbidden:
        os.close(descriptor)
        raise


OBJECT_SIZE_XATTR = re.compile(rb"(?s)^[\x01\x02].{9}(?:.*?\xe3\x2f\xbd)?\x00\x03(.{8})(?:\xe3\x2f\xbd|\Z)")


def is_whole(descriptor: int, size: int) -> bool:
    """Tell whether an object's file is all of it: of an object in chunks the path leads to the first chunk alone.

    AIStore keeps the object's size in an attribute of the file (core/lom_xattr.go): after a
    preamble of ten bytes, records of a two-byte key and a value, parted by three fixed bytes; key 3
    is the size. What cannot be read as that says nothing.
    """
    try:
        attribute = os.getxattr(descriptor, "user.ais.lom")
    except (OSError, AttributeError):  # AttributeError: not on Linux
        return True
    match = OBJECT_SIZE_XATTR.match(attribute)
    return match is None or int.from_bytes(match[1], "big") == size


def read_whole(read: Callable[[int], bytes], size: int) -> bytes:
    """Read all of a file, most often by one call; OSError where that fails, or less is there than was.

    A file system that cannot read on gives what it has first, and tells the failure to the next
    call.
    """
    data = read(size)
    while len(data) < size:
        more = read(size - len(data))
        if not more:
            raise OSError(errno.EIO, f"the object's file ends after {len(data)} of {size} bytes")
        data += more
    return data


def open_object_file(path: str, roots: Optional[Tuple[str, ...]]) -> Union[ObjectFile, LoadedObject, None]:
    """Open an object by path, and read it if it is small; None where the file is not all of the object."""
    descriptor = open_object_path(path, roots)
    is_kept = False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Forbidden("the path is not one of a regular file")
        if not is_whole(descriptor, status.st_size):
            return None
        if status.st_size <= READ_BYTES:
            return LoadedObject(read_whole(functools.partial(os.read, descriptor), status.st_size))
        is_kept = True
        return ObjectFile(descriptor, status.st_size)
    finally:
        if not is_kept:
            os.close(descriptor)


def uname_of(path: str) -> bytes:
    """Make an object's unique name, `provider/@uuid#namespace/bucket/object`, from the path of its file."""
    match = OBJECT_PATH.fullmatch(path)
    if match is None:
        raise RequestError("the object is stored in chunks, and its path does not tell its name")
    provider, namespace, bucket, name = match.groups("")
    if not namespace.startswith("@"):
        namespace = "@" + (namespace or "#")
    return os.fsencode(f"{provider}/{namespace}/{bucket}/{name}")


def folder_path(folder: str, raw_path: str) -> str:
    """Map a request's path to a file under the folder that stands in for a target: a uname, or /bucket/object."""
    name = os.fsdecode(unquote_to_bytes(raw_path.encode("latin-1"))).lstrip("/")
    return os.path.join(folder, re.sub(r"^[a-z0-9]+/@[^/]*#[^/]*/", "", name))


def target_refusal(status: int, text: str) -> RequestError:
    """Turn a target's refusal into ours: its 4xx and 5xx pass, anything else is not an answer to a GET."""
    if status == HTTPStatus.NOT_FOUND:
        return NotFound("the target does not have the object")
    return RequestError(f"the target answered {status}: {text}".rstrip(": "), status if status >= 400 else HTTPStatus.BAD_GATEWAY)


def require_identity(body: NodeBody, what: str) -> NodeBody:
    """Return another node's answer; BadGateway where it is encoded, which was not asked for."""
    coding = body.headers.get("Content-Encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        body.close()
        raise BadGateway(f"{what} came with the Content-Encoding {coding!r}, not as it is")
    return body


class Sources:
    """Open the object of a request: a file, the request's body, the target's copy, or a download.

    Shared by all threads of a worker; `locate` is the class's own `sanitize_fqn`. The target sends
    a path wherever the object has a file, which saves a trip of its bytes through a socket; but a
    path says nothing of whether the file is all of the object, so `is_whole` asks.
    """

    def __init__(self, settings: Settings, pool: ConnectionPool, locate: Callable[[str], str]) -> None:
        self._settings = settings
        self._pool = pool
        # no token, no certificate, the system's authorities
        self._outside = ConnectionPool(Settings())
        self._locate = locate

    def open(self, request: ETLRequest, body: Union[MessageBody, ReceivedObject]) -> Source:
        """Open the object; the caller closes it. 404, 403 or the target's status where it cannot be had."""
        if request.original_url:
            return Source(self._download(request.original_url))
        wants_path = bool(request.fqn) and self._settings.direct_fqn
        if request.fqn and not (request.latest and request.method == "GET"):
            path = self._locate(request.fqn)
            file = open_object_file(path, self._settings.fqn_roots)
            if file is not None:
                return Source(file, path if wants_path else "")
            return self._as_wanted(self._fetch("/" + quote(uname_of(path), safe="@"), ""), wants_path)
        if request.method == "GET":
            return self._as_wanted(self._fetch(request.raw_path, request.query), wants_path)
        return Source(body)

    def load(self, request: ETLRequest) -> Optional[LoadedObject]:
        """Read an object of up to a MiB by its path; None for a larger one, or where the class gets the path."""
        if self._settings.direct_fqn:
            return None
        file = open_object_file(self._locate(request.fqn), self._settings.fqn_roots)
        if file is None or isinstance(file, LoadedObject):
            return file
        with file:
            return LoadedObject(read_whole(file.read, file.size)) if file.size <= WRITE_BYTES else None

    def close_idle(self) -> None:
        """Close connections that have been idle for too long, those to the outside world too."""
        self._pool.close_idle()
        self._outside.close_idle()

    def _as_wanted(self, stream: BodyStream, wants_path: bool) -> Source:
        """Spool an object into a temporary file where the class wants a path and there is no file of the object."""
        if not wants_path:
            return Source(stream)
        import shutil

        with contextlib.ExitStack() as on_failure:
            spool = on_failure.enter_context(SpoolFile())
            with stream:
                shutil.copyfileobj(stream, spool, WRITE_BYTES)
            spool.seek(0)
            on_failure.pop_all()
        return Source(spool, spool.path)

    def _fetch(self, raw_path: str, query: str) -> Any:
        """Read an object from the target, or from the folder that stands in for it."""
        target = self._settings.target
        if not target:
            raise NotFound("there is no target to read objects from: serve with --target, or PUT the object")
        if target.startswith("file:"):
            path = folder_path(unquote(urlsplit(target).path), raw_path)
            file = open_object_file(path, self._settings.fqn_roots)
            if file is None:
                raise RequestError("the object is stored in chunks, and only a target can tell all of it")
            return file
        url = urlsplit(target)
        path = escape_stray(url.path + raw_path) + ("?" + escape_stray(query) if query else "")
        try:
            stream = self._pool.open(NodeRequest("GET", Hop.of(target), path))
        except OSError as error:
            raise BadGateway(f"the target cannot be reached: {error or type(error).__name__}") from None
        if stream.status == HTTPStatus.OK and stream.can_be_checked:
            return require_identity(stream, "the target's object")
        with stream:
            raise target_refusal(stream.status, read_text(stream).decode("utf-8", "replace").strip())

    def _download(self, url: str) -> NodeBody:
        """Fetch a URL of the outside world, by connections that know nothing of the cluster's secrets."""
        no_url = attempt(Hop.of, url).error
        if no_url is not None:
            raise BadRequest(f"the download is impossible: {describe(no_url)}")
        location = ""
        for _ in range(DOWNLOAD_REDIRECTS_LIMIT + 1):
            try:
                url = urljoin(url, location)
                stream = self._outside.open(NodeRequest("GET", Hop.of(url), path_of(url), AGENT))
            except (OSError, ValueError) as error:
                raise BadGateway(f"the download failed: {describe(error)}") from None
            if stream.status == HTTPStatus.OK:
                return require_identity(stream, "the download")
            location = stream.headers.get("Location", "")
            stream.close()
            if not 300 <= stream.status < 400 or not location:
                raise RequestError(f"the download was answered {stream.status}",
                                   stream.status if stream.status >= 400 else HTTPStatus.BAD_GATEWAY)
        raise BadGateway("the download was redirected too often")


# == 11. Stage 3, transforming ==
# Where the class's code runs, and how much of it at once. A slot covers that code alone, never
# reading or delivering.

T = TypeVar("T")


class ThreadSlots:
    """Make calls on the threads that ask, at most `limit` at once."""

    def __init__(self, limit: int) -> None:
        # a semaphore in C, at a tenth of threading's cost
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(limit):
            self._free.put(slot)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function once a slot is free; its exception is the caller's."""
        slot = self._free.get()
        try:
            return function(*args)
        finally:
            self._free.put(slot)


class MainThread:
    """Make calls on the thread that made the instance, one by one, in their order.

    Other threads put calls into `calls` and have that thread woken by `wake`. It makes them one by
    one, with `make_call`.
    """

    def __init__(self) -> None:
        self._ident = threading.get_ident()
        self.calls: Deque[Callable[[], None]] = collections.deque()
        self.wake: Callable[[], object] = lambda: None
        self._lock = threading.Lock()  # of putting

    @property
    def is_here(self) -> bool:
        """Whether this is that thread."""
        return threading.get_ident() == self._ident

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Have the main thread call a function; its exception is the caller's."""
        if self.is_here:
            return function(*args)
        outcomes: List[Outcome] = []
        done = threading.Lock()
        done.acquire()

        def call() -> None:
            outcomes.append(attempt(function, *args))
            done.release()

        self.put(call)
        done.acquire()
        outcome = outcomes.pop()
        try:
            if outcome.error is not None:
                raise outcome.error
            return cast(T, outcome.value)
        finally:
            # its error's traceback has this frame: a cycle, which would keep the object in memory
            del outcome

    def put(self, call: Callable[[], None]) -> None:
        """Have a function called that never raises, and do not wait for it."""
        with self._lock:  # two that see each other's call must not both rely on the other
            self.calls.append(call)
            is_first = len(self.calls) == 1  # else the thread is awake, or being woken
        if is_first:
            self.wake()

    def make_call(self) -> None:
        """Make the first of the calls; the main thread does that."""
        self.calls.popleft()()


Slots = Union[ThreadSlots, MainThread]


class Pace:
    """Tell from the last calls whether calls are quick.

    Handing a call to another thread costs as much as a quick one takes. So quick calls are made by
    the leader. Once three in four of about the last sixteen were slow, or one took a hundred times
    as long as a quick one may, calls are handed over for a hundred times as long as the last took.
    """

    def __init__(self) -> None:
        self._slow = 0.0  # calls, of the last sixteen
        self._hands_over_until = 0.0

    def is_quick(self, now: float) -> bool:
        """Whether the leader may make the next call; times are those of time.monotonic()."""
        return now >= self._hands_over_until

    def note(self, seconds: float, now: float) -> None:
        """Take note of how long a call took."""
        self._slow += (seconds >= QUICK_SECONDS) - self._slow / 16
        if self._slow > 12 or seconds > 100 * QUICK_SECONDS:
            self.hand_over(seconds, now)

    def hand_over(self, seconds: float, now: float) -> None:
        """Have calls handed over, since one took so long; then four slow ones suffice."""
        self._slow = 11.0
        self._hands_over_until = now + 100 * seconds


def memory_limit(root: str = "/sys/fs/cgroup") -> int:
    """Return how many bytes of memory the container may take."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # version 2 of control groups, and version 1
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            with open(os.path.join(root, name), "rb", buffering=0) as file:
                limit = min(limit, int(file.read()))
    return limit


class Room:
    """Bound the memory of bodies that wait for their transforms.

    Whoever came first is never made to wait: one body always fits, and no two wait for each other.
    """

    def __init__(self, limit_bytes: int, most_bytes: int = sys.maxsize) -> None:
        self._limit = limit_bytes
        self._most = most_bytes  # of one body
        self._total = 0
        self._taken: Dict[object, int] = {}  # in the order of their coming
        self._change = threading.Condition()

    def enter(self, body: object) -> None:
        """Admit a body, which takes nothing yet."""
        with self._change:
            self._taken[body] = 0

    def check(self, size: int) -> None:
        """Raise 413 for a size that no machine has."""
        if size > self._most:
            raise ObjectTooLarge(
                f"the object has {size} bytes, more than the {self._most} of the container's memory")

    def take(self, body: object, count: int) -> None:
        """Wait for room for more bytes and take it; 413 if no machine has so much."""
        # a step of reading may be larger than what is left
        if self._taken[body] + count > self._most + WRITE_BYTES:
            raise ObjectTooLarge(
                f"the object has more bytes than the container's memory, {self._most}")
        with self._change:
            self._change.wait_for(
                lambda: self._total + count <= self._limit or body is next(iter(self._taken)))
            self._total += count
            self._taken[body] += count

    def give_back(self, body: object, count: int) -> None:
        """Give back some of what a body has taken."""
        with self._change:
            self._total -= count
            self._taken[body] -= count
            self._change.notify_all()

    def leave(self, body: object) -> None:
        """Give back all that a body has taken, if it is still here."""
        with self._change:
            self._total -= self._taken.pop(body, 0)
            self._change.notify_all()


class WaitingBody(io.RawIOBase):
    """A body that is read into memory as there is room for it; `close` leaves the stream open.

    Room is taken for as much again as has come, so that a client which announces a lot and sends a
    little holds little. Of a file all is there.
    """

    def __init__(self, room: Room, stream: ObjectStream) -> None:
        super().__init__()
        self._room = room
        self._stream = stream
        self._count = 0
        room.enter(self)

    def close(self) -> None:
        """Give the room back."""
        super().close()
        self._room.leave(self)

    def readable(self) -> bool:
        """Tell that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes into a buffer, 0 at the end."""
        step = len(buffer)
        if not isinstance(self._stream, ObjectFile):
            step = min(step, max(READ_BYTES, min(self._count, WRITE_BYTES)))
        self._room.take(self, step)
        count = self._stream.readinto(memoryview(buffer)[:step]) or 0
        if count < step:
            self._room.give_back(self, step - count)
        self._count += count
        return count

    def readall(self) -> bytes:
        """Read to the end."""
        if isinstance(self._stream, ObjectFile):
            return read_whole(self._read_file, self._stream.size)
        if isinstance(self._stream, BoundedReader):
            self._stream.receive_flags = socket.MSG_WAITALL
        return read_to_end(self, self._stream.size)

    def _read_file(self, size: int) -> bytes:
        """Read from a file in as few calls as possible: each may change threads."""
        if size > WRITE_BYTES:
            return read_to_end(self, size)
        self._room.take(self, size)
        return cast(ObjectFile, self._stream).read(size)

    def before(self, function: Callable[..., T]) -> Callable[..., T]:
        """Make a function that gives the room back and then calls another one."""
        def call(*args: Any) -> T:
            self._room.leave(self)
            return function(*args)

        return call


def as_bytes(output: Any, what: str) -> bytes:
    """Return a result as bytes; TypeError names a type that cannot be one."""
    if type(output) is bytes:
        return output
    if isinstance(output, str):
        return output.encode("utf-8")
    try:
        return bytes(memoryview(output))
    except TypeError:
        hint = ": it must not be async" if hasattr(output, "__await__") else ""
        attempt(getattr(output, "close", lambda: None))  # else Python complains of a coroutine
        raise TypeError(f"{what} {type(output).__name__!r}, not bytes{hint}") from None


class Transforms:
    """Call the class, with what it expects, and take what it gives for bytes.

    Arguments go by position, since users name them as they like. What `path` looks like depends on
    the base class (SDK 2.0, http_multi_threaded_server.py and fastapi_server.py), and classes rely
    on it.
    """

    def __init__(self, server: ETLServer, slots: Slots) -> None:
        self._server = server
        self._slots = slots
        self._decodes = isinstance(server, FrameworkServer)
        self._memory = memory_limit()
        self._room = Room(WAITING_LIMIT_BYTES, self._memory)
        # its own: a message may wait for an object that is read
        self.message_room = Room(WAITING_LIMIT_BYTES, self._memory)

    @property
    def mime_type(self) -> str:
        """The `Content-Type` of results."""
        value = self._server.get_mime_type()
        if not isinstance(value, str):
            raise TypeError(f"get_mime_type() returned {type(value).__name__!r}, not str")
        return str.__str__(value)  # a plain one, whatever a subclass makes of itself

    def run(self, request: ETLRequest, source: Source) -> bytes:
        """Read the whole object, wait for a slot, transform it."""
        args = (self._path(request), request.etl_args)
        size = source.stream.size
        if source.path or (size is not None and size <= READ_BYTES):
            data = source.path or source.stream.readall()
            output = self._slots.run(self._server.transform, data, *args)
        else:
            output = self._run_large(source.stream, *args)
        return as_bytes(output, "transform() returned")

    def _run_large(self, stream: ObjectStream, *args: str) -> Any:
        """Read an object as there is memory for it; 413 where there never will be."""
        if isinstance(stream, ReceivedObject):
            return self._slots.run(stream.before(self._server.transform), stream.getvalue(), *args)
        if stream.size is not None and stream.size > self._memory:
            raise ObjectTooLarge(f"the object has {stream.size} bytes, more than the "
                                 f"{self._memory} of the container's memory")
        with WaitingBody(self._room, stream) as body:
            return self._slots.run(body.before(self._server.transform), body.readall(), *args)

    def stream(self, request: ETLRequest, source: Source) -> Iterator[bytes]:
        """Transform in pieces; raise at the end if the object was not read whole."""
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
        """The object's path as the base class of the SDK gives it."""
        is_decoded = self._decodes or request.raw_path in ("/ws", "/download")
        return request.path if is_decoded else request.raw_path


# == 12. Stage 4, delivering ==
# An output to an answer. What is delivered elsewhere is told in the answer; what is not, is the
# answer.


BODILESS = (HTTPStatus.SWITCHING_PROTOCOLS, HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


class Answer(NamedTuple):
    """What a client gets. A body of pieces is chunked; if it raises, the connection is cut before the last chunk."""

    status: int
    body: Union[bytes, Iterator[bytes]] = b""
    headers: Tuple[Tuple[str, str], ...] = ()
    size: Optional[int] = None  # what an application says of the body, in bytes
    origin: str = ""  # the node whose refusal this is, if it is another's

    @property
    def is_open(self) -> bool:
        """Whether the end of the body is told by a last chunk: of pieces, and of an empty result.

        A Go stage before us takes a 200 with a Content-Length of 0 for the news of a delivery.
        """
        is_empty = not self.body and self.status == HTTPStatus.OK
        return self.size is None and (not isinstance(self.body, bytes) or is_empty)

    def framing(self, is_chunked: bool) -> List[Tuple[str, str]]:
        """Return the header field that tells the end of the body; none where that of the connection does."""
        if is_chunked:
            return [("Transfer-Encoding", "chunked")]
        size = len(self.body) if self.size is None and isinstance(self.body, bytes) else self.size
        return [] if size is None or self.status in BODILESS else [("Content-Length", str(size))]

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of what an unread body of pieces holds."""
        if not isinstance(self.body, bytes):
            cast(Any, self.body).close()


def error_answer(status: int, detail: str, headers: Mapping[str, str]) -> Answer:
    """Make the answer of a failure, in the form AIStore's documentation shows."""
    text = json.dumps({"detail": detail}, separators=(",", ":")).encode()
    return Answer(status, text, (("Content-Type", "application/json"), *headers.items()))


class AnswerCut(OSError):
    """An answer has failed half-way, which was told; the connection must end."""


class OutputFailed(Exception):
    """The class's stream failed while it was being delivered; `error` is what it raised."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def as_body(output: Union[bytes, CountingIterator]) -> Union[bytes, Iterator[bytes]]:
    """Make the body of a delivery: bytes, or an iterator that can be closed."""
    return output if isinstance(output, bytes) else iter(output)


def size_of(output: Union[bytes, CountingIterator]) -> int:
    """Tell how many bytes were sent."""
    return len(output) if isinstance(output, bytes) else output.bytes_sent


def chain_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Yield a piece that was taken already, then the rest; closing this closes the rest."""
    try:
        if first:
            yield first
        yield from rest
    finally:
        cast(Any, rest).close()


def relay(body: NodeBody) -> Iterator[bytes]:
    """Yield the content of another node's answer as it comes, and close it."""
    with body:
        yield from iter(lambda: body.read(READ_BYTES) or b"", b"")


def is_of_certificate(error: BaseException) -> bool:
    """Tell an error of a certificate; where TLS is not even loaded there is none."""
    return "_ssl" in sys.modules and isinstance(error, ssl.SSLCertVerificationError)


def is_hopeless(error: Optional[BaseException]) -> bool:
    """Tell an error that will come again: nobody listens, or the certificate is wrong; requests wraps them deeply."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError) or is_of_certificate(error):
            return True
        inner = error.args[0] if error.args else None
        causes = (getattr(error, "reason", None), getattr(inner, "reason", None), inner, error.__cause__)
        error = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    return False


class Destination(NamedTuple):
    """The next hop of a request's pipeline."""

    url: str
    hop: Hop
    is_final: bool  # the object at its target, not another stage
    headers: Mapping[str, str]  # the rest of the pipeline


def content_type(headers: Mapping[str, str]) -> Tuple[Tuple[str, str], ...]:
    """Pass on what another node says its content is."""
    return (("Content-Type", headers.get("Content-Type") or DEFAULT_MIME_TYPE),)


def is_overridden(server: ETLServer, name: str) -> bool:
    """Tell whether a class has a method of its own in the place of ours."""
    return getattr(type(server), name) is not getattr(ETLServer, name)


class Deliveries:
    """Put outputs to the next hop, and turn its answer into ours. Shared by all threads of a worker.

    What a hop answers decides whether an object is there or lost, and AIStore acts on our status
    alone: 200 is content, 204 a delivery, 404 a source that does not exist and is skipped without a
    word. So nothing is passed on that means something else coming from us.
    """

    def __init__(self, settings: Settings, server: ETLServer, pool: ConnectionPool) -> None:
        self._settings = settings
        self._server = server
        self._pool = pool
        self._by_class = any(is_overridden(server, name) for name in ("client_put", "handle_direct_put_response"))

    def destination(self, request: ETLRequest) -> Destination:
        """Read the pipeline, before anything is done for a request whose result could not go anywhere."""
        try:
            entry, rest = parse_etl_pipeline(request.pipeline)
            Hop.of(entry)
            url = compose_etl_direct_put_url(entry, self._settings.target, request.decoded_path, request.etl_args)
            return Destination(url, Hop.of(url), is_final(entry), {HEADER_NODE_URL: rest} if rest else {})
        except ValueError as error:  # InvalidPipelineError is one, ours and the SDK's
            raise BadRequest(f"the pipeline cannot be used: {error}") from None

    def deliver(self, to: Destination, output: Union[bytes, Iterator[bytes]], connect_seconds: float) -> Answer:
        """Put an output to the next hop. HopLost where its answer does not come whole."""
        counted = output if isinstance(output, bytes) else CountingIterator(output)
        try:
            if self._by_class:
                return self._deliver_by_class(to, counted)
            request = NodeRequest("PUT", to.hop, path_of(to.url), to.headers, as_body(counted), connect_seconds)
            return self._read_answer(to, self._pool.open(request), counted)
        except (OSError, http.client.HTTPException, NodeBodyLost) as error:
            raise HopLost(f"the next hop was lost: {describe(error)}", is_hopeless(error)) from None

    def _deliver_by_class(self, to: Destination, output: Union[bytes, CountingIterator]) -> Answer:
        """Let the class's own methods put the output, and read the answer where it wants to."""
        data = b"" if isinstance(output, CountingIterator) else output
        response = self._server.client_put(to.url, cast(Any, as_body(output)), dict(to.headers))
        if not is_overridden(self._server, "handle_direct_put_response"):
            answer = NodeAnswer(response.status_code, response.headers, response.content, to.url)
            return self._judge(to, answer, size_of(output))
        status, content, length = self._server.handle_direct_put_response(response, data, size_of(output))
        status = int(status)
        if status >= 400:
            content = self._settings.redact(as_bytes(content, "the answer is").decode("utf-8", "replace")).encode()
        fields = tuple(self._server.make_direct_put_headers(length).items())
        return Answer(HTTPStatus.BAD_GATEWAY if status == HTTPStatus.NOT_FOUND else status, content, fields)

    def _read_answer(self, to: Destination, body: NodeBody, output: Union[bytes, CountingIterator]) -> Answer:
        """Turn the hop's answer into ours; the content of a next stage is passed on as it comes, if it is large."""
        is_content = body.status == HTTPStatus.OK and not to.is_final
        if is_content and (body.size is None or body.size > SMALL_ANSWER_BYTES):
            pieces = relay(body)
            return Answer(HTTPStatus.OK, chain_first(next(pieces, b""), pieces), content_type(body.headers))
        with body:
            if body.is_early and body.status < 300 and to.is_final:
                raise BadGateway("the target answered before it had the object")
            content = body.readall() if is_content else read_text(body)
            return self._judge(to, NodeAnswer(body.status, body.headers, content, to.url), size_of(output))

    def _judge(self, to: Destination, answer: NodeAnswer, size: int) -> Answer:
        """Decide what an answer that came whole means: content, also empty, news of a delivery, or a refusal."""
        status = answer.status_code
        if to.is_final and status in (HTTPStatus.OK, HTTPStatus.NO_CONTENT) and not answer.content:
            return Answer(HTTPStatus.NO_CONTENT, b"", ((HEADER_DIRECT_PUT_LENGTH, str(size)),))
        if not to.is_final and status == HTTPStatus.NO_CONTENT:
            return Answer(status, b"", ((HEADER_DIRECT_PUT_LENGTH, answer.headers.get(HEADER_DIRECT_PUT_LENGTH, "0")),))
        if not to.is_final and status == HTTPStatus.OK:
            return Answer(status, answer.content, content_type(answer.headers))
        return self._refused(answer)

    def _refused(self, answer: NodeAnswer) -> Answer:
        """Pass a refusal back. A 404 would mean that the source is not there, and other statuses that all is well."""
        status = answer.status_code
        text = self._settings.redact(answer.content[:ERROR_TEXT_LIMIT_BYTES].decode("utf-8", "replace"))
        if status == HTTPStatus.SERVICE_UNAVAILABLE and answer.headers.get(HEADER_RETRY_REASON):
            raise HopLost(f"the next stage wants the object again: {text}")
        if status < 400 or status == HTTPStatus.NOT_FOUND:
            raise BadGateway(f"the next hop answered {status}: {text}".rstrip(": "))
        origin = urlsplit(answer.url).netloc
        return Answer(status, text.encode(), content_type(answer.headers), origin=origin)


def guarded(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield a stream's pieces; its failure comes as OutputFailed, so that it is not taken for the connection's."""
    with contextlib.closing(cast(Any, pieces)):
        while True:
            piece, error = attempt(next, pieces, None)
            if error is not None:
                raise error if isinstance(error, OutputFailed) else OutputFailed(error)
            if piece is None:
                return
            yield piece


# == 13. One request ==
# The stages in a row, and the only place that maps failures to answers. HTTP servers call
# `Service.answer`.


STATUS_OF_USER_ERROR: Mapping[str, Callable[[Any], int]] = {
    "starlette.exceptions.HTTPException": lambda error: int(error.status_code),
    "werkzeug.exceptions.HTTPException": lambda error: int(error.code or getattr(error.response, "status_code", 500)),
    "InvalidPipelineError": lambda error: HTTPStatus.BAD_REQUEST,
    "ETLDirectPutTransientError": lambda error: 503 if error.bail_without_local_retry else 502,
}


def user_status(error: BaseException) -> int:
    """Read the status that a user's exception stands for, 500 unless it is of a few known kinds.

    These are known by name: their modules are imported only where the class needs them.
    """
    for base in type(error).__mro__:
        of_kind = STATUS_OF_USER_ERROR.get(f"{base.__module__}.{base.__qualname__}") or (
            STATUS_OF_USER_ERROR.get(base.__qualname__) if base.__module__ in (__name__, "aistore.sdk.errors") else None)
        if of_kind is not None:
            status = of_kind(error)
            return status if 400 <= status <= 599 else HTTPStatus.INTERNAL_SERVER_ERROR
    return HTTPStatus.INTERNAL_SERVER_ERROR


class Retries:
    """What patience is left with one delivery. Its waits, and the time to connect again, are bounded together."""

    def __init__(self, delays: Sequence[float]) -> None:
        self._delays = list(delays)
        self._connect_again_seconds = RETRY_CONNECT_SECONDS / max(len(delays), 1)
        self._seconds = sum(delays) + RETRY_CONNECT_SECONDS
        self._deadline = 0.0
        self.connect_seconds = CONNECT_SECONDS

    def take(self, error: HopLost) -> float:
        """Return the delay before the next attempt; raise the error if there is to be none."""
        now = time.monotonic()
        self._deadline = self._deadline or now + self._seconds
        if error.hopeless or not self._delays or now + self._delays[0] > self._deadline:
            raise error
        self.connect_seconds = self._connect_again_seconds
        return self._delays.pop(0)


def forget_traceback(error: BaseException) -> None:
    """Let go of the frames that an error came through: they hold whole objects until the next full collection."""
    for each in (error, getattr(error, "error", None), error.__context__, error.__cause__):
        if isinstance(each, BaseException):
            each.__traceback__ = None


class Service:
    """What a worker answers requests with; shared by all its threads.

    `answer` never raises. An answer in pieces holds the object's source, and perhaps a connection
    to a hop, until it has been sent or closed.
    """

    def __init__(self, settings: Settings, server: ETLServer, pool: ConnectionPool, slots: Slots) -> None:
        self.settings = settings
        self._sources = Sources(settings, pool, server.sanitize_fqn)
        self._transforms = Transforms(server, slots)
        self.is_streaming = server.use_streaming  # whether objects are transformed piece by piece
        self._deliveries = Deliveries(settings, server, pool)
        self._delays = [min(2.0 ** retry, RETRY_DELAY_LIMIT_SECONDS) for retry in range(server.direct_put_retries)]
        self._has_begun = self._has_answered = False

    def close_idle(self) -> None:
        """Close connections to other nodes that have been idle for too long."""
        self._sources.close_idle()

    @property
    def message_room(self) -> Room:
        """The memory for messages that wait for their transforms."""
        return self._transforms.message_room

    def load(self, request: ETLRequest) -> Optional[Tuple[ETLRequest, ReceivedObject]]:
        """Read an object that a request names by its path; return both as if the object had come with it.

        None where the object has more than a MiB, is not here as a whole, or cannot be read.
        """
        loaded = attempt(self._sources.load, request).value
        if loaded is None:
            return None
        return request._replace(method="PUT", fqn=""), ReceivedObject(loaded.getvalue())

    def answer_message(self, request: ETLRequest, body: ReceivedObject) -> Tuple[Answer, bytes]:
        """Answer one object that came over WebSocket, whatever happens: the answer, and its body whole."""
        with self.answer(request, body) as answer:
            if isinstance(answer.body, bytes):
                return answer, answer.body
            content, error = attempt(b"".join, answer.body)
        if error is None:
            return answer, content
        answer = self.answer_failure(request, error)
        return answer, cast(bytes, answer.body)

    def answer(self, request: ETLRequest, body: Union[MessageBody, ReceivedObject]) -> Answer:
        """Answer one request, whatever happens; the caller sends the answer and closes it."""
        if not self._has_begun:
            # before the flag: another thread that sees it may kill the worker at once
            report(REPORT_BEGUN)
            self._has_begun = True
        answer, error = attempt(self._answer, request, body)
        if not self._has_answered:
            report(REPORT_ANSWERED)
            self._has_answered = True
        return cast(Answer, answer) if error is None else self.answer_failure(request, error)

    def answer_failure(self, request: ETLRequest, error: BaseException) -> Answer:
        """Answer a request that has failed, however that is."""
        answer, second_error = attempt(self.answer_for, request, error)
        forget_traceback(error)
        if second_error is not None:  # an exception of the user's that cannot even be looked at
            return error_answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"Processing error: {type(error).__name__}", {})
        return cast(Answer, answer)

    def _answer(self, request: ETLRequest, body: Union[MessageBody, ReceivedObject]) -> Answer:
        """Understood, it is read, transformed and delivered."""
        if request.pipeline:
            answer = self._deliver(request, body)
            if answer.origin and not request.is_message:
                text = cast(bytes, answer.body)[:1000].decode("utf-8", "replace")
                logger.error("%s: the next hop, %s, answered %d: %s", request.name, answer.origin,
                             answer.status, text)
            return answer
        fields = (("Content-Type", self._transforms.mime_type),)
        if not self.is_streaming or request.is_message:  # a message must be whole
            return Answer(HTTPStatus.OK, self._output(request, body), fields)
        pieces = guarded(self._pieces(request, body))
        # until the first piece is there, a failure can still be told by a status
        first = next(pieces, b"")
        return Answer(HTTPStatus.OK, chain_first(first, pieces), fields)

    def _output(self, request: ETLRequest, body: Union[MessageBody, ReceivedObject]) -> bytes:
        """Read and transform a whole object."""
        if self.is_streaming:
            return b"".join(self._pieces(request, body))
        source = self._sources.open(request, body)
        with source.stream:
            return self._transforms.run(request, source)

    def _pieces(self, request: ETLRequest, body: Union[MessageBody, ReceivedObject]) -> Iterator[bytes]:
        """Read and transform an object in pieces; the source is open for as long as they are taken."""
        source = self._sources.open(request, body)
        with source.stream:
            yield from self._transforms.stream(request, source)

    def _deliver(self, request: ETLRequest, body: Union[MessageBody, ReceivedObject]) -> Answer:
        """Deliver the output; again while the hop is lost, if the output or the object can be had again."""
        destination = self._deliveries.destination(request)
        output = None if self.is_streaming and not request.is_message else self._output(request, body)
        retries = Retries(self._delays if output is not None or request.is_replayable else [])
        while True:
            try:
                pieces = guarded(self._pieces(request, body)) if output is None else output
                return self._deliveries.deliver(destination, pieces, retries.connect_seconds)
            except HopLost as error:
                if output is None and not request.is_replayable and not error.hopeless:
                    raise RequestError(str(error), HTTPStatus.SERVICE_UNAVAILABLE,
                                       {HEADER_RETRY_REASON: RETRY_REASON_TRANSIENT}) from None
                delay = retries.take(error)
                logger.warning("%s: %s; trying again in %.0f s", request.name, error, delay)
                time.sleep(delay)

    def answer_for(self, request: ETLRequest, error: BaseException) -> Answer:
        """Map a failure to the answer that the client gets, and to a line of the log for the operator."""
        if isinstance(error, OutputFailed):
            error = error.error
        if isinstance(error, RequestError):
            logger.log(logging.INFO if isinstance(error, NotFound) else logging.ERROR, "%s: %s", request.name, error)
            return error_answer(error.status, self.settings.redact(str(error)), error.headers)
        status, headers = user_status(error), {}
        reason = str(getattr(error, "detail", "") or getattr(error, "description", "")
                     or describe_of_user(error))
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:  # the author has meant it
            logger.warning("%s: %d: %s", request.name, status, reason)
        else:
            log_user_error(request.name, error)
        if status == HTTPStatus.SERVICE_UNAVAILABLE and getattr(error, "bail_without_local_retry", False):
            headers = {HEADER_RETRY_REASON: RETRY_REASON_TRANSIENT}
        return error_answer(status, self.settings.redact(f"Processing error: {reason}"), headers)


# == 14. HTTP: one connection ==
# Bytes of a connection to `Service.answer` and back (RFC 9110, RFC 9112). One thread at a time
# serves a connection: the leader of the server, which must not wait, or a thread of its pool.


class Next(enum.Enum):
    """What a connection wants next: all that a server has to know of a protocol."""

    READ = enum.auto()  # to be served by the leader once more has come
    THREAD = enum.auto()  # to be served by a thread that may wait
    PAUSE = enum.auto()  # nothing, until it asks again by itself
    UPGRADE = enum.auto()  # to speak WebSocket from now on
    LINGER = enum.auto()  # to be closed as soon as its client has stopped sending
    CLOSE = enum.auto()
    RESET = enum.auto()  # to be closed so that half an answer is not taken for a whole one
    NOTHING = enum.auto()  # another thread serves it by now


class Connection:
    """One connection, served by one thread at a time.

    Methods to override:  attend, work, dismiss, is_expired, expire; let_go, pause and close where
    there is something to do

    `attend` serves what has come and never waits; `work` serves and may wait. Both return what is
    wanted next. What they raise ends the connection. Times are those of time.monotonic().
    """

    is_over = False  # whether it is to be ended by the next sweep, although nothing may have come

    def __init__(self, connection: socket.socket, server: Any, source: ConnectionInput) -> None:
        self.socket = connection
        # The Server of section 16; the protocols use its service, application, settle, submit,
        # sweep_soon, may_upgrade, is_crowded, is_draining, is_late, and count up its `turn` with
        # each call of the class.
        self.server = server
        self.input = source
        self.served = 0  # calls of the class, since the server last looked
        self.since = time.monotonic()  # when it became idle, or the first byte of what is here came
        self._calls_until = 0.0  # until when the thread that attends may call the class

    def attend(self, now: float, may_call: bool) -> Next:
        """Serve what has come without waiting; call the class only if `may_call`."""
        raise NotImplementedError

    def work(self) -> Next:
        """Serve on, and wait for what that takes."""
        raise NotImplementedError

    def dismiss(self) -> bool:
        """Tell whether the connection may be closed because the pod stops."""
        raise NotImplementedError

    def is_expired(self, now: float) -> bool:
        """Tell whether it is over, or its client has let it wait for too long."""
        raise NotImplementedError

    def expire(self) -> Next:
        """End it for that."""
        return Next.CLOSE

    def let_go(self) -> bool:
        """Let go of the thread that attends; return True if another one may go on."""
        self._calls_until = 0.0
        return False

    def pause(self) -> bool:
        """Pause until it asks again; return False if it need not pause any more."""
        return False

    def fail(self, error: BaseException) -> Next:
        """Tell how to end the connection, which has failed."""
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        logger.log(level, "connection: %s", describe(error))
        forget_traceback(error)
        return Next.CLOSE

    def close(self) -> None:
        """Let go of what it holds; its server closes the socket."""

    def receive(self) -> bool:
        """Receive what has come, without waiting; return False at the connection's end."""
        try:
            return self.input.fill(socket.MSG_DONTWAIT)
        except BlockingIOError:  # readable no more, or never was
            return True


class LingeringConnection(Connection):
    """A connection whose last answer has left while its client may still send.

    Closing it now would reset it, and the reset could take the answer from the client. So what
    comes is read and forgotten for a while.
    """

    def __init__(self, connection: socket.socket, server: Any, source: ConnectionInput) -> None:
        super().__init__(connection, server, source)
        source.take(source.ahead)
        self._bytes_left = LINGER_LIMIT_BYTES
        self._deadline = self.since + DRAIN_SECONDS
        attempt(connection.shutdown, socket.SHUT_WR)  # a client that is gone shows in `attend`

    def attend(self, now: float, may_call: bool) -> Next:
        """Read and forget what has come."""
        is_open = self.receive()
        self._bytes_left -= len(self.input.take(self.input.ahead))
        return Next.READ if is_open and self._bytes_left > 0 else Next.CLOSE

    def dismiss(self) -> bool:
        """Tell whether the client has stopped sending: AIStore never closes what has failed."""
        return not is_ready(self.socket, select.POLLIN)

    def is_expired(self, now: float) -> bool:
        """Tell whether the client has gone on sending for too long."""
        return now > self._deadline or self.server.is_late


class Head(NamedTuple):
    """The head of a request, parsed; field names are in lower case."""

    method: str
    target: str
    is_http_1_0: bool
    fields: Mapping[str, str]

    @property
    def wants_close(self) -> bool:
        """Whether the client will send nothing more on this connection."""
        connection = self.fields.get("connection")
        if connection is None:
            return self.is_http_1_0
        options = {option.strip().lower() for option in connection.split(",")}
        return "close" in options or (self.is_http_1_0 and "keep-alive" not in options)


UNKNOWN_HEAD = Head("", "", False, {})  # of a request that could not be parsed


def parse_head(data: bytes) -> Head:
    """Parse the lines of a head; UnframedRequest for what is not plain HTTP/1."""
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
    host = fields.get("host")
    if host is None and minor != "0":
        raise UnframedRequest("the Host field is missing")
    if host and not HOST.fullmatch(host):
        raise UnframedRequest("the Host field is malformed")
    return Head(method, target, minor == "0", fields)


def body_of(head: Head, source: ConnectionInput) -> MessageBody:
    """Tell how a body ends (RFC 9112, 6.3); UnframedRequest if that is ambiguous."""
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


BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
METHOD_BEGINNING = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?: |\Z)")


def check_partial_head(source: ConnectionInput) -> None:
    """Raise UnframedRequest where what is here can never become a head, or is too long for one."""
    if source.ahead >= HEAD_LIMIT_BYTES:
        is_in_request_line = source.find(b"\n", HEAD_LIMIT_BYTES) < 0
        raise UnframedRequest("the head is too long", 414 if is_in_request_line else 431)
    beginning = source.peek(HEAD_LIMIT_BYTES)
    if BARE_LINE_FEED.search(beginning):
        raise UnframedRequest("a line of the head does not end in CRLF")
    if beginning != b"\r" and not METHOD_BEGINNING.match(beginning):  # of TLS, for one
        raise UnframedRequest("this is not HTTP")


# an answer's time as RFC 9110, 5.6.7 wants it, in any locale
http_date = functools.lru_cache(maxsize=1)(functools.partial(email.utils.formatdate, usegmt=True))
UNPRINTABLE = re.compile(r"[^\t -~\x80-\xff]")


@functools.lru_cache(maxsize=64)
def status_line(status: int) -> str:
    """Write an answer's first line, also for a status that a user's code made up."""
    return f"HTTP/1.1 {int(status)} {http.client.responses.get(status, 'Unknown')}\r\n"


@functools.lru_cache(maxsize=1024)
def field_line(name: str, value: str) -> str:
    """Write one header field; a value of user code's cannot break out of its line."""
    return UNPRINTABLE.sub("?", f"{name}: {value}") + "\r\n"


def answer_head(status: int, fields: Iterable[Tuple[str, str]]) -> bytes:
    """Write an answer's head."""
    lines = [field_line(name, value) for name, value in fields]
    date = http_date(int(time.time()))
    return "".join([status_line(status), "Date: ", date, "\r\n", *lines, "\r\n"]).encode("latin-1")


def log_request(method: str, path: str, status: int, size: int, began: float) -> None:
    """Log what a request came to, and when it began by time.monotonic(); at DEBUG alone."""
    milliseconds = 1000 * (time.monotonic() - began)
    what = f"{method} {path}" if method else "no request"
    logger.debug("%s: %d, %d bytes in %.1f ms", what, status, size, milliseconds)


def log_cut(name: str, error: BaseException) -> None:
    """Log why an answer ended half-way."""
    error = getattr(error, "error", error)
    if isinstance(error, RequestError):
        logger.error("%s: the answer was cut: %s", name, error)
    else:
        log_user_error(f"{name}: the answer was cut", error)


WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
WEBSOCKET_KEY = re.compile("[+/0-9A-Za-z]{21}[AQgw]==")  # sixteen bytes


def upgrade_answer(fields: Mapping[str, str]) -> Answer:
    """Answer a handshake (RFC 6455, 4.2); RequestError if it is none or not for us."""
    import binascii
    import hashlib

    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
    words = {word.strip().lower() for word in fields.get("connection", "").split(",")}
    protocols = {protocol.strip().lower() for protocol in fields.get("upgrade", "").split(",")}
    if "websocket" not in protocols or "upgrade" not in words:
        raise RequestError("/ws is for WebSocket alone", HTTPStatus.UPGRADE_REQUIRED, upgrade)
    if fields.get("sec-websocket-version") != "13":
        raise RequestError("only version 13 of WebSocket is spoken here",
                           HTTPStatus.UPGRADE_REQUIRED, {"Sec-WebSocket-Version": "13", **upgrade})
    key = fields.get("sec-websocket-key", "")
    if not WEBSOCKET_KEY.fullmatch(key):
        raise BadRequest("the Sec-WebSocket-Key is malformed")
    digest = hashlib.sha1(key.encode() + WEBSOCKET_GUID, usedforsecurity=False).digest()
    accept = binascii.b2a_base64(digest, newline=False).decode()
    return Answer(HTTPStatus.SWITCHING_PROTOCOLS, b"",
                  (*upgrade.items(), ("Sec-WebSocket-Accept", accept)))


HEALTHY = Answer(HTTPStatus.OK, b"Running", (("Content-Type", "text/plain"),))


class Framed(NamedTuple):
    """A request whose head is here, and what it asks for or its answer."""

    head: Head
    body: MessageBody
    asked: Union[ETLRequest, Answer, Callable[[MessageBody], Answer]]  # the last of an application


class HTTPConnection(Connection):
    """A connection of HTTP/1.1, and 1.0.

    `BaseHTTPRequestHandler`'s parser is not used: it is lenient where two readers could differ on
    where a request ends.
    """

    def __init__(self, connection: socket.socket, server: Any) -> None:
        super().__init__(connection, server, ConnectionInput(connection))
        self._waits = False  # whether the thread that serves it may wait
        self._todo: Optional[Framed] = None  # a request that waits for a thread
        # of an answer, what the leader could not send without waiting
        self._unsent: Sequence[Any] = ()
        self._wish = Next.READ  # what is to become of the connection once all is sent
        self._is_cut = False  # whether an answer has begun whose end only the connection's can tell
        self._serving = "connection"  # the object of the request that is being answered
        self._size = 0  # of the answer's body, as far as it was sent
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        set_timeout(connection, socket.SO_SNDTIMEO, RESULT_UNREAD_SECONDS)
        set_timeout(connection, socket.SO_RCVTIMEO, BODY_PAUSE_SECONDS)

    def attend(self, now: float, may_call: bool) -> Next:
        """Serve the requests that have come, as far as nothing has to be waited for."""
        if not self.input.ahead:
            self.since = now
        if not self.receive():
            return Next.CLOSE
        self._waits, self._calls_until = False, now + TURN_SECONDS if may_call else 0.0
        return self._serve_all()

    def work(self) -> Next:
        """Send the rest of an answer, then serve the requests that are here."""
        self._waits = True
        unsent, self._unsent = self._unsent, ()
        send_parts(self.socket, unsent)
        return self._serve_all()

    def dismiss(self) -> bool:
        """Tell whether no request has begun to come."""
        return not (self.input.ahead or is_ready(self.socket, select.POLLIN))

    def is_expired(self, now: float) -> bool:
        """Tell whether the client has taken too long."""
        limit = HEAD_TIMEOUT_SECONDS if self.input.ahead else IDLE_SECONDS
        return now - self.since > limit

    def expire(self) -> Next:
        """Answer a head that did not come whole in time; close what is idle."""
        if not self.input.ahead:
            return Next.CLOSE
        error = UnframedRequest(f"the head took more than {HEAD_TIMEOUT_SECONDS:.0f} s", 408)
        self._waits, self._todo = False, self._refused(error)
        return self._serve_all()

    def fail(self, error: BaseException) -> Next:
        """Log what went wrong; a stream without chunks must end by a reset."""
        if isinstance(error, OSError):
            logger.debug("%s: %s", self._serving, error)
        else:
            log_cut(self._serving, error)
        forget_traceback(error)
        return Next.RESET if self._is_cut else Next.CLOSE

    def _serve_all(self) -> Next:
        """Serve the requests that are here, one after the other, as far as this thread may."""
        while self._wish is Next.READ and not self._unsent:
            framed = self._todo or (self._next_request() if self.input.ahead else None)
            if framed is None:
                break
            self._todo = framed
            if self._waits:
                self._respond(framed)
            elif not self._serve_at_once(framed):
                return Next.THREAD
            self._todo = None
        return Next.THREAD if self._unsent else self._wish

    # -- reading --

    def _next_request(self) -> Optional[Framed]:
        """Take the next request from what is here; None where its head is not here as a whole."""
        source = self.input
        # an empty line before a request is to be skipped (RFC 9112, 2.2)
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
        # a client may wait to be told to send its body (RFC 9110, 10.1.1)
        expects = head.fields.get("expect", "").lower() == "100-continue" and not head.is_http_1_0
        source.invite = self._send_continue if expects and not source.ahead else None
        try:
            return Framed(head, body, self._understand(head, body))
        except RequestError as error:
            return Framed(head, body, error_answer(error.status, str(error), error.headers))

    def _refused(self, error: UnframedRequest) -> Framed:
        """Make what stands for a request that cannot be framed; nothing behind it can be read."""
        logger.warning("request of %s: %s", attempt(self.socket.getpeername).value, error)
        answer = error_answer(error.status, str(error), error.headers)
        return Framed(UNKNOWN_HEAD, BoundedReader(self.input, 0), answer)

    def _understand(self, head: Head, body: MessageBody) -> Any:
        """Tell what a request asks for, or answer it if the class is not needed for that."""
        if self.server.application is not None:
            asked = self.server.application.asked(head, self.socket)
            if asked is not None:
                return asked
        request = ETLRequest.parse(head.method, head.target, head.fields.get("ais-node-url", ""))
        if request.raw_path == "/health":
            return HEALTHY
        if request.raw_path != "/ws":
            return request
        if head.is_http_1_0 or body.size != 0 or head.wants_close:
            raise BadRequest("a handshake is of HTTP/1.1, has no body, and keeps its connection")
        answer = upgrade_answer(head.fields)
        if not self.server.may_upgrade():
            raise RequestError("there are too many WebSocket connections",
                               HTTPStatus.SERVICE_UNAVAILABLE)
        return answer

    # -- answering --

    def _serve_at_once(self, framed: Framed) -> bool:
        """Answer a request without waiting; return False if something is missing."""
        _, body, asked = framed
        if body.size is None or body.size > self.input.ahead:
            return False
        if isinstance(asked, Answer):
            self._respond(framed)
            return True
        may_call = body.size <= READ_BYTES and time.monotonic() <= self._calls_until
        if not may_call or not isinstance(asked, ETLRequest) or asked.pipeline or asked.latest:
            return False
        loaded = self.server.service.load(asked) if asked.fqn else None
        if loaded is None and (asked.fqn or asked.method != "PUT"):
            return False
        self._respond(framed, loaded)
        self.served += 1
        self.server.turn += 1
        return True

    def _respond(self, framed: Framed,
                 loaded: Optional[Tuple[ETLRequest, ReceivedObject]] = None) -> None:
        """Answer one request, for an object that was `loaded` already or with its body."""
        head, body, answer = framed
        self._size, began = 0, time.monotonic()
        if isinstance(answer, ETLRequest):
            self._serving = answer.name
            answer = self.server.service.answer(*(loaded or (answer, body)))
        elif not isinstance(answer, Answer):
            self._serving = head.target.partition("?")[0]
            answer = answer(body)
        try:
            with answer:
                if isinstance(answer.body, bytes) and not body.is_at_end:
                    self._drain(body)
                keeps = self._keeps(answer, head, body)
                self._write(answer, head, keeps)
                keeps = keeps and body.is_at_end  # an application may have left some of it
        finally:
            if logger.isEnabledFor(logging.DEBUG):
                path = head.target.partition("?")[0]
                log_request(head.method, path, answer.status, self._size, began)
        if answer.status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._wish = Next.UPGRADE
        elif not keeps:
            has_all = body.is_at_end and head is not UNKNOWN_HEAD
            self._wish = Next.CLOSE if has_all else Next.LINGER

    def _drain(self, body: MessageBody) -> None:
        """Read what an error has left of a small body."""
        self.input.invite, waits = None, self.input.invite is not None
        if waits or (body.size or 0) > DRAIN_LIMIT_BYTES:
            return
        set_timeout(self.socket, socket.SO_RCVTIMEO, DRAIN_SECONDS)
        attempt(body.drain, DRAIN_LIMIT_BYTES, time.monotonic() + DRAIN_SECONDS)
        set_timeout(self.socket, socket.SO_RCVTIMEO, BODY_PAUSE_SECONDS)

    def _keeps(self, answer: Answer, head: Head, body: MessageBody) -> bool:
        """Tell whether the connection can serve another request after this answer.

        Where a body was not read to its end, an error was found before: rather than reading on, a
        whole object perhaps, or guessing whether a client that waits for "100 Continue" will still
        send it (RFC 9110, 10.1.1), we close.
        """
        if answer.status == HTTPStatus.SWITCHING_PROTOCOLS:
            return True
        if head is UNKNOWN_HEAD or head.wants_close:
            return False
        if self.server.is_draining:
            return False
        if isinstance(answer.body, bytes):
            return body.is_at_end and body.failure is None
        return not head.is_http_1_0  # a stream reads the body to its end, or is cut

    def _write(self, answer: Answer, head: Head, keeps: bool) -> None:
        """Send an answer, whose head tells the client whether the connection can be used again.

        A body in pieces that fails shows by the missing last chunk, or by a reset.
        """
        is_chunked = answer.is_open and not head.is_http_1_0
        fields = [*answer.headers, *answer.framing(is_chunked)]
        if not keeps or head.is_http_1_0:
            fields.append(("Connection", "keep-alive" if keeps else "close"))
        text, last = answer_head(answer.status, fields), b"0\r\n\r\n" if is_chunked else b""
        if head.method == "HEAD":
            self._send(text)
        elif isinstance(answer.body, bytes):
            self._size = len(answer.body)
            self._send(text, last or answer.body)
        else:
            # which cannot come within the answer
            self.input.send_invitation()
            self._is_cut = not is_chunked
            self._send_pieces(text, answer.body, last)
            self._is_cut = False

    def _send_pieces(self, text: bytes, pieces: Iterable[bytes], last: bytes) -> None:
        """Send a head, and pieces of a body as they come; in chunks, if there is to be a last."""
        for piece in pieces:
            self._size += len(piece)
            size = b"%x\r\n" % len(piece) if last else b""
            self._send(text + size, piece, b"\r\n" if last else b"")
            text = b""
        if text or last:
            self._send(text, last)

    def _send(self, *parts: bytes) -> None:
        """Send parts; on the thread that leads, what the client takes without waiting."""
        if self._waits:
            return send_parts(self.socket, parts)
        try:
            self._unsent = send_some(self.socket, parts, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._unsent = parts

    def _send_continue(self) -> None:
        self._send(b"HTTP/1.1 100 Continue\r\n\r\n")


# == 15. WebSocket: one connection ==
# Frames to messages (RFC 6455, the server's side, no extensions); messages to objects and their
# results, AIStore's own protocol (ext/etl/websocket_comm.go); and connections, which join the two.

OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG = 0, 1, 2, 8, 9, 10
OPCODES = (OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG)
FRAME_HEAD_LIMIT_BYTES = 14
# what stands in a frame's head where its size does not fit: where that ends, and the least it may
# be
EXTENDED_SIZES = {126: (4, 126), 127: (10, 1 << 16)}
CONTROL_LIMIT_BYTES = 125  # of a control frame's payload
CLOSE_GOING_AWAY, CLOSE_PROTOCOL, CLOSE_NO_CODE = 1001, 1002, 1005
CLOSE_BAD_TEXT, CLOSE_TOO_BIG, CLOSE_FAILED = 1007, 1009, 1011
# that may be sent, of IANA's; 3000 to 4999 too
CLOSE_CODES = frozenset((1000, 1001, 1002, 1003, *range(1007, 1015)))


class MessageError(RequestError):
    """What comes is not WebSocket as RFC 6455 wants it: the connection is closed with `code`."""

    def __init__(self, detail: str, code: int = CLOSE_PROTOCOL) -> None:
        super().__init__(detail)
        self.code = code


class Closed(Exception):
    """The client has sent a close frame, with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def frame_head(opcode: int, size: int, is_last: bool = True) -> bytes:
    """Write the head of a frame that we send, which has no mask (RFC 6455, 5.2)."""
    first = opcode | (0x80 if is_last else 0)
    if size < 126:
        return bytes((first, size))
    if size < 1 << 16:
        return struct.pack("!BBH", first, 126, size)
    return struct.pack("!BBQ", first, 127, size)


def cut_reason(reason: str) -> str:
    """Cut a reason to what fits into a frame that closes, of whole characters."""
    return reason.encode("utf-8", "replace")[:CONTROL_LIMIT_BYTES - 2].decode("utf-8", "ignore")


def close_frame(code: int, reason: str = "") -> bytes:
    """Write a frame that closes."""
    payload = b"" if code == CLOSE_NO_CODE else struct.pack("!H", code)
    payload += cut_reason(reason).encode()
    return frame_head(OP_CLOSE, len(payload)) + payload


def parse_close(payload: bytes) -> int:
    """Take the code from a close frame (RFC 6455, 5.5.1 and 7.4), or MessageError."""
    if not payload:
        return CLOSE_NO_CODE
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (code in CLOSE_CODES or 3000 <= code <= 4999):
        raise MessageError("the code of a close frame is malformed")
    if attempt(payload[2:].decode, "utf-8").error is not None:
        raise MessageError("the reason of a close frame is no UTF-8", CLOSE_BAD_TEXT)
    return code


class Frame(NamedTuple):
    """The head of a frame that a client has sent; sizes are in bytes."""

    is_last: bool
    opcode: int
    size: int  # of the payload
    mask: bytes
    head_size: int

    @property
    def is_control(self) -> bool:
        """Whether the frame is no part of a message."""
        return self.opcode >= OP_CLOSE


def parse_frame(head: bytes) -> Optional[Frame]:
    """Parse the head of a frame (RFC 6455, 5.2 and 5.5); None where it is not here as a whole.

    Raises MessageError for what no client may send, as soon as that shows.
    """
    if len(head) < 2:
        return None
    opcode, size = head[0] & 0x0F, head[1] & 0x7F
    if head[0] & 0x70:
        raise MessageError("a reserved bit is set, and no extension was agreed on")
    if opcode not in OPCODES:
        raise MessageError(f"the opcode {opcode} is reserved")
    if not head[1] & 0x80:
        raise MessageError("a client's frame has no mask")
    if opcode >= OP_CLOSE and not (head[0] & 0x80 and size <= CONTROL_LIMIT_BYTES):
        raise MessageError("a control frame is too long or fragmented")
    start, least = EXTENDED_SIZES.get(size, (2, 0))
    if len(head) < start + 4:
        return None
    size = int.from_bytes(head[2:start], "big") if least else size
    if not least <= size < 1 << 63:
        raise MessageError("the length of a frame is malformed")
    return Frame(head[0] >= 0x80, opcode, size, head[start:start + 4], start + 4)


def next_frame(source: ConnectionInput) -> Frame:
    """Take the head of a frame, and wait for it; ShortBody where the connection ends before."""
    while True:
        frame = parse_frame(source.peek(FRAME_HEAD_LIMIT_BYTES))
        if frame is not None:
            source.take(frame.head_size)
            return frame
        if not source.fill():
            raise ShortBody("a message ended early")


def unmasked(data: Any, mask: bytes) -> bytes:
    """Undo the mask of data (RFC 6455, 5.3), as one whole number."""
    size = len(data)
    pad = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")


def unmask_by_numbers(data: memoryview, mask: bytes) -> None:
    """Undo the mask of data where it lies."""
    data[:] = unmasked(data, mask)


def unmasking_by_openssl() -> Callable[[memoryview, bytes], None]:
    """Make a function that undoes masks in the C of OpenSSL; raise where there is none.

    That is nine times as fast as by numbers, and the OpenSSL is the one that Python's hashlib is
    linked to. Output feedback (NIST SP 800-38A, 6.4) encrypts a block again and again, and XORs
    data with what comes out. By a cipher that leaves the block as it is, that is one block over and
    over: what RFC 6455 does with a mask.
    """
    import _hashlib
    import ctypes

    # of openssl/modes.h; found in what the module is linked to
    encrypt = ctypes.CDLL(_hashlib.__file__).CRYPTO_ofb128_encrypt
    address = ctypes.c_void_p
    encrypt.argtypes = [address, address, ctypes.c_size_t, address, address, address, address]
    encrypt.restype = None
    # called with the block, the block, and the key: how many bytes to move
    identity = ctypes.cast(ctypes.memmove, address)

    def unmask_by_openssl(data: memoryview, mask: bytes) -> None:
        start = ctypes.byref(ctypes.c_char.from_buffer(data))
        block, used = ctypes.create_string_buffer(mask * 4, 16), ctypes.byref(ctypes.c_int(0))
        encrypt(start, start, len(data), None, block, used, identity)

    trial = bytearray(range(37))
    unmask_by_openssl(memoryview(trial), b"mask")
    if trial != unmasked(bytes(range(37)), b"mask"):
        raise NotImplementedError("OpenSSL's output feedback is another")
    return unmask_by_openssl


@functools.lru_cache(maxsize=None)
def fastest_unmasking() -> Callable[[memoryview, bytes], None]:
    """Return the faster of these functions, if this interpreter has it."""
    by_openssl, error = attempt(unmasking_by_openssl)
    if error is None:
        return cast(Callable[[memoryview, bytes], None], by_openssl)
    logger.debug("large WebSocket messages are unmasked by numbers: %s", describe(error))
    return unmask_by_numbers


class MessageStream(BodyStream):
    """The payload of one message, of all its fragments.

    Control frames between these go to `control`; `admit` is called with the bytes that are known to
    come, and may object.
    """

    def __init__(self, source: ConnectionInput, frame: Frame,
                 control: Callable[[int, bytes], None], admit: Callable[[int], None]) -> None:
        super().__init__()
        self._source = source
        self._control = control
        self._admit = admit
        self._is_text = frame.opcode == OP_TEXT
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._announced = self._left = 0
        self._is_last, self._mask = False, b""
        self.size = frame.size if frame.is_last else None
        self._begin_frame(frame)

    def receive(self, buffer: Any) -> int:
        """Read some bytes of the payload, 0 at its end."""
        try:
            while not self._left and not self._is_last:
                self._begin_fragment()
            if not self._left:
                return 0
            view = memoryview(buffer)[:self._left]
            count = self._source.readinto(view, 0 if self._is_text else socket.MSG_WAITALL)
        except OSError as error:
            raise ShortBody(f"a message broke off: {describe(error)}") from None
        if not count:
            raise ShortBody("a message ended early")
        unmask = fastest_unmasking() if count > UNMASK_BYTES else unmask_by_numbers
        unmask(view[:count], self._mask)
        turn = count % 4
        self._mask = self._mask[turn:] + self._mask[:turn]
        self._left -= count
        self._check_text(view[:count])
        return count

    def _begin_frame(self, frame: Frame) -> None:
        self._is_last, self._left, self._mask = frame.is_last, frame.size, frame.mask
        self._announced += frame.size
        self._admit(self._announced)

    def _begin_fragment(self) -> None:
        """Go on with the message's next frame; a control frame before it is answered."""
        frame = next_frame(self._source)
        if frame.is_control:
            if not self._source.need(frame.size):
                raise ShortBody("a frame ended early")
            payload = unmasked(self._source.take(frame.size), frame.mask)
            return self._control(frame.opcode, payload)
        if frame.opcode != OP_CONTINUATION:
            raise MessageError("a message begins within another")
        self._begin_frame(frame)
        self._check_text(b"")

    def _check_text(self, data: Any) -> None:
        """See to it that text is UTF-8, as soon as it is not: the end may be far."""
        if self._is_text:
            try:
                self._decode(bytes(data), self._is_last and not self._left)
            except UnicodeDecodeError:
                raise MessageError("a text is no UTF-8", CLOSE_BAD_TEXT) from None


class MessageReader:
    """Read whole messages, one at a time; answer control frames by `send`.

    A message that is not small takes room in memory that the worker's connections share, until its
    transform begins. Text is taken for its bytes: AIStore sends none, and there is nothing else
    that it could mean.

    Both methods raise Closed at a close frame, and MessageError where the connection must be
    closed.
    """

    def __init__(self, source: ConnectionInput, room: Room, send: Callable[..., None]) -> None:
        self._source = source
        self._room = room
        self._send = send
        self.needs_read = False  # whether what comes next must be read by `read`

    def small(self) -> Optional[bytes]:
        """Take the next message if it is small and here as a whole."""
        source = self._source
        while True:
            frame = parse_frame(source.peek(FRAME_HEAD_LIMIT_BYTES))
            if frame is None:
                self.needs_read = False
                return None
            is_plain = frame.is_last and frame.opcode >= OP_BINARY
            self.needs_read = not is_plain or frame.size > UNMASK_BYTES
            if self.needs_read or source.ahead < frame.head_size + frame.size:
                return None
            source.take(frame.head_size)
            payload = unmasked(source.take(frame.size), frame.mask)
            if frame.opcode == OP_BINARY:
                return payload
            self._take_control(frame.opcode, payload)

    def read(self) -> ReceivedObject:
        """Read the message that begins now; ShortBody where the connection ends within it.

        Raises ObjectTooLarge where there will never be memory for it.
        """
        frame = next_frame(self._source)
        if frame.opcode == OP_CONTINUATION:
            raise MessageError("there is no message to be continued")
        stream = MessageStream(self._source, frame, self._take_control, self._room.check)
        waiting = WaitingBody(self._room, stream)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(waiting.close)
            received = ReceivedObject(waiting.readall(), waiting.close)
            on_failure.pop_all()
        return received

    def _take_control(self, opcode: int, payload: bytes) -> None:
        """Answer a ping; a close frame ends all, and a pong says nothing to us."""
        if opcode == OP_PING:
            self._send(frame_head(OP_PONG, len(payload)), payload)
        elif opcode == OP_CLOSE:
            raise Closed(parse_close(payload))


class Reply(NamedTuple):
    """What goes back for an object: its result, the length delivered, or a failure."""

    opcode: int  # OP_BINARY, OP_TEXT, or OP_CLOSE
    data: bytes  # of a failure, the reason


def reason_of(body: bytes) -> str:
    """Take the reason from the body of an answer that tells a failure."""
    value = attempt(json.loads, body).value
    detail = value.get("detail") if isinstance(value, dict) else None
    text = detail if isinstance(detail, str) else body.decode("utf-8", "replace")
    return " ".join(text.split())


def is_bound_elsewhere(pipeline: str) -> bool:
    """Tell whether the last hop of a pipeline is an object at its target."""
    return bool(attempt(is_final, pipeline.rpartition(",")[2].strip()).value)


class Exchanged:
    """One object of an exchange: understood, and answered in its time."""

    def __init__(self, request: ETLRequest, body: ReceivedObject) -> None:
        self.request = request
        self.body = body
        self.size = body.size  # bytes in memory: the object's, then its result's
        self.reply: Optional[Reply] = None


class ObjectExchange:
    """AIStore's protocol on one connection: pair messages, have objects answered.

    An object is one message of JSON, and if that has no `fqn`, a second one with the bytes.
    Messages go in by `take`, on one thread at a time. Replies come out by `send`, one for each
    object and in their order, on any thread but never two at once; it is told whether it may wait
    for the client, and must not raise. `submit` has a function called with an argument on another
    thread, and `told` is called when a pending object has been answered.

    A quick object is answered on the thread of `take`, where that may call the class. Any other is
    *pending*: a thread answers it, and whoever finds the first one answered sends the replies that
    are ready. If an object that is answered on the thread of `take` turns out to take long,
    `let_go` makes it pending as well, and another thread takes messages.

    The protocol has no word for failure; what a failed object is answered follows from what a
    target (AIStore 5.0) makes of each answer:

    * an object bound for another target: a binary message, which the target takes for that object's
      failure
    * any other: the connection must be closed, which fails the object; all behind it is lost. With
      ETL_WS_FAILURE=empty it is the text that tells a delivery: the object is empty or missing, and
      the job goes on
    """

    def __init__(self, service: Service, send: Callable[[Sequence[Reply], bool], None],
                 submit: Callable[[Callable[[Any], None], Any], None],
                 told: Callable[[], object]) -> None:
        self._service = service
        self._send = send
        self._submit = submit
        self._told = told
        self._awaited: Optional[ETLRequest] = None  # an object whose bytes are the next message
        # what the thread of `take` answers, and is not pending
        self._current: Optional[Exchanged] = None
        # what other threads answer, or have answered
        self.pending: Deque[Exchanged] = collections.deque()
        self._bytes = 0  # of those
        self._is_sending = False
        self._is_broken = False  # whether a failure has ended it: nothing behind it can be answered
        self._lock = threading.Lock()  # of pending, _current, _bytes and _is_sending

    @property
    def is_between_objects(self) -> bool:
        """Whether the next message begins an object."""
        return self._awaited is None

    @property
    def is_full(self) -> bool:
        """Whether so much is pending that nothing more is to be taken; one object always is."""
        count = len(self.pending)
        return count >= AHEAD_LIMIT_MESSAGES or (count > 0 and self._bytes >= AHEAD_LIMIT_BYTES)

    @property
    def next_name(self) -> str:
        """What log lines call that of which the next message is a part."""
        return "a control message" if self._awaited is None else self._awaited.name

    def take(self, message: Union[bytes, ReceivedObject], may_call: bool,
             submit: Optional[Callable[[Callable[[Any], None], Any], None]] = None) -> bool:
        """Take a message, and answer its object here if that is quick and `may_call`.

        `submit` is used for this object in the place of the exchange's own.
        Returns False if the object was let go meanwhile, and another thread takes the messages
        behind it. Raises BadRequest where no control message was understood, after which none can
        be.
        """
        request, self._awaited = self._awaited, None
        if request is None:
            request, message = self._read_control(message), b""
            if not request.fqn:
                self._awaited = request
                return True
        if isinstance(message, bytes):
            message = ReceivedObject(message)
        if may_call and not self.pending and not request.pipeline:
            loaded = self._service.load(request) if request.fqn else (request, message)
            if loaded is not None and loaded[1].size <= WRITE_BYTES:
                return self._answer_here(Exchanged(*loaded))
        exchanged = Exchanged(request, message)
        with self._lock:
            self.pending.append(exchanged)
            self._bytes += exchanged.size
        # there is no other thread
        if attempt(submit or self._submit, self._run, exchanged).error is not None:
            self._run(exchanged)
        return True

    def _read_control(self, message: Union[bytes, ReceivedObject]) -> ETLRequest:
        """Understand the first message of an object; BadRequest."""
        if isinstance(message, ReceivedObject):
            with message:
                message = message.getvalue()
        return ETLRequest.from_message(attempt(json.loads, message).value)

    def let_go(self) -> bool:
        """Make the object pending that `take` answers; return False if there is none."""
        with self._lock:
            current, self._current = self._current, None
            if current is None:
                return False
            self.pending.append(current)  # there was nothing before it
            self._bytes += current.size
            return True

    def _answer_here(self, exchanged: Exchanged) -> bool:
        """Answer an object on this thread; False if it was let go meanwhile."""
        self._current = exchanged
        reply = self._reply_to(exchanged)
        with self._lock:
            is_ours = self._current is exchanged
            self._current = None
        if is_ours:
            self._send_in_turn([reply], waits=False)
        elif attempt(self._submit, lambda reply: self._keep(exchanged, reply), reply).error:
            # else another thread does: this one must not wait for a client
            self._keep(exchanged, reply)
        return is_ours

    def _run(self, exchanged: Exchanged) -> None:
        """Answer a pending object."""
        self._keep(exchanged, self._reply_to(exchanged))

    def _keep(self, exchanged: Exchanged, reply: Reply) -> None:
        """Keep the reply of a pending object, and send what is ready."""
        with self._lock:
            self._bytes += len(reply.data) - exchanged.size
            exchanged.size, exchanged.reply = len(reply.data), reply
        while True:
            with self._lock:
                ready = list(itertools.takewhile(lambda each: each.reply, self.pending))
                if self._is_sending or not ready:
                    break
                self._is_sending = True
            self._send_in_turn([cast(Reply, each.reply) for each in ready], waits=True)
            with self._lock:
                self._is_sending = False
                for each in ready:
                    self._bytes -= self.pending.popleft().size
        self._told()

    def _send_in_turn(self, replies: Sequence[Reply], waits: bool) -> None:
        """Send replies, but for those behind a failure that has ended all."""
        sent = []
        for reply in replies:
            if not self._is_broken:
                self._is_broken = reply.opcode == OP_CLOSE
                sent.append(reply)
        if sent:
            self._send(sent, waits)

    def _reply_to(self, exchanged: Exchanged) -> Reply:
        """Have an object answered, whatever happens: memory may be short for the answer itself."""
        reply, error = attempt(self._answer, exchanged)
        return reply if error is None else Reply(OP_CLOSE, type(error).__name__.encode())

    def _answer(self, exchanged: Exchanged) -> Reply:
        request, began = exchanged.request, time.monotonic()
        with exchanged.body as body:
            if self._is_broken:
                return Reply(OP_CLOSE, b"")
            answer, content = self._service.answer_message(request, body)
        if logger.isEnabledFor(logging.DEBUG):
            log_request("/ws", request.name, answer.status, len(content), began)
        if answer.status == HTTPStatus.NO_CONTENT:
            return Reply(OP_TEXT, dict(answer.headers).get(HEADER_DIRECT_PUT_LENGTH, "0").encode())
        if answer.status < 300:
            return Reply(OP_BINARY, content)
        reason = self._service.settings.redact(reason_of(content))
        if answer.origin:
            reason = f"the next hop, {answer.origin}, answered {answer.status}: {reason}"
        return self._failure(request, reason)

    def _failure(self, request: ETLRequest, reason: str) -> Reply:
        """Tell a failure in the one way that reaches the user."""
        if is_bound_elsewhere(request.pipeline):
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

    It ends where the client closes it, or just goes away, as AIStore does; by a failed object; or
    when the pod stops, once all that has come is answered. Replies leave in their order, those of
    one turn together.
    """

    def __init__(self, connection: socket.socket, server: Any, source: ConnectionInput) -> None:
        super().__init__(connection, server, source)
        # macOS complains where the client is gone
        attempt(connection.setsockopt, socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
        self._reader = MessageReader(source, server.service.message_room, self._pong)
        self._objects = ObjectExchange(server.service, self._reply, server.submit, self._go_on)
        self._ending: Optional[Sequence[bytes]] = None  # the last frames, once nothing more is read
        self._lingers = False  # whether its client may still send when it is closed
        self._is_lost = False  # whether nothing can be sent any more
        self._is_paused = False
        self._parts: List[bytes] = []  # what is to be sent
        self._size = 0  # of the replies among these, about
        self._lock = threading.Lock()  # of the three above
        self._sending = threading.Lock()  # held while something is sent
        report(REPORT_OPENED)

    def attend(self, now: float, may_call: bool) -> Next:
        """Take the messages that have come, but for a large one and what is behind it."""
        self.since, self._calls_until = now, now + TURN_SECONDS if may_call else 0.0
        if not self.receive() or self.server.is_late:
            return self._finish(self._ending_at_the_end())
        return self._take_messages(socket.MSG_DONTWAIT)

    def work(self) -> Next:
        """Send what is kept, then take messages, large ones too, or end."""
        self._calls_until = 0.0
        self._flush()
        return self._take_messages() if self._ending is None else self._end()

    def dismiss(self) -> bool:
        """Say goodbye, where no object has begun to come."""
        is_busy = self._is_within_object or self._objects.pending
        if is_busy or is_ready(self.socket, select.POLLIN):
            return False
        self._put(close_frame(CLOSE_GOING_AWAY))
        self._flush(socket.MSG_DONTWAIT)
        return True

    def is_expired(self, now: float) -> bool:
        """Tell whether it is over, or the client has paused too long within an object."""
        return self.is_over or (self._is_within_object and now - self.since > BODY_PAUSE_SECONDS)

    def expire(self) -> Next:
        """End the connection for that."""
        if self.is_over:
            return self._finish(())
        return self._finish(self._ending_for(ShortBody("a message paused for too long")))

    def fail(self, error: BaseException) -> Next:
        """End the connection; what it has taken is answered before."""
        if self._ending is not None:
            return super().fail(error)
        return self._finish(self._ending_for(error))

    def let_go(self) -> bool:
        """Have another thread take messages, if an object holds this one up."""
        super().let_go()
        return self._objects.let_go()

    def pause(self) -> bool:
        """Pause until replies have left; return False if they have left meanwhile."""
        with self._lock:
            self._is_paused = self._must_pause
            return self._is_paused

    def close(self) -> None:
        """Tell the supervisor that it is closed."""
        report(REPORT_CLOSED)

    @property
    def _is_within_object(self) -> bool:
        """Whether the client has begun an object, and is to send the rest of it."""
        return bool(self.input.ahead) or not self._objects.is_between_objects

    @property
    def _must_pause(self) -> bool:
        if not self._objects.pending:
            return False
        return self._ending is not None or self._objects.is_full or self.server.is_crowded()

    def _take_messages(self, flags: int = 0) -> Next:
        """Take the messages that are here; with MSG_DONTWAIT, but for large ones."""
        while not (self.is_over or self._must_pause):
            message = self._reader.small()
            if message is None and self._reader.needs_read:
                return Next.THREAD if flags else self._take_large()
            if message is None:
                return Next.READ if self._flush(flags) else Next.THREAD
            if not self._objects.take(message, time.monotonic() < self._calls_until):
                return Next.NOTHING
            if self._size >= WRITE_BYTES and not self._flush(flags):
                return Next.THREAD
        self._flush(flags)  # what is answered must not wait for what is pending
        return self._finish(()) if self.is_over else Next.PAUSE

    def _take_large(self) -> Next:
        """Read a large message, have another thread take those behind it, and answer its object."""
        self._flush()
        jobs: List[Tuple[Callable[[Any], None], Any]] = []
        self._objects.take(self._reader.read(), False, submit=lambda *job: jobs.append(job))
        for function, argument in jobs:
            wish = Next.THREAD if self.input.ahead else Next.READ
            self.server.settle(self, Next.PAUSE if self._must_pause else wish)
            function(argument)
        return Next.NOTHING if jobs else Next.THREAD  # of two messages it was the first

    # -- the end --

    def _ending_at_the_end(self) -> Sequence[bytes]:
        """Return the last frames where the client sends nothing more, or is not to."""
        if self.server.is_late and self._is_within_object:
            return self._ending_for(RequestError("the pod is stopping"))
        return [close_frame(CLOSE_GOING_AWAY)] if self.server.is_draining else []

    def _ending_for(self, error: BaseException) -> Sequence[bytes]:
        """Return the last frames for an error of reading; an object's failure is told as such."""
        self._lingers = True
        if isinstance(error, Closed):
            return [close_frame(error.code)]
        if isinstance(error, (ShortBody, OSError)):
            if not self.server.is_late:
                logger.debug("a WebSocket connection broke off: %s", error)
                return []
            error = RequestError("the pod is stopping")
        if isinstance(error, MessageError):
            logger.warning("a WebSocket connection is closed: %s", error)
            return [close_frame(error.code, str(error))]
        reason = self.server.service.settings.redact(describe(error))
        trace = None if isinstance(error, RequestError) else error
        logger.error("%s: %s; its WebSocket connection is closed", self._objects.next_name, reason,
                     exc_info=trace)
        forget_traceback(error)
        code = CLOSE_TOO_BIG if isinstance(error, ObjectTooLarge) else CLOSE_FAILED
        return self._breaking_frames(code, reason)

    def _breaking_frames(self, code: int, reason: str) -> Sequence[bytes]:
        """Return the frames of a message that is cut short: they fail its object."""
        report(REPORT_BROKEN + " ".join(reason.split()).encode("utf-8", "replace"))
        return [frame_head(OP_BINARY, 0, is_last=False), close_frame(code, reason)]

    def _finish(self, ending: Sequence[bytes]) -> Next:
        """Read nothing more, and end the connection once all that was taken is answered."""
        self._ending = ending
        return Next.PAUSE if self._objects.pending else self._end(socket.MSG_DONTWAIT)

    def _end(self, flags: int = 0) -> Next:
        """Send the last frames; linger where the client may still send."""
        if not self.is_over:
            self._put(*self._ending or ())
        self._ending = ()
        if not self._flush(flags):
            return Next.THREAD
        return Next.LINGER if self._lingers and not self._is_lost else Next.CLOSE

    # -- sending --

    def _reply(self, replies: Sequence[Reply], waits: bool) -> None:
        """Send replies; called in the order of the objects, by one thread at a time."""
        for reply in replies:
            if reply.opcode == OP_CLOSE:
                self._put(*self._breaking_frames(CLOSE_FAILED, reply.data.decode("utf-8")))
                self._lingers = self.is_over = True
            else:
                self._put(frame_head(reply.opcode, len(reply.data)), reply.data)
        if waits:
            self._flush()
        else:
            self._size += sum(len(reply.data) for reply in replies)
            self.served += 1
            self.server.turn += 1

    def _go_on(self) -> None:
        """Read on after a pause, now that replies have left, or end."""
        with self._lock:
            goes_on = self._is_paused and not self._must_pause
            self._is_paused = self._is_paused and not goes_on
        if goes_on:
            self.server.settle(self, Next.THREAD)
        elif self.is_over:
            self.server.sweep_soon()

    def _put(self, *parts: bytes) -> None:
        """Keep parts to be sent."""
        with self._lock:
            self._parts += parts

    def _pong(self, *parts: bytes) -> None:
        """Send a pong, if the client takes it without waiting.

        While much is kept for a client that does not read, a pong takes the place of the one before
        (RFC 6455, 5.5.3).
        """
        with self._lock:
            is_full = len(self._parts) > BATCH_LIMIT_PARTS
            is_in_vain = is_full and bytes(self._parts[-2][:1]) == parts[0][:1]
            self._parts[len(self._parts) - 2 * is_in_vain:] = parts
        self._flush(socket.MSG_DONTWAIT)

    def _flush(self, flags: int = 0) -> bool:
        """Send what is kept; return False if something is left because of the flags."""
        while self._parts and self._sending.acquire(blocking=not flags):
            with self._lock:
                parts, self._parts, self._size = self._parts, [], 0
            try:
                rest = self._send(parts, flags)
                with self._lock:
                    self._parts[:0] = rest
            finally:
                self._sending.release()
            if rest:
                break
        return not self._parts

    def _send(self, parts: Sequence[Any], flags: int) -> Sequence[Any]:
        """Send parts and return what the client does not take without waiting."""
        try:
            while parts and not self._is_lost:
                parts = send_some(self.socket, parts, flags)
            return ()
        except OSError as error:
            if flags and isinstance(error, BlockingIOError):
                return parts
            logger.debug("a WebSocket connection broke off: %s", error)
            self._is_lost = self.is_over = True
            attempt(self.socket.shutdown, socket.SHUT_RDWR)  # wakes whoever reads
            return ()


# == 16. Server ==
# A listening socket, its connections of both protocols, and a pool of threads. One thread leads: it
# waits for all connections together and serves what is quick where it stands. What would wait, the
# pool serves.


class ThreadPool:
    """Threads that are made as needed, up to a limit, and kept until the process ends.

    A job is a function and its argument; it must not raise.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: queue.SimpleQueue[Tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._is_short = False  # whether the system had no other thread when one was asked for
        self.busy = 0  # jobs that are begun or wait

    def submit(self, function: Callable[[Any], None], argument: Any) -> None:
        """Take a job; RuntimeError where there is no thread at all and none can be started."""
        with self._lock:
            if self._threads < min(self.busy + 1, self._limit):
                self._start_thread()
            self.busy += 1
            self._jobs.put((function, argument))

    def _start_thread(self) -> None:
        """Start another thread; if the system has none left, the others do its work."""
        thread = threading.Thread(target=self._serve, name="etl", daemon=True)
        error = attempt(thread.start).error
        if error is None:
            self._threads += 1
        elif not self._is_short:
            logger.error("%d threads serve connections, and another cannot be started: %s",
                         self._threads, error)
        self._is_short = error is not None
        if error is not None and not self._threads:
            raise error

    def _serve(self) -> None:
        """Do one job after the other, forever."""
        while True:
            error = attempt(*self._jobs.get()).error
            if error is not None:
                logger.error("a thread failed", exc_info=error)
            del error  # it may hold large objects
            with self._lock:
                self.busy -= 1


class Waker:
    """Wakes the thread that waits for `readable`, from other threads and by signals.

    The interpreter runs handlers on the main thread alone, which may wait for a lock just then and
    not hear of a signal that another thread has taken. So the signal's number goes down the pipe
    that is waited for.
    """

    def __init__(self) -> None:
        self.readable, self._writable = socket.socketpair()
        self.readable.setblocking(False)
        self._writable.setblocking(False)
        self.signals: FrozenSet[int] = frozenset()  # none, once they are no business of this one
        self._forking = threading.local()  # the signals that a thread had masked before it forked

    def wake(self) -> None:
        """Wake the thread."""
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            self._writable.send(b"\0")

    def wake_on(self, signals: Iterable[int], handle: Callable[[], None]) -> None:
        """Have signals wake the thread, and be handled. Call it on the main thread."""
        self.signals = frozenset(signals)
        signal.set_wakeup_fd(self._writable.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda *_: handle())
        os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork,
                            after_in_child=self._leave)

    # What a process gets that the class has forked is for that, from its first moment on: signals
    # wait until it has let go.

    def _before_fork(self) -> None:
        # before a handler of the class can raise
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _leave(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in self.signals:
            signal.signal(number, signal.SIG_DFL)
        self._after_fork()

    def take(self) -> bool:
        """Take the wake-ups; return True if a signal was among them."""
        try:
            came = self.readable.recv(READ_BYTES)
        except BlockingIOError:  # a thread that led before was faster
            return False
        return bool(self.signals.intersection(came))  # users have alarms, which come here too


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serve the connections of a listening socket; idle ones hold no thread.

    The thread of `serve_forever` leads: it selects over the listener and all connections, and
    serves them by `attend`. A connection that would have to wait goes to a thread of the pool,
    which serves it by `work` and registers it again. The leader cannot know which calls of the
    class are quick, so a deputy watches it: where one thing holds it up for `LEAD_SECONDS`, the
    deputy leads, calling no class, until the leader is back.

    Where the class must be called on the main thread, that one leads, and makes the calls of other
    threads in between.
    """

    def __init__(self, listener: socket.socket, service: Service,
                 main_thread: Optional[MainThread] = None) -> None:
        socketserver.BaseServer.__init__(self, listener.getsockname()[:2], cast(Any, None))
        self.service = service
        self.application: Any = None  # a WSGIApplication, if the class has one
        # Whether the pod stops: what has begun to come is answered, and nothing more.
        self.is_draining = False
        self.is_late = False  # whether clients that still send are not waited for any more
        self.connections: Set[Connection] = set()
        self._listener: Optional[socket.socket] = listener
        self._main = main_thread
        self._pace = Pace()
        self._pool = ThreadPool(THREAD_LIMIT)
        self.submit = self._pool.submit
        self._share = Current.share or Share.allot(1)[0]
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._patience = SWEEP_SECONDS  # for something to do, before the leader looks at the time
        self._next_sweep = 0.0
        self._drain_began = 0.0
        self._is_busy = threading.Event()  # whether the leader has something to do
        self._has_ended = False  # whether `serve_forever` is done
        self._lock = threading.Lock()  # of the selector and of the three below:
        self._term = 0  # goes up with each change of the leader
        self._is_in_turn = False  # whether the leader does something that may take long
        self._current: Optional[Connection] = None  # what it serves
        self.turn = 0  # goes up with each thing that the leader does
        self.ready: Callable[[], object] = lambda: None  # called before the first request
        # ends a process whose main thread is still held up then
        self.leave: Callable[[], object] = lambda: None

    # -- the lead --

    def serve_forever(self, poll_interval: float = SWEEP_SECONDS) -> None:
        """Lead the server until `drain`, then until what has begun is answered."""
        self._publish()  # that it is there: its first connection may be the last of all workers'
        self._selector.register(self._waker.readable, selectors.EVENT_READ)
        self.ready()
        listener = cast(socket.socket, self._listener)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        main_thread = self._main_here()
        if main_thread is not None:
            main_thread.wake = self._waker.wake
        may_call = main_thread is self._main and not self.service.is_streaming
        attempt(threading.Thread(target=self._watch, name="deputy", daemon=True).start)
        while not (self._drain_began and self._is_done):
            self._lead(self._take_lead(), may_call, self._is_busy)
            while main_thread is not None and main_thread.calls:
                main_thread.make_call()
        self._has_ended = True

    def _main_here(self) -> Optional[MainThread]:
        """Return the main thread's calls if this is the thread that makes them."""
        return self._main if self._main is not None and self._main.is_here else None

    @property
    def _is_done(self) -> bool:
        """Whether the server, which drains, has drained or has no time left for that."""
        if self._listener is None and not self.connections:
            return True
        return time.monotonic() > self._drain_began + WORKER_GRACE_SECONDS

    def _take_lead(self) -> int:
        """Lead, on the thread of `serve_forever`; return the term."""
        with self._lock:
            term = self._change_leader()
        self._waker.wake()  # the deputy is to watch again
        return term

    def _change_leader(self) -> int:
        """Begin another term, under the lock; what the leader serves just now stays its own."""
        if self._current is not None:
            self._selector.unregister(self._current.socket)
        self._is_in_turn, self._current = False, None
        self._term += 1
        return self._term

    def _watch(self) -> None:
        """Be the deputy: lead whenever one thing holds the leader up."""
        while True:
            self._is_busy.wait()
            turn = self.turn
            time.sleep(LEAD_SECONDS)
            with self._lock:
                if not self._is_in_turn or self.turn != turn:
                    continue
                held = self._current
                term = self._change_leader()
                self._pace.hand_over(LEAD_SECONDS, time.monotonic())
                goes_on = held is not None and held.let_go()  # before its turn can end
            if goes_on:
                self.settle(cast(Connection, held), Next.THREAD)
            error = attempt(self._lead, term, False, threading.Event()).error
            if error is not None:
                logger.error("the deputy leader failed", exc_info=error)
            if self._drain_began and self._is_done:
                time.sleep(10 * LEAD_SECONDS)  # the leader may just be on its way
                if not self._has_ended:
                    self.leave()

    def _lead(self, term: int, may_call: bool, is_busy: threading.Event) -> None:
        """Serve what is readable, until another thread has the lead or all is over.

        The class is called only if it may be: whoever calls it must be watched, by `is_busy`.
        """
        main_thread = self._main_here()
        while self._term == term and not (self._drain_began and self._is_done):
            is_busy.clear()
            has_calls = main_thread is not None and main_thread.calls
            ready = self._selector.select(0 if has_calls else self._patience)
            is_busy.set()
            for key, _ in ready:
                if key.data and not self._serve(key.data, term, may_call):
                    return
            if main_thread is not None and main_thread.calls:
                if not self._take_turn(None, term, main_thread.make_call):
                    return
            self._look_around(ready, term)

    def _serve(self, connection: Connection, term: int, may_call: bool) -> bool:
        """Serve a readable connection and note the pace; return False if the lead is lost."""
        began = time.monotonic()
        may_call = may_call and self._pace.is_quick(began)
        has_lead = self._take_turn(connection, term, connection.attend, began, may_call)
        if connection.served and has_lead:
            now = time.monotonic()
            self._pace.note((now - began) / connection.served, now)
        connection.served = 0
        return has_lead

    def _take_turn(self, connection: Optional[Connection], term: int, serve: Callable[..., Any],
                   *args: Any) -> bool:
        """Serve a registered connection and settle it, or do what has none.

        Returns False if the lead is lost, without having done it if it was lost before.
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
        """Serve a connection and return its wish, or how it ends if that fails."""
        try:
            wish = serve(*args)
        except Exception as error:
            wish = connection.fail(error)
        if wish is Next.READ and self.is_draining and connection.dismiss():
            return Next.CLOSE
        return wish

    # -- connections --

    def _add(self, connection: socket.socket) -> None:
        """Serve a connection of HTTP."""
        made, error = attempt(HTTPConnection, connection, self)
        if error is not None:
            logger.debug("a connection was gone at once: %s", error)
            return connection.close()
        self.connections.add(cast(Connection, made))
        self._publish()
        self.settle(cast(Connection, made), Next.READ)

    def settle(self, connection: Connection, wish: Next) -> None:
        """Do with a connection what it wants; it must not be registered."""
        if wish is Next.READ:
            connection.since = time.monotonic()
            with self._lock:
                self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            if connection.is_over:
                self.sweep_soon()
        elif wish is Next.THREAD or (wish is Next.PAUSE and not connection.pause()):
            if attempt(self.process_request, connection, None).error is not None:
                self._close(connection)  # there is no thread: its client tries again
        elif wish is Next.UPGRADE:
            self._replace(connection, WebSocketConnection)
        elif wish is Next.LINGER:
            self._replace(connection, LingeringConnection)
        elif wish in (Next.CLOSE, Next.RESET):
            self._close(connection, is_reset=wish is Next.RESET)

    def _replace(self, connection: Connection, kind: Type[Connection]) -> None:
        """Go on with a connection as one of another kind."""
        connection.close()  # the supervisor hears of that before the client
        successor = kind(connection.socket, self, connection.input)
        self.connections.add(successor)
        self.connections.discard(connection)
        self.settle(successor, Next.THREAD if successor.input.ahead else Next.READ)

    def _close(self, connection: Connection, is_reset: bool = False) -> None:
        """Close a connection, by a reset if half an answer could look like a whole one."""
        connection.close()
        self.connections.discard(connection)
        self._publish()
        if is_reset:
            at_once = struct.pack("ii", True, 0)
            attempt(connection.socket.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            self.close_request(connection.socket)
        else:
            self.shutdown_request(connection.socket)
        if self.is_draining:
            self._waker.wake()  # it may have been the last

    def _publish(self) -> None:
        """Tell the other workers how many connections this one has."""
        if not self._drain_began:
            self._share.publish(len(self.connections))

    def sweep_soon(self) -> None:
        """Have the leader look at once for connections that are over."""
        self._next_sweep = 0.0
        self._waker.wake()

    def may_upgrade(self) -> bool:
        """Tell whether another connection may become one of WebSocket."""
        count = sum(isinstance(each, WebSocketConnection) for each in list(self.connections))
        return not self.is_draining and count < WEBSOCKET_LIMIT

    def is_crowded(self) -> bool:
        """Tell whether half of the threads are busy: then no connection is to have several."""
        return self._pool.busy > THREAD_LIMIT // 2

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread of the pool go on with a connection."""
        self.submit(self._work, request)

    def _work(self, connection: Connection) -> None:
        self.settle(connection, self._wish_after(connection, connection.work))

    # -- what the leader does beside serving --

    def _look_around(self, events: Sequence[Tuple[selectors.SelectorKey, int]], term: int) -> None:
        """See to signals and wake-ups, to new connections, and to those whose time is over."""
        ready = [key.fileobj for key, _ in events if key.data is None]
        with self._lock:
            if self._term != term:  # what has come is for the thread that leads by now
                return
            if self._waker.readable in ready and self._waker.take():
                self.is_draining = True
        if self.is_draining and not self._drain_began:
            self._begin_drain(term)
        elif self._listener in ready:
            self._accept_some(EXCESS_LIMIT if len(events) > CROWD_LIMIT // 2 else 0, term)
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + self._patience
            self._sweep(now, term)

    def _sweep(self, now: float, term: int) -> None:
        """End connections whose time is over; in a drain all that are idle."""
        late = self._drain_began + WEBSOCKET_DRAIN_SECONDS
        if self.is_draining and not self.is_late and now > late:
            self.is_late = True
            for connection in list(self.connections):
                if isinstance(connection, WebSocketConnection):  # whoever reads finds the end
                    attempt(connection.socket.shutdown, socket.SHUT_RD)
        for connection in self._registered():
            if connection.is_expired(now):
                has_lead = self._take_turn(connection, term, connection.expire)
            elif self.is_draining:
                has_lead = self._take_turn(connection, term, connection.attend, now, False)
            else:
                continue
            if not has_lead:
                self._next_sweep = 0.0  # the thread that leads by now is to look at the rest
                return
        self.service.close_idle()

    def _registered(self) -> List[Connection]:
        with self._lock:
            return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _accept_some(self, excess: int, term: int) -> None:
        """Accept one connection, and more while no other worker has fewer by `excess`."""
        if self._share.excess > excess:
            time.sleep(YIELD_SECONDS)
        for _ in range(CROWD_LIMIT):
            if not self._accept(term):
                return
            if self._share.excess > excess:
                return

    def _accept(self, term: int) -> bool:
        """Accept a connection; False if there was none, or no room for one."""
        listener = self._listener
        if listener is None:  # another thread, which leads by now, has begun to drain
            return False
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # another worker was faster
            return False
        except OSError as error:
            if error.errno == errno.EBADF:  # closed just now, as above
                return False
            logger.error("a connection could not be accepted: %s", error)
            if error.errno in OUT_OF_RESOURCES:  # otherwise the client is gone already
                self._make_room(term)
            return False
        self._add(connection)
        return True

    def _make_room(self, term: int) -> None:
        """Close some of the connections that have been idle longest, or wait a moment."""
        def retire(connection: Connection) -> Next:  # unless a request has come meanwhile
            return Next.CLOSE if connection.dismiss() else Next.READ

        idle = sorted((connection for connection in self._registered()
                       if isinstance(connection, HTTPConnection) and connection.dismiss()),
                      key=lambda connection: connection.since)
        for connection in idle[:min(CROWD_LIMIT, len(idle) // 4 + 1)]:
            self._take_turn(connection, term, retire, connection)
        if not idle:
            time.sleep(0.05)

    # -- the end --

    def drain_on(self, signals: Iterable[int]) -> None:
        """Have signals drain the server. Call it on the main thread."""
        self._waker.wake_on(signals, self.drain)

    def drain(self) -> None:
        """Stop accepting; connections finish what has begun to come, idle ones close."""
        self.is_draining = True
        self._waker.wake()

    def server_close(self) -> None:
        """Close the listening socket."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _begin_drain(self, term: int) -> None:
        """Accept who was let in by the system and not yet by us, and nobody else."""
        with self._lock:
            if self._drain_began:  # a thread that led before was faster
                return
            self._drain_began = time.monotonic()
        self._patience, self._next_sweep = DRAIN_LOOK_SECONDS, 0.0
        self._share.leave()
        if self._listener is not None:
            for _ in range(BACKLOG):
                if not self._accept(term):
                    break
            with self._lock:
                self._selector.unregister(self._listener)
            self.server_close()
        self._waker.wake()


# == 17. Frameworks ==
# Classes with an application of FastAPI or Flask: uvicorn serves the one, and the built-in server
# the other. Nothing in here runs, nor is anything imported, for other classes.


class PieceInput(ConnectionInput):
    """A request's body as another server has received it; `receive` returns b"" at its end."""

    def __init__(self, receive: Callable[[], bytes]) -> None:
        super().__init__(cast(socket.socket, None))
        self._next_piece = receive

    def readinto(self, buffer: Any, flags: int = 0) -> int:
        """Read some bytes of what is here, or of the next piece."""
        if not self.ahead and not self.fill():
            return 0
        return super().readinto(buffer, flags)

    def fill(self, flags: int = 0) -> bool:
        """Wait for the next piece; the server's exceptions come as OSError, as readers expect."""
        piece, error = attempt(self._next_piece)
        if error is not None:
            raise error if isinstance(error, OSError) else OSError(describe(error)) from None
        return self._add(cast(bytes, piece))


def request_of_app(method: str, path: str, raw_path: str, query: str,
                   pipeline: str) -> ETLRequest:
    """Tell what a request asks for, by its path as it came, or another that the class gives it."""
    if decode_escapes(raw_path)[1:] != path:
        raw_path = "/" + quote(path)
    return ETLRequest.parse(method, f"{raw_path}?{query}" if query else raw_path, pipeline)


def body_of_app(length: Optional[str], receive: Callable[[], bytes]) -> MessageBody:
    """Make the body of a request that another server has parsed; `receive` may tell its end."""
    source = PieceInput(receive)
    return BoundedReader(source, int(length)) if length else ClosingReader(source, OF_REQUEST)


def prepare_framework(name: str, serves: bool, may_install: bool) -> None:
    """Install what is missing of a framework, and import it here: forked workers share it."""
    framework = FRAMEWORKS[name]
    wanted = list(framework.modules.items())[:None if serves else 1]
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
            failure = PackageError(
                f"the class needs {module}, which cannot be imported: {describe(problem)}")
            raise with_story(failure, module, problem)


def call_user(what: str, function: Callable[[], T]) -> T:
    """Call the user's code at start-up; ClassError, which has its traceback, where it fails."""
    value, error = attempt(function)
    if isinstance(error, StartupError):
        raise error
    if error is not None:
        kind = PackageError if package_of(error) else ClassError
        failure = kind(f"{what} failed: {describe_of_user(error, has_type=True)}")
        raise with_story(failure, what, error)
    return cast(T, value)


def report_failure(error: StartupError) -> None:
    """Tell the supervisor why this worker ends."""
    if isinstance(error, FrameworkNeeded):
        return report(b"%b%b %d" % (REPORT_NEEDS, error.framework.encode(), error.serves))
    # here: a report is cut, perhaps within a secret
    redact = (Current.settings or Settings()).redact
    for line in redact(error.story).splitlines():
        report(REPORT_STORY + line.encode("utf-8", "replace"))
    reason = redact(" ".join(str(error).split()))
    report(b"%b%d %b" % (REPORT_FAILED, error.exit, reason.encode("utf-8", "replace")))


# -- FastAPI, by uvicorn --


class CallingThread(MainThread):
    """The main thread of a worker whose server another thread runs: it makes calls until `end`."""

    def __init__(self) -> None:
        super().__init__()
        self._bell = threading.Semaphore(0)
        self.wake = self._bell.release
        self._is_over = False
        self.has_ended = threading.Event()

    def work(self) -> None:
        """Make the calls that are handed over."""
        while not self._is_over:
            self._bell.acquire()
            while self.calls:
                self.make_call()
        self.has_ended.set()

    def end(self) -> None:
        """Let `work` return once it has made the calls before this one."""
        self.put(functools.partial(setattr, self, "_is_over", True))


@functools.lru_cache(maxsize=1)
def piece_response_class() -> Any:
    """Make the class of responses in pieces: Starlette's own would read the request meanwhile."""
    import asyncio

    from starlette.responses import Response

    class PieceResponse(Response):  # type: ignore[misc]
        """An answer in pieces; where it fails, no end is sent: ASGIFront cuts the connection."""

        def __init__(self, answer: Answer, name: str, threads: Any) -> None:
            super().__init__(None, answer.status)
            del self.headers["content-length"]
            self._answer = answer
            self._name = name
            self._call = functools.partial(asyncio.get_running_loop().run_in_executor, threads)

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            """Send the answer; the body of the request may still be read meanwhile."""
            pieces = iter(()) if isinstance(self._answer.body, bytes) else self._answer.body
            try:
                await send({"type": "http.response.start", "status": self.status_code,
                            "headers": self.raw_headers})
                piece = None
                while piece != b"":
                    piece, error = await self._call(attempt, next, pieces, b"")
                    if error is not None:
                        log_cut(self._name, error)
                        raise AnswerCut
                    await send({"type": "http.response.body", "body": piece,
                                "more_body": piece != b""})
            finally:
                await self._call(attempt, self._answer.__exit__)
            if self.background is not None:
                await self.background()

    return PieceResponse


class StarletteAnswers:
    """Answer an application's requests for objects, on threads of a pool."""

    def __init__(self, service: Service) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._service = service
        self._threads = ThreadPoolExecutor(THREAD_LIMIT, "etl")

    async def __call__(self, path: str, request: Any) -> Any:
        """Answer one request; on the application's loop."""
        import asyncio

        loop, scope, fields = asyncio.get_running_loop(), request.scope, request.headers
        raw_path = (scope.get("raw_path") or quote(scope["path"]).encode()).decode("latin-1")
        query, pipeline = scope["query_string"].decode("latin-1"), fields.getlist(HEADER_NODE_URL)
        try:
            parsed = request_of_app(request.method, path, raw_path, query, ", ".join(pipeline))
            if parsed.is_message:  # no handshake, which does not come here
                upgrade_answer({})
        except RequestError as error:
            return self._response(error_answer(error.status, str(error), error.headers), path)
        pieces, count = request.stream(), 0
        # other middleware than Starlette's may have put another body into its place
        came, receives = scope.get("etl.request"), request.receive
        is_as_it_came = came is not None and (
            getattr(receives, "__self__", None) is came
            or getattr(receives, "__module__", "") == "starlette.middleware.base")

        async def receive() -> bytes:
            async for piece in pieces:
                if piece:
                    return cast(bytes, piece)
            return b""

        def take() -> bytes:
            """Wait for the next piece, b"" at the end; on another thread."""
            nonlocal count
            future = asyncio.run_coroutine_threadsafe(receive(), loop)
            piece = future.result(BODY_PAUSE_SECONDS)
            count += len(piece)
            if not piece and is_as_it_came and count < came.count:
                raise OSError("the application has read some of it")
            return piece

        body = body_of_app(fields.get("content-length"), take)
        answer = await loop.run_in_executor(self._threads, self._service.answer, parsed, body)
        return self._response(answer, parsed.name)

    def _response(self, answer: Answer, name: str) -> Any:
        """Make the response of an answer."""
        from starlette.responses import Response

        if isinstance(answer.body, bytes) and not answer.is_open:
            response = Response(answer.body, answer.status)
        else:
            response = piece_response_class()(answer, name, self._threads)
        for field, value in answer.headers:
            response.headers[field] = UNPRINTABLE.sub("?", value)
        return response


class ASGISession:
    """One connection of AIStore's protocol over a server of ASGI, on that server's loop."""

    def __init__(self, service: Service, pool: ThreadPool, receive: Any, send: Any) -> None:
        import asyncio

        self._service = service
        self._receive = receive
        self._send = send
        # uvicorn's, where nothing stands between: ASGI itself cannot send half a message
        self._transport = getattr(getattr(send, "__self__", None), "transport", None)
        self._loop = asyncio.get_running_loop()
        self._has_changed = asyncio.Event()
        told = functools.partial(attempt, self._loop.call_soon_threadsafe, self._has_changed.set)
        self._objects = ObjectExchange(service, self._reply, pool.submit, told)
        self._since = 0.0  # when the last message came
        self._is_over = False

    async def serve(self) -> None:
        """Take messages until the connection ends."""
        await self._receive()
        await self._send({"type": "websocket.accept"})
        report(REPORT_OPENED)
        try:
            message = await self._receive()
            while message["type"] == "websocket.receive":
                self._since = time.monotonic()
                await self._take(message.get("bytes") or (message.get("text") or "").encode())
                message = await self._receive()
        finally:
            self._is_over = True
            report(REPORT_CLOSED)

    @property
    def is_idle(self) -> bool:
        """Whether all that has come is answered, and nothing has come for a moment."""
        is_done = self._objects.is_between_objects and not self._objects.pending
        return is_done and not self._is_over and time.monotonic() - self._since > DRAIN_LOOK_SECONDS

    async def close(self) -> None:
        """Say goodbye, as far as the client reads."""
        self._is_over = True
        await self._send({"type": "websocket.close", "code": CLOSE_GOING_AWAY})

    async def fail(self, reason: str) -> None:
        """End the connection so that a target takes it for the failure of an object."""
        if self._is_over:
            return
        self._is_over = True
        report(REPORT_BROKEN + " ".join(reason.split()).encode("utf-8", "replace"))
        if self._transport is None:
            await self._send({"type": "websocket.close", "code": CLOSE_FAILED,
                              "reason": cut_reason(reason)})
        elif not self._transport.is_closing():
            beginning = frame_head(OP_BINARY, 0, is_last=False)
            self._transport.write(beginning + close_frame(CLOSE_FAILED, reason))
            # at once a client that still sends might not see it
            self._loop.call_later(DRAIN_SECONDS, self._transport.close)

    async def _take(self, data: bytes) -> None:
        """Take one message, and wait until another one may be."""
        error = None
        if not self._is_over:  # nothing may be transformed on the loop's thread
            error = attempt(self._objects.take, ReceivedObject(data), False).error
        while self._objects.is_full or (error is not None and self._objects.pending):
            self._has_changed.clear()
            if self._objects.pending:
                await self._has_changed.wait()
        if error is not None:
            reason = self._service.settings.redact(describe(error))
            logger.error("%s: %s; its WebSocket connection is closed", self._objects.next_name,
                         reason)
            await self.fail(reason)

    def _reply(self, replies: Sequence[Reply], waits: bool) -> None:
        """Send replies, and wait for that; on a thread of the pool."""
        import asyncio

        for reply in replies:
            sending = self._send_reply(reply)
            future, error = attempt(asyncio.run_coroutine_threadsafe, sending, self._loop)
            if error is not None:  # the loop has ended
                return sending.close()
            attempt(future.result)  # the client may be gone

    async def _send_reply(self, reply: Reply) -> None:
        if reply.opcode == OP_CLOSE:
            await self.fail(reply.data.decode("utf-8"))
        elif reply.opcode == OP_TEXT and not self._is_over:
            await self._send({"type": "websocket.send", "text": reply.data.decode()})
        elif not self._is_over:
            await self._send({"type": "websocket.send", "bytes": reply.data})


class ASGIMessages:
    """AIStore's protocol over a server of ASGI, which alone bounds how large a message may be."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pool = ThreadPool(THREAD_LIMIT)
        self._sessions: Set[ASGISession] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection to its end."""
        if len(self._sessions) >= WEBSOCKET_LIMIT:
            await send({"type": "websocket.close"})
            return
        session = ASGISession(self._service, self._pool, receive, send)
        self._sessions.add(session)
        try:
            await session.serve()
        finally:
            self._sessions.remove(session)

    async def drain(self) -> None:
        """End all connections once what has come is answered, or there is no more time."""
        import asyncio

        deadline = time.monotonic() + WEBSOCKET_DRAIN_SECONDS
        while self._sessions and time.monotonic() < deadline:
            idle = [session.close() for session in self._sessions if session.is_idle]
            asyncio.gather(*idle, return_exceptions=True)  # not waited for: a client may not read
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        for session in tuple(self._sessions):
            await session.fail("the pod is stopping")


class FailureMark:
    """Middleware that marks an answer which fails after its beginning.

    It stands below each middleware of the class: Starlette's BaseHTTPMiddleware ends an answer
    although what is below it has failed.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass all on."""
        is_half = False

        async def send_on(message: Any) -> None:
            nonlocal is_half
            is_half = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
            is_half = False
        finally:
            if is_half and "etl.request" in scope:
                scope["etl.request"].has_failed = True


def add_fastapi_routes(server: FastAPIServer, service: Service) -> ASGIMessages:
    """Let a class's application answer requests for objects, where none of its own routes does."""
    from starlette.middleware import Middleware
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute

    async def health(_: Any) -> Any:
        return Response(b"Running", media_type="text/plain")

    async def answer(request: Any) -> Any:
        path, is_get = request.path_params.get("path", ""), request.method == "GET"
        return await server._handle_request(path, request, is_get)

    def route(path: str, function: Any, *methods: str) -> Any:
        return Route(path, function, methods=list(methods), include_in_schema=False)

    messages = ASGIMessages(service)
    vars(server)[ANSWER] = StarletteAnswers(service)
    objects = route("/{path:path}", answer, "GET", "PUT")
    objects.path_regex = re.compile(r"(?s)/(?P<path>.*)\Z")  # its own knows no line feed
    server.app.router.routes.extend([
        WebSocketRoute("/ws", messages), route("/health", health, "GET"),
        route("/download", answer, "POST"), objects])
    layers = [(each, Middleware(FailureMark)) for each in server.app.user_middleware]
    server.app.user_middleware[:] = itertools.chain(*layers)
    return messages


class ASGIRequest:
    """The messages of one request, between uvicorn and the application."""

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["etl.request"] = self
        self.count = 0  # bytes of the body that have come
        self.status = self.size = 0  # of the answer, as far as it was sent
        self.has_failed = False  # whether its answer has begun and cannot become whole
        self._receive = receive
        self._send = send
        self._cycle = send.__self__  # uvicorn's own of the request

    async def receive(self) -> Any:
        """Receive the next message, and count the bytes of the body."""
        message = await self._receive()
        self.count += len(message.get("body", b""))
        return message

    async def send(self, message: Any) -> None:
        """Send a message; AnswerCut where the client has left, or the answer has failed."""
        self.status = message.get("status", self.status)
        self.size += len(message.get("body", b""))
        if not self.has_failed:
            await self._send(message)
        if self.has_failed or self._cycle.disconnected:
            raise AnswerCut

    async def abort(self) -> None:
        """End the connection, so that half an answer is not taken for a whole one."""
        import asyncio

        self._cycle.transport.abort()
        await asyncio.sleep(0)  # in which uvicorn hears of it

    @property
    def is_gone(self) -> bool:
        """Whether the client has left."""
        return bool(self._cycle.disconnected or self._cycle.transport.is_closing())


def has_body(fields: Mapping[bytes, bytes]) -> bool:
    """Tell from the fields of a request whether it has a body."""
    return b"transfer-encoding" in fields or fields.get(b"content-length", b"0") != b"0"


async def outcome_of(call: Any) -> Outcome:
    """Await what may raise anything, as `attempt` calls it."""
    try:
        return Outcome(await call)
    except BaseException as error:
        return Outcome(error=error)


class ASGIFront:
    """The outermost application: it serves `/health` and `/ws`, and the class's own the rest."""

    def __init__(self, app: Any, messages: ASGIMessages) -> None:
        self._app = app
        self._messages = messages
        self.begin: Callable[[], None] = lambda: None  # called once the application has started up
        self.failure: Optional[BaseException] = None  # of its start-up or shutdown

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a connection or one request, or the application's life."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "websocket":
            await (self._messages if scope["path"] == "/ws" else self._app)(scope, receive, send)
        else:
            await self._serve(ASGIRequest(scope, receive, send), scope)

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application's start-up and shutdown; whoever runs us tells what fails there."""
        async def send_on(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.begin()
            elif message["type"].endswith(".failed"):
                self.failure = StartupError(message.get("message", ""))
                message = {"type": message["type"]}
            await send(message)

        error = (await outcome_of(self._app(scope, receive, send_on))).error
        if error is not None:
            self.failure = error
            raise error

    @staticmethod
    def _own_answer(scope: Any) -> Tuple[int, bytes]:
        """Answer a health probe, and a request whose body uvicorn would not read rightly."""
        fields = dict(scope["headers"])
        coding = fields.get(b"transfer-encoding", b"").lower()
        offers = b"upgrade" in fields and b"upgrade" in fields.get(b"connection", b"").lower()
        if (scope["path"], scope["method"]) == ("/health", "GET"):
            return 200, b"Running"
        if coding and (coding != b"chunked" or scope["http_version"] == "1.0"):
            return 501, b"the Transfer-Encoding is not known here"
        if offers and has_body(fields):
            return 400, b"another protocol cannot be offered with a body"
        return 0, b""

    async def _serve(self, request: ASGIRequest, scope: Any) -> None:
        """Answer one request; an answer that has failed is never finished."""
        import asyncio

        status, text = self._own_answer(scope)
        began = time.monotonic()
        answering = (self._answer(request, status, text) if status
                     else self._app(scope, request.receive, request.send))
        error = (await outcome_of(answering)).error
        log_request(scope["method"], scope["path"], request.status, request.size, began)
        # uvloop's for a connection that is closed is a RuntimeError
        is_of_client = isinstance(error, (OSError, RuntimeError)) and request.is_gone
        if isinstance(error, asyncio.CancelledError):
            logger.error("%s: the answer was cut: the pod is stopping", scope["path"])
        elif error is not None and not (isinstance(error, AnswerCut) or is_of_client):
            log_user_error(scope["path"], error)
        if isinstance(error, (AnswerCut, asyncio.CancelledError)):
            await request.abort()

    @staticmethod
    async def _answer(request: ASGIRequest, status: int, body: bytes) -> None:
        fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        if status >= 400:
            fields.append((b"connection", b"close"))
        await request.send({"type": "http.response.start", "status": status, "headers": fields})
        await request.send({"type": "http.response.body", "body": body})


def protocol_on(base: Any) -> Any:
    """Make a protocol of uvicorn's that is right in two things that its own is not."""
    class Protocol(base):  # type: ignore[misc]
        """One connection: a client that has ended its side is answered, and bodies are read."""

        def _should_upgrade(self) -> bool:
            return bool(super()._should_upgrade()) and not has_body(dict(self.headers))

        def eof_received(self) -> Optional[bool]:
            """Return whether the connection is to stay open, for an answer to a whole request."""
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                return cast(Optional[bool], super().eof_received())
            self.cycle.keep_alive = False
            return True

    return Protocol


class UvicornServer:
    """Serve a class's application by uvicorn, in a thread; that of `serve_forever` makes its calls.

    What uvicorn has no setting for is not bounded: how long a client may take for the head of a
    request.
    """

    def __init__(self, listener: socket.socket, server: FastAPIServer, service: Service,
                 main_thread: CallingThread) -> None:
        import uvicorn

        self._name = type(server).__name__
        self._main = main_thread
        self._messages = add_fastapi_routes(server, service)
        self._front = ASGIFront(server.app, self._messages)
        self._listener = listener
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; its connections inherit it
            milliseconds = int(RESULT_UNREAD_SECONDS * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._waker = Waker()
        self._config = uvicorn.Config(
            self._front, lifespan="on", log_config=None, access_log=False, proxy_headers=False,
            server_header=False, backlog=BACKLOG, timeout_keep_alive=int(IDLE_SECONDS),
            timeout_graceful_shutdown=int(WORKER_GRACE_SECONDS),
            h11_max_incomplete_event_size=HEAD_LIMIT_BYTES, ws_per_message_deflate=False,
            ws_max_size=memory_limit(), ws_max_queue=1, ws_ping_interval=None,
            ws_ping_timeout=None)
        self._config.load()
        self._config.http_protocol_class = protocol_on(self._config.http_protocol_class)
        self._uvicorn = uvicorn.Server(self._config)
        self._has_begun = False
        self._drain_began = 0.0
        self.ready: Callable[[], object] = lambda: None  # called before the first request
        # ends a process that has not begun to serve, or whose main thread is still held up
        self.leave: Callable[[], object] = lambda: None
        # its ordinary life is worth a line at DEBUG alone
        is_debug = logger.level <= logging.DEBUG
        level = logger.level if is_debug else max(logging.WARNING, logger.level)
        logging.getLogger("uvicorn").setLevel(level)

    def serve_forever(self) -> None:
        """Serve until `drain`, and then what has begun.

        ClassError where the application's start-up or shutdown fails.
        """
        import asyncio

        failures: List[Optional[BaseException]] = []

        def begin() -> None:
            asyncio.get_running_loop().add_reader(self._waker.readable, self._wake_up)
            self.ready()
            self._has_begun = True

        def serve() -> None:
            failures.append(attempt(self._uvicorn.run, [self._listener]).error)
            # also where it failed: a worker that accepts nothing must end, to be replaced
            self._main.end()
            if self._drain_began and not self._main.has_ended.wait(10 * LEAD_SECONDS):
                self.leave()

        def end() -> None:
            failure = self._front.failure or failures[0]
            if failure is not None:
                raise failure

        self._front.begin = begin
        threading.Thread(target=serve, name="uvicorn", daemon=True).start()
        self._main.work()
        call_user(f"{self._name}'s {'shutdown' if self._has_begun else 'start-up'}", end)

    def drain_on(self, signals: Iterable[int]) -> None:
        """Have signals drain the server. Call it on the main thread."""
        self._waker.wake_on(signals, self.drain)

    def drain(self) -> None:
        """Stop accepting; what has begun is answered, and idle connections close."""
        if not self._has_begun:  # the start-up may take long
            self.leave()
        self._waker.wake()

    def _wake_up(self) -> None:
        """Begin to drain; on uvicorn's loop, perhaps before the signal's handler has run."""
        import asyncio

        self._waker.take()
        if not self._drain_began:
            self._drain_began = time.monotonic()
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        import asyncio

        while not self._uvicorn.started:
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        for server in self._uvicorn.servers:
            server.close()
        await self._messages.drain()
        seconds = self._drain_began + WORKER_GRACE_SECONDS - time.monotonic()
        self._config.timeout_graceful_shutdown = max(1, int(seconds))
        self._uvicorn.should_exit = True


# -- Flask, by WSGI --


class WSGIResponse:
    """What a WSGI application makes of one request (PEP 3333)."""

    def __init__(self) -> None:
        self.status = 0
        self.fields: List[Tuple[str, str]] = []
        self.size: Optional[int] = None
        self._written: List[bytes] = []
        self._count = 0  # bytes that were yielded

    def start(self, status: str, fields: Sequence[Tuple[str, str]], exc_info: Any = None) -> Any:
        """Be `start_response`; the function that it returns takes what comes before the pieces."""
        if exc_info and self._count:
            raise exc_info[1].with_traceback(exc_info[2])
        if (self.status and not exc_info) or not "200" <= status[:3] <= "599":
            raise AssertionError(f"start_response({status!r}) is out of place")
        self.status, self.fields = int(status[:3]), list(fields)
        lengths = [int(value) for name, value in fields if name.lower() == "content-length"]
        self.size = lengths[0] if lengths else None
        return self._written.append

    def pieces(self, application: Any, environ: Dict[str, Any],
               body: MessageBody) -> Iterator[bytes]:
        """Call the application, and yield its output; raise where that or the body is not whole."""
        output = application(environ, self.start)
        try:
            for piece in itertools.chain(output, (b"",)):
                written, self._written[:] = [*self._written, piece], []
                data = b"".join(as_bytes(each, "the application yielded") for each in written)
                if not self.status:
                    raise AssertionError("the application has not called start_response()")
                self._count += len(data)
                if self.size is not None and self._count > self.size and self._has_body(environ):
                    raise ValueError(
                        f"the answer has more bytes than its Content-Length, {self.size}")
                if data:
                    yield data
            if self.status < 400:
                body.raise_failure()
            if self.size not in (None, self._count) and self._has_body(environ):
                raise ValueError(
                    f"the answer has {self._count} bytes, and its Content-Length is {self.size}")
        finally:
            error = attempt(getattr(output, "close", lambda: None)).error
            if error is not None:  # too late for the answer
                log_user_error(environ["RAW_URI"], error)

    def _has_body(self, environ: Mapping[str, Any]) -> bool:
        return environ["REQUEST_METHOD"] != "HEAD" and self.status not in BODILESS


OF_SERVER = frozenset((  # the fields that an application cannot set
    "connection", "content-length", "date", "keep-alive", "te", "trailer", "transfer-encoding",
    "upgrade"))


class WSGIApplication:
    """A class's WSGI application, which answers requests of the built-in server on its threads.

    Health probes and `/ws` are the server's, unless the class overrides `_health`.
    """

    def __init__(self, server: FlaskServer, service: Service) -> None:
        self._server = server
        self._service = service
        self._answers_health = type(server)._health is not FlaskServer._health

    def asked(self, head: Head,
              connection: socket.socket) -> Optional[Callable[[MessageBody], Answer]]:
        """Return what answers a request, given its body; None for what is not the application's."""
        path, query = split_target(head.method, head.target)
        is_health = (head.method, path) == ("GET", "/health") and not self._answers_health
        if path == "/ws" or is_health or not path.startswith("/"):
            return None
        request = ETLRequest(head.method, path, query)
        return functools.partial(self._answer, request, head, connection)

    def _environ(self, request: ETLRequest, head: Head,
                 connection: socket.socket) -> Dict[str, Any]:
        """Describe a request, but for its body, as PEP 3333 has it."""
        host, port = connection.getsockname()[:2]
        peer = attempt(connection.getpeername).value or ("", 0)
        # a name with "_" could pass for one with "-"
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

    def _answer(self, request: ETLRequest, head: Head, connection: socket.socket,
                body: MessageBody) -> Answer:
        """Have the application answer a request, whatever happens."""
        answer, error = attempt(lambda: self._ask(self._environ(request, head, connection), body))
        return answer if error is None else self._service.answer_failure(request, error)

    def _ask(self, environ: Dict[str, Any], body: MessageBody) -> Answer:
        """Call the application; until its first piece is there, a failure is told by a status."""
        response = WSGIResponse()
        environ["wsgi.input"] = io.BufferedReader(cast(Any, body), READ_BYTES)
        environ["etl.input"] = environ["wsgi.input"]
        pieces: Any = guarded(response.pieces(self._server.app, environ, body))
        first = next(pieces, b"")
        fields = tuple((str(name), str(value)) for name, value in response.fields
                       if name.lower() not in OF_SERVER)
        if environ["REQUEST_METHOD"] == "HEAD" or response.status in BODILESS:
            pieces.close()
            return Answer(response.status, b"", fields, response.size)
        if response.size == len(first):  # it must be at its end
            first += b"".join(pieces)
            return Answer(response.status, first, fields, response.size)
        return Answer(response.status, first and chain_first(first, pieces), fields, response.size)


def body_of_flask(request: Any) -> MessageBody:
    """Return the object of a request, of which a hook of the class may have read all."""
    data = getattr(request, "_cached_data", None)
    stream: Any = request.stream if data is None else io.BytesIO(data)
    ours = request.environ.get("etl.input")
    if ours is request.environ["wsgi.input"]:  # else of another server, or of middleware
        body = cast(MessageBody, ours.raw)
        if not body.count and request.max_content_length is None:
            return body
        if body.count and (data is None or len(data) != body.count or not body.is_at_end):
            raise RequestError("the application has read some of the object, or not all")
    length = request.environ.get("CONTENT_LENGTH")
    return body_of_app(length, lambda: cast(bytes, stream.read(READ_BYTES)))


def answer_flask(service: Service, path: str) -> Any:
    """Answer an application's current request, for an object, on the thread that asks."""
    import flask

    environ = flask.request.environ
    method = environ["REQUEST_METHOD"]
    if "RAW_URI" in environ:
        raw_path, query = split_target(method, environ["RAW_URI"])
    else:
        raw_path = quote(environ["PATH_INFO"].encode("latin-1"))
        query = environ.get("QUERY_STRING", "")
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
    """Let a class's application answer requests for objects, where none of its own routes does."""
    import flask
    from werkzeug.routing import BaseConverter

    class AnyName(BaseConverter):  # type: ignore[misc]
        """Whatever AIStore calls an object: with slashes anywhere, and line feeds."""

        regex, part_isolating, weight = "(?s:.+)", False, 1000

    app, handle = server.app, server._handle_request
    if type(app).log_exception is flask.Flask.log_exception:
        app.log_exception = lambda *args: log_user_error(flask.request.path, args[-1][1])
    vars(server)[ANSWER] = functools.partial(answer_flask, service)
    # of a body that is cut, which is no failure of the application's
    app.register_error_handler(RequestError, lambda error: (str(error), error.status))
    if "etl_object" in app.view_functions:
        return
    app.url_map.converters["etl_name"] = AnyName
    app.add_url_rule("/health", "etl_health", lambda: server._health(), methods=["GET"])
    app.add_url_rule("/download", "etl_download", lambda: handle("download"), methods=["POST"])
    app.add_url_rule("/<etl_name:path>", "etl_object", lambda path: handle(path),
                     methods=["GET", "PUT"])


def make_service(server: ETLServer, settings: Settings, slots: Slots) -> Service:
    """Make what answers the requests to an instance."""
    Current.pool = Current.pool or ConnectionPool(settings)
    return Service(settings, server, Current.pool, slots)


def make_front(listener: socket.socket, server: ETLServer,
               settings: Settings) -> Union[UvicornServer, Server]:
    """Make what serves an instance on a listening socket."""
    has_app = vars(server).get(APP) is not None
    by_uvicorn = CallingThread() if has_app and isinstance(server, FastAPIServer) else None
    is_one = isinstance(server, FrameworkServer) and settings.threads in (None, 1)
    main_thread: Optional[MainThread] = by_uvicorn or (MainThread() if is_one else None)
    slots = (main_thread if main_thread and is_one
             else ThreadSlots(settings.threads or DEFAULT_THREADS))
    service = make_service(server, settings, slots)
    if by_uvicorn:
        return UvicornServer(listener, cast(FastAPIServer, server), service, by_uvicorn)
    front = Server(listener, service, main_thread)
    if has_app:
        add_flask_routes(cast(FlaskServer, server), service)
        front.application = WSGIApplication(cast(FlaskServer, server), service)
    return front


def add_routes(server: ETLServer, settings: Settings) -> None:
    """Let the application of a class that starts its own server answer requests for objects."""
    has_app = vars(server).get(APP) is not None
    if has_app and vars(server).get(ANSWER) is None:
        add = add_fastapi_routes if isinstance(server, FastAPIServer) else add_flask_routes
        add(cast(Any, server), make_service(server, settings, ThreadSlots(settings.threads or 1)))


# == 18. Workers ==
# Processes: one supervisor that forks, watches, replaces and stops; workers that construct the
# class and serve.


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """Bind a TCP socket, which does not listen yet; to all interfaces where no host is named."""
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
    """Make the URL that a listening socket is reached by."""
    host, port = listener.getsockname()[:2]
    host = "0.0.0.0" if host == "::" else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def let_in(listener: socket.socket) -> None:
    """Let connections in, and say so before any is served: the supervisor does, where there is one.

    Until now they were refused, so that a probe fails at once.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        port = listener.getsockname()[1]
        raise PortError(f"port {port} cannot be listened on: {error.strerror}") from None
    if Current.reports is None:
        logger.info("serving on %s", url_of(listener))
    report(REPORT_READY)
    gate, Current.gate = Current.gate, None
    if gate is not None:
        os.read(gate, 1)
        os.close(gate)


def serve_instance(server: ListeningServer) -> None:
    """Serve an instance until SIGTERM; what must run on the calling thread does.

    In a worker the socket is the supervisor's; elsewhere it is the instance's host and port.
    """
    settings = Current.settings or Settings()
    listener = Current.listener or bind(server.host, server.port)
    front = make_front(listener, server, settings)
    front.ready = functools.partial(let_in, listener)
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


def settle() -> None:
    """Collect garbage from now on, but none of what is here: workers share what stays as it is."""
    gc.freeze()
    gc.enable()


def reseed() -> None:
    """Give this worker random numbers of its own: it was forked with the state of all others.

    The standard library sees to its own.
    """
    seed = int.from_bytes(os.urandom(4), "big")
    for name, function in (("numpy.random", "seed"), ("torch", "manual_seed"),
                           ("tensorflow", "random.set_seed")):
        if name in sys.modules:
            found = attempt(operator.attrgetter(function), sys.modules[name])
            attempt(found.value, seed)


def run_worker(load: Callable[[], Type[ETLServer]]) -> int:
    """Load the class, if the supervisor has not, construct and serve it; return the exit code."""
    settings = Current.settings or Settings()
    try:
        etl_class = load()
        settle()
        reseed()
        name = etl_class.__name__
        server: Any = call_user(f"{name}()", etl_class)
        if not hasattr(server, "use_streaming"):
            raise ClassError(f"{name}.__init__() does not call super().__init__()")
        port = getattr(server, "port", settings.port)
        if Current.listener is None:
            add_routes(server, settings)
            if port == 8000:
                server.port = settings.port
        elif port != settings.port:
            logger.warning("%s asks for port %d, but PORT decides: %d", name, port, settings.port)
        call_user(f"{name}.start()", server.start)
        return Exit.OK
    except StartupError as error:
        report_failure(error)
        return error.exit


def flush_output() -> None:
    """Write what is printed: a fork has it too, and would write it again."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()


def started_here() -> List[int]:
    """List the processes that this program has started, directly or not, where /proc tells them.

    Less what a shell had started before it became this program, and the one process that cleans up
    after all others. In a worker's own group an orphan is found as well.
    """
    own = os.getpid()
    group = own if os.getpgrp() == own and Current.reports is not None else 0
    ticks = os.sysconf("SC_CLK_TCK")  # in a second
    table: Dict[int, Tuple[int, int, float]] = {}  # parent, group and start of each process
    for name in filter(str.isdigit, attempt(os.listdir, "/proc").value or ()):
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
    """End what the class has started."""
    pids: Set[int] = set()

    def send(number: int) -> bool:
        # an orphan may not be found once more
        pids.update(started_here() if number else ())
        while (attempt(os.waitpid, -1, os.WNOHANG).value or (0,))[0]:
            pass
        pids.intersection_update(
            [pid for pid in pids if attempt(os.kill, pid, number).error is None])
        return bool(pids)

    end_all(send, CHILDREN_SECONDS)


def finish_threads() -> None:
    """Have executors finish what they have begun, and give other threads of the class a moment."""
    for hook in reversed(getattr(threading, "_threading_atexits", ())):
        attempt(hook)
    deadline = time.monotonic() + THREADS_SECONDS
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("the class's thread %s goes on, and is not waited for", thread.name)


def start_timer(seconds: float, function: Callable[..., Any], *args: Any) -> None:
    """Have a function called after a while, if this process is still here and has a thread."""
    timer = threading.Timer(seconds, function, args)
    timer.daemon = True
    attempt(timer.start)


def say_last_line(code: int) -> NoReturn:
    """End this process at once, with its reason in the last line of the log."""
    attempt(flush_output)
    if Current.last_line:  # the class may have closed sys.stdout
        attempt(os.write, Current.output, f"{Current.last_line}\n".encode("utf-8", "replace"))
    os._exit(code)


def leave(code: int, seconds: float) -> NoReturn:
    """End this process as Python does: threads, then what is registered for the exit, children.

    All that has `seconds`, after which the process just ends; children and threads, other than
    those of executors, have less. If the main thread is held up, no thread is waited for. No module
    is taken apart: libraries complain of that, in many lines behind the reason of a failed start.
    """
    import atexit

    start_timer(seconds, say_last_line, code)
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        attempt(finish_threads)
    util = sys.modules.get("multiprocessing.util")
    end_multiprocessing = getattr(util, "_exit_function", lambda: None)
    atexit.unregister(end_multiprocessing)  # it is the last: it waits for children
    attempt(atexit._run_exitfuncs)
    attempt(flush_output)
    start_timer(CHILDREN_SECONDS, attempt, end_children)
    attempt(end_multiprocessing)
    attempt(end_children)
    say_last_line(code)


def forget_what_is_shared() -> None:
    """Let a forked worker forget what it would take from all others when it ends.

    The supervisor owns it: temporary folders of the class's module, processes that this started.
    """
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        finalizer.atexit = False
    for name, attribute in (("util", "_finalizer_registry"), ("process", "_children")):
        getattr(sys.modules.get(f"multiprocessing.{name}"), attribute, set()).clear()


def die_with(life: int) -> None:
    """End this worker, and what it has started, when the supervisor is gone: it closes a pipe."""
    os.read(life, 1)
    attempt(end_children)
    os._exit(Exit.SOFTWARE)


class Served(NamedTuple):
    """What a supervisor has to know of the class that its workers serve."""

    name: str
    base: str  # the SDK's base class
    server: str  # the framework that serves it, or "" where its construction will tell
    has_own_start: bool  # it overrides `start`: then it serves as it likes, in one process

    @classmethod
    def of(cls, etl_class: Type[ETLServer], server: str) -> Served:
        """Tell it of a class that is loaded here."""
        base = next(each.__name__ for each in etl_class.__mro__ if each in (*INTERNALS, ETLServer))
        has_own_start = getattr(etl_class, "start") is not ListeningServer.start
        return cls(etl_class.__name__, base, server, has_own_start)


@contextlib.contextmanager
def stops_put_off() -> Iterator[None]:
    """Have signals to stop wait for the end of a block: hooks of a fork would swallow them."""
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


def fork_ends() -> bool:
    """Fork a child that ends at once; return False if it does not, or not well."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of the threads, which are what is tried here
        pid, error = attempt(os.fork)
    if pid == 0:
        os._exit(0)
    deadline = time.monotonic() + TRIAL_FORK_SECONDS
    while error is None and time.monotonic() < deadline:
        # ChildProcessError where the class ignores SIGCHLD
        ended, error = attempt(os.waitpid, pid, os.WNOHANG)
        if error is None and ended[0]:
            return bool(ended[1] == 0)
        time.sleep(0.001)
    if error is None:
        os.kill(pid, signal.SIGKILL)
        attempt(os.waitpid, pid, 0)
    return False


def has_threads() -> bool:
    """Tell whether this process has other threads, also such as Python does not know of."""
    try:
        return len(os.listdir("/proc/self/task")) > 1
    except OSError:  # not Linux
        return threading.active_count() > 1


def may_be_forked() -> bool:
    """Tell whether this process can be forked now that the class is loaded.

    A fork has one thread, and locks that others held just then are held in it forever. Libraries
    for numbers know that: they end their threads before a fork, and start them again when they are
    needed. A trial shows whether all do.
    """
    if not has_threads():
        return True
    if not sys.platform.startswith("linux"):  # a system library may be in use by a thread
        return False
    with stops_put_off():
        return fork_ends() and not has_threads()


class Worker:
    """The supervisor's record of one worker process."""

    def __init__(self, pid: int, reports: int, slot: int) -> None:
        self.pid = pid
        self.reports = reports
        self.slot = slot  # its number, among those that are there: a replacement gets it again
        self.told: Set[bytes] = set()  # the kinds of reports that have come
        self.websockets = 0  # connections that are open
        self.breakage = ""  # why a failed object has closed one, the last of them
        self._rest = b""  # of what it told, a report without its end
        self._story: List[str] = []  # of its failure, in lines
        self.failure: Optional[StartupError] = None

    @property
    def is_idle(self) -> bool:
        """Whether it serves, and has never had anything to do."""
        return REPORT_READY in self.told and REPORT_BEGUN not in self.told

    def read_reports(self) -> bool:
        """Read what the worker has told so far; False if it will tell no more."""
        try:
            text = os.read(self.reports, READ_BYTES)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            self._take_report(line[:1], line[1:].decode("utf-8", "replace"))
        return bool(text)

    def _take_report(self, kind: bytes, text: str) -> None:
        """Take note of one report."""
        self.told.add(kind)
        if kind in (REPORT_OPENED, REPORT_CLOSED):
            self.websockets += 1 if kind == REPORT_OPENED else -1
        elif kind == REPORT_BROKEN:
            self.breakage = text
        elif kind == REPORT_STORY:
            self._story.append(text)
        elif kind == REPORT_NEEDS:
            name, _, serves = text.partition(" ")
            self.failure = FrameworkNeeded(name, serves == "1")
        elif kind == REPORT_FAILED:
            code, _, reason = text.partition(" ")
            self.failure = StartupError(reason)
            self.failure.exit, self.failure.story = Exit(int(code)), "\n".join(self._story)


def how_it_died(status: int) -> str:
    """Put a wait status into words."""
    if not os.WIFSIGNALED(status):
        return f"ended with exit code {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    is_killed = number == signal.SIGKILL
    return f"was ended by {name}" + (" (probably out of memory)" if is_killed else "")


class Supervisor:
    """Keep `workers` processes serving a class until SIGTERM or SIGINT.

    It owns the listening socket, forks the workers, replaces one that dies, and ends with the
    reason of one that cannot construct the class. As PID 1 of a container it reaps the orphans of
    the user's subprocesses.

    It has one thread and one place where it waits, the selector: for reports of the workers, and
    for signals, whose handlers only count. A worker that dies is replaced after a delay that
    doubles with each death in a row; a worker that has answered a request ends the row, and where
    such a one lives the pod is not given up. Workers get the class from `load`, which loads it
    where the supervisor has not. They notice its own death by a pipe whose other end closes.
    """

    def __init__(self, settings: Settings, served: Served,
                 load: Callable[[], Type[ETLServer]]) -> None:
        self._settings = settings
        self._served = served
        self._load = load
        self._listener: Optional[socket.socket] = None
        self._workers: Dict[int, Worker] = {}
        self._due: List[float] = []  # when to start a worker
        self._deaths = 0  # in a row
        self._deadline = 0.0  # for the workers' end, once they are told to
        self._failure: Optional[StartupError] = None
        self._breakage = ""  # why a WebSocket connection was lost, the last that was
        self._forsaken_at = 0.0  # when to end for that reason, where no connection is left
        self._stops = 0  # signals to stop, so far
        self._last_stop = 0.0  # when the last of them came
        self._has_begun = False  # whether all workers were ready at once
        self._selector = selectors.DefaultSelector()
        self._life = os.pipe()
        self._gate = os.pipe()  # its end is that of waiting, for workers that are ready
        self._shares = Share.allot(self._count)
        self._groups: List[int] = []  # of processes that have outlived their workers
        self._waker = Waker()

    def run(self, announce: Callable[[str], None]) -> int:
        """Serve; return the exit code, or raise the StartupError that ended it.

        `announce` gets the base URL once a worker is ready, before any request is answered.
        """
        self._bind()
        self._take_signals()
        self._due = [0.0] * self._count
        while self._workers or self._due:
            self._start_due()
            for key, _ in self._selector.select(self._seconds_to_wait()):
                if key.data is None:
                    self._waker.take()
                elif not key.data.read_reports():
                    self._selector.unregister(key.fd)  # user code has closed it: we would spin
            self._announce(announce)
            self._reap()
            self._look_at_websockets()
            self._obey()
        self._close()
        is_stopped = self._stops > 0 and isinstance(self._failure, FrameworkNeeded)
        if self._failure is not None and not is_stopped:
            raise self._failure
        return Exit.OK

    def _close(self) -> None:
        """Let go of all that is open, and of signals: another supervisor may follow."""
        def send(number: int) -> bool:
            self._reap()
            return any([signal_group(group, number) for group in self._groups])

        end_all(send, CHILDREN_SECONDS)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._waker.signals = frozenset()  # later forks are no business of this one's
        self._selector.close()
        for end in (*self._life, *self._gate):
            if end >= 0:
                os.close(end)

    @property
    def _count(self) -> int:
        return 1 if self._served.has_own_start else self._settings.workers

    def _bind(self) -> None:
        if not self._served.has_own_start:
            self._listener = bind(self._settings.host, self._settings.port)
            self._settings = self._settings._replace(port=self._listener.getsockname()[1])
        Current.settings = self._settings

    def _take_signals(self) -> None:
        """Have signals wake the selector; the handlers only count."""
        def count() -> None:
            now = time.monotonic()
            if now - self._last_stop > REPEAT_SECONDS:  # else it came to the group as well
                self._stops += 1
                self._last_stop = now

        self._handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._waker.wake_on(STOP_SIGNALS, count)
        self._selector.register(self._waker.readable, selectors.EVENT_READ, None)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _start_due(self) -> None:
        now = time.monotonic()
        while self._due and min(self._due) <= now:
            self._due.remove(min(self._due))
            self._start_worker()

    def _start_worker(self) -> None:
        """Fork a worker, and take note of it."""
        slot = min(set(range(self._count)) - {worker.slot for worker in self._workers.values()})
        ends: List[int] = []
        try:
            ends += os.pipe()
            flush_output()
            pid = os.fork()  # its child has no handlers of ours from its first moment on
            if not pid:
                self._become_worker(slot, *ends)
        except OSError as error:  # no memory or too many processes or files, perhaps for a moment
            for end in ends:
                os.close(end)
            return self._start_later(f"a worker cannot be started: {error.strerror}")
        reports, reporter = ends
        os.close(reporter)
        os.set_blocking(reports, False)
        self._workers[pid] = Worker(pid, reports, slot)
        self._selector.register(reports, selectors.EVENT_READ, self._workers[pid])

    def _become_worker(self, slot: int, reports: int, reporter: int) -> NoReturn:
        """The child's side of the fork: let go of what is the supervisor's, serve, and end."""
        code, error = Exit.SOFTWARE, None
        try:
            if not os.isatty(0):  # else a debugger could not read from it
                os.setpgid(0, 0)  # all that the class starts ends with this process
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # a terminal's Ctrl-C is for the supervisor to pass on
            signal.signal(signal.SIGINT, lambda *_: None)
            self._waker.signals = frozenset()  # what the class forks may have other ones
            self._selector.close()
            others = [worker.reports for worker in self._workers.values()]
            for end in (self._life[1], self._gate[1], reports, *others):
                if end >= 0:
                    os.close(end)
            attempt(os.close, Current.output)
            forget_what_is_shared()
            Current.reports, Current.listener = reporter, self._listener
            Current.gate, Current.share = self._gate[0], self._shares[slot]
            code, error = attempt(self._serve)
            if error is not None:
                failure = StartupError(describe(error))
                failure.exit = code = Exit.SYSTEM
                report_failure(failure)
        finally:
            leave(code, GRACE_SECONDS if code == Exit.OK else LEAVE_SECONDS)

    def _serve(self) -> int:
        """Be a worker, to its exit code."""
        threading.Thread(target=die_with, args=(self._life[0],), name="life", daemon=True).start()
        return run_worker(self._load)

    def _seconds_to_wait(self) -> Optional[float]:
        moments = self._due + [moment for moment in (self._deadline, self._forsaken_at) if moment]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _announce(self, announce: Callable[[str], None]) -> None:
        """Let the workers serve once the first is ready, which is said before."""
        if self._has_begun:
            return
        ready = [REPORT_READY in worker.told for worker in self._workers.values()]
        if all(ready) and len(ready) == self._count:
            self._has_begun = True
            logger.debug("all workers are ready")
        if any(ready) and self._gate[1] >= 0:
            listener = self._listener
            announce(url_of(listener) if listener else f"http://0.0.0.0:{self._settings.port}")
            self._open_gate()

    def _open_gate(self) -> None:
        """Let workers that are ready wait no more."""
        if self._gate[1] >= 0:
            os.close(self._gate[1])
            self._gate = (self._gate[0], -1)

    def _reap(self) -> None:
        """Take note of every child that has ended, adopted ones too."""
        self._groups = [group for group in self._groups if signal_group(group, 0)]
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            worker = self._workers.pop(pid, None)
            if worker is not None:
                worker.read_reports()
                self._breakage = worker.breakage or self._breakage
                if worker.websockets:
                    self._breakage = f"worker {pid} {how_it_died(status)}"
                with contextlib.suppress(KeyError):
                    self._selector.unregister(worker.reports)
                os.close(worker.reports)
                self._shares[worker.slot].leave()
                if signal_group(pid, signal.SIGTERM):
                    self._groups.append(pid)
                self._bury(worker, status)

    def _look_at_websockets(self) -> None:
        """End a pod whose WebSocket connections were closed by failures, the last a while ago.

        A target never dials again: what it sends there waits forever, and it hears of the failure
        only by the pod's end.
        """
        if not self._settings.is_pod:
            return
        has_opened = is_any_open = False
        for worker in self._workers.values():
            has_opened = has_opened or REPORT_OPENED in worker.told
            is_any_open = is_any_open or worker.websockets > 0
            worker.told.discard(REPORT_OPENED)
            self._breakage, worker.breakage = worker.breakage or self._breakage, ""
        if is_any_open or not self._breakage or self._deadline:
            self._forsaken_at = 0.0
        elif not self._forsaken_at or has_opened:
            self._forsaken_at = time.monotonic() + FORSAKEN_SECONDS
        elif time.monotonic() >= self._forsaken_at:
            self._forsaken_at = 0.0
            self._fail(StartupError(
                f"{self._breakage} (no WebSocket connection is left, and AIStore opens none again)"))

    def _bury(self, worker: Worker, status: int) -> None:
        """Decide what a worker's end means: the end of all, or a replacement."""
        if worker.failure is not None and not (self._has_begun or self._deadline):
            return self._fail(worker.failure)
        if worker.failure is not None and self._failure is None:
            logger.error(worker.failure.story or str(worker.failure), extra=WITH_LINES)
        if self._deadline:
            return
        if REPORT_ANSWERED in worker.told:
            self._deaths = 0
        why = f"worker {worker.pid} {worker.failure or how_it_died(status)}"
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self._start_later(why, was_killed and worker.is_idle)

    def _start_later(self, why: str, was_idle: bool = False) -> None:
        """Start a worker after a delay that grows with each death in a row, or end the pod."""
        self._deaths += 1
        if was_idle:  # neither its class nor an object has killed it: no reason to give up
            self._deaths = min(self._deaths, DEATHS_LIMIT - 1)
        if self._served.has_own_start:  # one process, whose end is that of the pod
            return self._fail(StartupError(why))
        has_answered = any(REPORT_ANSWERED in worker.told for worker in self._workers.values())
        if self._deaths >= DEATHS_LIMIT and not has_answered:
            return self._fail(StartupError(
                f"{why}, the {self._deaths}th in a row that never answered a request"))
        delay = min(0.05 * 2 ** min(self._deaths, 10), RESPAWN_DELAY_LIMIT_SECONDS)
        logger.error("%s; starting another in %.1f s", why, delay)
        self._due.append(time.monotonic() + delay)

    def _fail(self, failure: StartupError) -> None:
        self._failure = failure
        self._stop()

    def _obey(self) -> None:
        """Stop on the first signal, at once on the second; kill what outlives its grace period."""
        if self._stops and not self._deadline:
            logger.info("stopping")
            self._stop()
        if self._deadline and (self._stops > 1 or time.monotonic() >= self._deadline):
            for pid in self._workers:
                logger.error("worker %d is killed with what it has in flight", pid)
                os.kill(pid, signal.SIGKILL)
            self._stops = 1
            self._deadline = time.monotonic() + TOOL_STOP_SECONDS

    def _stop(self) -> None:
        """Let no connection in, and tell the workers to finish what they have begun."""
        self._deadline = time.monotonic() + GRACE_SECONDS
        self._due.clear()
        self._open_gate()
        if self._listener is not None:
            self._listener.close()
        for pid in self._workers:
            os.kill(pid, signal.SIGTERM)


# == 19. Entry ==
# The command line. No arguments: a pod. `serve`: a class from a file, on a laptop. `install`: for
# images.


def prepare(settings: Settings, may_install: bool) -> None:
    """Do what comes before any code of the user's: log, a look at the certificates, packages."""
    def log_failure(told: Any) -> None:
        if told.exc_type is not SystemExit:
            log_user_error("a thread", told.exc_value)

    configure_logging(settings)
    logging.captureWarnings(True)  # in the log, as all else, they show no secrets
    threading.excepthook = log_failure
    if settings.client_ca or settings.client_cert:
        tls_context(settings)
    if settings.target.startswith("https:"):
        # loaded here, it is shared by all workers
        logger.debug("TLS is that of %s", ssl.OPENSSL_VERSION)
    if may_install:
        install_os_packages(settings.os_packages)
        install_python_packages(settings.packages)


class Start(NamedTuple):
    """How this process was started: what a class changes when it is loaded is not in here."""

    command: List[str]
    environ: Mapping[str, str]
    folder: str

    def over(self, served: Served) -> NoReturn:
        """Start the same program in the place of this one, for a class that cannot be forked.

        The supervisor then forks workers that load it, each for itself, and has no copy of its own.
        """
        # Signals wait for the new program's handlers; one that another thread takes goes down a
        # pipe that it inherits.
        signals, writer = os.pipe()
        for end in (signals, writer):
            os.set_blocking(end, False)
            os.set_inheritable(end, True)
        signal.set_wakeup_fd(writer)
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            # one of the class's would end a program that does not expect it
            signal.setitimer(timer, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        folder = target_folder
        known = json.dumps([served, folder.path, folder.requirements, signals, writer,
                            Current.began])
        flush_output()
        error = None
        if attempt(os.getcwd).value != self.folder:
            error = attempt(os.chdir, self.folder).error
        if error is None:
            environ = {**self.environ, FRESH_START: known}
            error = attempt(os.execve, self.command[0], self.command, environ).error
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        raise StartupError(f"the class left threads, and the pod cannot start over for it: {error}")


def take_fresh_start(known: str, environ: MutableMapping[str, str]) -> Served:
    """Take over what the program before this one knew, and the folder with its packages."""
    values = attempt(json.loads, known).value
    if not (isinstance(values, list) and len(values) == 6):
        raise UsageError(f"{FRESH_START} is a variable of this runtime's own")
    served, folder, requirements, signals, writer, Current.began = values
    if folder:
        target_folder.take_over(folder, requirements)
        use_packages_of(folder, environ)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in attempt(os.read, signals, READ_BYTES).value or b"":
        if number in STOP_SIGNALS:
            signal.raise_signal(number)
    os.close(signals)
    os.close(writer)
    return Served(*served)


class Job(NamedTuple):
    """What a command line asks for: which class to serve, how, and what to say once it is."""

    settings: Settings
    may_install: bool
    load: Callable[[], Type[ETLServer]]
    # gets the class, the framework's server or "", and the URL
    announce: Callable[[Served, str, str], None]

    def run(self, start: Start, served: Optional[Served]) -> int:
        """Serve until SIGTERM; once more from the start where a framework turns out to be needed.

        `served` is there in a program that has started over: packages are installed, and workers
        load the class.
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
                if (need.framework, need.serves) in needs:
                    raise
                needs.add((need.framework, need.serves))
                prepare_framework(need.framework, need.serves, self.may_install)
                if need.serves:
                    job = job._replace(settings=job.settings._replace(server=need.framework))

    def _serve(self, start: Start, served: Optional[Served]) -> int:
        """Load the class, unless workers are to do so, and serve it."""
        load, is_loaded_here = self.load, served is None
        if served is None:
            etl_class = load()
            load = lambda: etl_class  # noqa: E731  loaded once, for all workers
            served = Served.of(etl_class, server_for(etl_class))
        server, by = self.settings.server or served.server, ""
        if server in FRAMEWORKS:
            prepare_framework(server, serves=True, may_install=self.may_install)
            by = FRAMEWORKS[server].server
        if is_loaded_here and not may_be_forked():
            start.over(served)
        settle()
        settings = self.settings._replace(server=server)
        return Supervisor(settings, served, load).run(functools.partial(self.announce, served, by))


def pod_job(environ: Mapping[str, str]) -> Job:
    """Serve what the environment describes."""
    has_file = bool(environ.get("ETL_CLASS_PAYLOAD_FILE"))
    required = ("AIS_TARGET_URL",) if has_file else ("ETL_CLASS_PAYLOAD", "AIS_TARGET_URL")
    settings = Settings.from_env(environ, required)

    def announce(served: Served, by: str, url: str) -> None:
        is_one = settings.workers == 1 or served.has_own_start
        count = "1 worker" if is_one else f"{settings.workers} workers"
        logger.info("serving %s (%s%s) on %s with %s", served.name, served.base,
                    by and f", by {by}", url, count)

    return Job(settings, True, functools.partial(load_etl_class, settings), announce)


def pick_class(module: types.ModuleType, wanted: str) -> Type[ETLServer]:
    """Pick the class to serve from a file's module: the one that is named, else the only one."""
    names = vars(module)
    if wanted:
        if wanted not in names:
            raise UsageError(f"{module.__file__} has no {wanted}")
        return checked_class(names[wanted], f"{module.__file__}: {wanted}")
    found = {value for value in names.values() if isinstance(value, type)
             and issubclass(value, ETLServer) and value.__module__ == module.__name__}
    leaves = [cls for cls in found if found.isdisjoint(cls.__subclasses__())]
    if len(leaves) != 1:
        choice = ", ".join(sorted(cls.__name__ for cls in leaves)) or "none"
        raise UsageError(f"{module.__file__} must define one ETL class, or FILE:CLASS name it; it "
                         f"has {choice}")
    return checked_class(leaves[0], f"{module.__file__}: {leaves[0].__name__}")


def class_from_file(text: str) -> Type[ETLServer]:
    """Import FILE[:CLASS] and pick the class: the one that is named, or the file's only one."""
    import importlib.util

    path, wanted = text, ""
    if ":" in text and not os.path.exists(text):
        path, _, wanted = text.rpartition(":")
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path!r}")
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


def first_file(folder: str) -> str:
    """Find a file below a folder that may be read, the first by name; "" where there is none."""
    root = os.path.realpath(folder)
    for where, subfolders, names in os.walk(root):
        subfolders.sort()
        for path in (os.path.join(where, name) for name in sorted(names)):
            name = os.path.relpath(path, root)
            is_within = is_object_path(os.path.realpath(path), (root,))
            can_be_read = is_within and attempt(existing_file, path).error is None
            if can_be_read and f"/{name}" not in PATH_METHODS:
                return name
    return ""


def serve_job(arguments: argparse.Namespace, environ: MutableMapping[str, str]) -> Job:
    """Serve a class from a file: `serve FILE[:CLASS]`."""
    if arguments.target:
        environ["AIS_TARGET_URL"] = arguments.target  # a class may read it
    unread = re.compile("NUM_WORKERS|PORT|ETL_FQN_ROOTS|ETL_CLASS_PAYLOAD.*")
    settings = Settings.from_env(
        {name: text for name, text in environ.items() if not unread.fullmatch(name)})
    is_folder = settings.target.startswith("file:")
    folder = unquote(urlsplit(settings.target).path) if is_folder else ""
    settings = settings._replace(
        host=arguments.host, port=arguments.port, workers=arguments.workers,
        threads=arguments.threads or settings.threads,
        fqn_roots=(os.path.realpath(folder),) if folder else ())

    def announce(served: Served, by: str, url: str) -> None:
        file = first_file(folder) if folder else ""
        print(f"serving {served.name} from {arguments.file} on {url}",
              f"  echo hello | curl -sS -T - {url}/bucket/object",
              f"  curl -sS '{url}/{quote(os.fsencode(file))}'" if file else f"  curl -sS {url}/health",
              sep="\n", flush=True)

    return Job(settings, False, functools.partial(class_from_file, arguments.file), announce)


def give_up(error: StartupError) -> int:
    """Have the last line of the log tell why the pod ends: AIStore shows it to the user."""
    if error.story:
        logger.error(error.story, extra=WITH_LINES)
    reason = " ".join((Current.settings or Settings()).redact(str(error)).split())
    Current.last_line = f"ais_runtime_min: {reason}"
    if os.path.exists(TERMINATION_LOG):
        try:
            with open(TERMINATION_LOG, "wb") as file:
                file.write(reason.encode("utf-8", "replace")[:TERMINATION_LOG_LIMIT_BYTES])
        except OSError as problem:
            logger.debug("%s cannot be written: %s", TERMINATION_LOG, problem)
    return error.exit


def install(environ: Mapping[str, str]) -> int:
    """Install what `OS_PACKAGES` and `PACKAGES` name, and end: for images that have it all."""
    Current.settings = Settings.from_env(environ)
    target_folder.may_be_made = False
    prepare(Current.settings, True)
    return Exit.OK


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """A parser whose complaints end as all others do."""

        def error(self, message: str) -> NoReturn:
            """Raise a complaint."""
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
    arguments = parser.parse_args(argv)
    if arguments.command == "install":
        raise UsageError("install stands alone; --help has the options")
    if os.path.isdir(arguments.target or ""):
        arguments.target = "file://" + quote(os.fsencode(os.path.abspath(arguments.target)))
    for variable in VARIABLES:  # whose bounds are those of the options that fill the same field
        given = getattr(arguments, variable.field, None)
        value, error = attempt(variable.parse, given) if given is not None else Outcome()
        if error is not None:
            what = "" if variable.secret else f"={given!r}"
            also = "a folder that is there, or " if variable.field == "target" else ""
            raise UsageError(f"--{variable.field}{what} must be {also}{error}")
        setattr(arguments, variable.field, value)
    return arguments


def terminate(number: int, _: Any) -> NoReturn:
    """End the start: a tool that runs is ended on the way out."""
    raise Terminated(Exit.OK if number == signal.SIGTERM else 128 + number)


def own_command(arguments: Sequence[str]) -> List[str]:
    """Return the command line that starts this program once more, with Python's own options."""
    original = getattr(sys, "orig_argv", ())  # from Python 3.10 on
    count = len(original) - len(arguments)
    if count > 0 and list(original[count:]) == list(arguments):
        return [sys.executable, *original[1:]]
    import subprocess

    options = getattr(subprocess, "_args_from_interpreter_flags")()  # as multiprocessing does
    return [sys.executable, *options, os.path.abspath(__file__), *arguments]


def main(argv: Optional[Sequence[str]] = None,
         environ: MutableMapping[str, str] = os.environ) -> int:
    """Run the command line; return the exit code."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # CRI-O starts pods with a soft 1024
    # macOS has a lower limit of its own
    attempt(resource.setrlimit, resource.RLIMIT_NOFILE, (hard, hard))
    if sys.platform.startswith("linux"):
        Current.began = time.clock_gettime(time.CLOCK_BOOTTIME)
    Current.output = attempt(os.dup, 1).value or -1
    for number in STOP_SIGNALS:
        signal.signal(number, terminate)  # until there are workers to be stopped
    known = environ.pop(FRESH_START, "")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a line must not fail for a character, nor wait for others
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments == ["install"]:
            return install(environ)
        start = Start(own_command(arguments), dict(environ), attempt(os.getcwd).value or "")
        served = take_fresh_start(known, environ) if known else None
        job = serve_job(parse_arguments(arguments), environ) if arguments else pod_job(environ)
        Current.settings = job.settings
        del sys.argv[1:]  # a class may read its own command line, which has no arguments
        # pyarrow's thread would outlive a fork
        environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
        return job.run(start, served)
    except StartupError as error:
        return give_up(error)


def run() -> NoReturn:
    """Be the program."""
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else Exit.OK
    leave(code, LEAVE_SECONDS)


if __name__ == "__main__":
    run()
