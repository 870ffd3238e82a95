"""The data of a training, from files to rows of tokens."""
