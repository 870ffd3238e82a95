"""A merge of adapters opens each file of an adapter twice at most, and reads each file of its result once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.opens import opens

RESULT = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("described", [False, True])
def test_each_file_of_an_adapter_is_opened_twice_at_most(described: bool, run: Run, tmp_path: Path) -> None:
    place = tmp_path / "place"
    for seed, name in enumerate("ab"):
        write_adapter(place / name, seed)
        if described:
            run("describe", place / name)
    counts = opens(run, tmp_path, place, "merge", place / "a", place / "b", "-o", place / "out")
    sources = {path: count for path, count in counts.items() if path.startswith(("a/", "b/"))}
    assert len(sources) == (8 if described else 6)
    assert max(sources.values()) <= 2, sources
    # Written, read for its manifest, and flushed to the disk.
    result = {Path(path).name: count for path, count in counts.items() if path not in sources}
    assert result.keys() >= RESULT
    assert max(result[name] for name in RESULT) <= 3, result
