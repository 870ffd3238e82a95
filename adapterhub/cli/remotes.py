"""Places elsewhere: who asks, what is there, and how bytes come and go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output, policy
from adapterhub.cli.environment import data_folder, docker_config, hub, proxy

from .options import JOBS, RATE
from .progress import bytes_bar

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.remotes.copy import Copied
    from adapterhub.remotes.location import Place, Surroundings
    from adapterhub.remotes.protocol import Connected, Source, Target


def surroundings() -> Surroundings:
    """Who asks: the files and variables in which others keep that."""
    from adapterhub.remotes.location import Surroundings

    return Surroundings(docker_config(), hub, os.environ, data_folder() / "uploads", proxy)


def connect(place: Place) -> Connected:
    """Open a place as who runs the command."""
    from adapterhub.remotes import location

    return location.connect(place, surroundings())


def opened(text: str) -> Connected:
    """What is at an address; whoever opens it closes it."""
    from adapterhub.remotes import location

    return connect(location.parse(text))


def downloaded(remote: Source, reference: str, target: Path, host: str) -> tuple[Manifest, bool]:
    """Have a version of a remote in a folder, and whether it wasn't there; what is there already costs one request."""
    from adapterhub.remotes import folders
    from adapterhub.remotes.oci.image import Unpacked

    there: list[bool] = []
    with bytes_bar(f"pulling from {host}") as show:
        made = folders.download(Unpacked(remote), reference, target, show, found=lambda: there.append(True), **how())
    if made.adapter_json is None:
        output.say("there was no adapter.json: it was derived from the files")
    return made, not there


def pull(source: str, out: str | None, *, ref: str | None = None) -> tuple[Manifest, dict[str, Any], str]:
    """Write what is at an address into a folder: its manifest, document and line. `ref`: its name on a remote."""
    from adapterhub.remotes.location import parse

    address = parse(source)
    target = Path(out) if out else Path(address.title)
    policy.allowed(ref.partition("@")[0].partition(":")[0] if ref else address.repository)
    with connect(address) as remote:
        policy.fits(remote, address.reference, str(address))
        made, new = downloaded(remote, address.reference, target, address.host)
    files = [layer.path for layer in made.layers]
    document = {
        **notes(remote),
        "ref": str(address),
        "digest": made.digest,
        "size": made.size,
        "output": str(target),
        "new": new,
        "files": files,
    }
    kind, many = "" if new else "already there: ", output.plural(len(files), "file")
    return made, document, f"{kind}{target}: {address}, {many}, {output.size(made.size)}, verified"


def fetch(text: str, below: Path) -> tuple[Path, str]:
    """The adapter at an address in a new folder below another, and the digest of its manifest."""
    from adapterhub.remotes.location import parse

    address = parse(text)
    folder = below / address.title
    with connect(address) as remote:
        return folder, downloaded(remote, address.reference, folder, address.host)[0].digest


def copy(source: Source, reference: str, remote: Target, address: Place, *, as_image: bool = False) -> Copied:
    """Copy a version to an address, or a container image of it."""
    from adapterhub.remotes import copy as copying

    if as_image:
        from adapterhub.remotes.oci.image import Image

        source, reference = Image(source, reference), "latest"
    with bytes_bar(f"copying to {address.host}") as show:
        return copying.copy(source, reference, remote, address.reference, show, **how())


def notes(remote: Connected) -> dict[str, str]:
    """Print the remarks of a remote; return the commit that was read or made, if it has commits."""
    commit = remote.commit_id
    for note in [*remote.notes, *([f"commit {commit}"] if commit else [])]:
        output.say(output.one_line(note))
    return {"commit": commit} if commit else {}


def how() -> dict[str, Any]:
    """What the options of the command that runs say to `copying.copy` and `folders.download`."""
    from adapterhub.remotes.parallel import Pace

    context = click.get_current_context(silent=True)
    said = context.meta if context else {}
    return {"jobs": said.get(JOBS) or 4, "pace": Pace(said.get(RATE))}


class Ahead:
    """Has large files sent while they are hashed, where a place can take them so and surely has none of them."""

    def __init__(self, remote: Connected, host: str) -> None:
        self._remote, self._host = remote.unnamed(), host
        self._may: bool | None = None if self._remote else False
        self._sent = 0

    def __call__(self, path: str, size: int, source: Source) -> Digest | None:
        """The digest of a file that was sent; None where it has to be hashed first."""
        remote = self._remote
        if remote and self._may is None:
            self._may = remote.is_new()
        if not remote or not self._may:
            return None
        from adapterhub.manifest.oci_manifest import Descriptor
        from adapterhub.remotes.parallel import Move

        with bytes_bar(f"copying to {self._host}") as show:
            move = Move([Descriptor("", "", size, path)], show, pace=how()["pace"])
            digest = remote.put_unnamed(size, path, move.watched(source))
        self._sent += size
        return digest

    def added(self, copied: Copied) -> Copied:
        """What was copied, with what was sent ahead."""
        from dataclasses import replace

        return replace(copied, sent=copied.sent + self._sent)
