"""Adapters made again from their recipes, to the last byte."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.manifest import derive
from adapterhub.manifest.document import AdapterManifest, Recipe
from adapterhub.operations import rebuild
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.registry import adapter_recipe
from adapterhub.registry.registry import Registry
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs


def write_family(folder: Path) -> Path:
    """a:v1 and b:v1, merged to both:v1, of which team/light has GGUF; elsewhere:v1 was merged from one that is not here."""
    spec = base(folder / "base", 2)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        adapter(folder / name, pairs(2), lambda _, x, seed=seed: (x * seed).astype(np.float32))  # type: ignore[misc]
        derive.describe(folder / name, base=spec).write(folder / name)
    with Registry.init(folder) as registry:

        def pushed(name: str, weight: float) -> adapter_recipe.ParentAdapter:
            version = registry.push(folder / name, Ref.parse(f"team/{name}"))
            return adapter_recipe.ParentAdapter(folder / name, folder / name, version.digest, str(version.ref), weight)

        pinned = derive.describe(folder / "a", base=spec).base
        a, b = pushed("a", 0.7), pushed("b", -0.3)
        adapter_recipe.merge([a, b], folder / "both", Recipe("merge", 3, "svd"), base=pinned)
        adapter_recipe.convert(pushed("both", 1.0), folder / "light", adapter_recipe.Conversion("gguf"), name="light")
        pushed("light", 1.0)
        c = adapter_recipe.ParentAdapter(folder / "c", folder / "c", f"sha256:{'0' * 64}", None, 1.0)
        adapter_recipe.merge([a, c], folder / "elsewhere", Recipe("merge", None, "cat"), base=pinned)
        pushed("elsewhere", 1.0)
    return folder


@pytest.fixture(scope="module")
def prepared_team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("team"))


@pytest.fixture
def team(prepared_team: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(prepared_team, tmp_path, dirs_exist_ok=True)
    return tmp_path


def document(run: Run, *args: object, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options).stdout)


def test_a_merge_is_made_again_to_the_last_byte(run: Run, team: Path) -> None:
    assert document(run, "rebuild", "team/both") == {
        "ref": "team/both:v1", "digest": document(run, "show", "team/both")["digest"], "steps": None, "same": True,
        "differences": [],
    }  # fmt: skip


def test_a_merge_from_before_chat_templates_were_kept_is_made_again(run: Run, team: Path) -> None:
    for name in ("a", "b"):
        (team / name / "chat_template.jinja").write_text("{{ messages[0].content }}")
        run("push", name, f"team/{name}")
    run("merge", "team/a", "team/b", "-o", "merged")
    run("push", "merged", "team/merged")
    assert document(run, "rebuild", "team/merged")["same"] is True
    (team / "merged/chat_template.jinja").unlink()
    run("push", "merged", "team/merged")
    rebuilt = run("rebuild", "team/merged:v2", "-o", "again")
    assert "every byte matches" in rebuilt.stdout
    assert "note: team/merged:v2 lacks the chat template of its parents, which a merge keeps now" in rebuilt.stderr
    assert (team / "again/chat_template.jinja").exists()


def test_a_conversion_is_made_again_to_the_last_byte(run: Run, team: Path) -> None:
    assert document(run, "rebuild", "team/light")["same"] is True
    assert "every byte matches" in run("rebuild", "team/light").stdout


def test_what_was_changed_after_a_merge_is_counted_in_last_places(run: Run, team: Path) -> None:
    file = team / "both" / peft.WEIGHTS
    with safetensors_file.SafetensorsFile(file) as opened:
        tensors = {name: opened.tensor(name).copy() for name in opened.tensors}
    name = sorted(tensors)[0]
    tensors[name].flat[0] = np.nextafter(tensors[name].flat[0], np.float32(np.inf))
    safetensors_file.write(file, tensors, {"format": "pt"})
    manifest = AdapterManifest.read(team / "both")
    assert manifest is not None
    changed = derive.describe(team / "both", parents=manifest.parents, recipe=manifest.recipe)
    dataclasses.replace(changed, base=manifest.base).write(team / "both")
    run("push", "both", "team/both")
    report = document(run, "rebuild", "team/both", code=1)
    assert [difference["ulps"] for difference in report["differences"]] == [1]
    assert "1 difference, at most 1 unit in the last place" in run("rebuild", "team/both", code=1).stdout


def test_what_has_no_recipe_or_no_parents_here_is_refused(run: Run, team: Path) -> None:
    assert "no recipe to make it from: it has no parents" in run("rebuild", "team/a", code=6).stderr
    assert "this parent is not in the registry" in run("rebuild", "team/elsewhere", code=3).stderr


@pytest.mark.parametrize(("name", "kind", "count"), [("both", "merge", 0), ("light", "convert", 0), ("light", "convert", 2)])
def test_a_recipe_for_another_number_of_parents_is_refused(run: Run, team: Path, name: str, kind: str, count: int) -> None:
    manifest = AdapterManifest.read(team / name)
    assert manifest is not None
    changed = derive.describe(team / name, parents=(manifest.parents * 2)[:count], recipe=manifest.recipe)
    dataclasses.replace(changed, base=manifest.base).write(team / name)
    run("push", name, f"team/{name}")
    error = f"team/{name}:v2/adapter.json: names {count} parents for a recipe of the kind {kind!r}"
    assert run("rebuild", f"team/{name}", code=4).stderr == f"error: {error}  [malformed]\n"


def test_what_was_made_with_a_base_is_made_again_with_no_other(run: Run, team: Path) -> None:
    run("push", "a", "team/based", "--to", "gguf", "--base", "base")
    base(team / "other", 3)
    prefix = "error: team/based:v1: made with the base whose fingerprint is sha256:"
    for base_option, words in (((), "none was given"), (("--base", "other"), "another one was given")):
        error = run("rebuild", "team/based", *base_option, code=6).stderr
        assert error.startswith(prefix)
        assert f", and {words}. Pass it as --base  [recipe-base-required]\n" in error
    with pytest.raises(RefusedError, match="and none was given. Pass that base"):
        rebuild.rebuild("team/based", Workspace(registry=team))
    assert "every byte matches" in run("rebuild", "team/based", "--base", "base").stdout


def test_ulps_cross_zero() -> None:
    first, second = np.array([0.0, 1.0], np.float32), np.array([-0.0, 1.0], np.float32)
    assert adapter_recipe.ulps(first, second) == 0
    tiny = np.float32(1e-45)
    assert adapter_recipe.ulps(np.array([tiny]), np.array([-tiny])) == 2
