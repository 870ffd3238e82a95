"""What does not fit a base is named in both directions, and what was never trained is not missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from tests.checks.test_checks import EMBED, Q0, codes
from tests.support.folders import Shapes, adapter, base, pairs


@pytest.mark.parametrize(
    ("shapes", "config", "code"),
    [
        (pairs(3), {}, "base-shallower"),
        (pairs(1), {}, "base-deeper"),
        (pairs(1), {"target_modules": [Q0]}, "base-deeper"),
        (pairs(2), {"target_modules": ["q_proj", "v_proj"]}, "uncovered-module"),
        (pairs(2), {"target_modules": r".*layers\.\d+\.self_attn\.[qv]_proj"}, "uncovered-module"),
        (pairs(2), {"target_modules": "all-linear"}, "uncovered-module"),
        (pairs(2, size=(8, 16)), {}, "shape-mismatch"),
        (pairs(2, size=(16, 8)), {}, "shape-mismatch"),
        (pairs(2) | pairs(2, module="model.layers.{}.mlp.up_proj"), {}, "no-such-module"),
        (pairs(2, module="base.layers.{}.self_attn.q_proj"), {}, "other-prefix"),
        ({**pairs(2), **EMBED}, {}, "tied-weights"),
        ({**pairs(2), "model.embed_tokens.weight": (13, 8)}, {"modules_to_save": ["embed_tokens"]}, "vocab-differs"),
        (
            {**pairs(2), "model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 8)},
            {"trainable_token_indices": [12]},
            "row-outside",
        ),
    ],
)
def test_what_does_not_fit_the_base(tmp_path: Path, shapes: Shapes, config: dict[str, Any], code: str) -> None:
    report = checks.check(adapter(tmp_path / "a", shapes, **config), base=base(tmp_path / "b"))
    assert code in codes(report)
    assert codes(report) <= {code, "tied-weights"}


@pytest.mark.parametrize("config", [{"layers_to_transform": [0]}, {"layers_to_transform": 0}])
def test_layers_that_were_never_to_be_trained_are_not_missed(tmp_path: Path, config: dict[str, Any]) -> None:
    assert codes(checks.check(adapter(tmp_path / "a", pairs(1), **config), base=base(tmp_path / "b"))) == set()


def test_a_base_saved_without_its_head_fits(tmp_path: Path) -> None:
    report = checks.check(adapter(tmp_path / "a", pairs(2)), base=base(tmp_path / "b", prefix=""))
    assert codes(report) == {"headless-base"}
    assert report.ok


def test_a_headless_base_of_another_size_does_not(tmp_path: Path) -> None:
    report = checks.check(adapter(tmp_path / "a", pairs(2)), base=base(tmp_path / "b", prefix="", size=16))
    assert "shape-mismatch" in codes(report)


def test_a_base_of_one_layer_is_too_shallow_and_not_of_another_prefix(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    codes = {problem.code for problem in checks.check(folder, base=base(tmp_path / "b", 1)).problems}
    assert codes == {"base-shallower"}
