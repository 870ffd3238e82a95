"""Whatever is done to a file of a trainer's format, reading it says what is wrong in one line, or reads what it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError
from adapterhub_converters.formats import convert, source_config
from adapterhub_converters.formats.trainers import fused_layers, litgpt, megatron, torchtune
from tests.converters import trained
from tests.converters.trained import LLAMA

MODULES: dict[str, Any] = {"torchtune": torchtune, "litgpt": litgpt, "megatron": megatron}
AGAIN = "Convert the adapter from its source again"
VALUES = st.sampled_from([0, -1, 3, 10**400, 1e300, True, None, "x", [], [4, 4], {}, [[]], 2**40])


def parts(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safetensors_file.SafetensorsFile(path) as file:
        return {name: file.tensor(name) for name in file.tensors}, dict(file.header.metadata)


def signed(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """The file with a digest that fits whatever it says: a stranger can do that too."""
    text = metadata.get(fused_layers.SETTINGS, "")
    digest = source_config.payload_digest(dict(sorted(tensors.items())), text)
    safetensors_file.write(path, tensors, metadata | {"adapterhub.source.payload": digest})


@pytest.mark.parametrize("name", MODULES)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_false_header_causes_a_traceback(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("h")
    MODULES[name].write(trained.full("q_proj", "k_proj", "down_proj"), folder / "a.safetensors", base=LLAMA)
    tensors, metadata = parts(folder / "a.safetensors")
    rows = json.loads(metadata["adapterhub.source.tensors"])
    row = rows[data.draw(st.integers(0, len(rows) - 1))]
    place = data.draw(st.integers(0, len(row) - 1))
    if place == 6 and data.draw(st.booleans()):
        row[6][data.draw(st.integers(0, 4))] = data.draw(VALUES)
    else:
        row[place] = data.draw(VALUES)
    options = json.loads(metadata[fused_layers.SETTINGS])
    options[data.draw(st.sampled_from(sorted(options)))] = data.draw(VALUES)
    changed = {"adapterhub.source.tensors": json.dumps(rows), fused_layers.SETTINGS: json.dumps(options)}
    if data.draw(st.booleans()):
        tensors.pop(data.draw(st.sampled_from(sorted(tensors))))
    signed(folder / "b.safetensors", tensors, metadata | changed)
    assert "\n" not in refusal(folder / "b.safetensors")


def refusal(path: Path) -> str:
    """What reading it says: an error that is ours, or nothing."""
    try:
        convert.read(path, base=LLAMA)
    except AdapterhubError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", MODULES)
def test_a_list_that_hides_a_tensor_is_refused(tmp_path: Path, name: str) -> None:
    MODULES[name].write(trained.full("q_proj", "k_proj"), tmp_path / "a.safetensors", base=LLAMA)
    tensors, metadata = parts(tmp_path / "a.safetensors")
    config = json.loads(metadata["adapterhub.source.config"])
    config["target_modules"].remove(trained.K)
    rows = [row for row in json.loads(metadata["adapterhub.source.tensors"]) if row[1] != trained.K]
    lies = {"adapterhub.source.tensors": json.dumps(rows), "adapterhub.source.config": json.dumps(config)}
    signed(tmp_path / "b.safetensors", tensors, metadata | lies)
    with pytest.raises(FormatError, match=rf"adapterhub\.source\.tensors lacks rows of .*, which have a delta\. {AGAIN}"):
        convert.read(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        ("torchtune", 0, "layers.0.attn.k_proj", "'layers.0.attn.k_proj' in the order 4, which no such file has"),
        ("torchtune", 4, [2, 2], "'layers.0.attn.q_proj' in the order (2, 2), which no such file has"),
        ("torchtune", 6, None, "has no rank for 'model.layers.0.self_attn.q_proj'"),
        ("litgpt", 0, "transformer.h.1.attn.qkv", "'transformer.h.1.attn.qkv' in the order 0, which no such file has"),
        ("litgpt", 6, None, "which no such file has"),
        ("megatron", 0, "decoder.layers.0.mlp", "'decoder.layers.0.mlp' in the order 0, which no such file has"),
        ("megatron", 4, 3, "in the order 3, which no such file has"),
    ],
)
def test_a_module_in_a_wrong_place_of_the_source_config_is_named(
    tmp_path: Path, name: str, place: int, value: object, says: str
) -> None:
    MODULES[name].write(trained.full("q_proj", "k_proj"), tmp_path / "a.safetensors", base=LLAMA)
    tensors, metadata = parts(tmp_path / "a.safetensors")
    rows = json.loads(metadata["adapterhub.source.tensors"])
    row = next(row for row in rows if row[1] == trained.Q)
    row[place:] = [value, *row[place + 1 :]] if value is not None else []
    signed(tmp_path / "b.safetensors", tensors, metadata | {"adapterhub.source.tensors": json.dumps(rows)})
    with pytest.raises(FormatError) as caught:
        convert.read(tmp_path / "b.safetensors")
    assert "adapterhub.source.tensors has " in str(caught.value)
    assert f"{says}. {AGAIN}" in str(caught.value)
