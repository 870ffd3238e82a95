"""Publish uploads: a tree of blobs that is a complete adapter becomes a version, after the same checks as a push.

`Registry.publish` decides, as for every other push; the bytes are in the store already, hashed on arrival, and are not copied
again. A tree without weights or without a config is not an adapter yet: clients send the README first. The checks need numpy,
which a hub that only serves does without: they are imported with the first push.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.workers import Worker
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, Descriptor, Manifest
from adapterhub.manifest.package_files import SIGNATURE, Listing, check_file, check_names, check_paths
from adapterhub.project.policy import Policy
from adapterhub.project.policy_rules import VersionFacts
from adapterhub.ref import Ref
from adapterhub.registry.moves import latest_tags
from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_documents import OtherManifest, with_manifest
from adapterhub.registry.signature_policy import LIMIT, is_about
from adapterhub.registry.signature_policy import check as check_signed
from adapterhub.registry.version_facts import first_problem, read_parent, stored_facts
from adapterhub.registry.version_lookup import Version
from adapterhub.remotes.oci import referrers
from adapterhub.store.export import linked_folder
from adapterhub.store.signature_files import Sized, read_bounded
from adapterhub.store.store import Store
from adapterhub.trust import cosign
from adapterhub.trust.bundle import MEDIA_TYPE, attachment_annotations
from adapterhub_converters.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_JSON,
    HEAD_SIZE,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    is_weights,
)
from adapterhub_converters.containers import open_file
from adapterhub_converters.errors import AdapterhubError, RefusedError

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers saves adapters (`diffusers/loaders/lora_base.py`, `LORA_WEIGHT_NAME_SAFE`)."""
_MAX_HEADER = 16 << 20  # bytes of the header of weights
NO_FILES: Mapping[Digest, Path] = {}
_EMPTY_CONFIG = sha256_bytes(b"{}")  # the empty config of an attached manifest

Files = Mapping[str, tuple[Digest, int]]
"""Path to digest and size in bytes."""


def is_whole(store: Store, files: Files, staged: Mapping[Digest, Path] = NO_FILES) -> bool:
    """Return whether a tree has a complete adapter: as its names say, or as a reader of single files recognizes its weights.

    Diffusers and trainers of image models write one safetensors file that says everything, under any name.
    """
    weights = [path for path in files if is_weights(path) and "/" not in path]
    if is_whole_by_name(files) or len(weights) != 1 or weights[0] in (PEFT_WEIGHTS, MLX_WEIGHTS):
        return is_whole_by_name(files)
    return _is_self_contained(store, *files[weights[0]], staged)


def is_whole_by_name(files: Files) -> bool:
    """Return whether a tree has weights at the top, and a config unless GGUF or diffusers' weights include it."""
    weights = [path for path in files if is_weights(path) and "/" not in path]
    includes_config = weights == [DIFFUSERS_WEIGHTS] or any(path.endswith(".gguf") for path in weights)
    return bool(weights) and (ADAPTER_CONFIG in files or includes_config)


def _is_self_contained(store: Store, digest: Digest, size: int, staged: Mapping[Digest, Path]) -> bool:
    """Return whether a format of single files claims some safetensors weights, of which only the header is read."""
    from adapterhub_converters import formats
    from adapterhub_converters.formats.convert import sniff

    opened = open_file.open_regular(staged[digest]) if digest in staged else store.open_blob(digest)
    with opened as file:
        raw = file.read(8)
        # The length is a claim of the file.
        if (length := int.from_bytes(raw, "little")) > min(_MAX_HEADER, size):
            return False
        while len(raw) < 8 + length and (piece := file.read(8 + length - len(raw))):
            raw += piece
    with tempfile.NamedTemporaryFile(prefix="adapterhub-", suffix=".safetensors") as header:
        header.write(raw)
        header.truncate(size)  # a hole in place of the tensors: a reader of headers compares the sizes
        header.flush()
        try:
            row = formats.FORMATS.get(sniff(Path(header.name)))
        except AdapterhubError:
            return False
    # Files that may lack the alpha come with another file of their trainer.
    return row is not None and not row.alpha and not row.files


def is_adapter(store: Store, files: Files) -> bool:
    """Return whether files are meant as an adapter, valid or not, rather than a whole model or anything else."""
    if ADAPTER_JSON in files or (ADAPTER_CONFIG in files and is_whole_by_name(files)):
        return True
    if not any(path.endswith(".gguf") for path in files) and is_whole(store, files):
        return True
    return any(_is_gguf_adapter(store, *file) for path, file in files.items() if path.endswith(".gguf") and "/" not in path)


def _is_gguf_adapter(store: Store, digest: Digest, size: int) -> bool:
    from adapterhub_converters.formats.candidate import Candidate

    with linked_folder(store, [Descriptor("", digest, size, "adapter.gguf")]) as folder:
        header = Candidate(folder / "adapter.gguf").gguf
        return header is not None and header.text("general.type") == "adapter"


def check_tree(files: Files, location: str) -> None:
    """Refuse names that no file of an adapter may have, before a tree is recorded."""
    check_paths(sorted(files), location, RefusedError)
    check_names(files, location)


def check_contents(store: Store, files: Files, location: str, staged: Mapping[Digest, Path] = NO_FILES) -> None:
    """Refuse pickles and archives by their first bytes, whatever their names; `staged` are files that are no blobs yet."""
    for path, (digest, _) in files.items():
        opened = open_file.open_regular(staged[digest]) if digest in staged else store.open_blob(digest)
        with opened as file:
            check_file(path, file.read(HEAD_SIZE), location)


def check_attached(namespace: Namespace, location: str, *, attached: bool) -> None:
    """Refuse a manifest that is not an adapter in an adapters-only namespace, unless attached to one in its repository."""
    if namespace.adapters_only and not attached:
        problem = (
            f"the namespace {namespace.name} is for adapters only, and this manifest has no adapter_config.json and weights"
        )
        raise RefusedError(location, problem, "Push it to another namespace, or attach it to an adapter here")


def attached_signatures(worker: Worker, name: str, digest: Digest) -> list[bytes]:
    """Return the signatures attached to a manifest of a repository, whether it has arrived or not. None of them is verified."""
    state, store = worker.repositories.get(name), worker.registry.store
    attached = {key: manifest for key, manifest in (state.manifests if state else {}).items() if manifest.subject == digest}

    def bundles() -> Iterator[Sized]:
        for blob in (
            blob
            for manifest in attached.values()
            if manifest.artifact_type == MEDIA_TYPE
            for blob in manifest.blobs
            if blob != _EMPTY_CONFIG
        ):
            with contextlib.suppress(AdapterhubError):
                if (size := store.size(blob)) is not None and size < LIMIT:
                    yield size, partial(store.read_document, blob, limit=LIMIT)
        tagged = [state.tags[tag] for tag in cosign.tags(digest) if tag in state.tags] if state else []
        of_cosign = [key for key, manifest in attached.items() if manifest.artifact_type == cosign.ARTIFACT_TYPE]
        for manifest_digest in (*tagged, *of_cosign):
            with contextlib.suppress(AdapterhubError):
                for layer in cosign.layers(store.read_document(manifest_digest), manifest_digest):
                    yield layer.size, partial(_read_layer, store, layer)

    return read_bounded(bundles())


def _read_layer(store: Store, layer: cosign.CosignLayer) -> bytes:
    return layer.bundle(store.read_document(layer.digest, limit=layer.size))


def attach_signature(worker: Worker, name: str, subject: Manifest, raw: bytes) -> bool:
    """Attach a signature that came with the files of a version; return False if it is about others, and not kept.

    It is attached as `adapterhub sign` does at an OCI registry, so that every client finds it there.
    """
    if not is_about(raw, subject):
        return False
    blob, annotations = Descriptor(MEDIA_TYPE, sha256_bytes(raw), len(raw), SIGNATURE), attachment_annotations(raw)
    document = referrers.attachment_bytes(subject, MEDIA_TYPE, [blob], annotations)
    digest, store = sha256_bytes(document), worker.registry.store
    blobs = (_EMPTY_CONFIG, blob.digest)
    manifest = OtherManifest(MANIFEST_TYPE, len(document), MEDIA_TYPE, subject.digest, annotations, blobs)
    with store.lease("push"):
        for data in (raw, referrers.EMPTY, document):
            store.put_bytes(data)
        store.sync_blobs()
        worker.repositories.change(name, lambda state: with_manifest(state, digest, manifest, {}))
    return True


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
    staged: Mapping[Digest, Path] = NO_FILES,
    adopt: Callable[[], object] = lambda: None,
) -> Version:
    """Check a tree as a push would, derive its adapter.json, and store it as a version of `name`.

    Args:
        registry: The registry that has the blobs.
        name: The adapter's name.
        files: The tree; its adapter.json is kept if it is true, else derived anew.
        tags: Tags to move; None for those of a push.
        expect: As in `Registry.push`.
        policy: The hub's policy.
        signatures: Returns the signatures of a manifest, for a policy that requires them.
        message: The reason for the push, for the log.
        staged: Files of the tree that are no blobs yet, by digest.
        adopt: Called to make them blobs, once nothing more can be refused.

    Raises:
        RefusedError: The check finds errors, or the policy does not allow the adapter.
    """
    from adapterhub.registry import packaging

    if policy is not None:
        policy.check_name(name)
    with _linked_folder(registry, files, name, staged) as folder, _errors_naming(folder, name):
        parents = partial(read_parent, registry.store)
        file_list = Listing(tuple(sorted(files)))
        package = packaging.package(folder, location=name, policy=policy, file_list=file_list, read_parent=parents)
        files_to_store = {path: file for path, file in files.items() if path != ADAPTER_JSON}
        manifest, raw = package.draft.finalize(files_to_store)
        with registry.store.lease("push"):
            files_to_store[ADAPTER_JSON] = sha256_bytes(raw), len(raw)
            oci = oci_manifest.assemble(files_to_store, manifest)
            # Before the manifest is stored: its digest is known, which is enough to find signatures pushed earlier.
            check_signed(policy, oci, lambda: signatures(oci.digest), name=name, location=name)
            _check_tags(registry, Ref(name), oci, tags)
            adopt()
            registry.store.put_bytes(raw)
            registry.store.put_bytes(oci.config_bytes)
            registry.store.put_bytes(oci.raw)
            # The blobs must be durable before the log entry that refers to them.
            registry.store.sync_blobs()
            return registry.push_manifest(oci, Ref(name), expect=expect, tags=tags, message=message)


def check_proposed(
    registry: Registry, name: str, files: Files, *, policy: Policy | None, staged: Mapping[Digest, Path] = NO_FILES
) -> str:
    """Check a tree as a push would; return why the policy would refuse it now, empty if it would not.

    Raises:
        RefusedError: The check finds errors.
    """
    from adapterhub.registry import packaging

    with _linked_folder(registry, files, name, staged) as folder, _errors_naming(folder, name):
        package = packaging.package(folder, location=name, file_list=Listing(tuple(sorted(files))))
        files_to_store = {path: file for path, file in files.items() if path != ADAPTER_JSON}
        manifest, raw = package.draft.finalize(files_to_store)
        files_to_store[ADAPTER_JSON] = sha256_bytes(raw), len(raw)
        oci = oci_manifest.assemble(files_to_store, manifest)
        try:
            read = partial(read_parent, registry.store)
            facts = VersionFacts(oci.files_size, read_parent=read, find_problem=partial(first_problem, folder, [*files]))
            packaging.check_manifest(policy, manifest, name, facts)
            check_signed(policy, oci, lambda: (), name=name, location=name)
        except AdapterhubError as refusal:
            return str(refusal)
    return ""


def publish_manifest(
    registry: Registry,
    ref: Ref,
    manifest: Manifest,
    *,
    tags: tuple[str, ...] | None = None,
    expect: Digest | None = None,
    policy: Policy | None = None,
    signatures: Callable[[Digest], Sequence[bytes]] = lambda _: (),
    message: str = "",
) -> Version:
    """Check the files of a manifest packaged elsewhere, and store it, byte for byte, as a version of the name of `ref`.

    The arguments are those of `publish_tree`, but `expect` is what the tag of `ref` must still be at.

    Raises:
        RefusedError: The check finds errors, or the policy does not allow the adapter.
        IntegrityError: A blob is missing, or the adapter.json does not match the files.
    """
    from adapterhub.registry import packaging

    name = ref.name
    if policy is not None:
        policy.check_name(name)
    check_signed(policy, manifest, lambda: signatures(manifest.digest), name=name, location=name)
    files = {layer.path: (layer.digest, layer.size) for layer in manifest.layers}
    with _linked_folder(registry, files, name) as folder, _errors_naming(folder, name), registry.store.lease("push"):
        packaging.check_listed(registry.store, manifest, name)
        packaging.check_received(
            folder, manifest, location=name, policy=policy, read_parent=partial(read_parent, registry.store)
        )
        _check_tags(registry, ref, manifest, tags)
        registry.store.put_bytes(manifest.raw)
        registry.store.sync_blobs()
        return registry.push_manifest(manifest, ref, expect=expect, tags=tags, message=message)


def check_released(worker: Worker, policy: Policy, row: VersionRow) -> None:
    """Compare a version with the hub's policy before it is served: the policy may be stricter than when the version was pushed.

    Raises:
        RefusedError: The policy does not allow it.
    """
    from adapterhub.registry import packaging

    location = str(row.ref)
    policy.check_name(row.name)
    digest = worker.registry.row(Ref(row.name, number=row.number)).digest  # `row` may be a conversion of the version
    oci = oci_manifest.parse(worker.registry.store.read_document(digest), location)
    facts = stored_facts(worker.registry.store, oci, worker.registry.measurements(digest))
    packaging.check_manifest(policy, worker.registry.adapter_manifest(digest), location, facts)
    check_signed(policy, oci, lambda: attached_signatures(worker, row.name, digest), name=row.name, location=location)


def _check_tags(registry: Registry, ref: Ref, manifest: Manifest, tags: tuple[str, ...] | None) -> None:
    """Refuse a new version that a tag's requirements would refuse, before its bytes are stored, which a bucket would keep."""
    registry.gate.check_new(ref.name, latest_tags(ref.tag) if tags is None else tags, lambda: manifest.digest)


@contextlib.contextmanager
def _linked_folder(registry: Registry, files: Files, name: str, staged: Mapping[Digest, Path] = NO_FILES) -> Iterator[Path]:
    """Yield a folder with the blobs under the names of the files, inside a folder with the adapter's own name."""
    check_tree(files, name)
    check_contents(registry.store, files, name, staged)
    layers = [Descriptor("", digest, size, path) for path, (digest, size) in files.items()]
    with linked_folder(registry.store, layers, staged) as folder:
        yield folder


@contextlib.contextmanager
def _errors_naming(folder: Path, name: str) -> Iterator[None]:
    """Name the repository, rather than a temporary folder, in errors."""
    try:
        yield
    except AdapterhubError as error:
        for temporary_name in (str(folder), folder.name):
            error.rename(temporary_name, name)
        raise
