"""Adapters of image models: the formats of diffusers and of the trainers, over closed tables of module names."""
