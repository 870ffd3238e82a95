"""The trainer, which takes a training run from its config to the finished folder."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from adapterhub.digest import sha256_file
from adapterhub.prompts import chat_template
from adapterhub.training.cost.meter import Meter
from adapterhub.training.loop.heldout import answers, log_evaluation
from adapterhub.training.loop.loss import Loss
from adapterhub.training.loop.state import new_state
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.base_model import Base
from adapterhub.training.model.loading import dequantize, load
from adapterhub.training.model.probes import check_attention, check_isolation
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import FormatError, RefusedError, UsageError
from adapterhub_converters.trained_prompt import TrainedPrompt

from . import compute_device, distributed, machine
from .artifacts import finished_folder, training_checkpoint
from .cost import budget, memory
from .data import dataset as data
from .data.packed_rows import Rows, sample
from .events import Encoding, InitialAdapter, Loading, OnEvent, Ready, ResumeEvent, SaveEvent, StepEvent, TrainingResult
from .layers import lora
from .loop import training_loop
from .model import adapter_transfer, families, quantized_cache
from .train_config import TrainConfig

_UNUSED_SAMPLES = "[train] samples are answered when held-out data are evaluated, and there are none"


class Trainer:
    """A loaded training, to run as its config says or step by step, with its own loss or another.

    Attributes:
        base: The model with its layers, and its tokenizer.
        rows: The data to train on.
        steps: The number of steps that the learning rate is planned for.
        state: The progress of the training, with its log.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        on_event: OnEvent,
        *,
        force: bool,
        start: InitialAdapter | None,
        cache: Path | None,
        replace: bool,
        thread_count: int,
    ) -> None:
        _check_start(start, config)
        self._out, self._replace = out, replace
        self._device = compute_device.select(config.base.device)
        # Before anything is planned or recorded: the record has the dtype that was computed in.
        config, dtype_notes = _with_supported_dtype(config, self._device)
        self._on_event = self._meter = Meter(on_event)
        initial, weights = self._load(config, start, cache, force=force)
        base = self.base
        self._path = training_checkpoint.path_for(out)
        # The checkpoint may have the date that the chat template has written so far, so its path comes first.
        self.config, template_notes = _with_template(config, base.tokenizer, self._path)
        # The data are read after the base, whose tokenizer and chat template encode them.
        train_set, heldout = data.datasets(
            self.config, base.tokenizer, on_progress=lambda done, total: self._on_event(Encoding(done, total))
        )
        self.config = _with_alpaca(self.config, base.tokenizer)
        self.rows = train_set.packed
        self._heldout = sample(heldout.packed, config.data.heldout_tokens) if heldout else None
        # For the count of operations: the cost of attention depends on the length of documents.
        self._context = self.rows.mean_context
        self.steps = self.config.steps(len(self.rows))
        length_notes = _check_rows(self.config, base, train_set, heldout)
        # Initial values are drawn here, after loading, so that they depend on the seed alone and not on a cached base.
        lora.reset(base.model, config.train.seed)
        finished_folder.check_space(self.config, out, sum(p.numel() for _, p in lora.trained_parameters(base.model)))
        initial_notes = _copy_initial(initial, self.config, base, weights) if initial else []
        initial_notes += _other_prompt(start, self.config, base.tokenizer, self._spec) if start else []
        notes = (
            *base.notes, *dtype_notes, *length_notes, *template_notes, *train_set.notes, *data.overlap(train_set, heldout),
            *initial_notes, *([_UNUSED_SAMPLES] if config.train.samples and heldout is None else []),
        )  # fmt: skip
        self._on_event(_ready(self._resolved_config, self._spec, base, train_set, steps=self.steps, notes=notes))
        self._parents = _parents(start)
        self._record: dict[str, Any] = {
            "config": self.config.document(),
            "data": _data_record(train_set, heldout),
            "seed": config.train.seed,
            "versions": finished_folder.versions(thread_count, self._device),
            "weights": weights,
        }
        self._run_id = self._identity()
        self.state = new_state(base.model, config.train)
        if training_checkpoint.restore(self._path, base.model, self.state, self._run_id):
            self._on_event(ResumeEvent(self.state.step, self.state.tokens, self._path))
        elif config.train.keep_every and not replace:
            atomic.check_free(training_checkpoint.kept_folder(out))  # those of another run

    def _load(
        self, config: TrainConfig, start: InitialAdapter | None, cache: Path | None, *, force: bool
    ) -> tuple[adapter_transfer.Factors | None, list[dict[str, Any]]]:
        """Load the base; return the adapter to start from, and the digests of the base's weights."""
        with BaseFiles(config.base_path, cache if config.base.cache else None) as files:
            self._spec = files.spec
            # `auto` is resolved before the base is loaded: whether it fits into memory has to be known first.
            self._resolved_config = _resolve_auto(config, files.spec, self._device, force=force)
            initial = adapter_transfer.read(start, files.spec) if start else None
            if initial:
                adapter_transfer.check_base(initial, files.spec, config.base.name)
            self.base = _load_base(self._resolved_config, files, self._device, self._on_event)
            # A thread has computed the digests while the weights were read.
            return initial, files.digests

    def _identity(self) -> str:
        """Return a digest of everything that the result depends on: only a checkpoint with the same one is resumed."""
        identity: dict[str, Any] = {
            "record": self._record,
            "base": self._spec.fingerprint,
            "tokenizer": self._spec.tokenizer_digest,
            "parents": self._parents,
        }
        if self.config.data.chat_template is not None:
            identity["chat_template"] = self.base.tokenizer.chat_template
        return training_checkpoint.identity(identity)

    def run(self, until: int | None = None) -> None:
        """Run all remaining steps, or those up to `until`, with the config's evaluations and checkpoints.

        Errors are those of `training_loop.run`.
        """
        training_loop.run(
            self.base, self.rows, self._heldout, self.state, self.config.train, steps=self.steps, save=self.save_checkpoint,
            keep=self.keep_checkpoint, on_event=self._on_event, preference=self.config.preference, until=until,
        )  # fmt: skip

    def batches(self) -> Iterator[Rows]:
        """Yield the rows of each remaining step, as `run` takes them; `optim_step` advances to the next step."""
        while self.state.step < self.steps:
            step = self.state.step
            yield training_loop.batch(self.rows, self.state, self.config.train, self.steps)
            if self.state.step == step:
                raise UsageError("batches", f"step {step + 1} was not done before the next batch", "Call optim_step for each")

    def forward_backward(self, batch: Rows, loss: Loss | None = None) -> float:
        """Add the gradient of the loss of `batch` to those accumulated since the last `optim_step`, and return the loss.

        Args:
            loss: Called with the log-probabilities of the labels, a float32 tensor `(rows, tokens)` that is 0 where there is no
                label, and with the rows; returns their share of the loss, a scalar. It is called for every `micro_rows` rows,
                and the shares are summed. None is the loss of `run`: the mean negative log-likelihood, or the preference loss.

        Raises:
            RefusedError: The loss is not finite.

        Example:
            `trainer.forward_backward(batch, lambda logprobs, _: -logprobs.sum() / batch.label_tokens)`
        """
        if loss is not None:
            # With another loss, the result does not follow from the config alone.
            self._record["config"]["loss_function"] = getattr(loss, "__qualname__", type(loss).__qualname__)
        loss = loss or training_loop.usual_loss(self.base, batch, self.config.preference)
        return training_loop.forward_backward(self.base, batch, self.state, self.config.train, loss)

    def optim_step(self) -> StepEvent:
        """Update the parameters with the accumulated gradients, at the learning rate of this step."""
        line = training_loop.optim_step(self.state, self.config.train, self.steps)
        # Whether float16 overflowed is of no concern to callers: the scale has already been lowered.
        line.pop("skipped", None)
        stepped = StepEvent(
            steps=self.steps, tokens_per_second=0.0, memory=compute_device.allocated_memory(self._device), **line
        )
        self._on_event(stepped)
        return stepped

    def evaluate(self) -> float | None:
        """Return the current loss of the held-out data and log it; None if there are none."""
        arguments = self.base, self._heldout, self.state, self.config.train, self.config.preference
        log_evaluation(*arguments, steps=self.steps, on_event=self._on_event)
        return self.state.heldout(self.state.step)

    def sample(self, prompt: str, tokens: int | None = None) -> str:
        """Return the most probable answer to a prompt, of at most `tokens` tokens, by default `[train] sample_tokens`."""
        return answers(self.base, [prompt], tokens or self.config.train.sample_tokens)[0]["text"]

    def save_checkpoint(self) -> Path:
        """Write a checkpoint next to the adapter's folder, from which the same training run resumes, and return its path."""
        training_checkpoint.save(self._path, self.base.model, self.state, self._run_id, date=self.config.data.date)
        self._on_event(SaveEvent(self.state.step, self._path))
        return self._path

    def keep_checkpoint(self) -> Path:
        """Write a checkpoint that stays after the training, and return its path; the record will have its digest."""
        path = training_checkpoint.kept_folder(self._out) / training_checkpoint.kept_name(self.state.step)
        training_checkpoint.save(path, self.base.model, self.state, training_checkpoint.KEPT, date=self.config.data.date)
        self._log_kept_checkpoint(path)
        self._on_event(SaveEvent(self.state.step, path))
        return path

    def continue_after(self, path: Path, step: int) -> None:
        """Continue after `step` from a checkpoint that `keep_checkpoint` wrote there.

        Raises:
            FormatError: It is not a checkpoint of this training at this step.
        """
        training_checkpoint.restore(path, self.base.model, self.state, training_checkpoint.KEPT)
        if self.state.step != step:
            raise FormatError(str(path), f"is a checkpoint of the step {self.state.step}, and not {step}")
        self._log_kept_checkpoint(path)

    def _log_kept_checkpoint(self, path: Path) -> None:
        if distributed.first():
            line = {"step": self.state.step, "checkpoint": sha256_file(path), "size": path.stat().st_size}
            self.state.log.append(line)

    def save(self) -> TrainingResult:
        """Write the current adapter, completely or not at all, and remove the checkpoint.

        Raises:
            UsageError: No step has been run.
        """
        state = self.state
        if not state.step:
            raise UsageError(str(self._out), "no step was done, so there is nothing to save", "Call optim_step first")
        # Every process has to finish its last step before the first one writes.
        distributed.wait()
        if distributed.first():
            finished_folder.finish(
                self.config, self._spec, self.base, state, record=self._record, context=self._context, out=self._out,
                parents=self._parents, replace=self._replace,
            )  # fmt: skip
        report = self._meter.report(self._resolved_config, self._spec, self._device, context=self._context)
        if distributed.first():
            # Removed only now that the adapter is written: until then, the checkpoint is the only copy of the work.
            training_checkpoint.remove(self._path)
            self._on_event(SaveEvent(state.step, self._out))
        metrics = finished_folder.metrics(state)
        return TrainingResult(
            folder=self._out,
            steps=state.step,
            tokens=state.tokens,
            loss=metrics["train_loss"],
            perplexity_before=metrics.get("heldout_perplexity_before"),
            perplexity_after=metrics.get("heldout_perplexity"),
            report=report,
            kept_step=state.kept_step,
            accuracy_before=metrics.get("heldout_accuracy_before"),
            accuracy_after=metrics.get("heldout_accuracy"),
        )


def _check_start(start: InitialAdapter | None, config: TrainConfig) -> None:
    if start and config.preference.method == "dpo":
        problem = "continues an adapter, but dpo compares with the base alone"
        raise RefusedError(f"{config.location}: [preference] method", problem, "Merge the adapter into the base first")


def _with_supported_dtype(config: TrainConfig, device: Any) -> tuple[TrainConfig, list[str]]:
    """Return the config with the dtype that the device computes in, and notes about it."""
    dtype, notes = compute_device.supported_dtype(config.base.dtype, compute_device.capability(device))
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, dtype=dtype))
    return config, [*notes, *compute_device.dtype_notes(dtype, device)]


def _resolve_auto(config: TrainConfig, spec: BaseSpec, device: Any, *, force: bool) -> TrainConfig:
    """Return the config with each `auto` resolved; unless `force`, check first that it fits into memory."""
    free, card = compute_device.free(device), compute_device.memory(device)
    # The plan includes memory that is no longer free: on a card the CUDA context, on a CPU all that this process holds.
    allocated = memory.plan(config, spec, card=card).runtime if card is not None else compute_device.allocated_memory(device)
    is_fast = card is None and machine.multiplies_bfloat16_fast()
    resolved = budget.resolve_auto(config, spec, free=free, allocated=allocated, card=card, is_fast=is_fast)
    if not force and (misfit := budget.misfit(resolved, spec, free=free, allocated=allocated, card=card)):
        raise misfit
    return resolved


def _load_base(config: TrainConfig, files: BaseFiles, device: Any, on_event: OnEvent) -> Base:
    """Load the base with its layers, ready for steps."""
    base = load(
        files,
        config.base,
        config.lora,
        location=config.location,
        progress=lambda loaded, total: on_event(Loading(loaded, total)),
        entry=quantized_cache.entry_of(files, config.base, config.lora),
        device=device,
    )
    # Before blocks are compiled: the check runs them under another attention, too.
    notes = check_attention(base, config.data.sequence, compute_device.free(device), config.location, packed=config.data.pack)
    base = dataclasses.replace(base, notes=(*base.notes, *notes))
    if config.dequantized:
        dequantize(base.model, getattr(torch, config.base.dtype))
    if config.train.checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.train.compile:
        families.compile_blocks(base.model, config.location)
    return base


def _with_template(config: TrainConfig, tokenizer: Any, path: Path) -> tuple[TrainConfig, list[str]]:
    """Make `tokenizer` use the chat template, options and date of the config; return the config with its date, and any notes.

    A template that asks for a date gets the config's, else that of the checkpoint at `path`, else today's; a note says so.
    """
    prompt = data.configured_prompt(config, tokenizer)
    chat_template.apply(tokenizer, dataclasses.replace(prompt, date=None))
    if not chat_template.has_clock(tokenizer):
        return config, []
    date = prompt.date or training_checkpoint.date(path) or _today()
    chat_template.apply(tokenizer, dataclasses.replace(prompt, date=date))
    note = f"the chat template writes a date: {date}, in all conversations and in the record; [data] date sets it"
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date)), [note]


def _with_alpaca(config: TrainConfig, tokenizer: Any) -> TrainConfig:
    """Return the config with the template by its name, if it is the one that only the data asked for."""
    if config.data.chat_template is not None or not chat_template.is_alpaca(tokenizer):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template=chat_template.ALPACA))


def _check_rows(config: TrainConfig, base: Base, train_set: data.Dataset, heldout: data.Dataset | None) -> list[str]:
    """Return notes on the length of rows; raise RefusedError if the model lets documents that share a row see each other."""
    notes = families.check_length(base.model, config.data.sequence, config.location)
    hint = "Preferences need a model that does" if config.preference else "Set pack = false"
    check_isolation(base, [train_set.packed, *([heldout.packed] if heldout else [])], config.location, hint=hint)
    return notes


def _copy_initial(
    initial: adapter_transfer.Factors, config: TrainConfig, base: Base, weights: list[dict[str, Any]]
) -> list[str]:
    """Start from the factors of an adapter; return notes, if it was trained on other weights."""
    adapter_transfer.check_config(initial, config.lora, base.targets, config.location)
    adapter_transfer.copy_into_model(base, initial)
    return adapter_transfer.other_weights(initial, weights)


def _other_prompt(start: InitialAdapter, config: TrainConfig, tokenizer: Any, spec: BaseSpec) -> list[str]:
    """Return a note if the adapter to start from was trained to be asked in another form than the config sets."""
    prompt = data.configured_prompt(config, tokenizer).beside_base(spec.chat_template_digest)
    earlier = TrainedPrompt.read(start.path).beside_base(spec.chat_template_digest)
    differences = [
        *(["another chat template"] if prompt.template != earlier.template else []),
        *(["other options of the template"] if dict(prompt.options) != dict(earlier.options) else []),
        *([f"the date {earlier.date}"] if prompt.date and earlier.date and prompt.date != earlier.date else []),
    ]
    if not differences:
        return []
    return [f"{start.location} was trained with {' and '.join(differences)}; the result is asked as [data] sets it"]


def _today() -> str:
    return datetime.date.today().isoformat()


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
        rows=len(train_set.packed),
        steps=steps,
        memory=memory.plan(config, spec, card=compute_device.memory(base.device)),
        notes=notes,
        checkpointing=config.train.checkpointing is True,
        dequantized=config.dequantized,
    )


def _data_record(train_set: data.Dataset, heldout: data.Dataset | None) -> list[dict[str, Any]]:
    """Describe the data files for adapter.json, independently of the time and place of the training."""
    splits = [("train", train_set)] + ([("heldout", heldout)] if heldout else [])
    return [{**dataclasses.asdict(file), "split": split} for split, dataset in splits for file in dataset.files]


def _parents(start: InitialAdapter | None) -> list[dict[str, Any]]:
    """Return the parents of the adapter, for adapter.json."""
    if start is None:
        return []
    return [{"digest": start.digest, **({"ref": start.ref} if start.ref else {}), "method": adapter_transfer.METHOD}]
