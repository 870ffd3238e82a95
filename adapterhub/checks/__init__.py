"""Check an adapter for problems: alone, on a base model, and in each runtime.

    contents_reader   the files of any format, read into `contents`
    consistency       tensors and config with each other; `target_modules`, its patterns
    base_fit          shapes on a base, with the `loaded_base`; `base_identity`, whether it is the one
    peft_load         what peft would do, by `peft_base`, `peft_targets` and `peft_init`; `peft_verdict`, in our words
    runtime_verdicts  what each runtime would do, by `adapter_features` and `served_models`
    report            problems, their codes, and the verdicts
    repair            mends what can be mended without a doubt
    scan              looks for signs of tampering

Six levels, each assuming the ones before it: the files are well-formed; config and tensors agree; shapes fit the base in both
directions; numbers that change the function agree; the base is the one that was trained on; the verdict of each runtime. Every
problem is collected. Values of tensors are read only to find NaNs, infinities and zeros; headers are enough for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.folder_contents import Inspection
from adapterhub.manifest.package_files import shorten_names, survey
from adapterhub_converters import gc_pause
from adapterhub_converters.errors import AdapterhubError, ParameterError
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.runtime_rules import APPLIED, RUNTIMES

from .base_fit import shape_problems
from .base_identity import base_name_problems, changed_files, identity_problems
from .consistency import earlier_problems, internal_problems, value_problems
from .contents import Contents
from .contents_reader import read_contents, unreadable_file
from .peft_load import LOADERS
from .peft_verdict import Loading, load_problems, loading
from .report import (
    CODES,
    ERROR,
    FIT,
    NOTE,
    SCAN,
    SEVERITIES,
    UNREAD,
    WARNING,
    Findings,
    Group,
    Problem,
    RepeatedProblem,
    Report,
    Verdict,
    level_of,
)

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

__all__ = [
    "CODES",
    "ERROR",
    "FIT",
    "NOTE",
    "SCAN",
    "SEVERITIES",
    "UNREAD",
    "WARNING",
    "Group",
    "Problem",
    "Report",
    "Verdict",
    "check",
    "check_codes",
    "level_of",
    "open_check",
]


def check(
    path: Path,
    *,
    base: BaseSpec | None = None,
    runtimes: Sequence[str] = (),
    max_rank: int | None = None,
    headers_only: bool = False,
    strict: bool = False,
    ignore: Sequence[str] = (),
    unpublished: bool = False,
    limit: int | None = None,
    display_name: str = "",
) -> Report:
    """Check an adapter for problems.

    Args:
        path: A folder or a file in one of the formats of `adapterhub_converters.formats`.
        base: The base model to compare with; without one, the levels about a base are skipped.
        runtimes: Names of RUNTIMES that must apply the adapter: each that would not is a problem with the code `runtime`.
        max_rank: The largest rank allowed: each module above it is a problem with the code `rank-above-max`.
        headers_only: Read no values of tensors, which misses NaNs, infinities and zeros.
        strict: Let warnings fail the adapter as errors do.
        ignore: Codes of problems that are counted, and otherwise ignored.
        unpublished: Also report what a push of the folder `path` refuses or leaves out.
        limit: How many problems of each code the report has, besides their number; all of them if None.
        display_name: The name of the adapter in the report; its path if empty.

    Raises:
        NotFoundError: There is no adapter at `path`.
        ParameterError: A name in `runtimes` or a code in `ignore` is unknown.

    Example:
        >>> report = check(Path("sql"), base=read_hf(Path("Qwen3-0.6B")), runtimes=["vllm"])  # doctest: +SKIP
        >>> report.ok, [group.code for group in report.grouped()]  # doctest: +SKIP
        (False, ['rank-config'])
    """
    # Before any file is read: a misspelled argument must not look like a passed check.
    if unknown := sorted(set(runtimes) - set(RUNTIMES)):
        raise ParameterError("runtimes", f"unknown runtime {unknown[0]!r}", f"Known runtimes: {', '.join(RUNTIMES)}")
    check_codes(ignore)
    with open_check(path, base=base, headers_only=headers_only, limit=limit, display_name=display_name) as (report, contents):
        required = (report.verdicts[name] for name in dict.fromkeys(runtimes))
        requirement_findings = Findings(limit)
        requirement_findings.add(_runtime_problem(verdict) for verdict in required if verdict.verdict != APPLIED)
        if contents is not None and max_rank is not None:
            requirement_findings.add(_rank_problems(contents, max_rank))
        if unpublished:
            requirement_findings.add(_package_problems(path))
            with suppress(AdapterhubError):  # of a malformed adapter.json or adapter.toml, which a push reports
                requirement_findings.add(base_name_problems(contents, base) if contents is not None else ())
        # None of these codes is among those that `open_check` reports.
        counts = {**report.counts, **requirement_findings.counts}
        if "no-base-name" in counts:  # it shows the path as well
            counts.pop("local-base-name", None)
        problems = [
            problem
            for problem in (*_in_order(requirement_findings.by_code), *report.problems)
            if problem.code in counts and problem.code not in ignore
        ]
        problems.sort(key=lambda problem: SEVERITIES.index(problem.severity))
        levels = {"package": unpublished and path.is_dir(), "max-rank": max_rank is not None, "runtimes": bool(runtimes)}
        return replace(
            report,
            problems=tuple(problems),
            counts={code: count for code, count in counts.items() if code not in ignore},
            ignored={code: count for code, count in counts.items() if code in ignore},
            levels=(*report.levels, *(level for level, checked in levels.items() if checked)),
            strict=strict,
        )


def check_codes(codes: Iterable[str]) -> None:
    """Raise ParameterError for a code that is unknown or cannot be ignored."""
    import difflib

    for code in codes:
        if code not in CODES:
            close = difflib.get_close_matches(code, CODES, 1)
            raise ParameterError("ignore", f"unknown code {code[:80]!r}", f"Did you mean {close[0]}?" if close else "")
        if code in UNREAD:
            raise ParameterError("ignore", f"{code} cannot be ignored: nothing else is checked of such an adapter")


@contextmanager
def open_check(
    path: Path | Candidate,
    *,
    base: BaseSpec | None = None,
    headers_only: bool = False,
    limit: int | None = None,
    display_name: str = "",
    inspected: Inspection | None = None,
    most_errors: int | None = None,
    verdicts: bool = True,
) -> Iterator[tuple[Report, Contents | None]]:
    """Check an adapter as `check` does, and keep its files open until the context ends.

    What the caller has `inspected` as a whole with that base is not read again, nor is what a candidate has read.

    Args:
        most_errors: Nothing more is checked of an adapter with more errors in its headers and config; None for no limit.
        verdicts: Whether the report has verdicts of runtimes.

    Yields:
        The report, and the contents of the adapter; None if its files are not well-formed.
    """
    findings = Findings(limit)
    with gc_pause.pause_gc():
        contents, problems = read_contents(path, base=base, inspected=inspected)
        findings.add(problems)
    with closing(contents) if contents is not None else nullcontext():
        with gc_pause.pause_gc():
            loaded = None
            if contents is not None:
                reported: _Reported = set()
                findings.add(_problems(contents, [internal_problems(contents)], reported))
                if most_errors is None or findings.error_count() <= most_errors:
                    loaded = loading(contents, base, LOADERS if verdicts else LOADERS[:1])
                    findings.add(
                        _problems(contents, _later_levels(contents, base, loaded, headers_only=headers_only), reported)
                    )
            runtimes: Mapping[str, Verdict] = {}
            if verdicts:
                from .runtime_verdicts import runtime_verdicts  # with the tables of runtimes, which storing does without

                runtimes = runtime_verdicts(contents, base, findings.by_code, loaded, values=not headers_only)
            ordered = _in_order(findings.by_code)
        on_base = base is not None and contents is not None and contents.unread is None
        levels = ["files", *["values"] * (not headers_only), *["base"] * on_base]
        if on_base and contents is not None and contents.manifest_text:
            levels.append("identity")
        report = Report(
            where=display_name or str(Candidate.of(path).path),
            format=contents.format if contents else None,
            base=base.source if base else None,
            problems=tuple(ordered),
            verdicts=runtimes,
            facts=_summary(contents) if contents else {},
            levels=tuple(levels) if contents else ("files",),
            base_facts=_base_facts(base) if base else {},
            counts=dict(findings.counts),
        )
        yield report, contents


_Level = Iterator[Problem | RepeatedProblem]
_Reported = set[tuple[str, str]]
"""Place and message of each error that was reported as a problem, as several levels meet it."""


def _later_levels(contents: Contents, base: BaseSpec | None, loaded: Loading | None, *, headers_only: bool) -> list[_Level]:
    """Return the problems of each level beyond headers and config."""
    levels: list[_Level] = [load_problems(contents, loaded), earlier_problems(contents, base)]
    if not headers_only:
        levels += [value_problems(contents), changed_files(contents)]
    if base is not None and contents.unread is None:
        levels += [shape_problems(contents, base), identity_problems(contents, base)]
    return levels


def _problems(contents: Contents, levels: Iterable[_Level], reported: _Reported) -> _Level:
    """Yield the problems of every level; a level that cannot be finished ends with the error that stopped it."""
    # Generators: a level that fails halfway has already yielded what it found.
    for level in levels:
        try:
            for problem in level:
                if isinstance(problem, Problem) and problem.cause is not None:
                    reported.add((problem.where, problem.what))
                yield problem
        except AdapterhubError as error:
            problem = unreadable_file(contents.path, error)
            if (problem.where, problem.what) not in reported:
                reported.add((problem.where, problem.what))
                yield problem


def _in_order(problems: Mapping[str, Iterable[Problem]]) -> list[Problem]:
    """Return the worst problems first; within one code, file by file and layer 2 before layer 10."""
    codes = sorted(CODES, key=lambda code: SEVERITIES.index(CODES[code][0]))
    return [
        problem
        for code in codes
        for problem in sorted(problems.get(code, ()), key=lambda problem: (problem.file, _natural_name(problem)))
    ]


def _natural_name(problem: Problem) -> str:
    """Return the name with its numbers at one width."""
    return ".".join([part.zfill(8) if part.isdecimal() else part for part in problem.name.split(".")])


def _package_problems(path: Path) -> Iterator[Problem]:
    """Yield what a push of a folder refuses or leaves out."""
    if not path.is_dir():
        return
    _, skipped, refused = survey(path)
    for name, message, hint in refused:
        yield Problem("not-packaged", name, "", message, hint)
    visible = [name for name in skipped if not name.startswith(".")]
    if visible:
        yield Problem("left-out", "", "", f"not part of the adapter: {shorten_names(visible)}")


def _rank_problems(contents: Contents, max_rank: int) -> Iterator[Problem]:
    """Yield the modules whose rank is above the largest allowed."""
    for target, rank in contents.ranks.items():
        if rank > max_rank:
            message = f"rank {rank}; the largest allowed is {max_rank}"
            yield Problem("rank-above-max", "", target, message, expected=f"{max_rank} at most", got=str(rank))


def _runtime_problem(verdict: Verdict) -> Problem:
    reason = verdict.reasons[0] if verdict.reasons else ""
    return Problem("runtime", "", verdict.runtime, f"{verdict.verdict}: {reason}")


def _summary(contents: Contents) -> dict[str, object]:
    """Return the facts of an adapter for the report."""
    kinds = contents.kinds()
    repeated = contents.adapter.meta.parameters if contents.adapter else None
    return {
        "r": sorted(set(contents.ranks.values())),
        "modules": len(contents.targets),
        "targets": sorted({target.rpartition(".")[2] for target in contents.targets}),
        "dtypes": sorted({kind.dtype for kind in kinds}),
        "parameters": repeated or sum(math.prod(kind.shape) * count for kind, count in kinds.items()),
    }


def _base_facts(base: BaseSpec) -> dict[str, object]:
    return {
        "repo": base.repo,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "size": base.size,
        "fetched": base.fetched,
        "notes": list(base.notes),
    }
