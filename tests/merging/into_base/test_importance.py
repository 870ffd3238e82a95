"""Importance matrices that cannot be what they say are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from adapterhub.merging.into_base.importance import read_importance
from adapterhub_converters.errors import AdapterhubError
from tests.merging.into_base.test_mixtures import write_importance


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated"),
        (b"\xff\xff\xff\x7f" + bytes(20), "neither a GGUF nor an importance matrix"),
        (struct.pack("<ii", 1, 1 << 30) + bytes(12), "a name that ends outside of the file"),
        (struct.pack("<iicii", 1, 1, b"a", 1, 1 << 30) + bytes(12), "a: numbers that end outside of the file"),
        (struct.pack("<iiciif", 1, 1, b"a", 1, 1, float("nan")), "a: NaN or Inf"),
        (b"GGUF" + bytes(20), "imatrix"),
    ],
)
def test_a_file_that_is_no_importance_matrix_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "imatrix").write_bytes(raw)
    with pytest.raises(AdapterhubError, match=message):
        read_importance(tmp_path / "imatrix")


ONE = np.ones((1, 8), np.float32)


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ({"a": ONE}, {}, "no tensors of sums, or not for the same names as the counts"),
        ({}, {"a": ONE}, "no tensors of sums"),
        ({"a": ONE}, {"a": np.ones((3, 1), np.float32)}, "a: 8 sums for 3 counts"),
        ({"a": ONE.astype(np.float16)}, {"a": np.ones((1, 1), np.float32)}, "must be two tensors in F32"),
        ({"a": ONE * np.inf}, {"a": np.ones((1, 1), np.float32)}, "a: NaN or Inf"),
    ],
)
def test_sums_that_are_not_understood_are_refused(
    tmp_path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(AdapterhubError, match=message):
        read_importance(write_importance(tmp_path / "imatrix.gguf", sums, counts))
