"""Maintenance of a registry: garbage collection, checks, repair, compression, disk usage."""
