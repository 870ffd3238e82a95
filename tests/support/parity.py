"""One family of transformers trained here and by peft: the first loss and its gradients, or who refuses the family and why."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support import tiny_families

if TYPE_CHECKING:
    from adapterhub.training.data.packed_rows import Rows
    from adapterhub.training.model.base_model import Base

# Families whose first model appeared in 2026, each with something that the earlier ones do not have.
NEW = (
    "axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "dory", "gemma4_text", "glm_moe_dsa", "hy_v4", "kolibri1",
    "lara_mini", "lfm3", "minimax_m3_vl_text", "qwen3_5_text", "qwen4_exp_text",
)  # fmt: skip
NOT_PEFTS = {"gate", "gate_proj", "up_proj", "down_proj"}  # which peft takes for names of experts in some families
# A small config of these has attention alone, unless it names a layer of each kind.
LAYERS = {"lfm2": {"layer_types": ["conv", "full_attention"]}}
DOCUMENTS = (23, 17)  # tokens, more than the windows and choices of tiny models
MAX_PARAMETERS = 3_000_000
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours against peft's; a family that either refuses has the reason and no numbers.

    Attributes:
        loss: The relative difference of the losses.
        gradient: The largest difference of gradients, relative to the largest gradient of their matrix.
        packed: Whether documents shared rows here; in the reference each is by itself.
    """

    family: str
    loss: float = 0.0
    gradient: float = 0.0
    packed: bool = False
    refusal: str | None = None
    no_reference: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether both agree within rounding."""
        return self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def draw(seed: int, count: int) -> list[str]:
    """Return families drawn from transformers' own list, those of 2026 first, as many as `count`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    generator = random.Random(seed)
    new = [family for family in NEW if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    candidates = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NEW))
    small: list[str] = generator.sample(new, len(new))[: count // 2]
    while candidates and len(small) < count:
        family = candidates.pop(generator.randrange(len(candidates)))
        if (tiny_families.parameter_count(family) or MAX_PARAMETERS) < MAX_PARAMETERS:
            small.append(family)
    return small


def compare(family: str, folder: Path, *, quantize: str, device: str = "cpu") -> Comparison:
    """Train one step here and with peft."""
    import torch

    from adapterhub_converters.errors import AdapterhubError
    from tests.support.byte_tokenizer import write_tokenizer

    tiny_families.model(family, **LAYERS.get(family, {})).save_pretrained(folder)
    write_tokenizer(folder)
    try:
        ours, settings = _loaded(folder, quantize, device)
    except AdapterhubError as error:
        return Comparison(family, refusal=str(error))
    packed, rows = _rows(ours)
    for path, parameter in ours.model.named_parameters():
        if "lora_B" in path:  # which begins with zeros, so that A would have no gradient
            torch.nn.init.normal_(parameter, std=0.02)
    try:
        reference = _reference(settings, ours)
        expected_loss = _reference_loss(reference, device)
    except Exception as error:
        return Comparison(family, no_reference=f"{type(error).__name__}: {error}")
    return _difference(family, ours, rows, settings, reference, expected_loss, packed=packed)


def _loaded(folder: Path, quantize: Any, device: str) -> tuple[Base, Any]:
    from adapterhub.training.model import probes
    from tests.training import test_kinds

    settings = test_kinds.whole(folder)
    settings = dataclasses.replace(settings, base=dataclasses.replace(settings.base, quantize=quantize))
    ours = test_kinds.loaded(settings, device)
    if any("peft 0.21 does not load" in note for note in ours.notes):
        excluded = tuple(sorted(NOT_PEFTS & {path.rpartition(".")[2] for path in ours.targets}))
        settings = dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, exclude=excluded))
        ours = test_kinds.loaded(settings, device)
    packed = probes.isolates_documents(ours)
    probes.check_attention(ours, sum(DOCUMENTS), None, "c.toml", packed=packed)
    return ours, settings


def _documents() -> list[np.ndarray]:
    return [np.random.default_rng(length).integers(3, 250, length + 1) for length in DOCUMENTS]


def _rows(ours: Base) -> tuple[bool, Rows]:
    """Return whether documents share a row, and the rows."""
    from adapterhub.training.data.packed_rows import IGNORED, Rows
    from adapterhub.training.model import probes

    documents, packed = _documents(), probes.isolates_documents(ours)
    if packed:
        ids, labels = (np.concatenate([tokens[part] for tokens in documents])[None] for part in (slice(-1), slice(1, None)))
        return packed, Rows(ids, labels, np.concatenate([np.arange(length) for length in DOCUMENTS])[None])
    ids = np.zeros((len(DOCUMENTS), max(DOCUMENTS)), dtype=np.int64)
    labels, positions = np.full_like(ids, IGNORED), np.zeros_like(ids)
    for row, tokens in enumerate(documents):
        length = len(tokens) - 1
        ids[row, :length], labels[row, :length] = tokens[:-1], tokens[1:]
        positions[row] = np.concatenate([np.arange(length), np.arange(max(DOCUMENTS) - length)])
    return packed, Rows(ids, labels, positions)


def _reference(settings: Any, ours: Base) -> Any:
    """Return peft's model with our factors and, of a quantized base, the weights that its codes stand for."""
    import torch

    from adapterhub.training.layers import expert_stacks, lora, nf4_matrix
    from tests.training import test_families

    reference = test_families.peft_model(settings, ours).to(ours.device)
    if settings.base.quantize == "none":
        return reference
    modules = dict(reference.base_model.model.named_modules())
    for path, module in ours.model.named_modules():
        if isinstance(module, lora.Frozen) and isinstance(module.base, nf4_matrix.NF4):
            weight = nf4_matrix.dequantize(module.base, torch.float32)
            target = getattr(modules[path], "base_layer", modules[path]).weight
            target.data.copy_(weight.t() if module.transposed else weight)
        elif isinstance(module, expert_stacks.Stack):
            matrices = torch.stack([nf4_matrix.dense(matrix, torch.float32) for matrix in module.matrices])
            reference.base_model.model.get_parameter(path).data.copy_(matrices)
    return reference


def _reference_loss(reference: Any, device: str) -> float:
    """Add the gradients of the mean loss of all tokens, each document by itself, and return it."""
    import torch

    total = 0.0
    for tokens in _documents():
        ids = torch.from_numpy(tokens[:-1])[None].to(device)
        logits = reference(input_ids=ids, use_cache=False).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]).to(device), reduction="sum")
        (loss / sum(DOCUMENTS)).backward()
        total += loss.item() / sum(DOCUMENTS)
    return total


def _difference(
    family: str, ours: Base, rows: Rows, settings: Any, reference: Any, expected_loss: float, *, packed: bool
) -> Comparison:
    from adapterhub.training.layers import lora
    from adapterhub.training.loop import training_loop
    from adapterhub.training.loop.state import new_state

    state = new_state(ours.model, settings.train)
    loss = training_loop.forward_backward(ours, rows, state, settings.train, training_loop.usual_loss(ours, rows, None))
    gradient = 0.0
    for path, layer in lora.lora_layers(ours.model):
        theirs = reference.base_model.model.get_submodule(path)
        for mine, weight in ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)):
            gradient = max(gradient, _apart(mine.grad, weight["default"].weight.grad))
    return Comparison(family, abs(loss - expected_loss) / abs(expected_loss), gradient, packed)


def _apart(gradient: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest number; a layer without a gradient has zeros."""
    import torch

    if gradient is None and expected is None:
        return 0.0
    gradient, expected = (torch.zeros(()) if item is None else item.float().cpu() for item in (gradient, expected))
    return float((gradient - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def main(arguments: Sequence[str]) -> None:
    """Print a line a family: `python -m tests.support.parity DEVICE SEED COUNT [FAMILY…]`."""
    import tempfile

    device, seed, count, *families = arguments
    wrong = 0
    for family in families or draw(int(seed), int(count)):
        for quantize in ("none", "nf4"):
            with tempfile.TemporaryDirectory() as folder:
                comparison = compare(family, Path(folder), quantize=quantize, device=device)
            wrong += not comparison.is_right
            verdict = comparison.refusal or comparison.no_reference or ("right" if comparison.is_right else "WRONG")
            print(
                f"{family} {quantize} {comparison.loss:.1e} {comparison.gradient:.1e} packed={comparison.packed} {verdict}",
                flush=True,
            )
    if wrong:
        raise SystemExit(f"{wrong} comparisons are wrong")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
