"""Logins at a hub by a code: none where the hub has none, none in the clear, and no page or token of anybody else."""

from __future__ import annotations

import pytest

from adapterhub.remotes.hub.hub_login import HubLogin, PendingLogin
from adapterhub_converters.errors import FormatError, RemoteError
from tests.conftest import Run
from tests.support.hub_answers import answering
from tests.support.proxy import Proxy

NEVER = PendingLogin("", "", "device", 1, float("inf"))


def test_a_hub_without_logins_by_a_code_is_called_one() -> None:
    with Proxy() as proxy:
        proxy.before = lambda exchange: setattr(exchange, "status", 404)
        with pytest.raises(RemoteError) as error:
            HubLogin(f"http://{proxy.address}").begin()
    assert error.value.code == "no-device-login"


def test_no_login_is_sent_to_another_machine_in_the_clear(run: Run) -> None:
    assert run("login", "hub+http://hub.example", code=5).stderr.endswith("[token-without-tls]\n")


@pytest.mark.parametrize("page", ["https://evil.example/device", "http://127.0.0.1:1/device"])
def test_a_page_of_another_host_is_no_login(page: str) -> None:
    answer = {"verification_uri": page, "user_code": "ABCD-EFGH", "device_code": "d"}
    with answering(answer) as address, pytest.raises(FormatError, match="is not a login"):
        HubLogin(address.endpoint).begin()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"error": "access_denied"}, "the login was refused"),
        ({"error": "expired_token"}, "the code has expired"),
        ({"error": "x" * 500}, r"the hub refuses the login \(x{80}\)"),
        ({"access_token": "hf_a b"}, "characters that no token has"),
    ],
)
def test_a_login_that_gives_no_token_says_why(answer: dict[str, str], problem: str) -> None:
    with answering(answer) as address, pytest.raises((RemoteError, FormatError), match=problem):
        HubLogin(address.endpoint).wait(NEVER)


def test_a_hub_that_asks_for_patience_is_asked_less_often() -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    with answering({"error": "slow_down"}) as address, pytest.raises(KeyboardInterrupt):
        HubLogin(address.endpoint, sleep=sleep).wait(NEVER)
    assert pauses == [6, 11, 16]


def test_a_token_is_that_of_an_account_with_a_printable_name() -> None:
    with answering({"name": "ada"}) as address:
        assert HubLogin(address.endpoint).account_name("hf_token") == "ada"
    with answering({"name": "ada\x1b[2J"}) as address, pytest.raises(FormatError, match="whose token it is"):
        HubLogin(address.endpoint).account_name("hf_token")
