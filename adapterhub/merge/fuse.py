"""Adapters into a base: a Hugging Face folder in, a Hugging Face folder out, one tile of one tensor at a time.

The output has the same shards with the same headers, so an untouched tensor is a range of bytes copied inside the
kernel, and a touched one is read, changed and written in tiles of a million elements. Memory is a few tiles a
worker, whatever the size of the model. Plain LoRA comes out bit for bit as from peft's `merge_and_unload`
(`edits.py` has its order of rounding, `product.py` the order of its sums).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_converters.files import staging

from .checks import Weighted
from .companions import companions, copy_companions
from .edits import Edit
from .gguf_out import gguf_files
from .gguf_plan import plan_gguf
from .hf_base import read_folder
from .hf_out import Written, folder_files, write_texts
from .measure import Change, measured
from .options import FuseReport, Options
from .plan import plan
from .running import Copy, Made, Opened, OutFile, Part, Progress, Run, Text

PLAIN = Options()


@dataclass(frozen=True)
class Merge:
    """A merge that stands, of which nothing is written yet: every refusal but a full disk's is past.

    Attributes:
        report: What it does.
        single: Whether the output is one file, and not a folder.
    """

    report: FuseReport
    single: bool
    _files: Callable[[Path], Sequence[OutFile]]
    _beside: Callable[[Path], None]

    def write(self, out: Path, progress: Progress | None = None) -> FuseReport:
        """Write the result as `out`, which appears whole or not at all.

        Raises:
            OutputExistsError: `out` is there already.
            LocalIOError: The disk is full or cannot be written; nothing was left behind.
        """
        run = Run(progress, self.report.size)
        with staging.whole(out, folder=not self.single) as inside:
            if self.single:
                run.write(self._files(inside), inside.parent)
            else:
                self._beside(inside)
                run.write(self._files(inside), inside)
        return replace(self.report, out=out)


def fuse(
    adapters: Weighted, base: Path, out: Path, *, options: Options = PLAIN, progress: Progress | None = None
) -> FuseReport:
    """Merge adapters, each times its weight, into a base and write the result as `out`.

    Raises:
        RefusedError: The result would not be base plus adapters; nothing was written.
        OutputExistsError: `out` is there already.
        LocalIOError: The disk is full or cannot be written; nothing was left behind.
    """
    return prepared(adapters, base, options).write(out, progress)


def prepared(adapters: Weighted, base: Path, options: Options = PLAIN) -> Merge:
    """The merge of adapters, each times its weight, into a base: a Hugging Face folder, or a GGUF file."""
    return _into_gguf(adapters, base, options) if base.is_file() else _into_folder(adapters, base, options)


def _into_gguf(adapters: Weighted, base: Path, options: Options) -> Merge:
    steps = plan_gguf(adapters, base)
    files = gguf_files(steps, Path("out.gguf"), options)
    changes = _measured(files, steps.edits)
    tensors = sum(not isinstance(part, Text) for file in files for part in file.parts)
    report = _report(files, changes, steps.notes, copied=(), skipped={}, tensors=tensors)
    return Merge(report, not options.shard_size, lambda out: gguf_files(steps, out, options), lambda folder: None)


def _size(part: Part) -> int:
    return 0 if isinstance(part, Text) else part.counted if isinstance(part, Copy) else part.size


def _name(part: Part) -> str:
    return part.name if isinstance(part, Made) else ""


def _measured(files: Sequence[OutFile], edits: Mapping[str, Sequence[Edit]]) -> dict[str, Change]:
    run = Run(None, 0)
    with Opened() as opened:
        made = [part for file in files for part in file.parts if isinstance(part, Made) and edits.get(part.name)]
        return {part.name: measured(part, opened, run) for part in made}


def _into_folder(adapters: Weighted, base: Path, options: Options) -> Merge:
    folder = read_folder(base, dequantise=options.dequantise)
    steps = plan(adapters, folder)
    take, skipped = companions(base, {shard.path.name for shard in folder.shards})
    files, texts = folder_files(folder, Written(steps.edits, steps.added, steps.shapes, steps.config), options)
    changes = _measured(files, steps.edits)
    report = _report(
        files, changes, [*steps.notes], copied=take, skipped=skipped, tensors=len(folder.weights) + len(steps.added)
    )

    def beside(target: Path) -> None:
        copy_companions(base, target, take)
        write_texts(target, texts)

    return Merge(report, False, lambda out: files, beside)


def _report(files: Sequence[OutFile], changes: Mapping[str, Change], notes: Sequence[str], **more: Any) -> FuseReport:
    parts = [part for file in files for part in file.parts]
    return FuseReport(
        out=None,
        touched=changes,
        size=sum(_size(part) for part in parts),
        touched_size=sum(_size(part) for part in parts if _name(part) in changes),
        notes=tuple(notes),
        **more,
    )
