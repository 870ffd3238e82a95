"""skopeo and oras read the layouts that we write, folders and archives, and we read theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from tests.conftest import Run, need_program
from tests.remotes.test_oci_peers import call, contents
from tests.support.registry import listed

Make = Callable[..., Path]
pytestmark = pytest.mark.peer


@pytest.mark.parametrize("place", ["oci-archive:x.tar", "oci:x"])
def test_skopeo_picks_one_by_its_name(make: Make, run: Run, tmp_path: Path, place: str) -> None:
    skopeo, source = need_program("skopeo"), make()
    other_folder = make("other", 1)
    run("push", source, f"{place}:team/sql:v2")
    run("push", other_folder, f"{place}:v3")
    for folder, name in ((source, "team/sql:v2"), (other_folder, "v3")):
        raw = call(skopeo, "inspect", "--raw", f"{place}:{name}", cwd=tmp_path)
        assert raw.encode() == oci_manifest.build(folder).raw
        call(skopeo, "copy", f"{place}:{name}", "oci:copied:v1", cwd=tmp_path)
        run("pull", "oci:copied:v1", "-o", "out" + name[-1])
        assert contents(folder).items() <= contents(tmp_path / ("out" + name[-1])).items()


@pytest.mark.parametrize("path", ["x.tar", "x"])
def test_oras_picks_one_by_name_and_by_digest(make: Make, run: Run, tmp_path: Path, path: str) -> None:
    oras, source = need_program("oras"), make()
    digest = json.loads(run("push", source, f"layout://{path}:v2", "--json").stdout)["digest"]
    for image in (f"{path}:v2", f"{path}@{digest}"):
        call(oras, "pull", "--oci-layout", image, "-o", "out", cwd=tmp_path)
        assert contents(source).items() <= contents(tmp_path / "out").items()
    call(oras, "copy", "--from-oci-layout", f"{path}:v2", "--to-oci-layout", "copied:v9", cwd=tmp_path)
    assert digest in run("pull", "oci:copied:v9", "-o", "ours", "--json").stdout


def test_what_skopeo_and_oras_wrote_is_read(make: Make, run: Run, host: str, tmp_path: Path) -> None:
    source, digest = make(), oci_manifest.build(make()).digest
    run("push", source, f"oci://{host}/layouts/sql:v1")
    skopeo, oras = need_program("skopeo"), need_program("oras")
    call(skopeo, "copy", "--src-tls-verify=false", f"docker://{host}/layouts/sql:v1", "oci-archive:a.tar:v1", cwd=tmp_path)
    call(oras, "copy", "--from-plain-http", f"{host}/layouts/sql:v1", "--to-oci-layout", "b:v1", cwd=tmp_path)
    for place in ("oci-archive:a.tar:v1", "oci:b:v1"):
        assert json.loads(run("copy", place, "team/sql", "--json").stdout)["digest"] == digest
    run("push", make("other", 1), "oci-archive:a.tar:v2")
    assert sorted(listed(run("list", "oci-archive:a.tar").stdout)) == ["oci-archive:a.tar:v1", "oci-archive:a.tar:v2"]
    run("push", make("other", 1), "oci:b:v2")
    assert call(oras, "repo", "tags", "--oci-layout", "b", cwd=tmp_path).split() == ["v1", "v2"]


def test_what_oras_pushed_of_a_plain_folder_into_a_layout_becomes_an_adapter(make: Make, run: Run, tmp_path: Path) -> None:
    source, oras = make(), need_program("oras")
    call(oras, "push", "--oci-layout", f"{tmp_path}/x:v1", *sorted(path.name for path in source.iterdir()), cwd=source)
    assert "adapter.json: it was derived" in run("pull", "oci:x:v1", "-o", "out").stderr
    assert oci_manifest.build(tmp_path / "out").digest == oci_manifest.build(source).digest
