"""adapter.json as a value: every valid document comes back as it was, and one that nobody checked can still be listed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterhub_schemas
from adapterhub.digest import sha256_bytes
from adapterhub.manifest import derive, oci_manifest
from adapterhub.manifest.document import AdapterManifest, Parent, Recipe
from adapterhub.ref import Ref
from adapterhub.registry import recipe_store
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import FormatError, RefusedError
from tests.conftest import Run

STORED = Path(__file__).parent / "schema_1"
DIGEST = "sha256:" + "0" * 64
VERSIONS = {
    "team/sql:v1": "sha256:6acb3b8a9260bcad758b0eb57028b10795d804114a46a1bbc61b0b678bb61ee2",
    "team/french:v1": "sha256:ee703ac4eb3f87fbd0a4e7ad55e6e48e577cb73540f5dbce463acb526aca0197",
}
SCHEMA = adapterhub_schemas.load("adapter")
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
# A larger number is written as ECMAScript does, with digits that Python reads as another integer and as the same float.
numbers = st.one_of(st.integers(-(2**53) + 1, 2**53 - 1), st.floats(-(2.0**53), 2.0**53, exclude_min=True, exclude_max=True))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts), lambda inner: st.lists(inner, max_size=2), max_leaves=3
)


def valid(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """JSON values that fit a part of the schema of adapter.json, with as many or as few optional keys as can be."""
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "$ref" in schema and schema["$ref"].endswith("/date"):
        return st.just("2026-01-31")
    if "$ref" in schema:
        return st.just(DIGEST) if schema["$ref"].endswith("/digest") else st.sampled_from([DIGEST, None])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of(*(_of_kind(kind, schema) for kind in kinds))


def _of_kind(kind: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind == "object" and "properties" in schema:
        required = {key: valid(part) for key, part in schema["properties"].items() if key in schema.get("required", ())}
        optional = {key: valid(part) for key, part in schema["properties"].items() if key not in required}
        return st.fixed_dictionaries(required, optional=optional)
    if kind == "object":
        additional = schema.get("additionalProperties")
        if "propertyNames" in schema:
            return st.dictionaries(st.just("org.example.notes"), st.dictionaries(texts, values, max_size=2), max_size=1)
        return st.dictionaries(texts, valid(additional) if isinstance(additional, dict) else values, max_size=2)
    if kind == "array":
        return st.lists(valid(schema["items"]), max_size=2, unique=bool(schema.get("uniqueItems")))
    if kind == "number" and ("exclusiveMinimum" in schema or "minimum" in schema):
        return st.floats(0.01, 1)
    return {
        "string": texts,
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(schema.get("minimum", -5), 2**40),
        "number": numbers,
    }[kind]


@settings(max_examples=150, deadline=None)
@given(valid(SCHEMA))
def test_a_valid_document_comes_back_as_it_was(document: dict[str, Any]) -> None:
    manifest = AdapterManifest.from_dict(document, "adapter.json")
    assert manifest.to_dict() == document
    assert AdapterManifest.parse(manifest.dump(), "adapter.json") == manifest
    assert AdapterManifest.salvage(document) == manifest


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SCHEMA["properties"])), st.one_of(values, st.dictionaries(texts, values))))
def test_any_object_can_be_salvaged_and_written(document: dict[str, Any]) -> None:
    AdapterManifest.salvage(document).dump()


def test_what_fits_is_salvaged_and_nothing_else() -> None:
    salvaged = AdapterManifest.salvage({
        "name": 3, "r": True, "alpha": 8.0, "parameters": 16.0, "format": None, "targets": ["q_proj", 3], "base": ["x"],
        "parents": [{"ref": "team/a"}, "b"], "training": {"data": {}, "metrics": {"loss": "low"}}, "files": "none",
        "modules": {"x": {"r": 4}, "y": 4},
    })  # fmt: skip
    assert (salvaged.name, salvaged.r, salvaged.alpha, salvaged.parameters, salvaged.format) == (None, None, 8.0, 16, "")
    assert (salvaged.targets, salvaged.base.repo, salvaged.parents, salvaged.files) == (
        ("q_proj",),
        None,
        (Parent("", "team/a"),),
        (),
    )
    assert salvaged.training is not None
    assert (salvaged.training.data, salvaged.training.metrics) == (None, {"loss": "low"})
    assert salvaged.max_rank == 4


def test_a_recipe_has_a_rank_of_null_and_no_other_null(tmp_path: Path) -> None:
    empty = AdapterManifest.salvage({})
    for recipe in (Recipe("merge", method="svd", energy=0.9), Recipe("convert", to="gguf")):
        written = dataclasses.replace(empty, recipe=recipe).to_dict()["recipe"]
        assert [key for key, value in written.items() if value is None] == ["rank"]
    with pytest.raises(FormatError, match="method: '' should be non-empty"):
        empty.write(tmp_path)


def test_reading_a_document_imports_nothing_heavy() -> None:
    code = "import sys, adapterhub.manifest.document as d; d.AdapterManifest.salvage({}); print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"numpy", "jsonschema", "safetensors", "torch", "adapterhub_converters.formats"}


# ---- files of schema 1, as the version before it wrote them


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A registry that was written under schema 1, its database included."""
    with tarfile.open(STORED / "registry.tar.gz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def test_a_folder_of_schema_1_keeps_its_bytes_and_its_digest(tmp_path: Path) -> None:
    raw = (STORED / "sql" / "adapter.json").read_bytes()
    manifest = AdapterManifest.read(STORED / "sql")
    assert manifest is not None
    assert (manifest.license, manifest.base.quantization, manifest.name) == ("MIT", "nf4", "sql")
    assert manifest.training is not None
    assert (manifest.training.data or ())[0].license == "CC0-1.0"
    shutil.copytree(STORED / "sql", tmp_path / "sql")
    (tmp_path / "sql" / "adapter.toml").unlink()  # which declares under the keys of schema 1; its digest stays listed
    settled, bytes_ = derive.finalize(tmp_path / "sql", derive.digests(STORED / "sql"))
    assert (settled, bytes_) == (manifest, raw)
    files = {**derive.digests(STORED / "sql"), "adapter.json": (sha256_bytes(raw), len(raw))}
    assert oci_manifest.assemble(files, manifest).digest == VERSIONS["team/sql:v1"]


def test_a_store_of_schema_1_is_listed_pulled_and_rebuilt(old: Path, tmp_path: Path, run: Run) -> None:
    at = ("--registry", old, "--json")
    rows = json.loads(run("list", *at).stdout)["adapters"]
    assert {row["ref"]: row["digest"] for row in rows}.items() >= VERSIONS.items()
    assert {(row["base"], row["license"]) for row in rows} == {("org/base", "MIT"), ("org/base", None)}
    details = json.loads(run("show", "team/sql", *at).stdout)
    assert (details["manifest"]["license"], details["manifest"]["schema_version"]) == ("MIT", "1.0")
    assert "nf4" in run("show", "team/sql", "--registry", old).stdout
    assert "merged by cat" in run("lineage", "team/both", "--registry", old).stdout
    assert json.loads(run("fsck", *at).stdout)["ok"]
    run("fsck", "--rebuild-index", *at)
    assert [row["license"] for row in json.loads(run("list", "team/sql", *at).stdout)["adapters"]] == ["MIT"]
    with Registry.open(old) as registry:
        registry.pull(Ref.parse("team/sql"), tmp_path / "sql")
        merged = recipe_store.get(registry, "merged-model").recipe
    assert {path.name: path.read_bytes() for path in (tmp_path / "sql").iterdir()} == {
        path.name: path.read_bytes() for path in (STORED / "sql").iterdir()
    }
    assert merged.merge_options().dequantize


# ---- files of schema 2, the draft before 1.0


def test_a_folder_of_schema_2_keeps_its_bytes_and_its_digest(tmp_path: Path) -> None:
    folder = tmp_path / "sql"
    shutil.copytree(STORED.with_name("schema_2") / "sql", folder)
    digest = "sha256:f87cdcf9565ef2628de70bfd15f2f78788d45a3131630b228a626830b88bb5c0"
    assert oci_manifest.build(folder).digest == digest
    settled, raw = derive.finalize(folder)
    assert (settled.version, raw) == ("2", (folder / "adapter.json").read_bytes())
    (folder / "adapter.toml").write_text('supplier = "Example"\n')
    settled, raw = derive.finalize(folder)
    assert (settled.version, settled.supplier, json.loads(raw)["schema_version"]) == ("1.0", "Example", "1.0")
    built = oci_manifest.build(folder)
    (folder / "adapter.json").write_bytes(raw)
    assert built.digest == oci_manifest.build(folder).digest != digest


# ---- later versions


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """A folder whose adapter.json is of a later minor version, with fields that are not known here."""
    folder = tmp_path / "later"
    shutil.copytree(STORED.with_name("schema_2") / "sql", folder)
    manifest = AdapterManifest.read(folder)
    assert manifest is not None
    fields = manifest.renewed().to_dict()
    changes = {"$schema": "urn:adapterhub:schema:adapter:1.7", "schema_version": "1.7", "mood": "good"}
    parents = [{**parent, "since": 3} for parent in fields["parents"]]
    (folder / "adapter.json").write_text(json.dumps({**fields, **changes, "parents": parents}))
    return folder


def test_fields_of_a_later_minor_version_are_ignored_and_kept(later: Path) -> None:
    settled, raw = derive.finalize(later)
    assert (settled.version, settled.name, raw) == ("1.7", None, (later / "adapter.json").read_bytes())
    assert oci_manifest.build(later).annotations["io.adapterhub.rule"] == "2"


def test_a_document_of_a_later_minor_version_is_not_rewritten(later: Path) -> None:
    (later / "adapter.toml").write_text('supplier = "Example"\n')
    with pytest.raises(RefusedError, match="1.7 is newer than the 1.0 written here, which would lose fields of it") as caught:
        derive.finalize(later)
    assert caught.value.code == "newer-version"


def test_extensions_are_kept_in_a_rewritten_document(tmp_path: Path) -> None:
    folder = tmp_path / "sql"
    shutil.copytree(STORED.with_name("schema_2") / "sql", folder)
    (folder / "adapter.toml").write_text('[extensions."org.example.review"]\nticket = 7\n')
    (folder / "adapter.json").write_bytes(derive.finalize(folder)[1])
    (folder / "adapter.toml").write_text('supplier = "Example"\n')
    settled = derive.finalize(folder)[0]
    assert (settled.extensions, settled.supplier) == ({"org.example.review": {"ticket": 7}}, "Example")
