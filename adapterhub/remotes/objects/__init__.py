"""Adapters in object stores, and in folders with the same layout."""
