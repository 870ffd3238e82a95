"""schemathesis reads the OpenAPI document of a hub and asks everything that is in it, and much that is nearly so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from adapterhub.ref import Ref
from tests.hub.conftest import serving
from tests.hub.test_faults import assert_sound
from tests.support.adapters import write_adapter
from tests.support.environments import environment

pytestmark = pytest.mark.peer
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
# 501 is what this hub has not and the Hugging Face Hub has. Methods that a path has not are those of the pages.
_CONFIG = """
hooks = "hooks.py"
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "501"]
[phases.coverage]
unexpected-methods = []
"""
# Bodies as a document a line; and most names are those of what is there.
_HOOKS = """
import json
import zlib

import schemathesis

@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    return b"\\n".join(json.dumps(one).encode() for one in (value if isinstance(value, list) else [value]))

@schemathesis.hook
def map_path_parameters(context, parameters):
    known = {"namespace": "team", "repo": "sql", "revision": "main", "reference": "latest"}
    return {key: known.get(key, value) if _often(key, value) else value for key, value in (parameters or {}).items()}

def _often(*about):
    return zlib.crc32(repr(about).encode()) % 8
"""


@pytest.mark.parametrize("is_member", [False, True], ids=["nobody", "writer"])
def test_every_answer_is_one_of_the_document(tmp_path: Path, is_member: bool) -> None:
    program = environment("schemathesis==4.32.5").with_name("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(_CONFIG)
    (tmp_path / "hooks.py").write_text(_HOOKS)
    with serving(tmp_path / "hub") as hub:
        with hub.registry() as registry:
            registry.push(write_adapter(tmp_path / "sql", 1), Ref("team/sql"))
        words = ["--config-file", tmp_path / "schemathesis.toml", "run", f"{hub.url}/api/openapi.json", "--checks", _CHECKS]
        words += ["--phases", "examples,coverage,fuzzing", "--max-examples", 10, "--seed", 1, "--generation-database", "none"]
        words += ["--header", f"Authorization: Bearer {hub.token}"] if is_member else []
        result = subprocess.run(
            [str(word) for word in (program, *words)],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "NO_COLOR": "1"},
        )
        assert_sound(hub.folder)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
