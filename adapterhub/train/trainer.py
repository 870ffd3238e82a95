"""A training from its config to the finished folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from adapterhub.train.cost.report import Meter
from adapterhub.train.model.base import Base, load, threads
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import atomic

from . import devices, distributed
from .artifacts import checkpoint, finish
from .config import TrainConfig
from .cost import budget, memory
from .data import dataset as data
from .events import Given, Loading, OnEvent, Ready, Result, Resumed, Saved
from .layers import lora
from .loop import loop
from .model import compiled, digest_cache, document_isolation, families, initial_adapter, quantized_cache


def train(
    config: TrainConfig,
    out: Path,
    on_event: OnEvent,
    *,
    force: bool = False,
    start: Given | None = None,
    cache: Path | None = None,
) -> Result:
    """See `adapterhub.train.trainer`."""
    atomic.check_free(out)
    finish.check_place(out)
    device = devices.chosen(config.base.device)
    free, held = _room(config, device)
    settled = _settled(config, free, held)
    plan = memory.plan(settled)
    on_event = meter = Meter(on_event)
    if not force:
        budget.check(settled, free=free, held=held)
    first = _first(config, start)
    with threads(config.train.threads) as thread_count:
        base, weights = _loaded(settled, device, cache if config.base.cache else None, on_event)
        train_set, heldout = data.datasets(config, base.tokenizer)
        longer = families.check_length(base.model, config.data.sequence, config.where)
        document_isolation.check(base, (train_set.rows, heldout.rows if heldout else None), config.where)
        steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(train_set.rows) / config.train.rows))
        lora.reset(base.model, config.train.seed)
        overlap = data.overlap(train_set, heldout)
        notes = (
            *base.notes,
            *longer,
            *train_set.notes,
            *overlap,
            *(initial_adapter.other_weights(first, weights) if first else ()),
        )
        if first:
            initial_adapter.check_config(first, config.lora, base.targets, config.where)
            initial_adapter.put(base, first)
        parameters = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
        on_event(
            Ready(
                parameters=parameters,
                base_parameters=memory.parameters(config)[0],
                documents=train_set.documents,
                tokens=train_set.tokens,
                rows=len(train_set.rows),
                steps=steps,
                memory=plan,
                notes=notes,
                checkpointing=settled.train.checkpointing is True,
            )
        )
        record = {"weights": weights, **_record(config, train_set, heldout, steps, finish.versions(thread_count, device))}
        parents = _parents(start)
        state = _run(config, base, out, record, parents=parents, rows=train_set.rows, heldout=heldout, on_event=on_event)
        distributed.wait()
        if not distributed.first():
            return Result(
                out, state.step, state.tokens, finish.metrics(state)["train_loss"], None, None, meter.report(settled, device)
            )
        training = finish.finish(config, base, state, record, out, parents=parents)
        report = meter.report(settled, device)
    checkpoint.path_for(out).unlink(missing_ok=True)
    on_event(Saved(state.step, out))
    return Result(
        folder=out,
        steps=state.step,
        tokens=state.tokens,
        loss=training["metrics"]["train_loss"],
        perplexity_before=training["metrics"].get("heldout_perplexity_before"),
        perplexity_after=training["metrics"].get("heldout_perplexity"),
        report=report,
        kept=state.kept,
    )


def _room(config: TrainConfig, device: Any) -> tuple[int | None, int]:
    """Bytes that are free where the model will lie, and those that this process holds there already."""
    there = devices.free(device)
    # The interpreter isn't on a CUDA device, and every plan counts it.
    return (budget.free_memory(), loop.resident()) if there is None else (there, memory.plan(config).runtime)


def _settled(config: TrainConfig, free: int | None, held: int) -> TrainConfig:
    """The config with what `auto` comes to: in all processes the same, or those with parts of the base would not meet."""
    found = budget.settled(config, free=free, held=held)
    on = distributed.total(float(found.train.checkpointing is True)) > 0
    return dataclasses.replace(found, train=dataclasses.replace(found.train, checkpointing=on))


def _loaded(config: TrainConfig, device: Any, cache: Path | None, on_event: OnEvent) -> tuple[Base, list[dict[str, Any]]]:
    """The base with its layers, ready for steps, and what its weights are by their digests."""
    path = config.resolve(config.base.path)
    weights = digest_cache.weights(path, cache)
    base = load(
        path,
        config.base,
        config.lora,
        where=config.where,
        progress=lambda done, total: on_event(Loading(done, total)),
        place=quantized_cache.place(cache, path, weights) if cache else None,
        device=device,
    )
    if config.train.checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.train.compile:
        compiled.apply(base.model, config.where)
    return base, weights


def _record(
    config: TrainConfig, train_set: data.Dataset, heldout: data.Dataset | None, steps: int, versions: dict[str, str]
) -> dict[str, Any]:
    """What the adapter will say of its training, but for the metrics; nothing in it depends on when or where."""
    sets = [("train", train_set)] + ([("heldout", heldout)] if heldout else [])
    return {
        "config": {**config.document(), "steps": steps},
        "data": [
            {
                "path": file.path, "split": split, "digest": file.digest, "size": file.size,
                "documents": file.documents, "tokens": file.tokens,
            }
            for split, dataset in sets
            for file in dataset.files
        ],
        "seed": config.train.seed,
        "versions": versions,
    }  # fmt: skip


def _first(config: TrainConfig, start: Given | None) -> initial_adapter.Factors | None:
    """The factors to begin with, if they are for this base."""
    if start is None:
        return None
    found = initial_adapter.read(start)
    initial_adapter.check_base(found, read_base(config.resolve(config.base.path)), config.base.name)
    return found


def _parents(start: Given | None) -> list[dict[str, Any]]:
    """What the adapter will say that it was made from."""
    if start is None:
        return []
    return [{"digest": start.digest, **({"ref": start.ref} if start.ref else {}), "method": initial_adapter.METHOD}]


def _run(
    config: TrainConfig,
    base: Base,
    out: Path,
    record: dict[str, Any],
    *,
    parents: list[dict[str, Any]],
    rows: data.Rows,
    heldout: data.Dataset | None,
    on_event: OnEvent,
) -> loop.State:
    """The loop, from its checkpoint if there is one."""
    state = loop.new_state(base.model, config.train)
    path = checkpoint.path_for(out)
    spec = read_base(config.resolve(config.base.path))
    run = checkpoint.identity(
        {"record": record, "base": spec.fingerprint, "tokenizer": spec.tokenizer_digest, "parents": parents}
    )
    if checkpoint.restore(path, base.model, state, run):
        on_event(Resumed(state.step, state.tokens, path))

    def save() -> Path:
        checkpoint.save(path, base.model, state, run)
        on_event(Saved(state.step, path))
        return path

    asked = data.some(heldout.rows, config.data.heldout_tokens) if heldout else None
    steps = record["config"]["steps"]
    loop.loop(base, rows, asked, state, config.train, steps=steps, save=save, on_event=on_event)
    return state
