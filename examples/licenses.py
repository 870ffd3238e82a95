"""The data of the demo: license texts from a pinned package, the same bytes on every machine.

Usage: python examples/licenses.py OUT

Writes OUT/train.jsonl and OUT/heldout.jsonl, one {"text", "source"} a line. The texts are those of choosealicense.com, by which
the package `identify` recognizes licenses; other texts than expected are refused by their digest.

Licenses quote each other, and the perplexity of a text that was half read in training proves little. So a text that nearly
repeats a longer one is left out, and texts that share passages are one cluster, which is trained on or held out as a whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE = "identify==2.6.20"
DIGEST = "sha256:1d19a78ece0f7c4740339bd557faa57a9d246bb9d6ce56b73b68ebe15e8804a8"
PASSAGE = 8  # words in a row that are no coincidence
SIMILAR = 0.6  # share of the passages of both from which two texts count as one
LINKED = 0.02  # share of the passages of the shorter from which two texts are in one cluster

Passages = frozenset[str]


def main(out: Path) -> None:
    """Read, leave out what nearly repeats, split, write, and show the counts."""
    texts = license_texts()
    passages = {name: passages_of(text) for name, text in texts.items()}
    train, heldout = split(distinct(passages), passages)
    out.mkdir(parents=True, exist_ok=True)
    for part, names in (("train", train), ("heldout", heldout)):
        lines = [json.dumps({"text": texts[name], "source": name}, ensure_ascii=False) for name in names]
        (out / f"{part}.jsonl").write_bytes("".join(line + "\n" for line in lines).encode())
        characters = sum(len(texts[name]) for name in names)
        print(f"{part:8} {len(names):2} texts  {characters:7,} characters  about {characters // 4:6,} tokens")
    share = overlap(train, heldout, passages)
    print(f"of the runs of {PASSAGE} words in the held-out texts {share:.1%} are in the training texts")


def license_texts() -> dict[str, str]:
    """Return the texts by their SPDX names; ends here if they are not those that are expected."""
    hint = f"pip install {PACKAGE}"
    try:
        from identify.vendor.licenses import LICENSES
    except ImportError:
        sys.exit(f"error: the license texts are in a package that is not installed; {hint}")
    texts = {str(name): str(text) for name, text in sorted(LICENSES)}
    digest = f"sha256:{hashlib.sha256(json.dumps(texts).encode()).hexdigest()}"
    if digest != DIGEST:
        sys.exit(f"error: the installed license texts are others, {digest}; {hint}")
    return texts


def passages_of(text: str) -> Passages:
    """Return every run of PASSAGE words, without regard to case and punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return frozenset(" ".join(words[start : start + PASSAGE]) for start in range(len(words) - PASSAGE + 1))


def distinct(passages: Mapping[str, Passages]) -> list[str]:
    """Return the names without those of texts that nearly repeat a longer one, in order."""
    distinct_names: list[str] = []
    for name in sorted(passages, key=lambda name: (-len(passages[name]), name)):
        name_passages = passages[name]
        if name_passages and all(
            len(name_passages & passages[distinct_name]) < SIMILAR * len(name_passages | passages[distinct_name])
            for distinct_name in distinct_names
        ):
            distinct_names.append(name)
    return sorted(distinct_names)


def split(names: Sequence[str], passages: Mapping[str, Passages]) -> tuple[list[str], list[str]]:
    """Return the names of the largest cluster, to train on, and all others, to hold out."""
    by_size = sorted(clusters(names, passages), key=lambda cluster: -sum(len(passages[name]) for name in cluster))
    return sorted(by_size[0]), sorted(name for cluster in by_size[1:] for name in cluster)


def clusters(names: Sequence[str], passages: Mapping[str, Passages]) -> list[list[str]]:
    """Return groups of names: two texts are in one if they share passages, or each does with a third."""
    groups: list[list[str]] = []
    for name in names:
        linked = [cluster for cluster in groups if any(is_linked(passages[name], passages[member]) for member in cluster)]
        groups = [cluster for cluster in groups if cluster not in linked]
        groups.append([member for cluster in linked for member in cluster] + [name])
    return groups


def is_linked(first: Passages, second: Passages) -> bool:
    """Return whether two texts share more passages than licenses must."""
    return len(first & second) >= LINKED * min(len(first), len(second))


def overlap(train: Sequence[str], heldout: Sequence[str], passages: Mapping[str, Passages]) -> float:
    """Return the share of the passages of held-out texts that training texts have too."""
    train_passages = frozenset().union(*(passages[name] for name in train))
    return sum(len(passages[name] & train_passages) for name in heldout) / sum(len(passages[name]) for name in heldout)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
