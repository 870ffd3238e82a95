"""A version for a runtime: pulled, verified, checked, converted or folded, and kept in a folder that never changes.

Whatever the runtime would ignore, scale differently or crash on is refused here, with the code that a check has for it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterhub import base_sources, runtime_commands, sources
from adapterhub.ref import Ref, RefError
from adapterhub.sharing import policy, pulling
from adapterhub.sharing.signatures import Named, wanted
from adapterhub.version import __version__
from adapterhub.workspace import StrPath, Workspace, user_folder
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    NotFoundError,
    ParameterError,
    RefusedError,
    UsageError,
)

from .names import is_whole
from .served import Made, Served, ServedFolder

if TYPE_CHECKING:
    from adapterhub.checks import Report
    from adapterhub.digest import Digest
    from adapterhub.remotes.location import Place
    from adapterhub.remotes.protocol import Connected
    from adapterhub_converters.bases import BaseSpec

NOT_APPLIED = "runtime"
"""The code, as that of a check, for an adapter that a runtime does not apply and whose problems have no code of their own."""
_GGUF = "adapter.gguf"
_KEY_DIGITS = 16
_SHOWN = 5  # problems of a code
_LONGEST = 200  # characters of a name in an error


@dataclass(frozen=True)
class _Version:
    """What is asked for: the ref it was resolved to, its name, its digest, and how to write its files into an empty folder."""

    ref: str
    name: str
    digest: Digest
    write: Callable[[Path], object]


def resolve(ref: str, *, runtime: str, base: StrPath | BaseSpec | None = None, workspace: Workspace | None = None) -> Served:
    """A version as a runtime reads it, in an immutable folder of the workspace's cache, with the flags that it is served with.

    Args:
        ref: A ref of the registry, or an address.
        runtime: `vllm`, `sglang`, `llama.cpp`, `mlx`, `peft` or `transformers`.
        base: The base model that it is served on. Without one, nothing is refused for not fitting it.
        workspace: Where names are looked up; its cache, or the user's own, has the folders.

    Raises:
        NotFoundError: There is no such version.
        RefusedError: The runtime would not apply it as it was trained: `code` is that of a check, `items` has the reasons. Or
            the policy does not allow it.
        LocalIOError: The disk is full; nothing is left behind.

    Example:
        >>> served = ah.resolve("team/sql", runtime="vllm", base="./tiny")
        >>> served.model == f"team/sql@{served.digest}", served.rank, served.flags[:3]
        (True, 2, ('--enable-lora', '--max-lora-rank', '8'))
    """
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.runtimes import RUNTIMES

    here = workspace or Workspace()
    if runtime not in RUNTIMES:
        raise ParameterError("runtime", f"unknown runtime {runtime!r}", f"Known runtimes: {', '.join(RUNTIMES)}")
    spec = base if base is None or isinstance(base, BaseSpec) else base_sources.read_base(base, here)
    version = _version(ref, here)
    folder, form = served_folder(here), f"{runtime}-{_key(runtime, spec)}"
    path, made = folder.find(version.digest, form) or folder.make(
        version.digest, form, partial(_make, version, runtime=runtime, base=spec)
    )
    return _served(version, runtime, path, made, spec)


def served_folder(workspace: Workspace) -> ServedFolder:
    """Where the served versions of a workspace are."""
    cache = user_folder("cache") if workspace.cache is None else Path(workspace.cache)
    return ServedFolder(cache.expanduser().absolute() / "served")


# ---- which version


def _version(text: str, workspace: Workspace) -> _Version:
    if sources.is_address(text):
        return _at_address(text, workspace)
    try:
        ref = Ref.parse(text)
    except RefError:
        if Path(text).exists():
            raise UsageError(text, "a path, and only versions are served", "Push it first") from None
        raise
    return _in_registry(ref, workspace)


def _in_registry(ref: Ref, workspace: Workspace) -> _Version:
    workspace.check_name(ref.name)
    with workspace.opened() as registry:
        version = registry.resolve(ref)
        policy.check_version(registry, version, Named.of(version, str(ref)), workspace)
    workspace.deprecated(version.ref, version.deprecated)
    pinned = f"{version.name}@{version.digest}"  # a tag may move meanwhile
    return _Version(str(version.ref), version.name, version.digest, lambda out: pulling.pull(pinned, out, workspace))


def _at_address(address: str, workspace: Workspace) -> _Version:
    from adapterhub.remotes.location import parse
    from adapterhub.remotes.parallel import Settled

    place = parse(address)
    workspace.check_name(place.repository)
    named, rules = Named.at(place, address), workspace.rules()
    if (rules and rules.needs_manifest) or wanted(named, workspace):
        with workspace.connect(place) as remote:
            settled = Settled(remote)
            policy.check_policy(settled, place.reference, named, workspace)
            digest = settled.manifest(place.reference).digest
    else:
        digest = digest_at(place, workspace)

    def write(out: Path) -> None:
        if pulling.pull(address, out, workspace).digest != digest:
            raise ConflictError(address, "moved while it was pulled", "Try again", code="changed-meanwhile")

    name = place.repository.partition("://")[2].removeprefix(f"{place.host}/")
    return _Version(str(place), name, digest, write)


def digest_at(
    place: Place, workspace: Workspace, connect: Callable[[Place], AbstractContextManager[Connected]] | None = None
) -> Digest:
    """The digest of the version at an address.

    A remote is asked for a whole digest as well, but once: it may have the version under another name, which is not for
    everybody who may read this one.

    Args:
        connect: Opens the remote; by default that of the workspace.

    Raises:
        NotFoundError: There is no such version under this name.
    """
    folder, name = served_folder(workspace), f"{place.owner} {place.repository}"
    if is_whole(place.digest) and folder.is_confirmed(name, str(place.digest)):
        return str(place.digest)
    with (connect or workspace.connect)(place) as remote:
        digest = remote.manifest(place.reference).digest
    folder.confirm(name, digest)
    return digest


def check_name(ref: Ref, place: Place, workspace: Workspace) -> None:
    """NotFoundError for a digest in an image layout to which no name of this adapter leads; a layout has it for all names."""
    from adapterhub.remotes.layouts.layout import Layout
    from adapterhub.remotes.location import is_layout

    if ref.digest is None or not is_layout(place.repository):
        return
    with workspace.connect(place) as remote:
        if isinstance(remote, Layout) and not any(found.startswith(ref.digest) for found in remote.digests(ref.name)):
            raise NotFoundError(str(ref), "no such version in this image layout")


def _key(runtime: str, base: BaseSpec | None) -> str:
    """A key of all that determines the folder of a version besides its bytes: our rules, and the base."""
    from adapterhub_converters.runtimes import RUNTIMES

    about: list[Any] = [__version__, RUNTIMES[runtime].version]
    if base is not None:
        about += [base.kind, base.architecture, base.tied, base.quantization, dict(base.config)]
        about += [sorted((name, one.shape) for name, one in tensors.items()) for tensors in (base.tensors, base.stored)]
        about += [sorted(base.packed), sorted(base.names), base.tokenizer_digest, base.chat_template_digest]
        about += _weight_files(base)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def _weight_files(base: BaseSpec) -> list[tuple[str, int, int]]:
    """The weights of a base on this disk, which a conversion may read, as far as their names, sizes and times tell."""
    paths = sorted(base.folder.glob("*.safetensors")) if base.folder else []
    return [(path.name, found.st_size, found.st_mtime_ns) for path in paths if (found := path.stat())]


# ---- what the runtime reads


def _make(version: _Version, folder: Path, *, runtime: str, base: BaseSpec | None) -> Made:
    """Write into an empty folder what the runtime reads of a version."""
    from adapterhub import checks
    from adapterhub_converters.adapter_files import adapter_in
    from adapterhub_converters.runtimes import RUNTIMES

    reads = RUNTIMES[runtime].reads
    notes: list[str] = [] if base else ["not compared with a base model"]
    with tempfile.TemporaryDirectory(prefix=".pulled-", dir=folder.parent) as temporary:
        pulled = Path(temporary) / version.name.rpartition("/")[2]
        with sources.naming(pulled, version.ref):
            pulled.mkdir()
            version.write(pulled)
            source = adapter_in(pulled)
            report = checks.check(source, base=base, limit=_SHOWN, where=version.ref)
            if runtime == "sglang":
                notes += _fold(source, folder, report, base)
            elif report.format == reads:
                _check_applied(report, runtime)
                _move(pulled, folder)
            else:
                _check_applied(report, runtime)
                notes += _convert(source, folder, reads, base)
    if report.format != reads or runtime == "sglang":
        report = checks.check(adapter_in(folder), base=base, limit=_SHOWN, where=version.ref)
        _check_applied(report, runtime)
    ranks, modules = cast("list[int]", report.facts["r"]), cast("list[str]", report.facts["targets"])
    rank = max(ranks, default=0)
    if runtime == "vllm" and runtime_commands.vllm_rank(rank) is None:
        what = f"vllm: refused: supports ranks up to {runtime_commands.VLLM_RANKS[-1]}, and a module has rank {rank}"
        raise RefusedError(version.ref, what, code="rank-above-max")
    conditions = report.verdicts[runtime].reasons
    file = str(adapter_in(folder).relative_to(folder)) if reads == "gguf" else ""
    return Made(rank, tuple(modules), tuple(dict.fromkeys((*notes, *conditions))), file)


def _move(pulled: Path, folder: Path) -> None:
    for path in sorted(pulled.iterdir()):
        path.rename(folder / path.name)


def _convert(source: Path, folder: Path, to: str, base: BaseSpec | None) -> list[str]:
    from adapterhub_converters.formats import convert

    report = convert.convert(source, folder / _GGUF if to == "gguf" else folder, to=to, base=base)
    counts = ", ".join(f"{count} {name}" for name, count in report.summary.items() if count)
    return [f"converted to {to}: {counts}", *report.notes]


def _fold(source: Path, folder: Path, report: Report, base: BaseSpec | None) -> list[str]:
    """Write a PEFT folder with one rank and one alpha."""
    from adapterhub_converters.formats import convert, peft

    try:
        folded = peft.folded(convert.read(source, base=base))
    except AdapterhubError:
        _check_applied(report, "sglang")  # the reason in the words of the runtime
        raise
    peft.write(folded, folder)
    return list(folded.notes)


def _check_applied(report: Report, runtime: str) -> None:
    """RefusedError unless the runtime applies the adapter as it was trained."""
    from adapterhub_converters.runtimes import APPLIED

    verdict = report.verdicts[runtime]
    if verdict.verdict == APPLIED:
        return
    code = next(iter(verdict.causes), NOT_APPLIED)
    what = ": ".join((runtime, verdict.verdict, *verdict.reasons[:1]))
    if problem := next((one for one in report.problems if one.code == code), None):
        what += f", such as {problem.name[:_LONGEST]}" if problem.name else f": {problem.what}"
    raise RefusedError(report.where, what, "", verdict.reasons, code=code, runtime=runtime, verdict=verdict.verdict)


# ---- how it is served


def _served(version: _Version, runtime: str, path: Path, made: Made, base: BaseSpec | None) -> Served:
    found = Served(
        version.ref, version.name, version.digest, runtime, path / made.file if made.file else path, made.rank, notes=made.notes
    )
    where = (str(base.folder) if base.folder else base.repo or base.where) if base else ""
    flags = runtime_commands.flags(runtime, found.model, str(found.path), rank=made.rank, modules=made.modules, base=where)
    return replace(found, flags=flags)
