"""The config of a training run as frozen dataclasses, one for each section of the TOML file (`config_file` reads it)."""

from __future__ import annotations

import dataclasses
import math
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

BaseForm = Literal["nf4", "none"]
"""The form of the linear layers of a base in memory: quantized, or in the dtype to compute in."""
LossTokens = Literal["all", "completion"]
"""The tokens that a loss counts."""


@dataclass(frozen=True)
class BaseConfig:
    """The model to adapt."""

    path: str
    """A Hugging Face folder, in floats or in bitsandbytes' NF4; a GGUF file; or the name of a model on the Hub."""
    name: str | None = None
    """The model's public name, `owner/model`; recorded in the adapter."""
    revision: str | None = None
    quantize: BaseForm = "nf4"
    """The form of the linear layers in memory: `nf4` (4.127 bits a weight), or `none`, which is `dtype`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype to compute in; `float16` with a scaled loss."""
    shard: bool = False
    """With several processes (torchrun), each holds only its part of the quantized layers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to compute on; `auto` is CUDA if torch finds it."""
    hold: Literal["quantized", "auto", "dense"] = "quantized"
    """The form of a quantized base in memory: its codes, or the weights that they decode to, in `dtype`. Dense weights need no
    dequantization in a step and give the same numbers. `auto`: the weights if they fit into free memory."""
    cache: bool = True
    """Cache the quantized base, so that the next training on it starts at once."""


@dataclass(frozen=True)
class DataSource:
    """One of several training files, with its share of the tokens to train on."""

    path: str
    share: float


@dataclass(frozen=True)
class DataConfig:
    """Data to train on, and held-out data."""

    train: tuple[str | DataSource, ...]
    """Files of JSON Lines, JSON arrays, CSV, TSV, plain text or Parquet, or folders of them or saved by `datasets`:
    complete, or each with its share of the tokens, `[{path = "a.jsonl", share = 0.7}, {path = "b.jsonl", share = 0.3}]`."""
    heldout: tuple[str, ...] = ()
    """Files of the same kinds, never trained on."""
    heldout_share: float = 0.0
    """Instead of `heldout`: the share of the training documents to hold out, chosen by their content."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The data's own column names: `{prompt = "question", completion = "answer"}`. By default, known names are recognized."""
    split_text: Literal["no", "paragraphs", "lines"] = "no"
    """How to split a file of plain text: not at all, or into its paragraphs or its lines."""
    sequence: int = 512
    """Tokens in a row; a document that must stay in one row is cut there."""
    pack: bool = True
    """Let documents share rows without attending to each other; otherwise each gets its own row."""
    loss: LossTokens = "completion"
    """Tokens of a conversation or of a prompt with completion to train on: all, or only the answers."""
    chat_template: str | None = None
    """The template of conversations in place of the base's: `chatml`, `plain`, or a file of Jinja; kept in the adapter."""
    template_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Variables that the template asks for: `{enable_thinking = false}`."""
    date: str | None = None
    """The date that a chat template with a clock writes, as `2026-11-26`; None: the day on which the training starts."""
    heldout_tokens: int = 8192
    """Evaluate on at most so many tokens, evenly from all of the held-out data."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The files to train on."""
        return tuple(source if isinstance(source, str) else source.path for source in self.train)

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The share of each of these files in the tokens; None where every file is used completely."""
        return tuple(source.share for source in self.train if isinstance(source, DataSource)) or None


@dataclass(frozen=True)
class LoRAConfig:
    """The size and place of the adapter."""

    r: int = 16
    """The rank: the number of directions in which a layer can change."""
    alpha: float = 32
    """The delta is multiplied by alpha / r."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Train the norm of each output's weights separately from their direction (DoRA, arXiv 2402.09353)."""
    lora_bias: bool = False
    """Give every delta a bias as well."""
    dropout: float = 0.0
    """The share of the delta's inputs that a step drops."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`; names of modules, or the ends of their paths; or one regular expression for whole paths. The
    embedding table is a target only if it is named."""
    exclude: tuple[str, ...] = ()
    """Names of modules, or the ends of their paths, that are not targets."""
    layers: tuple[int, ...] | None = None
    """Only these layers, counted from 0; None: all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single modules: keys are names or regular expressions for the end of a path; the first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas of single modules, likewise."""
    init: Literal["default", "pissa", "loftq"] = "default"
    """Initial factors: `default`: no delta; `pissa`: the principal part of the weight (arXiv 2404.02948); `loftq`: the
    principal part of the quantization error (arXiv 2310.08659). The last two are saved as plain LoRA."""
    init_iterations: int = 0
    """`pissa`: 0 for an exact decomposition, else the iterations of a randomized one; `loftq`: the number of alternations of
    quantization and decomposition, at least 1."""
    trainable_token_indices: tuple[int, ...] = ()
    """Rows of the embedding table to train in full, such as those of new special tokens."""


@dataclass(frozen=True)
class OptimConfig:
    """The steps, the optimizer, and the actions between steps."""

    steps: int | None = None
    """Optimizer steps; else `epochs`."""
    epochs: float = 1.0
    rows: int = 4
    """Rows in a step."""
    group_by_length: bool = False
    """Put rows of about the same length into a step: less padding where documents do not share rows."""
    micro_rows: int | None = None
    """Rows in memory at once; the gradient is the same. None: all of a step."""
    learning_rate: float = 2e-4
    loraplus: float = 1.0
    """The factor of lora_B's learning rate (LoRA+, arXiv 2402.12354)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls."""
    floor: float = 0.0
    """The share of the rate that it falls to."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """8-bit moments are bitsandbytes'; paged ones need CUDA."""
    neftune: float = 0.0
    """Strength of the noise on the embeddings (NEFTune, arXiv 2310.05914); 5 is usual, 0 is none."""
    warmup: int = 0
    """Steps in which the rate rises from 0."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    """Norm to clip the gradient to; 0: no clipping."""
    compile: bool = False
    """Compile the operations between the layers with torch."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Save only each block's input and compute the rest again: half the memory, a third more time. `auto`: only where the
    training does not fit into memory otherwise. The result is the same, byte for byte."""
    evaluate_every: int = 0
    """Steps between held-out evaluations; 0: only before and after."""
    keep_best: bool = False
    """Keep the parameters with the best held-out loss instead of the last ones."""
    patience: int = 0
    """Stop after this many evaluations without improvement; 0: never."""
    samples: tuple[str, ...] = ()
    """Prompts whose answers are logged with each evaluation."""
    sample_tokens: int = 48
    """The maximum number of tokens in an answer."""
    log_to: tuple[str, ...] = ()
    """Trackers that get the numbers of log.jsonl as well: tensorboard, wandb, mlflow, trackio."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; 0: only when stopped."""
    save_every: int = 0
    """Steps between further checkpoints; 0: none."""
    seed: int = 0
    deterministic: bool = True
    """On CUDA, only kernels that give the same bytes each time."""
    threads: int | None = None


@dataclass(frozen=True)
class PreferenceConfig:
    """Learning from preference pairs: the chosen answer becomes more likely than the rejected one."""

    method: Literal["none", "dpo", "orpo", "simpo"] = "none"
    """`none`: the data are documents, and of a pair only the chosen side is trained on; else they are pairs."""
    beta: float | None = None
    """The strength of the preference; None: 0.1, with `simpo` 2."""
    gamma: float = 1.0
    """`simpo`: the target margin."""

    @property
    def strength(self) -> float:
        """Beta, or its default for the method."""
        return self.beta if self.beta is not None else 2.0 if self.method == "simpo" else 0.1

    def __bool__(self) -> bool:
        return self.method != "none"


@dataclass(frozen=True)
class CardConfig:
    """Text of the model card."""

    title: str | None = None
    description: str = ""
    license: str | None = None
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """A complete training config; relative paths start at `folder`, and `location` names the config in messages."""

    base: BaseConfig
    data: DataConfig
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    card: CardConfig = field(default_factory=CardConfig)
    folder: Path = Path()
    location: str = "config"
    model: Path | None = None
    """The path of the base, if it is not `base.path`."""

    @property
    def base_path(self) -> Path:
        """The folder or file of the base."""
        return self.resolve(self.base.path) if self.model is None else self.model

    def resolve(self, path: str) -> Path:
        """Return a path of the config as one that can be opened."""
        return self.folder / os.path.expanduser(path)  # `~name` stays as it is if there is no such user

    def steps(self, rows: int) -> int:
        """Return the number of optimizer steps for data of `rows` rows."""
        return self.train.steps or max(1, math.ceil(self.train.epochs * rows / self.train.rows))

    def document(self) -> dict[str, Any]:
        """Return the sections as plain values for adapter.json, with the paths as they were written."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        for section, key in (("base", "cache"), ("base", "hold"), ("train", "save_minutes")):
            del sections[section][key]  # it does not change a byte of the result
        return {name: {key: _plain(value) for key, value in section.items()} for name, section in sections.items()}


# The tables of a config, in the order in which a new one has them.
SECTIONS: dict[str, type] = {
    "base": BaseConfig,
    "data": DataConfig,
    "lora": LoRAConfig,
    "train": OptimConfig,
    "preference": PreferenceConfig,
    "card": CardConfig,
}


def _plain(value: Any) -> Any:
    """Return a value for JSON, with patterns as pairs: their order matters, and sorted keys would lose it."""
    if isinstance(value, Mapping):
        return [list(pair) for pair in value.items()]
    return list(value) if isinstance(value, tuple) else value
