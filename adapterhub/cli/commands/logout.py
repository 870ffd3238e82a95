"""`adapterhub logout`."""

from __future__ import annotations

import click

from adapterhub.cli import environment, logins, output
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import NotFoundError


@command(
    "logout",
    example="""
    adapterhub logout registry.example""",
)
@click.argument("host", metavar="HOST|NAME", shell_complete=environment.complete_remote)
@click.pass_obj
def logout(settings: Settings, host: str) -> None:
    """Remove the login for a registry, HOST[:PORT] or the NAME of a remote. Logins of `docker login` are left alone."""
    from adapterhub.remotes.oci import login_store

    address, path = logins.address_of(host), environment.logins_file()
    if not login_store.forget(path, logins.key(address)):
        there = login_store.hosts(path)
        raise NotFoundError(address.host, "no login", f"Logins: {', '.join(there)}" if there else "")
    document = {"host": address.host}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{address.host}: logged out"))
