"""`adapterhub hub admission`: rules about who may sign in with an account elsewhere."""

from __future__ import annotations

from dataclasses import asdict

import click

from adapterhub.cli import output
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column

from .tables import changed_database, claims_of, claims_text, emit_removed, read_hub
from .tokens import ROLES


@click.group(
    "admission",
    cls=Group,
    short_help="Manage who may sign in with an account elsewhere.",
    example="""
    adapterhub hub admission add --issuer https://login.example --claim groups=ml --role write --namespace team""",
)
def admission() -> None:
    """Admit people who log in by OpenID Connect (`adapterhub hub start --oidc-issuer URL`); nobody is by default."""


@admission.command(
    "add",
    short_help="Admit people.",
    example="""
    adapterhub hub admission add --issuer https://login.example --claim email=@example.org
    adapterhub hub admission add --issuer https://login.example --claim groups=ml --role write --namespace team""",
)
@click.option("--issuer", metavar="URL", required=True, help="Issuer of their ID tokens, as the claim iss has it.")
@click.option(
    "--claim",
    "claims",
    metavar="NAME=VALUE",
    multiple=True,
    help="Claim that they must have; one that is a list must contain the value; email=@DOMAIN is a whole domain; repeatable.",
)
@click.option("--everybody", is_flag=True, help="Admit all whom the provider knows: one of your own.")
@click.option("--role", type=click.Choice(ROLES), help="Role in the namespace. [default: none but in their own]")
@click.option(
    "--namespace", metavar="NAME", default="*", show_default="every namespace", help="Namespace in which the role holds."
)
@click.pass_obj
def add(settings: Settings, *, issuer: str, claims: tuple[str, ...], everybody: bool, role: str | None, namespace: str) -> None:
    """Admit people with all of these claims. Each rule that admits somebody gives them its role when they sign in.

    A role that `adapterhub hub member set` gives them stays, in place of one of a rule in that namespace.
    """
    from adapterhub.hub.accounts import admissions

    required = claims_of(claims)
    detail = f"{issuer} {claims_text(required) or 'everybody'} {role or ''}".strip()
    with changed_database(settings, "admission.add", namespace, detail) as database:
        ident = admissions.add(database, issuer, required, everybody=everybody, namespace=namespace, role=role or "")
    document = {"id": ident, "issuer": issuer, "claims": required, "namespace": namespace, "role": role}
    text = f"rule {ident} admits {claims_text(required) or 'everybody'} of {issuer}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


_RULES = (Column("ID"), Column("ISSUER"), Column("CLAIMS"), Column("NAMESPACE"), Column("ROLE"))


@admission.command(
    "list",
    short_help="List the rules.",
    example="""
    adapterhub hub admission list""",
)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the rules that admit people."""
    from adapterhub.hub.accounts import admissions

    rules = read_hub(settings, admissions.list_rules)
    cells = [
        [str(rule.id), rule.issuer, claims_text(rule.claims) or "everybody", rule.namespace if rule.role else "", rule.role]
        for rule in rules
    ]
    document = {"admissions": [asdict(rule) for rule in rules]}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(_RULES, cells))


@admission.command(
    "rm",
    short_help="Remove a rule.",
    example="""
    adapterhub hub admission rm 1""",
)
@click.argument("ident", metavar="ID", type=int)
@click.pass_obj
def rm(settings: Settings, *, ident: int) -> None:
    """Remove a rule, and the roles that it gave.

    People whom no other rule admits are refused the next time; sessions of the pages last at most 12 hours.
    """
    from adapterhub.hub.accounts import admissions

    with changed_database(settings, "admission.rm", "", str(ident)) as database:
        admissions.remove(database, ident)
    emit_removed(settings, "rule", ident)
