"""Requests to versions with a prompt of their own: another chat template than their base's, options of it, or a date.

An option in a client's `chat_template_kwargs` replaces that of the training. A request without a conversation, or to a version
that was trained with the base's own template, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.serve.prepared_versions import OWN_TEMPLATE
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from . import CHAT, Blend
from .api_paths import MESSAGE_TOKENS, MESSAGES, RESPONSE_TOKENS, RESPONSES

MIXED = "mixed-chat-templates"
"""The code of the error for a conversation with a blend of versions that were trained with different templates."""
OPTIONS = "chat_template_kwargs"
_CONVERSATIONS = frozenset({CHAT, MESSAGES, MESSAGE_TOKENS, RESPONSES, RESPONSE_TOKENS})


def prompt_of(path: str, body: Mapping[str, Any], blend: Blend) -> TrainedPrompt:
    """Return the prompt that the versions of a request were trained with; that of the base if it has no conversation.

    Raises:
        RefusedError: They were trained with different prompts.
    """
    if path not in _CONVERSATIONS and "messages" not in body:
        return PROMPT_OF_BASE
    prompts = [served.prompt for served, _ in blend] or [PROMPT_OF_BASE]
    if any(prompt != prompts[0] for prompt in prompts):
        problem = "a blend of versions that were trained with different chat templates, so there is none for a conversation"
        raise RefusedError("", problem, "Ask for a completion of a text", code=MIXED)
    return prompts[0]


def options_of(body: Mapping[str, Any], prompt: TrainedPrompt) -> Mapping[str, Any]:
    """Return the options of the template for a request: the client's, and those of the training that it does not set."""
    client_options = body.get(OPTIONS)
    return {**dict(prompt.options), **(client_options if isinstance(client_options, Mapping) else {})}


def with_options(
    path: str, body: Mapping[str, Any], prompt: TrainedPrompt, engine: str, hint: str = "Serve it with another engine"
) -> Mapping[str, Any]:
    """Return a request with the options of the template, for an engine that knows only the template of its base.

    Raises:
        RefusedError: The version needs another template or a date, or the path has no options.
    """
    if not prompt:
        return body
    if prompt.template is not None or prompt.date is not None:
        part = "a date in the chat template" if prompt.template is None else "a chat template of its own"
        raise refusal(f"was trained with {part}, which {engine} cannot use for one version alone", hint)
    if path != CHAT:
        raise refusal(f"was trained with options of the chat template, which {path} does not have", f"Ask {CHAT}")
    return {**body, OPTIONS: options_of(body, prompt)}


def refusal(problem: str, hint: str) -> RefusedError:
    """Return the error for a version that cannot be prompted as it was trained."""
    return RefusedError("", problem, hint, code=OWN_TEMPLATE)
