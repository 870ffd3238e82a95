"""Forms of the pages that change an adapter. They make the same changes, with the same checks, as the requests of the API.

Forms about accounts, namespaces and the hub are with their pages, in `hub.web`.
"""
