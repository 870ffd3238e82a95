"""Names and row orders of modules in Hugging Face models and in llama.cpp.

whole_models         the table of those whose models and adapters are converted
rule_named_models    those of one row each; `adapter_only_models`, those of which adapters alone are converted
architecture         one of them
architecture_lookup  the one that a base has
"""
