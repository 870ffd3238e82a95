"""Every option of `hub start` from a variable and from a TOML file, the order of the three, and errors that tell no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from adapterhub.cli import configured_command, environment
from adapterhub.cli.commands.hub.serving import start
from adapterhub.cli.main import app
from adapterhub.cli.options import Settings
from adapterhub.cli.progress import QUIET
from adapterhub_converters.errors import AdapterhubError, UsageError
from tests.conftest import Run

OPTIONS = {
    configured_command.key_of(option): option
    for option in start.params
    if isinstance(option, click.Option) and option.name not in ("config", "debug")
}
VALUES: dict[str, Any] = {
    "upstream_mode": "cache",
    "rate_limit": ["api=1/2", "pages=3/4"],
    "upstream_allow": ["Qwen", "gpt2"],
    "replicate": ["a/*=oci://registry.example/a", "b/*=hub+https://hub.example"],
}
"""Values that are not the default, of the options whose type does not say one."""


def value_of(key: str, folder: Path) -> Any:
    """A value of an option, other than its default, as TOML has it."""
    option = OPTIONS[key]
    if option.is_flag:
        return True
    if isinstance(option.type, click.Path):
        (folder / key).write_text("secret")
        return str(folder / key)
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
        return 4321
    return VALUES.get(key, f"value-of-{key}")


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str, **env: str) -> tuple[dict[str, Any], Settings]:
    """The values of the options that `hub start` gets with these words and variables, and those of every command."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    context = start.make_context("start", list(words), obj=settings)
    return {**context.params, "quiet": context.meta.get(QUIET)}, settings


def written(folder: Path, **values: Any) -> str:
    """The path of a file with these values."""
    path = folder / "hub.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return str(path)


@pytest.mark.parametrize("key", sorted(OPTIONS))
def test_every_option_can_come_from_a_variable_and_from_a_file(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, value = OPTIONS[key], value_of(key, tmp_path)
    assert isinstance(option.envvar, str)
    assert option.envvar.startswith(f"{environment.PREFIX}{key.upper()}")
    default = parsed(monkeypatch)
    from_file = parsed(monkeypatch, "--config", written(tmp_path, **{key: value}))
    text = "1" if value is True else " ".join(value) if isinstance(value, list) else str(value)
    from_variable = parsed(monkeypatch, **{option.envvar: text})
    assert default != from_file
    if key == "registry":  # a path
        from_file[1].registry = Path(str(from_file[1].registry)).name
    assert from_file == from_variable


def test_an_option_comes_before_its_variable_which_comes_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, port=1, host="10.0.0.1", url="https://file.example", require_login=True)
    monkeypatch.setenv("ADAPTERHUB_CONFIG", path)
    params, _ = parsed(monkeypatch, "--port", "3", ADAPTERHUB_PORT="2", ADAPTERHUB_HOST="10.0.0.2")
    assert [params[key] for key in ("port", "host", "url", "require_login", "cache")] == [
        3, "10.0.0.2", "https://file.example", True, 10,
    ]  # fmt: skip
    assert parsed(monkeypatch, ADAPTERHUB_REQUIRE_LOGIN="0")[0]["require_login"] is False


def test_what_stands_before_the_command_comes_before_variables_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERHUB_REGISTRY", "variable")
    settings = Settings(registry="word")
    start.make_context("start", ["--config", written(tmp_path, registry="file")], obj=settings)
    assert settings.registry == "word"
    assert parsed(monkeypatch, "--registry", "after")[1].registry == "after"


def test_paths_of_a_file_start_at_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key.pem").touch()
    params, settings = parsed(monkeypatch, "--config", written(tmp_path, key="key.pem", registry="hub"))
    assert (params["key"], settings.registry) == (tmp_path / "key.pem", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("behind-proxy = true", "'behind-proxy' is unknown. Did you mean 'behind_proxy'?"),
        ("databse = 'SECRET'", "'databse' is unknown. Did you mean 'database'?"),
        ("config = 'SECRET'", "'config' is unknown. Known keys: host, port"),
        ("database = ['SECRET']", "'database' is not a string of one line"),
        ("database = '''SECRET\nSECRET'''", "'database' is not a string of one line"),
        ("blobs = 's3://bucket/hub'\ndatabase = 'mysql://hub:SECRET@db/hub'", "database: not an address of PostgreSQL"),
        ("database = 'postgresql://hub:SECRET@db/hub", "not valid TOML"),
        ("database = postgresql://hub:SECRET@db/hub", "not valid TOML"),
        ("oidc_secret = 'SECRET'", "'oidc_secret' names no file"),
        ("upstream_mode = 'SECRET'", "'upstream_mode' is none of redirect, cache"),
        ("upstream = 'hub+https://ada:SECRET@hub.example'", "hub.example: the address of a hub has no user"),
        ("mirror = 'https://ada:SECRET@hub.example'", "hub.example: the address of a hub has no user"),
        ("port = 'SECRET'", "'port' is not a whole number"),
        ("port = 8090.5", "'port' is not a whole number"),
        ("port = 100000", "'port' is out of range"),
        ("cache = true", "'cache' is not a number"),
        ("require_login = 'SECRET'", "'require_login' is neither true nor false"),
        ("rate_limit = 'SECRET'", "'rate_limit' is not a list of strings"),
        ("blobs = 's3://bucket/hub'", "a database and a bucket are of use only together"),
    ],
)
def test_an_error_of_the_file_names_the_key_and_never_a_value(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "hub.toml"
    path.write_text(f"# one comment\n{text}\n")
    result = CliRunner().invoke(app, ["--registry", str(tmp_path), "hub", "start", "--config", str(path)])
    assert isinstance(result.exception, AdapterhubError)
    message = str(result.exception)
    assert problem in message
    assert "SECRET" not in message + result.output


def test_an_error_of_the_file_has_its_code_and_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hub.toml:1: 'ports' is unknown") as caught:
        configured_command.read(Path(written(tmp_path, ports=1)), OPTIONS)
    assert caught.value.code == "invalid-config"


def test_every_command_is_about_the_hub_of_the_file(tmp_path: Path, run: Run) -> None:
    run("init", "hub")
    env = {"ADAPTERHUB_CONFIG": written(tmp_path, registry="hub", port=1)}
    registry_info = json.loads(run("info", "--json", env=env).stdout)["registry"]
    assert (registry_info["path"], registry_info["chosen_by"]) == (str(tmp_path / "hub"), "$ADAPTERHUB_CONFIG")
    written(tmp_path, database="postgresql://hub:secret@db.example/hub", blobs="s3://bucket/hub")
    output = run("info", "--json", env=env).stdout
    registry_info = json.loads(output)["registry"]
    assert (registry_info["path"], registry_info["chosen_by"]) == (
        "postgresql://db.example/hub s3://bucket/hub",
        "$ADAPTERHUB_CONFIG",
    )
    assert "secret" not in output
    written(tmp_path, database=1)
    assert "'database' is not a string" in json.loads(run("info", "--json", code=1, env=env).stdout)["problems"][0]


def test_the_file_on_the_page_of_the_hub_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hub.toml"
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    path.write_text(page.partition("```toml\n")[2].partition("```")[0])
    params, settings = parsed(monkeypatch, "--config", str(path))
    assert (params["upstream_allow"], params["behind_proxy"]) == (("Qwen", "gpt2"), True)
    assert settings.registry == "/var/lib/adapterhub"
