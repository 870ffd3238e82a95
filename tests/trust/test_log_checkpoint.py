"""Checkpoints of logs: signed, changed, of another key or no checkpoint at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.trust import keys
from adapterhub.trust.log_checkpoint import Checkpoint
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, NotFoundError
from tests.store.test_log_chain import changed, entry, faults, write_logs


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logs(tmp_path_factory.mktemp("logged"))


@pytest.fixture
def copy(logged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(logged, tmp_path / "copy"))


def test_a_key_that_is_encrypted_signs_with_its_passphrase(copy: Path) -> None:
    secret, public = keys.generate(copy / "locked", passphrase=b"open sesame")
    ah.sign_checkpoint(copy / "r", copy / "another.json", secret, passphrase=b"open sesame")
    assert ah.audit(copy / "r", checkpoint=copy / "another.json", keys=public.source).ok


def test_a_log_that_was_changed_is_not_signed(copy: Path) -> None:
    changed(entry(copy, 2))
    with pytest.raises(IntegrityError, match="00000002.json: changed"):
        ah.sign_checkpoint(copy / "r", copy / "another.json", copy / "audit.key")
    assert not (copy / "another.json").exists()


def edited(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "kind", "message"),
    [
        (lambda document: document["ends"]["refs"].pop("team/sql"), IntegrityError, "was changed after it was signed"),
        (lambda document: document.update(time="2020"), IntegrityError, "was changed after it was signed"),
        (lambda document: document.update(audit=None), IntegrityError, "was changed after it was signed"),
        (lambda document: document.update(more=1), IntegrityError, "was changed after it was signed. Use a copy that was not"),
        (lambda document: document.pop("bundle"), FormatError, "not a checkpoint: it has no signature. Sign a new one"),
        (lambda document: document.update(bundle=[]), FormatError, "not a JSON object. Have it signed again"),
    ],
)
def test_a_checkpoint_that_was_changed_is_refused(
    copy: Path, edit: Callable[[dict[str, object]], object], kind: type[AdapterhubError], message: str
) -> None:
    edited(copy / "checkpoint.json", edit)
    with pytest.raises(kind, match=message):
        faults(copy)


@pytest.mark.parametrize(
    "checkpoint",
    [
        Checkpoint(7, {}),  # type: ignore[arg-type]
        Checkpoint("2026-01-01T00:00:00Z", {"refs": {"team/sql": (0, f"sha256:{1:064x}")}}),
        Checkpoint("2026-01-01T00:00:00Z", {"refs": {"team/sql": (1, "sha256:1")}}),
        Checkpoint("2026-01-01T00:00:00Z", {}, (1, "z" * 64)),
    ],
)
def test_a_signed_document_that_is_no_checkpoint_is_refused(copy: Path, checkpoint: Checkpoint) -> None:
    (copy / "checkpoint.json").write_bytes(checkpoint.sign(keys.read_private(copy / "audit.key"), "x"))
    with pytest.raises(FormatError, match="not a checkpoint: its time or the end of a log is malformed. Sign a new one"):
        faults(copy)


def test_another_key_and_a_signature_of_something_else_are_refused(copy: Path) -> None:
    keys.generate(copy / "other")
    with pytest.raises(IntegrityError, match="which is not accepted"):
        ah.audit(copy / "r", checkpoint=copy / "checkpoint.json", keys=[copy / "other.pub"])
    from adapterhub.trust import bundle, statement

    secret = keys.read_private(copy / "audit.key")
    signed = json.loads(bundle.sign(statement.Statement("x", statement.files_in(copy / "a1")), secret))
    edited(copy / "checkpoint.json", lambda document: document.update(bundle=signed))
    with pytest.raises(
        FormatError, match="signs .https://model_signing/signature/v1.0., not urn:adapterhub:checkpoint:1. Sign a new one"
    ):
        faults(copy)
    with pytest.raises(NotFoundError):
        ah.audit(copy / "r", checkpoint=copy / "absent.json", keys=[copy / "audit.pub"])
    with pytest.raises(NotFoundError):
        ah.audit(copy / "absent")
