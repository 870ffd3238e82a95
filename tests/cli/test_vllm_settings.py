"""What the variables of vLLM's plugin say, and what they cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.cli import environment, vllm_settings
from adapterhub_converters.errors import LocalIOError

VARIABLES = (
    "ADAPTERHUB_VLLM_ALLOW",
    "ADAPTERHUB_VLLM_TAGS",
    "ADAPTERHUB_VLLM_BASE",
    "ADAPTERHUB_VLLM_CHATS",
    "ADAPTERHUB_REMOTE",
    "ADAPTERHUB_REGISTRY",
)


@pytest.fixture(autouse=True)
def _empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    environment.user.cache_clear()
    environment.project.cache_clear()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    yield
    environment.user.cache_clear()
    environment.project.cache_clear()


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_VLLM_ALLOW", "team/*, other/sql")


@pytest.mark.parametrize("value", [None, "", " ", ","])
def test_without_names_nothing_is_registered_and_vllm_not_imported(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("ADAPTERHUB_VLLM_ALLOW", value)
    assert vllm_settings.settings() is None
    vllm_settings.register()


@pytest.mark.usefixtures("allowed")
def test_what_is_not_said_is_the_careful_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = vllm_settings.settings()
    assert settings is not None
    assert (settings.allowed.patterns, settings.pin, settings.base) == (("team/*", "other/sql"), False, "")
    assert not settings.clients_render
    assert settings.address("team/sql:v2") == "team/sql:v2"
    monkeypatch.setenv("ADAPTERHUB_REGISTRY", str(tmp_path / "mine"))
    assert settings.workspace().folder() == tmp_path / "mine"
    monkeypatch.setenv("ADAPTERHUB_VLLM_CHATS", "client")
    assert getattr(vllm_settings.settings(), "clients_render", False)
    monkeypatch.setenv("ADAPTERHUB_VLLM_TAGS", "latest")
    with pytest.raises(RuntimeError, match="ADAPTERHUB_VLLM_TAGS='latest' is not one of refuse, pin"):
        vllm_settings.settings()


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("oci://registry.example/adapters", "oci://registry.example/adapters/team/sql:v2"),
        ("oci://registry.example/adapters/", "oci://registry.example/adapters/team/sql:v2"),
        ("prod", "oci://prod.example/team/sql:v2"),
    ],
)
def test_a_remote_is_a_url_or_a_name(remote: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config/adapterhub").mkdir(parents=True)
    (tmp_path / "config/adapterhub/config.toml").write_text('[remotes.prod]\nurl = "oci://prod.example"\n')
    monkeypatch.setenv("ADAPTERHUB_REMOTE", remote)
    settings = vllm_settings.settings()
    assert settings is not None
    assert settings.address("team/sql:v2") == address
    assert settings.remote == ("prod" if remote == "prod" else "")


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("remote", ["oci://me:secret@registry.example", "x://y"])
def test_vllm_does_not_start_with_a_remote_that_is_none(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_REMOTE", remote)
    with pytest.raises(RuntimeError, match="ADAPTERHUB_REMOTE: ") as caught:
        vllm_settings.settings()
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("allowed")
def test_a_name_without_a_remote_is_the_operator_s_error_and_not_a_missing_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_REMOTE", "nobody")
    settings = vllm_settings.settings()
    assert settings is not None
    with pytest.raises(LocalIOError, match="no remote of this name"):
        settings.address("team/sql:v2")
