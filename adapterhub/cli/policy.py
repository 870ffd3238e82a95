"""The project's policy, asked of what is about to come or go; without one nothing is imported and nothing asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.cli import environment

from .options import Settings

if TYPE_CHECKING:
    from adapterhub.remotes.protocol import Source


def allowed(name: str) -> None:
    """RefusedError when the project doesn't allow the name of a ref, or an address."""
    if policy := environment.policy():
        policy.check_name(name)


def fits(source: Source, reference: str, where: str) -> None:
    """RefusedError when a version of `source` isn't what the project asks."""
    if (rules := environment.policy()) and rules.needs_manifest:
        from adapterhub.remotes import policy

        policy.check(rules, source, reference, where)


def folder_fits(folder: Path, where: str) -> None:
    """`fits`, of an adapter's own folder."""
    if (rules := environment.policy()) and rules.needs_manifest:
        from adapterhub.remotes.folders import AdapterFolder

        fits(AdapterFolder(folder), "latest", where)


def ref_fits(settings: Settings, text: str) -> None:
    """`allowed` and `fits`, of a version of the registry here."""
    if rules := environment.policy():
        from adapterhub.ref import Ref
        from adapterhub.remotes.local import Local

        ref = Ref.parse(text)
        allowed(ref.name)
        if rules.needs_manifest:
            with environment.open_registry(settings) as registry:
                fits(Local(registry, ref.name), registry.resolve(ref).digest, text)
