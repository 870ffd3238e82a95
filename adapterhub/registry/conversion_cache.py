"""The cache of converted versions: pulling a version in another format converts it and keeps the result.

A conversion is stored in `cache/` under a key of everything that determines it, and is used only if its bytes still have the
recorded digest. A conversion that used the weights of a base model is not kept, as the key does not cover them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.project.policy_rules import VersionFacts
from adapterhub.version import __version__
from adapterhub_converters.adapter_files import resolve_adapter
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import AdapterhubError, LocalIOError, OutputExistsError
from adapterhub_converters.formats import FORMATS, PACKAGES, ollama
from adapterhub_converters.lazy_dataclass import dataclass

from . import packaging
from .adapter_recipe import Conversion, ParentAdapter, convert
from .version_facts import first_problem, read_parent

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy
    from adapterhub.ref import Ref
    from adapterhub.store.store_files import StoreFiles
    from adapterhub_converters.bases import BaseSpec

    from .registry import Registry, Version


@dataclass(frozen=True)
class ConversionResult:
    """A version in another format: its path, the sums of its loss report, and whether it came from the cache."""

    version: Version
    out: Path
    loss: dict[str, int]
    cached: bool


def pull(
    registry: Registry,
    ref: Ref,
    out: Path,
    conversion: Conversion,
    *,
    base: BaseSpec | None = None,
    model: str | None = None,
    policy: Policy | None = None,
    replace: bool = False,
) -> ConversionResult:
    """Write a version in another format as `out`, completely or not at all: a file, or a folder with its manifest.

    The version is checked first, and the result compared with the policy, as by a push; nothing else is cached.

    Args:
        registry: The registry with the version.
        ref: The version.
        out: The file or folder to write.
        conversion: The format and its options. For Ollama, the result is a folder with a GGUF file and a Modelfile.
        base: The model it was trained on, if the conversion needs it.
        model: Ollama's name of the base model.
        policy: The project's policy; None without one.
        replace: Replace what is at `out`, as in `atomic.whole`.
    """
    is_package = conversion.to in PACKAGES
    model_name, file_name = (ollama.check(model), ollama.adapter_name(out)) if is_package else ("", "")
    conversion = dataclasses.replace(conversion, to="gguf") if is_package else conversion
    is_folder = is_package or FORMATS[conversion.to].folder
    # Before the conversion, which can take long, rather than after it.
    atomic.check_free(out, folder=is_folder, replace=replace)
    version = registry.resolve(ref)
    with (
        converted_folder(registry, version, conversion, base=base, policy=policy) as (folder, manifest, cached),
        atomic.pending_output(out, folder=is_folder, replace=replace) as target,
    ):
        if is_package:
            shutil.copyfile(resolve_adapter(folder), target / file_name)
            ollama.write(target, model_name, file_name)
        elif is_folder:
            shutil.copytree(folder, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(resolve_adapter(folder), target)
    recipe = manifest.recipe if manifest else None
    return ConversionResult(version, out, dict((recipe.loss if recipe else None) or {}), cached)


@contextlib.contextmanager
def converted_folder(
    registry: Registry,
    version: Version,
    conversion: Conversion,
    *,
    base: BaseSpec | None = None,
    policy: Policy | None = None,
) -> Iterator[tuple[Path, AdapterManifest | None, bool]]:
    """Convert a version, or find its conversion in the cache.

    Yields:
        The folder, the manifest in it, and whether it came from the cache.
    """
    entry = None if _has_weights(base) else registry.store.root / "cache" / _key(version.digest, conversion, base)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder, cached = _cached_folder(registry.store.files, entry), True
        if folder is None:
            folder, cached = Path(temporary) / "made", False
            source = Path(temporary) / version.name.rpartition("/")[2]
            registry.pull(version.ref, source)
            path = resolve_adapter(source)
            try:
                packaging.check_adapter(path, location=str(version.ref), try_storing=None)
                convert(ParentAdapter(source, path, version.digest), folder, conversion, name=source.name, base=base)
            except AdapterhubError as error:  # name the ref: the temporary path means nothing to the user
                error.rename(str(source), str(version.ref))
                raise
        manifest = AdapterManifest.read(folder)
        facts = VersionFacts(
            measurements=registry.measurements(version.digest),
            read_parent=partial(read_parent, registry.store),
            find_problem=partial(first_problem, folder, [file.path for file in manifest.files] if manifest else ()),
        )
        packaging.check_manifest(policy, manifest, str(version.ref), facts)
        if entry is not None and not cached:
            _store(folder, entry)
        yield folder, manifest, cached


def _has_weights(base: BaseSpec | None) -> bool:
    return base is not None and base.folder is not None


def _key(digest: str, conversion: Conversion, base: BaseSpec | None) -> str:
    # Another version of adapterhub may convert differently. Of a base, this is what a conversion reads besides its weights.
    inputs: dict[str, Any] = {"source": digest, "by": __version__, **dataclasses.asdict(conversion)}
    if base is not None:
        inputs["base"] = [base.architecture, base.tied, base.fingerprint, dict(base.config)]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _cached_folder(files: StoreFiles, entry: Path | None) -> Path | None:
    """Return the folder of an earlier conversion; if its bytes have changed, remove it and return None."""
    if entry is None or not files.exists(entry):
        return None
    with contextlib.suppress(AdapterhubError, OSError):
        files.touch(entry)  # the time of its last use, so that a gc spares it; set first, as a gc may run while it is read
        recorded_digest = files.read(entry / _DIGEST).decode("utf-8", "replace")
        if entry / _FILES in files.list_subfolders(entry) and recorded_digest == oci_manifest.build(entry / _FILES).digest:
            return entry / _FILES
    with contextlib.suppress(OSError):
        files.remove_tree(entry)
    return None


_FILES, _DIGEST = "files", "digest"


def _store(folder: Path, entry: Path) -> None:
    """Put a conversion into the cache, if that can be written and no other process was faster."""
    with contextlib.suppress(LocalIOError, OSError, OutputExistsError), atomic.pending_output(entry) as place:
        shutil.copytree(folder, place / _FILES)
        (place / _DIGEST).write_text(oci_manifest.build(folder).digest)
