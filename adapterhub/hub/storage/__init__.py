"""Where a hub has its versions, blobs and tables: one folder, or a PostgreSQL and a bucket that several machines share."""
