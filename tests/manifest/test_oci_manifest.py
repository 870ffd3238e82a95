"""The manifest is a pure function of the files; one from elsewhere cannot make us write where we shouldn't."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import derive, oci_manifest, package_files
from adapterhub_converters.errors import FormatError, RefusedError

Make = Callable[..., Path]
DIGEST = "sha256:" + "0" * 64


def test_the_manifest_is_a_pure_function_of_the_files(make: Make) -> None:
    manifest, two = oci_manifest.build(make("a")), oci_manifest.build(make("b"))
    assert manifest == two
    assert manifest.digest != oci_manifest.build(make("c", seed=1)).digest


def test_the_manifest_may_be_in_the_folder_or_not(make: Make) -> None:
    source = make()
    before = oci_manifest.build(source)
    derive.describe(source).write(source)
    assert oci_manifest.build(source) == before


def test_the_content_of_the_manifest(make: Make) -> None:
    source = make(revision="abc")
    (source / "LICENSE").write_text("free")
    (source / "adapter.toml").write_text('license = "MIT"\nname = "sql"\n[training]\ncreated = "2026-01-31T12:00:00Z"')
    built = oci_manifest.build(source)
    types = {layer.path: layer.media_type.rpartition("model.")[2] for layer in built.layers}
    assert types == {
        "LICENSE": "doc.v1.raw",
        "README.md": "doc.v1.raw",
        "adapter.json": "weight.config.v1.raw",
        "adapter.toml": "weight.config.v1.raw",
        "adapter_config.json": "weight.config.v1.raw",
        "adapter_model.safetensors": "weight.v1.raw",
    }
    assert built.annotations == {
        "io.adapterhub.kind": "lora", "io.adapterhub.base.repo": "org/base", "io.adapterhub.base.revision": "abc",
        "io.adapterhub.rule": "2",
    }  # fmt: skip
    config = json.loads(built.config_bytes)
    assert config["descriptor"] == {"createdAt": "2026-01-31T12:00:00Z", "licenses": ["MIT"], "name": "sql"}
    assert config["modelfs"]["diffIds"] == [layer.digest for layer in built.layers]
    assert config["config"] == {"format": "safetensors", "paramSize": "0.128K", "precision": "float32"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0K"), (7, "0.007K"), (1000, "1K"), (3584, "3.584K"), (4_587_520, "4.58752M"), (8 * 10**9, "8B"), (10**15, "1000T")],
)
def test_a_count_of_parameters_is_exact_in_the_words_of_modelpack(count: int, text: str) -> None:
    assert oci_manifest._param_size(count) == text


def test_a_config_has_no_time_that_nobody_recorded_and_no_precision_that_is_mixed(make: Make) -> None:
    manifest = derive.describe(make())
    config = json.loads(oci_manifest.assemble({}, dataclasses.replace(manifest, dtype="mixed")).config_bytes)
    assert ("createdAt" in config["descriptor"], config["config"]) == (False, {"format": "safetensors", "paramSize": "0.128K"})


def test_a_manifest_reads_back(make: Make) -> None:
    built = oci_manifest.build(make())
    again = oci_manifest.parse(built.raw, "x")
    assert (again.digest, again.layers, again.config, again.annotations) == (
        built.digest, built.layers, built.config, built.annotations,
    )  # fmt: skip


BAD_NAMES = [
    "../x", "/etc/x", "a/../../x", "a//b", "C:x", "a\\b", "..", ".", "", ".git/config", "a/.ssh", "a\0b", "%2e%2e/x",
    "con.json", "a/nul", "x.", "x ", "x\n",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_climb_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        oci_manifest.parse(document(names=["ok.json", name]), "x")


@pytest.mark.parametrize("names", [["a", "a"], ["a", "A"], ["a", "a/b"], ["a/b", "a"], ["a/b", "A/c"]])
def test_names_that_collide_are_refused(names: list[str]) -> None:
    with pytest.raises(FormatError, match="collides"):
        oci_manifest.parse(document(names=names), "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schemaVersion": 1}, "not an OCI image manifest: its schemaVersion is not 2, or it has no list of layers"),
        ({"layers": {}}, "not an OCI image manifest: its schemaVersion is not 2, or it has no list of layers"),
        ({"layers": [3]}, "a descriptor is not an object"),
        ({"config": None}, "a descriptor is not an object"),
        ({"mediaType": "text/plain"}, "not an OCI image manifest but 'text/plain'"),
        ({"annotations": {"a": 3}}, "annotations are not a map of strings to strings"),
        ({"layers": [{"mediaType": "x", "digest": DIGEST, "size": 1}]}, f"the layer {DIGEST} has no file name"),
        ({"config": {"mediaType": "x", "digest": "sha256:../../x", "size": 1}}, "'sha256:../../x' is not a digest of the form"),
        ({"config": {"mediaType": "x", "digest": DIGEST, "size": -1}}, "a descriptor without a valid size or media type"),
        (
            {"config": {"mediaType": "x", "digest": DIGEST.upper(), "size": 1}},
            f"'{DIGEST.upper()}' is not a digest of the form",
        ),
        ({"config": {"mediaType": "x", "digest": DIGEST, "size": True}}, "a descriptor without a valid size or media type"),
        ({"config": {"digest": DIGEST, "size": 1}}, "a descriptor without a valid size or media type"),
    ],
)
def test_malformed_manifests_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError) as error:
        oci_manifest.parse(document(**change), "x")
    assert error.value.where == "x"
    assert error.value.what.startswith(words)


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"{" * 10_000, b" " * (5 << 20)])
def test_bytes_that_are_no_manifest_are_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        oci_manifest.parse(raw, "x")


def document(names: list[str] | None = None, **change: Any) -> bytes:
    layers = [
        {"mediaType": "x", "digest": DIGEST, "size": 1, "annotations": {oci_manifest.TITLE: name}} for name in names or []
    ]
    config = {"mediaType": "x", "digest": DIGEST, "size": 1}
    return json.dumps({"schemaVersion": 2, "config": config, "layers": layers, **change}).encode()


# ---- which files of a folder


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter_model.bin", b"x", "a pickle can run code"),
        ("adapter2.safetensors", b"\x80\x02}q\x00....", "named like a safetensors file, but is not one"),
        ("model.gguf", b"PK\x03\x04", "named like a GGUF file, but is not one"),
        ("notes.json", b"\x80\x04\x95", "a pickle or an archive under another name"),
        ("aux.json", b"{}", "cannot be written safely everywhere"),
    ],
)
def test_refused_files(make: Make, name: str, content: bytes, says: str) -> None:
    source = make()
    (source / name).write_bytes(content)
    with pytest.raises(RefusedError) as caught:
        package_files.listing(source)
    assert name in str(caught.value)
    assert says in str(caught.value)


def test_links_are_refused_and_dotfiles_skipped_by_name(make: Make) -> None:
    source = make()
    (source / ".git").mkdir()
    (source / ".git" / "x.py").write_text("")
    (source / "sub").mkdir()
    (source / "sub" / "more.json").write_text("{}")
    (source / "sub" / ".hidden").write_text("")
    listing = package_files.listing(source)
    assert listing.skipped == (".git", "sub/.hidden")
    assert "sub/more.json" in listing.files
    (source / "link.json").symlink_to("/etc/passwd")
    with pytest.raises(RefusedError, match=r"link.json: a symbolic link"):
        package_files.listing(source)
