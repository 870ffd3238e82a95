"""The settings of a project and of a user, in TOML: the registry, the remotes, the policy on adapters, and how to check them.

The nearest `adapterhub.toml` above the working folder, the one in a registry's folder, and config.toml in the user's config
folder share one grammar. Of a registry's file only the policy, the requirements of tags and `pack` are used, and of a user's
everything else. An unknown key is an error that names it, because a misspelled rule would silently have no effect.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path

from adapterhub import user_files
from adapterhub.digest import Digest, is_hex
from adapterhub.manifest.package_files import MAX_PATTERN, MAX_PATTERNS
from adapterhub.ref import LATEST, is_tag
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError
from adapterhub_converters.formats import FORMATS
from adapterhub_converters.lazy_dataclass import dataclass

from .policy import ATTESTATIONS, Policy, SigningRule
from .policy_rules import PARTS, AllowedBase, Bounds, EvaluationRule
from .settings_document import SettingsDocument
from .tag_rules import CLEAN, TagRules, parse_duration

_TOP_KEYS = ("registry", "remote", "remotes", "policy", "promote", "validate", "pack")
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
        pack: A gc packs the versions of the registry.
    """

    path: Path
    registry: Path | None = None
    remote: str | None = None
    remotes: Mapping[str, str] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    validate: Validation = field(default_factory=Validation)
    pack: bool = False


def read(path: Path, *, follow: bool = True) -> SettingsFile:
    """Read a file; a missing one is empty. UsageError names the invalid key and its line.

    `follow` is False for a project's file, which must not be a link.
    """
    return parse(user_files.read(path, follow=follow), path)


def parse(text: str, path: Path) -> SettingsFile:
    """Parse `text`, the contents of the file `path`."""
    document = SettingsDocument(text, path)
    document.check_keys("", _TOP_KEYS)
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
        document.switch("", "pack"),
    )


def check_remote_name(name: str) -> str:
    """Return `name` if it is a valid name of a remote."""
    if not _REMOTE.fullmatch(name):
        code = "ref-as-remote" if "/" in name else ""
        raise UsageError(name[:80], "is not a valid name of a remote", "Use A-Z a-z 0-9 _ -", code=code)
    return name


_POLICY_RULES = (
    "max_rank", "require_base", "require_understood", "licenses", "allow", "signers", "bases", "formats", "recorders",
    "max_size", "metrics", "attestations", "license_parts", "base_models", "data", "evaluations", "builders", "unexpired",
    "max_age", "scan",
)  # fmt: skip


def _policy(document: SettingsDocument, path: Path) -> Policy:
    """Return the policy in the table `policy`."""
    table, signers = "policy", ("policy", "signers")
    document.check_keys(table, _POLICY_RULES)
    # What the rules cannot mean is an error here, not later: a wrong digest or format would just match nothing.
    bases, formats = _digests(document, (table,), "bases"), document.texts(table, "formats")
    are_known = {*FORMATS, "other"}.issuperset(formats)
    document.check(are_known, table, "formats", "has an unknown format", f"Known formats: {', '.join(FORMATS)}, other")
    licenses, parts = document.texts(table, "licenses"), document.texts(table, "license_parts")
    document.check(set(PARTS).issuperset(parts), table, "license_parts", "has an unknown part", f"Parts: {', '.join(PARTS)}")
    document.check(licenses or not parts, table, "license_parts", "needs licenses", "Name the allowed licenses")
    scan, age = document.text(table, "scan"), document.text(table, "max_age")
    document.check(scan in (None, CLEAN), table, "scan", f"is not {CLEAN!r}")
    max_age = parse_duration(age or "")
    document.check(age is None or max_age, table, "max_age", "is not a duration", 'Write it like "90d"')
    builders = document.texts(table, "builders")
    if builders:
        _check_attested(document, (table,), "builders")
    evaluations = [_evaluation(document, metric, path) for metric in document.patterns(("policy", "evaluations"))]
    signing_rules = [*_attestations(document, path), *_joint_signers(document, path)]
    return Policy(
        str(path),
        max_rank=document.count(table, "max_rank"),
        require_base=document.switch(table, "require_base"),
        licenses=licenses,
        allow=document.texts(table, "allow"),
        require_understood=document.switch(table, "require_understood"),
        signers=tuple(
            (pattern, document.signers(signers, pattern, path))
            for pattern in document.patterns(signers)
            if not isinstance(document.table(*signers)[pattern], dict)
        ),
        bases=bases,
        formats=formats,
        recorders=document.texts(table, "recorders"),
        max_size=document.count(table, "max_size"),
        metrics=tuple(_bounds(document, ("policy", "metrics", metric)) for metric in document.patterns(("policy", "metrics"))),
        attestations=(*signing_rules, *(rule for rule in evaluations if isinstance(rule, SigningRule))),
        license_parts=parts,
        base_models=tuple(_allowed_base(document, repo) for repo in document.patterns(("policy", "base_models"))),
        data=document.texts(table, "data"),
        evaluations=tuple(rule for rule in evaluations if isinstance(rule, EvaluationRule)),
        builders=builders,
        unexpired=document.switch(table, "unexpired"),
        max_age=max_age,
        scan=scan or "",
        promotions=tuple(_tag_rules(document, tag, path) for tag in document.patterns("promote")),
    )


def _bounds(document: SettingsDocument, table: tuple[str, ...], *also: str) -> Bounds:
    """Return the bounds of the metric in a table such as `{ min = 0.7 }`, which may have the keys `also`."""
    document.check_keys(table, ("min", "max", "recorders", *also))
    limits = {key: value for key, value in document.table(*table).items() if key in ("min", "max")}
    is_valid = limits and all(type(value) in (int, float) for value in limits.values())
    document.check(is_valid, table[:-1], table[-1], "is not a table of numbers", "Write it like { max = 12.5 }")
    low, high = (float(limits[key]) if key in limits else None for key in ("min", "max"))
    return Bounds(table[-1], low, high, document.texts(table, "recorders"))


def _evaluation(document: SettingsDocument, metric: str, path: Path) -> EvaluationRule | SigningRule:
    """Return the table `policy.evaluations.METRIC`: a rule about a declared result, or about an attested one."""
    table = ("policy", "evaluations", metric)
    rule = EvaluationRule(_bounds(document, table, "data", "signers"), _digests(document, table, "data"))
    if "signers" not in document.table(*table):
        return rule
    document.check(not rule.bounds.recorders, table, "recorders", "is for results without signers", "Leave one of them out")
    return SigningRule("*", document.signers(table, "signers", path), "tests", str(path), evaluation=rule)


def _digests(document: SettingsDocument, table: tuple[str, ...], key: str) -> tuple[Digest, ...]:
    """Return a list of digests; empty if it is missing."""
    digests = document.texts(table, key)
    are_digests = all(digest.startswith("sha256:") and is_hex(digest[7:]) for digest in digests)
    document.check(are_digests, table, key, "is not a list of digests", "Write each as sha256: and 64 hexadecimal digits")
    return digests


def _allowed_base(document: SettingsDocument, repo: str) -> AllowedBase:
    """Return the table `policy.base_models.REPO`."""
    table = ("policy", "base_models", repo)
    document.check_keys(table, ("revisions", "weights", "license"))
    weights = _digests(document, table, "weights")
    if weights:
        _check_attested(document, table, "weights")
    return AllowedBase(repo, document.texts(table, "revisions"), weights, document.text(table, "license") or "")


def _check_attested(document: SettingsDocument, table: tuple[str, ...], key: str) -> None:
    """Raise UsageError for a rule about a training that not every training must be attested for.

    What adapter.json records can be written by hand; an attestation is signed by somebody whom the policy accepts.
    """
    all_attested = document.document["policy"].get("attestations", {})
    is_attested = isinstance(all_attested, dict) and "training" in (all_attested.get("*") or ())
    problem, hint = "needs an attestation of the training of every name", 'Require training in [policy.attestations."*"]'
    document.check(is_attested, table, key, problem, hint)


def _joint_signers(document: SettingsDocument, path: Path) -> Iterator[SigningRule]:
    """Yield the rules about several signers, such as `"team/*" = { of = ["ana", "ben", "eva"], at_least = 2 }`."""
    above = ("policy", "signers")
    for pattern in document.patterns(above):
        if not isinstance(document.table(*above)[pattern], dict):
            continue
        table = (*above, pattern)
        document.check_keys(table, ("of", "at_least"))
        people, least = document.signers(table, "of", path), document.count(table, "at_least")
        is_possible = least is not None and least <= len(set(people))
        document.check(is_possible, table, "at_least", f"is not a number of the {len(set(people))} signers")
        yield SigningRule(pattern, people, "", str(path), least or 1)


def _attestations(document: SettingsDocument, path: Path) -> Iterator[SigningRule]:
    """Yield the rules about attestations: for each pattern of names, kinds of attestations with the paths of keys."""
    for pattern in document.patterns(("policy", "attestations")):
        table = ("policy", "attestations", pattern)
        kinds = document.table(*table)
        document.check(kinds, table[:-1], pattern, "names no kind of attestation", f"Kinds: {', '.join(ATTESTATIONS)}")
        document.check_keys(table, ATTESTATIONS)
        for kind in kinds:
            yield SigningRule(pattern, document.signers(table, kind, path), kind, str(path))


_REQUIREMENTS = ("eval", "attestations", "signers", "approvals", "approvers", "from_others", "scan", "age")


def _tag_rules(document: SettingsDocument, tag: str, path: Path) -> TagRules:
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


def _gates(document: SettingsDocument, required: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the gates of the table `eval`: the name of an evaluation with one bound, or a list of them."""
    table = (*required, "eval")
    hint = 'Write it like { tests = "pass>=0.95", eval = ["ppl<12", "ppl/base<0.9"] }'
    document.check(isinstance(document.table(*required).get("eval", {}), dict), required, "eval", "is not a table", hint)
    for name in document.patterns(table):
        value = document.table(*table)[name]
        gates = [value] if isinstance(value, str) else value
        is_valid = isinstance(gates, list) and 0 < len(gates) <= MAX_PATTERNS
        is_valid = is_valid and all(
            isinstance(gate, str) and 0 < len(gate) <= MAX_PATTERN and gate.isprintable() for gate in gates
        )
        document.check(is_valid, table, name, "is not a gate, or a list of them", hint)
        yield from ((name, gate) for gate in gates)


def _validation(document: SettingsDocument) -> Validation:
    """Return the table `validate`."""
    document.check_keys("validate", ("base", "runtimes", "ignore", "max_rank", "strict"))
    return Validation(
        document.text("validate", "base"),
        document.texts("validate", "runtimes"),
        document.texts("validate", "ignore"),
        document.count("validate", "max_rank"),
        document.switch("validate", "strict"),
    )
