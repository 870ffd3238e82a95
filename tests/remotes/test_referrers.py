"""What is attached to versions: by us and by oras, in registries with and without a list of it, and in layouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.layouts.layout_archive import LayoutArchive
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.oci import referrers
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError
from tests.conftest import Run, need_program
from tests.remotes.test_oci_peers import call
from tests.support.proxy import Exchange, Proxy

Make = Callable[..., Path]
SCAN, SIGNATURE = "application/vnd.example.scan+json", "application/vnd.example.signature"
INDEX = "application/vnd.oci.image.index.v1+json"


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    (tmp_path / "scan.json").write_text('{"found": []}')
    return tmp_path / "scan.json"


@pytest.fixture
def listing(host: str) -> Iterator[Proxy]:
    """A registry that knows what is about what: docker-registry, and in front of it the API that it lacks."""
    entries_by_subject: dict[str, list[dict[str, Any]]] = {}

    def before(exchange: Exchange) -> None:
        if "/referrers/" in exchange.path:
            entries = entries_by_subject.get(exchange.path.rpartition("/")[2], [])
            exchange.status, exchange.answer = 200, {"content-type": INDEX}
            exchange.data = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()

    def after(exchange: Exchange) -> None:
        if exchange.method == "PUT" and "/manifests/" in exchange.path and exchange.status == 201:
            document = json.loads(exchange.body)
            if subject := document.get("subject"):
                digest = "sha256:" + hashlib.sha256(exchange.body).hexdigest()
                entry = {"mediaType": document["mediaType"], "digest": digest, "size": len(exchange.body)}
                entry["artifactType"] = document.get("artifactType")
                entries_by_subject.setdefault(subject["digest"], []).append(entry)
                exchange.answer["oci-subject"] = subject["digest"]

    with Proxy(host) as running:
        running.before, running.after = before, after
        yield running


@pytest.fixture(
    params=["layout", "archive", pytest.param("oci", marks=pytest.mark.peer), pytest.param("api", marks=pytest.mark.peer)]
)
def address(request: pytest.FixtureRequest, make: Make, run: Run) -> str:
    """Where a version is that things can be attached to."""
    kinds = {"layout": lambda: "oci:x:v1", "archive": lambda: "oci-archive:x.tar:v1"}
    name = f"attached/n{hashlib.sha256(str(request.node.nodeid).encode()).hexdigest()[:12]}:v1"
    kinds["oci"] = lambda: f"oci://{request.getfixturevalue('host')}/{name}"
    kinds["api"] = lambda: f"oci://{request.getfixturevalue('listing').address}/{name}"
    location = kinds[request.param]()
    run("push", make(), location)
    return location


def run_json(run: Run, *words: object) -> Any:
    return json.loads(run(*words, "--json").stdout)


def test_what_was_attached_is_listed_and_comes_back(address: str, scan: Path, run: Run, tmp_path: Path) -> None:
    assert run_json(run, "attach", address, "--list")["attached"] == []
    (tmp_path / "notes.md").write_text("fine\n")
    first = run_json(run, "attach", address, scan, "notes.md", "--type", SCAN)
    assert run_json(run, "attach", address, "notes.md", scan, "--type", SCAN)["digest"] == first["digest"]  # in any order
    (tmp_path / "model.sig").write_bytes(bytes(range(256)))
    second = run_json(run, "attach", address, "model.sig", "--type", SIGNATURE)
    document = run_json(run, "attach", address, "--list")
    assert [(entry["type"], entry["digest"]) for entry in document["attached"]] == [
        (SCAN, first["digest"]),
        (SIGNATURE, second["digest"]),
    ]
    assert document["subject"] == oci_manifest.build(tmp_path / "adapter").digest
    assert SIGNATURE in run("attach", address, "--list").stdout
    assert len(run_json(run, "attach", address, "--list", "--type", SCAN)["attached"]) == 1
    assert run_json(run, "attach", address, "--list", "--type", SCAN, "-o", "out")["files"] == ["notes.md", "scan.json"]
    assert (tmp_path / "out/scan.json").read_bytes() == scan.read_bytes()
    run("attach", address, "--list", "--type", SIGNATURE, "-o", "sig")
    assert (tmp_path / "sig/model.sig").read_bytes() == bytes(range(256))
    third = run_json(run, "attach", address, "notes.md", "--type", SCAN)
    folders = {
        attachment_digest: attachment_digest.removeprefix("sha256:")[:16]
        for attachment_digest in (first["digest"], third["digest"])
    }
    files = [
        f"{folders[first['digest']]}/notes.md",
        f"{folders[first['digest']]}/scan.json",
        f"{folders[third['digest']]}/notes.md",
    ]
    assert sorted(run_json(run, "attach", address, "--list", "--type", SCAN, "-o", "both")["files"]) == sorted(files)
    assert (tmp_path / "both" / files[2]).read_bytes() == (tmp_path / "notes.md").read_bytes()
    error = run("attach", address, "--list", "--type", "a/b", "-o", "none", code=3).stderr
    assert f"has no attachment of type a/b. `adapterhub attach {address} --list` lists those of other types" in error
    digest = run_json(run, "pull", address, "-o", "again")["digest"]
    assert digest == document["subject"]  # the version is what it was


def test_a_copy_takes_along_what_is_attached_and_what_is_attached_to_that(address: str, scan: Path, run: Run) -> None:
    first = run_json(run, "attach", address, scan, "--type", SCAN)
    attachment_address = address.rpartition(":")[0] + f"@{first['digest']}"
    second = run_json(run, "attach", attachment_address, scan, "--type", SIGNATURE)
    for target in ("oci:copied:v1", "oci-archive:copied.tar:v1"):
        assert "2 attachments copied" in run("copy", address, target, "--referrers").stderr
        assert [entry["digest"] for entry in run_json(run, "attach", target, "--list")["attached"]] == [first["digest"]]
        about = target.rpartition(":")[0] + f"@{first['digest']}"
        assert [entry["digest"] for entry in run_json(run, "attach", about, "--list")["attached"]] == [second["digest"]]
    assert "2 attachments copied" in run("copy", "oci:copied:v1", address, "--referrers").stderr
    assert len(run_json(run, "attach", address, "--list")["attached"]) == 1
    run("copy", address, "oci:plain:v1")
    assert run_json(run, "attach", "oci:plain:v1", "--list")["attached"] == []


def test_words_that_cannot_be_meant(make: Make, scan: Path, run: Run) -> None:
    run("push", make(), "oci:x:v1")
    assert "is not a media type" in run("attach", "oci:x:v1", scan, "--type", "scan", code=2).stderr
    assert "is not an address" in run("attach", "team/sql", scan, "--type", SCAN, code=2).stderr
    assert "is not an address" in run("copy", "--referrers", "oci:x:v1", "team/sql", code=2).stderr
    run("attach", "oci:x:v9", scan, "--type", SCAN, code=3)
    run("attach", "oci:x:v1", "nothing.json", "--type", SCAN, code=3)
    run("attach", "oci:x:v1", scan, scan, "--type", SCAN, code=6)
    assert run_json(run, "attach", "oci:x:v1", "--list")["attached"] == []


@pytest.mark.peer
def test_oras_discovers_what_we_attached_and_we_what_oras_did(address: str, scan: Path, run: Run, tmp_path: Path) -> None:
    oras = need_program("oras")
    local = not address.startswith("oci://")
    place = address.partition("//" if not local else ":")[2]
    flags = ["--oci-layout"] if local else ["--plain-http"]
    ours = run_json(run, "attach", address, scan, "--type", SCAN)
    assert ours["digest"] in call(oras, "discover", *flags, place, cwd=tmp_path)
    call(oras, "pull", *flags, f"{place.rpartition(':')[0]}@{ours['digest']}", "-o", "by-oras", cwd=tmp_path)
    assert (tmp_path / "by-oras/scan.json").read_bytes() == scan.read_bytes()
    if address.startswith("oci-archive:"):
        return  # oras reads tars and doesn't write them
    (tmp_path / "hi.txt").write_text("hi")
    call(oras, "attach", *flags, "--artifact-type", SIGNATURE, place, "hi.txt", cwd=tmp_path)
    attachments = run_json(run, "attach", address, "--list")["attached"]
    assert [entry["type"] for entry in attachments] == [SCAN, SIGNATURE]
    run("attach", address, "--list", "--type", SIGNATURE, "-o", "out")
    assert (tmp_path / "out/hi.txt").read_text() == "hi"
    theirs = next(entry["digest"] for entry in attachments if entry["type"] == SIGNATURE)
    call(oras, "attach", *flags, "--artifact-type", "a/b", f"{place.rpartition(':')[0]}@{theirs}", "hi.txt", cwd=tmp_path)
    assert "3 attachments copied" in run("copy", address, "oci:copied:v1", "--referrers").stderr
    tree = call(oras, "discover", "--oci-layout", "copied:v1", cwd=tmp_path)
    assert ours["digest"] in tree
    assert theirs in tree


def attached_layout(folder: Path, root: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[LayoutFolder, str]:
    """A layout with a version, and about it a manifest that says odd things."""
    layout = LayoutFolder(root)
    manifest = copy_version(AdapterFolder(folder), "latest", layout, "v1").manifest
    subject = {"mediaType": oci_manifest.MANIFEST_TYPE, "digest": manifest.digest, "size": len(manifest.raw)}
    document = {
        "schemaVersion": 2, "mediaType": oci_manifest.MANIFEST_TYPE, "artifactType": SCAN, "subject": subject, "layers": [],
        "config": {"mediaType": "a/b", "digest": manifest.config.digest, "size": manifest.config.size},
    }  # fmt: skip
    change(document)
    raw = json.dumps(document).encode()
    layout.put_document(raw, "sha256:" + hashlib.sha256(raw).hexdigest())
    return layout, manifest.digest


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda it: it.update(layers=3), RefusedError, "not an OCI image manifest: it has no list of at most 1000 layers"),
        (lambda it: it.update(layers=[{}] * 1001), RefusedError, "it has no list of at most 1000 layers"),
        (lambda it: it.update(layers=[{"mediaType": "a/b", "digest": "../x", "size": 1}]), FormatError, "not a digest"),
        (lambda it: it.update(config=None), FormatError, "not a descriptor"),
        (lambda it: it.update(annotations={"a": 1}), FormatError, "map of strings"),
        (
            lambda it: it.update(
                layers=[{**it["config"], "annotations": {"org.opencontainers.image.title": "../../etc/passwd"}}]
            ),
            FormatError,
            "cannot be written safely",
        ),
    ],
)
def test_a_dishonest_attachment_is_refused(
    make: Make, tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    layout, digest = attached_layout(make(), tmp_path / "x", change)
    (attachment,) = referrers.referrers(layout, digest)
    with pytest.raises(error, match=message):
        referrers.fetch_files(layout, attachment, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_attachment_without_files_has_nothing_to_write(make: Make, tmp_path: Path) -> None:
    layout, digest = attached_layout(make(), tmp_path / "x", lambda it: it)
    (attachment,) = referrers.referrers(layout, digest)
    with pytest.raises(NotFoundError) as error:
        referrers.fetch_files(layout, attachment, tmp_path / "out")
    assert str(error.value) == f"{layout.location}@{attachment.digest}: the attachment has no files with a name"
    assert not (tmp_path / "out").exists()


@pytest.mark.peer
def test_no_more_is_attached_than_is_listed(make: Make, host: str, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrers, "MAX_REFERRERS", 1)
    with OciRepository(OciAddress.parse(f"oci://{host}/attached/many")) as place:
        manifest = copy_version(AdapterFolder(make()), "latest", place, "v1").manifest
        referrers.attach_files(place, manifest, SCAN, [scan])
        with pytest.raises(RefusedError) as error:
            referrers.attach_files(place, manifest, SIGNATURE, [scan])
    assert error.value.what == f"{manifest.digest} has 1 attachments already, as many as are listed"


def test_an_attachment_with_other_bytes_is_not_written(make: Make, run: Run, scan: Path, tmp_path: Path) -> None:
    run("push", make(), "oci:x:v1")
    run("attach", "oci:x:v1", scan, "--type", SCAN)
    blob = tmp_path / "x/blobs/sha256" / hashlib.sha256(scan.read_bytes()).hexdigest()
    blob.write_bytes(b"x" * blob.stat().st_size)
    run("attach", "oci:x:v1", "--list", "-o", "out", code=4)
    assert not (tmp_path / "out").exists()
    with LayoutFolder(tmp_path / "x") as source, LayoutArchive(tmp_path / "y.tar") as target, pytest.raises(IntegrityError):
        referrers.copy_referrers(source, oci_manifest.build(tmp_path / "adapter").digest, target)
    assert not (tmp_path / "y.tar").exists()


@pytest.mark.peer
def test_an_index_that_another_wrote_over_ours_is_renewed_with_both(make: Make, host: str, scan: Path) -> None:
    with Proxy(host) as proxy, OciRepository(OciAddress.parse(f"oci://{proxy.address}/attached/race")) as place:
        manifest = copy_version(AdapterFolder(make()), "latest", place, "v1").manifest
        tag = manifest.digest.replace(":", "-")
        with OciRepository(OciAddress.parse(f"oci://{host}/attached/race")) as other_repository:
            theirs = referrers.attach_files(other_repository, manifest, SIGNATURE, [scan])
            index = other_repository.read_document(tag)
            writes = []

            def after(exchange: Exchange) -> None:
                if exchange.method == "PUT" and exchange.path.endswith(tag):
                    writes.append(exchange.path)
                    if len(writes) == 1:  # another had read the index before this, and puts what it made of it
                        other_repository.put_document(index, "sha256:" + hashlib.sha256(index).hexdigest(), tag)

            proxy.after = after
            ours = referrers.attach_files(place, manifest, SCAN, [scan])
        assert len(writes) == 2
        assert {referrer.digest for referrer in referrers.referrers(place, manifest.digest)} == {ours.digest, theirs.digest}
