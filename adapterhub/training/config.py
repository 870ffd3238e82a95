"""The config of a training: a TOML file, checked key by key, as frozen dataclasses.

Paths are relative to the file. An unknown key is refused by name, because a misspelled `learning_rate` that silently keeps
its default is a wasted run.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapterhub_converters.containers import toml_file
from adapterhub_converters.containers.open_file import read_bytes
from adapterhub_converters.errors import LocalIOError, NotFoundError, UsageError


@dataclass(frozen=True)
class BaseConfig:
    """The model to adapt."""

    path: str
    """A Hugging Face folder, in floats or in bitsandbytes' NF4; a GGUF file; or the name of a model on the Hub."""
    name: str | None = None
    """The model's public name, `owner/model`; recorded in the adapter."""
    revision: str | None = None
    quantize: Literal["nf4", "none"] = "nf4"
    """The form of the linear layers in memory: `nf4` (4.127 bits a weight), or `none`, which is `dtype`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype to compute in; `float16` with a scaled loss."""
    shard: bool = False
    """With several processes (torchrun), each holds only its part of the quantized layers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to compute on; `auto` is CUDA if torch finds it."""
    cache: bool = True
    """Cache the quantized base, so that the next training on it starts at once."""


@dataclass(frozen=True)
class DataConfig:
    """Data to train on, and held-out data."""

    train: tuple[str, ...]
    """Files of JSON Lines, JSON arrays, plain text or Parquet, or folders that `datasets` saved."""
    heldout: tuple[str, ...] = ()
    """Files of the same kinds, never trained on."""
    heldout_share: float = 0.0
    """Instead of `heldout`: the share of the training documents to hold out, chosen by their content."""
    sequence: int = 512
    """Tokens in a row; a document that must stay in one row is cut there."""
    pack: bool = True
    """Let documents share rows, without seeing each other; otherwise each has a row of its own."""
    loss: Literal["all", "completion"] = "completion"
    """Tokens of a conversation or of a prompt with completion to train on: all, or only the answers."""
    heldout_tokens: int = 8192
    """Evaluate on at most so many tokens, evenly from all of the held-out data."""


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
    """`pissa`: 0 for an exact decomposition, else the iterations of a randomized one; `loftq`: how often quantization and
    decomposition alternate, at least once."""
    trainable_token_indices: tuple[int, ...] = ()
    """Rows of the embedding table to train whole, such as those of new special tokens."""


@dataclass(frozen=True)
class OptimConfig:
    """The steps, the optimizer, and what happens between steps."""

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
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """How the rate falls; `wsd` keeps it constant up to the last fifth of the steps."""
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
    """Compile what is between the layers with torch."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Save only each block's input and compute the rest again: half the memory, a third more time. `auto`: only where the
    training does not fit into memory otherwise. The result is the same, byte for byte."""
    evaluate_every: int = 0
    """Steps between held-out evaluations; 0: only before and after."""
    keep_best: bool = False
    """Keep the parameters with the best held-out loss instead of the last ones."""
    patience: int = 0
    """Stop after so many evaluations without improvement; 0: never."""
    samples: tuple[str, ...] = ()
    """Prompts whose answers are logged with each evaluation."""
    sample_tokens: int = 48
    """The most tokens of an answer."""
    log_to: tuple[str, ...] = ()
    """Trackers that get the numbers of log.jsonl as well: tensorboard, wandb, mlflow, trackio."""
    save_every: int = 0
    """Steps between checkpoints; 0: only when stopped."""
    seed: int = 0
    threads: int | None = None


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
    """A whole training; relative paths start at `folder`, and `where` is the config in messages."""

    base: BaseConfig
    data: DataConfig
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    card: CardConfig = field(default_factory=CardConfig)
    folder: Path = Path()
    where: str = "config"
    model: Path | None = None
    """Where the base is, if it is not at `base.path`."""

    @property
    def base_path(self) -> Path:
        """The folder or file of the base."""
        return self.resolve(self.base.path) if self.model is None else self.model

    def resolve(self, path: str) -> Path:
        """Return a path of the config as one that can be opened."""
        return self.folder / Path(path).expanduser()

    def document(self) -> dict[str, Any]:
        """Return the sections as plain values for adapter.json, with the paths as they were written."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}
        del sections["base"]["cache"]  # changes no byte of the result
        return {name: {key: _plain(value) for key, value in section.items()} for name, section in sections.items()}


_SECTIONS: dict[str, type] = {
    "base": BaseConfig,
    "data": DataConfig,
    "lora": LoRAConfig,
    "train": OptimConfig,
    "card": CardConfig,
}


def _plain(value: Any) -> Any:
    """Return a value for JSON; patterns as pairs, since their order counts and sorted keys would lose it."""
    if isinstance(value, Mapping):
        return [list(pair) for pair in value.items()]
    return list(value) if isinstance(value, tuple) else value


def read(path: Path) -> TrainConfig:
    """Read the TOML file of a training."""
    try:
        text = read_bytes(path, pipe=True).decode()
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LocalIOError(str(path), str(error)) from error
    return parse(text, folder=path.parent, where=str(path))


def parse(text: str, *, folder: Path, where: str) -> TrainConfig:
    """Parse the TOML text of a training; `where` is its place in messages."""
    document = toml_file.parse(text, where)
    unknown = sorted(set(document) - set(_SECTIONS))
    if unknown:
        raise UsageError(where, f"unknown section [{unknown[0][:80]}]", f"The sections are {', '.join(_SECTIONS)}")
    sections = {name: _section(kind, document.get(name), f"{where}: [{name}]") for name, kind in _SECTIONS.items()}
    config = TrainConfig(**sections, folder=folder, where=where)
    _check(config)
    return config


def _section(kind: type, values: object, where: str) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise UsageError(where, "is not a table")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UsageError(f"{where} {key[:80]}", "unknown key", f"The keys are {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    for name, item in fields.items():
        if name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where} {name}", "is missing")
    return kind(**{key: _value(value, hints[key], f"{where} {key}") for key, value in values.items()})


def _value(value: Any, kind: Any, where: str) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
            known = (*typing.get_args(option), *(("true", "false") if bool in options else ()))
            raise UsageError(where, f"{value!r:.80} is not one of {', '.join(map(str, known))}")
        if typing.get_origin(option) is tuple:
            kind_of_item = typing.get_args(option)[0]
            values = [value] if isinstance(value, str) and len(options) == 1 else value
            if isinstance(values, list) and all(type(item) is kind_of_item for item in values):
                return tuple(values)
        elif typing.get_origin(option) is Mapping:
            if isinstance(value, dict):
                return {key: _value(item, typing.get_args(option)[1], f"{where} {key[:80]!r}") for key, item in value.items()}
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif option is not type(None) and type(value) is option:
            return value
    raise UsageError(where, f"{value!r:.80} has the wrong type")


def _check(config: TrainConfig) -> None:
    train, data, lora = config.train, config.data, config.lora
    positive = {
        "[data] sequence": data.sequence - 1, "[lora] r": lora.r, "[train] rows": train.rows,
        "[train] epochs": train.epochs, "[train] steps": 1 if train.steps is None else train.steps,
        "[train] learning_rate": train.learning_rate, "[train] loraplus": train.loraplus,
        "[train] micro_rows": train.micro_rows or train.rows, "[data] train": len(data.train),
        "[lora] rank_pattern": min(lora.rank_pattern.values(), default=1),
    }  # fmt: skip
    for name, value in positive.items():
        if value <= 0:
            raise UsageError(f"{config.where}: {name}", "is too small")
    if train.rows % (train.micro_rows or train.rows):
        raise UsageError(f"{config.where}: [train] micro_rows", f"does not divide rows = {train.rows}")
    _check_shares(config)
    if data.heldout_share and data.heldout:
        raise UsageError(f"{config.where}: [data] heldout_share", "cannot be combined with heldout")
    for key in ("patience", "keep_best"):
        if getattr(train, key) and not (train.evaluate_every and (data.heldout or data.heldout_share)):
            raise UsageError(f"{config.where}: [train] {key}", "needs evaluate_every and held-out data")
    if config.base.shard and config.base.quantize == "none":
        raise UsageError(f"{config.where}: [base] shard", "needs a quantized base")
    if lora.lora_bias and lora.dora:
        raise UsageError(f"{config.where}: [lora] lora_bias", "cannot be combined with dora")
    if lora.init == "loftq" and config.base.quantize == "none":
        raise UsageError(f"{config.where}: [lora] init", "loftq needs a quantized base")


def _check_shares(config: TrainConfig) -> None:
    shares = {
        "[data] heldout_share": config.data.heldout_share, "[lora] dropout": config.lora.dropout,
        "[train] floor": config.train.floor,
    }  # fmt: skip
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise UsageError(f"{config.where}: {name}", "must be at least 0 and below 1")
