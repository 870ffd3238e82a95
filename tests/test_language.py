"""The language of the house: names that say what they hold, and docstrings that a stranger reads once.

Fourteen Python projects that were measured bind a filler word at most once in two hundred names.
"""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_house import ROOT, error_classes, nodes, parsed, sources

# Words that say nothing of what a variable holds or what a function does, when they are the whole name.
_FILLERS = """
    all any anything asked been begun both can did do does done each every everything few found gone got given had has have
    held here how is kept known left made many meant more most much no none nothing of one ones other others own put rest said
    seen shown some something such taken that them there these thing things this those told wanted was were what whatever when
    where whether which who whoever whom whose why
"""
_IRREGULAR_PARTICIPLES = """
    begun broken built bought brought chosen done drawn driven fallen forgotten found given gone got grown held hidden kept
    known laid led lent lost made meant met paid said seen sent shown sold spent spoken stood taken taught thought told
    understood won written
"""
_NOT_PARTICIPLES = {"embed", "exceed", "feed", "need", "proceed", "seed", "speed", "succeed"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def packages() -> dict[str, list[Path]]:
    """Return the modules of each package of `adapterhub`, and of the other source roots."""
    grouped: dict[str, list[Path]] = collections.defaultdict(list)
    for path in sources(with_cli=True):
        folders = path.parts[:-1]
        grouped["/".join(folders[:2] if folders[0] == "adapterhub" else folders[:1])].append(path)
    return grouped


def bound_names(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each name that a module binds, and its line: variables, parameters, attributes, functions and classes."""
    for node in nodes(path):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name, node.lineno


def is_filler(name: str) -> bool:
    """Tell whether a whole name says nothing."""
    return name.strip("_") in _FILLERS.split() and not name.startswith("__")


def is_participle(name: str) -> bool:
    """Tell whether the one word of a name is a participle, such as `kept` or `Attached`."""
    words = re.findall(r"[A-Z]?[a-z0-9]+", name)
    if len(words) != 1:
        return False
    word = words[0].lower()
    return word in _IRREGULAR_PARTICIPLES.split() or (word.endswith("ed") and len(word) > 4 and word not in _NOT_PARTICIPLES)


def test_at_most_one_name_of_a_hundred_says_nothing_in_any_package() -> None:
    crowded = {}
    for package, paths in packages().items():
        names = [(path, name, line) for path in paths for name, line in bound_names(path)]
        fillers = [f"{path}:{line}: {name}" for path, name, line in names if is_filler(name)]
        if len(fillers) > len(names) / 100:
            crowded[package] = fillers
    assert crowded == {}


# The most fillers among a hundred names outside of the packages; these bounds only go down.
_ELSEWHERE = {"benchmarks": 1.0, "docs": 1.0, "examples": 1.0, "tests": 0.5}
# The most participles among a hundred functions of them.
_PARTICIPLES_IN_TESTS = {"tests/serve": 1.0}


def test_the_names_of_tests_benchmarks_docs_and_examples_say_what_they_hold() -> None:
    for folder, bound in _ELSEWHERE.items():
        paths = [path.relative_to(ROOT) for path in sorted((ROOT / folder).rglob("*.py"))]
        names = [(path, name, line) for path in paths for name, line in bound_names(path)]
        fillers = [f"{path}:{line}: {name}" for path, name, line in names if is_filler(name)]
        assert 100 * len(fillers) / len(names) <= bound, (folder, fillers[:100])


def test_at_most_one_function_of_fifty_is_named_by_a_participle_in_any_package() -> None:
    crowded = {}
    for package, paths in packages().items():
        functions = [(path, node) for path in paths for node in nodes(path) if isinstance(node, _FUNCTIONS)]
        participles = [f"{path}:{node.lineno}: {node.name}" for path, node in functions if is_participle(node.name)]
        if len(participles) > len(functions) / 50:
            crowded[package] = participles
    assert crowded == {}


def test_the_functions_of_the_tests_are_named_by_no_more_participles_than_they_were() -> None:
    for folder, bound in _PARTICIPLES_IN_TESTS.items():
        paths = [path.relative_to(ROOT) for path in sorted((ROOT / folder).rglob("*.py"))]
        functions = [(path, node) for path in paths for node in nodes(path) if isinstance(node, _FUNCTIONS)]
        participles = [f"{path}:{node.lineno}: {node.name}" for path, node in functions if is_participle(node.name)]
        assert 100 * len(participles) / len(functions) <= bound, (folder, participles)


def test_no_class_but_an_error_is_named_by_a_participle() -> None:
    classes = [(path, node) for path in sources(with_cli=True) for node in nodes(path) if isinstance(node, ast.ClassDef)]
    assert len(classes) > 500
    assert [
        f"{path}:{node.lineno}: {node.name}"
        for path, node in classes
        if is_participle(node.name) and node.name not in error_classes()
    ] == []


# The beginnings of sentences that are no summary of a function, and phrases that have to be read twice.
_NOUN_PHRASES = re.compile(
    r"\W*(The|A|An|What|Whether|Where|Who|All|Each|One|Those|How|As|Which|True|None|If|That|This|Its|Their)\b"
)
_RIDDLES = re.compile(r"\bthat is none\b|\bstands? for\b|\bfor whom\b|(?:^|[.;:] )Who \w+s\b|\bin vain\b|^Have \w+ \w+ ")


def _documented(path: Path) -> Iterator[tuple[ast.AST, str]]:
    for node in (parsed(ROOT / path), *nodes(path)):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
            yield node, text


def test_the_docstring_of_a_function_says_in_the_imperative_what_it_does() -> None:
    nouns = [
        f"{path}:{node.lineno}: {text.splitlines()[0]}"
        for path in sources(with_cli=True)
        for node, text in _documented(path)
        if isinstance(node, _FUNCTIONS)
        and not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        and not node.name.startswith("__")
        and path.parent.name != "methods"  # `merge --explain` shows them: what a merge method results in
        and _NOUN_PHRASES.match(text)
    ]
    assert nouns == []


def test_no_docstring_is_a_riddle() -> None:
    assert [
        f"{path}:{getattr(node, 'lineno', 1)}: {riddle[0]}"
        for path in sources(with_cli=True)
        for node, text in _documented(path)
        for riddle in _RIDDLES.finditer(text)
    ] == []


def _documented_names(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Return the names that the sections Args and Attributes of a docstring explain."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
    keys = [key for section in sections for key in re.findall(r"^    ([*\w]+(?:, [*\w]+)*):", section, re.MULTILINE)]
    return {name.lstrip("*") for key in keys for name in key.split(", ")}


def _names_to_document(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Return the parameters of a function; the names that the body of a class mentions, with its parameters and attributes."""
    if isinstance(node, ast.ClassDef):
        attributes = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
        names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
        return attributes | names | {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
    return {child.arg for child in ast.walk(node.args) if isinstance(child, ast.arg)}


def test_every_argument_and_attribute_that_a_docstring_explains_exists() -> None:
    stale, explained = [], 0
    for path in sources(with_cli=True):
        for node in nodes(path):
            if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
                explained += len(names := _documented_names(node))
                stale += [f"{path}:{node.lineno}: {name}" for name in sorted(names - _names_to_document(node))]
    assert explained > 1000
    assert stale == []


_SOURCE_ROOTS = (ROOT / "adapterhub", ROOT / "converters/adapterhub_converters", ROOT / "schemas/adapterhub_schemas")
_FILE_ENDINGS = ("json", "md", "toml")
_ENTRY_POINTS = {"adapterhub.formats"}


def _names_something(name: str, folder: Path) -> bool:
    """Return whether a dotted name, below a package of ours or `folder`, is a package, a module, or a name that one has."""
    for root in (folder, *_SOURCE_ROOTS, *(root.parent for root in _SOURCE_ROOTS)):
        path, parts = root, name.split(".")
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        module = path / f"{parts[0]}.py" if parts else path / "__init__.py"
        if parts and module.is_file():
            parts.pop(0)
        elif path == root or not (module := path / "__init__.py").is_file():
            continue
        code = "\n".join(map(ast.unparse, parsed(module).body[1:]))  # without the docstring
        if all(re.search(rf"\b{part}\b", code) for part in parts):
            return True
    return False


def test_every_dotted_name_of_ours_in_a_docstring_or_comment_exists() -> None:
    package_names = {path.stem for root in _SOURCE_ROOTS for path in (root, *root.iterdir()) if not path.name.startswith("_")}
    stale, resolved = [], 0
    for path in sources(with_cli=True):
        for name in set(re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)`", (ROOT / path).read_text())):
            if name.partition(".")[0] in package_names and not name.endswith(_FILE_ENDINGS) and name not in _ENTRY_POINTS:
                resolved += 1
                if not _names_something(name, (ROOT / path).parent):
                    stale.append(f"{path}: {name}")
    assert resolved > 50
    assert stale == []
