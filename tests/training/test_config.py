"""The config file: known keys of the right kind, or a refusal that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.training import config
from adapterhub_converters.errors import NotFoundError, UsageError

SMALL = '[base]\npath = "b"\n[data]\ntrain = "t.jsonl"\n'


def test_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(SMALL + '[lora]\nalpha = 8\ntargets = ["q_proj", "v_proj"]\n')
    read = config.read(tmp_path / "c.toml")
    assert (read.base.quantize, read.data.train, read.lora.alpha) == ("nf4", ("t.jsonl",), 8.0)
    assert read.lora.targets == ("q_proj", "v_proj")
    assert read.resolve(read.base.path) == tmp_path / "b"
    assert str(tmp_path) not in str(read.document())


def test_patterns_and_layers_keep_their_order_and_their_kind() -> None:
    text = SMALL + "[lora]\nlayers = [2, 0]\nrank_pattern = {up_proj = 4, q_proj = 8}\nalpha_pattern = {q_proj = 16}\n"
    read = config.parse(text, folder=Path(), where="c.toml")
    lora = read.lora
    assert read.document()["lora"]["rank_pattern"] == [["up_proj", 4], ["q_proj", 8]]
    assert (lora.layers, list(lora.rank_pattern.items())) == ((2, 0), [("up_proj", 4), ("q_proj", 8)])
    assert lora.alpha_pattern == {"q_proj": 16.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SMALL + "[trian]\n", "c.toml: unknown section [trian]. The sections are base, data, lora, train, card"),
        (SMALL + "[train]\nlearnig_rate = 1\n", "c.toml: [train] learnig_rate: unknown key. The keys are steps,"),
        ("[data]\ntrain = []\n", "c.toml: [base] path: is missing"),
        (SMALL + '[train]\nrows = "4"\n', "c.toml: [train] rows: '4' has the wrong type"),
        (SMALL + "[train]\nrows = true\n", "c.toml: [train] rows: True has the wrong type"),
        (SMALL + '[train]\nschedule = "sine"\n', "c.toml: [train] schedule: 'sine' is not one of cosine, linear, constant"),
        (SMALL + "[lora]\nr = 0\n", "c.toml: [lora] r: is too small"),
        (SMALL + "[train]\nrows = 4\nmicro_rows = 3\n", "[train] micro_rows: does not divide rows = 4"),
        (SMALL + "[lora]\ntargets = [1]\n", "c.toml: [lora] targets: [1] has the wrong type"),
        (SMALL + "[lora]\nlayers = [true]\n", "c.toml: [lora] layers: [True] has the wrong type"),
        (SMALL + '[lora]\nrank_pattern = {q_proj = "4"}\n', "c.toml: [lora] rank_pattern 'q_proj': '4' has the wrong type"),
        (SMALL + "[lora]\nrank_pattern = {q_proj = 0}\n", "c.toml: [lora] rank_pattern: is too small"),
        (SMALL + "[lora]\ndropout = 1.0\n", "c.toml: [lora] dropout: must be at least 0 and below 1"),
        (
            SMALL[:18] + 'quantize = "none"\n' + SMALL[18:] + '[lora]\ninit = "loftq"\n',
            "[lora] init: loftq needs a quantized base",
        ),
        ("[base\n", "c.toml: not valid TOML"),
        ("base = 3\n" + SMALL[17:], "c.toml: [base]: is not a table"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.parse(text, folder=Path(), where="c.toml")
    assert says in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        config.read(tmp_path / "none.toml")
