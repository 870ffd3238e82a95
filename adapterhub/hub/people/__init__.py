"""Accounts of a hub, and their tokens."""
