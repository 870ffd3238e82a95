"""Target modules and their ranks, resolved from peft's options as peft resolves them, without torch.

A target is a path or its end, or one regular expression for the whole path (`tuners_utils.py`,
`check_target_module_exists`); of `rank_pattern` and `alpha_pattern` the first key that matches the end of a path counts
(`utils/other.py`, `get_pattern_key`). A name that matches nothing is refused, because a misspelled name trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adapterhub.training.config import LoRAConfig
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.patterns import Patterns, fullmatch


def resolve(
    config: LoRAConfig, linears: Sequence[str], tables: Sequence[str], where: str, *, stacks: Sequence[str] = ()
) -> list[str]:
    """Return the paths that carry LoRA, of each kind in the model's order.

    `all-linear` covers neither the embedding table (`tables`) nor stacks of experts (`stacks`): these must be named, as in
    peft.

    Raises:
        RefusedError: A name, layer or pattern matches nothing, or no module is left.
    """
    everything = [*tables, *linears, *stacks]
    wanted = config.targets
    chosen = list(linears) if wanted == "all-linear" else _named(wanted, everything, f"{where}: [lora] targets")
    if config.exclude:
        out = set(_named(config.exclude, everything, f"{where}: [lora] exclude"))
        chosen = [path for path in chosen if path not in out]
    if config.layers is not None:
        chosen = _in_layers(config.layers, chosen, f"{where}: [lora] layers")
    if not chosen:
        raise RefusedError(f"{where}: [lora]", "no target module is left")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_used(getattr(config, key), chosen, f"{where}: [lora] {key}")
    return chosen


def _named(wanted: str | Sequence[str], paths: Sequence[str], where: str) -> list[str]:
    if isinstance(wanted, str):
        if any(_matches(path, wanted) for path in paths):
            return [path for path in paths if _matches(path, wanted)]
        try:
            found = [path for path in paths if fullmatch(wanted, path, where)]
        except FormatError as error:
            what = f"{wanted[:80]!r} is neither a module name nor a valid regular expression"
            raise RefusedError(where, what) from error
        if not found:
            raise _nothing(wanted, paths, where)
        return found
    for name in wanted:
        if not any(_matches(path, name) for path in paths):
            raise _nothing(name, paths, where)
    return [path for path in paths if any(_matches(path, name) for name in wanted)]


def block(path: str) -> str | None:
    """Return the path of the layer that contains a module; None for a module outside of all layers."""
    layer = _layer(path)
    return ".".join(path.split(".")[: layer[0] + 1]) if layer else None


def _layer(path: str) -> tuple[int, int] | None:
    """The part of a path that is the layer's number, and the number: the first one, as a second is an expert's."""
    parts = enumerate(path.split(".")[:-1])
    return next(((at, int(part)) for at, part in parts if at > 1 and part.isdecimal() and len(part) < 10), None)


def _nothing(name: str, paths: Iterable[str], where: str) -> RefusedError:
    known = f"The model has {', '.join(sorted({path.rpartition('.')[2] for path in paths}))}"
    if name.rpartition(".")[2] == "lm_head":
        return RefusedError(where, "the output layer cannot be a target: all of its logits never exist at once", known)
    return RefusedError(where, f"{name!r} matches no linear layer of this model", known)


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _in_layers(layers: Sequence[int], paths: Sequence[str], where: str) -> list[str]:
    numbers = {path: found[1] for path in paths if (found := _layer(path))}
    for layer in layers:
        if layer not in numbers.values():
            raise RefusedError(where, f"no target is in layer {layer}", f"Targets are in {sorted(set(numbers.values()))}")
    return [path for path in paths if numbers.get(path) in layers]


def _check_used(patterns: Mapping[str, float], paths: Sequence[str], where: str) -> None:
    keys = Patterns(patterns, where)
    used = {keys.matching(path)[0] for path in paths if keys.matching(path)}
    for pattern in patterns:
        if pattern not in used:
            raise RefusedError(where, f"pattern {pattern!r} matches no target")


class Sizes:
    """Rank and alpha of every target."""

    def __init__(self, config: LoRAConfig, where: str = "[lora]") -> None:
        self.config = config
        self._ranks, self._alphas = Patterns(config.rank_pattern, where), Patterns(config.alpha_pattern, where)

    def rank(self, path: str) -> int:
        """Return the rank at `path`."""
        found = self._ranks.matching(path)
        return self.config.rank_pattern[found[0]] if found else self.config.r

    def alpha(self, path: str) -> float:
        """Return the alpha at `path`."""
        found = self._alphas.matching(path)
        return float(self.config.alpha_pattern[found[0]]) if found else self.config.alpha
