"""The policy of a project: which names, ranks, bases and licenses it allows.

It is asked with a name and with an adapter's manifest (adapter.json), before anything is stored or written; it knows nothing of
protocols.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from adapterhub.manifest.package_files import shortened
from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from adapterhub.manifest.document import AdapterManifest

CODE = "against-policy"
"""The code of the error for an adapter that a policy does not allow."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Requirements on adapters; None and empty require nothing.

    Attributes:
        where: The file that sets them, for errors.
        max_rank: The largest rank of any module.
        require_base: The base model must be pinned by its fingerprint.
        licenses: The SPDX identifiers that are allowed, in any case.
        allow: Patterns (`fnmatch`) of names of refs, or of whole addresses.

    Example:
        >>> Policy("adapterhub.toml", max_rank=2).check_manifest(AdapterManifest.salvage({"r": 4}), "./sql")
        Traceback (most recent call last):
            ...
        adapterhub_converters.errors.RefusedError: ./sql: against the policy of adapterhub.toml: rank 4 is over 2
    """

    where: str = ""
    max_rank: int | None = None
    require_base: bool = False
    licenses: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()

    @property
    def needs_manifest(self) -> bool:
        """Whether a name alone cannot answer it."""
        return self.max_rank is not None or self.require_base or bool(self.licenses)

    def check_name(self, name: str) -> None:
        """RefusedError when `name`, of a ref or a whole address, matches no pattern of `allow`."""
        if self.allow and not any(fnmatchcase(name, pattern) for pattern in self.allow):
            raise RefusedError(
                name,
                f"not a name that {self.where} allows",
                f"Allowed are {shortened(self.allow)}",
                code=CODE,
            )

    def check_manifest(self, manifest: AdapterManifest, where: str) -> None:
        """RefusedError with every requirement that an adapter.json does not meet; `where` is the name of the adapter."""
        if reasons := list(self._against(manifest)):
            raise RefusedError(where, f"against the policy of {self.where}: {'; '.join(reasons)}", "", reasons, code=CODE)

    def _against(self, manifest: AdapterManifest) -> Iterable[str]:
        if self.max_rank is not None and manifest.max_rank > self.max_rank:
            yield f"rank {manifest.max_rank} is over {self.max_rank}"
        if self.require_base and not manifest.base.fingerprint:
            yield "its base is not pinned; push it with its base"
        license_ = manifest.license
        if self.licenses and (license_ or "").lower() not in [one.lower() for one in self.licenses]:
            yield f"its license is {license_ or 'not declared'}, not {' or '.join(self.licenses)}"
