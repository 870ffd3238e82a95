"""TOML of any origin is parsed, or refused with a UsageError that names the reason."""

from __future__ import annotations

import tomllib

import pytest

from adapterhub_converters.containers import toml_file
from adapterhub_converters.errors import UsageError

PARTS = 32


@pytest.mark.parametrize(
    "text",
    [
        "", "a = 1\n[b.c]\nd = [1.5, {e = 'f'}]\n", f"{'.'.join('a' * PARTS)} = 1", f"[{'.'.join('a' * PARTS)}]",
        f'a = "{"." * 1000}"', f"a = '{'.' * 1000}'", f'a = """\n{"." * 1000}\n"{"." * 1000}\\""""',
        f"a = '''{'.' * 1000}'{'.' * 99}'''",
        f"# {'.' * 1000}\na = 1 # {'.' * 1000}", f'"{"." * 1000}" = 1', "a = [" + "1.5, " * 1000 + "]",
        "\n".join(f"a.b{n} = 1.5" for n in range(1000)), f'a = "\\"{"." * 100}"\nb = "\\\\"', "a = 1979-05-27T07:32:00.5Z",
    ],
)  # fmt: skip
def test_toml_means_what_it_means_to_others(text: str) -> None:
    assert toml_file.parse(text, "x") == tomllib.loads(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = \n", "Invalid value .at line 1"),
        ("a = 1\na = 2", "Cannot overwrite a value"),
        (f"\n[{'.'.join('a' * (PARTS + 1))}]", "a key of more than 32 parts .at line 2"),
        (f"[{'.'.join('a' * 200_000)}]", "a key of more than 32 parts"),
        (" . ".join(['"a"', "'b'"] * 50_000) + " = 1", "a key of more than 32 parts"),
        (f"a = {{ {'.'.join('a' * 200_000)} = 1 }}", "a key of more than 32 parts"),
        (f'a = """"{"." * 99}""""\n{"a." * 33}a = 1', "a key of more than 32 parts .at line 2"),
        ("a = " + "[" * 100_000, "nested more than 64 deep"),
        ("a = " + "[" * 70 + "]" * 70, "nested more than 64 deep"),
        ("a = " + "{a = " * 100_000, "nested more than 64 deep"),
        (f"[{'.'.join('a' * PARTS)}]\n{'.'.join('a' * PARTS)} = {{ a = {{ a = 1 }} }}", "nested more than 64 deep"),
        ("a = " + "1" * 5_000, "a number is too large"),
        ("a = 0x" + "f" * 5_000, "a number is too large"),
        ("a = 1e400", "1e400 is not a finite number"),
        ("a = [nan]", "nan is not a finite number"),
        ("a = -inf", "-inf is not a finite number"),
        ("\ufeffa = 1", "byte order mark"),
        ('a = "\\ud800"', "not a Unicode scalar value"),
        ("." * 300_000 + "'" * 300_000, "not valid TOML"),
        ('"""\\' * 200_000 + "." * 99, "not valid TOML"),
    ],
    ids=lambda text: text[:20],
)
def test_what_takes_long_or_cannot_be_passed_on_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"^x: not valid TOML .*{says}" if says != "not valid TOML" else says):
        toml_file.parse(text, "x")


def test_a_large_file_is_not_a_config_file() -> None:
    with pytest.raises(UsageError, match="more than 1048576 bytes"):
        toml_file.parse("#" * (1 << 20) + "\n", "x")
