"""Explanations of every key of a config and its default, also as comments in a new config.

Sources are the papers named, and "LoRA Without Regret" (Schulman and Thinking Machines Lab, thinkingmachines.ai/blog/lora,
2025).
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import LocalIOError, OutputExistsError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .config_file import OTHER_TRAINERS_KEYS
from .train_config import SECTIONS

# An INI file, whose values may continue in indented lines.
_EXPLANATIONS = """
[base]
path: The model to adapt: a Hugging Face folder, in floats or in bitsandbytes' NF4, or a GGUF file; a model in the cache of the
  Hub by its name, owner/model; or hf://owner/model, which is downloaded. There is no default.
name: The model's public name, owner/model. It is recorded in the adapter; a path is not, because it means nothing on another
  machine.
revision: The commit of the base, if it has one. A branch may move, and then the adapter no longer belongs to its head.
quantize: nf4 stores the linear layers in 4.127 bits a weight with double quantization. The QLoRA paper (arXiv 2305.14314)
  found no loss against 16 bits over its models: mean MMLU 53.1 against 53.0. none stores them in dtype: faster where there is
  enough memory.
dtype: The dtype to compute in. bfloat16 has the range of float32, so nothing overflows; with float16 one in five of QLoRA's
  own runs at 7 B failed. GPUs without bfloat16 compute in float16 instead, with a scaled loss. float32 is for comparisons, and
  computed without TF32.
device: auto uses CUDA if torch finds it, with a device of its own for each of several processes, else the CPU. The base is
  quantized on the CPU in either case, so that its codes are the same.
cache: The quantized base is stored in the user's cache folder, in about a quarter of the size of its 16 bits, and read from
  there as long as the base's files are unchanged. The result is the same, byte for byte; false stores nothing.

[data]
train: The data to train on: files of documents with text, with prompt and completion, or with messages. All of each file, or
  its share of the tokens: [{path = "a.jsonl", share = 0.7}, {path = "b.jsonl", share = 0.3}].
heldout: Documents that are never trained on, evaluated before and after: without them nobody knows whether the model learned
  or memorized.
heldout_share: Instead of heldout, a share of the training documents. 0 holds out none: all of your data are trained on.
columns: For data whose column names are not the usual ones. The key is one of those, such as prompt and completion, or
  instruction, input and output; the value is the data's own name. Without it, every known shape is recognized.
split_text: A file of plain text is one document, so that a model learns how its parts follow from each other. paragraphs,
  separated by blank lines, or lines are documents of their own, of which heldout_share can hold out some.
sequence: Tokens in a row. 512 is enough for most instructions; memory grows with it, and longer documents are cut or, where
  they are running text, continue in another row.
pack: Documents share rows without seeing each other, so that no computation is spent on padding.
loss: completion trains on the answers alone. Prompts are given at inference, and the QLoRA paper found training on the answers
  only better on MMLU. all is for text without prompts, where both are the same.
chat_template: Replaces the template of the base, or gives one to a base that was not trained on conversations: chatml for a
  tokenizer that has its marks, plain for any, alpaca for instructions (their default without a template), or a file of Jinja.
  The adapter contains it, and is prompted with it.
template_options: What a template asks for besides the conversation, under its own names, such as enable_thinking in Qwen3's.
  Without them it has its own defaults.
date: Some chat templates write today's date into every conversation (Llama 3.2, gpt-oss). A training writes one date, which it
  records: this one, or that of the day on which it starts. Set it to get the same adapter again.
heldout_tokens: An evaluation on 8192 tokens, evenly from all documents, is accurate enough and cheap; perplexities are
  comparable only at the same number.

[lora]
r: The rank. The QLoRA paper found that with all layers adapted the rank hardly matters; LoRA Without Regret that LoRA learns
  like full fine-tuning until its capacity is used up. 16 is enough for instructions; raise it for much text.
alpha: The delta is multiplied by alpha / r. LoRA Without Regret keeps alpha at 32: with 1 / r in front the best learning rate
  hardly depends on the rank, so r can change without it.
rslora: Multiply by alpha / sqrt(r) instead (arXiv 2312.03732), with which large ranks, 64 and more, keep learning. Off: at 16
  it is a factor of 4 that the learning rate would have to compensate.
dora: Train the norm of each output's weights separately from their direction (arXiv 2402.09353), better at small ranks
  according to its paper. Off: it is slower, and not every runtime supports it.
lora_bias: Give every delta a bias, peft's lora_bias. Off: the papers have none, and few loaders support it. It cannot be
  combined with dora.
dropout: The QLoRA paper used 0.1 up to 13 B and 0.05 beyond. 0 is the plain method: raise it if the held-out loss starts to
  rise.
targets: all-linear: every linear layer but the output layer; or names of modules, or the ends of their paths; or one regular
  expression for whole paths. Embedding tables and experts are targets only if they are named. The QLoRA paper found that this
  matters most for reaching full fine-tuning, and LoRA Without Regret that attention alone is worse at any rank.
exclude: Names of modules, or the ends of their paths, that are not targets. None: the papers recommend all layers.
layers: Only some layers of the model, counted from 0. All by default, for the same reason.
rank_pattern: Ranks of single modules: keys are names or regular expressions for the end of a path; the first match counts.
  None: no rule is known to beat one rank for all without trying.
alpha_pattern: Alphas of single modules, likewise.
init: default starts without a delta: A is random, B zero. pissa (arXiv 2404.02948) starts with the principal part of the
  weights, which helps with few steps.
trainable_token_indices: Rows of the embedding table to train whole, for new tokens. None by default.

[train]
steps: The number of optimizer steps. Without it, epochs.
epochs: Passes over the documents. One: more is for little data, with an eye on the held-out loss.
rows: Rows in a step. LoRA Without Regret found LoRA less tolerant of large batches than full fine-tuning, whatever the rank;
  so few.
micro_rows: Rows in memory at once. The gradient is the same, divided by the tokens of the whole step, so it costs nothing but
  time. Without it, all rows of a step.
learning_rate: 2e-4 is the QLoRA paper's up to 13 B (1e-4 for 33 B and 65 B). LoRA Without Regret: about ten times that of full
  fine-tuning, 15 times in runs under a hundred steps, which need 1e-3 and more.
loraplus: The factor of lora_B's learning rate. LoRA+ (arXiv 2402.12354) recommends about 16 in wide models, as lora_B starts
  at zero. 1 is plain LoRA, for which every recipe's rate was chosen; 4 helps short runs.
schedule: cosine ends gently, which helps a short run. The QLoRA paper used constant.
optimizer: AdamW in float32: its two moments take eight bytes a trained parameter, little for an adapter. adamw8bit takes two
  bytes; paged_adamw8bit moves them out of a CUDA device, which it needs, when its memory is full.
neftune: Noise on the embeddings (arXiv 2310.05914), usually 5. 0: its benefit was shown for conversation only.
warmup: Steps in which the rate rises from zero. None: lora_B starts at zero, so the first steps are small by themselves. The
  QLoRA paper used 3 % of the steps.
weight_decay: The QLoRA paper's 0: an adapter of low rank has little capacity to overfit.
beta1: AdamW's usual 0.9.
beta2: AdamW's usual 0.999, the QLoRA paper's.
clip: The gradient is clipped to this norm. 1 is common; the QLoRA paper used 0.3, which is worth trying if the loss jumps. 0
  never clips.
compile: Compile what is between the layers: norms, rotations, activations. Off: on a CPU it saves 8 % of a step in bfloat16
  and 2 % in float32 (4 blocks of 512, 1024 tokens), after seconds of compiling with a C++ compiler.
checkpointing: Save each block's input only and compute the rest again: less memory, a third more time, the same result. auto
  does it where the training would not fit into free memory otherwise. The memory plan shows both.
evaluate_every: Steps between evaluations; 0 is before and after only, as each costs forward passes.
keep_best: Keep the parameters with the best held-out loss, with evaluate_every and held-out data. Off: the config describes
  the last ones.
patience: Stop after so many evaluations on held-out data without improvement; 0 never.
samples: Prompts whose answers are logged, for people to read.
sample_tokens: The most tokens of such an answer.
log_to: Trackers that get the numbers of log.jsonl as well: tensorboard, wandb, or both; each has to be installed. From Python,
  on_event hands the numbers to any other.
save_minutes: Minutes between checkpoints, from which the same command resumes after a kill or a loss of power. 0 writes one
  only when the run is stopped, for which Ctrl-C and SIGTERM are safe.
save_every: Steps between further checkpoints; 0 writes none of them.
keep_every: Steps between checkpoints that stay in OUT.checkpoints, with which a part of the training can be repeated. 0 keeps
  none.
seed: The seed of everything random. The same seed, machine and versions give the same bytes.
deterministic: On CUDA the same run gives the same bytes, by kernels that add up in one order, some of which are slower; an
  operation that has none is refused. false lets CUDA choose. A CPU computes the same in either case.
threads: Threads to compute with; two runs give the same bytes only with the same number.

[preference]
method: dpo (arXiv 2305.18290) learns from pairs which answer is better, in comparison with the base, and is the usual choice
  after instruction tuning; it reads each batch twice. orpo (arXiv 2403.07691) learns the chosen answers as well, and needs no
  tuning before it; simpo (arXiv 2405.14734) compares means over tokens, so that longer answers are not better. none: of pairs,
  the chosen sides are trained on.
beta: How much a preference counts: with dpo, a larger beta stays closer to the base. 0.1 is usual for dpo and orpo, 2 for
  simpo. A preference wants a learning rate well below that of other trainings, such as 5e-6 to 5e-5.
gamma: The margin that simpo aims at; its paper recommends about half of beta.

[card]
title: The heading of the model card.
description: One paragraph for people.
license: An SPDX expression. There is no default: consider the licenses of the base and of the data.
language: Languages, as codes of the Hugging Face Hub: en.
tags: Tags to find it by.
"""
# Example values in a new config, for required keys and for keys without a default.
_SAMPLES = {
    "base.path": "model", "data.train": ["train.jsonl"], "data.heldout": ["heldout.jsonl"], "base.name": "owner/model",
    "base.revision": "c1899de289a04d12100db370d81485cdf75e47ca", "lora.layers": [0, 1], "train.steps": 200,
    "data.chat_template": "chatml", "data.date": "2026-11-26", "train.micro_rows": 1, "train.threads": 2,
    "preference.beta": 0.1, "card.title": "My adapter", "card.license": "apache-2.0",
}  # fmt: skip
_WIDE = 100


@dataclass(frozen=True)
class KeyExplanation:
    """The explanation of one key; `default` is TOML, and empty if there is none."""

    section: str
    key: str
    default: str
    needed: bool
    explanation: str


def explain(query: str | None = None) -> list[KeyExplanation]:
    """Return all keys, the keys of a section, or a single key, such as `lora`, `learning_rate`, `train.learning_rate`.

    Raises:
        UsageError: With the code `config-key`, if nothing has that name.
    """
    keys = list(_explained_keys())
    if query is None:
        return keys
    name = query.replace("[", "").replace("]", ".").replace(" ", "").strip(".")
    matches = [entry for entry in keys if name == entry.section]
    matches = matches or [entry for entry in keys if name in (entry.key, f"{entry.section}.{entry.key}")]
    if not matches:
        names = [*SECTIONS, *(entry.key for entry in keys)]
        meant = OTHER_TRAINERS_KEYS.get(name.lower()) or next(iter(difflib.get_close_matches(name, names, 1)), None)
        details = {"meant": meant} if meant else {}
        hint = f"Did you mean {meant}?" if meant else ""
        raise UsageError(query[:60], "is not a key or section of a config", hint, code="config-key", **details)
    return matches


def _explained_keys() -> Iterator[KeyExplanation]:
    explanations = configparser.ConfigParser(delimiters=":", interpolation=None)
    explanations.read_string(_EXPLANATIONS)
    for section, section_class in SECTIONS.items():
        for field in dataclasses.fields(section_class):
            value = _default(field)
            needed = value is dataclasses.MISSING
            default = "" if needed or value is None else _toml(value)
            yield KeyExplanation(
                section, field.name, default, needed, explanations.get(section, field.name, fallback="").replace("\n", " ")
            )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def template() -> str:
    """Return a config with every key, explained: required keys to fill in, the others commented out at their defaults."""
    lines = [
        "# The config of a training. Fill in the two paths, relative to this file; nothing else is required.",
        "# Keys that are commented out have their defaults.",
    ]
    section = ""
    for entry in _explained_keys():
        if entry.section != section:
            section = entry.section
            lines += ["", f"[{section}]"]
        lines += [
            f"# {line}" for line in textwrap.wrap(entry.explanation, _WIDE, break_long_words=False, break_on_hyphens=False)
        ]
        sample = _SAMPLES.get(f"{section}.{entry.key}")
        value = _toml(sample) if sample is not None else entry.default
        lines.append(f"{entry.key} = {value}" if entry.needed else f"#{entry.key} = {value}")
    return "\n".join(lines) + "\n"


def write_template(path: Path) -> None:
    """Write `template` to a new file; raise OutputExistsError if it exists."""
    try:
        # Mode x never overwrites a config that somebody has filled in.
        with open(path, "x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError as error:
        raise OutputExistsError(str(path)) from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
