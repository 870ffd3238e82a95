"""Logs replayed into the index: malformed entries are a note, and nothing else is lost by them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Entry
from adapterhub_converters.errors import (
    AdapterhubError,
)
from tests.registry.test_registry import SQL, Make
from tests.support.registries import new_registry


@pytest.fixture(params=["local", "packed"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with new_registry(request.param, tmp_path / "registry", monkeypatch) as opened:
        yield opened


ENTRY = Entry("team/sql", 2, "tag", "t", "sha256:" + "0" * 64, 1, 1, ("a",))


BAD_ENTRIES = [
    (b"", "not valid JSON (Expecting value: line 1 column 1 (char 0)). Check the registry"),
    (b"{}", "not an entry of a ref log. Check the registry"),
    (b'{"version":1}', "not an entry of a ref log"),
    (b"\xff", "not valid JSON (Expecting value: line 1 column 1 (char 0)). Check the registry"),
    (b'{"version": 9}', "entry version 9 is newer than version 8, the last supported. Upgrade adapterhub"),
    (ENTRY.dump().replace(b'"tag"', b'"x"'), "has an unknown operation, or a number that is out of range. Check the registry"),
    (ENTRY.dump()[:-5], "not valid JSON (Unterminated string starting at: line 1 column 180 (char 179)). Check the registry"),
]
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"tags": ("a,b",)}, "'a,b' is not a tag"),
    ({"size": 2**70}, "has an unknown operation, or a number that is out of range. Check the registry"),
    ({"number": -1}, "has an unknown operation, or a number that is out of range. Check the registry"),
    ({"digest": "sha256:../x"}, "'sha256:../x' is not a digest of the form"),
    ({"seq": 3}, "is entry 3 of team/sql. Check the registry"),
    ({"name": "team/other"}, "is entry 2 of team/other"),
    ({"number": 7}, "does not follow the entry before it: the log was changed. Check the registry"),
]
BAD_ENTRIES += [(dataclasses.replace(ENTRY, **change).dump(), words) for change, words in BAD_FIELDS]


@pytest.mark.parametrize(("raw", "words"), BAD_ENTRIES)
def test_a_malformed_log_entry_is_one_line(registry: Registry, make: Make, raw: bytes, words: str) -> None:
    registry.push(make("a"), SQL)
    path = registry.store.log.path("team/sql", 2)
    path.write_bytes(raw)
    with pytest.raises(AdapterhubError) as error:
        registry.resolve(SQL)
    assert str(error.value).startswith(f"{path}: {words}")
    assert (error.value.code == "misplaced") == words.startswith("is entry")
    assert "broken-log" in {finding.code for finding in fsck(registry)}


def test_an_intent_that_cannot_be_read_is_a_note(registry: Registry, make: Make) -> None:
    registry.push(make(), SQL)
    for n, raw in enumerate((b"", b"\xff", b'{"name": "../../x"}')):
        (registry.store.root / "pending" / f"{n}.json").write_bytes(raw)
    with Registry.open(registry.root) as again:
        assert [(finding.code, finding.severity) for finding in fsck(again)] == [("leftovers", "note")]


@pytest.mark.parametrize(("spdx", "dtype"), [("MIT", "F32"), ("\ud800", None)], ids=["odd", "no text"])
def test_fields_that_no_column_can_hold_hide_nothing(registry: Registry, spdx: str, dtype: str | None) -> None:
    """A manifest from elsewhere whose adapter.json was never checked; one that is no JSON says nothing, and is listed."""
    facts = {"r": "two", "alpha": True, "parameters": 10**30, "license": spdx, "base": 3, "description": 4, "dtype": "F32"}
    digest, size = registry.store.put_bytes(json.dumps(facts).encode())
    descriptor = {"mediaType": "x", "digest": digest, "size": size, "annotations": {oci_manifest.TITLE: "adapter.json"}}
    raw_manifest = json.dumps({"schemaVersion": 2, "config": descriptor, "layers": [descriptor]}).encode()
    manifest_digest, manifest_size = registry.store.put_bytes(raw_manifest)
    registry.store.log.append(Entry("team/sql", 1, "push", "t", manifest_digest, manifest_size, 1, ("latest",)))
    assert registry.resolve(SQL).digest == manifest_digest
    assert [(row.r, row.dtype) for row in registry.list()] == [(None, dtype)]


def test_a_stale_index_is_found_and_rebuilt(registry: Registry, make: Make) -> None:
    registry.push(make(), SQL)
    (registry.store.root / "index.json").write_text("{}")
    assert [finding.code for finding in fsck(registry)] == ["index-behind"]
    registry.rebuild_index()
    assert fsck(registry) == []
