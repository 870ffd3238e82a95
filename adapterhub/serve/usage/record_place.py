"""Where gateways record usage: a file of SQLite, or a database of PostgreSQL, which gateways on several machines can share.

In PostgreSQL, all tables are in a schema of their own, so that the database may be that of a hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.sqlite_file import SqliteReader
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.postgres import PostgresReader

SCHEMA = "adapterhub_gateway"
"""The schema of the tables of gateways."""
FILE = "usage.db"
"""The name of the file beside a registry."""
IN_SCHEMA = f"-c search_path={SCHEMA}"
"""The option of a session whose tables are those of gateways."""


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """The address of a PostgreSQL.

    Attributes:
        url: `postgresql://user@host/name`, perhaps with a password.
        location: The same without user and password, to be shown.
    """

    url: str = field(repr=False)
    location: str

    def __str__(self) -> str:
        return self.location


Place = Path | PostgresAddress
"""The path of a file, or the address of a database."""


def parse(text: str) -> Place:
    """Return the place that a text names: an address if it has a scheme of PostgreSQL, else a path.

    Raises:
        UsageError: It has another scheme.
    """
    if "://" not in text:
        return Path(text)
    from adapterhub.http.urls import address_without_credentials

    return PostgresAddress(text, address_without_credentials(text))


@contextmanager
def reader(place: Place) -> Iterator[SqliteReader | PostgresReader]:
    """Read what gateways have recorded.

    Raises:
        NotFoundError: There is no such file.
        RemoteError: The database gives no connection within two seconds.
    """
    if isinstance(place, PostgresAddress):
        from adapterhub.postgres import PostgresReader  # late, like the above: most records are files

        with closing(PostgresReader(place.url, options=IN_SCHEMA)) as database:
            yield database
    elif place.exists():
        with closing(SqliteReader(place)) as file:
            yield file
    else:
        raise NotFoundError(str(place), "no usage was recorded there", code="no-usage")
