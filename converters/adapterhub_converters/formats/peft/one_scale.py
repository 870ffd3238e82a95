"""One rank and one alpha for all modules of a PEFT folder, for programs that read only `r` and `lora_alpha`.

SGLang scales by `lora_alpha / r` regardless of `use_rslora` and `alpha_pattern`, and its buffers have room for exactly `r` rows
(0.5.23: sglang/srt/lora/lora.py, LoRAAdapter; mem_pool.py, load_lora_weight_to_buffer). The result computes the same function
in every other program, too.
"""

from __future__ import annotations

from dataclasses import replace

from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding, plain_pairs
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import file_alpha
from adapterhub_converters.lazy_imports import np


def with_one_scale(adapter: Adapter) -> Adapter:
    """Return the adapter without rsLoRA and patterns: smaller ranks padded with zeros, other scales moved into `lora_B`.

    The notes say what was done. `source` is None, because the config differs.

    Raises:
        RefusedError: Some deltas are not plain pairs of one module, or no delta changes anything.
    """
    pairs = plain_pairs(adapter)
    if unsupported := [target for target, delta in pairs.items() if not delta.plain]:
        raise RefusedError(unsupported[0], "has a magnitude or a bias beside its two matrices")
    rank = max((delta.r for delta in pairs.values()), default=0)
    lora_alphas = {target: delta.scaling * rank for target, delta in pairs.items()}
    plan = file_alpha.plan(lora_alphas, np.dtype(np.float64), "lora_alpha")
    if plan is None:
        raise RefusedError("lora_alpha", "is 0 in every module, so that the adapter changes nothing")
    notes = list(plan.notes)
    if any(delta.rslora for delta in pairs.values()):
        notes.append(f"rsLoRA is folded into lora_alpha {plan.common:.9g}")
    if scaled_count := sum(factor != 1.0 for factor in plan.factors.values()):
        notes.append(f"scales folded into lora_B: {scaled_count}")
    if padded_count := sum(delta.r != rank for delta in pairs.values()):
        notes.append(f"modules padded with zeros to rank {rank}: {padded_count}")
    deltas = {
        target: _uniform(target, delta, plan.factors[target], plan.common, rank) for target, delta in sorted(pairs.items())
    }
    return replace(adapter, deltas=deltas, source=None, notes=(*adapter.notes, *notes))


def _uniform(
    target: str, delta: LowRank | LowRankEmbedding, factor: float, alpha: float, rank: int
) -> LowRank | LowRankEmbedding:
    lora_B = file_alpha.fold(f"{target}.lora_B", delta.lora_B, factor).lora_B
    lora_A, lora_B = file_alpha.pad(delta.lora_A, rank, 0), file_alpha.pad(lora_B, rank, 1)
    return replace(delta, lora_A=lora_A, lora_B=lora_B, alpha=alpha, rslora=False)
