"""The settings of a project and of a user, in TOML: the registry, the remotes, the policy on adapters, and how to check them.

The nearest `adapterhub.toml` above the working folder, the one in a registry's folder, and config.toml in the user's config
folder share one grammar. Of a registry's file only the policy and the requirements of tags are used, and of a user's everything
else. An unknown key is an error that names it, because a misspelled rule would silently have no effect.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from adapterhub import user_files
from adapterhub.digest import is_hex
from adapterhub.identity import LONGEST, Identity
from adapterhub.manifest.package_files import MAX_PATTERN, MAX_PATTERNS
from adapterhub.ref import LATEST, is_tag
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import toml_file
from adapterhub_converters.errors import UsageError
from adapterhub_converters.formats import FORMATS
from adapterhub_converters.lazy_dataclass import dataclass

from .policy import ATTESTATIONS, Bounds, Policy, SigningRule
from .tag_rules import CLEAN, TagRules, parse_duration

_TOP_KEYS = ("registry", "remote", "remotes", "policy", "promote", "validate")
_REMOTE = safe_regex.Pattern(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Validation:
    """How adapters of the project are checked by default.

    Attributes:
        base: The base model: a path from the file's folder, an address, or a name.
        runtimes: The runtimes that must apply them.
        ignore: Codes of problems to ignore.
    """

    base: str | None = None
    runtimes: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_rank: int | None = None
    strict: bool = False


@dataclass(frozen=True)
class SettingsFile:
    """The contents of a settings file.

    Attributes:
        registry: An absolute path.
        remote: The name of the default remote.
        remotes: URLs by name.
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
    document = _SettingsDocument(text, path)
    remotes = document.table("remotes")
    for name, entry in remotes.items():
        document.check(_REMOTE.fullmatch(name) and isinstance(entry, dict), "remotes", name, "is not a valid remote")
        document.check_keys(("remotes", name), ("url",))
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


_POLICY_RULES = (
    "max_rank", "require_base", "require_understood", "licenses", "allow", "signers", "bases", "formats", "max_size", "metrics",
    "attestations",
)  # fmt: skip


def _policy(document: _SettingsDocument, path: Path) -> Policy:
    """Return the policy in the table `policy`."""
    table, signers = "policy", ("policy", "signers")
    document.check_keys(table, _POLICY_RULES)
    bases, formats = document.texts(table, "bases"), document.texts(table, "formats")
    # What the rules cannot mean is an error here, not later: a wrong digest or format would just match nothing.
    are_digests = all(base.startswith("sha256:") and is_hex(base[7:]) for base in bases)
    document.check(are_digests, table, "bases", "is not a list of digests", "Write each as sha256: and 64 hexadecimal digits")
    are_known = {*FORMATS, "other"}.issuperset(formats)
    document.check(are_known, table, "formats", "has an unknown format", f"Known formats: {', '.join(FORMATS)}, other")
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
        promotions=tuple(_tag_rules(document, tag, path) for tag in document.patterns("promote")),
    )


def _bounds(document: _SettingsDocument, metric: str) -> Bounds:
    """Return the bounds of a metric, such as `{ min = 0.7 }`."""
    limits, table = document.table("policy", "metrics", metric), ("policy", "metrics", metric)
    document.check_keys(table, ("min", "max"))
    is_valid = limits and all(type(value) in (int, float) for value in limits.values())
    document.check(is_valid, table[:-1], metric, "is not a table of numbers", "Write it like { max = 12.5 }")
    return Bounds(metric, *(float(limits[key]) if key in limits else None for key in ("min", "max")))


def _attestations(document: _SettingsDocument, path: Path) -> Iterator[SigningRule]:
    """Yield the rules about attestations: for each pattern of names, kinds of attestations with the paths of keys."""
    for pattern in document.patterns(("policy", "attestations")):
        table = ("policy", "attestations", pattern)
        kinds = document.table(*table)
        document.check(kinds, table[:-1], pattern, "names no kind of attestation", f"Kinds: {', '.join(ATTESTATIONS)}")
        document.check_keys(table, ATTESTATIONS)
        for kind in kinds:
            yield SigningRule(pattern, document.signers(table, kind, path), kind, str(path))


_REQUIREMENTS = ("eval", "attestations", "signers", "approvals", "approvers", "from_others", "scan", "age")


def _tag_rules(document: _SettingsDocument, tag: str, path: Path) -> TagRules:
    """Return the table `promote.TAG`."""
    table, required = ("promote", tag), ("promote", tag, "require")
    document.check(is_tag(tag), "promote", tag, "is not a tag")
    document.check(tag != LATEST, "promote", tag, "is always the newest push, and has no requirements", "Choose another tag")
    document.check_keys(table, ("from", "require", "keep_previous"))
    document.check_keys(required, _REQUIREMENTS)
    requirements = document.table(*required)
    kinds = document.texts(required, "attestations")
    are_known = set(kinds) <= set(ATTESTATIONS)
    document.check(are_known, required, "attestations", "has an unknown kind", f"Kinds: {', '.join(ATTESTATIONS)}")
    signers, approvers = (
        document.signers(required, key, path) if key in requirements else () for key in ("signers", "approvers")
    )
    document.check(signers or not kinds, required, "attestations", "needs signers", "Name the accepted keys as signers")
    approvals, from_others = document.count(required, "approvals") or 0, document.switch(required, "from_others")
    document.check(approvals or not from_others, required, "from_others", "needs approvals", "Write approvals = 1 or more")
    document.check(approvals or not approvers, required, "approvers", "needs approvals", "Write approvals = 1 or more")
    source, scan, age = document.text(table, "from"), document.text(required, "scan"), document.text(required, "age")
    document.check(source is None or is_tag(source), table, "from", "is not a tag")
    document.check(source != tag, table, "from", "is the tag itself", "Name the tag that a version has before")
    document.check(scan in (None, CLEAN), required, "scan", f"is not {CLEAN!r}")
    seconds = parse_duration(age or "")
    document.check(age is None or seconds, required, "age", "is not a duration", 'Write it like "30m", "1h" or "7d"')
    return TagRules(
        tag,
        str(path),
        source=source or "",
        gates=tuple(_gates(document, required)),
        attestations=kinds,
        signers=signers,
        approvals=approvals,
        approvers=approvers,
        from_others=from_others,
        scan=scan or "",
        age=seconds,
        keep_previous=document.switch(table, "keep_previous"),
    )


def _gates(document: _SettingsDocument, required: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the gates of the table `eval`: the name of an evaluation with one bound, or a list of them."""
    table = (*required, "eval")
    for name in document.patterns(table):
        value = document.table(*table)[name]
        gates = [value] if isinstance(value, str) else value
        is_valid = isinstance(gates, list) and 0 < len(gates) <= MAX_PATTERNS
        is_valid = is_valid and all(
            isinstance(gate, str) and 0 < len(gate) <= MAX_PATTERN and gate.isprintable() for gate in gates
        )
        hint = 'Write it like { tests = "pass>=0.95", eval = ["ppl<12", "ppl/base<0.9"] }'
        document.check(is_valid, table, name, "is not a gate, or a list of them", hint)
        yield from ((name, gate) for gate in gates)


def _validation(document: _SettingsDocument) -> Validation:
    """Return the table `validate`."""
    document.check_keys("validate", ("base", "runtimes", "ignore", "max_rank", "strict"))
    return Validation(
        document.text("validate", "base"),
        document.texts("validate", "runtimes"),
        document.texts("validate", "ignore"),
        document.count("validate", "max_rank"),
        document.switch("validate", "strict"),
    )


Table = str | tuple[str, ...]
"""The name of a table, or its parts if one of them may contain a dot."""


class _SettingsDocument:
    """A TOML document whose errors name the line."""

    def __init__(self, text: str, path: Path) -> None:
        self._text, self._path = text, path
        self.document = toml_file.parse(text, str(path))
        self.check_keys("", _TOP_KEYS)

    def table(self, *name: str) -> dict[str, Any]:
        """Return a table, or an empty one if it is missing."""
        table = self.document
        for depth, part in enumerate(name):
            table = table.get(part, {})
            self.check(isinstance(table, dict), name[:depth], part, "is not a table")
        return table

    def check_keys(self, table: Table, keys: tuple[str, ...]) -> None:
        """Check that a table has no other keys than these."""
        for key in self.table(*_parts(table)):
            self.check(key in keys, table, key, "is unknown", f"Known keys: {', '.join(keys)}")

    def patterns(self, table: Table) -> list[str]:
        """Return the keys of a table that are names or patterns of names, of bounded length and number."""
        *above, name = _parts(table)
        patterns = list(self.table(*above, name))
        self.check(len(patterns) <= MAX_PATTERNS, tuple(above), name, f"has more than {MAX_PATTERNS} patterns")
        for pattern in patterns:
            self.check(0 < len(pattern) <= MAX_PATTERN, table, pattern, "is not a pattern of names")
        return patterns

    def text(self, table: Table, key: str, *, required: bool = False) -> str | None:
        """Return a string of one line; None if it is missing."""
        value = self.table(*_parts(table)).get(key)
        # One printable line, because these values appear in errors and tables.
        is_valid = (value is None and not required) or (isinstance(value, str) and value and value.isprintable())
        self.check(is_valid, table, key, "is missing" if value is None else "is not a string of one line")
        return value

    def texts(self, table: Table, key: str) -> tuple[str, ...]:
        """Return a list of strings; empty if it is missing."""
        rules = self.table(*_parts(table))
        value = rules.get(key, [])
        is_valid = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        self.check(is_valid and (value or key not in rules), table, key, "is not a list of strings")
        is_short = len(value) <= MAX_PATTERNS and all(len(item) <= MAX_PATTERN for item in value)
        limits = f"is not a list of at most {MAX_PATTERNS} strings of at most {MAX_PATTERN} characters"
        self.check(is_short, table, key, limits)
        return tuple(value)

    def signers(self, table: Table, key: str, file: Path) -> tuple[Path | Identity, ...]:
        """Return a list of keys and identities.

        A key is a path relative to the folder of `file`, which is made absolute; an identity is a table.
        """
        rules = self.table(*_parts(table))
        value = rules.get(key)
        is_valid = isinstance(value, list) and 0 < len(value) <= MAX_PATTERNS and all(map(_is_signer, value))
        hint = 'Write it like ["keys/team.pub", { identity = "name@example.com", issuer = "https://accounts.example.com" }]'
        self.check(is_valid, table, key, f"is not a list of at most {MAX_PATTERNS} paths of keys, and identities", hint)
        folder = file.absolute().parent
        signers: list[Path | Identity] = []
        for entry in value or ():
            if isinstance(entry, str):
                signers.append(folder / os.path.expanduser(entry))
            else:
                config = entry.get("trust_config")
                path = folder / os.path.expanduser(config) if config else None
                signers.append(Identity(entry["identity"], entry["issuer"], path))
        return tuple(signers)

    def count(self, table: Table, key: str) -> int | None:
        """Return a positive integer; None if it is missing."""
        value = self.table(*_parts(table)).get(key)
        self.check(value is None or (type(value) is int and value > 0), table, key, "is not a whole number above 0")
        return value

    def switch(self, table: Table, key: str) -> bool:
        """Return a boolean; False if it is missing."""
        value = self.table(*_parts(table)).get(key, False)
        self.check(type(value) is bool, table, key, "is neither true nor false")
        return bool(value)

    def check(self, is_valid: object, table: Table, key: str, problem: str, hint: str = "") -> None:
        """Raise UsageError, with the line of the key, unless `is_valid`."""
        if not is_valid:
            inside = ".".join(_parts(table))
            line = toml_file.line_of(self._text, inside, key)
            name = f"{inside}.{key}" if inside else key
            raise UsageError(
                f"{self._path}:{line}" if line else str(self._path), f"{name[:80]!r} {problem}", hint, code="invalid-config"
            )


def _is_signer(value: object) -> bool:
    """Return whether a value is a path, or an identity with its issuer."""
    if not isinstance(value, dict):
        return isinstance(value, str) and bool(value) and len(value) <= MAX_PATTERN and value.isprintable()
    has_known_keys = {"identity", "issuer"} <= value.keys() <= {"identity", "issuer", "trust_config"}
    return has_known_keys and all(
        isinstance(member, str) and 0 < len(member) <= LONGEST and member.isprintable() for member in value.values()
    )


def _parts(table: Table) -> tuple[str, ...]:
    """Return the parts of a table's name; the empty name is the top level."""
    return table if isinstance(table, tuple) else (table,) if table else ()


# --- changes that leave the remaining text alone


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
    old = parse(text, path)
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
    import json

    return json.dumps(text, ensure_ascii=False)  # for printable text, a JSON string is a basic string of TOML as well
