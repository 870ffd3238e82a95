"""Setting and removing tags at an address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_converters.errors import RefusedError, UsageError

from .promotion_checks import check_tags_at
from .push_result import PushResult, push_result, target_address
from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest


def tag(address: str, name: str, workspace: Workspace, *, expect: Digest | None = None) -> PushResult:
    """Point a tag at the version at an address, in the same place; `expect` as in `push`."""
    from adapterhub.ref import LATEST, parse_tag
    from adapterhub.remotes import version_copy as copying
    from adapterhub.remotes.parallel_transfer import PinnedSource
    from adapterhub.remotes.remote_address import expect_digest, parse

    place = parse(address)
    if name == LATEST:
        problem = "is always the newest push"
        raise UsageError(f"{place.repository}:{name}", problem, "Choose another tag", code="latest-tag", name=place.repository)
    target = target_address(f"{place.repository}{place.mark}{parse_tag(name, address)}", workspace)
    with workspace.connect(place) as source_remote, workspace.connect(target) as remote:
        expect_digest(remote, expect)
        # What is checked must be what the tag is set to, even if the reference moves in between.
        source = PinnedSource(source_remote)
        check_tags_at(target, [name], source.manifest(place.reference).digest, workspace)
        copied = copying.copy_version(source, place.reference, remote, name, **workspace.transfer())
        return push_result(target, copied, remote, workspace)


def untag(address: str, workspace: Workspace) -> None:
    """Remove the tag at an address; its version stays."""
    from adapterhub.ref import LATEST
    from adapterhub.registry import version_selection
    from adapterhub.remotes.remote_address import parse

    place = parse(address)
    with workspace.connect(place) as remote:
        if place.digest or version_selection.number(place.tag or ""):
            raise RefusedError(address, "a version cannot be removed alone", "Name a tag")
        if place.tag == LATEST:
            problem = "is always the newest push"
            raise RefusedError(address, problem, "Name another tag", code="latest-tag", name=place.repository)
        if not place.tag:
            raise remote.unsupported_error("removal of names from here", "Remove it with the tools of that place")
        remote.untag(place.tag)
