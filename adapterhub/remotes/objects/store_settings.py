"""Object stores opened with the settings of the environment, and what to set where those are missing or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adapterhub.http.boundary import is_loopback
from adapterhub_converters.errors import LocalIOError, NotFoundError, RemoteError

from .object_address import ObjectAddress

IDLE_TIMEOUT = 180  # seconds without a byte, and for a whole answer's head
ENVIRONMENT_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_IGNORED_SETTINGS = {"aws_bucket", "aws_bucket_name", "google_bucket", "google_bucket_name", "azure_container_name"}
LOGIN_HINTS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL unless it is Amazon's",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "file": "Ask its owner",
}
_MISSING_CREDENTIALS = (": Missing", ": Account must be specified")


class StoreDeniedError(RemoteError):
    """A refusal that another request would meet as well."""

    default_code = "access-denied"


def open_store(address: ObjectAddress, environ: Mapping[str, str], retries: int, timeout: str) -> Any:
    """Open a store with obstore, with the settings in the environment."""
    from obstore import exceptions, store

    if address.scheme == "file":
        if not Path(address.root).is_dir():
            raise NotFoundError(address.store, "no such folder", "A push creates it", code="no-such-file")
        return store.LocalStore(address.root)
    prefix = ENVIRONMENT_PREFIXES[address.scheme]
    config = {key.lower(): value for key, value in environ.items() if key.startswith(prefix) and value}
    config = {key: value for key, value in config.items() if key not in _IGNORED_SETTINGS}
    client: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": f"{IDLE_TIMEOUT}s", "timeout": timeout}
    # A setting of the AWS CLI and SDKs, which obstore takes as an option of its HTTP client.
    if bundle := config.pop("aws_ca_bundle", ""):
        client["root_certificate"] = _certificates(bundle, "AWS_CA_BUNDLE")
    # obstore refuses plain HTTP and uses the environment's proxy for every host. On this machine, nobody can listen on the way,
    # and no proxy leads to it.
    endpoint = endpoint_of(address, environ)
    if is_loopback(host := urlsplit(endpoint).hostname or ""):
        client |= {"allow_http": True, "proxy_url": endpoint, "proxy_excludes": host}
    options = {
        "prefix": address.root or None,
        "client_options": client,
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(minutes=3)},
    }
    store_class: Any = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[address.scheme]
    while True:
        try:
            return store_class(address.bucket, config=config, **options)
        except exceptions.UnknownConfigurationKeyError as error:  # a setting of another program
            setting = str(error).partition("key: '")[2].partition("'")[0]
            if config.pop(setting, None) is None:
                raise RemoteError(address.store, "obstore does not know a setting of the environment", "Unset it") from error
        except exceptions.BaseError as error:
            if any(words in str(error).partition("\n")[0] for words in _MISSING_CREDENTIALS):
                raise missing_credentials(address.store, address.scheme) from error
            problem = f"the settings in {prefix}… cannot be used"
            raise RemoteError(address.store, problem, LOGIN_HINTS[address.scheme]) from error


def missing_credentials(location: str, scheme: str) -> StoreDeniedError:
    """Return the error of a store without credentials, which says what to set."""
    return StoreDeniedError(location, "credentials are missing", LOGIN_HINTS[scheme])


def endpoint_of(address: ObjectAddress, environ: Mapping[str, str]) -> str:
    """Return the server of an address as the environment configures it, without credentials."""
    names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "gs": ("GOOGLE_BASE_URL",)}
    url = next((environ[name] for name in names.get(address.scheme, ("AZURE_ENDPOINT",)) if environ.get(name)), "")
    url_parts = urlsplit(url)
    return (
        f"{url_parts.scheme}://{url_parts.netloc.rpartition('@')[2]}"
        if url_parts.netloc
        else f"the server of {address.scheme}://"
    )


def _certificates(path: str, variable: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LocalIOError(path, error.strerror or str(error), f"{variable} names it") from error
