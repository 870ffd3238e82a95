"""The table of one family of models: a trainer's names of its modules, and diffusers' names.

A table is closed: a name is in it or unknown. `N` in a path denotes a number. Trainers that follow sd-scripts write `_` for
`.`, so that the boundaries of names are lost; a table recovers them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, replace
from fractions import Fraction

from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.peft_patterns import escape


@dataclass(frozen=True)
class Reading:
    """A trainer's module: one module of the base, or several whose rows are concatenated.

    Attributes:
        targets: The base's modules.
        swapped: Whether the two halves of its rows are swapped; for a module with `halves`, only if it has that many rows per
            column.
        ratio: The number of rows per column, if it is the same in every model of the family.
        shares: The proportions of the rows of `targets`.
        halves: The number of rows per column for which `swapped` applies; None for any number.
        parameter: Whether it is a parameter itself rather than a module with a weight.
    """

    targets: tuple[str, ...]
    swapped: bool = False
    ratio: Fraction | None = field(default=None, compare=False)
    shares: tuple[int, ...] = field(default=(), compare=False)
    halves: Fraction | None = field(default=None, compare=False)
    parameter: bool = field(default=False, compare=False)

    def with_numbers(self, numbers: tuple[str, ...]) -> Reading:
        """Return a copy with a number for every `N`."""
        return replace(self, targets=tuple(_fill(target, numbers) for target in self.targets))

    def with_prefix(self, prefix: str) -> Reading:
        """Return a copy with a prefix before its targets."""
        return replace(self, targets=tuple(f"{prefix}{target}" for target in self.targets))

    def excludes(self, outline: tuple[int, int] | None) -> bool:
        """Return whether a module with that many rows and columns cannot be this one."""
        return self.ratio is not None and outline is not None and Fraction(*outline) != self.ratio

    def is_swapped(self, rows: int, columns: int) -> bool:
        """Return whether the halves of that many rows are swapped."""
        return self.swapped and (self.halves is None or Fraction(rows, columns) == self.halves)


@dataclass(frozen=True, eq=False)
class Table:
    """The modules of one family of models.

    Attributes:
        name: The family's common name.
        part: The model of a pipeline that the table describes.
        modules: A trainer's path, or pattern of paths, to the base's modules.
        prefix: The prefix of a name that is written; a prefix that ends in a dot preserves the dots of names.
        headers: A pattern of the family's names in headers.
        classes: A pattern of the beginnings of diffusers' names of its models and pipelines.
        writes: Whether the table is used for writing, because the tools that read these names read no others.
        variant: Whether another table with the same modules, which is not a variant, takes precedence unless the base or the
            source's names determine this one.
        shared: Whether other families have modules with the same names, so that names alone do not determine the family.
        prefixed: Whether its names, without a prefix, are those of language models.
    """

    name: str
    part: str
    modules: Mapping[str, Reading]
    prefix: str = "lora_unet_"
    headers: str = ""
    classes: str = ""
    writes: bool = True
    variant: bool = False
    shared: bool = False
    prefixed: bool = False

    def read(self, stem: str) -> Reading | None:
        """Return the module that `stem` names, in which dots may be underscores; None if it is not in the table."""
        for pattern, reading in self._patterns.get(shape_of(stem.replace(".", "_")), ()):
            match = pattern.fullmatch(stem)
            if match:
                return reading.with_numbers(match.groups())
        return None

    def trainer_path(self, target: str) -> tuple[str, Reading] | None:
        """Return the trainer's path of the module that contains `target`, and that module; None if it is not in the table."""
        for pattern, path, reading in self._inverse.get(shape_of(target), ()):
            match = pattern.fullmatch(target)
            if match:
                return _fill(path, match.groups()), reading.with_numbers(match.groups())
        return None

    def shapes(self) -> dict[str, list[tuple[str, Reading]]]:
        """Return the trainer's paths and their modules, grouped by the paths without numbers."""
        paths_by_shape: dict[str, list[tuple[str, Reading]]] = {}
        for path, reading in self.modules.items():
            paths_by_shape.setdefault(shape_of(with_zeros(path)), []).append((path, reading))
        return paths_by_shape

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[safe_regex.Pattern, Reading]]]:
        patterns: dict[str, list[tuple[safe_regex.Pattern, Reading]]] = {}
        for path, reading in self.modules.items():
            patterns.setdefault(shape_of(with_zeros(path).replace(".", "_")), []).append((_pattern(path, r"[._]"), reading))
        return patterns

    @functools.cached_property
    def _inverse(self) -> dict[str, list[tuple[safe_regex.Pattern, str, Reading]]]:
        inverse: dict[str, list[tuple[safe_regex.Pattern, str, Reading]]] = {}
        for path, reading in self.modules.items():
            for target in reading.targets:
                inverse.setdefault(shape_of(with_zeros(target)), []).append((_pattern(target, r"\."), path, reading))
        return inverse


def shape_of(path: str) -> str:
    """Return a path without its numbers, used as a key: only the few entries with the same key need matching."""
    shape = path.translate(_AS_MARKS)
    while "##" in shape:  # each round halves them
        shape = shape.replace("##", "#")
    return shape


# Every digit becomes one mark; `shape_of` then shortens runs of marks to one.
_AS_MARKS = str.maketrans("0123456789", "#" * 10)


def _pattern(path: str, dot: str) -> safe_regex.Pattern:
    # No leading zeros: a second spelling of a number would be a second name of the same module.
    words = ("(0|[1-9][0-9]{0,3})" if word == "N" else escape(word) for word in path.split("."))
    return safe_regex.Pattern(dot.join(words))


def with_zeros(path: str) -> str:
    """Return a path with a number for every `N`."""
    return _fill(path, ("0",) * path.split(".").count("N"))


def _fill(path: str, numbers: tuple[str, ...]) -> str:
    remaining = iter(numbers)
    return ".".join(next(remaining) if word == "N" else word for word in path.split("."))


def paths(stem: str, ends: str) -> list[str]:
    """Return `stem.end` for every word of `ends`."""
    return [f"{stem}.{end}" for end in ends.split()]


def same_names(*names: str) -> dict[str, Reading]:
    """Return readings for modules that have the same name in the trainer and in diffusers."""
    return {path: Reading((path,)) for path in names}


def renames(pairs: Iterable[tuple[str, str]]) -> dict[str, Reading]:
    """Return readings for modules that are each a single one of diffusers', under another name."""
    return {theirs: Reading((ours,)) for theirs, ours in pairs}


# ---- What several families have in common


QKV = "to_q to_k to_v"
ADDED = "add_q_proj add_k_proj add_v_proj"
DOUBLE, SINGLE = "transformer_blocks.N", "single_transformer_blocks.N"
DIFFUSION_MODEL = "diffusion_model."


def single(target: str, ratio: int | Fraction | None = None) -> Reading:
    """Return the reading of a module that is a single one of the base's; `ratio` is as in `Reading`."""
    return Reading((target,), ratio=None if ratio is None else Fraction(ratio))


def thirds(stem: str, ends: str) -> Reading:
    """Return the reading of queries, keys and values that each have as many rows as columns."""
    return Reading(tuple(paths(stem, ends)), ratio=Fraction(3), shares=(1, 1, 1))


def single_block(stem: str) -> Reading:
    """Return the first module of a single block in FLUX.1 and HunyuanVideo.

    It consists of queries, keys, values, and an MLP four times as wide.
    """
    return Reading((*paths(f"{stem}.attn", QKV), f"{stem}.proj_mlp"), ratio=Fraction(7), shares=(1, 1, 1, 4))


def last_modulation() -> Reading:
    """Return the last layer's modulation: shift before scale, but the reverse in diffusers (its `swap_scale_shift`)."""
    return Reading(("norm_out.linear",), swapped=True, ratio=Fraction(2))


def embedders(theirs: str, ours: str, names: dict[str, str], ends: str = "in_layer out_layer") -> Iterator[tuple[str, str]]:
    """Yield the two modules of each embedder of a number or a vector.

    `names` maps the trainer's name of an embedder to diffusers'.
    """
    for name, embedder in names.items():
        for n, end in enumerate(ends.split(), 1):
            yield f"{theirs}{name}.{end}", f"{ours}.{embedder}_embedder.linear_{n}"


def attention_and_mlp(attention: str, mlp: str, *, text: bool) -> Iterator[tuple[str, Reading]]:
    """Yield attention and MLP of a double block, for the image's tokens or the text's; `attention` is the prefix of `qkv`."""
    ends, out, feed = (ADDED, "to_add_out", "ff_context") if text else (QKV, "to_out.0", "ff")
    yield f"{attention}qkv", thirds(f"{DOUBLE}.attn", ends)
    yield f"{attention}proj", single(f"{DOUBLE}.attn.{out}")
    yield f"{mlp}.fc1", single(f"{DOUBLE}.{feed}.net.0.proj")
    yield f"{mlp}.fc2", single(f"{DOUBLE}.{feed}.net.2")


def hunyuan_blocks(*, fused: bool) -> Iterator[tuple[str, Reading]]:
    """Yield the double blocks of HunyuanVideo and HunyuanImage, with queries, keys and values in one module or in three."""
    for kind, ends in (("img", QKV), ("txt", ADDED)):
        stem = f"double_blocks.N.{kind}"
        modules = dict(attention_and_mlp(f"{stem}_attn_", f"{stem}_mlp", text=kind == "txt"))
        if not fused:
            del modules[f"{stem}_attn_qkv"]
            modules |= {f"{stem}_attn_{a}": single(f"{DOUBLE}.attn.{b}", 1) for a, b in zip("qkv", ends.split(), strict=True)}
        yield from modules.items()
        yield f"{stem}_mod.linear", single(f"{DOUBLE}.norm1{'' if kind == 'img' else '_context'}.linear")


def hunyuan_single_blocks() -> Iterator[tuple[str, Reading]]:
    """Yield the single blocks of HunyuanVideo and HunyuanImage."""
    yield "single_blocks.N.linear1", single_block(SINGLE)
    yield "single_blocks.N.linear2", single(f"{SINGLE}.proj_out", Fraction(1, 5))
    yield "single_blocks.N.modulation.linear", single(f"{SINGLE}.norm.linear")


def hunyuan_glyphs() -> Iterator[tuple[str, Reading]]:
    """Yield the embedder of ByT5's states, which HunyuanVideo 1.5 and HunyuanImage use to render text in pictures."""
    return ((f"byt5_in.fc{n}", single(f"context_embedder_2.linear_{n}")) for n in (1, 2, 3))


def hunyuan_rest(times: str) -> Iterator[tuple[str, Reading]]:
    """Yield the embedders and last layer of HunyuanVideo and HunyuanImage; `times` is diffusers' name of the time embedder."""
    token, ours = "txt_in.individual_token_refiner.blocks.N", "context_embedder.token_refiner.refiner_blocks.N"
    yield f"{token}.self_attn_qkv", thirds(f"{ours}.attn", QKV)
    inside = {"self_attn_proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    inside |= {"adaLN_modulation.1": "norm_out.linear"}
    yield from ((f"{token}.{a}", single(f"{ours}.{b}")) for a, b in inside.items())
    inner = "context_embedder.time_text_embed"
    yield from renames(embedders("", times, {"time_in": "timestep"}, "mlp.0 mlp.2")).items()
    yield from renames(embedders("txt_in.", inner, {"t_embedder": "timestep"}, "mlp.0 mlp.2")).items()
    yield from renames(embedders("txt_in.", inner, {"c_embedder": "text"}, "linear_1 linear_2")).items()
    yield from renames([("img_in.proj", "x_embedder.proj"), ("txt_in.input_embedder", "context_embedder.proj_in")]).items()
    yield "final_layer.linear", single("proj_out")
    yield "final_layer.adaLN_modulation.1", last_modulation()
