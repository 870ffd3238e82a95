"""What is indexed of a version: facts that were never checked are left out, and a document that cannot be read is a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.digest import Digest
from adapterhub.index import version_extract
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Registry.init(tmp_path) as registry:
        yield registry.store


def stored(store: Store, facts: Any, card: bytes = b"") -> Digest:
    """Store a version with an adapter.json that nobody has checked, and a card."""
    layers = []
    for path, raw in (("adapter.json", facts if isinstance(facts, bytes) else json.dumps(facts).encode()), ("README.md", card)):
        digest, size = store.put_bytes(raw)
        layers.append({"mediaType": "x", "digest": digest, "size": size, "annotations": {oci_manifest.TITLE: path}})
    return store.put_bytes(json.dumps({"schemaVersion": 2, "config": layers[0], "layers": layers}).encode())[0]


def test_values_that_no_column_can_hold_are_left_out(store: Store) -> None:
    facts = {
        "name": 3, "base": {"repo": ["x"], "model_type": "\0"}, "targets": ["q", 4, None], "parents": [1, {"ref": 2}],
        "training": {"metrics": {"a": "b", "c": True, "d": 10**300, "f": 2}, "data": [3, {"name": []}]},
    }  # fmt: skip
    extract = version_extract.read(store, stored(store, facts, b"\xff\0---\n# Odd\n"))
    assert (extract.unindexed, extract.metrics) == ("", {"d": 1e300, "f": 2.0})
    assert ("target", "q") in extract.facets
    assert dict(zip(version_extract.COLUMNS, extract.columns, strict=True))["base"] is None
    assert [path for path, _, _ in extract.files] == ["adapter.json", "README.md"]


def test_the_card_fills_in_what_adapter_json_lacks_and_nothing_that_it_has(store: Store) -> None:
    card = b"---\nlicense: mit\nlanguage: de\n---\n# Title\n\nWords.\n"
    for facts, license_name in (({}, "mit"), ({"license": "apache-2.0"}, "apache-2.0")):
        extract = version_extract.read(store, stored(store, facts, card))
        assert [value for kind, value in extract.facets if kind == "license"] == [license_name]
        assert ("language", "de") in extract.facets
        assert (extract.title, "Words." in extract.prose) == ("Title", True)


def test_the_name_of_a_base_is_found_with_and_without_its_owner(store: Store) -> None:
    extract = version_extract.read(store, stored(store, {"base": {"repo": "org/model"}}))
    assert {("base", "org/model"), ("base-name", "model")} <= {*extract.facets}
    assert "org/model" in extract.words


def test_a_document_that_cannot_be_read_is_the_reason_and_no_error(store: Store) -> None:
    extract = version_extract.read(store, stored(store, b"[" * 10_000))
    assert extract == version_extract.VersionExtract(unindexed=extract.unindexed)
    assert 0 < len(extract.unindexed) <= version_extract.MAX_REASON


def test_the_parents_are_their_refs_or_else_their_digests_each_digest_once(store: Store) -> None:
    digest = "sha256:" + "a" * 64
    facts = {"parents": [{"ref": "team/a:v1", "digest": digest}, {"digest": digest}]}
    extract = version_extract.read(store, stored(store, facts))
    assert json.loads(version_extract.dump_parents(extract)) == ["team/a:v1", digest]
    assert extract.parent_digests == (digest,)
