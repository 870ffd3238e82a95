"""`adapterhub hub webhook`: URLs that are notified of events."""

from __future__ import annotations

from dataclasses import asdict

import click

from adapterhub.cli import output
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column

from .tables import changed_database, emit_once, emit_removed, read_hub


@click.group(
    "webhook",
    cls=Group,
    short_help="Notify other services of new versions and moved tags.",
    example="""
    adapterhub hub webhook add team https://ci.example/hooks/adapters""",
)
def webhook() -> None:
    """Post what happens in a namespace to a URL: version.created, tag.moved, name.removed.

    Each request has the headers X-Hub-Event, X-Hub-Delivery and X-Hub-Signature-256, an HMAC of the body with the secret.
    """


@webhook.command(
    "add",
    short_help="Add a webhook.",
    example="""
    adapterhub hub webhook add team https://ci.example/hooks/adapters""",
)
@click.argument("namespace")
@click.argument("url")
@click.option("--allow-private", is_flag=True, help="Let the URL lead to an address in this network, or to this machine.")
@click.pass_obj
def add(settings: Settings, *, namespace: str, url: str, allow_private: bool) -> None:
    """Post what happens in NAMESPACE to URL, and print the secret that signs it, which is shown once."""
    from adapterhub.hub import webhooks

    with changed_database(settings, "webhook.add", namespace) as database:
        ident, secret = webhooks.add(database, namespace, url, private=allow_private)
    document = {"id": ident, "namespace": namespace, "url": url, "secret": secret}
    emit_once(settings, document, secret, "check X-Hub-Signature-256 with it")


_HOOKS = (Column("ID"), Column("NAMESPACE"), Column("URL"), Column("PRIVATE", drop=2))
_SENT = (Column("ID"), Column("WEBHOOK"), Column("EVENT"), Column("STATE"), Column("TRIES"), Column("WHY", drop=1))


@webhook.command(
    "list",
    short_help="List the webhooks.",
    example="""
    adapterhub hub webhook list
    adapterhub hub webhook list --sent""",
)
@click.option("--sent", is_flag=True, help="List the newest events instead, with their state.")
@click.pass_obj
def list_(settings: Settings, *, sent: bool) -> None:
    """List the webhooks, or the events that were sent or wait to be."""
    from adapterhub.hub import webhooks

    if sent:
        events = read_hub(settings, webhooks.deliveries)
        document = {"deliveries": [asdict(event) for event in events]}
        cells = [
            [str(event.id), str(event.webhook), event.event, event.state, str(event.tries), event.error] for event in events
        ]
        output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(_SENT, cells))
        return
    hooks = read_hub(settings, webhooks.list_webhooks)
    cells = [[str(hook.id), hook.namespace, hook.url, "yes" if hook.private else ""] for hook in hooks]
    document = {"webhooks": [asdict(hook) for hook in hooks]}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(_HOOKS, cells))


@webhook.command(
    "rm",
    short_help="Remove a webhook.",
    example="""
    adapterhub hub webhook rm 1""",
)
@click.argument("ident", metavar="ID", type=int)
@click.pass_obj
def rm(settings: Settings, *, ident: int) -> None:
    """Remove a webhook, and what waits to be sent to it."""
    from adapterhub.hub import webhooks

    with changed_database(settings, "webhook.rm", "", str(ident)) as database:
        webhooks.remove(database, ident)
    emit_removed(settings, "webhook", ident)
