"""What other scanners flag, `scan` reports: picklescan, modelscan, fickling and modelaudit over small malicious files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from adapterhub.checks.scan import scan
from tests.support.environments import environment
from tests.support.malicious import corpus

pytestmark = pytest.mark.peer

# Prints the names of the files that `flags` is true of; a file that ends a scanner in an exception is none.
_CODE = """
import contextlib, json, logging, sys
from pathlib import Path
logging.disable(logging.CRITICAL)
{}
found = []
for path in sorted(Path(sys.argv[1]).iterdir()):
    with contextlib.suppress(Exception):
        found += [path.name] if flags(path) else []
print(json.dumps(found))
"""
_PICKLESCAN = """
from picklescan.scanner import scan_file_path
def flags(path):
    result = scan_file_path(str(path))
    return result.issues_count or result.scan_err
"""
_MODELSCAN = """
from modelscan.modelscan import ModelScan
def flags(path):
    result = ModelScan().scan(path)
    return result["issues"] or result["errors"]
"""
_FICKLING = """
from fickling.analysis import Severity, check_safety
from fickling.fickle import StackedPickle
def flags(path):
    with open(path, "rb") as file:
        pickles = StackedPickle.load(file, fail_on_decode_error=False)
    return any(check_safety(one).severity > Severity.LIKELY_SAFE for one in pickles)
"""
_MODELAUDIT = """
from modelaudit.core import scan_model_directory_or_file
def flags(path):
    return any(issue.severity.value in ("critical", "warning") for issue in scan_model_directory_or_file(str(path)).issues)
"""
# Requirements, code, and how many of the files each flags at least.
_SCANNERS = {
    "picklescan": (("picklescan==1.0.5",), _PICKLESCAN, 30),
    "modelscan": (("modelscan==0.8.8",), _MODELSCAN, 20),
    "fickling": (("fickling==0.1.12", "typing_extensions"), _FICKLING, 30),
    "modelaudit": (("modelaudit==0.2.54",), _MODELAUDIT, 38),
}


@pytest.mark.parametrize("scanner", _SCANNERS)
def test_whatever_another_scanner_flags_scan_reports(scanner: str, tmp_path: Path) -> None:
    requirements, code, least = _SCANNERS[scanner]
    files = corpus(tmp_path)
    environ = {**os.environ, "PYTHONPATH": "", "PROMPTFOO_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "HOME": str(tmp_path)}
    words = [environment(*requirements), "-c", _CODE.format(code), tmp_path]
    result = subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, env=environ)
    flagged = set(json.loads(result.stdout.splitlines()[-1]))
    assert len(flagged) >= least
    ours = {path.name for path in files if not scan(path).ok}
    assert flagged - ours == set()
