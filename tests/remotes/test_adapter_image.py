"""`push --to image`: images that image tools take, and that come back as the adapter that went in."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.oci.adapter_image import AdapterImage, UnpackedSource
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, RefusedError
from tests.conftest import Run, need_program
from tests.remotes.test_oci_peers import call, contents
from tests.remotes.test_protocol import read
from tests.support.bills import declared
from tests.support.registry import listed

Make = Callable[..., Path]


@pytest.fixture
def source(make: Make) -> Path:
    folder = make("sql")
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/more.json").write_text("{}")
    (folder / ("long-" * 30 + "é.md")).write_text("beyond ustar\n")
    (folder / "same.md").write_text("# A test\n")  # the bytes of README.md
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def layer_of(root: Path, name: str = "v1") -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Manifest, config and layer of an image in a layout."""
    entries = json.loads((root / "index.json").read_bytes())["manifests"]
    entry = next(entry for entry in entries if entry["annotations"]["org.opencontainers.image.ref.name"] == name)

    def blob(descriptor: dict[str, Any]) -> bytes:
        return (root / "blobs/sha256" / descriptor["digest"][7:]).read_bytes()

    document = json.loads(blob(entry))
    return document, json.loads(blob(document["config"])), blob(document["layers"][0])


def test_an_image_is_one_plain_layer_with_the_files_below_models(source: Path, run: Run, tmp_path: Path) -> None:
    document = json.loads(run("push", source, "oci:x:v1", "--to", "image", "--json").stdout)
    manifest, config, layer = layer_of(tmp_path / "x")
    assert [entry["mediaType"] for entry in manifest["layers"]] == ["application/vnd.oci.image.layer.v1.tar"]
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert config["rootfs"] == {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}
    assert (config["os"], config["architecture"], "created" in config) == ("linux", "amd64", False)
    assert manifest["annotations"]["io.adapterhub.digest"] == oci_manifest.build(source).digest
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        members = tar.getmembers()
        files = {member.name: tar.extractfile(member).read() for member in members if member.isreg()}  # type: ignore[union-attr]
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, 0, "", "")}
    assert {member.mode for member in members if member.isdir()} == {0o755}
    assert {member.mode for member in members if member.isreg()} == {0o644}
    expected = {f"models/{path}": data for path, data in files_below(source).items()}
    assert expected.items() <= files.items()
    assert set(files) - set(expected) == {"models/adapter.json"}
    again = json.loads(run("push", source, "oci-archive:y.tar:other", "--to", "image", "--json").stdout)
    assert again["digest"] == document["digest"]


def test_the_page_of_a_package_shows_what_is_recorded(make: Make, run: Run, tmp_path: Path) -> None:
    run("describe", folder := make("sql"))
    declared(folder, name="sql", license="apache-2.0", description="Text to SQL.", download_location="https://example.org/sql")
    digest = oci_manifest.build(folder).digest
    run("push", folder, "oci:x:v1", "--to", "image")
    image, config, _ = layer_of(tmp_path / "x")
    page = {
        "org.opencontainers.image.title": "sql",
        "org.opencontainers.image.description": "Text to SQL.",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.vendor": "Example Organization",
        "org.opencontainers.image.url": "https://example.org/sql",
    }
    for facts in (image["annotations"], config["config"]["Labels"]):
        assert {key: value for key, value in facts.items() if key.startswith("org.opencontainers.image.")} == page
    run("push", folder, "oci:plain:v1")
    plain = json.loads((tmp_path / "plain/blobs/sha256" / digest[7:]).read_bytes())
    assert [key for key in plain["annotations"] if not key.startswith("io.adapterhub.")] == []


@pytest.mark.parametrize("source_kind", ["folder", "ref", "address"])
def test_what_went_in_comes_out_with_its_digest(source: Path, run: Run, tmp_path: Path, source_kind: str) -> None:
    digest = oci_manifest.build(source).digest
    run("init", ".")
    run("push", source, "team/sql")
    run("push", source, "layout://plain:v1")
    run("push", {"folder": "sql", "ref": "team/sql", "address": "layout://plain:v1"}[source_kind], "oci:x:v1", "--to", "image")
    pulled = json.loads(run("pull", "oci:x:v1", "-o", "out", "--json").stdout)
    assert pulled["digest"] == digest == oci_manifest.build(tmp_path / "out").digest
    assert files_below(source).items() <= files_below(tmp_path / "out").items()
    assert json.loads(run("copy", "oci:x:v1", "team/back", "--json").stdout)["digest"] == digest
    assert run("validate", "oci:x:v1").stdout.endswith("ok: nothing to report\n")
    image = json.loads((tmp_path / "x/index.json").read_bytes())["manifests"][0]["digest"]
    assert json.loads(run("copy", "oci:x:v1", "oci-archive:y.tar:v1", "--json").stdout)["digest"] == image  # as it is


def test_every_blob_of_an_image_is_read_from_anywhere(source: Path) -> None:
    image = AdapterImage(AdapterFolder(source), "latest")
    layer = image.image_manifest.layers[0]
    whole = read(image, layer)
    assert "sha256:" + hashlib.sha256(whole).hexdigest() == layer.digest
    for start in [*range(0, layer.size, 701), layer.size - 1, layer.size]:
        assert read(image, layer, start) == whole[start:]
    inside = UnpackedSource(image)
    manifest = inside.manifest("latest")
    for blob in (*manifest.layers, manifest.config):
        data = read(inside, blob)
        assert "sha256:" + hashlib.sha256(data).hexdigest() == blob.digest
        assert read(inside, blob, blob.size // 2) == data[blob.size // 2 :]


def test_bytes_that_changed_since_they_were_listed_make_no_image(source: Path) -> None:
    folder = AdapterFolder(source)
    (source / "deep/er/more.json").write_text("[]")
    with pytest.raises(IntegrityError) as error:
        AdapterImage(folder, "latest")
    assert error.value.where == f"{source}: deep/er/more.json"
    assert error.value.what.startswith("2 bytes of sha256:4f53cda18c2b")
    assert " were read instead of 2 of sha256:" in error.value.what
    assert (error.value.code, error.value.hint) == ("source-damaged", "Nothing was sent")


def test_it_goes_elsewhere_only_and_converts_nothing(source: Path, run: Run) -> None:
    run("init", ".")
    assert run("push", source, "team/sql", "--to", "image", code=2).stderr.endswith("[image-here]\n")
    result = run("push", source, "oci:x:v1", "--to", "image", "--allow-approx", code=2)
    assert "does not convert the adapter" in result.stderr
    run("push", source, "team/sql")
    assert "'image' is not one of" in run("pull", "team/sql", "--to", "image", code=2).stderr


def rewritten(root: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> UnpackedSource:
    """The image in a layout with another manifest and config, under digests that are right."""
    manifest, config, _ = layer_of(root)
    change(manifest, config)
    raw = json.dumps(config).encode()
    manifest["config"].update(digest="sha256:" + hashlib.sha256(raw).hexdigest(), size=len(raw))
    (root / "blobs/sha256" / manifest["config"]["digest"][7:]).write_bytes(raw)
    text = json.dumps(manifest).encode()
    layout = LayoutFolder(root)
    layout.put_document(text, "sha256:" + hashlib.sha256(text).hexdigest(), "changed")
    return UnpackedSource(layout)


LIES: dict[str, tuple[Callable[[Any, Any], Any], type[AdapterhubError], str]] = {
    "of somebody else": (lambda manifest, _: manifest["annotations"].clear(), RefusedError, "that adapterhub did not make"),
    "without labels": (lambda _, config: config["config"].clear(), FormatError, "do not contain the packaged manifest"),
    "a list for a config": (
        lambda _, config: config.update(config=[1]),
        FormatError,
        "do not contain the packaged manifest",
    ),
    "labels that are numbers": (
        lambda _, config: config["config"]["Labels"].update({"io.adapterhub.manifest": 3}),
        FormatError,
        "do not contain",
    ),
    "another manifest": (
        lambda manifest, _: manifest["annotations"].update({"io.adapterhub.digest": "sha256:" + "0" * 64}),
        IntegrityError,
        "that of sha256:0",
    ),
    "another config": (
        lambda _, config: config["config"]["Labels"].update({"io.adapterhub.config": "{}"}),
        IntegrityError,
        "another manifest or config",
    ),
    "a layer of another size": (lambda manifest, _: manifest["layers"][0].update(size=3), RefusedError, "is not the one"),
    "two layers": (
        lambda manifest, _: manifest["layers"].append({**manifest["layers"][0], "annotations": {}}),
        RefusedError,
        "is not the one",
    ),
    "a layer in zstd": (
        lambda manifest, _: manifest["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar+zstd"),
        RefusedError,
        "tar+zstd",
    ),
    "a path that leads out": (
        lambda _, config: config["config"]["Labels"].update(
            {
                "io.adapterhub.manifest": config["config"]["Labels"]["io.adapterhub.manifest"].replace(
                    '"org.opencontainers.image.title":"', '"org.opencontainers.image.title":"../'
                )
            }
        ),
        FormatError,
        "cannot be written safely",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_dishonest_image_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    with LayoutFolder(tmp_path / "x") as layout:
        copy_version(AdapterImage(AdapterFolder(source), "latest"), "latest", layout, "v1")
    change, error, message = LIES[name]
    with pytest.raises(error) as caught:
        rewritten(tmp_path / "x", change).manifest("changed")
    assert message in str(caught.value)
    assert (caught.value.code == "image-repacked") == (message in ("is not the one", "tar+zstd"))


def test_a_layer_with_other_bytes_is_not_accepted(source: Path, run: Run, tmp_path: Path) -> None:
    run("push", source, "oci:x:v1", "--to", "image")
    path = max((tmp_path / "x/blobs/sha256").iterdir(), key=lambda blob: blob.stat().st_size)
    data = bytearray(path.read_bytes())
    at = data.index(b"# A test")
    data[at] ^= 1
    path.write_bytes(data)
    run("pull", "oci:x:v1", "-o", "out", code=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.peer
def test_skopeo_takes_it_wherever_images_go_and_it_comes_back(source: Path, run: Run, host: str, tmp_path: Path) -> None:
    skopeo, digest = need_program("skopeo"), oci_manifest.build(source).digest
    pushed = json.loads(run("push", source, f"oci://{host}/images/sql:v1", "--to", "image", "--json").stdout)
    document = json.loads(call(skopeo, "inspect", "--tls-verify=false", f"docker://{host}/images/sql:v1"))
    assert (document["Digest"], document["Os"], document["Architecture"]) == (pushed["digest"], "linux", "amd64")
    image_address, copied = f"docker://{host}/images/sql:v1", f"docker://{host}/images/copy:v1"
    call(skopeo, "copy", "--src-tls-verify=false", image_address, "oci:a:v1", cwd=tmp_path)  # in gzip, as it does by default
    call(skopeo, "copy", "--src-tls-verify=false", "--preserve-digests", image_address, "oci-archive:b.tar:v1", cwd=tmp_path)
    call(skopeo, "copy", "--src-tls-verify=false", "--dest-tls-verify=false", image_address, copied, cwd=tmp_path)
    for n, place in enumerate(
        (f"oci://{host}/images/sql:v1", "oci:a:v1", "oci-archive:b.tar:v1", f"oci://{host}/images/copy:v1")
    ):
        assert json.loads(run("pull", place, "-o", f"out{n}", "--json").stdout)["digest"] == digest
        assert files_below(source).items() <= files_below(tmp_path / f"out{n}").items()
    assert listed(run("list", "oci-archive:b.tar").stdout) == ["oci-archive:b.tar:v1"]

    call(skopeo, "copy", "--src-tls-verify=false", image_address, "docker-archive:d.tar:images/sql:v1", cwd=tmp_path)
    with tarfile.open(tmp_path / "d.tar") as tar:
        (image,) = json.loads(tar.extractfile("manifest.json").read())  # type: ignore[union-attr]
        layer = tar.extractfile(image["Layers"][0])
        assert layer
        with tarfile.open(fileobj=layer) as inner:
            inner.extractall(tmp_path / "rootfs", filter="data")
    assert files_below(source).items() <= files_below(tmp_path / "rootfs/models").items()


@pytest.mark.peer
def test_umoci_unpacks_it(source: Path, run: Run, tmp_path: Path) -> None:
    umoci = need_program("umoci")
    run("push", source, "oci:x:v1", "--to", "image")
    subprocess.run([umoci, "unpack", "--rootless", "--image", "x:v1", "bundle"], cwd=tmp_path, check=True, capture_output=True)
    assert files_below(source).items() <= files_below(tmp_path / "bundle/rootfs/models").items()


@pytest.mark.peer
def test_an_image_of_another_tool_is_named_as_one(run: Run, host: str, tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(bytes(1024))
    (tmp_path / "config.json").write_text('{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}')
    kind = "application/vnd.oci.image.config.v1+json"
    call(
        need_program("oras"), "push", "--plain-http", f"{host}/images/other:v1", "--config", f"config.json:{kind}",
        "layer.tar:application/vnd.oci.image.layer.v1.tar", cwd=tmp_path,
    )  # fmt: skip
    error = run("pull", f"oci://{host}/images/other:v1", code=6).stderr
    assert "is a container image that adapterhub did not make. Extract its files, and push those" in error
    assert contents(tmp_path).keys() == {"layer.tar", "config.json"}
