"""Types of numbers in GGUF files."""

from __future__ import annotations

import pytest

from adapterhub_converters.containers import gguf_types
from tests.conftest import need_module


@pytest.mark.peer
def test_block_sizes_are_those_of_gguf_py() -> None:
    need_module("gguf")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    theirs = {kind.name: (kind.value, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert {name: theirs[name] for name in gguf_types.TYPES} == gguf_types.TYPES
