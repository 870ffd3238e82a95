"""`adapterhub pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import environment, inputs, locks, output, policy, remotes
from adapterhub.cli.environment import (
    at_remote,
    complete_ref,
    hinting,
    open_registry,
    remote_option,
)
from adapterhub.cli.options import Settings, command, conversion_options, transfer_options
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views.versions import version_document
from adapterhub_converters.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from adapterhub.project.lockfile import Locked
    from adapterhub.registry.recipe import Conversion


_FOLDER = "adapters"


_NETWORK = ("http://", "https://", "hf://")


@command(
    "pull",
    short="Write a version's files, verified.",
    example="""
    adapterhub pull team/sql:v2
    adapterhub pull team/sql:prod -o ./sql-prod
    adapterhub pull team/sql:v2 --as gguf
    adapterhub pull team/sql:v2 --remote
    adapterhub pull team/sql:v2 --from adapters.tar --offline
    adapterhub pull oci://registry.example/team/sql:v2 -o ./sql
    adapterhub pull --locked -o ./adapters""",
)
@click.argument("ref", required=False, shell_complete=complete_ref)
@click.option("-o", "--output", "out", metavar="OUT", help="Where to write it. [default: ./NAME, with its ending for a file]")
@click.option("--base", metavar="BASE", help="The model it is for, where --as needs more than its adapter.json says.")
@remote_option
@click.option("--lock", is_flag=True, help="Record in adapters.lock which version it is.")
@click.option("--locked", is_flag=True, help="Pull what adapters.lock says, by digest: REF, or all of it below OUT.")
@click.option("--from", "bundled", metavar="BUNDLE", help="Take it from a bundle, a .tar or a folder, not from a registry.")
@click.option("--offline", is_flag=True, help="Ask no network: refused where REF or BASE is elsewhere.")
@conversion_options("Convert it on the way out.", more=("ollama",))
@click.option("--model", metavar="MODEL", help="With --as ollama: what Ollama calls the base; else the path of --base.")
@transfer_options
@click.pass_obj
def pull(
    settings: Settings,
    *,
    ref: str | None,
    out: str | None,
    base: str | None,
    remote: str | None,
    lock: bool,
    locked: bool,
    bundled: str | None,
    offline: bool,
    conversion: Conversion | None,
    model: str | None,
) -> None:
    """Write a version's files into a new folder: every byte verified, all of them or nothing.

    With --as in another format, under the rules of convert: a conversion is kept in the registry, so that the next is a copy.
    From elsewhere (oci://HOST/NAME[:TAG|@DIGEST], or a remote) a pull that was stopped, even killed, goes on where it was.
    What lies there already, right, is left as it is.
    """
    from adapterhub.remotes.location import is_address

    if model and conversion is None:
        raise UsageError("--model", "is for --as ollama", "Leave it out")
    if locked or ref is None:
        alone = not (lock or remote is not None or base is not None or conversion is not None or bundled or offline)
        _all_locked(settings, ref, out, locked=locked, alone=alone)
        return
    address = at_remote(ref, remote)
    if bundled or offline:
        address = _in_bundle(address, bundled, base=base, offline=offline)
    if is_address(address):
        if conversion is not None or base is not None:
            hint = f"Copy it first: `adapterhub copy {address} NAMESPACE/NAME`"
            raise UsageError("--as", "converts versions of the registry here", hint)
        called = None if remote is None else ref
        _from_address(settings, address, out, ref=called, lock=(called or address) if lock else None)
        return
    with hinting(ref):
        policy.ref_fits(settings, ref)
        if conversion is not None:
            if lock:
                raise UsageError(
                    "--lock", "records the version itself, not a conversion of it", "Lock it with `adapterhub lock`"
                )
            _converted(settings, ref, out, base, conversion, model=model)
        elif base is not None:
            raise UsageError("--base", "is for --as", "Leave it out")
        else:
            _pull(settings, ref, out, lock=lock)


def _pull(settings: Settings, ref: str, out: str | None, *, lock: bool) -> None:
    from adapterhub.ref import Ref

    wanted = Ref.parse(ref)
    target = Path(out) if out else Path(wanted.name.rpartition("/")[2])
    with open_registry(settings) as registry:
        with bytes_bar("writing") as progress:
            version = registry.pull(wanted, target, progress)
        files = [layer.path for layer in registry.files(version)]
    if lock:
        locks.keep_version(settings, ref, version)
    document = {**version_document(version), "output": str(target), "files": files}
    del document["new"], document["skipped"]
    output.deprecated(str(version.ref), version.deprecated)
    size = output.size(version.size or 0)
    text = f"{target}: {version.ref}, {output.plural(len(files), 'file')}, {size}, verified"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _converted(
    settings: Settings, ref: str, out: str | None, base: str | None, conversion: Conversion, *, model: str | None
) -> None:
    """What `pull --as` does."""
    from adapterhub.ref import Ref
    from adapterhub.registry import conversion_cache
    from adapterhub_converters.formats import convert

    if model and conversion.to not in convert.PACKAGES:
        raise UsageError("--model", f"{conversion.to} names no base", "Leave it out")
    wanted = Ref.parse(ref)
    target = Path(out) if out else Path(wanted.name.rpartition("/")[2] + convert.ENDINGS.get(conversion.to, ""))
    spec = inputs.read_base(base, settings) if base else None
    with open_registry(settings) as registry:
        named = model or (inputs.here(base) if conversion.to in convert.PACKAGES else None)
        form = conversion_cache.pull(registry, wanted, target, conversion, base=spec, model=named)
    document = {
        "ref": str(form.version.ref),
        "digest": form.version.digest,
        "deprecated": form.version.deprecated,
        "output": str(target),
        "format": conversion.to,
        "loss": form.loss,
        "cached": form.cached,
    }
    output.deprecated(str(form.version.ref), form.version.deprecated)
    losses = ", ".join(f"{count} {name}" for name, count in form.loss.items())
    kept = ", kept from before" if form.cached else ""
    text = f"{target}: {form.version.ref} as {conversion.to}, {sum(form.loss.values())} tensors: {losses}{kept}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _from_address(settings: Settings, address: str, out: str | None, *, ref: str | None, lock: str | None) -> None:
    """What `pull oci://…` does; `ref`: what it is called on a remote; `lock`: what it is recorded as."""
    made, document, text = remotes.pull(address, out, ref=ref)
    if lock:
        locks.keep(lock, address, made)
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _in_bundle(text: str, source: str | None, *, base: str | None, offline: bool) -> str:
    """What a pull takes: `text` itself, or the address of what it means in a bundle. Nothing is asked of a network.

    Raises:
        UsageError: `offline`, and it would be.
    """
    from adapterhub.remotes import location
    from adapterhub.remotes.layouts import location as layout
    from adapterhub.remotes.layouts.bundle import named

    if offline:
        for word in (text, base or ""):
            near = location.is_address(word) and isinstance(location.parse(word), layout.LayoutAddress)
            if not near and (location.is_address(word) or word.lower().startswith(_NETWORK)):
                raise UsageError(
                    word, "is elsewhere, and --offline asks no network", "Leave --offline out, or name what is here"
                )
    if source is None:
        return text
    if location.is_address(text):
        raise UsageError(text, "is an address; with --from it takes the name in the bundle", "Write it like team/sql:v2")
    address = location.parse(source if location.is_address(source) else f"layout://{source}")
    if not isinstance(address, layout.LayoutAddress):
        raise UsageError(source, "is not a bundle", "Name a folder or a .tar; pull the address itself")
    if address.tag or address.digest:
        raise UsageError(source, "names a version, and so does the ref", f"Write --from {address.path}")
    with layout.connect(address) as bundled:
        name = named(bundled, text)
    return f"{address.repository}{'@' if name.startswith('sha256:') else ':'}{name}"


def _all_locked(settings: Settings, ref: str | None, out: str | None, *, locked: bool, alone: bool) -> None:
    """What `pull --locked` does: all, below a folder, or one into one. `alone`: no other option says what and from where."""
    from adapterhub.project import lockfile

    if not locked:
        raise UsageError("pull", "Missing argument 'REF'", "`adapterhub pull --help` says how")
    if not alone:
        raise UsageError("--locked", "has what and from where in the lock file", "Leave --remote, --lock, --as and --base out")
    path = environment.lock_file()
    there = lockfile.read(path)
    if ref is None:
        below = Path(out or _FOLDER)
        wanted = [(one, below / one.name) for one in sorted(there.values(), key=lambda one: one.name)]
    else:
        one = lockfile.find(there, ref, path)
        wanted = [(one, Path(out) if out else Path(one.name.rpartition("/")[2]))]
    if not wanted:
        raise UsageError(str(path), "has no adapters", "`adapterhub lock REF…` puts some there")
    documents = []
    for one, target in wanted:
        new = _one_locked(settings, one, target)
        documents.append({"name": one.name, **one.document(), "output": str(target), "new": new})
        if not settings.as_json:
            text = f"{target}: {one.name}@{output.digest(one.digest)}, {output.size(one.size)}, verified"
            output.write(f"{'' if new else 'already there: '}{text}")
    if settings.as_json:
        output.write_json({"adapters": documents})


def _one_locked(settings: Settings, locked: Locked, target: Path) -> bool:
    """Have a folder be the locked version; whether it wasn't."""
    from adapterhub.project import lockfile

    policy.allowed(locked.name)
    if lockfile.is_version(target, locked.digest):
        return False
    if locked.source == lockfile.HERE:
        from adapterhub.ref import Ref

        ref = Ref(locked.name, digest=locked.digest)
        policy.ref_fits(settings, str(ref))
        with open_registry(settings) as registry:
            registry.pull(ref, target)
        return True
    from adapterhub.remotes import location

    with remotes.opened(locked.source) as there:
        policy.fits(there, locked.digest, locked.ref)
        made, new = remotes.downloaded(there, locked.digest, target, location.parse(locked.source).host)
    if made.digest != locked.digest:
        raise IntegrityError(locked.source, f"{made.digest} came, not {locked.digest}", "Ask its owner")
    return new
