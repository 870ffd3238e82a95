"""What the tables of a hub say is of one moment: others may commit between any two statements of one call.

The functions are those that the hub has, and their arguments go by name, so that a new one is under the same test. In
`tests/peers` they run over PostgreSQL.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest

import adapterhub.hub
from adapterhub.hub.access_control import ForbiddenError
from adapterhub.hub.accounts import access_tokens, accounts, admissions, audit_log, sessions
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.administration import own_tokens
from adapterhub.hub.hub_database import HubDatabase
from adapterhub_converters.errors import AdapterhubError

_turns = itertools.count(1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], HubDatabase]:
    """Open the tables, as one process of a hub does."""
    folder = tmp_path_factory.mktemp("tables")
    return lambda: HubDatabase(folder)


class _WriteError(Exception):
    """A function would change a table."""


class _Tables:
    """The tables as a function sees them: a writer commits before one of its statements, and it may change nothing."""

    def __init__(self, database: HubDatabase, write: Callable[[], None]) -> None:
        self.database, self.write, self.count, self.at = database, write, 0, 0
        self.has_table, self.snapshot = database.has_table, database.snapshot

    def select(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Count a statement, and run it."""
        self.count += 1
        if self.count == self.at:
            self.write()
        return self.database.select(sql, *values)

    def execute(self, *_: object) -> int:
        """Refuse a change."""
        raise _WriteError

    execute_many = execute

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Refuse a change."""
        raise _WriteError
        yield


class _Writer:
    """Another process, which changes accounts, members, tokens, rules and the audit log in turn."""

    def __init__(self, database: HubDatabase) -> None:
        self.database, self.last = database, ""

    def __call__(self) -> None:
        turn, database = next(_turns), self.database
        accounts.add(database, f"person-{turn}")
        accounts.set_member(database, f"space-{turn}", f"person-{turn}", "read")
        accounts.set_member(database, "team", "ada", ("read", "write")[turn % 2])
        scope = (f"scope-{turn}",)
        access_tokens.create(database, "ada", "admin", namespaces=scope, lifetime=None if turn % 2 else 60.0)
        admissions.add(database, "https://issuer.example", {}, everybody=True, namespace=f"rule-{turn}", role="read")
        accounts.set_namespace(database, accounts.Namespace(f"kept-{turn}", "members"))
        audit_log.record(database, audit_log.Event("push", f"team/n{turn}"))
        if self.last:
            accounts.remove(database, self.last)
        self.last = f"person-{turn}"


def functions() -> list[Any]:
    """The functions of the hub whose first parameter is its database."""
    result = []
    for module_info in pkgutil.walk_packages(adapterhub.hub.__path__, "adapterhub.hub."):
        module = importlib.import_module(module_info.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            first = next(iter(inspect.signature(function).parameters.values()), None)
            ours = function.__module__ == module.__name__ and first is not None
            if ours and first.annotation in ("HubDatabase", "SqliteFile") and first.name == "database":
                result.append(pytest.param(function, id=f"{module_info.name.removeprefix('adapterhub.hub.')}.{name}"))
    return result


def methods() -> list[Any]:
    """The methods of the hub's classes that are made of its database alone, as functions of that."""
    result = []
    for module_info in pkgutil.walk_packages(adapterhub.hub.__path__, "adapterhub.hub."):
        module = importlib.import_module(module_info.name)
        for cls_name, cls in inspect.getmembers(module, inspect.isclass):
            needed = [(item.name, item.annotation) for item in _parameters(cls) if item.default is item.empty]
            if cls.__module__ != module.__name__ or needed != [("database", "HubDatabase")]:
                continue
            for name, method in inspect.getmembers(cls, inspect.isfunction):
                if not name.startswith("_") and method.__module__ == module.__name__:
                    result.append(pytest.param(_as_function(cls, method), id=f"{cls_name}.{name}"))
    return result


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return []


def _as_function(cls: type, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a database and the arguments of a method, which makes an object anew, as that may remember."""

    def function(database: HubDatabase, **values: Any) -> Any:
        return method(cls(database), **values)

    _, *parameters = inspect.signature(method).parameters.values()
    first = inspect.Parameter("database", inspect.Parameter.POSITIONAL_ONLY)
    keyword_only = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__dict__["__signature__"] = inspect.Signature([first, *keyword_only])
    function.__dict__["source"] = inspect.getsource(method)
    return function


def _identified(database: HubDatabase, ident: int) -> Identity:
    identity = access_tokens.identify_by_id(database, ident)
    assert identity
    return identity


def arguments(database: HubDatabase) -> dict[str, object]:
    """Values for the parameters of functions, by their names."""
    token, ident = access_tokens.issue(database, "ada", "write", kind=access_tokens.PERSONAL)
    cookie = sessions.start(database, ident)
    return {
        "name": "team/sql", "account": "ada", "token": token, "ident": ident, "column": "id", "value": ident, "cookie": cookie,
        "namespace": "team", "digest": "sha256:" + "0" * 64, "origin": "hf", "commit": "0" * 40, "code": "ABCDEFGH",
        "role": "read", "prefix": "team", "cut": audit_log.Cut(), "checkpoint": None,
        "identity": replace(_identified(database, ident), role="admin", roles=None),
        "options": own_tokens.TokenOptions("x", "read"), "roles": {"team": "read"}, "disabled": True, "force": False,
        "issuer": "https://gitlab.com", "claims": {"sub": "x"}, "scope": "team/sql", "url": "https://hooks.example/x",
        "max_bytes": 1, "max_files": None, "limit": 10, "status": "pending", "job": "x", "names": ["team/sql"], "headers": {},
        "authors_of_open": [], "accounts": ["ada"],
    }  # fmt: skip


def test_there_are_functions_that_ask_twice() -> None:
    assert {case.id for case in functions()} >= {"accounts.accounts.list_accounts", "accounts.audit_log.verify_chain"}


@pytest.mark.parametrize("function", [*functions(), *methods()])
def test_what_the_tables_say_is_of_one_moment(function: Callable[..., Any], opened: Callable[[], HubDatabase]) -> None:
    with closing(opened()) as database, closing(opened()) as other_database:
        access_tokens.create(database, "ada", "read")
        write = _Writer(other_database)
        write()
        values, tables = arguments(database), _Tables(database, write)
        _, *parameters = inspect.signature(function).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        if not set(needed) <= {*values, "limits"}:
            source = getattr(function, "source", "") or inspect.getsource(function)
            assert any(word in source for word in ("execute", "transaction")) or "select" not in source, (
                "a reader has parameters that `arguments` lacks"
            )
            return

        def outcome(at: int = 0) -> object:
            tables.count, tables.at = 0, at
            try:
                result = function(tables, **{name: values[name] for name in needed if name != "limits"})
                return list(result) if inspect.isgenerator(result) else result
            except (AdapterhubError, ForbiddenError, _WriteError) as error:
                return repr(error)

        before, count = outcome(), tables.count
        for at in range(2, count + 1):
            result = outcome(at)
            after = outcome()
            assert result in (before, after), f"a commit before statement {at}"
            before = after
