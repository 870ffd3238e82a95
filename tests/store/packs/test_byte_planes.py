"""Numbers in planes of bytes come back with every bit."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub.store.packs import byte_planes


@pytest.mark.parametrize("width", byte_planes.WIDTHS)
def test_every_bit_pattern_survives_either_coding(width: int) -> None:
    words = np.arange(65536, dtype=np.uint16).view(np.uint8)
    shuffled = np.random.default_rng(0).permutation(words)
    for parent in (None, shuffled):
        stored = [bytes(plane) for plane in byte_planes.encode(words, width, parent)]
        assert bytes(byte_planes.decode(stored, width, len(words) // width, parent)) == bytes(words)
