"""A gibibyte into the local registry and out of it, against `cp`, `sync` and `sha256sum` of the same bytes, in turn.

    python benchmarks/push_pull.py [--mib 1024] [--runs 3] [--dir DIR]

Ours is `adapterhub push` and `adapterhub pull` as they are typed: the adapter checked, copied, hashed, synced and named; and
on the way out copied, hashed and compared. Theirs is what a careful person types instead. Both end on the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas"), str(ROOT / "benchmarks")]

from _pairs import compare  # noqa: E402

from adapterhub_converters import dtypes  # noqa: E402
from adapterhub_converters.containers import safetensors_file  # noqa: E402
from adapterhub_converters.formats import peft  # noqa: E402

RANK, SIDE = 64, 8192


def make(folder: Path, mib: int) -> None:
    """An adapter of about that size: random bfloat16, which nothing compresses or finds twice."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(mib // 2):  # two MiB a module
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for half, shape in (("A", (RANK, SIDE)), ("B", (SIDE, RANK))):
            tensors[f"{stem}.lora_{half}.weight"] = rng.normal(size=shape).astype(np.float32).astype(dtypes.BF16)
    safetensors_file.write(folder / peft.WEIGHTS, tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / peft.CONFIG).write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work: a disk with four times the room")
    options = parser.parse_args()
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "schemas")))}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        adapter, registry, copy, out = (folder / part for part in ("adapter", "registry", "copy", "out"))
        # In a process of its own: Linux counts a parent's memory at the fork as the child's peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make, (adapter, options.mib))
        ours = [sys.executable, "-m", "adapterhub"]
        push = [*ours, "push", str(adapter), "team/big", "--registry", str(registry)]
        pull = [*ours, "pull", "team/big", "-o", str(out), "--registry", str(registry)]
        theirs = ["sh", "-c", f"cp {adapter / peft.WEIGHTS} {copy} && sync {copy} && sha256sum {copy}"]
        compare(push, theirs, options.runs, title=f"push of {options.mib} MiB", env=env, fresh=(registry, copy))
        compare(pull, theirs, options.runs, title=f"pull of {options.mib} MiB", env=env, fresh=(out, copy))


if __name__ == "__main__":
    main()
