"""What a probe measures of each format is what the table keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats import format_probe, round_trips
from adapterhub_converters.formats.round_trips import Row
from tests.converters import trained
from tests.converters.trained import LLAMA


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return format_probe.probe_formats()


def test_the_table_that_is_kept_is_the_measured_one(rows: list[Row]) -> None:
    assert round_trips.rows() == rows


@pytest.mark.parametrize("name", ["torchtune", "litgpt", "megatron"])
@pytest.mark.parametrize("kinds", [(), ("q_proj", "k_proj", "v_proj")])
def test_a_trainers_own_tensors_come_back_from_peft(tmp_path: Path, name: str, kinds: tuple[str, ...]) -> None:
    formats.convert(trained.folder(trained.full(*kinds), tmp_path / "a"), tmp_path / "b", to=name, base=LLAMA)
    plain = trained.stripped(tmp_path / "b")
    formats.convert(plain, tmp_path / "peft", to="peft", base=LLAMA, alpha=4)
    formats.convert(tmp_path / "peft", tmp_path / "again", to=name, base=LLAMA)
    assert trained.stripped(tmp_path / "again").read_bytes() == plain.read_bytes()
