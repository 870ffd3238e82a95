"""`adapterhub base`: bases that the registry knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import errors, inputs, output
from adapterhub.cli.options import Group, Settings, force_option
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import open_registry

if TYPE_CHECKING:
    from adapterhub.bases.registered_bases import BaseDocument, RegisteredBase
    from adapterhub_converters.bases import BaseSpec


@click.group(
    "base",
    cls=Group,
    example="""
    adapterhub base add qwen3 hf://Qwen/Qwen3-0.6B
    adapterhub validate ./sql --base qwen3""",
)
def base() -> None:
    """Name base models, so that --base takes the name.

    The registry stores what headers contain: names, shapes, numbers and digests, never weights. What needs weights still takes
    a folder.
    """


@base.command(
    "add",
    short_help="Add a base model.",
    example="""
    adapterhub base add qwen3 hf://Qwen/Qwen3-0.6B
    adapterhub base add tiny ./base.gguf""",
)
@click.argument("name")
@click.argument("source", metavar="BASE")
@force_option("give the name to another base.")
@click.pass_obj
def add(settings: Settings, *, name: str, source: str, force: bool) -> None:
    """Read the headers of a base, a folder, a file, hf://org/model or a URL, and store them under a name.

    NAME is a word like qwen3-0.6b. A name of another base is a conflict (exit 7). The registry is created if needed.
    """
    from adapterhub.bases import registered_bases
    from adapterhub.store.named_documents import parse_document_name

    parse_document_name(name, name)
    spec = inputs.read_base(source, settings)
    recorded_source = spec.source if "://" in spec.source else str(Path(spec.source).absolute())
    with open_registry(settings, create=True) as registry:
        registered_base = registered_bases.add(registry, name, spec, source=recorded_source, force=force)
    model = registered_base.spec.repo or registered_base.spec.architecture or registered_base.spec.kind
    tensors, fingerprint = (
        output.plural(len(registered_base.spec.tensors), "tensor"),
        output.digest(registered_base.spec.fingerprint or ""),
    )
    line = f"{name}  {model}, {tensors}, {fingerprint}"
    text = line if registered_base.new else f"already there: {line}"
    document = {**_document(registered_base), "new": registered_base.new}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.one_line(text)))


_LIST = (
    Column("NAME"),
    Column("MODEL"),
    Column("ARCHITECTURE", drop=2),
    Column("STORED", drop=4),
    Column("TENSORS", right=True, drop=3),
    Column("FINGERPRINT", drop=1),
    Column("ADDED", drop=5),
)


@base.command(
    "list",
    short_help="List the base models.",
    example="""
    adapterhub base list""",
)
@click.pass_obj
def list_(settings: Settings) -> int:
    """List the base models. An unreadable one is reported and hides no other; then the exit code is 1."""
    from adapterhub.bases import registered_bases

    with open_registry(settings) as registry:
        bases, damaged = registered_bases.all_bases(registry)
    for name, error in damaged.items():
        errors.say(error, about=f"base {name}: ")
    document = {
        "bases": [_document(registered_base) for registered_base in bases],
        "damaged": [{"name": name, "where": error.where, "what": error.what} for name, error in damaged.items()],
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _list_text(bases) if bases or not damaged else None)
    return 1 if damaged else 0


def _list_text(bases: list[RegisteredBase]) -> None:
    if not bases:
        output.say("no base models yet; add one with `adapterhub base add NAME BASE`")
        return
    cells = [
        [
            registered_base.name,
            registered_base.spec.repo or "-",
            registered_base.spec.architecture or "-",
            _number_type(registered_base.spec),
            str(len(registered_base.spec.tensors)),
            output.digest(registered_base.spec.fingerprint or ""),
            registered_base.time[:10],
        ]
        for registered_base in bases
    ]
    output.write_table(_LIST, cells)


@base.command(
    "show",
    short_help="Show a base model.",
    example="""
    adapterhub base show qwen3
    adapterhub base show hf://Qwen/Qwen3-0.6B --json""",
)
@click.argument("source", metavar="BASE")
@click.pass_obj
def show(settings: Settings, source: str) -> None:
    """Show a base model: by name, or in a folder, a file or at a URL. --json has every tensor."""
    from adapterhub.bases import registered_bases

    name = inputs.base_name(source, settings)
    if name is not None:
        with open_registry(settings) as registry:
            registered_base = registered_bases.get(registry, name)
        spec = registered_base.spec
        document = {**_document(registered_base), **_full_document(registered_base.document)}
    else:
        spec = inputs.read_base(source, settings, notes=False)
        document = {
            "name": None,
            "digest": None,
            "time": None,
            **_full_document(registered_bases.BaseDocument(spec, spec.source)),
        }
    output.emit(document, as_json=settings.as_json, text=lambda: _show_text(document, spec))


def _show_text(document: Mapping[str, Any], spec: BaseSpec) -> None:
    stored = [output.size(document["size"])] if document["size"] else []
    lines = {
        "base": document["name"],
        "model": " ".join(part for part in (document["repo"], document["revision"]) if part),
        "read from": document["source"],
        "added": document["time"],
        "architecture": document["architecture"],
        "fingerprint": output.digest(document["fingerprint"] or ""),
        "tokenizer": output.digest(document["tokenizer_digest"] or ""),
        "template": output.digest(document["chat_template_digest"] or ""),
        "weights": ", ".join([output.plural(len(document["tensors"]), "tensor"), _number_type(spec), *stored]),
        "output": "the embedding table (tied)" if document["tied"] else "",
        "numbers": ", ".join(f"{key} {value}" for key, value in document["config"].items()),
        "note": "; ".join(document["notes"]),
    }
    output.write_pairs({key: str(value) for key, value in lines.items() if value})


@base.command(
    "rm",
    short_help="Remove a base model.",
    example="""
    adapterhub base rm qwen3""",
)
@click.argument("name")
@click.pass_obj
def rm(settings: Settings, name: str) -> None:
    """Remove a named base. Adapters that pin it do not change; the name may be used again."""
    from adapterhub.bases import registered_bases

    with open_registry(settings) as registry:
        registered_bases.remove(registry, name)
    document = {"removed": name, "kind": "base"}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed base {name}"))


def _document(registered_base: RegisteredBase) -> dict[str, Any]:
    fields = registered_base.document.to_dict()
    summary = {key: value for key, value in fields.items() if key not in ("version", "tensors", "config", "notes")}
    return {"name": registered_base.name, "digest": registered_base.digest, "time": registered_base.time, **summary}


def _full_document(document: BaseDocument) -> dict[str, Any]:
    tensors = {name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in document.spec.tensors.items()}
    return {**{key: value for key, value in document.to_dict().items() if key != "version"}, "tensors": tensors}


def _number_type(spec: BaseSpec) -> str:
    """Return the quantization, or the dtype of most tensors."""
    dtypes = [tensor.dtype for tensor in spec.tensors.values()]
    return spec.quantization or max(sorted(set(dtypes)), key=dtypes.count, default="-")
