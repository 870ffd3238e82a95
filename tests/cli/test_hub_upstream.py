"""`hub start` with an upstream: the options, their variables, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from adapterhub.cli.commands.hub.serving import start
from adapterhub.cli.options import Settings
from adapterhub.hub import server
from adapterhub.hub.settings import HubSettings, ModelUpstream
from adapterhub_converters.errors import UsageError


def settings_of(monkeypatch: pytest.MonkeyPatch, *words: str, **env: str) -> HubSettings:
    """The settings that `hub start` would serve with."""
    used_settings: list[HubSettings] = []
    monkeypatch.setattr(server, "serve", lambda settings, **_: used_settings.append(settings))
    result = CliRunner().invoke(start, words, obj=Settings(), env={"HF_ENDPOINT": "", **env})
    assert result.exit_code == 0, result.output
    return used_settings[0]


def test_without_an_upstream_nothing_is_asked_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(monkeypatch).upstream is None


SAME: dict[str, Any] = {"mode": "cache", "organizations": frozenset({"qwen", "gpt2"}), "age": 60.0, "max_bytes": 5_000_000_000}


def test_every_option_of_the_upstream_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--upstream", "hub+https://hub.example", "--upstream-mode", "cache", "--upstream-allow", "Qwen"]
    words += ["--upstream-allow", "gpt2", "--upstream-age", "60", "--upstream-cache", "5"]
    variables = {"": "hub+https://hub.example", "_MODE": "cache", "_ALLOW": "Qwen gpt2", "_AGE": "60", "_CACHE": "5"}
    env = {f"ADAPTERHUB_UPSTREAM{name}": value for name, value in variables.items()}
    for upstream in (settings_of(monkeypatch, *words).upstream, settings_of(monkeypatch, **env).upstream):
        assert upstream is not None
        assert upstream == ModelUpstream("https://hub.example", proxy=upstream.proxy, **SAME)


def test_the_token_for_the_upstream_is_that_of_its_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = settings_of(monkeypatch, "--upstream", "hf://", HF_TOKEN="hf_mine").upstream
    assert upstream is not None
    assert (upstream.endpoint, upstream.mode, upstream.token) == ("https://huggingface.co", "redirect", None)
    upstream = settings_of(monkeypatch, "--upstream", "hf://", ADAPTERHUB_UPSTREAM_TOKEN=" hf_hub\n").upstream
    assert upstream is not None
    assert upstream.token == "hf_hub"
    assert "hf_hub" not in repr(upstream)


def test_an_upstream_that_is_no_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("https://hub.example", "hf://org", "hub+https://ada:secret@hub.example"):
        result = CliRunner().invoke(start, ["--upstream", address], obj=Settings())
        assert isinstance(result.exception, UsageError)
        assert "secret" not in str(result.exception) + result.output
