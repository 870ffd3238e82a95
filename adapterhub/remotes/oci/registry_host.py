"""An OCI registry as a whole: login, access rights, and the names in it.

Rights are tried on a name that nobody uses, and leave nothing behind: an invalid manifest is put under a wrong digest, which a
registry that grants writing refuses with a 400. (An upload that is begun and canceled leaves files in docker-registry 2.8,
which saves the state of the hash after it has removed the upload.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from adapterhub.http.client import PAUSES
from adapterhub.http.http_errors import DeniedError
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.remotes.remote_address import Access
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, RemoteError

from .docker_credentials import Credentials
from .oci_address import OciAddress
from .registry_client import RegistryClient

NOT_STORED = "given"
"""The `source` of credentials that are not stored yet."""
_DOCKER = "docker's config.json"
_MAX_NAMES, _MAX_PAGE = 100_000, 4 << 20
_NO_CATALOG = (401, 403, 404, 405, 501)  # from registries without a catalog, or without one for this user


class RegistryHost:
    """The registry of an address, whose name is a prefix of the names to look at; a context manager that closes it."""

    def __init__(
        self,
        address: OciAddress,
        find: Callable[[], Credentials | None],
        hint: str = "",
        *,
        pauses: Sequence[float] = PAUSES,
        proxy: ProxyOf = no_proxy,
    ) -> None:
        self.address = address
        self.location = f"{address.scheme}://{address.host}"
        self._credentials_used: list[Credentials | None] = []

        def once() -> Credentials | None:
            # Remember what was used, for the errors and for `access`.
            self._credentials_used.append(find())
            return self._credentials_used[-1]

        self._client = RegistryClient.open(self.location, address, once, hint, pauses=pauses, proxy=proxy)

    def __enter__(self) -> RegistryHost:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def check_login(self) -> None:
        """Make the registry check the credentials.

        Raises:
            DeniedError: It refuses them.
            RefusedError: It requires no login, so they were not checked.
        """
        self.reach()
        if not self._credentials_used:
            raise RefusedError(
                self.location, "this registry requires no login, so the credentials cannot be checked", "Use it without a login"
            )

    def reach(self) -> None:
        """Check that a registry answers and does not refuse the credentials.

        Raises:
            RemoteError: It does not answer, or refuses them.
        """
        try:
            self._client.request("GET", f"{self.address.registry_url}/v2/", self.location, good=(200,))
        except NotFoundError as error:
            raise RemoteError(self.location, "not an OCI registry (it has no /v2/)") from error
        # Say which login was refused: it may be one that the user has forgotten.
        except DeniedError as error:
            if not (credentials := self._credentials_used[-1] if self._credentials_used else None):
                raise
            of_user = f" of {credentials.user}" if credentials.user else ""
            from_source = f" ({credentials.source or _DOCKER})" if credentials.source != NOT_STORED else ""
            problem = f"{error.what.partition(':')[0]}: the login{of_user}{from_source} was refused"
            raise DeniedError(self.location, problem, error.hint, host=str(error.fields["host"])) from error

    def access(self) -> Access:
        """Return the rights below the address.

        Raises:
            RemoteError: There is no registry, or it refuses the credentials.
        """
        self.reach()
        reads, not_read = self._is_allowed(self._try_read)
        writes, not_written = self._is_allowed(self._try_write) if reads else (False, "")
        credentials = self._credentials_used[-1] if self._credentials_used else None
        user = (credentials.user or "the bearer of a token") if credentials else ""
        source = (credentials.source or _DOCKER) if credentials else ""
        return Access(user, source, reads, writes, not_read or not_written)

    def _is_allowed(self, request: Callable[[], None]) -> tuple[bool, str]:
        """Try a request; return whether it is allowed, and the reason if it is not."""
        try:
            request()
        except (NotFoundError, RemoteError) as error:
            return False, error.what
        return True, ""

    def _try_read(self) -> None:
        """List the tags of the name, which need not exist."""
        with contextlib.suppress(NotFoundError):
            url = f"{self.address.registry_url}/v2/{self.address.name}/tags/list"
            self._client.request("GET", url, self.location, good=(200,), scope=self._scope("pull"), limit=_MAX_PAGE)

    def _try_write(self) -> None:
        """Put an invalid manifest, which a registry that grants writing refuses as invalid."""
        scope = self._scope("pull,push")
        url = f"{self.address.registry_url}/v2/{self.address.name}/manifests/sha256:{'0' * 64}"
        kind = {"Content-Type": MANIFEST_TYPE}
        self._client.request("PUT", url, self.location, good=(400, 415, 422), scope=scope, headers=kind, body=b"x")

    def names(self) -> list[str]:
        """Return all repositories, sorted.

        Raises:
            RemoteError: The registry does not list them.
        """
        names: set[str] = set()
        url, scope = f"{self.address.registry_url}/v2/_catalog?n=1000", "registry:catalog:*"
        for response in self._client.pages(url, self.location, good=(200, *_NO_CATALOG), scope=scope, limit=_MAX_PAGE):
            if response.status in _NO_CATALOG:
                raise RemoteError(self.location, "this registry does not list its names", "Name one: namespace/name")
            try:
                page = json_file.parse_object(response.body, self.location)["repositories"] or []
                page_names = {name for name in page if isinstance(name, str) and name.isascii() and name.isprintable()}
            except (FormatError, KeyError, TypeError) as error:
                raise FormatError(self.location, "the registry's answer is not a list of names") from error
            # A registry that ignores the cursor would send the first page forever.
            if page_names <= names:
                break
            names |= page_names
            if len(names) > _MAX_NAMES:
                raise RemoteError(self.location, f"it lists more than {_MAX_NAMES} names")
        return sorted(names)

    def _scope(self, actions: str) -> str:
        return f"repository:{self.address.name}:{actions}"
