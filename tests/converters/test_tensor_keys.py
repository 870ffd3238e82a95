"""Names of tensors in files of PEFT, which are analyzed by module and by ending, each only once."""

from __future__ import annotations

from itertools import product

from adapterhub_converters.formats.peft.tensor_keys import PREFIX, SHARED, identify, native_name

_STARTS = ("", PREFIX, PREFIX * 2, "module.", "module.module.", "_orig_mod.", "base_model.", f"_fsdp_wrapped_module.{PREFIX}")
_MODULES = (
    "",
    "model.layers.0.q",
    "a",
    "lora_A",
    "a.lora_A",
    "vera_x",
    "a.base_layer",
    "a.modules_to_save",
    "a._orig_mod",
    "module",
)
_ENDS = (
    "", ".lora_A", ".lora_A.weight", ".lora_A.default.weight", ".lora_A..weight", ".lora_A.a.b", ".lora_A._orig_mod.weight",
    ".lora_B.default.bias", ".lora_embedding_A.default", ".lora_magnitude_vector.default.weight", ".vera_A", ".vera_A.default",
    ".vera_lambda_b.default", ".hada_w1_a.x", ".lokr_w1", ".weight", ".base_layer.weight", ".modules_to_save.default.weight",
    ".token_adapter.trainable_tokens_delta.default", ".original_module.weight",
)  # fmt: skip


def test_a_name_that_is_analyzed_in_two_parts_has_the_identity_that_it_has_as_a_whole() -> None:
    for parts in product(_STARTS, _MODULES, _ENDS):
        key = "".join(parts).lstrip(".") or "x"
        full, kind, name, _ = identify(key)
        assert full == native_name(key)
        if not full.startswith(PREFIX) and full not in SHARED:
            assert (kind, name) == ("unknown", key)
