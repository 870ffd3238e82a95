"""`adapterhub remote`: places elsewhere, by name."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import environment, output, remotes
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column
from adapterhub_converters.errors import ConflictError, NotFoundError, RemoteError, UsageError

if TYPE_CHECKING:
    from adapterhub.project.settings import Settled
    from adapterhub.remotes.configured import Remote
    from adapterhub.remotes.location import Access, Place

_in_project = click.option("--project", "in_project", is_flag=True, help="In the project's adapterhub.toml, not your own file.")


@click.group(
    "remote",
    cls=Group,
    short_help="Keep other registries by name.",
    example="""
    adapterhub remote add team oci://registry.example/adapters --default
    adapterhub push ./sql team/sql:v2 --remote""",
)
def remote() -> None:
    """Keep the URLs of other registries under names that --remote takes.

    A ref on a remote is the address below its URL. They are kept in config.toml in your config folder, or with --project in
    the project's adapterhub.toml, where everybody who works on it has them.
    """


@remote.command(
    "add",
    short_help="Keep a URL under a name.",
    example="""
    adapterhub remote add team oci://registry.example/adapters --default
    adapterhub remote add team oci://registry.example/adapters --project""",
)
@click.argument("name")
@click.argument("url")
@click.option("--default", "is_default", is_flag=True, help="--remote without a name means this one.")
@click.option("--force", is_flag=True, help="Also when the name means another URL.")
@_in_project
@click.pass_obj
def add(settings: Settings, *, name: str, url: str, is_default: bool, force: bool, in_project: bool) -> None:
    """Keep a URL under a name; nothing is asked of it yet.

    URL is oci://HOST[/PREFIX]. There are no credentials in it: `adapterhub login NAME` keeps those.
    """
    from adapterhub.project.settings import check_remote_name
    from adapterhub.remotes.configured import check_url

    check_remote_name(name)
    url = check_url(url)

    def changed(old: Settled) -> tuple[dict[str, str], str | None]:
        if old.remotes.get(name, url) != url and not force:
            raise ConflictError(name, f"means {old.remotes[name]} already", "--force gives it the new URL")
        return {**old.remotes, name: url}, name if is_default else old.remote

    path = _file(in_project)
    new = _change(path, changed)
    text = f"{'' if new else 'already there: '}{name}  {url}  ({path})"
    document = {"name": name, "url": url, "default": is_default, "file": str(path), "new": new}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.printable(text)))


_LIST = (Column("NAME"), Column("URL"), Column("DEFAULT", drop=1), Column("KEPT IN", drop=2))


@remote.command(
    "list",
    short_help="List the remotes.",
    example="""
    adapterhub remote list""",
)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the remotes that are known here: the project's and your own."""
    found, default = environment.remotes(), environment.default_remote()
    rows = [{"name": one.name, "url": one.url, "default": one.name == default, "file": str(one.path)} for one in found.values()]
    output.emit({"remotes": rows}, as_json=settings.as_json, text=lambda: _list_text(list(found.values()), default))


def _list_text(found: list[Remote], default: str | None) -> None:
    if not found:
        output.say("no remotes yet; `adapterhub remote add NAME URL` keeps one")
        return
    cells = [[one.name, one.url, "*" if one.name == default else "", str(one.path)] for one in found]
    for line in output.table(_LIST, cells, screen=output.width()):
        output.write(line)


@remote.command(
    "remove",
    short_help="Forget a remote.",
    example="""
    adapterhub remote remove team""",
)
@click.argument("name", shell_complete=environment.complete_remote)
@_in_project
@click.pass_obj
def remove(settings: Settings, *, name: str, in_project: bool) -> None:
    """Forget a remote. What lies there, and a login for it, stay."""

    def changed(old: Settled) -> tuple[dict[str, str], str | None]:
        if name not in old.remotes:
            known = environment.remotes().get(name)
            hint = f"It is kept in {known.path}" if known else "Run `adapterhub remote list`"
            raise NotFoundError(name[:80], f"no remote of this name in {old.path}", hint)
        return {key: url for key, url in old.remotes.items() if key != name}, None if old.remote == name else old.remote

    path = _file(in_project)
    _change(path, changed)
    document = {"removed": name, "kind": "remote", "file": str(path)}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed remote {name}"))


@remote.command(
    "default",
    short_help="Say or choose the default remote.",
    example="""
    adapterhub remote default
    adapterhub remote default team""",
)
@click.argument("name", required=False, shell_complete=environment.complete_remote)
@_in_project
@click.pass_obj
def default(settings: Settings, *, name: str | None, in_project: bool) -> None:
    """Say which remote --remote means without a name, or have it mean NAME."""
    if name is not None:
        environment.remote(name)
        _change(_file(in_project), lambda old: (dict(old.remotes), name))
        environment.user.cache_clear()
        environment.project.cache_clear()
    found = environment.remote(environment.DEFAULT)
    if name is not None and found.name != name:
        output.say(f"note: here it is {found.name}, as the environment or the project says")
    document = {"name": found.name, "url": found.url}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{found.name}  {found.url}"))


@remote.command(
    "test",
    short_help="Ask a remote what we may do.",
    example="""
    adapterhub remote test team""",
)
@click.argument("name", shell_complete=environment.complete_remote)
@click.pass_obj
def test(settings: Settings, name: str) -> None:
    """Reach a remote, and say whom it takes us for and whether we may read and write there. Nothing is left there.

    In an OCI registry writing is tried with a manifest that is none, which is refused; a Hugging Face hub is asked about the
    token. Exit 5 when a remote can't be reached, or may not be read or written.
    """
    found = environment.remote(name)
    document = _asked(found)
    who = f"{document['user']} ({document['login']})" if document["user"] else "nobody in particular: it did not ask"
    lines = {
        "remote": f"{found.name}  {found.url}",
        "taken for": who if document["asks"] else "not known: whom it takes us for isn't asked of its kind",
        "read": _yes(document["read"]),
        "write": _yes(document["write"]),
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _lines(lines))
    if False in (document["read"], document["write"]):
        what = "read" if document["read"] is False else "written to"
        login = "hf auth login" if found.url.startswith("hf:") else f"adapterhub login {found.name}"
        hint = "" if document["user"] else f"Log in with `{login}`"
        raise RemoteError(found.url, f"may not be {what}: {document['why']}", hint)


def _asked(found: Remote) -> dict[str, Any]:
    from adapterhub.remotes import location
    from adapterhub.remotes.configured import nobody

    place = location.parse(nobody(found.url))
    document = {"name": found.name, "url": found.url}
    if (seen := _access(found.url, place)) is None:
        with location.connect(place, remotes.surroundings()) as there, contextlib.suppress(NotFoundError):
            there.tags()
        return {**document, "asks": False, "user": "", "login": "", "read": True, "write": None, "why": ""}
    granted = {"user": seen.who, "login": seen.source, "read": seen.reads, "write": seen.writes, "why": seen.why}
    return {**document, "asks": True, **granted}


def _access(url: str, place: Place) -> Access | None:
    """What a registry or a hub grants; None for a kind that isn't asked."""
    from adapterhub.remotes.oci.address import Address

    if isinstance(place, Address):
        from adapterhub.remotes.oci import credentials
        from adapterhub.remotes.oci.host import Host

        who = remotes.surroundings()
        find = partial(credentials.find, place.host, who.docker, plain=place.plain)
        with Host(place, find, proxy=who.proxy) as host:
            return host.access()
    scheme, _, rest = url.partition("://")
    if scheme == "hf":
        from adapterhub.remotes.hub import writer

        hub = environment.hub()
        return writer.access(hub.endpoint, hub.token, rest, proxy=hub.proxy)
    return None


def _yes(answer: bool | None) -> str:
    return "not known: there is no way to ask that leaves nothing" if answer is None else "yes" if answer else "no"


def _lines(lines: dict[str, str]) -> None:
    for line in output.pairs(lines, screen=output.width()):
        output.write(line)


def _file(in_project: bool) -> Path:
    """The file to change; a project's is made here when there is none upwards."""
    if not in_project:
        return environment.user_file()
    found = environment.project_file()
    if found is not None and environment.project() is None:
        raise UsageError(str(found), "belongs to another user", "Make an adapterhub.toml of your own")
    return found or Path.cwd() / environment.PROJECT


def _change(path: Path, changed: Any) -> bool:
    """Have a file keep other remotes; whether it differs now."""
    from adapterhub import user_files
    from adapterhub.project import settings as project

    def new(text: str) -> str | None:
        remotes, default = changed(project.parse(text, path))
        made = project.changed(text, path, remotes=remotes, remote=default)
        return made if made != text else None

    return user_files.change(path, new)
