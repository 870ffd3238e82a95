"""What a worker of a hub reads is of one moment: others may push, rename and remove between any two statements of one call.

The functions are those of the hub whose first parameter is a worker, and the methods of its parts and of what is made of a
worker; their arguments go by name, so that a new one is under the same test.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import adapterhub.hub
from adapterhub.hub import access_control, commits
from adapterhub.hub.access_control import ForbiddenError
from adapterhub.hub.accounts import access_tokens, accounts
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.web.site import Site
from adapterhub.hub.workers import Worker
from adapterhub.index.index_database import Index
from adapterhub.ref import Ref
from adapterhub.registry.ledger import Ledger
from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_records import Repositories
from adapterhub_converters.errors import AdapterhubError
from tests.support.adapters import write_adapter

NAME = "team/sql"
OBJECTS = {"LocalCatalog", "MayRead", "Iterator[Path]"}  # what is returned by these is asked later


class _WriteError(Exception):
    """A function would change something."""


class _Writer:
    """Another process, which moves everything that readers tell of."""

    def __init__(self, folder: Path, adapter: Path) -> None:
        self.registry, self.tables, self.adapter = Registry.open(folder), HubDatabase(folder), adapter
        self.turns = itertools.count(1)

    def __call__(self) -> None:
        """Push the same weights under two names, move a tag, change roles, and remove the name of the turn before."""
        turn = next(self.turns)
        (self.adapter / "README.md").write_text(f"# Turn {turn}\nsql\n")
        self.registry.push(self.adapter, Ref.parse(f"{NAME}:prod"))
        self.registry.push(self.adapter, Ref.parse(f"team/n{turn}"))
        accounts.set_member(self.tables, "team", "ada", ("read", "write")[turn % 2])
        if turn > 1:
            self.registry.rm(Ref.parse(f"team/n{turn - 1}"))

    def close(self) -> None:
        """Close what it has opened."""
        self.registry.close()
        self.tables.close()


class _Meddler:
    """Has a writer commit before a statement of a hub, counted from 1, and refuses what the hub would change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]) -> None:
        self.count, self.at, self.is_writing = 0, 0, False
        self.write = write
        for cls in (Index, HubDatabase):
            self._count_statements(monkeypatch, cls)
        for cls, method in ((Ledger, "move"), (Repositories, "change"), (HubDatabase, "transaction"), (HubDatabase, "execute")):
            self._refuse(monkeypatch, cls, method)

    def _count_statements(self, monkeypatch: pytest.MonkeyPatch, cls: type[Index] | type[HubDatabase]) -> None:
        select = cls.select

        def meddled(reader: Any, sql: str, *values: object, **options: Any) -> Any:
            if not self.is_writing:
                self.count += 1
                if self.count == self.at:
                    self.is_writing = True
                    self.write()
                    self.is_writing = False
            return select(reader, sql, *values, **options)

        monkeypatch.setattr(cls, "select", meddled)

    def _refuse(self, monkeypatch: pytest.MonkeyPatch, cls: type, method: str) -> None:
        changes = getattr(cls, method)

        def refused(changed: Any, *values: Any, **options: Any) -> Any:
            if not self.is_writing:
                raise _WriteError
            return changes(changed, *values, **options)

        monkeypatch.setattr(cls, method, refused)

    def outcome(self, call: Callable[[], Any], at: int = 0) -> tuple[object, int]:
        """What a call returns, or the error that it raises, and its number of statements."""
        self.count, self.at = 0, at
        try:
            result = call()
            result = list(result) if inspect.isgenerator(result) else result
        except (AdapterhubError, ForbiddenError, _WriteError) as error:
            result = repr(error)
        return result, self.count


def readers() -> list[Any]:
    """The functions of the hub whose first parameter is a worker, and the methods of its parts and of what is made of one."""
    cases = []
    for module in pkgutil.walk_packages(adapterhub.hub.__path__, "adapterhub.hub."):
        loaded = importlib.import_module(module.name)
        label = module.name.removeprefix("adapterhub.hub.")
        for name, function in inspect.getmembers(loaded, inspect.isfunction):
            if function.__module__ == loaded.__name__ and not name.startswith("_") and _takes_worker(function):
                cases.append(pytest.param(None, function, id=f"{label}.{name}"))
        for cls_name, cls in inspect.getmembers(loaded, inspect.isclass):
            for name, method in inspect.getmembers(cls, inspect.isfunction):
                is_ours = cls.__module__ == loaded.__name__ and method.__module__ == loaded.__name__
                if is_ours and not name.startswith("_") and (_takes_worker(method, skipped=1) or _is_made_of_worker(cls)):
                    cases.append(pytest.param(cls, method, id=f"{cls_name}.{name}"))
    return cases


def _takes_worker(function: Callable[..., Any], skipped: int = 0) -> bool:
    signature = inspect.signature(function)
    parameters = [*signature.parameters.values()]
    takes_worker = len(parameters) > skipped and parameters[skipped].annotation == "Worker"
    return takes_worker and signature.return_annotation not in OBJECTS


def _is_made_of_worker(cls: type) -> bool:
    return "__init__" in vars(cls) and _takes_worker(cls.__init__, skipped=1)  # type: ignore[misc]


def _needed(function: Callable[..., Any], skipped: int) -> list[str]:
    """The names of the parameters of a function that have no default, after the first ones."""
    parameters = [*inspect.signature(function).parameters.values()][skipped:]
    return [item.name for item in parameters if item.default is item.empty and item.kind is not item.VAR_POSITIONAL]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(access_control, "_TTL", 0.0)
    with Registry.init(tmp_path / "hub") as registry:
        registry.push(write_adapter(tmp_path / "adapter"), Ref.parse(f"{NAME}:prod"))
    with closing(Hub(HubSettings(registry=tmp_path / "hub"))) as hub:
        yield hub


def arguments(hub: Hub, worker: Worker) -> dict[str, Any]:
    """Values for the parameters of functions, by their names."""
    _, ident = access_tokens.issue(hub.database, "ada", "write", kind=access_tokens.PERSONAL)
    identity = access_tokens.identify_by_id(hub.database, ident)
    assert isinstance(identity, Identity)
    view = commits.find_view(worker, NAME)
    assert view is not None
    assert view.newest is not None
    digest = view.newest.digest
    return {
        "hub": hub, "identity": identity, "name": NAME, "namespace": "team", "database": hub.database, "names": [NAME],
        "view": view, "repository_view": view, "digest": digest, "ident": view.head, "tag": "prod", "reference": "prod",
        "revision": "main", "row": view.newest, "last": "", "limit": 5, "claim": None, "may_read": lambda *_: True,
        "repository": view.repository, "access": hub.access, "after": "", "files": {digest: 1}, "size": 1, "sizes": [1],
        "folder": hub.settings.registry, "commit": None, "keep": 1, "account": "ada", "status": "pending", "gate": None,
        "given": True, "number": "1", "reason": "x", "file": (digest, 1), "mover": "ada", "path": "README.md",
        "sums": hub.namespace_totals,
    }  # fmt: skip


def test_there_are_readers() -> None:
    assert {case.id for case in readers()} >= {
        "commits.find_view", "Hub.visible", "quotas.namespace_files", "_Log.before", "BoardReader.read",
    }  # fmt: skip


@pytest.mark.parametrize(("cls", "function"), readers())
def test_what_a_worker_says_is_of_one_moment(
    cls: type | None, function: Callable[..., Any], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access_tokens.create(hub.database, "ada", "read")
    worker, writer = hub.workers.worker(), _Writer(tmp_path / "hub", tmp_path / "adapter")
    values = arguments(hub, worker)
    site = Site(hub)
    receiver = next((part for part in (hub, site, *vars(hub).values()) if cls is not None and type(part) is cls), None)
    is_made = cls is not None and _is_made_of_worker(cls)
    needed = _needed(function, 1 if cls is None or is_made else 2)
    to_make = _needed(cls.__init__, 2) if cls is not None and is_made else []  # type: ignore[misc]
    if not {*needed, *to_make} <= {*values} or (cls is not None and receiver is None and not is_made):
        source, words = (
            inspect.getsource(cls or function),
            ("change", "move", "execute", "transaction", "push", "record", "upstream"),
        )
        assert any(word in source for word in words), f"`arguments` lacks some of {needed}, or the hub has no {cls}"
        return
    with closing(writer), closing(site):
        writer()
        meddler = _Meddler(monkeypatch, writer)

        def call() -> Any:
            arguments = {**values, "view": commits.find_view(worker, NAME)}
            arguments["repository_view"], arguments["row"] = arguments["view"], arguments["view"].newest
            arguments["commit"] = commits.find(worker, arguments["view"], "main")
            chosen = {name: arguments[name] for name in needed}
            if cls is None:
                return function(worker, **chosen)
            if is_made:
                return function(cls(worker, **{name: arguments[name] for name in to_make}), **chosen)
            return function(receiver, worker, **chosen)

        before, count = meddler.outcome(call)
        for at in range(2, count + 1):
            result, _ = meddler.outcome(call, at)
            after, _ = meddler.outcome(call)
            assert result in (before, after), f"a commit before statement {at}"
            before = after
