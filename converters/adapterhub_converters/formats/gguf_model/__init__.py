"""Conversion of whole Hugging Face models to GGUF as llama.cpp does it (metadata, vocabulary, tensors), and of GGUF bases back.

The rules are those of llama.cpp's `conversion/` (in the source distribution of llama-cpp-python 0.3.36), which is the oracle of
the tests. Whatever it would silently get wrong is refused by name here.
"""
