"""A project: its settings (adapterhub.toml), its lock file (adapters.lock), and its policy."""
