"""skopeo and oras read the store in place, and what they copy is the same version."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.conftest import need_program

Make = Callable[..., Path]
pytestmark = pytest.mark.peer


def call(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True, timeout=60).stdout


def test_skopeo_copies_a_version_out_of_the_store(make: Make, tmp_path: Path) -> None:
    skopeo = need_program("skopeo")
    with Registry.init(tmp_path) as registry:
        version = registry.push(make(), Ref.parse("team/sql:prod"))
        for tag in ("prod", "latest", "v1"):
            source = f"oci:{registry.store.root}:team/sql:{tag}"
            assert json.loads(call(skopeo, "inspect", "--raw", source))["artifactType"].startswith("application/vnd.cncf.model")
            digest_file = tmp_path / "digest"
            call(skopeo, "copy", f"--digestfile={digest_file}", source, f"oci:{tmp_path}/out-{tag}:x")
            assert digest_file.read_text() == version.digest
            copied = {path.name: path.read_bytes() for path in (tmp_path / f"out-{tag}" / "blobs" / "sha256").iterdir()}
            assert copied == {path.name: path.read_bytes() for path in registry.store.blobs()}


def test_oras_pulls_the_files_under_their_names(make: Make, tmp_path: Path) -> None:
    oras = need_program("oras")
    source = make()
    with Registry.init(tmp_path) as registry:
        version = registry.push(source, Ref.parse("team/sql:prod"))
        # By digest: oras takes everything before the last colon for the layout's path.
        call(oras, "pull", "--oci-layout", f"{registry.store.root}@{version.digest}", "--output", tmp_path / "out")
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
