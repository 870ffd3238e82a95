"""The finished folder: weights and config for peft, a model card, the curve, the log, and the manifest.

It is written beside its place and renamed when it is whole. No clock, path or host name is in it, so the same
training gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from adapterhub.manifest import describe
from adapterhub.manifest.document import FileEntry, LossPoint, Parent, Training, TrainingData
from adapterhub.train import devices
from adapterhub.train.config import TrainConfig
from adapterhub.train.cost.memory import flops, parameters
from adapterhub.train.loop.loop import State
from adapterhub.train.model import trained_adapter
from adapterhub.train.model.base import Base
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.formats import peft

_SPLITS = {"train": "training", "heldout": "held-out"}
_POINTS = 100  # of the loss curve in adapter.json; log.jsonl has all of them
_SMOOTH = 10  # last steps that the reported training loss is the mean of


def check_place(out: Path) -> None:
    """LocalIOError unless a folder can be made beside `out`, now rather than after an hour; what leads there is made."""
    with atomic.beside(out):
        return


def finish(
    config: TrainConfig,
    base: Base,
    state: State,
    record: Mapping[str, Any],
    out: Path,
    *,
    parents: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write the folder `out`, whole or not at all; returns the training's record with its metrics."""
    training = {**record, "metrics": {**metrics(state), **_work(config, base, state)}, "curve": curve(state)}
    with atomic.whole(out) as folder:
        peft.write(trained_adapter.adapter(config, base), folder)
        json_file.write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in state.log))
        _plot(config, state, folder / "loss.png")
        json_file.write_text(folder / "README.md", card(config, training))
        _write_manifest(config, training, folder, parents)
    return training


def metrics(state: State) -> dict[str, float]:
    """Training loss over the last steps, and held-out loss and perplexity before and after."""
    losses = [line["loss"] for line in state.log if "loss" in line]
    last = losses[-_SMOOTH:]
    found = {"train_loss": sum(last) / len(last), "train_tokens": state.tokens}
    before, after = state.heldout(0), state.heldout(state.kept)
    if before is not None and after is not None:
        found |= {
            "heldout_loss_before": before,
            "heldout_loss": after,
            "heldout_perplexity_before": math.exp(before),
            "heldout_perplexity": math.exp(after),
        }
    return found


def _work(config: TrainConfig, base: Base, state: State) -> dict[str, float]:
    """How much learned and how much was computed, as the config and the base say: no clock."""
    trained, frozen = sum(p.numel() for p in base.model.parameters() if p.requires_grad), parameters(config)[0]
    tokens = state.step * config.train.rows * config.data.sequence
    return {
        "base_parameters": frozen,
        "trained_share": trained / (frozen + trained),
        "flops": flops(config, tokens=tokens, learned=state.tokens, trained=trained),
    }


def curve(state: State) -> list[dict[str, float]]:
    """The losses over the steps: every held-out one, and of those in training at most _POINTS, evenly and the last."""
    steps = [line for line in state.log if "loss" in line]
    every = max(1, -(len(steps) // -_POINTS))
    kept = {id(line) for line in steps[::-1][::every]}
    return [
        {key: line[key] for key in ("step", "loss", "heldout_loss") if key in line}
        for line in state.log
        if "heldout_loss" in line or id(line) in kept
    ]


def versions(thread_count: int, device: Any) -> dict[str, str]:
    """What the bytes of the result depend on besides config, data and base."""
    import torch

    found = {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": str(thread_count)}
    if name := devices.name(device):
        found |= {"cuda": str(torch.version.cuda), "device": name}
    for name in ("adapterhub", "bitsandbytes", "tokenizers", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _plot(config: TrainConfig, state: State, path: Path) -> None:
    from .loss_curve import loss_curve

    name = (config.base.name or Path(config.base.path).name).rpartition("/")[2]
    quantized = "QLoRA, NF4 base" if config.base.quantize == "nf4" else "LoRA"
    title, subtitle = f"{config.card.title or 'Adapter'} on {name}", f"{quantized}, r = {config.lora.r}"
    loss_curve(state.log, path, kept=state.kept, title=title, subtitle=subtitle)


def _write_manifest(
    config: TrainConfig, training: Mapping[str, Any], folder: Path, parents: Sequence[Mapping[str, Any]]
) -> None:
    declared = {"license": config.card.license, "description": config.card.description or None}
    base = {"repo": config.base.name, "revision": config.base.revision}
    base["quantization"] = config.base.quantize if config.base.quantize != "none" else None
    declared = {key: value for key, value in declared.items() if value}
    given = {key: value for key, value in base.items() if value}
    spec = read_base(config.resolve(config.base.path))
    record = Training(
        **{
            **training,
            "data": tuple(TrainingData(**item) for item in training["data"]),
            "weights": tuple(FileEntry(**item) for item in training["weights"]),
            "curve": tuple(LossPoint(**point) for point in training["curve"]),
        }
    )
    made = [Parent(**parent) for parent in parents]
    describe.describe(folder, base=spec, training=record, parents=made, declared={**declared, "base": given}).write(folder)


def card(config: TrainConfig, training: Mapping[str, Any]) -> str:
    """The model card: the front matter that the Hugging Face Hub reads, and what a person wants to know."""
    title = config.card.title or "LoRA adapter"
    front: dict[str, Any] = {
        "base_model": config.base.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": config.card.license,
        "language": list(config.card.language),
        "tags": ["lora", *(["qlora"] if config.base.quantize == "nf4" else []), *config.card.tags],
    }
    # JSON is YAML, so a title with a colon in it stays a title.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items() if value]
    numbers, lora, optim = training["metrics"], config.lora, config.train
    rows = [
        ("base", f"{config.base.name or config.base.path}, {config.base.quantize} while training"),
        ("r, alpha", f"{lora.r}, {lora.alpha:g}{' (rsLoRA)' if lora.rslora else ''}"),
        ("targets", lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)),
        ("steps", f"{training['config']['steps']} of {optim.rows} x {config.data.sequence} tokens"),
        ("learning rate", f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup} steps of warm-up"),
        ("seed", str(optim.seed)),
        ("training loss", f"{numbers['train_loss']:.3f} nats a token"),
    ]
    if "heldout_perplexity" in numbers:
        before, after = numbers["heldout_perplexity_before"], numbers["heldout_perplexity"]
        rows.append(("held-out perplexity", f"{before:.2f} before, **{after:.2f}** after"))
    rows += [
        (f"{_SPLITS[item['split']]} data", f"{item['documents']} documents, {item['digest'][:19]}…")
        for item in training["data"]
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\n" + "\n".join(lines) + f"\n---\n\n# {title}\n\n{config.card.description or 'A LoRA adapter.'}\n\n"
        f"![Loss by step](loss.png)\n\n| | |\n| --- | --- |\n{table}\n\n"
        "`adapter.json` has the whole record: config, data digests, versions.\n"
    )
