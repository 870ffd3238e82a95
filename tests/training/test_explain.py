"""Every key is explained, and a new config is a config."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from adapterhub.training import config_file, config_help, train_config
from adapterhub_converters.errors import UsageError
from tests.conftest import ROOT


def test_every_key_explains_its_default() -> None:
    keys = {(section, item.name) for section, kind in train_config.SECTIONS.items() for item in dataclasses.fields(kind)}
    items = config_help.explain()
    assert {(item.section, item.key) for item in items} == keys
    assert [f"{item.section}.{item.key}" for item in items if not item.explanation.endswith(".")] == []
    assert {item.key for item in items if item.needed} == {"path", "train"}


def test_a_new_config_has_every_key_and_trains_as_it_stands() -> None:
    text = config_help.template()
    read = config_file.parse(text, folder=Path(), location="new")
    assert read == dataclasses.replace(
        config_file.parse('[base]\npath = "model"\n[data]\ntrain = ["train.jsonl"]\n', folder=Path(), location="new")
    )
    assert max(map(len, text.splitlines())) <= 128
    uncommented = re.sub(r"^#(\w+ =)", r"\1", text, flags=re.MULTILINE)
    document = tomllib.loads(uncommented)
    for section, kind in train_config.SECTIONS.items():
        assert list(document[section]) == [item.name for item in dataclasses.fields(kind)]
    config_file.parse(uncommented, folder=Path(), location="new")


@pytest.mark.parametrize("name", ["learning_rate", "train.learning_rate", "[train] learning_rate"])
def test_one_key_is_found_however_it_is_written(name: str) -> None:
    (item,) = config_help.explain(name)
    assert (item.section, item.key, item.default) == ("train", "learning_rate", "0.0002")


def test_a_section_has_all_of_its_keys_and_an_unknown_one_is_refused() -> None:
    assert {item.section for item in config_help.explain("lora")} == {"lora"}
    with pytest.raises(UsageError, match="Did you mean learning_rate?") as caught:
        config_help.explain("learnig_rate")
    assert caught.value.code == "config-key"
    with pytest.raises(UsageError, match="Did you mean learning_rate?"):
        config_help.explain("lr")  # the name that other trainers have


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_configs(path: Path) -> None:
    read = config_file.read(path)
    assert read.card.title
    assert read.card.license
