"""Adapters as functions: low-rank algebra, differences, norms."""
