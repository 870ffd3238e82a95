"""Conversion between any two formats of the table, and recognition of the format of a path.

A conversion reads to the canonical form and writes from it. The result appears under its final name whole or not at all: it is
written next to it under a temporary name and renamed. Nothing that exists is overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adapterhub_converters import collector
from adapterhub_converters.adapter import Adapter, Factored, Loss, LossReport, TensorLoss, factored_out, refuse_tuned
from adapterhub_converters.adapter_files import ADAPTER_JSON, adapter_in, is_pickle_name, whole_model
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import (
    AdapterhubError,
    FormatError,
    NotFoundError,
    NotUnderstoodError,
    ParameterError,
    RefusedError,
    refused,
)

from . import FORMATS, PACKAGES, Format, base_weights, find, gguf, in_order, lossy, names, ollama, peft, pickles, placed, unread
from .candidate import Candidate
from .image import pipeline
from .lossy import Allowed

NOTHING = Allowed()


def sniff(path: Path | Candidate) -> str:
    """The name of the format of the adapter at `path`.

    Raises:
        NotFoundError: There is nothing at `path`, or a folder without an adapter.
        RefusedError: It is a pickle, or a distributed checkpoint.
        NotUnderstoodError: Its config is one that no format here has.
        FormatError: It is not an adapter of any format.
    """
    candidate = path if isinstance(path, Candidate) else Candidate(path)
    path = candidate.path
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder", code="no-such-file")
    if row := next((row for row in in_order() if row.sniff(candidate)), None):
        return row.name
    _refuse_distributed(path)
    pickles.refuse(path)
    if candidate.is_whole_model:
        raise whole_model(path)
    what = "not an adapter of a known format"
    if (path / peft.CONFIG).is_file():
        json_file.parse_object(candidate.config, str(path / peft.CONFIG))  # broken JSON is a better reason
        if unread.is_foreign(path):
            raise NotUnderstoodError(str(path), f"its {peft.CONFIG} is not one of a format that is known here")
        what = f"{what}: its {peft.CONFIG} has no peft_type"
        raise FormatError(str(path), what, "Add the peft_type to its config", code="peft-type-missing")
    if os.path.lexists(path / peft.CONFIG):
        json_file.read_text(path / peft.CONFIG)  # refuses a pipe, a folder, and a link to nothing by name
    if path.is_dir():
        what = f"no adapter in this folder: PEFT and MLX adapters have an {peft.CONFIG}"
        hint = peft.nested(path) or "Name the folder or the file of an adapter"
        raise NotFoundError(str(path), what, hint, code="no-adapter")
    raise FormatError(str(path), what, "Name the folder, the .safetensors or the .gguf file of an adapter", code="no-adapter")


def _refuse_distributed(path: Path) -> None:
    """Refuse what Megatron and NeMo save by default: a distributed checkpoint, in a folder or in an archive."""
    if path.is_dir():
        inside = next((item for item in (path, path / "weights") if any(item.glob("*.distcp"))), None)
        what = (
            None if inside is None else "its tensors are in Megatron's distributed checkpoint (.distcp), which is not supported"
        )
    else:
        what = "NeMo archives (a tar with a distributed checkpoint) are not supported" if path.suffix == ".nemo" else None
    if what:
        raise RefusedError(str(path), what, "Export it to PEFT with Megatron-Bridge (AutoBridge.export_adapter_ckpt)")


def read(path: Path, *, base: BaseSpec | None = None, mapped: bool = False) -> Adapter:
    """The adapter at `path`, in any format; `mapped` allows tensors of a PEFT folder to be views of its files."""
    pickles.refuse(path)
    path = adapter_in(path)
    candidate = Candidate(path)
    kind = sniff(candidate)
    if kind == "peft":
        return peft.read(path, base=base, mapped=mapped)
    try:
        return find(kind).read(path, base=base)
    except RefusedError as error:
        known = base_from_manifest(path) if error.code == "base-required" and base is None else None
        if known is None:
            raise
        return find(kind).read(path, base=known)


def read_unordered(path: Path, *, base: BaseSpec | None = None) -> tuple[Adapter, bool]:
    """The adapter at `path` for its shapes and the range of its numbers, and whether the order of all rows is known.

    It is not in a GGUF of llama.cpp's own, which permutes those of q and k by the base's number of heads, without the base.
    """
    try:
        return read(path, base=base), True
    except RefusedError as error:
        path = adapter_in(path)
        if error.code != "base-required" or sniff(path) != "gguf":
            raise
        return gguf.read(path, ordered=False), False


def convert(
    src: Path,
    dst: Path,
    *,
    to: str,
    base: BaseSpec | None = None,
    allowed: Allowed = NOTHING,
    alpha: float | None = None,
    rslora: bool = False,
    unsafe_pickle: bool = False,
    dtype: str = "source",
    model: str | None = None,
    replace: bool = False,
) -> LossReport:
    """Write the adapter `src` in the format `to` as `dst`.

    An adapter that has the format already is checked and copied. What the format cannot express is refused, all of it in one
    error, unless it is `allowed` to be approximated or dropped.

    Args:
        src: A file or folder in any format.
        dst: A file or folder, as the format is; it must not exist, or be an empty folder where a folder is written.
        to: One of `formats.names()`. `ollama` is a folder with a GGUF and a Modelfile.
        base: The base model; if None, what an `adapter.json` next to the source records of it.
        allowed: What may be lost.
        alpha: The alpha of a file that does not record it.
        rslora: Whether such a file scales by alpha / sqrt(r).
        unsafe_pickle: Whether `src` may be a pickle.
        dtype: The type to store tensors as: `source`, or another of the format's `dtypes`.
        model: Ollama's name of the base, for `ollama` alone.
        replace: An earlier output at `dst` may be replaced.

    Returns:
        What became of each tensor.

    Raises:
        RefusedError: The format cannot express the adapter, or nothing records its scale.
        FormatError: `src` is malformed.
        OutputExistsError: `dst` exists.
        ParameterError: An argument does not go with the formats.
    """
    if to in PACKAGES:
        named, name = ollama.check(model), ollama.adapter_name(dst)
        base = base or base_from_manifest(src)
        with atomic.whole(dst, replace=replace) as folder:
            report = convert(
                src, folder / name, to=PACKAGES[to], base=base, allowed=allowed, alpha=alpha, rslora=rslora,
                unsafe_pickle=unsafe_pickle, dtype=dtype,
            )  # fmt: skip
            if gguf.is_conditional(folder / name):
                raise RefusedError(to, ollama.CONDITIONAL)
            ollama.write(folder, named, name)
        return dataclasses.replace(report, notes=(*report.notes, ollama.NOTE))
    if model is not None:
        raise ParameterError("model", f"{to} does not name a base", "Leave it out")
    row = find(to)
    if not row.writes:
        raise ParameterError("to", f"{to} can be read, but not written", f"One of {', '.join(names())}")
    if dtype not in row.dtypes:
        what = f"{to} keeps the types of the source" if len(row.dtypes) == 1 else f"{to} has no dtype {dtype!r}"
        raise ParameterError("dtype", what, f"One of {', '.join(row.dtypes)}")
    base = base or base_from_manifest(src)
    with _opened(src, base, unsafe_pickle=unsafe_pickle) as source:
        own = find(sniff(source))
        read_own = functools.partial(_read, own, base=base, alpha=alpha, rslora=rslora)
        with atomic.whole(dst, folder=row.folder, replace=replace) as temporary:
            if own == row and dtype == "source":
                return _copied(row, source.path, temporary, read_own, base)
            adapter = _on_base(read_own(source.path), row, base, str(source.path))
            if own != row:
                refuse_tuned(adapter)
            options = {"dtype": dtype} if len(row.dtypes) > 1 else {}

            def write(given: Adapter, path: Path) -> LossReport:
                given = pipeline.one_model(given) if row.deltas == "all" else given
                return row.write(given, path, base=base, **options)

            if row.deltas != "pairs":
                return _written(write, adapter, temporary, base, allowed)
            settled = _settled(adapter, base)
            return _rounded(adapter, _written(write, factored_out(settled), temporary, base, allowed), settled)


@contextlib.contextmanager
def _opened(src: Path, base: BaseSpec | None, *, unsafe_pickle: bool) -> Iterator[Candidate]:
    """`src` or, where it is a pickle that may be loaded, the tensors in it."""
    candidate = Candidate(src)
    # A file with a valid header is not a pickle, and need not be opened again to find out.
    pickle = pickles.found(src) if is_pickle_name(src.name) or not (candidate.header or candidate.gguf) else None
    if pickle is None or not unsafe_pickle:
        if pickle is not None:
            pickles.refuse(src)
        path = adapter_in(src)
        yield candidate if path == src else Candidate(path)
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        try:
            yield Candidate(_unpickled(pickles.converted(pickle, Path(folder)), pickle))
        except AdapterhubError as error:
            error.where = error.where.replace(folder, str(pickle.parent))  # nobody knows the temporary name
            raise


def _unpickled(found: Path, pickle: Path) -> Path:
    """The path to read of a pickle's tensors: for a trainer's own format the file alone, with the trainer's YAML next to it."""
    weights = found / peft.WEIGHTS if found.is_dir() else found
    candidate = Candidate(weights)
    if not any(row.sniff(candidate) for row in FORMATS.values() if row.alpha and row.name != "raw"):
        return found
    for yaml in pickle.parent.glob("*.yaml"):
        shutil.copyfile(yaml, weights.with_name(yaml.name))
    return weights


def _read(row: Format, path: Path, *, base: BaseSpec | None, alpha: float | None, rslora: bool) -> Adapter:
    if alpha is not None and not row.alpha:
        raise ParameterError("alpha", f"{path} is in {row.name}, which records its own alpha", "Leave it out")
    if rslora and not row.rslora:
        scale = "scales by alpha / r" if row.alpha else "records its own scale"
        raise ParameterError("rslora", f"{path} is in {row.name}, which {scale}", "Leave it out")
    options: dict[str, Any] = {"mapped": True} if row.name == "peft" else {}
    options |= {"alpha": alpha} if row.alpha else {}
    with collector.paused():
        return row.read(path, base=base, **options | ({"rslora": rslora} if row.rslora else {}))


def _copied(row: Format, src: Path, dst: Path, read_own: Callable[[Path], Adapter], base: BaseSpec | None) -> LossReport:
    """Check an adapter that has the format already, and copy its files; those of an earlier peft are brought forward."""
    if not all((src / file).is_file() for file in row.files):
        return row.write(read_own(src), dst)  # in shards: written as one file, which PEFT itself can load
    adapter = None if row.self_contained else read_own(src)
    for file in row.files or ("",):
        shutil.copyfile(src / file, dst / file)
    if adapter is None:  # the copy is checked, so that no file of the source is opened a third time
        try:
            adapter = read_own(dst)
        except AdapterhubError as error:
            error.where = error.where.replace(str(dst), str(src))
            raise
    newer = peft.brought_forward(adapter, base) if row.name == "peft" else adapter
    if newer is not adapter:
        return _rewritten(row, newer, dst, base)
    return LossReport(tuple(TensorLoss(name, Loss.EXACT) for name, _ in adapter.tensors()), adapter.notes)


def _rewritten(row: Format, adapter: Adapter, dst: Path, base: BaseSpec | None) -> LossReport:
    """Write an adapter over the copy of its files, of which the experts are different."""
    for file in row.files:
        (dst / file).unlink()
    report = row.write(adapter, dst, base=base)
    losses = [
        dataclasses.replace(line, loss=max(line.loss, Loss.REWRITTEN)) if ".experts." in line.name else line
        for line in report.losses
    ]
    return dataclasses.replace(report, losses=tuple(losses))


def _on_base(adapter: Adapter, row: Format, base: BaseSpec | None, where: str) -> Adapter:
    """The adapter, whose targets a base that was given must have; for PEFT under the names that its modules have in memory."""
    if row.name == "gguf":  # whose writer compares shapes as well
        return peft.stacked(adapter, base) if _has_stacks_alone(base) else adapter
    renamed = placed.checked(adapter, base, where)
    own = adapter.source is not None and adapter.source.format == "peft"
    return renamed if row.deltas == "all" and not own else adapter


def _has_stacks_alone(base: BaseSpec | None) -> bool:
    """Whether the architecture of a base has no experts one by one, not in its checkpoints either."""
    with contextlib.suppress(RefusedError):
        return base is not None and (found := base.mapped()).experts is not None and not found.listed
    return False


Write = Callable[[Adapter, Path], LossReport]


def _written(write: Write, adapter: Adapter, path: Path, base: BaseSpec | None, allowed: Allowed) -> LossReport:
    """Write the adapter; what is refused is approximated or dropped as far as it is allowed, and the rest written again."""
    try:
        return write(adapter, path)
    except RefusedError as error:
        first = error
    items = first.items or (f"{first.where}: {first.what}",)
    less = lossy.reduced(adapter, items, allowed, base)
    try:
        report = write(less.adapter, path) if less.losses else None
    except RefusedError as error:
        first = error
        report = None
    if report is None:
        hint, code, fields = first.hint, first.code, dict(first.fields)
        if not hint and less.options:
            hint, code, fields = lossy.hint(less.options), "loss-not-allowed", {"options": less.options}
        if reasons := [*dict.fromkeys([*first.items, *less.failed])]:
            raise refused(first.where, reasons, hint, code=code, **fields)
        raise RefusedError(first.where, first.what, hint, (), code=code, **fields)
    lost = {line.name for line in less.losses}
    losses = [*(line for line in report.losses if line.name not in lost), *less.losses]
    return dataclasses.replace(report, losses=tuple(sorted(losses, key=lambda line: line.name)))


def _settled(adapter: Adapter, base: BaseSpec | None) -> Adapter:
    """The adapter without copies of the base's weights, and as plain LoRA if it is PiSSA; unchanged without those weights."""
    if base is None or base.folder is None:
        return adapter
    folder = base.folder
    with contextlib.suppress(RefusedError):  # not the base's own table: the writer refuses it by name
        adapter = base_weights.without_copies(adapter, folder)
    return base_weights.plain_lora(adapter, folder) if adapter.meta.init == "pissa" else adapter


def _rounded(adapter: Adapter, report: LossReport, settled: Adapter) -> LossReport:
    """The report of a conversion whose writer got other pairs than the adapter's: pairs of the same function, rounded."""
    notes = {t: "factors are products, rounded once in float32" for t, d in adapter.deltas.items() if isinstance(d, Factored)}
    if settled.meta.init != adapter.meta.init:
        notes = dict.fromkeys(adapter.deltas, "plain LoRA of twice the rank, from a decomposition of the base in float32")
    if not notes:
        return report
    losses = [
        dataclasses.replace(line, loss=Loss.ROUNDED, note=notes[target])
        if line.loss < Loss.ROUNDED and (target := line.name.rpartition(".")[0]) in notes
        else line
        for line in report.losses
    ]
    return dataclasses.replace(report, losses=tuple(losses))


def base_from_manifest(src: Path) -> BaseSpec | None:
    """The base that the `adapter.json` next to an adapter describes; None without one that has an architecture and a config."""
    path = (src if src.is_dir() else src.parent) / ADAPTER_JSON
    if not path.is_file():
        return None
    base = json_file.read_object(path).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("architecture"), str) or not isinstance(base.get("config"), dict):
        return None
    config = base["config"]
    repo, revision = (value if isinstance(value := base.get(key), str) else None for key in ("repo", "revision"))
    return BaseSpec(
        where=str(path),
        kind="manifest",
        architecture=base["architecture"],
        model_type=str(base.get("model_type") or ""),
        config=config,
        # Without an entry it must not be assumed to be untied: llama.cpp would abort on a wrong guess.
        tied=config.get("tie_word_embeddings") is not False,
        repo=repo,
        revision=revision,
    )
