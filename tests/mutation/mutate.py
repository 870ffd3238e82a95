"""Change one operator or number of a module at a time, and run its tests: a change that no test notices is a survivor.

    python tests/mutation/mutate.py [MODULE…]

Each mutant is a fork of a process that has imported everything: only the code of the changed function is replaced in it, so
that a mutant takes as long as its tests. Constants of modules are left alone, since other modules have copies. Survivors that
change nothing are in same.toml, with the reason.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import inspect
import os
import resource
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]

import pytest  # noqa: E402

# Module to its tests.
TARGETS = {
    "adapterhub.ref": "tests/test_ref.py -k 'not inverse and not any_text'",
    "adapterhub.semver": "tests/test_semver.py -k 'not ref'",
    "adapterhub_converters.formats.file_alpha": "tests/converters/test_file_alpha.py",
    "adapterhub.merging.adapters.methods.element_rules": "tests/merging/adapters/methods/test_element_rules.py",
    "adapterhub.merging.adapters.methods.sphere": "tests/merging/adapters/methods/test_sphere.py",
    "adapterhub.merging.adapters.methods.elementwise": "tests/merging/adapters/methods/test_elementwise.py "
    "-k 'element_by or probabil'",
    "adapterhub_converters.formats.peft.adapter_config": "tests/converters/test_adapter_config.py",
    "adapterhub_converters.formats.gguf.writer": "tests/converters/test_gguf_writer.py "
    "tests/converters/test_gguf_tensor_layout.py::test_split_projections_go_where_the_base_fuses_them_and_come_back",
    "adapterhub.registry.version_selection": "tests/registry/test_version_selection.py",
    "adapterhub.registry.version_lookup": "tests/registry/test_version_lookup.py",
    "adapterhub.project.lockfile": "tests/project/test_lockfile.py "
    "-k 'not (pull or next_to_the or missing or asked or was_changed or words)'",
    "adapterhub.store.ref_log": "tests/store/test_ref_log.py -k 'not usage and not commands'",
    "adapterhub.registry.moves": "tests/registry/test_moves.py tests/store/test_ref_log.py tests/registry/test_registry.py "
    "-k 'test_moves or test_ref_log and (protected or restored or undone or deprecation or expects or author) "
    "or local and (numbered or same_content or tags_move or removed_name or restored or versions_whose or without_any "
    "or cannot_be_done or learns_who_won)'",
    "adapterhub.merging.into_base.nf4_numpy": "tests/merging/into_base/test_nf4_numpy.py -k 'not two_threads'",
    "adapterhub.merging.adapters.truncation": "tests/merging/adapters/test_truncation.py "
    "-k 'cut_is or range or stack or loss_is or budget_goes or passes or below or computed or rounding'",
}
SECONDS = 120  # a mutant that takes longer waits forever
CPU_SECONDS = 5  # one that computes longer runs forever
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def mutants(tree: ast.Module, lines: list[str]) -> Iterator[tuple[str, ast.Module]]:
    """Each change as its line with `<before>` marked and what that is now, and the module with it."""
    inside = [
        node for definition in tree.body if isinstance(definition, ast.FunctionDef | ast.ClassDef) for node in _code(definition)
    ]
    numbers = {id(node): number for number, node in enumerate(ast.walk(tree))}
    for node in inside:
        mutant_tree = copy.deepcopy(tree)
        twin = [*ast.walk(mutant_tree)][numbers[id(node)]]
        before = ast.unparse(node)
        if _change(twin):
            line = lines[node.lineno - 1]
            rest_of_line = line[node.end_col_offset :] if node.end_lineno == node.lineno else ""
            place = f"{line[: node.col_offset].lstrip()}<{before}>{rest_of_line}"
            yield f"{place} is {ast.unparse(twin)}", ast.fix_missing_locations(mutant_tree)


def _code(definition: ast.AST) -> Iterator[ast.expr]:
    """The expressions of functions, without annotations, defaults of dataclasses, docstrings, lengths of shown texts and the -1
    of `reshape`, for which numpy takes any negative number.
    """
    formatted_nodes = [
        node for formatted in ast.walk(definition) if isinstance(formatted, ast.FormattedValue) for node in ast.walk(formatted)
    ]
    lengths = {id(node) for slice_node in formatted_nodes if isinstance(slice_node, ast.Slice) for node in ast.walk(slice_node)}
    calls = [
        call for call in ast.walk(definition) if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "reshape"
    ]
    lengths |= {id(size.operand) for call in calls for size in call.args if isinstance(size, ast.UnaryOp)}
    functions = [node for node in ast.walk(definition) if isinstance(node, ast.FunctionDef)]
    # By identity, since a function inside another one is found twice.
    nodes = {id(node): node for function in functions for statement in function.body for node in ast.walk(statement)}
    yield from (node for key, node in nodes.items() if isinstance(node, ast.expr) and key not in lengths)


def _change(node: ast.AST) -> bool:
    """Change a node in place; False if there is nothing to change."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in _SWAPS:
            node.op = _SWAPS[type(op)]()  # type: ignore[assignment]
        case ast.Compare(ops=[op]):
            node.ops = [_SWAPS[type(op)]()]  # type: ignore[list-item]
        case ast.Constant(value=bool(value)):
            node.value = not value
        case ast.Constant(value=int(value) | float(value)):
            node.value = value + 1
        case ast.UnaryOp(op=ast.Not()):
            node.op = ast.UAdd()
            node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])
        case _:
            return False
    return True


def functions(module: ModuleType | type, names: dict[str, Any]) -> Iterator[tuple[FunctionType, FunctionType]]:
    """Each function of a module or a class that was imported, and the same of the changed one."""
    for name, value in vars(module).items():
        original, mutated_value = _plain(value), _plain(names.get(name))
        if isinstance(original, FunctionType) and isinstance(mutated_value, FunctionType):
            yield original, mutated_value
        elif isinstance(original, type) and isinstance(mutated_value, type) and original.__module__ == mutated_value.__module__:
            yield from functions(original, dict(vars(mutated_value)))


def _plain(value: object) -> object:
    """The function below a property, a class method or a decorator."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return inspect.unwrap(value) if callable(value) else value


def survives(module: ModuleType, mutant: ast.Module, tests: str) -> bool:
    """Run the tests in a fork with a mutant; True if all pass."""
    child = os.fork()
    if not child:
        code = 1
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
            names: dict[str, Any] = {"__name__": module.__name__, "__package__": module.__package__}
            exec(compile(mutant, str(module.__file__), "exec"), names)
            for original, mutated_function in functions(module, names):
                original.__code__ = mutated_function.__code__
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):  # what the function returned before it was changed
                    value.cache_clear()
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))
        os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main(names: list[str]) -> int:
    """Mutate the modules that are named, or all; 1 if a survivor is not known."""
    os.chdir(ROOT)
    unknown = 0
    equivalents = tomllib.loads((Path(__file__).parent / "same.toml").read_text())["same"]
    reasons = {(equivalent["module"], equivalent["change"]): equivalent["reason"] for equivalent in equivalents}
    for name in names or TARGETS:
        module = importlib.import_module(name)
        text, count, equal, alive = Path(str(module.__file__)).read_text(), 0, 0, 0
        tree = ast.parse(text)
        pytest.main(["-q", "-p", "no:cacheprovider", *shlex.split(TARGETS[name])])  # imports what they need
        assert survives(module, tree, TARGETS[name]), "its tests fail without a mutant, or take too long"
        for change, mutant in mutants(tree, text.splitlines()):
            count += 1
            if survives(module, mutant, TARGETS[name]):
                reason = reasons.get((name, change), "")
                equal, alive = equal + bool(reason), alive + (not reason)
                print(f"  survives: {change}" + (f"  (the same: {reason})" if reason else ""), flush=True)
        unknown += alive
        print(f"{name}: {count} mutants, {count - equal - alive} killed, {equal} the same, {alive} survive", flush=True)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
