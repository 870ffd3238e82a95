"""The surroundings of operations: the registry, the project's policy, credentials and caches, all passed in as values.

The library reads no environment. The command line makes a `Workspace` of options, variables and the user's files; in Python the
default one has the registry and the policy of the working folder, and accesses remotes without credentials.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.project import PROJECT
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub
    from adapterhub.http.urls import ProxyOf
    from adapterhub.project.policy import Policy
    from adapterhub.project.settings_file import SettingsFile
    from adapterhub.registry.registry import Registry
    from adapterhub.remotes.protocol import OpenRemote
    from adapterhub.remotes.remote_address import RemoteAddress, UserSettings

StrPath = str | os.PathLike[str]
Progress = Callable[[int, int], None]
Bar = Callable[[str], AbstractContextManager[Progress | None]]
_NO_ENVIRONMENT: Mapping[str, str] = {}


def as_list(paths: StrPath | Iterable[StrPath]) -> list[StrPath]:
    """Return one path or several as a list."""
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def home_folder() -> Path:
    """Return the user's home folder. UsageError without one: HOME is not set, and the system does not know the user."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise UsageError(
            "HOME", "is not set, and the system knows no home folder of this user", "Set it to a folder"
        ) from error


_USER_FOLDERS = {
    "data": ("XDG_DATA_HOME", "LOCALAPPDATA", ".local/share"),
    "config": ("XDG_CONFIG_HOME", "APPDATA", ".config"),
    "cache": ("XDG_CACHE_HOME", "LOCALAPPDATA", ".cache"),
}


def user_folder(kind: str, environ: Mapping[str, str] = _NO_ENVIRONMENT) -> Path:
    """Return the user's own folder for adapterhub's files of a kind: `data`, `config` or `cache`.

    `environ` may name other places: the XDG base directories, and on Windows APPDATA and LOCALAPPDATA.
    """
    xdg, windows, unix = _USER_FOLDERS[kind]
    if environ.get(xdg):
        return Path(environ[xdg]) / "adapterhub"
    if sys.platform == "darwin":
        return home_folder() / "Library" / ("Caches" if kind == "cache" else "Application Support") / "adapterhub"
    if sys.platform == "win32":
        folder = Path(environ.get(windows) or home_folder()) / "adapterhub"
        return folder / "cache" if kind == "cache" else folder  # on Windows, LOCALAPPDATA is for data and caches alike
    return home_folder() / unix / "adapterhub"


def variable_for(path: Path, environ: Mapping[str, str]) -> str:
    """Return the variable that moves the user's folder in which a path is; empty for a path outside of them."""
    with suppress(UsageError):
        for kind, (variable, *_) in _USER_FOLDERS.items():
            if path.is_relative_to(user_folder(kind, environ)):
                return variable
    return ""


def project_file(start: Path) -> Path | None:
    """Return the nearest adapterhub.toml at or above a folder, whoever owns it; a link counts, so that reading reports it."""
    start = start.absolute()
    return next((folder / PROJECT for folder in (start, *start.parents) if _is_there(folder / PROJECT)), None)


def _is_there(path: Path) -> bool:
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def project_at(start: Path) -> SettingsFile | None:
    """Return the settings of the project that a folder is in; None without one, or if the file is another user's."""
    path = project_file(start)
    if path is None:
        return None
    from adapterhub import user_files
    from adapterhub.project import settings_file

    return settings_file.read(path, follow=False) if user_files.is_mine(path) else None


def _working_folder_policy() -> Policy | None:
    project = project_at(Path.cwd())
    return project.policy if project else None


def _anonymous_hub() -> Hub:
    from adapterhub.bases.hub_address import Hub

    return Hub()


def _hub_cache() -> Path:
    return home_folder() / ".cache" / "huggingface" / "hub"


def _no_proxy(_scheme: str, _host: str) -> str:
    return ""


def _trusts_nobody(_owner: str, _file: Path) -> bool:
    return False


def _ignore_note(_note: str) -> None:
    return None


def _no_bar(_title: str) -> AbstractContextManager[Progress | None]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Workspace:
    """The surroundings of an operation.

    Attributes:
        registry: The folder of the registry, or a function that returns it, called when a registry is needed. None for the
            nearest one at or above the working folder, else that of its adapterhub.toml, else the user's own.
        policy: Requirements on adapters that are stored or pulled, or a function that returns them; by default those of the
            nearest adapterhub.toml. None for none.
        docker: The path of docker's config.json, for credentials of registries; None for none.
        hub: Returns the Hugging Face Hub to ask, and the token.
        environ: Variables for the conventions of others (`AWS_…`).
        proxy: Returns the URL of the proxy for a scheme and a host, an empty text for none.
        trusts: Called before a request to an address that only a file of the project names, with the owner of the address
            (`remotes.remote_address.RemoteAddress.owner`) and that file; returns True to continue. By default it trusts nobody.
        uploads: A folder for the state of uploads, so that they can resume; None for none.
        cache: A folder for quantized bases and digests of large files; None keeps none.
        models: The cache of huggingface_hub, where base models are looked up by name and downloaded to; None for none.
        tell: Called with a line for each note, such as that a version is deprecated.
        bar: Called with a title when bytes begin to be counted; its context gives the callback, `(done, total)`.
        steps: The same for things that are not bytes.
        jobs: The number of files that are transferred at once.
        rate: The largest number of bytes a second of a transfer; None for no limit.
        known_signers: The file of keys that the user has accepted for namespaces; None for none.
        author: The user that logs name as the author of each move; empty to name nobody.
        opener: Opens the registry if it is not the one in that folder, such as that of a hub in a database and a bucket; None
            if it is.

    Example:
        >>> Workspace(registry="adapters").folder()
        PosixPath('adapters')
    """

    registry: StrPath | Callable[[], Path] | None = None
    policy: Policy | Callable[[], Policy | None] | None = field(default=_working_folder_policy, repr=False)
    docker: StrPath | None = None
    hub: Callable[[], Hub] = field(default=_anonymous_hub, repr=False)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    proxy: ProxyOf = field(default=_no_proxy, repr=False)
    trusts: Callable[[str, Path], bool] = field(default=_trusts_nobody, repr=False)
    uploads: StrPath | None = None
    cache: StrPath | None = None
    models: StrPath | None = field(default_factory=_hub_cache)
    tell: Callable[[str], object] = field(default=_ignore_note, repr=False)
    bar: Bar = field(default=_no_bar, repr=False)
    steps: Bar = field(default=_no_bar, repr=False)
    jobs: int = 4
    rate: float | None = None
    author: str = ""
    known_signers: StrPath | None = None
    opener: Callable[[], Registry] | None = field(default=None, repr=False)

    def folder(self) -> Path:
        """Return the folder of the registry, which need not exist yet."""
        if callable(self.registry):
            return self.registry()
        if self.registry is not None:
            return Path(self.registry).expanduser()
        from adapterhub.registry.registry import find

        project = project_at(Path.cwd())
        project_registry = self.admitted_registry(project) if project else None
        return find(Path.cwd(), explicit=project_registry, default=user_folder("data"))

    def rules(self) -> Policy | None:
        """Return the policy; None without one."""
        return self.policy() if callable(self.policy) else self.policy

    def check_name(self, name: str) -> None:
        """Compare a name with the policy, before any remote is asked for it.

        Raises:
            RefusedError: The policy does not allow it.
        """
        if policy := self.rules():
            policy.check_name(name)

    def within(self, registry: Registry) -> Workspace:
        """Return a copy whose policy also has the rules of a registry."""
        from adapterhub.project.policy import join

        return self if registry.policy is None else replace(self, policy=join(self.rules(), registry.policy))

    def admitted_address(self, address: str, file: StrPath) -> str:
        """Return an address that a file of the project names, if it may be used.

        Raises:
            RefusedError: Its owner is not trusted; code `unknown-host` or `unknown-folder`.
        """
        from adapterhub.remotes.remote_address import parse

        self._admit(parse(address).owner, Path(file))
        return address

    def admitted_registry(self, project: SettingsFile) -> Path | None:
        """Return the folder of the registry that a project names, None without one. Raise as `admitted_address` does."""
        from adapterhub.remotes.remote_address import owner_of

        if project.registry is not None:
            self._admit(owner_of(project.registry), project.path)
        return project.registry

    def admitted_base(self, project: SettingsFile) -> str | None:
        """Return the base model that a project checks its adapters against. Raise as `admitted_address` does."""
        from urllib.parse import urlsplit

        from adapterhub.remotes.remote_address import owner_of

        text = project.validate.base
        if text is None or text.lower().startswith("hf://"):  # the hub is the user's choice, not the project's
            return text
        if text.lower().startswith(("https://", "http://")):
            url = urlsplit(text)
            self._admit(f"{url.scheme}://{url.netloc}".lower(), project.path)
            return text
        path = project.path.absolute().parent / text
        if not path.exists():
            return text
        self._admit(owner_of(path), project.path)
        return str(path)

    def _admit(self, owner: str, file: Path) -> None:
        from adapterhub.remotes.remote_address import is_below

        # A project may be a clone of somebody else's: its files must not lead to new hosts or folders unnoticed.
        if not is_below(owner, file.parent) and not self.trusts(owner, file):
            problem = f"names {owner}, which you have not used before"
            code = "unknown-folder" if owner.startswith("file:") else "unknown-host"
            raise RefusedError(file.name, problem, "Allow it, or name it yourself", code=code, owner=owner)

    def open_registry(self, *, create: bool = False) -> Registry:
        """Open the registry, a context manager; NotFoundError if there is none, unless `create` makes it."""
        from adapterhub.registry.registry import Registry

        if self.opener is not None:
            registry = self.opener()
        else:
            folder = self.folder()
            try:
                registry = Registry.open(folder)
            except NotFoundError:
                if not create:
                    raise
                registry = Registry.init(folder)
                self.tell(f"created the registry {folder}")
        # Set on the open registry, whose log entries name the author.
        registry.author = self.author
        registry.gate.rules_of_caller = self.rules
        return registry

    def transfer(self) -> dict[str, Any]:
        """Return the arguments of `copy.copy` and `folders.download` that limit how fast bytes move."""
        from adapterhub.remotes.parallel_transfer import RateLimit

        return {"jobs": self.jobs, "pace": RateLimit(self.rate)}

    def with_progress(self, progress: Progress | None) -> Workspace:
        """Return a copy that reports every count to `progress`; the workspace itself if that is None."""
        if progress is None:
            return self
        return replace(self, bar=lambda _title: nullcontext(progress), steps=lambda _title: nullcontext(progress))

    def surroundings(self) -> UserSettings:
        """Return the part of the workspace that remotes need."""
        from adapterhub.remotes.remote_address import UserSettings

        docker = _path(self.docker)

        def login(host: str, plain: bool) -> str | None:
            from adapterhub.remotes.oci import docker_credentials

            stored = docker_credentials.find_credentials(host, docker, plain=plain)
            return (stored.bearer or stored.password or None) if stored else None

        return UserSettings(docker, self.hub, self.environ, _path(self.uploads), self.proxy, self.author, login)

    def connect(self, address_: RemoteAddress) -> OpenRemote:
        """Open an address; the caller closes it."""
        from adapterhub.remotes import remote_address

        return remote_address.connect(address_, self.surroundings())

    def tell_notes(self, remote: OpenRemote) -> str:
        """Report the notes of a remote, and return the commit that was read or made; empty for a remote without commits."""
        commit = remote.commit_id
        for note in [*remote.notes, *([f"commit {commit}"] if commit else [])]:
            self.tell(note)
        return commit

    def warn_if_deprecated(self, ref: object, message: str | None) -> None:
        """Warn that a version is deprecated; do nothing if it is not (`message` is None)."""
        if message is not None:
            self.tell(f"warning: {ref} is deprecated" + (f": {message}" if message else ""))


def _path(value: StrPath | None) -> Path | None:
    return None if value is None else Path(value).expanduser()
