"""The tables of a record in PostgreSQL, for gateways on several machines."""

from __future__ import annotations

from adapterhub.postgres import Postgres

from . import limits_database, usage_database
from .limits_database import LimitsDatabase
from .record_place import IN_SCHEMA, SCHEMA, PostgresAddress
from .usage_database import UsageDatabase

_SCHEMA_CREATION = 0x41644757_00  # the key of an advisory lock


class _GatewayTables(Postgres):
    _max_connections = 1

    def _create_versions(self) -> None:
        # Even `IF NOT EXISTS` needs the right to create one, and fails if usage and limits, whose locks differ, do it at once.
        self.execute("SELECT pg_advisory_xact_lock(?)", _SCHEMA_CREATION)
        if not self.select("SELECT 1 FROM pg_namespace WHERE nspname = ?", SCHEMA):
            self.execute(f"CREATE SCHEMA {SCHEMA}")
        super()._create_versions()


class PostgresUsage(_GatewayTables, UsageDatabase):
    """The tables of usage.db."""

    _versions, _changes = "usage_version", 0x41644757_01

    def __init__(self, address: PostgresAddress) -> None:
        super().__init__(address.url, usage_database.MIGRATIONS, options=IN_SCHEMA)


class PostgresLimits(_GatewayTables, LimitsDatabase):
    """The tables of usage.limits.db."""

    _versions, _changes = "limits_version", 0x41644757_02

    def __init__(self, address: PostgresAddress) -> None:
        super().__init__(address.url, limits_database.MIGRATIONS, options=f"{IN_SCHEMA} -c synchronous_commit=off")

    def now(self) -> float:
        """Return the time of the server, in seconds of Unix time: the clocks of gateways may differ."""
        return float(self.select("SELECT extract(epoch FROM clock_timestamp())")[0][0])
