"""The form that a request wants its answer in: `response_format`, and `tools` with `tool_choice`."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from adapterhub_converters.errors import ParameterError
from adapterhub_converters.lazy_dataclass import dataclass

from .grammar import Grammar, GrammarError, json_rule
from .tool_calls import CallForm, CallReader, Tool, form_of
from .values import Texts

MAX_TOOLS, MAX_NAME = 128, 64
_NAME_CHARACTERS = frozenset(f"{string.ascii_letters}{string.digits}_-.")  # OpenAI's, and the dot of MCP's
_FORMAT_FIELDS = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}
_TOOL_FIELDS = {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class AnswerForm:
    """The form of an answer.

    Attributes:
        grammar: The grammar of its text; None for any text.
        tools: The tools for the chat template; None for none.
        calls: How calls are written; None if there can be none.
        names: The names of the tools.
    """

    grammar: Grammar | None = None
    tools: list[Any] | None = None
    calls: CallForm | None = None
    names: frozenset[str] = frozenset()

    def reader(self) -> CallReader | None:
        """Return a reader of one answer; None if there can be no calls."""
        return CallReader(self.calls, self.names) if self.calls else None


def read(body: Mapping[str, Any], text: Texts) -> AnswerForm:
    """Read the fields of a request.

    Raises:
        ParameterError: One is malformed, or asks for what the base's template or this engine does not support.
        MissingExtraError: There is no library for grammars.
    """
    rule = _answer_rule(body.get("response_format"), text)
    tools = [_function(tool) for tool in _list(body.get("tools"))]
    mode, chosen = _choice(body.get("tool_choice"), tools)
    parallel = body.get("parallel_tool_calls", True)
    if parallel is not None and not isinstance(parallel, bool):
        raise ParameterError("parallel_tool_calls", "is neither true nor false")
    if not chosen:
        grammar = _grammar("response_format", None if rule is None else f"start: {rule}", text)
        return AnswerForm(grammar)
    calls = _call_form(text)
    has_several = parallel is not False and mode != "function"
    lark = calls.grammar(chosen, required=mode != "auto", parallel=has_several, answer=rule)
    return AnswerForm(_grammar("tools", lark, text), body["tools"], calls, frozenset(tool["name"] for tool in tools))


def _grammar(name: str, lark: str | None, text: Texts) -> Grammar | None:
    """Return a grammar; ParameterError names the field that it is from."""
    if lark is None:
        return None
    try:
        return Grammar(lark, text.tokenizer_json, text.chat_ends)
    except GrammarError as error:
        raise ParameterError(name, f"a JSON schema is not supported ({error})") from error


def _check_support(name: str, text: Texts) -> None:
    if not text.tokenizer_json:
        raise ParameterError(name, "is not supported by this engine", "Leave it out")


def _check_fields(name: str, value: object, fields: set[str]) -> Mapping[str, Any]:
    """Return an object that has no fields but these."""
    if not isinstance(value, Mapping):
        raise ParameterError(name, "is not an object")
    unknown = [str(field)[:80] for field in value if field not in fields and value[field] is not None]
    if unknown:
        raise ParameterError(name, f"has an unknown field {unknown[0]!r}")
    return value


def _schema(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ParameterError(name, "has a schema that is not an object")
    return value


# ---- response_format


def _answer_rule(value: object, text: Texts) -> str | None:
    """Return the rule for the text that `response_format` allows; None for any text."""
    name = "response_format"
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _FORMAT_FIELDS:
        raise ParameterError(name, f"has a type that is not one of {', '.join(_FORMAT_FIELDS)}")
    fields = _check_fields(name, value, _FORMAT_FIELDS[kind])
    if kind == "text":
        return None
    _check_support(name, text)
    if kind == "json_object":
        return json_rule({"type": "object"})
    document = _check_fields(name, fields.get("json_schema"), _SCHEMA_FIELDS)
    return json_rule(_schema(name, document.get("schema")), lenient=not document.get("strict"))


# ---- tools


def _list(tools: object) -> list[Any]:
    if tools is None:
        return []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise ParameterError("tools", f"is not a list of at most {MAX_TOOLS} tools")
    return tools


def _function(tool: object) -> Tool:
    """Return the function that a tool is."""
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise ParameterError("tools", "has a tool that is not of the type function")
    function = _check_fields("tools", tool.get("function"), _TOOL_FIELDS)
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or set(name) - _NAME_CHARACTERS:
        raise ParameterError("tools", f"has a name that is not of 1 to {MAX_NAME} letters, digits, or any of _-.")
    if function.get("parameters") is not None:
        _schema("tools", function["parameters"])
    return function


def _choice(choice: object, tools: list[Tool]) -> tuple[str, list[Tool]]:
    """Return `auto`, `required` or `function`, for exactly one call, and the tools that may be called."""
    if choice is None or choice in ("none", "auto"):
        return "auto", [] if choice == "none" else tools
    if not tools:
        raise ParameterError("tool_choice", "needs tools")
    if choice == "required":
        return "required", tools
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise ParameterError("tool_choice", "is not none, auto, required or a function")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    named = [tool for tool in tools if tool["name"] == name]
    if not named:
        raise ParameterError("tool_choice", f"names {str(name)[:80]!r}, which is none of the tools")
    return "function", named[:1]


def _call_form(text: Texts) -> CallForm:
    """Return how the base writes calls; ParameterError if its template does not say so, or in another way."""
    _check_support("tools", text)
    template = text.tool_template
    if "tools" not in template:
        raise ParameterError("tools", "the chat template of the base knows no tools", "Leave it out")
    calls = form_of(template)
    if calls is None:
        problem = "the chat template of the base writes calls in a form that this engine does not know"
        raise ParameterError("tools", problem, "Serve it with another engine")
    return calls
