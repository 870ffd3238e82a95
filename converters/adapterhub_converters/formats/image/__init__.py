"""Adapters of image models: the dialects of diffusers and of the trainers, over closed tables of names."""
