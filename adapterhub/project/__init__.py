"""A project: its settings (adapterhub.toml), its lock file (adapters.lock), and its policy.

settings_file  adapterhub.toml, over `settings_document`, its values; `remote_edits` changes its remotes
lockfile       adapters.lock
policy         what a project, a registry or a hub allows; `policy_rules`, the rules about an adapter.json
tag_rules      what a tag requires: `[promote.TAG]`
"""

PROJECT = "adapterhub.toml"
"""The name of the file that has the settings of a project, or the policy of a registry."""
