"""JSON of any origin is parsed, or refused with a FormatError that names the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

MAX_DEPTH = json_file.MAX_DEPTH


@pytest.mark.parametrize(
    "text",
    [
        "{}", '{"a": [1, 2.5, -3, true, null, "é", "\\ud83d\\ude00", "\\\\ud800"]}', "[" * MAX_DEPTH + "]" * MAX_DEPTH,
        "1" + "0" * 307, "-1" + "0" * 307, "1e308", '"text"', "0." + "1" * 10_000, ' {"a" : 1}\n',
    ],
)  # fmt: skip
def test_json_means_what_it_means_to_others(text: str) -> None:
    assert json_file.parse(text, "x") == json_file.parse(text.encode(), "x") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value: line 1"),
        ('{"a": 1,\n"b": }', "line 2 column 6"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 64 deep"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested more than 64 deep"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 100_000, "nested more than 64 deep"),
        ("[1" + "0" * 308 + "]", "a number is too large"),
        ("-1" + "0" * 5_000, "a number is too large"),
        ("1" * 1_000_000, "a number is too large"),
        ("1e309", "1e309 is too large"),
        ("[NaN]", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        ('"\\ud800"', "surrogates not allowed"),
        ('[{"\\udc00\\ud800": 1}]', "surrogates not allowed"),
        ("\ufeff{}", "byte order mark"),
        ("{}{}", "Extra data"),
        ('"a\nb"', "Invalid control character"),
    ],
)
def test_what_only_some_programs_accept_is_refused(text: str, says: str) -> None:
    with pytest.raises(FormatError, match=f"^x: not valid JSON .*{says}"):
        json_file.parse(text, "x")


@pytest.mark.parametrize("raw", ['{"a": "ä"}'.encode("latin-1"), "{}".encode("utf-16"), b'"\xed\xa0\x80"', b'"\xc0\x80"'])
def test_bytes_that_are_not_utf_8_are_refused(raw: bytes) -> None:
    with pytest.raises(FormatError, match="not UTF-8"):
        json_file.parse(raw, "x")


def test_the_last_of_many_keys_is_found_to_be_the_first_again() -> None:
    keys = [*(f"k{n}" for n in range(200_000)), "k0"]
    with pytest.raises(ValueError, match="duplicate key 'k0'"):
        json_file.dict_without_duplicates([(key, None) for key in keys])


@pytest.mark.parametrize(
    "item", ["{}", "[]", '{"a":1}', '""', "1e5", "[[[[1]]]]", '{"a":{"a":{}}}', '"ab"'], ids=lambda item: item.replace('"', "")
)
def test_values_that_take_many_times_their_bytes_are_counted_before_they_are_made(item: str) -> None:
    text = f"[{','.join([item] * (250_000 // len(item)))}]"
    with pytest.raises(FormatError, match="x: has too many values: they would take over 2 MiB of memory"):
        json_file.parse(text, "x", memory=2 << 20)
    assert json_file.parse(text, "x")


def test_long_texts_are_not_many_values() -> None:
    document = {
        "template": "a {{ b }} " * 100_000,
        "weights": {f"model.layers.{n}.mlp.weight": "model.safetensors" for n in range(9)},
    }
    assert json_file.parse_object(json.dumps(document), "x", memory=32 << 20) == document


def test_memory_that_the_machine_does_not_have_is_no_defect_of_the_document() -> None:
    code = """
import resource
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import LocalIOError
text = "[" + "[]," * 4_000_000 + "[]]"
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    json_file.parse(text, "data.jsonl", memory=None)
except LocalIOError as error:
    print(error.code, error)
"""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=False)
    says = "out-of-memory data.jsonl: needs more memory than is free. Close other programs, or split the file\n"
    assert (result.stdout, result.stderr) == (says, "")


def test_a_document_without_an_object_is_not_an_object() -> None:
    with pytest.raises(FormatError, match="x: not a JSON object"):
        json_file.parse_object("[]", "x")


@pytest.mark.parametrize(
    ("value", "number", "integer"), [(1, True, True), (0.5, True, False), (True, False, False), ("1", False, False)]
)
def test_true_is_no_number(value: object, number: bool, integer: bool) -> None:
    assert (json_file.is_number(value), json_file.is_integer(value)) == (number, integer)


@pytest.mark.parametrize(
    ("raw", "document"),
    [
        (b'{"a": "\xc3\xa9\\n", "b": [1, null]}', {"a": "é\n", "b": [1, None]}),
        (b'{"a": "\\u00e9"}', None),
        (b'{"a": NaN}', None),
        (b'{"a": "\xff"}', None),
        (b"[1]", None),
        (b'{"a": 1', None),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", None),
        (b'{"a": "' + b"x" * (1 << 16) + b'"}', None),
    ],
)
def test_only_a_short_and_plain_object_is_parsed_the_short_way(raw: bytes, document: object) -> None:
    assert json_file.parse_plain_object(raw) == document
