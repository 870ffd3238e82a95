"""Names of a package that are imported from its modules when they are first read (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def late_names(package: dict[str, Any], modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Args:
        package: The `globals()` of the package, which keep each name once it is imported.
        modules: The names by module; a module that begins with a dot is relative to the package.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def read_late(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        package[name] = value = getattr(importlib.import_module(module_of[name], package["__name__"]), name)
        return value

    return read_late
