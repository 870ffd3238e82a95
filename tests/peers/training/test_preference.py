"""Against trl's DPOTrainer: the same pairs, seed and schedule give its losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from adapterhub.training import train_config  # noqa: E402
from adapterhub.training.data.packed_rows import order  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.training.conftest import tiny_base  # noqa: E402
from tests.training.test_kinds import STEPS, loaded, peft_model, whole  # noqa: E402
from tests.training.test_preference import DPO, MAX_LENGTH, PAIRS, ROWS, our_losses  # noqa: E402

__all__ = ["tiny_base"]


def their_trainer(settings: train_config.TrainConfig, model: Any, folder: Path) -> Any:
    """trl's trainer of the same steps: pairs in our order, gradients added up over as many passes."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.base.path)
    tokenizer.pad_token = "<|endoftext|>"
    train, micro = settings.train, settings.train.micro_rows or ROWS
    words = DPOConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, per_device_train_batch_size=micro, beta=DPO.strength,
        gradient_accumulation_steps=ROWS // micro, learning_rate=train.learning_rate, lr_scheduler_type="linear",
        weight_decay=0.0, max_grad_norm=1.0, seed=train.seed, train_sampling_strategy="sequential",
        max_length=MAX_LENGTH, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, fp16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    pairs = Dataset.from_list([PAIRS[number] for number in order(len(PAIRS), STEPS * ROWS, train.seed)])
    return DPOTrainer(model, args=words, train_dataset=pairs, processing_class=tokenizer)


def test_losses_of_twenty_steps_are_trls(tmp_path: Path, tiny_base: Path) -> None:
    for name in ("trl", "datasets", "peft"):
        need_module(name)
    settings = whole(tiny_base)
    settings = replace(settings, train=replace(settings.train, rows=ROWS, micro_rows=2))
    losses = our_losses(loaded(settings), settings, DPO)
    # trl copies the adapter, which starts without a delta, as its reference.
    trainer = their_trainer(settings, peft_model(settings, loaded(settings)), tmp_path)
    trainer.train()
    assert losses == pytest.approx([line["loss"] for line in trainer.state.log_history if "loss" in line], abs=1e-5)
    assert losses[-1] < losses[0] / 2
