"""Adapters by OCI: a manifest with the files of one becomes a version, or is refused in the words of a push."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import TITLE
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import commit_id
from adapterhub_converters.formats import convert
from tests.conftest import Run
from tests.converters import trained
from tests.hub.conftest import Running, serving
from tests.hub.oci.conftest import EMPTY, Answer, Registry, digest_of, image


@pytest.fixture
def registry(hub: Running) -> Registry:
    """The repository team/sql."""
    return Registry(hub.url, hub.token, "team/sql")


def sent(registry: Registry, folder: Path) -> dict[str, Any]:
    """The manifest of a folder as `oras push` makes it, its blobs sent."""
    registry.put_blob(b"{}")
    layers = [{**registry.put_blob(path.read_bytes()), "annotations": {TITLE: path.name}} for path in sorted(folder.iterdir())]
    return image(layers=layers, artifactType="application/vnd.unknown.artifact.v1")


def whole(registry: Registry, folder: Path) -> oci_manifest.Manifest:
    """The manifest that a push would make, its blobs sent."""
    manifest = oci_manifest.build(folder)
    from adapterhub.manifest import derive

    data = {layer.path: (folder / layer.path).read_bytes() for layer in manifest.layers if layer.path != "adapter.json"}
    _, data["adapter.json"] = derive.finalize(folder, {path: (digest_of(raw), len(raw)) for path, raw in data.items()})
    for raw in (*data.values(), manifest.config_bytes):
        registry.put_blob(raw)
    return manifest


def test_a_pushed_adapter_is_the_version_that_a_push_of_it_would_be(
    hub: Running, registry: Registry, adapter: Callable[..., Path]
) -> None:
    manifest = whole(registry, adapter(1))
    answer = registry.put(manifest.raw, "prod")
    assert (answer.status, answer.headers["adapterhub-version"], answer.headers["warning"]) == (201, "v1", None), answer.body
    with hub.registry() as opened:
        version = opened.resolve(Ref("team/sql", tag="prod"))
        assert (version.digest, version.number, version.tags) == (manifest.digest, 1, ("latest", "prod"))
        assert opened.row(Ref("team/sql")).base == "org/base"
    assert registry.ask("GET", "tags/list").json["tags"] == ["latest", "prod", "v1"]
    for reference in ("latest", "prod", "v1", manifest.digest):
        assert registry.ask("GET", f"manifests/{reference}").body == manifest.raw
    again = registry.put(manifest.raw, "stable")
    assert again.headers["adapterhub-version"] == "v1"
    assert registry.ask("GET", "manifests/stable").body == manifest.raw


def test_files_without_an_adapter_json_are_a_version_as_they_were_sent(
    hub: Running, registry: Registry, hf: Any, adapter: Callable[..., Path]
) -> None:
    raw = json.dumps(sent(registry, adapter(1))).encode()
    answer = registry.put(raw, "1.0.0")
    assert answer.headers["adapterhub-version"] == "v1"
    assert "no adapter.json" in answer.headers["warning"]
    assert registry.ask("GET", "manifests/1.0.0").body == raw
    assert sorted(hf.list_repo_files("team/sql")) == sorted(path.name for path in adapter(1).iterdir())
    # A commit to it by hf is an adapter with all that belongs to one.
    hf.upload_file(path_or_fileobj=b"# New\n", path_in_repo="README.md", repo_id="team/sql")
    assert "adapter.json" in hf.list_repo_files("team/sql")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("adapter_model.bin", b"\x80\x04\x95", "a pickle can run code"),
        ("notes.json", b"\x80\x04\x95", "a pickle or an archive under another name"),
        ("../up.json", b"{}", "cannot be written safely everywhere"),
        ("adapter_config.json", b"{}", "not an adapter of a known format"),
        ("adapter_model.safetensors", b"x" * 100, "adapter_model.safetensors"),
    ],
)
def test_what_no_push_would_take_is_refused_in_the_same_words(
    hub: Running, registry: Registry, adapter: Callable[..., Path], name: str, data: bytes, words: str
) -> None:
    document = sent(registry, adapter(1))
    layers = [layer for layer in document["layers"] if layer["annotations"][TITLE] != name]
    layers.append({**registry.put_blob(data), "annotations": {TITLE: name}})
    refused = registry.put({**document, "layers": layers}, "x")
    assert (refused.status, refused.code) == (400, "MANIFEST_INVALID")
    assert words in refused.words
    assert registry.ask("GET", "tags/list").status == 404


def test_an_adapter_json_of_other_files_is_refused(registry: Registry, adapter: Callable[..., Path]) -> None:
    document = json.loads(whole(registry, adapter(1)).raw)
    document["layers"] = [layer for layer in document["layers"] if layer["annotations"][TITLE] != "README.md"]
    assert "lists other files than the manifest" in registry.put(document, "x").words


def test_the_policy_of_the_hub_is_asked(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    with serving(tmp_path / "strict", policy=Policy(licenses=("mit",))) as hub:
        registry = Registry(hub.url, hub.token, "team/sql")
        refused = registry.put(whole(registry, adapter(1)).raw, "x")
        assert (refused.status, refused.code) == (400, "MANIFEST_INVALID")
        assert "license" in refused.words


def test_numbers_are_given_in_turn_and_stay(registry: Registry, adapter: Callable[..., Path]) -> None:
    first, second = whole(registry, adapter(1)), whole(registry, adapter(2))
    assert registry.put(first.raw, "v2").status == 409
    assert registry.put(first.raw, "v1").headers["adapterhub-version"] == "v1"
    assert registry.put(first.raw, "v1").status == 201
    refused = registry.put(second.raw, "v1")
    assert (refused.status, refused.code) == (409, "DENIED")
    assert "the next version is v2" in refused.words
    assert registry.put(second.raw, second.digest).headers["adapterhub-version"] == "v2"
    assert "this manifest is v1" in registry.put(first.raw, "v2").words
    assert registry.ask("GET", "manifests/latest").body == second.raw
    assert registry.put(first.raw, "latest").status == 201
    assert registry.ask("GET", "manifests/latest").body == first.raw


def test_a_version_cannot_be_removed_alone(registry: Registry, adapter: Callable[..., Path]) -> None:
    manifest = whole(registry, adapter(1))
    registry.put(manifest.raw, "prod")
    for reference in ("latest", "v1", manifest.digest):
        refused = registry.ask("DELETE", f"manifests/{reference}")
        assert (refused.status, refused.code) == (405, "UNSUPPORTED")
    assert registry.ask("DELETE", "manifests/prod").status == 202
    assert registry.ask("GET", "manifests/prod").status == 404


def test_a_deprecated_version_says_so(hub: Running, registry: Registry, adapter: Callable[..., Path]) -> None:
    registry.put(whole(registry, adapter(1)).raw, "prod")
    with hub.registry() as opened:
        opened.deprecate(Ref("team/sql", number=1), 'Worse than "v2"\n')
    assert registry.ask("GET", "manifests/prod").headers["warning"] == ('299 - "team/sql:prod is deprecated: Worse than  v2  "')


def test_an_attachment_is_never_a_version(registry: Registry, adapter: Callable[..., Path]) -> None:
    manifest = whole(registry, adapter(1))
    registry.put(manifest.raw, "prod")
    about = {"mediaType": oci_manifest.MANIFEST_TYPE, "digest": manifest.digest, "size": len(manifest.raw)}
    answer = registry.put({**sent(registry, adapter(2)), "subject": about})
    assert (answer.headers["oci-subject"], answer.headers["adapterhub-version"]) == (manifest.digest, "none")
    assert len(registry.ask("GET", f"referrers/{manifest.digest}").json["manifests"]) == 1


def test_a_gguf_adapter_is_a_version_and_a_gguf_model_is_not(registry: Registry, tmp_path: Path) -> None:
    registry.put_blob(b"{}")
    source = trained.folder(trained.full("q_proj"), tmp_path / "source")
    convert.convert(source, tmp_path / "sql.gguf", to="gguf", base=trained.LLAMA)
    raw = (tmp_path / "sql.gguf").read_bytes()
    # The same file but for what it says it is; the length of the text is before it.
    other_raw = raw.replace(b"\x07" + bytes(7) + b"adapter", b"\x07" + bytes(7) + b"anmodel", 1)
    assert other_raw != raw
    for data, number in ((other_raw, "none"), (raw, "v1")):
        layer = {**registry.put_blob(data), "annotations": {TITLE: "sql.gguf"}}
        answer = registry.put(image(layers=[layer]), "x")
        assert (answer.status, answer.headers["adapterhub-version"]) == (201, number), answer.body


def test_a_whole_model_is_kept_as_what_it_is(registry: Registry) -> None:
    registry.put_blob(b"{}")
    for name in ("model.gguf", "model.safetensors"):
        layer = {**registry.put_blob(name.encode()), "annotations": {TITLE: name}}
        answer = registry.put(image(layers=[layer], config=EMPTY), "model")
        assert (answer.status, answer.headers["adapterhub-version"]) == (201, "none")


def test_names_that_stand_for_others_are_not_written_to(hub: Running, adapter: Callable[..., Path]) -> None:
    for name in ("team/sql.v3", "team/sql.gguf", "team/sql.v3.mlx"):
        refused = Registry(hub.url, hub.token, name).ask("POST", "blobs/uploads/", b"")
        assert (refused.status, "is an alias for a version or a format of another repository" in refused.words) == (400, True)


def test_a_removed_name_is_not_taken_again(hub: Running, registry: Registry, adapter: Callable[..., Path]) -> None:
    registry.put(whole(registry, adapter(1)).raw, "x")
    with hub.registry() as opened:
        opened.rm(Ref("team/sql"))
    assert registry.ask("GET", "manifests/x").code == "NAME_UNKNOWN"
    assert "this name was removed" in registry.ask("POST", "blobs/uploads/", b"").words


def test_a_moved_repository_is_read_under_its_old_name(
    hub: Running, registry: Registry, hf: Any, adapter: Callable[..., Path]
) -> None:
    manifest = whole(registry, adapter(1))
    registry.put(manifest.raw, "prod")
    hf.move_repo("team/sql", "team/text2sql")
    assert registry.ask("GET", "manifests/prod").body == manifest.raw
    assert registry.ask("GET", f"blobs/{manifest.layers[0].digest}").status == 200
    assert "was moved to team/text2sql" in registry.ask("POST", "blobs/uploads/", b"").words


def test_branch_and_tag_of_one_name_are_at_one_version(
    hub: Running, registry: Registry, hf: Any, adapter: Callable[..., Path]
) -> None:
    registry.put(whole(registry, adapter(1)).raw, "prod")
    hf.create_branch("team/sql", branch="try")
    hf.upload_file(path_or_fileobj=b"# Try\n", path_in_repo="README.md", repo_id="team/sql", revision="try")
    second = whole(registry, adapter(2))
    registry.put(second.raw, "try")
    assert hf.model_info("team/sql", revision="try").sha == commit_id(second.digest)
    assert registry.ask("GET", "manifests/try").body == second.raw


def test_a_namespace_for_adapters_takes_nothing_else_but_what_is_about_them(
    hub: Running, registry: Registry, adapter: Callable[..., Path], run: Run
) -> None:
    run("--registry", hub.folder, "hub", "namespace", "set", "team", "--adapters-only")
    assert "adapters only" in run("--registry", hub.folder, "hub", "namespace", "list").stdout
    absent = {"mediaType": oci_manifest.MANIFEST_TYPE, "digest": digest_of(b"absent"), "size": 6}
    registry.put_blob(b"{}")
    for refused in (registry.put(image(), "image"), registry.put(image(subject=absent))):
        assert (refused.status, refused.code) == (400, "MANIFEST_INVALID")
        assert "the namespace team is for adapters only" in refused.words
    manifest = whole(registry, adapter(1))
    assert registry.put(manifest.raw, "prod").status == 201
    about = {"mediaType": oci_manifest.MANIFEST_TYPE, "digest": manifest.digest, "size": len(manifest.raw)}
    signature = registry.put_image(subject=about)
    registry.put_image("of-the-signature", subject={**about, "digest": signature})
    assert registry.put(image(subject={**about, "digest": manifest.config.digest})).status == 400
    Registry(hub.url, hub.token, "other/any").put_image("image")


def test_images_are_not_moved_to_a_namespace_for_adapters_and_what_is_about_an_adapter_is(
    hub: Running, registry: Registry, adapter: Callable[..., Path]
) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        accounts.set_namespace(database, Namespace("adapters", adapters_only=True))
    pictures = Registry(hub.url, hub.token, "free/picture")

    def moved(old: str, new: str) -> Answer:
        body = json.dumps({"fromRepo": old, "toRepo": new}).encode()
        return registry.ask("POST", "/api/repos/move", body, Content_Type="application/json")

    pictures.put_image("latest")
    refused = moved("free/picture", "adapters/picture")
    assert (refused.status, "the namespace adapters is for adapters only" in refused.json["error"]) == (400, True)
    assert moved("free/picture", "free/other").status == 200
    manifest = whole(registry, adapter(1))
    registry.put(manifest.raw, "prod")
    registry.put_image(subject={"mediaType": oci_manifest.MANIFEST_TYPE, "digest": manifest.digest, "size": len(manifest.raw)})
    assert moved("team/sql", "adapters/sql").status == 200
    listed = Registry(hub.url, hub.token, "adapters/sql").ask("GET", f"referrers/{manifest.digest}").json["manifests"]
    assert len(listed) == 1
