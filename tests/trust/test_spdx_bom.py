"""The bill in SPDX 3.0.1 has what the one in CycloneDX has, depends on no clock, and claims the AI profile where it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.operations.bom import spdx_bom
from adapterhub.trust.cyclonedx_bom import Ancestor, BilledAdapter
from adapterhub.trust.spdx_bom import spdx_bill
from adapterhub_converters.errors import RefusedError
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.bills import declared, trained

Nodes = list[dict[str, Any]]
NO_LICENSE = "https://spdx.org/rdf/3.0.1/terms/ExpandedLicensing/NoAssertionLicense"


def nodes(document: dict[str, Any], kind: str) -> Nodes:
    return [node for node in document["@graph"] if node["type"] == kind]


def related(document: dict[str, Any], start: str, kind: str) -> list[str]:
    """The ids at the other end of a package's relationships of a kind."""
    return [
        target
        for node in nodes(document, "Relationship")
        if node["from"].endswith(start) and node["relationshipType"] == kind
        for target in node["to"]
    ]


def test_the_adapter_its_base_its_data_and_its_files_are_elements(tmp_path: Path) -> None:
    document = spdx_bom(trained(tmp_path / "sql"), base_license="llama3.1")
    assert document == spdx_bom(trained(tmp_path / "again" / "sql"), base_license="llama3.1")
    (adapter,) = nodes(document, "ai_AIPackage")
    assert (adapter["name"], adapter["software_primaryPurpose"]) == ("sql", "model")
    assert {entry["key"]: entry["value"] for entry in adapter["ai_metric"]} == {"flops": "1000000.0", "heldout_loss": "1.5"}
    (base,) = nodes(document, "software_Package")
    assert base["software_packageUrl"] == f"pkg:huggingface/org/base@{'a' * 40}"
    assert [node["name"] for node in nodes(document, "dataset_DatasetPackage")] == ["train.jsonl", "org/data train"]
    assert "adapter_model.safetensors" in {node["name"] for node in nodes(document, "software_File")}
    assert related(document, ":adapter", "dependsOn") == [base["spdxId"]]
    assert len(related(document, ":adapter", "trainedOn")) == 2
    assert len(related(document, ":adapter", "contains")) == len(nodes(document, "software_File"))
    licenses = {
        node["spdxId"]: node["simplelicensing_licenseExpression"]
        for node in nodes(document, "simplelicensing_LicenseExpression")
    }
    declared = {
        start: licenses.get(related(document, start, "hasDeclaredLicense")[0])
        for start in (":adapter", ":base", ":data-1", ":data-2")
    }
    assert declared == {":adapter": "Apache-2.0", ":base": "LicenseRef-llama3.1", ":data-1": None, ":data-2": "CC-BY-SA-4.0"}
    assert related(document, ":adapter", "hasConcludedLicense") == [NO_LICENSE]
    assert nodes(document, "CreationInfo")[0]["created"] == "2026-11-26T00:00:00Z"


def test_each_id_is_of_one_element_and_each_end_of_a_relationship_is_one(tmp_path: Path) -> None:
    manifest = ah.load(trained(tmp_path / "sql")).manifest
    ancestors = [Ancestor(f"sha256:{'2' * 64}", "team/a", manifest), Ancestor(f"sha256:{'3' * 64}", "team/b")]
    document = spdx_bill(BilledAdapter("team/sql", f"sha256:{'4' * 64}", manifest, ancestors))
    ids = [node["spdxId"] for node in document["@graph"] if "spdxId" in node]
    assert len(ids) == len(set(ids))
    assert {end for node in nodes(document, "Relationship") for end in (node["from"], *node["to"])} - {NO_LICENSE} <= set(ids)
    assert set(nodes(document, "SpdxDocument")[0]["element"]) == set(ids) - {nodes(document, "SpdxDocument")[0]["spdxId"]}


def test_the_ai_profile_is_claimed_where_its_facts_are_known(tmp_path: Path) -> None:
    folder = trained(tmp_path / "sql")
    assert "ai" not in nodes(spdx_bom(folder, supplier="Example"), "SpdxDocument")[0]["profileConformance"]
    document = spdx_bom(declared(folder))
    assert "ai" in nodes(document, "SpdxDocument")[0]["profileConformance"]
    (adapter,), (supplier,) = nodes(document, "ai_AIPackage"), nodes(document, "Organization")
    assert (supplier["name"], adapter["suppliedBy"]) == ("Example Organization", supplier["spdxId"])
    assert adapter["releaseTime"] == "2026-11-30T00:00:00Z"
    assert nodes(spdx_bom(folder, supplier="Another"), "Organization")[0]["name"] == "Another"


def test_what_the_owner_declares_has_its_place(tmp_path: Path) -> None:
    document = spdx_bom(declared(trained(tmp_path / "sql")))
    (adapter,) = nodes(document, "ai_AIPackage")
    assert (adapter["ai_informationAboutApplication"], adapter["ai_limitation"]) == ("SQL from questions.", "No dialects.")
    (consumption,) = adapter["ai_energyConsumption"]["ai_finetuningEnergyConsumption"]
    assert (consumption["ai_energyQuantity"], consumption["ai_energyUnit"]) == (1.5, "kilowattHour")
    assert {entry["key"]: entry["value"] for entry in adapter["ai_metric"]}["exact_match (org/eval test)"] == "0.8"
    assert (adapter["validUntilTime"], adapter["builtTime"]) == ("2027-11-30T00:00:00Z", "2026-11-26T00:00:00Z")
    assert adapter["ai_useSensitivePersonalInformation"] == "noAssertion"  # one source does not say
    forum, cellar = nodes(document, "dataset_DatasetPackage")[2:]
    assert forum["dataset_dataCollectionProcess"] == "crawled; collected 2025-01-01 to 2025-06-30; robots.txt was followed"
    assert forum["software_downloadLocation"] == "https://example.org/data"
    assert forum["dataset_hasSensitivePersonalInformation"] == "no"
    assert (cellar["name"], "software_downloadLocation" in cellar) == ("in the cellar", False)
    assert related(document, ":adapter", "trainedOn")[2:] == [forum["spdxId"], cellar["spdxId"]]
    assert related(document, ":source-2", "hasDeclaredLicense") == [NO_LICENSE]


def test_a_bill_without_a_time_asks_for_one(tmp_path: Path, run: Run) -> None:
    folder = write_adapter(tmp_path / "bare")
    with pytest.raises(RefusedError, match="SPDX requires the time of a bill") as caught:
        spdx_bom(folder)
    assert caught.value.code == "no-time"
    assert "Pass --created" in run("bom", folder, "--spdx", code=6).stderr
    document = json.loads(run("bom", folder, "--spdx", "--created", "2026-11-26T00:00:00Z").stdout)
    assert document["@context"] == "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
    assert "exclude each other" in run("bom", folder, "--spdx", "--html", code=2).stderr
    assert "is not a time in UTC" in run("bom", folder, "--created", "yesterday", code=2).stderr


def test_the_supplier_and_the_time_are_in_cyclonedx_too(tmp_path: Path) -> None:
    folder = trained(tmp_path / "sql")
    assert "timestamp" not in ah.bom(folder).document["metadata"]
    metadata = ah.bom(folder, supplier="Example", created="2026-11-26T00:00:00Z").document["metadata"]
    assert (metadata["supplier"], metadata["timestamp"]) == ({"name": "Example"}, "2026-11-26T00:00:00Z")
