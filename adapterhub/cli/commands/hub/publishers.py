"""`adapterhub hub publisher`: CI jobs that may push without a secret."""

from __future__ import annotations

from dataclasses import asdict

import click

from adapterhub.cli import output
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column

from .tables import changed_database, claims_of, claims_text, emit_removed, read_hub


@click.group(
    "publisher",
    cls=Group,
    short_help="Trust CI jobs without a secret.",
    example="""
    adapterhub hub publisher add team/sql --issuer https://gitlab.com --claim project_path=org/trainer""",
)
def publisher() -> None:
    """Trust CI jobs by the claims of their provider: they exchange its ID token for a token of one hour."""


@publisher.command(
    "add",
    short_help="Trust a publisher.",
    example="""
    adapterhub hub publisher add team/sql --issuer https://gitlab.com --claim project_path=org/trainer""",
)
@click.argument("resource")
@click.option("--issuer", metavar="URL", required=True, help="Issuer of the ID tokens, as their claim iss has it.")
@click.option("--claim", "claims", metavar="NAME=VALUE", multiple=True, help="Claim that a token must have; repeatable.")
@click.option("--as", "account", metavar="ACCOUNT", default="ci", show_default=True, help="Account that the program acts for.")
@click.pass_obj
def add(settings: Settings, *, resource: str, issuer: str, claims: tuple[str, ...], account: str) -> None:
    """Let jobs with these claims push to RESOURCE, a repository, or to every repository of a namespace.

    The audience of the tokens must be the URL of the hub. In the job, set HF_OIDC_RESOURCE to the repository, and at providers
    other than GitHub HF_OIDC_ID_TOKEN to the token.
    """
    from adapterhub.hub.accounts import publishers

    required = claims_of(claims)
    with changed_database(settings, "publisher.add", resource, f"{issuer} {' '.join(claims)}") as database:
        ident = publishers.add(database, resource, issuer, required, account)
    document = {"id": ident, "resource": resource, "issuer": issuer, "claims": required, "account": account}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"publisher {ident} may push to {resource}"))


_PUBLISHERS = (Column("ID"), Column("RESOURCE"), Column("ISSUER"), Column("CLAIMS"), Column("ACCOUNT", drop=1))


@publisher.command(
    "list",
    short_help="List the publishers.",
    example="""
    adapterhub hub publisher list""",
)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the publishers that are trusted."""
    from adapterhub.hub.accounts import publishers

    publishers_ = read_hub(settings, publishers.list_publishers)
    cells = [
        [str(publisher_.id), publisher_.scope, publisher_.issuer, claims_text(publisher_.claims), publisher_.account]
        for publisher_ in publishers_
    ]
    document = {"publishers": [asdict(publisher_) for publisher_ in publishers_]}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(_PUBLISHERS, cells))


@publisher.command(
    "rm",
    short_help="Stop trusting a publisher.",
    example="""
    adapterhub hub publisher rm 1""",
)
@click.argument("ident", metavar="ID", type=int)
@click.pass_obj
def rm(settings: Settings, *, ident: int) -> None:
    """Stop trusting a publisher; its tokens expire within the hour."""
    from adapterhub.hub.accounts import publishers

    with changed_database(settings, "publisher.rm", "", str(ident)) as database:
        publishers.remove(database, ident)
    emit_removed(settings, "publisher", ident)
