"""Adapters into a base: a Hugging Face folder in, a Hugging Face folder out, one tile of one tensor at a time.

The output has the same shards with the same headers, so an untouched tensor is a range of bytes copied inside the
kernel, and a touched one is read, changed and written in tiles of a million elements. Memory is a few tiles a
worker, whatever the size of the model. Plain LoRA comes out bit for bit as from peft's `merge_and_unload`
(`edits.py` has its order of rounding, `product.py` the order of its sums).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.files import staging
from adapterhub_converters.files.safetensors_file import TensorInfo

from .checks import Weighted
from .companions import companions, copy_companions
from .edits import Edit
from .gguf_out import gguf_files
from .gguf_plan import plan_gguf
from .measure import Change, measured
from .options import FuseReport, Options
from .plan import Plan, Shard, plan
from .running import Copy, Made, Opened, OutFile, Part, Progress, Run, Stored, Text
from .stored import kind

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
    report = FuseReport(
        out=None,
        touched=changes,
        tensors=sum(_is_tensor(part) for file in files for part in file.parts),
        size=sum(_size(part) for file in files for part in file.parts),
        touched_size=sum(_size(part) for file in files for part in file.parts if _name(part) in changes),
        copied=(),
        skipped={},
        notes=tuple(steps.notes),
    )
    return Merge(report, not options.shard_size, lambda out: gguf_files(steps, out, options), lambda folder: None)


def _is_tensor(part: Part) -> bool:
    return not isinstance(part, Text)


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
    steps = plan(adapters, base)
    take, skipped = companions(base, {shard.path.name for shard in steps.shards})
    infos = {name: info for shard in steps.shards for name, info in shard.tensors.items()}
    files = _files(steps)
    report = FuseReport(
        out=None,
        touched=_measured(files, steps.edits),
        tensors=len(infos),
        size=sum(info.size for info in infos.values()),
        touched_size=sum(infos[name].size for name in steps.edits),
        copied=take,
        skipped=skipped,
        notes=steps.notes,
    )
    return Merge(report, False, lambda folder: files, lambda folder: copy_companions(base, folder, take))


def _files(steps: Plan) -> list[OutFile]:
    """Every shard with its header as it is: runs of untouched bytes, and the touched tensors, in file order."""
    return [OutFile(shard.path.name, list(_parts(shard, steps.edits))) for shard in steps.shards]


def _parts(shard: Shard, edits: Mapping[str, tuple[Edit, ...]]) -> Iterator[Part]:
    start, end = 0, shard.data_start
    for info in shard.tensors.values():
        if info.name in edits:
            yield _copy(shard, start, end)
            yield _made(shard, info, edits[info.name])
            start = info.offset + info.size
        end = info.offset + info.size
    yield _copy(shard, start, end)


def _copy(shard: Shard, start: int, end: int) -> Copy:
    return Copy(shard.path, start, end - start, start, end - max(start, min(shard.data_start, end)))


def _made(shard: Shard, info: TensorInfo, edits: tuple[Edit, ...]) -> Made:
    form = kind(info.dtype)
    if form is None:
        raise RefusedError(info.name, f"is {info.dtype}, not bfloat16, float16 or float32", "Dequantise it first")
    rows = info.shape[0] if info.shape else 1
    columns = info.size // form.row_size(1) // max(1, rows)
    return Made(info.name, Stored(shard.path, info.offset, rows, columns, form), form, info.offset, edits, stepwise=True)
