"""Architectures of which adapters alone are converted: no model is written by their rows, and none is in two tables."""

from __future__ import annotations

import pytest

from adapterhub_converters.architectures.adapter_only_models import ADAPTERS_ONLY
from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.architectures.architecture_lookup import ADAPTERS, ARCHITECTURES


def test_no_row_is_one_of_a_model_that_is_converted_as_a_whole() -> None:
    assert {id(row) for row in ADAPTERS_ONLY} <= {id(row) for row in ADAPTERS}
    assert not {id(row) for row in ADAPTERS_ONLY} & {id(row) for row in ARCHITECTURES}
    assert not any(row.folder for row in ADAPTERS_ONLY)


def test_rows_of_one_class_differ_in_the_names_of_tensors_that_mark_them() -> None:
    marks: dict[str, list[tuple[str, ...]]] = {}
    for row in ADAPTERS_ONLY:
        for name in row.classes:
            marks.setdefault(name, []).append(row.marks)
    assert [name for name, rows in marks.items() if len({*rows}) < len(rows)] == []


@pytest.mark.parametrize("row", ADAPTERS_ONLY, ids=lambda row: row.gguf)
def test_every_module_of_a_layer_comes_back_from_the_stem_of_its_tensor(row: Architecture) -> None:
    for path in row.linear:
        module = f"{row.layers}.3.{path}"
        stem = row.stem(module)
        assert stem is not None
        back = row.module(stem)
        assert back is not None
        assert row.stem(back) == stem
