"""How much of a merge is kept, and what is said of the rest."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.analysis.low_rank import Factors
from adapterhub.merging import METHODS, combine
from adapterhub.merging.adapters.matrices import sign_conflict
from adapterhub.merging.adapters.methods import Random
from adapterhub.merging.adapters.tiled_matrix import TiledMatrix
from adapterhub.merging.adapters.truncation import ModuleSpectra, Truncation, lost_share, ranks_within, spectra
from adapterhub_converters.errors import AdapterhubError, ParameterError, RefusedError
from tests.merging.factored import adapter, dense, factors, low_rank

RANDOM = Random(0, "q")
CUTTING = [name for name, method in METHODS.items() if method.cuts and method.count[0] <= 2 <= method.count[1]]


def pair(r: int = 4, m: int = 20, n: int = 16) -> list[Any]:
    return [adapter(q=low_rank(r, m, n, seed), k=low_rank(r, n, m, seed + 5)) for seed in range(2)]


# ---- singular values that are known


def diagonal(m: int, n: int, *values: float) -> Factors:
    """A matrix with these singular values."""
    return Factors(np.eye(m, len(values)) * values, np.eye(len(values), n))


def spectra_of(*matrices: Factors | TiledMatrix, ranks: tuple[int, ...] = (1,), **cut: Any) -> ModuleSpectra:
    return spectra(matrices, ranks=ranks, cut=Truncation(**cut), random=RANDOM)


def tiled(matrix: np.ndarray) -> TiledMatrix:
    m, n = matrix.shape
    return TiledMatrix((m, n), lambda rows: matrix[rows].astype(np.float32))


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ({"rank": 0}, "rank: 0 is below 1"),
        ({"energy": 0.0}, "energy: 0.0 is not a share above 0"),
        ({"energy": 1.1}, "energy: 1.1 is not a share above 0 and up to 1"),
        ({"budget": 0}, "budget: 0 is below 1"),
        ({"rank": 1, "budget": 1}, "budget: cannot be combined with a rank"),
    ],
)
def test_a_cut_is_one_number_in_its_range(cut: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        Truncation(**cut).check()


@pytest.mark.parametrize("cut", [{}, {"rank": 1}, {"energy": 1e-9}, {"energy": 1.0}, {"budget": 1}])
def test_the_ends_of_its_range_are_a_cut(cut: dict[str, Any]) -> None:
    Truncation(**cut).check()
    assert Truncation(**cut).is_set is bool(cut)


def test_the_loss_is_the_share_of_the_energy_beyond_the_rank() -> None:
    spectra = spectra_of(diagonal(4, 3, 4, 3))
    assert [lost_share(spectra, rank) for rank in (1, 2, 9)] == [pytest.approx(9 / 25), 0, 0]
    assert lost_share(ModuleSpectra(spectra.parts, 100), 2) == pytest.approx(0.75)
    assert [lost_share(ModuleSpectra(spectra.parts, energy), 1) for energy in (0.0, float("inf"), 15.999999)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("budget", "ranks"), [(64, (1, 1)), (83, (1, 1)), (84, (1, 2)), (127, (1, 2)), (128, (2, 2)), (172, (3, 2)), (9999, (3, 2))]
)
def test_a_budget_goes_to_what_keeps_most_for_its_bytes_as_long_as_it_fits(budget: int, ranks: tuple[int, int]) -> None:
    modules = {"q": spectra_of(diagonal(6, 5, 4, 3, 2)), "k": spectra_of(diagonal(3, 2, 3, 2.3))}  # 44 and 20 bytes
    assert tuple(ranks_within(budget, modules).values()) == ranks


def test_a_budget_passes_over_what_does_not_fit() -> None:
    modules = {"q": spectra_of(diagonal(6, 5, 4, 3, 2)), "k": spectra_of(diagonal(3, 2, 3, 0.1))}
    assert [ranks_within(budget, modules) for budget in (107, 108)] == [{"q": 1, "k": 2}, {"q": 2, "k": 1}]


def test_a_budget_below_rank_1_of_all_modules_is_refused() -> None:
    with pytest.raises(RefusedError, match="63 bytes are not enough: rank 1 of all modules takes 64"):
        ranks_within(63, {"q": spectra_of(diagonal(6, 5, 1)), "k": spectra_of(diagonal(3, 2, 1))})


def test_as_many_singular_values_are_computed_as_the_cut_can_need() -> None:
    matrix = np.random.default_rng(0).normal(size=(30, 12))
    true = np.linalg.svd(matrix, compute_uv=False)
    cuts: list[tuple[dict[str, Any], int]] = [({}, 3), ({"rank": 4}, 4), ({"budget": 9999}, 5), ({"energy": 1e-3}, 5)]
    for cut, count in cuts:
        spectra = spectra_of(tiled(matrix), ranks=(2, 3), **cut)
        np.testing.assert_allclose(spectra.parts[0].s, true[:count], rtol=1e-5)
        assert spectra.energy == pytest.approx(np.sum(true**2), rel=1e-6)


@pytest.mark.parametrize(("energy", "rank"), [(0.09, 2), (0.89, 18), (1.0, 20)])
def test_more_singular_values_are_computed_until_they_keep_the_share(energy: float, rank: int) -> None:
    same = spectra_of(tiled(3 * np.eye(30, 20)), tiled(np.eye(30, 20)), energy=energy)
    assert (same.rank_for(energy), same.energy) == (rank, pytest.approx(200))


def test_all_singular_values_keep_all_of_the_energy_up_to_rounding() -> None:
    value = 1 + 5 * 2.0**-14  # its square is less than that in float32, of which the energy is the sum
    spectra = spectra_of(tiled(value * np.eye(30, 20)), energy=1.0)
    assert (spectra.rank_for(1.0), spectra.energy) == (20, pytest.approx(20 * value**2, rel=1e-12))


# ---- merges


@given(energy=st.floats(0.05, 1.0), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_an_energy_is_kept_by_the_least_ranks_that_can(energy: float, seed: int) -> None:
    deltas = [low_rank(4, 20, 16, seed + index) for index in range(2)]
    result, report = combine([adapter(q=delta) for delta in deltas], [1, -0.5], method="linear", energy=energy)
    squares = np.linalg.svd(dense(deltas[0]) - 0.5 * dense(deltas[1]), compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    module = report.modules["q"]
    assert module.rank == min(8, int(np.searchsorted(shares, energy - 1e-9)) + 1)
    assert module.lost == pytest.approx(1 - shares[module.rank - 1], abs=1e-9)
    merged_delta = dense(result.deltas["q"])
    assert np.sum(merged_delta**2) / squares.sum() + module.lost == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", CUTTING)
def test_what_is_lost_and_the_error_are_the_true_ones(method: str) -> None:
    adapters = pair()
    full, exact = combine(adapters, [1, 1], method=method, rank=16)
    cut, report = combine(adapters, [1, 1], method=method, rank=2)
    for target, module in report.modules.items():
        full_delta, cut_delta = dense(full.deltas[target]), dense(cut.deltas[target])
        if not full_delta.any():  # model_stock, of adapters that point apart
            assert (module.error, module.lost) == (0, 0)
            continue
        error = np.linalg.norm(cut_delta - full_delta) / np.linalg.norm(full_delta)
        assert exact.modules[target].error < 1e-5
        assert module.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert module.lost == pytest.approx(error**2, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("method", CUTTING)
def test_an_energy_is_kept_by_every_method(method: str) -> None:
    result, report = combine(pair(), [1, 1], method=method, energy=0.97)
    assert all(module.lost <= 0.03 + 1e-6 for module in report.modules.values())
    assert max(module.rank for module in report.modules.values()) <= 16
    assert {delta.r for delta in result.deltas.values()} == {module.rank for module in report.modules.values()}


@given(share=st.floats(0.1, 1.2), scale=st.floats(0.01, 10))
@settings(max_examples=30, deadline=None)
def test_a_budget_is_spent_where_it_keeps_most(share: float, scale: float) -> None:
    q, k = low_rank(3, 20, 16, 0), low_rank(3, 8, 10, 1, alpha=scale)
    costs = {"q": 4 * 36, "k": 4 * 18}
    budget = int(share * 3 * sum(costs.values()))
    if budget < sum(costs.values()):
        return
    result, report = combine([adapter(q=q, k=k)], [1], method="rerank", budget=budget)
    spent = sum(tensor.nbytes for _, tensor in result.tensors())
    assert spent <= budget
    energies = {name: np.linalg.svd(dense(delta), compute_uv=False) ** 2 for name, delta in (("q", q), ("k", k))}

    def retained_energy(ranks: dict[str, int]) -> float:
        return float(sum(energies[name][:rank].sum() for name, rank in ranks.items()))

    energy_retained = retained_energy({name: module.rank for name, module in report.modules.items()})
    fits = [
        ranks
        for a, b in itertools.product(range(1, 4), repeat=2)
        if costs["q"] * (ranks := {"q": a, "k": b})["q"] + costs["k"] * b <= budget
    ]
    best = max(map(retained_energy, fits))
    assert energy_retained >= best - max(energies["q"].max(), energies["k"].max())  # greedy: at most one rank short of the best
    if share >= 1:
        assert energy_retained == pytest.approx(best)


@pytest.mark.parametrize("method", CUTTING)
def test_a_budget_holds_for_every_method(method: str) -> None:
    result, _ = combine(pair(), [1, 1], method=method, budget=4 * 36 * 7)
    assert sum(delta.r for delta in result.deltas.values()) <= 7


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "svd", "rank": 2, "energy": 0.5}, "energy: cannot be combined with a rank"),
        ({"method": "svd", "energy": 0.0}, "not a share above 0"),
        ({"method": "svd", "energy": float("nan")}, "not a share above 0"),
        ({"method": "svd", "budget": 100}, "100 bytes are not enough: rank 1 of all modules takes 288"),
        ({"method": "cat", "energy": 0.9}, "cat keeps the sum exactly"),
        ({"method": "slerp", "weights": [1, 2]}, "slerp takes no weights. Set t instead"),
        ({"method": "model_stock", "weights": [1, 2]}, "weights: model_stock takes no weights. Leave them out"),
        ({"method": "karcher", "weights": [1, -2]}, "none may be negative"),
        ({"method": "rerank"}, "rerank merges exactly 1 adapter, not 2"),
        ({"method": "tie"}, "Did you mean ties?"),
        ({"method": "ties", "parameters": {"epsilon": 0.1}}, "epsilon: is not a parameter of ties. It takes density, lambda"),
        ({"method": "ties", "parameters": {"density": 0.0}}, "density: 0.0 is not above 0 and up to 1"),
        ({"method": "ties", "parameters": {"density": float("nan")}}, "nan is not above 0"),
        ({"method": "nuslerp", "parameters": {"by": "cells"}}, "cells is not one of all, rows, columns"),
        (
            {"method": "della", "parameters": {"density": 0.95}},
            "epsilon: density 0.95 plus or minus epsilon 0.1 is not a probability above 0. Use",
        ),
        ({"method": "breadcrumbs", "parameters": {"gamma": 0.2}}, "0.9 and gamma 0.2 sum to more than 1"),
    ],
)
def test_what_cannot_be_asked_for_is_a_usage_error(arguments: dict[str, Any], says: str) -> None:
    keywords = {"weights": [1.0, 1.0], **arguments}
    with pytest.raises(AdapterhubError) as caught:
        combine(pair(), keywords.pop("weights"), **keywords)
    assert says in str(caught.value)
    assert (caught.value.code == "t-for-weights") == ("Set t instead" in says)


def test_zero_is_merged_by_every_method() -> None:
    zero = adapter(q=low_rank(2, alpha=0.0))
    for method in CUTTING:
        result, report = combine([zero, zero], [1, 1], method=method)
        assert not dense(result.deltas["q"]).any(), method
        assert (report.error, report.modules["q"].lost) == (0, 0)


@pytest.mark.parametrize("alpha", [1e300, 1e200, 1e39, 1e20, 1e10, 1e-10, 1e-30, 1e-300])
@pytest.mark.parametrize("method", CUTTING)
def test_numbers_of_any_size_are_merged_or_refused(method: str, alpha: float) -> None:
    first, second = low_rank(3, alpha=alpha), low_rank(3, seed=1, alpha=alpha)
    if alpha > 1e36 or (METHODS[method].dense and not 1e-14 < alpha < 1e13):
        with pytest.raises(RefusedError, match="over the largest float32|too far from 1"):
            combine([adapter(q=first), adapter(q=second)], [1, 1], method=method, rank=12)
        return
    result, report = combine([adapter(q=first), adapter(q=second)], [1, 1], method=method, rank=12)
    merged_delta = dense(result.deltas["q"])
    usual, _ = combine([adapter(q=low_rank(3)), adapter(q=low_rank(3, seed=1))], [1, 1], method=method, rank=12)
    expected = dense(usual.deltas["q"]) * (alpha / 3)
    assert report.error < 1e-5 or alpha < 1e-30
    if alpha > 1e-30:
        np.testing.assert_allclose(merged_delta, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("m", "n"), [(12, 9), (700, 500), (2000, 40), (40, 2000)])
def test_signs_apart_are_counted_or_estimated(m: int, n: int) -> None:
    deltas = [low_rank(3, m, n, seed) for seed in range(3)]
    weighted = np.stack([weight * dense(delta) for weight, delta in zip([1, -0.5, 2], deltas, strict=True)])
    true = float(np.mean((weighted > 0).any(axis=0) & (weighted < 0).any(axis=0)))
    share, exact = sign_conflict([factors(delta) for delta in deltas], [1, -0.5, 2])
    assert exact is (m * n <= 1 << 16)
    assert share == pytest.approx(true, abs=1e-12 if exact else 0.02)
