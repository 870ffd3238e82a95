"""`adapterhub merge --into`: what is said, what is refused, and with which exit code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.formats import peft

Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    (tmp_path / "base").mkdir()
    tensors = {f"{Q}.weight": rng.normal(size=(64, 64)).astype(dtypes.BF16), "model.norm.weight": np.ones(64, dtypes.BF16)}
    safetensors_file.write(tmp_path / "base" / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    lora_A, lora_B = rng.normal(size=(4, 64)), 0.03 * rng.normal(size=(64, 4))
    (tmp_path / "a").mkdir()
    peft.write(Adapter({Q: LowRank(lora_A.astype(np.float32), lora_B.astype(np.float32), alpha=4)}), tmp_path / "a")
    return tmp_path


def test_a_dry_run_reports_the_same_as_the_merge_and_writes_nothing(place: Path, run: Any) -> None:
    args = ("merge", "./a", "--into", "base", "-o", "out", "--json")
    planned = json.loads(run(*args, "--dry-run", cwd=place).stdout)
    assert sorted(path.name for path in place.iterdir()) == ["a", "base"]
    document = json.loads(run(*args, cwd=place).stdout)
    assert planned["output"] is None
    assert document["output"] == "out"
    assert {**planned, "output": "out"} == document
    assert document["touched"][f"{Q}.weight"]["kept"] == pytest.approx(1, abs=0.05)
    text = run("merge", "./a", "--into", "base", "-o", "other", "--dry-run", cwd=place).stdout
    assert "nothing written" in text
    assert "LEAST KEPT" in text


def test_a_base_with_other_names_or_shapes_than_in_training_is_reported(place: Path, run: Any) -> None:
    run("push", "./a", "team/a", "--base", "base", cwd=place)
    shutil.copytree(place / "base", place / "other")
    file = SafetensorsFile(place / "base" / "model.safetensors")
    other_tensors = {name: file.tensor(name) for name in file.tensors} | {"lm_head.weight": np.ones((40, 64), dtypes.BF16)}
    safetensors_file.write(place / "other" / "model.safetensors", other_tensors, {"format": "pt"})
    assert "warning" not in run("merge", "team/a", "--into", "base", "-o", "out", cwd=place).stderr
    result = run("merge", "team/a", "--into", "other", "-o", "out2", "--json", cwd=place)
    (warning,) = json.loads(result.stdout)["warnings"]
    assert "team/a:v1 was trained on the base sha256:" in warning
    assert "other has tensors of other names or shapes. Check it on that base for the differences" in warning
    assert result.stderr == f"warning: {warning}\n"


def test_the_card_names_base_adapters_and_license(place: Path, run: Any) -> None:
    run("merge", "./a", "./a", "--weights", "1,-0.5", "--into", "base", "-o", "out", cwd=place)
    card = (place / "out" / "README.md").read_text()
    assert 'base_model: "base"' in card
    assert 'license: "mit"' in card
    assert "| adapter, times -0.5 | `sha256:" in card
    run("merge", "./a", "./a", "--weights", "1,-0.5", "--into", "base", "-o", "again", cwd=place)
    assert (place / "again" / "README.md").read_text() == card


def test_types_and_sizes(place: Path, run: Any) -> None:
    run("merge", "./a", "--into", "base", "-o", "out", "--dtype", "f32", "--shard-size", "10 KB", cwd=place)
    names = sorted(path.name for path in (place / "out").glob("model*"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    with SafetensorsFile(place / "out" / names[0]) as file:
        assert {info.dtype for info in file.tensors.values()} == {"F32"}
    assert json.loads((place / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["-o", "out", "--dtype", "f16"], 2, "--dtype: is for a merge into a base. Add --into FOLDER, its base model"),
        (["-o", "out", "--into", "base", "--shard-size", "many"], 2, "'many' is not a size"),
        (["-o", "base", "--into", "base"], 2, "base: is the source or contains it"),
        (["-o", "base/out", "--into", "base"], 2, "base/out: is inside the base, base"),
        (["-o", "out", "--into", "base", "--onto", "as-trained"], 6, "no quantization is recorded"),
        (["-o", "out", "--into", "nowhere"], 3, "nowhere"),
        (["-o", "out.gguf", "--into", "base", "--shard-size", "5GB"], 6, "a Hugging Face folder becomes one GGUF file"),
        (["-o", "out", "--into", "base", "--rank", "3"], 2, "is for a merge of adapters"),
        (["-o", "out", "--into", "base", "--requantize", "q8_0"], 6, "--requantize"),
    ],
)
def test_refused_in_one_line(place: Path, run: Any, args: list[str], code: int, says: str) -> None:
    result = run("merge", "./a", *args, cwd=place, code=code)
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (place / "out").exists()


_BARS = "from adapterhub.cli import progress; progress._INTERVAL = 0"  # from the start, as on a busy machine
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colors and movements, which take no column


def test_a_terminal_of_80_columns_is_enough(place: Path, run: Any, terminal: Any) -> None:
    run("push", "./a", "team/a", cwd=place)
    run("pull", "team/a", "-o", "b", cwd=place)
    facts = json.loads((place / "b" / "adapter.json").read_text())
    facts["base"]["quantization"] = "nf4"
    (place / "b" / "adapter.json").write_text(json.dumps(facts))
    merged = terminal("merge", "./b", "--into", "base", "-o", "out", "--requantize", "nf4", "--force", cwd=place, first=_BARS)
    assert "LEAST KEPT" in merged
    assert "--onto as-trained by up to " in " ".join(merged.split())
    run("merge", "./a", "--into", "base", "-o", "half", "--weights", "0.5", cwd=place)
    proof = terminal("verify-merge", "half", "--base", "base", "--adapter", "./a", cwd=place, first=_BARS)
    assert "STRENGTH  WHY" in proof
    assert "% unexplained" in proof
    assert "\x1b[2K" in merged, "a bar that was shown and removed"
    assert max(map(len, _CONTROL.sub("", merged + proof).splitlines())) <= 80


def test_the_training_recorded_in_adapter_json_is_used(place: Path, run: Any) -> None:
    run("push", "./a", "team/a", cwd=place)
    run("pull", "team/a", "-o", "b", cwd=place)
    facts = json.loads((place / "b" / "adapter.json").read_text())
    facts["base"]["quantization"] = "nf4"
    (place / "b" / "adapter.json").write_text(json.dumps(facts))
    document = json.loads(
        run("merge", "./b", "--into", "base", "-o", "out", "--onto", "as-trained", "--json", cwd=place).stdout
    )
    change = document["touched"][f"{Q}.weight"]
    assert change["error_as_trained"] < 0.01 < 0.05 < change["error_original"]
    proof = ("verify-merge", "out", "--base", "base", "--adapter", "./b")
    assert "1 exact" in run(*proof, "--onto", "as-trained", cwd=place).stdout
    assert "other" in run(*proof, cwd=place, code=1).stdout


def test_a_file_in_the_base_s_folder_means_the_folder_and_a_name_reports_what_is_missing(place: Path, run: Any) -> None:
    (place / "base" / "old.bin").write_bytes(b"0")
    for into, out in (("base", "one"), ("base/model.safetensors", "two")):
        assert "\n  left out: old.bin: a pickle" in run("merge", "./a", "--into", into, "-o", out, cwd=place).stdout
    assert (place / "one" / "model.safetensors").read_bytes() == (place / "two" / "model.safetensors").read_bytes()
    run("push", "./a", "team/a", cwd=place)
    run("base", "add", "mine", "./base", cwd=place)
    stderr = run("merge", "./a", "--into", "mine", "-o", "three", cwd=place, code=3).stderr
    assert "mine: a base in the registry, which has its headers only, and the weights are needed" in stderr


def test_a_gguf_adapter_into_a_gguf_base(place: Path, run: Any) -> None:
    from adapterhub_converters.containers import gguf_output
    from adapterhub_converters.containers.gguf_file import GGUFFile
    from adapterhub_converters.containers.gguf_types import string_value, u32_value

    metadata = {
        "general.architecture": string_value("llama"),
        "llama.attention.head_count": u32_value(4),
        "llama.block_count": u32_value(1),
    }
    metadata["general.type"] = string_value("model")
    rng = np.random.default_rng(1)
    embedding, query = np.ones((40, 64), np.float32), rng.normal(size=(64, 64)).astype(np.float32)
    gguf_output.write(place / "base.gguf", metadata, {"token_embd.weight": embedding, "blk.0.attn_q.weight": query})
    run("convert", "./a", "a.gguf", "--to", "gguf", "--base", "base.gguf", cwd=place)
    run("merge", "./a", "--into", "base.gguf", "-o", "one.gguf", cwd=place)
    document = json.loads(run("merge", "a.gguf", "--into", "base.gguf", "-o", "two.gguf", "--json", cwd=place).stdout)
    assert list(document["touched"]) == ["blk.0.attn_q.weight"]
    with GGUFFile(place / "one.gguf") as first, GGUFFile(place / "two.gguf") as second:
        for name in first.tensors:
            assert first.raw(name).tobytes() == second.raw(name).tobytes()
        lineage = json.loads(second.header.text("adapterhub.merged"))
    assert lineage["adapters"][0]["weight"] == 1
    assert lineage["adapters"][0]["digest"].startswith("sha256:")


def test_what_rounding_takes_is_said_with_the_option_that_keeps_it(place: Path, run: Any) -> None:
    with SafetensorsFile(place / "a" / peft.WEIGHTS) as file:
        small = {name: file.tensor(name) * np.float32(0.02 if "lora_B" in name else 1) for name in file.tensors}
    safetensors_file.write(place / "a" / peft.WEIGHTS, small, {"format": "pt"})
    assert "; all of it with --dtype f32" in run("merge", "./a", "--into", "base", "-o", "out", cwd=place).stdout
    assert "with --dtype" not in run("merge", "./a", "--into", "base", "-o", "f32", "--dtype", "f32", cwd=place).stdout
