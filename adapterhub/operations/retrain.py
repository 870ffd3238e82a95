"""`rebuild` of a trained version: train again from its record, and compare the bytes, which checks the record.

The record has the config, the digests of data and base weights, and the versions of the software. The same inputs on the same
kind of machine with the same versions give the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import sha256_file
from adapterhub.manifest.document import AdapterManifest, Training
from adapterhub_converters import trained_prompt
from adapterhub_converters.adapter_files import determines_function
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, source_names
from . import train as train_operation
from .rebuild import RebuildResult, version_to_rebuild
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.registry.adapter_recipe import RebuildDifference
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.training import TrainConfig


def rebuild(
    ref: str,
    workspace: Workspace,
    *,
    base: StrPath,
    data: Sequence[StrPath],
    out: StrPath | None = None,
    replace: bool = False,
) -> RebuildResult:
    """Train a version again from its record, and compare its weights and its config with the stored ones.

    Args:
        ref: A version of the registry, which must also have the version that it continues, if any.
        workspace: The registry.
        base: The model that it was trained on, whose weights must have the recorded digests.
        data: The files of the training and the held-out data, by any names: they are matched by digest.
        out: A new folder for the adapter; None to keep nothing.
        replace: Replace an earlier output at `out`.

    Raises:
        RefusedError: There is no record of a training, or an input is not the recorded one. Nothing was trained.
    """
    path = source_names.output_path(out) if out else None
    with version_to_rebuild(ref, workspace, out) as (registry, version, temporary):
        stored = temporary / "stored"
        inputs = recorded_inputs(registry, version, stored, Inputs(base, data), workspace)
        target = path or temporary / "trained"
        train_operation.train(inputs.config, target, start=inputs.start, replace=replace, workspace=workspace)
        return RebuildResult(version, tuple(differences(stored, target)))


def differences(stored: Path, trained: Path) -> list[RebuildDifference]:
    """Return how the files that a runtime reads differ: the card and the log may have been edited since."""
    from adapterhub.registry import adapter_recipe

    return [
        difference
        for difference in adapter_recipe.differences(stored, trained)
        if determines_function(difference.name) or not (trained / difference.name).is_file()
    ]


@dataclass(frozen=True)
class Inputs:
    """The base and the data at hand."""

    base: StrPath
    data: Sequence[StrPath]


@dataclass(frozen=True)
class RecordedInputs:
    """What a training is repeated with.

    Attributes:
        training: Its record.
        config: The recorded config with the paths of the inputs at hand; it keeps no checkpoint.
        start: The ref of the version that it continued; None if it began from the base.
    """

    training: Training
    config: TrainConfig
    start: str | None


def recorded_inputs(registry: Registry, version: Version, stored: Path, inputs: Inputs, workspace: Workspace) -> RecordedInputs:
    """Return the inputs of the training of a version, whose files are in the folder `stored`; they have the recorded digests.

    Raises:
        RefusedError: There is no record of a training, or an input is not the recorded one.
    """
    manifest, location, base = AdapterManifest.read(stored), str(version.ref), inputs.base
    training = manifest.training if manifest else None
    if training is None or training.config is None or not training.data:
        raise RefusedError(location, "has no record of a training with its config and its data", "Train it anew")
    config = _config(training, location, inputs, _template(stored))
    _check_weights(training, location, base, workspace)
    return RecordedInputs(training, config, _continued_ref(registry, manifest, location))


def _template(stored: Path) -> Path | None:
    """Return the file of the chat template that a version was trained with; None if it is the base's."""
    path = stored / trained_prompt.FILE
    return path if path.is_file() else None


def _config(training: Training, location: str, inputs: Inputs, template: Path | None) -> TrainConfig:
    """Return the recorded config with the inputs at hand.

    A record is somebody else's: no file here is read by a path in it, and no tracker that it names is told anything.
    """
    from adapterhub.prompts import chat_template
    from adapterhub.training import config_file

    config = config_file.from_record(training.config or {}, folder=Path.cwd(), location=f"{location}: training.config")
    digests = {Path(file.path or "").name: file.digest for file in training.data or ()}
    files = {sha256_file(Path(file)): str(Path(file).absolute()) for file in inputs.data}

    def local_path(path: str) -> str:
        digest = digests.get(Path(path).name)
        if digest is None or digest not in files:
            problem = f"no file at hand has the digest of its data {Path(path).name[:80]!r}"
            raise RefusedError(location, f"{problem}, {digest or 'which is not recorded'}", "Pass that file", code="other-data")
        return files[digest]

    sources = tuple(
        local_path(source) if isinstance(source, str) else dataclasses.replace(source, path=local_path(source.path))
        for source in config.data.train
    )
    heldout = tuple(map(local_path, config.data.heldout))
    setting = config.data.chat_template
    if setting is not None and setting not in chat_template.NAMED:
        if template is None:
            raise RefusedError(location, "its record names a chat template, and it has none", "Train it anew")
        setting = str(template)
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, path=str(Path(inputs.base).absolute())),
        data=dataclasses.replace(config.data, train=sources, heldout=heldout, chat_template=setting),
        train=dataclasses.replace(config.train, log_to=(), keep_every=0),
    )


def _check_weights(training: Training, location: str, base: StrPath, workspace: Workspace) -> None:
    """Raise RefusedError unless the weights of the base have the recorded digests."""
    folder = base_sources.weights(base, workspace)
    local_files: Mapping[str, Path] = {path.name: path for path in (folder.iterdir() if folder.is_dir() else [folder])}
    for file in training.weights or ():
        if file.path not in local_files or sha256_file(local_files[file.path]) != file.digest:
            problem = f"was trained on a base whose {file.path[:80]} has the digest {file.digest[:19]}…, and {base} has another"
            raise RefusedError(location, problem, "Pass that base")


def _continued_ref(registry: Registry, manifest: AdapterManifest | None, location: str) -> str | None:
    """Return the ref of the version that the training continued; None if it began from the base."""
    parents = manifest.parents if manifest else ()
    if not parents:
        return None
    versions = registry.versions_with(parents[0].digest)
    if not versions:
        problem = f"continues {parents[0].ref or parents[0].digest}, which is not in the registry"
        raise RefusedError(location, problem, "Push or pull it here first")
    return str(versions[0].ref)
