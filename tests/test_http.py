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
PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
SOURCE = '''
import json
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer

class Recorder(HTTPMultiThreadedServer):
    calls = []

    def transform(self, data, path, etl_args):
        if path == "/recorder/calls":
            calls, self.calls = self.calls, []
            return json.dumps(calls).encode()
        self.calls = [*self.calls, [path, data.decode("latin-1")]]
        return data

class Streamer(HTTPMultiThreadedServer):
    def transform_stream(self, reader, path, etl_args):
        return iter(lambda: reader.read(4), b"")
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


def read_case(text: str, file: str) -> Case:
    """Read one case, from behind the `== ` that begins it."""
    head, _, data = text.partition("\n\n")
    name, *lines = head.splitlines()
    pairs = [tuple(line.split(": ", 1)) for line in lines if not line.startswith("#")]
    known = {key: value for key, value in pairs}
    assert set(known) <= {"answers", "connection", "called", "client"}, "%s: %s" % (name, sorted(known))
    connection = known.get("connection", "kept")
    assert connection in ("kept", "closed", "dropped", "any") and known.get("client", "ends") == "ends", name
    words = [] if known["answers"] == "none" else known["answers"].split()
    answers = tuple(frozenset(map(int, word.split("|"))) for word in words)
    called = [value.partition(" ") for key, value in pairs if key == "called"]
    calls = tuple((unescape(path).decode("latin-1"), unescape(body).decode("latin-1")) for path, _, body in called)
    return Case(name, file, answers, connection, calls, "client" in known, unescape(data.replace("\n", "")))


CASES = [read_case(part, file.stem) for file in sorted(CORPUS.glob("*.http"))
         for part in file.read_text("ascii").split("== ")[1:]]


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
        self.stream = connection.makefile("rb")

    def send(self, pieces: Sequence[bytes], ends: bool = False) -> None:
        """Send pieces, each as a packet, and an end; a server may have closed before it got them all."""
        with contextlib.suppress(OSError):
            for number, piece in enumerate(pieces):
                if number:
                    time.sleep(PAUSE_SECONDS)
                self.connection.sendall(piece)
            if ends:
                self.connection.shutdown(socket.SHUT_WR)

    def answer(self, has_content: bool = True) -> Optional[Answer]:
        """Read the next answer, None where the connection has ended."""
        if not self.stream.peek(1):
            return None
        first, *lines = iter(self._line, b"\r\n")
        match = re.fullmatch(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]+\r\n", first)
        assert match, "not an answer's first line: %r" % first
        fields: Dict[str, str] = {}
        for line in lines:
            assert re.fullmatch(rb"[A-Za-z-]+: [ -~]*\r\n", line), "not a field: %r" % line
            name, _, value = line.decode()[:-2].partition(": ")
            assert name.lower() not in fields, "a field comes twice: %s" % name
            fields[name.lower()] = value
        status = int(match[1])
        has_body = has_content and status != 204 and status >= 200
        return Answer(status, fields, self._body(fields) if has_body else b"")

    def _body(self, fields: Dict[str, str]) -> bytes:
        if "transfer-encoding" not in fields:
            return self._exactly(int(fields["content-length"]))
        assert fields["transfer-encoding"] == "chunked" and "content-length" not in fields, fields
        body, size = b"", -1
        while size:
            size = int(self._line(), 16)
            body += self._exactly(size)
            assert self._line() == b"\r\n"
        return body

    def _line(self) -> bytes:
        line = self.stream.readline()
        if not line.endswith(b"\n"):
            raise Cut(line)
        return line

    def _exactly(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise Cut(data)
        return data


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
        assert client.stream.read() == b"", "behind the answers came more"
        could_not_say = case.client_ends or case.connection == "dropped"
        assert says_close or could_not_say, "the connection was closed, and no answer had said so"


def calls_since(server: Server) -> object:
    """Ask the class what it was called with since it was last asked."""
    return json.loads(server.request("PUT", "/recorder/calls", timeout=WAIT_SECONDS).body)


def replay(server: Server, case: Case, pieces: Sequence[bytes], times: int = 1) -> None:
    """Send a case, `times` over, in these pieces, and check the answers that its file tells."""
    with server.connect() as connection:
        client = Client(connection)
        client.send(pieces, case.client_ends)
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


@contextlib.contextmanager
def served(name: str) -> Iterator[Server]:
    """Serve a class beside a target that has no objects; it complains of what is no HTTP."""
    target = StandInTarget()
    env = {"ETL_CLASS_PAYLOAD": make_payload(SOURCE, name), "NUM_WORKERS": "1", "AIS_TARGET_URL": target.url}
    with Runtime(env=env) as server:
        yield server
    target.close()
    assert target.complaints == []


@pytest.fixture(scope="module")
def recorder() -> Iterator[Server]:
    """A runtime whose class records its calls and gives each object back."""
    with served("Recorder") as server:
        yield server


# == Requests from the wire ==


def ways_of(case: Case) -> Iterator[Tuple[str, List[bytes], int]]:
    """Yield the ways to send a case, the whole first: name, pieces, how many times the case."""
    data = case.data
    yield "in one piece", [data], 1
    yield "line by line", re.findall(rb"[^\n]*\n|[^\n]+", data), 1
    if len(data) <= BYTEWISE_LIMIT_BYTES:
        yield "byte by byte", [data[at:at + 1] for at in range(len(data))], 1
    chance = random.Random(case.name)
    for _ in range(2):
        places = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(chance.randrange(1, 12)))})
        yield "cut at %s" % places, [data[start:end] for start, end in zip(places, places[1:])], 1
    if case.keeps:
        yield "twice in one go", [2 * data], 2


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


def test_a_stream_of_a_malformed_body_never_looks_whole() -> None:
    malformed = [case for case in CASES
                 if case.file == "chunks" and case.connection == "closed" and b"PUT" in case.data]
    with served("Streamer") as server:
        for case in malformed:
            with named(case, "to a streaming class"), server.connect() as connection:
                client = Client(connection)
                client.send([case.data], case.client_ends)
                with contextlib.suppress(Cut):  # else the status must tell the failure
                    answer = client.answer()
                    assert answer and answer.status == 400, answer
                    assert client.stream.read() == b""
