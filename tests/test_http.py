"""HTTP as bytes: each request of the corpus gets the answers that its file tells, in whatever pieces it comes.

`tests/requests/README.md` describes the corpus; a case is added there, not here.
"""
import contextlib
import json
import random
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest

from harness import Runtime, Server, make_payload
from standin import StandInTarget

CORPUS = Path(__file__).resolve().parent / "requests"
WAIT_SECONDS = 5.0  # nothing here computes: an answer that takes longer does not come
PAUSE_SECONDS = 0.0003  # between pieces, so that most are received one by one
BYTEWISE_LIMIT_BYTES = 400  # longer requests would take too long byte by byte
RANDOM_WAYS = 2  # of cutting each case
PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

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


CASES = read_corpus()


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
    """Send a case, `times` over, in these pieces, and check the answers that its file tells."""
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


@contextlib.contextmanager
def named(case: Case, way: str) -> Iterator[None]:
    """Let a failure name the case and how it was sent."""
    try:
        yield
    except Exception as error:
        raise AssertionError("%r, sent %s: %s" % (case.name, way, error)) from error


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


def ways_of(case: Case) -> Iterator[Tuple[str, List[bytes], int]]:
    """Yield the ways to send a case, the whole first: name, pieces, how many times the case."""
    yield "in one piece", [case.data], 1
    yield "line by line", re.findall(rb"[^\n]*\n|[^\n]+", case.data), 1
    if len(case.data) <= BYTEWISE_LIMIT_BYTES:
        yield "byte by byte", pieces_of(case.data, range(len(case.data))), 1
    chance = random.Random(case.name)
    for _ in range(RANDOM_WAYS):
        places = sorted(chance.randrange(len(case.data)) for _ in range(chance.randrange(1, 12)))
        yield "cut at %s" % places, pieces_of(case.data, places), 1
    if case.keeps:
        yield "twice in one go", [2 * case.data], 2


def test_the_corpus_names_no_case_twice_and_is_large() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 120


@pytest.mark.parametrize("case", CASES, ids=["%s: %s" % (case.file, case.name) for case in CASES])
def test_a_request_gets_its_answers_in_whatever_pieces_it_comes(
    recorder: Server, case: Case
) -> None:
    try:
        for way, pieces, times in ways_of(case):
            with named(case, way):
                replay(recorder, case, pieces, times)
                assert calls_since(recorder) == times * [list(call) for call in case.calls]
    except AssertionError:
        calls_since(recorder)  # those of a case that has failed are not the next one's
        raise


def test_objects_in_one_packet_are_streamed_back_one_after_the_other(streamer: Server) -> None:
    for case in CASES:
        is_small = len(case.data) <= BYTEWISE_LIMIT_BYTES
        if case.keeps and case.calls and is_small and b"HTTP/1.0" not in case.data:
            with named(case, "twice to a streaming class"):
                replay(streamer, case, [2 * case.data], times=2)


def test_a_stream_of_a_malformed_body_never_looks_whole(streamer: Server) -> None:
    for case in CASES:
        is_malformed = case.file == "chunks" and case.connection == "closed" and b"PUT" in case.data
        if is_malformed:
            with named(case, "to a streaming class"):
                check_refused_or_cut(streamer, case)


def check_refused_or_cut(server: Server, case: Case) -> None:
    """Check that the answer tells a failure, by status or a missing end, and is the only one."""
    with server.connect() as connection:
        client = Client(connection)
        client.send([case.data])
        if case.client_ends:
            client.send_end()
        with contextlib.suppress(Cut):
            answer = client.answer()
            assert answer and answer.status == 400, answer
            assert client.rest() == b""
