"""`adapterhub login` and `logout`: who we are elsewhere, never on a command line and never shown."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from adapterhub.cli import environment, output
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.oci.address import Address
    from adapterhub.remotes.oci.login_store import Credentials

_LONGEST = 1 << 16  # characters of a token


@command(
    "login",
    short="Say who you are to another registry.",
    example="""
    adapterhub login registry.example --username ada
    adapterhub login team --username ci --password-stdin < secret""",
)
@click.argument("host", metavar="HOST|NAME", shell_complete=environment.complete_remote)
@click.option("-u", "--username", metavar="U", help="Whom to log in as; asked for on a terminal.")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin.")
@click.option("--token-stdin", is_flag=True, help="Read a bearer token from stdin, which needs no username.")
@click.pass_obj
def login(settings: Settings, *, host: str, username: str | None, password_stdin: bool, token_stdin: bool) -> None:
    """Keep a login for a registry, HOST[:PORT] or the NAME of a remote, once that registry has taken it.

    On a terminal you are asked, and see nothing of what you type; there is no option for a password. It is kept in the system's
    keyring, if the package keyring is installed and has one, else in a file that only you may read. It comes before what
    `docker login` keeps.
    """
    from adapterhub.remotes.oci import login_store
    from adapterhub.remotes.oci.host import GIVEN, Host

    address = _address(host)
    who = replace(_asked(address.host, username, password=password_stdin, token=token_stdin), source=GIVEN)
    hint = "Nothing was kept; look at the name and the password"
    with Host(address, lambda: who, hint, proxy=environment.proxy) as server:
        server.check_login()
    where = login_store.write(environment.logins_file(), _key(address), who)
    document = {"host": address.host, "user": who.user, "kept_in": where}
    as_whom = f" as {who.user}" if who.user else ""
    text = f"{address.host}: logged in{as_whom}; kept in {where}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.one_line(text)))


@command(
    "logout",
    short="Forget a login.",
    example="""
    adapterhub logout registry.example""",
)
@click.argument("host", metavar="HOST|NAME", shell_complete=environment.complete_remote)
@click.pass_obj
def logout(settings: Settings, host: str) -> None:
    """Forget the login for a registry, HOST[:PORT] or the NAME of a remote. What `docker login` keeps stays."""
    from adapterhub.remotes.oci import login_store

    address, path = _address(host), environment.logins_file()
    if not login_store.forget(path, _key(address)):
        there = login_store.hosts(path)
        raise NotFoundError(address.host, "there is no login", f"There are logins for {', '.join(there)}" if there else "")
    document = {"host": address.host}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{address.host}: logged out"))


def _key(address: Address) -> str:
    from adapterhub.remotes.oci.credentials import canonical

    return canonical(address.host, plain=address.plain)


def _address(text: str) -> Address:
    """The registry that a host, a URL or the name of a remote is; UsageError for a place where others keep the login."""
    from adapterhub.remotes.oci.address import Address

    found = environment.remotes().get(text)
    url = found.url if found else text if "://" in text else f"oci://{text}"
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        host = rest.partition("/")[0].rpartition("@")[2]
        raise UsageError(host, "credentials in an address end up in logs", f"Run `adapterhub login {host}`")
    scheme = scheme.lower()
    if not scheme.startswith("oci"):
        raise UsageError(f"{scheme}://", "logins for such places aren't kept here", _ELSEWHERE.get(scheme, _OTHERS))
    return Address.parse(f"{scheme}://{rest.partition('/')[0]}/x")


_OTHERS = "The variables and files of their own tools are read"
_ELSEWHERE = {
    "hf": "`hf auth login` keeps the token where all tools of the Hugging Face Hub find it, and so does adapterhub",
    "s3": "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "file": "A folder has the permissions of its file system",
}


def _asked(host: str, username: str | None, *, password: bool, token: bool) -> Credentials:
    """Name and password, or a token, from stdin or from whoever sits at the terminal."""
    from adapterhub.remotes.oci.login_store import Credentials

    if password and token:
        raise UsageError("--token-stdin", "is instead of --password-stdin", "Leave one out")
    if token:
        if username:
            raise UsageError("--username", "a bearer token needs none", "With a name, a token is a password: --password-stdin")
        return Credentials(bearer=_secret(sys.stdin.read(_LONGEST), "--token-stdin"))
    if not username and not sys.stdin.isatty():
        raise UsageError("--username", "is not given, and there is no terminal to ask on", "Name who logs in")
    name = username or str(click.prompt(f"Username for {host}", err=True))
    if not name.isprintable() or ":" in name or not name.strip():
        raise UsageError("--username", "cannot be a name: it is empty, or has a colon or a control character")
    if password:
        return Credentials(name, _secret(sys.stdin.read(_LONGEST), "--password-stdin"))
    if not sys.stdin.isatty():
        raise UsageError("password", "there is no terminal to ask on", "Pipe it in, with --password-stdin")
    return Credentials(name, _secret(str(click.prompt("Password", hide_input=True, err=True)), "password"))


def _secret(text: str, where: str) -> str:
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret or not secret.isprintable() or len(text) == _LONGEST:
        what = "nothing came" if not secret else "what came is no secret of one line"
        raise UsageError(where, what, "It is read up to the end of one line")
    return secret
