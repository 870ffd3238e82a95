"""A whole Hugging Face model as llama.cpp's conversion has it: metadata, vocabulary, and which tensor comes from what.

The rules are those of llama.cpp's `conversion/` (of the source distribution of llama-cpp-python 0.3.36), which is the oracle of
the tests. What it would get wrong without a word is refused by name here.
"""
