"""Adapters into an adapter: where it goes, the base they share, the merge itself."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cli import inputs, output, publish
from adapterhub.cli.progress import count_bar
from adapterhub_converters.errors import RefusedError, UsageError

from .options import Settings
from .views import merged

if TYPE_CHECKING:
    from adapterhub.manifest.document import AdapterManifest, BaseInfo
    from adapterhub.merge import MergeReport
    from adapterhub.ref import Ref


def destination(text: str, settings: Settings) -> Path | Ref:
    """The folder or the ref that OUT is; UsageError where it may be both.

    One word, or a path that begins with a dot or a slash, is a folder; what has a colon and is a ref is that. `a/b` is a ref
    where there is no folder `a`, and else could be either.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.location import is_address

    if is_address(text):
        raise UsageError(text, "is elsewhere, and a merge is made here", "Write a ref like team/both, and copy it from there")
    path = Path(text)
    try:
        ref = Ref.parse(text)
    except UsageError:
        if ":" in text and not path.parent.is_dir():
            raise
        return path
    if ref.number or ref.digest or ref.range:
        raise UsageError(text, "names a version, and a merge makes a new one", f"Write {ref.name}, or {ref.name}:TAG")
    if not ref.tag and path.parent.is_dir():
        raise UsageError(text, "may be a folder or an adapter", f"Write ./{text} for the folder, {text}:latest for the adapter")
    return ref


def into_adapter(
    settings: Settings,
    found: Sequence[inputs.Source],
    weights: Sequence[float],
    target: Path | Ref,
    *,
    method: str = "cat",
    rank_budget: int | None = None,
    plot: str | None = None,
    **how: Any,
) -> None:
    """Merge, push if the target is a ref, and say what came of it."""
    from adapterhub.registry import recipe
    from adapterhub_converters.containers import atomic

    if plot:
        from adapterhub.cli.views import merge_plot

        merge_plot.check()
        atomic.check_free(Path(plot), folder=False)
    base = _common_base(found)
    parents = [inputs.parent(source, weight) for source, weight in zip(found, weights, strict=True)]

    def make(out: Path) -> tuple[MergeReport, AdapterManifest]:
        with count_bar("merging") as progress:
            return recipe.merge(parents, out, method=method, budget=rank_budget, base=base, progress=progress, **how)

    version = None
    if isinstance(target, Path):
        report, made = make(target)
    else:
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
            folder = Path(temporary) / target.name.rpartition("/")[2]
            report, made = make(folder)
            version = publish.push_made(settings, folder, target)
    where = str(version.ref if version else target)
    if plot:
        merge_plot.draw(report, Path(plot), title=where)
    document = merged.document(where, version, report, made.to_dict()["parents"])
    output.emit(document, as_json=settings.as_json, text=lambda: output.write("\n".join(merged.lines(where, made, report))))


def _common_base(found: Sequence[inputs.Source]) -> BaseInfo | None:
    """The base that the adapters' manifests pin; RefusedError when they pin two."""
    from adapterhub.manifest.document import AdapterManifest

    pinned: dict[str, BaseInfo] = {}
    for source in found:
        manifest = AdapterManifest.read(source.folder)
        if manifest and manifest.base.fingerprint:
            pinned.setdefault(manifest.base.fingerprint, manifest.base)
    if len(pinned) > 1:
        names = " and ".join(base.repo or fingerprint[:19] for fingerprint, base in pinned.items())
        raise RefusedError("base", f"the adapters were trained on different models: {names}", "Merge adapters of one base")
    return next(iter(pinned.values()), None)
