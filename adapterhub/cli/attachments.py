"""Files attached to versions, as OCI referrers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapterhub_converters.errors import UsageError

from . import remotes

if TYPE_CHECKING:
    from adapterhub.remotes.location import Place
    from adapterhub.remotes.oci.referrers import Referrer
    from adapterhub.remotes.protocol import Referring


@contextmanager
def opened(address: str) -> Iterator[tuple[Referring, Place]]:
    """Open an address that can have attachments; UsageError for any other."""
    from adapterhub.remotes.location import is_address, parse

    if not is_address(address):
        hint = "Copy it to a registry or a layout first, like oci://HOST/NAME:TAG or layout://PATH:NAME"
        raise UsageError(address, "is not an address, and attachments are stored at an address", hint)
    place = parse(address)
    with remotes.opened(address) as there:
        referring = there.referring()
        if referring is None:
            raise UsageError(address, "does not support attachments", "Use an OCI registry or an image layout")
        yield referring, place


def carry(source: str, target: str) -> int:
    """Copy the attachments of a version to the address it will be copied to, and return their number."""
    from adapterhub.remotes.oci import referrers

    with opened(source) as (there, where), opened(target) as (place, _):
        return len(referrers.copy(there, there.manifest(where.reference).digest, place))


def document(referrer: Referrer) -> dict[str, object]:
    """An attachment with stable keys."""
    return {
        "digest": referrer.digest,
        "size": referrer.size,
        "type": referrer.artifact_type,
        "annotations": dict(referrer.annotations),
    }
