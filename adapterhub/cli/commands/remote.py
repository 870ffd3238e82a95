"""`adapterhub remote`: other registries, by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import completions, environment, output, remote_choice, remotes
from adapterhub.cli.options import Group, Settings, force_option, project_option
from adapterhub.cli.output import Column
from adapterhub.operations import workspace
from adapterhub.project import PROJECT
from adapterhub_converters.errors import ConflictError, NotFoundError, RemoteError, UsageError

if TYPE_CHECKING:
    from adapterhub.project.settings_file import SettingsFile
    from adapterhub.remotes.named_remotes import Remote


@click.group(
    "remote",
    cls=Group,
    example="""
    adapterhub remote add team oci://registry.example/adapters --default
    adapterhub push ./sql team/sql:v2 --remote""",
)
def remote() -> None:
    """Name other registries, so that --remote takes the name.

    A ref on a remote is an address below its URL. Remotes are stored in config.toml in your config folder, or with --project in
    the project's adapterhub.toml, for everyone who works on it.
    """


@remote.command(
    "add",
    short_help="Add a remote.",
    example="""
    adapterhub remote add team oci://registry.example/adapters --default
    adapterhub remote add team oci://registry.example/adapters --project""",
)
@click.argument("name")
@click.argument("url")
@click.option("--default", "is_default", is_flag=True, help="Make it the default remote.")
@force_option("give the name another URL.")
@project_option
@click.pass_obj
def add(settings: Settings, *, name: str, url: str, is_default: bool, force: bool, project: bool) -> None:
    """Store a URL under a name, without contacting it.

    URL is oci://HOST[/PREFIX], without credentials: `adapterhub login NAME` stores those.
    """
    from adapterhub.project.settings_file import check_remote_name
    from adapterhub.remotes.named_remotes import check_url, unused_address

    check_remote_name(name)
    url = check_url(url)

    def with_remote(old: SettingsFile) -> tuple[dict[str, str], str | None]:
        if old.remotes.get(name, url) != url and not force:
            raise ConflictError(name, f"already has the URL {old.remotes[name]}", "Pass --force to replace it")
        return {**old.remotes, name: url}, name if is_default else old.remote

    path = _file(project)
    new = _change(path, with_remote)
    environment.remember_host(unused_address(url))
    text = f"{'' if new else 'already there: '}{name}  {url}  ({path})"
    document = {"name": name, "url": url, "default": is_default, "file": str(path), "new": new}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


_LIST = (Column("NAME"), Column("URL"), Column("DEFAULT", drop=1), Column("FILE", drop=2))


@remote.command(
    "list",
    short_help="List the remotes.",
    example="""
    adapterhub remote list""",
)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the remotes: the project's and your own."""
    remotes_, default = environment.remotes(), environment.default_remote()
    rows = [
        {"name": remote_.name, "url": remote_.url, "default": remote_.name == default, "file": str(remote_.path)}
        for remote_ in remotes_.values()
    ]
    output.emit({"remotes": rows}, as_json=settings.as_json, text=lambda: _list_text(list(remotes_.values()), default))


def _list_text(remotes_: list[Remote], default: str | None) -> None:
    if not remotes_:
        output.say("no remotes yet; add one with `adapterhub remote add NAME URL`")
        return
    cells = [[remote_.name, remote_.url, "*" if remote_.name == default else "", str(remote_.path)] for remote_ in remotes_]
    output.write_table(_LIST, cells)


@remote.command(
    "rm",
    short_help="Remove a remote.",
    example="""
    adapterhub remote rm team""",
)
@click.argument("name", shell_complete=completions.complete_remote)
@project_option
@click.pass_obj
def rm(settings: Settings, *, name: str, project: bool) -> None:
    """Remove a remote. Its contents, and a login for it, are left alone."""

    def without_remote(old: SettingsFile) -> tuple[dict[str, str], str | None]:
        if name not in old.remotes:
            same_name = environment.remotes().get(name)
            hint = f"It is in {same_name.path}" if same_name else "Run `adapterhub remote list`"
            raise NotFoundError(name[:80], f"no remote of this name in {old.path}", hint)
        return {key: url for key, url in old.remotes.items() if key != name}, None if old.remote == name else old.remote

    path = _file(project)
    _change(path, without_remote)
    document = {"removed": name, "kind": "remote", "file": str(path)}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed remote {name}"))


@remote.command(
    "default",
    short_help="Show or set the default remote.",
    example="""
    adapterhub remote default
    adapterhub remote default team""",
)
@click.argument("name", required=False, shell_complete=completions.complete_remote)
@project_option
@click.pass_obj
def default(settings: Settings, *, name: str | None, project: bool) -> None:
    """Show the remote that --remote uses without a name, or set it to NAME."""
    if name is not None:
        remote_choice.remote(name)
        _change(_file(project), lambda old: (dict(old.remotes), name))
        # Both are cached: read them again to see what the file says now.
        environment.user.cache_clear()
        environment.project.cache_clear()
    remote_entry = remote_choice.remote(remote_choice.DEFAULT)
    if name is not None and remote_entry.name != name:
        output.say(f"note: here the default is {remote_entry.name}, from the environment or the project")
    document = {"name": remote_entry.name, "url": remote_entry.url}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{remote_entry.name}  {remote_entry.url}"))


@remote.command(
    "test",
    short_help="Test access to a remote.",
    example="""
    adapterhub remote test
    adapterhub remote test team""",
)
@click.argument("name", required=False, default=remote_choice.DEFAULT, shell_complete=completions.complete_remote)
@click.pass_obj
def test(settings: Settings, name: str) -> None:
    """Contact a remote, the default one without NAME: show the user it recognizes, and whether that user may read and write.

    Nothing is left there.

    An OCI registry is asked to accept an invalid manifest, which it refuses; a Hugging Face hub is asked about the token. Exits
    5 when a remote cannot be reached, or may not be read or written.
    """
    remote_entry = remote_choice.trusted_remote(name)
    document = _access_document(remote_entry)
    user_text = f"{document['user']} ({document['login']})" if document["user"] else "anonymous: it did not ask"
    lines = {
        "remote": f"{remote_entry.name}  {remote_entry.url}",
        "user": user_text if document["asks"] else "unknown: this kind of remote cannot be asked",
        "read": _yes_or_no(document["read"]),
        "write": _yes_or_no(document["write"]),
    }
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_pairs(lines))
    if False in (document["read"], document["write"]):
        verb = "read" if document["read"] is False else "written to"
        login = "hf auth login" if remote_entry.url.startswith("hf:") else f"adapterhub login {remote_entry.name}"
        hint = "" if document["user"] else f"Log in with `{login}`"
        raise RemoteError(remote_entry.url, f"may not be {verb}: {document['why']}", hint)


def _access_document(remote_entry: Remote) -> dict[str, Any]:
    from adapterhub.remotes import remote_access
    from adapterhub.remotes.named_remotes import unused_address

    document = {"name": remote_entry.name, "url": remote_entry.url}
    # A remote of this kind has no request that tells who the user is, so only reading is tried.
    if (rights := remote_access.access(remote_entry.url, remotes.surroundings())) is None:
        with remotes.open_address(unused_address(remote_entry.url)) as connected, contextlib.suppress(NotFoundError):
            connected.tags()
        return {**document, "asks": False, "user": "", "login": "", "read": True, "write": None, "why": ""}
    answers = {"user": rights.user, "login": rights.source, "read": rights.reads, "write": rights.writes, "why": rights.reason}
    return {**document, "asks": True, **answers}


def _yes_or_no(permission: bool | None) -> str:
    return "unknown: cannot be tested without writing" if permission is None else "yes" if permission else "no"


def _file(project: bool) -> Path:
    """Return the settings file to change; if no project file exists above, one in this folder."""
    if not project:
        return environment.user_file()
    project_path = workspace.project_file(Path.cwd())
    if project_path is not None and environment.project() is None:
        raise UsageError(str(project_path), "belongs to another user", "Create an adapterhub.toml of your own")
    return project_path or Path.cwd() / PROJECT


def _change(path: Path, update: Any) -> bool:
    """Replace the remotes in a file; return False if nothing changed."""
    from adapterhub import user_files
    from adapterhub.project import remote_edits, settings_file

    def new(text: str) -> str | None:
        remotes, default = update(settings_file.parse(text, path))
        new_text = remote_edits.with_changes(text, path, remotes=remotes, remote=default)
        return new_text if new_text != text else None

    return user_files.change(path, new, follow=path == environment.user_file())
