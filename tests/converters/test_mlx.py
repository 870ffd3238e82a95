"""mlx-lm folders: the same function in mlx-lm's own words, and the way back to PEFT loses no byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, Loss, LossReport, LowRank, LowRankEmbedding, Meta, Rows, StackedLowRank
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import mlx, peft
from tests.conftest import need_module

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def delta(*, r: int = 2, alpha: float = 4, seed: int = 0, dtype: Any = np.float32, **fields: Any) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.normal(size=(r, 8)).astype(dtype), rng.normal(size=(6, r)).astype(dtype), alpha, **fields)


EMBED = LowRankEmbedding(np.arange(20, dtype=np.float32).reshape(2, 10), np.ones((6, 2), np.float32), 4)
ADAPTER = Adapter({Q: delta(seed=1), UP: delta(seed=2, alpha=5, dtype=np.float16), "model.embed_tokens": EMBED})


UNTIED = BaseSpec("untied", "hf", "Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 4})
TIED = BaseSpec("tied", "hf", "LlamaForCausalLM", "llama", {}, tied=True)
EXPERT = "model.layers.0.mlp.experts"


def write(adapter: Adapter, path: Path, base: BaseSpec | None = UNTIED) -> Path:
    path.mkdir()
    mlx.write(adapter, path, base=base)
    return path


def report(adapter: Adapter, path: Path, base: BaseSpec | None = UNTIED) -> LossReport:
    path.mkdir()
    return mlx.write(adapter, path, base=base)


def applied(folder: Path) -> dict[str, np.ndarray]:
    """What mlx-lm adds to each weight, `(out, in)`: `scale * (lora_a @ lora_b).T` (mlx-lm, `tuner/lora.py`, `fuse`)."""
    scale = json.loads((folder / mlx.CONFIG).read_text())["lora_parameters"]["scale"]
    with safetensors_file.SafetensorsFile(folder / mlx.WEIGHTS) as file:
        tensors = {name: file.tensor(name).astype(np.float64) for name in file.tensors}
    targets = {name.rpartition(".")[0] for name in tensors}
    return {target: scale * (tensors[f"{target}.lora_a"] @ tensors[f"{target}.lora_b"]).T for target in targets}


def test_mlx_lm_applies_the_same_deltas(tmp_path: Path) -> None:
    applied_deltas = applied(write(ADAPTER, tmp_path / "a"))
    for target, low in ADAPTER.deltas.items():
        dense = low.scaling * low.lora_B.astype(np.float64) @ low.lora_A.astype(np.float64)
        np.testing.assert_allclose(applied_deltas[target], dense, rtol=1e-6)


def test_the_config_has_what_mlx_lm_reads(tmp_path: Path) -> None:
    assert json.loads((write(ADAPTER, tmp_path / "a") / mlx.CONFIG).read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.up_proj", "model.embed_tokens", "self_attn.q_proj"],
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (Adapter({}), "there is no low-rank delta"),
        (Adapter({Q: delta(), UP: delta(magnitude=np.ones(6))}), "q_proj: an mlx-lm adapter is DoRA in all its modules or in"),
        (Adapter({f"{EXPERT}.0.up_proj": delta(magnitude=np.ones(6))}), "and never in experts"),
        (Adapter({Q: delta(bias=np.ones(6))}), "q_proj: a bias cannot be expressed"),
        (Adapter({f"{EXPERT}.0.odd_proj": delta()}), "not a module that mlx-lm is known to have under this name"),
        (Adapter({f"{EXPERT}.0.up_proj": delta(), f"{EXPERT}.1.up_proj": delta(dtype=np.float16)}), "of different dtypes"),
        (Adapter({"transformer.h.0.attn.c_attn": delta()}), "not a module that mlx-lm is known to have under this name"),
        (Adapter({Q: delta(transposed_base=True)}), "an embedding or transposed module"),
        (Adapter({Q: delta()}, replaced={"lm_head.weight": np.ones((2, 2))}), "a replaced parameter cannot be expressed"),
        (Adapter({Q: delta()}, rows={"model.embed_tokens": Rows((1,), np.ones((1, 2)))}), "replaced rows cannot be expressed"),
        (Adapter({Q: delta()}, meta=Meta(init="olora")), "its factors were initialized with olora"),
    ],
)
def test_what_mlx_lm_cannot_express_is_refused_by_name(tmp_path: Path, adapter: Adapter, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        write(adapter, tmp_path / "a")
    assert says in str(caught.value)


def test_peft_to_mlx_and_back_is_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    peft.write(ADAPTER, tmp_path / "peft")
    original = peft.read(tmp_path / "peft")
    (tmp_path / "again").mkdir()
    peft.write(mlx.read(write(original, tmp_path / "mlx")), tmp_path / "again")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def experts(**fields: Any) -> Adapter:
    rng = np.random.default_rng(5)
    shapes = {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}
    return Adapter(
        {
            f"{EXPERT}.{e}.{name}": LowRank(
                rng.normal(size=(2 + e, into)).astype(np.float16), rng.normal(size=(out, 2 + e)).astype(np.float16), 3.0 + e
            )
            for e in (0, 2)
            for name, (out, into) in shapes.items()
        },
        **fields,
    )


VARIANTS = {
    "ranks": Adapter({Q: delta(), UP: delta(r=3, seed=3), "model.embed_tokens": EMBED}),
    "dora": Adapter({Q: delta(magnitude=np.arange(6, dtype=np.float32)), UP: delta(seed=1, magnitude=np.ones(6, np.float32))}),
    "experts": experts(),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_comes_back_to_the_byte(tmp_path: Path, name: str) -> None:
    (tmp_path / "peft").mkdir()
    peft.write(VARIANTS[name], tmp_path / "peft")
    written = write(peft.read(tmp_path / "peft"), tmp_path / "mlx")
    (tmp_path / "again").mkdir()
    peft.write(mlx.read(written), tmp_path / "again")
    for file in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()


def test_smaller_ranks_are_filled_with_zeros_and_reported(tmp_path: Path) -> None:
    losses_by_name = {line.name: line for line in report(VARIANTS["ranks"], tmp_path / "a").losses}
    assert losses_by_name[f"{UP}.lora_A"].loss == Loss.EXACT
    assert losses_by_name[f"{Q}.lora_A"].loss == Loss.REWRITTEN
    assert "padded with zeros to rank 3" in losses_by_name[f"{Q}.lora_B"].note
    for target, dense in applied(tmp_path / "a").items():
        expected = VARIANTS["ranks"].deltas[target]
        np.testing.assert_allclose(dense, expected.scaling * expected.lora_B.astype(np.float64) @ expected.lora_A, rtol=1e-6)


def test_a_stacked_parameter_becomes_gate_and_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stacked = StackedLowRank(rng.normal(size=(3, 2, 8)).astype(np.float32), rng.normal(size=(3, 12, 2)).astype(np.float32), 4.0)
    folder = write(Adapter({f"{EXPERT}.gate_up_proj": stacked}), tmp_path / "a")
    deltas = mlx.read(folder).deltas
    for e in range(3):
        halves = [deltas[f"{EXPERT}.{e}.{part}"] for part in ("gate_proj", "up_proj")]
        halves_product = np.concatenate([half.scaling * half.lora_B @ half.lora_A for half in halves])
        np.testing.assert_allclose(halves_product, 2.0 * stacked.lora_B[e] @ stacked.lora_A[e], rtol=1e-6)


def test_one_table_for_two_where_the_base_ties_them(tmp_path: Path) -> None:
    head = LowRank(EMBED.lora_B.T.copy(), EMBED.lora_A.T.copy(), 4)
    adapter = Adapter({"model.embed_tokens": EMBED, "lm_head": head})
    with pytest.raises(RefusedError, match="one delta"):
        write(Adapter({"model.embed_tokens": EMBED}), tmp_path / "a", TIED)
    with pytest.raises(RefusedError, match="one delta"):
        write(Adapter({"model.embed_tokens": EMBED, "lm_head": delta()}), tmp_path / "b", TIED)
    with pytest.raises(RefusedError, match="name the base"):
        write(Adapter({"model.embed_tokens": EMBED}), tmp_path / "c", None)
    folder = write(adapter, tmp_path / "d", TIED)
    with safetensors_file.SafetensorsFile(folder / mlx.WEIGHTS) as file:
        assert set(file.tensors) == {"model.embed_tokens.lora_a", "model.embed_tokens.lora_b"}
    again = mlx.read(folder, base=TIED).deltas
    assert again["lm_head"].lora_A.tobytes() == head.lora_A.tobytes()
    assert set(mlx.read(folder, base=UNTIED).deltas) == {"model.embed_tokens"}


@pytest.mark.peer
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"alpha_pattern": {"k_proj": 11}},
        {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "lm_head", "embed_tokens"]},
        {"lora_alpha": 0},
        {"rank_pattern": {"k_proj": 2, "down_proj": 6}},
        {"use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"use_dora": True, "use_rslora": True, "alpha_pattern": {"v_proj": 5}},
    ],
)
def test_the_real_mlx_lm_computes_what_peft_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    need_module("mlx_lm")
    import mlx.core as mx
    import torch
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    from tests.support import tiny

    tokens = [3, 17, 99, 5, 64, 23, 101, 7]
    model = tiny.model()
    model.save_pretrained(tmp_path / "base")
    wrapped = tiny.adapter(model, tmp_path / "peft", **config)
    with torch.no_grad():
        expected = wrapped(torch.tensor([tokens])).logits[0].numpy()
    write(peft.read(tmp_path / "peft"), tmp_path / "mlx")
    loaded, _ = load_model(tmp_path / "base")
    mlx_logits = np.array(load_adapters(loaded, str(tmp_path / "mlx"))(mx.array([tokens]))[0])
    assert np.abs(mlx_logits - expected).max() < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"tie_word_embeddings": True, "embed": True}])
def test_peft_computes_what_the_real_mlx_lm_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    need_module("mlx_lm")
    import mlx.core as mx
    import torch
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model
    from peft import PeftModel

    from adapterhub_converters import bases
    from tests.support import tiny

    tokens = [3, 17, 99, 5, 64, 23, 101, 7]
    model = tiny.model(tie_word_embeddings=bool(config.get("embed")))
    model.save_pretrained(tmp_path / "base")
    loaded, _ = load_model(tmp_path / "base")
    keys = ["self_attn.q_proj", "mlp.down_proj", *(["model.embed_tokens"] if config.get("embed") else [])]
    parameters = {"rank": 3, "scale": 1.7, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(loaded, 2, parameters, use_dora=bool(config.get("use_dora")))
    mx.random.seed(0)
    leaves = ("lora_a", "lora_b", "m")
    loaded.update(
        tree_map_with_path(
            lambda name, a: a + 0.1 * mx.random.normal(a.shape) if name.rpartition(".")[2] in leaves else a, loaded.parameters()
        )
    )
    expected = np.array(loaded(mx.array([tokens]))[0])
    weights = {name: a for name, a in tree_flatten(loaded.parameters()) if name.rpartition(".")[2] in leaves}
    (tmp_path / "mlx").mkdir()
    mx.save_safetensors(str(tmp_path / "mlx" / mlx.WEIGHTS), weights)
    kind = "dora" if config.get("use_dora") else "lora"
    (tmp_path / "mlx" / mlx.CONFIG).write_text(
        json.dumps({"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters})
    )
    (tmp_path / "peft").mkdir()
    peft.write(mlx.read(tmp_path / "mlx", base=bases.read_base(tmp_path / "base")), tmp_path / "peft")
    with torch.no_grad():
        peft_logits = PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(peft_logits - expected).max() < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_the_real_mlx_lm_adds_the_deltas_of_experts(tmp_path: Path, family: str) -> None:
    need_module("mlx_lm")
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    from adapterhub_converters import bases
    from tests.support import tiny

    expert_numbers = {"num_local_experts": 4} if family == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 32}
    tiny.model(f"{family}ForCausalLM", num_experts_per_tok=4, **expert_numbers).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())  # mlx-lm wants the names of before transformers 5
    (tmp_path / "base/config.json").write_text(json.dumps(config | expert_numbers | {"rope_theta": 10_000.0}))
    rng = np.random.default_rng(0)
    mixtral = family == "Mixtral"
    width = 96 if mixtral else 32
    block, names = ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    shapes = dict(zip(names, [(width, 64), (width, 64), (64, width)], strict=True))
    adapter = Adapter(
        {
            f"model.layers.{layer}.{block}.experts.{e}.{name}": LowRank(
                rng.normal(size=(2, into)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32), 2.0 + e
            )
            for layer in (0, 1)
            for e in (0, 1, 3)
            for name, (out, into) in shapes.items()
        }
    )
    write(adapter, tmp_path / "mlx", bases.read_base(tmp_path / "base"))
    plain, _ = load_model(tmp_path / "base")
    before = {name: np.array(a) for name, a in tree_flatten(plain.parameters())}
    loaded, _ = load_model(tmp_path / "base")
    load_adapters(loaded, str(tmp_path / "mlx"))
    modules = dict(loaded.named_modules())
    turned = dict(zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True))
    for target, low in adapter.deltas.items():
        stem, _, after_experts = target.partition(".experts.")
        e, _, name = after_experts.partition(".")
        switch = f"{stem}.switch_mlp.{turned[name]}"
        change = np.array(modules[switch].fuse().weight)[int(e)] - before[f"{switch}.weight"][int(e)]
        np.testing.assert_allclose(change, low.scaling * low.lora_B @ low.lora_A, atol=2e-5)
    assert np.isfinite(np.array(loaded(mx.array([[3, 5]])))).all()
