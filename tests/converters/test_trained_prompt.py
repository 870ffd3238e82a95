"""The prompt of an adapter: a file of its folder, a template that writes it by itself, and what adapters have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from adapterhub_converters.bases.base_spec import text_digest
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.trained_prompt import FILE, PROMPT_OF_BASE, TrainedPrompt, common_prompt
from tests.conftest import need_module


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("a key")
    return tmp_path / "secret"


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def test_a_template_that_is_a_link_out_of_the_folder_is_not_read(secret: Path, tmp_path: Path) -> None:
    link(tmp_path / "clone" / FILE, secret)
    with pytest.raises(RefusedError, match=f"{FILE}: a link that leads out of the adapter") as refused:
        TrainedPrompt.read(tmp_path / "clone")
    assert refused.value.code == "not-a-regular-file"
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    link(tmp_path / "clone" / "blob" / FILE, secret.rename(blobs / "secret"))
    with pytest.raises(RefusedError, match="a link that leads out of the adapter"):
        TrainedPrompt.read(tmp_path / "clone" / "blob")


def test_links_within_the_folder_and_to_the_blobs_of_a_cache_are_read(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "template").write_text("within")
    link(tmp_path / "adapter" / FILE, tmp_path / "adapter" / "template")
    assert TrainedPrompt.read(tmp_path / "adapter").template == "within"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "0").write_text("cached")
    for folder in ("1", "1/checkpoint-10"):
        link(tmp_path / "models--a--b" / "snapshots" / folder / FILE, tmp_path / "models--a--b" / "blobs" / "0")
        assert TrainedPrompt.read(tmp_path / "models--a--b" / "snapshots" / folder).template == "cached"


def rendered(template: str | None, **variables: Any) -> str:
    need_module("jinja2")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    assert template is not None
    # As transformers renders chat templates.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return str(environment.from_string(template).render(**variables))


def test_a_date_is_that_day_in_a_template_of_its_own() -> None:
    prompt = TrainedPrompt("{{ strftime_now('%d %b %Y, %-d') }} {{ 7 % 4 }}", date="2026-01-09")
    assert rendered(prompt.as_template()) == "09 Jan 2026, 9 3"
    assert TrainedPrompt("x", date="2026-01-09").as_template() == "x"  # it has no clock


@pytest.mark.parametrize("value", ['a"b\\c\n{{ 1 }} %} #}', "ä😀", "", 0, -3, 2.5, 1e30, True, False])
def test_options_are_set_unless_somebody_sets_them(value: str | float | bool) -> None:
    prompt = TrainedPrompt("\n{% for turn in 'ab' %}{{ [option, turn] }}{% endfor %}", (("option", value),))
    expected = rendered(prompt.template, option=value)
    assert rendered(prompt.as_template()) == expected
    assert rendered(prompt.as_template(), option="other") == rendered(prompt.template, option="other")


@pytest.mark.parametrize("name", ["a b", "%}{{ 7 }}", "none", "True", "if", "", "ä"])
def test_a_name_that_no_template_can_read_is_left_out(name: str) -> None:
    assert TrainedPrompt("x", ((name, 1),)).as_template() == "x"


def test_a_prompt_without_a_template_is_about_that_of_the_base() -> None:
    prompt = TrainedPrompt(options=(("option", 1),))
    assert prompt.as_template() is None
    assert rendered(prompt.as_template("{{ option }}")) == "1"


def test_adapters_have_a_prompt_in_common_where_a_trainer_stored_the_template_of_the_base() -> None:
    stored, own_prompt = TrainedPrompt("base"), TrainedPrompt("own")
    assert common_prompt([stored, PROMPT_OF_BASE], text_digest("base")) == PROMPT_OF_BASE
    assert common_prompt([stored, PROMPT_OF_BASE], None) is None
    assert common_prompt([own_prompt, own_prompt], text_digest("base")) == own_prompt
    assert common_prompt([own_prompt, stored], text_digest("base")) is None
