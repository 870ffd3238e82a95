"""What is derived of a base's headers: its fingerprint, its tensors under other names, and numbers that a config leaves out."""

from __future__ import annotations

import dataclasses

import pytest

from adapterhub_converters.bases.base_spec import BaseSpec, complete_config, text_digest
from adapterhub_converters.bases.canonical_names import BaseTensor

TENSORS = {
    "model.embed_tokens.weight": BaseTensor((128, 64), "BF16"),
    "model.layers.0.self_attn.q_proj.weight": BaseTensor((64, 64), "BF16"),
}
SPEC = BaseSpec("base", "hf", "LlamaForCausalLM", "llama", {}, TENSORS)


def test_a_fingerprint_is_of_names_and_shapes_and_not_of_types_or_places() -> None:
    stored_otherwise = {name: BaseTensor(tensor.shape, "U8") for name, tensor in reversed(TENSORS.items())}
    assert dataclasses.replace(SPEC, source="elsewhere", tensors=stored_otherwise).fingerprint == SPEC.fingerprint
    wider = {**TENSORS, "model.embed_tokens.weight": BaseTensor((129, 64), "BF16")}
    assert dataclasses.replace(SPEC, tensors=wider).fingerprint != SPEC.fingerprint


def test_a_tied_output_layer_counts_as_absent() -> None:
    with_head = {**TENSORS, "lm_head.weight": BaseTensor((128, 64), "BF16")}
    assert dataclasses.replace(SPEC, tensors=with_head, tied=True).fingerprint == SPEC.fingerprint
    assert dataclasses.replace(SPEC, tensors=with_head).fingerprint != SPEC.fingerprint


def test_without_every_shape_there_is_no_fingerprint() -> None:
    assert dataclasses.replace(SPEC, tensors={}).fingerprint is None
    assert dataclasses.replace(SPEC, packed={"model.norm.weight": "unknown"}).fingerprint is None
    assert SPEC.has_fingerprint(SPEC.fingerprint)
    assert not SPEC.has_fingerprint("sha256:0")


def test_a_tensor_is_found_by_its_name_alone() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    assert SPEC.tensor(name) == TENSORS[name]
    assert SPEC.tensor("model.layers.1.self_attn.q_proj.weight") is None


@pytest.mark.parametrize(
    ("config", "completed"),
    [
        ({"n_layer": 2, "n_head": 4, "n_embd": 64}, {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16}),
        ({"num_attention_heads": 4, "hidden_size": 64, "head_dim": None}, {"head_dim": 16}),
        ({"num_attention_heads": 4, "hidden_size": 64, "head_dim": 32}, {"head_dim": 32}),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, {"num_key_value_heads": 2}),
        ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"num_attention_heads": 0, "hidden_size": 64}, {}),
    ],
)
def test_a_config_is_completed_as_transformers_does(config: dict[str, object], completed: dict[str, object]) -> None:
    assert complete_config(dict(config)).items() >= completed.items()


def test_only_a_text_has_a_digest() -> None:
    assert text_digest(None) is None
    assert str(text_digest("{{ messages }}")).startswith("sha256:")
