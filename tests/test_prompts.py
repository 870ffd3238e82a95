"""A model is asked as its adapter was trained: one module renders conversations, and every caller brings the adapter's prompt.

The callers are found in the syntax trees of all modules, so a new one must show here where its prompt comes from.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from tests.support.import_graph import PACKAGES, ROOT, dotted, imported_modules, module_name, module_paths, parsed

_RENDERER = "adapterhub.prompts.chat_template"
_PROCESS = "adapterhub.prompts.limited_process"
# Functions of libraries that write a conversation as text, by a template or in a form of their own.
_WRITERS = {
    "apply_chat_template": {_RENDERER}, "from_string": {_PROCESS}, "llama_chat_apply_template": set(),
    "create_chat_completion": set(), "render_jinja_template": set(), "resolve_chat_template": set(),
}  # fmt: skip
# Every function that renders conversations, and the part of its module by which it gets the prompt.
_ASKING = {
    "generation.hf_text.Text._read_chat_ends": "tokenizer.template_variables = json_file.parse(prompt, self.location)",
    "generation.hf_text.Text.conversation": "chat_template.apply(texts._tokenizer, prompt)",
    "generation.llama_cpp.LlamaCppEngine.conversation": "{**self._special_tokens, **prompt.variables, **conversation}",
    "generation.llama_cpp.LlamaCppEngine._find_end": "{**self._special_tokens, **prompt.variables}",
    "operations.merge_into._end_token": "template = prompt.as_template(",
    "serve.engines.rendered_prompts.Renderer.end_token": "{**self._base_prompt.special_tokens, **prompt.variables}",
    "serve.engines.rendered_prompts.Renderer.text": "template = prompt.template if prompt.template is not None else",
    "training.data.conversation.Conversation.request": "self._tokenizer",
    "training.data.conversation.Conversation._render": "self._tokenizer",
    "training.data.template_renderers._Processes.get": "[template]",
    "training.data.template_renderers.request_all": "process_of(template)",
    "training.loop.heldout._answer": "tokenizer = base.tokenizer",
}
# Every module that loads a tokenizer, and how it sets the prompt of the adapter.
_PREPARING = {
    "evaluation.comparison": "chat_template.apply(model.tokenizer, TrainedPrompt.read(adapter.path))",
    "generation.torch_engine": "chat_template.apply(model.tokenizer, TrainedPrompt.read(adapter.path))",
    "serve.torch_engine.model": "Text(base, path)",  # whose `with_prompt` each request calls
    "training.trainer": "chat_template.apply(tokenizer, dataclasses.replace(prompt, date=date))",
    "training.training_preview": "chat_template.apply(tokenizer, configured_prompt(config, tokenizer))",
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {module_name(path): parsed(ROOT / path) for path in module_paths(*PACKAGES).values()}


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """The functions in a module or class with their full names; those inside a function belong to it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{name}.{child.name}")


def references(node: ast.AST) -> set[str]:
    """The names, with dots, that occur in a piece of code."""
    return {dotted(child) for child in ast.walk(node) if isinstance(child, ast.Attribute | ast.Name)}


def starts_process(node: ast.AST) -> bool:
    """Whether a piece of code starts a process that renders a template."""
    calls = [child for child in ast.walk(node) if isinstance(child, ast.Call) and dotted(child.func).endswith("Process")]
    return any(ast.unparse(argument) == "'template'" for call in calls for argument in call.args)


def rendering() -> set[str]:
    """The functions of the renderer that render a conversation, or return the process that does."""
    bodies = {name.rpartition(".")[2]: node for name, node in functions(modules()[_RENDERER], _RENDERER)}
    function_names = {
        name for name, node in bodies.items() if starts_process(node) or "apply_chat_template" in ast.unparse(node)
    }
    while new_names := {name for name, node in bodies.items() if references(node) & function_names} - function_names:
        function_names |= new_names
    return function_names


def test_one_module_renders_conversations() -> None:
    for writer, allowed in _WRITERS.items():
        users = {
            name
            for name, tree in modules().items()
            for node in ast.walk(tree)
            if (isinstance(node, ast.Attribute) and node.attr == writer) or (isinstance(node, ast.Name) and node.id == writer)
        }
        assert users == allowed, writer
    importing = {name for name, path in module_paths(*PACKAGES).items() if "jinja2" in imported_modules(path, {"jinja2"})}
    assert importing == {_PROCESS, "adapterhub.hub.web.site"}  # the second for its own pages


def test_every_function_that_renders_a_conversation_takes_the_prompt_of_the_adapter() -> None:
    names = rendering()
    assert names == {"inputs", "render", "render_variables", "process", "end_token"}
    asking = {
        name.removeprefix("adapterhub.")
        for module, tree in modules().items()
        if module != _RENDERER
        for name, node in functions(tree, module)
        if references(node) & {f"chat_template.{function}" for function in names} or starts_process(node)
    }
    assert asking == set(_ASKING)
    for name, prompt in _ASKING.items():
        module = max((module for module in modules() if f"adapterhub.{name}.".startswith(f"{module}.")), key=len)
        assert prompt in ast.unparse(modules()[module]), name


def test_the_renderer_is_imported_by_its_own_name() -> None:
    """So that no call escapes the other tests."""
    imports = [node for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imports if (node.module or "").endswith("chat_template")] == []
    aliases = [alias for node in imports for alias in node.names if alias.name == "chat_template"]
    assert len(aliases) > 8
    assert {alias.asname for alias in aliases} == {None}


def test_every_module_that_loads_a_tokenizer_gives_it_the_prompt_of_the_adapter() -> None:
    loader = "adapterhub.training.model.loading"
    loading = {
        name.removeprefix("adapterhub.")
        for name, tree in modules().items()
        if not name.startswith("adapterhub.training.model.")
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.module == loader and any(alias.name == "load" for alias in node.names))
        or (isinstance(node, ast.Attribute) and node.attr == "config_and_tokenizer")
    }
    assert loading == set(_PREPARING)
    for name, prompt in _PREPARING.items():
        assert prompt in ast.unparse(modules()[f"adapterhub.{name}"]), name
