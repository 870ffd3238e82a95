"""The commits of a repository, as clients of the Hugging Face Hub see them.

A version is a commit whose id is the first 40 digits of its digest, so that a revision names the same bytes as everywhere else.
A tree that is not a complete adapter yet, as when the README comes first, is a commit with a document of its own. `main` is at
the newest version, or at a commit made after it. An alias (`aliases`) is a repository with one version, which is `main`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adapterhub.digest import Digest, is_hex
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.ref import LATEST, Ref, RefError, is_name
from adapterhub.registry.repository_records import MAIN, CommitRecord, Repository, commit_id, head_of
from adapterhub.registry.version_lookup import find_exact_row
from adapterhub_converters.errors import NotFoundError

from . import aliases, mirror_origin
from .aliases import Alias
from .workers import MAX_CACHED_FILES, Worker

HEAD = "HEAD"
MayRead = Callable[[str, Repository | None], bool]
"""Returns whether a client may see a repository: called with its name, and its state or None if it has none."""
_MAX_REMEMBERED = 2_000  # repositories kept in memory per thread, and commits of each
_NO_NAME = "-"  # not a valid name, so no repository has it
_ALIASES = {MAIN, HEAD, ""}


@dataclass(frozen=True)
class Commit:
    """One state of a repository.

    Attributes:
        id: 40 hexadecimal digits.
        files: Path to digest and size in bytes, sorted.
        row: The version behind the commit; None for a tree that is not an adapter yet.
    """

    id: str
    files: Mapping[str, tuple[Digest, int]]
    row: VersionRow | None = None
    title: str = ""
    description: str = ""
    author: str = ""
    time: str = ""


EMPTY = Commit("0" * 40, {}, title="initial commit")
"""The only commit of a repository nothing was pushed to."""


@dataclass(frozen=True)
class View:
    """A repository that exists, in its current state.

    Attributes:
        name: Its name.
        repository: Its document; None if it only has versions.
        newest: Its version `latest`.
        frozen: Whether it is an alias: then `newest`, a version of another repository, is all it has.
        head: Identifies this state among all states of the name.
        found: The commits looked up so far, by revision.
    """

    name: str
    repository: Repository | None
    newest: VersionRow | None
    frozen: bool = False
    head: str = ""
    commits_by_revision: dict[str, Commit] = field(default_factory=dict, compare=False, repr=False)

    @property
    def latest(self) -> str:
        """The commit id of the version `latest`; empty without versions."""
        return commit_id(self.newest.digest) if self.newest else ""


def find_view(worker: Worker, name: str, may_read: MayRead = lambda _name, _repository: True) -> View | None:
    """Look a repository up; None if it does not exist, may not be seen, or if `name` is not a valid name.

    A hidden repository takes the same lookups as a missing one, so that the time of a response does not tell them apart.
    """
    if not is_name(name):
        return None
    head, repository = worker.repositories.current(name)
    is_visible = may_read(name, repository)
    # A hidden name looks up a name that cannot exist, so that it takes as long as a missing one.
    state = worker.registry.ledger.current(name if is_visible else f"{name.partition('/')[0]}/{_NO_NAME}")
    if state.deleted and repository and repository.is_bare:
        repository = None  # all it records is whether the removed name was private
    has_versions = state.seq > 0 and not state.deleted and state.number > 0 and not (repository and repository.moved_to)
    if not is_visible or not (repository or has_versions):
        alias = aliases.parse(name)
        return _alias_view(worker, name, alias, may_read) if alias else None
    # A cached view is valid until either of the repository's two logs gets another entry.
    previous_state, cached = worker.views.get(name, (None, None))
    if cached is None or previous_state != state or cached.repository is not repository:
        row = worker.registry.row(Ref(name)) if has_versions else None
        cached = View(name, repository, row, head=f"{state.head} {head}")
        if len(worker.views) >= _MAX_REMEMBERED:
            worker.views.clear()
        worker.views[name] = state, cached
    return cached


def is_arriving(worker: Worker, name: str, repository: Repository | None) -> bool:
    """Return whether a repository is being moved here, so that readers still see it under its old name."""
    if repository is None or not repository.moved_from:
        return False
    old = worker.repositories.get(repository.moved_from)
    return old is None or old.moved_to != name


def _alias_view(worker: Worker, name: str, alias: Alias, may_read: MayRead) -> View | None:
    source = find_view(worker, alias.name, may_read)
    if source is None or source.frozen or source.newest is None or alias.form:
        return None
    try:
        return frozen_view(name, source, worker.registry.row(Ref(alias.name, number=alias.number)))
    except NotFoundError:
        return None


def frozen_view(name: str, source: View, row: VersionRow) -> View:
    """Return a read-only view that has one version of another repository, or a conversion of it, and is as private."""
    state = Repository(private=bool(source.repository and source.repository.private), created=row.time)
    return View(name, state, row, frozen=True, head=f"{source.head} {row.digest}")


def rows(worker: Worker, view: View) -> Sequence[VersionRow]:
    """Return the versions of a repository, the newest first."""
    if view.newest is None:
        return ()
    return (view.newest,) if view.frozen else queries.versions(worker.registry.index, name=view.name)


def row_of(worker: Worker, view: View, reference: str) -> VersionRow:
    """Return the version that a tag, a number such as `v3` or a full digest names.

    Raises:
        NotFoundError: There is no such version.
    """
    if view.frozen and view.newest:
        if reference in (LATEST, f"v{view.newest.number}", view.newest.digest):
            return view.newest
    elif view.newest:
        text = f"{view.name}{'@' if reference.startswith('sha256:') else ':'}{reference}"
        try:
            return find_exact_row(worker.registry.ledger, Ref.parse(text))
        except RefError:
            pass
    raise NotFoundError(f"{view.name}:{reference}", "no such version")


def find(worker: Worker, view: View, revision: str) -> Commit:
    """Return the commit a revision names: a branch, a tag, a number such as `v3`, an id, a digest or a range.

    Raises:
        NotFoundError: There is no such commit.
    """
    commit = view.commits_by_revision.get(revision)
    if commit is None:
        if len(view.commits_by_revision) >= _MAX_REMEMBERED:
            view.commits_by_revision.clear()
        commit = _find_uncached(worker, view, revision)
        # A commit with many files takes megabytes: do not keep it.
        if len(commit.files) <= MAX_CACHED_FILES:
            view.commits_by_revision[revision] = commit
    return commit


def _find_uncached(worker: Worker, view: View, revision: str) -> Commit:
    branch = MAIN if revision in _ALIASES else revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
    if head := head_of(view.repository, branch, view.latest):
        return by_id(worker, view, head)
    if branch == MAIN:
        return version_commit(worker, view, view.newest) if view.newest else EMPTY
    # A branch of that name was found above: an id comes second.
    if is_hex(branch, 40):
        return by_id(worker, view, branch)
    if view.frozen:
        return version_commit(worker, view, row_of(worker, view, branch))
    try:
        text = f"@{branch}" if branch.startswith("sha256:") else f":{branch}"
        return version_commit(worker, view, worker.registry.row(Ref.parse(f"{view.name}{text}")))
    except RefError as error:
        raise NotFoundError(f"{view.name}:{revision}", "no such revision") from error


def by_id(worker: Worker, view: View, ident: str) -> Commit:
    """Return the commit with an id, or mirrored from the upstream commit with that id.

    Raises:
        NotFoundError: There is no such commit.
    """
    if view.frozen:
        versions = [row for row in rows(worker, view) if commit_id(row.digest) == ident]
    else:
        versions = (
            queries.versions(worker.registry.index, name=view.name, digest_prefix=f"sha256:{ident}") if view.newest else []
        )
    if versions:
        return version_commit(worker, view, versions[0])
    if ident == EMPTY.id and not view.newest:
        return EMPTY
    record = worker.repositories.commit(view.repository, ident) if view.repository else None
    if record is None and view.newest and not view.frozen and (origin := mirror_origin.find(worker.database, view.name, ident)):
        return replace(version_commit(worker, view, row_of(worker, view, origin)), id=ident)
    if record is None:
        raise NotFoundError(f"{view.name}@{ident}", "no such commit")
    return Commit(ident, record.files, None, record.title, record.description, record.author, record.time)


def version_commit(worker: Worker, view: View, row: VersionRow) -> Commit:
    """Return the commit of a version."""
    commit, record = version_commit_without_message(worker, row), _commit_record(worker, view, row)
    if record is None:
        return commit
    return replace(commit, title=record.title, description=record.description, author=record.author)


def version_commit_without_message(worker: Worker, row: VersionRow) -> Commit:
    """Return the commit of a version without author and message, which are in a document of their own."""
    files = {layer.path: (layer.digest, layer.size) for layer in worker.manifest(row).layers}
    return Commit(commit_id(row.digest), files, row, f"Version v{row.number}", time=row.time)


def _commit_record(worker: Worker, view: View, row: VersionRow) -> CommitRecord | None:
    """Return the author and message of a version's commit; None if the version was pushed in another way."""
    return worker.repositories.commit(view.repository, commit_id(row.digest)) if view.repository else None


def history(worker: Worker, view: View, revision: str) -> Sequence[str]:
    """Return the ids of the commits of a branch, or up to a commit, the newest first."""
    first = find(worker, view, revision)
    # All commits are read for it, so that it is cached: one line of time and id for each.
    listed, _ = worker.answers.get(("history", view.name, view.head), lambda: (_commit_lines(worker, view), ""))
    # Two ids, if the revision is an id of the upstream.
    first_ids = {first.id, commit_id(first.row.digest) if first.row else ""}
    pairs = (line.decode().split(" ") for line in listed.splitlines())
    return [first.id, *(ident for time, ident in pairs if ident not in first_ids and time <= (first.time or "~"))]


def _commit_lines(worker: Worker, view: View) -> bytes:
    """Return the time and the id of each commit of a repository, the newest first."""
    trees = (by_id(worker, view, ident) for ident in reversed([*view.repository.commits] if view.repository else []))
    times = [(commit.time, commit.id) for commit in trees if commit.row is None]
    times = [*((row.time, commit_id(row.digest)) for row in rows(worker, view)), *times]
    return "\n".join(f"{time} {ident}" for time, ident in sorted(times, key=lambda pair: pair[0], reverse=True)).encode()


def branches(view: View) -> dict[str, str]:
    """Return branch to commit id; `main` is always included."""
    names = [MAIN, *(name for name in (view.repository.heads if view.repository else ()) if name != MAIN)]
    return {name: head_of(view.repository, name, view.latest) or view.latest or EMPTY.id for name in names}


def tags(worker: Worker, view: View) -> dict[str, str]:
    """Return tag to commit id, sorted: with numbers such as `v3`, without `latest`, which is `main`, and names of branches."""
    reserved = {LATEST, *(view.repository.heads if view.repository else ())}
    commit_ids = {}
    for row in rows(worker, view):
        for tag in (f"v{row.number}", *(() if view.frozen else row.tags)):
            if tag not in reserved:
                commit_ids[tag] = commit_id(row.digest)
    return dict(sorted(commit_ids.items()))
