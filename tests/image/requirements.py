"""Print what the image installs: the project's requirements, and those of the extras that are named, joined by commas.

    python tests/image/requirements.py [EXTRA,…]

They are said once, in setup.cfg. The form is that of the runtime's own variable PACKAGES.
"""
import configparser
import sys
from pathlib import Path
from typing import Sequence

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def main(argv: Sequence[str]) -> int:
    """Print them; tell of an extra that is not there."""
    setup = configparser.ConfigParser()
    setup.read(SETUP, encoding="utf-8")
    extras = setup["options.extras_require"]
    requirements = setup["options"]["install_requires"].split("\n")
    for name in filter(None, ",".join(argv).split(",")):
        if name not in extras:
            print("setup.cfg has no extra %r, but %s" % (name, ", ".join(extras)), file=sys.stderr)
            return 1
        requirements += extras[name].split("\n")
    print(",".join(filter(None, requirements)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
