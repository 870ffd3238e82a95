"""Names of modules: gguf-py and transformers agree with every one that we know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture_lookup import ADAPTERS, ARCHITECTURES, Architecture
from adapterhub_converters.errors import RefusedError
from tests.conftest import ROOT, missing, need_module
from tests.support import llama_cpp_classes, llama_cpp_scripts, tiny

# What no LoRA is put on: sinks, biases of experts and of the routing.
NO_LINEAR = ("self_attn.sinks", "_proj_bias", "e_score_correction_bias")
NEWER = ("granite_swa", "cohere2moe", "hy_v3", "laguna", "mellum")
"""Architectures of llama.cpp that gguf-py on PyPI does not have."""
TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("architecture", ADAPTERS, ids=lambda architecture: architecture.gguf)
def test_gguf_py_gives_every_module_the_same_name(architecture: Architecture) -> None:
    need_module("gguf")
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    if architecture.gguf in NEWER:  # the conversions of models prove the names of these
        assert architecture.gguf not in MODEL_ARCH_NAMES.values()
        return
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.gguf)
    theirs = get_tensor_name_map(arch, 12)
    inner = [
        f"{architecture.layers}.{layer}.{path}" for layer in (0, 11) for path in (*architecture.linear, *architecture.norms)
    ]
    for module in [*architecture.top, *inner]:
        stem = architecture.stem(module)
        if stem and stem.endswith(".ffn_down") and "shared_mlp" in module:
            continue  # Granite's conversion names the module of a model without experts itself
        if not architecture.head and architecture.top.get(module) == "output":
            assert stem is None
            continue
        # The conversions of BLOOM and a few others take a prefix away before they look a name up, Nemotron-H's files have
        # another, and the router of Granite's experts is a module in them.
        variants = (module, module.removeprefix("transformer."), module.replace("model.", "backbone.", 1), f"{module}.layer")
        assert next(filter(None, map(theirs.get_name, variants)), None) == stem
        assert stem is not None
        again = architecture.module(stem)
        assert again == module or (again and architecture.stem(again) == stem)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("architecture", "name"), [(item, name) for item in ARCHITECTURES for name in item.classes], ids=lambda part: str(part)[:30]
)
def test_every_parameter_of_a_transformers_model_has_a_name(architecture: Architecture, name: str) -> None:
    need_module("transformers")
    import torch
    import transformers

    cls = getattr(transformers, name)
    tying = {"tie_word_embeddings": True} if not architecture.head else {}
    numbers = {**TINY, **tiny.CONFIGS.get(name, {}), **tying}
    with torch.device("meta"):
        model = cls(cls.config_class(**{key: value for key, value in numbers.items() if value is not None}))
    assert model.config.model_type == architecture.classes[name]
    for parameter, _ in model.named_parameters():
        module = parameter.rpartition(".")[0] or parameter
        reason = architecture.stem(module) or architecture.stem(parameter) or architecture.reason_ignored(module)
        assert reason or parameter.endswith(NO_LINEAR), parameter


@given(heads=st.integers(1, 4), half=st.integers(1, 4), r=st.integers(1, 3))
def test_permutation_has_an_inverse(heads: int, half: int, r: int) -> None:
    rows = np.arange(heads * 2 * half * r).reshape(heads * 2 * half, r)
    assert np.array_equal(architecture_lookup.unpermute_rows(architecture_lookup.permute_rows(rows, heads), heads), rows)


def test_permutation_pairs_the_halves_of_each_head() -> None:
    assert architecture_lookup.permute_rows(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_unknown_architectures_are_refused_by_name() -> None:
    with pytest.raises(RefusedError, match="b: RWKV7ForCausalLM has no verified mapping to llama.cpp") as caught:
        architecture_lookup.by_class("RWKV7ForCausalLM", "b")
    assert caught.value.code == "no-gguf-architecture"
    assert len(str(caught.value)) < 200
    with pytest.raises(RefusedError, match="llama.cpp's 'rwkv7' has no verified mapping"):
        architecture_lookup.by_gguf("rwkv7", "b")


def test_a_row_that_only_the_weights_tell_is_found_by_their_names() -> None:
    name = "GraniteMoeHybridForCausalLM"
    mamba, experts = "model.layers.0.mamba.in_proj.weight", "model.layers.1.block_sparse_moe.router.layer.weight"
    for names, gguf, has_experts in (
        ({mamba}, "granitehybrid", False),
        ({mamba, experts}, "granitehybrid", True),
        ({"lm_head.weight"}, "granite", False),
        ({experts}, "granitemoe", True),
    ):
        row = architecture_lookup.by_class(name, "b", names=names)
        assert (row.gguf, row.experts is not None) == (gguf, has_experts)
    with pytest.raises(RefusedError, match="one of .* in llama.cpp, which only its weights tell") as caught:
        architecture_lookup.by_class(name, "b")
    assert caught.value.code == "base-required"


@pytest.mark.peer
def test_every_class_of_llama_cpp_s_conversion_is_converted_or_refused_for_a_reason() -> None:
    scripts = llama_cpp_scripts.scripts_folder()
    if scripts is None:
        missing("llama.cpp's conversion", install="python -m tests.support.llama_cpp_scripts")
    refused = {name for names in llama_cpp_classes.REFUSED.values() for name in names}
    assert not refused & llama_cpp_classes.converted()
    for name in llama_cpp_classes.registered(scripts):
        if name in refused:
            with pytest.raises(RefusedError, match="no verified mapping"):
                architecture_lookup.by_class(name, "b")
        else:
            assert architecture_lookup.by_class(name, "b", names=["lm_head.weight"])


def test_heads_that_are_not_known_are_asked_for() -> None:
    llama = architecture_lookup.by_class("LlamaForCausalLM", "b")
    assert llama.order("model.layers.0.self_attn.k_proj", {"num_attention_heads": 9, "num_key_value_heads": 3}, "b") == 3
    assert llama.order("model.layers.0.self_attn.v_proj", {}, "b") == 0
    with pytest.raises(RefusedError, match="Name its base model"):
        llama.order("model.layers.0.self_attn.q_proj", {}, "b")


def table() -> str:
    """What docs/formats.md says of every architecture, from the data."""
    classes: dict[str, list[str]] = {}
    for family in ADAPTERS:
        models = ", ".join(["convert"] * family.folder + ["merge"] * family.whole) or "—"
        classes.setdefault(models, []).extend(f"`{name}`" for name in (*family.classes, *family.wrapped))
    rows = [f"| {models} | {', '.join(dict.fromkeys(names))} |" for models, names in classes.items()]
    lines = ["| whole models | architectures |", "| --- | --- |", *rows, "", "| architecture | no LoRA on |", "| --- | --- |"]
    for family in ADAPTERS:
        unseen = [path.rpartition(".")[2] for path in family.unseen] + ["lm_head"] * (not family.head)
        lines += [f"| {', '.join(f'`{name}`' for name in family.classes)} | {', '.join(unseen)} |"] * bool(unseen)
    return "\n".join(lines)


def test_the_table_of_architectures_is_the_data() -> None:
    assert table() in (ROOT / "docs" / "formats.md").read_text()
