"""The peak rates of graphics cards according to their data sheets: matrix products without sparsity, summed in float32.

The share of this rate that a program reaches (MFU, arXiv 2204.02311) is how programs are compared; it is unknown for cards that
are not listed. Names are torch's, matched exactly: a part of a card (MIG) and a laptop's card have other names, and other
rates.
"""

from __future__ import annotations

from collections.abc import Mapping

# 10^12 operations per second, for products in 16 bits and in float32 without TF32, which torch uses only on request.
_RATES: Mapping[str, tuple[float, float]] = {
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA H200": (989.0, 67.0),
    "NVIDIA H100 80GB HBM3": (989.0, 67.0),
    "NVIDIA H100 PCIe": (756.0, 51.0),
    "NVIDIA H100 NVL": (835.0, 60.0),
    "NVIDIA A100-SXM4-40GB": (312.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5),
    "NVIDIA A40": (149.7, 37.4),
    "NVIDIA A30": (165.0, 10.3),
    "NVIDIA A10": (125.0, 31.2),
    "NVIDIA A10G": (70.0, 35.0),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA RTX A6000": (154.8, 38.7),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 91.1),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
}


def peak_rate(name: str | None, dtype: str) -> float | None:
    """Return the floating-point operations per second of a card's data sheet for products in `dtype`; None if unknown.

    Example:
        >>> peak_rate("NVIDIA A100-SXM4-80GB", "bfloat16")
        312000000000000.0
    """
    rates = _RATES.get(name or "")
    return None if rates is None else rates[dtype == "float32"] * 1e12
