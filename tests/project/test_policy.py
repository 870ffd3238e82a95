"""The policy of a project, asked with names and manifests."""

from __future__ import annotations

import dataclasses

import pytest

from adapterhub.manifest.document import AdapterManifest
from adapterhub.project.policy import Policy
from adapterhub_converters.errors import RefusedError

MANIFEST = AdapterManifest.salvage({"r": 8, "modules": {"x": {"r": 32, "alpha": 1}}})


def test_every_requirement_that_is_not_met_is_named() -> None:
    with pytest.raises(RefusedError) as caught:
        Policy("p", 16, True, ("MIT",)).check_manifest(MANIFEST, "team/sql")
    assert caught.value.items == (
        "rank 32 is over 16", "its base is not pinned; push it with its base", "its license is not declared, not MIT",
    )  # fmt: skip
    Policy("p", 32, False, ("mit",)).check_manifest(dataclasses.replace(MANIFEST, license="MIT"), "team/sql")
    Policy("p", 1).check_manifest(AdapterManifest.salvage({}), "without a rank")
    Policy("p", allow=("team/*",)).check_name("team/sql")
    for name in ("teams/sql", "oci://host/team/sql", "Team/sql"):
        with pytest.raises(RefusedError, match="not a name that p allows"):
            Policy("p", allow=("team/*",)).check_name(name)
