"""Bills of materials: what is recorded and nothing else, licenses joined with their reasons, one page that loads nothing."""

from __future__ import annotations

import json
from pathlib import Path

import adapterhub as ah
from adapterhub.cli.views.boms import page
from tests.conftest import Run
from tests.support.adapters import Make, write_adapter
from tests.support.bills import declared, trained


def test_the_bill_of_a_trained_adapter_has_its_data_base_and_files(tmp_path: Path) -> None:
    bill = ah.bom(trained(tmp_path / "sql"), base_license="llama3.1")
    component = bill.document["metadata"]["component"]
    facts = {fact["name"]: fact["value"] for fact in component["properties"]}
    assert [component_part["name"] for component_part in component["components"]] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert component["pedigree"]["ancestors"][0]["version"] == "a" * 40
    assert component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0] == {"type": "flops", "value": "1000000.0"}
    assert [component_part["name"] for component_part in bill.document["components"]] == ["train.jsonl", "org/data"]
    assert (facts["adapterhub:data:sources"], facts["adapterhub:data:documents"]) == ("2", "30")
    assert "adapterhub:data:tokens" not in facts  # one source does not say
    assert bill.license.expression == "Apache-2.0 AND LicenseRef-llama3.1 AND CC-BY-SA-4.0"
    assert bill.license.missing == ("data train.jsonl",)


def test_what_the_owner_declares_has_its_place(tmp_path: Path) -> None:
    bill = ah.bom(declared(trained(tmp_path / "sql")), base_license="mit")
    metadata, component = bill.document["metadata"], bill.document["metadata"]["component"]
    assert metadata["supplier"] == {"name": "Example Organization", "contact": [{"name": "models@example.org"}]}
    assert component["externalReferences"] == [{"type": "distribution", "url": "oci://registry.example/team/sql"}]
    card = component["modelCard"]
    assert card["considerations"]["useCases"] == ["SQL from questions."]
    assert card["considerations"]["technicalLimitations"] == ["No dialects."]
    (consumption,) = card["considerations"]["environmentalConsiderations"]["energyConsumptions"]
    assert consumption["activityEnergyCost"] == {"value": 1.5, "unit": "kWh"}
    metric = {"type": "exact_match", "value": "0.8", "slice": "org/eval test"}
    assert card["quantitativeAnalysis"]["performanceMetrics"][-1] == metric
    facts = {fact["name"]: fact["value"] for fact in component["properties"]}
    assert (facts["adapterhub:languages"], facts["adapterhub:expires"]) == ('["en", "pt-BR"]', "2027-11-30")
    forum, cellar = bill.document["components"][2:]
    assert forum["data"] == [{"type": "dataset", "name": "forum", "contents": {"url": "https://example.org/data"}}]
    assert forum["licenses"] == [{"expression": "CC-BY-4.0"}]
    assert {"name": "adapterhub:data:personal-data", "value": "false"} in forum["properties"]
    assert {"name": "adapterhub:data:address", "value": "in the cellar"} in cellar["properties"]
    assert component["modelCard"]["modelParameters"]["datasets"][2:] == [{"ref": "source-1"}, {"ref": "source-2"}]
    assert "CC-BY-4.0" in bill.license.expression
    assert "data in the cellar" in bill.license.missing


def test_the_same_version_has_the_same_bill(tmp_path: Path) -> None:
    folder = trained(tmp_path / "sql")
    assert ah.bom(folder).dump() == ah.bom(folder).dump()


def test_parents_and_their_parents_are_in_the_bill_of_a_merge(run: Run, make: Make) -> None:
    for name, license_ in (("a", "mit"), ("b", "cc-by-nc-4.0")):
        folder = make(name, seed=ord(name))
        (folder / "README.md").write_text(f"---\nlicense: {license_}\n---\n# {name}\n")
        run("push", folder, f"team/{name}")
    run("merge", "team/a", "team/b", "-o", "team/ab")
    run("merge", "team/ab", "team/a", "-o", "team/all")
    document = json.loads(run("bom", "team/all").stdout)
    component = document["metadata"]["component"]
    ancestors = component["pedigree"]["ancestors"]
    assert [f"{ancestor.get('group')}/{ancestor['name']}".partition(":")[0] for ancestor in ancestors[1:]] == [
        "team/ab",
        "team/a",
        "team/b",
    ]
    facts = {fact["name"]: fact["value"] for fact in component["properties"]}
    assert facts["adapterhub:license:combined"] == "MIT AND CC-BY-NC-4.0"
    assert "CC-BY-NC-4.0: no commercial use" in facts["adapterhub:license:reasons"]
    assert json.loads(component["pedigree"]["notes"])["kind"] == "merge"
    refs = {ancestor["bom-ref"] for ancestor in (component, *ancestors)}
    assert set(document["dependencies"][0]["dependsOn"]) < refs


def test_the_license_of_the_base_is_that_of_its_card(tmp_path: Path) -> None:
    from tests.support.folders import base

    base(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: gemma\n---\n")
    adapter = write_adapter(tmp_path / "sql")
    assert ah.bom(adapter, base=tmp_path / "base").license.expression == "LicenseRef-gemma"
    assert ah.bom(adapter, base=tmp_path / "base", base_license="mit").license.expression == "MIT"


def test_the_page_escapes_and_loads_nothing(tmp_path: Path) -> None:
    folder = trained(tmp_path / "sql", description="<script>alert(1)</script>")
    html = page(ah.bom(folder))
    assert "&lt;script&gt;alert(1)" in html
    assert "default-src 'none'" in html
    for word in ("<script", "<img", "<link", "src=", "href=", "http:", "@import", "url("):
        assert word not in html
    for word in ("compliant", "compliance", " safe"):
        assert word not in html.lower()


def test_the_command_writes_a_file_whole_and_tells_what_is_missing(run: Run, make: Make, tmp_path: Path) -> None:
    folder = make("sql")
    stdout = run("bom", folder, "--base-license", "mit", "-o", "sql.cdx.json").stdout
    assert stdout == "sql.cdx.json: MIT; without a license: adapter sql\n"
    assert json.loads((tmp_path / "sql.cdx.json").read_text())["specVersion"] == "1.7"
    assert "already exists" in run("bom", folder, "-o", "sql.cdx.json", code=2).stderr
    document = json.loads(run("bom", folder, "--html", "-o", "sql.html", "--json").stdout)
    assert document == {"output": "sql.html", "license": None, "missing": ["adapter sql", "base org/base"]}
    assert (tmp_path / "sql.html").read_text().startswith("<!DOCTYPE html>")
