"""Repairs of tensors: only what the base or peft itself settles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.checks.repair import fix
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft
from tests.checks.test_repair import PREFIX, renamed, tensors
from tests.support.folders import adapter, base, pairs


def test_a_lone_state_dict_becomes_a_folder_if_its_alpha_is_given(tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    state = {
        name.removeprefix(PREFIX).replace(".weight", ".default.weight"): array
        for name, array in tensors(tmp_path / "a").items()
    }
    safetensors_file.write(tmp_path / "lone.safetensors", state)
    with pytest.raises(RefusedError, match="its alpha is not recorded"):
        fix(tmp_path / "lone.safetensors", tmp_path / "out")
    fixed = fix(tmp_path / "lone.safetensors", tmp_path / "out", alpha=4)
    assert [repair.code for repair in fixed.repairs] == ["lone-state-dict", "key-prefix", "no-targets", "rank-config"]
    source, read_back = convert.read(tmp_path / "a"), convert.read(tmp_path / "out")
    for target, delta in source.deltas.items():
        read_delta = read_back.deltas[target]
        assert (delta.scaling, delta.r) == (read_delta.scaling, read_delta.r)
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "a").keys()
    assert not checks.check(tmp_path / "out").problems


def test_a_prefix_that_is_not_certain_is_proposed_and_the_base_settles_it(tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    renamed(tmp_path / "a", lambda name: name.removeprefix(PREFIX + "model."))
    fixed = fix(tmp_path / "a", tmp_path / "out")
    assert (fixed.repairs, [proposal.code for proposal in fixed.proposals]) == ((), ["key-prefix", "no-base-name"])
    spec = base(tmp_path / "base", 2)
    fix(tmp_path / "a", tmp_path / "out", base=spec)
    assert sorted(tensors(tmp_path / "out")) == sorted(PREFIX + name for name in pairs(2))


@pytest.mark.parametrize("same", [True, False])
def test_a_copy_goes_only_if_it_is_the_bases_own(tmp_path: Path, same: bool) -> None:
    spec = base(tmp_path / "base", 2, tied=False)
    path = adapter(tmp_path / "a", pairs(2), target_modules=["q_proj", "lm_head"])
    copy = np.zeros((12, 8), np.float32) if same else np.ones((12, 8), np.float32)
    key = f"{PREFIX}lm_head.base_layer.weight"
    safetensors_file.write(path / peft.WEIGHTS, {**tensors(path), key: copy})
    assert [p.code for p in fix(path, tmp_path / "out").proposals] == ["copy", "no-base-name"]
    fixed = fix(path, tmp_path / "out", base=spec)
    assert [repair.code for repair in fixed.repairs] == (["copy"] if same else [])
    assert not same or key not in tensors(tmp_path / "out")
