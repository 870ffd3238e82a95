"""Names and row orders of modules in Hugging Face models and in llama.cpp."""
