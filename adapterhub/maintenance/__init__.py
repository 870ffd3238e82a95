"""Keep a registry small and whole: garbage collection, checks, repair, compression, disk usage."""
