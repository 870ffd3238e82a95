"""What a training will take, and what it took."""
