"""What every place for adapters keeps to. A new kind of place is one more parameter."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapterhub.maintenance import compress
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.registry.registry import Registry
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub.remotes.hub.hub_repository import HubRepository
from adapterhub.remotes.layouts.layout_archive import LayoutArchive
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.local_name import LocalName
from adapterhub.remotes.objects.object_address import ObjectAddress
from adapterhub.remotes.objects.object_repository import ObjectRepository
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.protocol import OpenRemote, PutResult, Reader, Source, Target
from adapterhub.remotes.version_copy import copy_version, distinct_blobs
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, IntegrityError, NotFoundError
from tests.hub.conftest import serving
from tests.support.adapters import write_adapter
from tests.support.registry import docker_config

Make = Callable[..., Path]
_names = itertools.count()

TARGETS = [
    "local",
    "packed",
    "layout",
    "archive",
    pytest.param("oci", marks=pytest.mark.peer),
    "our hub",
    "hf",
    "file",
    pytest.param("s3", marks=pytest.mark.peer),
]
NUMBERED = ["local", pytest.param("oci", marks=pytest.mark.peer), "our hub", "file", pytest.param("s3", marks=pytest.mark.peer)]
SOURCES = [*TARGETS, "folder"]


class Packed(LocalName):
    """One name of a registry whose owner packs after every version, however little that gains."""

    def put_manifest(self, manifest: Manifest, tag: str | None) -> PutResult:
        result = super().put_manifest(manifest, tag)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compress, "_MIN_SAVING", -(10**9))
            patch.setattr(compress, "_MAX_SHARE", 10**9)
            compress.pack(self.registry)
        assert all(
            not self.registry.store.blob_path(layer.digest).exists()
            for layer in manifest.layers
            if layer != manifest.adapter_json
        )
        return result


class Places:
    """Makes a new and empty place of a kind, and closes it in the end."""

    def __init__(self, request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> None:
        self._request, self._root, self._stack = request, tmp_path, stack

    def target(self, kind: str) -> Target:
        n = next(_names)
        if kind in ("local", "packed"):
            registry = self._stack.enter_context(Registry.init(self._root / f"registry-{n}"))
            place = (LocalName if kind == "local" else Packed)(registry, "team/sql")
            return self._stack.enter_context(place.lease_for_push())
        if kind == "layout":
            return self._stack.enter_context(LayoutFolder(self._root / f"layout-{n}"))
        if kind == "archive":
            return self._stack.enter_context(LayoutArchive(self._root / f"layout-{n}.tar"))
        if kind == "hf":
            hub = self._request.getfixturevalue("hub")
            address = HubAddress.parse(f"hf://contract/n{n}")
            return self._stack.enter_context(HubRepository(address, hub.url, pauses=()))
        if kind == "file":
            root = ObjectAddress.parse(f"file://{self._root}/store-{n}/team/sql")
            return self._stack.enter_context(ObjectRepository(root, {}, pauses=()))
        if kind == "s3":
            server = self._request.getfixturevalue("moto")
            bucket = ObjectAddress.parse(f"s3://{server.bucket()}/some/where/team/n{n}")
            return self._stack.enter_context(ObjectRepository(bucket, server.environ, pauses=()))
        if kind == "our hub":
            address, config = self._request.getfixturevalue("our_hub")
            return self._stack.enter_context(OciRepository(OciAddress.parse(f"{address}/contract/n{n}"), config, pauses=()))
        host = self._request.getfixturevalue("host")
        return self._stack.enter_context(OciRepository(OciAddress.parse(f"oci://{host}/contract/n{n}"), pauses=()))

    def source(self, kind: str, folder: Path) -> Source:
        if kind == "folder":
            return AdapterFolder(folder)
        place = self.target(kind)
        copy_version(AdapterFolder(folder), "latest", place, "latest")
        return place


@pytest.fixture(scope="module")
def our_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a hub of ours as an OCI registry, and docker's config with a login to it."""
    folder = tmp_path_factory.mktemp("our-hub")
    with serving(folder / "registry") as running:
        host = urlsplit(running.url).netloc
        yield f"oci+http://{host}", docker_config(folder / "docker", host, running.token)


@pytest.fixture
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Places]:
    with ExitStack() as stack:
        yield Places(request, tmp_path, stack)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sql")


class Bytes:
    """A source of one blob, for what no real one should hold."""

    location = "bytes"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.request_count = 0

    def manifest(self, reference: str) -> Manifest:
        raise NotFoundError(self.location, reference)

    @contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        self.request_count += 1
        yield io.BytesIO(self.data[start:])

    def tags(self) -> list[str]:
        return []

    def stop(self, *, on: bool = True) -> None:
        pass


def blob_of(data: bytes) -> Descriptor:
    return Descriptor("application/octet-stream", f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def read(source: Source, blob: Descriptor, start: int = 0) -> bytes:
    buffer, data = memoryview(bytearray(50)), b""
    with source.open_blob(blob, start) as reader:
        while n := reader.readinto(buffer):
            data += bytes(buffer[:n])
    return data


@pytest.mark.parametrize("kind", SOURCES)
def test_a_version_has_one_manifest_by_tag_and_by_digest(places: Places, adapter: Path, kind: str) -> None:
    source, expected = places.source(kind, adapter), oci_manifest.build(adapter)
    assert source.manifest("latest").raw == expected.raw
    assert source.manifest(expected.digest).raw == expected.raw


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_not_there_is_not_found(places: Places, adapter: Path, kind: str) -> None:
    source = places.source(kind, adapter)
    for reference in ("nothing", "sha256:" + "0" * 64):
        with pytest.raises(NotFoundError) as error:
            source.manifest(reference)
    if kind in ("layout", "archive"):
        assert error.value.what == "no manifest of this digest in the image layout"
    blob = blob_of(b"nothing")
    with pytest.raises(NotFoundError) as error:
        read(source, blob)
    if kind in ("layout", "archive"):
        assert error.value.what == f"no blob {blob.digest}"
    elif kind in ("folder", "hf"):
        assert error.value.what == f"no file with the digest {blob.digest}"


@pytest.mark.parametrize("kind", TARGETS)
def test_an_empty_place_has_no_version_and_no_tags(places: Places, kind: str) -> None:
    place = places.target(kind)
    with pytest.raises(NotFoundError):
        place.manifest("latest")
    with pytest.raises(NotFoundError):
        place.tags()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_blob_is_read_from_anywhere_in_it(places: Places, adapter: Path, kind: str) -> None:
    source = places.source(kind, adapter)
    for blob in distinct_blobs(source.manifest("latest")):
        whole = read(source, blob)
        assert blob_of(whole).digest == blob.digest
        for start in (1, blob.size // 2, blob.size - 1, blob.size):
            assert read(source, blob, start) == whole[start:]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("data", [b"", b"x", b"abc" * 1000], ids=["empty", "one byte", "more"])
def test_a_blob_that_was_put_is_there(places: Places, kind: str, data: bytes) -> None:
    place, blob = places.target(kind), blob_of(data)
    assert not place.has_blob(blob)
    assert place.put_blob(blob, Bytes(data)) == len(data)
    assert place.has_blob(blob)
    assert read(place, blob) == data


class Dribble(Bytes):
    """The same, a few bytes at a time, as a reader may give them."""

    @contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        file = io.BytesIO(self.data[start:])

        class Slow:
            def readinto(self, buffer: Any, /) -> int:
                return file.readinto(memoryview(buffer)[:7])

        yield Slow()


@pytest.mark.parametrize("kind", TARGETS)
def test_bytes_that_come_a_few_at_a_time_arrive_as_they_are(places: Places, kind: str) -> None:
    data = bytes(range(251)) * 4
    place, blob = places.target(kind), blob_of(data)
    place.put_blob(blob, Dribble(data))
    assert read(place, blob) == data


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("wrong", [b"abd", b"ab", b""], ids=["flipped", "short", "empty"])
def test_wrong_bytes_leave_nothing_behind(places: Places, kind: str, wrong: bytes) -> None:
    place, blob = places.target(kind), blob_of(b"abc")
    with pytest.raises(IntegrityError) as error:
        place.put_blob(blob, Bytes(wrong))
    if kind in ("oci", "our hub", "hf", "file", "s3"):
        assert (error.value.hint, error.value.code) == ("Nothing was stored", "source-damaged")
        assert blob.digest in str(error.value)
    else:
        digest = f"sha256:{hashlib.sha256(wrong).hexdigest()}"
        assert error.value.what == f"received {len(wrong)} bytes of {digest} instead of 3 of {blob.digest}"
        assert error.value.hint == "They were discarded"
    words = "ended after" if kind in ("oci", "our hub") and len(wrong) < 3 else "were read"
    assert (words in error.value.what) == (error.value.code == "source-damaged")
    assert not place.has_blob(blob)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_manifest_without_its_blobs_is_refused(places: Places, adapter: Path, kind: str) -> None:
    place, source = places.target(kind), AdapterFolder(adapter)
    manifest = source.manifest("latest")
    missing, *other_blobs = distinct_blobs(manifest)
    for blob in other_blobs:
        place.put_blob(blob, source)
    with pytest.raises(AdapterhubError) as error:
        place.put_manifest(manifest, "latest")
    if kind not in ("oci", "our hub"):  # which have their own words
        assert error.value.what == f"{missing.path}, blob {missing.digest}, is missing there"
        assert (error.value.exit_code, error.value.hint) == (4, "Try again")
    with pytest.raises(NotFoundError):
        place.manifest("latest")


@pytest.mark.parametrize("kind", TARGETS)
def test_tags_are_listed_and_move(places: Places, adapter: Path, kind: str, tmp_path: Path) -> None:
    place = places.target(kind)
    first = copy_version(AdapterFolder(adapter), "latest", place, "prod").manifest
    second = copy_version(AdapterFolder(write_adapter(tmp_path / "other", 1)), "latest", place, "test").manifest
    assert {"prod", "test"} <= set(place.tags())
    assert (place.manifest("prod").digest, place.manifest("test").digest) == (first.digest, second.digest)
    copy_version(AdapterFolder(adapter), "latest", place, "test")
    assert place.manifest("test").digest == first.digest


@pytest.mark.parametrize("kind", TARGETS)
def test_a_range_is_the_highest_tag_in_it(places: Places, adapter: Path, kind: str, tmp_path: Path) -> None:
    place = places.target(kind)
    for seed, tag in enumerate(("1.2.0", "1.10.0", "2.0.0-rc.1")):
        copy_version(AdapterFolder(write_adapter(tmp_path / tag, seed)), "latest", place, tag)
    assert place.manifest("^1").digest == place.manifest("1.10.0").digest
    assert place.manifest("~1.2").digest == place.manifest("1.2.0").digest
    for missing in ("^2", "^3"):
        with pytest.raises(NotFoundError):
            place.manifest(missing)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_first_digits_of_a_digest_are_enough(places: Places, adapter: Path, kind: str, tmp_path: Path) -> None:
    place = places.target(kind)
    first = copy_version(AdapterFolder(adapter), "latest", place, "prod").manifest
    copy_version(AdapterFolder(write_adapter(tmp_path / "other", 1)), "latest", place, "test")
    assert place.manifest(first.digest[: len("sha256:") + 8]).digest == first.digest
    with pytest.raises(NotFoundError):
        place.manifest("sha256:00000000")


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind not in ("local", "packed")])
def test_a_reference_is_resolved_to_what_it_names_at_that_moment(
    places: Places, adapter: Path, kind: str, tmp_path: Path
) -> None:
    place = places.target(kind)
    assert isinstance(place, OpenRemote)
    first = copy_version(AdapterFolder(adapter), "latest", place, "1.2.0").manifest.digest
    for reference in ("1.2.0", "^1", first, first[: len("sha256:") + 8]):
        assert place.resolve(reference) == first
    second = copy_version(AdapterFolder(write_adapter(tmp_path / "other", 1)), "latest", place, "1.3.0").manifest.digest
    copy_version(AdapterFolder(tmp_path / "other"), "latest", place, "1.2.0")
    for reference in ("1.2.0", "^1", second):
        assert place.resolve(reference) == second
    for missing in ("nothing", "^2", "sha256:" + "0" * 64, "sha256:00000000"):
        with pytest.raises(NotFoundError):
            place.resolve(missing)


@pytest.mark.parametrize("kind", NUMBERED)
def test_every_version_keeps_its_number(places: Places, adapter: Path, kind: str, tmp_path: Path) -> None:
    place = places.target(kind)
    first = copy_version(AdapterFolder(adapter), "latest", place, "latest")
    second = copy_version(AdapterFolder(write_adapter(tmp_path / "other", 1)), "latest", place, "prod")
    assert (first.put_result.number, second.put_result.number) == (1, 2)
    assert place.manifest("v1").digest == first.manifest.digest
    assert place.manifest("v2").digest == second.manifest.digest
    again = copy_version(AdapterFolder(adapter), "latest", place, "prod")
    assert (again.put_result.number, place.manifest("v2").digest) == (1, second.manifest.digest)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_distinguishes_new_versions_from_moved_tags(places: Places, adapter: Path, kind: str, tmp_path: Path) -> None:
    place = places.target(kind)

    def push_result(folder: Path, tag: str) -> tuple[bool, bool]:
        result = copy_version(AdapterFolder(folder), "latest", place, tag).put_result
        return result.new, result.moved

    assert push_result(adapter, "prod") == (True, True)
    assert push_result(adapter, "prod") == (False, False)
    assert push_result(adapter, "test") == (False, True)
    assert push_result(write_adapter(tmp_path / "other", 1), "test") == (True, True)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_copy_has_the_same_digest_and_the_same_bytes(places: Places, adapter: Path, kind: str, to: str) -> None:
    source, target = places.source(kind, adapter), places.target(to)
    copied = copy_version(source, "latest", target, "prod")
    assert copied.manifest.digest == oci_manifest.build(adapter).digest == target.manifest("prod").digest
    shared_blobs = {  # both are in one registry, or on one hub, which has files by their digests in one place if they are large
        ("oci", "oci"): distinct_blobs(copied.manifest),
        ("our hub", "our hub"): distinct_blobs(copied.manifest),
        ("hf", "hf"): [layer for layer in copied.manifest.layers if layer.path.endswith(".safetensors")],
    }.get((kind, to), [])
    assert copied.sent == sum(blob.size for blob in distinct_blobs(copied.manifest) if blob not in shared_blobs)
    for layer in target.manifest("prod").layers:
        if layer.path != ADAPTER_JSON:
            assert read(target, layer) == (adapter / layer.path).read_bytes()


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_there_is_not_sent_again(places: Places, adapter: Path, kind: str, tmp_path: Path) -> None:
    target = places.target(kind)
    first = copy_version(AdapterFolder(adapter), "latest", target, "one")
    assert copy_version(AdapterFolder(adapter), "latest", target, "two").sent == 0
    other_folder = write_adapter(tmp_path / "other")  # the same weights, another README
    (other_folder / "README.md").write_text("# Another\n")
    sent = copy_version(AdapterFolder(other_folder), "latest", target, "three").sent
    weights = next(layer.size for layer in first.manifest.layers if layer.path.endswith(".safetensors"))
    assert 0 < sent < first.sent - weights + 100


@pytest.mark.parametrize("kind", TARGETS)
def test_a_copy_reports_its_progress(places: Places, adapter: Path, kind: str) -> None:
    reports: list[tuple[int, int]] = []
    copied = copy_version(AdapterFolder(adapter), "latest", places.target(kind), None, lambda *pair: reports.append(pair))
    assert reports[-1] == (copied.sent, copied.sent)
    assert [bytes_done for bytes_done, _ in reports] == sorted(bytes_done for bytes_done, _ in reports)


def test_the_local_registry_refuses_a_manifest_of_other_files(places: Places, adapter: Path) -> None:
    place, source = places.target("local"), AdapterFolder(adapter)
    manifest = source.manifest("latest")
    for blob in distinct_blobs(manifest):
        place.put_blob(blob, source)
    document: dict[str, Any] = json_file.parse_object(manifest.raw, "")
    document["layers"] = [layer for layer in document["layers"] if "README" not in str(layer)]
    with pytest.raises(IntegrityError, match="lists other files than the manifest"):
        place.put_manifest(oci_manifest.parse(json_file.canonical_bytes(document), ""), None)
    with pytest.raises(NotFoundError):
        place.manifest("latest")
