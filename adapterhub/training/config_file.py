"""The parser of a training config in TOML, which checks every key and reports all problems at once with their lines.

Paths are relative to the file. An unknown key is refused by name: a misspelled `learning_rate` that silently kept its default
would waste the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from adapterhub.manifest import canonical_json
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import toml_file
from adapterhub_converters.containers.json_file import is_integer
from adapterhub_converters.containers.open_file import read_bytes
from adapterhub_converters.errors import LocalIOError, NotFoundError, Problems, UsageError

from .train_config import SECTIONS, TrainConfig

# The names that other trainers use, and ours: peft's and transformers' first, then those of the programs built on them.
OTHER_TRAINERS_KEYS = {
    "batch_size": "rows", "bf16": "dtype", "cutoff_len": "sequence", "dataset": "train", "eval_steps": "evaluate_every",
    "exclude_modules": "exclude", "fp16": "dtype", "gradient_checkpointing": "checkpointing", "init_lora_weights": "init",
    "layers_to_transform": "layers", "load_in_4bit": "quantize", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "lora_r": "r", "lora_rank": "r", "loraplus_lr_ratio": "loraplus", "lr": "learning_rate", "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule", "max_grad_norm": "clip", "max_length": "sequence", "max_seq_len": "sequence",
    "max_seq_length": "sequence", "max_steps": "steps", "micro_batch_size": "micro_rows", "model": "path",
    "model_name_or_path": "path", "neftune_noise_alpha": "neftune", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "optim": "optimizer", "packing": "pack", "per_device_train_batch_size": "micro_rows", "rank": "r", "report_to": "log_to",
    "save_steps": "save_every", "sequence_len": "sequence", "target_modules": "targets", "test_size": "heldout_share",
    "torch_compile": "compile", "use_dora": "dora", "use_rslora": "rslora", "val_set_size": "heldout_share",
    "warmup_steps": "warmup", "loss_type": "method", "pref_beta": "beta", "pref_loss": "method", "rl": "method",
    "simpo_gamma": "gamma",
}  # fmt: skip
_WORD = safe_regex.Pattern(r"[A-Za-z0-9_./~:@-]+")


def read(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read the TOML file of a training run; `changes` are as in `parse`."""
    try:
        text = read_bytes(path, pipe=True).decode()
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file", code="no-such-file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LocalIOError(str(path), str(error)) from error
    return parse(text, folder=path.parent, location=str(path), changes=changes)


def parse(text: str, *, folder: Path, location: str, changes: Sequence[str] = ()) -> TrainConfig:
    """Parse the TOML text of a training run.

    Args:
        folder: The folder that relative paths start from.
        location: The name of the text in messages.
        changes: Overrides of values in the text, each as `section.key=value` with a TOML value; a single word needs no
            quotes: `train.steps=10`, `base.quantize=none`.

    Raises:
        UsageError: The first problem; its `problems` has all of them.
    """
    parser = _ConfigParser(toml_file.parse(text, location), text, folder, location)
    for change in changes:
        parser.apply_override(change)
    return parser.config()


def from_record(document: Mapping[str, Any], *, folder: Path, location: str) -> TrainConfig:
    """Return the config that adapter.json records, by `TrainConfig.document`; errors and `folder` are as in `parse`.

    Records of the drafts have null for keys without a value, and a computed number of steps beside the sections.
    """
    sections = {
        name: {key: value for key, value in section.items() if value is not None} if isinstance(section, Mapping) else section
        for name, section in document.items()
        if name != "steps"
    }
    return _ConfigParser(sections, "", folder, location).config()


class _ConfigParser:
    """A parser of one document and the TOML text that it was read from, with the problems found so far."""

    def __init__(self, document: dict[str, Any], text: str, folder: Path, location: str) -> None:
        self._text, self._folder, self._location = text, folder, location
        self._problems: Problems[UsageError] = Problems()
        self._reported: set[tuple[str, str]] = set()
        self._document = document
        self._overrides: dict[tuple[str, str], str] = {}

    def config(self) -> TrainConfig:
        """Return the config, or raise all problems."""
        for name in self._document:
            if name not in SECTIONS:
                self.report_problem(
                    "", name, "unknown section", _name_suggestion(name, SECTIONS) or f"The sections are {', '.join(SECTIONS)}"
                )
        sections = {name: self._section(name, section_class) for name, section_class in SECTIONS.items()}
        config = TrainConfig(**sections, folder=self._folder, location=self._location)
        _check(config, self.report_problem)
        self._problems.check()
        return config

    def report_problem(self, section: str, key: str, problem: str, hint: str = "") -> None:
        """Record a problem with `key`, or with a whole section if `section` is empty; only the first for each."""
        if (section, key) in self._reported:
            return
        self._reported.add((section, key))
        is_shown = self._problems.count < self._problems.SHOWN  # finding the line of a problem costs a pass over the text
        self._problems.add(
            UsageError(self._problem_location(section, key) if is_shown else "", problem, hint, code="invalid-config")
        )

    def _problem_location(self, section: str, key: str) -> str:
        if change := self._overrides.get((section, key)):
            return change[:80]
        # A key that is missing gets the line of its section.
        line = toml_file.line_of(self._text, section, key) or (toml_file.line_of(self._text, "", section) if section else None)
        label = f"[{section}] {key[:80]}" if section else f"[{key[:80]}]"
        return f"{self._location}:{line}: {label}" if line else f"{self._location}: {label}"

    def apply_override(self, change: str) -> None:
        name, equals, value_text = change.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            self._problems.add(
                UsageError(change[:80], "does not set a key", "Write it like train.steps=10", code="invalid-config")
            )
            return
        self._overrides[section, key] = change
        table = self._document.setdefault(section, {})
        # TOML has no bare words; a value such as `none` that does not parse is taken as a text.
        try:
            assignment = toml_file.parse(f"value = {value_text}", change[:80])
            if assignment.keys() != {"value"}:
                raise UsageError(change[:80], "sets more than one key", code="invalid-config")
        except UsageError as error:
            if not _WORD.fullmatch(value_text.strip()):
                self._problems.add(error)
                return
            assignment = {"value": value_text.strip()}
        # If the section is not a table, `_section` reports it.
        if isinstance(table, dict):
            table[key] = assignment["value"]

    def _section(self, name: str, section_class: type) -> Any:
        values = self._document.get(name, {})
        if not isinstance(values, Mapping):
            self.report_problem("", name, "is not a table")
            values = {}
        fields = {field.name: field for field in dataclasses.fields(section_class)}
        key_types = typing.get_type_hints(section_class)
        valid: dict[str, Any] = {}
        for key, value in values.items():
            if key not in fields:
                self.report_problem(name, key, "unknown key", self._unknown_key_hint(name, key, fields))
                continue
            if type(value) is datetime.date:  # TOML has dates without quotes
                value = value.isoformat()  # noqa: PLW2901
            try:
                valid[key] = _value(value, key_types[key])
            except ValueError as error:
                self.report_problem(name, key, str(error))
        for key, field in fields.items():
            # Keys without any default are required.
            if key not in valid and field.default is field.default_factory is dataclasses.MISSING:
                self.report_problem(name, key, "is missing")
                valid[key] = "" if key_types[key] is str else ("",)  # so that the other keys can be checked
        return section_class(**valid)

    def _unknown_key_hint(self, section: str, key: str, fields: Mapping[str, Any]) -> str:
        """Return the hint for an unknown key: the key that was probably meant, its right section, or all keys."""
        if self._problems.count >= self._problems.SHOWN:
            return ""
        if right_section := _section_of(key):
            return f"It belongs to [{right_section}]"
        return _name_suggestion(key, fields) or f"The keys are {', '.join(fields)}"


def _section_of(key: str) -> str | None:
    """Return the first section that has a key of this name."""
    return next(
        (name for name, fields in SECTIONS.items() if key in {field.name for field in dataclasses.fields(fields)}), None
    )


def _name_suggestion(name: str, names: Mapping[str, Any]) -> str:
    """Return a question with the name that was probably meant; empty if none is close."""
    name = name[:80].lower()
    # The key of another trainer has a certain meaning; a similar name is only a guess.
    equivalent = OTHER_TRAINERS_KEYS.get(name)
    if equivalent and equivalent not in names:
        return f"Did you mean {equivalent} in [{_section_of(equivalent)}]?"
    suggestions = [equivalent] if equivalent else difflib.get_close_matches(name, names, 1)
    return f"Did you mean {suggestions[0]}?" if suggestions else ""


def _value(value: Any, expected_type: Any) -> Any:
    """Return a value as the type of its key; raise ValueError if it has another type, or the record cannot hold it."""
    options = _options(expected_type)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
            choices = (*typing.get_args(option), *(("true", "false") if bool in options else ()))
            raise ValueError(f"{value!r:.80} is not one of {', '.join(map(str, choices))}")
        if typing.get_origin(option) is tuple:
            # A single text may stand in place of a list, unless the key takes a text in another sense, as `targets` does.
            values = [value] if isinstance(value, str) and len(options) == 1 else value
            if isinstance(values, list):
                with contextlib.suppress(ValueError):  # its message would show a single item; the one below shows all
                    return tuple(_value(item, typing.get_args(option)[0]) for item in values)
        elif typing.get_origin(option) is Mapping and _is_pairs(value):
            return _table(dict(value), option)
        elif isinstance(value, dict) and (typing.get_origin(option) is Mapping or dataclasses.is_dataclass(option)):
            return _table(value, option)
        # TOML tells 1 from 1.0, and nobody writes alpha = 32.0.
        elif option is float and is_integer(value):
            return float(value)
        elif option is not type(None) and type(value) is option:
            return _exact(value)
    raise ValueError(f"{value!r:.80} is not {_type_name(expected_type)}")


def _exact(value: Any) -> Any:
    """Return a value that the record can hold; raise ValueError for an integer that other programs round."""
    if is_integer(value) and abs(value) > canonical_json.MAX_INTEGER:
        raise ValueError("is beyond 2^53 - 1, which other programs round")
    return value


def _is_pairs(value: object) -> bool:
    """Return whether a value is a table as a record has it, in which the order of keys is kept: pairs of a text and a value."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
    )


def _options(expected_type: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(expected_type) in (types.UnionType, typing.Union)
    return typing.get_args(expected_type) if is_union else (expected_type,)


def _type_name(expected_type: Any, *, plural: bool = False) -> str:
    """Return what a value of the type is in a TOML file, in words."""
    names = []
    for option in _options(expected_type):
        if typing.get_origin(option) is tuple:
            names.append(f"a list of {_type_name(typing.get_args(option)[0], plural=True)}")
        elif option is bool:
            names.append("true or false")
        elif option is not types.NoneType:
            name = {int: "whole number", float: "number", str: "text"}.get(option, "table")
            keys = ", ".join(typing.get_type_hints(option)) if dataclasses.is_dataclass(option) else ""
            names.append((f"{name}s" if plural else f"a {name}") + (f" of {keys}" if keys else ""))
    return " or ".join(names)


def _table(values: dict[str, Any], expected_type: Any) -> Any:
    """Return a table as a mapping, or as the dataclass that has its keys as fields."""
    if not dataclasses.is_dataclass(expected_type):
        return {key: _item(key, value, typing.get_args(expected_type)[1]) for key, value in values.items()}
    hints = typing.get_type_hints(expected_type)
    if values.keys() != hints.keys():
        raise ValueError(f"{values!r:.80} does not have the keys {', '.join(hints)}")
    return expected_type(**{key: _item(key, value, hints[key]) for key, value in values.items()})  # type: ignore[operator]  # a dataclass


def _item(key: str, value: Any, expected_type: Any) -> Any:
    try:
        return _value(value, expected_type)
    except ValueError as error:
        raise ValueError(f"{key[:80]!r}: {error}") from error


class _ReportProblem(typing.Protocol):
    def __call__(self, section: str, key: str, problem: str, hint: str = "") -> None: ...


def _check(config: TrainConfig, report_problem: _ReportProblem) -> None:
    """Report values that are out of range, and combinations that are not allowed."""
    data, lora, train = config.data, config.lora, config.train
    # Values that have to be above 0; those that are not set count as 1. A row needs two tokens, one to predict the other.
    positive = {
        ("data", "sequence"): data.sequence - 1, ("lora", "r"): lora.r, ("train", "rows"): train.rows,
        ("train", "epochs"): train.epochs, ("train", "steps"): 1 if train.steps is None else train.steps,
        ("train", "learning_rate"): train.learning_rate, ("train", "loraplus"): train.loraplus,
        ("train", "micro_rows"): 1 if train.micro_rows is None else train.micro_rows, ("data", "train"): len(data.train),
        ("lora", "rank_pattern"): min(lora.rank_pattern.values(), default=1),
        ("preference", "beta"): config.preference.strength,
    }  # fmt: skip
    for place, value in positive.items():
        if value <= 0:
            report_problem(*place, "is too small")
    if data.date is not None:
        try:
            datetime.date.fromisoformat(data.date)
        except ValueError:
            report_problem("data", "date", "is not a date", "Write it like 2026-11-26")
    if not train.save_minutes >= 0:
        report_problem("train", "save_minutes", "must be at least 0")
    for place, value in {("data", "heldout_share"): data.heldout_share, ("lora", "dropout"): lora.dropout}.items():
        if not 0 <= value < 1:
            report_problem(*place, "must be at least 0 and below 1")
    _check_together(config, report_problem)
    if data.shares:
        _check_shares(data.shares, len(data.train), report_problem)
    _check_preference(config, report_problem)
    _check_places(config, report_problem)


def _check_together(config: TrainConfig, report_problem: _ReportProblem) -> None:
    data, lora, train = config.data, config.lora, config.train
    if train.micro_rows and train.micro_rows > 0 and train.rows % train.micro_rows:
        report_problem("train", "micro_rows", f"does not divide rows = {train.rows}")
    if data.heldout_share and data.heldout:
        report_problem("data", "heldout_share", "cannot be combined with heldout")
    for key in ("patience", "keep_best"):
        if getattr(train, key) and not (train.evaluate_every and (data.heldout or data.heldout_share)):
            report_problem("train", key, "needs evaluate_every and held-out data")
    if lora.lora_bias and lora.dora:
        report_problem("lora", "lora_bias", "cannot be combined with dora")


def _check_shares(shares: Sequence[float], files: int, report_problem: _ReportProblem) -> None:
    if len(shares) < files:
        report_problem("data", "train", "has files with a share and files without one", "Give each a share, or none")
    elif min(shares) <= 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        report_problem("data", "train", f"has shares that are not above 0 or add up to {sum(shares):.4g}, not to 1")


def _check_preference(config: TrainConfig, report_problem: _ReportProblem) -> None:
    if config.preference and config.data.loss == "all":
        report_problem("data", "loss", "all cannot be combined with a preference, which compares answers")
    if config.preference.method == "dpo":
        for key, required_value in (("dora", False), ("init", "default"), ("trainable_token_indices", ())):
            if getattr(config.lora, key) != required_value:
                report_problem("lora", key, "cannot be combined with dpo, which compares with the base", "Use orpo or simpo")


def _check_places(config: TrainConfig, report_problem: _ReportProblem) -> None:
    """Report addresses: a training run reads its files from this disk."""
    scheme, separator, _ = config.base.path.partition("://")
    if separator and scheme != "hf":
        report_problem("base", "path", "is an address; a training reads a base on this disk or at hf://", "Download it first")
    for key, names in (("train", config.data.paths), ("heldout", config.data.heldout)):
        if any("://" in name for name in names):
            report_problem("data", key, "contains an address; a training reads files on this disk", "Download them first")
