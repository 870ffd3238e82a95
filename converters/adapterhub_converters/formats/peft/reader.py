"""A PEFT folder, or a config and tensors from elsewhere, to an `Adapter`.

Follows peft 0.21 where it computes (`tuners/lora`): the rank is what the tensors say, the scale comes from
`lora_alpha`, `alpha_pattern` and `use_rslora`. The config is `config`'s, the names of tensors `keys`',
experts `experts`'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import (
    AdaLora,
    Adapter,
    Delta,
    Hadamard,
    Kronecker,
    LowRank,
    LowRankConv,
    LowRankEmbedding,
    PooledLowRank,
    Rows,
    Source,
    StackedLowRank,
    Vera,
)
from adapterhub_converters.adapter_files import PEFT_INDEX, PEFT_WEIGHTS, pickled_weights
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, refused

from . import experts, quirks
from .config import CONFIG, Scales
from .config import check as check_config
from .config import meta as meta_of
from .keys import PREFIX, classify, cleaned
from .state_dict import What, tensor_names

WEIGHTS = PEFT_WEIGHTS
INDEX = PEFT_INDEX


def sniff(path: Path) -> bool:
    """Whether `path` is a folder that holds a PEFT adapter."""
    return config_of(path) is not None


def config_of(path: Path) -> str | None:
    """The text of the config of the PEFT adapter in a folder; None where there is no such adapter."""
    config = path / CONFIG
    if not config.is_file():
        return None
    text = json_file.read_text(config)
    # mlx-lm uses the same file name; only PEFT's has a `peft_type`.
    return text if '"peft_type"' in text else None


def nested(path: Path) -> str:
    """A hint that names the one folder in `path` that is a PEFT adapter, as trainers and hubs nest them; else empty."""
    found = sorted(item.name for item in path.iterdir() if (item / CONFIG).is_file()) if path.is_dir() else []
    return f"Did you mean {path / found[0]}?" if len(found) == 1 else ""


def read(path: Path, *, base: BaseSpec | None = None, mapped: bool = False) -> Adapter:
    """The adapter in a PEFT folder; a base is needed only where experts were saved by a peft before 0.19.

    `mapped`: its tensors are views of the files (`SafetensorsFile.mapped`) and not in memory of their own.
    """
    text, tensors, metadata = _config(path), {}, {}
    for file_path in weight_files(path):
        with safetensors_file.SafetensorsFile(file_path) as file:
            tensors.update({name: (file.mapped if mapped else file.tensor)(name) for name in file.tensors})
            metadata = file.header.metadata
    adapter = parse(text, tensors, metadata, where=str(path), base=base)
    return dataclasses.replace(adapter, notes=(*adapter.notes, *quirks.lengths(adapter)))


def read_shapes(path: Path, *, base: BaseSpec | None = None) -> Adapter:
    """Read the same from headers alone: every tensor has its shape and dtype, and zeros that take no memory."""
    text, headers = _config(path), {}
    for file_path in weight_files(path):
        with safetensors_file.SafetensorsFile(file_path) as file:
            headers[file_path] = file.header
    return parse_shapes(text, headers, where=str(path), base=base)


def parse_shapes(
    text: str, headers: Mapping[Path, safetensors_file.Header], *, where: str, base: BaseSpec | None = None
) -> Adapter:
    """As `read_shapes`, from the config's text and the header of every weights file, which the caller has read."""
    tensors: dict[str, np.ndarray] = {}
    metadata: Mapping[str, str] = {}
    for path, header in headers.items():
        for name, info in header.tensors.items():
            if info.dtype not in dtypes.NUMPY:
                raise FormatError(str(path), f"tensor {name!r}: {info.dtype} cannot be computed with")
            # One number seen through strides of 0.
            tensors[name] = np.broadcast_to(np.zeros((), dtypes.NUMPY[info.dtype]), info.shape)
        metadata = header.metadata
    return parse(text, tensors, metadata, where=where, base=base)


def _config(path: Path) -> str:
    if not (path / CONFIG).is_file():
        raise NotFoundError(str(path), f"not a PEFT adapter: there is no {CONFIG}", nested(path))
    return json_file.read_text(path / CONFIG)


def weight_files(path: Path) -> list[Path]:
    """The files with an adapter's weights: one, or the shards of an index, whose names cannot leave the folder."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        raise _no_weights(path)
    weight_map = json_file.read_object(path / INDEX).get("weight_map")
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in shards:
        if Path(name).name != name or not name.isprintable() or name in ("", ".", "..") or "\\" in name:
            raise FormatError(str(path / INDEX), f"shard name {name[:80]!r} is not a plain file name")
        if not (path / name).is_file():
            raise NotFoundError(str(path / name), "no such file, and the index names it")
    if not shards:
        raise FormatError(str(path / INDEX), "weight_map is not a map of tensor names to file names")
    return [path / name for name in shards]


def _no_weights(path: Path) -> Exception:
    pickles = pickled_weights(item.name for item in path.iterdir()) if path.is_dir() else []
    if pickles:
        return RefusedError(
            str(path / pickles[0]),
            "a pickle can run code when it is loaded",
            "Save the adapter again with safe_serialization=True",
        )
    return NotFoundError(str(path), f"not a PEFT adapter: there is no {WEIGHTS}")


def parse(
    text: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    where: str,
    base: BaseSpec | None = None,
    turned: frozenset[str] | None = None,
) -> Adapter:
    """The adapter that a config's text and the tensors of its weights file make together.

    `turned` names the stacks whose factors are in each other's place, where that is known already.
    """
    config = json_file.parse_object(text, f"{where}/{CONFIG}")
    files, notes = cleaned(tensors, f"{where}/{WEIGHTS}")
    files, wrapped = quirks.unwrapped(files, base)
    parts = _understood(config, {name: tensors[key] for name, key in files.items()}, where)
    quirks.refuse(config, parts.pairs, f"{where}/{WEIGHTS}")
    notes += [*wrapped, *quirks.notes(config, parts.pairs, base)]
    scales = Scales(config, f"{where}/{CONFIG}")
    reader = _Deltas(config, scales, f"{where}/{WEIGHTS}", base, turned)
    deltas = reader.all(parts.pairs, parts.shared)
    if parts.copies:
        notes.append(f"copies of the base's weights ride along: {', '.join(sorted(parts.copies))}")
    adapter = Adapter(
        deltas=deltas,
        replaced=parts.replaced,
        rows={target: _rows(target, values, config, where) for target, values in parts.rows.items()},
        meta=meta_of(config),
        notes=(*notes, *scales.notes, *scales.unused()),
        copies=parts.copies,
    )
    origin = {what: files[name] for what, name in reader.renamed(parts.names).items()}
    names = {name: origin[what] for what, name in tensor_names(adapter).items() if origin[what] != name}
    return dataclasses.replace(adapter, source=Source("peft", text, dict(metadata), names, frozenset(reader.turned)))


class _Parts:
    def __init__(self) -> None:
        self.pairs: dict[str, dict[str, np.ndarray]] = {}
        self.replaced: dict[str, np.ndarray] = {}
        self.rows: dict[str, np.ndarray] = {}
        self.copies: dict[str, np.ndarray] = {}
        self.shared: dict[str, np.ndarray] = {}
        self.names: dict[What, str] = {}


def _understood(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str) -> _Parts:
    """The tensors by what they are; one error for all keys of the config and all tensors that are not understood."""
    first: RefusedError | None = None
    try:
        check_config(config, f"{where}/{CONFIG}")
    except RefusedError as error:
        first = error
    try:
        parts = _sorted(tensors, f"{where}/{WEIGHTS}")
    except RefusedError as error:
        if first is None:
            raise
        raise refused(first.where, [*(first.items or (first.what,)), *(error.items or (error.what,))], first.hint) from error
    if first is not None:
        raise first
    return parts


def _sorted(tensors: Mapping[str, np.ndarray], where: str) -> _Parts:
    parts, reasons = _Parts(), []
    for key, tensor in tensors.items():
        kind, name, part = classify(key)
        parts.names[kind, name, part] = key
        single = {"rows": parts.rows, "replaced": parts.replaced, "copy": parts.copies, "shared": parts.shared}.get(kind)
        if kind == "pair":
            parts.pairs.setdefault(name, {})[part] = tensor
        elif single is not None:
            if name in single:
                raise RefusedError(where, f"two tensors for {name}, {key!r} is one of them")
            single[name] = tensor
        elif not key.startswith(PREFIX):
            reasons.append(f"tensor {key!r}: has no {PREFIX} before its name")
        else:
            reasons.append(f"tensor {key!r}: is of no kind that is read yet")
    if reasons:
        raise refused(where, reasons)
    return parts


class _Deltas:
    """Reads the deltas of one file."""

    def __init__(
        self, config: Mapping[str, Any], scales: Scales, where: str, base: BaseSpec | None, known: frozenset[str] | None
    ) -> None:
        self._config, self._scales, self._where, self._base, self._known = config, scales, where, base, known
        self._transposed = bool(config.get("fan_in_fan_out"))
        self.turned: set[str] = set()
        self._targets: dict[str, str] = {}
        self._shared: Mapping[str, np.ndarray] = {}

    def all(self, pairs: Mapping[str, dict[str, np.ndarray]], shared: Mapping[str, np.ndarray]) -> dict[str, Delta]:
        """Every target and its delta; `shared` are VeRA's projections."""
        self._shared = shared
        if self._config["peft_type"] == "VERA":
            self._check_projections(pairs)
        elif shared:
            raise RefusedError(
                self._where, f"base_model.{min(shared)} is of no kind that is read yet in another adapter than VeRA"
            )
        lora = [name for name, part in pairs.items() if set(part) == {"A", "B"}]
        self._targets = experts.targeted(self._config, lora, f"{self._where}")
        stacks = self._stacks(pairs)
        deltas: dict[str, Delta] = {}
        failed: list[RefusedError] = []
        for name, part in pairs.items():
            try:
                if name in self._targets and self._targets[name] in stacks:
                    deltas[self._targets[name]] = self._stack(self._targets[name], stacks)
                else:
                    deltas[name] = self._one(name, part)
            except RefusedError as error:
                failed.append(error)
        if failed:
            raise refused(failed[0].where, [error.what for error in failed], failed[0].hint, code=failed[0].code)
        return deltas

    def renamed(self, names: Mapping[What, str]) -> dict[What, str]:
        """The same with the targets that the adapter has for stacks."""
        return {(kind, self._targets.get(name, name), part): key for (kind, name, part), key in names.items()}

    def _stacks(self, pairs: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, experts.Halves]:
        stacks: dict[str, experts.Halves] = {}
        for name, target in list(self._targets.items()):
            rank = self._scales.rank(target)
            found = experts.halves(pairs[name]["A"], pairs[name]["B"], rank, target, self._where)
            if found.experts > 1:
                stacks[target] = found
            elif target.endswith(".weight") and not name.endswith(".base_layer"):
                del self._targets[name]  # a matrix: the weight of an ordinary module
            else:
                raise RefusedError(
                    self._where, f"{target}: one expert, or a matrix that is no module's weight, is not read yet"
                )
        return stacks

    def _stack(self, target: str, stacks: Mapping[str, experts.Halves]) -> StackedLowRank:
        version = self._config.get("peft_version")
        if self._known is not None:
            is_turned = target in self._known
        else:
            is_turned = experts.turned(target, stacks, version, self._base, self._where)
        if is_turned:
            self.turned.add(target)
        transposed = experts.transposed_base(is_turned, version, self._base)
        alpha, rslora = self._scales.alpha(target), self._scales.rslora
        return experts.stacked(stacks[target], alpha, rslora=rslora, is_turned=is_turned, transposed=transposed)

    def _one(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        kind = self._config["peft_type"]
        others = {"ADALORA": self._adalora, "LOHA": self._lycoris, "LOKR": self._lycoris, "VERA": self._vera}
        if kind in others:
            return others[kind](target, part)
        embedding = "embedding_A" in part or "embedding_B" in part
        a_name, b_name = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        foreign = set(part) - {a_name, b_name, "magnitude", "bias"}
        if foreign:
            raise RefusedError(self._where, f"{target}.{min(foreign)} is of no kind that is read yet in a LoRA adapter")
        self._need(target, part, {a_name: "lora_A", b_name: "lora_B"})
        lora_A, lora_B = part[a_name], part[b_name]
        self._check_shapes(target, lora_A, lora_B)
        self._scales.check_rank(target, lora_A.shape[0])
        alpha, rslora = self._scales.alpha(target), self._scales.rslora
        magnitude, bias = part.get("magnitude"), part.get("bias")
        if embedding:
            if bias is not None:
                raise RefusedError(self._where, f"{target}: a bias on an embedding is not read yet")
            return LowRankEmbedding(lora_A, lora_B, alpha, rslora, magnitude)
        if lora_A.ndim > 2:
            return LowRankConv(lora_A, lora_B, alpha, rslora, magnitude, bias)
        if self._config.get("use_qalora"):
            if magnitude is not None or bias is not None:
                raise RefusedError(self._where, f"{target}: QALoRA with DoRA or a bias is not read yet")
            return PooledLowRank(lora_A, lora_B, alpha, int(self._config.get("qalora_group_size") or 16), rslora)
        return LowRank(lora_A, lora_B, alpha, rslora, magnitude, bias, self._transposed)

    def _need(self, target: str, part: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        for name, tensor_name in names.items():
            if name not in part:
                raise FormatError(self._where, f"{target}: {tensor_name} is missing, its other half is there")

    def _check_shapes(self, target: str, lora_A: np.ndarray, lora_B: np.ndarray) -> None:
        if 0 in lora_A.shape or 0 in lora_B.shape:
            raise FormatError(self._where, f"{target}: an empty tensor, as ZeRO-3 saves when weights were not gathered")
        if lora_A.ndim != lora_B.ndim or lora_A.ndim not in (2, 3, 4, 5):
            raise FormatError(self._where, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} make no delta")
        if lora_A.shape[0] != lora_B.shape[1] or any(size != 1 for size in lora_B.shape[2:]):
            raise FormatError(self._where, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not share a rank")

    def _adalora(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        self._need(target, part, {name: name for name in ("lora_A", "lora_B", "lora_E")})
        lora_A, lora_B, lora_E = part["lora_A"], part["lora_B"], part["lora_E"]
        if len(part) > 3 or lora_A.ndim != 2:
            raise RefusedError(self._where, f"{target}: an AdaLoRA delta of {', '.join(sorted(part))} is not read yet")
        self._check_shapes(target, lora_A, lora_B)
        if lora_E.shape != (len(lora_A), 1):
            raise FormatError(self._where, f"{target}: lora_E {lora_E.shape} for a rank of {len(lora_A)}")
        return AdaLora(lora_A, lora_B, lora_E, self._scales.alpha(target), self._transposed)

    def _lycoris(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        kind = self._config["peft_type"]
        if not _makes_lycoris(kind, {name: tensor.shape for name, tensor in part.items()}):
            shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in sorted(part.items()))
            raise FormatError(self._where, f"{target}: {shapes} make no {kind} delta")
        alpha = self._scales.alpha(target)
        if kind == "LOHA":
            self._scales.check_rank(target, part["hada_w1_b"].shape[0])
            return Hadamard(dict(part), alpha)
        rank = self._scales.rank(target)
        if rank < 1:
            raise FormatError(self._where, f"{target}: a rank of {rank}")
        return Kronecker(dict(part), alpha, rank)

    def _check_projections(self, pairs: Mapping[str, object]) -> None:
        """Refuse a VeRA adapter whose projections are not in its file: torch's generator made them."""
        if not self._config.get("save_projection", True):
            there = "are in the file and peft makes others" if self._shared else "were not saved"
            hint = 'Set "save_projection" to true' if self._shared else "Save it again with save_projection=True"
            raise RefusedError(self._where, f"vera_A and vera_B {there}, from the random numbers of a seed", hint)
        for name in ("vera_A", "vera_B"):
            if name not in self._shared:
                raise FormatError(self._where, f"base_model.{name} is missing, and save_projection says that it is there")
        vera_A, vera_B = self._shared["vera_A"], self._shared["vera_B"]
        shapes = f"vera_A {vera_A.shape} and vera_B {vera_B.shape}"
        if vera_A.ndim != 2 or vera_B.ndim != 2 or vera_A.shape[0] != vera_B.shape[1] or 0 in (*vera_A.shape, *vera_B.shape):
            raise FormatError(self._where, f"{shapes} do not share a rank")
        if not pairs:
            raise FormatError(self._where, "projections and no module that uses them")

    def _vera(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        self._need(target, part, {name: name for name in ("vera_lambda_b", "vera_lambda_d")})
        lambda_b, lambda_d = part["vera_lambda_b"], part["vera_lambda_d"]
        vera_A, vera_B = self._shared["vera_A"], self._shared["vera_B"]
        if len(part) > 2:
            raise RefusedError(self._where, f"{target}: a VeRA delta of {', '.join(sorted(part))} is not read yet")
        if lambda_d.shape != (len(vera_A),) or lambda_b.ndim != 1 or not 0 < len(lambda_b) <= len(vera_B):
            what = f"vera_lambda_b {lambda_b.shape} and vera_lambda_d {lambda_d.shape}"
            raise FormatError(self._where, f"{target}: {what} do not fit vera_A {vera_A.shape} and vera_B {vera_B.shape}")
        self._scales.check_rank(target, len(lambda_d))
        width = self._width(target, len(lambda_b))
        known = width if width is not None and width <= vera_A.shape[1] else None
        return Vera(lambda_b, lambda_d, vera_A, vera_B, known, self._transposed)

    def _width(self, target: str, out_features: int) -> int | None:
        """How many features the base's module reads, if it is there and gives `out_features`."""
        tensors = self._base.tensors if self._base else {}
        # A base saved without its head lacks the first component.
        weight = tensors.get(f"{target}.weight") or tensors.get(f"{target.partition('.')[2]}.weight")
        shape = weight.shape[::-1] if weight and self._transposed else weight.shape if weight else ()
        return shape[1] if len(shape) == 2 and shape[0] == out_features else None


def _makes_lycoris(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors of a LoHa or LoKr module fit together."""
    if any(0 in shape or len(shape) < 2 for shape in shapes.values()):
        return False
    if kind == "LOHA":
        names = {f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"}
        cores = {"hada_t1", "hada_t2"} & set(shapes)
        if set(shapes) != names | cores or len(cores) == 1 or any(len(shapes[name]) != 2 for name in names):
            return False
        rank = shapes["hada_w1_b"][0]
        alike = all(shapes[f"hada_w1_{half}"] == shapes[f"hada_w2_{half}"] for half in "ab")
        return alike and shapes["hada_w1_a"][0 if cores else 1] == rank and all(shapes[c][:2] == (rank, rank) for c in cores)
    if len(shapes.get("lokr_w1", (0, 0))) != 2:
        return False
    return (
        _factor(shapes, "lokr_w1", None) and _factor(shapes, "lokr_w2", "lokr_t2") and all(n.startswith("lokr") for n in shapes)
    )


def _factor(shapes: Mapping[str, tuple[int, ...]], name: str, core: str | None) -> bool:
    """Whether a factor of a LoKr module is there whole, or as a pair of one rank, with a core that fits if it has one."""
    a, b = shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    if name in shapes:
        return a is None and b is None and (core is None or core not in shapes)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return False
    if core is None or core not in shapes:
        return a[1] == b[0]
    return len(shapes[core]) == 4 and shapes[core][:2] == (a[0], b[0])


def _rows(target: str, values: np.ndarray, config: Mapping[str, Any], where: str) -> Rows:
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, dict):
        ids = next((ids for key, ids in indices.items() if target == key or target.endswith("." + key)), None)
    else:
        ids = indices
    if values.ndim != 2:
        raise FormatError(f"{where}/{WEIGHTS}", f"{target}: rows of the shape {values.shape} are no table's")
    if not isinstance(ids, list) or len(ids) != len(values) or not all(isinstance(number, int) for number in ids):
        raise FormatError(f"{where}/{CONFIG}", f'"trainable_token_indices" does not name the {len(values)} rows of {target}')
    return Rows(tuple(ids), values)
