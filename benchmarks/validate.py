"""Does this adapter fit that base? `adapterhub validate` against loading it with peft, and the scan for NaNs against torch's.

    python benchmarks/validate.py [--runs 5] [--rank 16] [--scan-mb 1000]

The base has the shape of Llama 3 70B: an index and 30 shards of safetensors whose headers are real and whose weights are
holes in the file. The adapter is on every linear module. Ours is `adapterhub validate --base … --headers-only` as it is
typed; theirs builds the model without memory (transformers on the meta device) and loads the adapter with peft, which finds
what does not fit by failing. Both must find the same: a base one size smaller is tried as well, and has to be refused.
The scan reads an adapter in bfloat16 with real numbers in it, in memory, ours against `torch.isfinite(t).all()`, and as a
whole process with everything else that `adapterhub validate` does.
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
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas"), str(ROOT / "benchmarks")]

from _models import linear  # noqa: E402
from _pairs import compare, timed  # noqa: E402

from adapterhub.check import internal  # noqa: E402
from adapterhub_converters import dtypes  # noqa: E402
from adapterhub_converters.containers import safetensors_file  # noqa: E402
from adapterhub_converters.formats import peft  # noqa: E402

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 5e5, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
}  # fmt: skip
SHARDS = 30
_THEIRS = """
import sys, torch, transformers, peft
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, sys.argv[2])
"""


def weights(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model."""
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.{path}.weight": shape for path, shape in linear(config).items()}
        shapes |= {f"{stem}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 with a real header and a hole for its data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)


def make_base(folder: Path, config: dict[str, Any]) -> None:
    """A model of which only the headers are on the disk."""
    folder.mkdir()
    shapes = list(weights(config).items())
    size, place = -(-len(shapes) // SHARDS), {}
    for number in range(0, len(shapes), size):
        name = f"model-{number // size + 1:05}-of-{SHARDS:05}.safetensors"
        part = dict(shapes[number : number + size])
        sparse(folder / name, part)
        place |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps(config))


def factors(config: dict[str, Any], rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter on every linear module."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        for path, (out, into) in linear(config).items():
            stem = f"base_model.model.model.layers.{layer}.{path}"
            shapes |= {f"{stem}.lora_A.weight": (rank, into), f"{stem}.lora_B.weight": (out, rank)}
    return shapes


def make_adapter(folder: Path, config: dict[str, Any], rank: int, *, values: bool) -> None:
    """An adapter in a PEFT folder, of random numbers or of a hole."""
    folder.mkdir()
    shapes = factors(config, rank)
    if values:
        rng = np.random.default_rng(0)
        tensors = {n: rng.standard_normal(shape, dtype=np.float32).astype(dtypes.BF16) for n, shape in shapes.items()}
        safetensors_file.write(folder / peft.WEIGHTS, tensors, {"format": "pt"})
    else:
        sparse(folder / peft.WEIGHTS, shapes)
    targets = sorted(path.split(".")[1] for path in linear(config))
    text = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / peft.CONFIG).write_text(json.dumps(text))


def make(folder: Path, rank: int, megabytes: int) -> None:
    make_base(folder / "base", LLAMA_70B)
    make_base(folder / "smaller", LLAMA_70B | {"intermediate_size": 14336})
    make_adapter(folder / "adapter", LLAMA_70B, rank, values=False)
    one = sum(2 * int(np.prod(shape)) for shape in factors(LLAMA_70B, 1).values())
    make_adapter(folder / "full", LLAMA_70B, max(1, round(megabytes * 1e6 / one)), values=True)


def refused(command: list[str], env: dict[str, str], says: str) -> None:
    """The time of a wrong answer would be no time at all."""
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert says in done.stdout + done.stderr


def scan(folder: Path, runs: int) -> None:
    """Both scans over the same memory in turn."""
    import torch

    with safetensors_file.SafetensorsFile(folder / "full" / peft.WEIGHTS) as file:
        arrays = [file.tensor(name) for name in file.tensors]
    tensors = [torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) for array in arrays]
    size = sum(array.nbytes for array in arrays)
    ours, theirs, floor = [], [], []
    for _ in range(runs + 1):
        start = time.perf_counter()
        assert all(most < infinite for most, infinite in map(internal.largest_bits, arrays))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        theirs.append(time.perf_counter() - start)
        start = time.perf_counter()
        for array in arrays:
            array.reshape(-1).view(np.uint64).max()
        floor.append(time.perf_counter() - start)
    one, other, least = (statistics.median(times[1:]) for times in (ours, theirs, floor))
    print(f"scan of {size / 1e6:.0f} MB of bfloat16 for NaN, infinity and zero, median of {runs}")
    print(f"ours {one:.3f} s ({size / one / 1e9:.1f} GB/s); torch.isfinite(t).all() {other:.3f} s; ratio {other / one:.1f}x")
    print(f"the least, one maximum over 64-bit words: {least:.3f} s ({size / least / 1e9:.1f} GB/s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scan-mb", type=int, default=1000)
    options = parser.parse_args()
    # Bytecode is kept between runs, as it is for whatever is installed.
    env = {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "schemas"))),
        "HF_HUB_OFFLINE": "1",
    }
    ours, theirs = [sys.executable, "-m", "adapterhub", "validate"], [sys.executable, "-c", _THEIRS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: Linux counts a parent's memory at the fork as the child's peak.
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            pool.apply(make, (folder, options.rank, options.scan_mb))
        base, smaller, adapter = (str(folder / part) for part in ("base", "smaller", "adapter"))
        refused([*ours, adapter, "--base", smaller, "--headers-only"], env, "shape-mismatch")
        refused([*theirs, smaller, adapter], env, "size mismatch")
        compare(
            [*ours, adapter, "--base", base, "--headers-only"],
            [*theirs, base, adapter],
            options.runs,
            title=f"does it fit? Llama 3 70B, all linear modules, r={options.rank}",
            env=env,
        )
        whole = [timed([*ours, str(folder / "full"), "--base", base], env=env) for _ in range(options.runs)]
        seconds, memory = statistics.median(run.seconds for run in whole), max(run.bytes for run in whole)
        print(f"with every value of {options.scan_mb} MB read: {seconds:.3f} s, {memory / 1e6:.1f} MB")
        with context.Pool(1) as pool:
            pool.apply(scan, (folder, options.runs))


if __name__ == "__main__":
    main()
