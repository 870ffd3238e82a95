"""Values of a settings file are of the type that is read, and an error names the file, the line and the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.identity import Identity
from adapterhub.project.settings_document import SettingsDocument
from adapterhub_converters.errors import UsageError

ISSUER = "https://accounts.example.com"
TEXT = f"""name = "sql"
[limits]
count = 3
strict = true
licenses = ["MIT", "Apache-2.0"]
keys = ["keys/team.pub", {{ identity = "ana@example.com", issuer = "{ISSUER}" }}]
[require."team/*"]
count = 1
"""


def document(text: str = TEXT) -> SettingsDocument:
    return SettingsDocument(text, Path("team/adapterhub.toml"))


def test_each_type_is_read_and_has_a_value_where_it_is_missing() -> None:
    settings = document()
    assert (settings.text("", "name"), settings.text("", "none")) == ("sql", None)
    assert (settings.count("limits", "count"), settings.count("limits", "none")) == (3, None)
    assert (settings.switch("limits", "strict"), settings.switch("limits", "none")) == (True, False)
    assert (settings.texts("limits", "licenses"), settings.texts("limits", "none")) == (("MIT", "Apache-2.0"), ())
    assert settings.patterns("require") == ["team/*"]
    assert settings.count(("require", "team/*"), "count") == 1
    assert settings.table("none", "at", "all") == {}


def test_keys_are_relative_to_the_folder_of_the_file(tmp_path: Path) -> None:
    path, ana = document().signers("limits", "keys", tmp_path / "adapterhub.toml")
    assert (path, ana) == (tmp_path / "keys/team.pub", Identity("ana@example.com", ISSUER, None))


@pytest.mark.parametrize(
    ("text", "read", "problem"),
    [
        ("a = 1\nb = 2", lambda settings: settings.text("", "b"), ":2: 'b' is not a string of one line"),
        ('a = "x\\ny"', lambda settings: settings.text("", "a"), "is not a string of one line"),
        ("", lambda settings: settings.text("", "a", required=True), "'a' is missing"),
        ("[t]\na = true", lambda settings: settings.count("t", "a"), ":2: 't.a' is not a whole number above 0"),
        ("a = 0", lambda settings: settings.count("", "a"), "is not a whole number above 0"),
        ("a = 1", lambda settings: settings.switch("", "a"), "is neither true nor false"),
        ("a = []", lambda settings: settings.texts("", "a"), "is not a list of strings"),
        (f"a = ['{'x' * 5000}']", lambda settings: settings.texts("", "a"), "strings of at most"),
        ("a = 1", lambda settings: settings.table("a"), "'a' is not a table"),
        ("[t]\nb = 1", lambda settings: settings.check_keys("t", ("a",)), ":2: 't.b' is unknown"),
        ("a = [{ identity = 'x' }]", lambda settings: settings.signers("", "a", Path("f")), "is not a list of at most"),
    ],
)
def test_another_type_is_an_error_with_its_line(text: str, read: Callable[[SettingsDocument], object], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(document(text))
    assert str(caught.value).startswith("team/adapterhub.toml")
    assert problem in str(caught.value)
    assert caught.value.code == "invalid-config"
