"""Every mixture of models of several shapes, with and without an importance matrix: llama.cpp's own bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.merging.into_base import test_mixtures
from tests.merging.into_base.test_mixtures import MODELS, folders

__all__ = ["folders"]


@pytest.mark.parametrize(("name", "mixture"), itertools.product(MODELS, ("q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s")))
def test_a_mixture_is_llama_quantize_s(tmp_path: Path, folders: Any, name: str, mixture: str) -> None:
    test_mixtures.test_a_mixture_is_llama_quantize_s(tmp_path, folders, name, mixture)


@pytest.mark.parametrize(("name", "new"), itertools.product(MODELS, (True, False)))
def test_a_mixture_by_an_importance_matrix_is_llama_quantize_s(tmp_path: Path, folders: Any, name: str, new: bool) -> None:
    test_mixtures.test_a_mixture_by_an_importance_matrix_is_llama_quantize_s(tmp_path, folders, name, new)
