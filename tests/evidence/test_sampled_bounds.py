"""A bound of a share holds if the interval of its samples says so; with too few, the answer is how many are needed."""

from __future__ import annotations

import math

import pytest

from adapterhub.evidence.sampled_bounds import SampledValue, sampled_value, verdict


@pytest.mark.parametrize(
    ("metrics", "metric", "expected"),
    [
        ({"pass_rate": 0.9, "cases": 40.0}, "pass_rate", SampledValue(0.9, 40)),
        ({"pass_rate": 0.9, "samples": 40.0}, "pass_rate", SampledValue(0.9, 40)),
        ({"accuracy": 0.9, "pairs": 7.0}, "accuracy", SampledValue(0.9, 7)),
        ({"bleu": 31.0, "bleu_stderr": 1.5, "samples": 200.0}, "bleu", SampledValue(31.0, 200, 1.5)),
        ({"exact_match": 1.0, "exact_match_stderr": 0.0, "samples": 9.0}, "exact_match", SampledValue(1.0, 9)),
        ({"bleu": 31.0, "bleu_stderr": 0.0, "samples": 200.0}, "bleu", SampledValue(31.0)),
        ({"perplexity": 9.5, "tokens": 640.0}, "perplexity", SampledValue(9.5)),
        ({"pass_rate": 0.9}, "pass_rate", SampledValue(0.9)),
    ],
)
def test_a_metric_has_the_samples_that_the_same_evaluation_counts(
    metrics: dict[str, float], metric: str, expected: SampledValue
) -> None:
    assert sampled_value(metrics, metric) == expected


def test_the_interval_of_a_share_is_wilsons() -> None:
    """Of 15 of 20: Newcombe (Stat. Med. 1998), method 3, by another form of the same equation."""
    z, share, count = 1.959964, 0.75, 20
    roots = [
        (2 * count * share + z * z + sign * z * math.sqrt(z * z + 4 * count * share * (1 - share))) / (2 * (count + z * z))
        for sign in (-1, 1)
    ]
    assert SampledValue(share, count).interval(count) == pytest.approx(roots)


@pytest.mark.parametrize(
    ("measured", "bounds", "holds", "words"),
    [
        (SampledValue(0.975, 40), [(">=", 0.95)], False, "cannot tell yet: 40 of about 300 needed"),
        (SampledValue(0.95, 40), [(">=", 0.95)], False, "of over 100,000 needed"),
        (SampledValue(1.0, 100), [(">=", 0.95)], True, "1 (100 samples)"),
        (SampledValue(0.02, 1000), [("<", 0.05)], True, "0.02 (1,000 samples)"),
        (SampledValue(1.0, 3), [(">=", 1.0)], True, "1 (3 samples)"),
        (SampledValue(0.9, 40), [(">=", 0.95)], False, "0.9 (40 samples)"),
        (SampledValue(31.0, 200, 1.5), [(">", 30.0)], False, "cannot tell yet: 200 of about"),
        (SampledValue(31.0, 200, 0.1), [(">", 30.0), ("<", 40.0)], True, "31 (200 samples)"),
        (SampledValue(9.5), [("<", 9.5)], False, "9.5"),
        (SampledValue(math.nan), [("<", 9.5)], False, "nan"),
    ],
)
def test_a_verdict_has_its_reason(measured: SampledValue, bounds: list[tuple[str, float]], holds: bool, words: str) -> None:
    answer, reason = verdict(measured, bounds)
    assert answer is holds
    assert words in reason


def test_the_number_that_is_needed_would_tell() -> None:
    assert verdict(SampledValue(0.975, 300), [(">=", 0.95)])[0]
    assert not verdict(SampledValue(0.975, 250), [(">=", 0.95)])[0]
