"""No requests at once take more rows of a hub than a bound allows: each bound is checked in the transaction that adds the row.

The bounds are found in the source: an `if` that compares what a query returned with a constant whose name has MAX in it, and
raises. A new one is held to the same.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from pathlib import Path

import pytest

import adapterhub
from adapterhub.hub import stars, webhooks
from adapterhub.hub.accounts import accounts, publishers
from adapterhub.hub.hub_database import HubDatabase
from adapterhub_converters.errors import RefusedError

Function = ast.FunctionDef | ast.AsyncFunctionDef
PACKAGE = Path(adapterhub.__file__).parent
BOUND, CLIENTS = 3, 12


def called(call: ast.Call) -> str:
    """The name of the function or method that is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


@cache
def calls(node: ast.AST) -> set[str]:
    """The names of the functions and methods that a piece of source calls."""
    return {called(call) for call in ast.walk(node) if isinstance(call, ast.Call)}


def names(node: ast.AST) -> set[str]:
    """The variables and constants of a piece of source."""
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def has_limit(node: ast.AST) -> bool:
    """Whether a piece of source reads a constant that says the most of something."""
    return any(name.isupper() and "MAX" in name for name in names(node))


@cache
def inserts(node: ast.AST) -> bool:
    """Whether a piece of source has a statement that adds rows."""
    texts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return any(isinstance(text, str) and "INSERT INTO" in text for text in texts)


class Source:
    """The functions of the hub and of its commands: those that query its database, and those that add rows."""

    def __init__(self) -> None:
        paths = [path for folder in ("hub", "cli/commands/hub") for path in sorted((PACKAGE / folder).rglob("*.py"))]
        trees = [ast.parse(path.read_text(), str(path)) for path in paths]
        self.functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, Function)]
        self.queries = {"select", *self._and_callers({node.name for node in self.functions if "select" in calls(node)})}
        self.writers = self._and_callers({node.name for node in self.functions if inserts(node)})

    def _and_callers(self, functions: set[str]) -> set[str]:
        """Some functions with those that call them."""
        return functions | {node.name for node in self.functions if functions & calls(node)}

    def bounds(self) -> Iterator[tuple[Function, ast.If]]:
        """The checks of a number of rows, each with its function."""
        for function in filter(has_limit, self.functions):
            queried = set[str]()  # variables
            for _ in range(2):
                for node in ast.walk(function):
                    if isinstance(node, ast.Assign) and self._is_queried(node.value, queried):
                        queried |= {name for target in node.targets for name in names(target)}
            for node in ast.walk(function):
                if not isinstance(node, ast.If) or not any(isinstance(step, ast.Raise) for step in node.body):
                    continue
                if has_limit(node.test) and self._is_queried(node.test, queried):
                    yield function, node

    def _is_queried(self, value: ast.AST, queried: set[str]) -> bool:
        listing = {name for name in calls(value) & self.queries if name.startswith(("select", "list_")) or "count" in name}
        return bool(listing or names(value) & queried)

    def is_in_transaction(self, function: Function, node: ast.AST, below: frozenset[str] = frozenset()) -> bool:
        """Whether a piece of a function runs in a transaction that adds rows, opened here or by all that call the function."""
        for block in ast.walk(function):
            if isinstance(block, ast.With) and any(node is inner for inner in ast.walk(block)):
                is_transaction = any("transaction" in calls(item.context_expr) for item in block.items)
                if is_transaction and (inserts(function) or self.writers & calls(block)):
                    return True
        callers = [
            (caller, call)
            for caller in self.functions
            if function.name in calls(caller)
            for call in ast.walk(caller)
            if isinstance(call, ast.Call) and called(call) == function.name
        ]
        below |= {function.name}
        return bool(callers) and all(
            caller.name not in below and self.is_in_transaction(caller, call, below) for caller, call in callers
        )


def test_every_bound_on_rows_is_checked_in_the_transaction_that_adds_them() -> None:
    source = Source()
    checks = [(function.name, check.lineno, source.is_in_transaction(function, check)) for function, check in source.bounds()]
    assert [check for check in checks if not check[2]] == []
    # Those that were there when this was written: the search finds bounds.
    assert {name for name, *_ in checks} >= {"give", "add", "begin", "open", "reserve", "_issue", "_check_room", "_check_count"}


ROWS: dict[str, tuple[Callable[[HubDatabase, int], object], str]] = {
    "webhooks": (
        lambda database, client: webhooks.add(database, "team", f"https://ci.example/{client}"),
        "webhooks._MAX_WEBHOOKS",
    ),
    "publishers": (
        lambda database, client: publishers.add(database, "team/x", "https://ci.example", {"sub": str(client)}, "ada"),
        "accounts.publishers._MAX_PUBLISHERS",
    ),
    "stars": (lambda database, client: stars.give(database, f"team/x{client}", "ada"), "stars.MAX_STARS"),
}


@pytest.mark.parametrize("table", ROWS)
def test_requests_at_once_take_no_more_rows_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    add, limit = ROWS[table]
    monkeypatch.setattr(f"adapterhub.hub.{limit}", BOUND)
    refusals, barrier = list[RefusedError](), threading.Barrier(CLIENTS)

    def ask(database: HubDatabase, client: int) -> None:
        barrier.wait()
        try:
            add(database, client)
        except RefusedError as error:
            refusals.append(error)

    with closing(HubDatabase(tmp_path)) as database:
        accounts.add(database, "ada")
        threads = [threading.Thread(target=partial(ask, database, client)) for client in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (database.select(f"SELECT count(*) FROM {table}")[0][0], len(refusals)) == (BOUND, CLIENTS - BOUND)
