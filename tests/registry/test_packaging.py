"""The one way in: whatever stores an adapter refuses a broken one and one that the policy forbids, and stores nothing of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.hub_server import Hub
from tests.support.opens import opens

TOML = "adapterhub.toml"


def break_it(folder: Path) -> Path:
    """Put a NaN into the weights of an adapter."""
    with SafetensorsFile(folder / peft.WEIGHTS) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    next(iter(tensors.values()))[0, 0] = np.nan
    safetensors_file.write(folder / peft.WEIGHTS, tensors, {"format": "pt"})
    return folder


def put_elsewhere(folder: Path, layout: Path) -> None:
    """Put an adapter where nobody checks it, under the tag v1."""
    with LayoutFolder(layout, str(layout)) as target:
        copy_version(AdapterFolder(folder), "latest", target, "v1")


# A way in, as the words of a command after which `team/in` or a place below `out` would have the adapter.
COMMANDS: dict[str, list[str]] = {
    "push": ["push", "./bad", "team/in"],
    "push, converted": ["push", "./bad", "team/in", "--to", "mlx"],
    "push, pinned": ["push", "./bad", "team/in", "--base", "base"],
    "push to a layout": ["push", "./bad", "layout://out/there:v1"],
    "push to an archive": ["push", "./bad", "layout://out/there.tar:v1"],
    "push to an object store": ["push", "./bad", "file://{here}/out/store/team/in"],
    "push to a registry": ["push", "./bad", "oci://{host}/{name}/in:v1"],
    "push to a hub": ["push", "./bad", "hub+{hub}/org/in"],
    "push as an image": ["push", "./bad", "layout://out/there:v1", "--to", "image"],
    "push a stored version elsewhere": ["push", "team/forced", "layout://out/there:v1"],
    "push from an address": ["push", "oci:elsewhere:v1", "team/in"],
    "push from an address to another": ["push", "oci:elsewhere:v1", "layout://out/there:v1"],
    "copy a folder": ["copy", "bad", "team/in"],
    "copy a stored version": ["copy", "team/forced", "team/in"],
    "copy a stored version elsewhere": ["copy", "team/forced", "layout://out/there:v1"],
    "copy from an address": ["copy", "oci:elsewhere:v1", "team/in"],
    "copy from an address to another": ["copy", "oci:elsewhere:v1", "layout://out/there:v1"],
    "copy from a registry": ["copy", "oci://{host}/{name}/bad:v1", "team/in"],
    "copy from a bundle": ["copy", "layout://bundle.tar:v1", "team/in"],
    "merge": ["merge", "./bad", "./bad", "-o", "team/in:merged"],
    "extract": ["extract", "tuned", "--base", "base", "--rank", "2", "-o", "team/in:extracted"],
    "pull, converted and cached": ["pull", "team/forced", "--to", "mlx", "-o", "out/there"],
}


@pytest.fixture
def place(tmp_path: Path, run: Run) -> Path:
    """A folder with a registry, and an adapter that is not checked until a way in is tried."""
    (tmp_path / "out").mkdir()
    run("init")
    return tmp_path


@pytest.fixture(params=["broken", "forbidden"])
def bad(request: pytest.FixtureRequest, place: Path, run: Run, host: str) -> Callable[[str], bool]:
    """Make the adapter bad, put it wherever a way in may take it from, then set the rules; tells the reason of a refusal."""
    folder = write_adapter(place / "bad")
    broken = request.param == "broken"
    if broken:
        break_it(folder)
    put_elsewhere(folder, place / "elsewhere")
    with Registry.open(place) as registry:
        registry.push(folder, Ref.parse("team/forced"), force=True)
    from adapterhub.remotes import remote_address

    for address in (f"oci+http://{host}/{place.name}/bad:v1", f"layout://{place}/bundle.tar:v1"):
        parsed = remote_address.parse(address)
        with remote_address.connect(parsed, ah.Workspace().surroundings()) as remote:
            copy_version(AdapterFolder(folder), "latest", remote, "v1")
    if not broken:
        (place / TOML).write_text("[policy]\nmax_rank = 1\n")
    return lambda text: ("non-finite" in text or "NaN" in text) if broken else "is over 1" in text


def stored(place: Path) -> dict[str, Any]:
    """Everything that a way in could have changed: the versions, what is cached, what is elsewhere."""
    with Registry.open(place) as registry:
        versions = [str(row.ref) for row in registry.list()]
        cached = sorted(path.name for path in (registry.store.root / "cache").glob("*"))
    return {"versions": versions, "cached": cached, "out": sorted(str(path) for path in (place / "out").rglob("index.json"))}


@pytest.mark.parametrize("way", COMMANDS)
def test_every_command_that_stores_an_adapter_refuses_it_alike(
    way: str, bad: Callable[[str], bool], place: Path, run: Run, host: str, hub: Hub
) -> None:
    write_base(place / "base")
    write_base(place / "tuned", 2.0 if (place / TOML).exists() else np.nan)
    before = stored(place)
    words = [word.format(here=place, host=host, name=place.name, hub=hub.url) for word in COMMANDS[way]]
    result = run(*words, "--json", code=6)
    error = json.loads(result.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("RefusedError", 6)
    assert bad(error["what"]), error
    assert stored(place) == before
    assert "bad" not in {path.name for path in (place / "out").rglob("*")}


FUNCTIONS: dict[str, Callable[[ah.Workspace], object]] = {
    "push": lambda workspace: ah.push("./bad", "team/in", workspace=workspace),
    "push to an address": lambda workspace: ah.push("./bad", "layout://out/there:v1", workspace=workspace),
    "merge": lambda workspace: ah.merge(["./bad", "./bad"], "team/in:merged", workspace=workspace),
    "pull, converted": lambda workspace: ah.pull("team/forced", "out/there", to="mlx", workspace=workspace),
    "a registry's push": lambda workspace: ah.Registry(".").push("./bad", "team/in"),
    "the inner registry's push": lambda workspace: Registry.open(Path()).push(
        Path("bad"), Ref.parse("team/in"), policy=workspace.rules()
    ),
}


@pytest.mark.parametrize("way", FUNCTIONS)
def test_every_function_that_stores_an_adapter_refuses_it_alike(
    way: str, bad: Callable[[str], bool], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = stored(place)
    with pytest.raises(RefusedError) as caught:
        FUNCTIONS[way](ah.Workspace())
    assert bad(caught.value.what)
    assert caught.value.exit_code == 6
    assert stored(place) == before


def test_force_stores_what_is_broken_with_a_warning_but_not_what_is_forbidden(place: Path, run: Run) -> None:
    break_it(write_adapter(place / "bad"))
    put_elsewhere(place / "bad", place / "elsewhere")
    for words in (
        ["./bad", "team/in"],
        ["./bad", "layout://out/one:v1"],
        ["team/in", "layout://out/two:v1"],
        ["oci:elsewhere:v1", "layout://out/three:v1"],
    ):
        assert "stored despite 1 error, the first non-finite" in run("push", *words, "--force").stderr, words
    (place / TOML).write_text("[policy]\nmax_rank = 1\n")
    assert "rank 2 is over 1" in run("push", "./bad", "team/in2", "--force", code=6).stderr


def test_what_is_forced_in_is_refused_with_the_words_of_the_check(place: Path, run: Run) -> None:
    break_it(write_adapter(place / "bad"))
    result = run("push", "./bad", "team/in", code=6)
    assert "error: ./bad: non-finite: adapter_model.safetensors: model.layers.0" in result.stderr
    assert "`adapterhub validate ./bad` shows all of them" in result.stderr


def test_the_remedy_of_a_refused_copy_or_conversion_is_about_a_version_that_there_is(place: Path, run: Run) -> None:
    break_it(write_adapter(place / "bad"))
    address = f"layout://{place}/bad.tar:v1"
    run("push", "./bad", address, "--force")
    copied = run("copy", address, "team/in", code=6).stderr
    assert f"`adapterhub validate {address}` shows all of them; `adapterhub push {address} REF --force" in copied
    run("push", address, "team/in", "--force")
    pulled = run("pull", "team/in", "--to", "mlx", "-o", "out", code=6).stderr
    assert pulled.endswith("`adapterhub validate team/in:v1` shows all of them  [check-failed-for-good]\n")


def test_rebuild_takes_no_adapter_from_an_address_that_the_policy_forbids(place: Path, run: Run) -> None:
    write_base(place / "base")
    put_elsewhere(write_adapter(place / "bad"), place / "elsewhere")
    run("merge", "oci:elsewhere:v1", "--into", "base", "--recipe-only", "-o", "recipe.json")
    (place / TOML).write_text("[policy]\nmax_rank = 1\n")
    assert "rank 2 is over 1" in run("rebuild", "recipe.json", "-o", "out/model", code=6).stderr
    (place / TOML).write_text("[policy]\nmax_rank = 2\n")
    run("rebuild", "recipe.json", "-o", "out/model")


def write_base(folder: Path, value: float = 1.0) -> None:
    """A base that the adapters of the tests fit: two layers of 8x8, one element of each weight `value`."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        f"model.layers.{layer}.self_attn.{name}_proj.weight": np.where(np.eye(8) == 1, value, 1.0).astype(np.float32)
        for layer in range(2)
        for name in "qkvo"
    }
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})


@pytest.mark.parametrize("target", ["team/sql", "layout://out:v1"])
@pytest.mark.parametrize("described", [False, True])
def test_a_push_opens_every_file_twice_at_most(target: str, described: bool, run: Run, place: Path, tmp_path: Path) -> None:
    folder = write_adapter(place / "sql")
    if described:
        run("push", folder, "team/first")
        run("pull", "team/first", "-o", "with-json")
        folder = place / "with-json"
    counts = opens(run, tmp_path, folder, "push", folder, target)
    assert set(counts) >= {peft.CONFIG, peft.WEIGHTS, "README.md"}
    assert counts - Counter(dict.fromkeys(counts, 2)) == Counter()
