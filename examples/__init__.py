"""What `make demo` runs, and configurations to begin with."""
