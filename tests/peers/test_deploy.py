"""The documents of the Helm chart are what the API of Kubernetes takes, by its own schemas.

They are rendered as in `tests/test_deploy.py`: with the values of the chart, and no further options. Helm renders the same.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.environments import environment, helm
from tests.test_deploy import CHART, SERVE_CHART, SWITCHES, TEMPLATES, rendered

pytestmark = pytest.mark.peer
# A resource of Prometheus' operator, whose schema Kubernetes does not have.
OF_KUBERNETES = [path for path in TEMPLATES if path.stem != "service-monitor"]


def validated(path: Path) -> subprocess.CompletedProcess[str]:
    """What kubernetes-validate tells about a document; `--strict` refuses fields that the API does not have."""
    program = environment("kubernetes-validate==1.37.0").with_name("kubernetes-validate")
    return subprocess.run([program, "--strict", path], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("template", OF_KUBERNETES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_a_template_is_a_resource_of_kubernetes(template: Path, tmp_path: Path) -> None:
    document = rendered(template, **SWITCHES)
    (tmp_path / "good.json").write_text(json.dumps(document))
    result = validated(tmp_path / "good.json")
    assert (result.returncode, "passed" in result.stdout + result.stderr) == (0, True), result.stdout + result.stderr
    (tmp_path / "bad.json").write_text(json.dumps({**document, "spec": {**document["spec"], "replica": 1}}))
    assert validated(tmp_path / "bad.json").returncode != 0


@pytest.mark.parametrize("values", [{}, SWITCHES], ids=["as-it-is", "with-everything"])
@pytest.mark.parametrize("chart", [CHART, SERVE_CHART], ids=lambda path: path.name)
def test_helm_renders_each_chart_as_we_do(chart: Path, values: dict[str, Any]) -> None:
    import yaml

    program = helm()
    lint = subprocess.run([program, "lint", "--strict", chart], check=False, capture_output=True, text=True)
    assert (lint.returncode, "[WARNING]" in lint.stdout) == (0, False), lint.stdout
    words = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    result = subprocess.run([program, "template", "team", chart, *words], check=True, capture_output=True, text=True)
    documents = [document for document in yaml.safe_load_all(result.stdout) if document is not None]
    ours = [rendered(template, **values) for template in (chart / "templates").glob("*.yaml")]
    assert sorted(json.dumps(document, sort_keys=True) for document in documents) == sorted(
        json.dumps(document, sort_keys=True) for document in ours if document is not None
    )
