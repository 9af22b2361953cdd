"""A stand-in for an AIStore target, or for the next ETL stage, that misbehaves on demand.

It is the judge of the runtime, so it shares no code with it, nor with `http.server`. It keeps three records: `requests`, all that
it got, byte for byte; `stored`, the bodies of whole PUTs; `complaints`, requests that no HTTP/1.1 server should have to read.

One thread accepts, and each connection has one more; a `Behaviour` says what happens to one request.
"""
import enum
import io
import re
import socket
import ssl
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Deque, Dict, Iterator, List, Optional, Set, Tuple, Union

import trustme

BASE_PATH = "/v1/etl/_object/test-etl/s3cr3t"
LINE_LIMIT_BYTES = 1 << 16
PIECE_BYTES = 1 << 16
CLOSE_SECONDS = 10  # for all threads to end; they wait for nothing, so this is reached by a defect only
POLITE_SECONDS = 2  # how long a polite close reads on, so that unread bytes do not turn it into a reset
REQUEST_LINE = re.compile(r"[A-Z]+ /[^\x00-\x20\x7f]* HTTP/1\.1")
HEADER_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00\r\n]*")
CHUNK_SIZE = re.compile(r"[0-9a-fA-F]{1,16}")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST


class At(enum.Enum):
    """The points of an exchange at which a fault can happen, in their order (an early answer comes before the body)."""

    BEFORE_BODY = 1  # the head is read
    IN_BODY = 2  # at least Behaviour.after_bytes of the request's body are read
    AFTER_BODY = 3  # the whole request is read, nothing is answered
    IN_ANSWER_HEAD = 4  # half of the answer's head is sent
    IN_ANSWER_BODY = 5  # Behaviour.after_bytes of the answer's body are sent
    AFTER_ANSWER = 6


@dataclass(frozen=True)
class Recorded:
    """A request as it came; `complete` is False if its body was not read to its end."""

    method: str
    target: str  # as on the wire, bytes as latin-1
    headers: Dict[str, str]  # names in lower case, repeated ones joined by ", "
    body: bytes
    complete: bool
    connection: int  # 1 for the first connection that was accepted

    @property
    def path(self) -> str:
        """Return the raw target without its query."""
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class Behaviour:
    """What to do with one request; the default is to be a good target."""

    status: Optional[int] = None  # None: what the target's objects say, else this status with `headers` and `body`
    headers: Tuple[Tuple[str, str], ...] = ()
    body: Union[bytes, Callable[[bytes], bytes]] = b""  # a function gets the request's body, as an ETL stage does
    framing: str = "length"  # or "chunked", or "close"
    declared: Optional[int] = None  # a Content-Length other than the body's; the connection closes behind the body
    interim: Tuple[int, ...] = ()  # 1xx answers, sent as soon as the head is read
    early: bool = False  # answer before the body is read
    read_on: bool = True  # False: an early answer's request body is left unread, the connection stays open until close()
    cut: Optional[At] = None  # end the connection here
    reset: bool = False  # a cut is an RST and not a FIN
    stall: Optional[At] = None  # pause here, for `stall_seconds`
    stall_seconds: float = 0.0
    after_bytes: int = 1  # where IN_BODY and IN_ANSWER_BODY are


Chooser = Callable[[Recorded], Behaviour]


class StandInTarget:
    """A server on 127.0.0.1 that plays a target until `close()`.

    For tests to set:
        objects: what GET finds, by raw path below the base path, as in `{"/ais%2F@%23%2Fbck%2Fobj": b"…"}`.
        script: behaviours for the next requests, first come, first served.
        default: the behaviour of the others, or a function that picks it from the request's head.
        idle_seconds: close connections that are idle for so long.

    For tests to read: `url`, `port`, `requests`, `stored` (by raw path below the base path), `connections`, `complaints`.
    """

    def __init__(self, tls: Optional[ssl.SSLContext] = None) -> None:
        self.objects: Dict[str, bytes] = {}
        self.script: Deque[Behaviour] = deque()
        self.default: Union[Behaviour, Chooser] = Behaviour()
        self.idle_seconds: Optional[float] = None
        self.requests: List[Recorded] = []
        self.stored: Dict[str, bytes] = {}
        self.complaints: List[str] = []
        self.connections = 0
        self.tls = tls
        self.closing = threading.Event()
        self.changed = threading.Condition()
        self._open: Set["_Connection"] = set()
        self._refusing = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="stand-in", daemon=True)
        self._accepting.start()

    @property
    def root(self) -> str:
        """The URL without a path, as a pipeline names the next stage."""
        return "%s://127.0.0.1:%d" % ("https" if self.tls else "http", self.port)

    @property
    def url(self) -> str:
        """The value for AIS_TARGET_URL."""
        return self.root + BASE_PATH

    def wait_for_requests(self, count: int, timeout: float = 10.0) -> List[Recorded]:
        """Return the requests as soon as there are `count`; fail if they do not come."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.requests) >= count, timeout), self.requests
            return list(self.requests)

    def refuse(self) -> None:
        """Close the port, so that new connections are refused; open ones live on."""
        if not self._refusing:
            self._refusing = True
            socket.create_connection(("127.0.0.1", self.port)).close()  # wakes accept(), on every system
            self._accepting.join(CLOSE_SECONDS)
            self._listener.close()

    def close(self) -> None:
        """End all connections and threads."""
        self.refuse()
        self.closing.set()
        with self.changed:
            left = list(self._open)
        for connection in left:
            connection.abort()
        for connection in left:
            connection.thread.join(CLOSE_SECONDS)
            assert not connection.thread.is_alive(), "a stand-in's connection does not end"

    def _accept(self) -> None:
        while True:
            accepted, _ = self._listener.accept()
            if self._refusing:
                accepted.close()
                return
            with self.changed:
                self.connections += 1
                connection = _Connection(self, accepted, self.connections)
                self._open.add(connection)
            connection.thread.start()

    # -- for connections, on their threads --

    def behaviour_for(self, head: Recorded) -> Behaviour:
        """Return what to do with a request of which only the head is read."""
        with self.changed:
            if self.script:
                return self.script.popleft()
        return self.default if isinstance(self.default, Behaviour) else self.default(head)

    def record(self, request: Recorded) -> None:
        """Keep a request that was read to its end or will not be."""
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()

    def own_answer(self, request: Recorded) -> Tuple[int, bytes]:
        """Answer as a good target does: an object to GET, an empty 200 to PUT, whose body it stores."""
        if request.path.startswith(BASE_PATH + "/"):
            name = request.path[len(BASE_PATH):]
            if request.method == "PUT":
                if request.complete:
                    self.stored[name] = request.body
                return 200, b""
            if request.method in ("GET", "HEAD") and name in self.objects:
                return 200, self.objects[name]
        return 404, b"the stand-in has no " + request.path.encode("latin-1")

    def forget(self, connection: "_Connection") -> None:
        """Drop a connection that has ended."""
        with self.changed:
            self._open.discard(connection)


class _Cut(Exception):
    """The behaviour wants the connection to end here."""

    def __init__(self, reset: bool) -> None:
        self.reset = reset


class _Malformed(Exception):
    """The peer sent what is not HTTP/1.1."""


class _CutShort(Exception):
    """The peer went away in the middle of a request."""


class _Connection:
    """One accepted connection and its thread; the thread alone touches it, `abort()` apart."""

    def __init__(self, owner: StandInTarget, accepted: socket.socket, number: int) -> None:
        self.owner = owner
        self.number = number
        self.raw = accepted
        self.thread = threading.Thread(target=self._run, name="stand-in %d" % number, daemon=True)
        self._pending = bytearray()  # what is to be sent; leaves in one piece unless a fault parts it

    def abort(self) -> None:
        """Wake the thread out of whatever it waits for; called by other threads."""
        try:
            socket.socket.shutdown(self.raw, socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster

    def _run(self) -> None:
        try:
            self._serve()
        except _Malformed as fault:
            self.owner.complaints.append(str(fault))
        except (_CutShort, OSError):
            pass  # what the peer did is in the records already
        finally:
            self.raw.close()
            self.owner.forget(self)

    def _serve(self) -> None:
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.owner.tls:
            self.raw = tls = self.owner.tls.wrap_socket(self.raw, server_side=True, do_handshake_on_connect=False)
            tls.do_handshake()  # apart, so that abort() finds the socket meanwhile
        reset = False
        with self.raw.makefile("rb") as stream:
            try:
                while self._exchange(stream):
                    pass
            except _Cut as cut:
                reset = cut.reset
        if reset:
            self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            self._close_politely()

    def _exchange(self, stream: io.BufferedReader) -> bool:
        """Read one request and answer it; return whether another one may follow."""
        self.raw.settimeout(self.owner.idle_seconds)
        try:
            head = _read_head(stream, self.number)
        except socket.timeout:
            head = None
        self.raw.settimeout(None)
        if head is None:
            return False
        plan = self.owner.behaviour_for(head)
        self.raw.sendall(b"".join(b"HTTP/1.1 %d Interim\r\n\r\n" % status for status in plan.interim))
        if plan.early:
            self._answer(plan, head)
            if not plan.read_on:
                self.owner.record(head)
                self.owner.closing.wait()
                return False
        request = self._read_body(stream, plan, head)
        self._reach(At.AFTER_BODY, plan)
        if not plan.early:
            self._answer(plan, request)
        return plan.framing != "close" and plan.declared is None and request.headers.get("connection", "").lower() != "close"

    def _read_body(self, stream: io.BufferedReader, plan: Behaviour, head: Recorded) -> Recorded:
        """Read the body as far as it comes, or as the behaviour lets it, and record the request."""
        body = bytearray()
        complete = False
        try:
            self._reach(At.BEFORE_BODY, plan)
            for piece in _body_pieces(stream, head.headers):
                body += piece
                if len(body) - len(piece) < plan.after_bytes <= len(body):
                    self._reach(At.IN_BODY, plan)
            complete = True
        finally:
            request = replace(head, body=bytes(body), complete=complete)
            self.owner.record(request)
        return request

    def _answer(self, plan: Behaviour, request: Recorded) -> None:
        if plan.status is None:
            status, body = self.owner.own_answer(request)
        else:
            status, body = plan.status, plan.body if isinstance(plan.body, bytes) else plan.body(request.body)
        head = _answer_head(plan, status, len(body))
        self._pending += head[: len(head) // 2]
        self._reach(At.IN_ANSWER_HEAD, plan)
        self._pending += head[len(head) // 2:]
        if request.method != "HEAD" and status not in (204, 304):
            self._pending += _framed(body[: plan.after_bytes], plan.framing)
            self._reach(At.IN_ANSWER_BODY, plan)
            self._pending += _framed(body[plan.after_bytes:], plan.framing)
            self._pending += b"0\r\n\r\n" if plan.framing == "chunked" else b""
        self._send_pending()
        self._reach(At.AFTER_ANSWER, plan)

    def _reach(self, point: At, plan: Behaviour) -> None:
        """Have the fault that is planned for this point, if any: first the stall, then the cut."""
        if point is plan.stall:
            self._send_pending()
            self.owner.closing.wait(plan.stall_seconds)
        if point is plan.cut:
            self._send_pending()
            raise _Cut(plan.reset)

    def _send_pending(self) -> None:
        self.raw.sendall(self._pending)
        self._pending.clear()

    def _close_politely(self) -> None:
        """Send FIN and read on for a while: to close with unread bytes would be a reset, which can overtake the answer."""
        socket.socket.shutdown(self.raw, socket.SHUT_WR)
        deadline = time.monotonic() + POLITE_SECONDS
        while time.monotonic() < deadline:
            self.raw.settimeout(max(0.01, deadline - time.monotonic()))
            if not self.raw.recv(PIECE_BYTES):
                return


# == Reading requests ==


def _read_line(stream: io.BufferedReader) -> str:
    """Return a line without its CRLF."""
    line = stream.readline(LINE_LIMIT_BYTES)
    if line.endswith(b"\r\n"):
        return line[:-2].decode("latin-1")
    if line.endswith(b"\n") or len(line) == LINE_LIMIT_BYTES:
        raise _Malformed("not a line: %r" % line)
    raise _CutShort


def _read_head(stream: io.BufferedReader, connection: int) -> Optional[Recorded]:
    """Return the next request without its body, or None where the connection ended before it."""
    if not stream.peek(1):
        return None
    line = _read_line(stream)
    if not REQUEST_LINE.fullmatch(line):
        raise _Malformed("not a request line: %r" % line)
    method, target, _ = line.split(" ")
    headers: Dict[str, str] = {}
    for field in iter(lambda: _read_line(stream), ""):
        if not HEADER_LINE.fullmatch(field):
            raise _Malformed("not a header: %r" % field)
        name, _, value = field.partition(":")
        known = headers.get(name.lower())
        headers[name.lower()] = value.strip() if known is None else "%s, %s" % (known, value.strip())
    if "host" not in headers:
        raise _Malformed("no Host header: %s" % line)
    return Recorded(method, target, headers, b"", False, connection)


def _body_pieces(stream: io.BufferedReader, headers: Dict[str, str]) -> Iterator[bytes]:
    """Read the body that the headers promise (RFC 9112, section 6.3)."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise _Malformed("Content-Length: %s" % length)
    if coding is None:
        yield from _exactly(stream, int(length))
        return
    if coding != "chunked" or "content-length" in headers:
        raise _Malformed("Transfer-Encoding: %s, in %s" % (coding, headers))
    size = None
    while size != 0:
        line = _read_line(stream)
        if not CHUNK_SIZE.fullmatch(line):
            raise _Malformed("not a chunk's size: %r" % line)
        size = int(line, 16)
        yield from _exactly(stream, size)
        if _read_line(stream):
            raise _Malformed("a chunk longer than it says, or a trailer")


def _exactly(stream: io.BufferedReader, size: int) -> Iterator[bytes]:
    while size:
        piece = stream.read1(min(size, PIECE_BYTES))
        if not piece:
            raise _CutShort
        size -= len(piece)
        yield piece


# == Writing answers ==


def _answer_head(plan: Behaviour, status: int, length: int) -> bytes:
    lines = ["HTTP/1.1 %d Stand-in" % status, *("%s: %s" % pair for pair in plan.headers)]
    if plan.framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
    elif plan.framing == "close":
        lines.append("Connection: close")
    elif status not in (204, 304):
        lines.append("Content-Length: %d" % (length if plan.declared is None else plan.declared))
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _framed(piece: bytes, framing: str) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece) if piece and framing == "chunked" else piece


# == Certificates ==


class Certificates:
    """A certificate authority of the test's own, with a server's and a client's certificate, as PEM files in a folder.

    `ca` is for AIS_CLIENT_CA, `client` and `client_key` for AIS_CRT and AIS_CRT_KEY.
    """

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.client = folder / "client.pem"
        self.client_key = folder / "client-key.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        client = authority.issue_cert("client@example.org")
        client.cert_chain_pems[0].write_to_path(str(self.client))
        client.private_key_pem.write_to_path(str(self.client_key))
        self._server = authority.issue_cert("127.0.0.1", "localhost")

    def server_context(self, verify_client: bool = False) -> ssl.SSLContext:
        """Return the `tls` argument of a StandInTarget, which may ask for the client's certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.configure_cert(context)
        if verify_client:
            context.load_verify_locations(str(self.ca))
            context.verify_mode = ssl.CERT_REQUIRED
        return context
