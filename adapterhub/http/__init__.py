"""The HTTP client for bases, OCI registries and hubs.

`client` makes requests, `responses` are what comes back, `connection_pools` keeps urllib3's pools, `bounded_responses` reads
responses within limits, `urls` decides where a request may go and `boundary` to which addresses, `http_errors` has the
exceptions.
Only `connection_pools` imports urllib3, so no module that a light command needs may import it, `client` or `responses`.
"""
