"""The config file: known keys of the right kind, or a refusal that names the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.manifest import canonical_json
from adapterhub.training import config_file
from adapterhub_converters.errors import NotFoundError, UsageError

SMALL = '[base]\npath = "b"\n[data]\ntrain = "t.jsonl"\n'
MIX = '[base]\npath = "b"\n[data]\ntrain = [{path = "a", share = %s}]\n'


def test_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(SMALL + '[lora]\nalpha = 8\ntargets = ["q_proj", "v_proj"]\n')
    read = config_file.read(tmp_path / "c.toml")
    assert (read.base.quantize, read.data.train, read.lora.alpha) == ("nf4", ("t.jsonl",), 8.0)
    assert read.lora.targets == ("q_proj", "v_proj")
    assert read.resolve(read.base.path) == tmp_path / "b"
    assert str(tmp_path) not in str(read.document())


def test_patterns_and_layers_keep_their_order_and_their_kind() -> None:
    text = SMALL + "[lora]\nlayers = [2, 0]\nrank_pattern = {up_proj = 4, q_proj = 8}\nalpha_pattern = {q_proj = 16}\n"
    read = config_file.parse(text, folder=Path(), location="c.toml")
    lora = read.lora
    assert read.document()["lora"]["rank_pattern"] == [["up_proj", 4], ["q_proj", 8]]
    assert (lora.layers, list(lora.rank_pattern.items())) == ((2, 0), [("up_proj", 4), ("q_proj", 8)])
    assert lora.alpha_pattern == {"q_proj": 16.0}


RECORDED = """
[lora]
rank_pattern = {up_proj = 4, q_proj = 8}
alpha = 32
targets = ["q_proj", "up_proj"]
[train]
learning_rate = 2e-5
seed = 7
"""


@pytest.mark.parametrize("text", [SMALL, SMALL + RECORDED, MIX % "1.0"])
def test_a_recorded_config_is_a_config_and_gives_the_same_record(text: str) -> None:
    config = config_file.parse(text, folder=Path(), location="c.toml")
    record = json.loads(canonical_json.indented(config.document()))
    again = config_file.from_record(record, folder=Path(), location="c.toml")
    assert again == config
    assert list(again.lora.rank_pattern) == list(config.lora.rank_pattern)
    assert canonical_json.indented(again.document()) == canonical_json.indented(config.document())
    assert not [key for section in record.values() for key, value in section.items() if value is None]


def test_the_record_of_a_draft_is_a_config() -> None:
    config = config_file.parse(SMALL, folder=Path(), location="c.toml")
    record = config.document()
    record = {**record, "steps": 3, "lora": {**record["lora"], "rank_pattern": [], "layers": None}}
    assert config_file.from_record(record, folder=Path(), location="c.toml") == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SMALL + "[trian]\n", "c.toml:5: [trian]: unknown section. Did you mean train?"),
        (SMALL + "[more]\n", "c.toml:5: [more]: unknown section. The sections are base, data, lora, train, preference, card"),
        (SMALL + "[train]\nlearnig_rate = 1\n", "c.toml:6: [train] learnig_rate: unknown key. Did you mean learning_rate?"),
        (SMALL + "[train]\nqqq = 1\n", "c.toml:6: [train] qqq: unknown key. The keys are steps,"),
        (SMALL + "[lora]\nrank = 8\n", "c.toml:6: [lora] rank: unknown key. Did you mean r?"),
        (SMALL + "[lora]\nlr = 8\n", "c.toml:6: [lora] lr: unknown key. Did you mean learning_rate in [train]?"),
        (SMALL + "[train]\nr = 8\n", "c.toml:6: [train] r: unknown key. It belongs to [lora]"),
        ("[data]\ntrain = 't'\n", "c.toml: [base] path: is missing"),
        ("[base]\n[data]\ntrain = 't'\n", "c.toml:1: [base] path: is missing"),
        (SMALL + '[train]\nrows = "4"\n', "c.toml:6: [train] rows: '4' is not a whole number"),
        (SMALL + "[train]\nrows = true\n", "c.toml:6: [train] rows: True is not a whole number"),
        (SMALL + '[train]\nschedule = "wsd"\n', "[train] schedule: 'wsd' is not one of cosine, linear, constant"),
        (
            SMALL + "[train]\nseed = 9007199254740992\n",
            "c.toml:6: [train] seed: is beyond 2^53 - 1, which other programs round",
        ),
        (
            SMALL + "template_options = {budget = 9007199254740993}\n",
            "c.toml:5: [data] template_options: 'budget': is beyond 2^53 - 1, which other programs round",
        ),
        (SMALL + "[lora]\nr = 0\n", "c.toml:6: [lora] r: is too small"),
        (SMALL + "[train]\nsave_minutes = -1\n", "c.toml:6: [train] save_minutes: must be at least 0"),
        (SMALL + "[train]\nrows = 4\nmicro_rows = 3\n", "c.toml:7: [train] micro_rows: does not divide rows = 4"),
        (SMALL + "[lora]\ntargets = [1]\n", "c.toml:6: [lora] targets: [1] is not a text or a list of texts"),
        (SMALL + "[lora]\nlayers = [true]\n", "c.toml:6: [lora] layers: [True] is not a list of whole numbers"),
        (SMALL + '[lora]\nrank_pattern = {q_proj = "4"}\n', "[lora] rank_pattern: 'q_proj': '4' is not a whole number"),
        (SMALL + "[lora]\nrank_pattern = {q_proj = 0}\n", "c.toml:6: [lora] rank_pattern: is too small"),
        (MIX % "0.7", "c.toml:4: [data] train: has shares that are not above 0 or add up to 0.7, not to 1"),
        (
            MIX[:-2] % "1" + ", 'b']\n",
            "c.toml:4: [data] train: has files with a share and files without one. Give each a share, or",
        ),
        (
            MIX % "1, more = 2",
            "c.toml:4: [data] train: [{'path': 'a', 'share': 1, 'more': 2}] is not a list of texts or tables",
        ),
        (SMALL + "[lora]\ndropout = 1.0\n", "c.toml:6: [lora] dropout: must be at least 0 and below 1"),
        (SMALL + '[lora]\ninit = "loftq"\n', "c.toml:6: [lora] init: 'loftq' is not one of default, pissa"),
        ("[base\n", "c.toml: not valid TOML"),
        ("base = 3\n" + SMALL[17:], "c.toml:1: [base]: is not a table"),
        (
            SMALL.replace('"b"', '"https://host/model"'),
            "c.toml:2: [base] path: is an address; a training reads a base on this disk or at hf://. Download it first",
        ),
        (SMALL.replace("t.jsonl", "https://host/t.jsonl"), "[data] train: contains an address"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_file.parse(text, folder=Path(), location="c.toml")
    assert says in str(caught.value)


def test_all_problems_are_reported_at_once_each_with_its_line() -> None:
    text = '[base]\npath = "b"\n[data]\n[lora]\nrank = 8\nalpha = "x"\ndropout = 2\n'
    with pytest.raises(UsageError) as caught:
        config_file.parse(text, folder=Path(), location="c.toml")
    assert caught.value.problems == (
        "c.toml:3: [data] train: is missing",
        "c.toml:5: [lora] rank: unknown key. Did you mean r?",
        "c.toml:6: [lora] alpha: 'x' is not a number",
        "c.toml:7: [lora] dropout: must be at least 0 and below 1",
    )
    unknown_keys = SMALL + "[lora]\n" + "".join(f"key{number} = 1\n" for number in range(5000))
    with pytest.raises(UsageError) as caught:
        config_file.parse(unknown_keys, folder=Path(), location="c.toml")
    assert (len(caught.value.problems), caught.value.problems[-1]) == (21, "4,980 more problems")


def test_changes_replace_values_of_the_file_and_are_recorded() -> None:
    changes = ("train.steps=10", "base.quantize=none", 'lora.targets=["q_proj"]', "train.learning_rate = 1e-3")
    read = config_file.parse(SMALL + "[train]\nsteps = 5\n", folder=Path(), location="c.toml", changes=changes)
    assert (read.train.steps, read.base.quantize, read.train.learning_rate) == (10, "none", 1e-3)
    assert (read.document()["train"]["steps"], read.document()["lora"]["targets"]) == (10, ["q_proj"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("steps=10", "steps=10: does not set a key. Write it like train.steps=10"),
        ("train.stps=10", "train.stps=10: unknown key. Did you mean steps?"),
        ("train.steps=ten", "train.steps=ten: 'ten' is not a whole number"),
        ("lora.r=4\nalpha=2", "sets more than one key"),
        ("lora.targets=[1", "lora.targets=[1: not valid TOML"),
    ],
)
def test_an_invalid_change_is_quoted(change: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_file.parse(SMALL, folder=Path(), location="c.toml", changes=[change])
    assert says in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        config_file.read(tmp_path / "none.toml")
