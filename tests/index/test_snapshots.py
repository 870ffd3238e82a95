"""What a query of the index says is of one moment: a writer may commit between any two statements of it.

The queries are those that the package has, and their arguments go by name, so that a new one is under the same test.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import pytest

import adapterhub
import adapterhub.index
from adapterhub.index import queries
from adapterhub.index.index_database import Index
from adapterhub.index.version_listing import Conditions
from adapterhub.index.version_search import Query
from adapterhub.maintenance import disk_usage
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_documents import Repository
from adapterhub_converters.errors import AdapterhubError
from tests.support.adapters import write_adapter
from tests.support.import_graph import module_paths, nodes, parsed


class Writer:
    """A second opener of a registry, who moves everything that queries tell of."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.registry, self.folder, self.turns = Registry.open(root), folder, itertools.count(1)

    def __call__(self) -> None:
        """Push the same weights under two names, move a tag, deprecate, and remove the name of the turn before."""
        turn, team = next(self.turns), Ref.parse("team/sql")
        (self.folder / "README.md").write_text(f"# Turn {turn}\nsql\n")
        self.registry.push(self.folder, Ref.parse("team/sql:prod"))
        self.registry.push(self.folder, Ref.parse(f"team/n{turn}"))
        self.registry.deprecate(team, undo=turn % 2 == 0)
        if turn > 1:
            self.registry.rm(Ref.parse(f"team/n{turn - 1}"))


class Meddler:
    """Has a writer commit before a statement of a reader's index, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: Index, write: Callable[[], None]) -> None:
        self.count, self.at = 0, 0
        select = Index.select

        def meddled(reader: Index, sql: str, *values: object, kinds: str = "") -> list[tuple[Any, ...]]:
            if reader is index:
                self.count += 1
                if self.count == self.at:
                    write()
            return select(reader, sql, *values, kinds=kinds)

        monkeypatch.setattr(Index, "select", meddled)

    def outcome(self, call: Callable[[], object], at: int = 0) -> tuple[object, int]:
        """What a call returns, or the error that it raises, and its number of statements, with a commit before one of them."""
        self.count, self.at = 0, at
        try:
            result = call()
        except AdapterhubError as error:
            result = repr(error)
        return result, self.count

    def check(self, call: Callable[[], object]) -> None:
        """Assert that the result is that of before or after a commit, wherever the commit comes."""
        before, count = self.outcome(call)
        for at in range(2, count + 1):
            result, _ = self.outcome(call, at)
            after, _ = self.outcome(call)
            assert result in (before, after), f"a commit before statement {at}"
            before = after


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry, whose tensors are listed, with what the arguments below name."""
    folder = write_adapter(tmp_path / "adapter")
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(folder, Ref.parse("team/sql:prod"))
        registry.push(folder, Ref.parse("other/sql"))
        registry.list_tensors()
        yield registry


@pytest.fixture
def meddler(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meddler]:
    """A writer between the statements of the registry's index."""
    writer = Writer(registry.root, tmp_path / "adapter")
    writer()
    with closing(writer.registry):
        yield Meddler(monkeypatch, registry.index, writer)


def arguments(registry: Registry) -> dict[str, list[Any]]:
    """Values for the parameters of queries, by their names."""
    row = registry.row(Ref.parse("other/sql"))
    weights = next(file.digest for file in registry.files(registry.resolve(row.ref)) if file.path.endswith(".safetensors"))
    tensors = registry.store.list_tensors(weights) or ()
    ids = [version for (version,) in registry.index.select("SELECT id FROM versions ORDER BY id LIMIT 2")]
    first = next(iter(registry.index.select("SELECT id, name, number FROM versions ORDER BY id LIMIT 1", kinds="isi")))
    hidden = frozenset({"other/sql"})
    listed = [Conditions(), Conditions(words="sql", facets=((("method",), "lora"),), namespace="team", without=hidden)]
    texts = [Query(), Query(words="sql"), Query(namespace="team"), Query(all_versions=True, words="sql")]
    return {
        "store": [registry.store], "tensors": [tensors], "digests": [[weights]], "file": [weights], "digest": [weights],
        "digest_prefix": [tensors[0].digest], "without": [["team/sql"]], "name": ["team/sql"], "prefix": ["team"],
        "paths": [["adapter.json"]],
        "names": [["team/sql", "other/sql"]], "metric": ["eval_loss"],
        "row": [row], "columns": [["base"]], "ids": [ids], "query": texts, "limit": [20], "kind": ["deprecate"],
        "condition": ["1"], "facets": [False, True], "version": [first], "number": [2], "after": [None, row.ref], "last": [""],
        "namespace": ["team"], "statements": [[("SELECT id FROM versions", ())]], "visible": ["1"],
        "most": [5], "change": [0], "rows": [[row]], "wanted": listed, "kinds": [("method", "dtype")],
    }  # fmt: skip


def readers() -> list[Any]:
    """The functions of the package that ask an index, except those that are called in a transaction."""
    cases = []
    for module in pkgutil.iter_modules(adapterhub.index.__path__):
        loaded = importlib.import_module(f"adapterhub.index.{module.name}")
        for name, function in inspect.getmembers(loaded, inspect.isfunction):
            public = not name.startswith("_") and function.__module__ == loaded.__name__
            parameters = list(inspect.signature(function).parameters.values())
            asks = public and parameters and parameters[0].annotation == "Index"
            if asks and "in a transaction" not in f"{loaded.__doc__}{function.__doc__}":
                cases.append(pytest.param(function, id=f"{module.name}.{name}"))
    return cases


def calls(function: Callable[..., Any], registry: Registry) -> Iterator[Callable[[], object]]:
    """The calls of a function with each of the values of its parameters; those with other defaults keep them."""
    values = arguments(registry)
    _, *parameters = inspect.signature(function).parameters.values()
    needed = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    used = [parameter for parameter in needed if parameter.default is parameter.empty or parameter.name in ("query", "facets")]
    missing = [parameter.name for parameter in used if parameter.name not in values]
    assert not missing, f"{function.__name__} has parameters that `arguments` lacks"
    for chosen in itertools.product(*(values[parameter.name] for parameter in used)):
        yield partial(function, registry.index, **dict(zip((parameter.name for parameter in used), chosen, strict=True)))


def test_there_are_readers_that_ask_twice() -> None:
    assert {case.id for case in readers()} >= {"tensor_search.nearest", "version_search.search", "queries.newest"}


@pytest.mark.parametrize("function", readers())
def test_what_a_query_says_is_of_one_moment(function: Callable[..., Any], registry: Registry, meddler: Meddler) -> None:
    for call in calls(function, registry):
        meddler.check(call)


def usage_readers() -> list[Any]:
    """The functions that tell the disk usage of a registry."""
    functions = inspect.getmembers(disk_usage, inspect.isfunction)
    return [pytest.param(function, id=name) for name, function in functions if _first_annotation(function) == "Registry"]


def _first_annotation(function: Callable[..., Any]) -> object:
    return next((parameter.annotation for parameter in inspect.signature(function).parameters.values()), None)


@pytest.mark.parametrize("function", usage_readers())
def test_disk_usage_is_of_one_moment(function: Callable[..., Any], registry: Registry, meddler: Meddler) -> None:
    """It is read from the index alone: blobs of versions that are removed meanwhile stay until a gc."""
    values = {"rows": registry.list(), "progress": None, "prefix": None}
    _, *parameters = inspect.signature(function).parameters
    registry.list_tensors()
    meddler.check(partial(function, registry, **{name: values[name] for name in parameters}))


_MADE_OF = ("Registry", "Ledger", "Index")


def reading_classes() -> list[type]:
    """The classes outside of a hub that are made of a registry, its ledger or its index, and of values that have defaults."""
    classes = []
    root = Path(adapterhub.__file__).parent
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        if not any(name in text for name in _MADE_OF):  # to parse all modules would take seconds in each process with tests
            continue
        nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]
        names = [node.name for node in nodes if not node.name.startswith("_") and _is_made_of_registry(node)]
        module = ".".join(("adapterhub", *path.relative_to(root).with_suffix("").parts))
        if names and "hub" not in module.split("."):
            classes += [getattr(importlib.import_module(module), name) for name in names]
    return classes


def _is_made_of_registry(node: ast.ClassDef) -> bool:
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return any(_name(argument.annotation) in _MADE_OF for argument in method.args.args)
    return any(_name(field.annotation) in _MADE_OF for field in node.body if isinstance(field, ast.AnnAssign))


def _name(annotation: ast.expr | None) -> str:
    return annotation.id if isinstance(annotation, ast.Name) else ""


def reading_methods() -> list[Any]:
    """The methods of these classes that return something; those that move refs are stopped when they do."""
    cases = []
    for cls in reading_classes():
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            returns = inspect.signature(method).return_annotation
            is_generator = inspect.isgeneratorfunction(inspect.unwrap(method))
            if not name.startswith("_") and returns not in ("None", "Self") and not is_generator:
                cases.append(pytest.param(cls, name, id=f"{cls.__name__}.{name}"))
    return cases


def objects(registry: Registry) -> dict[str, Any]:
    """Values for the parameters of classes and methods, by their names."""
    version = registry.resolve(Ref.parse("team/sql:v1"))
    return {
        "root": registry.ledger.root, "registry": registry, "ledger": registry.ledger, "index": registry.index,
        "store": registry.store,
        "registry_rules": lambda: None, "name": "team/sql", "names": ["team/sql"],
        "ref": Ref.parse("team/sql:prod"), "version": version,
        "reference": "prod", "digest": version.digest, "tag": "prod", "number": 1, "mover": "ana", "prefix": "team",
        "after": None, "limit": 5, "query": Query(words="sql"), "facets": True, "manifest": registry.oci_manifest(version),
        "blob": registry.files(version)[0], "location": "here", "content_queries": [("a digest", version.digest)],
        "repository": Repository(), "commit": "0" * 40, "since": "2020-01-01T00:00:00Z",
    }  # fmt: skip


class MoveError(AdapterhubError):
    """A method would move a ref."""


def test_there_are_methods_that_ask_twice() -> None:
    assert {case.id for case in reading_methods()} >= {"LocalCatalog.list", "LocalCatalog.search", "LocalName.tags"}


@pytest.mark.parametrize(("cls", "name"), reading_methods())
def test_what_an_object_says_of_a_registry_is_of_one_moment(
    cls: type, name: str, registry: Registry, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MoveError("ref", "would move")

    monkeypatch.setattr(registry.ledger, "move", refuse)
    values = objects(registry)

    def needed(function: Callable[..., Any]) -> dict[str, Any] | None:
        parameters = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name != "self" and parameter.default is parameter.empty
        ]
        return {key: values[key] for key in parameters} if set(parameters) <= set(values) else None

    receiver: object = registry
    if cls is not Registry:
        arguments = needed(cls)
        assert arguments is not None, "`objects` lacks a parameter of the class"
        receiver = cls(**arguments)
    method = getattr(receiver, name)
    chosen = needed(method)
    if chosen is None:
        source = inspect.getsource(method)
        assert any(word in source for word in ("move", "lease", "adopt")), "`objects` lacks a parameter of a reader"
        return
    meddler.check(partial(method, **chosen))


def methods_that_ask_twice() -> Iterator[tuple[str, str, set[str]]]:
    """Place, text of the class and names of the calls of each method of the package that has two statements or more."""
    for path in module_paths("adapterhub").values():
        for cls in [node for node in nodes(path) if isinstance(node, ast.ClassDef)]:
            for method in cls.body:
                calls = [node.func.attr for node in ast.walk(method) if isinstance(node, ast.Call) and _is_attribute(node.func)]
                if isinstance(method, ast.FunctionDef) and calls.count("select") > 1:
                    yield f"{path}: {cls.name}.{method.name}", ast.get_docstring(cls) or "", {*calls}


def _is_attribute(node: ast.expr) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute)


def test_a_method_that_asks_twice_does_so_in_a_snapshot_or_transaction() -> None:
    methods = list(methods_that_ask_twice())
    assert len(methods) >= 5
    assert [
        place
        for place, class_text, calls in methods
        if not {"snapshot", "transaction"} & calls and "under the write lock" not in class_text
    ] == []


def test_a_snapshot_holds_no_writer_up_and_is_no_lock(registry: Registry, tmp_path: Path) -> None:
    with closing(Registry.open(registry.root)) as writer, registry.index.snapshot():
        before = registry.list()
        writer.push(write_adapter(tmp_path / "more", 2), Ref.parse("team/more"))
        assert registry.list() == before
        assert not registry.index.in_transaction
        with registry.index.snapshot():
            assert queries.versions(registry.index) == before
    assert len(registry.list()) == len(before) + 1
