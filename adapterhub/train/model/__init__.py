"""The base with its adapters, what goes into them and what comes out."""
