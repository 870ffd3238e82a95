"""Blobs out, whole and in part, however the registry keeps them."""

from __future__ import annotations

import os
import ssl
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.maintenance import compress
from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving
from tests.hub.oci.conftest import Registry
from tests.hub.sending import WEIGHTS
from tests.support.adapters import write_large_adapter
from tests.support.certificates import write_certificate


def test_a_compressed_version_is_served_as_any_other(
    hub: Running, hf: Any, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "_MIN_SAVING", -(10**9))
    monkeypatch.setattr(compress, "_MAX_SHARE", 10**9)
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


def test_a_blob_is_the_same_through_tls(tmp_path: Path) -> None:
    secret = tmp_path / "key.pem"
    certificate = write_certificate(tmp_path / "hub.pem", days=1, secret=secret)
    folder = write_large_adapter(tmp_path / "sql", 1)
    with serving(tmp_path / "hub", certificate=certificate, key=secret) as hub:
        with hub.registry() as registry:
            registry.push(folder, Ref("team/sql"))
        unverified = ssl._create_unverified_context()
        url = f"https{hub.url.removeprefix('http')}/team/sql/resolve/main/{WEIGHTS}"
        with urllib.request.urlopen(url, context=unverified) as answer:
            assert answer.read() == (folder / WEIGHTS).read_bytes()
