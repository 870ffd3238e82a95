"""Bundles: what goes in comes out, verified, by its name, and without a network."""

from __future__ import annotations

import json
import socket
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from tests.conftest import Run, need_program
from tests.remotes.test_oci_peers import call, contents

Make = Callable[..., Path]

# A process that touches a network ends with 99.
CUT_OFF = """
import os, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        os.write(2, b"NETWORK TOUCHED\\n")
        os._exit(99)
sys.addaudithook(refuse)
"""


@pytest.fixture
def filled(make: Make, run: Run) -> None:
    """A registry with team/sql (v1, v2, prod, 1.2.0) and team/chat."""
    run("init", ".")
    run("push", make("one"), "team/sql:1.2.0")
    run("push", make("two", 1), "team/sql:prod")
    run("push", make("three", 2), "team/chat")


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("out", ["x.tar", "x"])
def test_what_was_bundled_is_pulled_by_its_name_without_a_network(run: Run, tmp_path: Path, out: str) -> None:
    document = json.loads(run("bundle", "team/sql:prod", "team/sql:v1", "team/chat", "-o", out, "--json").stdout)
    assert [version["ref"] for version in document["versions"]] == ["team/sql:prod", "team/sql:v1", "team/chat:v1"]
    if out == "x":
        assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["blobs", "index.json", "oci-layout"]
    away = tmp_path / "away"
    away.mkdir()
    (tmp_path / out).rename(away / out)
    for ref, folder in (("team/sql:prod", "two"), ("team/sql:v1", "one"), ("team/chat", "three"), ("team/chat:v1", "three")):
        for options in (["--offline"], []):
            document = run("pull", ref, "--from", out, "-o", "out", *options, cwd=away, first=CUT_OFF)
            assert oci_manifest.build(away / "out").digest == oci_manifest.build(tmp_path / folder).digest
            assert document.stdout.endswith("verified\n")
            for path in (away / "out").iterdir():
                path.unlink()
    digest = oci_manifest.build(tmp_path / "two").digest
    run("pull", f"team/sql@{digest[:20]}", "--from", out, "-o", "by-digest", cwd=away, first=CUT_OFF)
    assert "ambiguous: team/sql:prod, team/sql:v1" in run("pull", "team/sql", "--from", out, cwd=away, code=2).stderr
    assert "no such version in the bundle" in run("pull", "team/sql:v9", "--from", out, cwd=away, code=3).stderr
    assert "no such version in the bundle" in run("pull", "team/other", "--from", out, cwd=away, code=3).stderr
    copied = run("copy", f"layout://{out}:team/sql:prod", "team/sql", "--registry", "there", "--json", cwd=away, first=CUT_OFF)
    assert json.loads(copied.stdout)["digest"] == digest
    run("verify", "team/sql", "--registry", "there", cwd=away)


@pytest.mark.usefixtures("filled")
def test_a_range_means_the_highest_tag_in_the_bundle(make: Make, run: Run, tmp_path: Path) -> None:
    run("push", make("two", 1), "team/sql:1.3.0")
    run("bundle", "team/sql:1.2.0", "team/sql:1.3.0", "-o", "x.tar")
    run("pull", "team/sql:^1.2", "--from", "x.tar", "-o", "out")
    assert oci_manifest.build(tmp_path / "out").digest == oci_manifest.build(tmp_path / "two").digest


@pytest.mark.usefixtures("filled")
def test_the_same_versions_make_the_same_tar(run: Run, tmp_path: Path) -> None:
    run("bundle", "team/sql:v1", "team/chat:v1", "-o", "a.tar")
    run("bundle", "team/chat:v1", "team/sql:v1", "team/sql:v1", "-o", "b.tar")
    run("bundle", "layout://a.tar:team/sql:v1", "oci-archive:b.tar:team/chat:v1", "-o", "c.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes() == (tmp_path / "c.tar").read_bytes()
    assert "already exists" in run("bundle", "team/sql", "-o", "a.tar", code=2).stderr
    run("pack")
    run("bundle", "team/sql:v1", "team/chat:v1", "-o", "d.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "d.tar").read_bytes()


def test_parents_come_along_as_far_as_they_are_here(make: Make, run: Run, tmp_path: Path) -> None:
    run("init", ".")
    run("push", make("one"), "team/one")
    run("merge", "team/one", make("two", 1), "-o", "merged")
    run("push", "merged", "team/merged")
    run("push", "team/merged", "team/small", "--to", "gguf", code=None)  # its base isn't here: refused or not, not the point
    alone = json.loads(run("bundle", "team/merged", "-o", "a.tar", "--json").stdout)
    assert [version["ref"] for version in alone["versions"]] == ["team/merged:v1"]
    result = run("bundle", "team/merged", "--with-parents", "-o", "b.tar", "--json")
    document = json.loads(result.stdout)
    assert [version["ref"] for version in document["versions"]] == ["team/merged:v1", "team/one:v1"]
    assert document["missing"] == [oci_manifest.build(tmp_path / "two").digest]
    assert f"not included: the parent {document['missing'][0]}" in result.stderr
    assert (
        "all of these are addresses"
        in run("bundle", "layout://b.tar:team/one:v1", "--with-parents", "-o", "c.tar", code=2).stderr
    )


@pytest.mark.usefixtures("filled")
def test_damage_anywhere_leaves_no_bundle_and_no_folder(run: Run, tmp_path: Path) -> None:
    manifest = oci_manifest.build(tmp_path / "one")
    run("bundle", "team/sql:v1", "-o", "good.tar")
    with tarfile.open(tmp_path / "good.tar") as tar:
        blobs = [member for member in tar.getmembers() if member.name.startswith("blobs/")]
    needed = {digest[7:] for digest in (manifest.digest, *(layer.digest for layer in manifest.layers))}
    for member in blobs:
        data = bytearray((tmp_path / "good.tar").read_bytes())
        data[member.offset_data] ^= 1
        (tmp_path / "bad.tar").write_bytes(data)
        if member.name[13:] in needed:
            run("pull", "team/sql:v1", "--from", "bad.tar", "-o", f"out-{member.name[13:]}", code=4)
        else:  # the config
            run("copy", "layout://bad.tar:team/sql:v1", "team/again", "--registry", ".out-here", code=4)
            run("bundle", "layout://bad.tar:team/sql:v1", "-o", "worse", code=4)
        run("bundle", "layout://bad.tar:team/sql:v1", "-o", "worse.tar", code=4)
    blob = tmp_path / ".adapterhub/blobs/sha256" / manifest.layers[-1].digest[7:]
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    run("bundle", "team/sql:v1", "-o", "worse.tar", code=4)
    run("bundle", "team/sql:v1", "-o", "worse", code=4)
    names = {path.name for path in tmp_path.iterdir()} - {".adapterhub", "registry.db", "one", "two", "three"}
    names = {name for name in names if not name.startswith(("registry.db", ".out-"))}  # what came of a pull and was right
    assert names == {"good.tar", "bad.tar"}


def test_two_versions_that_would_have_one_name_are_not_bundled(make: Make, run: Run, tmp_path: Path) -> None:
    for seed in (1, 2):
        run("push", make(f"a{seed}", seed), f"layout://x{seed}:v1")
    error = "error: v1: two different versions would have this name. Bundle them separately  [invalid-usage]\n"
    assert run("bundle", "layout://x1:v1", "layout://x2:v1", "-o", "b.tar", code=2).stderr == error
    assert not (tmp_path / "b.tar").exists()


@pytest.mark.usefixtures("filled")
def test_offline_refuses_what_is_elsewhere_before_it_is_asked(run: Run) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        elsewhere = f"oci://127.0.0.1:{server.getsockname()[1]}/team/sql:v1"
        assert "--offline allows none" in run("pull", elsewhere, "--offline", first=CUT_OFF, code=2).stderr
        assert run("pull", elsewhere, first=CUT_OFF, code=None).returncode == 99  # and so the hook sees
    run("pull", "team/sql:v1", "--offline", first=CUT_OFF)
    result = run("pull", "team/chat", "--to", "gguf", "--base", "hf://org/base", "--offline", first=CUT_OFF, code=2)
    assert "hf://org/base: needs a network" in result.stderr
    run("pull", "team/chat", "--from", elsewhere, first=CUT_OFF, code=2)
    run("pull", elsewhere, "--from", "x.tar", first=CUT_OFF, code=2)
    run("bundle", "one", "-o", "x.tar", code=2)


@pytest.mark.peer
@pytest.mark.usefixtures("filled")
def test_skopeo_and_oras_pick_one_of_a_bundle(run: Run, host: str, tmp_path: Path) -> None:
    run("bundle", "team/sql:v2", "team/chat:v1", "-o", "x.tar")
    skopeo, oras = need_program("skopeo"), need_program("oras")
    raw = call(skopeo, "inspect", "--raw", "oci-archive:x.tar:team/sql:v2", cwd=tmp_path)
    assert raw.encode() == oci_manifest.build(tmp_path / "two").raw
    target = f"docker://{host}/bundled/sql:v2"
    call(skopeo, "copy", "--dest-tls-verify=false", "oci-archive:x.tar:team/sql:v2", target, cwd=tmp_path)
    run("pull", f"oci://{host}/bundled/sql:v2", "-o", "by-skopeo")
    assert oci_manifest.build(tmp_path / "by-skopeo").digest == oci_manifest.build(tmp_path / "two").digest
    digest = oci_manifest.build(tmp_path / "three").digest
    call(oras, "pull", "--oci-layout", f"x.tar@{digest}", "-o", "by-oras", cwd=tmp_path)
    assert contents(tmp_path / "three").items() <= contents(tmp_path / "by-oras").items()
    call(oras, "copy", "--from-oci-layout", f"x.tar@{digest}", "--to-plain-http", f"{host}/bundled/chat:v1", cwd=tmp_path)
    run("pull", f"oci://{host}/bundled/chat:v1", "-o", "out")
    result = subprocess.run([skopeo, "inspect", "--raw", "oci-archive:x.tar"], cwd=tmp_path, capture_output=True, check=False)
    assert result.returncode != 0  # of two, it wants a name


@pytest.mark.peer
@pytest.mark.usefixtures("filled")
def test_versions_of_registries_elsewhere_are_bundled(run: Run, host: str, tmp_path: Path) -> None:
    run("push", "team/sql:v1", f"oci://{host}/some/where/sql:prod")
    document = json.loads(run("bundle", f"oci://{host}/some/where/sql:prod", "team/chat", "-o", "x.tar", "--json").stdout)
    assert [version["ref"] for version in document["versions"]] == ["team/chat:v1", "where/sql:prod"]
    run("pull", "where/sql:prod", "--from", "x.tar")
    assert oci_manifest.build(tmp_path / "sql").digest == oci_manifest.build(tmp_path / "one").digest
