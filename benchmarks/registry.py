"""A registry of 50,000 versions of 10,000 adapters: what finding something in it and adding to it takes.

    python benchmarks/registry.py [--versions 50000] [--runs 15] [--keep FOLDER]

The store is written directly, blob by blob and log by log, without flushing; the adapters share one tiny file of weights and
differ in facts and model cards, whose words are drawn as words are in texts (Zipf). The catalog is then made from it by its
own rebuild. Medians of calls of the library and of whole processes, in wall and in CPU time (on a busy machine only the
second means much), and against them what anybody would write with plain `sqlite3` on the same texts: one table with
LIKE, and one FTS5 table without facts, filters or versions.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas"), str(ROOT / "benchmarks")]

from _pairs import timed  # noqa: E402

from adapterhub.digest import sha256_bytes  # noqa: E402
from adapterhub.index import queries, search  # noqa: E402
from adapterhub.index.search import Query  # noqa: E402
from adapterhub.manifest import describe, oci_manifest  # noqa: E402
from adapterhub.ref import Ref  # noqa: E402
from adapterhub.registry.registry import Registry  # noqa: E402
from adapterhub.store.store import Entry, Store  # noqa: E402
from tests.support.adapters import write_adapter  # noqa: E402

SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
BASES = [f"org{n % 7}/model-{n}-{size}b" for n in range(20) for size in (1, 7)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PER_NAME = 5


def vocabulary(rng: random.Random) -> list[str]:
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]


def cards(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Model card and what is declared, of one adapter after the other."""
    rng = random.Random(0)
    known = vocabulary(rng)
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    for n in range(count):
        text = rng.choices(known, weights, k=200)
        title, description = " ".join(text[:4]), " ".join(text[4:20])
        base, spdx = rng.choice(BASES), rng.choice(["mit", "apache-2.0", "llama3"])
        front = f"---\nlicense: {spdx}\nlanguage:\n- {rng.choice(['en', 'de', 'fr'])}\ntags: [lora, {text[20]}]\n---\n"
        declared = {"description": description, "r": rng.choice([4, 8, 16, 32]), "base": base, "loss": rng.random()}
        yield (
            f"{front}# {title} {n}\n\n{' '.join(text)}\n",
            {**declared, "targets": sorted(rng.sample(TARGETS, rng.randint(2, 7)))},
        )


def fill(store: Store, count: int, scratch: Path) -> None:
    """`count` versions, PER_NAME to a name, put where the store looks for them."""
    folder = write_adapter(scratch / "tiny")
    template = describe.describe(folder)
    shared = {path: (folder / path).read_bytes() for path in ("adapter_config.json", "adapter_model.safetensors")}
    blobs = store.root / "blobs" / "sha256"

    def put(data: bytes) -> tuple[str, int]:
        digest = sha256_bytes(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return digest, len(data)

    common = {path: put(data) for path, data in shared.items()}
    head = ""
    for n, (card, declared) in enumerate(cards(count)):
        name, number = f"team{n // PER_NAME % 100:02}/adapter-{n // PER_NAME}", n % PER_NAME + 1
        files = {**common, "README.md": put(card.encode())}
        document = {
            **template,
            "description": declared["description"],
            "r": declared["r"],
            "targets": declared["targets"],
            "base": {**template["base"], "repo": declared["base"]},
            "training": {"metrics": {"eval_loss": declared["loss"]}},
            "files": [{"path": path, "digest": digest, "size": size} for path, (digest, size) in sorted(files.items())],
        }
        files[oci_manifest.FACTS] = put(describe.dump(document))
        made = oci_manifest.assemble(files, document)
        put(made.config_bytes)
        put(made.raw)
        previous = head if number > 1 else ""
        made_at = f"2026-01-{n % 28 + 1:02}T00:00:00Z"
        entry = Entry(name, number, "push", made_at, made.digest, len(made.raw), number, ("latest",), previous)
        path = store.log.path(name, number)
        if number == 1:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.dump())
        head = sha256_bytes(entry.dump())


@dataclass(frozen=True)
class Cost:
    """Medians in milliseconds."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:9.2f}{self.cpu:9.2f}"


def cost(call: Callable[[], Any], runs: int, *, whose: int = resource.RUSAGE_SELF) -> Cost:
    """What a call takes, after one that isn't counted; `whose` CPU time."""
    call()
    taken = []
    for _ in range(runs):
        before, start = resource.getrusage(whose), time.perf_counter()
        call()
        wall, after = time.perf_counter() - start, resource.getrusage(whose)
        taken.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return Cost(*(1000 * statistics.median(column) for column in zip(*taken, strict=True)))


def words() -> list[str]:
    """Of the vocabulary, what begins no other word."""
    return [word for word in vocabulary(random.Random(0)) if len(word) > 6]


def plain(path: Path, registry: Registry) -> sqlite3.Connection:
    """The same texts as anybody would keep them: a table, and an FTS5 table."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE cards (name TEXT, text TEXT)")
    db.execute("CREATE VIRTUAL TABLE words USING fts5 (name, text)")
    texts = registry.index.select("SELECT name, title || ' ' || description || ' ' || facts || ' ' || card FROM texts")
    for table in ("cards", "words"):
        db.executemany(f"INSERT INTO {table} VALUES (?, ?)", texts)
    db.commit()
    return db


def library(registry: Registry, peer: sqlite3.Connection, runs: int) -> None:
    catalog, some = registry.index, words()
    like = "SELECT name FROM cards WHERE text LIKE ? LIMIT 20"
    match = "SELECT name FROM words WHERE words MATCH ? ORDER BY rank LIMIT 20"
    print(f"{'in the library, ms of wall and CPU time':40}{'hits':>8}{'ours':>18}{'FTS5 alone':>18}{'LIKE':>18}")
    for title, typed in [
        ("a rare word", some[5000]),
        ("a word", some[500]),
        ("two words", f"{some[100]} {some[200]}"),
        ("a frequent word", some[50]),
        ("a name", "adapter-471"),
        ("a word that all have", "lora"),
    ]:
        phrases, total = search.phrases(typed), search.search(catalog, Query(typed, all_versions=True)).total
        ours = cost(lambda typed=typed: search.search(catalog, Query(typed)), runs)
        fts = cost(lambda phrases=phrases: peer.execute(match, (phrases,)).fetchall(), runs)
        scan = cost(lambda typed=typed: peer.execute(like, (f"%{typed}%",)).fetchall(), 3)
        print(f"{title:40}{total:8}{ours}{fts}{scan}")
    one = catalog.select("SELECT digest FROM files WHERE path = 'README.md' LIMIT 1")[0][0]
    for title, call in [
        ("a word, a base", lambda: search.search(catalog, Query(some[500], (("base", BASES[3]),)))),
        ("a word, with facets", lambda: search.search(catalog, Query(some[500]), facets=True)),
        ("everything, newest first", lambda: search.search(catalog, Query())),
        ("everything, with facets", lambda: search.search(catalog, Query(), facets=True)),
        ("find a digest", lambda: search.holders(catalog, one)),
        ("list a name", lambda: registry.list("team07/adapter-7")),
        ("list a namespace", lambda: registry.list("team07")),
        ("list all", registry.list),
    ]:
        print(f"{title:48}{cost(call, min(runs, 5))}")


def processes(root: Path, runs: int) -> None:
    word = words()[500]
    env = {"ADAPTERHUB_REGISTRY": str(root), "PYTHONPATH": f"{ROOT}:{ROOT / 'converters'}:{ROOT / 'schemas'}"}
    print(f"\n{'as processes':48}{'wall':>9}{'CPU':>9}")
    for args in (["--version"], ["search", word], ["search", word, "--json"], ["list", "team07"], ["show", "team07/adapter-7"]):
        command = [sys.executable, "-m", "adapterhub", *args]
        taken = cost(lambda command=command: timed(command, env=env), runs, whose=resource.RUSAGE_CHILDREN)
        print(f"{'adapterhub ' + ' '.join(args):48}{taken}")


def pushes(registry: Registry, scratch: Path, runs: int) -> None:
    print(f"\n{'in the library':48}{'wall':>9}{'CPU':>9}")
    folders = iter([write_adapter(scratch / f"push{n}", n) for n in range(1, runs + 2)])
    name = f"team07/new-{len(queries.names(registry.index))}"
    print(f"{'push a tiny adapter':48}{cost(lambda: registry.push(next(folders), Ref.parse(name)), runs)}")
    tags = iter([f"t{n}" for n in range(runs + 1)])
    print(f"{'tag':48}{cost(lambda: registry.tag(Ref.parse(name), next(tags)), runs)}")

    def anew() -> None:
        registry.store.index_file.write(queries.ref_lines(registry.index))

    print(f"{'index.json made anew, as each push did once':48}{cost(anew, min(runs, 5))}")
    size = (registry.store.root / "index.json").stat().st_size
    print(f"index.json has {size / 1e6:.1f} MB, registry.db {(registry.root / 'registry.db').stat().st_size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=50_000)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--keep", type=Path, help="keep the registry in this folder, or use the one that is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        scratch = Path(temporary)
        root = given.keep or scratch / "registry"
        if not (root / ".adapterhub" / "oci-layout").exists():
            start = time.perf_counter()
            fill(Store.create(root / ".adapterhub"), given.versions, scratch)
            print(f"wrote a store of {given.versions} versions in {time.perf_counter() - start:.0f} s")
        start = time.perf_counter()
        registry = stack.enter_context(Registry.open(root))
        if time.perf_counter() - start > 1:
            print(f"made the catalog from it in {time.perf_counter() - start:.0f} s")
        library(registry, stack.enter_context(contextlib.closing(plain(scratch / "plain.db", registry))), given.runs)
        processes(root, given.runs)
        pushes(registry, scratch, given.runs)


if __name__ == "__main__":
    main()
