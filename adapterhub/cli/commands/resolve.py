"""`adapterhub resolve`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Choice, Settings, base_option, command
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import hint_default_remote, ref_at_remote, remote_option
from adapterhub_converters.runtime_rules import RUNTIMES, RuntimeName

if TYPE_CHECKING:
    from adapterhub.serve.prepared_versions import PreparedVersion


@command(
    "resolve",
    example="""
    adapterhub resolve team/sql:v2 --for vllm --base ./Qwen3-0.6B
    adapterhub resolve team/sql@sha256:5fcb0a55 --for sglang --json
    adapterhub resolve oci://registry.example/team/sql:v2 --for llama.cpp --base hf://Qwen/Qwen3-0.6B""",
)
@click.argument("ref")
@click.option("--for", "runtime", type=Choice(tuple(RUNTIMES)), required=True, help="Runtime that serves it.")
@base_option("the one that it is served on; whatever does not fit it is refused.")
@remote_option
@click.pass_obj
def resolve(settings: Settings, *, ref: str, runtime: RuntimeName, base: str | None, remote: str | None) -> None:
    """Prepare a version for a runtime, and print its path and the options to serve it with.

    The version is pulled, verified, checked, and converted or folded for the runtime, into a folder of the cache that never
    changes; the second time it is only verified. What the runtime would ignore, scale differently or crash on is refused, with
    the code of `adapterhub validate`. `adapterhub gc` removes folders that were not resolved for 30 days and that no running
    server holds.
    """
    from adapterhub.serve import resolving

    address = ref_at_remote(ref, remote)
    spec = inputs.read_base(base, settings) if base else None
    with hint_default_remote(address):
        prepared = resolving.resolve(address, runtime=runtime, base=spec, workspace=workspace(settings))
    output.emit(_document(prepared), as_json=settings.as_json, text=lambda: _text(prepared))


def _document(prepared: PreparedVersion) -> dict[str, Any]:
    return {
        "ref": prepared.ref,
        "model": prepared.model,
        "digest": prepared.digest,
        "runtime": prepared.runtime,
        "path": str(prepared.path),
        "rank": prepared.rank,
        "flags": list(prepared.flags),
        "notes": list(prepared.notes),
    }


def _text(prepared: PreparedVersion) -> None:
    for note in prepared.notes:
        output.say(output.one_line(f"note: {note}"))
    output.write(str(prepared.path))
    if prepared.flags:
        output.write(shlex.join(prepared.flags))
