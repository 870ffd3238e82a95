"""buildah builds with the images that we push, and cosign signs what we push."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.conftest import Run, need_program
from tests.registry.test_packaging import write_base
from tests.support.adapters import Make

pytestmark = pytest.mark.peer


def call(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    # The password of the key of a test, which cosign would ask for.
    env = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(cwd), "COSIGN_PASSWORD": "", "COSIGN_EXPERIMENTAL": "1"}
    result = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_image_comes_back_from_buildah_as_the_adapter_it_is(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    buildah, image = _buildah(tmp_path), f"{host}/images/buildah:v1"
    run("push", make(), f"oci://{image}", "--to", "image")
    pulled = json.loads(run("pull", f"oci://{image}", "-o", "ours", "--json").stdout)
    call(*buildah, "pull", "--tls-verify=false", f"docker://{image}", cwd=tmp_path)
    call(*buildah, "push", image, "oci-archive:back.tar:v1", cwd=tmp_path)
    assert json.loads(run("pull", "oci-archive:back.tar:v1", "-o", "back", "--json").stdout)["digest"] == pulled["digest"]


def test_a_containerfile_copies_the_adapter_out_of_its_image(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    buildah, image, source = _buildah(tmp_path), f"{host}/images/stage:v1", make()
    run("push", source, f"oci://{image}", "--to", "image")
    (tmp_path / "context").mkdir()
    (tmp_path / "context/Containerfile").write_text(f"FROM scratch\nCOPY --from={image} /models /adapter\n")
    call(*buildah, "build", "--isolation=chroot", "--tls-verify=false", "--tag=built", "context", cwd=tmp_path)
    call(*buildah, "push", "--disable-compression", "built", "dir:built", cwd=tmp_path)
    manifest = json.loads((tmp_path / "built/manifest.json").read_text())
    (layer,) = (tmp_path / "built" / entry["digest"].partition(":")[2] for entry in manifest["layers"])
    with tarfile.open(layer) as tar:
        tar.extractall(tmp_path / "layer", filter="data")
    built = {path.name: path.read_bytes() for path in (tmp_path / "layer/adapter").iterdir()}
    assert {path.name: path.read_bytes() for path in source.iterdir()}.items() <= built.items()


def test_cosign_signs_and_verifies_a_version_and_its_signature_is_no_version(
    make: Make, run: Run, host: str, tmp_path: Path
) -> None:
    cosign, insecure = need_program("cosign"), ("--allow-insecure-registry", "--allow-http-registry")
    pushed = json.loads(run("push", make(), f"oci://{host}/signed/sql:v1", "--json").stdout)["digest"]
    call(cosign, "generate-key-pair", cwd=tmp_path)
    version = f"{host}/signed/sql@{pushed}"
    call(cosign, "sign", "--key=cosign.key", "--tlog-upload=false", "--yes", *insecure, version, cwd=tmp_path)
    result = call(cosign, "verify", "--key=cosign.pub", "--insecure-ignore-tlog=true", *insecure, version, cwd=tmp_path)
    assert json.loads(result)[0]["critical"]["image"]["docker-manifest-digest"] == pushed
    listed = json.loads(run("list", f"oci://{host}/signed/sql", "--json").stdout)["adapters"]
    assert [manifest["digest"] for manifest in listed] == [pushed]
    assert json.loads(run("pull", f"oci://{host}/signed/sql:v1", "-o", "out", "--json").stdout)["digest"] == pushed


def test_cosign_verifies_an_attestation_of_ours_in_a_registry(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    run("push", make(), "attested/sql")
    run("key", "generate", "team")
    run("attest", "attested/sql:v1", "--fits", "base", "--key", "team.key")
    pushed = json.loads(run("push", "attested/sql:v1", f"oci://{host}/attested/sql:v1", "--json").stdout)["digest"]
    # Without roots, cosign asks the public Sigstore for them, although a key needs none.
    (tmp_path / "root.json").write_text('{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}')
    options = ("--new-bundle-format", "--trusted-root=root.json", "--insecure-ignore-tlog=true", "--key=team.pub")
    command = (need_program("cosign"), "verify-attestation", *options, "--type=urn:adapterhub:attestation:fits:1")
    call(*command, "--allow-insecure-registry", "--allow-http-registry", f"{host}/attested/sql@{pushed}", cwd=tmp_path)


COSIGN = ("--key=cosign.key", "--tlog-upload=false", "--yes", "--allow-insecure-registry", "--allow-http-registry")
POLICY = '[policy.signers]\n"*" = ["cosign.pub"]\n[policy.attestations."*"]\ntests = ["cosign.pub"]\n'
PASSED = {"result": "PASSED", "configuration": [], "evaluation": {"metrics": {"accuracy": 0.9}}}


def test_an_attestation_of_an_unknown_type_is_said(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    cosign, address = need_program("cosign"), f"oci://{host}/scanned/sql:v1"
    pushed = json.loads(run("push", make(), address, "--json").stdout)["digest"]
    call(cosign, "generate-key-pair", cwd=tmp_path)
    (tmp_path / "clean.json").write_text('{"clean": true}')
    attest = (cosign, "attest", "--new-bundle-format", "--type=https://example.com/scan", "--predicate=clean.json")
    call(*attest, *COSIGN, f"{host}/scanned/sql@{pushed}", cwd=tmp_path)
    result = run("verify", address, "--attestations", "--key", "cosign.pub", code=1)
    assert "attests 'https://example.com/scan', which is not known here" in result.stdout


@pytest.mark.parametrize("form", ["tags", "referrers"])
def test_what_cosign_2_signs_and_attests_is_verified_by_keys_and_policies(
    make: Make, run: Run, host: str, tmp_path: Path, form: str
) -> None:
    cosign, name = need_program("cosign"), f"{host}/{form}/sql"
    mode = ("--registry-referrers-mode=oci-1-1",) if form == "referrers" else ()
    pushed = json.loads(run("push", make(), f"oci://{name}:v1", "--json").stdout)["digest"]
    call(cosign, "generate-key-pair", cwd=tmp_path)
    run("key", "generate", "other")
    policy = tmp_path / "adapterhub.toml"
    policy.write_text(POLICY)
    assert "is not signed" in run("pull", f"oci://{name}:v1", "-o", "unsigned", code=6).stderr
    call(cosign, "sign", *mode, *COSIGN, f"{name}@{pushed}", cwd=tmp_path)
    assert "has no attestation 'tests'" in run("pull", f"oci://{name}:v1", "-o", "unattested", code=6).stderr
    (tmp_path / "tests.json").write_text(json.dumps(PASSED))
    type_ = "--type=https://in-toto.io/attestation/test-result/v0.1"
    call(cosign, "attest", type_, "--predicate=tests.json", *COSIGN, f"{name}@{pushed}", cwd=tmp_path)
    run("pull", f"oci://{name}:v1", "-o", "out")
    policy.unlink()
    signed = run("verify", f"oci://{name}:v1", "--key", "cosign.pub")
    assert "signed by cosign, for every name, by cosign.pub" in signed.stdout
    assert "tests attested by cosign.pub" in run("verify", f"oci://{name}:v1", "--attestations", "--key", "cosign.pub").stdout
    refused = run("verify", f"oci://{name}:v1", "--key", "other.pub", code=1)
    assert "is signed by a key that it does not name, which is not accepted" in refused.stdout
    # Both go along: into the registry, and from there to a layout and to another repository, where cosign finds the signature.
    run("copy", f"oci://{name}:v1", "team/sql")
    run("push", "team/sql", "layout://x:v1")
    run("push", "team/sql", f"oci://{name}-copy:v1")
    for source in ("team/sql", "layout://x:v1", f"oci://{name}-copy:v1"):
        run("verify", source, "--key", "cosign.pub")
        run("verify", source, "--attestations", "--key", "cosign.pub")
    options = ("--key=cosign.pub", "--insecure-ignore-tlog=true", "--allow-insecure-registry", "--allow-http-registry")
    call(cosign, "verify", "--experimental-oci11", *options, f"{name}-copy@{pushed}", cwd=tmp_path)


def _buildah(folder: Path) -> list[object]:
    """buildah with a storage of its own that needs neither a kernel's help nor a daemon."""
    return [need_program("buildah"), "--storage-driver=vfs", f"--root={folder / 'root'}", f"--runroot={folder / 'run'}"]
