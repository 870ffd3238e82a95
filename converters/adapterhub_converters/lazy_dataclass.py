"""`dataclass` as in the standard library, except that each method is compiled when it is first called.

The standard decorator compiles up to six methods of a class as its module is imported, which takes 0.9 ms a class. A command
imports about a hundred such classes, makes objects of a third of them, and compares, hashes or prints objects of a few. So
`__init__` is compiled here, in 0.1 ms, and the others by the standard library.
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
    # Else the standard decorator writes a signature, which takes longer than all the rest.
    cls.__doc__ = cls.__doc__ or cls.__name__
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
    """Return a method that replaces itself, at its first call, with the compiled one."""

    def first_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        compile_method = _compile_init if name == "__init__" else _compile_as_standard
        method = compile_method(cls, name, frozen=frozen, slots=slots)
        method.__qualname__ = f"{cls.__qualname__}.{name}"
        setattr(cls, name, method)
        return method(self, *args, **kwargs)

    first_call.__name__, first_call.__qualname__ = name, f"{cls.__qualname__}.{name}"
    return first_call


class _Factory:
    """The default of a parameter whose value a factory makes."""

    def __repr__(self) -> str:
        return "<factory>"


def _compile_init(cls: Any, name: str, *, frozen: bool, slots: bool) -> Any:
    """Return `__init__`: the standard library compiles it with a class around it, which takes ten times as long."""
    scope: dict[str, Any] = {"_set": object.__setattr__, "_factory": _Factory()}
    parameters: dict[bool, list[str]] = {False: [], True: []}  # by whether they are given by name alone
    lines = []
    for field in dataclasses.fields(cls):
        value, default = field.name, ""
        if field.default_factory is not dataclasses.MISSING:
            scope[f"_new_{value}"], default = field.default_factory, "=_factory"
            value = f"_new_{value}() if {value} is _factory else {value}" if field.init else f"_new_{value}()"
        elif field.default is not dataclasses.MISSING:
            scope[f"_default_{value}"], default = field.default, f"=_default_{value}"
            value = value if field.init else f"_default_{value}"
        if field.init:
            parameters[bool(field.kw_only)].append(field.name + default)
        # Else the class has the default as its attribute, unless it has slots.
        if field.init or default == "=_factory" or (default and slots):
            lines.append(f" _set(self, {field.name!r}, {value})" if frozen else f" self.{field.name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append(" self.__post_init__()")
    words = ["self", *parameters[False], *(["*", *parameters[True]] if parameters[True] else [])]
    exec("\n".join([f"def {name}({', '.join(words)}):", *(lines or [" pass"])]), scope)  # noqa: S102 - names of fields alone
    return scope[name]


def _compile_as_standard(cls: Any, name: str, *, frozen: bool, slots: bool) -> Any:
    """Return a method as the standard library compiles it for a class of the same fields, which include those of bases."""
    methods = {"repr": "__repr__", "eq": "__eq__", "order": "__lt__"}
    switches: dict[str, Any] = {switch: method == name for switch, method in methods.items()}
    if name in ("__hash__", "__lt__", "__le__", "__gt__", "__ge__"):
        switches |= {"eq": True, "order": name != "__hash__"}
    fields = [(field.name, field.type, field) for field in dataclasses.fields(cls)]
    twin = dataclasses.make_dataclass(cls.__name__, fields, init=False, frozen=frozen, slots=slots, **switches)
    return vars(twin)[name]


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
