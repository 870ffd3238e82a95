"""Versions and refs of one registry: the store and its index together."""
