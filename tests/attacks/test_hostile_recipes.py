"""Recipes of strangers: what `rebuild` do for a document of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.operations import rebuild
from adapterhub.operations.workspace import Workspace
from adapterhub.registry.registry import Registry
from tests.attacks.test_hostile_servers import one_line
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.merge_recipes import write_base


def test_a_parent_that_a_recipe_names_again_and_again_is_written_once(
    run: Run, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--registry", tmp_path / "r")
    for name in ("p", "q"):
        run("push", make(name, ord(name)), f"team/{name}", *at)
    run("merge", "team/p", "team/q", "--method", "linear", "-o", "both", *at)
    document = json.loads((tmp_path / "both/adapter.json").read_text())
    document["parents"] *= 50
    (tmp_path / "both/adapter.json").write_text(json.dumps(document))
    run("push", "./both", "team/both", *at)
    pulled: list[Path] = []
    pull = Registry.pull

    def counted(self: Registry, ref: Any, out: Path, *arguments: Any, **options: Any) -> Any:
        pulled.append(out)
        return pull(self, ref, out, *arguments, **options)

    monkeypatch.setattr(Registry, "pull", counted)
    rebuild.rebuild("team/both", workspace=Workspace(registry=tmp_path / "r"))
    assert len(pulled) == 3  # the version itself, and two parents


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"base": {"source": "/dev/zero"}}, 3, "/dev/zero: no such folder"),
        ({"base": {"source": "../../../nowhere"}}, 3, "has its base at ../../../nowhere, and nothing is there"),
        ({"base": {"source": "\x1b[31m"}}, 3, r"\x1b[31m"),
        ({"adapters": [{"digest": f"sha256:{'1' * 64}", "weight": 1.0}] * 5000}, 4, "adapters: "),
        ({"options": {"shard_size": -1}}, 4, "options/shard_size"),
        ({"output": {"files": [{"path": "x", "size": -1, "digest": f"sha256:{'1' * 64}"}]}}, 4, "output/files/0/size"),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_one_line(
    run: Run, make: Make, tmp_path: Path, change: dict[str, Any], code: int, message: str
) -> None:
    write_base(tmp_path / "base")
    run("init", cwd=tmp_path)
    run("push", make(), "team/a", cwd=tmp_path)
    hostile_recipe = {
        "$schema": "urn:adapterhub:schema:merge:2",
        "schema_version": 2,
        "base": {"name": "base", "repo": None, "revision": None, "fingerprint": None, "files": [], "source": "base"},
        "adapters": [{"digest": f"sha256:{'2' * 64}", "weight": 1.0, "ref": "team/a"}],
        "options": {
            **dict.fromkeys(("as_trained", "dequantize", "force"), False),
            **dict.fromkeys(("dtype", "requantize", "shard_size", "trained_in")),
        },
        "output": {"form": "folder", "files": None},
    }
    for key, value in change.items():
        hostile_recipe[key] = {**hostile_recipe[key], **value} if isinstance(value, dict) else value
    (tmp_path / "h.json").write_text(json.dumps(hostile_recipe))
    one_line(run("rebuild", "h.json", "-o", "out", cwd=tmp_path, code=code), message)
    assert not (tmp_path / "out").exists()
