"""`fuse` against peft, `cp` and mergekit, each as a whole process on the same base and adapters.

    python benchmarks/merge.py [--against peft cp] [--hidden 2048 --layers 22] [--runs 3] [--dir DIR]
    python benchmarks/merge.py --against mergekit --hidden 2048 --layers 22
    python benchmarks/merge.py --combine [--side 4096] [--rank 16] [--threads 2] [--runs 3]

The base is a random Llama in bfloat16 in shards of 1 GB, the adapters r = 16 on every linear layer; all are made once
in DIR. `2048 x 22` has 2.2 GB, with 88 layers 8 GB. The programs take turns, after a round that isn't counted.

peft: `merge_and_unload` and `save_pretrained`; the two outputs are compared element by element at the end.
cp: `cp` of the shards and `sync` of the copies: what any program that writes a model has to do.
mergekit: two adapters, `task_arithmetic` (python -m tests.mergekit_env installs it). Beside the peak of memory that of
the disk is said: all files that the program had at one time, without the model that it leaves.

`--combine`: two adapters of one square module into one of their rank, by `svd` and by `ties` (density 0.2), against peft's
`add_weighted_adapter` with `svd` and `ties_svd`. Timed inside the processes, as imports would drown it: the whole of
`combine`, its report included, and the call of theirs. The processes alternate; peak memory is the process's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from _pairs import Run, median, timed

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
for adapter in "ab":
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float32) * 0.02
    model.save_pretrained(folder + "/" + adapter)
"""

THEIRS = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
base, out, *adapters = sys.argv[1:]
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
for number, adapter in enumerate(adapters[1:], 1):
    model.load_adapter(adapter, adapter_name=str(number))
names = [str(number) for number in range(len(adapters))]
model.merge_and_unload(adapter_names=names).save_pretrained(out, max_shard_size="1GB")
"""

OURS = """
import sys
from pathlib import Path
from adapterhub.merge import fuse
from adapterhub_converters.formats import peft
base, out, *adapters = map(Path, sys.argv[1:])
fuse([(peft.read(adapter), 1.0) for adapter in adapters], base, out)
"""

MERGEKIT = """
import tempfile
import sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, out, *adapters = sys.argv[1:]
models = [{"model": {"model": base, "lora": adapter}, "parameters": {"weight": 1.0}} for adapter in adapters]
config = {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": "bfloat16"}
options = MergeOptions(copy_tokenizer=False, out_shard_size=10**9, lora_merge_cache=tempfile.mkdtemp())
run_merge(MergeConfiguration.model_validate(config), out_path=out, options=options)
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


def into_base(folder: Path, against: list[str], runs: int, env: dict[str, str]) -> None:
    """Print medians and ratios of ours and of those it is against, and compare with peft's output."""
    adapters = [folder / name for name in ("ab" if "mergekit" in against else "a")]
    programs = {"ours": [sys.executable, "-c", OURS], **{name: _command(name) for name in against}}
    outs = {name: folder / f"{name}-scratch" / "out" for name in programs}
    rounds: dict[str, list[tuple[Run, int]]] = {name: [] for name in programs}
    for _ in range(runs + 1):
        for name, command in programs.items():
            shutil.rmtree(outs[name].parent, ignore_errors=True)
            words = [str(folder / "base"), str(outs[name]), *map(str, adapters)]
            rounds[name].append(_with_disk([*command, *words], outs[name], env))
    size = _size(folder / "base")
    load = os.getloadavg()[0]
    print(f"r = 16 on all linear layers, {len(adapters)} adapters, into {size / 1e9:.2f} GB of bfloat16")
    print(f"median of {runs} rounds; load {load:.1f}")
    columns = ("seconds", "CPU s", "memory MB", "disk MB", "ratio", "CPU ratio")
    print("".join([" " * 10, *(column.rjust(12) for column in columns)]))
    own = median([run for run, _ in rounds["ours"][1:]])
    for name, found in rounds.items():
        run, disk = median([run for run, _ in found[1:]]), max(disk for _, disk in found[1:])
        ratios = f"{run.seconds / own.seconds:11.2f}x{run.cpu / own.cpu:11.2f}x" if name != "ours" else ""
        print(f"{name:10}{run.seconds:12.2f}{run.cpu:12.2f}{run.bytes / 1e6:12.0f}{disk / 1e6:12.1f}{ratios}")
    if "peft" in against:
        differ, total = differing(outs["ours"], outs["peft"])
        print(f"{differ} of {total:,} elements differ from peft's")
    for out in outs.values():
        shutil.rmtree(out.parent)


def _command(name: str) -> list[str]:
    if name == "peft":
        return [sys.executable, "-c", THEIRS]
    if name == "cp":
        return ["sh", "-c", 'mkdir "$1" && cp "$0"/*.safetensors "$1" && sync "$1"/*']
    from tests.support import mergekit_env

    return [str(mergekit_env.made()), "-c", MERGEKIT]


def _with_disk(command: list[str], out: Path, env: dict[str, str]) -> tuple[Run, int]:
    """The run, and the most bytes of files that it had beside the result; temporary files and caches go beside `out`."""
    scratch, done, most = out.parent, threading.Event(), 0
    scratch.mkdir()
    places = {name: str(scratch / name) for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME")}
    for place in places.values():
        Path(place).mkdir()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, _size(scratch))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        run = timed(command, env={**env, **places, "HF_HUB_OFFLINE": "1"})
    finally:
        done.set()
        watching.join()
    return run, max(most, _size(scratch)) - _size(out)


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; those that vanish meanwhile are none."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return size


def differing(ours: Path, theirs: Path) -> tuple[int, int]:
    """Elements whose bits differ, and elements in all."""
    import numpy as np

    from adapterhub_converters.bases import weight_files
    from adapterhub_converters.containers.safetensors_file import SafetensorsFile

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
    parser.add_argument("--against", nargs="+", choices=("peft", "cp", "mergekit"), default=["peft", "cp"])
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
    if not (folder / "b").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", MAKE, folder, str(options.hidden), str(options.layers)], check=True)
    into_base(folder, options.against, options.runs, env)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "converters")]
    main()
