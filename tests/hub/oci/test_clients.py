"""oras, skopeo, cosign, buildah and our own client at a hub, as their users run them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub.errors import HfHubHTTPError

from adapterhub.manifest import oci_manifest
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import commit_id
from adapterhub.remotes import attached_signatures
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub.trust import cosign, keys
from tests.conftest import Run, need_program
from tests.hub.conftest import Running, client, serving
from tests.hub.oci.conftest import Peer, logged_in
from tests.hub.web.conftest import Visitor
from tests.support.registry import docker_config, listed

pytestmark = pytest.mark.peer


@pytest.fixture
def host(hub: Running) -> str:
    """Where clients of registries find the hub."""
    return urlsplit(hub.url).netloc


def same(folder: Path, other_folder: Path) -> bool:
    """Whether two folders have the same files but for adapter.json."""
    names = {path.name for path in other_folder.iterdir()} - {"adapter.json"}
    return names == {path.name for path in folder.iterdir()} and all(
        (folder / name).read_bytes() == (other_folder / name).read_bytes() for name in names
    )


def test_what_oras_pushes_is_a_version_for_everybody(
    hub: Running, host: str, peer: Peer, hf: Any, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    output = peer(
        "oras",
        "push",
        "--plain-http",
        f"{host}/team/sql:prod,stable",
        *(path.name for path in adapter(1).iterdir()),
        cwd=adapter(1),
    )
    assert "no adapter.json" in output
    peer("oras", "pull", "--plain-http", f"{host}/team/sql:stable", "-o", tmp_path / "pulled")
    assert same(adapter(1), tmp_path / "pulled")
    assert peer("oras", "repo", "tags", "--plain-http", f"{host}/team/sql").split() == ["latest", "prod", "stable", "v1"]
    digest = peer("oras", "resolve", "--plain-http", f"{host}/team/sql:prod").strip()
    for revision in ("main", "prod", "v1", commit_id(digest)):
        out = Path(hf.snapshot_download("team/sql", revision=revision, cache_dir=tmp_path / "cache"))
        assert (out.name, same(adapter(1), out)) == (commit_id(digest), True)


def test_what_hf_uploads_is_pulled_by_oras_under_its_digest(
    hub: Running, host: str, peer: Peer, hf: Any, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    hf.create_repo("team/sql")
    commit = hf.upload_folder(folder_path=adapter(1), repo_id="team/sql")
    digest = oci_manifest.build(adapter(1)).digest
    assert commit.oid == commit_id(digest)
    for reference in (f"@{digest}", ":latest", ":v1"):
        out = tmp_path / reference.replace(":", "-")
        peer("oras", "pull", "--plain-http", f"{host}/team/sql{reference}", "-o", out)
        assert same(adapter(1), out)
        assert (out / "adapter.json").is_file()


def test_oras_attaches_and_discovers(host: str, peer: Peer, hub: Running, adapter: Callable[..., Path], tmp_path: Path) -> None:
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
    (tmp_path / "scan.json").write_text("{}")
    at = f"{host}/team/sql:v1"
    peer("oras", "attach", "--plain-http", "--artifact-type", "application/vnd.scan", at, "scan.json:application/json")
    assert "application/vnd.scan" in peer("oras", "discover", "--plain-http", at)
    output = peer("oras", "discover", "--plain-http", "--format", "json", "--artifact-type", "application/vnd.other", at)
    assert not json.loads(output)["manifests"]


def test_skopeo_copies_both_ways_and_logs_in(
    hub: Running, host: str, peer: Peer, hf: Any, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    with hub.registry() as registry:
        version = registry.push(adapter(1), Ref("team/sql"))
    peer("skopeo", "login", "--tls-verify=false", "-u", "any", "-p", hub.token, host)
    assert "invalid username/password" in peer("skopeo", "login", "--tls-verify=false", "-u", "any", "-p", "x", host, code=1)
    peer("skopeo", "login", "--tls-verify=false", "-u", "any", "-p", hub.token, host)
    peer("skopeo", "copy", "--src-tls-verify=false", f"docker://{host}/team/sql", "oci:layout:x")
    peer("skopeo", "copy", "--dest-tls-verify=false", "oci:layout:x", f"docker://{host}/team/mirror:v1")
    out = Path(hf.snapshot_download("team/mirror", revision="v1", cache_dir=tmp_path / "cache"))
    assert (out.name, same(adapter(1), out)) == (commit_id(version.digest), True)
    # Nobody reads what is public.
    peer(
        "skopeo",
        "inspect",
        "--raw",
        "--tls-verify=false",
        f"docker://{host}/team/mirror",
        REGISTRY_AUTH_FILE=str(tmp_path / "none"),
    )
    assert "cannot be removed alone" in peer(
        "skopeo", "delete", "--tls-verify=false", f"docker://{host}/team/mirror:v1", code=1
    )


@pytest.mark.parametrize("options", [(), ("--registry-referrers-mode=oci-1-1",)], ids=["tags", "referrers"])
def test_cosign_signs_and_verifies(
    host: str, peer: Peer, hub: Running, adapter: Callable[..., Path], options: tuple[str, ...]
) -> None:
    with hub.registry() as registry:
        digest = registry.push(adapter(1), Ref("team/sql")).digest
    settings = {"COSIGN_PASSWORD": "", "COSIGN_EXPERIMENTAL": "1" if options else "0"}
    peer("cosign", "generate-key-pair", **settings)
    at = f"{host}/team/sql@{digest}"
    sign = ("sign", "--yes", "--allow-http-registry", "--tlog-upload=false", "--key", "cosign.key", *options, at)
    peer("cosign", *sign, **settings)
    verify = ("--allow-http-registry", "--insecure-ignore-tlog", "--key", "cosign.pub", at)
    assert digest in peer("cosign", "verify", *(["--experimental-oci11"] if options else []), *verify, **settings)
    if options:
        assert "cosign" in peer("oras", "discover", "--plain-http", at)


def test_cosign_verifies_what_is_signed_for_it_here(
    host: str, peer: Peer, hub: Running, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    with hub.registry() as registry:
        digest = registry.push(adapter(1), Ref("team/sql")).digest
    secret, public = keys.generate(tmp_path / "key")
    with OciRepository(
        OciAddress.parse(f"oci+http://{host}/team/sql"), docker_config(tmp_path / "docker", host, hub.token)
    ) as at:
        manifest = at.manifest("v1")
        for _ in range(2):  # the second goes along with the first
            attached_signatures.attach(at, manifest, cosign.sign(digest, "team/sql", keys.read_private(secret)))
        assert at.tags() == ["latest", "v1"]
    verify = ("verify", "--allow-http-registry", "--insecure-ignore-tlog", "--key", str(public.source))
    assert digest in peer("cosign", *verify, f"{host}/team/sql@{digest}", COSIGN_PASSWORD="")


@pytest.mark.parametrize("options", [(), ("--registry-referrers-mode=oci-1-1",)], ids=["tags", "referrers"])
def test_a_policy_is_met_by_what_cosign_signs_at_the_hub(
    tmp_path: Path, adapter: Callable[..., Path], options: tuple[str, ...]
) -> None:
    settings = {"COSIGN_PASSWORD": "", "COSIGN_EXPERIMENTAL": "1" if options else "0"}
    policy = Policy("the hub", signers=(("team/*", (tmp_path / "cosign.pub",)),))
    with serving(tmp_path / "hub", policy=policy) as hub:
        host = urlsplit(hub.url).netloc
        environ = {**os.environ, **settings, **logged_in(host, hub.token or "", tmp_path / "home")}

        def cosign(*words: str) -> None:
            subprocess.run([need_program("cosign"), *words], check=True, cwd=tmp_path, env=environ, capture_output=True)

        cosign("generate-key-pair")
        with hub.registry() as registry:
            digest = registry.push(adapter(1), Ref("free/sql")).digest
        hf = client(hub, tmp_path)
        with pytest.raises(HfHubHTTPError, match="is not signed"):
            hf.move_repo("free/sql", "team/sql")
        sign = ("sign", "--yes", "--allow-http-registry", "--tlog-upload=false", "--key=cosign.key")
        cosign(*sign, *options, f"{host}/free/sql@{digest}")
        hf.move_repo("free/sql", "team/sql")
        assert "a key that it does not name verified by this hub’s policy" in Visitor(hub).get("/team/sql").text


def test_cosign_attests_in_the_bundle_of_sigstore(
    host: str, peer: Peer, hub: Running, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    with hub.registry() as registry:
        at = f"{host}/team/sql@{registry.push(adapter(1), Ref('team/sql')).digest}"
    (tmp_path / "predicate.json").write_text("{}")
    peer("cosign", "generate-key-pair", COSIGN_PASSWORD="")
    options = ("--new-bundle-format", "--allow-http-registry", "--tlog-upload=false", "--key", "cosign.key")
    peer("cosign", "attest", "--yes", *options, "--predicate", "predicate.json", at, COSIGN_PASSWORD="")
    assert "application/vnd.dev.sigstore.bundle.v0.3+json" in peer("oras", "discover", "--plain-http", at)


def test_writers_at_once_get_a_number_each(host: str, hub: Running, adapter: Callable[..., Path], tmp_path: Path) -> None:
    config, seeds = docker_config(tmp_path / "docker", host, hub.token), range(1, 7)
    folders = [adapter(seed) for seed in seeds]

    def push(folder: Path) -> tuple[int | None, str]:
        with OciRepository(OciAddress.parse(f"oci+http://{host}/team/sql"), config) as remote:
            copied = copy_version(AdapterFolder(folder), "latest", remote, folder.name)
        return copied.put_result.number, copied.manifest.digest

    with ThreadPoolExecutor(len(folders)) as pool:
        pushed = list(pool.map(push, folders))
    assert sorted(number or 0 for number, _ in pushed) == list(seeds)
    with hub.registry() as registry:
        for number, digest in pushed:
            assert registry.resolve(Ref("team/sql", number=number)).digest == digest


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="without root, buildah needs a machine set up for that"
)
def test_buildah_pushes_an_image_and_pulls_it(host: str, peer: Peer, adapter: Callable[..., Path], tmp_path: Path) -> None:
    store = ("--root", tmp_path / "store", "--runroot", tmp_path / "run", "--storage-driver", "vfs")
    container = peer("buildah", *store, "from", "scratch").split()[-1]
    peer("buildah", *store, "copy", container, adapter(1), "/models")
    peer("buildah", *store, "commit", container, "app")
    peer("buildah", *store, "push", "--tls-verify=false", "app", f"docker://{host}/team/app:v1")
    peer("buildah", *store, "rmi", "--all", "--force")
    peer("buildah", *store, "pull", "--tls-verify=false", f"{host}/team/app:v1")


def test_our_own_client_pushes_pulls_lists_and_copies(
    host: str, run: Run, hub: Running, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    env = {"DOCKER_CONFIG": str(docker_config(tmp_path / "docker", host, hub.token).parent)}
    at = f"oci+http://{host}/team/sql"
    for seed, tag in ((1, "prod"), (2, "test")):
        pushed = json.loads(run("push", adapter(seed), f"{at}:{tag}", "--json", env=env).stdout)
        assert (pushed["number"], pushed["digest"]) == (seed, oci_manifest.build(adapter(seed)).digest)
    assert listed(run("list", at, env=env).stdout) == [f"{at}:v2", f"{at}:v1"]
    assert run("list", f"oci+http://{host}", env=env).stdout.split() == ["team/sql"]
    run("pull", f"{at}:prod", "-o", "out", env=env)
    assert same(adapter(1), tmp_path / "out")
    run("copy", f"{at}:v1", f"oci+http://{host}/team/copy:v1", env=env)
    run("tag", f"{at}:v1", "stable", env=env)
    run("rm", f"{at}:test", env=env)
    with hub.registry() as registry:
        assert registry.resolve(Ref("team/copy")).digest == registry.resolve(Ref("team/sql", tag="stable")).digest
        assert registry.resolve(Ref("team/sql", number=2)).tags == ("latest",)
    run("push", adapter(1), f"{at}:image", "--to", "image", env=env)
    run("pull", f"{at}:image", "-o", "image", env=env)
    assert same(adapter(1), tmp_path / "image")
