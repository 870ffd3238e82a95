"""`fuse` without peers: what it refuses, what it copies, and what a death in the middle leaves."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, fuse
from adapterhub.merging.into_base.merge_proof import prove
from adapterhub.merging.into_base.product import chain, keeps_order, panels, product
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, Meta, Rows
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError
from tests.conftest import ROOT

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    f"{Q}.weight": (16, 16),
    f"{K}.weight": (8, 16),
    f"{Q}.bias": (16,),
    "lm_head.weight": (40, 16),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}


def base_in(folder: Path, dtype: np.dtype = dtypes.BF16, scale: float = 1, drop: str = "", **config: Any) -> Path:
    rng = np.random.default_rng(1)
    folder.mkdir()
    tensors = {name: (scale * rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items() if name != drop}
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def low_rank(m: int = 16, n: int = 16, r: int = 2, scale: float = 1, **more: Any) -> LowRank:
    rng = np.random.default_rng(2)
    lora_A, lora_B = rng.normal(size=(r, n)), scale * rng.normal(size=(m, r))
    return LowRank(lora_A.astype(np.float32), lora_B.astype(np.float32), **{"alpha": 4.0, **more})


def embedding(vocabulary: int = 40, **more: Any) -> LowRankEmbedding:
    return LowRankEmbedding(np.ones((2, vocabulary), np.float32), np.ones((16, 2), np.float32), alpha=1, **more)


PLAIN = Adapter({Q: low_rank()})
TABLE = np.ones((40, 16), np.float32)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.tensor(name) for name in file.tensors}


def test_only_the_target_changes_and_the_header_stays(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    seen: list[tuple[int, int]] = []
    report = fuse([(PLAIN, 0.5)], base, tmp_path / "out", progress=lambda done, size: seen.append((done, size)))
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {f"{Q}.weight"}
    delta = PLAIN.deltas[Q]
    expected = before[f"{Q}.weight"].astype(np.float32) + 0.5 * delta.scaling * (delta.lora_B @ delta.lora_A)
    np.testing.assert_allclose(after[f"{Q}.weight"].astype(np.float32), expected, rtol=2**-8)
    assert seen[-1] == (report.size, report.size)
    assert report.touched_size == 16 * 16 * 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_tied_base_takes_what_is_not_the_table(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", drop="lm_head.weight", vocab_size=16)  # as many as q_proj has rows
    assert set(fuse([(PLAIN, 1.0)], base, tmp_path / "out").touched) == {f"{Q}.weight"}


@pytest.mark.parametrize("magnitude", [None, np.linspace(1, 2, 16, dtype=np.float32)], ids=["plain", "norms of columns"])
def test_tiles_and_workers_do_not_change_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magnitude: np.ndarray | None
) -> None:
    base = base_in(tmp_path / "base")
    deltas: dict[str, Delta] = {Q: low_rank(), K: low_rank(8), "model.embed_tokens": embedding(magnitude=magnitude)}
    adapter = Adapter(deltas, rows={"lm_head": Rows((39, 0), TABLE[:2])})
    fuse([(adapter, 1.0)], base, tmp_path / "one")
    monkeypatch.setattr(sys.modules["adapterhub.merging.into_base.output_files"], "TILE", 40)
    fuse([(adapter, 1.0)], base, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    monkeypatch.setattr(sys.modules["adapterhub.merging.into_base.merge_proof"], "_TILE", 40)
    proofs = prove([(adapter, 1.0)], base, tmp_path / "two")
    assert {tensor.verdict for tensor in proofs.tensors} == {"exact", "untouched"}


def test_a_delta_below_the_steps_of_the_dtype_is_reported_as_lost(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    report = fuse([(Adapter({Q: low_rank(scale=1e-4)}), 1.0)], base, tmp_path / "out")
    change = report.touched[f"{Q}.weight"]
    assert change.relative is not None
    assert change.relative < 1e-3
    assert change.retained is not None
    assert change.retained < 0.9


def test_side_files(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    for name in (
        "tokenizer.json",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "adapter_config.json",
        ".git/x",
        "sub/vocab.txt",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    (tmp_path / "secret").write_text("x")
    (base / "link.txt").symlink_to(tmp_path / "secret")
    report = fuse([(PLAIN, 1.0)], base, tmp_path / "out")
    there = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert there == {"config.json", "model.safetensors", "tokenizer.json", "sub/vocab.txt", "README.md"}
    assert set(report.skipped) == {"pytorch_model.bin", "consolidated.safetensors", "adapter_config.json", "link.txt"}
    assert "pickle" in report.skipped["pytorch_model.bin"]


def replaced(**tensors: np.ndarray) -> Adapter:
    return Adapter({}, replaced={name.replace("__", "."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("adapters", "base", "says"),
    [
        ([], {}, "no adapter to merge"),
        ([(Adapter({"model.layers.9.q": low_rank()}), 1)], {}, "model.layers.9.q.weight: not in the base"),
        ([(Adapter({Q: low_rank(16, 12)}), 1)], {}, "changes a weight of shape (16, 12), the base's"),
        ([(Adapter({"model.embed_tokens": embedding(44)}), 1)], {}, "after the vocabulary was resized"),
        (
            [(Adapter({"model.embed_tokens": embedding()}), 1)],
            {"drop": "lm_head.weight", "architectures": ["OtherForCausalLM"]},
            "are one tensor (model.embed_tokens.weight)",
        ),
        ([(replaced(lm_head__weight=TABLE), 0.5)], {}, "weight 0.5 has no meaning for it"),
        ([(replaced(lm_head__weight=TABLE[:5]), 1)], {}, "its tables do not agree: lm_head.weight 5, model"),
        ([(replaced(lm_head__weight=TABLE), 1), (Adapter({"lm_head": low_rank(40)}), 1)], {}, "another changes it too"),
        ([(Adapter({"lm_head": low_rank(40)}), 1), (replaced(lm_head__weight=TABLE), 1)], {}, "another changes it too"),
        ([(Adapter({}, rows={"lm_head": Rows((40,), TABLE[:1])}), 1)], {}, "do not fit the base's lm_head.weight"),
        ([(Adapter({K: low_rank(8, bias=np.ones(8, np.float32))}), 1)], {}, "the base has none"),
        ([(Adapter({Q: low_rank(magnitude=np.ones(16, np.float32))}), 0.5)], {}, "DoRA is not a sum"),
        ([(Adapter({Q: low_rank(magnitude=np.ones(4, np.float32))}), 1)], {}, "a DoRA magnitude of 4 numbers for 16"),
        ([(Adapter({Q: low_rank(transposed_base=True)}), 1)], {}, "is not known to store it transposed"),
        ([(dataclasses.replace(PLAIN, meta=Meta(init="olora")), 1)], {}, "initialized by olora"),
        ([(Adapter({Q: low_rank(scale=np.nan)}), 1)], {}, f"{Q}.lora_B: contains NaN or Inf"),
        ([(PLAIN, float("nan"))], {}, "nan is not a finite number"),
        ([(PLAIN, 1)], {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized (gptq)"),
        ([(PLAIN, 1)], {"dtype": np.dtype("i1")}, "is I8, not bfloat16, float16 or float32. Dequantize it first"),
        ([(PLAIN, 1e6)], {"dtype": dtypes.F16}, "is over 65504, the largest float16 number. Write bfloat16 instead"),
        ([(PLAIN, 1)], {"dtype": dtypes.F16, "scale": np.inf}, "the base has NaN or Inf"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_refused(tmp_path: Path, adapters: Any, base: dict[str, Any], says: str) -> None:
    folder = base_in(tmp_path / "base", **base)
    with pytest.raises(AdapterhubError) as caught:
        fuse(adapters, folder, tmp_path / "out")
    assert says in str(caught.value)
    assert caught.value.exit_code == 6
    assert (caught.value.code == "sum-too-large") == ("Write bfloat16 instead" in says)
    assert (caught.value.code == "quantized-base") == ("the weights are quantized" in says)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_type_of_gguf_for_a_folder_is_refused_by_its_code(tmp_path: Path) -> None:
    says = "q8_0: is a type of GGUF files, and the output is a Hugging Face folder. Merge into a .gguf, or choose nf4"
    with pytest.raises(AdapterhubError, match=says) as caught:
        fuse([(PLAIN, 1)], base_in(tmp_path / "base"), tmp_path / "out", options=Options(requantize="q8_0"))
    assert (caught.value.code, caught.value.exit_code) == ("gguf-type-for-folder", 6)


def test_a_name_that_could_be_two_tensors(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    tensors = {f"{part}.{name}": tensor for part in ("text", "vision") for name, tensor in tensors_of(base).items()}
    safetensors_file.write(base / "model.safetensors", tensors)
    with pytest.raises(AdapterhubError, match=r"could be text\..* or vision\."):
        fuse([(PLAIN, 1)], base, tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda base: (base / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"), "is a pickle"),
        (lambda base: (base.parent / "out").mkdir() or (base.parent / "out" / "x").touch(), "already exists"),
        (lambda base: (base / "config.json").unlink(), "there is no config.json"),
        (
            lambda base: (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}'),
            "maps tensor 'x' to model.safetensors, which does not contain it",
        ),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_refused(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    base = base_in(tmp_path / "base")
    spoil(base)
    with pytest.raises(AdapterhubError) as caught:
        fuse([(PLAIN, 1)], base, tmp_path / "out")
    assert says in str(caught.value)


FUSE = """
import resource, sys, time
from pathlib import Path
from tests.merging.into_base.test_fuse import PLAIN, fuse
base, out, how = sys.argv[1:]
if how == "small":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
def wait(done, size):
    print("half way", flush=True)
    time.sleep(60)
fuse([(PLAIN, 1.0)], Path(base), Path(out), progress=wait if how == "wait" else None)
"""


def in_a_process(base: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FUSE, str(base), str(base.parent / "out"), how],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'converters'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_half_way_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    with in_a_process(base, "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        names = [path.name for path in tmp_path.iterdir() if path.name != "base"]
        assert len(names) == 1
        assert names[0].startswith(".out.partial-")
        fuse([(PLAIN, 1.0)], base, tmp_path / "out")  # while another still works: its folder stays
        assert (tmp_path / names[0]).exists()
        (tmp_path / "out").rename(tmp_path / "first")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    fuse([(PLAIN, 1.0)], base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "first", "out"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    with in_a_process(base, "small") as process:
        assert process.stderr is not None
        last = process.stderr.read().strip().splitlines()[-1]
    assert last.startswith(
        f"{LocalIOError.__module__}.LocalIOError: {tmp_path / 'out'}: File too large; nothing was left behind"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("r", [1, 2, 7, 8, 16, 64, 200])
@pytest.mark.parametrize("fast", [True, False])
def test_the_product_is_the_chain_on_any_path(r: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    left = rng.normal(size=(24, r)).astype(np.float32)
    right = rng.normal(size=(r, 700)).astype(np.float32)
    if not fast:
        monkeypatch.setattr("adapterhub.merging.into_base.product.keeps_order", lambda columns, r: False)
    expected = sum(chain(left[:, a:b], right[a:b]) for a, b in panels(r))
    np.testing.assert_array_equal(product(left, right, np.empty((24, 700), np.float32)), expected)


@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("fast", [True, False])
def test_a_large_product_is_the_chain_in_every_column(r: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=size).astype(np.float32) for size in ((374, r), (r, 1405)))
    if not fast:
        monkeypatch.setattr("adapterhub.merging.into_base.product.out_of_order", lambda columns, r: None)
    found = product(left, right, np.empty((374, 1405), np.float32))
    rows = [*range(14), *range(366, 374)]
    np.testing.assert_array_equal(found[rows], chain(left[rows], right))


def test_the_chain_rounds_once_a_step() -> None:
    from fractions import Fraction

    rng = np.random.default_rng(3)
    left, right = (rng.normal(size=size).astype(np.float32) for size in ((6, 9), (9, 5)))
    expected = np.zeros((6, 5), np.float32)
    for i in range(6):
        for j in range(5):
            total = np.float32(0)
            for k in range(9):
                total = nearest(Fraction(float(left[i, k])) * Fraction(float(right[k, j])) + Fraction(float(total)))
            expected[i, j] = total
    np.testing.assert_array_equal(chain(left, right), expected)
    assert isinstance(keeps_order(64, 4), bool)


def nearest(exact: Any) -> np.float32:
    """The float32 closest to a fraction (no ties in random numbers)."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda value: abs(exact - type(exact)(float(value))))
