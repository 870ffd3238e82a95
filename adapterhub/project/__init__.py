"""A project: its settings (adapterhub.toml), its lock file (adapters.lock), and its policy."""

PROJECT = "adapterhub.toml"
"""The name of the file that has the settings of a project, or the policy of a registry."""
