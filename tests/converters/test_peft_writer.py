"""PEFT folders are written as they were read, byte for byte, or with the same scale for every module."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from adapterhub_converters.formats import peft
from tests.converters.test_peft_reader import PAIR, folder


def test_writing_what_was_read_gives_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", PAIR)
    (tmp_path / "b").mkdir()
    peft.write(peft.read(source), tmp_path / "b")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


def test_a_rewritten_config_gives_every_module_the_same_scale(tmp_path: Path) -> None:
    tensors = {f"l.{n}.q.lora_{half}.weight": (3, 8) if half == "A" else (6, 3) for n in (1, 10) for half in "AB"}
    adapter = peft.read(folder(tmp_path / "a", tensors | PAIR, alpha_pattern={"l.1.q": 5}, use_rslora=True))
    (tmp_path / "b").mkdir()
    peft.write(dataclasses.replace(adapter, source=None), tmp_path / "b")
    again = peft.read(tmp_path / "b")
    assert {t: (d.r, d.scaling) for t, d in again.deltas.items()} == {t: (d.r, d.scaling) for t, d in adapter.deltas.items()}
