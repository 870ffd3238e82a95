"""The models of a pipeline: which one a target is in, as diffusers says it (`unet.`, `transformer.`, `text_encoder.`, …).

An adapter of image models may act on several models at once. Its targets then begin with the name of each, as in
diffusers' own files, and `Meta.parts` says which they are. PEFT knows one model and no such name: it is taken off where
there is one model alone, kept in the header, and several are refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from adapterhub_converters.adapter import Adapter, Delta, LowRank, refuse_conditions
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.bases.pipeline import PARTS
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError, refused

from . import tables

PART_KEY, HEADER_KEY, NAMES_KEY = "adapterhub.part", "adapterhub.header", "adapterhub.names"
"""Keys of a header's metadata: which model of a pipeline an adapter is for, the source's own header, whose names it had."""

_CLASSES = {
    "UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2",
}  # fmt: skip

# Z-Image's MLP, which Meta's own Llama calls alike.
_LLAMA_TOO = re.compile(r"layers\.[0-9]+\.feed_forward\.")


def part_of(target: str) -> str:
    """The model that a target which begins with one is in; empty without."""
    first = target.partition(".")[0]
    return first if first in PARTS else ""


def of_images(targets: Iterable[str]) -> bool:
    """Whether these are modules of image models and of no language model."""
    plain = (target.removeprefix(f"{part_of(target)}.") for target in targets)
    likely = [t for t in plain if "." in t and t.partition(".")[0] in tables.FIRST and not _LLAMA_TOO.match(t)]
    return any(table.part and table.written(target) for target in likely for table in tables.TABLES)


def of_base(base: BaseSpec | None) -> str:
    """Which model of a pipeline a base is; empty for a whole pipeline, for none and for one that isn't known."""
    if base is None or is_pipeline(base):
        return ""
    return "transformer" if "Transformer" in base.architecture else _CLASSES.get(base.architecture, "")


def is_pipeline(base: BaseSpec) -> bool:
    """Whether a base is several models."""
    return base.architecture.endswith("Pipeline")


def modules_of(base: BaseSpec | None) -> dict[str, set[str]]:
    """Of each model in a base its modules, by their paths there; empty without weights."""
    found: dict[str, set[str]] = {}
    for name in (base.tensors or base.derived or base.names) if base else ():
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            part = part_of(module) if base is not None and is_pipeline(base) else of_base(base)
            found.setdefault(part, set()).add(module.removeprefix(f"{part}.") if part else module)
    return found


def weight_shape(base: BaseSpec | None, target: str) -> tuple[int, ...] | None:
    """The shape of a target's weight in a base, by its name with or without the model."""
    if base is None:
        return None
    own = target if is_pipeline(base) else target.removeprefix(f"{of_base(base)}.")
    tensor = base.tensors.get(f"{own}.weight")
    return tuple(tensor.shape) if tensor else None


def fitted(adapter: Adapter, base: BaseSpec | None, where: str) -> Adapter:
    """An adapter in the names of `base`: of a pipeline the model before every target, of one model none."""
    if base is not None and is_pipeline(base):
        return named(adapter, base, where)
    part = of_base(base)
    if not part or base is None or not adapter.meta.parts:
        return adapter
    if others := sorted({other for other in adapter.meta.parts if other != part}):
        what = f"it acts on {' and '.join(sorted(adapter.meta.parts))}, and the base is a {base.architecture}"
        hint = "Give the pipeline's folder, which has a model_index.json" if part in adapter.meta.parts else ""
        raise RefusedError(where, what, hint or f"Give the {others[0]} as the base")
    return _stripped(adapter, part)


def _stripped(adapter: Adapter, part: str) -> Adapter:
    header = {**adapter.meta.header, PART_KEY: part}
    meta = dataclasses.replace(adapter.meta, parts=(), header=header)
    deltas = {target.removeprefix(f"{part}."): delta for target, delta in adapter.deltas.items()}
    return dataclasses.replace(adapter, deltas=deltas, meta=meta, source=None)


def one_model(adapter: Adapter) -> Adapter:
    """The adapter for a format that knows one model and no name of it; RefusedError names the targets of any other."""
    parts = adapter.meta.parts
    if not parts:
        return adapter
    here = {part_of(target) for target in adapter.deltas}
    if len(here) < 2:
        return _stripped(adapter, next(iter(here), parts[0]))
    kept = next(part for part in PARTS if part in here)
    others = [target for target in sorted(adapter.deltas) if part_of(target) != kept]
    hint = f"Convert one model at a time: --allow-drop '{part_of(others[0])}.*'"
    raise refused(
        "", [f"{target}: the adapter acts on {' and '.join(sorted(here))}, and PEFT has one model" for target in others], hint
    )


def named(adapter: Adapter, base: BaseSpec | None, where: str) -> Adapter:
    """The adapter with the model before every target: the one it says, the base, or the one that has such modules."""
    if adapter.meta.parts:
        return adapter
    header = adapter.source.metadata if adapter.source else adapter.meta.header
    said = header.get(PART_KEY, "")
    part = said if said in PARTS else of_base(base) or _known(adapter.deltas, where)
    deltas = {f"{part}.{target}": delta for target, delta in adapter.deltas.items()}
    meta = dataclasses.replace(adapter.meta, parts=(part,), header=own_header(adapter))
    return dataclasses.replace(adapter, deltas=deltas, meta=meta, source=None)


def _known(targets: Iterable[str], where: str) -> str:
    hint = "Name the folder of the model (unet, transformer, text_encoder) that it is for"
    parts: set[str] = set()
    for target in targets:
        found = {table.part for table in tables.TABLES if table.part and table.written(target)}
        if tables.TEXT.written(target):
            raise RefusedError(where, f"{target} may be in any text encoder of a pipeline", hint, code="base-required")
        if len(found) != 1:
            raise RefusedError(where, f"{target}: no module that is known of an image model", hint, code="base-required")
        parts |= found
    if len(parts) > 1:
        raise RefusedError(where, f"it has modules of {' and '.join(sorted(parts))}", hint, code="base-required")
    return parts.pop() if parts else "unet"


def problems(adapter: Adapter, whose: str, of: Callable[[Delta], str]) -> Iterator[str]:
    """What the words of a format of image models do not say; `of` says it of a delta, empty for nothing."""
    if adapter.meta.init != "default":
        yield f"its factors began as {adapter.meta.init}, which changed the base when training began"
    try:
        refuse_conditions(adapter)
    except RefusedError as error:
        yield f"{error.where}: {error.what}"
    if not adapter.deltas:
        yield "there is no low-rank delta to write"
    yield from (f"{name}: a replaced parameter cannot be said in {whose} words" for name in sorted(adapter.replaced))
    yield from (f"{target}: replaced rows cannot be said in {whose} words" for target in sorted(adapter.rows))
    for target, delta in sorted(adapter.deltas.items()):
        if what := of(delta):
            yield f"{target}: {what}"
        elif isinstance(delta, LowRank) and delta.transposed_base:
            yield f"{target}: a module whose weight is stored transposed, as no image model's is"


def own_header(adapter: Adapter) -> dict[str, str]:
    """What an adapter carries on of its source's header."""
    header = adapter.source.metadata if adapter.source else adapter.meta.header
    return {key: header[key] for key in (HEADER_KEY, NAMES_KEY) if key in header}


def carried_header(metadata: Mapping[str, str], names: str = "") -> dict[str, str]:
    """What to carry on of a file's header, and by whose names its modules went."""
    kept = {key: text for key, text in metadata.items() if not key.startswith("adapterhub.")}
    names = names or metadata.get(NAMES_KEY, "")
    return {HEADER_KEY: json.dumps(kept, separators=(",", ":"))} | ({NAMES_KEY: names} if names else {})


def header_again(adapter: Adapter, where: str) -> dict[str, str]:
    """The source's own header, as it was."""
    text = own_header(adapter).get(HEADER_KEY)
    return {} if text is None else {str(key): str(value) for key, value in json_file.parse_object(text, where).items()}
