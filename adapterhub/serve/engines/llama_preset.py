"""The preset file of llama-server's router: common settings, the base, and a section for each version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError

from .llama_server import LlamaServerOptions

BASE = "base"
"""The section of the base."""


def section_of(served: PreparedVersion) -> str:
    """Return the name of a version in the preset file, without a colon: llama.cpp capitalizes what follows one."""
    return served.model.replace(":", "-")


def preset(
    options: LlamaServerOptions, versions: Sequence[PreparedVersion], templates: Mapping[str, Path] = MappingProxyType({})
) -> str:
    """Return the preset file: common settings, the base, and a section per version; RefusedError for an unsafe path.

    Args:
        options: The settings.
        versions: The versions.
        templates: The files of chat templates, by the sections whose process does not use that of the base.
    """
    # llama-server divides `c` among the requests that it answers at once.
    shared = {"model": options.base, "c": options.context * options.parallel, "np": options.parallel, "kv-unified": "false"}
    lines = ["version = 1", "", "[*]", *(f"{key} = {preset_line(value)}" for key, value in shared.items()), "", f"[{BASE}]"]
    for served in versions:
        section = section_of(served)
        lines += ["", f"[{section}]", f"lora = {preset_line(served.path)}"]
        if section in templates:
            lines.append(f"chat-template-file = {preset_line(templates[section])}")
        if served.prompt.options:
            lines.append(f"chat-template-kwargs = {_json_line(dict(served.prompt.options))}")
    return "\n".join([*lines, ""])


def preset_line(value: object) -> str:
    """Return a value for a line of the preset file; RefusedError if it has characters with a meaning there."""
    text = str(value)
    if not text.isprintable() or text != text.strip() or set(text) & set(";#,"):
        raise RefusedError(text, "has characters that no preset of llama.cpp can have", "Choose another folder for the cache")
    return text


def _json_line(document: Mapping[str, Any]) -> str:
    """Return JSON for a line of the preset file, without the characters that begin a comment there."""
    return json.dumps(document).replace("#", "\\u0023").replace(";", "\\u003b")
