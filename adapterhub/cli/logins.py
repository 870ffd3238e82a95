"""The registry that a login is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub.cli import environment
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.oci.address import Address


def key(address: Address) -> str:
    """The name under which a login is kept."""
    from adapterhub.remotes.oci.credentials import canonical

    return canonical(address.host, plain=address.plain)


def address_of(text: str) -> Address:
    """The registry that a host, a URL or the name of a remote is; UsageError for a place where others keep the login."""
    from adapterhub.remotes.oci.address import Address

    found = environment.remotes().get(text)
    url = found.url if found else text if "://" in text else f"oci://{text}"
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        host = rest.partition("/")[0].rpartition("@")[2]
        raise UsageError(host, "credentials in an address end up in logs", f"Run `adapterhub login {host}`")
    scheme = scheme.lower()
    if not scheme.startswith("oci"):
        raise UsageError(f"{scheme}://", "logins for such places aren't kept here", _ELSEWHERE.get(scheme, _OTHERS))
    return Address.parse(f"{scheme}://{rest.partition('/')[0]}/x")


_OTHERS = "The variables and files of their own tools are read"


_ELSEWHERE = {
    "hf": "`hf auth login` keeps the token where all tools of the Hugging Face Hub find it, and so does adapterhub",
    "s3": "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "file": "A folder has the permissions of its file system",
}
