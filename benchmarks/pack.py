"""Pack checkpoints: size, speed and memory, against zstd on the whole file.

    python benchmarks/pack.py [--checkpoints FOLDER] [--rounds 5]

FOLDER has safetensors files named by their step, as `010.safetensors`. Those of the training of
examples/legal-smollm2.toml at a constant rate of 2e-4, one every 10 steps up to 200, are made if need be (`make demo`
first: it makes the base and the data); "random" are tiny and random. The factors of the last checkpoint are packed in
each float type, alone and as a difference to the checkpoints 10, 20, 50 and 100 steps before it; then zstd -3 on the plain
file. Every pack is read back and must give the digest. The aims for BF16: at most 70 % alone, at most 50 % next to a
near parent, 300 MB/s in, 400 MB/s out.

Rates are of plain bytes per CPU second of one core, the best of three in a process; files are in the page cache. `pull` is
decoding with the sha256 that a pull makes of it. `grown` is the memory that the process grew by.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from _bench import ENVIRONMENT, OURS, ROOT, Bench, Figures, Program, main, process

from adapterhub.digest import copy_hashing, sha256_file
from adapterhub.store.packs import container, cutting
from adapterhub_converters import dtypes
from adapterhub_converters.containers import safetensors_file

BACK = {f"adapterhub, to {steps} steps before": steps for steps in (10, 20, 50, 100)}
ZSTD = "zstd -3 on the file"
JOBS = {f"pack {kind}": [ZSTD, *BACK] for kind in ("F32", "BF16", "F16")}


def pack(bench: Bench) -> None:
    """Every float type against every parent."""
    checkpoints = bench.options.checkpoints
    folder = bench.input_folder(random_checkpoints) if checkpoints == "random" else Path(checkpoints)
    if not folder.exists():
        train(folder)
    path_by_step = {int(path.stem): path for path in folder.glob("*.safetensors") if path.stem.isdecimal()}
    last = max(path_by_step)
    for job in JOBS:
        kind, scratch = job.split()[-1], bench.scratch
        child = factors(path_by_step[last], kind, scratch / "child")
        programs = [Program("adapterhub", process(packed, child, None), itself=True)]
        programs.append(Program(ZSTD, process(zstd, child), itself=True))
        for name, steps in BACK.items():
            before = path_by_step.get(last - steps)
            parent = factors(before, kind, scratch / f"-{steps}") if before else None
            needs = () if parent else (f"a checkpoint of step {last - steps}",)
            programs.append(Program(name, process(packed, child, parent), needs, itself=True))
        bench.add(job, f"step {last}, {child.stat().st_size / 1e6:.1f} MB", bench.turns(*programs))


def factors(checkpoint: Path, kind: str, path: Path) -> Path:
    """The trained tensors of a checkpoint, without the optimizer's, in a float type."""
    with safetensors_file.SafetensorsFile(checkpoint) as file:
        names = [name for name in file.tensors if not re.search(r"\.exp_avg(_sq)?$", name)]
        tensors = {name: file.tensor(name).astype(dtypes.NUMPY[kind]) for name in names}
    safetensors_file.write(path, tensors, {"format": "pt"})
    return path


# ---- in a process of its own


def packed(child: str, parent: str | None) -> Figures:
    """Pack a file into another and read it back, as `adapterhub pack` and a pull do."""
    packed_path, before, size = f"{child}.packed", peak(), Path(child).stat().st_size
    with open(child, "rb", buffering=0) as source, open(parent or os.devnull, "rb", buffering=0) as base:
        parent_source = ("sha256:" + "1" * 64, container.offset_reader(base)) if parent else None

        def write() -> None:
            reading = container.offset_reader(source)
            runs = cutting.runs(reading, size)
            if parent_source and parent:
                runs = cutting.match_to_parent(runs, cutting.runs(parent_source[1], Path(parent).stat().st_size))
            with open(packed_path, "wb") as file:
                container.write(file, reading, size, cutting.blocks(runs), parent=parent_source)

        encode = best(write)

    def opened() -> container.PackReader:
        return container.PackReader(
            open(packed_path, "rb", buffering=0), packed_path, open(parent, "rb", buffering=0) if parent else None
        )

    return figures(child, packed_path, encode, opened, before)


def zstd(child: str) -> Figures:
    """The same with zstd on the whole file, streaming, at the level that the `zstd` command takes by default."""
    compressed_path, before = f"{child}.zstd", peak()

    def write() -> None:
        with open(child, "rb") as source, open(compressed_path, "wb") as file:
            zstandard.ZstdCompressor(level=3).copy_stream(source, file)

    encode = best(write)
    return figures(
        child, compressed_path, encode, lambda: zstandard.ZstdDecompressor().stream_reader(open(compressed_path, "rb")), before
    )


def figures(child: str, encoded_path: str, encode: float, opened: Callable[[], Any], before: int) -> Figures:
    """Decode what was made, with and without a digest, which must be right."""
    buffer, digests = bytearray(1 << 20), []

    def drain() -> None:
        with opened() as file:
            while file.readinto(buffer):
                pass

    def pull() -> None:
        with opened() as file:
            digests.append(copy_hashing(file, None)[0])

    times, size = {"encode": encode, "decode": best(drain), "pull": best(pull)}, Path(child).stat().st_size
    grown = (peak() - before) / 1e6
    assert digests[-1] == sha256_file(Path(child)), "the decoded bytes differ"
    rates = {f"{name} MB/s": size / seconds / 1e6 for name, seconds in times.items()}
    return {"size %": 100 * Path(encoded_path).stat().st_size / size, **rates, "grown MB": grown}


def best(act: Callable[[], None]) -> float:
    """CPU seconds of this process, the best of three."""
    durations = []
    for _ in range(3):
        start = time.process_time()
        act()
        durations.append(time.process_time() - start)
    return min(durations)


def peak() -> int:
    """The most bytes that this process has held; on Linux not by rusage, in which a child begins with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- the checkpoints


def random_checkpoints(folder: str) -> None:
    """Tiny ones: random factors that move a little from step to step."""
    rng = np.random.default_rng(0)
    start, drift = (rng.normal(size=(64, 16)).astype(np.float32) for _ in range(2))
    for step in (100, 150, 180, 190, 200):
        safetensors_file.write(Path(folder) / f"{step:03}.safetensors", {"lora_A": start + step * 1e-5 * drift}, {})


def train(folder: Path) -> None:
    """Train, and keep a copy of the checkpoint whenever it changes."""
    demo = ROOT / "demo"
    if not (demo / "base").exists():
        sys.exit("demo/base is missing; run `make demo`")
    text = (ROOT / "examples" / "legal-smollm2.toml").read_text()
    settings = {"steps": "200\nsave_every = 10", "learning_rate": "2e-4", "loraplus": "1", "schedule": '"constant"'}
    for key, value in settings.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    config, out, scratch = demo / "pack.toml", demo / "pack", demo / "checkpoints.partial"
    config.write_text(text.replace("../demo/", ""))
    for stale_folder in (out, scratch):
        shutil.rmtree(stale_folder, ignore_errors=True)
    scratch.mkdir()
    checkpoint = out.with_name(out.name + ".checkpoint.safetensors")
    trainer = subprocess.Popen([*OURS, "train", str(config), "-o", str(out)], cwd=ROOT, env=ENVIRONMENT)
    while trainer.poll() is None:
        if checkpoint.exists():
            keep(checkpoint, scratch)
        time.sleep(0.5)
    if trainer.returncode:
        sys.exit(trainer.returncode)
    scratch.rename(folder)


def keep(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint under its step, once; the trainer replaces it whole."""
    with safetensors_file.SafetensorsFile(checkpoint) as file:
        numbered_path = folder / f"{int(file.header.metadata['step']):03}.safetensors"
        if not numbered_path.exists():
            tensors = {name: file.tensor(name) for name in file.tensors}
            safetensors_file.write(numbered_path, tensors, file.header.metadata)


if __name__ == "__main__":
    main(__doc__, JOBS, pack, checkpoints=(str(ROOT / "demo" / "checkpoints"), "random"), rounds=(5, 1))
