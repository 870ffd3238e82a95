"""Merges into a base by a method: what the method makes of the deltas, without truncation to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.analysis.low_rank import Factors
from adapterhub.merging import METHODS, ModelMergeReport, combine, join, merge_into_base, prepare_merge
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank, Meta, Rows
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import ParameterError, RefusedError
from tests.conftest import Run
from tests.merging.into_base.test_model_merge import K, Q, base_in, tensors_of

WIDE = 16  # the full rank of the modules
NOT_SUMS = [name for name, method in METHODS.items() if not method.sums and not method.on_factors]


def gguf_tensors(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile(path) as file:
        return {name: file.tensor(name) for name in file.tensors}


def low_rank(seed: int, m: int) -> LowRank:
    rng = np.random.default_rng(seed)
    lora_A, lora_B = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(m, 3)).astype(np.float32)
    return LowRank(lora_A, lora_B, alpha=6)


ONE = Adapter({Q: low_rank(1, 16), K: low_rank(2, 8)})
TWO = Adapter({Q: low_rank(3, 16)})


def into(base: Path, out: Path, adapters: Sequence[Adapter], weights: Sequence[float], **options: Any) -> ModelMergeReport:
    weighted, gguf = list(zip(adapters, weights, strict=True)), base.is_dir() and out.suffix == ".gguf"
    return prepare_merge(weighted, base, gguf=gguf, join=join(adapters, weights, **options)).write(out)


@pytest.mark.parametrize("name", NOT_SUMS)
def test_a_method_adds_to_the_base_what_its_adapter_of_full_rank_would(tmp_path: Path, name: str) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    weights = (0.7, 0.6) if METHODS[name].weights != "none" else (1.0, 1.0)
    rank: dict[str, Any] = {"rank": WIDE} if METHODS[name].cuts else {}
    adapter, _ = combine([ONE, TWO], weights, method=name, seed=5, **rank)
    merge_into_base([(adapter, 1.0)], base, tmp_path / "by-adapter")
    report = into(base, tmp_path / "directly", [ONE, TWO], weights, method=name, seed=5)
    assert sorted(report.touched) == [f"{K}.weight", f"{Q}.weight"]
    tensors, direct = tensors_of(tmp_path / "by-adapter"), tensors_of(tmp_path / "directly")
    assert not np.array_equal(direct[f"{Q}.weight"], tensors_of(base)[f"{Q}.weight"])
    for tensor, values in tensors.items():
        np.testing.assert_allclose(direct[tensor], values, atol=2e-5, err_msg=tensor)


def test_ties_is_not_cut_to_the_rank_of_the_adapters(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    into(base, tmp_path / "out", [ONE, TWO], (1.0, 1.0), method="ties")
    delta = tensors_of(tmp_path / "out")[f"{Q}.weight"] - tensors_of(base)[f"{Q}.weight"]
    assert np.linalg.matrix_rank(delta, tol=1e-3) > 6


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della"])
def test_the_result_does_not_depend_on_how_the_base_is_read(tmp_path: Path, name: str) -> None:
    rows = join([ONE, TWO], (1.0, 1.0), method=name)
    assert rows is not None
    rng = np.random.default_rng(0)
    left_factor, right_factor = rng.normal(size=(1500, 4)), rng.normal(size=(4, 600))
    changed_rows = rows("x", [Factors(left_factor, right_factor), Factors(left_factor[::-1].copy(), right_factor)])
    whole = changed_rows(0, 1500)
    pieces = np.concatenate([changed_rows(start, min(start + 193, 1500)) for start in range(0, 1500, 193)])
    assert np.array_equal(whole, pieces)


def test_a_sum_needs_no_method(tmp_path: Path) -> None:
    assert join([ONE, TWO], (1.0, 0.5), method="linear") is None
    with pytest.raises(ParameterError, match="separately"):
        join([ONE, TWO], (1.0, 1.0), method="peft_ties")
    with pytest.raises(ParameterError, match="is not a parameter of ties"):
        join([ONE, TWO], (1.0, 1.0), method="ties", parameters={"gamma": 1.0})


@pytest.mark.parametrize(
    "refused",
    [
        Adapter({Q: LowRank(np.ones((3, 16), np.float32), np.ones((16, 3), np.float32), 3, magnitude=np.ones(16, np.float32))}),
        Adapter({Q: LowRank(np.ones((3, 16), np.float32), np.ones((16, 3), np.float32), 3, bias=np.ones(16, np.float32))}),
        Adapter({}, rows={"model.embed_tokens": Rows((1,), np.ones((1, 16), np.float32))}),
        Adapter({}, replaced={f"{Q}.bias": np.ones(16, np.float32)}),
        Adapter({"model.layers.0.no_such": low_rank(1, 16)}),
    ],
)
def test_what_is_no_delta_of_the_base_is_refused_by_name(tmp_path: Path, refused: Adapter) -> None:
    with pytest.raises(RefusedError):
        into(base_in(tmp_path / "base"), tmp_path / "out", [ONE, refused], (1.0, 1.0), method="ties")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_into_a_gguf_is_into_the_folder_that_it_was_made_of(tmp_path: Path) -> None:
    from tests.support import tiny

    folder = tmp_path / "hf"
    tiny.model("LlamaForCausalLM").save_pretrained(folder)
    shapes = {name: values.shape for name, values in tensors_of(folder).items()}
    rng = np.random.default_rng(7)

    def adapter(*names: str) -> Adapter:
        deltas = {}
        for name in names:
            target = f"model.layers.0.{name}"
            m, n = shapes[f"{target}.weight"]
            deltas[target] = LowRank(rng.normal(size=(2, n)).astype(np.float32), rng.normal(size=(m, 2)).astype(np.float32), 2)
        return Adapter(deltas, meta=Meta())

    adapters = [adapter("self_attn.q_proj", "mlp.up_proj"), adapter("self_attn.q_proj", "self_attn.v_proj")]
    prepare_merge([], folder, gguf=True).write(tmp_path / "base.gguf")
    into(tmp_path / "base.gguf", tmp_path / "one.gguf", adapters, (1.0, 1.0), method="ties")
    into(folder, tmp_path / "two.gguf", adapters, (1.0, 1.0), method="ties")
    old, single, two = (gguf_tensors(tmp_path / f"{name}.gguf") for name in ("base", "one", "two"))
    changed = [name for name in single if not np.array_equal(single[name], old[name])]
    assert sorted(changed) == ["blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.ffn_up.weight"]
    for name in single:
        np.testing.assert_allclose(single[name], two[name], atol=2e-6, err_msg=name)


def test_the_command_records_the_method_in_the_card(run: Run, tmp_path: Path) -> None:
    from adapterhub_converters.formats import peft

    base_in(tmp_path / "base", dtypes.F32)
    for name, adapter in (("one", ONE), ("two", TWO)):
        (tmp_path / name).mkdir()
        peft.write(adapter, tmp_path / name)
    run("merge", "one", "two", "--into", "base", "--method", "ties", "--set", "density=0.5", "-o", "out")
    assert "| method | ties density 0.5, lambda 1.0 |" in (tmp_path / "out/README.md").read_text()
    refused = [("--rank", "4"), ("--energy", "0.5"), ("--recipe-only",)]
    for words in refused:
        assert (
            "error: --"
            in run("merge", "one", "two", "--into", "base", "--method", "ties", *words, "-o", "again", code=2).stderr
        )
    assert not (tmp_path / "again").exists()
