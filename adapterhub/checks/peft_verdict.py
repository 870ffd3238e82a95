"""What peft would do with an adapter that was read, as problems of it and as the reasons of peft's verdict."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from adapterhub_converters.adapter import StackedLowRank
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.tensor_keys import PREFIX
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.runtime_rules import APPLIED, IGNORED, REFUSED, UNKNOWN, WRONG

from .base_fit import is_head
from .contents import Contents, Parts
from .contents_reader import unreadable_file
from .loaded_base import base_for_class
from .peft_base import OTHER, PeftBase, Shape, base_in_memory, modules_of_adapter
from .peft_load import KEY_ERROR, LOADERS, NOT_FOUND, SIZE_MISMATCH, Loader, PeftLoad, peft_loads
from .report import Problem, RepeatedProblem

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_MAX_SHOWN = 300  # characters of a config's value that are worth repeating


@dataclass(frozen=True)
class Loading:
    """What peft would do with an adapter, and transformers by its help.

    Attributes:
        by_peft: What `PeftModel.from_pretrained` builds, loads and skips.
        by_transformers: What `load_adapter` of a model does.
        base: The base, or one that has the adapter's modules.
        error: Why none of this can be told.
    """

    by_peft: PeftLoad
    by_transformers: PeftLoad
    base: PeftBase
    error: AdapterhubError | None = None


def loading(contents: Contents, base: BaseSpec | None, loaders: Sequence[Loader] = LOADERS) -> Loading | None:
    """Return what loaders would do with an adapter; None for another format or kind, or if it takes the base to know.

    `loaders`: Those of interest, peft among them; what others do is left empty.
    """
    config = contents.config
    if not _is_lora(contents) or config.get("use_qalora") or (base is None and is_left_to_peft(contents)):
        return None
    tensors: dict[str, Shape] = {}
    for file in contents.files.values():
        tensors |= {name: kind.shape for name, kind in zip(file.header.names, file.header.kinds, strict=True)}
    with contextlib.suppress(AdapterhubError):  # which other checks report
        peft.check_config(config, peft.CONFIG)
        peft_base = _base(contents, base)
        try:
            by_loader = peft_loads(config, tensors, peft_base, loaders)
            return Loading(by_loader["peft"], by_loader.get("transformers", PeftLoad()), peft_base)
        except AdapterhubError as error:
            return Loading(PeftLoad(), PeftLoad(), peft_base, error)
    return None


def _is_lora(contents: Contents) -> bool:
    return contents.format == "peft" and contents.unread is None and contents.config.get("peft_type") == "LORA"


def is_left_to_peft(contents: Contents) -> bool:
    """Return whether the config of a LoRA adapter leaves it to peft which modules it adapts."""
    config = contents.config
    return (
        _is_lora(contents)
        and bool(contents.pairs)
        and config.get("target_modules") is None
        and not config.get("target_parameters")
    )


def _base(contents: Contents, base: BaseSpec | None) -> PeftBase:
    """Return the base with the heads that the class of a task adds; without one, the modules that the adapter names."""
    of_adapter = modules_of_adapter(contents)
    if base is None or not (base.tensors or base.packed or base.names or base.derived):
        return of_adapter
    in_memory = base_in_memory(base_for_class(contents, base))
    # Only linear layers and tables are derived from a config, without norms and heads.
    if base.derived and not base.tensors:
        parameters, kinds = {**of_adapter.parameters, **in_memory.parameters}, {**of_adapter.kinds, **in_memory.kinds}
        return dataclasses.replace(in_memory, parameters=parameters, kinds=kinds, complete=False)
    tops = {module.split(".", 1)[0] for module in in_memory.kinds}
    heads = {name: tensor.shape for name, tensor in contents.replaced.items() if is_head(contents, tops, name)}
    head_kinds = {name.rpartition(".")[0]: OTHER for name in heads}
    return dataclasses.replace(in_memory, parameters={**in_memory.parameters, **heads}, kinds={**in_memory.kinds, **head_kinds})


def load_problems(contents: Contents, loaded: Loading | None) -> Iterator[Problem | RepeatedProblem]:
    """Yield what peft would refuse, and the modules whose tensors it would skip because the config does not name them."""
    if _is_lora(contents):
        yield from _names_problems(contents)
        if is_left_to_peft(contents):
            message = "is missing: peft takes its own default for the model type, or refuses the adapter"
            hint = "List the modules that have tensors"
            yield Problem("no-targets", peft.CONFIG, "target_modules", message, hint, repairable=True)
    if loaded is None:
        return
    if loaded.error is not None:
        yield unreadable_file(contents.path, loaded.error)
        return
    load = loaded.by_peft
    # Shapes are reported one by one, and so are modules that the base does not have.
    has_modules = any(target in loaded.base.kinds for target in contents.pairs) or NOT_FOUND not in load.refusal
    if load.refusal.startswith(KEY_ERROR):
        name = load.refusal.removeprefix(KEY_ERROR).strip("'")
        yield Problem("missing-tensor", contents.weights, name, _refusal(load))
    elif load.refusal and has_modules and not load.refusal.startswith(SIZE_MISMATCH):
        yield Problem("peft-refuses", peft.CONFIG, "", _refusal(load))
    if not load.refusal:
        yield from _untargeted(contents, loaded)


def _refusal(load: PeftLoad) -> str:
    return f"peft would raise: {load.refusal}"


def _names_problems(contents: Contents) -> Iterator[Problem]:
    """Yield the adapter's own name in the names of tensors, which peft alone removes."""
    names = contents.adapter_named
    if names:
        message = (
            f"{len(names)} names have the adapter's own name inside, as {names[0]}: peft loads them, other programs do not"
        )
        yield Problem("adapter-name", contents.weights, names[0], message, repairable=True)


def _untargeted(contents: Contents, loaded: Loading) -> Iterator[RepeatedProblem]:
    """Yield the modules that have tensors, but for which peft builds nothing although the base has them."""
    built, modules, parameters = loaded.by_peft.built, loaded.base.kinds, loaded.base.parameters
    stacks = (target for target, delta in contents.other_deltas.items() if isinstance(delta, StackedLowRank))
    untargeted = [
        target
        for target in (*contents.pairs, *stacks)
        if target not in built and f"{target}.weight" not in built and (target in modules or target in parameters)
    ]
    option = contents.config.get("target_modules")
    names = option if isinstance(option, str) else ", ".join(contents.names("target_modules"))
    expected = f"target_modules {names[:_MAX_SHOWN]}"

    def problem(target: str) -> Problem:
        message = "has tensors, but the config does not target it: peft would skip them"
        return Problem("not-targeted", contents.weights, target, message, "", expected, target, repairable=True)

    yield RepeatedProblem("not-targeted", untargeted, problem)


def load_consequences(contents: Contents, loaded: Loading | None, loader: Loader) -> Iterator[tuple[str, str]]:
    """Yield a verdict and its reason for each thing that peft, or transformers, does otherwise than training did."""
    if loaded is None:
        if is_left_to_peft(contents):
            yield UNKNOWN, "target_modules is missing: which modules peft adapts depends on the base"
        return
    load = loaded.by_peft if loader == "peft" else loaded.by_transformers
    if load.refusal:
        yield REFUSED, load.refusal[:_MAX_SHOWN]
        return
    if load.skipped:
        first = load.skipped[0].removeprefix(PREFIX)
        count = f"{len(load.skipped)} tensors" if load.skipped[1:] else "1 tensor"
        how = "silently skips" if loader == "peft" else "reports as UNEXPECTED and skips"
        yield IGNORED, f"{how} {count} without a place in what it builds: {first}"
    yield from _missing_consequences(contents, load.missing, "reports missing keys" if loader == "peft" else "reports MISSING")


def _missing_consequences(contents: Contents, missing: Collection[str], report: str) -> Iterator[tuple[str, str]]:
    """Yield what follows from tensors that the file lacks; `report` is how the loader says so."""
    magnitudes = sum(name.endswith(".lora_magnitude_vector") for name in missing)
    if magnitudes:
        yield WRONG, f"{report}: {magnitudes} magnitudes keep their initial values"
    base_weights = [name for name in missing if ".lora_" not in name]
    if base_weights:
        yield WRONG, f"{report}: {base_weights[0].removeprefix(PREFIX)} keeps the base's own values"
    if random := _random_pair(contents, missing):
        yield WRONG, f"{report}; {random} keeps random values, which change the model"
    elif half := next((target for target, parts in contents.pairs.items() if _is_without_effect(parts)), ""):
        yield IGNORED, f"{report}; {half} has one half of its pair, and stays as in the base"
    elif len(missing) > magnitudes + len(base_weights):
        yield APPLIED, f"{report}; correct only if the modules without tensors were not trained: they stay as in the base"


def _is_without_effect(parts: Parts) -> bool:
    """Return whether a pair lacks the half that starts at zero."""
    return ("A" in parts and "B" not in parts) or ("embedding_B" in parts and "embedding_A" not in parts)


def _random_pair(contents: Contents, missing: Collection[str]) -> str:
    """Return a missing factor that peft leaves random in a pair that is not 0; empty if every such pair is 0.

    A new pair is 0 because its lora_B is, unless `init_lora_weights` is false (peft, `LoraLayer.reset_lora_parameters`).
    """
    starts_random = contents.config.get("init_lora_weights") is False
    for name in missing:
        if ".lora_" not in name or name.endswith(".lora_magnitude_vector"):
            continue
        counterpart = (
            name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_embedding_A", "lora_embedding_B")
        )
        if starts_random or (counterpart != name and counterpart not in missing):
            return name.removeprefix(PREFIX)
    return ""
