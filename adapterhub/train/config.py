"""What a training is: a TOML file, checked key by key, as frozen dataclasses.

Paths are relative to the file. A key that isn't known is refused by name, because a misspelled `learning_rate` that
silently keeps its default is a wasted run.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapterhub_converters.errors import LocalIOError, NotFoundError, UsageError


@dataclass(frozen=True)
class BaseConfig:
    """The model that is adapted."""

    path: str
    """A Hugging Face folder, in floats or in NF4 as bitsandbytes serializes it; or a GGUF file."""
    name: str | None = None
    """What the model is called where others get it, `owner/model`; goes into the adapter."""
    revision: str | None = None
    quantize: Literal["nf4", "none"] = "nf4"
    """How the linear layers are held: `nf4` (4.127 bits a weight), or `none`: as `dtype`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What is computed in; `float16` with a scaled loss."""
    shard: bool = False
    """Of several processes (torchrun) each holds only its part of the quantized layers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes; `auto`: CUDA where torch sees it."""
    cache: bool = True
    """Keep the quantized base, so that the next training on it starts at once."""


@dataclass(frozen=True)
class DataConfig:
    """What is learned, and what isn't shown but asked about afterwards."""

    train: tuple[str, ...]
    """JSON Lines, arrays in JSON, plain text or Parquet files, or folders that `datasets` saved."""
    heldout: tuple[str, ...] = ()
    """The same, never trained on."""
    heldout_share: float = 0.0
    """Instead of `heldout`: the share of the training documents that is held out. Which are follows from what they say."""
    sequence: int = 512
    """Tokens in a row; a document that has to stay whole is cut there."""
    pack: bool = True
    """Let documents share rows, without seeing each other; else each has a row."""
    loss: Literal["all", "completion"] = "completion"
    """Which tokens of a conversation or of a prompt with completion are learned: all, or only the answers."""
    heldout_tokens: int = 8192
    """At most so many tokens are asked about, evenly from all of the held-out data."""


@dataclass(frozen=True)
class LoRAConfig:
    """The size and place of the adapter."""

    r: int = 16
    """The rank: how many directions a layer can learn."""
    alpha: float = 32
    """The delta is multiplied by alpha / r."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Learn the length of every output's weights apart from their direction (DoRA, arXiv 2402.09353)."""
    lora_bias: bool = False
    """Let every delta have a bias as well."""
    dropout: float = 0.0
    """Share of the delta's inputs that a step leaves out."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`; names of modules, or the ends of their paths; or one regular expression for whole paths. The
    embedding table only if it is named."""
    exclude: tuple[str, ...] = ()
    """Names of modules, or the ends of their paths, that stay as they are."""
    layers: tuple[int, ...] | None = None
    """Only these layers, counted from 0; None: all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another rank where the end of a path matches: a name, or a regular expression; the first that matches counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Another alpha, likewise."""
    init: Literal["default", "pissa", "loftq"] = "default"
    """How the factors begin: `default`: no delta; `pissa`: the principal part of the weight (arXiv 2404.02948); `loftq`:
    the principal part of what quantizing loses (arXiv 2310.08659). The last two are saved as plain LoRA."""
    init_iterations: int = 0
    """`pissa`: 0 for an exact decomposition, else a randomized one with so many iterations; `loftq`: how often quantizing
    and decomposing alternate, at least once."""
    trainable_token_indices: tuple[int, ...] = ()
    """Rows of the embedding table that are trained whole: new special tokens, say."""


@dataclass(frozen=True)
class OptimConfig:
    """How long, how fast, in which order."""

    steps: int | None = None
    """Optimizer steps; else `epochs`."""
    epochs: float = 1.0
    rows: int = 4
    """Rows in a step."""
    group_by_length: bool = False
    """Let rows of about the same length make a step: less padding where documents do not share rows."""
    micro_rows: int | None = None
    """Rows in memory at once; the gradient is the same. None: all of a step."""
    learning_rate: float = 2e-4
    loraplus: float = 1.0
    """lora_B learns so many times faster (LoRA+, arXiv 2402.12354)."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """How the rate falls; `wsd` holds it and falls in the last fifth of the steps."""
    floor: float = 0.0
    """Share of the rate that it falls to."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """In 8 bits by bitsandbytes; paged only on CUDA."""
    neftune: float = 0.0
    """Strength of the noise on the embeddings (NEFTune, arXiv 2310.05914); 5 is usual, 0 none."""
    warmup: int = 0
    """Steps in which the rate rises from 0."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    """Norm that the gradient is clipped to; 0: not."""
    compile: bool = False
    """Let torch compile what lies between the layers."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Keep only each block's input and compute the rest again: half the memory, a third more time. `auto`: where it doesn't
    fit otherwise. The result is the same, byte for byte."""
    evaluate_every: int = 0
    """Steps between held-out evaluations; 0: only before and after."""
    keep_best: bool = False
    """Keep what was best on the held-out data, not what came last."""
    patience: int = 0
    """Stop after so many evaluations that brought nothing better; 0: never."""
    samples: tuple[str, ...] = ()
    """Questions whose answers are logged with each evaluation."""
    sample_tokens: int = 48
    """At most so many tokens an answer."""
    log_to: tuple[str, ...] = ()
    """Where the numbers go besides log.jsonl: tensorboard, wandb, mlflow, trackio."""
    save_every: int = 0
    """Steps between checkpoints; 0: only when stopped."""
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class CardConfig:
    """Fields of the model card that are not in the manifest."""

    title: str | None = None
    description: str = ""
    license: str | None = None
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """A whole training; `folder` is where its relative paths start, `text` the file's own bytes."""

    base: BaseConfig
    data: DataConfig
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    card: CardConfig = field(default_factory=CardConfig)
    folder: Path = Path()
    where: str = "config"

    def resolve(self, path: str) -> Path:
        """A path of the config as one that can be opened."""
        return self.folder / Path(path).expanduser()

    def document(self) -> dict[str, Any]:
        """The sections as plain values, for the adapter's record: paths as they were written, no machine in it."""
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
    """As JSON has it; a map of patterns as pairs, since their order counts and JSON with sorted keys has none."""
    if isinstance(value, Mapping):
        return [list(pair) for pair in value.items()]
    return list(value) if isinstance(value, tuple) else value


def read(path: Path) -> TrainConfig:
    """The training that a TOML file describes."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LocalIOError(str(path), str(error)) from error
    return parse(text, folder=path.parent, where=str(path))


def parse(text: str, *, folder: Path, where: str) -> TrainConfig:
    """The training that TOML text describes; `where` stands in messages."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(where, f"not valid TOML ({error})") from error
    unknown = sorted(set(document) - set(_SECTIONS))
    if unknown:
        raise UsageError(where, f"[{unknown[0]}] isn't known", f"The sections are {', '.join(_SECTIONS)}")
    sections = {name: _section(kind, document.get(name), f"{where}: [{name}]") for name, kind in _SECTIONS.items()}
    config = TrainConfig(**sections, folder=folder, where=where)
    _check(config)
    return config


def _section(kind: type, values: object, where: str) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise UsageError(where, "isn't a table")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UsageError(f"{where} {key}", "isn't known", f"The keys are {', '.join(fields)}")
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
            raise UsageError(where, f"{value!r} isn't one of {', '.join(map(str, known))}")
        if typing.get_origin(option) is tuple:
            kind_of_item = typing.get_args(option)[0]
            values = [value] if isinstance(value, str) and len(options) == 1 else value
            if isinstance(values, list) and all(type(item) is kind_of_item for item in values):
                return tuple(values)
        elif typing.get_origin(option) is Mapping:
            if isinstance(value, dict):
                return {key: _value(item, typing.get_args(option)[1], f"{where} {key!r}") for key, item in value.items()}
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif option is not type(None) and type(value) is option:
            return value
    raise UsageError(where, f"{value!r} is of the wrong kind")


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
        raise UsageError(f"{config.where}: [data] heldout_share", "cannot be set beside heldout")
    for key in ("patience", "keep_best"):
        if getattr(train, key) and not (train.evaluate_every and (data.heldout or data.heldout_share)):
            raise UsageError(f"{config.where}: [train] {key}", "needs evaluate_every and held-out data")
    if config.base.shard and config.base.quantize == "none":
        raise UsageError(f"{config.where}: [base] shard", "is for a quantized base")
    if lora.lora_bias and lora.dora:
        raise UsageError(f"{config.where}: [lora] lora_bias", "cannot be set beside dora")
    if lora.init == "loftq" and config.base.quantize == "none":
        raise UsageError(f"{config.where}: [lora] init", "loftq makes up for quantizing, and the base isn't quantized")


def _check_shares(config: TrainConfig) -> None:
    shares = {
        "[data] heldout_share": config.data.heldout_share, "[lora] dropout": config.lora.dropout,
        "[train] floor": config.train.floor,
    }  # fmt: skip
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise UsageError(f"{config.where}: {name}", "isn't a share from 0 to below 1")
