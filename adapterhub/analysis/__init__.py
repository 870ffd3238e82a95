"""Analyze adapters as functions: low-rank algebra, differences, norms."""
