"""A merge of adapters opens each file of an adapter twice at most, and reads each file of its result once."""

from __future__ import annotations

from collections import Counter
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


def test_a_result_for_the_registry_is_written_described_checked_and_stored(run: Run, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, seed)
    run("--registry", tmp_path / "registry", "init", tmp_path / "registry")
    merge = ("merge", tmp_path / "a", tmp_path / "b", "-o", "team/merged")
    counts = opens(run, tmp_path, tmp_path / "scratch", "--registry", tmp_path / "registry", *merge)
    by_name: Counter[str] = Counter()
    for path, count in counts.items():
        by_name[Path(path).name] += count
    assert by_name.keys() >= RESULT
    assert max(by_name[name] for name in RESULT) <= 4, by_name
