"""After a repair, peft loads the function that was meant; what is uncertain is left alone and proposed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.checks.repair import config_repairs as repair_config
from adapterhub.checks.repair import fix
from adapterhub.manifest import derive
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import convert, peft
from tests.cli.test_commands import document
from tests.conftest import Run, need_module
from tests.support import tiny
from tests.support.folders import adapter, base, pairs

PREFIX = "base_model.model."


def tensors(path: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(path / peft.WEIGHTS) as file:
        return {name: file.tensor(name) for name in file.tensors}


def renamed(path: Path, change: Callable[[str], str]) -> None:
    safetensors_file.write(path / peft.WEIGHTS, {change(name): array for name, array in tensors(path).items()})


def configured(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / peft.CONFIG).read_text())
    change(config)
    (path / peft.CONFIG).write_text(json.dumps(config))


def codes(path: Path, **options: Any) -> set[str]:
    return {problem.code for problem in checks.check(path, **options).problems}


def without(key: str) -> Callable[[Path], None]:
    return lambda path: configured(path, lambda config: config.pop(key))


def setting(**values: Any) -> Callable[[Path], None]:
    return lambda path: configured(path, lambda config: config.update(values))


def renaming(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: renamed(path, change)


RANKS = {"rank_pattern": {r"layers\.0\..*\.q_proj": 6}}
BREAKS: dict[str, tuple[str, dict[str, Any], Callable[[Path], None]]] = {
    "doubled prefix": ("key-prefix", {}, renaming(lambda name: PREFIX + name)),
    "torch.compile": ("key-prefix", {}, renaming(lambda name: name.replace("model.layers", "_orig_mod.model.layers"))),
    "distributed": ("key-prefix", {}, renaming(lambda name: f"module.{name}")),
    "adapter's name": ("adapter-name", {}, renaming(lambda name: name.replace(".weight", ".default.weight"))),
    "no prefix": ("key-prefix", {}, renaming(lambda name: name.removeprefix(PREFIX))),
    "no peft_type": ("peft-type", {}, without("peft_type")),
    "no targets": ("no-targets", {}, setting(target_modules=None)),
    "stale targets": ("not-targeted", {}, setting(target_modules=["q_proj"])),
    "excluded": ("not-targeted", {}, setting(exclude_modules=["v_proj"])),
    "stale layers": ("not-targeted", {}, setting(layers_to_transform=[1])),
    "wrong rank": ("rank-config", {}, setting(r=16)),
    "lost ranks": ("rank-config", RANKS, setting(rank_pattern={})),
    "overlap": ("rank-config", RANKS, setting(rank_pattern={"q_proj": 4, r"layers\.0\..*\.q_proj": 6})),
    "bias": ("bias-flag", {"lora_bias": True}, setting(lora_bias=False)),
    "no bias": ("no-bias", {}, setting(lora_bias=True)),
    "dora": ("magnitude-flag", {"use_dora": True}, setting(use_dora=False)),
    "newer peft": ("unknown-key", {}, setting(use_next_big_thing=False, next_config=None, more={})),
}


@pytest.mark.peer
@pytest.mark.parametrize("name", BREAKS)
def test_peft_loads_a_repaired_adapter_to_the_function_that_was_meant(tmp_path: Path, name: str) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    import peft as real
    import torch

    code, config, spoil = BREAKS[name]
    made = tiny.adapter(tiny.model(), tmp_path / "a", target_modules=["q_proj", "v_proj", "down_proj"], **config)
    spoil(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    fixed = fix(tmp_path / "a", tmp_path / "out")
    assert code in {repair.code for repair in fixed.repairs}
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert not codes(tmp_path / "out") & {repair.code for repair in fixed.repairs}
    loaded = real.PeftModel.from_pretrained(tiny.model(), tmp_path / "out").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted, logits = made(ids).logits, loaded(ids).logits
    assert torch.allclose(wanted, logits, atol=1e-5)
    again = fix(tmp_path / "out", tmp_path / "again")
    assert (again.repairs, again.out) == ((), None)
    assert not (tmp_path / "again").exists()


@pytest.mark.peer
def test_what_peft_itself_saved_needs_nothing(tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    from peft import LoraConfig

    configs: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {"use_dora": True},
        "ranks": RANKS,
        "linear": {"target_modules": "all-linear"},
    }
    for name, config in configs.items():
        tiny.adapter(tiny.model(), tmp_path / name, **({"target_modules": ["q_proj", "v_proj"]} | config))
        assert fix(tmp_path / name, tmp_path / "out").repairs == ()
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - peft.INERT - peft.READ <= repair_config._WRITTEN


def test_a_lone_state_dict_becomes_a_folder_if_its_alpha_is_given(tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    state = {
        name.removeprefix(PREFIX).replace(".weight", ".default.weight"): array
        for name, array in tensors(tmp_path / "a").items()
    }
    safetensors_file.write(tmp_path / "lone.safetensors", state)
    with pytest.raises(RefusedError, match="its alpha is not recorded"):
        fix(tmp_path / "lone.safetensors", tmp_path / "out")
    fixed = fix(tmp_path / "lone.safetensors", tmp_path / "out", alpha=4)
    assert [repair.code for repair in fixed.repairs] == ["lone-state-dict", "key-prefix", "no-targets", "rank-config"]
    wanted, got = convert.read(tmp_path / "a"), convert.read(tmp_path / "out")
    for target, delta in wanted.deltas.items():
        other = got.deltas[target]
        assert (delta.scaling, delta.r) == (other.scaling, other.r)
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "a").keys()
    assert not checks.check(tmp_path / "out").problems


def test_a_prefix_that_is_not_certain_is_proposed_and_the_base_settles_it(tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    renamed(tmp_path / "a", lambda name: name.removeprefix(PREFIX + "model."))
    fixed = fix(tmp_path / "a", tmp_path / "out")
    assert (fixed.repairs, [proposal.code for proposal in fixed.proposals]) == ((), ["key-prefix", "no-base-name"])
    spec = base(tmp_path / "base", 2)
    fix(tmp_path / "a", tmp_path / "out", base=spec)
    assert sorted(tensors(tmp_path / "out")) == sorted(PREFIX + name for name in pairs(2))


def test_an_overlap_of_alphas_is_proposed_only(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(2), alpha_pattern={"q_proj": 3, r"0\.self_attn\.q_proj": 5})
    fixed = fix(path, tmp_path / "out")
    assert fixed.repairs == ()
    found = next(proposal for proposal in fixed.proposals if proposal.code == "pattern-overlap")
    explicit = json.loads(found.do.partition('"alpha_pattern" to ')[2])
    configured(path, lambda config: config.update(alpha_pattern=explicit))
    assert set(explicit.values()) == {3}
    assert "pattern-overlap" not in codes(path)


def test_a_key_that_may_change_the_function_is_proposed_only(tmp_path: Path) -> None:
    fixed = fix(adapter(tmp_path / "a", pairs(1), use_next_big_thing=True), tmp_path / "out")
    assert fixed.repairs == ()
    assert "unknown-key" in {proposal.code for proposal in fixed.proposals}


def test_a_rank_pattern_keeps_the_alphas_in_their_order(tmp_path: Path) -> None:
    alphas = {"z_proj": 1, "q_proj": 3, "a_proj": 2}
    fix(adapter(tmp_path / "a", pairs(2), r=7, alpha_pattern=alphas), tmp_path / "out")
    config = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert (config["r"], list(config["alpha_pattern"])) == (2, list(alphas))


@pytest.mark.parametrize("same", [True, False])
def test_a_copy_goes_only_if_it_is_the_bases_own(tmp_path: Path, same: bool) -> None:
    spec = base(tmp_path / "base", 2, tied=False)
    path = adapter(tmp_path / "a", pairs(2), target_modules=["q_proj", "lm_head"])
    copy = np.zeros((12, 8), np.float32) if same else np.ones((12, 8), np.float32)
    key = f"{PREFIX}lm_head.base_layer.weight"
    safetensors_file.write(path / peft.WEIGHTS, {**tensors(path), key: copy})
    assert [p.code for p in fix(path, tmp_path / "out").proposals] == ["copy", "no-base-name"]
    fixed = fix(path, tmp_path / "out", base=spec)
    assert [repair.code for repair in fixed.repairs] == (["copy"] if same else [])
    assert not same or key not in tensors(tmp_path / "out")


def test_the_base_is_named_where_it_is_recorded(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(1))
    described = derive.describe(path)
    dataclasses.replace(described, base=dataclasses.replace(described.base, repo="org/base")).write(path)
    fixed = fix(path, tmp_path / "out")
    assert [repair.code for repair in fixed.repairs] == ["no-base-name"]
    assert convert.read(tmp_path / "out").meta.base_model == "org/base"
    settled, _ = derive.finalize(tmp_path / "out")
    assert settled.base.repo == "org/base"
    assert not {"files-changed"} & codes(tmp_path / "out")


def test_a_manifest_of_other_files_is_left_out_and_reported(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(1))
    derive.describe(path).write(path)
    configured(path, lambda config: config.update(r=5))
    (path / "training_args.bin").write_bytes(b"x")
    fixed = fix(path, tmp_path / "out")
    assert "files-changed" in {proposal.code for proposal in fixed.proposals}
    assert fixed.left_out == ("training_args.bin",)
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [peft.CONFIG, peft.WEIGHTS]


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("gguf", "convert-to-peft", "only PEFT adapters can be repaired"),
        ("mlx", "convert-to-peft", "an MLX adapter; only PEFT adapters can be repaired"),
        ("none", "no-adapter", "no PEFT adapter: neither adapter_config.json nor adapter_model.safetensors"),
    ],
)
def test_what_is_not_pefts_is_refused(tmp_path: Path, kind: str, code: str, words: str) -> None:
    target = tmp_path / "b"
    if kind == "none":
        target.mkdir()
    else:
        convert.convert(adapter(tmp_path / "a", pairs(2)), target, to=kind, base=base(tmp_path / "base", 2))
    with pytest.raises(AdapterhubError) as error:
        fix(target, tmp_path / "out")
    assert (error.value.code, error.value.what) == (code, words)
    assert not (tmp_path / "out").exists()


def test_an_alpha_is_refused_for_an_adapter_that_records_it(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    error = "error: a: it has a config, which decides the scale. Leave out --alpha and --rslora  [alpha-recorded]\n"
    for option in (("--alpha", "8"), ("--rslora",)):
        assert run("fix", "a", *option, code=6).stderr == error
    with pytest.raises(RefusedError, match="it has a config, which decides the scale. Leave out its alpha and rsLoRA"):
        fix(tmp_path / "a", tmp_path / "out", alpha=8)


HOSTILE = [
    {"rank_pattern": {"(": 3}}, {"rank_pattern": [1]}, {"rank_pattern": {"q_proj": [3]}}, {"r": [1]}, {"r": "x"},
    {"alpha_pattern": {"q_proj": [1], "0.self_attn.q_proj": [2]}}, {"target_modules": 5}, {"target_modules": "((("},
    {"target_modules": [["a"]]}, {"layers_to_transform": "x"}, {"peft_type": [7]}, {"init_lora_weights": [1]},
    {"base_model_name_or_path": [1]}, {"modules_to_save": 3}, {"lora_bias": [1]}, {"unknown": {"a": [{}]}},
]  # fmt: skip


@pytest.mark.parametrize("config", HOSTILE, ids=map(str, HOSTILE))
def test_a_config_that_makes_no_sense_is_an_error_of_ours_or_stays(tmp_path: Path, config: dict[str, Any]) -> None:
    path = adapter(tmp_path / "a", pairs(2), **config)
    with contextlib.suppress(AdapterhubError):
        assert fix(path, tmp_path / "out").out in (None, tmp_path / "out")
        return
    assert not (tmp_path / "out").exists()


def test_the_command(run: Run, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(2), r=8, base_model_name_or_path="org/base")
    assert "`adapterhub fix` repairs it" in run("validate", "a", code=1).stdout
    assert "1 repair, nothing written (--dry-run)" in run("fix", "a", "--dry-run").stdout
    assert not (tmp_path / "a-fixed").exists()
    found = document(run, "fix", "a")
    assert (found["output"], [repair["code"] for repair in found["repaired"]]) == ("a-fixed", ["rank-config"])
    assert run("fix", "a-fixed").stdout == "a-fixed: nothing to repair, nothing written\n"
    assert "already exists" in run("fix", "a", code=2).stderr
    without("peft_type")(path)
    assert "`adapterhub fix` adds a missing peft_type" in run("validate", "a", code=1).stdout
    assert "repaired[peft-type]" in run("fix", "a", "-o", "b").stdout
    run("push", "b", "team/b")
    assert "nothing to repair" in run("fix", "team/b").stdout
