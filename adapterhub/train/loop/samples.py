"""What the model says to a few questions while it learns: greedy, so that the same training says the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapterhub.train.layers.embeddings import token_rows
from adapterhub.train.model.base import Base


def answers(base: Base, prompts: Sequence[str], tokens: int) -> list[dict[str, str]]:
    """Each prompt with at most `tokens` tokens of answer; a prompt is asked in the chat template where there is one."""
    if not prompts:
        return []
    rows = token_rows(base.model)
    if rows is not None:
        rows.write()  # an output layer that is tied to the table has them too
    base.model.eval()
    try:
        return [{"prompt": prompt, "text": _answer(base, prompt, tokens)} for prompt in prompts]
    finally:
        base.model.train()


def _answer(base: Base, prompt: str, tokens: int) -> str:
    tokenizer = base.tokenizer
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    given = torch.tensor([ids]).to(base.device)
    with torch.no_grad():
        said = base.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
    return str(tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True))
