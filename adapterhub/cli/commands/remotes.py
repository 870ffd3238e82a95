"""Adapters in other registries: the command copy, and what push, pull and list do with an address."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import environment, inputs, output, transfers
from adapterhub.cli.environment import complete_ref, data_folder, hub, logins_file, open_registry
from adapterhub.cli.options import Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub_converters.errors import UsageError

from . import forms, rules
from .registry import checked, pinned, version_document

if TYPE_CHECKING:
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.ref import Ref
    from adapterhub.registry.recipe import Conversion
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.copy import Copied
    from adapterhub.remotes.location import Connected, Place, Surroundings
    from adapterhub.remotes.protocol import Source, Target


def surroundings() -> Surroundings:
    """Who asks: the files and variables in which others keep that."""
    from adapterhub.remotes.location import Surroundings

    folder = os.environ.get("DOCKER_CONFIG")
    docker = (Path(folder) if folder else Path.home() / ".docker") / "config.json"
    return Surroundings(docker, hub, os.environ, logins_file(), data_folder() / "uploads")


def _open(place: Place) -> Connected:
    from adapterhub.remotes import location

    return location.connect(place, surroundings())


def opened(text: str) -> Connected:
    """What is at an address; whoever opens it closes it."""
    from adapterhub.remotes import location

    return _open(location.parse(text))


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
@transfers.transfer_options
@click.pass_obj
def copy(settings: Settings, source: str, target: str, *, referrers: bool) -> None:
    """Copy an adapter under the same digest, wherever it is and wherever it goes.

    FROM and TO are each a ref of the registry here, a folder, or an address, oci://HOST/NAME[:TAG|@DIGEST] or
    hf://ORG/NAME[@REVISION]. Write a folder that could be a ref as ./NAME. What is there already isn't sent again.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.location import is_address

    if referrers:  # before the version has its tag there
        from . import attach

        output.say(f"{output.plural(attach.carry(source, target), 'attachment')} copied")
    if is_address(target):
        push(settings, source, target)
        return
    try:
        ref = None if target.startswith((".", os.sep)) else Ref.parse(target)
    except UsageError:
        ref = None
    if ref is not None:
        _into_registry(settings, source, ref)
    elif is_address(source):
        pull(settings, source, target)
    else:
        _into_folder(settings, source, target)


def push(
    settings: Settings,
    source: str,
    target: str,
    *,
    base: str | None = None,
    expect: str | None = None,
    force: bool = False,
    private: bool = False,
    conversion: Conversion | None = None,
    name: str | None = None,
) -> None:
    """What `push SRC oci://…` does; `name`: what the target is called on a remote."""
    from adapterhub.ref import LATEST
    from adapterhub.remotes.folders import AdapterFolder
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.location import expecting, is_address, parse

    address = parse(target)
    if address.digest:
        raise UsageError(target, "a version's digest comes of its files", f"Push to {address.repository}, or to a tag of it")
    rules.allowed(name or address.repository)
    skipped: tuple[str, ...] = ()
    ahead: transfers.Ahead | None = None
    as_image = forms.is_image(conversion)
    conversion = None if as_image else conversion
    with ExitStack() as stack:
        remote = stack.enter_context(_open(address))
        expecting(remote, expect)
        if private:
            _make_private(remote)
        ready: Source
        if is_address(source) and base is None and conversion is None:
            there = parse(source)
            ready, reference = stack.enter_context(_open(there)), there.reference
            rules.fits(ready, reference, source)
        elif (ref := inputs.ref_of(source, settings)) is not None and base is None and conversion is None:
            registry = stack.enter_context(open_registry(settings))
            version = stack.enter_context(registry.reading(ref))
            output.deprecated(str(version.ref), version.deprecated)
            ready, reference = Local(registry, version.name), version.digest
            rules.fits(ready, reference, str(version.ref))
        else:
            spec = inputs.read_base(base, settings) if base else None
            found = stack.enter_context(inputs.opened(source, settings))
            checked(found, spec, force=force)
            name = f"{address.title}/{address.title}"
            packaged = stack.enter_context(forms.packaged(found, conversion, spec, name=name))
            folder = stack.enter_context(pinned(packaged, spec))
            rules.folder_fits(folder, found.where)  # before anything is sent ahead
            ahead = None if as_image else transfers.Ahead(remote, address.host)  # no file of an image is one of the folder
            ready, reference = AdapterFolder(folder, found.where, ahead), LATEST
            skipped = ready.skipped
        copied = _copy(ready, reference, remote, address, as_image=as_image)
        copied = ahead.added(copied) if ahead else copied
    for item in skipped:
        output.say(output.one_line(f"left out: {item}"))
    made, ref_text = copied.manifest, address.version
    document = {
        **_aside(remote),
        "ref": ref_text,
        "tags": [address.reference],
        "digest": made.digest,
        "size": made.size,
        "sent": copied.sent,
        "skipped": list(skipped),
    }
    sent = "" if copied.sent else "already there: "
    text = f"{sent}{ref_text}  {output.size(made.size)}  {output.digest(made.digest)}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _make_private(remote: Any) -> None:
    if not hasattr(remote, "private"):
        raise UsageError("--private", "is for a repository on a hub, hf://ORG/NAME", "Leave it out")
    remote.private = True


def _copy(source: Source, reference: str, remote: Target, address: Place, *, as_image: bool = False) -> Copied:
    from adapterhub.remotes import copy as copying

    if as_image:
        from adapterhub.remotes.oci.image import Image

        source, reference = Image(source, reference), "latest"
    with bytes_bar(f"copying to {address.host}") as show:
        return copying.copy(source, reference, remote, address.reference, show, **transfers.how())


def pull(
    settings: Settings, source: str, out: str | None, *, plain: bool = True, ref: str | None = None, lock: bool = False
) -> None:
    """What `pull oci://…` does; `plain`: without a conversion; `ref`: what it is called on a remote; `lock`: is recorded."""
    from adapterhub.remotes.location import parse

    address = parse(source)
    if not plain:
        hint = f"Copy it first: `adapterhub copy {source} NAMESPACE/NAME`"
        raise UsageError("--as", "converts versions of the registry here", hint)
    target = Path(out) if out else Path(address.title)
    rules.allowed(ref.partition("@")[0].partition(":")[0] if ref else address.repository)
    with _open(address) as remote:
        rules.fits(remote, address.reference, str(address))
        made, new = downloaded(remote, address.reference, target, address.host)
    if lock:
        from .lock import keep

        keep(ref or source, source, made)
    files = [layer.path for layer in made.layers]
    document = {
        **_aside(remote),
        "ref": str(address),
        "digest": made.digest,
        "size": made.size,
        "output": str(target),
        "new": new,
        "files": files,
    }
    kind, many = "" if new else "already there: ", output.plural(len(files), "file")
    text = f"{kind}{target}: {address}, {many}, {output.size(made.size)}, verified"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def downloaded(remote: Source, reference: str, target: Path, host: str) -> tuple[Manifest, bool]:
    """Have a version of a remote in a folder, and whether it wasn't there; what is there already costs one request."""
    from adapterhub.remotes import folders
    from adapterhub.remotes.oci.image import Unpacked

    there: list[bool] = []
    with bytes_bar(f"pulling from {host}") as show:
        made = folders.download(Unpacked(remote), reference, target, show, found=lambda: there.append(True), **transfers.how())
    if made.facts is None:
        output.say("there was no adapter.json: it was derived from the files")
    return made, not there


def _aside(remote: object) -> dict[str, str]:
    """Say what a place has to say; the commit, if it has such, under which others know what was read or made."""
    commit = getattr(remote, "commit_id", "")
    for note in [*getattr(remote, "notes", ()), *([f"commit {commit}"] if commit else [])]:
        output.say(output.one_line(note))
    return {"commit": commit} if commit else {}


def fetch(text: str, below: Path) -> tuple[Path, str]:
    """The adapter at an address in a new folder below another, and the digest of its manifest."""
    from adapterhub.remotes.location import parse

    address = parse(text)
    folder = below / address.title
    with _open(address) as remote:
        return folder, downloaded(remote, address.reference, folder, address.host)[0].digest


def list_tags(settings: Settings, text: str, *, as_tree: bool) -> None:
    """What `list oci://…` does."""
    from adapterhub.remotes.location import parse

    address = parse(text)
    if as_tree or address.tag or address.digest:
        raise UsageError(
            "--tree" if as_tree else text, "the tags of a whole name are listed there", f"Name {address.repository}"
        )
    with _open(address) as remote:
        tags = remote.tags()
        commits: dict[str, str] = getattr(remote, "commits", {})
    if not tags:
        output.say("no tags")
    mark = getattr(address, "mark", ":")
    lines = [f"{address.repository}{mark}{tag}  {commits.get(tag, '')}".rstrip() for tag in tags]
    document = {"repository": address.repository, "tags": tags, **({"commits": commits} if commits else {})}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write("\n".join(lines)))


def list_remote(settings: Settings, prefix: str | None, name: str, *, as_tree: bool) -> None:
    """What `list [PREFIX] --remote NAME` does: tags of a whole name, else the names there are."""
    from adapterhub.remotes import location
    from adapterhub.remotes.configured import NOBODY, below, nobody
    from adapterhub.remotes.oci import credentials
    from adapterhub.remotes.oci.address import Address
    from adapterhub.remotes.oci.host import Host

    found = environment.remote(name)
    if as_tree or (prefix and "/" in prefix):
        list_tags(settings, below(found.url, prefix or NOBODY), as_tree=as_tree)
        return
    if not isinstance(location.parse(nobody(found.url)), Address):
        raise UsageError(found.url, "its kind doesn't tell which names it has", "Name one: namespace/name")
    place = Address.parse(below(found.url, prefix or NOBODY))
    who = surroundings()
    with Host(place, lambda: credentials.find(place.host, who.docker, who.logins, plain=place.plain)) as host:
        root = place.name.removesuffix(prefix or NOBODY)
        names = [one.removeprefix(root) for one in host.names() if one.startswith(root)]
    names = [one for one in names if not prefix or one == prefix or one.startswith(f"{prefix}/")]
    if not names:
        output.say(output.one_line(f"no names{f' of {prefix}' if prefix else ''} at {found.url}"))
    document = {"remote": found.name, "url": found.url, "names": names}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write("\n".join(names)) if names else None)


def _into_registry(settings: Settings, source: str, ref: Ref) -> None:
    rules.allowed(ref.name)
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
        with _open(address) as remote:
            made = remote.manifest(address.reference)
            if made.facts is not None:
                rules.fits(remote, made.digest, source)
                return _admitted(registry, remote, made.digest, ref)
    elif (found := inputs.ref_of(source, settings)) is not None:
        with registry.reading(found) as version:
            rules.fits(Local(registry, version.name), version.digest, str(version.ref))
            return _admitted(registry, Local(registry, version.name), version.digest, ref)
    with inputs.opened(source, settings) as opened, inputs.as_folder(opened) as folder:
        checked(opened, None, force=False)
        rules.folder_fits(folder, opened.where)
        return registry.push(folder, ref)


def _admitted(registry: Registry, source: Source, digest: str, ref: Ref) -> Version:
    from adapterhub.remotes import copy as copying
    from adapterhub.remotes.local import Local

    target = Local(registry, ref.name)
    with target.at_work(), bytes_bar("copying") as show:
        copying.copy(source, digest, target, ref.tag, show, **transfers.how())
    return target.version or registry.resolve(ref)


def _into_folder(settings: Settings, source: str, target: str) -> None:

    ref = inputs.ref_of(source, settings)
    if ref is None:
        raise UsageError(target, "is a folder, and so is what should be copied", "Copy it with the tools of your system")
    rules.ref_fits(settings, source)
    with open_registry(settings) as registry:
        version = registry.pull(ref, Path(target))
    output.deprecated(str(version.ref), version.deprecated)
    document: dict[str, Any] = {**version_document(version), "output": target}
    del document["new"], document["skipped"]
    text = f"{target}: {version.ref}, {output.size(version.size or 0)}, verified"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
