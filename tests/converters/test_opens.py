"""A conversion opens each file of an adapter at most twice: once to read it, once to copy it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_converters.formats import FORMATS, WRITTEN, convert, peft
from tests.converters import trained
from tests.converters.trained import LLAMA
from tests.support.opens import opens

LANGUAGE = [name for name in WRITTEN if name not in ("kohya", "diffusers")]


@pytest.mark.parametrize("name", LANGUAGE)
def test_no_file_is_opened_more_than_twice(tmp_path: Path, run: Callable[..., Any], name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    plain = trained.folder(trained.full("q_proj"), tmp_path / "plain")
    path = source / f"a{FORMATS[name].suffix}"
    convert.convert(plain, path, to=name, base=LLAMA)
    for to in ("peft", "raw"):
        counts = opens(run, tmp_path, source, "convert", path, tmp_path / f"out-{to}", "--to", to)
        assert counts, "nothing was seen"
        # A GGUF's header is read once more, for the prompt of the adapter.
        assert max(counts.values()) <= (2 if name == "gguf" or to in ("raw", name) else 1), counts


def test_from_a_folder_to_another(tmp_path: Path, run: Callable[..., Any]) -> None:
    plain = trained.folder(trained.full("q_proj"), tmp_path / "plain")
    names = sorted(item.name for item in plain.iterdir())
    assert names == sorted([peft.CONFIG, peft.WEIGHTS])
    counts = opens(run, tmp_path, plain, "convert", plain, tmp_path / "out", "--to", "mlx")
    assert counts == {peft.CONFIG: 1, peft.WEIGHTS: 1}
