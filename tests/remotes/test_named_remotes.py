"""Remotes by name: refs below a URL, and the command remote against real registries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.remotes.hub import hub_writer
from adapterhub.remotes.named_remotes import address_below, check_url
from adapterhub.remotes.oci.docker_credentials import Credentials
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.registry_host import RegistryHost
from adapterhub_converters.errors import FormatError, RemoteError, UsageError
from tests.conftest import Run
from tests.support import registry
from tests.support.proxy import Exchange, Proxy
from tests.support.registry import listed

Make = Callable[..., Path]


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[str]:
    """`host:port` of a registry that wants a password."""
    (tmp_path / "behind").mkdir()
    with registry.running(tmp_path / "behind", password=True) as server:
        yield server


@pytest.mark.parametrize(
    ("url", "ref", "expected"),
    [
        ("oci://host/prefix", "team/sql:v2", "oci://host/prefix/team/sql:v2"),
        ("oci://host:5000", "team/sql", "oci://host:5000/team/sql"),
        ("oci://host/prefix/", "sql@sha256:12", "oci://host/prefix/sql@sha256:12"),
        ("hf://", "team/sql:v2", "hf://team/sql@v2"),
        ("hf://team", "team/sql:v2", "hf://team/sql@v2"),
        ("hf://team", "sql", "hf://team/sql"),
        ("hf://", "team/sql@sha256:12", "hf://team/sql@sha256:12"),
        ("hub+https://hub.example", "team/sql:v2", "hub+https://hub.example/team/sql@v2"),
        ("hub+https://hub.example/team/", "sql", "hub+https://hub.example/team/sql"),
        ("layout://bundle.tar", "team/sql:v2", "layout://bundle.tar:team/sql:v2"),
        ("layout://bundle.tar", "team/sql", "layout://bundle.tar:team/sql:latest"),
        ("layout:///a/b", "team/sql@sha256:12", "layout:///a/b@sha256:12"),
        ("s3://bucket/prefix", "team/sql:v2", "s3://bucket/prefix/team/sql:v2"),
        ("file:///srv/adapters", "team/sql:v2", "file:///srv/adapters/team/sql:v2"),
        ("file:///", "team/sql:v2", "file:///team/sql:v2"),
    ],
)
def test_a_ref_on_a_remote_is_the_address_below_it(url: str, ref: str, expected: str) -> None:
    assert address_below(url, ref) == expected


@pytest.mark.parametrize(
    ("url", "ref", "words"),
    [
        ("oci://host", "oci://other/x", "an address names its place already, so it takes no remote. Write a ref"),
        ("oci://host", "../x", "is not a valid name"),
        ("oci://host", "a//b", "is not a valid name"),
        ("oci://host", "a/./b", "is not a valid name"),
        ("oci://host", "", "is not a valid name"),
        ("s3://bucket", "a?b", "is not a valid name"),
        ("s3://bucket", "a\nb", "is not a valid name"),
        ("hf://", "sql", "two parts"),
        ("hf://", "a/b/c", "two parts"),
        ("hf://team", "other/sql", "this remote belongs to team, not to other"),
        ("hub+http://host/team", "other/sql", "this remote belongs to team, not to other"),
    ],
)
def test_a_ref_that_would_leave_the_remote_or_collide_is_refused(url: str, ref: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        address_below(url, ref)


@pytest.mark.parametrize("text", ["oci://user:s3cr3t@host/x", "oci://s3cr3t@host", "https://user:s3cr3t@host"])
def test_credentials_in_a_url_are_refused_and_not_repeated(run: Run, text: str) -> None:
    with pytest.raises(UsageError, match="end up in logs"):
        check_url(text)
    result = run("remote", "add", "x", text, code=2)
    assert "s3cr3t" not in result.stdout + result.stderr
    assert "s3cr3t" not in run("login", text, "-u", "x", "--password-stdin", code=2).stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "unknown kind of remote"),
        ("://", "unknown kind of remote"),
        ("ftp://host", "unknown kind of remote"),
        ("oci://", "'' is not a valid host"),
        ("oci:///x", "'' is not a valid host"),
        ("oci://host/UP", "'UP' is not a valid name in a registry"),
        ("s3://", "not a valid address of an object store"),
        ("hf://a--b", "'a--b' is not a valid model name"),
        ("hf://a/b/c", "an adapter on a hub is a repository, org/name"),
        ("layout://", "not a valid address of an image layout, a folder or a .tar"),
        ("oci://ho st", "the URL of a remote has no query, fragment or space"),
        ("oci://host?x=1", "the URL of a remote has no query, fragment or space"),
        ("oci://host/a\nb", "the URL of a remote has no query, fragment or space"),
    ],
)
def test_what_is_no_url_of_a_remote_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        check_url(text)
    assert error.value.what == words
    assert error.value.where.partition("://")[0] == text.partition("://")[0]
    assert "remote-test" not in str(error.value)
    if not words.startswith("unknown kind"):
        assert error.value.hint.startswith(f"Write it like {text.partition('://')[0]}://")
    else:
        assert error.value.hint.startswith("Supported: az://, file://, gs://, hf://, ")


def run_json(run: Run, *words: object, **options: object) -> dict[str, object]:
    return json.loads(run(*words, "--json", **options).stdout)


def test_the_life_of_a_remote(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "xdg-config/adapterhub/config.toml"
    assert "no remotes yet" in run("remote", "list").stderr
    assert run_json(run, "remote", "add", "team", "oci://registry.example/a/", "--default")["new"] is True
    assert run_json(run, "remote", "add", "team", "oci://registry.example/a")["new"] is False
    run("remote", "add", "free", "oci://free.example")
    assert "already has the URL oci://free.example" in run("remote", "add", "free", "oci://other.example", code=7).stderr
    run("remote", "add", "free", "oci://other.example", "--force")
    assert run("remote", "default").stdout == "team  oci://registry.example/a\n"
    rows = run_json(run, "remote", "list")["remotes"]
    assert rows == [
        {"name": "free", "url": "oci://other.example", "default": False, "file": str(file)},
        {"name": "team", "url": "oci://registry.example/a", "default": True, "file": str(file)},
    ]
    run("remote", "default", "free")
    run("remote", "rm", "free")
    assert file.read_text() == '[remotes.team]\nurl = "oci://registry.example/a"\n'
    assert "Name one of team" in run("remote", "default", code=2).stderr
    assert "Name one of team" in run("remote", "default", "nobody", code=3).stderr
    run("remote", "rm", "free", code=3)


def test_the_option_then_the_environment_then_the_project_then_the_user(
    run: Run, host: str, make: Make, tmp_path: Path
) -> None:
    for name in ("user", "project", "environment", "option"):
        run("remote", "add", name, f"oci://{host}/order-{name}")
    run("remote", "default", "user")
    (tmp_path / "p/deep").mkdir(parents=True)
    run("remote", "add", "project", f"oci://{host}/order-theirs", "--project", "--default", cwd=tmp_path / "p")
    make()

    def pushed_ref(*words: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> object:
        return run_json(run, "push", tmp_path / "adapter", "t/x", *words, cwd=cwd, env=env)["ref"]

    inside, variable = tmp_path / "p/deep", {"ADAPTERHUB_REMOTE": "environment"}
    assert pushed_ref("--remote") == f"oci://{host}/order-user/t/x:latest"
    assert pushed_ref("--remote", cwd=inside) == f"oci://{host}/order-theirs/t/x:latest"
    assert pushed_ref("--remote", cwd=inside, env=variable) == f"oci://{host}/order-environment/t/x:latest"
    assert pushed_ref("--remote", "option", cwd=inside, env=variable) == f"oci://{host}/order-option/t/x:latest"
    assert pushed_ref(cwd=inside, env=variable) == "t/x:v1"


def test_the_projects_registry_precedes_a_nearby_one(run: Run, make: Make, tmp_path: Path) -> None:
    inside = tmp_path / "p/deep"
    inside.mkdir(parents=True)
    run("init", inside)
    (tmp_path / "p/adapterhub.toml").write_text('registry = "theirs"\n')
    run("init", cwd=inside)
    assert (tmp_path / "p/theirs/registry.db").exists()
    run("push", make(), "team/sql", cwd=inside)
    assert len(json.loads(run("list", "--json", cwd=tmp_path / "p").stdout)["adapters"]) == 1
    assert json.loads(run("list", "--json", "--registry", inside, cwd=inside).stdout)["adapters"] == []
    (tmp_path / "xdg-config/adapterhub").mkdir(parents=True)
    (tmp_path / "xdg-config/adapterhub/config.toml").write_text(f'registry = "{tmp_path}/mine"\n')
    run("push", tmp_path / "adapter", "team/sql")
    assert (tmp_path / "mine/registry.db").exists()


def test_a_project_owned_by_another_user_is_skipped_with_a_warning(run: Run, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = tmp_path / "adapterhub.toml"
    path.write_text('remote = "evil"\n[remotes.evil]\nurl = "oci://evil.example"\n')
    os.chown(path, 12345, -1)
    result = run("remote", "list")
    assert "evil" not in result.stdout
    assert "belongs to another user and is passed over" in result.stderr
    assert "another user" in run("remote", "add", "x", "oci://host", "--project", code=2).stderr


def test_push_pull_and_list_on_a_remote(run: Run, host: str, make: Make, tmp_path: Path) -> None:
    run("remote", "add", "team", f"oci://{host}/conf", "--default")
    folder = make()
    digest = run_json(run, "push", folder, "team/sql:v2", "--remote")["digest"]
    assert run_json(run, "push", folder, "team/sql:v2", "--remote", "team")["sent"] == 0
    run("push", folder, "other/sql", "--remote")
    assert run_json(run, "pull", "team/sql:v2", "--remote", "-o", "out")["digest"] == digest
    assert f"team/sql:v2@{digest}, " in run("pull", "team/sql:v2", "--remote", "-o", "again").stdout
    assert run("list", "--remote").stdout == "other/sql\nteam/sql\n"
    assert run("list", "team", "--remote").stdout == "team/sql\n"
    assert run_json(run, "list", "team", "--remote")["adapters"] == [{"name": "team/sql"}]
    assert run("list", "tea", "--remote").stdout == ""
    assert listed(run("list", "team/sql", "--remote").stdout) == [f"oci://{host}/conf/team/sql:v2"]


def test_a_ref_without_the_option_is_local_and_the_error_names_the_remote_to_ask(run: Run, make: Make) -> None:
    with Proxy() as server:
        run("remote", "add", "team", f"oci://{server.address}", "--default")
        assert "`--remote` asks team" in run("pull", "team/sql:v2", code=3).stderr
        run("push", make(), "team/sql")
        assert "`--remote` asks team" in run("pull", "team/sql:v2", code=3).stderr
        assert "`--remote` asks team" in run("lock", "team/sql:v2", code=3).stderr
        run("list")
        assert server.exchanges == []


def test_a_remote_that_was_asked_is_not_offered_again(run: Run, host: str, make: Make) -> None:
    run("remote", "add", "team", f"oci://{host}/conf", "--default")
    run("push", make(), "team/sql", "--remote")
    for words in (("team/sql:nosuch", "--remote"), ("team/sql:^9", "--remote"), (f"oci://{host}/conf/team/sql:nosuch",)):
        assert "asks team" not in run("pull", *words, code=3).stderr
    assert f"oci://{host}/conf: has no index to search" in run("search", "sql", "--remote", code=2).stderr


def test_an_argument_read_as_the_name_is_named_in_the_error(run: Run) -> None:
    assert "Write --remote last" in run("push", "--remote", "./sql", "team/sql", code=2).stderr
    stderr = run("pull", "team/sql", "--remote", code=2).stderr
    assert "there is no default remote. Add one with `adapterhub remote add NAME URL --default`" in stderr


def test_a_pull_of_what_is_there_already_is_one_request(run: Run, host: str, make: Make, tmp_path: Path) -> None:
    with Proxy(host) as server:
        address = f"oci://{server.address}/once/again:v1"
        run("push", make(), address)
        assert run_json(run, "pull", address, "-o", "out")["new"] is True
        server.exchanges.clear()
        result = run("pull", address, "-o", "out")
        assert result.stdout.startswith("already there: out: ")
        assert [exchange.method for exchange in server.exchanges] == ["GET"]
    weights = tmp_path / "out/adapter_model.safetensors"
    right = weights.read_bytes()
    for wrong in (right[:-1], right[:-1] + bytes([right[-1] ^ 1])):
        weights.write_bytes(wrong)
        assert (
            "is not as its adapter.json records it: adapter_model.safetensors (edited)"
            in run("pull", f"oci://{host}/once/again:v1", "-o", "out", code=2).stderr
        )
        assert weights.read_bytes() == wrong
    weights.write_bytes(right)
    (tmp_path / "out/notes.txt").write_text("mine")
    run("pull", f"oci://{host}/once/again:v1", "-o", "out", code=2)


# ---- test


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_remote_test_reports_user_and_access_and_leaves_nothing(run: Run, behind: str, tmp_path: Path) -> None:
    run("remote", "add", "team", f"oci://{behind}/some/prefix")
    nobody = run("remote", "test", "team", code=5)
    reason = f"HTTP 401: login required. Log in with `adapterhub login {behind}`  [login-required]"
    assert nobody.stderr == f"error: oci://{behind}: {reason}\n"
    right = {"DOCKER_CONFIG": str(registry.docker_config(tmp_path / "right", behind).parent)}
    before = tree(tmp_path / "behind")
    report = run_json(run, "remote", "test", "team", env=right)
    assert report == {
        "name": "team", "url": f"oci://{behind}/some/prefix", "asks": True, "user": registry.USER,
        "login": "docker's config.json", "read": True, "write": True, "why": "",
    }  # fmt: skip
    assert tree(tmp_path / "behind") == before
    assert run_json(run, "list", "--remote", "team", env=right)["adapters"] == []
    wrong = {"DOCKER_CONFIG": str(registry.docker_config(tmp_path / "wrong", behind, "no").parent)}
    assert "the login of user (docker's config.json) was refused" in run("remote", "test", "team", env=wrong, code=5).stderr


def test_remote_test_of_one_that_may_only_be_read_is_exit_5(run: Run, host: str) -> None:
    with Proxy(host) as server:

        def denied(exchange: Exchange) -> None:
            if exchange.method == "PUT":
                exchange.status = 403

        server.before = denied
        run("remote", "add", "team", f"oci://{server.address}")
        result = run("remote", "test", "team", code=5)
        assert "read    yes\nwrite   no\n" in result.stdout
        assert "may not be written to: HTTP 403: forbidden" in result.stderr


def test_remote_test_of_what_is_no_registry_is_one_line(run: Run) -> None:
    with Proxy() as server:
        server.before = lambda exchange: setattr(exchange, "status", 404)
        run("remote", "add", "team", f"oci://{server.address}")
        assert "not an OCI registry" in run("remote", "test", "team", code=5).stderr
    assert len(run("remote", "test", "team", code=5).stderr.splitlines()) == 1


def test_a_token_of_the_wrong_kind_is_refused_before_it_is_kept(behind: str) -> None:
    address = OciAddress.parse(f"oci://{behind}/x")
    with (
        RegistryHost(address, lambda: Credentials(bearer="token-1"), pauses=()) as registry_host,
        pytest.raises(RemoteError) as caught,
    ):
        registry_host.check_login()
    assert "token-1" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "role", "org", "expected"),
    [
        (None, "", "", ("", True, False)),
        ("hf_right", "write", "", ("ada", True, True)),
        ("hf_right", "read", "", ("ada", True, False)),
        ("hf_right", "fineGrained", "", ("ada", True, None)),
        ("hf_right", "write", "team", ("ada", True, True)),
        ("hf_right", "write", "other", ("ada", True, False)),
    ],
)
def test_a_hub_reports_the_authenticated_user(
    token: str | None, role: str, org: str, expected: tuple[str, bool, bool | None]
) -> None:
    with Proxy() as server:

        def whoami(exchange: Exchange) -> None:
            if exchange.headers.get("authorization") != "Bearer hf_right":
                exchange.status = 401
                return
            identity = {"name": "ada", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}}
            exchange.status, exchange.data = 200, json.dumps(identity).encode()

        server.before = whoami
        access = hub_writer.access(f"http://{server.address}", token, org, pauses=())
        assert (access.user, access.reads, access.writes) == expected
        with pytest.raises(RemoteError) as caught:
            hub_writer.access(f"http://{server.address}", "hf_wrong", org, pauses=())
        assert "hf auth login" in str(caught.value)
        assert "hf_wrong" not in str(caught.value)
        with Proxy() as proxy:

            def away(exchange: Exchange) -> None:
                exchange.status, exchange.answer = 307, {"location": f"http://{proxy.address}/"}

            server.before = away
            with pytest.raises(RemoteError, match="HTTP 307"):
                hub_writer.access(f"http://{server.address}", "hf_right", org, pauses=())
            assert proxy.exchanges == []
        server.before = lambda exchange: (setattr(exchange, "status", 200), setattr(exchange, "data", b"[1]"))
        with pytest.raises(FormatError, match="not a Hugging Face hub"):
            hub_writer.access(f"http://{server.address}", token, org, pauses=())


# ---- policy


def test_a_project_s_rules_hold_for_what_comes_and_what_goes(run: Run, host: str, make: Make, tmp_path: Path) -> None:
    folder = make("sql")
    run("remote", "add", "team", f"oci://{host}/rules")
    run("push", folder, "other/sql")
    run("push", folder, "other/sql:v1", "--remote", "team")
    (tmp_path / "adapterhub.toml").write_text(f'[policy]\nallow = ["team/*", "oci://{host}/free/*"]\n')
    for words in (
        ["push", folder, "other/sql"],
        ["push", folder, "other/sql", "--remote", "team"],
        ["push", folder, f"oci://{host}/team/sql"],
        ["pull", "other/sql", "-o", "out"],
        ["pull", "other/sql", "--to", "mlx", "-o", "out"],
        ["pull", "other/sql:v1", "--remote", "team", "-o", "out"],
        ["copy", "other/sql", "./out"],
        ["copy", "sql", "other/new"],
        ["copy", "other/sql", f"oci://{host}/team/sql"],
    ):
        assert "not a name that" in run(*words, code=6).stderr, words
    run("push", folder, f"oci://{host}/free/sql")
    (tmp_path / "adapterhub.toml").write_text("[policy]\nmax_rank = 1\nlicenses = ['MIT']\n")
    for words in (
        ["push", folder, "team/sql"],
        ["push", folder, "team/sql", "--remote", "team"],
        ["push", "other/sql", "team/sql", "--remote", "team"],
        ["pull", "other/sql", "-o", "out"],
        ["pull", "other/sql:v1", "--remote", "team", "-o", "out"],
        ["copy", f"oci://{host}/rules/other/sql:v1", "team/sql"],
        ["copy", f"oci://{host}/rules/other/sql:v1", f"oci://{host}/rules/copy"],
        ["copy", "other/sql", "team/sql"],
        ["copy", "sql", "team/sql"],
    ):
        assert "max_rank: rank 2 is over 1; licenses: its license is not declared, not MIT" in run(*words, code=6).stderr, words
    assert not (tmp_path / "out").exists()
    (tmp_path / "adapterhub.toml").write_text("[policy]\nmax_rank = 2\n")
    run("pull", "other/sql:v1", "--remote", "team", "-o", "out")
    (tmp_path / "adapterhub.toml").write_text("[policy]\nmaxrank = 2\n")
    assert "adapterhub.toml:2: 'policy.maxrank' is unknown" in run("pull", "other/sql", code=2).stderr


def test_init_project_writes_examples_once(run: Run, tmp_path: Path) -> None:
    assert run_json(run, "init", "--project")["created"] is True
    text = (tmp_path / "adapterhub.toml").read_text()
    (tmp_path / "adapterhub.toml").write_text(text + "# mine\n")
    assert run_json(run, "init", "--project")["created"] is False
    assert (tmp_path / "adapterhub.toml").read_text() == text + "# mine\n"
    assert not (tmp_path / "registry.db").exists()
