"""OCI image layouts, in a folder or in a tar, and bundles of versions."""
