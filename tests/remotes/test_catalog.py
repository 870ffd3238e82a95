"""A catalog means the same here and on a hub, and knows which models are the bases of versions."""

from __future__ import annotations

import inspect

import pytest

from adapterhub.maintenance.disk_usage import BaseUsage, Usage
from adapterhub.remotes.catalog import Catalog, SizedModel
from adapterhub.remotes.hub.hub_catalog import HubCatalog
from adapterhub.remotes.local_catalog import LocalCatalog


def _parameters(function: object) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.parametrize("name", sorted(Catalog.__abstractmethods__))
def test_every_method_takes_the_same_arguments_here_and_on_a_hub(name: str) -> None:
    expected = _parameters(getattr(Catalog, name))
    assert _parameters(getattr(LocalCatalog, name)) == expected
    assert _parameters(getattr(HubCatalog, name)) == expected


def test_a_model_is_a_base_by_its_fingerprint_and_only_without_one_by_its_name() -> None:
    model = SizedModel("/models/qwen", "org/qwen", "f" * 8, 10)
    for repo, fingerprint, fits in (
        ("org/other", "f" * 8, True),
        ("org/qwen", "0" * 8, False),
        ("org/qwen", None, True),
        (None, None, False),
    ):
        assert model.fits(BaseUsage(repo, fingerprint, Usage("", 1, 1, 1, 1, 1))) == fits
