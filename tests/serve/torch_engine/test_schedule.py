"""Who is next: in the order in which they came, overtaken for a while and not forever, and no slot is taken from a row."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapterhub.serve.torch_engine import Limits, Request  # noqa: E402
from adapterhub.serve.torch_engine.loaded_adapters import LoadedAdapter  # noqa: E402
from adapterhub.serve.torch_engine.schedule import Row, Schedule, SlotTable  # noqa: E402

NOTHING: Any = None
ADAPTERS = {name: LoadedAdapter(name, {}) for name in "abcdef"}


class Filled:
    """A table of slots, and what it filled."""

    def __init__(self, count: int) -> None:
        self.log: list[str] = []
        self.table = SlotTable(count, lambda slot, entry: self.log.append(f"{entry.key}{slot}"))


def parts(names: str) -> Any:
    return tuple((ADAPTERS[name], 1.0) for name in names)


def row(names: str, tokens: int = 10) -> Row:
    return Row(Request([1], (), tokens - 1), parts(names), NOTHING, NOTHING, NOTHING)


def admitted_keys(schedule: Schedule, *rows: Row) -> str:
    """The adapters of those who are admitted."""
    schedule.waiting.extend(rows)
    keys = ""
    for row in schedule.admit():
        schedule.start(row)
        keys += "".join(adapter.key for adapter, _ in row.parts) or "-"
    return keys


def test_the_least_recently_used_slot_that_no_row_uses_is_filled_next() -> None:
    slots = Filled(2)
    for names in ("a", "b", "a"):
        slots.table.pin(parts(names))
        slots.table.unpin(parts(names))
    assert slots.table.pin(parts("c")) == ((1, 1.0),)  # b's
    assert slots.log == ["a0", "b1", "c1"]
    assert not slots.table.has_room(parts("ab"))
    assert slots.table.has_room(parts("ac"))
    assert slots.table.pin(parts("d")) == ((0, 1.0),)
    assert not slots.table.has_room(parts("a"))
    assert slots.table.has_room(parts("cd"))
    assert slots.table.pinned_count == 2


def test_a_pinned_adapter_gives_up_its_slot_last() -> None:
    slots = Filled(2)
    slots.table.pinned = frozenset("a")
    for names in ("a", "b", "c", "d"):
        slots.table.pin(parts(names))
        slots.table.unpin(parts(names))
    assert slots.log == ["a0", "b1", "c1", "d1"]
    slots.table.pinned = frozenset("ad")
    assert slots.table.pin(parts("e")) == ((0, 1.0),)  # rather than wait for ever


def test_a_blend_keeps_the_slots_of_its_own_adapters() -> None:
    slots = Filled(2)
    for names in ("a", "b"):
        slots.table.pin(parts(names))
        slots.table.unpin(parts(names))
    assert slots.table.pin(parts("ca")) == ((1, 1.0), (0, 1.0))
    slots.table.unpin(parts("ca"))
    assert slots.table.pin(parts("aa")) == ((0, 1.0), (0, 1.0))
    slots.table.unpin(parts("aa"))
    assert slots.table.pinned_count == 0


def test_a_slot_that_cannot_be_filled_is_free_again() -> None:
    def fill(_: int, adapter: LoadedAdapter) -> None:
        if adapter.key == "b":
            raise MemoryError

    table = SlotTable(1, fill)
    with pytest.raises(MemoryError):
        table.pin(parts("b"))
    assert (len(table), table.pinned_count) == (0, 0)
    assert table.pin(parts("a")) == ((0, 1.0),)


def test_those_whose_adapters_find_no_slot_are_overtaken_until_they_have_waited_long_enough() -> None:
    schedule = Schedule(Limits(slots=2, rows=4, patience=60), Filled(2).table, 1)
    first, second, third = row("a"), row("b"), row("c")
    assert admitted_keys(schedule, first, second, third, row("a")) == "aba"
    assert admitted_keys(schedule, row("")) == "-"
    schedule.remove(schedule.rows[-1])
    third.since -= 61
    assert admitted_keys(schedule, row("a"), row("b")) == ""  # although there is room for them
    schedule.remove(second)
    assert admitted_keys(schedule) == "ca"
    assert [row.parts for row in schedule.waiting] == [parts("b")]


def test_no_more_rows_and_tokens_than_allowed() -> None:
    schedule = Schedule(Limits(slots=2, rows=3, keys_values=100), Filled(2).table, 2)
    assert admitted_keys(schedule, row("", 30), row("", 30), row("", 10)) == "-"
    schedule.remove(schedule.rows[0])
    assert admitted_keys(schedule) == "--"
    assert admitted_keys(schedule, row("", 5), row("", 1)) == "-"
    for running_row in list(schedule.rows):
        schedule.remove(running_row)
    assert admitted_keys(schedule, row("", 500)) == "-"  # the row before it
    schedule.remove(schedule.rows[0])
    assert admitted_keys(schedule) == "-"  # larger than all that is allowed, alone
