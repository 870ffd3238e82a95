"""PEFT folders: read to the canonical form and back without losing a byte."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters import peft, safetensors_file
from adapterhub_converters.errors import AdapterhubError, RefusedError


def folder(path: Path, tensors: dict[str, tuple[int, ...]], **config: object) -> Path:
    """A PEFT folder with tensors of the given shapes, filled with numbers that differ."""
    path.mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"base_model.model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    safetensors_file.write(path / peft.WEIGHTS, arrays, {"format": "pt"})
    (path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return path


PAIR = {"l.0.q.lora_A.weight": (2, 8), "l.0.q.lora_B.weight": (6, 2)}


def test_writing_what_was_read_gives_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", PAIR)
    (tmp_path / "b").mkdir()
    peft.write(peft.read(source), tmp_path / "b")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


def test_a_config_written_anew_gives_every_module_the_same_scale(tmp_path: Path) -> None:
    tensors = {f"l.{n}.q.lora_{half}.weight": (3, 8) if half == "A" else (6, 3) for n in (1, 10) for half in "AB"}
    adapter = peft.read(folder(tmp_path / "a", tensors | PAIR, alpha_pattern={"l.1.q": 5}, use_rslora=True))
    (tmp_path / "b").mkdir()
    peft.write(dataclasses.replace(adapter, source=None), tmp_path / "b")
    again = peft.read(tmp_path / "b")
    assert {t: (d.r, d.scaling) for t, d in again.deltas.items()} == {t: (d.r, d.scaling) for t, d in adapter.deltas.items()}


def test_patterns_that_disagree_are_reported(tmp_path: Path) -> None:
    adapter = peft.read(folder(tmp_path / "a", PAIR, alpha_pattern={"q": 1, "l.0.q": 100}))
    assert adapter.deltas["l.0.q"].alpha == 1
    assert "both match and differ" in adapter.notes[0]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not read yet"),
        ({"use_qalora": True}, "use_qalora = true changes what the adapter computes"),
        ({"frobnicate": 3}, "frobnicate = 3 changes what the adapter computes"),
        ({"r": "eight"}, '"r" is "eight"'),
        ({"alpha_pattern": {"(a+)+": 1}}, "could take for ever"),
        ({"alpha_pattern": {"(": 1}}, "is not a regular expression"),
        ({"alpha_pattern": [1]}, '"alpha_pattern" is not a map'),
    ],
)
def test_refused_configs(tmp_path: Path, config: dict[str, object], says: str) -> None:
    with pytest.raises(AdapterhubError, match="adapter_config.json: ") as caught:
        peft.read(folder(tmp_path / "a", PAIR, **config))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"l.0.q.lora_A.weight": (2, 8)}, "lora_B is missing"),
        ({**PAIR, "l.0.q.lora_B.weight": (6, 3)}, "do not share a rank"),
        ({**PAIR, "l.0.q.lora_A.weight": (0, 8), "l.0.q.lora_B.weight": (6, 0)}, "empty tensor"),
        ({"l.0.q.lora_E": (2, 1)}, "is of no kind that is read yet"),
    ],
)
def test_refused_tensors(tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(AdapterhubError, match="adapter_model.safetensors: ") as caught:
        peft.read(folder(tmp_path / "a", tensors))
    assert says in str(caught.value)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", PAIR)
    (source / peft.WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(RefusedError, match="a pickle can run code"):
        peft.read(source)


KEYS = sorted(peft._READ | peft._INERT | {"other"})  # what the reader knows, and a key that it doesn't
SCRAPS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["l.0.q", "pissa", "LORA", "q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("l.0.q"), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(KEYS), SCRAPS, min_size=1, max_size=4), st.booleans())
def test_any_config_is_read_or_refused_and_what_is_read_can_be_written(config: dict[str, object], rows: bool) -> None:
    arrays = {f"base_model.model.{name}": np.ones(shape, np.float32) for name, shape in PAIR.items()}
    if rows:
        arrays["base_model.model.l.e.token_adapter.trainable_tokens_delta"] = np.ones((2, 4), np.float32)
    with contextlib.suppress(AdapterhubError):
        text = json.dumps({"peft_type": "LORA", **config})
        adapter = peft.parse(text, arrays, {}, where="a")
        peft.parse(peft.config_text(dataclasses.replace(adapter, source=None)), peft.state_dict(adapter), {}, where="b")
