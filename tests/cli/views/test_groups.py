"""Findings of one kind are one line with a count."""

from __future__ import annotations

import pytest

from adapterhub.cli.views.groups import Item, lines


def text(*items: Item, screen: int | None = None) -> list[str]:
    return list(lines(items, screen))


def test_one_finding_is_one_line() -> None:
    assert text(Item("error[nan]", "a", "has a NaN", "Train again", "w.safetensors")) == [
        "error[nan] w.safetensors: a: has a NaN",
        "    hint: Train again",
    ]


def test_numbers_of_one_message_become_a_range() -> None:
    lines = text(*(Item("rounded:", f"layers.{n}.q_proj", f"as F16, off by {n + 1}e-05 of (8, {8 * n})") for n in range(5)))
    assert lines == [
        "rounded: layers.0.q_proj, layers.1.q_proj, layers.2.q_proj and 2 more: as F16, off by 1e-05 to 5e-05 of (8, 0 to 32)"
    ]


def test_300_000_bad_tensors_are_ten_lines() -> None:
    items = [Item(f"error[{n % 3}]", f"tensor {n}", f"kind {'abcdefgh'[n % 7]} of {n}", "Fix it", "w") for n in range(300_000)]
    lines = text(*items)
    assert len(lines) <= 15
    shown_count = sum(
        3 + int(line.partition(" and ")[2].partition(" more")[0]) for line in lines if " and " in line and "…" not in line
    )
    folded_count = sum(int(line.split(" and ")[1].split()[0].replace(",", "")) for line in lines if "…" in line)
    assert shown_count + folded_count == 300_000


def test_items_that_were_only_counted_are_counted() -> None:
    items = [Item("error[nan]", f"layers.{n}", "has a NaN", "Train again", "w") for n in range(3)]
    assert list(lines(items, None, hidden={"error[nan]": 299_997})) == [
        "error[nan] w: layers.0, layers.1, layers.2: has a NaN",
        "    … and 299,997 more error[nan] (--json has all)",
        "    hint: Train again",
    ]


@pytest.mark.parametrize("message", ["F16 and Q8_0", "layers.3.q", "sha256:5f2c", "v1.2.3", "x-7"])
def test_a_number_in_a_name_is_not_a_number(message: str) -> None:
    renumbered = message.replace("3", "4").replace("5", "6").replace("7", "8").replace("16", "17").replace("8_0", "9_0")
    assert len(text(Item("note:", "a", message), Item("note:", "b", renumbered))) == 2


def test_names_in_several_files_have_the_file() -> None:
    assert text(Item("error[x]", "a", "is bad", place="one"), Item("error[x]", "b", "is bad", place="two")) == [
        "error[x] one: a, two: b: is bad"
    ]
    assert text(Item("error[x]", "one", "is bad"), Item("error[x]", "", "is bad", place="two")) == ["error[x] one, two: is bad"]
