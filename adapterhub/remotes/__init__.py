"""Adapters elsewhere: one interface (`protocol`), `copy_version` over it, and a package for each kind of remote.

Every transfer stores the blobs first, then the manifest, then the tag; no incoming file gets its final name before its digest
is verified.
"""
