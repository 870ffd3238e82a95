"""Adapters on the Hugging Face Hub and on other hubs with the same API."""
