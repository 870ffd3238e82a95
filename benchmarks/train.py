"""A QLoRA step of ours against transformers, peft and bitsandbytes, trl, and full fine-tuning: time and peak memory.

    python benchmarks/train.py [--base 28M|0.66B|1.1B|FOLDER] [--rows 1] [--sequence 256] [--steps 8] [--rounds 3]
                               [--threads 1] [--busy] [--checkpointing] [--against trl] [--device cuda [--plan]]
                               [--dtype bfloat16|float32]

28M, 1.1B (TinyLlama's shape) and 0.66B (its first 12 layers) are random weights that this script makes. A program reports
the medians of its steps in wall and CPU time, the first two not counted. CPU time on one thread is what a busy machine
disturbs least. Ours holds the base as the trainer decides: dequantized where the processor multiplies bfloat16 fast and memory
allows, else in NF4, whose dequantizing is faster with bitsandbytes. With --busy, ours runs also beside a program that keeps one
core busy, which with several threads tells what their waiting costs. All train on the same random rows in the same order at the
same rate, from the same base with the same kernels (bitsandbytes) and lora_B zero: their first losses must agree.

On a graphics card, all that is to be known of it is one run, with and without --checkpointing:

    python benchmarks/train.py --device cuda --base Llama-3-8B --rows 2 --sequence 2048 --checkpointing

It adds the memory of the card and, where its data sheet is known, the share of that rate (MFU). Full fine-tuning is left out.
--plan needs no card, no weights and no peer: it prints the memory and the operations of a step, and the tokens a second that no
program can exceed.

peft is the usual loop: `prepare_model_for_kbit_training`, autocast to bfloat16, AdamW. trl is `SFTTrainer`, given the
quantized base and peft's config. With --dtype float32, all compute in float32 without autocast: CPUs without AVX-512 multiply
bfloat16 in a slow loop, which hides everything else. Full fine-tuning trains every parameter in float32 with AdamW and
checkpointing, as transformers does; of a 1.1B model it takes 19 GB of memory.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from _bench import Bench, Figures, Program, main, medians, process
from _models import MODELS, base

BUSY = "adapterhub, beside a busy core"
PLAIN = "adapterhub, without bitsandbytes"
PEFT, TRL, FULL = "transformers, peft and bitsandbytes", "trl's SFTTrainer", "full fine-tuning in float32"
JOBS = {"QLoRA step": [PLAIN, BUSY, PEFT, TRL, FULL]}
NEEDS = {"adapterhub": [], PLAIN: [], BUSY: [], PEFT: ["peft"], TRL: ["peft", "trl", "datasets"], FULL: []}
RATE, R, ALPHA = 1e-3, 16, 32
WARM = 2  # steps that are not counted


def steps(bench: Bench) -> None:
    options = bench.options
    if options.plan:
        planned(bench)
        return
    folder = bench.input_folder(with_tokenizer, options.base) if options.base in MODELS else options.base
    option_values = {**vars(options), "base": folder, "scratch": bench.scratch}
    programs = []
    for name, extras in NEEDS.items():
        if (name == BUSY and not options.busy) or (name == FULL and options.device != "cpu"):
            continue
        needs = ["torch", "transformers", *([] if name == PLAIN else ["bitsandbytes"]), *extras]
        # With spinning threads a busy core costs a factor; the command line of ours sets the same.
        spin = {"GOMP_SPINCOUNT": "0" if name == BUSY else "1000"}
        programs.append(Program(name, process(child, name, option_values), needs, spin, itself=True))
    turns = bench.turns(*programs)
    if not options.busy:
        turns[BUSY] = "--busy"
    if options.device != "cpu":
        turns[FULL] = "--device cpu"
    first = [turn["first loss"] for name, turn in turns.items() if name != FULL and not isinstance(turn, str)]
    losses = ", ".join(f"{loss:.4f}" for loss in first)
    claims = {f"first losses agree within 1%: {losses}": max(first) < 1.01 * min(first)} if first else {}
    detail = f"{options.base}, r = {R} on all linear layers, {options.rows} x {options.sequence} tokens"
    checkpointing_note = ", checkpointing" if options.checkpointing else ""
    bench.add(
        "QLoRA step",
        f"{detail}, threads: {options.threads}{checkpointing_note}, {options.device}, {options.dtype}",
        turns,
        claims,
    )


def planned(bench: Bench) -> None:
    """What a step needs at the least, by the headers of the base."""
    options = bench.options
    folder = bench.input_folder(base, options.base, values=False) if options.base in MODELS else Path(options.base)
    figures = plan_of(folder, vars(options))
    bench.jobs = {"QLoRA step": []}
    bench.add("QLoRA step", f"{options.base}, {options.rows} x {options.sequence} tokens, planned", {"adapterhub": figures})


def plan_of(folder: Path, option_values: dict[str, Any]) -> Figures:
    from adapterhub.training.cost import memory, peaks

    config, spec = config_of(folder, option_values)
    card = int(option_values["memory"] * 1e9) if option_values["device"] == "cuda" else None
    plan, operations = memory.plan(config, spec, card=card), step_operations(folder, option_values)
    figures = {f"{part} MB": size / 1e6 for part, size in plan.parts().items() if size} | {"planned MB": plan.total / 1e6}
    figures["TFLOP"] = operations / 1e12
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3") if card else ():
        rate = peaks.peak_rate(name, "bfloat16") or math.nan
        figures[f"at most, {name.split()[1].partition('-')[0]} tokens/s"] = (
            option_values["rows"] * option_values["sequence"] * rate / operations
        )
    return figures


def config_of(folder: Path, option_values: dict[str, Any]) -> tuple[Any, Any]:
    """The config of ours, and the base by its headers."""
    from adapterhub.training import config_file
    from adapterhub_converters.bases import read_base

    text = f"""
[base]
path = {json.dumps(str(folder))}
device = {json.dumps(option_values["device"])}
dtype = {json.dumps(option_values["dtype"])}
[data]
train = ["none"]
sequence = {option_values["sequence"]}
[lora]
r = {R}
alpha = {ALPHA}
[train]
rows = {option_values["rows"]}
checkpointing = {json.dumps(option_values["checkpointing"])}
"""
    return config_file.parse(text, folder=Path(), location="benchmark"), read_base(folder)


def step_operations(folder: Path, option_values: dict[str, Any]) -> int:
    """The operations of a step by the model's arithmetic."""
    from adapterhub.training.cost import memory

    config, spec = config_of(folder, option_values)
    trained, tokens = memory.parameters(config, spec)[1], option_values["rows"] * option_values["sequence"]
    labels = tokens - option_values["rows"]
    return memory.flops(config, spec, tokens=tokens, label_tokens=labels, trained=trained, context=option_values["sequence"])


def with_tokenizer(folder: str, model: str) -> None:
    """A random base, and a tokenizer that is loaded but not used."""
    from tokenizers import Tokenizer, models

    base(folder, model)
    Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")).save(f"{folder}/tokenizer.json")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "a", "bos_token": "<s>"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(kind))


def child(program: str, option_values: dict[str, Any]) -> Figures:
    """The run of one program."""
    import torch

    options = Namespace(**option_values)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    if program == PLAIN:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # every import of it fails
    run = {"adapterhub": ours, PLAIN: ours, BUSY: ours, PEFT: peft, TRL: trl, FULL: full}[program](options)
    load = time.monotonic() - started
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) if program == BUSY else nullcontext() as busy_process:
        times, losses = run()
        if busy_process:
            busy_process.kill()
    middle = medians(times[WARM:] or times)
    rate = options.rows * options.sequence / middle["seconds"]
    card = of_card(options, middle["seconds"]) if options.device == "cuda" else {}
    return {**middle, "tokens/s": rate, **card, "load seconds": load, "first loss": losses[0], "last loss": losses[-1]}


def of_card(options: Namespace, seconds: float) -> Figures:
    """The memory that this program has held of the card, and the share of its rate."""
    import torch

    from adapterhub.training.cost.peaks import peak_rate

    peak = peak_rate(torch.cuda.get_device_name(), "bfloat16")
    share = {"MFU": step_operations(Path(options.base), vars(options)) / seconds / peak} if peak else {}
    return {"card MB": torch.cuda.max_memory_allocated() / 1e6, **share}


Steps = Callable[[], tuple[list[Figures], list[float]]]
"""Runs all steps: the time and the loss of each."""


def timed_steps(options: Namespace, step: Callable[[int], float]) -> Steps:
    def run() -> tuple[list[Figures], list[float]]:
        times, losses = [], []
        for number in range(options.steps):
            started, cpu = time.monotonic(), time.process_time()
            losses.append(step(number))
            times.append({"seconds": time.monotonic() - started, "CPU seconds": time.process_time() - cpu})
        return times, losses

    return run


def rows_of(options: Namespace) -> Any:
    """Random rows, one document each: int64 ids `(steps * rows, sequence)`."""
    import numpy as np

    vocabulary = json.loads((Path(options.base) / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(3, vocabulary, (options.steps * options.rows, options.sequence))


def ours(options: Namespace) -> Steps:
    import numpy as np
    import torch

    from adapterhub.training import compute_device, machine, train_config
    from adapterhub.training.cost import budget
    from adapterhub.training.data.packed_rows import IGNORED, Rows
    from adapterhub.training.layers import lora
    from adapterhub.training.loop import training_loop
    from adapterhub.training.loop.state import new_state
    from adapterhub.training.model.base_files import BaseFiles
    from adapterhub.training.model.loading import dequantize, load

    with BaseFiles(Path(options.base)) as files:
        device, adapter = compute_device.select(options.device), train_config.LoRAConfig(r=R, alpha=ALPHA)
        loaded = load(files, train_config.BaseConfig(options.base, dtype=options.dtype), adapter, location="", device=device)
    # As the trainer decides it for this machine.
    is_fast = options.device == "cpu" and machine.multiplies_bfloat16_fast()
    planned_config = budget.resolve_auto(
        *config_of(Path(options.base), vars(options)), free=machine.free_memory(), is_fast=is_fast
    )
    if planned_config.dequantized:
        dequantize(loaded.model, getattr(torch, options.dtype))
    if options.checkpointing:
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora.reset(loaded.model, 0)
    settings = train_config.OptimConfig(rows=options.rows, learning_rate=RATE, schedule="constant")
    ids = rows_of(options)
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], IGNORED)], axis=1)
    rows = Rows(ids, labels, np.tile(np.arange(options.sequence), (len(ids), 1)))
    state = new_state(loaded.model, settings)
    state.order = np.arange(len(ids))
    return timed_steps(options, lambda _: float(training_loop.advance(loaded, rows, state, settings, options.steps)["loss"]))


def quantized(options: Namespace) -> tuple[Any, Any]:
    """The base as transformers and bitsandbytes make it, and peft's config."""
    import torch
    import transformers
    from peft import LoraConfig

    dtype = getattr(torch, options.dtype)
    words = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.base, quantization_config=words, dtype=dtype, device_map={"": options.device}
    )
    torch.manual_seed(0)
    return model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def peft(options: Namespace) -> Steps:
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training

    model, config = quantized(options)
    kinds = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if options.checkpointing else {}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.checkpointing, **kinds)
    return usual(options, get_peft_model(model, config), autocast=None if options.dtype == "float32" else torch.bfloat16)


def full(options: Namespace) -> Steps:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return usual(options, model, autocast=None)


def usual(options: Namespace, model: Any, *, autocast: Any) -> Steps:
    """The loop that everybody writes."""
    import torch

    ids = torch.from_numpy(rows_of(options)).to(options.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()

    def step(number: int) -> float:
        chosen = ids[number * options.rows : (number + 1) * options.rows]
        with torch.autocast(options.device, autocast, enabled=autocast is not None):
            loss = model(input_ids=chosen, labels=chosen, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return timed_steps(options, step)


def trl(options: Namespace) -> Steps:
    import datasets
    import transformers
    import trl as library

    times: list[Figures] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started, self.cpu = time.monotonic(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append({"seconds": time.monotonic() - self.started, "CPU seconds": time.process_time() - self.cpu})

    config = library.SFTConfig(
        output_dir=options.scratch, max_steps=options.steps, per_device_train_batch_size=options.rows, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, train_sampling_strategy="sequential",
        use_cpu=options.device == "cpu", bf16=options.dtype == "bfloat16", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
        max_length=options.sequence, gradient_checkpointing=options.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    dataset = datasets.Dataset.from_dict({"input_ids": rows_of(options).tolist()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.base)
    model, adapter = quantized(options)
    trainer = library.SFTTrainer(
        model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter, callbacks=[Clock()]
    )

    def run() -> tuple[list[Figures], list[float]]:
        trainer.train()
        return times, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    return run


if __name__ == "__main__":
    sizes: dict[str, tuple[Any, Any]] = {"base": ("28M", "tiny"), "steps": (8, 3), "rounds": (3, 1), "rows": (1, 1)}
    sizes |= {"sequence": (256, 16), "threads": (1, 1), "busy": (False, True), "checkpointing": (False, False)}
    sizes["dtype"] = ("bfloat16", "bfloat16")
    main(__doc__, JOBS, steps, **sizes, device=("cpu", "cpu"), plan=(False, False), memory=(80.0, 80.0))
