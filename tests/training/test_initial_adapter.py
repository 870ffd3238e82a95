"""Training goes on from an adapter that is there: just where that ended, or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training  # noqa: E402
from adapterhub.manifest import oci_manifest  # noqa: E402
from adapterhub.manifest.document import AdapterManifest, Parent  # noqa: E402
from adapterhub.training import train_config  # noqa: E402
from adapterhub.training.layers import lora  # noqa: E402
from adapterhub.training.loop import heldout, training_loop  # noqa: E402
from adapterhub.training.loop.state import new_state  # noqa: E402
from adapterhub.training.model import adapter_transfer  # noqa: E402
from adapterhub_converters.adapter import LowRank  # noqa: E402
from adapterhub_converters.bases import read_hf  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.training import test_kinds as kinds  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402
from tests.training.test_families import saved  # noqa: E402
from tests.training.test_trainer import settings  # noqa: E402


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path):  # type: ignore[no-untyped-def]
    """A trained adapter, as something given, its config and its result."""
    folder = tmp_path_factory.mktemp("first")
    path = settings(folder, tiny_base, steps=3)
    result = training.run(training.read_config(path), folder / "out")
    digest = oci_manifest.build(folder / "out").digest
    return training.InitialAdapter(folder / "out", folder / "out", digest, "./out", "team/first:v1"), path, result


def test_it_begins_where_the_adapter_ended_and_names_it_as_its_parent(first, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start, path, before = first
    events: list[training.Event] = []
    result = training.run(training.read_config(path), tmp_path / "out", start=start, on_event=events.append)
    assert result.perplexity_before == before.perplexity_after
    assert result.perplexity_after < result.perplexity_before
    manifest = AdapterManifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.parents == (Parent(start.digest, "team/first:v1", method="train"),)
    assert "| continues | team/first:v1 |" in (tmp_path / "out/README.md").read_text()
    assert not [note for event in events if isinstance(event, training.Ready) for note in event.notes if "bytes" in note]
    training.run(training.read_config(path), tmp_path / "again", start=start)
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_key_that_nothing_is_known_of_for_going_on_is_refused(first, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, path, _ = first

    @dataclasses.dataclass(frozen=True)
    class Wider(train_config.LoRAConfig):
        dora_like: bool = False

    read = training.read_config(path).lora
    initial = adapter_transfer.read(start, read_hf(tiny_base))
    targets = tuple(initial.pairs)
    adapter_transfer.check_config(initial, Wider(read.r, read.alpha), targets, "c.toml")
    with pytest.raises(RefusedError, match=r"c.toml: \[lora\] dora_like: cannot be used when an adapter is trained further"):
        adapter_transfer.check_config(initial, Wider(read.r, read.alpha, dora_like=True), targets, "c.toml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("r = 4", "r = 8", r"\[lora\] r: is 8, but 4 in ./out at model.layers.0.mlp.down_proj"),
        ("alpha = 8", "alpha = 16", r"\[lora\] alpha: is 16, but 8"),
        ("alpha = 8", "alpha = 8\nrslora = true", r"\[lora\] rslora: is true, but false in"),
        ("alpha = 8", 'alpha = 8\ntargets = ["q_proj"]', "has a delta that is not a target"),
        ('name = "someone/tiny"', 'name = "someone/other"', "was trained on someone/tiny, not on someone/other"),
    ],
)
def test_another_shape_or_base_is_refused(first, tmp_path: Path, old: str, new: str, says: str) -> None:  # type: ignore[no-untyped-def]
    start, path, _ = first
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(path.parent / name, tmp_path)
    (tmp_path / "c.toml").write_text(path.read_text().replace(old, new))
    with pytest.raises(RefusedError, match=says):
        training.run(training.read_config(tmp_path / "c.toml"), tmp_path / "out", start=start)
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_shapes_is_refused_and_one_of_other_bytes_is_reported(first, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, _, _ = first
    initial = adapter_transfer.read(start, read_hf(tiny_base))
    assert initial.manifest is not None
    assert initial.training is not None
    pinned = dataclasses.replace(initial.manifest.base, fingerprint=f"sha256:{0:064}")
    other_manifest = dataclasses.replace(initial.manifest, base=pinned)
    with pytest.raises(RefusedError, match="is for a base with other tensor names or shapes"):
        adapter_transfer.check_base(dataclasses.replace(initial, manifest=other_manifest), read_hf(tiny_base), None)
    digest = (initial.training.weights or ())[0].digest
    assert adapter_transfer.other_weights(initial, [{"digest": digest}]) == []
    assert adapter_transfer.other_weights(initial, [{"digest": f"sha256:{0:064}"}]) == [
        "the base's weights differ from those that ./out was trained on"
    ]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "dropout": 0.1},
    "dora": {"dora": True},
    "patterns": {"targets": kinds.SMALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"1\.mlp\.down_proj": 3}},
    "embedding": {"targets": (*kinds.SMALL, "embed_tokens")},
    "token-rows": {"targets": kinds.SMALL, "trainable_token_indices": (5, 40, 41)},
    "bias": {"targets": kinds.SMALL, "lora_bias": True},
    "experts": {"targets": ("q_proj", "experts.down_proj")},
}


def advanced(model: Any, settings: train_config.TrainConfig, steps: int) -> list[float]:
    """The losses of so many steps with a fresh optimizer."""
    state = new_state(model.model, settings.train)
    return [training_loop.advance(model, kinds.rows(), state, settings.train, steps)["loss"] for _ in range(steps)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("MixtralForCausalLM", tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_training_on_to_the_bit(kind: str, tmp_path: Path, tiny_base: Path, mixture: Path) -> None:
    folder = mixture if kind == "experts" else tiny_base
    settings = kinds.whole(folder, **KINDS[kind])
    straight = kinds.loaded(settings)
    advanced(straight, settings, 3)
    peft_format.write(adapter_transfer.trained_adapter(settings, straight), tmp_path)
    initial = adapter_transfer.read(training.InitialAdapter(tmp_path, tmp_path, "", "./first"), read_hf(folder))
    again = kinds.loaded(settings)
    adapter_transfer.check_config(initial, settings.lora, again.targets, "c.toml")
    adapter_transfer.copy_into_model(again, initial)
    assert advanced(again, settings, 3) == advanced(straight, settings, 3)
    for (name, our_parameter), (_, their_parameter) in zip(
        lora.trained_parameters(again.model), lora.trained_parameters(straight.model), strict=True
    ):
        assert torch.equal(our_parameter, their_parameter), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_in_can_be_measured_and_taken_out(kind: str, tmp_path: Path, tiny_base: Path, mixture: Path) -> None:
    folder = mixture if kind == "experts" else tiny_base
    settings = kinds.whole(folder, **KINDS[kind])
    loaded_model = kinds.loaded(settings)
    before = heldout.evaluate(loaded_model, kinds.rows(), 4)
    advanced(loaded_model, settings, 3)
    after = heldout.evaluate(loaded_model, kinds.rows(), 4)
    assert after < before
    peft_format.write(adapter_transfer.trained_adapter(settings, loaded_model), tmp_path)
    initial = adapter_transfer.read(training.InitialAdapter(tmp_path, tmp_path, "", "./first"), read_hf(folder))
    measured = load_base(folder, settings.base, initial.config, location="./first")
    adapter_transfer.copy_into_model(measured, initial)
    assert heldout.evaluate(measured, kinds.rows(), 4) == after
    adapter_transfer.remove(measured)
    assert heldout.evaluate(measured, kinds.rows(), 4) == before


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("dora", {"dora": False}, r"\[lora\] dora: is false, but true in ./first"),
        ("token-rows", {"trainable_token_indices": (5,)}, r"trainable_token_indices: is \[5\], but \[5, 40, 41\] in"),
        ("patterns", {"rank_pattern": {}}, r"\[lora\] r: is 4, but 2 in ./first at model.layers.0.self_attn.q_proj"),
        ("plain", {"init": "pissa"}, r"\[lora\] init: cannot be used when an adapter is trained further"),
    ],
)
def test_another_kind_of_adapter_is_refused(
    kind: str, words: dict[str, Any], says: str, tmp_path: Path, tiny_base: Path
) -> None:
    settings = kinds.whole(tiny_base, **KINDS[kind])
    loaded_model = kinds.loaded(settings)
    peft_format.write(adapter_transfer.trained_adapter(settings, loaded_model), tmp_path)
    initial = adapter_transfer.read(training.InitialAdapter(tmp_path, tmp_path, "", "./first"), read_hf(tiny_base))
    with pytest.raises(RefusedError, match=says):
        adapter_transfer.check_config(initial, dataclasses.replace(settings.lora, **words), loaded_model.targets, "c.toml")


@pytest.mark.peer
def test_modules_that_peft_saved_whole_are_measured_and_not_trained_on(tmp_path: Path, tiny_base: Path) -> None:
    need_module("peft")
    from peft import LoraConfig, get_peft_model

    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    words = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm", "o_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(plain, words).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    theirs.save_pretrained(tmp_path)
    initial = adapter_transfer.read(training.InitialAdapter(tmp_path, tmp_path, "", "./theirs"), read_hf(tiny_base))
    settings = kinds.whole(tiny_base)
    ours = load_base(tiny_base, settings.base, initial.config, location="./theirs")
    alone = heldout.evaluate(ours, kinds.rows(), 4)
    adapter_transfer.copy_into_model(ours, initial)
    with adapter_transfer.with_replaced_modules(ours, initial):
        measured = heldout.evaluate(ours, kinds.rows(), 4)
    adapter_transfer.remove(ours)
    assert heldout.evaluate(ours, kinds.rows(), 4) == alone
    rows = kinds.rows()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(rows.ids), position_ids=torch.from_numpy(rows.positions), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten())
    assert measured == pytest.approx(expected.item(), abs=1e-5)
    assert abs(measured - alone) > 0.01
    with pytest.raises(RefusedError, match=r"lm_head.weight: is replaced as a whole, but only deltas and rows"):
        adapter_transfer.check_config(initial, initial.config, ours.targets, "c.toml")


def test_what_the_layers_cannot_hold_is_refused_by_name(first, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    start, _, _ = first
    adapter = peft_format.read(start.path)
    target = next(iter(adapter.deltas))
    delta = adapter.deltas[target]
    assert isinstance(delta, LowRank)
    dora = dataclasses.replace(delta, magnitude=np.ones(delta.lora_B.shape[0], np.float32))
    (tmp_path / "dora").mkdir()
    meta = dataclasses.replace(adapter.meta, dora=True)
    with_dora = dataclasses.replace(adapter, deltas={**adapter.deltas, target: dora}, meta=meta, source=None)
    peft_format.write(with_dora, tmp_path / "dora")
    with pytest.raises(RefusedError, match=r"use_dora: is true, but .* has no magnitude"):
        adapter_transfer.read(training.InitialAdapter(tmp_path / "dora", tmp_path / "dora", "", "./dora"), read_hf(tiny_base))
