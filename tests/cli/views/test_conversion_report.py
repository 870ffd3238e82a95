"""The report of a conversion says once what is so of many modules."""

from __future__ import annotations

from adapterhub.cli.views import conversion_report
from adapterhub_converters.adapter import LossReport


def test_notes_that_say_the_same_of_several_modules_are_one() -> None:
    notes = [f"model.layers.{n}.q_proj: rank 4 by its tensors, 8 by the config" for n in range(213)]
    report = LossReport((), (*notes, "model.norm: is copied", "read from a folder: twice"))
    first = ", ".join(f"model.layers.{n}.q_proj" for n in range(3))
    assert conversion_report.grouped_notes(report) == [
        f"{first} and 210 more: rank 4 by its tensors, 8 by the config",
        "model.norm: is copied",
        "read from a folder: twice",
    ]
    written: list[str] = []
    conversion_report.write(report, written.append)
    assert len(written) == 3
    assert conversion_report.document(report)["notes"] == conversion_report.grouped_notes(report)
