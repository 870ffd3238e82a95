"""Features of an adapter tell what a runtime loads from what needs a conversion, which then does what the verdict says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub.checks import check
from adapterhub_converters.bases import BaseTensor
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import convert
from adapterhub_converters.runtime_rules import APPLIED, RUNTIMES
from tests.checks.test_checks import shapes_of
from tests.support import folders
from tests.support.folders import Shapes, adapter, base, pairs

EMBED = {"model.embed_tokens.lora_embedding_A": (2, 12), "model.embed_tokens.lora_embedding_B": (8, 2)}


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (pairs(2), {}),
        (pairs(2), {"use_rslora": True}),
        (pairs(2), {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
        ({**pairs(2, r=3), **pairs(1)}, {"rank_pattern": {"layers.1.self_attn.q_proj": 3}}),
        (pairs(2) | shapes_of("lora_magnitude_vector"), {"use_dora": True}),
        (pairs(2) | shapes_of("lora_B.bias"), {"lora_bias": True}),
        ({**pairs(2), **EMBED}, {"target_modules": ["q_proj", "embed_tokens"]}),
        ({**pairs(2), "model.norm.weight": (8,)}, {"modules_to_save": ["norm"]}),
        ({**pairs(2), "model.embed_tokens.weight": (12, 8)}, {"modules_to_save": ["embed_tokens"]}),
        (pairs(2), {"init_lora_weights": "pissa"}),
        (pairs(2, size=(16, 8)), {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("runtime", ["llama.cpp", "mlx"])
def test_a_verdict_that_needs_a_conversion_agrees_with_the_conversion(
    tmp_path: Path, shapes: Shapes, config: dict[str, Any], tied: bool, runtime: str
) -> None:
    folder, spec = adapter(tmp_path / "a", shapes, **config), base(tmp_path / "b", tied=tied)
    verdict = checks.check(folder, base=spec).verdicts[runtime]
    style = RUNTIMES[runtime].format
    if verdict.verdict == APPLIED:
        out = tmp_path / ("out.gguf" if style == "gguf" else "out")
        convert.convert(folder, out, to=style, base=spec)
        assert checks.check(out, base=spec).verdicts[runtime].verdict == APPLIED
    elif not any("incompatible tensors" in reason for reason in verdict.reasons):  # mlx-lm's word; our writer sees no shapes
        with pytest.raises(AdapterhubError):
            convert.convert(folder, tmp_path / "out", to=style, base=spec)


@pytest.mark.parametrize(("names", "verdict"), [(("up_proj", "gate_proj"), "crashes"), (("up_proj",), APPLIED)])
def test_sglang_fuses_an_up_projection_only_where_there_is_a_gate(tmp_path: Path, names: tuple[str, ...], verdict: str) -> None:
    folder = adapter(tmp_path / "a", pairs(2, module="model.layers.{}.mlp.up_proj"))
    spec = base(tmp_path / "b")
    mlp_tensors = {f"model.layers.{n}.mlp.{name}.weight": BaseTensor((8, 8), "F32") for n in range(2) for name in names}
    report = checks.check(folder, base=dataclasses.replace(spec, tensors={**spec.tensors, **mlp_tensors}))
    assert report.verdicts["sglang"].verdict == verdict


EMBEDDING = "model.embed_tokens"
Q = "model.layers.0.self_attn.q_proj"
ONLY_CONVERTED: dict[str, tuple[folders.Shapes, dict[str, Any]]] = {
    "rows": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 8)},
        {"trainable_token_indices": {"embed_tokens": [3]}},
    ),
    "copies": (
        {f"{EMBEDDING}.lora_embedding_A": (2, 12), f"{EMBEDDING}.lora_embedding_B": (8, 2)}
        | {f"{EMBEDDING}.base_layer.weight": (12, 8)},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    "loha": (
        {f"{Q}.hada_w{n}_{half}": (8, 2) if half == "a" else (2, 8) for n in (1, 2) for half in "ab"},
        {"peft_type": "LOHA"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*ONLY_CONVERTED, "another copy", "tied rows"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("runtime", "to"), [("llama.cpp", "gguf"), ("mlx", "mlx")])
def test_the_verdict_is_what_a_conversion_does(tmp_path: Path, case: str, with_base: bool, runtime: str, to: str) -> None:
    shapes, config = ONLY_CONVERTED[{"another copy": "copies", "tied rows": "rows"}.get(case, case)]
    zeros = (
        (lambda name, array: abs(array * 0) if "base_layer" in name else array) if case == "copies" else None
    )  # as the base's
    if case != "loha":
        shapes = folders.pairs(1) | shapes
    adapter = folders.adapter(tmp_path / "a", shapes, zeros, **{"alpha": 4, **config} if case == "loha" else config)
    spec = folders.base(tmp_path / "base", layers=1, tied=case == "tied rows")
    base = spec if with_base else None
    verdict = check(adapter, base=base).verdicts[runtime]
    try:
        convert.convert(adapter, tmp_path / "out", to=to, base=spec if with_base or case == "loha" else None)
    except AdapterhubError:
        assert verdict.verdict == "refused"
    else:
        assert (verdict.verdict, verdict.convert_to) == ("applied", to)
    assert (verdict.verdict == "applied") == (case == "loha" or (with_base and case in ONLY_CONVERTED))


def test_a_condition_is_known_to_peft_and_to_llama_cpp_alone(tmp_path: Path) -> None:
    adapter = folders.adapter(tmp_path / "a", folders.pairs(1), alora_invocation_tokens=[3])
    verdicts = check(adapter).verdicts
    assert {name for name, verdict in verdicts.items() if verdict.verdict == "applied"} == {"llama.cpp", "peft"}
