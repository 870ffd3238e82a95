"""Configs that a scan reads."""

from __future__ import annotations

import tracemalloc

from adapterhub.checks.scan import configs


def test_a_config_whose_keys_are_long_has_them_once() -> None:
    document = {"k" * 100_000: {"_target_": ["x" * 1_000] * 1_000, **{str(number): {} for number in range(100)}}}
    tracemalloc.start()
    try:
        assert len(list(configs.faults(document))) == 1
        assert tracemalloc.get_traced_memory()[1] < 500_000  # bytes; each key with all of its path would be 10 MB
    finally:
        tracemalloc.stop()
