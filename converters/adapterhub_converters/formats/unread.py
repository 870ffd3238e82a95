"""An adapter of a kind that is not known here: its header and its config, for a registry that keeps it as it is.

No reader returns one, so that nothing computes with it: readers raise `NotUnderstoodError`, and code that only stores,
describes or checks the files asks here what can be told of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_converters import linear
from adapterhub_converters.adapter import Meta
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, MLX_WEIGHTS, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile, TensorKind
from adapterhub_converters.errors import NotFoundError, NotUnderstoodError, RefusedError

from . import peft

OTHER = "other"
"""The format, and the method, of an adapter whose config names none that is known."""
_NAME = linear.Pattern(r"[a-z0-9][a-z0-9_-]{0,39}")
_LARGEST = 1 << 20  # a rank or an alpha beyond it is no claim worth repeating


@dataclass(frozen=True)
class Unread:
    """What an adapter claims of itself.

    Attributes:
        format: The format of its files, as far as it can be recognized without reading them.
        reason: Why it cannot be read.
        method: The kind of adapter by its config or the names of its tensors; `other` if neither tells.
        r: The rank by its config, likewise `alpha`; None where it has none.
        targets: The last names of the modules by its config, sorted.
        dtype: As in a manifest.
        parameters: The number of elements of all tensors.
        meta: The base model and the task by its config.
    """

    format: str
    reason: str
    method: str
    r: int | None
    alpha: float | None
    targets: tuple[str, ...]
    dtype: str
    parameters: int
    meta: Meta


def weight_files(path: Path) -> list[Path]:
    """The files with the weights of an adapter in any format."""
    if path.is_file():
        return [path]
    if (path / MLX_WEIGHTS).is_file() and not (path / peft.WEIGHTS).is_file():
        return [path / MLX_WEIGHTS]
    if (path / peft.WEIGHTS).is_file() or (path / peft.INDEX).is_file():
        return peft.weight_files(path)
    found = sorted(item for item in path.iterdir() if is_weights(item.name) and item.is_file())
    if len(found) != 1:
        raise NotFoundError(str(path), f"there are {len(found)} files with weights, and its config does not name one of them")
    return found


def is_foreign(path: Path) -> bool:
    """Whether a folder whose config names no kind of adapter has weights, none of which is named as those of a known kind."""
    try:
        names = [name.lower() for file in weight_files(path) for name in _kinds(file)]
    except (NotFoundError, RefusedError):
        return False
    return bool(names) and not any(mark in name for name in names for mark in ("lora", "hada_", "lokr_", "vera_"))


def read(path: Path, error: NotUnderstoodError) -> Unread:
    """Describe the adapter at `path`, which no reader reads because of `error`, from its headers and its config.

    Raises:
        FormatError: A file is malformed.
    """
    files = weight_files(path)
    kinds = {name: kind for file in files for name, kind in _kinds(file).items()}
    dtypes = {kind.dtype for kind in kinds.values()}
    if files[0].suffix == ".gguf":
        claims = _of_gguf(files[0], kinds)
    else:
        claims = _of_config(path, kinds)
        if claims["format"] in ("kohya", "diffusers"):
            claims["meta"] = _of_header(files[0], claims["meta"])
    return Unread(
        reason=error.what,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        parameters=sum(math.prod(kind.shape) for kind in kinds.values()),
        **claims,
    )


def _kinds(file: Path) -> dict[str, TensorKind]:
    if file.suffix == ".gguf":
        from adapterhub_converters.containers import gguf_file  # late: PEFT's folders do without it

        with gguf_file.GGUFFile(file) as gguf:
            return {name: TensorKind(info.type_name, info.shape, info.size) for name, info in gguf.tensors.items()}
    with SafetensorsFile(file) as opened:
        return dict(zip(opened.header.names, opened.header.kinds, strict=True))


def _of_config(path: Path, kinds: Mapping[str, TensorKind]) -> dict[str, Any]:
    """The claims of an `adapter_config.json`, or of the header of a single file."""
    text = json_file.read_text(path / ADAPTER_CONFIG) if (path / ADAPTER_CONFIG).is_file() else ""
    config = json_file.parse_object(text, str(path / ADAPTER_CONFIG)) if text else {}
    named = "peft" if "peft_type" in config else "mlx" if "fine_tune_type" in config else OTHER
    alpha = config.get("lora_alpha", config.get("alpha"))
    targets = config.get("target_modules")
    return {
        "format": named if config else _by_names(kinds),
        "method": _method(config.get("peft_type") or config.get("fine_tune_type")) or _by_parts(kinds),
        "r": r if _is_number(r := config.get("r")) and isinstance(r, int) else None,
        "alpha": alpha if _is_number(alpha) else None,
        "targets": tuple(sorted({str(one).rpartition(".")[2] for one in targets})) if isinstance(targets, list) else (),
        "meta": Meta(
            base_model=_text(config.get("base_model_name_or_path")) or _text(config.get("model")),
            revision=_text(config.get("revision")),
            task_type=_text(config.get("task_type")),
        ),
    }


def _of_header(file: Path, meta: Meta) -> Meta:
    """The claims of the header of an image model's adapter."""
    from .image import origin  # late: few adapters are not understood

    with SafetensorsFile(file) as opened:
        return origin.described(meta, opened.header.metadata, "", ())


def _of_gguf(file: Path, kinds: Mapping[str, TensorKind]) -> dict[str, Any]:
    from adapterhub_converters.containers import gguf_file  # late, as in `_kinds`

    with gguf_file.GGUFFile(file) as gguf:
        header = gguf.header
    alpha = float(header.metadata.get("adapter.lora.alpha") or 0)
    ranks = Counter(kind.shape[-1] for name, kind in kinds.items() if name.endswith(".lora_b") and kind.shape)
    stems = {name.partition(".weight")[0].rpartition(".")[2] for name in kinds}
    r = max(ranks, key=lambda rank: (ranks[rank], rank), default=None)
    return {
        "format": "gguf",
        "method": _method(header.text("adapter.type")) or OTHER,
        "r": r,
        "alpha": alpha if _is_number(alpha) else None,
        "targets": tuple(sorted(stems)),
        "meta": Meta(base_model=_text(header.text("general.base_model.0.name"))),
    }


def _method(value: object) -> str:
    name = value.lower() if isinstance(value, str) else ""
    return name if _NAME.fullmatch(name) else ""


def _by_names(kinds: Mapping[str, TensorKind]) -> str:
    """diffusers' files have `lora_A` and `lora_B`, kohya's anything else."""
    return "diffusers" if any(".lora_A" in name or ".lora.down" in name for name in kinds) else "kohya"


def _by_parts(kinds: Mapping[str, TensorKind]) -> str:
    marks = {
        ".hada_": "loha", ".lokr_": "lokr", ".oft_blocks": "oft", ".oft_diag": "oft", ".a1.weight": "glora", ".on_input": "ia3",
        ".lambda_layer": "tlora", ".lora": "lora",
    }  # fmt: skip
    return next((method for mark, method in marks.items() if any(mark in name for name in kinds)), OTHER)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
