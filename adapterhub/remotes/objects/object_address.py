"""The address of an adapter in an object store: `s3://bucket/prefix/namespace/name[:tag|@digest]`, `gs://`, `az://`, `file://`.

The last two parts are a name, with the grammar of `adapterhub/ref.py`; the part before is the store, a prefix in a bucket or a
folder. So a store that is copied to disk is the store of a local registry.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from adapterhub.digest import Digest
from adapterhub.ref import LATEST, Ref, RefError
from adapterhub.remotes.remote_address import owner_of
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

BUCKET_WORDS = {"s3": "bucket", "gs": "bucket", "az": "container"}  # the word for one
_BUCKET = safe_regex.Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PART = safe_regex.Pattern(r"[A-Za-z0-9!_.*'()-]+")  # "safe characters" of a key in the documentation of S3


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """One name in an object store, with a version.

    Attributes:
        bucket: Empty for a folder.
        root: The store: the prefix in the bucket, without slashes around it, or the absolute path of the folder.
        ref: The name, with a tag, a number, a range, a digest or its first digits.
    """

    scheme: str
    bucket: str
    root: str
    ref: Ref

    mark = ":"  # before a tag

    @classmethod
    def parse(cls, text: str) -> ObjectAddress:
        """Parse an address.

        Raises:
            UsageError: It is invalid. The message never repeats a password.
        """
        scheme, _, remainder = text.partition("://")
        scheme = scheme.lower()
        bucket, _, path = remainder.partition("/")
        if "@" in bucket or "?" in remainder:
            redacted = f"{scheme}://…/{path.partition('?')[0]}"
            raise UsageError(
                redacted, "credentials in an address end up in logs", "Remove them, and set them in the environment"
            )
        hint = f"Write it like {scheme}://{'' if scheme == 'file' else 'bucket'}/adapters/team/sql:v2"
        head, _, name_and_version = path.rpartition("/")
        root_text, _, namespace = head.rpartition("/")
        if scheme == "file":
            root = "/" + unquote(root_text)
            is_valid = bool(root_text) and bucket in ("", "localhost") and ".." not in root.split("/") and "\0" not in root
        else:
            root = root_text
            is_valid = bool(_BUCKET.fullmatch(bucket)) and all(_is_key_part(part) for part in root.split("/") if root)
        if not is_valid or "" in path.split("/")[:-2]:
            raise UsageError(text, "not a valid address of an object store", hint)
        try:
            ref = Ref.parse(f"{namespace}/{name_and_version}")
        except RefError as error:
            raise RefError(text, error.what, error.hint if namespace else hint) from error
        return cls(scheme, "" if scheme == "file" else bucket, root, ref)

    @property
    def host(self) -> str:
        """The bucket or the folder."""
        return self.bucket or self.root

    @property
    def owner(self) -> str:
        """The bucket or the folder."""
        return owner_of(Path(self.root)) if self.scheme == "file" else f"{self.scheme}://{self.bucket}"

    @property
    def title(self) -> str:
        """The last part of the name."""
        return self.ref.name.rpartition("/")[2]

    @property
    def store(self) -> str:
        """The address of the store."""
        if self.scheme == "file":
            return f"file://{quote(self.root)}"
        return f"{self.scheme}://{self.bucket}" + (f"/{self.root}" if self.root else "")

    @property
    def repository(self) -> str:
        """The address without a version."""
        return f"{self.store}/{self.ref.name}"

    @property
    def tag(self) -> str | None:
        """The tag, running number or range."""
        return f"v{self.ref.number}" if self.ref.number else self.ref.tag or self.ref.range

    @property
    def digest(self) -> Digest | None:
        """The digest, or its first digits."""
        return self.ref.digest

    @property
    def reference(self) -> str:
        """The digest, else the tag, else `latest`."""
        return self.digest or self.tag or LATEST

    @property
    def version(self) -> str:
        """The address with a version."""
        return f"{self.repository}{'@' if self.digest else ':'}{self.reference}"

    def __str__(self) -> str:
        return self.version if self.digest or self.tag else self.repository


def _is_key_part(part: str) -> bool:
    return _PART.fullmatch(part) is not None and part.strip(".") != ""
