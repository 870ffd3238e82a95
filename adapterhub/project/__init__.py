"""A project: its settings (adapterhub.toml), its lock file (adapters.lock), and its policy."""

PROJECT = "adapterhub.toml"
"""The name of the file with the settings of a project, or with the policy of a registry."""
