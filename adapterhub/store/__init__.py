"""Bytes on disk: blobs, the ref log, leases and packs; no SQL."""
