"""Moves of refs: which tags a push moves, and what a removal and a message may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.ref import Ref, RefError
from adapterhub.registry.packaging import package
from adapterhub.registry.registry import Registry, Version
from adapterhub_converters.errors import IntegrityError, RefusedError
from tests.support.adapters import Make, made_from

SQL, PROD = Ref.parse("team/sql"), Ref.parse("team/sql:prod")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


def manifest_of(registry: Registry, version: Version) -> Manifest:
    return oci_manifest.parse(registry.store.read_document(version.digest), version.digest)


def test_a_push_is_known_by_the_tag_of_its_ref_or_by_the_first_that_it_moves(registry: Registry, make: Make) -> None:
    pushed = [
        registry.push(make("a", 1), SQL),
        registry.publish(package(make("b", 2)), SQL, tags=["dev", "test"]),
        registry.publish(package(make("c", 3)), PROD, tags=["dev"]),
    ]
    assert [version.tag for version in pushed] == [None, "dev", "prod"]


def test_an_admitted_version_moves_the_tags_that_are_given_or_those_of_a_push(registry: Registry, make: Make) -> None:
    registry.push(make("a", 1), SQL)
    manifests = [manifest_of(registry, registry.push(make(f"b{seed}", seed), Ref.parse("other/b"))) for seed in (2, 3)]
    assert registry.push_manifest(manifests[0], SQL, tags=("dev",)).tags == ("dev",)
    assert registry.push_manifest(manifests[1], PROD).tags == ("latest", "prod")


def test_an_earlier_version_becomes_the_latest_again_only_where_that_is_given(registry: Registry, make: Make) -> None:
    first = manifest_of(registry, registry.push(make("a", 1), SQL))
    registry.push(make("b", 2), SQL)
    again = registry.push_manifest(first, SQL)
    assert (again.number, again.new, again.moved, registry.resolve(SQL).number) == (1, False, False, 2)
    back = registry.push_manifest(first, SQL, tags=("latest",))
    assert (back.number, back.new, back.moved, registry.resolve(SQL).number) == (1, False, True, 1)


def test_an_admitted_version_has_the_number_that_is_given_if_it_is_above_all_before(registry: Registry, make: Make) -> None:
    manifests = [manifest_of(registry, registry.push(make(f"a{seed}", seed), Ref.parse("other/a"))) for seed in range(3)]
    numbers = [
        registry.push_manifest(manifest, SQL, number=number).number
        for manifest, number in zip(manifests, (7, 3, 0), strict=True)
    ]
    assert numbers == [7, 8, 9]


def test_a_version_without_all_of_its_files_is_not_admitted(registry: Registry, make: Make) -> None:
    manifest = manifest_of(registry, registry.push(make(), Ref.parse("other/a")))
    registry.store.blob_path(manifest.layers[-1].digest).unlink()
    with pytest.raises(IntegrityError, match="some of its blobs are missing"):
        registry.push_manifest(manifest, SQL)
    assert [str(row.ref) for row in registry.list("team/sql")] == []


def test_a_message_is_at_most_a_thousand_characters(registry: Registry, make: Make) -> None:
    registry.publish(package(make()), SQL, message="é" * 1000)
    assert registry.log(SQL)[0].message == "é" * 1000
    with pytest.raises(RefError, match="the message is over 1000 characters"):
        registry.publish(package(make()), SQL, message="x" * 1001)


def test_a_name_that_others_were_made_from_is_removed_only_by_force(registry: Registry, make: Make) -> None:
    parent = registry.push(make("a", 1), SQL)
    child = registry.push(made_from(make, "a2", 2, parent), SQL)  # goes with it
    registry.push(made_from(make, "b", 3, child), Ref.parse("team/b"))
    refused = "team/sql: team/b:v1 was made from team/sql:v2 and could not be made again"
    with pytest.raises(RefusedError, match=f"{refused}. Use force to remove it all the same"):
        registry.rm(SQL)
    registry.push(made_from(make, "c", 4, parent), Ref.parse("team/c"))
    with pytest.raises(RefusedError, match=rf"{refused} \(1 more like it\). Use force to remove it all the same"):
        registry.rm(SQL)
    registry.rm(SQL, force=True)
    assert registry.list("team/sql") == []


def test_a_name_is_removed_if_another_one_has_what_others_were_made_from(registry: Registry, make: Make) -> None:
    parent = registry.push(make("a", 1), SQL)
    registry.push(made_from(make, "b", 3, parent), Ref.parse("team/b"))
    registry.push(make("a", 1), Ref.parse("team/copy"))
    registry.rm(SQL)
    assert [str(row.ref) for row in registry.list("team/sql")] == []
    with pytest.raises(RefusedError, match="team/b:v1 was made from team/copy:v1"):
        registry.rm(Ref.parse("team/copy"))


def test_a_tag_is_removed_though_others_were_made_from_its_version(registry: Registry, make: Make) -> None:
    parent = registry.push(make("a", 1), PROD)
    registry.push(made_from(make, "b", 2, parent), Ref.parse("team/b"))
    registry.rm(PROD)
    assert registry.resolve(SQL).tags == ("latest",)
