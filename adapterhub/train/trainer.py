"""A training from its config to the finished folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from adapterhub_converters.base import read_hf
from adapterhub_converters.files import staging

from . import artifact, checkpoint, data, loop, lora, memory, ranks
from .base import Base, load, threads
from .config import TrainConfig
from .events import Loading, OnEvent, Ready, Result, Resumed, Saved


def train(config: TrainConfig, out: Path, on_event: OnEvent) -> Result:
    """See `adapterhub.train.run`."""
    staging.check_free(out)
    artifact.check_folder(out.parent)
    plan = memory.plan(config)
    with threads(config.train.threads) as thread_count:
        base = load(
            config.resolve(config.base.path),
            config.base,
            config.lora,
            where=config.where,
            progress=lambda done, total: on_event(Loading(done, total)),
        )
        if config.train.checkpointing:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        train_set, heldout = data.datasets(config, base.tokenizer)
        steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(train_set.rows) / config.train.rows))
        lora.reset(base.model, config.train.seed)
        notes = (*train_set.notes, *data.overlap(train_set, heldout))
        parameters = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
        on_event(Ready(parameters, train_set.documents, train_set.tokens, len(train_set.rows), steps, plan, notes))
        record = _record(config, train_set, heldout, steps, thread_count)
        state = _run(config, base, out, record, rows=train_set.rows, heldout=heldout, on_event=on_event)
        ranks.wait()
        if not ranks.first():
            return Result(out, state.step, state.tokens, artifact.metrics(state)["train_loss"], None, None)
        training = artifact.finish(config, base, state, record, out)
    checkpoint.path_for(out).unlink(missing_ok=True)
    on_event(Saved(state.step, out))
    return Result(
        folder=out,
        steps=state.step,
        tokens=state.tokens,
        loss=training["metrics"]["train_loss"],
        perplexity_before=training["metrics"].get("heldout_perplexity_before"),
        perplexity_after=training["metrics"].get("heldout_perplexity"),
    )


def _record(
    config: TrainConfig, train_set: data.Dataset, heldout: data.Dataset | None, steps: int, thread_count: int
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
        "versions": artifact.versions(thread_count),
    }  # fmt: skip


def _run(
    config: TrainConfig,
    base: Base,
    out: Path,
    record: dict[str, Any],
    *,
    rows: data.Rows,
    heldout: data.Dataset | None,
    on_event: OnEvent,
) -> loop.State:
    """The loop, from its checkpoint if there is one."""
    state = loop.new_state(base.model, config.train)
    path = checkpoint.path_for(out)
    spec = read_hf(config.resolve(config.base.path))
    run = checkpoint.identity({"record": record, "base": spec.fingerprint, "tokenizer": spec.tokenizer_digest})
    if checkpoint.restore(path, base.model, state, run):
        on_event(Resumed(state.step, path))

    def save() -> Path:
        checkpoint.save(path, base.model, state, run)
        on_event(Saved(state.step, path))
        return path

    asked = data.some(heldout.rows, config.data.heldout_tokens) if heldout else None
    steps = record["config"]["steps"]
    loop.loop(base, rows, asked, state, config.train, steps=steps, save=save, on_event=on_event)
    return state
