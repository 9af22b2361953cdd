"""Generated requests: valid ones are answered to the byte; mutated ones are framed as others frame them, or refused.

Two judges tell what a request is and where it ends: `by_grammar`, the strict reading of RFC 9112 with two lengths refused, and
h11, which must agree to what it takes. It is laxer in places (line ends, folding, two lengths), and stricter in one: it takes no
white space before a chunk's extension.

`FUZZ_SECONDS=600` gives each test that long, and new examples each time; without it they are few, and always the same.
"""
import collections
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import socket
import time
from typing import Any, Callable, Counter, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, cast
from urllib.parse import unquote_to_bytes

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ais_runtime_min import (
    BoundedReader, ChunkedReader, ConnectionInput, ETLRequest, RequestError, ShortBody,
    UnframedRequest, body_of, parse_head)
from echo import HEAD
from harness import Runtime, Server, make_payload
from standin import BASE_PATH, Behaviour, Recorded, StandInTarget
from test_http import CASES, Answer, Client

FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS") or 0)
BATCH = 1000  # examples between two looks at the clock, where there is time
CHANCE = random.Random()  # hypothesis sets the seed of the random module's own generator
Drawn = TypeVar("Drawn")

pytestmark = pytest.mark.timeout(180 + 2 * FUZZ_SECONDS)


def explore(name: str, examples: int, strategy: "st.SearchStrategy[Drawn]", check: Callable[[Drawn], None]) -> None:
    """Run a check on generated values: always the same few, or with `FUZZ_SECONDS` new ones for so long."""
    count = 0

    def run(value: Drawn) -> None:
        nonlocal count
        count += 1
        check(value)

    quick = settings(max_examples=examples, derandomize=True, database=None, deadline=None,
                     suppress_health_check=list(HealthCheck), print_blob=True)
    quick(given(strategy)(run))()
    end = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end:
        long = settings(quick, derandomize=False, max_examples=BATCH)
        random.seed(CHANCE.getrandbits(64))
        long(given(strategy)(run))()
    print("%s: %d examples" % (name, count))


# == The runtime's own names ==


class Pieces:
    """What the runtime asks of a socket, to receive these pieces one by one and then the end."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = collections.deque(piece for piece in pieces if piece)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive a piece, or as much of it as is wanted."""
        piece = self._pieces.popleft() if self._pieces else b""
        if len(piece) > size:
            self._pieces.appendleft(piece[size:])
        return piece[:size]

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """Receive into a buffer; no piece is ever on its way, so that flags which wait change nothing."""
        data = self.recv(size or len(buffer))
        buffer[:len(data)] = data
        return len(data)


class Decoded(NamedTuple):
    """A body, and what follows it on its connection."""

    body: bytes
    rest: bytes


def input_of(pieces: Sequence[bytes]) -> ConnectionInput:
    """Make an input that receives these pieces."""
    return ConnectionInput(cast(socket.socket, Pieces(pieces)))


def read_body(
    pieces: Sequence[bytes], sizes: Sequence[int], length: Optional[int] = None, is_ahead: bool = False
) -> Optional[Decoded]:
    """Read a body by these sizes, over and over; return None if the runtime refuses it.

    Without a length it is in chunks. If `is_ahead`, the first piece has come with the head.
    """
    source = input_of(pieces)
    if is_ahead:
        source.fill()
    reader = ChunkedReader(source) if length is None else BoundedReader(source, length)
    counts = itertools.cycle(sizes or [-1])
    try:
        body = b"".join(iter(lambda: reader.read(next(counts)) or b"", b""))
    except (UnframedRequest, ShortBody) as error:
        assert error.status == 400
        left = source.ahead
        with pytest.raises(type(error)):
            reader.read(1)
        assert source.ahead == left, "read past a body whose end is not known"
        return None
    assert reader.is_at_end
    while source.fill():
        pass
    return Decoded(body, source.take(source.ahead))


# == Judges ==


class Framed(NamedTuple):
    """One request, cut out of what a client sent."""

    method: bytes
    target: bytes
    version: bytes
    fields: List[Tuple[bytes, bytes]]  # as they came, names in lower case
    body: bytes
    rest: bytes

    @property
    def wants_close(self) -> bool:
        """Whether the client said that it is the last one."""
        options = [option.strip().lower() for name, value in self.fields if name == b"connection" for option in value.split(b",")]
        return b"close" in options or self.version == b"1.0"


class Refused(Exception):
    """A judge takes the bytes for no request."""


class Incomplete(Exception):
    """A judge waits for more bytes."""


def by_h11(data: bytes) -> Framed:
    """Frame the first request as h11 does. Bytes above 127 in its target, which h11 refuses, are kept from it."""
    line, end, others = data.partition(b"\r\n")
    shown = re.sub(rb"[\x80-\xff]", b"~", line) if re.fullmatch(rb"[!-~]+ [!-~\x80-\xff]+ [!-~]+", line) else line
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 24)
    connection.receive_data(shown + end + others)
    request: Optional[h11.Request] = None
    body = b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(str(error)) from None
        if isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request
            target, rest = line.split(b" ")[1], connection.trailing_data[0]
            return Framed(request.method, target, request.http_version, list(request.headers), body, rest)
        else:
            raise Incomplete


TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
FIELD = rb"(%b):[ \t]*((?:[!-~\x80-\xff]+(?:[ \t]+[!-~\x80-\xff]+)*)?)[ \t]*" % TOKEN
CHUNK_EXTENSION = rb"(?:[ \t]*;[^\r\n\0]*)?"


def lines_of(data: bytes) -> Iterator[Tuple[bytes, bytes]]:
    """Cut off lines that end in CRLF: each, and what follows it."""
    while True:
        line, end, data = data.partition(b"\r\n")
        if re.search(rb"[\r\n](?!\Z)|\n", line):
            raise Refused("a bare CR or LF in %r" % line)
        if not end:
            raise Incomplete
        yield line, data


def fields_of(lines: Iterator[Tuple[bytes, bytes]]) -> Tuple[List[Tuple[bytes, bytes]], bytes]:
    """Read fields up to an empty line, and return what follows it."""
    fields = []
    for line, data in lines:
        if not line:
            break
        field = re.fullmatch(FIELD, line)
        if not field:
            raise Refused("the field %r" % line)
        fields.append((field[1].lower(), field[2]))
    return fields, data


def by_grammar(data: bytes) -> Framed:
    """Frame the first request by the grammar of RFC 9112, and with what it allows to refuse refused."""
    lines = lines_of(data)
    request_line = re.fullmatch(rb"(%b) ([!-~\x80-\xff]+) HTTP/(1\.[0-9])" % TOKEN, next(lines)[0])
    if not request_line:
        raise Refused("the request line")
    fields, data = fields_of(lines)
    method, target, version = request_line.groups()
    if [name for name, _ in fields].count(b"host") not in ((0, 1) if version == b"1.0" else (1,)):
        raise Refused("the hosts")
    return Framed(method, target, version, fields, *decode_body(data, version, fields))


def decode_body(data: bytes, version: bytes, fields: Sequence[Tuple[bytes, bytes]]) -> Decoded:
    """Cut off a body by the rules of RFC 9112, 6.3, which lets a server refuse what names two lengths."""
    lengths = [(name, value) for name, value in fields if name in (b"transfer-encoding", b"content-length")]
    name, value = lengths[0] if lengths else (b"content-length", b"0")
    if len(lengths) > 1:
        raise Refused("two lengths")
    if name == b"transfer-encoding":
        if value.lower() != b"chunked" or version == b"1.0":
            raise Refused("the coding")
        return decode_chunks(data)
    if not re.fullmatch(rb"[0-9]{1,100}", value):
        raise Refused("the length")
    if len(data) < int(value):
        raise Incomplete
    return Decoded(data[:int(value)], data[int(value):])


def decode_chunks(data: bytes) -> Decoded:
    """Decode a chunked body by the grammar of RFC 9112, 7.1."""
    body = b""
    while True:
        line, data = next(lines_of(data))
        size_line = re.fullmatch(rb"([0-9A-Fa-f]{1,16})" + CHUNK_EXTENSION, line)
        if not size_line:
            raise Refused("the chunk size %r" % line)
        size = int(size_line[1], 16)
        if not size:
            break
        if not b"\r\n".startswith(data[size:size + 2]):
            raise Refused("a chunk of more than %d bytes" % size)
        if len(data) < size + 2:
            raise Incomplete
        body, data = body + data[:size], data[size + 2:]
    return Decoded(body, fields_of(lines_of(data))[1])


def frame(data: bytes) -> Framed:
    """Frame the first request by the grammar, and as h11 does where it does; empty lines before it are skipped."""
    while data.startswith(b"\r\n"):
        data = data[2:]
    request = by_grammar(data)
    with contextlib.suppress(Refused):
        other = by_h11(data)._replace(fields=request.fields)  # it changes values, to lower case for instance
        assert request == other, "the judges differ"
    return request


def frame_all(data: bytes) -> Tuple[List[Framed], bytes]:
    """Frame requests until there is none, or one that is incomplete or malformed; what is left is that one."""
    requests: List[Framed] = []
    with contextlib.suppress(Refused, Incomplete):
        while data:
            requests.append(frame(data))
            data = requests[-1].rest
    return requests, data


# == Valid requests ==

RESERVED = {"content-length", "transfer-encoding", "host", "expect", "connection", "ais-node-url"}  # they change what is to come
TOKENS = st.text("!#$%&'*+-.^_`|~059azAZ", min_size=1, max_size=12)
VALUES = st.binary(max_size=20).map(lambda data: re.sub(rb"[\0-\x08\n-\x1f\x7f]", b"", data).strip(b" \t"))
SPACES = st.sampled_from([b" ", b"", b"\t", b"  ", b" \t "])
USUAL_FIELDS = st.sampled_from([
    (b"Connection", b"keep-alive"), (b"Connection", b"x, Keep-Alive"), (b"Trailer", b"x"), (b"Accept", b""),
    (b"Range", b"bytes=0-1"), (b"Content-Type", b"text/plain; charset=\"x\""), (b"X-Content-Length", b"7"),
    (b"Content-Length-X", b"7"), (b"X-Transfer-Encoding", b"chunked"), (b"Upgrade", b"h2c"),
    (b"Cookie", b"a=b"), (b"Cookie", b"c=d"), (b"Content-Encoding", b"gzip"),
])
ODD_FIELDS = st.tuples(TOKENS.filter(lambda name: name.lower() not in RESERVED).map(str.encode), VALUES)
BODIES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\r\n", b"0\r\n\r\n", b"PUT /b/inner HTTP/1.1\r\nHost: x\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"]),
    st.builds(lambda seed, size: (seed * (size // len(seed) + 1))[:size], st.binary(min_size=1, max_size=9),
              st.one_of(st.integers(0, 3000), st.sampled_from([8191, 8192, 65535, 65536, 65537, 200_000]))),
)
PATH_CHARACTERS = [bytes([byte]) for byte in b"aZ09-._~!$&'()*+,;=:@/%\"<>[]^`{|}#\x80\xc3\xff"]
PATHS = st.lists(st.sampled_from([*PATH_CHARACTERS, b"%2F", b"%00"]), min_size=1, max_size=12).map(b"".join)
CUTS: "st.SearchStrategy[List[float]]" = st.one_of(st.just([]), st.lists(st.floats(0, 1), max_size=8))


class Valid(NamedTuple):
    """A request as it goes over the wire, and what must come of it."""

    wire: bytes
    method: str
    path: bytes
    body: bytes
    closes: bool


def cut(data: bytes, shares: Sequence[float]) -> List[bytes]:
    """Cut bytes at these shares of their length; no piece is empty."""
    places = [0, *sorted(int(share * len(data)) for share in shares), len(data)]
    return [data[start:end] for start, end in zip(places, places[1:]) if start < end]


@st.composite
def chunked(draw: Any, body: bytes) -> bytes:
    """Frame a body in chunks, in one of the many ways there are."""
    extensions = st.sampled_from([b"", b"", b";x", b" \t;name=\"a;b\"", b";a=1;b", b"; q = \xe9"])
    wire = b""
    for piece in [*cut(body, draw(CUTS)), b""]:
        size = draw(st.sampled_from(["%x", "%X", "%04x", "%016X"])) % len(piece)
        wire += size.encode() + draw(extensions) + b"\r\n" + (piece + b"\r\n" if piece else b"")
    trailers = draw(st.lists(st.one_of(USUAL_FIELDS, ODD_FIELDS), max_size=2))
    return wire + b"".join(b"%b:%b\r\n" % (name, value) for name, value in trailers) + b"\r\n"


@st.composite
def valid_requests(draw: Any, version: bytes = b"1.1", closes: bool = False) -> Valid:
    """Make a request; it ends its connection if it says so, is of HTTP/1.0, or has a body that nobody reads."""
    method, body = draw(st.sampled_from(["PUT", "PUT", "PUT", "GET", "POST"])), draw(BODIES)
    path = b"/b/" + draw(PATHS)
    fields = draw(st.lists(st.one_of(USUAL_FIELDS, ODD_FIELDS), max_size=6))
    fields = [field for field in fields if version == b"1.1" or field[0] != b"Connection"]
    content = body
    if version == b"1.1" and draw(st.booleans()):
        fields.append((b"Transfer-Encoding", draw(st.sampled_from([b"chunked", b"Chunked"]))))
        content = draw(chunked(body))
    elif body or draw(st.booleans()):
        fields.append((b"Content-Length", draw(st.sampled_from([b"%d", b"%018d"])) % len(body)))
    if version == b"1.1" or draw(st.booleans()):
        fields.append((b"Host", draw(st.sampled_from([b"x", b"", b"[::1]:80", b"10.0.0.1:8000"]))))
    if method == "PUT" and draw(st.integers(0, 5)) == 0:
        fields.append((b"Expect", b"100-continue"))
    if closes and version == b"1.1":
        fields.append((b"Connection", draw(st.sampled_from([b"close", b"x, CLOSE"]))))
    lines = []
    for name, value in draw(st.permutations(fields)):
        name = draw(st.sampled_from([bytes, bytes.lower, bytes.upper]))(name)
        lines.append(b"%b:%b%b%b\r\n" % (name, draw(SPACES), value, draw(SPACES)))
    empty_lines = draw(st.sampled_from([b"", b"", b"", b"\r\n", b"\r\n\r\n"]))
    prefix = draw(st.sampled_from([b"", b"", b"", b"http://h:1", b"HTTPS://h"]))
    head = b"%b%b %b%b HTTP/%b\r\n%b\r\n" % (empty_lines, method.encode(), prefix, path, version, b"".join(lines))
    is_last = closes or version == b"1.0" or (method != "PUT" and content != b"")
    return Valid(head + content, method, path, body, is_last)


@st.composite
def conversations(draw: Any) -> List[Valid]:
    """Make requests for one connection; only the last may end it."""
    requests = draw(st.lists(valid_requests().filter(lambda request: not request.closes), max_size=4))
    version, closes = draw(st.sampled_from([(b"1.1", False), (b"1.1", False), (b"1.1", True), (b"1.0", True)]))
    return [*requests, draw(valid_requests(version, closes))]


SIZES = st.lists(st.integers(1, 70), max_size=5)  # of the reads, over and over; none reads all
NEXT = b"GET /next"  # what follows a body on its connection


# == Mutated requests ==

SIGNS = [b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b";", b"0", b"1", b"+", b"-", b"_", b"0x", b"\xff"]
WORDS = [
    *SIGNS, b"\r\n\r\n", b",", b"=", b"\"", b".", b"/", b"?", b"%", b"\x0b", b"\x0c", b"\x1c", b"\x7f", b"\x80", b"\x85", b"\xa0",
    b"\xc2\xb2", b"\xd9\xa3", b"a", b"F", b"g", b"2", b"7", b"9", b"00000000000000000", b"99999999999", b"ffffffffffffffff",
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"content-length:\t3 \r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding:\x0bchunked\r\n", b"chunked", b", chunked", b"gzip, ", b"Host: y\r\n",
    b"Connection: close\r\n", b"Expect: 100-continue\r\n", b" folded\r\n", b"\tfolded\r\n", b"x y: z\r\n", b"x : y\r\n", b":\r\n",
    b"0\r\n\r\n", b"0\r\n", b"5\r\nhello\r\n", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1", b"PUT ", b"GET ", b"http://h",
    b"PUT /b/inserted HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\nContent-Length: 40\r\n\r\nPUT /b/inner HTTP/1.1\r\nHost: x\r\n\r\n",
]
ROWS_OF_WORDS = st.lists(st.sampled_from(WORDS), max_size=12).map(b"".join)
PLACES = re.compile(rb"\r\n|[:;, \t/]|(?<=\n)[0-9A-Fa-f]+(?=[;\r ])|(?<=: )[0-9]+")  # where readers may differ
SMALL_BODIES = st.one_of(st.just(b"hello"), st.binary(max_size=12))


@st.composite
def small_requests(draw: Any) -> bytes:
    """Make a plain request, or two, so that mutations hit what frames them."""
    wire = b""
    for number in range(draw(st.integers(1, 3))):
        body = draw(SMALL_BODIES)
        if draw(st.booleans()):
            fields, content = b"Transfer-Encoding: chunked\r\n", draw(chunked(body))
        else:
            fields, content = b"Content-Length: %d\r\n" % len(body), body
        extra = draw(st.sampled_from([b"", b"", b"x: y\r\n", b"Connection: keep-alive\r\n"]))
        method = draw(st.sampled_from([b"PUT", b"PUT", b"PUT", b"GET", b"POST"]))
        wire += b"%b /b/%d HTTP/1.1\r\nHost: x\r\n%b%b\r\n%b" % (method, number, extra, fields, content)
    return wire


CORPUS = sorted({case.data for case in CASES if len(case.data) < 2000 and not re.search(b"HEAD|/download", case.data)})


@st.composite
def mutants(draw: Any, bases: "st.SearchStrategy[bytes]") -> bytes:
    """Insert, delete, replace, duplicate and swap bytes, mostly where it hurts."""
    data: bytes = draw(bases)
    for _ in range(draw(st.integers(1, 4))):
        marks = [place for match in PLACES.finditer(data) for place in match.span()] or [0]
        is_mark = draw(st.integers(0, 3)) > 0
        start = marks[draw(st.integers(0, len(marks) - 1))] if is_mark else draw(st.integers(0, len(data)))
        end = start + draw(st.sampled_from([0, 0, 1, 1, 2, 3, 9, 30]))
        kind = draw(st.sampled_from(["insert", "insert", "delete", "replace", "replace", "duplicate", "swap", "line"]))
        word = draw(st.sampled_from(draw(st.sampled_from([SIGNS, WORDS])))) if kind in ("insert", "replace") else b""
        if kind == "duplicate":
            word = 2 * data[start:end]
        elif kind == "swap":
            word = data[start:end][::-1]
        elif kind == "line":
            start, end = data.rfind(b"\n", 0, start) + 1, (data.find(b"\n", start) + 1) or len(data)
            word = 2 * data[start:end]
        data = data[:start] + word + data[start if kind == "insert" else end:]
    return data


class Sent(NamedTuple):
    """Bytes for a connection, where they are cut, and whether the client says at once that there will be no more."""

    data: bytes
    shares: List[float]
    ends: bool


# == A runtime that tells what it got ==

TELLER = HEAD + '''
import hashlib, json

class Teller(HTTPMultiThreadedServer):
    calls = 0

    def transform(self, data, path, etl_args):
        self.calls += 1
        return json.dumps([self.calls, path, hashlib.sha256(data).hexdigest()]).encode()
'''
ERRORS_THAT_GO_ON = (400, 404, 405, 426, 501)  # of requests that are framed, but mean nothing here
REFUSALS = (400, 404, 405, 411, 413, 426, 431, 501, 505)


def content_of(path: bytes) -> bytes:
    """Make the object of a raw path."""
    return b"object " + unquote_to_bytes(path)


def tell_object(request: Recorded) -> Behaviour:
    """Answer as a target each of whose objects holds its own name, unquoted."""
    assert request.method == "GET" and request.target.startswith(BASE_PATH), request
    return Behaviour(200, body=content_of(request.target[len(BASE_PATH):].encode("latin-1")))


def is_of(answer: Answer, path: bytes, data: bytes) -> bool:
    """Tell whether the class got this path and these data."""
    got: List[str] = json.loads(answer.body)[1:]
    return got == [path.decode("latin-1"), hashlib.sha256(data).hexdigest()]


class Echo:
    """The running runtime, and how it is talked to."""

    def __init__(self, server: Server, target: StandInTarget) -> None:
        self.server = server
        self._target = target
        self._calls = self._count()
        self.outcomes: Counter[int] = collections.Counter()

    def _count(self) -> int:
        """Ask how often the class was called, this call among them."""
        answer = self.server.request("PUT", "/b/count")
        assert answer.status == 200, "the server does not answer any more: %s" % (answer,)
        return int(json.loads(answer.body)[0])

    @contextlib.contextmanager
    def watched(self, answers: List[Answer]) -> Iterator[None]:
        """Check that the class was called once for each answer with a result, and that nothing failed unseen."""
        try:
            yield
            self.outcomes.update(answer.status for answer in answers)
        finally:
            before, self._calls = self._calls, self._count()
            made, results = self._calls - before - 1, sum(map(is_result, answers))
            lines = list(self.server.lines)
            del self.server.lines[:-20]  # it has one for each refusal
            self._target.requests.clear()
        assert not any("Traceback" in line for line in lines), lines
        assert made == results, "the class was called %d times for %d results" % (made, results)

    def check_valid(self, value: Tuple[List[Valid], List[float]]) -> None:
        """Every request is answered once, in order, right to the byte."""
        requests, shares = value
        answers: List[Answer] = []
        with self.watched(answers), self.server.connect() as connection:
            client = Client(connection)
            client.send(cut(b"".join(request.wire for request in requests), shares))
            for request in requests:
                answer = client.answer()
                while answer and answer.status == 100:
                    answer = client.answer()
                assert answer, "the connection was closed"
                answers.append(answer)
                assert says_close(answer) == request.closes, answer
                if request.method == "POST":
                    assert (answer.status, answer.fields["allow"]) == (405, "GET, PUT"), answer
                else:
                    data = request.body if request.method == "PUT" else content_of(request.path)
                    assert answer.status == 200 and is_of(answer, request.path, data), (answer, request)
            client.send([], ends=not requests[-1].closes)
            assert client.stream.read() == b""

    def check_mutant(self, value: Sent) -> None:
        """What is answered with a result is framed by others too; what is not is refused, once, and the connection ends."""
        requests, left = frame_all(value.data)
        answers: List[Answer] = []
        with self.watched(answers), self.server.connect() as connection:
            client = Client(connection)
            client.send(cut(value.data, value.shares), value.ends)
            has_ended = value.ends
            while not answers or not says_close(answers[-1]):
                if len(answers) == len(requests) and not has_ended:
                    client.send([], ends=True)  # no other answer is due
                    has_ended = True
                answer = client.answer()
                if answer is None:
                    assert has_ended, "the connection was closed without a word, behind %s" % answers
                    break
                if answer.status != 100:
                    answers.append(answer)
            else:
                with contextlib.suppress(ConnectionResetError):  # a client that sends on may be cut off
                    assert client.stream.read(1) == b"", "another answer came behind %s" % answers[-1:]
        if len(answers) > len(requests) and answers[-1].status == 200:
            # It is that of a GET, and came before the body was read, which cannot be read past.
            head = re.sub(rb"(?i)\r\n(?:transfer-encoding|content-length):[^\r\n]*", b"", left.partition(b"\r\n\r\n")[0])
            early = frame(head + b"\r\n\r\n")
            assert early.method == b"GET" and says_close(answers[-1]), answers
            check_result(early, answers.pop())
        check_answers(requests, answers)


def is_result(answer: Answer) -> bool:
    """Tell whether an answer is the class's."""
    return answer.status == 200 and answer.body != b"Running"


def says_close(answer: Answer) -> bool:
    """Tell whether an answer is the last one."""
    return answer.fields.get("connection", "") == "close"


def check_answers(requests: Sequence[Framed], answers: Sequence[Answer]) -> None:
    """Compare answers with the requests that were framed for them; at most one more may come, and end all."""
    for request, answer in zip(requests, answers):
        assert answer.status == 200 or answer.status in REFUSALS, answer
        if answer.status == 200:
            check_result(request, answer)
            # a body that comes with a GET is not read
            assert says_close(answer) == request.wants_close or request.method == b"GET", answer
        else:
            assert says_close(answer) or answer.status in ERRORS_THAT_GO_ON, answer
            assert "detail" in json.loads(answer.body), answer
    others = answers[len(requests):]
    assert not others or (len(others) == 1 and others[0].status in REFUSALS and says_close(others[0])), (
        "answers to what nobody else takes for a request: %s" % others)
    assert len(answers) >= len(requests) or (answers and says_close(answers[-1])), "%d of %d requests were answered" % (
        len(answers), len(requests))


def check_result(request: Framed, answer: Answer) -> None:
    """Check that the class got what others take for the request."""
    target = re.sub(rb"(?i)\Ahttps?://[^/?#]*", b"", request.target)
    if answer.body == b"Running":
        assert request.method == b"GET" and target.split(b"?")[0] == b"/health", request
        return
    path = json.loads(answer.body)[1].encode("latin-1")
    assert target == path or target.startswith(path + b"?"), (answer, request)
    if request.method == b"PUT":
        assert is_of(answer, path, request.body), (answer, request)
    elif b"?" not in target:
        assert is_of(answer, path, content_of(target)), (answer, request)


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    """A runtime of one worker, whose class counts its calls and tells what it was called with."""
    target = StandInTarget()
    target.default = tell_object
    env = {"ETL_CLASS_PAYLOAD": make_payload(TELLER, "Teller"), "NUM_WORKERS": "1", "AIS_TARGET_URL": target.url}
    with contextlib.closing(target), Runtime(env=env) as server:
        echo = Echo(server, target)
        yield echo
        print("statuses: %s" % dict(echo.outcomes))
    assert target.complaints == []


# == Over the wire ==


def test_valid_requests_are_answered_once_in_order_and_to_the_byte(echo: Echo) -> None:
    explore("valid", 150, st.tuples(conversations(), CUTS), echo.check_valid)
    assert set(echo.outcomes) == {200, 405}


def test_mutated_requests_are_framed_as_others_frame_them_or_refused(echo: Echo) -> None:
    echo.check_mutant(Sent(b"PUT /b/o HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n", [], ends=True))
    bases = st.one_of(small_requests(), st.sampled_from(CORPUS))
    explore("mutated", 1000, st.builds(Sent, mutants(bases), CUTS, st.booleans()), echo.check_mutant)


# == In process ==


def test_any_bytes_are_a_head_by_the_grammar_or_refused() -> None:
    def check(data: bytes) -> None:
        try:
            head = parse_head(data)
            body_of(head, input_of([]))
        except RequestError as error:
            assert error.status in (400, 431, 501, 505), error
            return
        length = min(int(head.fields.get("content-length", 0)), 1 << 16)
        body = b"0\r\n\r\n" if "transfer-encoding" in head.fields else bytes(length)
        try:
            request = frame(data + b"\r\n" + body)
        except Incomplete:  # the body, of an absurd size
            return
        joined: Dict[str, str] = {}
        for name, value in ((name.decode(), value.decode("latin-1")) for name, value in request.fields):
            joined[name] = "%s, %s" % (joined[name], value) if name in joined else value
        assert (head.method.encode(), head.target.encode("latin-1")) == (request.method, request.target)
        assert dict(head.fields) == joined

    whole = valid_requests().map(lambda request: request.wire.lstrip(b"\r\n"))
    heads = st.one_of(small_requests(), whole).map(lambda data: data.partition(b"\r\n\r\n")[0] + b"\r\n")
    explore("heads", 500, st.one_of(heads, mutants(heads), ROWS_OF_WORDS, st.binary(max_size=60)), check)


def test_bodies_are_read_to_their_last_byte_or_refused_in_any_pieces() -> None:
    def check(value: Tuple[Tuple[bytes, Optional[int], bytes], int, List[float], List[int], bool]) -> None:
        (body, length, wire), missing, shares, sizes, is_ahead = value
        is_cut = bool(missing and wire)
        wire = wire[:-missing] if is_cut else wire + NEXT
        expected = None if is_cut else Decoded(body, NEXT)
        assert read_body(cut(wire, shares), sizes if len(body) < 5000 else [], length, is_ahead) == expected

    bodies = st.one_of(BODIES.map(lambda body: (body, len(body), body)),
                       BODIES.flatmap(lambda body: st.tuples(st.just(body), st.none(), chunked(body))))
    missing = st.sampled_from([0, 0, 0, 1, 2, 50])
    explore("bodies", 400, st.tuples(bodies, missing, CUTS, SIZES, st.booleans()), check)


def test_mutated_chunks_are_chunks_by_the_grammar_or_refused() -> None:
    def check(value: Tuple[bytes, List[float], List[int]]) -> None:
        wire, shares, sizes = value
        expected: Optional[Decoded] = None
        with contextlib.suppress(Refused, Incomplete):
            expected = decode_chunks(wire)
        assert read_body(cut(wire, shares), sizes) == expected

    signs = st.sampled_from([b"", b"", *SIGNS])
    sizes = st.tuples(signs, signs).map(b"%b5%b\r\nhello\r\n0\r\n\r\n".__mod__)
    ends = st.tuples(signs, signs, signs).map(b"5\r\nhello%b\r\n%b0%b\r\n\r\n".__mod__)
    wires = st.one_of(mutants(SMALL_BODIES.flatmap(chunked)), ROWS_OF_WORDS, sizes, ends)
    explore("mutated chunks", 600, st.tuples(wires, CUTS, SIZES), check)


def test_a_client_is_invited_once_and_only_when_its_body_is_waited_for() -> None:
    for is_ahead in (False, True):
        invitations: List[str] = []
        source = input_of([b"hel", b"l", b"o"])
        if is_ahead:
            source.need(5)
        source.invite = lambda: invitations.append("100")
        assert BoundedReader(source, 5).readall() == b"hello"
        assert invitations == ([] if is_ahead else ["100"])


TARGET_WORDS = [
    b"/", b"//", b"/health", b"/ws", b"/download", b"/b/o", b"?", b"&", b"=", b"%", b"%2F", b"%zz", b"%ff", b"+", b"#", b";",
    b"*", b"..", b"etl_fqn=", b"etl_args=", b"latest-ver=true", b"original_url=", b"object_to=", b"http://", b"HTTPS://h:1",
    b"[::1]", b"\xff", b"\xc3",
]


def test_any_target_means_a_request_or_an_error() -> None:
    def check(value: Tuple[str, bytes, bytes]) -> None:
        method, target, pipeline = value
        try:
            request = ETLRequest.parse(method, target.decode("latin-1"), pipeline.decode("latin-1"))
        except RequestError as error:
            assert error.status in (400, 404, 405), error
            return
        path = request.raw_path.encode("latin-1")
        origin = target if target.startswith(b"/") else re.sub(rb"(?i)\Ahttps?://[^/?#]*", b"", target)
        assert origin == path or origin.startswith(path + b"?")
        assert path.startswith(b"/") and path.strip(b"/")
        if not (request.raw_path in ("/download", "/ws")):  # /ws names no object
            decoded = request.decoded_path("surrogateescape")
            assert b"/" + decoded.encode("utf-8", "surrogateescape") == unquote_to_bytes(path)
        assert isinstance(request.decoded_path(), str) and isinstance(request.name, str)

    methods = st.one_of(st.sampled_from(["PUT", "GET", "POST", "DELETE", "put"]), TOKENS)
    parts = st.one_of(st.sampled_from(TARGET_WORDS), st.binary(max_size=3))
    targets = st.one_of(st.binary(max_size=40), st.lists(parts, max_size=9).map(b"".join))
    explore("targets", 500, st.tuples(methods, targets, st.binary(max_size=20)), check)
