"""What a model is given to learn with: quantised weights, and the layers that adapt them."""
