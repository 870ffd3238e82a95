"""Render a model's chat template, a program of a stranger's, with limits on its time, its memory and its text.

jinja's sandbox keeps a template from files and from Python's insides, but not from nested loops, from `'a' * 10**10` or from a
filter that pads to a billion. No count of steps inside the interpreter stops the last two, which are one step each; the limits
of a process stop all of them (`limited`).

transformers prepares what the template sees: it renders, in its place, a template of ours that writes all of it as JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterhub.training import limited
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError

_VARIABLES = (
    "{{ dict(messages=messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)|tojson }}"
)
SECONDS = 10  # of processor time for one conversation, whose rendering takes milliseconds


FILE = "chat_template.jinja"
"""The name of the template in the folder of an adapter, as in that of a model."""
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Words for the roles, and the end of a text, which every tokenizer has, as the end of an answer.
_PLAIN = (
    "{{ bos_token if bos_token is defined else '' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NAMED = {"chatml": _CHATML, "plain": _PLAIN}


def choose(tokenizer: Any, wanted: str, path: Path, where: str) -> None:
    """Replace the template of `tokenizer` by the one that is `wanted`: a name in NAMED, or the file at `path`.

    Raises:
        NotFoundError: It is neither.
        RefusedError: The tokenizer has no token for the marks of `chatml`.
    """
    if wanted not in NAMED and not path.is_file():
        raise NotFoundError(f"{where}: [data] chat_template", f"no file {wanted[:80]!r}", f"The names are {', '.join(NAMED)}")
    if wanted == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in (None, tokenizer.unk_token_id):
        what = "the base has no token <|im_end|>, with which chatml ends what somebody says"
        raise RefusedError(f"{where}: [data] chat_template", what, 'Set "plain", or a file of your own')
    tokenizer.chat_template = NAMED.get(wanted) or json_file.read_text(path)


def adopt(tokenizer: Any, folder: Path) -> None:
    """Have `tokenizer` use the template that the adapter in `folder` was trained with, where there is one."""
    if (folder / FILE).is_file():
        tokenizer.chat_template = json_file.read_text(folder / FILE)


def give(tokenizer: Any, options: Mapping[str, Any], date: str | None) -> None:
    """Have the template of `tokenizer` see options, and `date`, in ISO's form, wherever it asks for the time; None is now."""
    tokenizer.template_variables = {**options, **({"strftime_now": date} if date else {})}


def has_clock(tokenizer: Any) -> bool:
    """Return whether a template of `tokenizer` may write the date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, where: str, tools: list[Any] | None = None, prompt: bool = False
) -> str:
    """Return the conversation as text.

    Args:
        where: The conversation, in messages.
        tools: JSON schemas of the tools that it may call.
        prompt: Whether the beginning of an answer is added.

    Raises:
        FormatError: The template refuses the conversation, or exceeds a limit.
        RefusedError: There is no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        hint = 'Set [data] chat_template = "plain", "chatml", or a file of your own'
        raise RefusedError(where, "is a conversation, and the base has no chat template", hint)
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, **({"tools": tools} if tools else {})}
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
        variables = json.loads(tokenizer.apply_chat_template(list(messages), chat_template=_VARIABLES, **options))
    except Exception as error:
        raise _refusal(error, where) from error
    given = getattr(tokenizer, "template_variables", {})
    return rendered(template, {**tokenizer.special_tokens_map, **given, **variables}, where=where)


def rendered(template: str, variables: Mapping[str, Any], *, where: str) -> str:
    """Return a template's text for the variables that it sees; errors as those of `render`.

    A date in ISO's form as `strftime_now` stands for the function of that name.
    """
    try:
        return _started(template).ask(variables, SECONDS)
    except limited.ExceededError as error:
        _started.cache_clear()
        raise FormatError(
            where, f"the model's chat template exceeds {SECONDS} s or {limited.MEMORY >> 30} GiB of memory"
        ) from error
    except ValueError as error:
        raise _refusal(error, where) from error


def _refusal(error: Exception, where: str) -> FormatError:
    return FormatError(where, f"the model's chat template refuses it ({' '.join(str(error).split())[:200]})")


@functools.lru_cache(maxsize=2)  # a template for conversations with tools, and one for the others
def _started(template: str) -> limited.Process:
    return limited.Process("template", template)
