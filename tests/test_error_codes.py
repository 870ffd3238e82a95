"""Codes by which programs know an error, each raised by the call that leads to it most directly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.http_server import binding
from adapterhub.merging.adapters.combine import combine
from adapterhub.merging.into_base import tensor_types
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry import packaging
from adapterhub.remotes import remote_address
from adapterhub.remotes.named_remotes import address_below
from adapterhub.store.store import Store
from adapterhub.trust import attestation
from adapterhub_converters.adapter import Adapter, LowRank, Meta
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats.trainers.fused_layers import known_base


def test_a_renamed_place_is_in_no_part_of_an_error() -> None:
    error = AdapterhubError("/tmp/x/a", "/tmp/x/b", "see /tmp/x", adapter="/tmp/x", file=Path("/tmp/x/a"), count=3)
    error.problems = ("/tmp/x/a: 1", "/tmp/x/b: 2")
    error.rename("/tmp/x", "team/sql:v1")
    assert "/tmp" not in f"{error} {error.problems} {error.fields}"
    assert error.fields == {"adapter": "team/sql:v1", "file": "team/sql:v1/a", "count": 3}


def _pair(base: str, method: str = "svd", **options: Any) -> Callable[[Path], object]:
    delta = LowRank(np.ones((2, 4), np.float32), np.ones((4, 2), np.float32), alpha=2)
    adapters = [Adapter({"q": delta}, meta=Meta(name)) for name in ("tiny", base)]
    return lambda _: combine(adapters, [1.0, 1.0], method=method, **options)


def _file(size: int, *offsets: int) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        header = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
        (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        return SafetensorsFile(folder / "a.safetensors")

    return read


def _linked_store(folder: Path) -> None:
    (folder / "store").symlink_to(folder)
    Store(folder / "store").check()


CALLS: dict[str, Callable[[Path], object]] = {
    "attestation": lambda _: attestation.find_accepted([], "fits", (), "sha256:" + "0" * 64, "team/sql"),
    "address-with-remote": lambda _: address_below("oci://host", "oci://other/x"),
    "convert-there": lambda _: ah.pull("oci://registry.example/team/sql", to="gguf"),
    "credentials-in-address": lambda _: remote_address.parse("oci://ada:secret@registry.example/team/sql"),
    "different-bases": _pair("other"),
    "hole": _file(16, 8, 16),
    "invalid-ref": lambda _: Ref.parse("team/sql/"),
    "linked-store": _linked_store,
    "local-only": lambda _: Ref.parse("oci://registry.example/team/sql"),
    "no-manifest": lambda _: packaging.check_manifest(Policy("the project", max_rank=8), None, "team/sql"),
    "unsupported-architecture": lambda _: known_base(BaseSpec("b", "hf", "X", "x", {}), "b", "torchtune", ["Y"]),
    "public-needs-tls": lambda _: binding.check_exposure("0.0.0.0", encrypted=False, requires_login=True, code="x"),
    "rows-not-whole-blocks": lambda _: tensor_types.writable("Q8_0", 33, "blk.0.attn_q.weight"),
    "trailing": _file(9, 0, 8),
    "unknown-method": _pair("tiny", "average"),
}


@pytest.mark.parametrize("code", CALLS)
def test_an_error_has_its_code(code: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterhubError) as caught:
        CALLS[code](tmp_path)
    assert caught.value.code == code
