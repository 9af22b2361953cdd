"""The packages that the example classes of tests/etls need, in an environment of their own."""
import shutil
import subprocess
from pathlib import Path
from typing import Dict, NamedTuple

from harness import exact_environment
from test_installing import index_variables, make_environment

PACKAGES = ("pillow", "pyarrow", "scikit-learn", "imageio-ffmpeg", "fastapi", "uvicorn[standard]")


class Libraries(NamedTuple):
    """An environment; `bin` is a folder where ffmpeg is, unless that is missing."""

    python: str
    bin: Path
    missing: Dict[str, str]  # packages that cannot be installed here, with the reason

    def run(self, code: str, data: bytes = b"") -> bytes:
        """Run some lines that use the packages."""
        return subprocess.run([self.python, "-c", code], input=data, stdout=subprocess.PIPE,
                              check=True, timeout=120).stdout


def install_libraries(folder: Path) -> Libraries:
    """Install the packages, each as far as it can be; ffmpeg is the machine's or comes with one."""
    python = make_environment(folder / "environment")
    env = exact_environment(python, {"PIP_NO_INDEX": None, **index_variables()})
    libraries = Libraries(python, folder / "bin", {})
    for package in PACKAGES:
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", "--only-binary", ":all:", package], env=env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=600)
        if done.returncode:
            libraries.missing[package] = "pip cannot install %s: %s" % (package, done.stdout[-300:])
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg and "imageio-ffmpeg" not in libraries.missing:
        code = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe(), end='')"
        ffmpeg = libraries.run(code).decode()
    libraries.bin.mkdir()
    if ffmpeg:
        libraries.missing.pop("imageio-ffmpeg", None)
        (libraries.bin / "ffmpeg").symlink_to(ffmpeg)
    return libraries
