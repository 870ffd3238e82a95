"""The documents of an adapter: adapter.json, the OCI image manifest, the model card, and the files they cover."""
