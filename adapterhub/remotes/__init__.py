"""Adapters elsewhere: one seam (`remote`), `copy` over it, and a module for each kind of place.

Blobs first, manifest last, then the tag; nothing that comes in gets a name before its digest is right.
"""
