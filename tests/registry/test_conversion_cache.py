"""`push --to` and `pull --to`: every format that convert writes, as a version of its own or on the way out."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest.document import AdapterManifest
from adapterhub.ref import Ref
from adapterhub.registry import adapter_recipe, conversion_cache
from adapterhub.registry.registry import Registry
from adapterhub_converters import bases
from adapterhub_converters.errors import UsageError
from adapterhub_converters.formats import FORMATS, WRITTEN
from tests.conftest import Run
from tests.converters import trained
from tests.support.images import FLUX, files, peft_folder

FLUX_BASE = bases.BaseSpec("flux", "hf", "FluxTransformer2DModel", "", {})
OF_IMAGES = ("kohya", "diffusers")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with team/sql, of a Llama, and team/style, of FLUX.1, beside their folders."""
    folder = tmp_path_factory.mktemp("forms")
    trained.folder(trained.full("q_proj", "v_proj"), folder / "sql")
    peft_folder(folder / "style", FLUX)
    with Registry.init(folder) as registry:
        for name in ("sql", "style"):
            registry.push(folder / name, Ref.parse(f"team/{name}"))
    return folder


@pytest.mark.parametrize("to", WRITTEN)
def test_a_version_in_any_format_is_one_that_comes_back(team: Path, tmp_path: Path, to: Any) -> None:
    source, spec = ("style", FLUX_BASE) if to in OF_IMAGES else ("sql", trained.LLAMA)
    with Registry.open(team) as registry:
        parent = registry.resolve(Ref.parse(f"team/{source}"))
        out = tmp_path / f"out{FORMATS[to].suffix}"
        first = conversion_cache.pull(registry, parent.ref, out, adapter_recipe.Conversion(to), base=spec)
        assert (out.is_dir(), first.cached) == (FORMATS[to].folder, False)
        again = tmp_path / f"again{FORMATS[to].suffix}"
        assert conversion_cache.pull(registry, parent.ref, again, adapter_recipe.Conversion(to), base=spec).cached
        assert (files(again) if again.is_dir() else again.read_bytes()) == (files(out) if out.is_dir() else out.read_bytes())

        parent_adapter = adapter_recipe.ParentAdapter(team / source, team / source, parent.digest)
        adapter_recipe.convert(parent_adapter, tmp_path / "made", adapter_recipe.Conversion(to), name="made", base=spec)
        version = registry.push(tmp_path / "made", Ref.parse(f"team/as-{to}"))
        manifest = AdapterManifest.read(tmp_path / "made")
        assert manifest is not None
        assert manifest.recipe is not None
        assert (manifest.format, manifest.recipe.to, manifest.parents[0].digest) == (to, to, parent.digest)
        conversion_cache.pull(registry, version.ref, tmp_path / "back", adapter_recipe.Conversion("peft"))
        registry.pull(version.ref, tmp_path / "kept")
    adapter_recipe.rebuild_adapter(tmp_path / "kept", [parent_adapter], tmp_path / "anew", base=spec)
    assert not adapter_recipe.differences(tmp_path / "kept", tmp_path / "anew")
    files_back = files(tmp_path / "back")
    assert {name: files_back[name] for name in files(team / source) if name != "adapter.json"} == {
        name: data for name, data in files(team / source).items() if name != "adapter.json"
    }


def test_of_two_who_convert_a_version_at_once_both_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    def convert(*words: Any, **options: Any) -> Any:
        together.wait(60)
        return adapter_recipe.convert(*words, **options)

    monkeypatch.setattr(conversion_cache, "convert", convert)
    trained.folder(trained.full("q_proj", "v_proj"), tmp_path / "sql")
    with Registry.init(tmp_path) as registry:
        registry.push(tmp_path / "sql", Ref.parse("team/sql"))

    def pull(name: str) -> dict[str, bytes]:
        with Registry.open(tmp_path) as registry:
            conversion_cache.pull(
                registry, Ref.parse("team/sql"), tmp_path / name, adapter_recipe.Conversion("mlx"), base=trained.LLAMA
            )
        return files(tmp_path / name)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(pull, ("one", "other"))
    assert first == second


def test_ollama_is_written_on_the_way_out_from_the_gguf_that_is_kept(team: Path, tmp_path: Path) -> None:
    with Registry.open(team) as registry:
        ref = registry.resolve(Ref.parse("team/sql")).ref
        with pytest.raises(UsageError, match="model: is missing. Name the base as Ollama does"):
            conversion_cache.pull(registry, ref, tmp_path / "mine", adapter_recipe.Conversion("ollama"), base=trained.LLAMA)
        conversion_cache.pull(
            registry, ref, tmp_path / "mine", adapter_recipe.Conversion("ollama"), base=trained.LLAMA, model="llama3.2:1b"
        )
        conversion = conversion_cache.pull(
            registry, ref, tmp_path / "sql.gguf", adapter_recipe.Conversion("gguf"), base=trained.LLAMA
        )
    assert sorted(files(tmp_path / "mine")) == ["Modelfile", "mine.gguf"]
    assert (tmp_path / "mine/Modelfile").read_text() == "FROM llama3.2:1b\nADAPTER ./mine.gguf\n"
    assert conversion.cached
    assert (tmp_path / "sql.gguf").read_bytes() == (tmp_path / "mine/mine.gguf").read_bytes()


def test_the_commands_report_it(team: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / "base"
    model.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **trained.CONFIG}
    (model / "config.json").write_text(json.dumps(config))
    run("push", "team/sql", "team/litgpt", "--to", "litgpt", "--base", model, cwd=team)
    run("pull", "team/litgpt", "--to", "ollama", "--base", model, "-o", tmp_path / "mine", cwd=team)
    assert (tmp_path / "mine/Modelfile").read_text().startswith(f"FROM {model}\n")
    assert "--model: is for --to ollama" in run("pull", "team/sql", "--model", "x", code=2, cwd=team).stderr
    assert (
        "--model: the format raw records no name of a base"
        in run("pull", "team/sql", "--to", "raw", "--model", "x", code=2, cwd=team).stderr
    )
