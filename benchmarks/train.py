"""A QLoRA step of ours against transformers + peft + bitsandbytes, and against trl; peak memory against full fine-tuning too.

Usage: python benchmarks/train.py [--base 28M|0.66B|1.1B|FOLDER] [--programs ours,peft,trl,full] [--rows 1] [--sequence 256]
           [--steps 8] [--rounds 3] [--threads 1] [--checkpointing]

28M, 1.1B (TinyLlama's shape) and 0.66B (its first 12 layers) are random weights that this script makes; nothing is downloaded.
Each round runs every program as a process of its own, in turn, so that a machine that slows down slows all. A program reports
the medians of its steps in wall and CPU time, the first two not counted, and the most memory it held. CPU time on one thread is
what a busy machine disturbs least. All train on the same random rows in the same order at the same rate, from the same base
with the same kernels (bitsandbytes) and lora_B zero; their first losses have to agree.

`peft` is the usual loop: `prepare_model_for_kbit_training`, autocast to bfloat16, AdamW. `trl` is `SFTTrainer`, given
the quantized base and peft's config.
`full` trains every parameter in float32 with AdamW and checkpointing, as transformers does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]
RATE, R, ALPHA = 1e-3, 16, 32
WARM = 2  # steps that are not counted
SHAPES = {
    "28M": {
        "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
        "num_key_value_heads": 6, "tie_word_embeddings": True,
    },
    "1.1B": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "0.66B": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    options = arguments()
    if options.child:
        print(json.dumps(child(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(options.base) if options.base not in SHAPES else made(options.base, Path(folder))
        reports: dict[str, list[dict[str, Any]]] = {name: [] for name in options.programs.split(",")}
        for _ in range(options.rounds):
            for name, found in reports.items():
                found.append(run(name, base))
    show(options, reports)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="28M")
    parser.add_argument("--programs", default="ours,peft,trl")
    for name, value in (("steps", 8), ("rounds", 3), ("rows", 1), ("sequence", 256), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(name: str, base: Path) -> dict[str, Any]:
    """One program, as a process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--base", str(base), "--child", name]
    # With spinning threads a busy core costs a factor; the command line of ours sets the same.
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "GOMP_SPINCOUNT": "10000"})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def show(options: argparse.Namespace, reports: dict[str, list[dict[str, Any]]]) -> None:
    """A table, and what ours takes of each of the others."""
    keys = ("step", "cpu", "peak", "load")
    medians = {name: {key: statistics.median(one[key] for one in found) for key in keys} for name, found in reports.items()}
    tokens = options.rows * options.sequence
    how = ", checkpointing" if options.checkpointing else ""
    print(f"{options.base}, r = {R} on all linears, {options.rows} x {options.sequence} tokens, threads {options.threads}{how}")
    print(f"medians of {options.rounds} alternating rounds of {options.steps} steps; load average {os.getloadavg()[0]:.1f}")
    print(f"{'':8}{'s/step':>9}{'CPU s':>9}{'tokens/s':>10}{'load s':>9}{'peak MB':>10}{'first loss':>12}{'last loss':>11}")
    for name, one in medians.items():
        losses = reports[name][0]["losses"]
        print(
            f"{name:8}{one['step']:9.3f}{one['cpu']:9.3f}{tokens / one['step']:10.0f}{one['load']:9.1f}"
            f"{one['peak'] / 1e6:10.0f}{losses[0]:12.4f}{losses[-1]:11.4f}"
        )
    for name, one in medians.items():
        if name != "ours" and "ours" in medians:
            ratios = {key: medians["ours"][key] / one[key] for key in keys}
            # Round by round: what slows down one round slows down both sides of its ratio.
            pairs = [ours["cpu"] / other["cpu"] for ours, other in zip(reports["ours"], reports[name], strict=True)]
            print(
                f"ours is {ratios['step']:.2f}x of {name} in time, {ratios['cpu']:.2f}x in CPU time "
                f"({min(pairs):.2f} to {max(pairs):.2f} over the rounds), {ratios['peak']:.2f}x in memory"
            )


def made(shape: str, folder: Path) -> Path:
    """A folder with random bfloat16 weights of that shape, and a tokenizer that nobody asks."""
    path = [f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})"]
    code = "; ".join(["import sys", *path, "import train", f"train.write({shape!r}, {str(folder)!r})"])
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder


def write(shape: str, folder: str) -> None:
    """In a process of its own, whose memory is gone with it."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    with torch.device("meta"):
        config = transformers.LlamaConfig(**SHAPES[shape], bos_token_id=1, eos_token_id=2)
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")).save(f"{folder}/tokenizer.json")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "a", "bos_token": "<s>"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(kind))


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One program's run."""
    import torch

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    steps = PROGRAMS[options.child](options)
    load = time.monotonic() - started
    times, busy, losses = steps()
    return {
        "step": statistics.median(times[WARM:] or times),
        "cpu": statistics.median(busy[WARM:] or busy),
        "load": load,
        "peak": peak(),
        "losses": losses,
    }


def peak() -> int:
    """The most bytes this process has held."""
    # ru_maxrss would count what the parent held before it started this program (getrusage(2)).
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


Steps = Callable[[], tuple[list[float], list[float], list[float]]]
"""Runs all steps: seconds, CPU seconds and loss of each."""


def each(options: argparse.Namespace, step: Callable[[int], float]) -> Steps:
    def steps() -> tuple[list[float], list[float], list[float]]:
        times, busy, losses = [], [], []
        for number in range(options.steps):
            started, cpu = time.monotonic(), time.process_time()
            losses.append(step(number))
            times.append(time.monotonic() - started)
            busy.append(time.process_time() - cpu)
        return times, busy, losses

    return steps


def rows_of(options: argparse.Namespace) -> Any:
    """Random rows, one document each: int64 ids `(steps * rows, sequence)`."""
    import numpy as np

    vocabulary = json.loads((Path(options.base) / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(3, vocabulary, (options.steps * options.rows, options.sequence))


def ours(options: argparse.Namespace) -> Steps:
    import numpy as np

    from adapterhub.train import config
    from adapterhub.train.data import dataset as data
    from adapterhub.train.layers import lora
    from adapterhub.train.loop import loop
    from adapterhub.train.model import base

    made = base.load(Path(options.base), config.BaseConfig(options.base), config.LoRAConfig(r=R, alpha=ALPHA), where="")
    if options.checkpointing:
        made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora.reset(made.model, 0)
    settings = config.OptimConfig(rows=options.rows, learning_rate=RATE, schedule="constant")
    ids = rows_of(options)
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], data.IGNORED)], axis=1)
    rows = data.Rows(ids, labels, np.tile(np.arange(options.sequence), (len(ids), 1)))
    state = loop.new_state(made.model, settings)
    state.order = np.arange(len(ids))
    return each(options, lambda _: float(loop.advance(made, rows, state, settings, options.steps)["loss"]))


def quantized(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base as transformers and bitsandbytes make it, and what peft adapts of it."""
    import torch
    import transformers
    from peft import LoraConfig

    words = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.base, quantization_config=words, dtype=torch.bfloat16, device_map="cpu"
    )
    torch.manual_seed(0)
    return model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def peft(options: argparse.Namespace) -> Steps:
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training

    model, words = quantized(options)
    kinds = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if options.checkpointing else {}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.checkpointing, **kinds)
    return usual(options, get_peft_model(model, words), autocast=torch.bfloat16)


def full(options: argparse.Namespace) -> Steps:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return usual(options, model, autocast=None)


def usual(options: argparse.Namespace, model: Any, *, autocast: Any) -> Steps:
    """The loop that everybody writes."""
    import torch

    ids = torch.from_numpy(rows_of(options))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()

    def step(number: int) -> float:
        chosen = ids[number * options.rows : (number + 1) * options.rows]
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(input_ids=chosen, labels=chosen, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return each(options, step)


def trl(options: argparse.Namespace) -> Steps:
    import datasets
    import transformers
    import trl as library

    times: list[float] = []
    busy: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started, self.cpu = time.monotonic(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic() - self.started)
            busy.append(time.process_time() - self.cpu)

    words = library.SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=options.steps, per_device_train_batch_size=options.rows, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, train_sampling_strategy="sequential", use_cpu=True,
        bf16=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, max_length=options.sequence,
        gradient_checkpointing=options.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    dataset = datasets.Dataset.from_dict({"input_ids": rows_of(options).tolist()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.base)
    model, adapter = quantized(options)
    trainer = library.SFTTrainer(
        model, args=words, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter, callbacks=[Clock()]
    )

    def steps() -> tuple[list[float], list[float], list[float]]:
        trainer.train()
        return times, busy, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    return steps


PROGRAMS: dict[str, Callable[[argparse.Namespace], Steps]] = {"ours": ours, "peft": peft, "trl": trl, "full": full}

if __name__ == "__main__":
    main()
