"""A registry in a folder, plain or with its blobs in packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from adapterhub.maintenance import compress
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.version_lookup import Version


class Packed(Registry):
    """A registry whose owner packs after every push."""

    def push(self, folder: Path, ref: Ref, **options: Any) -> Version:
        version = super().push(folder, ref, **options)
        compress.pack(self)
        return version


def new_registry(kind: Literal["local", "packed"], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Create a registry; one that is packed has even tiny files in packs."""
    if kind == "local":
        return Registry.init(folder)
    monkeypatch.setattr(compress, "_MIN_SAVING", -(10**9))
    monkeypatch.setattr(compress, "_MAX_SHARE", 10**9)
    return Packed.init(folder)
