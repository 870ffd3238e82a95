"""Adapter formats, each read to and written from one canonical form; no registry, no network, no command line."""
