"""Base models that are not files on this disk: behind a URL, on a hub, or known to a registry by name.

The package of the formats reads a base through its `Files` and does not use the network; `ranges` provides files behind HTTP.
`registered_bases` stores the description of such a base, so that it does not have to be read again.

hub_address   what an address of a model names
remote_base   a base at an address, by its headers alone
hub_download  verified downloads into the cache of huggingface_hub; `hub_cache`, what is in it
"""
