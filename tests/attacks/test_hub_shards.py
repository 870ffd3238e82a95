"""A few bytes sent by Xet do not fill the disk of a hub."""

from __future__ import annotations

from typing import Any

from tests.hub.conftest import Running, hf, hub
from tests.hub.xet.test_receiving import Sender, chunk, sender, shard

__all__ = ["hf", "hub", "sender"]
XORB, ZEROS = "ab" * 32, 128 << 10


def test_a_shard_that_repeats_a_chunk_thousands_of_times_is_refused(hub: Running, hf: Any, sender: Sender) -> None:
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(bytes(ZEROS), 1))[0] == 200
    status, words = sender.post("/v1/shards", shard(b"\1" * 32, [(XORB, ZEROS, 0, 1)] * 20_000))
    assert status == 400
    assert "its shard makes 2,621,440,000 bytes of the" in words
    assert "that were sent. Upload it with HF_HUB_DISABLE_XET=1" in words
    assert not [path for path in (hub.folder / ".adapterhub" / "tmp").iterdir() if path.stat().st_size > ZEROS]


def test_a_shard_that_repeats_bytes_one_by_one_is_refused(hub: Running, hf: Any, sender: Sender) -> None:
    """A gigabyte of them, for 7 MB that are sent, took half an hour of a thread."""
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(b"x", 0) * 8192)[0] == 200
    status, words = sender.post("/v1/shards", shard(b"\1" * 32, [(XORB, 8192, 0, 8192)] * 10))
    assert status == 400
    assert "chunks, which are too small. Upload it with HF_HUB_DISABLE_XET=1" in words
