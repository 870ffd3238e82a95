"""Which models vLLM and SGLang serve with LoRA, read from the sources of a release, which need not be importable.

    python -m tests.support.runtime_models      # writes converters/adapterhub_converters/runtime_models.json

Their wheels are downloaded once (375 MB) and read by `ast`: neither can be imported without its accelerator. The names that
adapters have for modules are those of the installed transformers.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.support.environments import unpacked_wheel

VLLM, SGLANG = "0.33.0", "0.5.23"
PATH = ROOT / "converters/adapterhub_converters/runtime_models.json"
_REGISTRIES = (
    "_TEXT_GENERATION_MODELS", "_EMBEDDING_MODELS", "_LATE_INTERACTION_MODELS", "_REWARD_MODELS",
    "_TOKEN_CLASSIFICATION_MODELS",
    "_SEQUENCE_CLASSIFICATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS",
)  # fmt: skip
_MODELS = "vllm.model_executor.models"
# Where modules are built: the models, and the layers that hold linear ones. Helpers name every model there is.
_BUILDING = re.compile(
    r"vllm\.(?:model_executor\.models|models|model_executor\.layers\.(?:mamba|kda|mla))\b(?!\.(?:utils|interfaces|registry|adapters|config|vision))"
)


def vllm_folder() -> Path:
    """Return the folder of vLLM's modules."""
    return unpacked_wheel(f"vllm=={VLLM}", "vllm/model_executor/", "vllm/models/", "vllm/lora/")


def sglang_folder() -> Path:
    """Return the folder of SGLang's modules."""
    return unpacked_wheel(f"sglang=={SGLANG}", "sglang/srt/models/", "sglang/srt/lora/")


@dataclass(frozen=True)
class _Class:
    """A class in a module, or a function, as both are looked through."""

    module: _Module
    node: ast.ClassDef | ast.FunctionDef

    @property
    def key(self) -> tuple[str, str]:
        return self.module.name, self.node.name


@dataclass(eq=False)
class _Module:
    """A module: its definitions, its assignments, and what its imports stand for."""

    name: str
    tree: ast.Module
    is_package: bool
    definitions: dict[str, ast.ClassDef | ast.FunctionDef] = field(default_factory=dict)
    values: dict[str, ast.expr] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                parts = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
                prefix = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                source = ".".join(filter(None, (prefix, node.module)))
                self.imports.update({alias.asname or alias.name: (source, alias.name) for alias in node.names})
        for statement in _statements(self.tree.body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef):
                self.definitions[statement.name] = statement
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self.values[statement.targets[0].id] = statement.value
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
                self.values[statement.target.id] = statement.value


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, with those under `if` and `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])


class Sources:
    """The modules below a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = cache(self._module)
        self._named = cache(self._names_in)

    def _module(self, name: str) -> _Module | None:
        path = self.folder / name.replace(".", "/")
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return _Module(name, ast.parse(candidate.read_text()), candidate.name == "__init__.py")
        return None

    def resolve(self, module: _Module | None, name: str, depth: int = 0) -> _Class | None:
        """Return the class or function that a name stands for in a module; None if it is of another package."""
        if module is None or depth > 8:
            return None
        if name in module.definitions:
            return _Class(module, module.definitions[name])
        if name in module.imports:
            source, original = module.imports[name]
            return self.resolve(self.module(source), original, depth + 1)
        alias = module.values.get(name)
        # Another name of a class, or what a function makes of a class: `as_embedding_model(LlamaForCausalLM)`.
        aliases = [alias] if isinstance(alias, ast.Name) else alias.args if isinstance(alias, ast.Call) else []
        resolved = (self.resolve(module, member.id, depth + 1) for member in aliases if isinstance(member, ast.Name))
        return next(filter(None, resolved), None)

    def bases(self, cls: _Class) -> Iterator[_Class]:
        """Yield a class and all that it inherits from, itself first."""
        yield cls
        for base in getattr(cls.node, "bases", ()):
            generic = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(generic, ast.Name) and (parent := self.resolve(cls.module, generic.id)):
                yield from self.bases(parent)
            elif isinstance(base, ast.Call):  # a mixin made by a function of the class
                for argument in base.args:
                    if isinstance(argument, ast.Name) and (inner := self.resolve(cls.module, argument.id)):
                        yield from self.bases(inner)

    def names(self, cls: _Class) -> set[str]:
        """Return the names of a class and of all that it inherits from."""
        written = {
            base.id for item in self.bases(cls) for base in getattr(item.node, "bases", ()) if isinstance(base, ast.Name)
        }
        return {item.node.name for item in self.bases(cls)} | written

    def attribute(self, cls: _Class, name: str) -> Any:
        """Return the value of a class attribute, its own or an inherited one; None if it has none that can be read."""
        for item in self.bases(cls):
            for statement in item.node.body:
                targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
                value = getattr(statement, "value", None)
                if value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return self.value(item.module, value)
        return None

    def value(self, module: _Module, node: ast.expr) -> Any:
        """Return the value of an expression of literals, of attributes of classes, and of mappers of names."""
        try:
            return ast.literal_eval(node)
        except ValueError:
            pass
        match node:
            case ast.Name(id=name) if name in module.values:
                return self.value(module, module.values[name])
            case ast.Name(id=name) if name in module.imports:
                source, original = module.imports[name]
                other_module = self.module(source)
                return self.value(other_module, ast.Name(original)) if other_module else None
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                cls = self.resolve(module, name)
                return self.attribute(cls, attribute) if cls else None
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                first, second = self.value(module, left), self.value(module, right)
                return _merged(first, second) if isinstance(first, dict) and isinstance(second, dict) else first or second
            case ast.Dict():
                pairs: dict[Any, Any] = {}
                for key, item in zip(node.keys, node.values, strict=True):
                    if key is None:
                        pairs |= self.value(module, item) or {}
                    elif isinstance(key, ast.Constant):
                        pairs[key.value] = self.value(module, item)
                return pairs
            case ast.Call(func=ast.Name(id="WeightsMapper"), keywords=keywords):
                return {word.arg: self.value(module, word.value) for word in keywords if word.arg}
        return None

    def closure(self, cls: _Class) -> list[_Class]:
        """Return the classes and functions that a class may build its modules of: all that its code names, and theirs."""
        reached: dict[tuple[str, str], _Class] = {}
        waiting = [cls]
        while waiting:
            item = waiting.pop()
            if item.key not in reached:
                reached[item.key] = item
                waiting += self._named(item)
        return list(reached.values())

    def _names_in(self, item: _Class) -> list[_Class]:
        names = {node.id for node in ast.walk(item.node) if isinstance(node, ast.Name)}
        classes = (self.resolve(item.module, name) for name in _with_names_in_tables(item.module, names))
        return [cls for cls in classes if cls and _BUILDING.match(cls.module.name)]


def _with_names_in_tables(module: _Module, names: set[str]) -> set[str]:
    """Return names, and those in the tables of a module that go by them: `LAYERS = {"mamba": MambaLayer}`."""
    tables = [module.values[name] for name in names & module.values.keys()]
    return names | {leaf.id for table in tables for leaf in ast.walk(table) if isinstance(leaf, ast.Name)}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: {**first[key], **second[key]} for key in first.keys() & second.keys() if isinstance(first[key], dict)}
    return {**first, **second, **nested}


# ---- vLLM


def vllm_table(sources: Sources) -> dict[str, Any]:
    """Return what vLLM serves: the models with LoRA, those without, and those it had."""
    modeling = _modeling_modules()
    registry = sources.module(f"{_MODELS}.registry")
    assert registry is not None
    models: dict[str, Any] = {}
    without: set[str] = set()
    for name in _REGISTRIES:
        for architecture, (module, class_name) in sources.value(registry, registry.values[name]).items():
            cls = sources.resolve(sources.module(module if module.startswith("vllm.") else f"{_MODELS}.{module}"), class_name)
            assert cls is not None, architecture
            if "SupportsLoRA" in sources.names(cls):
                models[architecture] = _vllm_model(sources, cls, modeling(architecture))
            elif architecture not in models:
                without.add(architecture)
    removed = sources.value(registry, registry.values["_PREVIOUSLY_SUPPORTED_MODELS"])
    return {
        "version": VLLM,
        "transformers": version("transformers"),
        "models": models,
        "without_lora": sorted(without - models.keys()),
        "removed": removed,
    }


def _modeling_modules() -> Callable[[str], _Module | None]:
    """Return a function that returns the module of the installed transformers with a class, if there is one."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    sources = Sources(Path(spec.origin).parents[1])
    paths = {
        name: path
        for path in sorted(sources.folder.glob("transformers/models/*/modeling_*.py"))
        for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)
    }

    def module(name: str) -> _Module | None:
        path = paths.get(name)
        return sources.module(".".join(path.relative_to(sources.folder).with_suffix("").parts)) if path else None

    return module


def _vllm_model(sources: Sources, cls: _Class, modeling: _Module | None) -> dict[str, Any]:
    """Return what is particular to a model with LoRA; without what is empty."""
    parts = sources.closure(cls)
    is_by_transformers = cls.module.name.startswith(f"{_MODELS}.transformers")
    named = {node.id for part in parts for node in ast.walk(part.node) if isinstance(node, ast.Name)}
    tables = {name for part in parts for name in sources.attribute(part, "embedding_modules") or ()}
    mapper = sources.attribute(cls, "hf_to_vllm_mapper") or {}
    components = _components(sources, cls)
    record = {
        # The class of such a text model is named by the base's config alone.
        "tables": None if "init_vllm_registered_model" in named else sorted(tables),
        "stacked_experts": bool(sources.attribute(cls, "is_3d_moe_weight")),
        **_fused_layers(sources, cls, parts),
        "packed_projections": _packed_projections(modeling) if modeling and is_by_transformers else {},
        "absent": _absent_names(parts, mapper, modeling)
        if modeling and not is_by_transformers and "init_vllm_registered_model" not in named
        else [],
        **components,
        "tower_option": bool(components and sources.attribute(cls, "supports_tower_connector_lora")),
        "prefixes": _renames(mapper.get("orig_to_new_prefix")) if components else {},
        "substrings": _renames(mapper.get("orig_to_new_substr")) if components else {},
    }
    return {key: value for key, value in record.items() if value or value is None}


def _fused_layers(sources: Sources, cls: _Class, parts: Iterable[_Class]) -> dict[str, Any]:
    """Return the parts by which adapters name fused layers, and those layers for which vLLM has no form with LoRA."""
    own_mapping = sources.attribute(cls, "packed_modules_mapping")
    # A model without a mapping takes those of the models in it (vllm/model_executor/utils.py, get_packed_modules_mapping).
    mappings = [own_mapping] if own_mapping else [sources.attribute(part, "packed_modules_mapping") for part in parts]
    packed = {name: inner for mapping in mappings if mapping for name, inner in mapping.items() if inner}
    mapped, fused = set(packed), set()
    for node in (node for part in parts for node in ast.walk(part.node)):
        match getattr(node, "targets", [None])[0], getattr(node, "value", None):
            case ast.Subscript(value=ast.Attribute(attr="packed_modules_mapping"), slice=ast.Constant(value=name)), _:
                mapped.add(name)
            case ast.Attribute(attr=name), ast.Call(func=ast.Name(id="MergedColumnParallelLinear")) as call:
                sizes = next((word.value for word in call.keywords if word.arg == "output_sizes"), None)
                # Three parts and more need no mapping (MergedColumnParallelLinearVariableSliceWithLoRA).
                if not (isinstance(sizes, ast.List) and len(sizes.elts) > 2):
                    fused.add(name)
            case ast.Attribute(attr=name), ast.Call(func=ast.Name(id="QKVParallelLinear")):
                fused.add(name)
    return {"packed": packed, "unwrapped": sorted(fused - mapped)}


def _absent_names(parts: Iterable[_Class], mapper: Mapping[str, Any], modeling: _Module) -> list[str]:
    """Return the names that transformers has for parts of layers and vLLM does not: it drops adapters of what they contain."""
    vllm_names = {name for part in parts for name, _ in _attributes(part.node)}
    classes = {name for name, node in modeling.definitions.items() if isinstance(node, ast.ClassDef)}
    names = {
        name
        for class_name in classes
        for name, value in _attributes(modeling.definitions[class_name])
        if value is not None and classes & {leaf.id for leaf in ast.walk(value) if isinstance(leaf, ast.Name)}
    }
    renamed = {part for rules in mapper.values() if isinstance(rules, dict) for old in rules for part in str(old).split(".")}
    return sorted(names - vllm_names - renamed)


def _attributes(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield the attributes that the code of a class gives itself, with their values."""
    for statement in ast.walk(node):
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for leaf in (leaf for target in targets for leaf in ast.walk(target)):
                if isinstance(leaf, ast.Attribute) and isinstance(leaf.value, ast.Name) and leaf.value.id == "self":
                    yield leaf.attr, statement.value


def _packed_projections(modeling: _Module) -> dict[str, str]:
    """Map projections of queries, keys and values in one to the option of a config under which the model splits them.

    vLLM makes a layer of them that it has no form with LoRA for (vllm/model_executor/models/transformers/fusers/packed_qkv.py).
    """
    packed: dict[str, str] = {}
    for condition in ast.walk(modeling.tree):
        match condition:
            case ast.If(test=ast.Attribute(value=ast.Name(id="self"), attr=option), body=[statement, *_]):
                for call in ast.walk(statement):
                    match call:
                        case ast.Call(func=ast.Attribute(value=split, attr="split"), args=[ast.Tuple(elts=[_, _, _]), *_]):
                            names = (leaf.func for leaf in ast.walk(split) if isinstance(leaf, ast.Call))
                            packed |= {
                                name.attr: option
                                for name in names
                                if isinstance(name, ast.Attribute) and ast.unparse(name.value) == "self"
                            }
    return packed


def _renames(mapping: object) -> dict[str, str]:
    return {old: new for old, new in mapping.items() if isinstance(new, str)} if isinstance(mapping, dict) else {}


def _components(sources: Sources, cls: _Class) -> dict[str, list[str]]:
    """Return the prefixes of the language model, the towers and the connectors, if a model names them."""
    keys = {"language_model": "language", "tower_model": "towers", "connector": "connectors"}
    for item in sources.bases(cls):
        for function in item.node.body:
            if isinstance(function, ast.FunctionDef) and function.name == "get_mm_mapping":
                calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
                call = next((node for node in calls if getattr(node.func, "attr", "") == "from_string_field"), None)
                if call is not None:
                    return {
                        keys[word.arg or ""]: _strings(item.module, sources, function, word.value) for word in call.keywords
                    }
    return {}


def _strings(module: _Module, sources: Sources, function: ast.FunctionDef, node: ast.expr) -> list[str]:
    """Return the strings of an expression, or of all that a function puts into the list of that name."""
    value = sources.value(module, node)
    if value is not None:
        return [value] if isinstance(value, str) else list(value)
    if not isinstance(node, ast.Name):
        return []
    added: list[ast.expr] = []
    for statement in ast.walk(function):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == node.id:
            added.append(statement.value)
        elif isinstance(statement, ast.Call) and ast.unparse(statement.func).startswith(f"{node.id}."):
            added += statement.args
    constants = (leaf.value for expression in added for leaf in ast.walk(expression) if isinstance(leaf, ast.Constant))
    return sorted({constant for constant in constants if isinstance(constant, str)})


# ---- SGLang


def sglang_table(sources: Sources) -> dict[str, Any]:
    """Return the architectures that SGLang has, and the modules that it has memory for."""
    utils = sources.module("sglang.srt.lora.utils")
    assert utils is not None
    usual = _compared_strings(utils.definitions["get_default_hidden_dim"])
    normalize = utils.definitions["get_normalized_target_modules"]
    indexer = sources.value(utils, utils.values["DSA_INDEXER_LORA_NAMES"].args[0])  # type: ignore[attr-defined]
    models: dict[str, Any] = {}
    for path in sorted((sources.folder / "sglang/srt/models").glob("*.py")):
        module = sources.module(f"sglang.srt.models.{path.stem}")
        assert module is not None
        entries = module.values.get("EntryClass")
        for entry in entries.elts if isinstance(entries, ast.List | ast.Tuple) else [entries]:
            if isinstance(entry, ast.Name) and (cls := sources.resolve(module, entry.id)):
                models[cls.node.name] = _sglang_model(sources, cls)
    return {
        "version": SGLANG,
        "names": sorted(usual | indexer),
        "normalized": next(
            sources.value(utils, statement.value)
            for statement in ast.walk(normalize)
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "params_mapping"
        ),
        "models": models,
    }


def _sglang_model(sources: Sources, cls: _Class) -> dict[str, Any]:
    """Return the names of modules for which a model has sizes of its own; None if it asks another class."""
    for item in sources.bases(cls):
        for function in item.node.body:
            if isinstance(function, ast.FunctionDef) and function.name == "get_hidden_dim":
                names = _compared_strings(function)
                is_delegated = any(
                    isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("get_hidden_dim", "get_default_hidden_dim"))
                    for node in ast.walk(function)
                )
                return {"names": None if is_delegated or not names else sorted(names)}
    return {}


def _compared_strings(function: ast.AST) -> set[str]:
    """Return the strings that a function compares something with, alone or in a tuple, list or set."""
    comparisons = (node for node in ast.walk(function) if isinstance(node, ast.Compare))
    leaves = (leaf for node in comparisons for side in node.comparators for leaf in ast.walk(side))
    return {leaf.value for leaf in leaves if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)}


# ---- the file


def tables(vllm: Path, sglang: Path) -> dict[str, Any]:
    """Return the content of the file, but for the day on which it was made."""
    return {"vllm": vllm_table(Sources(vllm)), "sglang": sglang_table(Sources(sglang))}


def text(content: Mapping[str, Any]) -> str:
    """Return the text of the file: a line for each model."""
    lines = []
    for runtime, table in content.items():
        if not isinstance(table, dict):
            lines.append(f"{json.dumps(runtime)}: {json.dumps(table)}")
            continue
        rows = [f"  {json.dumps(name)}: {json.dumps(model)}" for name, model in sorted(table["models"].items())]
        other_lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items() if key != "models"]
        models = ' "models": {\n' + ",\n".join(rows) + "\n }"
        lines.append(f"{json.dumps(runtime)}: {{\n" + ",\n".join([*other_lines, models]) + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    content = {"date": datetime.now(UTC).date().isoformat(), **tables(vllm_folder(), sglang_folder())}
    PATH.write_text(text(content))
