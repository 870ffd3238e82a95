"""Whole models as bases of adapters: uploaded ones, and those of the upstream, without an operator who adds them.

A base is used for another's adapter only if everybody may read it who may read this hub, or if both are in one namespace.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from adapterhub.digest import is_hex
from adapterhub.index import repository_rows
from adapterhub.index.queries import VersionRow
from adapterhub.manifest.document import BaseInfo
from adapterhub.registry.repository_documents import MAIN, Repository
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import commits
from .access_control import Access
from .accounts.accounts import READERS
from .commits import Commit
from .lru_cache import LRUCache
from .storage.folder_storage import Storage
from .stored_model import StoredModel
from .timed_value import TimedValue
from .upstream.models import UpstreamModels
from .workers import Worker, Workers

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_log = logging.getLogger("adapterhub.hub")
_COMMIT = 40  # hexadecimal digits
_MAX_MODELS = 32 << 20  # bytes of descriptions of models in memory
_LIST_TTL, _MAX_LISTED = 30.0, 500  # seconds until models are looked for again, and how many are listed


@dataclass(frozen=True)
class WholeModel:
    """A whole model of this hub, or one of the upstream that is kept here, as its configs and headers describe it.

    Attributes:
        name: Its name.
        commit: The commit of its branch main, or of what was asked for last.
        architecture: The class of its code; empty if its config names none.
        parameters: Numbers in all its tensors.
        size: Bytes of all its files.
    """

    name: str
    commit: str
    architecture: str
    parameters: int
    size: int
    is_kept: bool = False


class ModelBases:
    """The whole models of a hub.

    Args:
        storage: Where their bytes are.
        workers: Threads of the hub.
        access: Who may read.
        upstream: The models of another hub; None without one.
    """

    def __init__(self, storage: Storage, workers: Workers, access: Access, upstream: UpstreamModels | None) -> None:
        self._storage, self._workers, self._access, self._upstream = storage, workers, access, upstream
        self._specs: LRUCache[BaseSpec | None] = LRUCache(_MAX_MODELS)
        self._listed, self._kept = (TimedValue[tuple[WholeModel, ...]](_LIST_TTL) for _ in range(2))

    def find(self, row: VersionRow, base: BaseInfo) -> BaseSpec | None:
        """Return the base model that a version names, if it is here or at the upstream; called in any thread."""
        if not base.repo:
            return None
        worker = self._workers.worker()
        namespace = row.name.partition("/")[0]
        try:
            spec = self._uploaded(worker, base, namespace)
            if spec is None and self._upstream and self._upstream.may_name(worker, base.repo):
                spec = self._upstream.read_base(base.repo, base.revision or MAIN)
        except AdapterhubError as error:
            _log.warning("the base of %s cannot be read: %s", row.ref, printable(str(error)))
            return None
        return spec if spec and (not base.fingerprint or spec.has_fingerprint(base.fingerprint)) else None

    def local_base(self, worker: Worker, row: VersionRow) -> BaseSpec | None:
        """Return the base model that a version names, if it was uploaded or is kept here; no other hub is asked."""
        # Most versions name a base that is not here, which a look at its name tells.
        if not row.base:
            return None
        is_uploaded = commits.find_view(worker, row.base.lower()) is not None
        if not is_uploaded and (self._upstream is None or self._upstream.settings.mode != "cache"):
            return None
        manifest = worker.registry.adapter_manifest(row.digest)
        base = manifest.base if manifest else BaseInfo()
        try:
            spec = self._uploaded(worker, base, row.name.partition("/")[0]) if is_uploaded and base.repo else None
            spec = spec or self._kept_base(worker, base)
        except AdapterhubError:
            return None
        return spec if spec and (not base.fingerprint or spec.has_fingerprint(base.fingerprint)) else None

    def _kept_base(self, worker: Worker, base: BaseInfo) -> BaseSpec | None:
        """Return the base that is kept of the upstream; None if it is not, or not as a whole."""
        upstream = self._upstream
        if not base.repo or upstream is None or not upstream.may_name(worker, base.repo):
            return None
        commit = upstream.kept_commit(base.repo, base.revision or MAIN)
        return self._read_kept_base(upstream, base.repo, commit) if commit else None

    def _read_kept_base(self, upstream: UpstreamModels, name: str, commit: str) -> BaseSpec | None:
        try:
            return self._specs.get(("upstream", name, commit), partial(upstream.read_kept_base, name, commit))
        except AdapterhubError:
            return None

    def _uploaded(self, worker: Worker, base: BaseInfo, namespace: str) -> BaseSpec | None:
        name = str(base.repo).lower()
        view = commits.find_view(worker, name, partial(self._may_be_base, namespace))
        if view is None:
            return None
        commit = None
        if base.revision:
            try:
                commit = commits.find(worker, view, base.revision)
            except NotFoundError:
                # A commit of another hub, from which the model was uploaded: its shapes decide.
                if not is_hex(base.revision, _COMMIT):
                    return None
        return self._read(name, commit or commits.find(worker, view, MAIN))

    def _may_be_base(self, namespace: str, name: str, repository: Repository | None) -> bool:
        """Return whether a model may be the base of an adapter in a namespace, whoever reads that."""
        models_namespace = name.partition("/")[0]
        readers = self._access.namespace_settings(models_namespace).readers
        is_public = not (repository and repository.private) and readers != READERS[2]
        return models_namespace == namespace or is_public

    def _read(self, name: str, commit: Commit) -> BaseSpec | None:
        """Return the description of a commit of a whole model; None if it is no whole model."""
        return self._specs.get((name, commit.id), partial(self._read_headers, name, commit))

    def _read_headers(self, name: str, commit: Commit) -> BaseSpec | None:
        from adapterhub_converters.bases import hub_layout, read_files

        model = StoredModel(name, commit.files, lambda path: self._storage.open_blob(commit.files[path][0]))
        file = model.main_file()
        return None if file is None else hub_layout.with_repo(read_files(model, file), name, commit.id)

    # ---- lists

    def uploaded_models(self, worker: Worker) -> tuple[WholeModel, ...]:
        """Return the whole models of the hub by name, as of the last half minute; the caller shows each to who may see it."""
        return self._listed.get(lambda: tuple(self._find_models(worker)))

    def kept_models(self) -> tuple[WholeModel, ...]:
        """Return the whole models that are kept of the upstream, as of the last half minute; the caller shows them likewise."""
        upstream = self._upstream
        return (
            self._kept.get(lambda: tuple(self._find_kept_models(upstream)))
            if upstream and upstream.settings.mode == "cache"
            else ()
        )

    def _find_kept_models(self, upstream: UpstreamModels) -> Iterator[WholeModel]:
        for model in upstream.kept_models():
            spec = self._read_kept_base(upstream, model.name, model.commit)
            if spec and spec.tensors:
                yield _described(model.name, model.commit, spec, model.size, is_kept=True)

    def _find_models(self, worker: Worker) -> Iterator[WholeModel]:
        count = 0
        for name in repository_rows.names_without_versions(worker.registry.index):
            view = commits.find_view(worker, name)
            if count >= _MAX_LISTED:
                return
            # What has versions is an adapter.
            if view and view.newest is None and (commit := commits.find(worker, view, MAIN)).files:
                model = self._describe(name, commit)
                count += model is not None
                yield from [model] if model else []

    def _describe(self, name: str, commit: Commit) -> WholeModel | None:
        try:
            spec = self._read(name, commit)
        except AdapterhubError:
            return None
        if spec is None or not spec.tensors:
            return None
        return _described(name, commit.id, spec, sum(size for _, size in commit.files.values()))


def _described(name: str, commit: str, spec: BaseSpec, size: int, *, is_kept: bool = False) -> WholeModel:
    parameters = sum(math.prod(tensor.shape) for tensor in spec.tensors.values())
    return WholeModel(name, commit, spec.architecture or spec.model_type or "", parameters, size, is_kept)
