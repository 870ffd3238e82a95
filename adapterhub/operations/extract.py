"""Extraction of an adapter from a full fine-tune of a base, into a folder or a version of the registry."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from . import push
from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.merging.into_base.extraction import Extraction, ExtractionOptions
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Version
    from adapterhub_converters.adapter import Adapter


def extract(
    base: Path, tuned: Path, target: Path | Ref, options: ExtractionOptions, workspace: Workspace, *, replace: bool = False
) -> tuple[Adapter, Extraction, Version | None]:
    """Extract an adapter from a full fine-tune of a base, into a new folder or as a version of the registry."""
    from adapterhub.manifest import derive
    from adapterhub.merging.into_base import extraction as difference
    from adapterhub_converters import bases
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import peft

    if isinstance(target, Path):
        atomic.check_free(target, replace=replace)
    else:
        push.check_target(str(target), workspace)
    with workspace.steps("extracting weights") as progress:
        adapter, report = difference.extract(base, tuned, options, progress=progress)

    def write(folder: Path) -> None:
        peft.write(adapter, folder)
        derive.describe(folder, base=bases.read_hf(base)).write(folder)

    if isinstance(target, Path):
        with atomic.pending_output(target, replace=replace) as scratch:
            write(scratch)
        return adapter, report, None
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        write(Path(temporary))
        return adapter, report, push.store(Path(temporary), target, workspace)
