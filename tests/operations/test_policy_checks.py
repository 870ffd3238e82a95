"""The policy, asked before a version is downloaded: of its adapter.json, and of its card for what that does not declare."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.digest import sha256_bytes
from adapterhub.manifest import derive, oci_manifest
from adapterhub.manifest.card import Card
from adapterhub.operations.pull import pull
from adapterhub.operations.push import push
from adapterhub.operations.workspace import Workspace
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import RefusedError
from tests.support.folders import adapter, pairs


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A version of a tool that does not record in adapter.json what the card declares."""
    monkeypatch.chdir(tmp_path)
    folder = adapter(tmp_path / "sql", pairs(1))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# SQL\n")
    files = derive.digests(folder)
    manifest = derive.describe(folder, files=files, card=Card())
    assert manifest.license is None
    raw = manifest.dump()
    package = oci_manifest.assemble({**files, ADAPTER_JSON: (sha256_bytes(raw), len(raw))}, manifest)
    with Registry.init(tmp_path / "registry") as registry, registry.store.lease("push"):
        blobs = [(folder / path).read_bytes() for path in files]
        for blob in (*blobs, raw, package.config_bytes, package.raw):
            registry.store.put_bytes(blob)
        registry.push_manifest(package, Ref.parse("team/sql"))
    push("team/sql", "layout://sql.tar:v1", workspace=Workspace(registry=tmp_path / "registry"))
    return "layout://sql.tar:v1"


def test_a_license_on_the_card_counts_before_and_after_a_download(address: str) -> None:
    allowed = Workspace(registry="other", policy=Policy("p", licenses=("MIT",)))
    assert pull(address, "out", workspace=allowed).new
    assert push(address, "team/sql", workspace=allowed).new
    with pytest.raises(RefusedError, match="its license is mit, not Apache-2.0"):
        pull(address, "again", workspace=Workspace(registry="other", policy=Policy("p", licenses=("Apache-2.0",))))
    assert not Path("again").exists()
