"""The models of a pipeline: what a target's name says of its model, and one model where a format has one."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, LowRank, Meta
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import pipeline

PAIR = LowRank(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32), 1.0)


def base_of(architecture: str, **shapes: tuple[int, ...]) -> BaseSpec:
    tensors = {name: BaseTensor(shape, "F32") for name, shape in shapes.items()}
    return BaseSpec("base", "hf", architecture, "", {}, tensors)


def adapter_of(*targets: str, parts: tuple[str, ...]) -> Adapter:
    return Adapter(dict.fromkeys(targets, PAIR), meta=Meta(parts=parts))


def test_a_target_begins_with_its_model_or_with_none() -> None:
    assert [pipeline.part_of(name) for name in ("unet.mid", "text_encoder_2.x", "unet_x.mid", "model.layers.0")] == [
        "unet", "text_encoder_2", "", "",
    ]  # fmt: skip
    assert pipeline.is_text("text_encoder_2")
    assert not pipeline.is_text("transformer")


@pytest.mark.parametrize(
    ("architecture", "part"),
    [("FluxTransformer2DModel", "transformer"), ("UNet2DConditionModel", "unet"), ("FluxPipeline", ""), ("Other", "")],
)
def test_a_base_of_one_model_has_its_name_in_a_pipeline(architecture: str, part: str) -> None:
    assert pipeline.part_of_base(base_of(architecture)) == part


def test_modules_are_listed_by_model_and_biases_are_none_of_their_own() -> None:
    names = ("unet.mid.q.weight", "unet.mid.q.bias", "unet.scale", "text_encoder.k.weight")
    base = base_of("StableDiffusionPipeline", **dict.fromkeys(names, (2, 2)))
    assert pipeline.modules_of(base) == {"unet": {"mid.q", "scale"}, "text_encoder": {"k"}}
    assert pipeline.weight_shape(base, "unet.mid.q") == (2, 2)
    assert (pipeline.is_parameter(base, "unet.scale"), pipeline.is_parameter(base, "unet.mid.q")) == (True, False)
    alone = base_of("UNet2DConditionModel", **{"mid.q.weight": (2, 3)})
    assert pipeline.weight_shape(alone, "unet.mid.q") == pipeline.weight_shape(alone, "mid.q") == (2, 3)


def test_a_single_model_loses_its_name_and_the_header_records_it() -> None:
    adapter = pipeline.single_model(adapter_of("unet.a", "unet.b", parts=("unet",)))
    assert ({*adapter.deltas}, adapter.meta.parts) == ({"a", "b"}, ())
    assert adapter.meta.header[pipeline.PART_KEY] == "unet"
    plain = adapter_of("model.q", parts=())
    assert pipeline.single_model(plain) is plain


def test_targets_of_several_models_are_refused_by_name() -> None:
    with pytest.raises(RefusedError, match=r"text_encoder\.b: the adapter acts on text_encoder and unet") as refused:
        pipeline.single_model(adapter_of("unet.a", "text_encoder.b", parts=("unet", "text_encoder")))
    assert refused.value.code == "several-models"
