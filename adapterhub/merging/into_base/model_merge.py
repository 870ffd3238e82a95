"""Merge adapters into a base, a Hugging Face folder or a GGUF model: plan and estimate everything first, then write.

The change of each tensor is planned (`plan_folder`, `plan_gguf`), laid out in files (`write_folder`, `write_gguf`,
`folder_to_gguf`), estimated (`loss_estimate`) and written (`output_files`). Plain LoRA merged into a folder, in the folder's
own type, is bit-identical to peft's `merge_and_unload` (`edits` has its order of rounding, `product` the order of its sums).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path

from adapterhub.merging.adapter_checks import WeightedAdapters
from adapterhub_converters import display, trained_prompt
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import resume
from .joined_edits import Join
from .loss_estimate import ChangeEstimate, estimate_all, sources_as_trained, warnings
from .merge_options import NF4, Options
from .mixtures import MIXTURES
from .nf4_writer import weights_for_nf4
from .output_files import Copy, EditedTensor, LiteralBytes, OutFile, OutputWriter, Part, Progress
from .plan_folder import Plan, plan, plan_joined
from .plan_gguf import plan_gguf, plan_gguf_joined
from .read_base import Base, Folder, GGUFBase, read_base
from .side_files import CARD, copy_side_files, model_card, side_files
from .write_folder import FolderContents, folder_files, generation_config, write_texts
from .write_gguf import gguf_files

PLAIN = Options()


@dataclass(frozen=True, repr=False)
class ModelMergeReport:
    """The result of a merge into a base, planned or written; sizes in bytes.

    Attributes:
        out: The new folder or file; None if nothing was written.
        touched: From tensor name to its estimated change.
        tensors: The number of tensors of the base.
        size: Bytes of all weights written.
        touched_size: Bytes of the changed tensors.
        notes: Decisions, one line each.
        warnings: Effects that the user may not intend, one line each.
        copied: Other files that are copied.
        skipped: Files that are not copied, with the reason.
    """

    out: Path | None
    touched: Mapping[str, ChangeEstimate]
    tensors: int
    size: int
    touched_size: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<ModelMergeReport {self.out}: {self.tensors} tensors, {len(self.touched)} changed, {self.size:,} bytes>"

    def _repr_html_(self) -> str:
        rows = [
            (name, *("" if share is None else f"{share:.1%}" for share in (change.relative, change.retained)))
            for name, change in self.touched.items()
        ]
        return display.table(rows, head=("tensor", "relative change", "kept"), caption=repr(self))


def _no_side_files(folder: Path) -> None:
    """Write nothing: a GGUF model is its weights alone."""


@dataclass(frozen=True)
class Merge:
    """A planned merge, of which nothing is written yet.

    Writing it can fail only for numbers that become infinite outside of the sample, and for a full disk.

    Attributes:
        report: The planned result.
        base: The model that the adapters are merged into.
        single: Whether the output is one file rather than a folder.
    """

    report: ModelMergeReport
    base: Base
    single: bool
    _job: Callable[[], str]
    _files: Callable[[Path], Sequence[OutFile]]
    _write_side_files: Callable[[Path], None] = field(default=_no_side_files)

    def write(self, out: Path, progress: Progress | None = None, *, replace: bool = False) -> ModelMergeReport:
        """Write the result to `out`, which appears complete or not at all; replace an existing model only with `replace`.

        Raises:
            OutputExistsError: `out` exists.
            UsageError: `out` is the name of a file, and the result is a folder.
            LocalIOError: The disk is full or cannot be written; nothing is left behind.
        """
        if not self.single and out.suffix == ".gguf":
            raise UsageError(str(out), "is the name of a file, and this merge writes a folder", "Name a folder")
        writer = OutputWriter(progress, self.report.size)
        # One file is written in one go: only finished files of several can be taken over by a later run.
        resumable = not self.single and len(self._files(out)) > 1
        job = self._job() if resumable else ""
        leftover = None if self.single else resume.find_leftover(out, job)
        with self.base, atomic.pending_output(out, folder=not self.single, replace=replace) as partial_output:
            files = self._files(partial_output)
            if resumable:
                self._write_resumable(writer, files, resume.FinishedFiles(job, partial_output), leftover)
            else:
                self._write_side_files(partial_output)
                writer.write(files, partial_output.parent if self.single else partial_output, self.base.opened)
        return dataclasses.replace(self.report, out=out)

    def _write_resumable(
        self, writer: OutputWriter, files: Sequence[OutFile], finished: resume.FinishedFiles, leftover: Path | None
    ) -> None:
        """Take over the files that an interrupted run finished and write the others; keep those done if interrupted."""
        finished_names = finished.take_over(leftover) if leftover else set()
        try:
            self._write_side_files(finished.folder)
            writer.skip(sum(_size(part) for file in files if file.name in finished_names for part in file.parts))
            remaining = [file for file in files if file.name not in finished_names]
            writer.write(remaining, finished.folder, self.base.opened, finished.record)
        except (KeyboardInterrupt, SystemExit):
            finished.keep()
            raise


def merge_into_base(
    adapters: WeightedAdapters, base: Path | Base, out: Path, *, options: Options = PLAIN, progress: Progress | None = None
) -> ModelMergeReport:
    """Merge adapters, each times its weight, into a base and write the result to `out`.

    Raises:
        RefusedError: The result would differ from the base plus the adapters; nothing was written.
        OutputExistsError: `out` exists.
        LocalIOError: The disk is full or cannot be written; nothing is left behind.
    """
    return prepare_merge(adapters, base, options, gguf=out.suffix == ".gguf").write(out, progress)


def prepare_merge(
    adapters: WeightedAdapters, base: Path | Base, options: Options = PLAIN, *, gguf: bool = False, join: Join | None = None
) -> Merge:
    """Plan the merge of adapters, each times its weight, into a base.

    Args:
        adapters: The adapters and their weights.
        base: A Hugging Face folder or a GGUF model: its path, or the result of `read_base`.
        options: How to write the result.
        gguf: Write a folder as GGUF; then there may be no adapter at all.
        join: The method to merge their deltas by; None to add them, each times its weight.
    """
    opened_base = read_base(base) if isinstance(base, Path) else base
    with opened_base:
        if isinstance(opened_base, GGUFBase):
            return _into_gguf(adapters, opened_base, options, join)
        plan_merge = _folder_as_gguf if gguf else _into_folder
        return plan_merge(adapters, opened_base, options, join)


def _into_gguf(adapters: WeightedAdapters, base: GGUFBase, options: Options, join: Join | None) -> Merge:
    if options.as_trained or options.dequantize:
        name = "as-trained" if options.as_trained else "dequantize"
        raise RefusedError(name, "is for a Hugging Face folder, and the base is a GGUF file", "Leave it out")
    if options.requantize == NF4:
        raise RefusedError(NF4, "is a type of Hugging Face folders, and the base is a GGUF file", "Choose q4_0")
    if options.requantize in MIXTURES:
        reason = "is a mixture, which is made of a Hugging Face folder, and the base is a GGUF file"
        raise RefusedError(options.requantize, reason, "Choose one type, such as q4_k")
    _refuse_two_types(options)
    steps = plan_gguf(adapters, base) if join is None else plan_gguf_joined(adapters, base, join)
    files = gguf_files(steps, Path("out.gguf"), options)
    changes = estimate_all(files, steps.edits, options, base.opened)
    tensors = sum(not isinstance(part, LiteralBytes) for file in files for part in file.parts)
    report = _report(files, changes, steps.notes, tensors=tensors)
    job = partial(resume.job_digest, adapters, base.path, options)
    return Merge(report, base, not options.shard_size, job, lambda out: gguf_files(steps, out, options))


def _into_folder(adapters: WeightedAdapters, folder: Folder, options: Options, join: Join | None) -> Merge:
    if options.requantize and options.requantize != NF4:
        reason = "is a type of GGUF files, and the output is a Hugging Face folder"
        raise RefusedError(options.requantize, reason, "Merge into a .gguf, or choose nf4", code="gguf-type-for-folder")
    if not options.dequantize and options.requantize != NF4:
        folder.refuse_quantized()
    steps = plan(adapters, folder) if join is None else plan_joined(adapters, folder, join)
    copied, skipped = side_files(folder.path, {shard.path.name for shard in folder.shards})
    training_sources = sources_as_trained(folder, options) if options.as_trained else {}
    in_nf4 = frozenset(weights_for_nf4(folder, dtype=options.dtype)) if options.requantize == NF4 else frozenset()
    contents = FolderContents(steps.edits, steps.added, steps.shapes, steps.config, training_sources, in_nf4)
    files, texts = folder_files(folder, contents, options)
    # The estimate compares with the base's own numbers, not with those that training saw.
    changes = estimate_all(
        files, steps.edits, options, folder.opened, {name: folder.weights[name].source() for name in training_sources}
    )
    tensors = len(folder.weights) + len(steps.added)
    report = dataclasses.replace(_report(files, changes, steps.notes, tensors=tensors), copied=copied, skipped=skipped)
    if options.chat_template is not None:
        texts[trained_prompt.FILE] = options.chat_template
    if options.end_token is not None:
        texts |= generation_config(folder, options.end_token)
    texts[CARD] = model_card(folder.path, folder.spec, options.lineage, report.notes)

    def write_side_files(target: Path) -> None:
        copy_side_files(folder.path, target, copied)
        write_texts(target, texts)

    job = partial(resume.job_digest, adapters, folder.path, options)
    return Merge(report, folder, False, job, lambda out: files, write_side_files)


def _folder_as_gguf(adapters: WeightedAdapters, folder: Folder, options: Options, join: Join | None) -> Merge:
    if options.shard_size:
        hint = "Leave it out, and split the file with llama-gguf-split"
        raise RefusedError("shard size", "a Hugging Face folder becomes one GGUF file", hint)
    if options.requantize == NF4:
        raise RefusedError(NF4, "is a type of Hugging Face folders, and the output is a GGUF file", "Choose q4_0")
    _refuse_two_types(options)
    if not options.dequantize:
        folder.refuse_quantized()
    # Without adapters this is a plain conversion of the folder.
    steps = Plan({}) if not adapters else plan_joined(adapters, folder, join) if join else plan(adapters, folder)
    training_sources = sources_as_trained(folder, options) if options.as_trained else {}
    from .folder_to_gguf import gguf_model  # late: only here is a whole model converted

    model = gguf_model(folder, FolderContents(steps.edits, steps.added, steps.shapes, steps.config, training_sources), options)
    base_sources = {name: folder.weights[name].source() for name in training_sources}
    changes = estimate_all([OutFile("", model.changed)], steps.edits, options, folder.opened, base_sources)
    files = model.files(Path("out.gguf"))
    report = _report(files, changes, (*steps.notes, *model.notes), tensors=len(model.tensors))
    report = dataclasses.replace(report, touched_size=sum(tensor.size for tensor in model.changed))
    return Merge(report, folder, True, partial(resume.job_digest, adapters, folder.path, options), model.files)


def _refuse_two_types(options: Options) -> None:
    if options.requantize and options.dtype:
        reason = f"matrices become {options.requantize} already"
        raise RefusedError(options.dtype, reason, "Name one type", code="two-types")


def _report(
    files: Sequence[OutFile], changes: Mapping[str, ChangeEstimate], notes: Sequence[str], *, tensors: int
) -> ModelMergeReport:
    parts = [part for file in files for part in file.parts]
    touched = (part for part in parts if isinstance(part, EditedTensor) and part.name in changes)
    return ModelMergeReport(
        out=None,
        touched=changes,
        tensors=tensors,
        size=sum(_size(part) for part in parts),
        touched_size=sum(part.size for part in touched),
        notes=tuple(notes),
        warnings=warnings(changes),
    )


def _size(part: Part) -> int:
    """Return the number of bytes of a part that belong to tensors."""
    return 0 if isinstance(part, LiteralBytes) else part.counted if isinstance(part, Copy) else part.size
