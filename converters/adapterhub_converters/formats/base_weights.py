"""Conversions that need the numbers of the base's weights: to drop copies of them, and to turn PiSSA into plain LoRA.

One tensor is read at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding
from adapterhub_converters.adapter.singular_values import leading
from adapterhub_converters.bases import read_hf
from adapterhub_converters.bases.hf import ModelWeights
from adapterhub_converters.errors import NotFoundError, RefusedError

# Singular values closer than this, relative to the largest, can be told apart to a percent at best in float32.
_VAGUE = 100 * 2.0**-24
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")


class BaseWeights(ModelWeights):
    """The tensors of a Hugging Face folder by the names that an adapter uses. A context manager.

    Raises:
        RefusedError: It is a file.
        NotFoundError: It has no weights in safetensors.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_file():
            raise RefusedError(str(folder), "a file; weights are read from a folder", "Name the base's folder with its weights")
        self._tied = read_hf(folder).tied
        super().__init__(folder)
        if not self.names:
            raise NotFoundError(self.where, "no weights in safetensors", "Name the base's folder with its weights")

    def tensor(self, name: str) -> np.ndarray:
        """A parameter as stored.

        The names of a base saved without its head lack the first component. The output layer of a base that ties it to its
        embedding table is that table.

        Raises:
            RefusedError: There is none of that name, or it is quantized.
        """
        wanted = [name, name.partition(".")[2]]
        if self._tied and name.endswith("lm_head.weight"):
            tables = [known for known in self.names if known.endswith(_TABLES)]
            wanted += tables if len(tables) == 1 else []
        found = next((known for known in wanted if known in self), None)
        if found is None:
            raise RefusedError(name, f"not in the base {self.where}", "Is this the model the adapter was trained on?")
        if self.info(found).dtype not in dtypes.FLOATS:
            what = f"the base stores it as {self.info(found).dtype}, not as floats"
            raise RefusedError(name, what, "Name the base in full precision")
        return self.stored(found)


def without_copies(adapter: Adapter, folder: Path) -> Adapter:
    """The adapter without its copies of the base's weights, each of which must equal the base's in `folder`.

    Raises:
        RefusedError: A copy differs from the base's tensor: the vocabulary was resized, or the table was trained.
    """
    if not adapter.copies:
        return adapter
    with BaseWeights(folder) as base:
        for name, copy in adapter.copies.items():
            own = base.tensor(name)
            if own.shape != copy.shape:
                what = f"the adapter's copy of it is {copy.shape}, the base's is {own.shape}"
                raise RefusedError(name, what, "Resize the base's vocabulary as it was in training")
            # As training loaded it: the base's numbers, rounded to the type of the copy.
            if own.astype(copy.dtype).tobytes() != copy.tobytes():
                raise RefusedError(name, "the adapter's copy of it differs from the base's", "Was it trained on another base?")
    notes = tuple(note for note in adapter.notes if not note.startswith("contains copies of the base's weights"))
    note = f"left out, as they equal the base's: {', '.join(sorted(adapter.copies))}"
    return dataclasses.replace(adapter, copies={}, source=None, notes=(*notes, note))


def plain_lora(adapter: Adapter, folder: Path) -> Adapter:
    """A PiSSA adapter as a plain LoRA of twice the rank, from the base's weights in `folder`.

    When peft loads a PiSSA adapter, it removes the r largest singular directions from the weight (arXiv 2404.02948;
    `tuners/lora/layer.py`, `pissa_init`). With these as additional rows and columns, the unchanged base computes the
    same, up to the rounding of a singular value decomposition in float32 and of the residual in the base's dtype.

    Returns:
        A new adapter; `adapter` itself if its init is the default one.

    Raises:
        RefusedError: The init depends on more than the base (`pissa_niter_…`, `corda`, …), or there is DoRA on top.
    """
    if adapter.meta.init == "default":
        return adapter
    if adapter.meta.init != "pissa":
        raise RefusedError(
            "init_lora_weights",
            f"{adapter.meta.init} depends on more than the base's weights",
            "Save it again with peft's path_initial_model_for_weight_conversion",
        )
    vague: list[str] = []
    with BaseWeights(folder) as base:
        deltas = dict(_without_principal(adapter, base, vague))
    notes = [f"pissa: the {len(deltas)} deltas are written as plain LoRA of twice the rank, computed from {folder.name}"]
    if vague:
        what = "the singular values on both sides of the rank are nearly equal, so training may have removed other directions"
        notes.append(f"pissa: {', '.join(vague)}: {what}")
    meta = dataclasses.replace(adapter.meta, init="default")
    return dataclasses.replace(adapter, deltas=deltas, meta=meta, source=None, notes=(*adapter.notes, *notes))


def _without_principal(
    adapter: Adapter, base: BaseWeights, vague: list[str]
) -> Iterator[tuple[str, LowRank | LowRankEmbedding]]:
    for target, delta in adapter.deltas.items():
        if isinstance(delta, LowRankEmbedding):  # peft gives it the default init
            yield target, delta
        elif not isinstance(delta, LowRank) or delta.magnitude is not None:
            raise RefusedError(target, f"PiSSA with DoRA, or on a delta of kind {type(delta).__name__}, is not supported")
        elif not delta.scaling:
            raise RefusedError(target, "PiSSA with a scale of 0 is not supported")
        else:
            yield target, _doubled(target, delta, base, vague)


def _doubled(target: str, delta: LowRank, base: BaseWeights, vague: list[str]) -> LowRank:
    weight = base.tensor(f"{target}.weight").astype(np.float32)
    weight = weight.T if delta.transposed_base else weight
    if weight.shape != delta.shape:
        raise RefusedError(target, f"the delta is {delta.shape}, the base's weight {weight.shape}")
    r, s = delta.r, delta.scaling
    if r > min(weight.shape):
        raise RefusedError(target, f"PiSSA of rank {r} on a weight of rank {min(weight.shape)} is not supported")
    if not np.isfinite(weight).all():
        raise RefusedError(target, "the base's weight contains NaN or Inf", code="non-finite")
    left, singular, right = leading(weight, r + 1)
    if len(singular) > r and singular[r - 1] - singular[r] < _VAGUE * singular[0]:
        vague.append(target)
    with np.errstate(all="ignore"):
        root = np.sqrt(singular[:r] / np.float32(abs(s)))
    if not np.isfinite(root).all():
        raise RefusedError(target, f"the base's weight divided by the scale {s:g} is too large for float32")
    lora_A = np.concatenate([delta.lora_A.astype(np.float32), root[:, None] * right[:r]])
    lora_B = np.concatenate([delta.lora_B.astype(np.float32), -np.sign(s).astype(np.float32) * left[:, :r] * root], axis=1)
    return LowRank(lora_A, lora_B, s * 2 * r, bias=delta.bias, transposed_base=delta.transposed_base)
