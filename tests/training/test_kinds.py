"""Every kind of layer against peft: the losses of 20 steps in float32, and the folder that peft loads."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.training import train_config  # noqa: E402
from adapterhub.training.artifacts import training_checkpoint  # noqa: E402
from adapterhub.training.data.packed_rows import Rows, order  # noqa: E402
from adapterhub.training.layers import embeddings, lora, variants  # noqa: E402
from adapterhub.training.loop import training_loop  # noqa: E402
from adapterhub.training.loop.optimizer import learning_rate  # noqa: E402
from adapterhub.training.loop.state import new_state  # noqa: E402
from adapterhub.training.model import adapter_transfer  # noqa: E402
from adapterhub.training.model.base_model import Base  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402

STEPS, ROWS = 20, 2
SMALL = ("q_proj", "down_proj")


def rows(count: int = 8, length: int = 24) -> Rows:
    """Random tokens, two documents a row."""
    numbers = np.random.default_rng(0).integers(3, 250, (count, length + 1))
    positions = np.tile(np.concatenate([np.arange(10), np.arange(length - 10)]), (count, 1))
    return Rows(numbers[:, :-1].copy(), numbers[:, 1:].copy(), positions)


def whole(tiny_base: Path, **words: Any) -> train_config.TrainConfig:
    return train_config.TrainConfig(
        base=train_config.BaseConfig(str(tiny_base), quantize="none", dtype="float32"),
        data=train_config.DataConfig(("t.jsonl",)),
        lora=train_config.LoRAConfig(**{"r": 4, "alpha": 8, **words}),
        train=train_config.OptimConfig(rows=ROWS, learning_rate=5e-3, schedule="linear"),
    )


def loaded(settings: train_config.TrainConfig, device: str = "cpu") -> Base:
    base = load_base(Path(settings.base.path), settings.base, settings.lora, location="c.toml", device=torch.device(device))
    lora.reset(base.model, 0)
    return base


def peft_model(settings: train_config.TrainConfig, ours: Base) -> Any:
    """peft's model, beginning where ours does."""
    from peft import LoraConfig, get_peft_model

    words = settings.lora
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.base.path, dtype=torch.float32)
    model_with_adapter = get_peft_model(
        model,
        LoraConfig(
            r=words.r, lora_alpha=words.alpha, use_rslora=words.rslora, use_dora=words.dora,
            lora_bias=words.lora_bias, lora_dropout=words.dropout,
            target_modules=words.targets if isinstance(words.targets, str) else list(words.targets),
            layers_to_transform=list(words.layers) if words.layers else None, rank_pattern=dict(words.rank_pattern),
            alpha_pattern=dict(words.alpha_pattern), task_type="CAUSAL_LM",
            init_lora_weights="pissa" if words.init == "pissa" else True,
            trainable_token_indices=list(words.trainable_token_indices) or None,
        ),
    )  # fmt: skip
    for path, layer in lora.lora_layers(ours.model):
        theirs = model_with_adapter.base_model.model.get_submodule(path)
        if isinstance(layer, embeddings.LoRAEmbedding):
            pairs = (theirs.lora_embedding_A["default"], layer.lora_A), (theirs.lora_embedding_B["default"], layer.lora_B)
        else:
            pairs = (theirs.lora_A["default"].weight, layer.lora_A), (theirs.lora_B["default"].weight, layer.lora_B)
        for parameter, our_parameter in pairs:
            assert parameter.shape == our_parameter.shape
            if words.init == "pissa":  # the sign of a singular pair is nobody's
                continue
            parameter.data.copy_(our_parameter.data)
    return model_with_adapter.train()


def peft_losses(model: Any, settings: train_config.TrainConfig, documents: Rows) -> list[float]:
    """The losses of the usual loop."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        chosen = order(len(documents), STEPS * ROWS, 0)[step * ROWS : (step + 1) * ROWS]
        ids, positions, labels = (
            torch.from_numpy(array[chosen]) for array in (documents.ids, documents.positions, documents.labels)
        )
        torch.manual_seed(training_loop.draw_seed(0, step, 0))
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(settings.train, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dropout": {"dropout": 0.2},
    "dora": {"dora": True},
    "bias": {"targets": SMALL, "lora_bias": True},
    "dora-dropout": {"dora": True, "dropout": 0.2, "rslora": True},
    "patterns": {"targets": SMALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"1\.mlp\.down_proj": 3}},
    "layers": {"targets": ("q_proj", "up_proj"), "layers": (1,)},
    "regex": {"targets": r".*\.0\..*(gate|up)_proj"},
    "embedding": {"targets": (*SMALL, "embed_tokens")},
    "token-rows": {"targets": SMALL, "trainable_token_indices": (5, 40, 41)},
    "pissa": {"targets": SMALL, "init": "pissa"},
}


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_twenty_steps_are_pefts_and_peft_loads_the_result(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    need_module("peft")
    from peft import PeftModel

    settings, documents = whole(tiny_base, **KINDS[kind]), rows()
    ours = loaded(settings)
    theirs = peft_model(settings, ours)
    expected = peft_losses(theirs, settings, documents)
    state = new_state(ours.model, settings.train)
    losses = [training_loop.advance(ours, documents, state, settings.train, STEPS)["loss"] for _ in range(STEPS)]
    assert sum(losses[-4:]) < sum(losses[:4])  # four steps see every row once
    # Some processors sum in another order than others, and AdamW makes more of that with each step.
    assert losses[:4] == pytest.approx(expected[:4], abs=1e-5, rel=1e-5)
    assert losses == pytest.approx(expected, abs=1e-5, rel=1e-4)

    peft_format.write(adapter_transfer.trained_adapter(settings, ours), tmp_path)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    ids = torch.from_numpy(documents.ids[:2])
    with torch.no_grad():
        hidden = ours.model.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state
        _ = ours.head_rows
        torch.testing.assert_close(hidden @ ours.head.t(), again(ids).logits, rtol=1e-4, atol=2e-4)


@pytest.mark.peer
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_forward_and_gradients_are_pefts(dropout: float) -> None:
    need_module("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    ours = variants.DoRALinear(model[0].weight.data.clone(), model[0].bias.data.clone(), r=4, alpha=6, dropout=dropout)
    ours.reset(torch.Generator().manual_seed(2))
    words = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    theirs = get_peft_model(model, words).base_model.model[0]
    torch.testing.assert_close(ours.magnitude, theirs.lora_magnitude_vector["default"].weight)
    torch.nn.init.normal_(ours.lora_B, std=0.3)
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A.data)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B.data)
    x, upstream = torch.randn(2, 7, 64), torch.randn(2, 7, 48)
    outputs = []
    for layer, parameters in (
        (ours, (ours.lora_A, ours.lora_B, ours.magnitude)),
        (theirs, (*(part["default"].weight for part in (theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector)),)),
    ):
        layer_input = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = layer(layer_input)
        outputs.append((y, *torch.autograd.grad(y, (layer_input, *parameters), upstream)))
    for our_gradient, their_gradient in zip(*outputs, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [lora.LoRALinear, variants.DoRALinear])
def test_dropout_ends_with_training(kind: Any) -> None:
    layer = kind(torch.randn(8, 16), None, r=2, alpha=4, dropout=0.5)
    layer.reset(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_what_begins_as_part_of_the_weight_is_saved_as_nothing_yet(tiny_base: Path) -> None:
    settings = whole(tiny_base, targets=SMALL, init="pissa")
    settings = dataclasses.replace(settings, base=train_config.BaseConfig(str(tiny_base), dtype="float32"))
    loaded_model = loaded(settings)
    for delta in adapter_transfer.trained_adapter(settings, loaded_model).deltas.values():
        assert (delta.r, delta.scaling) == (8, 2.0)
        assert np.abs(delta.lora_B @ delta.lora_A).max() < 1e-6


def test_pissa_takes_the_principal_part_and_leaves_the_sum() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 60)
    remainder, (A, B) = variants.initial_factors(weight, r=5, scaling=3.0, quantized=False, location="w")
    torch.testing.assert_close(remainder + 3.0 * B @ A, weight, rtol=1e-5, atol=1e-5)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.matrix_norm(remainder, 2), values[5], rtol=0.02, atol=0)


def test_a_kind_that_cannot_be_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    for words, says in (
        ({"targets": ("embed_tokens",), "dora": True}, "[lora] dora: cannot be combined with LoRA on model.embed_tokens yet"),
        ({"targets": ("k_proj",), "rank_pattern": {"k_proj": 40}, "init": "pissa"}, "is too small for pissa with r = 40"),
        ({"trainable_token_indices": (3, 999)}, "[lora] trainable_token_indices: must be distinct ids below 259"),
    ):
        with pytest.raises(RefusedError) as caught:
            loaded(whole(tiny_base, **words))
        assert says in str(caught.value)


def test_experts_in_a_list_are_targets_and_one_that_no_token_came_to_survives_a_checkpoint(tmp_path: Path) -> None:
    experts = torch.nn.ModuleList(lora.LoRALinear(torch.randn(8, 16), None, r=2, alpha=4) for _ in range(3))
    model = torch.nn.ModuleDict({"experts": experts})
    lora.reset(model, 0)
    state = new_state(model, train_config.OptimConfig())
    experts[1](torch.randn(5, 16)).square().sum().backward()
    state.optimizer.step()
    state.step = 1
    training_checkpoint.save(tmp_path / "c.safetensors", model, state, "run")
    again = copy.deepcopy(model)
    lora.reset(again, 1)
    back = new_state(again, train_config.OptimConfig())
    assert training_checkpoint.restore(tmp_path / "c.safetensors", again, back, "run")
    has_state = [
        [parameter in run_state.optimizer.state for _, parameter in lora.trained_parameters(m)]
        for m, run_state in ((model, state), (again, back))
    ]
    assert has_state[0] == has_state[1] == [False, False, True, True, False, False]
    for (name, parameter), (_, second_parameter) in zip(
        lora.trained_parameters(model), lora.trained_parameters(again), strict=True
    ):
        assert torch.equal(parameter, second_parameter), name
