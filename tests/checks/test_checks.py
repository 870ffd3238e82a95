"""Checking an adapter: alone, on a base in both directions, and what each runtime makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub import checks
from adapterhub.checks.contents_reader import read_contents
from adapterhub.checks.report import Findings, RepeatedProblem
from adapterhub.manifest import derive
from adapterhub.registry import packaging
from adapterhub_converters import dtypes
from adapterhub_converters.bases import BaseTensor, read_hf
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.peft.tensor_keys import PREFIX
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


def each(part: str) -> Shapes:
    """A vector for each of two modules."""
    return {f"model.layers.{n}.self_attn.q_proj.{part}": (8,) for n in (0, 1)}


EMBED = {"model.embed_tokens.lora_embedding_A": (2, 12), "model.embed_tokens.lora_embedding_B": (8, 2)}
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("shapes", "config", "code"),
    [
        ({f"{Q0}.lora_A.weight": (2, 8)}, {}, "missing-half"),
        ({**pairs(2), f"{Q0}.lora_B.weight": (8, 3)}, {}, "rank-differs"),
        (pairs(2), {"target_modules": ["v_proj"]}, "not-targeted"),
        (pairs(2, r=4), {}, "rank-config"),
        (pairs(2), {"rank_pattern": {"layers.1.self_attn.q_proj": 4}}, "rank-config"),
        ({**pairs(2), f"{Q0}.lora_A.weight": (2, 8, 1)}, {}, "not-a-matrix"),
        ({**pairs(2), f"{Q0}.lora_A.weight": (0, 8), f"{Q0}.lora_B.weight": (8, 0)}, {}, "empty-tensor"),
        ({**pairs(2), f"{Q0}.lora_E": (2, 1)}, {}, "unknown-tensor"),
        (pairs(2), {"use_dora": True}, "no-magnitude"),
        ({**pairs(2), f"{Q0}.lora_magnitude_vector": (8,)}, {}, "magnitude-flag"),
        ({**pairs(1), f"{Q0}.lora_magnitude_vector": (9,)}, {"use_dora": True}, "part-shape"),
        ({**pairs(2), f"{Q0}.lora_B.bias": (8,)}, {}, "bias-flag"),
        (pairs(2), {"lora_bias": True}, "no-bias"),
        ({**pairs(2), "model.norm.weight": (8,)}, {}, "overwrites-base"),
        (pairs(2), {"alpha_pattern": {"q_proj": 1, "layers.0.self_attn.q_proj": 2}}, "pattern-overlap"),
        (pairs(2), {"alpha_pattern": {"k_proj": 1}}, "pattern-unused"),
        (pairs(2), {"init_lora_weights": "pissa"}, "initial-adapter"),
        (pairs(2), {"lora_alpha": 0}, "does-nothing"),
        (pairs(2), {"peft_type": "NEXT"}, "not-understood"),
        (pairs(2), {"peft_type": "IA3"}, "unsupported"),
        (pairs(2), {"use_bdlora": {"target": 1}}, "not-understood"),
        (pairs(2), {"_comment": "hi"}, "unknown-key"),
        (pairs(2), {"lora_alpha": 1024}, "scale-large"),
        (pairs(2), {"base_model_name_or_path": "/home/bob/models/llama"}, "local-base-name"),
        (pairs(2), {"alpha_pattern": {"[[:a:]]q": 1}}, "unsupported"),
        ({**pairs(2), "model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}, {}, "token-rows"),
    ],
)  # fmt: skip
def test_what_config_and_tensors_disagree_on(tmp_path: Path, shapes: Shapes, config: dict[str, Any], code: str) -> None:
    report = checks.check(adapter(tmp_path / "a", shapes, **config))
    assert codes(report) == {code}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_one_bad_number_is_found_in_any_dtype(tmp_path: Path, bad: float, dtype: str) -> None:
    def spoil(name: str, array: np.ndarray) -> np.ndarray:
        array = array.astype(np.dtype(dtype))
        if "layers.1" in name and "lora_B" in name:
            array[7, 1] = bad
        return array

    report = checks.check(adapter(tmp_path / "a", pairs(2), spoil))
    assert codes(report) == {"non-finite"}
    assert "1 of 16" in report.problems[0].what
    assert codes(checks.check(tmp_path / "a", headers_only=True)) == set()


@pytest.mark.parametrize("bad", range(6))
def test_bad_numbers_are_counted_in_tensors_of_mixed_types_at_any_offset(tmp_path: Path, bad: int) -> None:
    names = [f"{PREFIX}model.layers.{n}.self_attn.q_proj.lora_{half}.weight" for n in range(3) for half in "AB"]
    shapes, types = [(1, 3), (5, 1)] * 3, ["F16", "F32", "F64", "BF16", "F32", "F16"]
    numbers = [np.ones(shape, dtypes.NUMPY[dtype]) for shape, dtype in zip(shapes, types, strict=True)]
    numbers[bad].reshape(-1)[-2:] = np.nan
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    head = safetensors_file.header_bytes(zip(names, types, shapes, strict=True), {})
    (tmp_path / peft.WEIGHTS).write_bytes(head + b"".join(array.tobytes() for array in numbers))
    (problem,) = checks.check(tmp_path).problems
    expected = names[bad].removeprefix(PREFIX).removesuffix(".weight"), f"2 of {numbers[bad].size} are NaN or infinite"
    assert (problem.name, problem.what) == expected


def test_an_untrained_adapter_does_nothing(tmp_path: Path) -> None:
    def untrained(name: str, array: np.ndarray) -> np.ndarray:
        return -0.0 * array if "lora_B" in name else array

    report = checks.check(adapter(tmp_path / "a", pairs(2), untrained))
    assert codes(report) == {"does-nothing"}
    assert report.ok


@pytest.mark.parametrize(
    ("shapes", "config", "code"),
    [
        (pairs(3), {}, "base-shallower"),
        (pairs(1), {}, "base-deeper"),
        (pairs(1), {"target_modules": [Q0]}, "base-deeper"),
        (pairs(2), {"target_modules": ["q_proj", "v_proj"]}, "uncovered-module"),
        (pairs(2), {"target_modules": r".*layers\.\d+\.self_attn\.[qv]_proj"}, "uncovered-module"),
        (pairs(2), {"target_modules": "all-linear"}, "uncovered-module"),
        (pairs(2, size=(8, 16)), {}, "shape-mismatch"),
        (pairs(2, size=(16, 8)), {}, "shape-mismatch"),
        (pairs(2) | pairs(2, module="model.layers.{}.mlp.up_proj"), {}, "no-such-module"),
        (pairs(2, module="base.layers.{}.self_attn.q_proj"), {}, "other-prefix"),
        ({**pairs(2), **EMBED}, {}, "tied-weights"),
        ({**pairs(2), "model.embed_tokens.weight": (13, 8)}, {"modules_to_save": ["embed_tokens"]}, "vocab-differs"),
        (
            {**pairs(2), "model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 8)},
            {"trainable_token_indices": [12]},
            "row-outside",
        ),
    ],
)
def test_what_does_not_fit_the_base(tmp_path: Path, shapes: Shapes, config: dict[str, Any], code: str) -> None:
    report = checks.check(adapter(tmp_path / "a", shapes, **config), base=base(tmp_path / "b"))
    assert code in codes(report)
    assert codes(report) <= {code, "tied-weights"}


@pytest.mark.parametrize("config", [{"layers_to_transform": [0]}, {"layers_to_transform": 0}])
def test_layers_that_were_never_to_be_trained_are_not_missed(tmp_path: Path, config: dict[str, Any]) -> None:
    assert codes(checks.check(adapter(tmp_path / "a", pairs(1), **config), base=base(tmp_path / "b"))) == set()


def test_a_base_saved_without_its_head_fits(tmp_path: Path) -> None:
    report = checks.check(adapter(tmp_path / "a", pairs(2)), base=base(tmp_path / "b", prefix=""))
    assert codes(report) == {"headless-base"}
    assert report.ok


def test_a_headless_base_of_another_size_does_not(tmp_path: Path) -> None:
    report = checks.check(adapter(tmp_path / "a", pairs(2)), base=base(tmp_path / "b", prefix="", size=16))
    assert "shape-mismatch" in codes(report)


def test_every_problem_is_collected(tmp_path: Path) -> None:
    shapes = {**pairs(3, r=4, size=(16, 8)), f"{Q0}.lora_B.bias": (16,)}
    report = checks.check(adapter(tmp_path / "a", shapes), base=base(tmp_path / "b"))
    assert codes(report) == {"rank-config", "bias-flag", "shape-mismatch", "base-shallower"}
    assert sum(problem.code == "rank-config" for problem in report.problems) == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"fingerprint": "sha256:" + "0" * 64}, "base-differs"),
        ({"tokenizer_digest": "sha256:" + "0" * 64}, "tokenizer-differs"),
        ({"config": {"rope_theta": 5e5}}, "numerics-differ"),
        ({"config": {"rope_theta": 10000.0001}}, None),
        ({"repo": "org/another"}, "base-name-differs"),
    ],
)
def test_the_very_base(tmp_path: Path, changes: dict[str, object], code: str | None) -> None:
    spec, folder = base(tmp_path / "b"), adapter(tmp_path / "a", pairs(2))
    spec = dataclasses.replace(spec, repo="org/model", tokenizer_digest="sha256:" + "1" * 64)
    manifest = derive.describe(folder, base=spec)
    dataclasses.replace(manifest, base=dataclasses.replace(manifest.base, **changes)).write(folder)  # type: ignore[arg-type]
    report = checks.check(folder, base=spec)
    assert "unpinned" not in {problem.code for problem in report.problems}
    assert codes(report) == ({code} if code else set())


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
        (pairs(2) | each("lora_magnitude_vector"), {"use_dora": True}, "vllm", "refused", "vLLM does not yet support DoRA."),
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


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (pairs(2), {}),
        (pairs(2), {"use_rslora": True}),
        (pairs(2), {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
        ({**pairs(2, r=3), **pairs(1)}, {"rank_pattern": {"layers.1.self_attn.q_proj": 3}}),
        (pairs(2) | each("lora_magnitude_vector"), {"use_dora": True}),
        (pairs(2) | each("lora_B.bias"), {"lora_bias": True}),
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


def test_untrustworthy_files_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    whole = (folder / peft.WEIGHTS).read_bytes()
    (folder / peft.WEIGHTS).write_bytes(whole[:-1])
    report = checks.check(folder)
    assert codes(report) == {"malformed"}
    assert {verdict.verdict for verdict in report.verdicts.values()} == {"refused"}
    (folder / peft.WEIGHTS).unlink()
    assert codes(checks.check(folder)) == {"missing-file"}
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    assert "pickle" in codes(checks.check(folder))


CONFIG_KEYS = [
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "init_lora_weights", "use_rslora", "use_dora", "lora_bias", "bias", "trainable_token_indices",
    "base_model_name_or_path", "fan_in_fan_out", "task_type", "revision", "nonsense",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.sampled_from(["(", ".*"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(CONFIG_KEYS), value=JSON)
def test_no_config_value_is_a_crash(tmp_path: Path, key: str, value: object) -> None:
    if not (tmp_path / "a").exists():
        extra: Shapes = {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8), "model.norm.weight": (8,)}
        adapter(tmp_path / "a", {**pairs(2), **extra})
        base(tmp_path / "b")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], key: value}
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(config))
    try:
        checks.check(tmp_path / "a", base=read_hf(tmp_path / "b"))
    except NotFoundError:
        assert key == "peft_type"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 10_000), byte=st.integers(0, 255), name=st.sampled_from([peft.WEIGHTS, peft.CONFIG, "adapter.json"])
)
def test_no_byte_is_a_crash(tmp_path: Path, place: int, byte: int, name: str) -> None:
    folder = tmp_path / "a"
    if not folder.exists():
        adapter(folder, pairs(1))
        derive.describe(folder, base=base(tmp_path / "b", 1)).write(folder)
    whole = (folder / name).read_bytes()
    place %= len(whole)
    (folder / name).write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    try:
        report = checks.check(folder, base=read_hf(tmp_path / "b"))
        assert report.ok == (byte == whole[place]) or name == "adapter.json"
    finally:
        (folder / name).write_bytes(whole)


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


def test_a_base_of_one_layer_is_too_shallow_and_not_of_another_prefix(tmp_path: Path) -> None:
    made = adapter(tmp_path / "a", pairs(2))
    codes = {problem.code for problem in checks.check(made, base=base(tmp_path / "b", 1)).problems}
    assert codes == {"base-shallower"}


def test_a_limit_keeps_some_problems_of_each_code_and_the_number_of_all(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", {**pairs(20, r=4), f"{Q0}.lora_E": (2, 1)})
    whole, limited = checks.check(path), checks.check(path, limit=3)
    assert [(group.code, group.count) for group in limited.grouped()] == [(g.code, g.count) for g in whole.grouped()]
    assert limited.counted() == whole.counted()
    assert limited.count(checks.ERROR) == len(whole.problems)
    assert {code: sum(problem.code == code for problem in limited.problems) for code in whole.counted()} == {
        code: min(count, 3) for code, count in whole.counted().items()
    }
    assert {name: verdict.verdict for name, verdict in limited.verdicts.items()} == {
        name: verdict.verdict for name, verdict in whole.verdicts.items()
    }


def test_a_refusal_has_no_reason_that_describes_a_loaded_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pairs(2), r=3, target_modules=["q_proj", "v_proj"])
    verdict = checks.check(folder, base=base(tmp_path / "b")).verdicts["peft"]
    assert (verdict.verdict, verdict.causes) == ("refused", ("rank-config",))
    assert [reason.partition(":")[0] for reason in verdict.reasons] == [f"size mismatch for {Q0}.lora_A.weight"]


@pytest.mark.parametrize(("names", "verdict"), [(("up_proj", "gate_proj"), "crashes"), (("up_proj",), APPLIED)])
def test_sglang_fuses_an_up_projection_only_where_there_is_a_gate(tmp_path: Path, names: tuple[str, ...], verdict: str) -> None:
    folder = adapter(tmp_path / "a", pairs(2, module="model.layers.{}.mlp.up_proj"))
    spec = base(tmp_path / "b")
    there = {f"model.layers.{n}.mlp.{name}.weight": BaseTensor((8, 8), "F32") for n in range(2) for name in names}
    report = checks.check(folder, base=dataclasses.replace(spec, tensors={**spec.tensors, **there}))
    assert report.verdicts["sglang"].verdict == verdict


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


@pytest.mark.parametrize("name", ["a", "adapter"])
def test_a_file_keeps_its_name_though_the_name_of_its_folder_begins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter(tmp_path / name, pairs(2))
    (tmp_path / name / "adapter_model.safetensors").write_bytes(b'\7\0\0\0\0\0\0\0{"x":1}')
    monkeypatch.chdir(tmp_path)
    problems = checks.check(Path(name)).problems
    assert [problem.file for problem in problems if problem.code == "malformed"] == ["adapter_model.safetensors"]


def test_modules_that_are_alike_share_one_mapping_of_their_parts(tmp_path: Path) -> None:
    contents, _ = read_contents(adapter(tmp_path / "a", pairs(20)), base=None)
    assert contents is not None
    assert [count for _, count in contents.distinct_parts] == [len(contents.pairs)] == [20]
    assert sorted(contents.kinds().values()) == [20, 20]
    contents.close()


def test_tables_with_the_same_token_rows_share_their_ids(tmp_path: Path) -> None:
    rows = {f"{PREFIX}layers.{n}.wte.token_adapter.trainable_tokens_delta": (3, 4) for n in range(9)}
    contents, _ = read_contents(adapter(tmp_path / "a", rows, trainable_token_indices={"wte": [1, 2, 3]}), base=None)
    assert contents is not None
    assert len({id(ids) for ids in contents.row_ids.values()}) == 1
    assert set(contents.row_ids.values()) == {(1, 2, 3)}
    contents.close()


def test_problems_beyond_a_limit_are_counted_and_never_made() -> None:
    made = []

    def problem(name: str) -> checks.Problem:
        made.append(name)
        return checks.Problem("token-rows", "", name, "")

    findings = Findings(3)
    findings.add(
        [
            problem("a"),
            RepeatedProblem("token-rows", [str(n) for n in range(300_000)], problem),
            RepeatedProblem("bias-flag", [], problem),
        ]
    )
    assert findings.counts == {"token-rows": 300_001}
    assert [one.name for one in findings.by_code["token-rows"]] == made == ["a", "0", "1"]


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
    with pytest.raises(RefusedError, match=r"lora_A is not \(and 8 more errors\)") as caught:
        packaging.package(path)
    assert caught.value.code == "check-failed-for-good"
    with pytest.raises(AdapterhubError, match="lora_B"):
        packaging.package(path, force=True)
