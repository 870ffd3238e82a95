"""The server is killed in the middle of uploads by the clients of others: they finish, and nothing is lost or half there.

A client that gives up is run once more, as its user would.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from adapterhub.ref import Ref
from tests.conftest import need_program
from tests.hub.killing import Killable, Killer, Moment, assert_sound, killable_hub
from tests.hub.oci.conftest import logged_in
from tests.hub.sending import WEIGHTS
from tests.support.adapters import write_large_adapter
from tests.support.hub_clients import HubClient

pytestmark = pytest.mark.peer
MIB = 1 << 20
BYTES = [Moment(1), Moment(MIB), Moment(8 * MIB), Moment(14 * MIB)]  # of some 16 MiB


def around(*requests: bytes) -> list[Moment]:
    """The moments before and after the hub works on requests."""
    return [Moment(request=request, answered=answered) for request in requests for answered in (False, True)]


HF = [*BYTES, *around(b"/preupload/", b"/commit/")]
LFS, XET = [*HF, *around(b"PUT /")], [*HF, *around(b"/v1/xorbs/")]
OCI = [*BYTES, *around(b"POST /", b"PUT /", b"/manifests/latest")]


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Killable]:
    """A hub that can be killed."""
    with killable_hub(tmp_path / "hub") as running:
        yield running


def weights_of(killable: Killable) -> list[str]:
    """The digests of the weights of all versions, oldest first; the last one is the latest."""
    with killable.running().registry() as registry:
        versions = [registry.resolve(row.ref) for row in reversed(registry.list("team/sql"))]
        assert registry.resolve(Ref("team/sql")).digest == versions[-1].digest
        layers = [layer for version in versions for layer in registry.files(version) if layer.path == WEIGHTS]
    return [layer.digest.removeprefix("sha256:") for layer in layers]


def uploads(
    killable: Killable, killer: Killer, moments: Sequence[Moment], upload: Callable[[Path], bool], folder: Path
) -> None:
    """Have a client upload ten adapters, each at the second try at the latest, and kill the hub in each first try."""
    assert len(moments) == 10
    expected = []
    for seed, moment in enumerate(moments):
        adapter = write_large_adapter(folder / f"sql-{seed}", seed)
        expected.append(hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest())
        killer.at(moment)
        is_uploaded = upload(adapter)
        assert killer.has_killed(), moment
        assert is_uploaded or upload(adapter), moment
        assert weights_of(killable) == expected, moment
    killable.kill()
    assert_sound(killable.folder)
    killable.start()


@pytest.mark.parametrize(
    ("hf_client", "moments"),
    [(("0.36.2", None), LFS), (("2.4.0", None), LFS), (("1.20.0", "1.5.2"), XET), (("2.4.0", "1.8.0"), XET)],
    indirect=["hf_client"],
    ids=["0.36.2-lfs", "2.4.0-lfs", "1.20.0-xet-1.5.2", "2.4.0-xet-1.8.0"],
)
def test_hf_finishes_ten_uploads_in_each_of_which_the_server_is_killed(
    hf_client: HubClient, moments: Sequence[Moment], killable: Killable, tmp_path: Path
) -> None:
    token = killable.running().token
    with Killer(killable) as killer:
        url = f"http://{killer.host}"

        def upload(folder: Path) -> bool:
            words = ("upload", "team/sql", folder, ".")
            return hf_client.hf(url, *words, env={"HF_TOKEN": token}, code=None).returncode == 0

        uploads(killable, killer, moments, upload, tmp_path)


def test_oras_finishes_ten_pushes_in_each_of_which_the_server_is_killed(killable: Killable, tmp_path: Path) -> None:
    oras, token = need_program("oras"), killable.running().token
    with Killer(killable) as killer:
        env = {**os.environ, **logged_in(killer.host, token, tmp_path / "home")}

        def push(folder: Path) -> bool:
            names = sorted(path.name for path in folder.iterdir())
            # At any other time it would push another manifest.
            time = "org.opencontainers.image.created=2026-01-01T00:00:00Z"
            words = [oras, "push", "--plain-http", "--annotation", time, f"{killer.host}/team/sql:latest", *names]
            return subprocess.run(words, check=False, cwd=folder, env=env, capture_output=True, timeout=240).returncode == 0

        uploads(killable, killer, OCI, push, tmp_path)
