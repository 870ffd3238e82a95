"""What a check of headers does not need, it does not load: most of its time is imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import folders


def test_a_check_loads_no_reader_of_another_format(tmp_path: Path) -> None:
    adapter, base = folders.adapter(tmp_path / "a", folders.pairs(2)), folders.base(tmp_path / "b")
    code = (
        "import sys; from adapterhub.cli.main import run; "
        f"code = run(['validate', {str(adapter)!r}, '--base', {base.source!r}, '--headers-only']); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert "adapterhub.checks" in loaded
    unneeded = {
        "torch",
        "urllib.request",
        "urllib3",
        "adapterhub_converters.formats.convert",
        "adapterhub_converters.containers.gguf_file",
        "jsonschema",
    }
    assert not unneeded & loaded
