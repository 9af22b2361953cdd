"""The example classes in tests/etls, each through its real library: from a file by `pack` to an object.

Those that need packages are slow: pip installs them into an environment of the tests' own.
"""
import io
import json
import math
import re
import struct
import subprocess
import tarfile
import wave
from pathlib import Path
from typing import Callable, Sequence, Tuple

import pytest

from harness import ROOT, Environ, Runtime, interpreter
from libraries import Libraries, install_libraries
from test_pack import pack

ETLS = ROOT / "tests" / "etls"
StartRuntime = Callable[..., Runtime]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """The packages of the examples, each installed as far as it can be."""
    return install_libraries(tmp_path_factory.mktemp("libraries"))


def serve_packed(
    start_runtime: StartRuntime, name: str, python: str, options: Sequence[str] = (),
    env: Environ = {},
) -> Runtime:
    """Pack a class, and start the runtime with the variables that this gives."""
    packed = pack(ETLS / name, "--env-file", *options, python=python)
    assert packed.code == 0, packed.lines
    variables = dict(line.split("=", 1) for line in packed.out.splitlines())
    del variables["AIS_TARGET_URL"]
    return start_runtime(env={**variables, **env}, python=python)


# == Those that need nothing ==


@pytest.mark.parametrize("name, query, data, result", [
    ("upper.py", "", b"hello", b"HELLO"),
    ("line_count.py", "", b"a\nb\n", b"2"),
    ("hash_with_args.py", "?etl_args=md5", b"hello",
     b'{"algorithm": "md5", "digest": "5d41402abc4b2a76b9719d911017c592"}'),
])
def test_an_example_is_packed_and_served(
    start_runtime: StartRuntime, name: str, query: str, data: bytes, result: bytes
) -> None:
    runtime = serve_packed(start_runtime, name, interpreter("slim"))
    assert runtime.request("PUT", "/bucket/object" + query, data).body == result


def make_shard(members: Sequence[Tuple[str, bytes]]) -> bytes:
    """Make a tar archive."""
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return result.getvalue()


def test_files_are_selected_from_a_shard(start_runtime: StartRuntime) -> None:
    members = [("%06d.%s" % (number, end), end.encode() * number)
               for number in range(200) for end in ("jpg", "cls", "seg.png")]
    members.append(("d" * 150 + "/long.name/000201.cls", b"of a long name"))
    runtime = serve_packed(start_runtime, "select_members.py", interpreter("slim"))
    for query, wanted in [("", {"jpg", "cls", "seg.png"}), ("?etl_args=cls", {"cls"}),
                          ("?etl_args=cls,seg.png", {"cls", "seg.png"}), ("?etl_args=none", set())]:
        answer = runtime.request("PUT", "/bucket/shard.tar" + query, make_shard(members)).body
        with tarfile.open(fileobj=io.BytesIO(answer)) as archive:
            got = [(member.name, (archive.extractfile(member) or io.BytesIO()).read())
                   for member in archive]
        assert got == [(name, content) for name, content in members
                       if name.rpartition("/")[2].partition(".")[2] in wanted]


# == Those that need packages ==

slow = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def need(libraries: Libraries) -> Callable[..., Libraries]:
    """A function that returns the libraries, or skips the test where a package is missing."""

    def check(*packages: str) -> Libraries:
        for package in packages:
            if package in libraries.missing:
                pytest.skip(libraries.missing[package])
        return libraries

    return check


class TestWithPackages:
    """Slow for pip alone; afterwards each takes a second."""

    pytestmark = slow

    def test_a_picture_becomes_a_thumbnail(
        self, need: Callable[..., Libraries], start_runtime: StartRuntime
    ) -> None:
        libraries = need("pillow")
        picture = libraries.run("import sys; from PIL import Image; Image.linear_gradient('L')"
                                ".resize((640, 320)).save(sys.stdout.buffer, 'PNG')")
        runtime = serve_packed(start_runtime, "thumbnail.py", libraries.python,
                               ["--packages", "pillow"])
        answer = runtime.request("PUT", "/bucket/picture.png?etl_args=64", picture)
        assert answer.headers["content-type"] == "image/jpeg"
        size = libraries.run("import io, sys; from PIL import Image; image = Image.open(io.BytesIO("
                             "sys.stdin.buffer.read())); print(image.format, *image.size)", answer.body)
        assert size.split() == [b"JPEG", b"64", b"32"]

    def test_lines_of_json_become_parquet(
        self, need: Callable[..., Libraries], start_runtime: StartRuntime
    ) -> None:
        libraries = need("pyarrow")
        rows = [{"id": number, "name": "n%d" % number, "of": [number, 1]} for number in range(500)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        runtime = serve_packed(start_runtime, "jsonl_to_parquet.py", libraries.python,
                               ["--packages", "pyarrow"])
        answer = runtime.request("PUT", "/bucket/rows.jsonl", lines).body
        read = libraries.run(
            "import io, json, sys, pyarrow.parquet as p; print(json.dumps(p.read_table("
            "io.BytesIO(sys.stdin.buffer.read())).to_pylist()))", answer)
        assert json.loads(read) == rows

    def test_a_model_classifies(
        self, need: Callable[..., Libraries], start_runtime: StartRuntime
    ) -> None:
        libraries = need("scikit-learn")
        runtime = serve_packed(start_runtime, "classify_iris.py", libraries.python,
                               ["--packages", "scikit-learn"])
        answer = runtime.request("PUT", "/bucket/iris.csv", b"5.1,3.5,1.4,0.2\n6.7,3.0,5.2,2.3\n")
        assert answer.body == b"setosa\nvirginica\n"

    def test_a_file_of_sound_becomes_wav(
        self, need: Callable[..., Libraries], start_runtime: StartRuntime, tmp_path: Path
    ) -> None:
        libraries = need("imageio-ffmpeg")
        sound = tmp_path / "sound.wav"
        with wave.open(str(sound), "wb") as file:
            file.setparams((2, 2, 44100, 0, "NONE", ""))
            file.writeframes(b"".join(
                struct.pack("<hh", *[int(20000 * math.sin(step / 16))] * 2) for step in range(44100)))
        song = tmp_path / "@ais" / "bucket" / "%ob" / "song.flac"
        song.parent.mkdir(parents=True)
        subprocess.run([libraries.bin / "ffmpeg", "-v", "error", "-i", sound, song], check=True, timeout=60)
        runtime = serve_packed(
            start_runtime, "to_wav.py", libraries.python, ["--arg-type", "fqn"],
            {"PATH": str(libraries.bin)})
        answers = [
            runtime.request("PUT", "/bucket/song.flac?etl_args=8000&etl_fqn=%s"
                            % str(song).replace("%", "%2525")),
            runtime.request("PUT", "/bucket/song.flac?etl_args=8000", song.read_bytes())]
        for answer in answers:
            assert answer.status == 200, answer.body
            with wave.open(io.BytesIO(answer.body)) as file:
                assert (file.getnchannels(), file.getframerate()) == (1, 8000)
                assert len(file.readframes(1 << 30)) == pytest.approx(16000, abs=200)

    def test_a_class_with_a_route_and_a_hook_filters_words(
        self, need: Callable[..., Libraries], start_runtime: StartRuntime
    ) -> None:
        libraries = need("fastapi", "uvicorn[standard]")
        runtime = serve_packed(start_runtime, "word_filter.py", libraries.python,
                               ["--env", "WORDS=plan,a"])
        assert json.loads(runtime.request("GET", "/words").body) == ["plan", "a"]
        assert runtime.request("PUT", "/bucket/o", b"a secret plan").body == b"* secret ****"


# == The table ==


def test_the_table_of_the_examples_has_them_all() -> None:
    table = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").partition("## Example")[2]
    linked = re.findall(r"\(\.\./tests/etls/(\w+\.py)\)", table)
    assert sorted(linked) == sorted(file.name for file in ETLS.glob("*.py"))
