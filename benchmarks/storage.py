"""What keeping checkpoints takes, and looking after them: bytes and CPU seconds, which mean something on a busy machine too.

    python benchmarks/storage.py [--runs 3] [--checkpoints 12] [--parameters 500000] [--versions 300]

Each run fits a low-rank product to noisy data by AdamW with a cosine decay, and each checkpoint, 10 steps after the last, is
pushed as a version. "size %" is of all files of the registry, log and index included, after `adapterhub pack`, and of the bytes
of the weights; zstd -3 is on each file of weights, as the `zstd` command does. What looks after a registry costs by version,
not by byte, so it does so with many versions of tiny adapters. `fsck --part 1/10` hashes a tenth of the blobs.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from _bench import ENVIRONMENT, OURS, Bench, Figures, Program, main, process, timed

from adapterhub.maintenance import compress
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters import dtypes
from adapterhub_converters.containers import safetensors_file
from tests.support.adapters import write_adapter

PLAIN, ZSTD, WHOLE, HASHED = "plain files", "zstd -3 on each file", "fsck of every byte", "sha256sum of the blobs"
UNSIGNED, COSIGN = "push without a signature", "cosign sign-blob of the weights"
JOBS = {
    "keep checkpoints in BF16": [PLAIN, ZSTD],
    "keep checkpoints in F32": [PLAIN, ZSTD],
    "check a registry every day": [WHOLE, HASHED],
    "collect what is not used": [],
    "push with a signature": [UNSIGNED],
    "sign an adapter": [COSIGN],
}
_RANK, _WEIGHTS = 16, "adapter_model.safetensors"
_CONFIG: dict[str, Any] = {"r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": ["q_proj"]}


class Cpu(Program):
    """A command whose wall time is not reported."""

    def run(self) -> Figures:
        """The figures of one run."""
        figures, _ = timed(self.command, self.env)
        return {"CPU seconds": figures["CPU seconds"]}


def keep_checkpoints(bench: Bench) -> None:
    for kind in ("BF16", "F32"):
        registry = _registry(bench, kind)
        programs = [
            Program("adapterhub", process(packed, registry, bench.scratch / kind), itself=True),
            Program(PLAIN, process(plain, registry), itself=True),
            Program(ZSTD, process(zstd, registry), itself=True),
        ]
        bench.add(f"keep checkpoints in {kind}", _detail(bench), bench.turns(*programs))


def checked(bench: Bench) -> None:
    registry, detail = bench.input_folder(tiny_versions, bench.options.versions), f"{bench.options.versions:,} versions"
    ours, blobs = [*OURS, "--registry", str(registry)], str(registry / ".adapterhub/blobs")
    programs = [
        Cpu("adapterhub", [*ours, "fsck", "--part", "1/10"]),
        Cpu(WHOLE, [*ours, "fsck"]),
        Cpu(HASHED, ["sh", "-c", 'find "$0" -type f -exec sha256sum {} + > /dev/null', blobs]),
    ]
    bench.add("check a registry every day", f"{detail}, by `fsck --part 1/10`", bench.turns(*programs))
    bench.add("collect what is not used", f"{detail}, by `gc`", bench.turns(Cpu("adapterhub", [*ours, "gc"])))


def signed(bench: Bench) -> None:
    folder, keys = bench.input_folder(signed_adapter, bench.options.parameters), bench.scratch
    plain_folder, target = bench.scratch / "unsigned", bench.scratch / "registry"
    shutil.copytree(folder / "sql", plain_folder, ignore=shutil.ignore_patterns("model.sig"))
    env = {"ADAPTERHUB_REGISTRY": str(target)}
    pushes = [
        Cpu(name, [*OURS, "push", str(path), "team/sql"], env=env)
        for name, path in (("adapterhub", folder / "sql"), (UNSIGNED, plain_folder))
    ]
    weights = f"{(plain_folder / _WEIGHTS).stat().st_size / 1e6:.1f} MB"
    bench.add("push with a signature", weights, bench.turns(*pushes, fresh=[target]))
    passphrase = {"COSIGN_PASSWORD": ""}
    if shutil.which("cosign", path=ENVIRONMENT["PATH"]):
        subprocess.run(
            ["cosign", "generate-key-pair"], cwd=keys, env={**ENVIRONMENT, **passphrase}, check=True, capture_output=True
        )
    cosign = [
        "cosign",
        "sign-blob",
        "--key",
        str(keys / "cosign.key"),
        "--tlog-upload=false",
        "--yes",
        "--output-signature=/dev/null",
    ]
    signers = [
        Cpu("adapterhub", [*OURS, "sign", str(plain_folder), "--key", str(folder / "team.key")]),
        Cpu(COSIGN, [*cosign, str(plain_folder / _WEIGHTS)], ("cosign",), passphrase),
    ]
    bench.add("sign an adapter", weights, bench.turns(*signers))


def _detail(bench: Bench) -> str:
    options = bench.options
    return f"{options.runs} runs of {options.checkpoints}, {options.parameters:,} numbers each"


def _registry(bench: Bench, kind: str) -> Path:
    options = bench.options
    return bench.input_folder(trained, kind, options.runs, options.checkpoints, options.parameters)


# ---- in a process of its own


def trained(root: str, kind: str, runs: int, checkpoints: int, parameters: int) -> None:
    """Push the checkpoints of some runs of a training."""
    folder = write_adapter(Path(root) / "checkpoint", **_CONFIG)
    with Registry.init(Path(root)) as registry:
        for run in range(runs):
            for factors in _checkpoints(run, checkpoints, parameters):
                stored = {name: factor.astype(dtypes.NUMPY[kind]) for name, factor in factors.items()}
                safetensors_file.write(folder / _WEIGHTS, stored, {"format": "pt"})
                registry.push(folder, Ref(f"team/run-{run}"))
    shutil.rmtree(folder)


def tiny_versions(root: str, count: int) -> None:
    """Push versions of tiny adapters, five to a name."""
    with Registry.init(Path(root)) as registry:
        for number in range(count):
            registry.push(write_adapter(Path(root) / "tiny", number), Ref(f"team/adapter-{number // 5}"))
    shutil.rmtree(Path(root) / "tiny")


def _checkpoints(seed: int, count: int, parameters: int) -> Any:
    """Yield the factors of a low-rank product every 10 steps of its fit by AdamW to noisy data."""
    rng, width, steps = np.random.default_rng(seed), parameters // (2 * _RANK), 10 * count
    goal = rng.normal(size=(_RANK, width)).astype(np.float32)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{prefix}.lora_A.weight": rng.uniform(-1, 1, size=(_RANK, width)).astype(np.float32) / width**0.5,
        f"{prefix}.lora_B.weight": np.zeros((width, _RANK), np.float32),
    }
    (a, b), moments = factors.values(), {name: [np.zeros_like(value)] * 2 for name, value in factors.items()}
    for step in range(1, steps + 1):
        inputs = rng.normal(size=(32, width)).astype(np.float32)
        hidden = inputs @ a.T
        error = hidden @ b.T - inputs @ goal.T @ goal / width + rng.normal(scale=0.1, size=(32, width)).astype(np.float32)
        gradients = ((error @ b).T @ inputs / 32, error.T @ hidden / 32)
        rate = 2e-4 * 0.5 * (1 + np.cos(np.pi * step / steps))
        for (name, value), gradient in zip(factors.items(), gradients, strict=True):
            first, second = moments[name]
            moments[name] = [0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2]
            mean, variance = moments[name][0] / (1 - 0.9**step), moments[name][1] / (1 - 0.999**step)
            np.subtract(value, rate * (mean / (np.sqrt(variance) + 1e-8) + 0.01 * value), out=value, casting="same_kind")
        if step % 10 == 0:
            yield factors


def packed(registry: str, copy: str) -> Figures:
    """Pack a copy of a registry: the bytes of all of its files, of those of the weights in it."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(registry, copy)
    with Registry.open(Path(copy)) as opened:
        start = time.process_time()
        compress.pack(opened)
        seconds = time.process_time() - start
    return {"size %": _share(Path(copy), _weights(registry)), "CPU seconds": seconds}


def plain(registry: str) -> Figures:
    """The registry as it is."""
    return {"size %": _share(Path(registry), _weights(registry))}


def zstd(registry: str) -> Figures:
    """Each file of weights through zstd at its usual level."""
    weights, start = _weights(registry), time.process_time()
    size = sum(len(zstandard.ZstdCompressor(level=3).compress(path.read_bytes())) for path in weights)
    return {"size %": 100 * size / _bytes(weights), "CPU seconds": time.process_time() - start}


def _weights(registry: str) -> list[Path]:
    """The blobs that are files of weights: all large ones."""
    return [path for path in Path(registry, ".adapterhub/blobs").rglob("*") if path.is_file() and path.stat().st_size > 20_000]


def _share(folder: Path, weights: list[Path]) -> float:
    return 100 * _bytes([path for path in folder.rglob("*") if path.is_file()]) / _bytes(weights)


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def signed_adapter(root: str, parameters: int) -> None:
    """An adapter, the signature of its files, and the key that it is by."""
    folder = write_adapter(Path(root) / "sql", **_CONFIG)
    factors = next(iter(_checkpoints(0, 1, parameters)))
    safetensors_file.write(
        folder / _WEIGHTS, {name: factor.astype(dtypes.NUMPY["BF16"]) for name, factor in factors.items()}, {}
    )
    for words in (["key", "generate", f"{root}/team"], ["describe", folder], ["sign", folder, "--key", f"{root}/team.key"]):
        subprocess.run([*OURS, *map(str, words)], env=ENVIRONMENT, check=True, capture_output=True)


if __name__ == "__main__":
    sizes = {"runs": (3, 1), "checkpoints": (12, 3), "parameters": (500_000, 50_000), "versions": (300, 10), "rounds": (1, 1)}
    main(__doc__, JOBS, keep_checkpoints, checked, signed, **sizes)
