"""The policy of a project, a registry or a hub: which names, adapters, bases, signers and attestations it allows.

It checks names and manifests (adapter.json) and lists the keys that must have signed; it knows nothing of protocols and opens
no files. Every reason it gives names the rule, and the file that has it. `adapterhub/operations/policy_checks.py` applies it to
versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest import licensing
from adapterhub.manifest.package_files import shorten_names
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .tag_rules import TagRules

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.identity import Identity
    from adapterhub.manifest.document import AdapterManifest

CODE = "against-policy"
"""The code of the error for an adapter that a policy forbids."""
ATTESTATIONS = ("fits", "merge", "training", "tests")
"""The kinds of attestations that can be required, as in `adapterhub.trust.attestation`."""
_NO_METRICS: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The smallest and the largest allowed value of a metric; None for no limit."""

    metric: str
    min: float | None = None
    max: float | None = None

    def violation(self, value: float | None) -> str:
        """Return what is wrong with a value, or with None for an unmeasured one; empty if it is allowed."""
        if value is None:
            return "was not measured"
        # Written as `not >=`, so that NaN is out of bounds too.
        if self.min is not None and not value >= self.min:
            return f"{value:g} is below {self.min:g}"
        return f"{value:g} is over {self.max:g}" if self.max is not None and not value <= self.max else ""


@dataclass(frozen=True, slots=True)
class SigningRule:
    """A rule about who must have signed the adapters whose names match a pattern (`fnmatch`).

    Attributes:
        pattern: A pattern of names of refs, or of whole addresses.
        keys: Files or folders of public keys, and identities; a signature by one of them is enough.
        attestation: The required kind of attestation, of `ATTESTATIONS`; empty for a signature of the files themselves.
        file: The file that has the rule.
    """

    pattern: str
    keys: tuple[Path | Identity, ...]
    attestation: str = ""
    file: str = ""

    @property
    def rule(self) -> str:
        """The key of the rule in the file."""
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
        attestations: Required attestations, by patterns and keys like those of `signers`.
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

    @property
    def needs_manifest(self) -> bool:
        """Whether a manifest is needed, because a name and signatures alone cannot decide."""
        return any(
            policy.max_rank is not None
            or policy.max_size is not None
            or policy.require_base
            or policy.require_understood
            or bool(policy.licenses or policy.bases or policy.formats or policy.recorders or policy.metrics)
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

    def check_manifest(
        self, manifest: AdapterManifest, location: str, *, size: int | None = None, metrics: Mapping[str, float] = _NO_METRICS
    ) -> None:
        """Check an adapter.json against the requirements.

        Args:
            manifest: The adapter.json.
            location: The name of the adapter, for errors.
            size: Bytes of its files, without adapter.json; None for the sum of those in the manifest.
            metrics: Measurements besides the metrics of its training.

        Raises:
            RefusedError: With every requirement of a policy that the adapter does not meet.
        """
        size = sum(file.size for file in manifest.files) if size is None else size
        all_metrics = {**((manifest.training.metrics if manifest.training else None) or {}), **metrics}
        for policy in self._policies:
            if reasons := [*policy._violations(manifest), *policy._number_violations(size, all_metrics)]:
                raise refusal(location, policy.where, reasons)

    @property
    def _policies(self) -> Iterator[Policy]:
        """This policy and all that must be met with it."""
        yield self
        for policy in self.also:
            yield from policy._policies

    def _violations(self, manifest: AdapterManifest) -> Iterable[str]:
        """Yield the rules that a manifest violates, with the reasons."""
        if self.max_rank is not None and manifest.max_rank > self.max_rank:
            yield f"max_rank: rank {manifest.max_rank} is over {self.max_rank}"
        # An adapter of unknown kind has no rank that could be compared, so the rule cannot be met.
        if manifest.understood is False and self.max_rank is not None:
            problem = f"its rank cannot be compared with {self.max_rank}, because it is not understood ({manifest.reason})"
            yield f"max_rank: {problem}"
        elif manifest.understood is False and self.require_understood:
            yield f"require_understood: it is not understood ({manifest.reason})"
        if self.require_base and not manifest.base.fingerprint:
            yield "require_base: its base is not pinned; push it with its base"
        if self.bases and not _has_base(manifest, self.bases):
            base = manifest.base.fingerprint
            subject = f"{manifest.base.repo or 'its base'} ({base[:19]}…) is" if base else "its base is not pinned, and thus"
            yield f"bases: {subject} not one of the {len(self.bases)} digests that are allowed"
        if self.licenses and not licensing.permits(manifest.license, self.licenses):
            yield f"licenses: its license is {manifest.license or 'not declared'}, not {' or '.join(self.licenses)}"
        if self.formats and manifest.format not in self.formats:
            yield f"formats: its format is {manifest.format}, not {' or '.join(self.formats)}"
        if self.recorders and manifest.training and manifest.training.recorder not in self.recorders:
            recorder = manifest.training.recorder or "nobody that it names"
            yield f"recorders: its training was recorded by {recorder}, not {' or '.join(self.recorders)}"

    def _number_violations(self, size: int, metrics: Mapping[str, object]) -> Iterable[str]:
        """Yield the rules about sizes and metrics that are violated, with the reasons."""
        if self.max_size is not None and size > self.max_size:
            yield f"max_size: {size:,} bytes are over {self.max_size:,}"
        for bounds in self.metrics:
            value = metrics.get(bounds.metric)
            number = float(value) if is_number(value) else None
            if reason := bounds.violation(number):
                yield f"metrics.{bounds.metric}: {reason}"


def _has_base(manifest: AdapterManifest, bases: tuple[Digest, ...]) -> bool:
    """Return whether the base is one of `bases`, by its fingerprint or by every weight file that the training read."""
    weights = (manifest.training.weights if manifest.training else None) or ()
    return manifest.base.fingerprint in bases or (bool(weights) and all(file.digest in bases for file in weights))


def refusal(location: str, file: str, reasons: Iterable[str], hint: str = "") -> RefusedError:
    """Return the error for an adapter that the policy in `file` forbids."""
    reasons = list(reasons)
    return RefusedError(location, f"against the policy of {file}: {'; '.join(reasons)}", hint, reasons, code=CODE)


def join(*policies: Policy | None) -> Policy | None:
    """Return one policy that is met only if all of them are; None if there are none."""
    # Each once: a project's policy may be the registry's own file.
    present = list(dict.fromkeys(policy for policy in policies if policy is not None))
    return replace(present[0], also=(*present[0].also, *present[1:])) if present[1:] else present[0] if present else None
