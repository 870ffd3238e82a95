"""The table of formats: light, the one source of the choices and of the schema's enum, and open to other packages."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import adapterhub_schemas
from adapterhub_converters import formats
from adapterhub_converters.errors import ParameterError
from adapterhub_converters.formats import FORMATS, adapter_claims
from tests.conftest import ROOT
from tests.converters import trained

PLUGIN = """
from adapterhub_converters.formats import Format
FORMAT = Format("upside-down", "upside_down.files", suffix=".upside")
"""
FILES = """
import json
from adapterhub_converters.formats import FORMATS, adapter_claims
HEAD = b"upside down\\n"
def sniff(candidate):
    return candidate.is_file and candidate.path.read_bytes().startswith(HEAD)
def write(adapter, path, *, base=None):
    other = path.with_name("plain")
    report = FORMATS["raw"].write(adapter, other)
    path.write_bytes(HEAD + other.read_bytes()[::-1])
    other.unlink()
    return report
def read(path, *, base=None):
    other = path.with_name("plain-again")
    other.write_bytes(path.read_bytes()[len(HEAD):][::-1])
    try:
        return FORMATS["raw"].read(other)
    finally:
        other.unlink()
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed distribution that adds a format."""
    package, info = tmp_path / "site/upside_down", tmp_path / "site/upside_down-1.0.dist-info"
    for folder, files in (
        (package, {"__init__.py": PLUGIN, "files.py": FILES}),
        (info, {
            "METADATA": "Metadata-Version: 2.1\nName: upside-down\nVersion: 1.0\n",
            "entry_points.txt": "[adapterhub.formats]\nupside-down = upside_down:FORMAT\nmissing = nowhere:FORMAT\n"
            "peft = upside_down:FORMAT\n",
        }),
    ):  # fmt: skip
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    return package.parent


def test_the_table_loads_neither_numpy_nor_a_format() -> None:
    code = (
        "import sys, adapterhub_converters.formats as formats; formats.names(); "
        "print([name for name in sys.modules if name == 'numpy' or name.startswith('adapterhub_converters.formats.')])"
    )
    env = {"PYTHONPATH": str(ROOT / "converters")}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_every_row_has_its_module(row: formats.Format) -> None:
    module = importlib.import_module(row.module)
    assert all(callable(getattr(module, name)) for name in ("sniff", "read", *["write"] * row.writes))
    assert bool(row.suffix) != row.folder


def test_the_schema_has_the_formats_of_the_table() -> None:
    schema = json.loads(Path(adapterhub_schemas.__file__).with_name("adapter.schema.json").read_text())
    assert set(schema["properties"]["format"]["enum"]) == {*FORMATS, adapter_claims.OTHER}
    assert set(schema["properties"]["recipe"]["properties"]["to"]["enum"]) == set(formats.WRITTEN)


def test_an_installed_package_adds_a_format(site: Path, tmp_path: Path) -> None:
    source = trained.folder(trained.full("q_proj"), tmp_path / "sql")
    env = {"PYTHONPATH": f"{site}:{ROOT}:{ROOT / 'converters'}:{ROOT / 'schemas'}"}

    def call(*args: object) -> str:
        words = [sys.executable, "-m", "adapterhub", *map(str, args)]
        return subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "upside-down" in call("convert", "--help")
    call("convert", source, "x.upside", "--to", "upside-down")
    call("convert", "x.upside", "back", "--to", "peft")
    assert trained.contents(tmp_path / "back") == trained.contents(source)


def test_a_package_cannot_replace_a_format_and_a_broken_one_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    formats._entry_points.cache_clear()
    try:
        assert formats.names()[-3:] == ("upside-down", "missing", "ollama")
        assert formats.find("peft") is FORMATS["peft"]
        assert formats.find("upside-down").suffix == ".upside"
        with pytest.raises(ParameterError, match="to: format 'missing': nowhere:FORMAT cannot be loaded"):
            formats.find("missing")
    finally:
        formats._entry_points.cache_clear()
