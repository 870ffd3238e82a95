"""The registry that a login is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_converters.errors import UsageError

from . import environment, remote_choice

if TYPE_CHECKING:
    from adapterhub.remotes.oci.oci_address import OciAddress


HUBS = {"hub+https": "oci+https", "hub+http": "oci+http"}
"""Schemes of hubs, and those of the registry at the same address; a login is stored once for both."""


def is_hub(text: str) -> bool:
    """Return whether a URL or a remote is a hub, where users log in with a code."""
    return _url(text).partition("://")[0].lower() in HUBS


def _url(text: str) -> str:
    remote = remote_choice.trusted_remote(text) if text in environment.remotes() else None
    return remote.url if remote else text if "://" in text else f"oci://{text}"


def address_of(text: str) -> OciAddress:
    """Return the registry that a host, a URL or a remote names; raise UsageError for a kind with logins of its own."""
    from adapterhub.remotes.oci.oci_address import OciAddress

    url = _url(text)
    scheme, _, remainder = url.partition("://")
    if "@" in remainder.partition("/")[0]:
        host = remainder.partition("/")[0].rpartition("@")[2]
        raise UsageError(host, "contains credentials, which end up in logs", f"Run `adapterhub login {host}`")
    scheme = scheme.lower()
    if scheme in HUBS:
        scheme = HUBS[scheme]
    if scheme in ("http", "https"):
        host = remainder.partition("/")[0]
        raise UsageError(
            text,
            "not the address of a hub or of a registry",
            f"Write hub+{scheme}://{host} for a hub, or {host} for an OCI registry",
        )
    if not scheme.startswith("oci"):
        raise UsageError(f"{scheme}://", "has logins of its own", _HINTS.get(scheme, _OTHER_HINT))
    # A login is for a whole registry, so any repository name will do.
    return OciAddress.parse(f"{scheme}://{remainder.partition('/')[0]}/x")


_OTHER_HINT = "Its own tools store them, and adapterhub reads those"

_HINTS = {
    "hf": "Run `hf auth login`; adapterhub reads its token",
    "s3": "Run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "file": "The permissions of the folder apply",
}
