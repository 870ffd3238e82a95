"""Storage of a hub's versions, blobs and tables: one folder, or a PostgreSQL database and a bucket."""
