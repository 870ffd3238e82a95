"""The commits of a repository, as clients of the Hugging Face Hub see them.

A version is a commit whose id is the first 40 digits of its digest, so that a revision names the same bytes as everywhere else:
the commit that made it. A commit that goes back to its content later, and a tree that is not a complete adapter yet, as when
the README comes first, have the first digits of the digest of their own document. Each document names the commit before, so
that no later commit changes what was. `main` is at the newest version, or at a commit made after it. An alias (`aliases`) is a
repository with one version, which is `main`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property

from adapterhub.digest import Digest, is_hex
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.ref import LATEST, Ref, RefError, is_name
from adapterhub.registry.repository_documents import MAIN, OPEN, CommitRecord, Repository, commit_id, head_of, open_proposals
from adapterhub.registry.version_lookup import find_exact_row
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import aliases, mirror_origin
from .aliases import Alias
from .workers import Worker

HEAD = "HEAD"
PROPOSALS = "refs/pr/"
"""What the revisions of proposals begin with; their number follows."""
MayRead = Callable[[str, Repository | None], bool]
"""Returns whether a client may see a repository: called with its name, and its state or None if it has none."""
MAX_TAGS = 5_000
"""Tags of a repository that are listed at once for clients of the Hugging Face Hub, who know no pages of them."""
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
        is_listed: Whether the head leaves out the log of its versions, so that no commits are remembered for it.
    """

    name: str
    repository: Repository | None
    newest: VersionRow | None
    frozen: bool = False
    head: str = ""
    is_listed: bool = field(default=False, compare=False)

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
    # What is known of a repository is true until either of its two logs gets another entry.
    head = f"{state.head} {head}"
    newest = None
    if has_versions:
        newest = worker.remembered(worker.caches.rows, (name, head), lambda: worker.registry.row(Ref(name)))
    return View(name, repository, newest, head=head)


def listed_view(worker: Worker, row: VersionRow, may_read: MayRead) -> View | None:
    """Return the repository of a version that the index lists as the newest; None if it may not be seen by now.

    The version is not compared with the log, which takes a look at its entries: that is done when it is read.
    """
    head, repository = worker.repositories.current(row.name)
    if not may_read(row.name, repository) or (repository and repository.moved_to):
        return None
    newest = row if LATEST in row.tags else worker.registry.row(Ref(row.name))
    return View(row.name, repository, newest, head=head, is_listed=True)


def is_listed(worker: Worker, name: str, may_read: MayRead) -> bool:
    """Return whether lists of names have a repository, of which the index or the records know, for a client."""
    _, repository = worker.repositories.current(name)
    if repository is None or repository.is_bare:
        # A removed name may leave a record behind.
        state = queries.name(worker.registry.index, name) if repository else None
        return may_read(name, repository) and not (state and state.deleted)
    return may_read(name, repository) and not repository.moved_to


def main_id(view: View) -> str:
    """Return the id of the commit that `main` is at."""
    return head_of(view.repository, MAIN, view.latest) or view.latest or EMPTY.id


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


def source_name(view: View) -> str:
    """Return the name of a repository, and for an alias that of the repository it refers to."""
    return view.newest.name if view.newest else view.name


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
    if view.is_listed:
        return _find_uncached(worker, view, revision)
    key = view.name, view.head, revision
    commit: Commit = worker.remembered(worker.caches.commits, key, lambda: _find_uncached(worker, view, revision))
    return commit


def _find_uncached(worker: Worker, view: View, revision: str) -> Commit:
    branch = MAIN if revision in _ALIASES else revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
    if head := head_of(view.repository, branch, view.latest):
        return by_id(worker, view, head)
    if branch == MAIN:
        return version_commit(worker, view, view.newest) if view.newest else EMPTY
    if revision.startswith(PROPOSALS):
        return by_id(worker, view, _proposed_commit(view, revision))
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


def _proposed_commit(view: View, revision: str) -> str:
    """Return the id of the commit that a proposal is, or has become."""
    proposals = {} if view.frozen or view.repository is None else view.repository.proposals
    proposal = proposals.get(revision.removeprefix(PROPOSALS))
    if proposal is None:
        raise NotFoundError(f"{view.name}:{revision}", "no such proposal")
    if proposal.state != OPEN and not proposal.became:
        raise NotFoundError(f"{view.name}:{revision}", f"was {proposal.state}, and its files are gone")
    return proposal.became or proposal.commit


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
    row = (
        next(iter(queries.versions(worker.registry.index, name=view.name, digest=record.became)), None)
        if record.became
        else None
    )
    files = version_commit_without_message(worker, row).files if row else record.files
    return Commit(ident, files, row, record.title, record.description, record.author, record.time)


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


def history(worker: Worker, view: View, revision: str) -> Iterator[Commit]:
    """Yield the commits that led to a revision, the newest first, without their files; what is not asked for is not read."""
    commit: Commit | None = find(worker, view, revision)
    log, seen = _Log(worker, view), set[str]()
    while commit and commit.id not in seen:
        yield replace(commit, files={})
        seen.add(commit.id)
        commit = log.before(commit)


class _Log:
    """The order of the commits of a repository.

    A commit's document names the one before. A version that was pushed in another way has none: before it came the version with
    the number before, or a later commit that is no version's first.
    """

    def __init__(self, worker: Worker, view: View) -> None:
        self._worker, self._view = worker, view
        self._repository = view.repository or Repository()

    def before(self, commit: Commit) -> Commit | None:
        """Return the commit before another one, without its files; None for the first, and where a squash has ended it."""
        if record := self._worker.repositories.commit(self._repository, commit.id):
            return None if record.parent in ("", EMPTY.id) else self._entry(record.parent)
        if commit.row is None or self._view.frozen:
            return None
        earlier = [other for other in self._others if other[0] <= commit.row.time][-1:]
        row = queries.version_before(self._worker.registry.index, self._view.name, commit.row.number)
        if earlier and (row is None or row.time < earlier[0][0]):
            return self._entry(earlier[0][1])
        return self._entry(commit_id(row.digest)) if row else None

    def _entry(self, ident: str) -> Commit | None:
        index, record = self._worker.registry.index, self._worker.repositories.commit(self._repository, ident)
        rows = queries.versions(index, name=self._view.name, digest_prefix=f"sha256:{ident}") if self._view.newest else []
        row = rows[0] if rows else None
        if record is None:
            return Commit(ident, {}, row, f"Version v{row.number}", time=row.time) if row else None
        return Commit(ident, {}, row, record.title, record.description, record.author, row.time if row else record.time)

    @cached_property
    def _others(self) -> list[tuple[str, str]]:
        """Time and id of the commits that are no version's first, the oldest first."""
        left_out = {commit_id(digest) for digest in queries.digests(self._worker.registry.index, self._view.name)}
        # Proposals are on no branch.
        left_out.update(proposal.commit for proposal in open_proposals(self._repository).values())
        records = ((ident, self._worker.repositories.commit(self._repository, ident)) for ident in self._repository.commits)
        return sorted((record.time, ident) for ident, record in records if record and ident not in left_out)


def branches(view: View) -> dict[str, str]:
    """Return branch to commit id; `main` is always included."""
    names = [MAIN, *(name for name in (view.repository.heads if view.repository else ()) if name != MAIN)]
    return {name: head_of(view.repository, name, view.latest) or main_id(view) for name in names}


def tags(worker: Worker, view: View) -> dict[str, str]:
    """Return tag to commit id, sorted: with numbers such as `v3`, without `latest`, which is `main`, and names of branches.

    Of a repository with more, the first MAX_TAGS tags, and as many numbers, the newest.
    """
    if view.newest is None:
        return {}
    if view.frozen:
        return {f"v{view.newest.number}": commit_id(view.newest.digest)}
    reserved = {LATEST, *(view.repository.heads if view.repository else ())}
    digests = queries.digests_by_tag(worker.registry.index, view.name, MAX_TAGS)
    return {tag: commit_id(digest) for tag, digest in sorted(digests.items()) if tag not in reserved}


def has_tag(worker: Worker, view: View, tag: str) -> bool:
    """Return whether a repository has a tag, or a version with such a number."""
    try:
        row_of(worker, view, tag)
    except NotFoundError:
        return False
    return True
