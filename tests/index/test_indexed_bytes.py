"""How many bytes of the index a version counts as: at least what it takes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.index.version_extract import INDEXED, indexed_bytes
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.support import folders

_ROUNDS = 5
_DRAWN = random.Random(1)


def word(length: int) -> str:
    return "".join(_DRAWN.choices("abcdefghijklmnopqrstuvwxyz", k=length))


CARDS: dict[str, Callable[[], str]] = {
    "words": lambda: " ".join(word(6) for _ in range(4_600)),
    "short words": lambda: " ".join(word(2) for _ in range(10_900)),
    "letters of three bytes": lambda: "".join(chr(0x4E00 + _DRAWN.randrange(20_000)) for _ in range(32_000)),
    "tags": lambda: (
        "---\n"
        + "".join(f"{key}:\n" + "".join(f"- {word(2)}\n" for _ in range(100)) for key in ("tags", "datasets", "language"))
        + "---\n"
    ),
    "nothing": lambda: "",
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_version_counts_as_what_the_index_takes_for_it(tmp_path: Path, kind: str) -> None:
    folder = folders.adapter(tmp_path / "adapter", folders.pairs(300 if kind == "nothing" else 1))
    (folder / "README.md").write_text(CARDS[kind]())
    with Registry.init(tmp_path / "registry") as registry:

        def index_size() -> int:
            return int(registry.index.select("SELECT sum(pgsize) FROM dbstat WHERE name NOT LIKE 'sqlite%'")[0][0])

        registry.push(folder, Ref("team/a"))
        before = index_size()
        for number in range(_ROUNDS):
            (folder / "notes.txt").write_text(str(number))
            registry.push(folder, Ref("team/a"))
        counted = sum(indexed_bytes(path, size) for _, path, size in queries.sizes_of(registry.index, "team/a", INDEXED))
        assert index_size() - before < counted * _ROUNDS / (_ROUNDS + 1) + 3 * 4096 * _ROUNDS  # pages that are not full
