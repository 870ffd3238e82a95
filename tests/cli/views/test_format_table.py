"""The tables of `convert --list` on a terminal."""

from __future__ import annotations

from tests.conftest import Terminal


def test_each_line_about_round_trips_begins_with_its_format(terminal: Terminal) -> None:
    text = terminal("convert", "--list")
    formats = {line.split()[0] for line in text.partition("\n\n")[0].splitlines()[1:] if not line.startswith(" ")}
    blocks = text[text.index("FROM ") : text.index("=  the same file")].split("\n\n")[:-1]
    rows = [line for block in blocks for line in block.splitlines()[1:]]
    assert len(blocks) > 1
    assert {row.split()[0] for row in rows} <= formats
    assert all(len(line) <= 80 for line in text.splitlines())


def test_long_lists_of_models_are_cut_unless_all_are_asked_for(terminal: Terminal) -> None:
    """Of each list of models, the first ones and their number are shown."""
    text = terminal("convert", "--list")
    assert len(text.splitlines()) <= 65
    assert "LlamaForCausalLM" not in text
    assert "LlamaForCausalLM" in terminal("convert", "--list", "--verbose")
