"""Packs that anybody may have put into a store: each is refused by name, with work in proportion to the bytes that come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.packs import byte_planes, pack_chains
from adapterhub_converters.errors import FormatError
from tests.store.test_packs import entry, forged
from tests.support.adapters import Make

BLOCK, BLOCKS = 1 << 16, 64
TINY = bytes.fromhex("28b52ffd")  # how a frame of zstd begins


def digest_of(level: int) -> str:
    return f"{level + 1:064x}"


def zeros(size: int) -> bytes:
    from adapterhub.store.packs.byte_planes import deflate

    return deflate(bytes(size))


def link(level: int) -> bytes:
    """A pack, each of whose blocks is a difference to the ends of two blocks of the next, far from those of its neighbor."""
    plane = zeros(BLOCK)
    assert plane.startswith(TINY)
    places = [((n * 37 + 11) % (BLOCKS - 1)) * BLOCK + BLOCK // 2 for n in range(BLOCKS)]
    blocks = [entry(BLOCK, 1, (len(plane),), delta=1, parent=place) for place in places]
    return forged(blocks, plane * BLOCKS, parent=bytes.fromhex(digest_of(level + 1)))


def put_chain(registry: Registry, length: int) -> None:
    folder = registry.store.packs.folder
    folder.mkdir(parents=True, exist_ok=True)
    plane = zeros(BLOCK)
    for level in range(length):
        (folder / digest_of(level)).write_bytes(link(level))
    (folder / digest_of(length)).write_bytes(forged([entry(BLOCK, 1, (len(plane),))] * BLOCKS, plane * BLOCKS))


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Registry:
    registry = Registry.init(tmp_path / "r")
    registry.push(make("a"), Ref.parse("team/sql"))
    return registry


def test_a_chain_that_doubles_with_each_pack_is_refused_before_it_is_decoded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    decode = byte_planes.decode

    def counted(*arguments: object) -> object:
        nonlocal decoded
        decoded += 1
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(byte_planes, "decode", counted)
    put_chain(registry, 15)
    with pytest.raises(FormatError, match="takes more of its parents than its size justifies"):
        registry.store.rehash(f"sha256:{digest_of(0)}")
    assert decoded * BLOCK < 512 << 20
    findings = [finding for finding in fsck(registry) if finding.severity == "error"]
    assert {finding.code for finding in findings} == {"broken-pack"}
    assert any("takes more of its parents" in finding.what for finding in findings)


def test_an_honest_chain_of_any_layout_is_decoded(registry: Registry) -> None:
    put_chain(registry, pack_chains.MAX_DEPTH)
    with registry.store.open_pack(f"sha256:{digest_of(0)}") as file:
        assert file.read(BLOCK * BLOCKS) == bytes(BLOCK * BLOCKS)


def test_a_chain_of_thousands_of_packs_is_cut_where_nothing_can_read_it() -> None:
    parents = {f"{n}": f"{n + 1}" for n in range(50_000)}
    assert len(pack_chains.chain("0", parents)) == pack_chains.READ_DEPTH + 1
    assert len(pack_chains.with_parents(parents, parents)) == 50_001
    assert not pack_chains.may_follow("x", "0", parents)
