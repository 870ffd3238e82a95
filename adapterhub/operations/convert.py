"""Conversions of an adapter by path, ref or address; the formats are in `adapterhub_converters.formats`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError

from . import base_sources, source_names, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.checks import Problem, Report
    from adapterhub_converters.adapter import Adapter, LossReport
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.formats import AdapterFormat, GgufDtype
    from adapterhub_converters.formats.candidate import Candidate


def convert(
    source: StrPath,
    target: StrPath,
    *,
    to: AdapterFormat,
    base: base_sources.Base | None = None,
    dtype: GgufDtype = "source",
    allow_approx: bool = False,
    allow_drop: Sequence[str] = (),
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    unsafe_pickle: bool = False,
    model: str | None = None,
    replace: bool = False,
    force: bool = False,
    workspace: Workspace | None = None,
) -> LossReport:
    """Write an adapter in another format, and report what became of every tensor.

    Args:
        source: A folder, a file, a ref or an address.
        target: The folder or file to write, whole or not at all.
        to: The format: `peft`, `gguf`, `mlx`, `kohya`, `diffusers`, `raw`, `torchtune`, `litgpt`, `megatron`, `ollama`, or the
            `InstalledFormat` of another package.
        base: The model it is for, where names or shapes are needed.
        dtype: The type of numbers in a GGUF: `source`, `f32`, `f16`, `bf16`, `q8_0` or `q4_0`.
        allow_approx: Replace deltas that the format cannot express by the nearest of low rank.
        allow_drop: Leave out `norms`, `biases`, `weights`, `rows`, `magnitudes`, `copies`, `embeddings`, or names and patterns.
        rank: The rank of an approximation; the adapter's own if None.
        alpha: The alpha of a state dict without a config.
        rslora: Whether a state dict without a config scales by alpha / sqrt(r).
        unsafe_pickle: Accept a pickle, loaded in a process of its own under limits.
        model: The name of the base in Ollama.
        replace: Replace an earlier output at `target`; else it must not exist.
        force: Convert an adapter whose check finds errors that the conversion does not mend.
        workspace: Where names are looked up.

    Raises:
        RefusedError: The check finds errors, as for a push; or the format cannot express part of the adapter, and the error
            names every part.
        OutputExistsError: `target` exists.

    Example:
        >>> report = ah.convert("./sql", "sql-mlx", to="mlx", base="./tiny")
        >>> report.worst.name
        'EXACT'
    """
    from adapterhub_converters.formats import convert as formats
    from adapterhub_converters.formats.lossy import LossAllowance

    workspace, target = workspace or Workspace(), source_names.output_path(target)
    spec = base_sources.base_spec(base, workspace)
    with sources.open_source(source, workspace, as_stored=False) as adapter_source:
        # `replace` removes what is at the target, which must not be the source.
        sources.check_apart(target, adapter_source.path)
        check = _SourceCheck(to, adapter_source.location, spec, force=force, may_drop=bool(allow_drop))
        with _recorded_base_named(adapter_source, spec):
            report = formats.convert(
                adapter_source.path,
                target,
                to=to,
                base=spec,
                allowed=LossAllowance(approx=allow_approx, drop=list(allow_drop), rank=rank),
                alpha=alpha,
                rslora=rslora,
                unsafe_pickle=unsafe_pickle,
                dtype=dtype,
                model=model or (base_sources.local_path(spec) if to == "ollama" else None),
                replace=replace,
                check=check.read,
                confirm=check.confirm,
            )
    if check.overridden:
        from adapterhub.checks.report import ERROR, count_text

        counts = Counter(problem.code for problem in check.overridden)
        note = f"converted despite {count_text(counts, ERROR)} of its check: {', '.join(counts)}"
        report = dataclasses.replace(report, notes=(*report.notes, note))
    return report


@contextmanager
def _recorded_base_named(source: sources.Source, base: BaseSpec | None) -> Iterator[None]:
    """Add the base that an adapter records, as an address, to the error that a base is required."""
    try:
        yield
    except AdapterhubError as error:
        if error.code == "base-required" and base is None:
            from adapterhub.bases import hub_cache  # which a conversion that succeeds needs no part of

            with suppress(AdapterhubError):
                if place := hub_cache.place_of(base_sources.recorded_base(source)):
                    error.fields["recorded"] = str(place)
        raise


class _SourceCheck:
    """The check of an adapter that is converted: it refuses what a push would refuse and the conversion does not mend.

    Errors of tensors that the caller allows to drop wait until it is known which were dropped, as those need no other consent.
    """

    def __init__(self, to: str, location: str, base: BaseSpec | None, *, force: bool, may_drop: bool) -> None:
        """Begin.

        Args:
            to: The format that the adapter is to be written in.
            location: The name of the adapter in errors.
            base: The base that it is checked on.
            force: Accept errors, which `overridden` has then.
            may_drop: Whether tensors may be dropped.
        """
        self._to, self._location, self._base, self._force, self._may_drop = to, location, base, force, may_drop
        self._waiting: Report | None = None
        self.overridden: list[Problem] = []

    def read(self, source: Candidate, format_name: str, known_base: BaseSpec | None, read: Callable[[], Adapter]) -> Adapter:
        """Read and check an adapter.

        Args:
            source: The adapter.
            format_name: Its format.
            known_base: The base that it is read with.
            read: Reads it.
        """
        from adapterhub.checks import open_check
        from adapterhub.manifest.folder_contents import Inspection
        from adapterhub.registry import packaging

        if source.record:  # which has digests to compare, and reading closes the files
            source.hash_open_files()
        # A PEFT folder is checked tensor by tensor, for which its files are opened once; all other formats are read as a whole.
        inspected = None if format_name == "peft" else Inspection(format_name, read(), is_complete=True)
        with open_check(source, base=self._base, display_name=self._location, inspected=inspected) as (report, contents):
            if inspected is not None:
                adapter = inspected.complete_adapter
            else:
                adapter = contents.complete_adapter(known_base) if contents is not None else None
            if adapter is None:
                return read()  # which says what is wrong with the files
            # A file that already has the format is copied, unless experts in it are to be stacked, which then have no source.
            is_copied = format_name == self._to and (format_name != "peft" or adapter.source is not None)
            mended = frozenset() if is_copied else packaging.MENDED_BY_CONVERSION
            may_wait = self._may_drop and not is_copied
            first = tuple(problem for problem in report.problems if not (may_wait and problem.name))
            self._refuse_errors(dataclasses.replace(report, problems=first), mended)
            waiting = (problem for problem in report.problems if may_wait and problem.name and problem.code not in mended)
            self._waiting = dataclasses.replace(report, problems=tuple(waiting))
            return adapter

    def confirm(self, losses: LossReport) -> None:
        """Refuse the output for errors of tensors that were not dropped."""
        if self._waiting is not None:
            from adapterhub_converters.adapter import Loss

            dropped = {name for loss in losses.losses if loss.loss == Loss.DROPPED for name in _labels(loss.name)}
            remaining = tuple(problem for problem in self._waiting.problems if problem.name not in dropped)
            self._refuse_errors(dataclasses.replace(self._waiting, problems=remaining), frozenset())

    def _refuse_errors(self, report: Report, mended: frozenset[str]) -> None:
        from adapterhub.registry import packaging

        self.overridden += packaging.raise_or_collect_errors(
            report, self._base, force=self._force, try_storing=lambda _: None, mended=mended
        )


def _labels(name: str) -> tuple[str, ...]:
    """Return the names that a check may have for a tensor of which a conversion reports the loss."""
    module = name.rpartition(".")[0]
    labels = {"magnitude": f"{module}.lora_magnitude_vector", "rows": f"{module} (rows)", "lora_A": module}
    return name, f"{name} (copy)", labels.get(name.rpartition(".")[2], name)
