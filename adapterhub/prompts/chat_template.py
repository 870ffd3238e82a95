"""Rendering of a model's chat template, an untrusted program, with limits on its time, memory and output.

jinja's sandbox keeps a template from files and from Python's internals, but not from nested loops, from `'a' * 10**10` or from
a filter that pads to a billion characters. Counting steps inside the interpreter does not stop the last two, which are one step
each; the limits of a process stop all of them (`process_limits`).

To get the variables that transformers would give a template, transformers renders a template of ours that writes them as JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.trained_prompt import CLOCK, TrainedPrompt

from . import process_limits

_VARIABLES = (
    "{{ dict(messages=messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)|tojson }}"
)
_WORD = "word"
ANSWERED = ({"role": "user", "content": _WORD}, {"role": "assistant", "content": _WORD})
"""A conversation that shows what a template writes after an answer."""
SECONDS = 10  # of processor time per conversation; rendering one takes milliseconds
MAX_ENDED = 2
"""Conversations of a batch that may exceed that: a template that ends none of them costs no more time than a few."""


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Plain words for the roles; every tokenizer has an end-of-text token, which ends an answer.
_PLAIN = (
    "{{ bos_token if bos_token is defined else '' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The prompts of Alpaca (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT), for one instruction and its answer.
INPUT = "\n\n### Input:\n"
_TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_ALPACA = (
    "{{ bos_token if bos_token is defined else '' }}{% set system = messages[0] if messages[0]['role'] == 'system' %}"
    "{% for message in (messages[1:] if system else messages) %}{% if message['role'] == 'user' and loop.first %}"
    f"{{% if system %}}{{{{ system['content'] }}}}{{% elif {json.dumps(INPUT)} in message['content'] %}}"
    f"{{{{ '{_TASK.format(', paired with an input that provides further context')}' }}}}"
    f"{{% else %}}{{{{ '{_TASK.format('')}' }}}}{{% endif %}}"
    "{{ '\\n\\n### Instruction:\\n' + message['content'] + '\\n\\n### Response:' }}"
    "{% elif message['role'] == 'assistant' and loop.index == 2 %}"
    "{{ message['content'] + (eos_token if eos_token is defined else '') }}"
    "{% else %}{{ raise_exception('the words of Alpaca are for one instruction and its answer') }}{% endif %}{% endfor %}"
)
ALPACA = "alpaca"
NAMED = {"chatml": _CHATML, "plain": _PLAIN, ALPACA: _ALPACA}


def for_tokenizer(template: str, tokenizer: Any) -> str:
    """Return a template that writes nothing for a beginning-of-text token that the tokenizer of the training lacks.

    A GGUF of the base may name one: config.json of Qwen does, and its tokenizer does not.
    """
    is_missing = "bos_token" in template and getattr(tokenizer, "bos_token", None) is None
    return f"{{%- set bos_token = '' %}}\n{template}" if is_missing else template


def apply(tokenizer: Any, prompt: TrainedPrompt) -> None:
    """Make `tokenizer` render conversations by the prompt of an adapter."""
    if prompt.template is not None:
        tokenizer.chat_template = prompt.template
    tokenizer.template_variables = prompt.variables


def use_alpaca(tokenizer: Any) -> None:
    """Make `tokenizer` render conversations in the words of Alpaca."""
    tokenizer.chat_template = for_tokenizer(_ALPACA, tokenizer)


def is_alpaca(tokenizer: Any) -> bool:
    """Return whether `tokenizer` renders conversations in the words of Alpaca."""
    return str(getattr(tokenizer, "chat_template", None)).endswith(_ALPACA)


def has_clock(tokenizer: Any) -> bool:
    """Return whether the template of `tokenizer` may write the date."""
    return CLOCK in str(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    location: str,
    tools: list[Any] | None = None,
    prompt: bool = False,
) -> str:
    """Return the conversation as text.

    Args:
        location: The conversation, in messages.
        tools: JSON schemas of the tools that it may call.
        prompt: Whether to add the beginning of an answer.

    Raises:
        FormatError: The template refuses the conversation, or exceeds a limit.
        RefusedError: There is no template.
    """
    template, variables = inputs(tokenizer, messages, location=location, tools=tools, prompt=prompt)
    return render_variables(template, variables, location=location)


def inputs(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    location: str,
    tools: list[Any] | None = None,
    prompt: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Return the template for a conversation and its variables; arguments and errors are those of `render`."""
    if not getattr(tokenizer, "chat_template", None):
        hint = 'Set [data] chat_template = "plain", "chatml", or a file of your own'
        raise RefusedError(location, "is a conversation, and the base has no chat template", hint)
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, **({"tools": tools} if tools else {})}
    try:
        # transformers renders our template, which returns the variables; the model's own is rendered in a limited process.
        template = str(tokenizer.get_chat_template(tools=tools))
        variables = json.loads(tokenizer.apply_chat_template(list(messages), chat_template=_VARIABLES, **options))
    except Exception as error:
        raise _refusal(error, location) from error
    template_variables = getattr(tokenizer, "template_variables", {})
    return template, {**tokenizer.special_tokens_map, **template_variables, **variables}


def render_variables(template: str, variables: Mapping[str, Any], *, location: str) -> str:
    """Return a template's text for its variables; errors are those of `render`.

    `strftime_now` may be an ISO date, which the template sees as a function of that name.
    """
    try:
        return str(process(template).request([variables, None], SECONDS))
    except process_limits.LimitExceededError as error:
        raise limit_error(location) from error
    except ValueError as error:
        raise _refusal(error, location) from error


def end_mark(answered: str, special: Iterable[str], ends: Iterable[str]) -> str | None:
    """Return the special token that a template writes right after an answer; None if there is none, or the model stops anyway.

    Bases that were trained on text alone stop at another token, and what is trained on them with `chatml` ends with its mark.

    Args:
        answered: The text of ANSWERED.
        special: The texts of the special tokens.
        ends: The texts of the tokens that end any answer of the base.
    """
    after = answered.rpartition(_WORD)[2]
    if any(end in after for end in ends if end):
        return None
    return max((token for token in special if token and after.startswith(token)), key=len, default=None)


def end_token(
    template: str, variables: Mapping[str, Any], special: Mapping[str, int], ends: Iterable[str], *, location: str
) -> int | None:
    """Return the id of the token that ends answers by a template; None if it is not known, or the model stops there anyway.

    Args:
        variables: Of the template, besides the conversation.
        special: The ids of the special tokens, by their texts.
        ends: The texts of the tokens that end any answer of the base.
    """
    conversation = {"messages": [*ANSWERED], "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        answered = render_variables(template, {**variables, **conversation}, location=location)
    except FormatError:  # a template for conversations of another form
        return None
    mark = end_mark(answered, special, ends)
    return None if mark is None else special[mark]


def limit_error(location: str) -> FormatError:
    """Return the error for a conversation whose rendering exceeds a limit."""
    return FormatError(
        location,
        f"the model's chat template exceeds {SECONDS} s ({MAX_ENDED * SECONDS} s for 64 conversations) "
        f"or {process_limits.MEMORY >> 30} GiB of memory",
    )


def _refusal(error: Exception, location: str) -> FormatError:
    return FormatError(location, f"the model's chat template refuses it ({' '.join(str(error).split())[:200]})")


@functools.lru_cache(maxsize=8)  # of a base and some adapters of it; with and without tools, a base may have two
def process(template: str) -> process_limits.Process:
    """Return the process that renders a template."""
    return process_limits.Process("template", template)
