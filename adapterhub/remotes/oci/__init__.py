"""Adapters in OCI registries: repositories, credentials, images, attachments.

oci_address      `oci://…`
oci_repository   an adapter there; `version_numbers`, its tags v1, v2 …
registry_host    a registry as a whole
registry_client  requests; `challenges`, what a 401 asks for; `docker_credentials`, the answer
blob_upload      uploads in pieces; `upload_notes`, those to be resumed
referrers        what is attached to a version; `cosign_claims`, what cosign 2 has attached
tar_layers       artifacts whose layers are tars; `adapter_image`, an adapter as a container image
"""
