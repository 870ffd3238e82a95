"""Adapters in object stores, as their users and other programs have them."""

from __future__ import annotations

import json
import subprocess
import sys
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
from adapterhub.remotes.remote_address import parse
from adapterhub.remotes.version_copy import copy_version
from adapterhub.store.store import FOLDER
from adapterhub_converters.errors import ConflictError, IntegrityError, NotFoundError, RefusedError, UsageError
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.forward_proxy import ForwardProxy
from tests.support.object_stores import SECRET, Server, rclone_program
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


@pytest.mark.parametrize(
    ("text", "store", "name", "reference"),
    [
        ("s3://bucket/team/sql", "s3://bucket", "team/sql", "latest"),
        ("s3://bucket/a/b/team/sql:prod", "s3://bucket/a/b", "team/sql", "prod"),
        ("S3://bucket/a/team/sql:v3", "s3://bucket/a", "team/sql", "v3"),
        ("gs://bucket/team/sql:^1.2", "gs://bucket", "team/sql", "^1.2"),
        ("az://box/team/sql@sha256:abcd", "az://box", "team/sql", "sha256:abcd"),
        ("file:///srv/a%20b:c/team/sql:prod", "file:///srv/a%20b%3Ac", "team/sql", "prod"),
    ],
)
def test_an_address_names_the_store_and_the_version(text: str, store: str, name: str, reference: str) -> None:
    found = ObjectAddress.parse(text)
    assert (found.store, found.ref.name, found.reference) == (store, name, reference)
    assert ObjectAddress.parse(str(found)) == found
    assert found.title == "sql"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/sql",
        "s3:///team/sql",
        "s3://b/team/sql",
        "s3://bucket//team/sql",
        "s3://bucket/../team/sql",
        "s3://bucket/a%2fb/team/sql",
        "s3://bucket/team/SQL",
        "s3://bucket/team/sql:a b",
        "s3://bucket/team/sql:prod@sha256:abcd",
        "s3://bucket/team/sql?x=1",
        "file://host/srv/team/sql",
        "file:///team/sql",
        "file:///srv/../etc/team/sql",
        "file:///srv/%2e%2e/etc/team/sql",
        "file:///srv/%00/team/sql",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse("s3://key:hunter2@bucket/team/sql")
    assert "hunter2" not in str(caught.value)


# ---- versions


def test_versions_are_numbered_and_found_as_in_a_registry(moto: Server, tmp_path: Path) -> None:
    bucket, made = moto.bucket(), []
    for seed, tag in enumerate(("1.0.0", "1.2.0", "prod")):
        with place(moto, bucket) as to:
            made.append(copy_version(AdapterFolder(write_adapter(tmp_path / str(seed), seed)), "latest", to, tag).manifest)
    with place(moto, bucket) as url:
        digests = [url.manifest(reference).digest for reference in ("v1", "v2", "v3")]
        assert digests == [one.digest for one in made]
        assert url.manifest("latest").digest == made[2].digest
        assert url.manifest("^1.0").digest == made[1].digest
        assert url.manifest("1.0").digest == made[0].digest
        assert url.manifest(made[1].digest[:15]).digest == made[1].digest
        assert url.tags() == ["1.0.0", "1.2.0", "latest", "prod", "v1", "v2", "v3"]
        with pytest.raises(NotFoundError):
            url.manifest("v4")
    with place(moto, bucket, "team/other") as other, pytest.raises(NotFoundError):
        other.manifest(made[0].digest)  # there is such a blob, but no such version of this name


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
    one, two = (AdapterFolder(write_adapter(tmp_path / str(seed), seed)) for seed in range(2))
    first = one.manifest("latest").digest
    with expecting(moto, bucket, ABSENT) as to:
        copy_version(one, "latest", to, "prod")
    with expecting(moto, bucket, ABSENT) as to, pytest.raises(ConflictError, match=first):
        copy_version(two, "latest", to, "prod")
    with expecting(moto, bucket, first[:20]) as to:
        copy_version(two, "latest", to, "prod")
    with expecting(moto, bucket, first) as to, pytest.raises(ConflictError):
        copy_version(one, "latest", to, "prod")


# ---- what the store can


def test_a_store_that_cannot_create_exclusively_is_written_with_a_warning(rclone: Server, adapter: Path) -> None:
    bucket = rclone.bucket()
    with place(rclone, bucket) as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to.notes == [SINGLE_WRITER]
        assert to.manifest("prod").digest == oci_manifest.build(adapter).digest
    with expecting(rclone, bucket, ABSENT) as to, pytest.raises(RefusedError, match="cannot compare"):
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
    assert rclone.folder is not None
    assert not (rclone.folder / bucket / "deep/down/capabilities.json").exists()


def test_what_was_proven_is_remembered_for_that_server_alone(moto: Server, adapter: Path, tmp_path: Path) -> None:
    bucket = moto.bucket()
    with place(moto, bucket) as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to.notes == []
        raw = to._bucket.read("capabilities.json", 1000)
        assert raw is not None
        assert json.loads(raw) == {"version": 1, "endpoint": moto.url, "exclusive": True}
        to._bucket.put_object("capabilities.json", raw.replace(moto.url.encode(), b"http://elsewhere"))
    with place(moto, bucket, "team/other") as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to._bucket.read("capabilities.json", 1000) == raw
    with place(tmp_path / "store") as to:  # asked anew each time: one folder may be on another disk tomorrow
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to.notes == []
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["blobs", "oci-layout", "refs", "tmp"]
    assert list((tmp_path / "store/tmp").iterdir()) == []


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


def test_wrong_credentials_are_reported_without_a_secret(rclone: Server, adapter: Path, run: Run) -> None:
    bucket, env = rclone.bucket(), {**rclone.environ, "AWS_SECRET_ACCESS_KEY": "wrong-" + SECRET}
    for words in (("push", "sql", f"s3://{bucket}/team/sql"), ("pull", f"s3://{bucket}/team/sql", "-o", "out")):
        result = run(*words, env=env, code=5)
        assert f"s3://{bucket}: the store refuses (403" in result.stderr
        assert "AWS_SECRET_ACCESS_KEY" in result.stderr
        assert not any(secret in result.stderr + result.stdout for secret in (SECRET, rclone.environ["AWS_ACCESS_KEY_ID"]))
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("server", ["moto", "rclone"])
def test_a_missing_bucket_is_reported_with_how_to_create_it(
    request: pytest.FixtureRequest, server: str, adapter: Path, run: Run
) -> None:
    env = request.getfixturevalue(server).environ
    for words in (("push", "sql", "s3://no-such/team/sql"), ("list", "s3://no-such/team/sql")):
        assert "aws s3 mb s3://no-such" in run(*words, env=env, code=3).stderr


@pytest.mark.parametrize(
    ("store", "env", "settings"),
    [
        ("s3://bucket", {}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL unless it is Amazon's"),
        ("s3://bucket", {"AWS_ACCESS_KEY_ID": "x"}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL unless"),
        ("az://box", {}, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_without_credentials_it_is_told_what_to_set(run: Run, store: str, env: dict[str, str], settings: str) -> None:
    env = {**env, "HTTP_PROXY": "http://127.0.0.1:9"}  # so that no cloud which this runs in has any
    error = run("list", f"{store}/team/sql", env=env, code=5).stderr
    assert error.startswith(f"error: {store}: credentials are missing. Set {settings}")
    assert error.endswith("  [access-denied]\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_on_this_machine_is_reached_without_the_proxy(run: Run, moto: Server, adapter: Path, host: str) -> None:
    with ForwardProxy() as proxy:
        url = f"http://{proxy.address}"
        env = {**moto.environ, "AWS_ENDPOINT_URL": moto.url.replace("127.0.0.1", host), "NO_PROXY": "", "no_proxy": ""}
        env |= dict.fromkeys(["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"], url)
        address = f"s3://{moto.bucket()}/team/sql"
        run("push", adapter, address, env=env)
        run("pull", address, "-o", "out", env=env)
        assert proxy.seen == []


def test_an_unreachable_server_is_reported(run: Run) -> None:
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    assert "127.0.0.1:9 does not answer" in run("list", "s3://bucket/team/sql", env=env, code=5).stderr


@pytest.mark.parametrize(
    ("address", "env", "said"),
    [
        ("s3://bucket/team/sql", {"AWS_ENDPOINT_URL": "http://example.invalid"},
         "http://example.invalid is plain HTTP, which is refused. Use https, or set AWS_ALLOW_HTTP=true"),
        ("s3://bucket/team/sql", {"AWS_ALLOW_HTTP": "perhaps"}, "settings in AWS_… cannot be used"),
        ("s3://bucket/team/sql", {"AWS_CA_BUNDLE": "nowhere.pem"}, "AWS_CA_BUNDLE names it"),
        ("az://box/team/sql", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": f"!{SECRET}"}, "AZURE_STORAGE"),
        ("gs://bucket/team/sql", {"GOOGLE_SERVICE_ACCOUNT_KEY": f"{{{SECRET}"}, "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)  # fmt: skip
def test_unusable_settings_are_reported_without_a_secret(address: str, env: dict[str, str], said: str, run: Run) -> None:
    env = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": SECRET, **env}
    result = run("list", address, env=env, code=None)
    assert result.returncode in (5, 8)
    assert said in result.stderr
    assert SECRET not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_obstore_one_line_explains_how_to_install_it(tmp_path: Path, run: Run) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text("import sys\nsys.modules['obstore'] = None\n")
    path = f"{tmp_path / 'without'}:{':'.join(sys.path)}"
    result = run("list", f"file://{tmp_path}/team/sql", env={"PYTHONPATH": path}, code=9)
    assert "pip install 'adapterhub[objectstore]'" in result.stderr


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
        put = to._bucket.put_object
        to._bucket.put_object = lambda key, data: put(key, bytes(len(data)))  # type: ignore[method-assign]
        blob = AdapterFolder(write_adapter(adapter.parent / "more", 1)).manifest("latest").layers[0]
        with pytest.raises(IntegrityError, match="other bytes than were sent"):
            to.put_blob(blob, AdapterFolder(adapter.parent / "more"))
