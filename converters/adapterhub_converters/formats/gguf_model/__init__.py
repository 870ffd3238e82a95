"""Conversion of whole Hugging Face models to GGUF as llama.cpp does it (metadata, vocabulary, tensors), and of GGUF bases back.

    metadata      `general.*` and hyperparameters: `shared_keys`, `architecture_keys`, by a `model_config`
    vocabulary    `byte_level`, `sentencepiece` and `special_tokens`
    arrangement   the sources of each tensor
    model_checks  what llama.cpp would compute differently
    to_folder     the way back

The rules are those of llama.cpp's `conversion/` (in the source distribution of llama-cpp-python 0.3.36), which is the oracle of
the tests. Whatever it would silently get wrong is refused by name here.
"""
