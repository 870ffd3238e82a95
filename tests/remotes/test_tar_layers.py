"""Artifacts of ModelPack and ModelKits of KitOps, whose layers are tars: read as the adapter in them, or refused by name."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

from adapterhub.digest import sha256_bytes
from tests.conftest import Run
from tests.support.adapters import Make


def in_two_parts(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The packer that packs the first bytes apart, as programs do that pack in parallel."""
    return lambda data: pack(data[:700]) + pack(data[700:])


PACKERS: Mapping[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar+gzip": in_two_parts(gzip.compress),
    "tar+zstd": in_two_parts(zstandard.ZstdCompressor(write_content_size=False).compress),
}
Layers = list[tuple[str, bytes, dict[str, str]]]


def tar(files: Mapping[str, bytes], change: Callable[[tarfile.TarInfo], object] = lambda _: None) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def layout(folder: Path, layers: Layers, kind: str = "cncf.model", config: bytes = b"{}") -> None:
    """An image layout with one artifact, `team/sql:v1`."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put_blob(data: bytes, media_type: str, **fields: Any) -> dict[str, Any]:
        (blobs / sha256_bytes(data)[7:]).write_bytes(data)
        return {"mediaType": media_type, "digest": sha256_bytes(data), "size": len(data), **fields}

    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put_blob(config, f"application/vnd.{kind}.config.v1+json"),
        "layers": [
            put_blob(data, media_type, **({"annotations": names} if names else {})) for media_type, data, names in layers
        ],
    }
    media_type = "application/vnd.oci.image.manifest.v1+json"
    names = {"org.opencontainers.image.ref.name": "team/sql:v1"}
    entry = put_blob(json.dumps(manifest).encode(), media_type, annotations=names)
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("packing", PACKERS)
def test_an_artifact_of_modelpack_with_tars_is_the_adapter_in_them(run: Run, make: Make, tmp_path: Path, packing: str) -> None:
    files, kind = contents(make("sql")), "application/vnd.cncf.model"
    pack, weights = PACKERS[packing], files.pop("adapter_model.safetensors")
    card = files.pop("README.md")
    layout(
        tmp_path / "layout",
        [
            (
                f"{kind}.weight.v1.{packing}",
                pack(tar({"adapter_model.safetensors": weights})),
                {"org.cncf.model.filepath": "x"},
            ),
            (f"{kind}.weight.config.v1.{packing}", pack(tar(files)), {}),
            (f"{kind}.doc.v1.raw", card, {"org.cncf.model.filepath": "README.md"}),
        ],
    )
    run("pull", "layout://layout:team/sql:v1", "-o", "out")
    assert contents(tmp_path / "out").items() >= {**files, "README.md": card, "adapter_model.safetensors": weights}.items()
    run("copy", "layout://layout:team/sql:v1", "team/sql")
    assert (
        json.loads(run("show", "team/sql", "--json").stdout)["digest"]
        == json.loads(run("push", "out", "team/other", "--json").stdout)["digest"]
    )


def test_a_modelkit_of_kitops_is_the_adapter_in_its_folder(run: Run, make: Make, tmp_path: Path) -> None:
    files, kind = contents(make("sql")), "application/vnd.kitops.modelkit"
    model = {f"adapter/{name}": data for name, data in files.items()}
    layers: Layers = [
        (f"{kind}.model.v1.tar+gzip", gzip.compress(tar(model)), {}),
        (f"{kind}.dataset.v1.tar", tar({"data/train.jsonl": b"{}\n"}), {}),
    ]
    layout(tmp_path / "layout", layers, "kitops.modelkit", b'{"manifestVersion": "1.0.0"}')
    result = run("pull", "layout://layout:team/sql:v1", "-o", "out")
    assert contents(tmp_path / "out").items() >= files.items()
    assert "left out: data/train.jsonl" in result.stderr


def test_the_digest_of_such_an_artifact_is_the_one_that_the_remote_has(run: Run, make: Make, tmp_path: Path) -> None:
    files = contents(make("sql"))
    layout(tmp_path / "layout", [("application/vnd.cncf.model.weight.v1.tar", tar(files), {})])
    digest = json.loads((tmp_path / "layout" / "index.json").read_text())["manifests"][0]["digest"]
    address = "layout://layout:team/sql:v1"
    assert json.loads(run("pull", address, "-o", "out", "--lock", "--json").stdout)["digest"] == digest
    assert json.loads(run("pull", address, "-o", "out", "--json").stdout)["new"] is False
    assert digest in (tmp_path / "adapters.lock").read_text()
    run("pull", "--locked", "-o", "locked")
    run("pull", f"layout://layout@{digest}", "-o", "pinned")
    assert contents(tmp_path / "pinned") == contents(tmp_path / "out")


def linked(info: tarfile.TarInfo) -> None:
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


FILES = {"adapter_config.json": b"{}"}
CONFIG = {"a/adapter_config.json": b"{}"}
TAR = "application/vnd.cncf.model.weight.v1.tar"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([(TAR, tar({"../../evil": b"x"}), {})], "leads out of the archive"),
        ([(TAR, tar({"/etc/evil": b"x"}), {})], "leads out of the archive"),
        ([(TAR, tar({"evil": b""}, linked), {})], "is a link, not a plain file"),
        ([(TAR, tar(FILES)[:700], {})], "truncated"),
        ([(TAR, b"no tar", {})], "not a tar"),
        ([(f"{TAR}+gzip", tar(FILES), {})], "its layer is not gzip, or is damaged"),
        ([(f"{TAR}+gzip", gzip.compress(tar(FILES))[:-30], {})], "its layer is not gzip, or is damaged"),
        ([(f"{TAR}+zstd", gzip.compress(tar(FILES)), {})], "its layer is not zstd, or is damaged"),
        ([(f"{TAR}+gzip", gzip.compress(bytes(8 << 20)), {})], "grows to over"),
        ([(f"{TAR}+zstd", zstandard.compress(bytes(8 << 20)), {})], "grows to over"),
        ([(f"{TAR}+gzip", gzip.compress(tar({f"{n}.txt": bytes(900 << 10)})), {}) for n in range(9)], "grows to over"),
        ([(TAR, tar(FILES), {}), (TAR, tar({"adapter_config.json": b"{ }"}), {})], "different files 'adapter_config.json'"),
        ([(TAR, tar({**CONFIG, "b/adapter_config.json": b"{}"}), {})], "has 2 adapters"),
        ([(TAR, tar({"adapter_model.bin": b"\x80\x02"}), {})], "pickle"),
    ],
)
def test_a_hostile_or_damaged_tar_is_refused_by_name_and_writes_nothing(
    run: Run, tmp_path: Path, layers: Layers, words: str
) -> None:
    layout(tmp_path / "layout", layers)
    before = {*tmp_path.rglob("*")}
    result = run("pull", "layout://layout:team/sql:v1", "-o", "out", code=None)
    assert result.returncode in (4, 6)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert {*tmp_path.rglob("*")} - before == set()


def raw_layers(files: Mapping[str, bytes], folder: str) -> Layers:
    kind = "application/vnd.cncf.model.weight.v1.raw"
    return [(kind, data, {"org.cncf.model.filepath": f"{folder}/{name}"}) for name, data in files.items()]


def test_raw_files_in_a_folder_are_the_adapter_in_it(run: Run, make: Make, tmp_path: Path) -> None:
    files = contents(make("sql"))
    layout(tmp_path / "layout", raw_layers(files, "sub"))
    run("pull", "layout://layout:team/sql:v1", "-o", "out")
    assert contents(tmp_path / "out").items() >= files.items()
    run("copy", "layout://layout:team/sql:v1", "team/sql")


def test_no_error_names_a_temporary_folder(run: Run, make: Make, tmp_path: Path) -> None:
    files = contents(make("sql"))
    files["adapter_config.json"] = b'{"peft_type": "LORA"'
    layout(tmp_path / "layout", raw_layers(files, "sub"))
    layout(tmp_path / "nested", raw_layers({"config.json": b"{}"}, "sub"))
    for place in ("layout", "nested"):
        address = f"layout://{place}:team/sql:v1"
        for words in (("pull", address, "-o", "out"), ("copy", address, "team/sql"), ("validate", address)):
            result = run(*words, code=None)
            assert result.returncode
            assert f"layout://{place}" in result.stderr + result.stdout
            assert not any(part in result.stderr + result.stdout for part in (".partial-", "/adapterhub-"))
