"""`adapterhub convert --list`: what it says is what conversions do, and what docs/formats.md says."""

from __future__ import annotations

import json

import click
import pytest

from adapterhub.cli.commands import convert
from adapterhub_converters.adapter import TUNERS
from adapterhub_converters.formats import FORMATS, PACKAGES, format_probe, round_trips
from adapterhub_converters.formats.mlx import full_tuning
from adapterhub_converters.formats.round_trips import Row
from tests.conftest import ROOT, Run

MARKS = {name: mark for mark, name in round_trips.MARKS.items()}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return format_probe.probe_formats()


def test_every_format_is_read_and_all_but_tinkers_are_written(rows: list[Row]) -> None:
    assert [row.name for row in rows] == [*FORMATS, *PACKAGES]
    assert all(row.reads for row in rows)
    assert {row.name for row in rows if not row.writes} == {"tinker"}


def test_the_page_names_every_tuner_and_counts_the_models_that_mlx_lm_tunes_as_a_whole() -> None:
    page = " ".join((ROOT / "docs/formats.md").read_text().split())
    words = page.lower().replace("-", "").replace("_", "").replace(" ", "")
    assert all(row.method.replace("_", "") in words for row in TUNERS.values())
    assert f"parameters of {len(full_tuning.SAME_PARAMETERS)} model types" in page
    assert "the format `tinker`, which is read and not written" in page


def test_convert_offers_every_format(rows: list[Row]) -> None:
    (option,) = (option for option in convert.convert.params if option.name == "style")
    assert isinstance(option.type, click.Choice)
    assert set(option.type.choices) == {row.name for row in rows if row.writes} | {"hf"}


def test_the_files_are_those_that_are_written(rows: list[Row]) -> None:
    files_by_format = {row.name: row.files for row in rows}
    assert files_by_format["ollama"] == ("Modelfile", "NAME.gguf")
    assert files_by_format["torchtune"] == ("NAME.safetensors",)


def test_the_command_reports_the_same(run: Run, rows: list[Row]) -> None:
    document = json.loads(run("convert", "--list", "--json").stdout)["formats"]
    assert {row["name"]: row["back"] for row in document} == {row.name: row.back for row in rows}
    families = json.loads(run("convert", "--list", "--json").stdout)["image_models"]
    assert {"SDXL", "FLUX.1", "Qwen-Image", "Wan", "Krea 2"} <= set(families)
    listing = json.loads(run("convert", "--list", "--json").stdout)
    assert {"method": "xlora", "merges": False} in listing["tuners"]
    assert {"method": "ia3", "merges": True} in listing["tuners"]
    assert {"llama", "qwen3_moe"} <= set(listing["mlx_full"])
    text = run("convert", "--list", "-v").stdout
    assert all(name in " ".join(text.split()) for name in (*(row["method"] for row in listing["tuners"]), *listing["mlx_full"]))
    assert all(family in " ".join(text.split()) for family in families)
    assert all(name in text for name in (*(row.name for row in rows), "hf", "image"))
    assert "=  the same file" in text
