"""PEFT folders: read to the canonical form and back without losing a byte."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.adapter import LowRank, PooledLowRank, plain_pairs, with_factored_as_pairs
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.peft import adapter_config
from tests.conftest import need_module


def folder(path: Path, tensors: Mapping[str, tuple[int, ...]], **config: object) -> Path:
    """A PEFT folder with tensors of the given shapes, filled with numbers that differ."""
    path.mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"base_model.model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    safetensors_file.write(path / peft.WEIGHTS, arrays, {"format": "pt"})
    (path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return path


PAIR = {"l.0.q.lora_A.weight": (2, 8), "l.0.q.lora_B.weight": (6, 2)}


def test_patterns_that_disagree_are_reported(tmp_path: Path) -> None:
    adapter = peft.read(folder(tmp_path / "a", PAIR, alpha_pattern={"q": 1, "l.0.q": 100}))
    assert adapter.deltas["l.0.q"].alpha == 1
    assert "both match and differ" in adapter.notes[0]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "NEXT"}, "peft_type 'NEXT' is not supported"),
        ({"use_bdlora": True}, "use_bdlora = true: changes what the adapter computes"),
        ({"alora_invocation_tokens": [-1]}, '"alora_invocation_tokens" is not a list of token ids'),
        ({"layer_replication": [[0]]}, '"layer_replication" is not a list of ranges of layers'),
        ({"r": "eight"}, '"r" is "eight"'),
        ({"alpha_pattern": {"[[:a:]]q": 1}}, "which programs read differently"),
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
        ({"l.0.q.lora_E": (2, 1)}, "is not supported in a LoRA adapter"),
    ],
)
def test_refused_tensors(tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(AdapterhubError, match="adapter_model.safetensors: ") as caught:
        peft.read(folder(tmp_path / "a", tensors))
    assert says in str(caught.value)


def test_all_that_is_not_understood_is_refused_at_once(tmp_path: Path) -> None:
    tensors = {**PAIR, "l.0.q.odd": (2,), "l.1.q.odder": (2,)}
    with pytest.raises(RefusedError, match="adapter_config.json: arrow_config = 3: changes.*and 3 more like it") as caught:
        peft.read(folder(tmp_path / "a", tensors, arrow_config=3, use_bdlora=True))
    assert [item.partition(": ")[0] for item in caught.value.items] == [
        "arrow_config = 3",
        "use_bdlora = true",
        "tensor 'base_model.model.l.0.q.odd'",
        "tensor 'base_model.model.l.1.q.odder'",
    ]


def test_a_key_that_peft_does_not_have_is_ignored_with_a_note(tmp_path: Path) -> None:
    adapter = peft.read(folder(tmp_path / "a", PAIR, frobnicate=3, quiet=None))
    assert [note for note in adapter.notes if "not a key of peft" in note] == [
        "adapter_config.json: frobnicate: is not a key of peft 0.21.2, which ignores it with a warning"
    ]
    assert list(adapter.deltas) == ["l.0.q"]


@pytest.mark.peer
@pytest.mark.parametrize("name", ["LoraConfig", "AdaLoraConfig", "LoHaConfig", "LoKrConfig", "VeraConfig"])
def test_every_key_of_peft_is_known(name: str) -> None:
    need_module("peft")
    kind = getattr(importlib.import_module("peft"), name)
    known_keys = (
        adapter_config.INERT
        | adapter_config.READ
        | adapter_config.KINDS[name.removesuffix("Config").upper()]
        | adapter_config._UNSUPPORTED
    )
    assert {field.name for field in dataclasses.fields(kind)} <= known_keys


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", PAIR)
    (source / peft.WEIGHTS).rename(source / "adapter_model.bin")
    says = "adapter_model.bin: a pickle can run code when it is loaded. Save the adapter again with safe_serialization=True"
    with pytest.raises(RefusedError, match=says) as caught:
        peft.read(source)
    assert caught.value.code == "pickle"


def test_shards_are_read_as_one_adapter(tmp_path: Path) -> None:
    whole = peft.read(folder(tmp_path / "whole", PAIR))
    source = folder(tmp_path / "a", {})
    (source / peft.WEIGHTS).unlink()
    shards = {}
    for number, (key, array) in enumerate(peft.state_dict(whole).items()):
        shards[key] = f"adapter_model-{number}.safetensors"
        safetensors_file.write(source / shards[key], {key: array}, {"format": "pt"})
    (source / peft.INDEX).write_text(json.dumps({"weight_map": shards}))
    convert.convert(source, tmp_path / "b", to="peft")
    assert (tmp_path / "b" / peft.WEIGHTS).read_bytes() == (tmp_path / "whole" / peft.WEIGHTS).read_bytes()


@pytest.mark.parametrize("shard", ["../x.safetensors", "missing.safetensors"])
def test_an_index_cannot_name_what_is_not_there(tmp_path: Path, shard: str) -> None:
    source = folder(tmp_path / "a", {})
    (source / peft.WEIGHTS).unlink()
    (source / peft.INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(AdapterhubError, match="not a plain file name|no such file"):
        peft.read(source)


def test_the_folder_above_an_adapter_hints_at_it(tmp_path: Path) -> None:
    folder(tmp_path / "checkpoint-10", PAIR)
    with pytest.raises(AdapterhubError, match="Did you mean .*checkpoint-10"):
        convert.read(tmp_path)


def test_a_copy_of_the_bases_table_survives_and_is_refused_where_it_cannot_be_expressed(tmp_path: Path) -> None:
    tensors = {"e.lora_embedding_A": (2, 12), "e.lora_embedding_B": (8, 2), "e.base_layer.weight": (12, 8)}
    adapter = peft.read(folder(tmp_path / "a", tensors))
    assert list(adapter.copies) == ["e.weight"]
    assert "contains copies of the base's weights: e.weight" in adapter.notes
    with pytest.raises(RefusedError, match="e.weight: the adapter contains a copy of the base's weight"):
        plain_pairs(adapter)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"alora_invocation_tokens": [1]}, "acts only after certain tokens"),
        ({"layer_replication": [[0, 1]]}, "a base with repeated layers"),
        ({"ensure_weight_tying": True}, "applies to the layer tied to it too"),
    ],
)
def test_what_only_peft_can_express_is_refused_elsewhere(tmp_path: Path, config: dict[str, object], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        plain_pairs(peft.read(folder(tmp_path / "a", {**PAIR, "l.n.weight": (8,)}, **config)))


def test_a_rank_that_only_the_tensors_know_is_reported(tmp_path: Path) -> None:
    adapter = peft.read(folder(tmp_path / "a", PAIR, rank_pattern={"q": 4, "l.0.q": 2, "typo": 3}))
    assert adapter.deltas["l.0.q"].r == 2
    assert 'rank_pattern "q" and "l.0.q" both match and differ' in adapter.notes[0]
    assert "rank 2 by its tensors, 4 by the config" in adapter.notes[1]
    assert adapter.notes[2] == 'rank_pattern "typo" matches no module of the adapter'


LAMBDAS = {"l.0.q.vera_lambda_b": (6,), "l.0.q.vera_lambda_d": (2,)}


def vera(path: Path, shapes: Mapping[str, tuple[int, ...]], **config: object) -> Path:
    """A VeRA adapter; `vera_A` and `vera_B` are named as peft names them."""
    path.mkdir()
    arrays = {
        f"base_model.{name}" if name in ("vera_A", "vera_B") else f"base_model.model.{name}": np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }
    safetensors_file.write(path / peft.WEIGHTS, arrays, {"format": "pt"})
    (path / peft.CONFIG).write_text(json.dumps({"peft_type": "VERA", "r": 2, **config}))
    return path


@pytest.mark.parametrize(
    ("shapes", "config", "says"),
    [
        (LAMBDAS, {"save_projection": False}, "vera_A and vera_B were not saved.*Save it again with save_projection=True"),
        (LAMBDAS | {"vera_A": (2, 8), "vera_B": (6, 2)}, {"save_projection": False}, "are in the file, but peft makes others"),
        (LAMBDAS | {"vera_A": (2, 8)}, {}, "base_model.vera_B is missing.*Save it again with save_projection=True"),
        (LAMBDAS | {"vera_A": (2, 8), "vera_B": (6, 3)}, {}, "do not share a rank"),
        (LAMBDAS | {"vera_A": (2, 0), "vera_B": (6, 2)}, {}, "do not share a rank"),
        (LAMBDAS | {"vera_A": (16,), "vera_B": (6, 2)}, {}, "do not share a rank"),
        (LAMBDAS | {"vera_A": (2, 8), "vera_B": (5, 2)}, {}, "do not fit vera_A"),
        (LAMBDAS | {"vera_A": (3, 8), "vera_B": (6, 3)}, {}, "do not fit vera_A"),
        (LAMBDAS | {"l.0.q.vera_lambda_b": (6, 1), "vera_A": (2, 8), "vera_B": (6, 2)}, {}, "do not fit vera_A"),
        ({"l.0.q.vera_lambda_b": (6,), "vera_A": (2, 8), "vera_B": (6, 2)}, {}, "vera_lambda_d is missing"),
        ({"vera_A": (2, 8), "vera_B": (6, 2)}, {}, "projections, but no module that uses them"),
        (LAMBDAS | PAIR | {"vera_A": (2, 8), "vera_B": (6, 2)}, {}, "a VeRA delta of A, B, vera_lambda_b, vera_lambda_d"),
        (PAIR | {"vera_A": (2, 8)}, {"peft_type": "LORA"}, "in VeRA adapters only"),
        (LAMBDAS, {"peft_type": "LORA"}, "is not supported in a LoRA adapter"),
    ],
)
def test_vera_that_makes_no_sense_is_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, object], says: str
) -> None:
    with pytest.raises(AdapterhubError, match=says):
        peft.read(vera(tmp_path / "a", shapes, **config))


@pytest.mark.parametrize("weight", [None, (5, 8), (6, 9), (6,)])
def test_vera_is_no_pair_without_the_base_it_was_trained_on(tmp_path: Path, weight: tuple[int, ...] | None) -> None:
    tensors = {} if weight is None else {"l.0.q.weight": BaseTensor(weight, "F32")}
    base = BaseSpec("base", "hf", "", "", {}, tensors)
    source = vera(tmp_path / "a", LAMBDAS | {"vera_A": (2, 8), "vera_B": (6, 2)})
    with pytest.raises(
        RefusedError, match="the number of its columns that a module uses depends on the base.*Name its base model"
    ):
        with_factored_as_pairs(peft.read(source, base=base))


def test_qalora_on_a_base_that_is_not_gptq_is_plain_lora_as_in_peft(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", PAIR, use_qalora=True, qalora_group_size=4)
    pooled = peft.read(source).deltas
    assert all(isinstance(delta, PooledLowRank) for delta in pooled.values())
    shapes = {f"{target}.weight": (delta.lora_B.shape[0], delta.lora_A.shape[1]) for target, delta in pooled.items()}
    base = BaseSpec("base", "hf", "", "llama", {}, tensors={name: BaseTensor(shape, "F32") for name, shape in shapes.items()})
    assert all(isinstance(delta, LowRank) for delta in peft.read(source, base=base).deltas.values())


KEYS = sorted(adapter_config.READ | adapter_config.INERT | {"other"})  # what the reader knows, and a key that it doesn't
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
        adapter = peft.parse(text, arrays, {}, location="a")
        peft.parse(peft.config_text(dataclasses.replace(adapter, source=None)), peft.state_dict(adapter), {}, location="b")
