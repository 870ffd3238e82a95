"""A long mapping in pages is the mapping, whatever changes it, and what a change writes is new."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.digest import Digest
from adapterhub.registry import paged_mapping
from adapterhub.registry.paged_mapping import FAN, MAX_ENTRY, Pages, join, page_ends, split
from adapterhub_converters.errors import FormatError

MAX_SIZE = 1 << 24


class Blobs:
    """The blobs of a document that changes, each written once."""

    def __init__(self) -> None:
        self.raw: dict[Digest, bytes] = {}
        self.written = 0
        self.state: tuple[dict[str, Any], Pages] = {}, Pages()
        self.rest: dict[str, Any] = {}

    def change(self, mapping: dict[str, Any]) -> None:
        """Write what is new, and read it all again."""
        result = split(mapping, *self.state)
        self.raw |= result.new_blobs
        self.written += sum(map(len, result.new_blobs.values()))
        self.rest = result.rest
        again, pages = join(dict(sorted(result.rest.items())), result.pages.last, self.raw.__getitem__, "document", MAX_SIZE)
        assert again == mapping
        assert pages.size == result.pages.size
        assert pages.blobs == result.pages.blobs
        assert pages.blobs <= self.raw.keys()
        assert len(result.rest) < FAN
        self.state = again, pages


@pytest.mark.parametrize("count", [0, 1, FAN - 1, FAN, FAN + 1, FAN**2 - 1, FAN**2, FAN**2 + FAN + 1, FAN**3 + 5])
def test_pages_end_where_the_length_alone_decides(count: int) -> None:
    ends = page_ends(count)
    assert count - (ends[-1] if ends else 0) < FAN
    assert all((end - start) in (FAN, FAN**2, FAN**3) for start, end in zip([0, *ends], ends, strict=False))
    assert len(ends) < 3 * FAN


def test_a_thousand_additions_write_each_entry_for_each_size_of_page_only() -> None:
    blobs, mapping = Blobs(), {}
    for number in range(1000):
        mapping = {**mapping, f"{number:040}": "sha256:" + "0" * 64}
        blobs.change(mapping)
    entry = 40 + 71 + 6
    assert blobs.written < 1000 * entry * 2 + 100 * (1000 // FAN)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=60))
def test_whatever_is_added_changed_and_removed_is_read_again(steps: list[tuple[int, int]]) -> None:
    blobs, mapping = Blobs(), {f"old-{number:02}": number for number in range(40)}
    blobs.change(mapping)
    for key, kind in steps:
        mapping = dict(mapping)
        if kind:
            mapping[f"key-{key}"] = "x" * (MAX_ENTRY * (kind - 1) + key)
        else:
            mapping.pop(next(iter(mapping)), None)
        mapping = {name: value if isinstance(value, int) else {"text": value} if isinstance(value, str) else value
                   for name, value in mapping.items()}  # fmt: skip
        blobs.change(mapping)


def test_a_large_entry_is_written_once() -> None:
    blobs, mapping = Blobs(), {"large": {"text": "x" * 100_000}}
    for number in range(100):
        mapping = {**mapping, str(number): {"text": "y"}}
        blobs.change(mapping)
    assert 100_000 < blobs.written < 110_000
    assert len(paged_mapping._dump(blobs.rest)) < FAN * 100


def test_pages_of_more_bytes_than_a_document_may_have_are_refused() -> None:
    result = split({str(number): "x" * 500 for number in range(100)}, {}, Pages())
    with pytest.raises(FormatError, match="its pages have more than 10,000 bytes"):
        join(result.rest, result.pages.last, result.new_blobs.__getitem__, "document", 10_000)
    with pytest.raises(FormatError, match="not a page of a document"):
        join({}, "sha256:" + "0" * 64, lambda _: b"{}", "document", MAX_SIZE)
