"""The policy of a project, a registry or a hub: which names, adapters, bases, signers and attestations it allows.

It checks names and manifests (adapter.json) and lists the keys that must have signed; it knows nothing of protocols and opens
no files. Every reason it gives names the rule, and the file that has it. `adapterhub/operations/policy_checks.py` applies it to
versions.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest import licensing
from adapterhub.manifest.package_files import shorten_names
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import policy_rules
from .policy_rules import ACCOUNT, NO_FACTS, OWNER, AllowedBase, Bounds, EvaluationRule, RuleCheck, VersionFacts
from .tag_rules import TagRules

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.identity import Identity
    from adapterhub.manifest.document import AdapterManifest, Training

CODE = "against-policy"
"""The code of the error for an adapter that a policy forbids."""
ATTESTATIONS = ("fits", "merge", "training", "tests", "scan", "bill")
"""The kinds of attestations that can be required, as in `adapterhub.trust.attestation`."""


@dataclass(frozen=True, slots=True)
class SigningRule:
    """A rule about who must have signed the adapters whose names match a pattern (`fnmatch`).

    Attributes:
        pattern: A pattern of names of refs, or of whole addresses.
        keys: Files or folders of public keys, and identities; a signature by one of them is enough.
        attestation: The required kind of attestation, of `ATTESTATIONS`; empty for a signature of the files themselves.
        file: The file that has the rule.
        least: How many of `keys` must have signed it. Each file, folder or identity is one person, however many keys are in it.
        evaluation: What the attested tests must have measured; None for any tests.
    """

    pattern: str
    keys: tuple[Path | Identity, ...]
    attestation: str = ""
    file: str = ""
    least: int = 1
    evaluation: EvaluationRule | None = None

    @property
    def rule(self) -> str:
        """The key of the rule in the file."""
        if self.evaluation is not None:
            return self.evaluation.rule
        return f"attestations.{self.pattern}.{self.attestation}" if self.attestation else f"signers.{self.pattern}"


@dataclass(frozen=True, slots=True)
class Policy:
    """Requirements on adapters; None and empty values require nothing.

    Attributes:
        where: The file that sets them, for errors.
        max_rank: The largest allowed rank of any module.
        require_base: The base model must be pinned by its fingerprint.
        licenses: The allowed licenses, as SPDX identifiers in any case: of a choice (`MIT OR Apache-2.0`) one must be allowed.
        allow: Patterns (`fnmatch`) of allowed names of refs, or of whole addresses.
        require_understood: The kind of adapter must be one that can be checked.
        signers: Patterns like those of `allow`, each with files or folders of public keys, and identities: for every pattern
            that its name matches, an adapter must have been signed by one of these.
        bases: The allowed base models, each by its fingerprint, or by the digests of all its weight files.
        formats: The allowed formats.
        recorders: Who may have recorded a training, such as `trainer`; a version without a training has no record to forge.
        max_size: The largest number of bytes of its files, without adapter.json.
        metrics: Bounds of measurements, under the names that a search uses.
        attestations: Required attestations, by patterns and keys like those of `signers`; also rules about several signers.
        license_parts: Parts of `policy_rules.PARTS`, which must have an allowed license too.
        base_models: The allowed base models by their names.
        data: Digests of allowed training data, or patterns of names and addresses.
        evaluations: Results that must be recorded, or declared in adapter.json.
        builders: The builders, one of which an attestation of a training must name.
        unexpired: The day on which adapter.json says that it expires must be in the future, and so must those of its parents.
        max_age: The largest number of seconds since its training or its release.
        scan: `clean`, or empty.
        promotions: Requirements on the versions that tags are moved to.
        also: More policies that must be met.

    Example:
        >>> Policy("adapterhub.toml", max_rank=2).check_manifest(AdapterManifest.salvage({"r": 4}), "./sql")
        Traceback (most recent call last):
            ...
        adapterhub_converters.errors.RefusedError: ./sql: against the policy of adapterhub.toml: max_rank: rank 4 is over 2
    """

    where: str = ""
    max_rank: int | None = None
    require_base: bool = False
    licenses: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    require_understood: bool = False
    signers: tuple[tuple[str, tuple[Path | Identity, ...]], ...] = ()
    bases: tuple[Digest, ...] = ()
    formats: tuple[str, ...] = ()
    recorders: tuple[str, ...] = ()
    max_size: int | None = None
    metrics: tuple[Bounds, ...] = ()
    attestations: tuple[SigningRule, ...] = ()
    promotions: tuple[TagRules, ...] = ()
    also: tuple[Policy, ...] = ()
    license_parts: tuple[str, ...] = ()
    base_models: tuple[AllowedBase, ...] = ()
    data: tuple[str, ...] = ()
    evaluations: tuple[EvaluationRule, ...] = ()
    builders: tuple[str, ...] = ()
    unexpired: bool = False
    max_age: int = 0
    scan: str = ""

    @property
    def needs_manifest(self) -> bool:
        """Whether a manifest is needed, because a name and signatures alone cannot decide."""
        return any(
            policy.max_rank is not None
            or policy.max_size is not None
            or policy.require_base
            or policy.require_understood
            or policy.unexpired
            or bool(policy.licenses or policy.bases or policy.formats or policy.recorders or policy.metrics)
            or bool(policy.base_models or policy.data or policy.evaluations or policy.max_age or policy.scan)
            for policy in self._policies
        )

    @property
    def needs_license(self) -> bool:
        """Whether any policy restricts licenses."""
        return any(policy.licenses for policy in self._policies)

    def check_name(self, name: str) -> None:
        """Raise RefusedError if `name`, of a ref or a whole address, matches no pattern of `allow`."""
        for policy in self._policies:
            if policy.allow and not any(fnmatchcase(name, pattern) for pattern in policy.allow):
                problem, hint = f"not a name that {policy.where} allows", f"Its rule allow has {shorten_names(policy.allow)}"
                raise RefusedError(name, problem, hint, code=CODE)

    def signing_rules(self, name: str) -> list[SigningRule]:
        """Return the rules about signatures that apply to this name, those about files first."""
        rules: list[SigningRule] = []
        for policy in self._policies:
            file_rules = [SigningRule(pattern, keys, "", policy.where) for pattern, keys in policy.signers]
            rules += [rule for rule in (*file_rules, *policy.attestations) if fnmatchcase(name, rule.pattern)]
        return sorted(rules, key=lambda rule: bool(rule.attestation))

    def tag_rules(self, tag: str) -> list[TagRules]:
        """Return the requirements of each policy on a tag."""
        return [rules for policy in self._policies for rules in policy.promotions if rules.tag == tag]

    def gated_tags(self) -> set[str]:
        """Return the tags that have requirements."""
        return {rules.tag for policy in self._policies for rules in policy.promotions}

    def base_digests(self) -> list[tuple[Digest, ...]]:
        """Return the base digests that each policy allows, for the policies that restrict them."""
        return [policy.bases for policy in self._policies if policy.bases]

    def name_checks(self, name: str) -> list[RuleCheck]:
        """Return the rules about names beside the name of a ref or a whole address."""
        return [
            RuleCheck(
                policy.where,
                "allow",
                name,
                "" if any(fnmatchcase(name, pattern) for pattern in policy.allow) else "matches no pattern",
            )
            for policy in self._policies
            if policy.allow
        ]

    def base_violation(self, repo: str | None, revision: str | None, weights: Collection[Digest]) -> str:
        """Return what is wrong with the base of a training, which a signed claim names; empty if nothing is."""
        checks = (
            policy_rules.base_violation(repo, revision, weights, policy.base_models)
            for policy in self._policies
            if policy.base_models
        )
        return next(filter(None, checks), "")

    def builder_violation(self, builder: str) -> str:
        """Return what is wrong with the builder that a signed claim about a training names; empty if nothing is."""
        is_allowed = all(builder in policy.builders for policy in self._policies if policy.builders)
        return "" if is_allowed else f"names the builder {builder[:120] or 'of nothing'}, which is not allowed"

    def check_manifest(self, manifest: AdapterManifest, location: str, facts: VersionFacts = NO_FACTS) -> None:
        """Check an adapter.json against the requirements.

        Args:
            manifest: The adapter.json.
            location: The name of the adapter, for errors.
            facts: What else is asked about the version.

        Raises:
            RefusedError: With every requirement of a policy that the adapter does not meet.
        """
        for policy in self._policies:
            checks = policy._checks(manifest, facts)
            if reasons := [f"{check.rule}: {check.problem}" for check in checks if check.problem]:
                raise refusal(location, policy.where, reasons)

    def manifest_checks(self, manifest: AdapterManifest, facts: VersionFacts = NO_FACTS) -> list[RuleCheck]:
        """Return every rule about the content of a version beside what the version has."""
        return [check for policy in self._policies for check in policy._checks(manifest, facts)]

    @property
    def _policies(self) -> Iterator[Policy]:
        """This policy and all that must be met with it."""
        yield self
        for policy in self.also:
            yield from policy._policies

    def _checks(self, manifest: AdapterManifest, facts: VersionFacts) -> Iterator[RuleCheck]:
        """Yield the rules of this policy alone beside what a version has."""
        origin = policy_rules.origin_of(manifest, facts.read_parent)
        for rule, value, problem in (
            *self._form_checks(manifest, facts),
            *self._base_checks(manifest, origin),
            *self._license_checks(manifest, facts),
            *self._record_checks(manifest, origin, facts),
            *self._time_checks(manifest, origin, facts),
        ):
            yield RuleCheck(self.where, rule, value, problem)

    def _form_checks(self, manifest: AdapterManifest, facts: VersionFacts) -> Iterator[tuple[str, str, str]]:
        """Yield the rules about the files: the key, what they are, and what is wrong with that."""
        reason = f"({manifest.reason})"
        if self.max_rank is not None:
            # An adapter of unknown kind has no rank that could be compared, so the rule cannot be met.
            if manifest.understood is False:
                problem = f"its rank cannot be compared with {self.max_rank}, because it is not understood {reason}"
            else:
                problem = f"rank {manifest.max_rank} is over {self.max_rank}" if manifest.max_rank > self.max_rank else ""
            yield "max_rank", f"rank {manifest.max_rank}", problem
        if self.require_understood:
            is_known = manifest.understood is not False
            yield "require_understood", manifest.method, "" if is_known else f"it is not understood {reason}"
        if self.formats:
            is_allowed = manifest.format in self.formats
            problem = "" if is_allowed else f"its format is {manifest.format}, not {' or '.join(self.formats)}"
            yield "formats", manifest.format, problem
        if self.max_size is not None:
            size = sum(file.size for file in manifest.files) if facts.size is None else facts.size
            yield "max_size", f"{size:,} bytes", f"{size:,} bytes are over {self.max_size:,}" if size > self.max_size else ""
        if self.scan:
            # Without the files at hand nothing is known of them, and the rule cannot be met.
            finding = facts.find_problem() if facts.find_problem else "its files are not at hand"
            yield "scan", finding or self.scan, finding

    def _base_checks(self, manifest: AdapterManifest, origin: AdapterManifest) -> Iterator[tuple[str, str, str]]:
        """Yield the rules about the base model; `origin` has the record of the training."""
        base, fingerprint = manifest.base, manifest.base.fingerprint
        value = f"{base.repo or 'its base'} ({fingerprint[:19]}…)" if fingerprint else "not pinned"
        if self.require_base:
            yield "require_base", value, "" if fingerprint else "its base is not pinned; push it with its base"
        if self.bases:
            subject = f"{value} is" if fingerprint else "its base is not pinned, and thus"
            problem = f"{subject} not one of the {len(self.bases)} digests that are allowed"
            yield "bases", value, "" if _has_base(manifest, self.bases) else problem
        if self.base_models:
            weights = policy_rules.trained_weights(origin)
            problem = policy_rules.base_violation(base.repo, base.revision, weights, self.base_models)
            name = f"{base.repo or 'without a name'}{f'@{base.revision}' if base.revision else ''}"
            yield "base_models", name, f"its base is {problem}" if problem else ""

    def _license_checks(self, manifest: AdapterManifest, facts: VersionFacts) -> Iterator[tuple[str, str, str]]:
        """Yield the rules about licenses, of the adapter and of its parts."""
        if not self.licenses:
            return
        license_, allowed = manifest.license or "not declared", " or ".join(self.licenses)
        is_permitted = licensing.permits(manifest.license, self.licenses)
        yield "licenses", license_, "" if is_permitted else f"its license is {license_}, not {allowed}"
        for name, part_license in policy_rules.part_licenses(manifest, self.license_parts, self.base_models, facts):
            problem = policy_rules.license_violation(name, part_license, self.licenses)
            yield "license_parts", f"{name}: {part_license or 'not recorded'}", problem

    def _record_checks(
        self, manifest: AdapterManifest, origin: AdapterManifest, facts: VersionFacts
    ) -> Iterator[tuple[str, str, str]]:
        """Yield the rules about what was recorded of the training, in `origin`, and of measurements."""
        training = origin.training
        if self.recorders and training:
            recorder = training.recorder or "nobody that it names"
            problem = f"its training was recorded by {recorder}, not {' or '.join(self.recorders)}"
            yield "recorders", recorder, "" if training.recorder in self.recorders else problem
        if self.data:
            for title, problem in policy_rules.data_violations(manifest, self.data, facts):
                yield "data", title, problem
        metrics, measured = (training.metrics if training else None) or {}, facts.measurements
        for bounds in self.metrics:
            value = measured.values.get(bounds.metric, metrics.get(bounds.metric))
            number = float(value) if is_number(value) else None
            problem = bounds.violation(number)
            if bounds.recorders and not problem:
                recorder = measured.recorder_of(bounds.metric) if bounds.metric in measured.values else ""
                problem = bounds.recorder_violation(recorder or self._recorder_of(training))
            yield f"metrics.{bounds.metric}", "not measured" if number is None else f"{number:g}", problem
        for rule in self.evaluations:
            results = rule.results(origin, measured.evaluations())
            problems = [rule.violation_by(result) for result in results]
            value = ", ".join(f"{result.value:g}" for result in results) or "not measured"
            yield rule.rule, value, "" if "" in problems else "; ".join(problems) or "was not measured"

    def _recorder_of(self, training: Training | None) -> str:
        """Return who recorded the metrics of a training in adapter.json: its owner, who can write any name there.

        A name counts if somebody must have signed the training of every version. That of an account is never one of a training.
        """
        recorder = (training.recorder if training else None) or OWNER
        is_attested = any(rule.attestation == "training" and rule.pattern == "*" for rule in self.attestations)
        return recorder if is_attested and not recorder.startswith(ACCOUNT) else OWNER

    def _time_checks(
        self, manifest: AdapterManifest, origin: AdapterManifest, facts: VersionFacts
    ) -> Iterator[tuple[str, str, str]]:
        """Yield the rules about the age of an adapter."""
        now = facts.now or datetime.datetime.now(datetime.UTC)
        if self.unexpired:
            yield "unexpired", *policy_rules.expiry(manifest, facts.read_parent, now)
        if self.max_age:
            date = (origin.training.created if origin.training else None) or origin.released
            yield "max_age", *policy_rules.age_violation(date, self.max_age, now)


def _has_base(manifest: AdapterManifest, bases: tuple[Digest, ...]) -> bool:
    """Return whether the base is one of `bases`, by its fingerprint or by every weight file that the training read."""
    weights = policy_rules.trained_weights(manifest)
    return manifest.base.fingerprint in bases or (bool(weights) and all(digest in bases for digest in weights))


def refusal(location: str, file: str, reasons: Iterable[str], hint: str = "") -> RefusedError:
    """Return the error for an adapter that the policy in `file` forbids."""
    reasons = list(reasons)
    return RefusedError(location, f"against the policy of {file}: {'; '.join(reasons)}", hint, reasons, code=CODE)


def join(*policies: Policy | None) -> Policy | None:
    """Return one policy that is met only if all of them are; None if there are none."""
    # Each once: a project's policy may be the registry's own file.
    present = list(dict.fromkeys(policy for policy in policies if policy is not None))
    return replace(present[0], also=(*present[0].also, *present[1:])) if present[1:] else present[0] if present else None
