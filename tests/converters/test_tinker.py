"""Archives of Tinker: converted to PEFT and merged, they add what Tinker's own merge adds to the weights of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.checks.repair import fix
from adapterhub_converters import bases
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import convert
from adapterhub_converters.formats import peft as format_peft
from tests.conftest import Run, need_module
from tests.support import tiny

R, ALPHA = 2, 6.0
P = "base_model.model.model.layers."


class Archive:
    """An archive in the making, and the weights of its base with the deltas added, by their names in memory."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.rng = np.random.default_rng(0)
        self.tensors: dict[str, np.ndarray] = {}
        self.expected = {name: array.copy() for name, array in weights.items()}

    def halves(self, name: str, rows: int, columns: int, *experts: int) -> np.ndarray:
        """Add a pair, of experts where their numbers in the two halves are given; returns the delta."""
        first, second = experts or ((), ())
        lead_a, lead_b = ((first,), (second,)) if experts else ((), ())
        a = self.rng.normal(size=(*lead_a, R, columns)).astype(np.float32)
        b = self.rng.normal(size=(*lead_b, rows, R)).astype(np.float32)
        self.tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        return np.asarray(ALPHA / R * b @ a)

    def save(self, folder: Path, **config: Any) -> Path:
        folder.mkdir()
        safetensors_file.write(folder / format_peft.WEIGHTS, self.tensors)
        (folder / format_peft.CONFIG).write_text(json.dumps({"r": R, "lora_alpha": ALPHA} | config))
        return folder


def model_and_archive(name: str) -> tuple[Any, Archive]:
    model = tiny.model(name)
    archive = Archive({key: tensor.numpy() for key, tensor in model.state_dict().items()})
    for key, array in archive.expected.items():
        module = key.removesuffix(".weight")
        module_path = module.replace("model.language_model.", "model.")
        if module_path.endswith(("q_proj", "o_proj")):
            trained = module_path.replace(".self_attn.", ".attn.") if name.startswith("GptOss") else module_path
            array[:] += archive.halves(trained, *array.shape)
        elif module == "lm_head":
            array[:] += archive.halves("model.unembed_tokens", *array.shape)
        elif module_path.endswith("in_proj_qkv"):
            starts = np.cumsum([0, *[32] * 2, len(array) - 64])
            for part, start, end in zip("qkv", starts, starts[1:], strict=False):
                array[start:end] += archive.halves(
                    module_path.replace("in_proj_qkv", f"in_proj_{part}"), end - start, array.shape[1]
                )
        elif module_path.endswith("experts.gate_up_proj"):
            experts(archive, name, key, module_path.removesuffix(".gate_up_proj"))
    return model, archive


def experts(archive: Archive, name: str, key: str, module_path: str) -> None:
    up, down = archive.expected[key], archive.expected[key.replace("gate_up_proj", "down_proj")]
    count, turned = len(up), name.startswith("GptOss")
    (into, both_rows) = up.shape[1:] if turned else up.shape[:0:-1]
    gates = archive.halves(f"{module_path}.w1", both_rows // 2, into, 1, count)  # one lora_A for all experts
    ups = archive.halves(f"{module_path}.w3", both_rows // 2, into, 1, count)
    downs = archive.halves(f"{module_path}.w2", into, both_rows // 2, count, 1)
    if turned:
        up[:, :, ::2] += gates.swapaxes(1, 2)
        up[:, :, 1::2] += ups.swapaxes(1, 2)
        down += downs.swapaxes(1, 2)
    else:
        up += np.concatenate([gates, ups], axis=1)
        down += downs


@pytest.mark.peer
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "Qwen3_5MoeForConditionalGeneration"]
)
def test_peft_merges_what_tinker_merges(name: str, tmp_path: Path) -> None:
    need_module("peft")
    import peft

    model, archive = model_and_archive(name)
    model.save_pretrained(tmp_path / "base")
    source = archive.save(tmp_path / "a")
    base = bases.read_base(tmp_path / "base")
    convert.convert(source, tmp_path / "b", to="peft", base=base)
    merged = peft.PeftModel.from_pretrained(tiny.model(name), str(tmp_path / "b")).merge_and_unload().state_dict()
    for key, array in archive.expected.items():
        np.testing.assert_allclose(merged[key].numpy(), array, rtol=0, atol=2e-5, err_msg=key)
    convert.convert(source, tmp_path / "a.gguf", to="gguf", base=base)
    for number, source_path in enumerate([source, tmp_path / "a.gguf"]):
        ah.merge_into(source_path, tmp_path / "base", tmp_path / f"m{number}")
        merged = type(model).from_pretrained(tmp_path / f"m{number}", dtype="float32").state_dict()
        for key, array in archive.expected.items():
            np.testing.assert_allclose(merged[key].numpy(), array, rtol=0, atol=2e-5, err_msg=key)


def test_experts_written_one_by_one_for_vllm_are_merged_into_the_stacks_of_gpt_oss(run: Run, tmp_path: Path) -> None:
    model, archive = model_and_archive("GptOssForCausalLM")
    model.save_pretrained(tmp_path / "base")
    folder = archive.save(tmp_path / "a", peft_type="LORA", target_modules=["lm_head", "q_proj", "o_proj", *PARTS.values()])
    tensors = {}
    for own_name, array in archive.tensors.items():  # as tinker_cookbook.weights.build_lora_adapter names them
        name = own_name.replace(".attn.", ".self_attn.").replace("model.unembed_tokens", "lm_head")
        part = next((part for part in PARTS if f".experts.{part}." in name), None)
        if part is None:
            tensors[name] = array
            continue
        count = max(len(half) for key, half in archive.tensors.items() if f".experts.{part}." in key)
        for number, expert in enumerate(np.broadcast_to(array, (count, *array.shape[1:]))):
            tensors[name.replace(f".experts.{part}.", f".experts.{number}.{PARTS[part]}.")] = np.ascontiguousarray(expert)
    safetensors_file.write(folder / format_peft.WEIGHTS, tensors)
    assert convert.sniff(folder) == "peft"
    run("merge", "a", "--into", "base", "-o", "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype="float32").state_dict()
    for key, array in archive.expected.items():
        np.testing.assert_allclose(merged[key].numpy(), array, rtol=0, atol=2e-5, err_msg=key)
    run("convert", "a", "b", "--to", "peft", "--base", "base")
    run("validate", "b", "--base", "base", "--for", "peft")


PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# What Tinker's service adds to the config of an archive that is downloaded.
DOWNLOADED = {"peft_type": "LORA", "target_modules": "all-linear", "base_model_name_or_path": "org/base"}


@pytest.mark.parametrize(
    ("name", "config"),
    [("Qwen3MoeForCausalLM", {}), ("Qwen3MoeForCausalLM", DOWNLOADED), ("GptOssForCausalLM", DOWNLOADED)],
)
def test_every_command_takes_an_archive_as_it_is(name: str, config: dict[str, Any], run: Run, tmp_path: Path) -> None:
    model, archive = model_and_archive(name)
    model.save_pretrained(tmp_path / "base")
    archive.save(tmp_path / "a", **config)
    numbers = sum(array.size for array in archive.tensors.values())
    manifest = json.loads(run("show", "a", "--json").stdout)["manifest"]
    assert (manifest["format"], manifest["method"], manifest["parameters"]) == ("tinker", "lora", numbers)
    [report] = json.loads(run("validate", "a", "--base", "base", "--for", "peft", "--json").stdout)["reports"]
    assert (report["ok"], report["format"], report["facts"]["parameters"]) == (True, "tinker", numbers)
    run("init")
    run("push", "a", "team/a:one", "--base", "base")
    run("pull", "team/a:one", "--output", "back")
    for file in (format_peft.CONFIG, format_peft.WEIGHTS):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    run("convert", "a", "b", "--to", "peft", "--base", "base")
    difference = json.loads(run("diff", "team/a:one", "b", "--base", "base", "--json").stdout)
    assert difference["same"]
    run("merge", "a", "team/a:one", "-o", "both", "--method", "cat")
    run("merge", "a", "--into", "base", "-o", "merged")
    assert "can be read, but not written" in ah_error(tmp_path)


def ah_error(folder: Path) -> str:
    with pytest.raises(AdapterhubError) as caught:
        convert.convert(folder / "b", folder / "c", to="tinker")
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},  # peft lists the modules that it saves
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "IA3"},
    ],
)
def test_a_config_with_what_tinker_has_not_is_not_that_of_an_archive(config: dict[str, Any], tmp_path: Path) -> None:
    archive = Archive({})
    archive.halves("model.layers.0.attn.q_proj", 4, 4)
    assert convert.sniff(archive.save(tmp_path / "a", **DOWNLOADED)) == "tinker"
    assert convert.sniff(archive.save(tmp_path / "b", **DOWNLOADED | config)) == "peft"


def test_an_archive_without_names_of_its_own_is_one_of_peft(tmp_path: Path) -> None:
    archive = Archive({})
    archive.halves("model.layers.0.self_attn.q_proj", 4, 4)
    assert convert.sniff(archive.save(tmp_path / "a", **DOWNLOADED)) == "peft"


def test_logits_with_an_archive_are_those_of_the_model_merged_with_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from adapterhub.generation import torch_engine
    from adapterhub.training.events import InitialAdapter
    from tests.support.byte_tokenizer import write_tokenizer

    model, archive = model_and_archive("Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    del archive.expected["lm_head.weight"]  # torch runs none on the output layer
    archive.tensors = {name: array for name, array in archive.tensors.items() if "unembed" not in name}
    source = archive.save(tmp_path / "a")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in archive.expected.items()}, strict=False)
    ids = [5, 80, 90, 100]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    initial = InitialAdapter(source, source, "sha256:" + "0" * 64, str(source))
    with (
        torch_engine.open_engine(initial, tmp_path / "base") as engine,
        engine.start_decoding(adapted=True, room=8) as logits_after,
    ):
        np.testing.assert_allclose(logits_after(ids), expected, rtol=0, atol=2e-3)


LAYER = f"{P}0.mlp.up_proj"
PAIR = {f"{LAYER}.lora_A.weight": np.ones((R, 8), np.float32), f"{LAYER}.lora_B.weight": np.ones((4, R), np.float32)}
EXPERTS = f"{P}0.mlp.experts.w1"
HEAD = "base_model.model.model.unembed_tokens"
MARK = {f"{HEAD}.lora_A.weight": np.ones((R, 8), np.float32), f"{HEAD}.lora_B.weight": np.ones((9, R), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({f"{HEAD}.lora_A.weight": np.ones((R, 8), np.float32)}, {}, "tokens has lora_A alone; its counterpart is missing"),
        (MARK | {f"{LAYER}.weight": np.ones((4, 8), np.float32)}, {}, "is not half of a pair"),
        (MARK | {f"{EXPERTS}.lora_A.weight": np.ones((3, R, 8), np.float32),
                 f"{EXPERTS}.lora_B.weight": np.ones((2, 4, R), np.float32)}, {}, "3 and 2 experts"),
        (MARK, {"r": 0}, '"r" is 0'),
        (MARK, {"lora_alpha": "x"}, '"lora_alpha" is not a number'),
        (MARK | {f"{EXPERTS}.lora_A.weight": np.ones((1, 64, 4096), np.float16),
                 f"{EXPERTS}.lora_B.weight": np.ones((4096, 1, 64), np.float16)}, {}, "are to become low-rank pairs of"),
        ({f"{P}0.linear_attn.in_proj_{part}.lora_{half}.weight": np.ones(shape, np.float32) for part in "qkv"
          for half, shape in (("A", (R, 8 if part == "q" else 4)), ("B", (4, R)))}, {}, "have other columns"),
        ({name.replace("mlp.up_proj", "linear_attn.in_proj_q"): PAIR[name] for name in PAIR}, {}, "in_proj_k has no delta"),
    ],
)  # fmt: skip
def test_a_malformed_archive_is_refused_in_one_line(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], says: str
) -> None:
    archive = Archive({})
    archive.tensors = tensors
    with pytest.raises(AdapterhubError) as caught:
        convert.convert(archive.save(tmp_path / "a", **config), tmp_path / "b", to="peft")
    assert says in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_an_archive_is_recognized_and_a_config_without_its_kind_is_none(tmp_path: Path) -> None:
    archive = Archive({})
    archive.tensors = MARK
    assert convert.sniff(archive.save(tmp_path / "a")) == "tinker"
    with pytest.raises(RefusedError, match="an archive of Tinker") as caught:
        fix(tmp_path / "a", tmp_path / "f")
    assert caught.value.code == "convert-to-peft"
    assert set(convert.read(tmp_path / "a").deltas) == {"lm_head"}
    archive.tensors = PAIR
    with pytest.raises(AdapterhubError, match="peft_type"):
        convert.read(archive.save(tmp_path / "c"))
