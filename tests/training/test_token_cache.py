"""Tokens of large data are encoded once and then mapped; whatever they depend on makes another entry."""

from __future__ import annotations

import json
import signal
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.training import config_file
from adapterhub.training.data import dataset, packed_rows, token_arrays, token_cache
from adapterhub.training.data.examples import Example
from adapterhub.training.train_config import TrainConfig

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
RECORDS = [{"prompt": "p" * size, "completion": "c" * size} for size in range(1, 20)] + [{"text": "x y " * 20}]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Two files, of which so little is worth an entry."""
    monkeypatch.setattr(token_cache, "WORTH", 0)
    for name, records in (("a", [*RECORDS, {"messages": CHAT}]), ("b", [RECORDS[3], {"text": "new"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = '[base]\npath = "b"\n[data]\ntrain = "a.jsonl"\nheldout = "b.jsonl"\nsequence = 32\n'
    return config_file.parse(text, folder=tmp_path, location="c.toml")


def entries(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())


def same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether training and held-out data have the same rows and the same record."""
    return all(
        (left.rows.ids == right.rows.ids).all()
        and (left.rows.labels == right.rows.labels).all()
        and (left.rows.positions == right.rows.positions).all()
        and (left.files, left.notes, left.shared, left.truncated) == (right.files, right.notes, right.shared, right.truncated)
        and left.digests.tolist() == right.digests.tolist()
        for left, right in zip(one, other, strict=True)
    )


def test_the_second_start_maps_what_the_first_one_encoded(
    config: TrainConfig, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataset.datasets(config, tokenizer)
    first = dataset.datasets(config, tokenizer, tmp_path / "cache")
    monkeypatch.delattr(dataset, "encode")  # nothing is encoded, whatever the rows and their order
    second = dataset.datasets(config, tokenizer, tmp_path / "cache")
    assert same(plain, first)
    assert same(plain, second)
    assert isinstance(second[0].packed.marked, np.memmap)
    other = replace(config, data=replace(config.data, sequence=48, pack=False), train=replace(config.train, seed=1))
    assert dataset.datasets(other, tokenizer, tmp_path / "cache")[0].rows.ids.shape == (21, 48)
    assert len(entries(tmp_path)) == 1
    (tmp_path / "a.jsonl").write_text('{"text": "changed"}\n')
    with pytest.raises(NameError):
        dataset.datasets(config, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("change", [{"loss": "all"}, {"heldout": (), "heldout_share": 0.3}, {"columns": {"text": "text"}}])
def test_what_tokens_depend_on_makes_another_entry(
    change: dict[str, Any], config: TrainConfig, tmp_path: Path, tokenizer: Any
) -> None:
    other = replace(config, data=replace(config.data, **change))
    keys = [token_cache.key_of(one, tokenizer) for one in (config, other, config)]
    assert keys[0] == keys[2] != keys[1]


def test_the_template_and_its_date_make_another_entry(
    config: TrainConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = token_cache.key_of(config, tokenizer)
    monkeypatch.setattr(tokenizer, "template_variables", {"strftime_now": "2026-11-26"}, raising=False)
    dated = token_cache.key_of(config, tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    assert len({before, dated, token_cache.key_of(config, tokenizer)}) == 3


@pytest.mark.parametrize("name", ["train-tokens.npy", "heldout-documents.npy", "corpus.json"])
def test_a_damaged_entry_is_made_again(name: str, config: TrainConfig, tmp_path: Path, tokenizer: Any) -> None:
    plain = dataset.datasets(config, tokenizer)
    dataset.datasets(config, tokenizer, tmp_path / "cache")
    (entry,) = entries(tmp_path)
    whole = (entry / name).read_bytes()
    (entry / name).write_bytes(whole[:-3] + b"\0\0\0")
    assert same(plain, dataset.datasets(config, tokenizer, tmp_path / "cache"))
    assert (entry / name).read_bytes() == whole


def test_the_memory_of_a_first_start_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    """They are written in pieces of a mebibyte, and then mapped."""
    ids = np.arange(5000)
    example = Example(ids, ids % 2 == 1, joint=True)
    peaks, found = [], []
    for out in (None, tmp_path / "tokens.npy"):
        tracemalloc.start()
        found.append(token_arrays.collect(((example, bytes(8)) for _ in range(1000)), set(), out))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert found[0].marked.nbytes == 20_000_000
    assert peaks[0] > 20_000_000
    assert peaks[1] < 2_000_000
    assert isinstance(found[1].marked, np.memmap)
    assert (found[1].marked == found[0].marked).all()
    assert (found[1].documents == found[0].documents).all()


def test_the_mean_context_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example(np.arange(40), np.ones(40, bool), joint=False)
    packed = packed_rows.pack(token_arrays.collect([(example, bytes(8))], set()), 16)
    first = packed.mean_context
    monkeypatch.delattr(packed_rows.PackedRows, "take")  # which fills rows
    assert packed.mean_context == first == (16**2 * 2 + 8**2) / 40


def test_a_disk_that_fills_up_while_tokens_are_written_costs_nothing_but_the_entry(
    config: TrainConfig, tmp_path: Path, tokenizer: Any
) -> None:
    resource = pytest.importorskip("resource")
    plain = dataset.datasets(config, tokenizer)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        assert same(plain, dataset.datasets(config, tokenizer, tmp_path / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not entries(tmp_path)


def test_a_full_disk_costs_nothing_but_the_entry(config: TrainConfig, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert same(dataset.datasets(config, tokenizer), dataset.datasets(config, tokenizer, tmp_path / "cache"))


def test_little_data_leave_no_copy(
    config: TrainConfig, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "WORTH", 10_000)
    dataset.datasets(config, tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
