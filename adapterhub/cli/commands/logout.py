"""`adapterhub logout`."""

from __future__ import annotations

import click

from adapterhub.cli import completions, environment, logins, output
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import NotFoundError


@command(
    "logout",
    example="""
    adapterhub logout registry.example""",
)
@click.argument("host", metavar="HOST|NAME", shell_complete=completions.complete_remote)
@click.pass_obj
def logout(settings: Settings, host: str) -> None:
    """Remove the login for a registry, HOST[:PORT] or the NAME of a remote. `docker logout` does the same."""
    from adapterhub.remotes.oci import docker_credentials

    address, config = logins.address_of(host), environment.docker_config()
    if not docker_credentials.forget_credentials(address.host, config, plain=address.is_plaintext):
        hosts = docker_credentials.configured_hosts(config)
        raise NotFoundError(address.host, "no login is stored for it", f"Logins: {', '.join(hosts)}" if hosts else "")
    document = {"host": address.host}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{address.host}: logged out"))
