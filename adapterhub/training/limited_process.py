"""The process, started by `process_limits`, that runs a base's chat template or the expressions of its tokenizer.

Requests come on stdin, answers go to stdout, each a line of JSON. To start in 60 ms, it imports only jinja and the standard
library, and tokenizers if that is asked for. The environment of a template is that of transformers
(`utils/chat_template_utils.py`). The argument is the memory limit in bytes for all requests; each request names its seconds of
processor time. Windows has neither limit.
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

_MAX_CHARACTERS = 1 << 24  # characters of a conversation


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


def _limit_time(seconds: int) -> None:
    """Let the kernel end this process after `seconds` more of processor time."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    # The limit counts whole seconds since the process started, so it is raised for each request.
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + seconds + 1, hard_limit))


def _renderer(source: str) -> Callable[[dict[str, Any]], str]:
    template = environment().from_string(source)

    def render(variables: dict[str, Any]) -> str:
        if "strftime_now" in variables:
            # JSON has no functions: the date comes as text, and the template calls its `strftime`.
            variables["strftime_now"] = datetime.fromisoformat(variables["strftime_now"]).strftime
        return text(template, variables)

    return render


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


_KINDS: dict[str, Callable[[str], Callable[[Any], str]]] = {"template": _renderer, "tokenizer": _splitter}


def main(memory: int) -> None:
    """Answer requests until stdin ends; the first one names the kind and has the source that all of them use."""
    _limit_memory(memory)
    handler = None
    for line in sys.stdin.buffer:
        try:
            seconds, kind, source, value = json.loads(line)
            _limit_time(seconds)
            handler = handler or _KINDS[kind](source)
            answer: tuple[str, str] = handler(value), ""
        except MemoryError:
            answer = "", "out of memory"
        except BaseException as error:  # noqa: BLE001 - whatever it raises is its refusal; a panic of Rust is no Exception
            answer = "", (str(error) or type(error).__name__)[:1000]
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
