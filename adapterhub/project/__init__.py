"""Settings of a project or its user: adapterhub.toml, adapters.lock, the policy."""
