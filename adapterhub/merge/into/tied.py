"""Tables of a row for each token: which those of a base are, and whether its output layer is one with the embedding."""

from __future__ import annotations

import numpy as np

from adapterhub_converters import names
from adapterhub_converters.architecture import Architecture

from .hf_base import Folder, Weight
from .sources import Opened

HEADS = ("lm_head.weight", "embed_out.weight")
"""What the weight of an output layer is called."""
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class Tied:
    """Whether the output layer is the embedding table, so that changing one would change the other.

    Attributes:
        tied: Whether they are one.
        head: The tensor of the output layer, where it has one.
        stored: Whether the base has such a tensor.
        table: The tensor of the embedding table, where its name is known.
    """

    def __init__(self, folder: Folder) -> None:
        spec, self._weights = folder.spec, folder.weights
        self._vocabulary = spec.config.get("vocab_size")
        self.head = next((name for name in self._weights if name.endswith(HEADS)), None)
        self.stored = self.head is not None
        self.table = next((f"{name}.weight" for name in names.EMBEDDINGS if f"{name}.weight" in self._weights), None)
        self.tied = spec.tied or (self.head is None and spec.architecture.endswith(_HEADED))
        if self.head and "tie_word_embeddings" not in spec.config:
            # Silent and both stored: transformers goes by the class's default; equal bytes settle it.
            self.tied = self._same_bytes(self._weights[self.head])

    @property
    def alias(self) -> dict[str, str]:
        """What a base that has no tensor of the output layer has in its place."""
        return {"lm_head.weight": self.table} if self.tied and not self.stored and self.table else {}

    def can_be_two(self, known: Architecture | None) -> bool:
        """Whether transformers loads an output layer of its own for this class, under a name that is known."""
        return known is not None and self.table is not None and "lm_head" in known.top

    def _same_bytes(self, head: Weight) -> bool:
        tables = [one for one in self._weights.values() if one.shape == head.shape and one.name != head.name]
        with Opened() as opened:
            return any(_equal(opened, head, other) for other in tables)

    def is_table(self, name: str) -> bool:
        """Whether a tensor has a row for each token."""
        if name == self.head:
            return True
        own = self._weights.get(name)
        in_a_layer = any(part.isdigit() for part in name.split("."))
        return own is not None and len(own.shape) == 2 and own.shape[0] == self._vocabulary and not in_a_layer


def _equal(opened: Opened, one: Weight, two: Weight) -> bool:
    if one.size != two.size or not one.size:
        return False
    pieces = np.empty((2, 1 << 20), np.uint8)
    for start in range(0, one.size, 1 << 20):
        count = min(1 << 20, one.size - start)
        for piece, weight in zip(pieces, (one, two), strict=True):
            opened.read(weight.path, piece[:count], weight.offset + start)
        if not np.array_equal(pieces[0, :count], pieces[1, :count]):
            return False
    return True
