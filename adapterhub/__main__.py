"""The entry point: `python -m adapterhub`, and the script `adapterhub`."""

import gc
import sys
from typing import NoReturn

from .version import __version__


def main() -> NoReturn:
    """Run one command and exit with a code of docs/exit-codes.md."""
    if sys.argv[1:] == ["--version"]:  # scripts ask this again and again, and without click it takes half the time
        sys.stdout.write(f"adapterhub {__version__}\n")
        raise SystemExit(0)
    gc.disable()  # until a command begins: what modules define stays, and to traverse it takes a tenth of a short command
    try:
        from adapterhub.cli.main import main

        main()
    except KeyboardInterrupt:  # pressed while the command line, which handles it, was being imported
        raise SystemExit(130) from None
    finally:
        gc.freeze()  # else the interpreter traverses all objects twice as it exits


if __name__ == "__main__":
    main()
