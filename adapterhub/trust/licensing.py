"""The combined license of a work made of several parts, as one SPDX expression, with the reasons.

Nothing is decided here. Using an adapter needs the permissions of everything that it was made from, so their licenses are
joined by AND (spdx.org, "License Expressions"). A license that was not recorded is listed as missing, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

_WORD = safe_regex.Pattern(r"[A-Za-z0-9.+:-]+|[()]")
_OPERATORS = {"and", "or", "with"}
# The licenses of most models and data sets on the Hub, in SPDX's spelling, by their lowercase form.
_SPDX_SPELLINGS = {
    identifier.lower(): identifier
    for identifier in (
        "0BSD", "AFL-3.0", "AGPL-3.0-only", "AGPL-3.0-or-later", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause",
        "BSD-3-Clause", "BSL-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0",
        "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0",
        "CDLA-Permissive-2.0", "EPL-2.0", "EUPL-1.2", "GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only",
        "GPL-3.0-or-later", "ISC", "LGPL-2.1-only", "LGPL-3.0-only", "LGPL-3.0-or-later", "MIT", "MPL-2.0", "MS-PL",
        "ODbL-1.0", "ODC-By-1.0", "OFL-1.1", "PDDL-1.0", "Unlicense", "WTFPL", "Zlib",
    )
}  # fmt: skip
_DEPRECATED = {"gpl-2.0": "GPL-2.0-only", "gpl-3.0": "GPL-3.0-only", "agpl-3.0": "AGPL-3.0-only", "lgpl-3.0": "LGPL-3.0-only",
        "odc-by": "ODC-By-1.0", "odbl": "ODbL-1.0", "pddl": "PDDL-1.0"}  # fmt: skip
_UNKNOWN = {"", "other", "unknown", "none", "noassertion"}
# What a part of an identifier says about use, for the reasons.
_TERMS = {
    "-nc": "no commercial use",
    "-nd": "no derivatives, and whether an adapter is one is a question for lawyers",
    "-sa": "derivatives under the same license",
    "gpl-": "derivatives under the same license",
    "licenseref-": "not a license of SPDX: read its text",
}
_MOST_CHARACTERS = 200  # of an expression


@dataclass(frozen=True, slots=True)
class LicensedPart:
    """A part of a work: its kind, its name, and its recorded license, or None."""

    kind: str
    name: str
    license: str | None


@dataclass(frozen=True, slots=True)
class CombinedLicense:
    """The license of a work made of parts.

    Attributes:
        expression: All known licenses, joined by AND; empty if there are none.
        reasons: A line for each part and each term, for people.
        missing: The parts without a license, such as `base org/model`.
    """

    expression: str
    reasons: tuple[str, ...]
    missing: tuple[str, ...]


def expression(text: str | None) -> str:
    """Return a recorded license as an SPDX expression; empty if there is none. What SPDX does not list becomes a LicenseRef.

    Example:
        >>> expression("apache-2.0"), expression("llama3.1"), expression("mit or gpl-3.0"), expression("other")
        ('Apache-2.0', 'LicenseRef-llama3.1', 'MIT OR GPL-3.0-only', '')
    """
    if (text or "").strip().lower() in _UNKNOWN:
        return ""
    words = [_word(match[0]) for match in _WORD.finditer((text or "")[:_MOST_CHARACTERS])]
    joined = " ".join(words if _is_balanced(words) else [word for word in words if word not in "()"])
    return joined.replace("( ", "(").replace(" )", ")")


def _is_balanced(words: Sequence[str]) -> bool:
    """Return whether all parentheses match: `A) OR (B` would escape the ones that are put around it."""
    depth = 0
    for word in words:
        depth += (word == "(") - (word == ")")
        if depth < 0:
            return False
    return not depth


def _word(word: str) -> str:
    """Return a word of an expression in SPDX's spelling."""
    return word.upper() if word.lower() in _OPERATORS else word if word in "()" else _identifier(word)


def _identifier(word: str) -> str:
    """Return the identifier of a license in SPDX's spelling, or as a LicenseRef."""
    lower = word.lower()
    if lower.startswith("licenseref-"):
        return word
    return _SPDX_SPELLINGS.get(lower) or _DEPRECATED.get(lower) or f"LicenseRef-{word.replace('+', '-').replace(':', '-')}"


def combine(parts: Sequence[LicensedPart]) -> CombinedLicense:
    """Return the license that a work made of `parts` has at least, with the reasons."""
    expressions: dict[str, None] = {}
    reasons, missing = [], []
    for part in parts:
        license_ = expression(part.license)
        # Parentheses, because AND binds more tightly than OR.
        if license_:
            expressions[f"({license_})" if " OR " in license_ and len(parts) > 1 else license_] = None
            reasons.append(f"{part.kind} {part.name}: {license_}")
        else:
            missing.append(f"{part.kind} {part.name}")
            reasons.append(f"{part.kind} {part.name}: no license is recorded, so that the expression is incomplete")
    for license_ in expressions:
        reasons += [f"{license_}: {term}" for mark, term in _TERMS.items() if mark in license_.lower()]
    return CombinedLicense(" AND ".join(expressions), tuple(reasons), tuple(missing))
