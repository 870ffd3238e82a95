"""The text model of a vision-language base is trained as peft trains it within the whole model, which loads the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training  # noqa: E402
from adapterhub.training.cost import model_sizes  # noqa: E402
from adapterhub.training.layers import lora  # noqa: E402
from adapterhub.training.loop import training_loop  # noqa: E402
from adapterhub.training.loop.state import new_state  # noqa: E402
from adapterhub.training.model.probes import isolates_documents  # noqa: E402
from adapterhub_converters.bases import read_base  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.training import test_kinds as kinds  # noqa: E402
from tests.training.test_families import STEPS, peft_losses, saved, single, whole  # noqa: E402

# Positions of three kinds beside those of the text; a window, and a mask that asks for the kind of each token.
NAMES: dict[str, dict[str, Any]] = {
    "Qwen2_5_VLForConditionalGeneration": {},
    "Gemma3ForConditionalGeneration": {},
    "Gemma4ForConditionalGeneration": {"vocab_size_per_layer_input": 259},
}


def seeing(folder: Path) -> Any:
    """The whole model, as those load it who use the adapter."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    need_module("peft")
    from peft import LoraConfig, get_peft_model

    settings, documents = whole(saved(name, tmp_path, **NAMES[name])), single()
    ours = kinds.loaded(settings)
    assert isolates_documents(ours)
    layers = dict(lora.lora_layers(ours.model))
    words = {"r": settings.lora.r, "lora_alpha": settings.lora.alpha, "task_type": "CAUSAL_LM"}
    theirs = get_peft_model(seeing(tmp_path), LoraConfig(**words, target_modules=list(layers)))
    for path, layer in layers.items():
        their_layer = theirs.base_model.model.get_submodule(path)
        their_layer.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        their_layer.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    # In training mode Gemma 3 asks for the kind of each token; no layer here drops anything.
    expected = peft_losses(theirs.eval(), settings, documents)
    state = new_state(ours.model, settings.train)
    lines = [training_loop.advance(ours, documents, state, settings.train, STEPS) for _ in range(STEPS)]
    assert [line["loss"] for line in lines] == pytest.approx(
        [loss_and_norm[0] for loss_and_norm in expected], abs=1e-5, rel=1e-6
    )
    assert [line["gradient_norm"] for line in lines] == pytest.approx(
        [loss_and_norm[1] for loss_and_norm in expected], rel=1e-4
    )


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_the_adapter_into_the_whole_model(name: str, tmp_path: Path) -> None:
    need_module("peft")
    from peft import PeftModel

    base = saved(name, tmp_path / "base", **NAMES[name])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"{number} is {number}."}) + "\n" for number in range(8)))
    (tmp_path / "c.toml").write_text(
        '[base]\npath = "base"\ndtype = "float32"\nquantize = "none"\n'
        '[data]\ntrain = "t.jsonl"\nheldout = "t.jsonl"\nsequence = 32\n'
        '[train]\nsteps = 2\nrows = 2\nlearning_rate = 0.01\nsamples = ["2 is"]\nsample_tokens = 2\nthreads = 1\n'
    )
    config = training.read_config(tmp_path / "c.toml")
    result = training.run(config, tmp_path / "out")
    loaded = PeftModel.from_pretrained(seeing(base), tmp_path / "out").eval()
    adapted = [path for path, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 14 + 5 * name.startswith("Gemma4")  # with what it adds to each layer
    assert all(".language_model." in path for path in adapted)
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(base)("2 is 2.")["input_ids"]])
    with torch.no_grad():
        after = loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            before = loaded(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3
    assert result.perplexity_after is not None
    assert result.perplexity_before is not None
    assert result.perplexity_after < result.perplexity_before
    spec = read_base(base)
    shape = model_sizes.shape_of(config, spec)
    assert sorted(model_sizes.targets(config, shape)) == sorted(path.removeprefix("base_model.model.") for path in adapted)
    assert result.report is not None
    assert result.report.base_parameters == shape.parameters < sum(parameter.numel() for parameter in seeing(base).parameters())
