"""The base model with its adapter: loading and checking it, and copying adapters into and out of it.

loading           a base, quantized tensor by tensor: `base_files`, `base_tensors`, and `quantized_cache` for the next run
base_model        the model as the loop uses it; `probes`, what it does with its attention
families          what each family of models needs
adapter_transfer  adapters in and out
transformers_api  the one module that asks transformers
tokenizer_files   files of tokenizers, checked; `tokenizer_search`, their expressions, tried
"""
