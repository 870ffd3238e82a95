"""The process that renders a chat template: requests on stdin, answers on stdout, each a line of JSON (`chat_template`).

It imports jinja and the standard library only, so that it starts in 60 ms, and its environment is that of transformers
(`utils/chat_template_utils.py`). Its arguments are the seconds of processor time for one request and the bytes of memory for
all; Windows has neither limit.
"""

from __future__ import annotations

import json
import sys
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


def main(seconds: int, memory: int) -> None:
    """Answer requests until stdin ends."""
    _limit_memory(memory)
    template = None
    for line in sys.stdin.buffer:
        _limit_time(seconds)
        try:
            source, variables = json.loads(line)
            template = template or environment().from_string(source)
            answer: tuple[str, str] = text(template, variables), ""
        except MemoryError:
            answer = "", "out of memory"
        except Exception as error:  # noqa: BLE001 - whatever a template raises is its refusal
            answer = "", (str(error) or type(error).__name__)[:1000]
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
