"""`dataclass` as in the standard library, except that each method is compiled when it is first called.

The standard decorator compiles up to six methods of a class as its module is imported, which takes 0.9 ms a class. A command
imports about a hundred such classes, makes objects of a third of them, and compares, hashes or prints objects of a few.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls=None, /, **options):
        """Return a class as a dataclass; `options` are those of the standard decorator, without `init` and `unsafe_hash`."""
        return (lambda cls: _define(cls, **options)) if cls is None else _define(cls, **options)


_LOCK = threading.RLock()


def _is_frozen(cls: Any) -> bool:
    return "__dataclass_params__" in vars(cls) and bool(cls.__dataclass_params__.frozen)


def _define(cls: Any, *, eq: bool = True, frozen: bool = False, slots: bool = False, **options: bool) -> Any:
    written = {name for name, value in vars(cls).items() if (name, value) != ("__hash__", None)}
    needed = {"__init__": True, "__repr__": options.pop("repr", True), "__eq__": eq, "__hash__": eq and frozen}
    needed |= dict.fromkeys(("__lt__", "__le__", "__gt__", "__ge__"), options.pop("order", False))
    # The standard decorator is not told that a class is frozen, as it would compile two methods for that; so it must not see
    # that the bases are.
    frozen_bases = [base.__dataclass_params__ for base in cls.__mro__[1:] if _is_frozen(base)]
    with _LOCK:
        for params in frozen_bases:
            params.frozen = False
        try:
            cls = dataclasses.dataclass(cls, init=False, repr=False, eq=False, slots=slots, **options)
        finally:
            for params in frozen_bases:
                params.frozen = True
    cls.__dataclass_params__.frozen = frozen
    for name in (name for name, is_needed in needed.items() if is_needed and name not in written):
        setattr(cls, name, _compiled_when_called(cls, name, frozen=frozen, slots=slots))
    if eq and not frozen and "__hash__" not in written:
        cls.__hash__ = None  # what can change has no hash
    if frozen:
        _refuse_changes(cls)
        if slots:
            cls.__getstate__, cls.__setstate__ = _state, _set_state
    return cls


def _compiled_when_called(cls: type[Any], name: str, *, frozen: bool, slots: bool) -> Callable[..., Any]:
    """Return a method that replaces itself, at its first call, with the one that the standard library compiles for `name`."""

    def first_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A class of the same fields that has this method alone. The fields of bases are among them.
        methods = {"init": "__init__", "repr": "__repr__", "eq": "__eq__", "order": "__lt__"}
        switches: dict[str, Any] = {switch: method == name for switch, method in methods.items()}
        if name in ("__hash__", "__lt__", "__le__", "__gt__", "__ge__"):
            switches |= {"eq": True, "order": name != "__hash__"}
        twin = dataclasses.make_dataclass(
            cls.__name__,
            [(field.name, field.type, field) for field in dataclasses.fields(cls)],
            namespace={"__post_init__": cls.__post_init__} if hasattr(cls, "__post_init__") else {},
            frozen=frozen,
            slots=slots,  # of a class with slots, __init__ alone has the default of a field that is no parameter of it
            **switches,
        )
        method = vars(twin)[name]
        method.__qualname__ = f"{cls.__qualname__}.{name}"
        setattr(cls, name, method)
        return method(self, *args, **kwargs)

    first_call.__name__, first_call.__qualname__ = name, f"{cls.__qualname__}.{name}"
    return first_call


def _refuse_changes(cls: Any) -> None:
    """Let no object of a class set or delete its fields; a subclass may have attributes that are no fields."""
    names = {field.name for field in dataclasses.fields(cls)}

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if type(self) is cls or name in names:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        super(cls, self).__setattr__(name, value)

    def delete_attribute(self: Any, name: str) -> None:
        if type(self) is cls or name in names:
            raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
        super(cls, self).__delattr__(name)

    cls.__setattr__, cls.__delattr__ = set_attribute, delete_attribute


def _state(self: Any) -> list[Any]:
    """Return what pickle and copy keep of a frozen object with slots, whose attributes they could not set."""
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _set_state(self: Any, state: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, field.name, value)
