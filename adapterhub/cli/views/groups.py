"""Findings of one kind as one line with a count: ten lines for 300,000 bad tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapterhub.cli import output
from adapterhub_converters import linear

_SHOWN = 3  # names of one line, lines of one kind, hints of one kind
# A number of a message that may differ among items of one kind. Not F16, not the 0 of layers.0.q_proj.
_NUMBER = linear.Pattern(r"(^|[^\w.-])(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\b")


@dataclass(frozen=True, slots=True)
class Item:
    """One finding.

    Attributes:
        kind: Such as `error[nan]` or `rounded:`; items of one kind are shown together.
        name: The tensor, module or blob, in the file `place` if there is one.
        what: The message.
        hint: How to fix it.
        color: Of `kind`, on a terminal.
    """

    kind: str
    name: str
    what: str
    hint: str = ""
    place: str = ""
    color: str = ""


def lines(
    items: Iterable[Item], screen: int | None, *, indent: int = 0, others: Mapping[str, int] | None = None
) -> Iterator[str]:
    """Lines of text: one for each kind and message, whose numbers may differ, with the first names and a count.

    `others` are the numbers of further items of a kind.
    """
    kinds: dict[str, dict[str, list[Item]]] = {}
    for item in items:
        kinds.setdefault(item.kind, {}).setdefault(_NUMBER.sub(lambda found: f"{found[1]}#", item.what), []).append(item)
    margin = " " * indent
    for kind, variants in kinds.items():
        shown = list(variants.values())[:_SHOWN]
        color = shown[0][0].color
        for group in shown:
            text = output.one_line(f"{kind} {_names(group)}{_message(group)}")
            first, *rest = output.wrapped(margin + text, screen, indent=indent + 4)
            yield first.replace(kind, output.color(kind, color), 1) if color else first
            yield from rest
        left = sum(map(len, list(variants.values())[_SHOWN:])) + (others or {}).get(kind, 0)
        if left:
            yield f"{margin}    {output.more(left, kind.rstrip(':'))}"
        for hint in dict.fromkeys(group[0].hint for group in shown if group[0].hint):
            yield from output.wrapped(output.one_line(f"{margin}    hint: {hint}"), screen, indent=indent + 10)


def _names(group: Sequence[Item]) -> str:
    """The first names and a count: `weights.safetensors: a, b, c and 7 more: `."""
    places = {item.place for item in group}
    place = f"{group[0].place}: " if len(places) == 1 and group[0].place else ""
    names = [item.name if place else ": ".join(filter(None, (item.place, item.name))) for item in group]
    if not any(names):
        return place if len(group) == 1 else f"{place}{len(group)} times: "
    more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
    return f"{place}{', '.join(names[:_SHOWN])}{more}{': ' if group[0].what else ''}"


def _message(group: Sequence[Item]) -> str:
    """The message, with `0.1 to 0.3` for a number that differs."""
    found = [[match[2] for match in _NUMBER.finditer(item.what)] for item in group]
    spans = iter((min(column, key=float), max(column, key=float)) for column in zip(*found, strict=True))

    def span(match: linear.Match) -> str:
        least, most = next(spans)
        return match[1] + (least if float(least) == float(most) else f"{least} to {most}")

    return _NUMBER.sub(span, group[0].what)
