"""All formats by name: which one a path is, and from any of them to any other.

A conversion reads to the canonical form and writes from it. The result appears under its final name whole or not at
all: it is written beside it under a temporary name and renamed, and nothing that exists is ever overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from adapterhub_converters.adapter import Adapter, Factored, Kept, Loss, LossReport, factored_out
from adapterhub_converters.adapter_files import ADAPTER_JSON, adapter_in
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RefusedError, UsageError, refused

from . import base_weights, gguf, lossy, mlx, ollama, peft, pickles, raw
from .image import diffusers, kohya, pipeline
from .lossy import Allowed
from .trainers import litgpt, megatron, megatron_shards, torchtune


class Format(Protocol):
    """What the module of a format offers."""

    def sniff(self, path: Path) -> bool:
        """Whether `path` is an adapter of this format, by names and configs, never by shapes."""
        ...

    def read(self, path: Path, *, base: BaseSpec | None = None) -> Adapter:
        """The adapter at `path`."""
        ...

    def write(self, adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
        """Write to a new file, or into the existing, empty folder `path`."""
        ...


class Silent(Protocol):
    """What the module of a format offers whose files say no alpha, and whose program scales by alpha / r."""

    def read(self, path: Path, *, base: BaseSpec | None = None, alpha: float | None = None) -> Adapter:
        """The adapter at `path`, with `alpha` where nothing says another."""
        ...


FORMATS: Mapping[str, Format] = {
    "peft": peft, "gguf": gguf, "mlx": mlx,
    "kohya": kohya, "diffusers": diffusers,
    "torchtune": torchtune, "litgpt": litgpt, "megatron": megatron,
    "raw": raw,  # the last: it takes what no other knows
}  # fmt: skip
# The files of the formats that are folders; the others are one file.
_FILES = {"peft": (peft.CONFIG, peft.WEIGHTS), "mlx": (mlx.CONFIG, mlx.WEIGHTS)}
FOLDERS = frozenset(_FILES)
PACKAGES = ("ollama",)
"""What a format is packaged as with something beside it: written, and read as that format."""
_SILENT: Mapping[str, Silent] = {"torchtune": torchtune, "litgpt": litgpt, "megatron": megatron}
ENDINGS = {"gguf": ".gguf", **dict.fromkeys(("raw", "kohya", "diffusers", *_SILENT), ".safetensors")}
"""What the names of formats that are one file end in."""


def sniff(path: Path) -> str:
    """The name of the format of the adapter at `path`."""
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder")
    for name, module in FORMATS.items():
        if module.sniff(path):
            return name
    megatron_shards.refuse_distributed(path)
    pickles.refuse(path)
    known = "a PEFT or MLX folder has an adapter_config.json, a GGUF adapter says so in general.type"
    mend = "`adapterhub fix` adds a missing peft_type" if (path / peft.CONFIG).is_file() else ""
    raise FormatError(str(path), f"no adapter of a known format: {known}", mend or peft.nested(path))


def read(path: Path, *, base: BaseSpec | None = None) -> Adapter:
    """The adapter at `path`, whatever its format."""
    pickles.refuse(path)
    path = adapter_in(path)
    return FORMATS[sniff(path)].read(path, base=base)


NOTHING = Allowed()


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
) -> LossReport:
    """Write the adapter `src` as `dst`: a file for gguf and raw, a folder for the others; what was kept comes back.

    Without a `base`, the adapter.json next to the source describes it. `dst` must not exist, or be an empty
    folder where a folder is to be written. An adapter that has the format already is checked and copied. What the
    format cannot say is refused, all of it in one error, unless it is `allowed` to be approximated or dropped.
    `alpha` and `rslora` are for a lone state dict that says neither; `unsafe_pickle` takes a pickle as a source.
    `dtype`, for gguf alone, is what tensors are stored as: one of `gguf_dtypes.CHOICES`. `ollama` is a folder with a GGUF and
    a Modelfile, in which `model` is what Ollama calls the base.
    """
    if to == "ollama":
        named, name = ollama.check(model), ollama.adapter_name(dst)
        base = base or base_from_manifest(src)
        with atomic.whole(dst) as folder:
            settings: dict[str, Any] = {"allowed": allowed, "alpha": alpha, "rslora": rslora, "unsafe_pickle": unsafe_pickle}
            report = convert(src, folder / name, to="gguf", base=base, dtype=dtype, **settings)
            ollama.write(folder, named, name)
        return dataclasses.replace(report, notes=(*report.notes, ollama.NOTE))
    if model is not None:
        raise UsageError("--from", f"{to} names no base", "Leave it out")
    if to not in FORMATS:
        raise UsageError("", f"no format {to!r}", f"One of {', '.join(sorted([*FORMATS, *PACKAGES]))}")
    if dtype != "source" and to != "gguf":
        raise UsageError("dtype", f"{to} keeps the types of the source; only gguf takes another")
    write = functools.partial(gguf.write, dtype=dtype) if to == "gguf" else FORMATS[to].write
    base = base or base_from_manifest(src)
    with _opened(src, unsafe_pickle=unsafe_pickle) as path:
        own = sniff(path)
        adapter = _read(path, own, base, alpha, rslora=rslora)
        with atomic.whole(dst, folder=to in _FILES) as temporary:
            if own == to and dtype == "source":
                return _copied(adapter, path, temporary, to)
            if to in ("peft", "raw"):
                return _written(_of_one_model(write), adapter, temporary, base, allowed)
            if to == "kohya":  # which has LoHa and LoKr too
                return _written(write, adapter, temporary, base, allowed)
            settled = _settled(adapter, base)
            return _rounded(adapter, _written(write, factored_out(settled), temporary, base, allowed), settled)


def _of_one_model(write: Callable[..., LossReport]) -> Callable[..., LossReport]:
    """A writer whose format has no names for the models of a pipeline."""
    return lambda adapter, path, base: write(pipeline.one_model(adapter), path, base=base)


def _settled(adapter: Adapter, base: BaseSpec | None) -> Adapter:
    """The adapter without copies of the base's weights and as plain LoRA where it began as PiSSA, if the base's are here."""
    if base is None or base.folder is None:
        return adapter
    folder = base.folder
    with contextlib.suppress(RefusedError):  # another table than the base's: the writer refuses it by name
        adapter = base_weights.without_copies(adapter, folder)
    return base_weights.plain_lora(adapter, folder) if adapter.meta.init == "pissa" else adapter


def _rounded(adapter: Adapter, report: LossReport, settled: Adapter) -> LossReport:
    """The report of a conversion that was given other pairs than the adapter's: those it equals, rounded."""
    notes = {t: "factors are products, rounded once in float32" for t, d in adapter.deltas.items() if isinstance(d, Factored)}
    if settled.meta.init != adapter.meta.init:
        notes = dict.fromkeys(adapter.deltas, "plain LoRA of twice the rank, from a decomposition of the base in float32")
    if not notes:
        return report
    kept = [
        dataclasses.replace(line, loss=Loss.ROUNDED, note=notes[target])
        if line.loss < Loss.ROUNDED and (target := line.name.rpartition(".")[0]) in notes
        else line
        for line in report.kept
    ]
    return dataclasses.replace(report, kept=tuple(kept))


@contextlib.contextmanager
def _opened(src: Path, *, unsafe_pickle: bool) -> Iterator[Path]:
    """`src`, or what was in the pickle that it is."""
    pickle = pickles.found(src)
    if pickle is None or not unsafe_pickle:
        pickles.refuse(src)
        yield adapter_in(src)
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        try:
            yield _lone(pickles.converted(pickle, Path(folder)), pickle)
        except AdapterhubError as error:
            error.where = error.where.replace(folder, str(pickle.parent))  # the temporary name means nothing to anybody
            raise


def _lone(found: Path, pickle: Path) -> Path:
    """What to read of a pickle's tensors: the file itself where a trainer's own format has it, with what that left beside."""
    weights = found / peft.WEIGHTS if found.is_dir() else found
    if not any(FORMATS[name].sniff(weights) for name in _SILENT):
        return found
    for beside in pickle.parent.glob("*.yaml"):
        shutil.copyfile(beside, weights.with_name(beside.name))
    return weights


def _read(path: Path, own: str, base: BaseSpec | None, alpha: float | None, *, rslora: bool) -> Adapter:
    if own == "raw":
        return raw.read(path, base=base, alpha=alpha, rslora=rslora)
    if own in _SILENT:
        if rslora:
            raise UsageError(str(path), f"{own} scales by alpha / r", "Leave out --rslora")
        return _SILENT[own].read(path, base=base, alpha=alpha)
    if alpha is not None or rslora:
        raise UsageError(str(path), f"a {own} adapter says its alpha itself", "Leave out --alpha and --rslora")
    return peft.read(path, base=base, mapped=True) if own == "peft" else FORMATS[own].read(path, base=base)


def _written(
    write: Callable[..., LossReport], adapter: Adapter, path: Path, base: BaseSpec | None, allowed: Allowed
) -> LossReport:
    try:
        return write(adapter, path, base=base)
    except RefusedError as error:
        first = error
    items = first.items or (f"{first.where}: {first.what}",)
    less = lossy.reduced(adapter, items, allowed, base)
    try:
        report = write(less.adapter, path, base=base) if less.kept else None
    except RefusedError as error:
        first = error
        report = None
    if report is None:
        if not first.items and not less.failed:
            raise RefusedError(first.where, first.what, first.hint or less.hint, code=first.code)
        raise refused(first.where, [*dict.fromkeys([*first.items, *less.failed])], first.hint or less.hint, code=first.code)
    lost = {line.name for line in less.kept}
    kept = [*(line for line in report.kept if line.name not in lost), *less.kept]
    return dataclasses.replace(report, kept=tuple(sorted(kept, key=lambda line: line.name)))


def _copied(adapter: Adapter, src: Path, dst: Path, name: str) -> LossReport:
    if not all((src / file).is_file() for file in _FILES.get(name, ("",))):
        return FORMATS[name].write(adapter, dst)  # in shards: written as one file, which PEFT itself can load
    for file in _FILES.get(name, ("",)):
        shutil.copyfile(src / file, dst / file)
    return LossReport(tuple(Kept(name, Loss.EXACT) for name, _ in adapter.tensors()), adapter.notes)


def base_from_manifest(src: Path) -> BaseSpec | None:
    """The base that the adapter.json next to an adapter describes; None without one, or if it does not name the base."""
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
        # Where nothing is said, an untied base may not be assumed: llama.cpp would abort on a wrong guess.
        tied=config.get("tie_word_embeddings") is not False,
        repo=repo,
        revision=revision,
    )
