"""The config of a training run as frozen dataclasses, one for each section of the TOML file (`config_file` reads it).

`config_help` explains every key, for `--explain`, for a new config and for the reference in the documentation.
"""

from __future__ import annotations

import dataclasses
import math
import os.path
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from adapterhub_converters.lazy_dataclass import dataclass

BaseForm = Literal["nf4", "none"]
"""The form of the linear layers of a base in memory: quantized, or in the dtype to compute in."""
LossTokens = Literal["all", "completion"]
"""The tokens that a loss counts."""


@dataclass(frozen=True)
class BaseConfig:
    """The model to adapt."""

    path: str
    name: str | None = None
    revision: str | None = None
    quantize: BaseForm = "nf4"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: bool = True


@dataclass(frozen=True)
class DataSource:
    """One of several training files, with its share of the tokens to train on."""

    path: str
    share: float


@dataclass(frozen=True)
class DataConfig:
    """Data to train on, and held-out data."""

    train: tuple[str | DataSource, ...]
    heldout: tuple[str, ...] = ()
    heldout_share: float = 0.0
    columns: Mapping[str, str] = field(default_factory=dict)
    split_text: Literal["no", "paragraphs", "lines"] = "no"
    sequence: int = 512
    pack: bool = True
    loss: LossTokens = "completion"
    chat_template: str | None = None
    template_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    date: str | None = None
    heldout_tokens: int = 8192

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
    alpha: float = 32
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: Literal["default", "pissa"] = "default"
    trainable_token_indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class OptimConfig:
    """The steps, the optimizer, and the actions between steps."""

    steps: int | None = None
    epochs: float = 1.0
    rows: int = 4
    micro_rows: int | None = None
    learning_rate: float = 2e-4
    loraplus: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    neftune: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    compile: bool = False
    checkpointing: bool | Literal["auto"] = "auto"
    evaluate_every: int = 0
    keep_best: bool = False
    patience: int = 0
    samples: tuple[str, ...] = ()
    sample_tokens: int = 48
    log_to: tuple[str, ...] = ()
    save_minutes: float = 10.0
    save_every: int = 0
    keep_every: int = 0
    seed: int = 0
    deterministic: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class PreferenceConfig:
    """Learning from preference pairs: the chosen answer becomes more likely than the rejected one."""

    method: Literal["none", "dpo", "orpo", "simpo"] = "none"
    beta: float | None = None
    gamma: float = 1.0

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
    dequantized: bool = False
    """Whether the NF4 base is dequantized once, for all steps; `budget.resolve_auto` decides it."""

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
        """Return the sections as plain values for adapter.json, which `config_file.from_record` reads.

        Paths are as they were written. Keys without a value are left out.
        """
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        for section, key in (("base", "cache"), ("train", "save_minutes")):
            del sections[section][key]  # it does not change a byte of the result
        return {
            name: {key: _plain(value) for key, value in section.items() if value is not None and value != {}}
            for name, section in sections.items()
        }


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
