"""The deltas of a GGUF adapter that somebody else wrote, under the names that its base has in Hugging Face.

What llama.cpp stacks or fuses comes apart again: experts as modules or as one parameter, as the base has them, q, k and v
from one tensor or into one. All of it is exact, in factors that a smaller rank might do for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterhub_converters.adapter import FactorPair, LowRank, LowRankEmbedding, StackedLowRank
from adapterhub_converters.architectures import names
from adapterhub_converters.architectures.architecture import FUSED
from adapterhub_converters.architectures.names import Architecture
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import FormatError, RefusedError

Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def deltas(pairs: Pairs, alpha: float, architecture: Architecture, base: BaseSpec | None, where: str) -> dict[str, FactorPair]:
    """Target to delta; RefusedError names a tensor that has no verified name."""
    return _Reading(_unfused(pairs, where), alpha, architecture, base, where).deltas()


def _unfused(pairs: Pairs, where: str) -> Pairs:
    """The pairs with those of gate and up together as one each, which share their `lora_a`."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for stem, (lora_a, lora_b) in pairs.items():
        prefix, _, name = stem.rpartition(".")
        if name != "ffn_gate_up_exps":
            found[stem] = lora_a, lora_b
            continue
        if lora_b.shape[-2] % 2:
            raise FormatError(where, f"{stem}: {lora_b.shape[-2]} rows are not those of gate and up")
        for part, rows in zip(FUSED[name], np.split(lora_b, 2, axis=-2), strict=True):
            if f"{prefix}.{part}" in pairs:
                raise FormatError(where, f"{stem}: there is a pair of {part} as well")
            found[f"{prefix}.{part}"] = lora_a, np.ascontiguousarray(rows)
    return found


@dataclass(frozen=True)
class _Reading:
    pairs: Pairs
    alpha: float
    architecture: Architecture
    base: BaseSpec | None
    where: str

    def deltas(self) -> dict[str, FactorPair]:
        found: dict[str, FactorPair] = {}
        for stem in self.pairs:
            if module := self.architecture.module(stem):
                found[module] = self._one(stem, module)
            elif self.architecture.stacked_module(stem):
                found |= self._experts(stem)
            elif stem.endswith(".attn_qkv") and self.architecture.module(f"{stem.removesuffix('qkv')}q"):
                found |= self._split(stem)
            else:
                kind = f"Hugging Face's {self.architecture.gguf} models"
                raise RefusedError(self.where, f"tensor {stem!r} has no verified name in {kind}")
        return found

    def _scale(self, stem: str) -> float:
        """The alpha of a pair; llama.cpp scales by 1 where a file has none."""
        return self.alpha or float(self.pairs[stem][1].shape[-1])

    def _config(self) -> Mapping[str, Any]:
        return self.base.config if self.base else {}

    def _one(self, stem: str, module: str) -> FactorPair:
        lora_a, lora_b = self.pairs[stem]
        order = self.architecture.order(module, self._config(), self.where)
        if not names.divides(order, len(lora_b)):
            raise FormatError(self.where, f"{stem}: {len(lora_b)} rows are not those of {order} heads")
        if stem == "token_embd":
            return LowRankEmbedding(lora_a, lora_b, self._scale(stem))
        transposed = self.architecture.transposed and stem.startswith("blk.")
        return LowRank(lora_a, names.unpermuted(lora_b, order), self._scale(stem), transposed_base=transposed)

    def _split(self, stem: str) -> dict[str, FactorPair]:
        """q, k and v of a tensor that fuses them: the rows of `lora_b` shared out, `lora_a` for each."""
        lora_a, lora_b = self.pairs[stem]
        heads, kv_heads = (self._config().get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or len(lora_b) % (heads + 2 * kv_heads):
            what = f"{stem}: where q ends and k begins depends on the number of heads"
            raise RefusedError(self.where, what, "Name the base model", code="base-required")
        size = len(lora_b) // (heads + 2 * kv_heads)
        found: dict[str, FactorPair] = {}
        for name, rows in zip("qkv", np.split(lora_b, [heads * size, (heads + kv_heads) * size]), strict=True):
            module = str(self.architecture.module(f"{stem.removesuffix('qkv')}{name}"))
            order = self.architecture.order(module, self._config(), self.where)
            found[module] = LowRank(lora_a, np.ascontiguousarray(names.unpermuted(rows, order)), self._scale(stem))
        return found

    def _experts(self, stem: str) -> dict[str, FactorPair]:
        lora_a, lora_b = self.pairs[stem]
        stacked, listed = str(self.architecture.stacked_module(stem)), self.architecture.listed_module(stem, 0)
        if listed and not (self.base and stacked in self.base.tensors):
            return {
                str(self.architecture.listed_module(stem, expert)): LowRank(lora_a[expert], lora_b[expert], self._scale(stem))
                for expert in range(len(lora_a))
                if lora_a[expert].any() or lora_b[expert].any()  # both halves 0: an expert that has no delta
            }
        stems = self.architecture.stems(stacked)
        if stem != next(one for one in stems if one in self.pairs):
            return {}  # with the one before
        return {stacked: self._joined(stems)}

    def _joined(self, stems: Sequence[str]) -> StackedLowRank:
        """One parameter of all experts from the tensors that share it: its rows are theirs, its rank the sum of theirs."""
        there = {stem: self.pairs[stem] for stem in stems if stem in self.pairs}
        first = next(iter(there))
        lora_a, lora_b = there[first]
        shared = all(np.array_equal(pair[0], lora_a) for pair in there.values())
        if len({(pair[0].shape, pair[1].shape) for pair in there.values()}) > 1:
            what = f"{' and '.join(there)} differ in rank or shape, so no one delta of both has one scale"
            raise RefusedError(self.where, what)
        n_experts, count, r = lora_b.shape
        blocks = 1 if shared else len(there)
        interleaved = bool(self.architecture.experts and self.architecture.experts.interleaved)
        lora_B = np.zeros((n_experts, len(stems) * count, blocks * r), lora_b.dtype)
        for block, stem in enumerate(there):
            number = stems.index(stem)
            start, step = (number, len(stems)) if interleaved else (number * count, 1)
            columns = slice(0, r) if shared else slice(block * r, (block + 1) * r)
            lora_B[:, start::step][:, :count, columns] = there[stem][1]
        lora_A = lora_a if shared else np.concatenate([pair[0] for pair in there.values()], axis=1)
        transposed = bool(self.architecture.experts and self.architecture.experts.transposed)
        # alpha / r stays what it was
        return StackedLowRank(lora_A, lora_B, self._scale(first) * blocks, transposed_base=transposed)
