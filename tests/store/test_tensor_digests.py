"""Tensors by their bytes: which versions have what is in a file that none has as a whole."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.index import tensor_search
from adapterhub.maintenance import compress, disk_usage
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store import tensor_digests
from adapterhub.store.tensor_digests import Hashing, Tensor
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.formats import convert, peft
from tests.conftest import Run, need_module
from tests.support.adapters import Make, write_adapter
from tests.support.folders import base

SQL = Ref.parse("team/sql")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


def weights(registry: Registry, ref: str) -> str:
    version = registry.resolve(Ref.parse(ref))
    return next(layer.digest for layer in registry.files(version) if layer.path == peft.WEIGHTS)


def read(path: Path) -> tensor_digests.Tensors:
    with open(path, "rb", buffering=0) as file:
        return tensor_digests.digests(file, path.stat().st_size)[1]


def rewritten(folder: Path, metadata: dict[str, str], **changed: np.ndarray[Any, Any]) -> Path:
    """The folder with weights that are other as a whole: other metadata, and those tensors changed."""
    path = folder / peft.WEIGHTS
    with safetensors_file.SafetensorsFile(path) as file:
        arrays = {name: np.array(file.tensor(name)) for name in file.tensors}
    arrays.update({name: changed[key] for name in arrays for key in changed if key in name})
    safetensors_file.write(path, arrays, metadata)
    return folder


# ---- the lists


@pytest.mark.peer
def test_safetensors_and_gguf_agree_on_every_tensor(make: Make, tmp_path: Path) -> None:
    need_module("safetensors")
    need_module("gguf")
    import gguf
    from safetensors.numpy import load_file

    def sha256(array: np.ndarray[Any, Any]) -> str:
        return "sha256:" + hashlib.sha256(array.tobytes()).hexdigest()

    source = make()
    theirs = load_file(source / peft.WEIGHTS)
    tensors = {tensor.name: (tensor.shape, tensor.digest) for tensor in read(source / peft.WEIGHTS)}
    assert tensors == {name: (array.shape, sha256(array)) for name, array in theirs.items()}

    spec = base(tmp_path / "base")
    convert.convert(source, tmp_path / "sql.gguf", to="gguf", base=spec)
    reader = gguf.GGUFReader(tmp_path / "sql.gguf")
    assert {tensor.name: tensor.digest for tensor in read(tmp_path / "sql.gguf")} == {
        tensor.name: sha256(tensor.data) for tensor in reader.tensors
    }


@given(cuts=st.lists(st.integers(1, 200), max_size=40), sizes=st.lists(st.integers(0, 40), max_size=12))
def test_it_makes_no_difference_how_the_bytes_come(cuts: list[int], sizes: list[int]) -> None:
    file = io.BytesIO()
    header: dict[str, Any] = {}
    data = bytes(range(256)) * 2
    position = 0
    for n, size in enumerate(sizes):
        header[f"t{n}"] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    file.write(len(text).to_bytes(8, "little") + text + data[:position])
    raw = file.getvalue()
    hashing = Hashing(lambda offset, count: raw[offset : offset + count], len(raw))
    at = 0
    for cut in [*cuts, len(raw)]:
        hashing(memoryview(raw)[at : at + cut])
        at = min(len(raw), at + cut)
    result = hashing.result()
    assert result is not None
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    assert {tensor.name: tensor.digest for tensor in result} == {
        f"t{n}": "sha256:" + hashlib.sha256(data[start : start + size]).hexdigest()
        for n, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }


def test_a_file_that_is_not_as_long_as_it_was_has_no_list(make: Make) -> None:
    raw = (make() / peft.WEIGHTS).read_bytes()
    hashing = Hashing(lambda offset, count: raw[offset : offset + count], len(raw))
    hashing(memoryview(raw)[:-1])
    assert hashing.result() is None


TENSORS = st.builds(
    Tensor,
    name=st.text(st.characters(codec="utf-8"), max_size=8),
    dtype=st.sampled_from(["F32", "Q4_K"]),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    size=st.integers(0, 2**40),
    digest=st.integers(0, 2**256 - 1).map(lambda number: f"sha256:{number:064x}"),
)


@given(tensors=st.lists(TENSORS, max_size=5).map(tuple), at=st.integers(0, 2**20), byte=st.integers(1, 255))
def test_a_list_is_read_as_it_was_written_or_not_at_all(tensors: tensor_digests.Tensors, at: int, byte: int) -> None:
    raw = tensor_digests.dump(tensors)
    assert tensor_digests.parse(raw, "") == tensors
    assert len(json.loads(raw)["tensors"]) == len(tensors)
    broken = bytearray(raw)
    broken[at % len(raw)] ^= byte
    for wrong in (bytes(broken), raw[: at % len(raw)]):
        with pytest.raises(FormatError, match="incomplete list of tensors"):
            tensor_digests.parse(wrong, "")


@pytest.mark.parametrize("entry", ['["a"]', "7", '["a","F32",[1],-4,"' + "0" * 64 + '"]', '["a","F32",[1],4,"../x"]'])
def test_an_invalid_list_is_ignored(entry: str) -> None:
    text = b'{"version":1,"tensors":[\n' + entry.encode() + b'\n],"sha256":"'
    raw = text + hashlib.sha256(text).hexdigest().encode() + b'"}\n'
    with pytest.raises(FormatError):
        tensor_digests.parse(raw, "")


@given(digest=st.integers(0, 2**256 - 1).map(lambda number: f"sha256:{number:064x}"), digits=st.integers(6, 64))
def test_the_keys_of_a_prefix_hold_that_of_the_digest(digest: str, digits: int) -> None:
    low, high = tensor_search.keys(digest[: 7 + digits])
    assert -(2**63) <= low <= tensor_search.key(digest) <= high < 2**63


# ---- finding


def test_the_command(run: Run, registry: Registry, make: Make) -> None:
    find = partial(run, "search", cwd=registry.root)
    registry.push(make("a"), Ref.parse("team/sql:prod"))
    whole = rewritten(make("b"), {"format": "np"}) / peft.WEIGHTS
    part = rewritten(make("c"), {}, q_proj=np.zeros((2, 2), np.float32)) / peft.WEIGHTS
    result = find("--file", whole)
    assert result.stdout.splitlines()[1].split() == ["team/sql:v1", "latest,", "prod", peft.WEIGHTS, "8", "of", "8"]
    assert result.stderr == f"{whole}: no version contains it as a whole\n"
    result = find("--file", part, "--file", make("a") / peft.WEIGHTS, code=3)
    assert ("4 of 8" in result.stdout, " all" in result.stdout) == (True, True)
    match = json.loads(find("--file", part.parent, "--json", code=3).stdout)["found"][0]
    assert match["holders"] == []
    assert (match["tensors"]["count"], match["tensors"]["holders"][0]["count"]) == (8, 4)
    tensor = read(whole)[0]
    assert f"{peft.WEIGHTS}: {tensor.name}" in "".join(
        find("--sha256", tensor.digest[:20], env={"COLUMNS": "200"}).stdout.split("\n")
    )
    assert json.loads(find("--sha256", tensor.digest, "--json").stdout)["found"][0]["holders"][0]["tensor"] == tensor.name
    unknown_file = make("z", 9) / peft.WEIGHTS
    assert find("--file", unknown_file, code=3).stderr == f"error: {unknown_file}: no version contains it  [not-found]\n"


# ---- how much is there more than once


def test_tensors_that_several_files_have_are_counted_once_a_file(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    assert disk_usage.usage(registry).repeated == 0
    registry.push(make("a"), Ref.parse("team/copy"))
    assert disk_usage.usage(registry).repeated == 0  # the file is there once
    registry.push(rewritten(make("b"), {}, q_proj=np.zeros((2, 2), np.float32)), SQL)
    v_proj = 4 * 16 * 4  # both halves of two layers, float32
    assert disk_usage.usage(registry).repeated == disk_usage.usage(registry, "team/sql").repeated == v_proj
    assert disk_usage.usage(registry, "team/copy").repeated == 0


def test_equal_tensors_are_packed_as_differences_whatever_they_are_called(registry: Registry, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {half: rng.normal(size=(8, 4096) if half == "A" else (4096, 8)).astype(np.float32) for half in "AB"}

    def folder(name: str, module: str) -> Path:
        adapter = write_adapter(tmp_path / name, target_modules=[module], r=8)
        stem = f"base_model.model.model.layers.0.self_attn.{module}.lora_"
        named = {f"{stem}{half}.weight": array for half, array in arrays.items()}
        safetensors_file.write(adapter / peft.WEIGHTS, named, {"format": "pt"})
        return adapter

    registry.push(folder("a", "q_proj"), SQL)
    registry.push(folder("b", "v_proj"), Ref.parse("zoo/same"))
    changes = {change.ref: change for change in compress.pack(registry) if change.path == peft.WEIGHTS}
    twin = changes["zoo/same:v1"]
    assert (twin.outcome, twin.parent) == ("packed", changes["team/sql:v1"].digest)
    assert twin.stored < twin.size / 100
    registry.pull(Ref.parse("zoo/same"), tmp_path / "out")
    assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


# ---- what is said of them in the store


def listed_tensors(registry: Registry) -> list[Any]:
    return registry.index.select("SELECT digest, key, size FROM weights JOIN tensors ON file = id ORDER BY 1, 2")


def test_a_push_makes_no_list(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    assert registry.store.tensors.files() == []
    assert fsck(registry) == []
    registry.list_tensors()
    assert len(registry.store.tensors.files()) == 1


def test_only_the_tensors_of_a_name_are_listed(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("b", 1), Ref.parse("zoo/other"))
    assert disk_usage.usage(registry, "team").unlisted == 0
    assert list(registry.store.tensors.digests()) == [weights(registry, "team/sql")]


@pytest.mark.parametrize("damage", ["lost", "half", "empty"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_list_that_is_not_right_is_made_again(registry: Registry, make: Make, damage: str, packed: bool) -> None:
    shapes = {"A": (2, 8192), "B": (8192, 2)}
    zeros = {f"base_model.model.x.q_proj.lora_{half}.weight": np.zeros(shape, np.float32) for half, shape in shapes.items()}
    folder = make("a")
    safetensors_file.write(folder / peft.WEIGHTS, zeros, {"format": "pt"})
    registry.push(folder, SQL)
    if packed:
        assert "packed" in {change.outcome for change in compress.pack(registry)}
    registry.list_tensors()
    path = registry.store.tensors.path(weights(registry, "team/sql"))
    before, right = listed_tensors(registry), path.read_bytes()
    if damage == "lost":
        path.unlink()
        registry.close()
        (registry.root / "registry.db").unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else right[:100])
    with Registry.open(registry.root) as again:
        notes = [] if damage == "lost" else [("unlisted", "note")]
        assert [(finding.code, finding.severity) for finding in fsck(again)] == notes
        looked_for = read(rewritten(folder, {"format": "np"}) / peft.WEIGHTS)
        again.list_tensors()
        assert [share.count for share in tensor_search.nearest(again.index, again.store, looked_for)] == [2]
        assert (fsck(again), listed_tensors(again), path.read_bytes()) == ([], before, right)
        assert (again.rebuild_index(), listed_tensors(again)) == ([], before)


def test_a_list_that_disagrees_is_an_error(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.list_tensors()
    path = registry.store.tensors.path(weights(registry, "team/sql"))
    path.write_bytes(tensor_digests.dump(tensor_digests.parse(path.read_bytes(), "")[1:]))
    [finding] = fsck(registry)
    assert (finding.code, finding.remedy, finding.where) == ("wrong-tensors", "delete-and-rebuild", str(path))
    assert fsck(registry, scope=None) == []
    path.unlink()
    assert registry.rebuild_index() == fsck(registry) == []


def test_a_list_goes_with_its_blob(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.list_tensors()
    path = registry.store.tensors.path(weights(registry, "team/sql"))
    registry.rm(SQL)
    gc(registry, grace=0, dry_run=True)
    assert path.exists()
    gc(registry, grace=0)
    assert not path.exists()
    path.write_bytes(b"[]")  # as one killed between the two leaves it
    assert [finding.code for finding in fsck(registry)] == ["leftovers"]
    assert gc(registry).leftovers == 1
    assert fsck(registry) == []
