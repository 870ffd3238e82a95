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

from adapterhub_converters.errors import RefusedError, refused
from adapterhub_converters.files import staging

from . import merged_card, resuming
from .checks import Weighted
from .companions import companions, copy_companions
from .edits import Edit
from .gguf_out import gguf_files
from .gguf_plan import plan_gguf
from .hf_base import Folder, read_folder
from .hf_out import Written, folder_files, write_texts
from .measure import Change, Trained, measured
from .nf4 import ThroughNF4, sampled
from .options import FuseReport, Options
from .plan import CONV1D, plan
from .running import Copy, Made, Opened, OutFile, Part, Progress, Run, Source, Text
from .stored import kind

PLAIN = Options()
ROUTERS = ("mlp.gate.weight", "mlp.router.weight", "block_sparse_moe.gate.weight")
LEAST_KEPT = 0.9
"""Of a module's change: less is refused on a quantised target, and warned about on one in 16 bits."""


@dataclass(frozen=True)
class Merge:
    """A merge that stands, of which nothing is written yet: every refusal but a full disk's is past.

    Attributes:
        report: What it does.
        single: Whether the output is one file, and not a folder.
    """

    report: FuseReport
    single: bool
    _job: str
    _files: Callable[[Path], Sequence[OutFile]]
    _beside: Callable[[Path], None]

    def write(self, out: Path, progress: Progress | None = None) -> FuseReport:
        """Write the result as `out`, which appears whole or not at all.

        Raises:
            OutputExistsError: `out` is there already.
            LocalIOError: The disk is full or cannot be written; nothing was left behind.
        """
        run = Run(progress, self.report.size)
        left = None if self.single else resuming.left_over(out, self._job)
        with staging.whole(out, folder=not self.single) as inside:
            files = self._files(inside)
            if self.single or (len(files) == 1 and left is None):
                self._beside(inside)
                run.write(files, inside.parent if self.single else inside)
            else:
                self._resumable(run, files, inside, left)
        return replace(self.report, out=out)

    def _resumable(self, run: Run, files: Sequence[OutFile], inside: Path, left: Path | None) -> None:
        """Of several files those that an interrupted run finished are taken over, and if this one is, it leaves its own."""
        finished = resuming.Finished(self._job, inside)
        taken = finished.take_over(left) if left else set()
        try:
            self._beside(inside)
            run.skip(sum(_size(part) for file in files if file.name in taken for part in file.parts))
            run.write([file for file in files if file.name not in taken], inside, finished.note)
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
    return prepared(adapters, base, options).write(out, progress)


def prepared(adapters: Weighted, base: Path, options: Options = PLAIN) -> Merge:
    """The merge of adapters, each times its weight, into a base: a Hugging Face folder, or a GGUF file."""
    return _into_gguf(adapters, base, options) if base.is_file() else _into_folder(adapters, base, options)


def _into_gguf(adapters: Weighted, base: Path, options: Options) -> Merge:
    if options.as_trained or options.dequantise:
        name = "--onto as-trained" if options.as_trained else "--dequantise"
        raise RefusedError(name, "is for a Hugging Face folder, and the base is a GGUF file", "Leave it out")
    steps = plan_gguf(adapters, base)
    files = gguf_files(steps, Path("out.gguf"), options)
    changes = _measured(files, steps.edits, options)
    tensors = sum(not isinstance(part, Text) for file in files for part in file.parts)
    report = _report(files, changes, steps.notes, copied=(), skipped={}, tensors=tensors)
    return Merge(
        report,
        not options.shard_size,
        resuming.job(adapters, base, options),
        lambda out: gguf_files(steps, out, options),
        lambda folder: None,
    )


def _size(part: Part) -> int:
    return 0 if isinstance(part, Text) else part.counted if isinstance(part, Copy) else part.size


def _name(part: Part) -> str:
    return part.name if isinstance(part, Made) else ""


def _measured(
    files: Sequence[OutFile], edits: Mapping[str, Sequence[Edit]], options: Options, own: Mapping[str, Source] | None = None
) -> dict[str, Change]:
    """What becomes of each tensor that is changed; RefusedError when too little of the adapter would come through."""
    run, trained = Run(None, 0), _trained(options)
    with Opened() as opened:
        made = [part for file in files for part in file.parts if isinstance(part, Made) and edits.get(part.name)]
        changes = {part.name: measured(part, (own or {}).get(part.name, part.source), opened, run, trained) for part in made}
    lost = {name: change.kept for name, change in changes.items() if change.quantised and _is_lost(change)}
    if lost and not options.force:
        lines = [
            f"{name}: {kept:.1%} of the adapter's change would be kept" for name, kept in sorted(lost.items(), key=_second)
        ]
        hint = "Merge into 16 bits (--dtype bf16), or into the full-precision model; --force writes it all the same"
        raise refused("quantised", lines, hint)
    return changes


def _second(item: tuple[str, float | None]) -> float:
    return item[1] or 0.0


def _is_lost(change: Change) -> bool:
    return change.kept is not None and change.kept < LEAST_KEPT


def _trained(options: Options) -> Trained | None:
    """What training saw, as far as it is known: a base in floats is compared with NF4 only."""
    return Trained(is_linear, sampled) if options.trained_in == "nf4" else None


def _into_folder(adapters: Weighted, base: Path, options: Options) -> Merge:
    if options.requantise:
        what = f"{options.requantise} is a type of GGUF, and the output is a Hugging Face folder"
        raise RefusedError("--requantise", what, "Merge into a .gguf, or choose --dtype")
    folder = read_folder(base, dequantise=options.dequantise)
    steps = plan(adapters, folder)
    take, skipped = companions(base, {shard.path.name for shard in folder.shards})
    seen = _as_trained(folder, options) if options.as_trained else {}
    written = Written(steps.edits, steps.added, steps.shapes, steps.config, seen)
    files, texts = folder_files(folder, written, options)
    own = {name: folder.weights[name].source() for name in seen}
    changes = _measured(files, steps.edits, options, own)
    report = _report(
        files, changes, [*steps.notes], copied=take, skipped=skipped, tensors=len(folder.weights) + len(steps.added)
    )

    texts[merged_card.NAME] = merged_card.written(base, folder.spec, options.lineage, report.notes)

    def beside(target: Path) -> None:
        copy_companions(base, target, take)
        write_texts(target, texts)

    return Merge(report, False, resuming.job(adapters, base, options), lambda out: files, beside)


def _as_trained(folder: Folder, options: Options) -> dict[str, Source]:
    """Every linear layer's weight as training in NF4 saw it; RefusedError when it isn't known what training saw."""
    if options.trained_in != "nf4":
        what = f"training saw the base in {options.trained_in}" if options.trained_in else "no quantisation is recorded"
        raise RefusedError("--onto as-trained", f"{what}, and only nf4 is known here", "Leave it out")
    if folder.method:
        raise RefusedError("--onto as-trained", f"the base is {folder.method} already", "Leave it out: it is what it is")
    if folder.spec.model_type in CONV1D:
        raise RefusedError("--onto as-trained", f"{folder.spec.model_type} stores its weights transposed", "Leave it out")
    found: dict[str, Source] = {}
    for name, weight in folder.weights.items():
        form = kind(weight.dtype)
        if is_linear(name) and len(weight.shape) == 2 and form:
            if name.endswith(ROUTERS):
                raise RefusedError(name, "a router: whether training saw it quantised isn't known", "Leave --onto out")
            found[name] = ThroughNF4(name, weight.source(), form)
    return found


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer that training quantises: in a layer, and no norm."""
    parts = name.split(".")
    return name.endswith(".weight") and any(part.isdigit() for part in parts) and "norm" not in parts[-2]


def _report(files: Sequence[OutFile], changes: Mapping[str, Change], notes: Sequence[str], **more: Any) -> FuseReport:
    parts = [part for file in files for part in file.parts]
    lost = [name for name, change in changes.items() if _is_lost(change)]
    warnings = []
    if lost:
        worst = min(lost, key=lambda name: changes[name].kept or 0.0)
        kept = f"of the adapter's change in {worst} {changes[worst].kept:.0%} survives rounding"
        warnings.append(f"{kept}, less than {LEAST_KEPT:.0%} in {len(lost)} of {len(changes)} tensors")
    return FuseReport(
        out=None,
        touched=changes,
        warnings=tuple(warnings),
        size=sum(_size(part) for part in parts),
        touched_size=sum(_size(part) for part in parts if _name(part) in changes),
        notes=tuple(notes),
        **more,
    )
