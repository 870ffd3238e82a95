"""Adapters in OCI registries: repositories, credentials, images, attachments."""
