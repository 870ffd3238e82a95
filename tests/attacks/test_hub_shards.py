"""A few bytes sent by Xet do not fill the disk of a hub."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest

from adapterhub.hub.xet import receiving
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


def test_terms_that_go_back_and_forth_between_xorbs_are_refused(
    hub: Running, hf: Any, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each term had all 8,192 headers of its xorb read again, once there were more xorbs than stay open: 28 ms of CPU."""
    monkeypatch.setattr(receiving, "_MAX_OPEN", 2)
    monkeypatch.setattr(receiving, "_FREE_HEADERS", 100)
    xorbs = [f"{number:064x}" for number in range(1, 4)]
    for xorb in xorbs:
        assert sender.post(f"/v1/xorbs/default/{xorb}", chunk(b"x" * 1024) * 40)[0] == 200
    in_order = [(xorb, 1024, 0, 1) for xorb in xorbs]
    digest = hashlib.sha256(b"x" * 3072).digest()
    assert sender.post("/v1/shards", shard(digest, in_order))[0] == 200
    status, words = sender.post("/v1/shards", shard(b"\1" * 32, in_order * 40))
    assert status == 400
    assert "its terms go back and forth between more than 2 xorbs. Upload it with HF_HUB_DISABLE_XET=1" in words
    assert not [name for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}").endswith(".xorb")]


def test_a_shard_of_more_files_than_a_repository_may_have_is_refused(
    hub: Running, hf: Any, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "MAX_FILES", 0)
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(b"x" * 1024))[0] == 200
    status, words = sender.post("/v1/shards", shard(b"\1" * 32, [(XORB, 1024, 0, 1)]))
    assert status == 400
    assert "its shard has more than 0 files. Upload fewer at a time" in words
