"""Names of a package that are imported from its modules when they are first read (PEP 562), and numpy likewise.

The import of numpy takes as long as everything else that a short command does, such as the check of a small adapter, which
computes nothing. Modules that every reading of an adapter imports have `np` from here, and read none of its names while they
are imported themselves; a module that computes imports numpy as usual.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["lazy_names", "np"]


def lazy_names(
    package: dict[str, Any], modules: Mapping[str, Sequence[str]], meant: Mapping[str, str] = types.MappingProxyType({})
) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Args:
        package: The `globals()` of the package, which keep each name once it is imported.
        modules: The names by module; a module that begins with a dot is relative to the package.
        meant: Names that people try, and what an error names in their place.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def read_late(name: str) -> Any:
        if name not in module_of:
            hint = f". Did you mean: {meant[name]!r}?" if name in meant else ""
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}{hint}")
        package[name] = value = getattr(importlib.import_module(module_of[name], package["__name__"]), name)
        return value

    return read_late


class _LateModule(types.ModuleType):
    """A module that is imported when one of its names is first read."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)  # so that these names are read from here without a call
        return getattr(module, name)


if not TYPE_CHECKING:
    np = _LateModule("numpy")
