"""The OCI image manifest whose digest identifies a version: a pure function of an adapter's files and its `AdapterManifest`.

The function is specified in `schemas/SPECIFICATION.md`. It has rules by number, and the version of adapter.json tells which one
applies, so that a folder keeps its digest: the drafts have rule 1, and 1.x rule 2, which names itself in an annotation.

One file is one raw layer. Media types are ModelPack's (modelpack/model-spec, `docs/spec.md`), whose config schema allows no
foreign fields, so base and parents are annotations of the manifest. Each layer has its name twice: `org.cncf.model.filepath`
for ModelPack's tools, and `org.opencontainers.image.title` so that a plain `oras pull` writes the right file. A manifest from
elsewhere is checked before anything in it becomes a path or a size.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, parse_digest, sha256_bytes
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import canonical_json, card, schema_versions
from .document import AdapterManifest
from .package_files import CONFIGS, LEGAL, MAX_FILES, check_paths

if TYPE_CHECKING:
    from .folder_contents import FolderContents

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_LAYER = "application/vnd.cncf.model.weight.v1.raw"
CONFIG_LAYER = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_LAYER = "application/vnd.cncf.model.doc.v1.raw"
IMAGE_LAYER = "application/vnd.oci.image.layer.v1.tar"
TITLE = "org.opencontainers.image.title"
FILEPATH = "org.cncf.model.filepath"
RULE = "io.adapterhub.rule"
_MODEL_LAYERS = ("application/vnd.cncf.model.", "application/vnd.kitops.modelkit.")
_EMPTY = b"{}"
_EPOCH = "1970-01-01T00:00:00Z"  # rule 1, of an adapter without a recorded training
# ModelPack's words for dtypes of safetensors; other names are their own in lower case.
_PRECISIONS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8",
}  # fmt: skip
MAX_MANIFEST = 4 << 20  # bytes; the size that registries must accept (distribution-spec, "Pushing manifests")
# Bytes of all files in relation to those of distinct content: the same megabytes under ten thousand names would fill a disk.
_MAX_REPETITION, _FREE_REPETITION = 8, 1 << 20


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One blob: `size` is in bytes; `path` is its place in the adapter's folder, empty for the config."""

    media_type: str
    digest: Digest
    size: int
    path: str = ""


@dataclass(frozen=True)
class Manifest:
    """The bytes of a manifest and their content; `config_bytes` is empty if only the manifest was read."""

    digest: Digest
    raw: bytes
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    config_bytes: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the adapter's files."""
        return sum(layer.size for layer in self.layers)

    @property
    def files_size(self) -> int:
        """Bytes of its files without adapter.json, which a policy limits."""
        return sum(layer.size for layer in self.layers if layer.path != ADAPTER_JSON)

    @property
    def adapter_json(self) -> Descriptor | None:
        """The layer with adapter.json; None if there is none, as in artifacts of other tools."""
        return next((layer for layer in self.layers if layer.path == ADAPTER_JSON), None)

    @property
    def card(self) -> Descriptor | None:
        """The layer with the model card; None if there is none, or if it is too large to be read."""
        layer_by_name = {layer.path.lower(): layer for layer in self.layers if layer.size <= card.MAX_BYTES}
        return next((layer_by_name[name] for name in card.NAMES if name in layer_by_name), None)


def build(folder: Path) -> Manifest:
    """Return the OCI manifest that a push of the adapter in `folder` would create; nothing is written."""
    from . import folder_contents  # needs numpy, which commands that only read do without

    return build_from(folder_contents.read_folder(folder))


def build_from(contents: FolderContents) -> Manifest:
    """Return what `build` does, of a folder that was read."""
    from . import derive  # late, like the above

    return complete(contents.files, *derive.draft_contents(contents).finalize(contents.files))


def complete(files: Mapping[str, tuple[Digest, int]], manifest: AdapterManifest, raw: bytes) -> Manifest:
    """Return the OCI manifest of a folder's files with `raw`, the document of `manifest`, as their adapter.json."""
    return assemble({**files, ADAPTER_JSON: (sha256_bytes(raw), len(raw))}, manifest)


def assemble(files: Mapping[str, tuple[Digest, int]], manifest: AdapterManifest) -> Manifest:
    """Return the OCI manifest of the files that `manifest` describes.

    Args:
        files: Path to digest and size, including adapter.json.
        manifest: The content of adapter.json.
    """
    # Sorted, as the digest depends on the order of the layers.
    layers = tuple(Descriptor(media_type(path), digest, size, path) for path, (digest, size) in sorted(files.items()))
    if problem := _repetition_problem(layers):
        raise RefusedError(ADAPTER_JSON, problem, "Remove the copies")
    is_draft = manifest.version in schema_versions.DRAFTS
    canonical_bytes = json_file.canonical_bytes if is_draft else canonical_json.compact
    config_bytes = canonical_bytes(_draft_config(layers, manifest) if is_draft else _config(layers, manifest))
    config = Descriptor(CONFIG_TYPE, sha256_bytes(config_bytes), len(config_bytes))
    annotations = _annotations(manifest, canonical_bytes) | ({} if is_draft else {RULE: "2"})
    raw = canonical_bytes(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": config.media_type, "digest": config.digest, "size": config.size},
            "layers": [_layer(layer) for layer in layers],
            "annotations": annotations,
        }
    )
    if len(raw) > MAX_MANIFEST:
        raise RefusedError(ADAPTER_JSON, f"a manifest of {len(raw)} bytes is over the {MAX_MANIFEST} that registries accept")
    return Manifest(sha256_bytes(raw), raw, config, layers, annotations, config_bytes)


def of_files(files: Mapping[str, tuple[Digest, int]], location: str) -> Manifest:
    """Return a manifest of files by path that are a version of another program, with or without an adapter.json."""
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256_bytes(_EMPTY), "size": len(_EMPTY)}
    layers = [_layer(Descriptor(media_type(path), digest, size, path)) for path, (digest, size) in files.items()]
    document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": empty, "layers": layers}
    raw = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return dataclasses.replace(parse(raw, location), config_bytes=_EMPTY)


def is_model_tar(media_type: str) -> bool:
    """Return whether a layer is a tar, compressed or not, with files of a model by ModelPack or by KitOps."""
    return media_type.startswith(_MODEL_LAYERS) and media_type.endswith((".tar", ".tar+gzip", ".tar+zstd"))


def media_type(path: str) -> str:
    """Return ModelPack's type of a file: weights, files that a runtime needs with them, or documents for people."""
    name = path.rpartition("/")[2]
    if is_weights(name):
        return WEIGHT_LAYER
    doc = os.path.splitext(name)[1].lower() not in CONFIGS or name.upper().startswith((*LEGAL, "README"))
    return DOC_LAYER if doc else CONFIG_LAYER


def _layer(layer: Descriptor) -> dict[str, Any]:
    names = {TITLE: layer.path, FILEPATH: layer.path}
    return {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size, "annotations": names}


def _config(layers: tuple[Descriptor, ...], manifest: AdapterManifest) -> dict[str, Any]:
    """Return ModelPack's config (`schema/config-schema.json`; its words: `docs/config.md`) by rule 2."""
    numbers = {
        "format": "gguf" if manifest.format == "gguf" else "safetensors",
        "paramSize": _param_size(manifest.parameters),
        # ModelPack's list of several dtypes is not in adapter.json.
        "precision": None if manifest.dtype == "mixed" else _PRECISIONS.get(manifest.dtype, manifest.dtype.lower()),
    }
    return {
        "descriptor": _descriptor_of(manifest, manifest.training.created if manifest.training else None),
        "config": {key: value for key, value in numbers.items() if value},
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }


def _draft_config(layers: tuple[Descriptor, ...], manifest: AdapterManifest) -> dict[str, Any]:
    """Return the config by rule 1, which stays for the versions that have it."""
    created = (manifest.training.created if manifest.training else None) or _EPOCH
    numbers = {"paramSize": str(manifest.parameters), "precision": manifest.dtype.lower()}
    config = _config(layers, manifest)
    return config | {"descriptor": _descriptor_of(manifest, created), "config": config["config"] | numbers}


def _descriptor_of(manifest: AdapterManifest, created: str | None) -> dict[str, Any]:
    descriptor = {
        "createdAt": created,
        "family": manifest.base.model_type,
        "name": manifest.name,
        "description": manifest.description,
        "licenses": [manifest.license] if manifest.license else None,
    }
    return {key: value for key, value in descriptor.items() if value}


def _param_size(count: int) -> str:
    """Return a count as ModelPack writes it, exactly: `512` is `0.512K`, and 4,587,520 is `4.58752M`."""
    count = int(float(count))  # the number that all programs read from a text beyond 2^53 - 1
    power = min(max((len(str(count)) - 1) // 3, 1), 4)
    integer, remainder = divmod(count, 1000**power)
    fraction = str(remainder).rjust(3 * power, "0").rstrip("0")
    return f"{integer}{'.' if fraction else ''}{fraction}{'KMBT'[power - 1]}"


def _annotations(manifest: AdapterManifest, canonical_bytes: Callable[[object], bytes]) -> dict[str, str]:
    base = manifest.base
    annotations = {
        "io.adapterhub.kind": manifest.method,
        "io.adapterhub.base.repo": base.repo,
        "io.adapterhub.base.revision": base.revision,
        "io.adapterhub.base.fingerprint": base.fingerprint,
        "io.adapterhub.parents": canonical_bytes(manifest.to_dict()["parents"]).decode() if manifest.parents else None,
    }
    return {key: value for key, value in annotations.items() if value}


# ---- reading one from elsewhere


def parse(raw: bytes, location: str) -> Manifest:
    """Parse and check a manifest; FormatError if its names or sizes cannot be trusted."""
    if len(raw) > MAX_MANIFEST:
        raise FormatError(location, f"a manifest of over {MAX_MANIFEST} bytes")
    document = json_file.parse_object(raw, location)
    kind, layers = document.get("mediaType", MANIFEST_TYPE), document.get("layers")
    # A document that is both could be read as one here and as the other by another program (CVE-2021-41190; image-spec v1.1,
    # `manifest.md`, "mediaType").
    if "manifests" in document and layers is not None:
        raise FormatError(location, "both an image manifest, with layers, and an image index, with manifests")
    if document.get("schemaVersion") != 2 or kind != MANIFEST_TYPE or not isinstance(layers, list):
        detail = (
            f" but {str(kind)[:80]!r}" if kind != MANIFEST_TYPE else ": its schemaVersion is not 2, or it has no list of layers"
        )
        raise FormatError(location, f"not an OCI image manifest{detail}")
    if len(layers) > MAX_FILES:
        raise FormatError(location, f"{len(layers)} files are over the limit of {MAX_FILES}")
    descriptors = tuple(_descriptor(layer, location, named=True) for layer in layers)
    check_paths((layer.path for layer in descriptors), location)
    if problem := _repetition_problem(descriptors):
        raise FormatError(location, problem)
    annotations = document.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise FormatError(location, "annotations are not a map of strings to strings")
    return Manifest(sha256_bytes(raw), raw, _descriptor(document.get("config"), location), descriptors, annotations)


def _repetition_problem(layers: tuple[Descriptor, ...]) -> str:
    """Return what is wrong if the files are mostly copies of each other; otherwise an empty string."""
    size, distinct = sum(layer.size for layer in layers), sum({layer.digest: layer.size for layer in layers}.values())
    too_much = size > _MAX_REPETITION * distinct + _FREE_REPETITION
    return f"its files have {size} bytes, but only {distinct} bytes of different content" if too_much else ""


def _descriptor(value: object, location: str, *, named: bool = False) -> Descriptor:
    if not isinstance(value, dict):
        raise FormatError(location, "a descriptor is not an object")
    size, kind = value.get("size"), value.get("mediaType")
    if not json_file.is_integer(size) or not 0 <= size < 2**63 or not isinstance(kind, str):
        raise FormatError(location, "a descriptor without a valid size or media type")
    digest = parse_digest(value.get("digest"), location)
    if not named:
        return Descriptor(kind, digest, size)
    annotations = value.get("annotations")
    path = annotations.get(TITLE) or annotations.get(FILEPATH) if isinstance(annotations, dict) else None
    if is_model_tar(kind) or (path is None and kind.startswith(IMAGE_LAYER)):
        path = f"{digest[7:]}.tar"  # no adapter has such a file, but `remotes.oci.adapter_image` looks into it
    if not isinstance(path, str):
        raise FormatError(location, f"the layer {digest} has no file name")
    return Descriptor(kind, digest, size, path)
