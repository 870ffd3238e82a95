"""The command line: parse, one call, render. The only layer that prints, exits or reads the environment."""
