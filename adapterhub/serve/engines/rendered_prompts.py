"""Conversations rendered here, for servers that answer with all versions in one process.

A chat template is a stranger's program, and such a server would run it in the process of all requests, or knows one template
only. So an adapter's template runs here, in a process with limits, and the server's own template just writes the finished text.
The request stays a chat, with the forms of answers, thoughts and probabilities that the server has.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from adapterhub.prompts import chat_template
from adapterhub.serve.torch_engine import conversations
from adapterhub_converters.bases import base_prompts
from adapterhub_converters.bases.base_prompts import BasePrompt
from adapterhub_converters.errors import MissingExtraError, ParameterError, RefusedError
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from . import CHAT, Blend
from .api_paths import TOKENIZE
from .own_prompts import OPTIONS, options_of, prompt_of, refusal, with_options

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_TEMPLATE, _TEXT = "chat_template", "adapterhub_prompt"
_WRITES_TEXT = f"{{{{ {_TEXT} }}}}"
ONE_PROCESS_EACH = "Let the gateway start llama-server with a process for each version, or ask for a completion of a text"
_STOPS = "stop_token_ids"
_MAX_ENDS = 64  # prompts whose end mark is remembered
_PATHS = frozenset({CHAT, TOKENIZE})
_CONTINUE = "continue_final_message"
_HARMONY = "gpt_oss"  # a `model_type` whose conversations vLLM writes without a template


def refuse_template(body: Mapping[str, Any]) -> None:
    """Raise RefusedError for a request that brings a chat template, a program that vLLM would run without a limit."""
    options = body.get(OPTIONS)
    if body.get(_TEMPLATE) is not None or (isinstance(options, Mapping) and options.get(_TEMPLATE) is not None):
        problem = "`chat_template` is not taken from clients: a template is a program, which vLLM runs without a limit"
        raise RefusedError("", problem, "Leave it out", code="unsupported")


class Renderer:
    """Renders conversations for versions of a base.

    Args:
        read: Returns the prompt of the base; None if its files are not on this disk.
    """

    def __init__(self, read: Callable[[], BasePrompt | None]) -> None:
        self._read = read
        # The process of a template renders one conversation after another; those that wait for it hold no threads of others.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._ends: dict[TrainedPrompt, int | None] = {}

    @cached_property
    def _base_prompt(self) -> BasePrompt:
        base_prompt = self._read()
        if base_prompt is None:
            problem = "was trained with a chat template of its own, and the special tokens of the base are not known here"
            raise refusal(problem, "Name the base by its folder")
        return base_prompt

    async def text(self, body: Mapping[str, Any], prompt: TrainedPrompt, ref: str, messages: object = None) -> str:
        """Return the text of a request's conversation, or of other `messages`, up to the beginning of the answer.

        Raises:
            ParameterError: The conversation is malformed.
            FormatError: The template refuses it, or exceeds a limit.
        """
        template = self._template(prompt, ref)
        effort = body.get("reasoning_effort")
        effort_options = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        variables = {
            **self._base_prompt.special_tokens,
            **prompt.variables,
            **effort_options,
            **options_of(body, PROMPT_OF_BASE),
            "messages": conversations.for_template(body.get("messages") if messages is None else messages, template),
            "tools": body.get("tools") or None,
            "documents": body.get("documents"),
            "add_generation_prompt": body.get("add_generation_prompt", True),
        }
        async with self._turns.setdefault(template, asyncio.Lock()):
            return await asyncio.to_thread(chat_template.render_variables, template, variables, location=ref)

    def _template(self, prompt: TrainedPrompt, ref: str) -> str:
        if importlib.util.find_spec("jinja2") is None:
            problem = "has a chat template of its own, which needs jinja2 in the gateway"
            raise MissingExtraError(ref, problem, "Run `pip install 'adapterhub[serve]'`")
        template = prompt.template if prompt.template is not None else self._base_prompt.template
        if template is None:
            raise refusal("has no chat template, and neither has its base", "Ask for a completion of a text")
        return template

    async def end_token(self, prompt: TrainedPrompt, base: BaseSpec, ref: str) -> int | None:
        """Return the token with which a version's own template ends answers, unless its base stops there by itself."""
        if prompt not in self._ends:
            special, ends = await asyncio.to_thread(base_prompts.end_tokens, base)
            template, variables = self._template(prompt, ref), {**self._base_prompt.special_tokens, **prompt.variables}
            async with self._turns.setdefault(template, asyncio.Lock()):
                token = await asyncio.to_thread(chat_template.end_token, template, variables, special, ends, location=ref)
            if len(self._ends) >= _MAX_ENDS:
                self._ends.clear()
            self._ends[prompt] = token
        return self._ends[prompt]


# ---- vLLM, which takes a template and tokens to stop at with a request


async def for_vllm(path: str, body: Mapping[str, Any], blend: Blend, base: BaseSpec, renderer: Renderer) -> Mapping[str, Any]:
    """Return a request that prompts its version as it was trained; a template in the request replaces that of the version.

    Raises:
        RefusedError: vLLM takes no template on this path, or the base's tokenizer is not on this disk.
        ParameterError: The conversation is malformed, or a field cannot be combined with a template of the version's own.
        FormatError: The template refuses the conversation, or exceeds a limit.
    """
    prompt = prompt_of(path, body, blend)
    if not prompt or body.get(_TEMPLATE) is not None:
        return body
    if prompt.template is None and prompt.date is None:
        return with_options(path, body, prompt, "vLLM")
    if path not in _PATHS:
        raise refusal(f"was trained with a chat template of its own, which vLLM does not take on {path}", f"Ask {CHAT}")
    if base.model_type == _HARMONY:
        raise refusal("was trained with a chat template of its own, and vLLM uses none for this base", "Use another engine")
    if body.get(_CONTINUE):
        problem = f"`{_CONTINUE}` cannot be combined with a chat template of the adapter's own"
        raise ParameterError(_CONTINUE, problem, "Leave it out")
    text = await renderer.text(body, prompt, blend[0][0].ref)
    # The options are for vLLM's parser of thoughts.
    rendered = {**body, _TEMPLATE: _WRITES_TEXT, OPTIONS: {**options_of(body, prompt), _TEXT: text}}
    client_stops = body.get(_STOPS) or []
    # It would stop there in spite of `ignore_eos`.
    if path != CHAT or body.get("ignore_eos") or not isinstance(client_stops, list):
        return rendered
    end = await renderer.end_token(prompt, base, blend[0][0].ref)
    return rendered if end is None else {**rendered, _STOPS: [*client_stops, end]}


# ---- llama-server as one process, which has one template


def pass_through(template: str | None) -> str:
    """Return a template that writes the text it is told, or else what the template of the base writes.

    Args:
        template: The template of the base; None for that of llama-server for a base without one.
    """
    fallback = chat_template.NAMED["chatml"] if template is None else template.removesuffix("\n")
    return f"{{%- if {_TEXT} is defined -%}}{_WRITES_TEXT}{{%- else %}}{fallback}{{% endif %}}"


async def for_one_template(path: str, body: Mapping[str, Any], blend: Blend, renderer: Renderer) -> Mapping[str, Any]:
    """Return a request that prompts its version as it was trained, for a llama-server with a template of `pass_through`.

    Raises:
        RefusedError: The path, or a field, needs a template of the version's own in llama-server itself.
        ParameterError: The conversation is malformed, or the client tells the template what to write.
        FormatError: The template refuses the conversation, or exceeds a limit.
    """
    if isinstance(options := body.get(OPTIONS), Mapping) and _TEXT in options:
        raise ParameterError(OPTIONS, f"`{_TEXT}` is set by the gateway alone", "Leave it out")
    prompt = prompt_of(path, body, blend)
    if prompt.template is None and prompt.date is None:
        return with_options(path, body, prompt, "llama.cpp", ONE_PROCESS_EACH)
    if path != CHAT or body.get("tools"):
        field = "`tools`" if path == CHAT else path
        problem = f"was trained with a chat template of its own, with which one llama-server for all versions has no {field}"
        raise refusal(problem, ONE_PROCESS_EACH)
    messages = body.get("messages")
    # llama-server itself appends the beginning of an answer that ends the conversation.
    if isinstance(messages, list) and len(messages) > 1 and isinstance(messages[-1], Mapping):
        messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    text = await renderer.text(body, prompt, blend[0][0].ref, messages)
    return {**body, OPTIONS: {**options_of(body, prompt), _TEXT: text}}
