"""The hub: a registry behind HTTP, in the protocols that existing clients already speak.

    settings.py     how a hub is started
    hub.py          state shared by all requests: workers, accounts, uploads
    app.py          the ASGI application: routes, errors, log lines
    server.py       the process: addresses it may bind, startup and shutdown
    aliases.py      names that refer to one version or one format of another repository
    middleware.py   around every request: rate limits, the audit log
    commits.py      the commits of a repository: versions, and trees that are not adapters yet
    forms.py        versions converted to other formats, each converted once
    publishing.py   how uploaded files become versions
    moving.py       renaming a repository
    blobs.py        blobs out, with ranges
    uploads.py      blobs in, hashed while they arrive
    git.py          the object ids git would give to files
    access.py       who is asking, and what they may do
    asking.py       the request being answered
    quotas.py       how much a namespace may hold
    releases.py     the policy applied to what is served
    remembered.py   an LRU cache
    jobs.py         work that only one of several processes does
    webhooks.py     events of a namespace, posted to a URL
    people/         accounts, roles, tokens, logins, publishers, the audit log
    oauth/          how clients get a token
    operations/     health, metrics, log lines, backups
    hf/             the API of the Hugging Face Hub
    xet/            large files through Xet, receiving only
    oci/            OCI distribution
    web/            pages for people

Versions and their bytes belong to the registry. Nothing here prints or exits; log lines go through `logging`.
"""
