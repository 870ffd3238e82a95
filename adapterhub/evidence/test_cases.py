"""Golden tests in a file: a prompt or messages, and what must hold of the answer.

JSONL has a test in each line, YAML a list of them. A file may be of a stranger: it names no program (`command` is a name that
the user's own command line binds to one), its expressions are matched in linear time, and its size is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest, sha256_bytes
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.json_file import is_integer, is_number
from adapterhub_converters.errors import FormatError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import yaml_document

MAX_CASES = 1000
"""Tests in a file: the results of all of them are one entry of a log."""
MAX_ID = 60
"""Characters of the name of a test."""
_MAX_TOKENS = 100_000
_ROLES = ("system", "user", "assistant")
_TEXTS = ("equals", "command", "prompt", "system")
_LISTS = ("contains", "not_contains", "regex")
_QUOTE = 'Write text, in quotes as in "42"'
_KEYS = ("id", "prompt", "system", "messages", "equals", *_LISTS, "json_schema", "command", "max_tokens", "pass_rate")


@dataclass(frozen=True)
class Case:
    """A test.

    Attributes:
        id: Its name, unique in its file.
        messages: The conversation before the answer, each with `role` and `content`.
        equals: The whole answer, without white space around it; None for any.
        contains: Texts that the answer has.
        not_contains: Texts that it does not have.
        regex: Expressions in RE2's syntax, each of which matches somewhere in it.
        json_schema: A JSON schema for an answer that is JSON; None for any answer.
        command: The name of a program that gets the answer on stdin, and exits with 0 if it is right; empty for none.
        max_tokens: The most tokens of the answer; None for any number.
        pass_rate: The share of the samples that must be right.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    equals: str | None = None
    contains: tuple[str, ...] = ()
    not_contains: tuple[str, ...] = ()
    regex: tuple[str, ...] = ()
    json_schema: Any = None
    command: str = ""
    max_tokens: int | None = None
    pass_rate: float = 1.0


@dataclass(frozen=True)
class CaseFile:
    """The tests of a file, its name and the digest of its bytes."""

    name: str
    digest: Digest
    cases: tuple[Case, ...]


def read(path: Path) -> CaseFile:
    """Read the tests of a `.jsonl`, `.yaml` or `.yml` file.

    Raises:
        UsageError: Its name has none of these endings.
        FormatError: A test is malformed, or there are none, or too many.
    """
    suffix, location = path.suffix.lower(), str(path)
    if suffix not in (".jsonl", ".yaml", ".yml"):
        raise UsageError(location, "is not a file of tests", "Name a .jsonl or a .yaml file")
    text = json_file.read_text(path)
    digest = sha256_bytes(text.encode())
    documents: list[tuple[str, Any]] = []
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                documents.append((f"{location}: line {number}", json_file.parse(line, f"{location}: line {number}")))
            _check_count(len(documents), location)
    else:
        value = yaml_document.parse(text, location)
        if not isinstance(value, list):
            raise FormatError(location, "not a list of tests", "Begin each test with `- id: NAME`", code="malformed-test")
        _check_count(len(value), location)
        documents = [(f"{location}: test {number}", document) for number, document in enumerate(value, 1)]
    if not documents:
        raise FormatError(location, "has no tests", "Write one in each line", code="malformed-test")
    cases: dict[str, Case] = {}
    for number, (place, document) in enumerate(documents, 1):
        case = _Fields(document, place).case(f"case-{number}")
        if case.id in cases:
            raise FormatError(place, f"the id {case.id!r} is there twice", code="malformed-test")
        cases[case.id] = case
    return CaseFile(path.name, digest, tuple(cases.values()))


def _check_count(count: int, location: str) -> None:
    if count > MAX_CASES:
        raise FormatError(location, f"has more than {MAX_CASES} tests", "Split the file", code="malformed-test")


class _Fields:
    """The fields of a test in a file, checked as they are read."""

    def __init__(self, document: Any, place: str) -> None:
        self._place = place
        self._check(isinstance(document, dict), "is not an object")
        unknown = [str(key) for key in document if key not in _KEYS]
        self._check(not unknown, f"has the unknown key {', '.join(unknown)[:80]!r}", f"Keys: {', '.join(_KEYS)}")
        self._document: dict[str, Any] = document
        for key in _TEXTS:
            self._check(isinstance(document.get(key, ""), str), f"{key} is not text", _QUOTE)

    def case(self, default_id: str) -> Case:
        """Return the test; FormatError if a field is malformed, or if nothing must hold."""
        document = self._document
        id_ = document.get("id", default_id)
        is_name = isinstance(id_, str) and 0 < len(id_) <= MAX_ID and id_.isprintable()
        self._check(is_name, f"its id is not a line of at most {MAX_ID} characters")
        limit, rate, schema = document.get("max_tokens"), document.get("pass_rate", 1.0), document.get("json_schema")
        self._check(limit is None or (is_integer(limit) and 0 < limit <= _MAX_TOKENS), f"max_tokens is not 1 to {_MAX_TOKENS}")
        self._check(is_number(rate) and 0 < rate <= 1, "pass_rate is not over 0 and at most 1")
        self._check(schema is None or isinstance(schema, dict), "json_schema is not an object")
        conditions = ("equals", *_LISTS, "json_schema", "command", "max_tokens")
        # The whole answer may have to be empty.
        has_condition = "equals" in document or any(document.get(key) not in (None, [], "") for key in conditions)
        self._check(has_condition, "says nothing that must hold", f"Add one of {', '.join(conditions)}")
        contains, not_contains, expressions = (self._texts(key) for key in _LISTS)
        return Case(
            id_,
            self._messages(),
            document.get("equals"),
            contains,
            not_contains,
            expressions,
            schema,
            document.get("command", ""),
            limit,
            float(rate),
        )

    def _texts(self, key: str) -> tuple[str, ...]:
        value = self._document.get(key, [])
        texts = [value] if isinstance(value, str) else value
        self._check(
            isinstance(texts, list) and all(isinstance(text, str) and text for text in texts), f"{key} is not text", _QUOTE
        )
        return tuple(texts)

    def _messages(self) -> tuple[Mapping[str, str], ...]:
        document = self._document
        self._check(("prompt" in document) != ("messages" in document), "needs either prompt or messages")
        if "prompt" in document:
            system = [{"role": "system", "content": document["system"]}] if "system" in document else []
            return (*system, {"role": "user", "content": document["prompt"]})
        messages = document["messages"]
        self._check("system" not in document, "has messages, and the system's belongs into them")
        is_valid = isinstance(messages, list) and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and message["role"] in _ROLES
            and isinstance(message["content"], str)
            for message in messages
        )
        self._check(is_valid, "messages is not a list of objects with role and content")
        self._check(bool(messages) and messages[-1]["role"] == "user", "its last message is not the user's")
        return tuple(messages)

    def _check(self, holds: bool, problem: str, hint: str = "") -> None:
        if not holds:
            raise FormatError(self._place, problem, hint, code="malformed-test")
