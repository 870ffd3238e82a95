"""Bases that a registry knows by name: as good as their files for headers, never lost, never two things under one name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.bases import registered_bases
from adapterhub.bases.registered_bases import BaseDocument
from adapterhub.maintenance.findings import Findings
from adapterhub.maintenance.fsck import fsck
from adapterhub.registry.registry import Registry
from adapterhub_converters.bases import BaseSpec, BaseTensor, read_base
from adapterhub_converters.errors import AdapterhubError, ConflictError, FormatError, NotFoundError, RefusedError, UsageError
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs
from tests.support.web_server import COMMIT, FakeHub, Web


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def spec(tmp_path: Path) -> BaseSpec:
    return dataclasses.replace(base(tmp_path / "base"), repo="org/model", revision=COMMIT)


def same(first: BaseSpec, second: BaseSpec) -> None:
    for field in dataclasses.fields(BaseSpec):
        if field.name not in ("source", "folder", "fetched", "names"):
            assert getattr(first, field.name) == getattr(second, field.name), field.name
    assert first.fingerprint == second.fingerprint


def errors(registry: Registry) -> Findings:
    return [finding for finding in fsck(registry) if finding.severity == "error"]


def test_what_comes_back_is_what_was_added(registry: Registry, spec: BaseSpec) -> None:
    added = registered_bases.add(registry, "tiny", spec, source="/there")
    registered = registered_bases.get(registry, "tiny")
    assert (added.new, registered.new, registered.digest) == (True, False, added.digest)
    same(registered.spec, spec)
    assert (registered.spec.source, registered.spec.folder, registered.document.source) == ("tiny", None, "/there")
    assert registered_bases.names(registry) == ["tiny"]
    assert fsck(registry) == []


names = st.text("abc.0_é\n", min_size=1, max_size=8)
numbers = st.integers(0, 2**62)


@settings(max_examples=40)
@given(
    st.dictionaries(names, st.builds(BaseTensor, st.lists(numbers, max_size=3).map(tuple), st.sampled_from(["BF16", "Q4_K"]))),
    st.dictionaries(names, st.none() | st.floats(allow_nan=False, allow_infinity=False) | numbers | st.lists(names)),
    st.none() | names,
    st.booleans(),
)
def test_any_base_survives_its_document(tensors: Any, config: Any, text: str | None, tied: bool) -> None:
    built = BaseSpec("x", "hf", "A", "a", config, tensors, tied, text, text, text, text, text, size=5, notes=("n",))
    raw = BaseDocument(built, "y").dump()
    document = BaseDocument.parse(raw, "x")
    parsed = document.spec
    same(parsed, built)
    assert document.dump() == raw


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "newer than the supported 1"),
        ({"version": "1"}, "not the document of a base"),
        ({"tensors": {"a": ["F32", [8, -8]]}}, "not the document of a base"),
        ({"tensors": {"a": ["F32\x1b", [8]]}}, "not the document of a base"),
        ({"tensors": {"a": ["F32", [8]]}}, "its fingerprint is not that of its tensors"),
        ({"tied": None}, "not the document of a base"),
        ({"config": []}, "not the document of a base"),
        ({"repo": 5}, "not the document of a base"),
        ({"notes": [5]}, "not the document of a base"),
    ],
)
def test_a_document_is_not_trusted(spec: BaseSpec, change: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterhubError, match=says) as caught:
        BaseDocument.parse(json.dumps({**BaseDocument(spec, "x").to_dict(), **change}).encode(), "x")
    assert caught.value.code == ("newer-version" if "newer" in says else "add-base")
    with pytest.raises(FormatError):
        BaseDocument.parse(b"\xff", "x")


def test_a_name_means_one_base(registry: Registry, spec: BaseSpec, tmp_path: Path) -> None:
    first = registered_bases.add(registry, "tiny", spec, source="a")
    again = registered_bases.add(registry, "tiny", spec, source="b")
    assert (again.new, again.digest) == (False, first.digest)
    deeper = base(tmp_path / "deeper", 3)
    for other_spec in (
        deeper,
        dataclasses.replace(spec, revision="f" * 40),
        dataclasses.replace(spec, config={"rope_theta": 5e5}),
    ):
        with pytest.raises(ConflictError, match=r"tiny: is another base.*Choose another name, or replace it") as caught:
            registered_bases.add(registry, "tiny", other_spec, source="c")
        assert caught.value.code == "base-name-taken"
    same(registered_bases.get(registry, "tiny").spec, spec)
    assert registered_bases.add(registry, "tiny", deeper, source="c", force=True).new
    same(registered_bases.get(registry, "tiny").spec, deeper)
    assert [finding.code for finding in fsck(registry)] == ["orphans"]


def test_a_removed_name_may_be_given_again(registry: Registry, spec: BaseSpec) -> None:
    registered_bases.add(registry, "tiny", spec, source="a")
    registered_bases.remove(registry, "tiny")
    assert registered_bases.names(registry) == []
    for act in (registered_bases.get, registered_bases.remove):
        with pytest.raises(NotFoundError, match="tiny: no base of this name"):
            act(registry, "tiny")
    assert registered_bases.add(registry, "tiny", spec, source="a").new
    assert fsck(registry) == []


def test_a_base_without_shapes_is_refused(registry: Registry, spec: BaseSpec) -> None:
    with pytest.raises(RefusedError, match="no shapes were read, so it has no fingerprint"):
        registered_bases.add(registry, "tiny", dataclasses.replace(spec, tensors={}), source="a")


@pytest.mark.parametrize("name", ["", "Tiny", "a/b", "..", "con", "a:b", "-x", "x" * 101])
def test_what_is_no_name_of_a_base(registry: Registry, spec: BaseSpec, name: str) -> None:
    with pytest.raises(UsageError):
        registered_bases.add(registry, name, spec, source="a")


def test_of_two_writers_one_gets_a_conflict(registry: Registry, spec: BaseSpec, tmp_path: Path) -> None:
    other_specs = [dataclasses.replace(spec, revision=f"{n}" * 40) for n in range(8)]

    def add(other_spec: BaseSpec) -> bool:
        with Registry.open(tmp_path / "registry") as mine:
            try:
                return registered_bases.add(mine, "tiny", other_spec, source="a").new
            except ConflictError:
                return False

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(add, other_specs))
    assert won.count(True) == 1
    same(registered_bases.get(registry, "tiny").spec, other_specs[won.index(True)])
    assert errors(registry) == []


def test_fsck_sees_what_happens_to_a_base(registry: Registry, spec: BaseSpec) -> None:
    registered = registered_bases.add(registry, "tiny", spec, source="a")
    blob = registry.store.blob_path(registered.digest)
    raw = blob.read_bytes()
    blob.unlink()
    assert [(finding.code, finding.where) for finding in errors(registry)] == [("missing", "base:tiny")]
    assert "Add the base tiny again" in errors(registry)[0].hint
    blob.write_bytes(raw[:-1] + b"?")
    assert {finding.code for finding in errors(registry)} == {"flipped", "damaged"}
    blob.unlink()
    assert registered_bases.add(registry, "tiny", spec, source="a", force=True).digest == registered.digest
    assert errors(registry) == []
    registered_bases.remove(registry, "tiny")
    first = registry.store.root / "bases/tiny/00000001.json"
    entry = first.read_bytes()
    first.write_bytes(entry.replace(b'"push"', b'"tag"'))
    assert [finding.code for finding in errors(registry)] == ["broken-log"]
    first.unlink()
    assert [finding.code for finding in errors(registry)] == ["broken-log"]


# ---- from the command line


def document(run: Run, *args: object, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options).stdout)


@pytest.mark.parametrize("damage", ["lost", "flipped", "log"])
def test_one_base_that_cannot_be_read_hides_no_other(run: Run, registry: Registry, spec: BaseSpec, damage: str) -> None:
    registered = registered_bases.add(registry, "bad", spec, source="a")
    registered_bases.add(registry, "good", dataclasses.replace(spec, repo="org/other"), source="b")
    path = registry.store.root / "bases/bad/00000001.json" if damage == "log" else registry.store.blob_path(registered.digest)
    if damage == "lost":
        path.unlink()
    else:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-9])
    result = run("base", "list", cwd=registry.root, code=1)
    assert "good" in result.stdout
    assert result.stderr.startswith("error: base bad: ")
    assert result.stderr.count("\n") == 1
    listed = json.loads(run("base", "list", "--json", cwd=registry.root, code=1).stdout)
    assert ([item["name"] for item in listed["bases"]], [item["name"] for item in listed["damaged"]]) == (["good"], ["bad"])


def test_the_life_of_a_name(run: Run, tmp_path: Path) -> None:
    spec = base(tmp_path / "base", 2)
    adapter(tmp_path / "sql", pairs(2))
    added = document(run, "base", "add", "tiny", "base")
    assert (added["name"], added["new"], added["fingerprint"]) == ("tiny", True, spec.fingerprint)
    assert added["source"] == str(tmp_path / "base")
    assert document(run, "base", "add", "tiny", "base")["new"] is False
    assert [item["name"] for item in document(run, "base", "list")["bases"]] == ["tiny"]
    assert spec.fingerprint in run("base", "list").stdout
    shown_base = document(run, "base", "show", "tiny")
    assert shown_base["tensors"]["model.norm.weight"] == {"dtype": "F32", "shape": [8]}
    assert "LlamaForCausalLM" in run("base", "show", "tiny").stdout
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "base" / name).unlink()
    (tmp_path / "base").rmdir()
    [report] = document(run, "validate", "sql", "--base", "tiny")["reports"]
    codes = [problem["code"] for problem in report["problems"]]
    assert (report["base"], report["ok"], codes) == ("tiny", True, ["no-base-name"])
    run("convert", "sql", "sql.gguf", "--to", "gguf", "--base", "tiny")
    run("push", "sql", "team/sql", "--base", "tiny")
    assert document(run, "show", "team/sql")["manifest"]["base"]["fingerprint"] == spec.fingerprint
    assert document(run, "fsck")["findings"] == []
    assert document(run, "base", "rm", "tiny") == {"removed": "tiny", "kind": "base"}
    assert "no such file or folder, and no base of this name" in run("validate", "sql", "--base", "tiny", code=3).stderr


def test_another_base_under_a_name_is_a_conflict(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "one", 2)
    base(tmp_path / "two", 3)
    run("base", "add", "tiny", "one")
    assert "error: tiny: is another base: fingerprint is sha256:" in run("base", "add", "tiny", "two", code=7).stderr
    run("base", "add", "tiny", "two", "--force")
    assert document(run, "base", "show", "tiny")["fingerprint"] == read_base(tmp_path / "two").fingerprint


def test_what_is_both_a_path_and_a_name_is_reported_as_ambiguous(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "tiny", 2)
    adapter(tmp_path / "sql", pairs(2))
    run("validate", "sql", "--base", "tiny")
    run("base", "add", "tiny", "tiny")
    for args in (("validate", "sql", "--base", "tiny"), ("base", "show", "tiny")):
        usage_error = run(*args, code=2).stderr
        assert "tiny: both a path and a base in the registry. Write ./tiny for the path, base:tiny for the base" in usage_error
    assert document(run, "validate", "sql", "--base", "./tiny")["reports"][0]["base"] == "tiny"
    assert document(run, "base", "show", "base:tiny")["name"] == "tiny"
    stderr = run("validate", "sql", "--base", "base:tinny", code=3).stderr
    assert stderr.endswith("no base of this name. Did you mean tiny?  [no-such-base]\n")


def test_a_model_of_a_hub_under_a_name_needs_no_network_again(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "m", 2)
    adapter(tmp_path / "sql", pairs(2), base_model_name_or_path="org/model")
    with Web() as web, Web() as storage:
        FakeHub(web, storage).publish("org/model", tmp_path / "m")
        result = run("base", "add", "m2", "hf://org/model", env={"HF_ENDPOINT": web.url})
        assert "by range" in result.stderr
        request_count = len(web.requests)
        assert document(run, "base", "show", "hf://org/model", env={"HF_ENDPOINT": web.url})["revision"] == COMMIT
        assert len(web.requests) > request_count
    run("push", "sql", "team/sql", "--base", "m2")
    assert document(run, "show", "team/sql")["manifest"]["base"]["revision"] == COMMIT


def test_a_path_that_is_not_there_may_have_been_meant_for_the_hub(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "sql", pairs(2))
    assert "Write hf://org/model for one on the Hub" in run("validate", "sql", "--base", "org/model", code=3).stderr
