"""registry.db, an index of the store in SQLite that can be rebuilt at any time."""
