"""The accounts of a hub, and their tokens.

accounts       accounts, their roles, and the settings of namespaces
access_tokens  tokens of accounts; `sessions`, of browsers
admissions     who may sign in at a provider, by `oidc`; `id_tokens`, the tokens of one
device_logins  a code that a person approves in a browser
publishers     CI jobs that push without a secret
audit_log      who changed what, and who was refused
"""
