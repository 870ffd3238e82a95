"""The way in of what was uploaded: a tree of blobs that is a whole adapter becomes a version, after the same checks as a push.

`registry.publish` decides, as for every other way in; the bytes are in the store already, hashed when they arrived, and are not
copied again. A tree without weights or without a config is no adapter yet: clients send the README first. What checks an
adapter needs numpy, which a hub that only serves does without: it is imported with the first push.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub.people.accounts import Namespace
from adapterhub.hub.workers import Worker
from adapterhub.index.queries import Row
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import Listing, check_file, check_names, check_paths
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.signatures import LIMIT
from adapterhub.registry.signatures import check as check_signed
from adapterhub.registry.versions import Version
from adapterhub.store.export import linked
from adapterhub.store.signatures import Sized, bounded
from adapterhub.store.store import Store
from adapterhub.trust.bundle import MEDIA_TYPE
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, HEAD, is_weights
from adapterhub_converters.errors import AdapterhubError, RefusedError

_EMPTY = sha256_bytes(b"{}")  # the config of an attachment

Files = Mapping[str, tuple[Digest, int]]
"""Path to digest and size in bytes."""


def is_whole(files: Files) -> bool:
    """Return True for a tree that has an adapter: weights of its own kind, and a config unless these have it in themselves."""
    weights = [path for path in files if is_weights(path) and "/" not in path]
    return bool(weights) and (ADAPTER_CONFIG in files or any(path.endswith(".gguf") for path in weights))


def is_adapter(store: Store, files: Files) -> bool:
    """Return True for files that are meant as an adapter, good or not; False for those of a whole model, or of anything."""
    if ADAPTER_JSON in files or (ADAPTER_CONFIG in files and is_whole(files)):
        return True
    return any(_is_gguf_adapter(store, *file) for path, file in files.items() if path.endswith(".gguf") and "/" not in path)


def _is_gguf_adapter(store: Store, digest: Digest, size: int) -> bool:
    from adapterhub_converters.formats.candidate import Candidate

    with linked(store, [Descriptor("", digest, size, "adapter.gguf")]) as folder:
        header = Candidate(folder / "adapter.gguf").gguf
        return header is not None and header.text("general.type") == "adapter"


def check_tree(files: Files, where: str) -> None:
    """Refuse names that no file of an adapter may have, before a tree is kept."""
    check_paths(sorted(files), where, RefusedError)
    check_names(files, where)


def check_contents(store: Store, files: Files, where: str) -> None:
    """Refuse pickles and archives, by their first bytes, whatever their names are."""
    for path, (digest, _) in files.items():
        with store.open_blob(digest) as blob:
            check_file(path, blob.read(HEAD), where)


def check_attached(settled: Namespace, where: str, *, attached: bool) -> None:
    """Refuse a manifest that is no adapter in a namespace for adapters only, unless it is attached to one of its repository."""
    if settled.adapters_only and not attached:
        what = f"the namespace {settled.name} is for adapters only, and this manifest has no adapter_config.json and weights"
        raise RefusedError(where, what, "Push it to another namespace, or attach it to an adapter here")


def attached_signatures(worker: Worker, name: str, digest: Digest) -> list[bytes]:
    """Return the signatures that are attached to a manifest of a repository, be that there yet or not; none is verified."""
    state = worker.repositories.get(name)
    attached = [one for one in (state.manifests.values() if state else ()) if one.subject == digest]

    def sized() -> Iterator[Sized]:
        store = worker.registry.store
        for blob in (blob for one in attached if one.artifact_type == MEDIA_TYPE for blob in one.blobs if blob != _EMPTY):
            with contextlib.suppress(AdapterhubError):
                if (size := store.size(blob)) is not None and size < LIMIT:
                    yield size, partial(store.read_document, blob, limit=LIMIT)

    return bounded(sized())


def publish_tree(
    registry: Registry,
    name: str,
    files: Files,
    *,
    tags: tuple[str, ...] | None = None,
    expect: Digest | None = None,
    policy: Policy | None = None,
    signatures: Callable[[Digest], Sequence[bytes]] = lambda _: (),
    message: str = "",
) -> Version:
    """Check a tree as a push would, derive its adapter.json, and store it as a version of `name`.

    Args:
        registry: Has the blobs.
        name: The adapter's name.
        files: The tree; its adapter.json is kept if it is true, else derived anew.
        tags: Tags to move; None for those of a push.
        expect: As in `Registry.push`.
        policy: The hub's.
        signatures: Returns those of a manifest, for a policy that requires them.
        message: Why, for the log.

    Raises:
        RefusedError: The check finds errors, or the policy does not allow the adapter.
    """
    from adapterhub.registry import publish

    if policy is not None:
        policy.check_name(name)
    with _folder(registry, files, name) as folder, _named(folder, name):
        package = publish.package(folder, where=name, policy=policy, listed=Listing(tuple(sorted(files))))
        settled = {path: file for path, file in files.items() if path != ADAPTER_JSON}
        manifest, raw = package.draft.settle(settled)
        with registry.store.lease("push"):
            settled[ADAPTER_JSON] = registry.store.put_bytes(raw)
            made = oci_manifest.assemble(settled, manifest)
            check_signed(policy, made, lambda: signatures(made.digest), name=name, where=name)
            registry.store.put_bytes(made.config_bytes)
            registry.store.put_bytes(made.raw)
            registry.store.sync_blobs()
            return registry.admit(made, Ref(name), expect=expect, tags=tags, message=message)


def publish_manifest(
    registry: Registry,
    name: str,
    made: Manifest,
    *,
    tags: tuple[str, ...] | None = None,
    expect: Digest | None = None,
    policy: Policy | None = None,
    signatures: Callable[[Digest], Sequence[bytes]] = lambda _: (),
    message: str = "",
) -> Version:
    """Check the files of a manifest that somebody else packaged, and store it, byte for byte, as a version of `name`.

    The arguments are those of `publish_tree`.

    Raises:
        RefusedError: The check finds errors, or the policy does not allow the adapter.
        IntegrityError: A blob is missing, or its adapter.json is not about its files.
    """
    from adapterhub.registry import publish

    if policy is not None:
        policy.check_name(name)
    check_signed(policy, made, lambda: signatures(made.digest), name=name, where=name)
    files = {layer.path: (layer.digest, layer.size) for layer in made.layers}
    with _folder(registry, files, name) as folder, _named(folder, name), registry.store.lease("push"):
        publish.check_listed(registry.store, made, name)
        publish.check_received(folder, made, where=name, policy=policy)
        registry.store.put_bytes(made.raw)
        registry.store.sync_blobs()
        return registry.admit(made, Ref(name), expect=expect, tags=tags, message=message)


def check_released(worker: Worker, policy: Policy, row: Row) -> None:
    """Compare a version with the hub's policy before it is given out: that may have become stricter since the version came.

    Raises:
        RefusedError: The policy does not allow it.
    """
    from adapterhub.registry import publish

    where = str(row.ref)
    policy.check_name(row.name)
    digest = worker.registry.row(Ref(row.name, number=row.number)).digest  # `row` may be a form of the version
    made = oci_manifest.parse(worker.registry.store.read_document(digest), where)
    known, metrics = worker.registry.adapter_manifest(digest), worker.registry.metrics(digest)
    publish.check_manifest(policy, known, where, size=made.files_size, metrics=metrics)
    check_signed(policy, made, lambda: attached_signatures(worker, row.name, digest), name=row.name, where=where)


@contextlib.contextmanager
def _folder(registry: Registry, files: Files, name: str) -> Iterator[Path]:
    """A folder in which the blobs have the names of the files, below a folder with the adapter's own name."""
    check_tree(files, name)
    check_contents(registry.store, files, name)
    layers = [Descriptor("", digest, size, path) for path, (digest, size) in files.items()]
    with linked(registry.store, layers) as folder:
        yield folder


@contextlib.contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Name the repository, not a temporary folder, in errors."""
    try:
        yield
    except AdapterhubError as error:
        for shown in (str(folder), folder.name):
            error.where = error.where.replace(shown, name)
            error.what = error.what.replace(shown, name)
        raise
