"""Contents of an adapter keep what is alike once."""

from __future__ import annotations

from pathlib import Path

from adapterhub.checks.contents_reader import read_contents
from adapterhub_converters.formats.peft.tensor_keys import PREFIX
from tests.support.folders import adapter, pairs


def test_modules_that_are_alike_share_one_mapping_of_their_parts(tmp_path: Path) -> None:
    contents, _ = read_contents(adapter(tmp_path / "a", pairs(20)), base=None)
    assert contents is not None
    assert [count for _, count in contents.distinct_parts] == [len(contents.pairs)] == [20]
    assert sorted(contents.kinds().values()) == [20, 20]
    contents.close()


def test_tables_with_the_same_token_rows_share_their_ids(tmp_path: Path) -> None:
    rows = {f"{PREFIX}layers.{n}.wte.token_adapter.trainable_tokens_delta": (3, 4) for n in range(9)}
    contents, _ = read_contents(adapter(tmp_path / "a", rows, trainable_token_indices={"wte": [1, 2, 3]}), base=None)
    assert contents is not None
    assert len({id(ids) for ids in contents.row_ids.values()}) == 1
    assert set(contents.row_ids.values()) == {(1, 2, 3)}
    contents.close()
