"""The finished folder: weights and config for peft, a model card, the loss curve, the log, and adapter.json.

It is written next to its destination and renamed once it is complete. It contains no time, path or host name, so the same
training gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from adapterhub.manifest import derive
from adapterhub.manifest.document import TRAINER, FileEntry, KeptCheckpoint, LossPoint, Parent, Training, TrainingData
from adapterhub.training import compute_device
from adapterhub.training.cost.memory import flops, parameters
from adapterhub.training.loop.state import State
from adapterhub.training.model import adapter_transfer
from adapterhub.training.model.base_model import Base
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters import trained_prompt
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.display import front_matter, markdown
from adapterhub_converters.errors import LocalIOError
from adapterhub_converters.formats import peft

_SPLIT_NAMES = {"train": "training", "heldout": "held-out"}
_CURVE_POINTS = 100  # in adapter.json; log.jsonl has all losses
_AVERAGED_STEPS = 10  # at the end, for the reported training loss


def check_place(out: Path) -> None:
    """Create the parent folder of `out`, and raise LocalIOError now, rather than after an hour, if `out` cannot be written."""
    with atomic.scratch_folder(out):
        return


def check_space(config: TrainConfig, out: Path, parameters: int) -> None:
    """Raise LocalIOError if the disk of `out` has no room for the adapter and for two checkpoints, of `parameters` numbers."""
    moments = 8 if config.train.optimizer == "adamw" else 2  # bytes
    # A new checkpoint is complete before it replaces the last one.
    needed = parameters * (4 + 2 * (4 + moments + 4 * config.train.keep_best))
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        problem = f"the adapter and its checkpoints take {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left"
        raise LocalIOError(str(out), problem, "Free some space, or write to another disk")


def finish(
    config: TrainConfig,
    spec: BaseSpec,
    base: Base,
    state: State,
    *,
    record: Mapping[str, Any],
    context: float,
    out: Path,
    parents: Sequence[Mapping[str, Any]] = (),
    replace: bool = False,
) -> None:
    """Write the folder `out`, completely or not at all; with `replace`, in place of an existing adapter.

    `record` is the training in adapter.json without its metrics, and `context` the mean length of a token's document.
    """
    training = {
        **record,
        "metrics": {**metrics(state), **_work_metrics(config, spec, base, state, context)},
        "curve": curve(state),
        "checkpoints": kept_checkpoints(state),
    }
    with atomic.pending_output(out, replace=replace) as folder:
        peft.write(adapter_transfer.trained_adapter(config, base), folder)
        if config.data.chat_template is not None:
            json_file.write_text(folder / trained_prompt.FILE, base.tokenizer.chat_template)
        json_file.write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in state.log))
        _plot(config, state, folder / "loss.png")
        json_file.write_text(folder / "README.md", model_card(config, training, parents))
        _write_manifest(config, spec, training, folder, parents)


def metrics(state: State) -> dict[str, float]:
    """Return the training loss over the last steps, and the results on the held-out data before and after.

    These are the loss with the perplexity, or for pairs with accuracy and margin.
    """
    losses = [line["loss"] for line in state.log if "loss" in line]
    last_losses = losses[-_AVERAGED_STEPS:]
    values = {"train_loss": sum(last_losses) / len(last_losses), "train_tokens": state.tokens, "train_steps": state.step}
    evaluations = {line["step"]: line for line in state.log if "heldout_loss" in line}
    # A program that does the steps itself may not have evaluated before or after them.
    if 0 in evaluations and state.kept_step in evaluations:
        for suffix, line in (("_before", evaluations[0]), ("", evaluations[state.kept_step])):
            values[f"heldout_loss{suffix}"] = line["heldout_loss"]
            if "heldout_accuracy" in line:
                values |= {f"{name}{suffix}": line[name] for name in ("heldout_accuracy", "heldout_margin")}
            else:
                values[f"heldout_perplexity{suffix}"] = math.exp(line["heldout_loss"])
    return values


def _work_metrics(config: TrainConfig, spec: BaseSpec, base: Base, state: State, context: float) -> dict[str, float]:
    """Return the amount of training and of computation, derived from the config and the base alone."""
    trained, frozen = sum(p.numel() for p in base.model.parameters() if p.requires_grad), parameters(config, spec)[0]
    return {
        "base_parameters": frozen,
        "trained_share": trained / (frozen + trained),
        # As a float: an integer beyond 2^53 has no exact form in other programs.
        "flops": float(flops(config, spec, tokens=state.read, label_tokens=state.tokens, trained=trained, context=context)),
    }


def curve(state: State) -> list[dict[str, float]]:
    """Return the losses by step: every held-out loss, and at most _CURVE_POINTS training losses, evenly spaced."""
    steps = [line for line in state.log if "loss" in line]
    stride = max(1, -(len(steps) // -_CURVE_POINTS))
    # Counted from the end, so that the last step is always among them.
    chosen_ids = {id(line) for line in steps[::-1][::stride]}
    return [
        {key: line[key] for key in ("step", "loss", "heldout_loss") if key in line}
        for line in state.log
        if "heldout_loss" in line or id(line) in chosen_ids
    ]


def kept_checkpoints(state: State) -> list[dict[str, Any]]:
    """Return the step, the digest and the size in bytes of every checkpoint that stays."""
    return [
        {"step": line["step"], "digest": line["checkpoint"], "size": line["size"]} for line in state.log if "checkpoint" in line
    ]


def versions(thread_count: int, device: Any) -> dict[str, str]:
    """Return the versions and the hardware that the bytes of the result depend on."""
    import torch

    result = {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": str(thread_count)}
    if name := compute_device.name(device):
        result |= {"cuda": str(torch.version.cuda), "device": name, "tf32": str(torch.backends.cuda.matmul.allow_tf32).lower()}
    for name in ("adapterhub", "bitsandbytes", "tokenizers", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[name] = metadata.version(name)
    return result


def _plot(config: TrainConfig, state: State, path: Path) -> None:
    from .loss_curve import loss_curve

    name = (config.base.name or Path(config.base.path).name).rpartition("/")[2]
    quantized = "QLoRA, NF4 base" if config.base.quantize == "nf4" else "LoRA"
    title, subtitle = f"{config.card.title or 'Adapter'} on {name}", f"{quantized}, r = {config.lora.r}"
    loss_curve(state.log, path, kept_step=state.kept_step, title=title, subtitle=subtitle)


def _write_manifest(
    config: TrainConfig, spec: BaseSpec, training: Mapping[str, Any], folder: Path, parents: Sequence[Mapping[str, Any]]
) -> None:
    card, base = config.card, config.base
    quantization = base.quantize if base.quantize != "none" else None
    names = {"repo": base.name, "revision": base.revision, "quantization": quantization}
    texts = {"license": card.license, "description": card.description}
    # Keys without a value are left out, not null.
    declared: dict[str, Any] = {key: value for key, value in texts.items() if value}
    declared["base"] = {key: value for key, value in names.items() if value}
    record = Training(
        **{
            **training,
            "recorder": TRAINER,
            "data": tuple(TrainingData(**item) for item in training["data"]),
            "weights": tuple(FileEntry(**item) for item in training["weights"]),
            "curve": tuple(LossPoint(**point) for point in training["curve"]),
            "checkpoints": tuple(KeptCheckpoint(**item) for item in training["checkpoints"]) or None,
        }
    )
    manifest_parents = [Parent(**parent) for parent in parents]
    derive.describe(folder, base=spec, training=record, parents=manifest_parents, declared=declared).write(folder)


def model_card(config: TrainConfig, training: Mapping[str, Any], parents: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the model card: the front matter that the Hugging Face Hub reads, and a summary for people."""
    title = config.card.title or "LoRA adapter"
    front: dict[str, Any] = {
        "base_model": config.base.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": config.card.license,
        "language": list(config.card.language),
        "tags": ["lora", *(["qlora"] if config.base.quantize == "nf4" else []), *config.card.tags],
    }
    metric_values, lora, optim = training["metrics"], config.lora, config.train
    rows = [
        ("base", f"{markdown(config.base.name or config.base.path)}, {config.base.quantize} while training"),
        *(("continues", markdown(parent.get("ref") or parent["digest"])) for parent in parents),
        ("r, alpha", f"{lora.r}, {lora.alpha:g}{' (rsLoRA)' if lora.rslora else ''}"),
        ("targets", markdown(lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets))),
        ("steps", f"{training['metrics']['train_steps']} of {optim.rows} x {config.data.sequence} tokens"),
        ("learning rate", f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup} steps of warm-up"),
        ("seed", str(optim.seed)),
        *([("preference", f"{config.preference.method}, beta {config.preference.strength:g}")] if config.preference else []),
        ("training loss", f"{metric_values['train_loss']:.3f}{'' if config.preference else ' nats a token'}"),
    ]
    if "heldout_accuracy" in metric_values:
        before, after = metric_values["heldout_accuracy_before"], metric_values["heldout_accuracy"]
        rows.append(("held-out pairs preferred", f"{before:.1%} before, **{after:.1%}** after"))
    if "heldout_perplexity" in metric_values:
        before, after = metric_values["heldout_perplexity_before"], metric_values["heldout_perplexity"]
        rows.append(("held-out perplexity", f"{before:.2f} before, **{after:.2f}** after"))
    rows += [
        (f"{_SPLIT_NAMES[item['split']]} data", f"{item['documents']} documents, {item['digest'][:19]}…")
        for item in training["data"]
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "\n".join(front_matter(front)) + f"\n\n# {markdown(title)}\n\n{config.card.description or 'A LoRA adapter.'}\n\n"
        f"![Loss by step](loss.png)\n\n| | |\n| --- | --- |\n{table}\n\n{_usage(config)}"
        "`adapter.json` has the whole record: config, data digests, versions.\n"
    )


def _usage(config: TrainConfig) -> str:
    """Return the section of a card with the lines that load the adapter onto its base."""
    base = json.dumps(config.base.name or config.base.path)
    return (
        "## Load it\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, "PATH")\n```\n\n'
        "`PATH` is the folder with this file.\n\n"
    )
