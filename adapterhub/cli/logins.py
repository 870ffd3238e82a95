"""The registry that a login is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub.cli import environment
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.remotes.oci.address import Address


def address_of(text: str) -> Address:
    """The registry that a host, a URL or the name of a remote means; UsageError for a place whose logins other tools store."""
    from adapterhub.remotes.oci.address import Address

    found = environment.remotes().get(text)
    url = found.url if found else text if "://" in text else f"oci://{text}"
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        host = rest.partition("/")[0].rpartition("@")[2]
        raise UsageError(host, "credentials in an address end up in logs", f"Run `adapterhub login {host}`")
    scheme = scheme.lower()
    if not scheme.startswith("oci"):
        raise UsageError(f"{scheme}://", "logins for such places are stored by other tools", _ELSEWHERE.get(scheme, _OTHERS))
    return Address.parse(f"{scheme}://{rest.partition('/')[0]}/x")


_OTHERS = "The variables and files of those tools are read"


_ELSEWHERE = {
    "hf": "Use `hf auth login`; adapterhub reads the token that it stores",
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "Use `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "file": "A folder has the permissions of its file system",
}
