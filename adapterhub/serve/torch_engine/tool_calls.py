"""Calls of tools in the text of an answer: how models write them, as a grammar, and read from text as OpenAI's `tool_calls`.

Two forms are known, told apart by what a chat template tells the model to write. That of Hermes and Qwen is
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several times and after text. That of Llama 3 is the whole answer:
`{"name": …, "parameters": {…}}`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from .grammar import json_rule, literal

Tool = Mapping[str, Any]
"""A tool's `function` in OpenAI's form."""
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# Marks of other forms within the same tags: Qwen3-Coder's and GLM's.
_OTHER_MARKS = ("<function=", "<arg_key>")
_CLOSING_BRACE = '"}"'
_ANY_TEXT = r"/(.|\n)*/"
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class CallForm:
    """A way to write calls.

    Attributes:
        tagged: Whether calls are between tags, so that there may be several, and text before them.
        arguments: The key of the arguments.
    """

    tagged: bool
    arguments: str

    def grammar(self, tools: Sequence[Tool], *, required: bool, parallel: bool, answer: str | None) -> str | None:
        """Return the grammar of an answer with calls; None if any text may be one.

        Args:
            tools: The tools that may be called.
            required: Whether a tool must be called.
            parallel: Whether more than one call is possible, if the form has several.
            answer: The rule of an answer without a call; None for any text.
        """
        lines = [f"f{index}: {self._call_rule(tool)}" for index, tool in enumerate(tools)]
        lines.append("function: " + " | ".join(f"f{index}" for index in range(len(tools))))
        lines.append(f"call: {literal(self._begin)} function {literal(self._end)}")
        calls = 'call ("\\n" call)*' if self.tagged and parallel else "call"
        if required:
            lines.append(f"start: {calls}")
        elif answer is not None:
            lines += [f"start: {calls} | answer", f"answer: {answer}"]
        elif self.tagged:
            # Lazy: the first tag in the text begins a call.
            lines += [f"TEXT: {_ANY_TEXT}", "tail: TEXT", f"opened[lazy]: TEXT {literal(_OPEN)}"]
            lines.append(f"called: opened {literal(self._begin.removeprefix(_OPEN))} function {literal(self._end)}")
            lines.append("start: called* tail" if parallel else "start: called | tail")
        else:
            return None
        return "\n".join(lines)

    @property
    def _begin(self) -> str:
        return f"{_OPEN}\n" if self.tagged else ""

    @property
    def _end(self) -> str:
        return f"\n{_CLOSE}" if self.tagged else ""

    def _call_rule(self, tool: Tool) -> str:
        """Return the rule for the call of one tool."""
        begin = f'{{"name": {json.dumps(tool["name"])}, "{self.arguments}": '
        schema = json_rule({"type": "object", **(tool.get("parameters") or _NO_PARAMETERS)}, lenient=not tool.get("strict"))
        return f"{literal(begin)} {schema} {_CLOSING_BRACE}"


_HERMES, _LLAMA = CallForm(tagged=True, arguments="arguments"), CallForm(tagged=False, arguments="parameters")


def form_of(template: str) -> CallForm | None:
    """Return the form that a chat template tells the model to write; None if that is not known."""
    if "tools" not in template or any(mark in template for mark in _OTHER_MARKS):
        return None
    if _OPEN in template and "arguments" in template:
        return _HERMES
    return _LLAMA if '{"name": ' in template and '"parameters": ' in template else None


class CallReader:
    """A reader of the text of an answer, which separates calls from content.

    Args:
        form: How calls are written.
        names: The tools' names; what calls another one is content.
    """

    def __init__(self, form: CallForm, names: frozenset[str]) -> None:
        self._form, self._names = form, names
        self._pending, self._has_begun = "", False

    def add(self, text: str) -> str:
        """Return the content that is certain, holding back what may be a call."""
        self._pending += text
        certain = self._certain_length()
        content, self._pending = self._pending[:certain], self._pending[certain:]
        self._has_begun |= bool(content)
        return content

    def _certain_length(self) -> int:
        """Return the number of characters in front of what is or may become a call."""
        if not self._form.tagged:
            is_open = not self._has_begun and self._pending.lstrip()[:1] in ("", "{")
            return 0 if is_open else len(self._pending)
        at = self._pending.find(_OPEN)
        if at >= 0:
            return at
        ends = range(max(0, len(self._pending) - len(_OPEN) + 1), len(self._pending))
        return next((end for end in ends if _OPEN.startswith(self._pending[end:])), len(self._pending))

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the content, and the calls in OpenAI's form; what is not a whole call is content."""
        text, calls = self._pending, []
        while text.strip():
            opened, inner, rest = self._split(text)
            call = self._call(inner) if opened else None
            if call is None:
                break
            calls.append(call)
            text = rest
        return text if text.strip() or not calls else "", calls

    def _split(self, text: str) -> tuple[bool, str, str]:
        """Return whether a call may begin here, its text, and what follows."""
        if not self._form.tagged:
            return True, text, ""
        before, opening, rest = text.partition(_OPEN)
        inner, closing, rest = rest.partition(_CLOSE)
        return bool(opening and closing and not before.strip()), inner, rest

    def _call(self, text: str) -> dict[str, Any] | None:
        """Return the call that a text is; None if it is none."""
        try:
            document = json_file.parse_object(text, "call")
        except FormatError:
            return None
        name, arguments = document.get("name"), document.get(self._form.arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
