"""The combined license of a work made of several, as one SPDX expression, and the reasons.

Nothing is decided here. Using an adapter needs the permissions of everything that it was made from, so their licenses are
joined by AND (spdx.org, "License Expressions"). A license that was not recorded is listed as missing, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub_converters import linear

_WORD = linear.Pattern(r"[A-Za-z0-9.+:-]+|[()]")
_OPERATORS = {"and", "or", "with"}
# In SPDX's spelling, of the licenses that most models and data sets on the Hub have; it compares in any case.
_KNOWN = {
    one.lower(): one
    for one in (
        "0BSD", "AFL-3.0", "AGPL-3.0-only", "AGPL-3.0-or-later", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause",
        "BSD-3-Clause", "BSL-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0",
        "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0",
        "CDLA-Permissive-2.0", "EPL-2.0", "EUPL-1.2", "GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only",
        "GPL-3.0-or-later", "ISC", "LGPL-2.1-only", "LGPL-3.0-only", "LGPL-3.0-or-later", "MIT", "MPL-2.0", "MS-PL",
        "ODbL-1.0", "ODC-By-1.0", "OFL-1.1", "PDDL-1.0", "Unlicense", "WTFPL", "Zlib",
    )
}  # fmt: skip
_OLD = {"gpl-2.0": "GPL-2.0-only", "gpl-3.0": "GPL-3.0-only", "agpl-3.0": "AGPL-3.0-only", "lgpl-3.0": "LGPL-3.0-only",
        "odc-by": "ODC-By-1.0", "odbl": "ODbL-1.0", "pddl": "PDDL-1.0"}  # fmt: skip
_UNKNOWN = {"", "other", "unknown", "none", "noassertion"}
# What a part of an identifier says about use, as its license does.
_TERMS = {
    "-nc": "no commercial use",
    "-nd": "no derivatives, and whether an adapter is one is a question for lawyers",
    "-sa": "derivatives under the same license",
    "gpl-": "derivatives under the same license",
    "licenseref-": "not a license of SPDX: read its text",
}
_MAX = 200  # characters of an expression


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a work was made from: what it is, its name, and its license as recorded; None if none is."""

    kind: str
    name: str
    license: str | None


@dataclass(frozen=True, slots=True)
class Combined:
    """The license of a work made of parts.

    Attributes:
        expression: All known licenses, joined by AND; empty without any.
        reasons: A line for each part and each term, for people.
        missing: The parts without a license, `base org/model`.
    """

    expression: str
    reasons: tuple[str, ...]
    missing: tuple[str, ...]


def expression(text: str | None) -> str:
    """A recorded license as an SPDX expression; empty for none. What SPDX does not list becomes a LicenseRef.

    Example:
        >>> expression("apache-2.0"), expression("llama3.1"), expression("mit or gpl-3.0"), expression("other")
        ('Apache-2.0', 'LicenseRef-llama3.1', 'MIT OR GPL-3.0-only', '')
    """
    if (text or "").strip().lower() in _UNKNOWN:
        return ""
    words = [_word(found[0]) for found in _WORD.finditer((text or "")[:_MAX])]
    joined = " ".join(words if _is_balanced(words) else [word for word in words if word not in "()"])
    return joined.replace("( ", "(").replace(" )", ")")


def _is_balanced(words: Sequence[str]) -> bool:
    """Whether each parenthesis has its other one: `A) OR (B` would end those that are put around it."""
    depth = 0
    for word in words:
        depth += (word == "(") - (word == ")")
        if depth < 0:
            return False
    return not depth


def _word(word: str) -> str:
    return word.upper() if word.lower() in _OPERATORS else word if word in "()" else _identifier(word)


def _identifier(word: str) -> str:
    lower = word.lower()
    if lower.startswith("licenseref-"):
        return word
    return _KNOWN.get(lower) or _OLD.get(lower) or f"LicenseRef-{word.replace('+', '-').replace(':', '-')}"


def combined(parts: Sequence[Part]) -> Combined:
    """Return the license that a work made of `parts` has at least, with the reasons."""
    found: dict[str, None] = {}
    reasons, missing = [], []
    for part in parts:
        license_ = expression(part.license)
        if license_:
            found[f"({license_})" if " OR " in license_ and len(parts) > 1 else license_] = None
            reasons.append(f"{part.kind} {part.name}: {license_}")
        else:
            missing.append(f"{part.kind} {part.name}")
            reasons.append(f"{part.kind} {part.name}: no license is recorded, so that the expression is incomplete")
    for license_ in found:
        reasons += [f"{license_}: {says}" for mark, says in _TERMS.items() if mark in license_.lower()]
    return Combined(" AND ".join(found), tuple(reasons), tuple(missing))
