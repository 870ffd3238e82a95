"""adapter.json and OCI manifests that say something else than the bytes: refused on the way in, reported by checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.digest import sha256_bytes
from adapterhub.manifest import derive, oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.ref import Ref
from adapterhub.registry.moves import now
from adapterhub.registry.registry import Registry
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.store.store import Entry
from adapterhub_converters.errors import FormatError
from tests.conftest import Run
from tests.support.adapters import Make

LIES = {"r": 1, "targets": ["v_proj"]}
POLICY = "[policy]\nmax_rank = 1\n"


@pytest.fixture
def lying(make: Make, tmp_path: Path) -> Path:
    """A registry whose only version says r 1 of weights of rank 2, with every digest right."""
    folder = make("a")
    document = json.loads(derive.finalize(folder)[1])
    text = json.dumps({**document, **LIES}).encode()
    with Registry.init(tmp_path / "lying") as registry:
        files = {}
        for path in sorted(folder.iterdir()):
            with open(path, "rb", buffering=0) as file:
                files[path.name] = registry.store.put_stream(file)
        files["adapter.json"] = registry.store.put_bytes(text)
        (folder / "adapter.json").write_bytes(text)
        manifest = oci_manifest.assemble(files, AdapterManifest.parse(text.decode(), "x"))
        for raw in (manifest.config_bytes, manifest.raw):
            registry.store.put_bytes(raw)
        first = Entry("team/sql", 1, "push", now(), manifest.digest, len(manifest.raw), 1, ("latest",))
        registry.move("team/sql", lambda _: first)
        with LayoutFolder(tmp_path / "layout", str(tmp_path / "layout")) as layout:
            for name, (digest, size) in files.items():
                layout.put_blob(Descriptor("", digest, size, name), _local(registry))
            layout.put_blob(manifest.config, _local(registry))
            layout.put_manifest(manifest, "team/sql:v1")
    return tmp_path / "lying"


def _local(registry: Registry):  # type: ignore[no-untyped-def]
    from adapterhub.remotes.local_name import LocalName

    return LocalName(registry, "team/sql")


SAYS = '"r" is 1, but the weights have 2'


@pytest.mark.parametrize("policy", [False, True])
def test_a_version_that_contradicts_its_weights_is_not_pulled_or_copied(
    lying: Path, run: Run, tmp_path: Path, policy: bool
) -> None:
    if policy:
        (tmp_path / "adapterhub.toml").write_text(POLICY)
    run("init", "--registry", tmp_path / "mine")
    address = f"layout://{tmp_path / 'layout'}:team/sql:v1"
    for command in (("pull", address, "-o", "out"), ("copy", address, "team/sql", "--registry", "mine")):
        assert SAYS in run(*command, code=4).stderr
    assert not (tmp_path / "out").exists()
    with Registry.open(tmp_path / "mine") as registry:
        assert registry.list() == []
    assert SAYS in run("copy", "team/sql", f"layout://{tmp_path / 'other'}:v1", "--registry", lying, code=4).stderr


def test_the_policy_is_compared_with_the_weights(lying: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapterhub.toml").write_text(POLICY)
    assert SAYS in run("pull", "team/sql", "-o", "out", "--registry", lying, code=4).stderr
    assert not (tmp_path / "out").exists()


def test_checks_report_what_is_not_true_of_the_weights(lying: Path, run: Run, tmp_path: Path) -> None:
    for command in (("verify", "team/sql", "--registry", lying), ("verify", tmp_path / "a"), ("fsck", "--registry", lying)):
        result = run(*command, code=1)
        assert "error[wrong-facts]" in result.stdout
        assert SAYS in result.stdout


# ---- OCI manifests


def test_a_document_that_is_both_a_manifest_and_an_index_is_refused(make: Make) -> None:
    manifest = oci_manifest.build(make())
    document = json.loads(manifest.raw)
    for extra in ({"manifests": []}, {"manifests": [{"digest": manifest.digest}]}):
        for kind in ({}, {"mediaType": oci_manifest.MANIFEST_TYPE}):
            ambiguous = {key: value for key, value in document.items() if key != "mediaType"} | extra | kind
            with pytest.raises(FormatError, match="both an image manifest, with layers, and an image index"):
                oci_manifest.parse(json.dumps(ambiguous).encode(), "x")


def test_an_index_with_layers_is_refused(make: Make, run: Run, tmp_path: Path) -> None:
    run("push", make(), f"layout://{tmp_path / 'layout'}:v1")
    index = tmp_path / "layout/index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "layers": []}))
    assert "both an image index" in run("pull", f"layout://{tmp_path / 'layout'}:v1", code=4).stderr


@pytest.mark.parametrize("config", [{"config": [1]}, {"config": "x"}, {"config": {"Labels": [1]}}, {"config": None}, {}])
def test_an_image_with_a_config_of_other_types_is_one_line(make: Make, run: Run, tmp_path: Path, config: object) -> None:
    root = tmp_path / "x"
    run("push", make(), f"oci:{root}:v1", "--to", "image")
    index = json.loads((root / "index.json").read_text())
    entry = index["manifests"][0]
    document = json.loads((root / "blobs/sha256" / entry["digest"][7:]).read_bytes())
    for value, descriptor in ((config, document["config"]), (document, entry)):
        raw = json.dumps(value).encode()
        descriptor.update(digest=sha256_bytes(raw), size=len(raw))
        (root / "blobs/sha256" / descriptor["digest"][7:]).write_bytes(raw)
    (root / "index.json").write_text(json.dumps(index))
    result = run("pull", f"oci:{root}:v1", "-o", "out", code=4)
    assert "the labels of the image do not contain the packaged manifest" in result.stderr


def test_one_blob_under_thousands_of_names_is_refused(make: Make, tmp_path: Path, run: Run) -> None:
    document = json.loads(oci_manifest.build(make()).raw)
    weights = next(layer for layer in document["layers"] if layer["annotations"][oci_manifest.TITLE].endswith("README.md"))
    weights["size"] = 20_000
    copies = [{**weights, "annotations": {oci_manifest.TITLE: f"d/{n}.md"}} for n in range(9_000)]
    raw = json.dumps({**document, "layers": [*document["layers"], *copies]}).encode()
    with pytest.raises(FormatError, match="but only [0-9]+ bytes of different content"):
        oci_manifest.parse(raw, "x")
    folder = make("many")
    for n in range(40):
        (folder / f"{n}.md").write_bytes(bytes(100_000))
    result = run("push", folder, f"layout://{tmp_path / 'many.tar'}:v1", code=6)
    assert "bytes of different content. Remove the copies" in result.stderr


def test_a_few_copies_of_a_file_are_fine(make: Make) -> None:
    folder = make("few")
    for n in range(6):
        (folder / f"{n}.md").write_bytes(bytes(300_000))
    assert len(oci_manifest.parse(oci_manifest.build(folder).raw, "x").layers) == 10


def test_other_refs_still_resolve(lying: Path) -> None:
    with Registry.open(lying) as registry:
        assert registry.resolve(Ref.parse("team/sql")).number == 1
