"""How an adapter becomes a version: checked, asked of the policy, pinned, converted, stored; here or elsewhere."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub_converters.errors import AdapterhubError, RefusedError, UsageError

from . import inputs, output, policy, remotes
from .environment import open_registry
from .options import Settings, is_image
from .progress import bytes_bar
from .views.versions import version_document

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.registry.recipe import Conversion
    from adapterhub.registry.registry import Version
    from adapterhub.remotes.protocol import Source
    from adapterhub_converters.bases import BaseSpec


class Published(NamedTuple):
    """What came of a push: for programs, and as a line."""

    document: dict[str, Any]
    text: str


def check(ref: str) -> None:
    """Refuse what could not be pushed to, before hours go into it."""
    from adapterhub.ref import Ref, RefError
    from adapterhub.remotes.location import is_address, parse

    if is_address(ref):
        policy.allowed(parse(ref).repository)
        return
    target = Ref.parse(ref)
    if target.number or target.digest or target.range:
        raise RefError(ref, "a push allots the number itself", f"Push to {target.name}, or to {target.name}:TAG")
    policy.allowed(target.name)


def push(
    settings: Settings,
    source: str,
    ref: str,
    *,
    base: str | None = None,
    expect: str | None = None,
    force: bool = False,
    private: bool = False,
    conversion: Conversion | None = None,
    name: str | None = None,
) -> Published:
    """Store an adapter as a version, here or at an address; `name`: what the target is called on a remote."""
    from adapterhub.remotes.location import is_address

    push_to = _elsewhere if is_address(ref) else _here
    return push_to(
        settings, source, ref, base=base, expect=expect, force=force, private=private, conversion=conversion, name=name
    )


def _here(
    settings: Settings,
    source: str,
    ref: str,
    *,
    base: str | None,
    expect: str | None,
    force: bool,
    private: bool,
    conversion: Conversion | None,
    name: str | None,
) -> Published:
    from adapterhub.ref import Ref

    if is_image(conversion):
        raise UsageError("--as image", "is for places elsewhere: versions here are files", "Name one like layout://x.tar:v1")
    if private:
        raise UsageError("--private", "is for a repository on a hub, hf://ORG/NAME", "Leave it out")
    target = Ref.parse(ref)
    policy.allowed(target.name)
    spec = inputs.read_base(base, settings) if base else None
    with inputs.opened(source, settings) as found:
        checked(found, spec, force=force)
        with (
            _packaged(found, conversion, spec, name=target.name) as folder,
            _pinned(folder, spec) as ready,
            open_registry(settings, make=True) as registry,
            bytes_bar("storing") as progress,
        ):
            policy.folder_fits(ready, found.where)
            version = registry.push(ready, target, expect=expect, progress=progress)
    for left in version.skipped:
        output.say(output.one_line(f"left out: {left}"))
    kind = "" if version.new else "already there: "
    tags = f" ({', '.join(version.tags)})" if version.tags else ""
    text = f"{kind}{version.ref}{tags}  {output.size(version.size or 0)}  {output.digest(version.digest)}"
    return Published(version_document(version), text)


def _elsewhere(
    settings: Settings,
    source: str,
    target: str,
    *,
    base: str | None,
    expect: str | None,
    force: bool,
    private: bool,
    conversion: Conversion | None,
    name: str | None,
) -> Published:
    from adapterhub.ref import LATEST
    from adapterhub.remotes.folders import AdapterFolder
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.location import expecting, is_address, parse

    address = parse(target)
    if address.digest:
        raise UsageError(target, "a version's digest comes of its files", f"Push to {address.repository}, or to a tag of it")
    policy.allowed(name or address.repository)
    skipped: tuple[str, ...] = ()
    ahead: remotes.Ahead | None = None
    as_image = is_image(conversion)
    conversion = None if as_image else conversion
    with ExitStack() as stack:
        remote = stack.enter_context(remotes.connect(address))
        expecting(remote, expect)
        if private:
            remote.make_private()
        ready: Source
        if is_address(source) and base is None and conversion is None:
            there = parse(source)
            ready, reference = stack.enter_context(remotes.connect(there)), there.reference
            policy.fits(ready, reference, source)
        elif (ref := inputs.ref_of(source, settings)) is not None and base is None and conversion is None:
            registry = stack.enter_context(open_registry(settings))
            version = stack.enter_context(registry.reading(ref))
            output.deprecated(str(version.ref), version.deprecated)
            ready, reference = Local(registry, version.name), version.digest
            policy.fits(ready, reference, str(version.ref))
        else:
            spec = inputs.read_base(base, settings) if base else None
            found = stack.enter_context(inputs.opened(source, settings))
            checked(found, spec, force=force)
            packaged = stack.enter_context(_packaged(found, conversion, spec, name=f"{address.title}/{address.title}"))
            folder = stack.enter_context(_pinned(packaged, spec))
            policy.folder_fits(folder, found.where)  # before anything is sent ahead
            ahead = None if as_image else remotes.Ahead(remote, address.host)  # no file of an image is one of the folder
            ready, reference = AdapterFolder(folder, found.where, ahead), LATEST
            skipped = ready.skipped
        copied = remotes.copy(ready, reference, remote, address, as_image=as_image)
        copied = ahead.added(copied) if ahead else copied
    for item in skipped:
        output.say(output.one_line(f"left out: {item}"))
    made, ref_text = copied.manifest, address.version
    document = {
        **remotes.notes(remote),
        "ref": ref_text,
        "tags": [address.reference],
        "digest": made.digest,
        "size": made.size,
        "sent": copied.sent,
        "skipped": list(skipped),
    }
    sent = "" if copied.sent else "already there: "
    text = f"{sent}{ref_text}  {output.size(made.size)}  {output.digest(made.digest)}"
    return Published(document, text)


def push_trained(settings: Settings, folder: Path, ref: str) -> dict[str, Any]:
    """What `adapterhub push FOLDER REF --json` says; an error says that the folder is still there."""
    source = str(folder) if folder.is_absolute() else os.path.join(".", folder)  # never a ref of that name
    try:
        return push(settings, source, ref).document
    except AdapterhubError as error:
        again = f"The adapter is in {folder}; `adapterhub push {source} {ref}` tries again"
        error.hint = f"{error.hint}. {again}" if error.hint else again
        raise


def push_made(settings: Settings, folder: Path, target: Ref) -> Version:
    """Store what a merge made in a folder of its own."""
    checked(inputs.Source(folder, folder, str(target)), None, force=False)
    with open_registry(settings, make=True) as registry:
        return registry.push(folder, target)


def checked(found: inputs.Source, base: BaseSpec | None, *, force: bool) -> None:
    """Refuse what `validate` finds errors in, unless forced: then say how many."""
    from adapterhub import check

    report = check.check(found.path, base=base, where=found.where)
    if report.ok:
        return
    errors = [problem for problem in report.problems if problem.severity == check.ERROR]
    if force:
        output.say(output.one_line(f"pushed in spite of {output.plural(len(errors), 'error')}, the first {errors[0].code}"))
        return
    misfit = f"does not fit {base.where}: " if base and any(problem.code in check.FIT for problem in errors) else ""
    more = f" (and {output.plural(len(errors) - 1, 'more error')})" if len(errors) > 1 else ""
    where = f"{errors[0].where}: " if errors[0].where else ""
    with_base = f" --base {base.where}" if base else ""
    hint = f"`adapterhub validate {found.where}{with_base}` says more, --force pushes it all the same"
    raise RefusedError(found.where, f"{misfit}{errors[0].code}: {where}{errors[0].what}{more}", hint)


@contextmanager
def _packaged(found: inputs.Source, conversion: Conversion | None, base: BaseSpec | None, *, name: str) -> Iterator[Path]:
    """The folder to push: the adapter's own, or one with what it was converted to."""
    if conversion is None:
        with inputs.as_folder(found) as folder:
            yield folder
        return
    from adapterhub.registry import recipe

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "adapter"
        recipe.convert(inputs.parent(found), folder, conversion, name=name.rpartition("/")[2], base=base)
        yield folder


@contextmanager
def _pinned(folder: Path, base: BaseSpec | None) -> Iterator[Path]:
    """The folder, or a copy of it whose adapter.json pins the base."""
    if base is None:
        yield folder
        return
    from adapterhub.manifest import describe
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.manifest.package_files import listing
    from adapterhub_converters.adapter_files import ADAPTER_JSON

    manifest = AdapterManifest.read(folder) or describe.describe(folder)
    pinned = describe.describe(folder, base=base).base
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        for path in listing(folder).files:
            if path != ADAPTER_JSON:
                (Path(temporary) / path).parent.mkdir(parents=True, exist_ok=True)
                inputs.place(folder / path, Path(temporary) / path)
        dataclasses.replace(manifest, base=manifest.base.filled_from(pinned)).write(Path(temporary))
        yield Path(temporary)
