"""Evaluation on the held-out data: the mean loss, and answers to a few prompts, decoded greedily to be reproducible."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterhub.prompts import chat_template
from adapterhub.training.data.examples import open_ended_ids
from adapterhub.training.data.packed_rows import Rows
from adapterhub.training.events import EvaluationEvent, OnEvent
from adapterhub.training.layers.embeddings import token_rows
from adapterhub.training.model.base_model import Base
from adapterhub.training.train_config import OptimConfig, PreferenceConfig
from adapterhub_converters.errors import RefusedError

from .loss import evaluated_passes, sum_of_parts
from .preference import evaluate as evaluate_pairs
from .state import State, best_step, copy_trained

_MAX_LOSS = 700.0  # in nats; the perplexity of a larger loss overflows


def evaluate(base: Base, rows: Rows, size: int, *, on_pass: Callable[[Rows, Tensor], None] | None = None) -> float:
    """Return the mean loss of all rows, in nats per token, computed `size` rows at a time.

    Args:
        on_pass: Called with the trimmed rows of each pass in order, and with the log-probability of each label.
    """
    sums = []
    for batch, label_logprobs in evaluated_passes(base, rows, size):
        sums.append(label_logprobs.sum())
        if on_pass is not None:
            on_pass(batch, label_logprobs)
    # Divided once at the end, so that each label counts the same, no matter how the rows are divided.
    return -sum_of_parts(sums) / max(1, rows.label_tokens)


def log_evaluation(
    base: Base,
    heldout: Rows | None,
    state: State,
    config: OptimConfig,
    preference: PreferenceConfig | None = None,
    *,
    steps: int,
    on_event: OnEvent,
) -> None:
    """Evaluate once after each step, and remember the parameters if they are the best so far and `keep_best` is set."""
    # A resumed run has the evaluation of its last step in the log already.
    if heldout is None or state.heldout(state.step) is not None:
        return
    size = config.micro_rows or config.rows
    pair_metrics: dict[str, float] = {}
    if preference:
        loss, accuracy, margin = evaluate_pairs(base, heldout, size, preference)
        pair_metrics = {"accuracy": accuracy, "margin": margin}
    else:
        loss = evaluate(base, heldout, size)
    if not loss < _MAX_LOSS:
        problem = f"the held-out loss is {loss} at step {state.step}"
        raise RefusedError("train", problem, "Lower learning_rate, or raise warmup", code="diverged")
    log_line: dict[str, Any] = {"step": state.step, "heldout_loss": loss, "tokens": state.tokens}
    log_line |= {f"heldout_{name}": value for name, value in pair_metrics.items()}
    samples = answers(base, config.samples, config.sample_tokens)
    state.log.append({**log_line, "samples": samples} if samples else log_line)
    if config.keep_best and best_step(state.log) == state.step:
        state.best = copy_trained(base.model)
    texts = tuple((sample["prompt"], sample["text"]) for sample in samples)
    on_event(EvaluationEvent(state.step, steps, loss, None if pair_metrics else math.exp(loss), texts, **pair_metrics))


def answers(base: Base, prompts: Sequence[str], tokens: int) -> list[dict[str, str]]:
    """Return each prompt with an answer of at most `tokens` tokens; prompts are in the chat template if there is one."""
    if not prompts:
        return []
    trained_rows = token_rows(base.model)
    if trained_rows is not None:
        trained_rows.write()  # for an output layer that is tied to the table
    base.model.eval()
    try:
        return [{"prompt": prompt, "text": _answer(base, prompt, tokens)} for prompt in prompts]
    finally:
        base.model.train()


def _answer(base: Base, prompt: str, tokens: int) -> str:
    tokenizer = base.tokenizer
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        text = chat_template.render(tokenizer, message, location=f"the sample {prompt[:40]!r}", prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        (ids,) = open_ended_ids([prompt], tokenizer)
    inputs = torch.tensor([ids]).to(base.device)
    with torch.no_grad():
        output = base.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False, use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
