"""A drawn sample of merges: causal families of transformers and kinds of peft by a seed, each compared with peft's own merge.

`python -m tests.support.drawn_merges` draws 60 and writes what came of them into docs/formats.md.
"""

from __future__ import annotations

import collections
import random
import re
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.merging import merge_into_base
from adapterhub_converters import bases
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import convert
from tests.conftest import ROOT
from tests.support import tiny_families

DOC = ROOT / "docs/formats.md"
SEED, COUNT = 20261201, 60
# The class of a config of peft and its keys; all linear layers are targets.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "rsLoRA with biases": ("LoraConfig", {"r": 4, "use_rslora": True, "bias": "all"}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 2}),
    "LoKr": ("LoKrConfig", {"r": 2}),
    "VeRA": ("VeraConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "RoAD": ("RoadConfig", {"group_size": 4}),
    "MiSS": ("MissConfig", {"r": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 50}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 50}),
    "SHiRA": ("ShiraConfig", {"r": 2}),
    "RandLora": ("RandLoraConfig", {"r": 8}),
    "HiRA": ("HiraConfig", {"r": 4}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "GraLoRA": ("GraloraConfig", {"r": 4}),
    "PVeRA": ("PveraConfig", {"r": 4}),
    "DEFT": ("DeftConfig", {"r": 4}),
    "OSF": ("OSFConfig", {"effective_rank": 8}),
    "PEANuT": ("PeanutConfig", {"r": 4}),
    "GLoRA": ("GloraConfig", {"r": 2}),
    "Supertuning": ("SupertuningConfig", {"sparsity": 0.9}),
    "TinyLoRA": ("TinyLoraConfig", {"u": 4, "weight_tying": 1.0}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
}

# Kinds that no merge can be right for, and why; a refusal of another is a gap.
RIGHTLY_REFUSED = {"PSOFT": "peft does not save the singular vectors that it changes"}


def draw(seed: int, count: int) -> list[tuple[str, str]]:
    """Return pairs of a family and a kind, the same for the same seed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    generator = random.Random(seed)
    families = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    generator.shuffle(families)
    small = (family for family in families if (tiny_families.parameter_count(family) or 10**9) < 3_000_000)
    kinds = sorted(KINDS)
    return [(family, generator.choice(kinds)) for family, _ in zip(small, range(count), strict=False)]


def outcome(family: str, kind: str) -> tuple[str, str]:
    """Return what came of a merge, `right`, `wrong`, `refused`, `gap` or `no oracle`, and the reason."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at = Path(folder)
        try:
            theirs, model_class = _merged_by_peft(family, kind, at)
        except Exception as error:  # whatever peft, or a tiny model of the family, says
            return "no oracle", f"{type(error).__name__}: {str(error)[:100]}"
        try:
            adapter = convert.read(at / "adapter", base=bases.read_hf(at / "base"))
            merge_into_base([(adapter, 1.0)], at / "base", at / "ours")
        except AdapterhubError as error:
            return "refused" if kind in RIGHTLY_REFUSED else "gap", error.what
        ours = _parameters(model_class.from_pretrained(at / "ours"))
        for name, array in theirs.items():
            if not np.abs(ours[name] - array).max() <= 1e-5 * max(1.0, np.abs(array).max()):
                return "wrong", name
    return "right", ""


def _merged_by_peft(family: str, kind: str, at: Path) -> tuple[dict[str, np.ndarray], Any]:
    import peft
    import torch

    model = tiny_families.model(family)
    model.save_pretrained(at / "base")
    model_class = type(model)
    config, keys = KINDS[kind]
    tuned = peft.get_peft_model(
        model_class.from_pretrained(at / "base"), getattr(peft, config)(target_modules="all-linear", **keys)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(at / "adapter")
    loaded = peft.PeftModel.from_pretrained(model_class.from_pretrained(at / "base"), str(at / "adapter"))
    return _parameters(loaded.merge_and_unload()), model_class


def _parameters(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().numpy() for name, tensor in model.named_parameters(remove_duplicate=False)}


def _sentence(outcomes: list[tuple[str, str]]) -> str:
    import peft
    import transformers

    counts = collections.Counter(result for result, _ in outcomes)
    compared = len(outcomes) - counts["no oracle"]
    shares = {
        "are peft's": "right", "are refused because peft does not save all that they depend on": "refused",
        "are refused although they could be merged": "gap", "differ": "wrong",
    }  # fmt: skip
    results = [f"{counts[result]} ({counts[result] / compared:.0%}) {words}" for words, result in shares.items()]
    return (
        f"Of {compared} merges drawn from the causal families of transformers {transformers.__version__} and the kinds of peft "
        f"{peft.__version__}, {', '.join(results[:-1])}, and {results[-1]}."
    )


if __name__ == "__main__":
    drawn = draw(SEED, COUNT)
    results = []
    for pair in drawn:
        results.append(outcome(*pair))
        print(*pair, *results[-1], flush=True)
    paragraph = textwrap.fill(_sentence(results), 128)
    DOC.write_text(re.sub(r"(?ms)^Of \d+ merges drawn from.*?(?=\n\n)", lambda _: paragraph, DOC.read_text()))
