"""Each claim of docs/tools.md is shown by the tool itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.tool_checks import CHECKS, Check, Workbench

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_claim_of_the_table_holds(check: Check, run: Run, make: Make, host: str, tmp_path: Path) -> None:
    check.show(Workbench(run, make, host, tmp_path))
