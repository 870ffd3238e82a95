"""Digests of bytes as they are copied, whatever their number."""

from __future__ import annotations

import hashlib
import io

import pytest

from adapterhub import digest


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**16 + 2**20, 2**20, 3 * 2**20 + 7])
def test_every_byte_is_copied_hashed_and_consumed_in_order(size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    target, consumed, counts = io.BytesIO(), bytearray(), list[int]()
    copied = digest.copy_hashing(io.BytesIO(data), target, consumer=consumed.extend, on_bytes=counts.append)
    assert copied == ("sha256:" + hashlib.sha256(data).hexdigest(), size)
    assert target.getvalue() == bytes(consumed) == data
    assert sum(counts) == size
