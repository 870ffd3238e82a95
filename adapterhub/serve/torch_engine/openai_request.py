"""Requests in the form of OpenAI's completions and chat completions: documents in, requests for a host out.

What would change an answer and is not supported is refused by name, and so is an unknown parameter: an answer that ignores part
of the request is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from adapterhub_converters.containers.json_file import is_integer
from adapterhub_converters.errors import ParameterError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import TrainedPrompt

from . import answer_form, conversations
from .answer_form import AnswerForm
from .request_fields import CHAT, COMPLETIONS, Fields
from .streams import AnsweringHost
from .values import TOO_LONG, Blend, Request, Texts

MAX_ANSWERS = 128
"""The largest number of answers to a request: its prompts times `n`."""
_MAX_SEED = 2**63
_MIN_REPETITION = 0.01  # of the repetition penalty, so that no logit overflows
_SLACK = 4  # characters of a text for each one left in its tokens: some tokenizers compose characters, or drop spaces
# Parameters that are not supported, with the values that ask for nothing; null always does.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "function_call": ("none", "auto"),
    "functions": ([],), "modalities": (["text"],), "prediction": (),
    "reasoning_effort": (), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip
# Parameters that do not change an answer.
_IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user",
}  # fmt: skip
_SHARED_FIELDS = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_k",
    "min_p",
    "ignore_eos",
    "response_format",
}
_TOOL_FIELDS = {"tools", "tool_choice", "parallel_tool_calls"}
_CHAT_FIELDS = {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
_PATH_FIELDS = {COMPLETIONS: {"prompt", "echo"}, CHAT: _CHAT_FIELDS | _TOOL_FIELDS}


@dataclass(frozen=True)
class ApiRequest:
    """The requests of a document, `n` for each prompt, and the form of their answers.

    `echoes` has the text that comes before the answer of each request, and is empty if none does.
    """

    requests: list[Request]
    stream: bool
    include_usage: bool
    n: int
    form: AnswerForm
    echoes: list[str]

    @classmethod
    def read(cls, host: AnsweringHost, path: str, body: Mapping[str, Any], blend: Blend, prompt: TrainedPrompt) -> ApiRequest:
        """Read a document; ParameterError names what is wrong."""
        _check_names(body, path)
        values = Fields(body)
        n = values.integer("n", 1, least=1, most=MAX_ANSWERS)
        text = host.text.with_prompt(prompt.with_options(values.options("chat_template_kwargs")))
        form = answer_form.read(body, text)
        is_chat = path == CHAT
        prompts = [_conversation(host, text, body.get("messages"), form)] if is_chat else _prompts(host, body.get("prompt"), n)
        common = Request(
            ids=[],
            blend=blend,
            max_tokens=0,
            temperature=values.number("temperature", 1.0, most=2.0),
            top_p=values.number("top_p", 1.0, most=1.0),
            stop=values.texts("stop"),
            logprobs=values.logprobs(path),
            bias=values.bias(),
            presence_penalty=values.number("presence_penalty", 0.0, least=-2.0, most=2.0),
            frequency_penalty=values.number("frequency_penalty", 0.0, least=-2.0, most=2.0),
            repetition_penalty=values.number("repetition_penalty", 1.0, least=_MIN_REPETITION, most=1 / _MIN_REPETITION),
            # vLLM and llama-server write all tokens as 0 or -1.
            top_k=max(0, values.integer("top_k", 0, least=-1, most=2**31)),
            min_p=values.number("min_p", 0.0, most=1.0),
            ends=text.chat_ends if is_chat or form.grammar else frozenset(),
            ignore_eos=values.flag("ignore_eos"),
            grammar=form.grammar,
            echo=values.flag("echo"),
        )
        if common.echo and not host.scores_prompts:
            raise ParameterError("echo", "is not supported by this engine", "Leave it out")
        if common.ignore_eos and form.grammar:
            raise ParameterError("ignore_eos", "cannot be combined with tools or response_format, whose answers have an end")
        seed = values.integer("seed", None, least=-_MAX_SEED, most=_MAX_SEED - 1)
        options = body.get("stream_options")
        if options is not None and not isinstance(options, Mapping):
            raise ParameterError("stream_options", "is not an object")
        requests = []
        for ids in prompts:
            prompt_request = replace(common, ids=ids, max_tokens=values.max_tokens(path, host.longest - len(ids)))
            # Different answers for one seed, but the same each time; numpy's seeds are not negative.
            requests += [
                replace(prompt_request, seed=None if seed is None else (seed + index) % _MAX_SEED) for index in range(n)
            ]
        echoes = [_text(host, item) for item in _items(body["prompt"]) for _ in range(n)] if common.echo else []
        return cls(requests, values.flag("stream"), bool(options and options.get("include_usage")), n, form, echoes)


def _check_names(body: Mapping[str, Any], path: str) -> None:
    """Raise ParameterError for parameters that are unknown or not supported."""
    for name, value in body.items():
        if name in _SHARED_FIELDS or name in _PATH_FIELDS[path] or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise ParameterError(str(name)[:80], "unknown parameter")
        if value not in _NEUTRAL[name]:
            raise ParameterError(name, "is not supported by this engine", "Leave it out")


def _prompts(host: AnsweringHost, prompt: object, n: int) -> list[list[int]]:
    """Return the tokens of each prompt; `prompt` is a text, a list of texts, tokens, or a list of lists of tokens.

    Raises:
        ParameterError: It has another form, or asks for too many answers, `n` per prompt.
    """
    items = _items(prompt)
    if len(items) * n > MAX_ANSWERS:
        problem = f"asks for {len(items) * n:,} answers, n to each prompt; at most {MAX_ANSWERS} are supported"
        raise ParameterError("prompt", problem, "Send fewer prompts at once")
    token_lists = []
    for item in items:
        if isinstance(item, str):
            token_lists.append(_tokens(host, "prompt", item, special=True))
        elif _are_tokens(item):
            token_lists.append(item)
        else:
            raise ParameterError("prompt", "is not a text or a list of tokens, or a list of these")
    return token_lists


def _items(prompt: Any) -> list[Any]:
    """Return the prompts, each a text or a list of tokens."""
    return prompt if isinstance(prompt, list) and prompt and not _are_tokens(prompt) else [prompt]


def _text(host: AnsweringHost, item: str | list[int]) -> str:
    """Return a prompt's text as it was sent, or the text of its tokens."""
    return item if isinstance(item, str) else "".join(map(host.text.pieces(), item))


def _are_tokens(value: object) -> TypeGuard[list[int]]:
    """Return whether a value is a list of tokens, not empty."""
    return isinstance(value, list) and bool(value) and all(is_integer(item) for item in value)


def _tokens(host: AnsweringHost, name: str, text: str, *, special: bool) -> list[int]:
    """Return the tokens of a text; refuse one that is too long for any tokenization to fit.

    A tokenizer takes two hundred times the memory of its text.
    """
    most = _SLACK * host.longest * host.text.longest_token
    if len(text) > most:
        problem = f"has {len(text):,} characters, and the base sees {host.longest:,} tokens at most"
        raise ParameterError(name, problem, "Shorten the text", code=TOO_LONG)
    return host.text.tokens(text, special=special)


def _conversation(host: AnsweringHost, text: Texts, messages: object, form: AnswerForm) -> list[int]:
    """Return the tokens of a conversation, up to the beginning of the answer."""
    if not text.has_template:
        raise ParameterError("messages", "cannot be rendered: the base has no chat template", "Ask for a completion of a text")
    rendered = text.conversation(conversations.for_template(messages, text.tool_template), form.tools)
    return _tokens(host, "messages", rendered, special=False)
