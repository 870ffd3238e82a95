"""What the tests of trainers' own formats share: tiny bases, adapters of each kind, and the claim that nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from adapterhub_converters.adapter import Adapter, LossReport, LowRank
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import FORMATS, convert, peft

CONFIG = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "vocab_size": 20,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24), "lm_head": (20, 16),
}  # fmt: skip
TARGETS = {f"model.layers.{n}.{kind}" if kind != "lm_head" else kind: s for n in (0, 1) for kind, s in SHAPES.items()}
Q, K, V, OUT, GATE, UP, DOWN = (f"model.layers.0.{kind}" for kind in SHAPES if kind != "lm_head")


def base(architecture: str = "LlamaForCausalLM", **fields: Any) -> BaseSpec:
    return BaseSpec("base", "hf", architecture, "", CONFIG | fields, repo="team/base")


LLAMA = base()


def delta(target: str = Q, *, r: int = 2, alpha: float = 4, seed: int = 0, dtype: Any = np.float32, **fields: Any) -> LowRank:
    rng = np.random.default_rng([seed, *target.encode()])
    out, into = TARGETS[target]
    lora_A, lora_B = (rng.normal(size=shape).astype(dtype) for shape in ((r, into), (out, r)))
    return LowRank(lora_A, lora_B, alpha, **fields)


def full(*kinds: str, **fields: Any) -> Adapter:
    """A delta on these kinds of module in both layers, on all kinds if none is named."""
    return Adapter({target: delta(target, **fields) for target in TARGETS if not kinds or target.endswith(kinds)})


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    """What each delta adds to its weight, `(out, in)`."""
    return {
        target: delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64)
        for target, delta in adapter.deltas.items()
        if isinstance(delta, LowRank)
    }


def assert_same(actual: Adapter, expected: Adapter, rtol: float = 1e-6) -> None:
    """The same function; a module that either lacks has a delta of zero there."""
    ours, theirs = dense(actual), dense(expected)
    largest = max(np.abs(array).max() for array in theirs.values())
    for target in sorted({*ours, *theirs}):
        zeros = np.zeros(TARGETS[target])
        first, their_product = ours.get(target, zeros), theirs.get(target, zeros)
        np.testing.assert_allclose(first, their_product, rtol=rtol, atol=max(rtol * largest, 1e-25), err_msg=target)


def folder(adapter: Adapter, path: Path) -> Path:
    """The adapter as peft has it."""
    path.mkdir()
    peft.write(adapter, path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(path.iterdir())} if path.is_dir() else {"": path.read_bytes()}


def there_and_back(adapter: Adapter, tmp: Path, to: str, spec: BaseSpec = LLAMA, **config: Any) -> LossReport:
    """From PEFT to `to` and back without a base, and there again: the bytes of either are those they were."""
    source = folder(adapter, tmp / "source")
    if config:
        text = json.dumps(json.loads((source / peft.CONFIG).read_text()) | config)
        (source / peft.CONFIG).write_text(text)
    report = convert.convert(source, tmp / "there", to=to, base=spec)
    convert.convert(tmp / "there", tmp / "back", to="peft")
    assert contents(tmp / "back") == contents(source)
    convert.convert(tmp / "back", tmp / "again", to=to, base=spec)
    assert contents(tmp / "again") == contents(tmp / "there")
    return report


def written(format_name: str, adapter: Adapter, path: Path, spec: BaseSpec = LLAMA) -> Path:
    """The adapter in a trainer's own format."""
    FORMATS[format_name].write(adapter, path, base=spec)
    return path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file."""
    with safetensors_file.SafetensorsFile(path) as file:
        return {name: file.tensor(name) for name in file.tensors}


def metadata_of(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file."""
    with safetensors_file.SafetensorsFile(path) as file:
        return dict(file.header.metadata)


def settings_of(path: Path) -> dict[str, Any]:
    """The trainer's settings that a file was written for."""
    document: dict[str, Any] = json.loads(metadata_of(path)["adapterhub.settings"])
    return document


def stripped(path: Path) -> Path:
    """The file as its trainer would have saved it, without anything of ours in its header."""
    plain = path.with_name(f"{path.name}.plain.safetensors")
    safetensors_file.write(plain, tensors_of(path), {"format": "pt"})
    return plain


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Any plain adapter: some modules, ranks, alphas and dtypes of their own."""
    targets = draw(st.lists(st.sampled_from(sorted(TARGETS)), min_size=1, max_size=6, unique=True))
    rslora = draw(st.booleans())
    return Adapter({
        target: delta(
            target,
            r=draw(st.sampled_from((1, 2, 3))),
            alpha=draw(st.sampled_from((0.0, 1.0, 2.5, 4.0, 8.0))),
            seed=draw(st.integers(0, 9)),
            dtype=draw(st.sampled_from((np.float32, np.float16))),
            rslora=rslora,
        )
        for target in targets
    })  # fmt: skip
