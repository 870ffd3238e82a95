"""Repairs of a config: what is certain is written, what may change the function is proposed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.checks.repair import fix
from adapterhub.manifest import derive
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import convert, peft
from tests.checks.test_repair import codes, configured
from tests.conftest import Run
from tests.support.folders import adapter, pairs


def test_an_overlap_of_alphas_is_proposed_only(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(2), alpha_pattern={"q_proj": 3, r"0\.self_attn\.q_proj": 5})
    fixed = fix(path, tmp_path / "out")
    assert fixed.repairs == ()
    overlap = next(proposal for proposal in fixed.proposals if proposal.code == "pattern-overlap")
    explicit = json.loads(overlap.do.partition('"alpha_pattern" to ')[2])
    configured(path, lambda config: config.update(alpha_pattern=explicit))
    assert set(explicit.values()) == {3}
    assert "pattern-overlap" not in codes(path)


def test_a_key_that_may_change_the_function_is_proposed_only(tmp_path: Path) -> None:
    fixed = fix(adapter(tmp_path / "a", pairs(1), use_next_big_thing=True), tmp_path / "out")
    assert fixed.repairs == ()
    assert "unknown-key" in {proposal.code for proposal in fixed.proposals}


def test_a_rank_pattern_keeps_the_alphas_in_their_order(tmp_path: Path) -> None:
    alphas = {"z_proj": 1, "q_proj": 3, "a_proj": 2}
    fix(adapter(tmp_path / "a", pairs(2), r=7, alpha_pattern=alphas), tmp_path / "out")
    config = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert (config["r"], list(config["alpha_pattern"])) == (2, list(alphas))


def test_the_base_is_named_where_it_is_recorded(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(1))
    described = derive.describe(path)
    dataclasses.replace(described, base=dataclasses.replace(described.base, repo="org/base")).write(path)
    fixed = fix(path, tmp_path / "out")
    assert [repair.code for repair in fixed.repairs] == ["no-base-name"]
    assert convert.read(tmp_path / "out").meta.base_model == "org/base"
    settled, _ = derive.finalize(tmp_path / "out")
    assert settled.base.repo == "org/base"
    assert not {"files-changed"} & codes(tmp_path / "out")


def test_an_alpha_is_refused_for_an_adapter_that_records_it(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    error = "error: a: it has a config, which decides the scale. Leave out --alpha and --rslora  [alpha-recorded]\n"
    for option in (("--alpha", "8"), ("--rslora",)):
        assert run("fix", "a", *option, code=6).stderr == error
    with pytest.raises(RefusedError, match="it has a config, which decides the scale. Leave out its alpha and rsLoRA"):
        fix(tmp_path / "a", tmp_path / "out", alpha=8)


HOSTILE = [
    {"rank_pattern": {"(": 3}}, {"rank_pattern": [1]}, {"rank_pattern": {"q_proj": [3]}}, {"r": [1]}, {"r": "x"},
    {"alpha_pattern": {"q_proj": [1], "0.self_attn.q_proj": [2]}}, {"target_modules": 5}, {"target_modules": "((("},
    {"target_modules": [["a"]]}, {"layers_to_transform": "x"}, {"peft_type": [7]}, {"init_lora_weights": [1]},
    {"base_model_name_or_path": [1]}, {"modules_to_save": 3}, {"lora_bias": [1]}, {"unknown": {"a": [{}]}},
]  # fmt: skip


@pytest.mark.parametrize("config", HOSTILE, ids=map(str, HOSTILE))
def test_a_config_that_makes_no_sense_is_an_error_of_ours_or_stays(tmp_path: Path, config: dict[str, Any]) -> None:
    path = adapter(tmp_path / "a", pairs(2), **config)
    with contextlib.suppress(AdapterhubError):
        assert fix(path, tmp_path / "out").out in (None, tmp_path / "out")
        return
    assert not (tmp_path / "out").exists()
