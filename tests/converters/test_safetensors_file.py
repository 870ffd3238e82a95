"""safetensors files: the library's own bytes, read back as they were written."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import NotFoundError
from tests.conftest import need_module

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int64, np.bool_, np.uint16, np.int32]
NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=15).filter(lambda name: name != "__metadata__")
ARRAYS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 100)).map(
    lambda parts: np.random.default_rng(parts[2]).integers(0, 2, parts[1]).astype(parts[0])
)
FILES = st.tuples(st.dictionaries(NAMES, ARRAYS, max_size=6), st.dictionaries(NAMES, st.text(max_size=9), max_size=3))


@given(FILES)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[dict[str, np.ndarray], dict[str, str]]
) -> None:
    tensors, metadata = content
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    safetensors_file.write(path, tensors, metadata)
    with SafetensorsFile(path) as opened:
        assert opened.header.metadata == metadata
        assert set(opened.tensors) == set(tensors)
        for name, array in tensors.items():
            again = opened.tensor(name)
            assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.peer
@given(FILES)
def test_the_library_writes_the_same_bytes_and_reads_ours(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[dict[str, np.ndarray], dict[str, str]]
) -> None:
    need_module("safetensors")
    from safetensors import safe_open
    from safetensors.numpy import save

    tensors, metadata = content
    metadata = dict(list(metadata.items())[:1])  # the library keeps metadata in a hash map: more than one has no order
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    safetensors_file.write(path, tensors, metadata)
    assert path.read_bytes() == save(tensors, metadata=metadata or None)
    with safe_open(path, framework="numpy") as theirs:
        assert set(theirs.keys()) == set(tensors)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        SafetensorsFile(tmp_path / "x")
