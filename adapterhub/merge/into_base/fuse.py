"""Adapters into a base, a Hugging Face folder or a GGUF model: everything decided and measured first, then written.

What becomes of each tensor is planned (`plan`, `gguf_plan`), laid out in files (`hf_out`, `gguf_out`), measured
(`honesty`) and written (`running`). Plain LoRA into a folder in its own type comes out bit for bit as from peft's
`merge_and_unload` (`edits` has its order of rounding, `product` the order of its sums).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub.merge.checks import Weighted
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import RefusedError, UsageError

from . import resume, side_files
from .folder_to_gguf import gguf_model
from .loss_estimate import as_trained, changes_of, warnings
from .measure import Change
from .nf4_writer import to_nf4
from .options import NF4, FuseReport, Options
from .output_files import Copy, Made, OutFile, Part, Progress, Run, Text
from .plan import Plan, plan
from .plan_gguf import plan_gguf
from .read_folder import read_folder
from .side_files import companions, copy_companions
from .write_folder import Written, folder_files, write_texts
from .write_gguf import gguf_files

PLAIN = Options()


@dataclass(frozen=True)
class Merge:
    """A merge that stands, of which nothing is written yet. What can be refused after this is a number that isn't one, in
    rows that were not looked at, and a full disk.

    Attributes:
        report: What it does.
        single: Whether the output is one file, and not a folder.
    """

    report: FuseReport
    single: bool
    _job: Callable[[], str]
    _files: Callable[[Path], Sequence[OutFile]]
    _beside: Callable[[Path], None]

    def write(self, out: Path, progress: Progress | None = None) -> FuseReport:
        """Write the result as `out`, which appears whole or not at all.

        Raises:
            OutputExistsError: `out` is there already.
            UsageError: `out` is the name of a file, and a folder is to be written.
            LocalIOError: The disk is full or cannot be written; nothing was left behind.
        """
        if not self.single and out.suffix == ".gguf":
            raise UsageError(str(out), "is the name of a file, and this merge writes a folder", "Name a folder")
        run = Run(progress, self.report.size)
        several = not self.single and len(self._files(out)) > 1
        job = self._job() if several else ""
        left = None if self.single else resume.left_over(out, job)
        with atomic.whole(out, folder=not self.single) as inside:
            files = self._files(inside)
            if several:
                self._resumable(run, files, resume.Finished(job, inside), left)
            else:
                self._beside(inside)
                run.write(files, inside.parent if self.single else inside)
        return replace(self.report, out=out)

    def _resumable(self, run: Run, files: Sequence[OutFile], finished: resume.Finished, left: Path | None) -> None:
        """Of several files those that an interrupted run finished are taken over, and if this one is, it leaves its own."""
        taken = finished.take_over(left) if left else set()
        try:
            self._beside(finished.folder)
            run.skip(sum(_size(part) for file in files if file.name in taken for part in file.parts))
            run.write([file for file in files if file.name not in taken], finished.folder, finished.note)
        except (KeyboardInterrupt, SystemExit):
            finished.keep()
            raise


def fuse(
    adapters: Weighted, base: Path, out: Path, *, options: Options = PLAIN, progress: Progress | None = None
) -> FuseReport:
    """Merge adapters, each times its weight, into a base and write the result as `out`.

    Raises:
        RefusedError: The result would not be base plus adapters; nothing was written.
        OutputExistsError: `out` is there already.
        LocalIOError: The disk is full or cannot be written; nothing was left behind.
    """
    return prepared(adapters, base, options, gguf=out.suffix == ".gguf").write(out, progress)


def prepared(adapters: Weighted, base: Path, options: Options = PLAIN, *, gguf: bool = False) -> Merge:
    """The merge of adapters, each times its weight, into a base: a Hugging Face folder, or a GGUF file.

    With `gguf` the result of a folder is one too, and there may be no adapter at all.
    """
    if base.is_file():
        return _into_gguf(adapters, base, options)
    return _folder_as_gguf(adapters, base, options) if gguf else _into_folder(adapters, base, options)


def _into_gguf(adapters: Weighted, base: Path, options: Options) -> Merge:
    if options.as_trained or options.dequantize:
        name = "--onto as-trained" if options.as_trained else "--dequantize"
        raise RefusedError(name, "is for a Hugging Face folder, and the base is a GGUF file", "Leave it out")
    if options.requantize == NF4:
        raise RefusedError("--requantize", "nf4 is a form of Hugging Face folders, and the base is a GGUF file", "Choose q4_0")
    if options.requantize and options.dtype:
        raise RefusedError("--dtype", f"matrices become {options.requantize} already (--requantize)", "Name one of the two")
    steps = plan_gguf(adapters, base)
    files = gguf_files(steps, Path("out.gguf"), options)
    changes = changes_of(files, steps.edits, options)
    tensors = sum(not isinstance(part, Text) for file in files for part in file.parts)
    report = _report(files, changes, steps.notes, copied=(), skipped={}, tensors=tensors)
    return Merge(
        report,
        not options.shard_size,
        partial(resume.job, adapters, base, options),
        lambda out: gguf_files(steps, out, options),
        lambda folder: None,
    )


def _size(part: Part) -> int:
    return 0 if isinstance(part, Text) else part.counted if isinstance(part, Copy) else part.size


def _name(part: Part) -> str:
    return part.name if isinstance(part, Made) else ""


def _into_folder(adapters: Weighted, base: Path, options: Options) -> Merge:
    if options.requantize and options.requantize != NF4:
        what = f"{options.requantize} is a type of GGUF, and the output is a Hugging Face folder"
        raise RefusedError("--requantize", what, "Merge into a .gguf, or choose nf4 or --dtype")
    folder = read_folder(base, dequantize=options.dequantize or options.requantize == NF4)
    steps = plan(adapters, folder)
    take, skipped = companions(base, {shard.path.name for shard in folder.shards})
    seen = as_trained(folder, options) if options.as_trained else {}
    packed = frozenset(to_nf4(folder, dtype=options.dtype)) if options.requantize == NF4 else frozenset()
    written = Written(steps.edits, steps.added, steps.shapes, steps.config, seen, packed)
    files, texts = folder_files(folder, written, options)
    own = {name: folder.weights[name].source() for name in seen}
    changes = changes_of(files, steps.edits, options, own)
    report = _report(
        files, changes, [*steps.notes], copied=take, skipped=skipped, tensors=len(folder.weights) + len(steps.added)
    )

    texts[side_files.NAME] = side_files.written(base, folder.spec, options.lineage, report.notes)

    def beside(target: Path) -> None:
        copy_companions(base, target, take)
        write_texts(target, texts)

    return Merge(report, False, partial(resume.job, adapters, base, options), lambda out: files, beside)


def _folder_as_gguf(adapters: Weighted, base: Path, options: Options) -> Merge:
    if options.shard_size:
        hint = "Leave it out, and split the file with llama-gguf-split"
        raise RefusedError("--shard-size", "a Hugging Face folder becomes one GGUF file", hint)
    if options.requantize == NF4:
        raise RefusedError(
            "--requantize", "nf4 is a form of Hugging Face folders, and the output is a GGUF file", "Choose q4_0"
        )
    if options.requantize and options.dtype:
        raise RefusedError("--dtype", f"matrices become {options.requantize} already (--requantize)", "Name one of the two")
    folder = read_folder(base, dequantize=options.dequantize)
    steps = plan(adapters, folder) if adapters else Plan({})
    seen = as_trained(folder, options) if options.as_trained else {}
    model = gguf_model(folder, Written(steps.edits, steps.added, steps.shapes, steps.config, seen), options)
    own = {name: folder.weights[name].source() for name in seen}
    changes = changes_of([OutFile("", model.changed)], steps.edits, options, own)
    notes = [*steps.notes, *model.notes]
    report = _report(model.files(Path("out.gguf")), changes, notes, copied=(), skipped={}, tensors=len(model.tensors))
    return Merge(
        replace(report, touched_size=sum(made.size for made in model.changed)),
        True,
        partial(resume.job, adapters, base, options),
        model.files,
        lambda folder: None,
    )


def _report(files: Sequence[OutFile], changes: Mapping[str, Change], notes: Sequence[str], **more: Any) -> FuseReport:
    parts = [part for file in files for part in file.parts]
    return FuseReport(
        out=None,
        touched=changes,
        warnings=warnings(changes),
        size=sum(_size(part) for part in parts),
        touched_size=sum(_size(part) for part in parts if _name(part) in changes),
        notes=tuple(notes),
        **more,
    )
