"""A result file of any tool that is known here, told apart by what it contains and not by its name."""

from __future__ import annotations

from pathlib import Path

from adapterhub_converters.errors import FormatError

from . import bounded_files, inspect_ai, junit, lm_eval, promptfoo
from .imported_result import CODE, ImportedResult

TOOLS = ("lm-evaluation-harness", "promptfoo", "inspect_ai", "JUnit")


def read(path: Path) -> list[ImportedResult]:
    """Return the results in a file, one for each task.

    Raises:
        FormatError: It is malformed, too large, or of no tool that is known here.
        RefusedError: It is of a run that failed.
    """
    start = bounded_files.read_start(path)
    if start.startswith(b"PK"):
        return inspect_ai.read_archive(path)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return junit.read(path)
    if path.name.startswith("samples_") and path.suffix == ".jsonl":
        results = lm_eval.results_file(path)
        return lm_eval.read(bounded_files.parse(bounded_files.document_bytes(results), str(results)), results, only=path.name)
    document = bounded_files.parse(bounded_files.document_bytes(path), str(path))
    if lm_eval.matches(document):
        return lm_eval.read(document, path)
    if inspect_ai.matches(document):
        return inspect_ai.read(document, path)
    if promptfoo.matches(document):
        return promptfoo.read(document, path)
    raise FormatError(str(path), f"is not a result file of {', '.join(TOOLS)}", code=CODE)
