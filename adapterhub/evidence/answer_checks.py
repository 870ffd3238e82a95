"""What must hold of an answer, checked in time that neither the answer nor the file of tests can stretch.

Expressions are RE2's. A JSON schema is checked by jsonschema without what takes more than linear time or a network: its
patterns are RE2's too, references stay in the document and are followed a bounded number of times, and what needs Python's `re`
or compares every item with every other is refused.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, LocalIOError, UsageError

from .test_cases import Case

Commands = Mapping[str, Sequence[str]]
"""The programs that the user's command line names, by the names that files of tests use."""
_COMMAND_SECONDS = 60.0
_MAX_JSON = 100_000  # characters of an answer that a schema is applied to
_MAX_REFERENCES = 10_000  # followed for one answer
_REFUSED_KEYWORDS = ("patternProperties", "uniqueItems", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$id")


def check_case(case: Case, location: str, commands: Commands) -> None:
    """Raise for a test that could not be checked: before any answer is computed, which takes minutes.

    Raises:
        FormatError: An expression or a schema is invalid, or needs what is refused here.
        UsageError: The test names a program that the command line does not.
    """
    place = f"{location}: {case.id}"
    for expression in case.regex:
        _search(expression, "", place)
    if case.json_schema is not None:
        _check_schema(case.json_schema, place)
    if case.command and case.command not in commands:
        problem = f"needs the program {case.command[:60]!r}, which this command line does not name"
        raise UsageError(place, problem, code="command-not-allowed", name=case.command[:60])


def failure(case: Case, answer: str, *, is_complete: bool, commands: Commands) -> str:
    """Return what does not hold of an answer, in a line; empty if all of it holds.

    Args:
        case: The test.
        answer: The text.
        is_complete: The answer ended by itself, within the tokens that it was allowed.
        commands: The programs by name.
    """
    problems = _problems(case, answer, is_complete=is_complete, commands=commands)
    return next((problem for problem in problems if problem), "")


def _problems(case: Case, answer: str, *, is_complete: bool, commands: Commands) -> Iterator[str]:
    """Yield what does not hold, or an empty text for what does; a program is last, because it takes longest."""
    if case.max_tokens is not None and not is_complete:
        yield f"does not end within {case.max_tokens} tokens"
    if case.equals is not None and answer.strip() != case.equals.strip():
        yield f"is {_quote(answer.strip())}, not {_quote(case.equals.strip())}"
    yield from (f"lacks {_quote(text)}" for text in case.contains if text not in answer)
    yield from (f"has {_quote(text)}" for text in case.not_contains if text in answer)
    for expression in case.regex:
        yield "" if _search(expression, answer, case.id) else f"does not match {_quote(expression)}"
    if case.json_schema is not None:
        yield _schema_problem(case.json_schema, answer)
    if case.command:
        yield _command_problem(case.command, answer, commands)


def _quote(text: str) -> str:
    return repr(text[:60] + "…" * (len(text) > 60))


def _search(expression: str, text: str, place: str) -> bool:
    import re2

    try:
        return safe_regex.Pattern(expression).search(text) is not None
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else error
        problem = f"the expression {_quote(expression)} is not valid ({reason})"
        raise FormatError(place, problem, code="malformed-test") from error


def _command_problem(name: str, answer: str, commands: Commands) -> str:
    words = commands[name]
    try:
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.run(words, input=answer.encode(errors="replace"), timeout=_COMMAND_SECONDS, check=False, **quiet)
    except subprocess.TimeoutExpired:
        return f"{name} takes longer than {_COMMAND_SECONDS:.0f} seconds"
    except OSError as error:
        raise LocalIOError(words[0], (error.strerror or str(error)).lower(), code="command-failed") from error
    return f"{name} exits with {process.returncode}" if process.returncode else ""


# ---- JSON schemas


def _check_schema(schema: Any, place: str) -> None:
    import jsonschema

    for key, value in _keywords(schema):
        if key in _REFUSED_KEYWORDS:
            raise FormatError(place, f"json_schema has {key}, which is not supported here", code="malformed-test")
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise FormatError(place, "json_schema refers to another document", "Copy it into $defs", code="malformed-test")
        if key == "pattern" and isinstance(value, str):
            _search(value, "", place)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.exceptions.SchemaError as error:
        raise FormatError(place, f"json_schema is not valid ({error.message[:100]})", code="malformed-test") from error


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key of a document with its value, also of what is only an example: refusing too much is safe."""
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _schema_problem(schema: Any, answer: str) -> str:
    import jsonschema
    import referencing.exceptions

    if len(answer) > _MAX_JSON:
        return f"has over {_MAX_JSON:,} characters, too many for a schema"
    try:
        document = json_file.parse(answer.strip(), "the answer")
        error = next(_bounded_validator()(schema).iter_errors(document), None)
    except FormatError as problem:
        return f"is {problem.what}" if problem.where else problem.what
    except (RecursionError, referencing.exceptions.Unresolvable, jsonschema.exceptions._WrappedReferencingError):
        return "cannot be compared with its schema: a reference leads nowhere, or in a circle"
    if error is None:
        return ""
    path = "".join(f"[{part!r}]" for part in error.absolute_path)
    return f"does not fit its schema{f' at {path[:60]}' if path else ''}: {error.message[:100]}"


def _bounded_validator() -> Any:
    """Return a validator whose patterns are RE2's, and that follows a bounded number of references."""
    import jsonschema
    from jsonschema import validators

    references = 0

    def pattern(_validator: Any, expression: Any, instance: Any, _schema: Any) -> Iterator[Any]:
        if isinstance(instance, str) and not safe_regex.Pattern(expression).search(instance):
            yield jsonschema.ValidationError(f"{_quote(instance)} does not match {_quote(expression)}")

    def reference(validator: Any, target: Any, instance: Any, schema: Any) -> Iterator[Any]:
        nonlocal references
        references += 1
        if references > _MAX_REFERENCES:
            raise FormatError("", "cannot be compared with its schema: it follows too many references")
        yield from jsonschema.Draft202012Validator.VALIDATORS["$ref"](validator, target, instance, schema)

    return validators.extend(jsonschema.Draft202012Validator, {"pattern": pattern, "$ref": reference})
