"""Two adapters on the same documents: the interval has its stated error, and a gate claims no more than it allows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adapterhub.evidence import paired_losses
from adapterhub.evidence.paired_losses import PairedLosses


def compare(differences: np.ndarray, tokens: np.ndarray | None = None) -> PairedLosses:
    """Compare documents whose losses differ by so many nats a token."""
    counts = np.full(len(differences), 100) if tokens is None else tokens
    against = np.linspace(1, 3, len(differences)) * counts
    return paired_losses.compare(against + differences * counts, against, counts)


@pytest.mark.parametrize("count", [10, 40])
def test_the_interval_has_the_true_ratio_in_95_of_100_draws(count: int) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    pairs = [compare(generator.normal(0.05, 0.1, count)) for _ in range(200)]
    covered = sum(pair.low <= math.exp(0.05) <= pair.high for pair in pairs)
    assert 180 <= covered <= 199  # 190 of 200 are expected


def test_documents_count_by_their_tokens_and_the_order_of_none_matters() -> None:
    differences, tokens = np.array([0.1] * 10 + [-0.1] * 10), np.array([300] * 10 + [100] * 10)
    pair = compare(differences, tokens)
    assert pair.ratio == pytest.approx(math.exp((0.1 * 300 - 0.1 * 100) / 400))
    assert pair == compare(differences, tokens)
    assert pair.low < pair.ratio < pair.high
    assert compare(np.zeros(20)) == PairedLosses(20, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("differences", "holds", "reason"),
    [
        (np.full(20, -0.1), True, "0.9048, 95 % interval 0.9048 to 0.9048"),
        (np.full(20, 0.1), False, "1.105, 95 % interval 1.105 to 1.105"),
        (np.tile([-0.2, 0.2], 20), False, "cannot tell yet: 40 of about "),
        (np.full(4, -0.1), False, "cannot tell yet: 4 of at least 10 documents needed (0.9048, of too few documents"),
    ],
)
def test_a_claim_holds_if_the_whole_interval_is_below_the_bound(differences: np.ndarray, holds: bool, reason: str) -> None:
    claim = paired_losses.parse_claim("ppl/against<1.01")
    assert claim is not None
    verdict, text = claim.verdict(compare(differences))
    assert (verdict, text.startswith(reason)) == (holds, True), text


def test_the_needed_number_is_about_that_at_which_it_can_be_told() -> None:
    generator = np.random.Generator(np.random.PCG64(2))
    claim = paired_losses.parse_claim("ppl/against<=1.02")
    assert claim is not None
    small_comparison = compare(generator.normal(0, 0.1, 40))
    verdict, text = claim.verdict(small_comparison)
    needed = int(text.partition("about ")[2].partition(" ")[0].replace(",", ""))
    assert (verdict, 60 <= needed <= 1000) == (False, True), text
    assert claim.verdict(compare(generator.normal(0, 0.1, 2 * needed)))[0]


@pytest.mark.parametrize("text", ["ppl<12", "ppl/against>1", "ppl/against<", "ppl/against<1e3", "pass>=against"])
def test_other_gates_are_no_claims(text: str) -> None:
    assert paired_losses.parse_claim(text) is None
