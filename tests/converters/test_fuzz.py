"""The fuzz targets run: some hundred to thousand inputs each time; and configs that were found odd."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import mlx, peft
from tests.conftest import ROOT
from tests.fuzz import fuzz_parsers

COMMANDS = ROOT / "tests/fuzz/fuzz_commands.py"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = {f"{Q}.lora_A.weight": np.ones((2, 4), np.float32), f"{Q}.lora_B.weight": np.ones((3, 2), np.float32)}


def test_every_seed_is_read_or_refused_and_some_are_read() -> None:
    for seed in fuzz_parsers.seeds():
        fuzz_parsers.PARSERS[seed[0]](seed[1:])  # good inputs: nothing is raised


def test_every_bad_document_of_the_corpus_is_refused() -> None:
    for document in fuzz_parsers.documents("bad"):
        with pytest.raises(AdapterhubError):
            fuzz_parsers.PARSERS[document[0]](document[1:])


@pytest.mark.parametrize("seed", [0, 1])
def test_mutations_are_read_or_refused(seed: int) -> None:
    fuzz_parsers.plain(3_000, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_broken_files_never_break_the_command_line(seed: int) -> None:
    result = subprocess.run(
        [sys.executable, str(COMMANDS), "150", "--seed", str(seed), "--seconds", "120"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    "change",
    [
        {"r": "8"}, {"r": True}, {"r": 1e400}, {"r": None}, {"lora_alpha": []}, {"lora_alpha": 2**1000}, {"lora_alpha": {}},
        {"rank_pattern": [1]}, {"rank_pattern": {"q_proj": "2"}}, {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"[[:a:]]q": 2}},
        {"alpha_pattern": {"q" * 2000: 2}}, {"alpha_pattern": {"[": 1}}, {"alpha_pattern": "x"}, {"use_rslora": "yes"},
        {"peft_type": None}, {"peft_type": ["LORA"]}, {"lora_dropout": "0"},
        {"init_lora_weights": {"a": 1}}, {"base_model_name_or_path": 4}, {"revision": []}, {"fan_in_fan_out": 1.5},
        {"trainable_token_indices": {"embed": "x"}, "use_bdlora": True}, {"task_type": {}},
    ],
)  # fmt: skip
def test_a_peft_config_that_makes_no_sense_is_refused_in_one_line(change: dict[str, Any]) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | change
    with pytest.raises(AdapterhubError) as caught:
        peft.parse(json.dumps(config).replace("Infinity", "1e999"), TENSORS, {}, location="x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        b"", b"null", b"[]", b"{", b'{"a":1,"a":2}', b"\xff\xfe", b'{"lora_parameters": NaN}', b"[" * 100_000,
        b'{"lora_parameters": {"rank": 2, "scale": 1e999}}', b'{"lora_parameters": {"rank": 2, "scale": "2"}}',
        b'{"fine_tune_type": ["lora"], "lora_parameters": {"scale": 1}}', b'{"lora_parameters": []}',
    ],
)  # fmt: skip
def test_an_mlx_config_that_makes_no_sense_is_refused_in_one_line(tmp_path: Path, config: bytes) -> None:
    (tmp_path / mlx.CONFIG).write_bytes(config)
    with pytest.raises(AdapterhubError) as caught:
        mlx.read(tmp_path)
    assert "\n" not in str(caught.value)
