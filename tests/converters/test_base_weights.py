"""Conversions that take the base's weights into account, with peft as the oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.adapter import (
    Meta,
    plain_pairs,
)
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.base_weights import plain_lora, without_copies
from tests.conftest import need_module
from tests.converters.test_peft_peer import (
    Make,
    assert_bytes_come_back,
    base_folder,
    gpt2,
    llama,
    loaded,
    outputs,
    rewritten,
    saved,
)

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def _peft() -> None:
    need_module("peft")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [llama(), gpt2], ids=["llama", "gpt2"])
def test_pissa_becomes_plain_lora_of_twice_the_rank(make: Make, rslora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig

    modules = ["c_attn", "c_proj"] if make is gpt2 else ["q_proj", "down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, init_lora_weights="pissa", use_rslora=rslora, fan_in_fan_out=make is gpt2
    )
    wrapped = saved(make, config, tmp_path / "a")
    adapter = assert_bytes_come_back(tmp_path / "a", tmp_path / "b")
    with pytest.raises(RefusedError, match="depends on more than the base's weights"):
        plain_lora(dataclasses.replace(adapter, meta=Meta(init="pissa_niter_4")), tmp_path)
    plain = plain_lora(adapter, base_folder(make, tmp_path / "base"))
    assert {delta.r for delta in plain.deltas.values()} == {8}
    again = loaded(make, rewritten(plain, tmp_path / "c"))
    np.testing.assert_allclose(outputs(again), outputs(wrapped), atol=1e-4)


def test_copies_of_a_tied_table_are_left_out_too(tmp_path: Path) -> None:
    from peft import LoraConfig

    make = llama(tie_word_embeddings=True)
    saved(make, LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), tmp_path / "a")
    adapter = peft.read(tmp_path / "a")
    assert len(adapter.copies) == 2
    assert not without_copies(adapter, base_folder(make, tmp_path / "base")).copies


def test_a_copy_is_left_out_if_it_is_the_bases(tmp_path: Path) -> None:
    from peft import LoraConfig

    saved(llama(), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), tmp_path / "a")
    adapter = peft.read(tmp_path / "a")
    assert set(adapter.copies) == {"model.embed_tokens.weight", "lm_head.weight"}
    plain = without_copies(adapter, base_folder(llama(), tmp_path / "base"))
    assert plain_pairs(plain).keys() == adapter.deltas.keys()
    changed = dataclasses.replace(adapter, copies={name: -copy for name, copy in adapter.copies.items()})
    with pytest.raises(RefusedError, match="differs from the base's"):
        without_copies(changed, tmp_path / "base")
    with pytest.raises(RefusedError, match="Resize the base's vocabulary"):
        without_copies(adapter, base_folder(llama(vocab_size=160), tmp_path / "larger"))
