"""Version numbers in an OCI registry: tags that stay, also if two writers come at once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.ref import RefError
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import ConflictError, NotFoundError
from tests.conftest import Run
from tests.support.adapters import write_adapter

pytestmark = pytest.mark.peer
Folder = Callable[..., Path]


class Contended(OciRepository):
    """A repository where another writer puts a version as well, when we put ours under v1: `before` or after it."""

    rival: Callable[[], object] | None = None
    before = False

    def put_reference(self, manifest: Manifest, reference: str) -> None:
        act, self.rival = (self.rival, None) if reference == "v1" and self.rival else (None, self.rival)
        if act and self.before:
            act()
        super().put_reference(manifest, reference)
        if act and not self.before:
            act()


def contend(host: str, name: str, ours: Path, theirs: Path, *, before: bool) -> tuple[set[str | None], str, str]:
    """The digests of the numbers in the end, and those of both versions, which can be read."""
    address = OciAddress.parse(f"oci://{host}/numbers/{name}")
    with OciRepository(address, pauses=()) as other_repository, Contended(address, pauses=()) as place:
        rival_digests: list[str] = []
        place.rival = lambda: rival_digests.append(
            copy_version(AdapterFolder(theirs), "latest", other_repository, "latest").manifest.digest
        )
        place.before = before
        mine = copy_version(AdapterFolder(ours), "latest", place, "latest").manifest.digest
        for digest in (mine, *rival_digests):
            assert place.manifest(digest).digest == digest
        return {place.digest_of(tag) for tag in place.tags() if tag != "latest"}, mine, rival_digests[0]


def test_of_two_writers_of_a_number_the_one_that_finds_the_other_there_takes_the_next(
    host: str, make: Folder, tmp_path: Path
) -> None:
    numbered, ours, theirs = contend(host, "after", make(), write_adapter(tmp_path / "theirs", 1), before=False)
    assert numbered == {ours, theirs}


def test_a_writer_that_stalls_replaces_a_number_whose_version_stays_by_its_digest(
    host: str, make: Folder, tmp_path: Path
) -> None:
    numbered, ours, _ = contend(host, "before", make(), write_adapter(tmp_path / "theirs", 1), before=True)
    assert numbered == {ours}


def test_a_number_that_is_asked_for_is_given_once(host: str, make: Folder, tmp_path: Path) -> None:
    with OciRepository(OciAddress.parse(f"oci://{host}/numbers/given"), pauses=()) as place:
        assert copy_version(AdapterFolder(make()), "latest", place, "v7").put_result.number == 7
        other_folder = AdapterFolder(write_adapter(tmp_path / "other", 1))
        hint = f"Push to oci://{host}/numbers/given, which takes the next number"
        with pytest.raises(ConflictError, match=f", and a version number does not move. {hint}"):
            copy_version(other_folder, "latest", place, "v7")
        assert copy_version(AdapterFolder(make()), "latest", place, "v7").put_result.moved is False
        assert copy_version(other_folder, "latest", place, "latest").put_result.number == 8


def test_a_number_that_another_writer_takes_at_once_is_a_conflict(host: str, make: Folder, tmp_path: Path) -> None:
    address = OciAddress.parse(f"oci://{host}/numbers/taken")
    with OciRepository(address, pauses=()) as other_repository, Contended(address, pauses=()) as place:
        theirs = copy_version(AdapterFolder(write_adapter(tmp_path / "theirs", 1)), "latest", other_repository, "v9").manifest
        place.rival = lambda: other_repository.put_reference(theirs, "v1")
        with pytest.raises(ConflictError) as error:
            copy_version(AdapterFolder(make()), "latest", place, "v1")
        reason = "another writer took this number. Review that version, or push without a number"
        assert str(error.value) == f"oci://{host}/numbers/taken:v1: {reason}"
        assert place.digest_of("v1") == theirs.digest


def test_a_version_that_another_tool_pushed_gets_a_number_with_its_next_push(host: str, make: Folder, tmp_path: Path) -> None:
    with OciRepository(OciAddress.parse(f"oci://{host}/numbers/foreign"), pauses=()) as place:
        copied = copy_version(AdapterFolder(make()), "latest", place, "latest")
    with OciRepository(OciAddress.parse(f"oci://{host}/numbers/skopeo"), pauses=()) as repository:
        words = ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "-q"]
        images = [f"docker://{host}/numbers/{name}:latest" for name in ("foreign", "skopeo")]
        subprocess.run([*words, *images], check=True, capture_output=True)
        assert repository.tags() == ["latest"]
        again = copy_version(AdapterFolder(make()), "latest", repository, "latest").put_result
        assert (again.new, again.moved, again.number, repository.tags()) == (False, False, 1, ["latest", "v1"])
        assert repository.manifest("v1").digest == copied.manifest.digest


def test_tags_of_attachments_are_no_versions(host: str, run: Run, make: Folder, tmp_path: Path) -> None:
    address = f"oci://{host}/numbers/attached"
    run("push", make(), address)
    (tmp_path / "note.txt").write_text("fine")
    run("attach", address, "note.txt", "--type", "text/plain")
    assert json.loads(run("list", address, "--json").stdout)["tags"] == ["latest", "v1"]
    assert "sha256-" not in run("list", address).stdout


def test_digits_that_two_versions_share_are_refused(host: str, tmp_path: Path) -> None:
    folders_by_digits: dict[str, AdapterFolder] = {}
    with OciRepository(OciAddress.parse(f"oci://{host}/numbers/digits"), pauses=()) as place:
        for seed in range(40):
            folder = AdapterFolder(write_adapter(tmp_path / f"a{seed}", seed))
            start = folder.manifest("latest").digest[:8]
            if start in folders_by_digits:
                break
            folders_by_digits[start] = folder
        for adapter_folder in (folder, folders_by_digits[start]):
            copy_version(adapter_folder, "latest", place, "latest")
        with pytest.raises(RefError, match="ambiguous digest prefix"):
            place.manifest(start)
        with pytest.raises(NotFoundError):
            place.manifest("sha256:" + "0" * 63)
