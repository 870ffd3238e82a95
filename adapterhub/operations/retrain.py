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

from . import base_sources
from . import train as train_operation
from .rebuild import RebuildResult, version_to_rebuild
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.registry.registry import Registry
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
    from adapterhub.registry import adapter_recipe

    with version_to_rebuild(ref, workspace, out) as (registry, version, temporary):
        stored, location = temporary / "stored", str(version.ref)
        manifest = AdapterManifest.read(stored)
        training = _training_record(manifest, location)
        config = _config(training, location, base, data, _template(stored))
        _check_weights(training, location, base, workspace)
        start = _continued_ref(registry, manifest, location)
        target = Path(out) if out else temporary / "trained"
        train_operation.train(config, target, start=start, replace=replace, workspace=workspace)
        # The card and the log may have been edited since, and no runtime reads them.
        differences = [
            difference
            for difference in adapter_recipe.differences(stored, target)
            if determines_function(difference.name) or not (target / difference.name).is_file()
        ]
        return RebuildResult(version, tuple(differences))


def _training_record(manifest: AdapterManifest | None, location: str) -> Training:
    training = manifest.training if manifest else None
    if training is None or training.config is None or not training.data:
        raise RefusedError(location, "has no record of a training with its config and its data", "Train it anew")
    return training


def _template(stored: Path) -> Path | None:
    """Return the file of the chat template that a version was trained with; None if it is the base's."""
    path = stored / trained_prompt.FILE
    return path if path.is_file() else None


def _config(training: Training, location: str, base: StrPath, data: Sequence[StrPath], template: Path | None) -> TrainConfig:
    """Return the recorded config with the inputs at hand.

    A record is somebody else's: no file here is read by a path in it, and no tracker that it names is told anything.
    """
    from adapterhub.training import config_file
    from adapterhub.training.data import chat_template

    config = config_file.from_record(training.config or {}, folder=Path.cwd(), location=f"{location}: training.config")
    digests = {Path(file.path or "").name: file.digest for file in training.data or ()}
    files = {sha256_file(Path(file)): str(Path(file).absolute()) for file in data}

    def local_path(path: str) -> str:
        digest = digests.get(Path(path).name)
        if digest is None or digest not in files:
            problem = f"no file at hand has the digest of its data {Path(path).name[:80]!r}"
            raise RefusedError(location, f"{problem}, {digest or 'which is not recorded'}", "Pass that file")
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
        base=dataclasses.replace(config.base, path=str(Path(base).absolute())),
        data=dataclasses.replace(config.data, train=sources, heldout=heldout, chat_template=setting),
        train=dataclasses.replace(config.train, log_to=()),
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
