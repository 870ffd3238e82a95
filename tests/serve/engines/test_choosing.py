"""Which engine serves a base, and what is told where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.engines import engine_for_base
from adapterhub.serve.engines.engine_for_base import EngineOptions
from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError
from tests.support import folders

BRINGS = ("torch", "vllm", "sglang", "mlx_lm", "llama_cpp_py_sync")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BRINGS:
        monkeypatch.setitem(sys.modules, name, None)


def options_of(folder: Path, **words: Any) -> EngineOptions:
    weights = folder / "base"
    options = {"engine": "auto", "environ": {"PATH": str(folder)}, "weights": weights, **words}
    return EngineOptions(base=folders.base(weights), name="base", folder=folder / "engine", **options)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("words", "kind", "code", "says"),
    [
        (
            {},
            NotFoundError,
            "no-engine",
            r"base: none of vllm, sglang, .*torch is installed. Install one of them, or name the pro",
        ),
        ({"engine": "vllm"}, NotFoundError, "no-engine", "vllm: vllm is not installed. Install it, or name its Python"),
        (
            {"engine": "vllm", "program": "/no/python"},
            NotFoundError,
            "not-found",
            "/no/python: no such program. Name its path, or leave it out for the one that is installed",
        ),
        ({"url": "http://127.0.0.1:9"}, UsageError, "name-engine", "9: does not report which engine it is. Name the engine"),
        ({"url": "localhost:9"}, UsageError, "invalid-usage", "localhost:9: is not the URL of a server. Write it like http://"),
        ({"engine": "llama.cpp"}, UsageError, "base-to-gguf", "base: is not a GGUF file, and llama.cpp reads no other"),
        (
            {"engine": "vllm", "program": sys.executable, "weights": None},
            UsageError,
            "invalid-usage",
            "base: is not on this disk",
        ),
    ],
)
def test_an_engine_that_cannot_be_is_refused_with_what_to_do(
    tmp_path: Path, words: dict[str, Any], kind: type[AdapterhubError], code: str, says: str
) -> None:
    with pytest.raises(kind, match=says) as refused:
        engine_for_base.open_engine(options_of(tmp_path, **words))
    assert refused.value.code == code
