"""`adapterhub bundle`."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs, output, remotes
from adapterhub.cli.options import Settings, command, output_option, replace_option
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.registry_choice import open_registry, workspace
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Registry
    from adapterhub.remotes.version_bundle import BundleItem


@command(
    "bundle",
    example="""
    adapterhub bundle team/sql:v2 team/chat:prod -o adapters.tar
    adapterhub bundle team/merged:v1 --with-parents -o adapters.tar
    adapterhub pull team/sql:v2 --from adapters.tar --offline""",
)
@click.argument("refs", metavar="REF…", nargs=-1, required=True)
@output_option("a .tar, or else a folder.", required=True)
@replace_option
@click.option("--with-parents", is_flag=True, help="Include the parents that are in the registry, and theirs.")
@click.pass_obj
def bundle(settings: Settings, *, refs: tuple[str, ...], out: str, replace: bool, with_parents: bool) -> None:
    """Export versions to one OCI image layout, every byte verified: a reproducible .tar, or a folder.

    REF is a version in this registry, or an address. Each keeps its name and its signatures: `pull REF --from OUT` finds it,
    and so do skopeo (oci-archive:OUT:REF) and oras (OUT@DIGEST). `copy layout://OUT:REF NAME` imports one into a registry.
    """
    from adapterhub.operations import source_names
    from adapterhub.remotes import version_bundle

    path = source_names.output_path(out)
    archived = out.lower().endswith(".tar")
    atomic.check_free(path, folder=not archived, replace=replace)
    with ExitStack() as stack:
        items, missing = _items(settings, refs, stack, with_parents=with_parents)
        with bytes_bar("bundling") as callback:
            size = version_bundle.write_bundle(items, path, archived=archived, progress=callback, replace=replace)
    for digest in missing:
        output.say(f"not included: the parent {digest}, which is not in this registry")
    versions = [{"ref": item.name, "digest": item.manifest.digest, "size": item.manifest.size} for item in items]
    document = {"output": out, "size": size, "versions": versions, "missing": missing}

    def text() -> None:
        for item in items:
            output.write(f"{item.name or '-'}  {output.size(item.manifest.size)}  {output.digest(item.manifest.digest)}")
        output.write(f"{out}: {output.plural(len(items), 'version')}, {output.size(size)}, verified")

    output.emit(document, as_json=settings.as_json, text=text)


def _items(
    settings: Settings, refs: tuple[str, ...], stack: ExitStack, *, with_parents: bool
) -> tuple[list[BundleItem], list[Digest]]:
    """Return the versions to bundle, open until the stack closes, and the digests of missing parents."""
    from adapterhub.remotes.address_schemes import is_address
    from adapterhub.remotes.version_bundle import ancestors

    items: list[BundleItem] = []
    local: list[Ref] = []
    missing: list[Digest] = []
    for text in dict.fromkeys(refs):
        if is_address(text):
            # Opened now and read later, while the archive is written.
            items.append(_remote_item(text, stack, settings))
        else:
            path, ref = inputs.resolve(text, settings)
            if ref is None:
                hint = f"Store it first: `adapterhub push {shlex.quote(str(path))} NAMESPACE/NAME`"
                raise UsageError(text, "is a path, and a bundle contains versions", hint)
            local.append(ref)
    if with_parents and not local:
        raise UsageError("--with-parents", "needs a version in this registry, and all of these are addresses", "Leave it out")
    if local:
        registry = stack.enter_context(open_registry(settings))
        registry_items = [_registry_item(registry, ref, stack, settings) for ref in local]
        if with_parents:
            # The parents come after the requested versions, in the order of the lineage, so that the archive is reproducible.
            parents, missing = ancestors(registry, [item.manifest.digest for item in registry_items])
            registry_items += [_registry_item(registry, ref, stack, settings) for ref in parents]
        items = [*registry_items, *items]
    return items, missing


def _registry_item(registry: Registry, ref: Ref, stack: ExitStack, settings: Settings) -> BundleItem:
    """Open a version of the registry; it is named by the tag of its ref, else by its number."""
    from adapterhub.index import queries
    from adapterhub.operations.policy_checks import check_version
    from adapterhub.operations.signature_checks import VersionNames, carried_signatures
    from adapterhub.remotes.local_name import LocalName
    from adapterhub.remotes.version_bundle import BundleItem

    version = stack.enter_context(registry.lease_version(ref))
    output.warn_deprecated(str(version.ref), version.deprecated)
    command_workspace = workspace(settings)
    command_workspace.check_name(version.name)
    check_version(registry, version, VersionNames.of_version(version, str(version.ref)), command_workspace)
    source = LocalName(registry, version.name)
    name = f"{ref.name}:{ref.tag}" if ref.tag and ref.tag in queries.tags(registry.index, ref.name) else str(version.ref)
    manifest = source.manifest(version.digest)
    return BundleItem(source, manifest, name, carried_signatures(source, manifest, command_workspace))


def _remote_item(text: str, stack: ExitStack, settings: Settings) -> BundleItem:
    """Open a version at an address; it is named by the last parts of its repository, or unnamed if given by digest."""
    from adapterhub.operations.policy_checks import check_policy
    from adapterhub.operations.signature_checks import VersionNames, carried_signatures
    from adapterhub.remotes.layouts.layout_address import LayoutAddress
    from adapterhub.remotes.parallel_transfer import PinnedSource
    from adapterhub.remotes.remote_address import parse
    from adapterhub.remotes.version_bundle import BundleItem

    parsed = parse(text)
    command_workspace, source = workspace(settings), PinnedSource(stack.enter_context(remotes.open_address(text)))
    command_workspace.check_name(parsed.repository)
    check_policy(source, parsed.reference, VersionNames.of_address(parsed, text), command_workspace)
    name = parsed.tag
    if not isinstance(parsed, LayoutAddress) and not parsed.digest:
        path = parsed.repository.partition("://")[2].partition("/")[2]
        name = f"{'/'.join(path.split('/')[-2:])}:{parsed.reference}"
    manifest = source.manifest(parsed.reference)
    return BundleItem(source, manifest, name, carried_signatures(source, manifest, command_workspace))
