"""The commands' access to files attached to versions, as OCI referrers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapterhub_converters.errors import UsageError

from . import remotes

if TYPE_CHECKING:
    from adapterhub.remotes.oci.referrers import Referrer
    from adapterhub.remotes.protocol import ReferringTarget
    from adapterhub.remotes.remote_address import RemoteAddress


@contextmanager
def open_referrers(address: str) -> Iterator[tuple[ReferringTarget, RemoteAddress]]:
    """Open an address that can have attachments; raise UsageError for any other."""
    from adapterhub.remotes.address_schemes import is_address
    from adapterhub.remotes.remote_address import parse

    if not is_address(address):
        hint = "Copy it to a registry or a layout first, like oci://HOST/NAME:TAG or layout://PATH:NAME"
        raise UsageError(address, "is not an address, and attachments are stored at an address", hint)
    parsed = parse(address)
    with remotes.open_address(address) as remote:
        referring = remote.as_referring_target()
        if referring is None:
            raise UsageError(address, "does not support attachments", "Use an OCI registry or an image layout")
        yield referring, parsed


def copy_attachments(source: str, target: str) -> int:
    """Copy the attachments of a version to the address it will be copied to, and return their number."""
    from adapterhub.remotes.oci import referrers

    with open_referrers(source) as (source_remote, source_place), open_referrers(target) as (target_remote, _):
        return len(
            referrers.copy_referrers(source_remote, source_remote.manifest(source_place.reference).digest, target_remote)
        )


def document(referrer: Referrer) -> dict[str, object]:
    """Return an attachment as JSON."""
    return {
        "digest": referrer.digest,
        "size": referrer.size,
        "type": referrer.artifact_type,
        "annotations": dict(referrer.annotations),
    }
