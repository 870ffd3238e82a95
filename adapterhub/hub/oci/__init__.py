"""OCI distribution (distribution-spec v1.1, drafts) over the versions of a registry, for oras, skopeo, docker and cosign.

    routes.py             the routes, by method and path
    tokens.py             logins as docker's clients make them
    oci_errors.py         errors and challenges as registry clients read them
    names_and_digests.py  names, tags and digests of a path, and what they refer to
    any_manifest.py       manifests of any kind, as far as a registry has to understand them
    read_handlers.py      reading manifests, blobs, tags and referrers
    manifest_handlers.py  receiving manifests: versions, if they are adapters, or others
    blobs.py              receiving blobs: upload sessions and mounts

A repository has manifests of any kind. One with the files of an adapter becomes a version, with a number, after the same checks
as a push; others, such as images and signatures, are kept beside the versions (`registry.repository_records`).
"""
