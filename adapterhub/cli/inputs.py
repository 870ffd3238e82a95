"""The SRC and BASE of a command, in the workspace of its options; see `operations.sources` and `operations.base_sources`."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.operations import base_sources, source_names, sources
from adapterhub.operations.source_names import existing_path, local_base_path
from adapterhub.operations.sources import Source, as_folder, link_or_copy, parent, relabel_errors, stored_form
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError

from . import output
from .options import Settings
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.operations.workspace import Workspace
    from adapterhub.ref import Ref
    from adapterhub_converters.bases import BaseSpec

__all__ = [
    "Source",
    "as_folder",
    "base_and_model",
    "base_name",
    "byte_count",
    "existing_path",
    "in_place",
    "is_elsewhere",
    "link_or_copy",
    "local_base_path",
    "open_source",
    "parent",
    "read_base",
    "recorded_base_option",
    "ref_of",
    "relabel_errors",
    "resolve",
    "stored_form",
    "weights",
]  # fmt: skip

is_elsewhere = source_names.is_address
_SIZE = safe_regex.Pattern(r"(?i)(\d{1,15}(?:\.\d{1,15})?) ?(?:([KMGT])(i?))?B?")


def byte_count(text: str, option: str) -> int:
    """Return the bytes of a size like 5GB, 500M or 24GiB; raise UsageError for any other text and for 0."""
    match = _SIZE.fullmatch(text.strip())
    power = " KMGT".index(match[2].upper()) if match and match[2] else 0
    if not match or not (count := int(float(match[1]) * (1024 if match[3] else 1000) ** power)):
        raise UsageError(option, f"{text[:80]!r} is not a size", "Write it like 5GB, 500MB or 24GiB")
    return count


def open_source(
    text: str, settings: Settings, *, notes: bool = True, for_report: bool = False
) -> AbstractContextManager[Source]:
    """Open what a SRC means, and print its notes, such as that a version is deprecated, unless `notes` is off.

    `for_report` is that of `sources.open_source`.
    """
    settings_workspace = workspace(settings)
    if not notes:
        settings_workspace = dataclasses.replace(settings_workspace, tell=lambda _: None)
    return sources.open_source(text, settings_workspace, for_report=for_report)


def in_place(text: str, settings: Settings) -> AbstractContextManager[Path]:
    """Open a SRC whose headers are to be read: the path of its files, not of copies (`sources.open_in_place`)."""
    return sources.open_in_place(text, workspace(settings))


def ref_of(text: str, settings: Settings) -> Ref | None:
    """Return the ref that a SRC is; None for a path or an address (`source_names.ref_of`)."""
    return source_names.ref_of(text, workspace(settings))


def resolve(text: str, settings: Settings) -> tuple[Path | None, Ref | None]:
    """Return the path or the ref that a SRC is (`source_names.resolve`)."""
    return source_names.resolve(text, workspace(settings))


def weights(text: str, settings: Settings) -> Path:
    """Return the path of a BASE on this disk, for a command that needs its weights (`base_sources.weights`)."""
    return base_sources.weights(text, workspace(settings))


def base_name(text: str, settings: Settings) -> str | None:
    """Return the name of the registered base that a BASE is; None for a path or an address."""
    return base_sources.registered_base_name(text, workspace(settings))


def read_base(text: str, settings: Settings, *, notes: bool = True) -> BaseSpec:
    """Read a BASE, and print how much was fetched, and its notes unless `notes` is off."""
    spec = base_sources.read_base(text, workspace(settings))
    if spec.fetched is not None:
        total = f" of {output.size(spec.size)}" if spec.size else ""
        output.say(f"read {output.size(spec.fetched)}{total} by range")
    for note in spec.notes if notes else ():
        output.say(output.one_line(f"note: {note} ({spec.source})"))
    return spec


def recorded_base_option(text: str, settings: Settings) -> str:
    """Return the base that a SRC records as a BASE that could be written, or FOLDER if it records none or cannot be read."""
    command_workspace = workspace(settings)
    try:
        with open_source(text, settings, notes=False, for_report=True) as source:
            base = base_sources.recorded_base(source)
        return base if base_sources.is_base(base, command_workspace) else f"hf://{base}, which {text} records"
    except AdapterhubError:
        return "FOLDER, its base model"


def is_local_base(text: str, settings: Settings) -> bool:
    """Return whether a text names a base on this machine; False for an address, which is taken for that of an adapter."""
    from adapterhub_converters import bases
    from adapterhub_converters.formats.candidate import Candidate

    if "://" in text or not base_sources.is_base(text, workspace(settings)):
        return False
    path = Path(text)
    if path.is_dir():
        return bases.is_model(path)
    return not path.exists() or Candidate.of(path).is_whole_model


def _is_adapter(path: Path) -> bool:
    """Return whether a path is the folder of an adapter, or its GGUF file."""
    from adapterhub_converters.adapter_files import ADAPTER_CONFIG
    from adapterhub_converters.formats.candidate import Candidate

    if path.is_dir():
        return (path / ADAPTER_CONFIG).is_file()
    return path.is_file() and (header := Candidate(path).gguf) is not None and header.text("general.type") == "adapter"


def _unknown_source_error(ref: Ref, settings_workspace: Workspace) -> NotFoundError:
    """Return the error for a text that is neither an adapter of the registry nor a base; it may be a model on the Hub."""
    try:
        with settings_workspace.open_registry() as registry:
            registry.resolve(ref)
    except NotFoundError as error:
        if "meant" in error.fields:
            return error
    hint = f"`adapterhub list` shows the adapters; write hf://{ref} for a model on the Hub"
    return NotFoundError(str(ref), "no adapter in the registry, and no base on this machine", hint, code="base-not-here")


def base_and_model(text: str, settings: Settings, *, may_be_path: bool = False) -> tuple[str, str]:
    """Return the base, and the `model` on it, of a text that names either a base, or adapters that record theirs.

    The `model` is empty for a base. Adapters are versions, or with `may_be_path` a folder or a file as well.

    Raises:
        UsageError: It is both, or the path of an adapter without `may_be_path`.
        NotFoundError: It is neither a version nor a base, or the base that the version records is not here.
        ParameterError: The first version records no base by name.
    """
    from adapterhub.serve import model_names

    settings_workspace = workspace(settings)
    if base_sources.is_base(text, settings_workspace):
        if not _is_adapter(Path(text)):
            return text, ""
        if not may_be_path:
            raise source_names.not_stored_error(text)
        return _recorded_base(text, settings), text
    try:
        ref = model_names.parse(text)[0].ref
    except UsageError:
        return text, ""  # the error for a missing base says what there may be
    if str(ref) == text and not source_names.is_stored(text, settings_workspace):
        raise _unknown_source_error(ref, settings_workspace)
    return _recorded_base(str(ref), settings), text


def _recorded_base(text: str, settings: Settings) -> str:
    """Return the base on this machine that an adapter records."""
    with open_source(text, settings, for_report=True) as source:
        return base_sources.recorded_base_here(source, workspace(settings))
