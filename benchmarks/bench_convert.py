"""PEFT to GGUF: our conversion against llama.cpp's own `convert_lora_to_gguf.py`, whole processes in turn.

    python benchmarks/bench_convert.py [--llama-cpp CHECKOUT] [--runs 5] [--rank 16]

The adapter is made on the spot: random factors on every linear module of SmolLM2-135M. llama.cpp comes from a checkout
you name or from the source distribution of `llama-cpp-python` on PyPI, downloaded once (77 MB, nothing is compiled).
Both write float32, and the tensors of both files are compared: the time of a wrong answer would be no time at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas"), str(ROOT / "benchmarks")]

from _pairs import compare  # noqa: E402

from adapterhub_converters import peft, safetensors_file  # noqa: E402
from adapterhub_converters.gguf_file import GGUFFile  # noqa: E402
from tests import llama_cpp_scripts  # noqa: E402

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "tie_word_embeddings": True,
    "hidden_act": "silu",
}  # fmt: skip
# Path in a layer to (out_features, in_features).
LINEAR = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
}  # fmt: skip
OURS = """
import sys
from pathlib import Path
from adapterhub_converters import base, formats
src, dst, model = map(Path, sys.argv[1:])
formats.convert(src, dst, to="gguf", base=base.read_base(model))
"""


def make(folder: Path, rank: int) -> tuple[Path, Path]:
    """An adapter in a PEFT folder and its base, of which both converters need the config alone."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(SMOLLM2))
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(SMOLLM2["num_hidden_layers"]):  # type: ignore[call-overload]
        for path, (rows, columns) in LINEAR.items():
            stem = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(rows, rank)).astype(np.float32)
    safetensors_file.write(adapter / peft.WEIGHTS, tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(p.split(".")[1] for p in LINEAR)}
    (adapter / peft.CONFIG).write_text(json.dumps(config))
    return adapter, base


def assert_same(ours: Path, theirs: Path) -> None:
    """Both files hold the same tensors and alpha."""
    with GGUFFile(ours) as one, GGUFFile(theirs) as other:
        assert set(one.tensors) == set(other.tensors)
        for name in one.tensors:
            assert np.array_equal(one.tensor(name), other.tensor(name)), name
        assert one.header.metadata["adapter.lora.alpha"] == other.header.metadata["adapter.lora.alpha"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, help="a checkout, or an unpacked llama-cpp-python's vendor/llama.cpp")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    script = (options.llama_cpp or llama_cpp_scripts.downloaded()) / "convert_lora_to_gguf.py"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter, base = make(folder, options.rank)
        ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
        compare(
            [sys.executable, "-c", OURS, str(adapter), str(ours), str(base)],
            [sys.executable, str(script), "--base", str(base), "--outfile", str(theirs), str(adapter)],
            options.runs,
            title=f"PEFT to GGUF, SmolLM2-135M, all linear modules, r={options.rank}",
            env={"PYTHONPATH": str(ROOT / "converters"), "OMP_NUM_THREADS": "2"},
            fresh=(ours, theirs),
        )
        assert_same(ours, theirs)
        print("the tensors of both files are identical")


if __name__ == "__main__":
    main()
