"""Adapter formats, each read to and written from the canonical form."""
