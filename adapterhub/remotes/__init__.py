"""Adapters elsewhere: one interface (`protocol`), `copy_version` over it, and a package for each kind of remote.

    protocol             what has blobs, manifests and tags, here or elsewhere
    version_copy         `copy_version`, over `parallel_transfer` and `download`
    local_name           a name of the registry here; `adapter_folders`, a folder
    oci                  OCI registries; `layouts`, image layouts; `hub`, hubs; `objects`, buckets and folders
    remote_address       an address and what connects to it; `address_schemes`, its scheme alone
    named_remotes        the remotes of the settings; `known_hosts`, the hosts that the user has dealt with
    remote_access        what a remote grants and contains; `version_listing`, the versions at an address
    attached_signatures  signatures and attestations elsewhere; `version_bundle`, several versions and theirs in one layout
    catalog              what commands ask about names, answered here by `local_catalog`, elsewhere by `hub.hub_catalog`
    version_documents    its answers as JSON, with `content_documents`, `release_documents` and `answer_fields`

Every transfer stores the blobs first, then the manifest, then the tag; no incoming file gets its final name before its digest
is verified.
"""
