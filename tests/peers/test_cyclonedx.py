"""Bills of materials are valid by CycloneDX's own strict schema of version 1.7."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.trust.cyclonedx_bom import Ancestor, BilledAdapter, bill
from tests.support.adapters import write_adapter
from tests.support.bills import declared, trained
from tests.support.environments import environment

pytestmark = pytest.mark.peer
_CODE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
for path in sys.argv[1:]:
    error = JsonStrictValidator(SchemaVersion.V1_7).validate_str(open(path, encoding="utf-8").read())
    if error:
        sys.exit(f"{path}: {error}")
"""


def test_bills_are_valid_by_the_official_schema(tmp_path: Path) -> None:
    folder = trained(tmp_path / "sql")
    manifest = ah.load(folder).manifest
    with_manifest, unknown = Ancestor(f"sha256:{'2' * 64}", "team/a:v1", manifest), Ancestor(f"sha256:{'3' * 64}", "team/b:v1")
    bills = [
        ah.bom(folder, base_license="llama3.1"),
        ah.bom(write_adapter(tmp_path / "bare")),
        ah.bom(declared(trained(tmp_path / "declared"))),
        ah.bom(declared(trained(tmp_path / "page"), contact="https://example.org/a b?c=[d]", download_location="no URI")),
        bill(BilledAdapter("team/sql", f"sha256:{'4' * 64}", manifest, [with_manifest, unknown], "mit or apache-2.0")),
    ]
    paths = []
    for number, sbom in enumerate(bills):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(sbom.dump())
    python = environment("cyclonedx-python-lib[json-validation]==11.12.0")
    result = subprocess.run([str(python), "-c", _CODE, *map(str, paths)], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
