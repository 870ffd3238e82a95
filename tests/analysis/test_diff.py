"""What changed between two adapters, against dense matrices and peft's own deltas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapterhub.analysis.diff import compare, diff
from adapterhub_converters.adapter import (
    Adapter,
    Delta,
    LowRank,
    LowRankConv,
    LowRankEmbedding,
    Meta,
    PooledLowRank,
    Rows,
    StackedLowRank,
)
from adapterhub_converters.formats import convert
from tests.cli.test_commands import document
from tests.conftest import Run, Terminal, need_module
from tests.support import tiny
from tests.support.folders import adapter, base, pairs

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def factors(shape_A: tuple[int, ...], shape_B: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return normal(*shape_A), normal(*shape_B)


def linear(r: int, alpha: float = 4, *, rslora: bool = False) -> LowRank:
    return LowRank(*factors((r, 9), (7, r)), alpha, rslora)


def embedding(r: int) -> LowRankEmbedding:
    return LowRankEmbedding(*factors((r, 11), (6, r)), 3.0)


def experts(r: int) -> StackedLowRank:
    return StackedLowRank(*factors((3, r, 9), (3, 7, r)), 5.0)


def convolution(r: int) -> LowRankConv:
    return LowRankConv(*factors((r, 4, 3, 3), (6, r, 1, 1)), 2.0)


def pooled(r: int) -> PooledLowRank:
    return PooledLowRank(*factors((r, 3), (7, r)), 2.0, 3)


def dense(delta: Delta) -> np.ndarray:
    """By the definitions in `deltas`, with nothing of ours but the scale."""
    if isinstance(delta, PooledLowRank):
        delta = delta.as_low_rank()
    a, b = delta.lora_A.astype(np.float64), delta.lora_B.astype(np.float64)
    if isinstance(delta, LowRankConv):
        return delta.scaling * np.einsum("or,r...->o...", b[:, :, 0, 0], a)
    return delta.scaling * (b @ a)


KINDS = [
    (lambda: linear(2), lambda: linear(2)),
    (lambda: linear(2), lambda: linear(5)),
    (lambda: linear(4, 8), lambda: linear(3, 8, rslora=True)),
    (lambda: embedding(2), lambda: embedding(3)),
    (lambda: experts(2), lambda: experts(3)),
    (lambda: convolution(2), lambda: convolution(3)),
    (lambda: pooled(2), lambda: linear(3)),
]


@pytest.mark.parametrize("make", KINDS, ids=["linear", "ranks", "rslora", "embedding", "experts", "conv", "qalora"])
def test_change_size_and_cosine_are_those_of_the_dense_matrices(make: tuple[Callable[[], Delta], ...]) -> None:
    a, b = (make_delta() for make_delta in make)
    module = compare(Adapter({"m": a}), Adapter({"m": b})).modules[0]
    x, y = dense(a), dense(b)
    assert module.change == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9)
    assert module.ratio == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x), rel=1e-9)
    assert module.cosine == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert module.status == "changed"


@pytest.mark.parametrize("make", [kinds[0] for kinds in KINDS], ids=[str(number) for number in range(len(KINDS))])
def test_the_same_numbers_are_no_change_exactly(make: Callable[[], Delta]) -> None:
    delta = make()
    comparison = compare(Adapter({"m": delta}), Adapter({"m": delta}))
    assert (comparison.modules[0].change, comparison.modules[0].cosine, comparison.change) == (0.0, 1.0, 0.0)
    assert comparison.identical


def test_norms_are_computed_only_if_a_module_has_other_numbers() -> None:
    first, second = linear(2), linear(2)
    assert [module.a and module.a.size for module in compare(Adapter({"m": first}), Adapter({"m": first})).modules] == [None]
    steps: list[tuple[int, int]] = []
    comparison = compare(
        Adapter({"m": first, "n": first}), Adapter({"m": first, "n": second}), progress=lambda *step: steps.append(step)
    )
    assert [module.a and module.a.size for module in comparison.modules] == [pytest.approx(np.linalg.norm(dense(first)))] * 2
    assert comparison.change == pytest.approx(
        np.linalg.norm(dense(second) - dense(first)) / np.linalg.norm(dense(first)) / math.sqrt(2)
    )
    assert steps == [(0, 2), (1, 2)]


def test_other_factors_of_the_same_matrix_are_no_change() -> None:
    original = linear(3, 6)
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    wide = [array.astype(np.float64) for array in (original.lora_A, original.lora_B)]
    for equal in (
        LowRank(original.lora_A, original.lora_B, original.scaling * math.sqrt(3), rslora=True),
        LowRank(original.lora_A * 2, original.lora_B / 2, original.alpha),
        LowRank(original.lora_A, original.lora_B / 8, original.alpha * 8),
        LowRank(turn @ wide[0], wide[1] @ turn.T, original.alpha),
        LowRank(np.pad(original.lora_A, ((0, 2), (0, 0))), np.pad(original.lora_B, ((0, 0), (0, 2))), original.alpha * 5 / 3),
    ):
        comparison = compare(Adapter({"m": original}), Adapter({"m": equal}))
        assert comparison.same
        assert comparison.modules[0].change is not None
        assert comparison.modules[0].change < 1e-13
        assert comparison.modules[0].cosine == pytest.approx(1, abs=1e-12)


def test_a_small_change_is_measured_as_exactly_as_a_large_one() -> None:
    lora_A, lora_B = factors((3, 40), (30, 3))
    original = LowRank(lora_A.astype(np.float64), lora_B.astype(np.float64), 3.0)
    step = RNG.normal(size=original.lora_B.shape)
    for size in (1e-2, 1e-5, 1e-9):
        changed = LowRank(original.lora_A, original.lora_B + size * step, 3.0)
        expected = size * np.linalg.norm(step @ original.lora_A) / np.linalg.norm(original.lora_B @ original.lora_A)
        assert compare(Adapter({"m": original}), Adapter({"m": changed})).modules[0].change == pytest.approx(expected, rel=1e-5)


def test_what_is_there_once_is_added_or_removed() -> None:
    comparison = compare(Adapter({"a": linear(2), "b": linear(2)}), Adapter({"b": linear(2), "c": linear(2)}))
    assert [(module.name, module.status) for module in comparison.modules] == [
        ("a", "removed"),
        ("b", "changed"),
        ("c", "added"),
    ]
    assert not comparison.same


def test_another_shape_is_reported_and_not_measured() -> None:
    module = compare(Adapter({"m": linear(2)}), Adapter({"m": experts(2)})).modules[0]
    assert (module.status, module.change) == ("changed", None)
    assert module.note == "LowRank (7, 9) became StackedLowRank (3, 7, 9)"


def test_nan_is_reported_and_not_measured() -> None:
    bad = linear(2)
    bad.lora_A[0, 0] = np.nan
    comparison = compare(Adapter({"m": linear(2)}), Adapter({"m": bad}))
    assert (comparison.modules[0].status, comparison.same, comparison.change) == ("unknown", False, None)
    assert compare(Adapter({"m": bad}), Adapter({"m": bad})).identical


def test_tensors_next_to_the_factors() -> None:
    delta, weight, rows, magnitude = linear(2), normal(4, 4), normal(2, 6), normal(7)

    def adapter_of(weight: np.ndarray, ids: tuple[int, ...], magnitude: np.ndarray) -> Adapter:
        dora = LowRank(delta.lora_A, delta.lora_B, delta.alpha, magnitude=magnitude)
        return Adapter({"m": dora}, {"head.weight": weight}, {"table": Rows(ids, rows)})

    original = adapter_of(weight, (1, 2), magnitude)
    comparison = compare(original, adapter_of(weight * 2, (1, 3), magnitude + 1e-3))
    statuses = {tensor.name: tensor.status for tensor in comparison.tensors}
    assert statuses == {"head.weight": "changed", "m.magnitude": "changed", "table (rows)": "changed"}
    assert comparison.tensors[0].change == pytest.approx(1.0)
    assert comparison.modules[0].status == "same"
    assert not comparison.same
    assert compare(original, adapter_of(weight.copy(), (1, 2), magnitude.copy())).identical


def test_when_an_adapter_acts_is_part_of_what_it_does() -> None:
    delta = linear(2)
    comparison = compare(Adapter({"m": delta}), Adapter({"m": delta}, meta=Meta(invocation=(7, 8))))
    assert [key.key for key in comparison.conditions] == ["alora_invocation_tokens"]
    assert not comparison.same
    comparison = compare(
        Adapter({"m": delta}), Adapter({"m": delta}, meta=Meta(dora=True))
    )  # of the rows of the base, unknown here
    assert [(key.key, key.a, key.b) for key in comparison.conditions] == [("lora_magnitude_vector", None, "missing")]


def test_keys_that_change_the_function_come_first_and_nothings_are_alike(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", pairs(1), use_dora=None, new_key=None, revision="1", target_modules=["q_proj", "v_proj"])
    b = adapter(tmp_path / "b", pairs(1), use_dora=False, lora_alpha=8, revision="2", target_modules=["v_proj", "q_proj"])
    difference = diff(a, b)
    assert [(key.key, key.a, key.b, key.semantic) for key in difference.config] == [
        ("lora_alpha", 4, 8, True),
        ("revision", "1", "2", False),
    ]
    assert difference.modules[0].ratio == pytest.approx(2)


@pytest.mark.parametrize("to", ["gguf", "mlx", "raw"])
def test_a_conversion_is_no_difference(tmp_path: Path, to: str) -> None:
    spec = base(tmp_path / "base", 3)
    name = "model.layers.{}.self_attn.q_proj"
    a = adapter(tmp_path / "a", pairs(3), alpha_pattern={name.format(1).replace(".", r"\."): 3}, use_rslora=True)
    convert.convert(a, tmp_path / "b", to=to, base=spec)
    difference = diff(a, tmp_path / "b", base=spec)
    assert difference.same
    assert difference.modules[0].status in ("same", "rounded")
    assert not difference.config


def test_verdicts_that_differ(tmp_path: Path) -> None:
    difference = diff(adapter(tmp_path / "a", pairs(1)), adapter(tmp_path / "b", pairs(1, r=32), r=32))
    assert difference.verdicts["vllm"][0].verdict == "applied"
    assert "vllm" in difference.verdicts
    assert "peft" not in difference.verdicts


@pytest.mark.peer
def test_changes_are_those_of_pefts_own_deltas(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    targets = ["q_proj", "down_proj", "embed_tokens"]
    adapters = [
        tiny.adapter(tiny.model(), tmp_path / "a", strength=0.1, target_modules=targets, r=4),
        tiny.adapter(tiny.model(), tmp_path / "b", strength=0.2, target_modules=targets, r=6, use_rslora=True),
    ]
    modules = {module.name: module for module in diff(tmp_path / "a", tmp_path / "b").modules}
    assert len(modules) == 5
    for target, module in modules.items():
        x, y = (
            model.get_submodule(f"base_model.model.{target}").get_delta_weight("default").detach().numpy() for model in adapters
        )
        assert module.change == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-5)
        assert module.cosine == pytest.approx(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)


def test_the_command(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(30))
    adapter(
        tmp_path / "b",
        pairs(30),
        lambda _, array: array * 2,
        lora_alpha=8,
        peft_version="0.21.2",
        target_modules=["self_attn.q_proj"],
    )
    assert run("diff", "a", "a", "--exit-code").stdout.startswith("a -> a: the same version, sha256:")
    result = run("diff", "a", "b", "--exit-code", code=1)
    assert result.stdout.startswith("a -> b: different: 30 of 30 modules changed; the whole by 700.0%\n")
    assert "… and 18 more (--json has all)" in result.stdout
    difference = document(run, "diff", "a", "b")
    assert (difference["same"], len(difference["modules"])) == (False, 30)
    assert difference["modules"]["model.layers.3.self_attn.q_proj"]["change"] == pytest.approx(7)
    run("push", "a", "team/a")
    run("push", "b", "team/a")
    assert document(run, "diff", "team/a:v1", "team/a:v2")["b"] == "team/a:v2"
    assert document(run, "diff", "team/a:v1", "a")["identical"] is True


def test_the_command_fits_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    name = "model.language_model.layers.{}.self_attn.q_proj"
    adapter(tmp_path / "a", pairs(30, module=name))
    adapter(tmp_path / "b", pairs(30, module=name), lambda _, array: array * 2, auto_mapping={"a": "b" * 100}, bias="all")
    screen = terminal("diff", "a", "b")
    plain = [line for line in screen.splitlines() if "\x1b" not in line]
    assert len(plain) > 20
    assert all(len(line) <= 80 for line in plain)
    assert "b" * 60 not in screen
