"""The files of an adapter read into contents: no byte of them is a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub import checks
from adapterhub.manifest import derive
from adapterhub_converters.bases import read_hf
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.formats import peft
from tests.checks.test_checks import codes
from tests.support.folders import Shapes, adapter, base, pairs


def test_untrustworthy_files_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    whole = (folder / peft.WEIGHTS).read_bytes()
    (folder / peft.WEIGHTS).write_bytes(whole[:-1])
    report = checks.check(folder)
    assert codes(report) == {"malformed"}
    assert {verdict.verdict for verdict in report.verdicts.values()} == {"refused"}
    (folder / peft.WEIGHTS).unlink()
    assert codes(checks.check(folder)) == {"missing-file"}
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    assert "pickle" in codes(checks.check(folder))


CONFIG_KEYS = [
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "init_lora_weights", "use_rslora", "use_dora", "lora_bias", "bias", "trainable_token_indices",
    "base_model_name_or_path", "fan_in_fan_out", "task_type", "revision", "nonsense",
]  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.sampled_from(["(", ".*"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(CONFIG_KEYS), value=JSON)
def test_no_config_value_is_a_crash(tmp_path: Path, key: str, value: object) -> None:
    if not (tmp_path / "a").exists():
        extra: Shapes = {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8), "model.norm.weight": (8,)}
        adapter(tmp_path / "a", {**pairs(2), **extra})
        base(tmp_path / "b")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], key: value}
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(config))
    try:
        checks.check(tmp_path / "a", base=read_hf(tmp_path / "b"))
    except NotFoundError:
        assert key == "peft_type"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 10_000), byte=st.integers(0, 255), name=st.sampled_from([peft.WEIGHTS, peft.CONFIG, "adapter.json"])
)
def test_no_byte_is_a_crash(tmp_path: Path, place: int, byte: int, name: str) -> None:
    folder = tmp_path / "a"
    if not folder.exists():
        adapter(folder, pairs(1))
        derive.describe(folder, base=base(tmp_path / "b", 1)).write(folder)
    whole = (folder / name).read_bytes()
    place %= len(whole)
    (folder / name).write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    try:
        report = checks.check(folder, base=read_hf(tmp_path / "b"))
        assert report.ok == (byte == whole[place]) or name == "adapter.json"
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["a", "adapter"])
def test_a_file_keeps_its_name_though_the_name_of_its_folder_begins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter(tmp_path / name, pairs(2))
    (tmp_path / name / "adapter_model.safetensors").write_bytes(b'\7\0\0\0\0\0\0\0{"x":1}')
    monkeypatch.chdir(tmp_path)
    problems = checks.check(Path(name)).problems
    assert [problem.file for problem in problems if problem.code == "malformed"] == ["adapter_model.safetensors"]
