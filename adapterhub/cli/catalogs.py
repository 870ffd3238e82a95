"""The catalog that a command asks: that of the local registry, or of a hub of ours at an address or a remote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from adapterhub_converters.errors import NotFoundError, UsageError

from . import remotes
from .options import Settings
from .registry_choice import open_registry
from .remote_choice import ref_at_remote, remote_at

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.remotes.catalog import Catalog


def refuse_dry_run(is_asked: bool) -> None:
    """Raise UsageError if a change at an address is to be rehearsed."""
    if is_asked:
        raise UsageError("--dry-run", "is for the local registry", "Leave it out", code="conflicting-options")


def open_local(settings: Settings) -> Catalog:
    """Open the catalog of the local registry; the caller closes it."""
    from adapterhub.remotes.local_catalog import LocalCatalog

    return LocalCatalog(open_registry(settings))


@contextmanager
def open_to_change(settings: Settings, opened: tuple[Catalog, Ref] | None, *, dry_run: bool) -> Iterator[Catalog]:
    """Yield the catalog that `open_hub` opened, or else that of the local registry; with `dry_run`, changes are rehearsed."""
    if opened is not None:
        with opened[0] as catalog:
            yield catalog
        return
    from adapterhub.registry.rehearsal import rehearsal
    from adapterhub.remotes.local_catalog import LocalCatalog

    with open_registry(settings) as registry, rehearsal(registry) if dry_run else nullcontext():
        yield LocalCatalog(registry)


def open_hub(address: str) -> tuple[Catalog, Ref] | None:
    """Open the catalog of the hub at an address, and return it with the ref there; None if it is no hub of ours.

    The caller closes it.
    """
    from adapterhub.remotes.hub.hub_client import HubAddress
    from adapterhub.remotes.remote_address import parse

    place = parse(address)
    if not isinstance(place, HubAddress):
        return None
    from adapterhub.remotes.hub import hub_catalog, hub_repository

    catalog = hub_catalog.connect(place, hub_repository.hub_for(place, remotes.surroundings()))
    return None if catalog is None else (catalog, hub_catalog.ref_at(place))


@contextmanager
def catalog_of(
    settings: Settings, text: str, remote: str | None, feature: str, *, dry_run: bool = False
) -> Iterator[tuple[Catalog, Ref]]:
    """Yield the catalog that has a ref or an address, and the ref in it; with `dry_run`, changes are only rehearsed.

    Raises:
        UsageError: It is at a remote that has no `feature`.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.address_schemes import is_address

    address = ref_at_remote(text, remote)
    refuse_dry_run(dry_run and is_address(address))
    if not is_address(address):
        ref = Ref.parse(text)
        with open_to_change(settings, None, dry_run=dry_run) as catalog:
            yield catalog, ref
        return
    opened = open_hub(address)
    if opened is None:
        raise remotes.unsupported_error(address, feature)
    with opened[0] as catalog:
        yield catalog, opened[1]


@contextmanager
def catalog_below(
    settings: Settings, prefix: str | None, remote: str | None, feature: str
) -> Iterator[tuple[Catalog, str | None]]:
    """Yield the catalog that has the names of a namespace, and their prefix in it.

    Raises:
        UsageError: `remote` has no `feature`.
    """
    if remote is None:
        with open_local(settings) as catalog:
            yield catalog, prefix
        return
    named_remote = remote_at(remote)
    opened = open_hub_below(prefix, named_remote.url)
    if opened is None:
        hint = f"List its names with `adapterhub list --remote {named_remote.name}`".rstrip()
        problem = f"has no {feature}, which the local registry and hubs of adapterhub have"
        raise UsageError(named_remote.url, problem, hint, code="hub-only")
    with opened[0] as catalog:
        yield catalog, opened[1]


def open_hub_below(prefix: str | None, url: str) -> tuple[Catalog, str | None] | None:
    """Open the catalog at the URL of a remote, and return it with the prefix of its names; None if it is no hub of ours."""
    from adapterhub.remotes.named_remotes import prefix_below, unused_address

    opened = open_hub(unused_address(url))
    return None if opened is None else (opened[0], prefix_below(url, prefix))


def no_such_prefix(catalog: Catalog, prefix: str) -> NotFoundError:
    """Return the error for a name or a namespace that a catalog does not have, with the one that was probably meant."""
    import difflib

    names = {row.name for row in catalog.list(None).rows}
    close = difflib.get_close_matches(prefix, sorted(names | {name.partition("/")[0] for name in names}), 1)
    hint = f"Did you mean {close[0]}?" if close else "Run `adapterhub list`"
    return NotFoundError(prefix, "no adapter of this name or namespace", hint)
