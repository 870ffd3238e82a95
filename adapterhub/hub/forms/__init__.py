"""Forms of the pages that change an adapter. They make the same changes, with the same checks, as the requests of the API."""
