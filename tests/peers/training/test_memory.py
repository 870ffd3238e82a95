"""What the kinds of training take that `make test` does not measure: processes that import torch for seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import test_memory
from tests.training.test_memory import EVERY_DAY, KINDS


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to measure memory with")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != EVERY_DAY])
def test_the_measured_memory_is_within_15_percent_of_the_prediction(tmp_path: Path, kind: str) -> None:
    test_memory.test_the_measured_memory_is_within_15_percent_of_the_prediction(tmp_path, kind)
