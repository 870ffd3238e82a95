"""Versions found by tensors that they share, whatever the tensors are called there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adapterhub.index import tensor_search
from adapterhub.maintenance.fsck import fsck
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes.local_name import LocalName
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.formats import convert, peft
from tests.conftest import Run
from tests.store.test_tensor_digests import SQL, listed_tensors, read, rewritten, weights
from tests.support.adapters import Make
from tests.support.folders import base


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


def test_a_file_with_other_metadata_is_found_by_its_tensors(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("b", 1), Ref.parse("team/other"))
    again = read(rewritten(make("c"), {"format": "np"}) / peft.WEIGHTS)
    registry.list_tensors()
    shares = tensor_search.nearest(registry.index, registry.store, again)
    assert [(str(share.row.ref), share.path, share.count) for share in shares] == [("team/sql:v1", peft.WEIGHTS, 8)]
    assert shares[0].size == sum(tensor.size for tensor in again)


def test_the_nearest_come_first(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(rewritten(make("b"), {}, q_proj=np.zeros((2, 2), np.float32)), Ref.parse("team/half"))
    registry.push(rewritten(make("c"), {}, lora_B=np.ones((8, 2), np.float32)), SQL)
    looked_for = read(rewritten(make("d"), {"n": "7"}, lora_B=np.zeros((8, 2), np.float32)) / peft.WEIGHTS)
    registry.list_tensors()
    shares = tensor_search.nearest(registry.index, registry.store, looked_for)
    assert [(str(share.row.ref), share.count) for share in shares] == [
        ("team/sql:v2", 4),
        ("team/sql:v1", 4),
        ("team/half:v1", 2),
    ]


def test_a_converted_file_has_the_tensors_of_its_source_under_other_names(
    registry: Registry, make: Make, tmp_path: Path
) -> None:
    source = make()
    registry.push(source, SQL)
    convert.convert(source, tmp_path / "sql.gguf", to="gguf", base=base(tmp_path / "base"))
    gguf = read(tmp_path / "sql.gguf")
    registry.list_tensors()
    shares = tensor_search.nearest(registry.index, registry.store, gguf)
    assert (shares[0].count, len(gguf)) == (6, 8)  # float32 both; only lora_B of q_proj has its rows in llama.cpp's order
    assert {tensor.name for tensor in gguf}.isdisjoint(tensor.name for tensor in read(source / peft.WEIGHTS))


def test_what_has_no_version_any_more_is_not_found(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("a"), Ref.parse("team/copy"))
    registry.list_tensors()
    looked_for = read(make("a") / peft.WEIGHTS)
    registry.rm(SQL)
    assert [str(share.row.ref) for share in tensor_search.nearest(registry.index, registry.store, looked_for)] == [
        "team/copy:v1"
    ]
    registry.store.tensors.path(weights(registry, "team/copy")).unlink()  # then every row is looked at
    registry.rm(Ref.parse("team/copy"))
    assert tensor_search.nearest(registry.index, registry.store, looked_for) == []
    assert registry.index.select("SELECT * FROM tensors") == registry.index.select("SELECT * FROM weights") == []


def test_a_copy_from_another_registry_is_found_by_its_tensors(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make("a"), SQL)
    with Registry.init(tmp_path / "other") as other_registry:
        target = LocalName(other_registry, "team/sql")
        with target.lease_for_push():
            copy_version(LocalName(registry, "team/sql"), "v1", target, None)
        for either_registry in (registry, other_registry):
            either_registry.list_tensors()
        assert listed_tensors(other_registry) == listed_tensors(registry) != []
        assert fsck(other_registry) == []


def test_find_lists_the_tensors_of_a_store_that_has_no_lists(run: Run, registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("c", 1), Ref.parse("team/damaged"))
    os.truncate(registry.store.blob_path(weights(registry, "team/damaged")), 100)
    looked_for = rewritten(make("b"), {"format": "np"}) / peft.WEIGHTS
    assert "8 of 8" in run("search", "--file", looked_for, cwd=registry.root).stdout
    unknown_file = make("z", 9) / peft.WEIGHTS
    assert run("search", "--file", unknown_file, cwd=registry.root, code=3).stderr.startswith(
        "not searched: the tensors of 1 file, missing or damaged"
    )
