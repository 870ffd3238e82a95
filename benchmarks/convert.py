"""PEFT to GGUF: our conversion against llama.cpp's own `convert_lora_to_gguf.py`, whole processes in turn.

    python benchmarks/convert.py [--model 8b] [--llama-cpp CHECKOUT] [--runs 5] [--rank 16]

The adapter is made on the spot: random factors in bfloat16 on every linear module of a model of the shape of Llama 3 8B
(84 MB) or SmolLM2-135M. Ours is `adapterhub convert` as it is typed. llama.cpp comes from a checkout you name or from the
source distribution of `llama-cpp-python` on PyPI, downloaded once (77 MB, nothing is compiled). The tensors of both files
are compared: the time of a wrong answer would be no time at all. The floor is `cp` of the same bytes and a sync.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas"), str(ROOT / "benchmarks")]

from _models import linear  # noqa: E402
from _pairs import Run, compare, median, timed  # noqa: E402

from adapterhub_converters import dtypes  # noqa: E402
from adapterhub_converters.containers import safetensors_file  # noqa: E402
from adapterhub_converters.containers.gguf_file import GGUFFile  # noqa: E402
from adapterhub_converters.formats import peft  # noqa: E402
from tests.support import llama_cpp_scripts  # noqa: E402

COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-05, "hidden_act": "silu"}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
OURS = ["-m", "adapterhub", "convert"]


def make(folder: Path, rank: int, model: str) -> tuple[Path, Path]:
    """An adapter in a PEFT folder and its base, of which both converters need the config alone."""
    base, adapter, config = folder / "base", folder / "adapter", MODELS[model]
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(COMMON | config))
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        for path, (rows, columns) in linear(config).items():
            stem = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32).astype(dtypes.BF16)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(rows, rank)).astype(np.float32).astype(dtypes.BF16)
    safetensors_file.write(adapter / peft.WEIGHTS, tensors, {"format": "pt"})
    targets = sorted(path.split(".")[1] for path in linear(config))
    text = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (adapter / peft.CONFIG).write_text(json.dumps(text))
    return adapter, base


def floor(source: Path, target: Path, runs: int) -> float:
    """Seconds of `cp` and a sync of the copy, the median."""
    times = []
    for _ in range(runs):
        target.unlink(missing_ok=True)
        start = time.perf_counter()
        subprocess.run(["cp", str(source), str(target)], check=True)
        with open(target, "rb") as file:
            os.fsync(file.fileno())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def start_up(env: dict[str, str], runs: int) -> Run:
    """What a conversion costs that has nothing to convert: imports, the command line."""
    code = "import adapterhub.cli.main, adapterhub.cli.commands.convert, adapterhub_converters.formats.convert"
    done = [timed([sys.executable, "-c", code], env=env) for _ in range(runs)]
    return replace(median(done), bytes=max(run.bytes for run in done))


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
    parser.add_argument("--model", choices=sorted(MODELS), default="8b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    script = (options.llama_cpp or llama_cpp_scripts.downloaded()) / "convert_lora_to_gguf.py"
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "schemas"))), "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: Linux counts a parent's memory at the fork as the child's peak.
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            adapter, base = pool.apply(make, (folder, options.rank, options.model))
        ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
        size = (adapter / peft.WEIGHTS).stat().st_size
        pair = compare(
            [sys.executable, *OURS, str(adapter), str(ours), "--to", "gguf", "--base", str(base)],
            [sys.executable, str(script), "--base", str(base), "--outtype", "bf16", "--outfile", str(theirs), str(adapter)],
            options.runs,
            title=f"PEFT to GGUF, {options.model}, all linear modules, r={options.rank}, bf16, {size / 1e6:.1f} MB",
            env=env,
            fresh=(ours, theirs),
        )
        with context.Pool(1) as pool:
            pool.apply(assert_same, (ours, theirs))
        print("the tensors of both files are identical")
        start, copied = start_up(env, options.runs), floor(adapter / peft.WEIGHTS, folder / "copy", options.runs)
        work = pair.ours.seconds - start.seconds
        print(f"start-up {start.seconds:.3f} s, {start.bytes / 1e6:.1f} MB; cp and sync {copied:.3f} s")
        print(f"ours without start-up: {work:.3f} s, {work / copied:.1f} times cp and sync")
        print(f"memory beyond the imports: {(pair.ours.bytes - start.bytes) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
