"""What a check of headers does not need, it does not load: most of its time is imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import folders


def test_a_check_loads_no_reader_of_another_format(tmp_path: Path) -> None:
    adapter, base = folders.adapter(tmp_path / "a", folders.pairs(2)), folders.base(tmp_path / "b")
    code = (
        "import sys; from adapterhub.cli.main import run; "
        f"code = run(['validate', {str(adapter)!r}, '--base', {base.source!r}, '--headers-only']); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stderr.split())
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


@pytest.mark.parametrize("command", ["push", "validate", "convert"])
@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model."])
def test_an_adapter_of_a_language_model_loads_nothing_of_image_models(command: str, prefix: str, tmp_path: Path) -> None:
    pairs = {name.replace("base_model.model.model.", prefix): values for name, values in folders.pairs(2).items()}
    adapter, registry = folders.adapter(tmp_path / "a", pairs), tmp_path / "registry"
    arguments = {
        "push": ["push", str(adapter), "team/sql", "--registry", str(registry)],
        "validate": ["validate", str(adapter)],
        "convert": ["convert", str(adapter), str(tmp_path / "mlx"), "--to", "mlx"],
    }
    code = f"""
import sys
from adapterhub.cli.main import run
code = run(['init', {str(registry)!r}]) or run({arguments[command]!r})
needless = [name for name in sys.modules if any(part in name for part in ('.image.', '.trainers.', '.gguf_model.'))]
print('loaded:', *needless, file=sys.stderr)
sys.exit(code)
"""
    result = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (0, "loaded:")
