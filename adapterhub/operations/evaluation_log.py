"""Where evaluations of a version are recorded: in the registry's log of its name, or in that of the hub at its address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterhub.http.http_errors import DeniedError
from adapterhub.ref import Ref
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import source_names
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.measurement import Evaluation


@dataclass(frozen=True, slots=True)
class EvaluatedVersion:
    """A version that was evaluated elsewhere: its ref with its number, or its address, and its digest."""

    place: str
    digest: Digest

    @property
    def model(self) -> str:
        """The name of exactly this version, like that which a gateway gives it."""
        return f"{name_at(self.place)}@{self.digest}"


def name_at(place: str) -> str:
    """Return the name of the version at a ref or an address."""
    if not source_names.is_address(place):
        return Ref.parse(place).name
    from adapterhub.remotes import remote_address

    return remote_address.name_of(remote_address.parse(place))


def find_version(source: StrPath, workspace: Workspace, purpose: str) -> EvaluatedVersion:
    """Return the version at a ref or an address, of which nothing is read; UsageError, with the purpose, for a path."""
    if source_names.is_address(source):
        from adapterhub.remotes.remote_address import parse

        place = parse(str(source))
        with workspace.connect(place) as remote:
            return EvaluatedVersion(str(place), remote.resolve(place.reference))
    ref = source_names.ref_of(source, workspace)
    if ref is None:
        raise source_names.not_stored_error(source, f"is not a version of the registry, {purpose}")
    with workspace.open_registry() as registry:
        version = registry.resolve(ref)
    return EvaluatedVersion(str(version.ref), version.digest)


def record(source: str | None, digest: Digest | None, evaluations: Sequence[Evaluation], workspace: Workspace) -> bool:
    """Record evaluations in the log of a version; return False where there is no log that this user may write to.

    Args:
        source: The ref or the address that the adapter came from; None for a folder.
        digest: The digest of its manifest.
        evaluations: The evaluations.
        workspace: The registry, and the credentials for a hub.
    """
    if source is None:
        return False
    if source_names.is_address(source):
        return digest is not None and _record_at_hub(source, digest, evaluations, workspace)
    from adapterhub.registry import measurement_log

    with workspace.open_registry() as registry:
        for evaluation in evaluations:
            measurement_log.record(registry, Ref.parse(source), evaluation)
    return True


def _record_at_hub(address: str, digest: Digest, evaluations: Sequence[Evaluation], workspace: Workspace) -> bool:
    """Record evaluations at a hub that runs adapterhub, by the digest: a tag may have moved in the meantime."""
    from adapterhub.remotes.hub import hub_catalog, hub_repository
    from adapterhub.remotes.hub.hub_client import HubAddress
    from adapterhub.remotes.remote_address import parse

    place = parse(address)
    if not isinstance(place, HubAddress):
        return False
    catalog = hub_catalog.connect(place, hub_repository.hub_for(place, workspace.surroundings()))
    if catalog is None:
        return False
    with catalog:
        try:
            for evaluation in evaluations:
                catalog.record_evaluation(Ref(place.name.lower(), digest=digest), evaluation)
        except (DeniedError, NotFoundError) as error:  # a reader of the hub may measure what it has, too
            workspace.tell(f"note: not recorded: {error}")
            return False
    return True
