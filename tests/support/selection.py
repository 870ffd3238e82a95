"""Which test files a change can break: a plugin of pytest for `make test`, which gives it `--changed`.

Reach is measured in imports, from the changed modules outward. Nearly all tests reach a module at the bottom somehow, so each
step is taken as long as it selects less than a sixth of the suite; `make test-all` runs the rest.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.import_graph import PACKAGES, ROOT, imported_modules, module_name, module_paths

CORE = {
    "tests/attacks/test_documents.py": "bounded readers of JSON and TOML, which read all that strangers write",
    "tests/attacks/test_headers.py": "headers of tensor files that lie about sizes and places",
    "tests/attacks/test_links_in_a_clone.py": "no link leads out of a folder",
    "tests/attacks/test_lying_manifests.py": "a version is what its digest says",
    "tests/attacks/test_policy_bypass.py": "nothing enters a registry past its policy",
    "tests/attacks/test_shown_text.py": "no text of strangers controls a terminal",
    "tests/cli/test_commands.py": "the life of an adapter, from the command line to the bytes",
    "tests/cli/test_errors.py": "where, what, how to fix, in one line, with the right exit code",
    "tests/converters/test_source_config.py": "no format loses anything",
    "tests/remotes/test_protocol.py": "one contract for every registry",
    "tests/store/test_log_chain.py": "the log of a ref, which is the truth of a registry",
    "tests/test_architecture.py": "the contributor guide names what exists",
    "tests/test_house.py": "the rules of the house",
    "tests/test_language.py": "names and docstrings",
}
MAX_SHARE = 1 / 6
_SETTINGS = "pyproject.toml"  # of all tests
_UPSTREAM = ("origin/HEAD", "origin/main", "origin/master", "main", "master")
_MODULE_IN_TEXT = re.compile(r"\b(?:tests|adapterhub(?:_converters|_schemas)?)(?:\.\w+)+")
_WORD_IN_TEXT = re.compile(r"(?<=\")[a-z][a-z-]+(?=\")")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--changed`."""
    parser.addoption("--changed", action="store_true", help="only test files that what changed since the merge base can break")


@dataclass(frozen=True)
class Selection:
    """The test files to run, relative to the root, or None for all; `line` says how many, and why."""

    files: frozenset[str] | None
    line: str


def pytest_configure(config: pytest.Config) -> None:
    """Select once; workers of pytest-xdist are told."""
    if hasattr(config, "workerinput"):
        selected_files = config.workerinput["selected"]
        config.stash[_SELECTION] = Selection(None if selected_files is None else frozenset(selected_files), "")
    elif config.getoption("changed") and config.args_source != pytest.Config.ArgsSource.ARGS:
        config.stash[_SELECTION] = select(ROOT)
    else:
        config.stash[_SELECTION] = Selection(None, "")


_SELECTION = pytest.StashKey[Selection]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tell a worker what is selected."""
    files = node.config.stash[_SELECTION].files  # type: ignore[attr-defined]
    node.workerinput["selected"] = None if files is None else sorted(files)  # type: ignore[attr-defined]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say how many files are selected."""
    return [line] if (line := config.stash[_SELECTION].line) else []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out test files that are not selected."""
    files = config.stash[_SELECTION].files
    if files is None or not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    return collection_path.relative_to(ROOT).as_posix() not in files or None


def select(root: Path) -> Selection:
    """Select the test files that the difference between the working tree and the merge base can break, and the core."""
    if os.environ.get("CI"):
        return Selection(None, "all test files: CI is set")
    changed = changed_files(root)
    if not changed:
        reason = "no merge base with another branch" if changed is None else "nothing differs from the merge base"
        return Selection(None, f"all test files: {reason}")
    if _SETTINGS in changed:
        return Selection(None, f"all test files: {_SETTINGS} changed")
    graph = Graph(root, changed)
    files = graph.broken() | (graph.test_files.keys() & CORE.keys())
    left_count = len(graph.test_files) - len(files)
    line = f"selected {len(files)} test files; {left_count} are left to `make test-all`"
    return Selection(frozenset(files), line)


def changed_files(root: Path) -> set[str] | None:
    """The files that differ from the merge base with the upstream branch, new ones included; None without a merge base."""
    for upstream in _UPSTREAM:
        if merge_base := _git(root, "merge-base", "HEAD", upstream):
            difference = _git(root, "diff", "--name-only", "--no-renames", "-z", merge_base.strip())
            untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
            return {file for file in f"{difference}{untracked}".split("\0") if file}
    return None


def _git(root: Path, *args: str) -> str:
    """What git answers, or nothing if it fails or isn't there."""
    try:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _is_module(file: Path) -> bool:
    return file.suffix == ".py" and file.parts[0] in (*PACKAGES, "tests")


class Graph:
    """Which modules the test files below a root reach.

    Besides what a module imports, it reaches modules that its texts name, such as those of code that a test runs; and a test
    reaches the commands whose names are among its texts, and the conftest.py of its folders.
    """

    def __init__(self, root: Path, changed: Iterable[str] = ()) -> None:
        self._changed = [Path(file) for file in changed]
        self._changed_modules = {module_name(file) for file in self._changed if _is_module(file)}
        self._paths = module_paths(*PACKAGES, "tests", root=root)
        self._sources: dict[str, str] = {module: (root / path).read_text() for module, path in self._paths.items()}
        known_modules = self._paths.keys() | self._changed_modules  # those that were removed too
        self._edges = {
            module: imported_modules(path, known_modules, root=root) | self._named_modules(module)
            for module, path in self._paths.items()
        }
        self._shared = self._test_modules("tests.conftest")
        # What all tests share names commands too, such as those that import torch, and runs none of them by itself.
        for module in self._edges.keys() - self._shared:
            self._edges[module] |= self._named_commands(module)
        tests = {module for module, path in self._paths.items() if path.match("test_*.py") and path.parts[1] != "peers"}
        # A test file to the modules of tests that it is made of.
        self.test_files = {self._paths[module].as_posix(): self._test_modules(module) for module in tests}

    def _named_modules(self, module: str) -> set[str]:
        """The modules that texts of a module name."""
        named = set(_MODULE_IN_TEXT.findall(self._sources[module]))
        named |= {name.rpartition(".")[0] for name in named}  # of a function, for example
        if module.startswith("tests."):
            folder = module.rpartition(".")[0]
            while folder not in ("tests", ""):
                named.add(f"{folder}.conftest")
                folder = folder.rpartition(".")[0]
        return (named & (self._paths.keys() | self._changed_modules)) - {module}

    def _named_commands(self, module: str) -> set[str]:
        """The commands whose names are among the texts of a test."""
        words = _WORD_IN_TEXT.findall(self._sources[module]) if module.startswith("tests.") else ()
        commands = {f"adapterhub.cli.commands.{word.replace('-', '_')}" for word in words}
        return commands & (self._paths.keys() | self._changed_modules)

    def _test_modules(self, module: str) -> set[str]:
        """A module of tests, and all of them that it reaches."""
        reached, next_modules = set[str](), {module} & self._paths.keys()
        while next_modules:
            reached |= next_modules
            next_modules = {name for test in next_modules for name in self._edges[test] if name.startswith("tests.")} - reached
        return reached

    def broken(self) -> set[str]:
        """Return the test files that the changed files can break."""
        modules, broken = {*self._changed_modules}, set[str]()
        for file in [file for file in self._changed if not _is_module(file)]:
            if file.parts[0] in PACKAGES:
                modules |= self._modules_around(file)
            else:
                broken |= self._tests_that_name(file)
        if modules & self._shared:
            return {*self.test_files}
        broken |= {test for test, parts in self.test_files.items() if parts & modules}
        return broken | self._reaching({module for module in modules if not module.startswith("tests.")})

    def _modules_around(self, file: Path) -> set[str]:
        """The modules in the folder of a file that is no module, or in the nearest one above it that has any."""
        for folder in file.parents:
            if modules := {module for module, path in self._paths.items() if path.parent == folder}:
                return modules
        return set()

    def _tests_that_name(self, file: Path) -> set[str]:
        """The test files that name a file, those beside it, and those of all pages if it is one.

        A file at the root is named as such: other folders have a README.md, too.
        """
        text = f'ROOT / "{file}"' if len(file.parts) == 1 else file.name
        return {
            test
            for test, parts in self.test_files.items()
            if Path(test).parent in file.parents[:-2]
            or (file.parts[0] == "docs" and test.startswith("tests/docs/"))
            or any(text in self._sources[part] for part in parts - self._shared)
        }

    def _reaching(self, modules: set[str]) -> set[str]:
        """The test files that reach modules, by as many steps as select no more than the largest share, but at least by one.

        Where that leaves steps out, those of the mirrored folders too: tests/registry for adapterhub/registry.
        """
        direct = {test: set[str]().union(*(self._edges[part] for part in parts)) for test, parts in self.test_files.items()}
        broken: set[str] = set()
        reached = modules
        while True:
            further = {test for test, edges in direct.items() if edges & reached}
            if reached != modules and len(further) > MAX_SHARE * len(direct):
                return broken | {test for module in modules for test in self._mirrored(module)}
            broken = further
            importers = {module for module, edges in self._edges.items() if edges & reached and not module.startswith("tests.")}
            if importers <= reached:
                return broken
            reached = reached | importers

    def _mirrored(self, module: str) -> set[str]:
        """The test files of the nearest folder that mirrors a package around a module."""
        package = module.removeprefix("adapterhub.").replace("adapterhub_", "").rpartition(".")[0]
        while package:
            folder = f"tests/{package.replace('.', '/')}/"
            if files := {test for test in self.test_files if test.startswith(folder)}:
                return files
            package = package.rpartition(".")[0]
        return set()
