"""The programs of others see what we push, and we what they push: docker-registry, oras, skopeo."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.manifest import oci_manifest
from adapterhub.registry.registry import Registry
from tests.conftest import Run, need_program
from tests.support import registry
from tests.support.registry import listed

Make = Callable[..., Path]
pytestmark = pytest.mark.peer


def call(*command: object, cwd: Path | None = None) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60, cwd=cwd).stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_oras_and_skopeo_get_the_bytes_that_were_pushed(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    source = make()
    pushed = json.loads(run("push", source, f"oci://{host}/peers/sql:prod", "--json").stdout)
    call(need_program("oras"), "pull", "--plain-http", f"{host}/peers/sql:prod", "--output", tmp_path / "oras")
    run("pull", f"oci://{host}/peers/sql:prod", "-o", "ours")
    assert contents(tmp_path / "oras") == contents(tmp_path / "ours")
    assert contents(source).items() <= contents(tmp_path / "ours").items()

    skopeo, digest_file = need_program("skopeo"), tmp_path / "digest"
    call(
        skopeo,
        "copy",
        "--src-tls-verify=false",
        f"--digestfile={digest_file}",
        f"docker://{host}/peers/sql:prod",
        "oci:x:y",
        cwd=tmp_path,
    )
    assert digest_file.read_text() == pushed["digest"] == oci_manifest.build(source).digest
    blobs = {path.name for path in (tmp_path / "x/blobs/sha256").iterdir()}
    manifest = oci_manifest.build(source)
    assert blobs == {
        digest[7:] for digest in (manifest.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers))
    }


def test_what_oras_pushed_of_a_plain_folder_becomes_an_adapter_with_a_manifest(
    make: Make, run: Run, host: str, tmp_path: Path
) -> None:
    source, oras = make(), need_program("oras")
    call(oras, "push", "--plain-http", f"{host}/peers/plain:v1", *sorted(path.name for path in source.iterdir()), cwd=source)
    result = run("pull", f"oci://{host}/peers/plain:v1")
    assert "adapter.json: it was derived" in result.stderr
    assert {key: value for key, value in contents(tmp_path / "plain").items() if key != "adapter.json"} == contents(source)
    # The same files have the same manifest, and so the same digest, as if they had been pushed here.
    copied = json.loads(run("copy", f"oci://{host}/peers/plain:v1", "team/plain", "--json").stdout)
    assert copied["digest"] == oci_manifest.build(source).digest
    run("verify", "team/plain")


def test_a_packed_folder_and_pickles_are_refused_by_name(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    source, oras = make("packed"), need_program("oras")
    call(oras, "push", "--plain-http", f"{host}/peers/packed:v1", source.name, cwd=tmp_path)
    result = run("pull", f"oci://{host}/peers/packed:v1", "-o", "out", code=6)
    assert "packed: files of type 'packed' are not packaged" in result.stderr
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/weights.bin").write_bytes(b"\x80\x04")
    (tmp_path / "evil/notes.txt").write_bytes(b"\x80\x04.")
    for name, reason in (("weights.bin", "a pickle can run code"), ("notes.txt", "a pickle or an archive")):
        call(oras, "push", "--plain-http", f"{host}/peers/evil:v1", name, cwd=tmp_path / "evil")
        result = run("pull", f"oci://{host}/peers/evil:v1", "-o", "out", code=6)
        assert reason in result.stderr
        run("copy", f"oci://{host}/peers/evil:v1", "team/evil", code=6)
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


def test_one_digest_from_folder_to_registry_to_registry_and_back(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    source = make()
    digest = oci_manifest.build(source).digest

    def resulting_digest(*words: object) -> str:
        return str(json.loads(run(*words, "--json").stdout)["digest"])

    run("init", ".")
    assert resulting_digest("push", source, "team/sql:prod") == digest
    assert resulting_digest("push", "team/sql:prod", f"oci://{host}/chain/one:v1") == digest
    assert resulting_digest("copy", f"oci://{host}/chain/one:v1", f"oci://{host}/chain/two:v1") == digest
    assert resulting_digest("copy", f"oci://{host}/chain/two:v1", "team/back:prod") == digest
    assert resulting_digest("copy", "team/back:prod", "team/again") == digest
    assert resulting_digest("pull", f"oci://{host}/chain/two@{digest}", "-o", "out") == digest
    assert oci_manifest.build(tmp_path / "out").digest == digest
    with Registry.open(tmp_path) as registry_:
        assert fsck(registry_) == []
    assert listed(run("list", f"oci://{host}/chain/two").stdout) == [f"oci://{host}/chain/two:v1"]
    assert json.loads(run("list", f"oci://{host}/chain/two", "--json").stdout)["tags"] == ["v1"]
    assert run("validate", f"oci://{host}/chain/two:v1").stdout.endswith("ok: nothing to report\n")


def test_a_second_push_sends_nothing(make: Make, run: Run, host: str) -> None:
    source = make()
    first = json.loads(run("push", source, f"oci://{host}/again/sql", "--json").stdout)
    assert first["sent"] > first["size"] - 1
    assert json.loads(run("push", source, f"oci://{host}/again/sql:other", "--json").stdout)["sent"] == 0
    assert run("push", source, f"oci://{host}/again/sql").stdout.startswith("already there: ")


def test_from_a_repository_of_the_same_registry_blobs_are_mounted(make: Make, run: Run, host: str) -> None:
    source = make()
    run("push", source, f"oci://{host}/mount/one")
    document = json.loads(run("copy", f"oci://{host}/mount/one", f"oci://{host}/mount/two", "--json").stdout)
    assert (document["sent"], document["digest"]) == (0, oci_manifest.build(source).digest)
    run("pull", f"oci://{host}/mount/two", "-o", "out")


def test_a_password_is_taken_from_docker_s_config_and_never_shown(make: Make, run: Run, tmp_path: Path) -> None:
    (tmp_path / "behind").mkdir()
    with registry.running(tmp_path / "behind", password=True) as host:
        address = f"oci://{host}/private/sql:v1"
        nobody = {"DOCKER_CONFIG": str(tmp_path / "nothing")}
        right = {"DOCKER_CONFIG": str(registry.docker_config(tmp_path / "right", host).parent)}
        wrong = {"DOCKER_CONFIG": str(registry.docker_config(tmp_path / "wrong", host, "not-the-password").parent)}
        for env in (nobody, wrong):
            result = run("push", make(), address, env=env, code=5)
            assert f"Log in with `adapterhub login {host}`" in result.stderr
            assert "not-the-password" not in result.stderr + result.stdout
        run("push", make(), address, env=right)
        run("pull", address, "-o", "nothing-comes", env=nobody, code=5)
        assert run("pull", address, "-o", "out", env=right).stdout.endswith("verified\n")
        assert address in run("list", f"oci://{host}/private/sql", env=right).stdout
        # The same file as oras writes it and a helper as docker has it.
        call(
            need_program("oras"),
            "login",
            "--plain-http",
            "--registry-config",
            tmp_path / "oras.json",
            "-u",
            registry.USER,
            "-p",
            registry.PASSWORD,
            host,
        )
        (tmp_path / "by-oras").mkdir()
        (tmp_path / "oras.json").rename(tmp_path / "by-oras/config.json")
        run("pull", address, "-o", "again", env={"DOCKER_CONFIG": str(tmp_path / "by-oras")})


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_a_credential_helper_is_asked(make: Make, run: Run, tmp_path: Path, key: str) -> None:
    (tmp_path / "behind").mkdir()
    with registry.running(tmp_path / "behind", password=True) as host:
        answer = json.dumps({"ServerURL": host, "Username": registry.USER, "Secret": registry.PASSWORD})
        helper = tmp_path / "bin" / "docker-credential-test"
        helper.parent.mkdir()
        helper.write_text(f"#!/bin/sh\nread asked\n[ \"$1 $asked\" = 'get {host}' ] && echo '{answer}'\n")
        helper.chmod(0o755)
        (tmp_path / "docker").mkdir()
        (tmp_path / "docker/config.json").write_text(json.dumps({key: "test" if key == "credsStore" else {host: "test"}}))
        env = {"DOCKER_CONFIG": str(tmp_path / "docker"), "PATH": f"{helper.parent}:/usr/bin:/bin"}
        run("push", make(), f"oci://{host}/private/sql", env=env)


def test_fsck_puts_back_from_a_registry_what_is_lost_or_damaged(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    run("init", ".")
    run("push", make(), "team/sql")
    run("push", "team/sql", f"oci://{host}/repair/sql")
    with Registry.open(tmp_path) as registry_:
        manifest = oci_manifest.build(tmp_path / "adapter")
        lost = [
            registry_.store.blob_path(digest) for digest in (manifest.digest, manifest.config.digest, manifest.layers[0].digest)
        ]
        damaged = registry_.store.blob_path(manifest.layers[1].digest)
    for path in lost:
        path.unlink()
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    run("fsck", code=1)
    result = run("fsck", "--repair", "--from", f"oci://{host}/repair/sql")
    assert "restored 4 blobs" in result.stderr
    run("verify", "team/sql")


def test_show_and_verify_take_an_address(make: Make, run: Run, host: str) -> None:
    address = f"oci://{host}/cli/shown:v1"
    run("push", folder := make("sql"), address)
    assert json.loads(run("show", address, "--json").stdout)["digest"] == oci_manifest.build(folder).digest
    assert json.loads(run("verify", address, "--json").stdout)["ok"] is True


def test_a_layout_has_no_commits(make: Make, run: Run, tmp_path: Path) -> None:
    assert "commit" not in run("push", make("sql"), f"layout://{tmp_path / 'x.tar'}:v1").stderr
