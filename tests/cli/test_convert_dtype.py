"""`convert --dtype`: what a GGUF stores its numbers as, said in the report."""

from __future__ import annotations

import json
from pathlib import Path

from adapterhub_converters.containers.gguf_file import GGUFFile
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs


def test_f16_is_stored_and_its_rounding_reported(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    base(tmp_path / "base")
    result = run("convert", "sql", "a.gguf", "--to", "gguf", "--base", "base", "--dtype", "f16", "--json")
    assert json.loads(result.stdout)["format"] == "gguf"
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert {info.type_name for info in file.tensors.values()} == {"F16"}
    assert "rounded" in result.stdout


def test_other_formats_keep_the_types_of_the_source(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    result = run("convert", "sql", "out", "--to", "mlx", "--dtype", "f16", code=2)
    assert "mlx keeps the types of the source" in result.stderr
    assert not (tmp_path / "out").exists()
