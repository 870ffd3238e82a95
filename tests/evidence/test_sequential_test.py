"""The sequential test: its error and its power, over seeds, and how many pairs it says that it needs."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from adapterhub.evidence.sequential_test import PairCounts, is_worse, pairs_needed


def first_alarm(rng: random.Random, candidate: float, stable: float, pairs: int, error: float) -> int:
    """Return the pair after which the candidate, with these chances to fail, is shown to be worse; 0 if it never is."""
    differences = (int(rng.random() < candidate) - int(rng.random() < stable) for _ in range(pairs))
    counts = PairCounts()
    for number, difference in enumerate(differences, 1):
        counts += PairCounts(difference > 0, difference == 0, difference < 0)
        if difference > 0 and is_worse(counts, error):
            return number
    return 0


@pytest.mark.parametrize("failures", [0.01, 0.2])
def test_a_candidate_that_is_no_worse_is_rarely_called_worse_though_it_is_asked_after_every_pair(failures: float) -> None:
    alarms = sum(first_alarm(random.Random(seed), failures, failures, 500, 0.05) > 0 for seed in range(200))
    assert alarms <= 0.05 * 200


def test_traffic_that_changes_for_both_arms_is_no_evidence() -> None:
    chances = [0.9 if hour % 2 else 0.01 for hour in range(20)]
    alarms = 0
    for seed in range(100):
        rng = random.Random(seed)
        draws = (int(rng.random() < chance) - int(rng.random() < chance) for chance in chances for _ in range(20))
        totals = accumulate((PairCounts(draw > 0, draw == 0, draw < 0) for draw in draws), PairCounts.__add__)
        alarms += any(is_worse(total, 0.05) for total in totals)
    assert alarms <= 0.05 * 100


@pytest.mark.parametrize(("stable", "drop"), [(0.0, 0.05), (0.1, 0.2), (0.3, 0.2)])
def test_the_number_of_pairs_that_are_needed_finds_the_drop_in_nine_of_ten_runs(stable: float, drop: float) -> None:
    needed = pairs_needed(drop, 0.01, better=stable * (1 - stable - drop))
    alarms = sum(first_alarm(random.Random(seed), stable + drop, stable, needed, 0.01) > 0 for seed in range(60))
    assert alarms >= 0.8 * 60


def test_larger_drops_and_larger_errors_need_fewer_pairs() -> None:
    numbers = [pairs_needed(drop, 0.01) for drop in (0.02, 0.05, 0.2, 1.0)]
    assert numbers == sorted(numbers, reverse=True)
    assert pairs_needed(0.05, 0.1) < pairs_needed(0.05, 0.01)
    assert pairs_needed(0.05, 0.01) < pairs_needed(0.05, 0.01, better=0.2)


def test_counts_of_several_gateways_add_up() -> None:
    total = PairCounts(3, 2, 1) + PairCounts(1, 1, 1)
    assert (total, total.total, total - PairCounts(1, 1, 1)) == (PairCounts(4, 3, 2), 9, PairCounts(3, 2, 1))
    assert PairCounts().drop == 0
    assert not is_worse(PairCounts(), 0.2)
