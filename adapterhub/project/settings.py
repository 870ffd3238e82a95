"""The settings of a project and of a user, in TOML: the registry, the remotes, the policy on adapters, and how to check them.

The nearest `adapterhub.toml` above the working folder, the one in a registry's folder, and config.toml in the user's config
folder have one grammar; of a registry's only the policy is asked, and of a user's all but that. An unknown key is an error
that names it: a misspelled rule would have no effect.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub import user_files
from adapterhub.digest import is_hex
from adapterhub.identity import LONGEST, Identity
from adapterhub.manifest.package_files import MAX_PATTERN, MAX_PATTERNS
from adapterhub_converters import linear
from adapterhub_converters.containers import toml_file
from adapterhub_converters.errors import UsageError
from adapterhub_converters.formats import FORMATS

from .policy import ATTESTATIONS, Bounds, Policy, Signed

_TOP = ("registry", "remote", "remotes", "policy", "validate")
_REMOTE = linear.Pattern(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Validation:
    """How adapters of the project are checked, where nothing else is asked for.

    Attributes:
        base: The base model: a path from the file's folder, an address, or a name.
        runtimes: Those that must apply them.
        ignore: Codes of problems to ignore.
    """

    base: str | None = None
    runtimes: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_rank: int | None = None
    strict: bool = False


@dataclass(frozen=True)
class SettingsFile:
    """The contents of one of the files.

    Attributes:
        registry: An absolute path.
        remote: The name of the default remote.
        remotes: Name to URL.
    """

    path: Path
    registry: Path | None = None
    remote: str | None = None
    remotes: Mapping[str, str] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    validate: Validation = field(default_factory=Validation)


def read(path: Path, *, follow: bool = True) -> SettingsFile:
    """Read a file; a missing one is empty. UsageError names the invalid key and its line.

    `follow` is False for a project's file, which must not be a link.
    """
    return parse(user_files.read(path, follow=follow), path)


def parse(text: str, path: Path) -> SettingsFile:
    """Parse `text`, the contents of the file `path`."""
    document = _Checked(text, path)
    remotes = document.table("remotes")
    for name, entry in remotes.items():
        document.check(_REMOTE.fullmatch(name) and isinstance(entry, dict), "remotes", name, "is not a valid remote")
        document.known(("remotes", name), ("url",))
        document.text(("remotes", name), "url", required=True)
    registry = document.text("", "registry")
    return SettingsFile(
        path,
        path.absolute().parent / os.path.expanduser(registry) if registry else None,
        document.text("", "remote"),
        {name: entry["url"] for name, entry in remotes.items()},
        _policy(document, path),
        _validation(document),
    )


def check_remote_name(name: str) -> str:
    """Return `name` if it is a valid name of a remote."""
    if not _REMOTE.fullmatch(name):
        code = "ref-as-remote" if "/" in name else ""
        raise UsageError(name[:80], "is not a valid name of a remote", "Use A-Z a-z 0-9 _ -", code=code)
    return name


_RULES = (
    "max_rank", "require_base", "require_understood", "licenses", "allow", "signers", "bases", "formats", "max_size", "metrics",
    "attestations",
)  # fmt: skip


def _policy(document: _Checked, path: Path) -> Policy:
    table, signers = "policy", ("policy", "signers")
    document.known(table, _RULES)
    bases, formats = document.texts(table, "bases"), document.texts(table, "formats")
    digests = all(base.startswith("sha256:") and is_hex(base[7:]) for base in bases)
    document.check(digests, table, "bases", "is not a list of digests", "Write each as sha256: and 64 hexadecimal digits")
    named = {*FORMATS, "other"}.issuperset(formats)
    document.check(named, table, "formats", "has an unknown format", f"Known formats: {', '.join(FORMATS)}, other")
    return Policy(
        str(path),
        max_rank=document.count(table, "max_rank"),
        require_base=document.switch(table, "require_base"),
        licenses=document.texts(table, "licenses"),
        allow=document.texts(table, "allow"),
        require_understood=document.switch(table, "require_understood"),
        signers=tuple((pattern, document.signers(signers, pattern, path)) for pattern in document.patterns(signers)),
        bases=bases,
        formats=formats,
        max_size=document.count(table, "max_size"),
        metrics=tuple(_bounds(document, metric) for metric in document.patterns(("policy", "metrics"))),
        attestations=tuple(_attestations(document, path)),
    )


def _bounds(document: _Checked, metric: str) -> Bounds:
    """The bounds of a metric, such as `{ min = 0.7 }`."""
    found, table = document.table("policy", "metrics", metric), ("policy", "metrics", metric)
    document.known(table, ("min", "max"))
    right = found and all(type(value) in (int, float) for value in found.values())
    document.check(right, table[:-1], metric, "is not a table of numbers", "Write it like { max = 12.5 }")
    return Bounds(metric, *(float(found[key]) if key in found else None for key in ("min", "max")))


def _attestations(document: _Checked, path: Path) -> Iterator[Signed]:
    """What must be attested: for each pattern of names kinds of attestations, each with paths of keys."""
    for pattern in document.patterns(("policy", "attestations")):
        table = ("policy", "attestations", pattern)
        kinds = document.table(*table)
        document.check(kinds, table[:-1], pattern, "names no kind of attestation", f"Kinds: {', '.join(ATTESTATIONS)}")
        document.known(table, ATTESTATIONS)
        for kind in kinds:
            yield Signed(pattern, document.signers(table, kind, path), kind, str(path))


def _validation(document: _Checked) -> Validation:
    document.known("validate", ("base", "runtimes", "ignore", "max_rank", "strict"))
    return Validation(
        document.text("validate", "base"),
        document.texts("validate", "runtimes"),
        document.texts("validate", "ignore"),
        document.count("validate", "max_rank"),
        document.switch("validate", "strict"),
    )


Table = str | tuple[str, ...]
"""The name of a table; in parts, where one may have a dot."""


class _Checked:
    """A TOML document whose errors name the line."""

    def __init__(self, text: str, path: Path) -> None:
        self._text, self._path = text, path
        self.document = toml_file.parse(text, str(path))
        self.known("", _TOP)

    def table(self, *name: str) -> dict[str, Any]:
        found = self.document
        for depth, part in enumerate(name):
            found = found.get(part, {})
            self.check(isinstance(found, dict), name[:depth], part, "is not a table")
        return found

    def known(self, table: Table, keys: tuple[str, ...]) -> None:
        for key in self.table(*_parts(table)):
            self.check(key in keys, table, key, "is unknown", f"Known keys: {', '.join(keys)}")

    def patterns(self, table: Table) -> list[str]:
        """The keys of a table that are patterns of names, or names, of bounded length and number."""
        *above, name = _parts(table)
        found = list(self.table(*above, name))
        self.check(len(found) <= MAX_PATTERNS, tuple(above), name, f"has more than {MAX_PATTERNS} patterns")
        for pattern in found:
            self.check(0 < len(pattern) <= MAX_PATTERN, table, pattern, "is not a pattern of names")
        return found

    def text(self, table: Table, key: str, *, required: bool = False) -> str | None:
        value = self.table(*_parts(table)).get(key)
        right = (value is None and not required) or (isinstance(value, str) and value and value.isprintable())
        self.check(right, table, key, "is missing" if value is None else "is not a string of one line")
        return value

    def texts(self, table: Table, key: str) -> tuple[str, ...]:
        rules = self.table(*_parts(table))
        value = rules.get(key, [])
        right = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        self.check(right and (value or key not in rules), table, key, "is not a list of strings")
        short = len(value) <= MAX_PATTERNS and all(len(item) <= MAX_PATTERN for item in value)
        limits = f"is not a list of at most {MAX_PATTERNS} strings of at most {MAX_PATTERN} characters"
        self.check(short, table, key, limits)
        return tuple(value)

    def signers(self, table: Table, key: str, file: Path) -> tuple[Path | Identity, ...]:
        """A list of keys, by their paths from the folder of the file, made absolute, and of identities, which are tables."""
        rules = self.table(*_parts(table))
        value = rules.get(key)
        right = isinstance(value, list) and 0 < len(value) <= MAX_PATTERNS and all(map(_is_signer, value))
        hint = 'Write it like ["keys/team.pub", { identity = "name@example.com", issuer = "https://accounts.example.com" }]'
        self.check(right, table, key, f"is not a list of at most {MAX_PATTERNS} paths of keys, and identities", hint)
        folder = file.absolute().parent
        found: list[Path | Identity] = []
        for one in value or ():
            if isinstance(one, str):
                found.append(folder / os.path.expanduser(one))
            else:
                config = one.get("trust_config")
                path = folder / os.path.expanduser(config) if config else None
                found.append(Identity(one["identity"], one["issuer"], path))
        return tuple(found)

    def count(self, table: Table, key: str) -> int | None:
        value = self.table(*_parts(table)).get(key)
        self.check(value is None or (type(value) is int and value > 0), table, key, "is not a whole number above 0")
        return value

    def switch(self, table: Table, key: str) -> bool:
        value = self.table(*_parts(table)).get(key, False)
        self.check(type(value) is bool, table, key, "is neither true nor false")
        return bool(value)

    def check(self, right: object, table: Table, key: str, what: str, hint: str = "") -> None:
        if not right:
            inside = ".".join(_parts(table))
            line = toml_file.line_of(self._text, inside, key)
            name = f"{inside}.{key}" if inside else key
            raise UsageError(
                f"{self._path}:{line}" if line else str(self._path), f"{name[:80]!r} {what}", hint, code="invalid-config"
            )


def _is_signer(value: object) -> bool:
    """Tell whether a value is a path, or an identity with its issuer."""
    if not isinstance(value, dict):
        return isinstance(value, str) and bool(value) and len(value) <= MAX_PATTERN and value.isprintable()
    known = {"identity", "issuer"} <= value.keys() <= {"identity", "issuer", "trust_config"}
    return known and all(isinstance(one, str) and 0 < len(one) <= LONGEST and one.isprintable() for one in value.values())


def _parts(table: Table) -> tuple[str, ...]:
    return table if isinstance(table, tuple) else (table,) if table else ()


# --- changes that leave the rest of the text alone


def with_remote(text: str, name: str, url: str) -> str:
    """The TOML with one more remote, at its end, or with another URL of one."""
    if name in toml_file.parse(text, "").get("remotes", {}):
        text = without_remote(text, name)
    block = f"[remotes.{name}]\nurl = {_quoted(url)}\n"
    return f"{text.rstrip()}\n\n{block}" if text.strip() else block


def without_remote(text: str, name: str) -> str:
    """The TOML without one of its remotes."""
    lines = text.splitlines(keepends=True)
    start = toml_file.line_of(text, "remotes", name)
    kept = lines[: start - 1] if start else lines
    if start:
        end = next((i for i in range(start, len(lines)) if toml_file.is_header(lines[i])), len(lines))
        while end > start and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")) and end < len(lines):
            end -= 1  # comments above the next table belong to it
        kept = lines[: start - 1] + lines[end:]
        if end == len(lines):  # nothing is left after it
            kept[start - 1 :] = []
            while kept and not kept[-1].strip():
                kept.pop()
    return "".join(kept)


def with_default(text: str, name: str | None) -> str:
    """The TOML with another default remote, or without one, in its old place or above the first table."""
    lines, at = text.splitlines(keepends=True), toml_file.line_of(text, "", "remote")
    new = [f"remote = {_quoted(name)}\n"] if name else []
    if at:
        return "".join([*lines[: at - 1], *new, *lines[at:]])
    if not new:
        return text
    first = next((i for i, line in enumerate(lines) if toml_file.is_header(line)), len(lines))
    if lines[first:]:
        new.append("\n")
    elif lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    return "".join([*lines[:first], *new, *lines[first:]])


def changed(text: str, path: Path, *, remotes: Mapping[str, str], remote: str | None) -> str:
    """The TOML with these remotes and this default, and all else as it was; UsageError if it cannot be edited so."""
    old = parse(text, path)
    new = text
    for name in old.remotes.keys() - remotes.keys():
        new = without_remote(new, name)
    for name, url in remotes.items():
        if old.remotes.get(name) != url:
            new = with_remote(new, name, url)
    if old.remote != remote:
        new = with_default(new, remote)
    if not text.startswith("\n"):
        new = new.lstrip("\n")
    tables = {name: {"url": url} for name, url in remotes.items()}
    wanted = {**toml_file.parse(text, str(path)), "remotes": tables, "remote": remote}
    try:
        made = toml_file.parse(new, str(path))
    except UsageError:
        made = {}
    if {**made, "remotes": made.get("remotes", {}), "remote": made.get("remote")} != wanted:
        raise UsageError(str(path), "is written in a way that cannot be edited automatically", "Edit it by hand")
    return new


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)  # of printable text, a basic string of TOML as well
