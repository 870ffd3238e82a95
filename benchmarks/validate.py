"""Check that an adapter fits a base: `adapterhub validate` against loading both with peft; and scan values, against torch.

    python benchmarks/validate.py [--model Llama-3-70B] [--rank 16] [--mib 1024] [--tensors 300000] [--rounds 5]

The base has the shape of Llama 3 70B: an index and shards of safetensors whose headers are real and whose weights are
holes in the file. The adapter is on every linear module. Ours is `adapterhub validate --base … --headers-only` as a user
types it; theirs builds the model without memory (transformers on the meta device) and loads the adapter with peft, which
finds what does not fit by failing. Both must accept this base and refuse one with half the intermediate size.

The scan looks for NaN, infinity and zero in an adapter of random bfloat16 in memory, against `torch.isfinite(t).all()` and,
as a floor, one maximum over 64-bit words; ours also as a whole process, with everything else that `adapterhub validate` does.

An adapter of very many tensors, each with a problem of its own, has no peer: the figures are what a hostile header costs.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from _bench import ENVIRONMENT, OURS, Bench, Figures, Program, call, lacking, main, process
from _models import adapter, adapter_of, base, many_tensors

PEFT, TORCH, FLOOR = "peft on a model without memory", "torch.isfinite(t).all()", "maximum of 64-bit words"
JOBS = {
    "check that an adapter fits a base": [PEFT],
    "scan bf16 for NaN and infinity": [TORCH, FLOOR],
    "check an adapter, every value read": [],
    "count a problem of each of many tensors": [],
}


def fits(bench: Bench) -> None:
    model, rank = bench.options.model, bench.options.rank
    whole, half = bench.input_folder(base, model, values=False), bench.input_folder(base, model, values=False, half=True)
    lora = bench.input_folder(adapter, model, rank, values=False)

    def ours(place: Path) -> Program:
        return Program("adapterhub", [*OURS, "validate", str(lora), "--base", str(place), "--headers-only"])

    def theirs(place: Path) -> Program:
        return Program(PEFT, process(load, place, lora), ["torch", "transformers", "peft"])

    turns = bench.turns(ours(whole), theirs(whole))
    claims = {"ours refuses a base of other shapes": refuses(ours(half), "shape-mismatch")}
    if isinstance(turns.get(PEFT), dict):
        claims["peft refuses it too"] = refuses(theirs(half), "size mismatch")
    bench.add(next(iter(JOBS)), f"{model}, all linear layers, r = {rank}, headers alone", turns, claims)


def load(folder: str, lora: str) -> None:
    """Theirs."""
    import peft
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, lora)


def refuses(program: Program, words: str) -> bool:
    """Run a program that must fail with these words: the time of a wrong answer would mean nothing."""
    result = subprocess.run(program.command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return result.returncode == 1 and words in result.stdout + result.stderr


def values(bench: Bench) -> None:
    _, scan, whole, _ = JOBS
    lora = bench.input_folder(adapter_of, bench.options.mib)
    figures, agree = call(scans, lora, bench.options.rounds)
    bench.add(scan, f"{bench.options.mib} MiB in memory", figures, {"each finds a NaN and an infinity": agree})
    bench.add(whole, f"{bench.options.mib} MiB", bench.turns(Program("adapterhub", [*OURS, "validate", str(lora)])))


def scans(folder: str, rounds: int) -> tuple[dict[str, Figures | str], bool]:
    """Time every scan over the same memory in turn; and check that each finds a bad number."""
    import ml_dtypes
    import numpy as np
    from safetensors import safe_open

    from adapterhub.checks import consistency

    with safe_open(f"{folder}/adapter_model.safetensors", "numpy") as file:
        arrays = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    bad = [np.full((1, 64), value, ml_dtypes.bfloat16) for value in (np.nan, np.inf)]

    def ours(parts: list[Any]) -> bool:
        return all(largest < infinite for largest, infinite in map(consistency.largest_bits, parts))

    def floor(parts: list[Any]) -> bool:
        return all(part.reshape(-1).view(np.uint64).max() for part in parts)

    programs: dict[str, Any] = {"adapterhub": ours, FLOOR: floor}
    if not lacking(["torch"]):
        import torch

        def theirs(parts: list[Any]) -> bool:
            return all(
                bool(torch.isfinite(torch.from_numpy(part.view(np.uint16)).view(torch.bfloat16)).all()) for part in parts
            )

        programs[TORCH] = theirs
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, scan in programs.items():
            start = time.perf_counter()
            assert scan(arrays)
            times[name].append(time.perf_counter() - start)
    size = sum(array.nbytes for array in arrays) / 1e9
    median_by_name = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    agree = not any(scan([part]) for name, scan in programs.items() if name != FLOOR for part in bad)
    missing = {TORCH: "torch"} if TORCH not in median_by_name else {}
    return {
        name: {"seconds": seconds, "scan GB/s": size / seconds} for name, seconds in median_by_name.items()
    } | missing, agree


def replaced_tensors(bench: Bench) -> None:
    count = bench.options.tensors
    program = Program("adapterhub", [*OURS, "validate", str(bench.input_folder(many_tensors, count))])
    output = subprocess.run(program.command, env=ENVIRONMENT, capture_output=True, text=True, check=False).stdout
    claims = {"each is counted": f" in {count:,} places" in output, "in a few lines": len(output.splitlines()) < 30}
    bench.add(list(JOBS)[3], f"{count:,} tensors that replace the base's", bench.turns(program), claims)


if __name__ == "__main__":
    main(
        __doc__,
        JOBS,
        fits,
        values,
        replaced_tensors,
        model=("Llama-3-70B", "tiny"),
        rank=(16, 4),
        mib=(1024, 2),
        tensors=(300_000, 20),
        rounds=(5, 1),
    )
