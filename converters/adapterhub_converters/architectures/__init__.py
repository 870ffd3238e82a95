"""Names of modules in Hugging Face models and in llama.cpp."""
