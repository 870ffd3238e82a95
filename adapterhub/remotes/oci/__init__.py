"""OCI registries: repositories, who asks, images, attachments."""
