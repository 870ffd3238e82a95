"""The reference of the hub's own API, from its OpenAPI document: Markdown for the site.

python docs/hub_api.py        prints the page
python docs/hub_api.py FILE   writes the OpenAPI document of all the hub answers, as `GET /api/openapi.json` does
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]

from adapterhub.hub import openapi

TAG = "adapterhub"
_METHODS = ("get", "post", "put", "delete")


def page() -> str:
    """Return the Markdown of every operation of the hub's own API."""
    about = "What the commands do at a hub, for other programs; [the hub](../hub.md#the-api) tells how."
    lines = ["# The hub's API", "", f"{about} `GET /api/openapi.json` has it with the other protocols, as an OpenAPI document."]
    for path, item in openapi.paths().items():
        for method in _METHODS:
            if method in item and TAG in item[method]["tags"]:
                lines += _operation(method.upper(), path, item[method])
    return "\n".join(lines) + "\n"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## {method} {path}", "", f"{operation['summary']}.")
    parameters = [
        f"`{parameter['name']}` ({_kind(parameter['schema'])})"
        for parameter in operation["parameters"]
        if parameter["in"] == "query"
    ]
    if parameters:
        yield from ("", f"Query: {', '.join(parameters)}.")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        fields = ", ".join(f"`{name}` ({_kind(schema)})" for name, schema in content["schema"]["properties"].items())
        yield from ("", f"Body: `{kind}` with {fields}.")
    if "security" in operation:
        yield from ("", "A token is needed.")
    yield from ("", f"Answers: {', '.join(operation['responses'])}.")


def _kind(schema: Mapping[str, Any]) -> str:
    return "repeatable" if schema.get("type") == "array" else str(schema.get("type", "any"))


def main() -> None:
    """Print the page, or write the document to a file."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(openapi.document(""), indent=1) + "\n", encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
