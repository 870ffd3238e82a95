"""The files that a training writes."""
