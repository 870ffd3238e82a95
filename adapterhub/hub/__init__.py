"""The hub: a registry behind HTTP, in the protocols that existing clients already speak.

    settings.py             how a hub is started
    hub.py                  state shared by all requests: workers, accounts, uploads
    app.py                  the ASGI application: routes, errors, log lines
    server.py               the process: addresses it may bind, startup and shutdown
    hub_database.py         hub.db: the tables of a hub
    aliases.py              names that refer to one version or one format of another repository
    middleware.py           around every request: rate limits, the audit log
    cross_origin.py         pages of other sites that may read
    commits.py              the commits of a repository: versions, and trees that are not adapters yet
    converted_versions.py   versions converted to other formats, each converted once
    model_bases.py          whole models as bases of adapters, whose files are read by stored_model.py
    publishing.py           how uploaded files become versions
    proposals.py            commits that others propose, and the room that they may take
    file_differences.py     what differs between two trees of files
    renames.py              renaming a repository
    removals.py             removing a repository
    mirror.py               fetching adapters of another hub on demand
    replication.py          copying what is pushed to other places, a replica.py each
    mirror_origin.py        the upstream's commits behind mirrored versions
    blob_response.py        blobs out, with ranges
    uploads.py              blobs in, hashed while they arrive; uploaded_blobs.py, who may use them
    staged_files.py         small files of a commit, until it is accepted
    git_objects.py          the object ids git would give to files
    access_control.py       who is asking, and what they may do
    namespace_owner.py      whether a namespace is this hub's own
    withdrawal_roles.py     who may withdraw a version
    gates.py                gated names, and requests for access to them
    read_log.py             who read which digest
    stars.py                stars of accounts for names
    hidden_names.py         the names that lists leave out for a client
    popularity.py           names by their downloads and stars
    ranked_listing.py       pages of names in that order
    policy_gate.py          the policy, and withdrawals, applied to what is served
    mirrored_withdrawals.py withdrawals that a mirror learns from its upstream
    request_context.py      the request being answered; request_texts.py, the texts of it
    signed_fields.py        fields that a client sends back, signed by the hub
    error_responses.py      responses to failures of the hub itself
    quotas.py               how much a namespace may hold
    workers.py              threads with a registry each
    change_locks.py         locks on changes of repositories
    lru_cache.py            an LRU cache, measured in bytes
    timed_value.py          a value that is computed anew once it is too old
    jobs.py                 work that only one of several processes does
    garbage_collection.py   garbage collection of a running hub
    webhooks.py             events of a namespace, posted to a URL
    openapi.py              the API as an OpenAPI document, with openapi_versions.py, openapi_accounts.py and openapi_schemas.py
    administration/         what people manage themselves
    api/                    the API of our command line
    upstream/               models of another hub
    accounts/               accounts, roles, tokens, logins, publishers, the audit log
    oauth/                  how clients get a token
    operations/             health, metrics, backups
    storage/                one folder, or a PostgreSQL database and a bucket
    hf/                     the API of the Hugging Face Hub
    xet/                    large files through Xet, receiving only
    oci/                    OCI distribution
    web/                    pages for people, and forms of accounts, namespaces and the hub
    adapter_forms/          the forms of the pages that change an adapter, by the same checks as the API

Versions and their bytes belong to the registry. Nothing here prints or exits; log lines go through `logging`.
"""
