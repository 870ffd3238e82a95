"""OCI distribution (distribution-spec v1.1, drafts) over the versions of a registry, for oras, skopeo, docker and cosign.

    routes.py      what is answered, by method and path
    tokens.py      logins as docker's clients make them
    answers.py     errors and challenges as clients of registries read them
    references.py  names, tags and digests of a path, and what they lead to
    documents.py   a manifest of any kind, as far as a registry has to understand it
    reading.py     manifests, blobs, tags and referrers
    writing.py     manifests in: versions, if they are adapters, or others
    blobs.py       blobs in: sessions and mounts

A repository has manifests of any kind. One with the files of an adapter becomes a version, with a number, after the checks of a
push; the others, such as images and signatures, are kept beside the versions (`registry.repositories`).
"""
