"""Against trl's SFTTrainer: the same conversations, seed and schedule give its losses, and adapters that peft takes for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.training import train_config  # noqa: E402
from adapterhub.training.data.examples import encode  # noqa: E402
from adapterhub.training.data.packed_rows import order  # noqa: E402
from adapterhub.training.loop import training_loop  # noqa: E402
from adapterhub.training.loop.state import new_state  # noqa: E402
from adapterhub.training.model import adapter_transfer  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.training.conftest import packed_rows, tiny_base  # noqa: E402
from tests.training.test_kinds import STEPS, loaded, peft_model, whole  # noqa: E402

__all__ = ["tiny_base"]
ROWS, MAX_LENGTH = 4, 96
# What the tiny base's own template writes, with the marks that trl needs to find the answers.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of one to four turns, and answers of a few to many tokens: a mean of means would be another loss.
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": role, "content": text}
            for turn in range(1 + number % 2)
            for role, text in (("user", f"{number}?"), ("assistant", "ab" * (1 + (number + turn) % 9)))
        ]
    }
    for number in range(8)
]


def our_run(settings: train_config.TrainConfig) -> tuple[Any, Any, list[float]]:
    """The model before any step, the one after, and the losses."""
    first, loaded_model = loaded(settings), loaded(settings)
    examples = [encode(chat, loaded_model.tokenizer, loss="completion", location="") for chat in CHATS]
    rows = packed_rows(examples, MAX_LENGTH, pack_rows=False)
    state = new_state(loaded_model.model, settings.train)
    losses = [training_loop.advance(loaded_model, rows, state, settings.train, STEPS)["loss"] for _ in range(STEPS)]
    return first, loaded_model, losses


def their_trainer(settings: train_config.TrainConfig, model: Any, folder: Path) -> Any:
    """trl's trainer of the same steps: rows in our order, gradients added up over as many passes."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.base.path)
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", MARKED
    train, micro = settings.train, settings.train.micro_rows or ROWS
    drawn = order(len(CHATS), STEPS * ROWS, train.seed)
    words = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, per_device_train_batch_size=micro,
        gradient_accumulation_steps=ROWS // micro, learning_rate=train.learning_rate, lr_scheduler_type="linear",
        weight_decay=0.0, max_grad_norm=1.0, seed=train.seed, train_sampling_strategy="sequential", assistant_only_loss=True,
        max_length=MAX_LENGTH, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, fp16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    dataset = Dataset.from_list([CHATS[number] for number in drawn])
    return SFTTrainer(model, args=words, train_dataset=dataset, processing_class=tokenizer)


@pytest.mark.peer
def test_losses_of_twenty_steps_are_trls_and_peft_takes_both_adapters_for_one(tmp_path: Path, tiny_base: Path) -> None:
    """Masks of the answers, padding, gradients over several passes, clipping, schedule and AdamW, all in one."""
    for name in ("trl", "datasets", "peft"):
        need_module(name)
    from peft import PeftModel

    settings = whole(tiny_base)
    settings = replace(settings, train=replace(settings.train, rows=ROWS, micro_rows=2))
    first, trained_model, losses = our_run(settings)
    trainer = their_trainer(settings, peft_model(settings, first), tmp_path)
    trainer.train()
    assert losses == pytest.approx([line["loss"] for line in trainer.state.log_history if "loss" in line], abs=1e-5)

    trainer.save_model(str(tmp_path / "theirs"))
    (tmp_path / "ours").mkdir()
    peft_format.write(adapter_transfer.trained_adapter(settings, trained_model), tmp_path / "ours")
    ids, logits = torch.arange(3, 43)[None], []
    for folder in ("ours", "theirs"):
        fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(fresh, tmp_path / folder).eval()(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-3)
