"""What each format supports, found by experiment: a tiny adapter is written, read, and converted to all others and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.adapter_files import adapter_in
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import AdapterhubError, RefusedError

from . import FORMATS, PACKAGES, WRITTEN, convert, peft
from .round_trips import BYTES, FUNCTION, NAME, NO, Row

T = TypeVar("T")
_LLAMA = {
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.self_attn.k_proj": (4, 8),
    "model.layers.0.mlp.down_proj": (8, 12),
    "lm_head": (16, 8),
}
_FLUX = {"transformer_blocks.0.attn.to_out.0": (8, 8), "transformer_blocks.0.ff.net.2": (8, 32)}
_OF_IMAGES = ("kohya", "diffusers")  # formats of adapters of image models


def tried() -> list[Row]:
    """A row for each format, tried with an ordinary adapter of a Llama, or of FLUX.1 for formats of image models."""
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        return _Probe(Path(temporary)).rows()


def _adapter(shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    rng = np.random.default_rng(0)
    return Adapter({
        target: LowRank(
            rng.normal(size=(2, into)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32), 4.0
        )
        for target, (out, into) in shapes.items()
    })  # fmt: skip


def _base(*names: str) -> BaseSpec:
    if any(name in _OF_IMAGES for name in names):
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
        (folder / "tinker").mkdir()
        tensors = {name.replace("lm_head", "model.unembed_tokens"): array for name, array in _tensors(folder / "llama")}
        safetensors_file.write(folder / "tinker" / peft.WEIGHTS, tensors)
        json_file.write_text(folder / "tinker" / peft.CONFIG, '{"r": 2, "lora_alpha": 4}')
        self._names = (*WRITTEN, *PACKAGES)

    def rows(self) -> list[Row]:
        return [self._row(name) for name in (*FORMATS, *PACKAGES)]

    def _row(self, name: str) -> Row:
        written = name in self._names
        path = self._made(name) if written else self._folder / name
        files = () if path is None else (f"{NAME}{path.suffix}",) if path.is_file() else tuple(sorted(_contents(path)))
        reads = path is not None and _or_none(lambda: convert.read(adapter_in(path), base=_base(name))) is not None
        back = {other: self._back(name, other) for other in self._names if other != name and written}
        return Row(name, files, reads, written and path is not None, written and self._needs_base(name), back)

    def _made(self, name: str, *others: str) -> Path | None:
        """A file of this format with an adapter that the others can express too."""
        base = _base(name, *others)
        source = self._folder / ("llama" if base.model_type else "flux")
        return _or_none(lambda: self._written(source, name, base))

    def _needs_base(self, name: str) -> bool:
        try:
            self._written(self._folder / ("llama" if _base(name).model_type else "flux"), name, None)
        except RefusedError as error:
            return error.code == "base-required"
        return False

    def _back(self, name: str, other: str) -> str:
        base, path = _base(name, other), self._made(name, other)
        there = None if path is None else _or_none(lambda: self._written(adapter_in(path), other, base))
        again = None if there is None else _or_none(lambda: self._written(adapter_in(there), name, base))
        if path is None or again is None:
            return NO
        return BYTES if _contents(again) == _contents(path) else FUNCTION if _same(path, again, base) else NO

    def _written(self, source: Path, to: str, base: BaseSpec | None) -> Path:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        target = folder / f"{NAME}{FORMATS[to].suffix if to in FORMATS else ''}"
        model = "a-tiny-llama" if to in PACKAGES else None
        convert.convert(source, target, to=to, base=base, model=model)
        return target


def _tensors(folder: Path) -> list[tuple[str, np.ndarray]]:
    with safetensors_file.SafetensorsFile(folder / peft.WEIGHTS) as file:
        return [(name, file.tensor(name)) for name in file.tensors]


def _contents(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def _same(one: Path, other: Path, base: BaseSpec) -> bool:
    found, wanted = (convert.read(adapter_in(path), base=base) for path in (one, other))
    return {t: _dense(d) for t, d in found.deltas.items()} == {t: _dense(d) for t, d in wanted.deltas.items()}


def _dense(delta: object) -> bytes | None:
    if not isinstance(delta, LowRank):
        return None
    product: np.ndarray = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A
    return product.round(5).tobytes()


def _or_none(make: Callable[[], T]) -> T | None:
    try:
        return make()
    except AdapterhubError:
        return None
