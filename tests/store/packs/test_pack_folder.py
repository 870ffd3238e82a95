"""Packs of a store that another process removes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.store.store import Store
from adapterhub_converters.errors import NotFoundError
from tests.store.test_packs import DIGEST


def test_a_pack_that_was_removed_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create()
    with pytest.raises(NotFoundError, match=rf"{DIGEST[7:]}: no such pack"), store.open_pack(DIGEST):
        pass
