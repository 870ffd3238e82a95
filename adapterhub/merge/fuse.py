"""Adapters into a base: a Hugging Face folder in, a Hugging Face folder out, one tile of one tensor at a time.

The output has the same shards with the same headers, so an untouched tensor is a range of bytes copied inside the
kernel, and a touched one is read, changed and written in tiles of a million elements. Memory is a few tiles a
worker, whatever the size of the model. Plain LoRA comes out bit for bit as from peft's `merge_and_unload`
(`edits.py` has its order of rounding, `product.py` the order of its sums).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.files import staging
from adapterhub_converters.files.safetensors_file import TensorInfo

from .companions import companions, copy_companions
from .edits import Edit
from .measure import Change, measured
from .plan import Plan, Shard, Weighted, plan
from .running import Copy, Made, Opened, OutFile, Part, Progress, Run, Stored
from .stored import kind


@dataclass(frozen=True)
class FuseReport:
    """What a merge did; sizes in bytes.

    Attributes:
        out: The new folder.
        touched: Tensor name to its change.
        tensors: How many tensors the base has.
        size: Of all weights.
        touched_size: Of the tensors changed.
        copied: Other files that came along.
        skipped: Files that did not, each with the reason.
        notes: One line each.
    """

    out: Path
    touched: Mapping[str, Change]
    tensors: int
    size: int
    touched_size: int
    copied: tuple[str, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]


def fuse(adapters: Weighted, base: Path, out: Path, *, progress: Progress | None = None) -> FuseReport:
    """Merge adapters, each times its weight, into the base folder `base` and write the result as `out`.

    Raises:
        RefusedError: The result would not be base plus adapters; nothing was written.
        OutputExistsError: `out` is there already.
        LocalIOError: The disk is full or cannot be written; nothing was left behind.
    """
    steps = plan(adapters, base)
    take, skipped = companions(base, {shard.path.name for shard in steps.shards})
    infos = {name: info for shard in steps.shards for name, info in shard.tensors.items()}
    size = sum(info.size for info in infos.values())
    files = _files(steps)
    run = Run(progress, size)
    with Opened() as opened:
        changes = {part.name: measured(part, opened, run) for file in files for part in file.parts if isinstance(part, Made)}
    with staging.whole(out) as folder:
        copy_companions(base, folder, take)
        run.write(files, folder)
    return FuseReport(
        out=out,
        touched=changes,
        tensors=len(infos),
        size=size,
        touched_size=sum(infos[name].size for name in steps.edits),
        copied=take,
        skipped=skipped,
        notes=steps.notes,
    )


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
