"""`adapterhub hub token`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column

from .tables import changed_database, emit_once, read_hub

if TYPE_CHECKING:
    from adapterhub.hub.accounts.access_tokens import Token

ROLES = ("read", "write", "admin")
ONCE = "anyone who has it can act as the account"


@click.group(
    "token",
    cls=Group,
    short_help="Manage tokens.",
    example="""
    adapterhub hub token create ci --role write
    adapterhub hub token list""",
)
def token() -> None:
    """Create, list and revoke tokens of a hub, on the machine that has its registry."""


@token.command(
    "create",
    short_help="Create a token.",
    example="""
    adapterhub hub token create ci --role write --namespace team
    adapterhub hub token create root --role admin""",
)
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    required=True,
    help="Role in its namespaces: read, write (push, tag, remove) or admin (members too).",
)
@click.option(
    "--namespace", "namespaces", metavar="NAME", multiple=True, help="Namespace in which the token is good; repeatable."
)
@click.option("--days", metavar="N", type=click.FloatRange(0, min_open=True), help="Days until it expires. [default: never]")
@click.pass_obj
def create(settings: Settings, *, name: str, role: str, namespaces: tuple[str, ...], days: float | None) -> None:
    """Create a token for the account NAME, which is created if it is missing. The token is shown once.

    Set HF_TOKEN to it; oras, skopeo and docker take it as a password, with any user name.
    """
    from adapterhub.hub.accounts import access_tokens

    with changed_database(settings, "token.create", name, f"{role} {' '.join(namespaces)}".strip()) as database:
        secret = access_tokens.create(database, name, role, namespaces=namespaces, lifetime=days * 86400 if days else None)
    document = {"account": name, "role": role, "namespaces": list(namespaces), "token": secret}
    emit_once(settings, document, secret, ONCE)


_LIST = (
    Column("ID"),
    Column("ACCOUNT"),
    Column("TOKEN"),
    Column("ROLE"),
    Column("NAMESPACES", drop=2),
    Column("KIND", drop=3),
)


@token.command(
    "list",
    short_help="List tokens.",
    example="""
    adapterhub hub token list""",
)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the tokens in force, each by its first characters."""
    from adapterhub.hub.accounts import access_tokens

    tokens_ = read_hub(settings, access_tokens.list_tokens)
    document = {"tokens": [asdict(token_) for token_ in tokens_]}
    output.emit(document, as_json=settings.as_json, text=lambda: _list_text(tokens_))


def _list_text(tokens_: list[Token]) -> None:
    if not tokens_:
        output.say("no tokens yet; create one with `adapterhub hub token create NAME --role ROLE`")
        return
    output.write_table(
        _LIST,
        [
            [str(token_.id), token_.account, f"{token_.prefix}…", token_.role_text, ", ".join(token_.namespaces), token_.kind]
            for token_ in tokens_
        ],
    )


@token.command(
    "revoke",
    short_help="Revoke a token.",
    example="""
    adapterhub hub token revoke 3""",
)
@click.argument("ident", metavar="ID", type=int)
@click.pass_obj
def revoke(settings: Settings, *, ident: int) -> None:
    """Revoke a token; a running hub refuses it within seconds."""
    from adapterhub.hub.accounts import access_tokens

    with changed_database(settings, "token.revoke", "", str(ident)) as database:
        access_tokens.revoke(database, ident)
    output.emit({"revoked": ident}, as_json=settings.as_json, text=lambda: output.write(f"revoked token {ident}"))
