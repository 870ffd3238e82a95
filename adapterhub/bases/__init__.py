"""Base models that are not files on the disk: behind a URL, on a hub, or known to a registry by name.

The package of the formats reads a base through its `Files` and has no network; `ranges` has the files behind HTTP. `registered`
stores the description of such a base, so that it need not be read again.
"""
