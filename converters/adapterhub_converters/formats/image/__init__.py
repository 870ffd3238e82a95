"""Adapters of image models: the formats of diffusers and of the trainers, based on closed tables of module names."""
