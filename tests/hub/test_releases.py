"""A blob that is asked for by its own digest is given out if the policy allows a version that has it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from tests.hub.conftest import Running, client, serving
from tests.hub.oci.conftest import Registry
from tests.hub.sending import WEIGHTS, Sending, lines_of
from tests.hub.web.conftest import hide

Licensed = Callable[[str], Path]


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Running]:
    """A hub that gives out what has the license MIT; its registry takes anything."""
    with serving(tmp_path / "hub", policy=Policy("the hub", licenses=("mit",))) as running:
        yield running


@pytest.fixture
def licensed(adapter: Callable[..., Path]) -> Licensed:
    """Make an adapter, always the same but for its license."""

    def licensed_adapter(name: str) -> Path:
        folder = adapter(1)
        (folder / "README.md").write_text(f"---\nlicense: {name}\n---\n")
        return folder

    return licensed_adapter


def pushed(hub: Running, name: str, folder: Path) -> oci_manifest.Manifest:
    """Push beside the hub, which compares nothing, and return the manifest."""
    with hub.registry() as registry:
        return registry.oci_manifest(registry.push(folder, Ref(name)))


def digest_of(folder: Path) -> str:
    return f"sha256:{hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}"


def withheld(hub: Running, name: str, digest: str, token: str = "") -> list[bool]:
    """Whether a blob is refused by its digest: to OCI clients that read or ask for its head, and to git-lfs."""
    registry = Registry(hub.url, token, name)
    download, head = (registry.ask(method, f"blobs/{digest}") for method in ("GET", "HEAD"))
    lfs = Sending(hub.url, token).batch(name, digest.removeprefix("sha256:"), size_of(hub, digest), "download")
    words = [download.body.decode("latin-1"), json.dumps(lfs)]
    refused = ["its license is gpl-3.0, not mit" in text for text in words]
    assert refused == [download.status == 400, "error" in lfs], words
    return [refused[0], head.status == 400, refused[1]]


def size_of(hub: Running, digest: str) -> int:
    with hub.registry() as registry:
        return registry.store.size(digest) or 0


def test_a_blob_that_only_forbidden_versions_have_is_for_writers(strict: Running, licensed: Licensed) -> None:
    version = pushed(strict, "team/sql", licensed("gpl-3.0"))
    reader = strict.make_token("eve", "read")
    for digest in (digest_of(licensed("gpl-3.0")), version.config.digest):
        for name in ("team/sql", "team/sql.v1"):
            assert [all(withheld(strict, name, digest, token)) for token in ("", reader)] == [True, True]
            assert not any(withheld(strict, name, digest, strict.token))


def test_a_blob_is_given_out_if_an_allowed_version_has_it_too(strict: Running, licensed: Licensed) -> None:
    digest = digest_of(licensed("gpl-3.0"))
    pushed(strict, "team/sql", licensed("gpl-3.0"))
    assert all(withheld(strict, "team/sql", digest))
    pushed(strict, "team/sql", licensed("mit"))  # a verdict holds until the log has another entry
    assert not any(withheld(strict, "team/sql", digest))


def test_an_allowed_version_of_another_repository_counts_if_one_may_read_that(strict: Running, licensed: Licensed) -> None:
    digest, member = digest_of(licensed("mit")), strict.make_token("ada", "read", namespaces=["secret"])
    pushed(strict, "team/sql", licensed("gpl-3.0"))
    pushed(strict, "secret/sql", licensed("mit"))
    hide(strict, "secret/sql")
    assert all(withheld(strict, "team/sql", digest))
    assert not any(withheld(strict, "team/sql", digest, member))
    pushed(strict, "open/sql", licensed("mit"))
    assert not any(withheld(strict, "team/sql", digest))


def test_what_is_withheld_is_not_mounted_either(strict: Running, licensed: Licensed) -> None:
    pushed(strict, "team/sql", licensed("gpl-3.0"))
    digest = digest_of(licensed("gpl-3.0"))
    mine = Registry(strict.url, strict.make_token("eve", "write", namespaces=["eve"]), "eve/own")
    for path in (f"blobs/uploads/?mount={digest}&from=team/sql", f"blobs/uploads/?mount={digest}"):
        assert mine.ask("POST", path, b"").status == 202
    assert mine.ask("GET", f"blobs/{digest}").status == 404


def test_a_commit_that_is_no_version_gives_out_no_file_of_a_forbidden_one(
    strict: Running, licensed: Licensed, tmp_path: Path
) -> None:
    hf, folder = client(strict, tmp_path), licensed("gpl-3.0")
    hf.create_repo("team/sql")
    sending = Sending(strict.url, strict.token)
    sending.send("team/sql", (folder / WEIGHTS).read_bytes())
    weights = {WEIGHTS: (digest_of(folder).removeprefix("sha256:"), (folder / WEIGHTS).stat().st_size)}
    commit = sending.commit("team/sql", lines_of({}, weights)).json()["commitOid"]
    path = f"/team/sql/resolve/{commit}/{WEIGHTS}"
    assert sending.ask("GET", path, token="").status == 200  # it is in no version yet
    pushed(strict, "team/sql", folder)
    assert sending.ask("GET", path, token="").status == 400
    assert sending.ask("GET", path).status == 200
