"""The base model with its adapter: loading it, checking it, and adapters into and out of it."""
