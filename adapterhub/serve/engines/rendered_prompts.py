"""Conversations rendered here, for vLLM, which would run the chat template of an adapter in the process of all requests.

A template is a stranger's program. It runs in a process with limits, and vLLM gets one that writes what it is told, so that the
request stays a chat: with tools, forms of answers, thoughts and probabilities as vLLM has them.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterhub.serve import base_prompts
from adapterhub.serve.base_prompts import BasePrompt
from adapterhub.serve.torch_engine import conversations
from adapterhub.training.data import chat_template
from adapterhub_converters.errors import MissingExtraError, ParameterError, RefusedError
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from . import CHAT, Blend
from .api_paths import TOKENIZE
from .own_prompts import OPTIONS, options_of, prompt_of, refusal, with_options

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_TEMPLATE, _TEXT = "chat_template", "adapterhub_prompt"
_WRITES_TEXT = f"{{{{ {_TEXT} }}}}"
_PATHS = frozenset({CHAT, TOKENIZE})
# What vLLM does with the text that a template writes, or needs another one for.
_UNSUPPORTED = ("continue_final_message",)
_NO_HARMONY = "gpt_oss"  # vLLM writes its conversations without a template


def refuse_template(body: Mapping[str, Any]) -> None:
    """Raise RefusedError for a request that brings a chat template, a program that vLLM would run without a limit."""
    options = body.get(OPTIONS)
    if body.get(_TEMPLATE) is not None or (isinstance(options, Mapping) and options.get(_TEMPLATE) is not None):
        problem = "`chat_template` is not taken from clients: a template is a program, which vLLM runs without a limit"
        raise RefusedError("", problem, "Leave it out", code="unsupported")


async def with_prompt(path: str, body: Mapping[str, Any], blend: Blend, base: BaseSpec) -> Mapping[str, Any]:
    """Return a request that asks its version as it was trained.

    Args:
        path: The path of the API.
        body: The document of the request; a template in it counts before that of the version.
        blend: The version.
        base: The base, whose folder has its template and its special tokens.

    Raises:
        RefusedError: vLLM cannot be asked like that on this path, or the base's tokenizer is not on this disk.
        ParameterError: The conversation is malformed, or a field cannot be combined with a template of the version's own.
        FormatError: The template refuses the conversation, or exceeds a limit.
    """
    prompt = prompt_of(path, body, blend)
    if not prompt or body.get(_TEMPLATE) is not None:
        return body
    if prompt.template is None and prompt.date is None:
        return with_options(path, body, prompt, "vLLM")
    _check(path, body, base)
    text = await asyncio.to_thread(_render, body, prompt, base, blend[0][0].ref)
    # The options are for vLLM's parser of thoughts.
    return {**body, _TEMPLATE: _WRITES_TEXT, OPTIONS: {**options_of(body, prompt), _TEXT: text}}


def _check(path: str, body: Mapping[str, Any], base: BaseSpec) -> None:
    """Raise an error for what vLLM would do with another prompt than that of the version."""
    if path not in _PATHS:
        raise refusal(f"was trained with a chat template of its own, which vLLM does not take on {path}", f"Ask {CHAT}")
    if base.model_type == _NO_HARMONY:
        raise refusal("was trained with a chat template of its own, and vLLM uses none for this base", "Use another engine")
    for name in _UNSUPPORTED:
        if body.get(name):
            raise ParameterError(name, f"`{name}` cannot be combined with a chat template of the adapter's own", "Leave it out")


def _render(body: Mapping[str, Any], prompt: TrainedPrompt, base: BaseSpec, ref: str) -> str:
    """Return the text of a conversation, up to the beginning of the answer."""
    if importlib.util.find_spec("jinja2") is None:
        problem = "has a chat template of its own, which needs jinja2 in the gateway"
        raise MissingExtraError(ref, problem, "Run `pip install 'adapterhub[serve]'`")
    base_prompt = _base_prompt(base)
    template = prompt.template if prompt.template is not None else base_prompt.template
    if template is None:
        raise refusal("has no chat template, and neither has its base", "Ask for a completion of a text")
    effort = body.get("reasoning_effort")
    asked = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    variables = {
        **base_prompt.special_tokens,
        **prompt.variables,
        **asked,
        **options_of(body, PROMPT_OF_BASE),
        "messages": conversations.for_template(body.get("messages"), template),
        "tools": body.get("tools") or None,
        "documents": body.get("documents"),
        "add_generation_prompt": body.get("add_generation_prompt", True),
    }
    return chat_template.render_variables(template, variables, location=ref)


def _base_prompt(base: BaseSpec) -> BasePrompt:
    base_prompt = base_prompts.of_spec(base)
    if base_prompt is None:
        problem = "was trained with a chat template of its own, and the special tokens of the base are not known here"
        raise refusal(problem, "Name the base by its folder")
    return base_prompt
