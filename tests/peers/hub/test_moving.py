"""Moves of repositories in a hub over PostgreSQL and a bucket, as `tests/hub/test_moving.py` has them in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.settings import HubSettings
from tests.conftest import ROOT
from tests.hub.test_moving import check_every_step, filled

pytestmark = pytest.mark.peer

MOVE = """
import json, sys
from pathlib import Path
from adapterhub.hub.settings import HubSettings
from tests.hub.test_moving import move_until
folder, places, old, new, steps = sys.argv[1:]
move_until(HubSettings(registry=Path(folder), **json.loads(places)), old, new, int(steps))
"""


def test_a_move_whose_process_is_killed_at_any_step_is_under_one_name_and_another_process_ends_it(
    places: dict[str, Any], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    def run(settings: HubSettings, *words: Any) -> int:  # an interpreter of its own: what speaks to the bucket cannot be forked
        command = [sys.executable, "-c", MOVE, str(settings.registry), json.dumps(places), *map(str, words)]
        paths = os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))
        return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": paths}, timeout=240).returncode

    check_every_step(filled(HubSettings(registry=tmp_path / "hub", **places), adapter), run, stride=4)
