"""The lines that differ between two texts, in time that grows with their length alone."""

from __future__ import annotations

import difflib
from itertools import takewhile

# Lines that are aligned with each other, which takes the product of both numbers; longer changes are shown as one block.
_ALIGNED = 200


def changed_lines(old: str, new: str) -> tuple[str, ...]:
    """Return the lines that differ, in order: those of `old` alone begin with `-`, those of `new` alone with `+`.

    What both begin and end with is left out first. If more than 200 lines of either remain, all of `old`'s come first.
    """
    before, after = old.splitlines(), new.splitlines()
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    before, after = before[start:], after[start:]
    end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(before), reversed(after), strict=False)))
    before, after = before[: len(before) - end], after[: len(after) - end]
    if max(len(before), len(after)) > _ALIGNED:
        return (*(f"-{line}" for line in before), *(f"+{line}" for line in after))
    lines = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for operation, a, b, c, d in matcher.get_opcodes():
        if operation != "equal":
            lines += [*(f"-{line}" for line in before[a:b]), *(f"+{line}" for line in after[c:d])]
    return tuple(lines)
