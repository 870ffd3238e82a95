"""The one HTTP client: for bases, OCI registries and hubs.

`client` makes requests, `connections` keeps urllib3's pools, `urls` decides where a request may go, `errors` are what fails.
Only `client` and `connections` import urllib3, so nothing that a light command needs may import them.
"""
