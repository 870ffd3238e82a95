"""Target modules and their ranks, resolved from peft's options as peft does it, without torch.

A target is a path or its end, or one regular expression for the whole path (`tuners_utils.py`,
`check_target_module_exists`); in `rank_pattern` and `alpha_pattern`, the first key that matches the end of a path counts
(`utils/other.py`, `get_pattern_key`). A name that matches nothing is refused, because a misspelled name would train nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adapterhub.training.train_config import LoRAConfig
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.peft_patterns import Patterns, fullmatch


def resolve(
    config: LoRAConfig, linears: Sequence[str], tables: Sequence[str], location: str, *, stacks: Sequence[str] = ()
) -> list[str]:
    """Return the paths that carry LoRA, for each kind in the model's order.

    `all-linear` covers neither the embedding table (`tables`) nor stacks of experts (`stacks`): these must be named, as in
    peft.

    Raises:
        RefusedError: A name, layer or pattern matches nothing, or no module is left.
    """
    paths = [*tables, *linears, *stacks]
    setting = config.targets
    targets = list(linears) if setting == "all-linear" else _matching_paths(setting, paths, f"{location}: [lora] targets")
    if config.exclude:
        excluded = set(_matching_paths(config.exclude, paths, f"{location}: [lora] exclude"))
        targets = [path for path in targets if path not in excluded]
    if config.layers is not None:
        targets = _in_layers(config.layers, targets, f"{location}: [lora] layers")
    if not targets:
        raise RefusedError(f"{location}: [lora]", "no target module is left")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_used(getattr(config, key), targets, f"{location}: [lora] {key}")
    return targets


def _matching_paths(setting: str | Sequence[str], paths: Sequence[str], location: str) -> list[str]:
    if isinstance(setting, str):
        # A text is a module name if it matches as one; only otherwise is it a regular expression.
        if any(_matches(path, setting) for path in paths):
            return [path for path in paths if _matches(path, setting)]
        try:
            matches = [path for path in paths if fullmatch(setting, path, location)]
        except FormatError as error:
            problem = f"{setting[:80]!r} is neither a module name nor a valid regular expression"
            raise RefusedError(location, problem) from error
        if not matches:
            raise _no_match_error(setting, paths, location)
        return matches
    for name in setting:
        if not any(_matches(path, name) for path in paths):
            raise _no_match_error(name, paths, location)
    return [path for path in paths if any(_matches(path, name) for name in setting)]


def _layer_number(path: str) -> int | None:
    """Return the number of the layer that contains a module; a second number in the path is an expert's."""
    # The number of a layer follows at least two names, as in `model.layers.0`.
    return next((int(segment) for segment in path.split(".")[2:-1] if segment.isdecimal() and len(segment) < 10), None)


def _no_match_error(name: str, paths: Iterable[str], location: str) -> RefusedError:
    hint = f"The model has {', '.join(sorted({path.rpartition('.')[2] for path in paths}))}"
    if name.rpartition(".")[2] == "lm_head":
        return RefusedError(location, "the output layer cannot be a target: all of its logits never exist at once", hint)
    return RefusedError(location, f"{name!r} matches no linear layer of this model", hint)


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _in_layers(layers: Sequence[int], paths: Sequence[str], location: str) -> list[str]:
    layer_numbers = {path: number for path in paths if (number := _layer_number(path)) is not None}
    for layer in layers:
        if layer not in layer_numbers.values():
            raise RefusedError(
                location, f"no target is in layer {layer}", f"Targets are in {sorted(set(layer_numbers.values()))}"
            )
    return [path for path in paths if layer_numbers.get(path) in layers]


def _check_used(patterns: Mapping[str, float], paths: Sequence[str], location: str) -> None:
    keys = Patterns(patterns, location)
    # A pattern that matches nothing is probably misspelled, and would silently have no effect.
    used = {keys.matching(path)[0] for path in paths if keys.matching(path)}
    for pattern in patterns:
        if pattern not in used:
            raise RefusedError(location, f"pattern {pattern!r} matches no target")


class Sizes:
    """The rank and alpha of every target."""

    def __init__(self, config: LoRAConfig, location: str = "[lora]") -> None:
        self.config = config
        self._ranks, self._alphas = Patterns(config.rank_pattern, location), Patterns(config.alpha_pattern, location)

    def rank(self, path: str) -> int:
        """Return the rank at `path`."""
        match = self._ranks.matching(path)
        return self.config.rank_pattern[match[0]] if match else self.config.r

    def alpha(self, path: str) -> float:
        """Return the alpha at `path`."""
        match = self._alphas.matching(path)
        return float(self.config.alpha_pattern[match[0]]) if match else self.config.alpha
