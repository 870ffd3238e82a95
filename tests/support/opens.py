"""Count how often a command opens each file, by an audit hook in the process that runs it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HOOK = """
import atexit, collections, json, os, sys
_opened = collections.Counter()
def _count(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened[os.path.realpath(os.fsdecode(arguments[0]))] += 1
sys.addaudithook(_count)
atexit.register(lambda: os.write(os.open({log!r}, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), json.dumps(_opened).encode()))
"""


def opens(run: Callable[..., Any], tmp_path: Path, folder: Path, *args: object, **options: Any) -> Counter[str]:
    """Run `adapterhub ARGS…` in a process of its own (the fixture `run`) and count the opens of files below `folder`.

    Returns:
        Path relative to `folder` to the number of times that the process opened it. Opens by native libraries are not seen.
    """
    log = tmp_path / "opens.json"
    run(*args, first=_HOOK.format(log=str(log)), **options)
    found = {Path(path): count for path, count in json.loads(log.read_text()).items()}
    root = folder.resolve()
    below = {path: count for path, count in found.items() if path.is_relative_to(root) and not path.is_dir()}
    return Counter({str(path.relative_to(root)): count for path, count in below.items()})
