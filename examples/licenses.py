"""A small data set that every Python environment carries: the license texts of its installed packages.

Usage: python examples/licenses.py OUT

Writes OUT/train.jsonl and OUT/heldout.jsonl, one {"text", "source"} a line. Texts that nearly repeat another one
(Apache-2.0 lies in half of all packages) are kept once; the split is by document and depends on nothing but the
texts, so the same environment gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

NAMES = re.compile(r"(licen[cs]e|copying|notice|copyright|third[-_]?party)", re.IGNORECASE)
CODE = {".py", ".pyc", ".pyi", ".so", ".json", ".js", ".html", ".h", ".hpp", ".png"}
SHORTEST, LONGEST = 300, 24_000  # characters; one huge bundle of notices must not be the whole corpus
SHINGLE = 5  # words
SIMILAR = 0.6  # share of common shingles from which two texts count as one


def main(out: Path) -> None:
    """Collect, drop near-duplicates, split, write, and say what there is."""
    documents = distinct(license_files())
    heldout = heldout_of(documents)
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", False), ("heldout", True)):
        kept = [document for document in documents if (document in heldout) == chosen]
        lines = [json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) for document in kept]
        (out / f"{name}.jsonl").write_bytes("".join(line + "\n" for line in lines).encode())
        characters = sum(len(document.text) for document in kept)
        print(f"{name:8} {len(kept):3} documents  {characters:7,} characters  about {characters // 4:6,} tokens")


@dataclass(frozen=True)
class Document:
    """One text; `shingles` are the digests of every run of five words in it."""

    text: str
    source: str
    shingles: frozenset[int] = field(compare=False)


def license_files() -> list[tuple[str, str]]:
    """`(source, text)` of every license file of every installed distribution, in an order that doesn't vary."""
    found = []
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            if NAMES.search(file.name) and file.suffix.lower() not in CODE:
                path = Path(str(distribution.locate_file(file)))
                text = normalize(path)
                if text:
                    found.append((f"{distribution.metadata['Name']}/{file.name}", text))
    return sorted(set(found))


def normalize(path: Path) -> str | None:
    """The text with plain line ends and no trailing blanks, or None if it isn't a license-sized UTF-8 text."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\f", "\n").split("\n")]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
    return text[:LONGEST] if len(text) >= SHORTEST else None


def distinct(found: list[tuple[str, str]]) -> list[Document]:
    """The texts without those that nearly repeat a longer one, by source."""
    kept: list[Document] = []
    for source, text in sorted(found, key=lambda item: (-len(item[1]), item)):
        document = Document(text, source, shingles_of(text))
        if document.shingles and all(jaccard(document.shingles, other.shingles) < SIMILAR for other in kept):
            kept.append(document)
    return sorted(kept, key=lambda document: (document.source, document.text))


def heldout_of(documents: list[Document]) -> set[Document]:
    """Documents with about a seventh of all characters, drawn by the digests of their texts.

    None of them largely stands in another document too:
    a license quoted in full within a bundle of notices would be learned by heart, and prove nothing.
    """
    own = [
        document
        for document in documents
        if all(
            len(document.shingles & other.shingles) < SIMILAR * len(document.shingles)
            for other in documents
            if other != document
        )
    ]
    own.sort(key=lambda document: hashlib.sha256(document.text.encode()).digest())
    heldout: set[Document] = set()
    left = sum(len(document.text) for document in documents) // 7
    for document in own:
        if len(document.text) <= left or not heldout:
            heldout.add(document)
            left -= len(document.text)
    return heldout


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Shared over all."""
    return len(one & other) / len(one | other)


def shingles_of(text: str) -> frozenset[int]:
    """Digests of every run of five words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    runs = (" ".join(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1))
    return frozenset(int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest()) for run in runs)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
