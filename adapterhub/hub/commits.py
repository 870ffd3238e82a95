"""The commits of a repository, as clients of the Hugging Face Hub see them.

A version is a commit whose id is the first 40 digits of its digest, so that a revision names the same bytes as everywhere else.
A tree that is no whole adapter yet, as when the README comes first, is a commit with a document of its own. `main` is at the
newest version, or at a commit that was made after it. An alias (`aliases`) is a repository with one version, which is `main`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adapterhub.digest import Digest, is_hex
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.ref import LATEST, Ref, RefError, is_name
from adapterhub.registry.repositories import MAIN, CommitRecord, Repository, commit_id, head_of
from adapterhub.registry.versions import find_exact_row
from adapterhub_converters.errors import NotFoundError

from . import aliases, origins
from .aliases import Alias
from .workers import MOST_FILES, Worker

HEAD = "HEAD"
MayRead = Callable[[str, Repository | None], bool]
"""Whether somebody may see the repository of a name, by its state; None for one that only has versions, or for none."""
_MOST = 2_000  # repositories that a thread remembers, and commits of each
_NONE = "-"  # the name of no repository
_ALIASES = {MAIN, HEAD, ""}


@dataclass(frozen=True)
class Commit:
    """One state of a repository.

    Attributes:
        id: 40 hexadecimal digits.
        files: Path to digest and size in bytes, sorted.
        row: The version that it is; None for a tree that is no adapter yet.
    """

    id: str
    files: Mapping[str, tuple[Digest, int]]
    row: Row | None = None
    title: str = ""
    description: str = ""
    author: str = ""
    time: str = ""


EMPTY = Commit("0" * 40, {}, title="initial commit")
"""Of a repository that nothing was pushed to."""


@dataclass(frozen=True)
class View:
    """A repository that exists, as it is now.

    Attributes:
        name: Its name.
        repository: Its state; None if it only has versions.
        newest: Its version `latest`.
        frozen: It is an alias: `newest`, which is a version of another repository, is all that it has.
        head: Tells this state from any other one of this name.
        found: The commits that were looked up, by revision.
    """

    name: str
    repository: Repository | None
    newest: Row | None
    frozen: bool = False
    head: str = ""
    found: dict[str, Commit] = field(default_factory=dict, compare=False, repr=False)

    @property
    def latest(self) -> str:
        """The commit of the version `latest`; empty without versions."""
        return commit_id(self.newest.digest) if self.newest else ""


def view(worker: Worker, name: str, may_read: MayRead = lambda _name, _repository: True) -> View | None:
    """Look a repository up; None if there is none, if it may not be seen, and for a text that cannot be a name.

    One that may not be seen takes the same lookups as one that does not exist: the time of an answer tells nobody which it is.
    """
    if not is_name(name):
        return None
    head, repository = worker.repositories.current(name)
    seen = may_read(name, repository)
    state = worker.registry.ledger.current(name if seen else f"{name.partition('/')[0]}/{_NONE}")
    if state.deleted and repository and repository.is_bare:
        repository = None  # it only says how private the name was
    there = state.seq > 0 and not state.deleted and state.number > 0 and not (repository and repository.moved_to)
    if not seen or not (repository or there):
        alias = aliases.parse(name)
        return _frozen(worker, name, alias, may_read) if alias else None
    # What is known of a repository holds until one of its two logs has another entry.
    before, known = worker.views.get(name, (None, None))
    if known is None or before != state or known.repository is not repository:
        row = worker.registry.row(Ref(name)) if there else None
        known = View(name, repository, row, head=f"{state.head} {head}")
        if len(worker.views) >= _MOST:
            worker.views.clear()
        worker.views[name] = state, known
    return known


def is_arriving(worker: Worker, name: str, repository: Repository | None) -> bool:
    """Whether a repository is being moved here, and is still under its old name for all who read."""
    if repository is None or not repository.moved_from:
        return False
    old = worker.repositories.get(repository.moved_from)
    return old is None or old.moved_to != name


def _frozen(worker: Worker, name: str, alias: Alias, may_read: MayRead) -> View | None:
    of = view(worker, alias.name, may_read)
    if of is None or of.frozen or of.newest is None or alias.form:
        return None
    try:
        return frozen(name, of, worker.registry.row(Ref(alias.name, number=alias.number)))
    except NotFoundError:
        return None


def frozen(name: str, of: View, row: Row) -> View:
    """A repository that has nothing but a version of another one, or a form of it, and is as private."""
    state = Repository(private=bool(of.repository and of.repository.private), created=row.time)
    return View(name, state, row, frozen=True, head=f"{of.head} {row.digest}")


def rows(worker: Worker, of: View) -> Sequence[Row]:
    """The versions of a repository, the newest first."""
    if of.newest is None:
        return ()
    return (of.newest,) if of.frozen else queries.versions(worker.registry.index, name=of.name)


def row_of(worker: Worker, of: View, reference: str) -> Row:
    """The version that a tag, a number like `v3` or a whole digest names; NotFoundError without it."""
    if of.frozen and of.newest:
        if reference in (LATEST, f"v{of.newest.number}", of.newest.digest):
            return of.newest
    elif of.newest:
        text = f"{of.name}{'@' if reference.startswith('sha256:') else ':'}{reference}"
        try:
            return find_exact_row(worker.registry.ledger, Ref.parse(text))
        except RefError:
            pass
    raise NotFoundError(f"{of.name}:{reference}", "no such version")


def find(worker: Worker, of: View, revision: str) -> Commit:
    """The commit that a revision names: a branch, a tag, a number like `v3`, an id, a digest or a range.

    Raises:
        NotFoundError: There is none.
    """
    found = of.found.get(revision)
    if found is None:
        if len(of.found) >= _MOST:
            of.found.clear()
        found = _find(worker, of, revision)
        if len(found.files) <= MOST_FILES:
            of.found[revision] = found
    return found


def _find(worker: Worker, of: View, revision: str) -> Commit:
    branch = MAIN if revision in _ALIASES else revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
    if head := head_of(of.repository, branch, of.latest):
        return by_id(worker, of, head)
    if branch == MAIN:
        return of_version(worker, of, of.newest) if of.newest else EMPTY
    if is_hex(branch, 40):
        return by_id(worker, of, branch)
    if of.frozen:
        return of_version(worker, of, row_of(worker, of, branch))
    try:
        text = f"@{branch}" if branch.startswith("sha256:") else f":{branch}"
        return of_version(worker, of, worker.registry.row(Ref.parse(f"{of.name}{text}")))
    except RefError as error:
        raise NotFoundError(f"{of.name}:{revision}", "no such revision") from error


def by_id(worker: Worker, of: View, ident: str) -> Commit:
    """The commit with an id, or with that of the upstream that it was mirrored from; NotFoundError without it."""
    if of.frozen:
        found = [row for row in rows(worker, of) if commit_id(row.digest) == ident]
    else:
        found = queries.versions(worker.registry.index, name=of.name, digest_prefix=f"sha256:{ident}") if of.newest else []
    if found:
        return of_version(worker, of, found[0])
    if ident == EMPTY.id and not of.newest:
        return EMPTY
    record = worker.repositories.commit(of.repository, ident) if of.repository else None
    if record is None and of.newest and not of.frozen and (origin := origins.find(worker.database, of.name, ident)):
        return replace(of_version(worker, of, row_of(worker, of, origin)), id=ident)
    if record is None:
        raise NotFoundError(f"{of.name}@{ident}", "no such commit")
    return Commit(ident, record.files, None, record.title, record.description, record.author, record.time)


def of_version(worker: Worker, of: View, row: Row) -> Commit:
    """The commit of a version."""
    found, record = without_words(worker, row), _record(worker, of, row)
    if record is None:
        return found
    return replace(found, title=record.title, description=record.description, author=record.author)


def without_words(worker: Worker, row: Row) -> Commit:
    """The commit of a version, but not who committed it with which words: these are in a document of their own."""
    files = {layer.path: (layer.digest, layer.size) for layer in worker.manifest(row).layers}
    return Commit(commit_id(row.digest), files, row, f"Version v{row.number}", time=row.time)


def _record(worker: Worker, of: View, row: Row) -> CommitRecord | None:
    """Who committed a version, and with which words; None for one that was pushed in another way."""
    return worker.repositories.commit(of.repository, commit_id(row.digest)) if of.repository else None


def history(worker: Worker, of: View, revision: str) -> Iterator[Commit]:
    """The commits of a branch, or up to a commit, the newest first; without their files, of which there may be millions."""
    first = find(worker, of, revision)
    trees = (by_id(worker, of, ident) for ident in reversed([*of.repository.commits] if of.repository else []))
    others = [replace(commit, files={}) for commit in trees if commit.row is None]
    versions = [replace(of_version(worker, of, row), files={}) for row in rows(worker, of)]
    commits = sorted([*versions, *others], key=lambda commit: commit.time, reverse=True)
    same = {first.id, commit_id(first.row.digest) if first.row else ""}  # two, if it was asked for as the upstream names it
    yield first
    yield from (commit for commit in commits if commit.id not in same and commit.time <= (first.time or "~"))


def branches(of: View) -> dict[str, str]:
    """Branch to commit id; `main` always is one."""
    names = [MAIN, *(name for name in (of.repository.heads if of.repository else ()) if name != MAIN)]
    return {name: head_of(of.repository, name, of.latest) or of.latest or EMPTY.id for name in names}


def tags(worker: Worker, of: View) -> dict[str, str]:
    """Tag to commit id, numbers like `v3` among them, without `latest`, which is `main`, and without the names of branches."""
    others = {LATEST, *(of.repository.heads if of.repository else ())}
    found = {}
    for row in rows(worker, of):
        for tag in (f"v{row.number}", *(() if of.frozen else row.tags)):
            if tag not in others:
                found[tag] = commit_id(row.digest)
    return dict(sorted(found.items()))
