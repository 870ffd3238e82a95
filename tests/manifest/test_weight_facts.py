"""The facts that follow from the weights, and an adapter.json that says otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapterhub.manifest import derive, weight_facts
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.folder_contents import Inspection
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.errors import IntegrityError

Make = Callable[..., Path]


def test_a_document_edited_by_hand_is_found_out(make: Make) -> None:
    folder = make()
    dataclasses.replace(derive.describe(folder), r=64).write(folder)
    with pytest.raises(IntegrityError, match='"r" is 64, but the weights have 2'):
        derive.finalize(folder)


def test_a_number_is_no_name_of_a_module_and_was_one_in_older_records(tmp_path: Path) -> None:
    delta = LowRank(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), 2.0)
    adapter = Adapter({"unet.a.to_out.0": delta, "unet.a.to_q": delta})
    facts = weight_facts.weight_facts(adapter, "kohya")
    assert facts["targets"] == ("to_out.0", "to_q")
    fields = {"name": None, "base": None, "task": None, "files": ()}
    old = AdapterManifest(**fields, **{**facts, "targets": ("0", "to_q")})  # type: ignore[arg-type]
    weight_facts.check_facts(old, Inspection("kohya", adapter), "a", folder=tmp_path)
