"""index.json that is changed line by line is the one that would be made anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.index import queries
from adapterhub.maintenance.fsck import fsck
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store import oci_index
from adapterhub.store.store import Entry

Make = Callable[..., Path]
NAMES = ["a/a", "a/a-b", "a/a.b", "a/ab", "b/a", "ba/a"]
CHANGES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.lists(st.sampled_from(["v1", "v2", "latest"]), unique=True)), max_size=12
)


@given(CHANGES)
def test_replacing_lines_one_name_at_a_time_equals_rewriting_the_text(changes: list[tuple[str, list[str]]]) -> None:
    state: dict[str, list[oci_index.Line]] = {}
    text = oci_index.build([])
    for n, (name, tags) in enumerate(changes):
        lines = [(f"{name}:{tag}", f"sha256:{n:064}", n) for tag in tags]
        later = [later_name for later_name in state if later_name > name and state[later_name]]
        text = oci_index.replace(text, name, lines, before=min(later, default=None))
        state[name] = lines
        all_lines = [line for _, lines in sorted(state.items()) for line in lines]
        assert text == oci_index.build(all_lines)
        assert [(entry["digest"], entry["size"]) for entry in json.loads(text)["manifests"]] == [line[1:] for line in all_lines]
        assert oci_index.has_exactly(json.dumps(json.loads(text)).encode(), all_lines)


@pytest.mark.parametrize("text", [b"", b"{}", b'{"manifests":[]}', b'{"manifests":[1]}', b"\xff"])
def test_an_index_of_others_is_not_changed(text: bytes) -> None:
    with pytest.raises(ValueError, match="not an index"):
        oci_index.replace(text, "a/a", [], before=None)
    assert not oci_index.has_exactly(text, [("a/a:v1", "sha256:0", 1)])


def index(registry: Registry) -> bytes:
    return (registry.store.root / "index.json").read_bytes()


@pytest.mark.parametrize("elsewhere", ["index", "log"])
def test_an_index_written_by_another_tool_is_rebuilt(make: Make, tmp_path: Path, elsewhere: str) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        version = registry.push(make("a"), Ref.parse("team/sql"))
        registry.push(make("a"), Ref.parse("team/poems"))
        if elsewhere == "index":
            (registry.store.root / "index.json").write_bytes(index(registry).replace(b"poems", b"prose"))
        else:  # a move of another machine's, whose catalog this is not: read here by a command that moves nothing
            entry_and_digest = registry.store.log.entry("team/sql", 1)
            assert entry_and_digest
            entry = Entry(
                "team/sql", 2, "tag", "t", version.digest, entry_and_digest[0].size, 1, ("prod",), entry_and_digest[1]
            )
            assert registry.store.log.append(entry)
            assert registry.resolve(Ref.parse("team/sql:prod")).number == 1
        registry.push(make("b", 1), Ref.parse("team/zebra"))
        assert index(registry) == oci_index.build(queries.ref_lines(registry.index))
        assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


def test_a_move_changes_the_lines_of_its_name_only(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(make("a"), Ref.parse("team/sql"))

        def never(*_: object) -> str:
            raise AssertionError("index.json was made anew")

        monkeypatch.setattr(oci_index.IndexFile, "write", never)
        for name in ("team/a", "team/z", "team/sql"):
            registry.push(make("b", 1), Ref.parse(f"{name}:prod"))
        registry.tag(Ref.parse("team/sql:v1"), "prod")
        registry.rm(Ref.parse("team/sql:prod"))
        registry.rm(Ref.parse("team/z"))
        registry.rm(Ref.parse("team/a"))
        assert index(registry) == oci_index.build(queries.ref_lines(registry.index))
