"""Models of many families against transformers and peft: losses, gradients, and what peft loads; or refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.training import train_config  # noqa: E402
from adapterhub.training.data.packed_rows import IGNORED, Rows, order  # noqa: E402
from adapterhub.training.layers import expert_stacks, lora, nf4_matrix  # noqa: E402
from adapterhub.training.loop import loss, training_loop  # noqa: E402
from adapterhub.training.loop.optimizer import learning_rate  # noqa: E402
from adapterhub.training.loop.state import new_state  # noqa: E402
from adapterhub.training.model import adapter_transfer, families  # noqa: E402
from adapterhub.training.model.base_model import Base, Logits  # noqa: E402
from adapterhub.training.model.probes import check_isolation, isolates_documents, share_rows  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from adapterhub_converters.formats.peft.target_parameters import wrapper_names_by_target  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.byte_tokenizer import write_tokenizer  # noqa: E402
from tests.training import test_kinds as kinds  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402

STEPS, ROWS = 4, 2
STACKS = ("experts.gate_up_proj", "experts.down_proj")
# What of each family makes it one of its own, and the targets where they aren't all linear layers.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "Gemma2ForCausalLM": ({"sliding_window": 8}, ()),  # soft caps on attention and logits
    "CohereForCausalLM": ({}, ()),  # multiplied logits
    "GraniteForCausalLM": ({}, ()),  # divided logits
    "PhiForCausalLM": ({"num_key_value_heads": 4}, ()),  # an output layer with a bias
    "GPT2LMHeadModel": ({"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, ()),  # Conv1D, learned positions
    "BloomForCausalLM": ({"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0}, ()),  # no positions: ALiBi
    "Lfm2ForCausalLM": ({"layer_types": ["conv", "full_attention"]}, ()),
    "FalconH1ForCausalLM": (
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
         "lm_head_multiplier": 0.5},
        ("q_proj", "in_proj", "down_proj"),
    ),  # buffers that a whole model computes, multiplied logits
    "DeepseekV3ForCausalLM": ({}, ("q_a_proj", "kv_b_proj", "o_proj", *STACKS)),  # a buffer in the files
    "Qwen3MoeForCausalLM": ({}, ("q_proj", *STACKS)),
    "GptOssForCausalLM": ({"sliding_window": 8}, ("q_proj", *STACKS)),  # sinks; experts with biases, stored (in, out)
}  # fmt: skip


def saved(name: str, folder: Path, **words: Any) -> Path:
    """A tiny random model of the family in `folder`."""
    model = tiny.model(name, vocab_size=259, attention_dropout=0.0, **words)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def whole(folder: Path, targets: tuple[str, ...] = (), **words: Any) -> train_config.TrainConfig:
    return kinds.whole(folder, **({"targets": targets} if targets else {}), **words)


def single(count: int = 8, length: int = 24) -> Rows:
    """Random tokens, a document a row."""
    numbers = np.random.default_rng(0).integers(3, 250, (count, length + 1))
    return Rows(numbers[:, :-1].copy(), numbers[:, 1:].copy(), np.tile(np.arange(length), (count, 1)))


def peft_model(settings: train_config.TrainConfig, ours: Base) -> Any:
    """peft's model with the same factors, on eager attention: sdpa knows no caps and no sinks."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.base.path, dtype=torch.float32, attn_implementation="eager"
    )
    layers = dict(lora.lora_layers(ours.model))
    stacks = [path for path, layer in layers.items() if isinstance(layer, expert_stacks.LoRAStack)]
    words = {"r": settings.lora.r, "lora_alpha": settings.lora.alpha, "task_type": "CAUSAL_LM"}
    modules = [path for path in layers if path not in stacks]
    model_with_adapter = get_peft_model(model, LoraConfig(**words, target_modules=modules, target_parameters=stacks or None))
    stems = wrapper_names_by_target(stacks)
    for path, layer in layers.items():
        theirs = model_with_adapter.base_model.model.get_submodule(stems.get(path, path))
        A, B = layer.lora_A.data, layer.lora_B.data
        if path in stacks:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        theirs.lora_A["default"].weight.data.copy_(A)
        theirs.lora_B["default"].weight.data.copy_(B)
    return model_with_adapter.train()


def peft_losses(model: Any, settings: train_config.TrainConfig, documents: Rows) -> list[tuple[float, float]]:
    """Loss and gradient's norm of each step of the usual loop."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    losses_and_norms = []
    for step in range(STEPS):
        chosen = order(len(documents), STEPS * ROWS, 0)[step * ROWS : (step + 1) * ROWS]
        ids, labels = torch.from_numpy(documents.ids[chosen]), torch.from_numpy(documents.labels[chosen])
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(settings.train, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses_and_norms.append((loss.item(), float(norm)))
    return losses_and_norms


@pytest.mark.peer
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_pefts_and_peft_loads_the_result(name: str, tmp_path: Path) -> None:
    need_module("peft")
    from peft import PeftModel

    words, targets = FAMILIES[name]
    settings, documents = whole(saved(name, tmp_path, **words), targets), single()
    ours = kinds.loaded(settings)
    expected = peft_losses(peft_model(settings, ours), settings, documents)
    state = new_state(ours.model, settings.train)
    lines = [training_loop.advance(ours, documents, state, settings.train, STEPS) for _ in range(STEPS)]
    assert [line["loss"] for line in lines] == pytest.approx(
        [loss_and_norm[0] for loss_and_norm in expected], abs=1e-5, rel=1e-6
    )
    assert [line["gradient_norm"] for line in lines] == pytest.approx(
        [loss_and_norm[1] for loss_and_norm in expected], rel=1e-4
    )

    (tmp_path / "adapter").mkdir()
    peft_format.write(adapter_transfer.trained_adapter(settings, ours), tmp_path / "adapter")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    ids, positions = torch.from_numpy(documents.ids[:2]), torch.from_numpy(documents.positions[:2])
    ours.model.eval()
    with torch.no_grad():
        z = torch.nn.functional.linear(ours.states(ids, positions), ours.head, ours.head_bias)
        torch.testing.assert_close(ours.logits.apply(z), again(ids).logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        (
            "ModernBertDecoderForCausalLM",
            {"max_position_embeddings": 64},
            "ModernBertDecoderForCausalLM computes its logits in a way that the loss does not support",
        ),
        (
            "Llama4ForCausalLM",
            {"num_local_experts": 2, "intermediate_size_mlp": 96, "layer_types": ["full_attention"] * 4},
            "Llama4ForCausalLM computes its experts in a way that is not supported",
        ),
        (
            "FalconMambaForCausalLM",
            {"state_size": 8},
            "mixer.out_proj: falcon_mamba's fast kernels use the weight directly",
        ),
    ],
)
def test_a_model_that_would_be_trained_wrongly_is_refused_by_name(
    name: str, words: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=says):
        kinds.loaded(whole(saved(name, tmp_path, **words)))


@pytest.mark.parametrize("name", ["MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM"])
def test_a_model_that_multiplies_with_a_weight_itself_trains_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Their mixers compute `dt_proj.weight @ x`, in the dtype of x."""
    experts_of = {"num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}
    words = {"state_size": 8} if "Mamba" in name else experts_of
    settings = whole(saved(name, tmp_path, **words), ("in_proj", "x_proj"))
    settings = dataclasses.replace(settings, base=train_config.BaseConfig(settings.base.path))
    loaded_model = kinds.loaded(settings)
    line = training_loop.advance(loaded_model, single(), new_state(loaded_model.model, settings.train), settings.train, STEPS)
    assert np.isfinite(line["loss"])
    assert line["gradient_norm"] > 0


@pytest.mark.parametrize("name", ["BloomForCausalLM", "Lfm2ForCausalLM", "GptOssForCausalLM"])
def test_documents_that_a_model_cannot_tell_apart_do_not_share_rows(name: str, tmp_path: Path) -> None:
    loaded_model = kinds.loaded(whole(saved(name, tmp_path, **FAMILIES[name][0])))
    says = rf"c.toml: \[data\] pack: {name} does not separate the documents that share a row. Set pack = false"
    with pytest.raises(RefusedError, match=says):
        check_isolation(loaded_model, [kinds.rows()], "c.toml")
    check_isolation(loaded_model, [single()], "c.toml")


def test_a_model_isolates_the_documents_in_a_row(tiny_base: Path) -> None:
    loaded_model = kinds.loaded(kinds.whole(tiny_base))
    assert share_rows(kinds.rows())
    assert not share_rows(single())
    assert isolates_documents(loaded_model)
    assert loaded_model.model.training


def test_padding_behind_a_document_is_no_other_document() -> None:
    ids = np.arange(8)[None]
    labels = np.array([[1, 2, 3, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]])
    assert not share_rows(Rows(ids, labels, np.array([[0, 1, 2, 3, 0, 1, 2, 3]])))


@pytest.mark.parametrize("shape", [Logits(), Logits(0.25), Logits(cap=3.0), Logits(2.0, 5.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_without_logits_has_the_gradients_of_the_loss_with_them(shape: Logits, biased: bool) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 90, 16, requires_grad=True), torch.randn(40, 16)
    bias = torch.randn(40) if biased else None
    labels = torch.randint(0, 40, (2, 90))
    ids = torch.tensor([3, 17])
    rows = head[ids].clone().requires_grad_()
    ours = loss.cross_entropy(hidden, head, labels, ids=ids, rows=rows, bias=bias, shape=shape).sum()
    gradients = torch.autograd.grad(ours, (hidden, rows))
    z = torch.nn.functional.linear(hidden, head.index_copy(0, ids, rows), bias)
    theirs = torch.nn.functional.cross_entropy(shape.apply(z).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for our_gradient, their_gradient in zip(gradients, torch.autograd.grad(theirs, (hidden, rows)), strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


def stack(quantized: bool = False) -> expert_stacks.LoRAStack:
    torch.manual_seed(0)
    whole = torch.randn(3, 8, 64) * 0.2
    matrices = [nf4_matrix.quantize(matrix.contiguous()) if quantized else matrix for matrix in whole.unbind(0)]
    expert_stack = expert_stacks.LoRAStack(matrices, transposed=False, r=2, alpha=4, rslora=False)
    expert_stack.reset(torch.Generator().manual_seed(1))
    torch.nn.init.normal_(expert_stack.lora_B)
    return expert_stack


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_have_the_gradients_of_plain_autograd_and_one_without_a_token_has_none(quantized: bool) -> None:
    ours, counts = stack(quantized), [4, 0, 3]
    x, upstream = torch.randn(7, 64, requires_grad=True), torch.randn(7, 8)
    y = ours(x, counts)
    gradients = torch.autograd.grad(y, (x, ours.lora_A, ours.lora_B), upstream)
    expert = torch.tensor([0] * 4 + [2] * 3)
    weights = torch.stack([ours.dense(number, torch.float32) for number in range(3)]) + 2.0 * ours.lora_B @ ours.lora_A
    plain = torch.einsum("ti,toi->to", x, weights[expert])
    torch.testing.assert_close(y, plain)
    for our_gradient, their_gradient in zip(
        gradients, torch.autograd.grad(plain, (x, ours.lora_A, ours.lora_B), upstream), strict=True
    ):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)
    assert not gradients[1][1].any()
    assert not gradients[2][1].any()


def test_experts_learn_the_same_where_blocks_are_computed_again(tmp_path: Path) -> None:
    settings, losses = whole(saved("MixtralForCausalLM", tmp_path), ("q_proj", "experts.gate_up_proj")), []
    for again in (False, True):
        loaded_model = kinds.loaded(settings)
        if again:
            loaded_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        state = new_state(loaded_model.model, settings.train)
        losses.append([training_loop.advance(loaded_model, kinds.rows(), state, settings.train, 2)["loss"] for _ in range(2)])
    assert losses[0] == losses[1]


def test_experts_learn_the_same_however_many_rows_their_tokens_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = whole(saved("MixtralForCausalLM", tmp_path), ("q_proj", "experts.gate_up_proj", "experts.down_proj"))
    settings = dataclasses.replace(settings, base=dataclasses.replace(settings.base, dtype="bfloat16"))
    losses = []
    for multiple in (1, 32):
        monkeypatch.setattr(expert_stacks, "_ROW_MULTIPLE", multiple)
        loaded_model = kinds.loaded(settings)
        state = new_state(loaded_model.model, settings.train)
        losses.append([training_loop.advance(loaded_model, kinds.rows(), state, settings.train, 2)["loss"] for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_only_experts_with_a_token_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    expert_stack, dequantized = stack(quantized=True), []
    whole_one = expert_stacks.Stack.dense
    monkeypatch.setattr(expert_stacks.Stack, "dense", lambda self, n, dtype: dequantized.append(n) or whole_one(self, n, dtype))
    expert_stack(torch.randn(5, 64, requires_grad=True), [0, 5, 0]).sum().backward()
    assert dequantized == [1, 1]


@pytest.mark.peer
def test_each_expert_is_held_as_bitsandbytes_would_hold_its_matrix(tmp_path: Path) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    saved("Qwen3MoeForCausalLM", tmp_path)
    settings = whole(tmp_path)
    base = load_base(tmp_path, dataclasses.replace(settings.base, quantize="nf4"), settings.lora, location="c.toml")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for path in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        held_matrices = base.model.get_submodule(path).matrices
        for held_matrix, matrix in zip(held_matrices, theirs.get_parameter(path), strict=True):
            packed, state = functional.quantize_4bit(matrix.detach(), quant_type="nf4", compress_statistics=True)
            assert torch.equal(held_matrix.packed, packed.view(-1))
            assert torch.equal(held_matrix.absmax, state.absmax.view(-1))
            assert torch.equal(held_matrix.nested, state.state2.absmax)


def test_all_linear_layers_are_no_experts_and_names_reach_them(tmp_path: Path) -> None:
    saved("Qwen3MoeForCausalLM", tmp_path)
    all_linear = kinds.loaded(whole(tmp_path)).targets
    assert {path.rpartition(".")[2] for path in all_linear} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    named = kinds.loaded(whole(tmp_path, ("down_proj",), rank_pattern={r"1\.mlp\.experts\.down_proj": 2}))
    assert named.targets == ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj")
    assert [layer.lora_A.shape for _, layer in lora.lora_layers(named.model)] == [(4, 4, 32), (4, 2, 32)]
    trainable = {name for name, parameter in named.model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trainable if "gate.weight" in name]  # the router
    with pytest.raises(RefusedError, match=r"\[lora\] dropout cannot be combined with LoRA on a stack of experts"):
        kinds.loaded(whole(tmp_path, STACKS, dropout=0.1))


def test_a_delta_that_peft_mistakes_for_an_experts_is_reported(tmp_path: Path) -> None:
    saved("DeepseekV3ForCausalLM", tmp_path)
    (note,) = kinds.loaded(whole(tmp_path)).notes
    assert "peft 0.21 does not load the delta of model.layers.0.mlp.gate_proj onto deepseek_v3" in note
    assert kinds.loaded(whole(tmp_path, ("o_proj",))).notes == ()


def test_rows_beyond_a_position_table_are_refused_and_others_reported(tmp_path: Path, tiny_base: Path) -> None:
    with_positions = kinds.loaded(whole(saved("GPT2LMHeadModel", tmp_path))).model
    assert families.check_length(with_positions, 256, "c.toml") == []
    with pytest.raises(
        RefusedError, match=r"sequence: rows of 257 tokens, but the model has 256 positions \(transformer.wpe\)"
    ):
        families.check_length(with_positions, 257, "c.toml")
    (note,) = families.check_length(kinds.loaded(kinds.whole(tiny_base)).model, 300, "c.toml")
    assert note == "rows are 300 tokens long, but the base was made for 256"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_learns_the_same_within_rounding(checkpointing: bool, tiny_base: Path) -> None:
    settings = kinds.whole(tiny_base, dropout=0.1)
    losses = []
    for is_compiled in (False, True):
        loaded_model = kinds.loaded(settings)
        if checkpointing:
            loaded_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if is_compiled:
            families.compile_blocks(
                loaded_model.model, "c.toml", backend="aot_eager"
            )  # all of it but the C++ compiler, which takes long
        state = new_state(loaded_model.model, settings.train)
        losses.append(
            [training_loop.advance(loaded_model, kinds.rows(), state, settings.train, STEPS)["loss"] for _ in range(STEPS)]
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_failing_compiler_is_reported_in_one_line(tiny_base: Path) -> None:
    loaded_model = kinds.loaded(kinds.whole(tiny_base))
    with pytest.raises(
        RefusedError, match=r"\[train\] compile: torch.compile fails on this machine \(.+\). On a CPU it needs a C\+\+ compiler"
    ):
        families.compile_blocks(loaded_model.model, "c.toml", backend="no such thing")
