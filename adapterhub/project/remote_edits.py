"""Changes of the remotes in the text of a settings file, which leave everything else in it as it is, comments included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from adapterhub_converters.containers import toml_file
from adapterhub_converters.errors import UsageError

from . import settings_file


def with_remote(text: str, name: str, url: str) -> str:
    """Return the TOML with one more remote at its end, or with another URL of an existing remote."""
    if name in toml_file.parse(text, "").get("remotes", {}):
        text = without_remote(text, name)
    block = f"[remotes.{name}]\nurl = {_toml_string(url)}\n"
    return f"{text.rstrip()}\n\n{block}" if text.strip() else block


def without_remote(text: str, name: str) -> str:
    """Return the TOML without one of its remotes."""
    lines = text.splitlines(keepends=True)
    start = toml_file.line_of(text, "remotes", name)
    remaining = lines[: start - 1] if start else lines
    if start:
        end = next((i for i in range(start, len(lines)) if toml_file.is_header(lines[i])), len(lines))
        while end > start and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")) and end < len(lines):
            end -= 1  # comments above the next table belong to it
        remaining = lines[: start - 1] + lines[end:]
        if end == len(lines):  # nothing follows the remote
            remaining[start - 1 :] = []
            while remaining and not remaining[-1].strip():
                remaining.pop()
    return "".join(remaining)


def with_default(text: str, name: str | None) -> str:
    """Return the TOML with another default remote, or without one, in its old place or above the first table."""
    lines, line_number = text.splitlines(keepends=True), toml_file.line_of(text, "", "remote")
    new = [f"remote = {_toml_string(name)}\n"] if name else []
    if line_number:
        return "".join([*lines[: line_number - 1], *new, *lines[line_number:]])
    if not new:
        return text
    # A key below a table's header would belong to that table.
    first = next((i for i, line in enumerate(lines) if toml_file.is_header(line)), len(lines))
    if lines[first:]:
        new.append("\n")
    elif lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    return "".join([*lines[:first], *new, *lines[first:]])


def with_changes(text: str, path: Path, *, remotes: Mapping[str, str], remote: str | None) -> str:
    """Return the TOML with these remotes and this default, and everything else unchanged.

    Raises:
        UsageError: The file is written in a way that cannot be edited automatically.
    """
    old = settings_file.parse(text, path)
    new = text
    for name in old.remotes.keys() - remotes.keys():
        new = without_remote(new, name)
    for name, url in remotes.items():
        if old.remotes.get(name) != url:
            new = with_remote(new, name, url)
    if old.remote != remote:
        new = with_default(new, remote)
    # Removing a table at the start leaves an empty line that was not there before.
    if not text.startswith("\n"):
        new = new.lstrip("\n")
    tables = {name: {"url": url} for name, url in remotes.items()}
    expected = {**toml_file.parse(text, str(path)), "remotes": tables, "remote": remote}
    try:
        result = toml_file.parse(new, str(path))
    except UsageError:
        result = {}
    # Compared as parsed, so that no spelling of TOML that the line edits misjudge is ever written.
    if {**result, "remotes": result.get("remotes", {}), "remote": result.get("remote")} != expected:
        raise UsageError(str(path), "is written in a way that cannot be edited automatically", "Edit it by hand")
    return new


def _toml_string(text: str) -> str:
    """Return a text as a TOML string."""
    return json.dumps(text, ensure_ascii=False)  # for printable text, a JSON string is a basic string of TOML as well
