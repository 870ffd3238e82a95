"""An OCI registry as a whole: login, rights, and the names in it.

Rights are tried on a name that nobody uses, and leave nothing behind: an invalid manifest is put under a wrong digest, which a
registry that grants writing refuses with a 400. (An upload that is begun and canceled leaves files in docker-registry 2.8,
which saves the state of the hash after it has removed the upload.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from adapterhub.http.client import PAUSES
from adapterhub.http.errors import DeniedError
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.remotes.location import Access
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, RemoteError

from .address import Address
from .client import RegistryClient
from .credentials import Credentials

GIVEN = "given"
"""The source of credentials that are not stored yet."""
_DOCKER = "docker's config.json"
_MAX_NAMES, _PAGE = 100_000, 4 << 20
_UNKNOWN = (401, 403, 404, 405, 501)  # from registries without a catalog, or without one for this user


class Host:
    """The registry of an address, whose name is a prefix of the names to look at; a context manager that closes it."""

    def __init__(
        self,
        address: Address,
        find: Callable[[], Credentials | None],
        hint: str = "",
        *,
        pauses: Sequence[float] = PAUSES,
        proxy: ProxyOf = no_proxy,
    ) -> None:
        self.address = address
        self.where = f"{address.scheme}://{address.host}"
        self._found: list[Credentials | None] = []

        def once() -> Credentials | None:
            self._found.append(find())
            return self._found[-1]

        self._client = RegistryClient.to(self.where, address, once, hint, pauses=pauses, proxy=proxy)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def check_login(self) -> None:
        """Have the registry check the credentials.

        Raises:
            DeniedError: It refuses them.
            RefusedError: It requires no login, so that they were not checked.
        """
        self.reach()
        if not self._found:
            raise RefusedError(
                self.where, "this registry requires no login, so the credentials cannot be checked", "Use it without a login"
            )

    def reach(self) -> None:
        """Check that a registry answers, and refuses no credentials; RemoteError otherwise."""
        try:
            self._client.ask("GET", f"{self.address.base}/v2/", self.where, good=(200,))
        except NotFoundError as error:
            raise RemoteError(self.where, "not an OCI registry (it has no /v2/)") from error
        except DeniedError as error:
            if not (found := self._found[-1] if self._found else None):
                raise
            of = f" of {found.user}" if found.user else ""
            by = f" ({found.source or _DOCKER})" if found.source != GIVEN else ""
            what = f"{error.what.partition(':')[0]}: the login{of}{by} was refused"
            raise DeniedError(self.where, what, error.hint, host=str(error.fields["host"])) from error

    def access(self) -> Access:
        """The rights below the address; RemoteError without a registry, or if it refuses the credentials."""
        self.reach()
        reads, why = self._allowed(self._read)
        writes, not_written = self._allowed(self._write) if reads else (False, "")
        found = self._found[-1] if self._found else None
        who = (found.user or "the bearer of a token") if found else ""
        source = (found.source or _DOCKER) if found else ""
        return Access(who, source, reads, writes, why or not_written)

    def _allowed(self, act: Callable[[], None]) -> tuple[bool, str]:
        try:
            act()
        except (NotFoundError, RemoteError) as error:
            return False, error.what
        return True, ""

    def _read(self) -> None:
        with contextlib.suppress(NotFoundError):
            url = f"{self.address.base}/v2/{self.address.name}/tags/list"
            self._client.ask("GET", url, self.where, good=(200,), scope=self._scope("pull"), limit=_PAGE)

    def _write(self) -> None:
        scope = self._scope("pull,push")
        url = f"{self.address.base}/v2/{self.address.name}/manifests/sha256:{'0' * 64}"
        kind = {"Content-Type": MANIFEST_TYPE}
        self._client.ask("PUT", url, self.where, good=(400, 415, 422), scope=scope, headers=kind, body=b"x")

    def names(self) -> list[str]:
        """All repositories, sorted; RemoteError if the registry does not list them."""
        found: set[str] = set()
        url, scope = f"{self.address.base}/v2/_catalog?n=1000", "registry:catalog:*"
        for answer in self._client.pages(url, self.where, good=(200, *_UNKNOWN), scope=scope, limit=_PAGE):
            if answer.status in _UNKNOWN:
                raise RemoteError(self.where, "this registry does not list its names", "Name one: namespace/name")
            try:
                page = json_file.parse_object(answer.body, self.where)["repositories"] or []
                new = {name for name in page if isinstance(name, str) and name.isascii() and name.isprintable()}
            except (FormatError, KeyError, TypeError) as error:
                raise FormatError(self.where, "the registry's answer is not a list of names") from error
            if new <= found:
                break
            found |= new
            if len(found) > _MAX_NAMES:
                raise RemoteError(self.where, f"it lists more than {_MAX_NAMES} names")
        return sorted(found)

    def _scope(self, actions: str) -> str:
        return f"repository:{self.address.name}:{actions}"
