"""`adapterhub hub user`, `hub member` and `hub namespace`: the accounts of a hub, and their rights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs, output, registry_choice
from adapterhub.cli.options import Command, Group, Settings, force_option
from adapterhub.cli.output import Column

from .tables import changed_database, emit_once, emit_removed, read_hub
from .tokens import ONCE, ROLES

if TYPE_CHECKING:
    from adapterhub.hub.accounts.accounts import Account, Member, Namespace


FORCE = force_option("go on even if the account is the last admin of a namespace or of the hub.")


# ---- users


@click.group(
    "user",
    cls=Group,
    short_help="Manage accounts.",
    example="""
    adapterhub hub user add ada --role write""",
)
def user() -> None:
    """Add, list and remove the accounts of people, on the machine that has the hub's registry."""


@user.command(
    "add",
    short_help="Add an account.",
    example="""
    adapterhub hub user add ada
    adapterhub hub user add root --role admin""",
)
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), help="Role in every namespace. [default: none but in its own]")
@click.pass_obj
def add(settings: Settings, *, name: str, role: str | None) -> None:
    """Add an account and print its first token, which is shown once.

    The token may do what the account may: everything in the namespace of its name, and elsewhere what `adapterhub hub member
    set` gives it. With it the person can log in at the hub's page /device, or approve the login of another machine.
    """
    from adapterhub.hub.accounts import access_tokens, accounts

    with changed_database(settings, "user.add", name, role or "") as database:
        accounts.add(database, name)
        if role:
            accounts.set_member(database, accounts.EVERYWHERE, name, role)
        secret = access_tokens.create(database, name, accounts.ROLES[-1], kind=access_tokens.PERSONAL)
    emit_once(settings, {"account": name, "role": role, "token": secret}, secret, ONCE)


_USERS = (Column("ACCOUNT"), Column("ROLES"), Column("SINCE", drop=1))


@user.command(
    "list",
    short_help="List the accounts.",
    example="""
    adapterhub hub user list""",
)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the accounts, each with its roles: NAMESPACE=ROLE, where * is every namespace."""
    from adapterhub.hub.accounts import accounts

    accounts_ = read_hub(settings, accounts.list_accounts)
    output.emit(
        {"accounts": [asdict(account) for account in accounts_]},
        as_json=settings.as_json,
        text=lambda: _users_text(settings, accounts_),
    )


def _users_text(settings: Settings, accounts_: list[Account]) -> None:
    if not accounts_:
        folder = output.one_line(str(registry_choice.registry_folder(settings)))
        output.say(f"no accounts yet in the hub of {folder}; add one with `adapterhub hub user add NAME`")
        return
    output.write_table(
        _USERS,
        [
            [account.name, " ".join(f"{space}={role}" for space, role in account.roles.items()), account.created]
            for account in accounts_
        ],
    )


@user.command(
    "rm",
    short_help="Remove an account.",
    example="""
    adapterhub hub user rm ada""",
)
@click.argument("name")
@FORCE
@click.pass_obj
def rm(settings: Settings, *, name: str, force: bool) -> None:
    """Remove an account: its tokens are revoked and its roles are gone. What it pushed stays."""
    from adapterhub.hub.accounts import accounts

    with changed_database(settings, "user.rm", name) as database:
        accounts.remove(database, name, force=force)
    emit_removed(settings, "account", name)


@user.command(
    "link",
    short_help="Let somebody sign in as an account.",
    example="""
    adapterhub hub user link ada --issuer https://login.example --subject 8f14e45f""",
)
@click.argument("name")
@click.option("--issuer", metavar="URL", required=True, help="Issuer of their ID tokens, as the claim iss has it.")
@click.option("--subject", metavar="ID", required=True, help="The person there, as the claim sub has it; a refusal shows it.")
@click.pass_obj
def link(settings: Settings, *, name: str, issuer: str, subject: str) -> None:
    """Let SUBJECT at ISSUER sign in as the account NAME, in place of any other account, whatever the rules say.

    Without it, the first sign-in creates a new account.
    """
    from adapterhub.hub.accounts import admissions

    with changed_database(settings, "user.link", name, f"{subject} at {issuer}") as database:
        admissions.link(database, name, issuer, subject)
    document = {"account": name, "issuer": issuer, "subject": subject}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{subject} at {issuer} signs in as {name}"))


@click.command(
    "approve",
    cls=Command,
    short_help="Approve the login of a program.",
    example="""
    adapterhub hub approve BCDF-GHJK --as ada""",
)
@click.argument("code")
@click.option("--as", "account", metavar="ACCOUNT", required=True, help="Account that the program acts for.")
@click.pass_obj
def approve(settings: Settings, *, code: str, account: str) -> None:
    """Approve a login that `hf auth login` or `adapterhub login` has begun, where nobody can open the hub's page /device.

    The program gets a token that may do what the account may, for 30 days, and renews it.
    """
    from adapterhub.hub.accounts import device_logins

    with changed_database(settings, "approve", "", f"as {account}") as database:
        login = device_logins.approve_as(database, code, account)
    document = {"code": login.code, "account": account, "address": login.address}
    text = f"{login.code}: a program at {login.address or 'an unknown address'} may act for {account}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


# ---- members


@click.group(
    "member",
    cls=Group,
    short_help="Manage the roles of accounts in namespaces.",
    example="""
    adapterhub hub member set team ada --role write""",
)
def member() -> None:
    """Give accounts roles in namespaces, and list those with one."""


_MEMBERS = (Column("ACCOUNT"), Column("ROLE"))


@member.command(
    "list",
    short_help="List the accounts with a role in a namespace.",
    example="""
    adapterhub hub member list team""",
)
@click.argument("namespace")
@click.pass_obj
def list_members(settings: Settings, *, namespace: str) -> None:
    """List the accounts with a role in NAMESPACE; an account of that name is its admin without one."""
    from adapterhub.hub.accounts import accounts

    members = read_hub(settings, lambda database: accounts.members(database, namespace))
    output.emit(
        {"namespace": namespace, "members": [asdict(member) for member in members]},
        as_json=settings.as_json,
        text=lambda: _members_text(namespace, members),
    )


def _members_text(namespace: str, members: list[Member]) -> None:
    if not members:
        output.say(f"nobody has a role in {output.one_line(namespace)}; `adapterhub hub member set` gives one")
        return
    output.write_table(_MEMBERS, [[member.account, member.role] for member in members])


@member.command(
    "set",
    short_help="Give an account a role.",
    example="""
    adapterhub hub member set team ada --role write""",
)
@click.argument("namespace")
@click.argument("account")
@click.option("--role", type=click.Choice(ROLES), required=True, help="Role in the namespace.")
@FORCE
@click.pass_obj
def set_(settings: Settings, *, namespace: str, account: str, role: str, force: bool) -> None:
    """Give ACCOUNT a role in NAMESPACE, in place of its present one; a running hub follows within seconds.

    read sees private adapters, write pushes, tags and removes, admin manages the namespace.
    """
    from adapterhub.hub.accounts import accounts

    with changed_database(settings, "member.set", namespace, f"{account} {role}") as database:
        accounts.set_member(database, namespace, account, role, force=force)
    document = {"namespace": namespace, "account": account, "role": role}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{account}: {role} in {namespace}"))


@member.command(
    "rm",
    short_help="Take an account's role away.",
    example="""
    adapterhub hub member rm team ada""",
)
@click.argument("namespace")
@click.argument("account")
@FORCE
@click.pass_obj
def member_rm(settings: Settings, *, namespace: str, account: str, force: bool) -> None:
    """Take the role of ACCOUNT in NAMESPACE away."""
    from adapterhub.hub.accounts import accounts

    with changed_database(settings, "member.rm", namespace, account) as database:
        accounts.remove_member(database, namespace, account, force=force)
    emit_removed(settings, "member", account, namespace=namespace)


# ---- namespaces


@click.group(
    "namespace",
    cls=Group,
    short_help="Manage who reads a namespace, and how much it may hold.",
    example="""
    adapterhub hub namespace set team --readers members --max-size 50G""",
)
def namespace() -> None:
    """Set who can read a namespace, and how much it may hold."""


@namespace.command(
    "set",
    short_help="Set who can read a namespace, and what it may hold.",
    example="""
    adapterhub hub namespace set team --readers members
    adapterhub hub namespace set team --max-size 50G --max-files 2000
    adapterhub hub namespace set team --adapters-only""",
)
@click.argument("name")
@click.option(
    "--readers",
    type=click.Choice(("anyone", "accounts", "members")),
    help="Who can read adapters that are not private: anyone, anyone with a token, or only accounts with a role.",
)
@click.option("--max-size", metavar="SIZE", help="Bytes of all files, each counted once: 500M, 50G; 0 for no limit.")
@click.option("--max-files", metavar="N", type=click.IntRange(min=0), help="Number of those files; 0 for no limit.")
@click.option(
    "--adapters-only/--any-artifact",
    default=None,
    help="Refuse container images and other artifacts that are no adapter; signatures and other attachments may come.",
)
@click.pass_obj
def settle(
    settings: Settings,
    *,
    name: str,
    readers: str | None,
    max_size: str | None,
    max_files: int | None,
    adapters_only: bool | None,
) -> None:
    """Set who can read a namespace, and what it may hold; without its option, a setting stays as it is."""
    from adapterhub.hub.accounts import accounts

    with changed_database(settings, "namespace.set", name) as database:
        changes = accounts.NamespaceChanges()
        if readers is not None:
            changes["readers"] = readers
        if max_size is not None:
            changes["max_bytes"] = None if max_size == "0" else inputs.byte_count(max_size, "--max-size")
        if max_files is not None:
            changes["max_files"] = max_files or None
        if adapters_only is not None:
            changes["adapters_only"] = adapters_only
        new_settings = accounts.change_namespace(database, name, **changes)
    output.emit(asdict(new_settings), as_json=settings.as_json, text=lambda: _namespaces_text([new_settings]))


@namespace.command(
    "list",
    short_help="List the namespaces that have settings.",
    example="""
    adapterhub hub namespace list""",
)
@click.pass_obj
def list_namespaces(settings: Settings) -> None:
    """List the namespaces that have settings; anyone can read the others, and they have no limits."""
    from adapterhub.hub.accounts import accounts

    namespaces = read_hub(settings, accounts.namespaces)
    output.emit(
        {"namespaces": [asdict(namespace_) for namespace_ in namespaces]},
        as_json=settings.as_json,
        text=lambda: _namespaces_text(namespaces),
    )


_SPACES = (Column("NAMESPACE"), Column("READERS"), Column("SIZE"), Column("FILES"), Column("ARTIFACTS"))


def _namespaces_text(namespaces: list[Namespace]) -> None:
    if not namespaces:
        output.say("nothing was settled: anyone can read, and there are no limits")
        return
    cells = [
        [
            namespace_.name,
            namespace_.readers,
            output.size(namespace_.max_bytes) if namespace_.max_bytes else "",
            str(namespace_.max_files or ""),
            "adapters only" if namespace_.adapters_only else "any",
        ]
        for namespace_ in namespaces
    ]
    output.write_table(_SPACES, cells)
