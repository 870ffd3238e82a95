"""peft as the oracle: its `svd` of the dense sum is ours of the factors, and it computes the sum with our result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import combine
from adapterhub_converters.formats import peft

pytestmark = pytest.mark.peer


def test_svd_gives_what_peft_gets_from_the_dense_sum(torch: Any, llama: Any, trained: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = llama("float32")
    folders = [trained(base, name=name, r=8, target_modules=["q_proj", "down_proj"]) for name in "ab"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="svd", svd_rank=8)
    result, _ = combine([peft.read(folder) for folder in folders], [0.7, 0.3], method="svd", rank=8)
    for target, delta in result.deltas.items():
        theirs = model.get_submodule(f"base_model.model.{target}").get_delta_weight("c").detach().numpy()
        np.testing.assert_allclose(delta.lora_B @ delta.lora_A, theirs, atol=2e-6)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_peft_computes_the_sum_with_the_result(torch: Any, llama: Any, trained: Any, tmp_path: Path, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = llama("float32")
    first = trained(base, name="a", r=4, target_modules=["q_proj", "up_proj"], use_rslora=True)
    second = trained(base, name="b", r=3, target_modules=["q_proj", "lm_head"], alpha_pattern={"q_proj": 5})
    result, _ = combine([peft.read(first), peft.read(second)], [0.5, -2.0], method=method)
    (tmp_path / "c").mkdir()
    peft.write(result, tmp_path / "c")

    def delta(folder: Path, target: str) -> Any:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        return model.get_submodule(f"base_model.model.{target}").get_delta_weight("default").detach()

    q = "model.layers.1.self_attn.q_proj"
    expected = 0.5 * delta(first, q) - 2 * delta(second, q)
    assert (delta(tmp_path / "c", q) - expected).abs().max() < 1e-6 * expected.abs().max() + 1e-7
    assert (delta(tmp_path / "c", "lm_head") + 2 * delta(second, "lm_head")).abs().max() < 1e-6
