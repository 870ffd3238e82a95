"""Adapters between folders, the registry and remotes: push, copy and pull. What is stored anywhere passes `registry.publish`.

A version that is copied keeps its digest. Its files are checked before they are stored as those of a folder are: a registry
of others may contain anything.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import ParameterError, RefusedError, UsageError

from . import sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.manifest.package_files import Selection
    from adapterhub.ref import Ref
    from adapterhub.registry.publish import Package
    from adapterhub.registry.recipe import Conversion
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.copy import Copied
    from adapterhub.remotes.location import Place
    from adapterhub.remotes.protocol import Connected, Source
    from adapterhub_converters.bases import BaseSpec

IMAGE = "image"
"""The `to` of a conversion that packages an adapter as a container image."""


@dataclass(frozen=True, repr=False)
class Sent:
    """A version at an address, as a push or copy left it.

    Attributes:
        ref: Its address.
        tag: The tag that points to it.
        digest: Of its manifest.
        size: Bytes of its files.
        sent: Bytes that had to be sent; the rest was there.
        new: False where the name had this version already.
        moved: True where the tag was at another version before, or at none.
        number: Its number, in a place that has numbers.
        skipped: Names in the pushed folder that were left out.
        overridden: Codes of the errors of its check that `force` accepted.
        commit: On a hub, the commit.
    """

    ref: str
    tag: str
    digest: Digest
    size: int
    sent: int
    new: bool = True
    moved: bool = True
    number: int | None = None
    skipped: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()
    commit: str = ""

    def __repr__(self) -> str:
        return f"<Sent {self.ref} {self.digest[:19]}: {self.size:,} bytes, {self.sent:,} sent>"


@dataclass(frozen=True, repr=False)
class Pulled:
    """An adapter's files, written and verified.

    Attributes:
        ref: The ref or address of its version.
        digest: Of its manifest.
        size: Bytes of its files.
        path: The folder or file that was written.
        files: Paths in the folder.
        new: False where the folder had just these files already.
        version: The version, of the registry.
        manifest: The OCI manifest, of an address.
        commit: On a hub, the commit.
        loss: Of a conversion: how many tensors came out how (`exact`, `rounded` …).
        cached: Of a conversion: it was made earlier.
    """

    ref: str
    digest: Digest
    size: int
    path: Path
    files: tuple[str, ...] = ()
    new: bool = True
    version: Version | None = None
    manifest: Manifest | None = None
    commit: str = ""
    loss: dict[str, int] | None = None
    cached: bool = False

    def __repr__(self) -> str:
        return f"<Pulled {self.path}: {self.ref} {self.digest[:19]}, {self.size:,} bytes>"


# ---- push


def check_target(target: str, workspace: Workspace) -> None:
    """Refuse a ref or an address that nothing can be pushed to, or that the policy does not allow, before work is done."""
    if sources.is_address(target):
        _address(target, workspace, None)
    else:
        _ref(target, workspace)


def push(
    source: StrPath,
    target: str,
    workspace: Workspace,
    *,
    base: BaseSpec | None = None,
    conversion: Conversion | None = None,
    expect: Digest | None = None,
    force: bool = False,
    private: bool = False,
    name: str | None = None,
    selection: Selection | None = None,
) -> Version | Sent:
    """Check an adapter and store it as a version, in the registry or at an address.

    Args:
        source: A folder, a file, a ref or an address.
        target: A ref of the registry, `namespace/name[:tag]`, or an address.
        workspace: The registry, the policy, credentials.
        base: The model it was trained on, to pin.
        conversion: Convert it first, and name the source as its parent.
        expect: The digest that the target must still have, or `absent`.
        force: Store an adapter whose check finds errors.
        private: Create a repository on a hub as private.
        name: The name of the target on a remote, which the policy is asked for instead of the address.
        selection: Patterns of files of a folder to package and to leave out.
    """
    if sources.is_address(target):
        return _push_to_address(
            source,
            target,
            workspace,
            base=base,
            conversion=conversion,
            expect=expect,
            force=force,
            private=private,
            name=name,
            selection=selection,
        )
    if conversion is not None and conversion.to == IMAGE:
        raise ParameterError("conversion", "an image is for remotes; versions in the registry are files", code="image-here")
    if private:
        raise ParameterError("private", "only a repository on a hub, hf://ORG/NAME, can be private", "Leave it out")
    ref = _ref(target, workspace)
    with (
        sources.opened(source, workspace) as found,
        packaged(
            found, workspace, base=base, conversion=conversion, force=force, name=ref.name, selection=selection
        ) as package,
        workspace.opened(make=True) as registry,
        workspace.bar("storing") as progress,
    ):
        return registry.publish(package, ref, expect=expect, progress=progress)


def store(folder: Path, ref: Ref, workspace: Workspace) -> Version:
    """Check an adapter that was made in a folder of its own, and store it; errors name the ref."""
    from adapterhub.registry import publish

    package = publish.package(folder, where=str(ref), policy=workspace.rules())
    with workspace.opened(make=True) as registry:
        return registry.publish(package, ref)


def _ref(target: str, workspace: Workspace) -> Ref:
    from adapterhub.ref import Ref, RefError

    ref = Ref.parse(target)
    if ref.number or ref.digest or ref.range:
        raise RefError(target, "a push assigns the number itself", f"Push to {ref.name}, or to {ref.name}:TAG")
    if policy := workspace.rules():
        policy.check_name(ref.name)
    return ref


def _address(target: str, workspace: Workspace, name: str | None) -> Place:
    from adapterhub.remotes.location import parse
    from adapterhub.remotes.references import is_range

    address = parse(target)
    if address.digest or is_range(address.tag or ""):
        what = "a version's digest follows from its files" if address.digest else "a range names versions that are there"
        raise UsageError(target, what, f"Push to {address.repository}, or to a tag of it")
    if policy := workspace.rules():
        policy.check_name(name or address.repository)
    return address


@contextmanager
def packaged(
    found: sources.Source,
    workspace: Workspace,
    *,
    name: str,
    base: BaseSpec | None = None,
    conversion: Conversion | None = None,
    force: bool = False,
    hash_below: int = 0,
    selection: Selection | None = None,
) -> Iterator[Package]:
    """The adapter, checked, or what it was converted to; `name` is the name of a converted file."""
    from adapterhub.registry import publish, recipe

    if conversion is None:
        with sources.as_folder(found) as folder:
            yield publish.package(
                folder,
                where=found.where,
                base=base,
                policy=workspace.rules(),
                force=force,
                hash_below=hash_below,
                selection=selection,
            )
        return
    overridden = publish.check_adapter(found.path, where=found.where, base=base, force=force)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "adapter"
        recipe.convert(sources.parent(found), folder, conversion, name=name.rpartition("/")[2], base=base)
        made = publish.package(folder, where=found.where, base=base, policy=workspace.rules(), checked=True)
        yield replace(made, overridden=overridden)


def _push_to_address(
    source: StrPath,
    target: str,
    workspace: Workspace,
    *,
    base: BaseSpec | None,
    conversion: Conversion | None,
    expect: Digest | None,
    force: bool,
    private: bool,
    name: str | None,
    selection: Selection | None,
) -> Sent:
    from adapterhub.ref import LATEST
    from adapterhub.remotes import copy as copying
    from adapterhub.remotes.folders import LARGE, AdapterFolder
    from adapterhub.remotes.location import expecting

    address = _address(target, workspace, name)
    as_image = conversion is not None and conversion.to == IMAGE
    conversion = None if as_image else conversion
    skipped: tuple[str, ...] = ()
    ahead: _Ahead | None = None
    with ExitStack() as stack:
        remote = stack.enter_context(workspace.connect(address))
        expecting(remote, expect)
        if private:
            remote.make_private()
        if base is None and conversion is None and (there := _version(source, workspace, stack, force=force)):
            ready, reference, overridden = there
        else:
            found = stack.enter_context(sources.opened(source, workspace))
            large = LARGE if remote.unnamed() and not as_image else sys.maxsize
            package = stack.enter_context(
                packaged(
                    found,
                    workspace,
                    name=address.title,
                    base=base,
                    conversion=conversion,
                    force=force,
                    hash_below=large,
                    selection=selection,
                )
            )
            ahead = None if as_image else _Ahead(remote, address.host, workspace)  # no file of an image is one of the folder
            ready, reference = AdapterFolder(package.folder, found.where, ahead, package.draft), LATEST
            skipped, overridden = ready.skipped, tuple(problem.code for problem in package.overridden)
        if as_image:
            from adapterhub.remotes.oci.image import Image

            ready, reference = Image(ready, reference), LATEST
        with workspace.bar(f"copying to {address.host}") as show:
            copied = copying.copy(ready, reference, remote, address.reference, show, **workspace.transfer())
    return replace(
        _sent(address, copied, remote, workspace),
        sent=copied.sent + (ahead.sent if ahead else 0),
        skipped=skipped,
        overridden=overridden,
    )


def _sent(address: Place, copied: Copied, remote: Connected, workspace: Workspace) -> Sent:
    made, put = copied.manifest, copied.put
    commit = notes(remote, workspace)
    return Sent(
        address.version,
        address.reference,
        made.digest,
        made.size,
        copied.sent,
        new=put.new,
        moved=put.moved,
        number=put.number,
        commit=commit,
    )


def tag(source: str, name: str, workspace: Workspace, *, expect: Digest | None = None) -> Sent:
    """Point a tag at the version at an address, in the same place; `expect` as in `push`."""
    from adapterhub.ref import LATEST, parse_tag
    from adapterhub.remotes import copy as copying
    from adapterhub.remotes.location import expecting, parse

    place = parse(source)
    if name == LATEST:
        raise UsageError(f"{place.repository}:{name}", "is always the newest push", "Choose another tag")
    target = _address(f"{place.repository}{place.mark}{parse_tag(name, source)}", workspace, None)
    with workspace.connect(place) as there, workspace.connect(target) as remote:
        expecting(remote, expect)
        copied = copying.copy(there, place.reference, remote, name, **workspace.transfer())
        return _sent(target, copied, remote, workspace)


def untag(address: str, workspace: Workspace) -> None:
    """Remove the tag at an address; its version stays."""
    from adapterhub.ref import LATEST
    from adapterhub.remotes import references
    from adapterhub.remotes.location import parse

    place = parse(address)
    with workspace.connect(place) as remote:
        if place.digest or references.number(place.tag or ""):
            raise RefusedError(address, "a version cannot be removed alone", "Name a tag")
        if place.tag == LATEST:
            raise RefusedError(address, "is always the newest push", "Name another tag")
        if not place.tag:
            raise remote.lacking("names that are removed from here", "Remove it with the tools of that place")
        remote.untag(place.tag)


def _version(
    source: StrPath, workspace: Workspace, stack: ExitStack, *, force: bool
) -> tuple[Source, str, tuple[str, ...]] | None:
    """A version to copy as it is, checked, with its digest and the errors that `force` accepted; None for a path."""
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.location import parse

    if sources.is_address(source):
        place = parse(os.fspath(source))
        remote = stack.enter_context(workspace.connect(place))
        ready, overridden = stack.enter_context(_checked(remote, place, os.fspath(source), workspace, force=force))
        return ready, place.reference, overridden
    ref = sources.ref_of(source, workspace)
    if ref is None:
        return None
    registry = stack.enter_context(workspace.opened())
    version = stack.enter_context(registry.reading(ref))
    workspace.deprecated(version.ref, version.deprecated)
    local = Local(registry, version.name, workspace.rules())
    return local, version.digest, local.check(local.manifest(version.digest), str(version.ref), force=force)


@contextmanager
def _checked(
    remote: Connected, place: Place, where: str, workspace: Workspace, *, force: bool
) -> Iterator[tuple[Source, tuple[str, ...]]]:
    """A remote whose version was fetched and checked; its blobs come from the disk where no registry can mount them."""
    from adapterhub.registry import publish
    from adapterhub.remotes.parallel import Fetched
    from adapterhub_converters.adapter_files import adapter_in

    check_policy(remote, place.reference, where, workspace)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / place.title
        made, _ = sources.downloaded(remote, place.reference, folder, place.host, workspace)
        with sources.naming(folder, where):
            errors = publish.check_adapter(adapter_in(folder), where=where, force=force)
        yield Fetched(remote, folder, made), tuple(problem.code for problem in errors)


def check_policy(source: Source, reference: str, where: str, workspace: Workspace) -> None:
    """Compare a version with the policy, before anything but its adapter.json is fetched."""
    if (policy := workspace.rules()) and policy.needs_manifest:
        from adapterhub.remotes.copy import read_manifest

        policy.check_manifest(read_manifest(source, source.manifest(reference), where), where)


def check_address(source: str, workspace: Workspace) -> None:
    """Compare the version at an address with the policy, as a pull does; nothing of its files is fetched."""
    from adapterhub.remotes.location import parse

    if (policy := workspace.rules()) is None:
        return
    address = parse(source)
    policy.check_name(address.repository)
    with workspace.connect(address) as remote:
        check_policy(remote, address.reference, source, workspace)


def notes(remote: Connected, workspace: Workspace) -> str:
    """Tell the notes of a remote; return the commit that was read or made, empty for a remote without commits."""
    commit = remote.commit_id
    for note in [*remote.notes, *([f"commit {commit}"] if commit else [])]:
        workspace.tell(note)
    return commit


class _Ahead:
    """Sends large files while they are hashed, to a remote that takes them so and surely has none of them."""

    def __init__(self, remote: Connected, host: str, workspace: Workspace) -> None:
        self._remote, self._host, self._workspace = remote.unnamed(), host, workspace
        self._may: bool | None = None if self._remote else False
        self.sent = 0

    def __call__(self, path: str, size: int, source: Source) -> Digest | None:
        """The digest of a file that was sent; None where it has to be hashed first."""
        from adapterhub.manifest.oci_manifest import Descriptor
        from adapterhub.remotes.parallel import Move, Pace

        remote = self._remote
        if remote and self._may is None:
            self._may = remote.is_new()
        if not remote or not self._may:
            return None
        with self._workspace.bar(f"copying to {self._host}") as show:
            move = Move([Descriptor("", "", size, path)], show, pace=Pace(self._workspace.rate))
            digest = remote.put_unnamed(size, path, move.watched(source))
        self.sent += size
        return digest


# ---- copy


def copy(source: StrPath, target: StrPath, workspace: Workspace) -> Version | Sent | Pulled:
    """Copy an adapter under the same digest: to a ref of the registry, an address, or a folder.

    A target that could be a ref is one; write a folder as `./NAME`, or give a `Path`.
    """
    from adapterhub.ref import Ref

    text = os.fspath(target)
    if sources.is_address(target):
        return push(source, text, workspace)
    try:
        ref = None if not isinstance(target, str) or text.startswith((".", os.sep)) else Ref.parse(text)
    except UsageError:
        ref = None
    if ref is not None:
        if policy := workspace.rules():
            policy.check_name(ref.name)
        with workspace.opened(make=True) as registry:
            return _into_registry(registry, source, ref, workspace)
    if not sources.is_address(source) and sources.ref_of(source, workspace) is None:
        raise UsageError(text, "both are folders", "Copy a folder with the tools of your system")
    return pull(os.fspath(source), target, workspace)


def _into_registry(registry: Registry, source: StrPath, ref: Ref, workspace: Workspace) -> Version:
    """A version of `ref` with the manifest of the source, or a new one where that has no adapter.json."""
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.location import parse

    if sources.is_address(source):
        place = parse(os.fspath(source))
        with workspace.connect(place) as remote:
            made = remote.manifest(place.reference)
            if made.adapter_json is not None:
                check_policy(remote, made.digest, os.fspath(source), workspace)
                return _admitted(registry, remote, made.digest, ref, workspace)
    elif (found := sources.ref_of(source, workspace)) is not None:
        with registry.reading(found) as version:
            local = Local(registry, version.name)
            check_policy(local, version.digest, str(version.ref), workspace)
            return _admitted(registry, local, version.digest, ref, workspace)
    with sources.opened(source, workspace) as one, packaged(one, workspace, name=ref.name) as package:
        return registry.publish(package, ref)


def _admitted(registry: Registry, source: Source, digest: str, ref: Ref, workspace: Workspace) -> Version:
    from adapterhub.remotes import copy as copying
    from adapterhub.remotes.local import Local

    target = Local(registry, ref.name, workspace.rules())
    with target.at_work(), workspace.bar("copying") as show:
        copying.copy(source, digest, target, ref.tag, show, **workspace.transfer())
    return target.version or registry.resolve(ref)


# ---- pull


def pull(
    source: str,
    out: StrPath | None,
    workspace: Workspace,
    *,
    conversion: Conversion | None = None,
    base: BaseSpec | None = None,
    model: str | None = None,
    name: str | None = None,
    replace: bool = False,
) -> Pulled:
    """Write a version's files, all of them and verified, or nothing.

    A folder that is another version, unmodified and stored elsewhere, is replaced; files that both have stay what they are.

    Args:
        source: A ref of the registry, or an address.
        out: The folder or file to write; None for the name of the adapter.
        workspace: The registry, the policy, credentials.
        conversion: Write it in another format, of a version in the registry; conversions are cached there.
        base: The model it is for, where the conversion needs more than its adapter.json has.
        model: The name of the base in Ollama, for `ollama`.
        name: The name of the source on a remote, which the policy is asked for instead of the address.
        replace: Replace an adapter at `out` that was modified or is stored nowhere else, or a converted one.

    Raises:
        OutputExistsError: `out` has something that would be lost.
    """
    if sources.is_address(source):
        if conversion is not None:
            raise ParameterError(
                "conversion", "only versions in the registry are converted", code="convert-there", address=source
            )
        return _pull_from_address(source, out, workspace, name=name, replace=replace)
    from adapterhub.manifest import present
    from adapterhub.ref import Ref

    ref = Ref.parse(source)
    if policy := workspace.rules():
        policy.check_name(ref.name)
    with workspace.opened() as registry:
        version = registry.resolve(ref)
        if policy and policy.needs_manifest:
            from adapterhub.remotes.local import Local

            local = Local(registry, ref.name, policy)
            local.check(local.manifest(version.digest), source, facts_only=True)
        if conversion is not None:
            from adapterhub.registry import conversion_cache  # late, with numpy: a plain pull only copies
            from adapterhub_converters import formats

            suffix = formats.FORMATS[conversion.to].suffix if conversion.to in formats.FORMATS else ""
            target = Path(out) if out else Path(ref.name.rpartition("/")[2] + suffix)
            form = conversion_cache.pull(
                registry, ref, target, conversion, base=base, model=model, policy=workspace.rules(), replace=replace
            )
            workspace.deprecated(form.version.ref, form.version.deprecated)
            size = form.version.size or 0
            return Pulled(
                str(form.version.ref),
                form.version.digest,
                size,
                target,
                version=form.version,
                loss=form.loss,
                cached=form.cached,
            )
        target = Path(out) if out else Path(ref.name.rpartition("/")[2])
        layers = registry.files(version)
        there = present.look(target)
        new = there is None or not there.holds(registry.oci_manifest(version))
        if new:
            if there is not None:
                if not replace:
                    there.check_lost(lambda digest: bool(registry.holding(digest)))
                workspace.tell(f"replaces {there}")
            with workspace.bar("writing") as progress:
                version = registry.pull(ref, target, progress, there=there)
    workspace.deprecated(version.ref, version.deprecated)
    files = tuple(layer.path for layer in layers)
    return Pulled(str(version.ref), version.digest, version.size or 0, target, files, new, version=version)


def _pull_from_address(source: str, out: StrPath | None, workspace: Workspace, *, name: str | None, replace: bool) -> Pulled:
    from adapterhub.remotes.location import parse

    address = parse(source)
    target = Path(out) if out else Path(address.title)
    if policy := workspace.rules():
        policy.check_name(name or address.repository)
    with workspace.connect(address) as remote:
        check_policy(remote, address.reference, str(address), workspace)
        made, new = sources.downloaded(remote, address.reference, target, address.host, workspace, replace=replace)
        commit = notes(remote, workspace)
    files = tuple(layer.path for layer in made.layers)
    return Pulled(str(address), made.digest, made.size, target, files, new, manifest=made, commit=commit)
