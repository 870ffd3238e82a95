"""Chat templates, which are programs in Jinja: what they reach for, and what they write under which conditions.

They are read token by token as jinja's lexer splits them, never parsed by it and never run: a template may target the parser.
Two kinds of attacks are looked for. One leaves the sandbox, or counts on a program without one, by attributes such as
`__class__`. The other stays in it: a condition on the words of a conversation, or on the date, under which instructions are
added that the user does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from adapterhub.checks.report import Problem
from adapterhub_converters import safe_regex

from . import markup
from .configs import Fault

MAX_TEMPLATE = 1 << 20  # characters; the longest of a known model has 20,000
_SHORT = 80
_COMPARES = {"==", "!=", "<", ">", "<=", ">=", "in"}
_TESTS = {"startswith", "endswith", "find", "rfind", "index", "count", "search", "match"}
_LOADS = {"include", "import", "from", "extends"}
# Names that no chat template needs, in front of a dot or a call; attributes by which Python's frames and classes are reached.
_NAMES = {
    "builtins", "compile", "eval", "exec", "getattr", "globals", "importlib", "lipsum", "locals", "open", "os", "popen",
    "setattr", "subprocess", "sys",
}  # fmt: skip
_ATTRIBUTES = {
    "cr_frame", "f_back", "f_builtins", "f_globals", "format_map", "func_code", "func_globals", "gi_code", "gi_frame",
    "im_class", "im_func", "mro", "popen", "subclasses", "tb_frame",
}  # fmt: skip
# The parts and roles of a message, which templates ask for by name.
_STRUCTURE = {
    "assistant", "audio", "audio_url", "content", "developer", "document", "file", "function", "image", "image_url",
    "input_audio", "input_image", "input_text", "name", "output", "parameters", "reasoning", "reasoning_content", "role",
    "system", "text", "think", "thinking", "tool", "tool_call", "tool_calls", "tool_result", "tool_use",
    "type", "user", "video", "video_url",
}  # fmt: skip
_NOT_TEXTS = {"message", "messages", "role"}  # names that are no text even if they are made of one
_AS_TEXT = {"join", "list", "lower", "string", "tojson", "upper"}  # filters that make text of all messages
_CLOCK = {"strftime_now", "now", "datetime"}
_ESCAPE = safe_regex.Pattern(r"(?s)\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)")
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r"}
_OPERATORS = ("==", "!=", "<=", ">=", "//", "**")


class Token(NamedTuple):
    """A token of Jinja: its kind, `name`, `text`, `number` or `operator`, and its value, without quotes and escapes."""

    kind: str
    value: str


class Part(NamedTuple):
    """A part of a template: `data`, which is written unchanged, `variable` or `block`, and its text or its tokens."""

    kind: str
    text: str
    tokens: tuple[Token, ...] = ()


def split(template: str) -> list[Part]:
    """Split a template as jinja's lexer does; an unclosed part ends with the template."""
    parts: list[Part] = []
    at = 0
    while at < len(template):
        begin = _opening(template, at)
        if begin > at:
            parts.append(Part("data", template[at:begin]))
        if begin == len(template):
            break
        mark = template[begin + 1]
        if mark == "#":
            end = template.find("#}", begin + 2)
            at = len(template) if end < 0 else end + 2
            continue
        tokens, at = _tokens(template, begin + 2, "%}" if mark == "%" else "}}")
        parts.append(Part("block" if mark == "%" else "variable", "", _without_trim_marks(tokens)))
        if mark == "%" and parts[-1].tokens[:1] == (Token("name", "raw"),):
            end = template.find("endraw", at)
            close = template.find("%}", end) if end >= 0 else -1
            parts.append(Part("data", template[at:end] if close >= 0 else template[at:]))
            at = close + 2 if close >= 0 else len(template)
    return parts


def _without_trim_marks(tokens: list[Token]) -> tuple[Token, ...]:
    """Return the tokens without the marks that trim white space around code."""
    marks = (Token("operator", "-"), Token("operator", "+"))
    begin, end = tokens[:1] and tokens[0] in marks, len(tokens) > 1 and tokens[-1] in marks
    return tuple(tokens[bool(begin) : len(tokens) - end])


def _opening(template: str, at: int) -> int:
    """Return the position of the next mark that opens code; the length of the template if there is none."""
    while (at := template.find("{", at)) >= 0:
        if template[at + 1 : at + 2] in ("{", "%", "#"):
            return at
        at += 1
    return len(template)


def _tokens(template: str, at: int, end: str) -> tuple[list[Token], int]:
    """Return the tokens from `at` to `end`, which closes no code within braces, and the position after it."""
    tokens: list[Token] = []
    depth = 0
    while at < len(template):
        char = template[at]
        if not depth and template.startswith(end, at):
            return tokens, at + 2
        if char in "\"'":
            close = _closing(template, at)
            tokens.append(Token("text", _unescape(template[at + 1 : close])))
            at = close + 1
        elif char.isalnum() or char == "_":
            start = at
            while at < len(template) and (template[at].isalnum() or template[at] == "_"):
                at += 1
            tokens.append(Token("number" if char.isdigit() else "name", template[start:at]))
        elif char.isspace():
            at += 1
        else:
            operator = template[at : at + 2] if template[at : at + 2] in _OPERATORS else char
            depth += (operator in "([{") - (operator in ")]}" and depth > 0)
            tokens.append(Token("operator", operator))
            at += len(operator)
    return tokens, at


def _closing(template: str, at: int) -> int:
    """Return the position of the quote that closes a string."""
    quote, at = template[at], at + 1
    while at < len(template) and template[at] != quote:
        at += 2 if template[at] == "\\" else 1
    return min(at, len(template))


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: _character(match[1]), text) if "\\" in text else text


def _character(escape: str) -> str:
    if escape[0] in "xuU" and len(escape) > 1:
        code = int(escape[1:], 16)
        return chr(code) if code < 0x110000 else "?"
    return chr(int(escape, 8)) if escape[0] in "01234567" else _CONTROLS.get(escape, escape)


# ---- faults


def problems(path: str, key: str, template: str) -> Iterator[Problem]:
    """Yield the problems of a chat template that the file `path` has under `key`, or as a whole if that is empty."""
    if len(template) > MAX_TEMPLATE:
        yield Problem("not-scanned", path, key, f"a chat template of more than {MAX_TEMPLATE} characters")
        return
    for fault in faults(template):
        yield Problem(fault.code, path, key, fault.message)
    yield from markup.invisible_characters(path, template, key)


def faults(template: str) -> Iterator[Fault]:
    """Yield the faults of a template, without a key."""
    parts = split(template)
    reported: set[tuple[str, str]] = set()
    for fault in (*_escapes(parts), *_switches(parts), *_links(parts), *_words(parts)):
        if (fault.code, fault.message) not in reported:
            reported.add((fault.code, fault.message))
            yield fault


def _escapes(parts: Sequence[Part]) -> Iterator[Fault]:
    """Yield ways out of the sandbox."""
    for part in parts:
        tokens = _join_texts(part.tokens)
        if part.kind == "block" and tokens and tokens[0].value in _LOADS and tokens[0].kind == "name":
            yield Fault("template-escape", "", f"loads another file by `{tokens[0].value}`")
        for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
            if message := _reaches(before, token, after):
                yield Fault("template-escape", "", message)


def _reaches(before: Token | None, token: Token, after: Token | None) -> str:
    """Return how a token reaches for something outside of the sandbox; empty if it does not."""
    dotted = before == Token("operator", ".")
    if token.kind == "name":
        if token.value.startswith("__") or (dotted and (token.value.startswith("_") or token.value in _ATTRIBUTES)):
            return f"reaches for the attribute {token.value[:_SHORT]}"
        if token.value in _NAMES and not dotted and after in (Token("operator", "("), Token("operator", ".")):
            return f"reaches for {token.value}"
        if token.value in ("attr", "map") and before == Token("operator", "|") and after == Token("operator", "("):
            return "reaches for an attribute by the filter attr" if token.value == "attr" else ""
    if token.kind == "text" and "__" in token.value:
        return f"has the text {token.value[:_SHORT]!r}, as of a hidden attribute"
    return ""


def _join_texts(tokens: Sequence[Token]) -> list[Token]:
    """Return the tokens with texts joined where `~`, `+` or nothing at all is between them."""
    joined: list[Token] = []
    pieces: list[str] = []  # of the text that comes next, joined once, and not piece by piece
    waiting = False  # an operator that may join was the last token, which is not in `joined` yet
    # None at the end flushes the last text.
    for token in (*tokens, None):
        if token and token.kind == "text":
            pieces.append(token.value)
            waiting = False
        elif token and token.kind == "operator" and token.value in "~+" and pieces and not waiting:
            waiting = True
        else:
            joined += [Token("text", "".join(pieces))] if pieces else []
            joined += [Token("operator", "~")] if waiting and token else []
            joined += [token] if token else []
            pieces, waiting = [], False
    return joined


def _switches(parts: Sequence[Part]) -> Iterator[Fault]:
    """Yield conditions on the words of messages and on the date; names are followed from one `set` to the next."""
    texts, clocks = {"content"}, set(_CLOCK)
    for part in parts:
        tokens = part.tokens
        if part.kind == "block" and tokens[:1] == (Token("name", "set"),) and tokens[2:3] == (Token("operator", "="),):
            name, values = tokens[1].value, {token.value for token in tokens[3:] if token.kind != "operator"}
            texts |= {name} if values & texts and name not in _NOT_TEXTS else set()
            clocks |= {name} if values & clocks else set()
        for clause in _conditions(part):
            yield from _switch(clause, texts, clocks)


def _conditions(part: Part) -> Iterator[list[Token]]:
    """Yield the clauses of a part's conditions: between `if` or `elif` and the end or `else`, split at `and`, `or`, `not`."""
    clause: list[Token] = []
    in_condition = False
    # The added `else` ends the last clause.
    for token in (*part.tokens, Token("name", "else")):
        if token.kind == "name" and token.value in ("if", "elif", "else", "and", "or"):
            if in_condition and clause:
                yield clause
            clause = []
            in_condition = token.value in ("if", "elif") or (in_condition and token.value != "else")
        elif in_condition:
            clause.append(token)


def _switch(clause: Sequence[Token], texts: set[str], clocks: set[str]) -> Iterator[Fault]:
    """Yield the fault of a clause that compares the date or the words of a message."""
    words = {token.value for token in clause if token.kind in ("name", "text")}
    compares = any(token.value in _COMPARES for token in clause) or any(token.value in _TESTS for token in clause)
    clause_text = " ".join(repr(token.value) if token.kind == "text" else token.value for token in clause)[:_SHORT]
    if compares and {token.value for token in clause if token.kind == "name"} & clocks:
        yield Fault("template-switch", "", f"asks for the date: {clause_text}")
    # Conditions on the type or role of a message are how templates work, and are skipped.
    asks = words & texts or ("messages" in words and words & _AS_TEXT)
    if not compares or not asks or "type" in words or "role" in words:
        return
    for index, token in enumerate(clause):
        if token.kind == "text" and _is_plain(token.value) and not _is_key(clause, index):
            yield Fault("template-switch", "", f"asks whether a message has {token.value[:40]!r}: {clause_text}")
            return


def _is_plain(text: str) -> bool:
    """Return whether a text may belong to a conversation: not a mark such as `</think>`, not a part or a role of a message."""
    stripped = text.strip()
    letters = sum(char.isalpha() for char in stripped)
    return letters >= 2 and not set(stripped) & set("<>[]{}|#") and stripped.lower() not in _STRUCTURE


def _is_key(clause: Sequence[Token], index: int) -> bool:
    """Return whether a text is the key of a subscript or of `get`, and not an item of a list."""
    before = [token.value for token in clause[max(0, index - 2) : index]]
    if before == ["get", "("]:
        return True
    subscript = before[-1:] == ["["] and len(before) == 2
    return subscript and before[0] != "in" and (before[0] in (")", "]") or before[0].isidentifier())


def _output_texts(parts: Sequence[Part]) -> Iterator[str]:
    """Yield the texts that a template may write: its own, and those in its expressions."""
    for part in parts:
        if part.kind == "data":
            yield part.text
        yield from (token.value for token in _join_texts(part.tokens) if token.kind == "text")


def _links(parts: Sequence[Part]) -> Iterator[Fault]:
    for text in _output_texts(parts):
        for scheme in ("http://", "https://"):
            if (at := text.find(scheme)) >= 0:
                yield Fault("template-link", "", f"writes the address {text[at:].split()[0][:_SHORT]}")


def _words(parts: Sequence[Part]) -> Iterator[Fault]:
    """Yield the longest text that a template adds to a conversation, for the reader to judge."""
    longest = max((" ".join(text.split()) for text in _output_texts(parts)), key=len, default="")
    if longest.count(" ") >= 4:
        yield Fault("template-text", "", f"may add the text: {longest[:200]}{'…' if len(longest) > 200 else ''}")
