"""An adapter of a kind that is not known is kept as it is, and nothing is computed with it; a broken one is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.manifest import derive, weight_facts
from adapterhub.manifest.document import AdapterManifest
from adapterhub.project.policy import Policy
from adapterhub.registry import packaging
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_file
from adapterhub_converters.errors import IntegrityError, RefusedError
from tests.conftest import Run

Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = (2, 8), (8, 2)


def peft(folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None, **config: object) -> Path:
    folder.mkdir()
    write(folder / "adapter_model.safetensors", shapes or {f"{Q}.next_s": (8,)})
    settings = {"peft_type": "NEXT", "r": 4, "base_model_name_or_path": "org/base", "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], value: float = 1.0) -> Path:
    safetensors_file.write(path, {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}, {"format": "pt"})
    return path


def gguf(folder: Path, extra_metadata: dict[str, gguf_types.MetadataValue] | None = None, **shapes: tuple[int, ...]) -> Path:
    folder.mkdir()
    keys = {"general.type": "adapter", "general.architecture": "next", "adapter.type": "lora"}
    metadata = {key: gguf_types.string_value(value) for key, value in keys.items()} | {
        "adapter.lora.alpha": gguf_types.f32_value(4)
    }
    sizes = {"a": A, "b": B, **shapes}
    tensors = {f"blk.0.ffn_up.weight.lora_{end}": np.ones(shape, np.float32) for end, shape in sizes.items()}
    gguf_output.write(folder / "adapter.gguf", metadata | (extra_metadata or {}), {n: t for n, t in tensors.items() if t.size})
    return folder


def image(folder: Path, **shapes: tuple[int, ...]) -> Path:
    folder.mkdir()
    write(folder / "style.safetensors", {f"lora_unet_next_block_0_to_q.{n.replace('__', '.')}": s for n, s in shapes.items()})
    return folder


LOHA = {f"hada_w{n}_{half}": shape for n in (1, 2) for half, shape in (("a", B), ("b", A))}
DOWN, UP = {"lora_down__weight": A}, {"lora_up__weight": B}
KEPT: dict[str, tuple[Callable[[Path], Path], tuple[str, str, int | None]]] = {
    "a tuner of peft to come": (peft, ("next", "peft", 4)),
    "a key that changes LoRA": (
        lambda at: peft(at, {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}, peft_type="LORA", r=2, velora_config={"x": 1}),
        ("lora", "peft", 2),
    ),
    "another program's config": (lambda at: config_of(peft(at), {"tool": "next"}), ("other", "other", None)),
    "a kind of mlx-lm to come": (
        lambda at: config_of(peft(at), {"fine_tune_type": "next", "model": "org/base"}), ("next", "mlx", None),
    ),
    "VeRA without its projections": (
        lambda at: peft(at, {f"{Q}.vera_lambda_b": (8,), f"{Q}.vera_lambda_d": (2,)}, peft_type="VERA", save_projection=False),
        ("vera", "peft", 4),
    ),
    "a GGUF of another architecture": (gguf, ("lora", "gguf", 2)),
    "an image model of another family": (lambda at: image(at, **DOWN, **UP), ("lora", "kohya", None)),
    "LoHa of another family": (lambda at: image(at, **LOHA, dora_scale=(8, 1)), ("loha", "kohya", None)),
    "another algorithm of LyCORIS": (lambda at: image(at, oft_blocks=(2, 4, 4)), ("oft", "kohya", None)),
}  # fmt: skip


def config_of(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if "fine_tune_type" in config:
        (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    return folder


@pytest.mark.parametrize("kind", KEPT)
def test_it_is_stored_with_what_it_claims_and_comes_back_byte_for_byte(kind: str, tmp_path: Path, run: Run) -> None:
    make, (method, adapter_format, r) = KEPT[kind]
    files = {path.name: path.read_bytes() for path in make(tmp_path / "a").iterdir()}
    first = json.loads(run("push", "./a", "team/a", "--json").stdout)
    assert (first["tags"], first["new"]) == (["latest"], True)
    assert not json.loads(run("push", "./a", "team/a", "--json").stdout)["new"]
    run("pull", "team/a", "-o", "back")
    again = json.loads((tmp_path / "back" / "adapter.json").read_text())
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir() if path.name != "adapter.json"} == files
    assert again["understood"] is False
    assert again["reason"]
    assert (again["method"], again["format"], again["r"], again["dtype"]) == (method, adapter_format, r, "F32")
    run("push", "./back", "layout://there:v1")
    assert json.loads(run("copy", "layout://there:v1", "team/copy", "--json").stdout)["digest"] == first["digest"]
    assert [row["method"] for row in json.loads(run("list", "--json").stdout)["adapters"]] == [method, method]
    assert "not understood" in run("show", "team/a").stdout


@pytest.mark.parametrize("kind", KEPT)
def test_it_cannot_be_checked_converted_or_merged(kind: str, tmp_path: Path, run: Run) -> None:
    KEPT[kind][0](tmp_path / "a")
    result = run("validate", "./a")
    assert "not-understood" in result.stdout
    assert "cannot check: " in result.stdout
    assert "(--strict)" in run("validate", "./a", "--strict", code=1).stdout
    reason = json.loads(run("validate", "./a", "--json").stdout)["reports"][0]["problems"][0]["what"].removeprefix(
        "cannot check: "
    )
    for words in (["convert", "./a", "out", "--to", "raw"], ["merge", "./a", "./a", "-o", "out"]):
        error = run(*words, code=6).stderr
        assert reason[:60] in error, error
    assert not (tmp_path / "out").exists()


PAIR = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated file": (lambda at: cut(peft(at) / "adapter_model.safetensors"), "malformed"),
    "a truncated GGUF": (lambda at: cut(gguf(at) / "adapter.gguf"), "malformed"),
    "a NaN": (lambda at: write(peft(at) / "adapter_model.safetensors", {f"{Q}.next_s": (8,)}, np.nan), "non-finite"),
    "a NaN in LoRA": (lambda at: write(peft(at, peft_type="LORA") / "adapter_model.safetensors", PAIR, np.nan), "non-finite"),
    "an empty tensor": (lambda at: peft(at, {f"{Q}.next_s": (0,)}), "empty-tensor"),
    "half a pair under a key that is not known": (
        lambda at: peft(at, {f"{Q}.lora_A.weight": A}, peft_type="LORA", velora_config={"x": 1}), "missing-half",
    ),
    "two ranks under a key that is not known": (
        lambda at: peft(at, {**PAIR, f"{Q}.lora_B.weight": (8, 3)}, peft_type="LORA", velora_config={"x": 1}), "rank-differs",
    ),
    "LoRA in another spelling": (lambda at: peft(at, PAIR, peft_type="lora"), "unsupported"),
    "LoRA without its kind": (lambda at: config_of(peft(at, PAIR), {"r": 2}), "malformed"),
    "LoRA with numbers that are none": (
        lambda at: peft(at, PAIR, peft_type="LORA", lora_alpha="x", velora_config=1), "unsupported",
    ),
    "LoRA with other tensors": (lambda at: peft(at, {**PAIR, f"{Q}.next_s": (8,)}, peft_type="LORA", r=2), "unknown-tensor"),
    "a pickle beside its config": (lambda at: pickled(peft(at)), "pickle"),
    "a GGUF with half a pair": (lambda at: gguf(at, b=(0, 0)), "malformed"),
    "a GGUF of two ranks": (lambda at: gguf(at, b=(8, 3)), "malformed"),
    "a GGUF without a tensor": (lambda at: gguf(at, a=(0, 0), b=(0, 0)), "malformed"),
    "half a pair of an image model of another family": (lambda at: image(at, **DOWN), "missing-half"),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_broken_adapter_is_not_one_of_another_kind(kind: str, tmp_path: Path, run: Run) -> None:
    make, code = REFUSED[kind]
    make(tmp_path / "a")
    assert code in run("validate", "./a", code=1).stdout
    run("init")
    assert run("push", "./a", "team/a", code=None).returncode in (4, 6)
    assert json.loads(run("list", "--json").stdout)["adapters"] == []


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy("the hub", require_understood=True), "it is not understood (peft_type 'NEXT' is not supported"),
        (Policy("the hub", max_rank=8), "its rank cannot be compared with 8"),
    ],
)
def test_a_policy_can_forbid_it(policy: Policy, says: str, tmp_path: Path) -> None:
    folder = peft(tmp_path / "a")
    packaging.package(folder, policy=Policy("the hub", licenses=(), allow=("team/*",)))
    with pytest.raises(RefusedError, match="against the policy") as caught:
        packaging.package(folder, policy=policy)
    assert says in str(caught.value)


def test_a_kind_that_becomes_known_stays_readable(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", PAIR, peft_type="LORA", r=2, velora_config={"x": 1})
    derive.describe(folder).write(folder)
    manifest = AdapterManifest.read(folder)
    assert manifest is not None
    assert manifest.understood is False
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    weight_facts.check_facts(manifest, weight_facts.inspect_adapter(folder), "a", folder=folder)
    for lie in ({"r": 1}, {"parameters": 1}, {"method": "full"}):
        with pytest.raises(IntegrityError, match="but the weights have"):
            weight_facts.check_facts(
                dataclasses.replace(manifest, **lie), weight_facts.inspect_adapter(folder), "a", folder=folder
            )
    other_folder = peft(tmp_path / "b")
    with pytest.raises(IntegrityError, match='"method" is "lora", but the weights have "next"'):
        weight_facts.check_facts(derive.describe(folder), weight_facts.inspect_adapter(other_folder), "b", folder=other_folder)


def test_its_runtimes_are_not_known_unless_they_need_a_conversion(tmp_path: Path) -> None:
    report = checks.check(peft(tmp_path / "a"))
    verdicts = {name: verdict.verdict for name, verdict in report.verdicts.items()}
    assert (verdicts["peft"], verdicts["vllm"], verdicts["llama.cpp"]) == ("unknown", "unknown", "refused")
