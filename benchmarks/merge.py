"""`fuse` against peft's `merge_and_unload` + `save_pretrained`, each as a whole process on the same base and adapter.

    python benchmarks/merge.py [--hidden 2048 --layers 22] [--runs 3] [--dir DIR]
    python benchmarks/merge.py --combine [--side 4096] [--rank 16] [--threads 2] [--runs 3]

The base is a random Llama in bfloat16 in shards of 1 GB, the adapter r = 16 on every linear layer; both are made once
in DIR. The two outputs are compared element by element at the end.

`--combine`: two adapters of one square module into one of their rank, by `svd` and by `ties` (density 0.2), against peft's
`add_weighted_adapter` with `svd` and `ties_svd`. Timed inside the processes, as imports would drown it: the whole of
`combine`, its report included, and the call of theirs. The processes alternate; peak memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _pairs import compare, timed

ROOT = Path(__file__).parent.parent

MAKE = """
import sys, torch, peft
from transformers import LlamaConfig, LlamaForCausalLM
folder, hidden, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
                     num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512), tie_word_embeddings=False)
model = LlamaForCausalLM(config)
model.save_pretrained(folder + "/base", max_shard_size="1GB")
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data = torch.randn(parameter.shape, dtype=torch.float32) * 0.02
model.save_pretrained(folder + "/adapter")
"""

THEIRS = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
"""

OURS = """
import sys
from pathlib import Path
from adapterhub.merge import fuse
from adapterhub_converters import peft
base, adapter, out = map(Path, sys.argv[1:])
fuse([(peft.read(adapter), 1.0)], base, out)
"""


COMBINE_THEIRS = """
import json, resource, sys, time, torch, peft
side, rank, kind, runs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(int(sys.argv[5]))
model = torch.nn.Sequential(torch.nn.Linear(side, side, bias=False))
config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
model = peft.PeftModel(model, config, adapter_name="a")
model.add_adapter("b", config)
times = []
for run in range(runs):
    start = time.perf_counter(), time.process_time()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], f"c{run}", combination_type=kind, svd_rank=rank, density=0.2)
    times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
print(json.dumps([times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""

COMBINE_OURS = """
import json, resource, sys, time, numpy as np
from adapterhub.merge import combine
from adapterhub_converters.adapter import Adapter, LowRank
side, rank, method, runs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
random = np.random.default_rng(0)
def adapter():
    factors = [random.normal(size=shape).astype(np.float32) for shape in ((rank, side), (side, rank))]
    return Adapter({"0": LowRank(*factors, alpha=float(rank))})
adapters = [adapter(), adapter()]
times = []
for _ in range(runs):
    start = time.perf_counter(), time.process_time()
    combine(adapters, [1.0, 1.0], method=method)
    times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
print(json.dumps([times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def combined(side: int, rank: int, runs: int, threads: int, env: dict[str, str]) -> None:
    """Print medians, ratios and peak memory of both programs, for each method."""
    sides = str(side), str(rank)
    print(f"two adapters r = {rank} into one, a module of {side} x {side}, {threads} threads; median of {runs} rounds")
    columns = ("ours ms", "peft ms", "ratio", "CPU ratio", "ours MB", "peft MB")
    print("".join([" " * 6, *(column.rjust(11) for column in columns)]))
    for method, theirs, inner in (("svd", "svd", 20), ("ties", "ties_svd", 3)):
        rounds = []
        for _ in range(runs):
            ours_run = [sys.executable, "-c", COMBINE_OURS, *sides, method, str(inner)]
            theirs_run = [sys.executable, "-c", COMBINE_THEIRS, *sides, theirs, "1", str(threads)]
            rounds.append([_told(command, env) for command in (ours_run, theirs_run)])
        (wall, cpu, peak), (their_wall, their_cpu, their_peak) = (
            [statistics.median(values) for values in zip(*program, strict=True)] for program in zip(*rounds, strict=True)
        )
        ratios = f"{their_wall / wall:10.0f}x{their_cpu / cpu:10.0f}x"
        print(f"{method:6}{wall * 1e3:11.1f}{their_wall * 1e3:11.1f}{ratios}{peak / 1e6:11.0f}{their_peak / 1e6:11.0f}")


def _told(command: list[str], env: dict[str, str]) -> tuple[float, float, int]:
    """The medians of the seconds and the CPU seconds that a process measured, and its peak memory in bytes."""
    output = subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True, text=True).stdout
    times, peak = json.loads(output.splitlines()[-1])
    wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
    return wall, cpu, peak * (1 if sys.platform == "darwin" else 1024)


def differing(ours: Path, theirs: Path) -> tuple[int, int]:
    """Elements whose bits differ, and elements in all."""
    import numpy as np

    from adapterhub_converters.base import weight_files
    from adapterhub_converters.files.safetensors_file import SafetensorsFile

    where = {}
    for path in weight_files(theirs):
        with SafetensorsFile(path) as file:
            where |= dict.fromkeys(file.tensors, path)
    differ = total = 0
    for path in weight_files(ours):
        with SafetensorsFile(path) as file:
            for name in file.tensors:
                with SafetensorsFile(where[name]) as other:
                    one, two = file.tensor(name).view(np.uint16), other.tensor(name).view(np.uint16)
                differ += int(np.count_nonzero(one != two))
                total += one.size
    return differ, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "adapterhub-bench-merge")
    parser.add_argument("--combine", action="store_true")
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="of BLAS, for --combine")
    options = parser.parse_args()
    env = {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))}
    if options.combine:
        combined(
            options.side, options.rank, options.runs, options.threads, {**env, "OPENBLAS_NUM_THREADS": str(options.threads)}
        )
        return
    folder = options.dir / f"{options.hidden}x{options.layers}"
    if not (folder / "adapter").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", MAKE, folder, str(options.hidden), str(options.layers)], check=True)
    base, adapter = str(folder / "base"), str(folder / "adapter")
    outs = [folder / "ours", folder / "theirs"]
    ours = [sys.executable, "-c", OURS, base, adapter, str(outs[0])]
    theirs = [sys.executable, "-c", THEIRS, base, adapter, str(outs[1])]
    title = "merge r = 16 on all linear layers into a bfloat16 Llama"
    compare(ours, theirs, runs=options.runs, title=title, env=env, fresh=outs)
    shutil.rmtree(outs[0], ignore_errors=True)
    timed(ours, env=env)  # removed before peft's last run
    differ, total = differing(*outs)
    print(f"{differ} of {total:,} elements differ from peft's")
    for out in outs:
        shutil.rmtree(out)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "converters")]
    main()
