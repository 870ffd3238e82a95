"""The process, started by `process_limits`, that runs a base's chat template or the expressions of its tokenizer.

Requests come on stdin, answers go to stdout, each a line of JSON; a request has a list of values, each of which gets an answer.
To start in 60 ms, it imports only jinja and the standard library, and tokenizers if that is asked for. The environment of a
template is that of transformers (`utils/chat_template_utils.py`). The argument is the memory limit in bytes for all requests;
each request names the seconds of processor time for each of its values, and for all of them. Windows has neither limit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_CHARACTERS = 1 << 24  # characters of a conversation
MARK = "\ue000{}\ue001"  # private use: conversations that contain it are not measured


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks answers and has no effect on the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call, whose scope keeps its variables."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **fields: Any) -> None:
        _check_names(dict(*args[1:], **fields))
        jinja2.utils.Namespace.__init__(args[0], *args[1:], **fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_names([name])
        super().__setitem__(name, value)


def _check_names(fields: Any) -> None:
    # jinja's sandbox hides names with an underscore, which lead to Python's internals; a namespace would store them.
    if any(isinstance(name, str) and name.startswith("_") for name in fields):
        raise jinja2.exceptions.SecurityError("a name in a namespace starts with an underscore")


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **fields: Any) -> dict[Any, Any]:
    return dict(*args, **fields)  # a function: from the class itself, a template could climb to other attributes


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def environment() -> ImmutableSandboxedEnvironment:
    """Return jinja's sandbox, extended with the names that chat templates may use."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _json
    sandbox.globals.update(
        raise_exception=_raise,
        strftime_now=lambda date_format: datetime.now().strftime(date_format),
        dict=_dict,
        namespace=_Namespace,
    )
    return sandbox


def text(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Return the rendered text; raise jinja2.TemplateError if it is too long."""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > _MAX_CHARACTERS:
            raise jinja2.TemplateError(f"more than {_MAX_CHARACTERS} characters")
    return "".join(pieces)


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    # A process that exceeds the limit must not leave a core dump of a gigabyte.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float) -> None:
    """Let the kernel end this process after `seconds` more of processor time."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    # The limit counts whole seconds since the process started, so it is raised for each request.
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + seconds) + 1, hard_limit))


Render = Callable[..., str]


def _renderer(source: str) -> Callable[[list[Any]], Any]:
    """Return a function of a template's variables and a plan, that returns the text if there is no plan, or its measures."""
    template = environment().from_string(source)

    def answer(value: list[Any]) -> Any:
        variables, plan = value
        if "strftime_now" in variables:
            # JSON has no functions: the date comes as text, and the template calls its `strftime`.
            variables["strftime_now"] = datetime.fromisoformat(variables["strftime_now"]).strftime

        def render(**changes: Any) -> str:
            return text(template, {**variables, **changes})

        return _measure(render, variables["messages"], plan) if plan else render()

    return answer


def _measure(render: Render, messages: list[Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation's text and where its turns are in it; `template_measures` describes the plan and the result."""
    text = render()
    prompts = [
        _length_if_prefix(text, _try(render, messages=messages[:count], add_generation_prompt=True))
        for count in plan["prompts"]
    ]
    positions = None
    if plan["several"] or not all(isinstance(prompt, int) for prompt in prompts):
        marks = {int(number): position for number, position in plan["marks"].items()}
        marked = _try(render, messages=[_with_mark(message, number, marks) for number, message in enumerate(messages)])
        positions = _mark_positions(marked or "", text, len(plan["marks"]))
    closing = None
    if (last := plan["closing"]) is not None:
        answer = {"role": "assistant", "content": MARK.format(last)}
        closing = (_try(render, messages=[*messages[:last], answer]) or "").partition(MARK.format(last))[2]
    return {"text": text, "prompts": prompts, "positions": positions, "closing": closing}


def _try(render: Render, **changes: Any) -> str | None:
    try:
        return render(**changes)
    except Exception:  # noqa: BLE001 - whatever a template raises: its conversation is measured in another way
        return None


def _length_if_prefix(text: str, prompt: str | None) -> int | str | None:
    return len(prompt) if prompt is not None and text.startswith(prompt) else prompt


def _with_mark(message: Any, number: int, marks: dict[int, int]) -> Any:
    if number not in marks:
        return message
    content, position = message["content"], marks[number]
    return {**message, "content": content[:position] + MARK.format(number) + content[position:]}


def _mark_positions(marked: str, text: str, count: int) -> dict[str, int] | None:
    """Return where the marks would be in the text without them; None if the template writes anything else differently."""
    start, end = MARK.split("{}")
    first, *rest = marked.split(start)
    pieces = [piece.partition(end) for piece in rest]
    texts, numbers = [first, *(following for _, _, following in pieces)], [number for number, _, _ in pieces]
    if "".join(texts) != text or len(numbers) != count or len(set(numbers)) != count or not "".join(numbers).isdigit():
        return None
    positions, position = {}, 0
    for piece, number in zip(texts, numbers, strict=False):
        position += len(piece)
        positions[number] = position
    return positions


def _splitter(source: str) -> Callable[[str], str]:
    """Return a function that splits texts as the tokenizer.json in `source` does.

    Its model has an empty vocabulary, because only the splitting is tested; that of a base may have 250,000 tokens.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(source)

    def split(untrusted: str) -> str:
        tokenizer.encode(untrusted, add_special_tokens=False)
        return ""

    return split


_KINDS: dict[str, Callable[[str], Callable[[Any], Any]]] = {"template": _renderer, "tokenizer": _splitter}


def main(memory: int) -> None:
    """Answer requests until stdin ends; the first one names the kind and has the source that all of them use."""
    _limit_memory(memory)
    handler = None
    for line in sys.stdin.buffer:
        seconds, all_seconds, kind, source, values = json.loads(line)
        end = time.process_time() + all_seconds
        for value in values:
            try:
                _limit_time(min(seconds, max(0.0, end - time.process_time())))
                handler = handler or _KINDS[kind](source)
                answer: tuple[Any, str] = handler(value), ""
            except MemoryError:
                answer = "", "out of memory"
            except BaseException as error:  # noqa: BLE001 - whatever it raises is its refusal; a panic of Rust is no Exception
                answer = "", (str(error) or type(error).__name__)[:1000]
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
