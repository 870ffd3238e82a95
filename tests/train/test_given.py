"""Training goes on from an adapter that is there: just where that ended, or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import facts, manifest, train  # noqa: E402
from adapterhub.train import config  # noqa: E402
from adapterhub.train.model import given  # noqa: E402
from adapterhub_converters import peft as peft_format  # noqa: E402
from adapterhub_converters.base import read_hf  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from tests.train.test_train import settings  # noqa: E402


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path):  # type: ignore[no-untyped-def]
    """A trained adapter, as something given, its config and its result."""
    folder = tmp_path_factory.mktemp("first")
    path = settings(folder, tiny_base, steps=3)
    result = train.run(train.read_config(path), folder / "out")
    digest = manifest.build(folder / "out").digest
    return train.Given(folder / "out", folder / "out", digest, "./out", "team/first:v1"), path, result


def test_it_begins_where_the_adapter_ended_and_names_it_as_its_parent(first, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start, path, before = first
    events: list[train.Event] = []
    result = train.run(train.read_config(path), tmp_path / "out", start=start, on_event=events.append)
    assert result.perplexity_before == before.perplexity_after
    assert result.perplexity_after < result.perplexity_before
    known = facts.read_facts(tmp_path / "out")
    assert known is not None
    assert known["parents"] == [{"digest": start.digest, "ref": "team/first:v1", "method": "train"}]
    assert not [note for event in events if isinstance(event, train.Ready) for note in event.notes if "bytes" in note]
    train.run(train.read_config(path), tmp_path / "again", start=start)
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_key_that_nothing_is_known_of_for_going_on_is_refused(first) -> None:  # type: ignore[no-untyped-def]
    start, path, _ = first

    @dataclasses.dataclass(frozen=True)
    class Wider(config.LoRAConfig):
        dora_like: bool = False

    read = train.read_config(path).lora
    found = given.read(start)
    targets = tuple(found.pairs)
    given.check_config(found, Wider(read.r, read.alpha), targets, "c.toml")
    with pytest.raises(RefusedError, match=r"c.toml: \[lora\] dora_like: isn't known of an adapter that goes on"):
        given.check_config(found, Wider(read.r, read.alpha, dora_like=True), targets, "c.toml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("r = 4", "r = 8", r"\[lora\] r: r is 8 here, and 4 in ./out at model.layers.0.mlp.down_proj"),
        ("alpha = 8", "alpha = 16", r"\[lora\] alpha: alpha is 16.0 here, and 8"),
        ("alpha = 8", "alpha = 8\nrslora = true", "rslora is True here"),
        ("alpha = 8", 'alpha = 8\ntargets = ["q_proj"]', "has a delta that is no target here"),
        ('name = "someone/tiny"', 'name = "someone/other"', "was trained on someone/tiny, not on someone/other"),
    ],
)
def test_another_shape_or_base_is_refused(first, tmp_path: Path, old: str, new: str, says: str) -> None:  # type: ignore[no-untyped-def]
    start, path, _ = first
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(path.parent / name, tmp_path)
    (tmp_path / "c.toml").write_text(path.read_text().replace(old, new))
    with pytest.raises(RefusedError, match=says):
        train.run(train.read_config(tmp_path / "c.toml"), tmp_path / "out", start=start)
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_shapes_is_refused_and_one_of_other_bytes_is_said(first, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, _, _ = first
    found = given.read(start)
    other = {**found.facts, "base": {**found.facts["base"], "fingerprint": f"sha256:{0:064}"}}
    with pytest.raises(RefusedError, match="is for a base of other shapes or names"):
        given.check_base(given.Factors(found.pairs, other, "./out"), read_hf(tiny_base), None)
    digest = found.facts["training"]["weights"][0]["digest"]
    assert given.other_weights(found, [{"digest": digest}]) == []
    assert given.other_weights(found, [{"digest": f"sha256:{0:064}"}]) == [
        "the base's files are not the bytes that ./out was trained on"
    ]


def test_what_is_more_than_low_rank_deltas_is_refused_by_name(first, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start, _, _ = first
    adapter = peft_format.read(start.path)
    target = next(iter(adapter.deltas))
    delta = adapter.deltas[target]
    dora = dataclasses.replace(delta, magnitude=np.ones(delta.lora_B.shape[0], np.float32))
    (tmp_path / "dora").mkdir()
    peft_format.write(dataclasses.replace(adapter, deltas={**adapter.deltas, target: dora}, source=None), tmp_path / "dora")
    with pytest.raises(RefusedError, match=rf"{target}: is no plain low-rank delta"):
        given.read(train.Given(tmp_path / "dora", tmp_path / "dora", "", "./dora"))
