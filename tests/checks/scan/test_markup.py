"""Markup in cards is found, and code that a card shows is none."""

from __future__ import annotations

from adapterhub.checks.scan import markup


def test_code_in_a_card_is_not_markup() -> None:
    assert list(markup.active_content(markup.without_code("```\n<script>\n```\ntext\n"))) == []
    assert list(markup.active_content(markup.without_code("```\n```\n<script>\n"))) == ["the element script"]
