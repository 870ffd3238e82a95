"""The largest singular triplets are those of the whole decomposition, whatever the spectrum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from adapterhub_converters.adapter import singular_values

Spectrum = Callable[[int], np.ndarray]
SPECTRA: dict[str, Spectrum] = {
    "falling": lambda n: 1 / np.arange(1, n + 1),
    "slowly": lambda n: 1 - 0.5 * np.arange(n) / n,
    "outlier": lambda n: np.concatenate([[100.0], 1 - 0.5 * np.arange(n - 1) / n]),
    "cluster": lambda n: np.concatenate([1 + 1e-4 * np.arange(12, 0, -1), np.linspace(0.9, 0.1, n - 12)]),
    "steep": lambda n: np.exp(-np.arange(n) / 2),
}


@pytest.fixture(autouse=True)
def _small_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singular_values, "MAX_DIRECT", 64)


def matrix_with(m: int, n: int, spectrum: Spectrum) -> np.ndarray:
    rng = np.random.default_rng(7)
    k = min(m, n)
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return ((U * spectrum(k)) @ V.T).astype(np.float32)


def best(U: np.ndarray, S: np.ndarray, Vt: np.ndarray) -> np.ndarray:
    return np.asarray((U.astype(np.float64) * S) @ Vt)


def assert_as_good(matrix: np.ndarray, r: int, within: float = 1e-6) -> None:
    """The product of the triplets, against that of a decomposition in float64, as PiSSA takes it out of a weight."""
    U, S, Vt = singular_values.leading_triplets(matrix, r)
    k = min(r, *matrix.shape)
    left_vectors, values, right_vectors = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    assert (U.shape, S.shape, Vt.shape) == ((matrix.shape[0], k), (k,), (k, matrix.shape[1]))
    np.testing.assert_allclose(S, values[:k], atol=1e-6 * values[0])
    off = np.linalg.norm(best(U, S, Vt) - best(left_vectors[:, :k], values[:k], right_vectors[:k]), 2)
    assert off <= within * values[0]
    for vectors in (U.T, Vt):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(160, 160), (150, 220), (220, 150)])
@pytest.mark.parametrize("r", [1, 8])
def test_as_good_as_the_whole_decomposition(spectrum: str, shape: tuple[int, int], r: int) -> None:
    # Inside the cluster values are 1e-4 apart: float32's rounding of the matrix itself turns vectors by 1e-3.
    assert_as_good(matrix_with(*shape, SPECTRA[spectrum]), r, within=2e-4 if spectrum == "cluster" else 2e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 3), (3, 5), (40, 40), (200, 4)])
@pytest.mark.parametrize("r", [1, 3, 40, 1000])
def test_small_matrices_and_more_than_there_are(shape: tuple[int, int], r: int) -> None:
    assert_as_good(np.random.default_rng(0).standard_normal(shape).astype(np.float32), r)


@pytest.mark.parametrize("r", [60, 150, 160])
def test_nearly_all_of_them(r: int) -> None:
    assert_as_good(matrix_with(160, 160, SPECTRA["slowly"]), r, within=1e-5)


@pytest.mark.parametrize("matrix", [np.zeros((160, 160)), np.eye(160), np.outer(np.ones(170), np.arange(160))])
def test_matrices_without_a_spectrum_to_speak_of(matrix: np.ndarray) -> None:
    U, S, Vt = singular_values.leading_triplets(matrix.astype(np.float32), 4)
    np.testing.assert_allclose(S, np.linalg.svd(matrix, compute_uv=False)[:4], atol=1e-6 * max(1, np.abs(matrix).max() * 160))
    np.testing.assert_allclose(U.T @ U, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(4), atol=1e-5)


def test_the_same_matrix_gives_the_same_bytes() -> None:
    matrix = matrix_with(160, 170, SPECTRA["slowly"])
    assert [a.tobytes() for a in singular_values.leading_triplets(matrix, 8)] == [
        a.tobytes() for a in singular_values.leading_triplets(matrix, 8)
    ]


def test_what_does_not_settle_is_decomposed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrix_with(160, 160, SPECTRA["falling"])
    assert singular_values._iterate(matrix, 8, 24, 2) is not None
    monkeypatch.setattr(singular_values, "_ROUNDS", 1)
    assert singular_values._iterate(matrix, 8, 24, 2) is None
    assert_as_good(matrix, 8)
