"""`python -m adapterhub`."""

from .cli import main

main()
