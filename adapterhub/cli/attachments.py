"""Files that are attached to a version elsewhere, as OCI referrers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapterhub.cli import remotes
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.location import Place
    from adapterhub.remotes.oci.referrers import Referrer
    from adapterhub.remotes.protocol import Referring


@contextmanager
def opened(address: str) -> Iterator[tuple[Referring, Place]]:
    """A place that can keep attachments, open; UsageError for any other."""
    from adapterhub.remotes.location import is_address, parse

    if not is_address(address):
        hint = "Copy it to a registry or a layout, and name that: oci://HOST/NAME:TAG or layout://PATH:NAME"
        raise UsageError(address, "is not an address: things are attached where versions are shared", hint)
    place = parse(address)
    with remotes.opened(address) as there:
        referring = there.referring()
        if referring is None:
            raise UsageError(address, "nothing can be attached in this kind of place", "OCI registries and layouts can")
        yield referring, place


def carry(source: str, target: str) -> int:
    """Copy what is attached to a version to where the version is about to go; how many things that was."""
    from adapterhub.remotes.oci import referrers

    with opened(source) as (there, where), opened(target) as (place, _):
        return len(referrers.copy(there, there.manifest(where.reference).digest, place))


def document(referrer: Referrer) -> dict[str, object]:
    """An attachment for programs."""
    return {
        "digest": referrer.digest,
        "size": referrer.size,
        "type": referrer.artifact_type,
        "annotations": dict(referrer.annotations),
    }
