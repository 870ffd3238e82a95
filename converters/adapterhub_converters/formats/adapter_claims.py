"""The claims of an adapter of an unknown kind: its header and config, for a registry that keeps it unchanged.

No reader returns such an adapter, so nothing computes with it. Readers raise `NotUnderstoodError`; code that only stores,
describes or checks the files learns here what can be said about them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter import Meta
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, MLX_WEIGHTS, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.containers.safetensors_header import TensorKind
from adapterhub_converters.errors import NotFoundError, NotUnderstoodError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import FORMATS, peft

OTHER = "other"
"""The format, and the method, of an adapter whose config names none that is known."""
_METHOD_NAME = safe_regex.Pattern(r"[a-z0-9][a-z0-9_-]{0,39}")
_MAX_CLAIM = 1 << 20  # a rank or an alpha beyond it is no claim worth repeating


@dataclass(frozen=True)
class AdapterClaims:
    """The properties that an adapter claims to have.

    Attributes:
        format: The format of its files, as far as it can be recognized without reading them.
        reason: Why it cannot be read.
        method: The kind of adapter according to its config or its tensor names; `other` if neither tells.
        r: The rank according to its config; None if there is none.
        alpha: The alpha according to its config; None if there is none.
        targets: The last components of the module names in its config, sorted.
        dtype: As in a manifest.
        parameters: The number of elements of all tensors.
        meta: The base model and the task according to its config.
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
    """Return the weights files of an adapter in any format."""
    if path.is_file():
        return [path]
    if (path / MLX_WEIGHTS).is_file() and not (path / peft.WEIGHTS).is_file():
        return [path / MLX_WEIGHTS]
    if (path / peft.WEIGHTS).is_file() or (path / peft.INDEX).is_file():
        return peft.weight_files(path)
    files = sorted(item for item in path.iterdir() if is_weights(item.name) and item.is_file())
    # With several files, nothing says which of them is the adapter.
    if len(files) != 1:
        raise NotFoundError(str(path), f"there are {len(files)} files with weights, and its config does not name one of them")
    return files


def is_foreign(path: Path) -> bool:
    """Return whether a folder, whose config names no kind of adapter, has weights without any name typical of a known kind."""
    try:
        names = [name.lower() for file in weight_files(path) for name in _tensor_kinds(file)]
    except (NotFoundError, RefusedError):
        return False
    return bool(names) and not any(mark in name for name in names for mark in ("lora", "hada_", "lokr_", "vera_"))


def read(path: Path, error: NotUnderstoodError) -> AdapterClaims:
    """Describe the adapter at `path`, which readers reject with `error`, from its headers and its config.

    Raises:
        FormatError: A file is malformed.
    """
    files = weight_files(path)
    kinds = {name: kind for file in files for name, kind in _tensor_kinds(file).items()}
    dtypes = {kind.dtype for kind in kinds.values()}
    if files[0].suffix == ".gguf":
        claims = _gguf_claims(files[0], kinds)
    else:
        claims = _config_claims(path, kinds)
        if claims["format"] in ("kohya", "diffusers"):
            claims["meta"] = _header_meta(files[0], claims["meta"])
    return AdapterClaims(
        reason=error.what,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        parameters=sum(math.prod(kind.shape) for kind in kinds.values()),
        **claims,
    )


def _tensor_kinds(file: Path) -> dict[str, TensorKind]:
    if file.suffix == ".gguf":
        from adapterhub_converters.containers import gguf_file  # late: PEFT's folders do without it

        with gguf_file.GGUFFile(file) as gguf:
            return {name: TensorKind(info.type_name, info.shape, info.size) for name, info in gguf.tensors.items()}
    with SafetensorsFile(file) as opened:
        return dict(zip(opened.header.names, opened.header.kinds, strict=True))


def _config_claims(path: Path, kinds: Mapping[str, TensorKind]) -> dict[str, Any]:
    """Return the claims of an `adapter_config.json`, or of the header of a single file."""
    text = json_file.read_text(path / ADAPTER_CONFIG) if (path / ADAPTER_CONFIG).is_file() else ""
    config = json_file.parse_object(text, str(path / ADAPTER_CONFIG)) if text else {}
    config_format = "peft" if "peft_type" in config else "mlx" if "fine_tune_type" in config else OTHER
    # LoRA calls it `lora_alpha`, LoHa and LoKr call it `alpha`.
    alpha = config.get("lora_alpha", config.get("alpha"))
    targets = config.get("target_modules")
    return {
        "format": config_format if config else _format_by_tensor_names(kinds),
        "method": _method(config.get("peft_type") or config.get("fine_tune_type")) or _method_by_tensor_names(kinds),
        "r": r if _is_number(r := config.get("r")) and isinstance(r, int) else None,
        "alpha": alpha if _is_number(alpha) else None,
        "targets": tuple(sorted({str(target).rpartition(".")[2] for target in targets})) if isinstance(targets, list) else (),
        "meta": Meta(
            base_model=_nonempty_text(config.get("base_model_name_or_path")) or _nonempty_text(config.get("model")),
            revision=_nonempty_text(config.get("revision")),
            task_type=_nonempty_text(config.get("task_type")),
        ),
    }


def _header_meta(file: Path, meta: Meta) -> Meta:
    """Return `meta` completed from the header of an image model's adapter."""
    with SafetensorsFile(file) as opened:
        described: Meta = FORMATS["kohya"].implementation.describe_header(meta, opened.header.metadata)
        return described


def _gguf_claims(file: Path, kinds: Mapping[str, TensorKind]) -> dict[str, Any]:
    from adapterhub_converters.containers import gguf_file  # late, as in `_tensor_kinds`

    with gguf_file.GGUFFile(file) as gguf:
        header = gguf.header
    alpha = float(header.metadata.get("adapter.lora.alpha") or 0)
    # One file can have several ranks; the most frequent is reported, and the larger of two equally frequent ones.
    ranks = Counter(kind.shape[-1] for name, kind in kinds.items() if name.endswith(".lora_b") and kind.shape)
    stems = {name.partition(".weight")[0].rpartition(".")[2] for name in kinds}
    r = max(ranks, key=lambda rank: (ranks[rank], rank), default=None)
    return {
        "format": "gguf",
        "method": _method(header.text("adapter.type")) or OTHER,
        "r": r,
        "alpha": alpha if _is_number(alpha) else None,
        "targets": tuple(sorted(stems)),
        "meta": Meta(base_model=_nonempty_text(header.text("general.base_model.0.name"))),
    }


def _method(value: object) -> str:
    name = value.lower() if isinstance(value, str) else ""
    return name if _METHOD_NAME.fullmatch(name) else ""


def _format_by_tensor_names(kinds: Mapping[str, TensorKind]) -> str:
    """Return `diffusers` for names with `lora_A` and `lora_B` as diffusers writes them, `kohya` for any other."""
    return "diffusers" if any(".lora_A" in name or ".lora.down" in name for name in kinds) else "kohya"


def _method_by_tensor_names(kinds: Mapping[str, TensorKind]) -> str:
    marks = {
        ".hada_": "loha", ".lokr_": "lokr", ".oft_blocks": "oft", ".oft_diag": "oft", ".a1.weight": "glora", ".on_input": "ia3",
        ".lambda_layer": "tlora", ".lora": "lora",
    }  # fmt: skip
    return next((method for mark, method in marks.items() if any(mark in name for name in kinds)), OTHER)


def _is_number(value: object) -> bool:
    return json_file.is_number(value) and 0 < value <= _MAX_CLAIM


def _nonempty_text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
