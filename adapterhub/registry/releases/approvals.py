"""Approvals of one version for one tag: who gave them, counted as people.

An account of a hub is a person, and so is a key or an identity; one who approved by both is one person. The author that a local
log names is what a program wrote: it can only take an approval away, as that of somebody who has pushed the version.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.manifest import release_statement
from adapterhub.store.ref_log import Entry
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.identity import Identity
    from adapterhub.trust.keys import TrustedSigner

_MAX_SHOWN = 5  # people in a line


@dataclass(frozen=True, slots=True)
class Subject:
    """What an approval is about: a version of a name, for a tag."""

    name: str
    number: int
    digest: Digest
    tag: str


@dataclass(frozen=True, slots=True)
class Person:
    """Who approved.

    Attributes:
        keys: Ids of the keys, or identities, that signed.
        accounts: Accounts of the hub by which they were logged in.
        authors: The authors of the entries, as their programs name them.
        titles: Accounts, files of keys and identities, for people.
        entries: The numbers of the log entries.
    """

    keys: frozenset[str]
    accounts: frozenset[str]
    authors: frozenset[str]
    titles: tuple[str, ...]
    entries: tuple[int, ...]

    def is_same(self, other: Person) -> bool:
        """Return whether two approvals are by one person: they share a key or an account."""
        return bool(self.keys & other.keys or self.accounts & other.accounts)

    def joined(self, other: Person) -> Person:
        """Return one person for two who are the same."""
        return Person(
            self.keys | other.keys,
            self.accounts | other.accounts,
            self.authors | other.authors,
            tuple(dict.fromkeys((*self.titles, *other.titles))),
            (*self.entries, *other.entries),
        )


@dataclass(frozen=True, slots=True)
class ApprovalCount:
    """The people whose approvals count, and the reasons why others do not.

    Attributes:
        excluded: How many of the people do not count, though it is not known which.
    """

    people: tuple[Person, ...]
    rejected: tuple[str, ...] = ()
    excluded: int = 0

    @property
    def total(self) -> int:
        """How many approvals count."""
        return max(0, len(self.people) - self.excluded)

    def without_unknown_mover(self) -> ApprovalCount:
        """Return the count where a program moves the tag: any one of the people may be the one who runs it."""
        return replace(self, rejected=(*self.rejected, "one of them, as a program moves the tag"), excluded=1)

    def without(self, authors: Collection[str], keys: Collection[str]) -> ApprovalCount:
        """Return the count without the people who have one of these accounts, author names or keys."""
        others, rejected = [], list(self.rejected)
        for person in self.people:
            if person.keys & set(keys) or (person.accounts | person.authors) & set(authors):
                by = ", ".join(sorted((person.accounts | person.authors) & set(authors) - {person.titles[0]}))
                reason = f"of {by}, who pushed, signed or moves it" if by else "pushed, signed or moves it"
                rejected.append(f"{person.titles[0]} ({reason})")
            else:
                others.append(person)
        return ApprovalCount(tuple(others), tuple(rejected))

    def text(self, needed: int) -> str:
        """Return the count for people."""
        names = ", ".join(person.titles[0] for person in self.people[:_MAX_SHOWN])
        reasons = f"; not counted: {', '.join(self.rejected[:_MAX_SHOWN])}" if self.rejected else ""
        return f"{self.total} of {needed}{f': {names}' if names else ''}{reasons}"

    @property
    def places(self) -> str:
        """Where the approvals are, for people."""
        numbers = sorted(number for person in self.people for number in person.entries)
        return f"log entr{'y' if len(numbers) == 1 else 'ies'} {', '.join(map(str, numbers))}" if numbers else ""


def count(entries: Iterable[Entry], subject: Subject, approvers: Sequence[Path | Identity]) -> ApprovalCount:
    """Count the people who approved a version for a tag.

    Args:
        entries: The log of its name.
        subject: The version and the tag.
        approvers: Files or folders of public keys, and identities, whose signatures count.

    Raises:
        AdapterhubError: The keys cannot be read.
    """
    people: list[Person] = []
    rejected: list[str] = []
    signers: Sequence[TrustedSigner] | None = None
    for entry in entries:
        about = (entry.op, entry.number, entry.digest, subject.tag in entry.tags)
        if about != ("approve", subject.number, subject.digest, True):
            continue
        statement = release_statement.parse(entry.message)
        accounts = frozenset({statement.account} if statement.account and statement.account == entry.author else ())
        keys, titles = frozenset[str](), [*sorted(accounts)]
        if statement.bundle:
            if signers is None:
                from adapterhub.trust.keys import read_trusted  # needs cryptography

                signers = read_trusted(approvers)
            try:
                signer = _signer(statement.bundle.encode(), signers, subject)
                keys, titles = frozenset({signer.id}), [*titles, Path(signer.source).name]
            except AdapterhubError as error:
                rejected.append(error.what)
        if not titles:
            continue
        person = Person(keys, accounts, frozenset({entry.author} - {""}), tuple(titles), (entry.seq,))
        for same_person in [earlier for earlier in people if earlier.is_same(person)]:
            people.remove(same_person)
            person = same_person.joined(person)
        people.append(person)
    return ApprovalCount(tuple(people), tuple(dict.fromkeys(rejected)))


def _signer(raw: bytes, signers: Sequence[TrustedSigner], subject: Subject) -> TrustedSigner:
    from adapterhub.trust import release_claims

    claim = release_claims.APPROVAL
    return release_claims.verify(raw, claim, signers, name=subject.name, digest=subject.digest, tag=subject.tag)


def file_signers(
    signatures: Iterable[bytes], files: Mapping[str, Digest], signers: Sequence[Path | Identity], name: str
) -> set[str]:
    """Return the ids of those among `signers` who signed the files of a version."""
    from adapterhub.trust import bundle
    from adapterhub.trust.keys import read_trusted  # needs cryptography

    trusted, ids = read_trusted(signers), set[str]()
    for raw in signatures:
        with suppress(AdapterhubError):
            signed = bundle.verify(raw, trusted, name)
            ids |= {signed.signer.id} if signed.statement.files == files else set()
    return ids
