"""The accounts of a hub, and their tokens."""
