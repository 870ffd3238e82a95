"""What each format supports, found by experiment: a tiny adapter is written, read, and converted to every format and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.adapter_files import resolve_adapter
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import AdapterhubError, RefusedError

from . import FORMATS, PACKAGES, WRITTEN, Format, convert, find, peft
from .round_trips import BYTES, FUNCTION, NAME, NO, Row

T = TypeVar("T")
_LLAMA = {
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.self_attn.k_proj": (4, 8),
    "model.layers.0.mlp.down_proj": (8, 12),
    "lm_head": (16, 8),
}
_FLUX = {"transformer_blocks.0.attn.to_out.0": (8, 8), "transformer_blocks.0.ff.net.2": (8, 32)}
_IMAGE_FORMATS = ("kohya", "diffusers")  # formats of adapters of image models


def probe_formats() -> list[Row]:
    """Return a row for each format, tested with an adapter of a tiny Llama, or of FLUX.1 for formats of image models."""
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        return _Probe(Path(temporary)).rows()


def probe_added(row: Format) -> Row:
    """Return the row for a format of another package. What the sample cannot show, such as reading alone, is as it declares."""
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        probed = _Probe(Path(temporary)).row(row.name)
    return replace(probed, files=row.files or (f"{NAME}{row.suffix}",), reads=True, writes=row.writes)


def _adapter(shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    rng = np.random.default_rng(0)
    return Adapter({
        target: LowRank(
            rng.normal(size=(2, into)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32), 4.0
        )
        for target, (out, into) in shapes.items()
    })  # fmt: skip


def _base(*names: str) -> BaseSpec:
    if any(name in _IMAGE_FORMATS for name in names):
        return BaseSpec("a tiny FLUX.1", "hf", "FluxTransformer2DModel", "", {})
    config = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 2, "vocab_size": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    return BaseSpec("a tiny Llama", "hf", "LlamaForCausalLM", "llama", config)


class _Probe:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        for name, shapes in (("llama", _LLAMA), ("flux", _FLUX)):
            (folder / name).mkdir()
            peft.write(_adapter(shapes), folder / name)
        # Tinker's archives can only be read, so that a sample is made by hand.
        (folder / "tinker").mkdir()
        tensors = {name.replace("lm_head", "model.unembed_tokens"): array for name, array in _tensors(folder / "llama")}
        safetensors_file.write(folder / "tinker" / peft.WEIGHTS, tensors)
        json_file.write_text(folder / "tinker" / peft.CONFIG, '{"r": 2, "lora_alpha": 4}')
        self._names = (*WRITTEN, *PACKAGES)

    def rows(self) -> list[Row]:
        return [self.row(name) for name in (*FORMATS, *PACKAGES)]

    def row(self, name: str) -> Row:
        """Return the row for a format, from a sample of it."""
        is_writable = name in PACKAGES or find(name).writes
        path = self._write_sample(name) if is_writable else self._folder / name
        files = () if path is None else (f"{NAME}{path.suffix}",) if path.is_file() else tuple(sorted(_contents(path)))
        reads = (
            path is not None and _or_none_on_error(lambda: convert.read(resolve_adapter(path), base=_base(name))) is not None
        )
        back = {
            target_format: self._round_trip(name, target_format)
            for target_format in self._names
            if target_format != name and is_writable
        }
        return Row(name, files, reads, is_writable and path is not None, is_writable and self._needs_base(name), back)

    def _write_sample(self, name: str, *other_formats: str) -> Path | None:
        """Return a file of this format with an adapter that the other formats can express too; None if it cannot be written."""
        base = _base(name, *other_formats)
        source = self._folder / ("llama" if base.model_type else "flux")
        return _or_none_on_error(lambda: self._convert(source, name, base))

    def _needs_base(self, name: str) -> bool:
        try:
            self._convert(self._folder / ("llama" if _base(name).model_type else "flux"), name, None)
        except RefusedError as error:
            return error.code == "base-required"
        return False

    def _round_trip(self, name: str, other_format: str) -> str:
        base, path = _base(name, other_format), self._write_sample(name, other_format)
        converted = (
            None if path is None else _or_none_on_error(lambda: self._convert(resolve_adapter(path), other_format, base))
        )
        restored = (
            None if converted is None else _or_none_on_error(lambda: self._convert(resolve_adapter(converted), name, base))
        )
        if path is None or restored is None:
            return NO
        # Equal bytes are the stronger result; equal products of the factors are the weaker one.
        return BYTES if _contents(restored) == _contents(path) else FUNCTION if _computes_same(path, restored, base) else NO

    def _convert(self, source: Path, to: str, base: BaseSpec | None) -> Path:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        target = folder / f"{NAME}{'' if to in PACKAGES else find(to).suffix}"
        model = "a-tiny-llama" if to in PACKAGES else None
        convert.convert(source, target, to=to, base=base, model=model)
        return target


def _tensors(folder: Path) -> list[tuple[str, np.ndarray]]:
    with safetensors_file.SafetensorsFile(folder / peft.WEIGHTS) as file:
        return [(name, file.tensor(name)) for name in file.tensors]


def _contents(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def _computes_same(first_path: Path, second_path: Path, base: BaseSpec) -> bool:
    first, second = (convert.read(resolve_adapter(path), base=base) for path in (first_path, second_path))
    return {t: _dense(d) for t, d in first.deltas.items()} == {t: _dense(d) for t, d in second.deltas.items()}


def _dense(delta: object) -> bytes | None:
    if not isinstance(delta, LowRank):
        return None
    product: np.ndarray = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A
    return product.round(5).tobytes()


def _or_none_on_error(make: Callable[[], T]) -> T | None:
    try:
        return make()
    except AdapterhubError:
        return None
