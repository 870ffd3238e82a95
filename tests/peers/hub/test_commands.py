"""Every command does to a hub in a database and a bucket what it does to a registry in a folder."""

from __future__ import annotations

import asyncio
import re
import shutil
from contextlib import closing
from pathlib import Path

import click
import pytest

from adapterhub.cli.main import COMMANDS, app
from adapterhub.hub.accounts import device_logins
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.storage.from_settings import open_database, open_registry
from adapterhub.hub.storage.shared_storage import open_bucket
from adapterhub.manifest.rollout_state import RolloutState, RolloutStep
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.registry.releases import rollouts
from adapterhub.serve.gateway.lookup import RegistryLookup
from adapterhub.trust import keys
from tests.cli.test_options import commands
from tests.conftest import Run
from tests.support import tiny
from tests.support.adapters import write_adapter
from tests.support.object_stores import Server
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer

STEPS = """
push one team/sql -m first --tag stable
push two team/sql --metric accuracy=0.5
push two other/sql
list
search team
show team/sql
log team/sql:v1
lineage team/sql
search --file two/adapter_model.safetensors
tag team/sql:v1 prod
promote team/sql:v2 prod -m better
rollback team/sql:prod -m worse
withdraw other/sql:v1 -m leaked
withdraw other/sql:v1 --undo
approve team/sql:v2 --for prod -m read --key team.key
deprecate team/sql:v1 old
du
diff team/sql:v1 team/sql:v2
validate team/sql:v1
describe one --dry-run
verify team/sql:v1
policy check team/sql:v1
scan team/sql:v1
bom team/sql:v1
pull team/sql:v1 -o pulled
lock team/sql:prod
convert team/sql:v1 a.mlx --to mlx
bundle team/sql:v1 -o bundle.tar
copy team/sql:v2 layout://layout:v2
base add tiny base
base list
resolve other/sql:v1 --for peft
merge team/sql:v1 team/sql:v2 -o team/merged
rebuild team/merged
rebuild --list
keep team/sql --last 1
gc --dry-run --grace 2
fsck
fsck --rebuild-index
fsck --repair --from two
audit verify
rm other/sql
restore other/sql
mv other/sql other/moved
list
base show tiny
base rm tiny
audit checkpoint -o checkpoint.json --key team.key
hub user add ada
hub user add bob --role write
hub user link ada --issuer https://login.example --subject 7
hub user list
hub member set team ada --role read
hub member list team
hub member rm team ada
hub user rm bob
hub token create ada --role read
hub token list
hub token revoke 3
hub publisher add team --issuer https://ci.example --claim sub=x
hub publisher list
hub publisher rm 1
hub webhook add team https://hooks.example/x
hub webhook list
hub webhook rm 1
hub admission add --issuer https://login.example --claim groups=ml --namespace team --role write
hub admission list
hub admission rm 1
hub namespace set team --readers members
hub namespace list
hub gc --grace 2
hub log
hub doctor
hub backup hub.tar
"""
# What a shared hub refuses, and why.
REFUSED = {
    "pack": "a hub in a bucket has no packed files",
    "sign": "a hub in a bucket keeps signatures that its clients attach",
}
WITHOUT_A_REGISTRY = {
    "attach", "attest", "completion", "explain", "extract", "fix", "info", "init", "key", "login",
    "logout", "remote", "served", "usage", "verify-merge",
}  # fmt: skip
WITH_A_GATEWAY = {"rollout"}  # below
# By tests of their own, which name the command: what needs a second hub, a hub that runs, or a code of its own.
BY_THEMSELVES = {
    "hub approve": __file__,
    "hub load-backup": __file__,
    "hub migrate": "tests/peers/hub/test_migration.py",  # from the one kind of place to the other
    "hub recover": "tests/peers/hub/test_migration.py",  # a folder has no second copy of its log
    "hub start": "tests/peers/hub/test_equal_answers.py",  # by the answers of both kinds of hub to 500 requests
}
WITH_A_MODEL = {"chat", "eval", "run", "serve", "train"}  # look adapters up as `pull` and `show` do
_VARYING = re.compile(
    r"hf_\w+|\b[0-9a-f]{64}\b|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\dZ?|urn:uuid:[0-9a-f-]+|(?<=CHECK) +(?=STATE)|  +|hub.tar.*"
)


def test_every_command_is_tried_at_a_shared_hub() -> None:
    lines = STEPS.strip().splitlines()
    tried = {line.split()[0] for line in lines} | REFUSED.keys()
    exempt = WITHOUT_A_REGISTRY | WITH_A_GATEWAY | WITH_A_MODEL
    assert tried | exempt == set(COMMANDS)
    leaves = {name for name, command in commands(app) if not isinstance(command, click.Group) and name.split()[0] not in exempt}
    untried = {leaf for leaf in leaves if not any(f"{line} ".startswith(f"{leaf} ") for line in lines)}
    assert untried == BY_THEMSELVES.keys() | REFUSED.keys()


@pytest.fixture
def shared(postgres: Postgres, moto: Server) -> dict[str, str]:
    """The environment of whoever operates a hub in an empty database and an empty bucket."""
    return {"ADAPTERHUB_DATABASE": postgres.database(), "ADAPTERHUB_BLOBS": f"s3://{moto.bucket()}/hub", **moto.environ}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, a base model, and a key."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("one", "two")):
        write_adapter(folder / name, seed)
    tiny.model().save_pretrained(folder / "base")
    keys.generate(folder / "team")
    return folder


def test_each_command_does_at_a_shared_hub_what_it_does_in_a_folder(
    run: Run, inputs: Path, tmp_path: Path, shared: dict[str, str]
) -> None:
    printed = []
    locations = (str(tmp_path / "xdg" / "adapterhub"), _location(shared))
    for location, environment in zip(locations, ({}, shared), strict=True):
        folder = shutil.copytree(inputs, tmp_path / str(len(printed)))
        results = []
        for line in STEPS.strip().splitlines():
            result = run(*line.split(), cwd=folder, env=environment, code=None)
            assert result.returncode == 0, (line, result.stderr)
            text = (result.stdout + result.stderr).replace(f"created the registry {location}\n", "")
            text = re.sub("permissions +ok\n", "", text)  # of hub.db, a file
            for part in (str(folder), location, location.split()[0]):
                text = text.replace(part, "REGISTRY")
            results.append((line, _VARYING.sub(" ", text)))
        printed.append(results)
    assert printed[0] == printed[1]


def test_a_login_is_approved_in_a_folder_and_at_a_shared_hub(run: Run, tmp_path: Path, shared: dict[str, str]) -> None:
    settings = HubSettings(
        tmp_path / "copies", database=shared["ADAPTERHUB_DATABASE"], blobs=shared["ADAPTERHUB_BLOBS"], environ=shared
    )
    for place, environment in ((HubSettings(tmp_path / "folder"), {}), (settings, shared)):
        run("--registry", place.registry, "hub", "user", "add", "ada", env=environment)
        with closing(open_database(place)) as database:
            device, code = device_logins.begin(database, "192.0.2.1")
            output = run("--registry", place.registry, "hub", "approve", code, "--as", "ada", env=environment).stdout
            assert "a program at 192.0.2.1 may act for ada" in output
            assert device_logins.collect(database, device).account == "ada"


def _location(shared: dict[str, str]) -> str:
    return f"{shared['ADAPTERHUB_DATABASE'].replace('postgres@', '')} {shared['ADAPTERHUB_BLOBS']}"


def test_a_rollout_at_a_shared_hub_is_shown_and_aborted(run: Run, inputs: Path, tmp_path: Path, shared: dict[str, str]) -> None:
    for name in ("one", "two"):
        run("push", name, "team/sql", cwd=inputs, env=shared)
    settings = HubSettings(
        tmp_path / "hub", database=shared["ADAPTERHUB_DATABASE"], blobs=shared["ADAPTERHUB_BLOBS"], environ=shared
    )
    with open_registry(settings) as registry:
        stable, candidate = (registry.row(Ref("team/sql", number=number)).digest for number in (1, 2))
        state = RolloutState("legal", f"team/sql@{stable}", (RolloutStep(5, 600),), {"errors": 10.0})
        rollouts.change(registry.ledger, Ref("team/sql", digest=candidate), "legal", lambda _: state)
    assert "legal: running at 5 %, step 1 of 1" in run("rollout", "show", "team/sql", env=shared).stdout
    assert "legal: rolled back: aborted" in run("rollout", "abort", "team/sql", env=shared).stdout


def test_what_only_a_folder_can_do_is_refused(run: Run, inputs: Path, shared: dict[str, str]) -> None:
    run("key", "generate", "ada", cwd=inputs)
    run("push", "one", "team/sql", cwd=inputs, env=shared)
    for words in (("pack",), ("sign", "team/sql", "--key", "ada.key")):
        assert REFUSED[words[0]] in run(*words, cwd=inputs, env=shared, code=6).stderr
    assert "0 files" in run("pack", "--undo", cwd=inputs, env=shared).stdout


def test_a_damaged_and_a_missing_blob_of_the_bucket_are_found_and_repaired(
    run: Run, inputs: Path, shared: dict[str, str]
) -> None:
    run("push", "one", "team/sql", cwd=inputs, env=shared)
    with closing(open_bucket(shared["ADAPTERHUB_BLOBS"], shared)) as bucket:
        damaged, missing = sorted(bucket.objects("blobs/sha256"), key=lambda item: item[1])[-2:]
        bucket.put_object(damaged[0], b"x" * damaged[1])
        bucket.remove(missing[0])
    report = run("fsck", cwd=inputs, env=shared, code=1).stdout
    assert f"{shared['ADAPTERHUB_BLOBS']}/{damaged[0]}" in report
    assert missing[0].rpartition("/")[2] in report
    assert "restored 2 blobs" in run("fsck", "--repair", "--from", "one", cwd=inputs, env=shared).stderr
    assert "clean" in run("fsck", cwd=inputs, env=shared).stdout


def test_a_backup_goes_from_a_shared_hub_to_a_folder_and_back(
    run: Run, inputs: Path, tmp_path: Path, shared: dict[str, str], postgres: Postgres, moto: Server
) -> None:
    run("push", "one", "team/sql", "-m", "first", cwd=inputs, env=shared)
    token = run("hub", "token", "create", "ada", "--role", "read", cwd=inputs, env=shared).stdout
    run("hub", "backup", tmp_path / "hub.tar", env=shared)
    again = shared | {"ADAPTERHUB_DATABASE": postgres.database(), "ADAPTERHUB_BLOBS": f"s3://{moto.bucket()}/hub"}
    run("hub", "load-backup", tmp_path / "hub.tar", env=again)
    run("hub", "load-backup", tmp_path / "hub.tar", "--registry", tmp_path / "folder")
    for words, environment in (((), again), (("--registry", tmp_path / "folder"), {})):
        assert "team/sql:v1" in run("list", *words, env=environment).stdout
        assert "ada" in run("hub", "token", "list", *words, env=environment).stdout
        assert "clean" in run("fsck", *words, env=environment).stdout
    assert "has a hub already" in run("hub", "load-backup", tmp_path / "hub.tar", env=again, code=6).stderr
    assert token


def test_a_folder_with_a_registry_of_its_own_is_meant_where_it_is_named(run: Run, inputs: Path, shared: dict[str, str]) -> None:
    run("push", "one", "team/sql", "--registry", inputs / "registry", cwd=inputs)
    assert "team/sql:v1" in run("list", "--registry", inputs / "registry", env=shared).stdout
    assert "team/sql" not in run("list", env=shared).stdout


def test_one_variable_alone_is_refused(run: Run, shared: dict[str, str]) -> None:
    for name in ("ADAPTERHUB_DATABASE", "ADAPTERHUB_BLOBS"):
        environment = {key: value for key, value in shared.items() if key != name}
        assert f"{name}: not set" in run("list", env=environment, code=2).stderr


def test_a_gateway_over_a_shared_hub_sees_what_others_push(shared: dict[str, str], inputs: Path, tmp_path: Path) -> None:
    settings = HubSettings(
        tmp_path / "gateway", database=shared["ADAPTERHUB_DATABASE"], blobs=shared["ADAPTERHUB_BLOBS"], environ=shared
    )
    other_settings = HubSettings(tmp_path / "other", database=settings.database, blobs=settings.blobs, environ=shared)
    lookup = RegistryLookup(Workspace(tmp_path / "gateway", opener=lambda: open_registry(settings)))
    try:
        with open_registry(other_settings) as registry:
            digests = [registry.push(inputs / name, Ref("team/sql")).digest for name in ("one", "two")]
            assert asyncio.run(lookup.find(Ref("team/sql"))).digest == digests[1]
            registry.tag(Ref("team/sql", number=1), "prod")
            assert asyncio.run(lookup.find(Ref("team/sql", tag="prod"))).digest == digests[0]
            registry.tag(Ref("team/sql", number=2), "prod")
            assert asyncio.run(lookup.find(Ref("team/sql", tag="prod"))).digest == digests[1]
    finally:
        lookup.close()
