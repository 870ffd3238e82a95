"""Merges of adapters into a base model, and the proof of one: `merge_into` and `verify_merge`."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub_converters.errors import MissingExtraError, UsageError
from adapterhub_converters.trained_prompt import TrainedPrompt, common_prompt

from . import base_sources, source_names, sources
from .merge import open_adapters, pinned_base
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.manifest.document import Recipe
    from adapterhub.merging import Merge, ModelMergeReport, Options
    from adapterhub.merging.adapters.methods import MergeMethod
    from adapterhub.merging.into_base.merge_proof import Proofs
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.bases.base_prompts import BasePrompt
    from adapterhub_converters.formats import FloatDtype, QuantizedDtype

_DIFFERENT_PROMPTS = (
    "the adapters were trained with different chat templates, options or dates: the model keeps that of its base"
)
BaseWeights = Literal["original", "as-trained"]
"""The weights of a base to merge onto: as they are, or rounded as training saw them."""


def merge_into(
    adapters: StrPath | Sequence[StrPath],
    base: StrPath,
    out: StrPath,
    *,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "cat",
    seed: int = 0,
    dtype: FloatDtype | None = None,
    requantize: QuantizedDtype | Literal["nf4"] | None = None,
    shard_size: int | None = None,
    onto: BaseWeights = "original",
    dequantize: bool = False,
    force: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    **parameters: float | str,
) -> ModelMergeReport:
    """Merge adapters into a base model. The result records how it was merged, so that it can be repeated and verified.

    Args:
        adapters: One or several of: a folder, a file, a ref, an address.
        base: The model, a Hugging Face folder or a GGUF file.
        out: The folder or .gguf file to write.
        weights: The factor of each adapter; 1 each if None.
        method: As for `merge`; its result is added without truncation to a rank.
        seed: The seed of the method's random numbers.
        dtype: The type of floats to write, `bf16`, `f16` or `f32`; the base's if None.
        requantize: The quantized type to write, `q8_0`, `q6_k`, `q4_k` …, a mixture like `q4_k_m`, or `nf4`.
        shard_size: The most bytes of tensors in a file.
        onto: Merge onto the base's weights as they are, `original`, or rounded as training saw them, `as-trained`.
        dequantize: Let a quantized Hugging Face model become one in floats.
        force: Write the model even if a quantized target absorbs the adapter.
        replace: Replace an earlier output at `out`; else it must not exist.
        progress: Called with bytes done and in all.
        workspace: Where names are looked up.
        parameters: Parameters of the method, such as `density`.

    Example:
        >>> len(ah.merge_into("./sql", "./tiny", "./merged").touched)
        4
    """
    from adapterhub.manifest.document import Recipe
    from adapterhub.merging import Options
    from adapterhub_converters.containers import atomic

    workspace, target = (workspace or Workspace()).with_progress(progress), source_names.output_path(out)
    recipe = Recipe("merge", method=method, seed=seed, parameters=parameters)
    with open_adapters(adapters, weights, workspace) as (adapter_sources, factors):
        folder = base_sources.weights(base, workspace)
        options = Options(
            dtype=dtype,
            requantize=requantize,
            shard_size=shard_size,
            dequantize=dequantize,
            as_trained=onto == "as-trained",
            force=force,
        )
        gguf = folder.is_dir() and target.suffix == ".gguf"
        check_place(target, folder)
        atomic.check_free(target, folder=not gguf and (folder.is_dir() or bool(shard_size)), replace=replace)
        prepared, _ = prepare_merge_into(adapter_sources, factors, folder, options, gguf=gguf, method=recipe)
        with workspace.bar("merging") as advance:
            return prepared.write(target, advance, replace=replace)


def common_quantization(adapters: Sequence[sources.Source]) -> str | None:
    """Return the quantization of the base that all adapters were trained in; None if none or more than one is recorded."""
    quantizations = {pinned_base(source).quantization for source in adapters}
    return quantizations.pop() if len(quantizations) == 1 else None


def prepare_merge_into(
    adapters: Sequence[sources.Source],
    weights: Sequence[float],
    base: Path,
    options: Options,
    *,
    gguf: bool = False,
    method: Recipe | None = None,
) -> tuple[Merge, Options]:
    """Prepare the merge of adapters into a base, by a method or as a sum: decide and measure, but write nothing.

    Returns:
        The merge, and the options with `trained_in` and `lineage` filled in. The warnings of the merge's report begin with a
        line for every adapter that was trained on a base with tensors of other names or shapes.
    """
    from adapterhub.merging import join, prepare_merge, read_base
    from adapterhub_converters.formats import convert

    model = read_base(base)
    spec = model.spec
    tensors = [convert.read(source.path, base=spec) for source in adapters]
    joined, lineage = None, _lineage(adapters, weights, base, spec)
    if method is not None:
        name, seed = method.method or "cat", method.seed or 0
        joined = join(tensors, weights, method=name, seed=seed, parameters=method.parameters)
        lineage |= {"method": name, "seed": seed, "parameters": dict(joined.parameters)} if joined else {}
    options, prompt_warnings = with_trained_prompt(options, [source.path for source in adapters], spec)
    options = dataclasses.replace(options, trained_in=common_quantization(adapters), lineage=lineage)
    merge = prepare_merge(list(zip(tensors, weights, strict=True)), model, options, gguf=gguf, join=joined)
    warnings = (*_other_base_warnings(adapters, spec, base), *prompt_warnings, *merge.report.warnings)
    return dataclasses.replace(merge, report=dataclasses.replace(merge.report, warnings=warnings)), options


def with_trained_prompt(options: Options, adapters: Iterable[Path], spec: BaseSpec) -> tuple[Options, tuple[str, ...]]:
    """Let a merged model be asked as its adapters were trained to be asked; return the options and warnings."""
    from adapterhub_converters.bases import base_prompts

    prompt = common_prompt(map(TrainedPrompt.read, adapters), spec.chat_template_digest)
    if prompt is None:
        return options, (_DIFFERENT_PROMPTS,)
    base_prompt = base_prompts.of_spec(spec) if prompt else None
    template = prompt.as_template(base_prompt.template if base_prompt else None) if prompt else None
    end_token = _end_token(template, base_prompt, spec) if template and base_prompt else None
    return dataclasses.replace(options, chat_template=template, end_token=end_token), ()


def _end_token(template: str, base_prompt: BasePrompt, base: BaseSpec) -> int | None:
    """Return the token with which a template ends answers, unless the base stops there by itself."""
    from adapterhub.prompts import chat_template
    from adapterhub_converters.bases import base_prompts

    special, ends = base_prompts.end_tokens(base)
    if not any(token in template for token in special.keys() - ends):
        return None
    if importlib.util.find_spec("jinja2") is None:
        problem = "the adapters have a chat template of their own, and where it ends answers is found with jinja2"
        raise MissingExtraError(base.source, problem, "Run `pip install 'adapterhub[run]'`")
    return chat_template.end_token(template, base_prompt.special_tokens, special, ends, location=base.source)


def check_place(out: Path, base: Path) -> None:
    """Refuse to write a model over its base or into the folder of its base, which would change the base."""
    sources.check_apart(out, base)
    if base.is_dir() and base.resolve() in out.resolve().parents:
        raise UsageError(str(out), f"is inside the base, {base}, and would change it", "Choose another output")


def _other_base_warnings(adapters: Sequence[sources.Source], spec: BaseSpec, base: Path) -> Iterator[str]:
    """Yield a line for each adapter that pins a base of other names or shapes; a fine-tune of its base has the same."""
    for source in adapters:
        pinned = pinned_base(source)
        if spec.fingerprint and pinned.fingerprint and not spec.has_fingerprint(pinned.fingerprint):
            trained_on = pinned.repo or f"the base {str(pinned.fingerprint)[:19]}"
            warning = f"was trained on {trained_on}, and {base.name} has tensors of other names or shapes"
            yield f"{source.location} {warning}. Check it on that base for the differences"


def _lineage(adapters: Sequence[sources.Source], weights: Sequence[float], base: Path, spec: BaseSpec) -> dict[str, Any]:
    parents = [sources.parent(source, weight) for source, weight in zip(adapters, weights, strict=True)]
    base_facts = {"repo": spec.repo, "revision": spec.revision, "fingerprint": spec.fingerprint}
    return {
        "base": base_facts if spec.repo else {**base_facts, "name": base.resolve().name},
        "adapters": [
            {"digest": parent.digest, **({"ref": parent.ref} if parent.ref else {}), "weight": parent.weight}
            for parent in parents
        ],
    }


def verify_merge(
    merged: Path,
    base: Path,
    adapters: Sequence[sources.Source],
    weights: Sequence[float],
    workspace: Workspace,
    *,
    onto: BaseWeights,
) -> Proofs:
    """Compare every tensor of a merged model with the expected result of merging these adapters into `base`."""
    from adapterhub.merging import Options
    from adapterhub.merging.into_base import merge_proof
    from adapterhub_converters import bases
    from adapterhub_converters.formats import convert

    spec = bases.read_hf(base) if base.is_dir() else None
    tensors = [convert.read(source.path, base=spec) for source in adapters]
    options = Options(as_trained=onto == "as-trained", trained_in=common_quantization(adapters))
    with workspace.steps("comparing tensors") as progress:
        return merge_proof.prove(list(zip(tensors, weights, strict=True)), base, merged, options=options, progress=progress)
