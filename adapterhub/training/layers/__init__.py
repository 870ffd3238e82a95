"""Quantized weights, and the layers that adapt them."""
