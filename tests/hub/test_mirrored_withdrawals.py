"""What the upstream of a mirror withdraws is withdrawn at the mirror, with the reason, as soon as it asks again."""

from __future__ import annotations

from pathlib import Path

from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.ref import Ref
from adapterhub.registry.releases import release_moves
from tests.hub.conftest import serving
from tests.hub.sending import WEIGHTS
from tests.hub.test_mirror import FRESH, mirroring
from tests.support.adapters import Make

SQL = Ref.parse("team/sql")


def test_a_mirror_withdraws_what_its_upstream_withdrew_and_takes_it_back_too(tmp_path: Path, make: Make) -> None:
    with (
        serving(tmp_path / "upstream") as upstream,
        mirroring(tmp_path / "mirror", upstream.url, age=FRESH) as (mirror, client),
    ):
        with upstream.registry() as registry:
            registry.push(make("a1", 1), SQL)
        assert client.ask("GET", f"/team/sql/resolve/main/{WEIGHTS}").status == 200
        with mirror.registry() as registry:
            registry.author = "alice"
            registry.tag(SQL, "ours")
        with upstream.registry() as registry:
            release_moves.withdraw(registry.ledger, SQL, ReleaseStatement("a leaked key"))
        for reference in ("main", "ours"):
            answer = client.ask("GET", f"/team/sql/resolve/{reference}/{WEIGHTS}")
            assert (answer.status, b"a leaked key" in answer.data) == (410, True)
        with upstream.registry() as registry:
            release_moves.undo_withdrawal(registry.ledger, Ref("team/sql", number=1))
        assert client.ask("GET", f"/team/sql/resolve/main/{WEIGHTS}").status == 200
        # What somebody here withdraws stays so, though the upstream has taken its own withdrawal back.
        with mirror.registry() as registry:
            registry.author = "alice"
            release_moves.withdraw(registry.ledger, Ref("team/sql", number=1), ReleaseStatement("ours"))
        for _ in range(2):
            answer = client.ask("GET", f"/team/sql/resolve/main/{WEIGHTS}")
            assert (answer.status, b"ours" in answer.data) == (410, True)
