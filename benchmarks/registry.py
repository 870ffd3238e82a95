"""A registry of 50,000 versions of 10,000 adapters: the cost of finding something in it and of adding to it.

    python benchmarks/registry.py [--versions 50000] [--rounds 15] [--dir DIR]

The store is written directly, blob by blob and log by log, without flushing; the adapters share one tiny file of weights and
differ in facts and model cards, whose words are drawn as words are in texts (Zipf). The catalog is then made from it by its
own rebuild. Medians of calls of the library and of whole processes, in wall and in CPU time (on a busy machine only the
second means much), against what anybody would write with plain `sqlite3` on the same texts: one table with LIKE, and one
FTS5 table without facts, filters or versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _bench import OURS, Bench, Figures, Program, main, medians

from adapterhub.digest import sha256_bytes
from adapterhub.index import queries, version_search
from adapterhub.index.version_search import Query
from adapterhub.manifest import derive, oci_manifest
from adapterhub.manifest.document import FileEntry, Training
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Entry, Store
from adapterhub_converters.adapter_files import ADAPTER_JSON
from tests.support.adapters import write_adapter

SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
BASES = [f"org{n % 7}/model-{n}-{size}b" for n in range(20) for size in (1, 7)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PER_NAME = 5


def vocabulary(rng: random.Random) -> list[str]:
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]


def cards(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The model card and the declared facts of one adapter after the other."""
    rng = random.Random(0)
    word_list = vocabulary(rng)
    weights = [1 / rank for rank in range(1, len(word_list) + 1)]
    for n in range(count):
        text = rng.choices(word_list, weights, k=200)
        title, description = " ".join(text[:4]), " ".join(text[4:20])
        base, terms = rng.choice(BASES), rng.choice(["mit", "apache-2.0", "llama3"])
        front = f"---\nlicense: {terms}\nlanguage:\n- {rng.choice(['en', 'de', 'fr'])}\ntags: [lora, {text[20]}]\n---\n"
        declared = {"description": description, "r": rng.choice([4, 8, 16, 32]), "base": base, "loss": rng.random()}
        yield (
            f"{front}# {title} {n}\n\n{' '.join(text)}\n",
            {**declared, "targets": sorted(rng.sample(TARGETS, rng.randint(2, 7)))},
        )


def filled(root: str, count: int) -> None:
    """A registry of `count` versions, PER_NAME to a name, put where the store looks for them."""
    store, folder = Store(Path(root) / ".adapterhub"), write_adapter(Path(root) / "tiny")
    store.create()
    template = derive.describe(folder)
    shared = {path: (folder / path).read_bytes() for path in ("adapter_config.json", "adapter_model.safetensors")}
    blobs = store.root / "blobs" / "sha256"

    def put_blob(data: bytes) -> tuple[str, int]:
        digest = sha256_bytes(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return digest, len(data)

    common = {path: put_blob(data) for path, data in shared.items()}
    head = ""
    for n, (card, declared) in enumerate(cards(count)):
        name, number = f"team{n // PER_NAME % 100:02}/adapter-{n // PER_NAME}", n % PER_NAME + 1
        files = {**common, "README.md": put_blob(card.encode())}
        manifest = dataclasses.replace(
            template,
            description=declared["description"],
            r=declared["r"],
            targets=tuple(declared["targets"]),
            base=dataclasses.replace(template.base, repo=declared["base"]),
            training=Training(metrics={"eval_loss": declared["loss"]}),
            files=tuple(FileEntry(path, digest, size) for path, (digest, size) in sorted(files.items())),
        )
        files[ADAPTER_JSON] = put_blob(manifest.dump())
        assembled = oci_manifest.assemble(files, manifest)
        put_blob(assembled.config_bytes)
        put_blob(assembled.raw)
        previous = head if number > 1 else ""
        made_at = f"2026-01-{n % 28 + 1:02}T00:00:00Z"
        entry = Entry(name, number, "push", made_at, assembled.digest, len(assembled.raw), number, ("latest",), previous)
        path = store.log.path(name, number)
        if number == 1:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.dump())
        head = sha256_bytes(entry.dump())


WORDS = ["a rare word", "a word", "two words", "a frequent word", "a name", "a word that all versions contain"]
CALLS = [
    "find a word on a base", "find a word, with facets", "list everything, newest first", "list everything, with facets",
    "find a digest", "list a name", "list a namespace", "list all", "push a tiny adapter", "tag", "write index.json anew",
]  # fmt: skip
COMMANDS = {
    "adapterhub --version": ["--version"],
    "adapterhub search": ["search", "WORD"],
    "adapterhub search --json": ["search", "WORD", "--json"],
    "adapterhub list": ["list", "team07"],
    "adapterhub show": ["show", "team07/adapter-7"],
}
FTS, LIKE = "FTS5 alone", "LIKE"
JOBS: dict[str, list[str]] = {f"find {query_kind}": [FTS, LIKE] for query_kind in WORDS} | {
    job: [] for job in (*CALLS, *COMMANDS)
}


def cost(call: Callable[[], Any], runs: int) -> Figures:
    """The median wall and CPU time of a call, after one that is not counted."""
    call()
    rounds = []
    for _ in range(runs):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        rounds.append({"ms": 1000 * (time.perf_counter() - wall), "CPU ms": 1000 * (time.process_time() - cpu)})
    return medians(rounds)


def words() -> list[str]:
    """Words of the vocabulary that begin no other."""
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


def rows(peer: sqlite3.Connection, statement: str, text: str) -> list[Any]:
    """Return all rows that a statement selects for a text."""
    return peer.execute(statement, (text,)).fetchall()


def searches(bench: Bench, registry: Registry, peer: sqlite3.Connection) -> None:
    catalog, ranked_words, rounds = registry.index, words(), bench.options.rounds
    like = "SELECT name FROM cards WHERE text LIKE ? LIMIT 20"
    match = "SELECT name FROM words WHERE words MATCH ? ORDER BY rank LIMIT 20"
    typed_words = [
        ranked_words[5000],
        ranked_words[500],
        f"{ranked_words[100]} {ranked_words[200]}",
        ranked_words[50],
        "adapter-471",
        "lora",
    ]
    for title, typed in zip(WORDS, typed_words, strict=True):
        # With facets all matches are counted, however many there are.
        phrases, total = (
            version_search.phrases(typed),
            version_search.search(catalog, Query(typed, all_versions=True), facets=True).total,
        )
        (hits,) = peer.execute("SELECT count(*) FROM words WHERE words MATCH ?", (phrases,)).fetchone()
        figures_by_program = {
            "adapterhub": cost(partial(version_search.search, catalog, Query(typed)), rounds),
            FTS: cost(partial(rows, peer, match, phrases), rounds),
            LIKE: cost(partial(rows, peer, like, f"%{typed}%"), min(rounds, 3)),
        }
        bench.add(
            f"find {title}", f"{total} versions contain it", figures_by_program, {f"FTS5 finds as many: {hits}": hits == total}
        )


def calls(bench: Bench, registry: Registry) -> None:
    catalog, word = registry.index, words()[500]
    readme_digest = catalog.select("SELECT digest FROM files WHERE path = 'README.md' LIMIT 1")[0][0]
    folders = iter([write_adapter(bench.scratch / f"push{n}", n) for n in range(1, bench.options.rounds + 2)])
    name = Ref.parse(f"team07/new-{len(queries.names(catalog))}")
    tags = iter([f"t{n}" for n in range(bench.options.rounds + 1)])
    acts: list[Callable[[], Any]] = [
        lambda: version_search.search(catalog, Query(word, (("base", BASES[3]),))),
        lambda: version_search.search(catalog, Query(word), facets=True),
        lambda: version_search.search(catalog, Query()),
        lambda: version_search.search(catalog, Query(), facets=True),
        lambda: version_search.holders(catalog, readme_digest),
        lambda: registry.list("team07/adapter-7"),
        lambda: registry.list("team07"),
        registry.list,
        lambda: registry.push(next(folders), name),
        lambda: registry.tag(name, next(tags)),
        lambda: registry.store.index_file.write(queries.ref_lines(catalog)),
    ]
    for title, act in zip(CALLS, acts, strict=True):
        bench.add(title, "a call of the library", {"adapterhub": cost(act, bench.options.rounds)})


def processes(bench: Bench, root: Path) -> None:
    for title, arguments in COMMANDS.items():
        command = [*OURS, *(words()[500] if word == "WORD" else word for word in arguments)]
        turns = bench.turns(Program("adapterhub", command, env={"ADAPTERHUB_REGISTRY": str(root)}))["adapterhub"]
        assert not isinstance(turns, str)
        del turns["peak MB"]  # this process, which started them, held more
        bench.add(title, "a process", {"adapterhub": turns})


def finding(bench: Bench) -> None:
    """Everything: one registry for all, which the pushes change last."""
    root = bench.input_folder(filled, bench.options.versions)
    with Registry.open(root) as registry, contextlib.closing(plain(bench.scratch / "plain.db", registry)) as peer:
        searches(bench, registry, peer)
        processes(bench, root)
        calls(bench, registry)
        files = registry.store.root / "index.json", registry.root / "registry.db"
    print("\n" + ", ".join(f"{file.name} has {file.stat().st_size / 1e6:.1f} MB" for file in files))


if __name__ == "__main__":
    main(__doc__, JOBS, finding, versions=(50_000, 50), rounds=(15, 1))
