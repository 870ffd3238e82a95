"""Results of other evaluation tools, bound to the bytes that they are about: recorded in the log of a version, and signed.

A result counts for a version only if the file shows that this version answered: by the digest in each answer, or by a folder
whose adapter has it. Everything else is a name, which another version may have had when it was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.evidence.result_files import reading
from adapterhub.evidence.version_names import OTHER_VERSION, UNNAMED_VERSION
from adapterhub.manifest.measurement import Evaluation, check_name
from adapterhub_converters.errors import AdapterhubError, RefusedError, UsageError
from adapterhub_converters.formats import peft
from adapterhub_converters.lazy_dataclass import dataclass

from . import evaluation_log, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.evidence.result_files.imported_result import ImportedResult

_MAX_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class ImportedEvaluations:
    """The evaluations of a version that came from files.

    Attributes:
        ref: The version.
        digest: The digest of its manifest.
        evaluations: One for each task.
        recorded: Whether they are in the log of the version.
    """

    ref: str
    digest: Digest
    evaluations: tuple[Evaluation, ...]
    recorded: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics as a search names them, and of a single evaluation also by their own names."""
        named = {name: value for item in self.evaluations for name, value in item.searchable_metrics.items()}
        return {**named, **(self.evaluations[0].metrics if len(self.evaluations) == 1 else {})}


def import_results(
    source: StrPath,
    files: Sequence[StrPath],
    *,
    name: str | None = None,
    trust_name: bool = False,
    record: bool = True,
    workspace: Workspace | None = None,
) -> ImportedEvaluations:
    """Read result files of lm-evaluation-harness, promptfoo, inspect_ai or JUnit as evaluations of a version.

    Args:
        source: A ref of the registry, or an address.
        files: The files.
        name: The name of the evaluation, where the files have one task; None for the names of the tasks.
        trust_name: Accept results that name a model, and not its digest. Those that name another digest are refused.
        record: Record them in the log of the version.
        workspace: The registry.

    Raises:
        FormatError: A file is malformed, or of no tool that is known.
        RefusedError: A result is about another version, or does not say by its digest which one it is about.
        UsageError: `source` is not a version of the registry, or two tasks have one name.
    """
    workspace = workspace or Workspace()
    version = evaluation_log.find_version(source, workspace, "which a result could be about")
    results = [(str(file), result) for file in files for result in reading.read(Path(file))]
    if name is not None and len(results) > 1:
        raise UsageError("name", f"is one, and the files have {len(results)} tasks", "Leave it out, or import them one by one")
    evaluations: dict[str, Evaluation] = {}
    for file, result in results:
        trusted = _check_version(result, version.digest, file, trust_name=trust_name, workspace=workspace)
        evaluation = _evaluation(result, check_name(name or result.task, "name"), Path(file), trusted)
        if evaluation.name in evaluations:
            raise UsageError(file, f"has the task {evaluation.name!r}, as another file has", "Import them one by one")
        evaluations[evaluation.name] = evaluation
    measured = tuple(evaluations.values())
    is_recorded = record and evaluation_log.record(version.place, version.digest, measured, workspace)
    return ImportedEvaluations(version.place, version.digest, measured, is_recorded)


def _evaluation(result: ImportedResult, name: str, file: Path, trusted: str) -> Evaluation:
    digest = {"digest": result.data_digest} if result.data_digest else {}
    measured_by: dict[str, Any] = {"tool": result.tool, "version": result.tool_version, "file": file.name}
    if trusted:
        measured_by["trusted_name"] = trusted
    return Evaluation(name, result.metrics, ({"path": result.task, **digest},), measured_by, result.cases)


def _check_version(result: ImportedResult, digest: Digest, file: str, *, trust_name: bool, workspace: Workspace) -> str:
    """Return the name that had to be trusted; empty where the file shows the digest. RefusedError for another version."""
    location = f"{file}: {result.task}"
    if result.adapter_path:
        measured = _folder_digest(result.adapter_path, workspace)
        is_changed = result.began is not None and _last_change(Path(result.adapter_path)) > result.began
        if measured == digest and not is_changed:
            return ""
        if measured == digest and not trust_name:
            problem = f"is about the adapter in {result.adapter_path[:100]!r}, whose files were changed after the tool began"
            raise RefusedError(location, problem, code=UNNAMED_VERSION)
        if measured and measured != digest:
            problem = f"is about the adapter in {result.adapter_path[:100]!r}, which is {measured[:19]}… and not {digest[:19]}…"
            raise RefusedError(location, problem, "Name the version that was evaluated", code=OTHER_VERSION)
    names = sorted(result.answered_by) or [result.adapter_path or "an unnamed model"]
    digests = {name.partition("@")[2] for name in names if "@sha256:" in name}
    if len(names) > 1:
        shown = ", ".join(repr(name[:100]) for name in names[:_MAX_SHOWN])
        problem = f"has answers of {len(names)} models ({shown}), and a result is about one"
        raise RefusedError(location, problem, "Run the tool for one version at a time", code=OTHER_VERSION)
    if digests == {digest}:
        return ""
    problem = f"is about {names[0][:100]!r}, and not by its digest about {digest[:19]}…"
    if digests or not trust_name:
        hint = "Name the version that was evaluated" if digests else ""
        raise RefusedError(location, problem, hint, code=OTHER_VERSION if digests else UNNAMED_VERSION)
    return names[0][:300]


def _last_change(folder: Path) -> float:
    """Return when the weights or the config in a folder were changed last, in seconds since 1970; 0 if it has none."""
    paths = [folder / peft.CONFIG, *folder.glob("adapter_model*")]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _folder_digest(path: str, workspace: Workspace) -> str:
    """Return the digest that a folder would have as a version; empty if it is not an adapter on this machine."""
    if not Path(path).is_dir():
        return ""
    try:
        with sources.open_source(Path(path), workspace, for_report=True) as adapter:
            return sources.parent(adapter).digest
    except AdapterhubError:
        return ""
