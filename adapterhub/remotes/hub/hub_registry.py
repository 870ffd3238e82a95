"""The registry in a hub of ours, for pushes to it: versions, tags, messages, metrics and signatures as it keeps them.

Blobs and attachments go there as to an OCI registry, which every such hub is too; the version is published by its API. On other
hubs a push is a commit (`hub_writer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import field
from typing import Any
from urllib.parse import urlsplit

from adapterhub.bases.hub_address import MAIN
from adapterhub.digest import Digest
from adapterhub.http.http_errors import DeniedError
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref
from adapterhub.remotes.oci.docker_credentials import Credentials
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.protocol import PutResult, Source, check_complete
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_api import HubApi, api_description, open_wire
from .hub_catalog import HubCatalog
from .hub_client import HubAddress, HubClient


class _Repository(OciRepository):
    """The repository as one of an OCI registry, under its address on the hub."""

    kind = "a hub"

    def __init__(self, place: OciAddress, location: str, **options: Any) -> None:
        self._location = location
        super().__init__(place, **options)

    @property
    def location(self) -> str:
        """The address on the hub, without a version."""
        return self._location


@dataclass
class HubRegistry:
    """The repository of an address, as a hub of ours keeps it; `close` it after use.

    Attributes:
        oci: The repository as one of an OCI registry.
        catalog: The catalog of the hub.
        name: The name of the repository.
        expected_digest: The digest that the tag must be at, or its first digits, or `absent`; None for any.
        metrics: Results of other programs, to record with the version.
        extra_tags: Tags to move besides the one that is asked for.
        takes_dry_run: Whether the hub rehearses changes.
    """

    oci: OciRepository
    catalog: HubCatalog
    name: str
    expected_digest: Digest | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra_tags: tuple[str, ...] = ()
    takes_dry_run: bool = False

    @classmethod
    def find(cls, address: HubAddress, client: HubClient) -> HubRegistry | None:
        """Return the registry of an address; None on a hub that is not one of ours, or below a path of its host."""
        url = urlsplit(client.endpoint)
        description = None if url.path.strip("/") else api_description(client.endpoint, client.wire, client.location)
        if description is None:
            return None
        name, tls = address.name.lower(), url.scheme == "https"
        place = OciAddress(url.netloc, name, tls=tls, scheme="oci+https" if tls else "oci+http")
        token = client.token
        credentials = Credentials(user="adapterhub", password=token, source="the hub's login") if token else None
        oci = _Repository(place, client.location, pauses=client.pauses, proxy=client.proxy, credentials=credentials)
        wire = open_wire(address, client.endpoint, token, client.proxy, client.pauses)
        catalog = HubCatalog(HubApi(client.endpoint, wire, client.location))
        return cls(oci, catalog, name, takes_dry_run=description.takes_dry_run)

    def close(self) -> None:
        """Close the connections."""
        with closing(self.oci), closing(self.catalog):
            pass

    def stop(self, *, on: bool) -> None:
        """Make waiting threads fail at once, until called again with `on` False."""
        self.oci.stop(on=on)
        self.catalog.api.wire.stop(on=on)

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether the hub has a blob in this repository."""
        with self._denials_explained():
            return self.oci.has_blob(blob)

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Send a blob; return the number of bytes sent."""
        with self._denials_explained():
            return self.oci.put_blob(blob, source)

    @contextmanager
    def _denials_explained(self) -> Iterator[None]:
        """Raise the hub's own reason for a denial, which it gives to no HEAD."""
        try:
            yield
        except DeniedError:
            self.catalog.check_writable(self.name)
            raise

    def check_push(self, manifest: Manifest | None, tag: str | None) -> bool:
        """Raise the error with which the hub would refuse a version and its tags; return whether it was asked.

        The request is saved for a manifest that moves only `latest`.
        """
        tags = self._tags_to_move(tag)
        if not self.takes_dry_run or (manifest and not tags):
            return False
        return self.catalog.check_publish(self.name, manifest, tags=tags, expect=self.expected_digest)

    def put_manifest(self, manifest: Manifest, tag: str | None, message: str) -> PutResult:
        """Publish a manifest whose blobs are there, or move a tag to the version that it is."""
        check_complete((manifest.config, *manifest.layers), self.has_blob, self.oci.location)
        tags = self._tags_to_move(tag)
        version = self.catalog.publish(
            self.name, manifest, tags=tags, expect=self.expected_digest, message=message, metrics=self.metrics
        )
        return PutResult(new=version.new, moved=version.moved, number=version.number)

    def _tags_to_move(self, tag: str | None) -> list[str]:
        """Return the tags that a push to a tag moves besides `latest`."""
        return [*([] if tag in (None, MAIN, LATEST) else [str(tag)]), *self.extra_tags]

    def untag(self, tag: str) -> None:
        """Remove a tag; its version stays."""
        self.catalog.rm(Ref(self.name, tag=tag))
