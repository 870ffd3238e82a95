"""The policy of a project, a registry or a hub: which names, adapters, bases, signers and attestations it allows.

It is asked with a name, with an adapter's manifest (adapter.json), and for the keys that must have signed; it knows nothing of
protocols, and opens no file. Every reason that it gives names the rule, and the file that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.package_files import shortened
from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.identity import Identity
    from adapterhub.manifest.document import AdapterManifest

CODE = "against-policy"
"""The code of the error for an adapter that a policy does not allow."""
ATTESTATIONS = ("fits", "merge", "training")
"""Kinds of attestations that can be required, as `adapterhub.trust.attestation` has them."""
_NO_METRICS: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the largest value of a metric; None for no limit."""

    metric: str
    min: float | None = None
    max: float | None = None

    def against(self, value: float | None) -> str:
        """Return what is wrong with a value, None for one that was not measured; empty if it is allowed."""
        if value is None:
            return "was not measured"
        if self.min is not None and not value >= self.min:
            return f"{value:g} is below {self.min:g}"
        return f"{value:g} is over {self.max:g}" if self.max is not None and not value <= self.max else ""


@dataclass(frozen=True, slots=True)
class Signed:
    """What one of some keys must have signed of the adapters whose names match a pattern (`fnmatch`).

    Attributes:
        pattern: Of names of refs, or of whole addresses.
        keys: Files or folders of public keys, and identities.
        attestation: The kind of attestation, of `ATTESTATIONS`; empty for the files themselves.
        where: The file that has the rule.
    """

    pattern: str
    keys: tuple[Path | Identity, ...]
    attestation: str = ""
    where: str = ""

    @property
    def rule(self) -> str:
        """Its key in the file."""
        return f"attestations.{self.pattern}.{self.attestation}" if self.attestation else f"signers.{self.pattern}"


@dataclass(frozen=True, slots=True)
class Policy:
    """Requirements on adapters; None and empty require nothing.

    Attributes:
        where: The file that sets them, for errors.
        max_rank: The largest rank of any module.
        require_base: The base model must be pinned by its fingerprint.
        licenses: The SPDX identifiers that are allowed, in any case.
        allow: Patterns (`fnmatch`) of names of refs, or of whole addresses.
        require_understood: The kind of adapter must be one that can be checked.
        signers: Patterns as those of `allow`, each with files or folders of public keys, and identities: an adapter must have
            been signed by one of those of each pattern that its name matches.
        bases: The base models that are allowed, each by its fingerprint, or by the digests of all its weight files.
        formats: The formats that are allowed.
        max_size: The largest number of bytes of its files, without adapter.json.
        metrics: Bounds of what was measured, under the names that a search uses.
        attestations: Attestations that must be there, by the patterns and keys that `signers` have.
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
    max_size: int | None = None
    metrics: tuple[Bounds, ...] = ()
    attestations: tuple[Signed, ...] = ()
    also: tuple[Policy, ...] = ()

    @property
    def needs_manifest(self) -> bool:
        """Whether a name and signatures alone cannot answer it."""
        return any(
            one.max_rank is not None
            or one.max_size is not None
            or one.require_base
            or one.require_understood
            or bool(one.licenses or one.bases or one.formats or one.metrics)
            for one in self._all
        )

    @property
    def needs_license(self) -> bool:
        """Whether it asks for the license."""
        return any(one.licenses for one in self._all)

    def check_name(self, name: str) -> None:
        """RefusedError when `name`, of a ref or a whole address, matches no pattern of `allow`."""
        for one in self._all:
            if one.allow and not any(fnmatchcase(name, pattern) for pattern in one.allow):
                what, hint = f"not a name that {one.where} allows", f"Its rule allow has {shortened(one.allow)}"
                raise RefusedError(name, what, hint, code=CODE)

    def signed(self, name: str) -> list[Signed]:
        """Return what must have been signed of an adapter of this name, its files first."""
        found: list[Signed] = []
        for one in self._all:
            of_files = [Signed(pattern, keys, "", one.where) for pattern, keys in one.signers]
            found += [each for each in (*of_files, *one.attestations) if fnmatchcase(name, each.pattern)]
        return sorted(found, key=lambda each: bool(each.attestation))

    def base_digests(self) -> list[tuple[Digest, ...]]:
        """Return the digests of bases that each policy allows, of those that restrict them."""
        return [one.bases for one in self._all if one.bases]

    def check_manifest(
        self, manifest: AdapterManifest, where: str, *, size: int | None = None, metrics: Mapping[str, float] = _NO_METRICS
    ) -> None:
        """Compare an adapter.json with the requirements.

        Args:
            manifest: The adapter.json.
            where: The name of the adapter.
            size: Bytes of its files, without adapter.json; None for the sum of those in the manifest.
            metrics: What was measured besides the metrics of its training.

        Raises:
            RefusedError: With every requirement of a policy that it does not meet.
        """
        size = sum(file.size for file in manifest.files) if size is None else size
        known = {**((manifest.training.metrics if manifest.training else None) or {}), **metrics}
        for one in self._all:
            if reasons := [*one._against(manifest), *one._against_numbers(size, known)]:
                raise refused(where, one.where, reasons)

    @property
    def _all(self) -> Iterator[Policy]:
        yield self
        for one in self.also:
            yield from one._all

    def _against(self, manifest: AdapterManifest) -> Iterable[str]:
        if self.max_rank is not None and manifest.max_rank > self.max_rank:
            yield f"max_rank: rank {manifest.max_rank} is over {self.max_rank}"
        if manifest.understood is False and self.max_rank is not None:
            what = f"its rank cannot be compared with {self.max_rank}, because it is not understood ({manifest.reason})"
            yield f"max_rank: {what}"
        elif manifest.understood is False and self.require_understood:
            yield f"require_understood: it is not understood ({manifest.reason})"
        if self.require_base and not manifest.base.fingerprint:
            yield "require_base: its base is not pinned; push it with its base"
        if self.bases and not _is_of(manifest, self.bases):
            base = manifest.base.fingerprint
            named = f"{manifest.base.repo or 'its base'} ({base[:19]}…) is" if base else "its base is not pinned, and thus"
            yield f"bases: {named} not one of the {len(self.bases)} digests that are allowed"
        license_ = manifest.license
        if self.licenses and (license_ or "").lower() not in [one.lower() for one in self.licenses]:
            yield f"licenses: its license is {license_ or 'not declared'}, not {' or '.join(self.licenses)}"
        if self.formats and manifest.format not in self.formats:
            yield f"formats: its format is {manifest.format}, not {' or '.join(self.formats)}"

    def _against_numbers(self, size: int, metrics: Mapping[str, object]) -> Iterable[str]:
        if self.max_size is not None and size > self.max_size:
            yield f"max_size: {size:,} bytes are over {self.max_size:,}"
        for bounds in self.metrics:
            value = metrics.get(bounds.metric)
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
            if reason := bounds.against(number):
                yield f"metrics.{bounds.metric}: {reason}"


def _is_of(manifest: AdapterManifest, bases: tuple[Digest, ...]) -> bool:
    """Tell whether the base is one of these: by its names and shapes, or by every weight file that the training read."""
    weights = (manifest.training.weights if manifest.training else None) or ()
    return manifest.base.fingerprint in bases or (bool(weights) and all(file.digest in bases for file in weights))


def refused(where: str, file: str, reasons: Iterable[str], hint: str = "") -> RefusedError:
    """Return the error for an adapter that the policy in a file does not allow."""
    reasons = list(reasons)
    return RefusedError(where, f"against the policy of {file}: {'; '.join(reasons)}", hint, reasons, code=CODE)


def joined(*policies: Policy | None) -> Policy | None:
    """Return one policy that is met where all of them are; None where there is none."""
    found = list(dict.fromkeys(one for one in policies if one is not None))
    return replace(found[0], also=(*found[0].also, *found[1:])) if found[1:] else found[0] if found else None
