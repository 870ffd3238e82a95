"""The hub's own API: what the commands of a registry do, as requests with JSON in both directions.

    routes        the routes, by method and path
    api_requests  a request and its errors; `request_fields`, the values in its JSON; `account_requests`, those about accounts
    reading       lists, searches, versions, logs
    changing      publishes, tags, deprecates, removes, restores, over `name_changes`
    releasing     promotes, approves, rolls back, withdraws, over `release_changes`
    proposing     proposals
    gate          the gate of a name
    own_account   the client's profile and tokens; `namespaces`, what admins of one manage; `administration`, admins of the hub

Its documents are what `--json` of the commands prints (`remotes.version_documents`, `remotes.content_documents`).
"""
