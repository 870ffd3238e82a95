"""The base model with its adapter: loading and checking it, and copying adapters into and out of it."""
