"""What holds of every trainer's own format: torchtune, litgpt, Megatron."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from adapterhub_converters.adapter import Adapter, Loss
from tests.converters import trained
from tests.converters.trained import K, Q, V

TRAINERS = ("litgpt", "megatron", "torchtune")


@pytest.mark.parametrize("trainer", TRAINERS)
@given(adapter=trained.adapters())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_round_trip_preserves_every_byte(tmp_path_factory: pytest.TempPathFactory, trainer: str, adapter: Adapter) -> None:
    trained.there_and_back(adapter, tmp_path_factory.mktemp("t"), trainer)


@pytest.mark.parametrize("trainer", ["litgpt", "torchtune"])
def test_ordinary_adapters_are_exact(tmp_path: Path, trainer: str) -> None:
    assert trained.there_and_back(trained.full("q_proj", "v_proj"), tmp_path, trainer).worst == Loss.EXACT


@pytest.mark.parametrize(("trainer", "second"), [("litgpt", V), ("megatron", V), ("torchtune", K)])
def test_golden_bytes(tmp_path: Path, trainer: str, second: str) -> None:
    adapter = Adapter({Q: trained.delta(Q, r=1), second: trained.delta(second, r=2, alpha=3)})
    written_path = trained.written(trainer, adapter, tmp_path / "a.safetensors")
    assert written_path.read_bytes() == (Path(__file__).parent / f"golden/{trainer}.safetensors").read_bytes()
