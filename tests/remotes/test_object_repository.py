"""Adapters in object stores, as their users and other programs have them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.registry import Registry
from adapterhub.remotes.adapter_folders import AdapterFolder, download
from adapterhub.remotes.local_name import LocalName
from adapterhub.remotes.objects.object_address import ObjectAddress
from adapterhub.remotes.objects.object_repository import SINGLE_WRITER, ObjectRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub.store.store import FOLDER
from adapterhub_converters.errors import ConflictError, IntegrityError, NotFoundError, RefusedError, UsageError
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.object_stores import Server, rclone_program
from tests.support.registry import listed

pytestmark = pytest.mark.peer
NAME = "team/sql"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sql")


def place(server: Server | Path, bucket: str = "", name: str = NAME, **options: object) -> ObjectRepository:
    """A name in a bucket of a server, or in a folder."""
    if isinstance(server, Path):
        return ObjectRepository(ObjectAddress.parse(f"file://{server}/{name}"), {}, pauses=(), **options)  # type: ignore[arg-type]
    address = ObjectAddress.parse(f"s3://{bucket}/deep/down/{name}")
    return ObjectRepository(address, server.environ, pauses=(), **{"retries": 0, **options})  # type: ignore[arg-type]


@contextmanager
def expecting(server: Server | Path, bucket: str, digest: str) -> Iterator[ObjectRepository]:
    with place(server, bucket) as url:
        url.expect(digest)
        yield url


# ---- addresses


# ---- versions


def test_versions_are_numbered_and_found_as_in_a_registry(moto: Server, tmp_path: Path) -> None:
    bucket, manifests = moto.bucket(), []
    for seed, tag in enumerate(("1.0.0", "1.2.0", "prod")):
        with place(moto, bucket) as to:
            manifests.append(copy_version(AdapterFolder(write_adapter(tmp_path / str(seed), seed)), "latest", to, tag).manifest)
    with place(moto, bucket) as url:
        digests = [url.manifest(reference).digest for reference in ("v1", "v2", "v3")]
        assert digests == [manifest.digest for manifest in manifests]
        assert url.manifest("latest").digest == manifests[2].digest
        assert url.manifest("^1.0").digest == manifests[1].digest
        assert url.manifest("1.0").digest == manifests[0].digest
        assert url.manifest(manifests[1].digest[:15]).digest == manifests[1].digest
        assert url.tags() == ["1.0.0", "1.2.0", "latest", "prod", "v1", "v2", "v3"]
        with pytest.raises(NotFoundError):
            url.manifest("v4")
    with place(moto, bucket, "team/other") as other_name, pytest.raises(NotFoundError):
        other_name.manifest(manifests[0].digest)  # there is such a blob, but no such version of this name


def test_a_version_cannot_be_pushed_to_a_number_a_range_or_a_digest(moto: Server, adapter: Path) -> None:
    for reference in (":v3", ":^1.2", "@sha256:abcd"):
        with place(moto, moto.bucket(), NAME + reference) as to, pytest.raises(UsageError, match="assigns the number"):
            copy_version(AdapterFolder(adapter), "latest", to, to.address.reference)


def test_the_same_content_again_writes_nothing(moto: Server, adapter: Path) -> None:
    bucket = moto.bucket()
    for _ in range(2):
        with place(moto, bucket) as to:
            copied = copy_version(AdapterFolder(adapter), "latest", to, "prod")
    assert copied.sent == 0
    with place(moto, bucket) as url, pytest.raises(NotFoundError):
        url.manifest("v2")


def test_expect_compares_and_moves_at_once(moto: Server, tmp_path: Path) -> None:
    bucket = moto.bucket()
    first_folder, second_folder = (AdapterFolder(write_adapter(tmp_path / str(seed), seed)) for seed in range(2))
    first = first_folder.manifest("latest").digest
    with expecting(moto, bucket, ABSENT) as to:
        copy_version(first_folder, "latest", to, "prod")
    with expecting(moto, bucket, ABSENT) as to, pytest.raises(ConflictError, match=first):
        copy_version(second_folder, "latest", to, "prod")
    with expecting(moto, bucket, first[:20]) as to:
        copy_version(second_folder, "latest", to, "prod")
    with expecting(moto, bucket, first) as to, pytest.raises(ConflictError):
        copy_version(first_folder, "latest", to, "prod")


# ---- what the store can


def test_a_server_that_sends_all_for_a_range_is_read_from_anywhere(rclone: Server, adapter: Path) -> None:
    source, bucket = AdapterFolder(adapter), rclone.bucket()
    with place(rclone, bucket) as to:
        manifest = copy_version(source, "latest", to, "prod").manifest
        for blob in manifest.layers:
            with to.open_blob(blob, 3) as reader:
                buffer = bytearray(blob.size)
                at = 0
                while count := reader.readinto(memoryview(buffer)[at:]):
                    at += count
                assert at == blob.size - 3
            with source.open_blob(blob, 3) as file:
                assert file.readinto(whole := bytearray(blob.size)) == blob.size - 3
            assert whole == buffer


# ---- the same layout


def test_a_store_copied_down_is_a_registry_and_up_again_a_store(moto: Server, tmp_path: Path, adapter: Path) -> None:
    bucket, root = moto.bucket(), tmp_path / "reg"
    with place(moto, bucket) as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        copy_version(AdapterFolder(write_adapter(tmp_path / "more", 1)), "latest", to, "test")
    synced(moto, f"there:{bucket}/deep/down", str(root / FOLDER))
    with Registry.open(root) as registry:
        assert not [finding for finding in fsck(registry) if finding.severity == "error"]
        assert registry.resolve(Ref.parse("team/sql:prod")).digest == oci_manifest.build(adapter).digest
        registry.tag(Ref.parse("team/sql:v1"), "again")
        registry.protect(Ref.parse("team/sql:again"))
        version = registry.push(write_adapter(tmp_path / "third", 2), Ref.parse("team/sql"))
    synced(moto, str(root / FOLDER), f"there:{bucket}/deep/down")
    with place(moto, bucket) as url:
        assert (url.manifest("v3").digest, url.manifest("again").digest) == (
            version.digest,
            oci_manifest.build(adapter).digest,
        )
        with pytest.raises(RefusedError, match="protected"):
            copy_version(AdapterFolder(tmp_path / "third"), "latest", url, "again")
        with Registry.open(root) as registry:
            registry.protect(Ref.parse("team/sql:again"), on=False)
            registry.rm(Ref.parse("team/sql"))
        synced(moto, str(root / FOLDER), f"there:{bucket}/deep/down")
        with pytest.raises(NotFoundError, match="removed"):
            url.tags()
        with pytest.raises(ConflictError, match="this name was removed"):
            copy_version(AdapterFolder(adapter), "latest", url, "prod")


def synced(server: Server, source: str, target: str) -> None:
    """What rclone makes of it."""
    environ = server.environ
    remote = {
        "RCLONE_CONFIG_THERE_TYPE": "s3",
        "RCLONE_CONFIG_THERE_PROVIDER": "Other",
        "RCLONE_CONFIG_THERE_ENDPOINT": server.url,
        "RCLONE_CONFIG_THERE_ACCESS_KEY_ID": environ["AWS_ACCESS_KEY_ID"],
        "RCLONE_CONFIG_THERE_SECRET_ACCESS_KEY": environ["AWS_SECRET_ACCESS_KEY"],
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run([rclone_program(), "--config", "", "copy", source, target], check=True, env=remote, capture_output=True)


def test_a_folder_is_a_registry_under_its_name(tmp_path: Path, adapter: Path) -> None:
    with place(tmp_path / "store") as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
    (tmp_path / "reg").mkdir()
    (tmp_path / "store").rename(tmp_path / "reg" / FOLDER)
    with Registry.open(tmp_path / "reg") as registry:
        assert [finding for finding in fsck(registry) if finding.severity == "error"] == []
        assert registry.resolve(Ref.parse("team/sql:prod")).digest == oci_manifest.build(adapter).digest
    with place(tmp_path / "reg" / FOLDER) as live:
        assert live.manifest("prod").digest == oci_manifest.build(adapter).digest
        with pytest.raises(RefusedError, match="store of a local registry"):
            copy_version(AdapterFolder(adapter), "latest", live, "test")


def test_a_missing_folder_is_not_found_and_not_made(tmp_path: Path) -> None:
    with place(tmp_path / "store") as url, pytest.raises(NotFoundError, match="no such folder"):
        url.tags()
    assert not (tmp_path / "store").exists()


# ---- the command line


def test_push_list_pull_and_copy_speak_to_a_bucket(moto: Server, adapter: Path, tmp_path: Path, run: Run) -> None:
    address, env = f"s3://{moto.bucket()}/adapters/team/sql", moto.environ
    pushed = json.loads(run("push", "sql", f"{address}:prod", "--json", env=env).stdout)
    assert pushed["digest"] == oci_manifest.build(adapter).digest
    assert run("push", "sql", f"{address}:prod", "--expect", "absent", env=env, code=7).stdout == ""
    assert run("push", "sql", f"{address}:prod", "--expect", pushed["digest"], env=env).stdout.startswith("already there: ")
    assert listed(run("list", address, env=env).stdout) == [f"{address}:v1"]
    run("pull", f"{address}:v1", "-o", "out", env=env)
    assert (tmp_path / "out/README.md").read_bytes() == (adapter / "README.md").read_bytes()
    run("init")
    run("copy", address, "team/sql", env=env)
    assert run("fsck").stdout.strip().endswith("clean")
    (blob,) = (path for path in (tmp_path / FOLDER / "blobs/sha256").iterdir() if path.read_bytes() == b"# A test\n")
    blob.chmod(0o644)
    blob.write_bytes(b"# A tesT\n")
    run("fsck", "--repair", "--from", address, env=env)
    run("copy", "team/sql:v1", f"file://{tmp_path}/store/team/sql:prod")
    assert json.loads(run("list", f"file://{tmp_path}/store/team/sql", "--json").stdout)["tags"] == ["latest", "prod", "v1"]


def test_a_push_warns_once_that_only_one_writer_is_supported(rclone: Server, adapter: Path, run: Run) -> None:
    result = run("push", "sql", f"s3://{rclone.bucket()}/team/sql", env=rclone.environ)
    assert result.stderr.count(SINGLE_WRITER) == 1


# ---- beside each other


def test_an_adapter_goes_from_bucket_to_folder_and_into_the_registry(moto: Server, adapter: Path, tmp_path: Path) -> None:
    digest = oci_manifest.build(adapter).digest
    with place(moto, moto.bucket()) as url, place(tmp_path / "store") as two, Registry.init(tmp_path / "reg") as registry:
        copy_version(AdapterFolder(adapter), "latest", url, "prod")
        copy_version(url, "prod", two, "prod")
        with LocalName(registry, NAME).lease_for_push() as local:
            copy_version(two, "prod", local, "prod")
        assert {two.manifest("v1").digest, local.manifest("v1").digest} == {digest}
        download(two, "prod", tmp_path / "out")
    assert (tmp_path / "out/README.md").read_bytes() == (adapter / "README.md").read_bytes()


def test_verify_reads_again_what_was_put(moto: Server, adapter: Path) -> None:
    with place(moto, moto.bucket(), verify=True) as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        put_object = to._bucket.put_object
        to._bucket.put_object = lambda key, data: put_object(key, bytes(len(data)))  # type: ignore[method-assign]
        blob = AdapterFolder(write_adapter(adapter.parent / "more", 1)).manifest("latest").layers[0]
        with pytest.raises(IntegrityError, match="other bytes than were sent"):
            to.put_blob(blob, AdapterFolder(adapter.parent / "more"))
