"""A base whose attention does not compute what its family's own does is refused before the first step."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.training.layers import row_attention  # noqa: E402
from adapterhub.training.model import probes  # noqa: E402
from adapterhub.training.model.base_model import Base  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from tests.support import tiny_families  # noqa: E402


def base_of(family: str, dtype: Any = torch.float32, **sizes: Any) -> Base:
    """A tiny base of the family with the attention of trainings."""
    model = tiny_families.model(family, **sizes).to(dtype).train()
    if row_attention.suits(type(model)):
        model.set_attn_implementation(row_attention.register())
    return Base(model, None, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v32", "minimax_m3_vl_text"])
def test_attention_that_computes_what_its_family_does_passes(family: str, dtype: Any) -> None:
    base = base_of(family, dtype)
    assert probes.check_attention(base, 64, None, "c.toml") == []
    assert base.model.config._attn_implementation == row_attention.NAME
    assert base.model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "ignored"), [("deepseek_v32", "indices"), ("minimax_m3_vl_text", "block_indices")])
def test_attention_that_ignores_what_the_model_passes_is_refused_by_name(
    family: str, ignored: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = row_attention.attention
    monkeypatch.setattr(row_attention, "attention", lambda *args, **kwargs: attend(*args, **{**kwargs, ignored: None}))
    says = (
        r"^c.toml: \w+ForCausalLM: model.layers.\d.self_attn: its attention differs by .+ from that of transformers, in a row"
    )
    with pytest.raises(RefusedError, match=says):
        probes.check_attention(base_of(family, dtype), 64, None, "c.toml")


def test_attention_with_another_factor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = row_attention.attention
    monkeypatch.setattr(row_attention, "attention", lambda *args, **kwargs: attend(*args, **{**kwargs, "scaling": 0.3}))
    with pytest.raises(RefusedError, match="its attention differs by"):
        probes.check_attention(base_of("llama"), 64, None, "c.toml")


def test_the_compared_row_is_longer_than_what_cuts_attention_and_no_longer_than_rows_are() -> None:
    config = tiny_families.config(transformers.MistralConfig, sliding_window=100)
    assert probes._compared_length(config, 4096) == 7 + int(1.25 * row_attention.MAX_LENGTH)
    assert probes._compared_length(config, 512) == 7 + 125
    assert probes._compared_length(config, 110) == 110
    assert probes._compared_length(config, 100) == 16
    assert probes._compared_length(tiny_families.config(transformers.LlamaConfig), 512) == 16


def test_little_memory_shortens_the_compared_row_and_a_note_says_so() -> None:
    base = base_of("mistral", sliding_window=100)
    (note,) = probes.check_attention(base, 200, 2 * 4 * 40**2 * 12, "c.toml")
    assert note == "attention was compared with transformers' own in rows of 33 tokens only: memory is short for 100"


@pytest.mark.parametrize(
    ("layer_types", "layers"), [(["full_attention"] * 4, 1), (["full_attention"] * 3 + ["sliding_attention"], 4)]
)
def test_layers_are_run_up_to_the_first_of_each_kind(layer_types: list[str], layers: int) -> None:
    base = base_of("gemma3_text", num_hidden_layers=4, layer_types=layer_types)
    ran = []
    for layer in base.model.base_model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, *_: ran.append(module))
    with probes._first_layers(base):
        probes._run(base, torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], None)
    assert len(ran) == layers


def test_blocks_of_keys_are_those_of_a_row_so_documents_do_not_share_one() -> None:
    assert not probes.isolates_documents(base_of("minimax_m3_vl_text"))
    assert probes.isolates_documents(base_of("deepseek_v32"))


def test_documents_are_longer_than_the_spans_that_a_model_compresses() -> None:
    """With 16 tokens of the layers that compress 128 into one, nothing would leak."""
    base = base_of("deepseek_v4")
    assert set(base.model.config.layer_types) == {"heavily_compressed_attention"}
    assert not probes.isolates_documents(base)
