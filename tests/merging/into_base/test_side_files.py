"""Files next to the weights: copied, or left out with a reason."""

from __future__ import annotations

from pathlib import Path

from adapterhub.merging import merge_into_base
from tests.merging.into_base.test_model_merge import PLAIN, base_in


def test_side_files(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    for name in (
        "tokenizer.json",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "adapter_config.json",
        ".git/x",
        "sub/vocab.txt",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    (tmp_path / "secret").write_text("x")
    (base / "link.txt").symlink_to(tmp_path / "secret")
    report = merge_into_base([(PLAIN, 1.0)], base, tmp_path / "out")
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == {"config.json", "model.safetensors", "tokenizer.json", "sub/vocab.txt", "README.md"}
    assert set(report.skipped) == {"pytorch_model.bin", "consolidated.safetensors", "adapter_config.json", "link.txt"}
    assert "pickle" in report.skipped["pytorch_model.bin"]
