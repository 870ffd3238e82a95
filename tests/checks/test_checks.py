"""Checking an adapter: alone, on a base in both directions, and what each runtime makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub.manifest import derive
from adapterhub.registry import packaging
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.runtime_rules import APPLIED, RUNTIMES, VERDICTS
from tests.support.folders import Shapes, adapter, base, pairs

ROOT = Path(__file__).parent.parent.parent
V = "model.layers.{}.self_attn.v_proj"
QV = {**pairs(2), **pairs(2, module=V)}


def codes(report: checks.Report) -> set[str]:
    return {problem.code for problem in report.problems} - {"unpinned"}


def test_a_sound_adapter_on_its_base(tmp_path: Path) -> None:
    report = checks.check(adapter(tmp_path / "a", QV), base=base(tmp_path / "b"))
    assert report.ok
    assert codes(report) == set()
    assert {name: verdict.verdict for name, verdict in report.verdicts.items()} == dict.fromkeys(RUNTIMES, APPLIED)
    assert {name: verdict.convert_to for name, verdict in report.verdicts.items() if verdict.convert_to} == {
        "llama.cpp": "gguf",
        "mlx": "mlx",
    }


def shapes_of(part: str) -> Shapes:
    """A vector for each of two modules."""
    return {f"model.layers.{n}.self_attn.q_proj.{part}": (8,) for n in (0, 1)}


EMBED = {"model.embed_tokens.lora_embedding_A": (2, 12), "model.embed_tokens.lora_embedding_B": (8, 2)}
Q0 = "model.layers.0.self_attn.q_proj"


def test_every_problem_is_collected(tmp_path: Path) -> None:
    shapes = {**pairs(3, r=4, size=(16, 8)), f"{Q0}.lora_B.bias": (16,)}
    report = checks.check(adapter(tmp_path / "a", shapes), base=base(tmp_path / "b"))
    assert codes(report) == {"rank-config", "bias-flag", "shape-mismatch", "base-shallower"}
    assert sum(problem.code == "rank-config" for problem in report.problems) == 3


def test_files_that_are_not_the_ones_adapter_json_names(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    derive.describe(folder).write(folder)
    assert codes(checks.check(folder)) == set()
    (folder / peft.CONFIG).write_text((folder / peft.CONFIG).read_text() + " ")
    report = checks.check(folder)
    assert [(problem.code, problem.file) for problem in report.problems] == [("files-changed", peft.CONFIG)]
    assert codes(checks.check(folder, headers_only=True)) == set()
    (folder / "adapter.json").write_text("{")
    assert codes(checks.check(folder, base=base(tmp_path / "b"))) == {"malformed"}


@pytest.mark.parametrize(
    ("shapes", "config", "runtime", "verdict", "says"),
    [
        (
            pairs(2) | shapes_of("lora_magnitude_vector"), {"use_dora": True}, "vllm", "refused",
            "vLLM does not yet support DoRA.",
        ),
        ({**pairs(2), **EMBED}, {}, "llama.cpp", "crashes", "GGML_ASSERT"),
        ({**pairs(2), **EMBED}, {}, "peft", "applied", ""),
        (pairs(2, size=(16, 8)), {}, "llama.cpp", "refused", "has incorrect shape"),
        (pairs(2, size=(16, 8)), {}, "peft", "refused", "size mismatch"),
        (QV, {"use_rslora": True}, "sglang", "wrong", "regardless of use_rslora"),
        (QV, {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, "sglang", "wrong", "regardless of alpha_pattern"),
        ({**QV, **pairs(1, r=3)}, {"rank_pattern": {"layers.0.self_attn.q_proj": 3}}, "sglang", "crashes", "buffer shape"),
        (QV, {"target_modules": ".*(q_proj|v_proj)"}, "sglang", "refused", "Only 'all' or 'all-linear'"),
        (pairs(2), {}, "sglang", "refused", "q_proj without v_proj"),
        (pairs(2, module=V), {}, "sglang", "crashes", "v_proj without q_proj"),
        (pairs(2), {"use_rslora": True}, "llama.cpp", "applied", "llama.cpp's own script ignores rsLoRA"),
        (pairs(1), {}, "peft", "wrong", "reports missing keys: layers"),
        (pairs(2, r=32), {"r": 32}, "vllm", "applied", "max_lora_rank=32"),
        ({**pairs(2), "model.norm.weight": (8,)}, {"modules_to_save": ["norm"]}, "llama.cpp", "refused", "skips"),
        (pairs(2), {"init_lora_weights": "olora"}, "vllm", "refused", "olora"),
        (pairs(2), {"use_bdlora": True}, "mlx", "refused", "use_bdlora"),
        (pairs(2), {"frobnicate": 1}, "mlx", "applied", ""),
        (pairs(2), {"frobnicate": 1}, "peft", "applied", "ignores frobnicate with a warning"),
    ],
)  # fmt: skip
def test_what_a_runtime_makes_of_it(
    tmp_path: Path, shapes: Shapes, config: dict[str, Any], runtime: str, verdict: str, says: str
) -> None:
    report = checks.check(adapter(tmp_path / "a", shapes, **config), base=base(tmp_path / "b"), runtimes=[runtime])
    assert report.verdicts[runtime].verdict == verdict
    assert says in " ".join(report.verdicts[runtime].reasons)
    assert ("runtime" in codes(report)) == (verdict != APPLIED)


def test_a_gguf_alone_and_on_its_base(tmp_path: Path) -> None:
    folder, spec = adapter(tmp_path / "a", pairs(2)), base(tmp_path / "b")
    convert.convert(folder, tmp_path / "a.gguf", to="gguf", base=spec)
    report = checks.check(tmp_path / "a.gguf", base=spec)
    assert (codes(report), report.format, report.facts["modules"]) == (set(), "gguf", 2)
    assert not checks.check(tmp_path / "a.gguf", base=base(tmp_path / "wide", size=16)).ok
    assert codes(checks.check(tmp_path / "a.gguf", base=base(tmp_path / "deep", 3))) == {"base-deeper"}
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[: len(whole) // 2])
    assert codes(checks.check(tmp_path / "a.gguf", base=spec)) == {"malformed"}


def test_what_is_no_adapter_and_what_is_no_runtime(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        checks.check(tmp_path)
    with pytest.raises(UsageError, match="unknown runtime 'torch'"):
        checks.check(adapter(tmp_path / "a", pairs(1)), runtimes=["torch"])


def test_the_rules_are_well_formed() -> None:
    for runtime in RUNTIMES.values():
        assert {rule.verdict for rule in runtime.rules} <= set(VERDICTS)
        assert all(rule.text and rule.source for rule in runtime.rules)


def test_the_docs_count_the_rules() -> None:
    text = (ROOT / "docs/validate.md").read_text()
    for runtime in RUNTIMES.values():
        inferred = sum(rule.source.startswith("inferred:") for rule in runtime.rules)
        assert f"| {runtime.name} | {runtime.version} | {runtime.format} | {len(runtime.rules)} | {inferred} |" in text


def test_a_refusal_has_no_reason_that_describes_a_loaded_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pairs(2), r=3, target_modules=["q_proj", "v_proj"])
    verdict = checks.check(folder, base=base(tmp_path / "b")).verdicts["peft"]
    assert (verdict.verdict, verdict.causes) == ("refused", ("rank-config",))
    assert [reason.partition(":")[0] for reason in verdict.reasons] == [f"size mismatch for {Q0}.lora_A.weight"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_modules_without_tensors_stay_as_in_the_base_everywhere(tmp_path: Path, runtime: str) -> None:
    folder = adapter(tmp_path / "a", QV, target_modules=["q_proj", "v_proj", "lm_head"])
    report = checks.check(folder, base=base(tmp_path / "b", tied=False))
    assert codes(report) == {"uncovered-module"}
    assert report.ok  # peft loads it, with a warning
    assert report.verdicts[runtime].verdict == APPLIED
    assert "correct only if the modules without tensors were not trained" in report.verdicts[runtime].reasons[0]


def test_replaced_rows_of_a_tied_table_change_both_sides(tmp_path: Path) -> None:
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}
    folder = adapter(tmp_path / "a", pairs(2) | rows, trainable_token_indices=[1, 2])
    assert codes(checks.check(folder, base=base(tmp_path / "b", tied=True))) == set()


def test_a_gate_stops_at_the_headers_of_an_adapter_with_too_many_errors(tmp_path: Path) -> None:
    """300,000 halves without the other took 17 s of CPU to refuse, for what runtimes would do with them."""
    halves = {f"layers.{n}.q_proj.lora_A.weight": (2, 4) for n in range(9)}
    path = adapter(tmp_path / "a", halves, target_modules=["q_proj"], r=8)
    with checks.open_check(path, limit=8, most_errors=8, verdicts=False) as (report, _):
        assert (report.count("error"), len(report.problems), report.ok) == (18, 16, False)
        assert report.counts == {"missing-half": 9, "rank-config": 9}
        assert report.verdicts == {}
    with checks.open_check(path, most_errors=18, verdicts=False) as (report, _):
        assert report.counts == checks.check(path).counts


def test_a_push_of_an_adapter_with_too_many_errors_counts_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "_MAX_ERRORS", 8)
    path = adapter(tmp_path / "a", {f"layers.{n}.q_proj.lora_A.weight": (8, 4) for n in range(9)}, r=8)
    with pytest.raises(RefusedError, match=r"lora_A is not \(1 error in 9 places\)") as caught:
        packaging.package(path)
    assert caught.value.code == "check-failed-for-good"
    with pytest.raises(AdapterhubError, match="lora_B"):
        packaging.package(path, force=True)
