"""HTTP as bytes: each request of the corpus gets the answers that its file tells, in whatever pieces it comes.

`tests/requests/README.md` describes the corpus; a case is added there, not here. The second half reads heads and bodies over a
socket pair, cut in every way.
"""
import contextlib
import fcntl
import json
import random
import re
import socket
import struct
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ais_runtime_min import (HEAD_LIMIT_FIELDS, BoundedReader, ChunkedReader, ConnectionInput, MessageBody, ShortBody,
                             UnframedRequest, parse_head)
from harness import Runtime, Server, make_payload
from standin import StandInTarget

CORPUS = Path(__file__).resolve().parent / "requests"
WAIT_SECONDS = 2.0  # nothing here computes: an answer that takes longer does not come
PAUSE_SECONDS = 0.0003  # between pieces, so that most are received one by one
BYTEWISE_LIMIT_BYTES = 400  # longer requests would take too long byte by byte
PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
NEXT = b"GET /next"  # what follows a body on its connection

RECORDER = '''
import json
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Recorder(HTTPMultiThreadedServer):
    def __init__(self):
        super().__init__()
        self.calls = []

    def transform(self, data, path, etl_args):
        if path == "/recorder/calls":
            calls, self.calls = self.calls, []
            return json.dumps(calls).encode()
        self.calls.append([path, data.decode("latin-1")])
        return data
'''
STREAMER = '''
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Streamer(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        for piece in iter(lambda: reader.read(4), b""):
            yield piece
'''


# == The corpus ==


@dataclass(frozen=True)
class Case:
    """A request, or several behind each other, and what must become of it."""

    name: str
    file: str
    answers: Tuple[FrozenSet[int], ...]  # for each answer the statuses that will do
    connection: str
    calls: Tuple[Tuple[str, str], ...]  # path and body, one character a byte
    client_ends: bool
    data: bytes

    @property
    def keeps(self) -> bool:
        """Whether the connection must be good for another request."""
        return self.connection == "kept" and not self.client_ends


ESCAPES = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\"}
ESCAPE = re.compile(r"\\\{(?P<count>\d+) x (?P<text>[^{}]*)\}|\\x(?P<hex>[0-9a-f]{2})|\\(?P<letter>[rnt0\\])|(?P<plain>[^\\])")


def unescape(text: str) -> bytes:
    """Turn the notation of the corpus into bytes."""
    made, end = bytearray(), 0
    while end < len(text):
        match = ESCAPE.match(text, end)
        assert match, "not an escape: %r" % text[end:end + 20]
        end = match.end()
        if match["count"]:
            made += int(match["count"]) * unescape(match["text"])
        elif match["hex"]:
            made.append(int(match["hex"], 16))
        else:
            made += ESCAPES[match["letter"]] if match["letter"] else match["plain"].encode("ascii")
    return bytes(made)


def called(text: str) -> Tuple[str, str]:
    """Read path and body of a `called:` line."""
    path, _, body = text.partition(" ")
    return unescape(path).decode("latin-1"), unescape(body).decode("latin-1")


def read_case(text: str, file: str) -> Case:
    """Read one case, from behind the `== ` that begins it."""
    head, _, data = text.partition("\n\n")
    name, *lines = head.splitlines()
    pairs = [tuple(line.split(": ", 1)) for line in lines if not line.startswith("#")]
    known = {key: value for key, value in pairs}
    assert set(known) <= {"answers", "connection", "called", "client"}, "%s: %s" % (name, sorted(known))
    words = [] if known["answers"] == "none" else known["answers"].split()
    connection = known.get("connection", "kept")
    assert connection in ("kept", "closed", "dropped", "any") and known.get("client", "ends") == "ends", name
    return Case(
        name, file, tuple(frozenset(map(int, word.split("|"))) for word in words), connection,
        tuple(called(value) for key, value in pairs if key == "called"), "client" in known, unescape(data.replace("\n", "")),
    )


def read_corpus() -> List[Case]:
    """Read all files."""
    files = sorted(CORPUS.glob("*.http"))
    return [read_case(part, file.stem) for file in files for part in file.read_text("ascii").split("== ")[1:]]


def cases(corpus: Sequence[Case]) -> "pytest.MarkDecorator":
    """Run a test for each of these cases, under their names."""
    return pytest.mark.parametrize("case", corpus, ids=["%s: %s" % (case.file, case.name) for case in corpus])


CASES = read_corpus()
MALFORMED_BODIES = [case for case in CASES if case.file == "chunks" and case.connection == "closed" and b"PUT" in case.data]


# == Talking ==


class Answer(NamedTuple):
    """An answer that came whole; the names of its fields are in lower case."""

    status: int
    fields: Dict[str, str]
    body: bytes


class Cut(Exception):
    """The connection ended within an answer; the text is what came of it."""


class Client:
    """One connection, and a strict reader of what comes back: it shares no code with the server."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.settimeout(WAIT_SECONDS)
        self.received = b""

    def send(self, pieces: Sequence[bytes]) -> None:
        """Send pieces, each as a packet; a server may have closed before it got them all."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number, piece in enumerate(pieces):
                if number:
                    time.sleep(PAUSE_SECONDS)
                self.connection.sendall(piece)

    def send_end(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def answer(self, has_content: bool = True) -> Optional[Answer]:
        """Read the next answer, None where the connection has ended."""
        if not self.received and not self._receive():
            return None
        head = self._until(b"\r\n\r\n")
        match = re.fullmatch(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]+((?:\r\n[A-Za-z-]+: [ -~]*)*)", head)
        assert match, "not the head of an answer: %r" % head
        pairs = [line.split(": ", 1) for line in match[2].decode().split("\r\n")[1:]]
        fields = {name.lower(): value for name, value in pairs}
        assert len(fields) == len(pairs), "a field comes twice: %r" % head
        status = int(match[1])
        return Answer(status, fields, self._body(fields) if has_content and status != 204 and status >= 200 else b"")

    def rest(self) -> bytes:
        """Read what comes until the server closes."""
        while self._receive():
            pass
        return self.received

    def _body(self, fields: Dict[str, str]) -> bytes:
        if "transfer-encoding" not in fields:
            return self._exactly(int(fields["content-length"]))
        assert fields["transfer-encoding"] == "chunked" and "content-length" not in fields, fields
        body, size = b"", -1
        while size:
            size = int(self._until(b"\r\n"), 16)
            body += self._exactly(size)
            assert self._exactly(2) == b"\r\n"
        return body

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            if not self._receive():
                raise Cut(self.received)
        line, _, self.received = self.received.partition(mark)
        return line

    def _exactly(self, size: int) -> bytes:
        while len(self.received) < size:
            if not self._receive():
                raise Cut(self.received)
        data, self.received = self.received[:size], self.received[size:]
        return data

    def _receive(self) -> bool:
        try:
            data = self.connection.recv(1 << 16)
        except socket.timeout:
            raise AssertionError("nothing more came within %.0f s, and the server has not closed" % WAIT_SECONDS) from None
        self.received += data
        return bool(data)


def read_answers(client: Client, case: Case, times: int) -> List[Answer]:
    """Read as many answers as the case must have; an invitation is none."""
    answers: List[Answer] = []
    may_invite = b"\nexpect:" in case.data.lower()
    while len(answers) < times * len(case.answers):
        answer = client.answer(has_content=not case.data.startswith(b"HEAD"))
        assert answer, "the connection ended after %d answers" % len(answers)
        if answer.status != 100 or not may_invite:
            answers.append(answer)
    return answers


def check_connection(client: Client, case: Case, answers: Sequence[Answer]) -> None:
    """Check that no other answer comes, and that the connection is what it must be, and was said to be."""
    says_close = bool(answers) and answers[-1].fields.get("connection", "").lower() == "close"
    if case.keeps or (case.connection == "any" and not says_close):
        assert not says_close, "a connection that must be kept is said to be closed"
        client.send([PROBE])
        probe = client.answer()
        assert probe and (probe.status, probe.body) == (200, b"Running"), "behind the answers came %s" % (probe,)
    else:
        assert client.rest() == b"", "behind the answers came more"
        could_not_say = case.client_ends or case.connection == "dropped"
        assert says_close or could_not_say, "the connection was closed, and no answer had said so"


def calls_since(server: Server) -> List[List[str]]:
    """Ask the class, on a connection of its own, what it was called with since it was last asked, and for its health."""
    with server.connect() as connection:
        client = Client(connection)
        client.send([b"PUT /recorder/calls HTTP/1.1\r\nHost: x\r\n\r\n" + PROBE])
        calls, health = client.answer(), client.answer()
    assert calls and health and health.status == 200, "the server does not answer any more: %s" % (health,)
    made: List[List[str]] = json.loads(calls.body)
    return made


def replay(server: Server, case: Case, pieces: Sequence[bytes], times: int = 1) -> None:
    """Send a case, `times` over, in these pieces, and check all that its file tells."""
    with server.connect() as connection:
        client = Client(connection)
        client.send(pieces)
        if case.client_ends:
            client.send_end()
        answers = read_answers(client, case, times)
        for answer, statuses in zip(answers, times * case.answers):
            assert answer.status in statuses, answer
            assert (answer.status >= 400) == ("detail" in answer.body.decode("latin-1")) or case.data.startswith(b"HEAD"), answer
        check_connection(client, case, answers)
    bodies = [answer.body.decode("latin-1") for answer in answers if answer.status == 200 and answer.body != b"Running"]
    assert bodies == [body for _, body in times * case.calls]
    assert calls_since(server) == times * [list(call) for call in case.calls]


@pytest.fixture(scope="module")
def target() -> Iterator[StandInTarget]:
    """A target that has no objects; it complains of what is no HTTP."""
    standin = StandInTarget()
    yield standin
    standin.close()
    assert standin.complaints == []


@pytest.fixture(scope="module")
def recorder(target: StandInTarget) -> Iterator[Server]:
    """A runtime whose class records its calls and gives each object back."""
    env = {"ETL_CLASS_PAYLOAD": make_payload(RECORDER, "Recorder"), "NUM_WORKERS": "1", "AIS_TARGET_URL": target.url}
    with Runtime(env=env) as server:
        yield server


@pytest.fixture(scope="module")
def streamer(target: StandInTarget) -> Iterator[Server]:
    """A runtime whose class gives each object back as it comes."""
    env = {"ETL_CLASS_PAYLOAD": make_payload(STREAMER, "Streamer"), "NUM_WORKERS": "1", "AIS_TARGET_URL": target.url}
    with Runtime(env=env) as server:
        yield server


def pieces_of(data: bytes, places: Sequence[int]) -> List[bytes]:
    """Cut bytes at these places, which are in order and may repeat; no piece is empty."""
    bounds = [0, *places, len(data)]
    return [data[start:end] for start, end in zip(bounds, bounds[1:]) if start < end]


# == Requests from the wire ==


def test_the_corpus_names_no_case_twice_and_is_large() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 120


@cases(CASES)
def test_a_request_in_one_piece_gets_its_answers(recorder: Server, case: Case) -> None:
    replay(recorder, case, [case.data])


@cases(CASES)
def test_a_request_line_by_line_gets_the_same(recorder: Server, case: Case) -> None:
    replay(recorder, case, re.findall(rb"[^\n]*\n|[^\n]+", case.data))


@cases([case for case in CASES if len(case.data) <= BYTEWISE_LIMIT_BYTES])
def test_a_request_byte_by_byte_gets_the_same(recorder: Server, case: Case) -> None:
    replay(recorder, case, [case.data[place:place + 1] for place in range(len(case.data))])


@cases(CASES)
def test_a_request_in_random_pieces_gets_the_same(recorder: Server, case: Case) -> None:
    chance = random.Random(case.name)
    for _ in range(3):
        places = sorted(chance.randrange(len(case.data)) for _ in range(chance.randrange(1, 12)))
        replay(recorder, case, pieces_of(case.data, places))


@cases([case for case in CASES if case.keeps])
def test_a_request_twice_in_one_go_gets_its_answers_twice(recorder: Server, case: Case) -> None:
    replay(recorder, case, [2 * case.data], times=2)


@cases(MALFORMED_BODIES)
def test_a_stream_of_a_malformed_body_never_looks_whole(streamer: Server, case: Case) -> None:
    with streamer.connect() as connection:
        client = Client(connection)
        client.send([case.data])
        if case.client_ends:
            client.send_end()
        with contextlib.suppress(Cut):
            answer = client.answer()
            assert answer and answer.status == 400, answer
        client.received = b""
        assert client.rest() == b""


# == Heads ==

TOKENS = st.text("!#$%&'*+-.^_`|~09azAZ", min_size=1, max_size=12)
TARGETS = st.binary(min_size=1, max_size=30).map(lambda data: bytes(byte for byte in data if byte > 32 and byte != 127) or b"/")
VALUES = st.binary(max_size=30).map(lambda data: bytes(byte for byte in data if byte >= 32 and byte != 127).strip(b" \t"))
WORDS_OF_HEADS = st.sampled_from([
    b"GET", b"PUT", b" ", b"  ", b"\t", b"/", b"/a?b", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"\r\n", b"\r", b"\n", b"\0",
    b"Host", b"host", b":", b": ", b" :", b"x", b"Content-Length", b"5", b"Transfer-Encoding", b"chunked", b"\xff", b"\x7f",
    b"\x0b", b"(", b",",
])
QUICK = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(QUICK, max_examples=400)


@QUICK
@given(st.one_of(st.binary(max_size=200), st.lists(WORDS_OF_HEADS, max_size=30).map(b"".join)))
@example(b"")
@example(b"GET / HTTP/1.1\r\nHost: x")
@example(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
def test_any_bytes_are_a_head_or_an_unframed_request(data: bytes) -> None:
    try:
        head = parse_head(data)
    except UnframedRequest as error:
        assert error.status in (400, 431, 505)
        return
    assert not re.search("[\x00-\x20\x7f]", head.target + head.method)
    assert head.is_http_1_0 or "host" in head.fields
    for name, value in head.fields.items():
        assert re.fullmatch("[!#$%&'*+.^_`|~0-9a-z-]+", name), name
        assert not re.search("[\x00-\x08\x0a-\x1f\x7f]", value) and value == value.strip(" \t"), value


@QUICK
@given(TOKENS, TARGETS, st.lists(st.tuples(TOKENS, VALUES), max_size=12, unique_by=lambda pair: pair[0].lower()), st.booleans())
def test_a_head_is_read_as_it_was_written(
    method: str, target: bytes, pairs: List[Tuple[str, bytes]], is_http_1_0: bool
) -> None:
    pairs = [("Host", b"x"), *((name, value) for name, value in pairs if name.lower() != "host")]
    lines = b"".join(b"%b: \t%b \r\n" % (name.encode(), value) for name, value in pairs)
    head = parse_head(b"%b %b HTTP/1.%d\r\n%b" % (method.encode(), target, not is_http_1_0, lines))
    assert (head.method, head.target.encode("latin-1"), head.is_http_1_0) == (method, target, is_http_1_0)
    assert {name: value.encode("latin-1") for name, value in head.fields.items()} == {
        name.lower(): value for name, value in pairs}


@pytest.mark.parametrize("count, is_taken", [(0, True), (HEAD_LIMIT_FIELDS - 1, True), (HEAD_LIMIT_FIELDS, False)])
def test_the_number_of_fields_has_a_limit(count: int, is_taken: bool) -> None:
    data = b"GET / HTTP/1.1\r\nHost: x\r\n" + count * b"x: y\r\n"
    with contextlib.nullcontext() if is_taken else pytest.raises(UnframedRequest):
        assert parse_head(data).fields["host"] == "x"


# == Bodies ==

SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=8)  # of the reads, over and over
CUTS = st.lists(st.floats(0, 1), max_size=12)  # where the bytes are cut, as shares of all


def has_unread(receiver: socket.socket) -> bool:
    """Tell whether bytes wait in a socket's buffer."""
    unread: int = struct.unpack("i", fcntl.ioctl(receiver, termios.FIONREAD, b"\0\0\0\0"))[0]
    return unread > 0


@contextlib.contextmanager
def receiving(data: bytes, cuts: Sequence[float] = ()) -> Iterator[ConnectionInput]:
    """Make an input that receives `data` cut in pieces, each when all before it is received, and then its end."""
    ours, theirs = socket.socketpair()
    pieces = pieces_of(data, sorted(int(cut * len(data)) for cut in cuts))
    is_over = threading.Event()

    def send() -> None:
        for piece in pieces:
            while has_unread(ours) and not is_over.is_set():
                time.sleep(0)
            with contextlib.suppress(BrokenPipeError):
                theirs.sendall(piece)
        theirs.shutdown(socket.SHUT_WR)

    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(WAIT_SECONDS), 0))
        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield ConnectionInput(ours)
        finally:
            is_over.set()
            ours.shutdown(socket.SHUT_RD)
            sender.join()


def read_by(reader: MessageBody, sizes: Sequence[int]) -> bytes:
    """Read to the end by these sizes, over and over."""
    data = b""
    number = 0
    while True:
        piece = reader.read(sizes[number % len(sizes)])
        if not piece:
            return data
        data += piece
        number += 1


def everything_left(source: ConnectionInput) -> bytes:
    """Read what an input receives until its end."""
    while source.fill():
        pass
    return source.take(source.ahead)


def in_chunks(body: bytes, places: Sequence[int]) -> bytes:
    """Frame a body in chunks."""
    chunks = pieces_of(body, sorted(place % (len(body) + 1) for place in places))
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


@QUICK
@given(st.binary(max_size=300), CUTS, SIZES)
def test_a_body_with_a_length_is_the_same_in_any_pieces(body: bytes, cuts: List[float], sizes: List[int]) -> None:
    with receiving(body + NEXT, cuts) as source:
        reader = BoundedReader(source, len(body))
        assert read_by(reader, sizes) == body
        assert reader.is_at_end and everything_left(source) == NEXT


@QUICK
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8), CUTS, SIZES)
def test_a_body_in_chunks_is_the_same_in_any_pieces(
    body: bytes, places: List[int], cuts: List[float], sizes: List[int]
) -> None:
    with receiving(in_chunks(body, places) + NEXT, cuts) as source:
        reader = ChunkedReader(source)
        assert read_by(reader, sizes) == body
        assert reader.is_at_end and everything_left(source) == NEXT


@pytest.mark.parametrize("ahead", [0, 1, 100, 5000])
def test_a_body_is_the_same_read_in_one_go(ahead: int) -> None:
    body = bytes(range(256)) * 1000
    for framed, size in ((body, len(body)), (in_chunks(body, [1, 2, 70000]), None)):
        with receiving(framed + NEXT, [ahead / len(framed), 0.3, 0.31, 0.9]) as source:
            if ahead:
                source.fill()
            reader: Union[BoundedReader, ChunkedReader] = ChunkedReader(source)
            if size is not None:
                reader = BoundedReader(source, size)
            assert reader.read() == body
            assert reader.is_at_end and everything_left(source) == NEXT


@QUICK
@given(st.binary(min_size=1, max_size=100), st.floats(0, 0.999), CUTS)
def test_a_body_that_ends_early_is_short_wherever_it_ends(body: bytes, share: float, cuts: List[float]) -> None:
    framed = in_chunks(body, [3, 50])
    with receiving(body[:int(share * len(body))], cuts) as source, pytest.raises(ShortBody):
        BoundedReader(source, len(body)).read()
    with receiving(framed[:int(share * len(framed))], cuts) as source, pytest.raises(ShortBody):
        ChunkedReader(source).read()


def decode_chunks(data: bytes) -> Optional[Tuple[bytes, bytes]]:
    """Decode a whole chunked body by the grammar of RFC 9112, 7.1: the body and what follows it, None if it is none."""
    body = b""
    while True:
        line = re.match(rb"([0-9A-Fa-f]{1,16})([ \t]*;[^\r\n\0]*)?\r\n", data)
        if not line:
            return None
        size, data = int(line[1], 16), data[line.end():]
        if not size:
            end = re.match(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*\r\n", data)
            return (body, data[end.end():]) if end else None
        if data[size:size + 2] != b"\r\n":
            return None
        body, data = body + data[:size], data[size + 2:]


WORDS_OF_CHUNKS = st.sampled_from([
    b"0", b"1", b"2", b"A", b"a", b"f", b"00", b"\r\n", b"\r\n", b"\r\n", b"\r", b"\n", b";x", b" ;", b"X: y", b":", b"+", b"-",
    b"_", b"0x",
    b"1\r\nz\r\n", b"2\r\nzz\r\n", b"0\r\n", b"0\r\n\r\n", b"\0", b"fffffffffffffffff",
])


@THOROUGH
@given(st.one_of(st.lists(WORDS_OF_CHUNKS, max_size=14).map(b"".join), st.binary(max_size=40)), CUTS)
@example(b"1\r\nz\r\n0\r\nX: y\r\n\r\n", [])
@example(b"zz\r\n\r\n0\r\n\r\n", [0.5])
def test_any_bytes_are_chunks_by_the_grammar_or_refused(data: bytes, cuts: List[float]) -> None:
    expected = decode_chunks(data)
    with receiving(data, cuts) as source:
        reader = ChunkedReader(source)
        if expected is not None:
            assert (reader.read(), everything_left(source)) == expected
        else:
            with pytest.raises((UnframedRequest, ShortBody)):
                reader.read()
            left = source.ahead
            reader.drain(1 << 20, time.monotonic() + 5)
            assert source.ahead == left, "a malformed body cannot be read past: where it ends is not known"
            assert reader.failure is not None


@QUICK
@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=8), CUTS)
def test_a_line_is_the_same_in_any_pieces(lines: List[bytes], cuts: List[float]) -> None:
    with receiving(b"".join(line + b"\n" for line in lines), cuts) as source:
        for line in lines:
            assert source.readline(16) == (line + b"\n")[:16]
            if len(line) >= 16:
                assert source.readline(16) == (line + b"\n")[16:]
        assert source.readline(16) == b""


@pytest.mark.parametrize("is_ahead", [True, False])
def test_an_invitation_is_sent_once_and_only_before_waiting(is_ahead: bool) -> None:
    sent: List[str] = []
    with receiving(b"hello") as source:
        if is_ahead:
            source.fill()
        source.invite = lambda: sent.append("100")
        reader = BoundedReader(source, 5)
        assert read_by(reader, [2]) == b"hello"
    assert sent == ([] if is_ahead else ["100"])
