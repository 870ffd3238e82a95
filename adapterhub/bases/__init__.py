"""Bases that do not lie on the disk: behind a URL, on a hub, or known to a registry by name.

The formats' package reads a base through `Files` and knows no network; `address` has the files behind HTTP. `registered`
keeps what such a base is, so that it need not be read again.
"""
