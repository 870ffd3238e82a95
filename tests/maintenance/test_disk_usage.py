"""What versions take on disk: shared files and tensors count once."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from adapterhub.maintenance import compress, disk_usage
from adapterhub.manifest import derive
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.formats import peft
from tests.conftest import Run
from tests.maintenance.test_compress import SQL, Trained
from tests.support import folders
from tests.support.trained_versions import write_trained


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return functools.partial(write_trained, tmp_path)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.init(tmp_path / "registry")


def test_use_counts_a_shared_file_once(registry: Registry, trained: Trained) -> None:
    registry.push(trained("a"), SQL)
    registry.push(tmp := trained("b", step=1), SQL)
    registry.push(tmp, Ref.parse("team/copy"))
    compress.pack(registry)
    report = disk_usage.usage(registry)
    assert [(name.name, name.versions) for name in report.names] == [("team/copy", 1), ("team/sql", 2)]
    total = report.total
    on_disk = sum(path.stat().st_size for path in (*registry.store.blobs(), *registry.store.packs.files()))
    assert total.stored == on_disk
    assert total.files == sum(name.files for name in report.names)
    assert total.files - total.shared_size - total.saved_size == total.stored
    assert total.shared_size > (tmp / peft.WEIGHTS).stat().st_size
    assert [(base.repo, base.usage.adapters) for base in report.bases] == [("org/base", 2)]


def test_usage_compared_with_whole_models_counts_versions_of_that_base(
    registry: Registry, trained: Trained, run: Run, tmp_path: Path
) -> None:
    spec = folders.base(tmp_path / "base")
    for n, source in enumerate((trained("a"), trained("b", seed=1), trained("c", seed=2))):
        if n < 2:
            derive.describe(source, base=spec).write(source)
        registry.push(source, Ref.parse(f"team/a{n}"))
    registry.close()
    at = ("--registry", registry.root)
    bases = json.loads(run("du", "--base", tmp_path / "base", "--json", *at).stdout)["bases"]
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert {base["fingerprint"]: (base["versions"], base["whole_models"]) for base in bases} == {
        spec.fingerprint: (2, 2 * size),
        None: (1, None),
    }
    assert "; as whole models" in run("du", "--base", tmp_path / "base", *at).stdout
    assert "; as whole models" not in run("du", *at).stdout
    run("base", "add", "tiny", tmp_path / "base", *at)
    assert json.loads(run("du", "--json", *at).stdout)["bases"] == bases
    assert "; as whole models" in run("du", *at).stdout
    folders.base(tmp_path / "another", size=16)
    stderr = run("du", "--base", tmp_path / "another", *at).stderr
    assert "another: no version here was trained on it" in stderr
