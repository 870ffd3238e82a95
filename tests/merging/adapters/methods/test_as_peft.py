"""peft as the oracle of its own merges: the same factors, and the same function where it does not lose the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.analysis.low_rank import Factors
from adapterhub.merging import METHODS, combine
from adapterhub.merging.adapters.methods import as_peft
from adapterhub.merging.adapters.methods.element_rules import weighted_sum
from adapterhub_converters.adapter import LowRankEmbedding
from adapterhub_converters.formats import peft

pytestmark = pytest.mark.peer

WEIGHTS = [0.7, -0.4]
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@pytest.fixture
def two(torch: Any, llama: Any, trained: Any) -> tuple[Any, list[Path]]:
    """A model with the adapters a and b, and their folders."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = llama("float32")
    folders = [trained(base, name=name, r=4, lora_alpha=alpha, target_modules=TARGETS) for name, alpha in (("a", 6), ("b", 8))]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    return model, folders


def theirs(model: Any, target: str) -> np.ndarray:
    delta = model.get_submodule(f"base_model.model.{target}").get_delta_weight("c").detach().numpy()
    return np.asarray(delta)


def ours(delta: Any) -> np.ndarray:
    product = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64)
    return product.T if isinstance(delta, LowRankEmbedding) else product


CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("ties", {"density": 0.3}), ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("magnitude_prune", {"density": 0.3}), ("ties_svd", {"density": 0.3}),
    ("ties_svd", {"density": 0.6, "majority_sign_method": "frequency"}), ("magnitude_prune_svd", {"density": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind}-{len(options)}" for kind, options in CASES])
def test_what_peft_merges_comes_out_the_same(two: tuple[Any, list[Path]], kind: str, options: dict[str, Any]) -> None:
    model, folders = two
    model.add_weighted_adapter(
        ["a", "b"], WEIGHTS, "c", combination_type=kind, svd_rank=96 if "svd" in kind else None, **options
    )
    method = "magnitude_prune" if kind == "magnitude_prune_svd" else f"peft_{kind}"
    values = {{"majority_sign_method": "sign"}.get(name, name): value for name, value in options.items()}
    result, report = combine(
        [peft.read(folder) for folder in folders], WEIGHTS, method=method, parameters=values, rank=96 if "svd" in kind else None
    )
    assert report.error < 1e-5
    for target, delta in result.deltas.items():
        expected = theirs(model, target)
        np.testing.assert_allclose(ours(delta), expected, atol=(1e-5 if "svd" in kind else 2e-6) * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_with_the_masks_that_peft_draws_the_factors_are_its_own(torch: Any, two: tuple[Any, list[Path]], kind: str) -> None:
    model, folders = two
    adapters = [peft.read(folder) for folder in folders]
    for target in adapters[0].deltas:
        module = model.get_submodule(f"base_model.model.{target}")
        torch.manual_seed(5)
        expected = model.base_model._generalized_task_arithmetic_weighted_adapter(
            kind, ["a", "b"], WEIGHTS, module, 0.6, "total"
        )
        torch.manual_seed(5)
        deltas: list[Any] = [adapter.deltas[target] for adapter in adapters]
        shapes = [delta.lora_A.shape for delta in deltas] + [delta.lora_B.shape for delta in deltas]
        drawn = [torch.bernoulli(torch.full(shape, 0.6)).numpy() > 0 for shape in shapes]
        terms = [Factors(delta.lora_B.astype(np.float64), delta.lora_A.astype(np.float64)) for delta in deltas]
        prune = as_peft.masking(lambda index, _shape, drawn=drawn: drawn[index], 0.6)  # type: ignore[misc]
        merge = weighted_sum if kind == "dare_linear" else as_peft.election("total")
        merged_factors = as_peft.merge_factors(terms, WEIGHTS, [delta.scaling for delta in deltas], prune, merge)
        for factor, theirs in zip((merged_factors.right, merged_factors.left), expected, strict=True):
            np.testing.assert_allclose(factor, theirs.numpy(), atol=1e-6)


def test_pefts_own_merge_of_rslora_is_right_here(torch: Any, llama: Any, trained: Any) -> None:
    base = llama("float32")
    folder = trained(base, name="a", r=4, target_modules=["q_proj"], use_rslora=True)
    adapter = peft.read(folder)
    result, _ = combine([adapter], [1.0], method="peft_linear")
    for target, delta in result.deltas.items():
        np.testing.assert_allclose(ours(delta), ours(adapter.deltas[target]), atol=1e-7)


def test_every_merge_that_peft_has_is_here() -> None:
    need = {"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_ties_svd"}
    same = {"cat": "cat", "svd": "svd", "dare_linear_svd": "dare_linear", "magnitude_prune_svd": "magnitude_prune"}
    assert {name for name in METHODS if name.startswith("peft_")} == {f"peft_{name}" for name in need}
    assert set(same.values()) <= set(METHODS)
