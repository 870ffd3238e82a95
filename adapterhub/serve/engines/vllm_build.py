"""Whether a vLLM answers requests to the base with an adapter of the same batch: before 0.33, builds for CPUs do (#48421)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

    from .engine_client import Client

log = logging.getLogger("adapterhub.serve.engine")
_UNMIXED_SINCE = (0, 33)  # the version since which the base stays unmixed in any batch
_GPU_BUILDS = ("cu", "rocm", "xpu", "tpu")  # what their labels begin with, as in 0.32.0+cu129 (setup.py)
_CACHE_CONFIG = "vllm:cache_config_info{"
_MLA = "kv_a_proj"


async def mixes_base(client: Client, base: BaseSpec) -> bool:
    """Return whether the base must be kept apart; an unknown version counts as newer, and an unknown build as one for CPUs."""
    _, document = await client.call("GET", "/version")
    text = str(document.get("version", "")) if isinstance(document, dict) else ""
    numbers = text.split(".")[:2]
    if not all(part.isdigit() for part in numbers) or tuple(map(int, numbers)) >= _UNMIXED_SINCE:
        return False
    is_cpu = _is_cpu_by_label(text.partition("+")[2])
    if is_cpu is None and await _has_gpu_blocks(client, base):
        is_cpu = False
    if is_cpu is None:
        problem = "does not say whether it computes on a CPU, where vLLM before 0.33 mixes adapters into answers of the base"
        log.warning("%s %s; the base is asked for by an adapter of zeros, which takes one of its slots", client.url, problem)
    return is_cpu is not False


def _is_cpu_by_label(label: str) -> bool | None:
    """Return whether a build is for CPUs by the label of its version, such as `cpu` or `gabc123.cu129`; None if it has none."""
    parts = label.split(".")
    if "cpu" in parts:
        return True
    return False if any(part.startswith(_GPU_BUILDS) for part in parts) else None


async def _has_gpu_blocks(client: Client, base: BaseSpec) -> bool:
    """Return whether the blocks of its cache have the default size of GPUs, 16 tokens.

    Where the user chooses none, `platforms/cpu.py` takes 128, or 16 for multi-head latent attention.
    """
    if any(_MLA in name for name in base.tensors):
        return False
    _, page = await client.call("GET", "/metrics")
    labels = _cache_labels(page)
    return labels.get("user_specified_block_size") == "False" and labels.get("block_size") == "16"


def _cache_labels(page: Any) -> dict[str, str]:
    """Return the labels of vLLM's gauge of its cache's configuration; none if the page has no such gauge."""
    lines = page.splitlines() if isinstance(page, str) else []
    line = next((line for line in lines if line.startswith(_CACHE_CONFIG)), "")
    pairs = (pair.partition("=") for pair in line.removeprefix(_CACHE_CONFIG).partition("}")[0].split(","))
    return {name: value.strip('"') for name, _, value in pairs if name}
