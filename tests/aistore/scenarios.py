"""What users do with ETLs, done by the real SDK against a real cluster: one function per scenario, which raises on a difference.

This runs inside the cluster's namespace, with the interpreter that has the SDK, as a child of test_aistore.py: it reads names of
scenarios, one a line, and answers each with one line of JSON (`Report`). It runs as a script, so that the classes below are
pickled by value, as a user's are.
"""
import concurrent.futures
import contextlib
import gzip
import io
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import urllib.parse
import uuid
import wave
import zlib
from pathlib import Path
from typing import (
    Any, BinaryIO, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, TextIO, Type, Union
)

import requests
import yaml
from aistore.sdk import Client
from aistore.sdk.bucket import Bucket
from aistore.sdk.errors import AISError
from aistore.sdk.etl import ETLConfig
from aistore.sdk.etl.etl import Etl
from aistore.sdk.etl.webserver import serialize_class
from aistore.sdk.etl.webserver.base_etl_server import ETLServer
from aistore.sdk.etl.webserver.fastapi_server import FastAPIServer
from aistore.sdk.etl.webserver.flask_server import FlaskServer
from aistore.sdk.etl.webserver.http_multi_threaded_server import HTTPMultiThreadedServer
from aistore.sdk.retry_config import RetryConfig
from tenacity import Retrying, stop_after_attempt
from urllib3.util.retry import Retry

MIB = 1 << 20
JOB_SECONDS = 150
CUT = "unexpected EOF"  # what AIStore says of a stream that failed on its way to it
STARTS_AT_ONCE = 4
READS_AT_ONCE = 16
INIT_TIMEOUT = "1m"  # AIStore looks at a new pod at intervals of a 64th of it, a second at least
LOG_LINES = 60  # of each pod, in the report of a failure
SIZES = (0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, MIB, 64 * MIB)
PARTS = 3
INVERT = bytes(255 - byte for byte in range(256))
HPUSH, HPULL, WS = "hpush", "hpull", "ws"

Report = Dict[str, Any]  # name, error (a traceback, or ""), notes (a list of text), logs (by pod)


# == The users' classes ==


class Inverter(HTTPMultiThreadedServer):
    """Inverts every byte and appends the arguments."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return data.translate(INVERT) + (etl_args or "").encode()


class FastAPIInverter(FastAPIServer):
    """The same, on FastAPI's base."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return data.translate(INVERT) + (etl_args or "").encode()


class FlaskInverter(FlaskServer):
    """The same, on Flask's base."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return data.translate(INVERT) + (etl_args or "").encode()


class StreamInverter(HTTPMultiThreadedServer):
    """The same, piece by piece."""

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        for piece in iter(lambda: reader.read(100_000), b""):
            yield piece.translate(INVERT)
        yield (etl_args or "").encode()


class FileInverter(HTTPMultiThreadedServer):
    """The same, of a file whose path it gets."""

    def transform(self, data: str, path: str, etl_args: str) -> bytes:
        if not isinstance(data, str):
            raise TypeError("a path is wanted, not %s" % type(data).__name__)
        return Path(data).read_bytes().translate(INVERT) + (etl_args or "").encode()


class PathTeller(FastAPIServer):
    """Puts the path before the object."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return path.encode() + b"\n" + data


class Stage(HTTPMultiThreadedServer):
    """Appends its number, but makes nothing of the object that is named after it."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        number = os.environ["STAGE"]
        return b"" if path.endswith("emptied-" + number) else data + number.encode()


class StreamStage(HTTPMultiThreadedServer):
    """The same, as a stream."""

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        number = os.environ["STAGE"]
        if not path.endswith("emptied-" + number):
            yield from iter(lambda: reader.read(1000), b"")
            yield number.encode()


class FastAPIStage(FastAPIServer):
    """The same, on FastAPI's base."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        number = os.environ["STAGE"]
        return b"" if path.endswith("emptied-" + number) else data + number.encode()


class Validator(HTTPMultiThreadedServer):
    """Fails for some objects."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        if "bad" in path:
            raise ValueError("validation failed")
        return data.upper()


class StreamValidator(HTTPMultiThreadedServer):
    """Fails for some objects when much of the result has left already."""

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        yield reader.read().upper()
        if "bad" in path:
            yield b"x" * (1 << 20)
            raise ValueError("validation failed")


class SlowInverter(HTTPMultiThreadedServer):
    """Takes its time, so that a worker is at work when it is killed."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        time.sleep(0.05)
        return data.translate(INVERT)


class SlowFastAPIInverter(FastAPIServer):
    """The same, on FastAPI's base, where a worker does one object at a time."""

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        time.sleep(0.02)
        return data.translate(INVERT)


class Unstartable(HTTPMultiThreadedServer):
    """Cannot be constructed."""

    def __init__(self) -> None:
        super().__init__()
        raise RuntimeError("the model has 3 layers, not 4")

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return data


# == The world ==


class World:
    """A scenario's view of the cluster: buckets and ETLs with names of their own, which go when it ends."""

    def __init__(self) -> None:
        once = Retrying(stop=stop_after_attempt(1), reraise=True)
        self.client = Client(os.environ["AIS_ENDPOINT"], retry_config=RetryConfig(Retry(0), once), timeout=(10, 120))
        self.kube = Path(os.environ["KUBE_STATE"])
        self.notes: List[str] = []
        self._seen = len(self._all_events())
        self._buckets: List[Bucket] = []
        self._etls: List[Etl] = []

    def close(self) -> None:
        """Stop the ETLs and delete the buckets."""
        with concurrent.futures.ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
            list(pool.map(self.stop, self._etls[:]))
        for bucket in self._buckets:
            bucket.delete(missing_ok=True)

    # -- buckets --

    def bucket(self) -> Bucket:
        """Make a bucket."""
        self._buckets.append(self.client.bucket("b-" + uuid.uuid4().hex[:12]).create())
        return self._buckets[-1]

    def filled_bucket(self, objects: Dict[str, bytes]) -> Bucket:
        """Make a bucket that holds some objects."""
        bucket = self.bucket()
        for name, content in objects.items():
            bucket.object(name).get_writer().put_content(content)
        return bucket

    @contextlib.contextmanager
    def destination(self) -> Iterator[Bucket]:
        """A bucket that is deleted at once when it was looked at: objects of 64 MiB add up."""
        bucket = self.bucket()
        yield bucket
        bucket.delete(missing_ok=True)

    # -- ETLs --

    def start(self, served: Type[ETLServer], comm: str, direct_put: bool = False, **variables: str) -> Etl:
        """Start an ETL of a class."""
        etl = self.client.etl("e-" + uuid.uuid4().hex[:12])
        self._etls.append(etl)
        etl.init(
            image=getattr(served, "IMAGE", "ais-runtime-min"), comm_type=comm, direct_put=direct_put, init_timeout=INIT_TIMEOUT,
            ETL_CLASS_PAYLOAD=serialize_class(served), **variables,
        )
        return etl

    def start_stages(self, served: Sequence[Type[ETLServer]], comms: Sequence[str], direct_put: bool) -> List[Etl]:
        """Start the stages of a pipeline, which learn their numbers."""
        with concurrent.futures.ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
            return list(pool.map(
                lambda number: self.start(served[number], comms[number], direct_put, STAGE=str(number + 1)), range(len(served))
            ))

    def stop(self, etl: Etl) -> None:
        """Stop an ETL; its pods must end by themselves in the time that AIStore gives them."""
        if etl in self._etls:
            self._etls.remove(etl)
            etl.stop()
            etl.delete()
            for event in self.events("stopped", etl):
                assert event["code"] == 0, "a pod had to be killed, or failed, when it was stopped: %s" % event

    def start_each(self, served: Iterable[Type[ETLServer]], comms: Iterable[str] = (HPUSH, HPULL),
                   direct_puts: Iterable[bool] = (False,), **variables: str) -> List["Started"]:
        """Start an ETL of each combination, all at once: to each start AIStore adds two seconds, and to each stop."""
        choices = list(itertools.product(served, comms, direct_puts))
        with concurrent.futures.ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
            etls = pool.map(lambda choice: self.start(*choice, **variables), choices)
            return [Started(etl, *choice) for etl, choice in zip(etls, choices)]

    def inline(self, bucket: Bucket, name: str, etl: Etl, args: Union[str, Dict[str, Any], None] = None) -> bytes:
        """Read an object through an ETL, or through a pipeline."""
        config = ETLConfig(name=etl if etl.pipeline else etl.name, args=args)
        return bytes(bucket.object(name).get_reader(etl=config).read_all())

    def transform(self, source: Bucket, etl: Etl, to: Bucket, cont_on_err: bool = False) -> "Outcome":
        """Run a job from bucket to bucket to its end."""
        job = source.transform(etl_name=etl.name, etl_pipeline=etl.pipeline or None, to_bck=to, cont_on_err=cont_on_err)
        result = self.client.job(job).wait(timeout=JOB_SECONDS, verbose=False)
        errors = etl.view(job_id=job).obj_errors or []
        return Outcome(bool(result.success), str(result.error), {error.obj_name.split("/", 3)[3]: error.msg for error in errors})

    # -- pods --

    def events(self, kind: Optional[str] = None, etl: Optional[Etl] = None) -> List[Dict[str, Any]]:
        """Return what happened to the pods of this scenario, or of one ETL."""
        return [
            event for event in self._all_events()[self._seen:]
            if kind in (None, event["event"]) and (etl is None or event["pod"].startswith(etl.name + "-"))
        ]

    def logs(self) -> Dict[str, List[str]]:
        """Return the logs of all pods of this scenario."""
        pods = {event["pod"] for event in self.events()}
        return {pod: (self.kube / (pod + ".log")).read_text(errors="replace").splitlines() for pod in sorted(pods)}

    def _all_events(self) -> List[Dict[str, Any]]:
        file = self.kube / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Started:
    """An ETL that runs, and how it was started."""

    def __init__(self, etl: Etl, served: Type[ETLServer], comm: str, direct_put: bool) -> None:
        self.etl = etl
        self.served = served
        self.comm = comm
        self.direct_put = direct_put

    def __str__(self) -> str:
        return "%s by %s, direct put %s" % (self.served.__name__, self.comm, self.direct_put)


class Outcome:
    """What a job came to: whether it succeeded, and the reasons of the objects that failed, by their names."""

    def __init__(self, success: bool, error: str, failed: Dict[str, str]) -> None:
        self.success = success
        self.error = error
        self.failed = failed

    def must_succeed(self, what: object) -> None:
        """Fail where the job did."""
        assert self.success and not self.failed, "the job failed (%s): %s; objects: %s" % (what, self.error, self.failed)


def must_hold(bucket: Bucket, expected: Dict[str, bytes], what: object) -> None:
    """Compare a bucket, names and contents."""
    names = {entry.name for entry in bucket.list_all_objects()}
    missing, unwanted = sorted(set(expected) - names), sorted(names - set(expected))
    assert not missing and not unwanted, "missing: %s, not wanted: %s, %s" % (missing, unwanted, what)
    with concurrent.futures.ThreadPoolExecutor(READS_AT_ONCE) as pool:
        contents = pool.map(lambda name: bucket.object(name).get_reader().read_all(), expected)
        for (name, content), got in zip(expected.items(), contents):
            must_equal(got, content, "%s, %s" % (name, what))


def must_equal(got: bytes, expected: bytes, what: str) -> None:
    """Compare contents, and tell the first difference in a few words."""
    if got != expected:
        where = next((i for i, pair in enumerate(zip(got, expected)) if pair[0] != pair[1]), min(len(got), len(expected)))
        parts = (what, len(got), len(expected), where, got[where:where + 60], expected[where:where + 60])
        raise AssertionError("%s: got %d bytes and not %d, they differ from byte %d on: %r, not %r" % parts)


def inverted(objects: Dict[str, bytes]) -> Dict[str, bytes]:
    """Return what the inverters make of objects."""
    return {name: content.translate(INVERT) for name, content in objects.items()}


def child_processes(pid: int) -> List[int]:
    """Return the children of a process that has one thread."""
    try:
        return [int(child) for child in Path("/proc/%d/task/%d/children" % (pid, pid)).read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# == Scenarios: objects read inline ==


def inline_reads_are_transformed(world: World) -> None:
    objects = {"empty": b"", "small": b"object", "large": random.Random(1).randbytes(3 * MIB)}
    source = world.filled_bucket(objects)
    for started in world.start_each([Inverter, FastAPIInverter, FlaskInverter, StreamInverter]):
        for name, content in objects.items():
            must_equal(world.inline(source, name, started.etl), content.translate(INVERT), "%s, %s" % (name, started))


def inline_reads_are_transformed_by_ws(world: World) -> None:
    objects = {"empty": b"", "small": b"object", "large": random.Random(1).randbytes(64 * MIB)}
    source = world.filled_bucket(objects)
    for started in world.start_each([Inverter, FastAPIInverter, FlaskInverter, StreamInverter], [WS], [True]):
        for name, content in objects.items():
            must_equal(world.inline(source, name, started.etl), content.translate(INVERT), "%s, %s" % (name, started))
        for text in ("plain", "a b+c%20d&e=f;g"):
            must_equal(world.inline(source, "empty", started.etl, text), text.encode(), "%r, %s" % (text, started))


def inline_reads_have_their_arguments(world: World) -> None:
    source = world.filled_bucket({"object": b""})
    texts = ["plain", "a b+c%20d&e=f;g", "über/?#", '{"k":"v w"}']
    for started in world.start_each([Inverter, FastAPIInverter, StreamInverter]):
        for text in texts:
            must_equal(world.inline(source, "object", started.etl, text), text.encode(), "%r, %s" % (text, started))
        must_equal(world.inline(source, "object", started.etl, {"size": [1, 2]}), b'{"size":[1,2]}', "a dictionary, %s" % started)


def an_inline_read_of_a_missing_object_is_404(world: World) -> None:
    source = world.filled_bucket({"object": b""})
    for started in world.start_each([Inverter]):
        with expected_error() as errors:
            world.inline(source, "missing", started.etl)
        assert getattr(errors[0], "status_code", 0) == 404, "%s: %s" % (started, errors)


@contextlib.contextmanager
def expected_error() -> Iterator[List[AISError]]:
    """Collect the SDK's error that the block must raise."""
    errors: List[AISError] = []
    try:
        yield errors
    except AISError as error:
        errors.append(error)
    assert errors, "no error, where one was expected"


# == Scenarios: jobs from bucket to bucket ==


def check_jobs(world: World, served: Type[ETLServer], comm: str, **variables: str) -> None:
    """Transform objects of critical sizes, with direct put and without."""
    objects = {"size-%d" % size: random.Random(size).randbytes(size) for size in SIZES}
    source = world.filled_bucket(objects)
    for started in world.start_each([served], [comm], direct_puts_of(comm), **variables):
        with world.destination() as destination:
            world.transform(source, started.etl, destination).must_succeed(started)
            must_hold(destination, inverted(objects), started)


def direct_puts_of(comm: str) -> List[bool]:
    """Return the values of direct put that a communication type has: AIStore refuses ws without."""
    return [True] if comm == WS else [False, True]


def jobs_of_bytes_by_hpush(world: World) -> None:
    check_jobs(world, Inverter, HPUSH)


def jobs_of_bytes_by_hpull(world: World) -> None:
    check_jobs(world, Inverter, HPULL)


def jobs_of_files_by_hpush(world: World) -> None:
    check_jobs(world, FileInverter, HPUSH, ETL_DIRECT_FQN="true")


def jobs_of_files_by_hpull(world: World) -> None:
    check_jobs(world, FileInverter, HPULL, ETL_DIRECT_FQN="true")


def jobs_of_streams_by_hpush(world: World) -> None:
    check_jobs(world, StreamInverter, HPUSH)


def jobs_of_streams_by_hpull(world: World) -> None:
    check_jobs(world, StreamInverter, HPULL)


def jobs_of_bytes_by_ws(world: World) -> None:
    check_jobs(world, Inverter, WS)


def jobs_of_bytes_one_at_a_time_by_ws(world: World) -> None:
    check_jobs(world, FastAPIInverter, WS)


def jobs_of_files_by_ws(world: World) -> None:
    check_jobs(world, FileInverter, WS, ETL_DIRECT_FQN="true")


def jobs_of_streams_by_ws(world: World) -> None:
    check_jobs(world, StreamInverter, WS)


def a_job_of_many_small_objects_by_ws(world: World) -> None:
    check_many_small_objects(world, Inverter)


def check_many_small_objects(world: World, served: Type[ETLServer]) -> None:
    """Transform many small objects by WebSocket, and compare every one."""
    objects = {"dir/object-%d" % number: b"%d " % number + b"x" * (number % 50) for number in range(2000)}
    source = world.bucket()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: source.object(name).get_writer().put_content(objects[name]), objects))
    for started in world.start_each([served], [WS], [True]):
        with world.destination() as destination:
            world.transform(source, started.etl, destination).must_succeed(started)
            must_hold(destination, inverted(objects), started)


def check_parts(world: World, served: Type[ETLServer], **variables: str) -> None:
    """Transform an object that was uploaded in parts, of which its file holds the first only."""
    parts = [random.Random(number).randbytes(MIB) for number in range(PARTS)]
    source = world.bucket()
    names = ("in parts", "a/b/c.tar")
    for name in names:
        upload = source.object(name).multipart_upload().create()
        for number, part in enumerate(parts, 1):
            upload.add_part(number).put_content(part)
        upload.complete()
    whole = b"".join(parts).translate(INVERT)
    for started in world.start_each([served], direct_puts=[False, True], **variables):
        with world.destination() as destination:
            for name in names:
                must_equal(world.inline(source, name, started.etl), whole, "inline %s, %s" % (name, started))
            world.transform(source, started.etl, destination).must_succeed(started)
            must_hold(destination, {name: whole for name in names}, started)


def objects_in_parts_as_bytes(world: World) -> None:
    check_parts(world, Inverter)


def objects_in_parts_as_streams(world: World) -> None:
    check_parts(world, StreamInverter)


def objects_in_parts_as_files(world: World) -> None:
    check_parts(world, FileInverter, ETL_DIRECT_FQN="true")


# == Scenarios: names ==

# AIStore refuses or renames: "." and ".." as segments, "//", a line feed, "~/" at the beginning, "/" and ";" at the end.
AWKWARD_NAMES = (
    "a b", " a ", "a+b", "50%25", "%2F", "a%20b", "a;v=1", "a@b", "@", "a,b", "it's", 'say "x"', "a&b=c", "=",
    "naïve/日本 ü", "a..b", "...", "..a/b..", ".hidden", "~", "a~/b", "a*b", "a|b", "a\\b", "a:b", "http:/x", "<a>", "[a]{b}",
    "^`$!()", "-", "\U0001f600",
)
QUERY_NAMES = ("q?x=1", "q?", "?etl", "q?a=b&c?d")
HPULL_NAMES = ("50%", "a#b")  # an hpush target puts names unescaped into its URLs: the first it cannot send, the second it cuts


def check_names(world: World, comm: str, names: Iterable[str]) -> None:
    """Transform objects of awkward names, inline and by jobs."""
    objects = {name: b"%d" % number for number, name in enumerate(names)}
    source = world.filled_bucket(objects)
    must_hold(source, objects, "the source")
    expected = {name: path_of(source, name, comm).encode() + b"\n" + content for name, content in objects.items()}
    for started in world.start_each([PathTeller], [comm], [False, True]):
        for name in objects:
            must_equal(world.inline(source, name, started.etl), expected[name], "inline %r, %s" % (name, started))
        with world.destination() as destination:
            world.transform(source, started.etl, destination).must_succeed(started)
            must_hold(destination, expected, started)


def path_of(bucket: Bucket, name: str, comm: str) -> str:
    """Return the path that a FastAPI class is told: what looks like an escape in the unescaped name from hpush is decoded."""
    return "%s/%s" % (bucket.name, urllib.parse.unquote(name)) if comm == HPUSH else "ais/@#/%s/%s" % (bucket.name, name)


def awkward_names_by_hpush(world: World) -> None:
    check_names(world, HPUSH, AWKWARD_NAMES + QUERY_NAMES)


def awkward_names_by_hpull(world: World) -> None:
    check_names(world, HPULL, AWKWARD_NAMES + QUERY_NAMES + HPULL_NAMES)


# == Scenarios: pipelines ==


def check_pipeline(world: World, first: str, served: List[Type[ETLServer]]) -> None:
    """Transform objects through three stages, each of which makes one of them empty."""
    objects = {"text": b"text", "empty": b"", "large": random.Random(3).randbytes(2 * MIB)}
    objects.update({"emptied-%d" % number: b"something" for number in (1, 2, 3)})
    expected = {name: content + b"123" for name, content in objects.items()}
    expected.update({"emptied-1": b"23", "emptied-2": b"3", "emptied-3": b""})
    source = world.filled_bucket(objects)
    comms = (first, HPUSH, HPULL)
    for direct_put in direct_puts_of(first):
        etls = world.start_stages(served, comms, direct_put)
        pipeline = etls[0] >> etls[1] >> etls[2]
        if first != HPULL:
            for name in objects:
                must_equal(world.inline(source, name, pipeline), expected[name], "inline %s" % name)
        with world.destination() as destination:
            world.transform(source, pipeline, destination).must_succeed(direct_put)
            must_hold(destination, expected, direct_put)


def pipelines_of_bytes_by_hpush(world: World) -> None:
    check_pipeline(world, HPUSH, [Stage, FastAPIStage, Stage])


def pipelines_of_streams_by_hpush(world: World) -> None:
    check_pipeline(world, HPUSH, [StreamStage, StreamStage, StreamStage])


def pipelines_of_bytes_and_streams_by_hpull(world: World) -> None:
    check_pipeline(world, HPULL, [Stage, StreamStage, FastAPIStage])


def pipelines_of_bytes_by_ws(world: World) -> None:
    check_pipeline(world, WS, [Stage, FastAPIStage, Stage])


def pipelines_of_bytes_and_streams_by_ws(world: World) -> None:
    check_pipeline(world, WS, [StreamStage, StreamStage, FastAPIStage])


def a_pipeline_that_leads_back_to_its_first_stage_by_hpush(world: World) -> None:
    source = world.filled_bucket({"object-%d" % number: b"%d-" % number for number in range(60)})
    one, two = world.start_stages([Stage, StreamStage], [HPUSH, HPUSH], True)
    pipeline = one >> two >> one
    must_equal(world.inline(source, "object-7", pipeline), b"7-121", "inline")
    with world.destination() as destination:
        world.transform(source, pipeline, destination).must_succeed(pipeline)
        must_hold(destination, {"object-%d" % number: b"%d-121" % number for number in range(60)}, pipeline)


# == Scenarios: failures ==


def check_failures(world: World, served: Type[ETLServer], comm: str) -> None:
    """Run jobs in which some objects fail."""
    good = {"good-%d" % number: b"good %d" % number for number in range(25)}
    bad = {"bad-%d" % number: b"bad %d" % number for number in range(8)}
    source = world.filled_bucket({**good, **bad})
    for started in world.start_each([served], [comm], [False, True]):
        with world.destination() as destination:
            outcome = world.transform(source, started.etl, destination, cont_on_err=True)
            world.notes.append("%s: %s: %s" % (started, outcome.error, outcome.failed))
            must_hold(destination, {name: content.upper() for name, content in good.items()}, started)
        assert set(outcome.failed) == set(bad), "told as failed: %s, %s" % (outcome.failed, started)
        is_cut = served is StreamValidator
        reasons = ["validation failed", CUT] if is_cut else ["validation failed"]
        silent = {name: text for name, text in outcome.failed.items() if not any(reason in text for reason in reasons)}
        assert not silent, "no reason told: %s, %s" % (silent, started)
        if not is_cut:  # an hpush target passes a stream that was cut to its client as a whole one
            with expected_error() as errors:
                world.inline(source, "bad-0", started.etl)
            assert "validation failed" in str(errors[0]), errors


def failing_objects_are_told_with_their_reason_by_hpush(world: World) -> None:
    check_failures(world, Validator, HPUSH)


def failing_objects_are_told_with_their_reason_by_hpull(world: World) -> None:
    check_failures(world, Validator, HPULL)


def failing_streams_leave_no_half_objects_by_hpush(world: World) -> None:
    check_failures(world, StreamValidator, HPUSH)


def failing_streams_leave_no_half_objects_by_hpull(world: World) -> None:
    check_failures(world, StreamValidator, HPULL)


def a_failed_inline_read_by_ws_is_told_at_once(world: World) -> None:
    check_failed_inline_read_by_ws(world, Validator)


def check_failed_inline_read_by_ws(world: World, served: Type[ETLServer]) -> None:
    """Read an object that fails through an ETL that is new, up to three times."""
    source = world.filled_bucket({"good": b"good", "bad": b"bad"})
    for started in world.start_each([served] * 3, [WS], [True]):
        must_equal(world.inline(source, "good", started.etl), b"GOOD", "before")
        began = time.monotonic()
        try:
            world.notes.append("answered %r" % world.inline(source, "bad", started.etl))  # of a race in the target, rarely
        except AISError as error:
            assert "validation failed" in str(error), error
            assert time.monotonic() - began < 10
            world.notes.append(str(error))
            return
    raise AssertionError("no failure was told: %s" % world.notes)


def places_of(bucket: Bucket) -> Dict[str, str]:
    """Return the target that each object of a bucket is on."""
    entries = bucket.list_all_objects(props="name,location")
    return {entry.name: entry.location.partition(":")[0] for entry in entries}


def failing_objects_that_are_bound_elsewhere_by_ws_are_told_by_a_job_that_goes_on(world: World) -> None:
    check_failures_bound_elsewhere(world, Validator)


def check_failures_bound_elsewhere(world: World, served: Type[ETLServer]) -> None:
    """Run a job by WebSocket in which objects fail on their way to another target."""
    good = {"good-%d" % number: b"good %d" % number for number in range(100)}
    bad = {"bad-%d" % number: b"bad" for number in range(16)}  # a target lists eight errors of a job, or a few more
    source = world.filled_bucket({**good, **bad})
    started = world.start_each([served], [WS], [True])[0]
    with world.destination() as destination:
        for name in bad:  # to see where each belongs
            destination.object(name).get_writer().put_content(b"")
        here, there = places_of(source), places_of(destination)
        stay = [name for name in bad if here[name] == there[name]]
        for name in bad:
            destination.object(name).delete()
        for name in stay:  # such a failure would end the job's connections, one after the other
            source.object(name).delete()
        assert len(stay) < len(bad)
        outcome = world.transform(source, started.etl, destination, cont_on_err=True)
        world.notes.append("%s: %s" % (outcome.error, outcome.failed))
        must_hold(destination, {name: content.upper() for name, content in good.items()}, started)
    must_equal(world.inline(source, "good-1", started.etl), b"GOOD 1", "afterwards")
    logged = "\n".join(line for log in world.logs().values() for line in log)
    assert set(outcome.failed) == set(bad) - set(stay), "told as failed: %s" % outcome.failed
    assert all("%s: Processing error: validation failed" % name in logged for name in outcome.failed), logged


def a_pod_whose_last_ws_connection_was_closed_by_failures_ends_with_its_reason(world: World) -> None:
    check_end_with_last_connection(world, Validator)


def check_end_with_last_connection(world: World, served: Type[ETLServer]) -> None:
    """Read objects that fail by WebSocket, one for each connection of the pods and more."""
    bad = {"bad-%d" % number: b"bad" for number in range(12)}
    source = world.filled_bucket(bad)
    etl = world.start(served, WS, True)
    reads = [threading.Thread(target=attempt, args=(world.inline, source, name, etl), daemon=True) for name in bad]
    for read in reads:
        read.start()
    deadline = time.monotonic() + 60
    while not world.events("exited", etl) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert world.events("exited", etl), "no pod ended: %s" % world.events(None, etl)
    last_lines = [lines[-1] for lines in world.logs().values()]
    world.notes.append(str(last_lines))
    assert any(re.match("ais_runtime_min: .*validation failed", line) for line in last_lines), last_lines
    for read in reads:
        read.join(30)
    assert not any(read.is_alive() for read in reads), "a read never ends, though its ETL is aborted"


def attempt(function: Callable[..., Any], *args: Any) -> None:
    """Make a call that may well fail."""
    with contextlib.suppress(Exception):
        function(*args)


class Killer:
    """A thread that kills workers of an ETL at random, one each time, until it is told to end."""

    def __init__(self, world: World, etl: Etl) -> None:
        self.killed = 0
        self._containers = [event["pid"] for event in world.events("started", etl)]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.4):
            supervisors = [pid for container in self._containers for pid in child_processes(container)]
            workers = [pid for supervisor in supervisors for pid in child_processes(supervisor)]
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(workers), signal.SIGKILL)
                    self.killed += 1


def check_killed_workers(world: World, served: Type[ETLServer], comm: str) -> None:
    """Run jobs whose workers are killed: no object may be wrong or missing and yet not told as failed."""
    objects = {"object-%d" % number: random.Random(number).randbytes(1000 * number) for number in range(300)}
    source = world.filled_bucket(objects)
    expected = inverted(objects)
    for started in world.start_each([served], [comm], [False, True]):
        with world.destination() as destination:
            with Killer(world, started.etl) as killer:
                outcome = world.transform(source, started.etl, destination, cont_on_err=True)
            world.notes.append("%s: %d workers killed, %d objects failed, %s"
                               % (started, killer.killed, len(outcome.failed), list(outcome.failed.values())[:1]))
            there = {entry.name for entry in destination.list_all_objects()}  # a worker may die between delivery and answer
            due = {name for name in expected if name in there or name not in outcome.failed}
            must_hold(destination, {name: expected[name] for name in due}, started)
        assert killer.killed, "no worker was killed"
        assert not world.events("exited", started.etl), "a pod ended: %s" % world.events("exited", started.etl)
        must_equal(world.inline(source, "object-1", started.etl), expected["object-1"], "inline, afterwards, %s" % started)


def workers_killed_during_a_job_by_hpush(world: World) -> None:
    check_killed_workers(world, SlowInverter, HPUSH)


def workers_killed_during_a_job_by_hpull(world: World) -> None:
    check_killed_workers(world, SlowInverter, HPULL)


def workers_killed_that_do_one_object_at_a_time_by_hpush(world: World) -> None:
    check_killed_workers(world, SlowFastAPIInverter, HPUSH)


def a_class_that_cannot_be_constructed_is_told_by_the_last_line_of_the_log(world: World) -> None:
    with expected_error() as errors:
        world.start(Unstartable, HPUSH)
    world.notes.append(str(errors[0]))
    assert world.events("exited"), "no pod ended by itself: %s" % world.events()
    last_lines = {lines[-1] for lines in world.logs().values() if lines}
    assert any("the model has 3 layers, not 4" in line for line in last_lines), last_lines
    assert any(line in str(errors[0]) for line in last_lines), "the error lacks the last line: %s" % errors[0]


# == Scenarios: the end ==


def an_idle_etl_stops_at_once_and_leaves_nothing_behind(world: World) -> None:
    source = world.filled_bucket({"object": b"abc"})
    for started in world.start_each([Inverter, FastAPIInverter, StreamInverter], direct_puts=[True]):
        for _ in range(20):  # connections of AIStore's pool stay open, idle
            world.inline(source, "object", started.etl)
        with world.destination() as destination:
            world.transform(source, started.etl, destination).must_succeed(started)
        world.stop(started.etl)
        stopped = world.events("stopped", started.etl)
        assert len(stopped) == len(world.events("started", started.etl)) > 0, world.events(None, started.etl)
        world.notes.append("%s: stopped in %s" % (started, ["%.2f s" % event["seconds"] for event in stopped]))
    lines = ["%s: %s" % (pod, line) for pod, log in world.logs().items() for line in log]
    assert not [line for line in lines if "ERROR" in line or "WARNING" in line or "Traceback" in line], "\n".join(lines)
    assert not processes_of({event["pod"] for event in world.events()})


def processes_of(pods: Set[str]) -> List[str]:
    """Return the command lines of processes that have a pod's name as their host name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = folder.joinpath("environ").read_bytes().split(b"\0")
            if any(b"HOSTNAME=" + pod.encode() in variables for pod in pods):
                found.append(folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


# == Scenarios: classes with an application of their own ==


class Routed:
    """What these classes have in common: an image that has the frameworks, since the cluster has no package index."""

    IMAGE = "frameworks-of-ais-runtime-min"


class UvicornInverter(Routed, FastAPIServer):
    """Inverts every byte and appends the arguments; has a route of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.app.add_api_route("/version", lambda: "1")

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return data.translate(INVERT) + etl_args.encode()


class UvicornStreamInverter(Routed, FastAPIServer):
    """The same in pieces; needs its start-up hook."""

    async def startup_event(self) -> None:
        self.table = INVERT

    def transform_stream(self, reader: BinaryIO, path: str, etl_args: str) -> Iterator[bytes]:
        for piece in iter(lambda: reader.read(100_000), b""):
            yield piece.translate(self.table)
        yield etl_args.encode()


class WsgiInverter(Routed, FlaskServer):
    """Inverts every byte and appends the arguments; has a route of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.app.add_url_rule("/version", view_func=lambda: "1")

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        return data.translate(INVERT) + etl_args.encode()


class UvicornStage(Routed, FastAPIServer):
    """Appends its number, but makes nothing of the object that is named after it; has a route of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.app.add_api_route("/version", lambda: "1")

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        number = os.environ["STAGE"]
        return b"" if path.endswith("emptied-" + number) else data + number.encode()


class WsgiStage(Routed, FlaskServer):
    """Appends its number, but makes nothing of the object that is named after it; has a route of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.app.add_url_rule("/version", view_func=lambda: "1")

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        number = os.environ["STAGE"]
        return b"" if path.endswith("emptied-" + number) else data + number.encode()


class UvicornValidator(Routed, FastAPIServer):
    """Refuses objects that begin with "bad"; has a route of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.app.add_api_route("/version", lambda: "1")

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        if data.startswith(b"bad"):
            raise ValueError("validation failed")
        return data.upper()


class WsgiValidator(Routed, FlaskServer):
    """Refuses objects that begin with "bad"; has a route of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.app.add_url_rule("/version", view_func=lambda: "1")

    def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
        if data.startswith(b"bad"):
            raise ValueError("validation failed")
        return data.upper()


def inline_reads_under_uvicorn_and_through_wsgi(world: World) -> None:
    objects = {"empty": b"", "small": b"object", "large": random.Random(1).randbytes(64 * MIB)}
    source = world.filled_bucket(objects)
    for started in world.start_each([UvicornInverter, UvicornStreamInverter, WsgiInverter]):
        for name, content in objects.items():
            must_equal(world.inline(source, name, started.etl), content.translate(INVERT), "%s, %s" % (name, started))
        must_equal(world.inline(source, "empty", started.etl, "a b+c%20d"), b"a b+c%20d", str(started))


def jobs_under_uvicorn_by_hpush(world: World) -> None:
    check_jobs(world, UvicornInverter, HPUSH)


def jobs_under_uvicorn_by_hpull(world: World) -> None:
    check_jobs(world, UvicornInverter, HPULL)


def jobs_under_uvicorn_by_ws(world: World) -> None:
    check_jobs(world, UvicornInverter, WS)


def jobs_of_streams_under_uvicorn_by_hpush(world: World) -> None:
    check_jobs(world, UvicornStreamInverter, HPUSH)


def jobs_of_streams_under_uvicorn_by_hpull(world: World) -> None:
    check_jobs(world, UvicornStreamInverter, HPULL)


def jobs_of_streams_under_uvicorn_by_ws(world: World) -> None:
    check_jobs(world, UvicornStreamInverter, WS)


def a_job_of_many_small_objects_under_uvicorn_by_ws(world: World) -> None:
    check_many_small_objects(world, UvicornInverter)


def jobs_through_wsgi_by_hpush(world: World) -> None:
    check_jobs(world, WsgiInverter, HPUSH)


def jobs_through_wsgi_by_hpull(world: World) -> None:
    check_jobs(world, WsgiInverter, HPULL)


def jobs_through_wsgi_by_ws(world: World) -> None:
    check_jobs(world, WsgiInverter, WS)


def a_job_of_many_small_objects_through_wsgi_by_ws(world: World) -> None:
    check_many_small_objects(world, WsgiInverter)


def inline_reads_through_wsgi_by_ws(world: World) -> None:
    objects = {"empty": b"", "small": b"object", "large": random.Random(1).randbytes(64 * MIB)}
    source = world.filled_bucket(objects)
    for started in world.start_each([WsgiInverter, UvicornInverter], [WS], [True]):
        for name, content in objects.items():
            must_equal(world.inline(source, name, started.etl), content.translate(INVERT), "%s, %s" % (name, started))


def pipelines_through_uvicorn_by_hpush(world: World) -> None:
    check_pipeline(world, HPUSH, [UvicornStage, StreamStage, UvicornStage])


def pipelines_through_uvicorn_by_hpull(world: World) -> None:
    check_pipeline(world, HPULL, [UvicornStage, UvicornStage, Stage])


def pipelines_through_uvicorn_by_ws(world: World) -> None:
    check_pipeline(world, WS, [UvicornStage, Stage, UvicornStage])


def pipelines_through_wsgi_by_hpush(world: World) -> None:
    check_pipeline(world, HPUSH, [WsgiStage, UvicornStage, WsgiStage])


def pipelines_through_wsgi_by_hpull(world: World) -> None:
    check_pipeline(world, HPULL, [WsgiStage, WsgiStage, StreamStage])


def pipelines_through_wsgi_by_ws(world: World) -> None:
    check_pipeline(world, WS, [WsgiStage, UvicornStage, WsgiStage])


def failing_objects_under_uvicorn_are_told_with_their_reason_by_hpush(world: World) -> None:
    check_failures(world, UvicornValidator, HPUSH)


def failing_objects_under_uvicorn_are_told_with_their_reason_by_hpull(world: World) -> None:
    check_failures(world, UvicornValidator, HPULL)


def failing_objects_through_wsgi_are_told_with_their_reason_by_hpush(world: World) -> None:
    check_failures(world, WsgiValidator, HPUSH)


def failing_objects_through_wsgi_are_told_with_their_reason_by_hpull(world: World) -> None:
    check_failures(world, WsgiValidator, HPULL)


def a_failed_inline_read_by_ws_under_uvicorn_is_told_at_once(world: World) -> None:
    check_failed_inline_read_by_ws(world, UvicornValidator)


def failing_objects_under_uvicorn_that_are_bound_elsewhere_by_ws_are_told_by_a_job_that_goes_on(world: World) -> None:
    check_failures_bound_elsewhere(world, UvicornValidator)


def a_failed_inline_read_by_ws_through_wsgi_is_told_at_once(world: World) -> None:
    check_failed_inline_read_by_ws(world, WsgiValidator)


def failing_objects_through_wsgi_that_are_bound_elsewhere_by_ws_are_told_by_a_job_that_goes_on(world: World) -> None:
    check_failures_bound_elsewhere(world, WsgiValidator)


def a_pod_through_wsgi_whose_last_ws_connection_was_closed_by_failures_ends_with_its_reason(world: World) -> None:
    check_end_with_last_connection(world, WsgiValidator)


def a_pod_under_uvicorn_whose_last_ws_connection_was_closed_by_failures_ends_with_its_reason(world: World) -> None:
    check_end_with_last_connection(world, UvicornValidator)


# == Scenarios: from a class in a file, by `pack` and AIStore's own interface for specs ==

CSV = b"5.1,3.5,1.4,0.2\n6.7,3.0,5.2,2.3\n"
MEMBERS = {"0.jpg": b"picture", "0.cls": b"7", "1.jpg": bytes(70_000), "1.cls": b"3"}


class Packed(NamedTuple):
    """An example class: what `pack` is asked for, and an object with its arguments and its result."""

    file: str
    content: bytes
    result: Callable[[bytes], bool]
    args: Optional[str] = None
    options: Sequence[str] = ()
    needs: str = ""  # a package


def make_shard() -> bytes:
    """Make a tar archive."""
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for name, content in MEMBERS.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return shard.getvalue()


def members_of(shard: bytes) -> Dict[str, bytes]:
    """Read a tar archive."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        return {member.name: (archive.extractfile(member) or io.BytesIO()).read() for member in archive}


def make_sound() -> bytes:
    """Make a WAV file of half a second."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes(bytes(4) * 22050)
    return sound.getvalue()


def make_picture() -> bytes:
    """Make a PNG of 64 black pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(9) * 8)) + chunk(b"IEND", b""))


def equal_to(expected: bytes) -> Callable[[bytes], bool]:
    """Return a check for one result."""
    return lambda got: got == expected


PACKED = [
    Packed("upper.py", b"hello ais!", equal_to(b"HELLO AIS!")),
    Packed("line_count.py", b"a\nb\n", equal_to(b"2")),
    Packed("hash_with_args.py", b"hello", equal_to(b'{"algorithm": "md5", "digest": "5d41402abc4b2a76b9719d911017c592"}'), "md5"),
    Packed("gunzip_stream.py", gzip.compress(b"hello" * 99_999), equal_to(b"hello" * 99_999)),
    Packed("select_members.py", make_shard(),
           lambda got: members_of(got) == {name: MEMBERS[name] for name in ("0.cls", "1.cls")}, "cls"),
    Packed("thumbnail.py", make_picture(), lambda got: got[:3] == b"\xff\xd8\xff", "4", ["--packages", "pillow"], "pillow"),
    Packed("to_wav.py", make_sound(), lambda got: wave.open(io.BytesIO(got)).getframerate() == 8000, "8000",
           ["--arg-type", "fqn"], "imageio-ffmpeg"),
    Packed("jsonl_to_parquet.py", b'{"a": 1}\n{"a": 2}\n', lambda got: got[:4] == got[-4:] == b"PAR1", None,
           ["--packages", "pyarrow"], "pyarrow"),
    Packed("classify_iris.py", CSV, equal_to(b"setosa\nvirginica\n"), None, ["--packages", "scikit-learn"], "scikit-learn"),
    Packed("word_filter.py", b"a secret plan", equal_to(b"a ****** plan"), None, [], "fastapi"),
]


def start_packed(world: World, packed: Packed, comm: str) -> Etl:
    """Start an ETL as somebody does who has a file, cloudpickle and AIStore's command line."""
    libraries = json.loads(os.environ["LIBRARIES"])
    runtime = Path(os.environ["RUNTIME"])
    name = "p-" + uuid.uuid4().hex[:12]
    spec = subprocess.check_output([
        libraries["python"], str(runtime), "pack", str(runtime.parent / "tests" / "etls" / packed.file), "--spec", "--name", name,
        "--image", "libraries-of-ais-runtime-min", "--comm", comm, "--init-timeout", INIT_TIMEOUT, *packed.options])
    answer = requests.put(os.environ["AIS_ENDPOINT"] + "/v1/etl", json=yaml.safe_load(spec), timeout=(10, 120))
    assert answer.status_code == 200, answer.text
    etl = world.client.etl(name)
    world._etls.append(etl)
    return etl


def check_packed(world: World, comm: str) -> None:
    """Transform an object by each of the examples whose packages are here."""
    missing = json.loads(os.environ["LIBRARIES"])["missing"]
    examples = [packed for packed in PACKED if packed.needs not in missing]
    world.notes += ["%s is not tried: %s" % (packed.file, missing[packed.needs]) for packed in PACKED if packed.needs in missing]
    source = world.filled_bucket({packed.file: packed.content for packed in examples})
    for packed in examples:
        etl = start_packed(world, packed, comm)
        got = world.inline(source, packed.file, etl, packed.args)
        assert packed.result(got), "%s by %s: %r" % (packed.file, comm, got[:200])
        world.stop(etl)


def packed_examples_by_hpush(world: World) -> None:
    check_packed(world, HPUSH)


def packed_examples_by_hpull(world: World) -> None:
    check_packed(world, HPULL)


def packed_examples_by_ws(world: World) -> None:
    check_packed(world, WS)


def init_class_starts_the_runtime_where_the_image_has_the_default_ones_name(world: World) -> None:
    source = world.filled_bucket({"object": b"hello ais!"})
    etl = world.client.etl("i-" + uuid.uuid4().hex[:12])
    world._etls.append(etl)

    @etl.init_class(init_timeout=INIT_TIMEOUT)
    class Upper(HTTPMultiThreadedServer):
        def transform(self, data: bytes, path: str, etl_args: str) -> bytes:
            return data.upper()

    must_equal(world.inline(source, "object", etl), b"HELLO AIS!", "by init_class")
    assert any("ais_runtime_min" in line for log in world.logs().values() for line in log)


def a_pod_has_the_labels_that_the_network_policy_selects(world: World) -> None:
    readme = (Path(os.environ["RUNTIME"]).parent / "README.md").read_text()
    policy = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
    world.start(Inverter, HPUSH)
    started = world.events("started")
    for event in started:
        labels = event["labels"]
        selected = policy["spec"]["podSelector"]["matchLabels"]
        assert selected.items() <= labels.items(), labels
    assert started


# == Running them ==


def run_scenario(scenario: Callable[[World], None]) -> Report:
    """Run a scenario in a world of its own and report."""
    report: Report = {"name": scenario.__name__, "error": "", "notes": [], "logs": {}}
    world = World()
    try:
        try:
            scenario(world)
        finally:
            report["notes"] = world.notes
            world.close()
    except Exception:  # whatever it is, it is this scenario's result
        report["error"] = traceback.format_exc()
        report["logs"] = {pod: log[-LOG_LINES:] for pod, log in world.logs().items()}
        report["events"] = world.events()
    return report


def main(requests: TextIO, reports: TextIO) -> int:
    """Run the scenarios that are asked for, until no more are."""
    for line in requests:
        print(json.dumps(run_scenario(globals()[line.strip()])), file=reports, flush=True)
    return 0


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as reports_file:
        os.dup2(2, 1)  # what a library prints is no report
        raise SystemExit(main(sys.stdin, reports_file))
