"""Which tensor of the base gets which edits, or why none may: every refusal of `fuse` is here.

Nothing is written before the whole plan stands, so a merge that would be wrong costs no time and leaves no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adapterhub_converters import base as base_model
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank, factored_out, plain_pairs
from adapterhub_converters.base import BaseSpec
from adapterhub_converters.base_weights import plain_lora, without_copies
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from adapterhub_converters.files import json_file
from adapterhub_converters.files.safetensors_file import SafetensorsFile, TensorInfo

from .checks import Weighted, check_adapter
from .edits import AddDora, AddLowRank, AddVector, Edit, Replace, SetRows
from .rounding import computable

# Modules that transformers builds from Conv1D, whose weight is `(in, out)` (`pytorch_utils.py`).
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Shard:
    """One weights file of the base; `tensors` in file order."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    data_start: int


@dataclass(frozen=True)
class Plan:
    """`edits` by tensor name, in the order of the adapters; `notes` say what was decided, one line each."""

    shards: tuple[Shard, ...]
    edits: Mapping[str, tuple[Edit, ...]]
    notes: tuple[str, ...] = field(default=())


def plan(adapters: Weighted, base: Path) -> Plan:
    """The edits that merge the adapters into a Hugging Face folder.

    Raises:
        RefusedError: The result would differ from base and adapters loaded together; says which module and why.
    """
    spec, shards = _read_base(base)
    if not adapters:
        raise RefusedError(str(base), "no adapter to merge")
    planner = _Planner(spec, {name: info for shard in shards for name, info in shard.tensors.items()}, shards)
    for adapter, weight in adapters:
        settled = plain_lora(adapter, base) if adapter.meta.init == "pissa" else adapter
        check_adapter(settled, weight)
        planner.add(factored_out(without_copies(settled, base)), weight)
    return Plan(shards, {name: tuple(edits) for name, edits in planner.edits.items()}, tuple(dict.fromkeys(planner.notes)))


def _read_base(base: Path) -> tuple[BaseSpec, tuple[Shard, ...]]:
    if base.is_file():
        raise RefusedError(str(base), "a base to merge into is a Hugging Face folder, not a file", "Convert it first")
    if not base.is_dir():
        raise NotFoundError(str(base), "no such folder")
    spec = base_model.read_hf(base)
    paths = base_model.weight_files(base)
    if not paths:
        pickles = sorted(item.name for item in base.glob("*.bin"))
        what = f"{pickles[0]} is a pickle, which can run code when loaded" if pickles else "no model.safetensors"
        raise (RefusedError if pickles else NotFoundError)(str(base), what, "Save the base with safe_serialization=True")
    if spec.quantisation:
        raise RefusedError(
            str(base),
            f"the weights are quantised ({spec.quantisation}); a sum rounded to that grid would lose most of the adapter",
            "Merge into the full-precision model and quantise the result",
        )
    shards = tuple(_read_shard(path) for path in paths)
    _check_index(base, shards)
    return spec, shards


def _read_shard(path: Path) -> Shard:
    with SafetensorsFile(path) as file:
        return Shard(path, file.tensors, file.header.data_start)


def _check_index(base: Path, shards: Sequence[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if seen.setdefault(name, shard.path.name) != shard.path.name:
                raise FormatError(str(base), f"tensor {name!r} is in {seen[name]} and in {shard.path.name}")
    index = base / "model.safetensors.index.json"
    if index.exists():
        for name, file in json_file.read_object(index)["weight_map"].items():
            if seen.get(name) != file:
                raise FormatError(str(index), f"says that tensor {name!r} is in {file}, which it is not")


class _Planner:
    """Gathers edits adapter by adapter, and knows the base."""

    def __init__(self, spec: BaseSpec, tensors: Mapping[str, TensorInfo], shards: Sequence[Shard]) -> None:
        self.spec = spec
        self.tensors = tensors
        self.tied = _Tied(spec, tensors, shards)
        self.edits: dict[str, list[Edit]] = {}
        self.notes: list[str] = []

    def add(self, adapter: Adapter, weight: float) -> None:
        """Everything one adapter does."""
        names = _Names(self.spec, self.tensors, adapter)
        self.notes += [*adapter.notes, *names.notes]
        for target, delta in plain_pairs(adapter).items():
            if isinstance(delta, LowRank):
                self._low_rank(target, names.parameter(f"{target}.weight"), delta, weight, names)
            else:
                name = names.parameter(f"{target}.weight")
                self._expect(target, name, delta.shape)
                self.tied.check(name, target)
                self._put(name, AddLowRank(delta, delta.scaling * weight, transposed=False), target)
        for parameter, values in adapter.replaced.items():
            self._replace(parameter, names.parameter(parameter), values, weight)
        for target, rows in adapter.rows.items():
            self._rows(target, names.parameter(f"{target}.weight"), rows.ids, rows.values, weight)

    def _low_rank(self, target: str, name: str, delta: LowRank, weight: float, names: _Names) -> None:
        transposed = self._transposed(target, name, delta)
        self.tied.check(name, target)
        scale = delta.scaling * weight
        if delta.magnitude is None:
            self._put(name, AddLowRank(delta, scale, transposed), target)
        else:
            self._dora(target, name, AddDora(delta, scale, transposed, delta.magnitude), weight)
        if delta.bias is not None:
            bias = names.parameter(f"{target}.bias", why="the adapter adds to a bias (lora_bias) and the base has none")
            self._expect(target, bias, delta.bias.shape)
            self._put(bias, AddVector(delta.bias, scale), target)

    def _dora(self, target: str, name: str, edit: AddDora, weight: float) -> None:
        out_features = edit.delta.lora_B.shape[0]
        if edit.magnitude.size != out_features:
            raise RefusedError(target, f"a DoRA magnitude of {edit.magnitude.size} numbers for {out_features} outputs")
        if weight != 1 or name in self.edits:
            raise RefusedError(target, "DoRA is no sum: it can be merged alone and with weight 1 only")
        self._put(name, edit, target)

    def _replace(self, parameter: str, name: str, values: np.ndarray, weight: float) -> None:
        self._expect(parameter, name, values.shape)
        self.tied.check(name, parameter)
        if weight != 1:
            raise RefusedError(parameter, f"replaced as a whole by the adapter: weight {weight} has no meaning for it")
        if name in self.edits:
            raise RefusedError(parameter, "replaced by one adapter and changed by another")
        self._put(name, Replace(values), parameter)
        self._note_rounding(name, values)

    def _rows(self, target: str, name: str, ids: tuple[int, ...], values: np.ndarray, weight: float) -> None:
        shape = self.tensors[name].shape
        if len(shape) != 2 or values.shape[1:] != shape[1:] or not all(0 <= row < shape[0] for row in ids):
            raise RefusedError(target, f"rows {values.shape} up to {max(ids, default=0)} do not fit the base's {name} {shape}")
        if weight != 1:
            raise RefusedError(target, f"rows replaced by the adapter: weight {weight} has no meaning for them")
        if name in self.edits:
            raise RefusedError(target, "rows are replaced in a table that is changed otherwise as well")
        self._put(name, SetRows(ids, values), target)
        self._note_rounding(name, values)

    def _note_rounding(self, name: str, values: np.ndarray) -> None:
        dtype = dtypes.NUMPY[self.tensors[name].dtype]
        if dtype.itemsize < values.dtype.itemsize or (dtype != values.dtype and dtype.itemsize == 2):
            self.notes.append(f"{name}: replaced values are rounded from {values.dtype} to the base's {dtype}")

    def _put(self, name: str, edit: Edit, target: str) -> None:
        if not computable(dtypes.NUMPY.get(self.tensors[name].dtype)):
            raise RefusedError(
                target,
                f"the base's {name} is {self.tensors[name].dtype}, not bfloat16, float16 or float32",
                "Dequantise it first",
            )
        before = self.edits.setdefault(name, [])
        if any(isinstance(other, Replace | SetRows | AddDora) for other in before):
            raise RefusedError(target, "one adapter replaces or rescales it and another changes it too")
        before.append(edit)

    def _expect(self, target: str, name: str, shape: tuple[int, ...]) -> None:
        have = self.tensors[name].shape
        if tuple(shape) != have:
            hint = "The adapter was trained after the vocabulary was resized" if have[1:] == tuple(shape)[1:] else ""
            raise RefusedError(target, f"changes a weight of shape {tuple(shape)}, the base's {name} is {have}", hint)

    def _transposed(self, target: str, name: str, delta: LowRank) -> bool:
        """Whether the base stores this weight `(in, out)`. Shapes decide; for a square one, what transformers builds."""
        have = self.tensors[name].shape
        model = self.spec.model_type or "this model"
        known = self.spec.model_type in _CONV1D and target.rpartition(".")[2] in _CONV1D_NAMES
        if known or (delta.transposed_base and have == delta.shape[::-1] != delta.shape):
            self._expect(target, name, delta.shape[::-1])
            return True
        self._expect(target, name, delta.shape)
        if delta.transposed_base and have[0] == have[1]:
            raise RefusedError(
                target,
                f"square, and fan_in_fan_out is set, but {model} isn't known to store it transposed",
                "Set fan_in_fan_out to false in adapter_config.json if it does not",
            )
        return False


class _Names:
    """From an adapter's names to the base's: the same, or one leading component more or less, the same for all.

    `GPT2LMHeadModel` calls its blocks `transformer.h…`, and its published checkpoint `h…`; transformers adds what is
    missing when it loads (`base_model_prefix`), and so the adapter has it.
    """

    def __init__(self, spec: BaseSpec, tensors: Mapping[str, TensorInfo], adapter: Adapter) -> None:
        self._tensors = tensors
        self._where = spec.where
        stems = {f"{target}.weight" for target in (*adapter.deltas, *adapter.rows)} | set(adapter.replaced)
        missing = sorted(stem for stem in stems if stem not in tensors)
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
            raise RefusedError(first, f"not in the base {self._where}", "Is this the model the adapter was trained on?")
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
        stem = name.rpartition(".")[0] + ".weight"
        new = self._rename.get(name) or self._rename.get(stem, stem).rpartition(".")[0] + "." + name.rpartition(".")[2]
        if new not in self._tensors:
            raise RefusedError(name.rpartition(".")[0], why)
        return new


class _Tied:
    """Whether the output layer is the embedding table, so that changing one would change the other."""

    def __init__(self, spec: BaseSpec, tensors: Mapping[str, TensorInfo], shards: Sequence[Shard]) -> None:
        self._vocabulary = spec.config.get("vocab_size")
        self._tensors = tensors
        head = next((name for name in tensors if name.endswith(("lm_head.weight", "embed_out.weight"))), None)
        self._tied = spec.tied or (head is None and spec.architecture.endswith(_HEADED))
        if head and "tie_word_embeddings" not in spec.config:
            # Silent and both stored: transformers goes by the class's default; equal bytes settle it.
            self._tied = self._same_bytes(head, shards)

    def _same_bytes(self, head: str, shards: Sequence[Shard]) -> bool:
        shape = self._tensors[head].shape
        tables = [(s.path, t) for s in shards for t in s.tensors.values() if t.shape == shape]
        mine = next(entry for entry in tables if entry[1].name == head)
        return any(_equal(mine, other) for other in tables if other[1].name != head)

    def check(self, name: str, target: str) -> None:
        """Refuse a change to a table that serves twice; rows are exempt, as peft replaces them in both places."""
        if self._tied and self._is_table(name):
            raise RefusedError(
                target,
                f"the base's embedding and output layer are one tensor ({name}); merged, the change would act in both places",
                "Untie them in the base first (tie_word_embeddings: false, with an lm_head.weight of its own)",
            )

    def _is_table(self, name: str) -> bool:
        shape = self._tensors[name].shape
        in_a_layer = any(part.isdigit() for part in name.split("."))
        return len(shape) == 2 and shape[0] == self._vocabulary and not in_a_layer


def _equal(one: tuple[Path, TensorInfo], two: tuple[Path, TensorInfo]) -> bool:
    if one[1].size != two[1].size:
        return False
    with open(one[0], "rb") as a, open(two[0], "rb") as b:
        a.seek(one[1].offset)
        b.seek(two[1].offset)
        left = one[1].size
        while left:
            count = min(left, 1 << 20)
            if a.read(count) != b.read(count):
                return False
            left -= count
    return True
