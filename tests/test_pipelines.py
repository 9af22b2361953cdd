"""Chains of stages, of ours and of the SDK's own servers: the object that arrives is right to the byte.

Each stage changes every byte and no length, by an operation that does not commute with the next
one's and depends on `etl_args`. So a result tells which stages an object has passed, in which
order, and whether the arguments reached each of them.
"""
import contextlib
import os
import sys
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional
from urllib.parse import quote

import pytest

from harness import Response, Runtime, SDKServer, Server, make_payload
from standin import StandInTarget
from test_reading import make_object

SOURCE = '''
import os

from aistore.sdk.etl.webserver.%s import %s as Base

def table_of(etl_args):
    number = 1 + sum(etl_args.encode()) %% 255
    if os.environ["STAGE"] == "+":
        return bytes((byte + number) %% 256 for byte in range(256))
    return bytes(byte ^ number for byte in range(256))

class Buffered(Base):
    def transform(self, data, path, etl_args):
        return data.translate(table_of(etl_args))

class Streaming(Base):
    def transform_stream(self, reader, path, etl_args):
        table = table_of(etl_args)
        for piece in iter(lambda: reader.read(65536), b""):
            yield piece.translate(table)
'''
BASES = {"threaded": ("http_multi_threaded_server", "HTTPMultiThreadedServer"),
         "fastapi": ("fastapi_server", "FastAPIServer")}
FINAL = "/ais%2F@%23%2Fdst%2Fobj"
SIZES = [0, 1, 65537, 3 << 20]
ARGS = "a b&c=ü"
SDK_IS_OLD = sys.version_info < (3, 10)  # 1.24.0 hands no etl_args to the next stage


class Stage(NamedTuple):
    """A server of a chain, as in "ours-fastapi~^": whose, its base; ~ streams; + or ^ is done."""

    server: str
    base: str
    is_streaming: bool
    operation: str

    @classmethod
    def of(cls, key: str) -> "Stage":
        """Read a stage."""
        server, _, base = key[:-1].rstrip("~").partition("-")
        own_base = "threaded" if server == "ours" else server
        return cls(server, base or own_base, "~" in key, key[-1])

    def apply(self, content: bytes, args: str) -> bytes:
        """Do what the stage is to do."""
        number = 1 + sum(args.encode()) % 255
        if self.operation == "+":
            return content.translate(bytes((byte + number) % 256 for byte in range(256)))
        return content.translate(bytes(byte ^ number for byte in range(256)))


CHAINS = [
    "ours+ ours^", "ours+ ours~^", "ours~+ ours^", "ours-fastapi+ ours~^", "ours~+ ours-fastapi~^",
    "ours~+ ours~^ ours-fastapi+", "ours^ ours-fastapi~^ ours+",
    # ours before the SDK's
    "ours+ threaded^", "ours+ threaded~^", "ours+ fastapi^", "ours+ fastapi~^", "ours~+ fastapi^",
    "ours~+ fastapi~^",
    # the SDK's before ours
    "threaded^ ours+", "threaded^ ours~+", "threaded~^ ours+", "threaded~^ ours~+",
    "fastapi^ ours+", "fastapi^ ours~+", "fastapi~^ ours+", "fastapi~^ ours~+",
    # one between two of the other kind
    "ours+ threaded^ ours~+", "ours~+ fastapi~^ ours-fastapi+", "threaded^ ours+ fastapi~^",
    "fastapi~^ ours~+ fastapi^",
]
NOT_TAKEN = [  # the SDK's threaded server answers 501 to a body in chunks, which our streams are
    "ours~+ threaded^", "ours~+ threaded~^", "ours+ ours~+ threaded^", "fastapi^ ours~+ threaded^",
]


class Field:
    """The stages, each started when first needed, and the target of them all."""

    def __init__(self, target: StandInTarget, running: contextlib.ExitStack) -> None:
        self.target = target
        self._running = running
        self._servers: Dict[str, Server] = {}

    def server(self, key: str) -> Server:
        """Return the server of a stage."""
        if key not in self._servers:
            self._servers[key] = self._running.enter_context(self.start(Stage.of(key)))
        return self._servers[key]

    def start(self, stage: Stage, threads: Optional[str] = None) -> Server:
        """Start the server of a stage, of one worker."""
        source, name = SOURCE % BASES[stage.base], "Streaming" if stage.is_streaming else "Buffered"
        env = {"AIS_TARGET_URL": self.target.url, "STAGE": stage.operation}
        if stage.server != "ours":
            return SDKServer(source, name, stage.server, env=env)
        return Runtime(env={**env, "ETL_CLASS_PAYLOAD": make_payload(source, name),
                            "NUM_WORKERS": "1", "NUM_THREADS": threads})

    def send(
        self, chain: str, content: bytes, end: str = "", args: str = "", fqn: Optional[Path] = None
    ) -> Response:
        """Send an object along a chain, and to `end` if there is one; empty the target before."""
        self.target.stored.clear()
        self.target.requests.clear()
        first, *others = chain.split(" ")
        queries = ["etl_args=" + quote(args, safe="")] if args else []
        if fqn is not None:
            queries.append("etl_fqn=" + quote(quote(str(fqn)), safe=""))
        pipeline = ",".join([*(self.server(key).url for key in others), *([end] if end else [])])
        path = "/bck/dir/a%20b" + "?" * bool(queries) + "&".join(queries)
        body = content if fqn is None else None
        return self.server(first).request("PUT", path, body, {"Ais-Node-Url": pipeline}, 60.0)


@pytest.fixture(scope="module")
def field() -> Iterator[Field]:
    """The servers, for all tests of this file."""
    target = StandInTarget()
    with contextlib.ExitStack() as running:
        yield Field(target, running)
    target.close()
    assert target.complaints == []


def expected(chain: str, content: bytes, args: str = "") -> bytes:
    """Return what a chain is to make of an object."""
    for key in chain.split(" "):
        content = Stage.of(key).apply(content, args)
    return content


@pytest.mark.parametrize("chain", CHAINS)
def test_the_result_of_a_chain_comes_back_or_arrives_at_its_target_right_to_the_byte(
        field: Field, chain: str, tmp_path: Path) -> None:
    stages = chain.split(" ")
    end = field.target.root + FINAL + "?uuid=a&owt=1"
    args = ARGS if all("ours" in key for key in stages) or not SDK_IS_OLD else ""
    for size in SIZES:
        content = os.urandom(size)
        response = field.send(chain, content, args=args)
        # a stage of the SDK's takes an empty result, which it is to pass back, for a delivery
        is_lost = size == 0 and not all("ours" in key for key in stages[:-1])
        right = response.body == expected(chain, content, args)
        assert (size, response.status, right) == (size, 204 if is_lost else 200, True)
        assert field.target.requests == []
        response = field.send(chain, content, end, args)
        assert (size, response.status, response.body) == (size, 204, b"")
        assert int(response.headers.get("ais-direct-put-length", "0")) == size
        request, = field.target.requests
        right = field.target.stored == {FINAL: expected(chain, content, args)}
        assert (size, request.complete, right) == (size, True, True)
        assert "uuid=a&owt=1" + "&etl_args=" * bool(args) in request.target
    if "ours" in stages[0]:
        path = make_object(tmp_path, content=content)
        assert field.send(chain, b"", fqn=path).body == expected(chain, content)
        assert field.send(chain, b"", end, fqn=path).status == 204
        assert field.target.stored == {FINAL: expected(chain, content)}


@pytest.mark.skipif(SDK_IS_OLD, reason="SDK 1.24.0 takes a body in chunks for an empty one")
@pytest.mark.parametrize("chain", NOT_TAKEN)
def test_a_stage_that_takes_no_chunks_refuses_a_stream_and_nothing_is_stored(
        field: Field, chain: str) -> None:
    for size in SIZES:
        for end in ("", field.target.root + FINAL):
            response = field.send(chain, os.urandom(size), end)
            assert (size, end, response.status, field.target.stored) == (size, end, 501, {})


@pytest.mark.parametrize("kind", ["ours", "ours~", "ours-fastapi", "ours-fastapi~"])
def test_a_chain_may_lead_back_to_the_very_same_pod_though_it_transforms_one_at_a_time(
        field: Field, kind: str) -> None:
    plus, xor = Stage.of(kind + "+"), Stage.of(kind + "^")
    with field.start(plus, threads="1") as first, field.start(xor, threads="1") as second:
        for others in ("^ +", "+", "^ + ^ +"):
            chain = " ".join(kind + operation for operation in ["+", *others.split(" ")])
            urls = [(first if each == "+" else second).url for each in others.split(" ")]
            for size in SIZES:
                content = os.urandom(size)
                response = first.request(
                    "PUT", "/bck/obj?etl_args=x", content, {"Ais-Node-Url": ",".join(urls)})
                right = response.body == expected(chain, content, "x")
                assert (others, size, response.status, right) == (others, size, 200, True)
