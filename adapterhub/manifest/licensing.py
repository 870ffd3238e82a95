"""Licenses as SPDX expressions: that of a work made of several parts, with the reasons, and whether a list permits one.

Using an adapter needs the permissions of everything that it was made from, so their licenses are
joined by AND (spdx.org, "License Expressions"). A license that was not recorded is listed as missing, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cache
from typing import Any

from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

_WORD = safe_regex.Pattern(r"[A-Za-z0-9.+:-]+|[()]")
_OPERATORS = {"and", "or", "with"}
# Names that the Hub has for licenses which SPDX lists under others.
_HUB_NAMES = {"odc-by": "ODC-By-1.0", "odbl": "ODbL-1.0", "pddl": "PDDL-1.0"}
_UNKNOWN = {"", "other", "unknown", "none", "noassertion"}
# What a part of an identifier says about use, for the reasons.
_TERMS = {
    "-nc": "no commercial use",
    "-nd": "no derivatives, and whether an adapter is one is a question for lawyers",
    "-sa": "derivatives under the same license",
    "gpl-": "derivatives under the same license",
    "licenseref-": "not a license of SPDX: read its text",
}
_MAX_CHARACTERS = 200  # of an expression


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
    parsed = _parse(text)
    return "" if parsed is None else str(parsed.render("{symbol.key}"))


def permits(text: str | None, allowed: Sequence[str]) -> bool:
    """Return whether a recorded license can be met by the `allowed` ones: one side of each OR, both sides of each AND.

    Example:
        >>> permits("MIT OR GPL-3.0-only", ["MIT"]), permits("MIT AND GPL-3.0-only", ["MIT"]), permits(None, ["MIT"])
        (True, False, False)
    """
    parsed, names = _parse(text), {expression(name).lower() for name in allowed}
    if parsed is None:
        return (text or "").lower() in [name.lower() for name in allowed]
    return _is_met(parsed, names)


def _is_met(parsed: Any, names: Set[str]) -> bool:
    """Return whether a parsed expression can be met by licenses with these names in lowercase."""
    name = parsed.render("{symbol.key}").lower()
    # Who may use a later version may use this one.
    if not names.isdisjoint((name, name.removesuffix("+"), name.replace("-or-later", "-only"))):
        return True
    if isinstance(parsed, _spdx().AND):
        return all(_is_met(part, names) for part in parsed.args)
    return isinstance(parsed, _spdx().OR) and any(_is_met(part, names) for part in parsed.args)


@cache
def _spdx() -> Any:
    """Return the licenses and exceptions that SPDX lists, and their grammar."""
    from license_expression import get_spdx_licensing  # it reads 1 MB of JSON

    return get_spdx_licensing()


def _parse(text: str | None) -> Any:
    """Return the parsed expression of a recorded license; None if there is none. Text without its form is one LicenseRef."""
    text = (text or "").strip()[:_MAX_CHARACTERS]
    words = [match[0] for match in _WORD.finditer(text)]
    if text.lower() in _UNKNOWN or all(word in "()" for word in words):
        return None
    spelled = [word.upper() if word.lower() in _OPERATORS else word if word in "()" else _identifier(word) for word in words]
    parsed = _by_grammar(" ".join(spelled))
    return _by_grammar(_reference("-".join(word for word in words if word not in "()"))) if parsed is None else parsed


def _by_grammar(text: str, *, strict: bool = True) -> Any:
    """Return text parsed as an expression; None if it is none, or if `strict` and an exception is where a license belongs."""
    from license_expression import ExpressionError

    try:
        return _spdx().parse(text, strict=strict)
    except ExpressionError:
        return None


def _identifier(word: str) -> str:
    """Return the identifier of a license or an exception in SPDX's spelling, or as a LicenseRef."""
    lower = word.lower()
    if lower.startswith("licenseref-"):
        return _reference(word[len("licenseref-") :])
    for name in (_HUB_NAMES.get(lower, word), lower.removesuffix("+")):
        key = str(getattr(_by_grammar(name, strict=False), "key", ""))
        if key in _spdx().known_symbols:
            return f"{key}+" if name != word and lower.endswith("+") else key
    return _reference(word)


def _reference(name: str) -> str:
    """Return a LicenseRef with a name, without the characters that it cannot have."""
    return f"LicenseRef-{name.replace('+', '-').replace(':', '-')}"


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
