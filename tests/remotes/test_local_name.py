"""A name of the registry here as a place to copy from and to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.digest import sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes.local_name import LocalName
from adapterhub_converters.errors import NotFoundError
from tests.support.adapters import Make


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        opened.push(make(), Ref.parse("team/sql:prod"))
        yield opened


def test_a_blob_is_read_from_any_byte_on_and_another_one_is_not_there(registry: Registry) -> None:
    name = LocalName(registry, "team/sql")
    layer = name.manifest("prod").layers[0]
    whole, tail = bytearray(layer.size), bytearray(layer.size)
    with name.open_blob(layer) as file:
        assert file.readinto(whole) == layer.size
    with name.open_blob(layer, 3) as file:
        assert file.readinto(tail) == layer.size - 3
    assert tail[:-3] == whole[3:]
    for absent in (dataclasses.replace(layer, digest=sha256_bytes(b"x")), dataclasses.replace(layer, size=layer.size + 1)):
        with pytest.raises(NotFoundError, match="has no blob"), name.open_blob(absent):
            pass


def test_a_version_is_named_by_tag_number_and_digest(registry: Registry) -> None:
    name = LocalName(registry, "team/sql")
    manifest = name.manifest("prod")
    assert name.manifest("v1") == name.manifest(manifest.digest) == manifest
    assert name.tags() == ["latest", "prod"]


def test_a_manifest_becomes_a_version_and_latest_is_no_tag_that_is_set(registry: Registry) -> None:
    manifest = LocalName(registry, "team/sql").manifest("prod")
    other_name = LocalName(registry, "team/copy")
    with other_name.lease_for_push():
        result = other_name.put_manifest(manifest, "latest")
    assert (result.new, result.number) == (True, 1)
    assert other_name.tags() == ["latest"]


def test_an_error_of_what_arrived_names_the_version_and_no_temporary_folder(registry: Registry, tmp_path: Path) -> None:
    manifest = LocalName(registry, "team/sql").manifest("prod")
    layers = [layer for layer in manifest.layers if layer.path != "adapter_config.json"]
    broken = oci_manifest.parse(manifest.raw, "x")
    broken = dataclasses.replace(broken, layers=tuple(layers))
    with pytest.raises(Exception, match="team/copy") as refused:
        LocalName(registry, "team/copy").check_version(broken, "team/copy:v1")
    assert str(tmp_path) not in str(refused.value)
    assert "/tmp" not in str(refused.value)
