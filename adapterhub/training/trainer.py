"""A training from its config to the finished folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from adapterhub.training.cost.report import Meter
from adapterhub.training.loop.state import State, new_state
from adapterhub.training.model.base import Base, check_isolation
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.loading import load
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import atomic

from . import devices, distributed
from .artifacts import checkpoint, finish
from .config import TrainConfig
from .cost import budget, memory
from .data import dataset as data
from .events import InitialAdapter, Loading, OnEvent, Ready, Result, Resumed, Saved
from .layers import lora
from .loop import loop
from .model import adapters, families, quantized_cache


def train(
    config: TrainConfig,
    out: Path,
    on_event: OnEvent,
    *,
    force: bool = False,
    start: InitialAdapter | None = None,
    cache: Path | None = None,
    replace: bool = False,
) -> Result:
    """Train in this process; arguments, result and errors are those of `adapterhub.training.run`."""
    atomic.check_free(out, replace=replace)
    finish.check_place(out)
    device = devices.chosen(config.base.device)
    on_event = meter = Meter(on_event)
    with devices.threads(config.train.threads) as thread_count:
        with BaseFiles(config.base_path, cache if config.base.cache else None) as files:
            spec = files.spec
            settled = _settled(config, spec, device, force=force)
            initial = adapters.read(start) if start else None
            if initial:
                adapters.check_base(initial, spec, config.base.name)
            base = _loaded(settled, files, device, on_event)
            weights = files.digests
        train_set, heldout = data.datasets(config, base.tokenizer)
        length_notes = families.check_length(base.model, config.data.sequence, config.where)
        check_isolation(base, (train_set.rows, heldout.rows if heldout else None), config.where)
        lora.reset(base.model, config.train.seed)
        notes = [*base.notes, *length_notes, *train_set.notes, *data.overlap(train_set, heldout)]
        if initial:
            notes += adapters.other_weights(initial, weights)
            adapters.check_config(initial, config.lora, base.targets, config.where)
            adapters.put(base, initial)
        steps = config.steps(len(train_set.rows))
        on_event(_ready(settled, spec, base, train_set, steps=steps, notes=tuple(notes)))
        record = {
            "config": {**config.document(), "steps": steps},
            "data": _data_record(train_set, heldout),
            "seed": config.train.seed,
            "versions": finish.versions(thread_count, device),
            "weights": weights,
        }
        parents = _parents(start)
        path = checkpoint.path_for(out)
        facts = {"record": record, "base": spec.fingerprint, "tokenizer": spec.tokenizer_digest, "parents": parents}
        run_id = checkpoint.identity(facts)
        state = _run(config, base, train_set.rows, heldout, path=path, run_id=run_id, steps=steps, on_event=on_event)
        distributed.wait()
        if distributed.first():
            finish.finish(config, spec, base, state, record=record, out=out, parents=parents, replace=replace)
        report = meter.report(settled, spec, device)
    if distributed.first():
        path.unlink(missing_ok=True)
        on_event(Saved(state.step, out))
    metrics = finish.metrics(state)
    return Result(
        folder=out,
        steps=state.step,
        tokens=state.tokens,
        loss=metrics["train_loss"],
        perplexity_before=metrics.get("heldout_perplexity_before"),
        perplexity_after=metrics.get("heldout_perplexity"),
        report=report,
        kept_step=state.kept_step,
    )


def _settled(config: TrainConfig, spec: BaseSpec, device: Any, *, force: bool) -> TrainConfig:
    """Return the config with `auto` resolved, once it is known to fit into memory; unless `force`."""
    free, held = devices.free(device), memory.plan(config, spec).runtime
    if free is None:
        free, held = budget.free_memory(), devices.held(device)
    settled = budget.settled(config, spec, free=free, held=held)
    # The same in all processes: each has to make the same exchanges.
    checkpointing = distributed.total(float(settled.train.checkpointing is True)) > 0
    settled = dataclasses.replace(settled, train=dataclasses.replace(settled.train, checkpointing=checkpointing))
    if not force:
        budget.check(settled, spec, free=free, held=held)
    return settled


def _loaded(config: TrainConfig, files: BaseFiles, device: Any, on_event: OnEvent) -> Base:
    """Load the base with its layers, ready for steps."""
    base = load(
        files,
        config.base,
        config.lora,
        where=config.where,
        progress=lambda done, total: on_event(Loading(done, total)),
        entry=quantized_cache.entry_of(files, config.base, config.lora),
        device=device,
    )
    if config.train.checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.train.compile:
        families.compile_blocks(base.model, config.where)
    return base


def _ready(
    config: TrainConfig, spec: BaseSpec, base: Base, train_set: data.Dataset, *, steps: int, notes: tuple[str, ...]
) -> Ready:
    in_16_bits, in_4_bits = memory.base_sizes(config, spec)
    return Ready(
        parameters=sum(p.numel() for p in base.model.parameters() if p.requires_grad),
        base_parameters=memory.parameters(config, spec)[0],
        base_in_16_bits=in_16_bits,
        base_in_4_bits=in_4_bits,
        documents=train_set.documents,
        tokens=train_set.tokens,
        rows=len(train_set.rows),
        steps=steps,
        memory=memory.plan(config, spec),
        notes=notes,
        checkpointing=config.train.checkpointing is True,
    )


def _data_record(train_set: data.Dataset, heldout: data.Dataset | None) -> list[dict[str, Any]]:
    """Describe the data files for adapter.json; nothing in it depends on when or where."""
    splits = [("train", train_set)] + ([("heldout", heldout)] if heldout else [])
    return [
        {
            "path": file.path, "split": split, "digest": file.digest, "size": file.size,
            "documents": file.documents, "tokens": file.tokens,
        }
        for split, dataset in splits
        for file in dataset.files
    ]  # fmt: skip


def _parents(start: InitialAdapter | None) -> list[dict[str, Any]]:
    """Return the parents of the adapter, for adapter.json."""
    if start is None:
        return []
    return [{"digest": start.digest, **({"ref": start.ref} if start.ref else {}), "method": adapters.METHOD}]


def _run(
    config: TrainConfig,
    base: Base,
    rows: data.Rows,
    heldout: data.Dataset | None,
    *,
    path: Path,
    run_id: str,
    steps: int,
    on_event: OnEvent,
) -> State:
    """Run the loop, from the checkpoint at `path` if there is one."""
    state = new_state(base.model, config.train)
    if checkpoint.restore(path, base.model, state, run_id):
        on_event(Resumed(state.step, state.tokens, path))

    def save() -> Path:
        checkpoint.save(path, base.model, state, run_id)
        on_event(Saved(state.step, path))
        return path

    sample = data.sample(heldout.rows, config.data.heldout_tokens) if heldout else None
    loop.run(base, rows, sample, state, config.train, steps=steps, save=save, on_event=on_event)
    return state
