"""Adapters between folders, the registry and remotes: push, pull, copy and tag, whatever the place."""
