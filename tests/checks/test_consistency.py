"""An adapter whose config and tensors disagree, or whose numbers cannot be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub import checks
from adapterhub.checks import consistency
from adapterhub.checks.contents import Values
from adapterhub_converters import dtypes
from adapterhub_converters.containers import safetensors_file, safetensors_header
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.tensor_keys import PREFIX
from tests.checks.test_checks import Q0, codes
from tests.support.folders import Shapes, adapter, pairs


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
@pytest.mark.parametrize("dtype", dtypes.FLOATS)
def test_one_bad_number_is_found_in_any_dtype(tmp_path: Path, bad: float, dtype: str) -> None:
    def spoil(name: str, array: np.ndarray) -> np.ndarray:
        array = array.astype(dtypes.NUMPY[dtype])
        if "layers.1" in name and "lora_B" in name:
            array[7, 1] = bad
        return array

    report = checks.check(adapter(tmp_path / "a", pairs(2), spoil))
    assert codes(report) == {"non-finite"}
    assert "1 of 16" in report.problems[0].what
    assert codes(checks.check(tmp_path / "a", headers_only=True)) == set()


@pytest.mark.parametrize("dtype", dtypes.FLOATS)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0, 1e-9, 60_000.0, np.inf, -np.inf, np.nan]) | st.floats(width=16), min_size=1)
)
def test_the_bytes_of_numbers_say_no_more_than_the_numbers(dtype: str, numbers: list[float]) -> None:
    array = np.array(numbers).astype(dtypes.NUMPY[dtype])
    values = Values(["a"], [0], [array.size], dtype, safetensors_file.byte_view(array))
    largest = consistency._largest_of_ordinary(values)
    if largest is None:
        wide = np.abs(array.astype(np.float64))
        assert not np.isfinite(wide).all() or wide.max() >= 2.0**15 or np.signbit(array[wide == 0].astype(np.float64)).any()
    else:
        exact, non_finite = consistency._largest_and_bad(values)
        assert (largest, non_finite) == ([int(exact[0] > 0)], [0])


@pytest.mark.parametrize("bad", range(6))
def test_bad_numbers_are_counted_in_tensors_of_mixed_types_at_any_offset(tmp_path: Path, bad: int) -> None:
    names = [f"{PREFIX}model.layers.{n}.self_attn.q_proj.lora_{half}.weight" for n in range(3) for half in "AB"]
    shapes, types = [(1, 3), (5, 1)] * 3, ["F16", "F32", "F64", "BF16", "F32", "F16"]
    numbers = [np.ones(shape, dtypes.NUMPY[dtype]) for shape, dtype in zip(shapes, types, strict=True)]
    numbers[bad].reshape(-1)[-2:] = np.nan
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    head = safetensors_header.header_bytes(zip(names, types, shapes, strict=True), {})
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
