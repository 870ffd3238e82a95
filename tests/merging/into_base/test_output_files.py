"""Files of a merge appear whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from adapterhub.merging import merge_into_base
from adapterhub_converters.errors import LocalIOError
from tests.conftest import ROOT
from tests.merging.into_base.test_model_merge import PLAIN, base_in

FUSE = """
import resource, sys, time
from pathlib import Path
from tests.merging.into_base.test_model_merge import PLAIN, merge_into_base
base, out, how = sys.argv[1:]
if how == "small":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
def wait(done, size):
    print("half way", flush=True)
    time.sleep(60)
merge_into_base([(PLAIN, 1.0)], Path(base), Path(out), progress=wait if how == "wait" else None)
"""


def in_a_process(base: Path, way: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FUSE, str(base), str(base.parent / "out"), way],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'converters'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_half_way_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    with in_a_process(base, "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        names = [path.name for path in tmp_path.iterdir() if path.name != "base"]
        assert len(names) == 1
        assert names[0].startswith(".out.partial-")
        merge_into_base([(PLAIN, 1.0)], base, tmp_path / "out")  # while another still works: its folder stays
        assert (tmp_path / names[0]).exists()
        (tmp_path / "out").rename(tmp_path / "first")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    merge_into_base([(PLAIN, 1.0)], base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "first", "out"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    with in_a_process(base, "small") as process:
        assert process.stderr is not None
        last = process.stderr.read().strip().splitlines()[-1]
    assert last.startswith(
        f"{LocalIOError.__module__}.LocalIOError: {tmp_path / 'out'}: File too large; nothing was left behind"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
