"""The rules of the house that linters do not hold."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

from tests.cli import test_explain
from tests.support.import_graph import PACKAGES, ROOT, dotted, imported_modules, module_name, module_paths, nodes, parsed

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+|`adapterhub [a-z]")
# Options of the programs that run adapters.
_OF_OTHERS = {Path("converters/adapterhub_converters/runtime_commands.py"), Path("adapterhub/serve/engines/command_lines.py")}


def sources(*, with_cli: bool = False) -> list[Path]:
    """Every module of ours outside the command line and its door, `python -m adapterhub`, or with them."""
    paths = [path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    return sorted(path for path in paths if with_cli or not {"cli", "__main__.py"} & {*path.parts})


def _docstrings(tree: ast.Module) -> set[ast.expr]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, holders)]
    firsts = [body[0] for body in bodies if body and isinstance(body[0], ast.Expr)]
    return {first.value for first in firsts}


def test_only_the_command_line_mentions_options_and_commands() -> None:
    mentions = []
    for path in [path for path in sources() if path not in _OF_OTHERS]:
        constants = [node for node in nodes(path) if isinstance(node, ast.Constant)]
        named = [node for node in constants if isinstance(node.value, str) and _OPTION.search(node.value)]
        documented = _docstrings(parsed(ROOT / path)) if named else set()
        mentions += [f"{path}:{node.lineno}: {node.value!s}" for node in named if node not in documented]
    assert mentions == []


_DECODERS = {"json.load", "json.loads", "json.JSONDecoder", "tomllib.load", "tomllib.loads"}
_DECODING = {
    "adapterhub/serve/gateway/workers/channel.py": "what another process of the same gateway has written",
    "converters/adapterhub_converters/containers/json_file.py": "the bounded reader of JSON",
    "converters/adapterhub_converters/containers/safetensors_header.py": "shapes and texts that its pattern has bounded",
    "converters/adapterhub_converters/containers/toml_file.py": "the bounded reader of TOML",
    "schemas/adapterhub_schemas/__init__.py": "its own files; it knows the standard library only",
    "adapterhub/prompts/limited_process.py": "lines of its own parent; it knows jinja and the standard library only",
    "adapterhub/prompts/process_limits.py": "lines that its own process writes",
    "adapterhub/prompts/chat_template.py": "what a template of ours renders",
    "adapterhub/remotes/oci/docker_credentials.py": "where the members are of a text that was parsed before",
}


def test_only_the_bounded_readers_decode_json_and_toml() -> None:
    decoding = set()
    for path in sources(with_cli=True):
        named = {dotted(node) for node in nodes(path) if isinstance(node, ast.Attribute)}
        imported = [node for node in nodes(path) if isinstance(node, ast.ImportFrom)]
        named |= {f"{node.module}.{alias.name}" for node in imported for alias in node.names}
        decoding |= {str(path)} if named & _DECODERS else set()
    assert decoding == set(_DECODING)


# What of transformers can load a base, and the one module that may ask for it.
_LOADERS = {"from_pretrained", "from_config", "for_model", "load_dataset", "pipeline"}
_LOADING = Path("adapterhub/training/model/transformers_api.py")


def test_transformers_is_asked_in_one_place_and_never_with_the_code_of_a_base() -> None:
    calls: list[tuple[Path, ast.Call]] = []
    for path in [path.relative_to(ROOT) for path in (ROOT / "adapterhub").rglob("*.py")]:
        called = [node for node in nodes(path) if isinstance(node, ast.Call)]
        calls += [(path, node) for node in called if dotted(node.func).rpartition(".")[2] in _LOADERS]
    assert {path for path, _ in calls} == {_LOADING}
    trusting = [f"{path}:{node.lineno}" for path, node in calls if not _distrusts(node)]
    assert trusting == []


def _distrusts(call: ast.Call) -> bool:
    """Whether a call has `trust_remote_code=False`, or the options of the module that have it."""
    return any(ast.unparse(word) in ("trust_remote_code=False", "**_LOCAL_OPTIONS") for word in call.keywords)


@functools.cache
def error_classes() -> dict[str, ast.ClassDef]:
    """The classes of our errors, by name."""
    class_nodes = (node for path in sources(with_cli=True) for node in nodes(path) if isinstance(node, ast.ClassDef))
    classes = {node.name: node for node in class_nodes}
    error_names: set[str] = set()
    new_names = {"AdapterhubError"}
    while new_names:
        error_names |= new_names
        new_names = {
            name for name, node in classes.items() if {ast.unparse(base) for base in node.bases} & error_names
        } - error_names
    return {name: classes[name] for name in error_names}


def test_every_class_of_errors_has_a_code_of_its_own_for_errors_that_are_raised_without_one() -> None:
    classes = error_classes()
    assert len(classes) > 20
    assert [
        name
        for name, node in classes.items()
        if not any(ast.unparse(statement).startswith("default_code") for statement in node.body)
    ] == []


_CODE_IN_TEST = re.compile(r"""(?:"|'|\[)([a-z]+(?:-[a-z0-9]+)*)(?="|'|\]| \w)""")


def test_every_code_of_an_error_is_asserted_by_a_test() -> None:
    """As a string of its own, or in brackets or before the message, as the command line and the tests of modules show it."""
    paths = (path for path in (ROOT / "tests").rglob("*.py") if path not in (Path(__file__), Path(test_explain.__file__)))
    words = {word for path in paths for word in _CODE_IN_TEST.findall(path.read_text())}
    codes, _ = test_explain.raised()
    assert len(codes) > 100
    assert codes - words == set()


def test_no_error_is_of_the_class_that_is_reported_as_a_bug() -> None:
    raised = [
        f"{path}:{node.lineno}"
        for path in sources()
        for node in ast.walk(parsed(ROOT / path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "AdapterhubError"
    ]
    assert raised == []


def test_no_import_cycle_exists_not_even_inside_functions() -> None:
    modules = module_paths(*PACKAGES)
    graph = {module: imported_modules(path, set(modules)) for module, path in modules.items()}
    circles = [" -> ".join(circle) for circle in _circles(graph)]
    assert circles == []


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other (Tarjan, 1972), of more than one module."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for imported in sorted(graph[module]):
            if imported not in index:
                visit(imported)
                low[module] = min(low[module], low[imported])
            elif imported in stack:
                low[module] = min(low[module], index[imported])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return groups


# Who may use modules whose patterns backtrack, and why that is no harm.
_BACKTRACKING = {"re", "regex", "sre_compile", "sre_parse"}
_MAY_BACKTRACK = {
    "adapterhub.cli.output": "every line that is printed passes two patterns, which are linear, and start before RE2 would",
    "adapterhub_converters.display": "patterns of one character, with lookaround of a fixed width, which RE2 lacks",
    "adapterhub_converters.containers.safetensors_header": "one pattern, whose repeats are possessive",
    "adapterhub_schemas": "the patterns of its schemas, which have no repeats without a bound",
    "adapterhub_converters.peft_patterns": "reads a config's own patterns as peft does: bounded in length, with a deadline",
}


def test_no_pattern_backtracks_over_text_from_elsewhere() -> None:
    backtracking = set()
    for path in sources(with_cli=True):
        named = {alias.name for node in nodes(path) if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in nodes(path) if isinstance(node, ast.ImportFrom) and not node.level}
        if named & _BACKTRACKING:
            backtracking.add(module_name(path))
    assert backtracking == set(_MAY_BACKTRACK)


def test_every_pattern_is_one_that_re2_reads() -> None:
    code = (
        "import importlib, pkgutil, re2, adapterhub, adapterhub_converters\n"
        "from adapterhub_converters import safe_regex\n"
        "made, init = [], safe_regex.Pattern.__init__\n"
        "safe_regex.Pattern.__init__ = lambda self, text: (made.append(text), init(self, text))[1]\n"
        "for package in (adapterhub_converters, adapterhub):\n"
        "    for one in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if {'__main__', 'training', 'evaluation'}.isdisjoint(one.name.split('.')): importlib.import_module(one.name)\n"
        "from adapterhub_converters.formats.image import family_tables\n"
        "from adapterhub_converters.bases import names_in_memory\n"
        "made += [text for table in family_tables.TABLES for text in (table.headers, table.classes)]\n"
        "[names_in_memory._rules_of_key(key) for key in names_in_memory._table()['rules']]\n"
        "assert len(made) > 100 and all(re2.compile(text) for text in made)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- files of others

# Modules that open files in other ways, and why. All others go through `open_file`, which waits for no pipe.
_OPENERS = {
    "adapterhub/cli/environment.py": "the user's own token of the Hugging Face Hub",
    "adapterhub/cli/main.py": "/dev/null",
    "adapterhub/sqlite_file.py": "creates a database, which SQLite opens by its path",
    "adapterhub/hub/operations/backup.py": "creates files in a new folder",
    "adapterhub/index/schema.py": "a file of this package",
    "adapterhub/remotes/objects/store_settings.py": "certificates that a variable names",
    "adapterhub/remotes/oci/upload_notes.py": "creates its own notes",
    "adapterhub/store/export.py": "creates files in a new folder",
    "adapterhub/merging/into_base/output_files.py": "creates files in a new folder",
    "adapterhub/training/machine.py": "/proc",
    "adapterhub/user_files.py": "the folder that it locks",
    "adapterhub/remotes/layouts/layout_folder.py": "the folder that it locks",
    "converters/adapterhub_converters/containers/atomic.py": "folders, and what it wrote itself",
    "converters/adapterhub_converters/containers/confined_files.py": "in open folders, links not followed",
    "converters/adapterhub_converters/containers/open_file.py": "the one way",
    "converters/adapterhub_converters/formats/format_probe.py": "what it wrote itself",
    "converters/adapterhub_converters/formats/unpickle.py": "/proc",
}
# Modules of the packages that work on a store, and why they touch files themselves. All others go through `Store.files`.
_STORE = ("adapterhub/store", "adapterhub/maintenance", "adapterhub/registry", "adapterhub/index")
_TOUCHERS = {
    "adapterhub/index/index_database.py": "registry.db, which SQLite opens by its path",
    "adapterhub/index/index_opening.py": "registry.db, which SQLite opens by its path",
    "adapterhub/registry/conversion_cache.py": "copies into new folders",
    "adapterhub/registry/spectra_cache.py": "a new folder of the cache",
    "adapterhub/registry/ledger.py": "the folder of the registry, which its user named",
    "adapterhub/store/export.py": "a new folder outside",
    "adapterhub/store/ingest.py": "the adapter's own folder",
    "adapterhub/store/store.py": "creates the folder of a store",
}
_READS = {"read_bytes", "read_text"}  # of a path
_OURS = {"read_bytes", "read_text", "open_file.read_bytes", "json_file.read_text"}
_TOUCHES = {
    *(
        "unlink",
        "rmdir",
        "rename",
        "rmtree",
        "write_bytes",
        "write_text",
        "mkdir",
        "iterdir",
        "glob",
        "symlink_to",
        "hardlink_to",
    ),
    *("os.replace", "os.link", "os.remove", "os.utime", "os.scandir", "os.listdir", "os.makedirs", "os.stat", "os.chmod"),
}


@functools.cache
def _called(path: Path) -> list[tuple[int, str, str]]:
    """The line of each call of a module, the name of what is called, and the same with what it is called on."""
    calls = [(node, dotted(node.func)) for node in nodes(path) if isinstance(node, ast.Call) and not _writes(node)]
    return [(node.lineno, called.rpartition(".")[2], called) for node, called in calls]


def _writes(call: ast.Call) -> bool:
    """True for an `open` that only writes."""
    mode = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else ""
    return dotted(call.func) == "open" and str(mode)[:1] in ("w", "x")


def test_every_file_is_opened_in_the_one_way_that_waits_for_no_pipe() -> None:
    calls = [
        f"{path}:{line}: {called}"
        for path in sources()
        if path.parts[0] != "schemas" and path.as_posix() not in _OPENERS
        for line, name, called in _called(path)
        if called in ("open", "os.open", "io.open", "io.FileIO") or (name in _READS and called not in _OURS)
    ]
    assert calls == []


_WALKING = {"rglob", "os.walk", "os.fwalk"}


def test_folders_in_folders_are_walked_in_the_one_way_that_does_not_recurse() -> None:
    calls = [
        f"{path}:{line}: {called}"
        for path in sources(with_cli=True)
        for line, name, called in _called(path)
        if {name, called} & _WALKING
    ]
    assert calls == []


def test_the_files_of_a_store_are_touched_in_one_place_only() -> None:
    calls = [
        f"{path}:{line}: {called}"
        for path in sources()
        if path.as_posix().startswith(_STORE) and path.as_posix() not in _TOUCHERS
        for line, name, called in _called(path)
        if name in _TOUCHES or called in _TOUCHES or called == "open"
    ]
    assert calls == []


# ---- answers of others, and text that is shown

# Modules that open connections, and why. All others go through `adapterhub.http`, which bounds answers and binds credentials.
_NETWORK = {
    "aiohttp",
    "ftplib",
    "http.client",
    "httpcore2",
    "httpx",
    "httpx2",
    "requests",
    "socket",
    "ssl",
    "urllib.request",
    "urllib3",
}
_CONNECTING = {
    "adapterhub.cli.environment": "the proxies that the environment names",
    "adapterhub.http.bounded_responses": "the one HTTP client",
    "adapterhub.http.boundary": "the one HTTP client",
    "adapterhub.http.connection_pools": "the one HTTP client",
    "adapterhub.http.responses": "the one HTTP client",
    "adapterhub.http_server.binding": "the address that a server listens on",
    "adapterhub.http_server.certificate": "the certificate of a server",
    "adapterhub.http_server.client_connections": "the type of its context",
    "adapterhub.http_server.counted_connections": "TLS connections of clients",
    "adapterhub.serve.engines.engine_client": "engines that were started here, or that the user has named",
    "adapterhub.serve.engines.engine_stream": "the connections of that client",
}


def test_only_the_one_http_client_opens_connections() -> None:
    connecting = set()
    for path in sources(with_cli=True):
        named = {alias.name for node in nodes(path) if isinstance(node, ast.Import) for alias in node.names}
        imported = [node for node in nodes(path) if isinstance(node, ast.ImportFrom) and node.module and not node.level]
        named |= {str(node.module) for node in imported} | {
            f"{node.module}.{alias.name}" for node in imported for alias in node.names
        }
        connecting |= {module_name(path) for name in named if any(f"{name}.".startswith(f"{library}.") for library in _NETWORK)}
    assert connecting == set(_CONNECTING)


# Modules of the command line that print, and why. All others go through `output`, which escapes what it prints.
_PRINTING = {
    "adapterhub.cli.main": "the version, and the help of click",
    "adapterhub.cli.options": "the help of click",
    "adapterhub.cli.output": "the one way",
    "adapterhub.cli.progress": "lines of JSON",
}


def test_only_one_module_prints_text_of_others() -> None:
    printing = {
        module_name(path)
        for path in sources(with_cli=True)
        if "cli" in path.parts
        for _, _, called in _called(path)
        if called in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write")
    }
    assert printing == set(_PRINTING)


def test_pages_of_a_hub_escape_all_but_sanitized_cards() -> None:
    marking = {module_name(path) for path in sources() for _, name, _ in _called(path) if name in ("Markup", "HTMLResponse")}
    assert marking == {
        "adapterhub.hub.web.cards",  # after nh3
        "adapterhub.hub.web.facts",  # an empty one
    }
    templates = [*(ROOT / "adapterhub/hub/web/templates").glob("*.html")]
    assert templates
    assert [path.name for path in templates if re.search(r"\|\s*safe|autoescape", path.read_text())] == []


def test_every_python_file_of_the_repository_is_checked_by_mypy() -> None:
    checked = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"])
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(tracked) > 1000
    assert [path for path in tracked if not path.startswith(checked)] == []


_OUR_PACKAGES = ("adapterhub", "adapterhub_converters", "adapterhub_schemas", "tests")


def embedded_programs() -> dict[str, str]:
    """Return the programs in the texts of tests and benchmarks that import something of ours, by file and line."""
    programs = {}
    paths = {*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")}
    for path in sorted(paths - {ROOT / "tests/test_selection.py"}):  # whose modules are made up
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
                text = re.sub(r"\{\w+\}", "None", textwrap.dedent(node.value))  # a template's blanks are filled
                with contextlib.suppress(SyntaxError, ValueError):
                    tree = ast.parse(text)
                    modules = {item.module or "" for item in tree.body if isinstance(item, ast.ImportFrom)}
                    if any(module.partition(".")[0] in _OUR_PACKAGES for module in modules):
                        programs[f"{path.relative_to(ROOT)}-{node.lineno}"] = text
    return programs


def _exists(module: str, name: str) -> bool:
    if hasattr(importlib.import_module(module), name):
        return True
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(f"{module}.{name}") is not None
    return False


def test_programs_in_texts_import_what_they_use_and_what_exists(tmp_path: Path) -> None:
    programs = embedded_programs()
    assert any(name.startswith("tests/converters/test_convert.py") for name in programs)
    for name, text in programs.items():
        (tmp_path / f"{re.sub('[^0-9A-Za-z]', '_', name)}.py").write_text(text)
    options = ["--isolated", "--select", "F821", "--output-format", "concise", str(tmp_path)]
    result = subprocess.run([sys.executable, "-m", "ruff", "check", *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    missing = [
        f"{name}: {node.module}.{alias.name}"
        for name, text in programs.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _OUR_PACKAGES
        for alias in node.names
        if not _exists(str(node.module), alias.name)
    ]
    assert missing == []


_CORE_CONTRACT = "The core imports none of "


@functools.cache
def core_modules() -> dict[str, Path]:
    """Return the files of the core's modules, relative to the root, by name: the sources of import-linter's contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    contract = next(contract for contract in contracts if contract["name"].startswith(_CORE_CONTRACT))
    inside = tuple(f"{name.removesuffix('.*')}." for name in contract["source_modules"])
    outside = tuple(f"{name}." for name in contract["forbidden_modules"])
    modules = module_paths(*PACKAGES).items()
    return {name: path for name, path in modules if f"{name}.".startswith(inside) and not f"{name}.".startswith(outside)}


def test_a_package_tells_a_stranger_what_is_inside() -> None:
    """The docstring of a package of four modules or rooms names at least three quarters of them, files of one kind apart."""
    of_one_kind = {"adapterhub", "adapterhub.cli.commands", "adapterhub.cli.commands.hub", "adapterhub.operations"}
    silent, missing = [], []
    for name, path in module_paths(*PACKAGES).items():
        if path.name == "__init__.py" and name not in of_one_kind:
            folder = (ROOT / path).parent
            inside = {module.stem for module in folder.glob("[!_]*.py")} | {
                room.parent.name for room in folder.glob("*/__init__.py")
            }
            docstring = ast.get_docstring(parsed(ROOT / path)) or ""
            named = {*re.findall(r"\w+", docstring)}
            silent += [f"{name}: {sorted(inside - named)}"] * (len(inside) >= 4 and len(inside & named) < 0.75 * len(inside))
            listed = re.findall(r"^ *(\w+)\.py\b", docstring, re.MULTILINE)
            missing += [f"{name}: {module}" for module in listed if not (folder / f"{module}.py").exists()]
    assert silent == []
    assert missing == []


def _lines(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


def _without_test_file(modules: dict[str, Path]) -> set[str]:
    """Return the modules without `tests/PACKAGE/**/test_MODULE.py`; a name may begin with the folder: `test_gguf_reader`."""
    lacking = set()
    for name in modules:
        package, *inner = name.removeprefix("adapterhub.").replace("adapterhub_converters", "converters").split(".")
        parts = ["", package, *inner]
        stems = {f"test_{parts[-1]}", f"test_{parts[-2]}_{parts[-1]}"}
        lacking |= set() if any(path.stem in stems for path in (ROOT / "tests" / package).rglob("test_*.py")) else {name}
    return lacking


def test_a_module_of_the_core_has_its_tests_where_they_are_looked_for() -> None:
    """The claims of `adapterhub/store/leases.py` are in `tests/store/test_leases.py`, of converters in `tests/converters/`.

    Every module counts that has a function and at least 60 lines; smaller ones may be reached through others. The share only
    goes up: raise the bound when you add a file. Modules of more than 100 lines are counted one by one.
    """
    counted = {
        name: path
        for name, path in core_modules().items()
        if _lines(path) >= 60 and any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes(path))
    }
    assert len(counted) > 200
    lacking = _without_test_file(counted)
    assert [name for name in sorted(lacking) if _lines(counted[name]) > 100] == []
    assert 1 - len(lacking) / len(counted) >= 0.93
