"""There and back without a base gives the same bytes, for adapters of any ranks, dtypes, patterns and bit patterns."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Loss
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import gguf_file, safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft
from tests.conftest import ROOT

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
BASE = BaseSpec("base", "hf", "LlamaForCausalLM", "llama", CONFIG)
MODULES = {
    "self_attn.q_proj": (16, 12), "self_attn.k_proj": (8, 12), "self_attn.v_proj": (8, 12), "mlp.up_proj": (20, 12),
    "mlp.down_proj": (12, 20),
}  # fmt: skip
DTYPES = {"F32": dtypes.F32, "F16": dtypes.F16, "BF16": dtypes.BF16}
WIDTH = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
# Zeros of both signs, subnormals, infinities, NaNs that say something.
ODD = {
    "F32": [0x80000000, 1, 0x80000001, 0x7F800000, 0x7FC00001, 0xFFC0BEEF, 0x7F800001],
    "F16": [0x8000, 1, 0x83FF, 0x7C00, 0x7E01, 0xFEEF, 0x7C01],
    "BF16": [0x8000, 1, 0x807F, 0x7F80, 0x7FC1, 0xFFEF, 0x7F81],
}


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def adapters(draw: st.DrawFn, *, scaled: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the config of a PEFT adapter; if `scaled`, with an alpha a module, and no odd numbers."""
    targets = draw(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from(sorted(MODULES))), min_size=1, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    r, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 5, 8, 16, 0.3]))
    for layer, path in targets:
        name = f"model.layers.{layer}.{path}"
        kind = draw(st.sampled_from(sorted(DTYPES)))
        rank = draw(st.sampled_from([r, r, draw(st.integers(1, 6))]))
        if rank != r:
            ranks[name.replace(".", r"\.")] = rank
        if scaled and draw(st.booleans()):
            alphas[name.replace(".", r"\.")] = draw(st.sampled_from([0.5, 3, 7, 1e-3, 1e4]))
        for half, shape in (("A", (rank, MODULES[path][1])), ("B", (MODULES[path][0], rank))):
            array = rng.normal(size=shape).astype(DTYPES[kind])
            if not scaled:
                flat = array.reshape(-1).view(WIDTH[kind])
                flat[: len(ODD[kind])] = np.array(ODD[kind], WIDTH[kind])[: len(flat)]
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = array
    config = {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": scaled and draw(st.booleans()), "rank_pattern": ranks,
        "alpha_pattern": alphas, "target_modules": sorted({path.rpartition(".")[2] for _, path in targets}),
    }  # fmt: skip
    return tensors, config


def save(path: Path, content: tuple[dict[str, np.ndarray], dict[str, Any]]) -> Path:
    path.mkdir()
    safetensors_file.write(path / peft.WEIGHTS, content[0], {"format": "pt"})
    (path / peft.CONFIG).write_text(json.dumps(content[1], indent=1))
    return path


def same(first: Path, second: Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in (peft.CONFIG, peft.WEIGHTS))


@pytest.mark.parametrize("to", ["gguf", "mlx", "raw"])
@settings(max_examples=40)
@given(content=adapters(scaled=True))
def test_there_and_back_is_byte_identical(to: str, content: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
    with folder() as path:
        source = save(path / "a", content)
        report = convert.convert(source, path / "b", to=to, base=BASE)
        convert.convert(path / "b", path / "c", to="peft")
        assert same(source, path / "c")
        assert report.worst <= (Loss.REWRITTEN if to == "mlx" else Loss.EXACT)
        before = (path / "b").read_bytes() if to != "mlx" else (path / "b" / "adapters.safetensors").read_bytes()
        convert.convert(path / "c", path / "d", to=to, base=BASE)
        after = (path / "d").read_bytes() if to != "mlx" else (path / "d" / "adapters.safetensors").read_bytes()
        assert before == after


@pytest.mark.parametrize("to", ["gguf", "mlx", "raw"])
@settings(max_examples=30)
@given(content=adapters(scaled=False))
def test_where_nothing_is_baked_every_bit_pattern_survives(
    to: str, content: tuple[dict[str, np.ndarray], dict[str, Any]]
) -> None:
    if to == "mlx":  # one scale a rank: with ranks that differ the factors differ too
        content[1]["rank_pattern"] = {}
        tensors = {name: a for name, a in content[0].items() if min(a.shape) == content[1]["r"]}
        whole = {name.rpartition(".lora_")[0] for name in tensors}
        tensors = {
            name: a for name, a in tensors.items() if all(f"{s}.lora_{h}.weight" in tensors for s in whole for h in "AB")
        }
        if not tensors:
            return
        content = tensors, content[1]
    with folder() as path:
        source = save(path / "a", content)
        report = convert.convert(source, path / "b", to=to, base=BASE)
        convert.convert(path / "b", path / "c", to="peft")
        assert same(source, path / "c")
        assert report.worst == Loss.EXACT


@settings(max_examples=50)
@given(content=adapters(scaled=True), factor=st.sampled_from([1e3, 6e4, 1e12]))
def test_a_float16_never_overflows(content: tuple[dict[str, np.ndarray], dict[str, Any]], factor: float) -> None:
    tensors, config = content
    config["alpha_pattern"] = {**config["alpha_pattern"], r"model\.layers\.0\..*": factor}
    with folder() as path:
        source = save(path / "a", (tensors, config))
        try:
            convert.convert(source, path / "b", to="gguf", base=BASE)
        except RefusedError:
            return  # beyond what float32 can hold: said, not written
        with gguf_file.GGUFFile(path / "b") as file:
            for name in file.tensors:
                assert np.isfinite(file.tensor(name).astype(np.float64)).all()


AGAIN = """
import hashlib, sys
from pathlib import Path
from adapterhub_converters.formats import convert as formats
from tests.converters.test_source_config import BASE
src, folder = map(Path, sys.argv[1:])
for to in ("gguf", "mlx", "raw"):
    dst = folder / to
    formats.convert(src, dst, to=to, base=BASE)
    files = sorted(dst.iterdir()) if dst.is_dir() else [dst]
    print(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
"""


def test_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.model.layers.{layer}.{path}.lora_{half}.weight": rng.normal(size=shape).astype(np.float16)
        for layer in (0, 1)
        for path, (out, into) in MODULES.items()
        for half, shape in (("A", (2 + layer, into)), ("B", (out, 2 + layer)))
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"layers.1.*": 3}, "alpha_pattern": {"k_proj": 5}}
    source = save(tmp_path / "a", (tensors, config | {"target_modules": sorted({p.rpartition(".")[2] for p in MODULES})}))
    outputs = set()
    for seed in ("0", "1", "4242"):
        (tmp_path / seed).mkdir()
        result = subprocess.run(
            [sys.executable, "-c", AGAIN, str(source), str(tmp_path / seed)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'converters'}:{ROOT / 'schemas'}", "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        outputs.add(result.stdout)
    assert len(outputs) == 1
    assert [len(line) for line in outputs.pop().split()] == [hashlib.sha256().digest_size * 2] * 3
