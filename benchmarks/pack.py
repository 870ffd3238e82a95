"""Packing real checkpoints: how small, how fast, in how much memory, against zstd on the whole file.

    python benchmarks/pack.py [CHECKPOINTS] [--runs 5]

CHECKPOINTS is a folder of safetensors files named by their step, as `010.safetensors`. Without it they are made: the training
of examples/legal-smollm2.toml at a constant rate of 2e-4, its checkpoint kept every 10 steps up to 200 (`make demo` first: it
makes the base and the data). The factors of the last are packed in each float type, alone and as a difference to the
checkpoints 10, 20, 50 and 100 steps before it; then zstd -3 on the plain file. Every pack is read back and compared.

Rates are of plain bytes per second of one core's CPU time, the best of the runs, one job after the other in each; files lie in
the page cache. `pull` is decoding with the sha256 that a pull makes of it. Memory is what the process grew by.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]

import zstandard  # noqa: E402

from adapterhub.digest import copy_hashing, sha256_file  # noqa: E402
from adapterhub.store.packs import container, cutting  # noqa: E402
from adapterhub_converters import dtypes  # noqa: E402
from adapterhub_converters.containers import safetensors_file  # noqa: E402

BACK = (10, 20, 50, 100)
AIMS = {"BF16": "at most 70 % alone, at most 50 % beside a near parent, 300 MB/s in, 400 MB/s out"}


def main() -> None:
    """Make what isn't there, then a child for every job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", type=Path, nargs="?", default=ROOT / "demo" / "checkpoints")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job, child, parent = options.job
        print(json.dumps(JOBS[job](Path(child), Path(parent) if parent else None)))
        return
    if not options.checkpoints.exists():
        train(options.checkpoints)
    found = {int(path.stem): path for path in options.checkpoints.glob("*.safetensors") if path.stem.isdecimal()}
    last = max(found)
    print(f"{'':6}{'':22}{'size':>8}{'encode':>10}{'decode':>10}{'pull':>10}{'memory':>10}")
    with tempfile.TemporaryDirectory(prefix="pack-") as folder:
        for kind in ("F32", "BF16", "F16"):
            table(kind, found, last, Path(folder), options.runs)
    print(f"\naims: bf16 {AIMS['BF16']}")


def table(kind: str, found: dict[int, Path], last: int, folder: Path, runs: int) -> None:
    """The rows of one float type."""
    child = factors(found[last], kind, folder / "child")
    parents = {step: factors(found[last - step], kind, folder / f"-{step}") for step in BACK if last - step in found}
    jobs: dict[str, tuple[str, Path | None]] = {"zstd -3, whole file": ("zstd", None), "packed alone": ("pack", None)}
    jobs |= {f"to {step} steps before": ("pack", path) for step, path in parents.items()}
    results: dict[str, list[dict[str, float]]] = {title: [] for title in jobs}
    for _ in range(runs):
        for title, (job, parent) in jobs.items():
            command = [sys.executable, __file__, "--job", job, str(child), str(parent or "")]
            results[title].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    size = child.stat().st_size
    for title, times in results.items():
        best = {key: min(one[key] for one in times) for key in times[0]}
        rates = "".join(f"{size / best[key] / 1e6:6.0f} MB/s"[:11].rjust(10) for key in ("encode", "decode", "pull"))
        print(f"{kind:6}{title:22}{best['size'] / size:8.1%}{rates}{best['memory'] / 1e6:7.1f} MB", flush=True)


def factors(checkpoint: Path, kind: str, path: Path) -> Path:
    """The trained tensors of a checkpoint, without the optimizer's, in a float type."""
    with safetensors_file.SafetensorsFile(checkpoint) as file:
        names = [name for name in file.tensors if not re.search(r"\.exp_avg(_sq)?$", name)]
        tensors = {name: file.tensor(name).astype(dtypes.NUMPY[kind]) for name in names}
    safetensors_file.write(path, tensors, {"format": "pt"})
    return path


# ---- in a child


def pack(child: Path, parent: Path | None) -> dict[str, float]:
    """Pack a file into another and read it back, as `adapterhub pack` and a pull do."""
    made, before = child.with_name("packed"), peak()
    size = child.stat().st_size
    with open(child, "rb", buffering=0) as source, open(parent or os.devnull, "rb", buffering=0) as base:
        known = ("sha256:" + "1" * 64, container.at(base)) if parent else None

        def write() -> None:
            reading = container.at(source)
            runs = cutting.runs(reading, size)
            if known and parent:
                runs = cutting.matched(runs, cutting.runs(known[1], parent.stat().st_size))
            with open(made, "wb") as file:
                container.write(file, reading, size, cutting.blocks(runs), parent=known)

        encode = timed(write)

    def opened() -> container.Reader:
        return container.Reader(open(made, "rb", buffering=0), str(made), open(parent, "rb", buffering=0) if parent else None)

    return finish(child, made, encode, opened, before)


def zstd(child: Path, _: Path | None) -> dict[str, float]:
    """The same with zstd on the whole file, streaming, at the level that the `zstd` command takes by default."""
    made, before = child.with_name("packed"), peak()

    def write() -> None:
        with open(child, "rb") as source, open(made, "wb") as file:
            zstandard.ZstdCompressor(level=3).copy_stream(source, file)

    encode = timed(write)
    return finish(child, made, encode, lambda: zstandard.ZstdDecompressor().stream_reader(open(made, "rb")), before)


JOBS = {"pack": pack, "zstd": zstd}


def finish(child: Path, made: Path, encode: float, opened: Callable[[], Any], before: int) -> dict[str, float]:
    """Decode what was made, with and without a digest; the digest has to be right."""
    buffer = bytearray(1 << 20)

    def drain() -> None:
        with opened() as file:
            while file.readinto(buffer):
                pass

    def pull() -> None:
        with opened() as file:
            found.append(copy_hashing(file, None)[0])

    found: list[str] = []
    decode, pulled = timed(drain), timed(pull)
    memory = peak() - before
    assert found[-1] == sha256_file(child), "what came back is not what went in"
    return {"size": made.stat().st_size, "encode": encode, "decode": decode, "pull": pulled, "memory": memory}


def timed(act: Callable[[], None]) -> float:
    """CPU seconds of this process, the best of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        act()
        found.append(time.process_time() - start)
    return min(found)


def peak() -> int:
    """The most bytes that this process has held; on Linux not by rusage, in which a child begins with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


# ---- the checkpoints


def train(folder: Path) -> None:
    """Train, and keep a copy of the checkpoint whenever it changes."""
    demo = ROOT / "demo"
    if not (demo / "base").exists():
        sys.exit("demo/base isn't there; `make demo` makes it")
    text = (ROOT / "examples" / "legal-smollm2.toml").read_text()
    settings = {"steps": "200\nsave_every = 10", "learning_rate": "2e-4", "loraplus": "1", "schedule": '"constant"'}
    for key, value in settings.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    config, out, scratch = demo / "pack.toml", demo / "pack", demo / "checkpoints.partial"
    config.write_text(text.replace("../demo/", ""))
    for left in (out, scratch):
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir()
    checkpoint = out.with_name(out.name + ".checkpoint.safetensors")
    process = subprocess.Popen([sys.executable, "-m", "adapterhub", "train", str(config), "-o", str(out)], cwd=ROOT)
    while process.poll() is None:
        if checkpoint.exists():
            keep(checkpoint, scratch)
        time.sleep(0.5)
    if process.returncode:
        sys.exit(process.returncode)
    scratch.rename(folder)


def keep(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint under its step, once; the trainer replaces it whole."""
    with safetensors_file.SafetensorsFile(checkpoint) as file:
        kept = folder / f"{int(file.header.metadata['step']):03}.safetensors"
        if not kept.exists():
            tensors = {name: file.tensor(name) for name in file.tensors}
            safetensors_file.write(kept, tensors, file.header.metadata)


if __name__ == "__main__":
    main()
