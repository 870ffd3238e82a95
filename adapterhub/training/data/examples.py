"""Examples: records encoded as token ids, and which of the tokens are trained on.

All of `text` is trained on; of `prompt` and `completion` the completion; of an instruction its output; of `messages` the
assistant's turns (`conversation`). Records are encoded in batches, because the tokenizer encodes many texts on all cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapterhub.prompts import chat_template
from adapterhub_converters.errors import FormatError

from . import template_renderers
from .conversation import Conversation
from .example import Example

Source = Conversation | str | Example
"""A record before it is encoded: a conversation to render, a text, or what needs no batch."""


def encode(record: Mapping[str, Any], tokenizer: Any, *, loss: str, location: str) -> Example:
    """Encode one record in a form of `record_shapes`; `loss` is `all` or `completion`.

    Raises:
        FormatError: A message lacks its role or content, or the chat template refuses the conversation.
        RefusedError: The answers cannot be located in the rendered conversation.
    """
    source = source_of(record, tokenizer, loss=loss, location=location)
    answers = template_renderers.request_all(requests([source], loss))
    (example,) = encode_sources([source], answers, tokenizer, loss=loss)
    if isinstance(example, FormatError):
        raise example
    return example


def source_of(record: Mapping[str, Any], tokenizer: Any, *, loss: str, location: str) -> Source:
    """Return a record as a source; errors are those of `encode`."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(record.get("messages"), list):
        return Conversation(record["messages"], record.get("tools"), tokenizer, location=location)
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = [*prompt, *completion]
        return Conversation(turns, record.get("tools"), tokenizer, location=location, first=len(prompt))
    if isinstance(prompt, str) and isinstance(completion, str):
        return _encode_pair(prompt, completion, tokenizer, loss)
    if isinstance(record.get("instruction"), str):
        return _instruction(record, tokenizer, location)
    text: str = record["text"]
    return text


def requests(sources: Sequence[Source | FormatError], loss: str) -> list[template_renderers.Request | None]:
    """Return what to ask the chat template about each source, None for what is no conversation."""
    return [source.request(loss) if isinstance(source, Conversation) else None for source in sources]


def encode_sources(
    sources: Sequence[Source | FormatError], answers: Sequence[Any], tokenizer: Any, *, loss: str
) -> list[Example | FormatError]:
    """Encode sources, with the answers to their requests; one that the chat template refuses gives its error.

    Raises:
        RefusedError: The answers cannot be located in a rendered conversation.
    """
    examples: list[Any] = list(sources)
    conversations: dict[int, Conversation] = {}
    for number, (source, answer) in enumerate(zip(sources, answers, strict=True)):
        if isinstance(source, Conversation):
            try:
                source.render(answer)
                conversations[number] = source
            except FormatError as error:
                examples[number] = error
    if conversations:
        texts = [conversation.text for conversation in conversations.values()]
        # Long documents are cut into rows later, so the tokenizer's warning about them (`verbose`) is off.
        options = {"return_attention_mask": False, "return_token_type_ids": False, "return_offsets_mapping": True}
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False, **options)
        for (number, conversation), ids, offsets in zip(
            conversations.items(), encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            starts = np.array([start for start, _ in offsets], np.int64)
            try:
                examples[number] = conversation.example(loss, np.array(ids, np.int64), starts)
            except FormatError as error:
                examples[number] = error
    plain_texts = {number: source for number, source in enumerate(sources) if isinstance(source, str)}
    if plain_texts:
        for number, ids in zip(plain_texts, open_ended_ids(list(plain_texts.values()), tokenizer), strict=True):
            ended = np.array([*ids, *_stop_ids(tokenizer)], np.int64)
            examples[number] = Example(ended, np.ones(len(ended), bool), joint=False)
    return examples


def open_ended_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the ids of texts that continue, without the end mark that some tokenizers add."""
    all_ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    stop = _stop_ids(tokenizer)
    for number, (text, ids) in enumerate(zip(texts, all_ids, strict=True)):
        # Only an end mark that the tokenizer added is removed, not one that the text ends with.
        if stop and ids[-1:] == stop and tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-1:] != stop:
            all_ids[number] = ids[:-1]
    return all_ids


def _encode_pair(prompt: str, completion: str, tokenizer: Any, loss: str) -> Example:
    (question,) = open_ended_ids([prompt], tokenizer)
    # Tokenized separately from the prompt, so that no token spans the border between them.
    answer = [*tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], *_stop_ids(tokenizer)]
    trained = [loss == "all"] * len(question) + [True] * len(answer)
    return Example(np.array([*question, *answer], np.int64), np.array(trained, bool), joint=True)


def _instruction(record: Mapping[str, Any], tokenizer: Any, location: str) -> Conversation:
    """Return an instruction and its output as a conversation."""
    instruction, input_text, output = record["instruction"], record.get("input", ""), record["output"]
    system = record.get("system", "")
    border = chat_template.INPUT if chat_template.is_alpaca(tokenizer) else "\n\n"
    turns = [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": f"{instruction}{border}{input_text}" if input_text else instruction},
        {"role": "assistant", "content": output},
    ]
    return Conversation(turns, None, tokenizer, location=location)


def _stop_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
