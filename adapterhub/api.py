"""The operations of the command line as functions: each takes `str` or `Path` and returns a value.

    import adapterhub as ah

    ah.check("./sql", base="./Qwen3-0.6B").ok

A `str` is read as on the command line: a path that exists, a ref of the registry such as `team/sql:v2`, or an address such as
`oci://registry.example/team/sql:v2`. A `Path` is always a path. Progress and events are callbacks; nothing is printed, no
environment is read. A `Workspace` says where names are looked up and who asks; the default one has the registry and the policy
of the working folder, and asks remotes without credentials.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, overload

import adapterhub_converters.adapter as canonical
from adapterhub_converters.errors import ParameterError

from . import base_sources, bill_of_materials, combining, comparing, describing, scanning, sources
from .combining import MergeResult
from .describing import DescribeResult
from .sharing import pulling, pushing
from .sharing.pulling import PullResult
from .sharing.push_result import PushResult
from .workspace import Progress, StrPath, Workspace, as_list

if TYPE_CHECKING:
    from adapterhub.analysis.diff import Difference
    from adapterhub.checks import Report
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.merging import FuseReport
    from adapterhub.registry.adapter_recipe import Conversion
    from adapterhub.registry.registry import Version
    from adapterhub.trust.bill import Bill
    from adapterhub_converters.adapter import LossReport
    from adapterhub_converters.bases import BaseSpec


Base = Union[StrPath, "BaseSpec"]
"""A base model: a path, `hf://org/model`, a URL, the name of one in the registry or in the cache of the Hub, or what
`read_base` returned."""


# ---- one adapter


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Adapter(canonical.Adapter):
    """An adapter in memory, with its manifest; `deltas`, `replaced` and `rows` are keyed by the base's own names.

    Attributes:
        where: The name it was loaded by.
        manifest: The content of adapter.json: the one in the folder, or one that was derived, whose `files` are empty.
    """

    where: str
    manifest: AdapterManifest

    @property
    def targets(self) -> list[str]:
        """The full paths of the modules that have a delta, sorted."""
        return sorted(self.deltas)

    def __repr__(self) -> str:
        return f"<Adapter {self.where}: {len(self.deltas)} modules, {self.parameters:,} parameters>"


def load(source: StrPath, *, base: Base | None = None, workspace: Workspace | None = None) -> Adapter:
    """Read an adapter of any format into memory.

    Args:
        source: A folder, a file, a ref or an address.
        base: The model it is for, where the format needs one.
        workspace: Where names are looked up.

    Raises:
        NotFoundError: There is no such adapter.
        FormatError: A file is malformed; nothing of it was used.

    Example:
        >>> adapter = ah.load("./sql")
        >>> adapter.targets[0]
        'model.layers.0.self_attn.q_proj'
        >>> adapter.deltas[adapter.targets[0]].lora_A.shape  # (r, in_features)
        (2, 64)
    """
    from adapterhub.manifest import derive
    from adapterhub_converters.formats import convert

    workspace = workspace or Workspace()
    spec = _base_spec(base, workspace)
    with sources.open_source(source, workspace) as adapter_source, sources.as_folder(adapter_source) as folder:
        read = convert.read(adapter_source.path, base=spec)
        draft = derive.draft(folder, base=spec)
        # The folder's own adapter.json, else one that is derived from its files.
        manifest = draft.recorded or draft.manifest()
    canonical_fields = {field.name: getattr(read, field.name) for field in fields(read)}
    return Adapter(**canonical_fields, where=adapter_source.location, manifest=manifest)


def check(
    source: StrPath,
    *,
    base: Base | None = None,
    runtimes: Sequence[str] = (),
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
    from adapterhub.checks import check as checked

    workspace = workspace or Workspace()
    with sources.open_source(source, workspace, as_stored=False) as adapter_source:
        return checked(
            adapter_source.path,
            base=_base_spec(base, workspace),
            runtimes=runtimes,
            max_rank=max_rank,
            headers_only=headers_only,
            strict=strict,
            ignore=ignore,
            unpublished=adapter_source.ref is None,
            limit=limit,
            display_name=adapter_source.location,
        )


def scan(
    source: StrPath,
    *,
    weights: bool = True,
    strict: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> scanning.Scan:
    """Scan an adapter for what could run code or mislead; nothing in it is run or loaded.

    Args:
        source: A folder, a file, a ref or an address; a folder or a file need not be an adapter.
        weights: Read the weights for their numbers, and compare these with those of the registry's adapters of the same base.
        strict: Let warnings fail it as errors do.
        limit: The most problems of each code to list; the report counts all. None lists all.
        progress: Called with modules done and modules in all.
        workspace: Where names are looked up.

    Example:
        >>> result = ah.scan("./sql")
        >>> result.report.problems
        ()
        >>> result.weights.kinds[0].name, result.weights.kinds[0].modules, result.weights.kinds[0].percentiles
        ('self_attn.q_proj', 2, None)
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    return scanning.scan(source, workspace, weights=weights, strict=strict, limit=limit)


def convert(
    source: StrPath,
    target: StrPath,
    *,
    to: str,
    base: Base | None = None,
    dtype: str = "source",
    allow_approx: bool = False,
    allow_drop: Sequence[str] = (),
    rank: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    unsafe_pickle: bool = False,
    model: str | None = None,
    replace: bool = False,
    workspace: Workspace | None = None,
) -> LossReport:
    """Write an adapter in another format, and report what became of every tensor.

    Args:
        source: A folder, a file, a ref or an address.
        target: The folder or file to write, whole or not at all.
        to: The format: `peft`, `gguf`, `mlx`, `kohya`, `diffusers`, `raw`, `torchtune`, `litgpt`, `megatron` or `ollama`.
        base: The model it is for, where names or shapes are needed.
        dtype: The type of numbers in a GGUF: `source`, `f32`, `f16`, `bf16`, `q8_0` or `q4_0`.
        allow_approx: Replace deltas that the format cannot express by the nearest of low rank.
        allow_drop: Leave out `norms`, `biases`, `weights`, `rows`, `magnitudes`, `copies`, or names and patterns.
        rank: The rank of an approximation; the adapter's own if None.
        alpha: The alpha of a state dict without a config.
        rslora: Whether a state dict without a config scales by alpha / sqrt(r).
        unsafe_pickle: Accept a pickle, loaded in a process of its own under limits.
        model: The name of the base in Ollama.
        replace: Replace an earlier output at `target`; else it must not exist.
        workspace: Where names are looked up.

    Raises:
        RefusedError: The format cannot express part of the adapter; the error names every part.
        OutputExistsError: `target` exists.

    Example:
        >>> report = ah.convert("./sql", "sql-mlx", to="mlx", base="./tiny")
        >>> report.worst.name
        'EXACT'
    """
    from adapterhub_converters.formats import convert as formats
    from adapterhub_converters.formats.lossy import LossAllowance

    workspace = workspace or Workspace()
    spec = _base_spec(base, workspace)
    with sources.open_source(source, workspace, as_stored=False) as adapter_source:
        # `replace` removes what is at the target, which must not be the source.
        sources.check_apart(Path(target), adapter_source.path)
        return formats.convert(
            adapter_source.path,
            Path(target),
            to=to,
            base=spec,
            allowed=LossAllowance(approx=allow_approx, drop=list(allow_drop), rank=rank),
            alpha=alpha,
            rslora=rslora,
            unsafe_pickle=unsafe_pickle,
            dtype=dtype,
            model=model or (_local_path(spec) if to == "ollama" else None),
            replace=replace,
        )


def describe(
    folder: StrPath,
    *,
    base: Base | None = None,
    dry_run: bool = False,
    workspace: Workspace | None = None,
    **declared: Any,
) -> DescribeResult:
    """Write or renew the adapter.json in a folder, in place; its record of a training is kept.

    Args:
        folder: The adapter's own folder.
        base: The model it was trained on, to pin by its headers; refused where the adapter does not fit it.
        dry_run: Write nothing; `changes` has what would be different.
        workspace: Where names are looked up.
        declared: What its owner declares: `name`, `description`, `license`, `task`, and `training` as a mapping.

    Example:
        >>> [change.key for change in ah.describe("./sql", license="MIT", dry_run=True).changes if change.key == "license"]
        ['license']
    """
    workspace = workspace or Workspace()
    return describing.describe(folder, declared, workspace, base=_base_spec(base, workspace), dry_run=dry_run)


def bom(
    source: StrPath, *, base: Base | None = None, base_license: str | None = None, workspace: Workspace | None = None
) -> Bill:
    """Return the bill of materials of an adapter: CycloneDX 1.7, with its base, parents, data and files by digest.

    Args:
        source: A folder, a file, a ref or an address.
        base: The base model, whose model card has its license.
        base_license: The license of the base, in place of that of its card.
        workspace: The registry, in which its parents are looked up.

    Example:
        >>> bill = ah.bom("./sql", base_license="apache-2.0")
        >>> bill.license.expression, bill.license.missing
        ('Apache-2.0', ('adapter sql',))
        >>> bill.document["specVersion"], bill.document["metadata"]["component"]["type"]
        ('1.7', 'machine-learning-model')
    """
    workspace = workspace or Workspace()
    return bill_of_materials.bom(source, workspace, base=_base_spec(base, workspace), base_license=base_license)


# ---- several


def diff(
    a: StrPath,
    b: StrPath,
    *,
    base: Base | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Difference:
    """Compare two adapters, or two versions of one: their files, the facts of adapter.json, and what they compute.

    Equal digests are an answer: weights are read only where the files that decide what an adapter computes differ.

    Args:
        a: A folder, a file, a ref or an address.
        b: Likewise.
        base: The model of both, where a format needs one.
        progress: Called with bytes or modules done and in all.
        workspace: Where names are looked up.

    Raises:
        NotFoundError: There is no such adapter.
        FormatError: A file is malformed.

    Example:
        >>> difference = ah.diff("./sql", "./french")
        >>> difference.same, difference.modules[0].status, [file.path for file in difference.files]
        (False, 'changed', ['adapter_model.safetensors'])
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    return comparing.diff(a, b, workspace, base=_base_spec(base, workspace))


# Arguments of a merge into a base that say how the model is written; those of a method go into the recipe instead.
_OUTPUT_OPTIONS = ("dtype", "requantize", "shard_size", "onto", "dequantize", "force")


@overload
def merge(
    adapters: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    into: None = None,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    rank_budget: int | None = None,
    seed: int = 0,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    **parameters: float | str,
) -> MergeResult: ...


@overload
def merge(
    adapters: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    into: StrPath,
    weights: Sequence[float] | None = None,
    dtype: Literal["bf16", "f16", "f32"] | None = None,
    requantize: str | None = None,
    shard_size: int | None = None,
    onto: Literal["original", "as-trained"] = "original",
    dequantize: bool = False,
    force: bool = False,
    method: str = "cat",
    seed: int = 0,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    **parameters: float | str,
) -> FuseReport: ...


def merge(
    adapters: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    into: StrPath | None = None,
    weights: Sequence[float] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    **parameters: Any,
) -> MergeResult | FuseReport:
    """Merge adapters into one adapter, or into a base model.

    The merge is recorded in the result, so that it can be repeated and verified.

    Args:
        adapters: One or several of: a folder, a file, a ref, an address.
        out: The folder or .gguf file to write; of adapters also a ref to store the result under, which then passes the checks
            of a push.
        into: The base model to merge into, a Hugging Face folder or a GGUF file; None to merge adapters into an adapter.
        weights: The factor of each adapter; 1 each if None.
        method: `cat` (exact, ranks add up), `linear`, `svd`, `ties` … (`adapterhub.merging.METHODS`); into a base its result
            is added without truncation to a rank.
        rank: Without `into`: the rank of every module of the result.
        energy: Without `into`: keep this share of the energy, with the smallest ranks that do.
        rank_budget: Without `into`: the bytes of tensors to spend; ranks are chosen to keep most in them.
        seed: The seed of the method's random numbers.
        parameters: Parameters of the method, such as `density`.
        dtype: With `into`: the type of floats to write; the base's if None.
        requantize: With `into`: the quantized type to write, `q8_0`, `q6_k`, `q5_k`, `q4_k`, `q4_0`, `q4_1`, `q5_0`,
            `q5_1` or `nf4`.
        shard_size: With `into`: the most bytes of tensors in a file.
        onto: With `into`: merge onto the base's weights as they are, or rounded as training saw them.
        dequantize: With `into`: let a quantized Hugging Face model become one in floats.
        force: With `into`: write the model even if a quantized target absorbs the adapter.
        replace: Replace an earlier output at `out`; else it must not exist.
        progress: Called with modules or bytes done and in all.
        workspace: Where names are looked up.

    Example:
        >>> ah.merge(["./sql", "./french"], "./both", method="ties", density=0.2).report.method
        'ties'
        >>> len(ah.merge("./sql", "./merged", into="./tiny").touched)
        4
    """
    from adapterhub.manifest.document import Recipe

    workspace = (workspace or Workspace()).with_progress(progress)
    names = as_list(adapters)
    factors = [1.0] * len(names) if weights is None else list(weights)
    if len(factors) != len(names):
        raise ParameterError("weights", f"{len(factors)} for {len(names)} adapters", "Give one for each")
    with ExitStack() as stack:
        # Before any adapter is downloaded: an ambiguous output is refused at once.
        target = Path(out) if into is not None else combining.merge_destination(out)
        adapter_sources = [stack.enter_context(sources.open_source(text, workspace)) for text in names]
        if into is not None:
            output_options = {key: parameters.pop(key) for key in _OUTPUT_OPTIONS if key in parameters}
            method_recipe = Recipe(
                kind="merge", method=parameters.pop("method", None), seed=parameters.pop("seed", None), parameters=parameters
            )
            base = base_sources.weights(into, workspace)
            return combining.merge_into(
                adapter_sources, factors, Path(out), base, workspace, method=method_recipe, replace=replace, **output_options
            )
        adapter_options = {key: parameters.pop(key) for key in ("method", "rank", "energy", "seed") if key in parameters}
        recipe = Recipe(kind="merge", **adapter_options, budget=parameters.pop("rank_budget", None), parameters=parameters)
        return combining.merge_adapters(adapter_sources, factors, target, recipe, workspace, replace=replace)


# ---- sharing


def push(
    source: StrPath,
    target: str,
    *,
    base: Base | None = None,
    to: str | None = None,
    expect: str | None = None,
    force: bool = False,
    private: bool = False,
    message: str = "",
    tags: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Version | PushResult:
    """Check an adapter and store it as a new version, in the registry or at an address.

    Args:
        source: A folder, a file, a ref or an address.
        target: A ref, `namespace/name[:tag]`, or an address such as `oci://HOST/NAME[:TAG]` or `hf://ORG/NAME[@BRANCH]`.
        base: The model it was trained on, to pin; refused where the adapter does not fit it.
        to: Convert it to this format first, and name the source as its parent; `image`, at an address, for a container image.
        expect: The digest that the target must still have, or `absent`.
        force: Store an adapter whose check finds errors. A policy cannot be overridden.
        private: Create a repository on a hub as private.
        message: The reason, for the log of the name or the commit on a hub.
        tags: More tags that move to the version.
        metrics: Results of other programs, by name; the registry records them.
        progress: Called with bytes done and bytes in all.
        workspace: The registry, the policy, credentials.

    Raises:
        RefusedError: The check finds errors, or the policy of the project does not allow the adapter. Nothing was stored.
        ConflictError: The target is not at `expect`.

    Example:
        >>> ah.push("./sql", "team/sql:prod").ref
        Ref('team/sql:v1')
        >>> ah.push("./sql", "layout://sql.tar:v1").tag
        'v1'
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    return pushing.push(
        source,
        target,
        workspace,
        base=_base_spec(base, workspace),
        conversion=_conversion(to),
        expect=expect,
        force=force,
        private=private,
        message=message,
        tags=tags,
        metrics=metrics,
    )


def pull(
    source: str,
    out: StrPath | None = None,
    *,
    to: str | None = None,
    base: Base | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> PullResult:
    """Write the files of a version, all of them and verified, or nothing.

    A folder that is another version, unmodified and stored elsewhere, is replaced.

    Args:
        source: A ref of the registry, or an address.
        out: The folder or file to write; the name of the adapter if None.
        to: Write it in another format, of a version in the registry.
        base: The model it is for, where the conversion needs more than its adapter.json has.
        replace: Replace an adapter with changes of your own, or a converted one.
        progress: Called with bytes done and bytes in all.
        workspace: The registry, the policy, credentials.

    Example:
        >>> ah.pull("team/sql:prod", "./out").files[0]
        'README.md'
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    spec = _base_spec(base, workspace)
    model = _local_path(spec) if to == "ollama" else None
    return pulling.pull(source, out, workspace, conversion=_conversion(to), base=spec, model=model, replace=replace)


def _base_spec(base: Base | None, workspace: Workspace) -> BaseSpec | None:
    return base_sources.read_base(base, workspace) if isinstance(base, str | os.PathLike) else base


def _local_path(base: BaseSpec | None) -> str | None:
    """Return the absolute path of a base on this machine, which Ollama takes as its name; None for any other base."""
    return sources.local_base_path(base.source) if base else None


def _conversion(to: str | None) -> Conversion | None:
    if to is None:
        return None
    from adapterhub.registry.adapter_recipe import Conversion

    return Conversion(to)
