"""What a model is given to learn with: quantized weights, and the layers that adapt them."""
