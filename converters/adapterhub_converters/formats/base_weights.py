"""Conversions that need the base's weights: dropping copies of them, and turning PiSSA into plain LoRA.

One tensor is read at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding
from adapterhub_converters.adapter.singular_values import leading_triplets
from adapterhub_converters.bases import read_hf
from adapterhub_converters.bases.hf_base import ModelWeights
from adapterhub_converters.errors import NotFoundError, RefusedError

# Singular values closer than this, relative to the largest, can be told apart to a percent at best in float32.
_NEAR_TIE = 100 * 2.0**-24
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")


class BaseWeights(ModelWeights):
    """The tensors of a Hugging Face folder by the names that an adapter uses. A context manager.

    Raises:
        RefusedError: The path is a file.
        NotFoundError: The folder has no weights in safetensors.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_file():
            raise RefusedError(str(folder), "a file; weights are read from a folder", "Name the base's folder with its weights")
        self._tied = read_hf(folder).tied
        super().__init__(folder)
        if not self.names:
            raise NotFoundError(self.location, "no weights in safetensors", "Name the base's folder with its weights")

    def tensor(self, name: str) -> np.ndarray:
        """Return a parameter as stored.

        In a base saved without its head, names lack the first component. If a base ties its output layer to the embedding
        table, that table is returned for the output layer.

        Raises:
            RefusedError: No parameter has that name, or it is quantized.
        """
        candidates = [name, name.partition(".")[2]]
        if self._tied and name.endswith("lm_head.weight"):
            tables = [table for table in self.names if table.endswith(_TABLES)]
            candidates += tables if len(tables) == 1 else []
        stored_name = next((candidate for candidate in candidates if candidate in self), None)
        if stored_name is None:
            raise RefusedError(name, f"not in the base {self.location}", "Is this the model the adapter was trained on?")
        if self.info(stored_name).dtype not in dtypes.FLOATS:
            problem = f"the base stores it as {self.info(stored_name).dtype}, not as floats"
            raise RefusedError(name, problem, "Name the base in full precision")
        return self.read_tensor(stored_name)


def without_copies(adapter: Adapter, folder: Path) -> Adapter:
    """Return the adapter without its copies of the base's weights, each of which must equal the base's in `folder`.

    Raises:
        RefusedError: A copy differs from the base's tensor: the vocabulary was resized, or the table was trained.
    """
    if not adapter.copies:
        return adapter
    with BaseWeights(folder) as base:
        for name, copy in adapter.copies.items():
            base_tensor = base.tensor(name)
            if base_tensor.shape != copy.shape:
                problem = f"the adapter's copy of it is {copy.shape}, the base's is {base_tensor.shape}"
                raise RefusedError(name, problem, "Resize the base's vocabulary as it was in training")
            # As training loaded it: the base's numbers, rounded to the type of the copy.
            if base_tensor.astype(copy.dtype).tobytes() != copy.tobytes():
                raise RefusedError(name, "the adapter's copy of it differs from the base's", "Was it trained on another base?")
    notes = tuple(note for note in adapter.notes if not note.startswith("contains copies of the base's weights"))
    note = f"left out, as they equal the base's: {', '.join(sorted(adapter.copies))}"
    return dataclasses.replace(adapter, copies={}, source=None, notes=(*notes, note))


def plain_lora(adapter: Adapter, folder: Path) -> Adapter:
    """Return a PiSSA adapter as a plain LoRA of twice the rank, computed from the base's weights in `folder`.

    When peft loads a PiSSA adapter, it removes the r largest singular directions from the weight (arXiv 2404.02948;
    `tuners/lora/layer.py`, `pissa_init`). With these added as rows and columns, the unchanged base computes the same, up to
    the rounding of a singular value decomposition in float32 and of the residual in the base's dtype.

    Returns:
        A new adapter; `adapter` itself if its init is the default one.

    Raises:
        RefusedError: The init depends on more than the base (`pissa_niter_…`, `corda`, …), or PiSSA is combined with DoRA.
    """
    if adapter.meta.init == "default":
        return adapter
    if adapter.meta.init != "pissa":
        raise RefusedError(
            "init_lora_weights",
            f"{adapter.meta.init} depends on more than the base's weights",
            "Save it again with peft's path_initial_model_for_weight_conversion",
        )
    ambiguous: list[str] = []
    with BaseWeights(folder) as base:
        deltas = dict(_plain_deltas(adapter, base, ambiguous))
    notes = [f"pissa: the {len(deltas)} deltas are written as plain LoRA of twice the rank, computed from {folder.name}"]
    if ambiguous:
        explanation = (
            "the singular values on both sides of the rank are nearly equal, so training may have removed other directions"
        )
        notes.append(f"pissa: {', '.join(ambiguous)}: {explanation}")
    meta = dataclasses.replace(adapter.meta, init="default")
    return dataclasses.replace(adapter, deltas=deltas, meta=meta, source=None, notes=(*adapter.notes, *notes))


def _plain_deltas(
    adapter: Adapter, base: BaseWeights, ambiguous: list[str]
) -> Iterator[tuple[str, LowRank | LowRankEmbedding]]:
    for target, delta in adapter.deltas.items():
        if isinstance(delta, LowRankEmbedding):  # peft gives it the default init
            yield target, delta
        elif not isinstance(delta, LowRank) or delta.magnitude is not None:
            raise RefusedError(target, f"PiSSA with DoRA, or on a delta of kind {type(delta).__name__}, is not supported")
        elif not delta.scaling:
            raise RefusedError(target, "PiSSA with a scale of 0 is not supported")
        else:
            yield target, _double_rank(target, delta, base, ambiguous)


def _double_rank(target: str, delta: LowRank, base: BaseWeights, ambiguous: list[str]) -> LowRank:
    weight = base.tensor(f"{target}.weight").astype(np.float32)
    # Modules such as GPT-2's Conv1D store `(in, out)`.
    weight = weight.T if delta.transposed_base else weight
    if weight.shape != delta.shape:
        raise RefusedError(target, f"the delta is {delta.shape}, the base's weight {weight.shape}")
    r, s = delta.r, delta.scaling
    if r > min(weight.shape):
        raise RefusedError(target, f"PiSSA of rank {r} on a weight of rank {min(weight.shape)} is not supported")
    if not np.isfinite(weight).all():
        raise RefusedError(target, "the base's weight contains NaN or Inf", code="non-finite")
    # One more than the rank, to see whether the cut at r is well determined.
    left_vectors, singular_values, right_vectors = leading_triplets(weight, r + 1)
    if len(singular_values) > r and singular_values[r - 1] - singular_values[r] < _NEAR_TIE * singular_values[0]:
        ambiguous.append(target)
    with np.errstate(all="ignore"):
        root = np.sqrt(singular_values[:r] / np.float32(abs(s)))
    if not np.isfinite(root).all():
        raise RefusedError(target, f"the base's weight divided by the scale {s:g} is too large for float32")
    # The removed directions are subtracted again: peft's base is the weight without them, ours the full weight.
    lora_A = np.concatenate([delta.lora_A.astype(np.float32), root[:, None] * right_vectors[:r]])
    lora_B = np.concatenate(
        [delta.lora_B.astype(np.float32), -np.sign(s).astype(np.float32) * left_vectors[:, :r] * root], axis=1
    )
    return LowRank(lora_A, lora_B, s * 2 * r, bias=delta.bias, transposed_base=delta.transposed_base)
