"""From the names of an adapter to the tensors of a Hugging Face folder, and the refusals where there is none that fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from adapterhub_converters.adapter import Adapter
from adapterhub_converters.architectures import names
from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.errors import RefusedError

from .read_folder import Folder, Weight
from .tensor_io import Opened


def architecture_of(folder: Folder) -> Architecture | None:
    """What is known of the class of a base, if it is."""
    try:
        return names.by_class(folder.spec.architecture, folder.spec.where)
    except RefusedError:
        return None


def absent(target: str, where: str) -> RefusedError:
    """The base at `where` has no such module or parameter."""
    return RefusedError(target, f"not in the base {where}", "Is this the model the adapter was trained on?")


def check_shape(target: str, name: str, shape: tuple[int, ...], have: tuple[int, ...]) -> None:
    """RefusedError where the base's tensor `name` has another shape than the weight that the adapter changes."""
    if tuple(shape) != have:
        hint = "The adapter was trained after the vocabulary was resized" if have[1:] == tuple(shape)[1:] else ""
        raise RefusedError(target, f"changes a weight of shape {tuple(shape)}, the base's {name} is {have}", hint)


class BaseNames:
    """From an adapter's names to the base's: the same, or one leading component more or less, the same for all.

    `GPT2LMHeadModel` calls its blocks `transformer.h…`, and its published checkpoint `h…`; transformers adds what is
    missing when it loads (`base_model_prefix`), and so the adapter has it.
    """

    def __init__(self, folder: Folder, adapter: Adapter, alias: Mapping[str, str]) -> None:
        tensors = folder.weights
        self._tensors = tensors
        self._where = folder.spec.where
        self._alias = alias
        stems = {f"{target}.weight" for target in (*adapter.deltas, *adapter.rows)} | set(adapter.replaced)
        missing = sorted(stem for stem in stems if stem not in tensors and stem not in alias)
        self._rename = self._dialect(missing) if missing else {}
        self.notes = sorted({f"{old}… in the adapter is {new}… in the base" for old, new in self._prefixes(self._rename)})

    def _dialect(self, missing: list[str]) -> dict[str, str]:
        first = missing[0]
        heads = {first.partition(".")[0] + "."}
        added = {name.removesuffix(first) for name in self._tensors if name.endswith("." + first)}
        ways = [{name: name.partition(".")[2] for name in missing}] if all(n.startswith(tuple(heads)) for n in missing) else []
        ways += [{name: prefix + name for name in missing} for prefix in sorted(added)]
        fitting = [way for way in ways if all(new in self._tensors for new in way.values())]
        if len(fitting) > 1:
            raise RefusedError(first, f"could be {' or '.join(way[first] for way in fitting)} in the base {self._where}")
        if not fitting:
            raise absent(first, self._where)
        return fitting[0]

    @staticmethod
    def _prefixes(rename: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for old, new in rename.items():
            longer = max(old, new, key=len)
            prefix = longer[: len(longer) - min(len(old), len(new))]
            yield (prefix, "") if len(old) > len(new) else ("", prefix)

    def parameter(self, name: str, *, why: str = "not in the base") -> str:
        """The base's name of a parameter."""
        if name in self._tensors:
            return name
        if name in self._alias:
            return self._alias[name]
        stem = name.rpartition(".")[0] + ".weight"
        new = self._rename.get(name) or self._rename.get(stem, stem).rpartition(".")[0] + "." + name.rpartition(".")[2]
        if new not in self._tensors:
            raise RefusedError(name.rpartition(".")[0], why)
        return new


# ---- Tables of a row for each token: which those of a base are, and whether its output layer is one with the embedd


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
