"""A training step of ours against the usual loop of transformers, peft and bitsandbytes: same rows, same QLoRA.

Usage: python benchmarks/train.py BASE DATA.jsonl [--steps 8] [--rounds 3] [--rows 2] [--sequence 256]

Each round runs both programs as processes of their own, in turn, so that a machine that slows down slows both. A
program reports the median of its steps in wall and CPU time, the first two not counted, and its peak memory. CPU time on one
thread is what a busy machine disturbs least. Both begin with lora_B
zero, and train on the same rows in the same order at the same rate; their first losses have to agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]
RATE, R, ALPHA = 1e-3, 16, 32
PROGRAMS = ("ours", "theirs")


def main() -> None:
    options = arguments()
    if options.child:
        print(json.dumps(child(options)))
        return
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
    for _ in range(options.rounds):
        for name in PROGRAMS:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", name], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            reports[name].append(json.loads(done.stdout.splitlines()[-1]))
    steps = {name: statistics.median(report["step"] for report in reports[name]) for name in PROGRAMS}
    load = {name: statistics.median(report["load"] for report in reports[name]) for name in PROGRAMS}
    peak = {name: statistics.median(report["peak"] for report in reports[name]) for name in PROGRAMS}
    cpu = {name: statistics.median(report["cpu"] for report in reports[name]) for name in PROGRAMS}
    tokens = options.rows * options.sequence
    print(f"QLoRA, r = {R} on all linears, {options.rows} x {options.sequence} tokens a step, {options.threads} threads")
    print(f"medians of {options.rounds} alternating rounds")
    print(f"{'':8}{'s/step':>9}{'CPU s':>9}{'tokens/s':>10}{'load s':>9}{'peak MB':>10}{'first loss':>12}{'last loss':>11}")
    for name in PROGRAMS:
        losses = reports[name][0]["losses"]
        print(
            f"{name:8}{steps[name]:9.3f}{cpu[name]:9.3f}{tokens / steps[name]:10.0f}{load[name]:9.1f}{peak[name] / 1e6:10.0f}"
            f"{losses[0]:12.4f}{losses[-1]:11.4f}"
        )
    pair = [(medians["theirs"] / medians["ours"]) for medians in (steps, cpu, load, peak)]
    print(f"ratio   {pair[0]:8.2f}x{pair[1]:8.2f}x{'':10}{pair[2]:8.1f}x{pair[3]:9.2f}x")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    for name, value in (("steps", 8), ("rounds", 3), ("rows", 2), ("sequence", 256), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One program's run."""
    import torch

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    step = {"ours": ours, "theirs": theirs}[options.child](options)
    load = time.monotonic() - started
    times, busy, losses = [], [], []
    for number in range(options.steps):
        started, cpu = time.monotonic(), time.process_time()
        losses.append(step(number))
        times.append(time.monotonic() - started)
        busy.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    times = times[2:] or times
    return {
        "step": statistics.median(times),
        "cpu": statistics.median(busy[2:] or busy),
        "load": load,
        "peak": peak,
        "losses": losses,
    }


def rows_of(options: argparse.Namespace, tokenizer: Any) -> Any:
    from adapterhub.train.corpus import data

    return data.load([options.data], tokenizer, sequence=options.sequence, loss="all", seed=0).rows


def ours(options: argparse.Namespace) -> Callable[[int], float]:
    from adapterhub.train import config
    from adapterhub.train.layers import lora
    from adapterhub.train.model import base
    from adapterhub.train.steps import loop

    made = base.load(options.base, config.BaseConfig(str(options.base)), config.LoRAConfig(r=R, alpha=ALPHA), where="")
    lora.reset(made.model, 0)
    settings = config.OptimConfig(rows=options.rows, learning_rate=RATE, schedule="constant")
    rows, state = rows_of(options, made.tokenizer), loop.new_state(made.model, settings)
    return lambda _: float(loop.advance(made, rows, state, settings, options.steps)["loss"])


def theirs(options: argparse.Namespace) -> Callable[[int], float]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from adapterhub.train.corpus import data

    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.base, quantization_config=quantised, dtype=torch.bfloat16, device_map="cpu"
    )
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = rows_of(options, transformers.AutoTokenizer.from_pretrained(options.base))
    order = data.order(len(rows), options.steps * options.rows, 0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()

    def step(number: int) -> float:
        chosen = order[number * options.rows : (number + 1) * options.rows]
        ids, positions, labels = (torch.from_numpy(array[chosen]) for array in (rows.ids, rows.positions, rows.labels))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=data.IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss)

    return step


if __name__ == "__main__":
    main()
