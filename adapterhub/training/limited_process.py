"""The process that runs what a base brings: a chat template, or the expressions of a tokenizer (`limited`).

Requests come on stdin, answers go to stdout, each a line of JSON. It imports jinja and the standard library, and tokenizers
where that is asked for, so that it starts in 60 ms. The environment of a template is that of transformers
(`utils/chat_template_utils.py`). Its argument is the bytes of memory for all requests; each names its seconds of processor
time. Windows has neither limit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST = 1 << 24  # characters of a conversation


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks answers, has no effect on the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call, in whose scope its variables stay."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **fields: Any) -> None:
        _names(dict(*args[1:], **fields))
        jinja2.utils.Namespace.__init__(args[0], *args[1:], **fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _names([name])
        super().__setitem__(name, value)


def _names(fields: Any) -> None:
    if any(isinstance(name, str) and name.startswith("_") for name in fields):
        raise jinja2.exceptions.SecurityError("a name in a namespace starts with an underscore")


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **fields: Any) -> dict[Any, Any]:
    return dict(*args, **fields)  # a function, because a class has attributes to climb


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def environment() -> ImmutableSandboxedEnvironment:
    """Return jinja's sandbox with what chat templates may use."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _json
    made.globals.update(
        raise_exception=_raise,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_dict,
        namespace=_Namespace,
    )
    return made


def text(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Return the rendered text; jinja2.TemplateError if it is too long."""
    parts, length = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        length += len(part)
        if length > _LONGEST:
            raise jinja2.TemplateError(f"more than {_LONGEST} characters")
    return "".join(parts)


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """Have the kernel end this process when it has worked for that long from now."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, most))


def _rendering(source: str) -> Callable[[dict[str, Any]], str]:
    template = environment().from_string(source)

    def render(variables: dict[str, Any]) -> str:
        if "strftime_now" in variables:
            variables["strftime_now"] = datetime.fromisoformat(variables["strftime_now"]).strftime
        return text(template, variables)

    return render


def _splitting(source: str) -> Callable[[str], str]:
    """Split texts as a tokenizer.json does, whose model knows no token; that of a base may have 250,000."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(source)

    def split(given: str) -> str:
        tokenizer.encode(given, add_special_tokens=False)
        return ""

    return split


_KINDS: dict[str, Callable[[str], Callable[[Any], str]]] = {"template": _rendering, "tokenizer": _splitting}


def main(memory: int) -> None:
    """Answer requests until stdin ends; the first one brings the kind and the source of what all of them are given to."""
    _limit_memory(memory)
    run = None
    for line in sys.stdin.buffer:
        try:
            seconds, kind, source, given = json.loads(line)
            _limit_time(seconds)
            run = run or _KINDS[kind](source)
            answer: tuple[str, str] = run(given), ""
        except MemoryError:
            answer = "", "out of memory"
        except BaseException as error:  # noqa: BLE001 - whatever it raises is its refusal; a panic of Rust is no Exception
            answer = "", (str(error) or type(error).__name__)[:1000]
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
