"""A class of `lazy_dataclass` does what one of the standard library does, whichever of its methods is called first."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from adapterhub_converters import lazy_dataclass
from tests.conftest import ROOT

OPTIONS: list[dict[str, bool]] = [
    {},
    {"eq": False},
    {"repr": False},
    {"slots": True},
    {"frozen": True},
    {"frozen": True, "eq": False},
    {"frozen": True, "slots": True},
    {"frozen": True, "slots": True, "order": True},
    {"frozen": True, "kw_only": True},
]


class Plain:
    """A class before it is a dataclass."""

    count: int
    names: list[str] = dataclasses.field(default_factory=list, compare=False)
    size: float = 1.5
    secret: str = dataclasses.field(default="s", repr=False)
    kind: str = dataclasses.field(default="k", init=False)
    places: list[str] = dataclasses.field(default_factory=list, init=False)


class Written:  # noqa: PLW1641  # its hash is the decorator's
    """A class with methods of its own."""

    count: int
    size: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count")

    def __repr__(self) -> str:
        return "written"

    def __eq__(self, value: object) -> bool:
        return True


USES: Mapping[str, Callable[[type[Any]], Any]] = {
    "positions": lambda cls: vars_of(cls(3)),
    "names": lambda cls: vars_of(cls(count=3, size=2.0)),
    "missing": lambda cls: cls(),
    "unknown": lambda cls: cls(count=1, other=2),
    "refused": lambda cls: vars_of(cls(count=-1)),
    "repr": lambda cls: re.sub(r"0x[0-9a-f]+", "", repr(cls(count=1)).replace("Lazy", "Eager")),
    "equal": lambda cls: (cls(count=1) == cls(count=1), cls(count=1) == cls(count=2), cls(count=1) == 1),
    "hash": lambda cls: len({cls(count=1), cls(count=1), cls(count=2)}),
    "order": lambda cls: [cls(count=1) < cls(count=2), cls(count=1) >= cls(count=2)],
    "set": lambda cls: setattr(cls(count=1), "count", 2),
    "delete": lambda cls: delattr(cls(count=1), "count"),
    "replace": lambda cls: vars_of(dataclasses.replace(cls(count=1), size=9.0)),
    "asdict": lambda cls: dataclasses.asdict(cls(count=1)),
    "copy": lambda cls: vars_of(copy.deepcopy(cls(count=1))),
    "pickle": lambda cls: vars_of(pickle.loads(pickle.dumps(cls(count=1)))),  # bytes of this test
    "match": lambda cls: cls.__match_args__,
    "subclass": lambda cls: vars_of(type("Sub", (cls,), {"extra": property(lambda self: 1)})(count=1)),
    "subclass sets": lambda cls: setattr(type("Sub", (cls,), {})(count=1), "count", 2),
}


def vars_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def outcome(use: Callable[[type[Any]], Any], cls: type[Any]) -> Any:
    """Return what a use of a class returns, or the type and text of its error."""
    try:
        return use(cls)
    except Exception as error:
        return type(error), str(error).replace("Lazy", "Eager")


@pytest.mark.parametrize("body", [Plain, Written], ids=lambda body: body.__name__)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_each_use_has_the_outcome_that_it_has_with_the_standard_library(options: dict[str, bool], body: type[Any]) -> None:
    if options.get("order") and body is Written:
        return  # it has __eq__ alone

    def classes(name: str, define: Callable[..., Any]) -> type[Any]:
        namespace = {key: copy.copy(value) for key, value in vars(body).items() if key not in ("__dict__", "__weakref__")}
        cls: type[Any] = define(type(name, (), namespace), **options)
        cls.__qualname__ = name
        globals()[name] = cls  # where pickle looks for it
        return cls

    for name, use in USES.items():
        lazy = classes("Lazy", lazy_dataclass.dataclass)
        eager = classes("Eager", dataclasses.dataclass)
        assert outcome(use, lazy) == outcome(use, eager), name
        assert outcome(use, lazy) == outcome(use, eager), f"{name}, again"


def test_a_frozen_object_takes_no_attribute_that_is_no_field() -> None:
    @lazy_dataclass.dataclass(frozen=True, slots=True)
    class Point:
        """A frozen class with slots, where the standard library of Python 3.11 raises a TypeError of another matter."""

        count: int

    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'other'"):
        Point(1).other = 2  # type: ignore[attr-defined]


def test_a_subclass_has_the_fields_of_its_base() -> None:
    @lazy_dataclass.dataclass(frozen=True)
    class Base:
        """A base."""

        count: int
        size: float = 1.0

    @lazy_dataclass.dataclass(frozen=True)
    class Sub(Base):
        """A class of more fields."""

        name: str = "x"

    assert (Sub(1, 2.0, "y"), repr(Sub(1))) == (Sub(1, 2.0, "y"), f"{Sub.__qualname__}(count=1, size=1.0, name='x')")
    assert Base(1) != Sub(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sub(1).count = 2  # type: ignore[misc]


def test_classes_of_both_decorators_inherit_from_each_other() -> None:
    @lazy_dataclass.dataclass(frozen=True, slots=True)
    class Lazy:
        """A class of this package."""

        count: int

    @dataclasses.dataclass(frozen=True)
    class Standard(Lazy):
        """A class of another package."""

        size: float = 1.0

    @lazy_dataclass.dataclass(frozen=True)
    class Last(Standard):
        """A class of this package on it."""

        name: str = "x"

    assert (Last(1), repr(Last(1))) == (Last(1, 1.0, "x"), f"{Last.__qualname__}(count=1, size=1.0, name='x')")
    assert len({Lazy(1), Standard(1), Last(1), Last(1)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Last(1).count = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="cannot inherit non-frozen dataclass from a frozen one"):
        dataclasses.dataclass(type("Other", (Lazy,), {}))


def test_no_module_of_the_package_compiles_its_dataclasses_at_import() -> None:
    files = [*ROOT.glob("adapterhub/**/*.py"), *ROOT.glob("converters/**/*.py")]
    eager = [
        str(path.relative_to(ROOT))
        for path in files
        if re.search(r"from dataclasses import .*\bdataclass\b|@dataclasses\.dataclass", path.read_text())
    ]
    assert eager == ["converters/adapterhub_converters/lazy_dataclass.py"]
