"""adapter.toml: merged with what is derived, and refused where the schema does not allow it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.manifest import derive
from adapterhub.manifest.document import Training
from adapterhub_converters.errors import FormatError, UsageError

Make = Callable[..., Path]


def test_declarations_are_merged(make: Make) -> None:
    folder = make()
    (folder / "adapter.toml").write_text(
        'name = "sql"\nlicense = "MIT"\n[base]\nrevision = "abc"\n[training]\ncreated = 2026-01-31T13:00:00+01:00\n'
    )
    manifest = derive.describe(folder)
    assert (manifest.name, manifest.license, manifest.base.repo, manifest.base.revision) == (
        "sql",
        "MIT",
        "org/base",
        "abc",
    )
    assert manifest.training == Training(created="2026-01-31T12:00:00Z", recorder="owner")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('licence = "MIT"', "unknown key licence. Did you mean license?"),  # codespell:ignore
        ("[base]\nrepository = 'x'", "unknown key base.repository. Did you mean base.repo?"),
        ("base = 3", "base is not a table"),
        ("x = ", "not valid TOML"),
        ("[training]\nlr = 3", "unknown key training.lr"),
    ],
)
def test_refused_declarations(make: Make, text: str, says: str) -> None:
    folder = make()
    (folder / "adapter.toml").write_text(text)
    with pytest.raises(UsageError, match="adapter.toml: ") as caught:
        derive.describe(folder)
    assert says in str(caught.value)


def test_a_declaration_of_the_wrong_type_is_named(make: Make) -> None:
    with pytest.raises(FormatError, match="name: 3 is not of type"):
        derive.describe(make(), declared={"name": 3})


def test_numbers_that_json_cannot_hold_are_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="a value that JSON cannot hold"):
        derive.describe(make(), training=Training(metrics={"loss": float("nan")}))


def test_a_declaration_that_changes_a_record_makes_its_owner_the_recorder(make: Make) -> None:
    folder = make()
    derive.describe(folder, training=Training(seed=7, metrics={"loss": 2.0}, recorder="trainer")).write(folder)
    for toml, recorder in (("seed = 7", "trainer"), ("metrics = {loss = 1.0}", "owner")):
        (folder / "adapter.toml").write_text(f"[training]\n{toml}\n")
        settled = derive.finalize(folder)[0]
        assert (settled.training and settled.training.recorder) == recorder
    (folder / "adapter.toml").write_text('[training]\nrecorder = "trainer"\n')
    with pytest.raises(UsageError, match=r"unknown key training.recorder"):
        derive.finalize(folder)


def test_a_declared_result_is_recorded_by_its_owner_and_by_nobody_else(make: Make) -> None:
    folder = make("sql")
    (folder / "adapter.toml").write_text('[[evaluations]]\nmetric = "bleu"\nvalue = 30\nharness = "sacrebleu 2.5"\n')
    evaluations = derive.describe(folder).evaluations
    assert evaluations
    assert (evaluations[0].recorder, evaluations[0].harness) == ("owner", "sacrebleu 2.5")
    (folder / "adapter.toml").write_text('[[evaluations]]\nmetric = "bleu"\nvalue = 30\nrecorder = "sacrebleu"\n')
    with pytest.raises(UsageError, match="'sacrebleu' is no recorder of a declaration, which its owner makes"):
        derive.describe(folder)
    for value in ("evaluations = 3", "evaluations = [3]"):
        (folder / "adapter.toml").write_text(f"{value}\n")
        with pytest.raises(FormatError):
            derive.describe(folder)
