"""Storage of a hub's versions, blobs and tables: one folder, or a PostgreSQL database and a bucket.

from_settings   opens one of the two
folder_storage  one folder, with `folder_store`
shared_storage  several machines: `postgres`, `shared_log` and `bucket_blobs`
bucket_gc       garbage collection of a bucket; `bucket_check`, its digests
migration       from one to the other
"""
