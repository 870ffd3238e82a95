"""An adapter whose adapter.json has all that a bill of materials shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapterhub as ah
from tests.support.adapters import write_adapter


def trained(folder: Path, **more: Any) -> Path:
    """A folder with the record of a training on two sources, one of them without a license and without a count of tokens."""
    write_adapter(folder, base_model_name_or_path="org/base", revision="a" * 40)
    ah.describe(folder, name="sql", license="apache-2.0", **more)
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
