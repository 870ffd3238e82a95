"""An adapter whose adapter.json has all that a bill of materials shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapterhub as ah
from tests.support.adapters import write_adapter

DECLARED: dict[str, Any] = {
    "supplier": "Example Organization",
    "contact": "mailto:models@example.org",
    "released": "2026-11-30",
    "expires": "2027-11-30",
    "download_location": "oci://registry.example/team/sql",
    "intended_use": "SQL from questions.",
    "limitations": "No dialects.",
    "languages": ["en", "pt-BR"],
    "trigger_words": ["in the style of"],
    "evaluations": [{"metric": "exact_match", "value": 0.8, "dataset": "org/eval", "split": "test", "recorder": "owner"}],
    "energy_kwh": 1.5,
    "data_sources": [
        {
            "kind": "crawled",
            "name": "forum",
            "address": "https://example.org/data",
            "license": "CC-BY-4.0",
            "collected_from": "2025-01-01",
            "collected_until": "2025-06-30",
            "rights_reserved": "robots.txt was followed",
            "personal_data": False,
        },
        {"kind": "synthetic", "address": "in the cellar"},
    ],
}
"""What an owner can declare in an adapter.json."""


def declared(folder: Path, **fields: Any) -> Path:
    """The folder of an adapter, in whose adapter.json is all that an owner can declare, and more."""
    path = folder / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **DECLARED, **fields}))
    return folder


def trained(folder: Path, **options: Any) -> Path:
    """A folder with the record of a training on two sources, one of them without a license and without a count of tokens."""
    write_adapter(folder, base_model_name_or_path="org/base", revision="a" * 40)
    ah.describe(folder, name="sql", license="apache-2.0", **options)
    path = folder / "adapter.json"
    document = json.loads(path.read_text())
    document["training"] = {
        "config": {"lora": {"r": 2}},
        "data": [
            {"path": "train.jsonl", "digest": f"sha256:{'1' * 64}", "size": 100, "documents": 10},
            {"name": "org/data", "split": "train", "documents": 20, "tokens": 2000, "license": "cc-by-sa-4.0"},
        ],
        "seed": 1,
        "versions": {"torch": "2.9"},
        "metrics": {"flops": 1e6, "heldout_loss": 1.5},
        "created": "2026-11-26T00:00:00Z",
    }
    path.write_text(json.dumps(document))
    return folder
