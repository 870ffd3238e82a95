"""`adapterhub login`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from adapterhub.cli import completions, environment, logins, output
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.oci.docker_credentials import Credentials
    from adapterhub.remotes.oci.oci_address import OciAddress

_MAX_TOKEN = 1 << 16  # the most characters of a token


@command(
    "login",
    example="""
    adapterhub login registry.example --username ada
    adapterhub login hub+https://hub.example
    adapterhub login team --username ci --password-stdin < secret""",
)
@click.argument("host", metavar="HOST|NAME", shell_complete=completions.complete_remote)
@click.option("-u", "--username", metavar="NAME", help="User name; asked for on a terminal.")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
@click.option("--token-stdin", is_flag=True, help="Read a bearer token from stdin; needs no user name.")
@click.pass_obj
def login(settings: Settings, *, host: str, username: str | None, password_stdin: bool, token_stdin: bool) -> None:
    """Log in to a registry, HOST[:PORT] or the NAME of a remote, and store the login once the registry accepts it.

    At a hub, hub+https://HOST[:PORT], you approve the login on a page of the hub, with the code that is shown here; or pass a
    token with --token-stdin. The token is sent to that hub only.

    On a terminal you are asked for the password, which is not shown; no option takes it. It is stored where docker and oras
    store theirs: by the credential helper that docker's config.json names, else in the system's keyring if the package keyring
    is installed and has one, else in config.json itself, which only you can read then.
    """
    from adapterhub.remotes.oci import docker_credentials

    address, at_hub = logins.address_of(host), logins.is_hub(host)
    if at_hub:
        accepted = _hub_credentials(address, username, password=password_stdin, token=token_stdin)
    else:
        accepted = _registry_credentials(
            address, _credentials_source(address.host, username, password=password_stdin, token=token_stdin)
        )
    stored_in = docker_credentials.store_credentials(
        address.host, environment.docker_config(), accepted, plain=address.is_plaintext
    )
    document = {"host": address.host, "user": accepted.user, "stored_in": stored_in}
    user_text = f" as {accepted.user}" if accepted.user else ""
    text = f"{address.host}: logged in{user_text}; stored in {stored_in}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.one_line(text)))


def _registry_credentials(address: OciAddress, ask: Callable[[], Credentials]) -> Credentials:
    """Return credentials that a registry accepts; `ask` is called once the registry requires a login."""
    from adapterhub.remotes.oci.registry_host import NOT_STORED, RegistryHost

    # A registry may ask for a login several times; a person is asked once.
    ask_once = functools.cache(lambda: replace(ask(), source=NOT_STORED))
    hint = "Nothing was stored; check the user name and the password"
    with RegistryHost(address, ask_once, hint, proxy=environment.proxy) as server:
        server.check_login()
    return ask_once()


def _hub_credentials(address: OciAddress, username: str | None, *, password: bool, token: bool) -> Credentials:
    """Return a token of a hub, from stdin or for a code that a person approves."""
    from adapterhub.remotes.hub.hub_login import HubLogin
    from adapterhub.remotes.oci.docker_credentials import Credentials

    if username or password:
        option = "--username" if username else "--password-stdin"
        raise UsageError(option, "is not used at a hub", "Leave it out, or pass a token with --token-stdin")
    hub = HubLogin(address.registry_url, environment.proxy)
    if token:
        bearer = _secret(sys.stdin.read(_MAX_TOKEN), "--token-stdin")
    else:
        login = hub.begin()
        output.say(output.one_line(f"open {login.page} and enter the code {login.code}"))
        bearer = hub.wait(login)
    return Credentials(hub.account_name(bearer), bearer)


def _credentials_source(host: str, username: str | None, *, password: bool, token: bool) -> Callable[[], Credentials]:
    """Return a function that returns name and password, or a token.

    Input from stdin is read now; on a terminal, the function asks when it is called.
    """
    from adapterhub.remotes.oci.docker_credentials import Credentials

    if password and token:
        raise UsageError(
            "--token-stdin", "cannot be combined with --password-stdin", "Leave one out", code="conflicting-options"
        )
    if token and username:
        raise UsageError(
            "--username", "is not used with a bearer token", "Pass a token that needs a user name with --password-stdin"
        )
    if not token and not sys.stdin.isatty():
        if not username:
            raise UsageError("--username", "is missing, and there is no terminal to ask on", "Pass --username NAME")
        if not password:
            raise UsageError("password", "is missing, and there is no terminal to ask on", "Pipe it in with --password-stdin")
    name = _checked_name(username) if username else ""
    secret = _secret(sys.stdin.read(_MAX_TOKEN), "--token-stdin" if token else "--password-stdin") if token or password else ""
    if token:
        return lambda: Credentials(bearer=secret)

    def ask() -> Credentials:
        user = name or _checked_name(str(click.prompt(f"Username for {host}", err=True)))
        return Credentials(user, secret or _secret(str(click.prompt("Password", hide_input=True, err=True)), "password"))

    return ask


def _checked_name(name: str) -> str:
    if not name.isprintable() or ":" in name or not name.strip():
        raise UsageError("--username", "is not a user name: empty, or with a colon or a control character")
    return name


def _secret(text: str, option: str) -> str:
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret or not secret.isprintable() or len(text) == _MAX_TOKEN:
        problem = "is empty" if not secret else "is not one printable line"
        raise UsageError(option, problem, "Pass it as a single line")
    return secret
