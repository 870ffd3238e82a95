"""What an adapter of an unknown kind says of itself: its method, and the numbers that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.manifest import weight_facts
from adapterhub.manifest.document import AdapterManifest
from adapterhub_converters.adapter import AdaLora, Adapter, Hadamard, Kronecker, Vera
from adapterhub_converters.errors import FormatError, NotUnderstoodError
from adapterhub_converters.formats import convert
from tests.registry.test_not_understood import peft

Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = (2, 8), (8, 2)


LOHA = {f"hada_w{n}_{half}": shape for n in (1, 2) for half, shape in (("a", B), ("b", A))}


@pytest.mark.parametrize("peft_type", ["next", "NEXT", None, 7])
def test_no_reader_returns_it(peft_type: object, tmp_path: Path) -> None:
    with pytest.raises((NotUnderstoodError, FormatError)):
        convert.read(peft(tmp_path / "a", peft_type=peft_type))


def _all_ones(shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.float32)


def _arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: _all_ones(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("delta", "recorded"),
    [
        (AdaLora(_all_ones(A), _all_ones(B), _all_ones((2, 1)), 4.0), ("adalora", 2, 4)),
        (Hadamard(_arrays(**LOHA), 4.0), ("loha", 2, 4)),
        (Kronecker(_arrays(lokr_w1=(2, 2), lokr_w2_a=(4, 2), lokr_w2_b=(2, 4)), 8.0, 2), ("lokr", 2, 8)),
        (Kronecker(_arrays(lokr_w1=(2, 2), lokr_w2=(4, 4)), 1e5, 100_000), ("lokr", None, None)),
        (Vera(_all_ones((8,)), _all_ones((2,)), _all_ones(A), _all_ones(B), 8), ("vera", 2, None)),
    ],
)  # fmt: skip
def test_the_record_has_the_method_and_the_numbers_that_are_there(
    delta: Any, recorded: tuple[object, ...], tmp_path: Path
) -> None:
    adapter = Adapter({"model.layers.0.self_attn.q_proj": delta})
    facts = weight_facts.weight_facts(adapter, "peft")
    assert (facts["method"], facts["r"], facts["alpha"], facts["modules"]) == (*recorded, {})
    # What was recorded before this was told apart stays true.
    old = {**facts, "method": "lora", "r": delta.r, "alpha": delta.alpha, "modules": {}}
    fields = {"name": None, "base": None, "task": None, "files": ()}
    weight_facts.check_facts(AdapterManifest(**fields, **old), ("peft", adapter), "a", folder=tmp_path)  # type: ignore[arg-type]
