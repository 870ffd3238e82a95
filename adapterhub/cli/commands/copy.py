"""`adapterhub copy`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import attachments, inputs, output, policy, publish, remotes
from adapterhub.cli.environment import (
    complete_ref,
    open_registry,
)
from adapterhub.cli.options import Settings, command, transfer_options
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views.versions import version_document
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.protocol import Source


@command(
    "copy",
    short="Copy a version to or from another registry.",
    example="""
    adapterhub copy team/sql:v2 oci://registry.example/team/sql:v2
    adapterhub copy oci://registry.example/team/sql:v2 team/sql
    adapterhub copy oci://registry.example/team/sql:v2 ./sql""",
)
@click.argument("source", metavar="FROM", shell_complete=complete_ref)
@click.argument("target", metavar="TO", shell_complete=complete_ref)
@click.option("--referrers", is_flag=True, help="With what is attached to it, between registries and image layouts.")
@transfer_options
@click.pass_obj
def copy(settings: Settings, source: str, target: str, *, referrers: bool) -> None:
    """Copy an adapter under the same digest, wherever it is and wherever it goes.

    FROM and TO are each a ref of the registry here, a folder, or an address, oci://HOST/NAME[:TAG|@DIGEST] or
    hf://ORG/NAME[@REVISION]. Write a folder that could be a ref as ./NAME. What is there already isn't sent again.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.location import is_address

    if referrers:  # before the version has its tag there
        output.say(f"{output.plural(attachments.carry(source, target), 'attachment')} copied")
    if is_address(target):
        made = publish.push(settings, source, target)
        output.emit(made.document, as_json=settings.as_json, text=lambda: output.write(made.text))
        return
    try:
        ref = None if target.startswith((".", os.sep)) else Ref.parse(target)
    except UsageError:
        ref = None
    if ref is not None:
        _into_registry(settings, source, ref)
    elif is_address(source):
        _, document, text = remotes.pull(source, target)
        output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
    else:
        _into_folder(settings, source, target)


def _into_registry(settings: Settings, source: str, ref: Ref) -> None:
    policy.allowed(ref.name)
    with open_registry(settings, make=True) as registry:
        version = _received(settings, registry, source, ref)
    kind = "" if version.new else "already there: "
    text = f"{kind}{version.ref}  {output.size(version.size or 0)}  {output.digest(version.digest)}"
    output.emit(version_document(version), as_json=settings.as_json, text=lambda: output.write(text))


def _received(settings: Settings, registry: Registry, source: str, ref: Ref) -> Version:
    """A version of `ref` with what `source` is: its manifest as it is, or made anew where it has no adapter.json."""
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.location import is_address, parse

    if is_address(source):
        address = parse(source)
        with remotes.connect(address) as remote:
            made = remote.manifest(address.reference)
            if made.adapter_json is not None:
                policy.fits(remote, made.digest, source)
                return _admitted(registry, remote, made.digest, ref)
    elif (found := inputs.ref_of(source, settings)) is not None:
        with registry.reading(found) as version:
            policy.fits(Local(registry, version.name), version.digest, str(version.ref))
            return _admitted(registry, Local(registry, version.name), version.digest, ref)
    with inputs.opened(source, settings) as one, inputs.as_folder(one) as folder:
        publish.checked(one, None, force=False)
        policy.folder_fits(folder, one.where)
        return registry.push(folder, ref)


def _admitted(registry: Registry, source: Source, digest: str, ref: Ref) -> Version:
    from adapterhub.remotes import copy as copying
    from adapterhub.remotes.local import Local

    target = Local(registry, ref.name)
    with target.at_work(), bytes_bar("copying") as show:
        copying.copy(source, digest, target, ref.tag, show, **remotes.how())
    return target.version or registry.resolve(ref)


def _into_folder(settings: Settings, source: str, target: str) -> None:

    ref = inputs.ref_of(source, settings)
    if ref is None:
        raise UsageError(target, "is a folder, and so is what should be copied", "Copy it with the tools of your system")
    policy.ref_fits(settings, source)
    with open_registry(settings) as registry:
        version = registry.pull(ref, Path(target))
    output.deprecated(str(version.ref), version.deprecated)
    document: dict[str, Any] = {**version_document(version), "output": target}
    del document["new"], document["skipped"]
    text = f"{target}: {version.ref}, {output.size(version.size or 0)}, verified"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
