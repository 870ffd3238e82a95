"""The command line: parse, one call, render. The only layer that prints, exits or reads the environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with a code of docs/exit-codes.md."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        from adapterhub import __version__

        print(f"adapterhub {__version__}")
        sys.exit(0)
    from .process import run

    sys.exit(run(arguments))
