"""A base that no merge can be written into is refused as it is read, and a name means one tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.merging import merge_into_base
from adapterhub_converters.errors import AdapterhubError
from tests.merging.into_base.test_model_merge import PLAIN, base_in


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda base: (base / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"), "is a pickle"),
        (lambda base: (base.parent / "out").mkdir() or (base.parent / "out" / "x").touch(), "already exists"),
        (lambda base: (base / "config.json").unlink(), "there is no config.json"),
        (
            lambda base: (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}'),
            "maps tensor 'x' to model.safetensors, which does not contain it",
        ),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_refused(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    base = base_in(tmp_path / "base")
    spoil(base)
    with pytest.raises(AdapterhubError) as caught:
        merge_into_base([(PLAIN, 1)], base, tmp_path / "out")
    assert says in str(caught.value)
