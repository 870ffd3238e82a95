"""Adapters on the Hugging Face Hub and on other hubs with the same API.

hub_repository  an adapter in a plain repository: `hf://…`
hub_client      reads it; `hub_writer` writes it; `hub_files`, its files; `hub_versions`, its commits as versions
hub_registry    a name in a hub of ours, for pushes
hub_catalog     the names of a hub of ours, over `hub_api`
hub_login       logins in a browser
"""
