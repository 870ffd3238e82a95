"""Checks of an adapter by path, ref or address; the checks themselves are in `adapterhub.checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import base_sources, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.checks import Report
    from adapterhub_converters.runtime_rules import RuntimeName


def check(
    source: StrPath,
    *,
    base: base_sources.Base | None = None,
    runtimes: Sequence[RuntimeName] = (),
    max_rank: int | None = None,
    headers_only: bool = False,
    strict: bool = False,
    ignore: Sequence[str] = (),
    limit: int | None = None,
    workspace: Workspace | None = None,
) -> Report:
    """Check an adapter for problems, alone and on a base.

    Args:
        source: A folder, a file, a ref or an address.
        base: The model it is to be used with.
        runtimes: Runtimes that must apply it as it was trained, such as `vllm` or `llama.cpp`.
        max_rank: The largest rank that the runtime is set to take.
        headers_only: Read no values; NaNs, infinities and zeros are then not noticed.
        strict: Let warnings fail the adapter as errors do.
        ignore: Codes of problems that are counted, and otherwise ignored, such as `unpinned`.
        limit: The most problems of each code to list; the report counts all. None lists all.
        workspace: Where names are looked up.

    Example:
        >>> report = ah.check("./sql")
        >>> report.ok
        True
        >>> report.verdicts["vllm"].verdict
        'applied'
    """
    from adapterhub.checks import check as check_adapter

    workspace = workspace or Workspace()
    with sources.open_source(source, workspace, as_stored=False, for_report=True) as adapter_source:
        return check_adapter(
            adapter_source.path,
            base=base_sources.base_spec(base, workspace),
            runtimes=runtimes,
            max_rank=max_rank,
            headers_only=headers_only,
            strict=strict,
            ignore=ignore,
            unpublished=adapter_source.ref is None,
            limit=limit,
            display_name=adapter_source.location,
        )


validate = check
"""`check` by the name of its command."""
