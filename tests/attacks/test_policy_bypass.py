"""A policy, and a version that gets past it: what was compared with the policy is what is written, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from tests.attacks.test_hostile_servers import one_line
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.fixtures import Filled
from tests.support.web_server import Handler, Web

AGAINST = "against the policy of "


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def place(make: Make, run: Run, filled: Filled, tmp_path: Path) -> Path:
    """A registry with an adapter under Apache-2.0 and one without a license, and a project that wants the license."""

    def commands() -> None:
        for name, license_ in (("good", "license: apache-2.0"), ("bad", "license: other")):
            folder = make(name, len(name))
            (folder / "README.md").write_text(f"---\n{license_}\n---\n# A test\n")
            run("push", folder, f"team/{name}", "--registry", tmp_path / "r")
            run("pull", f"team/{name}", "-o", tmp_path / f"{name}-files", "--registry", tmp_path / "r")

    filled("place", tmp_path, commands)
    project = tmp_path / "project"
    project.mkdir()
    (project / "adapterhub.toml").write_text('[policy]\nlicenses = ["apache-2.0"]\n')
    return project


def serve(web: Web, folder: Path) -> tuple[bytes, str]:
    """Have a server be a registry with the blobs of a folder; its manifest and digest."""
    manifest = oci_manifest.build(folder)
    for layer in manifest.layers:
        web.files[f"/v2/team/sql/blobs/{layer.digest}"] = (folder / layer.path).read_bytes()
    web.files[f"/v2/team/sql/blobs/{manifest.config.digest}"] = manifest.config_bytes
    web.rules[f"/v2/team/sql/manifests/{manifest.digest}"] = lambda to: to.send(
        200, manifest.raw, **{"Content-Type": MANIFEST_TYPE}
    )
    return manifest.raw, manifest.digest


@pytest.fixture
def two_faced(web: Web, place: Path, tmp_path: Path) -> Callable[[int], str]:
    """A registry whose tag is the good version the first times that it is asked for, and then the other; its address."""

    def call(good_times: int) -> str:
        good, bad = (serve(web, tmp_path / f"{name}-files")[0] for name in ("good", "bad"))
        requests: list[bool] = []

        def manifest(to: Handler) -> None:
            raw = good if len(requests) < good_times else bad
            requests.append(to.command == "GET")
            to.send(200, raw, **{"Content-Type": MANIFEST_TYPE})

        web.rules["/v2/team/sql/manifests/latest"] = manifest
        return f"oci://{web.url[7:]}/team/sql"

    return call


@pytest.mark.parametrize("good_times", [1, 2, 3, 4])
@pytest.mark.parametrize("command", ["pull", "copy to a layout", "copy to a registry", "push"])
def test_a_tag_that_moves_between_two_requests_brings_nothing_that_the_policy_did_not_see(
    run: Run, place: Path, two_faced: Callable[[int], str], tmp_path: Path, command: str, good_times: int
) -> None:
    address = two_faced(good_times)
    words = {
        "pull": ["pull", address, "-o", "out"],
        "copy to a layout": ["copy", address, "layout://out:v1"],
        "copy to a registry": ["copy", address, "team/copied", "--registry", tmp_path / "r"],
        "push": ["push", address, "layout://out:v1"],
    }[command]
    result = run(*words, cwd=place, code=None)
    assert result.returncode in (0, 6), result.stderr
    if result.returncode:
        return
    if command == "copy to a registry":
        run("pull", "team/copied", "-o", "out", "--registry", tmp_path / "r", cwd=place)
    elif command != "pull":
        run("pull", "layout://out:v1", "-o", "written", cwd=place)
    written = place / ("written" if (place / "written").exists() else "out")
    assert "apache-2.0" in (written / "README.md").read_text()


def test_a_version_by_its_digest_is_asked_as_well(run: Run, place: Path, web: Web, tmp_path: Path) -> None:
    _, digest = serve(web, tmp_path / "bad-files")
    at = ("--registry", tmp_path / "r")
    address = f"oci://{web.url[7:]}/team/sql@{digest}"
    lock = {"ref": address, "source": address, "digest": digest, "size": 1, "base": {}}
    bad_lock = {**lock, "ref": "team/bad", "source": "registry"}
    (place / "adapters.lock").write_text(json.dumps({"version": 1, "adapters": {"team/sql": lock, "team/bad": bad_lock}}))
    env = {"ADAPTERHUB_ALLOW_HOSTS": web.url}
    for words in (
        ["pull", address, "-o", "out"],
        ["pull", f"team/bad@{digest}", "-o", "out", *at],
        ["pull", f"team/bad@{digest[:19]}", "-o", "out", *at],
        ["pull", "--locked", "team/sql", "-o", "out"],
        ["pull", "--locked", "team/bad", "-o", "out", *at],
        ["pull", "--locked", *at],
        ["copy", address, "team/new", *at],
        ["copy", f"team/bad@{digest}", "layout://out:v1", *at],
        ["copy", f"team/bad@{digest}", "./out", *at],
        ["push", f"team/bad@{digest}", "layout://out:v1", *at],
        ["pull", "team/bad", "--to", "gguf", "-o", "out", *at],
    ):
        one_line(run(*words, cwd=place, env=env, code=6), AGAINST)
        assert not (place / "out").exists()
        assert not (place / "adapters").exists()


@pytest.mark.parametrize(
    ("ref", "repository", "allow", "code"),
    [
        ("team/sql:v1", "team/sql", "team/*", 0),
        ("team/sql:v1", "evil/sql", "team/*", 6),
        ("team/sql:v1", "evil/xteam/sql", "team/*", 6),
        ("{address}", "team/sql", "team/*", 6),
        ("{address}", "team/sql", "{address}", 0),
        ("{address}", "evil/sql", "*/team/sql", 6),
    ],
)
def test_a_locked_name_does_not_hide_the_source(
    run: Run, place: Path, web: Web, tmp_path: Path, ref: str, repository: str, allow: str, code: int
) -> None:
    raw, digest = serve(web, tmp_path / "good-files")
    for path, file in [*web.files.items()]:
        web.files[path.replace("team/sql", repository)] = file
    path = f"/v2/{repository}/manifests/{digest}"
    web.rules[path] = lambda to: to.send(200, raw, **{"Content-Type": MANIFEST_TYPE})
    address = f"oci://{web.url[7:]}/{repository}"
    (place / "adapterhub.toml").write_text(f'[policy]\nallow = ["{allow.format(address=address)}"]\n')
    lock = {"ref": ref.format(address=address), "source": address, "digest": digest, "size": 1, "base": {}}
    (place / "adapters.lock").write_text(json.dumps({"version": 1, "adapters": {"team/sql": lock}}))
    result = run("pull", "--locked", cwd=place, env={"ADAPTERHUB_ALLOW_HOSTS": web.url}, code=code)
    if code:
        one_line(result, "not a name that ")
    assert (place / "adapters").exists() == (code == 0)


def test_a_bundle_is_asked_as_well(run: Run, place: Path, tmp_path: Path) -> None:
    run("bundle", "team/bad", "team/good", "-o", tmp_path / "b.tar", "--registry", tmp_path / "r")
    words = ["--from", tmp_path / "b.tar", "-o", "out"]
    one_line(run("pull", "team/bad:v1", *words, cwd=place, code=6), AGAINST)
    assert not (place / "out").exists()
    run("pull", "team/good:v1", *words, cwd=place)
