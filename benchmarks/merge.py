"""Merge adapters: into a base against peft, `cp` and mergekit, and into one adapter against peft.

    python benchmarks/merge.py [--only into_base] [--model 1.1B] [--rounds 3] [--dir DIR]
    python benchmarks/merge.py --only combined [--side 4096] [--rank 16] [--threads 1]

`into_base`, `two_into_base`: `merge_into_base` and its peers as whole processes on the same base and adapters. The base is a
random Llama in bfloat16 in shards of 1 GB, the adapters are r = 16 on every linear layer; 1.1B has 2.2 GB, 4B has 8 GB. peft is
`merge_and_unload` and `save_pretrained`; its model must equal ours bit for bit. `cp` of the shards and `sync` of the
copies is what any program that writes a model has to do. mergekit is `task_arithmetic`, in an environment of its own that
`python -m tests.support.mergekit_env` makes. `temporary MB` is the
peak size of all files of the program, without the model that it writes.

`combined`: two adapters of one square module into one of their rank, by `svd` and by `ties` (density 0.2), against peft's
`add_weighted_adapter` with `svd` and `ties_svd`. Timed inside the processes, as imports would drown it: the whole of
`combine`, its report included, and the call of theirs.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bench import Bench, Figures, Program, call, main, medians, process
from _models import adapter, base

from tests.support import mergekit_env

PEFT, CP, MERGEKIT = "peft's merge_and_unload and save_pretrained", "cp and sync of its weights", "mergekit, task_arithmetic"
PEFT_SVD, PEFT_TIES = "peft's add_weighted_adapter, svd", "peft's add_weighted_adapter, ties_svd"
JOBS = {
    "merge an adapter into a base": [PEFT, CP],
    "merge two adapters into a base": [MERGEKIT],
    "merge two adapters into one by svd": [PEFT_SVD],
    "merge two adapters into one by ties": [PEFT_TIES],
}
NEEDS = ["torch", "transformers", "peft"]


@dataclass(frozen=True)
class Merge(Program):
    """A program that makes a model in `out`; its temporary files and caches go next to that, and are measured."""

    out: Path = Path()

    def run(self) -> Figures:
        """As any program, and the most bytes of its files on the disk, without the result."""
        scratch, finished, peak_size = self.out.parent, threading.Event(), 0
        shutil.rmtree(scratch, ignore_errors=True)
        places = {name: scratch / name for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME")}
        for place in places.values():
            place.mkdir(parents=True)

        def watch() -> None:
            nonlocal peak_size
            while not finished.wait(0.1):
                peak_size = max(peak_size, size(scratch))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            figures = Program(self.name, self.command, env={name: str(place) for name, place in places.items()}).run()
        finally:
            finished.set()
            watching.join()
        return figures | {"temporary MB": (max(peak_size, size(scratch)) - size(self.out)) / 1e6}


def size(folder: Path) -> int:
    """Bytes of the files in a folder that a program may be changing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return total


def into_base(bench: Bench) -> None:
    folder, adapters, detail = inputs(bench, 1)
    ours, theirs, copy = (bench.scratch / name / "out" for name in ("ours", "peft", "cp"))
    turns = bench.turns(
        Merge("adapterhub", process(merge_into_base, folder, ours, *adapters), out=ours),
        Merge(PEFT, process(merge_and_unload, folder, theirs, *adapters), NEEDS, out=theirs),
        Merge(CP, ["sh", "-c", 'mkdir "$1" && cp "$0"/*.safetensors "$1" && sync "$1"/*', str(folder), str(copy)], out=copy),
    )
    equal = theirs.exists() and call(differing, ours, theirs)
    claims = {f"{equal[0]} of {equal[1]:,} elements differ from peft's": not equal[0]} if equal else {}
    bench.add(next(iter(JOBS)), detail, turns, claims)


def two_into_base(bench: Bench) -> None:
    folder, adapters, detail = inputs(bench, 2)
    ours, theirs, python = bench.scratch / "ours" / "out", bench.scratch / "mergekit" / "out", mergekit_env.installed_python()
    needs = [*NEEDS, *(() if python else ["mergekit (python -m tests.support.mergekit_env)"])]
    turns = bench.turns(
        Merge("adapterhub", process(merge_into_base, folder, ours, *adapters), out=ours),
        Merge(MERGEKIT, process(mergekit, folder, theirs, *adapters, python=python), needs, out=theirs),
    )
    bench.add(list(JOBS)[1], detail, turns)


def inputs(bench: Bench, count: int) -> tuple[Path, list[Path], str]:
    """A base, adapters, and their description."""
    model, rank = bench.options.model, bench.options.rank
    folder = bench.input_folder(base, model)
    detail = f"{size(folder) / 1e9:.2f} GB of bfloat16, r = {rank} on all linear layers"
    return folder, [bench.input_folder(adapter, model, rank, dtype="F32", seed=seed) for seed in range(count)], detail


def merge_into_base(folder: str, out: str, *adapters: str) -> None:
    from adapterhub.merging import merge_into_base as merge
    from adapterhub_converters.formats import peft

    merge([(peft.read(Path(adapter_path)), 1.0) for adapter_path in adapters], Path(folder), Path(out))


def merge_and_unload(folder: str, out: str, lora: str) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, lora).merge_and_unload().save_pretrained(out, max_shard_size="1GB")


def mergekit(folder: str, out: str, *adapters: str) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": {"model": folder, "lora": adapter_path}, "parameters": {"weight": 1.0}} for adapter_path in adapters]
    config = {"merge_method": "task_arithmetic", "base_model": folder, "models": models, "dtype": "bfloat16"}
    options = MergeOptions(copy_tokenizer=False, out_shard_size=10**9, lora_merge_cache=tempfile.mkdtemp())
    run_merge(MergeConfiguration.model_validate(config), out_path=out, options=options)


def differing(ours: str, theirs: str) -> tuple[int, int]:
    """Elements whose bits differ, and elements in all."""
    import torch
    from safetensors import safe_open

    def tensors(folder: str) -> dict[str, Any]:
        files: list[Any] = [safe_open(path, "pt") for path in Path(folder).glob("*.safetensors")]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118

    our_tensors, other_tensors, differ, total = tensors(ours), tensors(theirs), 0, 0
    assert set(our_tensors) == set(other_tensors)
    for name in our_tensors:
        our_tensor, their_tensor = (files[name].get_tensor(name).view(torch.int16) for files in (our_tensors, other_tensors))
        differ += int((our_tensor != their_tensor).sum())
        total += our_tensor.numel()
    return differ, total


def combined(bench: Bench) -> None:
    side, rank, threads = bench.options.side, bench.options.rank, bench.options.threads
    *_, svd, ties = JOBS
    for job, method, kind, repeats in ((svd, "svd", "svd", 20), (ties, "ties", "ties_svd", 3)):
        mine = process(combine, side, rank, method, repeats)
        theirs = process(add_weighted_adapter, side, rank, kind, threads)
        turns = bench.turns(
            Program("adapterhub", mine, env={"OPENBLAS_NUM_THREADS": str(threads)}, itself=True),
            Program(JOBS[job][0], theirs, NEEDS, itself=True),
        )
        bench.add(job, f"r = {rank}, a module of {side} x {side}, threads: {threads}", turns)


def combine(side: int, rank: int, method: str, repeats: int) -> Figures:
    import numpy as np

    from adapterhub.merging import combine as merge
    from adapterhub_converters.adapter import Adapter, LowRank

    random = np.random.default_rng(0)

    def adapter() -> Adapter:
        lora_A, lora_B = (random.normal(size=shape).astype(np.float32) for shape in ((rank, side), (side, rank)))
        return Adapter({"0": LowRank(lora_A, lora_B, alpha=float(rank))})

    adapters = [adapter(), adapter()]
    return medians([clocked(lambda: merge(adapters, [1.0, 1.0], method=method)) for _ in range(repeats)])


def add_weighted_adapter(side: int, rank: int, kind: str, threads: int) -> Figures:
    import peft
    import torch

    torch.set_num_threads(threads)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    model = peft.PeftModel(torch.nn.Sequential(torch.nn.Linear(side, side, bias=False)), config, adapter_name="a")
    model.add_adapter("b", config)
    options = {"combination_type": kind, "svd_rank": rank, "density": 0.2}
    return clocked(lambda: model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", **options))


def clocked(act: Callable[[], object]) -> Figures:
    """What a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return {"seconds": time.perf_counter() - wall, "CPU seconds": time.process_time() - cpu}


if __name__ == "__main__":
    sizes = {"model": ("1.1B", "tiny"), "side": (4096, 64), "rank": (16, 4), "threads": (1, 1), "rounds": (3, 1)}
    main(__doc__, JOBS, into_base, two_into_base, combined, **sizes)
