"""Rendering of a model's chat template, an untrusted program, with limits on its time, memory and output.

jinja's sandbox keeps a template from files and from Python's internals, but not from nested loops, from `'a' * 10**10` or from
a filter that pads to a billion characters. Counting steps inside the interpreter does not stop the last two, which are one step
each; the limits of a process stop all of them (`process_limits`).

To get the variables that transformers would give a template, transformers renders a template of ours that writes them as JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterhub.training import process_limits
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError

_VARIABLES = (
    "{{ dict(messages=messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)|tojson }}"
)
SECONDS = 10  # of processor time per conversation; rendering one takes milliseconds


FILE = "chat_template.jinja"
"""The name of the template in the folder of an adapter, as in that of a model."""
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
NAMED = {"chatml": _CHATML, "plain": _PLAIN}


def choose(tokenizer: Any, setting: str, path: Path, location: str) -> None:
    """Replace the template of `tokenizer` by the one in the setting: a name in NAMED, or else the file at `path`.

    Raises:
        NotFoundError: It is neither.
        RefusedError: The tokenizer has no token for the marks of `chatml`.
    """
    if setting not in NAMED and not path.is_file():
        raise NotFoundError(
            f"{location}: [data] chat_template", f"no file {setting[:80]!r}", f"The names are {', '.join(NAMED)}"
        )
    # Depending on the tokenizer, the id of an unknown token is None or that of the token for unknown text.
    if setting == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in (None, tokenizer.unk_token_id):
        problem = "the base has no token <|im_end|>, with which chatml ends what somebody says"
        raise RefusedError(f"{location}: [data] chat_template", problem, 'Set "plain", or a file of your own')
    tokenizer.chat_template = NAMED.get(setting) or json_file.read_text(path)


def adopt(tokenizer: Any, folder: Path) -> None:
    """Make `tokenizer` use the template that the adapter in `folder` was trained with, if there is one."""
    if (folder / FILE).is_file():
        tokenizer.chat_template = json_file.read_text(folder / FILE)


def set_variables(tokenizer: Any, options: Mapping[str, Any], date: str | None) -> None:
    """Set the options of the template of `tokenizer`, and the ISO date that it gets when it asks for the time; None is now."""
    tokenizer.template_variables = {**options, **({"strftime_now": date} if date else {})}


def has_clock(tokenizer: Any) -> bool:
    """Return whether the template of `tokenizer` may write the date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


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
        return str(process(template).ask([variables, None], SECONDS))
    except process_limits.LimitExceededError as error:
        # The process has ended; the next conversation starts another.
        process.cache_clear()
        raise limit_error(location) from error
    except ValueError as error:
        raise _refusal(error, location) from error


def limit_error(location: str) -> FormatError:
    """Return the error for a conversation whose rendering exceeds a limit."""
    return FormatError(
        location, f"the model's chat template exceeds {SECONDS} s or {process_limits.MEMORY >> 30} GiB of memory"
    )


def _refusal(error: Exception, location: str) -> FormatError:
    return FormatError(location, f"the model's chat template refuses it ({' '.join(str(error).split())[:200]})")


@functools.lru_cache(maxsize=2)  # a template for conversations with tools, and one for the others
def process(template: str) -> process_limits.Process:
    """Return the process that renders a template."""
    return process_limits.Process("template", template)
