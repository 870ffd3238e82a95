"""The names of element types, and zeros that become an array when more is asked of them than their shape."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from adapterhub_converters import dtypes
from adapterhub_converters.dtypes import LateZeros


@pytest.mark.parametrize("name", dtypes.NUMPY)
def test_a_dtype_has_the_name_that_leads_to_it_and_its_width(name: str) -> None:
    dtype = dtypes.NUMPY[name]
    assert dtypes.name_of(dtype) == name
    assert dtypes.BITS[name] == 8 * dtype.itemsize


def test_numbers_in_the_other_byte_order_have_the_same_name() -> None:
    assert dtypes.name_of(np.dtype(">f4")) == "F32"


@pytest.mark.parametrize("code", ["c8", "U3", "V2", "M8[s]"])
def test_a_dtype_that_safetensors_lacks_has_no_name(code: str) -> None:
    with pytest.raises(KeyError):
        dtypes.name_of(np.dtype(code))


@pytest.mark.parametrize("name", ["F32", "BF16", "I64"])
def test_late_zeros_are_the_array_that_they_stand_in_for(name: str) -> None:
    late, zeros = LateZeros(name, (2, 3)), np.zeros((2, 3), dtypes.NUMPY[name])
    assert (late.shape, late.ndim, late.size, len(late)) == (zeros.shape, zeros.ndim, zeros.size, len(zeros))
    assert (late.dtype, dtypes.name_of_elements(late)) == (zeros.dtype, name)
    assert np.asarray(late).tolist() == zeros.tolist()
    assert late[1:].tolist() == zeros[1:].tolist()
    assert late.T.shape == (3, 2)
    assert (zeros + late).tolist() == zeros.tolist()


def test_zeros_of_any_shape_take_no_memory() -> None:
    assert np.asarray(LateZeros("F32", (1 << 30, 1 << 20))).strides == (0, 0)


def test_names_and_shapes_are_known_without_numpy() -> None:
    code = (
        "import sys; from adapterhub_converters import dtypes\n"
        "late = dtypes.LateZeros('BF16', (2, 3))\n"
        "print(late.size, dtypes.name_of_elements(late), 'F8_E4M3' in dtypes.NUMPY, 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "6 BF16 True False\n"
