"""The one HTTP client: for bases, OCI registries and hubs.

`client` makes requests, `connections` keeps urllib3's pools, `bounded` reads answers, `urls` decides where a request may go and
`boundary` to which addresses, `errors` are what fails.
Only `client` and `connections` import urllib3, so nothing that a light command needs may import them.
"""
