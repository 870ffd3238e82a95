"""Fields that a client sends back are the hub's own, and only for the purpose that they were signed for."""

from __future__ import annotations

from adapterhub.hub.signed_fields import signature, signed_purpose


def test_a_signature_is_for_one_purpose_and_these_fields() -> None:
    sent = signature(b"secret", "propose", "team/sql", 7)
    assert signed_purpose(b"secret", sent, ("upload", "propose"), "team/sql", "7") == "propose"
    assert signed_purpose(b"secret", sent, ("upload",), "team/sql", 7) == ""
    assert signed_purpose(b"other", sent, ("propose",), "team/sql", 7) == ""
    assert signed_purpose(b"secret", sent, ("propose",), "team/sql", 8) == ""
    assert signed_purpose(b"secret", "\ud800é", ("propose",), "team/sql", 7) == ""
