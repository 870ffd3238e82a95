"""What every key of a config is for and why its default is what it is, and a config that says it in comments.

From the papers named, and from "LoRA Without Regret" (Schulman and Thinking Machines Lab, thinkingmachines.ai/blog/lora, 2025).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapterhub_converters.errors import UsageError

from .config import BaseConfig, CardConfig, DataConfig, LoRAConfig, OptimConfig

_SECTIONS: dict[str, type] = {
    "base": BaseConfig, "data": DataConfig, "lora": LoRAConfig, "train": OptimConfig, "card": CardConfig,
}  # fmt: skip
_WHY: dict[str, dict[str, str]] = {
    "base": {
        "path": (
            "The model that is adapted: a folder as Hugging Face stores it, in floats or in bitsandbytes' NF4, or a GGUF file. "
            "There is no default: it is yours to choose."
        ),
        "name": (
            "What the model is called where others get it, owner/model. It goes into the adapter, a path doesn't: that "
            "means nothing on another machine."
        ),
        "revision": ("The commit of the base, where it has one. A branch moves, and with it what the adapter was trained on."),
        "quantize": (
            "nf4 holds the linear layers in 4.127 bits a weight with double quantization. The QLoRA paper (arXiv "
            "2305.14314) found no loss against 16 bits over its models: mean MMLU 53.1 against 53.0. none holds them "
            "as dtype: faster where memory doesn't matter."
        ),
        "dtype": (
            "What is computed in. bfloat16 has the range of float32, so nothing overflows; with float16 one in five of "
            "QLoRA's own runs at 7 B did not finish: it is for cards without bfloat16, and has its loss scaled. float32 is for "
            "comparisons."
        ),
        "device": (
            "auto takes a CUDA device where torch sees one, of several processes each its own, and else the CPU. The base is "
            "quantized on the CPU either way, so that its codes are the same."
        ),
        "cache": (
            "A base that was quantized once is kept in the user's cache folder, about a quarter of its 16 bits, and read from "
            "there as long as its files are the same. The result is the same, byte for byte; false keeps nothing."
        ),
        "shard": (
            "Of several processes, each holds only its part of the quantized base and gets the rest when it is needed. "
            "Off: in four bits most bases fit whole, and nothing has to be sent."
        ),
    },
    "data": {
        "train": "What is learned: files of documents with text, with prompt and completion, or with messages.",
        "heldout": (
            "Documents never trained on, asked about before and after: without them nobody knows whether it learned or "
            "memorized."
        ),
        "heldout_share": (
            "Instead of heldout, a share of the training documents. 0 takes none: what is learned stays what you gave."
        ),
        "sequence": (
            "Tokens in a row. 512 holds most instructions; memory grows with it, and documents that are longer are cut "
            "or go on in the next row."
        ),
        "pack": "Documents share rows without seeing each other, so that no arithmetic goes into padding.",
        "loss": (
            "completion learns the answers alone. Prompts are given at inference, and the QLoRA paper found training "
            "on the answers only better on MMLU. all is for text without prompts, where both are the same."
        ),
        "heldout_tokens": (
            "An evaluation over 8192 tokens, evenly from all documents, is near enough and costs little; perplexities "
            "compare only at the same number."
        ),
    },
    "lora": {
        "r": (
            "The rank. The QLoRA paper found that with all layers adapted the rank hardly matters; LoRA Without Regret "
            "that LoRA learns as full fine-tuning does until its capacity is used up. 16 is enough for instructions; "
            "raise it for much text."
        ),
        "alpha": (
            "The delta is multiplied by alpha / r. LoRA Without Regret keeps alpha at 32: with 1 / r in front the best "
            "rate hardly depends on the rank, so r can change and the rate stay."
        ),
        "rslora": (
            "Multiply by alpha / sqrt(r) instead (arXiv 2312.03732), which keeps large ranks, 64 and more, learning. "
            "Off, as at 16 it is a factor of 4 that the rate would have to take back."
        ),
        "dora": (
            "Learn the length of each output's weights apart from their direction (arXiv 2402.09353), better at small "
            "ranks by its paper. Off: it is slower, and not every runtime applies it."
        ),
        "lora_bias": (
            "Let every delta have a bias, which peft calls lora_bias. Off: the papers have none, and few loaders know it. Not "
            "beside dora."
        ),
        "dropout": (
            "The QLoRA paper used 0.1 up to 13 B and 0.05 beyond. 0 here, the plain method: raise it where the "
            "held-out loss turns upwards."
        ),
        "targets": (
            "all-linear: every linear layer but the output layer. The QLoRA paper found that to be what matters for "
            "reaching full fine-tuning, and LoRA Without Regret that attention alone falls behind whatever its rank."
        ),
        "exclude": "Layers that stay as they are, against what the papers say of all layers.",
        "layers": "Only some layers of the model, by number; all by default, as above.",
        "rank_pattern": ("Another rank for some modules. None: nothing is known that beats one rank for all without trying."),
        "alpha_pattern": "Another alpha for some modules, likewise.",
        "init": (
            "default begins with no delta: A by chance, B zero. pissa (arXiv 2404.02948) and loftq (arXiv 2310.08659) "
            "begin with the principal part of the weights or of what quantizing loses, which helps at few steps or few "
            "bits."
        ),
        "init_iterations": "How thoroughly pissa or loftq decompose; 0 is exact for pissa.",
        "trainable_token_indices": "Rows of the embedding table to train whole, for tokens that are new. None are.",
    },
    "train": {
        "steps": "How many optimizer steps. Without it, epochs.",
        "epochs": ("How often every document is seen. One pass: more is for little data, with an eye on the held-out loss."),
        "rows": (
            "Rows in a step. LoRA Without Regret found LoRA less tolerant of large batches than full fine-tuning, "
            "whatever the rank; so few."
        ),
        "group_by_length": "Rows of one length make a step. Off: it isn't needed where documents share rows.",
        "micro_rows": (
            "Rows in memory at once. The gradient is the same, divided by the tokens of the whole step, so it costs "
            "nothing but time. Without it all of a step."
        ),
        "learning_rate": (
            "2e-4 is the QLoRA paper's up to 13 B (1e-4 for 33 B and 65 B). LoRA Without Regret: about ten times what "
            "full fine-tuning takes, 15 times in runs under a hundred steps; such want 1e-3 and more."
        ),
        "loraplus": (
            "lora_B learns so many times faster. LoRA+ (arXiv 2402.12354) finds it should in wide models, about 16 "
            "times; it begins at zero. 1 is plain LoRA, which every recipe's rate was chosen for; 4 helps short runs."
        ),
        "schedule": "cosine ends gently, which a short run gains from. The QLoRA paper used constant.",
        "floor": "Share of the rate that the schedule falls to; 0 falls all the way.",
        "optimizer": (
            "AdamW in float32: its two moments are eight bytes a trained number, little for an adapter. adamw8bit has two "
            "bytes; paged_adamw8bit lets them leave a CUDA device when its memory is full."
        ),
        "neftune": "Noise on the embeddings (arXiv 2310.05914). 0: conversation is what it was shown to help.",
        "warmup": (
            "Steps in which the rate rises from zero. None: lora_B is zero at first, so the first steps are small by "
            "themselves. The QLoRA paper took 3 % of the steps."
        ),
        "weight_decay": "The QLoRA paper's 0: an adapter of low rank has little to overfit with.",
        "beta1": "AdamW's usual 0.9.",
        "beta2": "AdamW's usual 0.999, the QLoRA paper's.",
        "clip": (
            "The gradient is shortened to this norm. 1 is common; the QLoRA paper took 0.3, which is worth trying "
            "where the loss jumps. 0 never does."
        ),
        "compile": (
            "Let torch compile what lies between the layers: norms, rotations, activations. Off: on a CPU it saves 8 % of a "
            "step in bfloat16 and 2 % in float32 (4 blocks of 512, 1024 tokens), after seconds of compiling."
        ),
        "checkpointing": (
            "Keep each block's input only and compute the rest again: less memory, a third more time; the result is the "
            "same. auto does it where the training doesn't fit into the memory that is free otherwise. `--plan` says what "
            "it takes either way."
        ),
        "evaluate_every": "Steps between evaluations; 0 is before and after only, as each costs forward passes.",
        "keep_best": "Keep what was best on the held-out data. Off, as what came last is what the config describes.",
        "patience": "Stop after so many evaluations without anything better; 0 never.",
        "samples": "Questions whose answers are logged, to be read by people.",
        "sample_tokens": "How long such an answer may be.",
        "log_to": (
            "Where the numbers go besides log.jsonl: tensorboard, wandb, mlflow, trackio, or several; each has to be installed."
        ),
        "save_every": (
            "Steps between checkpoints; 0 writes one only when the run is stopped, which Ctrl-C and SIGTERM do well."
        ),
        "seed": "Of everything random. The same seed, machine and versions give the same bytes.",
        "threads": "Threads to compute with; part of what makes two runs the same to the byte.",
    },
    "card": {
        "title": "The heading of the model card.",
        "description": "One paragraph for people.",
        "license": "An SPDX expression. None is guessed: the base's and the data's licenses are yours to weigh.",
        "language": "Languages, as the Hugging Face Hub knows them: en.",
        "tags": "Words to find it by.",
    },
}
# What stands in a new config for keys that are needed, and beside those that have no value by default.
_SAMPLES = {
    "base.path": "model", "data.train": ["train.jsonl"], "data.heldout": ["heldout.jsonl"], "base.name": "owner/model",
    "base.revision": "c1899de289a04d12100db370d81485cdf75e47ca", "lora.layers": [0, 1], "train.steps": 200,
    "train.micro_rows": 1, "train.threads": 2, "card.title": "My adapter", "card.license": "apache-2.0",
}  # fmt: skip
_WIDE = 100


@dataclass(frozen=True)
class Explained:
    """One key; `default` as TOML writes it, empty where there is none."""

    section: str
    key: str
    default: str
    needed: bool
    why: str


def explain(wanted: str | None = None) -> list[Explained]:
    """All keys, those of a section, or one: `lora`, `learning_rate`, `train.learning_rate`."""
    found = list(_all())
    if wanted is None:
        return found
    name = wanted.replace("[", "").replace("]", ".").replace(" ", "").strip(".")
    chosen = [item for item in found if name == item.section]
    chosen = chosen or [item for item in found if name in (item.key, f"{item.section}.{item.key}")]
    if not chosen:
        known = [*_SECTIONS, *(item.key for item in found)]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {close[0]}?" if close else "`adapterhub train --explain` says all of them"
        raise UsageError(wanted[:60], "is no key or section of a config", hint)
    return chosen


def _all() -> Iterator[Explained]:
    for section, kind in _SECTIONS.items():
        for item in dataclasses.fields(kind):
            value = _default(item)
            needed = value is dataclasses.MISSING
            default = "" if needed or value is None else _toml(value)
            yield Explained(section, item.name, default, needed, _WHY[section].get(item.name, ""))


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def template() -> str:
    """A config with every key: what is needed to be filled in, the rest commented out at its default, and why."""
    lines = [
        "# A training for `adapterhub train`. Fill in the two paths, relative to this file; then it trains as it stands.",
        "# What is commented out is the default.",
    ]
    section = ""
    for item in _all():
        if item.section != section:
            section = item.section
            lines += ["", f"[{section}]"]
        lines += [f"# {line}" for line in textwrap.wrap(item.why, _WIDE, break_long_words=False, break_on_hyphens=False)]
        sample = _SAMPLES.get(f"{section}.{item.key}")
        value = _toml(sample) if sample is not None else item.default
        lines.append(f"{item.key} = {value}" if item.needed else f"#{item.key} = {value}")
    return "\n".join(lines) + "\n"
