"""Count how often a command opens each file, by an audit hook in the process that runs it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A file that is linked under a second name is the same file: it is counted by its number, too.
_HOOK = """
import atexit, collections, json, os, sys
_opened = collections.Counter()
def _count(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        try:
            number = os.stat(path).st_ino
        except OSError:
            number = 0
        _opened[path, number] += 1
sys.addaudithook(_count)
atexit.register(lambda: os.write(
    os.open({log!r}, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), json.dumps([[*key, n] for key, n in _opened.items()]).encode()
))
"""


def opens(run: Callable[..., Any], tmp_path: Path, folder: Path, *args: object, **options: Any) -> Counter[str]:
    """Run `adapterhub ARGS…` in a process of its own (the fixture `run`) and count the opens of files below `folder`.

    Returns:
        Path relative to `folder` to the number of times that the process opened it. Opens by native libraries are not seen.
    """
    log, scratch = tmp_path / "opens.json", tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    # Temporary files are on the disk of the folder, where links to its files are possible.
    run(*args, first=_HOOK.format(log=str(log)), env={"TMPDIR": str(scratch), **options.pop("env", {})}, **options)
    root = folder.resolve()
    path_by_number = {path.stat().st_ino: path for path in root.rglob("*") if path.is_file()}
    counts: Counter[str] = Counter()
    for name, number, count in json.loads(log.read_text()):
        path = Path(name) if Path(name).is_relative_to(root) else path_by_number.get(number)
        if path is not None and not path.is_dir():
            counts[str(path.relative_to(root))] += count
    return counts
