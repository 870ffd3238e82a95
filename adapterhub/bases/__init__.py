"""Base models that are not files on this disk: behind a URL, on a hub, or known to a registry by name.

The package of the formats reads a base through its `Files` and does not use the network; `ranges` provides files behind HTTP.
`registered_bases` stores the description of such a base, so that it does not have to be read again.
"""
