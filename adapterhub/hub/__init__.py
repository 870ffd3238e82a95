"""The hub: a registry behind HTTP, in the protocols that everybody's clients speak already.

    settings.py     what a hub is started with
    hub.py          what all requests share: workers, accounts, uploads
    app.py          the ASGI application: routes, errors, log lines
    server.py       the process: addresses that may be bound, start and end
    aliases.py      names that stand for a version or a form of another repository
    middleware.py   around every request: limits of rates, the audit log
    commits.py      the commits of a repository: versions, and trees that are no adapter yet
    forms.py        versions in other formats, made once
    publishing.py   the way in of whatever was uploaded
    moving.py       a repository under another name
    blobs.py        blobs out, with ranges
    uploads.py      blobs in, hashed while they arrive
    git.py          the names that git would give to files
    access.py       who asks, and what they may do
    asking.py       the request that is being answered
    quotas.py       how much a namespace may hold
    remembered.py   values that are made once, while there is room
    jobs.py         what one of several processes does once
    webhooks.py     what happens in a namespace, posted to a URL
    people/         accounts, roles, tokens, logins, publishers, the audit log
    oauth/          how clients get a token
    operations/     health, metrics, log lines, backups
    hf/             the API of the Hugging Face Hub
    xet/            large files by Xet, receiving only
    oci/            OCI distribution
    web/            pages for people

Versions and their bytes are the registry's. Nothing here prints or exits; log lines go through `logging`.
"""
