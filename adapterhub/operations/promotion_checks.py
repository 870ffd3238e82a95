"""Requirements of a project on tags at an address, where no log has the evidence: the registry here must have promoted it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapterhub.project.tag_rules import UNMET
from adapterhub.registry import withdrawals
from adapterhub_converters.errors import NotFoundError, RefusedError

from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.remotes.remote_address import RemoteAddress


def check_tags_at(address: RemoteAddress, tags: Iterable[str | None], digest: Digest, workspace: Workspace) -> None:
    """Compare tags that are about to be set at an address with the requirements of the project.

    Raises:
        RefusedError: One has requirements, and no name of the registry has it at the version with this digest.
    """
    rules = workspace.rules()
    gated_tags = sorted(rules.gated_tags().intersection(tag for tag in tags if tag)) if rules else []
    if not gated_tags:
        return
    from adapterhub.remotes.remote_address import name_of

    try:
        with workspace.open_registry() as registry:
            rows = registry.versions_with(digest)
            rows = [row for row in rows if digest not in withdrawals.reasons(registry.index, row.name)]
    except NotFoundError:  # no registry
        rows = []
    promoted_tags = {tag for row in rows for tag in row.tags}
    ref = str(rows[0].ref) if rows else name_of(address)
    for tag in gated_tags:
        if tag not in promoted_tags:
            problem = f"the project has requirements on it, and no version of these bytes is {tag} in the registry here"
            location, hint = f"{address.repository}:{tag}", "Promote it there first"
            raise RefusedError(location, problem, hint, code=UNMET, ref=ref, tag=tag)
