"""Blobs out, whole and in part, however the registry keeps them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.maintenance import compress
from adapterhub.ref import Ref
from tests.hub.conftest import Running
from tests.hub.oci.conftest import Registry


def test_a_compressed_version_is_served_as_any_other(
    hub: Running, hf: Any, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "_LEAST", -(10**9))
    monkeypatch.setattr(compress, "_WORTH", 10**9)
    with hub.registry() as opened:
        version = opened.push(adapter(1), Ref("team/sql"))
        compress.pack(opened)
        packed = [layer for layer in opened.files(version) if not opened.store.has_plain(layer.digest)]
    registry = Registry(hub.url, hub.token, "team/sql")
    assert packed
    for layer in packed:
        data = (adapter(1) / layer.path).read_bytes()
        assert registry.ask("GET", f"blobs/{layer.digest}").body == data
        assert registry.ask("GET", f"blobs/{layer.digest}", Range="bytes=3-").body == data[3:]
        assert registry.ask("GET", f"blobs/{layer.digest}", Range="bytes=2-5").body == data[2:6]
    out = Path(hf.snapshot_download("team/sql", cache_dir=tmp_path / "cache"))
    assert (out / "adapter_model.safetensors").read_bytes() == (adapter(1) / "adapter_model.safetensors").read_bytes()
    assert registry.put(registry.ask("GET", "manifests/latest").body, "again").status == 201


def test_a_blob_of_several_pieces_is_sent_whole_and_in_part(hub: Running) -> None:
    registry, data = Registry(hub.url, hub.token, "team/sql"), os.urandom((5 << 19) + 1)
    digest = registry.put_blob(data)["digest"]
    assert registry.ask("GET", f"blobs/{digest}").body == data
    for first, last in ((0, 0), (0, (1 << 20) - 1), (0, 1 << 20), (1, len(data) - 1), ((2 << 20) - 1, 2 << 20)):
        assert registry.ask("GET", f"blobs/{digest}", Range=f"bytes={first}-{last}").body == data[first : last + 1]
