"""The table of one family of models: a trainer's names of the modules, and diffusers'.

A table is closed: a name is in it or unknown. `N` in a path stands for a number. Trainers that follow sd-scripts write `_` for
`.`, so that the boundaries of names are lost; a table recovers them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from adapterhub_converters import linear
from adapterhub_converters.patterns import escape


@dataclass(frozen=True)
class Reading:
    """A trainer's module: one module of the base, or several whose rows are concatenated.

    Attributes:
        targets: The base's modules.
        swapped: Whether the two halves of its rows are swapped; for a module with `halves`, only if it has that many rows per
            column.
        ratio: The number of rows per column, if it is the same in every model of the family.
        shares: The proportions of the rows of `targets`.
        halves: See `swapped`.
        parameter: Whether it is a parameter of its own and not a module with a weight.
    """

    targets: tuple[str, ...]
    swapped: bool = False
    ratio: Fraction | None = field(default=None, compare=False)
    shares: tuple[int, ...] = field(default=(), compare=False)
    halves: Fraction | None = field(default=None, compare=False)
    parameter: bool = field(default=False, compare=False)

    def filled(self, numbers: tuple[str, ...]) -> Reading:
        """Return a copy with numbers for every `N`."""
        return replace(self, targets=tuple(_filled(target, numbers) for target in self.targets))

    def of(self, prefix: str) -> Reading:
        """Return a copy with a prefix before its targets."""
        return replace(self, targets=tuple(f"{prefix}{target}" for target in self.targets))

    def excludes(self, outline: tuple[int, int] | None) -> bool:
        """Return whether a module of that many rows and columns cannot be this one."""
        return self.ratio is not None and outline is not None and Fraction(*outline) != self.ratio

    def is_turned(self, rows: int, columns: int) -> bool:
        """Return whether the halves of that many rows are swapped."""
        return self.swapped and (self.halves is None or Fraction(rows, columns) == self.halves)


@dataclass(frozen=True, eq=False)
class Table:
    """The modules of one family of models.

    Attributes:
        name: The family's common name.
        part: The model of a pipeline that it names.
        modules: A trainer's path, or pattern of paths, to the base's modules.
        prefix: The prefix of a name that is written; one that ends in a dot has the dots of names preserved.
        headers: A pattern of the family's names in headers.
        classes: A pattern of the beginning of diffusers' names of its models and pipelines.
        writes: Whether the table is used for writing: the tools that read these names read no others.
        variant: Whether a table is preferred that is no variant and has the same modules, unless the base or the source's names
            determine this one.
        shared: Whether other families have modules of the same names, so that names alone do not determine the family.
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
                return reading.filled(match.groups())
        return None

    def written(self, target: str) -> tuple[str, Reading] | None:
        """Return the trainer's path of the module that contains `target`, and that module; None if it is not in the table."""
        for pattern, path, reading in self._inverse.get(shape_of(target), ()):
            match = pattern.fullmatch(target)
            if match:
                return _filled(path, match.groups()), reading.filled(match.groups())
        return None

    def shapes(self) -> dict[str, list[tuple[str, Reading]]]:
        """Return the paths of the trainer's modules, each with the module, by their names without numbers."""
        found: dict[str, list[tuple[str, Reading]]] = {}
        for path, reading in self.modules.items():
            found.setdefault(shape_of(numbered(path)), []).append((path, reading))
        return found

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[linear.Pattern, Reading]]]:
        found: dict[str, list[tuple[linear.Pattern, Reading]]] = {}
        for path, reading in self.modules.items():
            found.setdefault(shape_of(numbered(path).replace(".", "_")), []).append((_pattern(path, r"[._]"), reading))
        return found

    @functools.cached_property
    def _inverse(self) -> dict[str, list[tuple[linear.Pattern, str, Reading]]]:
        found: dict[str, list[tuple[linear.Pattern, str, Reading]]] = {}
        for path, reading in self.modules.items():
            for target in reading.targets:
                found.setdefault(shape_of(numbered(target)), []).append((_pattern(target, r"\."), path, reading))
        return found


def shape_of(path: str) -> str:
    """Return a path without its numbers, as a key: only the few entries with the same one are matched."""
    shape = path.translate(_AS_MARKS)
    while "##" in shape:  # each round halves them
        shape = shape.replace("##", "#")
    return shape


_AS_MARKS = str.maketrans("0123456789", "#" * 10)


def _pattern(path: str, dot: str) -> linear.Pattern:
    words = ("(0|[1-9][0-9]{0,3})" if word == "N" else escape(word) for word in path.split("."))
    return linear.Pattern(dot.join(words))


def numbered(path: str) -> str:
    """Return a path with a number for every `N`."""
    return _filled(path, ("0",) * path.split(".").count("N"))


def _filled(path: str, numbers: tuple[str, ...]) -> str:
    left = iter(numbers)
    return ".".join(next(left) if word == "N" else word for word in path.split("."))


def joined(stem: str, ends: str) -> list[str]:
    """Return `stem.end` for every word of `ends`."""
    return [f"{stem}.{end}" for end in ends.split()]


def own(*paths: str) -> dict[str, Reading]:
    """Modules with the same name in the trainer and in diffusers."""
    return {path: Reading((path,)) for path in paths}


def renamed(pairs: Iterable[tuple[str, str]]) -> dict[str, Reading]:
    """Modules that are one of diffusers' each, under another name."""
    return {theirs: Reading((ours,)) for theirs, ours in pairs}


# ---- What several families have in common


QKV = "to_q to_k to_v"
ADDED = "add_q_proj add_k_proj add_v_proj"
DOUBLE, SINGLE = "transformer_blocks.N", "single_transformer_blocks.N"
DIFFUSION_MODEL = "diffusion_model."


def one(target: str, ratio: int | Fraction | None = None) -> Reading:
    """Return a module that is one of the base's; `ratio` as in `Reading`."""
    return Reading((target,), ratio=None if ratio is None else Fraction(ratio))


def thirds(stem: str, ends: str) -> Reading:
    """Queries, keys and values with as many rows each as columns."""
    return Reading(tuple(joined(stem, ends)), ratio=Fraction(3), shares=(1, 1, 1))


def single_block(stem: str) -> Reading:
    """Return the first module of a single block in FLUX.1 and HunyuanVideo: queries, keys, values and an MLP four times as
    wide.
    """
    return Reading((*joined(f"{stem}.attn", QKV), f"{stem}.proj_mlp"), ratio=Fraction(7), shares=(1, 1, 1, 4))


def last(target: str = "norm_out.linear") -> Reading:
    """Return the last layer's modulation: shift before scale, but scale before shift in diffusers (its `swap_scale_shift`)."""
    return Reading((target,), swapped=True, ratio=Fraction(2))


def embedders(theirs: str, ours: str, names: dict[str, str], ends: str = "in_layer out_layer") -> Iterator[tuple[str, str]]:
    """Yield the two modules of each embedder of a number or a vector: the trainer's name to diffusers' name of the embedder."""
    for name, embedder in names.items():
        for n, end in enumerate(ends.split(), 1):
            yield f"{theirs}{name}.{end}", f"{ours}.{embedder}_embedder.linear_{n}"


def stream(attention: str, mlp: str, *, text: bool) -> Iterator[tuple[str, Reading]]:
    """Attention and MLP of a double block, for the image's tokens or the text's; `attention` is the prefix of `qkv`."""
    ends, out, feed = (ADDED, "to_add_out", "ff_context") if text else (QKV, "to_out.0", "ff")
    yield f"{attention}qkv", thirds(f"{DOUBLE}.attn", ends)
    yield f"{attention}proj", one(f"{DOUBLE}.attn.{out}")
    yield f"{mlp}.fc1", one(f"{DOUBLE}.{feed}.net.0.proj")
    yield f"{mlp}.fc2", one(f"{DOUBLE}.{feed}.net.2")


def hunyuan_blocks(*, fused: bool) -> Iterator[tuple[str, Reading]]:
    """Yield the double blocks of HunyuanVideo and HunyuanImage, with queries, keys and values in one module or in three."""
    for kind, ends in (("img", QKV), ("txt", ADDED)):
        stem = f"double_blocks.N.{kind}"
        modules = dict(stream(f"{stem}_attn_", f"{stem}_mlp", text=kind == "txt"))
        if not fused:
            del modules[f"{stem}_attn_qkv"]
            modules |= {f"{stem}_attn_{a}": one(f"{DOUBLE}.attn.{b}", 1) for a, b in zip("qkv", ends.split(), strict=True)}
        yield from modules.items()
        yield f"{stem}_mod.linear", one(f"{DOUBLE}.norm1{'' if kind == 'img' else '_context'}.linear")


def hunyuan_single_blocks() -> Iterator[tuple[str, Reading]]:
    """Yield their single blocks."""
    yield "single_blocks.N.linear1", single_block(SINGLE)
    yield "single_blocks.N.linear2", one(f"{SINGLE}.proj_out", Fraction(1, 5))
    yield "single_blocks.N.modulation.linear", one(f"{SINGLE}.norm.linear")


def hunyuan_glyphs() -> Iterator[tuple[str, Reading]]:
    """Yield the embedder of ByT5's states, from which HunyuanVideo 1.5 and HunyuanImage write text into pictures."""
    return ((f"byt5_in.fc{n}", one(f"context_embedder_2.linear_{n}")) for n in (1, 2, 3))


def hunyuan_rest(times: str) -> Iterator[tuple[str, Reading]]:
    """Yield their embedders and last layer; `times` is diffusers' name of the embedder of the time."""
    token, ours = "txt_in.individual_token_refiner.blocks.N", "context_embedder.token_refiner.refiner_blocks.N"
    yield f"{token}.self_attn_qkv", thirds(f"{ours}.attn", QKV)
    inside = {"self_attn_proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    inside |= {"adaLN_modulation.1": "norm_out.linear"}
    yield from ((f"{token}.{a}", one(f"{ours}.{b}")) for a, b in inside.items())
    inner = "context_embedder.time_text_embed"
    yield from renamed(embedders("", times, {"time_in": "timestep"}, "mlp.0 mlp.2")).items()
    yield from renamed(embedders("txt_in.", inner, {"t_embedder": "timestep"}, "mlp.0 mlp.2")).items()
    yield from renamed(embedders("txt_in.", inner, {"c_embedder": "text"}, "linear_1 linear_2")).items()
    yield from renamed([("img_in.proj", "x_embedder.proj"), ("txt_in.input_embedder", "context_embedder.proj_in")]).items()
    yield "final_layer.linear", one("proj_out")
    yield "final_layer.adaLN_modulation.1", last()
