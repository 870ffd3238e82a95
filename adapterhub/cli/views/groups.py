"""Findings of one kind as one line with a count: ten lines instead of 300,000 for as many bad tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from adapterhub.cli import output
from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

_SHOWN = 3  # the most names in a line, and lines of one kind
# A number in a message that may differ among items of one kind. Not F16, and not the 0 of layers.0.q_proj.
_NUMBER = safe_regex.Pattern(r"(^|[^\w.-])(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\b")


@dataclass(frozen=True, slots=True)
class Item:
    """One finding.

    Attributes:
        kind: A kind such as `error[nan]` or `rounded:`; items of one kind are shown together.
        name: The tensor, module or blob, in the file `place` if there is one.
        message: The message.
        hint: How to fix it.
        color: The color of `kind` on a terminal.
    """

    kind: str
    name: str
    message: str
    hint: str = ""
    place: str = ""
    color: str = ""


def lines(
    items: Iterable[Item], screen: int | None, *, indent: int = 0, hidden: Mapping[str, int] | None = None
) -> Iterator[str]:
    """Yield lines of text: one for each kind and message, whose numbers may differ, with the first names and a count.

    `hidden` counts further items of each kind, which are not in `items`.
    """
    kinds: dict[str, dict[str, list[Item]]] = {}
    for item in items:
        kinds.setdefault(item.kind, {}).setdefault(without_numbers(item.message), []).append(item)
    margin = " " * indent
    for kind, variants in kinds.items():
        shown_groups = list(variants.values())[:_SHOWN]
        color = shown_groups[0][0].color
        for group in shown_groups:
            text = output.one_line(f"{kind} {_names(group)}{joined_message([item.message for item in group])}")
            first, *continuation = output.wrap(margin + text, screen, indent=indent + 4)
            yield first.replace(kind, output.color(kind, color), 1) if color else first
            yield from continuation
        hidden_count = sum(map(len, list(variants.values())[_SHOWN:])) + (hidden or {}).get(kind, 0)
        if hidden_count:
            yield f"{margin}    {output.remainder_line(hidden_count, kind.rstrip(':'))}"
        for hint in dict.fromkeys(group[0].hint for group in shown_groups if group[0].hint):
            yield from output.wrap(output.one_line(f"{margin}    hint: {hint}"), screen, indent=indent + 10)


def _names(group: Sequence[Item]) -> str:
    """Return the first names and a count: `weights.safetensors: a, b, c and 7 more: `."""
    places = {item.place for item in group}
    place = f"{group[0].place}: " if len(places) == 1 and group[0].place else ""
    names = [item.name if place else ": ".join(filter(None, (item.place, item.name))) for item in group]
    if not any(names):
        return place if len(group) == 1 else f"{place}{len(group)} times: "
    remainder = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
    return f"{place}{', '.join(names[:_SHOWN])}{remainder}{': ' if group[0].message else ''}"


def without_numbers(message: str) -> str:
    """Return what messages have in common that differ in numbers alone."""
    return _NUMBER.sub(lambda match: f"{match[1]}#", message)


def joined_message(messages: Sequence[str]) -> str:
    """Return messages that differ in numbers alone as one, with `0.1 to 0.3` for a number that differs."""
    number_rows = [[match[2] for match in _NUMBER.finditer(message)] for message in messages]
    spans = iter((min(column, key=float), max(column, key=float)) for column in zip(*number_rows, strict=True))

    def span(match: safe_regex.Match) -> str:
        least, most = next(spans)
        return match[1] + (least if float(least) == float(most) else f"{least} to {most}")

    return _NUMBER.sub(span, messages[0])
