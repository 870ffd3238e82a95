"""The data of a training run, from files to rows of tokens."""
