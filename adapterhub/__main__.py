"""`python -m adapterhub`, and what the script `adapterhub` runs."""

import sys
from typing import NoReturn

from .version import __version__


def main() -> NoReturn:
    """Run one command and exit with a code of docs/exit-codes.md."""
    if sys.argv[1:] == ["--version"]:  # asked by scripts again and again: without click, half the time
        sys.stdout.write(f"adapterhub {__version__}\n")
        raise SystemExit(0)
    try:
        from adapterhub.cli.main import main

        main()
    except KeyboardInterrupt:  # before the command line is there to handle it
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
