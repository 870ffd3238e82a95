"""Which tensors of the files a parameter is made of: where transformers 5 renames, stacks or divides them as it loads.

Its own tables say so (`conversion_mapping.py`), and its own operations do it, so that what is trained is what it would load:
the experts of Qwen3 lie one by one in files and stacked in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from adapterhub_converters.errors import FormatError

Tensor = Any


@dataclass(frozen=True, eq=False)
class Recipe:
    """The tensors of the files, each with the pattern that it matched, and what makes parameters of them, if it is more than
    a name; `first` is the first parameter that it makes."""

    sources: tuple[tuple[str, str | None], ...]
    converter: Any
    first: str

    def made(self, name: str, read: Callable[[str], Tensor], model: Any) -> Tensor:
        """The parameter `name`; `read` gives a tensor of the files."""
        if self.converter is None:
            return read(self.sources[0][0])
        converter = copy.deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(self.first, source, pattern, read(source))
        try:
            found = converter.convert(self.first, model=model, config=model.config)[name]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            what = f"transformers cannot make it of {self.sources[0][0]} ({str(error).splitlines()[0][:200]})"
            raise FormatError(name, what) from error
        return found[0] if isinstance(found, list) else found


def recipes(model: Any, names: Iterable[str]) -> dict[str, Recipe]:
    """By the parameter's or buffer's name, for files with tensors of these `names`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    known = model.state_dict()
    gathered: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        gathered.setdefault(target, []).append((name, pattern))
    found: dict[str, Recipe] = {}
    for target, sources in gathered.items():
        converter = next((one for one in converters if sources[0][1] in one.source_patterns), None) if sources[0][1] else None
        recipe = Recipe(tuple(sources), converter, target)
        for name in _targets(target, converter):
            found[name] = recipe
    return found


def _targets(first: str, converter: Any) -> list[str]:
    if converter is None or len(converter.target_patterns) == 1:
        return [first]
    one = next((pattern for pattern in converter.target_patterns if pattern in first), None)
    return [first] if one is None else [first.replace(one, other) for other in converter.target_patterns]
