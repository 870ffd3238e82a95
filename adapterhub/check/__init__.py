"""Whether an adapter is sound, fits a base, and will do in a runtime what it was trained to do.

Six levels, each assuming the ones before it: the files can be believed; config and tensors agree; shapes fit the base
in both directions; numbers that change the function agree; the base is the very one; each runtime's verdict. Every
problem is collected. Only headers are needed for all but NaNs and zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import AdapterhubError, UsageError
from adapterhub_converters.runtimes import APPLIED, RUNTIMES

from . import contents as _contents
from . import identity, internal, shapes
from . import runtimes as verdicts
from .contents import Contents
from .report import CODES, ERROR, FIT, NOTE, SEVERITIES, WARNING, Problem, Report, Verdict

__all__ = ["CODES", "ERROR", "FIT", "NOTE", "SEVERITIES", "WARNING", "Problem", "Report", "Verdict", "check", "examined"]


def check(
    path: Path,
    *,
    base: BaseSpec | None = None,
    runtimes: Sequence[str] = (),
    max_rank: int | None = None,
    headers_only: bool = False,
    strict: bool = False,
    where: str = "",
) -> Report:
    """Check an adapter for problems, alone and on a base; the arguments are those of `examined`."""
    asked = examined(
        path, base=base, runtimes=runtimes, max_rank=max_rank, headers_only=headers_only, strict=strict, where=where
    )
    with asked as (report, _):
        return report


@contextmanager
def examined(
    path: Path,
    *,
    base: BaseSpec | None = None,
    runtimes: Sequence[str] = (),
    max_rank: int | None = None,
    headers_only: bool = False,
    strict: bool = False,
    where: str = "",
) -> Iterator[tuple[Report, Contents | None]]:
    """Check an adapter for problems; the report, and what was read of its files, open until the context ends.

    Args:
        path: A folder or a file in a format of `adapterhub_converters.formats.convert`; NotFoundError when it is neither.
        base: What it is to be used with; without one, levels two to four are not looked at.
        runtimes: Names of RUNTIMES that must apply it: each that would not is a problem of code `runtime`.
        max_rank: The largest rank that the runtime will be set to take: each module above it is a problem.
        headers_only: Read no tensor's values: NaNs, infinities and zeros go unseen.
        strict: Warnings fail the adapter as errors do.
        where: What the report calls the adapter; its path if empty.
    """
    unknown = sorted(set(runtimes) - set(RUNTIMES))
    if unknown:
        raise UsageError("--for", f"no runtime {unknown[0]!r} is known", f"Known are {', '.join(RUNTIMES)}")
    found, problems = _contents.read(path, base=base)
    with closing(found) if found is not None else nullcontext():
        levels = ["files"]
        if found is not None:
            problems += _collect(found, base, headers_only=headers_only)
            levels += ["values"] * (not headers_only) + ["base", "identity"] * (base is not None)
        judged = verdicts.verdicts(found, base, problems, values=not headers_only)
        problems += [_demanded(judged[name]) for name in dict.fromkeys(runtimes) if judged[name].verdict != APPLIED]
        problems += _above(found, max_rank) if found is not None and max_rank is not None else ()
        problems.sort(key=_order)
        report = Report(
            where=where or str(path),
            format=found.format if found else None,
            base=base.where if base else None,
            problems=tuple(problems),
            verdicts=judged,
            facts=_summary(found) if found else {},
            levels=tuple(levels),
            strict=strict,
            base_facts=_base_facts(base) if base else {},
        )
        yield report, found


def _base_facts(base: BaseSpec) -> dict[str, object]:
    return {
        "repo": base.repo,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "size": base.size,
        "fetched": base.fetched,
        "notes": list(base.notes),
    }


def _collect(found: Contents, base: BaseSpec | None, *, headers_only: bool) -> Iterator[Problem]:
    levels = [internal.problems(found)]
    if not headers_only:
        levels += [internal.value_problems(found), identity.changed(found)]
    if base is not None:
        levels += [shapes.problems(found, base), identity.problems(found, base)]
    seen = set()
    for level in levels:
        try:
            yield from level
        except AdapterhubError as error:
            problem = _contents.unreadable(found.path, error)
            if problem not in seen:
                seen.add(problem)
                yield problem


_CODES = list(CODES)


def _order(problem: Problem) -> tuple[object, ...]:
    """The worst first; of one code, layer 2 before layer 10."""
    natural = tuple((int(part), "") if part.isdecimal() else (-1, part) for part in problem.name.split("."))
    return SEVERITIES.index(problem.severity), _CODES.index(problem.code), problem.file, natural


def _above(found: Contents, max_rank: int) -> Iterator[Problem]:
    for target, rank in internal.ranks(found).items():
        if rank > max_rank:
            what = f"rank {rank}, and the largest allowed is {max_rank}"
            yield Problem("rank-above-max", "", target, what, expected=f"{max_rank} at most", got=str(rank))


def _demanded(verdict: Verdict) -> Problem:
    reason = verdict.reasons[0] if verdict.reasons else ""
    return Problem("runtime", "", verdict.runtime, f"{verdict.verdict}: {reason}")


def _summary(found: Contents) -> dict[str, object]:
    tensors = [tensor for _, tensor in found.tensors()]
    ranks = internal.ranks(found)
    return {
        "r": sorted(set(ranks.values())),
        "modules": len(found.targets),
        "targets": sorted({target.rpartition(".")[2] for target in found.targets}),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "parameters": sum(_size(tensor.shape) for tensor in tensors),
    }


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size
