"""Ollama's package of an adapter: a folder with a GGUF and a Modelfile that names the GGUF and the base.

The Modelfile has only `FROM` and `ADAPTER` (Ollama, `docs/modelfile.md`): the base brings its chat template and parameters, and
a template of the adapter's own, which is not in Go's language, is noted.
Ollama resolves the paths in it, so the base's path is absolute and the adapter's is relative to the Modelfile.
"""

from __future__ import annotations

from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import ParameterError, UsageError
from adapterhub_converters.trained_prompt import TrainedPrompt

MODELFILE = "Modelfile"
CONDITIONAL = "the adapter acts only after certain tokens (aLoRA), and Ollama applies it to all"
NOTE = (
    "models that Ollama runs with its own engine do not support adapters (`loras are not yet implemented`, at the first "
    "request): merge the adapter into the base for those"
)
_OWN_TEMPLATE = "the adapter was trained with a chat template of its own (jinja)"
_OWN_VARIABLES = "the adapter was trained with options or a date of its base's chat template"


def prompt_notes(prompt: TrainedPrompt) -> tuple[str, ...]:
    """Return what Ollama leaves out of the prompt of an adapter."""
    if not prompt:
        return ()
    problem = _OWN_VARIABLES if prompt.template is None else _OWN_TEMPLATE
    return (f"{problem}, which no Modelfile can say: write its TEMPLATE by hand, or send whole prompts with `raw`",)


def adapter_name(folder: Path) -> str:
    """Return the file name of the adapter in the package `folder`."""
    name = folder.resolve().name
    if not name.isprintable():
        raise UsageError(str(folder), "the adapter gets the name of the folder, which a Modelfile cannot contain")
    return f"{name}.gguf"


def check(model: str | None) -> str:
    """Return `model` if a Modelfile can contain it; raise ParameterError otherwise."""
    if not model:
        raise ParameterError("model", "is missing", "Name the base as Ollama does, or its path")
    if not model.isprintable() or model != model.strip() or model.startswith('"'):  # quoted text may span lines
        raise ParameterError("model", f"a Modelfile cannot contain {model!r}")
    return model


def write(folder: Path, model: str, adapter: str) -> None:
    """Write the Modelfile for the base `model` and the file `adapter` into `folder`."""
    json_file.write_text(folder / MODELFILE, f"FROM {model}\nADAPTER ./{adapter}\n")
