"""What is remembered is made once, and takes a bounded room."""

from __future__ import annotations

import pytest

from adapterhub.hub.lru_cache import LRUCache, memory_of


def test_a_value_is_made_once_and_the_one_unused_longest_is_forgotten() -> None:
    computed: list[str] = []
    values: LRUCache[str] = LRUCache(600)

    def get(key: str) -> str:
        return values.get(key, lambda: computed.append(key) or key)  # type: ignore[func-returns-value]

    for key in "abacab":
        assert get(key) == key
    assert computed == ["a", "b", "c", "b"]


def test_values_have_room_by_their_sizes() -> None:
    values: LRUCache[bytes] = LRUCache(10 + 2 * (200 + memory_of("a")), len)
    first_value = values.get("a", lambda: bytes(4))
    values.get("b", lambda: bytes(6))
    assert values.get("a", lambda: b"new") is first_value
    values.get("c", lambda: bytes(5))  # in place of b
    assert values.get("b", lambda: b"new") == b"new"
    assert values.get("d", lambda: bytes(1000)) == bytes(1000)  # kept by nobody
    assert values.get("d", lambda: b"new") == b"new"


def test_what_failed_is_made_again() -> None:
    values: LRUCache[str] = LRUCache(600)
    with pytest.raises(ZeroDivisionError):
        values.get("c", lambda: str(1 / 0))
    assert values.get("c", lambda: "d") == "d"
