"""`adapterhub train`."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import errors, output, signing_options
from adapterhub.cli.environment import prepare_torch
from adapterhub.cli.inputs import byte_count
from adapterhub.cli.options import (
    Settings,
    command,
    dry_run_option,
    explain_option,
    force_option,
    output_option,
    replace_option,
    set_option,
)
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.version_results import render_push
from adapterhub.cli.views import train_plan
from adapterhub.cli.views import training as view
from adapterhub.operations import attest, push
from adapterhub_converters.errors import AdapterhubError, UsageError

if TYPE_CHECKING:
    from adapterhub.training import TrainConfig
    from adapterhub.trust.keys import Signer


@command(
    "train",
    example="""
    adapterhub train --init sql.toml
    adapterhub train --explain learning_rate
    adapterhub train sql.toml -o ./sql
    adapterhub train sql.toml --dry-run
    adapterhub train sql.toml --dry-run --set base.device=cuda --memory 24GiB
    adapterhub train sql.toml --set train.steps=10
    adapterhub train more.toml --from team/sql:prod --push team/sql
    adapterhub train sql.toml --push team/sql --key trainer.key""",
)
@click.argument("config", metavar="[CONFIG]", required=False)
@output_option("folder for the adapter. [default: CONFIG without .toml]")
@replace_option
@dry_run_option
@force_option("start even if free memory does not suffice.")
@click.option(
    "--init", "new", metavar="[FILE]", is_flag=False, flag_value="train.toml", help="Write a config with every key explained."
)
@explain_option("key of CONFIG and its default, or all of them.", is_flag=False, flag_value="")
@set_option("one of CONFIG, like train.steps=10 or base.quantize=none")
@click.option(
    "--memory",
    metavar="SIZE",
    help="With --dry-run: plan for a device with SIZE of memory, like 24GiB, that need not be here; for a graphics card, "
    "with --set base.device=cuda.",
)
@click.option("--from", "start", metavar="SRC", help="Source: an adapter to continue training, which must fit CONFIG.")
@click.option("--push", "ref", metavar="REF", help="Push the result to REF, like `adapterhub push`.")
@signing_options.optional_signer
@click.pass_obj
def train(
    settings: Settings,
    /,
    *,
    config: str | None,
    out: str | None,
    replace: bool,
    dry_run: bool,
    force: bool,
    new: str | None,
    about: str | None,
    changes: tuple[str, ...],
    memory: str | None,
    start: str | None,
    ref: str | None,
    signer: signing_options.SignerOption | None,
) -> int:
    """Train a LoRA adapter on a base in 4 bits (QLoRA), and record how it was made.

    CONFIG is a TOML file: base, data, lora, train, preference, card. The command first shows what is trained and the memory
    it needs, and refuses what cannot fit (exit 6). --dry-run trains nothing: it reads and checks the data, shows examples,
    tokens, steps and the least time, and compares the memory with other settings. Afterwards the command reports the
    held-out perplexity before and after, and the cost. Ctrl-C leaves a checkpoint next to OUT, from which the same command
    resumes. A push that fails leaves OUT in place. With --key or --keyless, the trainer signs at the end what it did, for the
    version that it pushes. Needs the extra: pip install 'adapterhub[train]'.
    """
    from adapterhub.operations import train as train_operation
    from adapterhub.training import read_config

    if new is not None or about is not None or config is None:
        return _init_or_explain(settings, config, new, about)
    prepare_torch()
    if memory and not dry_run:
        raise UsageError("--memory", "plans for a device, and nothing is trained on it", "Add --dry-run")
    train_config = read_config(Path(config), changes)
    if dry_run:
        planned_memory = byte_count(memory, "--memory") if memory else None
        forecast = train_operation.forecast(train_config, memory=planned_memory, workspace=workspace(settings))
        return train_plan.show(settings, train_config, forecast, force=force, is_local=planned_memory is None)
    # Checked before a training of hours, not after it.
    key = _checked_key(signer, ref, train_config, settings)
    target = Path(out) if out else Path(Path(config).stem)
    with view.Screen(train_config) as screen:
        result = train_operation.train(
            train_config, target, on_event=screen.show, start=start, force=force, replace=replace, workspace=workspace(settings)
        )
    if os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("RANK", "0") != "0":
        return 0  # torchrun starts several processes; only the first one reports
    document = view.document(result, screen.ready)
    if ref and signer is not None and key is not None:
        document |= _signed_push_result(target, ref, signer.renewed(key), settings)
    elif ref:
        document["pushed"] = _push_result(target, ref, settings)

    def text() -> None:
        view.text(result, document.get("pushed"))
        if key is not None:
            output.write(output.one_line(f"training attested by {key.public.title}"))

    output.emit(document, as_json=settings.as_json, text=text)
    return 0


def _checked_key(
    signer: signing_options.SignerOption | None, ref: str | None, config: TrainConfig, settings: Settings
) -> Signer | None:
    """Read the key that signs the training, if there is one, and check the target of the push, if there is one."""
    from adapterhub.operations import train_target

    if signer is not None and not ref:
        raise UsageError("--key and --keyless", "sign a version, and nothing is pushed", "Pass --push REF too")
    key = signer.read() if signer is not None else None
    if ref:
        train_target.check(config, ref, key, workspace(settings))
    return key


def _signed_push_result(folder: Path, ref: str, key: Signer, settings: Settings) -> dict[str, Any]:
    """Push the trained adapter with what the trainer signs about it."""
    # Before the push, whose folder somebody could edit meanwhile, and whose policy may ask for it.
    statement = attest.trained(folder, ref)
    signed = statement.sign(key)
    pushed = _push_result(folder, ref, settings, attestations=[signed])
    try:
        attested = attest.add(statement, signed, pushed["ref"], key, workspace(settings))
    except AdapterhubError as error:
        errors.add_hint(error, f"{pushed['ref']} was pushed, and its training is not attested")
        raise
    return {"pushed": pushed, "attestations": [signing_options.attestation_document(attested)]}


def _push_result(folder: Path, ref: str, settings: Settings, *, attestations: Sequence[bytes] = ()) -> dict[str, Any]:
    """Push the trained adapter; an error names the folder, which stays."""
    try:
        result = push.push(folder, ref, attestations=attestations, workspace=workspace(settings))
        return render_push(result).document
    except AdapterhubError as error:
        source = shlex.quote(str(folder) if folder.is_absolute() else f"./{folder}")
        errors.add_hint(
            error, f"The adapter is in {folder}; `adapterhub push {source} {ref}{errors.registry_words()}` tries again"
        )
        raise


def _init_or_explain(settings: Settings, config: str | None, new: str | None, about: str | None) -> int:
    """Run --init or --explain."""
    if sum(value is not None for value in (config, new, about)) != 1:
        raise UsageError("train", "takes one of CONFIG, --init and --explain", "Write a CONFIG with `adapterhub train --init`")
    return _init(settings, new) if new is not None else _explain(settings, about or "")


def _init(settings: Settings, path: str) -> int:
    from adapterhub.training import config_help

    config_help.write_template(Path(path))
    text = f"wrote {path}; fill in its paths, then run `adapterhub train {shlex.quote(path)}`"
    output.emit({"config": str(Path(path))}, as_json=settings.as_json, text=lambda: output.write(text))
    return 0


def _explain(settings: Settings, key: str) -> int:
    """Explain one key of the config, or all."""
    from adapterhub.training import config_help as explanations

    items = explanations.explain(key or None)

    def text() -> None:
        for number, item in enumerate(items):
            if number:
                output.write()
            default = f" = {item.default}" if item.default else ", required" if item.needed else ", not set by default"
            output.write(f"[{item.section}] {item.key}{default}")
            for line in output.wrap(item.explanation, output.width()):
                output.write(line)

    output.emit({"keys": [dataclasses.asdict(item) for item in items]}, as_json=settings.as_json, text=text)
    return 0
