"""The reasons for which tests are skipped: how one is written for a missing peer, and how a run sums them up."""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Iterable

from tests.support import peers

_MISSING_PEER = re.compile(r"(?P<peer>.+?) isn't installed(?:: (?P<why>.*?))?(?: \[(?P<install>(?:(?! \[).)*)\])?", re.DOTALL)
_NOT_IMPORTED = re.compile(r"could not import '(?P<module>[\w.]+)': (?P<why>.*)", re.DOTALL)  # pytest's importorskip


def reason(peer: str, detail: str = "", install: str = "") -> str:
    """Return the reason for which a test is skipped that needs a peer.

    Args:
        why: What its installer, or the program itself, said.
        install: The command that installs it.
    """
    return f"{peer} isn't installed{f': {detail}' if detail else ''}{f' [{install}]' if install else ''}"


def summary(reasons: Iterable[str]) -> list[str]:
    """Return a line for each peer that is missing or broken, and one for each other reason, the most frequent first."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    whys: dict[tuple[str, str], str] = {}
    for text in reasons:
        peer, detail, install = _parts(text.removeprefix("Skipped: "))
        counts[peer, install] += 1
        whys.setdefault((peer, install), detail)
    lines = []
    for (peer, install), count in counts.most_common():
        detail = whys[peer, install]
        lines.append(f"{count:5} {peer}{f' ({detail})' if detail else ''}{f': {install}' if install else ''}")
    return lines


def _parts(text: str) -> tuple[str, str, str]:
    """Return the peer that a reason names, why it does not work, and what installs it; another reason as it is."""
    if peer := _MISSING_PEER.fullmatch(text):
        return peer["peer"], peer["why"] or "", peer["install"] or ""
    if (module := _NOT_IMPORTED.fullmatch(text)) and module["module"].partition(".")[0] not in sys.stdlib_module_names:
        absent = module["why"].startswith("No module named")
        return module["module"].partition(".")[0], "" if absent else module["why"], peers.pip_command(module["module"])
    return text, "", ""
