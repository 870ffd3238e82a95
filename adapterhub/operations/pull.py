"""The pull of a version: its files into a folder, or converted into another format, all of them and verified, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.registry.signature_policy import LIMIT, is_about
from adapterhub_converters.errors import ParameterError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, signature_checks, source_names, sources
from .policy_checks import check_policy, check_version
from .signature_checks import NO_DEMAND, Demand, VersionNames
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.ref import Ref
    from adapterhub.registry.adapter_recipe import Conversion, ConversionFormat
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.parallel_transfer import PinnedSource
    from adapterhub.remotes.protocol import OpenRemote
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub.trust.bundle import SignedStatement
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True, repr=False)
class PullResult:
    """The files of an adapter, written and verified.

    Attributes:
        ref: The ref or address of its version.
        digest: The digest of its manifest.
        size: Bytes of its files.
        path: The folder or file that was written.
        files: Paths in the folder.
        new: False if the folder already had exactly these files.
        version: The version, if it came from the registry.
        manifest: The OCI manifest, if it came from an address.
        commit: The commit, if it came from a hub.
        loss: For a conversion, the number of tensors by outcome (`exact`, `rounded` …).
        cached: For a conversion, whether it was made earlier.
    """

    ref: str
    digest: Digest
    size: int
    path: Path
    files: tuple[str, ...] = ()
    new: bool = True
    version: Version | None = None
    manifest: Manifest | None = None
    commit: str = ""
    loss: dict[str, int] | None = None
    cached: bool = False

    def __repr__(self) -> str:
        return f"<PullResult {self.path}: {self.ref} {self.digest[:19]}, {self.size:,} bytes>"


def pull(
    source: str,
    out: StrPath | None = None,
    *,
    to: ConversionFormat | Conversion | None = None,
    base: base_sources.Base | None = None,
    model: str | None = None,
    name: str | None = None,
    replace: bool = False,
    demand: Demand = NO_DEMAND,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> PullResult:
    """Write the files of a version, all of them and verified, or nothing.

    A folder that is another version, unmodified and stored elsewhere, is replaced. A signature of the version comes along as
    `model.sig`, unverified unless one is required.

    Args:
        source: A ref of the registry, or an address.
        out: The folder or file to write; the name of the adapter if None.
        to: Write it in another format, of a version in the registry; a `Conversion` also has the options of the format.
        base: The model it is for, where the conversion needs more than its adapter.json has.
        model: The name of the base in Ollama; its path on this machine if None.
        name: The name of the version on a remote, which the policy checks in place of the address.
        replace: Replace an adapter with changes of your own, or a converted one.
        demand: Signatures to require.
        progress: Called with bytes done and bytes in all.
        workspace: The registry, the policy, credentials.

    Example:
        >>> ah.pull("team/sql:prod", "./out").files[0]
        'README.md'
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    out = source_names.output_path(out) if out else None
    spec, conversion = base_sources.base_spec(base, workspace), sources.as_conversion(to)
    if conversion is not None and conversion.to == "ollama":
        model = model or base_sources.local_path(spec)
    if source_names.is_address(source):
        if conversion is not None:
            raise ParameterError(
                "conversion", "only versions in the registry are converted", code="convert-there", address=source
            )
        return _pull_from_address(source, out, workspace, name=name, replace=replace, demand=demand)
    from adapterhub.ref import Ref

    ref = Ref.parse(source)
    workspace.check_name(ref.name)  # before asking whether there is such a version
    with workspace.open_registry() as registry:
        version = registry.resolve(ref)
        signed = check_version(registry, version, VersionNames.of_version(version, source), workspace, demand)
        pinned = Ref(version.name, digest=version.digest)  # a tag may move in the meantime
        if conversion is not None:
            # A signature covers this digest only, so that a signed version is converted by its digest.
            ref = pinned if signed else ref
            return _pull_converted(registry, ref, out, conversion, workspace, base=spec, model=model, replace=replace)
        target = Path(out) if out else Path(ref.name.rpartition("/")[2])
        layers = registry.files(version)
        is_new = _write_version(registry, version, pinned, target, workspace, replace=replace)
        # Read from the store itself: the modules of remotes would take longer to load than the pull.
        if signed is None and (stored := registry.store.signatures.read(version.digest, LIMIT)):
            manifest = registry.oci_manifest(version)
            signatures = [raw for raw in stored if is_about(raw, manifest)]
            signature_checks.write_carried(target, manifest, signatures, workspace)
    if signed:
        signature_checks.write(target, signed.raw)
    workspace.warn_if_deprecated(version.ref, version.deprecated)
    files = tuple(layer.path for layer in layers)
    return PullResult(str(version.ref), version.digest, version.size or 0, target, files, is_new, version=version)


def _pull_converted(
    registry: Registry,
    ref: Ref,
    out: StrPath | None,
    conversion: Conversion,
    workspace: Workspace,
    *,
    base: BaseSpec | None,
    model: str | None,
    replace: bool,
) -> PullResult:
    """Write a version of the registry in another format, where `pull` would write its files."""
    from adapterhub.registry import conversion_cache  # late, with numpy: a plain pull only copies
    from adapterhub_converters import formats

    suffix = formats.FORMATS[conversion.to].suffix if conversion.to in formats.FORMATS else ""
    target = Path(out) if out else Path(ref.name.rpartition("/")[2] + suffix)
    rules = workspace.within(registry).rules()
    converted = conversion_cache.pull(registry, ref, target, conversion, base=base, model=model, policy=rules, replace=replace)
    version = converted.version
    workspace.warn_if_deprecated(version.ref, version.deprecated)
    return PullResult(
        str(version.ref),
        version.digest,
        version.size or 0,
        target,
        version=version,
        loss=converted.loss,
        cached=converted.cached,
    )


def _write_version(
    registry: Registry, version: Version, pinned: Ref, target: Path, workspace: Workspace, *, replace: bool
) -> bool:
    """Write the files of a version, in place of those of another; return False if the folder already has exactly these."""
    from adapterhub.manifest import existing_folder

    existing = existing_folder.inspect_folder(target)
    if existing is not None:
        if existing.holds(registry.oci_manifest(version)):
            return False
        # What nothing else has a copy of is replaced only on request.
        if not replace:
            existing.check_lost(lambda digest: bool(registry.versions_with(digest)))
        workspace.tell(f"replaces {existing}")
    with workspace.bar("writing") as advance:
        registry.pull(pinned, target, advance, present=existing)
    return True


def _pull_from_address(
    source: str,
    out: StrPath | None,
    workspace: Workspace,
    *,
    name: str | None,
    replace: bool,
    demand: Demand,
) -> PullResult:
    with _settled_source(source, workspace, name=name, demand=demand) as (address, remote, settled, signed):
        target = Path(out) if out else Path(address.title)
        manifest, is_new = sources.download_version(
            settled, address.reference, target, address.host, workspace, replace=replace
        )
        if signed is None and is_new:  # what is there already takes one request
            signatures = signature_checks.carried_signatures(settled, manifest, workspace)
            signature_checks.write_carried(target, manifest, signatures, workspace)
        commit = workspace.tell_notes(remote)
    if signed:
        signature_checks.write(target, signed.raw)
    files = tuple(layer.path for layer in manifest.layers)
    return PullResult(str(address), manifest.digest, manifest.size, target, files, is_new, manifest=manifest, commit=commit)


@contextmanager
def _settled_source(
    source: str, workspace: Workspace, *, name: str | None, demand: Demand
) -> Iterator[tuple[RemoteAddress, OpenRemote, PinnedSource, SignedStatement | None]]:
    """Yield an address, its remote, the same with tags that stay, and the signature of a version that the policy allows."""
    from adapterhub.remotes.parallel_transfer import PinnedSource
    from adapterhub.remotes.remote_address import parse

    address = parse(source)
    workspace.check_name(name or address.repository)
    with workspace.connect(address) as remote:
        # The remote says once what the tag means, so that what was checked is what is downloaded.
        settled = PinnedSource(remote)
        names = VersionNames.of_address(address, name=name)
        yield address, remote, settled, check_policy(settled, address.reference, names, workspace, demand)


@dataclass(frozen=True)
class IncomingVersion:
    """A version that may be pulled: the title of its folder, its manifest, and whether a digest can be pulled again."""

    title: str
    manifest: Manifest
    is_elsewhere: Callable[[Digest], bool]


@contextmanager
def incoming_version(
    source: str, workspace: Workspace, *, name: str | None = None, demand: Demand = NO_DEMAND
) -> Iterator[IncomingVersion]:
    """Look up and check a version as `pull` does, whose arguments these are, and write nothing."""
    if source_names.is_address(source):
        from adapterhub.remotes.oci.adapter_image import UnpackedSource

        with _settled_source(source, workspace, name=name, demand=demand) as (address, remote, settled, _):
            manifest = UnpackedSource(settled).manifest(address.reference)
            workspace.tell_notes(remote)
            yield IncomingVersion(address.title, manifest, partial(sources.is_elsewhere, settled, workspace))
        return
    from adapterhub.ref import Ref

    ref = Ref.parse(source)
    workspace.check_name(ref.name)
    with workspace.open_registry() as registry:
        version = registry.resolve(ref)
        check_version(registry, version, VersionNames.of_version(version, source), workspace, demand)
        workspace.warn_if_deprecated(version.ref, version.deprecated)
        title = ref.name.rpartition("/")[2]
        yield IncomingVersion(title, registry.oci_manifest(version), lambda digest: bool(registry.versions_with(digest)))
