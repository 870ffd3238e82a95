"""The identity of a signer to Sigstore: a name, and the OpenID Connect issuer that vouches for it."""

from __future__ import annotations

from pathlib import Path

from adapterhub_converters.errors import ParameterError
from adapterhub_converters.lazy_dataclass import dataclass

MAX_LENGTH = 2048
"""The most characters of a name or an issuer."""

KIND = "sigstore"
"""The kind of a signer that is an identity; the kind of any other signer is that of its key."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A signer who is known by name: signatures without a key to keep, which Sigstore calls keyless.

    Attributes:
        name: An email address, or a URI such as that of a workflow; compared with the certificate exactly.
        issuer: The URL of the issuer of the name's tokens. The same name with another issuer is somebody else.
        trust_config: The client trust config or the trusted root of a private Sigstore, in JSON; None for the public one.

    Example:
        >>> ah.Identity("release@example.com", "https://accounts.example.com").title
        'release@example.com of https://accounts.example.com'
    """

    name: str
    issuer: str
    trust_config: Path | None = None

    def __post_init__(self) -> None:
        for parameter, value in (("identity", self.name), ("issuer", self.issuer)):
            if not value or not value.isprintable() or len(value) > MAX_LENGTH:
                problem = f"is not one line of at most {MAX_LENGTH} characters"
                raise ParameterError(parameter, problem, "Write it as the certificates of the signer have it")

    @property
    def kind(self) -> str:
        """The kind of signer."""
        return KIND

    @property
    def id(self) -> str:
        """The issuer and the name."""
        return f"{self.issuer} {self.name}"

    @property
    def title(self) -> str:
        """The signer in words, for use in a sentence."""
        return f"{self.name} of {self.issuer}"

    @property
    def source(self) -> str:
        """The name of the signer, where a key has the file that it was read from."""
        return self.name

    def document(self) -> dict[str, str | None]:
        """Return the signer as JSON; `key` is None, because there is none to keep."""
        return {"key": None, "type": KIND, "identity": self.name, "issuer": self.issuer}
