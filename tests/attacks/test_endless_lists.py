"""Lists and documents that are made to take forever, or all memory, or to lose a file: one line each, and a bounded effort."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.http import client
from adapterhub.http.urls import next_page
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, TITLE
from adapterhub.registry.moves import now
from adapterhub.remotes.layouts import archive_tar
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.layouts.layout_index import INDEX_TYPE
from adapterhub.remotes.objects import name_log
from adapterhub.remotes.objects.object_address import ObjectAddress
from adapterhub.remotes.objects.object_repository import ObjectRepository
from adapterhub.remotes.oci import oci_repository, registry_host
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.store.store import Entry
from adapterhub_converters.bases import hf_base
from adapterhub_converters.bases.model_files import RangedFile
from adapterhub_converters.errors import FormatError, RefusedError, RemoteError
from tests.attacks.test_hostile_servers import one_line
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.web_server import Handler, Web

_EMPTY = b"{}"


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def manifest(files: dict[str, bytes], **fields: Any) -> bytes:
    """A manifest of files."""
    layers = [
        {"mediaType": "text/plain", "digest": digest_of(data), "size": len(data), "annotations": {TITLE: name}}
        for name, data in files.items()
    ]
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(_EMPTY), "size": len(_EMPTY)}
    document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers}
    return json.dumps({**document, **fields}).encode()


def serve(web: Web, files: dict[str, bytes], raw: bytes, tag: str) -> None:
    """Have a server be a registry with a manifest under a tag."""
    for reference in (tag, digest_of(raw)):
        web.rules[f"/v2/team/sql/manifests/{reference}"] = lambda to: to.send(200, raw, **{"Content-Type": MANIFEST_TYPE})
    web.files |= {f"/v2/team/sql/blobs/{digest_of(data)}": data for data in (*files.values(), _EMPTY)}


def address(web: Web) -> str:
    return f"oci://127.0.0.1:{web.server_address[1]}/team/sql"


# ---- bytes


def test_a_blob_that_comes_a_byte_a_connection_is_given_up(run: Run, make: Make, web: Web, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in make().iterdir()}
    serve(web, files, manifest(files), "latest")
    ranges: list[str] = []

    def a_byte(to: Handler) -> None:
        ranges.append(to.headers.get("Range", ""))
        data, at = files["adapter_model.safetensors"], int((ranges[-1] or "bytes=0-")[6:-1])
        to.send_response(206 if at else 200)
        to.send_header("Content-Length", str(len(data) - at))
        to.send_header("Content-Range", f"bytes {at}-{len(data) - 1}/{len(data)}")
        to.end_headers()
        to.wfile.write(data[at : at + 1])
        to.close_connection = True

    web.rules[f"/v2/team/sql/blobs/{digest_of(files['adapter_model.safetensors'])}"] = a_byte
    one_line(run("pull", address(web), "-o", tmp_path / "out", code=5), "bytes too early")
    assert len(ranges) == 4
    assert not (tmp_path / "out").exists()


# ---- pages


def endless_pages(web: Web, path: str, body: Any, kind: str = "application/json") -> list[str]:
    """Have each page of a list name another; the paths that were requested."""
    requested_paths: list[str] = []

    def page(to: Handler) -> None:
        requested_paths.append(to.path)
        link = f'<{path}?page={len(requested_paths)}>; rel="next"'
        to.send(200, json.dumps(body(len(requested_paths))).encode(), **{"Content-Type": kind, "Link": link})

    web.rules[path] = page
    return requested_paths


def test_a_list_of_tags_without_an_end_is_no_list(run: Run, web: Web) -> None:
    requested_paths = endless_pages(web, "/v2/team/sql/tags/list", lambda n: {"tags": [f"t{n}"]})
    one_line(run("list", address(web), code=5), "more than 1000 pages")
    assert len(requested_paths) == 1000


def test_lists_of_more_tags_or_names_than_anybody_has_are_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci_repository, "_MAX_TAGS", 3)
    monkeypatch.setattr(registry_host, "_MAX_NAMES", 3)
    place = OciAddress.parse(address(web))
    web.files["/v2/team/sql/tags/list"] = b'{"tags": ["a", "b", "c", "d"]}'
    with oci_repository.OciRepository(place) as registry, pytest.raises(RemoteError) as error:
        registry.tags()
    assert (error.value.where, error.value.what) == (address(web), "it lists more than 3 tags")
    web.files["/v2/_catalog"] = b'{"repositories": ["a", "b", "c", "d"]}'
    with registry_host.RegistryHost(place, lambda: None) as host, pytest.raises(RemoteError) as error:
        host.names()
    assert error.value.what == "it lists more than 3 names"


def test_a_list_takes_only_so_long(web: Web) -> None:
    requested_paths = endless_pages(web, "/list", lambda n: [n])
    asking = client.Client(web.url, max_list_seconds=0.0)
    with pytest.raises(RemoteError, match="its list takes longer than 0 seconds"):
        list(asking.pages(f"{web.url}/list", "here", limit=100))
    assert len(requested_paths) == 1


def test_attachments_take_only_so_much_memory(run: Run, make: Make, web: Web) -> None:
    files = {path.name: path.read_bytes() for path in make().iterdir()}
    raw = manifest(files)
    serve(web, files, raw, "latest")

    def body(n: int) -> Any:
        entry = {"mediaType": MANIFEST_TYPE, "digest": digest_of(b"%d" % n), "size": 1, "annotations": {"x": "y" * 4_000_000}}
        return {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}

    requested_paths = endless_pages(web, f"/v2/team/sql/referrers/{digest_of(raw)}", body, INDEX_TYPE)
    one_line(run("attach", address(web), "--list", code=5), "more than 64 MB")
    assert len(requested_paths) < 20


def test_commits_that_all_claim_a_version_are_not_all_read(run: Run, web: Web, tmp_path: Path) -> None:
    expected = digest_of(b"wanted")
    refs = {"branches": [{"name": "main", "targetCommit": "a" * 40}], "tags": []}
    web.rules["/api/models/team/sql/refs"] = lambda to: to.send(200, json.dumps(refs).encode())
    endless_pages(
        web,
        "/api/models/team/sql/commits/main",
        lambda n: [{"id": f"{n:020x}{number:020x}", "title": expected} for number in range(1000)],
    )
    host = f"hub+http://127.0.0.1:{web.server_address[1]}"
    one_line(run("pull", f"{host}/team/sql@{expected}", "-o", tmp_path / "out", code=3), "no such version")
    assert len(web.requests) < 150


@pytest.mark.parametrize(
    "link",
    [
        '</a>; rel="prev", </b>; rel="next"',
        '</b>; title="x"; rel="next"',
        "</b>;rel=next",
        '</a>; rel=last,</b>; rel="next last"',
    ],
)
def test_the_next_page_is_found_among_other_links(link: str) -> None:
    assert next_page(link, "https://r.example/x", "here") == "https://r.example/b"


def test_two_headers_are_one_list(run: Run, web: Web) -> None:
    def tags(to: Handler) -> None:
        if to.path.endswith("?b"):
            to.send(200, b'{"tags": ["v2"]}')
            return
        to.send_response(200)
        for value in ('</v2/team/sql/tags/list?b>; rel="next"', '</v2/team/sql/tags/list?c>; rel="prev"', ""):
            to.send_header(*(("Link", value) if value else ("Content-Length", "16")))
        to.end_headers()
        to.wfile.write(b'{"tags": ["v1"]}')

    web.rules["/v2/team/sql/tags/list"] = tags
    assert "v2" in run("list", address(web)).stdout


# ---- attachments and layouts


def test_a_file_of_an_attachment_cannot_have_the_name_of_an_incomplete_one(
    run: Run, make: Make, web: Web, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in make().iterdir()}
    raw, second = manifest(files), b"the second file"
    serve(web, files, raw, "latest")
    attached = {f"{digest_of(second)[7:]}.part": b"the first file", "b.txt": second}
    about = {"mediaType": MANIFEST_TYPE, "digest": digest_of(raw), "size": len(raw)}
    document = manifest(attached, artifactType="a/b", subject=about)
    serve(web, attached, document, "attached")
    entry = {"mediaType": MANIFEST_TYPE, "digest": digest_of(document), "size": len(document), "artifactType": "a/b"}
    page = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}).encode()
    path = f"/v2/team/sql/referrers/{digest_of(raw)}"
    web.rules[path] = lambda to: to.send(200, page, **{"Content-Type": INDEX_TYPE})
    run("attach", address(web), "--list", "-o", tmp_path / "scan")
    assert {path.name: path.read_bytes() for path in (tmp_path / "scan").iterdir()} == attached


def test_a_manifest_that_a_layout_lists_again_and_again_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_manifest = json.dumps({"mediaType": MANIFEST_TYPE, "layers": []}).encode()
    entry = {"mediaType": MANIFEST_TYPE, "digest": digest_of(other_manifest), "size": len(other_manifest)}
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    (blobs / digest_of(other_manifest)[7:]).write_bytes(other_manifest)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [entry] * 1000}))
    read: list[str] = []
    document = LayoutFolder.read_document
    monkeypatch.setattr(LayoutFolder, "read_document", lambda self, name: read.append(name) or document(self, name))
    assert LayoutFolder(tmp_path).referrers(digest_of(b"subject")) == []
    assert read == [digest_of(other_manifest)]


class _Counted(bytes):
    """Bytes that count how many of them are copied."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        _Counted.copied += len(value) if isinstance(value, bytes) else 1
        return _Counted(value) if isinstance(value, bytes) else value


def test_the_records_of_an_extended_header_are_copied_once() -> None:
    body = b"13 comment=a\n" * 5000
    info = tarfile.TarInfo("x")
    info.size, info.type = len(body), tarfile.XHDTYPE
    archive = info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + bytes(1024)

    class File(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return _Counted(super().read(size))

    _Counted.copied = 0
    assert archive_tar.scan_members(File(archive), len(archive), "here") == {}
    assert _Counted.copied < 4 * len(archive)


# ---- stores and bases


@pytest.mark.parametrize("document_name", ["refs/team/sql/00000001.json", "blobs"])
def test_a_pipe_in_a_store_of_others_is_refused(run: Run, make: Make, tmp_path: Path, document_name: str) -> None:
    pytest.importorskip("obstore")
    store, adapter = tmp_path / "store", make()
    run("push", adapter, f"file://{store}/team/sql")
    weights = digest_of((adapter / "adapter_model.safetensors").read_bytes())[7:]
    path = store / (document_name if document_name != "blobs" else f"blobs/sha256/{weights}")
    path.unlink()
    os.mkfifo(path)
    one_line(run("pull", f"file://{store}/team/sql", "-o", tmp_path / "out", code=None), "a pipe or a device")
    assert not (tmp_path / "out").exists()


def pushed(name: str, count: int) -> Iterator[Entry]:
    """The entries of a log of pushes."""
    head = ""
    for seq in range(1, count + 1):
        entry = Entry(name, seq, "push", now(), digest_of(b"%d" % seq), 1, seq, (), head)
        head = digest_of(entry.dump())
        yield entry


def test_the_log_of_a_name_in_an_object_store_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a push make it longer."""
    pytest.importorskip("obstore")
    monkeypatch.setattr(name_log, "MAX_ENTRIES", 150)
    store, folder = f"file://{tmp_path}", tmp_path / "refs/team/sql"
    folder.mkdir(parents=True)
    for entry in pushed("team/sql", 150):
        (folder / f"{entry.seq:08}.json").write_bytes(entry.dump())
    with ObjectRepository(ObjectAddress.parse(f"{store}/team/sql"), {}) as place:
        assert len(place.history()) == 150
        with pytest.raises(RefusedError, match="more than 150 entries or 256 MiB. Copy its versions to another name"):
            place._append(Entry("team/sql", 151, "tag", now()))
    assert not (folder / "00000151.json").exists()
    (folder / "00000151.json").write_bytes(b"{}")
    with (
        ObjectRepository(ObjectAddress.parse(f"{store}/team/sql"), {}) as place,
        pytest.raises(RefusedError, match="more than 150"),
    ):
        place.tags()


def test_a_log_that_breaks_at_once_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    folder = tmp_path / "refs/team/sql"
    folder.mkdir(parents=True)
    for seq in range(1, 1001):
        (folder / f"{seq:08}.json").write_bytes(b"{}")
    sequence_numbers: list[int] = []
    raw = name_log.NameLog.read_entry
    monkeypatch.setattr(name_log.NameLog, "read_entry", lambda self, seq: sequence_numbers.append(seq) or raw(self, seq))
    with ObjectRepository(ObjectAddress.parse(f"file://{tmp_path}/team/sql"), {}) as place, pytest.raises(FormatError):
        place.tags()
    assert len(sequence_numbers) <= 64


def test_the_parts_of_a_base_have_one_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_base, "MAX_TENSORS", 10)
    read: list[str] = []

    class Files:
        local = None
        notes: tuple[str, ...] = ()

        def label(self, name: str) -> str:
            return name

        def read_whole(self, name: str, limit: int) -> bytes | None:
            del limit
            index = {"weight_map": {f"t{n}": f"part{n}.safetensors" for n in range(100)}}
            return {"config.json": b"{}", hf_base.INDEX: json.dumps(index).encode()}.get(name)

        def open_ranged(self, name: str) -> RangedFile:
            read.append(name)
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            header = json.dumps({f"{name}.{n}": empty for n in range(4)}).encode()
            data = len(header).to_bytes(8, "little") + header
            return RangedFile(len(data), lambda offset, n: data[offset : offset + n], name)

        def sha256(self, name: str) -> None:
            del name

        def map_items(self, do: Any, items: Any) -> list[Any]:
            return [do(item) for item in items]

    with pytest.raises(FormatError, match="more than 10 tensors"):
        hf_base.read(Files())  # type: ignore[arg-type]
    assert len(read) == 3
