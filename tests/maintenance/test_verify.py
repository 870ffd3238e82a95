"""Versions and folders are compared with their digests, and damage is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.verify import verify_folder
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import (
    NotFoundError,
)
from tests.registry.test_registry import SQL, Make, errors, flip
from tests.support.registries import new_registry


@pytest.fixture(params=["local", "packed"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with new_registry(request.param, tmp_path / "registry", monkeypatch) as opened:
        yield opened


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_to_any_blob_is_found_and_the_same_push_heals_it(registry: Registry, make: Make, damage: str) -> None:
    registry.push(make(), SQL)
    for path in (*registry.store.blobs(), *registry.store.packs.files()):
        packed = path.parent.parent.name == "packs"
        content = path.read_bytes()
        path.chmod(0o644)
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[:-1])
        else:
            flip(path)
        findings = [finding for finding in fsck(registry) if finding.severity == "error"]
        assert any(path.name in str(finding) for finding in findings), path
        assert ("broken-pack" if packed and damage != "missing" else damage) in {
            f.code for f in findings
        } or damage == "truncated"
        if damage == "flipped" or packed:
            path.unlink(missing_ok=True)  # as the finding says
        registry.push(make(), SQL)
        assert path.read_bytes() == content
        assert errors(registry) == []


def test_verify_folder(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make(), SQL)
    registry.pull(SQL, tmp_path / "out")
    assert verify_folder(tmp_path / "out") == []
    flip(tmp_path / "out" / "adapter_model.safetensors")
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "more.txt").write_text("")
    assert {(finding.code, finding.severity) for finding in verify_folder(tmp_path / "out")} == {
        ("flipped", "error"), ("missing", "error"), ("unlisted", "note"),
    }  # fmt: skip
    with pytest.raises(NotFoundError, match="there is no adapter.json"):
        verify_folder(make("b"))
