"""Adapter formats, each read to and written from one canonical form; no registry, no network, no command line.

adapter         the canonical form
formats         the formats, the table of them, and conversion
containers      safetensors, GGUF, JSON and TOML as bytes
bases           what a base model is
architectures   names of modules in llama.cpp
adapter_files   which file is the adapter, what is a pickle
trained_prompt  the prompt that an adapter was trained with
runtime_rules   what runtimes do with an adapter, with `runtime_models`; `runtime_commands`, the commands that run it
peft_patterns   expressions of configs, in bounded time; `safe_regex`, our own; `yaml_lines`, YAML of cards
errors          errors of every layer; `display`, text of strangers where it is shown
dtypes          element types
lazy_dataclass  what keeps commands fast, with `lazy_imports` and `gc_pause`
"""
