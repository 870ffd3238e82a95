"""Bills of materials in SPDX 3.0.1 are read and written again by SPDX's own model, which knows the rules of its ontology."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.operations.bom import spdx_bom
from adapterhub.trust.cyclonedx_bom import Ancestor, BilledAdapter
from adapterhub.trust.spdx_bom import spdx_bill
from tests.support.adapters import write_adapter
from tests.support.bills import declared, trained
from tests.support.environments import environment

pytestmark = pytest.mark.peer
_CODE = """
import io, sys
from spdx_python_model.bindings import v3_0_1 as model
for path in sys.argv[1:]:
    objects = model.SHACLObjectSet()
    with open(path, "rb") as file:
        model.JSONLDDeserializer().read(file, objects)
    if objects.missing_ids:
        sys.exit(f"{path}: {objects.missing_ids}")
    model.JSONLDSerializer().write(objects, io.BytesIO())  # which checks that each property has as many values as it must
"""


def validated(*paths: Path) -> subprocess.CompletedProcess[str]:
    python = environment("spdx-python-model==0.0.6")
    return subprocess.run([str(python), "-c", _CODE, *map(str, paths)], check=False, capture_output=True, text=True)


def test_bills_are_valid_by_the_model_of_spdx(tmp_path: Path) -> None:
    folder = trained(tmp_path / "sql")
    manifest = ah.load(folder).manifest
    with_manifest, unknown = Ancestor(f"sha256:{'2' * 64}", "team/a:v1", manifest), Ancestor(f"sha256:{'3' * 64}", "team/b:v1")
    documents = [
        spdx_bom(folder, base_license="llama3.1", supplier="Example"),
        spdx_bom(write_adapter(tmp_path / "bare"), created="2026-11-26T00:00:00Z"),
        spdx_bill(BilledAdapter("team/sql", f"sha256:{'4' * 64}", manifest, [with_manifest, unknown], "mit or apache-2.0")),
    ]
    documents.append(spdx_bom(declared(folder)))
    paths = [tmp_path / f"{number}.json" for number in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(json.dumps(document))
    result = validated(*paths)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("change", [("releaseTime", "yesterday"), ("ai_metric", "x"), ("software_primaryPurpose", "adapter")])
def test_the_model_refuses_another_value(tmp_path: Path, change: tuple[str, str]) -> None:
    document = spdx_bom(trained(tmp_path / "sql"))
    next(node for node in document["@graph"] if node["type"] == "ai_AIPackage")[change[0]] = change[1]
    (tmp_path / "bill.json").write_text(json.dumps(document))
    assert validated(tmp_path / "bill.json").returncode == 1
