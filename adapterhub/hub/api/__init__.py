"""The hub's own API: what the commands of a registry do, as requests with JSON in both directions.

Its documents are what `--json` of the commands prints (`remotes.version_documents`, `remotes.content_documents`).
"""
