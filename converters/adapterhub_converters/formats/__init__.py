"""The table of adapter formats: their names, files, and the modules that recognize, read and write them.

    peft               PEFT, `mlx`, `gguf` with whole models in `gguf_model`, `ollama`, `raw`, `image`, and those of other
                       `trainers`
    candidate          a path that may be an adapter; `adapter_claims`, what one of an unknown kind says of itself
    convert            from any to any, with `lossy` and `allowed_losses`, `file_alpha`, `target_matching` and `base_weights`
    source_config      the config of the source, kept for the way back
    pickle_conversion  pickles, in the process of `unpickle`
    image_targets      whether an adapter is of an image model; `pipeline`, of which part
    round_trips        what each format can do, as `format_probe` measures

A new format is one row of `FORMATS` and one module with the functions `sniff`, `read` and `write` (see `Format`). Other
packages add formats through entry points of the group `adapterhub.formats`, each of which names a `Format`:

    [project.entry-points."adapterhub.formats"]
    my-format = "my_package:FORMAT"

A registry stores the built-in formats only, as what it stores must read the same everywhere.

The table imports neither numpy nor any format module, so listing a command's choices, showing its help and completing its
arguments stay cheap.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from adapterhub_converters.errors import ParameterError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from adapterhub_converters.adapter import Adapter, LossReport
    from adapterhub_converters.bases import BaseSpec

    from .candidate import Candidate

WrittenFormat = Literal["peft", "gguf", "mlx", "kohya", "diffusers", "torchtune", "litgpt", "megatron", "raw"]
"""The built-in formats that can be written."""
PackageFormat = Literal["ollama"]
"""A folder with an adapter and the files that another program needs."""


class InstalledFormat(str):
    """The name of a format that another package adds; no type checker knows it."""

    __slots__ = ()


AdapterFormat = WrittenFormat | PackageFormat | InstalledFormat
"""What an adapter can be converted to."""
GgufDtype = Literal["source", "f32", "f16", "bf16", "q8_0", "q4_0"]
DTYPES: tuple[GgufDtype, ...] = get_args(GgufDtype)
"""The types that a GGUF adapter can store its numbers as."""
FloatDtype = Literal["bf16", "f16", "f32"]
FLOATS: tuple[FloatDtype, ...] = get_args(FloatDtype)
"""The types of floats that a model is written or computed in."""
QuantizedDtype = Literal[
    "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s",
]  # fmt: skip
QUANTIZED: tuple[QuantizedDtype, ...] = get_args(QuantizedDtype)
"""Quantized types of a whole model in GGUF, and mixtures of them."""
ModelDtype = GgufDtype | QuantizedDtype
GROUP = "adapterhub.formats"
"""The group of the entry points that add formats."""


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    Attributes:
        name: The format as the option `--to` spells it.
        module: The module with `sniff(candidate) -> bool`, `read(path, *, base) -> Adapter` and
            `write(adapter, path, *, base) -> LossReport`; imported on the first call. Has no `write` unless `writes`.
        suffix: The file suffix of a single-file format.
        files: The file names of a format that is a folder.
        deltas: The deltas it can express: `all` that PEFT supports; `factored` for plain pairs, LoHa and LoKr; or only plain
            `pairs`.
        alpha: Whether its files may lack the alpha, so that `read` accepts it as a keyword (and `rslora` too, if that is set).
        rslora: Whether `read` accepts `rslora`, which selects the scale alpha / sqrt(r).
        dtypes: The number types it can store; `write` takes one of them as `dtype` if there are several.
        writes: Whether it can be written as well as read.
    """

    name: str
    module: str
    suffix: str = ""
    files: tuple[str, ...] = ()
    deltas: Literal["all", "factored", "pairs"] = "pairs"
    alpha: bool = False
    rslora: bool = False
    dtypes: tuple[str, ...] = ("source",)
    writes: bool = True

    @property
    def folder(self) -> bool:
        """Whether an adapter of the format is a folder rather than one file."""
        return bool(self.files)

    def sniff(self, path: Path | Candidate) -> bool:
        """Return whether `path` is an adapter of this format, judging by names, magic numbers and configs, never by shapes."""
        from .candidate import Candidate  # late, as it needs numpy

        is_match: bool = self.implementation.sniff(Candidate.of(path))
        return is_match

    def read(self, path: Path | Candidate, *, base: BaseSpec | None = None, **options: Any) -> Adapter:
        """Return the adapter at `path`; what a candidate has read of it, a built-in format does not open again."""
        if self.name not in FORMATS and not isinstance(path, Path):
            path = path.path
        adapter: Adapter = self.implementation.read(path, base=base, **options)
        return adapter

    def write(self, adapter: Adapter, path: Path, *, base: BaseSpec | None = None, **options: Any) -> LossReport:
        """Write to a new file, or into the existing, empty folder `path`."""
        report: LossReport = self.implementation.write(adapter, path, base=base, **options)
        return report

    @property
    def implementation(self) -> ModuleType:
        """The module, imported on first use, for what one format alone knows."""
        return importlib.import_module(self.module)


def _trainer(name: str) -> Format:
    return Format(name, f"{__name__}.trainers.{name}", ".safetensors", alpha=True)


# In the order in which they are tried on an unknown file: `raw` takes whatever has the keys of a LoRA, and comes last.
FORMATS = {
    row.name: row
    for row in (
        Format("peft", f"{__name__}.peft", files=("adapter_config.json", "adapter_model.safetensors"), deltas="all"),
        Format(
            "tinker", f"{__name__}.peft.tinker", files=("adapter_config.json", "adapter_model.safetensors"), writes=False
        ),
        Format("gguf", f"{__name__}.gguf", ".gguf", dtypes=DTYPES),
        Format("mlx", f"{__name__}.mlx", files=("adapter_config.json", "adapters.safetensors")),
        Format("kohya", f"{__name__}.image.kohya", ".safetensors", deltas="factored"),
        Format("diffusers", f"{__name__}.image.diffusers", ".safetensors"),
        *map(_trainer, ("torchtune", "litgpt", "megatron")),
        Format("raw", f"{__name__}.raw", ".safetensors", deltas="all", alpha=True, rslora=True),
    )
}  # fmt: skip
"""The formats of adapters that come with this package, which are those that a registry stores."""
WRITTEN: tuple[WrittenFormat, ...] = get_args(WrittenFormat)
"""Those of them that can be written."""
PACKAGES = {"ollama": "gguf"}
"""A folder with an adapter and files that another program needs: its name, and the format of the adapter in it."""
MODELS = ("hf",)
"""Formats of whole models, not of adapters."""


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # late: it looks into every installed distribution, which takes 10 ms

    # A package cannot replace a built-in format: what a registry stores must read the same everywhere.
    reserved = {*FORMATS, *PACKAGES, *MODELS}
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in reserved}


def names() -> tuple[str, ...]:
    """Return the name of every format an adapter can be converted to, without loading any format."""
    return (*WRITTEN, *_entry_points(), *PACKAGES)


def added_names() -> tuple[str, ...]:
    """Return the names of the formats of other packages, without loading any."""
    return tuple(_entry_points())


def find(name: str) -> Format:
    """Return the format called `name`.

    Raises:
        ParameterError: No format has that name, or the package that adds it cannot be imported.
    """
    if name in FORMATS:
        return FORMATS[name]
    point = _entry_points().get(name)
    if point is None:
        raise ParameterError("to", f"no format {name!r}", f"One of {', '.join(sorted(names()))}")
    try:
        row = point.load()
    except (ImportError, AttributeError) as error:
        raise ParameterError("to", f"format {name!r}: {point.value} cannot be loaded ({error})") from error
    if not isinstance(row, Format) or row.name != name:
        raise ParameterError("to", f"format {name!r}: {point.value} is not a Format of that name")
    return row


def in_order() -> Iterator[Format]:
    """Yield every format in the order in which an unknown file is tested; those of other packages come before `raw`."""
    yield from (row for row in FORMATS.values() if row.name != "raw")
    yield from map(find, _entry_points())
    yield FORMATS["raw"]


def added_format(path: Path) -> Format | None:
    """Return the format of another package that recognizes `path`; None if a built-in format does so first, or none does."""
    # Names suffice for PEFT, so that its folders do not wait for the look-up of installed packages.
    if all((path / name).is_file() for name in FORMATS["peft"].files) or not _entry_points():
        return None
    from .candidate import Candidate  # late, as it needs numpy

    candidate = Candidate(path)
    row = next((row for row in in_order() if row.sniff(candidate)), None)
    return None if row is None or row.name in FORMATS else row


def format_of_suffix(suffix: str) -> str | None:
    """Return the only format whose files have that suffix; None if none has, or several do. Built-in formats come first."""
    rows = [row for row in FORMATS.values() if row.suffix == suffix]
    rows = rows or [row for row in map(find, _entry_points()) if row.suffix == suffix]
    return rows[0].name if len(rows) == 1 else None
