"""The file of routes and keys: what it may have, where a request goes, and who asks."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from adapterhub.serve.engines.pooled_engine import EngineAddress
from adapterhub.serve.gateway import route_file
from adapterhub.serve.gateway.calendar_budgets import CalendarBudget
from adapterhub.serve.gateway.route_file import Routes
from adapterhub_converters.errors import UsageError

SECRET = "ah-not-a-secret"
SHA = hashlib.sha256(SECRET.encode()).hexdigest()


def read(folder: Path, text: str, before: Routes | None = None) -> Routes:
    (folder / "routes.toml").write_text(text)
    return route_file.read(folder / "routes.toml", before)


def test_the_first_rule_that_fits_decides(tmp_path: Path) -> None:
    routes = read(
        tmp_path,
        """
        [routes.legal]
        to = "team/legal:prod"
        [[routes.legal.when]]
        header = "X-Stage: beta"
        user = "ada"
        to = "team/legal:both"
        [[routes.legal.when]]
        header = "x-stage: beta"
        to = "team/legal:beta"
        [[routes.legal.when]]
        key = "research"
        to = "team/legal:v7*0.5+team/tone*0.5"
        """,
    ).routes["legal"]
    assert routes.choose({}, {}, "") == "team/legal:prod"
    assert routes.choose({"x-stage": "beta"}, {}, "") == "team/legal:beta"
    assert routes.choose({"x-stage": "beta"}, {"user": "ada"}, "") == "team/legal:both"
    assert routes.choose({"x-stage": "prod"}, {"user": "ada"}, "") == "team/legal:prod"
    assert routes.choose({}, {}, "research") == "team/legal:v7*0.5+team/tone*0.5"


def test_a_canary_gets_its_share_and_a_user_stays(tmp_path: Path) -> None:
    route = read(tmp_path, '[routes.legal]\nto = { "team/legal:v7" = 90, "team/legal:v8" = 10 }').routes["legal"]
    by_user = Counter(route.choose({}, {"user": f"user {number}"}, "") for number in range(5000))
    assert 400 < by_user["team/legal:v8"] < 600
    by_chance = Counter(route.choose({}, {}, "") for _ in range(5000))
    assert 350 < by_chance["team/legal:v8"] < 650
    assert len({route.choose({}, {"user": "ada"}, "") for _ in range(20)}) == 1
    route_without_canary = read(tmp_path, '[routes.legal]\nto = { "team/legal:v7" = 1, "team/legal:v8" = 0 }').routes["legal"]
    assert {route_without_canary.choose({}, {}, "") for _ in range(100)} == {"team/legal:v7"}


def test_a_key_is_known_by_its_digest(tmp_path: Path) -> None:
    text = f'[keys.research]\nsha256 = "{SHA}"\nadapters = ["legal", "team/*"]\nrequests = "600/60"\nrunning = 8'
    routes = read(tmp_path, text)
    key = routes.key_of(SECRET)
    assert key is not None
    assert (key.name, key.max_running) == ("research", 8)
    assert "team/x" in key.allowed
    assert "other/x" not in key.allowed
    assert routes.key_of(SHA) is None
    assert routes.key_of("") is None
    assert routes.key_of("\ud800") is None


def test_limits_go_on_counting_when_the_file_is_read_again(tmp_path: Path) -> None:
    text = f'[keys.research]\nsha256 = "{SHA}"\nrequests = "2/3600"\ntokens = "9/60"'
    before = read(tmp_path, text)
    key = before.key_of(SECRET)
    assert key is not None
    assert key.windows is not None
    assert key.tokens is not None
    key.windows.count("research")
    key.tokens.count("research", 9)
    after = read(tmp_path, text + "\nrunning = 3", before).key_of(SECRET)
    assert after is not None
    assert after.windows is not None
    assert after.tokens is not None
    assert after.tokens.count("research", 0).over
    assert after.windows.count("research").remaining == 0
    changed_key = read(tmp_path, text.replace("2/3600", "5/3600"), before).key_of(SECRET)
    assert changed_key is not None
    assert changed_key.windows is not None
    assert changed_key.windows.count("research").remaining == 4


def test_an_engine_is_named_for_its_host_and_port_unless_it_has_a_name(tmp_path: Path) -> None:
    text = "[[engines]]\nurl = 'http://a:81/'\n[[engines]]\nurl = 'http://b'\nname = 'left'\nweight = 2\nkey_variable = 'KEY'"
    assert read(tmp_path, text).engines == (
        EngineAddress("http://a:81", "a:81"),
        EngineAddress("http://b", "left", 2.0, "KEY"),
    )


def test_a_file_that_is_just_being_written_does_not_let_everybody_in(tmp_path: Path) -> None:
    before = read(tmp_path, f"[keys.research]\nsha256 = '{SHA}'")
    for text in ("", "[routes.x]\nto = 'team/a'"):
        with pytest.raises(UsageError, match="all keys were removed"):
            read(tmp_path, text, before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[route.x]\nto = 'team/a'", "route: unknown"),
        ("[routes.x]\n", "not a ref, and not shares"),
        ("[routes.x]\nto = 'no name'", "no name"),
        ("[routes.x]\nto = { 'team/a' = -1 }", "not a number from 0"),
        ("[routes.x]\nto = { 'team/a' = 0 }", "all shares are 0"),
        ("[routes.x]\nto = { 'team/a' = true }", "not a number from 0"),
        ("[routes.'a,b']\nto = 'team/a'", "no comma"),
        ("[routes.x]\nto = 'team/a'\nweight = 1", "weight: unknown"),
        ("[routes.x]\nto = 'team/a'\nwarm = 1", "routes.x.warm: neither true nor false"),
        ("[routes.x]\nto = 'team/a'\npin = 'yes'", "routes.x.pin: neither true nor false"),
        ("[routes.x]\nto = 'team/a'\n[[routes.x.when]]\nto = 'team/b'", "matches every request"),
        ("[routes.x]\nto = 'team/a'\n[[routes.x.when]]\nheader = 'beta'\nto = 'team/b'", "not a header"),
        ("[routes]\nx = 1", "not a table of tables"),
        ("[keys.x]\nsha256 = 'short'", "not the SHA-256"),
        (f"[keys.x]\nsha256 = '{SHA}'\nadapters = []", "names nothing"),
        (f"[keys.x]\nsha256 = '{SHA}'\nadapters = [',', '']", "names nothing"),
        (f"[keys.x]\nsha256 = '{SHA}'\nrequests = '0/60'", "not a limit"),
        (f"[keys.x]\nsha256 = '{SHA}'\ntokens = '1000'", "tokens: '1000' is not a limit"),
        (f"[keys.x]\nsha256 = '{SHA}'\ntokens_per_day = 0", "keys.x.tokens_per_day: not a number of tokens"),
        (f"[keys.x]\nsha256 = '{SHA}'\ntokens_per_day = true", "keys.x.tokens_per_day: not a number of tokens"),
        (f"[keys.x]\nsha256 = '{SHA}'\ntokens_per_month = '9'", "Write it like tokens_per_month = 1_000_000"),
        (f"[keys.x]\nsha256 = '{SHA}'\nrunning = -1", "not a number of requests"),
        (f"[keys.x]\nsha256 = '{SHA}'\npriority = 1.5", "priority: not a whole number from -1,000,000 to 1,000,000"),
        (f"[keys.x]\nsha256 = '{SHA}'\npriority = true", "priority: not a whole number"),
        (f"[keys.x]\nsha256 = '{SHA}'\n[keys.y]\nsha256 = '{SHA}'", "two names have the same key"),
        ("[routes.x\n", "routes.toml"),
        ("[engines]\nurl = 'http://a'", "engines: not a list of at most 256 tables. Write [[engines]]"),
        ("[[engines]]\nname = 'a'", "engines[0].url: not the URL of a server"),
        (
            "[[engines]]\nurl = 'http://a'\nkey = 'secret'",
            "engines[0]: key: unknown. There are url, name",
        ),
        ("[[engines]]\nurl = 'http://a'\nweight = 0", "engines[0].weight: not a number from 0.001 to 1,000"),
        ("[[engines]]\nurl = 'http://a'\nname = \"a\\nb\"", "engines[0].name: a name has at most 256 characters"),
        ("[[engines]]\nurl = 'http://a/'\n[[engines]]\nurl = 'http://a'", "engines: http://a: is given more than once"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_has_tokens_of_a_day_and_of_a_month(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f"[keys.x]\nsha256 = '{SHA}'\ntokens_per_day = 1_000\n")
    routes = route_file.read(tmp_path / "r.toml")
    [key] = routes.keys.values()
    assert key.budget == CalendarBudget(1000, 0)
    assert routes.has_calendar_budgets
    (tmp_path / "r.toml").write_text(f"[keys.x]\nsha256 = '{SHA}'\n")
    assert not route_file.read(tmp_path / "r.toml").has_calendar_budgets
