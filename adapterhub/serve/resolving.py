"""The preparation of a version for a runtime: pulled, verified, checked, converted or folded, in a folder that never changes.

Anything that the runtime would ignore, scale differently or crash on is refused here, with the error code of the check.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterhub.http.http_errors import DeniedError
from adapterhub.operations import base_sources, policy_checks, pull, source_names, sources
from adapterhub.operations.signature_checks import VersionNames, needs_signature
from adapterhub.operations.workspace import StrPath, Workspace, user_folder
from adapterhub.ref import Ref, RefError
from adapterhub.registry import withdrawals
from adapterhub.version import __version__
from adapterhub_converters import runtime_commands
from adapterhub_converters.bases import base_prompts
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    NotFoundError,
    ParameterError,
    RefusedError,
    RemoteError,
)
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import CLOCK, TrainedPrompt

from .model_names import is_full_digest
from .prepared_versions import FolderRecord, PreparedVersion, ServedFolder

if TYPE_CHECKING:
    from adapterhub.checks import Report
    from adapterhub.digest import Digest
    from adapterhub.remotes.protocol import OpenRemote
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.runtime_rules import RuntimeName

NOT_APPLIED = "runtime"
"""The error code for an adapter that a runtime does not apply and whose problems have no code of their own."""
_GGUF = "adapter.gguf"
_KEY_DIGITS = 16
_MAX_PROBLEMS = 5  # of each code
_MAX_NAME = 200  # characters of a name in an error


@dataclass(frozen=True)
class _ResolvedVersion:
    """A version to prepare: its resolved ref, its name, its digest, and a function that writes its files into a folder."""

    ref: str
    name: str
    digest: Digest
    write: Callable[[Path], object]


def resolve(
    ref: str, *, runtime: RuntimeName, base: StrPath | BaseSpec | None = None, workspace: Workspace | None = None
) -> PreparedVersion:
    """Prepare a version for a runtime, in an immutable folder of the workspace's cache, with the flags to serve it with.

    Args:
        ref: A ref of the registry, or an address.
        runtime: `vllm`, `sglang`, `llama.cpp`, `mlx`, `peft` or `transformers`.
        base: The base model that it is served on. Without one, nothing is refused for not fitting it.
        workspace: Where names are looked up; the folders are in its cache, or the user's own.

    Raises:
        NotFoundError: There is no such version.
        RefusedError: The runtime would not apply it as it was trained: `code` is that of a check, `items` has the reasons. Or
            the policy forbids it.
        LocalIOError: The disk is full; nothing is left behind.

    Example:
        >>> served = ah.resolve("team/sql", runtime="vllm", base="./tiny")
        >>> served.model == f"team/sql@{served.digest}", served.rank, served.flags[:3]
        (True, 2, ('--enable-lora', '--max-lora-rank', '8'))
    """
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.runtime_rules import RUNTIMES

    chosen_workspace = workspace or Workspace()
    if runtime not in RUNTIMES:
        raise ParameterError("runtime", f"unknown runtime {runtime!r}", f"Known runtimes: {', '.join(RUNTIMES)}")
    spec = base if base is None or isinstance(base, BaseSpec) else base_sources.read_base(base, chosen_workspace)
    version = _resolve_version(ref, chosen_workspace)
    folder, form = served_folder(chosen_workspace), f"{runtime}-{_folder_key(runtime, spec)}"
    path, record = folder.find(version.digest, form) or folder.make(
        version.digest, form, partial(_prepare, version, runtime=runtime, base=spec)
    )
    return _with_flags(version, runtime, path, record, spec)


def served_folder(workspace: Workspace) -> ServedFolder:
    """Return the folder of a workspace's prepared versions."""
    cache = user_folder("cache") if workspace.cache is None else Path(workspace.cache)
    return ServedFolder(cache.expanduser().absolute() / "served")


# ---- resolving the version


def _resolve_version(text: str, workspace: Workspace) -> _ResolvedVersion:
    """Resolve a ref or an address to a version."""
    if source_names.is_address(text):
        return _version_at_address(text, workspace)
    try:
        ref = Ref.parse(text)
    except RefError:
        if Path(text).exists():
            raise source_names.not_stored_error(text, "a path, and only versions are served") from None
        raise
    return _version_in_registry(ref, workspace)


def _version_in_registry(ref: Ref, workspace: Workspace) -> _ResolvedVersion:
    """Resolve a ref of the registry, and check the version against the policy."""
    workspace.check_name(ref.name)
    with workspace.open_registry() as registry:
        version = registry.resolve(ref)
        policy_checks.check_version(registry, version, VersionNames.of_version(version, str(ref)), workspace)
    workspace.warn_if_deprecated(version.ref, version.deprecated)
    pinned = f"{version.name}@{version.digest}"  # a tag may move in the meantime
    return _ResolvedVersion(
        str(version.ref), version.name, version.digest, lambda out: pull.pull(pinned, out, workspace=workspace)
    )


def _version_at_address(address: str, workspace: Workspace) -> _ResolvedVersion:
    """Resolve an address, and check the version against the policy."""
    from adapterhub.remotes.parallel_transfer import PinnedSource
    from adapterhub.remotes.remote_address import parse

    place = parse(address)
    workspace.check_name(place.repository)
    version_names, rules = VersionNames.of_address(place, address), workspace.rules()
    if (rules and rules.needs_manifest) or needs_signature(version_names, workspace):
        with workspace.connect(place) as remote:
            settled = PinnedSource(remote)
            policy_checks.check_policy(settled, place.reference, version_names, workspace)
            digest = settled.manifest(place.reference).digest
    else:
        try:
            digest = digest_at(place, workspace)
        except RemoteError as error:
            if isinstance(error, DeniedError) or not (known_digest := confirmed_digest(place, workspace)):
                raise
            digest = known_digest

    def write(out: Path) -> None:
        """Pull the version; ConflictError if the tag has moved since it was resolved."""
        if pull.pull(address, out, workspace=workspace).digest != digest:
            raise ConflictError(address, "moved while it was pulled", "Try again", code="changed-meanwhile")

    name = place.repository.partition("://")[2].removeprefix(f"{place.host}/")
    return _ResolvedVersion(str(place), name, digest, write)


def digest_at(
    place: RemoteAddress,
    workspace: Workspace,
    connect: Callable[[RemoteAddress], AbstractContextManager[OpenRemote]] | None = None,
) -> Digest:
    """Return the digest of the version at an address.

    The remote is asked for a full digest, too: it may have the version only under another name, whose readers are not
    necessarily those of this name, and it may have removed it, or closed it to this account.

    Args:
        connect: Opens the remote; by default with the workspace's settings.

    Raises:
        NotFoundError: There is no such version under this name.
        RefusedError: It was withdrawn.
        RemoteError: The remote does not answer, or does not let this account read the version.
    """
    folder, name = served_folder(workspace), _confirmed_name(place)
    try:
        with (connect or workspace.connect)(place) as remote:
            digest = remote.resolve(place.reference)
    except (NotFoundError, DeniedError, RefusedError) as error:
        is_answer = not isinstance(error, RefusedError) or error.code == withdrawals.CODE
        if is_answer and is_full_digest(place.digest):
            folder.revoke(name, str(place.digest))
        raise
    folder.confirm(name, digest)
    return digest


def confirmed_digest(place: RemoteAddress, workspace: Workspace) -> Digest | None:
    """Return the digest in an address, for a remote that does not answer, if it has confirmed that before; else None."""
    is_confirmed = is_full_digest(place.digest) and served_folder(workspace).is_confirmed(
        _confirmed_name(place), str(place.digest)
    )
    return str(place.digest) if is_confirmed else None


def _confirmed_name(place: RemoteAddress) -> str:
    """Return the name under which a remote has a version, with the remote's owner."""
    return f"{place.owner} {place.repository}"


def check_name(ref: Ref, place: RemoteAddress, workspace: Workspace) -> None:
    """Raise NotFoundError for a digest in an image layout that has it under other names only; a layout shares its blobs."""
    from adapterhub.remotes.address_schemes import is_layout
    from adapterhub.remotes.layouts.image_layout import Layout

    if ref.digest is None or not is_layout(place.repository):
        return
    with workspace.connect(place) as remote:
        if isinstance(remote, Layout) and not any(
            digest.startswith(ref.digest) for digest in remote.digests_of_adapter(ref.name)
        ):
            raise NotFoundError(str(ref), "no such version in this image layout")


def _folder_key(runtime: str, base: BaseSpec | None) -> str:
    """Return a key of everything besides a version's bytes that determines its folder: our rules, and the base."""
    from adapterhub_converters.runtime_rules import RUNTIMES

    # A new version of adapterhub or of the runtime's rules may convert or check differently.
    inputs: list[Any] = [__version__, RUNTIMES[runtime].version]
    if base is not None:
        inputs += [base.kind, base.architecture, base.tied, base.quantization, dict(base.config)]
        inputs += [sorted((name, tensor.shape) for name, tensor in tensors.items()) for tensors in (base.tensors, base.stored)]
        inputs += [sorted(base.packed), sorted(base.names), base.tokenizer_digest, base.chat_template_digest]
        inputs += _weight_files(base)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def _weight_files(base: BaseSpec) -> list[tuple[str, int, int]]:
    """Return the names, sizes and times of a base's weight files on this disk, which a conversion may read."""
    paths = sorted(base.folder.glob("*.safetensors")) if base.folder else []
    return [(path.name, status.st_size, status.st_mtime_ns) for path in paths if (status := path.stat())]


# ---- preparing the folder


def _prepare(version: _ResolvedVersion, folder: Path, *, runtime: str, base: BaseSpec | None) -> FolderRecord:
    """Write what the runtime reads of a version into an empty folder."""
    from adapterhub import checks
    from adapterhub_converters.adapter_files import resolve_adapter
    from adapterhub_converters.runtime_rules import RUNTIMES

    reads = RUNTIMES[runtime].format
    notes: list[str] = [] if base else ["not compared with a base model"]
    # Next to the folder, on the same disk, so that files can be moved instead of copied.
    with tempfile.TemporaryDirectory(prefix=".pulled-", dir=folder.parent) as temporary:
        pulled = Path(temporary) / version.name.rpartition("/")[2]
        with sources.relabel_errors(pulled, version.ref):
            pulled.mkdir()
            version.write(pulled)
            source = resolve_adapter(pulled)
            prompt = _own_prompt(source, base)
            report = checks.check(source, base=base, limit=_MAX_PROBLEMS, display_name=version.ref)
            # SGLang applies one rank and one alpha per adapter, so every version is folded for it.
            if runtime == "sglang":
                notes += _fold(source, folder, report, base)
            elif report.format == reads:
                _check_applied(report, runtime)
                _move(pulled, folder)
            else:
                _check_applied(report, runtime)
                notes += _convert(source, folder, reads, base)
    # What was converted or folded is checked again, in the form that the runtime reads.
    if report.format != reads or runtime == "sglang":
        report = checks.check(resolve_adapter(folder), base=base, limit=_MAX_PROBLEMS, display_name=version.ref)
        _check_applied(report, runtime)
    ranks, modules = cast("list[int]", report.facts["r"]), cast("list[str]", report.facts["targets"])
    rank = max(ranks, default=0)
    # vLLM allocates for one of a few ranks, the largest of which is a hard limit.
    if runtime == "vllm" and runtime_commands.vllm_rank(rank) is None:
        problem = f"vllm: refused: supports ranks up to {runtime_commands.VLLM_RANKS[-1]}, and a module has rank {rank}"
        raise RefusedError(version.ref, problem, code="rank-above-max")
    conditions = report.verdicts[runtime].reasons
    file = str(resolve_adapter(folder).relative_to(folder)) if reads == "gguf" else ""
    return FolderRecord(rank, tuple(modules), tuple(dict.fromkeys((*notes, *conditions))), file, prompt)


def _own_prompt(source: Path, base: BaseSpec | None) -> TrainedPrompt:
    """Return the prompt of an adapter as far as it differs from that of its base, whose template trainers store with it."""
    prompt = TrainedPrompt.read(source).beside_base(base.chat_template_digest if base is not None else None)
    template = prompt.template
    if template is None and prompt.date and base is not None and (base_prompt := base_prompts.of_spec(base)):
        template = base_prompt.template or ""
    # A date counts only if the template writes one.
    return prompt if template is None or CLOCK in template else replace(prompt, date=None)


def _move(pulled: Path, folder: Path) -> None:
    """Move all files of a pulled version into the folder."""
    for path in sorted(pulled.iterdir()):
        path.rename(folder / path.name)


def _convert(source: Path, folder: Path, to: str, base: BaseSpec | None) -> list[str]:
    """Convert an adapter into the format that the runtime reads, and return the notes."""
    from adapterhub_converters.formats import convert

    report = convert.convert(source, folder / _GGUF if to == "gguf" else folder, to=to, base=base)
    counts = ", ".join(f"{count} {name}" for name, count in report.summary.items() if count)
    return [f"converted to {to}: {counts}", *report.notes]


def _fold(source: Path, folder: Path, report: Report, base: BaseSpec | None) -> list[str]:
    """Write a PEFT folder with one rank and one alpha, which is all that SGLang applies, and return the notes."""
    from adapterhub_converters.formats import convert, peft
    from adapterhub_converters.formats.peft.one_scale import with_one_scale

    try:
        folded = with_one_scale(convert.read(source, base=base))
    except AdapterhubError:
        _check_applied(report, "sglang")  # gives the reason in terms of the runtime
        raise
    peft.write(folded, folder)
    return list(folded.notes)


def _check_applied(report: Report, runtime: str) -> None:
    """Raise RefusedError unless the runtime applies the adapter as it was trained, as far as its rules tell."""
    from adapterhub_converters.runtime_rules import APPLIED, UNKNOWN

    verdict = report.verdicts[runtime]
    # A model in none of its lists is one that the engine runs all the same: it answers for itself.
    if verdict.verdict == APPLIED or (verdict.verdict == UNKNOWN and not verdict.causes):
        return
    code = next(iter(verdict.causes), NOT_APPLIED)
    message = ": ".join((runtime, verdict.verdict, *verdict.reasons[:1]))
    if problem := next((candidate for candidate in report.problems if candidate.code == code), None):
        message += f", such as {problem.name[:_MAX_NAME]}" if problem.name else f": {problem.what}"
    raise RefusedError(report.where, message, "", verdict.reasons, code=code, runtime=runtime, verdict=verdict.verdict)


# ---- how to serve it


def _with_flags(
    version: _ResolvedVersion, runtime: str, path: Path, record: FolderRecord, base: BaseSpec | None
) -> PreparedVersion:
    """Return the prepared version with the flags that the runtime needs."""
    served = PreparedVersion(
        version.ref,
        version.name,
        version.digest,
        runtime,
        path / record.file if record.file else path,
        record.rank,
        notes=record.notes,
        prompt=record.prompt,
    )
    base_name = (str(base.folder) if base.folder else base.repo or base.source) if base else ""
    flags = runtime_commands.flags(
        runtime, served.model, str(served.path), rank=record.rank, modules=record.modules, base=base_name
    )
    return replace(served, flags=flags)
