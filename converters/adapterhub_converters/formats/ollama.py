"""What Ollama makes a model of: a GGUF adapter and a Modelfile beside it that names it and the base.

The Modelfile says `FROM` and `ADAPTER` alone (Ollama, `docs/modelfile.md`): the base brings its chat template and its
parameters. A path in it is Ollama's own to find, so that of a base is absolute and that of the adapter beside it.
"""

from __future__ import annotations

from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import UsageError

MODELFILE = "Modelfile"
NOTE = (
    "models that Ollama runs with its own engine take no adapter (`loras are not yet implemented`, at the first request): "
    "for those `adapterhub merge --into` makes one model"
)


def adapter_name(folder: Path) -> str:
    """What the adapter in `folder` is called."""
    name = folder.resolve().name
    if not name.isprintable():
        raise UsageError(str(folder), "the name of the folder is the adapter's, and a Modelfile cannot say this one")
    return f"{name}.gguf"


def check(model: str | None, option: str = "--from") -> str:
    """`model` if a Modelfile can say it; `option` is how the command at hand asks for it."""
    if not model:
        raise UsageError(
            option, "is missing: which base should Ollama take", f"Add {option} MODEL, as Ollama calls it, or its path"
        )
    if not model.isprintable() or model != model.strip() or model.startswith('"'):  # a quote may go on over lines
        raise UsageError(option, f"{model!r} is nothing that a Modelfile can say")
    return model


def write(folder: Path, model: str, adapter: str) -> None:
    """The Modelfile in `folder`, of the base `model` and the file `adapter` beside it."""
    json_file.write_text(folder / MODELFILE, f"FROM {model}\nADAPTER ./{adapter}\n")
