"""OCI registries: repositories, credentials, images, attachments."""
