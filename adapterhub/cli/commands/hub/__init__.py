"""`adapterhub hub`: a registry behind HTTP, for a team."""

from __future__ import annotations

import click

from adapterhub.cli.options import Group

from .accounts import approve, member, namespace, user
from .admissions import admission
from .moving import gc, migrate, recover
from .operations import backup, doctor, load_backup, log
from .publishers import publisher
from .serving import start
from .tokens import token
from .webhooks import webhook


@click.group(
    "hub",
    cls=Group,
    example="""
    adapterhub hub token create ci --role write
    adapterhub hub start""",
)
def hub() -> None:
    """Serve a registry to a team: the API of the Hugging Face Hub and OCI distribution over the same versions.

    Clients need no plugin: set HF_ENDPOINT to the hub's address and HF_TOKEN to a token, or push and pull HOST:PORT/NAME:TAG
    with oras, skopeo or docker.
    """


_SERVING = (start, approve, log, backup, load_backup, doctor, migrate, recover, gc)
for _command in (*_SERVING, user, member, namespace, admission, token, webhook, publisher):
    hub.add_command(_command)
