"""`adapterhub base`: bases that the registry knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column
from adapterhub_converters.errors import AdapterhubError, NotFoundError

if TYPE_CHECKING:
    from adapterhub.bases.registered import Registered
    from adapterhub.registry.registry import Registry


def _complete(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from adapterhub.bases import registered

    try:
        with open_registry(context.find_object(Settings) or Settings()) as registry:
            return [CompletionItem(name) for name in registered.names(registry) if name.startswith(typed)]
    except AdapterhubError:
        return []


@click.group(
    "base",
    cls=Group,
    short_help="Keep bases by name.",
    example="""
    adapterhub base add qwen3 hf://Qwen/Qwen3-0.6B
    adapterhub validate ./sql --base qwen3""",
)
def base() -> None:
    """Keep what bases are, names, shapes, numbers and digests, under names that --base takes.

    The registry keeps what headers say, never weights. What needs those takes a folder as ever.
    """


@base.command(
    "add",
    short_help="Keep a base under a name.",
    example="""
    adapterhub base add qwen3 hf://Qwen/Qwen3-0.6B
    adapterhub base add tiny ./base.gguf""",
)
@click.argument("name")
@click.argument("source", metavar="BASE")
@click.option("--force", is_flag=True, help="Also when the name means another base.")
@click.pass_obj
def add(settings: Settings, *, name: str, source: str, force: bool) -> None:
    """Read the headers of a base, a folder, a file, hf://org/model or a URL, and keep what they say under a name.

    NAME is a word like qwen3-0.6b. A name that means another base already is a conflict (exit 7). The registry is made if
    there is none.
    """
    from adapterhub.bases import registered
    from adapterhub.store.named_documents import parse_document_name

    parse_document_name(name, name)
    spec = inputs.read_base(source, settings)
    kept = spec.where if "://" in spec.where else str(Path(spec.where).absolute())
    with open_registry(settings, make=True) as registry:
        found = registered.add(registry, name, spec, source=kept, force=force)
    text = f"{'' if found.new else 'already there: '}{name}  {_line(found.document)}"
    document = {**_document(found), "new": found.new}
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
    short_help="List the bases there are names for.",
    example="""
    adapterhub base list""",
)
@click.pass_obj
def list_(settings: Settings) -> int:
    """List the bases there are names for. One that can't be read is named, and hides no other; then this exits 1."""
    with open_registry(settings) as registry:
        found, damaged = _every(registry)
    for name, error in damaged.items():
        output.say(output.one_line(f"error: base {name}: {error}"))
    document = {
        "bases": [_document(item) for item in found],
        "damaged": [{"name": name, "where": error.where, "what": error.what} for name, error in damaged.items()],
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _list_text(found) if found or not damaged else None)
    return 1 if damaged else 0


def _every(registry: Registry) -> tuple[list[Registered], dict[str, AdapterhubError]]:
    """Every base there is a name for, and by name what is wrong with those that can't be read."""
    from adapterhub.bases import registered

    found, damaged = [], {}
    for name in registry.store.log.document_names():
        try:
            found.append(registered.get(registry, name))
        except NotFoundError:  # the name was freed
            continue
        except AdapterhubError as error:
            damaged[name] = error
    return found, damaged


def _list_text(found: list[Registered]) -> None:
    if not found:
        output.say("no bases yet; `adapterhub base add NAME BASE` keeps one")
        return
    cells = [
        [
            item.name,
            item.spec.repo or "-",
            item.spec.architecture or "-",
            _stored(item.document),
            str(len(item.spec.tensors)),
            output.digest(item.document["fingerprint"]),
            item.time[:10],
        ]
        for item in found
    ]
    for line in output.table(_LIST, cells, screen=output.width()):
        output.write(line)


@base.command(
    "show",
    short_help="Say what a base is.",
    example="""
    adapterhub base show qwen3
    adapterhub base show hf://Qwen/Qwen3-0.6B --json""",
)
@click.argument("source", metavar="BASE", shell_complete=_complete)
@click.pass_obj
def show(settings: Settings, source: str) -> None:
    """Say what a base is: the one under a name, or in a folder, a file or behind a URL. --json has every tensor."""
    from adapterhub.bases import registered

    name = inputs.base_name(source, settings)
    if name is not None:
        with open_registry(settings) as registry:
            found = registered.get(registry, name)
        document = {**_document(found), **_whole(found.document)}
    else:
        spec = inputs.read_base(source, settings, notes=False)
        document = {"name": None, "digest": None, "time": None, **_whole(registered.document_of(spec, spec.where))}
    output.emit(document, as_json=settings.as_json, text=lambda: _show_text(document))


def _show_text(document: Mapping[str, Any]) -> None:
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
        "weights": ", ".join([output.plural(len(document["tensors"]), "tensor"), _stored(document), *stored]),
        "output": "the embedding table (tied)" if document["tied"] else "",
        "numbers": ", ".join(f"{key} {value}" for key, value in document["config"].items()),
        "note": "; ".join(document["notes"]),
    }
    for line in output.pairs({key: str(value) for key, value in lines.items() if value}, screen=output.width()):
        output.write(line)


@base.command(
    "rm",
    short_help="Forget a name.",
    example="""
    adapterhub base rm qwen3""",
)
@click.argument("name", shell_complete=_complete)
@click.pass_obj
def rm(settings: Settings, name: str) -> None:
    """Forget what a name means. Adapters that pin the base keep what they pin; the name may be given again."""
    from adapterhub.bases import registered

    with open_registry(settings) as registry:
        registered.remove(registry, name)
    document = {"removed": name, "kind": "base"}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed base {name}"))


def _document(found: Registered) -> dict[str, Any]:
    short = {key: value for key, value in found.document.items() if key not in ("version", "tensors", "config", "notes")}
    return {"name": found.name, "digest": found.digest, "time": found.time, **short}


def _whole(document: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in document["tensors"].items()}
    return {**{key: value for key, value in document.items() if key != "version"}, "tensors": tensors}


def _stored(document: Mapping[str, Any]) -> str:
    """The quantization, or the dtype that most tensors have."""
    tensors = [value["dtype"] if isinstance(value, Mapping) else value[0] for value in document["tensors"].values()]
    return str(document["quantization"] or max(sorted(set(tensors)), key=tensors.count, default="-"))


def _line(document: Mapping[str, Any]) -> str:
    model = document["repo"] or document["architecture"] or document["kind"]
    return f"{model}, {output.plural(len(document['tensors']), 'tensor')}, {output.digest(document['fingerprint'])}"
