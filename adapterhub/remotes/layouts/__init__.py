"""OCI image layouts, in a folder or a tar, and bundles of versions."""
