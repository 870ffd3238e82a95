"""An index with many names, written row by row: what a million pushes would leave in registry.db, without their blobs."""

from __future__ import annotations

import hashlib
import random
import sqlite3

BASES = [f"org{n % 7}/model-{n}" for n in range(40)]
_CHUNK = 10_000
_VERSION = (
    "INSERT INTO versions (id, name, number, digest, manifest_size, time, base, size, method, r, least_r, alpha, format, dtype,"
    " parameters, parents, seq) VALUES (?, ?, 1, ?, 900, ?, ?, 4096, 'lora', 8, 8, 16, 'peft', 'F32', 1024, '[]', 1)"
)


def add_names(connection: sqlite3.Connection, count: int, *, words: int = 12, private: int = 0) -> None:
    """Add `count` names of one version each, in a hundred namespaces, pushed some seconds after each other, several at a time.

    Args:
        connection: To the index.
        count: How many.
        words: Of the card of each, which are searched.
        private: Each name has a record and each of that many is private and deprecated; 0 for none of it.
    """
    rng = random.Random(0)
    vocabulary = [f"{rng.choice('bcdfgklmnprst')}{rng.choice('aeiou')}{n}" for n in range(20_000)]
    connection.execute("BEGIN")
    for start in range(0, count, _CHUNK):
        names, versions, tags, facets, texts = [], [], [], [], []
        for n in range(start, min(count, start + _CHUNK)):
            name, digest = f"team{n % 100:02}/adapter-{n}", f"sha256:{hashlib.sha256(str(n).encode()).hexdigest()}"
            minutes, seconds = divmod(n // 3, 60)
            time = (
                f"2026-{minutes // 40_320 % 12 + 1:02}-{minutes // 1440 % 28 + 1:02}T{minutes // 60 % 24:02}:{minutes % 60:02}"
            )
            base = rng.choice(BASES)
            names.append((name, digest))
            versions.append((n + 1, name, digest, f"{time}:{seconds:02}Z", base))
            tags.append((name,))
            values = {
                "base": base,
                "base-name": base.partition("/")[2],
                "method": "lora",
                "library": "peft",
                "container": "safetensors",
            }
            values |= {"tag": f"subject-{n % 5000}", "license": rng.choice(["mit", "apache-2.0", "llama3"])}
            facets += [(n + 1, kind, value) for kind, value in values.items()]
            texts.append((n + 1, name, " ".join(rng.choices(vocabulary, k=words))))
        if private:
            records = [(name, int(n % private == 0), n + 1) for n, (name, _) in enumerate(names, start)]
            connection.executemany("INSERT INTO repositories VALUES (?, ?, '', 0, ?)", records)
            marks = [(name,) for name, is_private, _ in records if is_private]
            connection.executemany("INSERT INTO marks (name, kind, key, value) VALUES (?, 'deprecate', '1', 'old')", marks)
        for sql, rows in (
            ("INSERT INTO names (name, seq, head, number, deleted) VALUES (?, 1, ?, 1, 0)", names),
            (_VERSION, versions),
            ("INSERT INTO tags (name, tag, number) VALUES (?, 'latest', 1)", tags),
            ("INSERT INTO facets (version, kind, value) VALUES (?, ?, ?)", facets),
            (
                "INSERT INTO texts (version, name, title, tags, description, facts, card) VALUES (?, ?, '', '', '', '', ?)",
                texts,
            ),
        ):
            connection.executemany(sql, rows)
    connection.execute("INSERT INTO facet_counts (kind, value, n) SELECT kind, value, count(*) FROM facets GROUP BY 1, 2")
    connection.execute("INSERT INTO facet_counts (kind, value, n) VALUES ('', '', ?)", (count,))
    connection.execute("COMMIT")
